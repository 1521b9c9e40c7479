"""What a worker decides before its tasks run: from which broker and queues, how many at once, and which must not."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal, TypeAlias

from leveret.brokers import Broker, Consumer, connect
from leveret.errors import ConfigurationError
from leveret.model import DeadLettered, Delivery, Outcome, Queue, wrong_headers
from leveret.model.printable import in_line
from leveret.model.suggest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.executors import Manifest

log = logging.getLogger("leveret.worker")

Prefetch: TypeAlias = int | Literal["auto", "unlimited"]
#: AMQP carries it in 16 bits.
MOST_PREFETCH = 65_535
#: A task that came back this often without any outcome has probably taken its workers with it. RabbitMQ 4.0 to 4.2
#: drops a quorum queue's message after 20 returns ("poison message handling"), so it is parked before that.
MAX_RETURNS = 15


def first_credit(prefetch: object, slots: int) -> int | None:
    if prefetch == "unlimited":
        return None
    credit = slots if prefetch == "auto" else prefetch
    if not isinstance(credit, int) or not 1 <= credit <= MOST_PREFETCH:
        raise ConfigurationError(f"prefetch is {prefetch!r}; it must be 1 to {MOST_PREFETCH}, 'auto' or 'unlimited'")
    return credit


def connected(url: str, keep: float) -> Broker:
    if url.startswith("memory:"):
        raise ConfigurationError(
            f"{url!r} is a store inside one process, where only that can put tasks; use an SQLite file, "
            "or give the worker the producer's broker: Worker(InProcessExecutor(app), broker=...)"
        )
    return connect(url, keep=keep)


def select(names: Sequence[str], manifest: Manifest) -> list[Queue]:
    known = {queue.name: queue for queue in manifest.queues}
    if not manifest.tasks:
        raise ConfigurationError(
            "the application has no tasks, and would make a dead letter of each message that comes: "
            "import the modules that register them with @app.task where the application is made"
        )
    unknown = [name for name in dict.fromkeys(names) if name not in known]
    if unknown:
        log.warning(
            "no task of the application goes to %s by itself; its queues: %s%s",
            ", ".join(unknown),
            ", ".join(sorted(known)) or "none",
            "".join(did_you_mean(name, known) for name in unknown),
        )
    return [known.get(name, Queue(name)) for name in dict.fromkeys(names or known)]


def tell_of_tasks(manifest: Manifest) -> None:
    """What is run here, since another application's worker on the same queue would be sent these messages too."""
    log.info(
        "it runs %s; a message of its queues for any other task becomes a dead letter",
        in_line(", ".join(sorted(manifest.tasks))),
    )


def warn_of_long_tasks(consumer: Consumer, manifest: Manifest) -> None:
    limit = consumer.hold_limit
    if limit is None:
        return
    minutes = limit.seconds / 60
    long = [name for name, options in manifest.tasks.items() if (options.timeout or 0.0) >= limit.seconds]
    if long:
        log.warning("%s may run %g minutes or longer: %s", ", ".join(sorted(long)), minutes, limit.remedy)
    else:
        log.info("a task that runs %g minutes or longer may run twice: %s", minutes, limit.remedy)


def dead_already(delivery: Delivery, now: float) -> Outcome | None:
    """Why a delivery must not run at all, if so."""
    if delivery.defect:
        return DeadLettered(delivery.defect)
    wrong = wrong_headers(delivery.envelope.headers)
    if wrong:
        return DeadLettered(wrong)
    expires_at = delivery.envelope.expires_at
    if expires_at is not None and expires_at < now:
        return DeadLettered(f"it expired {now - expires_at:.1f} s before a worker could start it")
    if delivery.returns < MAX_RETURNS:
        return None
    return DeadLettered(
        f"it came back {delivery.returns} times without an outcome: it was being run, or waited, when its worker died "
        "or lost its connection; it may be what kills the workers"
    )
