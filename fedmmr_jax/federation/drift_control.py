"""What keeps a client's local steps from drifting to its own optimum.

Each method is an optax transformation of the local gradient, chained in front
of the client's step (`optimizers.client_optimizer`):
* FedProx (Li et al. 2020): μ (w − w_server) is added;
* SCAFFOLD (Karimireddy et al. 2020): c − c_i is added, the server's control
  variate minus the client's own, which it keeps between rounds;
* MimeLite (Karimireddy et al. 2021): the server's optimizer, with its moments
  held where they were at the start of the round, makes the step.

SCAFFOLD and MimeLite also need the client's gradient. They take its mean along
the local path (SCAFFOLD's option II; MimeLite's authors spend another pass on
the gradient at the server's parameters). All state is a tree of the
parameters' structure, so that `vocabulary.take` and `put` cut it like them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedmmr_jax.client.scoring import Params


class MeanGradient(NamedTuple):
  """Sum of the gradients that passed, and how many; see `mean`."""

  total: Params
  count: jax.Array

  def mean(self) -> Params:
    """Their mean; zeros if there was none."""
    return jax.tree.map(lambda g: g / jnp.maximum(self.count, 1), self.total)


def record_gradient() -> optax.GradientTransformation:
  """Passes gradients on and keeps their sum (`MeanGradient`)."""
  def init(params):
    return MeanGradient(jax.tree.map(jnp.zeros_like, params), jnp.float32(0))

  def update(gradient, state, params=None):
    del params
    total = jax.tree.map(jnp.add, state.total, gradient)
    return gradient, MeanGradient(total, state.count + 1)

  return optax.GradientTransformation(init, update)


def fedprox(mu: float) -> optax.GradientTransformation:
  """Adds μ (w − w_0), with w_0 the parameters at `init`."""
  def update(gradient, anchor, params):
    pulled = jax.tree.map(
        lambda g, w, w0: g + mu * (w - w0), gradient, params, anchor)
    return pulled, anchor

  return optax.GradientTransformation(lambda params: params, update)


def scaffold(correction: Params) -> optax.GradientTransformation:
  """Adds c − c_i (`correction`)."""
  def update(gradient, correction, params=None):
    del params
    return jax.tree.map(jnp.add, gradient, correction), correction

  return optax.GradientTransformation(lambda params: correction, update)


def mime_lite(server_moments: optax.GradientTransformation,
              state: optax.OptState) -> optax.GradientTransformation:
  """Turns a gradient into the server optimizer's direction; its `state` is
  read and not moved on."""
  def update(gradient, state, params=None):
    return server_moments.update(gradient, state, params)[0], state

  return optax.GradientTransformation(lambda params: state, update)
