"""How a device server makes its devices known to a coordinator, and stays known."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections.abc import Callable

import grpc

from dsml_gpu.errors import DsmlError, Unavailable
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.status import error_of
from dsml_gpu.wire.stubs import coordinator_stub
from dsml_gpu.wire.timeouts import in_time

log = logging.getLogger(__name__)

#: Before the next attempt: doubled each time.
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 2.0
#: A coordinator repeats its answer every few seconds; one of which nothing comes for so long is gone without a word.
_SILENCE_S = 20.0
_REGISTERED = "registered"
#: None of the connections that other parts of the process have.
_OPTIONS = [("grpc.use_local_subchannel_pool", 1)]


class Registration:
    """Of one device server with one coordinator. Whatever becomes of the coordinator, the server goes on.

    Use: construct, `start`, then `await leave(...)`; all from one event loop.

    Args:
        coordinator: host:port.
        advertised: host:port at which coordinator and peers reach the server; None: at `port` of the address from which it
            reaches the coordinator.
        port: that the server listens on.
        chance: draws numbers from 0 to 1.
    """

    def __init__(
        self, coordinator: str, advertised: str | None, port: int, chance: Callable[[], float] = random.random
    ) -> None:
        self._coordinator = coordinator
        self._advertised = advertised
        self._port = port
        self._chance = chance
        self._address = ""  # that the coordinator was told
        self._state = ""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Registers, and again whenever that ends."""
        self._task = asyncio.get_running_loop().create_task(self._stay_registered())

    async def leave(self, timeout_s: float) -> None:
        """Has the coordinator go on without the devices; returns when it does, or says in the log why that is not known."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        if not self._address:
            return
        request = pb.UnregisterDevicesRequest(address=self._address)
        try:
            async with grpc.aio.insecure_channel(self._coordinator, _OPTIONS) as channel:
                await coordinator_stub(channel).UnregisterDevices(request, timeout=timeout_s)
        except grpc.RpcError as failure:
            log.warning("the coordinator at %s was not left in order: %s", self._coordinator, error_of(failure))

    async def _stay_registered(self) -> None:
        attempts = 0
        while True:
            try:
                await self._register()
                kind, why = "stopped", "it was stopped"
            except (DsmlError, OSError) as error:
                kind, why = type(error).__name__, str(error)
            if self._state == _REGISTERED:  # it was until now
                attempts = 0
            self._change(kind, f"not registered with the coordinator at {self._coordinator}, trying again: {why}")
            await asyncio.sleep(delay_s(attempts, self._chance()))
            attempts += 1

    async def _register(self) -> None:
        """Registers, and returns when the coordinator ends it. Raises DsmlError, OSError."""
        address = self._advertised
        if address is None:
            host = await asyncio.to_thread(outgoing_host, self._coordinator)
            address = f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}"
        async with grpc.aio.insecure_channel(self._coordinator, _OPTIONS) as channel:
            call = coordinator_stub(channel).RegisterDevices(pb.RegisterDevicesRequest(address=address))
            try:
                while (answer := await in_time(call.read(), _SILENCE_S, "the coordinator")) is not grpc.aio.EOF:
                    self._address = address
                    ids = ", ".join(map(str, answer.deviceIds))
                    self._change(_REGISTERED, f"registered with the coordinator at {self._coordinator}: devices {ids}")
            except grpc.RpcError as failure:
                raise error_of(failure) from None
            finally:
                call.cancel()

    def _change(self, state: str, what: str) -> None:
        """Logs what has changed, once."""
        if state != self._state:
            # That it is registered is news only where it was not.
            expected = state == _REGISTERED and not self._state
            log.log(logging.INFO if expected else logging.WARNING, "%s", what)
        self._state = state


def delay_s(attempts: int, chance: float) -> float:
    """How long to wait after so many attempts that failed.

    Args:
        chance: from 0 to 1; servers that have lost a coordinator together do not come back all at the same time.
    """
    return min(_FIRST_DELAY_S * 2.0 ** min(attempts, 32), _LONGEST_DELAY_S) * (0.5 + chance / 2)


def outgoing_host(address: str) -> str:
    """The address of this machine from which it reaches another one, as that one sees it. Sends nothing.

    Args:
        address: host:port of the other one.

    Raises:
        Unavailable: there is no way to it.
    """
    host, _, port = address.rpartition(":")
    failure: OSError | None = None
    try:
        for family, _, _, _, place in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM):
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                try:
                    probe.connect(place)
                    return str(probe.getsockname()[0])
                except OSError as error:
                    failure = error
    except (OSError, ValueError) as error:
        raise Unavailable(f"{address}: {error}") from None
    raise Unavailable(f"{address}: {failure}")
