"""A program that stands by for a table, changes it while it holds it, and says on standard output what it knows.

    python -m tests.support.table_holder URL NAME count|enqueue|surely|idle

`count`: adds one to the row `count`, again and again. `enqueue`: stores a task with each, whose id is the number.
`surely`: the same, and again what is uncertain.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time

from leveret.brokers.rabbitmq.amqp import Hosts, Message, Properties
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.coordination import FencedTable, Tenure
from leveret.brokers.rabbitmq.queues import Publisher, Requester
from leveret.errors import BrokerError

#: Between two changes (seconds).
PAUSE = 0.005
TASKS = "work"


def open_table(url: str, name: str, timeout: float = 20.0) -> tuple[FencedTable, Publisher]:
    """A table, and what is to be closed afterwards."""
    amqp.quieten_drivers()
    hosts = Hosts(url, timeout=timeout)
    publisher = Publisher(hosts, timeout=timeout)
    return FencedTable(hosts, publisher, Requester(publisher, timeout=timeout), name), publisher


def say(event: str, **more: object) -> None:
    print(json.dumps({"event": event, "at": time.monotonic(), **more}), flush=True)


async def count(tenure: Tenure, what: str) -> None:
    number = int(tenure.get("count") or b"0")
    if what == "surely" and "count" in tenure.uncertain:
        number -= 1
    while True:
        number += 1
        value = b"%d" % number
        if what != "count":
            message = Message(TASKS, b"{}", Properties(message_id=str(number), delivery_mode=2))
            await tenure.enqueue(message, "count", value)
        else:
            await tenure.change({"count": value})
        say("changed", value=number)
        await asyncio.sleep(PAUSE)


async def main(url: str, name: str, what: str) -> None:
    table, _ = open_table(url, name)
    say("standing by")
    async with table.tenures() as tenures:
        async for tenure in tenures:
            say(
                "held",
                rows=len(tenure.rows),
                count=int(tenure.get("count") or b"0"),
                uncertain=sorted(tenure.uncertain),
                epoch=tenure.epoch,
            )
            with contextlib.suppress(BrokerError):  # TenureLost is one
                await (count(tenure, what) if what != "idle" else tenure.over())
            say("lost", why=await tenure.over())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
