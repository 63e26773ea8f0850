"""Connections to device servers that are kept, when a server goes and another one comes to its place."""

from __future__ import annotations

import asyncio
import socket

import grpc
import pytest

from dsml_gpu.device.server import DeviceConfig, DeviceServer
from dsml_gpu.transport.grpc import ChannelPool
from dsml_gpu.wire import gpu_sim_pb2 as pb


async def device_id_at(pool: ChannelPool, address: str) -> int:
    request = pb.GetDeviceMetadataRequest()
    response = await pool.stub(address).GetDeviceMetadata(request, timeout=20, wait_for_ready=False)
    return int(response.metadata.deviceId.value)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_a_server_is_reached_at_once_where_nobody_was_before() -> None:
    """gRPC waits a second before it connects once more; who is told that a server is there need not."""

    async def talk() -> None:
        port = free_port()
        address = f"127.0.0.1:{port}"
        pool = ChannelPool()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await device_id_at(pool, address)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        server = DeviceServer(DeviceConfig(port=port, device_id=7))
        await server.start()
        try:
            assert await device_id_at(pool, address) == 7
        finally:
            await pool.close()
            await server.stop()

    asyncio.run(asyncio.wait_for(talk(), 60))
