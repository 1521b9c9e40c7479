"""What the tests of the SQLite broker share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from leveret.brokers.sqlite.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def transactions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many times each transaction, one that was rolled back too, stored tasks or recorded outcomes."""
    sizes: list[int] = []
    count, end = 0, Store.end

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def count_one(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return operation(*args, **kwargs)

        return count_one

    def counted_end(self: Store, *, committed: bool) -> None:
        nonlocal count
        sizes.append(count)
        count = 0
        end(self, committed=committed)

    monkeypatch.setattr(Store, "insert", counted(Store.insert))
    monkeypatch.setattr(Store, "settle", counted(Store.settle))
    monkeypatch.setattr(Store, "end", counted_end)
    return sizes
