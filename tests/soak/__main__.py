"""python -m tests.soak --seconds 600 --engine docker"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
from pathlib import Path

from tests.soak.soak import soak, soak_house

SHORTEST_S = 20.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="A mixed load for a set time.")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long, 20 or more (600)")
    parser.add_argument("--engine", choices=("process", "docker"), default="process")
    parser.add_argument("--seed", type=int, default=None, help="repeats a run; by default another each time")
    asked = parser.parse_args()
    if asked.seconds < SHORTEST_S:
        parser.error(f"--seconds is {asked.seconds:g}: expected {SHORTEST_S:g} or more")
    seed = random.randrange(1_000_000) if asked.seed is None else asked.seed
    print(f"seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    with soak_house(folder, asked.engine) as house:
        report = asyncio.run(soak(house, asked.seconds, seed))
    print("\n".join(report.lines()))
    if report.wrong:
        print(f"the server's log and database are kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
