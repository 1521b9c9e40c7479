"""PostgreSQL and MariaDB servers of the tests' own: data and socket in a temporary folder, ended by process id.

Both refuse to be run by root, or are better not: the servers run as an unprivileged user who owns the folder.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.nodes import free_ports
from tests.support.reaper import FOLDER, MARK, own_mark
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Whose the servers are when root runs the tests.
_USER = "nobody"
_INSTALL = "run scripts/install-databases"


class Server:
    """One database server on the loopback interface."""

    end_signal = signal.SIGKILL

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{own_mark()}-"))
        if os.geteuid() == 0:
            shutil.chown(self.folder, _USER)
        (self.port,) = free_ports(1)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def new_database(self) -> str:
        """Make an empty database; its URL."""
        name = f"t{secrets.token_hex(6)}"
        self.query(f"CREATE DATABASE {name}")
        return self.url(name)

    def url(self, name: str) -> str:
        raise NotImplementedError

    def query(self, sql: str) -> None:
        raise NotImplementedError

    def close(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):  # at once; PostgreSQL ends its children with it
                os.kill(self._process.pid, self.end_signal)
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, *command: str) -> None:
        done = subprocess.run(_as_user(command), capture_output=True, text=True, cwd=self.folder, check=False)
        assert done.returncode == 0, f"{command[0]} failed: {done.stdout}{done.stderr}"

    def _start(self, *command: str) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                _as_user(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, MARK: own_mark()},
                start_new_session=True,
            )
        wait_until(self._answers, f"{command[0]} answers")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the server ended:\n{self.log}"
        try:
            self.query("SELECT 1")
        except Exception:  # noqa: BLE001 - whatever its driver raises until it is up
            return False
        return True


class PostgreSQL(Server):
    """Debian's PostgreSQL."""

    end_signal = signal.SIGQUIT

    def __init__(self, *, fsync: bool = False) -> None:
        """``fsync``: commits are on the disk, as where it matters how long they take."""
        super().__init__()
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        assert found, f"PostgreSQL is not installed: {_INSTALL}"
        data = str(self.folder / "data")
        self._run(str(found[-1] / "initdb"), "-D", data, "-U", "tests", "--auth=trust", "--no-sync", "-E", "UTF8")
        options = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": fsync}
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        self._start(str(found[-1] / "postgres"), "-D", data, *settings)

    def url(self, name: str) -> str:
        return f"postgresql://tests@127.0.0.1:{self.port}/{name}"

    def query(self, sql: str) -> None:
        import psycopg

        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(sql.encode())


class MariaDB(Server):
    """Debian's MariaDB."""

    def __init__(self) -> None:
        super().__init__()
        assert Path("/usr/sbin/mariadbd").exists(), f"MariaDB is not installed: {_INSTALL}"
        data = f"--datadir={self.folder / 'data'}"
        self._run(
            "mariadb-install-db",
            "--no-defaults",
            data,
            f"--tmpdir={self.folder}",  # two of them in one folder disturb each other
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        )
        self._start(
            "/usr/sbin/mariadbd",
            "--no-defaults",
            data,
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            f"--socket={self.folder / 'socket'}",
            f"--tmpdir={self.folder}",
            f"--pid-file={self.folder / 'pid'}",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-buffer-pool-size=32M",
        )

    def url(self, name: str) -> str:
        return f"mysql://root@127.0.0.1:{self.port}/{name}"

    def query(self, sql: str) -> None:
        import pymysql

        with pymysql.connect(host="127.0.0.1", port=self.port, user="root") as connection:
            connection.cursor().execute(sql)


class Databases:
    """The session's servers, each started when it is asked for first."""

    def __init__(self) -> None:
        self._servers: dict[str, Server] = {}

    def new(self, kind: str, folder: Path) -> str:
        """The URL of an empty database of that kind."""
        if kind == "sqlite":
            return f"sqlite:///{folder / 'shop.db'}"
        if kind not in self._servers:
            self._servers[kind] = PostgreSQL() if kind == "postgresql" else MariaDB()
        return self._servers[kind].new_database()

    def close(self) -> None:
        for server in self._servers.values():
            server.close()


def _as_user(command: Sequence[str]) -> Sequence[str]:
    if os.geteuid() != 0:
        return command
    return ["setpriv", f"--reuid={_USER}", "--regid=nogroup", "--clear-groups", *command]
