"""Negatives: uniform over exactly what a client has not consumed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax.client import negatives

NUM_ROWS = 11  # items 1 … 10
EVERYTHING_BUT_4 = [1, 2, 3, 5, 6, 7, 8, 9, 10]
CASES = [
  [],
  [1],
  [10],
  [1, 10],
  [1, 2, 9, 10],
  [4, 5, 6],
  [2, 4, 6, 8, 10],
  EVERYTHING_BUT_4,
]


def padded(consumed, length=12, padding=0):
  return jnp.asarray(consumed + [padding] * (length - len(consumed)), jnp.int32)


def nth_free(ranks, consumed, **padding):
  below = negatives.free_below(
    padded(consumed, **padding), len(consumed), NUM_ROWS
  )
  return negatives.nth_free(jnp.asarray(ranks, jnp.int32), below)


def sample(key, shape, consumed, num_rows=NUM_ROWS, **padding):
  return np.asarray(
    negatives.sample(
      key,
      shape,
      padded(consumed, **padding),
      jnp.int32(len(consumed)),
      num_rows,
    )
  )


@pytest.mark.parametrize('consumed', CASES, ids=str)
def test_ranks_are_a_bijection_onto_the_complement(consumed):
  free = [i for i in range(1, NUM_ROWS) if i not in consumed]
  assert nth_free(range(len(free)), consumed).tolist() == free


def test_ranks_by_hand():
  # Free of {3, 4, 8}: 1 2 5 6 7 9 10.
  assert nth_free([0, 2, 4, 5, 6], [3, 4, 8]).tolist() == [1, 5, 7, 9, 10]


def test_free_below_by_hand():
  # Below 3 are 1, 2; below 4 as well; below 8 also 5, 6, 7. Then padding.
  below = negatives.free_below(padded([3, 4, 8], length=5), 3, NUM_ROWS)
  assert below.tolist() == [2, 2, 5, NUM_ROWS, NUM_ROWS]


def test_random_subsets_are_bijections_too():
  rng = np.random.default_rng(0)
  for _ in range(20):
    size = int(rng.integers(0, NUM_ROWS - 1))
    consumed = np.sort(
      rng.choice(np.arange(1, NUM_ROWS), size, replace=False)
    ).tolist()
    free = sorted(set(range(1, NUM_ROWS)) - set(consumed))
    assert nth_free(range(len(free)), consumed).tolist() == free


def test_the_shape_is_that_of_the_ranks():
  ranks = [[0, 1, 2], [3, 4, 5]]
  assert nth_free(ranks, [1, 10]).tolist() == [[2, 3, 4], [5, 6, 7]]


@pytest.mark.parametrize('consumed', CASES, ids=str)
def test_draws_are_free_items_and_reach_all_of_them(consumed):
  drawn = set(sample(jax.random.key(0), (400,), consumed).tolist())
  # The chance to miss one of 10 in 400 draws is below 10 · 0.9^400 = 5e-18.
  assert drawn == set(range(1, NUM_ROWS)) - set(consumed)


def test_draws_are_uniform():
  # 8 free items, 8000 draws: 1000 of each expected. χ² with 7 degrees of
  # freedom exceeds 24.3 in one of 1000 cases; the key is fixed.
  drawn = sample(jax.random.key(1), (8000,), [3, 7])
  count = np.bincount(drawn, minlength=NUM_ROWS)
  assert count[[0, 3, 7]].tolist() == [0, 0, 0]
  observed = np.delete(count, [0, 3, 7])
  assert np.sum((observed - 1000) ** 2 / 1000) < 24.3


def test_padding_of_consumed_changes_nothing():
  expected = sample(jax.random.key(2), (200,), [2, 3, 9], length=3)
  for length, padding in ((4, 0), (12, 0), (12, 5), (40, NUM_ROWS - 1)):
    drawn = sample(
      jax.random.key(2), (200,), [2, 3, 9], length=length, padding=padding
    )
    np.testing.assert_array_equal(drawn, expected)


def test_nothing_consumed_and_no_padding():
  drawn = sample(jax.random.key(3), (400,), [], length=1)
  assert set(drawn.tolist()) == set(range(1, NUM_ROWS))


@pytest.mark.parametrize('shape', [(), (5,), (2, 3), (2, 3, 4)])
def test_shape_and_dtype(shape):
  drawn = sample(jax.random.key(0), shape, [3])
  assert drawn.shape == shape
  assert drawn.dtype == np.int32


def test_the_same_key_draws_the_same_and_another_key_another():
  first, again, other = (
    sample(jax.random.key(seed), (50,), [3]) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


def test_a_client_s_draws_do_not_depend_on_its_neighbours():
  clients = [[], [1, 10], EVERYTHING_BUT_4]
  keys = jax.random.split(jax.random.key(4), 3)
  together = jax.vmap(
    lambda key, consumed, n: negatives.sample(key, (30,), consumed, n, NUM_ROWS)
  )(
    keys,
    jnp.stack([padded(c) for c in clients]),
    jnp.asarray([len(c) for c in clients]),
  )
  for key, consumed, drawn in zip(keys, clients, together):
    np.testing.assert_array_equal(drawn, sample(key, (30,), consumed))


def test_a_large_catalogue_stays_exact():
  # All but the last of 4000 items are consumed, or all but the first.
  rows = 4001
  last = sample(
    jax.random.key(5), (20,), list(range(1, rows - 1)), rows, length=4000
  )
  assert set(last.tolist()) == {rows - 1}
  first = sample(
    jax.random.key(5), (20,), list(range(2, rows)), rows, length=4000
  )
  assert set(first.tolist()) == {1}
