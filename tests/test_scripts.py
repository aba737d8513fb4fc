"""The shell scripts' own words, setup's fast path, and the committed batch scripts, which are what render gives."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hpcml.cli.root import run as hpcml

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = REPOSITORY / "scripts"
NAMES = sorted(path.name for path in SCRIPTS.iterdir() if path.is_file())
JOBS = sorted(path.stem for path in (REPOSITORY / "jobs").glob("*.sbatch"))


def typed(script: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(script), *words],
        env={**os.environ, **more},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


# ------------------------------------------------------------------ what they say of themselves


@pytest.mark.parametrize("name", NAMES)
def test_every_script_tells_how_it_is_used(name: str) -> None:
    assert os.access(SCRIPTS / name, os.X_OK)
    done = typed(SCRIPTS / name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert name in done.stdout and len(done.stdout.splitlines()) >= 4
    header = (SCRIPTS / name).read_text().splitlines()[1].removeprefix("#").strip()
    assert done.stdout.splitlines()[0].strip() == header, "the header is the help"
    assert "set -euo pipefail" not in done.stdout and not done.stdout.startswith("#")


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("quickstart", ["now"], "takes no arguments, got: now (scripts/quickstart --help)"),
        ("quickstart", ["--fast"], "takes no arguments, got: --fast"),
        ("setup", ["--tset"], '"--tset": no such argument; --help shows them'),
        ("setup", ["--test", "now"], '"now": no such argument'),
        ("devcluster", ["upp"], 'no command "upp"; there are: up, shell'),
        ("devcluster", ["up", "--nodes", "none"], '--nodes is a whole number from 1 to 64, not "none"'),
    ],
)
def test_a_wrong_argument_is_2_and_does_nothing(name: str, words: list[str], says: str) -> None:
    before = sorted(os.listdir(REPOSITORY))
    done = typed(SCRIPTS / name, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{name}: " in done.stderr and says in done.stderr
    assert sorted(os.listdir(REPOSITORY)) == before


# ------------------------------------------------------------------ setup

STUB = """#!/bin/sh
# A Python that writes down what it was asked to do and makes a virtual environment of itself.
echo "$*" >>{record}
case "$*" in
  *"-m venv "*) mkdir -p .venv/bin && cp {self} .venv/bin/python ;;
  *"pip install"*fail*) exit 1 ;;
esac
exit {code}
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with scripts/setup, its locks, and a stub Python; nothing is downloaded."""
    folder = tmp_path / "my clone"
    for name in ("scripts/setup", "scripts/lib/apt.bash", "pyproject.toml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    for name in ("tensorflow", "test", "torch"):
        (folder / "envs" / name).mkdir(parents=True)
        (folder / "envs" / name / "requirements.txt").write_text("click==8.1.7\n")
    make_python(folder)
    return folder


def make_python(clone: Path, code: int = 0) -> None:
    python = clone.parent / "python"
    record = f"'{clone.parent}/record'"
    python.write_text(STUB.format(record=record, self=f"'{python}'", code=code))
    python.chmod(0o755)


def asked(clone: Path) -> list[str]:
    """What Python was asked to do since the last look."""
    record = clone.parent / "record"
    words = record.read_text().splitlines() if record.exists() else []
    record.unlink(missing_ok=True)
    return words


def setup(clone: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return typed(clone / "scripts/setup", *words, PYTHON=str(clone.parent / "python"))


def test_setup_makes_the_environment_once(clone: Path) -> None:
    first = setup(clone)
    assert first.returncode == 0 and "done: .venv is ready" in first.stderr, first.stderr
    words = asked(clone)
    assert "-m venv .venv" in words
    (locked,) = [line for line in words if "--require-hashes" in line]
    assert "envs/tensorflow/requirements.txt" in locked and "envs/test" not in locked
    assert any(line.endswith("--no-deps -e .") for line in words)

    again = setup(clone)
    assert (again.returncode, again.stdout, again.stderr, asked(clone)) == (0, "", "", []), "nothing to do"


def test_setup_takes_note_of_a_changed_lock_and_of_what_the_tests_need(clone: Path) -> None:
    setup(clone)
    asked(clone)
    (clone / "envs/tensorflow/requirements.txt").write_text("click==8.1.8\n")
    assert "done" in setup(clone).stderr
    words = asked(clone)
    assert any("--require-hashes" in line for line in words) and "-m venv .venv" not in words
    assert "done" in setup(clone, "--test").stderr
    assert any("envs/test/requirements.txt" in line for line in asked(clone))
    for more in ([], ["--test"]):
        assert (setup(clone, *more).stderr, asked(clone)) == ("", []), "more than is asked for is up to date too"


def test_setup_that_was_cut_off_begins_anew(clone: Path) -> None:
    setup(clone)
    (clone / ".venv/hpcml-setup").unlink()
    asked(clone)
    assert setup(clone).returncode == 0
    assert any("--reinstall" in line for line in asked(clone))


def test_setup_in_a_clone_that_was_moved_makes_another_environment(clone: Path) -> None:
    setup(clone)
    asked(clone)
    moved = clone.rename(clone.parent / "moved")
    assert setup(moved).returncode == 0
    assert any("-m venv --clear .venv" in line for line in asked(moved))


def test_setup_says_what_it_needs(clone: Path) -> None:
    make_python(clone, code=1)
    done = setup(clone)
    assert done.returncode == 2 and "is no Python 3.11, 3.12 or 3.13" in done.stderr
    (clone / "envs/tensorflow/requirements.txt").unlink()
    done = setup(clone)
    assert done.returncode == 2 and "envs/tensorflow/requirements.txt is missing" in done.stderr


# ------------------------------------------------------------------ the committed batch scripts


def test_every_job_that_runs_has_its_batch_script() -> None:
    wanted = [path.stem for path in (REPOSITORY / "jobs").glob("*.toml") if "\nbase" in f"\n{path.read_text()}"]
    assert sorted(wanted) == JOBS


@pytest.mark.parametrize("name", JOBS)
def test_a_batch_script_is_what_render_gives(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert hpcml(["render", f"jobs/{name}.toml", "--site", "generic"]) == 0
    fix = f"after a change: hpcml render jobs/{name}.toml --site generic >jobs/{name}.sbatch"
    assert capsys.readouterr().out == (REPOSITORY / "jobs" / f"{name}.sbatch").read_text(), fix


@pytest.mark.parametrize("name", JOBS)
def test_a_batch_script_is_the_same_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hpcml(["render", str(REPOSITORY / f"jobs/{name}.toml"), "--site", "generic"]) == 0
    assert capsys.readouterr().out == (REPOSITORY / "jobs" / f"{name}.sbatch").read_text()
