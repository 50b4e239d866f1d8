"""Estimates of full metrics from sampled ranks."""

import numpy as np

from fedmmr_jax import metrics
from fedmmr_jax.evaluation import corrected


def test_probabilities_by_hand():
  # 3 candidates, 2 drawn: of the r that are as good as the target …
  ranks = np.arange(4)
  np.testing.assert_allclose(
    corrected.hypergeometric(ranks, 3, 2),
    [[1, 0, 0], [1 / 3, 2 / 3, 0], [0, 2 / 3, 1 / 3], [0, 0, 1]],
    atol=1e-12,
  )
  np.testing.assert_allclose(
    corrected.hypergeometric(np.arange(501), 500, 100).sum(axis=1), 1
  )


def test_a_solution_by_hand():
  # 2 candidates, 1 drawn: P = [[1, 0], [1/2, 1/2], [0, 1]], and the metric is
  # MRR, (1, 1/2, 1/3). Without regard to the variance f solves
  # PᵀP f = Pᵀ M with PᵀP = [[5/4, 1/4], [1/4, 5/4]], Pᵀ M = (5/4, 7/12).
  found = corrected.estimate_of_each(
    np.array([0, 1]), np.array([2, 2]), 1, gamma=0.0
  )
  np.testing.assert_allclose(
    found['MRR'], np.linalg.solve([[1.25, 0.25], [0.25, 1.25]], [1.25, 7 / 12])
  )
  # With the variance alone: the mean of M over the ranks that lead to x.
  found = corrected.estimate_of_each(
    np.array([0, 1]), np.array([2, 2]), 1, gamma=1.0
  )
  np.testing.assert_allclose(found['MRR'], [1.25 / 1.5, 7 / 12 / 1.5])


def test_all_candidates_drawn_is_the_metric_itself():
  ranks = np.arange(41)
  found = corrected.estimate_of_each(ranks, np.full(41, 40), 40, gamma=0.3)
  for name, values in metrics.ranking_of_each(ranks).items():
    np.testing.assert_allclose(found[name], values, atol=1e-9)


def test_blocks_of_ranks_change_nothing(monkeypatch):
  arguments = np.arange(11), np.full(11, 300), 10
  whole = corrected.estimate_of_each(*arguments)
  monkeypatch.setattr(corrected, '_BLOCK', 7)
  corrected._solution.cache_clear()
  for name, values in corrected.estimate_of_each(*arguments).items():
    np.testing.assert_allclose(values, whole[name], rtol=1e-6)


def test_it_comes_closer_than_the_sampled_metric():
  rng = np.random.default_rng(0)
  candidates = np.where(rng.random(4000) < 0.5, 900, 1100)
  full = np.minimum(rng.exponential(60, 4000).astype(int), candidates)
  sampled = rng.hypergeometric(full, candidates - full, 100)
  found = corrected.estimate_of_each(sampled, candidates, 100)
  exact = metrics.ranking(full)
  for name, naive in metrics.ranking(sampled).items():
    error = abs(found[name].mean() - exact[name])
    assert error < 0.25 * abs(naive - exact[name]), name


def test_rounding_keeps_three_digits():
  assert corrected._round(np.array([7, 123, 1234, 98_765])).tolist() == [
    7,
    123,
    1230,
    98_800,
  ]
