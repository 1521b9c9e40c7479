"""Tasks whose exceptions, results, progress and retry rules are objects that do what none should."""

from __future__ import annotations

import asyncio
import os
from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NoReturn

from leveret import App, Dead, Retry, current_task
from leveret.model import DEFAULT_QUEUE

if TYPE_CHECKING:
    from collections.abc import Callable

app = App()


class DelayRaises(Retry):
    @property
    def delay(self) -> float:
        raise SystemExit("no delay")

    @delay.setter
    def delay(self, value: float) -> None: ...


class NoWords(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt("no words")

    __repr__ = __str__


class Deep(Exception):
    def __str__(self) -> str:
        return str(self)


class NotText(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]  # noqa: PLE0307 - the mistake under test


class NoTraceback(Exception):
    @property
    def __traceback__(self) -> Any:
        raise RuntimeError("no traceback")

    @__traceback__.setter
    def __traceback__(self, value: object) -> None: ...


class NoCause(Exception):
    @property
    def __cause__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no cause")


class OnceLogger(Exception):
    @property
    def __notes__(self) -> Any:  # type: ignore[override]
        raise GeneratorExit


class Rigid(type):
    def __instancecheck__(cls, instance: object) -> bool:
        raise RuntimeError("do not ask")

    __subclasscheck__ = __instancecheck__


class NeverAsk(Exception, metaclass=Rigid):
    pass


class Masked(Exception):
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise RuntimeError("no class")


class SlyText(str):
    __slots__ = ()

    def encode(self, *_: object, **__: object) -> Any:
        return self

    def strip(self, *_: object) -> Any:
        return None


class SlyWords(Exception):
    def __str__(self) -> str:
        return SlyText("sly \udcff")


class EndlessGroup(ExceptionGroup[Exception]):
    @property
    def exceptions(self) -> Any:
        return (self,)


class Farewell:
    def __del__(self) -> None:
        raise RuntimeError("not without me")


class Unequal(str):
    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        raise SystemExit(3)

    __hash__ = None  # type: ignore[assignment]


class Lazy(dict[str, Any]):
    def items(self) -> Any:
        raise KeyboardInterrupt

    def __iter__(self) -> Any:
        raise KeyboardInterrupt


def retry(delay: object) -> Callable[[], NoReturn]:
    class Later(Retry):
        pass

    Later.delay = delay  # type: ignore[assignment]

    def task() -> NoReturn:
        error = Later()
        error.__dict__.clear()
        raise error

    return task


def raises(make: Callable[[], BaseException]) -> Callable[[], NoReturn]:
    def task() -> NoReturn:
        raise make()

    return task


def later(make: Callable[[], BaseException]) -> Callable[[], Any]:
    async def task() -> NoReturn:
        await asyncio.sleep(0)
        raise make()

    return task


def nested(depth: int) -> Exception:
    error: Exception = ValueError("deepest")
    for _ in range(depth):
        error = ExceptionGroup("one more", [error])
    return error


#: Each of them fails: it is dead, or is tried again.
FAILING: dict[str, Callable[[], Any]] = {
    "delay is a timedelta": retry(timedelta(hours=1)),
    "delay is None": retry(None),
    "delay is text": retry("soon"),
    "delay is NaN": retry(float("nan")),
    "delay is endless": retry(float("inf")),
    "delay is negative": retry(-5),
    "delay is a huge integer": retry(10**400),
    "delay is a signaling NaN": retry(Decimal("sNaN")),
    "delay is a list": retry([5]),
    "delay raises": raises(DelayRaises),
    "no words": raises(NoWords),
    "no words, dead": raises(lambda: type("DeadWithoutWords", (Dead, NoWords), {})()),
    "no end of words": raises(Deep),
    "words are a number": raises(NotText),
    "words are a sly text": raises(SlyWords),
    "no traceback": raises(NoTraceback),
    "no cause": raises(NoCause),
    "notes raise": raises(OnceLogger),
    "no class": raises(Masked),
    "a class that is not to be asked": raises(NeverAsk),
    "a group of itself": raises(lambda: EndlessGroup("again", [ValueError("inner")])),
    "a group in groups": raises(lambda: nested(5_000)),
    "a group of a retry without a delay": raises(lambda: ExceptionGroup("several", [DelayRaises(), NoWords()])),
    "on the loop: no words": later(NoWords),
    "on the loop: delay raises": later(DelayRaises),
    "on the loop: ends the process": later(lambda: SystemExit(3)),
    "on the loop: a generator's end": later(GeneratorExit),
    "in a thread: a generator's end": raises(StopAsyncIteration),
    "in a thread: stop": raises(lambda: type("Stop", (StopIteration,), {})()),
    "leaves something behind": raises(lambda: ValueError(Farewell())),
}


def give(value: Callable[[], object]) -> Callable[[], object]:
    def task() -> object:
        return value()

    return task


def tell(*values: object) -> Callable[[], None]:
    def task() -> None:
        current_task().progress(*values)  # type: ignore[arg-type]

    return task


class SlyFloat(float):
    def __float__(self) -> float:
        raise SystemExit(4)


#: Each of them succeeds, or has a result that cannot be kept.
ENDING: dict[str, Callable[[], Any]] = {
    "a result that compares with an exit": give(lambda: Unequal("x")),
    "a result that cannot be gone through": give(lambda: Lazy(a=1)),
    "a result that is a sly text": give(lambda: [SlyText("x")]),
    "a result that says goodbye": give(Farewell),
    "progress with a sly note": tell(1, 2, SlyText("note \udcff")),
}
#: Each of them fails in what it says of itself.
MISTAKEN: dict[str, Callable[[], Any]] = {
    "progress that is no number": tell("x"),
    "progress that ends the process": tell(SlyFloat(1.0)),
    "progress beyond numbers": tell(10**400),
}


def decide(value: object) -> Callable[[int, BaseException], Any]:
    def rule(attempt: int, error: BaseException) -> Any:
        del attempt, error
        if isinstance(value, BaseException):
            raise value
        return value

    return rule


#: What a retry rule returns, or raises.
RULES: dict[str, object] = {
    "a timedelta": timedelta(hours=1),
    "text": "soon",
    "NaN": float("nan"),
    "a signaling NaN": Decimal("sNaN"),
    "True": True,
    "a list": [],
    "an exit": SystemExit(5),
    "a generator's end": GeneratorExit(),
    "an exception without words": NoWords(),
}


def register(to: App, queue: str = DEFAULT_QUEUE) -> list[str]:
    """Have an application do all of this; the names of its tasks."""
    for name, function in (FAILING | ENDING | MISTAKEN).items():
        to.task(name=name, queue=queue, max_attempts=2, backoff=3600)(function)
    for name, value in RULES.items():
        to.task(name=f"a rule says {name}", queue=queue, retry=decide(value))(raises(lambda: ValueError("ruled")))
    never: dict[str, dict[str, Any]] = {
        "retry_on": {"retry_on": NeverAsk},
        "give_up_on": {"give_up_on": [NeverAsk]},
        "give_up_on with others": {"give_up_on": {ValueError, NeverAsk}},
    }
    for name, options in never.items():
        to.task(name=f"never ask: {name}", queue=queue, **options)(raises(lambda: KeyError("x")))
    return [task.name for task in to.tasks]


NAMES = register(app)


@app.task
def neighbour() -> int:
    """What still runs in the same child."""
    return os.getpid()
