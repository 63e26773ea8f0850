"""The coordinator's side of one device, in its own process or behind a connection."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any, TypeVar

import numpy as np

from dsml_gpu.coordinator.connection import DeviceConnection
from dsml_gpu.coordinator.heartbeats import DEFAULT_DETECTION, Detection, Requests
from dsml_gpu.errors import (
    DeviceNotFound,
    DsmlError,
    NoAnswer,
    OperationAborted,
    PeerUnavailable,
    StorageUnavailable,
    Unavailable,
)
from dsml_gpu.memory.arena import OpenedArena, check_range
from dsml_gpu.memory.shared import SharedHandle, open_shared
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.codec import Chunk
from dsml_gpu.wire.lane import Lane
from dsml_gpu.wire.stubs import COPY_SLICE_BYTES
from dsml_gpu.wire.timeouts import in_time

log = logging.getLogger(__name__)

T = TypeVar("T")

#: For control messages that do no work.
CONTROL_TIMEOUT_S = 5.0
#: To move all of a device's memory.
_MOVE_TIMEOUT_S = 120.0


class DeviceHandle:
    """One device as the coordinator sees it.

    A device is lost when it is given up: it is dead, or does not show that it is alive. It may come back, in the same
    process or in another one (`metadata.processUid`), which is another device with the same id. It is used again when it
    has answered, and has stopped and forgotten what it did for communicators that went on without it.

    Args:
        connection: to its service.
        address: host:port of its server.
        embedded: it lives in this process.
        permanent: it stays when no communicator uses it.
        detection: when it counts as dead.

    Attributes:
        answers: it did when last asked.
        leaving: its server is about to leave; nobody is to take it any more.
        lost: why it was given up, for example "device 7 at 10.0.0.5:50051 has sent no heartbeat for 2.0 s"; empty: it was
            not, or is back.
        lost_after_s: from when it was last known to be alive until it was given up the last time.
    """

    def __init__(
        self,
        connection: DeviceConnection,
        address: str,
        embedded: bool = False,
        permanent: bool = True,
        detection: Detection = DEFAULT_DETECTION,
    ) -> None:
        self._connection = connection
        self.address = address
        self.embedded = embedded
        self.permanent = permanent
        self.answers = False
        self.leaving = False
        self.lost = ""
        self.lost_after_s = 0.0
        self._loss_waiters: set[asyncio.Future[str]] = set()
        self._requests = Requests(detection)
        self._answered_s = time.monotonic()
        self.metadata = pb.DeviceMetadata(address=address)
        #: Where others open its memory, as it last said; None: not at all.
        self.shared: pb.SharedMemory | None = None
        #: Its memory as this process has it open, what it was opened with, and the lane that would tell of its end.
        self._opened: OpenedArena | None = None
        self._opened_handle: pb.SharedMemory | None = None
        self._opened_by: Lane | None = None
        self.comm_ids: set[int] = set()
        self.last_work: asyncio.Future[None] | None = None
        self._unheard_leaves: set[int] = set()
        self._ended = False

    @property
    def device_id(self) -> int:
        """0 until the device has answered once."""
        return self.metadata.deviceId.value

    def __str__(self) -> str:
        return f"device {self.device_id or '?'} at {self.address}"

    @property
    def reachable(self) -> bool:
        """Whether it can be used, as far as known."""
        return self.answers and not self.lost and not self._unheard_leaves

    @property
    def owes(self) -> bool:
        """Whether it has to answer before it can be used."""
        return bool(self.lost or self._unheard_leaves)

    @property
    def tells_of_its_end(self) -> bool:
        """Whether this would be False if its process had died."""
        return self._connection.tells_of_its_end and not self.lost

    def update(self, metadata: pb.DeviceMetadata) -> None:
        """Takes what the device's server says of it, which has just answered."""
        if self.metadata.processUid and self.metadata.processUid != metadata.processUid:
            self.give_up("is gone: its server was restarted")
        # A message of its own each time: one that is written again and again keeps the memory of all it has ever held.
        known = pb.DeviceMetadata()
        known.CopyFrom(metadata)
        # The address that others reach it by is the one that reached it, not what it believes of itself.
        known.address = self.address
        self.metadata = known
        self.answers = True

    def give_up(self, why: str, after_s: float | None = None) -> None:
        """The device is lost. Without effect on one that is.

        Args:
            why: follows on its name.
            after_s: since it was last known to be alive; None: since it last answered a request.
        """
        if self.lost or not self.metadata.deviceId.value:
            return
        self.lost = f"{self} {why}"
        self.lost_after_s = time.monotonic() - self._answered_s if after_s is None else after_s
        self.answers = False
        log.warning("%s", self.lost)
        for waiter in tuple(self._loss_waiters):
            if not waiter.done():
                waiter.set_result(self.lost)

    def until_lost(self) -> asyncio.Future[str]:
        """A future of the caller's own, which gets the reason when the device is lost. Cancel it when it is not needed."""
        waiter: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if self.lost:
            waiter.set_result(self.lost)
        else:
            self._loss_waiters.add(waiter)
            waiter.add_done_callback(self._loss_waiters.discard)
        return waiter

    async def unless_lost(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled when the device is lost meanwhile.

        Raises:
            PeerUnavailable: it is lost.
        """
        task, loss = asyncio.ensure_future(work), self.until_lost()
        both: list[asyncio.Future[Any]] = [task, loss]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise PeerUnavailable(self.lost)
            return task.result()
        finally:
            loss.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait([task])

    async def come_back(self) -> None:
        """Has a device that answers stop and forget what it did for communicators that are over, or went on without it.

        Raises:
            DsmlError: it does not answer, or refuses; it stays lost.
        """
        for comm_id in sorted(self._unheard_leaves):
            for method, request in (
                ("Quiesce", pb.QuiesceRequest(commId=comm_id, deviceId=self.device_id)),
                ("LeaveComm", pb.LeaveCommRequest(commId=comm_id, deviceId=self.device_id)),
            ):
                with self._named_errors():
                    await self._connection.call(method, request, CONTROL_TIMEOUT_S)
            self._unheard_leaves.discard(comm_id)
        if self.lost and self.answers:
            log.warning("%s is back", self)
            self.lost = ""
            self._requests.forget()

    def drop(self, comm_id: int) -> None:
        """A communicator goes on without the device, which is used again only when it has heard of that."""
        self._unheard_leaves.add(comm_id)

    async def leave(self, comm_id: int) -> None:
        """Tells the device that a communicator is over; one that does not hear it is told again when it answers next."""
        try:
            await self.call("LeaveComm", pb.LeaveCommRequest(commId=comm_id, deviceId=self.device_id))
        except BaseException:
            self._unheard_leaves.add(comm_id)
            raise
        self._unheard_leaves.discard(comm_id)

    async def share_memory(self, *, move: bool = False) -> None:
        """Asks where its memory can be opened, which `shared` says from then on.

        Args:
            move: it is to be somewhere else first, where nobody has it open.

        Raises:
            PeerUnavailable, OperationTimeout: it does not answer.
            DsmlError: its memory cannot be opened.
        """
        request = pb.ShareMemoryRequest(deviceId=self.device_id, move=move)
        try:
            self.shared = await self.call("ShareMemory", request, _MOVE_TIMEOUT_S if move else CONTROL_TIMEOUT_S)
        except DsmlError:
            self.shared = None
            raise

    def end(self) -> None:
        """The device is no more."""
        self._ended = True

    def require_alive(self) -> None:
        """Raises DeviceNotFound where the device is no more: the communicator that it was made for has ended."""
        if self._ended:
            raise DeviceNotFound(f"{self} has ended with its communicator")

    async def call(self, method: str, request: Any, timeout_s: float | None = CONTROL_TIMEOUT_S) -> Any:
        """One RPC to the device.

        Args:
            timeout_s: deadline; None where the caller has its own.

        Raises:
            PeerUnavailable: there is no connection to it, or it broke; or the device is lost. Of a call without `timeout_s`
                that runs when the device is lost, the caller must see to that (`until_lost`).
            OperationTimeout: it did not answer in time.
            DsmlError: what the device refused with.
        """
        if self.lost:
            raise PeerUnavailable(self.lost)
        with self._named_errors():
            work = self._connection.call(method, request, timeout_s)
            answer = await (work if timeout_s is None or self.embedded else self.unless_lost(work))
        self._answered_s = time.monotonic()
        self._requests.note(answered=True)
        return answer

    async def write(self, addr: int, nbytes: int, chunks: AsyncIterator[Chunk]) -> int:
        """Host to device: `chunks` are written one behind the other from `addr` on. Returns the bytes written.

        Args:
            nbytes: bytes that will come; 0 where that is not known.
        """
        header = pb.DataChunk(deviceId=self.metadata.deviceId, memAddr=pb.MemAddr(value=addr), numBytes=nbytes)

        async def with_header() -> AsyncIterator[Chunk]:
            yield Chunk(b"", header)
            async for chunk in chunks:
                yield chunk

        memory = await self._open_memory()
        if memory is not None:
            written = 0
            async for chunk in chunks:
                data = np.frombuffer(chunk.data, np.uint8)
                memory.view(addr + written, data.size)[...] = data
                written += data.size
            self._require_connected()
            return written
        try:
            with self._named_errors():
                writing = self._connection.write(with_header())
                return int((await (writing if self.embedded else self.unless_lost(writing))).numBytes)
        except OperationAborted as error:
            # The stream's end may have hidden why it ended: a device that is gone says nothing any more.
            await self.call("GetDeviceMetadata", pb.GetDeviceMetadataRequest(deviceId=self.device_id))
            raise OperationAborted(f"{self}: {error}") from None

    async def read(self, addr: int, nbytes: int) -> AsyncGenerator[Chunk, None]:
        """Device to host, in pieces, each valid until the next one is asked for."""
        memory = await self._open_memory()
        if memory is not None:
            for start in range(addr, addr + nbytes, COPY_SLICE_BYTES):
                yield Chunk(memory.view(start, min(COPY_SLICE_BYTES, addr + nbytes - start)))
            self._require_connected()
            return
        request = pb.StreamDeviceToHostRequest(
            deviceId=self.metadata.deviceId, memAddr=pb.MemAddr(value=addr), numBytes=nbytes
        )
        loss = self.until_lost()
        try:
            with self._named_errors():
                async with aclosing(self._connection.read(request, loss)) as chunks:
                    async for chunk in chunks:
                        yield chunk
        finally:
            loss.cancel()

    async def stream(self, method: str, request: Any, stall_timeout_s: float) -> AsyncGenerator[Any, None]:
        """One RPC to the device that is answered by a stream of messages. Errors as `call`, and:

        Raises:
            OperationTimeout: no message came for `stall_timeout_s`.
        """
        if self.lost:
            raise PeerUnavailable(self.lost)
        with self._named_errors():
            async with aclosing(self._connection.stream(method, request)) as answers:

                async def next_answer() -> Any:
                    return await anext(answers, None)

                while True:
                    step = next_answer() if self.embedded else self.unless_lost(next_answer())
                    answer = await in_time(step, stall_timeout_s, f"{self} to go on with {method}")
                    if answer is None:
                        return
                    yield answer

    async def _open_memory(self) -> OpenedArena | None:
        """The device's memory where this process has it open; None where it cannot."""
        lane = self._connection.lane
        # Without a lane nobody would tell that the device has died, whose memory lives on as long as somebody has it open.
        if lane is None or not lane.is_open or self.metadata.backend != "numpy":
            return None
        if self._opened_by is not lane or (self._opened is not None and self._opened_handle != self.shared):
            self._opened_by, self._opened = lane, None
            with suppress(DsmlError):  # then copies go by gRPC
                await self.share_memory()
                assert self.shared is not None
                array = open_shared(SharedHandle.of_message(self.shared))
                self._opened, self._opened_handle = OpenedArena(array, self.shared.minMemAddr.value), self.shared
        return self._opened

    def _require_connected(self) -> None:
        if not self.tells_of_its_end:
            self.answers = False
            raise PeerUnavailable(self.lost or f"{self} is gone")

    def check(self, addr: int, nbytes: int) -> None:
        """Raises AddressOutOfRange unless the range lies in the device's memory."""
        check_range(addr, nbytes, self.metadata.minMemAddr.value, self.metadata.maxMemAddr.value)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Connection errors say which device they are about, and so does that its server no longer has it."""
        try:
            yield
        except DsmlError as error:
            lost = lost_connection(str(self), error)
            if isinstance(error, DeviceNotFound) and not self.embedded:
                lost = PeerUnavailable(f"{self} is gone, its server was restarted without it: {error}")
            if lost is None:
                raise
            if isinstance(error, NoAnswer) and self._requests.note(answered=False):
                self.give_up(f"has not answered {self._requests} in time")
            self.answers = False
            raise lost from None


def lost_connection(who: str, error: DsmlError) -> DsmlError | None:
    """The error of a call that nobody answered, saying whom it was for; None where `error` is an answer."""
    if isinstance(error, (PeerUnavailable, StorageUnavailable)):  # what a device that answers says of its peer, or disk
        return None
    if isinstance(error, Unavailable):
        return PeerUnavailable(f"{who} does not answer: {error}")
    if isinstance(error, NoAnswer):
        return NoAnswer(f"{who} does not answer: {error}")
    return None


def pieces(data: bytes) -> AsyncIterator[Chunk]:
    """Host bytes as the chunks of a streaming copy, without copying them."""

    async def generate() -> AsyncIterator[Chunk]:
        view = memoryview(data)
        for start in range(0, len(view), COPY_SLICE_BYTES):
            yield Chunk(view[start : start + COPY_SLICE_BYTES])

    return generate()
