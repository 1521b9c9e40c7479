"""A TCP proxy on loopback that can cut, swallow or slow down what goes through it."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self


class Proxy:
    """Forwards to a port of this machine, on threads of its own."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._open = threading.Event()
        self._open.set()
        self._delay = 0.0
        self._trap: bytes | None = None
        self._kept_back: bytes | None = None
        self._kept_back_on = 0
        self.accepted = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.set()
        self._listener.close()
        self.cut()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def cut(self) -> None:
        """Reset every connection."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    # A linger of zero makes the close a reset, as when a host vanishes and comes back.
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                    end.shutdown(socket.SHUT_RDWR)
                with suppress(OSError):
                    end.close()

    def swallow(self) -> None:
        """From now on nothing comes through, and nobody is told: a half-open connection."""
        self._open.clear()

    def swallow_from(self, words: bytes) -> None:
        """`swallow` as soon as these bytes want to come through; they do not."""
        self._trap = words

    def keep_back(self, words: bytes | None) -> None:
        """From now on pieces with these bytes do not come through the connections that there are; None: no more."""
        self._kept_back = words
        self._kept_back_on = self.accepted

    @property
    def swallows(self) -> bool:
        return not self._open.is_set()

    def resume(self) -> None:
        self._trap = None
        self._open.set()

    def slow(self, delay: float) -> None:
        """From now on each piece (of at most 64 KiB, in each direction) takes so many seconds; 0: no more."""
        self._delay = delay

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.accepted += 1
                try:
                    server = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    client.close()
                    continue
                with self._lock:
                    self._pairs.append((client, server))
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=(source, sink, self.accepted), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, number: int) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                if self._trap is not None and self._trap in data:
                    self.swallow()
                if self._kept_back is not None and self._kept_back in data and number <= self._kept_back_on:
                    continue
                self._open.wait()
                time.sleep(self._delay)
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
