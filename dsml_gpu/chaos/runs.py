"""Runs of trials with one operation each: kill, stall, blackhole, delay; and cascade, coordinator."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from dsml_gpu.chaos.exercise import Answer, At, Exercise, Stuck, share_of
from dsml_gpu.chaos.fleets import NoVictim, OwnFleet, Target, reachable, wait_until
from dsml_gpu.chaos.report import AS_BEFORE, HANG, LOST, ON_ALL, RESTARTED, Outcome, Summary
from dsml_gpu.chaos.trials import Trial
from dsml_gpu.errors import DsmlError

#: How bad an end is, of several operations of one trial.
_WORSE = (ON_ALL, RESTARTED, AS_BEFORE, LOST, HANG)
#: A device that wakes up gets so long to do what it must not do.
_LATE_WRITES_S = 0.2
#: Delayed traffic may take so long.
_DELAYED_LIMIT_S = 120.0

Run = Callable[[Target, Trial], Outcome]


def run_trials(
    summary: Summary, fleet: Callable[[], Target], trials: Sequence[Trial], run: Run, say: Callable[[str], None]
) -> None:
    """Runs trials one after the other; outcomes go into the summary.

    Args:
        fleet: makes one; it has a ``stop``. Another one is made after a trial that hung or broke down.
        say: gets a line for each.
    """
    with ExitStack() as stack:
        target: Target | None = None
        for trial in trials:
            if target is None:
                target = fleet()
                stack.callback(getattr(target, "stop", lambda: None))
            try:
                outcome = run(target, trial)
            except NoVictim as end:
                summary.extra.append(("ended early", f"before trial {trial.number}: {end}"))
                return
            except Stuck as error:
                outcome = Outcome(str(trial), HANG, True, note=str(error))
            except DsmlError as error:
                outcome = Outcome(str(trial), LOST, False, note=f"beside the operation: {type(error).__name__}: {error}")
            summary.outcomes.append(outcome)
            say(str(outcome))
            if outcome.ended == HANG or outcome.note.startswith("beside"):
                stack.close()
                target = None


class _Fault:
    """One fault at one rank of an exercise, at its moment.

    Args:
        happens: makes it; where the moment is a failpoint the process does it by itself.
    """

    def __init__(self, target: Target, trial: Trial, exercise: Exercise, happens: Callable[[], None]) -> None:
        self._target, self._trial, self._exercise, self._happens = target, trial, exercise, happens
        self._device_id = exercise.device_ids[trial.victim]

    def run(self, duration_s: float) -> tuple[Answer, float | None]:
        """Runs the operation; returns its answer, and when the fault happened, by `time.monotonic`; None: not in it."""
        self._exercise.harmed.add(self._trial.victim)
        if self._trial.moment.place:
            answer = self._exercise.run()
            return answer, self._target.fired_s(self._device_id)
        with At(share_of(duration_s, self._trial.moment.fraction), self._happens) as fault:
            answer = self._exercise.run()
        happened_s = fault.happened_s
        return answer, happened_s if happened_s is not None and happened_s < answer.ended_s else None


def _order(trial: Trial, action: str) -> str:
    """The failpoint of a trial; empty: none."""
    moment = trial.moment
    if not moment.place:
        return ""
    return f"{moment.place}:{action}" + (f"@skip={moment.skip}" if moment.skip else "")


def _outcome(
    trial: Trial, exercise: Exercise, answer: Answer, fired_s: float | None, ended: str, wrong: Sequence[str]
) -> Outcome:
    return Outcome(
        str(trial),
        ended,
        fired_s is not None,
        tuple(wrong),
        answer.detection_s,
        None if fired_s is None or answer.hangs else max(0.0, answer.ended_s - fired_s),
        exercise.operations,
        answer.note,
    )


def killing(on_failure: str = "shrink") -> Run:
    """SIGKILL to a device server."""

    def run(target: Target, trial: Trial) -> Outcome:
        device_ids = target.members(trial.operation.nranks, {trial.victim: _order(trial, "kill")})
        victim = device_ids[trial.victim]
        with Exercise(
            target.client, device_ids, trial.operation, trial.seed, whole=trial.whole, on_failure=on_failure
        ) as exercise:
            duration_s, wrong = (0.0, []) if trial.moment.place else exercise.rehearse()
            fault = _Fault(target, trial, exercise, lambda: target.signal(victim, signal.SIGKILL))
            try:
                answer, fired_s = fault.run(duration_s)
            finally:
                target.repair(victim)
            ended, found = exercise.judge(answer)
            wrong += found
            if ended in (ON_ALL, RESTARTED, AS_BEFORE):
                wrong += exercise.go_on()
        return _outcome(trial, exercise, answer, fired_s, ended, wrong)

    return run


def stalling(target: Target, trial: Trial) -> Outcome:
    """SIGSTOP to a device server, and SIGCONT when the others are done."""
    device_ids = target.members(trial.operation.nranks, {trial.victim: _order(trial, "stop")})
    victim = device_ids[trial.victim]
    try:
        return _cut(
            target,
            trial,
            device_ids,
            lambda: target.signal(victim, signal.SIGSTOP),
            lambda: target.signal(victim, signal.SIGCONT),
        )
    finally:
        if trial.moment.place:  # the order may still wait
            target.repair(victim)


def vanishing(target: Target, trial: Trial) -> Outcome:
    """All traffic of a device server vanishes, and comes again when the others are done."""
    assert isinstance(target, OwnFleet)
    assert target.network is not None
    network = target.network
    device_ids = target.members(trial.operation.nranks, {trial.victim: ""})
    victim = device_ids[trial.victim]
    return _cut(target, trial, device_ids, lambda: network.cut_off(victim), lambda: network.heal(victim))


def _cut(
    target: Target, trial: Trial, device_ids: Sequence[int], happens: Callable[[], None], ends: Callable[[], None]
) -> Outcome:
    """A device that is silent for a while, and then comes back."""
    victim = device_ids[trial.victim]
    with Exercise(target.client, device_ids, trial.operation, trial.seed, whole=trial.whole) as exercise:
        duration_s, wrong = (0.0, []) if trial.moment.place else exercise.rehearse()
        fault = _Fault(target, trial, exercise, happens)
        try:
            answer, fired_s = fault.run(duration_s)
            ended, found = exercise.judge(answer)
            wrong += found
        finally:
            ends()
        if ended == HANG:
            return _outcome(trial, exercise, answer, fired_s, ended, wrong)
        time.sleep(_LATE_WRITES_S)
        wrong += [f"after the victim came back: {one}" for one in exercise.unchanged()]
        wrong += exercise.go_on()
        wait_until(lambda: victim in reachable(target.client), f"device {victim} is back")
        # It is as good as any other for the next communicator.
        with Exercise(target.client, device_ids, trial.operation, trial.seed + 1, whole=trial.whole) as fresh:
            _, found = fresh.rehearse()
            wrong += [f"in the next communicator: {one}" for one in found]
        wrong += [f"at last: {one}" for one in exercise.unchanged()]
    return _outcome(trial, exercise, answer, fired_s, ended, wrong)


def delaying(target: Target, trial: Trial) -> Outcome:
    """All traffic of a device server is late. Slow is not dead: nobody may be given up."""
    assert isinstance(target, OwnFleet)
    assert target.network is not None
    device_ids = target.members(trial.operation.nranks, {trial.victim: ""})
    victim = device_ids[trial.victim]
    before = target.network.touched(victim)
    target.network.delay(victim, trial.delay_s)
    try:
        with Exercise(
            target.client, device_ids, trial.operation, trial.seed, whole=trial.whole, limit_s=_DELAYED_LIMIT_S
        ) as exercise:
            answer = exercise.run()
            ended, wrong = exercise.judge(answer)
    finally:
        target.network.heal(victim)
    if ended == RESTARTED:
        wrong.append("a device was given up that was only slow")
    fired_s = answer.began_s if target.network.touched(victim) > before else None
    outcome = _outcome(trial, exercise, answer, fired_s, ended, wrong)
    return Outcome(
        f"trial {trial.number}: {trial.operation}; rank {trial.victim} {trial.delay_s * 1e3:.0f} ms late",
        outcome.ended,
        outcome.fired,
        outcome.wrong,
        operations=outcome.operations,
        note=outcome.note,
    )


def cascading(target: Target, trial: Trial) -> Outcome:
    """One device server after the other is killed, each in an operation, until one is left."""
    operation, nranks = trial.operation, trial.operation.nranks
    device_ids = target.members(nranks, {trial.victim: ""})
    detection_s: list[float] = []
    recovery_s: list[float] = []
    worst, fired, note = ON_ALL, 0, ""
    with Exercise(target.client, device_ids, operation, trial.seed, whole=trial.whole) as exercise:
        duration_s, wrong = exercise.rehearse()
        for number in range(nranks - 1):
            rank = (trial.victim + number) % nranks
            exercise.harmed.add(rank)
            # Each at another instant.
            after_s = share_of(duration_s, (trial.moment.fraction + number * 0.618) % 1.0)
            victim = device_ids[rank]
            try:
                with At(after_s, lambda victim=victim: target.signal(victim, signal.SIGKILL)) as fault:  # type: ignore[misc]
                    answer = exercise.run()
            finally:
                target.repair(victim)
            ended, found = exercise.judge(answer)
            wrong += [f"with {number + 1} dead: {one}" for one in found]
            worst = max(worst, ended, key=_WORSE.index)
            note = note or answer.note
            detection_s += answer.detection_s
            if fault.happened_s is not None and fault.happened_s < answer.ended_s:
                fired += 1
                recovery_s.append(answer.ended_s - fault.happened_s)
            if ended in (LOST, HANG):
                break
        else:
            wrong += [f"with one left: {one}" for one in exercise.go_on()]
    return Outcome(
        f"{trial}, then all but one of the others: {fired} of {nranks - 1} died in an operation",
        worst,
        fired > 0,
        tuple(wrong),
        tuple(detection_s),
        max(recovery_s, default=None),
        exercise.operations,
        note,
    )


def coordinator_dying(target: Target, trial: Trial) -> Outcome:
    """SIGKILL to the coordinator, and another one at the same place with the same state."""
    assert isinstance(target, OwnFleet)
    device_ids = target.members(trial.operation.nranks, {trial.victim: ""})
    with Exercise(target.client, device_ids, trial.operation, trial.seed, whole=trial.whole) as exercise:
        duration_s, wrong = exercise.rehearse()
        with At(share_of(duration_s, trial.moment.fraction), target.kill_coordinator) as fault:
            answer = exercise.run()
        # One that has forgotten the devices hears of them again; what they have is to be looked at.
        wait_until(lambda: reachable(target.client).keys() >= set(device_ids), "all devices are back")
        ended, found = exercise.judge(answer)
        wrong += found
        if ended == ON_ALL:
            # A second execution of what was in place would show here, and whether the communicator is of use.
            wrong += exercise.go_on()
    if ended == RESTARTED:
        wrong.append("a device was given up, though only the coordinator had died")
    fired = fault.happened_s is not None and fault.happened_s < answer.ended_s
    return Outcome(
        f"trial {trial.number}: {trial.operation}; coordinator {trial.moment}",
        ended,
        fired,
        tuple(wrong),
        recovery_s=answer.ended_s - fault.happened_s if fault.happened_s is not None and fired else None,
        operations=exercise.operations,
        note=answer.note,
    )
