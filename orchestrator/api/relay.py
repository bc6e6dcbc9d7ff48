"""Bytes between a client and an instance, untouched and unbuffered, through one aiohttp session."""

from __future__ import annotations

from functools import lru_cache
from urllib.parse import quote

import aiohttp
from yarl import URL

from orchestrator.api.asgi import Headers
from orchestrator.api.body import Body
from orchestrator.api.exchange import Exchange
from orchestrator.core.errors import OrchestratorError

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
NEVER_UP = HOP_BY_HOP | {
    b"host",
    b"content-length",
    b"expect",
    b"authorization",  # our keys and cookies are for us, not for containers
    b"x-api-key",
    b"cookie",
    b"x-deadline-seconds",
    b"forwarded",  # the client may have written these itself
    b"x-forwarded-for",
    b"x-forwarded-host",
    b"x-forwarded-port",
    b"x-forwarded-proto",
    b"x-real-ip",
}
NEVER_DOWN = HOP_BY_HOP | {b"set-cookie"}
"""Cookies of ours do not go up, so those of a service cannot come back; it could only overwrite ours."""
NEUTRAL = {"accept": "*/*", "accept-encoding": "identity", "user-agent": "model-orchestrator"}
SMALL_BYTES = 64 * 1024
URLS_KEPT = 512
PAGES = frozenset({"text/html", "application/xhtml+xml", "image/svg+xml"})
PAGE_SANDBOX = b"sandbox allow-scripts allow-forms allow-popups allow-downloads allow-modals"


class UpstreamSilent(OrchestratorError):
    """The instance could not be reached, or died before it answered a byte."""


class UpstreamDied(OrchestratorError):
    """The instance died in the middle of its answer."""


def new_session() -> aiohttp.ClientSession:
    """A session that decodes nothing, keeps no cookies and obeys no proxy variables."""
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=15, use_dns_cache=False),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
        read_bufsize=256 * 1024,
    )
    # aiohttp would send a GET again by itself when its connection dies; whether to is for us to say
    session._retry_connection = False
    return session


@lru_cache(maxsize=URLS_KEPT)
def upstream_url(host: str, port: int, raw_path: bytes, query: bytes) -> URL:
    """The instance's URL; whatever the path says, the authority is the instance's."""
    path = quote(raw_path.decode("latin-1"), safe="/%:@!$&'()*+,;=~-._")
    return URL.build(
        scheme="http",
        host=host,
        port=port,
        path=path if path.startswith("/") else "/" + path,
        query_string=query.decode("latin-1"),
        encoded=True,
    )


def request_headers(headers: Headers, *, is_json: bool) -> list[tuple[str, str]]:
    """What goes up: all but ours and hop-by-hop; JSON that curl calls a form is called JSON.

    What a client leaves out is filled in by us, since the HTTP client would with its own words: an
    answer must not be compressed for somebody who did not ask for that.
    """
    kept = dict(NEUTRAL)
    repeated = []
    hidden = NEVER_UP
    for key, value in headers:
        if key == b"connection" and value.lower() not in (b"keep-alive", b"close"):
            hidden = hidden | {name.strip().lower() for name in value.split(b",")}
    for key, value in headers:
        if key in hidden:
            continue
        name, text = key.decode("latin-1"), value.decode("latin-1")
        if name in kept and name not in NEUTRAL:
            repeated.append((name, text))
        else:
            kept[name] = text
    if is_json:
        kept["content-type"] = "application/json"
    return [*kept.items(), *repeated]


def response_headers(response: aiohttp.ClientResponse, content_type: str) -> list[tuple[bytes, bytes]]:
    """What goes down: all but NEVER_DOWN. A page of a service must not act in our name (CSP sandbox)."""
    kept = [(k.lower(), v) for k, v in response.raw_headers if k.lower() not in NEVER_DOWN]
    if content_type in PAGES:
        kept.append((b"content-security-policy", PAGE_SANDBOX))
    return kept


async def relay(
    session: aiohttp.ClientSession,
    exchange: Exchange,
    url: URL,
    headers: list[tuple[str, str]],
    body: Body,
) -> None:
    """Send the request up and its answer down, as it comes.

    Raises UpstreamSilent before the first byte of an answer, UpstreamDied after it.
    """
    method = exchange.scope["method"]
    data = body.payload() if body.size else None
    try:
        async with session.request(
            method, url, headers=headers, data=data, allow_redirects=False
        ) as response:
            await pass_down(exchange, response)
    except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        if exchange.has_answer:
            raise UpstreamDied("its service ended in the middle of its answer.") from error
        raise UpstreamSilent(f"its service did not answer ({kind(error)}).") from error


def kind(error: BaseException) -> str:
    return str(error)[:200] or type(error).__name__


async def pass_down(exchange: Exchange, response: aiohttp.ClientResponse) -> None:
    exchange.has_answer = True
    if exchange.has_begun and response.status >= 400:
        await exchange.upstream_error(response.status, await response.read())
        return
    content_type = response.content_type
    is_stream = content_type == "text/event-stream"
    headers = response_headers(response, content_type)
    length = response.content_length
    if length is not None and length <= SMALL_BYTES:
        data = await response.read()
        await exchange.begin(response.status, headers, is_event_stream=is_stream)
        await exchange.chunk(data, is_last=True)
        return
    await exchange.begin(response.status, headers, is_event_stream=is_stream)
    async for chunk in response.content.iter_any():
        await exchange.chunk(chunk)
    await exchange.chunk(b"", is_last=True)
