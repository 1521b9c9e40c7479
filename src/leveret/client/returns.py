"""What a task returns, on its way to whoever asks for it: JSON, checked and restored by the return annotation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from leveret.client.payload import hint_of_result
from leveret.client.values import sent
from leveret.errors import NoResult, NotSerializable

if TYPE_CHECKING:
    from collections.abc import Callable

_encode = msgspec.json.Encoder().encode


class Returns:
    """The return value of one task's function."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self._name = name
        self._hint = hint_of_result(function)

    def encode(self, value: Any, limit: int) -> bytes:
        """As JSON. Raises NotSerializable or NoResult (it is over ``limit`` bytes), saying what to do."""
        body = _encode(sent(f"the result of task {self._name!r}", value, self._hint, "annotate what it returns with"))
        if len(body) > limit:
            raise NoResult(
                f"the result of task {self._name!r} is {len(body)} bytes, over the limit of {limit}; store it "
                "elsewhere and return a reference, or raise App(max_result_size=...)"
            )
        return body

    def decode(self, body: msgspec.Raw) -> Any:
        """Raises NotSerializable when it is not of the annotated type: another version of the task returned it."""
        try:
            return self._hint.restore(msgspec.json.decode(body))
        except Exception as error:  # noqa: BLE001 - a type's own constructor may raise anything
            raise NotSerializable(f"the result of task {self._name!r} does not fit its annotation: {error}") from None
