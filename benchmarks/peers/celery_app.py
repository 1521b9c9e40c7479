"""Celery: a quorum queue, confirmed, acknowledged after the run, no results."""

from __future__ import annotations

from celery import Celery

from benchmarks.peers.ledger import note_run
from benchmarks.peers.producing import Order, produce_in_turn, queue, url

app = Celery("benchmarks.peers.celery_app", broker=url())
app.conf.update(
    task_default_queue=queue(),
    task_default_queue_type="quorum",
    task_default_exchange_type="topic",
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=256,
    broker_transport_options={"confirm_publish": True},
    worker_enable_remote_control=False,
)


@app.task(name="noop")
def noop(task: int) -> None:
    note_run(task)


if __name__ == "__main__":
    produce_in_turn(noop.delay, Order.read())
