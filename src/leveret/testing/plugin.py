"""The pytest plugin; pytest finds it by itself where Leveret is installed. Nothing else here imports pytest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from leveret.client import App, load_app
from leveret.errors import AppNotLoaded
from leveret.testing.application import AppUnderTest, under_test

if TYPE_CHECKING:
    from collections.abc import Iterator

INI = "leveret_app"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(INI, "the application that the fixture leveret_app puts under test: MODULE:APP", default="")


@pytest.fixture
def leveret_instance(pytestconfig: pytest.Config) -> App:
    """The application that ``leveret_app`` puts under test: the ini option's. Override it to give another."""
    reference = str(pytestconfig.getini(INI))
    if not reference:
        raise pytest.UsageError(
            'leveret_app: it is not known which application to put under test; set leveret_app = "tasks:app" '
            "in pytest's configuration, or override the fixture leveret_instance"
        )
    try:
        return load_app(reference)
    except AppNotLoaded as error:
        raise pytest.UsageError(f"leveret_app = {reference!r}: {error}") from error


@pytest.fixture
def leveret_app(leveret_instance: App) -> Iterator[AppUnderTest]:
    """The application on a fresh memory broker, for this test: run its tasks, see what was enqueued, break things."""
    with under_test(leveret_instance) as test:
        yield test
