"""``hpcml tune`` through the real command line: real trials of a job that makes its speed up, so that they are short."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hpcml import job, plan, rundir, site
from hpcml.cli.root import run as hpcml
from hpcml.errors import HpcmlError
from hpcml.facts import Facts
from hpcml.job import Tuning
from hpcml.tracking import journal

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
WORK = """\
# %% tags=["parameters"]
epochs = 3
global_batch = 64
pause = 0.0
# %%
import os, sys, time
import hpcml

run = hpcml.begin()
tuned = run.tuned(prefetch=1, steps_per_execution=1, jit_compile=None)
print("heard", tuned, os.environ["OMP_NUM_THREADS"])
# %%
if tuned["steps_per_execution"] > 4:
    raise MemoryError("no room for so many steps")
speed = {1: 1000.0, 2: 1500.0, 4: 1600.0, -1: 1200.0}[tuned["prefetch"]]
if global_batch > 128:
    speed *= 3
if tuned["jit_compile"]:
    speed *= 0.5
for epoch in range(1, epochs + 1):
    time.sleep(pause)
    run.log(step=epoch, samples_per_s=speed if epoch > 1 else 1.0, epoch_time_s=3.0, step_time_ms=100.0)
"""
JOB = """\
# My job.
script = "work.py"

[params]
epochs = 3   # passes
"""
ONLY = ["--only", "prefetch,steps_per_execution,jit_compile"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    for name, text in {"pyproject.toml": "", "work.py": WORK, "job.toml": JOB}.items():
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HPCML_SITE", "local")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # a job would deliver there by itself
    return folder


def told(folder: Path) -> dict[str, Any]:
    return json.loads(next((folder / "runs" / "tune").glob("*/tune.json")).read_text())


def test_the_winner_is_found_confirmed_and_written(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert hpcml(["tune", "job.toml", *ONLY, "--budget", "5"]) == 0
    said = capfd.readouterr()
    written = tomllib.loads((project / "job.toml").read_text())
    assert written == {"script": "work.py", "params": {"epochs": 3}, "tuning": {"prefetch": 4}}
    text = (project / "job.toml").read_text()
    assert text.startswith("# My job.\n") and "epochs = 3   # passes" in text
    assert "[tuning] # hpcml tune, 20" in text and "1.60 × as fast, 1,000 → 1,600 samples/s" in text
    assert "MemoryError" in said.err and "no room for so many steps" in said.err and "0.50 ×" in said.err
    assert "What mattered" in said.out and "written   job.toml: prefetch 4; 1.60 × as fast" in said.out
    found = told(project)
    assert found["confirmed"] and found["gain"] == pytest.approx(1.6) and not found["interrupted"]
    bad = [trial for trial in found["trials"] if trial["speed"] is None]
    assert bad and all(trial["point"]["steps_per_execution"] > 4 for trial in bad)
    assert next((project / "runs" / "tune").glob("*/tune.png")).read_bytes().startswith(b"\x89PNG")
    # Their runs are no runs among the others, keep no copies, and went to nobody.
    root = project / "runs"
    assert (
        list(rundir.every(root)) == []
        and not list(root.glob("tune/*/**/code"))
        and not list(root.rglob("delivered.json"))
    )
    assert not list(root.rglob("delivery.txt"))
    # The job as it is now has what was found, and a second tuning starts from there.
    assert hpcml(["run", "job.toml", "-p", "epochs=2"]) in (0, 3)
    assert "'prefetch': 4" in next(root.glob("2*/logs/out.0.txt")).read_text()


def test_no_write_and_json(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert hpcml(["tune", "job.toml", "--only", "prefetch", "--no-write", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["changes"] == {"prefetch": 4} and found["written"] is None and found["confirmed"]
    assert (project / "job.toml").read_text() == JOB


def test_a_user_s_variable_is_not_searched_and_named(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert hpcml(["tune", "job.toml", "--only", "prefetch,omp_threads,data_threads", "--no-write"]) == 0
    said = capfd.readouterr().out
    assert "omp_threads stays as it is: OMP_NUM_THREADS is set" in said
    assert "never asks for them: run.tuned(data_threads=…)" in said


def test_the_batch_is_tuned_where_it_is_asked_for(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert hpcml(["tune", "job.toml", "--only", "prefetch", "--batch"]) == 0
    written = tomllib.loads((project / "job.toml").read_text())
    assert written["params"]["global_batch"] in (256, 512) and written["tuning"] == {"prefetch": 4}
    assert "global_batch changes what is learned" in capfd.readouterr().out


def test_epochs_that_are_too_long_for_the_budget_are_told(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hpcml(["tune", "job.toml", "--budget", "0:02", "-p", "pause=60"]) == 2
    said = capsys.readouterr().err
    assert "--budget: the job as it is has no second epoch within 2 s" in said and "less data for the trials" in said


def test_ctrl_c_keeps_what_was_measured_and_leaves_the_job(project: Path) -> None:
    words = [sys.executable, "-m", "hpcml", "tune", "job.toml", *ONLY, "-p", "pause=0.2"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    assert child.stderr is not None
    lines = []
    for line in child.stderr:  # the second trial is going on once the first is told
        lines.append(line)
        if "samples/s" in line:
            break
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 130, "".join(lines)
    assert "interrupted   job.toml is as it was" in out and (project / "job.toml").read_text() == JOB
    found = told(project)
    assert found["interrupted"] and [t["speed"] for t in found["trials"]][:1] == [1000.0]
    assert not list(project.glob("runs/tune/*/code"))


def test_trials_end_with_the_tuner_even_if_it_is_killed(project: Path) -> None:
    words = [sys.executable, "-m", "hpcml", "tune", "job.toml", *ONLY, "-p", "pause=600"]
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (logs := [p for p in project.glob("runs/tune/*/01/logs/out.0.txt") if "heard" in p.read_text()]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run = logs[0].parent.parent
    owner = rundir.read_json(run / "owner.json")["pid"]
    child.kill()
    child.wait()
    while Path(f"/proc/{owner}").exists():  # the launcher of the trial, which waits for its ranks
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert rundir.read_json(run / "status.json")["state"] == "CANCELLED"


@pytest.mark.parametrize(
    ("files", "words", "says"),
    [
        ({}, ["--only", "prefech"], ("--only: no setting 'prefech'", "did you mean 'prefetch'?", "allowed: intra_op")),
        ({}, ["--only", "global_batch"], ("the batch is tuned only", "--batch")),
        ({"work.py": WORK.replace("global_batch = 64\n", "")}, ["--batch"], ("--batch: the job has no parameter global_batch",)),
        ({"work.py": "print('no run')\n"}, [], ("job.toml: script: work.py never calls hpcml.begin()", "run.callbacks()")),
        ({"job.toml": 'command = ["sleep", "5"]\n'}, [], ("sleep 5 never calls hpcml.begin()",)),
        ({}, ["--budget", "soon"], ("--budget: 'soon' is no time", '"10" (minutes)')),
        ({"job.toml": JOB + "[tuning]\nprefetc = 1\n"}, [], ("unknown key 'tuning.prefetc'", "did you mean 'prefetch'?")),
        ({"job.toml": JOB + "[tuning]\njit_compile = 1\n"}, [], ("tuning.jit_compile = 1 is neither true nor false",)),
        ({"job.toml": JOB + "[tuning]\nprefetch = -2\n"}, [], ("tuning.prefetch = -2", "from -1")),
        ({"job.toml": JOB + '[tuning]\ngpu_thread_mode = "privat"\n'}, [], ("gpu_thread_mode = 'privat'", "gpu_private")),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_before_anything_starts(
    project: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str], words: list[str], says: tuple[str, ...]
) -> None:
    for name, text in files.items():
        (project / name).write_text(text)
    before = (project / "job.toml").read_text()
    assert hpcml(["tune", "job.toml", *words]) == 2
    said = capsys.readouterr().err
    for phrase in says:
        assert phrase in said
    assert not (project / "runs").exists() and (project / "job.toml").read_text() == before


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ("raise ValueError('no data')", 1, "the job as it is can't be measured: ValueError: no data"),
        ("pass", 2, "without telling the speed of an epoch"),
        ("run.log(step=1, samples_per_s=5.0)", 2, "trains one epoch, and the first builds the graph"),
    ],
)
def test_a_job_that_tells_no_speed_ends_it_with_a_word(
    project: Path, capsys: pytest.CaptureFixture[str], body: str, code: int, says: str
) -> None:
    (project / "work.py").write_text(f"import hpcml\nrun = hpcml.begin()\n{body}\n")
    (project / "job.toml").write_text('script = "work.py"\n')
    assert hpcml(["tune", "job.toml"]) == code
    assert says in capsys.readouterr().err


def test_an_unknown_setting_in_the_work_is_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "work.py").write_text("import hpcml\nhpcml.begin().tuned(prefech=1)\n")
    (project / "job.toml").write_text('script = "work.py"\n')
    assert hpcml(["tune", "job.toml"]) == 1
    said = capsys.readouterr().err
    assert "no setting 'prefech'" in said


# ------------------------------------------------------------------ [tuning] in a plan


def resolved(folder: Path, text: str, where: str, cores: int | None = None) -> plan.Plan:
    (folder / "job.toml").write_text(text)
    wanted = job.load(folder / "job.toml")
    return plan.resolve(wanted, site.load(where), Facts(cores=cores))


def test_a_job_tuned_elsewhere_is_capped_here_and_refused_on_a_cluster(project: Path) -> None:
    text = 'script = "work.py"\n[resources]\ncpus_per_task = 8\n[tuning]\nintra_op_threads = 16\nprefetch = 99\n'
    here = resolved(project, text, "local", cores=4)
    assert here.tuning == Tuning(intra_op_threads=4, prefetch=99)
    assert any("intra op threads: 4 instead of 16" in note for note in here.notes)
    assert plan.from_json(json.loads(json.dumps(here.to_json()))) == here
    with pytest.raises(
        HpcmlError,
        match=r"job.toml: tuning.intra_op_threads: .* = 16: more runnable threads than a task has cores",
    ):
        resolved(project, text, "generic")


def test_a_job_s_threads_fit_together(project: Path) -> None:
    text = 'script = "work.py"\n[resources]\ncpus_per_task = 8\n[tuning]\nintra_op_threads = 6\ndata_threads = 4\n'
    assert resolved(project, text, "local", cores=8).tuning == Tuning(intra_op_threads=4, data_threads=4)
    assert resolved(project, text, "local", cores=1).tuning == Tuning(intra_op_threads=1, data_threads=0)
    with pytest.raises(HpcmlError, match=r"at most 4 \(resources.cpus_per_task = 8, beside 4 data_threads\)"):
        resolved(project, text, "generic")


def test_a_plan_of_before_tuning_is_read(project: Path) -> None:
    old = resolved(project, 'script = "work.py"\n', "local", cores=4).to_json()
    del old["tuning"]
    assert plan.from_json(json.loads(json.dumps(old))).tuning == Tuning()


# ------------------------------------------------------------------ settings in a real training

SEEN = """
# %%
print("seen", int(model._steps_per_execution), model.jit_compile, train.options().threading.private_threadpool_size)
print("ahead", train._input_dataset._buffer_size.numpy())
print("threads", tf.config.threading.get_intra_op_parallelism_threads(), os.environ["TF_NUM_INTRAOP_THREADS"])
run.finish()
"""


@pytest.mark.skipif(find_spec("tensorflow") is None, reason="TensorFlow: not installed (scripts/setup)")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="cores: threads for the input alone need a second one")
def test_a_job_s_settings_reach_tensorflow_through_the_notebook(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCML_DEVICES", "cpu")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    text = (NOTEBOOKS / "simple2GPUsOrig.py").read_text().partition("# %% [markdown]\n# ## Result\n")[0]
    (project / "work.py").write_text(f"import os\n{text}{SEEN}")
    settings = "intra_op_threads = 1\ndata_threads = 1\nprefetch = 3\nsteps_per_execution = 5\njit_compile = false\n"
    (project / "job.toml").write_text(
        f'script = "work.py"\nstrategy = "original"\n[resources]\ncpus_per_task = 2\n[tuning]\n{settings}'
    )
    assert hpcml(["run", "job.toml", "-p", "epochs=2"]) == 0
    log = next(project.glob("runs/2*/logs/out.0.txt")).read_text()
    assert "seen 5 False 1\n" in log and "ahead 3\n" in log and "threads 0 1\n" in log
    found = journal.read(next(project.glob("runs/2*/events")), kinds={"params"})
    values = {name: value for record in found for name, value in record["values"].items()}
    assert values["tuned.prefetch"] == 3 and values["tuned.jit_compile"] is False
    assert values["threads.TF_NUM_INTRAOP_THREADS"] == "1 (tuning)"
