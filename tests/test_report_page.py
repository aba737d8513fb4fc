"""The report's page in a real browser: it loads from disk and nothing else, in light and dark, narrow and on paper."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import report_samples as samples

from hpcml import report
from hpcml.rundir import RunDir

playwright = pytest.importorskip("playwright.sync_api", reason="Chromium: needs playwright, pip install 'hpcml[test]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium: not installed, apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to run as root with it
        opened = started.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(samples.full(tmp_path_factory.mktemp("full")))


Open = Callable[..., Any]


@pytest.fixture
def page_of(browser: Any) -> Iterator[Open]:
    """Open a page; at the end of the test it must have asked for nothing but itself, and have complained of nothing."""
    requests: list[str] = []
    complaints: list[str] = []
    contexts = []

    def open_page(path: Path, *, width: int = 1100, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        for details in page.query_selector_all("details:not([open]) > summary"):
            details.click()
        page.wait_for_load_state("networkidle")
        requests.remove(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [url for url in requests if not url.startswith("data:")] == []
    assert complaints == []


def test_it_loads_with_everything_in_it(page_of: Open, full: Path) -> None:
    page = page_of(full)
    assert page.title() == "mnist-mirrored"
    text = page.inner_text("main")
    words = (
        "COMPLETED",
        "97.08 %",
        "mem_gb = 12",
        "asked 64 GiB, peak 9.0 GiB",
        "167 Wh",
        "12 min 34 s",
        "NVIDIA H100",
    )
    for one in (*words, "OMP_NUM_THREADS", "/scratch/42/mnist", "Steps 10 to 20", "One process", "epoch 8/8 accuracy"):
        assert one in text, one
    assert page.locator(".notebook h1").inner_text().startswith("MNIST on two GPUs")
    assert page.locator(".notebook img").evaluate("image => image.naturalWidth") == 1


def test_curves_have_points_and_share_an_axis_with_the_epochs_marked(page_of: Open, full: Path) -> None:
    page = page_of(full)
    for section, curves, least in (("training", 4, 8), ("machine", 6, 100)):
        paths = page.locator(f"#{section} .wide g[id*=curve-0] path:not(defs path)")
        commands = [len(re.findall("[ML]", d)) for d in paths.evaluate_all("all => all.map(p => p.getAttribute('d'))")]
        assert len(commands) >= curves and max(commands) >= least, (section, commands)
    marks = {
        section: page.locator(f"#{section} .wide g[id*=epoch-4] path").first.evaluate(
            "mark => mark.getBoundingClientRect().x"
        )
        for section in ("training", "machine")
    }
    assert marks["training"] == pytest.approx(marks["machine"], abs=1.0)
    assert page.locator("#training .wide g[id*=epoch-8]").count() > 0


# The rectangles of the words in the settings: one that was broken has two. A word ends at a sign, and may go on behind it.
BROKEN = """() => {
  const broken = [];
  for (const cell of document.querySelectorAll('#settings th, #settings td')) {
    const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode())
      for (const word of node.data.matchAll(/[0-9.]+|[A-Za-z0-9]+/g)) {
        const range = document.createRange();
        range.setStart(node, word.index); range.setEnd(node, word.index + word[0].length);
        if (range.getClientRects().length > 1) broken.push(word[0]);
      }
  }
  return broken;
}"""


@pytest.mark.parametrize("width", [1100, 400])
def test_no_word_of_the_settings_is_broken(page_of: Open, tmp_path: Path, width: int) -> None:
    run = samples.train(samples.a_run(tmp_path, precision="float32", keras="legacy", params={"lr": 0.003}))
    samples.Writer(run).write(0.0, "params", values={"threads.TF_NUM_INTRAOP_THREADS": "1 (cpus-per-task)"})
    hashed = "863d288f405614af5bcea30dde6bf1ebd782f4afdd654648d5a4c78dd33efe01"
    samples.Writer(run).write(0.0, "params", values={"env.lock": hashed})
    page = page_of(report.write(samples.end(run)), width=width)
    assert page.evaluate(BROKEN) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert hashed in page.inner_text("#settings").replace("\n", ""), "it breaks in places, and is copied whole"


def test_the_training_has_an_axis_of_its_own_after_a_long_start_up(page_of: Open, tmp_path: Path) -> None:
    run = samples.a_run(tmp_path)
    writer = samples.Writer(run)
    for epoch in range(1, 9):
        writer.write(59.0 + epoch, "metric", step=epoch, values={"loss": 1 / epoch, "epoch_time_s": 1.0})
    page = page_of(report.write(samples.end(samples.telemetry(run, 70), elapsed_s=70.0)))
    places = "mark => mark.getBoundingClientRect()"
    curve = page.locator("#training .wide g[id*=curve-0] path").first.evaluate(places)
    assert curve["width"] > 0.8 * page.locator("#training .wide svg").bounding_box()["width"]
    shaded = page.locator("#machine .wide g[id*=training] path").first.evaluate(places)
    assert 0.05 < shaded["width"] / page.locator("#machine .wide svg").bounding_box()["width"] < 0.15


def luminance(colour: str) -> float:
    red, green, blue = (int(part) for part in re.findall(r"\d+", colour)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_dark_and_light_change_ground_text_and_curves(page_of: Open, full: Path) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        page = page_of(full, scheme=scheme)
        seen[scheme] = [
            page.locator(selector).first.evaluate(f"element => getComputedStyle(element).{what}")
            for selector, what in (
                ("body", "backgroundColor"),
                ("section", "backgroundColor"),
                ("body", "color"),
                ("#training .wide svg text", "fill"),
                ("#training .wide g[id*=curve-0] path", "stroke"),
            )
        ]
    light, dark = ([luminance(colour) for colour in seen[scheme]] for scheme in ("light", "dark"))
    assert min(light[:2]) > 200 and max(dark[:2]) < 60
    assert light[2] < 80 < 180 < dark[2]
    assert abs(light[3] - light[1]) > 90 and abs(dark[3] - dark[1]) > 90, "the plots' text can be read on their ground"
    assert light[4] < dark[4], "curves are lighter in the dark"


@pytest.mark.parametrize("make", [samples.full, samples.failed, samples.comparison], ids=lambda make: make.__name__)
def test_it_fits_a_narrow_screen(page_of: Open, tmp_path: Path, make: Callable[[Path], RunDir]) -> None:
    page = page_of(report.write(make(tmp_path)), width=400)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    shown = page.locator("svg.plot:visible")
    sizes = shown.evaluate_all(
        "all => all.flatMap(s => [...s.querySelectorAll('text')].map(t => t.getBoundingClientRect().height))"
    )
    assert sizes and min(sizes) >= 7, "labels stay readable"


def test_it_prints(page_of: Open, full: Path) -> None:
    page = page_of(full, scheme="dark")
    page.emulate_media(media="print")
    assert luminance(page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")) > 250
    assert luminance(page.locator("body").evaluate("body => getComputedStyle(body).color")) < 80, (
        "no light ink on paper"
    )
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_a_failed_run_begins_with_its_cause_and_shows_its_log(page_of: Open, tmp_path: Path) -> None:
    page = page_of(report.write(samples.failed(tmp_path)))
    text = page.inner_text("main")
    assert "memory of a GPU was not enough" in page.inner_text("#cause")
    assert "ResourceExhaustedError: OOM when allocating tensor with shape[8192,4096]" in page.inner_text("pre.log")
    assert text.index("Likely cause") < text.index("Last 40 lines") < text.index("Duration")


def test_nothing_of_a_notebook_runs_or_loads(page_of: Open, tmp_path: Path) -> None:
    leave = "http://leaves.invalid"
    inner = f"<script>document.title='ran'</script><image href='{leave}/h.png'/>"
    hostile = [
        {"text/html": f"<script>document.title='ran'</script><img src={leave}/a.png onerror=\"document.title='ran'\">"},
        {
            "text/html": f"<style>@import url({leave}/b.css)</style><div style='background:url({leave}/c.png)'>kept words</div>"
        },
        {
            "text/html": f"<iframe src={leave}/d></iframe><link rel=stylesheet href={leave}/e.css><object data={leave}/f></object>"
        },
        {
            "text/html": "<a href='javascript:document.title=1'>a link</a><svg onload=\"document.title='ran'\"><use href='http://leaves.invalid/g'/></svg>"
        },
        {"application/javascript": "document.title='ran'"},
        {"image/svg+xml": f"<svg xmlns='http://www.w3.org/2000/svg'>{inner}</svg>"},
        {"text/markdown": f"![x]({leave}/i.png) $x^2$"},
        {"text/latex": "$$\\int x$$"},
    ]
    run = samples.end(samples.notebook(samples.a_run(tmp_path), hostile))
    page = page_of(report.write(run))
    assert page.title() == "mnist-mirrored"
    assert "kept words" in page.inner_text(".notebook") and "a link" in page.inner_text(".notebook")
    assert page.locator("[href^='javascript']").count() == 0
    assert page.locator("script, iframe, object, embed").count() == 0


def test_names_and_values_are_text(page_of: Open, tmp_path: Path) -> None:
    evil = "<img src=x onerror=\"document.title='ran'\">"
    run = samples.a_run(tmp_path, params={"note": evil})
    writer = samples.Writer(run)
    writer.write(0.0, "params", values={"host": evil, "git.message": evil})
    writer.write(1.0, "message", level="warning", text=evil)
    writer.write(2.0, "metric", step=1, values={evil: 1.0, "$\\frac{$": 2.0})
    writer.write(3.0, "metric", step=2, values={evil: 1.0, "$\\frac{$": 2.0})
    page = page_of(report.write(samples.end(run, "FAILED", reason=evil)))
    assert page.title() == "mnist-mirrored" and page.locator("img").count() == 0
    assert page.inner_text("main").count(evil) >= 4
