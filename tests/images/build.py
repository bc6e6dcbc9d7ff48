"""Make the Docker images that tests use. Nothing is pulled; what exists already is not built again.

    orchestrator-test/base:2         a small Debian with Python and libgomp, made by debootstrap (needs root)
    orchestrator-test/mimic:latest   the mimic, see tests/mimic/mimic.py
    orchestrator-test/llama:latest   llama.cpp as this virtual environment's xllamacpp wheel has it
    orchestrator-test/llama-cpp:…    services/llama-cpp for the CPU, see tests/images/llama_cpp.py

Each also has a tag that names its content: tests use the tag which the functions return, so that two
checkouts on one machine do not use each other's images.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import io
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
from docker.errors import BuildError, ImageNotFound

from tests.nvml.build import cache_dir

SUITE = "bookworm"  # its Python is 3.11
BASE = "orchestrator-test/base:2"  # raise the number with a change of what make_base_tar makes
PACKAGES = "ca-certificates,libgomp1,python3,python3-venv"
USER = 10001
UNNEEDED = ("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/lintian")
UNNEEDED_CONTENT = ("dev", "proc", "sys", "tmp", "var/cache", "var/lib/apt/lists", "var/log")
SITE_PACKAGES = "/usr/local/lib/python3.11/dist-packages"

MIMIC_RECIPE = f"""\
FROM {BASE}
COPY mimic.py /mimic.py
ENV HOST=0.0.0.0 PORT=8000
USER {USER}:{USER}
EXPOSE 8000
ENTRYPOINT ["python3", "-S", "-E", "/mimic.py"]
"""
LLAMA_RUNTIME_RECIPE = f"""\
FROM {BASE}
COPY site {SITE_PACKAGES}
WORKDIR /app
ENV HOST=0.0.0.0 PORT=8000 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER {USER}:{USER}
EXPOSE 8000
"""


def build_base() -> str:
    """Import the base image unless it is there; returns its tag. The first time takes about a minute."""
    with engine() as client:
        if not exists(client, BASE):
            tar = cache_dir() / f"{BASE.replace('/', '-').replace(':', '-')}.tar"
            if not tar.exists():
                make_base_tar(tar)
            repository, tag = BASE.split(":")
            client.api.import_image(src=str(tar), repository=repository, tag=tag, changes=['CMD ["python3"]'])
    return BASE


def build_mimic() -> str:
    """Build the mimic's image unless it is there; returns the tag that names this very source."""
    files = {"mimic.py": Path(__file__).parents[1] / "mimic" / "mimic.py"}
    return _build("orchestrator-test/mimic", "", MIMIC_RECIPE, files)


def build_llama(extra: Mapping[str, Path] | None = None, command: tuple[str, ...] = ()) -> str:
    """Build the llama.cpp image unless it is there; returns the tag that names its content.

    `extra` has files or folders to copy, by their path in the image: relative to the working folder
    /app, or absolute. `command` is what a container runs, by default
    `python3 -m orchestrator.local.llama`.
    """
    version = importlib.metadata.version("xllamacpp")
    runtime = _build(
        "orchestrator-test/llama-runtime", f"{version}-", LLAMA_RUNTIME_RECIPE, _wheel("xllamacpp")
    )
    files, copies = {}, []
    for number, (target, source) in enumerate(sorted((extra or {}).items())):
        files |= files_below(f"extra{number}", source)
        copies.append(f'COPY ["extra{number}", "{target}"]\n')
    words = ", ".join(f'"{word}"' for word in command or ("python3", "-m", "orchestrator.local.llama"))
    recipe = f"FROM {runtime}\n{''.join(copies)}CMD [{words}]\n"
    return _build("orchestrator-test/llama", f"{version}-", recipe, files, also=(version,))


def make_base_tar(tar: Path) -> None:
    """Write the base image's root file system, with a user of our own and without what tests don't need."""
    tar.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tar.parent, prefix="base-") as folder:
        root = Path(folder) / "root"
        command = [
            "debootstrap",
            "--variant=minbase",
            f"--include={PACKAGES}",
            SUITE,
            str(root),
            debian_mirror(),
        ]
        subprocess.run(command, check=True, stdout=subprocess.PIPE)
        with (root / "etc/passwd").open("a") as users:
            users.write(f"service:x:{USER}:{USER}::/tmp:/usr/sbin/nologin\n")
        with (root / "etc/group").open("a") as groups:
            groups.write(f"service:x:{USER}:\n")
        leave_out = [f"--exclude=./{name}" for name in UNNEEDED]
        leave_out += [f"--exclude=./{name}/*" for name in UNNEEDED_CONTENT]
        half_done = Path(folder) / "base.tar"
        subprocess.run(["tar", "-C", root, "--numeric-owner", *leave_out, "-cf", half_done, "."], check=True)
        half_done.rename(tar)


def debian_mirror() -> str:
    """The mirror this machine is set up to use for SUITE, or ORCHESTRATOR_TEST_DEBIAN_MIRROR.

    Reads both forms of apt's sources. Raises RuntimeError if there is none.
    """
    if named := os.environ.get("ORCHESTRATOR_TEST_DEBIAN_MIRROR"):
        return named
    apt = Path("/etc/apt")
    for path in sorted(apt.glob("sources.list.d/*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text()):
            fields = dict(re.findall(r"^(\w[\w-]*):[ \t]*(.*)$", stanza, re.MULTILINE))
            if SUITE in fields.get("Suites", "").split() and "main" in fields.get("Components", "").split():
                return fields["URIs"].split()[0]
    for path in [apt / "sources.list", *sorted(apt.glob("sources.list.d/*.list"))]:
        text = path.read_text() if path.exists() else ""
        if found := re.search(rf"^deb\s+(?:\[.*?\]\s+)?(\S+)\s+{SUITE}\s+.*\bmain\b", text, re.MULTILINE):
            return found[1]
    raise RuntimeError(f"no Debian mirror for {SUITE} in /etc/apt; set ORCHESTRATOR_TEST_DEBIAN_MIRROR")


@contextmanager
def engine() -> Iterator[docker.DockerClient]:
    """A client of the engine; one process on this machine builds at a time."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with (cache_dir() / "images.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = docker.from_env(timeout=600)
        try:
            yield client
        finally:
            client.close()


def exists(client: docker.DockerClient, tag: str) -> bool:
    try:
        client.images.get(tag)
    except ImageNotFound:
        return False
    return True


def _build(
    repository: str,
    prefix: str,
    recipe: str,
    files: Mapping[str, Path],
    also: tuple[str, ...] = (),
    network_mode: str | None = None,
) -> str:
    """Build `recipe` with `files` (by their path in the build context) unless that was done before.

    Returns the tag that names the content; the image gets the tags in `also` and `latest` besides.
    """
    build_base()
    tag = f"{repository}:{prefix}{digest_of(recipe, files)}"
    options = {"network_mode": network_mode} if network_mode else {}
    with engine() as client:
        if not exists(client, tag):
            with context_of(recipe, files) as context:
                build_context(client, context, tag, **options)
        image = client.images.get(tag)
        for name in {f"{repository}:{name}" for name in (*also, "latest")} - set(image.tags):
            image.tag(name)
    return tag


def build_context(client: docker.DockerClient, context: io.BufferedIOBase, tag: str, **options: Any) -> None:
    """`options` are more of the SDK's. Raises RuntimeError with all that the build said."""
    try:
        client.images.build(fileobj=context, custom_context=True, tag=tag, rm=True, pull=False, **options)
    except BuildError as error:
        lines = [str(line.get("stream") or line.get("error") or "") for line in error.build_log]
        raise RuntimeError(f"building {tag} failed:\n{''.join(lines)}") from error


def digest_of(recipe: str, files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256(recipe.encode())
    for name, path in sorted(files.items()):
        digest.update(f"\0{name}\0".encode())
        with path.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:12]


@contextmanager
def context_of(recipe: str, files: Mapping[str, Path]) -> Iterator[io.BufferedIOBase]:
    """A build context whose bytes depend on the content only."""
    with tempfile.TemporaryFile() as context:
        with tarfile.open(fileobj=context, mode="w") as tar:
            _add(tar, "Dockerfile", io.BytesIO(recipe.encode()), len(recipe.encode()))
            for name, path in sorted(files.items()):
                with path.open("rb") as content:
                    _add(tar, name, content, path.stat().st_size)
        context.seek(0)
        yield context


def _add(tar: tarfile.TarFile, name: str, content: io.BufferedIOBase, size: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = size
    entry.mode = 0o755 if ".so" in name else 0o644
    tar.addfile(entry, content)


def files_below(name: str, path: Path) -> dict[str, Path]:
    """The files of a folder, or the file itself, by their path under `name`; without compiled Python."""
    if path.is_file():
        return {name: path}
    below = (file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {f"{name}/{file.relative_to(path)}": file for file in below}


def _wheel(distribution: str) -> dict[str, Path]:
    """The installed files of a distribution, by their path under `site`, without what pip wrote there."""
    files = importlib.metadata.files(distribution) or []
    parts_left_out = {"__pycache__", "RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
    kept = [file for file in files if not parts_left_out & set(file.parts)]
    return {f"site/{file}": Path(str(file.locate())) for file in kept}


def main() -> None:
    from tests.images.llama_cpp import build_llama_cpp  # which needs this module

    builders = {
        "base": build_base,
        "mimic": build_mimic,
        "llama": build_llama,
        "llama-cpp": build_llama_cpp,
    }
    parser = argparse.ArgumentParser(description="Build the images that tests use.")
    parser.add_argument("image", nargs="*", help=f"which of {', '.join(builders)}; by default all")
    for name in parser.parse_args().image or builders:
        print(builders[name]())


if __name__ == "__main__":
    main()
