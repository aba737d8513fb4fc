"""The two data sets of the benchmarks of packing, made from a seed: many tiny files, and fewer of a photo's size."""

import random
from pathlib import Path

SEED = 20
DIGITS, DIGIT_BYTES = 60_000, 784
PHOTOS, PHOTO_BYTES = 3_000, 60_000
_JPEG, _JPEG_END = b"\xff\xd8\xff\xe0", b"\xff\xd9"


def digits(folder: Path, count: int = DIGITS) -> Path:
    """Make files of 784 bytes in ten folders, as MNIST's images without a header."""
    generator = random.Random(SEED)
    for number in range(count):
        path = folder / str(number % 10) / f"{number:05d}.bin"
        if number < 10:
            path.parent.mkdir(parents=True)
        path.write_bytes(generator.randbytes(DIGIT_BYTES))
    return folder


def photos(folder: Path, count: int = PHOTOS) -> Path:
    """Make files of 50 to 70 KB in five folders that begin and end as JPEGs do, and compress as badly."""
    generator = random.Random(SEED)
    for number in range(count):
        path = folder / "abcde"[number % 5] / f"{number:05d}.jpg"
        if number < 5:
            path.parent.mkdir(parents=True)
        size = generator.randrange(PHOTO_BYTES - 10_000, PHOTO_BYTES + 10_000)
        path.write_bytes(_JPEG + generator.randbytes(size - 6) + _JPEG_END)
    return folder
