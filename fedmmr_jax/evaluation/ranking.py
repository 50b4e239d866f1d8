"""Ranking of held-out items, full and sampled, from the same scores.

A tie counts against the target. A NaN score would make every comparison false
and look like rank 0, a perfect hit; it is counted and raises an error instead.
"""

from functools import partial
from typing import Any, Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax.client import memory as memory_lib
from fedmmr_jax.client import personal as personal_lib
from fedmmr_jax.client import profile as profile_lib
from fedmmr_jax.client import view as view_lib
from fedmmr_jax.client.memory import Memory
from fedmmr_jax.client.update import Broadcast
from fedmmr_jax.config import RunConfig
from fedmmr_jax.data.dataset import (
  client_view,
  ClientData,
  Dataset,
  FederatedData,
  old_clients,
)
from fedmmr_jax.errors import UserError
from fedmmr_jax.federation import devices
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.federation.server import ServerState
from fedmmr_jax.metrics import Metric
from fedmmr_jax.models.experts import MemoryView
from fedmmr_jax.models.feddmmr import Catalogue, FedDMMR
from fedmmr_jax.models.profile import last, States
from fedmmr_jax.streams import generator, Stream

# Each has sampled negatives of its own, in this order.
SPLITS = {'val': 0, 'test': 1}
# What a target is ranked after.
ALL, TRAIN = 'all', 'train'


class Targets(NamedTuple):
  """Items to rank, each of one client; a client may have several.

  Attributes:
    client: [n] int32, ascending.
    after_train: [n] int32 how many held-out items lie before each.
    known: [n] int32 how many of these its client may know of.
    split: a key of SPLITS.
  """

  client: np.ndarray
  after_train: np.ndarray
  known: np.ndarray
  split: str

  @classmethod
  def of(cls, dataset: Dataset, split: str, history: str = ALL) -> 'Targets':
    """All targets of a split.

    Args:
      dataset: the clients.
      split: a key of SPLITS.
      history: what they are ranked after; 'all': everything before them;
        'train': the training items, at the test those for validation too.
    """
    client, after_train = dataset.targets(split == 'test')
    known = after_train
    if history == TRAIN:
      before = dataset.num_validation * (split == 'test')
      known = np.minimum(after_train, before[client])
      some = dataset.num_train[client] + known > 0
      client, after_train, known = client[some], after_train[some], known[some]
    return cls(client, after_train, known, split)

  def where(self, chosen: np.ndarray) -> 'Targets':
    """Some of them, by a mask [n]."""
    return Targets(
      self.client[chosen],
      self.after_train[chosen],
      self.known[chosen],
      self.split,
    )

  def of_clients(self, clients: np.ndarray) -> 'Targets':
    """Those of some clients."""
    return self.where(np.isin(self.client, clients))


class Ranks(NamedTuple):
  """Ranks of the targets of one split.

  Attributes:
    full: [n] int32 number of catalogue items, not consumed or disliked by the
      client before the target, that score at least as high.
    sampled: [n] int32 number of sampled negatives that score at least as high.
    bad_scores: [n] int32 number of scores that are not finite.
    popular: [n] int32 as `sampled`, for negatives drawn by popularity; 0 if
      none were drawn (`Simulation.with_popular_negatives`).
    aimed: [n] int32 as `full`, of the item that an attack promotes, which the
      target is ranked against too; −1 where its client consumed it before, or
      without an attack.
  """

  full: jax.Array
  sampled: jax.Array
  bad_scores: jax.Array
  popular: jax.Array | int = 0
  aimed: jax.Array | int = -1


def score_catalogue(
  model: FedDMMR,
  config: RunConfig,
  broadcast: Broadcast,
  window: jax.Array,
  memory: Memory | None,
  earlier: jax.Array | None = None,
) -> jax.Array:
  """[V] scores of all items for one client's window [L] and its memory; the
  `earlier` items ([H] int32, 0 = none) make its profile.

  The catalogue is scored in blocks, so that intermediate values never exist for
  all items at once.
  """
  apply: Callable[..., Any] = partial(model.apply, {'params': broadcast.params})
  profile = None
  if earlier is not None:
    profile = profile_of(model, config, broadcast, earlier)
  state = encode_last(model, broadcast, window, profile)
  num_blocks = -(-model.num_rows // config.evaluation.items_per_eval_block)
  block_size = -(-model.num_rows // num_blocks)  # equal, but for the last

  def score_block(number):
    items = number * block_size + jnp.arange(block_size)
    items = jnp.minimum(items, model.num_rows - 1)
    view = view_of(model, config, broadcast, window, memory, items)
    candidates = apply(items, broadcast.catalogue, view, method='candidates')
    return model.score(state, candidates)

  scores = jax.lax.map(score_block, jnp.arange(num_blocks))
  return scores.reshape(-1)[: model.num_rows]


def profile_of(
  model: FedDMMR, config: RunConfig, broadcast: Broadcast, earlier: jax.Array
) -> jax.Array | None:
  """[D] profile of the items before a window; None without profiles."""
  if not config.model.profile:
    return None
  return profile_lib.mean(model, broadcast.params, earlier, broadcast.catalogue)


def encode_last(
  model: FedDMMR,
  broadcast: Broadcast,
  window: jax.Array,
  profile: jax.Array | None,
) -> jax.Array | States:
  """State behind a window [L], ready for `FedDMMR.score`."""
  states: Any = model.apply(
    {'params': broadcast.params},
    window,
    broadcast.catalogue,
    last_only=True,
    profile=profile,
    method='encode',
  )
  return last(states)


@partial(devices.jit, static_argnames=('model', 'config'))
def score_client(
  model: FedDMMR,
  config: RunConfig,
  server: ServerState,
  history: jax.Array,
  num_items: jax.Array,
  num_train: jax.Array,
  memory: Memory | None,
  catalogue: Catalogue,
) -> jax.Array:
  """[V] scores of all items for one client, following its last item.

  Args:
    model: the architecture.
    config: static settings.
    server: parameters and prototypes.
    history: [H] int32 its items in time order, 0 behind them.
    num_items: [] int32 how many they are.
    num_train: [] int32 how many of them it trained on.
    memory: its memory; None in a model without experts.
    catalogue: item features.
  """
  broadcast = server.broadcast(catalogue, config)
  return score_next(
    model, config, broadcast, history, num_items, num_train, memory
  )


def score_next(
  model: FedDMMR,
  config: RunConfig,
  broadcast: Broadcast,
  history: jax.Array,
  now: jax.Array,
  num_train: jax.Array,
  memory: Memory | None,
) -> jax.Array:
  """[V] scores of all items for what follows the first `now` ([] int32) items
  of a history; the other arguments are those of `score_client`."""
  question = question_of(
    config, broadcast.catalogue, history, now, num_train, memory
  )
  return score_catalogue(model, config, broadcast, *question)


def view_of(
  model: FedDMMR,
  config: RunConfig,
  broadcast: Broadcast,
  window: jax.Array,
  memory: Memory | None,
  items: jax.Array,
) -> MemoryView | None:
  """What the experts may attend to when a client is asked about [J] items;
  `window` and `memory` are those of its `Question`."""
  return view_lib.view(
    model,
    memory,
    broadcast.catalogue,
    broadcast.prototypes,
    view_lib.Asked(items),
    window,
    config.memory,
  )


class Question(NamedTuple):
  """What a client's recommendations are computed from.

  Attributes:
    window: [L] int32 its last items, left-padded with 0.
    memory: its memory, up to date; None in a model without experts.
    earlier: [H] int32 what lies before the window, 0 elsewhere.
  """

  window: jax.Array
  memory: Memory | None
  earlier: jax.Array


def question_of(
  config: RunConfig,
  catalogue: Catalogue,
  history: jax.Array,
  now: jax.Array,
  num_train: jax.Array,
  memory: Memory | None,
) -> Question:
  """The question what follows the first `now` items of a history."""
  length = config.model.max_seq_len
  position = now + jnp.arange(-length, 0)
  if memory is not None:
    memory = view_lib.up_to_date(
      memory, history, num_train, now, catalogue, config.memory
    )
  return Question(
    jnp.where(position >= 0, history[position], 0),
    memory,
    jnp.where(jnp.arange(history.shape[0]) < now - length, history, 0),
  )


def rank_client(
  scores: jax.Array,
  client: ClientData,
  target_at: jax.Array,
  now: jax.Array,
  split: jax.Array | int,
  aim: jax.Array | None = None,
) -> Ranks:
  """Ranks one client's target.

  Args:
    scores: [V].
    client: its data.
    target_at: [] int32 position of the target in the history.
    now: [] int32 how many items of the history count as consumed; later ones
      remain candidates.
    split: [] int32 one of SPLITS' values, whose negatives are the sampled ones.
    aim: [] int32 the item that an attack promotes.
  """
  target = client.history[target_at]
  at_least = scores >= scores[target]
  position = jnp.arange(len(client.history))
  consumed = jnp.where(
    (position < now) | (position == target_at), client.history, 0
  )
  unconsumed = jnp.ones(scores.shape, bool).at[consumed].set(False)
  unconsumed = unconsumed.at[client.disliked].set(False)
  # Row 0 is no item.
  unconsumed = unconsumed.at[0].set(False)
  # Nor are items held out of training candidates, until they are the target.
  unconsumed &= jnp.arange(len(scores)) < client.num_drawable
  aimed = jnp.int32(-1)
  if aim is not None:
    seen = jnp.any((client.history == target) & (position < now))
    candidates = unconsumed.at[target].set(~seen)
    place = jnp.sum((scores >= scores[aim]) & candidates) - 1
    aimed = jnp.where(candidates[aim], place, -1)
  return Ranks(
    full=jnp.sum(at_least & unconsumed),
    sampled=jnp.sum(at_least[client.sampled_negatives[split]]),
    bad_scores=jnp.sum(~jnp.isfinite(scores)),
    popular=jnp.sum(at_least[client.popular_negatives[split]]),
    aimed=aimed,
  )


def rank_target(
  model: FedDMMR,
  config: RunConfig,
  broadcast: Broadcast,
  client: ClientData,
  memory: Memory | None,
  after_train: jax.Array,
  known: jax.Array,
  split: jax.Array | int,
  aim: jax.Array | None = None,
) -> Ranks:
  """Ranks one client's target, which comes `after_train` [] int32 items after
  its training items, `known` of which it may know of, with the parameters of
  `broadcast` and its memory."""
  now = client.num_train + known
  scores = score_next(
    model, config, broadcast, client.history, now, client.num_train, memory
  )
  return rank_client(
    scores, client, client.num_train + after_train, now, split, aim
  )


def rank_all(
  model: FedDMMR,
  config: RunConfig,
  max_items: int,
  server: ServerState,
  memories: Memory | None,
  personal: Any,
  targets: np.ndarray,
  split: int,
  catalogue: Catalogue,
  data: FederatedData,
  aim: np.ndarray | None = None,
) -> Ranks:
  """Ranks targets of many clients, each with its own memory and parameters.

  Args:
    model: the architecture.
    config: static settings.
    max_items: H, the longest client's number of interactions.
    server: parameters and prototypes.
    memories: of all clients, [K].
    personal: of all clients, [K], see `FederationState`.
    targets: [3, G, C] int32: clients, −1 where none; the `after_train` of each;
      its `known`.
    split: one of SPLITS' values.
    catalogue: item features.
    data: all clients' data.
    aim: [] int32 the item that an attack promotes.

  Returns:
    Ranks with axes [G, C], on the host.
  """
  _, ranks = devices.run(
    rank_shard,
    (model, config, max_items),
    devices.deal(targets),
    server,
    memories,
    personal,
    jnp.int32(split),
    catalogue,
    data,
    aim,
  )
  return devices.undealt(ranks, targets.shape[1])


@partial(devices.jit, static_argnames=('model', 'config', 'max_items'))
def rank_shard(
  model: FedDMMR,
  config: RunConfig,
  max_items: int,
  chunks: jax.Array,
  server: ServerState,
  memories: Memory | None,
  personal: Any,
  split: jax.Array,
  catalogue: Catalogue,
  data: FederatedData,
  aim: jax.Array | None,
) -> tuple[None, Ranks]:
  """(None, the ranks [g, C] of some chunks [3, g, C] of targets)."""
  broadcast = server.broadcast(catalogue, config)

  def rank_one(target, memory, own):
    index, after_train, known = target
    client = client_view(data, index, max_items)
    told = received(broadcast, own, index)
    return rank_target(
      model, config, told, client, memory, after_train, known, split, aim
    )

  return None, jax.lax.map(
    lambda chunk: jax.vmap(rank_one)(
      chunk,
      memory_lib.fetch(memories, chunk[0]),
      memory_lib.fetch(personal, chunk[0]),
    ),
    tuple(chunks),
  )


def received(broadcast: Broadcast, own: Any, client: jax.Array) -> Broadcast:
  """The broadcast with a client's own parameters in it; the server's for a
  stranger, whose number is negative."""
  return broadcast._replace(
    params=personal_lib.put_of(broadcast.params, own, client)
  )


def evaluated_clients(
  config: RunConfig, num_clients: int, having: np.ndarray | None = None
) -> np.ndarray:
  """[n] clients that are ranked, of those that are not new, ascending; the same
  in each round.

  Args:
    config: settings.
    num_clients: K.
    having: those with a target; None = all.
  """
  clients = old_clients(num_clients, config.data.new_clients)
  if having is not None:
    clients = clients[np.isin(clients, having)]
  wanted = config.evaluation.eval_clients
  if not wanted or wanted >= len(clients):
    return clients
  rng = generator(config.seed, Stream.EVALUATED_CLIENTS)
  return np.sort(clients[rng.choice(len(clients), wanted, replace=False)])


def evaluate(
  model: FedDMMR,
  config: RunConfig,
  max_items: int,
  server: ServerState,
  memories: Memory | None,
  personal: Any,
  targets: Targets,
  clients_per_chunk: int,
  catalogue: Catalogue,
  data: FederatedData,
  aim: np.ndarray | None = None,
) -> Ranks:
  """Ranks of the targets of one split.

  Args:
    As for `rank_all`, except:
    targets: [n] what to rank.
    clients_per_chunk: how many of them at a time.

  Returns:
    Ranks [n] on the host.

  Raises:
    UserError: a score is NaN or infinite.
  """
  chunks = np.stack(
    [round_lib.in_chunks(x, clients_per_chunk) for x in targets[:3]]
  )
  ranks = rank_all(
    model,
    config,
    max_items,
    server,
    memories,
    personal,
    chunks,
    SPLITS[targets.split],
    catalogue,
    data,
    aim,
  )
  ranks = jax.tree.map(lambda x: x.reshape(-1)[: len(targets.client)], ranks)
  check_finite(ranks, targets.split)
  return ranks


def check_finite(ranks: Ranks, split: str) -> None:
  """Raises UserError if a score was NaN or infinite."""
  bad = np.flatnonzero(ranks.bad_scores)
  if bad.size:
    raise UserError(
      f'{split}: {bad.size} of {len(ranks.bad_scores)} targets have scores '
      'that are NaN or infinite, the training diverged; lower '
      '`client_learning_rate` or `server_learning_rate`'
    )


def metrics_of(
  ranks: Ranks,
  further: Sequence[Metric] = (),
  clients: np.ndarray | None = None,
) -> dict[str, dict[str, float]]:
  """{'sampled': {'HR@10': …}, 'full': {…}}, with HR, NDCG, MRR and further
  metrics; under an attack the exposure of its target too.

  Args:
    ranks: [n] of targets.
    further: as `Simulation.metrics`.
    clients: [n] whose each target is, ascending; of a client with several, the
      mean counts. None = each has one.
  """
  found = {
    protocol: metrics_lib.ranking(getattr(ranks, protocol), further, clients)
    for protocol in metrics_lib.PROTOCOLS
  }
  aimed = np.asarray(ranks.aimed)
  if np.any(aimed >= 0):
    found[metrics_lib.FULL][metrics_lib.EXPOSURE] = metrics_lib.mean_of_users(
      metrics_lib.exposure_of_each(aimed), clients
    )
  return found
