"""How long the header of a large model takes to read, and how much memory, in a fresh process each time."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench.report import milliseconds, show
from tests.estimate.shapes import qwen3_30b_a3b

ROUNDS = 9
MERGES = 151_387  # as many as Qwen's tokenizer has

READ = """
import json, sys, time
from pathlib import Path
from orchestrator.estimate.footprint import predict
from orchestrator.estimate.gguf_header import read_gguf
from orchestrator.estimate.plan import Plan
def most_mib():
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) / 1024 for row in rows if row.startswith("VmHWM"))
bare, begun, cpu = most_mib(), time.perf_counter(), time.process_time()
header = read_gguf(Path(sys.argv[1]))
read, cpu = time.perf_counter(), time.process_time() - cpu
predict(header, Plan(8192))
predicted = time.perf_counter()
print(json.dumps([read - begun, cpu, predicted - read, bare, most_mib()]))
"""


def write(path: Path) -> float:
    """A sparse file of a 30B model's size with a whole vocabulary; its size in GiB."""
    shape = qwen3_30b_a3b()
    merges = [f"{number} piece" for number in range(MERGES)]
    head = shape.head({"tokenizer.ggml.merges": merges})
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(-(-tensor.size // 32) * 32 for tensor in shape.sized()))
    return path.stat().st_size / 2**30


def measured(path: Path) -> list[float]:
    words = [sys.executable, "-c", READ, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.gguf"
        size = write(path)
        rounds = [measured(path) for _ in range(ROUNDS)]
    read, cpu, predicted, bare, most = (sorted(values) for values in zip(*rounds, strict=True))
    show(
        f"GGUF header: {size:.1f} GiB, 151,936 tokens, {MERGES:,} merges (aim: under 100 ms and 40 MB)",
        ["", "median", "best", "worst"],
        [
            ["reading it", *(milliseconds(value, 1) for value in (median(read), read[0], read[-1]))],
            ["the same in CPU time", *(milliseconds(value, 1) for value in (median(cpu), cpu[0], cpu[-1]))],
            [
                "predicting from it",
                *(milliseconds(x, 1) for x in (median(predicted), predicted[0], predicted[-1])),
            ],
            ["memory of the process", *(f"{value:.1f} MiB" for value in (median(most), most[0], most[-1]))],
            ["the same before reading", *(f"{value:.1f} MiB" for value in (median(bare), bare[0], bare[-1]))],
        ],
    )


if __name__ == "__main__":
    main()
