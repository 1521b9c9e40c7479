"""TLS against nodes that speak nothing else: who is not trusted is told so at once, and nothing is sent to them."""

from __future__ import annotations

import logging
import subprocess
from typing import TYPE_CHECKING

import pytest
import trustme

from leveret.brokers import connect
from leveret.errors import BrokerRefused, BrokerUnavailable, ConfigurationError
from tests.conftest import RABBITMQ
from tests.support import ledger_app
from tests.support.client import Client
from tests.support.tls import TLSNode
from tests.support.workers import Ledger, Worker, leveret

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.nodes import Node


@pytest.fixture(scope="module", params=RABBITMQ)
def tls_node(request: pytest.FixtureRequest) -> Iterator[TLSNode]:
    node = TLSNode(request.param)
    try:
        node.start()
        node.wait()
        yield node
    finally:
        node.close()


def test_producers_and_workers_use_it(tls_node: TLSNode, ledger: Ledger) -> None:
    """With an authority and a client's certificate of their own."""
    url = tls_node.url_with()
    client = Client(url)
    client.enqueue(ledger_app.say, "sealed")
    with Worker(url, ledger) as worker:
        ledger.wait_for("said sealed")
        client.wait_until_empty("work")
        assert "no_verify_ssl" not in worker.output
    protocol = tls_node.ctl("list_queues", "name")  # it is the node that has them
    assert "work" in protocol


def encrypted(source: str, target: Path) -> str:
    subprocess.run(
        ["openssl", "pkey", "-in", source, "-aes256", "-passout", "pass:s3cret-w0rd", "-out", str(target)], check=True
    )
    return str(target)


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ("another authority", "is not trusted"),
        ("no authority", "add ?cafile=ca.pem to the URL"),
        ("another host", "is for another host"),
        ("no client certificate", "add ?certfile=client.pem&keyfile=client.key to the URL"),
        ("client of another authority", "does not trust this client's certificate"),
        ("no such file", "cannot be read"),
        ("encrypted key", "is encrypted, and nobody is there to be asked"),
    ],
)
async def test_who_is_not_trusted_is_told_why(tls_node: TLSNode, tmp_path: Path, mistake: str, told: str) -> None:
    stranger = trustme.CA()
    stranger.cert_pem.write_to_path(tmp_path / "stranger.pem")
    url = {
        "another authority": lambda: tls_node.url_with(cafile=str(tmp_path / "stranger.pem")),
        "no authority": lambda: tls_node.url_with(cafile=None),
        "another host": lambda: tls_node.url_with(host="127.0.0.1"),
        "no client certificate": lambda: tls_node.url_with(certfile=None),
        "client of another authority": lambda: tls_node.url_with(
            certfile=tls_node.issue_client("stranger-client.pem", stranger)
        ),
        "no such file": lambda: tls_node.url_with(certfile=str(tmp_path / "nothing.pem")),
        "encrypted key": lambda: tls_node.url_with(keyfile=encrypted(tls_node.client, tmp_path / "encrypted.key")),
    }[mistake]()
    broker = connect(url, timeout=10)
    with pytest.raises(BrokerRefused, match="cannot connect to amqps://guest:") as caught:
        await broker.stats(["work"])
    await broker.close()
    assert told in str(caught.value)


def test_an_expired_certificate_is_refused(tls_node: TLSNode) -> None:
    tls_node.certify(expired=True)
    try:
        assert "has expired" in leveret("queues", "-q", "work", "--url", tls_node.url_with(), fails=True)
    finally:
        tls_node.certify()


def test_a_worker_ends_at_once(tls_node: TLSNode, ledger: Ledger) -> None:
    """It does not try for ever."""
    with Worker(tls_node.url_with(host="127.0.0.1"), ledger) as worker:
        assert worker.exit_code() == 1
        assert "is for another host" in worker.output
        assert "Traceback" not in worker.output


async def test_the_check_can_be_turned_off_with_a_warning(tls_node: TLSNode, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        broker = connect(tls_node.url_with(host="127.0.0.1", cafile=None, no_verify_ssl="1"), timeout=10)
        await broker.stats(["work"])
        await broker.close()
    assert caplog.text.count("certificate is not checked") == 1


async def test_nothing_falls_back_to_plain(tls_node: TLSNode, node: Node) -> None:
    """Neither does TLS against a plain port, nor a plain URL that names certificates."""
    plain = connect(node.url.replace("amqp://", "amqps://"), timeout=5)
    with pytest.raises(BrokerRefused, match="speaks no TLS"):
        await plain.stats(["work"])
    with pytest.raises(ConfigurationError, match="write amqps://"):
        connect(tls_node.url_with(scheme="amqp"))
    broker = connect(tls_node.url_with(scheme="amqp", cafile=None, certfile=None), timeout=2)
    with pytest.raises(BrokerUnavailable):
        await broker.stats(["work"])
    await broker.close()
