"""Devices that die at every place of their code; see `tests.recovery.failpoint_matrix`."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import pytest

from dsml_gpu.chaos.fleets import OwnFleet
from dsml_gpu.memory.shared import can_share
from tests.recovery.failpoint_matrix import DEVICE_OPTIONS, ELSEWHERE, NDEVICES, Case, cases, run
from tests.recovery.planted_bugs import ROOT

#: By which one case of each kind is taken for `make test`.
_SEED = 20


@pytest.fixture(scope="module")
def fleet() -> Iterator[OwnFleet]:
    with OwnFleet(NDEVICES, DEVICE_OPTIONS) as one:
        yield one


def drawn() -> set[Case]:
    """One case of each transport, size, way to go on, end and number of faults; none that waits for a frozen device."""
    kinds: dict[object, list[Case]] = {}
    for case in cases():
        if not any("stop" in what for _, what in case.faults):
            kind = (case.transport, case.nbytes, case.on_failure, case.ends, len(case.faults))
            kinds.setdefault(kind, []).append(case)
    return {random.Random(_SEED).choice(some) for some in kinds.values()}


def marked() -> Iterator[object]:
    fast = drawn()
    for case in cases():
        marks = [] if case in fast else [pytest.mark.slow]
        if case.transport == "p2p":
            marks.append(pytest.mark.skipif(not can_share(), reason="memory is shared by memfd, which is Linux's"))
        yield pytest.param(case, id=str(case), marks=marks)


@pytest.mark.parametrize("case", list(marked()))
def test_a_device_dies(fleet: OwnFleet, case: Case) -> None:
    assert run(fleet, case) == []


def test_every_place_is_met() -> None:
    """By this matrix, or by the tests that it names."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "dsml_gpu").rglob("*.py"))
    places = set(re.findall(r'reach\("([a-z]+\.[a-z]+)"', source)) | {"passes.commit", "passes.resume"}
    met = {re.split("[:@]", what)[0] for case in cases() for _, what in case.faults}
    assert met | ELSEWHERE.keys() == places
    assert not met & ELSEWHERE.keys()
    for place, file in ELSEWHERE.items():
        assert place in (ROOT / file).read_text(encoding="utf-8"), (place, file)
