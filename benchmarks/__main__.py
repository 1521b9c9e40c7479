"""``python -m benchmarks``: measure, write RESULTS.md and print its table of goals."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import signal
import sys
from contextlib import closing
from typing import TYPE_CHECKING

from benchmarks import places, programme, report
from benchmarks.programs import PEERS_PYTHON
from tests.support.nodes import TREES
from tests.support.reaper import Reaper

if TYPE_CHECKING:
    from benchmarks.programme import Size
    from benchmarks.results import Results

_ON = ("rabbitmq", "sqlite")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--on", choices=sorted(TREES), default="3.10", help="the version of RabbitMQ (%(default)s)")
    parser.add_argument("--only", choices=_ON, action="append", help="one broker; again for more (both)")
    parser.add_argument("--rounds", type=int, help="how often each pair is measured")
    parser.add_argument("--tasks", type=int, help="no-op tasks of a measurement")
    parser.add_argument("--goals", action="store_true", help="only what there is a goal for; writes nothing")
    parser.add_argument("--quick", action="store_true", help="fewer peers, fewer rounds; writes nothing")
    parser.add_argument(
        "--about", choices=sorted(programme.SUBJECTS), action="append", help="only this; writes nothing"
    )
    asked = parser.parse_args()
    if not (asked.about or PEERS_PYTHON.exists()):
        sys.exit(f"{PEERS_PYTHON.parents[1]} is missing: `make bench` makes it")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    # Told to end, the workers and the node are ended too; killed, the reaper ends them.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with closing(Reaper([tree / "tmp" for tree in TREES.values()])):
        results, size = _measure(asked)
    sys.stdout.write("\n".join(report.goals(results)) + "\n")
    if not (asked.quick or asked.goals or asked.about):
        report.write(results, size)


def _measure(asked: argparse.Namespace) -> tuple[list[Results], Size]:
    size = programme.QUICK if asked.quick else programme.FULL
    size = dataclasses.replace(size, rounds=asked.rounds or size.rounds, tasks=asked.tasks or size.tasks)
    size = dataclasses.replace(size, goals_only=asked.goals, about=tuple(asked.about or ()))
    results = []
    if "rabbitmq" in (asked.only or _ON):
        with places.rabbitmq(asked.on) as node:
            results.append(programme.run(node, size))
    if "sqlite" in (asked.only or _ON):
        with places.sqlite() as folder:
            results.append(programme.run(folder, size))
    if not size.about:
        results.append(programme.run_startup(size))
    return results, size


if __name__ == "__main__":
    main()
