"""What a worker knows of its application, which its child processes alone import."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from leveret.brokers import Broker, Consumer, censor, connect
from leveret.errors import ConfigurationError
from leveret.executors import Manifest
from leveret.model import Declare, DeclareLimits, Queue, RetryPolicy
from leveret.model.printable import in_line
from leveret.model.suggest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from leveret.model import Envelope

log = logging.getLogger("leveret.worker")

_UNKNOWN = Manifest("", [], {}, {}, 0.0)


class Application:
    """Looks up what a task's options are, in the manifest that was loaded last; nothing is known before the first."""

    def __init__(self) -> None:
        self._at_start = _UNKNOWN
        self._learn(_UNKNOWN)

    def start(self, manifest: Manifest) -> None:
        self._at_start = manifest
        self._learn(manifest)

    def adopt(self, manifest: Manifest) -> None:
        """Take the manifest of an application that was loaded again; its queues and URL stay those of the start."""
        self._learn(manifest)
        new = {queue.name for queue in manifest.queues} - {queue.name for queue in self._at_start.queues}
        if new or manifest.url != self._at_start.url:
            log.warning("the application has other queues or another URL now: start this worker again for those")

    def _learn(self, manifest: Manifest) -> None:
        self._now = manifest
        #: The schedules of its code.
        self.declaration = Declare(manifest.origin, time.time(), manifest.schedules)
        #: Its limits.
        self.limits = DeclareLimits(time.time(), manifest.limits, manifest.limited_queues)
        self._at_most_once = frozenset(
            name for name, options in manifest.tasks.items() if options.acknowledge == "before"
        )
        self._silent = frozenset(name for name, options in manifest.tasks.items() if not options.store_result)

    def name(self, envelope: Envelope) -> str | None:
        """The task that a message is for; None: it names none, and its queue has no default task."""
        return self._now.task_of(envelope)

    def registered(self, envelope: Envelope) -> str | None:
        """The same if the application has that task."""
        name = self.name(envelope)
        return name if name in self._now.tasks else None

    def is_at_most_once(self, envelope: Envelope) -> bool:
        """Whether it is acknowledged before it runs."""
        return bool(self._at_most_once) and self.name(envelope) in self._at_most_once

    def is_silent(self, envelope: Envelope) -> bool:
        """Whether no result and no status of it is kept."""
        if envelope.headers:
            return not self._now.options_of(envelope).store_result
        return (envelope.task or self.name(envelope)) in self._silent

    def policy(self, envelope: Envelope) -> RetryPolicy:
        return self._now.options_of(envelope).policy

    def tasks(self, queues: Collection[str]) -> Sequence[tuple[str, str]]:
        """The names and queues of the tasks that go to these queues."""
        return [(task, options.queue) for task, options in self._now.tasks.items() if options.queue in queues]


def connected(url: str, keep: float) -> Broker:
    broker = connect(url, keep=keep)
    if not broker.capabilities.shared:
        raise ConfigurationError(
            f"{censor(url)!r} is a store inside one process, where only that can put tasks; use an SQLite file, "
            "or give the worker the producer's broker: Worker(InProcessExecutor(app), broker=...)"
        )
    return broker


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


def log_tasks(manifest: Manifest) -> None:
    """Another application's worker on the same queue would be sent these messages too."""
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
