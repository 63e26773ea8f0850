"""As much of HTTP/2 (RFC 9113) as a client-streaming gRPC call needs: the bytes of frames and headers, without I/O."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from urllib.parse import quote, unquote

#: With which a client begins.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
#: Length of a frame's header.
FRAME_HEADER_BYTES = 9
#: The longest frame that a length can tell of.
LONGEST_FRAME_BYTES = (1 << 24) - 1
#: What a connection begins with, before its settings are known.
DEFAULT_WINDOW_BYTES, DEFAULT_FRAME_BYTES = (1 << 16) - 1, 1 << 14
#: No window may be larger.
LARGEST_WINDOW_BYTES = (1 << 31) - 1

# Kinds of frames.
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
# Flags of frames; which one a bit is depends on the kind.
END_STREAM = ACK = 0x1
END_HEADERS, PADDED, WITH_PRIORITY = 0x4, 0x8, 0x20
# Settings.
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 3, 4, 5
# Why a stream or a connection is ended.
NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR, CANCEL = 0, 1, 3, 6, 8

_FRAME = struct.Struct(">HBBBL")
_SETTING = struct.Struct(">HL")
_NUMBER = struct.Struct(">L")
#: The one indexed header that is used here.
_STATUS_200 = 0x88


class ProtocolError(Exception):
    """The other end does not speak HTTP/2 as it should.

    Attributes:
        code: which the connection is ended with.
    """

    def __init__(self, message: str, code: int = PROTOCOL_ERROR) -> None:
        super().__init__(message)
        self.code = code


def frame_header(length: int, kind: int, flags: int, stream: int) -> bytes:
    """The header of a frame."""
    return _FRAME.pack(length >> 8, length & 0xFF, kind, flags, stream)


def read_frame_header(buffer: bytearray, position: int) -> tuple[int, int, int, int]:
    """Length, kind, flags and stream of a frame."""
    high, low, kind, flags, stream = _FRAME.unpack_from(buffer, position)
    return high << 8 | low, kind, flags, stream & LARGEST_WINDOW_BYTES


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    return frame_header(len(payload), kind, flags, stream) + payload


def settings_frame(settings: Iterable[tuple[int, int]]) -> bytes:
    """A SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*setting) for setting in settings))


def read_settings(payload: bytes) -> list[tuple[int, int]]:
    """The settings of a frame. Raises ProtocolError."""
    if len(payload) % _SETTING.size:
        raise ProtocolError(f"settings of {len(payload)} bytes", FRAME_SIZE_ERROR)
    return list(_SETTING.iter_unpack(payload))


def number_frame(kind: int, stream: int, number: int) -> bytes:
    """A frame that is a number: WINDOW_UPDATE or RST_STREAM."""
    return frame(kind, 0, stream, _NUMBER.pack(number))


def read_number(payload: bytes) -> int:
    """The number of such a frame. Raises ProtocolError."""
    if len(payload) != _NUMBER.size:
        raise ProtocolError(f"a number of {len(payload)} bytes", FRAME_SIZE_ERROR)
    return int(_NUMBER.unpack(payload)[0])


def goaway_frame(code: int, reason: str) -> bytes:
    """A GOAWAY frame of an end that begins no streams, or has none left."""
    return frame(GOAWAY, 0, 0, _NUMBER.pack(0) + _NUMBER.pack(code) + reason.encode())


def headers_frame(stream: int, flags: int, headers: Iterable[tuple[str, str]]) -> bytes:
    """A HEADERS frame whose headers are literals: neither end keeps a table."""
    block = bytearray()
    for name, value in headers:
        if (name, value) == (":status", "200"):
            block.append(_STATUS_200)
            continue
        block.append(0)
        for word in (name.encode(), value.encode()):
            block += _length(len(word)) + word
    return frame(HEADERS, flags | END_HEADERS, stream, bytes(block))


def read_headers(block: bytes) -> dict[str, str]:
    """The headers of `headers_frame`. Raises ProtocolError for those that another encoder made."""
    headers: dict[str, str] = {}
    position = 0
    try:
        while position < len(block):
            position += 1
            if block[position - 1] == _STATUS_200:
                headers[":status"] = "200"
                continue
            if block[position - 1] != 0:
                raise ProtocolError("headers that are no literals")
            words = []
            for _ in range(2):
                length, position = _read_length(block, position)
                words.append(block[position : position + length].decode())
                position += length
            headers[words[0]] = words[1]
    except (IndexError, UnicodeDecodeError) as error:
        raise ProtocolError(f"headers that cannot be read: {error}") from None
    return headers


def quoted(message: str) -> str:
    """A text as gRPC sends it in a header."""
    return quote(message, safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}")


def unquoted(value: str) -> str:
    """The text."""
    return unquote(value)


def _length(value: int) -> bytes:
    """A length below 128, or one in several bytes; always without Huffman's code."""
    if value < 0x7F:
        return bytes([value])
    out = bytearray([0x7F])
    value -= 0x7F
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_length(block: bytes, position: int) -> tuple[int, int]:
    first = block[position]
    if first & 0x80:
        raise ProtocolError("headers in Huffman's code")
    position += 1
    if first < 0x7F:
        return first, position
    value = shift = 0
    while True:
        byte = block[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value + 0x7F, position
        shift += 7
        if shift > 21:
            raise ProtocolError("a header of more than 256 MiB")
