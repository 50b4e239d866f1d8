"""The optimizers of a round, as optax transformations, and learning rates.

The client optimizer turns a gradient into a local step. The server optimizer
turns the round's pseudo-gradient, minus the mean delta, into a step (Reddi et
al. 2021, "Adaptive Federated Optimization", Algorithm 2). With an adaptive
server optimizer the pseudo-gradient is divided by the client learning rate, so
that moments and epsilon are on the scale of gradients whatever the client's
step size. In `fedavg` and `fedavgm` a server learning rate of 1 gives the mean
of the clients.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from fedmmr_jax.config import (
  AdaptiveStep,
  ClientAdam,
  ClientConfig,
  Cosine,
  Linear,
  RunConfig,
  Schedule,
  ServerConfig,
  ServerMomentum,
  ServerMuon,
  ServerYogi,
)
from fedmmr_jax.models import groups

Params = Any


def client_learning_rate(config: RunConfig, finished: jax.Array) -> jax.Array:
  """[] float32 of the round after `finished` [] int32 rounds."""
  c = config.client
  return c.client_learning_rate * _factor(
    c.client_schedule, config.server.num_rounds, finished
  )


def server_learning_rate(config: RunConfig, finished: jax.Array) -> jax.Array:
  """[] float32 of the round after `finished` [] int32 rounds."""
  s = config.server
  return s.server_learning_rate * _factor(
    s.server_schedule, s.num_rounds, finished
  )


def _factor(schedule: Schedule, num_rounds: int, finished) -> jax.Array:
  """Rises linearly over the warm-up, from 1/(n + 1) in round 1, then stays
  constant (`constant`) or falls to 0 after the last round (`linear`; `cosine`,
  half a period, Loshchilov & Hutter 2017)."""
  warmup = schedule.warmup
  decay_rounds = max(1, num_rounds - warmup)
  after = optax.constant_schedule(1.0)
  if isinstance(schedule, Cosine):
    after = optax.cosine_decay_schedule(1.0, decay_rounds)
  elif isinstance(schedule, Linear):
    after = optax.linear_schedule(1.0, 0.0, decay_rounds)
  rising = optax.linear_schedule(1 / (warmup + 1), 1.0, max(1, warmup))
  return optax.join_schedules([rising, after], [warmup])(finished)


def frozen(config: ClientConfig, params: Params) -> Any:
  """A tree like the parameters, of bools: is the parameter frozen?"""
  return groups.mask(params, config.frozen_groups)


def client_optimizer(
  config: RunConfig,
  learning_rate: jax.Array | float,
  correction: optax.GradientTransformation | None = None,
  makes_step: bool = False,
) -> optax.GradientTransformation:
  """Local optimizer.

  L2 is added to the gradient, as in torch.optim.Adam.

  Args:
    config: which optimizer.
    learning_rate: of this round.
    correction: drift control's transformation of the gradient.
    makes_step: whether it replaces the optimizer's direction.
  """
  c = config.client

  def trained(params):
    return jax.tree.map(operator.not_, frozen(c, params))

  links = [
    optax.add_decayed_weights(
      c.client_optimizer.weight_decay, mask=trained if c.freeze else None
    )
  ]
  if correction is not None:
    links.append(correction)
  if isinstance(c.client_optimizer, ClientAdam) and not makes_step:
    links.append(optax.scale_by_adam())
  return optax.chain(*links, optax.scale(-learning_rate))


def server_direction(config: ServerConfig) -> optax.GradientTransformation:
  """The server optimizer's direction for a gradient, before learning rate."""
  kind = config.server_optimizer
  if isinstance(kind, ServerMomentum):
    return optax.trace(kind.momentum)
  if not isinstance(kind, AdaptiveStep):
    return optax.identity()
  if isinstance(kind, ServerMuon):
    return _muon(kind)
  adaptive = dict(b1=kind.beta1, b2=kind.beta2, eps=kind.epsilon)
  if isinstance(kind, ServerYogi):
    # optax starts yogi's moments at 1e-6, which would swamp the gradients
    # of rare items and move parameters that got none.
    return optax.scale_by_yogi(**adaptive, initial_accumulator_value=0.0)
  return optax.scale_by_adam(**adaptive)


def _muon(kind: ServerMuon) -> optax.GradientTransformation:
  """Muon (Jordan et al. 2024) for the weight matrices, Adam for the rest, both
  with Nesterov momentum.

  The step of a matrix is its momentum with all singular values set to about 1,
  scaled to entries of root mean square 1. Adam's steps have at most this size,
  so one learning rate serves both.
  """
  return optax.contrib.muon(
    -1.0,  # a learning rate would be multiplied with −1
    beta=kind.beta1,
    consistent_rms=1.0,
    eps=kind.epsilon,
    adam_b1=kind.beta1,
    adam_b2=kind.beta2,
    muon_weight_dimension_numbers=_matrices,
  )


def _matrices(params: Params) -> Any:
  """Which parameters are linear maps, for Muon. The embedding tables are not:
  they are looked up row by row, and rows are better scaled one by one."""

  def dimension(path, x):
    is_table = 'embedding' in path[-1].key
    return (
      optax.contrib.MuonDimensionNumbers()
      if x.ndim == 2 and not is_table
      else None
    )

  return jax.tree_util.tree_map_with_path(dimension, params)


def server_step(
  config: RunConfig,
  params: Params,
  opt_state: optax.OptState,
  delta: Params,
  finished: jax.Array,
) -> tuple[Params, optax.OptState]:
  """One step of the server.

  Args:
    config: which optimizer.
    params: the server's parameters.
    opt_state: of `server_direction`.
    delta: the cohort's mean delta.
    finished: [] int32 rounds before this one.

  Returns:
    (updates to add to the parameters, the next opt_state).
  """
  rate = server_learning_rate(config, finished)
  direction = server_direction(config.server)
  scale = -1.0
  if isinstance(config.server.server_optimizer, AdaptiveStep):
    client_rate = client_learning_rate(config, finished)
    scale = -1.0 / jnp.where(client_rate > 0, client_rate, 1.0)
  gradient = jax.tree.map(lambda d: scale * d, delta)
  updates, opt_state = direction.update(gradient, opt_state, params)
  return jax.tree.map(lambda u: -rate * u, updates), opt_state
