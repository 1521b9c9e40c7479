"""Hosts that are there and say nothing."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: An address of this machine where RabbitMQ's nodes do not listen.
ELSEWHERE = "127.0.0.2"


@contextmanager
def accepting(port: int = 0, address: str = "127.0.0.1") -> Iterator[int]:
    """A port that takes connections, and never answers."""
    with socket.create_server((address, port)) as listener:
        yield listener.getsockname()[1]


@contextmanager
def hanging_up_once() -> Iterator[int]:
    """A port that closes the first connection, and never answers the later ones."""

    def serve() -> None:
        with suppress(OSError):
            listener.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve)
        server.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.join()


@contextmanager
def dropping() -> Iterator[int]:
    """A port that drops what comes: the queue of connections that nobody accepts is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port: int = listener.getsockname()[1]
        fillers = [socket.socket() for _ in range(8)]
        try:
            for filler in fillers:
                filler.settimeout(0)
                with suppress(BlockingIOError):
                    filler.connect(("127.0.0.1", port))
            yield port
        finally:
            for filler in fillers:
                filler.close()
