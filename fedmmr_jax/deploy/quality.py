"""What an exported scorer ranks like, by the protocol of `ranking`.

It differs from the run's own evaluation by two things that can be measured
here: memories are made from histories, where a client has one that training
wrote, and its tables may be int8.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax.data.dataset import client_view, FederatedData
from fedmmr_jax.deploy.scorer import Scorer, Weights
from fedmmr_jax.evaluation import ranking
from fedmmr_jax.evaluation.ranking import Ranks, Targets
from fedmmr_jax.federation.round import FederationState, in_chunks
from fedmmr_jax.metrics import FULL
from fedmmr_jax.simulation import Simulation

OWN_MEMORIES = 'own_memories'
SHOWN = ('HR@10', 'NDCG@10')  # of the ranking of all items
_BATCH = 32  # clients


def measure(
  simulation: Simulation,
  state: FederationState,
  split: str,
  weights: dict[str, Weights],
) -> dict[str, Any]:
  """The metrics of the run's ranked clients.

  Args:
    simulation: the run.
    state: one of its rounds.
    split: 'val' or 'test'.
    weights: name -> those of a scorer.

  Returns:
    'split'; 'clients'; by OWN_MEMORIES, as the run evaluates, and by each name
    of `weights`: SHOWN -> value.

  Raises:
    UserError: a score is NaN or infinite.
  """
  targets = simulation.ranked_targets(split)
  own, _ = simulation.evaluate(state, split)
  found: dict[str, Any] = {
    'split': split,
    'clients': len(np.unique(targets.client)),
    OWN_MEMORIES: _shown(own),
  }
  for name, arrays in weights.items():
    ranks = rank(simulation, arrays, targets)
    found[name] = _shown(ranking.metrics_of(ranks, (), targets.client))
  return found


def rank(simulation: Simulation, weights: Weights, targets: Targets) -> Ranks:
  """Ranks [n] of targets by a scorer, on the host."""
  scorer = Scorer.of(simulation, 1)
  chunks = [
    jax.device_get(
      _rank_chunk(
        scorer,
        simulation.max_items,
        weights,
        simulation.data,
        jnp.int32(ranking.SPLITS[targets.split]),
        *chunk,
      )
    )
    for chunk in zip(*(in_chunks(x, _BATCH) for x in targets[:3]))
  ]
  return jax.tree.map(
    lambda *x: np.concatenate(x)[: len(targets.client)], *chunks
  )


@partial(jax.jit, static_argnames=('scorer', 'max_items'))
def _rank_chunk(
  scorer: Scorer,
  max_items: int,
  weights: Weights,
  data: FederatedData,
  split: jax.Array,
  client: jax.Array,
  after_train: jax.Array,
  known: jax.Array,
) -> Ranks:
  """Ranks of the targets of some clients; all [C] int32, client −1 = none."""
  clients = jax.vmap(lambda c: client_view(data, c, max_items))(client)
  now = clients.num_train + known
  before = jnp.arange(max_items) < now[:, None]
  scores = scorer(weights, jnp.where(before, clients.history, 0))['scores']
  return jax.vmap(ranking.rank_client, in_axes=(0, 0, 0, 0, None))(
    scores, clients, clients.num_train + after_train, now, split
  )


def _shown(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
  return {name: metrics[FULL][name] for name in SHOWN}
