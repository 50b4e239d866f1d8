"""The two heterogeneous experts: each looks at a candidate through the
client's own memory (FedDMMR, "Multimodal experts").

With `sees_candidate` the candidate's own feature, projected, is added to what
its expert read in the memory; otherwise it only weighs the memory's entries.

Neither sees the sequence, so an expert runs once per candidate, not once per
(sequence, candidate) pair. Projections are folded into the R memory rows
before they meet the J candidates; this is exact, because a projection
commutes with the attention average.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedmmr_jax.models import layers


class MemoryView(NamedTuple):
  """What the experts may attend to: features of retrieved memory entries.

  Attributes:
    visual: [R, 512] float32; a configuration without images has width 0.
    visual_mask: [R] bool, False at empty slots and items without an image.
    text: [R', 384] float32, R' = R, or R + P with global prototypes.
    text_mask: [R'] bool, False at empty slots and items without text.
  """

  visual: jax.Array
  visual_mask: jax.Array
  text: jax.Array
  text_mask: jax.Array


class VisualExpert(nn.Module):
  """Single-head attention of the candidate's image over the memory's images.

  Values are the raw memory features; the output layer maps them to `D`.
  """

  hidden_dim: int
  projection_dim: int
  dropout: float
  sees_candidate: bool = False

  @nn.compact
  def __call__(
    self, candidate_visual: jax.Array, memory: MemoryView, train: bool
  ) -> jax.Array:
    """Args:
      candidate_visual: [J, 512] float32.
      memory: the client's retrieved entries.
      train: whether dropout acts.

    Returns:
      [J, D] float32.
    """
    width = candidate_visual.shape[-1]
    projection_dim = min(self.projection_dim, width)
    key = layers.dense(projection_dim, 'key')(memory.visual)
    query = layers.Affine(width, projection_dim, name='query')()
    # (c W + b) kᵀ = c (W kᵀ) + b kᵀ: one [R, 512] matrix for all candidates.
    logits = (key @ query.kernel.T) @ candidate_visual.T + (key @ query.bias)[
      :, None
    ]
    attention = layers.masked_softmax(
      logits * projection_dim**-0.5, memory.visual_mask[:, None], axis=0
    )
    # Project R memory rows instead of J averages of them.
    output = layers.Affine(width, self.hidden_dim, name='output')()
    x = attention.T @ (memory.visual @ output.kernel) + output.bias
    if self.sees_candidate:
      x += layers.dense(self.hidden_dim, 'candidate')(candidate_visual)
    x = nn.relu(layers.layer_norm('norm')(x))
    return nn.Dropout(self.dropout)(x, deterministic=not train)


class SemanticExpert(nn.Module):
  """Multi-head cross-attention of a candidate's embedding over memory text."""

  hidden_dim: int
  num_heads: int
  dropout: float
  sees_candidate: bool = False

  @nn.compact
  def __call__(
    self,
    candidate_embedding: jax.Array,
    candidate_text: jax.Array,
    memory: MemoryView,
    train: bool,
  ) -> jax.Array:
    """Args:
      candidate_embedding: [J, D] float32, the query.
      candidate_text: [J, 384] float32, used with `sees_candidate`.
      memory: the client's retrieved entries.
      train: whether dropout acts.

    Returns:
      [J, D] float32.
    """
    dim = self.hidden_dim
    head_dim = dim // self.num_heads
    key = layers.dense(dim, 'key')(memory.text)
    value = layers.dense(dim, 'value')(memory.text)
    key = layers.dense(dim, 'attention_key')(key)
    value = layers.dense(dim, 'attention_value')(value)
    key = layers.split_heads(key, self.num_heads)  # [H, R, D/H]
    value = layers.split_heads(value, self.num_heads)

    # Two query projections in a row and each head's keys fold into one
    # [H·R, D] matrix that all candidates share, each head's values and the
    # output projection into another.
    outer = layers.Affine(dim, dim, name='query')()
    inner = layers.Affine(dim, dim, name='attention_query')()
    kernel = (outer.kernel @ inner.kernel).reshape(dim, -1, head_dim)
    bias = (outer.bias @ inner.kernel + inner.bias).reshape(-1, head_dim)
    folded = jnp.einsum('dhe,hre->hrd', kernel, key)
    offset = jnp.einsum('he,hre->hr', bias, key)
    output = layers.Affine(dim, dim, name='attention_output')()
    value = jnp.einsum(
      'hre,hed->hrd', value, output.kernel.reshape(-1, head_dim, dim)
    )

    # Candidates last: R is short, J is long, and reductions over R vectorise.
    logits = jnp.einsum('hrd,jd->hrj', folded, candidate_embedding)
    attention = layers.masked_softmax(
      (logits + offset[..., None]) * head_dim**-0.5,
      memory.text_mask[:, None],
      axis=-2,
    )
    attention = nn.Dropout(self.dropout)(attention, deterministic=not train)
    x = jnp.einsum('hrj,hrd->jd', attention, value) + output.bias
    if self.sees_candidate:
      x += layers.dense(dim, 'candidate')(candidate_text)
    x = layers.layer_norm('norm')(x)
    x = nn.relu(layers.dense(dim, 'output')(x))
    return nn.Dropout(self.dropout)(x, deterministic=not train)
