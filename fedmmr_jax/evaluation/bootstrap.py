"""Paired comparison of two recommenders over the same users."""

from typing import NamedTuple

import numpy as np

from fedmmr_jax.streams import generator, Stream

RESAMPLES = 10_000


class Difference(NamedTuple):
  """Mean difference and its 95 % interval.

  Attributes:
    mean: of the differences.
    low, high: percentiles 2.5 and 97.5 of the mean over resampled users.
  """

  mean: float
  low: float
  high: float

  @property
  def is_clear(self) -> bool:
    """Does the interval exclude 0?"""
    return self.low > 0 or self.high < 0


def paired_bootstrap(
  values: np.ndarray, baseline: np.ndarray, resamples: int = RESAMPLES
) -> Difference:
  """Percentile bootstrap over users (Efron 1979; for ranking metrics Sakai
  2006).

  Args:
    values: [n] a metric of each user; with several seeds, its mean over them.
    baseline: [n] the same for the other recommender, user by user.
    resamples: how often the users are resampled, with replacement.
  """
  difference = np.asarray(values, np.float64) - baseline
  rng = generator(0, Stream.BOOTSTRAP)
  # How often each user is drawn, a block at a time to bound the memory.
  n, means = len(difference), []
  for start in range(0, resamples, 500):
    size = min(500, resamples - start)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=size)
    means.append(counts @ difference / n)
  low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
  return Difference(float(difference.mean()), float(low), float(high))
