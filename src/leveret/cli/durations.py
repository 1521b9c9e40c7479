"""Times on the command line: ``30``, ``30s``, ``5m``, ``1h30m``; and moments with a time zone."""

from __future__ import annotations

import re
from datetime import datetime

import click

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+")
_PART = re.compile(rf"({_NUMBER.pattern})\s*(ms|s|min|m|h|d|w)\s*", re.IGNORECASE)


class _Duration(click.ParamType[float]):
    name = "DURATION"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = seconds_of(str(value).strip())
        if seconds is None:
            self.fail(f"{value!r} is not a time span: write seconds, or 30s, 5m, 2h, 1d, 1h30m", param, ctx)
        return seconds


class _Moment(click.ParamType[datetime]):
    name = "TIME"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            moment = value  # pyproject.toml has times of its own
        else:
            try:
                moment = datetime.fromisoformat(str(value).strip())
            except ValueError:
                self.fail(f"{value!r} is not an ISO 8601 time: write 2026-01-31T08:00+01:00", param, ctx)
        if moment.tzinfo is None:
            self.fail(
                f"{value!r} has no time zone, so it names no moment: write {moment.isoformat(timespec='minutes')}Z "
                f"for UTC, or {moment.isoformat(timespec='minutes')}{_offset()} as it is here",
                param,
                ctx,
            )
        return moment


DURATION = _Duration()
MOMENT = _Moment()


def seconds_of(text: str) -> float | None:
    """``1h30m`` in seconds; None for what is no time span."""
    if _NUMBER.fullmatch(text):
        return float(text)
    parts = _PART.findall(text)
    if not parts or _PART.sub("", text):
        return None
    return float(sum(float(number) * _UNITS[unit.lower()] for number, unit in parts))


def _offset() -> str:
    """This machine's, as ``+01:00``."""
    return datetime.now().astimezone().isoformat()[-6:]
