"""`dsml-gpu chaos`: the options of its commands. What they do is in `dsml_gpu.chaos`, and imported when they run."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from dsml_gpu.cli.units import parse_size

if TYPE_CHECKING:
    from dsml_gpu.chaos.fleets import Target
    from dsml_gpu.chaos.report import Summary
    from dsml_gpu.chaos.runs import Run
    from dsml_gpu.chaos.trials import Wishes

app = typer.Typer(
    help="Try what a fleet does when its processes die, freeze, are cut off, come and leave. Every element of every buffer "
    "is checked; the exit status is 1 where anything hung, was wrong, or was lost.",
    no_args_is_help=True,
)

Trials = Annotated[int, typer.Option("--n", min=1, metavar="N", help="Number of trials.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Have the same run again. Default: another one each time.")]
Only = Annotated[int, typer.Option(min=0, metavar="K", help="Run only trial K of those; 0: all.")]
Ranks = Annotated[str, typer.Option(metavar="A..B", help="Each trial has from A to B ranks.")]
TransportNames = Annotated[str, typer.Option(metavar="p2p|grpc|auto,...", help="Those that are tried. Default: all.")]
Collectives = Annotated[str, typer.Option(metavar="NAME,...", help="Those that are tried. Default: mostly all_reduce.")]
MaxSize = Annotated[int, typer.Option(parser=parse_size, metavar="SIZE", help="Largest buffer of each rank.")]
OnFailure = Annotated[str, typer.Option(metavar="shrink|fail", help="What the communicators ask for.")]
Target_ = Annotated[
    str,
    typer.Option(
        "--coordinator",
        metavar="HOST:PORT",
        help="Harm a fleet that runs already, with --pids. Default: one that is started for it.",
    ),
]
Pids = Annotated[str, typer.Option(metavar="ID=PID,...", help="Devices that may be harmed, and their processes here.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="One line for each trial.")]
Log = Annotated[
    Path | None, typer.Option(dir_okay=False, help="File that gets what the servers say. Default: nobody hears it.")
]

_DEVICE_OPTIONS = ("--memory", "512MiB", "--slice", "64KiB")


@app.command()
def kill(
    n: Trials = 100,
    seed: Seed = None,
    only: Only = 0,
    ranks: Ranks = "2..8",
    transports: TransportNames = "",
    collectives: Collectives = "",
    max_size: MaxSize = "16MiB",  # type: ignore[assignment]  # typer parses defaults as it parses arguments
    on_failure: OnFailure = "shrink",
    coordinator: Target_ = "",
    pids: Pids = "",
    log: Log = None,
    verbose: Verbose = False,
) -> None:
    """Kill device servers in the middle of operations."""
    from dsml_gpu.chaos.runs import killing

    if on_failure not in ("shrink", "fail"):
        _fail(f"--on-failure must be shrink or fail, not {on_failure!r}")
    wishes = _wishes(ranks, transports, collectives, max_size, failpoints=not coordinator)
    _run_trials("kill", n, seed, only, wishes, killing(on_failure), _fleet(wishes, log, coordinator, pids), {}, verbose)


@app.command()
def stall(
    n: Trials = 50,
    seed: Seed = None,
    only: Only = 0,
    ranks: Ranks = "3..6",
    transports: TransportNames = "",
    collectives: Collectives = "",
    max_size: MaxSize = "16MiB",  # type: ignore[assignment]
    coordinator: Target_ = "",
    pids: Pids = "",
    log: Log = None,
    verbose: Verbose = False,
) -> None:
    """Stop device servers (SIGSTOP) in the middle of operations, and wake them up again: they must write nothing then."""
    from dsml_gpu.chaos.runs import stalling

    wishes = _wishes(ranks, transports, collectives, max_size, failpoints=not coordinator)
    _run_trials(
        "stall", n, seed, only, wishes, stalling, _fleet(wishes, log, coordinator, pids), {"detection": 3.0}, verbose
    )


@app.command()
def blackhole(
    n: Trials = 20,
    seed: Seed = None,
    only: Only = 0,
    ranks: Ranks = "3..5",
    collectives: Collectives = "",
    max_size: MaxSize = "4MiB",  # type: ignore[assignment]
    log: Log = None,
    verbose: Verbose = False,
) -> None:
    """Have all traffic of a device server vanish, without a word to anybody."""
    from dsml_gpu.chaos.runs import vanishing

    wishes = _wishes(ranks, "grpc", collectives, max_size, failpoints=False)
    _run_trials("blackhole", n, seed, only, wishes, vanishing, _fleet(wishes, log, cut=True), {"detection": 3.0}, verbose)


@app.command()
def delay(
    n: Trials = 20,
    seed: Seed = None,
    only: Only = 0,
    ranks: Ranks = "3..5",
    collectives: Collectives = "",
    max_size: MaxSize = "1MiB",  # type: ignore[assignment]
    log: Log = None,
    verbose: Verbose = False,
) -> None:
    """Have all traffic of a device server come late. Slow is not dead: nobody may be given up."""
    from dsml_gpu.chaos.runs import delaying

    wishes = _wishes(ranks, "grpc", collectives, max_size, failpoints=False)
    _run_trials("delay", n, seed, only, wishes, delaying, _fleet(wishes, log, cut=True), {}, verbose)


@app.command()
def cascade(
    n: Trials = 10,
    seed: Seed = None,
    only: Only = 0,
    ranks: Ranks = "3..8",
    transports: TransportNames = "",
    max_size: MaxSize = "4MiB",  # type: ignore[assignment]
    log: Log = None,
    verbose: Verbose = False,
) -> None:
    """Kill one device server after the other, until one is left."""
    from dsml_gpu.chaos.runs import cascading

    wishes = _wishes(ranks, transports, "all_reduce,reduce_scatter,all_gather,all_to_all", max_size, failpoints=False)
    _run_trials("cascade", n, seed, only, wishes, cascading, _fleet(wishes, log), {}, verbose)


@app.command("coordinator")
def coordinator_(
    n: Trials = 50,
    seed: Seed = None,
    only: Only = 0,
    ranks: Ranks = "2..4",
    transports: TransportNames = "",
    max_size: MaxSize = "16MiB",  # type: ignore[assignment]
    log: Log = None,
    verbose: Verbose = False,
) -> None:
    """Kill the coordinator in the middle of sums in place, and start it again: each must happen once."""
    from dataclasses import replace

    from dsml_gpu.chaos.runs import coordinator_dying

    wishes = replace(_wishes(ranks, transports, "all_reduce", max_size, failpoints=False), in_place=True, ops=("sum",))
    fleet = _fleet(wishes, log, state=True)
    _run_trials("coordinator", n, seed, only, wishes, coordinator_dying, fleet, {"recovery": 5.0}, verbose)


@app.command()
def join(
    n: Trials = 20,
    seed: Seed = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices that are there all the time.")] = 2,
    size: MaxSize = "256KiB",  # type: ignore[assignment]
    log: Log = None,
    verbose: Verbose = False,
) -> None:
    """Have device servers register and leave under traffic: no operation may fail."""
    from dsml_gpu.chaos import join as joining
    from dsml_gpu.chaos.fleets import OwnFleet

    summary, say = _summary(f"join --n {n}", seed, {}, verbose)
    with OwnFleet(devices, _DEVICE_OPTIONS, log=log) as fleet:
        _guarded(lambda: joining.run(summary, fleet, devices, n, size, say), summary)
    _finish(summary)


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(min=0.0, help="How long, the warm-up included.")] = 20.0,
    warmup: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="SECONDS",
            help="Growth counts from then on; a coordinator grows until it has the outcomes of 4096 operations to keep.",
        ),
    ] = 240.0,
    seed: Seed = None,
    devices: Annotated[int, typer.Option(min=2, help="Number of ranks.")] = 4,
    size: MaxSize = "256KiB",  # type: ignore[assignment]
    log: Log = None,
    verbose: Verbose = False,
) -> None:
    """Run at full speed with a kill every 5 s, and look whether memory or open files grow."""
    from dsml_gpu.chaos import soak as soaking
    from dsml_gpu.chaos.fleets import OwnFleet

    summary, say = _summary(f"soak --minutes {minutes:g} --devices {devices}", seed, {}, verbose)
    with OwnFleet(devices, _DEVICE_OPTIONS, log=log) as fleet:
        _guarded(lambda: soaking.run(summary, fleet, devices, 60 * minutes, warmup, size, say), summary)
    _finish(summary)


def _wishes(ranks: str, transports: str, collectives: str, max_size: int, *, failpoints: bool) -> Wishes:
    from dsml_gpu.chaos.operations import COLLECTIVES
    from dsml_gpu.chaos.trials import Wishes

    least, _, largest = ranks.partition("..")
    if not least.isdecimal() or not (largest or least).isdecimal():
        _fail(f"--ranks must be A..B, for example 2..8, not {ranks!r}")
    names = _words(collectives)
    unknown = sorted(set(names) - set(COLLECTIVES))
    if unknown:
        _fail(f"unknown collectives {', '.join(unknown)}; known: {', '.join(COLLECTIVES)}")
    try:
        return Wishes((int(least), int(largest or least)), _words(transports), max_size, failpoints, names)
    except ValueError as error:
        _fail(str(error))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _fleet(
    wishes: Wishes, log: Path | None, coordinator: str = "", pids: str = "", *, state: bool = False, cut: bool = False
) -> Callable[[], Target]:
    """Makes the fleet that the options ask for."""
    from dsml_gpu.chaos.fleets import OwnFleet, RunningFleet

    if cut and sys.platform != "linux":
        _fail("this needs loopback addresses and /proc as Linux has them")
    if bool(coordinator) != bool(pids):
        _fail("--coordinator and --pids go together")
    if coordinator:
        harmed = _pids(pids)
        return lambda: RunningFleet(coordinator, harmed)
    return lambda: OwnFleet(wishes.ranks[1], _DEVICE_OPTIONS, state=state, cut=cut, log=log)


def _pids(text: str) -> dict[int, int]:
    pairs = [word.split("=") for word in _words(text)]
    if not all(len(pair) == 2 and pair[0].isdecimal() and pair[1].isdecimal() for pair in pairs):
        _fail(f"--pids must be ID=PID,... for example 1=4711,2=4712, not {text!r}")
    return {int(device_id): int(pid) for device_id, pid in pairs}


def _run_trials(
    name: str,
    n: int,
    seed: int | None,
    only: int,
    wishes: Wishes,
    run: Run,
    fleet: Callable[[], Target],
    limits_s: dict[str, float],
    verbose: bool,
) -> None:
    from dsml_gpu.chaos.runs import run_trials
    from dsml_gpu.chaos.trials import plan

    summary, say = _summary(f"{name} --n {n}", seed, limits_s, verbose)
    if only > n:
        _fail(f"--only {only} is none of {n} trials")
    trials = [trial for trial in plan(n, summary.seed, wishes) if only in (0, trial.number)]
    _guarded(lambda: run_trials(summary, fleet, trials, run, say), summary)
    _finish(summary)


def _summary(
    command: str, seed: int | None, limits_s: dict[str, float], verbose: bool
) -> tuple[Summary, Callable[[str], None]]:
    """The summary of a run, and what takes a line for each trial."""
    from dsml_gpu.chaos.report import Summary

    summary = Summary(command, secrets.randbelow(1 << 31) if seed is None else seed, limits_s=limits_s)
    typer.echo(f"seed {summary.seed}")  # first, so that a run which is broken off can be had again

    def say(line: str) -> None:
        if verbose:
            typer.echo(line)

    return summary, say


def _guarded(work: Callable[[], None], summary: Summary) -> None:
    """Runs the trials; what was found is told also where they are broken off."""
    from dsml_gpu.cli.fleet import ServerDidNotStart
    from dsml_gpu.errors import DsmlError

    try:
        work()
    except (DsmlError, ServerDidNotStart) as error:
        summary.problems.append(f"the run was broken off: {type(error).__name__}: {error}")
    except KeyboardInterrupt:
        summary.problems.append("interrupted")


def _finish(summary: Summary) -> None:
    typer.echo("\n".join(summary.lines()))
    if not summary.passed:
        raise typer.Exit(1)


def _fail(message: str) -> NoReturn:
    from dsml_gpu.cli.serve import fail

    fail(message)
