"""What the hub is asked over HTTP: listings, and the bytes of files. Blocking."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from orchestrator import __version__
from orchestrator.core.entities import HubFile
from orchestrator.core.errors import (
    HubError,
    HubUnreachable,
    QuantNotFound,
    RepositoryGated,
    RepositoryNotFound,
)
from orchestrator.hub.cache import hub_home

DEFAULT_ENDPOINT = "https://huggingface.co"
CONNECT_S = 10.0
SILENCE_S = 30.0

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
LONGEST_PATH = 1024
LONGEST_NAME_BYTES = 200
"""File systems take 255, and what is being written has a longer name for a while."""


@dataclass(frozen=True)
class Listing:
    """What a repository has now. `repo` is its name as the hub writes it."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]
    is_gated: bool = False


def endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def token() -> str | None:
    """The user's token, from where the hub's own tools take it."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if found := os.environ.get(name, "").strip():
            return found
    try:
        path = Path(os.environ.get("HF_TOKEN_PATH") or hub_home() / "token").expanduser()
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


class HubClient:
    """Asks one hub. The token goes to the hub alone, never to where it redirects. Close it after use."""

    def __init__(self) -> None:
        self.endpoint = endpoint()
        self._token = token()
        headers = {"user-agent": f"model-orchestrator/{__version__}", "accept-encoding": "identity"}
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        limits = httpx.Timeout(SILENCE_S, connect=CONNECT_S)
        self._http = httpx.Client(headers=headers, timeout=limits, follow_redirects=True)

    def __enter__(self) -> HubClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def listing(self, repo: str) -> Listing:
        """The main revision. Raises RepositoryNotFound, RepositoryGated, HubUnreachable or HubError."""
        with self._told(repo):
            answer = self._http.get(
                f"{self.endpoint}/api/models/{repo}/revision/main", params={"blobs": "true"}
            )
            self._check(answer, repo)
            try:
                return _listing(answer.json())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise HubUnreachable(f"What answers at {self.endpoint} is no model hub.") from error

    def check_access(self, listing: Listing, file: HubFile) -> None:
        """Raises RepositoryGated where files of the repository are not given to us."""
        if listing.is_gated:
            with self._told(listing.repo):
                answer = self._http.head(self.url_of(listing.repo, listing.commit, file.path))
                self._check(answer, listing.repo)

    def url_of(self, repo: str, commit: str, path: str) -> str:
        return f"{self.endpoint}/{repo}/resolve/{commit}/{quote(path)}"

    @contextmanager
    def bytes_of(self, repo: str, commit: str, file: HubFile, start: int) -> Iterator[httpx.Response]:
        """The file's bytes from `start` on (status 206), or from its beginning (200).

        Raises HubUnreachable for what may be over when it is asked again, HubError for what will not.
        """
        headers = {"range": f"bytes={start}-"} if start else {}
        with (
            self._told(repo),
            self._http.stream("GET", self.url_of(repo, commit, file.path), headers=headers) as answer,
        ):
            if not answer.is_success:
                answer.read()
            self._check(answer, repo)
            yield answer

    @contextmanager
    def _told(self, repo: str) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            why = str(error).split("] ", 1)[-1] or type(error).__name__
            raise HubUnreachable(
                f"The model hub {self.endpoint} does not answer ({why}). Is this machine online? "
                "HF_ENDPOINT names another hub."
            ) from error
        except httpx.InvalidURL as error:
            raise HubError(f"'{self.endpoint}' is not a usable address of a hub ({error}).") from error

    def _check(self, answer: httpx.Response, repo: str) -> None:
        """Raise what the answer means unless it is a success."""
        if answer.is_success:
            return
        status, code = answer.status_code, answer.headers.get("x-error-code")
        if code == "GatedRepo" or status == 403:
            raise RepositoryGated(self._gated(repo))
        if code == "EntryNotFound":
            raise QuantNotFound(f"{repo} no longer has {answer.url.path.rpartition('/')[2]}. Ask again.")
        if status == 401 and self._token and code != "RepoNotFound":
            raise RepositoryGated(
                f"The hub {self.endpoint} refuses the token that is set. Set another HF_TOKEN."
            )
        if status in (401, 404):
            private = "" if self._token else " A private one needs a token: set HF_TOKEN for the server."
            raise RepositoryNotFound(f"The hub {self.endpoint} has no repository '{repo}'.{private}")
        if status in (408, 429) or status >= 500:
            raise HubUnreachable(f"The model hub {self.endpoint} has trouble: HTTP {status}.")
        raise HubError(f"The hub {self.endpoint} refused {repo}: HTTP {status}.")

    def _gated(self, repo: str) -> str:
        accept = f"Accept its conditions at {self.endpoint}/{repo}"
        if self._token:
            return f"{repo} is gated, and the token that is set has no access. {accept} with that account."
        return f"{repo} is gated. {accept}, then set HF_TOKEN for the server to a token of that account."


def _listing(body: Mapping[str, Any]) -> Listing:
    """Raises ValueError where a name, which becomes one of a file or folder of ours, is none."""
    files = tuple(_file(entry) for entry in body["siblings"] if is_safe(str(entry["rfilename"])))
    repo, commit = _like(REPO, body["id"]), _like(COMMIT, body["sha"])
    return Listing(repo, commit, files, bool(body.get("gated")))


def _file(entry: Mapping[str, Any]) -> HubFile:
    blob = _like(BLOB, (entry.get("lfs") or {}).get("sha256") or entry["blobId"])
    size = int(entry["size"])
    if size < 0:
        raise ValueError(f"a file of {size} bytes")
    return HubFile(path=str(entry["rfilename"]), size_bytes=size, blob=blob)


def _like(pattern: re.Pattern[str], text: object) -> str:
    if pattern.fullmatch(str(text)) is None:
        raise ValueError(f"'{text}' is no name of the hub's")
    return str(text)


def is_safe(path: str) -> bool:
    """Whether a name from outside can be one of a file, and stays below the folder that it is put in."""
    if not path.isprintable() or "\\" in path or len(path) > LONGEST_PATH:
        return False
    parts = path.split("/")
    return not any(part in ("", ".", "..") or len(part.encode()) > LONGEST_NAME_BYTES for part in parts)
