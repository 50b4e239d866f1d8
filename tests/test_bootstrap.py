"""Paired bootstrap."""

import numpy as np

from fedmmr_jax.evaluation.bootstrap import paired_bootstrap


def test_the_same_values_differ_by_nothing():
  values = np.random.default_rng(0).random(50)
  assert paired_bootstrap(values, values) == (0.0, 0.0, 0.0)


def test_interval_is_that_of_the_normal_approximation():
  rng = np.random.default_rng(1)
  difference = rng.normal(0.1, 1.0, 400)
  found = paired_bootstrap(difference, np.zeros(400))
  error = difference.std() / 20
  assert found.mean == difference.mean()
  np.testing.assert_allclose(
    [found.low, found.high],
    difference.mean() + np.array([-1.96, 1.96]) * error,
    atol=0.1 * error,
  )


def test_pairing_takes_the_common_part_out():
  rng = np.random.default_rng(2)
  common = rng.normal(0, 10, 200)
  found = paired_bootstrap(common + 0.1, common)
  np.testing.assert_allclose(found, 0.1)
  assert found.is_clear


def test_an_interval_around_zero_is_not_clear():
  values = np.array([1.0, -1.0] * 30)
  assert not paired_bootstrap(values, np.zeros(60)).is_clear
