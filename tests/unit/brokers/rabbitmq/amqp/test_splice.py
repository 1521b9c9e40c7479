"""Content headers as bytes: what is taken apart is what pamqp reads, and what is put together it reads as well."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands as spec
from pamqp.header import ContentHeader

from leveret.brokers.rabbitmq.amqp import fields_of, spliced, text_field
from leveret.brokers.rabbitmq.amqp.sanitize import marshal

Properties = spec.Basic.Properties
HEADERS: dict[str, Any] = {
    "text": "é",
    "raw": b"\xff",
    "yes": True,
    "none": None,
    "whole": 7,
    "much": 2**40,
    "part": 0.5,
    "list": [1, "two", {"three": 3}],
    "table": {"a": {"b": "c"}},
    "when": dt.datetime(2024, 2, 29, tzinfo=dt.UTC),
}
MORE: dict[str, Any] = {
    "content_type": "text/plain",
    "priority": 4,
    "correlation_id": "c",
    "reply_to": "r",
    "expiration": "9",
    "timestamp": dt.datetime(2024, 2, 29, tzinfo=dt.UTC),
    "message_type": "resize",
    "app_id": "shop",
}


def header_of(**properties: Any) -> bytes:
    given = {"delivery_mode": 2, "message_id": "m-1", "headers": HEADERS, **properties}
    return b"\x00\x3c" + bytes(10) + marshal(Properties(**given))


def read(header: bytes) -> Properties:
    found = ContentHeader()
    found.unmarshal(header)
    return found.properties


@pytest.mark.parametrize("names", [(), tuple(MORE), *[(name,) for name in MORE]], ids=str)
def test_what_is_put_together_is_what_it_was(names: tuple[str, ...]) -> None:
    header = header_of(**{name: MORE[name] for name in names})
    found = spliced(header)
    assert found is not None
    assert found.encode() == header[12:]
    assert (found.message_id, found.priority) == ("m-1", 4 if "priority" in names else None)
    assert dict(found.decoded()) == dict(read(header))


@pytest.mark.parametrize(
    "wrong",
    [
        {"headers": None},
        {"message_id": None},
        {"delivery_mode": 1},
        {"delivery_mode": None},
        {"content_encoding": "gzip"},
        {"user_id": "guest"},
    ],
    ids=str,
)
def test_others_are_left_to_pamqp(wrong: dict[str, Any]) -> None:
    assert spliced(header_of(**wrong)) is None


def test_headers_are_told_by_their_names() -> None:
    found = spliced(header_of())
    assert found is not None
    fields = fields_of(found.table)
    assert fields is not None
    assert list(fields) == [name.encode() for name in HEADERS]
    assert {name: text for name, text in fields.items() if text is not None} == {b"text": "é"}


def test_a_text_is_added_to_headers() -> None:
    found = spliced(header_of())
    assert found is not None
    longer = type(found)(found.message_id, None, found.before, found.table + text_field(b"new", b"one"), found.after)
    assert dict(longer.decoded().headers or {}) == {**(read(header_of()).headers or {}), "new": "one"}


def test_a_name_that_comes_twice_is_no_table_that_is_known() -> None:
    assert fields_of(text_field(b"a", b"1") * 2) is None


@given(st.binary(max_size=60))
def test_nothing_raises(data: bytes) -> None:
    fields_of(data)
    spliced(b"\x00\x3c" + bytes(10) + data)


@given(st.integers(min_value=0, max_value=200))
def test_what_is_cut_off_is_no_table(at: int) -> None:
    properties = spliced(header_of())
    assert properties is not None
    table = properties.table
    whole = fields_of(table) or {}
    found = fields_of(table[:at])
    assert found is None or list(found) == list(whole)[: len(found)]
