"""RabbitMQ nodes of a test's own: own ports, own name, own epmd, data in a temporary folder, ended by process id."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.reaper import FOLDER, MARK, own_mark

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CACHE = Path(
    os.environ.get("LEVERET_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leveret"
)
TREES = {"3.10": Path("/"), "4": CACHE / "rabbitmq-4"}
#: Below the ports that Linux gives to outgoing connections (32768 and more): a client's connection, or a node that is
#: connected to while it is down, cannot take the port of a node that starts again.
PORTS = range(20_000, 32_000)
#: A node that starts may forward an expired message before its target has a leader; it tries again after 180 s, or
#: after this (milliseconds), which docs/operations.md tells operators of.
RETRY_SOON = "[{rabbit, [{dead_letter_worker_publisher_confirm_timeout, 5000}]}].\n"
#: A node on a busy two-core machine may take this long to start (seconds).
START_TIMEOUT = 90.0


class MissingServer(Exception):
    """A RabbitMQ version that the tests need is not installed: `scripts/install-rabbitmq` installs it."""


class Family:
    """An epmd and a cookie: what nodes that may talk to each other share."""

    def __init__(self) -> None:
        self.cookie = secrets.token_hex(16)
        (self._reserved,) = reserve_ports(1)
        self.port: int = self._reserved.getsockname()[1]
        self._epmd = subprocess.Popen(
            ["epmd", "-port", str(self.port), "-address", "127.0.0.1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait()

    def _wait(self) -> None:
        """A node that finds no epmd starts one of its own, which nobody would end."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.01)
        raise RuntimeError(f"epmd does not listen on port {self.port}")

    def close(self) -> None:
        self._epmd.kill()
        self._epmd.wait()
        self._reserved.close()


def new_name() -> str:
    return f"leveret-{secrets.token_hex(4)}@localhost"


class Node:
    """One RabbitMQ node. Killed and started again, it keeps its ports and its data."""

    def __init__(
        self,
        version: str,
        *,
        config: Mapping[str, Any] | None = None,
        advanced: str | None = None,
        name: str | None = None,
        family: Family | None = None,
    ) -> None:
        self.version = version
        self.tree = TREES[version]
        if not (self.tree / "usr/lib/rabbitmq/bin/rabbitmq-server").exists():
            raise MissingServer(f"RabbitMQ {version} is not in {self.tree}; run scripts/install-rabbitmq")
        self._reserved = reserve_ports(2)
        self.port, self._dist_port = (one.getsockname()[1] for one in self._reserved)
        self.name = name or new_name()
        self._family = family or Family()
        self._has_own_family = family is None
        self.folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{own_mark()}-", dir=self.tree / "tmp"))
        self._inside = Path("/") / self.folder.relative_to(self.tree)
        self._write_config(config or {}, advanced)
        self._server: subprocess.Popen[bytes] | None = None
        self._is_starting = True
        #: When it was last seen to accept connections after a start (the monotonic clock).
        self.started_at = 0.0

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    @property
    def log(self) -> str:
        return (self.folder / "console.log").read_text(errors="replace")

    def start(self) -> None:
        """Start the server without waiting for it."""
        self._is_starting = True
        console = (self.folder / "console.log").open("ab")
        self._server = subprocess.Popen(
            self._command("rabbitmq-server"),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,
        )
        console.close()

    def wait(self) -> None:
        """Wait until it accepts AMQP connections."""
        self._wait()
        if self._is_starting:
            self.started_at, self._is_starting = time.monotonic(), False

    def _wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self._server is None or self._server.poll() is not None:
                raise RuntimeError(f"RabbitMQ {self.version} ended while starting:\n{self.log[-3000:]}")
            if self._answers():
                return
            time.sleep(0.1)
        raise RuntimeError(f"RabbitMQ {self.version} did not start within {START_TIMEOUT} s:\n{self.log[-3000:]}")

    def kill(self) -> None:
        """``kill -9`` of the server's processes."""
        server, self._server = self._server, None
        if server is not None:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()

    def pause(self) -> None:
        """SIGSTOP: the node's sockets stay open and say nothing."""
        assert self._server is not None
        os.killpg(self._server.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self._server is not None
        os.killpg(self._server.pid, signal.SIGCONT)

    def restart(self) -> None:
        self.kill()
        self.start()
        self.wait()

    def close(self) -> None:
        """End the node and its own epmd, and remove its data."""
        self.kill()
        for one in self._reserved:
            one.close()
        if self._has_own_family:
            self._family.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ctl(self, *arguments: str) -> str:
        """``rabbitmqctl`` against this node."""
        done = subprocess.run(
            self._command("rabbitmqctl", "-q", *arguments),
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"rabbitmqctl {' '.join(arguments)} failed: {done.stdout}{done.stderr}")
        return done.stdout

    def evaluate(self, expression: str) -> str:
        """Evaluate Erlang on the node: the quickest way to look inside."""
        return self.ctl("eval", expression)

    def queues(self, *columns: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.ctl("list_queues", "--formatter", "json", *columns))
        return rows

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.settimeout(5)
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return connection.recv(1) == b"\x01"
        return False

    def _command(self, program: str, *arguments: str) -> Sequence[str]:
        if self.tree == Path("/"):
            return [f"/usr/lib/rabbitmq/bin/{program}", *arguments]
        # A mount namespace of its own: /proc inside the tree goes away with the process.
        inside = ["chroot", str(self.tree), f"/usr/lib/rabbitmq/bin/{program}", *arguments]
        return ["unshare", "--mount", "sh", "-c", 'mount -t proc proc "$0/proc" && exec "$@"', str(self.tree), *inside]

    def _environment(self) -> dict[str, str]:
        inside = self._inside
        return {
            MARK: own_mark(),
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(inside),
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(self._family.port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_CONFIG_FILE": f"{inside}/rabbitmq.conf",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{inside}/advanced.config",
            "RABBITMQ_CONF_ENV_FILE": f"{inside}/none.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{inside}/enabled_plugins",
            "RABBITMQ_MNESIA_BASE": f"{inside}/data",
            "RABBITMQ_LOG_BASE": f"{inside}/log",
            "RABBITMQ_PID_FILE": f"{inside}/pid",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none",
        }

    def _write_config(self, config: Mapping[str, Any], advanced: str | None) -> None:
        settings = {
            "log.console": "true",
            "log.file": "false",
            "disk_free_limit.absolute": "50MB",
            "vm_memory_high_watermark.absolute": "2GB",
            **config,
        }
        (self.folder / "rabbitmq.conf").write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
        (self.folder / "advanced.config").write_text(advanced or RETRY_SOON)
        (self.folder / "enabled_plugins").write_text("[].\n")
        (self.folder / ".erlang.cookie").write_text(self._family.cookie)
        (self.folder / ".erlang.cookie").chmod(0o400)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    sockets = reserve_ports(count)
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def reserve_ports(count: int) -> list[socket.socket]:
    """Sockets that hold a port each, so that no other test takes it. A server with SO_REUSEADDR can listen there."""
    reserved: list[socket.socket] = []
    for port in random.sample(PORTS, len(PORTS)):
        if len(reserved) == count:
            break
        one = socket.socket()
        try:
            one.bind(("127.0.0.1", port))  # without SO_REUSEADDR: refused if another holds it
        except OSError:
            one.close()
            continue
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.append(one)
    return reserved
