"""The entries of the claims log, and what they add up to: who has which key. Values and pure rules, no I/O.

Every program that reads the log applies the same entries in the same order, so all come to the same holders. Nothing
here goes by a clock of the reader's.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from leveret.model import MAX_UNIQUE_KEY, Envelope, decoded, is_name
from leveret.model.names import fits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

VERSION = 1


class NewClaim(msgspec.Struct, frozen=True, array_like=True):
    """Somebody is about to store a task with a key, if no other has it."""

    key: str
    id: str
    queue: str
    #: The key is free from then on, whatever was lost (Unix time).
    until: float
    #: The whole task, for whoever stores it when the claimer has died. Others do not decode it.
    task: msgspec.Raw = msgspec.Raw()
    #: Only ``until`` ends it, not the task.
    is_kept: bool = False


class Adopted(msgspec.Struct, frozen=True, array_like=True):
    """A claim whose task may not have been stored is another program's to complete, if it is still ``owner``'s."""

    key: str
    id: str
    owner: str


class Emptied(msgspec.Struct, frozen=True, array_like=True):
    """What waited in a queue was deleted; not the tasks that ran."""

    queue: str
    running: list[str] = []


class Row(msgspec.Struct, frozen=True, array_like=True):
    """A claim in a snapshot; without its task if that is stored."""

    owner: str
    claim: NewClaim


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """A part of what all entries up to an offset add up to: who begins to read behind it needs no older ones."""

    upto: int
    #: Of the parts that belong together.
    token: str
    part: int
    parts: int
    rows: list[Row]


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message of the log. Readers ignore a newer version, and members that they do not know."""

    #: Always written, though it is the default: readers in other languages go by it.
    v: int = msgspec.field(default_factory=lambda: VERSION)
    #: The program that wrote it, and its number there: who reads its own back knows what has come of it.
    by: str = ""
    n: int = 0
    #: When it was written (Unix time).
    at: float = 0.0
    #: Keys that are free, with the ids of the tasks that had them.
    freed: list[tuple[str, str]] = []
    #: Tasks that were cancelled before they ran.
    cancelled: list[str] = []
    emptied: list[Emptied] = []
    claims: list[NewClaim] = []
    #: Claims whose tasks are stored.
    stored: list[tuple[str, str]] = []
    adopted: list[Adopted] = []
    #: Who begins to read can begin at that offset: a snapshot of what was before comes behind it. 0: not known.
    base: int = 0
    snapshot: Snapshot | None = None

    @property
    def weight(self) -> int:
        """How much it says."""
        return 1 + len(self.freed) + len(self.claims) + len(self.stored)


encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Entry).decode
_decode_task = msgspec.json.Decoder(Envelope).decode


def entry_of(body: bytes) -> Entry | None:
    """None for what makes no sense here: the log is open to others."""
    entry = decoded(_decode, body)
    if entry is None or entry.v != VERSION:
        return None
    rows = [] if entry.snapshot is None else entry.snapshot.rows
    claims = [*entry.claims, *(row.claim for row in rows)] if rows else entry.claims
    if all(is_name(one.id) and is_name(one.queue) and fits(one.key, MAX_UNIQUE_KEY) for one in claims):
        return entry
    return None


_NO_TASK = msgspec.Raw(b"null")
_NO_TASKS = (_NO_TASK, msgspec.Raw())


class Claim(msgspec.Struct, gc=False):
    """A key that is taken. A program may hold a hundred thousand of these."""

    #: As a number, if it is one of Leveret's: that takes half as much memory.
    _id: int | str
    queue: str
    until: float
    #: The program that stores its task, or has stored it.
    owner: str
    is_kept: bool = False

    @classmethod
    def of(cls, new: NewClaim, owner: str) -> Claim:
        return cls(_packed(new.id), sys.intern(new.queue), new.until, sys.intern(owner), new.is_kept)

    @property
    def id(self) -> str:
        return self._id if isinstance(self._id, str) else _ID % self._id


_ID = "%032x"


def _packed(id_: str) -> int | str:
    with suppress(ValueError):
        if _ID % (number := int(id_, 16)) == id_:
            return number
    return id_


class Pending(msgspec.Struct, gc=False):
    """A claim whose task is not known to be stored."""

    claim: Claim
    task: bytes
    #: When the reader got to know that it is to be stored (the reader's loop's time).
    since: float

    def envelope(self) -> Envelope | None:
        """The task; None: what is there is no task of that claim."""
        found = decoded(_decode_task, self.task)
        claim = self.claim
        return found if found is not None and (found.id, found.queue) == (claim.id, claim.queue) else None


class Holders:
    """Who has which key."""

    def __init__(self) -> None:
        self._claims: dict[str, Claim] = {}
        self._pending: dict[str, Pending] = {}

    def __len__(self) -> int:
        return len(self._claims)

    def get(self, key: str) -> Claim | None:
        return self._claims.get(key)

    def pending(self, key: str) -> Pending | None:
        return self._pending.get(key)

    def items(self) -> Iterator[tuple[str, Claim]]:
        return iter(self._claims.items())

    def rows(self, after: float) -> Iterator[Row]:
        """For a snapshot: those that are not void before that time (Unix time)."""
        for key, one in self._claims.items():
            if one.until < after:
                continue
            waiting = self._pending.get(key)
            task = _NO_TASK if waiting is None else msgspec.Raw(waiting.task)
            yield Row(one.owner, NewClaim(key, one.id, one.queue, one.until, task, one.is_kept))

    def overdue(self, before: float) -> list[tuple[str, Pending]]:
        """The claims that have waited for their tasks since before that time."""
        return [(key, pending) for key, pending in self._pending.items() if pending.since < before]

    def apply(self, entry: Entry, now: float) -> None:
        """``now``: the reader's loop's time."""
        for key, id_ in entry.freed:
            self._free(key, id_)
        if entry.cancelled:
            self._free_where(lambda claim: claim.id in entry.cancelled)
        for emptied in entry.emptied:
            self._free_where(lambda claim, e=emptied: claim.queue == e.queue and claim.id not in e.running)  # type: ignore[misc]
        for new in entry.claims:
            self._claim(new, entry, now)
        for key, id_ in entry.stored:
            held = self._claims.get(key)
            if held is not None and held.id == id_:
                self._pending.pop(key, None)
        for one in entry.adopted:
            pending = self._pending.get(one.key)
            if pending is not None and (pending.claim.id, pending.claim.owner) == (one.id, one.owner):
                pending.claim.owner, pending.since = entry.by, now

    def restore(self, rows: Iterable[Row], now: float) -> None:
        """Begin with what a snapshot says."""
        for row in rows:
            self._put(row.claim, row.owner, now)

    def _claim(self, new: NewClaim, entry: Entry, now: float) -> None:
        held = self._claims.get(new.key)
        if held is None or (held.id != new.id and held.until <= entry.at):
            self._put(new, entry.by, now)

    def _put(self, new: NewClaim, owner: str, now: float) -> None:
        claim = self._claims[new.key] = Claim.of(new, owner)
        self._pending.pop(new.key, None)
        if new.task not in _NO_TASKS:
            self._pending[new.key] = Pending(claim, bytes(new.task), now)

    def _free(self, key: str, id_: str) -> None:
        held = self._claims.get(key)
        if held is not None and id_ in (held.id, ""):
            del self._claims[key]
            self._pending.pop(key, None)

    def _free_where(self, is_meant: Callable[[Claim], bool]) -> None:
        for key, claim in [
            (key, claim) for key, claim in self._claims.items() if not claim.is_kept and is_meant(claim)
        ]:
            self._free(key, claim.id)


class History:
    """What one reader has read. ``applied``: called with each entry when it is part of what the holders say."""

    def __init__(self, applied: Callable[[Entry], None]) -> None:
        self._applied = applied
        self.begin(0)

    def begin(self, base: int) -> None:
        """Read anew: from an offset behind which a snapshot comes, or, with 0, from the first entry."""
        self.holders = Holders()
        #: Where who comes later can begin, and about how much there is to read from there.
        self.base = base
        self.weight = 0
        #: What came before the snapshot did; None: nothing is waited for.
        self._held_back: list[tuple[int, Entry]] | None = [] if base else None
        #: Snapshots of which only some parts have come: which, and what they say.
        self._begun: dict[str, tuple[set[int], Holders]] = {}

    @property
    def is_complete(self) -> bool:
        """Whether the holders are known."""
        return self._held_back is None

    def read(self, offset: int, entry: Entry, now: float, size: int = 0) -> None:
        """``now``: the reader's loop's time. ``size``: of the entry (bytes)."""
        self.weight += entry.weight + size // 1024
        if self._held_back is None:
            self._apply(entry, now)
        else:
            # Its rows are taken now: those of all parts would be more than what they come to.
            self._held_back.append((offset, msgspec.structs.replace(entry, snapshot=None)))
        if entry.snapshot is not None:
            self._take(entry.snapshot, now)

    def _take(self, part: Snapshot, now: float) -> None:
        parts, holders = self._begun.setdefault(part.token, (set(), Holders()))
        parts.add(part.part)
        if self._held_back is not None:
            holders.restore(part.rows, now)
        if len(parts) < part.parts:
            return
        del self._begun[part.token]
        if self._held_back is None:
            if part.upto >= self.base:
                self.base, self.weight = part.upto + 1, 0
        elif part.upto == self.base - 1:
            held_back, self._held_back = self._held_back, None
            self.holders = holders
            self._begun = {token: (parts, Holders()) for token, (parts, _) in self._begun.items()}
            for offset, entry in held_back:
                if offset > part.upto:
                    self._apply(entry, now)

    def _apply(self, entry: Entry, now: float) -> None:
        self.holders.apply(entry, now)
        self._applied(entry)
