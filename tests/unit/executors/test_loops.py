"""Which event loop a process runs on."""

from __future__ import annotations

import asyncio
import importlib.util
import warnings
from typing import TYPE_CHECKING, Any, cast

import pytest
import uvloop

from leveret.errors import ConfigurationError
from leveret.executors.loops import Loop, check_loop, run

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.filterwarnings("ignore:.*event_loop_policy:DeprecationWarning")


async def the_loop() -> str:
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]


@pytest.fixture
def policy() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        yield
        asyncio.set_event_loop_policy(None)


@pytest.mark.parametrize(("loop", "found"), [("auto", "asyncio"), ("asyncio", "asyncio"), ("uvloop", "uvloop")])
def test_a_loop(loop: Loop, found: str) -> None:
    assert run(the_loop(), loop) == found


@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize(("loop", "found"), [("auto", "uvloop"), ("asyncio", "asyncio"), ("uvloop", "uvloop")])
def test_a_loop_beside_a_policy(loop: Loop, found: str) -> None:
    assert run(the_loop(), loop) == found


def test_a_loop_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(*_: Any) -> None: ...

    monkeypatch.setattr(importlib.util, "find_spec", find)
    check_loop("auto")
    with pytest.raises(ConfigurationError, match=r"pip install 'leveret\[uvloop\]'"):
        check_loop("uvloop")


def test_a_loop_that_nobody_knows() -> None:
    with pytest.raises(ConfigurationError, match=r"loop is 'trio'; it must be 'auto', 'asyncio' or 'uvloop'"):
        check_loop(cast("Loop", "trio"))
