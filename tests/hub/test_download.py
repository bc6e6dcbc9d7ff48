"""Real downloads from a local hub: whole, resumed, corrupted, refused, and never twice.

`huggingface_hub` itself is the judge of the cache: it must find what we wrote, and we what it wrote.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from orchestrator.control.ports import Wanted
from orchestrator.core.entities import Download
from orchestrator.core.errors import (
    ChecksumMismatch,
    DiskFull,
    HubError,
    HubUnreachable,
    QuantNotFound,
    RepositoryGated,
    RepositoryNotFound,
)
from orchestrator.hub.cache import RepoCache, hub_folder
from orchestrator.hub.client import HubClient
from orchestrator.hub.download import MOST_TRIES, FileDownload
from orchestrator.hub.fetch import ABANDONED, Order
from orchestrator.hub.service import HuggingFaceHub, find
from tests.hub.server import Hub, hub_server
from tests.support import eventually, free_port

REPO = "acme/tiny-GGUF"
MODEL, PROJECTOR = "tiny-Q4_K_M.gguf", "mmproj-F16.gguf"
DATA = os.urandom(3_000_000)
CUT = 1_000_000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one repository, and an empty cache."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING_FACE_", "XDG_CACHE_HOME")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with hub_server() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        running.add(REPO, {MODEL: DATA, PROJECTOR: DATA[:5000], "README.md": b"# Tiny"})
        yield running


def wanted(reference: str = REPO) -> Download:
    return find(Wanted(reference), 0)


def fetch(download: Download, *, told: list[int] | None = None) -> None:
    """As the server does it: in a process of its own."""
    report = (told if told is not None else []).append
    asyncio.run(HuggingFaceHub().fetch(download, report))


def cache_of(download: Download) -> RepoCache:
    return RepoCache(hub_folder(), download.repo)


def content(download: Download, path: str = MODEL) -> bytes:
    return cache_of(download).place(download.commit, path).read_bytes()


def starts(hub: Hub, name: str = MODEL) -> list[int]:
    """Where each request for the file's bytes began."""
    return [asked.first_byte for asked in hub.asked(name)]


# --- whole


def test_all_files_of_the_model_and_nothing_else(hub: Hub) -> None:
    download, told = wanted(), list[int]()
    fetch(download, told=told)
    assert content(download) == DATA
    assert content(download, PROJECTOR) == DATA[:5000]
    assert not cache_of(download).place(download.commit, "README.md").exists()
    assert told == sorted(told)
    assert 0 < told[-1] <= download.total_bytes
    assert hub.asked(MODEL)[0].token is None, "the token is not for the CDN"


def test_the_hubs_own_library_finds_it_and_asks_for_no_byte(hub: Hub) -> None:
    download = wanted()
    fetch(download)
    before = len(hub.asked(MODEL))
    path = by_library("hf_hub_download", REPO, MODEL)
    assert Path(path) == cache_of(download).place(download.commit, MODEL)
    assert len(hub.asked(MODEL)) == before
    report = by_library("scan_cache_dir")
    assert f"repo_id='{REPO}'" in report
    assert "refs=frozenset({'main'})" in report
    assert "warnings=[]" in report


def test_what_the_library_has_downloaded_is_not_downloaded_again(hub: Hub) -> None:
    by_library("hf_hub_download", REPO, MODEL)
    before = len(hub.asked(MODEL))
    download = wanted()
    fetch(download)
    assert content(download) == DATA
    assert len(hub.asked(MODEL)) == before
    assert starts(hub, PROJECTOR) == [0], "only what was missing"


def by_library(function: str, *arguments: str) -> str:
    """What huggingface_hub, which reads its environment once, answers in a process of its own."""
    code = f"import huggingface_hub as h, sys; print(h.{function}(*sys.argv[1:]))"
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def test_files_of_git_itself_are_verified_too(hub: Hub) -> None:
    hub.add("acme/small", {"m.gguf": DATA[:10], "preset.txt": b"small text"})
    with HubClient() as client:
        listing = client.listing("acme/small")
        (text,) = [file for file in listing.files if file.path == "preset.txt"]
        cache = RepoCache(hub_folder(), listing.repo)
        FileDownload(client, cache, listing.commit, text, lambda _: None).run()
        assert cache.place(listing.commit, "preset.txt").read_bytes() == b"small text"
        cache.remove(listing.commit, [text], ())
        hub.corrupt("preset.txt")
        with pytest.raises(ChecksumMismatch):
            FileDownload(client, cache, listing.commit, text, lambda _: None).run()


def test_files_are_for_the_group_and_main_is_written_last(hub: Hub) -> None:
    download = wanted()
    pause = hub.pause_after(CUT, MODEL)
    with background(download):
        pause.wait_hit()
        folder = cache_of(download).folder
        assert not (folder / "refs" / "main").exists()
        pause.end()
        eventually((folder / "refs" / "main").exists)
    assert (folder / "refs" / "main").read_text() == download.commit
    for path in hub_folder().rglob("*"):
        if not path.is_symlink():
            assert path.stat().st_mode & 0o020, f"{path} cannot be written by the group"


# --- interrupted


def test_a_cut_connection_is_gone_on_with_where_it_broke(hub: Hub) -> None:
    hub.cut_after(CUT, MODEL)
    download = wanted()
    fetch(download)
    first, second = starts(hub)
    assert first == 0
    assert 0 < second <= CUT
    assert content(download) == DATA


def test_a_killed_download_is_gone_on_with_by_the_next_one(hub: Hub) -> None:
    pause = hub.pause_after(CUT, MODEL)
    download = wanted()
    with background(download):
        pause.wait_hit()
        incomplete = cache_of(download).incomplete(download.files[0])
        eventually(lambda: incomplete.exists() and incomplete.stat().st_size > 0)
    size = incomplete.stat().st_size
    fetch(download)
    assert starts(hub) == [0, size]
    assert content(download) == DATA
    assert not incomplete.exists()


@contextmanager
def background(download: Download) -> Iterator[None]:
    """The download, cancelled at the end unless it is done."""

    async def run() -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(HuggingFaceHub().fetch(download, lambda _: None), 60)

    loop = asyncio.new_event_loop()
    task = loop.create_task(run())
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([task])))
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(30)
        loop.close()
        assert not thread.is_alive()


def test_a_download_ends_with_its_server(hub: Hub) -> None:
    """Whose stdin it watches: a kill -9 leaves nobody who still writes."""
    pause = hub.pause_after(CUT, MODEL)
    download = wanted()
    order = Order(hub_folder(), download.repo, download.commit, download.files)
    command = [sys.executable, "-m", "orchestrator.hub.fetch"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        process.stdin.write(order.to_json().encode() + b"\n")
        process.stdin.flush()
        pause.wait_hit()
        process.stdin.close()
        assert process.wait(20) == ABANDONED


def test_a_hub_that_ignores_ranges_is_read_from_the_beginning(hub: Hub) -> None:
    hub.ignores_ranges = True
    hub.cut_after(CUT, MODEL)
    download = wanted()
    fetch(download)
    assert len(starts(hub)) == 2
    assert content(download) == DATA


def test_rubbish_of_an_earlier_try_is_dropped_and_not_blamed_twice(hub: Hub) -> None:
    download = wanted()
    cache = cache_of(download)
    cache.incomplete(download.files[0]).parent.mkdir(parents=True)
    cache.incomplete(download.files[0]).write_bytes(b"rubbish of an earlier try")
    fetch(download)
    assert content(download) == DATA
    assert starts(hub) == [25, 0]


# --- wrong


def test_corrupted_bytes_are_found_and_dropped(hub: Hub) -> None:
    hub.corrupt(MODEL)
    download = wanted()
    with pytest.raises(HubError, match="did not arrive as the hub has it") as caught:
        fetch(download)
    assert caught.value.code == "checksum_mismatch"
    cache = cache_of(download)
    assert not cache.blob(download.files[0]).exists()
    assert not cache.incomplete(download.files[0]).exists()
    assert not cache.place(download.commit, MODEL).exists()
    fetch(download)
    assert content(download) == DATA


def test_a_gated_repository_says_where_to_accept_and_what_to_set(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("acme/gated", {MODEL: DATA[:9]}, gated=True)
    with pytest.raises(RepositoryGated) as caught:
        wanted("acme/gated")
    assert f"Accept its conditions at {hub.url}/acme/gated, then set HF_TOKEN" in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(RepositoryGated, match="the token that is set has no access"):
        wanted("acme/gated")
    monkeypatch.delenv("HF_TOKEN")
    home = Path(os.environ["HF_HOME"])
    home.mkdir(exist_ok=True)
    (home / "token").write_text(f"{hub.token}\n")
    download = wanted("acme/gated")
    fetch(download)
    assert content(download) == DATA[:9]


def test_misspelt_names(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RepositoryNotFound, match=r"has no repository 'acme/tyni'.*set HF_TOKEN"):
        wanted("acme/tyni")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    with pytest.raises(RepositoryNotFound, match=r"has no repository 'acme/tyni'\.$"):
        wanted("acme/tyni")
    with pytest.raises(RepositoryNotFound, match="written OWNER/NAME or OWNER/NAME:QUANT"):
        wanted("tiny")
    with pytest.raises(QuantNotFound, match=r"has no 'Q9_X'. It has: Q4_K_M\."):
        wanted(f"{REPO}:Q9_X")


def test_nobody_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(HubUnreachable, match="does not answer"):
        wanted()
    monkeypatch.setenv("HF_ENDPOINT", "not a url")
    with pytest.raises(HubError):
        wanted()


def test_trying_again_is_bounded_and_slows_down(hub: Hub) -> None:
    download = wanted()
    hub.refuse(503, "/resolve/", times=99)
    pauses: list[float] = []
    with HubClient() as client, pytest.raises(HubUnreachable, match="HTTP 503"):
        FileDownload(
            client,
            cache_of(download),
            download.commit,
            download.files[0],
            lambda _: None,
            pauses.append,
        ).run()
    assert len(pauses) == MOST_TRIES - 1
    assert pauses == sorted(pauses)
    assert 60 < sum(pauses) < 180


def test_a_listing_that_would_lead_out_of_the_cache_is_not_followed(hub: Hub) -> None:
    hub.add("acme/evil", {"../../../evil-Q4_K_M.gguf": DATA[:9], "good-Q8_0.gguf": DATA[:10]})
    assert [file.path for file in wanted("acme/evil").files] == ["good-Q8_0.gguf"]


@pytest.mark.parametrize(
    "told",
    [
        {"sha": "../../../../victim"},
        {"id": "../victim"},
        {"siblings": [{"rfilename": MODEL, "size": 9, "blobId": "../../../../victim"}]},
        {"siblings": [{"rfilename": MODEL, "size": 9, "blobId": "x", "lfs": {"sha256": "/victim"}}]},
        {"siblings": [{"rfilename": MODEL, "size": -9, "blobId": "a" * 40}]},
    ],
)
def test_a_listing_with_names_that_are_none_is_refused(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, told: dict[str, object]
) -> None:
    repo = hub.add("acme/evil", {MODEL: DATA[:9]})
    answer = repo.info() | told
    monkeypatch.setattr(repo, "info", lambda: answer)
    with pytest.raises(HubUnreachable, match="is no model hub"):
        wanted("acme/evil")


@pytest.mark.parametrize("path", ["a\n-Q4_K_M.gguf", f"{'x' * 300}-Q4_K_M.gguf", "./x-Q4_K_M.gguf"])
def test_files_that_no_folder_could_hold_are_not_there(hub: Hub, path: str) -> None:
    hub.add("acme/odd", {path: DATA[:9], "good-Q8_0.gguf": DATA[:10]})
    assert [file.path for file in wanted("acme/odd").files] == ["good-Q8_0.gguf"]


def test_more_than_the_listing_said_is_not_written(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = hub.add("acme/liar", {MODEL: DATA})
    answer = repo.info()
    answer["siblings"][0]["size"] = 10
    monkeypatch.setattr(repo, "info", lambda: answer)
    download, told = wanted("acme/liar"), [0]
    with HubClient() as client, pytest.raises(ChecksumMismatch):
        FileDownload(client, cache_of(download), download.commit, download.files[0], told.append).run()
    assert max(told) < len(DATA) // 2


@pytest.mark.parametrize("program", ["/nowhere", "babbles"])
async def test_a_process_that_is_no_download_is_told_as_an_error(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    download = wanted()
    (tmp_path / "babbles").write_text("#!/bin/sh\nexec head -c 200000 /dev/zero\n")
    (tmp_path / "babbles").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / program))
    with pytest.raises(HubError, match="The download's process"):
        await HuggingFaceHub().fetch(download, lambda _: None)


# --- disks


@pytest.fixture
def small_disk(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache on a disk of 2 MiB, where the model does not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=True)
    monkeypatch.setenv("HF_HOME", str(disk))
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_seen_before_anything_is_asked_for(hub: Hub, small_disk: Path) -> None:
    with pytest.raises(
        DiskFull, match=r"needs 2\.9 MiB in .*, where 2\.0 MiB are free and 103 KiB stay free"
    ):
        wanted()
    assert starts(hub) == []
    hub.add("acme/less", {MODEL: DATA[:1_500_000]})
    assert find(Wanted("acme/less"), 0).total_bytes == 1_500_000
    with pytest.raises(DiskFull, match=r"1\.0 MiB are promised to other downloads"):
        find(Wanted("acme/less"), 2**20)


def test_a_disk_that_fills_up_meanwhile_keeps_what_has_come(
    hub: Hub, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "large"))
    download = wanted()
    monkeypatch.setenv("HF_HOME", str(small_disk))
    with pytest.raises(HubError, match="is full") as caught:
        fetch(download)
    assert caught.value.code == "disk_full"
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    fetch(download)
    assert content(download) == DATA
    assert starts(hub)[1] > CUT, "it went on"


def test_a_cache_of_somebody_else_says_so(hub: Hub, tmp_path: Path) -> None:
    blocked = tmp_path / "hf"
    blocked.write_text("no folder")
    with pytest.raises(HubError, match="cannot be used"):
        wanted()


# --- others


def test_two_processes_do_not_write_one_blob_at_the_same_time(hub: Hub) -> None:
    """The lock is that of huggingface_hub, so whoever comes second waits, and then finds it."""
    download = wanted()
    cache = cache_of(download)
    lock = hub_folder() / ".locks" / cache.name / f"{download.files[0].blob}.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with background(download):
            eventually(lambda: is_waited_for(lock))
            blob = cache.blob(download.files[0])
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(DATA)
            fcntl.flock(held, fcntl.LOCK_UN)
            eventually((cache.folder / "refs" / "main").exists)
    assert starts(hub) == []
    assert content(download) == DATA


def is_waited_for(lock: Path) -> bool:
    """Another process has the file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if link.parts[2] != str(os.getpid()) and link.readlink() == lock:
                return True
    return False


def test_removing_takes_only_what_nobody_else_uses(hub: Hub) -> None:
    first = wanted()
    fetch(first)
    hub.add(REPO, {MODEL: DATA, PROJECTOR: DATA[:6000]})
    second = wanted()
    fetch(second)
    cache = cache_of(second)

    def remove(download: Download, *others: Path) -> int:
        return asyncio.run(HuggingFaceHub().remove(download, others))

    assert remove(first) == 5000, "the model's blob is also the second revision's"
    assert content(second) == DATA
    assert (cache.folder / "refs" / "main").read_text() == second.commit
    place = cache.place(second.commit, MODEL)
    assert remove(second, place) == 6000, "its file is another model's too"
    assert content(second) == DATA
    assert remove(second) == len(DATA)
    assert not cache.folder.exists()
