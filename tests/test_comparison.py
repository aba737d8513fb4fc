"""What ``hpcml compare`` reports: hand-computed numbers from run directories made by hpcml's own writers."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hpcml import plan, rundir
from hpcml.errors import HpcmlError
from hpcml.job import Environment, SlurmOptions
from hpcml.report import comparison as report
from hpcml.report.plot import figure, plot
from hpcml.rundir import RunDir
from hpcml.tracking.journal import Journal

Variant = Callable[..., RunDir]
CPUS = ("/device:CPU:0", "/device:CPU:1")
GPUS = ("/device:GPU:0", "/device:GPU:1")


def a_plan(name: str, strategy: str | None, **changes: Any) -> plan.Plan:
    made = plan.Plan(
        name=name,
        site="local",
        scheduler="local",
        work="notebook",
        target=("train.ipynb",),
        project="/project",
        job_file=f"jobs/{name}.toml",
        strategy=strategy,
        keras="legacy",
        precision="float32",
        experiment="mnist",
        nodes=1,
        gpus_per_node=0,
        tasks_per_node=1,
        cpus_per_task=2,
        mem_gb=None,
        time_s=600,
        gres=None,
        slurm=SlurmOptions(),
        env=Environment(),
        params={"epochs": 3},
        defaults={"global_batch": 256, "seed": 1},
        inject=True,
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture
def variant(tmp_path: Path) -> Variant:
    """Make a variant's run directory; ``epochs`` holds the metrics of epoch 1, 2, …"""

    def make(
        name: str,
        strategy: str | None = None,
        epochs: Sequence[Mapping[str, float]] = (),
        *,
        replicas: int | None = None,
        expected: int | None = None,
        devices: Sequence[str] = GPUS,
        virtual: bool = False,
        first_step_s: float | None = None,
        state: str | None = "COMPLETED",
        restart: int = 0,
        status: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> RunDir:
        run = RunDir(tmp_path, "compare").child(name).make()
        rundir.write_json(run.plan, a_plan(name, strategy or name, **changes).to_json())
        writer = Journal(run.event_file(0, restart, "rank"))
        if replicas is not None:
            seen = list(devices[:replicas])
            writer.write("replicas", in_sync=replicas, expected=expected or replicas, devices=seen, virtual=virtual)
        if first_step_s is not None:
            writer.metric(0, {"time_to_first_step_s": first_step_s})
        for number, values in enumerate(epochs, 1):
            writer.metric(number, values)
        writer.close()
        if state is not None:
            marker = {"state": state, "exit_code": 0 if state == "COMPLETED" else 1, "restarts": restart}
            rundir.write_json(run.status, {**marker, **(status or {})})
        return run

    return make


def speeds(*values: float, **others: float) -> list[dict[str, float]]:
    return [{"samples_per_s": value, **others} for value in values]


def say(run: RunDir, level: str, text: str, rank: int = 0, restart: int = 0, t: int | None = None) -> None:
    writer = Journal(run.event_file(rank, restart, "rank"))
    stamp = {} if t is None else {"t": t}  # fields come after the journal's own time and so replace it
    assert writer.write("message", level=level, text=text, **stamp)
    writer.close()


def shown(comparison: report.Comparison, width: int = 80) -> str:
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(report.table(comparison))
    return capture.get()


def line_of(text: str, start: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(start)).split()


def test_a_run_is_measured_without_its_first_epoch(variant: Variant) -> None:
    epochs = [
        {"samples_per_s": 100.0, "step_time_ms": 90.0, "accuracy": 0.5, "val_accuracy": 0.6},
        {"samples_per_s": 400.0, "step_time_ms": 20.0, "accuracy": 0.7, "val_accuracy": 0.8},
        {"samples_per_s": 420.0, "step_time_ms": 22.0, "accuracy": 0.8, "val_accuracy": 0.85},
        {"samples_per_s": 500.0, "step_time_ms": 10.0, "accuracy": 0.9, "val_accuracy": 0.875},
    ]
    m = report.measure(variant("mirrored", epochs=epochs, replicas=2, first_step_s=4.5))
    assert m.samples_per_s == 420.0  # the median of 400, 420 and 500
    assert m.step_time_ms == 20.0  # the median of 20, 22 and 10
    assert m.time_to_first_step_s == 4.5
    assert (m.accuracy, m.validated, m.train_accuracy) == (0.875, True, 0.9)
    assert (m.name, m.run_id, m.strategy, m.state) == ("mirrored", "compare/mirrored", "mirrored", "COMPLETED")
    assert (m.replicas, m.expected_replicas, m.virtual, m.devices) == (2, 2, False, GPUS)
    assert m.global_batch == 256
    assert m.epochs[1] == report.Epoch(2, 400.0, 0.8, 0.7)
    assert [epoch.number for epoch in m.epochs] == [1, 2, 3, 4]
    assert m.warnings == () and m.error is None


def test_two_epochs_leave_the_second_and_an_even_number_the_mean_of_two(variant: Variant) -> None:
    assert report.measure(variant("a", epochs=speeds(100, 400))).samples_per_s == 400
    assert report.measure(variant("b", epochs=speeds(1, 100, 200))).samples_per_s == 150


def test_one_epoch_is_used_and_said(variant: Variant) -> None:
    m = report.measure(variant("original", epochs=speeds(100, step_time_ms=7)))
    assert (m.samples_per_s, m.step_time_ms) == (100, 7)
    assert len(m.warnings) == 1 and "one epoch only" in m.warnings[0]


def test_speed_up_and_efficiency_relate_to_the_original_wherever_it_stands(variant: Variant) -> None:
    runs = [
        variant("mirrored", epochs=speeds(1, 1500), replicas=2),
        variant("original", epochs=speeds(1, 1000), replicas=1),
        variant("multiworker", epochs=speeds(1, 2000), replicas=4),
    ]
    compared = report.compare(runs)
    assert compared.baseline == "original"
    assert [row.measured.name for row in compared.rows] == ["mirrored", "original", "multiworker"]
    assert [row.speedup for row in compared.rows] == [1.5, 1.0, 2.0]
    assert [row.efficiency for row in compared.rows] == [0.75, 1.0, 0.5]
    assert compared.notes == ()


def test_a_baseline_of_two_replicas_halves_the_ratio(variant: Variant) -> None:
    runs = [variant("a", "mirrored", speeds(1, 100), replicas=2), variant("b", "mirrored", speeds(1, 150), replicas=4)]
    compared = report.compare(runs)
    assert compared.rows[1].efficiency == 0.75
    assert any("over a, the first" in note for note in compared.notes)


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(HpcmlError, match="nothing to compare"):
        report.compare([])


def test_a_failed_variant_keeps_its_row_with_state_and_reason(variant: Variant) -> None:
    failed = variant("multiworker", state="OUT_OF_MEMORY")
    say(failed, "error", "ResourceExhaustedError: out of memory [[GPU:0]]\n  at step 3")
    compared = report.compare([variant("original", epochs=speeds(1, 1000), replicas=1), failed])
    row = compared.rows[1]
    assert (row.speedup, row.efficiency, row.measured.samples_per_s) == (None, None, None)
    assert row.measured.error == "ResourceExhaustedError: out of memory [[GPU:0]]"
    text = shown(compared)
    assert line_of(text, "multiworker") == ["multiworker"] + ["–"] * 7
    assert line_of(text, "OUT_OF_MEMORY") == ["OUT_OF_MEMORY"]
    assert "multiworker OUT_OF_MEMORY: ResourceExhaustedError: out of memory [[GPU:0]]" in " ".join(text.split())


def test_the_reason_is_that_of_the_rank_that_failed_first(variant: Variant) -> None:
    run = variant("multiworker", state="FAILED")
    say(run, "error", "tried once", rank=1, t=500)
    say(run, "error", "Traceback (most recent call last):\n  File x\nValueError: bad label 12\n", rank=1, t=1000)
    say(run, "error", "UnavailableError: connection reset by peer", rank=0, t=8000)
    assert report.measure(run).error == "ValueError: bad label 12"


def test_without_a_message_the_exit_code_is_the_reason(variant: Variant) -> None:
    run = variant("original", state="FAILED", status={"exit_code": 137})
    assert report.measure(run).error == "exit code 137; hpcml logs compare/original"
    run = variant("original", state="FAILED", status={"exit_code": 143, "signal": "SIGTERM", "reason": ""})
    assert report.measure(run).error == "stopped by SIGTERM; hpcml logs compare/original"


@pytest.mark.parametrize(("state", "error"), [("FAILED", "ValueError: 12"), ("TIMEOUT", "past the time limit of 60 s")])
def test_the_markers_reason_goes_first_where_the_run_was_ended_from_outside(
    variant: Variant, state: str, error: str
) -> None:
    run = variant("original", state=state, status={"reason": "past the time limit of 60 s"})
    assert report.measure(run).error == "past the time limit of 60 s"
    say(run, "error", "ValueError: 12")
    assert report.measure(run).error == error


def test_a_warning_of_several_variants_is_shown_once(variant: Variant) -> None:
    runs = [variant("a", "mirrored"), variant("b", "mirrored")]
    for run in runs:
        say(run, "warning", "slow disk")
    compared = report.compare(runs)
    assert report.remarks(compared) == ["a, b: slow disk"]
    assert "a, b: slow disk" in shown(compared)
    assert compared.notes and not any(
        note[:20] in shown(compared) for note in compared.notes
    )  # the caller prints those


def test_a_rehearsals_speed_ups_are_starred_and_its_warning_is_said_once(variant: Variant) -> None:
    runs = [
        variant("original", epochs=speeds(1, 10), replicas=1, devices=CPUS, virtual=True),
        variant("mirrored", epochs=speeds(1, 8), replicas=2, devices=CPUS, virtual=True),
        variant("ddp", epochs=speeds(1, 9), replicas=2, devices=CPUS, virtual=True),
    ]
    kind = "share this machine's cores: they show that it works, not how fast; no speed-up"
    say(runs[1], "warning", f"virtual CPU devices {kind}")
    say(runs[2], "warning", f"ranks on CPUs {kind}")
    compared = report.compare(runs)
    told = [*compared.notes, *report.remarks(compared)]
    assert sum("no speed-up" in one for one in told) == 1 and told[0].startswith("* On virtual CPU devices")
    text = shown(compared)
    assert "0.80×*" in text and "0.90×*" in text and max(map(len, text.splitlines())) <= 80


def test_speed_ups_on_gpus_have_no_star(variant: Variant) -> None:
    runs = [
        variant("original", epochs=speeds(1, 10), replicas=1),
        variant("mirrored", epochs=speeds(1, 18), replicas=2),
    ]
    assert "1.80×" in shown(report.compare(runs)) and "*" not in shown(report.compare(runs))


def test_a_completed_run_has_no_error_whatever_it_said(variant: Variant) -> None:
    run = variant("original")
    say(run, "error", "a cell that may fail")
    assert report.measure(run).error is None


def test_a_run_without_a_marker_is_unknown(variant: Variant) -> None:
    m = report.measure(variant("original", state=None))
    assert m.state == "UNKNOWN" and "no end marker" in str(m.error)


def test_an_empty_directory_is_a_row(tmp_path: Path) -> None:
    compared = report.compare([RunDir(tmp_path, "20270101-000000-mnist").make()])
    m = compared.rows[0].measured
    assert (m.name, m.state, m.global_batch, m.replicas, m.epochs) == (
        "20270101-000000-mnist",
        "UNKNOWN",
        None,
        None,
        (),
    )
    assert "unknown devices" in compared.heading


def test_a_failed_baseline_gives_no_speed_up_and_says_so(variant: Variant) -> None:
    runs = [variant("original", state="FAILED"), variant("mirrored", epochs=speeds(1, 10), replicas=2)]
    compared = report.compare(runs)
    assert [row.speedup for row in compared.rows] == [None, None]
    assert any("original (FAILED) has no samples/s" in note for note in compared.notes)


def test_zero_stays_zero_and_missing_is_a_dash(variant: Variant) -> None:
    epochs = [{"samples_per_s": 0.0, "step_time_ms": 0.0, "val_accuracy": 0.0}] * 2
    stuck = variant("mirrored", epochs=epochs, replicas=2, first_step_s=0.0)
    compared = report.compare([variant("original", epochs=speeds(1, 10), replicas=1), stuck])
    assert (compared.rows[1].speedup, compared.rows[1].efficiency) == (0.0, 0.0)
    text = shown(compared)
    assert line_of(text, "mirrored") == ["mirrored", "2", "0", "0.00×", "0", "%", "0", "0", "0.0", "%"]
    assert line_of(text, "original") == ["original", "1", "10.0", "1.00×", "100", "%", "–", "–", "–"]


def test_only_the_last_restart_counts(variant: Variant) -> None:
    run = variant("original", epochs=speeds(1, 10, val_accuracy=0.1), replicas=1)
    say(run, "warning", "slow disk")
    variant("original", epochs=speeds(1, 20, 20, val_accuracy=0.9), replicas=2, restart=1)
    m = report.measure(run)
    assert (m.samples_per_s, m.accuracy, m.replicas, m.state) == (20, 0.9, 2, "COMPLETED")
    assert len(m.epochs) == 3 and m.warnings == ()


def test_the_marker_of_an_earlier_restart_is_ignored(variant: Variant) -> None:
    run = variant("original", epochs=speeds(1, 10), state="FAILED")
    variant("original", epochs=speeds(5, 30), state=None, restart=1)
    assert report.measure(run).state == "UNKNOWN"


def test_a_marker_of_a_restart_that_recorded_nothing_hides_what_was_before(variant: Variant) -> None:
    m = report.measure(variant("original", epochs=speeds(1, 10), state="FAILED", status={"restarts": 1}))
    assert (m.state, m.samples_per_s) == ("FAILED", None)


def test_only_rank_0_measures(variant: Variant) -> None:
    run = variant("multiworker", epochs=speeds(1, 10))
    other = Journal(run.event_file(1, 0, "rank"))
    other.metric(3, {"samples_per_s": 99_999.0})
    other.close()
    assert report.measure(run).samples_per_s == 10


def test_what_is_not_a_number_is_missing_not_a_crash(variant: Variant) -> None:
    epochs = [{"samples_per_s": 1.0, "val_accuracy": 0.9}, {"samples_per_s": float("inf"), "val_accuracy": 0.9}]
    epochs += [{"samples_per_s": 30.0, "val_accuracy": float("nan")}]
    m = report.measure(variant("original", epochs=epochs))
    assert m.samples_per_s == 30
    assert m.accuracy is None  # it diverged: the 0.9 of before is not what it ended with
    json.dumps(report.to_json(report.Comparison((report.Row(m, None, None),), "original")), allow_nan=False)


def test_accuracy_of_the_last_epoch_that_validated(variant: Variant) -> None:
    epochs = [{"accuracy": 0.5, "val_accuracy": 0.6}, {"accuracy": 0.7}]
    m = report.measure(variant("original", epochs=epochs))
    assert (m.accuracy, m.validated, m.train_accuracy) == (0.6, True, 0.7)


def test_without_validation_the_training_accuracy_stands_in_and_is_named(variant: Variant) -> None:
    compared = report.compare([variant("original", epochs=speeds(1, 10, accuracy=0.7))])
    m = compared.rows[0].measured
    assert (m.accuracy, m.validated) == (0.7, False)
    assert any("training data" in note for note in compared.notes)
    assert "val." not in shown(compared)


def test_replicas_out_of_sync_are_warned_of(variant: Variant) -> None:
    run = variant("multiworker", epochs=speeds(1, 10), replicas=1, expected=2)
    say(run, "warning", "slow disk")
    say(run, "warning", "slow disk", rank=1)
    m = report.measure(run)
    assert m.warnings[0] == "slow disk" and len(m.warnings) == 2 and "1 of 2 replicas" in m.warnings[1]
    assert "1 of 2" in shown(report.compare([run]))


def test_virtual_devices_promise_no_speed_up(variant: Variant) -> None:
    runs = [
        variant("original", epochs=speeds(1, 10), replicas=1, devices=CPUS),
        variant("mirrored", epochs=speeds(1, 8), replicas=2, devices=CPUS, virtual=True),
    ]
    compared = report.compare(runs)
    assert compared.heading == "training on virtual CPU devices, global batch 256"
    assert compared.notes == ("* On virtual CPU devices no speed-up can be expected: 2 replicas share the same cores.",)


def test_slower_on_gpus_is_told_with_what_would_change_it(variant: Variant) -> None:
    runs = [
        variant("original", epochs=speeds(1, 10), replicas=1),
        variant("mirrored", epochs=speeds(1, 9), replicas=2),
        variant("multiworker", epochs=speeds(1, 11), replicas=2),
        variant("broken", "mirrored", speeds(1, 2), replicas=2, state="FAILED"),
    ]
    notes = report.compare(runs).notes
    assert len(notes) == 1
    assert notes[0].startswith("mirrored: 2 GPUs are 0.90×") and "global_batch" in notes[0]


def test_a_baseline_of_one_epoch_gives_no_numbers_of_a_step(variant: Variant) -> None:
    runs = [variant("original", epochs=speeds(10), replicas=1), variant("mirrored", epochs=speeds(1, 9), replicas=2)]
    assert any(note.startswith("mirrored is slower on 2 GPUs (0.90×)") for note in report.compare(runs).notes)


@pytest.mark.parametrize(("other", "noted"), [(0.96, False), (0.959, True)])
def test_accuracy_more_than_two_points_apart_is_noted(variant: Variant, other: float, noted: bool) -> None:
    runs = [
        variant("original", epochs=[{"val_accuracy": 0.98}]),
        variant("mirrored", epochs=[{"val_accuracy": other}]),
        variant("dead", "mirrored", [{"val_accuracy": 0.1}], state="FAILED"),
    ]
    notes = [note for note in report.compare(runs).notes if "Accuracy differs" in note]
    assert bool(notes) is noted
    if noted:
        assert "2.1 points: original 98.0 %, mirrored 95.9 %" in notes[0]


def test_unlike_variants_are_noted_and_show_their_batch(variant: Variant) -> None:
    runs = [
        variant("original", epochs=speeds(1, 10)),
        variant("mirrored", epochs=speeds(1, 10), params={"epochs": 3, "global_batch": 1024}),
    ]
    compared = report.compare(runs)
    note = "not like for like: global_batch differs: original has 256, mirrored has 1024"
    assert note in compared.notes
    assert compared.shared_batch is None
    assert "1,024" in line_of(shown(compared), "mirrored")


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_and_loses_no_figure(variant: Variant, width: int) -> None:
    epochs = speeds(1, 123_456.7, step_time_ms=1234.5, val_accuracy=1.0)
    names = ("original", "mirrored", "multiworker-2-nodes-of-4-gpus")
    runs = [variant(name, "mirrored", epochs, replicas=2, first_step_s=123.4) for name in names]
    text = shown(report.compare(runs), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert line_of(text, "mirrored") == [
        *("mirrored", "2", "123,457", "1.00×", "100", "%", "1,234", "123", "100.0", "%")
    ]
    assert text.index("original  ") < text.index("mirrored  ") < text.index("multiworker-")


def test_json_there_and_back(variant: Variant) -> None:
    runs = [variant("original", epochs=speeds(1, 10, 10.1, val_accuracy=0.5), replicas=1), variant("b", state="FAILED")]
    compared = report.compare(runs)
    assert report.from_json(json.loads(json.dumps(report.to_json(compared)))) == compared


@pytest.mark.parametrize("data", [{}, {"rows": 3}, {"rows": [{"measured": {"epochs": []}}]}])
def test_other_json_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(HpcmlError, match="no comparison"):
        report.from_json(data)


def three(variant: Variant) -> report.Comparison:
    return report.compare(
        [
            variant("original", epochs=speeds(1, 1000, val_accuracy=0.9), replicas=1, devices=CPUS),
            variant("mirrored", epochs=speeds(1, 800, val_accuracy=0.92), replicas=2, devices=CPUS, virtual=True),
            variant("multiworker", state="FAILED"),
        ]
    )


def test_the_figure_shows_the_numbers(variant: Variant) -> None:
    drawn = figure(three(variant))
    speed, accuracy = drawn.axes
    assert [bar.get_width() for bar in speed.patches] == [1000, 800, 0]
    assert [label.get_text() for label in speed.get_yticklabels()] == [
        "original\n1 replica",
        "mirrored\n2 replicas",
        "multiworker",
    ]
    texts = [text.get_text() for text in speed.texts]
    assert texts[:3] == ["1,000  (1.00×)", "800  (0.80×)", "FAILED: no speed measured"]
    assert "virtual CPU devices: no speed-up can be expected" in texts
    assert speed.get_xlim()[0] == 0 and speed.get_xlim()[1] > 1000
    assert speed.yaxis_inverted()  # the first row is on top
    assert [line.get_label() for line in accuracy.lines] == ["original", "mirrored"]
    assert list(accuracy.lines[1].get_xdata()) == [1, 2] and list(accuracy.lines[1].get_ydata()) == [92, 92]
    assert accuracy.get_ylim()[1] - accuracy.get_ylim()[0] >= 5  # noise is not blown up
    assert [bar.get_facecolor()[:3] for bar in speed.patches[:2]] == [
        tuple(int(line.get_color()[i : i + 2], 16) / 255 for i in (1, 3, 5)) for line in accuracy.lines
    ]
    assert "virtual CPU devices" in drawn.get_suptitle()


def test_real_devices_carry_no_such_note(variant: Variant) -> None:
    drawn = figure(report.compare([variant("original", epochs=speeds(1, 10), replicas=1)]))
    assert drawn.get_suptitle() == "Training on GPUs, global batch 256"
    assert not any("virtual" in text.get_text() for text in drawn.axes[0].texts)
    assert [text.get_text() for text in drawn.axes[1].texts] == ["no accuracy recorded"]


@pytest.mark.parametrize(("value", "limits"), [(0.0, (0, 5)), (1.0, (95, 100)), (0.5, (47.5, 52.5))])
def test_the_accuracy_axis_stays_within_its_range(variant: Variant, value: float, limits: tuple[float, float]) -> None:
    drawn = figure(report.compare([variant("original", epochs=[{"val_accuracy": value}])]))
    assert drawn.axes[1].get_ylim() == pytest.approx(limits)


def test_the_png_is_an_image_1200_pixels_wide(variant: Variant, tmp_path: Path) -> None:
    path = tmp_path / "comparison.png"
    plot(three(variant), path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    width, height = int.from_bytes(content[16:20]), int.from_bytes(content[20:24])
    assert width == 1200 and 400 <= height <= 800
    assert 10_000 < len(content) < 300_000


def test_the_users_style_changes_nothing(variant: Variant, tmp_path: Path) -> None:
    import matplotlib

    compared = three(variant)
    plot(compared, tmp_path / "plain.png")
    with matplotlib.rc_context({"savefig.bbox": "tight", "font.size": 40, "axes.facecolor": "black"}):
        plot(compared, tmp_path / "styled.png")
    assert (tmp_path / "styled.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_a_plot_that_cannot_be_written_says_where(variant: Variant, tmp_path: Path) -> None:
    with pytest.raises(HpcmlError, match=r"missing/a\.png can't be written"):
        plot(three(variant), tmp_path / "missing" / "a.png")


def test_without_matplotlib_the_extra_is_named(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = three(variant)
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(HpcmlError, match=r"hpcml\[tensorflow\]"):
        figure(compared)
