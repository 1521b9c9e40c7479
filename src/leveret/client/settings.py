"""Settings from outside of the program: ``LEVERET_*`` in the environment, then ``[tool.leveret]`` in pyproject.toml."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from leveret.brokers import absolute
from leveret.errors import ConfigurationError
from leveret.model.suggest import did_you_mean

#: Those of an application, which ``App(...)`` takes too.
OF_AN_APPLICATION = ("url", "enqueue_timeout", "keep_results", "max_message_size", "max_result_size")


class Project(msgspec.Struct, frozen=True):
    """The ``[tool.leveret]`` of a pyproject.toml, names with ``_`` for ``-``."""

    file: Path | None = None
    values: dict[str, Any] = {}


@lru_cache(maxsize=64)
def project(folder: Path) -> Project:
    """The settings of the nearest pyproject.toml that has any, in the folder or above. Raises ConfigurationError."""
    for place in (folder, *folder.parents):
        file = place / "pyproject.toml"
        try:
            text = file.read_bytes()
        except OSError:
            continue  # there is none, or it is not ours to read
        found = _table(file, text) if b"leveret" in text else None
        if found is not None:
            return Project(file, found)
    return Project()


def check(found: Project, known: tuple[str, ...]) -> None:
    """Raises ConfigurationError for a setting that nothing reads."""
    for name in found.values:
        if name not in known:
            raise ConfigurationError(
                f"{found.file}: [tool.leveret] has no setting {name!r}{did_you_mean(name, known)}"
                + ("" if did_you_mean(name, known) else f"; there are: {', '.join(sorted(known))}")
            )


def setting(name: str, folder: Path | None) -> Any:
    """$LEVERET_NAME, else the project's; None: neither says anything."""
    value = os.environ.get(f"LEVERET_{name.upper()}")
    if value:
        return value
    return None if folder is None else project(folder).values.get(name)


def number(name: str, given: Any, default: Any, folder: Path | None) -> Any:
    """What the program gave, else the setting as a number, else the default. Raises ConfigurationError."""
    if given is not None:
        return given
    value = setting(name, folder)
    if value is None:
        return default
    kind = type(default)
    try:
        return kind("" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        source = f"$LEVERET_{name.upper()}" if os.environ.get(f"LEVERET_{name.upper()}") else "[tool.leveret]"
        wanted = "a whole number" if kind is int else "a number of seconds"
        raise ConfigurationError(f"{name} is {value!r} in {source}; it must be {wanted}") from None


def _table(file: Path, text: bytes) -> dict[str, Any] | None:
    import tomllib

    try:
        tools = tomllib.loads(text.decode()).get("tool")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}") from error
    table = tools.get("leveret") if isinstance(tools, dict) else None
    if table is None:
        return None
    if not isinstance(table, dict):
        raise ConfigurationError(f"{file}: tool.leveret is {table!r}; it must be a table, [tool.leveret]")
    return {name.replace("-", "_"): value for name, value in table.items()}


DEFAULT_URL = "sqlite:///leveret.db"


def resolve_url(url: str | None, folder: Path | None = None) -> str:
    """The URL given, else $LEVERET_URL, else the project's (`leveret.client.settings`), else an SQLite file.

    See `absolute` for ``folder``. What pyproject.toml says is relative to that file, and so the same one in each folder
    of the project.
    """
    chosen = url or os.environ.get("LEVERET_URL")
    if chosen:
        return absolute(chosen, folder)
    found = _project(folder)
    if found.file is None or "url" not in found.values:
        return absolute(DEFAULT_URL, folder)
    if not isinstance(found.values["url"], str):
        raise ConfigurationError(f"{found.file}: url is {found.values['url']!r}; it must be text")
    return absolute(found.values["url"], found.file.parent)


def _project(folder: Path | None) -> Project:
    try:
        return project(folder or Path.cwd())
    except OSError:  # the working directory was deleted
        return Project()
