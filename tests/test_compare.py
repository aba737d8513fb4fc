"""What ``hpcml compare`` takes for fair, what it asks of environments, and the five strategies as one job."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from test_comparison import a_plan

from hpcml import compare, facts, job, plan, site
from hpcml.errors import HpcmlError
from hpcml.job import Environment
from hpcml.launch import sbatch

ROOT = Path(__file__).parent.parent
FIVE = ("original", "mirrored", "multiworker", "ddp", "horovod")


def resolved(where: str) -> list[plan.Plan]:
    """The plans of the five MNIST jobs at a site."""
    place = site.load(where)
    read = [job.load(ROOT / "jobs" / f"mnist_{name}.toml") for name in FIVE]
    return [plan.resolve(one, place, facts.gather(one, place, ask_queue=False)) for one in read]


# ------------------------------------------------------------------ what is fair


@pytest.mark.parametrize("where", ["local", "generic", "ft3"])
def test_five_strategies_are_a_fair_comparison(where: str) -> None:
    parent = compare.parent_of(resolved(where))
    assert parent.target == tuple(f"mnist-{name}" for name in FIVE)
    assert (parent.nodes, parent.gpus_per_node, parent.time_s) == (1, 2, 5 * 9 * 60)


def test_five_strategies_are_steps_of_one_job() -> None:
    plans, place = resolved("generic"), site.load("generic")
    script = sbatch.render_comparison(compare.parent_of(plans), plans, place)
    steps = [line.split()[1] for line in script.splitlines() if line.startswith("variant mnist-")]
    assert steps == [f"mnist-{name}" for name in FIVE]
    assert script.count("#SBATCH --gres=") == 1


def envs(**by_strategy: Environment) -> dict[str, plan.Plan]:
    return {name: dataclasses.replace(a_plan(name, name), env=env) for name, env in by_strategy.items()}


APART = Environment(python="envs/horovod/.venv/bin/python", modules=("gcc/13",))


@pytest.mark.parametrize(
    ("plans", "problem"),
    [
        (envs(original=Environment(), mirrored=Environment(), horovod=APART), ""),
        (envs(original=Environment(), ddp=Environment(python="/torch/bin/python"), horovod=APART), ""),
        (envs(original=Environment(), mirrored=APART, ddp=Environment()), "env differs: original has "),
        (envs(original=Environment(), horovod=dataclasses.replace(APART, vars={"OMP_NUM_THREADS": "4"})), "env.vars"),
        (envs(original=Environment(), ddp=Environment(vars={"NCCL_P2P_DISABLE": "1"})), "env.vars differs"),
        (envs(original=Environment(vars={"TF_NUM_INTRAOP_THREADS": "1"}), ddp=Environment()), "env.vars differs"),
        (envs(original=Environment(vars={"TF_XLA_FLAGS": "x"}), ddp=Environment()), ""),
        (envs(original=Environment(), horovod=Environment(vars={"LD_LIBRARY_PATH": "/nccl", "HOROVOD_X": "1"})), ""),
        (envs(original=Environment(), mirrored=Environment(vars={"TF_XLA_FLAGS": "x"})), "env differs"),
    ],
)
def test_an_environment_may_differ_between_frameworks_but_not_within_one(
    plans: dict[str, plan.Plan], problem: str
) -> None:
    found = plan.unfair(plans)
    assert len(found) == bool(problem)
    if problem:
        assert found[0].what.startswith(problem)


def test_work_that_names_no_strategy_may_be_of_any_framework() -> None:
    plans = {"a": a_plan("a", "ddp"), "b": a_plan("b", None, env=APART)}
    assert [problem.what[:11] for problem in plan.unfair(plans)] == ["env differs"]


# ------------------------------------------------------------------ what must be there


@pytest.fixture
def elsewhere(tmp_path: Path) -> str:
    """A Python of another environment, which has the standard library alone."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    return str(python)


def missing(*plans: plan.Plan, here: bool = True) -> HpcmlError:
    with pytest.raises(HpcmlError) as caught:
        compare.need_environments(plans, here=here)
    return caught.value


def test_horovod_that_is_not_there_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("horovod", "torch") else name)
    for here in (True, False):
        error = missing(*(a_plan(name, name) for name in ("original", "ddp", "horovod")), here=here)
        assert [problem.what.partition(", which")[0] for problem in error.problems] == [
            "strategy 'ddp' needs torch",
            "strategy 'horovod' needs horovod",
        ], "all at once"
        assert error.problems[1].fix.startswith("scripts/setup --horovod")


def test_an_environment_of_its_own_without_horovod_is_told_how_it_gets_it(elsewhere: str) -> None:
    apart = a_plan("horovod", "horovod", env=Environment(python=elsewhere))
    (problem,) = missing(apart).problems
    assert "needs horovod, which " in problem.what and elsewhere in problem.what
    assert problem.fix.startswith(f"envs/horovod/install {elsewhere}") and "scripts/setup --horovod" in problem.fix
    compare.need_environments([apart], here=False)  # a node may see another one under this name


def test_an_environment_that_is_not_there_is_told_of(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nothing/bin/python")
    ours = [
        a_plan("horovod", "horovod", env=Environment(python=nowhere)),
        a_plan("ddp", "ddp", env=Environment(python=nowhere)),
    ]
    horovods, torchs = missing(*ours).problems
    assert horovods.what == torchs.what == f"no Python at {nowhere}"
    assert "make that environment with torch or TensorFlow, then envs/horovod/install" in horovods.fix
    assert "envs/horovod" not in torchs.fix


def test_modules_may_bring_what_a_python_lacks(elsewhere: str) -> None:
    for more in ({"modules": ("horovod/0.28",)}, {"vars": {"PYTHONPATH": "/opt/horovod"}}):
        env: Any = Environment(python=elsewhere, **more)
        compare.need_environments([a_plan("horovod", "horovod", env=env)], here=True)


@pytest.mark.parametrize("apart", [Environment(python="/other/bin/python"), Environment(modules=("gcc/13",))])
def test_a_job_has_one_environment(apart: Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    plans = [
        dataclasses.replace(one, scheduler="slurm", site="generic", project=str(tmp_path))
        for one in (a_plan("original", "original"), a_plan("horovod", "horovod", env=apart))
    ]
    with pytest.raises(HpcmlError, match=r"differs: original has .*, horovod has (?s:.*)scripts/setup --horovod"):
        compare.submit(compare.parent_of(plans), plans, site.load("generic"))
    assert list(tmp_path.iterdir()) == []
