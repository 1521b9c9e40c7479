"""What a fault is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import msgspec

from chaos.stage import Stage

RABBITMQ = ("rabbitmq-3.10", "rabbitmq-4")
KINDS = ("sqlite", *RABBITMQ)


Play: TypeAlias = Callable[[Stage], None]


class Fault(msgspec.Struct, frozen=True):
    """``play`` has the stage busy, breaks something, and returns when all is settled."""

    name: str
    what: str
    play: Play
    brokers: tuple[str, ...] = KINDS
