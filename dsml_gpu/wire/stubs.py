"""Client stubs whose `DataChunk` streams go through the zero-copy codec, over a blocking or an asyncio channel."""

from __future__ import annotations

from typing import Any

from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.codec import decode_chunk, encode_chunk
from dsml_gpu.wire.gpu_sim_pb2_grpc import GPUCoordinatorStub, GPUDeviceStub

#: Messages of up to 1 GiB of payload, and room for the fields around it.
DEFAULT_MAX_MESSAGE_BYTES = (1 << 30) + (1 << 16)
#: Payload of one message of a streaming copy.
COPY_SLICE_BYTES = 1 << 20


def channel_options(max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> list[tuple[str, int]]:
    """gRPC options that both ends of a connection use."""
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # gRPC's own limit is two minutes, for which a server that was restarted would still count as gone.
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]


def device_stub(channel: Any) -> Any:
    """Stub of GPUDevice over a `grpc.Channel` or a `grpc.aio.Channel`."""
    stub: Any = GPUDeviceStub(channel)
    stub.StreamSend = channel.stream_unary("/gpu_sim.GPUDevice/StreamSend", encode_chunk, pb.StreamSendResponse.FromString)
    _use_codec(stub, channel, "GPUDevice")
    return stub


def coordinator_stub(channel: Any) -> Any:
    """Stub of GPUCoordinator over a `grpc.Channel` or a `grpc.aio.Channel`."""
    stub: Any = GPUCoordinatorStub(channel)
    _use_codec(stub, channel, "GPUCoordinator")
    return stub


def _use_codec(stub: Any, channel: Any, service: str) -> None:
    stub.StreamHostToDevice = channel.stream_unary(
        f"/gpu_sim.{service}/StreamHostToDevice", encode_chunk, pb.StreamHostToDeviceResponse.FromString
    )
    stub.StreamDeviceToHost = channel.unary_stream(
        f"/gpu_sim.{service}/StreamDeviceToHost", pb.StreamDeviceToHostRequest.SerializeToString, decode_chunk
    )
