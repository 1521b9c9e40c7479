"""What stands behind the ``?`` of a broker's URL: all of it is checked, and nothing is ignored in silence."""

from __future__ import annotations

import pytest

from leveret.brokers import connect
from leveret.brokers.rabbitmq.amqp.parameters import Parameters, read_parameters
from leveret.errors import ConfigurationError

KNOWN = "known are heartbeat, timeout, name, auth, cafile, capath, cadata, certfile, keyfile, no_verify_ssl"


@pytest.mark.parametrize(
    ("query", "parameters"),
    [
        ("", Parameters()),
        ("?", Parameters()),
        ("?heartbeat=1", Parameters(heartbeat=1)),
        ("?heartbeat=65534&timeout=2.5", Parameters(heartbeat=65_534, timeout=2.5)),
        ("?name=mail%20%26+more&auth=EXTERNAL", Parameters(name="mail & more", auth="external")),
        ("?cafile=/ca.pem&capath=/ca&cadata=aGFyZQ==&certfile=c&keyfile=k&no_verify_ssl=0", Parameters()),
    ],
)
def test_parameters_are_read(query: str, parameters: Parameters) -> None:
    assert read_parameters(f"amqps://u:p@host/vhost{query}") == parameters


@pytest.mark.parametrize(
    ("query", "said"),
    [
        *(
            (f"heartbeat={value}", rf"heartbeat='{value}'; it must be whole seconds, 1 to 65534")
            for value in ("abc", "5.5", "", "-1", "0", "65535", "1e1", "99999999999999999999", "0x5", "None")
        ),
        ("heartbeat=%D9%A5", "it must be whole seconds"),
        *(
            (f"timeout={value}", rf"timeout='{value}'; it must be seconds that a host may take to connect")
            for value in ("abc", "", "-1", "0", "nan", "inf", "3601")
        ),
        ("name=", "name=''; it must be printable text"),
        ("name=a%0Ab", "printable text"),
        ("auth=md5", "auth='md5'; it must be one of plain, external"),
        ("cafile=", "cafile=''; it must be the path of a file"),
        ("cadata=%21", "cadata that is not base64"),
        ("keyfile=k", "keyfile without certfile"),
        ("no_verify_ssl=false", "no_verify_ssl='false'; it must be 1, which turns the check"),
        ("no_verify_ssl=", "no_verify_ssl=''"),
        ("heartbeat=5&heartbeat=6", "the parameter 'heartbeat' twice"),
        ("hartbeat=5", rf"unknown parameter, 'hartbeat' \(did you mean 'heartbeat'\?\); {KNOWN}"),
        ("Heartbeat=5", r"'Heartbeat' \(did you mean 'heartbeat'\?\)"),
        ("happy_eyeballs_delay=1", f"unknown parameter, 'happy_eyeballs_delay'; {KNOWN}"),
        ("=5", "unknown parameter, ''"),
        ("heartbeat", "no parameter=value"),
        ("heartbeat=5&", "no parameter=value"),
        ("heartbeat=5#6", "write %23"),
    ],
)
def test_what_is_wrong_is_told(query: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        connect(f"amqps://u:p@one,two/vhost?{query}")


def test_what_is_told_has_no_secret() -> None:
    for query in ("password=s3cret", "s3cret", "heartbeat=5&s3cret", "key_password=a@s3cret"):
        with pytest.raises(ConfigurationError) as caught:
            connect(f"amqps://u:p@host/?{query}")
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["sqlite:///file.db?timeout=5", "memory://?x=1", "memory://name", "memory:///a"])
def test_other_brokers_take_none(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"takes (neither a name nor|no) parameters"):
        connect(url)


@pytest.mark.parametrize("vhost", ["v" * 256, "%2F" * 256, "%C3%A9" * 128])
def test_a_virtual_host_that_amqp_cannot_carry_is_refused(vhost: str) -> None:
    with pytest.raises(ConfigurationError, match="a virtual host of more than 255 bytes"):
        connect(f"amqp://user:password@one,two/{vhost}?heartbeat=5")
    connect(f"amqp://user:password@one,two/{vhost[: len(vhost) // 2]}?heartbeat=5")
