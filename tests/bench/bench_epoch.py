"""A shuffled epoch from packed shards, against single files and against arrays in memory; and how many files are opened.

    scripts/bench epoch [--quick]

Data sets are made for it: 60,000 files of 784 bytes, as MNIST's digits, and 3,000 JPEGs of 320 × 240, as the flowers.
Each side runs three epochs, from the first call to the last batch; reading goes through ``hpcml.data.open`` with its own settings.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bench import pairs

STUB = Path(__file__).resolve().parents[1] / "stubs" / "slow_open.c"
OPEN_US = 2000  # as on Lustre
DIGITS, JPEGS, CLASSES = 60_000, 3_000, 10
SIDE = 28
IMAGE_SIZE, BATCH = 180, 128
SEED = 20
EPOCHS = 3  # that are measured at once: a training sets its pipeline up once for many
SLOW = pairs.Bound(5, at_least=True, pairs=4)
WARM = pairs.Bound(1.0, at_least=True, pairs=8)
ARRAYS = pairs.Bound(0.8, at_least=True, pairs=8)
OPENS = pairs.Bound(1.0, at_least=False, pairs=1)
RAW = (".raw",)


def make_digits(folder: Path, count: int) -> None:
    """Write files of random bytes, and pack them."""
    import numpy as np

    from hpcml.data import shards

    pixels = np.random.default_rng(SEED).integers(0, 256, (count, SIDE * SIDE), dtype=np.uint8)
    for one in range(CLASSES):
        (folder / "digits" / str(one)).mkdir(parents=True)
    for number, row in enumerate(pixels):
        (folder / "digits" / str(number % CLASSES) / f"{number:05}.raw").write_bytes(row.tobytes())
    shards.pack(folder / "digits", folder / "digits.packed", say=lambda text: None)


def make_photographs(folder: Path, count: int) -> None:
    """Draw JPEGs that are as large and as costly to decode as photographs of this size (about 22 KB), and pack them."""
    import numpy as np
    from PIL import Image

    from hpcml.data import shards

    dice = np.random.default_rng(SEED)
    for one in range(CLASSES):
        (folder / "photographs" / str(one)).mkdir(parents=True)
    for number in range(count):
        coarse = Image.fromarray(dice.integers(0, 256, (15, 20, 3), dtype=np.uint8)).resize((320, 240))
        grain = dice.integers(-12, 13, (240, 320, 1))
        pixels = np.clip(np.asarray(coarse).astype(int) + grain, 0, 255).astype(np.uint8)
        path = folder / "photographs" / str(number % CLASSES) / f"{number:05}.jpg"
        Image.fromarray(pixels).save(path, quality=85)
    shards.pack(folder / "photographs", folder / "photographs.packed", say=lambda text: None)


def speed(epochs: Iterable[tuple[Any, Any]], samples: int) -> Callable[[], float]:
    """Return what measures some epochs of a side, in samples/s; the first time, which warms up, doesn't count.

    Args:
        epochs: the batches of ``EPOCHS``; gone through anew each time, so that nothing was made ready before.
    """
    whole = samples // BATCH * BATCH * EPOCHS

    def measured() -> float:
        began = time.perf_counter()
        count = sum(int(label.shape[0]) for _, label in epochs)
        if count != whole:
            raise RuntimeError(f"{EPOCHS} epochs of {count} samples instead of {whole}")
        return count / (time.perf_counter() - began)

    measured()
    return measured


class Repeated:
    """The epochs of a DataLoader."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        for epoch in range(EPOCHS):
            if hasattr(self._loader.sampler, "set_epoch"):
                self._loader.sampler.set_epoch(epoch)
            yield from self._loader


def slowly(side: Callable[[], float], under: Path) -> Callable[[], float]:
    """Return a side whose opening of each file below a folder takes 2 ms."""

    def measured() -> float:
        os.environ |= {"SLOW_OPEN_UNDER": str(under), "SLOW_OPEN_US": str(OPEN_US)}
        try:
            return side()
        finally:
            del os.environ["SLOW_OPEN_UNDER"]

    return measured


def of(samples: Any, **how: Any) -> Any:
    """The epochs of a collection, in TensorFlow."""
    return samples.tensorflow(BATCH, seed=SEED, epochs=range(EPOCHS), **how)


def by_hand(samples: Any) -> Any:
    """The epochs of single images as TensorFlow's guide loads them, decoded in the same way."""
    import tensorflow as tf

    paths = [str(samples.path / name) for name in samples.names]

    def decode(path: Any, label: Any) -> Any:
        image = tf.image.resize(tf.io.decode_jpeg(tf.io.read_file(path), channels=3), (IMAGE_SIZE, IMAGE_SIZE))
        return tf.cast(tf.round(image), tf.uint8), label

    order = tf.data.Dataset.from_tensor_slices((paths, samples.labels)).shuffle(len(paths), seed=SEED)
    decoded = order.map(decode, num_parallel_calls=tf.data.AUTOTUNE)
    return decoded.batch(BATCH, drop_remainder=True).repeat(EPOCHS).prefetch(tf.data.AUTOTUNE)


def in_memory(samples: Any) -> Any:
    """The epochs of the same samples as arrays, in TensorFlow."""
    import tensorflow as tf

    x = samples.gather(range(len(samples))).reshape(-1, SIDE, SIDE, 1)
    order = tf.data.Dataset.from_tensor_slices((x, samples.labels)).shuffle(len(samples), seed=SEED)
    return order.batch(BATCH, drop_remainder=True).repeat(EPOCHS).prefetch(tf.data.AUTOTUNE)


def for_torch(samples: Any) -> Repeated:
    """The epochs of a collection, in torch."""
    return Repeated(samples.torch(BATCH, raw=(SIDE, SIDE, 1), seed=SEED))


def tensors(samples: Any, *, by_batch: bool) -> Repeated:
    """The epochs of the same samples as tensors in memory: by sample as usual, or indexed by whole batches."""
    import torch
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

    x = torch.from_numpy(samples.gather(range(len(samples))).reshape(-1, SIDE, SIDE, 1))
    held = TensorDataset(x, torch.from_numpy(samples.labels))
    if by_batch:
        sampler = BatchSampler(RandomSampler(held), BATCH, drop_last=True)
        return Repeated(DataLoader(held, batch_size=None, sampler=sampler))
    return Repeated(DataLoader(held, batch_size=BATCH, shuffle=True, drop_last=True))


def opens(folder: Path, packed: str) -> tuple[int, int]:
    """Return how many times six epochs in a process of their own open shards, by strace, and how many shards there are."""
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "log"
        words = ["strace", "-f", "-qq", "-e", "trace=open,openat", "-o", str(log)]
        code = (
            "import sys; from bench import bench_epoch as b; import hpcml.data as d\n"
            "samples = d.open(sys.argv[1], suffixes=b.RAW)\n"
            "side = b.speed(b.of(samples, raw=(b.SIDE, b.SIDE, 1)), len(samples)); side()\n"
        )
        subprocess.run(
            [*words, sys.executable, "-c", code, str(folder / packed)], check=True, stderr=subprocess.DEVNULL
        )
        count = sum(f"{packed}/shard-" in line and ".tar" in line for line in log.read_text().splitlines())
    return count, len(list((folder / packed).glob("shard-*.tar")))


def preloaded() -> None:
    """Start again with the stub that makes opens slow, unless it is there; idle it costs nothing that could be measured."""
    if "slow_open" in os.environ.get("LD_PRELOAD", ""):
        return
    with tempfile.TemporaryDirectory() as name:
        library = Path(name) / "libslow_open.so"
        words = [shutil.which("cc") or "gcc", "-shared", "-fPIC", "-O2", "-o", str(library), str(STUB), "-ldl"]
        subprocess.run(words, check=True)
        environment = {**pairs.environment(), "LD_PRELOAD": str(library), "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment["CUDA_VISIBLE_DEVICES"] = "-1"
        sys.exit(subprocess.run([sys.executable, "-m", "bench.bench_epoch", *sys.argv[1:]], env=environment).returncode)


def figures(folder: Path, quick: bool) -> Iterable[pairs.Figure]:
    """Measure them all."""
    from hpcml import data

    loose, packed = (data.open(str(folder / name), suffixes=RAW) for name in ("digits", "digits.packed"))
    photographs, in_shards = (data.open(str(folder / name)) for name in ("photographs", "photographs.packed"))
    raw = {"raw": (SIDE, SIDE, 1)}
    digits = f"An epoch of {len(packed):,} samples of 784 bytes in batches of {BATCH}"

    def figure(name: str, sides: tuple[str, str], bound: pairs.Bound, what: str, ours: Any, other: Any) -> pairs.Figure:
        measured = []
        for pair in pairs.measure(pairs.in_turn(ours, other), least=2 if quick else bound.pairs):
            measured.append(pair)
            pairs.progress(f"epoch, {name}", pair, len(measured))
        return pairs.Figure(name, what, sides, "samples/s", measured, bound)

    count = len(packed)
    slow = (slowly(speed(of(one, **raw), count), folder) for one in (packed, loose))
    what = f"{digits}, each open 2 ms; single files by 16 readers, as hpcml.data.open reads them."
    yield figure("slow opens", ("shards", "files"), SLOW, what, *slow)
    size = {"image_size": IMAGE_SIZE}
    what = (
        f"{len(in_shards):,} JPEGs of 320 × 240 to {IMAGE_SIZE} × {IMAGE_SIZE}, warm; files by tf.io.read_file in map."
    )
    sides = speed(of(in_shards, **size), len(in_shards)), speed(by_hand(photographs), len(photographs))
    yield figure("JPEG, warm", ("shards", "files"), WARM, what, *sides)
    memory = f"{digits}; against from_tensor_slices, shuffle of all, batch, prefetch."
    sides = speed(of(packed, **raw), count), speed(in_memory(packed), count)
    yield figure("arrays", ("shards", "in memory"), ARRAYS, memory, *sides)
    for name, by_batch, how in (
        ("torch", False, "DataLoader(TensorDataset, shuffle=True)"),
        ("torch, by batch", True, "the same with a BatchSampler, which indexes whole batches"),
    ):
        sides = speed(for_torch(packed), count), speed(tensors(packed, by_batch=by_batch), count)
        yield figure(name, ("shards", "in memory"), ARRAYS, f"{digits}; against {how}.", *sides)
    if shutil.which("strace"):
        opened, there = opens(folder, "digits.packed")
        what = f"Opens of shards in six epochs of {count:,} samples, by strace; against the number of shards."
        yield pairs.Figure("opens", what, ("opened", "shards"), "files", [pairs.Pair(opened, there, True)], OPENS)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two pairs of small data sets, nothing is judged")
    quick = parser.parse_args().quick
    preloaded()
    pairs.announce("epoch")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_digits(folder, DIGITS // 20 if quick else DIGITS)
        make_photographs(folder, JPEGS // 10 if quick else JPEGS)
        measured = list(figures(folder, quick))
    notes = [] if shutil.which("strace") else ["Opens were not counted: no strace here."]
    pairs.show("epoch: packed shards against files and memory", measured, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
