"""How a call becomes a message body and back, by the task's signature; how a result does, by its annotation."""

from __future__ import annotations

import inspect
import math
import re
import typing
import zlib
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec

from leveret.client.values import ANY, Hint, Misfit, hint, is_text, not_json, sent
from leveret.errors import InvalidArguments, NoResult, NotSerializable, UnreadableBody
from leveret.model import shallow

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

JSON = "application/json"
RAW = "application/octet-stream"
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
_GZIP = b"\x1f\x8b"
_ZLIB = (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
_BEGINNINGS = {
    _GZIP: "it is compressed with gzip; set content_encoding to gzip, or do not compress it",
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


#: What is its own JSON, and the only way to write it.
_PLAIN = frozenset({str, int, bool})
_encode = msgspec.json.Encoder().encode
_decode_body = msgspec.json.Decoder(_Body).decode


#: Stands for an argument that is not known yet.
_LATER = object()


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
            and self._types.get(parameters[0].name, ANY).type is bytes
            and parameters[0].kind in (parameters[0].POSITIONAL_ONLY, parameters[0].POSITIONAL_OR_KEYWORD)
        )
        #: The parameters that positions bind, and the fewest that must be given in a call that has positions alone.
        self._positional, self._least = _positions(parameters, self._types)
        self._places = {name: place for place, (name, _) in enumerate(self._positional)}

    def encode(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[bytes, str]:
        """The body and its content type. Raises InvalidArguments or NotSerializable, naming the argument."""
        if not (kwargs or self.raw) and self._least <= len(args) <= len(self._positional):
            return b'{"args":%b,"kwargs":{}}' % _encode(self._positional_sent(args)), JSON
        bound = self._bind(args, kwargs)
        if self.raw:
            bound.apply_defaults()
            (value,) = bound.arguments.values()
            if not isinstance(value, bytes):
                raise InvalidArguments(
                    f"task {self._name!r} takes the raw body: pass bytes, not {type(value).__name__}"
                )
            return value, RAW
        for keyword in kwargs:
            if not is_text(keyword):
                raise NotSerializable(f"the keyword {keyword!r} of task {self._name!r} holds a lone surrogate")
        self._apply(bound, self._sent)
        return _encode({"args": bound.args, "kwargs": bound.kwargs}), JSON

    def encode_after(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[msgspec.Raw], Any]:
        """The arguments of a call behind the first one, which comes later. Raises as `encode` does."""
        try:
            bound = self._bind((_LATER, *args), kwargs)
        except InvalidArguments as error:
            raise InvalidArguments(
                f"{error}. The result of the step before is its first argument; 'immutable()' leaves that out"
            ) from None
        self._apply(bound, lambda name, value, to: value if value is _LATER else self._sent(name, value, to))
        rest = [msgspec.Raw(_encode(value)) for value in bound.args[1:]]
        return rest, {name: msgspec.Raw(_encode(value)) for name, value in bound.kwargs.items()}

    def _positional_sent(self, args: tuple[Any, ...]) -> Sequence[Any]:
        """Most calls need no binding: each argument belongs to the parameter at its place, and travels as it is."""
        for place, value in enumerate(args):
            to = self._positional[place][1]
            if (type(value) is not to.type and to is not ANY) or not_json(value) is not None:
                return [self._sent(name, value, to) for (name, to), value in zip(self._positional, args, strict=False)]
        return args

    def decode(self, body: bytes, encoding: str | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call. ``encoding``: the message's `content_encoding`.

        Raises UnreadableBody or InvalidArguments.
        """
        if self.raw:
            return (body,), {}
        text = body if encoding is None else decompressed(body, encoding)
        try:
            call = _decode_body(shallow(text))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            why = f"the body is not JSON of the form {_FORM}: {_why_unreadable(text, encoding, error)}"
            raise UnreadableBody(why) from error
        if not call.kwargs and self._least <= len(call.args) <= len(self._positional):
            return tuple(map(self._restored, call.args, self._positional)), {}
        bound = self._bind(tuple(call.args), call.kwargs)
        self._apply(bound, self._convert)
        return bound.args, bound.kwargs

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return self._signature.parameters

    def canonical(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
        """The arguments of these parameters as JSON: the same for calls that mean the same. Raises InvalidArguments."""
        if not (kwargs or self.raw) and self._least <= len(args) <= len(self._positional):
            plain = [args[place] for name in names if self._is_plain(place := self._places.get(name, len(args)), args)]
            if len(plain) == len(names):
                return plain
        bound = self._bind(args, kwargs)
        bound.apply_defaults()
        bound.arguments = {name: bound.arguments[name] for name in names}
        self._apply(bound, self._canonical)
        return [bound.arguments[name] for name in names]

    def _is_plain(self, place: int, args: tuple[Any, ...]) -> bool:
        """Whether the argument at that place is given, and is its own JSON."""
        if place >= len(args):
            return False
        kind, to = type(args[place]), self._positional[place][1]
        return kind in _PLAIN and (to is ANY or kind is to.type)

    def _canonical(self, name: str, value: Any, to: Hint) -> Any:
        parameter = self._signature.parameters.get(name)
        if parameter is not None and value is parameter.default and not_json(value) is None:
            return value  # a default need not be what its annotation says
        tree = self._sent(name, self._convert(name, self._sent(name, value, to), to), to)
        return sorted(tree, key=_encode) if isinstance(value, (set, frozenset)) else tree

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        try:
            return self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidArguments(f"{error}; the signature is {self._name}{self._signature}") from None

    def _apply(self, bound: inspect.BoundArguments, change: Callable[[str, Any, Hint], Any]) -> None:
        """Change each argument, by its name and what it is annotated as."""
        arguments = bound.arguments
        for name, value in list(arguments.items()):
            to = self._types.get(name, ANY)
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                arguments[name] = tuple(change(f"{name}[{index}]", item, to) for index, item in enumerate(value))
            elif kind is inspect.Parameter.VAR_KEYWORD:
                arguments[name] = {key: change(key, item, to) for key, item in value.items()}
            else:
                arguments[name] = change(name, value, to)

    def _sent(self, name: str, value: Any, to: Hint) -> Any:
        tree = sent(f"argument {name!r} of task {self._name!r}", value, to, "annotate the parameter with")
        if tree is value and to is not ANY and type(value) is not to.type:
            self._convert(name, value, to)  # JSON already, which may not fit
        return tree

    def _restored(self, value: Any, parameter: tuple[str, Hint]) -> Any:
        name, to = parameter
        return value if to is ANY or type(value) is to.type else self._convert(name, value, to)

    def _convert(self, name: str, value: Any, to: Hint) -> Any:
        try:
            return to.restore(value)
        except Exception as error:  # noqa: BLE001 - a type's own constructor may raise anything
            raise InvalidArguments(
                f"argument {name!r} of task {self._name!r} does not fit {to}: {misfit(error)}"
            ) from None


class Returns:
    """The return value of one task's function."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self._name = name
        self._hint = _hint_of_result(function)

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


def decompressed(body: bytes, encoding: str | None) -> bytes:
    """The body without its compression; as it is where ``encoding`` is not gzip or deflate. Raises UnreadableBody."""
    named = (encoding or "").strip().lower()
    if named not in _COMPRESSIONS:
        return body
    # `deflate` is zlib's format by its standard, and often enough what is inside of that.
    is_bare = named == "deflate" and not body.startswith(_ZLIB)
    text, rest = b"", body
    while True:
        reader = zlib.decompressobj(-zlib.MAX_WBITS if is_bare else zlib.MAX_WBITS | _DETECT)
        try:
            text += reader.decompress(rest, MAX_DECOMPRESSED + 1 - len(text))
        except zlib.error as error:
            problem = f"content_encoding is {named!r}, and the body is not compressed so: {error}"
            raise UnreadableBody(problem) from error
        if len(text) > MAX_DECOMPRESSED:
            raise UnreadableBody(f"the body is more than {MAX_DECOMPRESSED} bytes when it is decompressed")
        if not reader.eof:
            raise UnreadableBody(f"content_encoding is {named!r}, and the compressed body ends too soon")
        rest = reader.unused_data
        if rest and not rest.startswith(_GZIP):  # gzip's format is of one part or more
            raise UnreadableBody(f"content_encoding is {named!r}, and something follows the compressed body")
        if not rest:
            break
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


def misfit(error: Exception) -> str:
    """What msgspec found wrong, and where, without the value: error texts are logged and shown, arguments are not."""
    text = str(error)
    refused = error.__cause__ or error
    if isinstance(refused, Misfit):
        return f"{refused}{_place(text.removeprefix(str(refused)))}"
    if isinstance(error, msgspec.ValidationError) and error.__cause__ is None and text.startswith(_WITHOUT_VALUE):
        return text
    if not isinstance(error, msgspec.ValidationError) or error.__cause__ is not None:
        cause = error.__cause__ or error
        return f"its type raised {type(cause).__name__}{_place(text.removeprefix(str(cause)))}"
    return f"no such value is allowed{_place(text)}"


def _place(text: str) -> str:
    _, at, place = text.rpartition(" - at `")
    return at and at + place


def entry_point(function: Any) -> Any:
    """The function whose code a call runs first: that of a partial, or of an object with ``__call__``."""
    while isinstance(function, partial):
        function = function.func
    is_function = inspect.isroutine(function) or isinstance(function, type) or hasattr(function, "__code__")
    return function if is_function else type(function).__call__


def makes_coroutines(function: Any) -> bool:
    """Whether a call runs none of its code, and gives a coroutine to await."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(entry_point(function))


def _hint_of_result(function: Callable[..., Any]) -> Hint:
    """What a function's return annotation restores."""
    annotation = inspect.signature(function).return_annotation
    return ANY if annotation is inspect.Signature.empty else hint(_evaluated(function, annotation))


def _positions(parameters: list[inspect.Parameter], types: Mapping[str, Hint]) -> tuple[list[tuple[str, Hint]], float]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [one for one in parameters if one.kind in kinds]
    required = [one for one in parameters if one.default is one.empty]
    keywords = any(one.kind is one.KEYWORD_ONLY for one in required)
    least = math.inf if keywords else sum(one.kind in kinds for one in required)
    return [(one.name, types.get(one.name, ANY)) for one in positional], least


def _annotations(function: Callable[..., Any], signature: inspect.Signature) -> dict[str, Hint]:
    hints = {
        name: hint(_evaluated(function, p.annotation))
        for name, p in signature.parameters.items()
        if p.annotation is not p.empty
    }
    return {name: one for name, one in hints.items() if one is not ANY}


def _evaluated(function: Callable[..., Any], annotation: Any) -> Any:
    """An annotation evaluated, by itself; Any when that can't be done here (a name under TYPE_CHECKING)."""
    code = inspect.unwrap(entry_point(inspect.unwrap(entry_point(function))))
    holder = SimpleNamespace(__annotations__={"value": annotation})
    try:
        return typing.get_type_hints(holder, globalns=getattr(code, "__globals__", {}), include_extras=True)["value"]
    except Exception:  # noqa: BLE001 - evaluating an annotation runs code that may raise anything
        return Any
