"""What the README says of downloading: script and commands, against a hub on this machine."""

import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub.server import Hub
from tests.services.conftest import MODEL, PROJECTOR, REPO
from tests.services.containers import SCRIPT, Container, container, docker, in_volume, run, script_environment
from tests.support import eventually

pytestmark = pytest.mark.docker

Download = Callable[..., "subprocess.CompletedProcess[str]"]
PARTIAL_SIZE = "stat -c %s /data/.huggingface/hub/models--*/blobs/*.incomplete 2>/dev/null || true"
PROMISED = "qwen3-vl-30b-a3b-instruct-q4_k_m.gguf"


@pytest.fixture
def download(image: str, volume: str, hub_url: str) -> Download:
    """The script with these arguments; variables as keywords."""

    def script(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return run(str(SCRIPT), *words, env=script_environment(image, volume, hub_url, **environment))

    return script


@pytest.fixture(scope="module")
def idle(image: str, hub_url: str) -> Iterator[Container]:
    """A container that only waits for commands."""
    with container(image, "sleep", "600", HF_ENDPOINT=hub_url) as box:
        yield box


def listing(image: str, volume: str) -> list[str]:
    """The cache's files below its snapshots, with owner."""
    find = "cd /data/.huggingface/hub && find . -path '*snapshots*' -type l -printf '%u:%g %f\\n' | sort"
    return in_volume(image, volume, find).splitlines()


def test_the_script_gets_the_default_model_and_its_projector_once(
    download: Download, image: str, volume: str, hub: Hub
) -> None:
    before = len(hub.asked(".gguf"))
    first = download()
    assert first.returncode == 0, first.stderr
    assert [Path(line).name for line in first.stdout.splitlines()] == [MODEL, PROJECTOR]
    assert f"{MODEL}: 100%" in first.stderr, "it shows progress"
    assert len(hub.asked(".gguf")) == before + 2

    again = download()
    assert again.stdout == first.stdout
    assert f"{MODEL}: already there" in again.stderr
    assert len(hub.asked(".gguf")) == before + 2, "never twice"
    assert listing(image, volume) == [f"1000:1000 {name}" for name in (MODEL, PROJECTOR)]


def test_what_was_interrupted_goes_on_where_it_stopped(
    download: Download, image: str, volume: str, hub: Hub, hub_url: str
) -> None:
    paused = hub.pause_after(200_000, MODEL)
    environment = script_environment(image, volume, hub_url)
    with subprocess.Popen(
        [str(SCRIPT)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as script:
        try:
            paused.wait_hit()
            eventually(lambda: in_volume(image, volume, PARTIAL_SIZE).strip() == "200000", 20, every_s=0.1)
        finally:
            script.send_signal(signal.SIGINT)
            said = script.communicate(timeout=20)[0].decode()
    paused.end()
    assert script.returncode == 130
    assert "the same command goes on where it stopped" in said
    assert download().returncode == 0
    assert hub.asked(MODEL)[-1].first_byte == 200_000


def test_a_connection_that_breaks_is_taken_up_again(download: Download, hub: Hub) -> None:
    hub.cut_after(100_000, MODEL)
    done = download(REPO, MODEL, "--no-mmproj")
    assert done.returncode == 0, done.stderr
    assert "going on" in done.stderr
    assert hub.asked(MODEL)[-1].first_byte == 100_000


def test_what_arrives_damaged_never_becomes_part_of_the_cache(
    download: Download, image: str, volume: str, hub: Hub
) -> None:
    hub.corrupt(MODEL)
    done = download()
    assert done.returncode == 1
    assert f"error: {MODEL} arrived damaged (SHA-256 " in done.stderr
    assert "run the same command again" in done.stderr
    assert listing(image, volume) == []
    assert download().returncode == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((REPO, "Qwen3VL-30B-A3B-Instruct-Q4_K_S.gguf"), f"has no file '.*Q4_K_S.gguf'; similar: {MODEL}"),
        ((REPO, "*q9*"), rf"has no file '\*q9\*'; it has {MODEL}, {PROJECTOR}, README.md"),
        (
            ("Qwen/Qwen3-LV", "x.gguf"),
            "there is no repository 'Qwen/Qwen3-LV' at .*, or it is private and HF_TOKEN",
        ),
        (("no such repo",), "'no such repo' cannot be the name of a repository; write OWNER/NAME"),
        ((REPO, "--revision", "v9"), f"{REPO} has no revision 'v9'"),
        (("acme/gated-GGUF",), "is gated: accept its terms at http.*/acme/gated-GGUF, then set HF_TOKEN"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_line(idle: Container, words: tuple[str, ...], says: str) -> None:
    done = run("docker", "exec", idle.name, "huggingface-cli", "download", *words)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(says, line), line


def test_a_token_opens_what_is_gated_and_is_in_no_command_line(
    image: str, volume: str, hub: Hub, hub_url: str
) -> None:
    paused = hub.pause_after(1000, "gated-Q4_K_M.gguf")
    environment = script_environment(image, volume, hub_url, HF_TOKEN=hub.token)
    with subprocess.Popen(
        [str(SCRIPT), "acme/gated-GGUF"], env=environment, stderr=subprocess.DEVNULL
    ) as script:
        paused.wait_hit()
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        paused.end()
        assert script.wait(30) == 0
    assert any(b"acme/gated-GGUF" in line for line in lines)
    assert not any(hub.token.encode() in line for line in lines)


def test_a_token_that_is_wrong_is_told(download: Download) -> None:
    done = download("acme/gated-GGUF", HF_TOKEN="hf_wrong")
    assert "is gated: accept its terms at" in done.stderr
    assert "with the account of this HF_TOKEN" in done.stderr
    assert "hf_wrong" not in done.stderr


def test_a_hub_that_does_not_answer_is_told(download: Download) -> None:
    done = download(HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "error: http://127.0.0.1:9 does not answer (" in done.stderr


def test_a_disk_without_room_is_told_before_anything_is_downloaded(
    image: str, hub: Hub, hub_url: str
) -> None:
    before = len(hub.asked(".gguf"))
    small = ("--rm", "--tmpfs", "/data/.huggingface:size=256k", "--env", f"HF_ENDPOINT={hub_url}")
    done = run("docker", "run", *small, image, "download", REPO, MODEL)
    assert done.returncode == 1
    assert "needs 0.6 MiB more, and only 0.2 MiB are free at /data/.huggingface" in done.stderr
    assert len(hub.asked(".gguf")) == before


def test_a_cache_of_somebody_else_is_told(image: str, volume: str, hub_url: str, download: Download) -> None:
    in_volume(
        image,
        volume,
        "cd /data/.huggingface; mkdir hub/.locks; chown -R 4321 .; chmod 755 hub",
    )
    done = download()
    assert done.returncode == 1
    assert "1000:1000 may not write /data/.huggingface/hub/" in done.stderr
    assert download(PUID="4321").returncode == 0


def test_without_the_image_the_script_says_how_to_build_it(download: Download) -> None:
    done = download(LLAMA_CPP_IMAGE="orchestrator/llama-cpp:nowhere")
    assert done.returncode == 1
    assert "there is no image orchestrator/llama-cpp:nowhere; build it with: docker build -t" in done.stderr


def test_the_script_explains_itself(download: Download) -> None:
    shown = download("--help").stdout
    assert "services/llama-cpp/download-model.sh REPO [FILE ...]" in shown
    assert "HF_TOKEN" in shown


def test_patterns_and_all_parts_of_a_split_model(download: Download, hub: Hub) -> None:
    parts = [f"Big-Q8_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    hub.add(
        "acme/Big-GGUF", {name: name.encode() for name in (*parts, "Big-Q4_0.gguf", "mmproj-big-f16.gguf")}
    )
    done = download("acme/Big-GGUF", "big-q8_0-00001-*")
    assert [Path(line).name for line in done.stdout.splitlines()] == [*parts, "mmproj-big-f16.gguf"]


def test_old_and_new_name_of_the_command_are_there_and_work_as_the_caches_user(
    image: str, volume: str, hub_url: str
) -> None:
    options = ("-v", f"{volume}:/data/.huggingface")
    with container(image, "sleep", "60", options=options, HF_ENDPOINT=hub_url) as box:
        docker("exec", box.name, "huggingface-cli", "download", REPO, "README.md", "--quiet")
        docker("exec", box.name, "hf", "download", REPO, MODEL, "--quiet")
        assert "huggingface_hub version" in docker("exec", box.name, "huggingface-cli", "env")
        assert "Found 1 repo(s)" in docker("exec", box.name, "huggingface-cli", "scan-cache")
    assert listing(image, volume) == [f"1000:1000 {name}" for name in (MODEL, "README.md")]
