"""Passes over memory as a device runs them: results, and what it takes to stop one."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dsml_gpu.device import passes
from dsml_gpu.device.device import Device
from dsml_gpu.device.passes import Pass, run_passes
from dsml_gpu.device.service import DeviceService
from dsml_gpu.device.settings import TransferSettings
from dsml_gpu.errors import (
    AddressOutOfRange,
    CommNotFound,
    CountNotMultiple,
    DsmlError,
    InternalError,
    InvalidValue,
    MemoryNotShared,
)
from dsml_gpu.memory.arena import Arena
from dsml_gpu.memory.backend import NUMPY
from dsml_gpu.memory.shared import SharedHandle, can_share
from dsml_gpu.reduction import DTYPES, OPERATORS, checked_weight
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.collectives.oracle import OPS, reduced, values_for
from tests.support.other_process import OtherProcess

KIB, MIB = 1 << 10, 1 << 20
LIMIT_S = 20.0
OPERATOR = {operator.name: operator for operator in OPERATORS}
U8, F64 = DTYPES["UINT8"], DTYPES["FLOAT64"]
COMM = 7


@pytest.fixture(autouse=True)
def large_ones_have_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is large here."""
    monkeypatch.setattr(passes, "_INLINE_BYTES", MIB)


def in_event_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **named), 3 * LIMIT_S))

    return run


def device_with(*arrays: np.ndarray) -> tuple[Device, list[np.ndarray]]:
    """A device, and views of its memory that hold the arrays, 64 bytes apart."""
    device = Device(1, Arena(4 * MIB + sum(array.nbytes + 64 for array in arrays), NUMPY))
    starts = itertools.accumulate((array.nbytes + 64 for array in arrays[:-1]), initial=64)
    views = [device.arena.view(start, array.nbytes) for start, array in zip(starts, arrays, strict=True)]
    for view, array in zip(views, arrays, strict=True):
        view[...] = np.ascontiguousarray(array).view(np.uint8)
    return device, views


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["at once", "in a thread", "in pieces"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "at once":
        monkeypatch.setattr(passes, "_INLINE_BYTES", 0)
    if request.param == "in pieces":
        monkeypatch.setattr(passes, "_PIECE_BYTES", 256)
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@in_event_loop
async def test_a_reduction_of_each_operator(way: str, dtype: np.dtype) -> None:
    for op, nsources in itertools.product(OPS, (1, 2, 3, 9)):
        sources = [values_for(dtype, op, 1003, [number, nsources]) for number in range(nsources)]
        device, views = device_with(*sources, sources[0], sources[0])
        # In place on one of them, and to two more.
        destinations = (views[nsources // 2], views[-1], views[-2])
        divisor = nsources if op == "AVG" else 1
        await run_passes(device, [Pass(dtype, OPERATOR[op], tuple(views[:nsources]), destinations, divisor=divisor)])
        expected = reduced(sources, op)
        for destination in destinations:
            np.testing.assert_array_equal(destination.view(dtype), expected, err_msg=f"{op} of {nsources}")
        for number, view in enumerate(views[:nsources]):
            if number != nsources // 2:
                np.testing.assert_array_equal(view.view(dtype), sources[number])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@in_event_loop
async def test_a_weighted_sum(way: str, dtype: np.dtype) -> None:
    weights = (2.0, 3.0, 1.0)
    for nsources in (1, 3):
        sources = [values_for(dtype, "SUM", 1003, [number]) for number in range(nsources)]
        device, views = device_with(*sources, sources[0])
        weighed = tuple(checked_weight(weight, dtype) for weight in weights[:nsources])
        destinations = (views[0], views[-1])
        await run_passes(device, [Pass(dtype, OPERATOR["SUM"], tuple(views[:nsources]), destinations, weighed)])
        expected = reduced(sources, "SUM", weights[:nsources])
        for destination in destinations:
            np.testing.assert_array_equal(destination.view(dtype), expected)
        for number in range(1, nsources):
            np.testing.assert_array_equal(views[number].view(dtype), sources[number], "a weight is not left in a source")


@in_event_loop
async def test_passes_run_in_order(way: str) -> None:
    values = [np.full(5000, number, np.float64) for number in (1, 2, 0, 0)]
    device, (one, two, three, four) = device_with(*values)
    sum_of = OPERATOR["SUM"]
    await run_passes(
        device,
        [
            Pass(F64, sum_of, (one, two), (three,)),  # 3
            Pass(F64, sum_of, (three, three), (four,)),  # 6
            Pass(F64, sum_of, (four,), (one, three)),
            Pass(F64, sum_of, (one, two), (one, two)),  # 8
        ],
    )
    assert [np.unique(view.view(F64)).tolist() for view in (one, two, three, four)] == [[8.0], [8.0], [6.0], [6.0]]


@in_event_loop
async def test_nothing_to_do_is_done() -> None:
    device, (view,) = device_with(np.zeros(8, np.uint8))
    await run_passes(device, [])
    await run_passes(device, [Pass(U8, OPERATOR["SUM"], (view[:0],), (view[:0],))])


# ---- stopping --------------------------------------------------------------------------------------------------------


class GatedReducer:
    """Reduces after it was let to, in a thread."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.calls = 0

    def is_ready(self, *arguments: Any, **named: Any) -> bool:
        return True

    def reduce(self, *arguments: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.calls += 1
        self.entered.set()
        assert self.gate.wait(LIMIT_S)
        if self.failure is not None:
            raise self.failure
        _, dtype, sources, destinations, _ = arguments
        total = np.sum([source.view(dtype) for source in sources], axis=0)
        for destination in destinations:
            destination.view(dtype)[...] = total


def large_pass(monkeypatch: pytest.MonkeyPatch, reducer: GatedReducer) -> tuple[Device, Pass]:
    """Of 64 pieces."""
    monkeypatch.setattr(passes, "_PIECE_BYTES", 3 * 64 * KIB)  # of each of three operands 64 KiB
    device, (one, two, target) = device_with(*(np.ones(4 * MIB // 8) for _ in range(3)))
    monkeypatch.setattr(device, "_reducer", reducer)
    return device, Pass(F64, OPERATOR["SUM"], (one, two), (target,))


async def entered(reducer: GatedReducer) -> None:
    assert await asyncio.to_thread(reducer.entered.wait, LIMIT_S)


async def some_turns() -> None:
    for _ in range(100):
        await asyncio.sleep(0)


@in_event_loop
async def test_one_that_is_cancelled_ends_when_its_thread_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    reducer = GatedReducer()
    device, large = large_pass(monkeypatch, reducer)
    task = asyncio.ensure_future(run_passes(device, [large, large]))
    await entered(reducer)
    for _ in range(3):  # who cancels again waits as well
        task.cancel()
        await some_turns()
        assert not task.done(), "the thread still writes"
    reducer.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert reducer.calls == 1, "it goes on"
    target = large.destinations[0].view(F64)
    assert np.unique(target[: 64 * KIB // 8]).tolist() == [2.0]
    assert np.unique(target[64 * KIB // 8 :]).tolist() == [1.0]


@in_event_loop
async def test_one_that_is_cancelled_as_it_begins_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    reducer = GatedReducer()
    device, large = large_pass(monkeypatch, reducer)
    task = asyncio.ensure_future(run_passes(device, [large]))
    await asyncio.sleep(0)  # it has not got a thread yet
    task.cancel()
    await some_turns()
    reducer.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert reducer.calls <= 1


@in_event_loop
async def test_what_fails_in_the_thread_is_raised_where_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reducer = GatedReducer(InternalError("out of order"))
    reducer.gate.set()
    device, large = large_pass(monkeypatch, reducer)
    with pytest.raises(InternalError, match="out of order"):
        await run_passes(device, [large])


@in_event_loop
async def test_what_fails_after_it_was_given_up_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reducer = GatedReducer(InternalError("out of order"))
    device, large = large_pass(monkeypatch, reducer)
    task = asyncio.ensure_future(run_passes(device, [large]))
    await entered(reducer)
    task.cancel()
    reducer.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "out of order" in caplog.text


class QueuedMemory:
    """Of a device whose work is queued, such as a GPU's: `finish` tells when it is done."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.finishes = 0

    async def finish(self) -> None:
        self.finishes += 1
        await self.done.wait()


def queued_device(reduce: Callable[..., None]) -> tuple[Any, QueuedMemory]:
    memory = QueuedMemory()
    arena = SimpleNamespace(backend=SimpleNamespace(name="cupy"), memory=memory)
    return SimpleNamespace(arena=arena, reducer=SimpleNamespace(reduce=reduce)), memory


PAIR = Pass(U8, OPERATOR["SUM"], (np.zeros(8, np.uint8),) * 2, (np.zeros(8, np.uint8),))


@in_event_loop
async def test_work_that_is_queued_already_is_waited_for_also_when_cancelled() -> None:
    device, memory = queued_device(lambda *arguments: None)
    task = asyncio.ensure_future(run_passes(device, [PAIR, PAIR]))
    for _ in range(3):
        await some_turns()
        assert not task.done(), "what is queued still writes"
        task.cancel()
    memory.done.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert memory.finishes == 1


@in_event_loop
async def test_work_that_is_queued_already_is_waited_for_also_when_the_rest_cannot_be_queued() -> None:
    results = iter([None, InternalError("no more memory")])

    def reduce(*arguments: Any) -> None:
        if (failure := next(results)) is not None:
            raise failure

    device, memory = queued_device(reduce)
    task = asyncio.ensure_future(run_passes(device, [PAIR, PAIR]))
    await some_turns()
    assert not task.done()
    memory.done.set()
    with pytest.raises(InternalError, match="no more memory"):
        await task


# ---- as RPCs ---------------------------------------------------------------------------------------------------------


async def service_of(*devices: Device, **settings: Any) -> DeviceService:
    """Devices of one process, with ranks in one communicator."""
    service = DeviceService("here:1", TransferSettings(**settings))
    peers = [pb.Peer(deviceId=device.device_id, address="here:1", transport=pb.P2P) for device in devices]
    for device in devices:
        service.add(device)
    for rank, device in enumerate(devices):
        await service.JoinComm(pb.JoinCommRequest(commId=COMM, rank=rank, peers=peers, deviceId=device.device_id), None)
    return service


def execute(passes: Sequence[pb.Pass], comm_id: int = COMM) -> pb.ExecuteRequest:
    return pb.ExecuteRequest(commId=comm_id, deviceId=1, passes=passes)


def wire_pass(sources: Sequence[tuple[int, int]], destinations: Sequence[tuple[int, int]], **fields: Any) -> pb.Pass:
    return pb.Pass(
        **{"count": 80} | fields,
        sources=[pb.RankAddress(rank=rank, addr=addr) for rank, addr in sources],
        destinations=[pb.RankAddress(rank=rank, addr=addr) for rank, addr in destinations],
    )


@in_event_loop
async def test_a_device_runs_passes_over_the_memory_of_all_ranks() -> None:
    devices = [Device(number, Arena(4 * MIB, NUMPY, min_addr=number << 32)) for number in (1, 2, 3)]
    service = await service_of(*devices)
    for device in devices:
        device.arena.view(device.arena.min_addr, 80).view(F64)[...] = device.device_id
    starts = [(rank, device.arena.min_addr) for rank, device in enumerate(devices)]
    response = await service.Execute(execute([wire_pass(starts, starts, op=pb.AVG)]), None)
    for device in devices:
        assert device.arena.view(device.arena.min_addr, 80).view(F64).tolist() == [2.0] * 10
    assert response.bytesSent == 4 * 80
    response = await service.Execute(execute([wire_pass([starts[1]], [starts[1]])]), None)
    assert response.bytesSent == 0


_HERE = [(0, 0)]


@pytest.mark.parametrize(
    ("one", "error", "words"),
    [
        (wire_pass([], _HERE), InvalidValue, "0 sources and 1 destinations"),
        (wire_pass(_HERE, []), InvalidValue, "1 sources and 0 destinations"),
        (wire_pass(_HERE, [(2, 0)]), InvalidValue, "rank 2 is not one of the 2 ranks"),
        (wire_pass([(1, 4 * MIB - 79)], _HERE), AddressOutOfRange, "outside device memory"),
        (wire_pass(_HERE, [(1, (1 << 64) - 8)]), AddressOutOfRange, "outside device memory"),
        (wire_pass(_HERE, [(1, 0)], count=12), CountNotMultiple, "count is 12 bytes"),
        (wire_pass(_HERE, [(1, 0)], dtype=99), InvalidValue, "unknown data type 99"),
        (wire_pass(_HERE, [(1, 0)], op=99), InvalidValue, "99"),
        (wire_pass(_HERE, [(1, 0)], weights=[1.0, 2.0]), InvalidValue, "2 weights for 1 sources"),
    ],
)
@in_event_loop
async def test_a_pass_that_cannot_be_is_refused_before_any_has_run(one: pb.Pass, error: type[DsmlError], words: str) -> None:
    devices = [Device(number, Arena(4 * MIB, NUMPY)) for number in (1, 2)]
    service = await service_of(*devices)
    devices[0].arena.view(0, 80)[...] = 1
    with pytest.raises(error, match=words):
        await service.Execute(execute([wire_pass(_HERE, [(1, 0)]), one]), None)
    assert not devices[1].arena.view(0, 4 * MIB).any()


@in_event_loop
async def test_memory_that_nobody_said_where_it_is_is_reported_and_not_used() -> None:
    service = await service_of(device := Device(1, Arena(4 * MIB, NUMPY)))
    peers = [
        pb.Peer(deviceId=1, transport=pb.P2P),
        pb.Peer(deviceId=2, address="there:1", transport=pb.GRPC),
        pb.Peer(deviceId=3, address="there:2", sharedMemory=pb.SharedMemory(bootId="elsewhere", numBytes=8)),
    ]
    response = await service.JoinComm(pb.JoinCommRequest(commId=COMM, rank=0, peers=peers, deviceId=1), None)
    reasons = {unreachable.rank: unreachable.reason for unreachable in response.unreachable}
    assert reasons == {1: "nobody said where it is", 2: "it is on another host"}
    for rank in (1, 2):
        with pytest.raises(InvalidValue, match=rf"the memory of rank {rank} \(device {rank + 1} at there.*is not open here"):
            await service.Execute(execute([wire_pass(_HERE, [(rank, 0)])]), None)
    assert not device.arena.view(0, 4 * MIB).any()


@pytest.mark.skipif(not can_share(), reason="memory is shared by memfd, which is Linux's")
@in_event_loop
async def test_shared_memory_is_what_another_process_finds_until_it_moves() -> None:
    service = await service_of(device := Device(1, Arena(4 * MIB, NUMPY, min_addr=4096)))

    async def share(move: bool = False) -> Any:
        shared = await service.ShareMemory(pb.ShareMemoryRequest(deviceId=1, move=move), None)
        assert (shared.minMemAddr.value, shared.numBytes) == (4096, 4 * MIB)
        return shared, handle_of(shared)

    shared, handle = await share()
    with OtherProcess() as other:
        other.open(handle)
        other.write(0, b"hello")
        assert device.arena.view(4096, 5).tobytes() == b"hello"
        assert (await share())[0] == shared
        moved, handle = await share(move=True)
        assert moved != shared
        other.write(0, b"HELLO")
        assert device.arena.view(4096, 5).tobytes() == b"hello"
        other.open(handle)
        assert other.read(0, 5) == b"hello"


def handle_of(shared: pb.SharedMemory) -> Any:
    return SharedHandle(shared.numBytes, shared.bootId, shared.pid, shared.fd, shared.token, shared.offset)


@in_event_loop
async def test_a_server_that_is_told_so_shares_no_memory() -> None:
    service = await service_of(Device(1, Arena(4 * MIB, NUMPY)), shares_memory=False)
    for move in (False, True):
        with pytest.raises(MemoryNotShared, match="the server was told not to share memory"):
            await service.ShareMemory(pb.ShareMemoryRequest(deviceId=1, move=move), None)


@in_event_loop
async def test_quiesce_returns_when_nothing_of_the_communicator_runs_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    reducer = GatedReducer()
    device, large = large_pass(monkeypatch, reducer)
    service = await service_of(device)
    count = large.sources[0].nbytes
    source = [(0, 64), (0, 128 + count)]
    running = asyncio.ensure_future(service.Execute(execute([wire_pass(source, [source[0]], count=count)]), None))
    await entered(reducer)
    # Of another communicator, and of none: there is nothing to wait for.
    for comm_id in (COMM + 1, 0):
        await service.Quiesce(pb.QuiesceRequest(commId=comm_id, deviceId=1), None)
    quiesce = [asyncio.ensure_future(service.Quiesce(pb.QuiesceRequest(commId=COMM, deviceId=1), None)) for _ in range(2)]
    await some_turns()
    assert not running.done()
    assert not any(one.done() for one in quiesce)
    reducer.gate.set()
    await asyncio.gather(*quiesce)
    assert running.cancelled()
    assert reducer.calls == 1
    await service.Quiesce(pb.QuiesceRequest(commId=COMM, deviceId=1), None)
    # The communicator goes on.
    await service.Execute(execute([wire_pass(source, [source[0]], count=count)]), None)
    with pytest.raises(CommNotFound):
        await service.Execute(execute([], COMM + 1), None)
