"""Dramatiq: confirmed, acknowledged after the run. It declares classic durable queues and knows no others."""

from __future__ import annotations

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from benchmarks.peers.ledger import note_run
from benchmarks.peers.producing import Order, produce_in_turn, queue, url

broker = RabbitmqBroker(url=url(), confirm_delivery=True)
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name=queue(), broker=broker)
def noop(task: int) -> None:
    note_run(task)


if __name__ == "__main__":
    produce_in_turn(noop.send, Order.read())
