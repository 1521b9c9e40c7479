"""Models of pydantic as arguments, in containers, and as results."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from pydantic import BaseModel, Field, SecretStr

from leveret import App, InvalidArguments, NotSerializable
from leveret.testing import under_test


class Line(BaseModel):
    price: Decimal
    count: int = Field(gt=0, alias="n")


class Order(BaseModel):
    number: int
    at: datetime
    lines: list[Line] = []


class Login(BaseModel):
    password: SecretStr


ORDER = Order(number=5, at=datetime(2030, 1, 1, tzinfo=UTC), lines=[Line(price=Decimal("1.50"), n=2)])
app = App("memory://")
seen: list[Any] = []


@app.task
async def take(order: Order) -> Order:
    seen.append(order)
    return order


@app.task
async def take_all(orders: list[Order], by_name: dict[str, Order], perhaps: Order | None = None) -> None:
    seen.append((orders, by_name, perhaps))


@app.task
async def log_in(login: Login) -> None: ...


@app.task
async def take_anything(order) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    ...


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    seen.clear()


async def test_models_arrive_and_return() -> None:
    with under_test(app) as test:
        await take.enqueue(ORDER)
        await take_all.enqueue([ORDER], {"a": ORDER}, ORDER)
        await take_all.enqueue([], {})
        (run, *_) = await test.drain()
    assert seen == [ORDER, ([ORDER], {"a": ORDER}, ORDER), ([], {}, None)]
    assert run.result == ORDER


async def test_a_dict_is_validated_at_enqueue() -> None:
    with under_test(app) as test:
        given: Any = {"number": 5, "at": "2030-01-01T00:00:00Z", "lines": [{"price": "1.50", "n": 2}]}
        await take.enqueue(given)
        await test.drain()
        assert seen == [ORDER]
        given["lines"][0]["n"] = -77
        with pytest.raises(InvalidArguments, match=r"does not fit Order: lines\.0\.n: greater_than") as caught:
            await take.enqueue(given)
        assert "77" not in str(caught.value), "errors are logged, arguments are not"
        with pytest.raises(InvalidArguments, match="number: missing, at: missing"):
            await take.enqueue({})  # type: ignore[arg-type]


async def test_what_would_not_arrive_is_refused() -> None:
    with under_test(app):
        with pytest.raises(NotSerializable, match="is a Login"):
            await log_in.enqueue(Login(password=SecretStr("secret")))
        with pytest.raises(NotSerializable, match="annotate the parameter"):
            await take_anything.enqueue(ORDER)


def test_pydantic_is_the_applications_to_import() -> None:
    code = "import leveret.cli.worker, leveret.client, sys; assert 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class Event(BaseModel):
    """A union of models in a field of a model."""

    what: Order | Line


async def test_a_union_in_a_field_arrives() -> None:
    @app.task
    async def hear(event: Event) -> None:
        seen.append(event)

    event = Event(what=ORDER)
    with under_test(app) as test:
        await hear.enqueue(event)
        await test.drain()
    assert seen == [event]
