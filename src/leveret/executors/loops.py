"""Which event loop a process runs on: asyncio's, or uvloop's, which comes with ``leveret[uvloop]``."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, get_args

from leveret.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")
#: auto: the one of the policy that the program has set, else asyncio's. Not uvloop wherever it is installed: that makes
#: no difference to a worker, and gives tasks a loop that nobody has chosen for them.
Loop: TypeAlias = Literal["auto", "asyncio", "uvloop"]


def check_loop(loop: Loop) -> None:
    """Raises ConfigurationError for a loop that is unknown, and for one that is not installed."""
    if loop not in get_args(Loop):
        raise ConfigurationError(f"loop is {loop!r}; it must be 'auto', 'asyncio' or 'uvloop'")
    if loop == "uvloop" and importlib.util.find_spec("uvloop") is None:
        raise ConfigurationError("uvloop is not installed: pip install 'leveret[uvloop]'")


def run(work: Coroutine[Any, Any, T], loop: Loop) -> T:
    """`asyncio.run` on that loop."""
    with asyncio.Runner(loop_factory=_factory(loop)) as runner:
        return runner.run(work)


def _factory(loop: Loop) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """None: what the policy makes."""
    if loop == "auto":
        return None
    if loop == "asyncio":
        if sys.version_info < (3, 14):
            asyncio.set_event_loop_policy(
                None
            )  # subprocesses are awaited by the policy's watcher, and uvloop's has none
        return asyncio.SelectorEventLoop
    import uvloop

    return uvloop.new_event_loop
