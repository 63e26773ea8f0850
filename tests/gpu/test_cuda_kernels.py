"""The kernels on a GPU, launch by launch: the same cases as on the CPU, and operands of more than 2^31 elements."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dsml_gpu.memory.backend import select_backends
from dsml_gpu.reduction import DTYPES, OPERATORS, Operator, kernels
from dsml_gpu.reduction.kernels import Launch
from tests.kernels import cases
from tests.kernels.on_cpu import Grid

_BUFFER_ALIGNMENT = 64


class OnGpu:
    """Runs the launches of `cases.check` on a GPU; see `on_cpu.Program`."""

    def __init__(self) -> None:
        from dsml_gpu.reduction.cuda import loaded_kernels

        (backend,), _ = select_backends("cupy", [0])
        self.memory: Any = backend.open()
        self._kernels = loaded_kernels(0)

    def run(self, launches: Sequence[tuple[Launch, Grid, Sequence[np.ndarray]]]) -> list[list[np.ndarray]]:
        return asyncio.run(self._run(launches))

    async def _run(self, launches: Sequence[tuple[Launch, Grid, Sequence[np.ndarray]]]) -> list[list[np.ndarray]]:
        buffers = [buffer for _, _, buffers in launches for buffer in buffers]
        rooms = [-(-buffer.nbytes // _BUFFER_ALIGNMENT) * _BUFFER_ALIGNMENT for buffer in buffers]
        starts = [int(start) for start in np.cumsum([0, *rooms])]
        image = np.zeros(starts[-1], np.uint8)
        for start, buffer in zip(starts, buffers, strict=False):
            image[start : start + buffer.nbytes] = buffer
        memory = self.memory
        array = memory.allocate(image.nbytes)
        await memory.write(array, image)
        first = 0
        for launch, grid, own in launches:
            places = [array.data.ptr + start for start in starts[first : first + len(own)]]
            self._launch_at(launch, grid, places)
            first += len(own)
        await memory.finish()
        after = np.concatenate([await self.fetch(array[at : at + (64 << 20)]) for at in range(0, image.nbytes, 64 << 20)])
        results = iter([after[start : start + buffer.nbytes] for start, buffer in zip(starts, buffers, strict=False)])
        return [[next(results) for _ in own] for _, _, own in launches]

    async def fetch(self, array: Any) -> np.ndarray:
        download = self.memory.begin_download(array)
        host = (await download.wait()).copy()
        download.release()
        return host

    def _launch_at(self, launch: Launch, grid: Grid, places: Sequence[int]) -> None:
        arguments = launch.arguments.copy()
        for field in ("sources", "destinations"):
            operands = arguments[field][0]
            for number, operand in enumerate(operands.tolist()):
                if operand:
                    operands[number] = places[(operand >> 32) - 1] + (operand & 0xFFFFFFFF)
        self.launch(Launch(launch.kernel, arguments, launch.threads), grid)

    def launch(self, launch: Launch, grid: Grid) -> None:
        """Queues one launch whose operands are device addresses."""
        import cupy as cp

        kernel = self._kernels.kernel(launch.kernel)
        with cp.cuda.Device(0), self.memory.compute:
            kernel((grid.blocks,), (grid.threads,), (launch.arguments,))


def test_every_alignment_and_length(gpu: Any) -> None:
    """Also on the simulated GPU: that shows that this file's own work is right."""
    for dtype_name in DTYPES if gpu.simulated is None else ["FLOAT32"]:
        assert cases.check(OnGpu(), cases.boundaries(dtype_name)) > 300  # type: ignore[arg-type]  # it has what is needed


@pytest.fixture
def real() -> OnGpu:
    from tests.gpu.conftest import real_gpu

    real_gpu()
    return OnGpu()


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_every_number_of_sources_and_destinations(real: OnGpu, operator: Operator, dtype_name: str) -> None:
    assert cases.check(real, cases.breadth(operator, dtype_name)) >= 64  # type: ignore[arg-type]
    assert cases.check(real, cases.real_blocks(operator, dtype_name)) == 3  # type: ignore[arg-type]


@pytest.mark.gpu
def test_copies(real: OnGpu) -> None:
    assert cases.check(real, cases.copies()) > 1000  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype_name", DTYPES)
def test_weights(real: OnGpu, dtype_name: str) -> None:
    assert cases.check(real, cases.weighings(dtype_name)) > 100  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype_name", ["FLOAT16", "BFLOAT16"])
def test_every_half_is_itself_after_widening_and_narrowing(real: OnGpu, dtype_name: str) -> None:
    dtype = DTYPES[dtype_name]
    halves = np.arange(1 << 16, dtype=np.uint16).view(dtype)

    async def scenario() -> np.ndarray:
        memory = real.memory
        source, target = memory.allocate(halves.nbytes), memory.allocate(halves.nbytes)
        await memory.write(source, halves.view(np.uint8))
        launch = kernels.reduce_launch(
            OPERATORS[3], dtype, [source.data.ptr, source.data.ptr], [target.data.ptr], halves.nbytes
        )
        real.launch(launch, Grid(1000, kernels.BLOCK_THREADS))
        return (await real.fetch(target)).view(dtype)

    got = asyncio.run(scenario())
    with np.errstate(invalid="ignore"):
        nan = np.isnan(halves.astype(np.float32))
        np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    np.testing.assert_array_equal(got.view(np.uint16)[~nan], halves.view(np.uint16)[~nan])


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_more_elements_than_32_bits_count(real: OnGpu) -> None:
    """2^31 + 3 bytes in two operands, through the packs and element by element; both ends and the middle are looked at."""
    count = (1 << 31) + 3
    dtype = DTYPES["UINT8"]

    async def scenario() -> None:
        memory = real.memory
        left, right = memory.allocate(count + 16), memory.allocate(count + 16)
        spots = [0, 1, (1 << 31) - 1, 1 << 31, count - 1]
        for shift in (0, 1):  # with 1, the operands are not aligned alike
            one, other = left[:count], right[shift : shift + count]
            for number, spot in enumerate(spots):
                await memory.write(one[spot : spot + 1], bytes([10 + number]))
                await memory.write(other[spot : spot + 1], bytes([100]))
            launch = kernels.reduce_launch(OPERATORS[0], dtype, [one.data.ptr, other.data.ptr], [one.data.ptr], count)
            real.launch(launch, Grid(1000, kernels.BLOCK_THREADS))
            for number, spot in enumerate(spots):
                assert (await real.fetch(one[spot : spot + 1]))[0] == 110 + number
            assert (await real.fetch(one[count // 3 : count // 3 + 1000])).max() == 0
            assert (await real.fetch(left[count : count + 16])).max() == 0

    asyncio.run(scenario())
