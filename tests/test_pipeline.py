"""Chains of steps: what a file says, what it must not, how the steps run here, and when a model is registered."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcml import pipeline, queue, rundir, steps
from hpcml.cli import root
from hpcml.errors import HpcmlError, ServiceSilent
from hpcml.pipeline import actions
from hpcml.rundir import RunDir

ROOT = Path(__file__).parent.parent
SCRIPT = '# %% tags=["parameters"]\nepochs = 5\nlr = 0.1\n# %%\nimport pathlib\nprint("epochs", epochs)\n'
# What a step does when it is told to fail: the test makes and removes the file.
FAILS_IF = "import os, sys; print('working'); sys.exit('no luck' if os.path.exists('{flag}') else 0)"


class Desk:
    """A project, and hpcml as a person types it there."""

    def __init__(self, project: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.project, self._capfd = project, capfd
        self.flag = project.parent / "fail"

    def chain(self, text: str, name: str = "c") -> Path:
        path = self.project / "jobs" / f"{name}.toml"
        path.write_text(text)
        return path

    def type(self, *words: str, rc: int = 0) -> tuple[str, str]:
        self._capfd.readouterr()
        code = root.run(words)
        out, err = self._capfd.readouterr()
        assert code == rc, f"hpcml {' '.join(words)}: {code}\n{out}\n{err}"
        return out, err

    @property
    def runs(self) -> list[RunDir]:
        """The chains' run directories, the newest first."""
        return [run for run in rundir.every(self.project / "runs") if "/" not in run.id]

    def states(self, run: RunDir | None = None) -> dict[str, str]:
        told = queue.states_of(queue.children(run or self.runs[0]))[0]
        return {state.run_id.rpartition("/")[2]: state.name for state in told}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Desk:
    project = tmp_path / "project"
    (project / "jobs").mkdir(parents=True)
    (project / "pyproject.toml").touch()
    (project / "train.py").write_text(SCRIPT)
    monkeypatch.chdir(project)
    monkeypatch.setenv("HPCML_SITE", "local")
    monkeypatch.setenv("HPCML_RUNS", str(project / "runs"))
    monkeypatch.setenv("HPCML_RESUMED", "0")  # so that what a command sets in this process is undone
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("hpcml.cli.show.deliver", lambda run, **_: "")  # delivery has tests of its own
    monkeypatch.setattr("hpcml.tracking.follow.start", lambda *_: None)
    return Desk(project, capfd)


def command(code: str) -> str:
    return f"command = {json.dumps([sys.executable, '-c', code])}"


def three(flag: Path) -> str:
    """prepare, train, which fails while the flag is there, and evaluate, which looks at both."""
    look = "import json, os; print(json.dumps({k: os.listdir(v) for k, v in json.loads(os.environ['HPCML_STEPS']).items()}))"
    return f"""
[[steps]]
name = "prepare"
{command("import os, pathlib; pathlib.Path(os.environ['HPCML_RUNS'], os.environ['HPCML_RUN'], 'made').touch()")}
[[steps]]
name = "train"
{command(FAILS_IF.format(flag=flag))}
[[steps]]
name = "evaluate"
{command(look)}
"""


# ------------------------------------------------------------------ what a file says


GOOD = f"""
[params]
epochs = 3
[resources]
time = "00:05:00"
[[steps]]
name = "fetch"
action = "fetch"
[[steps]]
name = "prepare"
{command("pass")}
[[steps]]
name = "train"
script = "train.py"
[steps.resources]
cpus_per_task = 2
[[steps]]
name = "evaluate"
{command("pass")}
[[steps]]
name = "register"
action = "register"
[[steps]]
name = "report"
action = "report"
"""


def test_a_file_says_what_each_step_does_and_waits_for(desk: Desk) -> None:
    chain = pipeline.load(desk.chain(GOOD))
    assert [step.name for step in chain] == ["fetch", "prepare", "train", "evaluate", "register", "report"]
    assert [step.needs for step in chain] == [(), ("fetch",), ("prepare",), ("train",), ("evaluate",), ("register",)]
    train, register = chain.step("train"), chain.step("register").registration
    assert (train.job.resources.time, train.job.resources.cpus_per_task) == ("00:05:00", 2)
    assert train.job.params == {"epochs": 3} and chain.step("prepare").job.params == {}  # who declares it gets it
    assert train.job.name == "c-train"
    assert register is not None
    assert (register.model, register.trained_by, register.evaluated_by) == ("c", "train", "evaluate")
    assert chain.before(["evaluate"]) == {"fetch", "prepare", "train"}
    assert chain.after("evaluate") == {"register", "report"}


def test_a_step_may_be_a_job_file_under_its_own_keys(desk: Desk) -> None:
    desk.chain('script = "train.py"\nname = "x"\n[params]\nlr = 0.5\n[resources]\nmem_gb = 2\ntime = "7"', "train")
    text = '[resources]\nmem_gb = 1\nnodes = 2\n[[steps]]\nname = "a"\njob = "train.toml"\nparams = {epochs = 1}\n'
    job = pipeline.load(desk.chain(text)).step("a").job
    assert (job.resources.nodes, job.resources.mem_gb, job.resources.time) == (2, 2, "7")
    assert job.params == {"lr": 0.5, "epochs": 1} and job.name == "c-a"


def test_what_is_typed_is_for_all_steps_that_know_it_or_for_one(desk: Desk) -> None:
    path = desk.chain(GOOD)
    chain = pipeline.load(
        path, {"epochs": "9", "train.lr": "1"}, {"resources.mem_gb": "3", "train.resources.nodes": "2"}
    )
    train = chain.step("train").job
    assert train.params == {"epochs": 9, "lr": 1} and train.typed == {"lr": "1"}
    assert {step.name: step.job.resources.nodes for step in chain if not step.action} == {
        "prepare": 1,
        "train": 2,
        "evaluate": 1,
    }
    assert {step.job.resources.mem_gb for step in chain if not step.action} == {3}


def test_steps_run_in_the_order_of_their_needs(desk: Desk) -> None:
    text = "".join(f'[[steps]]\nname = "{n}"\nneeds = {json.dumps(needs)}\n{command("pass")}\n' for n, needs in
                   {"d": ["b", "c"], "b": ["a"], "c": ["a"], "a": []}.items())  # fmt: skip
    assert [step.name for step in pipeline.load(desk.chain(text))] == ["a", "b", "c", "d"]


STEP = f'[[steps]]\nname = "a"\n{command("pass")}\n'
BAD: list[tuple[str, str]] = [
    ("steps = []", "steps is empty"),
    ("steps = 3", "steps is no list of tables"),
    ('[[steps]]\ncommand = ["true"]', "a step has no name"),
    ('[[steps]]\nname = "a/b"\ncommand = ["true"]', "'a/b' is not a step's name"),
    ('[[steps]]\nname = "logs"\ncommand = ["true"]', "'logs' means something else in every run"),
    ('[[steps]]\nname = "data"\ncommand = ["true"]', "'data' means something else"),
    (STEP + STEP, "two steps are named 'a'"),
    ('[[steps]]\nname = "a"', "step 'a' does nothing"),
    ('[[steps]]\nname = "fetch"', 'fix: action = "fetch"'),
    (f'{STEP}script = "x.py"', "has both script and command"),
    ('[[steps]]\nname = "a"\naction = "fetsh"', "did you mean 'fetch'?"),
    (f"{STEP}comand = 1", "unknown key 'comand'"),
    (f"{STEP}[steps.resources]\nnode = 2", "did you mean 'nodes'?"),
    ('[[steps]]\nname = "a"\naction = "fetch"\nmetric = "x"', "unknown key 'metric'"),
    (f'{STEP}needs = ["b"]', "no step 'b'"),
    (f'{STEP}needs = "b"', "no list of steps"),
    (f'{STEP}needs = ["a"]', "the steps wait for one another: a → a"),
    (f'{STEP}needs = ["b"]\n[[steps]]\nname = "b"\ncommand = ["true"]', "a → b → a"),
    (f'{STEP}[[steps]]\nname = "f"\naction = "fetch"\nneeds = ["a"]', "before anything is queued"),
    (f'{STEP}[[steps]]\nname = "r"\naction = "report"\n[[steps]]\nname = "b"\ncommand = ["true"]', "step 'b' waits for 'r'"),
    (f'{STEP}[[steps]]\nname = "r"\naction = "register"', "does not say which step saved the model"),
    ('[[steps]]\nname = "r"\naction = "register"', "does not say which step wrote artifacts/evaluation.json"),
    (f'{STEP}[[steps]]\nname = "r"\naction = "register"\ntrained_by = "x"', "trained_by = 'x' is no step that works"),
    (f'{STEP}[[steps]]\nname = "r"\naction = "register"\nbetter = "more"', "better = 'more' is not known"),
    (f'{STEP}[[steps]]\nname = "r"\naction = "register"\nmetric = 3', "metric = 3 is not text"),
    (f'script = "train.py"\n{STEP}', "script stands beside [[steps]]"),
    (f"[params]\nepoch = 3\n{STEP}", "no step has a parameter 'epoch'"),
    ('[[steps]]\nname = "a"\njob = "none.toml"', "no job file at"),
    ('[[steps]]\nname = "a"\njob = "c.toml"', "c.toml is a chain itself"),
    ('[[steps]]\nname = "a"\njob = 3', "job = 3 is no path"),
    ('[[steps]]\nname = "a"\nscript = "none.py"', "no script at"),
    (f"[resources]\nnodes = 0\n{STEP}", "resources.nodes = 0"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), BAD, ids=[words for _, words in BAD])
def test_what_is_wrong_is_told_before_anything_is_made(desk: Desk, text: str, words: str) -> None:
    desk.chain(text)
    _, err = desk.type("run", "jobs/c.toml", rc=2)
    assert words in err and "internal error" not in err
    assert not (desk.project / "runs").exists()


def test_all_that_is_wrong_is_told_at_once(desk: Desk) -> None:
    bad = f'{STEP}needs = ["x"]\n[[steps]]\nname = "b"\n{command("pass")}\n[steps.resources]\nnodes = -1\ngpu = 1\n'
    desk.chain(bad)
    _, err = desk.type("check", "jobs/c.toml", "-p", "lr=1", "--set", "b.env.nam=x", rc=2)
    for words in (
        "no step 'x'",
        "resources.nodes = -1",
        "unknown key 'resources.gpu'",
        "'env.nam'",
        "a parameter 'lr'",
    ):
        assert words in err


def test_over_asks_of_all_steps_are_told_at_once(desk: Desk) -> None:
    desk.chain(GOOD)
    settings = ["--set", "prepare.resources.mem_gb=999", "--set", "train.resources.gpus_per_node=9"]
    _, err = desk.type("check", "jobs/c.toml", "--site", "ft3", *settings, rc=2)
    assert "999 GiB" in err and "9 GPUs a node" in err


def test_other_files_are_no_chains(desk: Desk) -> None:
    desk.chain('script = "train.py"')
    _, err = desk.type("run", "jobs/c.toml", "--step", "train", rc=2)
    assert "jobs/c.toml has no steps" in err


# ------------------------------------------------------------------ here, one after the other


def test_steps_run_one_after_the_other_and_find_each_other(desk: Desk) -> None:
    desk.chain(three(desk.flag))
    out, _ = desk.type("run", "jobs/c.toml")
    assert [line for line in out.splitlines() if line.startswith("[")] == [
        "[1/3] prepare",
        "[2/3] train",
        "[3/3] evaluate",
    ]
    (run,) = desk.runs
    assert desk.states() == {"prepare": "COMPLETED", "train": "COMPLETED", "evaluate": "COMPLETED"}
    seen = json.loads(run.child("evaluate").log(0).read_text().splitlines()[-1])
    assert set(seen) == {"prepare", "train"} and "made" in seen["prepare"]
    assert queue.state_of(run).name == "COMPLETED"
    assert json.loads(desk.type("status", "--json")[0])["steps"][1]["run_id"] == f"{run.id}/train"
    assert "working" in desk.type("logs", run.id)[0]


def test_a_step_that_fails_ends_the_chain_and_resume_goes_on_there(desk: Desk) -> None:
    desk.chain(three(desk.flag))
    desk.flag.touch()
    out, _ = desk.type("run", "jobs/c.toml", rc=1)
    (run,) = desk.runs
    assert re.search(r"reason +step train: .*no luck", out)
    assert re.search(r"evaluate +CANCELLED +never started: train is FAILED", out)
    assert desk.states() == {"prepare": "COMPLETED", "train": "FAILED", "evaluate": "CANCELLED"}
    assert not run.child("evaluate").log(0).exists()
    prepared = run.child("prepare").status.read_bytes()
    desk.flag.unlink()
    out, _ = desk.type("resume", f"{run.id}/train")  # a step stands for its chain
    assert "[1/3]" not in out and desk.states() == dict.fromkeys(["prepare", "train", "evaluate"], "COMPLETED")
    assert run.child("prepare").status.read_bytes() == prepared and len(desk.runs) == 1
    assert "nothing to go on with" in desk.type("resume", rc=2)[1]


def test_one_step_alone_builds_on_the_newest_run_that_has_the_others(desk: Desk) -> None:
    desk.chain(three(desk.flag))
    assert "have not completed in any run" in desk.type("run", "jobs/c.toml", "--step", "evaluate", rc=2)[1]
    desk.type("run", "jobs/c.toml")
    first = desk.runs[0]
    desk.flag.touch()
    desk.type("run", "jobs/c.toml", rc=1)
    out, _ = desk.type("run", "jobs/c.toml", "--from", "evaluate")
    assert f"train is that of {first.id}" in out  # the newest whole one, not the one that failed
    assert desk.states() == {"evaluate": "COMPLETED"}
    assert (
        str(first.path / "train") in rundir.read_json(desk.runs[0].child("evaluate").plan)["env"]["vars"]["HPCML_STEPS"]
    )
    desk.flag.unlink()
    desk.type("run", "jobs/c.toml", "--step", "train", "--of", first.id)
    again = desk.runs[0]
    desk.type("run", "jobs/c.toml", "--step", "evaluate")  # train of the last, prepare of the first
    assert {run.id for run in _runs_of(desk.runs[0])} == {
        f"{desk.runs[0].id}/evaluate",
        f"{again.id}/train",
        f"{first.id}/prepare",
    }
    assert "no step 'trian'" in desk.type("run", "jobs/c.toml", "--step", "trian", rc=2)[1]


def _runs_of(run: RunDir) -> list[RunDir]:
    return [RunDir(run.root, step["run"]) for step in rundir.read_json(run.plan)["steps"]]


def test_steps_of_another_version_of_the_data_are_not_built_on(desk: Desk, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (desk.project / "data" / name).mkdir(parents=True)
    desk.chain(f'[data]\nsource = "one"\n{three(desk.flag)}')
    desk.type("run", "jobs/c.toml")
    _, err = desk.type("run", "jobs/c.toml", "--from", "train", "--set", "data.source=two", rc=2)
    assert "step prepare of" in err and "worked on one, and now it is two" in err and "fix: --from prepare" in err


def test_a_missing_data_set_stops_the_chain_before_it_starts(desk: Desk) -> None:
    desk.chain(f'[data]\nsource = "none"\n[[steps]]\nname = "fetch"\naction = "fetch"\n{three(desk.flag)}')
    _, err = desk.type("run", "jobs/c.toml", rc=2)
    assert f"no data set at {desk.project}/data/none" in err and "fix: hpcml data fetch none" in err
    assert not list((desk.project / "runs").iterdir())[1:]  # the .gitignore alone


def test_ctrl_c_ends_the_chain(desk: Desk) -> None:
    waits = "import os, time, pathlib; pathlib.Path(os.environ['HPCML_RUNS'], 'begun').touch(); time.sleep(60)"
    desk.chain(f'[[steps]]\nname = "a"\n{command(waits)}\n[[steps]]\nname = "b"\n{command("pass")}\n')
    with subprocess.Popen([sys.executable, "-m", "hpcml", "run", "jobs/c.toml"], stderr=subprocess.PIPE) as process:
        _until((desk.project / "runs" / "begun").exists)
        assert desk.states() == {"a": "RUNNING", "b": "PENDING"}
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert desk.states() == {"a": "CANCELLED", "b": "CANCELLED"}
    assert queue.state_of(desk.runs[0]).name == "CANCELLED"


def test_of_a_killed_chain_the_rest_never_started_and_can_go_on(desk: Desk) -> None:
    desk.chain(three(desk.flag))
    desk.type("run", "jobs/c.toml")
    run = desk.runs[0]
    for name in ("train", "evaluate"):  # as KILL would have left it after the first step
        shutil.rmtree(run.child(name).logs)
        run.child(name).make()
        for path in (run.child(name).status, run.child(name).owner):
            path.unlink()
    run.status.unlink()
    rundir.write_json(run.owner, {**rundir.read_json(run.owner), "start": "0"})
    state = queue.state_of(run)
    assert state.name == "CANCELLED" and "never started: the chain's process ended" in state.reason
    desk.type("resume")
    assert desk.states() == dict.fromkeys(["prepare", "train", "evaluate"], "COMPLETED")


def _until(there: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def test_a_step_is_told_of_those_before_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCML_STEPS", json.dumps({"train": "/runs/20260101-retrain/train"}))
    found = steps.find("train")
    assert (found.path, found.id) == (Path("/runs/20260101-retrain/train"), "20260101-retrain/train")
    with pytest.raises(HpcmlError, match=r"no step 'trian' before this one(?s:.*)did you mean 'train'"):
        steps.find("trian")
    monkeypatch.setenv("HPCML_STEPS", "[1]")
    with pytest.raises(HpcmlError, match="no JSON object"):
        steps.find("train")
    monkeypatch.delenv("HPCML_STEPS")
    with pytest.raises(HpcmlError, match="no step of a chain"):
        steps.find("train")


# ------------------------------------------------------------------ the scripts


def test_the_scripts_are_shown_with_what_makes_them_wait(desk: Desk) -> None:
    desk.chain(GOOD)
    out, _ = desk.type("render", "jobs/c.toml", "--site", "generic")
    heads = [line for line in out.splitlines() if line.startswith("# ---- step")]
    assert heads == [
        "# ---- step prepare: sbatch",
        "# ---- step train: sbatch --dependency=afterok:<prepare> --kill-on-invalid-dep=yes",
        "# ---- step evaluate: sbatch --dependency=afterok:<train> --kill-on-invalid-dep=yes",
    ]
    assert "#SBATCH --job-name=c-train\n" in out and "# no jobs: fetch, register, report" in out


def test_a_steps_script_by_plain_sbatch_says_what_to_type(desk: Desk, tmp_path: Path) -> None:
    desk.chain(GOOD)
    out, _ = desk.type("render", "jobs/c.toml", "--site", "generic")
    script = out.partition("# ---- step train")[0]
    environment = {**os.environ, "SLURM_SUBMIT_DIR": str(desk.project), "HPCML_PYTHON": sys.executable}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "fix: hpcml submit jobs/c.toml --step prepare" in done.stderr


def test_each_job_of_the_repository_that_is_a_chain_resolves() -> None:
    from hpcml.pipeline import ready

    for path in sorted((ROOT / "jobs").glob("*.toml")):
        if pipeline.is_chain(path):
            for site in ("local", "generic", "ft3"):
                assert ready.prepare(path, site, ask_queue=False).plans


# ------------------------------------------------------------------ registered where it is better


class Contest:
    """Chains that were run as far as their evaluation, without the processes: what is tested is what comes then."""

    def __init__(self, project: Path, uri: str) -> None:
        self.project, self.uri, self.count = project, uri, 0
        (project / "jobs").mkdir()
        (project / "pyproject.toml").touch()
        text = GOOD.replace("[params]", 'experiment = "digits"\n[params]', 1)
        (project / "train.py").write_text(SCRIPT)
        (project / "jobs" / "c.toml").write_text(text)

    def chain(self, score: float, promoted: float | None = None, data: str = "d1", slope: float = 1.0) -> RunDir:
        """Return a chain whose new model has a score on some test data, and the one promoted when it began another."""
        import numpy as np
        from sklearn.linear_model import LinearRegression

        from hpcml.pipeline import chain, ready
        from hpcml.tracking import models

        found = ready.prepare(self.project / "jobs" / "c.toml")
        run = chain.make(found, self.project / "runs", lambda _: None, packed=False)
        self.count += 1
        for name in ("prepare", "train", "evaluate"):
            marker = {
                "state": "COMPLETED",
                "exit_code": 0,
                "final": True,
                "started": 1.7e9,
                "ended": 1.7e9 + self.count,
            }
            rundir.write_json(run.child(name).status, marker)
        models.save(run.child("train"), LinearRegression().fit(np.eye(3), np.ones(3) * slope), np.eye(3))
        theirs = None if promoted is None else {"accuracy": promoted}
        folder = run.child("evaluate").artifacts
        folder.mkdir()
        rundir.write_json(folder / "evaluation.json", {"test_data": data, "accuracy": score, "promoted": theirs})
        return run

    def settle(self, run: RunDir) -> dict[str, Any]:
        actions.settle(run)
        return rundir.read_json(run.child("register").artifacts / "decision.json")

    def promoted(self) -> dict[int, tuple[str, ...]]:
        from hpcml.tracking import registry

        return {one.version: one.aliases for one in registry.versions(self.uri, self.project / "runs", "digits")}


@pytest.fixture
def contest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Contest:
    pytest.importorskip("mlflow", reason="needs the extra `mlflow`")
    pytest.importorskip("sklearn", reason="needs the extra `mlflow`")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for name, value in {
        "MLFLOW_TRACKING_URI": uri,
        "HPCML_SITE": "local",
        "HPCML_RUNS": str(tmp_path / "runs"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("hpcml.report.ensure", lambda run, **_: run.path)  # reports have tests of their own
    monkeypatch.chdir(tmp_path)
    return Contest(tmp_path, uri)


def test_a_model_is_registered_where_it_is_better_on_the_same_test_set(contest: Contest) -> None:
    first = contest.settle(contest.chain(0.90))
    assert first["registered"] and first["version"] == "digits/1" and first["against"] == ""
    run = contest.chain(0.90, promoted=0.90)
    assert rundir.read_json(run.child("fetch").artifacts / "fetched.json")["promoted"]["version"] == 1
    assert (run.child("fetch").path / "promoted" / "MLmodel").is_file()
    equal = contest.settle(run)
    assert not equal["registered"] and "accuracy 0.9, digits/1 has 0.9 on the same test data" in equal["text"]
    assert contest.promoted() == {1: ("champion",)}  # not even a version
    # Of a later version of the data: there the promoted one has another value, and that one counts.
    worse = contest.settle(contest.chain(0.85, promoted=0.86, data="d2"))
    assert not worse["registered"] and worse["against_value"] == 0.86
    better = contest.settle(contest.chain(0.88, promoted=0.86, data="d2"))
    assert better["registered"] and contest.promoted() == {2: ("champion",), 1: ()}


def test_another_model_was_promoted_while_the_chain_ran(contest: Contest) -> None:
    contest.settle(contest.chain(0.90))
    same, other, beaten = (
        contest.chain(0.93, promoted=0.90),
        contest.chain(0.95, 0.90, data="d2"),
        contest.chain(0.91, 0.90),
    )
    assert contest.settle(contest.chain(0.92, promoted=0.90))["version"] == "digits/2"
    assert (
        "digits/2 has 0.92" in contest.settle(beaten)["text"]
    )  # known from its own chain, on data of that fingerprint
    told = contest.settle(other)
    assert (
        not told["registered"]
        and told["against_value"] is None
        and "was not evaluated on this test data" in told["text"]
    )
    assert contest.settle(same)["version"] == "digits/3"


def test_a_model_is_registered_once_however_often_the_chain_is_settled(contest: Contest) -> None:
    contest.settle(contest.chain(0.90))
    run = contest.chain(0.95, promoted=0.90)
    both = [_settling(run), _settling(run)]
    did = sorted(process.communicate(timeout=120)[0].strip() for process in both)
    assert did == ["0", "2"]  # register and report, by one of them
    run.child("register").status.unlink()  # killed after the promotion, before it was noted
    told = contest.settle(run)
    assert told["registered"] and told["version"] == "digits/2" and contest.promoted() == {2: ("champion",), 1: ()}


def test_a_decision_waits_for_another_and_sees_what_it_promoted(contest: Contest) -> None:
    from hpcml.tracking import mlflow, registry

    contest.settle(contest.chain(0.90))
    waiting, other = contest.chain(0.91, promoted=0.90), contest.chain(0.95, promoted=0.90)
    mlflow.deliver(other.child("train"), contest.uri, state="COMPLETED")
    with (waiting.root / ".promote.lock").open("w") as lock:  # as if the other were deciding
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = _settling(waiting)
        # A waiter is a line of its own below the lock's (proc(5), /proc/locks): "1: -> FLOCK … PID …".
        blocked = re.compile(rf"-> FLOCK .* {process.pid} ")
        _until(lambda: blocked.search(Path("/proc/locks").read_text()) is not None)
        made, _ = registry.register(other.child("train"), contest.uri, "digits")
        registry.promote(contest.uri, waiting.root, "digits", made.version)
    process.communicate(timeout=120)
    told = json.loads((waiting.child("register").artifacts / "decision.json").read_text())
    assert not told["registered"] and told["against"] == "digits/2" and told["against_value"] == 0.95


def _settling(run: RunDir) -> subprocess.Popen[str]:
    """A process that settles a chain and prints how much it did."""
    code = "from pathlib import Path; from hpcml.pipeline import actions; from hpcml.rundir import RunDir; "
    code += f"print(len(actions.settle(RunDir(Path({str(run.root)!r}), {run.id!r}))))"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        (None, "the step evaluate left no evaluation.json"),
        ({"accuracy": 0.9}, "does not say on which test data"),
        ({"test_data": "d1", "acc": 0.9}, "accuracy = None is no finite number"),
        ({"test_data": "d1", "accuracy": float("nan")}, "is no finite number"),
    ],
)  # fmt: skip
def test_without_a_result_the_registration_fails_and_says_why(
    contest: Contest, evaluation: dict[str, Any] | None, words: str
) -> None:
    run = contest.chain(0.9)
    path = run.child("evaluate").artifacts / "evaluation.json"
    path.unlink() if evaluation is None else rundir.write_json(path, evaluation)
    contest.settle(run)
    state = queue.state_of(run)
    assert state.name == "FAILED" and state.reason.startswith("step register: ") and words in state.reason
    assert queue.state_of(run.child("report")).reason == "never started: register is FAILED"


def test_a_silent_mlflow_leaves_the_registration_to_the_next_sync(
    contest: Contest, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = contest.chain(0.9)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ServiceSilent):
        actions.settle(run)
    state = queue.state_of(run)
    assert (state.name, state.reason) == ("COMPLETING", f"register and report: hpcml sync {run.id}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", contest.uri)
    assert contest.settle(run)["registered"] and queue.state_of(run).name == "COMPLETED"
