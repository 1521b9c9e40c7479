"""The tables of the outbox and the inbox, and the statements that programs of any driver run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leveret.errors import ConfigurationError
from leveret.model.suggest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

TABLE = "leveret_outbox"
#: Where PostgreSQL tells relays that there are new rows.
CHANNEL = "leveret_outbox"
#: After so many tries a row that cannot be published is left alone, until somebody retries it.
MOST_TRIES = 5

INSERT = "INSERT INTO leveret_outbox (id, task, queue, message, created) VALUES"
_MARK = "INTO leveret_inbox (id, task, done) VALUES"

_OUTBOX = {
    "postgresql": """\
CREATE TABLE leveret_outbox (
    number   BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id       VARCHAR(255) NOT NULL,
    task     TEXT,
    queue    VARCHAR(255) NOT NULL,
    message  BYTEA NOT NULL,
    created  DOUBLE PRECISION NOT NULL,
    tries    SMALLINT NOT NULL DEFAULT 0,
    next_try DOUBLE PRECISION NOT NULL DEFAULT 0,
    error    TEXT
)""",
    "mysql": """\
CREATE TABLE leveret_outbox (
    number   BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
    id       VARCHAR(255) NOT NULL,
    task     TEXT,
    queue    VARCHAR(255) NOT NULL,
    message  LONGBLOB NOT NULL,
    created  DOUBLE NOT NULL,
    tries    SMALLINT NOT NULL DEFAULT 0,
    next_try DOUBLE NOT NULL DEFAULT 0,
    error    TEXT
) ENGINE = InnoDB CHARACTER SET utf8mb4""",
    "sqlite": """\
CREATE TABLE leveret_outbox (
    number   INTEGER PRIMARY KEY AUTOINCREMENT,
    id       TEXT NOT NULL,
    task     TEXT,
    queue    TEXT NOT NULL,
    message  BLOB NOT NULL,
    created  REAL NOT NULL,
    tries    INTEGER NOT NULL DEFAULT 0,
    next_try REAL NOT NULL DEFAULT 0,
    error    TEXT
)""",
}
#: Once for each statement: all of a transaction are one notification, which PostgreSQL sends at its commit.
_NOTIFY = (
    """\
CREATE FUNCTION leveret_outbox_notify() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_notify(''leveret_outbox'', ''''); RETURN NULL; END'""",
    """\
CREATE TRIGGER leveret_outbox_notify AFTER INSERT ON leveret_outbox
    FOR EACH STATEMENT EXECUTE FUNCTION leveret_outbox_notify()""",
)
_INBOX = {
    "postgresql": """\
CREATE TABLE leveret_inbox (
    id     VARCHAR(255) NOT NULL PRIMARY KEY,
    task   TEXT NOT NULL,
    done   DOUBLE PRECISION NOT NULL,
    result TEXT
)""",
    "mysql": """\
CREATE TABLE leveret_inbox (
    id     VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL PRIMARY KEY,
    task   TEXT NOT NULL,
    done   DOUBLE NOT NULL,
    result LONGTEXT
) ENGINE = InnoDB CHARACTER SET utf8mb4""",
    "sqlite": """\
CREATE TABLE leveret_inbox (
    id     TEXT NOT NULL PRIMARY KEY,
    task   TEXT NOT NULL,
    done   REAL NOT NULL,
    result TEXT
)""",
}
#: Old marks are deleted by their time.
_INBOX_INDEX = "CREATE INDEX leveret_inbox_done ON leveret_inbox (done)"
#: What databases have tables.
DIALECTS = tuple(_OUTBOX)
#: A mark that is there already is no error, and none was inserted.
_MARKS = {
    "postgresql": ("INSERT", "ON CONFLICT (id) DO NOTHING"),
    "mysql": ("INSERT IGNORE", ""),
    "sqlite": ("INSERT OR IGNORE", ""),
}


def create_outbox(dialect: str, *, notify: bool = True) -> tuple[str, ...]:
    """The statements that make the outbox's table, for a migration.

    Args:
        dialect: "postgresql", "mysql" (MariaDB's, too) or "sqlite".
        notify: On PostgreSQL, make a trigger that wakes the relay at each commit.

    Returns:
        The statements, to be executed one after the other.

    Raises:
        ConfigurationError: There is no table for such a database.
    """
    known = known_dialect(dialect)
    return _OUTBOX[known], *(_NOTIFY if notify and known == "postgresql" else ())


def create_inbox(dialect: str) -> tuple[str, ...]:
    """The statements that make the inbox's table, for a migration.

    Args:
        dialect: "postgresql", "mysql" (MariaDB's, too) or "sqlite".

    Returns:
        The statements, to be executed one after the other.

    Raises:
        ConfigurationError: There is no table for such a database.
    """
    return _INBOX[known_dialect(dialect)], _INBOX_INDEX


def mark(dialect: str) -> tuple[str, str]:
    """What stands before and after the values of a mark in the inbox."""
    verb, ending = _MARKS[known_dialect(dialect)]
    return f"{verb} {_MARK}", ending


def keep_result(places: Sequence[str]) -> str:
    """Sets a mark's result. ``places``: the placeholders of the result and of the id."""
    return "UPDATE leveret_inbox SET result = {} WHERE id = {}".format(*places)  # noqa: S608 - placeholders


def kept_result(place: str) -> str:
    """A mark's result. ``place``: the placeholder of the id."""
    return f"SELECT result FROM leveret_inbox WHERE id = {place}"  # noqa: S608 - a placeholder


def known_dialect(name: str) -> str:
    """The database, by its own name or SQLAlchemy's. Raises ConfigurationError."""
    known = {"mariadb": "mysql", "postgres": "postgresql"}.get(name, name)
    if known not in DIALECTS:
        raise ConfigurationError(
            f"the outbox has no table for {name!r}; it has for {', '.join(DIALECTS)}{did_you_mean(name, DIALECTS)}"
        )
    return known
