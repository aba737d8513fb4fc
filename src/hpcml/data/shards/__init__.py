"""Packed data sets: many small files as few large shards with an index, and back.

A shard is a plain POSIX tar, and what tar lacks, random access and checksums, is in an index beside it: measured against
ArrayRecord, TFRecord, WebDataset and squashfs (``tests/bench/bench_formats.py``) this is read fastest at random, and
``tar -x`` gives the files back anywhere, without anything of hpcml.

    dataset.json       counts, classes, fingerprint, shards, checksums
    index.npz          for each sample shard, offset, size, SHA-256, mode and name
    shard-00000.tar …  the samples, mixed by a constant seed
"""

from .packing import Packed as Packed
from .packing import pack as pack
from .plan import Damaged as Damaged
from .progress import Progress as Progress
from .reader import Shards as Shards
from .unpacking import Unpacked as Unpacked
from .unpacking import unpack as unpack
from .verifying import Damage as Damage
from .verifying import verify as verify
