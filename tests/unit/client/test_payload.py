"""A call as a message body: what travels, what is refused before it is sent, and what is refused on arrival."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import math
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from leveret.client.payload import JSON, RAW, Signature
from leveret.errors import InvalidArguments, NotSerializable, UnreadableBody

if TYPE_CHECKING:
    from collections.abc import Callable

    from leveret import SomethingHidden  # type: ignore[attr-defined]


@dataclasses.dataclass
class Person:
    name: str
    born: dt.date


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


class Point(NamedTuple):
    x: int
    y: int


class Options(TypedDict):
    depth: int


class Size(msgspec.Struct):
    width: int


class Unknown:
    """msgspec knows nothing of it."""

    def __repr__(self) -> str:  # names a test case: without the address, which differs from process to process
        return "Unknown()"


class Text(str):
    __slots__ = ()


@dataclasses.dataclass
class Careful:
    """Its constructor's check fails with something else than ValueError."""

    rate: int

    def __post_init__(self) -> None:
        self.inverse = 1 / self.rate


def anything(value: Any) -> None: ...


def variadic(*items: int, **options: str) -> None: ...


def taking(annotation: Any) -> Callable[..., None]:
    """A task whose one parameter is annotated so."""

    def task(value: Any) -> None: ...

    task.__annotations__["value"] = annotation
    return task


def travel(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments on the other side."""
    signature = Signature(function, "task")
    body, content_type = signature.encode(args, kwargs)
    assert content_type == JSON
    return signature.decode(body)


def arrives(function: Callable[..., Any], value: Any) -> Any:
    """A single argument on the other side."""
    (arrived,), kwargs = travel(function, value)
    assert not kwargs
    return arrived


def encode(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bytes:
    return Signature(function, "task").encode(args, kwargs)[0]


def decode(function: Callable[..., Any], body: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return Signature(function, "task").decode(body)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


# What travels


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=15,
)


@settings(deadline=None)
@given(json_values)
@example(-0.0)
@example({"": [True, 1, 1.0, None]})
@example(2**64 - 1)
@example(5e-324)
@example("\x00\x7f\u2028\U0010ffff")
def test_any_json_value_arrives_as_it_was(value: Any) -> None:
    assert repr(arrives(anything, value)) == repr(value)


@settings(deadline=None)
@given(st.lists(json_values, max_size=3), st.dictionaries(st.text(min_size=1), json_values, max_size=3))
def test_any_number_of_arguments_under_any_name(args: list[Any], kwargs: dict[str, Any]) -> None:
    def task(*items: Any, **options: Any) -> None: ...

    assert travel(task, *args, **kwargs) == (tuple(args), kwargs)


NOW = dt.datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=dt.UTC)
SOMEONE = Person("Ada", dt.date(1815, 12, 10))


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Person, SOMEONE),
        (list[Person], [SOMEONE, SOMEONE]),
        (dict[str, Person], {"a": SOMEONE}),
        (Person | None, SOMEONE),
        (Person | None, None),
        (dt.datetime, NOW),
        (dt.datetime, NOW.replace(tzinfo=None)),
        (dt.datetime, NOW.astimezone(dt.timezone(dt.timedelta(hours=-3, minutes=-30)))),
        (dt.date | None, NOW.date()),
        (dt.timedelta, dt.timedelta(days=-1, microseconds=1)),
        (uuid.UUID, uuid.UUID(int=7)),
        (decimal.Decimal, decimal.Decimal("0.10")),
        (Colour, Colour.BLUE),
        (list[Colour], [Colour.BLUE, Colour.RED]),
        (Level, Level.LOW),
        (Size, Size(3)),
        (Point, Point(1, 2)),
        (Options, {"depth": 1}),
        (tuple[int, str], (1, "a")),
        (tuple[int, ...], (1, 2, 3)),
        (set[str], {"ab"}),
        (frozenset[int], frozenset({1, 2})),
        (bytes | None, b"\x00\xff"),
        (list[bytes], [b"", b"\xff"]),
        (dict[int, str], {1: "a"}),
        (dict[uuid.UUID, int], {uuid.UUID(int=7): 1}),
    ],
    ids=str,
)
def test_an_annotated_value_arrives_as_its_type(annotation: Any, value: Any) -> None:
    arrived = arrives(taking(annotation), value)
    assert arrived == value
    assert type(arrived) is type(value)


def test_parts_are_restored_too() -> None:
    (arrived,) = arrives(taking(list[Person]), [SOMEONE])
    assert isinstance(arrived, Person)
    assert type(arrived.born) is dt.date


def test_a_tuple_without_an_annotation_arrives_as_a_list() -> None:
    assert arrives(anything, (1, (2,))) == [1, [2]]


def test_an_integer_does_for_a_float() -> None:
    assert repr(arrives(taking(float), 1)) == "1.0"


def test_every_kind_of_parameter() -> None:
    def task(a: int, /, b: int = 2, *rest: dt.date, last: int, other: str = "x", **more: uuid.UUID) -> None: ...

    day, number = NOW.date(), uuid.UUID(int=1)
    assert travel(task, 1, last=9) == ((1,), {"last": 9})
    assert travel(task, 1, b=3, last=9) == ((1, 3), {"last": 9})
    assert travel(task, 1, 3, day, day, last=9, other="y", extra=number) == (
        (1, 3, day, day),
        {"last": 9, "other": "y", "extra": number},
    )


def test_a_default_is_left_to_the_worker() -> None:
    """A newer worker's default counts, so what was not given is not sent."""

    def task(a: int, b: int = 2) -> None: ...

    assert encode(task, 1) == b'{"args":[1],"kwargs":{}}'


def test_a_method_of_an_object_has_no_self() -> None:
    class Service:
        def task(self, value: dt.date) -> None: ...

    assert arrives(Service().task, NOW.date()) == NOW.date()


# What is refused before it is sent


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (NOW, "argument 'value' of task 'task' is a datetime, which JSON cannot carry"),
        ({1}, "is a set"),
        (b"x", "is a bytes"),
        (object(), "is a object"),
        (Unknown(), "is a Unknown"),
        (SOMEONE, "is a Person"),
        (Colour.RED, "is a Colour"),
        (1j, "is a complex"),
        ([1, {"a": (0, {2})}], "is a set (at [1]['a'][1])"),
        ({"a": {"b": NOW}}, "is a datetime (at ['a']['b'])"),
        (math.nan, "is nan, which JSON does not have"),
        ([math.inf], "is inf (at [0])"),
        ({"a": -math.inf}, "is -inf (at ['a'])"),
        (2**64, "is an integer beyond 64 bits"),
        ([-(2**63) - 1], "is an integer beyond 64 bits (at [0])"),
        ("\ud800", "holds a lone surrogate"),
        (["a", "\udcff"], "holds a lone surrogate (at [1])"),
        ({"\ud800": 1}, "has the key '\\ud800'"),
        ({1: 2}, "has the key 1, and JSON keys are text"),
        ({"a": {None: 1}}, "has the key None (at ['a'])"),
    ],
    ids=lambda item: item if isinstance(item, str) else type(item).__name__,
)
def test_what_json_cannot_carry_is_refused(value: Any, problem: str) -> None:
    with pytest.raises(NotSerializable) as caught:
        encode(anything, value)
    assert problem.encode(errors="backslashreplace") in str(caught.value).encode(errors="backslashreplace")
    assert "argument 'value' of task 'task'" in str(caught.value)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (float, math.nan),
        (list[float], [1.0, math.inf]),
        (float | None, math.nan),
        (str, "\ud800"),
        (list[str], ["\ud800"]),
        (int, 2**64),
        (list[int], [-(2**63) - 1]),
        (list[Any], [NOW]),
        (Unknown, Unknown()),
        (Person, Person("Ada", "not a date")),  # type: ignore[arg-type]
        (decimal.Decimal, decimal.Decimal("NaN")),
        (decimal.Decimal, decimal.Decimal("sNaN")),
        (str, b"x"),
    ],
    ids=repr,
)
def test_an_annotation_that_does_not_carry_the_value_is_no_help(annotation: Any, value: Any) -> None:
    with pytest.raises(NotSerializable, match="argument 'value' of task 'task'"):
        encode(taking(annotation), value)


def test_the_place_is_named_among_variable_arguments() -> None:
    def task(*items: Any, **options: Any) -> None: ...

    with pytest.raises(NotSerializable, match=r"argument 'items\[1\]' of task 'task' is a set"):
        encode(task, 1, {2})
    with pytest.raises(NotSerializable, match="argument 'colour' of task 'task' is a set"):
        encode(task, colour={2})


def test_a_keyword_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidArguments):
        encode(variadic, **{"\ud800": "x"})


@pytest.mark.parametrize("annotation", [Any, list[Any], list[Person]], ids=str)
def test_a_list_that_contains_itself_is_refused(annotation: Any) -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(InvalidArguments, match="argument 'value' of task 'task'"):
        encode(taking(annotation), value)


def test_a_dict_that_contains_itself_is_refused() -> None:
    value: dict[str, Any] = {}
    value["a"] = value
    with pytest.raises(InvalidArguments, match="argument 'value' of task 'task'"):
        encode(anything, value)


@pytest.mark.parametrize("annotation", [Any, list[Any], list[Person]], ids=str)
def test_a_list_nested_without_end_is_refused(annotation: Any) -> None:
    with pytest.raises(InvalidArguments, match="argument 'value' of task 'task'"):
        encode(taking(annotation), nested(100_000))


@pytest.mark.parametrize("depth", [10, 100, 300, 500, 900, 2_000])
def test_what_is_accepted_can_be_read(depth: int) -> None:
    """However deep: refused at once, or read on arrival."""
    with suppress(NotSerializable):
        assert arrives(anything, nested(depth)) == nested(depth)


@pytest.mark.parametrize("value", [Text("a"), [Text("a")], {"a": Text("b")}], ids=repr)
@pytest.mark.parametrize("annotation", [Any, str], ids=str)
def test_a_subclass_of_str_is_refused_or_arrives(annotation: Any, value: Any) -> None:
    with suppress(InvalidArguments):
        assert arrives(taking(annotation), value) == value


def wrong_calls(first: int, second: str = "", *, last: dt.date | None = None) -> None: ...


@pytest.mark.parametrize(
    ("args", "kwargs", "problem"),
    [
        ((), {}, "missing a required argument: 'first'; the signature is task(first"),
        ((1, "a", 3), {}, "too many positional arguments"),
        ((1,), {"frist": 1}, "got an unexpected keyword argument 'frist'"),
        ((1,), {"first": 1}, "multiple values for argument 'first'"),
        (("1",), {}, "argument 'first' of task 'task' does not fit int: Expected `int`, got `str`"),
        ((True,), {}, "argument 'first' of task 'task' does not fit int"),
        ((1.5,), {}, "argument 'first' of task 'task' does not fit int"),
        ((None,), {}, "argument 'first' of task 'task' does not fit int"),
        ((1, None), {}, "argument 'second' of task 'task' does not fit str"),
        ((1,), {"last": "tomorrow"}, "argument 'last' of task 'task' does not fit datetime.date | None"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(args: tuple[Any, ...], kwargs: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidArguments) as caught:
        encode(wrong_calls, *args, **kwargs)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("annotation", "value", "problem"),
    [
        (Person, {"name": "Ada"}, "missing required field `born`"),
        (Colour, "green", "does not fit Colour: no such value is allowed"),
        (list[int], [1, "2"], r"Expected `int`, got `str` - at `$[1]`"),
        (uuid.UUID, "7", "Invalid UUID"),
        (int | str, 1.5, "does not fit int | str"),
        (tuple[int, int], [1], "of length 2"),
    ],
    ids=str,
)
def test_json_that_does_not_fit_the_annotation_is_refused(annotation: Any, value: Any, problem: str) -> None:
    with pytest.raises(InvalidArguments) as caught:
        encode(taking(annotation), value)
    assert problem in str(caught.value)


def test_variable_arguments_are_checked() -> None:
    with pytest.raises(InvalidArguments, match=r"argument 'items\[1\]' of task 'task' does not fit int"):
        encode(variadic, 1, "2")
    with pytest.raises(InvalidArguments, match="argument 'colour' of task 'task' does not fit str"):
        encode(variadic, colour=1)


# Annotations that cannot be evaluated


def test_an_annotation_that_cannot_be_evaluated_is_not_checked() -> None:
    def task(value: SomethingHidden) -> None: ...

    assert arrives(task, [1, "a"]) == [1, "a"]
    with pytest.raises(NotSerializable):
        encode(task, NOW)


def test_an_annotation_that_cannot_be_evaluated_leaves_the_others_alone() -> None:
    def task(hidden: SomethingHidden, day: dt.date) -> None: ...

    (_, day), _ = travel(task, 1, NOW.date())
    assert day == NOW.date()


def test_an_annotation_that_msgspec_does_not_know_is_not_checked() -> None:
    assert arrives(taking(Unknown), {"a": 1}) == {"a": 1}
    assert arrives(taking(list[Unknown]), "text") == "text"


# Raw tasks


def raw(body: bytes) -> None: ...


@pytest.mark.parametrize("body", [b"", b"\x00\xff", b'{"args":[1]}'])
def test_a_raw_task_takes_the_body_as_it_is(body: bytes) -> None:
    signature = Signature(raw, "task")
    assert signature.raw
    assert signature.encode((body,), {}) == (body, RAW)
    assert signature.encode((), {"body": body}) == (body, RAW)
    assert signature.decode(body) == ((body,), {})


def test_a_raw_task_is_found_without_postponed_annotations() -> None:
    assert Signature(taking(bytes), "task").raw


@pytest.mark.parametrize("value", ["text", bytearray(b"x"), None, 1])
def test_a_raw_task_takes_bytes_only(value: Any) -> None:
    with pytest.raises(InvalidArguments, match="'task' takes the raw body: pass bytes"):
        encode(raw, value)


def test_a_raw_task_may_have_a_default() -> None:
    def task(body: bytes = b"nothing") -> None: ...

    assert encode(task) == b"nothing"


def test_a_raw_task_stays_raw_beside_an_annotation_that_cannot_be_evaluated() -> None:
    """What it returns has nothing to do with it; read as JSON, every message would be dead on arrival."""

    def task(body: bytes) -> SomethingHidden: ...

    assert Signature(task, "task").raw


def test_bytes_among_other_parameters_travel_in_json() -> None:
    def task(body: bytes, times: int) -> None: ...

    assert not Signature(task, "task").raw
    assert travel(task, b"\xff", 2) == ((b"\xff", 2), {})


def test_bytes_by_keyword_only_are_not_raw() -> None:
    def keyword(*, body: bytes) -> None: ...
    def many(*bodies: bytes) -> None: ...

    assert travel(keyword, body=b"\xff") == ((), {"body": b"\xff"})
    assert travel(many, b"\xff", b"") == ((b"\xff", b""), {})


# What is refused on arrival


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b'{"args":1}',
        b'{"args":{}}',
        b'{"kwargs":[]}',
        b'{"args":[NaN]}',
        b'{"args":[Infinity]}',
        b'{"args":[1e999]}',
        b'{"args":["\xff"]}',
        b'{"args":["\\ud800"]}',
        b'{"kwargs":{"\\udfff":1}}',
        b'{"args":[' + b"9" * 5_000 + b"]}",
        b'{"args":[' + b"[" * 100_000,
        b'{"args":[' + b"[" * 100_000 + b"]" * 100_000 + b"]}",
        b'{"args":[' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"]}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_a_body_that_is_no_call_is_unreadable(body: bytes) -> None:
    with pytest.raises(UnreadableBody, match="the body is not JSON of the form") as caught:
        decode(anything, body)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize(
    ("function", "body", "problem"),
    [
        (anything, b"{}", "missing a required argument: 'value'"),
        (anything, b'{"args":[1,2]}', "too many positional arguments"),
        (anything, b'{"args":[1],"kwargs":{"value":2}}', "multiple values"),
        (anything, b'{"kwargs":{"other":2}}', "missing a required argument"),
        (taking(int), b'{"args":["1"]}', "argument 'value' of task 'task' does not fit int"),
        (taking(Person), b'{"args":[{"name":"Ada"}]}', "argument 'value' of task 'task' does not fit Person"),
        (variadic, b'{"args":[1,null]}', "argument 'items[1]' of task 'task' does not fit int"),
        (variadic, b'{"kwargs":{"a":1}}', "argument 'a' of task 'task' does not fit str"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(function: Callable[..., Any], body: bytes, problem: str) -> None:
    with pytest.raises(InvalidArguments) as caught:
        decode(function, body)
    assert problem in str(caught.value)


def test_of_a_name_that_comes_twice_the_last_counts() -> None:
    assert decode(anything, b'{"kwargs":{"value":1,"value":2}}') == ((2,), {})
    assert decode(anything, b'{"args":[1],"args":[{"a":1,"a":2}]}') == (({"a": 2},), {})


def test_a_newer_producers_additions_are_ignored() -> None:
    assert decode(anything, b'{"args":[1],"meta":{"trace":"x"}}') == ((1,), {})


def test_a_huge_text_arrives() -> None:
    text = "ä" * 1_000_000
    assert arrives(anything, text) == text


def test_a_constructor_that_fails_is_an_argument_that_does_not_fit() -> None:
    """Whatever it raises: anything else would end the worker's slot instead of the task."""
    with pytest.raises(InvalidArguments, match="argument 'value' of task 'task'"):
        decode(taking(Careful), b'{"args":[{"rate":0}]}')


HOSTILE = [
    anything,
    variadic,
    wrong_calls,
    *map(
        taking,
        [
            int,
            float,
            str,
            bytes | None,
            dt.datetime,
            dt.timedelta,
            uuid.UUID,
            decimal.Decimal,
            Colour,
            Level,
            Person,
            list[Person],
            dict[str, int],
            set[str],
            tuple[int, str],
            Point,
            Options,
            Size,
        ],
    ),
]

any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
names = st.sampled_from(["args", "kwargs", "value", "first", "x"])
calls = st.dictionaries(names, any_json | st.lists(any_json, max_size=3) | st.dictionaries(names, any_json, max_size=3))
json_fragments = st.lists(
    st.sampled_from('{"args": "value": [ ] { } , " - 1 1e400 NaN \\ud800 \xff'.encode("latin-1").split()),
    max_size=25,
).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(HOSTILE), st.binary(max_size=200) | json_fragments | calls.map(msgspec.json.encode))
def test_no_body_raises_anything_else(function: Callable[..., Any], body: bytes) -> None:
    with suppress(UnreadableBody, InvalidArguments):
        decode(function, body)
