"""Emulated links: their arithmetic without a clock, and real streams over them, which are never faster than the link.

Lower bounds on times are exact. Upper bounds leave room for a busy machine, and only tell apart what differs by a lot.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest

from dsml_gpu.device.device import Device, Membership, Peer
from dsml_gpu.device.service import DeviceService
from dsml_gpu.device.settings import TransferSettings
from dsml_gpu.errors import InvalidValue, OperationAborted
from dsml_gpu.memory.arena import Arena
from dsml_gpu.memory.backend import NUMPY
from dsml_gpu.memory.host import HostMemory
from dsml_gpu.transport.emulation import DelayLine, DeviceLink, EgressClock, IngressClock, LinkSettings
from dsml_gpu.transport.grpc import ChannelPool, GrpcRecvLink, GrpcSendLink
from dsml_gpu.transport.incoming import ArrivalQueue, IncomingTable
from dsml_gpu.transport.link import new_stream_id
from dsml_gpu.transport.queue import ClosableQueue
from dsml_gpu.transport.timer import Timer
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.codec import Chunk, decode_chunk
from dsml_gpu.wire.server import RpcServer

MEMORY = HostMemory()
KB = 1000
MIB = 1 << 20
#: A message of n bytes takes n seconds.
BYTE_A_SECOND = LinkSettings(bytes_per_s=1)
UNLIMITED = LinkSettings(latency_s=1)


# ---- settings ------------------------------------------------------------------------------------------------------------


def test_a_link_is_not_emulated_unless_it_is_asked_for() -> None:
    assert not LinkSettings().emulated
    assert LinkSettings(latency_s=1e-6).emulated
    assert LinkSettings(bytes_per_s=1e12).emulated


@pytest.mark.parametrize("latency_s", [-1e-9, math.inf, math.nan])
def test_latencies_that_no_link_has(latency_s: float) -> None:
    with pytest.raises(InvalidValue, match=f"latency of a link must be 0 s or more, not {latency_s:g}"):
        LinkSettings(latency_s=latency_s)


@pytest.mark.parametrize("bytes_per_s", [-1, 0.5, math.inf, math.nan])
def test_bandwidths_that_no_link_has(bytes_per_s: float) -> None:
    with pytest.raises(InvalidValue, match=f"bandwidth of a link must be 1 byte/s or more.*not {bytes_per_s:g}"):
        LinkSettings(bytes_per_s=bytes_per_s)


def test_a_link_on_which_every_message_would_count_as_stalled_is_refused() -> None:
    settings = LinkSettings(bytes_per_s=100 * KB)
    with pytest.raises(InvalidValue, match=r"1048576 bytes takes 10\.5 s .* stall timeout of 10 s"):
        TransferSettings(stall_timeout_s=10, link=settings)
    with pytest.raises(InvalidValue, match=r"takes 20 s .* stall timeout of 10 s"):
        TransferSettings(stall_timeout_s=10, link=LinkSettings(latency_s=20))
    assert TransferSettings(stall_timeout_s=11, link=settings).link == settings


def test_what_bandwidth_and_latency_make_travel_may_travel() -> None:
    assert LinkSettings(0.1, 1e9).window_bytes > 1e8


# ---- egress, by arithmetic ---------------------------------------------------------------------------------------------


def test_messages_leave_one_after_the_other() -> None:
    egress = EgressClock(BYTE_A_SECOND)
    assert [egress.leave(100, 3), egress.leave(100, 2), egress.leave(104, 1)] == [103, 105, 106]


def test_an_idle_link_saves_nothing_up() -> None:
    egress = EgressClock(BYTE_A_SECOND)
    egress.leave(100, 1)
    assert [egress.leave(200, 5), egress.leave(201, 5)] == [205, 210]


def test_a_late_sender_is_not_later_for_it() -> None:
    """What was ready while the link was busy follows at once, whenever it is asked about."""
    egress = EgressClock(BYTE_A_SECOND)
    assert [egress.leave(100, 1) for _ in range(1000)][-1] == 1100


def test_without_a_limit_messages_leave_when_they_are_ready_and_in_order() -> None:
    egress = EgressClock(UNLIMITED)
    assert [egress.leave(5, MIB), egress.leave(7, MIB), egress.leave(6, MIB)] == [5, 7, 7]


# ---- ingress, by arithmetic --------------------------------------------------------------------------------------------


def test_a_flow_that_meets_no_other_is_not_delayed_again() -> None:
    ingress = IngressClock(BYTE_A_SECOND)
    arrivals = [103, 105, 106, 206, 210]
    assert [ingress.receive(at, nbytes) for at, nbytes in zip(arrivals, (3, 2, 1, 100, 4), strict=True)] == arrivals


def test_messages_that_arrive_together_share_the_link() -> None:
    ingress = IngressClock(BYTE_A_SECOND)
    # Three senders, each of a message of 2 s every 2 s: the link takes 6 s for what arrives in 2.
    arrivals = [at for at in (2, 4, 6, 8) for _ in range(3)]
    assert [ingress.receive(at, 2) for at in arrivals] == [2 * (number + 1) for number in range(12)]


def test_messages_that_overlap_share_the_link() -> None:
    ingress = IngressClock(BYTE_A_SECOND)
    assert ingress.receive(104, 4) == 104
    assert ingress.receive(106, 4) == 108, "2 of its 4 s were the first one's"


def test_a_faster_sender_is_held_to_the_rate_of_the_receiver() -> None:
    ingress = IngressClock(BYTE_A_SECOND)
    received = [ingress.receive(100 + number / 10, 1) for number in range(100)]
    assert received[0] == 100
    np.testing.assert_allclose(np.diff(received), 1)


def test_a_small_message_in_the_middle_of_a_large_one_takes_its_own_time_only() -> None:
    ingress = IngressClock(BYTE_A_SECOND)
    assert [ingress.receive(at, 1) for at in (150, 160, 170)] == [150, 160, 170]
    assert ingress.receive(200, 100) == 203
    assert ingress.receive(200, 0) == 203, "the end of a stream does not overtake"


def test_a_message_cannot_use_time_in_which_the_link_was_busy_before_it_came() -> None:
    ingress = IngressClock(BYTE_A_SECOND)
    assert [ingress.receive(100, 10), ingress.receive(100, 10)] == [100, 110]
    assert ingress.receive(112, 4) == 114


def test_without_a_limit_messages_are_received_when_they_come() -> None:
    ingress = IngressClock(UNLIMITED)
    assert [ingress.receive(5, MIB), ingress.receive(5, MIB), ingress.receive(6, 1)] == [5, 5, 6]


def test_the_directions_of_a_link_are_independent() -> None:
    link = DeviceLink(BYTE_A_SECOND, Timer())
    assert link.egress.leave(0, 100) == 100
    assert link.ingress.receive(50, 50) == 50
    assert link.egress.leave(0, 1) == 101


# ---- a stream's delay line ----------------------------------------------------------------------------------------------


@dataclass
class FakeCall:
    """What a `DelayLine` uses of an `OutgoingStream`: notes what is written and when, once `taking` is set."""

    taking: asyncio.Event = field(default_factory=asyncio.Event)
    written: list[tuple[bytes, float]] = field(default_factory=list)
    ended: bool = False

    async def write(self, message: bytes) -> None:
        await self.taking.wait()
        self.written.append((bytes(decode_chunk(message).data), time.monotonic()))

    async def end(self) -> None:
        self.ended = True


@asynccontextmanager
async def fake_line(settings: LinkSettings) -> AsyncIterator[tuple[DelayLine, FakeCall, Timer]]:
    """A delay line; at the end nothing of it may be left."""
    call, timer = FakeCall(), Timer()
    line = DelayLine(cast(Any, call), DeviceLink(settings, timer))
    yield line, call, timer
    await asyncio.wait_for(line.stop(), 5)
    assert len(timer) == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}
    timer.close()


async def write(line: DelayLine, messages: int) -> None:
    """Writes messages of 1 MiB that are all ready now."""
    ready_s = time.monotonic()
    for _ in range(messages):
        await line.write(Chunk(bytes(MIB)), ready_s)


def test_a_message_is_free_when_it_has_left_and_arrives_one_latency_later() -> None:
    async def scenario() -> None:
        async with fake_line(LinkSettings(0.3, 1 * MIB)) as (line, call, _):
            call.taking.set()
            data = bytearray(b"x" * (MIB // 20))
            started_s = time.monotonic()
            await line.write(Chunk(data), started_s)
            left_s = time.monotonic()
            assert 0.05 <= left_s - started_s < 0.35
            assert not call.written
            data[:] = bytes(len(data))  # as the next operation might
            await line.end()
            ((written, at_s),) = call.written
            assert written == b"x" * (MIB // 20)
            assert started_s + 0.35 <= at_s < left_s + 2
            assert call.ended

    asyncio.run(scenario())


@pytest.mark.parametrize("settings", [LinkSettings(1e-6, 1e12), LinkSettings(1e-6)], ids=["limited", "unlimited"])
def test_what_travels_is_bounded_where_the_other_end_takes_nothing(settings: LinkSettings) -> None:
    async def scenario() -> None:
        async with fake_line(settings) as (line, _, _):
            writing = asyncio.ensure_future(write(line, 100))
            await asyncio.wait([writing], timeout=0.2)
            assert settings.window_bytes <= line._travelling_bytes <= settings.window_bytes + MIB
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    asyncio.run(scenario())


def test_a_link_that_was_held_up_has_saved_no_bandwidth() -> None:
    async def scenario() -> None:
        async with fake_line(LinkSettings(bytes_per_s=40 * MIB)) as (line, call, _):
            writing = asyncio.ensure_future(write(line, 4 + 8))  # 4: what the line holds
            await asyncio.wait([writing], timeout=0.5)  # by now a free link would have sent them all
            freed_s = time.monotonic()
            call.taking.set()
            await asyncio.wait_for(writing, 10)
            assert time.monotonic() - freed_s >= 8 / 40
            await line.end()

    asyncio.run(scenario())


@pytest.mark.parametrize("slow", ["bandwidth", "latency", "the other end"])
def test_closing_a_line_ends_everything_at_once(slow: str) -> None:
    settings = {"bandwidth": LinkSettings(0, MIB / 60), "latency": LinkSettings(60, 0), "the other end": LinkSettings(1e-6)}

    async def scenario() -> None:
        async with fake_line(settings[slow]) as (line, _, timer):
            writing = asyncio.ensure_future(write(line, 100))
            await asyncio.wait([writing], timeout=0.2)
            assert len(timer) == (0 if slow == "the other end" else 1)
            line.close(OperationAborted("enough"))
            with pytest.raises(OperationAborted, match="enough"):
                await asyncio.wait_for(writing, 5)
            with pytest.raises(OperationAborted, match="enough"):
                await asyncio.wait_for(line.end(), 5)

    asyncio.run(scenario())


# ---- real streams --------------------------------------------------------------------------------------------------------


class Network:
    """Devices with emulated links behind one real server, on loopback."""

    def __init__(self, service: DeviceService, address: str, settings: LinkSettings) -> None:
        self._table: IncomingTable = service._incoming
        self._settings = settings
        self._address = address
        self.timer: Timer = service._timer
        self.channels = ChannelPool()

    def device(self, settings: LinkSettings | None = None) -> DeviceLink:
        """The link of a new device."""
        return DeviceLink(settings or self._settings, self.timer)

    def open(self, source: DeviceLink, target: DeviceLink) -> tuple[GrpcSendLink, GrpcRecvLink]:
        """Both ends of a new stream."""
        stream_id = new_stream_id()
        server = self.channels.peer(self._address)
        return (
            GrpcSendLink(server, stream_id, MEMORY, "the receiver", source),
            GrpcRecvLink(self._table.claim(stream_id, link=target), MEMORY, "the sender"),
        )

    async def carry(self, source: DeviceLink, target: DeviceLink, count: int, nbytes: int) -> tuple[float, float]:
        """When the last of some messages, all ready at the beginning, has left its memory, and when it was received."""
        sender, receiver = self.open(source, target)
        sent_s: list[float] = []

        async def send() -> None:
            for _ in range(count):
                sender.send(np.zeros(nbytes, np.uint8), lambda: sent_s.append(time.monotonic()))
            sender.end()
            await sender.drain()

        async def receive() -> float:
            for _ in range(count):
                await receiver.recv(nbytes)
                receiver.release()
            received_s = time.monotonic()
            await receiver.finish()
            return received_s

        _, received_s = await asyncio.wait_for(asyncio.gather(send(), receive()), 30)
        assert len(sent_s) == count
        return sent_s[-1], received_s


@asynccontextmanager
async def network(settings: LinkSettings) -> AsyncIterator[Network]:
    server = RpcServer("127.0.0.1", 0)
    server.bind()
    service = DeviceService(server.address, TransferSettings(link=settings))
    await server.start({"GPUDevice": service}, 60.0)
    network = Network(service, server.address, settings)
    try:
        # Connected beforehand, as in all but the first collective.
        await network.carry(network.device(), network.device(), 1, 8)
        yield network
        assert len(network.timer) == 0
        assert len(network._table) == 0
    finally:
        await network.channels.close()
        await server.stop(0)
        await service.close()


@pytest.mark.alone
def test_one_flow_has_the_bandwidth_and_the_latency_once() -> None:
    async def scenario() -> None:
        async with network(LinkSettings(1.0, 1 * MIB)) as net:
            started_s = time.monotonic()
            left_s, received_s = await net.carry(net.device(), net.device(), 8, MIB // 8)
            assert started_s + 1 <= left_s
            assert started_s + 2 <= received_s < started_s + 2.9, "once more of either would be 3 s"

    asyncio.run(scenario())


@pytest.mark.alone
def test_latency_does_not_limit_bandwidth() -> None:
    async def scenario() -> None:
        async with network(LinkSettings(0.1, 50 * MIB)) as net:
            started_s = time.monotonic()
            _, received_s = await net.carry(net.device(), net.device(), 100, MIB // 20)
            assert started_s + 0.2 <= received_s < started_s + 2, "one at a time they would take 10 s"

    asyncio.run(scenario())


@pytest.mark.alone
def test_messages_smaller_than_a_wake_up_is_precise_have_the_bandwidth_too() -> None:
    async def scenario() -> None:
        async with network(LinkSettings(0, 10 * MIB)) as net:
            started_s = time.monotonic()
            _, received_s = await net.carry(net.device(), net.device(), 256, 4096)  # 0.39 ms each
            assert started_s + 0.1 <= received_s < started_s + 1

    asyncio.run(scenario())


@pytest.mark.alone
def test_lateness_does_not_add_up() -> None:
    """Whoever is told late that a message has left still sends the next one behind it as if told in time."""

    async def scenario() -> None:
        async with network(LinkSettings(0, MIB * 5 // 4)) as net:
            sender, receiver = net.open(net.device(), net.device())
            started_s = time.monotonic()
            for _ in range(16):
                # 100 ms each. The event loop stands still meanwhile, as it does where ranks reduce.
                sender.send(np.zeros(MIB // 8, np.uint8), lambda: time.sleep(0.08))
            sender.end()
            draining = asyncio.ensure_future(sender.drain())
            for _ in range(16):
                await receiver.recv(MIB // 8)
                receiver.release()
            assert 1.6 <= time.monotonic() - started_s < 2.6, "it would add up to 2.88 s"
            await receiver.finish()
            await draining

    asyncio.run(scenario())


@pytest.mark.alone
def test_two_senders_into_one_receiver_take_twice_as_long() -> None:
    async def scenario() -> None:
        async with network(LinkSettings(1e-3, 5 * MIB)) as net:
            target = net.device()
            started_s = time.monotonic()
            flows = await asyncio.gather(*(net.carry(net.device(), target, 8, MIB // 8) for _ in range(2)))
            last_s = max(received_s for _, received_s in flows)
            assert started_s + 0.4 + 1e-3 <= last_s < started_s + 3
            # They share: neither is through before the other has had nearly as much.
            assert min(received_s for _, received_s in flows) > started_s + 0.3

    asyncio.run(scenario())


@pytest.mark.alone
def test_one_sender_to_two_receivers_takes_twice_as_long() -> None:
    async def scenario() -> None:
        async with network(LinkSettings(1e-3, 5 * MIB)) as net:
            source = net.device()
            started_s = time.monotonic()
            flows = await asyncio.gather(*(net.carry(source, net.device(), 8, MIB // 8) for _ in range(2)))
            assert started_s + 0.4 + 1e-3 <= max(received_s for _, received_s in flows) < started_s + 3
            assert min(received_s for _, received_s in flows) > started_s + 0.3

    asyncio.run(scenario())


@pytest.mark.alone
def test_sending_and_receiving_do_not_share() -> None:
    async def scenario() -> None:
        async with network(LinkSettings(0, 1 * MIB)) as net:
            first, second = net.device(), net.device()
            started_s = time.monotonic()
            await asyncio.gather(net.carry(first, second, 16, MIB // 8), net.carry(second, first, 16, MIB // 8))
            assert 2 <= time.monotonic() - started_s < 3.8, "half duplex would be 4 s"

    asyncio.run(scenario())


@pytest.mark.alone
def test_what_came_before_its_receiver_counts_from_when_it_came() -> None:
    async def scenario() -> None:
        async with network(LinkSettings(0, 1 * MIB)) as net:
            stream_id, target = new_stream_id(), net.device()
            sender = GrpcSendLink(net.channels.peer(net._address), stream_id, MEMORY, "the receiver", net.device())
            sender.send(np.zeros(MIB, np.uint8), lambda: None)
            sender.end()
            draining = asyncio.ensure_future(sender.drain())
            await asyncio.wait([draining], timeout=1.5)
            assert len(net._table) == 1, "it is there"
            receiver = GrpcRecvLink(net._table.claim(stream_id, link=target), MEMORY, "the sender")
            started_s = time.monotonic()
            await receiver.recv(MIB)
            assert time.monotonic() - started_s < 0.9, "received again it would take 1 s"
            receiver.release()
            await receiver.finish()
            await draining

    asyncio.run(scenario())


@pytest.mark.parametrize("end", ["send", "recv"])
def test_giving_up_while_a_message_waits_to_leave_ends_both_ends_at_once(end: str) -> None:
    async def scenario() -> None:
        async with network(LinkSettings(0, MIB / 20)) as net:
            sender, receiver = net.open(net.device(), net.device())
            draining = asyncio.ensure_future(sender.drain())
            sender.send(np.zeros(8, np.uint8), lambda: None)
            await receiver.recv(8)
            receiver.release()
            sender.send(np.zeros(MIB, np.uint8), lambda: None)  # takes 20 s
            receiving = asyncio.ensure_future(receiver.recv(MIB))
            await asyncio.wait([draining, receiving], timeout=0.1)
            assert len(net.timer) == 1
            (sender if end == "send" else receiver).abort(OperationAborted("enough"))
            results = await asyncio.wait_for(asyncio.gather(draining, receiving, return_exceptions=True), 5)
            assert all(isinstance(result, OperationAborted) for result in results), results

    asyncio.run(scenario())


def test_a_receiver_that_waits_for_its_own_link_hears_at_once_that_the_sender_gave_up() -> None:
    async def scenario() -> None:
        async with network(LinkSettings(0, MIB / 20)) as net:
            sender, receiver = net.open(net.device(LinkSettings(0, 1e12)), net.device())
            draining = asyncio.ensure_future(sender.drain())
            for _ in range(2):
                sender.send(np.zeros(MIB, np.uint8), lambda: None)
            await receiver.recv(MIB)
            receiver.release()
            receiving = asyncio.ensure_future(receiver.recv(MIB))  # takes 20 s
            await asyncio.wait([receiving], timeout=0.2)
            assert len(net.timer) == 1
            sender.abort(OperationAborted("enough"))
            with pytest.raises(OperationAborted):
                await asyncio.wait_for(receiving, 5)
            draining.cancel()
            await asyncio.gather(draining, return_exceptions=True)

    asyncio.run(scenario())


def test_without_emulation_streams_are_as_they_were() -> None:
    async def scenario() -> None:
        plain, emulated = (
            DeviceService("here:1", TransferSettings(link=link)) for link in (LinkSettings(), LinkSettings(latency_s=1e-4))
        )
        device = Device(1, Arena(4 * MIB, NUMPY))
        membership = Membership(7, 0, (Peer(0, 1, "here:1", p2p=False), Peer(1, 2, "there:1", p2p=False)))
        for service, line, queue in ((plain, type(None), ClosableQueue), (emulated, DelayLine, ArrivalQueue)):
            service.add(device)
            links = service._links.open(device, membership, [pb.Link(peer=1, sendStreamId=1, recvStreamId=2)], [])
            sender, receiver = links.send[1], links.recv[1]
            assert isinstance(sender, GrpcSendLink)
            assert isinstance(receiver, GrpcRecvLink)
            assert isinstance(sender._line, line)
            assert isinstance(receiver._incoming.messages, queue)
            sender.abort(OperationAborted("the test is over"))
            receiver.abort(OperationAborted("the test is over"))
            await service.close()

    asyncio.run(scenario())
