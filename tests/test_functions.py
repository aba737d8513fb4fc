"""``hpcml.submit`` and ``hpcml.map`` on this machine: real processes, started by submitit and run by the worker."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hpcml
from hpcml import queue
from hpcml.errors import HpcmlError
from hpcml.job import Job, Resources, SlurmOptions
from hpcml.launch import calls, functions, sbatch
from hpcml.launch.functions import Future, RemoteError
from hpcml.plan import Plan, resolve
from hpcml.rundir import RunDir
from hpcml.site import load

PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project that is the working folder, on the site ``local``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPCML_SITE", "local")
    monkeypatch.setenv("HPCML_PROJECT", str(tmp_path))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def job(**resources: Any) -> Job:
    return Job("ignored", "function", (), Path.cwd(), resources=Resources(**resources))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not true after {PATIENCE_S} s"
        time.sleep(0.02)


def runs(project: Path) -> list[str]:
    """Names of all that lies in the runs folder, apart from what keeps it out of git."""
    folder = project / "runs"
    return sorted(path.name for path in folder.iterdir() if path.name != ".gitignore") if folder.exists() else []


class AskedWhileUnpacked:
    """Unpickles as the value that an environment variable has then."""

    def __init__(self, variable: str) -> None:
        self.variable = variable

    def __reduce__(self) -> tuple[Any, ...]:
        return os.getenv, (self.variable,)


# ------------------------------------------------------------------ what comes back


def test_the_result_and_what_the_function_found_around_it(project: Path) -> None:
    def look(first: int, prepared: str, *, second: int) -> dict[str, Any]:
        import os
        from pathlib import Path

        began_with = dict(v.split("=", 1) for v in Path("/proc/self/environ").read_text().split("\0") if "=" in v)
        return {
            "sum": first + second,
            "cwd": os.getcwd(),
            "threads": began_with.get("OMP_NUM_THREADS"),
            "prepared": bool(prepared),
            "run": os.environ["HPCML_RUN"],
            "umask": os.umask(0o077),
        }

    wanted = job(cpus_per_task=1)
    folder = project / "deeper"
    folder.mkdir()
    os.chdir(folder)

    future = hpcml.submit(look, 40, AskedWhileUnpacked("HPCML_NODE"), second=2, job=wanted)
    found = pickle.loads(pickle.dumps(future)).result(PATIENCE_S)

    assert found == {
        "sum": 42, "cwd": str(folder), "threads": "1", "prepared": True, "run": future.run.id, "umask": 0o077
    }  # fmt: skip
    assert future.result() == found
    assert future.done()
    assert future.state().name == "COMPLETED"
    assert future.run.path.parent == project / "runs"
    assert future.run.id.endswith("-look")
    plan = json.loads(future.run.plan.read_text())
    assert (plan["work"], plan["experiment"]) == ("function", "look")
    assert stat.S_IMODE(future.run.functions.stat().st_mode) == 0o700
    assert not any(path.stat().st_mode & 0o077 for path in future.run.path.rglob("*"))
    assert not future.run.code.exists()


def test_an_exception_comes_back_with_its_type_traceback_and_logs() -> None:
    def divide(by: int) -> float:
        print("dividing")
        return 1 / by

    future = hpcml.submit(divide, 0)

    with pytest.raises(RemoteError) as caught:
        future.result(PATIENCE_S)

    error = caught.value
    assert error.exit_code == 1
    assert (error.state, error.kind) == ("FAILED", "ZeroDivisionError")
    assert "divide" in error.remote_traceback
    assert "hpcml" not in error.remote_traceback
    assert "submitit" not in error.remote_traceback
    for words in ("ZeroDivisionError: division by zero", str(future.run.logs), f"hpcml logs {future.run.id}"):
        assert words in str(error)
    log = future.run.log(0).read_text()
    assert "dividing" in log
    assert log.count("Traceback") == 1
    assert future.state().reason == "ZeroDivisionError: division by zero"


def test_map_keeps_the_order_in_one_run_with_a_child_for_each_call(project: Path) -> None:
    def later_first(index: int, letter: str) -> str:
        import time

        time.sleep(0.3 * (2 - index))
        if letter == "!":
            raise ValueError(index)
        return f"{index}{letter}"

    futures = hpcml.map(later_first, range(4), "ab!")

    assert len(futures) == 3
    assert [future.result(PATIENCE_S) for future in futures[:2]] == ["0a", "1b"]
    with pytest.raises(RemoteError, match="ValueError: 2"):
        futures[2].result(PATIENCE_S)
    (parent,) = runs(project)
    assert [future.run.id for future in futures] == [f"{parent}/{index}" for index in range(3)]
    whole = queue.state_of(RunDir(project / "runs", parent))
    assert (whole.name, whole.reason) == ("FAILED", f"{futures[2].run.id}: ValueError: 2")


def test_an_empty_map_makes_nothing(project: Path) -> None:
    assert hpcml.map(str, []) == []
    assert runs(project) == []


def test_a_module_of_the_project_is_imported_where_the_function_runs(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "lessons_of_mine.py").write_text("import os\ndef where():\n    return __name__, os.getppid()\n")
    monkeypatch.syspath_prepend(str(project))
    import lessons_of_mine  # type: ignore[import-not-found]

    name, parent = hpcml.submit(lessons_of_mine.where).result(PATIENCE_S)

    assert name == "lessons_of_mine"
    assert parent != os.getppid()


def test_begin_inside_the_function_is_its_run_with_the_params_of_a_job_file_without_work(project: Path) -> None:
    def train() -> tuple[str, object, str | None]:
        import os

        import hpcml

        run = hpcml.begin()
        run.log(1, loss=0.5)
        return run.dir.id, run.params["lr"], os.environ.get("LESSON")

    file = project / "small.toml"
    file.write_text('[resources]\ncpus_per_task = 1\n[params]\nlr = 0.1\n[env.vars]\nLESSON = "three"\n')

    future = hpcml.submit(train, job=file)

    assert future.result(PATIENCE_S) == (future.run.id, 0.1, "three")
    events = "".join(path.read_text() for path in future.run.events.iterdir())
    assert '"loss"' in events
    assert json.loads(future.run.plan.read_text())["job_file"] == "small.toml"


def test_a_function_that_checks_no_strategy_is_warned_and_keeps_its_result(project: Path) -> None:
    (project / "original.toml").write_text('strategy = "original"\n[resources]\ncpus_per_task = 1\n')
    future = hpcml.submit(abs, -1, job="original.toml")
    assert future.result(PATIENCE_S) == 1
    assert future.state().name == "COMPLETED"
    said = "".join(path.read_text() for path in future.run.functions.iterdir() if path.suffix == ".err")
    assert 'warning: strategy "original" was never checked' in said


def test_two_tasks_have_a_result_each_and_one_that_fails_ends_the_other() -> None:
    def rank(fails: bool) -> int:
        import os
        import time

        number = int(os.environ["HPCML_RANK"])
        if fails and number == 1:
            raise LookupError("the second")
        if fails:
            time.sleep(600)
        return number

    pair = job(tasks_per_node=2, cpus_per_task=1)
    good, bad = hpcml.submit(rank, False, job=pair), hpcml.submit(rank, True, job=pair)

    assert good.results(PATIENCE_S) == [0, 1]
    assert good.result() == 0
    with pytest.raises(RemoteError, match="LookupError on rank 1: the second"):
        bad.result(PATIENCE_S)


# ------------------------------------------------------------------ ends without a result


def test_a_killed_function_is_an_error_and_no_hang() -> None:
    def die() -> None:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RemoteError, match=r"die has no result: .* FAILED \(killed by SIGKILL") as caught:
        hpcml.submit(die).result(PATIENCE_S)
    assert caught.value.state == "FAILED"
    assert caught.value.kind == ""


def test_a_run_whose_process_vanished_is_an_error_and_no_hang() -> None:
    future = hpcml.submit(time.sleep, 600)
    wait_until(lambda: future.run.log(0).exists())
    owner = json.loads(future.run.owner.read_text())["pid"]
    workers = Path(f"/proc/{owner}/task/{owner}/children").read_text().split()

    os.kill(owner, signal.SIGKILL)

    with pytest.raises(RemoteError, match="ended as UNKNOWN") as caught:
        future.result(PATIENCE_S)
    assert caught.value.state == "UNKNOWN"
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))  # they end with it


def test_past_its_time_limit_it_is_a_timeout() -> None:
    with pytest.raises(RemoteError, match="TIMEOUT") as caught:
        hpcml.submit(time.sleep, 600, job=job(time="00:00:02")).result(PATIENCE_S)
    assert caught.value.state == "TIMEOUT"


def test_waiting_no_longer_leaves_the_job_and_cancel_ends_it() -> None:
    def work() -> None:
        import time
        from pathlib import Path

        Path("began").touch()
        time.sleep(600)

    future = hpcml.submit(work)
    wait_until(Path("began").exists)
    with pytest.raises(TimeoutError, match=f"run {future.run.id} goes on"):
        future.result(timeout=0.2)
    assert not future.done()

    future.cancel()

    with pytest.raises(RemoteError, match="CANCELLED") as caught:
        future.result(PATIENCE_S)
    assert caught.value.state == "CANCELLED"
    ended_by = json.loads(future.run.status_of(0).read_text())["exit_code"]
    assert ended_by == 128 + signal.SIGTERM
    future.cancel()
    assert future.state().name == "CANCELLED"


def test_ctrl_c_while_waiting_leaves_the_job(project: Path) -> None:
    script = project / "session.py"
    script.write_text("""\
import hpcml, pathlib, pickle, time
def wait():
    pathlib.Path("began").touch()
    while not pathlib.Path("go").exists():
        time.sleep(0.02)
    return "gone on"
future = hpcml.submit(wait)
pathlib.Path("future").write_bytes(pickle.dumps(future))
future.result()
""")
    session = subprocess.Popen([sys.executable, script], start_new_session=True, stderr=subprocess.PIPE, text=True)
    wait_until((project / "began").exists)

    os.killpg(session.pid, signal.SIGINT)

    _, said = session.communicate(timeout=PATIENCE_S)
    assert session.returncode != 0
    assert "KeyboardInterrupt" in said
    future: Future[str] = pickle.loads((project / "future").read_bytes())
    assert future.state().name == "RUNNING"
    (project / "go").touch()
    assert future.result(PATIENCE_S) == "gone on"


def test_no_result_is_said_in_words() -> None:
    def lock() -> Any:
        import threading

        return threading.Lock()

    unpicklable, left = hpcml.submit(lock), hpcml.submit(sys.exit, 0)
    with pytest.raises(RemoteError, match=r"the result, a lock, can't be pickled: TypeError"):
        unpicklable.result(PATIENCE_S)
    with pytest.raises(RemoteError, match="exit raised SystemExit: 0"):
        left.result(PATIENCE_S)


def test_code_packed_by_another_python_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def packed_elsewhere(*args: Any) -> calls.Call:
        return dataclasses.replace(calls.pack(*args), python=(3, 2))

    monkeypatch.setattr(functions, "pack", packed_elsewhere)
    with pytest.raises(RemoteError, match=r"packed by Python 3\.2") as caught:
        hpcml.submit(abs, -1).result(PATIENCE_S)
    assert "HPCML_PYTHON" in str(caught.value)


def test_the_example_of_the_readme_runs_as_it_is_written(project: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## Functions\n")[1].split("\n## ")[0]
    job_file, script, shown = re.findall(r"```(?:toml|python|text)\n(.*?)```", section, re.DOTALL)
    (project / "small.toml").write_text(job_file)
    (project / "fit.py").write_text(script)
    done = subprocess.run([sys.executable, "fit.py"], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stdout) == (0, shown), done.stderr


# ------------------------------------------------------------------ refused before anything is made


def test_an_argument_that_cannot_be_pickled_is_named(project: Path) -> None:
    def use(path: str, handle: object, *, guard: object = None) -> None: ...

    with pytest.raises(HpcmlError, match=r"argument 'handle' of .*use can't be pickled: TypeError"):
        hpcml.submit(use, "data", threading.Lock())
    with pytest.raises(HpcmlError, match=r"argument 'guard' of .*use can't be pickled"):
        hpcml.submit(use, "data", 1, guard=threading.Lock())
    around = threading.Lock()
    with pytest.raises(HpcmlError, match=r"function .* can't be pickled"):
        hpcml.map(lambda _: around.locked(), [1, 2])
    assert runs(project) == []


@pytest.mark.parametrize(
    ("fn", "options", "words"),
    [
        ("train", {}, "not a function"),
        (abs, {"site": "nowhere"}, "unknown site 'nowhere'"),
        (abs, {"job": "absent.toml"}, "no job file at absent.toml"),
        (abs, {"job": "wrong.toml"}, "unknown key 'resources.node'"),
        (abs, {"site": "generic"}, "sbatch and srun not on PATH"),
    ],
)
def test_wrong_input_is_refused(
    fn: Any, options: dict[str, Any], words: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "wrong.toml").write_text("[resources]\nnode = 1\n")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HpcmlError) as caught:
        hpcml.submit(fn, -1, **options)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2
    assert runs(project) == []


def test_nothing_stays_when_submitit_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stubs = project / "stubs"
    stubs.mkdir()
    for name, body in {
        "sbatch": "echo 'sbatch: error: invalid account' >&2; exit 1",
        "sinfo": "echo 'main|up|1|64|512000|1-00:00:00|gpu:a100:2|main*'",
        "srun": "exit 0",
    }.items():
        (stubs / name).write_text(f"#!/bin/sh\n{body}\n")
        (stubs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CONF", str(project / "absent.conf"))

    with pytest.raises(HpcmlError, match="the function was refused: invalid account"):
        hpcml.map(abs, [1, 2], site="generic")
    with pytest.raises(HpcmlError, match="9 nodes is more than there are"):
        hpcml.submit(abs, 1, site="generic", job=job(nodes=9))

    assert runs(project) == []


# ------------------------------------------------------------------ the plan as Slurm is told it


def planned() -> Plan:
    wanted = Job(
        "ignored",
        "function",
        ("train",),
        Path.cwd(),
        resources=Resources(2, 2, 1, 32, 64, "01:30:30"),
        slurm=SlurmOptions("main", "lab", "high", "a100", "class", ("--mail-type=END", "--exclusive")),
    )
    return resolve(wanted, load("ft3"))


def test_the_plan_reaches_submitit() -> None:
    run = RunDir(Path("/runs"), "r")
    options = calls.slurm_options(planned(), run, 8)
    forced = options.pop("additional_parameters")

    assert forced == {
        "output": "/runs/r/%a/logs/slurm-%A_%a.out", "time": "01:30:30", "reservation": "class",
        "array": "0-7", "mail-type": "END", "exclusive": True,
    }  # fmt: skip
    wanted = {
        "nodes": 2, "ntasks_per_node": 1, "cpus_per_task": 32, "mem": "64G", "gres": "gpu:a100:2", "time": 91,
        "partition": "main", "account": "lab", "qos": "high", "constraint": "a100",
    }  # fmt: skip
    assert {key: options[key] for key in wanted} == wanted


def test_the_script_loads_the_modules_and_gives_each_job_of_an_array_its_run() -> None:
    one, array = (sbatch.render_functions(planned(), load("ft3"), array=array) for array in (False, True))

    assert "module load cesga/system miniconda3/22.11" in one
    assert "--cpus-per-task=32" in one
    assert "SLURM_ARRAY_TASK_ID" not in one
    assert 'export HPCML_RUN="$HPCML_RUN/$SLURM_ARRAY_TASK_ID"' in array
    assert subprocess.run(["bash", "-n"], input=array, text=True, check=False).returncode == 0
