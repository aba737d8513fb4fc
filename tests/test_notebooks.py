"""The notebooks as texts: both forms agree, the variants differ in one section, the README shows the true difference."""

import difflib
import re
from pathlib import Path

import pytest

from hpcml import facts, job

jupytext = pytest.importorskip("jupytext", reason="jupytext: not installed (pip install 'hpcml[notebook]')")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
VARIANTS = {"simple2GPUsOrig": "original", "simple2GPUsSol": "mirrored", "simple2GPUsSol2": "multiworker"}
CELL_ID = re.compile(r' +"id": "[^"]*",\n')  # drawn at random whenever a notebook is written


def cells(name):
    return [
        (cell.cell_type, cell.source, dict(cell.metadata)) for cell in jupytext.read(NOTEBOOKS / f"{name}.py").cells
    ]


def changed_lines(old, new):
    """Return the removed and added lines of two texts."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm="")
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def readme_diff(old, new):
    """Return the diff block that the README must show for two variants."""
    a, b = ((NOTEBOOKS / f"{name}.py").read_text().splitlines() for name in (old, new))
    return "\n".join(["```diff", *difflib.unified_diff(a, b, f"{old}.py", f"{new}.py", n=0, lineterm=""), "```"])


def test_every_script_has_its_notebook_and_every_notebook_its_script():
    assert {p.stem for p in NOTEBOOKS.glob("*.py")} == {p.stem for p in NOTEBOOKS.glob("*.ipynb")} >= set(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_notebook_is_what_its_script_gives(name):
    expected = jupytext.writes(jupytext.read(NOTEBOOKS / f"{name}.py"), fmt="ipynb").rstrip("\n")
    actual = (NOTEBOOKS / f"{name}.ipynb").read_text().rstrip("\n")
    fix = f"after a change in the script: jupytext --to ipynb notebooks/{name}.py"
    assert CELL_ID.sub("", actual) == CELL_ID.sub("", expected), fix


@pytest.mark.parametrize("name", list(VARIANTS)[1:])
def test_the_variants_differ_in_title_and_strategy_alone(name):
    original, other = cells("simple2GPUsOrig"), cells(name)
    assert len(original) == len(other)
    differ = [index for index, pair in enumerate(zip(original, other, strict=True)) if pair[0] != pair[1]]
    title, text, code = differ
    assert (title, code) == (0, text + 1)
    assert original[text][1].startswith("## Strategy")
    for line in changed_lines(original[title][1], other[title][1]):
        assert line[1:].startswith(("# MNIST on two GPUs, ", "    ipython ", "    hpcml run ", "    sbatch ")), line
    assert [re.sub(r"(\(.*\)).*", r"\1", line) for line in changed_lines(original[code][1], other[code][1])] == [
        '-run = hpcml.begin(strategy="original")',
        f'+run = hpcml.begin(strategy="{VARIANTS[name]}")',
        "-strategy = tf.distribute.get_strategy()",
        f"+strategy = tf.distribute.{'MirroredStrategy' if name == 'simple2GPUsSol' else 'MultiWorkerMirroredStrategy'}()",
    ]


def test_the_readme_shows_the_true_differences():
    readme = (NOTEBOOKS / "README.md").read_text()
    names = list(VARIANTS)
    expected = [readme_diff(names[0], names[1]), readme_diff(names[1], names[2])]
    assert re.findall(r"```diff\n.*?\n```", readme, re.DOTALL) == expected, "paste into the README:\n" + "\n".join(
        expected
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_a_notebook_neither_installs_nor_edits_paths(name):
    code = "\n".join(source for kind, source, _ in cells(name) if kind == "code")
    assert not re.search(r"^\s*[!%]|pip install|sys\.path|os\.environ", code, re.MULTILINE)


@pytest.mark.parametrize(("name", "strategy"), VARIANTS.items())
def test_the_job_runs_its_notebook_with_the_notebooks_own_values(name, strategy):
    read = job.load(ROOT / "jobs" / f"mnist_{strategy}.toml")
    assert (read.target, read.strategy) == ((f"notebooks/{name}.ipynb",), strategy)
    assert read.params == facts.declared_parameters(NOTEBOOKS / f"{name}.ipynb").defaults


def test_the_jobs_have_equal_resources_but_for_the_tasks():
    read = [job.load(ROOT / "jobs" / f"mnist_{strategy}.toml") for strategy in VARIANTS.values()]
    asked = [one.resources for one in read]
    assert {r.nodes * r.tasks_per_node * r.cpus_per_task for r in asked} == {64}
    assert len({(r.nodes, r.gpus_per_node, r.mem_gb, r.time) for r in asked}) == 1
    assert len({(one.keras, one.precision, one.experiment) for one in read}) == 1
