"""Device memory on a GPU: what is queued runs in order, and nothing waits where it must not."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest

from dsml_gpu.errors import InternalError, OutOfMemory
from dsml_gpu.memory.arena import MIN_ARENA_BYTES, Arena
from dsml_gpu.memory.backend import select_backends
from dsml_gpu.memory.device_memory import DeviceMemory
from dsml_gpu.reduction import DTYPES, OPERATORS

SUM = OPERATORS[0]
F64 = DTYPES["FLOAT64"]
RNG = np.random.default_rng(1)


def memory_of(gpu: int = 0) -> Any:
    (backend,), _ = select_backends("cupy", [gpu])
    return backend.open()


def reducer_of(memory: Any) -> Any:
    from dsml_gpu.reduction.cuda import CudaReducer

    return CudaReducer(memory.gpu, memory.compute)


def some_bytes(nbytes: int) -> np.ndarray:
    return RNG.integers(0, 256, nbytes, dtype=np.uint8)


async def fetch(memory: DeviceMemory, array: Any) -> np.ndarray:
    download = memory.begin_download(array)
    host = (await download.wait()).copy()
    download.release()
    return host


@pytest.mark.parametrize("nbytes", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (5 << 20) + 3])
def test_what_is_written_is_read(gpu: Any, nbytes: int) -> None:
    async def scenario() -> None:
        memory = memory_of()
        array = memory.allocate(8 << 20)
        data = some_bytes(nbytes)
        await memory.write(array[7 : 7 + nbytes], data)
        np.testing.assert_array_equal(await fetch(memory, array[7 : 7 + nbytes]), data)
        assert not (await fetch(memory, array[:7])).any()
        assert not (await fetch(memory, array[7 + nbytes : 1 << 20])).any()

    asyncio.run(scenario())


def test_the_source_of_a_write_may_change_at_once(gpu: Any) -> None:
    async def scenario() -> None:
        memory = memory_of()
        array = memory.allocate(40 << 20)
        buffer = np.empty(1 << 20, np.uint8)
        expected = []
        for start in range(0, 40 << 20, 1 << 20):
            expected.append(some_bytes(1 << 20))
            buffer[...] = expected[-1]
            await memory.write(array[start : start + (1 << 20)], buffer)
            buffer[...] = 0
        for number, data in enumerate(expected):
            got = await fetch(memory, array[number << 20 : (number + 1) << 20])
            np.testing.assert_array_equal(got, data)

    asyncio.run(scenario())


def test_writes_kernels_and_reads_keep_the_order_of_the_calls(gpu: Any) -> None:
    async def scenario() -> None:
        memory = memory_of()
        reducer = reducer_of(memory)
        array = memory.allocate(8 * 1000)
        expected = np.zeros(1000)
        for number in range(30):
            values = RNG.standard_normal(1000)
            if number % 5 == 0:
                await memory.write(array, values.view(np.uint8))
                expected = values.copy()
            staged = await memory.stage(values.view(np.uint8))
            reducer.reduce(SUM, F64, (array, staged.array), (array,))
            staged.release()
            expected += values
            if number % 3 == 0:
                np.testing.assert_array_equal((await fetch(memory, array)).view(F64), expected)
        await memory.finish()
        np.testing.assert_array_equal((await fetch(memory, array)).view(F64), expected)

    asyncio.run(scenario())


def test_staging_memory_is_bounded_and_never_used_too_early(gpu: Any) -> None:
    from dsml_gpu.memory.cuda import MAX_SLOTS

    async def scenario() -> None:
        memory = memory_of()
        reducer = reducer_of(memory)
        array = memory.allocate(8 * 4096)
        seen = set()
        rounds = 6 * MAX_SLOTS
        for number in range(rounds):
            staged = await memory.stage(np.full(4096, number + 1.0).view(np.uint8))
            seen.add(staged.array.data.ptr)
            reducer.reduce(SUM, F64, (array, staged.array), (array,))
            staged.release()
        assert len(seen) <= MAX_SLOTS
        assert set((await fetch(memory, array)).view(F64)) == {rounds * (rounds + 1) / 2}

    asyncio.run(scenario())


def test_a_slice_larger_than_a_slot(gpu: Any) -> None:
    async def scenario() -> None:
        memory = memory_of()
        for nbytes in (3 << 20, 100, 5 << 20):
            data = some_bytes(nbytes)
            staged = await memory.stage(data)
            kept = memory.clone(staged.array)
            staged.release()
            np.testing.assert_array_equal(await fetch(memory, kept), data)

    asyncio.run(scenario())


def test_a_write_that_is_cancelled_does_not_overtake_what_comes_later(gpu: Any) -> None:
    async def scenario() -> None:
        memory = memory_of()
        nbytes = 24 << 20  # more than all slots take
        array, zeros = memory.allocate(nbytes), memory.allocate(nbytes)
        await memory.finish()
        cancelled = 0
        for _ in range(10):
            writing = asyncio.ensure_future(memory.write(array, np.ones(nbytes, np.uint8)))
            await asyncio.sleep(0)  # until it waits for a slot
            writing.cancel()
            await asyncio.wait([writing])
            cancelled += writing.cancelled()
            memory.copy(array, zeros)
            await memory.finish()
            for start in range(0, nbytes, 1 << 20):
                assert not (await fetch(memory, array[start : start + (1 << 20)])).any()
        assert cancelled or gpu.simulated is None, "a GPU may be too quick for this"

    asyncio.run(scenario())


def test_memory_that_is_freed_is_used_again_in_order_only(gpu: Any) -> None:
    """A copy that nobody refers to any more may still be under way when its memory is given to the next."""

    async def scenario() -> None:
        memory = memory_of()
        total, part = memory.allocate(8 * 1000), memory.allocate(8 * 1000)
        reducer = reducer_of(memory)
        expected = np.zeros(1000)
        for number in range(30):
            await memory.write(part, np.full(1000, float(number)).view(np.uint8))
            reducer.reduce(SUM, F64, (total, memory.clone(part)), (total,))
            expected += number
        np.testing.assert_array_equal((await fetch(memory, total)).view(F64), expected)

    asyncio.run(scenario())


def test_memory_ends_with_its_last_reference(gpu: Any) -> None:
    """Without a garbage collection: streams, slots, and the thread that waits for events."""

    async def scenario() -> None:
        others = set(threading.enumerate())
        gc.disable()
        try:
            for _ in range(3):
                memory = memory_of()
                array = memory.allocate(1000)
                await memory.write(array, some_bytes(1000))
                await memory.finish()
                ended = weakref.ref(memory)
                del memory, array
                assert ended() is None
        finally:
            gc.enable()
        deadline = asyncio.get_running_loop().time() + 10
        while waiting := [thread for thread in set(threading.enumerate()) - others if thread.name == "cuda-events"]:
            assert asyncio.get_running_loop().time() < deadline, waiting
            await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_devices_wait_for_each_other_only_by_marks(gpu: Any) -> None:
    """One writes, the other reads it, the first overwrites: as two ranks do that exchange slices."""

    async def scenario() -> None:
        one, other = memory_of(), memory_of()
        add = reducer_of(one), reducer_of(other)
        source, total = one.allocate(8 * 1000), other.allocate(8 * 1000)
        expected = np.zeros(1000)
        content = np.zeros(1000)
        for number in range(20):
            staged = await one.stage(np.full(1000, float(number)).view(np.uint8))
            add[0].reduce(SUM, F64, (source, staged.array), (source,))
            staged.release()
            content += number
            other.wait(one.mark())
            add[1].reduce(SUM, F64, (total, other.near(source)), (total,))
            expected += content
            one.wait(other.mark())
        np.testing.assert_array_equal((await fetch(other, total)).view(F64), expected)

    asyncio.run(scenario())


def test_memory_of_another_gpu_is_copied_to_where_kernels_can_read_it(two_gpus: Any) -> None:
    async def scenario() -> None:
        one, other = memory_of(0), memory_of(1)
        data = some_bytes(1000)
        array = one.allocate(1000)
        await one.write(array, data)
        assert one.near(array) is array
        other.wait(one.mark())
        copy = other.near(array)
        assert copy.device.id == 1
        np.testing.assert_array_equal(await fetch(other, copy), data)

    asyncio.run(scenario())


def test_the_event_loop_goes_on_while_the_gpu_works(gpu: Any) -> None:
    """If `finish` or `wait` stopped the loop, nothing else could run before they return."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async def scenario() -> None:
        memory = memory_of()
        array, other = memory.allocate(64 << 20), memory.allocate(64 << 20)
        await memory.finish()
        ticking = asyncio.ensure_future(tick())
        await asyncio.sleep(0)
        for _ in range(100):
            memory.copy(other, array)
        before = ticks
        await memory.finish()
        assert ticks > before + 1
        ticking.cancel()

    asyncio.run(scenario())


def test_what_goes_wrong_on_the_gpu_is_said_by_whoever_waits(gpu: Any) -> None:
    if gpu.simulated is None:
        pytest.skip("a kernel that faults makes a real GPU unusable for the rest of the process")

    async def scenario() -> None:
        memory = memory_of()
        reducer = reducer_of(memory)
        array = memory.allocate(800)
        await memory.finish()
        gpu.simulated.fail_next_launch = True
        reducer.reduce(SUM, F64, (array, array), (array,))
        with pytest.raises(InternalError, match="work on the GPU failed: cudaErrorIllegalAddress"):
            await memory.finish()

    asyncio.run(scenario())


def test_too_much_memory_is_refused_and_less_can_be_had_afterwards(gpu: Any) -> None:
    async def scenario() -> None:
        backends, _ = select_backends("cupy", [0])
        arena = Arena(1 << 45, backends[0])
        with pytest.raises(OutOfMemory, match=f"device memory of {1 << 45} bytes cannot be had"):
            await arena.write(0, b"x")
        smaller = Arena(MIN_ARENA_BYTES, backends[0])
        await smaller.write(5, b"hello")
        download = smaller.begin_read(5, 5)
        assert (await download.wait()).tobytes() == b"hello"
        download.release()

    asyncio.run(scenario())


def test_an_arena_that_nobody_touches_takes_nothing(gpu: Any) -> None:
    if gpu.simulated is None:
        pytest.skip("other programs may use the GPU too: what is free there is not this test's alone")
    before = dict(gpu.simulated.free_bytes)
    backends, _ = select_backends("cupy", [0])
    arenas = [Arena(1 << 29, backends[0]) for _ in range(100)]
    assert gpu.simulated.free_bytes == before
    asyncio.run(arenas[0].write(0, b"x"))
    assert before[0] - gpu.simulated.free_bytes[0] < 1 << 30
    del arenas
    assert before[0] - gpu.simulated.free_bytes[0] < 1 << 26
