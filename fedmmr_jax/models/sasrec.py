"""SASRec backbone (Kang & McAuley 2018, "Self-Attentive Sequential
Recommendation", ICDM), post-norm form, written for one window."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedmmr_jax.models import layers


class CausalBlock(nn.Module):
  """One transformer block: attention, add & norm, feed-forward, add & norm.

  Attributes:
    num_distances: how far back a window can reach, for relative position
      biases; 0 = none.
  """

  hidden_dim: int
  num_heads: int
  dropout: float
  num_distances: int = 0

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
    value = layers.dense(self.hidden_dim, 'value')(x)

    query, key, value = (
      layers.split_heads(t, self.num_heads) for t in (query, key, value)
    )
    logits = jnp.einsum('hqd,hkd->hqk', query, key)
    logits = logits * (self.hidden_dim // self.num_heads) ** -0.5
    causal = jnp.tril(jnp.ones((length, length), bool))[-query.shape[1] :]
    if self.num_distances:
      bias = self.param(
        'distance_embedding', _recency, (self.num_heads, self.num_distances)
      )
      ago = jnp.arange(length)[:, None] - jnp.arange(length)
      logits += bias[:, jnp.maximum(ago, 0)[-query.shape[1] :]]
    attention = layers.masked_softmax(logits, causal & valid)
    attention = nn.Dropout(self.dropout)(attention, deterministic=not train)
    attended = layers.merge_heads(jnp.einsum('hqk,hkd->hqd', attention, value))
    attended = layers.dense(self.hidden_dim, 'output')(attended)
    attended = nn.Dropout(self.dropout)(attended, deterministic=not train)
    x = layers.layer_norm('attention_norm')(queries_from + attended)

    y = nn.relu(layers.dense(self.hidden_dim, 'feed_forward_in')(x))
    y = nn.Dropout(self.dropout)(y, deterministic=not train)
    y = layers.dense(self.hidden_dim, 'feed_forward_out')(y)
    y = nn.Dropout(self.dropout)(y, deterministic=not train)
    return layers.layer_norm('feed_forward_norm')(x + y)


def _recency(key, shape) -> jax.Array:
  """[heads, L] −slope · distance (ALiBi, Press et al. 2022), with slopes from
  1/2 down to 1/32 by equal factors, and 0 for the last of several heads, which
  starts with the plain mean."""
  del key
  slopes = 2.0 ** -jnp.linspace(1, 5, max(1, shape[0] - 1))
  slopes = jnp.append(slopes, 0.0)[: shape[0]]
  return -slopes[:, None] * jnp.arange(shape[1])


class SASRec(nn.Module):
  """Position embeddings, causal blocks and a final LayerNorm."""

  hidden_dim: int
  num_heads: int
  num_blocks: int
  max_seq_len: int
  dropout: float
  embedding_init_std: float
  relative_positions: bool = False

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
    if not self.relative_positions:
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
        self.max_seq_len if self.relative_positions else 0,
        name=f'block_{i}',
      )
      x = block(
        x, valid, train, last_only=last_only and i == self.num_blocks - 1
      )
    return layers.layer_norm('final_norm')(x)
