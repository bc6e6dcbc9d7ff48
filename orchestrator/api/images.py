"""Images in the short form, `{"content": "What is this?", "images": ["<base64>"]}`, made OpenAI's parts.

Only messages that have `images` are written anew; every other byte of the body stays as it was.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from orchestrator.api.body import Body
from orchestrator.api.json_text import elements, value_span
from orchestrator.api.problems import BadRequest

CHAT_PATHS = frozenset({"/v1/chat/completions", "/chat/completions"})
KEY = b'"images"'
LINKS = ("data:", "http://", "https://")
TYPES = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"), (b"GIF8", "gif"), (b"RIFF", "webp"), (b"BM", "bmp"))
SNIFFED = 16
"""Characters of base64 that are looked at: three quarters as many bytes, and a whole number of groups."""


def may_have_images(path: str, body: Body) -> bool:
    """Cheap, and wrong only in calling for a look at a body that has the word elsewhere."""
    return path in CHAT_PATHS and body.view().find(KEY) >= 0


def with_parts(body: Body) -> Body:
    """The body with each message's `images` among its parts. Raises BadRequest that names the field."""
    text = bytes(body.view()).decode()
    try:
        changed = rewritten(text)
    except RecursionError:
        raise BadRequest("The body is nested too deeply.", code="invalid_json") from None
    if changed is text:
        return body
    body.close()
    return Body(changed.encode())


def rewritten(text: str) -> str:
    """The same text, the very same object, if no message has images."""
    span = value_span(text, "messages")
    if span is None or text[span[0]] != "[":
        return text
    pieces, at = [], 0
    for index, (message, start, end) in enumerate(elements(text, span[0])):
        if isinstance(message, dict) and message.get("images") is not None:
            pieces += [text[at:start], json.dumps(in_parts(message, f"messages[{index}]"))]
            at = end
    return "".join([*pieces, text[at:]]) if pieces else text


def in_parts(message: dict[str, Any], where: str) -> dict[str, Any]:
    images = message["images"]
    if not isinstance(images, list):
        raise BadRequest(f"`{where}.images` must be a list of images in base64.", f"{where}.images")
    rest = {key: value for key, value in message.items() if key not in ("images", "content")}
    parts = text_parts(message.get("content"), where)
    parts += [image_part(image, f"{where}.images[{index}]") for index, image in enumerate(images)]
    return {**rest, "content": parts}


def text_parts(content: object, where: str) -> list[Any]:
    if isinstance(content, list):
        return list(content)
    if content is None or content == "":
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    raise BadRequest(f"`{where}.content` must be text or a list of parts.", f"{where}.content")


def image_part(image: object, where: str) -> dict[str, Any]:
    if not isinstance(image, str) or not image:
        raise BadRequest(f"`{where}` must be an image in base64, or its URL.", where)
    url = image if image.startswith(LINKS) else f"data:image/{kind_of(image, where)};base64,{image}"
    return {"type": "image_url", "image_url": {"url": url}}


def kind_of(image: str, where: str) -> str:
    """By its first bytes; what is none of the usual ones the service may judge."""
    try:
        start = base64.b64decode(image[:SNIFFED], validate=True)
    except (binascii.Error, ValueError):
        got = f"`{where}` begins with '{image[:20]}', which is no base64"
        raise BadRequest(f"{got}: send base64, or a data: or http URL.", where) from None
    return next((kind for magic, kind in TYPES if start.startswith(magic)), "unknown")
