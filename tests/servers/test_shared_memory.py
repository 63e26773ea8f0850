"""Collectives over shared memory between processes: what they give, when they are used, and what happens when one fails."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsml_gpu
from dsml_gpu import Client, Communicator
from dsml_gpu.cli.fleet import Fleet, ServerProcess
from dsml_gpu.errors import InvalidValue, PeerUnavailable
from dsml_gpu.memory.shared import SharedHandle, can_share, open_shared
from dsml_gpu.reduction import DTYPES
from dsml_gpu.schedules import COLLECTIVES
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.collectives.oracle import OPS, REDUCING, ROOTED, Case, Memory, layout
from tests.support.faults import frozen, kill
from tests.support.processes import running, wait_until
from tests.support.rpc import CALL_TIMEOUT_S, MIB, Rpc, rpc_to

#: The end of a process is known at once; this is for a loaded machine.
PROMPTLY_S = 2.0
MEMORY = ["--memory", "256MiB"]
pytestmark = pytest.mark.skipif(not can_share(), reason="memory is shared by memfd, which is Linux's")


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(3, MEMORY) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def client(fleet: Fleet) -> Iterator[Client]:
    with dsml_gpu.connect(fleet.address) as client:
        yield client


@pytest.fixture
def comm(client: Client) -> Iterator[Communicator]:
    with client.communicator(3) as comm:
        yield comm


def cases_of(collective: str) -> Iterator[Case]:
    """Small and large, in and out of place; types, operators and roots take turns."""
    nranks = 3
    factors = itertools.product(("FLOAT32", "BFLOAT16", "INT8", "FLOAT64"), (37, 300_041), (False, True))
    for number, (dtype, total, in_place) in enumerate(factors):
        pairs: tuple[tuple[int, int], ...] = ()
        if collective in ("all_reduce", "reduce", "broadcast"):
            counts: tuple[int, ...] = (total,)
        elif collective == "all_to_all":
            counts = tuple(total // (3 + (row + column) % 3) for row in range(nranks) for column in range(nranks))
        elif collective == "send_recv":
            pairs = ((0, 1), (1, 2), (2, 0), (2, 2), (0, 1))
            counts = (total, total // 2, 0, total // 3, 5)
        else:
            counts = (total // 2, 0, total - total // 2)
        op = OPS[number % len(OPS)] if collective in REDUCING else "SUM"
        weights = (2.0, 1.0, 3.0) if collective in REDUCING and op == "SUM" else ()
        root = number % nranks if collective in ROOTED else 0
        yield Case(collective, "", nranks, counts, DTYPES[dtype], op, root, in_place, pairs, weights)


@pytest.mark.parametrize("collective", sorted({*COLLECTIVES} - {"barrier"}))
def test_every_collective_is_right_and_goes_over_shared_memory(fleet: Fleet, collective: str) -> None:
    with rpc_to(fleet.address) as rpc, rpc.comm(3) as comm:
        for case in cases_of(collective):
            memories = [Memory() for _ in range(3)]
            request = layout(case, memories)
            request.commId = comm.commId
            for device, memory in zip(comm.devices, memories, strict=True):
                rpc.write(device.deviceId.value, 0, bytes(memory.before))
            result = rpc.coordinator.Collective(request, timeout=CALL_TIMEOUT_S).result
            for rank, (device, memory) in enumerate(zip(comm.devices, memories, strict=True)):
                actual = rpc.read(device.deviceId.value, 0, len(memory.after))
                assert actual == bytes(memory.after), f"{case}: rank {rank}"
            if collective == "all_to_all" and case.in_place:  # which first needs a copy of what is overwritten
                assert list(result.transports) == [pb.GRPC]
            else:
                assert (list(result.transports), result.algorithm) == ([pb.P2P], "direct")
                assert result.bytesSent > 0


@pytest.mark.parametrize("count", [100, 700_000], ids=["small", "large"])
def test_a_group_of_operations_that_depend_on_each_other(comm: Communicator, count: int) -> None:
    values = [np.arange(count, dtype=np.float64) % 17 + rank for rank in range(3)]
    one, two, three = comm.array(values), comm.empty(count), comm.empty(count)
    with comm.group() as group:
        comm.all_reduce(one, two)
        comm.broadcast(three, two[1], root=1)
        comm.all_reduce(three, op="max")
        comm.send_recv([(three[2], one[0])])
        comm.all_reduce(one, two, op="avg")
    assert group.result.transports == ("p2p",)
    total = values[0] + values[1] + values[2]
    for array in three:
        np.testing.assert_array_equal(array.get(), total)
    np.testing.assert_array_equal(one[0].get(), total)
    for array in two:
        np.testing.assert_array_equal(array.get(), (total + values[1] + values[2]) / 3)


def test_a_group_of_passes_and_slices_keeps_its_order(comm: Communicator) -> None:
    arrays = comm.array([np.full(1000, float(rank + 1)) for rank in range(3)])
    with comm.group() as group:
        comm.all_reduce(arrays)  # 6
        comm.all_reduce(arrays, algorithm="ring")  # 18
        comm.all_reduce(arrays)  # 54
        comm.barrier()
        comm.all_reduce(arrays, algorithm="ring", op="avg")
    assert group.result.transports == ("p2p", "grpc")
    for array in arrays:
        np.testing.assert_array_equal(array.get(), np.full(1000, 54.0))


def test_communicators_with_the_same_devices_take_turns(client: Client) -> None:
    """Each has its own ranks; neither makes the other one join again."""
    with client.communicator(3) as comm, client.communicator(device_ids=[3, 1]) as pair:
        for number in range(1, 4):
            arrays, pairs = comm.array([np.full(64, 1.0)] * 3), pair.array([np.full(64, 1.0)] * 2)
            for _ in range(number):
                assert comm.all_reduce(arrays).transports == ("p2p",)
                assert pair.all_reduce(pairs).transports == ("p2p",)
            assert comm.devices[0].device_id == 1
            np.testing.assert_array_equal(arrays[2].get(), np.full(64, 3.0**number))
            np.testing.assert_array_equal(pairs[1].get(), np.full(64, 2.0**number))


def test_communicators_that_begin_at_the_same_time_all_go_over_shared_memory(client: Client) -> None:
    def begin(_: int) -> tuple[str, ...]:
        with client.communicator(device_ids=[1, 2, 3]) as comm:
            return comm.all_reduce(comm.array([np.ones(8)] * 3)).transports

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(begin, range(24), timeout=60)) == {("p2p",)}


def test_p2p_that_is_forced_does_what_passes_can_and_refuses_the_rest(client: Client) -> None:
    with client.communicator(3, transport="p2p") as comm:
        arrays = comm.array([np.ones(9)] * 3)
        assert comm.all_reduce(arrays).transports == ("p2p",)
        assert comm.all_reduce(arrays, algorithm="direct").transports == ("p2p",)
        comm.barrier()
        with pytest.raises(InvalidValue, match=r"all_reduce by ring sends slices.*runs the algorithm direct"):
            comm.all_reduce(arrays, algorithm="ring")
        with pytest.raises(InvalidValue, match="all_to_all in place sends slices"):
            comm.all_to_all(arrays)
        np.testing.assert_array_equal(arrays[0].get(), np.full(9, 9.0))
    with client.communicator(3, transport="grpc") as comm:
        arrays = comm.array([np.ones(9)] * 3)
        assert comm.all_reduce(arrays).transports == ("grpc",)
        assert comm.all_reduce(arrays, algorithm="direct").transports == ("grpc",)


# ---- where memory is not shared --------------------------------------------------------------------------------------


def all_reduce(comm: Communicator, elements: int = 1000) -> tuple[str, ...]:
    """Asserts that the sum is right; gives the transports."""
    values = [np.arange(elements) * (rank + 1.0) for rank in range(len(comm.devices))]
    arrays = comm.array(values)
    result = comm.all_reduce(arrays)
    for array in arrays:
        np.testing.assert_array_equal(array.get(), sum(values))
        array.free()
    return result.transports


def test_devices_that_do_not_share_memory_use_grpc_and_say_why_once(fleet: Fleet, tmp_path: Path) -> None:
    apart = {
        11: ["--no-share-memory"],
        12: ["--host-name", "elsewhere"],
        13: ["--link-latency", "1us"],
    }
    with ExitStack() as stack:
        servers = [
            ServerProcess("device", "--id", str(number), *MEMORY, *options, wait=False) for number, options in apart.items()
        ]
        for server in servers:
            stack.enter_context(server).wait_until_ready()
        addresses = [server.address for server in (*fleet.devices[:2], *servers)]
        options = [option for address in addresses for option in ("--device", address)]
        coordinator = stack.enter_context(running(tmp_path, "coordinator", *options))
        client = stack.enter_context(dsml_gpu.connect(coordinator.address))
        for number in apart:
            with client.communicator(device_ids=[1, number, 2]) as comm:
                assert all_reduce(comm) == all_reduce(comm, 200_000) == ("grpc",)
        # Without the one that does not, the others do.
        with client.communicator(device_ids=[1, 2]) as comm:
            assert all_reduce(comm) == ("p2p",)
        # An emulated link is not one of what is not sent.
        with client.communicator(device_ids=[13, 1], transport="p2p") as comm:
            assert all_reduce(comm) == ("p2p",)
        for number in (11, 12):
            with pytest.raises(InvalidValue, match="p2p is not possible between these devices"):
                client.communicator(device_ids=[1, number], transport="p2p")
        with client.communicator(device_ids=[11, 2]) as comm:
            assert all_reduce(comm) == ("grpc",)
        said = [line for line in coordinator.stderr.splitlines() if "uses gRPC" in line]
        assert len(said) == 2, coordinator.stderr
        for line in said:
            assert f"device 11 at {servers[0].address} does not share its memory: the server was told not to" in line


# ---- failures --------------------------------------------------------------------------------------------------------


def name_of(server: ServerProcess, device_id: int) -> str:
    return f"device {device_id} at {server.address}"


def test_a_device_that_dies_is_named_at_once_and_the_others_go_on() -> None:
    before = left_behind()
    with Fleet(4, MEMORY, ["--on-failure", "fail"]) as fleet, dsml_gpu.connect(fleet.address) as client:
        comm = client.communicator(4)
        pair = client.communicator(device_ids=[2, 3])
        assert all_reduce(comm) == all_reduce(pair) == ("p2p",)
        assert all_reduce(comm, MIB) == ("p2p",)
        arrays = comm.array([np.ones(100)] * 4)
        # One that has no part in the work of a small operation, then the one that does all of it.
        for rank, survivors in ((3, [1, 2, 3]), (0, [2, 3])):
            kill(fleet.devices[rank])
            for _ in range(2):
                started = time.monotonic()
                with pytest.raises(PeerUnavailable, match=name_of(fleet.devices[rank], rank + 1)) as caught:
                    comm.all_reduce(arrays)
                assert time.monotonic() - started < PROMPTLY_S
                for innocent in survivors:
                    assert name_of(fleet.devices[innocent - 1], innocent) not in str(caught.value)
            assert comm.status()[0] == "FAILED"
            with client.communicator(device_ids=survivors) as others:
                assert all_reduce(others) == all_reduce(others, MIB) == ("p2p",)
            assert all_reduce(pair) == ("p2p",)
            comm = client.communicator(device_ids=survivors)
            arrays = comm.array([np.ones(100)] * len(survivors))
        lanes = [device.lane for device in metadata_of(fleet)]
        assert all(lanes)
        assert set(lanes) <= left_behind()[1]
        for server in (*fleet.devices, fleet.coordinator):
            kill(server)
        shm, sockets = left_behind()
        assert shm == before[0]
        assert sockets.isdisjoint(lanes)


def left_behind() -> tuple[list[str], set[str]]:
    """The files of POSIX shared memory, and the names of abstract sockets."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return sorted(os.listdir("/dev/shm")), {words[7].lstrip("@") for line in lines if len(words := line.split()) == 8}


def metadata_of(fleet: Fleet) -> list[pb.DeviceMetadata]:
    """Of the devices that live."""
    alive = [server for server in fleet.devices if server.process.poll() is None]
    found = []
    for server in alive:
        with rpc_to(server.address) as rpc:
            request = pb.GetDeviceMetadataRequest()
            found.append(rpc.device.GetDeviceMetadata(request, timeout=CALL_TIMEOUT_S).metadata)
    return found


def test_a_device_server_that_was_restarted_is_not_taken_for_the_one_before(tmp_path: Path) -> None:
    """Also where it has no part in the work, and where the coordinator has spoken to its successor."""
    with running(tmp_path, "device", "--id", "1") as one, running(tmp_path, "device", "--id", "2") as two:
        options = ["--device", one.address, "--device", two.address, "--on-failure", "fail"]
        with ServerProcess("coordinator", *options) as coordinator, dsml_gpu.connect(coordinator.address) as client:
            comm = client.communicator(2)
            assert all_reduce(comm) == ("p2p",)
            arrays = comm.array([np.ones(100)] * 2)
            two.ends(signal.SIGKILL)
            with running(tmp_path, "device", "--id", "2", "--port", two.address.rpartition(":")[2]):
                wait_until(lambda: len(client.devices()) == 2, "the device server to be known")
                for _ in range(2):
                    with pytest.raises(PeerUnavailable, match=r"device 2 at .* has lost the communicator"):
                        comm.all_reduce(arrays)
                    # It is known where the memory of the successor is.
                    with client.communicator(device_ids=[1, 2]) as successor:
                        assert all_reduce(successor) == ("p2p",)


# ---- one that freezes in the middle ----------------------------------------------------------------------------------

#: Stall timeout of the coordinator.
STALL_S = 0.5
#: Bytes of each rank.
LARGE = 32 * MIB
#: By when the coordinator must have given up: the stall timeout, what the operation may take above it (six times the size
#: at 100 MB/s), the time in which the frozen device is asked to stop, the copy of the others' memory, and a loaded machine.
GIVEN_UP_S = STALL_S + 6 * LARGE / 100e6 + 2 + 6
#: Numpy is slow at it, and until it is compiled there is nothing else: the first time that a process computes an operator
#: of it, the middle cannot be missed. So each test of one fleet has an operator of its own.
F16 = np.dtype(np.float16)


@dataclass
class World:
    """A fleet, and its memory as this process has it open."""

    fleet: Fleet
    rpc: Rpc

    def memory(self, rank: int) -> np.ndarray:
        """Where it is now."""
        with rpc_to(self.fleet.devices[rank].address) as device:
            shared = device.device.ShareMemory(pb.ShareMemoryRequest(), timeout=CALL_TIMEOUT_S)
        return open_shared(SharedHandle.of_message(shared))

    def begin(self, comm: pb.CommInitResponse, count: int, op: str) -> Any:
        """The future of an all-reduce of float16, from the beginning of each memory to `count` bytes on."""
        buffers = [pb.RankBuffers(sendAddr=0, recvAddr=count) for _ in comm.devices]
        request = pb.CollectiveRequest(
            commId=comm.commId, kind="ALL_REDUCE", counts=[count], buffers=buffers, dtype="FLOAT16", op=op
        )
        return self.rpc.coordinator.Collective.future(request, timeout=60)

    def quiesce(self, rank: int, comm: pb.CommInitResponse) -> None:
        """Returns when a device has stopped, asked by somebody who is not the coordinator."""
        with rpc_to(self.fleet.devices[rank].address) as device:
            device.device.Quiesce(pb.QuiesceRequest(commId=comm.commId), timeout=CALL_TIMEOUT_S)


@contextmanager
def new_world() -> Iterator[World]:
    with Fleet(3, MEMORY, ["--stall-timeout", str(STALL_S), "--on-failure", "fail"]) as fleet, rpc_to(fleet.address) as rpc:
        yield World(fleet, rpc)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """For tests after which all devices are as before."""
    with new_world() as world:
        yield world


@pytest.fixture
def short_world() -> Iterator[World]:
    """For tests that end a device."""
    with new_world() as world:
        yield world


def test_a_device_that_freezes_in_the_middle_reaches_nothing_afterwards(world: World) -> None:
    rpc = world.rpc
    with rpc.comm(3) as comm, rpc.comm(2, deviceIds=[3, 2]) as pair, rpc.comm(1, deviceIds=[2]) as single:
        _freeze_in_the_middle(world, comm, [pair, single])
        # Awake again, it is used again.
        with rpc.comm(3, deviceIds=[1, 2, 3]) as successor:
            for used in (successor, pair, single):
                all_reduce_by(rpc, used)


def _freeze_in_the_middle(world: World, comm: pb.CommInitResponse, others: Sequence[pb.CommInitResponse]) -> None:
    rank0 = world.fleet.devices[0]
    before = [world.memory(rank) for rank in range(3)]
    for rank, memory in enumerate(before):
        memory[:LARGE].view(F16)[...] = rank + 1
    output = slice(LARGE, 2 * LARGE)
    watched = before[2][output].view(F16)
    watched[:] = 0
    future = world.begin(comm, LARGE, "SUM")
    started = time.monotonic()
    while not watched[0] and time.monotonic() - started < CALL_TIMEOUT_S:
        pass
    with frozen(rank0):
        assert not watched[watched.size // 3 - 1], "the whole part is done: too late for this test"
        future.result(GIVEN_UP_S)
        # One of the others has done its part, and what they hold is somewhere else.
        now = {rank: world.memory(rank) for rank in (1, 2)}
        for rank in (1, 2):
            assert now[rank] is not before[rank]
            assert (now[rank][:LARGE].view(F16) == rank + 1).all()
            result = now[rank][output].view(F16)
            assert (result == 6).all()
            assert not before[rank].any(), "its memory was given back"
        # They are used as before, also in communicators that were there already; and they get other contents.
        for other in others:
            all_reduce_by(world.rpc, other)
        for rank in (1, 2):
            now[rank][: 2 * LARGE] = 0x5A
    world.quiesce(0, comm)
    for rank in (1, 2):
        assert before[rank][output].any(), "it did not go on where it was: this test has seen nothing"
        assert (now[rank][: 2 * LARGE] == 0x5A).all()


def all_reduce_by(rpc: Rpc, comm: pb.CommInitResponse, addr: int = 200 * MIB) -> None:
    """Asserts that a communicator sums over shared memory."""
    for rank, device in enumerate(comm.devices):
        rpc.write(device.deviceId.value, addr, np.full(1000, rank + 1.0).tobytes())
    buffers = [pb.RankBuffers(sendAddr=addr, recvAddr=addr) for _ in comm.devices]
    request = pb.CollectiveRequest(commId=comm.commId, kind="ALL_REDUCE", counts=[8000], buffers=buffers)
    result = rpc.coordinator.Collective(request, timeout=CALL_TIMEOUT_S).result
    nranks = len(comm.devices)
    assert list(result.transports) == ([pb.P2P] if nranks > 1 else [])
    for device in comm.devices:
        values = np.frombuffer(rpc.read(device.deviceId.value, addr, 8000))
        np.testing.assert_array_equal(values, np.full(1000, nranks * (nranks + 1) / 2))


def test_what_a_device_leaves_behind_that_dies_in_the_middle_others_do_at_once(short_world: World) -> None:
    rpc = short_world.rpc
    comm, pair = rpc.comm_init(3), rpc.comm_init(2, deviceIds=[2, 3])
    memories = [short_world.memory(rank) for rank in range(3)]
    for memory in memories:
        memory[:LARGE].view(F16)[...] = 1
    watched = memories[2][LARGE : 2 * LARGE].view(F16)
    future = short_world.begin(comm, LARGE, "SUM")
    wait_until(lambda: bool(watched[0]), "the beginning of the operation")
    kill(short_world.fleet.devices[0])
    assert not future.done(), "too fast for this test"
    future.result(PROMPTLY_S)
    all_reduce_by(rpc, pair)
    for rank in (1, 2):
        assert (short_world.memory(rank)[:LARGE].view(F16) == 1).all()
        assert (short_world.memory(rank)[LARGE : 2 * LARGE].view(F16) == 3).all()


def test_one_who_gives_up_an_operation_gets_it_as_a_whole_or_not_at_all(world: World) -> None:
    """When it has ended the ranks do not go on to write to what the caller uses again."""
    with world.rpc.comm(3) as comm:
        memories = [world.memory(rank) for rank in range(3)]
        for memory in memories:
            memory[:LARGE].view(F16)[...] = 1
        watched = memories[2][LARGE : 2 * LARGE].view(F16)
        watched[0] = 0
        future = world.begin(comm, LARGE, "PROD")
        wait_until(lambda: bool(watched[0]), "the beginning of the operation")
        assert future.cancel()
        wait_until(lambda: world.rpc.status(comm.commId).status != pb.IN_PROGRESS, "the end of the operation")
        assert world.rpc.status(comm.commId).status == pb.FAILED, "too fast for this test"
        for memory in memories:
            memory[: 2 * LARGE] = 0x5A
        all_reduce_by(world.rpc, comm)
        for rank in range(3):
            world.quiesce(rank, comm)
            assert world.memory(rank) is memories[rank], "who stops when asked to costs the others nothing"
            assert (memories[rank][: 2 * LARGE] == 0x5A).all()


def test_a_frozen_device_that_has_no_work_is_not_waited_for(world: World) -> None:
    with world.rpc.comm(3) as comm:
        memories = [world.memory(rank) for rank in range(3)]
        for memory in memories:
            memory[:512].view(F16)[...] = 2
        with frozen(world.fleet.devices[2]):
            world.begin(comm, 512, "MAX").result(CALL_TIMEOUT_S)
            for memory in memories:
                assert (memory[512:1024].view(F16) == 2).all()


def test_a_device_server_that_is_told_to_stop_ends_what_it_has_begun(short_world: World) -> None:
    comm = short_world.rpc.comm_init(3)
    memories = [short_world.memory(rank) for rank in range(3)]
    for memory in memories:
        memory[:LARGE].view(F16)[...] = 2
    watched = memories[2][LARGE : 2 * LARGE].view(F16)
    future = short_world.begin(comm, LARGE, "PROD")
    wait_until(lambda: bool(watched[0]), "the beginning of the operation")
    short_world.fleet.devices[0].process.send_signal(signal.SIGTERM)
    assert not future.done(), "too fast for this test"
    assert list(future.result(CALL_TIMEOUT_S).result.transports) == [pb.P2P]
    assert (watched == 8).all()
    assert short_world.fleet.devices[0].process.wait(CALL_TIMEOUT_S) == 0
    assert (memories[0][:LARGE].view(F16) == 2).all(), "peers may still be reading it"
