"""What trials have come to, and the summary of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

#: How an operation can end.
ON_ALL, RESTARTED, AS_BEFORE, LOST, HANG = (
    "completed on all ranks",
    "restarted without the dead",
    "failed, all buffers as before",
    "LOST",
    "HANG",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one trial has come to.

    Attributes:
        what: the trial, for people.
        ended: one of `ON_ALL` ... `HANG`; of several operations the worst one.
        fired: the fault happened in the course of the operation.
        wrong: what is wrong, for people; empty: nothing.
        detection_s: of each device that was given up.
        recovery_s: from the fault to the answer; None: the fault did not fire, or there was no answer.
        operations: how many there were.
        note: for people, for example what it failed with.
    """

    what: str
    ended: str
    fired: bool
    wrong: tuple[str, ...] = ()
    detection_s: tuple[float, ...] = ()
    recovery_s: float | None = None
    operations: int = 1
    note: str = ""

    @property
    def passed(self) -> bool:
        """Nothing hung, was lost, or is wrong."""
        return not self.wrong and self.ended not in (LOST, HANG)

    def __str__(self) -> str:
        parts = [self.what, self.ended if self.fired else f"{self.ended} (the fault did not fire in the operation)"]
        if self.recovery_s is not None:
            parts.append(f"answer {self.recovery_s * 1e3:.0f} ms after the fault")
        if self.note:
            parts.append(self.note)
        return "; ".join(parts) + "".join(f"\n    WRONG {one}" for one in self.wrong)


@dataclass
class Summary:
    """All outcomes of a run.

    Attributes:
        command, seed: by which it can be had again.
        limits_s: what may not be exceeded: ``detection``, ``recovery``.
        extra: more lines: name and value.
        problems: what is wrong with the run as a whole.
    """

    command: str
    seed: int
    outcomes: list[Outcome] = field(default_factory=list)
    limits_s: dict[str, float] = field(default_factory=dict)
    extra: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def fired(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.fired]

    @property
    def late(self) -> list[str]:
        """What took longer than it may."""
        return [
            f"{outcome.what}: {name} took {value_s:.2f} s, {self.limits_s[name]:g} s are allowed"
            for outcome in self.fired
            for name, values_s in (("detection", outcome.detection_s), ("recovery", _given(outcome.recovery_s)))
            if name in self.limits_s
            for value_s in values_s
            if value_s > self.limits_s[name]
        ]

    @property
    def passed(self) -> bool:
        """No hang, no wrong element, no lost operation, nothing late."""
        return not self.late and not self.problems and all(outcome.passed for outcome in self.outcomes)

    def rows(self) -> list[tuple[str, str]]:
        """Names and values, for people."""
        fired = self.fired
        ended = Counter(outcome.ended for outcome in fired)
        rows = [
            ("seed", str(self.seed)),
            ("trials", f"{len(self.outcomes)}, with {sum(outcome.operations for outcome in self.outcomes)} operations"),
            ("faults that fired", f"{len(fired)}"),
            ("did not fire in the operation", f"{len(self.outcomes) - len(fired)}, counted apart"),
            *((name, str(ended[name])) for name in (ON_ALL, RESTARTED, AS_BEFORE) if ended[name]),
            ("hangs", str(sum(outcome.ended == HANG for outcome in self.outcomes))),
            ("lost operations", str(sum(outcome.ended == LOST for outcome in self.outcomes))),
            ("trials with wrong elements", str(sum(bool(outcome.wrong) for outcome in self.outcomes))),
            ("detection", quantiles(value for outcome in fired for value in outcome.detection_s)),
            ("fault to answer", quantiles(value for outcome in fired for value in _given(outcome.recovery_s))),
            *self.extra,
        ]
        if self.limits_s:
            rows.append(("late", str(len(self.late))))
        return rows

    def lines(self) -> list[str]:
        """The summary as text, failures last."""
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        failures = [str(outcome) for outcome in self.outcomes if not outcome.passed]
        return [
            f"dsml-gpu chaos {self.command}",
            *(f"  {name:<{width}}  {value}" for name, value in rows),
            *(f"FAILED {line}" for line in [*failures, *self.late, *self.problems]),
            "passed" if self.passed else f"FAILED; again with the same options and --seed {self.seed}",
        ]


def quantiles(values_s: Iterable[float]) -> str:
    """``"p50 12.1 ms, p99 40.0 ms"`` of durations in seconds."""
    values = list(values_s)
    if not values:
        return "-"
    half, most = np.quantile(values, [0.5, 0.99])
    return f"p50 {half * 1e3:.1f} ms, p99 {most * 1e3:.1f} ms, max {max(values) * 1e3:.1f} ms"


def ends(samples: Sequence[float]) -> tuple[float, float]:
    """A quantity at its beginning and at its end: the means of the first tenth of its samples, and of the last one.

    Not medians: what has one of two values, by turns, has either as its median.

    Raises:
        ValueError: fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError(f"growth needs at least 2 samples, got {len(samples)}")
    tenth = max(1, len(samples) // 10)
    return float(np.mean(samples[:tenth])), float(np.mean(samples[-tenth:]))


def growth(samples: Sequence[float]) -> float:
    """By which share a quantity has grown, from one of its `ends` to the other. Raises as `ends`."""
    first, last = ends(samples)
    return last / first - 1 if first else 0.0


def _given(value: float | None) -> tuple[float, ...]:
    return () if value is None else (value,)
