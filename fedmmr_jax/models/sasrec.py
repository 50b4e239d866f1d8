"""SASRec backbone (Kang & McAuley 2018, "Self-Attentive Sequential
Recommendation", ICDM), post-norm form, written for one window.

With `positions=relative,start=recency` it starts as what it is for: the first
block's attention hands on a mean of the window's item embeddings, weighted by
e^(−distance / 4), and every other branch starts at 0, as in ReZero (Bachlechner
et al. 2021, "ReZero is all you need: fast convergence at large depth", UAI). So
the untrained model ranks what is near the last items in the item table; one of
random matrices has to learn that first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedmmr_jax.config import AbsolutePositions, RelativePositions
from fedmmr_jax.models import layers

# A recent start: how much of the mean is added to the last item, and how fast
# its weights fall with distance. Half and twice of either rank alike.
_GAIN = 4.0
_SLOPE = 0.25


def _alibi(key, shape) -> jax.Array:
  """[heads, L] −slope · distance (ALiBi, Press et al. 2022), with slopes from
  1/2 down to 1/32 by equal factors, and 0 for the last of several heads, which
  starts with the plain mean."""
  del key
  slopes = 2.0 ** -jnp.linspace(1, 5, max(1, shape[0] - 1))
  slopes = jnp.append(slopes, 0.0)[: shape[0]]
  return -slopes[:, None] * jnp.arange(shape[1])


def _recent(key, shape) -> jax.Array:
  """[heads, L] −slope · distance, one slope: each head has other directions of
  the same items."""
  del key
  distance = jnp.arange(shape[1], dtype=jnp.float32)
  return jnp.broadcast_to(-_SLOPE * distance, shape)


class Start(NamedTuple):
  """What parts of a block are initialised with; the others are Xavier-uniform,
  with zero bias."""

  value: nn.initializers.Initializer
  output: nn.initializers.Initializer
  feed_forward_out: nn.initializers.Initializer
  distance_embedding: nn.initializers.Initializer


_RANDOM = nn.initializers.xavier_uniform()
_ZERO = nn.initializers.zeros_init()
_SAME = layers.scaled_identity(_GAIN**0.5)
RANDOM = Start(_RANDOM, _RANDOM, _RANDOM, _alibi)
RECENT_MEAN = Start(_SAME, _SAME, _ZERO, _recent)  # added to what comes in
NOTHING = Start(_RANDOM, _ZERO, _ZERO, _alibi)  # likewise


class CausalBlock(nn.Module):
  """One transformer block: attention, add & norm, feed-forward, add & norm.

  Attributes:
    num_distances: how far back a window can reach, for relative position
      biases; 0 = none.
    start: what it is before training.
  """

  hidden_dim: int
  num_heads: int
  dropout: float
  num_distances: int = 0
  start: Start = RANDOM

  @nn.compact
  def __call__(
    self, x: jax.Array, valid: jax.Array, train: bool, last_only: bool = False
  ) -> jax.Array:
    """Applies the block to one window.

    Args:
      x: [L, D] float32 states.
      valid: [L] bool, False at padding, which nothing attends to.
      train: whether dropout acts (consumes the `dropout` key).
      last_only: compute only the last position; its value is the same.

    Returns:
      [L, D], or [1, D] with `last_only`.
    """
    length = x.shape[0]
    queries_from = x[-1:] if last_only else x
    query = layers.dense(self.hidden_dim, 'query')(queries_from)
    key = layers.dense(self.hidden_dim, 'key')(x)
    value = layers.dense(self.hidden_dim, 'value', self.start.value)(x)

    query, key, value = (
      layers.split_heads(t, self.num_heads) for t in (query, key, value)
    )
    logits = jnp.einsum('hqd,hkd->hqk', query, key)
    logits = logits * (self.hidden_dim // self.num_heads) ** -0.5
    causal = jnp.tril(jnp.ones((length, length), bool))[-query.shape[1] :]
    if self.num_distances:
      bias = self.param(
        'distance_embedding',
        self.start.distance_embedding,
        (self.num_heads, self.num_distances),
      )
      ago = jnp.arange(length)[:, None] - jnp.arange(length)
      logits += bias[:, jnp.maximum(ago, 0)[-query.shape[1] :]]
    attention = layers.masked_softmax(logits, causal & valid)
    attention = nn.Dropout(self.dropout)(attention, deterministic=not train)
    attended = layers.merge_heads(jnp.einsum('hqk,hkd->hqd', attention, value))
    attended = layers.dense(self.hidden_dim, 'output', self.start.output)(
      attended
    )
    attended = nn.Dropout(self.dropout)(attended, deterministic=not train)
    x = layers.layer_norm('attention_norm')(queries_from + attended)

    y = nn.relu(layers.dense(self.hidden_dim, 'feed_forward_in')(x))
    y = nn.Dropout(self.dropout)(y, deterministic=not train)
    y = layers.dense(
      self.hidden_dim, 'feed_forward_out', self.start.feed_forward_out
    )(y)
    y = nn.Dropout(self.dropout)(y, deterministic=not train)
    return layers.layer_norm('feed_forward_norm')(x + y)


class SASRec(nn.Module):
  """Position embeddings, causal blocks and a final LayerNorm."""

  hidden_dim: int
  num_heads: int
  num_blocks: int
  max_seq_len: int
  dropout: float
  embedding_init_std: float
  positions: AbsolutePositions | RelativePositions

  @nn.compact
  def __call__(
    self,
    embedded: jax.Array,
    valid: jax.Array,
    train: bool,
    last_only: bool = False,
  ) -> jax.Array:
    """Encodes one left-padded window.

    Args:
      embedded: [L, D] float32 item embeddings of the window.
      valid: [L] bool, False at padding.
      train: whether dropout acts.
      last_only: compute the last block only for the last position.

    Returns:
      [L, D] states, or [1, D] with `last_only`: the sequence representation.
    """
    x = embedded
    num_distances, first, others = 0, RANDOM, RANDOM
    if isinstance(self.positions, RelativePositions):
      num_distances = self.max_seq_len
      if self.positions.start == 'recency':
        first, others = RECENT_MEAN, NOTHING
    else:
      positions = self.param(
        'position_embedding',
        nn.initializers.normal(self.embedding_init_std),
        (self.max_seq_len, self.hidden_dim),
      )
      x += positions[-embedded.shape[0] :]
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    for i in range(self.num_blocks):
      block = CausalBlock(
        self.hidden_dim,
        self.num_heads,
        self.dropout,
        num_distances,
        others if i else first,
        name=f'block_{i}',
      )
      x = block(
        x, valid, train, last_only=last_only and i == self.num_blocks - 1
      )
    return layers.layer_norm('final_norm')(x)
