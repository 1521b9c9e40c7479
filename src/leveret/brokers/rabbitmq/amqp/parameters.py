"""The parameters of a RabbitMQ URL (what stands behind its ``?``). Pure: no I/O."""

from __future__ import annotations

import binascii
import difflib
from base64 import b64decode
from typing import TYPE_CHECKING
from urllib.parse import unquote, unquote_plus

import msgspec

from leveret.brokers.rabbitmq.amqp import tls
from leveret.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds. With (10 + 1) x 3 s a dead peer is noticed in half a minute; aiormq's default of 60 takes 183 s.
_HEARTBEAT = 10
#: AMQP carries it in 16 bits, and aiormq takes the largest number for none.
_MOST_HEARTBEAT = 65_534
#: How long one host may take to connect, handshake and all (seconds).
_TIMEOUT = 10.0
_MOST_TIMEOUT = 3_600.0
_MECHANISMS = ("plain", "external")
#: Bytes of a virtual host's name: an AMQP short string.
_MOST_VHOST = 255


class Parameters(msgspec.Struct, frozen=True):
    """What a URL asks for beside hosts and TLS."""

    #: Seconds. Three that do not come end the connection.
    heartbeat: int = _HEARTBEAT
    #: How long one host may take to connect (seconds).
    timeout: float = _TIMEOUT
    #: The connection's name, for who looks at the server; None: Leveret's own.
    name: str | None = None
    #: How the client proves who it is.
    auth: str = "plain"


def read_parameters(url: str) -> Parameters:
    """Check each parameter of the URL. Raises ConfigurationError, which names the parameter and shows no secret."""
    before, _, fragment = url.partition("#")
    if fragment:
        raise ConfigurationError(
            "the RabbitMQ URL has a #, and what is behind it would be ignored: write %23 for one in the user's name, "
            "the password, the virtual host or a parameter"
        )
    place, _, query = before.partition("?")
    vhost = unquote(place.partition("://")[2].partition("/")[2])
    if len(vhost.encode()) > _MOST_VHOST:
        raise ConfigurationError(f"the RabbitMQ URL has a virtual host of more than {_MOST_VHOST} bytes")
    given = _pairs(query)
    for name in given:
        if name not in _CHECKS:
            raise ConfigurationError(f"the RabbitMQ URL has an unknown parameter, {_hint(name)}")
    values = {name: _CHECKS[name](name, text) for name, text in given.items()}
    if "keyfile" in values and "certfile" not in values:
        raise ConfigurationError("the RabbitMQ URL has keyfile without certfile: the key belongs to a certificate")
    tls.parameters(url)
    return msgspec.convert({name: value for name, value in values.items() if name not in tls.PARAMETERS}, Parameters)


def _pairs(query: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for pair in query.split("&") if query else ():
        name, equals, value = pair.partition("=")
        if not equals:
            # It may be a piece of a password.
            raise ConfigurationError(
                f"the RabbitMQ URL has something that is no parameter=value behind its ?; known are {_KNOWN}"
            )
        name = unquote_plus(name)
        if name in given:
            raise ConfigurationError(f"the RabbitMQ URL has the parameter {name!r} twice")
        given[name] = unquote_plus(value)
    return given


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), list(_CHECKS), 1)
    return f"{name!r}{f' (did you mean {near[0]!r}?)' if near else ''}; known are {_KNOWN}"


def _wrong(name: str, text: str, wanted: str) -> ConfigurationError:
    return ConfigurationError(f"the RabbitMQ URL has {name}={text!r}; it must be {wanted}")


def _heartbeat(name: str, text: str) -> int:
    # isdecimal() takes digits of other scripts too, and int() as well.
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= _MOST_HEARTBEAT):
        raise _wrong(
            name, text, f"whole seconds, 1 to {_MOST_HEARTBEAT}: without any, a dead connection is never noticed"
        )
    return int(text)


def _timeout(name: str, text: str) -> float:
    try:
        seconds = float(text) if text.isascii() else float("nan")
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds <= _MOST_TIMEOUT:
        raise _wrong(name, text, f"seconds that a host may take to connect, more than 0 and at most {_MOST_TIMEOUT:g}")
    return seconds


def _name(name: str, text: str) -> str:
    if not text or not text.isprintable():
        raise _wrong(name, text, "printable text, the connection's name for who looks at the server")
    return text


def _auth(name: str, text: str) -> str:
    if text.lower() not in _MECHANISMS:
        raise _wrong(name, text, f"one of {', '.join(_MECHANISMS)}")
    return text.lower()


def _path(name: str, text: str) -> str:
    if not text:
        raise _wrong(name, text, "the path of a file" if name != "capath" else "the path of a folder")
    return text


def _data(name: str, text: str) -> str:
    try:
        b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        text = ""
    if not text:
        raise ConfigurationError(
            f"the RabbitMQ URL has a {name} that is not base64: it must be a certificate's DER in it, with + as %2B"
        )
    return text


def _no_verify(name: str, text: str) -> str:
    if text not in ("0", "1"):
        raise _wrong(name, text, "1, which turns the check of the server's certificate off, or 0")
    return text


_CHECKS: dict[str, Callable[[str, str], object]] = {
    "heartbeat": _heartbeat,
    "timeout": _timeout,
    "name": _name,
    "auth": _auth,
    "cafile": _path,
    "capath": _path,
    "cadata": _data,
    "certfile": _path,
    "keyfile": _path,
    "no_verify_ssl": _no_verify,
}
_KNOWN = ", ".join(_CHECKS)
