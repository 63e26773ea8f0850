"""The commands and their options. What they do is imported when they run, so that `--help` is quick."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dsml_gpu.cli.chaos import app as chaos_app
from dsml_gpu.cli.units import parse_bandwidth, parse_duration, parse_size

app = typer.Typer(
    name="dsml-gpu",
    help="A GPU device server: device memory and collectives behind gRPC.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Host = Annotated[str, typer.Option(help="Address to listen on.")]
Memory = Annotated[
    int, typer.Option(parser=parse_size, metavar="SIZE", help="Memory of each device, for example 1GiB or 512MiB.")
]
BackendName = Annotated[
    str, typer.Option("--backend", metavar="auto|numpy|cupy", help="Where device memory is. auto: CuPy when a GPU answers.")
]
Gpus = Annotated[
    list[int] | None,
    typer.Option(
        "--gpu",
        min=0,
        metavar="N",
        help="Use this GPU; may be given several times, also the same one. Default: every GPU of the machine.",
    ),
]
MaxMessage = Annotated[
    int,
    typer.Option(parser=parse_size, metavar="SIZE", help="Largest message accepted; streaming copies have no limit."),
]
StallTimeout = Annotated[
    float, typer.Option(min=0.1, metavar="SECONDS", help="Give up on a transfer when nothing has moved for so long.")
]
SliceBytes = Annotated[
    int, typer.Option("--slice", parser=parse_size, metavar="SIZE", help="Size of the messages that chunks are cut into.")
]
LinkLatency = Annotated[
    float,
    typer.Option(
        parser=parse_duration,
        metavar="DURATION",
        help="Emulate a slow network: what a device sends to another one travels so long, for example 100us. This is of the "
        "grpc transport, which devices of one process use only where the coordinator has --transport grpc. Copies to and "
        "from the host are not slowed down.",
    ),
]
LinkBandwidth = Annotated[
    float | None,
    typer.Option(
        parser=parse_bandwidth,
        metavar="RATE",
        help="Emulate a slow network: each device sends to others at most at this rate, and receives at most at this rate, "
        "for example 1Gbit/s or 125MB/s; of the same transport as --link-latency. A few Mbit/s may need a longer "
        "--stall-timeout.",
    ),
]
HostName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Say that the devices are on this host, so that servers on one machine pass for several hosts. "
        "Default: the name of the machine.",
    ),
]
ShareMemory = Annotated[
    bool,
    typer.Option(
        "--share-memory/--no-share-memory",
        help="Let processes of the same user on this host open the devices' memory, which is the fastest transport (p2p).",
    ),
]
Lane = Annotated[
    bool,
    typer.Option(
        "--lane/--no-lane",
        help="Let processes of the same user on this host call by a Unix socket, which is faster than gRPC and tells at "
        "once of a server's end. Without it they call by TCP as from anywhere, for example through a proxy.",
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile/--no-compile",
        envvar="DSML_GPU_COMPILE",
        help="Compile reductions in host memory where numba is installed. The first one takes a second of one core, which "
        "small collectives do not earn back soon.",
    ),
]
MetricsPort = Annotated[int | None, typer.Option(metavar="PORT", help="Serve Prometheus metrics on this port.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")]
UntilStdinCloses = Annotated[
    bool, typer.Option("--until-stdin-closes", help="Also stop when standard input ends: with the process that started it.")
]
DeviceAddresses = Annotated[
    list[str] | None,
    typer.Option("--device", metavar="HOST:PORT", help="A device server to use; may be given several times."),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", exists=True, dir_okay=False, help='TOML file with devices = ["HOST:PORT", ...], used after --device.'
    ),
]
Embedded = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Have N devices in this process. Default: none beside configured devices, else as many as are asked for.",
    ),
]
TransportName = Annotated[str, typer.Option(metavar="auto|p2p|grpc", help="Transport of communicators that ask for none.")]
Failpoints = Annotated[
    list[str] | None,
    typer.Option(
        "--failpoint",
        metavar="PLACE:ACTION[@KEY=VALUE,...]",
        hidden=True,
        help="Have a fault there: kill, stop, fail or delay. Can be given several times.",
    ),
]
FailpointLog = Annotated[
    Path | None, typer.Option("--failpoint-log", dir_okay=False, hidden=True, help="Gets a line for each that happens.")
]
OperationTimeout = Annotated[
    float, typer.Option(min=0.1, metavar="SECONDS", help="Fail a collective that takes longer, moving or not.")
]


@app.command()
def device(
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 50051,
    memory: Memory = "1GiB",  # type: ignore[assignment]  # typer parses defaults as it parses arguments
    backend: BackendName = "auto",
    gpus: Gpus = None,
    device_id: Annotated[
        int | None,
        typer.Option(
            "--id",
            min=1,
            max=(1 << 64) - 1,
            help="Id of the device, of several the first; the others count on. Default: made from host name and port.",
        ),
    ] = None,
    min_addr: Annotated[int, typer.Option(min=0, help="Address of the first byte of device memory.")] = 0,
    max_message: MaxMessage = "1GiB",  # type: ignore[assignment]
    slice_bytes: SliceBytes = "512KiB",  # type: ignore[assignment]
    stall_timeout: StallTimeout = 30.0,
    link_latency: LinkLatency = "0s",  # type: ignore[assignment]
    link_bandwidth: LinkBandwidth = None,
    host_name: HostName = None,
    share_memory: ShareMemory = True,
    coordinator: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Register with this coordinator, now or when it comes up, and again when it was restarted.",
        ),
    ] = "",
    advertise: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Where the coordinator and other devices reach this server. Default: where it listens, or with --host "
            "0.0.0.0 the address from which it reaches the coordinator.",
        ),
    ] = "",
    lane: Lane = True,
    compile_reductions: Compile = True,
    metrics_port: MetricsPort = None,
    failpoints: Failpoints = None,
    failpoint_log: FailpointLog = None,
    until_stdin_closes: UntilStdinCloses = False,
    verbose: Verbose = False,
) -> None:
    """Serve one device, or one for each GPU."""
    from dsml_gpu.cli import serve
    from dsml_gpu.device.server import DeviceConfig, DeviceServer

    serve.set_up_logging(verbose)
    serve.set_up_reductions(compile_reductions)
    serve.order_failpoints(failpoints or (), failpoint_log)
    backends, why = serve.backends_or_exit(backend, gpus or ())
    config = serve.config_or_exit(
        DeviceConfig,
        host=host,
        port=port,
        device_id=device_id,
        memory_bytes=memory,
        min_addr=min_addr,
        backends=backends,
        coordinator=coordinator,
        advertised=advertise,
        has_lane=lane,
        max_message_bytes=max_message + serve.MESSAGE_OVERHEAD_BYTES,
        transfers=serve.transfer_settings_or_exit(
            slice_bytes, stall_timeout, link_latency, link_bandwidth, host_name, share_memory
        ),
    )
    serve.run(
        lambda: DeviceServer(config),
        lambda server: serve.device_line(server, why),
        until_stdin_closes=until_stdin_closes,
        metrics_port=metrics_port,
    )


def coordinator(
    context: typer.Context,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 50052,
    devices: DeviceAddresses = None,
    config_file: ConfigFile = None,
    embedded: Embedded = None,
    memory: Memory = "1GiB",  # type: ignore[assignment]
    backend: BackendName = "auto",
    gpus: Gpus = None,
    transport: TransportName = "auto",
    max_message: MaxMessage = "1GiB",  # type: ignore[assignment]
    slice_bytes: SliceBytes = "512KiB",  # type: ignore[assignment]
    stall_timeout: StallTimeout = 30.0,
    operation_timeout: OperationTimeout = 600.0,
    link_latency: LinkLatency = "0s",  # type: ignore[assignment]
    link_bandwidth: LinkBandwidth = None,
    host_name: HostName = None,
    share_memory: ShareMemory = True,
    heartbeat: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="Time between heartbeats of the device servers.")
    ] = 0.25,
    dead_after: Annotated[
        float, typer.Option(metavar="SECONDS", help="Give up on a device server that sends no heartbeat for so long.")
    ] = 2.0,
    failed_requests: Annotated[
        str,
        typer.Option(
            metavar="X/Y", help="Give up on a device when X of the last Y requests to it were not answered in time."
        ),
    ] = "3/5",
    atomic: Annotated[
        bool,
        typer.Option(
            help="Have a collective that fails leave all buffers as they were, and run again on the devices that are left. "
            "It costs memory for what is overwritten, while the collective runs."
        ),
    ] = True,
    on_failure: Annotated[
        str,
        typer.Option(
            metavar="shrink|fail|restore",
            help="What becomes of an operation when a device of it dies, where the communicator does not say: it runs again "
            "on the others, it fails and so do all later ones, or a free device takes the place with its memory from the "
            "last checkpoint.",
        ),
    ] = "shrink",
    cost_model: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="File with the cost model by which algorithms are chosen; it is read where there is one, and written when "
            "`dsml-gpu tune` brings another.",
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help="File in which the coordinator keeps what it must not forget when it is killed; made where there is none. "
            "Default: it forgets all.",
        ),
    ] = None,
    compile_reductions: Compile = True,
    metrics_port: MetricsPort = None,
    failpoints: Failpoints = None,
    failpoint_log: FailpointLog = None,
    until_stdin_closes: UntilStdinCloses = False,
    verbose: Verbose = False,
) -> None:
    """Serve communicators and collectives over device servers, or over devices in this process."""
    from dsml_gpu.cli import serve
    from dsml_gpu.coordinator.server import CoordinatorConfig, CoordinatorServer
    from dsml_gpu.coordinator.settings import CoordinatorSettings

    serve.set_up_logging(verbose)
    serve.set_up_reductions(compile_reductions)
    serve.order_failpoints(failpoints or (), failpoint_log)
    backends, why = serve.backends_or_exit(backend, gpus or ())
    config = serve.config_or_exit(
        CoordinatorConfig,
        host=host,
        port=port,
        devices=(*(devices or ()), *serve.devices_of(config_file)),
        embedded=embedded,
        memory_bytes=memory,
        backends=backends,
        max_message_bytes=max_message + serve.MESSAGE_OVERHEAD_BYTES,
        state=state,
        settings=CoordinatorSettings(
            serve.transport_or_exit(transport),
            stall_timeout,
            operation_timeout,
            max_message + serve.MESSAGE_OVERHEAD_BYTES,
            serve.cost_model_or_exit(cost_model),
            cost_model,
            detection=serve.detection_or_exit(heartbeat, dead_after, failed_requests),
            atomic=atomic,
            on_failure=serve.on_failure_or_exit(on_failure),
        ),
        transfers=serve.transfer_settings_or_exit(
            slice_bytes, stall_timeout, link_latency, link_bandwidth, host_name, share_memory
        ),
    )
    ready = serve.summary if context.info_name == "serve" else serve.line
    serve.run(
        lambda: CoordinatorServer(config),
        lambda server: ready(server, why),
        until_stdin_closes=until_stdin_closes,
        metrics_port=metrics_port,
    )


app.command("coordinator")(coordinator)
app.command("serve", help="The same as coordinator, with a summary of what it serves and how to use it.")(coordinator)


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training digits.")] = 10,
    workers: Annotated[int, typer.Option(min=1, help="Workers, each with a device server of its own.")] = 4,
    algorithm: Annotated[
        str, typer.Option(metavar="NAME", help="Algorithm of the all-reduce: ring, direct, auto ...")
    ] = "ring",
) -> None:
    """Train on handwritten digits, data-parallel over device servers on this machine."""
    from dsml_gpu.cli.demo import Setup, run

    run(Setup(epochs, workers, algorithm))


@app.command()
def bench(
    target: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Measure a running coordinator. Default: servers started for this."),
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 4,
    embedded: Annotated[bool, typer.Option("--embedded", help="Start devices in this process, not one each.")] = False,
    sizes: Annotated[
        str, typer.Option(metavar="SIZE,...", help="Size of each rank's buffer, for example 64KiB,1MB.")
    ] = "8KB,80KB,400KB,800KB,1600KB,3600KB",
    algorithms: Annotated[str, typer.Option(metavar="NAME,...", help="Measured in turn.")] = "ring,naive",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="Data type: float64, bfloat16, int8 ...")] = "float64",
    op: Annotated[str, typer.Option(metavar="sum|prod|min|max|avg", help="Reduction.")] = "sum",
    transport: Annotated[str, typer.Option(metavar="auto|p2p|grpc", help="Between all pairs of ranks.")] = "auto",
    iterations: Annotated[int, typer.Option(min=1, help="Runs whose median is the time.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before those.")] = 3,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", dir_okay=False, help="Also write the rows to this file."),
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", dir_okay=False, help="Also draw time against size to this PNG file; needs matplotlib."),
    ] = None,
) -> None:
    """Time all-reduces and check every element, in the manner of nccl-tests."""
    from dsml_gpu.cli import serve
    from dsml_gpu.cli.bench import parse_setup, run

    setup = serve.config_or_exit(
        parse_setup,
        sizes=sizes,
        algorithms=algorithms,
        dtype=dtype,
        op=op,
        transport=transport,
        devices=devices,
        target=target,
        embedded=embedded,
        iterations=iterations,
        warmup=warmup,
    )
    run(setup, json_file, plot_file)


@app.command()
def simulate(
    algorithms: Annotated[
        str,
        typer.Option(
            "--algorithm",
            metavar="NAME,...",
            help="What to compare; tree: the double binary tree where there is one, else the binomial. Default: all.",
        ),
    ] = "",
    ranks: Annotated[
        str, typer.Option(metavar="N,...", help="Numbers of ranks; A..B for the powers of two from A to B.")
    ] = "2..64",
    sizes: Annotated[
        str,
        typer.Option("--size", metavar="SIZE,...", help="Sizes of a rank's buffer, the larger one of two; or A..B."),
    ] = "1KiB..1GiB",
    topology: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="TOML file with hosts and links (see benchmarks/topologies). Default: a GPU to a host, 100 Gbit/s, 5 us.",
        ),
    ] = None,
    collective: Annotated[str, typer.Option(metavar="NAME", help="all_reduce, all_gather, broadcast ...")] = "all_reduce",
    cost_model: Annotated[
        str,
        typer.Option(
            metavar="links|default|FILE",
            help="What processors cost. links: nothing, only links take time; default: as measured over gRPC on an ordinary "
            "machine; or a file of `dsml-gpu tune`.",
        ),
    ] = "links",
    slice_bytes: SliceBytes = "512KiB",  # type: ignore[assignment]
    max_messages: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Most messages that are simulated one by one; what has more is worked out from an algorithm's rounds.",
        ),
    ] = 2000,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", dir_okay=False, help="Also write the predictions to this file."),
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", dir_okay=False, help="Also draw them to this PNG file; needs matplotlib."),
    ] = None,
) -> None:
    """Predict which algorithm is fastest on a cluster, up to sizes that no machine here has."""
    from dsml_gpu.cli import serve
    from dsml_gpu.cli.simulate import parse_setup, run

    setup = serve.config_or_exit(
        parse_setup,
        collective=collective,
        algorithms=algorithms,
        ranks=ranks,
        sizes=sizes,
        topology=topology,
        cost_model=cost_model,
        slice_bytes=slice_bytes,
        max_messages=max_messages,
    )
    run(setup, json_file, plot_file)


@app.command()
def tune(
    target: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="The coordinator whose fleet is measured.")
    ] = "127.0.0.1:50052",
    ranks: Annotated[
        int, typer.Option(min=0, help="Measure communicators of at most so many ranks; 0: of all devices.")
    ] = 0,
    max_size: Annotated[
        int, typer.Option(parser=parse_size, metavar="SIZE", help="Largest buffer of each rank that is measured.")
    ] = "16MiB",  # type: ignore[assignment]
    output: Annotated[
        Path | None, typer.Option("--output", "-o", dir_okay=False, help="Also write the cost model to this file.")
    ] = None,
    keep: Annotated[bool, typer.Option(help="Make the coordinator choose by the result.")] = True,
) -> None:
    """Measure a running fleet, so that algorithm "auto" chooses by what it can do."""
    from dsml_gpu.cli.tune import SIZES, Setup, run

    run(Setup(target, ranks, tuple(size for size in SIZES if size <= max_size)), output, keep)


@app.command()
def explain(
    size: Annotated[
        int, typer.Option(parser=parse_size, metavar="SIZE", help="Bytes of a rank's largest buffer, for example 4MiB.")
    ] = "4MiB",  # type: ignore[assignment]
    ranks: Annotated[int, typer.Option(min=1, max=256, help="Number of ranks.")] = 4,
    collective: Annotated[str, typer.Option(metavar="NAME", help="all_reduce, broadcast, all_to_all ...")] = "all_reduce",
    root: Annotated[int, typer.Option(min=0, help="Of a collective that has one.")] = 0,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Explain what this coordinator would choose for its first devices. Default: processes of this machine.",
        ),
    ] = None,
    cost_model: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Predict by this file of `dsml-gpu tune`. Default: the coordinator's."
        ),
    ] = None,
) -> None:
    """Print the algorithms of a collective with their predicted times, the fastest first."""
    from dsml_gpu.cli import serve
    from dsml_gpu.cli.explain import Setup, run

    run(serve.config_or_exit(Setup, collective=collective, nbytes=size, nranks=ranks, root=root), target, cost_model)


@app.command()
def draw(
    algorithm: Annotated[str, typer.Argument(help="Name of the algorithm, for example ring.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", dir_okay=False, help="File to write: NAME.svg, NAME.png (needs Pillow) or NAME.html."
        ),
    ],
    ranks: Annotated[
        int | None, typer.Option(metavar="N", help="Number of ranks. Default: as many as --hosts gives, else 4.")
    ] = None,
    collective: Annotated[
        str,
        typer.Option(metavar="NAME", help="all_reduce, broadcast, all_to_all ... In send_recv, ranks send to the right."),
    ] = "all_reduce",
    root: Annotated[int, typer.Option(min=0, help="Of a collective that has one.")] = 0,
    hosts: Annotated[
        str | None,
        typer.Option(
            metavar="HxM|HOST,...", help="H hosts with M ranks each, for example 2x4; or the host of each rank: 0,0,1,1."
        ),
    ] = None,
) -> None:
    """Draw who sends what to whom in each step, and what every rank then holds."""
    from dsml_gpu.cli import serve
    from dsml_gpu.cli.draw import parse_setup, run

    run(
        serve.config_or_exit(
            parse_setup, output=output, algorithm=algorithm, collective=collective, ranks=ranks, root=root, hosts=hosts
        )
    )


app.add_typer(chaos_app, name="chaos")

kernels_app = typer.Typer(help="The CUDA kernels that reduce.", no_args_is_help=True)
app.add_typer(kernels_app, name="kernels")


@kernels_app.command("build")
def kernels_build(gpus: Gpus = None) -> None:
    """Compile all kernels for the GPUs of this machine, so that no collective waits for it later."""
    from dsml_gpu.cli.kernels import build

    build(gpus or [])


@kernels_app.callback()
def _kernels() -> None:
    """Keeps ``build`` a command of its own while it is the only one."""


def main() -> None:
    """Entry point of the command."""
    # gRPC's own log lines would stand beside the one clear line that a failure gets; set the variable to see them.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    app()
