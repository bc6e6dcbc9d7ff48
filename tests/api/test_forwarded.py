"""Whose word counts about who asks."""

from typing import Any

import pytest

from orchestrator.api.forwarded import Proxies

PROXY = "172.28.0.2"


def request(peer: str | None, *headers: tuple[str, str], kind: str = "http") -> dict[str, Any]:
    told = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    client = None if peer is None else (peer, 5)
    scheme = "http" if kind == "http" else "ws"
    return {"type": kind, "client": client, "scheme": scheme, "headers": [(b"host", b"inner:8000"), *told]}


def client(proxies: Proxies, peer: str | None, *hops: str) -> str:
    asked = request(peer, *(("x-forwarded-for", hop) for hop in hops))
    seen = proxies.unwrapped(asked)["client"]
    return str(seen[0]) if seen else ""


@pytest.mark.parametrize(
    ("hops", "seen"),
    [
        ([], PROXY),
        (["10.0.0.7"], "10.0.0.7"),
        (["6.6.6.6, 10.0.0.7"], "10.0.0.7"),  # the client wrote the first one
        (["6.6.6.6", "10.0.0.7"], "10.0.0.7"),
        ([f"10.0.0.7, {PROXY}"], "10.0.0.7"),
        ([f"10.0.0.7, 172.28.0.9, {PROXY}"], "172.28.0.9"),
        ([f"{PROXY}, {PROXY}"], PROXY),
        (["10.0.0.7, garbage"], "garbage"),  # no address, so in no network
        (["10.0.0.7,"], "10.0.0.7"),
        (["fd00::7"], "fd00::7"),
    ],
)
def test_the_nearest_hop_that_is_no_proxy_is_the_client(hops: list[str], seen: str) -> None:
    assert client(Proxies([PROXY]), PROXY, *hops) == seen


@pytest.mark.parametrize("peer", ["172.28.0.3", "6.6.6.6", "::1", None])
def test_nobody_else_is_believed(peer: str | None) -> None:
    asked = request(
        peer, ("x-forwarded-for", "10.0.0.7"), ("x-forwarded-proto", "https"), ("x-forwarded-host", "evil")
    )
    for proxies in (Proxies([PROXY]), Proxies()):
        assert proxies.unwrapped(asked) == {**asked, "client": None}, "nor is it the peer who asks"
    unrelayed = request(peer, ("x-forwarded-proto", "https"), ("x-forwarded-host", "evil"))
    assert Proxies([PROXY]).unwrapped(unrelayed) is unrelayed


@pytest.mark.parametrize(
    ("trusted", "peer"),
    [("172.28.0.0/16", PROXY), ("127.0.0.1", "::ffff:127.0.0.1"), ("fd00::/8", "fd00::2"), ("::1", "::1")],
)
def test_networks_and_both_kinds_of_addresses(trusted: str, peer: str) -> None:
    assert client(Proxies([trusted]), peer, "10.0.0.7") == "10.0.0.7"


def test_scheme_and_host_are_as_the_client_asked() -> None:
    proxies = Proxies([PROXY])
    told = (("x-forwarded-proto", "https"), ("x-forwarded-host", "evil.example, llama.lan"))
    seen = proxies.unwrapped(request(PROXY, *told))
    assert seen["scheme"] == "https"
    assert dict(seen["headers"])[b"host"] == b"llama.lan"
    assert proxies.unwrapped(request(PROXY, *told, kind="websocket"))["scheme"] == "wss"
    plain = proxies.unwrapped(request(PROXY, ("x-forwarded-proto", "gopher")))
    assert (plain["scheme"], dict(plain["headers"])[b"host"]) == ("http", b"inner:8000")


async def test_a_name_is_resolved_and_keeps_its_addresses_while_it_cannot_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxies = Proxies(["localhost", "nobody.invalid"])
    assert not proxies.trusts("127.0.0.1")
    await proxies.resolve("localhost")
    await proxies.resolve("nobody.invalid")
    assert proxies.trusts("127.0.0.1")
    assert client(proxies, "127.0.0.1", "10.0.0.7") == "10.0.0.7"

    async def fail(*_: object, **__: object) -> None:
        raise OSError("no such name")

    import asyncio

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", fail, raising=False)
    await proxies.resolve("localhost")
    assert proxies.trusts("127.0.0.1")


async def test_without_names_there_is_nothing_to_watch() -> None:
    await Proxies(["10.0.0.1"]).watch()
