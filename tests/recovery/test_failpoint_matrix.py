"""Devices and coordinators that die at every place of their code; see `tests.recovery.failpoint_matrix`."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import pytest

from dsml_gpu.memory.shared import can_share
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.recovery.failpoint_cases import (
    COORDINATOR,
    ELSEWHERE,
    GRPC,
    NRANKS,
    OF_COORDINATOR,
    OF_OPERATIONS,
    P2P,
    Case,
    cases,
)
from tests.recovery.failpoint_matrix import Bench
from tests.recovery.planted_bugs import ROOT

#: By which one case of each kind is taken for `make test`.
_SEED = 20


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench() as one:
        yield one


def drawn() -> set[Case]:
    """One case of each transport, way to go on, and kind of faults, two of coordinators; none with a frozen device."""
    kinds: dict[object, list[Case]] = {}
    for case in cases():
        if case.way.lane and not any("stop" in what for _, what in case.faults):
            who = "coordinator" if case.faults[0][0] == COORDINATOR else case.way.transport
            several = len(case.victims) > 1
            kind = (who, case.on_failure, several, bool(case.unmet))
            kinds.setdefault(kind, []).append(case)
    generator = random.Random(_SEED)
    return {generator.choice(some) for some in kinds.values()}


def marked() -> Iterator[object]:
    fast = drawn()
    for case in cases():
        marks = [] if case in fast else [pytest.mark.slow]
        if case.way.transport == "p2p":
            marks.append(pytest.mark.skipif(not can_share(), reason="memory is shared by memfd, which is Linux's"))
        yield pytest.param(case, id=str(case), marks=marks)


@pytest.mark.parametrize("case", list(marked()))
def test_it_is_as_it_should_be(bench: Bench, case: Case) -> None:
    assert bench.run(case).wrong == []


def place_of(order: str) -> str:
    return re.split("[:@]", order)[0]


def test_every_place_of_the_source_is_met() -> None:
    """By this matrix, or by the tests that it names."""
    met = {place_of(what) for case in cases() if not case.unmet for _, what in case.faults}
    kinds = {place.split(".")[0] for place in met | ELSEWHERE.keys()}
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "dsml_gpu").rglob("*.py"))
    # What is handed to `reach`, by whatever name, and what looks like a place, from wherever it is handed there.
    places = {*re.findall(r'reach[(,]\s*"([^"]+)"', source), *re.findall(rf'"((?:{"|".join(kinds)})\.[a-z_]+)"', source)}
    assert met | ELSEWHERE.keys() == places
    assert not met & ELSEWHERE.keys()
    # Those that are tried at every rank, and in every way. Nobody goes on for another one where nothing else has happened.
    assert {*OF_OPERATIONS, "passes.resume"} == {one for one in places if one.startswith(("execute.", "passes."))}
    assert {*OF_COORDINATOR} == {one for one in places if one.startswith(("round.", "outcomes."))}
    for place, file in ELSEWHERE.items():
        assert place in (ROOT / file).read_text(encoding="utf-8"), (place, file)


@pytest.mark.parametrize("way", GRPC + P2P, ids=str)
def test_every_place_has_a_case_at_every_rank_or_one_that_says_why_not(way: object) -> None:
    for on_failure in ("shrink", "fail"):
        some = [case for case in cases() if case.way == way and case.on_failure in ("shrink", on_failure)]
        said = {(device, place_of(what)) for case in some if case.unmet for device, what in case.faults}
        alone = [case for case in some if case.on_failure == on_failure and not case.unmet and len(case.faults) == 1]
        met = {(device, place_of(what)) for case in alone for device, what in case.faults}
        wanted = {(rank, place) for rank in range(NRANKS) for place in OF_OPERATIONS}
        if on_failure == "shrink":
            wanted |= {(COORDINATOR, place) for place in OF_COORDINATOR}
            assert not met & said
        assert wanted <= met | said, (on_failure, sorted(wanted - met - said))


def test_every_phase_and_settlement_is_met() -> None:
    orders = [what for case in cases() if not case.unmet for _, what in case.faults]
    names = {*pb.ExecuteRequest.Phase.DESCRIPTOR.values_by_name}
    phases = {name for name in names if any(f"phase={name}," in f"{one}," for one in orders)}
    # That is met where ranks have to be asked first, by a place that does not tell phases apart.
    assert phases | {"PREPARE"} == names
    assert any(not case.way.lane for case in cases())
    # Without settlement only those are asked that have failed and live, who are no victims any more.
    names = {*pb.QuiesceRequest.Settlement.DESCRIPTOR.values_by_name}
    settlements = {name for name in names if any(f"settlement={name}," in f"{one}," for one in orders)}
    assert settlements | {"UNSETTLED"} == names
