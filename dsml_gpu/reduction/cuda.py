"""Reductions on a GPU: the kernels of ``kernels/``, compiled by NVRTC through CuPy and launched on a device's stream."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import cupy as cp
import numpy as np

from dsml_gpu.reduction import kernels
from dsml_gpu.reduction.operators import OPERATORS, Operator
from dsml_gpu.reduction.passes import TEMPORARY, aliases_of, plan_passes

log = logging.getLogger(__name__)

#: Blocks for each multiprocessor: as many as fit on it at once where registers allow it.
_BLOCKS_PER_MULTIPROCESSOR = 8


class CudaReducer:
    """See `Reducer`.

    Args:
        gpu: number of the GPU, as CUDA counts them.
        stream: CuPy stream of that GPU on which kernels run.
    """

    must_be_ready = True

    def __init__(self, gpu: int, stream: Any) -> None:
        self._gpu = gpu
        self._stream = stream
        self._kernels = loaded_kernels(gpu)
        self._max_blocks = cp.cuda.Device(gpu).attributes["MultiProcessorCount"] * _BLOCKS_PER_MULTIPROCESSOR

    def is_ready(
        self, operator: Operator, dtype: np.dtype[Any], sources: int = 2, destinations: int = 1, *, weighted: bool = False
    ) -> bool:
        return all(name in self._kernels for name in _needed(operator, dtype, sources, weighted))

    def prepare(self, operator: Operator, dtype: np.dtype[Any], sources: int = 2, *, weighted: bool = False) -> None:
        cp.cuda.Device(self._gpu).use()  # in a thread that may have used none yet, or another one
        for name in _needed(operator, dtype, sources, weighted):
            self._kernels.kernel(name)

    def reduce(
        self,
        operator: Operator,
        dtype: np.dtype[Any],
        sources: Sequence[Any],
        destinations: Sequence[Any],
        divisor: int = 1,
    ) -> None:
        nbytes = destinations[0].nbytes
        if not nbytes:
            return
        operands = [int(array.data.ptr) for array in (*sources, *destinations)]
        plan = plan_passes(len(sources), aliases_of(operands[: len(sources)], operands[len(sources) :]))
        temporary = self._temporary(nbytes) if any(TEMPORARY in step.destinations for step in plan) else None
        if temporary is not None:
            operands.append(int(temporary.data.ptr))
        for step in plan:
            inputs = [operands[index] for index in step.sources]
            outputs = [operands[index] for index in step.destinations]
            if step.copies:
                self._launch(kernels.copy_launch(inputs[0], outputs, nbytes))
            else:
                self._launch(kernels.reduce_launch(operator, dtype, inputs, outputs, nbytes, divisor if step.last else 1))

    def weigh(self, dtype: np.dtype[Any], source: Any, destination: Any, weight: np.generic) -> None:
        if destination.nbytes:
            addresses = int(source.data.ptr), int(destination.data.ptr)
            self._launch(kernels.weigh_launch(dtype, *addresses, destination.nbytes, weight))

    def _temporary(self, nbytes: int) -> Any:
        # Given back to CuPy's pool before the kernels have run, but the pool gives it to work on this stream only.
        with cp.cuda.Device(self._gpu), self._stream:
            return cp.ndarray((nbytes,), cp.uint8, cp.cuda.alloc(nbytes))

    def _launch(self, launch: kernels.Launch) -> None:
        kernel = self._kernels.kernel(launch.kernel)
        blocks = min(-(-launch.threads // kernels.BLOCK_THREADS), self._max_blocks)
        with cp.cuda.Device(self._gpu), self._stream:
            kernel((blocks,), (kernels.BLOCK_THREADS,), (launch.arguments,))


class KernelCache:
    """The compiled kernels of one GPU. Thread-safe.

    CuPy keeps what it compiled in a folder of the user's (``CUPY_CACHE_DIR``), so each is compiled once per machine.
    """

    def __init__(self, gpu: int) -> None:
        self._gpu = gpu
        self._kernels: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __contains__(self, name_expression: str) -> bool:
        return name_expression in self._kernels

    def kernel(self, name_expression: str) -> Any:
        """The kernel of an instantiation, compiled for this GPU's architecture where it was not before."""
        kernel = self._kernels.get(name_expression)
        if kernel is None:
            with self._lock:
                kernel = self._kernels.get(name_expression) or self._compile(name_expression)
                self._kernels[name_expression] = kernel
        return kernel

    def _compile(self, name_expression: str) -> Any:
        started = time.perf_counter()
        with cp.cuda.Device(self._gpu):
            module = cp.RawModule(
                code=kernels.source(), options=kernels.COMPILE_OPTIONS, name_expressions=(name_expression,)
            )
            kernel = module.get_function(name_expression)
        log.info("kernel %s is ready after %.2f s", name_expression, time.perf_counter() - started)
        return kernel


_CACHES: dict[int, KernelCache] = {}


def loaded_kernels(gpu: int) -> KernelCache:
    """The compiled kernels of a GPU, shared by all its devices in this process."""
    return _CACHES.setdefault(gpu, KernelCache(gpu))


@lru_cache(maxsize=1024)
def _needed(operator: Operator, dtype: np.dtype[Any], sources: int, weighted: bool) -> tuple[str, ...]:
    """The instantiations for so many sources: an average is a sum until its last hop, or its last pass."""
    parts = {operator, _SUM} if operator.averages else {operator}
    numbers = {len(step.sources) for step in plan_passes(sources, (None,)) if len(step.sources) > 1}
    names = [kernels.name_expression(part, dtype, number) for part in parts for number in sorted(numbers)]
    return (*names, kernels.weigh_expression(dtype)) if weighted else tuple(names)


_SUM = next(operator for operator in OPERATORS if operator.name == "SUM")
