"""How values are written on a page: text without tricks, times, sizes."""

from __future__ import annotations

import datetime as dt
from urllib.parse import quote, unquote

#: Longer names and ids are cut on a page, and longer texts (characters).
LONGEST_NAME = 120
LONGEST_TEXT = 20_000
_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"))
#: In the place of a number: an en dash.
UNKNOWN = "\u2013"
_MEBIBYTE = 1024 * 1024


def short(text: str, limit: int = LONGEST_NAME) -> str:
    """A name or an id in one line."""
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def long(text: str, limit: int = LONGEST_TEXT) -> str:
    """A text, the middle cut out when it is huge."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n… {len(text) - limit} characters left out …\n{text[-limit // 2 :]}"


def lasted(seconds: float | None) -> str:
    """A length of time, in the unit that fits."""
    if seconds is None:
        return UNKNOWN
    seconds = max(0.0, seconds)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.001 or seconds == 0 else "under 1 ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    for length, unit in _UNITS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def mark(seconds: float) -> str:
    """A length of time beside a line that stands for exactly that: to a tenth of its unit."""
    if seconds < 1:
        return f"{_tenths(seconds * 1000)} ms"
    length, unit = next((one for one in _UNITS if seconds >= one[0]), (1, "s"))
    return f"{_tenths(seconds / length)} {unit}"


def _tenths(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def ago(seconds: float) -> str:
    """How long since; coarse, since pages are not drawn anew for each second."""
    return "now" if seconds < 1 else f"{lasted(round(seconds))} ago".replace(".0 s", " s")


def moment(seconds: float) -> str:
    """A Unix time as ISO 8601; the page's script writes it in the reader's zone."""
    try:
        return dt.datetime.fromtimestamp(seconds, dt.UTC).isoformat(timespec="milliseconds")
    except (OverflowError, OSError, ValueError):
        return str(seconds)


def clock(seconds: float) -> str:
    """The same for a reader without scripts."""
    try:
        return f"{dt.datetime.fromtimestamp(seconds, dt.UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, OSError, ValueError):
        return str(seconds)


def count(number: float) -> str:
    """1234567 as 1 234 567, with a narrow space that does not break."""
    return f"{number:,.1f}".removesuffix(".0").replace(",", "\u202f")


def rate(per_second: float | None) -> str:
    if per_second is None:
        return UNKNOWN
    return _tenths(per_second) if per_second < 100 else count(round(per_second))


def size(octets: int) -> str:
    return f"{octets / _MEBIBYTE:.0f} MiB"


def packed(text: str) -> str:
    """An id or a name, to be given back unchanged by a link or a form, whatever is in it."""
    return quote(text, safe="", errors="surrogatepass")


def unpacked(text: str) -> str:
    return unquote(text, errors="surrogatepass")
