"""``hpcml.data.open``: a folder and its packed form are the same data set, fed to TensorFlow and torch by rank and epoch."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcml import data
from hpcml.data import images, shards
from hpcml.data.order import Order
from hpcml.errors import HpcmlError

np = pytest.importorskip("numpy", reason="NumPy: not installed")


def needs(*modules: str) -> Any:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)}: not installed")


needs_tensorflow, needs_torch, needs_pillow = needs("tensorflow"), needs("torch"), needs("PIL")
JPEG = b"\xff\xd8\xff\xe0 picture \xff\xd9"
COUNT, BATCH = 61, 8
RAW = {"raw": (4,), "seed": 5}


def number(content: Any) -> int:
    """The number that a raw sample holds."""
    return int(content[0]) * 256 + int(content[1])


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of 4 bytes in three classes, each with a number of its own."""
    folder = tmp_path_factory.mktemp("numbered") / "files"
    for one in range(COUNT):
        path = folder / "abc"[one % 3] / f"{one:03}.raw"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([one // 256, one % 256, one * 37 % 256, one * 91 % 256]))
    shards.pack(folder, folder.parent / "packed", shard_bytes=20_000, workers=1, say=lambda text: None)
    return folder.parent


@pytest.fixture(params=["files", "packed"])
def samples(request: pytest.FixtureRequest, numbered: Path) -> Any:
    return data.open(str(numbered / request.param), suffixes=(".raw",))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG and PNG of several sizes, beside what is no sample, as files and packed."""
    from PIL import Image

    seed = random.randrange(2**32)
    print("seed", seed)
    dice = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("pictures") / "files"
    for kind in ("rose", "daisy", "a rosé\n"):
        (folder / kind).mkdir(parents=True)
        for one in range(12):
            height, width = dice.integers(20, 60, 2)
            smooth = dice.integers(0, 255, (2, 2, 3), dtype=np.uint8)
            picture = Image.fromarray(smooth).resize((int(width), int(height)))
            picture.save(folder / kind / f"{one}.{('jpg', 'PNG', 'jpeg')[one % 3]}")
    for stray in ("LICENSE.txt", "daisy/notes.txt", "daisy/._0.jpg", ".cache/x.jpg"):
        (folder / stray).parent.mkdir(exist_ok=True)
        (folder / stray).write_bytes(JPEG)
    shards.pack(folder, folder.parent / "packed", workers=1, say=lambda text: None)
    return folder.parent


# ------------------------------------------------------------------ one data set, packed or not


@needs_pillow
def test_a_folder_and_its_packed_form_are_the_same(pictures: Path) -> None:
    loose, packed = (data.open(str(pictures / form)) for form in ("files", "packed"))
    assert loose.classes == packed.classes == ("a rosé\n", "daisy", "rose")
    assert loose.names == packed.names and len(packed) == 36
    assert loose.labels.tolist() == packed.labels.tolist() and packed.labels.dtype == "int64"
    assert loose.fingerprint == packed.fingerprint
    rows = np.random.default_rng(1).integers(0, 36, 50)
    assert loose.read(rows) == packed.read(rows)
    assert packed.read([3]) == [(pictures / "files" / packed.names[3]).read_bytes()]


@needs_pillow
@pytest.mark.parametrize("form", ["files", "packed"])
def test_it_is_split_as_images_are(pictures: Path, form: str) -> None:
    for seed in (1, 123):
        loaded = images.load(str(pictures / "files"), seed)
        split = data.open(str(pictures / form)).split(seed)
        assert split.fingerprint == loaded.fingerprint
        for part, (files, labels) in zip(split, (loaded.train, loaded.test), strict=True):
            assert [str(pictures / "files" / name) for name in part.names] == files
            assert part.labels.tolist() == labels.tolist()
            assert part.read([0]) == [Path(files[0]).read_bytes()]
    assert split.train.fingerprint != split.test.fingerprint


def test_raw_samples_are_gathered(samples: Any) -> None:
    rows = [5, 0, 60, 5]
    found = samples.gather(rows)
    assert found.shape == (4, 4) and found.dtype == "uint8"
    assert [bytes(one) for one in found] == samples.read(rows)
    train, test = samples.split(7)
    assert sorted(number(one) for part in (train, test) for one in part.gather(range(len(part)))) == list(range(COUNT))
    assert all(train.classes[label] == name[0] for name, label in zip(train.names, train.labels, strict=True))


def test_it_can_be_handed_to_another_process(samples: Any) -> None:
    again = pickle.loads(pickle.dumps(samples))
    assert again.fingerprint == samples.fingerprint and again.read([1]) == samples.read([1])
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.write(writing, samples.read([2])[0])
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 9) == samples.read([2])[0]
    os.close(reading), os.close(writing)


def test_it_says_what_it_is(samples: Any) -> None:
    assert repr(samples) == f"<61 samples of 3 classes in {samples.path}>" and samples.classes == ("a", "b", "c")


# ------------------------------------------------------------------ fed to TensorFlow


def fed(samples: Any, **how: Any) -> list[list[int]]:
    """The numbers in each batch of a ``tf.data.Dataset``; checks their labels."""
    batches = []
    for x, labels in samples.tensorflow(BATCH, **{**RAW, **how}):
        batches.append([number(one) for one in x.numpy()])
        assert labels.numpy().tolist() == [one % 3 for one in batches[-1]]
    return batches


def flat(batches: list[list[int]]) -> list[int]:
    return [one for batch in batches for one in batch]


def decode_raw(content: Any) -> Any:
    import tensorflow as tf

    return tf.io.decode_raw(content, tf.uint8)


@needs_tensorflow
@pytest.mark.parametrize("decoded", [False, True], ids=["raw", "decoded"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_each_sample_once_and_the_same_batches_for_any_number_of_ranks(samples: Any, world: int, decoded: bool) -> None:
    how: dict[str, Any] = {"raw": None, "decode": decode_raw} if decoded else {}
    alone = fed(samples, **how)
    assert [len(batch) for batch in alone] == [BATCH] * 7 and len(set(flat(alone))) == 56
    ranks = [fed(samples, rank=rank, world=world, local=True, **how) for rank in range(world)]
    assert [flat(list(parts)) for parts in zip(*ranks, strict=True)] == alone
    # For tf.distribute the same samples in batches of the global size, so the steps' parts come one after the other.
    merged = [fed(samples, rank=rank, world=world, **how) for rank in range(world)]
    assert [flat(one) for one in merged] == [flat(one) for one in ranks]
    assert {len(batch) for one in merged for batch in one[:-1]} <= {BATCH}


@needs_tensorflow
@pytest.mark.parametrize("decoded", [False, True], ids=["raw", "decoded"])
@pytest.mark.parametrize("local", [False, True])
def test_in_a_test_each_sample_counts_once_and_in_order(samples: Any, decoded: bool, local: bool) -> None:
    how: dict[str, Any] = {"seed": None, "local": local, **({"raw": None, "decode": decode_raw} if decoded else {})}
    in_order = [number(one) for one in samples.gather(range(COUNT))]
    assert flat(fed(samples, **how)) == in_order
    ranks = [fed(samples, rank=rank, world=4, **how) for rank in range(4)]
    assert sorted(one for rank in ranks for one in flat(rank)) == sorted(in_order)


@needs_tensorflow
def test_epochs_have_orders_of_their_own_and_go_on_where_they_were(samples: Any) -> None:
    three = fed(samples, epochs=range(3))
    assert len(three) == 21 and len({tuple(flat(three[7 * one : 7 * one + 7])) for one in range(3)}) == 3
    assert fed(samples, epochs=range(1, 3)) == three[7:]
    assert fed(samples, epochs=range(1, 3), first_step=4) == three[11:]
    assert fed(samples, epochs=range(3, 3)) == []
    assert fed(samples, epochs=range(1, 3), first_step=4, rank=1, world=2, local=True) == [b[4:] for b in three[11:]]
    assert fed(samples, epochs=[2]) == three[14:]


@needs_tensorflow
def test_small_last_batches_stay_with_their_epochs(samples: Any) -> None:
    sizes = [len(batch) for batch in fed(samples, epochs=range(2), drop_remainder=False)]
    assert sizes == ([8] * 7 + [5]) * 2
    with pytest.raises(HpcmlError, match=r"61 samples make no whole batches(?s:.*)drop_remainder=True"):
        fed(samples, epochs=range(2), drop_remainder=False, world=2)


@needs_tensorflow
def test_it_knows_its_shapes_where_they_are_fixed(samples: Any) -> None:
    x, label = samples.tensorflow(BATCH, **RAW).element_spec
    assert (x.shape, label.shape, x.dtype, label.dtype) == ((8, 4), (8,), "uint8", "int64")
    assert samples.tensorflow(BATCH, raw=(2, 2, 1)).element_spec[0].shape.as_list() == [None, 2, 2, 1]


@needs_tensorflow
@needs_pillow
@pytest.mark.parametrize("form", ["files", "packed"])
def test_images_are_decoded_as_by_hand(pictures: Path, form: str) -> None:
    import tensorflow as tf

    opened = data.open(str(pictures / form))
    images_of = np.concatenate([x.numpy() for x, _ in opened.tensorflow(BATCH, image_size=(24, 32))])
    for one, content in zip(images_of, opened.read(range(36)), strict=True):
        by_hand = tf.image.resize(tf.io.decode_image(content, 3, expand_animations=False), (24, 32))
        assert one.dtype == "uint8" and np.abs(one - by_hand.numpy()).max() <= 0.5
    assert opened.tensorflow(BATCH, image_size=24, seed=1).element_spec[0].shape.as_list() == [8, 24, 24, 3]


# ------------------------------------------------------------------ fed to torch


def loaded(samples: Any, epoch: int = 0, first_step: int = 0, **how: Any) -> list[list[int]]:
    loader = samples.torch(BATCH, **{**RAW, **how})
    loader.sampler.set_epoch(epoch, first_step)
    batches = []
    for x, labels in loader:
        batches.append([number(one) for one in x.numpy()])
        assert labels.tolist() == [one % 3 for one in batches[-1]]
    assert len(loader) == len(batches)
    return batches


@needs_torch
@needs_tensorflow
def test_torch_gets_the_very_batches_that_tensorflow_gets(samples: Any) -> None:
    for epoch in range(2):
        assert loaded(samples, epoch) == fed(samples, epochs=[epoch])


@needs_torch
@pytest.mark.parametrize("how", [{}, {"num_workers": 2}, {"raw": None, "decode": lambda content: np.array([*content])}])
def test_torch_ranks_share_each_batch(samples: Any, how: dict[str, Any]) -> None:
    alone = loaded(samples, 3, num_workers=0)
    ranks = [loaded(samples, 3, rank=rank, world=4, **{"num_workers": 0, **how}) for rank in range(4)]
    assert [flat(list(parts)) for parts in zip(*ranks, strict=True)] == alone
    assert loaded(samples, 3, 5, rank=1, world=4) == ranks[1][5:]
    tests = [loaded(samples, seed=None, rank=rank, world=8) for rank in range(8)]
    assert sorted(one for rank in tests for one in flat(rank)) == list(range(COUNT))
    assert {len(rank) for rank in tests} == {7, 8}, "a rank that has nothing of the last batch gets no empty one"


@needs_torch
def test_its_loader_passes_the_checks_of_a_training(samples: Any) -> None:
    from hpcml.training import ddp

    assert ddp.check_loader(samples.torch(BATCH, rank=1, world=2, **RAW), BATCH, 2) == ""
    with pytest.raises(HpcmlError, match="global_batch = 16"):
        ddp.check_loader(samples.torch(BATCH, rank=1, world=2, **RAW), 16, 2)
    with pytest.raises(HpcmlError):
        ddp.check_loader(samples.torch(BATCH, **RAW), BATCH, 2)


@needs_torch
@needs_pillow
@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_decoded_for_torch(pictures: Path, workers: int) -> None:
    from PIL import Image

    opened = data.open(str(pictures / "packed"))
    loader = opened.torch(BATCH, image_size=(24, 32), num_workers=workers)
    found = np.concatenate([x.numpy() for x, _ in loader])
    assert found.shape == (36, 3, 24, 32) and found.dtype == "uint8"
    for one, content in zip(found, opened.read(range(36)), strict=True):
        by_hand = Image.open(io.BytesIO(content)).convert("RGB").resize((32, 24), Image.Resampling.BILINEAR)
        assert (one.transpose(1, 2, 0) == np.asarray(by_hand)).all()
    x, label = loader.dataset[4]
    assert (x.numpy() == found[4]).all() and label == opened.labels[4]


# ------------------------------------------------------------------ trained by several processes

TRAIN = """
import json, os, sys

rank, world, folder, policies, ports = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:]
os.environ |= {"TF_USE_LEGACY_KERAS": "1", "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}
if world > 1:
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": rank}})
import numpy as np
import tensorflow as tf
import hpcml
from hpcml.data.order import Order

if policies == "mirrored":
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
else:
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
BATCH = 8
samples = hpcml.data.open(folder, suffixes=(".raw",))


def train(policy):
    if policy != "data":
        decode = lambda content: tf.io.decode_raw(content, tf.uint8)
        how = {"decode": decode} if policy == "decoded" else {"raw": (4,)}
        return samples.tensorflow(BATCH, seed=5, epochs=range(1, 4), rank=rank, world=world, **how)
    order = Order(len(samples), BATCH, 5, drop_remainder=True)
    rows = np.concatenate([order.part(epoch) for epoch in range(1, 4)])
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    made = tf.data.Dataset.from_tensor_slices((samples.gather(rows), samples.labels[rows]))
    return made.batch(BATCH, drop_remainder=True).with_options(options)


def seen(dataset):
    "The numbers of the samples that each of this process's replicas gets in each step."
    return [
        [(one.numpy()[:, 0].astype(int) * 256 + one.numpy()[:, 1]).tolist() for one in strategy.experimental_local_results(x)]
        for x, _ in strategy.experimental_distribute_dataset(dataset)
    ]


def learn(policy):
    told = {"steps": seen(train(policy))}
    tf.keras.utils.set_random_seed(3)
    with strategy.scope():
        inputs = tf.keras.layers.Rescaling(1 / 255, input_shape=(4,))
        model = tf.keras.Sequential([inputs, tf.keras.layers.Dense(3)])
        loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(tf.keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    test = samples.tensorflow(BATCH, raw=(4,), rank=rank, world=world)
    steps = len(samples) // BATCH
    history = model.fit(train(policy), epochs=3, steps_per_epoch=steps, validation_data=test, verbose=0).history
    return {**told, "history": history, "weights": [weight.tolist() for weight in model.get_weights()]}


print("TOLD", json.dumps({policy: learn(policy) for policy in policies.split(",")}))
"""


def free_ports(count: int) -> list[str]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    found = [str(one.getsockname()[1]) for one in held]
    for one in held:
        one.close()
    return found


def trained(folder: Path, policies: str, world: int = 1) -> list[dict[str, Any]]:
    """Train in processes of their own, once for each policy; returns what each process tells."""
    ports = free_ports(world)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(rank), str(world), str(folder), policies, *ports],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        told = [one.communicate(timeout=240) for one in ranks]
    finally:
        for one in ranks:
            one.kill()
    for one, (_, errors) in zip(ranks, told, strict=True):
        assert one.returncode == 0, errors
    return [json.loads(out.partition("TOLD ")[2]) for out, _ in told]


@needs_tensorflow
@needs("tf_keras")
def test_two_workers_train_each_sample_once_as_tensorflow_shares_them_itself(numbered: Path) -> None:
    ranks = trained(numbered / "packed", "ours,decoded,data", 2)
    order = Order(COUNT, BATCH, 5, drop_remainder=True)
    held = data.open(str(numbered / "packed"), suffixes=(".raw",))
    wanted = [[number(one) for one in held.gather(batch)] for epoch in (1, 2, 3) for batch in order.batches(epoch)]
    # A step's samples over both ranks; each has one replica.
    steps = zip(*([step[0] for step in rank["ours"]["steps"]] for rank in ranks), strict=True)
    assert [first + second for first, second in steps] == wanted
    for rank in ranks:
        assert rank["ours"]["steps"] == rank["decoded"]["steps"] == rank["data"]["steps"]
        assert rank["ours"] == rank["decoded"] == rank["data"] | {"steps": rank["ours"]["steps"]}, "bit for bit"
        assert rank["ours"]["weights"] == ranks[0]["ours"]["weights"]
    (alone,), (mirrored,) = (trained(numbered / "files", policy) for policy in ("alone", "mirrored"))
    assert [flat(step) for step in alone["alone"]["steps"]] == wanted
    assert [flat(step) for step in mirrored["mirrored"]["steps"]] == wanted
    assert {len(replica) for step in mirrored["mirrored"]["steps"] for replica in step} == {BATCH // 2}
    for other in (alone["alone"], mirrored["mirrored"]):
        for name in ("loss", "val_loss", "val_accuracy"):
            assert other["history"][name] == pytest.approx(ranks[0]["ours"]["history"][name], rel=1e-5)


# ------------------------------------------------------------------ what it costs


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The paths that this process opens from now on."""
    paths: list[str] = []
    watching = [True]  # an audit hook stays for ever (PEP 578)

    def hear(event: str, arguments: Any) -> None:
        if watching and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            paths.append(os.fsdecode(arguments[0]))

    sys.addaudithook(hear)
    yield paths
    watching.clear()


@needs_tensorflow
def test_shards_are_opened_once_however_many_samples_and_epochs(numbered: Path, opened: list[str]) -> None:
    packed = data.open(str(numbered / "packed"), suffixes=(".raw",))
    fed(packed, epochs=range(3))
    fed(packed, epochs=range(3), raw=None, decode=decode_raw)
    of_shards = [path for path in opened if path.endswith(".tar")]
    assert len(list((numbered / "packed").glob("*.tar"))) == len(of_shards) == len(set(of_shards)) > 1
    opened.clear()
    fed(data.open(str(numbered / "files"), suffixes=(".raw",)))
    assert sum(path.endswith(".raw") for path in opened) >= COUNT + 56, "checked, then read"


LIMIT = 64 * 2**20
READ = """
import random, re, sys
from pathlib import Path
from hpcml import data

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])


samples = data.open(sys.argv[1], suffixes=(".raw",))
before = anonymous()
rows = random.Random(1).sample(range(len(samples)), len(samples))
for begin in range(0, len(rows), 4):
    (first, *_), table = samples.read(rows[begin : begin + 4]), samples.gather(rows[begin : begin + 4])
    assert first == table[0].tobytes()
print(anonymous() - before)
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A group of processes that may use ``LIMIT`` of memory, file cache included."""
    one, two = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    made = (one if one.is_dir() else two) / f"hpcml-test-reading-{os.getpid()}"
    try:
        made.mkdir()
        (made / ("memory.limit_in_bytes" if one.is_dir() else "memory.max")).write_text(str(LIMIT))
    except OSError as error:
        if made.is_dir():
            made.rmdir()
        pytest.skip(f"memory cgroup: can't be made: {error.strerror}")
    yield made
    made.rmdir()


def test_a_set_twice_as_large_as_the_memory_is_read_at_random(tmp_path: Path, group: Path) -> None:
    block = random.Random(3).randbytes(2**20)
    for one in range(2 * LIMIT // 2**20 + 8):
        path = tmp_path / "files" / str(one % 2) / f"{one}.raw"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(block[one:] + block[:one])
    shards.pack(tmp_path / "files", tmp_path / "packed", workers=1, say=lambda text: None)
    words = [sys.executable, "-c", READ, str(tmp_path / "packed")]
    enter = lambda: (group / "cgroup.procs").write_text(str(os.getpid()))  # noqa: E731
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, preexec_fn=enter)
    shutil.rmtree(tmp_path / "files"), shutil.rmtree(tmp_path / "packed")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < LIMIT / 4, "beside the file cache"


# ------------------------------------------------------------------ bad input


def folder_of(place: Path, count: int = 5) -> Path:
    for kind in ("daisy", "rose"):
        (place / kind).mkdir(parents=True)
        for one in range(count):
            (place / kind / f"{one}.jpg").write_bytes(JPEG[:4] + f"{kind} {one}".encode() + JPEG[4:])
    return place


def test_bad_images_are_all_listed_before_anything_is_trained(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "flowers")
    (place / "daisy" / "1.jpg").write_bytes(b"")
    (place / "rose" / "2.jpg").write_bytes(JPEG[:-2])
    (place / "rose" / "3.jpg").unlink()
    (place / "rose" / "3.jpg").symlink_to("gone.jpg")
    says = r"daisy/1.jpg: an empty file(?s:.*)rose/2.jpg: a JPEG that is cut off(?s:.*)rose/3.jpg: can't be read"
    with pytest.raises(HpcmlError, match=says):
        data.open(str(place))
    for path in place.glob("*/*.jpg"):
        path.unlink()
        path.write_bytes(b"")
    with pytest.raises(HpcmlError, match=r"daisy/0.jpg: an empty file(?s:.*)and 5 more"):
        data.open(str(place))


def test_an_empty_raw_file_is_told(tmp_path: Path) -> None:
    for name in ("a/0.raw", "a/1.raw", "b/0.raw", "b/1.raw"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1234" if name != "b/1.raw" else b"")
    with pytest.raises(HpcmlError, match=r"b/1\.raw: an empty file"):
        data.open(str(tmp_path), suffixes=(".raw",))


def damage(packed: Path, how: str) -> None:
    shard = sorted(packed.glob("shard-*.tar"))[-1]
    if how == "gone":
        shard.unlink()
    elif how == "cut":
        os.truncate(shard, shard.stat().st_size - 1)
    else:
        (packed / how).write_bytes((packed / how).read_bytes()[:-5] + b"?" * 5)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("gone", r"shard-00000.tar: No such file(?s:.*)fix: "),
        ("cut", r"shard-00000.tar (?s:.*)hpcml data verify"),
        ("index.npz", r"index.npz(?s:.*)hpcml data verify"),
        ("dataset.json", r"dataset.json(?s:.*)hpcml data verify"),
    ],
)
def test_a_damaged_pack_is_told_when_it_is_opened(tmp_path: Path, how: str, says: str) -> None:
    shards.pack(folder_of(tmp_path / "flowers"), tmp_path / "packed", workers=1, say=lambda text: None)
    damage(tmp_path / "packed", how)
    with pytest.raises(HpcmlError, match=says):
        data.open(str(tmp_path / "packed"))


@needs_torch
@needs_pillow
def test_what_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "flowers")
    with pytest.raises(HpcmlError, match=r"flowers/daisy/0.jpg: can't be decoded: (?s:.*)remove it, or fetch it again"):
        list(data.open(str(place)).torch(2, image_size=8, num_workers=0))
    shards.pack(place, tmp_path / "packed", workers=1, say=lambda text: None)
    with pytest.raises(HpcmlError, match=r"packed/daisy/0.jpg: can't be decoded: (?s:.*)hpcml data verify .*/packed"):
        list(data.open(str(tmp_path / "packed")).torch(2, image_size=8, num_workers=1))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({}, "what a sample becomes is not said"),
        ({"raw": (4,), "image_size": 3}, "that is several"),
        ({"raw": (28, 28)}, r"raw = \(28, 28\) is 784 bytes, a/000.raw has 4"),
        ({"raw": (4,), "world": 3}, "global_batch = 8 can't be shared evenly by 3 ranks\n  allowed: a multiple of 3, such as 6"),
        ({"raw": (4,), "rank": 2, "world": 2}, "rank = 2 of world = 2"),
        ({"raw": (4,), "drop_remainder": True, "global_batch": 64}, "61 samples make no whole batch"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_told(samples: Any, how: dict[str, Any], says: str) -> None:
    for feed in (samples.tensorflow, samples.torch):
        with pytest.raises(HpcmlError, match=says):
            feed(**{"global_batch": BATCH, **how})


def test_a_pack_without_classes_is_told(tmp_path: Path) -> None:
    folder_of(tmp_path / "files" / "train")
    shards.pack(tmp_path / "files", tmp_path / "packed", workers=1, say=lambda text: None)
    with pytest.raises(HpcmlError, match=r"no sample of a class in 10 packed files(?s:.*)further down(?s:.*)data ls"):
        data.open(str(tmp_path / "packed"))
    with pytest.raises(HpcmlError, match=r"no images in(?s:.*)further down: data = '.*/files/train'"):
        data.open(str(tmp_path / "files"))


def test_samples_of_different_sizes_make_no_array(tmp_path: Path) -> None:
    for name, content in (("a/0", b"12"), ("a/1", b"12"), ("b/0", b"12"), ("b/1", b"1")):
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / f"{name}.raw").write_bytes(content)
    shards.pack(tmp_path / "files", tmp_path / "packed", workers=1, say=lambda text: None)
    for form in ("files", "packed"):
        with pytest.raises(HpcmlError, match="size"):
            data.open(str(tmp_path / form), suffixes=(".raw",)).gather(range(4))


def test_data_offers_it() -> None:
    from hpcml.data import collection

    assert data.open is collection.open
    with pytest.raises(AttributeError, match="nothing"):
        _ = data.nothing
