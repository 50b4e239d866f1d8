"""Long-term profile: a client's whole history, in addition to its last items.

SASRec sees only a window. The client's profile is the mean embedding of its
items outside the window, and enters in two ways:

    s' = s + LN(MLP_1(profile))                             a residual
    exp score = exp ⟨s', e⟩ + exp ⟨LN(MLP_2(profile)), e⟩   a mixture

The second is a mixture of two softmaxes (Yang et al. 2018, "Breaking the
Softmax Bottleneck", ICLR), weighted by the two normalisers: where the window is
confident, it decides; the profile orders the rest of the catalogue, and is all
that counts after a break between sessions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedmmr_jax.models import layers

INIT_SCALE = 0.3  # of both outputs, beside a sequence of scale 1


class States(NamedTuple):
  """A window and its client's profile, ready for `FedDMMR.score`.

  Attributes:
    sequence: [D] sequence representation, or [L, D] of the window's positions.
    profile: [D] the second component of the mixture, the same at each position.
    known: [] bool, False without a profile: the sequence alone decides.
  """

  sequence: jax.Array
  profile: jax.Array
  known: jax.Array


def last(states: jax.Array | States) -> jax.Array | States:
  """The last position of a window, given [L, D] or `States`."""
  if isinstance(states, States):
    return states._replace(sequence=states.sequence[-1])
  return states[-1]


def mix(sequence: jax.Array, profile: jax.Array, known: jax.Array) -> jax.Array:
  """log(exp sequence + exp profile) where the profile is known; for scores, or
  for their log Σ exp over the same candidates."""
  return jnp.where(known, jnp.logaddexp(sequence, profile), sequence)


class _Head(nn.Module):
  """Dense, norm, ReLU, dropout, dense, norm."""

  hidden_dim: int
  dropout: float

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = layers.dense(2 * self.hidden_dim, 'input')(x)
    x = nn.relu(layers.layer_norm('norm')(x))
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    x = layers.dense(self.hidden_dim, 'output')(x)
    return layers.layer_norm('output_norm', scale=INIT_SCALE)(x)


class ProfileExpert(nn.Module):
  """The two outputs of a profile."""

  hidden_dim: int
  dropout: float

  @nn.compact
  def __call__(
    self, profile: jax.Array, train: bool
  ) -> tuple[jax.Array, jax.Array]:
    """Args:
      profile: [D] float32 mean embedding.
      train: whether dropout acts.

    Returns:
      ([D] what to add to the sequence, [D] state of the mixture).
    """
    shift = _Head(self.hidden_dim, self.dropout, name='shift')(profile, train)
    shift = nn.Dropout(self.dropout)(shift, deterministic=not train)
    return shift, _Head(self.hidden_dim, self.dropout, name='state')(
      profile, train
    )
