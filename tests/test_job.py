"""Job files: base chains, overrides, types, and every problem told at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcml import job
from hpcml.errors import HpcmlError

WORK = 'command = ["true"]\n'
HOSTILE = [
    'say "hi"',
    "it's",
    "$(touch pwned)",
    "`touch pwned`",
    "two\nlines",
    "ñandú 火 🦊",
    "a # b",
    "5 # five",
    "1, _ = 2",
    "C:\\new",
    "",
    " spaces ",
]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def problems(error: pytest.ExceptionInfo[HpcmlError]) -> list[str]:
    return [str(problem) for problem in error.value.problems]


# ------------------------------------------------------------------ base


def test_a_chain_merges_tables_key_by_key_and_replaces_arrays(tmp_path: Path) -> None:
    write(
        tmp_path,
        "shared/root.toml",
        'name = "root"\nscript = "train.py"\n[params]\nlr = 0.1\nepochs = 5\n[slurm]\nextra = ["--a", "--b"]\n',
    )
    write(tmp_path, "shared/middle.toml", 'base = "root.toml"\n[params]\nepochs = 7\n[resources]\nnodes = 2\n')
    top = write(tmp_path, "jobs/top.toml", 'base = "../shared/middle.toml"\n[slurm]\nextra = ["--c"]\n')
    loaded = job.load(top)
    assert loaded.params == {"lr": 0.1, "epochs": 7}
    assert (loaded.resources.nodes, loaded.slurm.extra) == (2, ("--c",))
    assert (loaded.work, loaded.target) == ("script", ("train.py",))
    assert loaded.origins["params.lr"].endswith("root.toml: params.lr")
    assert loaded.origins["params.epochs"].endswith("middle.toml: params.epochs")
    assert loaded.origins["slurm.extra"] == f"{top}: slurm.extra"


def test_a_name_is_not_inherited_and_neither_is_its_origin(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", 'name = "base-name"\n' + WORK)
    loaded = job.load(write(tmp_path, "variant.toml", 'base = "base.toml"\n'))
    assert loaded.name == "variant"
    assert "name" not in loaded.origins


@pytest.mark.parametrize("own", ['notebook = "a.ipynb"', 'script = "b.py"', 'command = ["c"]'])
def test_a_variants_own_work_takes_the_place_of_its_bases(tmp_path: Path, own: str) -> None:
    write(tmp_path, "base.toml", 'script = "base.py"\n')
    loaded = job.load(write(tmp_path, "v.toml", f'base = "base.toml"\n{own}\n'))
    assert loaded.work == own.split(" ")[0]
    assert "base.py" not in loaded.target


def test_a_cycle_names_the_chain(tmp_path: Path) -> None:
    write(tmp_path, "b.toml", 'base = "c.toml"\n')
    write(tmp_path, "c.toml", 'base = "./b.toml"\n')
    with pytest.raises(HpcmlError, match=r"cycle: b\.toml → c\.toml → b\.toml"):
        job.load(write(tmp_path, "a.toml", 'base = "b.toml"\n'))


def test_a_missing_base_names_who_wants_it(tmp_path: Path) -> None:
    with pytest.raises(HpcmlError, match=r"v\.toml: base: no job file at .*nowhere\.toml"):
        job.load(write(tmp_path, "v.toml", 'base = "nowhere.toml"\n'))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a = ", "not valid TOML"),
        ("base = 3\n", "base = 3 is not a path"),
        (WORK + "name = 'a b'\n", "not a job name"),
        (WORK + f"name = '{'x' * 65}'\n", "not a job name"),
        (WORK + "name = '../up'\n", "not a job name"),
        ("script = 'a.py'\n" + WORK, "both set"),
        ("", "nothing to run"),
        ("command = []\n", "command is empty"),
        ("command = 'ls -l'\n", "not a list of strings"),
        (WORK + "strategy = 'mirored'\n", "did you mean 'mirrored'"),
        (WORK + "strateg = 'mirrored'\n", "did you mean 'strategy'"),
        (WORK + "[resources]\ngpus = 2\n", "unknown key 'resources.gpus'"),
        (WORK + "[resources]\nnodes = 0\n", "resources.nodes = 0 is not a whole number"),
        (WORK + "[resources]\nnodes = true\n", "resources.nodes = True is not"),
        (WORK + "[resources]\nmem_gb = '32'\n", "GiB a node"),
        (WORK + "resources = 3\n", "resources = 3 is not a table"),
        (WORK + "params = 3\n", "params = 3 is not a table"),
        (WORK + "[params]\nx = [1]\n", "params.x = [1] is not a single value"),
        (WORK + "[params]\n'a b' = 1\n", "parameter 'a b' is not a name"),
        (WORK + "[params]\nx = '\\u0000'\n".replace("'", '"'), "NUL"),
        (WORK + "[slurm]\npartition = 'a\\nb'\n".replace("'", '"'), "not a line of text"),
        (WORK + "[slurm]\nextra = ['-N 2']\n", "not an option of sbatch"),
        (WORK + "[slurm]\nextra = ['--comment=a\\nb']\n".replace("'", '"'), "not an option of sbatch"),
        (WORK + "[env]\nname = 'a'\npython = 'b'\n", "both set"),
        (WORK + "[env.vars]\nA = 1\n", "env.vars.A = 1 is not a string"),
        (WORK + "[env.vars]\n'A=B' = '1'\n", "not a variable's name"),
        (WORK + "profile = [10, 20]\n", "profile = [10, 20] is not a table"),
        (WORK + "[profile]\n", "profile.steps is missing"),
        (WORK + "[profile]\nstep = [10, 20]\n", "did you mean 'steps'?"),
        (WORK + "[profile]\nsteps = 10\n", "profile.steps = 10 is not a first and a last step"),
        (WORK + "[profile]\nsteps = []\n", "profile.steps = [] is not a first and a last step"),
        (WORK + "[profile]\nsteps = [10]\n", "is not a first and a last step"),
        (WORK + "[profile]\nsteps = [10, 20, 30]\n", "is not a first and a last step"),
        (WORK + "[profile]\nsteps = ['10', '20']\n", "is not a first and a last step"),
        (WORK + "[profile]\nsteps = [true, 20]\n", "is not a first and a last step"),
        (WORK + "[profile]\nsteps = [1.0, 20]\n", "is not a first and a last step"),
        (WORK + "[profile]\nsteps = [0, 20]\n", "is not a first and a last step"),
        (WORK + "[profile]\nsteps = [5, 10000000000]\n", "is not a first and a last step"),
        (WORK + "[profile]\nsteps = [20, 10]\n", "fix: [10, 20]"),
        (WORK + "[profile]\nsteps = [1, 201]\n", "201 steps long"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, "j.toml", text)
    with pytest.raises(HpcmlError) as error:
        job.load(path)
    assert says in str(error.value)
    assert str(path) in str(error.value)


def test_all_problems_come_at_once_each_with_its_origin(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", WORK + "[resources]\nnodes = -1\n")
    top = write(tmp_path, "top.toml", 'base = "base.toml"\nstrategy = "none"\n[params]\nx = [1]\n')
    with pytest.raises(HpcmlError) as error:
        job.load(top, {"bad name": "1"}, {"resources.time": "soon"})
    told = problems(error)
    assert len(told) == 5
    for origin, what in [
        (f"{top}: strategy", "'none'"),
        ("base.toml: resources.nodes", "-1"),
        ("--set resources.time", "'soon'"),
        (f"{top}: params.x", "[1]"),
        ("-p bad name", "'bad name'"),
    ]:
        assert any(origin in line.splitlines()[0] and what in line for line in told), (origin, told)


def test_a_broken_params_table_is_told_also_with_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "j.toml", WORK + "params = 3\n")
    with pytest.raises(HpcmlError, match="params = 3 is not a table"):
        job.load(path, {"lr": "0.1"})


# ------------------------------------------------------------------ -p and --set


@pytest.mark.parametrize(
    ("in_file", "typed", "value"),
    [
        ("0.1", "1", 1.0),
        ("0.1", "1e-3", 1e-3),
        ("5", "7", 7),
        ("5", "7.5", 7.5),
        ("true", "false", False),
        ("true", "False", False),
        ("'5'", "7", "7"),
        ("'5'", '"7"', '"7"'),
        ("'5'", "true", "true"),
        ("5", "many", "many"),
    ],
)
def test_a_parameter_is_typed_like_what_it_replaces(tmp_path: Path, in_file: str, typed: str, value: object) -> None:
    path = write(tmp_path, "j.toml", f"{WORK}[params]\nx = {in_file}\n")
    got = job.load(path, {"x": typed}).params["x"]
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("7", 7),
        ("0.5", 0.5),
        ("true", True),
        ('"7"', "7"),
        ("relu", "relu"),
        ("2026-01-01", "2026-01-01"),
        ("[1, 2]", "[1, 2]"),
        ("010", "010"),
        ("5 # five", "5 # five"),
        ("1, _ = 2", "1, _ = 2"),
        ("", ""),
    ],
)
def test_a_new_parameter_is_a_toml_literal_or_a_string(tmp_path: Path, typed: str, value: object) -> None:
    got = job.load(write(tmp_path, "j.toml", WORK), {"x": typed}).params["x"]
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_string_parameter_arrives_unchanged(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, "j.toml", WORK + "[params]\nx = 'default'\n")
    assert job.load(path, {"x": text}).params["x"] == text


@given(st.text())
def test_any_text_over_a_string_stays_that_text(text: str) -> None:
    assert job.typed_like("default", text) == text


@given(st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.booleans()))
def test_a_number_as_python_prints_it_is_read_back(value: object) -> None:
    got = job.typed_like(value, str(value))
    assert (got, type(got)) == (value, type(value))


def test_set_reaches_into_tables_and_makes_them(tmp_path: Path) -> None:
    path = write(tmp_path, "j.toml", WORK + "[resources]\nnodes = 1\n")
    settings = {"resources.nodes": "2", "slurm.partition": "gpu", "slurm.extra": '["--x"]', "env.vars.A": "'1'"}
    settings |= {"slurm.max_requeues": "2", "tuning.prefetch": "-1", "tuning.jit_compile": "true"}
    loaded = job.load(path, None, settings)
    assert (loaded.resources.nodes, loaded.slurm.partition, loaded.slurm.extra) == (2, "gpu", ("--x",))
    assert (loaded.slurm.max_requeues, loaded.tuning.prefetch, loaded.tuning.jit_compile) == (2, -1, True)
    assert loaded.env.vars == {"A": "1"}
    assert loaded.origins["resources.nodes"] == "--set resources.nodes"


@pytest.mark.parametrize("key", ["resources..nodes", "resources.", "name.x", "resources.nodes.x"])
def test_set_refuses_what_is_no_key(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, "j.toml", "name = 'n'\n" + WORK + "[resources]\nnodes = 1\n")
    with pytest.raises(HpcmlError, match=f"--set {key}"):
        job.load(path, None, {key: "1"})


@pytest.mark.parametrize("steps", [(1, 1), (10, 20), (1, 200), (10**9, 10**9)])
def test_a_profile_is_a_first_and_a_last_step(tmp_path: Path, steps: tuple[int, int]) -> None:
    path = write(tmp_path, "j.toml", WORK)
    assert job.load(path).profile is None
    assert job.load(path, None, {"profile.steps": str(list(steps))}).profile == steps
    write(tmp_path, "j.toml", f"{WORK}[profile]\nsteps = {list(steps)}\n")
    loaded = job.load(path)
    assert loaded.profile == steps
    assert loaded.origins["profile.steps"] == f"{path}: profile.steps"


def test_a_profile_that_is_wrong_on_the_command_line_is_said_to_come_from_there(tmp_path: Path) -> None:
    with pytest.raises(HpcmlError, match=r"--set profile\.steps: profile\.steps = \[20, 10\] ends before it begins"):
        job.load(write(tmp_path, "j.toml", WORK), None, {"profile.steps": "[20,10]"})


# ------------------------------------------------------------------ time, project


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("10:30", 630),
        ("00:30:00", 1800),
        ("100:00:00", 360_000),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("1-00:00:01", 86_401),
        (" 5 ", 300),
    ],
)
def test_slurms_time_forms(text: str, seconds: int) -> None:
    assert job.seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "1-", "-5", "1:2:3:4", "1-1:1:1:1", "infinite", "1.5"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError):
        job.seconds(text)


@pytest.mark.parametrize("text", ['""', '"0"', '"00:00:00"', "30", '"soon"'])
def test_a_job_needs_a_time_limit_in_quotes(tmp_path: Path, text: str) -> None:
    with pytest.raises(HpcmlError, match="is not a time limit"):
        job.load(write(tmp_path, "j.toml", f"{WORK}[resources]\ntime = {text}\n"))


@given(st.integers(0, 10**7))
def test_a_clock_is_read_back(total: int) -> None:
    assert job.seconds(job.clock(total)) == total


def test_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p" / "jobs" / "deep" / "j.toml"
    path.parent.mkdir(parents=True)
    assert job.project_of(path) == path.parent
    assert job.project_of(path.parent.parent / "j.toml") == tmp_path / "p"
    (tmp_path / "p" / "pyproject.toml").touch()
    assert job.project_of(path) == tmp_path / "p"
    monkeypatch.setenv("HPCML_PROJECT", str(tmp_path))
    assert job.project_of(path) == tmp_path
