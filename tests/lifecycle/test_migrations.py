"""The migrations that docs/guides/transactions.md shows make the table that the outbox wants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy.engine import make_url

from tests.lifecycle.test_outbox import application, counted, engine_of
from tests.support.handbook import DOCS, blocks
from tests.support.workers import Program

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.databases import Databases

KINDS = ("postgresql", "mysql", "sqlite")
#: What `manage.py migrate` does with one migration of an application.
_DJANGO = """
import sys
from django.conf import settings

migration, engine, name, host, port, user = sys.argv[1:]
database = {"ENGINE": f"django.db.backends.{engine}", "NAME": name, "HOST": host, "PORT": port, "USER": user}
settings.configure(DATABASES={"default": database})

import django
from django.db import connection
from django.db.migrations.state import ProjectState

django.setup()
shown = {}
exec(open(migration).read(), shown)
migration = shown["Migration"]("0001_outbox", "shop")
with connection.schema_editor(atomic=migration.atomic) as editor:
    migration.apply(ProjectState(), editor)
"""


def shown(word: str, kind: str) -> str:
    """The migration of the page with that word in it, for that kind of database."""
    (found,) = [block.text for block in blocks(DOCS / "guides" / "transactions.md") if word in block.text]
    return found.replace('"postgresql"', f'"{kind}"')


@pytest.mark.parametrize("kind", KINDS)
async def test_the_migration_of_alembic(kind: str, tmp_path: Path, databases: Databases) -> None:
    url, app = databases.new(kind, tmp_path), application(tmp_path)
    (say,) = app.tasks
    with engine_of(url).begin() as connection:
        module: dict[str, object] = {}
        with Operations.context(MigrationContext.configure(connection)):
            exec(f"{shown('alembic', kind)}\nupgrade()", module)
        await say.enqueue_in(connection, "hello")
    assert await counted(url) == 1
    await app.close()


@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
async def test_the_migration_of_django(kind: str, tmp_path: Path, databases: Databases) -> None:
    url = databases.new(kind, tmp_path)
    parsed = make_url(url)
    engine = "sqlite3" if kind == "sqlite" else kind
    where = [engine, parsed.database or "", parsed.host or "", str(parsed.port or ""), parsed.username or ""]
    migration = tmp_path / "migration.py"
    migration.write_text(shown("RunSQL", kind))
    with Program(["-c", _DJANGO, str(migration), *where], tmp_path / "out") as program:
        assert program.exit_code() == 0, program.output
    assert await counted(url) == 0
