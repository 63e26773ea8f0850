"""Device servers and a coordinator as processes of their own on this machine, for the demo, the benchmarks and the tests."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import IO

from dsml_gpu.memory.backend import BackendUnavailable, select_backends

_STOP_TIMEOUT_S = 15.0


class ServerDidNotStart(RuntimeError):
    """A server process ended before it was ready; its error output went to ours."""


class ServerProcess:
    """One ``dsml-gpu`` server.

    It stops with `stop`, with its ``with`` block, and with the process that started it, however that one ends.

    Args:
        arguments: of the command, for example ``"device", "--id", "1"``.
        wait: return when it is ready; otherwise at once, and `wait_until_ready` must be called.
        port: to listen on; 0: a free one.
        errors: takes its error output; None: ours does.

    Attributes:
        process: the process.
        address: host:port it listens on, once it is ready.
        ready_line: what it said then.

    Raises:
        ServerDidNotStart: it ended before it was ready.
    """

    address: str
    ready_line: str

    def __init__(
        self,
        *arguments: str,
        wait: bool = True,
        port: int = 0,
        errors: IO[bytes] | None = None,
    ) -> None:
        self._arguments = arguments
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dsml_gpu", *arguments, "--port", str(port), "--until-stdin-closes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C is for the one who started it, who then ends it in order
        )
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Returns when the server listens. Raises ServerDidNotStart."""
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        match = re.search(r"listening on (\S+)", self.ready_line)
        if match is None:
            status = self.stop()
            raise ServerDidNotStart(f"dsml-gpu {' '.join(self._arguments)} did not start; it ended with status {status}")
        self.address = match[1]

    def stop(self) -> int:
        """Asks it to end, waits, and returns its exit status; kills it when it does not end. Idempotent."""
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        try:
            return self.process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def kill(self) -> None:
        """Ends it as ``kill -9`` does; it is gone when this returns. Idempotent."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


class Fleet:
    """A coordinator over device servers, each a process of its own on loopback.

    Each server has one device. Where the machine has GPUs and the options name none, the servers take them in turn.

    Args:
        ndevices: number of device servers; the ids of their devices are 1..ndevices.
        device_options, coordinator_options: further command line options.

    Attributes:
        address: host:port of the coordinator.
        devices, coordinator: the processes.

    Raises:
        ServerDidNotStart: one of them ended before it was ready.
    """

    def __init__(self, ndevices: int, device_options: Sequence[str] = (), coordinator_options: Sequence[str] = ()) -> None:
        self._processes = contextlib.ExitStack()
        gpus = _gpus_for(device_options)
        try:
            self.devices = [
                self._processes.enter_context(
                    ServerProcess("device", "--id", str(index + 1), *_gpu_option(gpus, index), *device_options, wait=False)
                )
                for index in range(ndevices)
            ]
            for device in self.devices:
                device.wait_until_ready()
            addresses = [option for device in self.devices for option in ("--device", device.address)]
            self.coordinator = self._processes.enter_context(ServerProcess("coordinator", *addresses, *coordinator_options))
        except BaseException:
            self._processes.close()
            raise
        self.address = self.coordinator.address

    def stop(self) -> None:
        """Ends all processes, the coordinator first. Idempotent."""
        self._processes.close()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _gpus_for(device_options: Sequence[str]) -> int:
    """How many GPUs servers with these options are to be spread over; 0 where they have none, or have named theirs."""
    words = [word for option in device_options for word in option.split("=", 1)]
    if "--gpu" in words:
        return 0
    backend = words[words.index("--backend") + 1] if "--backend" in words else "auto"
    try:
        backends, _ = select_backends(backend)
    except (BackendUnavailable, ValueError):
        return 0  # the servers say it better
    return sum(chosen.name == "cupy" for chosen in backends)


def _gpu_option(gpus: int, index: int) -> list[str]:
    return ["--gpu", str(index % gpus)] if gpus else []
