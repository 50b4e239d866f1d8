"""Server step: aggregator, then drift control, then server optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedmmr_jax import optimizers
from fedmmr_jax.client import personal as personal_lib
from fedmmr_jax.client import prototypes as prototypes_lib
from fedmmr_jax.client.drift import Cohort, DriftControl, ServerOptimizer
from fedmmr_jax.client.prototypes import Prototypes
from fedmmr_jax.client.scoring import Params
from fedmmr_jax.client.update import Broadcast
from fedmmr_jax.config import RunConfig
from fedmmr_jax.federation import transforms as transforms_lib
from fedmmr_jax.federation.aggregators import Aggregator
from fedmmr_jax.federation.transforms import Transforms
from fedmmr_jax.models.feddmmr import Catalogue, group_of

# Aggregated from the first round on, also during partial aggregation.
ALWAYS_AGGREGATED = ('embeddings', 'backbone')


class ServerState(NamedTuple):
  """What the server keeps between rounds.

  Attributes:
    params: global parameters.
    opt_state: of the server optimizer.
    prototypes: global prototypes; None unless `global_memory`.
    round: [] int32 finished rounds.
    control: drift-control state of the server; None for none.
    aggregator: state of the aggregator; None for none.
    transforms: what the server keeps of each transform of updates.
  """

  params: Params
  opt_state: optax.OptState
  prototypes: Prototypes | None
  round: jax.Array
  control: Any = None
  aggregator: Any = None
  transforms: tuple[Any, ...] = ()

  def broadcast(
    self,
    catalogue: Catalogue,
    config: RunConfig,
    drift: DriftControl = DriftControl(),
  ) -> Broadcast:
    """What a client of the next round receives; for evaluation, without what
    drift control would send."""
    return Broadcast(
      self.params,
      self.prototypes,
      catalogue,
      optimizers.client_learning_rate(config, self.round),
      drift.broadcast(self.control, self.opt_state),
    )


def init(
  params: Params,
  config: RunConfig,
  text_dim: int,
  aggregator: Aggregator,
  drift: DriftControl,
  transforms: Transforms,
  key: jax.Array,
) -> ServerState:
  """State before round 1."""
  prototypes = None
  if config.global_memory:
    prototypes = prototypes_lib.init(config.global_memory.number, text_dim)
  return ServerState(
    params=params,
    opt_state=optimizers.server_direction(config.server).init(params),
    prototypes=prototypes,
    round=jnp.zeros((), jnp.int32),
    control=drift.server_state(params),
    aggregator=aggregator.init(params, key),
    transforms=transforms_lib.init_server(transforms, params),
  )


class Upload(NamedTuple):
  """What a cohort sent.

  Attributes:
    total: the aggregator's running total.
    control: Σ weight · upload of drift control; None without uploads.
    weight: [] float32 Σ weight, the clients' positives.
    size: [] float32 clients.
  """

  total: Any
  control: Any
  weight: jax.Array
  size: jax.Array


def enough(everybody: Cohort, config: RunConfig) -> jax.Array | None:
  """[] bool, whether so many answers count as `min_answers` wants; None if it
  wants none."""
  least = config.federation.min_answers
  return everybody.size >= least if least else None


def aggregate(
  state: ServerState,
  upload: Upload,
  collected: Any,
  prototypes: Prototypes | None,
  everybody: Cohort,
  config: RunConfig,
  aggregator: Aggregator,
  drift: DriftControl,
  transforms: Transforms = (),
) -> ServerState:
  """Applies one round's updates.

  A cohort without a single positive taught nothing: parameters, moments and
  drift control stay as they are, where a momentum would go on by itself (unless
  the aggregator `always_steps`). So they do, and prototypes with them, where
  fewer than `min_answers` count.

  Args:
    state: before the round.
    upload: of the cohort.
    collected: what the aggregator collected from each client, or None.
    prototypes: the clients', [..., P, F] and [..., P], or None.
    everybody: weights of the cohort and of all clients.
    config: optimizer and warm-up.
    aggregator: turns the upload into a delta.
    drift: turns the delta into a step.
    transforms: of the updates.

  Returns:
    The state after the round.
  """
  delta, aggregator_state = aggregator.finish(
    upload.total, collected, state.aggregator, state.params
  )
  delta = transforms_lib.released(transforms, state.transforms, delta)
  # Whatever happened to the updates on their way, noise included.
  delta = personal_lib.without(delta, config.federation.personal_groups)
  warming_up = state.round < config.server.partial_aggregation_warmup_rounds
  delta = {
    name: part
    if group_of(name) in ALWAYS_AGGREGATED
    else jax.tree.map(lambda d: jnp.where(warming_up, 0.0, d), part)
    for name, part in delta.items()
  }
  updates, opt_state, control = drift.server_step(
    state.control,
    upload.control,
    everybody,
    delta,
    ServerOptimizer(config, state.params, state.opt_state, state.round),
  )
  if config.global_memory and prototypes is not None:
    prototypes = prototypes_lib.recluster(
      prototypes, state.prototypes, config.global_memory.iterations
    )
  after = ServerState(
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    prototypes=None,
    round=None,
    control=control,
    aggregator=aggregator_state,
    transforms=state.transforms,
  )
  before = state._replace(prototypes=None, round=None)
  trained = (everybody.weight > 0) | aggregator.always_steps
  enough_ = enough(everybody, config)
  if enough_ is not None:
    trained &= enough_
    prototypes = jax.tree.map(
      lambda x, y: jnp.where(enough_, x, y), prototypes, state.prototypes
    )
  kept = jax.tree.map(lambda x, y: jnp.where(trained, x, y), after, before)
  # Memories are summarised whether or not their clients trained.
  return kept._replace(prototypes=prototypes, round=state.round + 1)
