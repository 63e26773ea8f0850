"""Frames and headers of HTTP/2, and messages that come in any pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsml_gpu.wire import http2
from dsml_gpu.wire.http2_connection import Receiving

texts = st.text(max_size=300)


@given(st.integers(0, http2.LONGEST_FRAME_BYTES), st.integers(0, 9), st.integers(0, 255), st.integers(0, (1 << 31) - 1))
def test_a_frame_header_is_read_as_it_was_written(length: int, kind: int, flags: int, stream: int) -> None:
    header = http2.frame_header(length, kind, flags, stream)
    assert len(header) == http2.FRAME_HEADER_BYTES
    assert http2.read_frame_header(bytearray(b"x" + header), 1) == (length, kind, flags, stream)


@given(st.dictionaries(texts, texts))
def test_headers_are_read_as_they_were_written(headers: dict[str, str]) -> None:
    frame = http2.headers_frame(1, 0, headers.items())
    assert http2.read_headers(frame[http2.FRAME_HEADER_BYTES :]) == headers


@pytest.mark.parametrize("length", [0, 126, 127, 128, 254, 255, 16510, 16511])
def test_lengths_of_headers_at_the_edges(length: int) -> None:
    frame = http2.headers_frame(1, 0, [(":status", "200"), ("key", "v" * length)])
    assert http2.read_headers(frame[http2.FRAME_HEADER_BYTES :]) == {":status": "200", "key": "v" * length}


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b"\x82", id="of the table"),
        pytest.param(b"\0\x83abc\0", id="in Huffman's code"),
        pytest.param(b"\0\x7f\xff\xff\xff\xff\xff", id="longer than can be"),
        pytest.param(b"\0\x03ab", id="cut short"),
        pytest.param(b"\0\x01\xff\x00", id="no text"),
    ],
)
def test_headers_that_are_not_ours_are_refused(block: bytes) -> None:
    with pytest.raises(http2.ProtocolError):
        http2.read_headers(block)


@given(texts)
def test_what_gRPC_quotes(message: str) -> None:
    quoted = http2.quoted(message)
    assert quoted.isascii()
    assert quoted.isprintable() or not quoted
    assert http2.unquoted(quoted) == message


@given(st.lists(st.binary(max_size=40), max_size=6), st.data())
def test_messages_come_in_any_pieces(messages: list[bytes], data: st.DataObject) -> None:
    got: list[bytes] = []
    begun: list[int] = []
    receiving = Receiving(lambda message: got.append(bytes(message)), begun.append)
    rest = b"".join(b"\0" + len(message).to_bytes(4, "big") + message for message in messages)
    total = len(rest)
    while rest:
        where = receiving.rest()
        nbytes = data.draw(st.integers(1, len(rest)))
        if where is not None and data.draw(st.booleans()):  # straight to where it goes
            nbytes = min(nbytes, len(where))
            where[:nbytes] = rest[:nbytes]
            receiving.filled(nbytes)
        else:
            receiving.take(memoryview(rest[:nbytes]))
        rest = rest[nbytes:]
        assert receiving.position == total - len(rest)
    assert got == messages
    assert begun == [len(message) for message in messages]
    assert receiving.between_messages
