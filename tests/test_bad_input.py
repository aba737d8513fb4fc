"""Wrong input through the real command line: exit code 2, a message that tells what to do, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hpcml import rundir
from hpcml.cli.root import run as hpcml

# As sinfo tells it: a default partition of two nodes, and one of a smaller node.
SINFO = "main|up|2|64|252928|1-00:00:00|gpu:a100:2|main*\nsmall|up|1|8|15360|30:00|(null)|small\n"
NOTEBOOK = {
    "cells": [
        {
            "cell_type": "code",
            "source": ["lr = 0.1\n", "epochs = 5\n", "data = 'mnist'\n", "shuffle = True\n"],
            "metadata": {"tags": ["parameters"]},
            "execution_count": None,
            "outputs": [],
            "id": "a",
        }
    ],
    "metadata": {},
    "nbformat": 4,
    "nbformat_minor": 5,
}
FILES = {
    "pyproject.toml": "",
    "train.py": "print('trained')\n",
    "percent.py": '# %% tags=["parameters"]\nlr = 0.1\nepochs = 5\n# %%\nprint(lr)\n',
    "work.ipynb": json.dumps(NOTEBOOK),
    "good.toml": 'script = "train.py"\n',
    "text.ipynb": "This is no notebook.\n",
    "list.ipynb": "[1, 2]\n",
    "bare.ipynb": '{"cells": []}\n',
    "magic.ipynb": json.dumps(NOTEBOOK).replace("lr = 0.1", "%matplotlib inline"),
    "nul.ipynb": json.dumps(NOTEBOOK).replace("lr = 0.1", "lr = '\\u0000'"),
    "folder.ipynb/readme": "",
}
WORK = 'script = "train.py"\n'
IN_NOTEBOOK = 'notebook = "work.ipynb"\n'


@dataclass
class Desk:
    """A person's project and login node: stubs for Slurm's commands write down how they were called."""

    home: Path
    project: Path
    calls: Path
    errors: Callable[[], str]

    def write(self, files: Mapping[str, str | bytes]) -> None:
        for name, text in files.items():
            path = self.project / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())

    def everything(self) -> dict[str, bytes | None]:
        """Every file's content and every folder below the home."""
        return {str(p): p.read_bytes() if p.is_file() else None for p in self.home.rglob("*")}

    def refused(self, *words: str, says: tuple[str, ...], code: int = 2) -> str:
        """Run a command that must be refused, and return what it says."""
        before = self.everything()
        self.errors()
        got = hpcml(words)
        said = self.errors()
        told = f"hpcml {' '.join(words)}: exit {got}\n{said}"
        assert got == code, told
        for phrase in says:
            assert phrase in said, f"{phrase!r} is missing\n{told}"
        for phrase in ("Traceback", "internal error"):
            assert phrase not in said, told
        assert self.everything() == before, told
        assert not self.calls.exists() or "sbatch --parsable" not in self.calls.read_text(), told
        return said


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Desk:
    home = tmp_path / "home"
    found = Desk(home, home / "project", tmp_path / "calls", lambda: capsys.readouterr().err)
    found.write(FILES)
    tools = tmp_path / "bin"
    tools.mkdir()
    answers = {"sinfo": f"printf %s '{SINFO}'", "sbatch": "echo 4711", "scontrol": "echo ClusterName = zeus"}
    for name in ("sinfo", "sbatch", "squeue", "scontrol", "scancel", "sacct", "srun"):
        path = tools / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>"{found.calls}"\n{answers.get(name, "")}\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LUSTRE", str(home / "lustre"))
    monkeypatch.setenv("STORE", str(home / "store"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.chdir(found.project)
    return found


@dataclass(frozen=True)
class Case:
    """A job file that is wrong: its text, what the message must hold, and further files."""

    text: str | bytes
    says: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)


def case(text: str | bytes, *says: str, **files: str) -> Case:
    return Case(text, says, {name.replace("__", "."): content for name, content in files.items()})


def resources(lines: str) -> str:
    return f"{WORK}[resources]\n{lines}\n"


# ------------------------------------------------------------------ job files that are wrong everywhere

COUNT = "a whole number from 1"
BAD_JOBS = {
    # keys
    "unknown key": case(WORK + 'strateg = "mirrored"\n', "bad.toml: unknown key 'strateg'", "did you mean 'strategy'?"),
    "unknown key, nothing near": case(WORK + "zzz = 1\n", "unknown key 'zzz'", "allowed: base, command, data, env,"),
    "unknown table": case(WORK + "[resource]\nnodes = 1\n", "unknown key 'resource'", "did you mean 'resources'?"),
    "a resource's short name": case(
        resources("gpus = 2"), "bad.toml: unknown key 'resources.gpus'", "'gpus_per_node'?"
    ),
    "unknown resource": case(
        resources("gpu_per_node = 2"), "'resources.gpu_per_node'", "did you mean 'gpus_per_node'?"
    ),
    "unknown slurm": case(WORK + '[slurm]\npartitions = "a"\n', "'slurm.partitions'", "did you mean 'partition'?"),
    "unknown env": case(WORK + '[env]\nmodule = ["a"]\n', "'env.module'", "did you mean 'modules'?"),
    "unknown data": case(WORK + '[data]\nversions = "v1"\n', "'data.versions'", "did you mean 'version'?"),
    "version of no data set": case(WORK + '[data]\nversion = "v1"\n', "[data] doesn't say which data set", "source"),
    "data stage": case(WORK + '[data]\nsource = "a"\nstage = "alway"\n', "data.stage = 'alway'", "'always'?"),
    "data number": case(WORK + "[data]\nsource = 1\n", "data.source = 1 is not a line of text"),
    "unknown parameter": case(IN_NOTEBOOK + "[params]\nepoch = 1\n", "bad.toml: params.epoch:", "'epochs'?"),
    "unknown parameter, percent": case('script = "percent.py"\n[params]\nlrr = 1\n', "no parameter 'lrr'", "'lr'?"),
    # types, units, ranges
    "memory with a unit": case(
        resources('mem_gb = "16G"'), "mem_gb = '16G'", "(GiB a node), without quotes", "a whole number from 1"
    ),
    "nodes in quotes": case(resources('nodes = "2"'), "bad.toml: resources.nodes:", COUNT, "without quotes"),
    "cores as a float": case(resources("cpus_per_task = 2.0"), "cpus_per_task = 2.0", "(cores), without quotes"),
    "nodes as a boolean": case(resources("nodes = true"), "nodes = True", COUNT),
    "negative nodes": case(resources("nodes = -1"), "nodes = -1 is not a whole number in range", COUNT),
    "no tasks": case(resources("tasks_per_node = 0"), "tasks_per_node = 0", COUNT),
    "negative GPUs": case(resources("gpus_per_node = -2"), "gpus_per_node = -2", "a whole number from 0"),
    "a huge number": case(resources("nodes = 1000000000000"), "nodes = 1000000000000", "from 1 to 1,000,000,000"),
    "an absurd number": case(resources(f"nodes = {'9' * 5000}"), "bad.toml"),
    "nesting without end": case(f"x = {'[' * 9000}{']' * 9000}\n", "bad.toml"),
    "a list of nodes": case(resources("nodes = [1, 2]"), "nodes = [1, 2]", COUNT),
    "time as a number": case(resources("time = 30"), "time = 30 is not a time limit", '"00:30:00"', "in quotes"),
    "time in words": case(resources('time = "1h"'), "time = '1h'", '"30" (minutes)'),
    "time of a clock": case(resources("time = 00:30:00"), "is not a time limit", "in quotes"),
    "negative time": case(resources('time = "-5"'), "time = '-5'"),
    "no time": case(resources('time = "0"'), "time = '0'"),
    "resources is no table": case(WORK + "resources = 3\n", "resources = 3 is not a table", "[resources]"),
    "params is no table": case(WORK + "params = 3\n", "params = 3 is not a table", "[params]"),
    "two wrong things": case(
        resources('nodes = "2"\ntime = "soon"'), "nodes = '2'", "time = 'soon'", "bad.toml: resources.time:"
    ),
    # work
    "no such notebook": case('notebook = "wrok.ipynb"\n', "no notebook at", "wrok.ipynb", "relative to the project"),
    "no such script": case('script = "src/train.py"\n', "no script at", "relative to the project"),
    "notebook is a folder": case('notebook = "folder.ipynb"\n', "folder.ipynb is a folder, not a notebook"),
    "notebook is text": case('notebook = "text.ipynb"\n', "text.ipynb is not a notebook", "JupyterLab"),
    "notebook is a list": case('notebook = "list.ipynb"\n', "list.ipynb is not a notebook"),
    "notebook without a format": case('notebook = "bare.ipynb"\n', "bare.ipynb is not a notebook"),
    "notebook is a script": case('notebook = "train.py"\n', "train.py is no notebook", "a path ending in .ipynb"),
    "script is a notebook": case('script = "work.ipynb"\n', "work.ipynb is a notebook", 'notebook = "work.ipynb"'),
    "parameters cell with magic": case(
        'notebook = "magic.ipynb"\n', "the parameters cell of", "is not Python", "line 1"
    ),
    "parameters cell with NUL": case('notebook = "nul.ipynb"\n', "the parameters cell of", "is not Python"),
    "outside the project": case('script = "../up.py"\n', "../up.py is no path inside the project", "HPCML_PROJECT"),
    "absolute": case('script = "/bin/true"\n', "/bin/true is no path inside the project"),
    "an absurd path": case(f'script = "{"x" * 300}.py"\n', "no script at"),
    "script is a number": case("script = 5\n", "script = 5 is not a line of text"),
    "nothing to run": case('name = "idle"\n', "nothing to run", "exactly one of notebook, script, command"),
    "two works": case(WORK + IN_NOTEBOOK, "notebook and script are both set", "exactly one of"),
    "empty command": case("command = []\n", "command is empty", '["python", "train.py"]'),
    "command of nothing": case('command = [""]\n', "command is empty"),
    "command is text": case('command = "ls -l"\n', "command = 'ls -l' is not a list of strings", '["a", "b"]'),
    # names
    "name with a space": case(WORK + 'name = "a b"\n', "name = 'a b' is not a job name", "at most 64"),
    "name with ;": case(WORK + 'name = "a;b"\n', "name = 'a;b'"),
    "name with $()": case(WORK + 'name = "$(touch x)"\n', "name = '$(touch x)'"),
    "name with a slash": case(WORK + 'name = "a/b"\n', "name = 'a/b'"),
    "name with a dot first": case(WORK + 'name = ".a"\n', "name = '.a'", "a letter or digit first"),
    "name with a dash first": case(WORK + 'name = "-a"\n', "name = '-a'"),
    "name of 65 letters": case(WORK + f'name = "{"x" * 65}"\n', "is not a job name", "at most 64"),
    "name in Spanish": case(WORK + 'name = "año"\n', "name = 'año'", "letters, digits"),
    "name with a newline": case(WORK + 'name = "a\\n"\n', "name = 'a\\n'"),
    "no name": case(WORK + 'name = ""\n', "name = '' is not a job name"),
    "name is a number": case(WORK + "name = 5\n", "name = 5 is not a job name"),
    # bases
    "base is itself": case('base = "bad.toml"\n', "form a cycle: bad.toml → bad.toml", "remove one `base` line"),
    "cycle of two": case('base = "b.toml"\n', "bad.toml → b.toml → bad.toml", b__toml='base = "bad.toml"\n'),
    "cycle of three": case(
        'base = "b.toml"\n',
        "bad.toml → b.toml → c.toml → bad.toml",
        b__toml='base = "c.toml"\n',
        c__toml='base = "bad.toml"\n',
    ),
    "no such base": case('base = "none.toml"\n', "bad.toml: base:", "no job file at", "none.toml"),
    "base is a number": case("base = 3\n", "base = 3 is not a path", '"mnist.toml"'),
    "base is a list": case('base = ["good.toml"]\n', "base = ['good.toml'] is not a path"),
    "base is broken": case('base = "b.toml"\n', "b.toml", "not valid TOML", b__toml="a = \n"),
    # the file
    "not TOML": case("script: train.py\n", "bad.toml: not valid TOML", "line 1", "strings need quotes"),
    "a key twice": case(WORK + WORK, "not valid TOML", "line 2"),
    "not UTF-8": case(b'name = "\xff"\n', "bad.toml cannot be read", "UTF-8"),
    "empty": case("", "bad.toml: nothing to run"),
    # params
    "a table as parameter": case(WORK + "[params.a]\nb = 1\n", "params.a = {'b': 1}", "a string, number or boolean"),
    "a list as parameter": case(WORK + "[params]\nlr = [0.1, 0.2]\n", "params.lr = [0.1, 0.2]", "single value"),
    "a date as parameter": case(WORK + "[params]\nday = 2026-01-01\n", "params.day =", "single value"),
    "NUL in a parameter": case(WORK + '[params]\na = "\\u0000"\n', "params.a holds a NUL character"),
    "parameter with a space": case(WORK + '[params]\n"a b" = 1\n', "parameter 'a b' is not a name"),
    "text for a number": case(IN_NOTEBOOK + '[params]\nlr = "fast"\n', "params.lr = 'fast' is not a number", "0.1"),
    "a float for a whole number": case(
        IN_NOTEBOOK + "[params]\nepochs = 1.5\n", "params.epochs = 1.5 is not a whole number"
    ),
    "a number for a boolean": case(IN_NOTEBOOK + "[params]\nshuffle = 1\n", "params.shuffle = 1 is not true or false"),
    # environment and Slurm options
    "a variable as number": case(WORK + "[env.vars]\nA = 1\n", "env.vars.A = 1 is not a string", "in quotes"),
    "a variable's name": case(WORK + '[env.vars]\n"A=B" = "1"\n', "'A=B' is not a variable's name"),
    "variables are no table": case(WORK + '[env]\nvars = "A=1"\n', "env.vars = 'A=1' is not a table", "[env.vars]"),
    "two Pythons": case(WORK + '[env]\nname = "a"\npython = "b"\n', "env.name and env.python are both set"),
    "modules as text": case(WORK + '[env]\nmodules = "cuda"\n', "env.modules = 'cuda' is not a list of strings"),
    "a short option": case(
        WORK + '[slurm]\nextra = ["-N 2"]\n', "'-N 2' is not an option of sbatch", "--mail-type=END"
    ),
    "no option": case(WORK + '[slurm]\nextra = ["exclusive"]\n', "'exclusive' is not an option of sbatch"),
    "an option with a newline": case(WORK + '[slurm]\nextra = ["--comment=a\\n#SBATCH -N9"]\n', "is not an option"),
    "options as text": case(WORK + '[slurm]\nextra = "--exclusive"\n', "slurm.extra = '--exclusive' is not a list"),
    "a partition of two lines": case(WORK + '[slurm]\npartition = "a\\nb"\n', "partition = 'a\\nb' is not a line"),
    "an empty account": case(WORK + '[slurm]\naccount = ""\n', "account = '' is not a line of text", "non-empty"),
    # strategies
    "a strategy misspelt": case(WORK + 'strategy = "mirored"\n', "strategy = 'mirored'", "did you mean 'mirrored'?"),
    "another strategy": case(WORK + 'strategy = "tpu"\n', "original, mirrored, multiworker"),
    "strategy is a number": case(WORK + "strategy = 2\n", "strategy = 2 is not known"),
    "unknown keras": case(WORK + 'keras = "2"\n', "keras = '2' is not known", "legacy, 3"),
    "keras without quotes": case(WORK + "keras = 3\n", "keras = 3 is not known", "legacy, 3"),
    "unknown precision": case(WORK + 'precision = "mixed_float61"\n', "'mixed_float16'?"),
    "multiworker on Keras 3": case(
        WORK + 'strategy = "multiworker"\nkeras = "3"\n', "bad.toml: keras:", "keras-team/keras#20585", '"legacy"'
    ),
    "two tasks without a strategy's help": case(
        WORK + 'strategy = "original"\n[resources]\ntasks_per_node = 2\n',
        "2 tasks are asked for",
        "tasks_per_node = 1",
        'strategy = "multiworker"',
    ),
    "two mirrored nodes": case(WORK + 'strategy = "mirrored"\n[resources]\nnodes = 2\n', "'mirrored' is one process"),
    "GPUs that can't be shared": case(
        WORK + 'strategy = "multiworker"\n[resources]\ngpus_per_node = 2\ntasks_per_node = 3\n',
        "2 GPUs can't be shared evenly by 3 tasks",
        "a multiple of tasks_per_node",
    ),
}


@pytest.mark.parametrize("wrong", BAD_JOBS.values(), ids=BAD_JOBS.keys())
def test_a_wrong_job_file_is_refused_by_every_command(desk: Desk, wrong: Case) -> None:
    desk.write({"bad.toml": wrong.text, **wrong.files})
    said = {desk.refused("run", "bad.toml", says=wrong.says), desk.refused("check", "bad.toml", says=wrong.says)}
    for verb in (["render"], ["submit"], ["submit", "--dry-run"], ["compare"]):
        said.add(desk.refused(*verb, "bad.toml", "--site", "ft3", says=wrong.says))
    assert len(said) == 1, "the commands say different things"


def test_a_folder_is_no_job_file(desk: Desk) -> None:
    desk.refused("run", ".", says=("hpcml: . is a folder, not a job file", "such as jobs/NAME.toml"))
    desk.refused("run", "", says=("is a folder, not a job file",))


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("work.ipynb", ("work.ipynb is a notebook, not a job file", "fix: hpcml init work.ipynb")),
        ("train.py", ("train.py is a script, not a job file", "fix: hpcml init train.py")),
        ("jobs/big.sbatch", ("is a batch script, not a job file", "fix: sbatch jobs/big.sbatch", "jobs/big.toml")),
        ("big_model", ("no job file at big_model", "did you mean 'jobs/big_model.toml'?")),
        ("jobs/big_modl.toml", ("no job file at jobs/big_modl.toml", "did you mean 'jobs/big_model.toml'?")),
        ("god.toml", ("no job file at god.toml", "did you mean 'good.toml'?")),
    ],
)
def test_what_is_near_a_job_file_is_told_apart(desk: Desk, typed: str, says: tuple[str, ...]) -> None:
    desk.write({"jobs/big_model.toml": WORK, "jobs/big.sbatch": "#!/bin/bash\n"})
    said = {desk.refused(verb, typed, says=says) for verb in ("run", "submit", "check", "render", "compare")}
    assert len(said) == 1


def test_no_such_job_file(desk: Desk) -> None:
    desk.refused("submit", "jobs/none.toml", says=("no job file at jobs/none.toml", "hpcml init SCRIPT"))
    desk.refused("submit", f"{'x' * 300}.toml", says=("cannot be read",))


@pytest.mark.parametrize(
    ("strategy", "lacks", "fix"),
    [
        ("ddp", "lacks hpcml, torch\n", "scripts/setup --torch, or pip install -r envs/torch/requirements.txt"),
        ("original", "lacks hpcml, tensorflow, tf_keras\n", "pip install 'hpcml[tensorflow]'"),
    ],
)
def test_check_asks_the_jobs_python_for_the_framework_of_its_strategy(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], strategy: str, lacks: str, fix: str
) -> None:
    desk.write({"one.toml": f'{WORK}strategy = "{strategy}"\n'})
    bare = desk.home / "python"
    bare.write_text(
        "#!/bin/sh\n# a Python that has nothing: whatever is asked for is missing\nshift 2\n"
        """printf '{"version": "3.12", "missing": ["%s"' "$1"; shift; printf ', "%s"' "$@"; printf ']}'\n"""
    )
    bare.chmod(0o755)
    monkeypatch.setenv("HPCML_PYTHON", str(bare))
    assert hpcml(("check", "one.toml", "--site", "generic")) == 2
    said = capsys.readouterr().out
    assert lacks in said and fix in said


@pytest.mark.parametrize("verb", ["run", "submit", "compare"])
@pytest.mark.parametrize(
    ("lines", "module", "fix"),
    [
        ('strategy = "ddp"\n', "torch", "scripts/setup --torch, or pip install -r envs/torch/requirements.txt"),
        ('strategy = "mirrored"\n', "tensorflow", "pip install 'hpcml[tensorflow]'"),
        ('strategy = "mirrored"\n', "tf_keras", "pip install 'hpcml[tensorflow]'"),
    ],
)
def test_a_framework_that_is_missing_is_told_before_anything_is_made(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, verb: str, lines: str, module: str, fix: str
) -> None:
    monkeypatch.setenv("HPCML_PYTHON", sys.executable)
    monkeypatch.setitem(sys.modules, module, None)  # what an import of it, or a look for it, meets then
    desk.write({"one.toml": WORK + lines, "two.toml": 'base = "one.toml"\n'})
    words = ("one.toml", "two.toml") if verb == "compare" else ("one.toml",)
    site = "local" if verb == "run" else "generic"
    says = ("one.toml: strategy:", f"needs {module}, which {sys.executable} lacks", fix)
    desk.refused(verb, *words, "--site", site, says=says if verb != "compare" else says[1:])


@pytest.mark.parametrize(
    ("lines", "module"),
    [
        ("", "torch"),
        ('strategy = "mirrored"\n', "torch"),
        ('strategy = "ddp"\n', "tensorflow"),
        ('strategy = "mirrored"\nkeras = "3"\n', "tf_keras"),
        ('strategy = "ddp"\n[env]\nmodules = ["pytorch"]\n', "torch"),
        ('strategy = "ddp"\n[env]\npython = "/another/bin/python"\n', "torch"),
    ],
)
def test_a_framework_that_is_not_needed_or_may_be_elsewhere_is_not_asked_for(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, lines: str, module: str
) -> None:
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    monkeypatch.setitem(sys.modules, module, None)
    desk.write({"one.toml": WORK + lines})
    assert hpcml(("submit", "one.toml", "--site", "generic")) == 0
    assert "sbatch --parsable" in desk.calls.read_text()


def test_a_file_name_that_is_no_job_name_needs_a_name_in_the_file(desk: Desk) -> None:
    desk.write({"my job.toml": WORK})
    desk.refused("run", "my job.toml", says=("my job.toml", "name = 'my job' is not a job name", "letters, digits"))


# ------------------------------------------------------------------ more than there is

TOO_MUCH = 'nodes = 9\ngpus_per_node = 4\ntasks_per_node = 2\ncpus_per_task = 40\nmem_gb = 300\ntime = "8-00"'


def test_more_than_a_site_has_is_listed_at_once(desk: Desk) -> None:
    desk.write({"bad.toml": resources(TOO_MUCH)})
    four = (
        "4 GPUs a node",
        "at most 2",
        "80 cores a node (2 tasks × 40)",
        "at most 64",
        "300 GiB a node",
        "at most 247",
    )
    for verb in ("submit", "check", "render"):
        said = desk.refused(
            verb, "bad.toml", "--site", "ft3", says=(*four, "time limit 8-00 is too long", "7-00:00:00")
        )
        assert said.count("bad.toml: resources.") == 4, "another cluster's sinfo says nothing of this site's nodes"


def test_more_than_sinfo_tells_is_listed_at_once(desk: Desk) -> None:
    desk.write({"bad.toml": resources(TOO_MUCH)})
    says = ("9 nodes", "at most 2 (partition main, as sinfo and site generic tell)", "4 GPUs", "80 cores", "300 GiB")
    said = desk.refused("submit", "bad.toml", "--site", "generic", says=(*says, "at most 1-00:00:00"))
    assert said.count("bad.toml: resources.") == 5


def test_a_partitions_own_limits(desk: Desk) -> None:
    desk.write({"bad.toml": resources('time = "12:00:00"\n[slurm]\npartition = "short"')})
    desk.refused("render", "bad.toml", "--site", "ft3", says=("12:00:00 is too long", "at most 06:00:00"))
    desk.refused(
        *("submit", "good.toml", "--site", "generic", "--set", "slurm.partition=small", "--set", "resources.mem_gb=16"),
        says=("--set resources.mem_gb: 16 GiB a node is more", "at most 15 (partition small"),
    )
    desk.refused(
        *("submit", "good.toml", "--site", "generic", "--set", "slurm.partition=mian"),
        says=("--set slurm.partition: no partition 'mian'", "main, small", "did you mean 'main'?"),
    )


def test_more_processes_than_a_machine_bears(desk: Desk) -> None:
    desk.refused("run", "good.toml", "--set", "resources.nodes=1000000", says=("1000000 tasks", "at most 64"))


# ------------------------------------------------------------------ the command line

RUN = ("run", "good.toml")
NB = ("run", "nb.toml")
COMMAND_LINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown command": (("stauts",), ("no command 'stauts'", "did you mean 'status'?")),
    "unknown command, nothing near": (("zzz",), ("no command 'zzz'", "init, check, render, run", "hpcml --help")),
    "unknown subcommand": (("runs", "lst"), ("lst",)),
    "unknown option": ((*RUN, "--stie", "ft3"), ("--stie", "--site")),
    "no job": (("run",), ("JOB",)),
    "two jobs": ((*RUN, "good.toml"), ("good.toml",)),
    "-p without =": ((*RUN, "-p", "lr"), ("'lr' is not KEY=VALUE",)),
    "-p without a key": ((*RUN, "-p", "=5"), ("'=5' is not KEY=VALUE",)),
    "-p that is no name": ((*RUN, "-p", "a b=1"), ("-p a b: parameter 'a b' is not a name",)),
    "-p unknown": ((*NB, "-p", "epoch=1"), ("-p epoch: work.ipynb has no parameter 'epoch'", "did you mean 'epochs'?")),
    "-p of a wrong type": (
        (*NB, "-p", "epochs=many"),
        ("-p epochs: params.epochs = 'many' is not a whole number", "5"),
    ),
    "-p a float for an int": ((*NB, "-p", "epochs=1.5"), ("-p epochs: params.epochs = 1.5 is not a whole number",)),
    "--set without =": ((*RUN, "--set", "resources.nodes"), ("'resources.nodes' is not KEY=VALUE",)),
    "--set unknown": ((*RUN, "--set", "resources.node=2"), ("--set resources.node", "did you mean 'nodes'?")),
    "--set unknown table": ((*RUN, "--set", "a.b.c=2"), ("--set a.b.c", "unknown key 'a'")),
    "--set of a wrong type": ((*RUN, "--set", "resources.nodes=two"), ("--set resources.nodes:", "'two'", COUNT)),
    "--set into a value": ((*RUN, "--set", "script.x=2"), ("--set script.x: 'script' is not a table",)),
    "--set with dots": (
        (*RUN, "--set", "resources..nodes=2"),
        ("'resources..nodes' is not a key", "resources.nodes=2"),
    ),
    "--set base": ((*RUN, "--set", "base=other.toml"), ("--set base", "in the job file")),
    "--set a second work": ((*RUN, "--set", "notebook=work.ipynb"), ("notebook and script are both set",)),
    "--set a name": ((*RUN, "--set", "name=a b"), ("--set name: name = 'a b' is not a job name",)),
    "unknown site": (
        (*RUN, "--site", "ft4"),
        ("--site: unknown site 'ft4'", "ft3, generic, local", "did you mean 'ft3'?"),
    ),
    "no such site file": ((*RUN, "--site", "none.toml"), ("unknown site 'none.toml'",)),
    "an absurd site": ((*RUN, "--site", f"{'x' * 300}.toml"), ("unknown site",)),
    "status at no site": (("status", "--site", "ft4"), ("unknown site 'ft4'",)),
    "show no site": (("site", "show", "ft4"), ("unknown site 'ft4'",)),
    "run at a cluster": ((*RUN, "--site", "ft3"), ("site 'ft3' has a queue", "hpcml submit JOB", "--site local")),
    "submit to no queue": (("submit", "good.toml", "--site", "local"), ("site 'local' has no queue", "hpcml run JOB")),
    "render without a queue": (("render", "good.toml", "--site", "local"), ("has no queue", "--site generic")),
    "init of nothing": (("init", "none.py"), ("no script or notebook at none.py",)),
    "init of a folder": (("init", "."), (". is a folder, not a script or notebook", "name a file in it")),
    "init of an absurd name": (("init", "x" * 300), ("no script or notebook at",)),
    "init over a file": (("init", "train.py", "-o", "good.toml"), ("good.toml is there already", "-o")),
    "a negative number of runs": (("runs", "list", "-n", "-1"), ("-1",)),
    "keep a negative number": (("runs", "prune", "--keep", "-1"), ("-1",)),
    "a negative rank": (("logs", "--rank", "-1"), ("-1",)),
}


@pytest.mark.parametrize(("words", "says"), COMMAND_LINES.values(), ids=COMMAND_LINES.keys())
def test_a_wrong_command_line(desk: Desk, words: tuple[str, ...], says: tuple[str, ...]) -> None:
    desk.write({"nb.toml": IN_NOTEBOOK})
    desk.refused(*words, says=says)


# ------------------------------------------------------------------ the environment

ENVIRONMENTS: dict[str, tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]] = {
    "devices": ({"HPCML_DEVICES": "tpu"}, RUN, ("HPCML_DEVICES: 'tpu' is not a kind of device", "auto, gpu, cpu")),
    "devices in the queue": (
        {"HPCML_DEVICES": "tpu"},
        ("submit", "good.toml", "--site", "ft3"),
        ("HPCML_DEVICES: 'tpu' is not a kind of device", "auto, gpu, cpu"),
    ),
    "port": ({"HPCML_PORT": "http"}, RUN, ("HPCML_PORT: 'http' is no port", "1024 to 65535")),
    "a low port": ({"HPCML_PORT": "80"}, RUN, ("HPCML_PORT: '80' is no port", "1024 to 65535")),
    "a port at the end": (
        {"HPCML_PORT": "65535"},
        (*RUN, "--set", "resources.tasks_per_node=2"),
        ("'65535' is no port for 2 ranks", "1024 to 65534"),
    ),
    "site": ({"HPCML_SITE": "ft4"}, RUN, ("$HPCML_SITE: unknown site 'ft4'", "did you mean 'ft3'?")),
    "runs is a file": (
        {"HPCML_RUNS": "good.toml"},
        RUN,
        ("no run directory can be made in", "good.toml", "HPCML_RUNS"),
    ),
    "runs below a file": ({"HPCML_RUNS": "good.toml/runs"}, RUN, ("no run directory can be made in", "HPCML_RUNS")),
    "runs in /proc": ({"HPCML_RUNS": "/proc/runs"}, RUN, ("no run directory can be made in /proc/runs", "HPCML_RUNS")),
    "submit to a file": (
        {"HPCML_RUNS": "good.toml"},
        ("submit", "good.toml", "--site", "ft3"),
        ("no run directory can be made in", "HPCML_RUNS"),
    ),
    "a site's variable": ({"LUSTRE": ""}, ("submit", "good.toml", "--site", "ft3"), ("$LUSTRE, which is not set",)),
    "python": ({"HPCML_PYTHON": "/no/python"}, RUN, ("/no/python", "HPCML_PYTHON")),
    "python that isn't on PATH": ({"HPCML_PYTHON": "python9"}, RUN, ("python9", "HPCML_PYTHON")),
    "project": ({"HPCML_PROJECT": "none"}, ("run", "command.toml"), ("HPCML_PROJECT: no folder at", "project/none")),
}


@pytest.mark.parametrize(("variables", "words", "says"), ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
def test_a_wrong_variable(
    desk: Desk,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    words: tuple[str, ...],
    says: tuple[str, ...],
) -> None:
    desk.write({"command.toml": 'command = ["true"]\n'})
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    desk.refused(*words, says=says)


def test_check_sees_that_runs_is_a_file(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HPCML_RUNS", "good.toml")
    before = desk.everything()
    assert hpcml(["check", "good.toml", "--site", "local"]) == 2
    assert "can't be written to" in capsys.readouterr().out
    assert desk.everything() == before


def test_a_jobs_own_python_that_is_not_there(desk: Desk) -> None:
    desk.write({"bad.toml": WORK + '[env]\npython = "$HOME/none/bin/python"\n'})
    desk.refused("run", "bad.toml", says=("none/bin/python", "env.python"))


# ------------------------------------------------------------------ sites

BAD_SITES = {
    "not TOML": ("a b\n", "not valid TOML"),
    "not UTF-8": ("description = '\udcff'\n", "not valid TOML"),
    "unknown key": ("core_per_gpu = 8\n", "did you mean 'cores_per_gpu'?"),
    "unknown limit": ("[limits]\nnode = 8\n", "did you mean 'nodes'?"),
    "unknown limit of a partition": ("[partitions.a]\nnode = 8\n", "'partitions.a.node'"),
    "text for a number": ("cores_per_gpu = '8'\n", "cores_per_gpu = '8' has the wrong type"),
    "a negative number": ("cores_per_gpu = -8\n", "cores_per_gpu = -8"),
    "a number for a list": ("modules = 3\n", "modules = 3 has the wrong type"),
    "text for a list": ("modules = 'cuda'\n", "a list of strings"),
    "a number for text": ("runs = 3\n", "runs = 3 has the wrong type"),
    "no such scheduler": ("scheduler = 'pbs'\n", "slurm, local"),
    "limits is no table": ("limits = 3\n", "limits = 3 is not a table"),
    "time that is none": ("[limits]\nmax_time = '1 day'\n", "max_time = '1 day' is not a time limit"),
    "a request without a number": ("gpu_request = 'gpu:a100'\n", "does not say how many GPUs"),
}


@pytest.mark.parametrize(("text", "says"), BAD_SITES.values(), ids=BAD_SITES.keys())
def test_a_wrong_site_file(desk: Desk, text: str, says: str) -> None:
    desk.write({"own.toml": text.encode(errors="surrogateescape")})
    desk.refused("submit", "good.toml", "--site", "own.toml", says=("own.toml", says))
    desk.refused("site", "show", "own.toml", says=("own.toml", says))


# ------------------------------------------------------------------ no Slurm, or a silent one


def without(desk: Desk, *names: str) -> None:
    tools = Path(os.environ["PATH"].split(":")[0])
    for name in names:
        (tools / name).unlink()
    os.environ["PATH"] = str(tools)  # monkeypatch puts it back


def test_without_slurm_nothing_can_be_queued_but_rendered(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    without(desk, "sinfo", "sbatch", "squeue", "scontrol", "scancel", "sacct", "srun")
    desk.write({"two.toml": WORK})
    for words in (["submit", "good.toml"], ["compare", "good.toml", "two.toml"]):
        desk.refused(*words, "--site", "generic", says=("is not on PATH: no Slurm here", "hpcml run JOB"))
    desk.refused("site", "detect", says=("is not on PATH: no Slurm here", "scripts/devcluster"))
    assert hpcml(["render", "good.toml", "--site", "generic"]) == 0
    assert "#SBATCH --job-name=good" in capsys.readouterr().out


def test_sinfo_alone_does_not_queue(desk: Desk) -> None:
    without(desk, "sbatch")
    desk.refused("submit", "good.toml", "--site", "generic", says=("sbatch is not on PATH", "hpcml run JOB"))


def test_a_silent_controller_is_3(desk: Desk) -> None:
    tools = Path(os.environ["PATH"].split(":")[0])
    (tools / "sinfo").write_text("#!/bin/sh\necho 'sinfo: error: Unable to contact slurm controller' >&2\nexit 1\n")
    for verb in ("submit", "check"):
        says = ("controller does not answer", "scontrol ping")
        desk.refused(verb, "good.toml", "--site", "generic", says=says, code=3)


def test_sbatch_refuses(desk: Desk) -> None:
    tools = Path(os.environ["PATH"].split(":")[0])
    (tools / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid qos specification' >&2\nexit 1\n")
    runs = desk.home / "runs"
    rundir.create(runs, "earlier").make()
    os.environ["HPCML_RUNS"] = str(runs)
    try:
        desk.refused(
            "submit", "good.toml", "--site", "generic", says=("sbatch refused", "Invalid qos", "hpcml check JOB")
        )
    finally:
        del os.environ["HPCML_RUNS"]


def test_a_project_too_large_for_a_snapshot_leaves_no_run(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcml.snapshot.MOST_FILES", 3)
    monkeypatch.setenv("HPCML_RUNS", str(desk.home / "runs"))
    rundir.create(desk.home / "runs", "earlier").make()
    desk.write({"two.toml": WORK})
    for words in (RUN, ("compare", "good.toml", "two.toml", "--site", "local"), ("submit", "good.toml")):
        desk.refused(*words, says=("holds more than 3 files", "HPCML_PROJECT"))


# ------------------------------------------------------------------ comparisons

BASE = 'notebook = "work.ipynb"\nexperiment = "E"\n'
UNFAIR = {
    "global_batch": ("[params]\nglobal_batch = 64\n", "global_batch differs: one has 32, two has 64"),
    "seed": ("[params]\nseed = 2\n", "seed differs: one has 1, two has 2"),
    "epochs": ("[params]\nepochs = 7\n", "epochs differs: one has 5, two has 7"),
    "data": ('[params]\ndata = "other"\n', "data differs: one has mnist, two has other"),
    "keras": ('keras = "3"\n', "keras differs: one has legacy, two has 3"),
    "precision": ('precision = "mixed_float16"\n', "precision differs: one has float32, two has mixed_float16"),
    "cores": ("[resources]\ncpus_per_task = 3\n", "cores per run differs: one has 2, two has 3"),
}


@pytest.mark.parametrize(("text", "says"), UNFAIR.values(), ids=UNFAIR.keys())
def test_an_unfair_comparison(desk: Desk, text: str, says: str) -> None:
    notebook = json.dumps(NOTEBOOK).replace('"lr = 0.1\\n"', '"lr = 0.1\\nglobal_batch = 32\\nseed = 1\\n"')
    assert "global_batch" in notebook
    base = 'notebook = "fair.ipynb"\nexperiment = "E"\n[resources]\ncpus_per_task = 2\n'
    desk.write({"fair.ipynb": notebook, "base.toml": base, "one.toml": 'base = "base.toml"\n'})
    desk.write({"two.toml": f'base = "base.toml"\n{text}'})
    says_all = (f"compare: {says}", "the same for all", "in the base job that the variants share")
    desk.refused("compare", "one.toml", "two.toml", "--site", "ft3", says=says_all)


def test_everything_unfair_is_listed_at_once(desk: Desk) -> None:
    desk.write({"one.toml": IN_NOTEBOOK, "two.toml": f'{IN_NOTEBOOK}keras = "3"\n[params]\nepochs = 1\n'})
    desk.refused("compare", "one.toml", "two.toml", says=("keras differs", "epochs differs"))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["good.toml"], "one job alone can't be compared"),
        (["good.toml", "good.toml"], "good is given twice"),
        (["good.toml", "logs.toml"], "logs"),  # a variant's folder lies beside these
        (["good.toml", "status.json.toml"], "status.json"),
    ],
)
def test_what_is_no_comparison(desk: Desk, files: list[str], says: str) -> None:
    desk.write({"logs.toml": WORK, "status.json.toml": WORK})
    for site in ("local", "ft3"):
        desk.refused("compare", *files, "--site", site, says=(says, "two jobs or more, each of its own name"))


# ------------------------------------------------------------------ runs


def a_run(desk: Desk, name: str = "mine", **marker: object) -> rundir.RunDir:
    run = rundir.create(desk.project / "runs", name)
    rundir.write_json(run.plan, {"name": name, "nodes": 1, "tasks_per_node": 2, "site": "local", "work": "script"})
    run.log(0).write_text("one line\n")
    if marker:
        rundir.write_json(run.status, marker)
    return run


@pytest.mark.parametrize("verb", ["status", "logs", "cancel", "sync"])
@pytest.mark.parametrize(
    "reference", ["none", "4711", "../runs/{run}", "{run}/..", "{root}/{run}", "", "{run}/code", "x" * 300]
)
def test_no_such_run(desk: Desk, verb: str, reference: str) -> None:
    run = a_run(desk, state="COMPLETED", final=True, exit_code=0)
    wanted = reference.format(run=run.id, root=run.root)
    desk.refused(verb, wanted, "--site", "local", says=(f"no run {wanted!r}", run.id, "hpcml runs list"))


@pytest.mark.parametrize("verb", ["status", "logs", "cancel", "sync"])
def test_no_runs_at_all(desk: Desk, verb: str) -> None:
    desk.refused(verb, "--site", "local", says=("no runs in", "hpcml run JOB"))


def test_a_run_is_not_cancelled_from_another_machine(desk: Desk) -> None:
    run = a_run(desk)
    rundir.claim(run)
    rundir.write_json(run.owner, {**rundir.read_json(run.owner), "host": "node7"})
    desk.refused("cancel", "--site", "local", says=(f"run {run.id} runs on node7", f"hpcml cancel {run.id} there"))


def test_an_interactive_session_is_not_cancelled(desk: Desk) -> None:
    run = a_run(desk)
    rundir.write_json(run.plan, {**rundir.read_json(run.plan), "work": "session"})
    rundir.claim(run)  # this process runs it
    says = (f"run {run.id} is a process, not a job", "Ctrl-C in its terminal", f"kill {os.getpid()}\n")
    desk.refused("cancel", "--site", "local", says=says)


def test_no_scancel(desk: Desk) -> None:
    run = a_run(desk)
    rundir.write_json(run.submitted, {"slurm_job_id": 4711})
    without(desk, "scancel", "squeue")
    desk.refused("cancel", "--site", "local", says=("is not on PATH: no Slurm here",))


@pytest.mark.parametrize("follow", [[], ["--follow"]])
def test_logs_of_a_rank_that_is_not_there(desk: Desk, follow: list[str]) -> None:
    a_run(desk, state="COMPLETED", final=True, exit_code=0)
    desk.refused("logs", "--rank", "7", *follow, "--site", "local", says=("no rank 7", "0 to 1"))


# ------------------------------------------------------------------ as a process of its own


def typed(desk: Desk, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **more}
    argv = [sys.executable, "-m", "hpcml", *words]
    return subprocess.run(argv, cwd=desk.project, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "bad.toml"], "did you mean 'gpus_per_node'?"),
        (["submit", "bad.toml", "--site", "ft3"], "did you mean 'gpus_per_node'?"),
        (["stauts"], "did you mean 'status'?"),
        (
            ["run", "--jsn", "good.toml"],
            "hpcml: no option '--jsn'\n  allowed: -p, --param, --set, --step, --from, --of, --site, --json, --help\n",
        ),
        (["run", "--jsn", "good.toml"], "fix: did you mean '--json'?"),
        (["run", "--zzz", "good.toml"], "fix: hpcml run --help"),
        (["run"], "hpcml: JOB is missing\n  fix: hpcml run [OPTIONS] JOB;"),
        (["run", "good.toml", "more"], "hpcml: got unexpected extra argument (more)\n  fix: hpcml run --help"),
        (
            ["run", "good.toml", "-p", "epochs"],
            "hpcml: -p: 'epochs' is not KEY=VALUE\n  allowed: KEY=VALUE\n  fix: such as -p",
        ),
        (["run", "good.toml", "--set", "foo"], "fix: such as --set resources.nodes=2"),
        (["runs", "prune", "--max-gb", "x"], "hpcml: invalid value for '--max-gb': 'x' is not a number\n  fix: "),
        (["status", "--json", "--site", "local"], "no runs in"),
        ([], "Usage: hpcml"),
    ],
)
def test_the_exit_code_of_the_process(desk: Desk, words: list[str], says: str) -> None:
    desk.write({"bad.toml": resources("gpu_per_node = 2")})
    before = desk.everything()
    done = typed(desk, *words)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr
    assert desk.everything() == before


def test_a_terminal_without_unicode(desk: Desk) -> None:
    done = typed(desk, "check", "good.toml", "--site", "local", PYTHONIOENCODING="ascii", HPCML_PYTHON=sys.executable)
    assert done.returncode == 0 and "local" in done.stdout, done.stderr


def test_a_file_name_that_is_no_unicode(desk: Desk) -> None:
    done = typed(desk, "run", os.fsdecode(b"\xff.toml"))
    assert done.returncode == 2 and "no job file at" in done.stderr and "Traceback" not in done.stderr
