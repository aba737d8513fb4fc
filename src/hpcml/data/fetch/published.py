"""Data sets and weights that are published somewhere, with the digests that their publishers or users of theirs give."""

from collections.abc import Mapping
from dataclasses import dataclass

# Sizes and SHA-256 as in TensorFlow Datasets (url_checksums/mnist.txt).
MNIST_FILES: Mapping[str, tuple[int | None, str]] = {
    "train-images-idx3-ubyte.gz": (
        9_912_422,
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    "train-labels-idx1-ubyte.gz": (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
    "t10k-images-idx3-ubyte.gz": (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
    "t10k-labels-idx1-ubyte.gz": (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
}


@dataclass(frozen=True)
class Published:
    """One of them.

    Attributes:
        name: of what it becomes in the data folder.
        about: one line for a person.
        mirrors: where its files lie, each with a ``/`` at its end; tried in this order.
        files: name → size in bytes and digest (SHA-256 by 64 digits, MD5 by 32); none where it needs no download.
        folder: below the data folder, where it belongs; empty for the data folder itself.
    """

    name: str
    about: str
    mirrors: tuple[str, ...]
    files: Mapping[str, tuple[int | None, str]]
    folder: str = ""

    @property
    def is_mnist(self) -> bool:
        """Whether it is four idx files that become one data set."""
        return self.files is MNIST_FILES


PUBLISHED = {
    "mnist": Published(
        "mnist",
        "70,000 digits, 12 MB (hpcml.data.load('mnist') has 5,000 of them without fetching)",
        ("https://storage.googleapis.com/cvdf-datasets/mnist/", "https://ossci-datasets.s3.amazonaws.com/mnist/"),
        MNIST_FILES,
    ),
    # https://www.tensorflow.org/datasets/catalog/tf_flowers; SHA-256 as there (tf_flowers/checksums.tsv).
    "flowers": Published(
        "flowers",
        "3,670 photographs of five kinds of flowers, 229 MB",
        ("https://storage.googleapis.com/download.tensorflow.org/example_images/",),
        {
            "flower_photos.tgz": (
                228_813_984,
                "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c",
            )
        },
    ),
    # MD5 as in Keras (keras/applications/resnet.py, WEIGHTS_HASHES).
    "resnet50": Published(
        "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "weights of ResNet50 without its classifier, 94 MB",
        ("https://storage.googleapis.com/tensorflow/keras-applications/resnet/",),
        {"resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5": (None, "4d473c1dd8becc155b73f8504c6f6626")},
        folder="weights",
    ),
    "digits": Published("digits", "5,000 MNIST digits as a folder of images, without a network", (), {}),
}
