"""Building blocks shared by the backbone, the experts and the router.

Axes as in WORKSPACE.md: `L` window length, `D` hidden size, `R` retrieved
memory entries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

LAYER_NORM_EPSILON = 1e-5
_MIN_SQUARED_NORM = 1e-12  # below it a vector has no direction


def dense(
  features: int,
  name: str | None = None,
  kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform(),
) -> nn.Dense:
  """A linear layer initialised as in the paper: Xavier-uniform, zero bias."""
  return nn.Dense(features, kernel_init=kernel_init, name=name)


def scaled_identity(scale: float) -> nn.initializers.Initializer:
  """Initialises a square matrix as `scale` times the identity."""

  def init(key, shape, dtype=jnp.float32):
    del key
    return scale * jnp.eye(*shape, dtype=dtype)

  return init


class AffineMap(NamedTuple):
  """kernel [in, out] and bias [out] of a linear layer."""

  kernel: jax.Array
  bias: jax.Array


class Affine(nn.Module):
  """The parameters of a `dense` layer, for callers that fold the product."""

  in_features: int
  out_features: int

  @nn.compact
  def __call__(self) -> AffineMap:
    kernel = self.param(
      'kernel',
      nn.initializers.xavier_uniform(),
      (self.in_features, self.out_features),
    )
    bias = self.param(
      'bias', nn.initializers.zeros_init(), (self.out_features,)
    )
    return AffineMap(kernel, bias)


def layer_norm(name: str | None = None, scale: float = 1.0) -> nn.LayerNorm:
  """LayerNorm whose trained scale starts at `scale`."""
  # The two-pass variance: E[x²] - E[x]² loses digits in float32.
  return nn.LayerNorm(
    epsilon=LAYER_NORM_EPSILON,
    use_fast_variance=False,
    name=name,
    scale_init=nn.initializers.constant(scale),
  )


def masked_softmax(
  logits: jax.Array, mask: jax.Array, axis: int = -1
) -> jax.Array:
  """Softmax over one axis that is 0 where `mask` is False.

  Where the whole mask is False it gives zeros with gradient 0, where the usual
  "add -inf" gives NaN.

  Args:
    logits: float.
    mask: bool, broadcastable to `logits`.
    axis: to normalise over.

  Returns:
    Like `logits`, summing to 1 over the axis, or to 0 where the whole mask is
    False.
  """
  lowest = jnp.finfo(logits.dtype).min
  logits = jnp.where(mask, logits, lowest)
  peak = jax.lax.stop_gradient(jnp.max(logits, axis=axis, keepdims=True))
  weights = jnp.where(mask, jnp.exp(logits - peak), 0.0)
  total = jnp.sum(weights, axis=axis, keepdims=True)
  return weights / jnp.where(total > 0, total, 1.0)


def inverse_norm(squared: jax.Array) -> jax.Array:
  """1 / √x of squared lengths; 0, with gradient 0, for zero vectors.

  The gradient of a plain norm at a zero vector is NaN. A NaN stays NaN, so that
  a diverged run remains visible.
  """
  # Both branches of the select must be finite. "Not too small" rather than
  # "large enough", for the NaN.
  has_direction = ~(squared <= _MIN_SQUARED_NORM)
  return jnp.where(
    has_direction, jax.lax.rsqrt(jnp.where(has_direction, squared, 1.0)), 0.0
  )


def unit(x: jax.Array) -> jax.Array:
  """[..., D] rows of length 1; a zero row stays zero."""
  return x * inverse_norm(jnp.sum(x * x, axis=-1, keepdims=True))


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
  """[N, D] -> [H, N, D / H]."""
  return x.reshape(x.shape[0], num_heads, -1).swapaxes(0, 1)


def merge_heads(x: jax.Array) -> jax.Array:
  """[H, N, D / H] -> [N, D]."""
  return x.swapaxes(0, 1).reshape(x.shape[1], -1)
