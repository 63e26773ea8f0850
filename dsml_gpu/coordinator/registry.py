"""The devices a coordinator has, and who uses which."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from dsml_gpu.coordinator.call import Range
from dsml_gpu.coordinator.connection import RemoteConnection
from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.embedded import EmbeddedDevices
from dsml_gpu.coordinator.heartbeats import DEFAULT_DETECTION, Detection, Watch
from dsml_gpu.coordinator.plan import MAX_RANKS
from dsml_gpu.coordinator.replacement import choose_spare
from dsml_gpu.coordinator.server_handle import ServerHandle
from dsml_gpu.coordinator.signs import RemoteSigns
from dsml_gpu.errors import DeviceNotFound, DsmlError, InvalidValue, OutOfDevices, PeerUnavailable
from dsml_gpu.transport.grpc import Peer

log = logging.getLogger(__name__)


class DeviceRegistry:
    """Devices of servers that are configured or have registered, and embedded ones.

    Args:
        addresses: host:port of the configured device servers, in the order in which communicators take their devices.
        embedded: makes devices of this process.
        stall_timeout_s: a copy to or from a device server fails when nothing moves for so long.
        detection: when a device counts as dead.

    Attributes:
        servers: the configured ones, in that order, then those that have registered.
        watches: who tells whether a server is alive, from `start` on.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        embedded: EmbeddedDevices,
        stall_timeout_s: float,
        detection: Detection = DEFAULT_DETECTION,
    ) -> None:
        self._embedded = embedded
        self._stall_timeout_s = stall_timeout_s
        self._detection = detection
        self._peers: dict[ServerHandle, Peer] = {}
        self.servers = [self._server_at(address) for address in addresses]
        self.watches: dict[ServerHandle, Watch] = {}
        self._registered: set[ServerHandle] = set()
        #: Addresses of servers that have left, and what is under way of those that leave.
        self._left: set[str] = set()
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._local: list[DeviceHandle] = []

    async def start(self, permanent_embedded: int) -> None:
        """Asks the configured device servers who they are, and watches them; then makes the embedded devices that stay.

        Args:
            permanent_embedded: how many; above that they come and go with communicators.

        Raises:
            InvalidValue: two device servers have the same device id.
        """
        await self._ask_all()
        for one, other in self._duplicates():
            raise InvalidValue(_same_id(one, other))
        for server in self.servers:
            self._watch(server)
        for _ in range(permanent_embedded):
            self._local.append(self._embedded.create(self._ids(), permanent=True))

    # ---- servers that come and go -------------------------------------------------------------------------------------

    async def register(self, address: str) -> ServerHandle:
        """Takes in a device server, which is from then on like a configured one.

        Returns:
            The server; the same at every call, also where one of the calls named it otherwise.

        Raises:
            PeerUnavailable: it cannot be reached at the address.
            InvalidValue: others have its device ids.
        """
        known = self._server(address)
        server = known or self._server_at(address)
        try:
            await server.refresh()
            if known is None:
                known = self._taken_in(server)
                await self._forget_predecessors(known)
            return known
        except DsmlError as error:
            if isinstance(error, InvalidValue):
                raise
            raise PeerUnavailable(f"the coordinator cannot reach {address}: {error}") from None
        finally:
            if server not in self.servers:
                await self._close(server)

    async def unregister(self, address: str, retire: Callable[[DeviceHandle], Awaitable[None]]) -> None:
        """Lets a device server leave; returns when it has. Idempotent.

        Args:
            retire: returns when a device's communicators have ended what they run on it.

        Raises:
            DeviceNotFound: there never was one at the address.
        """
        server = self._server(address)
        if server is None:
            if address in self._left:
                return
            raise DeviceNotFound(f"no device server has registered as {address}")
        if address not in self._leaving:
            task = self._leaving[address] = asyncio.ensure_future(self._leave(server, retire))
            task.add_done_callback(lambda _: self._leaving.pop(address, None))
        await asyncio.shield(self._leaving[address])  # who has asked may be gone before

    def _server(self, address: str) -> ServerHandle | None:
        return next((server for server in self.servers if server.address == address), None)

    def _server_at(self, address: str) -> ServerHandle:
        peer = Peer(address)
        server = ServerHandle(RemoteConnection(peer.stub, self._stall_timeout_s), address, self._detection)
        self._peers[server] = peer
        return server

    async def _close(self, server: ServerHandle) -> None:
        server.close()
        peer = self._peers.pop(server, None)
        if peer is not None:
            await peer.close()

    def _taken_in(self, server: ServerHandle) -> ServerHandle:
        """Makes a server that has answered one of ours, unless it is already. Raises InvalidValue."""
        for other in self.servers:
            if other.address == server.address or other.process_uid == server.process_uid != "":
                return other
        ids = {handle.device_id for handle in server.handles}
        for handle in self._by_right:
            if handle.device_id in ids and (handle.reachable or handle.comm_ids):
                raise InvalidValue(_same_id(handle, server.handles[0]))
        self.servers.append(server)
        self._registered.add(server)
        self._left.discard(server.address)
        self._watch(server)
        log.info("%s has registered with devices %s", server, _id_list(ids))
        return server

    async def _forget_predecessors(self, server: ServerHandle) -> None:
        """Forgets lost servers that had a device of this one, and which nobody but they themselves has named."""
        ids = {handle.device_id for handle in server.handles}
        for other in list(self._registered - {server}):
            if not other.reachable and not other.in_use and ids & {handle.device_id for handle in other.handles}:
                await self._forget(other)

    async def _forget(self, server: ServerHandle) -> None:
        self.servers.remove(server)
        self._registered.discard(server)
        await self._unwatch(server)
        await self._close(server)

    async def _leave(self, server: ServerHandle, retire: Callable[[DeviceHandle], Awaitable[None]]) -> None:
        process_uid, handles = server.process_uid, list(server.handles)
        for handle in handles:
            handle.leaving = True
        try:
            await asyncio.gather(*(retire(handle) for handle in handles))
        finally:
            for handle in handles:
                handle.leaving = False
        if server.process_uid != process_uid:  # the next process is there already
            return
        self._left.add(server.address)
        for handle in handles:
            if handle.comm_ids:
                handle.give_up("has left")
        await self._forget(server)
        log.info("%s has left", server)

    def _watch(self, server: ServerHandle) -> None:
        connection = server.connection
        watch = self.watches[server] = Watch(server, RemoteSigns(server.address, lambda: connection.lane), self._detection)
        connection.on_lane_end = watch.look_now
        watch.start()

    async def _unwatch(self, server: ServerHandle) -> None:
        watch = self.watches.pop(server, None)
        if watch is not None:
            await watch.stop()

    # ---- devices ------------------------------------------------------------------------------------------------------

    @property
    def handles(self) -> list[DeviceHandle]:
        """All devices, those of servers first."""
        return [*self._remote, *self._local]

    @property
    def _remote(self) -> list[DeviceHandle]:
        return [handle for server in self.servers for handle in server.handles]

    @property
    def _by_right(self) -> list[DeviceHandle]:
        """All devices; of several with one id, the one that has it by right comes first."""
        return [*self._local, *sorted(self._remote, key=lambda handle: (not handle.comm_ids, not handle.reachable))]

    def _ids(self) -> set[int]:
        return {handle.device_id for handle in self.handles}

    async def refresh(self) -> None:
        """Asks every configured server which devices it has; `handle.reachable` tells which there are.

        A device that comes up with the id of another one is not used.
        """
        await self._ask_all()
        for one, other in self._duplicates():
            log.warning("%s", _same_id(one, other))
            other.answers = False

    async def _ask_all(self) -> None:
        for result in await asyncio.gather(*(server.refresh() for server in self.servers), return_exceptions=True):
            if isinstance(result, DsmlError):
                log.warning("%s", result)
            elif isinstance(result, BaseException):
                raise result

    def _duplicates(self) -> list[tuple[DeviceHandle, DeviceHandle]]:
        """Pairs of devices with the same id: the one that has it by right, and the other, which has answered.

        A communicator keeps the id of its device also where that one does not answer: nobody is to take its place there.
        """
        seen: dict[int, DeviceHandle] = {}
        pairs = []
        for handle in self._by_right:
            if not handle.reachable and not handle.comm_ids:
                continue
            if seen.setdefault(handle.device_id, handle) is not handle:
                pairs.append((seen[handle.device_id], handle))
        return pairs

    def device(self, device_id: int) -> DeviceHandle:
        """The device of an id.

        Raises:
            DeviceNotFound: there is none.
        """
        for handle in self._by_right:
            if handle.device_id == device_id != 0:
                return handle
        raise DeviceNotFound(f"no device {device_id}; there are {_id_list(self._ids())}")

    async def take(self, count: int, comm_id: int) -> list[DeviceHandle]:
        """`count` devices that no communicator uses, for `comm_id`: configured ones first, then embedded ones.

        Raises:
            OutOfDevices: there are not so many and no more can be embedded, or it is more than `MAX_RANKS`.
            PeerUnavailable: there would be, if all configured devices answered.
        """
        await self.refresh()
        free = [handle for handle in self.handles if handle.reachable and not handle.comm_ids and not handle.leaving]
        missing = count - len(free)
        room = self._embedded.limit - len(self._embedded)
        if missing > room:
            # Not those that have answered with the id of another one.
            silent = [
                handle
                for handle in self._remote
                if not handle.reachable
                and not handle.comm_ids
                and (not handle.device_id or self.device(handle.device_id) is handle)
            ]
            message = (
                f"{count} devices were asked for; {len(free)} of {len(self.handles)} are free, {room} more can be embedded"
            )
            # How many devices a server has that never answered, nobody knows.
            if len(silent) >= missing - room or not all(server.has_answered for server in self.servers):
                addresses = ", ".join(dict.fromkeys(handle.address for handle in silent))
                raise PeerUnavailable(f"{message}, and these do not answer: {addresses}")
            raise OutOfDevices(f"{message}; destroy a communicator, or name the devices to share them")
        _check_size(count)
        for _ in range(missing):
            handle = self._embedded.create(self._ids(), permanent=False)
            self._local.append(handle)
            free.append(handle)
        return self._assign(free[:count], comm_id)

    async def take_named(self, device_ids: Sequence[int], comm_id: int) -> list[DeviceHandle]:
        """Exactly these devices, for `comm_id`, whoever else uses them.

        Raises:
            InvalidValue: an id stands twice.
            DeviceNotFound: an id names no device.
            PeerUnavailable: one does not answer.
        """
        if len(set(device_ids)) != len(device_ids):
            raise InvalidValue(f"device ids must differ, got {list(device_ids)}")
        _check_size(len(device_ids))
        await self.refresh()
        handles = [self.device(device_id) for device_id in device_ids]
        for handle in handles:
            if not handle.reachable:
                raise PeerUnavailable(handle.lost or f"{handle} does not answer")
            if handle.leaving:
                raise PeerUnavailable(f"{handle} is about to leave")
        return self._assign(handles, comm_id)

    def expected(self, address: str, device_id: int) -> DeviceHandle:
        """A device that a server was known to have; lost, where it does not answer, or not with that device.

        Args:
            address: of the server, which is watched from now on if it was not yet.
        """
        server = self._server(address)
        if server is None:
            for other in self.servers:  # it may be known by another name
                for handle in other.handles:
                    if handle.device_id == device_id and handle.reachable:
                        return handle
            server = self._server_at(address)
            self.servers.append(server)
            self._registered.add(server)
            self._watch(server)
        return server.expect(device_id)

    def spare(self, blocks: Sequence[Range], like: DeviceHandle, comm_id: int) -> DeviceHandle:
        """A free device that can take the place of another one, for `comm_id`. See `replacement.choose_spare`."""
        (spare,) = self._assign([choose_spare(self.handles, like, blocks)], comm_id)
        return spare

    def release(self, handles: Sequence[DeviceHandle], comm_id: int) -> None:
        """Gives devices back; embedded ones that were made on demand and that nobody uses end."""
        for handle in handles:
            handle.comm_ids.discard(comm_id)
            if not handle.permanent and not handle.comm_ids:
                self._local.remove(handle)
                self._embedded.end(handle)

    async def close(self) -> None:
        """Closes the connections to device servers."""
        for task in self._leaving.values():
            task.cancel()
        for server in self.servers:
            await self._unwatch(server)
            await self._close(server)

    @staticmethod
    def _assign(handles: list[DeviceHandle], comm_id: int) -> list[DeviceHandle]:
        for handle in handles:
            handle.comm_ids.add(comm_id)
        return handles


def _same_id(one: DeviceHandle, other: DeviceHandle) -> str:
    return (
        f"device ids must differ, but the servers at {one.address} and {other.address} both have {one.device_id}; "
        f"start one of them with another --id"
    )


def _check_size(nranks: int) -> None:
    if nranks > MAX_RANKS:
        raise OutOfDevices(f"a communicator has at most {MAX_RANKS} ranks, {nranks} were asked for")


def _id_list(ids: set[int]) -> str:
    return ", ".join(map(str, sorted(ids - {0}))) or "none"
