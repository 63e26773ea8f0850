"""The coordinator's side of one configured device server, which has one or more devices."""

from __future__ import annotations

from dsml_gpu.coordinator.device_handle import CONTROL_TIMEOUT_S, DeviceConnection, DeviceHandle, lost_connection
from dsml_gpu.errors import DsmlError
from dsml_gpu.wire import gpu_sim_pb2 as pb


class ServerHandle:
    """One device server, and the devices it has.

    A device server that has never answered stands for one device that nobody can use. One that comes back with other
    devices than before adds those that are new. Those that are gone are unreachable as long as a communicator has them,
    because its ranks are these devices and no others; then they are forgotten.

    Args:
        connection: to its service.
        address: host:port.

    Attributes:
        handles: its devices in its order, then those that are gone.
    """

    def __init__(self, connection: DeviceConnection, address: str) -> None:
        self._connection = connection
        self.address = address
        self.handles = [DeviceHandle(connection, address)]

    @property
    def reachable(self) -> bool:
        """Whether one of its devices is."""
        return any(handle.reachable for handle in self.handles)

    @property
    def has_answered(self) -> bool:
        """Whether it is known which devices it has."""
        return any(handle.device_id for handle in self.handles)

    def __str__(self) -> str:
        return f"the device server at {self.address}"

    async def refresh(self) -> None:
        """Asks the server which devices it has, and tells them of the leaves that they did not hear.

        Raises:
            PeerUnavailable, OperationTimeout: it does not answer; then none of its devices is reachable.
            DsmlError: what it refused with.
        """
        try:
            response = await self._connection.call("GetDeviceMetadata", pb.GetDeviceMetadataRequest(), CONTROL_TIMEOUT_S)
        except DsmlError as error:
            for handle in self.handles:
                handle.reachable = False
            raise lost_connection(str(self), error) or error from None
        reported = self._take_over(response)
        await self._connection.open_lane(reported[0].metadata.lane)
        for handle in reported:
            await handle.retry_leaves()

    def close(self) -> None:
        """Closes the connection's lane. Idempotent."""
        self._connection.close()

    def _take_over(self, response: pb.GetDeviceMetadataResponse) -> list[DeviceHandle]:
        """Makes the handles those of the devices that the server says it has now, and returns these."""
        known = {handle.device_id: handle for handle in self.handles}
        reported: dict[int, DeviceHandle] = {}
        # A server that knows only the original contract has one device and lists none.
        for metadata in response.devices or [response.metadata]:
            device_id = metadata.deviceId.value
            handle = reported[device_id] = known.get(device_id) or DeviceHandle(self._connection, self.address)
            handle.update(metadata)
        gone = [handle for device_id, handle in known.items() if device_id not in reported]
        for handle in gone:
            handle.reachable = False
        self.handles = [*reported.values(), *(handle for handle in gone if handle.comm_ids)]
        return list(reported.values())
