"""Server step: the mean client delta through an optax transformation
(Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedmmr_jax import prototypes as prototypes_lib
from fedmmr_jax.client import Broadcast
from fedmmr_jax.config import RunConfig, ServerConfig
from fedmmr_jax.models.feddmmr import Catalogue
from fedmmr_jax.prototypes import Prototypes
from fedmmr_jax.scoring import Params

# Aggregated from the first round on, also during partial aggregation.
ALWAYS_AGGREGATED = ('item_embedding', 'content_projection', 'backbone')


class ServerState(NamedTuple):
  """What the server keeps between rounds.

  Attributes:
    params: global parameters.
    opt_state: of the server optimizer.
    prototypes: global prototypes.
    round: [] int32 finished rounds.
  """

  params: Params
  opt_state: optax.OptState
  prototypes: Prototypes
  round: jax.Array

  def broadcast(self, catalogue: Catalogue) -> Broadcast:
    """What a client of the next round receives."""
    return Broadcast(self.params, self.prototypes, catalogue)


def make_optimizer(config: ServerConfig) -> optax.GradientTransformation:
  """The server optimizer; its gradient is minus the mean delta."""
  rate = config.server_learning_rate
  adaptive = dict(b1=config.server_momentum, b2=config.server_beta2,
                  eps=config.server_epsilon)
  return {
      'fedavg': lambda: optax.sgd(rate),
      'fedavgm': lambda: optax.sgd(rate, momentum=config.server_momentum),
      'fedadam': lambda: optax.adam(rate, **adaptive),
      # optax.yogi starts its moments at 1e-6, which would swamp the deltas of
      # small client steps and move parameters that got none.
      'fedyogi': lambda: optax.chain(
          optax.scale_by_yogi(**adaptive, initial_accumulator_value=0.0),
          optax.scale_by_learning_rate(rate)),
  }[config.server_optimizer]()


def init(params: Params, config: RunConfig, text_dim: int) -> ServerState:
  """State before round 1."""
  return ServerState(
      params=params,
      opt_state=make_optimizer(config.server).init(params),
      prototypes=prototypes_lib.init(config.memory.num_prototypes, text_dim),
      round=jnp.zeros((), jnp.int32))


def aggregate(state: ServerState, delta_sum: Params, weight_sum: jax.Array,
              uploaded: Prototypes, config: RunConfig) -> ServerState:
  """Applies one round's updates.

  Args:
    state: before the round.
    delta_sum: Σ weight · delta over the cohort.
    weight_sum: [] float32 Σ weight; 0 (nobody had a positive) changes no
      parameter through fedavg.
    uploaded: the clients' prototypes, [..., P, F] and [..., P].
    config: optimizer and warm-up.

  Returns:
    The state after the round.
  """
  divisor = jnp.where(weight_sum > 0, weight_sum, 1.0)
  gradient = jax.tree.map(lambda d: -d / divisor, delta_sum)
  warming_up = state.round < config.server.partial_aggregation_warmup_rounds
  gradient = {
      group: part if group in ALWAYS_AGGREGATED else jax.tree.map(
          lambda g: jnp.where(warming_up, 0.0, g), part)
      for group, part in gradient.items()}
  updates, opt_state = make_optimizer(config.server).update(
      gradient, state.opt_state, state.params)
  return ServerState(
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      prototypes=prototypes_lib.recluster(
          uploaded, state.prototypes, config.memory.prototype_iterations),
      round=state.round + 1)
