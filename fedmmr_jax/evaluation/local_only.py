"""Ranks of clients that train alone before they are ranked, each its own copy
of a model, without aggregation.

From the initial model this is the local-only baseline: whatever it gains over
popularity, a client can learn alone. From a trained model it is fine-tuning
(Yu et al. 2020, "Salvaging federated learning by local adaptation"): what a
client gains by training the federation's model on its own data once more. A
chunk of clients at a time has parameters of its own, so that memory does not
grow with their number.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax.client import memory as memory_lib
from fedmmr_jax.client import update as client_lib
from fedmmr_jax.client import vocabulary
from fedmmr_jax.client.memory import Memory
from fedmmr_jax.data.dataset import FederatedData
from fedmmr_jax.evaluation import ranking
from fedmmr_jax.evaluation.ranking import Ranks
from fedmmr_jax.federation import devices
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.federation.round import RoundProgram
from fedmmr_jax.federation.server import ServerState
from fedmmr_jax.models.feddmmr import Catalogue


class Start(NamedTuple):
  """What clients start from.

  Attributes:
    server: the state that all of them get.
    memories: of all clients, [K]; None = empty ones, or a model without
      experts.
    personal: of all clients, [K], see `FederationState`; None for none.
  """

  server: ServerState
  memories: Memory | None = None
  personal: Any = None


def rank_all(
  program: RoundProgram,
  start: Start,
  clients: np.ndarray,
  key: jax.Array,
  targets: np.ndarray,
  catalogue: Catalogue,
  data: FederatedData,
  aim: np.ndarray | None = None,
) -> Ranks:
  """Trains each client alone for `local_epochs` and ranks its targets.

  Args:
    program: the client program.
    start: what they start from.
    clients: [G, C] int32, −1 where none.
    key: of the training.
    targets: [K, n, 3] int32, of each client: the `after_train`, the `known` and
      the split of each target (`ranking.SPLITS`); those beyond its own repeat
      one of its own.
    catalogue: item features.
    data: all clients' data.
    aim: [] int32 the item that an attack promotes.

  Returns:
    Ranks with axes [G, C, n], on the host.
  """
  _, ranks = devices.run(
    rank_shard,
    (program,),
    devices.deal(clients),
    start,
    key,
    targets,
    catalogue,
    data,
    aim,
  )
  return devices.undealt(ranks, len(clients))


@partial(devices.jit, static_argnames='program')
def rank_shard(
  program: RoundProgram,
  chunks: jax.Array,
  start: Start,
  key: jax.Array,
  targets: jax.Array,
  catalogue: Catalogue,
  data: FederatedData,
  aim: jax.Array | None,
) -> tuple[None, Ranks]:
  """(None, the ranks [g, C, n] of some chunks' clients)."""
  model, config = program.client.model, program.config
  broadcast = start.server.broadcast(catalogue, config)

  def rank_one(client, view, memory, personal, max_steps):
    if memory is None and not model.is_backbone_only:
      memory = memory_lib.init(config.memory)
    told = ranking.received(broadcast, personal, client)
    # All of what it has is trained, so that nothing is personal here.
    update = client_lib.local_update(
      program.client,
      told,
      view,
      memory,
      None,
      jax.random.fold_in(key, client),
      max_steps,
    )
    ids = update.vocabulary.ids
    trained = jax.tree.map(
      jnp.add, vocabulary.take(told.params, ids), update.delta
    )
    own = told._replace(
      params=vocabulary.put(
        told.params, ids, update.vocabulary.is_first, trained
      )
    )

    def rank(target):
      return ranking.rank_target(
        model, config, own, view, update.memory, *target, aim
      )

    return jax.lax.map(rank, targets[client])

  def rank_chunk(chunk):
    views, max_steps = round_lib.chunk_views(program, data, chunk)
    return jax.vmap(rank_one, (0, 0, 0, 0, None))(
      chunk,
      views,
      memory_lib.fetch(start.memories, chunk),
      memory_lib.fetch(start.personal, chunk),
      max_steps,
    )

  return None, jax.lax.map(rank_chunk, chunks)
