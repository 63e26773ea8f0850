"""The coordinator's side of one device server, which has one or more devices."""

from __future__ import annotations

from collections.abc import Callable

from dsml_gpu.coordinator.connection import DeviceConnection
from dsml_gpu.coordinator.device_handle import CONTROL_TIMEOUT_S, DeviceHandle, lost_connection
from dsml_gpu.coordinator.heartbeats import DEFAULT_DETECTION, Detection
from dsml_gpu.errors import DsmlError
from dsml_gpu.wire import gpu_sim_pb2 as pb

#: For the answer of a server whose devices are all lost; it is asked again whenever it shows that it is alive.
_LOST_TIMEOUT_S = 1.0


class ServerHandle:
    """One device server, and the devices it has.

    A device server that has never answered stands for one device that nobody can use. One that comes back with other
    devices than before adds those that are new. Those that are gone are unreachable as long as a communicator has them,
    because its ranks are these devices and no others; then they are forgotten.

    Args:
        connection: to its service.
        address: host:port.
        detection: when its devices count as dead.

    Attributes:
        connection: as given.
        handles: its devices in its order, then those that are gone.
        beat: its last heartbeat.
        on_answer: called when it has answered.
    """

    def __init__(self, connection: DeviceConnection, address: str, detection: Detection = DEFAULT_DETECTION) -> None:
        self.connection = connection
        self.address = address
        self._detection = detection
        self.handles = [DeviceHandle(connection, address, detection=detection)]
        self.beat = pb.HeartbeatResponse()
        self.on_answer: Callable[[], None] = lambda: None

    @property
    def reachable(self) -> bool:
        """Whether one of its devices is."""
        return any(handle.reachable for handle in self.handles)

    @property
    def in_use(self) -> bool:
        """Whether a communicator has one of its devices."""
        return any(handle.comm_ids for handle in self.handles)

    @property
    def has_answered(self) -> bool:
        """Whether it is known which devices it has."""
        return any(handle.device_id for handle in self.handles)

    def __str__(self) -> str:
        return f"the device server at {self.address}"

    @property
    def owes(self) -> bool:
        """Whether it has to answer before all of its devices can be used."""
        return any(handle.owes for handle in self.handles)

    @property
    def process_uid(self) -> str:
        """Of the process that answered last; empty where none did."""
        return self.handles[0].metadata.processUid

    def give_up(self, why: str, after_s: float) -> None:
        """All its devices are lost. See `DeviceHandle.give_up`."""
        for handle in self.handles:
            handle.give_up(why, after_s)

    async def refresh(self) -> None:
        """Asks the server which devices it has, and has those that were lost come back.

        Raises:
            PeerUnavailable, OperationTimeout: it does not answer; then none of its devices is reachable.
            DsmlError: what it refused with.
        """
        try:
            response = await self._ask()
        except DsmlError as error:
            for handle in self.handles:
                handle.answers = False
            raise lost_connection(str(self), error) or error from None
        self.on_answer()
        reported = self._take_over(response)
        await self.connection.open_lane(reported[0].metadata.lane)
        for handle in reported:
            await handle.come_back()

    async def _ask(self) -> pb.GetDeviceMetadataResponse:
        request = pb.GetDeviceMetadataRequest()
        known = [handle for handle in self.handles if handle.device_id]
        if not known or all(handle.lost for handle in known):
            limit_s = _LOST_TIMEOUT_S if known else CONTROL_TIMEOUT_S
            lost_answer: pb.GetDeviceMetadataResponse = await self.connection.call("GetDeviceMetadata", request, limit_s)
            return lost_answer
        present = next(handle for handle in known if not handle.lost)
        answer: pb.GetDeviceMetadataResponse = await present.unless_lost(
            self.connection.call("GetDeviceMetadata", request, CONTROL_TIMEOUT_S)
        )
        return answer

    def expect(self, device_id: int) -> DeviceHandle:
        """A device that the server has had; lost, where it has not answered that it still has it."""
        handle = next((one for one in self.handles if one.device_id == device_id), None)
        if handle is None:
            if self.has_answered:
                handle = self._new_handle()
                self.handles.append(handle)
            else:
                handle = self.handles[0]
            handle.metadata.deviceId.value = device_id
            # Which addresses it had nobody knows; that it is gone is to be found before that.
            handle.metadata.maxMemAddr.value = (1 << 64) - 1
            handle.give_up("has not answered since the coordinator was started")
        return handle

    def close(self) -> None:
        """Closes the connection's lane. Idempotent."""
        self.connection.close()

    def _take_over(self, response: pb.GetDeviceMetadataResponse) -> list[DeviceHandle]:
        """Makes the handles those of the devices that the server says it has now, and returns these."""
        known = {handle.device_id: handle for handle in self.handles}
        reported: dict[int, DeviceHandle] = {}
        # A server that knows only the original contract has one device and lists none.
        for metadata in response.devices or [response.metadata]:
            device_id = metadata.deviceId.value
            handle = reported[device_id] = known.get(device_id) or self._new_handle()
            handle.update(metadata)
        gone = [handle for device_id, handle in known.items() if device_id not in reported]
        for handle in gone:
            handle.give_up("is gone: its server was restarted without it")
            handle.answers = False
        self.handles = [*reported.values(), *(handle for handle in gone if handle.comm_ids)]
        return list(reported.values())

    def _new_handle(self) -> DeviceHandle:
        return DeviceHandle(self.connection, self.address, detection=self._detection)
