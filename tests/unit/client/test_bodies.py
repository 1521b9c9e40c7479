"""Bodies of foreign messages: compressed ones are read, and what cannot be read is called by its name."""

from __future__ import annotations

import gzip
import pickle
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret.client.payload import MAX_DECOMPRESSED, Signature
from leveret.errors import InvalidArguments, UnreadableBody

#: Compressed without a time, so that the names of tests are the same in every process.
CALL = b'{"args":["a"]}'


def take(value: str) -> None: ...


def take_raw(body: bytes) -> None: ...


SIGNATURE = Signature(take, "take")


def deflated(data: bytes) -> bytes:
    """What is inside of zlib's format: some clients call that deflate."""
    writer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return writer.compress(data) + writer.flush()


def why(body: bytes, encoding: str | None = None) -> str:
    with pytest.raises(UnreadableBody) as caught:
        SIGNATURE.decode(body, encoding)
    return str(caught.value)


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(CALL, mtime=0)),
        (" GZip", gzip.compress(CALL, mtime=0)),
        ("x-gzip", gzip.compress(CALL, mtime=0)),
        ("gzip", gzip.compress(CALL[:5], mtime=0) + gzip.compress(CALL[5:], mtime=0)),
        ("deflate", zlib.compress(CALL)),
        ("deflate", zlib.compress(CALL, 1)),
        ("deflate", deflated(CALL)),
        ("gzip", zlib.compress(CALL)),
        *[(name, CALL) for name in (None, "", "utf-8", "UTF-8", "identity", "binary", "something else")],
    ],
)
def test_a_call_may_be_compressed(encoding: str | None, body: bytes) -> None:
    assert SIGNATURE.decode(body, encoding) == (("a",), {})


def test_a_raw_body_is_left_as_it_is() -> None:
    body = gzip.compress(b"anything")
    assert Signature(take_raw, "take_raw").decode(body, "gzip") == ((body,), {})


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_body_has_an_end(encoding: str) -> None:
    """A few kilobytes can become gigabytes."""
    compress = gzip.compress if encoding == "gzip" else zlib.compress
    assert why(compress(b" " * MAX_DECOMPRESSED + CALL), encoding).startswith(
        f"the body is more than {MAX_DECOMPRESSED}"
    )
    assert SIGNATURE.decode(compress(b" " * (MAX_DECOMPRESSED - len(CALL)) + CALL), encoding) == (("a",), {})


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (CALL, "'gzip', and the body is not compressed so"),
        (gzip.compress(CALL, mtime=0)[:-1], "'gzip', and the compressed body ends too soon"),
        (gzip.compress(CALL, mtime=0) + b"x", "'gzip', and something follows the compressed body"),
        (b"", "'gzip', and the compressed body ends too soon"),
    ],
)
def test_a_body_that_is_not_compressed_as_it_says(body: bytes, told: str) -> None:
    assert told in why(body, "gzip")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "it is empty"),
        (gzip.compress(CALL, mtime=0), "it is compressed with gzip; set content_encoding to gzip"),
        (zlib.compress(CALL), "it is compressed with zlib; set content_encoding to deflate"),
        (b"\xef\xbb\xbf" + CALL, "it begins with a UTF-8 byte order mark"),
        (CALL.decode().encode("utf-16"), "it is UTF-16"),
        (CALL.decode().encode("utf-16-le"), "it is UTF-16 or UTF-32"),
        (CALL.decode().encode("utf-16-be"), "it is UTF-16 or UTF-32"),
        (CALL.decode().encode("utf-32"), "it is UTF-32"),
        (b'{"args":["caf\xe9"]}', "it is not UTF-8: byte 13 is 0xe9"),
        (rb'{"args":["\ud83d"]}', r"it holds the lone surrogate \ud83d (character 10)"),
        (rb'{"args":["\uDE00"]}', r"it holds the lone surrogate \uDE00 (character 10)"),
        (rb'{"args":["\\\ud83d\u0041"]}', r"it holds the lone surrogate \ud83d (character 12)"),
        (b'{"args":["a"', "it ends too soon, after 12 bytes"),
        (pickle.dumps({"args": []}), "it is a Python pickle, which is never loaded"),
        (b"hello", "JSON is malformed"),
        (b'["a"]', "Expected `object`, got `array`"),
        (b'{"args":[%b]}' % (b"[" * 199 + b"]" * 199), "it is nested more than 200 deep"),
        (b'{"args":[%b]}' % (b"[" * 50_000 + b"]" * 50_000), "it is nested more than 200 deep"),
        (b'{"args":[' + b"{}," * 300, "it ends too soon, after 909 bytes"),
    ],
)
def test_what_cannot_be_read_is_called_by_its_name(body: bytes, told: str) -> None:
    assert told in why(body)


def test_an_encoding_that_is_not_decoded_is_named() -> None:
    assert "its content_encoding is 'br'; only gzip and deflate are decoded" in why(b"\x0b\x06\x80", "br")


def test_a_body_may_be_nested_that_deep() -> None:
    assert SIGNATURE.decode(b'{"args":["a"],"other":%b}' % (b"[" * 199 + b"]" * 199)) == (("a",), {})


@pytest.mark.parametrize("body", [rb'{"args":["\ud83d\ude00"]}', rb'{"args":["\\ud83d"]}'])
def test_a_pair_of_surrogates_is_text(body: bytes) -> None:
    assert SIGNATURE.decode(body)[0]


@given(st.binary(max_size=60), st.sampled_from(["gzip", "deflate", None, "br"]))
def test_no_body_raises_anything_else(body: bytes, encoding: str | None) -> None:
    with suppress(UnreadableBody, InvalidArguments):
        SIGNATURE.decode(body, encoding)
