"""Exact uniform sampling from the items a client has not consumed.

The r-th free item is computed, not found by rejection: for consumed ids
c_0 < c_1 < … , c_i − 1 − i items below c_i are free, so the answer is
`r + 1 + #{i : c_i − 1 − i <= r}`. There is no rejection loop, and shapes are
fixed, so it works inside jit.
"""

import jax
import jax.numpy as jnp


def free_below(
  consumed: jax.Array, num_consumed: jax.Array, num_rows: jax.Array | int
) -> jax.Array:
  """Number of free items below each consumed one.

  Args:
    consumed: [A] int32 ids, ascending and distinct, padded at the end.
    num_consumed: [] int32, how many of them are real.
    num_rows: V, catalogue rows including padding row 0.

  Returns:
    [A] int32, ascending; V at padding.
  """
  index = jnp.arange(consumed.shape[0], dtype=jnp.int32)
  return jnp.where(index < num_consumed, consumed - 1 - index, num_rows)


def nth_free(rank: jax.Array, below: jax.Array) -> jax.Array:
  """The free items of the given 0-based ranks, in the shape of `rank`.

  Args:
    rank: [...] int32 in [0, number of free items).
    below: [A] from `free_below`.
  """
  skipped = jnp.searchsorted(below, rank, side='right', method='scan_unrolled')
  return rank + 1 + skipped.astype(jnp.int32)


def sample(
  key: jax.Array,
  shape: tuple[int, ...],
  consumed: jax.Array,
  num_consumed: jax.Array,
  num_rows: jax.Array | int,
) -> jax.Array:
  """Independent uniform draws from the complement of `consumed`.

  Args:
    key: used up by the one draw.
    shape: of the result.
    consumed: [A] int32 ids, ascending and distinct, padded at the end.
    num_consumed: [] int32, how many of them are real; below V − 1.
    num_rows: V.

  Returns:
    [*shape] int32 ids in 1 … V−1, none of them consumed.
  """
  num_free = num_rows - 1 - num_consumed
  rank = jax.random.randint(key, shape, 0, jnp.maximum(num_free, 1))
  return nth_free(rank, free_below(consumed, num_consumed, num_rows))
