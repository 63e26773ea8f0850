"""Full speed for a long time, with a kill now and then: does anything fail, or grow?"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dsml_gpu.chaos.exercise import At, Stuck
from dsml_gpu.chaos.fleets import OwnFleet
from dsml_gpu.chaos.report import HANG, LOST, ON_ALL, RESTARTED, Outcome, Summary, ends, growth
from dsml_gpu.chaos.traffic import Traffic
from dsml_gpu.errors import InvalidValue

#: Between kills, and between looks at the processes.
KILL_EVERY_S = 5.0
_SAMPLE_EVERY_S = 1.0
#: More is a leak; so many open files more or less are connections that come and go.
LARGEST_GROWTH = 0.02
_FILES_OF_NOW = 2


@dataclass
class Samples:
    """What a process has used.

    Attributes:
        resident_kib, files: at each look.
    """

    resident_kib: list[float] = field(default_factory=list)
    files: list[float] = field(default_factory=list)

    def look(self, pid: int) -> None:
        """Takes a sample. Raises OSError where the process is gone."""
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        # Without what is shared: memory of other devices that it has open is theirs.
        (own,) = [line for line in status.splitlines() if line.startswith("RssAnon:")]
        self.resident_kib.append(float(own.split()[1]))
        self.files.append(float(len(os.listdir(f"/proc/{pid}/fd"))))


def run(
    summary: Summary,
    fleet: OwnFleet,
    ndevices: int,
    duration_s: float,
    warmup_s: float,
    nbytes: int,
    say: Callable[[str], None],
) -> None:
    """Runs traffic with a kill every `KILL_EVERY_S`; the server that died is started anew and taken in again.

    The first device is never killed, so that there is one of them to look at all the time.

    Args:
        duration_s: of all, the warm-up included.
        warmup_s: what grows in the beginning does not count.
        nbytes: of each rank's buffer.

    Raises:
        InvalidValue: fewer than two devices, or too short.
    """
    if sys.platform != "linux":
        raise InvalidValue("soak looks at /proc, which this system has not")
    if ndevices < 2 or duration_s < warmup_s + 2 * KILL_EVERY_S:
        raise InvalidValue(
            f"soak needs at least 2 devices and {warmup_s + 2 * KILL_EVERY_S:g} s, got {ndevices} and {duration_s:g} s"
        )
    rng = random.Random(summary.seed)
    traffic = Traffic(fleet.client, fleet.members(ndevices, {}), nbytes, summary.seed)
    watched = {"this process": os.getpid(), "coordinator": fleet.pids["coordinator"], "device 1": fleet.pids["device 1"]}
    samples = {name: Samples() for name in watched}
    began_s = time.monotonic()
    look_s = began_s + warmup_s
    kill = 0
    while time.monotonic() < began_s + duration_s:
        kill += 1
        ends_s = time.monotonic() + KILL_EVERY_S
        while time.monotonic() < ends_s:
            if time.monotonic() >= look_s:
                look_s += _SAMPLE_EVERY_S
                for name, pid in watched.items():
                    samples[name].look(pid)
            try:
                traffic.step()
            except Stuck as error:
                summary.outcomes.append(Outcome(f"before kill {kill}", HANG, True, note=str(error)))
                return
        outcome = _kill_one(fleet, traffic, kill, rng)
        summary.outcomes.append(outcome)
        say(str(outcome))
        if outcome.ended == HANG:
            return
    elapsed_s = time.monotonic() - began_s
    traffic.close()
    summary.extra.append(("operations", f"{traffic.done} in {elapsed_s:.0f} s, {traffic.failed} failed"))
    _judge_growth(summary, samples.items())


def _kill_one(fleet: OwnFleet, traffic: Traffic, number: int, rng: random.Random) -> Outcome:
    """Kills a device server in the middle of an operation, and takes its successor in: one time by growing, one time by a
    new communicator."""
    wrong, done, failed, hangs = (len(traffic.wrong), traffic.done, traffic.failed, traffic.hangs)
    device_ids = traffic.device_ids
    victim = rng.choice([device_id for device_id in device_ids if device_id != 1])
    last = traffic.step()
    traffic.harm(victim)
    # Operations take about as long as the one before.
    with At(rng.random() * (last.ended_s - last.began_s), lambda: fleet.signal(victim, signal.SIGKILL)) as fault:
        answer = traffic.step()
        while (fault.happened_s is None or fault.happened_s >= answer.ended_s) and traffic.hangs == hangs:
            answer = traffic.step()
    fired = fault.happened_s is not None and answer.began_s <= fault.happened_s < answer.ended_s
    recovery_s = answer.ended_s - fault.happened_s if fault.happened_s is not None and fired else None
    detection_s = answer.detection_s
    if traffic.hangs == hangs:
        fleet.replace(victim)
        traffic.step()  # without it, also where nobody had missed it yet
        if number % 2:
            traffic.grow([victim])
        else:
            traffic.renew(device_ids)
        traffic.step()
    ended = HANG if traffic.hangs > hangs else LOST if traffic.failed > failed else RESTARTED if detection_s else ON_ALL
    return Outcome(
        f"kill {number}: device {victim}",
        ended,
        fired,
        tuple(traffic.wrong[wrong:]),
        detection_s,
        recovery_s,
        traffic.done + traffic.failed - done - failed,
        answer.note,
    )


def _judge_growth(summary: Summary, samples: Iterable[tuple[str, Samples]]) -> None:
    for name, each in samples:
        for what, unit, values in (("memory", "KiB", each.resident_kib), ("open files", "", each.files)):
            share, (first, last) = growth(values), ends(values)
            digits = 0 if unit else 1
            said = f"{share:+.1%} ({first:.{digits}f} -> {last:.{digits}f} {unit}".rstrip() + ")"
            summary.extra.append((f"{what} of {name}", said))
            slack = _FILES_OF_NOW if values is each.files else 0
            if share > LARGEST_GROWTH + slack / first:
                summary.problems.append(f"{what} of {name} grew by {share:.1%}; {LARGEST_GROWTH:.0%} is allowed")
