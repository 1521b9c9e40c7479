"""How a call becomes a message body and back: a task's signature, and what JSON can carry."""

from __future__ import annotations

import inspect
import math
import re
import typing
import zlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec

from leveret.errors import InvalidArguments, NotSerializable, UnreadableBody

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

JSON = "application/json"
RAW = "application/octet-stream"
#: JSON numbers beyond 64 bits are read differently by every language, so they are refused.
_MIN_INT, _MAX_INT = -(2**63), 2**64 - 1
#: Deeper arguments are refused: readers of JSON give up at depths of their own.
MAX_DEPTH = 100
#: How msgspec's texts begin that quote types and bounds alone, never the value.
_WITHOUT_VALUE = (
    *("Expected ", "Object missing ", "Invalid UUID", "Invalid RFC3339 ", "Invalid ISO8601 ", "Invalid decimal "),
    *("Invalid base64 ", "Invalid epoch ", "Integer value ", "Number out of ", "Timestamp is ", "Duration is "),
)


_FORM = '{"args": [...], "kwargs": {...}}'
#: A compressed body may be as large as this when it is decompressed (bytes): what RabbitMQ takes uncompressed.
MAX_DECOMPRESSED = 16 * 1024 * 1024
_COMPRESSIONS = frozenset({"gzip", "x-gzip", "deflate"})
#: What some clients write for no encoding, or for the text's.
_AS_IT_IS = frozenset({"identity", "binary", "8bit", "utf-8", "utf8", "us-ascii"})
#: Have zlib tell gzip's format and its own by how they begin.
_DETECT = 32
_ZLIB = (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
_BEGINNINGS = {
    b"\x1f\x8b": "it is compressed with gzip; set content_encoding to gzip, or do not compress it",
    **dict.fromkeys(_ZLIB, "it is compressed with zlib; set content_encoding to deflate, or do not compress it"),
    b"\xef\xbb\xbf": "it begins with a UTF-8 byte order mark; leave that out",
    b"\xff\xfe\0\0": "it is UTF-32: JSON is UTF-8",
    b"\0\0\xfe\xff": "it is UTF-32: JSON is UTF-8",
    b"\xff\xfe": "it is UTF-16: JSON is UTF-8",
    b"\xfe\xff": "it is UTF-16: JSON is UTF-8",
    **{bytes([0x80, number]): "it is a Python pickle, which is never loaded: send JSON" for number in range(2, 6)},
}
_LONE_SURROGATE = re.compile(
    r"(?<!\\)(?:\\\\)*(\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    r"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)


class _Body(msgspec.Struct):
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


_encode = msgspec.json.Encoder().encode
_decode_body = msgspec.json.Decoder(_Body).decode


class Signature:
    """A function's parameters, as the wire sees them.

    A function whose only parameter is annotated ``bytes`` is *raw*: it takes the message's body as it came, and
    what it is enqueued with is sent as it is. Every other function's arguments travel as JSON; annotations that
    msgspec knows (dataclasses, datetimes, enums, ...) are checked on both sides and restored on arrival.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self._name = name
        self._signature = inspect.signature(function)
        self._types = _annotations(function, self._signature)
        parameters = list(self._signature.parameters.values())
        self.raw = (
            len(parameters) == 1
            and self._types.get(parameters[0].name) is bytes
            and parameters[0].kind in (parameters[0].POSITIONAL_ONLY, parameters[0].POSITIONAL_OR_KEYWORD)
        )
        #: The parameters that positions bind, and the fewest that must be given in a call that has positions alone.
        self._positional, self._least = _positions(parameters, self._types)

    def encode(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[bytes, str]:
        """The body and its content type. Raises InvalidArguments or NotSerializable, naming the argument."""
        if not (kwargs or self.raw) and self._least <= len(args) <= len(self._positional):
            return self._encode_positional(args)
        bound = self._bind(args, kwargs)
        if self.raw:
            bound.apply_defaults()
            (value,) = bound.arguments.values()
            if not isinstance(value, bytes):
                raise InvalidArguments(
                    f"task {self._name!r} takes the raw body: pass bytes, not {type(value).__name__}"
                )
            return value, RAW
        for name, value, annotation in self._each(bound):
            self._check(name, value, annotation)
        for keyword in kwargs:
            if not _is_text(keyword):
                raise NotSerializable(f"the keyword {keyword!r} of task {self._name!r} holds a lone surrogate")
        return _encode({"args": bound.args, "kwargs": bound.kwargs}), JSON

    def _encode_positional(self, args: tuple[Any, ...]) -> tuple[bytes, str]:
        """Most calls, which need no binding: each argument belongs to the parameter at its place."""
        for (name, annotation), value in zip(self._positional, args, strict=False):
            self._check(name, value, annotation)
        return _encode({"args": args, "kwargs": {}}), JSON

    def decode(self, body: bytes, encoding: str | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call. ``encoding``: the message's `content_encoding`.

        Raises UnreadableBody or InvalidArguments.
        """
        if self.raw:
            return (body,), {}
        text = decompressed(body, encoding)
        try:
            call = _decode_body(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            why = f"the body is not JSON of the form {_FORM}: {_why_unreadable(text, encoding, error)}"
            raise UnreadableBody(why) from error
        if not call.kwargs and self._least <= len(call.args) <= len(self._positional):
            return tuple(map(self._restored, call.args, self._positional)), {}
        return self._restore(self._bind(tuple(call.args), call.kwargs))

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        try:
            return self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidArguments(f"{error}; the signature is {self._name}{self._signature}") from None

    def _each(self, bound: inspect.BoundArguments) -> typing.Iterator[tuple[str, Any, Any]]:
        for name, value in bound.arguments.items():
            annotation = self._types.get(name, Any)
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                yield from ((f"{name}[{index}]", item, annotation) for index, item in enumerate(value))
            elif kind is inspect.Parameter.VAR_KEYWORD:
                yield from ((key, item, annotation) for key, item in value.items())
            else:
                yield name, value, annotation

    def _check(self, name: str, value: Any, annotation: Any) -> None:
        problem = _not_json(value, "", MAX_DEPTH)
        if problem is not None:
            what = f"argument {name!r} of task {self._name!r}"
            _have_restored(problem, what, value, annotation, "annotate the parameter with")
        elif annotation is not Any and type(value) is not annotation:
            self._convert(name, value, annotation)

    def _restore(self, bound: inspect.BoundArguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = bound.arguments
        for name, value in list(arguments.items()):
            annotation = self._types.get(name, Any)
            if annotation is Any:
                continue
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                arguments[name] = tuple(self._convert(name, item, annotation) for item in value)
            elif kind is inspect.Parameter.VAR_KEYWORD:
                arguments[name] = {key: self._convert(key, item, annotation) for key, item in value.items()}
            else:
                arguments[name] = self._convert(name, value, annotation)
        return bound.args, bound.kwargs

    def _restored(self, value: Any, parameter: tuple[str, Any]) -> Any:
        name, annotation = parameter
        return value if annotation is Any or type(value) is annotation else self._convert(name, value, annotation)

    def _convert(self, name: str, value: Any, annotation: Any) -> Any:
        try:
            return msgspec.convert(value, annotation, str_keys=True)
        except Exception as error:  # noqa: BLE001 - a type's own constructor may raise anything
            raise InvalidArguments(
                f"argument {name!r} of task {self._name!r} does not fit {_spell(annotation)}: {misfit(error)}"
            ) from None


def decompressed(body: bytes, encoding: str | None) -> bytes:
    """The body without its compression; as it is where ``encoding`` is not gzip or deflate. Raises UnreadableBody."""
    named = (encoding or "").strip().lower()
    if named not in _COMPRESSIONS:
        return body
    # `deflate` is zlib's format by its standard, and often enough what is inside of that.
    is_bare = named == "deflate" and not body.startswith(_ZLIB)
    reader = zlib.decompressobj(-zlib.MAX_WBITS if is_bare else zlib.MAX_WBITS | _DETECT)
    try:
        text = reader.decompress(body, MAX_DECOMPRESSED + 1)
    except zlib.error as error:
        raise UnreadableBody(f"content_encoding is {named!r}, and the body is not compressed so: {error}") from error
    if len(text) > MAX_DECOMPRESSED:
        raise UnreadableBody(f"the body is more than {MAX_DECOMPRESSED} bytes when it is decompressed")
    if not reader.eof:
        raise UnreadableBody(f"content_encoding is {named!r}, and the compressed body ends too soon")
    if reader.unused_data:
        raise UnreadableBody(f"content_encoding is {named!r}, and something follows the compressed body")
    return text


def _why_unreadable(body: bytes, encoding: str | None, error: Exception) -> str:
    """What a body is that is not JSON of the form that was wanted, in words that help its producer."""
    if not body:
        return "it is empty"
    for beginning, words in _BEGINNINGS.items():
        if body.startswith(beginning):
            return words
    if encoding and encoding.lower() not in _COMPRESSIONS | _AS_IT_IS:
        return f"its content_encoding is {encoding!r}; only gzip and deflate are decoded ({error})"
    if b"\0" in body[:4]:
        return "it is UTF-16 or UTF-32, or binary data: JSON is UTF-8"
    try:
        text = body.decode()
    except UnicodeDecodeError as problem:
        return f"it is not UTF-8: byte {problem.start} is 0x{body[problem.start]:02x}"
    if surrogate := _LONE_SURROGATE.search(text):
        return f"it holds the lone surrogate {surrogate[1]} (character {surrogate.start(1)}), which is half a character"
    if str(error) == "Input data was truncated":
        return f"it ends too soon, after {len(body)} bytes"
    return str(error)


def check_value(what: str, value: Any, annotation: Any, remedy: str) -> None:
    """It is JSON as it is, or its annotation restores it. Raises NotSerializable, naming it."""
    problem = _not_json(value, "", MAX_DEPTH)
    if problem is not None:
        _have_restored(problem, what, value, annotation, remedy)


def _have_restored(problem: _Problem, what: str, value: Any, annotation: Any, remedy: str) -> None:
    if problem.is_final or annotation is Any or not _survives(value, annotation):
        raise NotSerializable(
            f"{what}{problem.text}; use JSON (text, numbers, booleans, None, lists, dicts with text keys) "
            f"or {remedy} a type that msgspec can restore"
        )


def misfit(error: Exception) -> str:
    """What msgspec found wrong, and where, without the value: error texts are logged and shown, arguments are not."""
    text = str(error)
    if isinstance(error, msgspec.ValidationError) and error.__cause__ is None and text.startswith(_WITHOUT_VALUE):
        return text
    if not isinstance(error, msgspec.ValidationError) or error.__cause__ is not None:
        cause = error.__cause__ or error
        return f"its type raised {type(cause).__name__}{_place(text.removeprefix(str(cause)))}"
    return f"no such value is allowed{_place(text)}"


def _place(text: str) -> str:
    _, at, place = text.rpartition(" - at `")
    return at and at + place


def hint_of(function: Callable[..., Any], name: str) -> Any:
    """What a function's parameter, or its ``return``, is annotated as; Any when msgspec can't restore that."""
    annotation = getattr(inspect.unwrap(function), "__annotations__", {}).get(name, Any)
    hint = _hint(function, annotation)
    return hint if hint is not Any and _is_carried(hint) else Any


def _positions(parameters: list[inspect.Parameter], types: Mapping[str, Any]) -> tuple[list[tuple[str, Any]], float]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [one for one in parameters if one.kind in kinds]
    required = [one for one in parameters if one.default is one.empty]
    keywords = any(one.kind is one.KEYWORD_ONLY for one in required)
    least = math.inf if keywords else sum(one.kind in kinds for one in required)
    return [(one.name, types.get(one.name, Any)) for one in positional], least


def _annotations(function: Callable[..., Any], signature: inspect.Signature) -> dict[str, Any]:
    hints = {
        name: _hint(function, p.annotation) for name, p in signature.parameters.items() if p.annotation is not p.empty
    }
    return {name: hint for name, hint in hints.items() if hint is not Any and _is_carried(hint)}


def _hint(function: Callable[..., Any], annotation: Any) -> Any:
    """An annotation evaluated, by itself; Any when that can't be done here (a name under TYPE_CHECKING)."""
    code = inspect.unwrap(function)
    names = getattr(code, "__globals__", None) or getattr(type(code).__call__, "__globals__", {})
    holder = SimpleNamespace(__annotations__={"value": annotation})
    try:
        return typing.get_type_hints(holder, globalns=names, include_extras=True)["value"]
    except Exception:  # noqa: BLE001 - evaluating an annotation runs code that may raise anything
        return Any


def _is_carried(hint: Any) -> bool:
    """Whether msgspec itself can restore every part of the annotation; other annotations are not checked."""
    if hint in (bytes, str, int, float, bool):
        return True
    try:
        return not _has_custom(msgspec.inspect.type_info(hint), set())
    except Exception:  # noqa: BLE001 - whatever msgspec can't describe, it can't restore
        return False


def _has_custom(info: Any, seen: set[int]) -> bool:
    if isinstance(info, msgspec.inspect.CustomType):
        return True
    if id(info) in seen or not isinstance(info, (msgspec.inspect.Type, msgspec.inspect.Field)):
        return False
    seen.add(id(info))
    children: list[Any] = []
    for field in info.__struct_fields__:
        value = getattr(info, field)
        children.extend(value if isinstance(value, tuple) else (value,))
    return any(_has_custom(child, seen) for child in children)


class _Problem(msgspec.Struct, frozen=True):
    """Why a value is not JSON; ``is_final``: no annotation could carry it either."""

    text: str
    is_final: bool = False


def _final(text: str) -> _Problem:
    return _Problem(text, is_final=True)


def _not_json(value: Any, path: str, depth: int) -> _Problem | None:
    """None when the value is JSON and comes back equal; else what is wrong, and where in it."""
    where = f" (at {path})" if path else ""
    if depth == 0:
        return _final(f" is nested more than {MAX_DEPTH} deep, or holds itself")
    kind = type(value)
    if kind is str:
        return (
            None
            if _is_text(value)
            else _Problem(f" holds a lone surrogate{where}, which UTF-8 cannot carry", is_final=True)
        )
    if value is None or kind is bool:
        return None
    if kind is int:
        return (
            None if _MIN_INT <= value <= _MAX_INT else _Problem(f" is an integer beyond 64 bits{where}", is_final=True)
        )
    if kind is float:
        return (
            None if math.isfinite(value) else _Problem(f" is {value}{where}, which JSON does not have", is_final=True)
        )
    if kind in (list, tuple):
        return _first(_not_json(item, f"{path}[{index}]", depth - 1) for index, item in enumerate(value))
    if kind is dict:
        for key in value:
            if type(key) is not str or not _is_text(key):
                return _Problem(f" has the key {key!r}{where}, and JSON keys are text", is_final=isinstance(key, str))
        return _first(_not_json(item, f"{path}[{key!r}]", depth - 1) for key, item in value.items())
    return _Problem(f" is a {kind.__name__}{where}, which JSON cannot carry")


def _is_text(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _first(problems: typing.Iterable[_Problem | None]) -> _Problem | None:
    return next((problem for problem in problems if problem is not None), None)


def _survives(value: Any, annotation: Any) -> bool:
    """Whether a value arrives equal when its annotation restores it."""
    try:
        arrived = msgspec.convert(msgspec.json.decode(_encode(value)), annotation, str_keys=True)
        return bool(arrived == value)
    except Exception:  # noqa: BLE001 - constructors and comparisons of any type run here
        return False


def _spell(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
