"""Runs a device server or a coordinator in the foreground, and says in one line why it does not start."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import typer

from dsml_gpu import failpoints
from dsml_gpu.cli.units import format_bandwidth, format_duration, format_size
from dsml_gpu.device.settings import TransferSettings
from dsml_gpu.errors import DsmlError
from dsml_gpu.memory.arena import MIN_ARENA_BYTES
from dsml_gpu.memory.backend import Backend, BackendUnavailable, select_backends
from dsml_gpu.reduction import use_numpy_only
from dsml_gpu.schedules.cost_model import DEFAULT_COST_MODEL, CostModel
from dsml_gpu.transport.emulation import LinkSettings
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.server import PortInUse, RpcServer
from dsml_gpu.wire.trim import keep_freed_memory

if TYPE_CHECKING:  # a device server starts sooner without the coordinator's modules
    from dsml_gpu.coordinator.heartbeats import Detection
    from dsml_gpu.coordinator.server import CoordinatorServer
    from dsml_gpu.device.server import DeviceServer

#: Numbers of ``enum Transport`` by name.
TRANSPORTS: dict[str, int] = dict(pb.Transport.items())
#: The server, whose device memory must not go before the process does: peers may be in the middle of reading it.
_until_exit: list[object] = []
#: Room in a message for the fields around its payload.
MESSAGE_OVERHEAD_BYTES = 1 << 16


class Server(Protocol):
    """What `run` needs of a server."""

    rpc: RpcServer

    async def start(self) -> None: ...
    async def stop(self, drain_s: float = ...) -> None: ...


S = TypeVar("S", bound=Server)
C = TypeVar("C")


def run(make: Callable[[], S], ready: Callable[[S], str], *, until_stdin_closes: bool, metrics_port: int | None) -> None:
    """Starts a server, prints what `ready` says of it, and serves until SIGTERM or SIGINT.

    Args:
        until_stdin_closes: also stop at the end of standard input.
        metrics_port: serve Prometheus metrics there.
    """
    keep_freed_memory()
    try:
        asyncio.run(_serve(make, ready, until_stdin_closes, metrics_port))
    except (PortInUse, DsmlError) as error:
        fail(str(error))


async def _serve(
    make: Callable[[], S], ready: Callable[[S], str], until_stdin_closes: bool, metrics_port: int | None
) -> None:
    server = make()
    _until_exit.append(server)
    if metrics_port is not None:
        _serve_metrics(server.rpc.host, metrics_port)
    await server.start()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    if until_stdin_closes:
        threading.Thread(target=_set_at_end_of_stdin, args=(loop, ended), daemon=True).start()
    print(ready(server), flush=True)
    await ended.wait()
    logging.getLogger(__name__).info("draining")
    await server.stop()


def _serve_metrics(host: str, port: int) -> None:
    from dsml_gpu.observe import metrics

    try:
        metrics.serve(host, port)
    except OSError as error:
        raise PortInUse(f"cannot serve metrics on {host}:{port}: {error.strerror}") from error


def _set_at_end_of_stdin(loop: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
    """In a thread of its own, because standard input may be anything: a pipe, a terminal, a file, /dev/null."""
    while os.read(0, 1 << 16):
        pass
    with contextlib.suppress(RuntimeError):  # the loop has ended by itself
        loop.call_soon_threadsafe(ended.set)


def device_line(server: DeviceServer, why: str) -> str:
    """What `device` says when it is ready."""
    several = len(server.devices) > 1
    ids = ", ".join(str(device.device_id) for device in server.devices)
    return (
        f"dsml-gpu device{'s' if several else ''} {ids} listening on {server.address} "
        f"({format_size(server.config.memory_bytes)} of device memory{' each' if several else ''}; {why}"
        f"{_link(server.config.transfers)})"
    )


def line(server: CoordinatorServer, why: str) -> str:
    """What `coordinator` says when it is ready."""
    link = _link(server.config.transfers) if server.config.embedded_limit else ""
    return f"dsml-gpu coordinator listening on {server.address} ({_devices(server)}; {why}{link})"


def summary(server: CoordinatorServer, why: str) -> str:
    """What `serve` says when it is ready."""
    lines = [
        line(server, why),
        "",
        f"  devices    {_devices(server)}",
        f"  transport  {pb.Transport.Name(server.config.settings.transport).lower()}",
        "  from Python",
        "      import dsml_gpu",
        f'      with dsml_gpu.connect("{server.address}") as client, client.communicator(2) as comm:',
        "          arrays = comm.array([[1.0, 2.0], [3.0, 4.0]])",
        "          comm.all_reduce(arrays)",
        "          print(arrays[0].get())",
        "  from any language: proto/gpu_sim.proto; reflection and health services are on",
        "  stop       Ctrl-C",
    ]
    lines[3:3] = [
        f"      device {handle.device_id} at {handle.address}, {_place(handle.metadata)}"
        if handle.reachable
        else f"      {handle.address} does not answer yet"
        for handle in server.registry.handles
    ]
    return "\n".join(lines)


def _link(transfers: TransferSettings) -> str:
    link = transfers.link
    if not link.emulated:
        return ""
    bandwidth = format_bandwidth(link.bytes_per_s) if link.bytes_per_s else "unlimited bandwidth"
    return f"; emulated link of {bandwidth} and {format_duration(link.latency_s)}"


def _place(device: pb.DeviceMetadata) -> str:
    return f"{device.backend} on GPU {device.gpu}" if device.backend == "cupy" else device.backend


def _devices(server: CoordinatorServer) -> str:
    config = server.config
    answering = [remote for remote in server.registry.servers if remote.reachable]
    ndevices = sum(len(remote.handles) for remote in answering)
    parts = []
    if config.devices:
        having = f" and have {ndevices} devices" if ndevices != len(answering) else ""
        parts.append(f"{len(answering)} of {len(config.devices)} device servers answer{having}")
    if config.embedded_limit:
        how = "on demand up to " if config.embedded is None else ""
        parts.append(f"{how}{config.embedded_limit} embedded devices of {format_size(config.memory_bytes)}")
    return ", ".join(parts) or "no devices"


def set_up_logging(verbose: bool) -> None:
    """Log lines go to standard error."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # A first collective that takes seconds longer than the next says why.
    logging.getLogger("dsml_gpu.reduction").setLevel(logging.INFO)


def set_up_reductions(compiles: bool) -> None:
    """Whether those in host memory may be compiled."""
    if not compiles:
        use_numpy_only()


def order_failpoints(texts: Sequence[str], log: Path | None) -> None:
    """Orders faults of this process; see `failpoints.parse`."""
    for text in texts:
        failpoints.order(config_or_exit(failpoints.parse, text=text, log=log))


def backends_or_exit(name: str, gpus: Sequence[int]) -> tuple[tuple[Backend, ...], str]:
    """See `select_backends`."""
    try:
        return select_backends(name, gpus)
    except (BackendUnavailable, ValueError) as error:
        fail(str(error))


def transport_or_exit(name: str) -> int:
    """Number of ``enum Transport``."""
    if name.upper() not in TRANSPORTS:
        fail(f"transport must be auto, p2p or grpc, not {name!r}")
    return TRANSPORTS[name.upper()]


def on_failure_or_exit(name: str) -> int:
    """Number of ``enum OnFailure``."""
    numbers = {one.lower(): number for one, number in pb.OnFailure.items() if number}
    if name not in numbers:
        fail(f"--on-failure must be {', '.join(numbers)}, not {name!r}")
    return numbers[name]


def transfer_settings_or_exit(
    slice_bytes: int,
    stall_timeout_s: float,
    link_latency_s: float,
    link_bytes_per_s: float | None,
    host_name: str | None,
    shares_memory: bool,
) -> TransferSettings:
    """See `TransferSettings`."""
    link = config_or_exit(LinkSettings, latency_s=link_latency_s, bytes_per_s=link_bytes_per_s or 0.0)
    return config_or_exit(
        TransferSettings,
        slice_bytes=slice_bytes,
        stall_timeout_s=stall_timeout_s,
        link=link,
        host_name=host_name or "",
        shares_memory=shares_memory,
    )


def detection_or_exit(interval_s: float, dead_after_s: float, failed_requests: str) -> Detection:
    """See `Detection`.

    Args:
        failed_requests: ``"3/5"``: 3 of the last 5.
    """
    from dsml_gpu.coordinator.heartbeats import Detection

    match = re.fullmatch(r"(\d+)/(\d+)", failed_requests)
    if match is None:
        fail(f"--failed-requests must be X/Y, for example 3/5, not {failed_requests!r}")
    failed, last = map(int, match.groups())
    return config_or_exit(Detection, interval_s=interval_s, dead_after_s=dead_after_s, failed_requests=failed, of_last=last)


def cost_model_or_exit(path: Path | None) -> CostModel:
    """The cost model of a file; the default where there is none yet."""
    if path is None or not path.exists():
        return DEFAULT_COST_MODEL
    try:
        return CostModel.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{path}: {error}")


def config_or_exit(make: Callable[..., C], **values: Any) -> C:
    """A configuration from options, or one line that says which of them does not do."""
    if values.get("memory_bytes", MIN_ARENA_BYTES) < MIN_ARENA_BYTES:
        fail(f"--memory must be at least {format_size(MIN_ARENA_BYTES)}, not {format_size(values['memory_bytes'])}")
    if values.get("min_addr", 0) + values.get("memory_bytes", 0) >= 1 << 64:
        fail("--min-addr + --memory leave 64 bits")
    if "max_message_bytes" in values and values["max_message_bytes"] >= 1 << 31:
        fail(f"--max-message must be below {format_size((1 << 31) - MESSAGE_OVERHEAD_BYTES)}; stream what is larger")
    try:
        return make(**values)
    except ValueError as error:
        fail(str(error))


def devices_of(path: Path | None) -> list[str]:
    """Device servers that a configuration file names.

    The file is TOML with ``devices = ["HOST:PORT", ...]``.
    """
    if path is None:
        return []
    try:
        content = _load_toml(path)
    except ValueError as error:
        fail(f"{path}: {error}")
    devices = content.get("devices")
    if not isinstance(devices, list) or not all(isinstance(device, str) for device in devices):
        fail(f'{path}: expected devices = ["HOST:PORT", ...], got {devices!r}')
    unknown = sorted(set(content) - {"devices"})
    if unknown:
        fail(f"{path}: unknown keys {', '.join(unknown)}; known: devices")
    return devices


def _load_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    return content


def fail(message: str) -> NoReturn:
    """One clear line, exit status 1."""
    typer.echo(f"dsml-gpu: {message}", err=True)
    raise typer.Exit(1)
