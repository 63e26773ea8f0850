"""One suite for every transport: what `link.SendLink` and `link.RecvLink` promise."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from dsml_gpu.device.service import DeviceService
from dsml_gpu.device.settings import TransferSettings
from dsml_gpu.errors import DsmlError, OperationAborted, OperationTimeout, StreamLength
from dsml_gpu.memory.host import HostMemory
from dsml_gpu.transport.data_port import ALTERNATIVE_KEY
from dsml_gpu.transport.data_stream import DataStream, port_of
from dsml_gpu.transport.emulation import DeviceLink, LinkSettings
from dsml_gpu.transport.grpc import ChannelPool, GrpcRecvLink, GrpcSendLink
from dsml_gpu.transport.incoming import IncomingTable
from dsml_gpu.transport.link import RecvLink, SendLink, new_stream_id
from dsml_gpu.transport.p2p import PipeTable
from dsml_gpu.wire.server import RpcServer

TIMEOUT_S = 0.3
MEMORY = HostMemory()
#: Slow enough that messages wait for the link, and travel, in every test.
SLOW = LinkSettings(latency_s=2e-3, bytes_per_s=200e6)


@dataclass(frozen=True)
class Ends:
    """Opens the two ends of one stream, in either order."""

    send: Callable[[], SendLink]
    recv: Callable[[], RecvLink]
    open_streams: Callable[[], int]


@asynccontextmanager
async def p2p_ends() -> AsyncIterator[Ends]:
    table = PipeTable(TIMEOUT_S)
    stream_id = new_stream_id()
    yield Ends(lambda: table.open_send(stream_id, MEMORY), lambda: table.open_recv(stream_id, MEMORY), lambda: len(table))


@asynccontextmanager
async def grpc_ends(settings: LinkSettings, data_port: bool = False) -> AsyncIterator[Ends]:
    """A real server and a real connection, on loopback, between two devices whose links may be emulated.

    Args:
        data_port: the server's is known already.
    """
    server = RpcServer("127.0.0.1", 0)
    server.bind()
    service = DeviceService(server.address, TransferSettings(stall_timeout_s=TIMEOUT_S, link=settings))
    await server.start({"GPUDevice": service}, 60.0)
    channels = ChannelPool()
    if data_port:
        await channels.peer(server.address).connect(port_of([(ALTERNATIVE_KEY, service._data_port.alternative)]))
        assert isinstance(channels.peer(server.address).stream_send(), DataStream)
    stream_id = new_stream_id()
    table: IncomingTable = service._incoming
    source, target = (DeviceLink(settings, service._timer) if settings.emulated else None for _ in range(2))
    try:
        yield Ends(
            lambda: GrpcSendLink(channels.peer(server.address), stream_id, MEMORY, "the receiver", source),
            lambda: GrpcRecvLink(table.claim(stream_id, link=target), MEMORY, "the sender"),
            lambda: len(table),
        )
        assert len(service._timer) == 0
    finally:
        await channels.close()
        await server.stop(0)
        await service.close()


TRANSPORTS: dict[str, Callable[[], AbstractAsyncContextManager[Ends]]] = {
    "p2p": p2p_ends,
    "grpc": lambda: grpc_ends(LinkSettings()),
    "grpc by data port": lambda: grpc_ends(LinkSettings(), data_port=True),
    "grpc over emulated links": lambda: grpc_ends(SLOW),
}
pytestmark = pytest.mark.parametrize("transport", sorted(TRANSPORTS))


def slices(count: int = 20, nbytes: int = 1000) -> list[np.ndarray]:
    return [np.full(nbytes, number, np.uint8) for number in range(count)]


async def send_all(link: SendLink, data: list[np.ndarray]) -> int:
    sent = 0

    def on_sent() -> None:
        nonlocal sent
        sent += 1

    for piece in data:
        link.send(piece, on_sent)
    link.end()
    await link.drain()
    return sent


async def receive_all(link: RecvLink, count: int, nbytes: int) -> list[np.ndarray]:
    received = []
    for _ in range(count):
        received.append((await link.recv(nbytes)).copy())
        link.release()
    await link.finish()
    return received


@pytest.mark.parametrize("first", ["send", "recv"])
def test_slices_arrive_in_order_whichever_end_opens_first(transport: str, first: str) -> None:
    async def scenario() -> None:
        async with TRANSPORTS[transport]() as ends:
            if first == "send":
                sender = asyncio.ensure_future(send_all(ends.send(), slices()))
                await asyncio.wait([sender], timeout=0.05)  # so that it really is first
                receiver = asyncio.ensure_future(receive_all(ends.recv(), 20, 1000))
            else:
                receiver = asyncio.ensure_future(receive_all(ends.recv(), 20, 1000))
                await asyncio.wait([receiver], timeout=0.05)
                sender = asyncio.ensure_future(send_all(ends.send(), slices()))
            received = await receiver
            assert [int(piece[0]) for piece in received] == list(range(20))
            assert all(np.array_equal(piece, expected) for piece, expected in zip(received, slices(), strict=True))
            assert await sender == 20, "on_sent is called once for each slice"
            assert ends.open_streams() == 0

    asyncio.run(scenario())


def test_a_stream_without_slices_ends_well(transport: str) -> None:
    async def scenario() -> None:
        async with TRANSPORTS[transport]() as ends:
            sent, received = await asyncio.gather(send_all(ends.send(), []), receive_all(ends.recv(), 0, 1))
            assert (sent, received) == (0, [])
            assert ends.open_streams() == 0

    asyncio.run(scenario())


@asynccontextmanager
async def open_pair(transport: str) -> AsyncIterator[tuple[SendLink, RecvLink, asyncio.Task[None], Ends]]:
    """Both ends, with the sending one draining; afterwards both have given up."""
    async with TRANSPORTS[transport]() as ends:
        sender, receiver = ends.send(), ends.recv()
        draining = asyncio.ensure_future(sender.drain())
        try:
            yield sender, receiver, draining, ends
        finally:
            draining.cancel()
            await asyncio.gather(draining, return_exceptions=True)
            sender.abort(OperationAborted("the test is over"))
            receiver.abort(OperationAborted("the test is over"))


@pytest.mark.parametrize("nbytes", [999, 1001])
def test_a_slice_of_another_length_is_an_error(transport: str, nbytes: int) -> None:
    async def scenario() -> None:
        async with open_pair(transport) as (sender, receiver, _, _):
            sender.send(slices()[0], lambda: None)
            with pytest.raises(StreamLength, match=f"expected a slice of {nbytes} bytes.*got 1000 bytes"):
                await receiver.recv(nbytes)

    asyncio.run(scenario())


def test_one_slice_too_few(transport: str) -> None:
    async def scenario() -> None:
        async with open_pair(transport) as (sender, receiver, _, _):
            sender.end()
            with pytest.raises(StreamLength, match="got the end of the stream"):
                await receiver.recv(1000)

    asyncio.run(scenario())


def test_one_slice_too_many(transport: str) -> None:
    async def scenario() -> None:
        async with open_pair(transport) as (sender, receiver, _, _):
            sender.send(slices()[0], lambda: None)
            with pytest.raises(StreamLength, match=r"expected the end of the stream.*got 1000 bytes more"):
                await receiver.finish()

    asyncio.run(scenario())


def test_the_receiver_hears_that_the_sender_gave_up(transport: str) -> None:
    async def scenario() -> None:
        async with open_pair(transport) as (sender, receiver, _, ends):
            sender.send(slices()[0], lambda: None)
            await receiver.recv(1000)
            receiver.release()
            waiting = asyncio.ensure_future(receiver.recv(1000))
            sender.abort(OperationAborted("rank 3 has no more paper"))
            with pytest.raises(OperationAborted):
                await asyncio.wait_for(waiting, 5)
            receiver.abort(OperationAborted("so do I"))
            assert ends.open_streams() == 0

    asyncio.run(scenario())


def test_the_sender_hears_that_the_receiver_gave_up(transport: str) -> None:
    async def scenario() -> None:
        async with open_pair(transport) as (sender, receiver, draining, _):
            sender.send(slices()[0], lambda: None)
            await receiver.recv(1000)
            receiver.abort(OperationAborted("rank 3 has no more paper"))
            # Over gRPC the reason is lost when a message of ours meets the closed stream before the status comes.
            with pytest.raises(OperationAborted, match=r"rank 3 has no more paper|gave up"):
                await asyncio.wait_for(draining, 5)

    asyncio.run(scenario())


def test_a_sender_that_has_given_up_takes_no_more(transport: str) -> None:
    async def scenario() -> None:
        async with open_pair(transport) as (sender, _, _, _):
            sender.abort(OperationAborted("enough"))
            with pytest.raises(OperationAborted, match="enough"):
                sender.send(slices()[0], lambda: None)

    asyncio.run(scenario())


def test_a_receiver_whose_sender_never_comes_does_not_wait_for_ever(transport: str) -> None:
    async def scenario() -> None:
        async with TRANSPORTS[transport]() as ends:
            with pytest.raises(OperationTimeout, match=r"did not come for 0.3 s"):
                await asyncio.wait_for(ends.recv().recv(1), 5)
            assert ends.open_streams() == 0

    asyncio.run(scenario())


def test_a_sender_whose_receiver_never_comes_does_not_wait_for_ever(transport: str) -> None:
    async def scenario() -> None:
        async with TRANSPORTS[transport]() as ends:
            with pytest.raises(DsmlError, match=r"did not come for 0.3 s|gave up"):
                await asyncio.wait_for(send_all(ends.send(), slices()), 5)
            assert ends.open_streams() == 0

    asyncio.run(scenario())


def test_a_slow_receiver_holds_the_sender_back(transport: str) -> None:
    """What is on its way, in messages and in gRPC's own buffers, is bounded; the rest stays in the sender's memory."""

    async def scenario() -> None:
        async with open_pair(transport) as (sender, receiver, draining, _):
            taken = 0

            def on_sent() -> None:
                nonlocal taken
                taken += 1

            piece = np.zeros(1 << 20, np.uint8)
            for _ in range(200):
                sender.send(piece, on_sent)
            await receiver.recv(1 << 20)
            await asyncio.wait([draining], timeout=1.0)
            assert taken < 40

    asyncio.run(scenario())
