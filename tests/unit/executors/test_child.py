"""What a child process decides by itself."""

from __future__ import annotations

import pytest

from leveret.executors.child import longest_stack


@pytest.mark.parametrize(("suspects", "characters"), [(0, 8_192), (1, 8_192), (8, 8_192), (60, 1_092), (10_000, 256)])
def test_many_suspects_tell_less_each(suspects: int, characters: int) -> None:
    """Ten thousand may run in a child, and all are suspects when the loop is in an asyncio task of unknown origin."""
    assert longest_stack(suspects) == characters
