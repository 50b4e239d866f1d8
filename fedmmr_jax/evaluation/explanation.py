"""One person's recommendations, and everything that they come from.

Axes: `k` items of a list, `M` slots of a memory, `R` retrieved entries, `E`
experts.
"""

from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from fedmmr_jax.client import memory as memory_lib
from fedmmr_jax.client.memory import Memory
from fedmmr_jax.config import RunConfig, UtilityMemory
from fedmmr_jax.evaluation import ranking, recommendation
from fedmmr_jax.evaluation.recommendation import Lists, People, Reasons
from fedmmr_jax.federation import devices
from fedmmr_jax.federation.round import FederationState
from fedmmr_jax.models.feddmmr import FedDMMR
from fedmmr_jax.simulation import Simulation


class Recall(NamedTuple):
  """What the experts have to do with a list.

  Attributes:
    memory: the person's memory when asked, up to date, [M] slots.
    utility: [M] float32 of its slots, -inf where empty; None with a form of
      memory that has no utility.
    retrieved: [R] int32 rows of the catalogue that the experts read, 0 = none.
    weights: [k, E] float32 the router's weights for the recommended items; 0
      for an expert without input.
  """

  memory: Memory
  utility: np.ndarray | None
  retrieved: np.ndarray
  weights: np.ndarray


class Explanation(NamedTuple):
  """Attributes:
  lists: the recommendations, [1, k].
  reasons: what their scores lean on, n = 1.
  recall: None in a model without experts.
  """

  lists: Lists
  reasons: Reasons
  recall: Recall | None


def explain(
  simulation: Simulation,
  state: FederationState,
  person: People,
  count: int,
  repeats: bool = False,
) -> Explanation:
  """The best items for one person, and what they come from.

  Args:
    simulation: the run.
    state: one of its rounds.
    person: of n = 1.
    count: k.
    repeats: whether to recommend what the person has consumed.

  Raises:
    UserError: see `recommendation.recommend`.
  """
  lists = recommendation.recommend(
    simulation, state, person, count, repeats=repeats
  )
  server, catalogue = simulation.ready_to_rank(state.server)
  recall = _recall(
    simulation.model,
    simulation.compiled_config,
    server,
    (state.memories, state.personal),
    catalogue,
    person,
    lists.rows[0],
  )
  return Explanation(
    lists,
    recommendation.reasons(simulation, state, person, lists),
    jax.device_get(recall),
  )


@partial(devices.jit, static_argnames=('model', 'config'))
def _recall(
  model: FedDMMR, config: RunConfig, server, kept, catalogue, people, items
) -> Recall | None:
  broadcast = server.broadcast(catalogue, config)
  kept = memory_lib.fetch(kept, people.client)
  person, (memory, own) = jax.tree.map(lambda x: x[0], (people, kept))
  broadcast = ranking.received(broadcast, own, person.client)
  window, memory, _ = ranking.question_of(
    config, catalogue, person.history, person.length, person.num_train, memory
  )
  if memory is None:
    return None
  rule = config.memory
  view = ranking.view_of(model, config, broadcast, window, memory, items)
  candidates = model.apply(
    {'params': broadcast.params}, items, catalogue, view, method='candidates'
  )
  utility = None
  if isinstance(rule, UtilityMemory):
    utility = memory_lib.utility(memory, memory.clock, rule)
  return Recall(
    memory, utility, memory_lib.retrieve(memory, rule), candidates.weights
  )
