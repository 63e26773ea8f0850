"""The way in: a connection to a coordinator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from dsml_gpu.client.arrays import Device
from dsml_gpu.client.communicator import Communicator, init_request
from dsml_gpu.client.rpc import CoordinatorConnection
from dsml_gpu.schedules.cost_model import CostModel
from dsml_gpu.wire import gpu_sim_pb2 as pb


class Client:
    """A connection to a coordinator. Made by `connect` or `local`; ends with `close` or its ``with`` block. Thread-safe."""

    def __init__(self, connection: CoordinatorConnection, on_close: Callable[[], None] | None = None) -> None:
        self._connection = connection
        self._on_close = on_close
        self._closed = False

    @property
    def target(self) -> str:
        """host:port of the coordinator."""
        return self._connection.target

    def communicator(
        self,
        ndevices: int | None = None,
        *,
        device_ids: Sequence[int] | None = None,
        transport: str = "auto",
        on_failure: str | None = None,
    ) -> Communicator:
        """A new communicator.

        Args:
            ndevices: number of ranks, on any free devices.
            device_ids: exactly these devices, in the order of ranks, also where other communicators use them.
            transport: ``"auto"``, ``"p2p"`` or ``"grpc"``.
            on_failure: what becomes of an operation when a device dies. ``"shrink"``: it is undone and runs again on the
                others. ``"fail"``: it is undone and fails, and so do all later ones, as with NCCL. ``"restore"``: a free
                device takes the place, with its memory as the last checkpoint has it. None: as the coordinator was told,
                which is ``"shrink"`` unless it was told otherwise.

        Raises:
            OutOfDevices: not enough devices are free.
            DeviceNotFound, PeerUnavailable: a named device does not exist or answer.
            InvalidValue: p2p between devices of different processes.
        """
        request = init_request(ndevices, device_ids, transport, on_failure)
        return Communicator(self._connection, self._connection.call("CommInit", request))

    def devices(self) -> list[Device]:
        """All devices that the coordinator knows and that answer."""
        response = self._connection.call("ListDevices", pb.ListDevicesRequest())
        return [Device(self._connection, status.metadata) for status in response.devices if status.reachable]

    def cost_model(self) -> CostModel:
        """The cost model by which the coordinator chooses algorithms."""
        return CostModel.from_json(self._connection.call("GetCostModel", pb.GetCostModelRequest()).json)

    def set_cost_model(self, model: CostModel) -> None:
        """Makes the coordinator choose by another cost model, and keep it where it was started with a file for it.

        Raises:
            InternalError: the file could not be written; the model is in use all the same.
        """
        self._connection.call("SetCostModel", pb.SetCostModelRequest(json=model.to_json()))

    def close(self) -> None:
        """Closes the connection, and the coordinator too where `local` made it. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._connection.close()
        if self._on_close is not None:
            self._on_close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.target}, {'closed' if self._closed else 'open'})"


def connect(
    target: str, *, timeout_s: float = 30.0, collective_timeout_s: float = 660.0, reconnect_s: float = 30.0
) -> Client:
    """Connects to a running coordinator.

    When the connection breaks, or the coordinator is gone, the client tries again and says so in the log; a call that was
    under way goes on where it was, or happens then, and in either case once.

    Args:
        target: host:port.
        timeout_s: deadline of calls that do no long work, the first connection included.
        collective_timeout_s: deadline of collectives.
        reconnect_s: how long a call tries to reach a coordinator that does not answer any more, within its own deadline;
            0: not at all.

    Raises:
        PeerUnavailable: nobody answers there.
    """
    return Client(CoordinatorConnection(target, timeout_s, collective_timeout_s, reconnect_s))
