"""``python -m chaos``: the fault run's command line."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from contextlib import closing

import msgspec

from chaos.faults import FAULTS
from chaos.faults.fault import KINDS
from chaos.run import FULL, QUICK, Nodes, Theatre
from chaos.table import brief, legend, notes, table
from tests.support.nodes import TREES
from tests.support.reaper import Reaper


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description="Is a task lost when something breaks?")
    parser.add_argument("--seed", type=int, default=1, help="decides every random moment (default: 1)")
    parser.add_argument("--on", action="append", choices=KINDS, help="a broker; again for more (default: all)")
    parser.add_argument("--fault", action="append", choices=[fault.name for fault in FAULTS], help="again for more")
    parser.add_argument("--quick", action="store_true", help="each fault once, with few tasks")
    parser.add_argument("--scheduled", type=float, help="how long schedules are watched (seconds; default: 120)")
    parser.add_argument("--list", action="store_true", help="name the faults and end")
    options = parser.parse_args()
    if options.list:
        for fault in FAULTS:
            print(f"{fault.name:24} {fault.what} ({', '.join(fault.brokers)})")
        return 0
    # The drivers tell of each connection that fails, which is what is wanted here.
    logging.getLogger().addHandler(logging.NullHandler())
    # Whoever ends this run ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = []
    with closing(Reaper([tree / "tmp" for tree in TREES.values()])), closing(Nodes()) as nodes:
        profile = QUICK if options.quick else FULL
        profile = msgspec.structs.replace(profile, scheduled=options.scheduled or profile.scheduled)
        theatre = Theatre(profile, options.seed, nodes.get)
        for kind in options.on or KINDS:
            for fault in FAULTS:
                if kind in fault.brokers and (not options.fault or fault.name in options.fault):
                    print(f"{kind}: {fault.name} ...", end=" ", flush=True)
                    began = time.monotonic()
                    result = theatre.play(fault, kind)
                    results.append(result)
                    print(f"{brief(result)} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"\nseed {options.seed}\n\n{table(results)}\n\n{legend()}\n\n{notes(results)}")
    return 1 if any(result.lost or result.failed for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
