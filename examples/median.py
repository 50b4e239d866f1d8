"""An aggregator that sees every client: the coordinate-wise median.

Yin et al. 2018, "Byzantine-robust distributed learning", ICML. It takes memory
for the whole cohort and needs `--vocabulary=dense`, where all clients have all
rows of the item table.
"""

import dataclasses

import jax
import jax.numpy as jnp

import fedmmr_jax as fm


@dataclasses.dataclass(frozen=True)
class Median(fm.Aggregator):
  """The median of the deltas of the clients that trained."""

  def zero(self, params):
    return None

  def add(self, total, updates):
    return None

  def collect(self, updates):
    return updates.delta, updates.weight

  def finish(self, total, collected, state, params):
    delta, weight = collected  # [cohort, …], padding clients included

    def median(x):
      trained = weight.reshape(-1, *[1] * (x.ndim - 1)) > 0
      middle = jnp.nanmedian(jnp.where(trained, x, jnp.nan), axis=0)
      return jnp.nan_to_num(middle)  # nobody trained

    return jax.tree.map(median, delta), state
