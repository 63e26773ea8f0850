"""Bugs in the code that recovers are seen by its tests."""

from __future__ import annotations

import pytest

from tests.recovery.planted_bugs import BUGS, Bug, is_seen

#: Whose tests start no servers; the others take minutes.
_FAST = ("fsync of a checkpoint's file", "lost rank's", "outcome of an operation")


@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    "bug",
    [pytest.param(bug, id=bug.name, marks=() if bug.name.startswith(_FAST) else pytest.mark.slow) for bug in BUGS],
)
def test_a_planted_bug_is_seen(bug: Bug) -> None:
    assert is_seen(bug)
