"""A delivered run in MLflow's own pages: what a person finds there, in a real browser."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import report_samples as samples
from mlflow_server import serving

from hpcml import report
from hpcml.rundir import RunDir
from hpcml.tracking.mlflow import Delivery, deliver

mlflow = pytest.importorskip("mlflow", reason="needs the extra `mlflow`")
playwright = pytest.importorskip("playwright.sync_api", reason="Chromium: needs playwright, pip install 'hpcml[test]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium: not installed, apt-get install chromium")

EPOCHS, SECONDS = 6, 40
PATIENCE_MS = 90_000  # on two cores that are busy with other tests a chart takes half a minute
LOOPBACK = re.compile(r"(https?://127\.0\.0\.1[:/]|data:|blob:)")
# What MLflow 3.17's pages say of themselves, whatever the run: a server without accounts answers 404, charts are resized.
ITS_OWN = ("Failed to load resource: the server responded with a status of 404", "ResizeObserver loop")
# All of a page is on the screen: MLflow draws a chart when it is scrolled to.
SCREEN = {"width": 1500, "height": 3000}

Pages = tuple[Any, RunDir, Delivery]


def two_ranks(root: Path) -> RunDir:
    """A run of everything: metrics of two ranks, telemetry, a profile, a notebook, a log and a report."""
    run = samples.train(samples.train(samples.a_run(root), EPOCHS), EPOCHS, rank=1)
    samples.profile(samples.telemetry(run, SECONDS))
    samples.submitted(samples.notebook(samples.log(run, ["epoch 6/6", "a last word"])))
    report.write(samples.end(run))
    return run


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        yield server.uri


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    """A browser that reaches the loopback only; what it wanted elsewhere is told, and is MLflow's affair."""
    outside: set[str] = set()

    def guard(route: Any) -> None:
        if LOOPBACK.match(route.request.url):
            route.continue_()
        else:
            outside.add(route.request.url)
            route.abort()

    with playwright.sync_playwright() as started:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to run as root with it
        browser = started.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        opened = browser.new_context(viewport=SCREEN)
        opened.route("**/*", guard)
        yield opened
        browser.close()
    print(f"MLflow's pages asked outside for: {sorted(outside) or 'nothing'}")


@pytest.fixture(scope="module")
def pages(uri: str, context: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    """A page of MLflow, turned from generative AI to model training as a person does, and what was delivered there."""
    run = two_ranks(tmp_path_factory.mktemp("runs"))
    sent = deliver(run, uri)
    complaints: list[str] = []
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(uri)
    page.get_by_text("Model training", exact=True).click()
    yield page, run, sent
    assert [text for text in complaints if not any(known in text for known in ITS_OWN)] == []


def run_name(sent: Delivery) -> str:
    """The name that MLflow has of a run."""
    return str(mlflow.MlflowClient(sent.uri).get_run(sent.run_id).info.run_name)


def open_tab(pages: Pages, uri: str, name: str) -> Any:
    """Open the run's page at one of its tabs."""
    page, _, sent = pages
    page.goto(f"{uri}/#/experiments/1/runs/{sent.run_id}")
    page.get_by_role("heading", name=run_name(sent)).wait_for()
    page.get_by_role("tab", name=name).click()
    return page


def chart(page: Any, name: str) -> Any:
    """The chart of a metric."""
    return page.get_by_test_id("experiment-view-compare-runs-card").filter(has=page.locator(f'h4[title="{name}"]'))


def test_the_run_is_in_the_list_of_its_experiment(pages: Pages, uri: str) -> None:
    page, _, sent = pages
    name = run_name(sent)
    assert "mnist-mirrored" in name
    page.goto(f"{uri}/#/experiments")
    page.get_by_role("link", name=sent.experiment, exact=True).click()
    page.get_by_role("link", name=name).click()
    page.get_by_role("heading", name=name).wait_for()
    assert f"/runs/{sent.run_id}" in page.url


def test_the_overview_tells_what_ran_where_and_how_it_ended(pages: Pages, uri: str) -> None:
    page = open_tab(pages, uri, "Overview")
    page.get_by_text("rank_1/val_accuracy", exact=True).wait_for()

    def beside(key: str) -> str:
        return str(page.get_by_test_id(f"key-value-{key}").inner_text())

    assert "Finished" in beside("Status") and "10.0min" in beside("Duration") and "train.ipynb" in beside("Source")
    tags = dict(re.findall(r"^(.+)\n: (.+)$", page.inner_text("body"), re.MULTILINE))
    expected = {"Training device": "2 × NVIDIA H100", "Phase": "train", "strategy": "mirrored", "slurm_job_id": "4711"}
    assert tags.items() >= expected.items(), tags
    assert any(name.startswith("origin.resources.") for name in tags), tags
    rows = [row.split("\n") for row in page.get_by_role("row").all_inner_texts()]
    shown = {row[0].strip(): row[-1].strip() for row in rows}
    params = {"epochs": "3", "global_batch": "256", "resources.mem_gb": "64", "precision": "float32", "host": "gpu07"}
    assert shown.items() >= params.items(), shown
    assert shown["profile/input_ms"] == "3.1" and shown["system/memory/peak_mib"].startswith("3")
    for name in ("loss", "accuracy", "val_accuracy"):
        assert shown[name] == shown[f"rank_1/{name}"]


def test_model_metrics_are_charts_with_a_point_for_each_epoch(pages: Pages, uri: str) -> None:
    page = open_tab(pages, uri, "Model metrics")
    for name in ("loss", "val_accuracy", "rank_1/loss", "rank_1/val_accuracy"):
        drawn = chart(page, name).locator(".trace.scatter path.point")
        drawn.nth(EPOCHS - 1).wait_for(state="attached")
        heights = drawn.evaluate_all("all => all.map(point => point.getBoundingClientRect().y)")
        assert len(heights) == EPOCHS and len(set(heights)) > EPOCHS / 2, (name, heights)
    assert chart(page, "system/cpu/cores").count() == 0


def test_telemetry_has_a_page_of_its_own(pages: Pages, uri: str) -> None:
    page = open_tab(pages, uri, "System metrics")
    for name in ("system/gpu0/power_w", "system/gpu1/power_w", "system/cpu/cores"):
        line = chart(page, name).locator(".trace.scatter path.js-line").first
        line.wait_for(state="attached")
        assert line.get_attribute("d").count(",") > SECONDS / 2, f"{name}: straight pieces are drawn as one"
    assert chart(page, "system/memory/used_mib").count() == 1
    assert chart(page, "loss").count() == 0


def test_artifacts_can_be_looked_at(pages: Pages, uri: str) -> None:
    page = open_tab(pages, uri, "Artifacts")
    page.get_by_text("report.html", exact=True).click()
    page.frame_locator("iframe").get_by_text("asked 64 GiB, peak").first.wait_for()
    listed = page.inner_text("body")
    assert [
        name for name in ("notebook.ipynb", "plan.json", "status.json", "logs", "plots") if name not in listed
    ] == []
    reads: dict[str, Callable[[], Any]] = {
        "plan.json": lambda: page.get_by_text('"resources.mem_gb": "jobs/mnist.toml"').first,
        "notebook.ipynb": lambda: page.get_by_text("MNIST on two GPUs").first,
    }
    for name, found in reads.items():
        page.get_by_text(name, exact=True).first.click()
        found().wait_for()
    page.get_by_text("logs", exact=True).click()
    page.get_by_text("out.0.txt", exact=True).click()
    page.get_by_text("a last word").first.wait_for()


def test_variants_stand_below_their_comparison(pages: Pages, uri: str, tmp_path: Path) -> None:
    page, *_ = pages
    parent = samples.comparison(tmp_path)
    variants = [deliver(parent.child(name), uri) for name in ("original", "mirrored", "multiworker")]
    whole = deliver(parent, uri)
    page.goto(f"{uri}/#/experiments/1/runs")

    def link(sent: Delivery) -> Any:
        return page.locator(f"a[href='#/experiments/1/runs/{sent.run_id}']")

    link(whole).wait_for()
    assert [link(sent).count() for sent in variants] == [0, 0, 0], "folded up"
    page.get_by_role("gridcell").filter(has=link(whole)).get_by_role("button").click()
    for sent in variants:
        link(sent).wait_for()
        assert link(sent).inner_text() == run_name(sent)
        assert link(sent).bounding_box()["y"] > link(whole).bounding_box()["y"], "below it"
