"""A free device takes the place of one that is lost, with what a checkpoint has of its memory.

What the lost one had allocated for the communicator is allocated on the free one at the same addresses, so nobody has to be
told of others. Then the arrays of its rank are loaded from the communicator's last checkpoint. It must have all that the
operations at hand read on that rank: otherwise their result would not be what it says that it is.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dsml_gpu.coordinator.call import CollectiveCall, Range
from dsml_gpu.coordinator.checkpoints import LastCheckpoint, restore_rank, saved_ranges
from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.errors import CheckpointNotFound, DsmlError, OperationTimeout, OutOfDevices, PeerUnavailable
from dsml_gpu.wire import gpu_sim_pb2 as pb

log = logging.getLogger(__name__)


class Allocations:
    """What clients have allocated for communicators, by device."""

    def __init__(self) -> None:
        self._known: defaultdict[tuple[int, int], dict[int, int]] = defaultdict(dict)

    def add(self, comm_id: int, device_id: int, addr: int, nbytes: int) -> None:
        """One more; without effect where it is for no communicator."""
        if comm_id:
            self._known[comm_id, device_id][addr] = nbytes

    def remove(self, comm_id: int, device_id: int, addr: int) -> None:
        """It was freed. Without effect where it is not known."""
        self._known.get((comm_id, device_id), {}).pop(addr, None)

    def of(self, comm_id: int, device_id: int) -> Mapping[int, int]:
        """Bytes of each, by address."""
        return self._known.get((comm_id, device_id), {})

    def move(self, comm_id: int, device_id: int, to: int) -> None:
        """A device has taken the place of another one."""
        self._known[comm_id, to] = self._known.pop((comm_id, device_id), {})

    def drop(self, comm_id: int, device_id: int) -> None:
        """A device is in the communicator no more."""
        self._known.pop((comm_id, device_id), None)

    def forget(self, comm_id: int) -> None:
        """The communicator has ended."""
        for key in [key for key in self._known if key[0] == comm_id]:
            del self._known[key]


def reads_of(calls: Iterable[CollectiveCall], rank: int) -> list[Range]:
    """What calls read of a rank's memory that none of them has written before."""
    reads: list[Range] = []
    written: list[Range] = []
    for call in calls:
        places = [(place, call.counts[block]) for block, place in call.places[rank].items()]
        sends = [Range(place.send, count) for place, count in places if place.send is not None]
        reads += [one for one in sends if uncovered(one, written) is not None]
        written += [Range(place.recv, count) for place, count in places if place.recv is not None]
    return reads


def uncovered(needed: Range, ranges: Iterable[Range]) -> int | None:
    """The first address of a range that is in none of the others; None: all are."""
    addr, end = needed.addr, needed.addr + needed.nbytes
    for one in sorted(ranges):
        if one.addr <= addr < one.addr + one.nbytes:
            addr = one.addr + one.nbytes
    return addr if addr < end else None


def blocks_of(allocated: Mapping[int, int], saved: Sequence[Range]) -> list[Range]:
    """What is to be allocated: what was, and what is saved beside that. Nothing overlaps."""
    blocks = [Range(addr, nbytes) for addr, nbytes in allocated.items()]
    return sorted([*blocks, *(one for one in saved if uncovered(one, blocks) is not None)])


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a lost device.

    Attributes:
        comm_id: of its communicator.
        handle: the lost one.
        seat: see `epochs`.
        reads: what is to be read of its memory next.
    """

    comm_id: int
    handle: DeviceHandle
    seat: int
    reads: Sequence[Range]


async def replace(
    place: Place,
    checkpoint: LastCheckpoint | None,
    allocated: Mapping[int, int],
    next_spare: Callable[[Sequence[Range]], DeviceHandle],
    give_back: Callable[[DeviceHandle], None],
) -> DeviceHandle:
    """Has a free device take a place; returns it.

    Args:
        checkpoint: the communicator's last one.
        allocated: bytes of what was allocated on the lost device, by address.
        next_spare: takes a free device that has memory at some addresses. Raises OutOfDevices.
        give_back: of one that does not do.

    Raises:
        CheckpointNotFound: there is none, or it does not have what is to be read.
        OutOfDevices: no device is free.
        DsmlError: from `checkpoints.restore_rank`.
    """
    if checkpoint is None or place.seat not in checkpoint.seats:
        raise CheckpointNotFound(f"there is no checkpoint of what {place.handle} had")
    rank = checkpoint.seats.index(place.seat)
    saved = [Range(one.addr, one.nbytes) for one in await saved_ranges(checkpoint.url, rank)]
    for needed in place.reads:
        missing = uncovered(needed, saved)
        if missing is not None:
            raise CheckpointNotFound(
                f"the checkpoint in {checkpoint.url} does not have all that is to be read of {place.handle}: not what is at "
                f"{missing:#x}, in {needed.nbytes} bytes from {needed.addr:#x} on"
            )
    blocks = blocks_of(allocated, saved)
    while True:
        spare = next_spare(blocks)
        try:
            for block in blocks:
                request = pb.MallocRequest(
                    deviceId=pb.DeviceId(value=spare.device_id), numBytes=block.nbytes, commId=place.comm_id, at=block.addr
                )
                await spare.call("Malloc", request)
            nbytes = await restore_rank(checkpoint.url, spare, rank)
        except (PeerUnavailable, OperationTimeout) as error:
            log.warning("%s was to take the place of %s, and could not: %s", spare, place.handle, error)
            give_back(spare)
            continue
        except BaseException:
            give_back(spare)
            raise
        log.warning("%s takes the place of %s, with %d bytes of %s", spare, place.handle, nbytes, checkpoint.url)
        return spare


def has_memory_at(handle: DeviceHandle, blocks: Iterable[Range]) -> bool:
    """Whether a device's memory has all addresses of some ranges."""
    try:
        for block in blocks:
            handle.check(block.addr, block.nbytes)
    except DsmlError:
        return False
    return True


def choose_spare(handles: Iterable[DeviceHandle], like: DeviceHandle, blocks: Sequence[Range]) -> DeviceHandle:
    """A free device, one of the same backend, and on the same host, before others; of several the one with the lowest id.

    Raises:
        OutOfDevices: there is none that has memory at these addresses.
    """
    free = [one for one in handles if one.reachable and not one.comm_ids and not one.leaving and has_memory_at(one, blocks)]
    if not free:
        raise OutOfDevices(f"no device is free that could take the place of {like}")
    return min(
        free,
        key=lambda one: (
            one.metadata.backend != like.metadata.backend,
            one.metadata.host != like.metadata.host,
            one.device_id,
        ),
    )
