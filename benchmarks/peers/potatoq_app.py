"""potatoq with its own defaults, which are late acknowledgment, quorum queues and confirms; no results."""

from __future__ import annotations

from potatoq import Potatoq

from benchmarks.peers.ledger import note_run
from benchmarks.peers.producing import Order, produce_in_turn, queue, url

app = Potatoq("benchmarks.peers.potatoq_app", broker=url())
app.conf.update(task_default_queue=queue(), task_ignore_result=True)


@app.task(name="noop")
def noop(task: int) -> None:
    note_run(task)


if __name__ == "__main__":
    produce_in_turn(noop.delay, Order.read())
