"""Huey on SQLite: write-ahead log, fsync at each commit, no results."""

from __future__ import annotations

from huey import SqliteHuey

from benchmarks.peers.ledger import note_run
from benchmarks.peers.producing import Order, produce_in_turn, url

huey = SqliteHuey(filename=url().removeprefix("sqlite:///"), fsync=True, results=False)


@huey.task()
def noop(task: int) -> None:
    note_run(task)


if __name__ == "__main__":
    # By its module's name, as the worker imports it: Huey sends that name along.
    from benchmarks.peers import huey_app

    produce_in_turn(huey_app.noop, Order.read())
