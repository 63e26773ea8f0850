"""Algorithms of other distributions: real ones, in a folder of a process's ``sys.path``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsml_gpu.schedules import Algorithm, InvalidSchedule, UnknownAlgorithm, algorithms_of, find_algorithm, known_algorithms
from dsml_gpu.schedules.ring import ring_all_reduce

ROOT = Path(__file__).resolve().parents[2]

MODULE = """
import sys
from dsml_gpu.schedules import Algorithm, Builder

def my_broadcast(nranks, root=0):
    b = Builder("broadcast", "mine", nranks, root=root)
    c = b.chunk(root, 0)
    for rank in range(nranks):
        if rank != root:
            c.send(rank)
    return b.build()

MINE = Algorithm("broadcast", "mine", my_broadcast, "I. Myself, 2026")

def made():
    made.calls += 1
    return Algorithm("broadcast", "made", my_broadcast, "I. Myself, 2026")

made.calls = 0
NOT_ONE = 42
"""

ENTRY_POINTS = """
[dsml_gpu.schedules]
broadcast.mine = my_plugin:MINE
broadcast.made = my_plugin:made
broadcast.binomial_tree = my_plugin:MINE
broadcast.fails = my_plugin_that_fails
broadcast.lacks = my_plugin:LACKING
broadcast.number = my_plugin:NOT_ONE
broadcast.other = my_plugin:MINE
barrier.twice = my_plugin:MINE
mine = my_plugin:MINE
"""


def install(folder: Path, name: str, version: str, entry_points: str) -> None:
    """A distribution as pip leaves it, but for what nobody reads."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site-packages")
    install(folder, "my-plugin", "1.2", ENTRY_POINTS)
    install(folder, "rival", "3.4", "[dsml_gpu.schedules]\nbarrier.twice = rival:TWICE\n")
    (folder / "my_plugin.py").write_text(MODULE)
    (folder / "my_plugin_that_fails.py").write_text("raise RuntimeError('no licence')")
    return folder


def ask(folder: Path, program: str) -> Any:
    """Runs a program in a process with these distributions. Gives what it puts into `answer`, and what it logs."""
    prelude = "import json, sys\nfrom dsml_gpu.schedules import *\nfrom dsml_gpu.schedules import plugins\nanswer = {}\n"
    epilogue = "\nprint(json.dumps(answer))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", prelude + program + epilogue],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


ERRORS = """
for collective, name in [("broadcast", "fails"), ("broadcast", "lacks"), ("broadcast", "number"), ("broadcast", "other"),
                         ("barrier", "twice"), ("broadcast", "nowhere")]:
    try:
        find_algorithm(collective, name)
    except UnknownAlgorithm as error:
        answer[name] = [type(error).__name__, str(error)]
"""


def test_plug_ins_are_found_loaded_late_and_once(folder: Path) -> None:
    answer, log = ask(
        folder,
        """
known = known_algorithms("all_reduce")
find_algorithm("broadcast", "binomial_tree")
answer["loaded at first"] = "my_plugin" in sys.modules
mine = find_algorithm("broadcast", "mine")
answer["schedule"] = repr(mine.schedule(4, root=2))
answer["source"] = mine.source
find_algorithm("broadcast", "made")
answer["known"] = list(known_algorithms("broadcast"))
answer["same"] = find_algorithm("broadcast", "made") is find_algorithm("broadcast", "made")
import my_plugin
answer["calls"] = my_plugin.made.calls
answer["built-in"] = find_algorithm("broadcast", "binomial_tree").source
answer["of others"] = list(known_algorithms("all_reduce")) == list(algorithms_of("all_reduce"))
""",
    )
    assert answer == {
        "loaded at first": False,
        "schedule": "Schedule(broadcast mine, 4 ranks, 1 chunks, 1 steps, 3 transfers)",
        "source": "I. Myself, 2026",
        "known": [*algorithms_of("broadcast"), "made", "mine"],
        "same": True,
        "calls": 1,
        "built-in": algorithms_of("broadcast")["binomial_tree"].source,
        "of others": True,
    }
    assert log.count("entry point 'broadcast.binomial_tree' (my_plugin:MINE) of my-plugin 1.2 is ignored: its name is") == 1
    assert log.count("entry point 'mine' (my_plugin:MINE) of my-plugin 1.2 is ignored: its name must be") == 1


def test_a_broken_one_says_so_when_it_is_asked_for(folder: Path) -> None:
    answer, _ = ask(folder, ERRORS)
    assert answer["fails"] == [
        "BrokenPlugin",
        "entry point 'broadcast.fails' (my_plugin_that_fails) of my-plugin 1.2: RuntimeError: no licence",
    ]
    kind, message = answer["lacks"]
    assert kind == "BrokenPlugin"
    assert message.startswith("entry point 'broadcast.lacks' (my_plugin:LACKING) of my-plugin 1.2: AttributeError: ")
    assert answer["number"][1].endswith(" of my-plugin 1.2: it is no dsml_gpu.schedules.Algorithm but 42")
    assert answer["other"][1].endswith(" of my-plugin 1.2: it is the algorithm 'mine' of broadcast")
    kind, message = answer["twice"]
    assert kind == "BrokenPlugin"
    assert message.startswith("several plug-ins claim barrier.twice: ")
    assert "of my-plugin 1.2" in message
    assert "of rival 3.4" in message
    kind, message = answer["nowhere"]
    assert kind == "UnknownAlgorithm"
    assert message == (
        f"unknown algorithm 'nowhere' of broadcast; known: {', '.join([*algorithms_of('broadcast'), 'made', 'mine'])}"
    )


def test_broken_ones_are_logged_once_where_all_are_asked_for(folder: Path) -> None:
    _, log = ask(folder, "known_algorithms('broadcast'); known_algorithms('broadcast')")
    assert log.count("no licence") == 1


def test_without_plug_ins_there_is_the_catalog() -> None:
    assert list(known_algorithms("all_reduce"))[: len(algorithms_of("all_reduce"))] == list(algorithms_of("all_reduce"))
    assert find_algorithm("all_reduce", "ring").build is ring_all_reduce
    with pytest.raises(UnknownAlgorithm, match="unknown algorithm 'rings' of all_reduce; known: ring, bidirectional_ring, "):
        find_algorithm("all_reduce", "rings")


@pytest.mark.parametrize(
    ("collective", "nranks", "root"), [("reduce_scatter", 4, 0), ("all_reduce", 5, 0), ("broadcast", 4, 1)]
)
def test_an_algorithm_that_builds_something_else_is_refused(collective: str, nranks: int, root: int) -> None:
    """The proof is of what the schedule says that it is, so this must be what was asked for."""
    wrong = Algorithm(collective, "mine", lambda nranks: ring_all_reduce(4), "")
    with pytest.raises(InvalidSchedule, match=f"mine has built a schedule for all_reduce with .* not for {collective} with"):
        wrong.schedule(nranks, root=root)
