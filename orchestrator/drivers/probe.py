"""Ask a service whether it serves."""

from __future__ import annotations

import asyncio

import httpx

from orchestrator.core.entities import NOBODY_LISTENS

TIMEOUT_S = 2.0


class HttpProbe:
    """ports.Probe over one shared client: no proxy, no redirect, no certificate store to load."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._client = httpx.AsyncClient(
            trust_env=False,
            verify=False,  # health is asked over plain HTTP; loading certificates takes longer than it
            timeout=timeout_s,
            limits=httpx.Limits(max_keepalive_connections=16, keepalive_expiry=1.0),
            headers={"User-Agent": "model-orchestrator"},
        )

    async def problem(self, host: str, port: int, path: str) -> str | None:
        """None once the service answers 2xx there, else in a few words what came instead."""
        name = f"[{host}]" if ":" in host else host
        try:
            # httpx limits each wait, so an endless answer needs a limit on the whole.
            async with asyncio.timeout(self._timeout_s):
                answer = await self._client.get(f"http://{name}:{port}{path}")
        except (httpx.TimeoutException, TimeoutError):
            return f"no answer within {self._timeout_s:g} s"
        except (httpx.ConnectError, OSError):
            return NOBODY_LISTENS
        except (httpx.HTTPError, httpx.InvalidURL):
            return "no answer that is HTTP"
        return None if answer.is_success else f"HTTP {answer.status_code}"

    async def close(self) -> None:
        await self._client.aclose()
