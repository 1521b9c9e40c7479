"""What arrives equal is accepted: times in zones, subclasses of plain types, enums of any values, any records."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import uuid
from typing import TYPE_CHECKING, Annotated, Any, Generic, NamedTuple, NotRequired, TypedDict, TypeVar
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
import pytest
from markupsafe import Markup

from leveret.client.payload import Returns, Signature
from leveret.errors import InvalidArguments, NotSerializable

if TYPE_CHECKING:
    from leveret import Absent  # type: ignore[attr-defined]

NOON = dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC)
BERLIN = ZoneInfo("Europe/Berlin")
ZONED = {
    "summer": dt.datetime(2026, 7, 1, 12, tzinfo=BERLIN),
    "the repeated hour": dt.datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN),
    "the repeated hour again": dt.datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=1),
    "the missing hour": dt.datetime(2026, 3, 29, 2, 30, tzinfo=BERLIN),
    "the missing hour, seen from after": dt.datetime(2026, 3, 29, 2, 30, tzinfo=BERLIN, fold=1),
    "half an hour repeated": dt.datetime(2026, 4, 5, 1, 45, tzinfo=ZoneInfo("Australia/Lord_Howe"), fold=1),
    "seconds in the offset": dt.datetime(1880, 1, 1, 12, tzinfo=BERLIN),
    "microseconds in the offset": dt.datetime(2020, 1, 1, tzinfo=dt.timezone(dt.timedelta(seconds=90, microseconds=5))),
    "UTC": dt.datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=dt.UTC),
}


def task_of(annotation: Any) -> Any:
    def task(value: Any) -> Any: ...

    task.__annotations__.update({"value": annotation, "return": annotation})
    return task


def arrives(annotation: Any, value: Any) -> Any:
    """As an argument."""
    signature = Signature(task_of(annotation), "task")
    (arrived,), _ = signature.decode(signature.encode((value,), {})[0])
    return arrived


def returned(annotation: Any, value: Any) -> Any:
    """As a result."""
    returns = Returns(task_of(annotation), "task")
    return returns.decode(msgspec.Raw(returns.encode(value, 1_000_000)))


either_way = pytest.mark.parametrize("travel", [arrives, returned])


@dataclasses.dataclass
class Meeting:
    at: dt.datetime
    also: list[dt.datetime | None] = dataclasses.field(default_factory=list)


class Slot(msgspec.Struct):
    at: dt.datetime


class Pair(NamedTuple):
    begin: dt.datetime
    end: dt.datetime


class Plan(TypedDict):
    at: dt.datetime


# Times in zones


@either_way
@pytest.mark.parametrize("name", ZONED)
def test_a_zoned_time_arrives_as_the_same_instant(travel: Any, name: str) -> None:
    moment = ZONED[name]
    unix = moment.timestamp()
    assert travel(dt.datetime, moment).timestamp() == unix
    assert travel(dt.datetime | None, moment).timestamp() == unix
    assert travel(list[dt.datetime], [moment])[0].timestamp() == unix
    assert travel(tuple[dt.datetime, int], (moment, 1))[0].timestamp() == unix
    assert travel(dict[str, dt.datetime], {"at": moment})["at"].timestamp() == unix
    assert {one.timestamp() for one in travel(set[dt.datetime], {moment})} == {unix}
    meeting = travel(Meeting, Meeting(moment, [None, moment]))
    assert (meeting.at.timestamp(), meeting.also[1].timestamp()) == (unix, unix)
    assert travel(Slot, Slot(moment)).at.timestamp() == unix
    assert travel(Pair, Pair(moment, moment)).end.timestamp() == unix
    assert travel(Plan, {"at": moment})["at"].timestamp() == unix


def test_its_zone_arrives_as_the_offset_that_it_had() -> None:
    arrived = arrives(dt.datetime, ZONED["the repeated hour again"])
    assert (arrived.isoformat(), arrived.tzinfo) == (
        "2026-10-25T02:30:00+01:00",
        dt.timezone(dt.timedelta(hours=1)),
    )


def test_a_naive_time_stays_naive_and_is_no_zoned_one() -> None:
    naive = ZONED["the repeated hour again"].replace(tzinfo=None)
    assert arrives(dt.datetime, naive) == naive
    assert arrives(dt.datetime, naive).tzinfo is None
    with pytest.raises(NotSerializable):
        arrives(Any, naive)


# Subclasses of what JSON has


class Text(str):
    __slots__ = ()


class Sly(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "something else"


class Number(int):
    pass


class Real(float):
    pass


class Moment(dt.datetime):
    pass


class Day(dt.date):
    pass


class Money(decimal.Decimal):
    pass


class Octets(bytes):
    pass


class Identity(uuid.UUID):
    pass


@either_way
@pytest.mark.parametrize(
    ("annotation", "value", "plain"),
    [
        (str, Text("a"), "a"),
        (str, Markup("<b>"), "<b>"),
        (str, Sly("a"), "a"),
        (list[str], [Text("a"), "b"], ["a", "b"]),
        (dict[str, str], {Text("k"): Text("v")}, {"k": "v"}),
        (int, Number(5), 5),
        (float, Real(1.5), 1.5),
        (float, np.float64(1.5), 1.5),
        (float, np.float32(0.5), 0.5),
        (list[float], [np.float64(1.5), 2.0], [1.5, 2.0]),
        (int, np.int64(7), 7),
        (bool, np.bool_(1), True),
        (str, np.str_("a"), "a"),
        (Any, Text("a"), "a"),
        (Any, [np.float64(0.1)], [0.1]),
        (Any, collections.OrderedDict(a=1), {"a": 1}),
        (dict[str, int], collections.Counter("aab"), {"a": 2, "b": 1}),
        (dict[str, list[int]], collections.defaultdict(list, a=[1]), {"a": [1]}),
        (dt.datetime, Moment(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=1), ZONED["the repeated hour again"]),
        (dt.date, Day(2026, 1, 1), dt.date(2026, 1, 1)),
        (decimal.Decimal, Money("0.10"), decimal.Decimal("0.10")),
        (uuid.UUID, Identity(int=7), uuid.UUID(int=7)),
        (bytes | None, Octets(b"\xff"), b"\xff"),
    ],
    ids=str,
)
def test_a_subclass_arrives_as_the_plain_type(travel: Any, annotation: Any, value: Any, plain: Any) -> None:
    arrived = travel(annotation, value)
    if isinstance(plain, dt.datetime):
        assert not arrived - plain
    else:
        assert (arrived, type(arrived)) == (plain, type(plain))


def test_a_subclass_in_a_record_arrives() -> None:
    @dataclasses.dataclass
    class Page:
        title: str
        score: float

    assert arrives(Page, Page(Markup("<b>"), np.float64(0.5))) == Page("<b>", 0.5)


@pytest.mark.parametrize(
    "value",
    [Real("nan"), np.float64("inf"), Number(2**70), Text("\ud800"), [Real("inf")], {Text("\udcff"): 1}],
    ids=repr,
)
def test_a_subclass_has_the_limits_of_the_plain_type(value: Any) -> None:
    for annotation in (Any, float, int, str):
        with pytest.raises(InvalidArguments):
            arrives(annotation, value)


# Enums


class Mixed(enum.Enum):
    TEXT = "a"
    NUMBER = 1
    HALF = 0.5
    NOTHING = None
    PAIR = (1, "b")
    TRUTH = "true"
    DAY = dt.date(2026, 1, 1)


class Rate(float, enum.Enum):
    LOW = 0.5
    WHOLE = 1.0


class Rates(enum.Enum):
    LOW = 0.5
    WHOLE = 1.0


class Planet(enum.Enum):
    EARTH = (5.97e24, 6.37e6)

    def __init__(self, mass: float, radius: float) -> None:
        self.mass, self.radius = mass, radius


class Switch(enum.Enum):
    ON = True
    OFF = False


class Rights(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()


class Colour(str, enum.Enum):  # noqa: UP042 - as they were written before there was StrEnum
    RED = "red"


class Labelled(enum.Enum):
    A = Text("a")
    B = 2


@dataclasses.dataclass
class Order:
    kind: Mixed
    kinds: dict[str, list[Mixed]] = dataclasses.field(default_factory=dict)
    next: Order | None = None


class PublishCall(msgspec.Struct, rename="camel"):
    main_kind: Mixed
    weight: int = 1


class Line(NamedTuple):
    kind: Mixed
    number: int


class Form(TypedDict):
    kind: Mixed
    note: NotRequired[Mixed]


T = TypeVar("T")


@dataclasses.dataclass
class Box(Generic[T]):
    content: T


class Partly:
    hidden: Absent


@dataclasses.dataclass
class Whole(Partly):
    """Has all of its own annotations."""

    at: dt.datetime = NOON


@either_way
@pytest.mark.parametrize("member", [*Mixed, *Rate, *Rates, *Planet, *Switch, *Colour, *Labelled], ids=str)
def test_an_enum_of_any_values_arrives(travel: Any, member: enum.Enum) -> None:
    kind = type(member)
    assert travel(kind, member) is member
    if member is not Mixed.NOTHING:
        assert travel(kind | None, member) is member
    assert travel(list[kind], [member]) == [member]  # type: ignore[valid-type]
    assert travel(dict[str, kind], {"a": member}) == {"a": member}  # type: ignore[valid-type]
    assert travel(tuple[kind, ...], (member,)) == (member,)  # type: ignore[valid-type]
    assert travel(Annotated[kind, "a note"], member) is member


@either_way
def test_flags_arrive(travel: Any) -> None:
    assert travel(Rights, Rights.READ | Rights.WRITE) == Rights.READ | Rights.WRITE


@either_way
@pytest.mark.parametrize("member", Mixed, ids=str)
def test_an_enum_of_any_values_arrives_in_a_record(travel: Any, member: Mixed) -> None:
    order = Order(member, {"a": [member]}, Order(Mixed.TEXT))
    assert travel(Order, order) == order
    assert travel(list[Order], [order]) == [order]
    assert travel(PublishCall, PublishCall(member)) == PublishCall(member)
    assert travel(Line, Line(member, 2)) == Line(member, 2)
    assert travel(Form, {"kind": member}) == {"kind": member}
    assert travel(Form, {"kind": member, "note": member}) == {"kind": member, "note": member}
    assert travel(Box[Mixed], Box(member)) == Box(member)


def test_the_wire_has_its_value() -> None:
    signature = Signature(task_of(list[Mixed]), "task")
    body, _ = signature.encode((list(Mixed),), {})
    assert msgspec.json.decode(body)["args"] == [["a", 1, 0.5, None, [1, "b"], "true", "2026-01-01"]]


def test_other_languages_may_send_a_whole_number_for_a_float() -> None:
    (arrived,), _ = Signature(task_of(Rates), "task").decode(b'{"args":[1]}')
    assert arrived is Rates.WHOLE


@pytest.mark.parametrize("body", [b'{"args":["b"]}', b'{"args":[[1]]}', b'{"args":[{}]}', b'{"args":[false]}'])
def test_another_value_is_refused_on_arrival(body: bytes) -> None:
    with pytest.raises(InvalidArguments, match="argument 'value' of task 'task' does not fit Mixed: "):
        Signature(task_of(Mixed), "task").decode(body)


@pytest.mark.parametrize("kind", [Order, Form, Line])
@pytest.mark.parametrize("body", [b'{"args":[{}]}', b'{"args":[5]}', b'{"args":[{"kind":"no"}]}', b'{"args":[[]]}'])
def test_another_record_is_refused_on_arrival(kind: Any, body: bytes) -> None:
    with pytest.raises(InvalidArguments, match=f"argument 'value' of task 'task' does not fit {kind.__name__}: "):
        Signature(task_of(kind), "task").decode(body)


def test_a_null_that_may_be_none_or_a_member_is_refused() -> None:
    assert arrives(Mixed | None, None) is None
    with pytest.raises(NotSerializable):
        arrives(Mixed | None, Mixed.NOTHING)


def test_an_enum_without_an_annotation_is_refused() -> None:
    with pytest.raises(NotSerializable, match="annotate the parameter with"):
        arrives(Any, Mixed.TEXT)


# Records that do not say when they are equal


@dataclasses.dataclass(eq=False)
class Silent:
    name: str
    at: dt.datetime = ZONED["the repeated hour"]


class SilentStruct(msgspec.Struct, eq=False):
    name: str
    inner: list[Silent] = []


@either_way
def test_a_record_without_eq_arrives(travel: Any) -> None:
    arrived = travel(Silent, Silent("Ada"))
    assert (arrived.name, arrived.at.timestamp()) == ("Ada", ZONED["the repeated hour"].timestamp())
    assert travel(list[Silent], [Silent("Ada")])[0].name == "Ada"
    assert travel(SilentStruct, SilentStruct("Ada", [Silent("Eve")])).inner[0].name == "Eve"


def test_a_record_without_eq_that_would_change_is_refused() -> None:
    @dataclasses.dataclass(eq=False)
    class Loose:
        value: Any

    assert arrives(Loose, Loose([1])).value == [1]
    with pytest.raises(NotSerializable):
        arrives(Loose, Loose({1}))
    with pytest.raises(NotSerializable):
        arrives(Silent, type("Other", (Silent,), {})("Ada"))
