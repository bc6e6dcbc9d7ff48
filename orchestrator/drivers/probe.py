"""Ask a service whether it serves."""

from __future__ import annotations

import asyncio

import httpx

TIMEOUT_S = 2.0
_UNHEALTHY = (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError)


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

    async def is_healthy(self, host: str, port: int, path: str) -> bool:
        """True once the service answers 2xx there. Any refusal, error or time-out is False."""
        name = f"[{host}]" if ":" in host else host
        try:
            # httpx limits each wait, so an endless answer needs a limit on the whole.
            async with asyncio.timeout(self._timeout_s):
                answer = await self._client.get(f"http://{name}:{port}{path}")
        except _UNHEALTHY:
            return False
        return answer.is_success

    async def close(self) -> None:
        await self._client.aclose()
