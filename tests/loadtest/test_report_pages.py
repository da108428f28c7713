"""Reports as a browser lays them out at 1,280 pixels: nothing wider than the window, no text cut, in pages and in plots."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot as plt

from kvloom.loadtest.report.bars import plots
from kvloom.loadtest.report.pages import compare_runs, write_report
from kvloom.loadtest.report.plot import DPI, LIGHT, WIDTH, Plot, applied
from kvloom.loadtest.report.run import load_run

from .test_report import rich_run

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
         "--window-size=1280,900")  # fmt: skip
MEASURE = """
<script>addEventListener("load", () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const wrong = [], say = (why, e) => wrong.push(`${why}: <${e.tagName} ${e.className}> ${e.textContent.trim().slice(0, 60)}`);
  for (const e of document.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect();
    if (box.right > innerWidth + 1 || box.left < -1) say("outside the window", e);
    if (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline") say("content wider than its box", e);
  }
  const tops = [...document.querySelectorAll("figure, table, details")].map(e => e.tagName);
  const out = document.createElement("pre");
  out.id = "measured";
  out.textContent = JSON.stringify({width: innerWidth, page: document.documentElement.scrollWidth, wrong, tops});
  document.body.append(out);
})</script>"""
LONG = "a-run-with-a-name-of-more-than-forty-characters"


def laid_out(page: Path, tmp_path: Path) -> dict[str, Any]:
    """What a browser says of a page; the copy that is measured may run a script."""
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    copy = tmp_path / "measured.html"
    copy.write_text(html.replace("</body>", MEASURE + "</body>"))
    assert CHROMIUM is not None
    profile = tmp_path / "profile"
    words = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", "--virtual-time-budget=5000", copy.as_uri()]
    dom = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True).stdout
    found = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.S)
    assert found is not None, dom[-500:]
    measured: dict[str, Any] = json.loads(unescape(found[1]))
    return measured


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report on one run, and on five beside each other, with names as long as people give them."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [rich_run(folder / f"{LONG}-{i}", count=12, speed=1 + i / 4) for i in range(5)]
    write_report(runs[0])
    compare_runs([load_run(run) for run in runs], folder / "comparison")
    return {"one": runs[0] / "report.html", "five": folder / "comparison" / "report.html"}


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("name", ["one", "five"])
def test_nothing_is_wider_than_the_window_or_cut(pages: dict[str, Path], name: str, tmp_path: Path) -> None:
    found = laid_out(pages[name], tmp_path)
    assert found["width"] == 1280 and found["page"] <= 1280
    assert found["wrong"] == []
    figures, tables = ([i for i, tag in enumerate(found["tops"]) if tag == wanted] for wanted in ("FIGURE", "TABLE"))
    assert max(figures) < min(tables), "plots first"


@pytest.mark.parametrize("count", [1, 5])
def test_no_text_of_a_plot_leaves_it(pages: dict[str, Path], count: int) -> None:
    folder = pages["one"].parent.parent
    runs = [load_run(folder / f"{LONG}-{i}") for i in range(count)]
    drawn = [plot for plot in plots(runs) if plot.draw]
    assert len(drawn) >= 5
    assert [plot.name for plot in drawn if not fits(plot)] == []


def fits(plot: Plot) -> bool:
    """Whether all that is drawn, texts too, lies within the picture."""
    assert plot.draw is not None
    with applied(LIGHT):
        figure = plt.figure(figsize=(WIDTH, plot.height), dpi=DPI)
        try:
            plot.draw(figure, LIGHT)
            figure.canvas.draw()
            drawn = figure.get_tightbbox(figure.canvas.get_renderer())  # inches
            return bool(drawn.x0 >= -0.01 and drawn.y0 >= -0.01 and drawn.x1 <= WIDTH + 0.01 and drawn.y1 <= plot.height + 0.01)
        finally:
            plt.close(figure)


def test_a_comparison_says_on_top_what_was_measured_where(pages: dict[str, Path]) -> None:
    text = pages["five"].read_text()
    body = text[text.index("<body>") :]
    assert body.index("some processor, 2 cores") < body.index("<figure>") < body.index("Side by side at 8 req/s")
    assert "a-run-with-…acters-1 / a-run-with-…acters-0" in text and body.index("Side by side at 8 req/s") < body.index(
        "<summary>Side by side at 4 req/s"
    )
    alone = unescape(pages["one"].read_text())
    assert "<summary>The server's own figures</summary>" in alone
