"""Plans: defaults, caps, limits, declared parameters, fairness, and the way to JSON and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcml import facts as looked_up
from hpcml import job, plan
from hpcml.errors import HpcmlError
from hpcml.facts import Declared, Facts
from hpcml.site import Limits, Site
from hpcml.slurm.text import Partition

CLUSTER = Site("zeus", cores_per_gpu=32, mem_gb_per_gpu=16, gpu_request="gpu:a100:{count}", modules=("cuda",))
LOCAL = Site("local", scheduler="local")
MAIN = Partition("main", True, 3, 64, 247, "1-00:00:00", 2, "a100")
SHORT = Partition("short", False, 1, 32, 100, "30:00", 1, None)


def make(**tree: Any) -> job.Job:
    tree = {"command": ["true"], "name": "j"} | tree
    if "script" in tree or "notebook" in tree:
        del tree["command"]
    return job.from_tree(tree, {}, Path("/project"))


def resources(**values: Any) -> job.Job:
    return make(resources=values)


NO_FACTS = Facts()


def problems(wanted: job.Job, site: Site = CLUSTER, facts: Facts = NO_FACTS) -> list[str]:
    with pytest.raises(HpcmlError) as error:
        plan.resolve(wanted, site, facts)
    return [str(problem) for problem in error.value.problems]


# ------------------------------------------------------------------ defaults


@pytest.mark.parametrize(
    ("asked", "cpus", "mem"),
    [
        ({}, 1, None),
        ({"gpus_per_node": 2}, 64, 32),
        ({"gpus_per_node": 2, "tasks_per_node": 2}, 32, 32),
        ({"gpus_per_node": 1, "cpus_per_task": 4, "mem_gb": 5}, 4, 5),
        ({"tasks_per_node": 4}, 1, None),
        ({"nodes": 2, "gpus_per_node": 2, "tasks_per_node": 2}, 32, 32),
    ],
)
def test_cores_and_memory_follow_the_gpus(asked: dict[str, int], cpus: int, mem: int | None) -> None:
    got = plan.resolve(resources(**asked), CLUSTER)
    assert (got.cpus_per_task, got.mem_gb) == (cpus, mem)
    if asked == {"gpus_per_node": 2}:
        assert got.origins["resources.cpus_per_task"] == "site zeus: cores_per_gpu"
        assert got.origins["resources.mem_gb"] == "site zeus: mem_gb_per_gpu"


def test_the_sites_gpu_request_and_modules() -> None:
    assert plan.resolve(resources(gpus_per_node=2), CLUSTER).gres == "gpu:a100:2"
    none = plan.resolve(make(), CLUSTER)
    assert (none.gres, none.env.modules) == (None, ("cuda",))
    assert plan.resolve(make(env={"modules": ["mine"]}), CLUSTER).env.modules == ("mine",)
    assert plan.resolve(make(env={"name": "tf"}), CLUSTER).env.python == "$HOME/envs/tf/bin/python"


def test_world_size_and_cores() -> None:
    got = plan.resolve(resources(nodes=3, tasks_per_node=2, cpus_per_task=5), CLUSTER)
    assert (got.tasks, got.cores) == (6, 30)


# ------------------------------------------------------------------ local: upper bounds


def test_on_local_cores_and_memory_are_capped_and_said() -> None:
    facts = Facts(cores=8, mem_gb=16, gpus=0)
    got = plan.resolve(resources(tasks_per_node=2, cpus_per_task=32, mem_gb=64), LOCAL, facts)
    assert (got.cpus_per_task, got.mem_gb) == (4, 16)
    assert len(got.notes) == 2 and "8" in got.notes[0] and "16" in got.notes[1]
    assert got.origins["resources.cpus_per_task"] == got.origins["resources.mem_gb"] == "capped to this machine"


def test_what_fits_on_local_is_left_and_not_mentioned() -> None:
    got = plan.resolve(resources(cpus_per_task=2, mem_gb=4), LOCAL, Facts(cores=8, mem_gb=16))
    assert (got.cpus_per_task, got.mem_gb, got.notes) == (2, 4, ())


def test_every_task_keeps_a_core_and_many_nodes_are_mentioned() -> None:
    got = plan.resolve(resources(nodes=4, tasks_per_node=2, cpus_per_task=2), LOCAL, Facts(cores=2))
    assert got.cpus_per_task == 1
    assert any("8 tasks of 4 nodes" in note for note in got.notes)


# ------------------------------------------------------------------ limits


def test_all_over_asks_come_at_once_with_their_limits() -> None:
    site = dataclasses.replace(CLUSTER, limits=Limits(2, 64, 2, 247, "7-00:00:00"))
    asked = resources(nodes=3, gpus_per_node=4, tasks_per_node=2, cpus_per_task=40, mem_gb=300, time="8-00")
    told = problems(asked, site)
    assert len(told) == 5
    for words in ("3 nodes", "4 GPUs a node", "80 cores a node (2 tasks × 40)", "300 GiB a node", "8-00 is too long"):
        assert any(words in line and "site zeus" in line for line in told), (words, told)


def test_exactly_the_limit_is_allowed() -> None:
    site = dataclasses.replace(CLUSTER, limits=Limits(2, 64, 2, 247, "1-00:00:00"))
    asked = resources(nodes=2, gpus_per_node=2, tasks_per_node=2, cpus_per_task=32, mem_gb=247, time="24:00:00")
    assert plan.resolve(asked, site).time_s == 86400


def test_sinfo_tells_the_default_partitions_limits() -> None:
    told = problems(resources(nodes=4, time="2-00"), CLUSTER, Facts(partitions=(SHORT, MAIN)))
    assert len(told) == 2 and all("partition main" in line for line in told)
    assert "at most 3" in told[0] and "at most 1-00:00:00" in told[1]


def test_a_named_partitions_limits_hold_and_the_site_narrows_them() -> None:
    facts = Facts(partitions=(MAIN, SHORT))
    wanted = make(slurm={"partition": "short"}, resources={"time": "20:00", "gpus_per_node": 2})
    assert problems(wanted, CLUSTER, facts) == [
        "resources.gpus_per_node: 2 GPUs a node is more than there are\n"
        "  allowed: at most 1 (partition short, as sinfo and site zeus tell)",
        "resources.cpus_per_task: 64 cores a node (1 tasks × 64) is more than there are\n"
        "  allowed: at most 32 (partition short, as sinfo and site zeus tell)",
    ]
    strict = dataclasses.replace(CLUSTER, partitions={"short": Limits(max_time="00:10:00")})
    got = problems(make(slurm={"partition": "short"}, resources={"time": "20"}), strict, facts)
    assert len(got) == 1 and "at most 00:10:00" in got[0]


def test_an_unknown_partition_is_named_with_the_nearest() -> None:
    told = problems(make(slurm={"partition": "shrt"}), CLUSTER, Facts(partitions=(MAIN, SHORT)))
    assert told == [
        "slurm.partition: no partition 'shrt'\n  allowed: main, short\n  fix: did you mean 'short'?",
    ]


def test_without_facts_nothing_is_refused() -> None:
    assert plan.resolve(resources(nodes=10_000, gpus_per_node=16), CLUSTER).nodes == 10_000


# ------------------------------------------------------------------ work and shape


@pytest.mark.parametrize("strategy", ["original", "mirrored"])
@pytest.mark.parametrize("asked", [{"nodes": 2}, {"tasks_per_node": 2}])
def test_one_process_strategies_take_one_task(strategy: str, asked: dict[str, int]) -> None:
    (told,) = problems(make(strategy=strategy, resources=asked))
    assert f"'{strategy}'" in told and "multiworker" in told
    assert plan.resolve(make(strategy="multiworker", resources=asked), CLUSTER).tasks == 2


def test_gpus_are_shared_evenly_by_the_tasks() -> None:
    (told,) = problems(resources(gpus_per_node=3, tasks_per_node=2))
    assert "3 GPUs" in told and "2 tasks" in told


@pytest.mark.parametrize("target", ["/etc/train.py", "../train.py", "a/../../train.py"])
def test_the_work_lies_inside_the_project(target: str) -> None:
    assert any("no path inside the project" in line for line in problems(make(script=target)))


def test_a_path_that_only_looks_as_if_it_left_the_project_is_fine() -> None:
    assert plan.resolve(make(script="a/../..train.py"), CLUSTER).target == ("a/../..train.py",)


def test_missing_work_and_no_notebook_are_told_together() -> None:
    told = problems(make(notebook="train.py"), CLUSTER, Facts(target_exists=False))
    assert len(told) == 2
    assert "no notebook at /project/train.py" in told[1]


def test_a_folder_is_no_script() -> None:
    (told,) = problems(make(script="src"), CLUSTER, Facts(target_exists=False, target_is_folder=True))
    assert "src is a folder, not a script" in told and "name a file in it" in told


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, ()),
        ({"strategy": "ddp", "keras": "legacy"}, ("torch",)),
        ({"strategy": "original"}, ("tensorflow", "tf_keras")),
        ({"strategy": "mirrored", "keras": "3"}, ("tensorflow",)),
    ],
)
def test_the_frameworks_that_a_strategy_needs(keys: dict[str, Any], wanted: tuple[str, ...]) -> None:
    assert plan.resolve(make(script="t.py", **keys), CLUSTER).frameworks == wanted


DECLARED = Facts(target_exists=True, declared=Declared({"lr": 0.1, "epochs": 5, "tag": "a", "fast": False, "x": None}))


def test_an_unknown_parameter_is_named_with_the_nearest() -> None:
    told = problems(make(script="t.py", params={"epoch": 3, "zzz": 1}), CLUSTER, DECLARED)
    assert "has no parameter 'epoch'" in told[0] and "did you mean 'epochs'?" in told[0]
    assert "add it to the cell" in told[1]


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"epochs": 1.5}, "params.epochs = 1.5 is not a whole number"),
        ({"epochs": True}, "params.epochs = True is not a whole number"),
        ({"lr": "fast"}, "params.lr = 'fast' is not a number"),
        ({"tag": 3}, "params.tag = 3 is not text"),
        ({"fast": 1}, "params.fast = 1 is not true or false"),
    ],
)
def test_a_parameter_is_of_its_defaults_kind(params: dict[str, Any], says: str) -> None:
    (told,) = problems(make(script="t.py", params=params), CLUSTER, DECLARED)
    assert says in told and "like its default" in told


def test_defaults_give_way_to_params_and_any_value_fits_an_open_default() -> None:
    got = plan.resolve(make(script="t.py", params={"lr": 1, "x": "anything"}), CLUSTER, DECLARED)
    assert got.inject
    assert got.effective_params == {"lr": 1, "epochs": 5, "tag": "a", "fast": False, "x": "anything"}
    assert got.origins["params.epochs"] == "t.py: parameters cell"
    assert not plan.resolve(make(script="t.py", params={"lr": 1}), CLUSTER).inject


@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [("tag", "2026", "2026"), ("tag", '"a"', '"a"'), ("lr", "1", 1.0), ("fast", "True", True), ("epochs", "7", 7)],
)
def test_a_typed_parameter_takes_the_type_of_the_works_default(
    tmp_path: Path, key: str, typed: str, value: object
) -> None:
    path = tmp_path / "j.toml"
    path.write_text('script = "t.py"\n')
    got = plan.resolve(job.load(path, {key: typed}), CLUSTER, DECLARED).params[key]
    assert (got, type(got)) == (value, type(value))


def test_parameters_are_read_from_a_percent_script_and_a_notebook(tmp_path: Path) -> None:
    cell = "lr = 0.1  # rate\nepochs: int = -5\nname = 'a'\nbig = 2 ** 10\n"
    script = tmp_path / "t.py"
    script.write_text(f'# %% [markdown] parameters, tags\n# x\n# %% tags=["parameters"]\n{cell}# %%\nlr = 3\n')
    notebook = tmp_path / "t.ipynb"
    tagged = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": cell.splitlines(keepends=True)}
    notebook.write_text(json.dumps({"nbformat": 4, "cells": [{"metadata": {}, "source": "lr = 9"}, tagged]}))
    for path in (script, notebook):
        declared = looked_up.declared_parameters(path)
        assert declared == Declared({"lr": 0.1, "epochs": -5, "name": "a", "big": None})
    (tmp_path / "plain.py").write_text("lr = 1\n")
    assert looked_up.declared_parameters(tmp_path / "plain.py") is None
    notebook.write_text("[]")
    with pytest.raises(HpcmlError, match="is not a notebook"):
        looked_up.declared_parameters(notebook)
    script.write_text('# %% tags=["parameters"]\nlr = = 1\n')
    with pytest.raises(HpcmlError, match="is not Python"):
        looked_up.declared_parameters(script)


# ------------------------------------------------------------------ fairness


def resolved(name: str, **tree: Any) -> plan.Plan:
    tree = {"params": {"global_batch": 128, "seed": 1, "epochs": 2, "data": "mnist"}, **tree}
    return plan.resolve(make(name=name, **tree), CLUSTER)


@pytest.mark.parametrize(
    ("other", "key"),
    [
        *[
            ({"params": {"global_batch": 128, "seed": 1, "epochs": 2, "data": "mnist", key: value}}, key)
            for key, value in {"global_batch": 64, "seed": 2, "epochs": 3, "data": "cifar"}.items()
        ],
        ({"keras": "3"}, "keras"),
        ({"precision": "mixed_float16"}, "precision"),
        ({"resources": {"cpus_per_task": 2}}, "cores per run"),
    ],
)
def test_each_value_that_makes_a_comparison_unfair(other: dict[str, Any], key: str) -> None:
    (problem,) = plan.unfair({"a": resolved("a"), "b": resolved("b", **other)})
    assert problem.what.startswith(f"{key} differs: a has ") and ", b has " in problem.what


def test_what_may_differ_in_a_fair_comparison() -> None:
    one = resolved("a", strategy="mirrored", resources={"cpus_per_task": 4, "gpus_per_node": 2})
    two = resolved("b", strategy="multiworker", resources={"cpus_per_task": 2, "tasks_per_node": 2, "time": "1-0"})
    assert plan.unfair({"a": one, "b": two}) == []


def test_a_works_own_default_counts_for_fairness() -> None:
    facts = Facts(declared=Declared({"epochs": 2}))
    a = plan.resolve(make(script="a.py"), CLUSTER, facts)
    b = plan.resolve(make(script="b.py", params={"epochs": 2}), CLUSTER, facts)
    assert plan.unfair({"a": a, "b": b}) == []


# ------------------------------------------------------------------ JSON

texts = st.text(st.characters(exclude_characters="\x00"), max_size=20)
scalars = st.one_of(texts, st.integers(), st.floats(allow_nan=False), st.booleans())
lines = st.text("ab cß\"'$`#\\", min_size=1, max_size=10)


@settings(max_examples=40, deadline=None)
@given(
    params=st.dictionaries(st.from_regex(r"[a-z_]{1,5}", fullmatch=True), scalars, max_size=4),
    extra=st.lists(lines.map("--comment={}".format), max_size=2),
    command=st.lists(texts, min_size=1, max_size=3).filter(lambda words: words[0]),
    variables=st.dictionaries(st.from_regex(r"[A-Z]{1,5}", fullmatch=True), texts, max_size=2),
    gpus=st.integers(0, 3),
    profile=st.sampled_from([{}, {"profile": {"steps": [10, 20]}}]),
)
def test_a_plan_goes_to_json_and_back(
    params: dict[str, Any],
    extra: list[str],
    command: list[str],
    variables: dict[str, str],
    gpus: int,
    profile: dict[str, Any],
) -> None:
    tree = {"params": params, "slurm": {"extra": extra}, "env": {"vars": variables}} | profile
    before = plan.resolve(make(command=command, resources={"gpus_per_node": gpus}, **tree), CLUSTER)
    after = plan.from_json(json.loads(json.dumps(before.to_json())))
    assert after == before
    assert after.params == params and after.target == tuple(command)


def test_a_plan_shows_its_profile_and_one_written_before_there_were_any_is_read() -> None:
    tree = {"command": ["true"], "profile": {"steps": [10, 20]}}
    wanted = job.from_tree(tree, {"profile.steps": "j.toml: profile.steps"}, Path("/project"))
    shown = json.loads(json.dumps(plan.resolve(wanted, CLUSTER).to_json()))
    assert shown["profile"] == [10, 20]
    assert shown["origins"]["profile.steps"] == "j.toml: profile.steps"
    assert plan.from_json(shown).profile == (10, 20)
    del shown["profile"]
    assert plan.from_json(shown).profile is None
