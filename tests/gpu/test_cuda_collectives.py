"""Collectives of devices whose memory is on a GPU."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dsml_gpu.errors import DsmlError, InternalError
from dsml_gpu.memory.backend import NUMPY, Backend, select_backends
from dsml_gpu.reduction import DTYPES
from dsml_gpu.schedules import Algorithm
from dsml_gpu.transport.p2p import PipeTable
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.collectives.checks import ALGORITHMS, OPS, check, expected, inputs_for
from tests.collectives.groups import BY_ALGORITHM, cases_of, check_group
from tests.collectives.harness import all_reduce_request, ranks, read, write
from tests.collectives.oracle import REDUCING

ARENA_BYTES = 4 << 20
BOTH = pytest.mark.parametrize("transport", [pb.P2P, pb.GRPC], ids=["p2p", "grpc"])


def cuda(*gpus: int) -> tuple[Backend, ...]:
    backends, _ = select_backends("cupy", gpus or (0,))
    return backends


@BOTH
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_four_devices_on_one_gpu(gpu: Any, algorithm: str, transport: int) -> None:
    async def scenario() -> None:
        async with ranks(4, transport, backends=cuda(), memory_bytes=ARENA_BYTES) as world:
            for number, dtype in enumerate(DTYPES.values()):
                await check(world, dtype, OPS[number % len(OPS)], algorithm, 7919)
            for op in OPS:
                await check(world, DTYPES["BFLOAT16"], op, algorithm, 4000)
            for count in (0, 1, 3):
                await check(world, DTYPES["FLOAT64"], "SUM", algorithm, count)

    asyncio.run(scenario())


@BOTH
def test_devices_on_two_gpus(two_gpus: Any, transport: int) -> None:
    async def scenario() -> None:
        async with ranks(4, transport, backends=cuda(0, 1), memory_bytes=ARENA_BYTES) as world:
            for algorithm in ALGORITHMS:
                await check(world, DTYPES["FLOAT32"], "SUM", algorithm, 7919)

    asyncio.run(scenario())


@BOTH
def test_unaligned_buffers(gpu: Any, transport: int) -> None:
    async def scenario() -> None:
        async with ranks(3, transport, backends=cuda(), memory_bytes=ARENA_BYTES) as world:
            for dtype in (DTYPES["FLOAT64"], DTYPES["FLOAT16"]):
                inputs = inputs_for(dtype, "SUM", 3, 1001)
                for addr in (61, 64 + dtype.itemsize):
                    for result in await world.all_reduce(inputs, "SUM", "ring", addr=addr):
                        np.testing.assert_array_equal(result, expected(inputs, "SUM"))

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["FLOAT64", "FLOAT32", "FLOAT16", "BFLOAT16", "INT8", "UINT64"])
def test_two_devices_with_and_two_without_a_gpu_agree_with_four_of_either(gpu: Any, name: str) -> None:
    """The order of every reduction is the schedule's, and each one rounds alike: the results are the same bits."""
    dtype = DTYPES[name]
    generator = np.random.default_rng(3)
    draw = {"f": lambda: generator.standard_normal(5003) * 100, "V": lambda: generator.standard_normal(5003) * 100}
    whole = lambda: generator.integers(0, 100, 5003)  # noqa: E731
    inputs = [draw.get(dtype.kind, whole)().astype(dtype) for _ in range(4)]

    async def results(op: str, backends: tuple[Backend, ...]) -> set[bytes]:
        async with ranks(4, pb.GRPC, backends=backends, memory_bytes=ARENA_BYTES) as world:
            return {result.tobytes() for result in await world.all_reduce(inputs, op, "ring")}

    for op in ("SUM", "AVG"):
        of_all = [asyncio.run(results(op, backends)) for backends in ((NUMPY,), cuda(), (*cuda(), NUMPY))]
        assert len(of_all[0]) == 1
        assert of_all[0] == of_all[1] == of_all[2]


def test_pinned_memory_does_not_grow_with_use(gpu: Any) -> None:
    if gpu.simulated is None:
        pytest.skip("how much memory is pinned only the simulation tells")
    from dsml_gpu.memory.cuda import SLOT_BYTES

    async def scenario() -> None:
        async with ranks(2, pb.GRPC, backends=cuda(), memory_bytes=ARENA_BYTES) as world:
            # A slot that is lost is a mebibyte, and there are two dozen at most for each device.
            for _ in range(60):
                await world.all_reduce([np.ones(2_000)] * 2, "SUM", "ring")
            assert gpu.simulated.pinned_bytes <= len(world.devices) * 24 * SLOT_BYTES

    asyncio.run(scenario())


def slots_out(pools: list[Any]) -> int:
    """Slots that are in use."""
    return sum(pool._count - len(pool._given_back) for pool in pools)


@BOTH
def test_after_a_cancelled_collective_the_next_one_is_right(gpu: Any, transport: int) -> None:
    """Copies and kernels of the first are still under way when the second begins, over the same slots."""

    async def scenario() -> None:
        async with ranks(4, transport, backends=cuda(), memory_bytes=ARENA_BYTES, stall_timeout_s=5) as world:
            memories: list[Any] = [device.arena.memory for device in world.devices]
            pools = [pool for memory in memories for pool in (memory._upload_slots, memory._download_slots)]
            interrupted = 0
            for round_ in range(8):
                first = asyncio.ensure_future(world.all_reduce([np.full(20_000, 7.0)] * 4, "SUM", "ring"))
                for _ in range(round_ * 20):
                    await asyncio.sleep(0)
                while transport == pb.GRPC and not first.done() and not slots_out(pools):  # noqa: ASYNC110  no event tells
                    await asyncio.sleep(0)
                interrupted += slots_out(pools) > 0
                first.cancel()
                with suppress(asyncio.CancelledError, DsmlError):
                    await first
                inputs = [np.full(20_000, rank + 10.0) for rank in range(4)]
                for result in await world.all_reduce(inputs, "SUM", ALGORITHMS[round_ % 2]):
                    assert set(result) == {46.0}
            assert slots_out(pools) == 0, "a slot is lost"
            assert interrupted or transport == pb.P2P or gpu.simulated is None, "a GPU may be too quick for this"

    asyncio.run(scenario())


@BOTH
def test_a_kernel_that_fails_fails_the_collective(gpu: Any, transport: int) -> None:
    if gpu.simulated is None:
        pytest.skip("a kernel that faults makes a real GPU unusable for the rest of the process")

    async def scenario() -> None:
        async with ranks(2, transport, backends=cuda(), memory_bytes=ARENA_BYTES, stall_timeout_s=2) as world:
            inputs = [np.ones(1000)] * 2
            await world.all_reduce(inputs, "SUM", "ring")
            gpu.simulated.fail_next_launch = True
            with pytest.raises(InternalError, match="work on the GPU failed: cudaErrorIllegalAddress"):
                await world.all_reduce(inputs, "SUM", "ring")

    asyncio.run(scenario())


def test_a_slice_that_was_read_may_be_overwritten_by_its_sender(gpu: Any) -> None:
    """`on_sent` comes when the receiver has queued its reading; what the sender queues then must run after that."""

    async def scenario() -> None:
        table = PipeTable(timeout_s=5)
        sender, receiver = (backend.open() for backend in cuda(0, 0))
        for stream_id in range(1, 21):
            data, later = sender.allocate(4096), sender.allocate(4096)
            await sender.write(data, bytes([stream_id]) * 4096)
            overwritten = asyncio.get_running_loop().create_future()
            send = table.open_send(stream_id, sender)
            recv = table.open_recv(stream_id, receiver)

            def overwrite(done: Any = overwritten, target: Any = data, source: Any = later) -> None:
                sender.copy(target, source)
                done.set_result(None)

            send.send(data, overwrite)
            got = receiver.clone(await recv.recv(4096))
            recv.release()
            await overwritten
            download = receiver.begin_download(got)
            assert set((await download.wait()).tobytes()) == {stream_id}
            download.release()

    asyncio.run(scenario())


@BOTH
def test_groups_and_copies_keep_their_order(gpu: Any, transport: int) -> None:
    async def scenario() -> None:
        async with ranks(4, transport, backends=cuda(), memory_bytes=ARENA_BYTES) as world:
            count = 7_000
            for round_ in range(3):
                for rank, device in enumerate(world.devices):
                    await write(device.arena, 0, np.full(count, rank + 1.0 + round_))
                steps = [("ring", "SUM"), ("naive", "SUM"), ("ring", "AVG"), ("naive", "MAX"), ("ring", "SUM")]
                await world.run(
                    [all_reduce_request((0,) * 4, count * 8, DTYPES["FLOAT64"], op, algorithm) for algorithm, op in steps]
                )
                for device in world.devices:
                    total = set(await read(device.arena, 0, DTYPES["FLOAT64"], count))
                    assert total == {(10.0 + 4 * round_) * 4 * 4}

    asyncio.run(scenario())


@BOTH
@BY_ALGORITHM
def test_every_algorithm_of_every_collective(gpu: Any, algorithm: Algorithm, transport: int) -> None:
    """Out of place, in place, through memory of nobody's, weighted: what is not in order on the streams gives wrong bits."""

    async def scenario() -> None:
        async with ranks(4, transport, backends=cuda(), memory_bytes=ARENA_BYTES) as world:
            cases = list(cases_of(algorithm, 4, [3001], [DTYPES["FLOAT32"], DTYPES["BFLOAT16"]], ["SUM", "AVG"]))
            if algorithm.collective in REDUCING:
                cases += [replace(case, weights=(1.0, 2.0, 0.5, 1.0)) for case in cases if case.op == "SUM"]
            await check_group(world, cases)

    asyncio.run(scenario())
