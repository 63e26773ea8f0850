"""A stand-in for CuPy on a machine without a GPU: streams that run late and side by side, and the real kernels.

What `dsml_gpu.memory.cuda`, `dsml_gpu.reduction.cuda` and the benchmark of the kernels use of CuPy is here, with CUDA's
rules: work is queued and done later, each stream by a thread of its own that dawdles at random; only events order streams;
memory is uninitialised; device memory cannot be touched as an array; a kernel must not touch another GPU's memory. Kernels
are the source of ``kernels/`` compiled for the CPU. So code that forgets to order its work, or that uses a buffer again too
early, computes wrong bytes here as it would on a GPU, and sooner.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import random
import struct
import threading
import time
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

#: Launches an instantiation over a grid: name expression, packed arguments, blocks, threads of each.
Launcher = Callable[[str, np.ndarray, int, int], None]

_MAX_DELAY_S = 0.0005
#: Arenas are no smaller.
_LEAST_IPC_BYTES = 4 << 20
#: Process, file and size.
_IPC_HANDLE = struct.Struct("3Q40x")


class CUDARuntimeError(RuntimeError):
    """As cupy.cuda.runtime.CUDARuntimeError; this one says that there is no memory."""

    status = 2


class SimulatedCupy(SimpleNamespace):
    """Put into ``sys.modules["cupy"]``.

    Args:
        launcher: runs kernels.
        gpus: how many there are.
        memory_bytes: of each.
    """

    __version__ = "simulated"
    uint8 = np.uint8

    def __init__(self, launcher: Launcher, gpus: int = 1, memory_bytes: int = 1 << 30) -> None:
        self.launcher = launcher
        self.free_bytes = dict.fromkeys(range(gpus), memory_bytes)
        self.pinned_bytes = 0
        self.fail_next_launch = False
        self._current = threading.local()
        self._streams: dict[int, Stream] = {}
        # Work that is queued names memory by address alone; nothing is unmapped before the simulation ends.
        self._regions: list[tuple[mmap.mmap, range, int]] = []
        #: The file behind memory that other processes can open, and its size, by address.
        self._files: dict[int, tuple[int, int]] = {}
        #: What was freed, by size and stream.
        self._pool: dict[tuple[int, int], list[Memory]] = {}
        super().__init__(
            add=self._add,
            ndarray=lambda shape, dtype, memptr: DeviceArray(memptr, memptr.ptr, shape[0]),
            RawModule=lambda code, options, name_expressions: RawModule(self, name_expressions),
            cuda=SimpleNamespace(
                Device=lambda gpu: Device(self, gpu),
                Stream=lambda non_blocking: Stream(self, self.current_gpu),
                Event=lambda block=False, disable_timing=False: Event(),
                get_elapsed_time=lambda start, end: (end.passed_at_s - start.passed_at_s) * 1000,
                nvrtc=SimpleNamespace(getVersion=lambda: (0, 0)),
                alloc=self._alloc,
                alloc_pinned_memory=self._alloc_pinned,
                Memory=self._memory,
                UnownedMemory=lambda ptr, nbytes, owner, gpu: OpenedMemory(ptr, gpu, owner),
                MemoryPointer=MemoryPointer,
                runtime=SimpleNamespace(
                    CUDARuntimeError=CUDARuntimeError,
                    memcpyHostToDevice=1,
                    memcpyDeviceToHost=2,
                    memcpyDeviceToDevice=3,
                    getDeviceCount=lambda: gpus,
                    getDeviceProperties=lambda gpu: {
                        "name": b"Simulated GPU",
                        "major": 0,
                        "minor": 0,
                        "totalGlobalMem": memory_bytes,
                    },
                    driverGetVersion=lambda: 0,
                    runtimeGetVersion=lambda: 0,
                    ipcGetMemHandle=self._ipc_handle,
                    ipcOpenMemHandle=self._ipc_open,
                    ipcCloseMemHandle=lambda address: None,  # nothing is unmapped before the simulation ends
                    memcpyAsync=self._memcpy,
                    memcpyPeerAsync=lambda target, to, source, of, nbytes, stream: self._memcpy(
                        target, source, nbytes, 3, stream
                    ),
                    memsetAsync=lambda target, value, nbytes, stream: self._streams[stream].queue(
                        lambda: ctypes.memset(target, value, nbytes)
                    ),
                ),
            ),
        )

    @property
    def current_gpu(self) -> int:
        return getattr(self._current, "gpus", [0])[-1]

    def stack(self, name: str, first: list[Any]) -> list[Any]:
        """What is current in this thread, outermost first."""
        if not hasattr(self._current, name):
            setattr(self._current, name, first)
        stack: list[Any] = getattr(self._current, name)
        return stack

    def new_handle(self, stream: Stream) -> int:
        """Takes a new stream in; returns its handle."""
        ptr = len(self._streams) + 1
        self._streams[ptr] = stream
        return ptr

    def end(self) -> None:
        """Ends the threads. All work must be done."""
        for stream in self._streams.values():
            stream.end()

    def _alloc(self, nbytes: int) -> MemoryPointer:
        """From the pool: memory that was freed while the same stream was current, as it is, before any other."""
        key = (nbytes, self.stack("streams", [])[-1].ptr)
        free = self._pool.setdefault(key, [])
        memory = free.pop() if free else self._memory(nbytes)
        pointer = MemoryPointer(memory, 0)
        weakref.finalize(pointer, free.append, memory)
        return pointer

    def _memory(self, nbytes: int) -> Memory:
        """From the driver."""
        gpu = self.current_gpu
        if nbytes > self.free_bytes[gpu]:
            raise CUDARuntimeError(f"cudaErrorMemoryAllocation: out of memory allocating {nbytes} bytes")
        size = max(nbytes, 1) + mmap.PAGESIZE
        # As CUDA has it, memory of the pool is not for other processes.
        fd = os.memfd_create("simulated-gpu") if nbytes >= _LEAST_IPC_BYTES else -1
        if fd >= 0:
            os.ftruncate(fd, size)
        region = mmap.mmap(fd, size)
        region[: min(nbytes, 1 << 20)] = b"\xcd" * min(nbytes, 1 << 20)
        start = ctypes.addressof(ctypes.c_char.from_buffer(region))
        self._regions.append((region, range(start, start + nbytes), gpu))
        if fd >= 0:
            self._files[start] = fd, size
        self.free_bytes[gpu] -= nbytes
        memory = Memory(start, gpu)
        weakref.finalize(memory, self._free, gpu, nbytes)
        return memory

    def _ipc_handle(self, address: int) -> bytes:
        return _IPC_HANDLE.pack(os.getpid(), *self._files[address])

    def _ipc_open(self, handle: bytes, flags: int) -> int:
        """Needs the flag by which peer access is enabled, and another process, as CUDA does."""
        assert flags == 1
        pid, fd, size = _IPC_HANDLE.unpack(handle)
        if pid == os.getpid():
            raise CUDARuntimeError("cudaErrorInvalidResourceHandle: the memory is of this process")
        there = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
        region = mmap.mmap(there, size)
        os.close(there)
        start = ctypes.addressof(ctypes.c_char.from_buffer(region))
        self._regions.append((region, range(start, start + size - mmap.PAGESIZE), self.current_gpu))
        return start

    def _free(self, gpu: int, nbytes: int) -> None:
        self.free_bytes[gpu] += nbytes

    def _alloc_pinned(self, nbytes: int) -> np.ndarray:
        self.pinned_bytes += nbytes
        return np.full(nbytes, 0xDD, np.uint8)

    def _memcpy(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        self._streams[stream].queue(lambda: ctypes.memmove(target, source, nbytes))

    def check_operands(self, arguments: np.ndarray) -> None:
        """A kernel must not touch what is not on its GPU: these have no peer access to each other."""
        if not arguments["count"][0]:
            return
        for address in (*arguments["sources"][0].tolist(), *arguments["destinations"][0].tolist()):
            here = any(address in addresses for _, addresses, gpu in self._regions if gpu == self.current_gpu)
            assert here or not address, f"a kernel of GPU {self.current_gpu} is given address {address:#x}"

    def _add(self, left: DeviceArray, right: DeviceArray, out: DeviceArray) -> None:
        def run() -> None:
            a, b, c = (
                np.frombuffer(memoryview((ctypes.c_char * array.nbytes).from_address(array.data.ptr)), array.dtype)
                for array in (left, right, out)
            )
            np.add(a, b, out=c)

        self.stack("streams", [])[-1].queue(run)


class Memory:
    """Memory of a GPU; goes back to the driver when nothing refers to it."""

    def __init__(self, ptr: int, gpu: int) -> None:
        self.ptr = ptr
        self.gpu = gpu


class OpenedMemory(Memory):
    """Memory of another process; keeps alive what opened it."""

    def __init__(self, ptr: int, gpu: int, owner: object) -> None:
        super().__init__(ptr, gpu)
        self.owner = owner


class MemoryPointer:
    """A place in memory. Memory of the pool goes back there when nothing refers to this."""

    def __init__(self, memory: Memory, offset: int) -> None:
        self.memory = memory
        self.ptr = memory.ptr + offset


class DeviceArray:
    """A one-dimensional uint8 array that only queued work can read and write."""

    def __init__(self, memory: MemoryPointer, ptr: int, nbytes: int, dtype: Any = np.uint8) -> None:
        self._memory = memory
        self.dtype = dtype
        self.data = SimpleNamespace(ptr=ptr)
        self.nbytes = nbytes
        self.device = SimpleNamespace(id=memory.memory.gpu)

    def view(self, dtype: Any) -> DeviceArray:
        return DeviceArray(self._memory, self.data.ptr, self.nbytes, dtype)

    def __getitem__(self, part: slice) -> DeviceArray:
        start, stop, step = part.indices(self.nbytes)
        assert step == 1
        return DeviceArray(self._memory, self.data.ptr + start, max(0, stop - start))


class Device:
    """A GPU; current inside ``with``."""

    def __init__(self, cupy: SimulatedCupy, gpu: int) -> None:
        self.attributes = {"MultiProcessorCount": 2}
        self._cupy = cupy
        self._gpu = gpu

    def use(self) -> None:
        self._cupy.stack("gpus", [0])[-1] = self._gpu

    def __enter__(self) -> None:
        self._cupy.stack("gpus", [0]).append(self._gpu)

    def __exit__(self, *error: object) -> None:
        self._cupy.stack("gpus", [0]).pop()


class Event:
    """A point in a stream; recorded once."""

    def __init__(self) -> None:
        self.passed = threading.Event()
        self.passed_at_s = 0.0
        self.failure: list[Exception] = []

    @property
    def done(self) -> bool:
        return self.passed.is_set() and not self.failure

    def synchronize(self) -> None:
        assert self.passed.wait(60), "an event did not come to pass"
        if self.failure:
            raise self.failure[0]


class Stream:
    """Work done in order by a thread of its own, a random while after it was queued."""

    def __init__(self, cupy: SimulatedCupy, gpu: int) -> None:
        self._cupy = cupy
        self._gpu = gpu
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._failure: list[Exception] = []
        self.ptr = cupy.new_handle(self)
        self._dawdle = random.Random(self.ptr)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def queue(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def synchronize(self) -> None:
        self.record(Event()).synchronize()

    def record(self, event: Event) -> Event:
        assert self._cupy.current_gpu == self._gpu, "an event and its stream must be of one GPU"

        def pass_event() -> None:
            event.failure = self._failure
            event.passed_at_s = time.perf_counter()
            event.passed.set()

        self.queue(pass_event)
        return event

    def wait_event(self, event: Event) -> None:
        self.queue(lambda: event.passed.wait(60))

    def __enter__(self) -> Stream:
        assert self._cupy.current_gpu == self._gpu, "a stream is used on its own GPU"
        self._cupy.stack("streams", []).append(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._cupy.stack("streams", []).pop()

    def end(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            time.sleep(self._dawdle.random() * _MAX_DELAY_S)
            try:
                work()
            except Exception as failure:  # noqa: BLE001  CUDA tells those who wait for later events
                self._failure.append(failure)


class RawModule:
    """Kernels by name expression."""

    def __init__(self, cupy: SimulatedCupy, name_expressions: tuple[str, ...]) -> None:
        self._cupy = cupy
        self._names = name_expressions

    def get_function(self, name: str) -> Callable[..., None]:
        assert name in self._names

        def kernel(grid: tuple[int], block: tuple[int], args: tuple[np.ndarray]) -> None:
            (arguments,) = args
            packed = arguments.copy()
            self._cupy.check_operands(packed)
            stream = self._cupy.stack("streams", [])[-1]
            fails, self._cupy.fail_next_launch = self._cupy.fail_next_launch, False

            def run() -> None:
                if fails:
                    raise RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")
                self._cupy.launcher(name, packed, grid[0], block[0])

            stream.queue(run)

        return kernel
