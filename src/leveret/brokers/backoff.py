"""How long to wait before the next try."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def backoff(first: float = 0.1, longest: float = 3.0) -> Iterator[float]:
    """Pauses in seconds: doubling, with jitter over the upper half, so that many clients do not return as one."""
    for power in itertools.count():
        pause = min(longest, first * 2.0 ** min(power, 30))
        yield random.uniform(pause / 2, pause)  # noqa: S311 - not for secrets
