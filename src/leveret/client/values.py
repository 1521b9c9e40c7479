"""What JSON can carry: values on their way out, and annotations that restore them.

A value is accepted if it arrives equal, as far as its annotation says what it was. msgspec knows most types; what is
here besides are subclasses of the plain ones, datetimes in zones, and enums of any values.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import functools
import math
import operator
import types
import typing
from contextlib import suppress
from decimal import Decimal
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import msgspec

from leveret.errors import NotSerializable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: JSON numbers beyond 64 bits are read differently by every language, so they are refused.
_MIN_INT, _MAX_INT = -(2**63), 2**64 - 1
#: Deeper arguments are refused: readers of JSON give up at depths of their own.
MAX_DEPTH = 100

_PLAIN = frozenset({str, int, float, bool, type(None)})


class Hint:
    """An annotation that restores values."""

    __slots__ = ("_carrier", "type")

    def __init__(self, annotation: Any, carrier: Any) -> None:
        #: As it was written.
        self.type = annotation
        self._carrier = carrier

    def restore(self, tree: Any) -> Any:
        """The value of what JSON carried. Raises msgspec.ValidationError, or what a type's own constructor raises."""
        if self.type is Any:
            return tree
        return msgspec.convert(tree, self._carrier, str_keys=True, dec_hook=_restore_proxied)

    def __str__(self) -> str:
        name = self.type.__name__ if isinstance(self.type, type) else str(self.type)
        return name.replace("typing.", "")


#: Of what has no annotation, or one that cannot be restored: plain JSON arrives.
ANY = Hint(Any, Any)


def hint(annotation: Any) -> Hint:
    """What restores values of an annotated type; ANY when nothing can."""
    if annotation is Any:
        return ANY
    if annotation in (bytes, str, int, float, bool):
        return Hint(annotation, annotation)
    try:
        carrier = _carrier(annotation, frozenset())
        return ANY if _has_custom(msgspec.inspect.type_info(carrier), set()) else Hint(annotation, carrier)
    except Exception:  # noqa: BLE001 - whatever msgspec can't describe, it can't restore
        return ANY


def sent(what: str, value: Any, to: Hint, remedy: str) -> Any:
    """The value as plain JSON, if it arrives equal. Raises NotSerializable, naming it and saying what to do."""
    problem = not_json(value)
    if problem is None:
        return value
    if not problem.is_final:
        try:
            tree = _tree(value)
            problem = not_json(tree) or problem
            if not problem.is_final and _same(to.restore(tree), value):
                return tree
        except Exception:  # noqa: BLE001, S110 - constructors, comparisons and conversions of any type run here
            pass
    raise NotSerializable(
        f"{what}{problem.text}; use JSON (text, numbers, booleans, None, lists, dicts with text keys) "
        f"or {remedy} a type that msgspec can restore"
    )


class Problem(msgspec.Struct, frozen=True):
    """Why a value is not JSON; ``is_final``: no annotation could carry it either."""

    text: str
    is_final: bool = False


def not_json(value: Any, path: str = "", depth: int = MAX_DEPTH) -> Problem | None:
    """None when the value is JSON and comes back equal; else what is wrong, and where in it."""
    where = f" (at {path})" if path else ""
    if depth == 0:
        return Problem(f" is nested more than {MAX_DEPTH} deep, or holds itself", is_final=True)
    kind = type(value)
    if kind is str:
        return None if is_text(value) else _final(f" holds a lone surrogate{where}, which UTF-8 cannot carry")
    if value is None or kind is bool:
        return None
    if kind is int:
        return None if _MIN_INT <= value <= _MAX_INT else _final(f" is an integer beyond 64 bits{where}")
    if kind is float:
        return None if math.isfinite(value) else _final(f" is {value}{where}, which JSON does not have")
    if kind in (list, tuple):
        return _first(not_json(item, f"{path}[{index}]", depth - 1) for index, item in enumerate(value))
    if kind is dict:
        for key in value:
            if type(key) is not str or not is_text(key):
                return Problem(f" has the key {key!r}{where}, and JSON keys are text", is_final=type(key) is str)
        return _first(not_json(item, f"{path}[{key!r}]", depth - 1) for key, item in value.items())
    return Problem(f" is a {kind.__name__}{where}, which JSON cannot carry")


def is_text(value: str) -> bool:
    """Whether UTF-8 can carry it."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _final(text: str) -> Problem:
    return Problem(text, is_final=True)


def _first(problems: Iterable[Problem | None]) -> Problem | None:
    return next((problem for problem in problems if problem is not None), None)


# On the way out.


def _tree(value: Any) -> Any:
    """As text, numbers, booleans, None, lists and dicts. Raises for what nothing here knows."""
    try:
        # msgspec would cut the seconds off an offset, so datetimes are spelled here; it can't leave keys alone.
        built = msgspec.to_builtins(value, str_keys=True, builtin_types=(dt.datetime,), enc_hook=_base)
    except TypeError:
        built = msgspec.to_builtins(value, str_keys=True, enc_hook=_base)
    return _plain(built)


def _plain(built: Any) -> Any:
    kind = type(built)
    if kind in _PLAIN:
        return built
    if kind is dt.datetime:
        return msgspec.to_builtins(_spellable(built))
    if kind in (list, tuple):
        return [_plain(item) for item in built]
    if kind is dict:
        return {key: _plain(item) for key, item in built.items()}
    return _tree(built)  # an enum's value, which msgspec takes out of it and leaves as it is


def _spellable(moment: dt.datetime) -> dt.datetime:
    """The same moment with an offset of whole minutes: there are no others in RFC 3339."""
    offset = moment.utcoffset()
    return moment if offset is None or not offset % dt.timedelta(minutes=1) else moment.astimezone(dt.UTC)


def _is_model(kind: type) -> bool:
    """Whether it is a model of pydantic 2. Told by what its class has, as pydantic is the application's to import."""
    return hasattr(kind, "__pydantic_validator__") and hasattr(kind, "model_validate_json")


def _base(value: Any) -> Any:
    """A value of a subclass as one of the class that JSON, or msgspec, knows; the class's own method makes it."""
    if _is_model(type(value)):
        return value.model_dump(mode="json", by_alias=True, round_trip=True)
    for kind, convert in _BASES:
        if isinstance(value, kind):
            return convert(value)
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()
    raise NotImplementedError(f"{type(value).__name__} is not known")


_BASES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (enum.Enum, lambda value: value.value),
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
    (bytes, lambda value: b"".join([value])),
    (
        dt.datetime,
        lambda value: dt.datetime.combine(
            dt.date(value.year, value.month, value.day),
            dt.time(value.hour, value.minute, value.second, value.microsecond, value.tzinfo, fold=value.fold),
        ),
    ),
    (dt.date, lambda value: dt.date(value.year, value.month, value.day)),
    (dt.timedelta, lambda value: dt.timedelta(value.days, value.seconds, value.microseconds)),
    (Decimal, Decimal),
    (Integral, int),
    (Real, float),
)


def _same(arrived: Any, value: Any) -> bool:
    """Whether what arrived is what was sent, also where ``==`` says no."""
    if isinstance(value, dt.datetime):
        return _same_moment(arrived, value)
    if arrived == value:
        return True
    if isinstance(value, (list, tuple)):
        pairs = isinstance(arrived, (list, tuple)) and len(arrived) == len(value)
        return pairs and all(map(_same, arrived, value))
    if isinstance(value, dict):
        keys = isinstance(arrived, dict) and len(arrived) == len(value)
        return keys and all(key in arrived and _same(arrived[key], item) for key, item in value.items())
    if isinstance(value, (set, frozenset)):
        sizes = isinstance(arrived, (set, frozenset)) and len(arrived) == len(value)
        return sizes and all(any(_same(other, item) for other in arrived) for item in value)
    names = _fields(value)
    if names is None or type(arrived) is not type(value):
        return False
    return all(_same(getattr(arrived, name), getattr(value, name)) for name in names)


def _same_moment(arrived: Any, value: dt.datetime) -> bool:
    """``==`` says no to any hour that a zone has twice, or leaves out."""
    if not isinstance(arrived, dt.datetime) or (arrived.utcoffset() is None) != (value.utcoffset() is None):
        return False
    if value.utcoffset() is None:
        return bool(arrived == value)
    return not arrived - value


def _fields(value: Any) -> list[str] | None:
    """The names of what a record holds; None: it is none."""
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    if isinstance(value, msgspec.Struct):
        return list(value.__struct_fields__)
    attributes = getattr(type(value), "__attrs_attrs__", None)
    return None if attributes is None else [attribute.name for attribute in attributes]


# On the way in: a class that msgspec can't restore is carried by a proxy, which it hands to `_restore_proxied`.


class _Accepting(type):
    def __instancecheck__(cls, instance: object) -> bool:
        """What a proxy restores is none of its own, and msgspec asks."""
        return True


class _Proxy(metaclass=_Accepting):
    """The base of all proxies."""

    restore: Callable[[Any], Any]


def _restore_proxied(kind: type, tree: Any) -> Any:
    if not issubclass(kind, _Proxy):
        raise NotImplementedError(kind.__name__)
    return kind.restore(tree)


def _has_custom(info: Any, seen: set[int]) -> bool:
    """Whether there is a class in it that neither msgspec nor a proxy restores."""
    if isinstance(info, msgspec.inspect.CustomType):
        return not issubclass(info.cls, _Proxy)
    if id(info) in seen or not isinstance(info, (msgspec.inspect.Type, msgspec.inspect.Field)):
        return False
    seen.add(id(info))
    children: list[Any] = []
    for field in info.__struct_fields__:
        value = getattr(info, field)
        children.extend(value if isinstance(value, tuple) else (value,))
    return any(_has_custom(child, seen) for child in children)


def _carrier(annotation: Any, within: frozenset[Any]) -> Any:
    """The annotation with proxies in it, where msgspec needs them; else itself."""
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return _proxy(annotation) if _needs_proxy(annotation, within) else annotation
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is None or origin is typing.Literal:
        return annotation
    if origin is typing.Annotated:
        carried = _carrier(arguments[0], within)
        return annotation if carried is arguments[0] else typing.Annotated[(carried, *arguments[1:])]
    if origin in _QUALIFIERS:
        carried = _carrier(arguments[0], within)
        return annotation if carried is arguments[0] else carried
    carriers = tuple(one if one is ... else _carrier(one, within) for one in arguments)
    if all(map(operator.is_, carriers, arguments)):
        return annotation
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, carriers)
    return origin[carriers]


#: Of a field, and nothing to its values.
_QUALIFIERS = (typing.Required, typing.NotRequired, typing.Final)


def _needs_proxy(kind: type, within: frozenset[Any]) -> bool:
    if issubclass(kind, enum.Enum):
        return not _is_known_enum(kind)
    if _is_model(kind):
        return True
    if kind in within:
        return False  # the class that holds it decides
    try:
        fields = _record(kind)
    except Exception:  # noqa: BLE001 - evaluating annotations runs code that may raise anything; msgspec reads fewer
        return False
    return any(_carrier(one, within | {kind}) is not one for one in fields.values())


def _is_known_enum(kind: type[enum.Enum]) -> bool:
    try:
        return isinstance(msgspec.inspect.type_info(kind), msgspec.inspect.EnumType)
    except (TypeError, NotImplementedError):
        return False


def _record(kind: type) -> dict[str, Any]:
    """The annotations of a record's fields, by the names that JSON has; nothing for what is no record."""
    names = _json_names(kind)
    hints = typing.get_type_hints(kind, include_extras=True) if names else {}
    return {name: hints[attribute] for name, attribute in names.items()}


def _json_names(kind: type) -> dict[str, str]:
    """What JSON calls a record's fields, and what their attributes are called."""
    if issubclass(kind, msgspec.Struct):
        return dict(zip(kind.__struct_encode_fields__, kind.__struct_fields__, strict=True))
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
    elif typing.is_typeddict(kind):
        names = list(kind.__annotations__)
    else:
        names = list(getattr(kind, "_fields", ())) if issubclass(kind, tuple) else []
    return {name: name for name in names}


@functools.cache
def _proxy(kind: type) -> _Accepting:
    if issubclass(kind, enum.Enum):
        restore = _enum_restorer(kind)
    else:
        restore = functools.partial(_restore_model if _is_model(kind) else _restore_record, kind)
    return _Accepting(f"{kind.__name__}Proxy", (_Proxy,), {"restore": staticmethod(restore)})


def _enum_restorer(kind: type[enum.Enum]) -> Callable[[Any], Any]:
    members: dict[bytes, enum.Enum] = {}
    for member in kind:
        with suppress(Exception):  # a member whose value is no JSON can't be sent
            tree = _tree(member.value)
            if not_json(tree) is None:
                members.setdefault(_key(tree), member)

    def restore(tree: Any) -> enum.Enum:
        member = members.get(_key(tree))
        try:
            return kind(tree) if member is None else member  # 1 is sent for 1.0 by some languages
        except ValueError:
            raise msgspec.ValidationError(f"no such {kind.__name__}") from None

    return restore


def _key(tree: Any) -> bytes:
    return msgspec.json.encode(tree, order="deterministic")


class Misfit(ValueError):
    """A value that its model refuses; the text names places and rules, and no values."""


def _restore_model(kind: Any, tree: Any) -> Any:
    try:
        return kind.model_validate_json(msgspec.json.encode(tree))
    except ValueError as error:
        if not hasattr(error, "errors"):
            raise
        found = error.errors(include_url=False, include_context=False, include_input=False)
        places = [f"{'.'.join(map(str, one['loc'])) or kind.__name__}: {one['type']}" for one in found]
    raise Misfit(", ".join(places))


def _restore_record(kind: type, tree: Any) -> Any:
    names, fields = _json_names(kind), _record(kind)
    if issubclass(kind, tuple):
        tree = dict(zip(fields, tree, strict=False)) if isinstance(tree, (list, tuple)) else tree
    if not isinstance(tree, dict):
        raise msgspec.ValidationError("Expected `object`")
    values = {
        names[name]: Hint(annotation, _carrier(annotation, frozenset())).restore(tree[name])
        for name, annotation in fields.items()
        if name in tree
    }
    if typing.is_typeddict(kind):
        # Where annotations are text, Python itself does not see that a key is not required.
        optional = {name for name, annotation in fields.items() if typing.get_origin(annotation) is typing.NotRequired}
        missing = not getattr(kind, "__required_keys__", frozenset()) <= values.keys() | optional
    else:
        missing = False
    try:
        restored = None if missing else kind(**values)
    except TypeError:
        missing = True
    if missing:
        raise msgspec.ValidationError("Object missing required field")
    return restored
