"""Logging in with a browser: a key for a cookie that no script and no other site can use."""

from __future__ import annotations

import base64
import hashlib
import html
from urllib.parse import parse_qs, quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from orchestrator.api.access import COOKIE, cookie_of, tokens_of
from orchestrator.api.asgi import Scope, header
from orchestrator.api.context import context_of
from orchestrator.api.problems import Problem
from orchestrator.control.keyring import SESSION_LASTS_S

router = APIRouter(include_in_schema=False)

LOGIN = "/login"
AFTERWARDS = "/docs"
"""Where to go from the login page where nobody said."""

STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 26rem; margin: 15vh auto; padding: 0 1rem;
       color: #222; background: #fff }
input, button { font: inherit; width: 100%; box-sizing: border-box; padding: .5rem; margin-top: .5rem }
.problem { color: #b00020 }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #161616 } .problem { color: #ff7b7b } }
"""
PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Log in · Model orchestrator</title>
<style>{style}</style>
<h1>Model orchestrator</h1>
{problem}
<form method="post" action="/login">
<input type="hidden" name="next" value="{next}">
<label>API key
<input type="password" name="key" autocomplete="current-password" required autofocus></label>
<button>Log in</button>
</form>
</html>
"""
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
HEADERS = {
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "cache-control": "no-store",
    "referrer-policy": "same-origin",  # with no-referrer the form's own Origin would be null
    "x-content-type-options": "nosniff",
}
WRONG = "This is not a key of this server, or it has expired or was revoked."


def login_instead(scope: Scope, problem: Problem) -> bytes | None:
    """The login page's address, for a browser that asks for a page and has not logged in."""
    if problem.status != 401 or scope["method"] != "GET" or any(tokens_of(scope["headers"])):
        return None
    if b"text/html" not in header(scope, b"accept"):
        return None
    query = scope["query_string"].decode("latin-1")
    path = quote(scope["path"]) + (f"?{query}" if query else "")
    return f"{LOGIN}?next={quote(path, safe='/')}".encode("latin-1")


def local_path(text: str) -> str:
    """A path of ours; anything that a browser could take for another site leads to the usual page."""
    is_path = text.startswith("/") and not text.startswith(("//", "/\\"))
    return text if is_path and text.isascii() and text.isprintable() else AFTERWARDS


def page(next_path: str, problem: str = "", status: int = 200) -> HTMLResponse:
    told = f'<p class="problem" role="alert">{html.escape(problem)}</p>' if problem else ""
    text = PAGE.format(style=STYLE, problem=told, next=html.escape(next_path))
    return HTMLResponse(text, status, HEADERS)


@router.get(LOGIN)
async def show_login(request: Request) -> Response:
    return page(local_path(request.query_params.get("next", "")))


@router.post(LOGIN)
async def log_in(request: Request) -> Response:
    """The form's `key` becomes a session's cookie."""
    ring = context_of(request).keyring
    fields = parse_qs((await request.body()).decode("utf-8", "replace"))
    next_path = local_path(fields.get("next", [""])[0])
    key = ring.key_of(fields.get("key", [""])[0].strip())
    if key is None or not ring.use(key):
        return page(next_path, WRONG, 401)
    answer = Response(status_code=303, headers={"location": next_path, "cache-control": "no-store"})
    set_cookie(request, answer, await ring.log_in(key), int(SESSION_LASTS_S))
    return answer


@router.post("/logout")
async def log_out(request: Request) -> Response:
    cookie = cookie_of(request.scope["headers"])
    if cookie is not None:
        await context_of(request).keyring.log_out(cookie)
    answer = Response(status_code=303, headers={"location": LOGIN, "cache-control": "no-store"})
    set_cookie(request, answer, "", 0)
    return answer


def set_cookie(request: Request, answer: Response, value: str, lasts_s: int) -> None:
    is_https = request.scope["scheme"] == "https"
    answer.set_cookie(COOKIE, value, max_age=lasts_s, httponly=True, samesite="strict", secure=is_https)
