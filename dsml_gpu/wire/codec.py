"""`DataChunk` to and from the wire without protobuf's copies of the payload.

The bytes are exactly those of the generated class. Encoding copies the payload once, into the message that gRPC takes;
decoding does not copy it at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsml_gpu.wire import gpu_sim_pb2 as pb

_DATA_TAG = 0x0A  # field 1, length-delimited


@dataclass(frozen=True, slots=True)
class Chunk:
    """A `DataChunk` whose payload is a view.

    Attributes:
        data: the payload, anything with the buffer protocol; `decode_chunk` gives bytes or a memoryview.
        header: a `DataChunk` with the additive fields and no data; None where all are absent.
    """

    data: Any
    header: pb.DataChunk | None = None


def encode_chunk(chunk: Chunk | bytes) -> bytes:
    """The wire bytes of a chunk; bytes are taken for what this has made of one before."""
    if isinstance(chunk, bytes):
        return chunk
    view = memoryview(chunk.data)
    size = view.nbytes
    header = chunk.header.SerializeToString() if chunk.header is not None else b""
    if not size:
        return header
    return b"".join((_DATA_PREFIX, _varint(size), view, header))


def pieces_of(chunk: Chunk) -> list[Any]:
    """The wire bytes of a chunk in pieces of which the payload is one, not copied."""
    view = memoryview(chunk.data)
    pieces: list[Any] = [_DATA_PREFIX + _varint(view.nbytes), view] if view.nbytes else []
    if chunk.header is not None:
        pieces.append(chunk.header.SerializeToString())
    return pieces


def decode_chunk(message: bytes | memoryview) -> Chunk:
    """The chunk of wire bytes; its data is a view of `message` where the message is payload only.

    Raises:
        google.protobuf.message.DecodeError: not a DataChunk.
    """
    if message and message[0] == _DATA_TAG:
        size, start = _read_varint(message, 1)
        if start + size == len(message):
            return Chunk(memoryview(message)[start:])
    parsed = pb.DataChunk.FromString(bytes(message))
    data = parsed.data
    parsed.ClearField("data")
    return Chunk(data, parsed)


_DATA_PREFIX = bytes([_DATA_TAG])


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(message: bytes | memoryview, position: int) -> tuple[int, int]:
    """Value and the position behind it; a value that no message can hold where the varint is cut short or too long."""
    value = shift = 0
    for index in range(position, min(position + 10, len(message))):
        byte = message[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, index + 1
        shift += 7
    return 1 << 70, position
