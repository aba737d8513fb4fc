"""The rendered batch script: its exact text, that it is sound bash, and that no value ever reaches a shell."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hpcml import job, plan
from hpcml.errors import HpcmlError
from hpcml.launch import sbatch
from hpcml.plan import Plan
from hpcml.site import Site

GOLDEN = Path(__file__).parent / "golden"
SITE = Site(
    "zeus",
    gpu_request="gpu:a100:{count}",
    cores_per_gpu=32,
    mem_gb_per_gpu=16,
    modules=("cesga/system", "miniconda3/22.11"),
    runs="$LUSTRE/hpcml/runs",
    envs="$STORE/envs",
)
# Each would leave a file named pwned in the working directory if a shell ever read it.
HOSTILE = [
    "$(touch pwned)",
    "`touch pwned`",
    "'; touch pwned; '",
    '"; touch pwned; "',
    "a\ntouch pwned\n",
    "a # b && touch pwned",
    "${x:-$(touch pwned)}",
    "\\$(touch pwned)\\",
    "}; touch pwned; {",
    "{braces} %s %(x)s",
    "* ? ~ ñ 火",
    "-n",
]


def make(site: Site = SITE, path: str = "jobs/mnist.toml", **tree: Any) -> Plan:
    work = {} if {"notebook", "command"} & set(tree) else {"script": "train.py"}
    tree = {"name": "mnist"} | work | tree
    return plan.resolve(job.from_tree(tree, {}, Path("/project"), Path("/project") / path), site)


MULTIWORKER = {
    "name": "mnist-multiworker",
    "notebook": "notebooks/mnist.ipynb",
    "strategy": "multiworker",
    "resources": {"nodes": 2, "gpus_per_node": 2, "tasks_per_node": 2, "time": "1-00:30:00"},
    "slurm": {"partition": "gpu", "extra": ["--mail-type=END,FAIL", '--comment=say "hi" # C:\\x', "--exclusive"]},
    "env": {"name": "tf", "modules": ["cuda/12.4"]},
}


def test_the_script_of_a_job_to_the_letter() -> None:
    text = sbatch.render(make(**MULTIWORKER), SITE, {"params": {"lr": "0.1"}, "settings": {}})
    assert text == (GOLDEN / "multiworker.sbatch").read_text()


def test_the_script_of_a_comparison_to_the_letter() -> None:
    one = make(name="one", resources={"gpus_per_node": 1})
    two = make(name="two", strategy="multiworker", resources={"gpus_per_node": 2, "tasks_per_node": 2})
    parent = make(name="compare-mnist", resources={"gpus_per_node": 2, "tasks_per_node": 2, "time": "60"})
    assert sbatch.render_comparison(parent, [one, two], SITE) == (GOLDEN / "comparison.sbatch").read_text()


def test_a_site_without_a_queue_has_no_script() -> None:
    with pytest.raises(HpcmlError, match="has no queue"):
        sbatch.render(make(), Site("local", scheduler="local"))


def directives(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize("gpus", [0, 2])
def test_gpus_are_asked_for_by_one_flag_only(gpus: int) -> None:
    text = sbatch.render(make(resources={"gpus_per_node": gpus}), SITE)
    flags = [line for line in text.splitlines() if re.search(r"--(gres|gpus[a-z-]*)\b", line)]
    assert flags == ([f"#SBATCH --gres=gpu:a100:{gpus}"] if gpus else [])


def test_srun_is_always_told_the_cores() -> None:
    text = sbatch.render(make(resources={"cpus_per_task": 7}), SITE)
    assert "#SBATCH --cpus-per-task=7\n" in text and re.search(r"^srun .*--cpus-per-task=7 ", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("gpu", "gpu"),
        ("a100&nvme", "a100&nvme"),
        ("[rack1|rack2]", "[rack1|rack2]"),
        ("a b", '"a b"'),
        ("a#b", '"a#b"'),
        ("it's", '"it\'s"'),
        ('say "hi"', r'"say \"hi\""'),
        ("C:\\new\\", r'"C:\\new\\"'),
    ],
)
def test_sbatch_reads_back_what_was_meant(value: str, written: str) -> None:
    text = sbatch.render(make(slurm={"constraint": value, "extra": [f"--comment={value}"]}), SITE)
    assert f"#SBATCH --constraint={written}" in directives(text)
    assert f"#SBATCH --comment={written}" in directives(text)


# ------------------------------------------------------------------ run under bash, srun and python being stubs

STUB = """#!/bin/bash
# Keeps its words and what it was given to know, one file a call.
calls={calls}
for number in 1 2 3 4 5 6 7 8 9; do
  mkdir "$calls/$number" 2>/dev/null && break
done
printf '%s\\0' "{name}" "$@" >"$calls/$number/words"
printf '%s\\0' "${{HPCML_RUN-}}" "${{HPCML_RUNS-}}" "${{HPCML_PROJECT-}}" "$PWD" >"$calls/$number/told"
{action}
"""


@dataclass
class Ran:
    """A script that has been run: every stub's words and HPCML_RUN, HPCML_RUNS, HPCML_PROJECT and folder."""

    code: int
    output: str
    calls: list[tuple[list[str], list[str]]]
    folder: Path

    def words(self, *start: str) -> list[list[str]]:
        return [words for words, _ in self.calls if words[: len(start)] == list(start)]


class Stage:
    """A project, whose name may be hostile, to run scripts in with stubs on PATH."""

    def __init__(self, base: Path, project: str = "project") -> None:
        self.folder, self.bin, self.calls = base / project, base / "bin", base / "calls"
        for path in (self.folder, self.bin, self.calls):
            path.mkdir(parents=True)
        for tool in ("bash", "mkdir", "touch"):
            (self.bin / tool).symlink_to(shutil.which(tool) or "")
        self.stub("srun", "")
        self.stub("module", "")
        self.stub("python", 'if [ "$4" = open ]; then echo made-by-open; fi')

    def stub(self, name: str, action: str) -> None:
        path = self.bin / name
        path.write_text(STUB.format(calls=shlex.quote(str(self.calls)), name=name, action=action))
        path.chmod(0o755)

    def run(self, script: str, **environment: str) -> Ran:
        path = self.folder.parent / "job.sbatch"
        path.write_text(script)
        own = {"PATH": str(self.bin), "SLURM_SUBMIT_DIR": str(self.folder), "LUSTRE": "/lustre", "STORE": "/store"}
        own["HPCML_PROJECT"] = str(self.folder)
        given = {"HPCML_PYTHON": str(self.bin / "python")} | environment
        done = subprocess.run(
            ["bash", str(path)], cwd=self.folder, env=own | given, capture_output=True, text=True, timeout=30
        )
        calls = []
        for folder in sorted(self.calls.iterdir(), key=lambda p: int(p.name)):
            read = [(folder / name).read_bytes().decode().split("\0")[:-1] for name in ("words", "told")]
            calls.append((read[0], read[1]))
        assert not list(self.folder.parent.rglob("pwned")), "a value reached a shell"
        return Ran(done.returncode, done.stdout + done.stderr, calls, self.folder)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path / "stage")


def test_a_submitted_job_runs_its_step_and_ends_with_the_marker(stage: Stage) -> None:
    ran = stage.run(
        sbatch.render(make(**MULTIWORKER), SITE), HPCML_RUN="the-run", HPCML_RUNS="/the/runs", HPCML_SUBMITTED="1"
    )
    assert ran.code == 0, ran.output
    assert [words for words, _ in ran.calls] == [
        ["module", "load", "cuda/12.4"],
        ["python", "-P", "-c", "import hpcml"],
        [
            *("srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=32", "--kill-on-bad-exit=1"),
            *(str(stage.bin / "python"), "-P", "-m", "hpcml.node.worker"),
        ],
        ["python", "-P", "-m", "hpcml.node.batch", "close", "0", "--signal", ""],
    ]
    assert ran.calls[2][1] == ["the-run", "/the/runs", str(stage.folder), str(stage.folder)]


def test_code_that_cannot_be_unpacked_ends_the_job_before_its_step(stage: Stage, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r"
    (run / "code").mkdir(parents=True)
    (run / "code.tar").write_bytes(b"no archive")
    ran = stage.run(sbatch.render(make(), SITE), HPCML_RUN="r", HPCML_RUNS=str(tmp_path / "runs"), HPCML_SUBMITTED="1")
    assert ran.code == 2 and not [words for words in ran.words() if words[0] == "srun"]
    marker = json.loads((run / "status.json").read_text())
    assert (marker["state"], marker["final"], marker["reason"]) == ("FAILED", True, "the code could not be unpacked")
    assert (run / "code.tar").exists()


def test_a_plain_sbatch_makes_its_run_directory(stage: Stage) -> None:
    ran = stage.run(sbatch.render(make(), SITE))
    assert ["python", "-P", "-m", "hpcml.node.batch", "open", "jobs/mnist.toml", "--site", "zeus"] in ran.words()
    ((_, told),) = [call for call in ran.calls if call[0][0] == "srun"]
    assert told == ["made-by-open", "/lustre/hpcml/runs", str(stage.folder), str(stage.folder)]


@pytest.mark.parametrize("below", ["", "notebooks", "a b/$(touch pwned)"])
def test_a_plain_sbatch_from_below_finds_the_project(stage: Stage, below: str) -> None:
    job_file = stage.folder / "jobs/it's.toml"
    job_file.parent.mkdir()
    job_file.touch()
    where = stage.folder / below
    where.mkdir(parents=True, exist_ok=True)
    text = sbatch.render(make(path="jobs/it's.toml"), SITE)
    ran = stage.run(text, HPCML_PROJECT="", SLURM_SUBMIT_DIR=str(where))
    assert ran.code == 0, ran.output
    assert [told[2:] for words, told in ran.calls if "open" in words] == [[str(stage.folder)] * 2]


def test_a_plain_sbatch_from_elsewhere_is_told_where_to_submit(stage: Stage) -> None:
    ran = stage.run(sbatch.render(make(), SITE), HPCML_PROJECT="")
    assert ran.code == 2 and not ran.calls
    assert f"no job file jobs/mnist.toml in {stage.folder} or above it" in ran.output
    assert "fix: submit from the project's folder, or set HPCML_PROJECT" in ran.output


@pytest.mark.parametrize("signal", ["TERM", "USR2"])
@pytest.mark.parametrize("code", [0, 5])
def test_the_steps_exit_code_and_signal_reach_the_marker(tmp_path: Path, signal: str, code: int) -> None:
    for turn in range(5):  # the step ends right after the signal: a race that a wrong script wins sometimes only
        stage = Stage(tmp_path / str(turn))
        stage.stub("srun", f'kill -{signal} "$PPID"; exit {code}')
        ran = stage.run(sbatch.render(make(), SITE), HPCML_RUN="r", HPCML_SUBMITTED="1")
        assert ran.code == code
        closed = ["python", "-P", "-m", "hpcml.node.batch", "close", str(code), "--signal", signal]
        assert ran.words("python", "-P", "-m") == [closed]


def test_a_run_directory_that_cannot_be_made_ends_the_job(stage: Stage) -> None:
    stage.stub("python", 'if [ "$2" = -m ]; then exit 2; fi')
    ran = stage.run(sbatch.render(make(), SITE))
    assert ran.code == 2 and not ran.words("srun")


def test_without_a_python_it_is_said_what_to_do(stage: Stage) -> None:
    ran = stage.run(sbatch.render(make(), SITE), HPCML_RUN="r", HPCML_PYTHON="")
    assert ran.code == 2 and not ran.words("srun")
    assert "HPCML_PYTHON" in ran.output and f"{stage.folder}/.venv/bin/python" in ran.output


def test_the_first_python_counts(stage: Stage) -> None:
    own = stage.folder / "own"
    shutil.copy(stage.bin / "python", own)
    text = sbatch.render(make(env={"python": "$HERE/own"}), SITE)
    ran = stage.run(text, HPCML_RUN="r", HPCML_PYTHON="", VIRTUAL_ENV="/absent", HERE=str(stage.folder))
    assert ran.code == 0 and ran.words("srun")[0][-4] == str(own), ran.output


def test_a_comparison_runs_each_variant_in_its_own_directory(stage: Stage) -> None:
    stage.stub("srun", 'if [ "${HPCML_RUN##*/}" = one ]; then exit 3; fi')
    plans = [make(name=name) for name in ("one", "two")]
    ran = stage.run(sbatch.render_comparison(make(name="both"), plans, SITE), HPCML_RUN="p", HPCML_RUNS="/r")
    assert ran.code == 3, ran.output
    steps = [(words[0], words[-1], told[0]) for words, told in ran.calls if "srun" in words or "close" in words]
    assert steps[0][::2] == ("srun", "p/one") and steps[2][::2] == ("srun", "p/two")
    closed = [(words[5], told[0]) for words, told in ran.calls if "close" in words]
    assert closed == [("3", "p/one"), ("0", "p/two"), ("3", "p")]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_value_is_ever_read_by_a_shell(tmp_path: Path, text: str) -> None:
    line = text.replace("\n", " ")  # what a job file refuses newlines in
    stage = Stage(tmp_path, text)
    site = Site("zeus", modules=(line,), runs=f"$LUSTRE/{line}", gpu_request=f"gpu:{line}:{{count}}")
    wanted = make(
        site,
        path=f"jobs/{line}.toml",
        script=f"{line}.py",
        resources={"gpus_per_node": 1},
        slurm={"partition": line, "account": line, "extra": [f"--comment={line}"]},
        env={"vars": {"X": text}},
        params={"note": text},
    )
    typed = {"params": {"note": text}, "settings": {"slurm.qos": text}}
    ran = stage.run(sbatch.render(wanted, site, typed))
    assert ran.code == 0, ran.output
    assert ran.words("module") == [["module", "load", line]]
    (opened,) = [words for words in ran.words("python") if "open" in words]
    assert opened[5:8] == [f"jobs/{line}.toml", "--site", "zeus"]
    assert json.loads(opened[-1]) == typed
    assert len(ran.words("srun")) == 1
    if not re.search(r"\$\{?\w|[{}]", line):  # variables and their braces are the site's to use
        assert [told[1] for words, told in ran.calls if words[0] == "srun"] == [f"/lustre/{line}"]


def test_a_commands_words_stay_in_the_plan(stage: Stage) -> None:
    ran = stage.run(sbatch.render(make(command=["echo", *HOSTILE]), SITE), HPCML_RUN="r")
    assert ran.code == 0 and len(ran.words("srun")) == 1, ran.output


@pytest.mark.parametrize("text", [t.replace("\n", " ") for t in HOSTILE])
def test_a_hostile_python_is_a_file_that_is_not_there(tmp_path: Path, text: str) -> None:
    stage = Stage(tmp_path / "stage")
    ran = stage.run(sbatch.render(make(env={"python": text}), SITE), HPCML_RUN="r", HPCML_PYTHON="", x="x")
    assert ran.code == 2 and not ran.words("srun")


def scripts(value: str) -> list[str]:
    typed = {"params": {"note": value}, "settings": {}}
    jobs = [make(), make(**MULTIWORKER), make(script=HOSTILE[4].replace("\n", " "))]
    rendered = [sbatch.render(wanted, SITE, typed) for wanted in jobs]
    return [*rendered, sbatch.render_comparison(jobs[0], jobs[:2], SITE)]


@pytest.mark.parametrize("number", range(4))
def test_scripts_are_sound_bash(tmp_path: Path, number: int) -> None:
    path = tmp_path / "job.sbatch"
    path.write_text(scripts("\n".join(HOSTILE))[number])
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck: apt-get install shellcheck")
def test_scripts_are_clean_for_shellcheck(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.sbatch" for number in range(4)]
    for path, text in zip(paths, scripts("it's 0.1"), strict=True):
        path.write_text(text)
    done = subprocess.run(["shellcheck", *map(str, paths)], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stdout
