"""What a comparison says of a model too small for its GPUs: the batch at which that turns, and who trained with what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from report_samples import Writer
from rich.console import Console
from test_comparison import a_plan

from hpcml import rundir
from hpcml.report import comparison as report
from hpcml.report.scaling import Parts, Shared, rounded
from hpcml.rundir import RunDir

TENSORFLOW = {"tensorflow": "2.21.0", "torch": "2.13.0+cu126", "numpy": "2.4.6"}


def a_variant(
    root: Path,
    name: str,
    step_ms: float,
    replicas: int = 1,
    split: Mapping[str, float] | None = None,
    *,
    strategy: str = "",
    devices: str = "/device:GPU:",
    batch: int = 256,
    packages: Mapping[str, str] | None = None,
    **more: Any,
) -> RunDir:
    """A run on GPUs of five epochs, with the step time given and the split of a profile, parts in ms."""
    run = RunDir(root, "compare").child(name).make()
    params = {"params": {"epochs": 5, "global_batch": batch}, **more}
    rundir.write_json(run.plan, a_plan(name, strategy or name, **params).to_json())
    rundir.write_json(run.status, {"state": "COMPLETED", "exit_code": 0, "restarts": 0})
    if packages is not None:
        rundir.write_json(run.provenance, {"packages": dict(packages)})
    writer = Writer(run)
    virtual = "CPU" in devices
    names = [f"{devices}{number}" for number in range(replicas)]
    writer.write(1.0, "replicas", in_sync=replicas, expected=replicas, devices=names, virtual=virtual)
    for epoch in range(1, 6):
        values = {"samples_per_s": 1000 * batch / step_ms, "step_time_ms": step_ms, "val_accuracy": 0.9}
        writer.write(2.0 + epoch, "metric", step=epoch, values=values)
    if split is not None:
        parts = dict.fromkeys(("input_ms", "host_ms", "device_compute_ms", "communication_ms", "idle_ms"), 0.0)
        split = {"step_ms": sum(split.values()), **parts, **split}
        writer.write(9.0, "profile", first=10, last=20, folder="profile", split=split, advice="")
    return run


def note_on(name: str, runs: list[RunDir]) -> str:
    """The note on a variant's step; empty where there is none."""
    found = [note for note in report.compare(runs).notes if note.startswith(f"{name}: ")]
    assert len(found) < 2
    return found[0] if found else ""


# ------------------------------------------------------------------ the model

times = st.floats(0.01, 100.0)


@given(
    fixed=times,
    kernels=times,
    compute=st.floats(1e-3, 10.0),
    reduce=times,
    batch=st.integers(2, 100_000),
    n=st.integers(2, 64),
)
def test_with_both_profiles_the_curves_cross_at_the_batch_told(
    fixed: float, kernels: float, compute: float, reduce: float, batch: int, n: int
) -> None:
    """Also where computing has a part that no smaller batch makes shorter, and devices are launched one after another."""

    def alone(b: float) -> float:
        return fixed + kernels + compute * b

    def shared(b: float) -> float:
        return 1.2 * fixed + kernels + compute * b / n + reduce

    at_one, at_n = kernels + compute * batch, kernels + compute * batch / n
    assume(at_one - at_n > 0.15 * at_one)
    told = Shared(
        batch,
        n,
        alone(batch),
        shared(batch),
        Parts(alone(batch), fixed, at_one, 0.0),
        Parts(shared(batch), 1.2 * fixed, at_n, reduce),
    )
    crossing = told.crossing
    assert told.exact and crossing is not None
    assert alone(crossing) == pytest.approx(shared(crossing), rel=1e-6)


@given(
    fixed=times,
    kernels=st.floats(0.0, 100.0),
    compute=st.floats(1e-3, 10.0),
    reduce=times,
    batch=st.integers(2, 100_000),
    n=st.integers(2, 64),
    profiled=st.sampled_from(["alone", "shared", "none"]),
)
def test_with_less_than_both_profiles_a_bound_is_never_above_the_true_batch(
    fixed: float, kernels: float, compute: float, reduce: float, batch: int, n: int, profiled: str
) -> None:
    saved = compute * batch * (1 - 1 / n)
    assume(reduce > saved)  # several devices are slower
    true = reduce / (compute * (1 - 1 / n))
    one = fixed + kernels + compute * batch
    several = one - saved + reduce
    alone = Parts(one, fixed, kernels + compute * batch, 0.0) if profiled == "alone" else None
    shared = Parts(several, fixed, kernels + compute * batch / n, reduce) if profiled == "shared" else None
    told = Shared(batch, n, one, several, alone, shared)
    assert not told.exact and told.crossing is not None
    assert batch * (1 - 1e-9) <= told.crossing <= true * (1 + 1e-6)


@pytest.mark.parametrize(
    ("batch", "multiple", "shown"),
    [(2048.0, 0, 2000), (2048.0, 2, 2100), (2048.0, 8, 2104), (7.2, 2, 8), (99.5, 3, 102)],
)
def test_a_batch_has_two_digits(batch: float, multiple: int, shown: int) -> None:
    assert rounded(batch, multiple) == shown


# ------------------------------------------------------------------ what is said

# A step alone: 0.9 ms for whatever batch, 0.0078125 ms a sample. Shared by two: the same, and an all-reduce of 1.5 ms.
ALONE = {"host_ms": 0.9, "device_compute_ms": 2.0}
SHARED = {"host_ms": 0.9, "device_compute_ms": 1.0, "communication_ms": 1.5}


def test_with_both_profiles_the_batch_that_would_pay_is_told(tmp_path: Path) -> None:
    runs = [a_variant(tmp_path, "original", 2.9, split=ALONE), a_variant(tmp_path, "mirrored", 3.4, 2, SHARED)]
    assert note_on("mirrored", runs) == (  # 256 + (3.4 - 2.9) / (0.0078125 · ½) = 384
        "mirrored: 2 GPUs are 0.85×: a step takes 3.4 ms (profiled: 3.4 ms, of which 1.5 all-reduce and 0.9 host and "
        "launching); on one GPU it takes 2.9 ms. From about global_batch = 390 on, 2 GPUs would pay."
    )


@pytest.mark.parametrize("who", ["original", "mirrored"])
def test_one_profile_gives_a_bound(tmp_path: Path, who: str) -> None:
    runs = [
        a_variant(tmp_path, "original", 2.9, split=ALONE if who == "original" else None),
        a_variant(tmp_path, "mirrored", 3.4, 2, SHARED if who == "mirrored" else None),
    ]
    note = note_on("mirrored", runs)
    assert ("1.5 all-reduce" in note) is (who == "mirrored")
    assert "2 GPUs will hardly pay below about global_batch = 380, by the one profile;" in note
    assert "profile.steps" in note


def test_without_a_profile_only_what_step_times_tell_is_told(tmp_path: Path) -> None:
    runs = [a_variant(tmp_path, "original", 2.9), a_variant(tmp_path, "mirrored", 3.4, 2)]
    note = note_on("mirrored", runs)
    assert "a step takes 3.4 ms; on one GPU it takes 2.9 ms. No profile tells where the time goes;" in note
    assert "will hardly pay below about global_batch = 340" in note  # 256 + 256 · 0.5 / (2.9 · ½)
    assert "all-reduce" not in note and "--set 'profile.steps=[10, 20]'" in note


def test_a_gpu_that_half_a_batch_keeps_as_long_is_told_of_instead_of_a_batch(tmp_path: Path) -> None:
    runs = [
        a_variant(tmp_path, "original", 1.0, split={"host_ms": 0.7, "device_compute_ms": 0.30}),
        a_variant(tmp_path, "mirrored", 1.3, 2, {"host_ms": 0.7, "device_compute_ms": 0.29, "communication_ms": 0.3}),
    ]
    note = note_on("mirrored", runs)
    assert "A GPU computes 0.3 ms for 256 samples, 0.29 for 128: too few to fill it." in note
    assert "would pay" not in note and "-p global_batch=4096" in note


def test_a_profile_without_a_devices_work_counts_as_none(tmp_path: Path) -> None:
    empty = {"host_ms": 2.0, "device_compute_ms": 0.0}
    runs = [a_variant(tmp_path, "original", 2.9, split=empty), a_variant(tmp_path, "mirrored", 3.4, 2, empty)]
    assert "No profile tells" in note_on("mirrored", runs)


def test_a_baseline_of_another_framework_is_no_measure_of_a_batch(tmp_path: Path) -> None:
    original = a_variant(tmp_path, "original", 2.0, split=ALONE, packages=TENSORFLOW)
    ddp = a_variant(tmp_path, "ddp", 3.4, 2, SHARED, packages=TENSORFLOW, devices="GPU:")
    note = note_on("ddp", [original, ddp])
    assert "on one GPU with TensorFlow it takes 2 ms." in note
    # Its own computing: 1 ms for 128 samples, so that 1.5 ms of all-reduce are spared from 1.5 / (0.0078125 · ½) on.
    assert note.endswith(
        "will hardly pay against one with the same framework below about global_batch = 380, by its own profile."
    )
    quick = a_variant(tmp_path, "quick", 3.4, 2, {**SHARED, "communication_ms": 0.2}, strategy="ddp", devices="GPU:")
    assert note_on("quick", [original, quick]).endswith("the difference can be the framework's.")
    plain = a_variant(tmp_path, "plain", 3.4, 2, strategy="ddp", devices="GPU:")
    assert "can't be told across frameworks without a profile" in note_on("plain", [original, plain])


def test_nothing_is_told_of_virtual_devices_or_where_it_pays(tmp_path: Path) -> None:
    cpus = "/device:CPU:"
    runs = [
        a_variant(tmp_path, "original", 2.9, split=ALONE, devices=cpus),
        a_variant(tmp_path, "mirrored", 3.4, 2, SHARED, devices=cpus),
    ]
    assert note_on("mirrored", runs) == ""
    runs = [a_variant(tmp_path, "a", 2.9, strategy="original"), a_variant(tmp_path, "b", 2.8, 2, strategy="mirrored")]
    assert note_on("b", runs) == ""


def test_different_batches_can_not_be_set_together(tmp_path: Path) -> None:
    runs = [a_variant(tmp_path, "original", 2.9), a_variant(tmp_path, "mirrored", 13.6, 2, batch=512)]
    notes = report.compare(runs).notes
    assert any("mirrored is slower on 2 GPUs" in note and "larger global batch than 512" in note for note in notes)
    assert not any("would pay" in note or "will hardly pay" in note for note in notes)


# ------------------------------------------------------------------ who trained with what


def five(root: Path) -> list[RunDir]:
    built = {**TENSORFLOW, "horovod": "0.28.1"}
    return [
        a_variant(root, "mnist-original", 4.0, strategy="original", packages=TENSORFLOW),
        a_variant(root, "mnist-mirrored", 3.0, 2, strategy="mirrored", packages=TENSORFLOW),
        a_variant(root, "mnist-multiworker", 3.0, 2, strategy="multiworker", packages=TENSORFLOW),
        a_variant(root, "mnist-ddp", 3.0, 2, strategy="ddp", packages=TENSORFLOW, devices="GPU:"),
        a_variant(root, "mnist-horovod", 3.0, 2, strategy="horovod", packages=built, devices="GPU:"),
    ]


def table(compared: report.Comparison, width: int) -> str:
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(report.table(compared))
    return capture.get()


def test_five_strategies_are_one_table_with_framework_and_version(tmp_path: Path) -> None:
    compared = report.compare(five(tmp_path))
    assert [[one.text for one in row.frameworks] for row in compared.rows] == [
        *([["TensorFlow 2.21.0"]] * 3),
        ["torch 2.13.0+cu126"],
        ["torch 2.13.0+cu126", "Horovod 0.28.1"],
    ]
    text = table(compared, 80)
    assert text.count("TensorFlow 2.21.0") == 3 and text.count("Horovod 0.28.1") == 1
    assert "mnist-multiworker " in text and max(map(len, text.splitlines())) <= 80
    assert len(compared.notes) == 1
    assert (
        "TensorFlow: mnist-original, mnist-mirrored, mnist-multiworker; torch: mnist-ddp, mnist-horovod"
        in compared.notes[0]
    )
    assert "as those of two seeds" in compared.notes[0]
    assert report.from_json(json.loads(json.dumps(report.to_json(compared)))) == compared


def test_one_framework_for_all_needs_no_word(tmp_path: Path) -> None:
    compared = report.compare(five(tmp_path)[:3])
    assert "TensorFlow" not in table(compared, 80) and compared.notes == ()


def test_two_builds_of_one_framework_are_shown(tmp_path: Path) -> None:
    ours, theirs, unknown = (a_variant(tmp_path, name, 3.0, 2, strategy="ddp", devices="GPU:") for name in "abc")
    rundir.write_json(ours.provenance, {"packages": {"torch": "2.13.0+cu126"}})
    assert "torch" not in table(report.compare([ours, unknown]), 80), "what is not known is no difference"
    rundir.write_json(theirs.provenance, {"packages": {"torch": "2.12.1"}})
    compared = report.compare([ours, theirs])
    assert "torch 2.13.0+cu126" in table(compared, 80) and "torch 2.12.1" in table(compared, 80)
    assert not any("Two frameworks" in note for note in compared.notes)


def test_horovod_with_keras_is_tensorflows(tmp_path: Path) -> None:
    original, *_ = five(tmp_path)
    built = {**TENSORFLOW, "horovod": "0.28.1"}
    keras = a_variant(tmp_path, "keras", 3.4, 2, strategy="horovod", packages=built)
    compared = report.compare([original, keras])
    assert [one.text for one in compared.rows[1].frameworks] == ["TensorFlow 2.21.0", "Horovod 0.28.1"]
    assert not any("Two frameworks" in note for note in compared.notes)


def test_a_comparison_of_before_there_were_frameworks_is_read(tmp_path: Path) -> None:
    data = json.loads(json.dumps(report.to_json(report.compare(five(tmp_path)[:2]))))
    for row in data["rows"]:
        del row["frameworks"], row["parts"]
    assert [row.frameworks for row in report.from_json(data).rows] == [(), ()]


def test_who_is_tuned_and_who_is_not_is_told(tmp_path: Path) -> None:
    from hpcml.job import Tuning

    tuned = a_variant(tmp_path, "a", 4.0, strategy="original", tuning=Tuning(prefetch=4))
    runs = [tuned, a_variant(tmp_path, "b", 3.0, 2, strategy="mirrored")]
    assert any(note.startswith("Tuned: a (prefetch). Not tuned: b.") for note in report.compare(runs).notes)
    both = a_variant(tmp_path, "c", 3.0, 2, strategy="mirrored", tuning=Tuning(prefetch=2))
    assert report.compare([tuned, both]).notes == ()
