"""``python -m benchmarks``: measure, write RESULTS.md and print its table of goals."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys

from tests.support.nodes import TREES

from benchmarks import places, programme, report
from benchmarks.programs import PEERS_PYTHON

_ON = ("rabbitmq", "sqlite")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--on", choices=sorted(TREES), default="3.10", help="the version of RabbitMQ (%(default)s)")
    parser.add_argument("--only", choices=_ON, action="append", help="one broker; again for more (both)")
    parser.add_argument("--rounds", type=int, help="how often each pair is measured")
    parser.add_argument("--tasks", type=int, help="no-op tasks of a measurement")
    parser.add_argument("--quick", action="store_true", help="fewer peers, fewer rounds; writes nothing")
    asked = parser.parse_args()
    if not PEERS_PYTHON.exists():
        sys.exit(f"{PEERS_PYTHON.parents[1]} is missing: `make bench` makes it")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    size = programme.QUICK if asked.quick else programme.FULL
    size = dataclasses.replace(size, rounds=asked.rounds or size.rounds, tasks=asked.tasks or size.tasks)
    results = [programme.run_startup(size)]
    if "rabbitmq" in (asked.only or _ON):
        with places.rabbitmq(asked.on) as node:
            results.append(programme.run(node, size))
    if "sqlite" in (asked.only or _ON):
        with places.sqlite() as folder:
            results.append(programme.run(folder, size))
    results.append(results.pop(0))
    sys.stdout.write("\n".join(report.goals(results)) + "\n")
    if not asked.quick:
        report.write(results, size)


if __name__ == "__main__":
    main()
