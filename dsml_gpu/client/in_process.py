"""A coordinator with embedded devices inside the caller's own process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from dsml_gpu.client.client import Client, connect
from dsml_gpu.coordinator.server import DEFAULT_MEMORY_BYTES, CoordinatorConfig, CoordinatorServer
from dsml_gpu.memory.backend import select_backends


def local(
    devices: int = 4, *, memory_bytes: int = DEFAULT_MEMORY_BYTES, backend: str = "auto", gpus: Sequence[int] = ()
) -> Client:
    """Starts a coordinator with embedded devices in a thread of this process, and connects to it.

    It listens on a free port of 127.0.0.1; closing the client stops it.

    Args:
        devices: how many devices it has.
        memory_bytes: address space of each; memory is used only where it is touched (numpy) or once it is touched (CuPy).
        backend: ``"auto"``, ``"numpy"`` or ``"cupy"``.
        gpus: numbers of the GPUs that the devices take in turn; none: all GPUs of the machine.

    Raises:
        BackendUnavailable: ``"cupy"`` or a GPU was asked for and cannot be had here.
        ValueError: another backend, or GPUs together with numpy.
    """
    backends, _ = select_backends(backend, gpus)
    thread = _CoordinatorThread(CoordinatorConfig(port=0, embedded=devices, memory_bytes=memory_bytes, backends=backends))
    try:
        client = connect(thread.address)
    except BaseException:
        thread.stop()
        raise
    client._on_close = thread.stop
    return client


class _CoordinatorThread:
    """Runs a coordinator in an event loop of its own."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self._config = config
        self._started: Future[str] = Future()
        self._thread = threading.Thread(target=self._run, name="dsml-gpu-coordinator", daemon=True)
        self._thread.start()
        self.address = self._started.result()

    def stop(self) -> None:
        """Stops the coordinator and waits for it."""
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        try:
            server = CoordinatorServer(self._config)
            await server.start()
        except BaseException as error:  # noqa: BLE001  raised where the thread was started
            self._started.set_exception(error)
            return
        self._started.set_result(server.address)
        await self._ended.wait()
        await server.stop(drain_s=1.0)
