"""What tuning searches over, in which order, when it stops; and how the winner gets into a job file. All of it pure."""

from __future__ import annotations

import dataclasses
import random
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from bench import bench_tune
from test_comparison import a_plan

from hpcml.errors import HpcmlError
from hpcml.job import Tuning
from hpcml.node import threads
from hpcml.tune import search, space, write
from hpcml.tune.search import LEAST_GAIN, Search, Trial
from hpcml.tune.space import Axis, Point, Start, Value

START = Start(
    cores=8,
    world=1,
    gpus=0,
    replicas=1,
    steps=15,
    step_s=0.02,
    values={
        "intra_op_threads": 8,
        "omp_threads": 8,
        "inter_op_threads": 2,
        "prefetch": -1,
        "data_threads": 0,
        "steps_per_execution": 1,
        "jit_compile": None,
        "precision": "float32",
        "global_batch": 256,
    },
)


def axis(name: str, start: Start = START, **how: object) -> Axis | None:
    return next((a for a in space.axes(start, only=[name], **how) if a.name == name), None)  # type: ignore[arg-type]


# ------------------------------------------------------------------ the space


@pytest.mark.parametrize("cores", [1, 2, 3, 6, 8, 64, 96])
def test_no_point_has_more_runnable_threads_than_cores(cores: int) -> None:
    values = {**START.values, "intra_op_threads": cores, "omp_threads": cores}
    start = dataclasses.replace(START, cores=cores, values=values)
    axes = {a.name: a for a in space.axes(start)}
    for name in ("intra_op_threads", "omp_threads"):
        assert not cores > 1 or max(axes[name].values) == cores  # type: ignore[type-var]
    everyone: dict[str, Value] = {name: start.values[name] for name in axes}
    points = [{**everyone, a.name: value} for a in axes.values() for value in a.values]
    repaired = [point for raw in points if (point := space.repaired(raw, start))]
    assert any(point.get("data_threads") for point in repaired) == (cores > 1)
    for point in repaired:
        compute = max(int(point.get(name, cores) or 0) for name in ("intra_op_threads", "omp_threads"))
        assert compute + int(point.get("data_threads") or 0) <= cores
        assert 1 <= int(point.get("inter_op_threads", 1) or 0) <= max(2, cores)


def test_threads_that_a_variable_holds_can_give_up_none() -> None:
    held = dataclasses.replace(START, fixed={"intra_op_threads": threads.INTRA})
    assert space.repaired({"data_threads": 1}, held) is None
    assert space.repaired({"data_threads": 0}, held) == {"data_threads": 0}


def test_ranks_that_wait_for_each_other_keep_two_operations_at_once() -> None:
    alone, many = axis("inter_op_threads"), axis("inter_op_threads", dataclasses.replace(START, world=2))
    assert alone and many and min(alone.values) == 1 and min(many.values) == 2  # type: ignore[type-var]


def test_executions_are_short_enough_to_stop_between() -> None:
    short, slow = axis("steps_per_execution"), axis("steps_per_execution", dataclasses.replace(START, step_s=0.3))
    assert short and short.values == (1, 2, 4, 8, 15)  # an epoch has 15 steps
    assert slow and slow.values == (1, 2, 3)  # of at most a second


@pytest.mark.parametrize(
    ("strategy", "now", "automatic"),
    [("mirrored", 2, True), ("ddp", 2, False), ("horovod", 2, False), ("horovod", -1, True), (None, 2, False)],
)
def test_automatic_prefetch_only_where_the_input_is_known_to_be_tf_data(
    strategy: str | None, now: int, automatic: bool
) -> None:
    start = space.start_of(a_plan("a", strategy), {"tuned.prefetch": now}, 1, 15, 0.02)
    found = axis("prefetch", start)
    assert found and (-1 in found.values) == automatic


def test_batch_and_gpu_threads_and_precision_only_where_they_are_wanted_and_there() -> None:
    assert not {"global_batch", "gpu_thread_mode", "precision"} & {a.name for a in space.axes(START)}
    on_gpu = dataclasses.replace(START, gpus=2, replicas=2, values={**START.values, "gpu_thread_mode": "gpu_private"})
    found = {a.name: a.values for a in space.axes(on_gpu, batch=True, precisions=["mixed_float16"])}
    assert found["gpu_thread_mode"] == ("gpu_private", "global")
    assert found["precision"] == ("float32", "mixed_float16")
    assert found["global_batch"] == (256, 512, 1024, 2048)


def test_the_present_value_is_always_among_those_tried() -> None:
    odd = {**START.values, "intra_op_threads": 5, "prefetch": 3, "jit_compile": True, "data_threads": 6}
    for found in space.axes(dataclasses.replace(START, values=odd)):
        assert odd[found.name] in found.values
    prefetch = axis("prefetch", dataclasses.replace(START, values=odd))
    assert prefetch and prefetch.values == (1, 2, 3, 4, -1)


def test_only_what_the_work_asks_for_is_searched() -> None:
    deaf = {k: v for k, v in START.values.items() if k not in ("prefetch", "jit_compile")}
    names = {a.name for a in space.axes(dataclasses.replace(START, values=deaf))}
    assert names == {
        "intra_op_threads",
        "omp_threads",
        "inter_op_threads",
        "data_threads",
        "steps_per_execution",
    }


@pytest.mark.parametrize(
    ("capability", "flags", "expected"),
    [
        ((8, 0), "", ("mixed_float16", "mixed_bfloat16")),
        ((7, 0), "", ("mixed_float16",)),
        ((6, 1), "", ()),
        (None, "fma avx2 avx512f", ()),
        (None, "avx512f avx512_bf16", ("mixed_bfloat16",)),
    ],
)
def test_mixed_precision_where_a_device_has_it(
    capability: tuple[int, int] | None, flags: str, expected: tuple[str, ...]
) -> None:
    assert space.precisions_of(capability, flags) == expected


# ------------------------------------------------------------------ the search


class Machine:
    """A machine whose speed is a function of the point; counts trials and their seconds."""

    def __init__(
        self, speed: Callable[[Mapping[str, Value]], float | None], noise: random.Random | None = None
    ) -> None:
        self.speed, self.noise, self.count, self.left, self.wall_s = speed, noise, 1, float("inf"), 10.0
        self.asked: list[tuple[Point, bool, float]] = []

    def __call__(self, point: Point, final: bool, below: float) -> Trial:
        self.count += 1
        self.asked.append((point, final, below))
        self.left -= self.wall_s
        speed = self.speed(point)
        if speed is None:
            return Trial(self.count, point, None, wall_s=self.wall_s, reason="out of memory", final=final)
        if self.noise:
            speed *= self.noise.gauss(1, 0.004 if final else 0.008)
        cut = speed < below
        return Trial(self.count, point, speed, wall_s=self.wall_s, cut=cut, final=final)


def searched(machine: Machine, axes: list[Axis], start: Start = START) -> search.Found:
    point = {a.name: start.values[a.name] for a in axes}
    first = Trial(1, point, machine.speed(point), wall_s=machine.wall_s)
    return Search(first, axes, machine, lambda p: space.repaired(p, start), lambda: machine.left, 8.0).run()


FOUR = [
    Axis("intra_op_threads", (1, 2, 4, 8)),
    Axis("steps_per_execution", (1, 2, 4, 8, 15)),
    Axis("prefetch", (1, 2, 4, -1)),
    Axis("inter_op_threads", (1, 2)),
]


def typical(point: Mapping[str, Value]) -> float:
    """Amdahl over threads that pays for each, a cost of each call of the graph, hardly any of the input."""
    intra, steps = int(point["intra_op_threads"] or 0), int(point["steps_per_execution"] or 0)
    step_s = 0.004 + 0.016 / intra + 0.0012 * intra + 0.003 / steps
    return 256 / step_s * {1: 0.98, 2: 1.0, 4: 1.0, -1: 0.99}[int(point["prefetch"] or 0)]


def test_finds_nearly_the_best_of_a_grid_in_a_fraction_of_its_trials() -> None:
    best = max(
        typical({"intra_op_threads": i, "steps_per_execution": s, "prefetch": p})
        for i in (1, 2, 4, 8)
        for s in (1, 2, 4, 8, 15)
        for p in (1, 2, 4, -1)
    )
    seed = random.randrange(2**32)
    print("seed", seed)
    generator, counts = random.Random(seed), list[int]()
    for _ in range(200):
        machine = Machine(typical, generator)
        found = searched(machine, FOUR)
        assert typical(found.winner.point) >= 0.95 * best  # each of several trials may be wrong by noise
        counts.append(machine.count)
    assert sum(counts) / len(counts) <= 0.15 * 160  # points of the grid
    found = searched(machine := Machine(typical), FOUR)
    assert typical(found.winner.point) >= 0.98 * best and found.confirmed
    assert found.gain == pytest.approx(typical(found.winner.point) / typical(found.start.point))


def test_settings_that_depend_on_each_other_are_met_again() -> None:
    """Many steps a call pay only with few threads, and few threads only with many steps a call."""

    def twisted(point: Mapping[str, Value]) -> float:
        few, many = point["intra_op_threads"] == 1, point["steps_per_execution"] == 15
        return 100.0 + 10 * many + 40 * (few and many)

    found = searched(Machine(twisted), FOUR[:2])
    assert (found.winner.point["intra_op_threads"], found.winner.point["steps_per_execution"]) == (1, 15)


def test_where_nothing_gains_the_job_stays_as_it_is() -> None:
    machine = Machine(lambda point: 100.0 if point["prefetch"] == -1 else 100.0 * (1 + LEAST_GAIN / 2))
    found = searched(machine, FOUR)
    assert found.winner is found.start and found.gain == 1 and not any(final for _, final, _ in machine.asked)
    assert machine.count <= 9  # the ends, and one value between


def test_a_gain_that_the_longer_trials_do_not_show_is_none() -> None:
    """The first trial was unlucky: everything else looks better, until the job as it is is measured again."""
    machine = Machine(lambda point: 110.0)
    point = {a.name: START.values[a.name] for a in FOUR}
    first = Trial(1, point, 100.0, wall_s=10.0)
    found = Search(first, FOUR, machine, lambda p: p, lambda: machine.left, 8.0).run()
    assert found.confirmed and found.winner.point == point and found.winner is found.start
    assert [p for p, final, _ in machine.asked if final][1] == point


def test_failed_points_are_bad_points_and_not_the_end() -> None:
    machine = Machine(lambda point: None if point["steps_per_execution"] != 1 else typical(point))
    found = searched(machine, FOUR)
    assert found.winner.point["steps_per_execution"] == 1 and found.winner.point["intra_op_threads"] == 4
    assert any(trial.reason == "out of memory" for trial in found.trials)


def test_a_trial_is_told_below_which_speed_it_can_end() -> None:
    machine = Machine(typical)
    searched(machine, FOUR)
    speeds = [typical({a.name: START.values[a.name] for a in FOUR})]
    for point, final, below in machine.asked:
        assert below == (0 if final else pytest.approx(0.9 * max(speeds)))
        speeds.append(typical(point))


@pytest.mark.parametrize("budget", [30, 60, 100, 150, 240])
def test_the_budget_holds_with_the_final_trials_in_it(budget: float) -> None:
    machine = Machine(typical)
    machine.left = budget - 10.0  # the first trial's
    found = searched(machine, FOUR)
    assert machine.left >= 0
    assert found.out_of_time or budget >= 150
    assert found.confirmed or found.winner is found.start


def test_what_was_measured_is_kept_when_a_person_ends_it() -> None:
    machine = Machine(typical)
    first = Trial(1, {a.name: START.values[a.name] for a in FOUR}, 100.0, wall_s=10.0)

    def ends(point: Point, final: bool, below: float) -> Trial:
        if machine.count == 4:
            raise KeyboardInterrupt
        return machine(point, final, below)

    running = Search(first, FOUR, ends, lambda p: p, lambda: float("inf"), 8.0)
    with pytest.raises(KeyboardInterrupt):
        running.run()
    assert len(running.found.trials) == 4 and not running.found.confirmed


@pytest.mark.parametrize("cores", [2, 8, 64])
def test_the_benchmark_s_grid_has_64_points_of_what_is_searched(cores: int) -> None:
    values = {**START.values, "intra_op_threads": cores, "omp_threads": cores}
    axes = space.axes(dataclasses.replace(START, cores=cores, values=values), only=bench_tune.SETTINGS)
    narrowed = [dataclasses.replace(a, values=bench_tune.spread(a.values, bench_tune.EACH[a.name])) for a in axes]
    points = bench_tune.grid(narrowed)
    assert len({tuple(point.items()) for point in points}) == len(points) == 64
    for wide, narrow in zip(axes, narrowed, strict=True):
        assert set(narrow.values) <= set(wide.values) and narrow.values[0] == wide.values[0]
        assert narrow.values[-1] == wide.values[-1]


# ------------------------------------------------------------------ the job file

JOB = """\
# A job with words of its own.
base     = "mnist.toml"      # what is shared
strategy = "original"

[resources]
cpus_per_task = 64           # cores a run

[tuning]                     # by hand
prefetch = 2                 # batches

[params]
global_batch = 256           # images a step
"""


def comments(text: str) -> list[str]:
    return [line.partition("#")[2].strip() for line in text.splitlines() if "#" in line]


def test_a_job_file_keeps_everything_else() -> None:
    changes: dict[str, Value] = {"prefetch": 4, "jit_compile": True, "global_batch": 512, "precision": "mixed_float16"}
    text = write.rewritten(JOB, changes, "hpcml tune: 1.20 ×")
    expected = tomllib.loads(JOB)
    expected["tuning"] |= {"prefetch": 4, "jit_compile": True}
    expected["params"]["global_batch"] = 512
    expected["precision"] = "mixed_float16"
    assert tomllib.loads(text) == expected
    assert comments(text) == [c.replace("by hand", "hpcml tune: 1.20 ×") for c in comments(JOB)]
    unchanged = [line for line in JOB.splitlines() if not line.startswith(("prefetch", "[tuning]", "global_batch"))]
    assert [line for line in unchanged if line not in text.splitlines()] == []


@pytest.mark.parametrize(
    "text", ["", 'script = "a.py"', 'script = "a.py"\n', JOB.partition("[tuning]")[0], "[env]\nvars = {}\n"]
)
def test_a_table_is_made_where_there_is_none(text: str) -> None:
    done = write.rewritten(text, {"intra_op_threads": 2, "precision": "mixed_float16"}, "why")
    assert tomllib.loads(done) == {
        **tomllib.loads(text),
        "precision": "mixed_float16",
        "tuning": {"intra_op_threads": 2},
    }
    assert "[tuning] # why" in done
    again = write.rewritten(done, {"intra_op_threads": 1}, "later")
    assert again == done.replace("intra_op_threads = 2", "intra_op_threads = 1").replace("# why", "# later")


@pytest.mark.parametrize(
    "text", ['tuning = {prefetch = 2}\nscript = "a.py"\n', 'tuning.prefetch = 2\nscript = "a.py"\n']
)
def test_other_ways_to_write_the_table_are_kept_too(text: str) -> None:
    done = write.rewritten(text, {"prefetch": 8, "steps_per_execution": 4}, "why")
    assert tomllib.loads(done) == {"script": "a.py", "tuning": {"prefetch": 8, "steps_per_execution": 4}}


def test_a_link_is_followed_and_the_mode_kept(tmp_path: Path) -> None:
    real, link = tmp_path / "real.toml", tmp_path / "link.toml"
    real.write_text(JOB)
    real.chmod(0o640)
    link.symlink_to(real)
    write.write(link, {"prefetch": 8}, "why")
    assert link.is_symlink() and tomllib.loads(real.read_text())["tuning"] == {"prefetch": 8}
    assert real.stat().st_mode & 0o777 == 0o640 and sorted(p.name for p in tmp_path.iterdir()) == [
        "link.toml",
        "real.toml",
    ]


def test_a_file_that_was_broken_meanwhile_stays_and_the_values_are_told(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text("script = \n")
    with pytest.raises(HpcmlError, match=r"(?s)can't be written.*prefetch = 8.*jit_compile = true"):
        write.write(job, {"prefetch": 8, "jit_compile": True}, "why")
    assert job.read_text() == "script = \n"


# ------------------------------------------------------------------ threads at the bootstrap


def test_the_jobs_threads_are_set_and_never_more_than_cores() -> None:
    chosen = threads.choose(
        {}, 8, 1, on_gpu=False, tuning=Tuning(intra_op_threads=4, omp_threads=99, inter_op_threads=1)
    )
    assert chosen.variables[threads.INTRA] == "4" and chosen.origins[threads.INTRA] == "tuning"
    assert chosen.variables["OMP_NUM_THREADS"] == chosen.variables["OPENBLAS_NUM_THREADS"] == "8"
    assert chosen.variables[threads.INTER] == "1"


def test_threads_of_the_input_leave_the_rest_to_those_that_compute() -> None:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", threads.INTRA)
    for tuning in (Tuning(data_threads=3), Tuning(data_threads=3, intra_op_threads=8, omp_threads=7)):
        assert {threads.choose({}, 8, 1, on_gpu=False, tuning=tuning).variables[name] for name in names} == {"5"}
    alone = threads.choose({}, 1, 1, on_gpu=False, tuning=Tuning(data_threads=3))
    assert {alone.variables[name] for name in names} == {"1"}


def test_a_users_variable_wins_over_the_jobs_threads() -> None:
    own = {threads.INTRA: "3"}
    chosen = threads.choose(own, 8, 1, on_gpu=False, tuning=Tuning(intra_op_threads=4))
    assert (chosen.variables[threads.INTRA], chosen.origins[threads.INTRA]) == ("3", "environment")


def test_whose_threads_launch_kernels_matters_on_gpus_only() -> None:
    asked = Tuning(gpu_thread_mode="global")
    assert threads.choose({}, 8, 1, on_gpu=True, tuning=asked).variables[threads.GPU_MODE] == "global"
    assert threads.GPU_MODE not in threads.choose({}, 8, 1, on_gpu=False, tuning=asked).variables
