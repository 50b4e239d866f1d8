"""Item-centric router: how much each expert counts for a candidate (FedDMMR,
"Item-centric routing")."""

import jax
from flax import linen as nn

from fedmmr_jax.models import layers


class ItemRouter(nn.Module):
  """Candidate -> logits over the experts."""

  hidden_dim: int
  num_experts: int
  dropout: float

  @nn.compact
  def __call__(self, candidate: jax.Array, train: bool) -> jax.Array:
    """Args:
      candidate: [J, D] float32 item embeddings.
      train: whether dropout acts.

    Returns:
      [J, E] float32 logits; the caller masks experts without input and takes
      the softmax, which renormalises the rest.
    """
    x = layers.dense(self.hidden_dim, 'input')(candidate)
    x = nn.relu(layers.layer_norm('norm')(x))
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    x = nn.relu(layers.dense(self.hidden_dim // 2, 'hidden')(x))
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    return layers.dense(self.num_experts, 'logits')(x)
