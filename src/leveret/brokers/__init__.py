"""What a broker does for Leveret, and how a URL becomes one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias
from urllib.parse import quote, unquote_to_bytes

import msgspec

from leveret.arguments import seconds
from leveret.errors import ConfigurationError, QueueInUse
from leveret.settings import Project, project
from leveret.status import KEEP

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from datetime import timedelta

    from leveret.brokers.following import Feed
    from leveret.inspection import Describe, WorkerReport
    from leveret.model import DeadLetter, Delivery, Envelope, Queue, QueueStats, Removed, Settlement
    from leveret.status import Mark, Status

DEFAULT_URL = "sqlite:///leveret.db"
#: How long `publish` may take before it raises (seconds).
DEFAULT_TIMEOUT = 30.0


#: A dead letter, as it is to be kept; None: not at all.
Select: TypeAlias = "Callable[[DeadLetter], DeadLetter | None]"


class HoldLimit(msgspec.Struct, frozen=True):
    """A broker takes a delivery back that is not settled in time, though its consumer lives."""

    #: As far as is known: the server may be set otherwise (seconds).
    seconds: float
    #: Who does so, and what to set there.
    remedy: str


class Consumer(Protocol):
    """Deliveries, in batches, until it is stopped. A broken connection is mended behind it.

    An empty batch says that ``paused`` has changed, or that there are new marks.
    """

    @property
    def hold_limit(self) -> HoldLimit | None:
        """How long a delivery may be held; None: as long as the consumer lives."""

    def __aiter__(self) -> AsyncIterator[Sequence[Delivery]]: ...

    @property
    def paused(self) -> frozenset[str]:
        """Which of its queues are paused: nothing is taken from them, and what was taken should be handed back."""

    def marks(self) -> Sequence[Mark]:
        """What was cancelled since this was asked last: tasks that it was dealt, and perhaps any other."""

    @property
    def connected(self) -> bool:
        """Whether tasks can come now; False while a lost connection is mended."""

    @property
    def losses(self) -> int:
        """How often its connection was lost since it began."""

    async def set_credit(self, credit: int, /) -> bool:
        """Hold at most so many unsettled deliveries of each queue from now on; False: it can't, all is as it was.

        Of what it holds in excess it gets no new ones, until that is settled or handed back.
        """

    async def stop(self) -> None:
        """Take no more. The iteration ends; what was delivered can still be settled until the context is left.

        Iterated again, it gives an empty batch when there are new marks, until the context is left.
        """


class Broker(Protocol):
    """A place where tasks are kept. Every method raises BrokerError's subclasses and nothing of its driver's."""

    @property
    def fixed_credit(self) -> bool:
        """Whether its consumers keep the credit that they begin with: their `set_credit` returns False."""

    async def declare(self, queues: Sequence[Queue], /) -> None:
        """Make or adopt the queues. Raises QueueMismatch or QueueNotFound; then none of these was changed."""

    async def publish(self, envelopes: Sequence[Envelope], /) -> None:
        """Store the tasks. Returned means durable; raises EnqueueError or BrokerUnavailable within its timeout."""

    def consume(
        self, queues: Sequence[Queue], /, *, credit: int | None, describe: Describe | None = None
    ) -> AbstractAsyncContextManager[Consumer]:
        """Take from the queues, at most ``credit`` unsettled deliveries of each (None: no limit).

        What is unsettled when the context is left goes back to its queue. ``describe``: called when somebody asks for
        the `workers`, from when it is iterated until the context is left; without it this one is not among them.
        """

    async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = (), /) -> None:
        """Record outcomes. Raises LeaseLost for deliveries that are no longer the caller's; the others are done.

        ``updates``: of tasks whose results are kept; durable before their deliveries are gone.
        """

    async def tell(self, updates: Sequence[Status], /) -> None:
        """Let those who follow know, soon. What a crash loses of it is told by the next update."""

    async def statuses(self, ids: Sequence[str], /) -> Sequence[Status]:
        """What is known of these tasks now; nothing of those that are not known, or not any more."""

    def follow(self, ids: Sequence[str], /) -> AbstractAsyncContextManager[Feed]:
        """News of these tasks: what is known now, then each change. A broken connection is mended behind it."""

    async def recent(self, limit: int, /) -> Sequence[Status]:
        """The tasks that changed last, the newest first: as many of the last hour's as are found without much reading.

        For an overview; of each what its latest updates tell, which may be less than `statuses` knows.
        """

    def watch(self) -> AbstractAsyncContextManager[AsyncIterator[Sequence[Status]]]:
        """Every update of every task whose results are kept, from now on; `leveret.status.newer` adds them up.

        Whoever is slow to read gets several updates of a task as one. A broken connection is mended behind it.
        """

    async def workers(self) -> Sequence[WorkerReport]:
        """What the living workers do now. They are asked; one that does not answer within a second is left out."""

    async def cancel(self, id_: str, /) -> Status | None:
        """Have a task not run, or end; what is known of it then. "cancelled": it never runs. Not final: it runs, or it
        waits where it cannot be reached, and whoever has it is told. None: nothing is known of it; told all the same.
        """

    async def stats(self, queues: Sequence[str] = (), /) -> Sequence[QueueStats]:
        """Counts of the queues named, and of all the others that the broker can list by itself."""

    async def ready(self, queues: Sequence[str], /) -> int:
        """How many tasks wait in these queues, all together, cheaply enough to ask every second.

        It may be a moment old, and a broker need not count more than some thousands of a queue.
        """

    async def dead_letters(self, queue: str, /, *, limit: int, select: Select | None = None) -> Sequence[DeadLetter]:
        """The oldest dead letters of a queue; they stay where they are. ``limit`` is how many are looked through.

        ``select``: called with each as it is read, perhaps more than once, and with some beyond the limit. What it
        returns is kept in its place, and nothing for None; so what is too large for all of them at once is not held.
        (RabbitMQ before 4.3 counts what is handed back, so there all that is looked through is held meanwhile.)
        """

    async def revive(self, queue: str, ids: Sequence[str], /) -> Sequence[str]:
        """Put dead letters back into their queue as first attempts, durably before they leave here; those found.

        Raises QueueNotFound.
        """

    async def discard(self, queue: str, ids: Sequence[str], /) -> Sequence[str]:
        """Delete dead letters for good; those found. Raises QueueNotFound."""

    async def pause(self, queue: str, /) -> None:
        """Have all workers start nothing more of a queue, those too that come later, until it is resumed.

        Durable when it returns. Tasks can still be enqueued. Raises QueueNotFound.
        """

    async def resume(self, queue: str, /) -> None:
        """End the pause of a queue; one that is not paused stays so. Raises QueueNotFound."""

    async def purge(self, queue: str, /, *, force: bool = False) -> Removed:
        """Delete all tasks of a queue that are ready or delayed; they never run. Dead letters stay.

        Raises QueueNotFound; QueueInUse while it has consumers or running tasks, unless ``force``: what runs is then
        finished.
        """

    async def delete(self, queue: str, /, *, force: bool = False) -> Removed:
        """Purge a queue, and delete its dead letters, its pause and itself. Raises as `purge` does.

        With ``force`` a queue that is in use stays, or is made again by its consumers.
        """

    def abandon(self) -> None:
        """Let go of what is open without a loop to close it on: the loop that it was opened on has ended."""

    async def close(self) -> None:
        """Give the connections back. What was published is safe; what was delivered and not settled goes back."""


def in_use(queue: str, *, consumers: int, running: int = 0) -> QueueInUse:
    """Why a queue is not purged or deleted."""
    return QueueInUse(
        f"queue {queue!r} is in use: {consumers} consumers, {running} running tasks; stop its workers first, or say "
        "--force (force=True)"
    )


def resolve_url(url: str | None, folder: Path | None = None) -> str:
    """The URL given, else $LEVERET_URL, else the project's (`leveret.settings`), else an SQLite file.

    See `absolute` for ``folder``. What pyproject.toml says is relative to that file, and so the same one in each folder
    of the project.
    """
    chosen = url or os.environ.get("LEVERET_URL")
    if chosen:
        return absolute(chosen, folder)
    found = _project(folder)
    if found.file is None or "url" not in found.values:
        return absolute(DEFAULT_URL, folder)
    if not isinstance(found.values["url"], str):
        raise ConfigurationError(f"{found.file}: url is {found.values['url']!r}; it must be text")
    return absolute(found.values["url"], found.file.parent)


def _project(folder: Path | None) -> Project:
    try:
        return project(folder or Path.cwd())
    except OSError:  # the working directory was deleted
        return Project()


#: What comes before the path of an SQLite URL.
_SQLITE = "sqlite:///"


def absolute(url: str, folder: Path | None = None) -> str:
    """The URL; a relative path of an SQLite file is made absolute, so that it names one file wherever the program goes.

    ``folder``: where it is relative to; else the working directory. A path that begins with ``~`` is in a home. A URL
    that names no file is left as it is, for `connect` to refuse. Raises ConfigurationError where there is no folder.
    """
    path = file_of(url)
    if path is None or path.is_absolute():
        return url
    try:
        is_in_a_home = unquote_to_bytes(url[len(_SQLITE) :]).startswith(b"~")
        whole = path.expanduser() if is_in_a_home else (folder or Path.cwd()) / path
    except (RuntimeError, OSError) as error:
        raise ConfigurationError(
            f"{censor(url)!r} is a relative path, and it cannot be told to what ({error}); write sqlite:////whole/path.db"
        ) from error
    return f"{_SQLITE}{quote(os.fsencode(whole))}"


def file_of(url: str) -> Path | None:
    """The file of an SQLite URL, as it stands there; None for all other URLs, and for one that names no file."""
    if url[: len(_SQLITE)].lower() != _SQLITE:
        return None
    path = url[len(_SQLITE) :]
    if not path or path.endswith("/") or "?" in path or "#" in path or path == MEMORY:
        return None
    return Path(os.fsdecode(unquote_to_bytes(path)))


#: What other programs call an SQLite database without a file.
MEMORY = ":memory:"


def location(url: str) -> str:
    """What a URL means, for people: the file, or the server without its password."""
    path = file_of(url)
    return censor(url) if path is None else str(path)


def connect(url: str, *, timeout: float | timedelta = DEFAULT_TIMEOUT, keep: float | timedelta = KEEP) -> Broker:
    """The broker for a URL: ``sqlite:///file.db``, ``amqp://...``, ``amqps://...`` or ``memory://``.

    ``timeout``: how long a publish may take; ``keep``: how long results are kept (seconds, or a timedelta).
    Nothing is opened before its first use. Raises ConfigurationError for a URL that no broker knows.
    """
    timeout, keep = seconds("timeout", timeout, above_zero=True), seconds("keep", keep, above_zero=True)
    scheme = url.partition(":")[0].lower()
    if scheme == "sqlite":
        from leveret.brokers.sqlite import SQLiteBroker

        return SQLiteBroker.from_url(url, timeout=timeout, keep=keep)
    if scheme in ("amqp", "amqps"):
        from leveret.brokers.rabbitmq import RabbitMQBroker

        return RabbitMQBroker(url, timeout=timeout, keep=keep)
    if scheme == "memory":
        from leveret.brokers.memory import MemoryBroker

        if url.partition(":")[2] not in ("", "//"):
            raise ConfigurationError(
                f"{censor(url)!r}: the memory broker takes neither a name nor parameters; write memory://"
            )
        return MemoryBroker(keep=keep)
    raise ConfigurationError(
        f"{censor(url)!r} is not a broker's URL: use sqlite:///file.db, amqp://user:password@host/vhost or memory://"
    )


#: Parameters of a URL that are shown in logs; any other may be a secret.
HARMLESS = frozenset(
    {
        *("heartbeat", "name", "timeout", "auth"),
        *("cafile", "capath", "cadata", "certfile", "keyfile", "no_verify_ssl"),
    }
)


def censor(url: str) -> str:
    """The URL without its password and without parameters that may be secret, for logs and errors."""
    # By hand: a password with a stray / ? # or [ in it confuses a URL parser, and would be shown.
    scheme, separator, rest = url.partition("://")
    credentials, at, address = ("", "", rest) if rest.startswith("/") else rest.rpartition("@")
    user, colon, _ = credentials.partition(":")
    if any(mark in user for mark in "/?#"):
        return f"{scheme}{separator}***"  # a secret with an @ of its own: nobody can tell where it ends
    address, mark, query = address.partition("?")
    pairs = [one.partition("=") for one in query.split("&")]
    shown = [
        f"{name}{equals}{value if name in HARMLESS else '***'}" if equals else "***" for name, equals, value in pairs
    ]
    return f"{scheme}{separator}{user}{':***' if colon else ''}{at}{address}{mark}{'&'.join(shown) if mark else ''}"
