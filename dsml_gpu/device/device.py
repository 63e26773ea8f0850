"""One device: its memory, and the communicators it is a rank of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dsml_gpu.device.undo import SparePieces
from dsml_gpu.errors import CommNotFound, InvalidValue, StaleEpoch
from dsml_gpu.memory.allocator import Allocator
from dsml_gpu.memory.arena import Arena
from dsml_gpu.memory.device_memory import DeviceNDArray
from dsml_gpu.memory.staging import Staging
from dsml_gpu.reduction import HostReducer, Reducer

#: Shared by all devices: what it compiles, it compiles once.
_HOST_REDUCER = HostReducer()


@dataclass(frozen=True, slots=True)
class Peer:
    """Where a rank's device is.

    Attributes:
        p2p: its memory is read directly; otherwise slices come and go by StreamSend.
    """

    rank: int
    device_id: int
    address: str
    p2p: bool

    def __str__(self) -> str:
        return f"rank {self.rank} (device {self.device_id} at {self.address})"


class RankMemory(Protocol):
    """The memory of a rank's device."""

    @property
    def has_staging(self) -> bool:
        """Whether there is a `staging`."""

    @property
    def staging(self) -> Staging:
        """Where results of the device's passes are staged. Raises MemoryNotShared where there is nothing."""

    def view(self, addr: int, nbytes: int) -> DeviceNDArray:
        """The bytes ``[addr, addr + nbytes)`` as a uint8 array. Raises AddressOutOfRange."""


@dataclass(frozen=True, slots=True)
class Membership:
    """A device's place in a communicator.

    Attributes:
        memories: of each rank, where the device has it open; None where not. Empty: of none.
        epoch: version of the communicator's membership; 0: it has none.
    """

    comm_id: int
    rank: int
    peers: tuple[Peer, ...]
    memories: tuple[RankMemory | None, ...] = ()
    epoch: int = 0

    @property
    def nranks(self) -> int:
        return len(self.peers)

    def peer(self, rank: int) -> Peer:
        """The peer of a rank.

        Raises:
            InvalidValue: no such rank.
        """
        if rank >= self.nranks:
            raise InvalidValue(f"rank {rank} is not one of the {self.nranks} ranks of communicator {self.comm_id}")
        return self.peers[rank]

    def memory(self, rank: int) -> RankMemory:
        """The memory of a rank's device. Raises InvalidValue where it is not open here."""
        memory = self.memories[rank] if rank < len(self.memories) else None
        if memory is None:
            raise InvalidValue(f"the memory of {self.peer(rank)} is not open here")
        return memory


class Device:
    """One device of a server. Not thread-safe: everything happens in the server's event loop.

    Args:
        device_id: unique among the devices of a coordinator; not 0.
        arena: its memory.
    """

    def __init__(self, device_id: int, arena: Arena) -> None:
        self.device_id = device_id
        self.arena = arena
        self.allocator = Allocator(arena.min_addr, arena.max_addr)
        self._reducer: Reducer | None = None
        self._spare_pieces: SparePieces | None = None
        self._memberships: dict[int, Membership] = {}

    @property
    def reducer(self) -> Reducer:
        """Reduces in the device's memory, in order with the work queued on it."""
        if self._reducer is None:
            self._reducer = _reducer_of(self.arena)
        return self._reducer

    @property
    def spare_pieces(self) -> SparePieces:
        """Memory for what operations overwrite."""
        if self._spare_pieces is None:
            self._spare_pieces = SparePieces(self.arena.memory)
        return self._spare_pieces

    def join(self, membership: Membership) -> None:
        """Enters a communicator; replaces what the device knew of it.

        Raises:
            InvalidValue: the rank is none of the ranks.
            StaleEpoch: it is in a later epoch of it.
        """
        known = self._memberships.get(membership.comm_id)
        if known is not None and membership.epoch < known.epoch:
            raise StaleEpoch(
                f"device {self.device_id} is in epoch {known.epoch} of communicator {membership.comm_id}, and was to join "
                f"epoch {membership.epoch}"
            )
        if not 0 <= membership.rank < membership.nranks:
            raise InvalidValue(f"rank {membership.rank} is not one of {membership.nranks} ranks")
        self._memberships[membership.comm_id] = membership

    def opened_before(self, comm_id: int, epoch: int, rank: int, device_id: int) -> RankMemory | None:
        """The memory of a rank that this device has open already, as a member of the same epoch; None: it has not."""
        known = self._memberships.get(comm_id)
        if known is None or known.epoch != epoch or rank >= len(known.memories) or known.peer(rank).device_id != device_id:
            return None
        return known.memories[rank]

    def leave(self, comm_id: int) -> None:
        """Forgets a communicator and frees what was allocated for it. Idempotent."""
        self._memberships.pop(comm_id, None)
        if comm_id:
            self.allocator.free_all(comm_id)

    def membership(self, comm_id: int, epoch: int = 0) -> Membership:
        """The device's place in a communicator.

        Args:
            epoch: the one that is expected; 0: any.

        Raises:
            CommNotFound: it has not joined it.
            StaleEpoch: it is in another epoch of it.
        """
        membership = self._memberships.get(comm_id)
        if membership is None:
            raise CommNotFound(f"device {self.device_id} has not joined communicator {comm_id}")
        if epoch not in (0, membership.epoch):
            raise StaleEpoch(
                f"device {self.device_id} is in epoch {membership.epoch} of communicator {comm_id}, and was asked for work "
                f"of epoch {epoch}"
            )
        return membership

    def __repr__(self) -> str:
        return f"Device({self.device_id}, {self.arena!r}, {len(self._memberships)} communicators)"


def _reducer_of(arena: Arena) -> Reducer:
    if arena.backend.name == "numpy":
        return _HOST_REDUCER
    # Not before there is a GPU: both import CuPy.
    from dsml_gpu.memory.cuda import CudaMemory
    from dsml_gpu.reduction.cuda import CudaReducer

    assert isinstance(arena.memory, CudaMemory)
    return CudaReducer(arena.memory.gpu, arena.memory.compute)
