"""Content in the item table: item embeddings that start from item features.

A randomly initialised table first learns popularity, for dozens of rounds; one
initialised from item content does not (`--item_embedding`).
* `content_init`: the initial row is the item's content plus noise; training is
  free to change it.
* `content_plus_id`: content @ projection + row, with a trained projection that
  starts as the identity and rows that start as the same noise. Both start
  from the same embeddings, but here the embedding of an item that nobody
  consumed changes with what is learned about its content.
"""

from typing import Sequence

import jax
import jax.numpy as jnp
import numpy as np

NOISE = 0.3  # of the initial table, relative to the content; see `row_noise`


def components(features: Sequence[np.ndarray], dim: int) -> np.ndarray:
  """Principal components of the joined features.

  Each modality is centred and scaled to the same mean length over the items
  that have it, so that none outweighs another; a missing feature counts as the
  mean.

  Args:
    features: of each modality [V, F] float32, zero row = missing; F may be 0.
    dim: D, how many components; if there are fewer, the rest is 0.

  Returns:
    [V, D] float32 rows of length 1 on average (root mean square over items
    with any features), zero rows for the others; [V, 0] without any features.
  """
  joined = np.concatenate([centred(matrix) for matrix in features], axis=1)
  if not joined.shape[1]:
    return joined.astype(np.float32)
  _, vectors = np.linalg.eigh(joined.T @ joined)  # ascending
  found = joined @ vectors[:, ::-1][:, :dim]
  found = with_fixed_signs(found)
  found = np.pad(found, ((0, 0), (0, dim - found.shape[1])))
  return (found / root_mean_square_length(found)).astype(np.float32)


def with_fixed_signs(columns: np.ndarray) -> np.ndarray:
  """An eigenvector's sign is arbitrary: makes its largest entry positive."""
  peak = np.abs(columns).argmax(axis=0)
  return columns * np.sign(columns[peak, np.arange(columns.shape[1])])


def initial_table(
  key: jax.Array,
  content: jax.Array,
  std: float,
  plus_id: bool,
  row_noise: float = NOISE,
) -> jax.Array:
  """The initial item table.

  Args:
    key: for the noise.
    content: [V, D] from `components`.
    std: of the entries of the initial embeddings.
    plus_id: whether to leave the content out, because `content_plus_id` adds
      it.
    row_noise: of the rows, relative to the content; rows of items without
      content are as long as content times its share of `NOISE`.

  Returns:
    [V, D] float32; row 0 zero.
  """
  noise = jax.random.normal(key, content.shape)
  has_content = jnp.any(content != 0, axis=-1, keepdims=True)
  scale = projection_scale(std, content.shape[-1])
  shared = row_noise * std / (1 + NOISE**2) ** 0.5 * noise
  if not plus_id:
    shared = shared + scale * content
  alone = row_noise / NOISE * std * noise
  return jnp.where(has_content, shared, alone).at[0].set(0.0)


def projection_scale(std: float, dim: int) -> float:
  """Factor that gives content of unit length entries of the intended size."""
  return std * dim**0.5 / (1 + NOISE**2) ** 0.5


def centred(features: np.ndarray) -> np.ndarray:
  """[V, F] float64: minus the mean over the items that have the feature, then
  scaled to a mean square length of 1; a missing one stays zero."""
  features = features.astype(np.float64)
  present = np.any(features != 0, axis=1)
  if not present.any():
    return features
  moved = np.where(
    present[:, None], features - features[present].mean(axis=0), 0.0
  )
  return moved / root_mean_square_length(moved)


def root_mean_square_length(rows) -> float:
  """Root mean square length of the rows that are not zero."""
  squared = (rows**2).sum(axis=1)
  return float(np.sqrt(squared[squared > 0].mean())) if squared.any() else 1.0
