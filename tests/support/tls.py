"""A RabbitMQ node that speaks nothing but TLS and wants a certificate from its clients, and the authority for both."""

from __future__ import annotations

import datetime as dt
import socket
import ssl
from contextlib import suppress
from urllib.parse import urlencode

import trustme

from tests.support.nodes import Node


class TLSNode(Node):
    """Its certificate is for ``localhost`` alone."""

    def __init__(self, version: str) -> None:
        super().__init__(version)
        self.authority = trustme.CA()
        self.cafile = self._written("ca.pem", self.authority.cert_pem)
        self.client = self.issue_client("client.pem", self.authority)
        self.certify()
        options = {
            "listeners.tcp": "none",
            "listeners.ssl.default": f"127.0.0.1:{self.port}",
            "ssl_options.cacertfile": f"{self._inside}/ca.pem",
            "ssl_options.certfile": f"{self._inside}/server.pem",
            "ssl_options.keyfile": f"{self._inside}/server.key",
            "ssl_options.verify": "verify_peer",
            "ssl_options.fail_if_no_peer_cert": "true",
        }
        self._write_config(options, None)

    def certify(self, *, expired: bool = False) -> None:
        """Give it a new certificate, which it presents to whoever connects from now on."""
        now = dt.datetime.now(dt.UTC)
        end = now + (dt.timedelta(days=-1) if expired else dt.timedelta(days=30))
        issued = self.authority.issue_cert("localhost", not_before=now - dt.timedelta(days=60), not_after=end)
        self._written("server.pem", *issued.cert_chain_pems)
        self._written("server.key", issued.private_key_pem)
        if self._server is not None:
            self.evaluate("ssl:clear_pem_cache().")

    def issue_client(self, name: str, authority: trustme.CA) -> str:
        """A file with a client's certificate and key."""
        issued = authority.issue_cert("client.example", common_name="client")
        return self._written(name, issued.private_key_pem, *issued.cert_chain_pems)

    def url_with(self, host: str = "localhost", scheme: str = "amqps", **parameters: str | None) -> str:
        """A URL that works; a parameter that is given replaces its own, None leaves it out."""
        given = {"cafile": self.cafile, "certfile": self.client, **parameters}
        query = urlencode({name: value for name, value in given.items() if value is not None})
        return f"{scheme}://guest:guest@{host}:{self.port}/?{query}".rstrip("?")

    def _written(self, name: str, *parts: trustme.Blob) -> str:
        path = self.folder / name
        path.write_bytes(b"".join(part.bytes() for part in parts))
        return str(path)

    def _answers(self) -> bool:
        context = ssl.create_default_context(cafile=self.cafile)
        context.load_cert_chain(self.client)
        with (
            suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return connection.recv(1) == b"\x01"
        return False

    def _environment(self) -> dict[str, str]:
        plain = ("RABBITMQ_NODE_PORT", "RABBITMQ_NODE_IP_ADDRESS")
        return {name: value for name, value in super()._environment().items() if name not in plain}
