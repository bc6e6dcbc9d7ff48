"""What a footprint is predicted to be, against what a real card shows: `python -m bench.vram_accuracy`.

Starts llama-server itself for each case, on a model of real shape without weights, and prints a line of JSON
for each, then a table. Needs only the standard library, this repository and NVIDIA's driver; nvidia-ml-py
where it is there, else nvidia-smi (which is too slow to see a peak that does not last; llama.cpp's do).

    ORCHESTRATOR_TEST_LLAMA_SERVER=/path/to/llama-server python3 -m bench.vram_accuracy --folder /tmp/shapes

Nothing else may start or end on the card meanwhile. Without a GPU, `--no-gpu` compares llama.cpp's own lines
about its buffers with the prediction for a machine that has only RAM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.core.buffers import buffers_in
from orchestrator.estimate.footprint import each_gpu_bytes
from orchestrator.estimate.footprint import predict as predict_footprint
from orchestrator.estimate.gguf_header import read_gguf
from orchestrator.estimate.plan import Plan
from tests.estimate.shapes import SHAPES

MIB = 1 << 20
SERVER = "ORCHESTRATOR_TEST_LLAMA_SERVER"
ALL = 999
READY_S, ANSWER_S = 120, 120
WORTH_KEEPING = re.compile(
    r"buffer size|offloaded|n_ctx|graph splits|graph nodes|n_outputs|flash|pinned|cache size"
)


@dataclass(frozen=True)
class Case:
    """One way to run one model. `n_gpu_layers` beyond the layers there are means all; over several `gpus`
    they are split evenly."""

    shape: str
    context_size: int
    cache_type: str = "f16"
    n_gpu_layers: int = ALL
    parallel: int = 1
    n_cpu_moe: int = 0
    gpus: int = 1

    def __str__(self) -> str:
        layers = "all" if self.n_gpu_layers == ALL else str(self.n_gpu_layers)
        experts = f", {self.n_cpu_moe} layers' experts in RAM" if self.n_cpu_moe else ""
        words = f"{self.context_size}, {self.cache_type}, {layers} layers, {self.parallel} slots"
        words += f", {self.gpus} GPUs" if self.gpus > 1 else ""
        return f"{self.shape}, {words}{experts}"


DENSE, EXPERTS = "qwen3-8b", "qwen3-30b-a3b"
CASES = (
    Case(DENSE, 4096),
    Case(DENSE, 8192),
    Case(DENSE, 4096, parallel=4),
    Case(DENSE, 32768),
    Case(DENSE, 32768, "q8_0", parallel=4),
    Case(DENSE, 16384, "q4_0"),
    Case(DENSE, 131072, "q8_0"),
    Case(DENSE, 131072, "q4_0", parallel=4),
    Case(DENSE, 8192, n_gpu_layers=18),
    Case(DENSE, 32768, "q8_0", n_gpu_layers=24, parallel=4),
    Case(DENSE, 8192, n_gpu_layers=0),
    Case(EXPERTS, 8192),
    Case(EXPERTS, 4096, parallel=4),
    Case(EXPERTS, 32768, parallel=4),
    Case(EXPERTS, 32768, "q8_0"),
    Case(EXPERTS, 131072),
    Case(EXPERTS, 131072, "q4_0", parallel=4),
    Case(EXPERTS, 65536, "q8_0", parallel=4),
    Case(EXPERTS, 32768, n_gpu_layers=24),
    Case(EXPERTS, 131072, "q8_0", n_gpu_layers=36, parallel=4),
    Case(EXPERTS, 8192, n_cpu_moe=24),
    Case("llama-70b-4-layers", 32768),
    Case("llama-70b-4-layers", 131072, "q8_0", parallel=4),
    Case("gemma3-12b-12-layers", 32768, parallel=4),
    Case("gemma3-12b-12-layers", 131072, "q8_0"),
    Case("gpt-oss-20b-6-layers", 32768, parallel=4),
    Case("qwen3-next-80b-8-layers", 32768, parallel=4),
)
SPLIT_CASES = (
    Case(DENSE, 8192, gpus=2),
    Case(DENSE, 32768, "q8_0", parallel=4, gpus=2),
    Case(DENSE, 8192, n_gpu_layers=24, gpus=2),
    Case(EXPERTS, 8192, gpus=2),
    Case(EXPERTS, 32768, parallel=4, gpus=2),
    Case(EXPERTS, 131072, "q8_0", parallel=4, gpus=2),
    Case("llama-70b-4-layers", 32768, gpus=2),
    Case("gemma3-12b-12-layers", 32768, parallel=4, gpus=2),
    Case("gpt-oss-20b-6-layers", 32768, parallel=4, gpus=2),
)
"""On a machine with two GPUs of a kind: the fuller one counts, since both get what that one needs."""


# --- the card


class Card:
    """Memory of one GPU in MiB, by pynvml where it is installed, else by nvidia-smi."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._nvml: Any = None
        with contextlib.suppress(ImportError):
            import pynvml

            pynvml.nvmlInit()
            self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)

    @property
    def is_quick(self) -> bool:
        return self._nvml is not None

    def name(self) -> str:
        return self._smi("gpu=name")[0].strip()

    def driver(self) -> str:
        return self._smi("gpu=driver_version")[0].strip()

    def used_mib(self) -> float:
        """All that is used on it, without the driver's own share."""
        if self._nvml is not None:
            version = self._nvml.nvmlMemory_v2
            return float(self._nvml.nvmlDeviceGetMemoryInfo(self._handle, version=version).used) / MIB
        return float(self._smi("gpu=memory.used")[0])

    def used_by_mib(self, pid: int) -> float | None:
        """What one process has; None where processes cannot be seen (another PID namespace, say)."""
        if self._nvml is not None:
            found = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
            uses = [process.usedGpuMemory for process in found if process.pid == pid]
            return float(uses[0]) / MIB if uses and uses[0] else None
        rows = [row.split(",") for row in self._smi("compute-apps=pid,used_memory")]
        uses = [used.strip() for number, used in rows if number.strip() == str(pid)]
        return float(uses[0]) if uses and uses[0].isdecimal() else None

    def _smi(self, query: str) -> list[str]:
        command = ["nvidia-smi", f"--id={self.index}", f"--query-{query}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return [row for row in done.stdout.splitlines() if row.strip()]


class NoCard:
    """Stands in where there is only RAM."""

    is_quick = False

    def name(self) -> str:
        return "no GPU"

    driver = name

    def used_mib(self) -> float:
        return 0.0

    def used_by_mib(self, pid: int) -> float | None:
        return None


@dataclass
class Peak:
    """The most that was seen while something ran."""

    mib: float = 0.0


@contextlib.contextmanager
def watching_all(cards: Sequence[Card | NoCard]) -> Iterator[list[Peak]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(watching(card)) for card in cards]


@contextlib.contextmanager
def watching(card: Card | NoCard) -> Iterator[Peak]:
    """Measure every 5 ms until the block ends (once, at its end, where a measurement takes longer)."""
    peak, ended = Peak(), threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            peak.mib = max(peak.mib, card.used_mib())

    thread = threading.Thread(target=watch)
    if card.is_quick:
        thread.start()
    try:
        yield peak
    finally:
        ended.set()
        if card.is_quick:
            thread.join()
        peak.mib = max(peak.mib, card.used_mib())


# --- llama-server


def command(server: str, model: Path, case: Case, port: int, extra: Sequence[str]) -> list[str]:
    """All that decides memory is said, as the llama-cpp service does; nothing is left to `--fit`."""
    words = [
        server, "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "--fit", "off",
        "-c", str(case.context_size), "-ngl", str(case.n_gpu_layers), "-np", str(case.parallel), "-kvu",
        "-fa", "on", "-b", "2048", "-ub", "512", "-ctk", case.cache_type, "-ctv", case.cache_type,
        "--cache-ram", "0", "-lv", "4",
    ]  # fmt: skip
    if case.gpus > 1:
        words += ["--tensor-split", ",".join("1" * case.gpus)]
    if case.n_cpu_moe:
        words += ["--n-cpu-moe", str(case.n_cpu_moe)]
    return [*words, *extra]


class Failed(Exception):
    """llama-server did not do as it should; the message has the end of its log."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ask(url: str, body: Mapping[str, object] | None = None, timeout: float = 5) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout) as answer:
        return json.load(answer)


def wait_ready(process: subprocess.Popen[bytes], url: str) -> None:
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise Failed(f"llama-server ended with {process.returncode}")
        with contextlib.suppress(OSError, ValueError):
            ask(f"{url}/health")
            return
        time.sleep(0.05)
    raise Failed(f"llama-server was not ready after {READY_S} s")


def status_mib(pid: int) -> dict[str, int]:
    """RAM of a process: what is its own, what is of files, what is shared or pinned by the driver."""
    rows = dict(
        row.split(":", 1) for row in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in row
    )
    keys = ("RssAnon", "RssFile", "RssShmem", "VmLck", "VmPin", "VmHWM")
    return {key: int(rows[key].split()[0]) // 1024 for key in keys if key in rows}


def buffers(log: str) -> dict[str, float]:
    """MiB by "device kind", such as "CUDA0 compute", as llama.cpp's own lines say; lines of a kind add up."""
    return {
        f"{device} {kind}": round(size / MIB, 2)
        for device, kinds in buffers_in(log).items()
        for kind, size in kinds.items()
    }


@dataclass(frozen=True)
class Setting:
    """Where and with what all cases run."""

    server: str
    folder: Path
    card: Card | NoCard
    prompt_tokens: int
    extra: tuple[str, ...]

    def visible(self, case: Case) -> dict[str, str]:
        """Only the GPUs of the case: llama.cpp would take all of them."""
        if not isinstance(self.card, Card):
            return {}
        indices = range(case.gpus) if case.gpus > 1 else (self.card.index,)
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, indices)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

    def cards(self, case: Case) -> list[Card | NoCard]:
        """The GPUs that the case runs on: the chosen one, or the first ones."""
        if case.gpus == 1 or not isinstance(self.card, Card):
            return [self.card]
        return [Card(index) for index in range(case.gpus)]


def measure(case: Case, setting: Setting) -> dict[str, Any]:
    """Start, wait until ready, send one prompt, stop; everything that was seen, also if it failed.

    NVML numbers are the growth since before the start.
    """
    model = SHAPES[case.shape]().write(setting.folder)
    log_file = setting.folder / "llama-server.log"
    cards, port = setting.cards(case), free_port()
    before_mib = [card.used_mib() for card in cards]
    with log_file.open("wb") as log:
        words = command(setting.server, model, case, port, setting.extra)
        environment = os.environ | setting.visible(case)
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
    seen: dict[str, Any] = {}
    try:
        observe(case, setting, process, f"http://127.0.0.1:{port}", before_mib, seen)
    except (Failed, OSError, ValueError) as error:
        seen["failed"] = f"{type(error).__name__}: {error}"
        seen["log_tail"] = log_file.read_text(errors="replace").splitlines()[-12:]
    finally:
        stop(process)
        for card, used_mib in zip(cards, before_mib, strict=True):
            wait_given_back(card, used_mib)
    text = log_file.read_text(errors="replace")
    seen["buffers"] = buffers(text)
    seen["lines"] = [line.strip() for line in text.splitlines() if WORTH_KEEPING.search(line)][:80]
    return seen


def observe(
    case: Case,
    setting: Setting,
    process: subprocess.Popen[bytes],
    url: str,
    before_mib: Sequence[float],
    seen: dict[str, Any],
) -> None:
    """Fill `seen` with what shows at ready and after a prompt. Raises Failed, or what urllib raises.

    Of several GPUs the fullest counts; `…_by_gpu` has each.
    """
    cards, began_s = setting.cards(case), time.monotonic()
    card = cards[0]

    def note(name: str, now_mib: Sequence[float]) -> None:
        grown = [round(now - before, 1) for now, before in zip(now_mib, before_mib, strict=True)]
        seen[name] = max(grown)
        if case.gpus > 1:
            seen[f"{name}_by_gpu"] = grown

    with watching_all(cards) as loads:
        wait_ready(process, url)
    seen["ready_s"] = round(time.monotonic() - began_s, 2)
    note("nvml_mib_peak_of_load", [load.mib for load in loads])
    note("nvml_mib_ready", [each.used_mib() for each in cards])
    seen["nvml_mib_ready_of_pid"] = card.used_by_mib(process.pid)
    seen["ram_mib_ready"] = status_mib(process.pid)
    length = min(setting.prompt_tokens, case.context_size - 64)
    if length <= 0:
        return
    prompt = [1000 + 7 * number % 90_000 for number in range(length)]
    body = {"prompt": prompt, "n_predict": 8, "ignore_eos": True, "cache_prompt": False}
    with watching_all(cards) as peaks:
        ask(f"{url}/completion", body, ANSWER_S)
    note("nvml_mib_peak", [peak.mib for peak in peaks])
    seen["nvml_mib_after_of_pid"] = card.used_by_mib(process.pid)
    seen["ram_mib_after"] = status_mib(process.pid)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_given_back(card: Card | NoCard, before_mib: float) -> None:
    """The next case counts from what is used now, so what this one had must be gone."""
    until = time.monotonic() + 5
    while card.used_mib() > before_mib + 8 and time.monotonic() < until:
        time.sleep(0.02)


# --- the comparison


def predict(case: Case, setting: Setting) -> dict[str, Any]:
    """The prediction in MiB; `total` is what should be seen on the card, of several on the fullest (without
    one, in RAM)."""
    header = read_gguf(SHAPES[case.shape]().write(setting.folder))
    plan = Plan(
        context_size=case.context_size,
        n_gpu_layers=case.n_gpu_layers,
        parallel=case.parallel,
        cache_type_k=case.cache_type,
        cache_type_v=case.cache_type,
        n_cpu_moe=case.n_cpu_moe,
        on_gpu=isinstance(setting.card, Card),
        gpu=setting.card.name(),
        split=(1.0,) * case.gpus,
    )
    footprint = predict_footprint(header, plan)
    parts = {
        device: {component: round(size / MIB, 1) for component, size in found.items()}
        for device, found in footprint.breakdown.items()
    }
    bounds = {"low": footprint.low, "total": footprint.total, "high": footprint.high}
    if case.gpus > 1:
        bounds = {"total": each_gpu_bytes(footprint)}
    return {name: round(size / MIB, 1) for name, size in bounds.items()} | {"parts": parts}


def percent(predicted: float, truth: float) -> float:
    """By how much the prediction is too high; negative: too low."""
    return round(100 * (predicted - truth) / truth, 2)


def run(case: Case, setting: Setting) -> dict[str, Any]:
    """One line of the result: the case, what was predicted, what was seen, and the error."""
    predicted = predict(case, setting)
    row = {"case": asdict(case), "name": str(case), "predicted": predicted, **measure(case, setting)}
    truth = row.get("nvml_mib_peak") or row.get("nvml_mib_ready")
    return row | {"error_percent": percent(predicted["total"], truth) if truth else None}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of docs/vram-accuracy.md."""
    head = "| model | context | KV | layers | slots | at ready | after a prompt | predicted | error |"
    lines = [head, "|---|--:|---|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        case = row["case"]
        layers = "all" if case["n_gpu_layers"] == ALL else str(case["n_gpu_layers"])
        layers += f", {case['n_cpu_moe']} without experts" if case["n_cpu_moe"] else ""
        layers += f", {case['gpus']} GPUs" if case["gpus"] > 1 else ""
        cells = [case["shape"], f"{case['context_size']}", case["cache_type"], layers, f"{case['parallel']}"]
        if "failed" in row:
            cells += ["failed", "", "", ""]
        else:
            error = row["error_percent"]
            cells += [f"{row['nvml_mib_ready']:.0f}", f"{row.get('nvml_mib_peak', 0):.0f}"]
            cells += [f"{row['predicted']['total']:.0f}", "" if error is None else f"{error:+.1f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.vram_accuracy", description=__doc__)
    parser.add_argument("--server", default=os.environ.get(SERVER) or shutil.which("llama-server"))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/vram-shapes"), help="for the model files")
    parser.add_argument("--gpu", type=int, default=0, help="the card's index")
    parser.add_argument("--split", action="store_true", help="the cases over two GPUs instead")
    parser.add_argument("--no-gpu", action="store_true", help="only RAM: compare buffers")
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--prompt-tokens", type=int, default=3000, help="0: send none")
    parser.add_argument("--limit-s", type=float, default=450, help="start no case after so long")
    parser.add_argument("--out", type=Path, help="also write the lines and the table here")
    parser.add_argument("extra", nargs="*", help="after --: more words for llama-server")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    given = arguments(words)
    if not given.server:
        print(f"name a llama-server with --server or {SERVER}", file=sys.stderr)
        return 2
    card = NoCard() if given.no_gpu else Card(given.gpu)
    setting = Setting(given.server, given.folder, card, given.prompt_tokens, tuple(given.extra))
    chosen = [case for case in (SPLIT_CASES if given.split else CASES) if given.only in str(case)]
    out = given.out.open("w") if given.out else None

    def say(line: str) -> None:
        print(line, flush=True)
        if out:
            print(line, file=out, flush=True)

    say(
        json.dumps(
            {"card": card.name(), "driver": card.driver(), "quick": card.is_quick, "cases": len(chosen)}
        )
    )
    rows, began_s = [], time.monotonic()
    for case in chosen:
        if time.monotonic() - began_s > given.limit_s:
            say(json.dumps({"name": str(case), "left_out": f"{given.limit_s:.0f} s are over"}))
            continue
        rows.append(run(case, setting))
        say(json.dumps(rows[-1]))
    say(table(rows))
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
