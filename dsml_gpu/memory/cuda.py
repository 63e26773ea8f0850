"""Device memory on a GPU, through CuPy.

Each device has three CUDA streams: one on which kernels run and memory is copied inside the GPU, and one for copies from
the host and to it each, so that both directions of the bus and the kernels work side by side. Events keep them in order.
Copies to and from the host go slice by slice through pinned memory, so that a slice crosses the bus while another one is
on the network. Nothing waits for the whole GPU, and the event loop never waits at all: a thread does (`EventWaiter`).
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import cupy as cp
import numpy as np

from dsml_gpu.errors import InternalError, MemoryNotShared
from dsml_gpu.memory.device_memory import DeviceNDArray, HostBytes, Mark
from dsml_gpu.memory.shared import SharedHandle, boot_id
from dsml_gpu.memory.staging import Staging

#: cudaErrorMemoryAllocation.
_MEMORY_ALLOCATION = 2
#: CUDA_IPC_HANDLE_SIZE.
_IPC_HANDLE_BYTES = 64
#: cudaIpcMemLazyEnablePeerAccess.
_LAZY_ENABLE_PEER_ACCESS = 1
#: Least size of a slot; what is longer is copied piece by piece, or has a slot of its own size.
SLOT_BYTES = 1 << 20
#: Slots under way on one stream before the next copy waits for the oldest.
MAX_SLOTS = 16


class CudaMemory:
    """See `DeviceMemory`.

    Args:
        gpu: number of the GPU, as CUDA counts them; several devices may share one.

    Attributes:
        gpu: as given.
        compute: the stream on which kernels run.
    """

    lends_staged = True
    has_staging = False

    def __init__(self, gpu: int) -> None:
        self.gpu = gpu
        # For good, not for a while: CUDA's own first choice, GPU 0, would get a context that nobody wants.
        cp.cuda.Device(gpu).use()
        self.compute = cp.cuda.Stream(non_blocking=True)
        self._from_host = cp.cuda.Stream(non_blocking=True)
        self._to_host = cp.cuda.Stream(non_blocking=True)
        self._waiter = EventWaiter(gpu)
        self._arena: DeviceNDArray = None
        self._opened: weakref.WeakValueDictionary[SharedHandle, _OpenedMemory] = weakref.WeakValueDictionary()
        self._upload_slots = SlotPool(self._waiter, partial(_from_pool, gpu, self._from_host))
        self._download_slots = SlotPool(self._waiter)

    def _on_gpu(self) -> Any:
        return cp.cuda.Device(self.gpu)

    def allocate(self, nbytes: int) -> DeviceNDArray:
        with self._on_gpu():
            try:
                # Not from CuPy's pool, which would keep it when the device has ended.
                memory = cp.cuda.Memory(nbytes)
            except cp.cuda.runtime.CUDARuntimeError as error:
                if error.status != _MEMORY_ALLOCATION:
                    raise
                raise MemoryError(str(error)) from error
            array = cp.ndarray((nbytes,), cp.uint8, cp.cuda.MemoryPointer(memory, 0))
            cp.cuda.runtime.memsetAsync(array.data.ptr, 0, nbytes, self.compute.ptr)
        return array

    def allocate_arena(self, nbytes: int) -> DeviceNDArray:
        self._arena = self.allocate(nbytes)
        return self._arena

    def share(self) -> SharedHandle:
        with self._on_gpu():
            try:
                handle = cp.cuda.runtime.ipcGetMemHandle(self._arena.data.ptr)
            except cp.cuda.runtime.CUDARuntimeError as error:
                raise MemoryNotShared(f"GPU {self.gpu} does not share it: {error}") from None
        return SharedHandle(self._arena.nbytes, boot_id(), cuda_ipc_handle=bytes(handle))

    def open_shared(self, handle: SharedHandle) -> DeviceNDArray:
        # CuPy reads as many bytes as a handle has, however many it is given.
        if len(handle.cuda_ipc_handle) != _IPC_HANDLE_BYTES or handle.boot_id != boot_id():
            raise MemoryNotShared("it is no memory of a GPU of this host")
        opened = self._opened.get(handle)
        if opened is None:
            with self._on_gpu():
                try:
                    address = cp.cuda.runtime.ipcOpenMemHandle(handle.cuda_ipc_handle, _LAZY_ENABLE_PEER_ACCESS)
                except cp.cuda.runtime.CUDARuntimeError as error:
                    raise MemoryNotShared(f"GPU {self.gpu} cannot open it: {error}") from None
            opened = self._opened[handle] = _OpenedMemory(self.gpu, address)
        memory = cp.cuda.UnownedMemory(opened.address, handle.nbytes, opened, self.gpu)
        return cp.ndarray((handle.nbytes,), cp.uint8, cp.cuda.MemoryPointer(memory, 0))

    def staging(self) -> Staging:
        raise MemoryNotShared("memory of a GPU has no staging: it ends with its process")

    def open_staging(self, handle: SharedHandle) -> Staging:
        raise MemoryNotShared("memory of a GPU has no staging: it ends with its process")

    def give_back_staging(self) -> None:
        pass

    def move_arena(self) -> DeviceNDArray:
        old, self._arena = self._arena, self.allocate(self._arena.nbytes)
        self.copy(self._arena, old)
        self.compute.synchronize()
        return self._arena

    def copy(self, target: DeviceNDArray, source: DeviceNDArray) -> None:
        _copy_async(target.data.ptr, source.data.ptr, target.nbytes, cp.cuda.runtime.memcpyDeviceToDevice, self.compute)

    def scratch(self, nbytes: int) -> DeviceNDArray:
        return _from_pool(self.gpu, self.compute, nbytes)

    def clone(self, source: DeviceNDArray) -> DeviceNDArray:
        array = self.scratch(source.nbytes)
        self.copy(array, source)
        return array

    def near(self, array: DeviceNDArray) -> DeviceNDArray:
        source = array.device.id
        if source == self.gpu:
            return array
        here = _from_pool(self.gpu, self.compute, array.nbytes)
        cp.cuda.runtime.memcpyPeerAsync(here.data.ptr, self.gpu, array.data.ptr, source, array.nbytes, self.compute.ptr)
        return here

    async def write(self, target: DeviceNDArray, data: HostBytes) -> None:
        source = np.frombuffer(data, np.uint8)
        self._order(self.compute, self._from_host)
        try:
            for start in range(0, source.size, SLOT_BYTES):
                piece = source[start : start + SLOT_BYTES]
                slot = await self._upload_slots.take(piece.size)
                slot.host[: piece.size] = piece
                destination = target.data.ptr + start
                _copy_async(destination, slot.host_ptr, piece.size, cp.cuda.runtime.memcpyHostToDevice, self._from_host)
                slot.busy_until = self._record(self._from_host)
                self._upload_slots.give_back(slot)
        finally:
            # Also when this is cancelled: what is queued already must not overtake what comes later.
            self._order(self._from_host, self.compute)

    async def stage(self, data: HostBytes) -> _StagedSlot:
        source = np.frombuffer(data, np.uint8)
        slot = await self._upload_slots.take(source.size)
        slot.host[: source.size] = source
        assert slot.device is not None
        array = slot.device[: source.size]
        _copy_async(array.data.ptr, slot.host_ptr, source.size, cp.cuda.runtime.memcpyHostToDevice, self._from_host)
        self._order(self._from_host, self.compute)
        return _StagedSlot(slot, array, self._upload_slots, self.mark)

    def begin_download(self, source: DeviceNDArray) -> _DownloadSlot:
        slot = self._download_slots.take_now(source.nbytes)
        self._order(self.compute, self._to_host)
        _copy_async(slot.host_ptr, source.data.ptr, source.nbytes, cp.cuda.runtime.memcpyDeviceToHost, self._to_host)
        slot.busy_until = self._record(self._to_host)
        return _DownloadSlot(slot, source.nbytes, self._download_slots, self._waiter)

    def mark(self) -> Mark:
        return self._record(self.compute)

    def wait(self, mark: Mark) -> None:
        self.compute.wait_event(mark)

    async def finish(self) -> None:
        # Copies from the host are ahead of what `compute` has been given since.
        await self._waiter.wait(self._record(self.compute))

    def _record(self, stream: Any) -> Any:
        with self._on_gpu():
            return stream.record(_new_event())

    def _order(self, first: Any, then: Any) -> None:
        """What is queued on `then` from now on runs after what was queued on `first`."""
        then.wait_event(self._record(first))


class _OpenedMemory:
    """Closes memory of another process when no array over it is left."""

    def __init__(self, gpu: int, address: int) -> None:
        self.address = address
        weakref.finalize(self, _close_opened, gpu, address).atexit = False


def _close_opened(gpu: int, address: int) -> None:
    with cp.cuda.Device(gpu):
        cp.cuda.runtime.ipcCloseMemHandle(address)


@dataclass(slots=True)
class Slot:
    """Pinned host memory that a copy goes through, with device memory of the same size where kernels read it from there.

    Attributes:
        busy_until: event after which neither is in use; None before the first use.
    """

    host: np.ndarray
    device: DeviceNDArray | None
    busy_until: Any = None

    @property
    def host_ptr(self) -> int:
        return int(self.host.ctypes.data)


class SlotPool:
    """The slots of one direction.

    Args:
        waiter: waits for events.
        allocate: gives slots device memory; None where they need none.
    """

    def __init__(self, waiter: EventWaiter, allocate: Callable[[int], DeviceNDArray] | None = None) -> None:
        self._waiter = waiter
        self._allocate = allocate
        self._given_back: deque[Slot] = deque()
        self._count = 0

    async def take(self, nbytes: int) -> Slot:
        """A slot of at least `nbytes` that nothing uses any more; where there are enough already, waits for the oldest."""
        while self._count >= MAX_SLOTS and self._given_back and not self._given_back[0].busy_until.done:
            await self._waiter.wait(self._given_back[0].busy_until)
        return self.take_now(nbytes)

    def take_now(self, nbytes: int) -> Slot:
        """As `take`, but makes another slot rather than wait."""
        # Slots are given back in the order in which the copies through them end, or nearly so: the oldest will do.
        if self._given_back and self._given_back[0].busy_until.done:
            slot = self._given_back.popleft()
            if slot.host.nbytes >= nbytes:
                return slot
            self._count -= 1
        nbytes = max(nbytes, SLOT_BYTES)
        with cp.cuda.Device(self._waiter.gpu):
            host = np.frombuffer(cp.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)
        slot = Slot(host, None if self._allocate is None else self._allocate(nbytes))
        self._count += 1
        return slot

    def give_back(self, slot: Slot) -> None:
        """`slot` is free once its `busy_until` is done."""
        self._given_back.append(slot)


class _StagedSlot:
    """See `Staged`."""

    def __init__(self, slot: Slot, array: DeviceNDArray, pool: SlotPool, mark: Callable[[], Mark]) -> None:
        self.array = array
        self._slot: Slot | None = slot
        self._pool = pool
        self._mark = mark

    def release(self) -> None:
        if self._slot is not None:
            self._slot.busy_until = self._mark()
            self._pool.give_back(self._slot)
            self._slot = None


class _DownloadSlot:
    """See `Download`."""

    def __init__(self, slot: Slot, nbytes: int, pool: SlotPool, waiter: EventWaiter) -> None:
        self._slot: Slot | None = slot
        self._nbytes = nbytes
        self._pool = pool
        self._waiter = waiter

    async def wait(self) -> np.ndarray:
        assert self._slot is not None, "released before it was waited for"
        await self._waiter.wait(self._slot.busy_until)
        return self._slot.host[: self._nbytes]

    def release(self) -> None:
        if self._slot is not None:
            self._pool.give_back(self._slot)
            self._slot = None


class EventWaiter:
    """Lets coroutines wait for CUDA events without stopping their event loop; the waiting is done by a thread.

    Args:
        gpu: of the events.
    """

    def __init__(self, gpu: int) -> None:
        self.gpu = gpu
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def wait(self, event: Any) -> None:
        """Returns when `event` is done.

        Raises:
            InternalError: the work before it failed; what CUDA says of it.
        """
        if event.done:
            return
        if self._thread is None:
            self._thread = threading.Thread(
                target=_wait_in_turn, args=(self.gpu, self._events), name="cuda-events", daemon=True
            )
            self._thread.start()
            weakref.finalize(self, self._events.put, None)
        loop = asyncio.get_running_loop()
        woken = loop.create_future()
        self._events.put((event, loop, woken))
        await woken


def _wait_in_turn(gpu: int, events: queue.SimpleQueue[Any]) -> None:
    cp.cuda.Device(gpu).use()
    # In turn although they may end in another order: each depends on the GPU alone, so each ends.
    while (item := events.get()) is not None:
        event, loop, woken = item
        error = None
        try:
            event.synchronize()
        except Exception as failure:  # noqa: BLE001  raised where it is waited for
            error = InternalError(f"work on the GPU failed: {failure}")
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the one who waited
            loop.call_soon_threadsafe(_wake, woken, error)


def _wake(woken: asyncio.Future[None], error: InternalError | None) -> None:
    if woken.done():  # cancelled
        return
    if error is None:
        woken.set_result(None)
    else:
        woken.set_exception(error)


def _from_pool(gpu: int, stream: Any, nbytes: int) -> DeviceNDArray:
    # CuPy's pool gives memory that was freed on a stream to the same stream only, so nothing needs to be waited for.
    with cp.cuda.Device(gpu), stream:
        return cp.ndarray((nbytes,), cp.uint8, cp.cuda.alloc(nbytes))


def _new_event() -> Any:
    # `block`: a thread that waits for it sleeps.
    return cp.cuda.Event(block=True, disable_timing=True)


def _copy_async(target_ptr: int, source_ptr: int, nbytes: int, kind: int, stream: Any) -> None:
    cp.cuda.runtime.memcpyAsync(target_ptr, source_ptr, nbytes, kind, stream.ptr)
