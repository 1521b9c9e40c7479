"""tarsk on RabbitMQ, with its own defaults."""

from __future__ import annotations

import sys

from tarsk import App
from tarsk._cli import main

from benchmarks.peers.ledger import note_run
from benchmarks.peers.producing import Order, produce_in_turn, queue, url

# Its client takes the last slash for a virtual host without a name.
_broker = url().rstrip("/")
app = App(broker=_broker)


@app.task(queue=queue(), name="noop")
def noop(task: int) -> None:
    note_run(task)


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        sys.exit(main([*sys.argv[1:], "--broker", _broker]))
    produce_in_turn(noop.send, Order.read())
