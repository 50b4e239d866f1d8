"""The federated round, jit-compiled: the only place that vmaps over clients.

A cohort of C clients comes as chunks [G, C/G], dealt into shards (`devices`).
A shard is one jitted program, which scans its chunks with a running weighted
sum of the deltas, so memory does not grow with the cohort (but for what a client
keeps or sends one by one: its memory and prototypes, 9 kB, and SCAFFOLD's
control variate); inside a chunk the clients are vmapped. A second program adds
the shards' sums and makes the server's step. Clients of a chunk run as many
steps as its longest needs, a traced number: one compilation serves every
cohort. Sorting the cohort by length keeps the masked steps few.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax.client import memory as memory_lib
from fedmmr_jax.client import update as client_lib
from fedmmr_jax.client import vocabulary, windows
from fedmmr_jax.client.memory import Memory
from fedmmr_jax.client.scoring import Params
from fedmmr_jax.client.update import ClientUpdate
from fedmmr_jax.config import RunConfig
from fedmmr_jax.data.dataset import client_view, ClientData, FederatedData
from fedmmr_jax.errors import UserError
from fedmmr_jax.federation import devices, optimizers
from fedmmr_jax.federation import server as server_lib
from fedmmr_jax.federation.devices import PADDING_CLIENT
from fedmmr_jax.federation.server import ServerState, Upload
from fedmmr_jax.metrics import Mean
from fedmmr_jax.models import content
from fedmmr_jax.models.feddmmr import Catalogue, FedDMMR
from fedmmr_jax.streams import generator, Stream


# More than this, and SCAFFOLD's control variates are refused, and the seeds of
# an ablation run one after another. A round and its saving hold copies besides.
MOST_STATE_BYTES = 4_000_000_000


class FederationState(NamedTuple):
  """Everything a round changes.

  Attributes:
    server: the server's state.
    memories: memory of each client, leading axis [K]; None in a model without
      experts, the only ones that read it.
    controls: control variate of each client (SCAFFOLD), leading axis [K];
      None without.
  """

  server: ServerState
  memories: Memory | None
  controls: Params | None = None


def init(model: FedDMMR, catalogue: Catalogue, config: RunConfig,
         num_clients: int) -> FederationState:
  """State before round 1, drawn from the seed."""
  key = jax.random.fold_in(jax.random.key(config.seed), 0)
  params = jax.jit(partial(model.init, method='initialise'))(
      key, catalogue)['params']
  if config.model.item_embedding != 'id':
    # The model's parameters are drawn from what Flax derives of the key and
    # their names, so that the key itself is drawn from here alone. (To derive
    # another would be cleaner, and another table for every seed.)
    params[vocabulary.ITEM_TABLE] = content.initial_table(
        key, catalogue.content, config.model.embedding_init_std,
        config.model.item_embedding == 'content_plus_id')
  memory = None if model.is_backbone_only else memory_lib.init(config.memory)
  server = server_lib.init(params, config, catalogue.text.shape[-1])
  return FederationState(
      server=server,
      memories=jax.tree.map(
          lambda x: jnp.tile(x, (num_clients, *[1] * x.ndim)), memory),
      controls=jax.tree.map(
          lambda x: jnp.zeros((num_clients, *x.shape)), server.control))


def state_bytes(state: FederationState | Params) -> int:
  """Bytes of a state or a part of it, or of what has its shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def check_size(state: FederationState) -> None:
  """Raises UserError if the clients' control variates, one set of parameters
  each, are more than a machine should hold.

  Args:
    state: the state of all clients, or what has its shapes.
  """
  bytes_ = state_bytes(state.controls)
  if bytes_ > MOST_STATE_BYTES:
    clients = len(jax.tree.leaves(state.controls)[0])
    numbers = sum(x.size for x in jax.tree.leaves(state.server.params))
    raise UserError(
        '--drift_control=scaffold keeps as many numbers as the model has '
        f'({numbers:,}) for each of {clients:,} clients, {bytes_:,} bytes, '
        f'more than the {MOST_STATE_BYTES:,} allowed; take '
        '--drift_control=mime_lite, which keeps nothing, or fewer clients '
        '(--top_k_users), fewer items (--k_core), a smaller --hidden_dim')


def round_key(seed: int, round_number: int) -> jax.Array:
  """Key of a round (1-based); a client's is fold_in(round_key, client)."""
  return jax.random.fold_in(jax.random.key(seed), round_number)


def warm_key(seed: int) -> jax.Array:
  """Key of `warm_memories`; rounds never get so far."""
  return jax.random.fold_in(jax.random.key(seed), 2 ** 32 - 1)


def cohort_size(config: RunConfig, num_clients: int) -> int:
  """C: client_fraction · K, at least one."""
  return max(1, round(config.server.client_fraction * num_clients))


def sample_cohort(config: RunConfig, round_number: int,
                  num_train: np.ndarray) -> np.ndarray:
  """Draws the clients of a round, without replacement.

  Args:
    config: seed, client fraction and chunk size.
    round_number: 1-based.
    num_train: [K] training items of each client.

  Returns:
    [G, C/G] int32 clients, longest first; PADDING_CLIENT fills the last chunk.
  """
  size = cohort_size(config, len(num_train))
  rng = generator(config.seed, Stream.COHORT, round_number)
  return chunked(rng.choice(len(num_train), size, replace=False), num_train,
                 config.server.clients_per_chunk)


def chunked(clients: np.ndarray, num_train: np.ndarray,
            per_chunk: int) -> np.ndarray:
  """[G, per_chunk] int32: clients of similar length side by side.

  Longest first, ties by number: the order they come in does not matter.
  """
  order = np.lexsort((clients, -num_train[clients]))
  return in_chunks(clients[order], per_chunk)


def in_chunks(clients: np.ndarray, per_chunk: int) -> np.ndarray:
  """[G, ≤ per_chunk] int32 in the given order; PADDING_CLIENT fills the last."""
  # Every shard gets some.
  per_chunk = min(per_chunk, -(-len(clients) // devices.num_shards()))
  padded = np.pad(clients, (0, -len(clients) % per_chunk),
                  constant_values=PADDING_CLIENT)
  return padded.astype(np.int32).reshape(-1, per_chunk)


def executed_steps(cohort: np.ndarray, num_train: np.ndarray,
                   config: RunConfig) -> int:
  """Local steps of an epoch over a cohort [G, C/G], masked ones included."""
  longest = windows.num_steps(
      _num_train(cohort, num_train), config).max(axis=1)
  return int(longest.sum()) * cohort.shape[1]


def masked_fraction(cohort: np.ndarray, num_train: np.ndarray,
                    config: RunConfig) -> float:
  """Share of a round's executed window slots that train nothing; 0 of none."""
  stride = windows.window_stride(config.client, config.model.max_seq_len)
  own = _num_train(cohort, num_train)
  own_slots = windows.num_steps(own, config) * config.client.batch_size
  used = np.minimum(windows.num_windows(own, stride), own_slots).sum()
  slots = executed_steps(cohort, num_train, config) * config.client.batch_size
  return float(1 - used / slots) if slots else 0.0


def _num_train(cohort, num_train):
  """[G, C/G] training items; 0 for padding clients."""
  return np.where(cohort >= 0, num_train[cohort], 0)


def run_round(model: FedDMMR, config: RunConfig, max_items: int,
              state: FederationState, cohort: np.ndarray, key: jax.Array,
              catalogue: Catalogue, data: FederatedData
              ) -> tuple[FederationState, dict[str, Mean]]:
  """One round of federated learning.

  Args:
    model: the architecture.
    config: static settings.
    max_items: H, the longest client's number of interactions.
    state: before the round; donated.
    cohort: [G, C/G] int32 distinct clients, PADDING_CLIENT where none.
    key: the round's key, see `round_key`.
    catalogue: item features.
    data: all clients' data, of which each client sees its own.

  Returns:
    The state after the round and the training metrics of the cohort.
  """
  shards = devices.deal(cohort)
  results = devices.run(train_shard, (model, config, max_items), shards,
                        state, key, catalogue, data)
  return finish_round(config, state, shards, results, data.num_train)


def run_round_of_seeds(
    model: FedDMMR, config: RunConfig, max_items: int, states: FederationState,
    cohorts: np.ndarray, keys: jax.Array, catalogue: Catalogue,
    data: FederatedData) -> tuple[FederationState, dict[str, Mean]]:
  """One round of several runs that differ in their seed, side by side.

  Args:
    As `run_round`, with a leading axis, the seeds, on the states (donated),
    the cohorts and the keys, and on what it returns.
  """
  shards = devices.deal(cohorts)
  results = devices.run(train_shard_of_seeds, (model, config, max_items),
                        shards, states, keys, catalogue, data)
  return finish_round_of_seeds(config, states, shards, results, data.num_train)


_STATIC = ('model', 'config', 'max_items')


@partial(devices.jit, static_argnames=_STATIC)
def train_shard(model: FedDMMR, config: RunConfig, max_items: int,
                chunks: jax.Array, state: FederationState, key: jax.Array,
                catalogue: Catalogue, data: FederatedData):
  """Trains the clients of some chunks [g, C/G].

  Returns:
    ((their `Upload`, their metrics), what each of them keeps or sends one by
    one, [g, C/G, …]: memory, control variate, prototypes).
  """
  return _train_chunks(model, config, max_items, None, catalogue, data, chunks,
                       state, key)


@partial(devices.jit, static_argnames=_STATIC)
def train_shard_of_seeds(
    model: FedDMMR, config: RunConfig, max_items: int, chunks: jax.Array,
    states: FederationState, keys: jax.Array, catalogue: Catalogue,
    data: FederatedData):
  """`train_shard` with a leading axis, the seeds, on chunks, states, keys and
  results."""
  return jax.vmap(
      partial(_train_chunks, model, config, max_items, 'seed', catalogue, data),
      axis_name='seed')(chunks, states, keys)


def _train_chunks(model, config, max_items, seed_axis, catalogue, data, chunks,
                  state, key):
  broadcast = state.server.broadcast(catalogue, config)

  def train_chunk(sums, clients):
    upload, metrics = sums
    views, max_steps = chunk_views(data, clients, max_items, config)
    if seed_axis:
      # One trip count for all seeds: each with its own, a loop has to select
      # between old and new parameters in every step.
      max_steps = jax.lax.pmax(max_steps, seed_axis)
    updates = jax.vmap(
        lambda view, memory, control, client: client_lib.local_update(
            model, config, broadcast, view, memory, control,
            jax.random.fold_in(key, client), max_steps)
    )(views, memory_lib.fetch(state.memories, clients),
      memory_lib.fetch(state.controls, clients), clients)
    chunk_metrics = jax.tree.map(lambda x: jnp.sum(x, 0), updates.metrics)
    return ((add_updates(upload, updates, config),
             metrics_lib.merge(metrics, chunk_metrics)),
            (updates.memory, updates.own_control, updates.prototypes))

  no_metrics = client_lib.empty_metrics() | {
      'memory_fill': metrics_lib.EMPTY, 'memory_age': metrics_lib.EMPTY}
  nothing = (no_upload(state.server, config),
             jax.tree.map(jnp.asarray, no_metrics))
  return jax.lax.scan(train_chunk, nothing, chunks)


@partial(devices.jit, static_argnames='config', donate_argnames='state')
def finish_round(config: RunConfig, state: FederationState, shards: jax.Array,
                 results: list, num_train: jax.Array
                 ) -> tuple[FederationState, dict[str, Mean]]:
  """The server's part of a round.

  Args:
    config: static settings.
    state: before the round; donated.
    shards: [n, g, C/G] int32 whom each shard trained.
    results: of `train_shard`, one a shard.
    num_train: [K] int32 training items of all clients.

  Returns:
    As `run_round`.
  """
  return _finish(config, num_train, state, shards, results)


@partial(devices.jit, static_argnames='config', donate_argnames='states')
def finish_round_of_seeds(
    config: RunConfig, states: FederationState, shards: jax.Array,
    results: list, num_train: jax.Array
    ) -> tuple[FederationState, dict[str, Mean]]:
  """`finish_round` with a leading axis, the seeds, on states and results;
  shards are [n, seeds, g, C/G]."""
  return jax.vmap(partial(_finish, config, num_train), in_axes=(0, 1, 0))(
      states, shards, results)


def _finish(config, num_train, state, shards, results):
  # In the order of the shards, whoever was done first: the same bits.
  upload, metrics = results[0][0]
  for (more, more_metrics), _ in results[1:]:
    upload = jax.tree.map(jnp.add, upload, more)
    metrics = metrics_lib.merge(metrics, more_metrics)
  memories, controls, uploaded = jax.tree.map(
      lambda *x: jnp.concatenate(x), *[each for _, each in results])
  cohort = shards.reshape(-1, shards.shape[-1])
  all_weights = windows.num_positives(num_train, config)
  server = server_lib.aggregate(
      state.server, upload, jnp.sum(all_weights).astype(jnp.float32), uploaded,
      config)
  return devices.kept_everywhere(FederationState(
      server, memory_lib.store(state.memories, cohort, memories),
      memory_lib.store(state.controls, cohort, controls))), metrics


def check_finite_state(state: FederationState, round_number: int,
                       saved: str = '') -> None:
  """Raises UserError if the training diverged.

  Args:
    state: after the round, of one seed or several.
    round_number: 1-based.
    saved: which round is left, if the rounds are saved.
  """
  if not jax.device_get(_all_finite(state.server)):
    raise UserError(
        f'round {round_number}: parameters are NaN or infinite, the training '
        f'diverged{saved and f" ({saved})"}; start anew with a lower '
        '--client_learning_rate or --server_learning_rate')


@jax.jit
def _all_finite(tree) -> jax.Array:
  """[] bool: is no parameter and no moment NaN or infinite?"""
  return jnp.all(jnp.stack(
      [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def chunk_views(data: FederatedData, clients: jax.Array, max_items: int,
                config: RunConfig) -> tuple[ClientData, jax.Array]:
  """The data of a chunk's clients [C/G], and how many local steps the longest
  of them needs, [] int32."""
  views = jax.vmap(lambda client: client_view(data, client, max_items))(clients)
  return views, jnp.max(windows.num_steps(views.num_train, config))


def no_upload(server: ServerState, config: RunConfig) -> Upload:
  """What nobody sent: where `add_updates` starts."""
  nothing = jax.tree.map(jnp.zeros_like, server.params)
  return Upload(
      delta=nothing, weight=jnp.zeros(()), steps=jnp.zeros(()),
      control=nothing if optimizers.needs_gradient(config.client) else None)


def add_updates(upload: Upload, updates: ClientUpdate,
                config: RunConfig) -> Upload:
  """Adds the updates of a chunk, [C/G] clients.

  Weights are counts in float32: exact up to 2^24 = 16.8 million positives a
  round. Beyond it each addition is off by 6e-8 of the sum at most, a thousand
  chunks by 6e-5: as if the server's learning rate were.
  """
  weight = updates.weight

  def add(total, weights, part):
    if total is None:
      return None
    return vocabulary.add_weighted(
        total, weights, updates.vocabulary.ids, part)

  delta_weight = (weight / updates.steps
                  if config.server.averaging == 'fednova' else weight)
  return Upload(delta=add(upload.delta, delta_weight, updates.delta),
                control=add(upload.control, weight, updates.control),
                weight=upload.weight + jnp.sum(weight),
                steps=upload.steps + jnp.sum(weight * updates.steps))


def warm_memories(model: FedDMMR, config: RunConfig, max_items: int,
                  state: FederationState, clients: np.ndarray, key: jax.Array,
                  catalogue: Catalogue, data: FederatedData) -> Memory:
  """Memories with those of never-sampled clients filled (`--warm_memory`).

  Args:
    As `run_round`, with all clients to look at in `clients` [G, C/G].

  Returns:
    The memories of all clients; those sampled before are unchanged.
  """
  config = dataclasses.replace(config, client=dataclasses.replace(
      config.client, max_local_steps=0))  # all of the history
  shards = devices.deal(clients)
  results = devices.run(fill_shard, (model, config, max_items), shards,
                        state, key, catalogue, data)
  return _store_filled(state.memories, shards, [each for _, each in results])


@partial(devices.jit, static_argnames=_STATIC)
def fill_shard(model: FedDMMR, config: RunConfig, max_items: int,
               chunks: jax.Array, state: FederationState, key: jax.Array,
               catalogue: Catalogue, data: FederatedData
               ) -> tuple[None, Memory]:
  """(None, the filled memories [g, C/G] of some chunks' clients)."""
  broadcast = state.server.broadcast(catalogue, config)

  def fill_chunk(clients):
    views, max_steps = chunk_views(data, clients, max_items, config)
    return jax.vmap(
        lambda view, memory, client: client_lib.fill_memory(
            model, config, broadcast, view, memory,
            jax.random.fold_in(key, client), max_steps)
    )(views, memory_lib.fetch(state.memories, clients), clients)

  return None, jax.lax.map(fill_chunk, chunks)


@jax.jit
def _store_filled(memories, shards, filled):
  filled = jax.tree.map(lambda *x: jnp.concatenate(x), *filled)
  return memory_lib.store(
      memories, shards.reshape(-1, shards.shape[-1]), filled)
