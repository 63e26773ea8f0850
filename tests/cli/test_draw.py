"""`dsml-gpu draw`: the files it writes, those in docs/pictures, and what it refuses."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dsml_gpu.cli.draw import Setup, drawn, parse_hosts, parse_setup
from dsml_gpu.cli.main import app
from dsml_gpu.schedules import ALGORITHMS, Algorithm, find_algorithm, plugins
from dsml_gpu.schedules.drawing import draw, to_html, to_png, to_svg

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
#: How those of the documentation are made.
DOCUMENTED = {
    "all_reduce_ring_4.svg": "ring --ranks 4",
    "all_reduce_double_binary_tree_8.svg": "double_binary_tree --ranks 8",
    "all_to_all_bruck_4.svg": "bruck --collective all_to_all --ranks 4",
}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["draw", *map(str, arguments)])


def refusal(*arguments: str | Path) -> str:
    """What it says when it refuses: one line."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert not result.stdout
    return line


# ---- files --------------------------------------------------------------------------------------------------------------


def test_four_ranks_of_an_all_reduce_by_default(tmp_path: Path) -> None:
    file = tmp_path / "ring.svg"
    result = run("ring", "-o", file)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{file}: Schedule(all_reduce ring, 4 ranks, 4 chunks, 6 steps, 24 transfers)\n"
    ring = find_algorithm("all_reduce", "ring")
    assert file.read_text() == to_svg(draw(ring.schedule(4), source=ring.source))


@pytest.mark.parametrize("suffix", [".svg", ".html", ".png", ".SVG"])
def test_the_suffix_says_which_kind_of_file(tmp_path: Path, suffix: str) -> None:
    if suffix == ".png":
        pytest.importorskip("PIL")
    file = tmp_path / f"tree{suffix}"
    result = run("binomial_tree", "--collective", "broadcast", "--ranks", "3", "--root", "2", "--output", file)
    assert result.exit_code == 0, result.output
    algorithm = find_algorithm("broadcast", "binomial_tree")
    picture = draw(algorithm.schedule(3, root=2), source=algorithm.source)
    if suffix == ".png":
        assert file.read_bytes() == to_png(picture)
    else:
        assert file.read_text() == (to_html if suffix == ".html" else to_svg)(picture)


def test_hosts_say_how_many_ranks_there_are(tmp_path: Path) -> None:
    result = run("hierarchical", "--hosts", "2x3", "-o", tmp_path / "a.svg")
    assert "6 ranks, 6 chunks, 6 steps" in result.stdout, "2(3-1) within hosts and 2(2-1) across"
    assert ">host 1<" in (tmp_path / "a.svg").read_text()


def test_every_algorithm_by_its_names() -> None:
    for algorithm in ALGORITHMS:
        schedule, picture = drawn(Setup(Path("a.svg"), algorithm.name, algorithm.collective, 5))
        assert (schedule.collective, schedule.algorithm) == (algorithm.collective, algorithm.name)
        assert picture.stages == len(schedule.steps)


@pytest.mark.parametrize(("name", "arguments"), DOCUMENTED.items(), ids=DOCUMENTED)
def test_pictures_of_the_documentation_are_those_of_today(tmp_path: Path, name: str, arguments: str) -> None:
    assert run(*arguments.split(), "-o", tmp_path / name).exit_code == 0
    assert (tmp_path / name).read_text() == (PICTURES / name).read_text(), (
        f"dsml-gpu draw {arguments} -o docs/pictures/{name}"
    )


def test_the_documentation_has_no_other_pictures() -> None:
    assert {file.name for file in PICTURES.iterdir()} == set(DOCUMENTED)


# ---- refusals -----------------------------------------------------------------------------------------------------------


def test_an_unknown_algorithm_lists_the_known_ones(tmp_path: Path) -> None:
    line = refusal("rings", "-o", tmp_path / "a.svg")
    assert line == (
        f"dsml-gpu: unknown algorithm 'rings' of all_reduce; known: {', '.join(plugins.known_algorithms('all_reduce'))}"
    )
    assert "known: binomial_tree, direct" in refusal("ring", "--collective", "gather", "-o", tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ring", "-o", "ring.gif"], "cannot draw ring.gif: its name must end in .svg, .png or .html"),
        (["ring", "-o", "ring"], "cannot draw ring: its name must end in .svg, .png or .html"),
        (["ring", "-o", "a.svg", "--collective", "reduced"], "unknown collective 'reduced'; known: all_reduce, reduce, "),
        (["ring", "-o", "a.svg", "--ranks", "33"], "a picture can have 1 to 32 ranks, not 33"),
        (["ring", "-o", "a.svg", "--ranks", "0"], "a picture can have 1 to 32 ranks, not 0"),
        (["ring", "-o", "a.svg", "--root", "4"], "root 4 is not one of 4 ranks"),
        (["ring", "-o", "a.svg", "--hosts", "2x2", "--ranks", "3"], "the hosts of 4 ranks are given, and there are 3"),
        (["ring", "-o", "a.svg", "--hosts", "99x99"], "a picture can have 1 to 32 ranks, not 9801"),
        (["ring", "-o", "a.svg", "--hosts", "2*2"], "'2*2' says neither hosts and ranks of each, such as 2x4, nor "),
    ],
)
def test_refusals(arguments: list[str], message: str) -> None:
    assert refusal(*arguments).startswith(f"dsml-gpu: {message}")


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "nowhere" / "a.svg"
    assert refusal("ring", "-o", file) == f"dsml-gpu: cannot write {file}: {os.strerror(2)}"


def test_png_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    file = tmp_path / "a.png"
    assert refusal("ring", "-o", file) == "dsml-gpu: PNG files need Pillow 10.1 or newer: pip install 'dsml_gpu[draw]'"
    assert not file.exists()


def test_an_algorithm_whose_schedule_is_not_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Algorithm("all_reduce", "wrong", find_algorithm("barrier", "dissemination").build, "")
    monkeypatch.setattr("dsml_gpu.cli.draw.find_algorithm", lambda collective, name: wrong)
    assert "wrong has built a schedule for barrier" in refusal("wrong", "-o", tmp_path / "a.svg")


def test_hosts() -> None:
    assert parse_hosts("2x3") == (0, 0, 0, 1, 1, 1)
    assert parse_hosts("1x1") == (0,)
    assert parse_hosts("3,0,0") == (3, 0, 0)
    assert parse_hosts("7") == (7,)
    for text in ("", "x", "0x2", "2x0", "1,,2", "a,b", "-1,0", "2x2x2"):
        with pytest.raises(ValueError, match="says neither"):
            parse_hosts(text)
    assert parse_setup(ranks=None, hosts=None, output=Path("a.svg"), algorithm="ring").nranks == 4
