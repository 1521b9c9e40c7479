"""What a fault is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

    from chaos.stage import Stage

RABBITMQ = ("rabbitmq-3.10", "rabbitmq-4")
KINDS = ("sqlite", *RABBITMQ)


class Fault(msgspec.Struct, frozen=True):
    """``play`` has the stage busy, breaks something, and returns when all is settled."""

    name: str
    what: str
    play: Callable[[Stage], None]
    brokers: tuple[str, ...] = KINDS
