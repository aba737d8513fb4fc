"""Folders of images, weights files, and the flowers notebooks: trained on drawn flowers, with weights made here."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcml import data, facts, job, plan, rundir, site
from hpcml.data import images
from hpcml.errors import HpcmlError

np = pytest.importorskip("numpy", reason="NumPy: not installed")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
VARIANTS = {"flowersOrig": "original", "flowersSol": "mirrored", "flowersSol2": "multiworker"}
KINDS = {"daisy": "white", "dandelion": "yellow", "rose": "red", "tulip": "blue"}
SEED = 20
# The smallest picture that a decoder's two ends show: enough for what only looks at files.
JPEG = b"\xff\xd8\xff\xe0 picture \xff\xd9"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder, empty."""
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("HPCML_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HPCML_SITE", "local")
    return tmp_path / "data"


def fill(folder: Path, count: int = 5, kinds: Any = ("daisy", "rose")) -> Path:
    for kind in kinds:
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            (folder / kind / f"{number}.jpg").write_bytes(JPEG[:4] + f"{kind} {number}".encode() + JPEG[4:])
    return folder


# ------------------------------------------------------------------ a folder of images


def test_of_each_class_a_fifth_is_to_test(place: Path) -> None:
    found = images.load(str(fill(place / "flowers", 10)))
    assert found.classes == ("daisy", "rose")
    for (files, labels), count in ((found.train, 8), (found.test, 2)):
        assert labels.dtype == "int64" and np.bincount(labels).tolist() == [count, count]
        for file, label in zip(files, labels, strict=True):
            assert Path(file).parent.name == found.classes[label] and os.path.isabs(file)
        assert count == 2 or sorted(labels) != labels.tolist(), "not sorted by class"
    assert not set(found.train[0]) & set(found.test[0])


def test_split_order_and_fingerprint_are_the_seeds_and_the_contents(place: Path, tmp_path: Path) -> None:
    here = images.load(str(fill(place / "flowers")))
    # Another folder, made in another order, with what is no image of it beside them.
    there = tmp_path / "else" / "where"
    fill(there, kinds=("rose", "daisy"))
    for stray in ("LICENSE.txt", ".DS_Store", "daisy/notes.txt", "daisy/._0.jpg"):
        (there / stray).write_text("stray")
    (there / ".cache").mkdir()
    again = images.load(str(there))
    assert again.fingerprint == here.fingerprint
    assert [Path(file).name for file in again.train[0]] == [Path(file).name for file in here.train[0]]
    assert images.load("flowers", seed=124).fingerprint != here.fingerprint
    (there / "rose" / "4.jpg").write_bytes(JPEG)
    assert images.load(str(there)).fingerprint != here.fingerprint
    (there / "rose" / "4.jpg").rename(there / "rose" / "5.jpg")
    assert images.load(str(there)).path == there


def test_the_split_of_a_seed_stays_what_it_is(place: Path) -> None:
    found = images.load(str(fill(place / "flowers")))
    assert [os.path.relpath(file, found.path) for file in found.test[0]] == ["daisy/2.jpg", "rose/1.jpg"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda at: None,
            r"no folder at .*/flowers\n(?s:.*)where there is a network: hpcml data fetch flowers; or set HPCML_DATA",
        ),
        (lambda at: at.write_text("x"), "flowers is no folder"),
        (lambda at: at.mkdir(), r"no images in the folders of .*/flowers\n  allowed: one folder for each class"),
        (lambda at: fill(at / "flower_photos"), "the classes seem to lie further down: data = '.*/flower_photos'"),
        (lambda at: fill(at, kinds=("daisy",)), "holds one class only, 'daisy'"),
        (lambda at: fill(at, 1), "class 'daisy' has a single image(?s:.*)class 'rose' has a single image"),
        (lambda at: (fill(at), (at / "tulip").mkdir()), "class 'tulip' has no images"),
        (lambda at: (fill(at) / "rose/2.jpg").write_bytes(b""), "rose/2.jpg: an empty file"),
        (lambda at: (fill(at) / "rose/2.jpg").write_bytes(b"<html>"), "rose/2.jpg: neither JPEG nor PNG"),
        (lambda at: (fill(at) / "rose/2.jpg").write_bytes(JPEG[:-2]), "rose/2.jpg: a JPEG that is cut off"),
        (lambda at: (fill(at) / "rose/9.jpg").symlink_to("gone.jpg"), "rose/9.jpg: can't be read: No such file"),
        (lambda at: (fill(at) / "rose/9.jpg").mkdir(), "rose/9.jpg: can't be read: Is a directory"),
        (lambda at: (fill(at) / os.fsdecode(b"rose/\xff.jpg")).write_bytes(JPEG), "the name is not UTF-8"),
        (
            lambda at: [path.write_bytes(b"") for path in fill(at).glob("*/*.jpg")],
            "daisy/0.jpg: an empty file(?s:.*)daisy/4.jpg(?s:.*)and 5 more",
        ),
    ],
)
def test_what_is_no_folder_of_images_is_told_with_what_to_do(place: Path, make: Any, says: str) -> None:
    make(place / "flowers")
    with pytest.raises(HpcmlError, match=says):
        images.load("flowers")


def test_an_unknown_name_and_none_at_all(place: Path) -> None:
    with pytest.raises(HpcmlError, match=r"no folder at .*/trees\n(?s:.*)a path has a /"):
        images.load("trees")
    (place / "birches").mkdir()
    for near, meant in (("birchs", "birches"), ("flower", "flowers")):
        with pytest.raises(HpcmlError, match=f"did you mean '{meant}'"):
            images.load(near)
    with pytest.raises(HpcmlError, match="no name and no path"):
        images.load("")


def test_names_with_newlines_and_links_are_fine(place: Path, tmp_path: Path) -> None:
    real = fill(tmp_path / "real")
    (real / "rose" / "a\nrosé.JPG").write_bytes(JPEG)
    (place / "flowers").symlink_to(real)
    assert len(images.load("flowers").train[0]) == 8


def test_a_path_may_hold_variables(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(place / "flowers")
    monkeypatch.setenv("HERE", str(place))
    monkeypatch.chdir(place)
    assert {images.load(path).path for path in ("flowers", "$HERE/flowers", "./flowers")} == {place / "flowers"}


# ------------------------------------------------------------------ the data folder


def test_the_data_folder_is_the_sites_unless_the_variable_says(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ft3 = site.load("ft3")
    assert site.data_root(ft3, tmp_path) == place
    monkeypatch.delenv("HPCML_DATA")
    monkeypatch.setenv("LUSTRE", "/lustre/me")
    assert site.data_root(ft3, tmp_path) == Path("/lustre/me/hpcml/data")
    monkeypatch.delenv("LUSTRE")
    with pytest.raises(HpcmlError, match=r"site ft3: data: .*needs \$LUSTRE"):
        site.data_root(ft3, tmp_path)


def test_in_a_run_it_is_the_one_of_the_runs_site_and_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPCML_DATA")
    monkeypatch.setenv("LUSTRE", "/lustre/me")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    assert images.root() == tmp_path / "data"
    run = rundir.create(tmp_path / "runs", "one")
    monkeypatch.setenv("HPCML_RUNS", str(run.root))
    monkeypatch.setenv("HPCML_RUN", run.id)
    rundir.write_json(run.plan, {"site": "generic", "project": "/the/project"})
    assert images.root() == Path("/the/project/data")
    rundir.write_json(run.plan, {"site": "ft3", "project": "/the/project"})
    assert images.root() == Path("/lustre/me/hpcml/data")


# ------------------------------------------------------------------ weights


def test_published_weights_lie_in_the_data_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = place / "weights" / images.RESNET50
    assert images.pretrained("imagenet") is None
    told = capsys.readouterr().err
    assert told.startswith(f"hpcml: warning: no pretrained weights at {path}: the network starts from random weights")
    assert told.rstrip().endswith("fix: where there is a network: hpcml data fetch resnet50")
    path.parent.mkdir()
    path.write_bytes(b"\x89HDF\r\n\x1a\n and so on")
    assert images.pretrained("imagenet") == str(path) == images.pretrained(str(path))
    assert images.pretrained("random") is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ("imagnet", "weights = 'imagnet'\n  allowed: imagenet"),
        ("/no/such.h5", "no file at /no/such.h5"),
        ("$HPCML_DATA", r"weights = '\$HPCML_DATA'"),
        ("$HPCML_DATA/folder.h5", "folder.h5 can't be read: Is a directory"),
        ("$HPCML_DATA/page.h5", "page.h5 is no HDF5 file"),
    ],
)
def test_weights_that_are_none(place: Path, weights: str, says: str) -> None:
    (place / "folder.h5").mkdir()
    (place / "page.h5").write_text("<html>404</html>")
    with pytest.raises(HpcmlError, match=says):
        images.pretrained(weights)


# ------------------------------------------------------------------ the notebooks as texts

needs_jupytext = pytest.mark.skipif(
    importlib.util.find_spec("jupytext") is None, reason="jupytext: not installed (pip install 'hpcml[notebook]')"
)


def cells(name: str) -> list[tuple[str, str, dict[str, Any]]]:
    import jupytext

    return [(c.cell_type, c.source, dict(c.metadata)) for c in jupytext.read(NOTEBOOKS / name).cells]


@needs_jupytext
@pytest.mark.parametrize("name", VARIANTS)
def test_the_notebook_is_what_its_script_gives(name: str) -> None:
    fix = f"after a change in the script: jupytext --to ipynb notebooks/{name}.py"
    assert cells(f"{name}.ipynb") == cells(f"{name}.py"), fix


@needs_jupytext
@pytest.mark.parametrize("name", list(VARIANTS)[1:])
def test_the_variants_differ_in_title_and_strategy_alone(name: str) -> None:
    original, other = cells("flowersOrig.py"), cells(f"{name}.py")
    assert len(original) == len(other)
    title, text, code = [n for n, pair in enumerate(zip(original, other, strict=True)) if pair[0] != pair[1]]
    assert title == 0 and code == text + 1 and original[text][1].startswith("## Strategy")
    pairs = zip(original[code][1].splitlines(), other[code][1].splitlines(), strict=True)
    assert [b.partition("#")[0].strip() for a, b in pairs if a != b] == [
        f'run = hpcml.begin(strategy="{VARIANTS[name]}")',
        f"strategy = tf.distribute.{'MirroredStrategy' if name == 'flowersSol' else 'MultiWorkerMirroredStrategy'}()",
    ]


@needs_jupytext
@pytest.mark.parametrize("name", list(VARIANTS))
def test_the_strategy_is_that_of_the_mnist_notebook(name: str) -> None:
    ours, theirs = (cells(f"{one}.py") for one in (name, name.replace("flowers", "simple2GPUs")))
    assert ours[2:4] == theirs[2:4] and ours[2][1].startswith("## Strategy")


@pytest.mark.parametrize(("name", "strategy"), VARIANTS.items())
def test_the_job_runs_its_notebook_with_the_notebooks_own_values(name: str, strategy: str) -> None:
    read = job.load(ROOT / "jobs" / f"flowers_{strategy}.toml")
    assert (read.target, read.strategy) == ((f"notebooks/{name}.ipynb",), strategy)
    assert read.params == facts.declared_parameters(NOTEBOOKS / f"{name}.ipynb").defaults
    like = job.load(ROOT / "jobs" / f"mnist_{strategy}.toml")
    asked, theirs = read.resources, like.resources
    assert (asked.cpus_per_task, asked.tasks_per_node, asked.gpus_per_node) == (
        (theirs.cpus_per_task, theirs.tasks_per_node, theirs.gpus_per_node)
    )


def test_the_jobs_are_comparable() -> None:
    read = [job.load(ROOT / "jobs" / f"flowers_{strategy}.toml") for strategy in VARIANTS.values()]
    assert plan.unfair({one.name: plan.resolve(one, site.load("generic")) for one in read}) == []


# ------------------------------------------------------------------ the notebooks, trained

needs_all = pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("papermill", "tensorflow", "tf_keras", "PIL")),
    reason="TensorFlow: not installed (pip install 'hpcml[tensorflow,notebook]')",
)
SETTINGS = {"image_size": 32, "global_batch": 16, "epochs": 8, "lr": 1e-4}
MAKE_WEIGHTS = """
import sys
import tensorflow as tf
import hpcml
tf.keras.utils.set_random_seed(1)
base = tf.keras.applications.ResNet50(include_top=False, weights=None, input_shape=(32, 32, 3), pooling="avg")
base.save_weights(sys.argv[1])
print(hpcml.data.fingerprint(base.get_weights()))
"""


def draw(folder: Path, count: int = 15) -> None:
    """Draw flowers: each kind in a colour of its own; sizes, shapes and the green behind them vary."""
    from PIL import Image, ImageDraw

    dice = random.Random(SEED)
    print("seed", SEED)
    for kind, colour in KINDS.items():
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            width, height = dice.randint(40, 70), dice.randint(40, 70)
            picture = Image.new("RGB", (width, height), (0, dice.randint(60, 100), 0))
            edge = dice.randint(2, 6)
            shape = getattr(ImageDraw.Draw(picture), "ellipse" if number % 2 else "rectangle")
            shape((edge, edge, width - edge, height - edge), fill=colour)
            picture.save(folder / kind / f"{number:02}.jpg", quality=90)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A data folder with drawn flowers and a file of weights, and the fingerprint of these."""
    folder = tmp_path_factory.mktemp("full")
    draw(folder / "flowers")
    (folder / "weights").mkdir()
    words = [sys.executable, "-c", MAKE_WEIGHTS, str(folder / "weights" / images.RESNET50)]
    env = {**os.environ, "TF_USE_LEGACY_KERAS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    made = subprocess.run(words, env=env, capture_output=True, text=True, timeout=240)
    assert made.returncode == 0, made.stderr
    return folder, made.stdout.split()[-1]


def train(strategy: str, folder: Path, runs: Path) -> tuple[dict[str, Any], str]:
    """Run a flowers job here, small; returns its end marker and what rank 0 printed."""
    # Nobody answers at port 9: who tried the network would fail. gRPC would take the proxy between the ranks too.
    own = {"HPCML_SITE": "local", "HPCML_DEVICES": "cpu", "HPCML_RUNS": str(runs), "HPCML_DATA": str(folder)}
    own |= {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HOME": str(runs)}
    own |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    params = [word for name, value in SETTINGS.items() for word in ("-p", f"{name}={value}")]
    words = [sys.executable, "-m", "hpcml", "run", f"jobs/flowers_{strategy}.toml", *params]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (path for path in runs.iterdir() if path.name.endswith(f"flowers-{strategy}"))
    run = rundir.RunDir(runs, path.name)
    return rundir.read_json(run.status), run.log(0).read_text()


def only(pattern: str, text: str) -> str:
    (found,) = set(re.findall(pattern, text))
    return str(found)


@needs_all
def test_the_three_learn_the_same_from_the_weights_of_the_file(full: tuple[Path, str], tmp_path: Path) -> None:
    folder, fingerprint = full
    seen = {}
    for strategy in VARIANTS.values():
        marker, said = train(strategy, folder, tmp_path)
        assert (marker["state"], marker["replicas_in_sync"]) == ("COMPLETED", 1 if strategy == "original" else 2)
        assert "warning: no pretrained weights" not in said
        assert only(r"ResNet50 (.*), ", said) == str(folder / "weights" / images.RESNET50)
        assert only(r"ResNet50 .*, ([0-9a-f]{12})", said) == fingerprint, "as in the file"
        assert f"48 + 12 images of {', '.join(KINDS)}" in said
        seen[strategy] = (
            only(r"data ([0-9a-f]{12})", said),
            only(r"[\d,]+ weights, ([0-9a-f]{12})", said),
            float(only(r"\naccuracy (\S+),", said)),
        )
    assert len({one[:2] for one in seen.values()}) == 1, seen
    accuracies = [accuracy for _, _, accuracy in seen.values()]
    assert min(accuracies) >= 0.75 and max(accuracies) - min(accuracies) < 0.1, seen  # 0.25 by chance
    assert seen["original"][0] == images.load(str(folder / "flowers")).fingerprint


@needs_all
def test_without_the_file_it_trains_from_random_weights_and_says_so(full: tuple[Path, str], tmp_path: Path) -> None:
    folder, fingerprint = full
    shutil.copytree(folder / "flowers", tmp_path / "bare" / "flowers")
    marker, said = train("original", tmp_path / "bare", tmp_path / "runs")
    assert marker["state"] == "COMPLETED"
    assert f"no pretrained weights at {tmp_path}/bare/weights/{images.RESNET50}: the network starts from random" in said
    assert only(r"ResNet50 with random weights, ([0-9a-f]{12})", said) != fingerprint


@needs_all
def test_without_images_the_job_says_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"no folder at .*/none/flowers(?s:.*)hpcml data fetch flowers"):
        train("original", tmp_path / "none", tmp_path / "runs")


def test_data_offers_it() -> None:
    assert data.images is images
