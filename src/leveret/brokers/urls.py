"""What the URL of a broker means: its file, and what of it people may see."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from leveret.errors import ConfigurationError

#: What comes before the path of an SQLite URL.
_SQLITE = "sqlite:///"


def absolute(url: str, folder: Path | None = None) -> str:
    """The URL; a relative path of an SQLite file is made absolute, so that it names one file wherever the program goes.

    ``folder``: where it is relative to; else the working directory. A path that begins with ``~`` is in a home. A URL
    that names no file is left as it is, for `connect` to refuse. Raises ConfigurationError where there is no folder.
    """
    path = file_of(url)
    if path is None or path.is_absolute():
        return url
    try:
        is_in_a_home = unquote_to_bytes(url[len(_SQLITE) :]).startswith(b"~")
        whole = path.expanduser() if is_in_a_home else (folder or Path.cwd()) / path
    except (RuntimeError, OSError) as error:
        raise ConfigurationError(
            f"{censor(url)!r} is a relative path, and it cannot be told to what ({error}); write sqlite:////whole/path.db"
        ) from error
    return f"{_SQLITE}{quote(os.fsencode(whole))}"


def file_of(url: str) -> Path | None:
    """The file of an SQLite URL, as it stands there; None for all other URLs, and for one that names no file."""
    if url[: len(_SQLITE)].lower() != _SQLITE:
        return None
    path = url[len(_SQLITE) :]
    if not path or path.endswith("/") or "?" in path or "#" in path or path == MEMORY:
        return None
    return Path(os.fsdecode(unquote_to_bytes(path)))


#: What other programs call an SQLite database without a file.
MEMORY = ":memory:"


def location(url: str) -> str:
    """What a URL means, for people: the file, or the server without its password."""
    path = file_of(url)
    return censor(url) if path is None else str(path)


#: Parameters of a URL that are shown in logs; any other may be a secret.
HARMLESS = frozenset(
    {
        *("heartbeat", "name", "timeout", "auth"),
        *("cafile", "capath", "cadata", "certfile", "keyfile", "no_verify_ssl"),
    }
)


def censor(url: str) -> str:
    """The URL without its password and without parameters that may be secret, for logs and errors."""
    # By hand: a password with a stray / ? # or [ in it confuses a URL parser, and would be shown.
    scheme, separator, rest = url.partition("://")
    credentials, at, address = ("", "", rest) if rest.startswith("/") else rest.rpartition("@")
    user, colon, _ = credentials.partition(":")
    if any(mark in user for mark in "/?#"):
        return f"{scheme}{separator}***"  # a secret with an @ of its own: nobody can tell where it ends
    address, mark, query = address.partition("?")
    pairs = [one.partition("=") for one in query.split("&")]
    shown = [
        f"{name}{equals}{value if name in HARMLESS else '***'}" if equals else "***" for name, equals, value in pairs
    ]
    return f"{scheme}{separator}{user}{':***' if colon else ''}{at}{address}{mark}{'&'.join(shown) if mark else ''}"
