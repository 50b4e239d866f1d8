"""The federated round, jit-compiled: the only place that vmaps over clients.

A cohort of C clients comes as chunks [G, C/G], dealt into shards (`devices`).
A shard is one jitted program, which scans its chunks with a running weighted
sum of the deltas, so memory does not grow with the cohort (except for what each
client keeps or sends individually: its memory and prototypes, 9 kB, and
SCAFFOLD's control variate). Inside a chunk the clients are vmapped. A second
program adds the shards' sums and takes the server step. All clients of a chunk
run as many steps as the longest one needs. This number is traced, so one
compilation serves every cohort. Sorting the cohort by length keeps masked steps
few.
"""

import dataclasses
from functools import partial
from typing import Any, Mapping, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax.client import memory as memory_lib
from fedmmr_jax.client import personal as personal_lib
from fedmmr_jax.client import update as client_lib
from fedmmr_jax.client import vocabulary, windows
from fedmmr_jax.client.drift import Cohort
from fedmmr_jax.client.memory import Memory
from fedmmr_jax.client.prototypes import Prototypes
from fedmmr_jax.client.scoring import Params
from fedmmr_jax.client.update import ClientProgram, ClientUpdate
from fedmmr_jax.config import ContentInit, ContentPlusId, RunConfig
from fedmmr_jax.data.dataset import (
  client_view,
  ClientData,
  FederatedData,
  taking_part,
)
from fedmmr_jax.errors import UserError
from fedmmr_jax.federation import cohorts, devices
from fedmmr_jax.federation import server as server_lib
from fedmmr_jax.federation import transforms as transforms_lib
from fedmmr_jax.federation.aggregators import add_weighted, Aggregator
from fedmmr_jax.federation.devices import PADDING_CLIENT
from fedmmr_jax.federation.failures import Fate
from fedmmr_jax.federation.server import ServerState, Upload
from fedmmr_jax.federation.transforms import Sender, Transforms
from fedmmr_jax.metrics import Mean
from fedmmr_jax.models import content
from fedmmr_jax.models.experts import TEXT
from fedmmr_jax.models.feddmmr import Catalogue

# More than this, and what drift control or personal parts keep at the clients
# is refused, and the seeds of an ablation run one after another. A round and
# its saving hold copies besides.
MOST_STATE_BYTES = 4_000_000_000

# Of a round's updates, rejected: then it is the training that went wrong.
NEARLY_ALL = 0.9

_SEEDS = 'seed'  # the axis of runs side by side


@dataclasses.dataclass(frozen=True)
class RoundProgram:
  """The static parts of a round, hashed and compared by value.

  Attributes:
    client: the program of every client of a cohort.
    aggregator: how their updates are combined.
    max_items: H, the longest client's number of interactions.
    transforms: what an update passes on its way to the aggregator.
    of_seeds: whether several seeds run in parallel: states, keys, cohorts and
      results of a round then have a leading axis, the seeds.
  """

  client: ClientProgram
  aggregator: Aggregator
  max_items: int
  transforms: Transforms = ()
  of_seeds: bool = False

  @property
  def config(self) -> RunConfig:
    return self.client.config


class FederationState(NamedTuple):
  """Everything a round changes.

  Attributes:
    server: the server's state.
    memories: memory of each client, leading axis [K]; None in a model without
      experts, since only they read it.
    controls: drift-control state of each client, leading axis [K]; None
      without one.
    transforms: of each transform, what every client keeps, leading axis [K].
    personal: parameters of each client that never leave it, leading axis [K];
      None without `personal`.
  """

  server: ServerState
  memories: Memory | None
  controls: Any = None
  transforms: tuple[Any, ...] = ()
  personal: Any = None


def init(
  program: RoundProgram, catalogue: Catalogue, seed: int, num_clients: int
) -> FederationState:
  """State before round 1, drawn from the seed."""
  model, config = program.client.model, program.config
  key = jax.random.fold_in(jax.random.key(seed), 0)
  params = jax.jit(partial(model.init, method='initialise'))(key, catalogue)[
    'params'
  ]
  # A weakly typed parameter (a Python number times `arange`, in a part of
  # anybody's) would have the second round compile once more.
  params = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), params)
  start = config.model.item_embedding
  if isinstance(start, ContentInit):
    # The model's parameters are drawn from what Flax derives of the key and
    # their names, so that the key itself is drawn from here alone. (To derive
    # another would be cleaner, and another table for every seed.)
    params[vocabulary.ITEM_TABLE] = content.initial_table(
      key,
      catalogue.content,
      config.model.embedding_init_std,
      plus_id=isinstance(start, ContentPlusId),
      row_noise=getattr(start, 'row_noise', content.NOISE),
    )
  server = server_lib.init(
    params,
    config,
    catalogue.features[TEXT].shape[-1] if config.global_memory else 0,
    program.aggregator,
    program.client.drift,
    program.transforms,
    key,
  )

  def for_each(tree):
    return jax.tree.map(
      lambda x: jnp.broadcast_to(x, (num_clients, *x.shape)).copy(), tree
    )

  return FederationState(
    server=server,
    memories=for_each(
      None if model.is_backbone_only else memory_lib.init(config.memory)
    ),
    controls=for_each(program.client.drift.client_state(params)),
    transforms=transforms_lib.init_clients(
      program.transforms, params, key, num_clients
    ),
    personal=personal_lib.of_each(
      params, config.federation.personal_groups, num_clients
    ),
  )


def state_bytes(state: FederationState | Params) -> int:
  """Bytes of a state, of a part of it, or of a tree with the same shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def check_size(state: FederationState) -> None:
  """Raises UserError if the clients' drift-control state (SCAFFOLD: one set of
  parameters per client) or their personal parameters are larger than a machine
  should hold.

  Args:
    state: the state of all clients, or a tree with the same shapes.
  """
  bytes_ = state_bytes(state.controls)
  if bytes_ > MOST_STATE_BYTES:
    clients = len(jax.tree.leaves(state.controls)[0])
    numbers = sum(x.size for x in jax.tree.leaves(state.server.params))
    raise UserError(
      f'drift control keeps {bytes_ // clients:,} bytes for each of '
      f'{clients:,} clients, {bytes_:,} in all, more than the '
      f'{MOST_STATE_BYTES:,} allowed (the model has {numbers:,} numbers); take '
      '`drift_control=mime_lite`, which keeps nothing, or fewer clients '
      '(`top_k_users`), fewer items (`k_core`), a smaller `hidden_dim`'
    )
  bytes_ = state_bytes(state.personal)
  if bytes_ > MOST_STATE_BYTES:
    clients = len(jax.tree.leaves(state.personal)[0])
    raise UserError(
      f'`personal` keeps {bytes_ // clients:,} bytes for each of {clients:,} '
      f'clients, {bytes_:,} in all, more than the {MOST_STATE_BYTES:,} '
      'allowed; keep smaller parts (`personal=router`), or take fewer clients '
      '(`top_k_users`), fewer items (`k_core`), a smaller `hidden_dim`'
    )


def collected_bytes(
  program: RoundProgram,
  state: FederationState,
  data: FederatedData,
  cohort: int,
) -> int:
  """Bytes of what the aggregator collects of a cohort.

  Args:
    program: the static parts of the round.
    state: a state, or a tree with the same shapes.
    data: all clients' data.
    cohort: clients of a round.
  """

  def collect(params, memory, client):
    view = client_view(data, client, program.max_items)
    own = client_lib.round_vocabulary(
      program.client.model, program.config, view, jax.random.key(0)
    )
    update = ClientUpdate(
      delta=vocabulary.take(params, own.ids),
      control=None,
      vocabulary=own,
      weight=jnp.zeros(()),
      steps=jnp.zeros(()),
      memory=memory,
      kept=None,
      prototypes=None,
      metrics={},
      counts=jnp.ones((), bool),
    )
    return program.aggregator.collect(jax.tree.map(lambda x: x[None], update))

  memory = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state.memories
  )
  each = jax.eval_shape(collect, state.server.params, memory, jnp.int32(0))
  return cohort * state_bytes(each)


def check_collected(
  program: RoundProgram,
  state: FederationState,
  data: FederatedData,
  cohort: int,
) -> None:
  """Raises UserError if the aggregator would collect more than a machine should
  hold; arguments as for `collected_bytes`."""
  bytes_ = collected_bytes(program, state, data, cohort)
  if bytes_ > MOST_STATE_BYTES:
    raise UserError(
      f'`aggregator`: it collects {bytes_ // cohort:,} bytes of each of '
      f'{cohort:,} clients, {bytes_:,} in all, more than the '
      f'{MOST_STATE_BYTES:,} allowed; take `aggregator=norm_bound`, which '
      'collects nothing, or smaller cohorts (`client_fraction`), fewer rows '
      '(`vocabulary=local`, `num_negatives`), a smaller `hidden_dim`'
    )


def round_key(seed: int, round_number: int) -> jax.Array:
  """Key of a round (1-based); a client's is fold_in(round_key, client)."""
  return jax.random.fold_in(jax.random.key(seed), round_number)


def sample_cohort(
  config: RunConfig,
  round_number: int,
  num_train: np.ndarray,
  there: np.ndarray | None = None,
) -> np.ndarray:
  """Draws the clients of a round, see `cohorts`.

  Args:
    config: seed, sampling, client fraction and chunk size.
    round_number: 1-based.
    num_train: [K] training items of each client.
    there: [K] bool, who can be asked in this round; None = everybody.

  Returns:
    [G, C/G] int32 clients, longest first; PADDING_CLIENT fills the rest.
  """
  takes_part = taking_part(num_train, config.data.new_clients)
  return chunked(
    cohorts.draw(
      config,
      round_number,
      takes_part,
      None if there is None else there[takes_part],
    ),
    num_train,
    config.server.clients_per_chunk,
    cohorts.most(config, len(takes_part)),
  )


def chunked(
  clients: np.ndarray, num_train: np.ndarray, per_chunk: int, room: int = 0
) -> np.ndarray:
  """[G, per_chunk] int32: clients of similar length in the same chunk, and
  room for so many clients in all.

  Longest first, ties by number, so the order of the input does not matter. As
  many chunks as `size` clients fill, by default these.
  """
  order = np.lexsort((clients, -num_train[clients]))
  empty = np.full(max(0, room - len(clients)), PADDING_CLIENT)
  return in_chunks(np.concatenate([clients[order], empty]), per_chunk)


def in_chunks(clients: np.ndarray, per_chunk: int) -> np.ndarray:
  """[G, ≤ per_chunk] int32, in order; PADDING_CLIENT fills the last."""
  # Every shard gets some.
  per_chunk = min(per_chunk, -(-len(clients) // devices.num_shards()))
  padded = np.pad(
    clients, (0, -len(clients) % per_chunk), constant_values=PADDING_CLIENT
  )
  return padded.astype(np.int32).reshape(-1, per_chunk)


def executed_steps(
  cohort: np.ndarray, num_train: np.ndarray, config: RunConfig
) -> int:
  """Local steps of an epoch over a cohort [G, C/G], including masked ones."""
  longest = windows.num_steps(_num_train(cohort, num_train), config).max(axis=1)
  return int(longest.sum()) * cohort.shape[1]


def masked_fraction(
  cohort: np.ndarray, num_train: np.ndarray, config: RunConfig
) -> float:
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


def run_round(
  program: RoundProgram,
  state: FederationState,
  cohort: np.ndarray,
  key: jax.Array,
  catalogue: Catalogue,
  data: FederatedData,
  fates: Fate | None = None,
) -> tuple[FederationState, dict[str, Mean]]:
  """One round of federated learning.

  Args:
    program: the static parts of the round.
    state: before the round; donated.
    cohort: [G, C/G] int32 distinct clients, PADDING_CLIENT where none.
    key: the round's key, see `round_key`.
    catalogue: item features.
    data: all clients' data; each client sees only its own.
    fates: what is done to the clients' updates, [K] each; None if nobody fails.

  Returns:
    The state after the round and the training metrics of the cohort.
  """
  shards = devices.deal(cohort)
  sums, each = devices.run(
    train_shard,
    (program,),
    shards,
    state,
    key,
    catalogue,
    data,
    fates,
    merge=merge_shards,
  )
  return finish_round(
    program,
    state,
    shards,
    key,
    sums,
    each,
    jnp.where(data.takes_part, data.num_train, 0),
    data.takes_part,
  )


class Kept(NamedTuple):
  """What each client keeps or sends individually, with leading axes [g, C/G].

  Attributes:
    memory: its memory, or None.
    control: its drift-control state, or None.
    transforms: its state of each transform.
    prototypes: its prototypes, or None.
    collected: what the aggregator collects, or None.
    personal: its own parameters, or None.
  """

  memory: Memory | None
  control: Any
  transforms: tuple[Any, ...]
  prototypes: Prototypes | None
  collected: Any
  personal: Any


@partial(devices.jit, static_argnames='program')
def train_shard(
  program: RoundProgram,
  chunks: jax.Array,
  state: FederationState,
  key: jax.Array,
  catalogue: Catalogue,
  data: FederatedData,
  fates: Fate | None = None,
) -> tuple[tuple[Upload, dict[str, Mean]], Kept]:
  """Trains the clients of some chunks [g, C/G].

  Returns:
    ((what they sent, their metrics), `Kept` of each client).
  """
  train = partial(_train_chunks, program, catalogue, data)
  if program.of_seeds:
    train = jax.vmap(train, axis_name=_SEEDS)
  return train(chunks, state, key, fates)


def _train_chunks(program, catalogue, data, chunks, state, key, fates):
  broadcast = state.server.broadcast(
    catalogue, program.config, program.client.drift
  )
  broadcast = broadcast._replace(
    params=transforms_lib.send(program.transforms, broadcast.params)
  )
  told = transforms_lib.broadcast(
    program.transforms, state.server.transforms, broadcast.params
  )

  def train_chunk(sums, clients):
    upload, metrics = sums
    views, max_steps = chunk_views(program, data, clients)
    if program.of_seeds:
      # One trip count for all seeds: each with its own, a loop has to select
      # between old and new parameters in every step.
      max_steps = jax.lax.pmax(max_steps, _SEEDS)

    def train_client(view, memory, control, kept, personal, client, fate):
      own_key = jax.random.fold_in(key, client)
      sender = Sender(client, own_key, broadcast.params, told, catalogue, fate)
      update = client_lib.local_update(
        program.client,
        broadcast,
        transforms_lib.prepare(program.transforms, view, kept, sender),
        memory,
        control,
        own_key,
        max_steps,
        None if fate is None else fate.work,
        personal,
      )
      update, after = transforms_lib.apply(
        program.transforms, update, kept, sender
      )
      # A client goes on from its last training that counted, as a node does
      # (deploy/node.py): its control variate and the server's fit together.
      memory, control, kept, personal = jax.tree.map(
        lambda new, old: jnp.where(update.counts, new, old),
        (update.memory, update.kept, after, update.personal),
        (memory, control, kept, personal),
      )
      update = update._replace(memory=memory, kept=control, personal=personal)
      return update, kept

    updates, kept = jax.vmap(train_client)(
      views,
      memory_lib.fetch(state.memories, clients),
      memory_lib.fetch(state.controls, clients),
      memory_lib.fetch(state.transforms, clients),
      memory_lib.fetch(state.personal, clients),
      clients,
      memory_lib.fetch(fates, clients),
    )
    chunk_metrics = jax.tree.map(lambda x: jnp.sum(x, 0), updates.metrics)
    return (
      (
        add_updates(program.aggregator, upload, updates, clients),
        metrics_lib.merge(metrics, chunk_metrics),
      ),
      Kept(
        updates.memory,
        updates.kept,
        kept,
        updates.prototypes,
        program.aggregator.collect(updates),
        updates.personal,
      ),
    )

  no_metrics = (
    client_lib.empty_metrics(program.client.model)
    | client_lib.no_client_metrics()
    | transforms_lib.no_metrics(program.transforms)
  )
  nothing = (
    no_upload(program, state.server.params),
    jax.tree.map(jnp.asarray, no_metrics),
  )
  return jax.lax.scan(train_chunk, nothing, chunks)


@partial(devices.jit, static_argnames='program', donate_argnames='one')
def merge_shards(
  program: RoundProgram,
  one: tuple[Upload, dict[str, Mean]],
  other: tuple[Upload, dict[str, Mean]],
) -> tuple[Upload, dict[str, Mean]]:
  """Adds the sums of two shards, or of those so far and the next; the first are
  donated."""
  merge = partial(_merge, program)
  return (jax.vmap(merge) if program.of_seeds else merge)(one, other)


def _merge(program, one, other):
  (upload, metrics), (more, more_metrics) = one, other
  return Upload(
    program.aggregator.merge(upload.total, more.total),
    *jax.tree.map(jnp.add, upload[1:], more[1:]),
  ), metrics_lib.merge(metrics, more_metrics)


@partial(devices.jit, static_argnames='program', donate_argnames='state')
def finish_round(
  program: RoundProgram,
  state: FederationState,
  shards: jax.Array,
  key: jax.Array,
  sums: tuple[Upload, dict[str, Mean]],
  each: list[Kept],
  num_train: jax.Array,
  takes_part: jax.Array,
) -> tuple[FederationState, dict[str, Mean]]:
  """The server's part of a round.

  Args:
    program: the static parts of the round.
    state: before the round; donated.
    shards: [n, g, C/G] int32 clients that each shard trained; with several
      seeds [n, seeds, g, C/G].
    key: the round's.
    sums: of all shards, see `train_shard`.
    each: `Kept` of each shard's clients.
    num_train: [K] int32 training items of all clients that take part.
    takes_part: [K] bool, which they are.

  Returns:
    As for `run_round`.
  """
  finish = partial(_finish, program, num_train, takes_part)
  if program.of_seeds:
    finish = jax.vmap(finish, in_axes=(0, 1, 0, 0, 0))
  return finish(state, shards, key, sums, each)


def _finish(program, num_train, takes_part, state, shards, key, sums, each):
  upload, metrics = sums
  kept = jax.tree.map(lambda *x: jnp.concatenate(x), *each)
  cohort = shards.reshape(-1, shards.shape[-1])
  all_weights = windows.num_positives(num_train, program.config)
  everybody = Cohort(
    upload.weight,
    jnp.sum(all_weights).astype(jnp.float32),
    upload.size,
    jnp.sum(takes_part).astype(jnp.float32),
  )
  collected = jax.tree.map(
    lambda x: x.reshape(-1, *x.shape[2:]), kept.collected
  )
  server = server_lib.aggregate(
    state.server,
    upload,
    collected,
    kept.prototypes,
    everybody,
    program.config,
    program.aggregator,
    program.client.drift,
    program.transforms,
  )
  metrics = metrics | {metrics_lib.ANSWERED: Mean(upload.size, jnp.zeros(()))}
  told = transforms_lib.server_step(
    program.transforms, state.server.transforms, metrics, key
  )
  enough = server_lib.enough(everybody, program.config)
  if enough is not None:
    # As nobody's answer counts, everybody keeps what it had.
    cohort = jnp.where(enough, cohort, PADDING_CLIENT)
    told = jax.tree.map(
      lambda new, old: jnp.where(enough, new, old),
      told,
      state.server.transforms,
    )
  server = server._replace(transforms=told)
  return devices.kept_everywhere(
    FederationState(
      server,
      memory_lib.store(state.memories, cohort, kept.memory),
      memory_lib.store(state.controls, cohort, kept.control),
      memory_lib.store(state.transforms, cohort, kept.transforms),
      memory_lib.store(state.personal, cohort, kept.personal),
    )
  ), transforms_lib.shown(program.transforms, metrics)


def check_finite_state(
  state: FederationState, round_number: int, saved: str = ''
) -> None:
  """Raises UserError if the training diverged.

  Args:
    state: after the round, of one seed or several.
    round_number: 1-based.
    saved: the last good round, if rounds are saved.
  """
  if not jax.device_get(_all_finite(state.server)):
    raise _diverged(round_number, 'parameters are NaN or infinite', saved)


def check_accepted(
  config: RunConfig,
  train: Mapping[str, Any],
  round_number: int,
  saved: str = '',
) -> None:
  """Raises UserError if the training diverged at the clients: the server had to
  reject (nearly) all updates, which leave it as it is, round after round.

  Args:
    config: where attacks or failures are simulated, nothing is concluded.
    train: the round's finished metrics.
    round_number: 1-based.
    saved: the last good round, if rounds are saved.
  """
  simulated = config.federation
  if simulated.attack != 'none' or simulated.failures != 'none':
    return
  rejected = sum(train.get(name, 0) for name in metrics_lib.REJECTED)
  came = rejected + train.get(metrics_lib.ANSWERED, 0)
  # Without a loss, those that are left are clients with nothing to train on.
  if rejected and (
    rejected >= NEARLY_ALL * came or train[metrics_lib.LOSS] is None
  ):
    raise _diverged(
      round_number,
      f'{rejected} of {came} updates are NaN, infinite or absurdly long',
      saved,
    )


def _diverged(round_number: int, sign: str, saved: str) -> UserError:
  return UserError(
    f'round {round_number}: {sign}, the training diverged'
    f'{saved and f" ({saved})"}; start anew with a lower '
    '`client_learning_rate` or `server_learning_rate`'
  )


@jax.jit
def _all_finite(tree) -> jax.Array:
  """[] bool: are all parameters and moments finite?"""
  return jnp.all(
    jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)])
  )


def chunk_views(
  program: RoundProgram, data: FederatedData, clients: jax.Array
) -> tuple[ClientData, jax.Array]:
  """The data of a chunk's clients [C/G], and the number of local steps that the
  longest of them needs, [] int32."""
  views = jax.vmap(lambda client: client_view(data, client, program.max_items))(
    clients
  )
  return views, jnp.max(windows.num_steps(views.num_train, program.config))


def no_upload(program: RoundProgram, params: Params) -> Upload:
  """The upload of no clients, where `add_updates` starts."""
  control = program.client.drift.no_upload(params)
  return Upload(
    total=program.aggregator.zero(params),
    control=control,
    weight=jnp.zeros(()),
    size=jnp.zeros(()),
  )


def add_updates(
  aggregator: Aggregator,
  upload: Upload,
  updates: ClientUpdate,
  clients: jax.Array,
) -> Upload:
  """Adds the updates of a chunk, [C/G] clients, PADDING_CLIENT where none.

  Weights are counts in float32, exact up to 2^24 = 16.8 million positives a
  round. Beyond that, each addition is off by at most 6e-8 of the sum, and a
  thousand chunks by 6e-5, like a change of the server's learning rate by that
  much.
  """
  control = upload.control
  if control is not None:
    control = add_weighted(control, updates.weight, updates, updates.control)
  return Upload(
    total=aggregator.add(upload.total, updates),
    control=control,
    weight=upload.weight + jnp.sum(updates.weight),
    size=upload.size + jnp.sum((clients >= 0) & updates.counts),
  )
