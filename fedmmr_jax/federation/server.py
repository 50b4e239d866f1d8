"""Server step: the mean client delta through the server optimizer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedmmr_jax.client import prototypes as prototypes_lib
from fedmmr_jax.client.prototypes import Prototypes
from fedmmr_jax.client.scoring import Params
from fedmmr_jax.client.update import Broadcast
from fedmmr_jax.config import RunConfig
from fedmmr_jax.federation import optimizers
from fedmmr_jax.models.feddmmr import Catalogue, PARAMETER_GROUPS

# Aggregated from the first round on, also during partial aggregation.
ALWAYS_AGGREGATED = (
    *PARAMETER_GROUPS['embeddings'], *PARAMETER_GROUPS['backbone'])


class ServerState(NamedTuple):
  """What the server keeps between rounds.

  Attributes:
    params: global parameters.
    opt_state: of the server optimizer.
    prototypes: global prototypes; None unless `--global_memory`.
    round: [] int32 finished rounds.
    control: SCAFFOLD's control variate, the mean of the clients'; None
      without.
  """

  params: Params
  opt_state: optax.OptState
  prototypes: Prototypes | None
  round: jax.Array
  control: Params | None = None

  def broadcast(self, catalogue: Catalogue, config: RunConfig) -> Broadcast:
    """What a client of the next round receives."""
    control = {'none': None, 'scaffold': self.control,
               'mime_lite': self.opt_state}[config.client.drift_control]
    return Broadcast(
        self.params, self.prototypes, catalogue,
        optimizers.client_learning_rate(config, self.round), control)


def init(params: Params, config: RunConfig, text_dim: int) -> ServerState:
  """State before round 1."""
  control = None
  if config.client.drift_control == 'scaffold':
    control = jax.tree.map(jnp.zeros_like, params)
  prototypes = None
  if config.model.global_memory:
    prototypes = prototypes_lib.init(config.memory.num_prototypes, text_dim)
  return ServerState(
      params=params,
      opt_state=optimizers.server_direction(config.server).init(params),
      prototypes=prototypes,
      round=jnp.zeros((), jnp.int32), control=control)


class Upload(NamedTuple):
  """What a cohort sent, summed.

  Attributes:
    delta: Σ weight · delta; with fednova Σ weight · delta / steps.
    control: Σ weight · control of `ClientUpdate`; None without.
    weight: [] float32 Σ weight.
    steps: [] float32 Σ weight · steps.
  """

  delta: Params
  control: Params | None
  weight: jax.Array
  steps: jax.Array


def aggregate(state: ServerState, upload: Upload, total_weight: jax.Array,
              prototypes: Prototypes | None, config: RunConfig
              ) -> ServerState:
  """Applies one round's updates.

  Args:
    state: before the round.
    upload: of the cohort; a weight of 0 (nobody had a positive) changes no
      parameter through fedavg.
    total_weight: [] float32 Σ weight over all clients, sampled or not.
    prototypes: the clients', [..., P, F] and [..., P], or None.
    config: optimizer, drift control and warm-up.

  Returns:
    The state after the round.
  """
  divisor = jnp.where(upload.weight > 0, upload.weight, 1.0)
  delta, mean_control = (
      jax.tree.map(lambda x: x / divisor, tree)
      for tree in (upload.delta, upload.control))
  if config.server.averaging == 'fednova':
    # Back to the length of the cohort's mean local update, τ_eff steps.
    delta = jax.tree.map(lambda x: x * (upload.steps / divisor), delta)
  warming_up = state.round < config.server.partial_aggregation_warmup_rounds
  delta = {
      group: part if group in ALWAYS_AGGREGATED else jax.tree.map(
          lambda d: jnp.where(warming_up, 0.0, d), part)
      for group, part in delta.items()}
  updates, opt_state = optimizers.server_step(
      config, state.params, state.opt_state, delta, mean_control, state.round)
  control = state.control
  if control is not None:  # keeps it the weighted mean of all clients'
    total = jnp.where(total_weight > 0, total_weight, 1.0)
    control = jax.tree.map(
        lambda c, change: c + change / total, control, upload.control)
  if prototypes is not None:
    prototypes = prototypes_lib.recluster(
        prototypes, state.prototypes, config.memory.prototype_iterations)
  return ServerState(
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state, prototypes=prototypes, round=state.round + 1, control=control)
