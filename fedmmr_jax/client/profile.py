"""A client's profile: the mean embedding of its items outside a window (input
of `models/profile.py`).

In training these are all training items, later ones included, except those of
the window and its targets; at evaluation they are the items before the window.
So a profile is as long in training as when it counts, and holds nothing that is
asked about; what it knows of the time after a window helps no ranking of held-
out items, which are in no profile. Without the later items the test item's full
NDCG@10 changed by -0.0053 [-0.0105, -0.0004], the validation item's by +0.0002
[-0.0058, +0.0058] (40 rounds of recommended.flags, seed 0).
The embeddings are those the server sent, without gradient: they are trained
only through the rest of the model. Axes: `H` longest history, `B` windows, `D`
hidden size.
"""

import jax
import jax.numpy as jnp

from fedmmr_jax.client.scoring import Params
from fedmmr_jax.client.vocabulary import ITEM_TABLE
from fedmmr_jax.models.feddmmr import Catalogue, FedDMMR


def running_sums(
  model: FedDMMR, params: Params, items: jax.Array, catalogue: Catalogue
) -> jax.Array:
  """[H + 1, D] sums of the embeddings of the first 0, 1, … H items.

  Args:
    model: the architecture.
    params: the server's; the item table may hold only the client's U rows.
    items: [H] int32 rows of that table, 0 = none.
    catalogue: features of its rows.
  """
  sums = jnp.cumsum(_embedded(model, params, items, catalogue), axis=0)
  return jnp.pad(sums, ((1, 0), (0, 0)))


def outside(
  sums: jax.Array, num_items: jax.Array, start: jax.Array, stop: jax.Array
) -> jax.Array:
  """[B, D] mean embeddings of the first `num_items` items except those at
  start, … stop − 1; zero if none are left.

  Args:
    sums: from `running_sums`.
    num_items: [] int32.
    start: [B] int32, at least 0.
    stop: [B] int32, at most `num_items`.
  """
  left = num_items - (stop - start)
  total = sums[num_items] - (sums[stop] - sums[start])
  mean = total / jnp.maximum(left, 1)[:, None]
  # Where nothing is left, rounding may leave something of the sums.
  return jnp.where(left[:, None] > 0, mean, 0.0)


def mean(
  model: FedDMMR, params: Params, items: jax.Array, catalogue: Catalogue
) -> jax.Array:
  """[D] mean embedding of items [H] int32, 0 = none; zero if there is none."""
  total = jnp.sum(_embedded(model, params, items, catalogue), axis=0)
  return total / jnp.maximum(jnp.sum(items > 0), 1)


def _embedded(model, params, items, catalogue) -> jax.Array:
  """[H, D] embeddings without gradient, 0 where there is no item."""
  model = model.clone(num_rows=len(params[ITEM_TABLE]))
  embedded = model.apply({'params': params}, items, catalogue, method='embed')
  return jnp.where(items[:, None] > 0, jax.lax.stop_gradient(embedded), 0.0)
