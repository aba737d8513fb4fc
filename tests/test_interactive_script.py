"""interactive_1node_2gpus.sh with a stub srun, which writes down its arguments and its environment."""

from __future__ import annotations

import os
import pty
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
SCRIPT = PROJECT / "interactive_1node_2gpus.sh"

COURSE = ["-N", "1", "--ntasks=1", "--gres=gpu:2", "--time=00:59:00", "--mem=16G", "-c", "64"]
SHELL = ["--pty", "bash"]


@dataclass(frozen=True)
class Outcome:
    """How the script ended, and what srun was given; both None where srun was never called."""

    code: int
    out: str
    err: str
    argv: list[str] | None
    env: dict[str, str] | None


@dataclass(frozen=True)
class Login:
    """A login node: a PATH with a stub srun that exits with 7, and a project without .venv."""

    directory: Path
    project: Path
    path: str

    def type(self, *argv: str, script: Path | None = None, terminal: bool = True, **env: str) -> Outcome:
        """Run the script as a person would, with standard input and output a terminal or none."""
        record = self.directory / "record"
        for file in record.iterdir():
            file.unlink()
        variables = {"PATH": self.path, "HOME": str(self.directory), "RECORD": str(record), **env}
        ours, theirs = pty.openpty()
        try:
            done = subprocess.run(
                [str(script or self.project / "interactive_1node_2gpus.sh"), *argv],
                env=variables,
                stdin=theirs if terminal else subprocess.DEVNULL,
                stdout=theirs if terminal else subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                timeout=30,
            )
        finally:
            os.close(theirs)
            os.close(ours)
        argv_file, env_file = record / "argv", record / "env"
        called = argv_file.exists()
        return Outcome(
            code=done.returncode,
            out=done.stdout or "",
            err=done.stderr,
            argv=argv_file.read_text().split("\0")[:-1] if called else None,
            env=dict(line.split("=", 1) for line in env_file.read_text().split("\0")[:-1]) if called else None,
        )


@pytest.fixture
def login(tmp_path: Path) -> Login:
    """The script in a project of its own, so that this checkout's .venv plays no part."""
    project = tmp_path / "my project"
    (project / "scripts" / "lib").mkdir(parents=True)
    for name in ("scripts/interactive_1node_2gpus.sh", "scripts/lib/on_node.bash"):
        shutil.copy(PROJECT / name, project / name)
    (project / "interactive_1node_2gpus.sh").symlink_to("scripts/interactive_1node_2gpus.sh")
    (tmp_path / "record").mkdir()
    stub(tmp_path / "bin" / "srun", 'printf "%s\\0" "$@" >"$RECORD/argv"; env -0 >"$RECORD/env"; exit 7')
    return Login(tmp_path, project, f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def stub(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def make_venv(path: Path) -> None:
    """A virtual environment as far as activation goes: bin/activate and one command."""
    stub(path / "bin" / "which-venv", f'echo "from {path.name}"')
    activate = f'VIRTUAL_ENV="{path}"; export VIRTUAL_ENV; PATH="{path}/bin:$PATH"; export PATH\n'
    (path / "bin" / "activate").write_text(activate)


def test_the_default_is_the_request_of_the_course(login: Login) -> None:
    done = login.type()
    assert done.argv == COURSE + SHELL
    assert done.code == 7, "the exit status is srun's"


def test_says_what_is_asked_and_how_to_cancel(login: Login) -> None:
    said = login.type("--gres=gpu:a100:1", "--time", "2:00:00").err
    assert len(said.splitlines()) == 1
    for word in ("gpu:a100:1", "64 cores", "16G", "2:00:00", "queue", "Ctrl-C"):
        assert word in said


def test_the_link_at_the_top_is_the_script() -> None:
    assert os.readlink(SCRIPT) == "scripts/interactive_1node_2gpus.sh"
    assert os.access(SCRIPT, os.X_OK)


def replaced(old: str, new: str) -> list[str]:
    assert old in COURSE
    return [new if word == old else word for word in COURSE]


def added(*words: str) -> list[str]:
    return [*COURSE[:3], *words, *COURSE[3:]]


# variable, flags that mean the same, a value, the request that follows
SETTINGS = [
    ("HPCML_TIME", ["-t", "--time"], "1-02:30", replaced("--time=00:59:00", "--time=1-02:30")),
    ("HPCML_MEM", ["--mem"], "128G", replaced("--mem=16G", "--mem=128G")),
    ("HPCML_CORES", ["-c", "--cores", "--cpus-per-task"], "8", replaced("64", "8")),
    ("HPCML_GPUS", ["-G", "--gpus"], "1", replaced("--gres=gpu:2", "--gres=gpu:1")),
    ("HPCML_GRES", ["--gres"], "gpu:a100:2", replaced("--gres=gpu:2", "--gres=gpu:a100:2")),
    ("HPCML_PARTITION", ["-p", "--partition"], "short", added("--partition=short")),
    ("HPCML_QOS", ["-q", "--qos"], "short", added("--qos=short")),
    ("HPCML_ACCOUNT", ["-A", "--account"], "course24", added("--account=course24")),
    ("HPCML_CONSTRAINT", ["-C", "--constraint"], "a100&nvlink", added("--constraint=a100&nvlink")),
    ("HPCML_RESERVATION", ["--reservation"], "lesson", added("--reservation=lesson")),
    ("HPCML_JOB_NAME", ["-J", "--job-name"], "my $lesson", added("--job-name=my $lesson")),
]
BY_FLAG = [(flag, value, request) for _, flags, value, request in SETTINGS for flag in flags]


@pytest.mark.parametrize(("variable", "value", "request_"), [(v, value, want) for v, _, value, want in SETTINGS])
def test_each_variable(login: Login, variable: str, value: str, request_: list[str]) -> None:
    assert login.type(**{variable: value}).argv == request_ + SHELL


@pytest.mark.parametrize(("flag", "value", "request_"), BY_FLAG)
def test_each_flag_as_two_words_and_as_one(login: Login, flag: str, value: str, request_: list[str]) -> None:
    one = f"{flag}={value}" if flag.startswith("--") else f"{flag}{value}"
    assert login.type(flag, value).argv == request_ + SHELL
    assert login.type(one).argv == request_ + SHELL


@pytest.mark.parametrize(
    ("variable", "flag", "value", "request_"), [(v, f[0], val, want) for v, f, val, want in SETTINGS]
)
def test_a_flag_wins_over_its_variable(login: Login, variable: str, flag: str, value: str, request_: list[str]) -> None:
    other = {"HPCML_TIME": "5", "HPCML_MEM": "1G", "HPCML_CORES": "2", "HPCML_GPUS": "4", "HPCML_GRES": "gpu:4"}
    assert login.type(flag, value, **{variable: other.get(variable, "other")}).argv == request_ + SHELL


def test_an_empty_variable_is_no_variable(login: Login) -> None:
    assert login.type(**dict.fromkeys((variable for variable, *_ in SETTINGS), "")).argv == COURSE + SHELL


@pytest.mark.parametrize(
    ("flag", "variables", "gres"),
    [
        (["--gpus", "1"], {"HPCML_GRES": "gpu:a100:2"}, "--gres=gpu:1"),
        (["--gres", "gpu:a100:1"], {"HPCML_GPUS": "2"}, "--gres=gpu:a100:1"),
    ],
)
def test_one_way_of_asking_for_gpus_silences_the_others_variable(
    login: Login, flag: list[str], variables: dict[str, str], gres: str
) -> None:
    assert login.type(*flag, **variables).argv == replaced("--gres=gpu:2", gres) + SHELL


@pytest.mark.parametrize("time", ["59", "59:30", "0:59:00", "1-0", "1-02:30", "1-02:30:00"])
def test_every_time_format_of_slurm_is_let_through(login: Login, time: str) -> None:
    assert login.type("--time", time).argv == replaced("--time=00:59:00", f"--time={time}") + SHELL


# arguments, variables, how the complaint begins
BAD = [
    (["--time", "1h"], {}, '--time: "1h" is no Slurm time'),
    (["--time", "1:2:3:4"], {}, '--time: "1:2:3:4" is no Slurm time'),
    ([], {"HPCML_TIME": "soon"}, 'HPCML_TIME: "soon" is no Slurm time'),
    (["--mem", "16"], {}, '--mem: "16" is no memory size'),
    (["--mem", "16GB"], {}, '--mem: "16GB" is no memory size'),
    ([], {"HPCML_MEM": "G"}, 'HPCML_MEM: "G" is no memory size'),
    (["-c", "0"], {}, '-c: "0" is no number of cores'),
    ([], {"HPCML_CORES": "all"}, 'HPCML_CORES: "all" is no number of cores'),
    (["-G", "two"], {}, '-G: "two" is no number of GPUs'),
    (["--gres", "2"], {}, '--gres: "2" is no GPU request'),
    (["--gres", "gpu:a100:"], {}, '--gres: "gpu:a100:" is no GPU request'),
    (["--gpus=1", "--gres=gpu:1"], {}, "--gpus and --gres: both ask for GPUs"),
    ([], {"HPCML_GPUS": "1", "HPCML_GRES": "gpu:1"}, "HPCML_GPUS and HPCML_GRES: both ask for GPUs"),
    (["-p", "a b"], {}, '-p: "a b" is no partition'),
    ([], {"HPCML_QOS": "a b"}, 'HPCML_QOS: "a b" is no qos'),
    (["-J", "a\nb"], {}, '-J: "a\nb" is no job name'),
    (["--nodes", "2"], {}, "--nodes: no such option"),
    (["--nodes=2"], {}, "--nodes: no such option"),
    (["--mem"], {}, "--mem: needs a value"),
    (["--mem="], {}, "--mem: needs a value"),
    (["--mem", "--dry-run"], {}, "--mem: needs a value"),
    (["nvidia-smi"], {}, '"nvidia-smi": a command for the node goes after --'),
    ([""], {}, '"": a command for the node goes after --'),
]


@pytest.mark.parametrize(("argv", "env", "complaint"), BAD)
def test_a_bad_value_is_refused_before_the_queue(
    login: Login, argv: list[str], env: dict[str, str], complaint: str
) -> None:
    done = login.type(*argv, **env)
    assert (done.code, done.argv) == (2, None)
    assert done.err.startswith(f"interactive_1node_2gpus.sh: {complaint}")
    assert done.err.count("interactive_1node_2gpus.sh: ") == 1, "one mistake is one complaint"


def test_all_bad_values_are_listed_at_once(login: Login) -> None:
    done = login.type("--mem=16", "--bogus", "1", "-c", "x", "ls", HPCML_TIME="soon", HPCML_QOS="a b")
    assert (done.code, done.argv) == (2, None)
    assert len(done.err.splitlines()) == 6
    for word in ("--mem", "--bogus", "-c", "ls", "HPCML_TIME", "HPCML_QOS"):
        assert word in done.err


def test_a_command_goes_after_two_dashes_and_keeps_its_words(login: Login) -> None:
    words = ["python", "-c", "print('a  b')", "--time", "x y", "", "$HOME", "*"]
    assert login.type("--", *words).argv == [*COURSE, "--pty", *words]


def test_two_dashes_and_nothing_is_a_shell(login: Login) -> None:
    assert login.type("--mem=1G", "--").argv == replaced("--mem=16G", "--mem=1G") + SHELL


def test_without_a_terminal_a_command_gets_no_pty(login: Login) -> None:
    assert login.type("--", "nvidia-smi", terminal=False).argv == [*COURSE, "nvidia-smi"]


def test_without_a_terminal_a_shell_is_refused(login: Login) -> None:
    done = login.type(terminal=False)
    assert (done.code, done.argv) == (2, None)
    assert "needs a terminal" in done.err


def test_dry_run_prints_what_would_run_and_runs_nothing(login: Login) -> None:
    argv = ["-J", "two words", "-C", "a&b", "--", "echo", "a  b", "it's", "$HOME", ""]
    really = login.type(*argv).argv
    shown = login.type("--dry-run", *argv, terminal=False)
    assert (shown.code, shown.argv, shown.err) == (0, None, "")
    assert shlex.split(shown.out) == ["srun", *(really or [])]
    assert shown.out.count("\n") == 1


def test_what_dry_run_prints_can_be_pasted(login: Login) -> None:
    argv = ["-J", "two words", "--", "echo", "a  b", "it's", "$HOME", "tab\there"]
    shown = login.type("--dry-run", *argv, terminal=False).out
    record = login.directory / "record"
    subprocess.run(["bash", "-c", shown], env={"PATH": login.path, "RECORD": str(record)}, check=False)
    assert (record / "argv").read_text().split("\0")[:-1] == login.type(*argv).argv


def test_dry_run_needs_no_slurm(login: Login) -> None:
    (login.directory / "bin" / "srun").unlink()
    shown = login.type("--dry-run", terminal=False)
    assert (shown.code, shown.out) == (0, shlex.join(["srun", *COURSE, *SHELL]) + "\n")


def test_dry_run_refuses_bad_values_too(login: Login) -> None:
    done = login.type("--dry-run", "--mem=16", terminal=False)
    assert (done.code, done.out) == (2, "")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_header_and_names_every_setting(login: Login, flag: str) -> None:
    done = login.type(flag, terminal=False)
    assert (done.code, done.argv, done.err) == (0, None, "")
    assert done.out.startswith("interactive_1node_2gpus.sh: ")
    assert "set -euo" not in done.out
    for variable, flags, _, _ in SETTINGS:
        for name in (variable, *flags, "--dry-run", "HPCML_ACTIVATE", "HPCML_MODULES", "HPCML_PROJECT"):
            assert name in done.out


def test_without_srun_it_says_where_to_go(login: Login) -> None:
    bare = login.directory / "bare"
    bare.mkdir()
    for name in ("bash", "env", "readlink", "dirname", "sed"):
        (bare / name).symlink_to(shutil.which(name) or name)
    done = login.type(PATH=str(bare))
    assert done.code == 2
    for word in ("srun is not on PATH", "log in to the cluster", "scripts/devcluster up", "scripts/devcluster shell"):
        assert word in done.err
    assert "asking for" not in done.err


def test_inside_an_allocation_it_refuses_and_names_the_job(login: Login) -> None:
    done = login.type(SLURM_JOB_ID="4711")
    assert (done.code, done.argv) == (2, None)
    assert "already in job 4711" in done.err
    assert "--jobid=4711" in done.err


def test_what_an_earlier_job_left_behind_does_not_shape_this_one(login: Login) -> None:
    left = {"SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_MEM_PER_CPU": "100", "SLURM_NTASKS": "4"}
    kept = {"SLURM_CONF": "/x/slurm.conf", "SLURM_ACCOUNT": "mine", "SLURM_PARTITION": "short", "SBATCH_QOS": "q"}
    env = login.type(**left, **kept).env or {}
    assert {key: value for key, value in env.items() if key.startswith(("SLURM_", "SBATCH_"))} == kept


def test_the_project_is_where_the_script_is_unless_set(login: Login) -> None:
    assert (login.type().env or {})["HPCML_PROJECT"] == str(login.project)
    link = login.directory / "link.sh"
    link.symlink_to(login.project / "interactive_1node_2gpus.sh")
    assert (login.type(script=link).env or {})["HPCML_PROJECT"] == str(login.project)
    assert (login.type(HPCML_PROJECT="/else/where").env or {})["HPCML_PROJECT"] == "/else/where"


def test_a_venv_of_the_project_is_activated_on_the_node(login: Login) -> None:
    make_venv(login.project / ".venv")
    on_node = str(login.project / "scripts/lib/on_node.bash")
    assert login.type().argv == [*COURSE, *SHELL, "--rcfile", on_node]
    assert login.type("--", "ipython", "a b.py").argv == [*COURSE, "--pty", "bash", on_node, "ipython", "a b.py"]
    assert login.type(HPCML_ACTIVATE="0").argv == COURSE + SHELL
    assert login.type("--", "ls", HPCML_ACTIVATE="0").argv == [*COURSE, "--pty", "ls"]


def node(login: Login, *argv: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """What srun would start on the node: `bash`, with on_node.bash where the script asked for it."""
    bash = ["bash", str(login.project / "scripts/lib/on_node.bash"), *argv]
    if not argv:
        bash = ["bash", "--rcfile", bash[1], "-i"]
    variables = {"PATH": login.path, "HOME": str(login.directory), **env}
    return subprocess.run(bash, env=variables, input=stdin, capture_output=True, text=True, timeout=30)


def test_the_venv_comes_before_what_bashrc_puts_into_path(login: Login) -> None:
    make_venv(login.project / ".venv")
    make_venv(login.directory / "conda")
    (login.directory / ".bashrc").write_text(f'PATH="{login.directory}/conda/bin:$PATH"\nalias hi="echo from bashrc"\n')
    assert node(login, stdin="which-venv\nhi\n").stdout == "from .venv\nfrom bashrc\n"
    assert node(login, stdin="which-venv\n", HPCML_ACTIVATE="0").stdout == "from conda\n"


def test_an_active_venv_stays_and_survives_bashrc(login: Login) -> None:
    make_venv(login.directory / "mine")
    make_venv(login.directory / "conda")
    mine = str(login.directory / "mine")
    on_node = str(login.project / "scripts/lib/on_node.bash")
    assert login.type(VIRTUAL_ENV=mine).argv == [*COURSE, *SHELL, "--rcfile", on_node]
    make_venv(login.project / ".venv")
    (login.directory / ".bashrc").write_text(f'PATH="{login.directory}/conda/bin:$PATH"\n')
    assert node(login, stdin="which-venv\n", VIRTUAL_ENV=mine).stdout == "from mine\n"


def test_a_command_finds_the_venv_and_the_project(login: Login) -> None:
    make_venv(login.project / ".venv")
    assert node(login, "which-venv").stdout == "from .venv\n"
    assert node(login, "sh", "-c", 'echo "$HPCML_PROJECT"').stdout == f"{login.project}\n"
    assert node(login, "sh", "-c", 'printf "[%s]" "$@"; exit 5', "x", "a  b", "").stdout == "[a  b][]"
    assert node(login, "sh", "-c", "exit 5").returncode == 5


MODULE = 'module() { printf "module %s\\n" "$*"; [[ $* != *absent* ]]; }; export -f module\n'


def test_modules_are_loaded_on_the_node_when_named(login: Login) -> None:
    wanted = "cesga/system miniconda3/22.11"
    on_node = str(login.project / "scripts/lib/on_node.bash")
    assert login.type(HPCML_MODULES=wanted).argv == [*COURSE, *SHELL, "--rcfile", on_node]
    (login.directory / "lmod" / "init").mkdir(parents=True)
    (login.directory / "lmod" / "init" / "bash").write_text(MODULE)
    lmod = str(login.directory / "lmod")
    assert node(login, "echo", "done", HPCML_MODULES=wanted, LMOD_PKG=lmod).stdout == f"module load {wanted}\ndone\n"
    assert node(login, "echo", "done", LMOD_PKG=lmod).stdout == "done\n"


def test_a_module_that_does_not_load_stops_a_command_but_not_a_shell(login: Login) -> None:
    (login.directory / ".bashrc").write_text(MODULE)
    shell = node(login, stdin="echo still here\n", HPCML_MODULES="absent/1")
    assert "still here" in shell.stdout
    assert "could not load absent/1" in shell.stderr
    command = node(login, "echo", "not reached", HPCML_MODULES="absent/1")
    assert (command.returncode, command.stdout) == (1, "")
    assert "could not load absent/1" in command.stderr
