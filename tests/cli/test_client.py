"""The client against a server that answers what it is told to: requests, errors, streams."""

import socket

import pytest

from orchestrator.client.http import ApiError, Client, Event, NotOurs, ServerDown, lines_of, parse_events
from tests.cli.stub import Stub, error
from tests.support import free_port


def test_a_refusal_carries_status_code_message_and_numbers(stub: Stub) -> None:
    stub.answers["POST /models/load"] = (409, error("too large", "cannot_ever_fit", needed_mib=9000))
    with Client(stub.url) as client, pytest.raises(ApiError) as caught:
        client.load("big")
    refused = caught.value
    assert (refused.status, refused.code, refused.message) == (409, "cannot_ever_fit", "too large")
    assert refused.details == {"needed_mib": 9000}
    assert refused.body["error"]["needed_mib"] == 9000


def test_what_was_not_said_is_not_sent(stub: Stub) -> None:
    stub.answers["POST /models/load"] = stub.answers["POST /models/unload"] = (200, {"success": True})
    with Client(stub.url) as client:
        client.load("a")
        client.load("a", pin=True, wait=True)
        client.unload("a", hold="10m", force=True)
    assert [body for _, _, body in stub.asked] == [
        {"model": "a", "wait": False},
        {"model": "a", "wait": True, "pin": True},
        {"model": "a", "wait": True, "force": True, "hold": "10m"},
    ]


def test_names_are_quoted_into_paths(stub: Stub) -> None:
    stub.answers["GET /logs/org/a%3Fb%20c"] = (200, b"line\n")
    with Client(stub.url) as client:
        assert b"".join(client.logs("org/a?b c", tail=3, attempt="x-1")) == b"line\n"
    assert stub.asked[0][1] == "/logs/org/a%3Fb%20c?follow=false&tail=3&attempt=x-1"
    stub.answers["GET /logs/a"] = (200, b"before\n")
    with Client(stub.url) as client:
        assert b"".join(client.logs("a", previous=True)) == b"before\n"
    assert stub.asked[1][1] == "/logs/a?follow=false&tail=200&previous=true"


def test_a_stream_that_is_refused_is_an_error_too(stub: Stub) -> None:
    stub.answers["GET /logs/a"] = (404, error("no log yet", "no_log"))
    with Client(stub.url) as client, pytest.raises(ApiError, match="no log yet"):
        list(client.logs("a"))


def test_nobody_there_says_how_to_start_it_and_what_was_tried() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url) as client, pytest.raises(ServerDown) as caught:
        client.state()
    assert caught.value.url == url
    for part in (url, "connection refused", "`orchestrator serve`", "make run", "--url", "ORCHESTRATOR_URL"):
        assert part in caught.value.message


def test_a_server_that_hangs_is_down() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Client(url, timeout=0.2) as client, pytest.raises(ServerDown, match="did not answer in time"):
            client.state()


def test_a_connection_that_breaks_is_told_as_such(stub: Stub) -> None:
    stub.answers["GET /state"] = (200, {"devices": []})
    stub.cuts_after_bytes = 3
    with Client(stub.url) as client, pytest.raises(ServerDown, match="broke"):
        client.state()


@pytest.mark.parametrize("answer", [(200, b"<html>hello</html>"), (404, b"nope"), (502, {"detail": "x"})])
def test_another_program_at_the_url_is_named(stub: Stub, answer: tuple[int, object]) -> None:
    stub.answers["GET /state"] = answer
    with Client(stub.url) as client, pytest.raises(NotOurs) as caught:
        client.state()
    assert "is not an orchestrator" in caught.value.message
    assert f"HTTP {answer[0]}" in caught.value.message
    assert "BaseHTTP" in caught.value.message  # who it says it is


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "http://[::bad", "http://127.0.0.1:port"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ServerDown, match="not a usable URL"), Client(url) as client:
        client.state()


def test_the_url_comes_from_the_argument_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Client().url == "http://127.0.0.1:8000"
    monkeypatch.setenv("ORCHESTRATOR_URL", "http://gpu.lan:9000/")
    assert Client().url == "http://gpu.lan:9000"
    assert Client("localhost:8001").url == "http://localhost:8001"


def test_a_proxy_is_not_asked_for_this_machine(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    stub.answers["GET /state"] = (200, {"version": 1})
    with Client(stub.url) as client:
        assert client.state() == {"version": 1}


def test_events_resume_and_are_parsed(stub: Stub) -> None:
    stub.answers["GET /events"] = (200, b': hi\n\nid: 7\nevent: log\ndata: {"text": "a"}\n\n')
    with Client(stub.url) as client:
        assert list(client.events(last_id=6)) == [Event("log", {"text": "a"}, 7)]
    assert stub.headers[0]["Last-Event-ID"] == "6"


def test_events_may_come_in_any_pieces() -> None:
    first = 'event: model\r\ndata: {"id":\r\ndata: "ä\u2028b"}\r\n\r\n'
    text = f"{first}: ping\n\ndata: no json\n\ndata: {{}}\n\n".encode()
    for size in (1, 2, 7, len(text)):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert list(parse_events(lines_of(pieces))) == [
            Event("model", {"id": "ä\u2028b"}),
            Event("message", {}),
        ]
