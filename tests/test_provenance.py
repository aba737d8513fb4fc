"""Where a run comes from, in real git repositories and environments of each kind."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

import hpcml
from hpcml import job, plan, site
from hpcml.rundir import RunDir, read_json
from hpcml.tracking import installed, provenance, revision

git_only = pytest.mark.skipif(not shutil.which("git"), reason="git: not installed")


def git(folder: Path, *words: str, **environment: str) -> str:
    own = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "HOME": str(folder), **environment}
    who = ["-c", "user.name=Rosalind", "-c", "user.email=r@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run(
        ["git", *who, *words], cwd=folder, env={**os.environ, **own}, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with one commit: a text file, a binary one, a link, a program."""
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "train.py").write_text("lr = 0.1\nprint(lr)\n")
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 4)
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "link").symlink_to("train.py")
    (folder / ".gitignore").write_text("ignored/\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Files of a work tree: name → content; a link's is its target."""
    names = (path for path in folder.rglob("*") if ".git" not in path.parts and (path.is_symlink() or path.is_file()))
    return {
        str(path.relative_to(folder)): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in names
    }


def restored(repo: Path, found: revision.Revision, clone: Path) -> dict[str, bytes]:
    """Files of a fresh clone at that revision with the patch applied."""
    git(repo.parent, "clone", "-q", str(repo), str(clone))
    git(clone, "checkout", "-q", found.revision)
    if found.patch:
        (clone.parent / "code.patch").write_bytes(found.patch)
        git(clone, "apply", "--binary", str(clone.parent / "code.patch"))
    return tree(clone)


# ---- the code ---------------------------------------------------------------------------------------------------------


@git_only
def test_a_clean_checkout_has_a_revision_and_no_patch(repo: Path) -> None:
    found = revision.look(repo)
    assert found == revision.Revision(revision=git(repo, "rev-parse", "HEAD"), branch="main")


@git_only
def test_revision_and_patch_give_back_the_edited_code_in_another_clone(repo: Path, tmp_path: Path) -> None:
    (repo / "train.py").write_bytes(b"lr = 0.2\r\nprint('\xc3\xa9')")  # no newline at the end, and CRLF
    (repo / "weights.bin").write_bytes(bytes(reversed(range(256))) * 5)
    git(repo, "mv", "run.sh", "start.sh")
    (repo / "link").unlink()
    (repo / "staged.py").write_text("new = 1\n")
    git(repo, "add", "staged.py")
    (repo / "sub").mkdir()
    (repo / "sub" / "untracked é [x]*.py").write_text("also = 2\n")
    (repo / "picture.png").write_bytes(b"\x89PNG\0\xff" * 20)
    (repo / "empty").touch()
    (repo / "ignored").mkdir()
    (repo / "ignored" / "data").write_text("not code")
    index = (repo / ".git" / "index").read_bytes()

    found = revision.look(repo)

    assert found.dirty and found.left_out == ()
    wanted = {name: content for name, content in tree(repo).items() if not name.startswith("ignored")}
    assert restored(repo, found, tmp_path / "clone") == wanted
    assert (repo / ".git" / "index").read_bytes() == index  # looking leaves no trace
    assert "??" in git(repo, "status", "--porcelain")


@git_only
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("diff.noprefix", "true"),
        ("diff.mnemonicPrefix", "true"),
        ("color.ui", "always"),
        ("diff.external", "false"),
        ("diff.relative", "true"),
        ("status.showUntrackedFiles", "no"),
        ("core.quotePath", "false"),
    ],
)
def test_the_patch_applies_whatever_git_is_configured_to_show(repo: Path, tmp_path: Path, key: str, value: str) -> None:
    git(repo, "config", key, value)
    (repo / "train.py").write_text("lr = 0.3\n")
    (repo / "nové.py").write_text("x = 1\n")
    assert restored(repo, revision.look(repo), tmp_path / "clone") == tree(repo)


@git_only
def test_variables_of_another_git_call_do_not_mislead(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    before = revision.look(repo)
    settings = {"GIT_DIR": f"{other}/.git", "GIT_WORK_TREE": str(other), "GIT_INDEX_FILE": "/nonexistent"}
    for name, value in {**settings, "GIT_LITERAL_PATHSPECS": "1", "GIT_EXTERNAL_DIFF": "false"}.items():
        monkeypatch.setenv(name, value)
    assert revision.look(repo) == before
    (repo / "train.py").write_text("edited\n")
    assert b"+edited" in revision.look(repo).patch


@git_only
def test_an_empty_repository_has_no_revision_yet(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "train.py").write_text("x = 1\n")
    git(tmp_path, "add", "train.py")
    found = revision.look(tmp_path)
    assert (found.revision, found.branch, found.dirty, found.patch) == ("", "main", True, b"")
    assert "nothing is committed" in found.left_out[0]


@git_only
def test_a_worktree_with_a_detached_head(repo: Path, tmp_path: Path) -> None:
    git(repo, "worktree", "add", "-q", "--detach", str(tmp_path / "tree"))
    (tmp_path / "tree" / "train.py").write_text("in the worktree\n")
    (tmp_path / "tree" / "new.py").write_text("new\n")
    found = revision.look(tmp_path / "tree")
    assert (found.revision, found.branch) == (git(repo, "rev-parse", "HEAD"), "")
    assert b"+in the worktree" in found.patch and b"+++ b/new.py" in found.patch
    assert not revision.look(repo).dirty


@git_only
def test_a_project_below_the_top_has_its_own_edits_only(repo: Path, tmp_path: Path) -> None:
    (repo / "part").mkdir()
    (repo / "part" / "a.py").write_text("a = 1\n")
    git(repo, "add", "part")
    git(repo, "commit", "-qm", "second")
    (repo / "train.py").write_text("elsewhere\n")
    assert not revision.look(repo / "part").dirty
    (repo / "part" / "a.py").write_text("a = 2\n")
    (repo / "part" / "b.py").write_text("b = 2\n")
    found = revision.look(repo / "part")
    git(repo, "checkout", "-q", "train.py")
    assert restored(repo, found, tmp_path / "clone") == tree(repo)


@git_only
def test_a_folder_that_a_repository_above_ignores_is_no_checkout(repo: Path) -> None:
    (repo / "ignored").mkdir()
    (repo / "ignored" / "train.py").write_text("x = 1\n")
    assert revision.look(repo / "ignored") == revision.Revision(note=f"git at {repo} tracks nothing of the project")


@git_only
@pytest.mark.skipif(os.geteuid() != 0, reason="root: needed to give files to somebody else")
def test_root_in_somebody_elses_repository(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["chown", "-R", "65534:65534", str(repo)], check=True)
    (repo / "train.py").write_text("edited\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    with pytest.raises(subprocess.CalledProcessError):  # git alone refuses
        git(repo, "status")
    assert b"+edited" in revision.look(repo).patch


@git_only
@pytest.mark.skipif(os.geteuid() != 0, reason="root: needed to give files to somebody else")
def test_a_repository_above_that_belongs_to_a_third_person_stays_refused(
    repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repo / "mine").mkdir()
    (repo / "mine" / "a.py").write_text("a = 1\n")
    git(repo, "add", ".")
    git(repo, "commit", "-qm", "second")
    for path in (repo, repo / ".git"):
        os.chown(path, 65534, 65534)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    assert revision.look(repo / "mine").note == "git refuses the checkout"


def test_without_git_or_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert revision.look(tmp_path).note in ("not a git checkout", "git is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert revision.look(tmp_path).note == "git is not installed"


@git_only
def test_a_broken_repository_is_a_note(tmp_path: Path) -> None:
    (tmp_path / ".git").write_text("gitdir: /nowhere\n")
    assert revision.look(tmp_path) == revision.Revision(note="git refuses the checkout")


@git_only
def test_a_patch_over_a_megabyte_is_cut_between_files_and_says_so(repo: Path, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (repo / name).write_text("".join(f"{name} {number:060}\n" for number in range(8_000)))  # 550 kB
    found = revision.look(repo)
    assert 0 < len(found.patch) <= revision.LARGEST_PATCH
    assert any("over" in line for line in found.left_out)
    got = restored(repo, found, tmp_path / "clone")
    assert got["a.txt"] == (repo / "a.txt").read_bytes() and "c.txt" not in got


@git_only
def test_large_and_private_files_are_named_but_not_taken(repo: Path) -> None:
    (repo / "train.py").write_text("small edit\n")
    (repo / "weights.bin").write_bytes(os.urandom(revision.LARGEST_PATCH + 1))
    (repo / "model.h5").write_bytes(bytes(revision.LARGEST_PATCH + 1))
    for name in (".env", "api_token.txt", "server.key"):
        (repo / name).write_text("hunter2\n")
    found = revision.look(repo)
    assert b"+small edit" in found.patch and b"hunter2" not in found.patch and b"weights" not in found.patch
    told = " ".join(found.left_out)
    assert all(name in told for name in ("weights.bin", "model.h5", ".env", "api_token.txt", "server.key"))


@git_only
def test_a_git_that_hangs_is_left(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "bin" / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(revision, "PATIENCE_S", 0.3)
    assert revision.look(repo).note == "git gave no answer in 0.3 s"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://rosalind:ghp_secret@example.org/lab/x.git", "https://example.org/lab/x.git"),
        ("https://ghp_secret@example.org:8443/lab/x.git?private_token=s", "https://example.org:8443/lab/x.git"),
        ("ssh://git:secret@example.org/lab/x.git", "ssh://git@example.org/lab/x.git"),
        ("git@example.org:lab/x.git", "git@example.org:lab/x.git"),
        ("/srv/git/x.git", "/srv/git/x.git"),
        ("https://[broken", ""),
    ],
)
def test_a_remote_is_shown_without_credentials(url: str, shown: str) -> None:
    assert revision.without_credentials(url) == shown


@git_only
def test_origin_is_preferred_among_remotes(repo: Path) -> None:
    git(repo, "remote", "add", "backup", "https://u:p@example.org/b.git")
    assert revision.look(repo).remote == "https://example.org/b.git"
    git(repo, "remote", "add", "origin", "https://u:p@example.org/o.git")
    assert revision.look(repo).remote == "https://example.org/o.git"


# ---- the environment ----------------------------------------------------------------------------------------------------


def environment(folder: Path, packages: dict[str, str], **options: bool) -> str:
    """Make an environment that has these distributions' metadata, and return its Python."""
    venv.create(folder, with_pip=False, symlinks=True, **options)
    packages_folder = next(folder.glob("lib/python3*/site-packages"))
    for name, version in packages.items():
        place = packages_folder / f"{name}-{version}.dist-info"
        place.mkdir()
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(folder / "bin" / "python")


def look(python: str, project: Path) -> dict[str, Any]:
    """What an environment's own Python tells of itself."""
    code = (
        "import json, sys; sys.path.append(sys.argv[2]); from pathlib import Path\n"
        "from hpcml.tracking import installed\n"
        "print(json.dumps(vars(installed.look(Path(sys.argv[1])))))"
    )
    source = str(Path(hpcml.__file__).parents[1])
    done = subprocess.run([python, "-I", "-c", code, project, source], check=True, capture_output=True, text=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_packages_are_what_the_interpreter_itself_reports(tmp_path: Path) -> None:
    python = environment(tmp_path / "env", {"Tensor_Flow.x": "2.21.0", "numpy": "2.4.6+local.1", "pkg": "2026.1.post1"})
    code = "import importlib.metadata as m; print('\\n'.join(f'{d.name}=={d.version}' for d in m.distributions()))"
    told = subprocess.run([python, "-I", "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    assert sorted(told) == ["Tensor_Flow.x==2.21.0", "numpy==2.4.6+local.1", "pkg==2026.1.post1"]
    found = look(python, tmp_path)
    assert found["packages"] == {"tensor-flow-x": "2.21.0", "numpy": "2.4.6+local.1", "pkg": "2026.1.post1"}
    assert (found["python"], found["python_version"]) == (python, sys.version.split()[0])


def test_this_interpreters_own_packages_are_all_there() -> None:
    import importlib.metadata as metadata

    names = (found.name for found in metadata.distributions() if found.name)
    wanted = {name.lower().replace("_", "-").replace(".", "-"): metadata.version(name) for name in names}
    assert installed.packages() == wanted


LOCK = "numpy==2.0 \\\n    --hash=sha256:aa\ntf-keras[extra]==2.21.0\npywin32==300 ; sys_platform == 'win32'\n"


def test_the_lock_is_the_one_that_says_what_is_installed(tmp_path: Path) -> None:
    python = environment(tmp_path / "env", {"numpy": "2.0", "tf_keras": "2.21.0", "ipython": "9.0"})
    (tmp_path / "envs" / "fits").mkdir(parents=True)
    (tmp_path / "envs" / "fits" / "requirements.txt").write_text(LOCK)
    for name, text in {"older": "numpy==1.9\n", "more": LOCK + "torch==2.0\n", "less": "numpy==2.0\n"}.items():
        (tmp_path / "envs" / name).mkdir()
        (tmp_path / "envs" / name / "requirements.txt").write_text(text)
    found = look(python, tmp_path)
    assert found["lock_file"] == "envs/fits/requirements.txt"
    assert found["lock"] == hashlib.sha256(LOCK.encode()).hexdigest()


@pytest.mark.parametrize(("name", "table"), [("uv.lock", "package"), ("pylock.toml", "packages")])
def test_a_toml_lock_may_hold_what_other_platforms_need(tmp_path: Path, name: str, table: str) -> None:
    python = environment(tmp_path / "env", {"numpy": "2.0"})
    entries = (("numpy", "2.0"), ("colorama", "0.4"))
    text = "".join(f'[[{table}]]\nname = "{package}"\nversion = "{v}"\n\n' for package, v in entries)
    (tmp_path / name).write_text(f"version = 1\n\n{text}")
    assert look(python, tmp_path)["lock_file"] == name
    (tmp_path / name).write_text(text.replace("2.0", "2.1"))
    assert look(python, tmp_path)["lock_file"] == ""


def test_without_a_lock_the_installed_packages_are_hashed(tmp_path: Path) -> None:
    one = look(environment(tmp_path / "a", {"numpy": "2.0", "zlib": "1.0"}), tmp_path)
    same = look(environment(tmp_path / "b", {"zlib": "1.0", "numpy": "2.0"}), tmp_path)
    other = look(environment(tmp_path / "c", {"zlib": "1.1", "numpy": "2.0"}), tmp_path)
    assert one["lock"] == same["lock"] == hashlib.sha256(b"numpy==2.0\nzlib==1.0\n").hexdigest() != other["lock"]


def test_data_versions_come_from_dvc_pointers(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mnist.npz.dvc").write_text(
        "outs:\n- md5: 8a61469f7ea1b51cbae51d4f78837e45\n  path: mnist.npz\n"
    )
    (tmp_path / "broken.dvc").write_bytes(b"\xff\0")
    assert provenance.data_versions(tmp_path) == {"data/mnist.npz": "md5:8a61469f7ea1b51cbae51d4f78837e45"}


# ---- in a run directory -------------------------------------------------------------------------------------------------


def a_plan(project: Path, **tree: object) -> plan.Plan:
    keys = {"name": "x", "command": ["true"], "resources": {"cpus_per_task": 1}, **tree}
    return plan.resolve(job.from_tree(keys, {}, project), site.load("local"))


@git_only
def test_a_run_directory_holds_it_all_and_params_are_flat(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repo / "train.py").write_text("edited\n")
    (repo / ".env").write_text("hunter2\n")
    run = RunDir(tmp_path / "runs", "r").make()
    monkeypatch.setattr(installed, "packages", lambda: {"tensorflow": "2.21.0", "leftpad": "1"})

    provenance.begin(run, a_plan(repo))()
    provenance.complete(run, tmp_path)

    assert (run.path / "packages.txt").read_text() == "leftpad==1\ntensorflow==2.21.0\n"
    assert b"+edited" in (run.path / "code.patch").read_bytes()
    assert read_json(run.path / "provenance.json")["packages"] == {"tensorflow": "2.21.0"}
    assert provenance.params(run) == {
        "git.revision": git(repo, "rev-parse", "HEAD"),
        "git.branch": "main",
        "git.dirty": "true",
        "git.left_out": ".env: untracked, may be private",
        "env.python": sys.version.split()[0],
        "env.lock": hashlib.sha256(b"leftpad==1\ntensorflow==2.21.0\n").hexdigest(),
        "env.lock_file": "installed packages",
        "env.tensorflow": "2.21.0",
    }
    assert {oct(path.stat().st_mode & 0o777) for path in run.path.iterdir() if path.is_file()} == {"0o600"}


def test_a_run_starts_without_provenance_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path, "r")  # not made: nothing can be written
    provenance.begin(run, a_plan(tmp_path))()
    assert "provenance is not recorded" in capsys.readouterr().err
    provenance.complete(run, tmp_path)
    assert "provenance is not recorded" in capsys.readouterr().err
    assert provenance.params(run) == {}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"code": 7, "packages": null}', '{"code": {"left_out": 3}}'])
def test_a_damaged_file_gives_what_is_left_of_it(tmp_path: Path, text: str) -> None:
    run = RunDir(tmp_path, "r").make()
    (run.path / "provenance.json").write_text(text)
    assert provenance.params(run) == {}


def test_no_framework_and_no_other_python_is_started_to_find_out(tmp_path: Path) -> None:
    """A submit waits for the first part, a job's first rank for the second: they read names, and start git alone."""
    code = (
        "import sys, json, subprocess\n"
        "started = []\n"
        "sys.addaudithook(lambda event, args: started.append(args[0]) if event == 'subprocess.Popen' else None)\n"
        "from pathlib import Path\n"
        "from hpcml.tracking import provenance, revision\n"
        f"revision.look(Path({str(tmp_path)!r}))\n"
        "later = 'hashlib' not in sys.modules\n"
        "from hpcml.tracking import installed\n"
        f"installed.look(Path({str(tmp_path)!r}))\n"
        "foreign = {name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names - {'hpcml', '__main__'}\n"
        "print(json.dumps([started, later, sorted(name for name in foreign if not name.startswith('_'))]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    started, later, foreign = json.loads(done.stdout)
    assert {Path(word).name for word in started} <= {"git"}
    assert later, "a submit would import what only the job needs"
    assert not {"tensorflow", "mlflow", "numpy", "importlib_metadata", "click"} & set(foreign)


# ---- the node -----------------------------------------------------------------------------------------------------------


def test_a_rank_tells_its_node_and_slurms_ids() -> None:
    facts = provenance.node_facts({"SLURM_JOB_ID": "4711", "SLURM_PROCID": "1", "SLURM_JOB_PARTITION": "gpu", "X": "y"})
    assert facts["node"] == os.uname().nodename
    assert {key: value for key, value in facts.items() if key.startswith("slurm.")} == {
        "slurm.job_id": "4711",
        "slurm.procid": "1",
        "slurm.job_partition": "gpu",
    }


@pytest.mark.parametrize(
    ("environment", "gpus", "minors"),
    [
        ({}, ("0", "2"), ["0", "2"]),
        ({}, (), []),
        ({}, ("GPU-2",), ["2"]),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_GPUS": "1,3"}, ("0", "1"), ["1", "3"]),  # constrained: indices from 0
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_GPUS": "1,3"}, ("0",), []),  # which of the two is not known
        ({"SLURM_JOB_ID": "1"}, ("0", "1", "2", "3"), ["0", "1", "2", "3"]),  # the whole node
    ],
)
def test_gpus_are_named_where_it_is_certain_which_they_are(
    environment: dict[str, str], gpus: tuple[str, ...], minors: list[str]
) -> None:
    node = [{"name": "NVIDIA A100", "uuid": f"GPU-{n}", "minor": str(n)} for n in range(4)]
    assert [gpu["minor"] for gpu in provenance._chosen(node, environment, gpus)] == minors
