"""The short form of images becomes OpenAI's parts, and nothing else of a body changes."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.body import Body
from orchestrator.api.images import may_have_images, with_parts
from orchestrator.api.json_text import elements, value_span
from orchestrator.api.problems import BadRequest

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(20)).decode()
JPEG = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(20)).decode()
CHAT = "/v1/chat/completions"


def changed(text: str) -> str:
    return bytes(with_parts(Body(text.encode())).view()).decode()


def chat(message: object) -> str:
    return json.dumps({"model": "m", "messages": [message]})


def link(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_images_become_parts_and_every_other_byte_stays() -> None:
    head = (
        '{ "top_p":1.0, "seed" : 18446744073709551617,\n "messages" : [ {"role":"system","name":"\\u00e9"},'
    )
    tail = ' ], "model":"m" , "x":1e2 }'
    message = {"role": "user", "content": "What is it?", "images": [PNG, JPEG]}
    result = changed(head + json.dumps(message) + tail)
    assert result.startswith(head)
    assert result.endswith(tail)
    assert json.loads(result)["messages"][1] == {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is it?"},
            link(f"data:image/png;base64,{PNG}"),
            link(f"data:image/jpeg;base64,{JPEG}"),
        ],
    }


@pytest.mark.parametrize(
    ("content", "before"),
    [
        ("", []),
        (None, []),
        ([{"type": "text", "text": "a"}, link("http://x/y.png")], None),
    ],
)
def test_images_join_what_content_there_is(content: object, before: list[object] | None) -> None:
    [message] = json.loads(changed(chat({"role": "user", "content": content, "images": [PNG]})))["messages"]
    assert message["content"] == [
        *(content if before is None else before),
        link(f"data:image/png;base64,{PNG}"),
    ]


@pytest.mark.parametrize("url", ["data:image/webp;base64,AAAA", "https://example.org/cat.jpg"])
def test_what_is_a_link_already_stays_one(url: str) -> None:
    [message] = json.loads(changed(chat({"role": "user", "images": [url]})))["messages"]
    assert message["content"] == [link(url)]


@pytest.mark.parametrize(
    "text",
    [
        '{"messages": [{"role": "user", "content": "the \\"images\\" are here"}]}',
        '{"messages": [{"role": "user", "content": "x", "images": null}]}',
        '{"messages": "images", "images": ["x"]}',
        '{"messages": [], "images": [1]}',
        '{"images": [1]}',
        '{"messages": ["images", 3, null, [{"images": ["x"]}]]}',
    ],
)
def test_a_body_without_any_is_the_very_same(text: str) -> None:
    body = Body(text.encode())
    assert with_parts(body) is body


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"images": "AAAA"}, "messages[0].images"),
        ({"images": [""]}, "messages[0].images[0]"),
        ({"images": [PNG, 7]}, "messages[0].images[1]"),
        ({"images": ["not base64!"]}, "messages[0].images[0]"),
        ({"images": ["file:///etc/passwd"]}, "messages[0].images[0]"),
        ({"images": [PNG], "content": 7}, "messages[0].content"),
    ],
)
def test_what_is_wrong_is_named(message: dict[str, object], field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        changed(chat(message))
    assert caught.value.param == field
    assert field in caught.value.message


def test_only_chats_are_looked_at() -> None:
    body = Body(chat({"images": [PNG]}).encode())
    assert may_have_images(CHAT, body)
    assert not may_have_images("/v1/completions", body)
    assert not may_have_images(CHAT, Body(chat({"content": "images"}).encode().replace(b'"images"', b'"x"')))


def test_nesting_that_python_cannot_follow_is_refused() -> None:
    nested = "[" * 100_000 + "]" * 100_000
    deep = f'{{"messages": [{{"images": ["{PNG}"], "x": {nested}}}]}}'
    with pytest.raises(BadRequest, match="nested too deeply"):
        changed(deep)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=8
)


@given(
    st.dictionaries(st.text(), JSON, max_size=4),
    st.lists(JSON | st.fixed_dictionaries({"images": st.lists(st.just(PNG), max_size=3)}), max_size=4),
    st.sampled_from([None, 2]),
)
def test_what_is_found_is_what_a_parser_finds(
    rest: dict[str, object], messages: list[object], indent: int | None
) -> None:
    whole = {**rest, "messages": messages}
    text = json.dumps(whole, indent=indent)
    span = value_span(text, "messages")
    assert span is not None
    assert json.loads(text[slice(*span)]) == messages
    assert [json.loads(text[start:end]) for _, start, end in elements(text, span[0])] == messages
    kept = {key: value for key, value in json.loads(changed(text)).items() if key != "messages"}
    assert kept == {key: value for key, value in whole.items() if key != "messages"}
