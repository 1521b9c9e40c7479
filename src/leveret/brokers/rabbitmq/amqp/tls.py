"""TLS: the context that a URL asks for, and what a failed handshake means.

The context is built here and not by aiormq, since aiormq asks at the terminal for the password of an encrypted key.
"""

from __future__ import annotations

import asyncio
import ssl
from base64 import b64decode
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from leveret.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: aio-pika's parameters of a URL that are about TLS.
PARAMETERS = frozenset({"cafile", "capath", "cadata", "certfile", "keyfile", "no_verify_ssl"})
#: OpenSSL's numbers of what is wrong with a certificate.
_EXPIRED, _NAMES = frozenset({10}), frozenset({62, 64})

#: Of AMQP over TLS.
_PORT = 5671
#: How long a server is listened to that reset a connection (seconds).
_LISTENING = 1.0


class UnreadableFile(Exception):
    """A certificate or key that the URL names cannot be used."""


def parameters(url: str) -> Mapping[str, str]:
    """Those of the URL that are about TLS. Raises ConfigurationError when it does not ask for TLS."""
    parts = urlsplit(url)
    found = {name: value for name, value in parse_qsl(parts.query) if name in PARAMETERS}
    if found and parts.scheme.lower() != "amqps":
        raise ConfigurationError(
            f"the RabbitMQ URL has {', '.join(sorted(found))} and begins with {parts.scheme}://, which is not "
            "encrypted: write amqps://"
        )
    return found


def is_unverified(url: str) -> bool:
    """Whether the URL turns the check of the server's certificate off."""
    return parameters(url).get("no_verify_ssl", "0") != "0"


def context(url: str) -> ssl.SSLContext | None:
    """What the URL asks for; None without TLS. Reads files. Raises UnreadableFile."""
    if urlsplit(url).scheme.lower() != "amqps":
        return None
    given = parameters(url)
    try:
        made = ssl.create_default_context(
            cafile=given.get("cafile"),
            capath=given.get("capath"),
            cadata=b64decode(given["cadata"]) if "cadata" in given else None,
        )
    except (OSError, ValueError) as error:
        raise UnreadableFile(
            f"the authority's certificate {given.get('cafile') or ''} cannot be read: {error}"
        ) from error
    if "certfile" in given:
        _load_client(made, given["certfile"], given.get("keyfile"))
    if is_unverified(url):
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    return made


def _load_client(made: ssl.SSLContext, certificate: str, key: str | None) -> None:
    def no_password() -> str:
        raise UnreadableFile(
            f"the key {key or certificate} is encrypted, and nobody is there to be asked for its password: decrypt it "
            "(openssl pkey) and give it the mode 0600"
        )

    try:
        made.load_cert_chain(certificate, key, no_password)
    except OSError as error:
        raise UnreadableFile(f"the client's certificate {certificate} or its key cannot be read: {error}") from error


async def last_words(url: str, made: ssl.SSLContext) -> OSError | None:
    """Why a server that reset a TLS connection did so, asked for on another one; None when it says nothing.

    In TLS 1.3 a client may write before the server has looked at its certificate, and what it wrote may reset the
    connection and overtake the server's alert. Here nothing is written, so the alert arrives.
    """
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(_LISTENING):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port or _PORT, ssl=made)
            try:
                await reader.read(1)
            finally:
                writer.close()
    except TimeoutError:
        return None
    except OSError as error:
        return error
    return None


def explain(error: BaseException) -> str | None:
    """What a failed handshake means and what helps; None when the error is not one of TLS."""
    cause = next((one for one in _chain(error) if isinstance(one, (ssl.SSLError, UnreadableFile))), None)
    if isinstance(cause, UnreadableFile):
        return str(cause)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"{_distrust(cause)}. Nothing was sent"
    text = f"{cause or error}".lower()
    if "certificate required" in text or "certificate_required" in text or "handshake failure" in text:
        return "the server wants a certificate from its clients: add ?certfile=client.pem&keyfile=client.key to the URL"
    if "alert" in text and ("unknown ca" in text or "unknown_ca" in text or "bad certificate" in text):
        return (
            "the server does not trust this client's certificate (certfile in the URL): have it signed by its authority"
        )
    if "wrong version number" in text or "wrong_version_number" in text or "record layer failure" in text:
        return "the port speaks no TLS: use RabbitMQ's TLS port (5671), or amqp:// if it may be unencrypted"
    return f"TLS: {cause}" if cause is not None else None


def _distrust(error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in _EXPIRED:
        return "the server's certificate has expired, or this machine's clock is wrong: renew it on the server"
    if error.verify_code in _NAMES:
        return (
            f"the server's certificate is for another host ({error.verify_message.rstrip('.')}): use a name in the URL "
            "that is in the certificate, or have one made for this name"
        )
    return (
        f"the server's certificate is not trusted ({error.verify_message}): add ?cafile=ca.pem to the URL, the "
        "certificate of the authority that signed it"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # an error that is raised again can be its own context
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
