"""`dsml-gpu chaos` on fleets of real processes: a few trials of each kind, with seeds."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from dsml_gpu.chaos import join, runs, soak
from dsml_gpu.chaos.fleets import OwnFleet, Target
from dsml_gpu.chaos.operations import Operation
from dsml_gpu.chaos.report import AS_BEFORE, LOST, ON_ALL, RESTARTED, Outcome, Summary
from dsml_gpu.chaos.trials import Moment, Trial
from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.cli.main import app
from dsml_gpu.errors import InvalidValue

NRANKS = 3
DEVICE_OPTIONS = ("--memory", "64MiB", "--slice", "16KiB")
IN_SLICES = Moment("execute.slice", 3)


@pytest.fixture(scope="module")
def fleet() -> Iterator[OwnFleet]:
    with OwnFleet(NRANKS, DEVICE_OPTIONS) as fleet:
        yield fleet


def trial(moment: Moment, victim: int = 1, *, collective: str = "all_reduce", root: int = 0, nbytes: int = 400_000) -> Trial:
    """Over gRPC and in place, with half a millisecond or more of slices."""
    blocks = 1 if collective in ("all_reduce", "broadcast") else NRANKS
    operation = Operation(
        collective, NRANKS, nbytes // 8 // blocks, algorithm="ring", transport="grpc", in_place=True, root=root
    )
    return Trial(1, 5, operation, victim, moment, delay_s=0.3)


def outcome_of(target: Target, run: runs.Run, *trials: Trial) -> Outcome:
    """Of one trial, which must be good."""
    outcome = run(target, trials[0])
    assert outcome.passed, str(outcome)
    return outcome


@pytest.mark.parametrize("collective", ["all_reduce", pytest.param("all_gather", marks=pytest.mark.slow)])
def test_kill(fleet: OwnFleet, collective: str) -> None:
    outcome = outcome_of(fleet, runs.killing(), trial(IN_SLICES, collective=collective))
    assert (outcome.fired, outcome.ended) == (True, RESTARTED)
    assert len(outcome.detection_s) == 1
    assert outcome.recovery_s is not None
    assert outcome.operations == 2  # and the next one, without the dead


def test_kill_where_it_is_to_fail(fleet: OwnFleet) -> None:
    outcome = outcome_of(fleet, runs.killing("fail"), trial(IN_SLICES))
    assert (outcome.fired, outcome.ended) == (True, AS_BEFORE)


@pytest.mark.slow  # as the others; each starts a server anew
def test_kill_the_root(fleet: OwnFleet) -> None:
    outcome = outcome_of(fleet, runs.killing(), trial(IN_SLICES, collective="broadcast", root=1))
    assert (outcome.fired, outcome.ended) == (True, AS_BEFORE)
    assert outcome.note.startswith("RanksLost")


@pytest.mark.slow  # as the others; each starts a server anew
def test_a_fault_that_does_not_fire_is_told(fleet: OwnFleet) -> None:
    outcome = outcome_of(fleet, runs.killing(), trial(Moment("execute.slice", 100_000)))
    assert (outcome.fired, outcome.ended) == (False, ON_ALL)


@pytest.mark.slow  # a silent device is given up after two seconds
def test_stall(fleet: OwnFleet) -> None:
    outcome = outcome_of(fleet, runs.stalling, trial(Moment("execute.slice", 3)))
    assert (outcome.fired, outcome.ended) == (True, RESTARTED)
    assert 1.5 < outcome.detection_s[0] < 3.0


@pytest.mark.slow  # starts two servers anew
def test_cascade(fleet: OwnFleet) -> None:
    # Large, so that it is under way when the first one dies.
    outcome = outcome_of(fleet, runs.cascading, trial(Moment(fraction=0.3), nbytes=8_000_000))
    assert outcome.ended == RESTARTED
    assert outcome.operations == 2 + (NRANKS - 1) + 1


@pytest.mark.slow  # a device comes and leaves, under traffic
def test_join(fleet: OwnFleet) -> None:
    summary = Summary("join", 3)
    join.run(summary, fleet, NRANKS, 1, 80_000, lambda _: None)
    assert summary.passed, summary.lines()
    (outcome,) = summary.outcomes
    assert (outcome.fired, outcome.ended) == (True, ON_ALL)


def test_what_goes_wrong_is_found() -> None:
    """By a coordinator that is told not to undo what a dead device leaves half done."""
    with OwnFleet(NRANKS, DEVICE_OPTIONS, ["--no-atomic"]) as fleet:
        outcome = runs.killing()(fleet, trial(Moment("execute.done")))
    assert (outcome.fired, outcome.ended, outcome.passed) == (True, LOST, False)
    assert {line.split(":")[0] for line in outcome.wrong} >= {
        f"rank {rank}, input, which must be as before" for rank in (0, 2)
    }


@pytest.mark.slow  # a fleet of its own, and all of it but one dies
def test_a_fleet_that_runs_already() -> None:
    """Its devices are not started anew: the run ends when too few are left."""
    with Fleet(NRANKS, DEVICE_OPTIONS) as fleet:
        pids = ",".join(f"{device_id}={server.process.pid}" for device_id, server in enumerate(fleet.devices, 1))
        options = ["--coordinator", fleet.address, "--pids", pids, "--n", "9", "--seed", "1", "--ranks", "2..2", "-v"]
        result = CliRunner().invoke(app, ["chaos", "kill", *options, "--max-size", "100KiB"])
        assert result.exit_code == 0, result.output
        assert [server.process.poll() is not None for server in fleet.devices].count(True) == NRANKS - 1
    assert result.output.startswith("seed 1\ntrial 1: ")
    assert "ended early" in result.output
    assert result.output.endswith("passed\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["kill", "--ranks", "many"], "--ranks must be A..B, for example 2..8, not 'many'"),
        (["kill", "--ranks", "5..2"], "ranks must be LEAST..LARGEST with at least 1, got 5..2"),
        (["kill", "--collectives", "gossip"], "unknown collectives gossip; known: all_reduce, broadcast"),
        (["kill", "--transports", "smoke"], "transports must be of"),
        (["kill", "--on-failure", "weep"], "--on-failure must be shrink or fail, not 'weep'"),
        (["kill", "--coordinator", "127.0.0.1:1"], "--coordinator and --pids go together"),
        (
            ["stall", "--coordinator", "127.0.0.1:1", "--pids", "1"],
            "--pids must be ID=PID,... for example 1=4711,2=4712, not '1'",
        ),
        (["kill", "--n", "3", "--only", "4"], "--only 4 is none of 3 trials"),
    ],
)
def test_options_that_do_not_do(options: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["chaos", *options])
    assert result.exit_code == 1
    assert said in result.output


def test_a_fleet_has_so_many_devices_and_no_more(fleet: OwnFleet) -> None:
    with pytest.raises(InvalidValue, match="4 ranks were asked for, the fleet has 3 devices"):
        fleet.members(4, {0: ""})
    with pytest.raises(InvalidValue, match=r"at least 2 devices and 70 s, got 1 and 100 s"):
        soak.run(Summary("soak", 1), fleet, 1, 100, 60, 8000, lambda _: None)


@pytest.mark.slow  # half a minute of traffic and kills is the least that says something
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_soak() -> None:
    summary = Summary("soak", 1)
    with OwnFleet(NRANKS, DEVICE_OPTIONS) as fleet:
        soak.run(summary, fleet, NRANKS, 30.0, 10.0, 80_000, lambda _: None)
    assert all(outcome.passed for outcome in summary.outcomes), summary.lines()
    assert len(summary.fired) >= 2
    assert sum("device 1" in name for name, _ in summary.extra) == 2


@pytest.mark.slow  # each waits for a device to be given up, or for traffic that is late
@pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8, and /proc")
def test_blackhole_and_delay() -> None:
    with OwnFleet(NRANKS, DEVICE_OPTIONS, cut=True) as fleet:
        slow = outcome_of(fleet, runs.delaying, trial(Moment()))
        assert (slow.fired, slow.ended) == (True, ON_ALL)
        for number in range(5):  # at a random instant: it may come too late
            cut = outcome_of(fleet, runs.vanishing, trial(Moment(fraction=0.05 * number), nbytes=8_000_000))
            if cut.fired and cut.ended == RESTARTED:
                break
        assert (cut.fired, cut.ended) == (True, RESTARTED)
        assert 1.5 < cut.detection_s[0] < 3.0


@pytest.mark.slow  # the coordinator is started twice
def test_coordinator() -> None:
    with OwnFleet(NRANKS, DEVICE_OPTIONS, state=True) as fleet:
        outcome = outcome_of(fleet, runs.coordinator_dying, trial(Moment(fraction=0.3), nbytes=8_000_000))
    assert (outcome.fired, outcome.ended) == (True, ON_ALL)
    assert outcome.recovery_s is not None
    assert outcome.recovery_s < 5.0
