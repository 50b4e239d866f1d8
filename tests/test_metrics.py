"""Ranking metrics by hand, and means that merge."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax import metrics


def test_rank_0_is_perfect():
  assert set(metrics.ranking(np.array([0])).values()) == {1.0}


def test_names():
  assert list(metrics.ranking(np.array([0]))) == [
    'HR@5',
    'NDCG@5',
    'HR@10',
    'NDCG@10',
    'HR@20',
    'NDCG@20',
    'MRR',
  ]


def test_rank_9_is_the_last_hit_at_10():
  got = metrics.ranking(np.array([9]))
  assert got == pytest.approx(
    {
      'HR@5': 0,
      'NDCG@5': 0,
      'HR@10': 1,
      'NDCG@10': 1 / np.log2(11),  # 0.289065
      'HR@20': 1,
      'NDCG@20': 1 / np.log2(11),
      'MRR': 0.1,
    }
  )


@pytest.mark.parametrize('n', [5, 10, 20])
def test_cutoffs_are_exclusive(n):
  assert metrics.ranking(np.array([n - 1]))[f'HR@{n}'] == 1
  assert metrics.ranking(np.array([n]))[f'HR@{n}'] == 0
  assert metrics.ranking(np.array([n]))[f'NDCG@{n}'] == 0


def test_users_are_averaged():
  # Ranks 0, 2, 6, 30: 1/log2(2) = 1, 1/log2(4) = 1/2, 1/log2(8) = 1/3.
  got = metrics.ranking(np.array([0, 2, 6, 30]))
  assert got == pytest.approx(
    {
      'HR@5': 2 / 4,
      'NDCG@5': (1 + 1 / 2) / 4,
      'HR@10': 3 / 4,
      'NDCG@10': (1 + 1 / 2 + 1 / 3) / 4,
      'HR@20': 3 / 4,
      'NDCG@20': (1 + 1 / 2 + 1 / 3) / 4,
      'MRR': (1 + 1 / 3 + 1 / 7 + 1 / 31) / 4,
    }
  )


def test_the_order_of_users_does_not_matter():
  ranks = np.array([3, 0, 11, 7, 100])
  assert metrics.ranking(ranks[::-1]) == pytest.approx(metrics.ranking(ranks))


def test_a_better_rank_never_lowers_a_metric():
  values = [list(metrics.ranking(np.array([r])).values()) for r in range(30)]
  assert (np.diff(values, axis=0) <= 0).all()


def test_results_are_plain_floats():
  assert {type(v) for v in metrics.ranking(np.array([1])).values()} == {float}


def test_over_counts_only_what_is_counted():
  got = metrics.over(
    jnp.array([1.0, jnp.nan, 4.0]), jnp.array([True, False, True])
  )
  assert (float(got.total), float(got.weight)) == (5.0, 2.0)


def test_merged_means_are_the_mean_of_all():
  # Mean 2 of 3 samples with the mean 5 of 1 sample: (2·3 + 5·1) / 4 = 2.75.
  merged = metrics.merge(
    {'x': metrics.mean(2.0, 3)}, {'x': metrics.mean(5.0, 1)}
  )
  assert metrics.finish(merged) == {'x': 2.75}


def test_merging_with_empty_changes_nothing():
  one = metrics.mean(2.0, 3)
  assert metrics.finish({'x': metrics.merge(metrics.EMPTY, one)}) == {'x': 2.0}


def test_weight_0_gives_none():
  assert metrics.finish({'x': metrics.EMPTY}) == {'x': None}


def test_a_nan_of_weight_0_does_not_spread():
  nothing = metrics.mean(jnp.nan, 0)
  assert metrics.finish({'x': nothing}) == {'x': None}
  merged = metrics.merge(nothing, metrics.mean(2.0, 3))
  assert metrics.finish({'x': merged}) == {'x': 2.0}


def test_finished_means_are_plain_floats():
  finished = metrics.finish({'x': metrics.mean(jnp.float32(2.0), jnp.int32(3))})
  assert type(finished['x']) is float


def test_vectors_have_means_too():
  first = metrics.mean(jnp.array([1.0, 0.0]), 3)
  merged = metrics.merge(
    metrics.empty((2,)),
    metrics.merge(first, metrics.mean(jnp.array([0.0, 1.0]), 1)),
  )
  assert metrics.finish({'a': merged, 'b': metrics.empty((2,))}) == {
    'a': [0.75, 0.25],
    'b': None,
  }


def test_recbole_names_and_definitions():
  # Ranks 1, 3 and 11, by hand.
  found = metrics.recbole_of_each(np.array([0, 2, 10]))
  assert found['hit@10'].tolist() == found['recall@10'].tolist() == [1, 1, 0]
  assert found['precision@5'].tolist() == [0.2, 0.2, 0]
  np.testing.assert_allclose(found['mrr@10'], [1, 1 / 3, 0])
  np.testing.assert_allclose(found['map@20'], [1, 1 / 3, 1 / 11])
  np.testing.assert_allclose(found['ndcg@20'], [1, 0.5, np.log(2) / np.log(12)])
  assert set(found) == {
    f'{kind}@{n}'
    for n in (5, 10, 20)
    for kind in ('hit', 'recall', 'precision', 'mrr', 'map', 'ndcg')
  }


def test_counts_beyond_what_float32_counts_exactly():
  # 2,000 chunks of 50,001 make six times 2^24. Each addition may be off by half
  # a unit in the last place, 2^-24 of the sum; a mean of ones stays one.
  total = metrics.EMPTY
  for _ in range(2000):
    total = metrics.merge(total, metrics.mean(1.0, np.float32(50_001)))
  assert float(total.weight) == pytest.approx(2000 * 50_001, rel=2000 * 2**-24)
  assert metrics.finish({'x': total})['x'] == 1
