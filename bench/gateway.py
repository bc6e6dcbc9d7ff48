"""What the gateway adds: latency, throughput and CPU, against direct connections to the same stub.

The stub (stub.py) runs as a model of a real orchestrator, started as a process. The load generator
(client.py) asks the stub and the gateway in turn, several rounds, and medians are shown.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.client import MODEL, request
from bench.report import milliseconds, percentile, ratio, say, show
from bench.server import HOST, Server, serving

STUB = Path(__file__).with_name("stub.py")
ROOT = Path(__file__).parents[1]
CONNECTIONS = (1, 16, 64)
KINDS = {
    "json": "JSON, 1 KB",
    "stream": "stream, 200 events",
    "stream-by-event": "the same, a chunk each",
}
ROUNDS = 5
ROUND_S = 1.5
WARM_UP_S = 0.7


@dataclass(frozen=True)
class Load:
    """One round of the load generator; `cpu_s` is the orchestrator's for one answer."""

    per_s: float
    latencies_s: tuple[float, ...]
    cpu_s: float


@dataclass(frozen=True)
class Compared:
    """Rounds of the same load on the stub and on the gateway, taken in turn."""

    kind: str
    connections: int
    direct: list[Load]
    through: list[Load]

    def per_s(self) -> tuple[float, float]:
        return median(r.per_s for r in self.direct), median(r.per_s for r in self.through)

    def latency_s(self, percent: float) -> tuple[float, float]:
        """The median of the rounds' percentiles, direct and through the gateway."""
        direct = median(percentile(r.latencies_s, percent) for r in self.direct)
        return direct, median(percentile(r.latencies_s, percent) for r in self.through)

    def cpu_s(self) -> float:
        return median(r.cpu_s for r in self.through)


@contextmanager
def stub_behind_gateway(**more: object) -> Iterator[tuple[Server, int]]:
    """A real orchestrator whose loaded model is the stub, and the stub's own port; `more` are settings."""
    services = {"stub": {"command": ["python", str(STUB)], "health": {"path": "/health"}}}
    models = {MODEL: {"service": "stub", "memory": "64MiB", "idle_after": "never"}}
    settings = {"engine": "process", "devices": "host", "host_memory_mib": 1024} | more
    with serving(services, models, settings) as server:
        server.load(MODEL)
        yield server, server.address(MODEL)[1]


def run_client(port: int, connections: int, seconds: float, kind: str, server: Server, key: str = "") -> Load:
    command = [sys.executable, "-m", "bench.client", HOST, str(port), str(connections), str(seconds), kind]
    command += [key] if key else []
    before_s = server.cpu_s()
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    used_s = server.cpu_s() - before_s
    seen = json.loads(done.stdout)
    latencies_s = tuple(latency / 1e6 for latency in seen["latencies_us"])
    return Load(seen["answers"] / seen["seconds"], latencies_s, used_s / seen["answers"])


def compare(server: Server, stub_port: int, kind: str, connections: int) -> Compared:
    compared = Compared(kind, connections, [], [])
    for port in (stub_port, server.port):
        run_client(port, connections, WARM_UP_S, kind, server)
    for _ in range(ROUNDS):
        compared.direct.append(run_client(stub_port, connections, ROUND_S, kind, server))
        compared.through.append(run_client(server.port, connections, ROUND_S, kind, server))
    return compared


def throughput_row(compared: Compared) -> list[str]:
    direct, through = compared.per_s()
    slowest = min(r.per_s for r in compared.through)
    fastest = max(r.per_s for r in compared.through)
    return [
        f"{KINDS[compared.kind]}, {compared.connections} conn.",
        f"{direct:,.0f}/s",
        f"{through:,.0f}/s",
        f"{slowest:,.0f}-{fastest:,.0f}",
        ratio(through, direct),
        f"{compared.cpu_s() * 1e6:,.0f} us",
        f"{1 / compared.cpu_s():,.0f}/s",
    ]


def latency_rows(compared: Compared) -> list[list[str]]:
    rows = []
    for percent in (50, 99):
        direct_s, through_s = compared.latency_s(percent)
        rows.append(
            [
                f"{KINDS[compared.kind]}, 1 conn., p{percent}",
                milliseconds(direct_s, 3),
                milliseconds(through_s, 3),
                milliseconds(through_s - direct_s, 3),
                ratio(through_s, direct_s),
            ]
        )
    return rows


def wrk_rows(server: Server, stub_port: int) -> list[list[str]]:
    """A second opinion on JSON at 16 connections, where wrk is installed."""
    wrk = shutil.which("wrk")
    if wrk is None:
        return []
    direct, through = [], []
    for _ in range(3):
        direct.append(run_wrk(wrk, stub_port))
        through.append(run_wrk(wrk, server.port))
    low, high = min(through), max(through)
    row = ["JSON, 1 KB, 16 conn., by wrk", f"{median(direct):,.0f}/s", f"{median(through):,.0f}/s"]
    return [[*row, f"{low:,.0f}-{high:,.0f}", ratio(median(through), median(direct)), "", ""]]


def run_wrk(wrk: str, port: int) -> float:
    """Requests per second. wrk counts answers that are no success; there must be none."""
    body = request("json", HOST, port).decode().partition("\r\n\r\n")[2]
    with tempfile.TemporaryDirectory(prefix="orchestrator-bench-") as folder:
        script = Path(folder) / "post.lua"
        script.write_text(
            f"wrk.method = 'POST'\nwrk.body = '{body}'\nwrk.headers['content-type'] = 'application/json'\n"
        )
        url = f"http://{HOST}:{port}/v1/chat/completions"
        command = [wrk, "-t1", "-c16", f"-d{round(2 * ROUND_S)}s", "-s", str(script), url]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    if any("Non-2xx" in line for line in lines):
        raise RuntimeError("wrk: not every answer was a success:\n" + "\n".join(lines))
    return float(next(line for line in lines if line.startswith("Requests/sec")).split()[1])


def main() -> None:
    say(f"gateway: {len(KINDS) * len(CONNECTIONS)} loads of {ROUNDS} rounds, about three minutes")
    with stub_behind_gateway() as (server, stub_port):
        found = [compare(server, stub_port, kind, count) for kind in KINDS for count in CONNECTIONS]
        second_opinion = wrk_rows(server, stub_port)
    alone = [compared for compared in found if compared.connections == 1]
    show(
        "Gateway: latency of one connection (aim: under 0.45 ms added at p50)",
        ["load", "direct", "gateway", "added", "ratio"],
        [row for compared in alone for row in latency_rows(compared)],
    )
    show(
        "Gateway: throughput (aim at 16 connections: 5,000 JSON requests/s, 1,500 streams/s)",
        ["load", "direct", "gateway", "rounds from-to", "ratio", "CPU/answer", "a core's"],
        [*map(throughput_row, found), *second_opinion],
        [
            f"Medians of {ROUNDS} rounds of {ROUND_S} s, direct and gateway in turn. Stub, gateway and load "
            "generator share the cores.",
            "A stream is 20 writes of 10 events with a turn of the stub's event loop between; one HTTP chunk "
            "for each write, or for each event.",
            "CPU/answer is the orchestrator's own time, user and kernel, all its threads; `a core's`: the "
            "answers that one core of its own would carry, which other work on the machine disturbs least.",
        ],
    )


if __name__ == "__main__":
    main()
