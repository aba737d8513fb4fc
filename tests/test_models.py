"""Models: saved by the work with a signature, registered from a delivered run, promoted, and loaded again."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow", reason="needs the extra `mlflow`")
pytest.importorskip("sklearn", reason="needs the extra `mlflow`")

import numpy as np
from sklearn import linear_model

from hpcml import job, plan, site
from hpcml.errors import HpcmlError, ServiceSilent
from hpcml.rundir import RunDir, read_json, write_json
from hpcml.tracking import inference, journal, models, registry
from hpcml.tracking.mlflow import deliver


def make_run(root: Path, id: str, experiment: str = "MNIST") -> RunDir:
    """Make a run directory as the launcher leaves it, of a run that has ended."""
    run = RunDir(root, id).make()
    keys = {"name": "mnist", "command": ["true"], "experiment": experiment, "resources": {"cpus_per_task": 1}}
    write_json(run.plan, plan.resolve(job.from_tree(keys, {}, root), site.load("local")).to_json())
    writer = journal.Journal(run.event_file(0, 0, "rank"))
    writer.metric(1, {"val_accuracy": 0.75, "loss": 0.5})
    writer.close()
    write_json(run.status, {"state": "COMPLETED", "exit_code": 0, "started": 1.7e9, "ended": 1.7e9 + 60})
    return run


def line(slope: float = 2.0) -> tuple[Any, Any]:
    """A fitted line and some inputs of shape (20, 3)."""
    x = np.random.default_rng(7).random((20, 3))
    return linear_model.LinearRegression().fit(x, slope * x.sum(axis=1)), x


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for all tests of this file: making MLflow's tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(autouse=True)
def no_address_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)


def registered(root: Path, uri: str, id: str, name: str, slope: float = 2.0) -> tuple[RunDir, registry.Version]:
    model, x = line(slope)
    run = make_run(root, id, name)
    models.save(run, model, x)
    deliver(run, uri)
    version, is_new = registry.register(run, uri)
    assert is_new
    return run, version


# ---- saving -------------------------------------------------------------------------------------------------------------


def test_a_model_is_saved_with_signature_example_and_pinned_requirements(tmp_path: Path) -> None:
    import sklearn

    model, x = line()
    run = make_run(tmp_path, "r")

    folder = models.save(run, model, x)

    assert folder == run.path / "model"
    loaded = models.load(folder)
    assert loaded.metadata.metadata == {"hpcml.run": "r"}
    assert [spec.shape for spec in loaded.metadata.get_input_schema().inputs] == [(-1, 3)]
    assert [spec.shape for spec in loaded.metadata.get_output_schema().inputs] == [(-1,)]
    np.testing.assert_array_equal(np.array(json.loads((folder / "input_example.json").read_text())), x[:5])
    requirements = (folder / "requirements.txt").read_text().split()
    assert f"scikit-learn=={sklearn.__version__}" in requirements
    assert f"numpy=={np.__version__}" in (folder / "constraints.txt").read_text().split()
    np.testing.assert_array_equal(inference.predict(loaded, x), model.predict(x))
    assert sorted(path.name for path in run.path.iterdir() if "model" in path.name) == ["model"]


def test_a_second_model_takes_the_place_of_the_first(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    first, x = line(2.0)
    second, _ = line(-3.0)
    models.save(run, first, x)
    folder = models.save(run, second, x)
    assert folder
    np.testing.assert_array_equal(inference.predict(models.load(folder), x), second.predict(x))


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r")
    before = sorted(run.path.rglob("*"))
    assert models.save(run, *line(), rank=1) is None
    assert sorted(run.path.rglob("*")) == before


def test_what_is_no_model_is_told_with_what_would_be(tmp_path: Path) -> None:
    with pytest.raises(HpcmlError, match=r"builtins\.dict is no model(.|\n)*PythonModel"):
        models.save(make_run(tmp_path, "r"), {"weights": 1})


def test_a_failure_is_a_message_and_leaves_the_earlier_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "r")
    model, x = line()
    writer = journal.Journal(run.event_file(0, 0, "rank"))
    assert models.log(run, writer, 0, model, x)
    assert not models.log(run, writer, 0, model, x[:, :2])  # the example does not fit the model
    assert not models.log(run, writer, 0, "no model")
    writer.close()
    said = [(r["level"], r["text"]) for r in journal.read(run.events) if r["kind"] == "message"]
    assert [level for level, _ in said] == ["info", "warning", "warning"]
    assert "expecting 3 features" in said[1][1] and "no model that is known" in said[2][1]
    assert "the model is not saved" in capsys.readouterr().err
    np.testing.assert_array_equal(inference.predict(models.load(run.path / "model"), x), model.predict(x))


def test_a_python_model_is_saved_as_it_is(tmp_path: Path) -> None:
    import mlflow.pyfunc

    class Doubled(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
        def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow judges hints
            return model_input * 2

    x = np.arange(6.0).reshape(3, 2)
    folder = models.save(make_run(tmp_path, "r"), Doubled(), x)
    assert folder
    np.testing.assert_array_equal(inference.predict(models.load(folder), x), x * 2)


def test_a_torch_model_is_saved_as_a_graph_and_loads_without_its_class(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra `torch`")
    script = textwrap.dedent(
        """
        import sys, torch
        from pathlib import Path
        from hpcml.rundir import RunDir
        from hpcml.tracking import models

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(4, 2))
            def forward(self, x):
                return self.layers(x)

        torch.manual_seed(3)
        net, x = Net().double().float(), torch.rand(7, 3)
        run = RunDir(Path(sys.argv[1]), "r").make()
        models.save(run, net, x)
        assert net.training  # the caller's is left as it was
        torch.save({"x": x, "y": net.eval()(x).detach()}, run.path / "expected.pt")
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = torch.load(tmp_path / "r" / "expected.pt")
    said = inference.predict(models.load(tmp_path / "r" / "model"), expected["x"].numpy())
    np.testing.assert_allclose(said, expected["y"].numpy(), rtol=1e-6)
    assert not list((tmp_path / "r" / "model").rglob("*.pth"))


# ---- Keras: trained in one process, used in another ---------------------------------------------------------------------

TRAIN = """
import os, sys
os.environ["TF_USE_LEGACY_KERAS"] = sys.argv[2]
import numpy as np, tensorflow as tf
from pathlib import Path
from hpcml.rundir import RunDir
from hpcml.tracking import models
tf.keras.utils.set_random_seed(11)
layers = tf.keras.layers
with tf.distribute.MirroredStrategy(["CPU:0"]).scope() if sys.argv[2] == "1" else tf.device("CPU:0"):
    model = tf.keras.Sequential([layers.Input((4, 4, 1)), layers.Conv2D(2, 3), layers.BatchNormalization(),
                                 layers.Flatten(), layers.Dense(3, activation="softmax")])
    model.compile("adam", "sparse_categorical_crossentropy")
x = np.random.default_rng(11).random((16, 4, 4, 1))
model.fit(x, np.arange(16) % 3, epochs=1, verbose=0)
run = RunDir(Path(sys.argv[1]), "keras").make()
models.save(run, model, x[:5])
np.savez(run.path / "expected.npz", x=x.astype("float32"), y=model.predict(x, verbose=0))
"""


@pytest.mark.parametrize("legacy", ["1", "0"], ids=["tf-keras", "keras-3"])
def test_a_keras_model_says_the_same_in_a_process_that_knows_nothing_of_its_flavour(
    tmp_path: Path, legacy: str
) -> None:
    pytest.importorskip("tensorflow", reason="needs the extra `tensorflow`")
    pytest.importorskip("tf_keras", reason="needs the extra `tensorflow`")
    quiet = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    quiet.pop("TF_USE_LEGACY_KERAS", None)
    trained = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path), legacy], capture_output=True, text=True, env=quiet
    )
    assert trained.returncode == 0, trained.stderr
    run = make_run(tmp_path, "keras")
    expected = np.load(run.path / "expected.npz")
    np.savetxt(tmp_path / "x.csv", expected["x"].reshape(16, -1), delimiter=",")  # flat: the signature has the shape

    words = [sys.executable, "-m", "hpcml.cli", "model", "predict", "keras", str(tmp_path / "x.csv")]
    done = subprocess.run(words, capture_output=True, text=True, env=quiet | {"HPCML_RUNS": str(tmp_path)})

    assert done.returncode == 0, done.stderr
    said = np.array([[float(word) for word in row.split(",")] for row in done.stdout.splitlines()], dtype="float32")
    np.testing.assert_allclose(said, expected["y"], rtol=1e-6)
    loaded_by_name = (run.path / "model" / "data" / "keras_module.txt").read_text()
    assert loaded_by_name == ("tf_keras" if legacy == "1" else "keras")


# ---- the registry -------------------------------------------------------------------------------------------------------


def test_registered_twice_is_the_same_version_and_another_model_is_another(tmp_path: Path, uri: str) -> None:
    run, first = registered(tmp_path, uri, "20250101-000000-a", "twice")
    assert (first.name, first.version, first.run) == ("twice", 1, run.id)
    assert registry.register(run, uri) == (first, False)
    _, second = registered(tmp_path, uri, "20250101-000001-b", "twice", slope=3.0)
    assert second.version == 2
    assert registry.register(run, uri, "other name")[0].version == 1
    found = registry.versions(uri, tmp_path, "twice")
    assert [(v.version, v.run, v.metrics) for v in found] == [
        (2, "20250101-000001-b", {"val_accuracy": 0.75, "loss": 0.5}),
        (1, run.id, {"val_accuracy": 0.75, "loss": 0.5}),
    ]
    assert {v.name for v in registry.versions(uri, tmp_path)} >= {"twice", "other name"}


def test_an_alias_moves_and_the_model_is_fetched_by_it(tmp_path: Path, uri: str) -> None:
    _, x = line()
    for number, slope in enumerate((1.0, 2.0, 4.0)):
        registered(tmp_path / "runs", uri, f"20250101-00000{number}-m", "moves", slope)
    assert registry.promote(uri, tmp_path, "moves", 1)[1] is None
    version, before = registry.promote(uri, tmp_path, "moves", 2)
    assert (version.aliases, before) == (("champion",), 1)
    registry.promote(uri, tmp_path, "moves", 1, "challenger")

    def slope_of(reference: str) -> float:
        folder, _ = registry.fetch(uri, tmp_path, reference, tmp_path / "got")
        before = sorted(folder.rglob("*"))
        said = inference.predict(models.load(folder), x)
        assert sorted(folder.rglob("*")) == before  # the store is left as it is
        return round(float(said[0] / x[0].sum()), 6)

    assert {name: slope_of(name) for name in ("moves", "moves@champion", "moves@challenger", "moves/3")} == {
        "moves": 2.0,
        "moves@champion": 2.0,
        "moves@challenger": 1.0,
        "moves/3": 4.0,
    }


def test_without_a_champion_the_newest_version_is_meant(tmp_path: Path, uri: str) -> None:
    for number in range(2):
        registered(tmp_path, uri, f"20250101-00000{number}-n", "no champion", number + 1.0)
    assert registry.fetch(uri, tmp_path, "no champion", tmp_path / "got")[1].version == 2


def test_a_run_without_a_model_or_not_delivered_is_told_so(tmp_path: Path, uri: str) -> None:
    run = make_run(tmp_path, "20250101-000000-late", "late")
    with pytest.raises(HpcmlError, match=r"has no model\n  fix: save one in the work: run\.log_model"):
        registry.register(run, uri)
    models.save(run, *line())
    with pytest.raises(HpcmlError, match=f"has not all of run {run.id}\n  fix: hpcml sync {run.id}"):
        registry.register(run, uri)
    deliver(run, uri)
    assert registry.register(run, uri)[1]
    models.save(run, *line(9.0))  # again, after the delivery
    with pytest.raises(HpcmlError, match="hpcml sync"):
        registry.register(run, uri)


def test_a_comparison_names_its_variants_that_have_a_model(tmp_path: Path, uri: str) -> None:
    parent = make_run(tmp_path, "20250101-000000-both", "both")
    variant = make_run(tmp_path, "20250101-000000-both/mirrored", "both")
    models.save(variant, *line())
    with pytest.raises(HpcmlError, match=f"allowed: {variant.id}"):
        registry.register(parent, uri)
    deliver(variant, uri)
    assert registry.register(variant, uri)[0].run == variant.id


def test_unknown_names_versions_and_aliases_come_with_the_nearest(tmp_path: Path, uri: str) -> None:
    registered(tmp_path, uri, "20250101-000000-k", "known")
    registry.promote(uri, tmp_path, "known", 1)
    for reference, told in {
        "knwon": "did you mean 'known'",
        "known@champoin": "did you mean 'champion'",
        "known@other": "hpcml model promote known VERSION --alias other",
        "known/7": "no version 7\n  allowed: 1",
        "known@": "NAME@ALIAS",
        "a/b/c": "NAME/VERSION",
    }.items():
        with pytest.raises(HpcmlError) as caught:
            registry.fetch(uri, tmp_path, reference, tmp_path / "got")
        assert told in str(caught.value)
    with pytest.raises(HpcmlError, match="no version 2"):
        registry.promote(uri, tmp_path, "known", 2)
    for alias in ("latest", "v1", "a b"):
        with pytest.raises(HpcmlError, match="does not take alias"):
            registry.promote(uri, tmp_path, "known", 1, alias)
    with pytest.raises(HpcmlError, match="no model 'none'"):
        registry.versions(uri, tmp_path, "none")


@pytest.mark.parametrize("name", ["it's", 'say "x"', "modèle 名", "a.b-c_d", "x" * 200])
def test_odd_names_are_found_again(tmp_path: Path, uri: str, name: str) -> None:
    run = make_run(tmp_path, "20250101-000000-odd", "odd")
    models.save(run, *line())
    deliver(run, uri)
    version, _ = registry.register(run, uri, name)
    assert registry.register(run, uri, name) == (version, False)
    assert registry.fetch(uri, tmp_path, name, tmp_path / "got")[1].name == name


def test_a_name_that_mlflow_refuses_is_the_persons_to_change(tmp_path: Path, uri: str) -> None:
    run = make_run(tmp_path, "20250101-000000-bad", "lab/mnist:1")
    models.save(run, *line())
    deliver(run, uri)
    with pytest.raises(HpcmlError, match=r"does not take the name 'a/b'(.|\n)*allowed: any text without / and :"):
        registry.register(run, uri, "a/b")
    assert registry.register(run, uri)[0].name == "lab-mnist-1"  # the experiment's, as a model may be called


def test_files_that_are_gone_are_told_with_the_run_to_deliver(tmp_path: Path, uri: str) -> None:
    _, version = registered(tmp_path, uri, "20250101-000000-g", "gone")
    folder, _ = registry.fetch(uri, tmp_path, "gone", tmp_path / "got")
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(HpcmlError, match=f"files of gone/1 are gone(.|\n)*hpcml sync {version.run}"):
        registry.fetch(uri, tmp_path, "gone", tmp_path / "got")


def test_a_version_whose_files_were_overwritten_is_refused(tmp_path: Path, uri: str) -> None:
    """A run that is continued and delivered again leaves another model where the version's was."""
    run, _ = registered(tmp_path, uri, "20250101-000000-o", "overwritten")
    models.save(run, *line(9.0))
    deliver(run, uri)
    with pytest.raises(HpcmlError, match=f"not those that were registered(.|\n)*hpcml model register {run.id}"):
        registry.fetch(uri, tmp_path, "overwritten/1", tmp_path / "got")
    assert registry.register(run, uri)[0].version == 2
    assert registry.fetch(uri, tmp_path, "overwritten", tmp_path / "got")[1].version == 2


def test_a_silent_server_is_exit_3(tmp_path: Path) -> None:
    with pytest.raises(ServiceSilent) as caught:
        registry.versions("http://127.0.0.1:9", tmp_path)
    assert caught.value.exit_code == 3


# ---- inputs and outputs -------------------------------------------------------------------------------------------------


def schema(*specs: tuple[Any, ...]) -> Any:
    from mlflow.types import Schema, TensorSpec

    return Schema([TensorSpec(np.dtype(kind), shape, *name) for kind, shape, *name in specs])


def test_inputs_are_read_from_each_kind_of_file(tmp_path: Path) -> None:
    x = np.arange(6.0).reshape(3, 2)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "one.npz", anything=x)
    np.savez(tmp_path / "two.npz", x_train=x + 1, x_test=x)
    (tmp_path / "x.csv").write_text("0,1\n2,3\n4,5\n")
    (tmp_path / "named.csv").write_text("a,b\n0,1\n2,3\n4,5\n")
    for name, value in {
        "rows": x.tolist(),
        "served": {"inputs": x.tolist()},
        "also": {"instances": x.tolist()},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    wanted = schema(("float32", (-1, 2)))
    for name in ("x.npy", "one.npz", "x.csv", "named.csv", "rows.json", "served.json", "also.json"):
        got = inference.fit(inference.read(tmp_path / name), wanted, name)
        assert got.dtype == np.float32, name
        np.testing.assert_array_equal(got, x)
    np.testing.assert_array_equal(inference.read(tmp_path / "two.npz", "x_test"), x)
    with pytest.raises(HpcmlError, match=r"the file has x_train, x_test\n  fix: name one: --array NAME"):
        inference.fit(inference.read(tmp_path / "two.npz"), wanted, "two.npz")
    with pytest.raises(HpcmlError, match="did you mean 'x_test'"):
        inference.read(tmp_path / "two.npz", "x_tset")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.csv", b"", "empty"),
        ("x.csv", b"1,2\n3\n", "does not hold"),
        ("x.csv", b"\xff\xfe", "does not hold"),
        ("x.json", b"{", "does not hold"),
        ("x.json", b"[[1, 2], [3]]", "does not hold"),
        ("x.npy", b"nonsense", "does not hold"),
        ("x.npz", b"nonsense", "does not hold"),
        ("x.h5", b"", "allowed: .npy, .npz, .csv, .json"),
    ],
)
def test_a_broken_input_is_named(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HpcmlError, match=told):
        inference.read(tmp_path / name)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(HpcmlError, match="does not hold"):
        inference.read(tmp_path / "x.npy")
    with pytest.raises(HpcmlError, match="No such file"):
        inference.read(tmp_path / "absent.npy")


def test_a_wrong_shape_is_told_beside_the_right_one() -> None:
    wanted = schema(("float32", (-1, 28, 28, 1)))
    assert inference.fit(np.zeros((5, 784)), wanted, "x.csv").shape == (5, 28, 28, 1)
    with pytest.raises(HpcmlError, match=r"shape \(5, 783\), the model takes \(rows, 28, 28, 1\) of float32"):
        inference.fit(np.zeros((5, 783)), wanted, "x.csv")
    with pytest.raises(HpcmlError, match="put the one row in a list"):
        inference.fit(np.zeros((28, 28, 1)), wanted, "x.csv")


@pytest.mark.parametrize(
    ("given", "wanted", "fits"),
    [
        (np.array([[1.0, 255.0]]), "uint8", True),
        (np.array([[1, 2]]), "float32", True),
        (np.array([[0.1, 2]]), "float32", True),
        (np.array([[0.5, 2]]), "uint8", False),
        (np.array([[256]]), "uint8", False),
        (np.array([["a"]]), "float32", False),
    ],
)
def test_a_type_changes_only_where_the_number_stays(given: Any, wanted: str, fits: bool) -> None:
    takes = schema((wanted, (-1, given.shape[1])))
    if fits:
        assert inference.fit(given, takes, "x").dtype == wanted
    else:
        with pytest.raises(HpcmlError, match="the model takes"):
            inference.fit(given, takes, "x")


def test_named_inputs_are_matched_by_name() -> None:
    takes = schema(("float32", (-1, 2), "image"), ("int64", (-1,), "label"))
    got = inference.fit({"label": np.array([1]), "image": np.array([[1, 2]]), "more": np.array([0])}, takes, "x")
    assert {name: values.dtype.name for name, values in got.items()} == {"image": "float32", "label": "int64"}
    with pytest.raises(HpcmlError, match=r"no array 'image'(.|\n)*did you mean 'imgae'"):
        inference.fit({"imgae": np.zeros((1, 2)), "label": np.array([1])}, takes, "x")
    with pytest.raises(HpcmlError, match=r"several arrays by name"):
        inference.fit(np.zeros((1, 2)), takes, "x")


def test_columns_are_matched_by_name(tmp_path: Path) -> None:
    import pandas

    frame = pandas.DataFrame({"a": [1.0, 2.0, 3.0], "b": [0.0, 1.0, 0.5]})
    model = linear_model.LinearRegression().fit(frame, frame["a"] - frame["b"])
    folder = models.save(make_run(tmp_path, "r"), model, frame)
    assert folder
    (tmp_path / "x.csv").write_text("b,c,a\n0.25,9,1\n")
    loaded = models.load(folder)
    takes = loaded.metadata.get_input_schema()
    said = inference.predict(loaded, inference.fit(inference.read(tmp_path / "x.csv"), takes, "x.csv"))
    np.testing.assert_allclose(said, [0.75])
    with pytest.raises(HpcmlError, match="columns are missing: b"):
        inference.fit(frame[["a"]], takes, "x.csv")


@pytest.mark.parametrize("suffix", inference.OUTPUTS)
def test_outputs_read_back_as_they_were(tmp_path: Path, suffix: str) -> None:
    said = np.random.default_rng(5).random((4, 3)).astype("float32")
    path = tmp_path / f"y{suffix}"
    inference.write(said, path)
    np.testing.assert_array_equal(np.asarray(inference.read(path), dtype="float32"), said)


def test_named_outputs_have_columns_of_their_own(tmp_path: Path) -> None:
    said = {"label": np.array([1, 0]), "scores": np.array([[0.5, 0.25], [1.0, 0.0]])}
    assert list(inference.lines(said)) == ["label,scores.0,scores.1", "1,0.5,0.25", "0,1.0,0.0"]
    with pytest.raises(HpcmlError, match=r"allowed: \.npz, \.csv, \.json"):
        inference.write(said, tmp_path / "y.npy")
    with pytest.raises(HpcmlError, match="can't be written"):
        inference.write(said, tmp_path / "no" / "y.csv")


def test_delivered_says_where_the_run_is(tmp_path: Path, uri: str) -> None:
    """What ``register`` relies on: the address without credentials and MLflow's id."""
    run = make_run(tmp_path, "20250101-000000-w", "where")
    done = deliver(run, uri)
    noted = read_json(run.delivered)
    assert (noted["uri"], noted["run_id"]) == (done.uri, done.run_id)
