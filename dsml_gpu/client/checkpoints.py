"""Checkpoints of a communicator's arrays: written in the background, and read back, also on another number of ranks."""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np

from dsml_gpu.client.arrays import DeviceArray
from dsml_gpu.client.epochs import Members
from dsml_gpu.client.rpc import Answers, CoordinatorConnection
from dsml_gpu.errors import DsmlError, InternalError, InvalidValue, OperationTimeout, RankMismatch
from dsml_gpu.reduction import dtype_of, wire_dtype
from dsml_gpu.wire import gpu_sim_pb2 as pb

log = logging.getLogger(__name__)

#: A checkpoint may take the time of a collective and what it needs at this speed.
_SLOWEST_STORAGE_BYTES_PER_S = 4e6


class CheckpointJob:
    """A checkpoint that is being written. Made by `Communicator.checkpoint`. Thread-safe.

    Attributes:
        url: where it is written.
    """

    def __init__(self, url: str, answers: Answers) -> None:
        self.url = url
        self._answers = answers
        self._progress = (0, 0)
        self._error: Exception | None = None
        self._complete = False
        self._copied = threading.Event()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    @property
    def done(self) -> bool:
        """It is complete, or was given up."""
        return self._ended.is_set()

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes that are written, and how many there are in all."""
        return self._progress

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns when the checkpoint is complete.

        Raises:
            OperationTimeout: it is not after `timeout_s`, and goes on.
            StorageUnavailable: a file could not be written.
            PeerUnavailable: a device or the coordinator is gone.
            OperationAborted: it was cancelled, or its client closed.
        """
        if not self._ended.wait(timeout_s):
            written, total = self._progress
            raise OperationTimeout(f"the checkpoint in {self.url} has {written} of {total} bytes after {timeout_s:g} s")
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Gives it up; the one before stays. Without effect on one that is done."""
        self._answers.cancel()

    def wait_until_copied(self) -> None:
        """Returns when the arrays may change again. Raises what the checkpoint failed with before."""
        self._copied.wait()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for answer in self._answers:
                self._progress = (answer.bytesWritten, answer.bytesTotal)
                self._complete = answer.complete
                if answer.copied:
                    self._copied.set()
            if not self._complete:
                self._error = InternalError(f"the coordinator has ended the checkpoint in {self.url} without a word")
        except Exception as error:  # noqa: BLE001  raised where it is waited for
            self._error = error
        if self._error is not None:
            log.warning("the checkpoint in %s failed: %s", self.url, self._error)  # perhaps nobody waits for it
        self._ended.set()
        self._copied.set()

    def __repr__(self) -> str:
        written, total = self._progress
        state = f"{written} of {total} bytes"
        if self.done:
            state = "complete" if self._error is None else f"failed: {self._error}"
        return f"CheckpointJob({self.url!r}, {state})"


class TrackedArrays:
    """The arrays that a communicator has made, by name, as long as somebody else refers to them."""

    def __init__(self) -> None:
        self._arrays: dict[str, list[weakref.ref[DeviceArray]]] = {}
        self._numbers = itertools.count()

    def add(self, arrays: Sequence[DeviceArray], name: str | None = None) -> None:
        """One array of each rank; without a name, or where others have it, they get the next of array0, array1 ..."""
        if name is None or name in self.live():
            name = next(name for name in map("array{}".format, self._numbers) if name not in self._arrays)
        self._arrays[name] = [weakref.ref(array) for array in arrays]

    def live(self) -> dict[str, list[DeviceArray]]:
        """Those that all ranks still have."""
        found = {name: [array for ref in refs if (array := ref()) is not None] for name, refs in self._arrays.items()}
        live = {
            name: arrays
            for name, arrays in found.items()
            if len(arrays) == len(self._arrays[name]) and not any(array._freed for array in arrays)
        }
        self._arrays = {name: self._arrays[name] for name in live}
        return live


class Checkpoints:
    """What a communicator needs for its checkpoints.

    Args:
        comm_id: of the communicator.
    """

    def __init__(self, connection: CoordinatorConnection, comm_id: int) -> None:
        self._connection = connection
        self._comm_id = comm_id
        self._jobs: list[CheckpointJob] = []
        self.tracked = TrackedArrays()

    def save(
        self, url: str | os.PathLike[str], arrays: Mapping[str, Sequence[DeviceArray]], members: Members
    ) -> CheckpointJob:
        """See `Communicator.checkpoint`."""
        request = pb.CheckpointRequest(
            commId=self._comm_id,
            url=_full_url(url),
            arrays=[_message(*item, members) for item in arrays.items()],
            epoch=members.epoch,
        )
        job = CheckpointJob(request.url, self._connection.stream("Checkpoint", request, self._timeout_s(request.arrays)))
        job.wait_until_copied()
        self._jobs = [*(one for one in self._jobs if not one.done), job]
        return job

    def restore(
        self,
        url: str | os.PathLike[str],
        members: Members,
        into: Mapping[str, Sequence[DeviceArray]] | None,
        timeout_s: float | None,
    ) -> dict[str, list[DeviceArray]]:
        """See `Communicator.restore`."""
        url = _full_url(url)
        made: dict[str, list[DeviceArray]] = {}
        if into is not None:
            self._restore_into(url, into, members, timeout_s)
            return {name: list(arrays) for name, arrays in into.items()}
        request = pb.RestoreRequest(commId=self._comm_id, url=url, describeOnly=True)
        try:
            for array in self._connection.call("Restore", request, self._timeout_s([])).arrays:
                own = made[array.name] = []
                for device, part in zip(members.devices, array.parts, strict=True):
                    own.append(device.empty(tuple(part.shape), dtype_of(array.dtype)))
            self._restore_into(url, made, members, timeout_s)
        except BaseException:
            for array in itertools.chain.from_iterable(made.values()):
                with suppress(DsmlError):  # what came before is the error to be seen
                    array.free()
            raise
        for name, arrays in made.items():
            self.tracked.add(arrays, name)
        return made

    def _restore_into(
        self, url: str, arrays: Mapping[str, Sequence[DeviceArray]], members: Members, timeout_s: float | None
    ) -> None:
        messages = [_message(*item, members) for item in arrays.items()]
        request = pb.RestoreRequest(commId=self._comm_id, url=url, arrays=messages, epoch=members.epoch)
        self._connection.call("Restore", request, timeout_s or self._timeout_s(messages))

    def wait(self) -> None:
        """Returns when nothing is written any more; each job has its own error."""
        for job in self._jobs:
            with suppress(DsmlError):  # is raised where the job is waited for
                job.wait()

    def _timeout_s(self, arrays: Sequence[pb.CheckpointArray]) -> float:
        nbytes = sum(math.prod(part.shape) * dtype_of(array.dtype).itemsize for array in arrays for part in array.parts)
        return self._connection.collective_timeout_s + nbytes / _SLOWEST_STORAGE_BYTES_PER_S


def _message(name: str, arrays: Sequence[DeviceArray], members: Members) -> pb.CheckpointArray:
    if len(arrays) != members.nranks:
        raise RankMismatch(f"{members.nranks} ranks need one array {name!r} each, got {len(arrays)}")
    for rank, array in enumerate(arrays):
        array._require_alive()
        members.require_on(array, rank)
    types = {np.dtype(array.dtype) for array in arrays}
    if len(types) > 1:
        raise InvalidValue(f"{name!r} has types {', '.join(sorted(map(str, types)))} on different ranks, expected one")
    return pb.CheckpointArray(
        name=name,
        dtype=pb.DataType.Name(wire_dtype(types.pop())),
        parts=[pb.ArrayPart(shape=array.shape, memAddr=array.addr) for array in arrays],
    )


def _full_url(url: str | os.PathLike[str]) -> str:
    """A path that means the same to servers, which have working directories of their own; URLs as they are."""
    text = os.fspath(url)
    return text if "://" in text or "::" in text else os.path.abspath(os.path.expanduser(text))
