"""A copy to a device that has begun and ends when told to: it holds its place in the order of the device."""

from __future__ import annotations

import queue
from typing import Any

from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.processes import wait_until
from tests.support.rpc import CALL_TIMEOUT_S, rpc_to

MARK = b"has come"


class SlowCopy:
    """A StreamHostToDevice to the beginning of a device's memory, of which the first 8 bytes have arrived.

    Args:
        stub: of the coordinator, or of the device's own server.
        device: where to.
        nbytes: how many will come; at least 8.

    Attributes:
        answer: the future of the call.
    """

    def __init__(self, stub: Any, device: pb.DeviceMetadata, nbytes: int) -> None:
        self._chunks: queue.Queue[pb.DataChunk | None] = queue.Queue()
        self._nbytes = nbytes
        self._chunks.put(pb.DataChunk(deviceId=device.deviceId, memAddr=device.minMemAddr, numBytes=nbytes, data=MARK))
        self.answer = stub.StreamHostToDevice.future(iter(self._chunks.get, None), timeout=2 * CALL_TIMEOUT_S)
        request = pb.StreamDeviceToHostRequest(deviceId=device.deviceId, memAddr=device.minMemAddr, numBytes=len(MARK))
        with rpc_to(device.address) as server:

            def has_begun() -> bool:
                # Asked of the device itself, because the coordinator would answer when the copy has ended.
                answer = server.device.StreamDeviceToHost(request, timeout=CALL_TIMEOUT_S)
                return b"".join(chunk.data for chunk in answer) == MARK

            wait_until(has_begun, "the beginning of the copy")

    def finish(self, rest: bytes | None = None) -> None:
        """Sends all the rest, zeros unless it is given, and waits for the end."""
        self._chunks.put(pb.DataChunk(data=bytes(self._nbytes - len(MARK)) if rest is None else rest))
        self._chunks.put(None)
        assert self.answer.result().numBytes == self._nbytes

    def give_up(self) -> None:
        """Cancels the call."""
        self.answer.cancel()
        self._chunks.put(None)
