"""A gRPC server as this project runs them: our services, health, reflection, one port that is ours alone, orderly end."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from dsml_gpu.wire.service import service_handler
from dsml_gpu.wire.stubs import DEFAULT_MAX_MESSAGE_BYTES, channel_options
from dsml_gpu.wire.trim import MessageMemory

log = logging.getLogger(__name__)

_WILDCARDS = ("0.0.0.0", "::")


class PortInUse(OSError):
    """The address cannot be listened on; the message is one line for people."""


class RpcServer:
    """An asyncio gRPC server for services of the contract.

    Use: construct, `bind`, `await start(...)`, then `await stop()`; all from one event loop.

    Args:
        host, port: where to listen; port 0 takes a free one.
        max_message_bytes: larger messages are refused with RESOURCE_EXHAUSTED.
    """

    def __init__(self, host: str, port: int, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> None:
        self.host = host
        self.port = port
        # Without SO_REUSEPORT a second server on the port is an error, not a silent sharer of its connections.
        self._server = grpc.aio.server(options=[*channel_options(max_message_bytes), ("grpc.so_reuseport", 0)])
        self._health: Any = None
        self._stopped = False

    @property
    def address(self) -> str:
        """host:port for those who connect; the port is the real one once the server is bound."""
        host = socket.gethostname() if self.host in _WILDCARDS else self.host
        return _join(host, self.port)

    def bind(self) -> None:
        """Takes the port; connections wait until `start`.

        Raises:
            PortInUse: the address is taken or cannot be bound.
        """
        listen_on = _join(self.host, self.port)
        try:
            port = self._server.add_insecure_port(listen_on)
        except RuntimeError:
            port = 0
        if port == 0:
            raise PortInUse(f"cannot listen on {listen_on}: the port is in use, or the host is not ours")
        self.port = port

    async def start(self, servicers: Mapping[str, Any], stall_timeout_s: float) -> None:
        """Serves.

        Args:
            servicers: service name in the contract (``"GPUDevice"``) -> servicer.
            stall_timeout_s: a stream whose client neither sends nor takes a message for so long is given up.
        """
        memory = MessageMemory()
        for name, servicer in servicers.items():
            self._server.add_generic_rpc_handlers((service_handler(name, servicer, stall_timeout_s, memory),))
        names = [f"gpu_sim.{name}" for name in servicers]
        self._add_health_and_reflection(names)
        await self._server.start()
        if self._health is not None:
            from grpc_health.v1 import health_pb2

            for name in ["", *names]:
                await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def _add_health_and_reflection(self, names: Sequence[str]) -> None:
        # An installation has both packages. A machine that has only what computing needs serves without them.
        try:
            from grpc_health.v1 import health, health_pb2_grpc
            from grpc_reflection.v1alpha import reflection
        except ImportError as error:
            log.warning("no health and reflection services: %s", error)
            return
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)

    async def stop(self, drain_s: float = 10.0) -> None:
        """Refuses new calls, lets running ones end for `drain_s` seconds, cancels the rest. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        if self._health is not None:
            await self._health.enter_graceful_shutdown()
        await self._server.stop(drain_s)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
