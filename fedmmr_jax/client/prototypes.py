"""Prototypes: k-means at the client, re-clustering at the server.

Centre p of one client does not correspond to centre p of another, so the server
does not average them by position. It clusters the uploaded centres, each
weighted by the size of its cluster. Axes: `M` points, `P` centres,
`F` features.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Prototypes(NamedTuple):
  """Centres of one clustering.

  Attributes:
    centre: [P, F] float32.
    size: [P] float32 weight of the points of each cluster; 0 = no cluster.
  """

  centre: jax.Array
  size: jax.Array


def init(num_prototypes: int, feature_dim: int) -> Prototypes:
  """No prototypes yet: zero centres of size 0."""
  return Prototypes(
    jnp.zeros((num_prototypes, feature_dim)), jnp.zeros((num_prototypes,))
  )


def cluster(
  points: jax.Array, weights: jax.Array, num_prototypes: int, iterations: int
) -> Prototypes:
  """Weighted k-means (Lloyd 1982), initialised by farthest-first traversal.

  Deterministic: needs no key. With fewer distinct points than centres, the
  surplus centres get size 0.

  Args:
    points: [M, F] float32.
    weights: [M] float32 >= 0; points of weight 0 are ignored.
    num_prototypes: P.
    iterations: Lloyd steps.

  Returns:
    Centres and the weights of their clusters.
  """
  start = _farthest_first(points, weights, num_prototypes)

  def step(_, found):
    return _lloyd(points, weights, found.centre)

  sizeless = Prototypes(start, jnp.zeros((num_prototypes,), points.dtype))
  return jax.lax.fori_loop(0, iterations, step, sizeless)


def recluster(
  uploaded: Prototypes, previous: Prototypes, iterations: int
) -> Prototypes:
  """The server's prototypes from the clients' centres.

  Args:
    uploaded: centres [..., P, F] and sizes [..., P] of all clients of a round.
    previous: the server's prototypes, kept if no client uploaded any.
    iterations: Lloyd steps.
  """
  size = uploaded.size.reshape(-1)
  # Not reshape(-1, F): without texts F is 0.
  centre = uploaded.centre.reshape(len(size), uploaded.centre.shape[-1])
  found = cluster(centre, size, previous.centre.shape[0], iterations)
  anything = jnp.sum(uploaded.size) > 0
  return jax.tree.map(
    lambda new, old: jnp.where(anything, new, old), found, previous
  )


def _squared_distance(points: jax.Array, centres: jax.Array) -> jax.Array:
  """[M, P]; clipped, since rounding can make the expansion negative."""
  return jnp.maximum(
    jnp.sum(points**2, -1)[:, None]
    + jnp.sum(centres**2, -1)
    - 2 * jnp.matmul(points, centres.T, precision=jax.lax.Precision.HIGHEST),
    0.0,
  )


def _farthest_first(points, weights, num_prototypes):
  """[P, F]: the heaviest point, then repeatedly the point farthest from all."""

  def pick(p, carry):
    centres, distance = carry
    centre = points[jnp.argmax(distance)]
    nearest = _squared_distance(points, centre[None])[:, 0]
    distance = jnp.where(weights > 0, jnp.minimum(distance, nearest), -1.0)
    return centres.at[p].set(centre), distance

  # Among equally heavy points the one farthest from the mean, so that the
  # order of the points (of the clients, at the server) does not matter.
  total = jnp.sum(weights)
  mean = weights @ points / jnp.where(total > 0, total, 1.0)
  heaviest = weights == jnp.max(weights)
  first = jnp.argmax(
    jnp.where(heaviest, _squared_distance(points, mean[None])[:, 0], -1.0)
  )
  nearest = _squared_distance(points, points[first][None])[:, 0]
  distance = jnp.where(weights > 0, nearest, -1.0)
  centres = jnp.zeros((num_prototypes, points.shape[1]), points.dtype)
  centres = centres.at[0].set(points[first])
  return jax.lax.fori_loop(1, num_prototypes, pick, (centres, distance))[0]


def _lloyd(points, weights, centres) -> Prototypes:
  nearest = jnp.argmin(_squared_distance(points, centres), axis=-1)
  member = jax.nn.one_hot(nearest, centres.shape[0], dtype=points.dtype)
  member = member * weights[:, None]
  size = jnp.sum(member, axis=0)
  mean = (member.T @ points) / jnp.where(size > 0, size, 1.0)[:, None]
  return Prototypes(jnp.where(size[:, None] > 0, mean, centres), size)
