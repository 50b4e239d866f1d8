"""Items that were trained little count partly as the items most like them.

An item with n training interactions has seen n positives. When it is ranked,
its embedding is

    n / (n + m) · e + m / (n + m) · ê

where ê points to the weighted mean of the embeddings of the items most like it
in visual and text features, and is as long as they are on average (a mean of
vectors alone is too short to compete). Shrinkage towards a prior is empirical
Bayes (Efron & Morris 1973); a fixed graph of the nearest items by content is
FREEDOM's (Zhou & Shen 2023, "A tale of two graphs", MM), which trains through
it. Here nothing is trained, and a round costs nothing: the server does it
before it ranks. An item that nobody trained on, n = 0, is ranked where its
neighbours are.

The server has to know the counts n: a sum over clients, once, that may be
private; the simulation takes it from the training items.
"""

import functools
from typing import NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

NUM_NEIGHBOURS = 20
# Factor of the cosines in the softmax over neighbours.
SHARPNESS = 5.0
# Items whose embeddings are known best, of which neighbours are taken: all
# pairs of a million items would take hours.
MOST_KNOWN = 20_000
_BLOCK = 1024  # items compared with them at a time


class Neighbours(NamedTuple):
  """What each item shrinks to.

  Attributes:
    index: [V, k] int32, the items most like it.
    weight: [V, k] float32, which sum to 1; 0 where it has none.
    own: [V] float32, n / (n + m), how much it counts as itself; 1 without
      features or neighbours.
  """

  index: jax.Array
  weight: jax.Array
  own: jax.Array


def neighbours(
  features: Sequence[np.ndarray], counts: np.ndarray, strength: float
) -> Neighbours:
  """Finds the items most alike.

  Args:
    features: of each modality [V, F] float32, zero row = missing.
    counts: [V] training interactions with each item.
    strength: m > 0.

  Returns:
    `Neighbours`, k = NUM_NEIGHBOURS or as many as there are.
  """
  joined = _joined(features)
  present = np.any(joined != 0, axis=1)
  known = np.flatnonzero(present & (counts > 0))
  known = known[np.argsort(-counts[known], kind='stable')][:MOST_KNOWN]
  k = min(NUM_NEIGHBOURS, len(known) - 1)
  if k < 1:
    nobody = jnp.zeros((len(counts), 1))
    return Neighbours(
      nobody.astype(jnp.int32), nobody, jnp.ones((len(counts),))
    )
  index, cosine = _nearest(joined, known, k)
  weight = jax.nn.softmax(SHARPNESS * cosine, axis=-1)
  weight *= jnp.log1p(jnp.asarray(counts, jnp.float32))[index]
  weight /= weight.sum(axis=-1, keepdims=True)
  own = jnp.where(present, counts / (counts + strength), 1.0)
  return Neighbours(
    index,
    jnp.where(present[:, None], weight, 0.0),
    own.astype(jnp.float32).at[0].set(1.0),
  )


def shrunk(
  table: jax.Array, embedded: jax.Array, found: Neighbours
) -> jax.Array:
  """[V, D] the item table with which items are ranked.

  Args:
    table: [V, D] rows of the item table.
    embedded: [V, D] embeddings: rows, and what content adds to them.
    found: what items shrink to.
  """
  length = jnp.linalg.norm(embedded, axis=-1)

  def add(i, total):
    mean, mean_length = total
    index, weight = found.index[:, i], found.weight[:, i]
    return (
      mean + weight[:, None] * embedded[index],
      mean_length + weight * length[index],
    )

  mean, mean_length = jax.lax.fori_loop(
    0,
    found.index.shape[1],
    add,
    (jnp.zeros_like(embedded), jnp.zeros_like(length)),
  )
  shortest = jnp.finfo(mean.dtype).tiny
  scale = mean_length / jnp.maximum(jnp.linalg.norm(mean, axis=-1), shortest)
  prior = mean * scale[:, None]
  return table + (1 - found.own)[:, None] * (prior - embedded)


def _joined(features: Sequence[np.ndarray]) -> np.ndarray:
  """[V, ΣF] float32 of unit length, each modality with the same share of it."""

  def unit(rows):
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1.0)

  return unit(np.concatenate([unit(x) for x in features], axis=1)).astype(
    np.float32
  )


def _nearest(
  joined: np.ndarray, known: np.ndarray, k: int
) -> tuple[jax.Array, jax.Array]:
  """([V, k] int32, [V, k] float32) the known items of largest cosine to each,
  but itself, and the cosines."""
  padded = np.pad(joined, ((0, -len(joined) % _BLOCK), (0, 0)))
  index, cosine = _nearest_by_block(
    jnp.asarray(padded), jnp.asarray(known, jnp.int32), k
  )
  return index[: len(joined)], cosine[: len(joined)]


@functools.partial(jax.jit, static_argnames='k')
def _nearest_by_block(
  joined: jax.Array, known: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
  candidates = joined[known]

  def block(start):
    at = start + jnp.arange(_BLOCK)
    cosine = joined[at] @ candidates.T
    cosine = jnp.where(at[:, None] == known, -jnp.inf, cosine)
    best, place = jax.lax.top_k(cosine, k)
    return known[place], best

  found = jax.lax.map(block, jnp.arange(0, len(joined), _BLOCK))
  index, cosine = (x.reshape(-1, k) for x in found)
  return index, cosine
