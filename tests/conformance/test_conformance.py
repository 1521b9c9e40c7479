"""The shipped checks, on every broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from leveret.testing.conformance import CHECKS, Check

if TYPE_CHECKING:
    from tests.conftest import Place


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Check, any_place: Place) -> None:
    await check(any_place.open)
