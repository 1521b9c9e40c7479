"""What a worker works on, from the application's manifest and what it was told."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from leveret.brokers import connect
from leveret.errors import ConfigurationError
from leveret.model import Queue

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers import Broker, Consumer
    from leveret.executors import Manifest

log = logging.getLogger("leveret.worker")


def open_broker(url: str, keep: float) -> Broker:
    if url.startswith("memory:"):
        raise ConfigurationError(
            f"{url!r} is a store inside one process, where only that can put tasks; use an SQLite file, "
            "or give the worker the producer's broker: Worker(InProcessExecutor(app), broker=...)"
        )
    return connect(url, keep=keep)


def chosen(names: Sequence[str], manifest: Manifest) -> list[Queue]:
    known = {queue.name: queue for queue in manifest.queues}
    if not names and not known:
        raise ConfigurationError("the application has no tasks, so there is no queue to work on")
    return [known.get(name, Queue(name)) for name in dict.fromkeys(names or known)]


def warn_of_long_tasks(consumer: Consumer, manifest: Manifest) -> None:
    limit = consumer.hold_limit
    if limit is None:
        return
    minutes = limit.seconds / 60
    long = [name for name, timeout in manifest.timeouts.items() if timeout >= limit.seconds]
    if long:
        log.warning("%s may run %g minutes or longer: %s", ", ".join(sorted(long)), minutes, limit.remedy)
    else:
        log.info("a task that runs %g minutes or longer may run twice: %s", minutes, limit.remedy)
