"""A synchronous client of the orchestrator's public HTTP API, for programs and for the command line."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_S = 5.0
EVENTS_SILENCE_S = 35.0
"""The server says something on /events every 10 s; silence much longer than that is a lost connection."""


class ApiError(Exception):
    """The server refused or failed; `message` is its whole sentence, `details` what else it told."""

    def __init__(
        self, status: int, code: str, message: str, details: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = dict(details or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error as the server's JSON has it, and its HTTP status."""
        told = {"message": self.message, "code": self.code, "status": self.status}
        return {"error": {**self.details, **told}}


class ServerDown(Exception):
    """Nobody answers at `url`, or somebody stopped answering; `message` says what to do."""

    def __init__(self, url: str, message: str) -> None:
        super().__init__(message)
        self.url = url
        self.message = message


class NotOurs(ApiError):
    """Something answers at the URL, and it is not an orchestrator."""


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event. `name` is `snapshot`, `model`, `operation` or `log`; `id` resumes after it."""

    name: str
    data: dict[str, Any]
    id: int | None = None


class KeyShown(httpx.Auth):
    """Shows the key; without one `find_key` is asked, once, when the server wants to see one."""

    def __init__(self, key: str | None, find_key: Callable[[], str | None] | None) -> None:
        self._key = key
        self._find_key = find_key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if self._key is not None:
            request.headers["Authorization"] = as_header(self._key)
        answer = yield request
        if answer.status_code != 401 or self._key is not None or self._find_key is None:
            return
        self._key, self._find_key = self._find_key(), None
        if self._key is not None:
            request.headers["Authorization"] = as_header(self._key)
            yield request


def as_header(key: str) -> str:
    """What no header can say is in no key of ours; the server then says that it is none."""
    return f"Bearer {key.encode('ascii', 'replace').decode()}"


class Client:
    """Talks to one orchestrator. Close it, or use it as a context manager.

    Every call returns the answer's JSON and raises ApiError or ServerDown. `timeout` is in seconds and
    is for answers that should come at once; a call that waits for a model waits as long as the server.
    `key` is an API key, else the one in ORCHESTRATOR_KEY. If neither is there, `find_key` is asked for that
    of a server on this very machine; no other is told it. `is_here` says that the URL leads to this machine,
    as a loopback address does by itself.
    """

    def __init__(
        self,
        url: str | None = None,
        timeout: float = 30.0,
        key: str | None = None,
        find_key: Callable[[], str | None] | None = None,
        *,
        is_here: bool = False,
    ) -> None:
        self.url = address(url or os.environ.get("ORCHESTRATOR_URL") or DEFAULT_URL)
        key = "".join((key or os.environ.get("ORCHESTRATOR_KEY") or "").split()) or None
        is_here = is_here or is_loopback(self.url)
        limits = httpx.Timeout(timeout, connect=min(CONNECT_S, timeout))
        self._patient = httpx.Timeout(None, connect=limits.connect)
        with self._translated():
            self._http = httpx.Client(
                base_url=self.url,
                timeout=limits,
                trust_env=not is_here,
                auth=KeyShown(key, find_key if is_here else None),
            )

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- looking

    def models(self) -> list[dict[str, Any]]:
        """The catalogue's models, each with its `status`."""
        return list(self._get("/models")["data"])

    def model(self, model: str) -> dict[str, Any]:
        """One model, by name or alias, with everything known of it."""
        return self._get(f"/models/{in_path(model)}")

    def state(self) -> dict[str, Any]:
        """Devices, models, instances and queue, of one moment; memory is in MiB."""
        return self._get("/state")

    def operation(self, operation: str) -> dict[str, Any]:
        """How a load or unload is going."""
        return self._get(f"/operations/{in_path(operation)}")

    def doctor(self) -> dict[str, Any]:
        """`ok`, and `checks` with `name`, `status` (ok, warning, bad), `found` and `advice`."""
        return self._get("/doctor")

    def plan(self, model: str) -> dict[str, Any]:
        """What a load would do: `outcome`, `devices`, `evictions`, or `refusal` and `would_fit`."""
        return self._post("/plan", {"load": model}, waits=False)

    def log(self, *, limit: int = 100, model: str | None = None) -> list[dict[str, Any]]:
        """What happened, and why."""
        query: dict[str, Any] = {"limit": limit} | ({"model": model} if model else {})
        return list(self._get("/log", query)["events"])

    def logs(
        self,
        model: str,
        *,
        follow: bool = False,
        tail: int = 200,
        attempt: str | None = None,
        previous: bool = False,
    ) -> Iterator[bytes]:
        """What the model's service printed, in pieces as they come; `follow` goes on with what is next.

        `previous` asks for the attempt before the newest.
        """
        query: dict[str, Any] = {"follow": follow, "tail": tail} | ({"attempt": attempt} if attempt else {})
        query |= {"previous": True} if previous else {}
        with self._stream(f"/logs/{in_path(model)}", query) as answer:
            yield from answer.iter_bytes()

    def events(self, last_id: int | None = None) -> Iterator[Event]:
        """A `snapshot` event, then every change; after `last_id` what was missed, if it is still known."""
        headers = {} if last_id is None else {"Last-Event-ID": str(last_id)}
        with self._stream("/events", {}, headers, silence_s=EVENTS_SILENCE_S) as answer:
            yield from parse_events(lines_of(answer.iter_bytes()))

    # --- acting

    def load(self, model: str, *, pin: bool | None = None, wait: bool = False) -> dict[str, Any]:
        """Load a model; `operation` in the answer can be followed. `wait` answers once it is ready."""
        body: dict[str, Any] = {"model": model, "wait": wait} | ({} if pin is None else {"pin": pin})
        return self._post("/models/load", body, waits=wait)

    def unload(
        self, model: str, *, wait: bool = True, force: bool = False, hold: str | float | None = None
    ) -> dict[str, Any]:
        """Unload a model; with `wait`, `freed_mib` in the answer says how much has come back."""
        body: dict[str, Any] = {"model": model, "wait": wait, "force": force}
        return self._post("/models/unload", body | ({} if hold is None else {"hold": hold}), waits=wait)

    def download(self, model: str) -> dict[str, Any]:
        """Download OWNER/NAME[:QUANT], or a model of models.yaml, into the server's cache; `operation` in the
        answer can be followed."""
        return self._post("/models", {"model": model}, waits=True)

    def remove(self, model: str) -> dict[str, Any]:
        """Remove a downloaded model with its files, or cancel its download; answers once it is done."""
        with self._translated():
            return self._answer(self._http.delete("/models", params={"model": model}, timeout=self._patient))

    def learned(self) -> list[dict[str, Any]]:
        """What loads have shown of models' memory, in bytes, the newest row first."""
        return list(self._get("/learned")["learned"])

    def forget_learned(self, key: str) -> None:
        """Forget the row of what was learned that has this key; answers once that is saved."""
        with self._translated():
            self._answer(self._http.delete(f"/learned/{in_path(key)}"))

    # --- keys

    def list_keys(self) -> list[dict[str, Any]]:
        """All API keys: names, scopes and times, never their texts."""
        return list(self._get("/keys")["keys"])

    def create_key(self, name: str, scopes: Sequence[str], expires_in: str | None = None) -> dict[str, Any]:
        """Make a key; `key` in the answer is its text, which is told this once."""
        body: dict[str, Any] = {"name": name, "scopes": list(scopes)}
        return self._post("/keys", body | ({"expires_in": expires_in} if expires_in else {}), waits=False)

    def revoke_key(self, name: str) -> dict[str, Any]:
        """From now on the key is refused."""
        with self._translated():
            return self._answer(self._http.delete(f"/keys/{quote(name, safe='')}"))

    # --- plumbing

    def _get(self, path: str, query: Mapping[str, Any] | None = None) -> dict[str, Any]:
        with self._translated():
            return self._answer(self._http.get(path, params=query))

    def _post(self, path: str, body: Mapping[str, Any], *, waits: bool) -> dict[str, Any]:
        with self._translated():
            timeout = self._patient if waits else self._http.timeout
            return self._answer(self._http.post(path, json=body, timeout=timeout))

    @contextmanager
    def _stream(
        self,
        path: str,
        query: Mapping[str, Any],
        headers: Mapping[str, str] | None = None,
        silence_s: float | None = None,
    ) -> Iterator[httpx.Response]:
        timeout = httpx.Timeout(silence_s, connect=self._patient.connect)
        with (
            self._translated(),
            self._http.stream("GET", path, params=query, headers=headers, timeout=timeout) as answer,
        ):
            if not answer.is_success:
                answer.read()
                raise self._error_of(answer)
            yield answer

    def _answer(self, response: httpx.Response) -> dict[str, Any]:
        if not response.is_success:
            raise self._error_of(response)
        body = parsed(response)
        if body is None:
            raise self._not_ours(response)
        return body

    def _error_of(self, response: httpx.Response) -> ApiError:
        error = (parsed(response) or {}).get("error")
        if not isinstance(error, dict) or "message" not in error:
            return self._not_ours(response)
        shown = ("message", "code", "type", "param")
        details = {key: value for key, value in error.items() if key not in shown}
        return ApiError(response.status_code, str(error.get("code")), str(error["message"]), details)

    def _not_ours(self, response: httpx.Response) -> NotOurs:
        who = response.headers.get("server")
        return NotOurs(
            response.status_code,
            "not_an_orchestrator",
            f"What answers at {self.url}{f' ({who})' if who else ''} is not an orchestrator: "
            f"{response.request.method} {response.request.url.path} gave HTTP {response.status_code}. "
            "Name the right address with --url or ORCHESTRATOR_URL.",
        )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            example = f"expected something like {DEFAULT_URL}"
            raise ServerDown(self.url, f"'{self.url}' is not a usable URL ({error}); {example}.") from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ServerDown(self.url, nobody_answers(self.url, reason(error))) from None
        except httpx.TimeoutException:
            message = f"The orchestrator at {self.url} did not answer in time; is it overloaded or stopped?"
            raise ServerDown(self.url, message) from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            message = f"The connection to {self.url} broke: {reason(error)}. Has the orchestrator ended?"
            raise ServerDown(self.url, message) from None


def nobody_answers(url: str, why: str) -> str:
    return (
        f"No orchestrator answers at {url} ({why}). Start it with `orchestrator serve` (or `make run`), "
        "or name another address with --url or ORCHESTRATOR_URL."
    )


def reason(error: Exception) -> str:
    """The error's own words, without the operating system's number."""
    text = str(error) or type(error).__name__
    return text.split("] ", 1)[1].lower() if text.startswith("[Errno") and "] " in text else text


def address(url: str) -> str:
    """The URL without a slash at its end; `localhost:8000` alone means http."""
    url = url.strip().rstrip("/")
    return url if "://" in url else f"http://{url}"


def is_loopback(url: str) -> bool:
    """Whether it leads to this very machine; a proxy of the environment must not be asked then."""
    try:
        host = httpx.URL(url).host
        return host == "localhost" or host.endswith(".localhost") or ipaddress.ip_address(host).is_loopback
    except (ValueError, httpx.InvalidURL):
        return False


def in_path(name: str) -> str:
    return quote(name, safe="/:")


def parsed(response: httpx.Response) -> dict[str, Any] | None:
    """The JSON object of an answer; None if it is anything else."""
    try:
        body = response.json()
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def lines_of(chunks: Iterable[bytes]) -> Iterator[str]:
    """Whole lines. Text may hold other characters that Python takes for line ends; an event's do not."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.removesuffix(b"\r").decode(errors="replace") for line in whole)


def parse_events(lines: Iterable[str]) -> Iterator[Event]:
    """Server-sent events out of their lines. Comments are passed over, and so is what is no JSON object."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            fields[name] = f"{fields['data']}\n{value}" if name == "data" and "data" in fields else value
            continue
        event, fields = as_event(fields), {}
        if event is not None:
            yield event


def as_event(fields: Mapping[str, str]) -> Event | None:
    try:
        data = json.loads(fields.get("data", ""))
    except ValueError:
        return None
    number = fields.get("id", "")
    if not isinstance(data, dict):
        return None
    return Event(fields.get("event", "message"), data, int(number) if number.isdecimal() else None)
