"""The local-only baseline: every client trains its own copy of the initial
model and nobody aggregates. What it reaches beyond popularity a client can
learn alone."""

from functools import partial

import jax
import jax.numpy as jnp

from fedmmr_jax import client as client_lib
from fedmmr_jax import devices
from fedmmr_jax import evaluation
from fedmmr_jax import federation
from fedmmr_jax import memory as memory_lib
from fedmmr_jax import vocabulary
from fedmmr_jax.config import RunConfig
from fedmmr_jax.data.dataset import FederatedData
from fedmmr_jax.evaluation import Ranks
from fedmmr_jax.models.feddmmr import Catalogue, FedDMMR
from fedmmr_jax.server import ServerState


@partial(jax.jit, static_argnames=('model', 'config', 'max_items'))
def rank_all(model: FedDMMR, config: RunConfig, max_items: int,
             server: ServerState, clients: jax.Array, key: jax.Array,
             splits: jax.Array, catalogue: Catalogue,
             data: FederatedData) -> Ranks:
  """Trains each client alone for `local_epochs` and ranks its targets.

  Args:
    model: the architecture.
    config: static settings.
    max_items: H, the longest client's number of interactions.
    server: the state that all start from.
    clients: [G, C] int32, −1 where none.
    key: of the training.
    splits: [n] int32, see `evaluation.SPLITS`.
    catalogue: item features.
    data: all clients' data.

  Returns:
    Ranks with axes [G, C, n].
  """
  def rank(chunks, server, key, splits, catalogue, data):
    broadcast = server.broadcast(catalogue, config)
    empty = memory_lib.init(config.memory)

    def rank_one(client, view, max_steps):
      update = client_lib.local_update(
          model, config, broadcast, view, empty, None,
          jax.random.fold_in(key, client), max_steps)
      ids = update.vocabulary.ids
      trained = jax.tree.map(
          jnp.add, vocabulary.take(broadcast.params, ids), update.delta)
      own = broadcast._replace(params=vocabulary.put(
          broadcast.params, ids, update.vocabulary.is_first, trained))

      return jax.lax.map(
          partial(evaluation.rank_target, model, config, own, view,
                  update.memory), splits)

    def rank_chunk(chunk):
      views, max_steps = federation.chunk_views(
          data, chunk, max_items, config)
      return jax.vmap(rank_one, (0, 0, None))(chunk, views, max_steps)

    return None, jax.lax.map(rank_chunk, chunks)

  return devices.run_chunks(
      rank, clients, server, key, splits, catalogue, data)[1]
