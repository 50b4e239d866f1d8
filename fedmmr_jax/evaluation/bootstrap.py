"""Intervals from resampled users: of a comparison of two recommenders over the
same users, and of any figure of many users."""

from typing import Any, Callable, Iterator, Mapping, NamedTuple

import numpy as np

from fedmmr_jax.streams import generator, Stream

RESAMPLES = 10_000
# Of figures that have no cheaper form than counting again: a limit of the 95 %
# interval then has a standard error of 0.08 standard deviations of the figure.
RECOUNTS = 1000
_BLOCK = 2_000_000  # weights at a time


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


class Estimate(NamedTuple):
  """A figure of many users and its 95 % interval; NaN where it is undefined.

  Attributes:
    value: the figure.
    low, high: see `estimates`.
  """

  value: float
  low: float
  high: float

  def within(self, least: float, most: float) -> 'Estimate':
    """The same, its interval cut to the range of the figure."""
    low, high = np.clip([self.low, self.high], least, most)
    return self._replace(low=float(low), high=float(high))


# Weights [m, n], a row how often each user counts -> name -> figures [m].
Statistic = Callable[[np.ndarray], Mapping[Any, np.ndarray]]


def estimates(
  statistic: Statistic, num_users: int, resamples: int = RECOUNTS
) -> dict[Any, Estimate]:
  """Figures of users, and intervals from resampling the users.

  Low and high are percentiles 2.5 and 97.5 over the resamples, moved so that
  the resamples' mean is the figure itself. For a mean over users that changes
  next to nothing. A count of distinct things (coverage) is smaller in every
  resample, which has 63 % of the users, some several times: without the move
  its interval would lie below the figure (bias: Efron & Tibshirani 1993,
  section 10).

  Args:
    statistic: what is computed; twice the same user is a user of weight 2.
    num_users: n.
    resamples: how often.
  """
  figures = statistic(np.ones((1, num_users)))
  rng = generator(0, Stream.BOOTSTRAP)
  each = np.full(num_users, 1 / num_users)
  blocks = [
    statistic(rng.multinomial(num_users, each, size=size).astype(np.float64))
    for size in block_sizes(resamples, num_users)
  ]
  return {
    name: _estimate(value[0], np.concatenate([block[name] for block in blocks]))
    for name, value in figures.items()
  }


def block_sizes(resamples: int, num_users: int) -> Iterator[int]:
  """Sizes of blocks of resamples that bound the memory."""
  size = max(1, _BLOCK // num_users)
  for start in range(0, resamples, size):
    yield min(size, resamples - start)


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
  resampled = resampled[np.isfinite(resampled)]
  if not (np.isfinite(value) and len(resampled)):
    return Estimate(float(value), np.nan, np.nan)
  low, high = np.percentile(resampled, [2.5, 97.5])
  moved = value - resampled.mean()
  return Estimate(float(value), float(low + moved), float(high + moved))
