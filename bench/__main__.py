"""`python -m bench`: every benchmark, one after the other; or those that are named."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from bench import gateway, header, idle, keys, load, monitor, plan, planner

ALL: dict[str, Callable[[], None]] = {
    "planner": planner.main,
    "plan": plan.main,
    "header": header.main,
    "idle": idle.main,
    "monitor": monitor.main,
    "load": load.main,
    "gateway": gateway.main,
    "keys": keys.main,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", nargs="*", help=f"which of {', '.join(ALL)}; by default all")
    for name in parser.parse_args().name or ALL:
        if name not in ALL:
            parser.error(f"there is no benchmark '{name}'; there are {', '.join(ALL)}")
        ALL[name]()


if __name__ == "__main__":
    main()
