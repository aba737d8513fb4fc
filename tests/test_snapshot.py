"""Snapshots: what of a project a run works in, and the parameters put into its copy of a script."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcml import snapshot
from hpcml.errors import HpcmlError
from hpcml.launch import sbatch


def git(folder: Path, *words: str) -> None:
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *identity, *words], cwd=folder, env=environment, check=True, capture_output=True)


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


@pytest.fixture
def checkout(project: Path) -> Path:
    """A git checkout with every kind of file."""
    write(project / "train.py", "committed")
    write(project / "lib" / "model.py", "committed")
    write(project / "gone.py", "committed")
    write(project / ".gitignore", "/data/\n*.log\n/scratch/\n")
    (project / "alias.py").symlink_to("lib/model.py")
    git(project, "init")
    git(project, "add", "-A")
    git(project, "commit", "-m", "one")
    write(project / "train.py", "edited")
    write(project / "lib" / "new.py", "untracked")
    (project / "gone.py").unlink()
    write(project / "data" / "mnist" / "images", "big")
    write(project / "lib" / "x.log", "ignored")
    return project


@pytest.fixture(params=["copied", "packed"])
def taken(request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Takes a snapshot by both ways, and unpacks it as the batch script does."""

    def take(project: Path, **options: Any) -> Path:
        target, archive = project.parent / "code", project.parent / "code.tar"
        if request.param == "copied":
            snapshot.take(project, target, **options)
            return target
        snapshot.take(project, target, archive=archive, **options)
        if archive.exists():
            assert archive.stat().st_mode & 0o777 == 0o600
            unpack = re.search(r"(tar -xf .*?) &&", sbatch._UNPACK)
            assert unpack
            words = shlex.split(unpack[1].replace("$run/code.tar", str(archive)).replace("$run/code", str(target)))
            subprocess.run(words, check=True, umask=0o077)
        return target

    return take


def names(folder: Path) -> set[str]:
    """Every path below a folder, without what lies behind links."""
    return {os.path.relpath(Path(here, name), folder) for here, subs, files in os.walk(folder) for name in subs + files}


def test_a_checkout_is_copied_with_uncommitted_edits(checkout: Path, taken: Callable[..., Path]) -> None:
    code = taken(checkout)
    assert (code / "train.py").read_text() == "edited"
    assert (code / "lib" / "new.py").read_text() == "untracked"
    assert not (code / "gone.py").exists() and not (code / ".git").exists()
    write(checkout / "train.py", "edited later")
    assert (code / "train.py").read_text() == "edited"


def test_what_git_ignores_is_linked_at_its_place(checkout: Path, taken: Callable[..., Path]) -> None:
    code = taken(checkout)
    assert (code / "data").is_symlink() and (code / "data" / "mnist" / "images").read_text() == "big"
    assert (code / "lib" / "x.log").is_symlink() and not (code / "lib").is_symlink()


def test_the_count_is_of_files_copied_or_linked(checkout: Path) -> None:
    (checkout / "gone.py").write_text("back")
    assert snapshot.take(checkout, checkout.parent / "code") == 6


def test_links_go_on_pointing_where_they_did(project: Path, taken: Callable[..., Path]) -> None:
    outside = write(project.parent / "outside" / "weights", "w").parent
    write(project / "lib" / "model.py", "m")
    for name, to in {
        "inside.py": "lib/model.py",
        "dangling": "lib/absent",
        "up": "../outside",
        "absolute": str(outside),
        "absolute.txt": str(outside / "weights"),
    }.items():
        (project / name).symlink_to(to)
    git(project, "init")
    git(project, "add", "-A")
    code = taken(project)
    assert os.readlink(code / "inside.py") == "lib/model.py"
    assert os.readlink(code / "dangling") == "lib/absent"
    for name in ("up", "absolute"):
        assert (code / name / "weights").read_text() == "w", name
    assert (code / "absolute.txt").read_text() == "w" and not (code / "absolute.txt").is_symlink()


@pytest.mark.parametrize("with_git", [True, False])
def test_any_name_is_copied(project: Path, with_git: bool, taken: Callable[..., Path]) -> None:
    odd = ["two\nlines.py", "ñandú 火.py", " spaces .py", "-x.py", 'quote".py', "$(touch pwned).py", "tab\t.py"]
    raw = os.fsdecode(b"not-utf8-\xff.py")
    for name in [*odd, raw]:
        write(project / "a" / name, "odd")
    if with_git:
        git(project, "init")
        git(project, "add", "-A")
    assert {path.name for path in (taken(project) / "a").iterdir()} == {*odd, raw}


@pytest.mark.parametrize("with_git", [True, False])
def test_a_large_file_is_linked_also_behind_a_link(project: Path, with_git: bool, taken: Callable[..., Path]) -> None:
    for path in (project / "large.bin", project.parent / "elsewhere.bin"):
        with path.open("wb") as file:
            file.truncate(snapshot.LARGEST_BYTES + 1)
    with (project / "largest.bin").open("wb") as file:
        file.truncate(snapshot.LARGEST_BYTES)
    (project / "link.bin").symlink_to(project.parent / "elsewhere.bin")
    if with_git:
        git(project, "init")
    code = taken(project)
    assert (code / "large.bin").resolve() == project / "large.bin"
    assert (code / "link.bin").resolve() == project.parent / "elsewhere.bin"
    assert not (code / "largest.bin").is_symlink()


def test_without_git_hidden_folders_and_environments_stay_behind(project: Path, taken: Callable[..., Path]) -> None:
    for name in ("train.py", ".env", "lib/runs/code.py", ".cache/x", "venv/pyvenv.cfg", "venv/x", "runs/old/x"):
        write(project / name)
    for name in ("__pycache__/x", "mlruns/x", "node_modules/x"):
        write(project / name)
    write(project.parent / "outside" / "x")
    (project / "data").symlink_to(project.parent / "outside")
    (project / "empty").mkdir()
    code = taken(project)
    assert {n for n in names(code) if (code / n).is_file()} == {"train.py", ".env", "lib/runs/code.py"}
    assert (code / "data" / "x").read_text() == "x"


def test_without_git_on_path_the_folder_is_copied(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: Callable[..., Path]
) -> None:
    write(project / "train.py")
    git(project, "init")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert names(taken(project)) == {"train.py"}


@pytest.mark.parametrize("with_git", [True, False])
@pytest.mark.parametrize("by_link", [True, False])
def test_the_runs_folder_is_no_part_of_it(project: Path, with_git: bool, by_link: bool) -> None:
    write(project / "train.py")
    write(project / "results" / "20260101-000000-a" / "code" / "train.py")
    (project.parent / "link").symlink_to(project)
    if with_git:
        git(project, "init")
    target = project / "results" / "now" / "code"
    target.parent.mkdir()
    snapshot.take(project, target, skip=(project.parent / "link" if by_link else project) / "results")
    assert names(target) == {"train.py"}


def test_a_project_inside_the_runs_folder_is_copied_all_the_same(project: Path, taken: Callable[..., Path]) -> None:
    write(project / "train.py")
    assert names(taken(project, skip=project.parent)) == {"train.py"}


def test_the_work_is_a_copy_though_git_ignores_it(checkout: Path, taken: Callable[..., Path]) -> None:
    script = write(checkout / "scratch" / "deep" / "try.py", "mine")
    write(checkout / "scratch" / "deep" / "input", "in")
    write(checkout / "scratch" / "other", "o")
    code = taken(checkout, work="scratch/deep/try.py")
    copy = code / "scratch" / "deep" / "try.py"
    copy.write_text("changed")
    assert script.read_text() == "mine" and copy.resolve() == copy
    assert (code / "scratch" / "deep" / "input").read_text() == "in"
    assert (code / "scratch" / "other").read_text() == "o"


def test_the_work_is_a_copy_though_it_is_large(project: Path, taken: Callable[..., Path]) -> None:
    with (project / "big.ipynb").open("wb") as file:
        file.truncate(snapshot.LARGEST_BYTES + 1)
    assert not (taken(project, work="big.ipynb") / "big.ipynb").is_symlink()


def test_too_many_files_are_refused(project: Path, monkeypatch: pytest.MonkeyPatch, taken: Callable[..., Path]) -> None:
    monkeypatch.setattr(snapshot, "MOST_FILES", 3)
    for number in range(3):
        write(project / str(number))
    assert len(names(taken(project))) == 3
    write(project / "one too many")
    with pytest.raises(HpcmlError, match="HPCML_PROJECT"):
        snapshot.take(project, project.parent / "code2")


def test_a_file_that_cannot_be_copied_is_named(project: Path) -> None:
    write(project / "sub" / "train.py")
    target = project.parent / "code"
    write(target / "sub", "a file where a folder must be")
    with pytest.raises(HpcmlError, match=r"train\.py can't be copied"):
        snapshot.take(project, target)


def test_a_snapshot_is_private(project: Path, taken: Callable[..., Path]) -> None:
    write(project / "lib" / "x.py")
    before = os.umask(0)
    try:
        code = taken(project)
    finally:
        os.umask(before)
    assert code.stat().st_mode & 0o777 == 0o700


# ------------------------------------------------------------------ parameters

SCRIPT = """\
# %% [markdown] about tags and "parameters"
# text
# %% tags=["parameters"]
lr = 0.1
name = "a"
# %%
print(ascii([lr, name]))
"""


def run(script: Path) -> object:
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    return eval(done.stdout, {"inf": float("inf"), "nan": float("nan")})


HOSTILE = [
    "'",
    '"',
    '"""',
    "\\",
    "$(touch pwned)",
    "`x`",
    "two\nlines",
    "\r\n",
    "ñ 火 🦊",
    "# %%",
    "\x0c\x1b\u2028",
    "",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_values_arrive_unchanged(tmp_path: Path, name: str) -> None:
    script = write(tmp_path / "t.py", SCRIPT)
    snapshot.inject(script, {"lr": 1e-300, "name": name})
    assert run(script) == [1e-300, name]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), True, -3, 2**70])
def test_numbers_arrive_with_their_type(tmp_path: Path, value: float) -> None:
    script = write(tmp_path / "t.py", SCRIPT)
    snapshot.inject(script, {"lr": value})
    (got, _) = run(script)  # type: ignore[misc]
    assert (got, type(got)) == (value, type(value))


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.integers(), st.booleans(), st.floats(allow_nan=False)))
def test_a_literal_is_the_value(value: str | float) -> None:
    got = eval(snapshot.python_literal(value))
    assert (got, type(got)) == (value, type(value))


def test_nan_is_a_literal_too() -> None:
    got = eval(snapshot.python_literal(float("nan")))
    assert got != got


def last_cell(text: str) -> str:
    return text.replace("# %%\nprint", "print")


def no_newline(text: str) -> str:
    return last_cell(text).replace("print(ascii([lr, name]))\n", "pass")


def windows(text: str) -> str:
    return text.replace("\n", "\r\n")


@pytest.mark.parametrize("change", [str, last_cell, no_newline, windows])
def test_the_cell_comes_after_the_parameters_cell(tmp_path: Path, change: Callable[[str], str]) -> None:
    script = tmp_path / "t.py"
    script.write_bytes(change(SCRIPT).encode())
    snapshot.inject(script, {"lr": 2.5})
    lines = script.read_text().splitlines()
    at = lines.index('# %% tags=["injected-parameters"]')
    assert lines[at + 1] == "lr = 2.5"
    assert at > lines.index('name = "a"')
    following = [line for line in lines[at + 2 :] if line]
    assert following == (["# %%", "print(ascii([lr, name]))"] if change in (str, windows) else [])


def test_the_rest_of_the_script_stays_byte_for_byte(tmp_path: Path) -> None:
    script = tmp_path / "t.py"
    odd = b'# -*- coding: latin-1 -*-\n# %% tags=["parameters"]\nlr = 1\n# %%\nx = "\xe9 \x0c# %% \x85"\n'
    script.write_bytes(odd)
    snapshot.inject(script, {"lr": 2})
    head, tail = odd[: odd.index(b"# %%\n")], odd[odd.index(b"# %%\n") :]
    assert script.read_bytes() == head + b'# %% tags=["injected-parameters"]\nlr = 2\n\n' + tail
