"""The order of an epoch, for any number of ranks: each sample once, the same batches, the same place after a restart."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from hpcml.data.order import LARGEST_SEED, Order
from hpcml.errors import HpcmlError

np = pytest.importorskip("numpy", reason="NumPy: not installed")
hypothesis = pytest.importorskip("hypothesis", reason="hypothesis: not installed (pip install 'hpcml[test]')")
st = hypothesis.strategies

orders = st.fixed_dictionaries(
    {
        "count": st.integers(0, 300),
        "global_batch": st.integers(1, 64),
        "seed": st.none() | st.integers(0, LARGEST_SEED),
        "world": st.integers(1, 17),
        "drop_remainder": st.booleans(),
    }
).filter(lambda one: not one["drop_remainder"] or one["count"] >= one["global_batch"])
epochs = st.integers(0, 2**31)


def ranks_of(order: dict[str, Any]) -> list[Order]:
    return [Order(rank=rank, **order) for rank in range(order["world"])]


@hypothesis.settings(deadline=None)  # a busy machine is no failure
@hypothesis.given(orders, epochs)
def test_each_sample_once_over_all_ranks(order: dict[str, Any], epoch: int) -> None:
    rows = np.concatenate([one.part(epoch) for one in ranks_of(order)])
    assert len(set(rows.tolist())) == len(rows), "no sample twice"
    left_out = order["count"] % order["global_batch"] if order["drop_remainder"] else 0
    assert len(rows) == order["count"] - left_out
    assert set(rows.tolist()) <= set(range(order["count"]))


@hypothesis.settings(deadline=None)
@hypothesis.given(orders, epochs)
def test_a_batch_is_the_same_for_any_number_of_ranks(order: dict[str, Any], epoch: int) -> None:
    alone = list(Order(**{**order, "world": 1}).batches(epoch))
    shared = [list(one.batches(epoch)) for one in ranks_of(order)]
    assert {len(batches) for batches in shared} == {len(alone)} == {ranks_of(order)[0].steps}
    for whole, *parts in zip(alone, *shared, strict=True):
        assert np.concatenate(parts).tolist() == whole.tolist(), "in contiguous parts, by rank"


@hypothesis.settings(deadline=None)
@hypothesis.given(orders, epochs, st.integers(0, 20))
def test_an_epoch_goes_on_at_a_step_as_if_it_had_not_stopped(order: dict[str, Any], epoch: int, step: int) -> None:
    for one in ranks_of(order):
        assert list(map(list, one.batches(epoch, step))) == list(map(list, one.batches(epoch)))[step:]
        assert one.part(epoch, step).tolist() == [row for batch in one.batches(epoch, step) for row in batch]


@hypothesis.settings(deadline=None)
@hypothesis.given(orders, epochs)
def test_what_it_says_of_its_sizes_is_so(order: dict[str, Any], epoch: int) -> None:
    for one in ranks_of(order):
        sizes = [len(batch) for batch in one.batches(epoch)]
        whole = order["count"] // order["global_batch"]
        assert sizes == [one.share] * whole + [one.rest] * (one.steps - whole)
    shares = [one.share for one in ranks_of(order)]
    assert max(shares) - min(shares) <= 1, "as even as can be"


def test_a_run_goes_on_with_another_number_of_ranks() -> None:
    before, after = (Order(100, 12, seed=5, world=world, drop_remainder=True) for world in (3, 4))
    seen = [set[int](), set[int]()]
    for share, world, steps, first in ((before, 3, 5, 0), (after, 4, 8, 5)):
        for rank in range(world):
            one = Order(100, 12, seed=5, rank=rank, world=world, drop_remainder=True)
            for batch in itertools.islice(one.batches(2, first), steps - first):
                seen[0] |= set(batch.tolist())
        assert share.steps == 8
    assert seen[0] == set(Order(100, 12, seed=5, drop_remainder=True).part(2).tolist())


def test_epochs_and_seeds_have_orders_of_their_own_and_none_is_in_order() -> None:
    found = {tuple(Order(50, 10, seed=seed).part(epoch)) for seed in range(5) for epoch in range(5)}
    assert len(found) == 25 and tuple(range(50)) not in found
    assert Order(50, 10).part(3).tolist() == list(range(50))


def test_the_order_of_a_seed_stays_what_it_is() -> None:
    """Runs of different years compare, and a run goes on after NumPy was updated."""
    assert Order(10, 5, seed=123).part(0).tolist() == [4, 8, 1, 2, 3, 7, 5, 0, 6, 9]
    assert Order(10, 5, seed=123).part(1).tolist() == [2, 0, 7, 4, 3, 1, 9, 5, 6, 8]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"global_batch": 0}, "global_batch = 0"),
        ({"rank": 2, "world": 2}, r"rank = 2 of world = 2\n(?s:.*)rank=run.topology.rank"),
        ({"rank": -1}, "rank = -1"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"global_batch": 11, "drop_remainder": True}, "global_batch = 11: 10 samples make no whole batch"),
    ],
)
def test_what_makes_no_order_is_told(given: dict[str, Any], says: str) -> None:
    with pytest.raises(HpcmlError, match=says):
        Order(**{"count": 10, "global_batch": 5, **given})
