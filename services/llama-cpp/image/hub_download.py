"""`huggingface-cli download REPO [FILE …]`: into the shared cache, once, checked, with helpful errors.

A file's name may differ in case and punctuation, or be a pattern. All parts of a split model come along,
and with a model the vision projector of its repository (`--no-mmproj`: without).
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers

import fetch
import hub_cache

SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
SPARE_BYTES = 64 * 1024 * 1024  # links, small files, and what the file system keeps for itself


class Problem(Exception):
    """The download cannot be done; the message is for the person who asked."""


@dataclass(frozen=True)
class Wish:
    """What was asked for."""

    repo: str
    names: tuple[str, ...]
    revision: str = "main"
    with_mmproj: bool = True
    quiet: bool = False


def read_wish(arguments: Sequence[str]) -> Wish | None:
    """None if there are options among the arguments that only huggingface_hub's own command knows."""
    parser = argparse.ArgumentParser(prog="huggingface-cli download", add_help=False, allow_abbrev=False)
    parser.add_argument("repo")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--include", nargs="+", action="extend", default=[])
    parser.add_argument("--revision", default="main")
    parser.add_argument("--no-mmproj", action="store_true")
    parser.add_argument("-q", "--quiet", action="store_true")
    if {"-h", "--help"} & set(arguments) or not arguments:
        return None
    given, others = parser.parse_known_args(list(arguments))
    if others:
        return None
    names = (*given.names, *given.include)
    return Wish(given.repo, names, given.revision, not given.no_mmproj, given.quiet)


def main(wish: Wish) -> int:
    os.umask(0o002)  # others of our group may add to the cache
    try:
        for path in download(wish):
            print(path)
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


def download(wish: Wish) -> list[Path]:
    """The files' paths in the cache. Raises Problem."""
    try:
        files = choose(wish, _listing(wish))
        _check_access(wish, files)
        _check_room(wish, files)
        return [_bring(wish, file) for file in files]
    except Exception as error:
        raise _explained(error, wish) from error


def choose(wish: Wish, listing: Sequence[RepoSibling]) -> list[RepoSibling]:
    """The repository's files that are meant. Raises Problem."""
    by_name = {file.rfilename: file for file in listing}
    if not wish.names:
        return list(listing)
    names: list[str] = []
    for wanted in wish.names:
        for name in _meant(wish.repo, wanted, list(by_name)):
            names += _all_parts(name, by_name)
    has_model = any(name.lower().endswith(".gguf") and not hub_cache.is_projector(name) for name in names)
    if wish.with_mmproj and has_model and not any(map(hub_cache.is_projector, names)):
        projector = hub_cache.best_projector(by_name)
        names += [projector] if projector else []
    return [by_name[name] for name in dict.fromkeys(names)]


def _meant(repo: str, wanted: str, names: list[str]) -> list[str]:
    if any(character in wanted for character in "*?["):
        found = [name for name in names if fnmatchcase(name.lower(), wanted.lower())]
    else:
        nearest = hub_cache.nearest(wanted, names)
        found = [nearest] if nearest else []
    if not found:
        raise Problem(f"{repo} has no file '{wanted}'; {_near(wanted, names)}")
    return found


def _near(wanted: str, names: list[str]) -> str:
    by_key = {hub_cache.only_letters_and_digits(name): name for name in names}
    near = difflib.get_close_matches(hub_cache.only_letters_and_digits(wanted), by_key, n=4, cutoff=0.6)
    if near:
        return f"similar: {', '.join(by_key[key] for key in near)}"
    return f"it has {hub_cache.listed(sorted(names, key=lambda name: not name.lower().endswith('.gguf')))}"


def _all_parts(name: str, names: Iterable[str]) -> list[str]:
    shard = SHARD.fullmatch(name)
    if shard is None:
        return [name]

    def is_part(other: str) -> bool:
        found = SHARD.fullmatch(other)
        return found is not None and found.groupdict() == shard.groupdict()

    return sorted(other for other in names if is_part(other))


def _listing(wish: Wish) -> list[RepoSibling]:
    info = HfApi().model_info(wish.repo, revision=wish.revision, files_metadata=True, timeout=30)
    return info.siblings or []


def _blob(wish: Wish, file: RepoSibling) -> fetch.Blob | None:
    """None for a small file, which the hub keeps without a checksum of its content."""
    if file.lfs is None:
        return None
    hub, folder = Path(constants.HF_HUB_CACHE), hub_cache.REPOSITORY + wish.repo.replace("/", "--")
    sha256 = file.lfs.sha256
    return fetch.Blob(
        name=file.rfilename,
        url=hf_hub_url(wish.repo, file.rfilename, revision=wish.revision),
        size=file.lfs.size,
        sha256=sha256,
        path=hub / folder / "blobs" / sha256,
        lock=hub / ".locks" / folder / f"{sha256}.lock",
    )


def _check_access(wish: Wish, files: Sequence[RepoSibling]) -> None:
    """Who may list a gated repository may not yet have its files."""
    if files:
        get_hf_file_metadata(hf_hub_url(wish.repo, files[0].rfilename, revision=wish.revision))


def _check_room(wish: Wish, files: Iterable[RepoSibling]) -> None:
    blobs = [_blob(wish, file) for file in files]
    needed = sum(blob.missing_bytes() for blob in blobs if blob is not None)
    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if needed and needed + SPARE_BYTES > free:
        raise Problem(
            f"{wish.repo} needs {_size(needed)} more, and only {_size(free)} are free at {there}; "
            "make room there, for example with: hf cache ls, hf cache rm"
        )


def _bring(wish: Wish, file: RepoSibling) -> Path:
    blob = _blob(wish, file)
    if blob is not None:
        if blob.path.exists():
            print(f"{file.rfilename}: already there", file=sys.stderr)
        else:
            fetch.fetch(blob, build_hf_headers(), quiet=wish.quiet)
    # The rest of the cache's rules is the library's: with the blob there it only writes links and refs.
    return Path(hf_hub_download(wish.repo, file.rfilename, revision=wish.revision))


def _explained(error: Exception, wish: Wish) -> Problem:
    """What happened, and what to do, in one line."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, fetch.Damaged):
        return Problem(f"{error}; it was removed, run the same command again")
    if isinstance(error, HFValidationError):
        return Problem(f"'{wish.repo}' cannot be the name of a repository; write OWNER/NAME")
    if isinstance(error, HfHubHTTPError):
        return Problem(_refusal(error, wish))
    if isinstance(error, httpx2.HTTPError):
        why = str(error) or type(error).__name__
        return Problem(f"{constants.ENDPOINT} does not answer ({why}); run the same command again to go on")
    if isinstance(error, OSError):
        return Problem(_trouble_with_disk(error))
    raise error


def _refusal(error: HfHubHTTPError, wish: Wish) -> str:
    page = f"{constants.ENDPOINT}/{wish.repo}"
    with_token = bool(os.environ.get("HF_TOKEN"))
    if isinstance(error, GatedRepoError):
        then = (
            "with the account of this HF_TOKEN" if with_token else "then set HF_TOKEN to that account's token"
        )
        return f"{wish.repo} is gated: accept its terms at {page}, {then}"
    if isinstance(error, RepositoryNotFoundError):
        then = "or this HF_TOKEN may not see it" if with_token else "or it is private and HF_TOKEN is not set"
        return f"there is no repository '{wish.repo}' at {constants.ENDPOINT}, {then}"
    if isinstance(error, RevisionNotFoundError):
        return f"{wish.repo} has no revision '{wish.revision}'"
    status = error.response.status_code
    if status == 401:
        return f"{constants.ENDPOINT} does not accept this HF_TOKEN (401)"
    return f"{constants.ENDPOINT} answered {status}; run the same command again later to go on"


def _trouble_with_disk(error: OSError) -> str:
    home = constants.HF_HOME
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {home} is full; make room and run the same command again, which goes on"
    if error.errno == errno.EROFS:
        return f"{home} is mounted read-only here; download with the script, or where it can be written"
    if error.errno in (errno.EACCES, errno.EPERM):
        ids = f"{os.geteuid()}:{os.getegid()}"
        return f"{ids} may not write {error.filename}; set PUID and PGID to its owner's, or chown it to {ids}"
    return f"{error.strerror or error}"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
