"""The command line on this machine, for real: processes, signals, logs, JSON, pipes, and values that arrive unchanged."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from hpcml.cli.root import cli
from hpcml.cli.root import run as hpcml
from hpcml.tracking.journal import Journal

REPOSITORY = Path(__file__).parents[1]
WORDS = [sys.executable, "-m", "hpcml"]
HOSTILE = [
    'say "hi"',
    "it's",
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "two\nlines",
    "ñandú 火 🦊",
    "-n",
    "--help",
    "a # b",
    "C:\\new\\",
    "{braces} %s %(x)s ${x}",
    " spaces ",
    "",
    '"""',
    "\\N{BULLET}",
]


@dataclass
class Desk:
    """A project on a machine without a queue."""

    project: Path
    env: dict[str, str]

    def write(self, name: str, text: str) -> Path:
        path = self.project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*WORDS, *words],
            cwd=self.project,
            env={**self.env, **more},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def type(self, *words: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; it must end with the code, and never with a traceback of hpcml's own."""
        process = self.start(*words, **more)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, f"hpcml {' '.join(words)}: exit {process.returncode}\n{out}\n{err}"
        theirs = "--json" in words  # then the work's own output is on stderr too
        assert ("Traceback" not in err or theirs) and "internal error" not in err, err
        return subprocess.CompletedProcess([], process.returncode, out, err)

    def json(self, *words: str, code: int = 0) -> Any:
        """What a command prints with --json: nothing else is on stdout."""
        return json.loads(self.type(*words, "--json", code=code).stdout)

    @property
    def runs(self) -> list[Path]:
        return sorted(path.parent for path in (self.project / "runs").glob("*/plan.json"))


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").touch()
    # A delivery takes seconds; with no MLflow to import a run ends as well, and says so. One test below delivers.
    (tmp_path / "without" / "mlflow").mkdir(parents=True)
    (tmp_path / "without" / "mlflow" / "__init__.py").write_text("raise ImportError('not in this test')\n")
    paths = [str(tmp_path / "without"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "HPCML_SITE": "local", "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    return Desk(project, env)


def until(condition: Callable[[], bool], what: str, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process still runs; one that has ended and waits to be reaped doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def marker(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "status.json").read_text())
    return value


# ------------------------------------------------------------------ help and its place in the README


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


COMMANDS = list(commands(cli))


@pytest.mark.parametrize("words", [(), *COMMANDS], ids=" ".join)
def test_every_command_tells_what_it_does(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert hpcml([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: {' '.join(('hpcml', *words))} ")
    description = re.split(r"\n\n|\nOptions:", shown)[1]
    assert len(description.split()) >= 3, shown
    for option in re.findall(r"^  (-\S.*)$", shown, re.MULTILINE):
        assert len(re.split(r"  +", option)) == 2 or option.startswith("-"), f"{option} has no help"
    assert hpcml([*words, "-h"]) == 0
    assert capsys.readouterr().out == shown


def test_every_option_has_a_help_text() -> None:
    for words in COMMANDS:
        command: click.Command = cli
        for word in words:
            assert isinstance(command, click.Group)
            found = command.get_command(click.Context(command), word)
            assert found is not None
            command = found
        silent = [p.opts for p in command.params if isinstance(p, click.Option) and not p.help]
        assert not silent, f"hpcml {' '.join(words)}"


def test_the_readme_names_every_command() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    if "\n## Commands\n" not in text:
        pytest.skip("README.md: it has no section Commands")
    section = text.split("\n## Commands\n")[1].split("\n## ")[0]
    named = [
        shlex.split(code)[1:] if code.startswith("hpcml ") else [code] for code in re.findall(r"`([^`]+)`", section)
    ]
    for words in COMMANDS:
        whole, last = list(words), [words[-1]]
        is_group = any(other[: len(words)] == words and other != words for other in COMMANDS)
        assert is_group or any(n[: len(words)] == whole or n == last for n in named), f"hpcml {' '.join(words)}"


def test_the_version_is_told_in_both_ways(desk: Desk) -> None:
    from hpcml import __version__

    assert desk.type("--version").stdout == f"hpcml {__version__}\n" == desk.type("--debug", "--version").stdout


# ------------------------------------------------------------------ init → check → run

PERCENT = '# %% tags=["parameters"]\nepochs = 2\n# %%\nprint("epochs", epochs)\n'


@pytest.mark.parametrize(("name", "text"), [("train.py", "print('epochs', 2)\n"), ("lesson.py", PERCENT)])
def test_from_a_script_to_its_first_run(desk: Desk, name: str, text: str) -> None:
    desk.write(name, text)
    made = desk.type("init", name)
    job = f"jobs/{Path(name).stem}.toml"
    assert f"wrote {job}" in made.stdout and f"hpcml check {job}" in made.stdout
    assert "environment" in desk.type("check", job).stdout
    assert not (desk.project / "runs").exists(), "check creates nothing"
    done = desk.type("run", job)
    assert "epochs 2" in done.stdout and "COMPLETED" in done.stdout
    assert "not delivered to MLflow" in done.stderr and "hpcml sync" in done.stderr
    (run,) = desk.runs
    assert (marker(run)["state"], marker(run)["exit_code"]) == ("COMPLETED", 0)
    assert (run / "code" / name).read_text() == text
    again = desk.type("init", name, code=2)
    assert "is there already" in again.stderr
    if text == PERCENT:
        assert "epochs 7" in desk.type("run", job, "-p", "epochs=7").stdout


def test_from_a_notebook_to_its_first_run_with_hostile_values(desk: Desk) -> None:
    nbformat = pytest.importorskip("nbformat", reason="notebooks: not installed (pip install 'hpcml[notebook]')")
    pytest.importorskip("papermill", reason="notebooks: not installed (pip install 'hpcml[notebook]')")
    names = [f"p{number}" for number in range(len(HOSTILE))]
    defaults = nbformat.v4.new_code_cell("\n".join(f"{name} = 'x'" for name in names))
    defaults.metadata["tags"] = ["parameters"]
    dump = f"import json\nprint('VALUES', json.dumps([{', '.join(names)}]))"
    node = nbformat.v4.new_notebook(cells=[defaults, nbformat.v4.new_code_cell(dump)])
    nbformat.write(node, desk.project / "lesson.ipynb")
    desk.type("init", "lesson.ipynb")
    desk.type("check", "jobs/lesson.toml")
    done = desk.type("run", "jobs/lesson.toml", *as_options(dict(zip(names, HOSTILE, strict=True))))
    assert values_in(done.stdout) == HOSTILE
    (run,) = desk.runs
    assert (run / "notebook.ipynb").is_file() and not list(desk.project.rglob("pwned"))


# ------------------------------------------------------------------ values arrive as they were typed


def as_options(values: dict[str, str]) -> list[str]:
    return [word for name, value in values.items() for word in ("-p", f"{name}={value}")]


def as_toml(values: dict[str, str]) -> str:
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    return "[params]\n" + "\n".join(lines) + "\n"


def values_in(output: str) -> Any:
    (line,) = [line for line in output.splitlines() if line.startswith("VALUES ")]
    return json.loads(line.removeprefix("VALUES "))


NAMED = {f"p{number}": text for number, text in enumerate(HOSTILE)}


@pytest.mark.parametrize("typed", [False, True], ids=["in the job file", "with -p"])
def test_values_reach_a_scripts_arguments_unchanged(desk: Desk, typed: bool) -> None:
    desk.write("train.py", "import json, sys\nprint('VALUES', json.dumps(sys.argv[1:]))\n")
    desk.write("job.toml", 'script = "train.py"\n' + ("" if typed else as_toml(NAMED)))
    done = desk.type("run", "job.toml", *(as_options(NAMED) if typed else []))
    assert values_in(done.stdout) == [word for name, text in NAMED.items() for word in (f"--{name}", text)]
    assert not list(desk.project.rglob("pwned"))


@pytest.mark.parametrize("typed", [False, True], ids=["in the job file", "with -p"])
def test_values_reach_a_percent_script_unchanged(desk: Desk, typed: bool) -> None:
    cell = "".join(f"{name} = 'x'\n" for name in NAMED)
    dump = f"import json\nprint('VALUES', json.dumps([{', '.join(NAMED)}]))\n"
    text = f'# %% tags=["parameters"]\n{cell}# %%\n{dump}'
    original = desk.write("lesson.py", text)
    desk.write("job.toml", 'script = "lesson.py"\n' + ("" if typed else as_toml(NAMED)))
    done = desk.type("run", "job.toml", *(as_options(NAMED) if typed else []))
    assert values_in(done.stdout) == HOSTILE
    assert original.read_text(encoding="utf-8") == text, "the original is as it was"
    assert not list(desk.project.rglob("pwned"))


def test_words_of_a_command_and_variables_arrive_unchanged(desk: Desk) -> None:
    dump = "import json, os, sys; print('VALUES', json.dumps([sys.argv[1:], os.environ['TEXT']]))"
    text = "".join(HOSTILE)
    command = json.dumps([sys.executable, "-c", dump, *HOSTILE], ensure_ascii=False)
    desk.write("job.toml", f"command = {command}\n[env.vars]\nTEXT = {json.dumps(text, ensure_ascii=False)}\n")
    assert values_in(desk.type("run", "job.toml").stdout) == [HOSTILE, text]
    assert not list(desk.project.rglob("pwned"))


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("resources.time=00:20:00", "--time=00:20:00"),
        ("resources.time=20", "--time=00:20:00"),
        ("slurm.account=1234", "--account=1234"),
        ("slurm.account='1234'", "--account=1234"),
        ("slurm.constraint=[a|b]", "--constraint=[a|b]"),
        ("resources.nodes=2", "--nodes=2"),
        ("slurm.max_requeues=2", "--requeue"),
        ('slurm.extra=["--exclusive"]', "--exclusive"),
        ("name=2026-11-01", "--job-name=2026-11-01"),
    ],
)
def test_settings_are_typed_without_quotes(desk: Desk, setting: str, line: str) -> None:
    desk.write("train.py", "")
    desk.write("job.toml", 'script = "train.py"\n')
    shown = desk.type("render", "job.toml", "--site", "generic", "--set", setting).stdout
    assert f"#SBATCH {line}\n" in shown, shown


# ------------------------------------------------------------------ a finished run, looked at in every way


def test_everything_about_a_finished_run(desk: Desk) -> None:
    desk.write("train.py", "import hpcml\nrun = hpcml.begin()\nprint('hello')\nrun.log(1, accuracy=0.5)\n")
    desk.write("job.toml", 'script = "train.py"\n[resources]\ntasks_per_node = 2\n')
    done = desk.json("run", "job.toml")
    (run,) = desk.runs
    assert (done["name"], done["run_id"], done["path"], done["exit_code"]) == ("COMPLETED", run.name, str(run), 0)

    for reference in ([], [run.name], [f"{run.name}/"]):
        state = desk.json("status", *reference)
        assert (state["name"], state["source"], state["slurm_job_id"]) == ("COMPLETED", "marker", None)
    shown = desk.type("status").stdout
    assert f"COMPLETED {run.name}" in shown and "accuracy 0.5" in shown and str(run) in shown
    both = desk.type("logs").stdout.splitlines()
    assert {"[0] hello", "[1] hello"} <= set(both)
    only = desk.type("logs", "--rank", "1").stdout
    assert "hello" in only and "[0]" not in only
    assert set(desk.type("logs", "-f").stdout.splitlines()) == set(both)
    assert [state["run_id"] for state in desk.json("runs", "list")] == [run.name]
    assert run.name in desk.type("runs", "list").stdout
    assert "has ended already: COMPLETED" in desk.type("cancel").stdout
    ended = {"run_id": run.name, "slurm_job_id": None, "state_before": "COMPLETED", "cancelled": False}
    assert desk.json("cancel") == ended
    lines = [json.loads(line) for line in desk.type("logs", "--json").stdout.splitlines()]
    assert {(line["rank"], line["line"]) for line in lines} >= {(0, "hello"), (1, "hello")}
    assert desk.type("logs", "--json", "--rank", "1", "-f").stdout.count('"rank": 1') == only.count("\n")
    kept = desk.type("runs", "prune", "--keep", "0", "--yes")
    assert "1 older run is kept" in kept.stderr and desk.runs == [run]
    assert "not delivered to MLflow" in desk.type("sync", code=3).stderr
    assert desk.json("sync", code=3) == [{"run_id": run.name, "delivered": False, "mlflow": ""}]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_list_of_runs_fits_the_terminal(desk: Desk, width: int) -> None:
    reason = "cell 5: ValueError: the global batch 256 is not a multiple of the number of replicas, which is 3 " * 2
    for name, marker in {
        "20260101-100000-mnist-multiworker": {"state": "OUT_OF_MEMORY", "reason": reason},
        "20260101-110000-mnist-original": {"state": "COMPLETED", "started": 10.0, "ended": 3700.0},
        "20260101-120000-" + "x" * 64: {"state": "FAILED", "reason": "[red]exit[/nope] code 1"},
    }.items():
        desk.write(f"runs/{name}/plan.json", json.dumps({"work": "script"}))
        desk.write(f"runs/{name}/status.json", json.dumps({**marker, "final": True}))
    lines = desk.type("runs", "list", COLUMNS=str(width)).stdout.splitlines()
    assert max(map(len, lines)) <= width
    heading, *rows = lines
    assert heading.split()[:2] == ["run", "state"] and "time" in heading
    assert "job" not in heading and "replicas" not in heading, "columns that are empty for all rows"
    text = "\n".join(rows)
    for words in ("OUT_OF_MEMORY", "COMPLETED", "01:01:30", "[red]exit[/nope] code 1", "x" * 64):
        assert words in text
    assert text.count("…") == 1 and "cell 5: ValueError: the global batch" in text
    assert len(rows) <= 6, "a run takes one line, its reason and a long name one more each"


def test_a_delivered_run_is_sent_once_and_may_go(desk: Desk) -> None:
    pytest.importorskip("mlflow", reason="mlflow: not installed (pip install 'hpcml[mlflow]')")
    desk.env["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    desk.write("train.py", "print('hello')\n")
    desk.write("job.toml", 'script = "train.py"\nexperiment = "Greetings"\n')
    done = desk.type("run", "job.toml")
    store = f"sqlite:///{desk.project}/runs/mlflow.db"
    assert f"mlflow    Greetings at {store}" in done.stdout and "not delivered" not in done.stderr
    (run,) = desk.runs
    assert f"{run.name} is in MLflow: Greetings at {store}" in desk.type("sync", run.name).stdout
    assert "1 run is in MLflow already" in desk.type("sync", "--all").stdout
    assert "mlflow    delivered\n" in desk.type("status").stdout
    journal = Journal(run / "events" / "0.0.late.jsonl")
    journal.metric(7, {"loss": 0.5})
    journal.close()
    assert f"mlflow    not all delivered: hpcml sync {run.name}\n" in desk.type("status").stdout
    desk.type("sync", run.name)
    assert "mlflow    delivered\n" in desk.type("status").stdout
    asked = desk.start("runs", "prune", "--keep", "0")
    assert asked.communicate(timeout=60)[0].startswith(run.name) and desk.runs == [run], "no answer is no"
    assert "deleted 1 run, " in desk.type("runs", "prune", "--keep", "0", "--yes").stdout
    assert desk.runs == []


def test_places_in_json(desk: Desk) -> None:
    assert {"local", "generic", "ft3"} <= {site["name"] for site in desk.json("site", "list")}
    assert desk.json("site", "show", "ft3")["cores_per_gpu"] == 32
    assert desk.json("site", "show")["name"] == "local"
    findings = {finding["topic"]: finding for finding in desk.json("doctor")}
    assert findings["site"]["text"] == "local ($HPCML_SITE)" and findings["python"]["verdict"] == "good"
    desk.write("train.py", "")
    desk.write("job.toml", 'script = "train.py"\n')
    assert {finding["topic"] for finding in desk.json("check", "job.toml")} >= {"site", "request", "environment"}
    assert desk.json("runs", "list") == []
    assert "← here: $HPCML_SITE" in desk.type("site", "list").stdout


def test_doctor_tells_what_a_snapshot_holds(desk: Desk) -> None:
    def git() -> dict[str, str]:
        found: dict[str, str] = next(line for line in desk.json("doctor") if line["topic"] == "git")
        return found

    told = git()
    assert (told["verdict"], "is no git repository" in told["text"]) == ("note", True), told
    subprocess.run(["git", "init", "-q"], cwd=desk.project, env=desk.env, check=True)
    assert git()["verdict"] == "good"


def test_a_site_of_ones_own_is_found_again_by_its_file(desk: Desk) -> None:
    desk.write("own.toml", f"scheduler = 'local'\nruns = '{desk.project}/runs'\ntracking = 'sqlite:////nowhere/x.db'\n")
    desk.write("train.py", "")
    desk.write("job.toml", 'script = "train.py"\n')
    done = desk.type("run", "job.toml", "--site", "own.toml")
    assert "unknown site" not in done.stderr, done.stderr
    (run,) = desk.runs
    assert json.loads((run / "plan.json").read_text())["site"] == str(desk.project / "own.toml")


# ------------------------------------------------------------------ runs that end badly


def test_a_failing_script_is_1_with_its_reason(desk: Desk) -> None:
    desk.write("train.py", "print('before')\nraise ValueError('no such luck')\n")
    desk.write("job.toml", 'script = "train.py"\n')
    done = desk.type("run", "job.toml", code=1)
    assert re.search(r"FAILED \S+-job", done.stdout) and "reason    ValueError: no such luck" in done.stdout
    (run,) = desk.runs
    assert (marker(run)["state"], marker(run)["exit_code"]) == ("FAILED", 1)
    log = (run / "logs/out.0.txt").read_text()
    assert "before" in log and "Traceback" in log, "the script's own traceback is in the log"
    assert desk.json("run", "job.toml", code=1)["reason"] == "ValueError: no such luck"
    assert desk.json("status")["name"] == "FAILED", "to look at a failed run is no failure"


def test_one_rank_that_fails_ends_the_other(desk: Desk) -> None:
    text = "import os, time\nif os.environ['HPCML_RANK'] == '1':\n    raise SystemExit('rank 1 gives up')\ntime.sleep(600)\n"
    desk.write("train.py", text)
    desk.write("job.toml", 'script = "train.py"\n[resources]\ntasks_per_node = 2\n')
    done = desk.type("run", "job.toml", code=1)
    assert "rank 1 gives up" in done.stdout
    (run,) = desk.runs
    assert (marker(run)["state"], marker(run)["failed_rank"]) == ("FAILED", 1)


def test_a_command_that_is_not_there(desk: Desk) -> None:
    desk.write("job.toml", 'command = ["no-such-command"]\n')
    done = desk.type("run", "job.toml", code=1)
    assert "no-such-command can't be started" in done.stdout + done.stderr
    assert marker(desk.runs[0])["state"] == "FAILED"


def test_two_ranks_know_each_other(desk: Desk) -> None:
    desk.write("train.py", "import hpcml\nt = hpcml.begin().topology\nprint('I am', t.rank, 'of', t.world)\n")
    desk.write("job.toml", 'script = "train.py"\n[resources]\ntasks_per_node = 2\n')
    desk.type("run", "job.toml")
    logs = [path.read_text() for path in sorted(desk.runs[0].glob("logs/out.*.txt"))]
    assert ["I am 0 of 2" in logs[0], "I am 1 of 2" in logs[1], len(logs)] == [True, True, 2]


SLEEPER = """\
import os, pathlib, time
pathlib.Path(os.environ["PIDS"], os.environ["HPCML_RANK"]).write_text(str(os.getpid()))
time.sleep(600)
"""


def sleeping(desk: Desk, ranks: int, *words: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a run that sleeps and return it with its ranks' process ids, once they all sleep."""
    pids = desk.project.parent / "pids"
    pids.mkdir()
    desk.write("train.py", SLEEPER)
    desk.write("job.toml", f'script = "train.py"\n[resources]\ntasks_per_node = {ranks}\n')
    process = desk.start("run", "job.toml", *words, PIDS=str(pids))
    until(
        lambda: process.poll() is not None or [p.read_text() != "" for p in pids.iterdir()] == [True] * ranks,
        "they sleep",
    )
    assert process.poll() is None, process.communicate()
    return process, [int(path.read_text()) for path in pids.iterdir()]


def test_a_run_in_another_terminal_is_cancelled_as_by_ctrl_c(desk: Desk) -> None:
    process, pids = sleeping(desk, 2)
    assert desk.json("cancel")["cancelled"] is True
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, out + err
    assert marker(desk.runs[0])["state"] == "CANCELLED"
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_ranks(desk: Desk, number: signal.Signals) -> None:
    process, pids = sleeping(desk, 2)
    assert desk.json("status")["name"] == "RUNNING"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "CANCELLED" in out and "interrupted" in out and "Traceback" not in err
    (run,) = desk.runs
    assert (marker(run)["state"], marker(run)["final"]) == ("CANCELLED", True)
    until(lambda: not any(map(alive, pids)), "the ranks are gone", 10)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl: Linux only")
def test_a_launcher_that_is_killed_leaves_no_rank_behind(desk: Desk) -> None:
    process, pids = sleeping(desk, 2)
    process.kill()
    process.communicate(timeout=60)
    until(lambda: not any(map(alive, pids)), "the ranks are gone", 30)
    (run,) = desk.runs
    until(lambda: len(list(run.glob("status.[01].json"))) == 2, "each has left its marker", 30)


def test_an_error_of_hpcmls_own_on_the_node_is_in_log_and_status(desk: Desk) -> None:
    desk.write("job.toml", 'command = ["true"]\n')
    desk.write(
        "broken/sitecustomize.py", "import os, sys\nif 'HPCML_RANK' in os.environ: os.sched_getaffinity = None\n"
    )
    process = desk.start("run", "job.toml", PYTHONPATH=str(desk.project / "broken"))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, out + err
    (run,) = desk.runs
    assert marker(run)["state"] == "FAILED" and "internal error: TypeError" in marker(run)["reason"]
    log = (run / "logs" / "out.0.txt").read_text()
    assert "please report it" in log and "Traceback" in log
    assert "internal error: TypeError" in out


def test_past_the_time_limit_it_is_timeout(desk: Desk) -> None:
    process, pids = sleeping(desk, 1, "--set", "resources.time=00:00:03")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, out + err
    assert "TIMEOUT" in out and "past the time limit" in out
    (run,) = desk.runs
    assert marker(run)["state"] == "TIMEOUT" and desk.json("status")["name"] == "TIMEOUT"
    assert not any(map(alive, pids))


SAVER = """\
import os, pathlib, signal, time
def save(*unused):
    time.sleep(1)
    print("saved", flush=True)
    raise SystemExit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path(os.environ["PIDS"]).write_text(str(os.getpid()))
time.sleep(600)
"""


def test_training_in_a_shell_script_has_time_to_save(desk: Desk) -> None:
    """The shell dies of the signal at once, the training below it takes a second."""
    desk.write("saver.py", SAVER)
    desk.write("train.sh", f"{shlex.quote(sys.executable)} saver.py\necho never\n")
    desk.write("job.toml", 'script = "train.sh"\n')
    noted = desk.project.parent / "pid"
    process = desk.start("run", "job.toml", PIDS=str(noted))
    until(lambda: process.poll() is not None or (noted.exists() and noted.read_text() != ""), "it trains")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, "saved" in out, "never" in out) == (130, True, False), out + err
    assert not alive(int(noted.read_text()))


LEFT_BEHIND = """\
import os, pathlib, subprocess, sys
chatter = "import time\\nwhile True: print('and on', flush=True); time.sleep(0.01)"
child = subprocess.Popen([sys.executable, "-c", chatter]{more})
pathlib.Path(os.environ["PIDS"]).write_text(str(child.pid))
print("the end", flush=True)
"""


@pytest.mark.parametrize("more", ["", ", start_new_session=True"], ids=["in its group", "a session of its own"])
def test_what_a_script_leaves_behind_does_not_hold_up_the_run(desk: Desk, more: str) -> None:
    desk.write("train.py", LEFT_BEHIND.format(more=more))
    desk.write("job.toml", 'script = "train.py"\n')
    noted = desk.project.parent / "pid"
    try:
        done = desk.type("run", "job.toml", PIDS=str(noted))
        assert "the end" in done.stdout and marker(desk.runs[0])["state"] == "COMPLETED"
        if not more:
            assert not alive(int(noted.read_text())), "a job's processes end with it"
    finally:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int(noted.read_text()), signal.SIGKILL)


# ------------------------------------------------------------------ pipes


def piped(desk: Desk, words: Sequence[str], reader: str = "head -1") -> tuple[str, str, int]:
    """What a reader that leaves early saw, what was on stderr, and hpcml's own exit code."""
    line = f"{shlex.join([*WORDS, *words])} | {reader}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=desk.project, env=desk.env, capture_output=True, text=True, timeout=60
    )
    return done.stdout, done.stderr, done.returncode


def test_a_reader_that_leaves_early(desk: Desk) -> None:
    desk.write("train.py", "for i in range(200_000):\n    print('line', i)\n")
    desk.write("job.toml", 'script = "train.py"\n')
    out, err, _ = piped(desk, ["run", "job.toml"])
    assert out.startswith("hpcml: run ") and "Traceback" not in err and "BrokenPipe" not in err, err
    assert marker(desk.runs[0])["state"] == "COMPLETED", "the run goes on without its reader"
    assert (desk.runs[0] / "logs/out.0.txt").read_text().endswith("line 199999\n")
    for words in (["logs"], ["logs", "-f"], ["runs", "list", "--json"], ["doctor", "--json"], ["--help"]):
        out, err, status = piped(desk, words)
        assert out.count("\n") == 1 and err == "", (words, err)
        assert status == 0, words
        assert "internal" not in piped(desk, words, "true")[1], words
