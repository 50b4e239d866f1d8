"""Mergeable means (sum and weight) of training, and ranking metrics.

HR, NDCG and MRR are computed from ranks on the host, in float64.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CUTOFFS = (5, 10, 20)


class Mean(NamedTuple):
  """A weighted mean under construction.

  Attributes:
    total: [] or [n] float32 Σ w·v.
    weight: [] float32 Σ w: exact up to 2^24 = 16.8 million; beyond it each
      merge is off by 6e-8 of the sum at most, as those of `total` are anyway.
  """

  total: jax.Array
  weight: jax.Array


EMPTY = Mean(np.float32(0), np.float32(0))


def empty(shape: tuple[int, ...]) -> Mean:
  """The mean of no vectors."""
  return Mean(np.zeros(shape, np.float32), np.float32(0))


def mean(value: jax.Array, weight: jax.Array) -> Mean:
  """A value, [] or [n], that already is the mean of `weight` samples."""
  weight = jnp.asarray(weight, jnp.float32)
  return Mean(jnp.where(weight > 0, value, 0.0) * weight, weight)


def over(values: jax.Array, counted: jax.Array) -> Mean:
  """The mean of an array over the entries where `counted`."""
  return Mean(
    jnp.sum(jnp.where(counted, values, 0.0)),
    jnp.sum(counted, dtype=jnp.float32),
  )


def merge(first, second):
  """Adds two trees of `Mean`."""
  return jax.tree.map(jnp.add, first, second)


def finish(means: dict[str, Mean]) -> dict[str, float | list[float] | None]:
  """Host values; None where nothing was counted (JSON has no NaN)."""
  return {
    name: (np.float64(m.total) / np.float64(m.weight)).tolist()
    if m.weight > 0
    else None
    for name, m in means.items()
  }


def ranking(ranks: np.ndarray | jax.Array) -> dict[str, float]:
  """HR, NDCG and MRR of one relevant item per user.

  Args:
    ranks: [K] int 0-based: how many candidates are at least as good as the
      target. A tie counts against the target.

  Returns:
    'HR@n', 'NDCG@n' for n in CUTOFFS, and 'MRR'.
  """
  return {
    name: float(np.mean(values))
    for name, values in ranking_of_each(ranks).items()
  }


def ranking_of_each(ranks: np.ndarray) -> dict[str, np.ndarray]:
  """As `ranking`, but [K] values, one a user."""
  ranks = np.asarray(ranks, np.float64)
  result = {}
  for n in CUTOFFS:
    hit = ranks < n
    result[f'HR@{n}'] = hit.astype(np.float64)
    result[f'NDCG@{n}'] = hit / np.log2(ranks + 2)
  result['MRR'] = 1 / (ranks + 1)
  return result


def recbole_of_each(ranks: np.ndarray) -> dict[str, np.ndarray]:
  """[K] values under the names and definitions of RecBole (Zhao et al. 2021),
  with one relevant item per user: recall is hit, average precision the
  reciprocal rank, both cut off.

  RecBole leaves ties to the order of its sort; here they count against the
  target.

  Args:
    ranks: as `ranking`.
  """
  ranks = np.asarray(ranks, np.float64)
  result = {}
  for n in CUTOFFS:
    hit = ranks < n
    result[f'hit@{n}'] = result[f'recall@{n}'] = hit.astype(np.float64)
    result[f'precision@{n}'] = hit / n
    result[f'mrr@{n}'] = result[f'map@{n}'] = hit / (ranks + 1)
    result[f'ndcg@{n}'] = hit / np.log2(ranks + 2)
  return result
