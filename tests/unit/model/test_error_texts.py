"""What Leveret's own error texts say: they are logged and shown where arguments are not."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Literal

import msgspec
import pytest

from leveret.client.payload import Signature
from leveret.errors import InvalidArguments, UnreadableBody

SECRET = "hunter2"


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Checked:
    card: str

    def __post_init__(self) -> None:
        raise ValueError(f"{self.card} is no card - at `$.{self.card}`")


@dataclasses.dataclass
class Fallible:
    card: str

    def __post_init__(self) -> None:
        raise LookupError(self.card)


class Strict(msgspec.Struct, forbid_unknown_fields=True, tag=True):
    card: int = 0


class Other(msgspec.Struct, tag=True):
    number: int = 0


@pytest.mark.parametrize(
    ("annotation", "value", "told"),
    [
        (Colour, SECRET, "does not fit Colour: no such value is allowed"),
        (dict[str, list[Colour]], {"a": [SECRET]}, "no such value is allowed - at `$[...][0]`"),
        (Literal["a"], SECRET, "no such value is allowed"),
        (Strict | Other, {"type": SECRET}, "no such value is allowed - at `$.type`"),
        (Strict | Other, {"type": "Strict", SECRET: 1}, "no such value is allowed"),
        (list[Checked], [{"card": SECRET}], "its type raised ValueError - at `$[0]`"),
        (Checked, {"card": SECRET}, "its type raised ValueError"),
        (Fallible, {"card": SECRET}, "its type raised LookupError"),
        (list[int], [SECRET], "Expected `int`, got `str` - at `$[0]`"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_not_quoted(annotation: Any, value: object, told: str) -> None:
    def task(secret: object) -> None: ...

    task.__annotations__["secret"] = annotation
    with pytest.raises(InvalidArguments) as caught:
        Signature(task, "task").decode(msgspec.json.encode({"args": [value]}))
    assert str(caught.value).endswith(told)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("body", [b"hunter2", b'"hunter2"', b'{"args": "hunter2"}', b"\xffhunter2", b'{"hunter2'])
def test_a_body_that_cannot_be_read_is_not_quoted(body: bytes) -> None:
    def task(secret: object) -> None: ...

    with pytest.raises(UnreadableBody, match=r'not JSON of the form \{"args"') as caught:
        Signature(task, "task").decode(body)
    assert SECRET not in str(caught.value)
