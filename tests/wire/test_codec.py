"""The hand-written `DataChunk` codec against the generated class."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.codec import Chunk, decode_chunk, encode_chunk

ids = st.integers(0, (1 << 64) - 1)
headers = st.none() | st.builds(
    lambda stream, device, addr, size: pb.DataChunk(
        streamId=stream, deviceId=pb.DeviceId(value=device), memAddr=pb.MemAddr(value=addr), numBytes=size
    ),
    ids,
    ids,
    ids,
    ids,
)


@given(st.binary(max_size=400), headers)
def test_bytes_are_those_of_the_generated_class(data: bytes, header: pb.DataChunk | None) -> None:
    message = pb.DataChunk(data=data)
    if header is not None:
        message.MergeFrom(header)
    encoded = encode_chunk(Chunk(data, header))
    assert encoded == message.SerializeToString()
    decoded = decode_chunk(encoded)
    assert bytes(decoded.data) == data
    assert (decoded.header or pb.DataChunk()) == (header or pb.DataChunk())


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, 1 << 20, (1 << 21) + 1])
def test_lengths_at_the_edges_of_the_varint(size: int) -> None:
    data = np.arange(size, dtype=np.uint8)
    encoded = encode_chunk(Chunk(data))
    assert encoded == pb.DataChunk(data=data.tobytes()).SerializeToString()
    assert np.array_equal(np.frombuffer(decode_chunk(encoded).data, np.uint8), data)


def test_arrays_of_any_type_go_as_their_bytes() -> None:
    values = np.linspace(0, 1, 5)
    assert bytes(decode_chunk(encode_chunk(Chunk(values))).data) == values.tobytes()


def test_the_payload_is_not_copied() -> None:
    encoded = encode_chunk(Chunk(b"payload"))
    data = decode_chunk(encoded).data
    assert isinstance(data, memoryview)
    assert data.obj is encoded


@pytest.mark.parametrize(
    "encoded",
    [
        pytest.param(b"\xa0\x06\x05\x0a\x01x", id="header before the data"),
        pytest.param(b"\x0a\x81\x00x\xa0\x06\x05", id="length in two bytes where one would do"),
        pytest.param(b"\x0a\x01y\x0a\x01x\xa0\x06\x05", id="data twice, the last counts"),
        pytest.param(b"\x0a\x01x\xa0\x06\x05\xf8\x3f\x01", id="a field of a later version"),
    ],
)
def test_every_valid_encoding_is_understood(encoded: bytes) -> None:
    decoded = decode_chunk(encoded)
    assert bytes(decoded.data) == b"x"
    assert decoded.header is not None
    assert decoded.header.streamId == 5


@given(st.binary(max_size=60))
def test_any_bytes_are_taken_or_refused_as_the_generated_class_does(encoded: bytes) -> None:
    try:
        expected = pb.DataChunk.FromString(encoded)
    except DecodeError:
        with pytest.raises(DecodeError):
            decode_chunk(encoded)
        return
    decoded = decode_chunk(encoded)
    assert bytes(decoded.data) == expected.data
    assert (decoded.header or pb.DataChunk()).streamId == expected.streamId
