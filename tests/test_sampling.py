"""Random numbers by position, and the order items come in."""

import pickle
from collections import Counter

import numpy as np
import pytest

from m2d_embed.errors import ConfigError
from m2d_embed.training.sampling import ItemOrder, Purpose, order_of_epoch, rng_at


def test_random_numbers_are_keyed_by_seed_position_and_purpose():
    draws = {
        tuple(rng_at(seed, position, purpose).random(4))
        for seed in (0, 1, 1 << 63)
        for position in (0, 1, 1 << 40)
        for purpose in Purpose
    }
    assert len(draws) == 3 * 3 * len(Purpose)
    np.testing.assert_array_equal(rng_at(3, 5, Purpose.CROP).random(100), rng_at(3, 5, Purpose.CROP).random(100))


def test_neighbouring_positions_do_not_overlap():
    first, second = (rng_at(0, position, Purpose.MASK).integers(1 << 60, size=2000) for position in (7, 8))
    assert not set(first) & set(second)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


def test_items_of_equal_weight_come_once_an_epoch():
    order = ItemOrder(np.full(50, 2.0), seed=1)
    epochs = [[order.item_at(epoch * 50 + i) for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [ItemOrder(np.ones(50), seed=2).item_at(i) for i in range(50)]


def test_an_order_can_be_asked_for_any_position_in_any_order():
    order = ItemOrder(np.ones(7), seed=0)
    forwards = {position: order.item_at(position) for position in range(70)}
    fresh = pickle.loads(pickle.dumps(ItemOrder(np.ones(7), seed=0)))
    assert {position: fresh.item_at(position) for position in reversed(range(70))} == forwards


def test_items_are_drawn_by_weight():
    weights = np.array([0.0, 1.0, 2.0, 0.5, 0.0] * 20)
    counts = Counter(int(i) for epoch in range(40) for i in order_of_epoch(weights, 0, epoch))
    share = weights * len(weights) / weights.sum() * 40
    assert all(abs(counts[i] - expected) <= 12 for i, expected in enumerate(share))
    assert counts.keys() == set(np.flatnonzero(weights))
    order = order_of_epoch(weights, 0, 0)
    assert len(order) == len(weights)
    assert (np.diff(order) < 0).any()


def test_single_draws_follow_the_weights():
    order = ItemOrder(np.array([0.0, 3.0, 1.0, 0.0]), seed=0)
    rng = np.random.default_rng(0)
    counts = Counter(order.draw(rng) for _ in range(2000))
    assert counts.keys() == {1, 2}
    assert abs(counts[1] / 2000 - 0.75) < 0.05


def test_weights_that_are_all_zero():
    with pytest.raises(ConfigError, match="add up to nothing"):
        ItemOrder(np.zeros(3), seed=0)
    with pytest.raises(ConfigError, match="no items"):
        ItemOrder(np.zeros(0), seed=0)
