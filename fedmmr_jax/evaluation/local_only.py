"""The local-only baseline: every client trains its own copy of the initial
model, without aggregation. Whatever it gains over popularity, a client can
learn alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax.client import memory as memory_lib
from fedmmr_jax.client import update as client_lib
from fedmmr_jax.client import vocabulary
from fedmmr_jax.data.dataset import FederatedData
from fedmmr_jax.evaluation import ranking
from fedmmr_jax.evaluation.ranking import Ranks
from fedmmr_jax.federation import devices
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.federation.round import RoundProgram
from fedmmr_jax.federation.server import ServerState
from fedmmr_jax.models.feddmmr import Catalogue


def rank_all(
  program: RoundProgram,
  server: ServerState,
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
    server: the state that all clients start from.
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
    server,
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
  server: ServerState,
  key: jax.Array,
  targets: jax.Array,
  catalogue: Catalogue,
  data: FederatedData,
  aim: jax.Array | None,
) -> tuple[None, Ranks]:
  """(None, the ranks [g, C, n] of some chunks' clients)."""
  model, config = program.client.model, program.config
  broadcast = server.broadcast(catalogue, config)
  empty = None if model.is_backbone_only else memory_lib.init(config.memory)

  def rank_one(client, view, max_steps):
    update = client_lib.local_update(
      program.client,
      broadcast,
      view,
      empty,
      None,
      jax.random.fold_in(key, client),
      max_steps,
    )
    ids = update.vocabulary.ids
    trained = jax.tree.map(
      jnp.add, vocabulary.take(broadcast.params, ids), update.delta
    )
    own = broadcast._replace(
      params=vocabulary.put(
        broadcast.params, ids, update.vocabulary.is_first, trained
      )
    )

    def rank(target):
      return ranking.rank_target(
        model, config, own, view, update.memory, *target, aim
      )

    return jax.lax.map(rank, targets[client])

  def rank_chunk(chunk):
    views, max_steps = round_lib.chunk_views(program, data, chunk)
    return jax.vmap(rank_one, (0, 0, None))(chunk, views, max_steps)

  return None, jax.lax.map(rank_chunk, chunks)
