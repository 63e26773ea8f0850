"""The page in a real browser: what its buttons, keys and hash do, and what it says of what one points at."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from dsml_gpu.schedules import find_algorithm
from dsml_gpu.schedules.drawing import draw, to_html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="neither chromium nor chrome is installed")

#: What is to be seen, in JavaScript. A ring of 3 has 4 steps, so stages 0 to 4.
LOOK = """
const seen = [];
const look = (what) => seen.push({
  what, when: byId("when").textContent, note: byId("note").textContent, slider: byId("slider").value, hash: location.hash,
  back: !byId("back").disabled, forward: !byId("forward").disabled, play: byId("play").textContent,
  later: [...document.querySelectorAll("g.later")].map((group) => group.dataset.stage).join(""),
  now: [...document.querySelectorAll("g.now")].map((group) => group.dataset.stage).join(""),
});
const key = (name) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
"""

#: When all is over, in the browser's own time, which runs as fast as it can.
REPORT = """
setTimeout(() => {
  const report = document.createElement("pre");
  report.id = "seen";
  report.textContent = JSON.stringify(seen);
  document.body.append(report);
}, 9000);
"""


def act(folder: Path, script: str, fragment: str = "") -> dict[str, Any]:
    """Opens the page of a ring of 3, runs a script in it, and gives what `look` has seen, by the names it was given."""
    page = folder / "ring.html"
    text = to_html(draw(find_algorithm("all_reduce", "ring").schedule(3)))
    page.write_text(text.replace("</body>", f"<script>{LOOK}{script}{REPORT}</script></body>"))
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-extensions", "--no-first-run",
            f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom", f"file://{page}{fragment}",
        ],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="seen">(.*)</pre>', done.stdout)
    assert found, done.stderr
    return {entry.pop("what"): entry for entry in json.loads(unescape(found[1]))}


def test_step_by_step(tmp_path: Path) -> None:
    seen = act(
        tmp_path,
        """
        look("opened");
        byId("back").click(); look("back");
        key("ArrowLeft"); key("ArrowLeft"); look("left twice");
        byId("back").click(); byId("back").click(); look("at the start");
        byId("forward").click(); look("forward");
        byId("slider").value = 3; byId("slider").dispatchEvent(new Event("input")); look("slid");
        const cell = [...document.querySelectorAll("rect")].find((one) => (one.dataset.note || "").includes("of ranks"));
        cell.dispatchEvent(new MouseEvent("mouseover", { bubbles: true })); look("pointed");
        document.querySelector("g[data-stage='1'] path").dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
        look("pointed at an arrow");
        """,
    )
    end = {"when": "at the end", "slider": "4", "back": True, "forward": False, "later": "", "now": ""}
    assert seen["opened"].items() >= end.items()
    assert seen["opened"]["note"] == "Point at a cell to see what it holds."
    back = {"when": "after step 2; the last is 3", "hash": "#3", "forward": True, "later": "4", "now": "3", "slider": "3"}
    assert seen["back"].items() >= back.items()
    assert seen["left twice"].items() >= {"when": "after step 0; the last is 3", "later": "234", "now": "1"}.items()
    start = {"when": "at the start", "back": False, "later": "1234", "now": ""}
    assert seen["at the start"].items() >= start.items()
    assert seen["forward"]["when"] == "after step 0; the last is 3"
    assert seen["slid"].items() >= back.items()
    assert seen["pointed"]["note"] == "rank 0, chunk 1, after step 0: 2 of 3 contributions, of ranks 0, 2"
    assert seen["pointed at an arrow"]["note"].startswith("step 0: chunk ")


def test_play_from_a_link_to_a_step(tmp_path: Path) -> None:
    """It plays to the end and stops there; played from the end, it begins at the start."""
    seen = act(
        tmp_path,
        """
        look("opened");
        key(" "); look("playing");
        setTimeout(() => look("after a while"), 1500);
        setTimeout(() => {
          look("over");
          byId("play").click(); look("again");
          byId("play").click(); look("stopped");
        }, 4000);
        """,
        "#2",
    )
    assert seen["opened"].items() >= {"when": "after step 1; the last is 3", "play": "play"}.items()
    assert seen["playing"].items() >= {"when": "after step 1; the last is 3", "play": "stop"}.items()
    assert seen["after a while"].items() >= {"when": "after step 2; the last is 3", "play": "stop"}.items()
    assert seen["over"].items() >= {"when": "at the end", "play": "play"}.items()
    assert seen["again"].items() >= {"when": "at the start", "play": "stop"}.items()
    assert seen["stopped"].items() >= {"when": "at the start", "play": "play"}.items()
