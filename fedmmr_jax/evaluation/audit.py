"""Checks for leaks, on the functions that a run actually uses rather than on a
description of them.

The checks, and how each is made:

    training negatives: the sampler draws for every client; held-out items must
      be drawn as often as any other unseen item
    windows: histories are replaced by their positions; no window may show a
      position after the training items, and every training item but the first
      must be a target once
    round: all held-out items are exchanged for others; the sketch is computed
      again, and parameters, prototypes and memories after the rounds must be
      the same in every bit
    memory: after the rounds each client remembers only training items
    memory: a target's own entry: no candidate, of training or of the ranking,
      meets its own entry; otherwise "it is in my memory" tells positives from
      negatives
    memory: what came later: no target of training meets an item that its client
      consumed after it, nor does a negative
    memory: what came before: each client is asked for its test item with a
      memory that holds the validation item
    catalogue filter: the items that negatives avoid, and those that a k-core
      counts, are training items
    given split: clients train on their own targets no more often than twice
      what they consume things again in training
    evaluation negatives: unseen before the target, distinct, and candidates
    validation candidates: the later test item is ranked above the validation
      item; it must count there, and be drawn as a negative as often as any
      other item
    canary: each client trains alone, from a random model; it can learn only
      from what it consumed, so a score far above popularity means that it knows
      its target

The canary reacts to leaky `negatives`, where held-out items are never drawn as
negatives: they are then the only unseen items that are not pushed down. That is
the original system's leak.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.client import memory as memory_lib
from fedmmr_jax.client import scoring, windows
from fedmmr_jax.client import view as view_lib
from fedmmr_jax.config import Given, NoMemory, RunConfig, SharedNegatives
from fedmmr_jax.data.dataset import client_view, Dataset, HELD_OUT
from fedmmr_jax.evaluation import popularity, ranking
from fedmmr_jax.evaluation.bootstrap import paired_bootstrap
from fedmmr_jax.evaluation.ranking import Ranks
from fedmmr_jax.federation.round import FederationState
from fedmmr_jax.simulation import Simulation
from fedmmr_jax.streams import generator, Stream

DRAWS = 10_000  # negatives of a client
DEVIATIONS = 5  # of a binomial count, before it is no chance
# A canary whose HR@10 is surely above popularity's by more knows its targets.
MARGIN = 0.1
# How the canary trains: long and fast enough to sing.
CANARY = {
  'client_optimizer': 'adam',
  'client_learning_rate': 1e-2,
  'client_schedule': 'constant',
  'max_local_steps': 0,
  'local_epochs': 10,
  'drift_control': 'none',
  'freeze': '',
  'personal': '',
  'item_embedding': 'id',
  'experts': 'none',
  'memory': 'none',
  'global_memory': 'none',
}


class Check(NamedTuple):
  """The result of one check.

  Attributes:
    name: what was checked.
    passed: whether it is clean.
    found: the findings, in figures.
  """

  name: str
  passed: bool
  found: str


def all_checks(simulation: Simulation, rounds: int = 2) -> list[Check]:
  """All checks but the canary, which needs training.

  Args:
    simulation: with popular negatives.
    rounds: number of rounds in the comparison with other held-out items.
  """
  return [
    training_negatives(simulation),
    training_windows(simulation),
    *trained_rounds(simulation, rounds),
    catalogue_filter(simulation),
    *given_split(simulation),
    evaluation_negatives(simulation),
    validation_candidates(simulation),
  ]


def training_negatives(simulation: Simulation, draws: int = DRAWS) -> Check:
  """Draws negatives for every client, and counts the held-out items."""
  config = simulation.compiled_config
  per_draw = max(
    config.client.num_negatives
    * (
      1
      if isinstance(config.client.negatives, SharedNegatives)
      else windows.targets_of_step(config)
    ),
    1,
  )
  num_keys = -(-draws // per_draw)

  def count(client):
    view = client_view(simulation.data, client, simulation.max_items)
    position = jnp.arange(len(view.history))
    held_out = jnp.where(
      (position >= view.num_train) & (position < view.num_items),
      view.history,
      0,
    )
    # What the client has consumed in training too may not be drawn; what it
    # disliked is drawn apart.
    consumed = (
      jnp.zeros(simulation.model.num_rows, bool)
      .at[jnp.where(position < view.num_train, view.history, 0)]
      .set(True)
    )
    avoided = consumed.at[view.disliked].set(True)
    wanted = jnp.zeros_like(consumed).at[held_out].set(True) & ~avoided
    wanted = wanted.at[0].set(False)
    keys = jax.random.split(
      jax.random.fold_in(jax.random.key(int(Stream.AUDIT)), client), num_keys
    )

    def look(key):
      negatives = scoring.draw_negatives(key, view, config)
      # Of training items none may come.
      return jnp.sum(wanted[negatives]), jnp.sum(consumed[negatives])

    drawn, trained = jax.lax.map(look, keys)
    free = view.num_drawable - 1 - jnp.sum(avoided[1:])
    explicit = scoring.num_explicit(view, config)
    neutral = 1 - explicit / max(config.client.num_negatives, 1)
    return jnp.sum(drawn), jnp.sum(trained), neutral * jnp.sum(wanted) / free

  drawn, trained, share = (
    np.asarray(x, np.float64)
    for x in jax.jit(lambda clients: jax.lax.map(count, clients))(
      jnp.arange(simulation.dataset.num_clients)
    )
  )
  total = num_keys * per_draw
  expected = total * share.sum()
  deviation = np.sqrt(total * (share * (1 - share)).sum())
  return Check(
    'training negatives',
    bool(
      abs(drawn.sum() - expected) <= DEVIATIONS * deviation
      and trained.sum() == 0
    ),
    f'of {total:,} draws for each of {len(share):,} clients '
    f'{drawn.sum():,.0f} are items held out of its training, '
    f'{expected:,.0f} ± {deviation:,.0f} expected if they are drawn like any '
    f'unseen item; {trained.sum():,.0f} are training items',
  )


def training_windows(simulation: Simulation) -> Check:
  """Cuts all windows of every client, from positions instead of items."""
  config = simulation.compiled_config
  stride = windows.window_stride(config.client, config.model.max_seq_len)
  most = int(windows.num_windows(simulation.max_items, stride))

  def look(client):
    view = client_view(simulation.data, client, simulation.max_items)
    view = view._replace(history=1 + jnp.arange(len(view.history)))
    own = windows.num_windows(view.num_train, stride)

    index = jnp.arange(most)
    batch = windows.cut_windows(
      view, index, index < own, stride, config.model.max_seq_len
    )
    targets = jnp.where(batch.valid, batch.targets, 0)
    latest = jnp.maximum(jnp.max(batch.windows), jnp.max(targets))
    # Of positions 2 to num_train, how often each is a target.
    times = jnp.zeros(len(view.history) + 1, int).at[targets].add(batch.valid)
    position = jnp.arange(len(times))
    expected = (position >= 2) & (position <= view.num_train)
    return latest, jnp.sum(times != expected)

  latest, missing = map(
    np.asarray,
    jax.jit(lambda clients: jax.lax.map(look, clients))(
      jnp.arange(simulation.dataset.num_clients)
    ),
  )
  # The bound is the host's: what the device says of itself proves nothing.
  beyond = latest - simulation.num_train
  return Check(
    'windows',
    bool((beyond <= 0).all() and (missing == 0).all()),
    f'{(beyond > 0).sum()} of {len(beyond):,} clients have a window that '
    'reaches behind their training items; '
    f'{(missing != 0).sum()} have a training item that is not a target once',
  )


def trained_rounds(simulation: Simulation, rounds: int) -> list[Check]:
  """Trains with the held-out items and with others in their place."""
  # Built anew: what the items start from is sketched from histories too.
  other = simulation_lib.build(
    simulation.config,
    exchanged(simulation.dataset, simulation.config.seed),
    simulation.cold,
    simulation.aggregator,
    simulation.drift,
  )
  states = [_trained(one, rounds) for one in (simulation, other)]
  of_experts = memory_views(simulation, states[0])
  own, theirs = (
    jax.tree.map(
      np.asarray,
      jax.device_get(
        (s.server.params, s.server.prototypes, s.memories, s.personal)
      ),
    )
    for s in states
  )
  changed = (simulation.dataset.items != other.dataset.items).sum()
  differing = [
    jax.tree_util.keystr(path)
    for (path, a), b in zip(
      jax.tree_util.tree_leaves_with_path(own), jax.tree.leaves(theirs)
    )
    if not np.array_equal(a, b)
  ]
  names = 'parameters, prototypes and memories'
  if own[3] is not None:
    names = 'parameters, personal ones included, prototypes and memories'
  checks = [
    Check(
      f'{rounds} rounds',
      not differing,
      f'with {changed:,} held-out items exchanged for others, {names} are '
      + (
        'the same in every bit'
        if not differing
        else f'different in {len(differing)} arrays, {differing[0]} the first'
      ),
    )
  ]
  if own[2] is None:
    return [
      *checks,
      Check('memory', True, 'a model without experts keeps none'),
    ]
  memories = own[2].item
  foreign = sum(
    len(
      np.setdiff1d(
        memories[k],
        [0, *simulation.dataset.sequence(k)[: simulation.num_train[k]]],
      )
    )
    for k in range(simulation.dataset.num_clients)
  )
  checks.append(
    Check(
      'memory',
      foreign == 0,
      f'{(memories > 0).sum():,} entries of '
      f'{(memories > 0).any(axis=1).sum():,} clients, {foreign} of them not '
      'their training items',
    )
  )
  return checks + of_experts


class _Met(NamedTuple):
  """What the candidates of one client meet in its memory; all [] arrays.

  Attributes:
    itself: how often a candidate of training or ranking meets its own entry.
    later: entries met in training that were consumed later.
    in_all: entries met in training.
    known: whether the item before the test item is remembered when that is
      asked about.
  """

  itself: jax.Array
  later: jax.Array
  in_all: jax.Array
  known: jax.Array


def memory_views(simulation: Simulation, state: FederationState) -> list[Check]:
  """What the experts meet in each client's memory; none without experts."""
  if state.memories is None:
    return []
  config = simulation.compiled_config
  met = _Met(
    *map(
      np.asarray,
      jax.jit(
        lambda clients: jax.lax.map(
          lambda client: _met_by(simulation, state, client), clients
        )
      )(jnp.arange(simulation.dataset.num_clients)),
    )
  )
  tested = simulation.dataset.tested
  before = simulation.num_train + simulation.dataset.num_validation
  known = met.known[tested[before[tested] > 0]]
  can_remember = not isinstance(config.memory, NoMemory)
  return [
    Check(
      "memory: a target's own entry",
      not met.itself.any(),
      f'candidates meet their own entry {met.itself.sum():,} times',
    ),
    Check(
      'memory: what came later',
      not met.later.any(),
      f'of {met.in_all.sum():,} entries that the candidates of training meet, '
      f'{met.later.sum():,} were consumed later',
    ),
    Check(
      'memory: what came before',
      bool(known.all()) or not can_remember,
      f'{(~known).sum():,} of {len(known):,} clients are asked for their test '
      'item with a memory that lacks the item before it'
      if can_remember
      else 'nothing is remembered, as the settings say',
    ),
  ]


def _met_by(simulation, state, client) -> _Met:
  """What one client's candidates meet: in all its windows as one step, and in
  the ranking of its test item."""
  config, catalogue = simulation.compiled_config, simulation.catalogue
  own = client_view(simulation.data, client, simulation.max_items)
  memory = jax.tree.map(lambda x: x[client], state.memories)
  asked = _asked_in_training(simulation, client, own)
  entries, shown = _shown(simulation, state, memory, asked, own.history)
  shown &= asked.item > 0  # padding's targets count for nothing
  first = jnp.min(
    jnp.where(
      own.history == entries[:, None],
      jnp.arange(len(own.history)),
      len(own.history),
    ),
    axis=1,
  )
  now = own.num_train + jnp.asarray(simulation.dataset.num_validation)[client]
  memory = view_lib.up_to_date(
    memory, own.history, own.num_train, now, catalogue, config.memory
  )
  everything = view_lib.Asked(jnp.arange(simulation.model.num_rows))
  then, shown_then = _shown(simulation, state, memory, everything, own.history)
  return _Met(
    itself=jnp.sum(shown & (entries[:, None] == asked.item))
    + jnp.sum(shown_then & (then[:, None] == everything.item)),
    later=jnp.sum(shown & (first[:, None] >= asked.position)),
    in_all=jnp.sum(shown),
    known=jnp.any(memory.item == own.history[now - 1]),
  )


def _asked_in_training(simulation, client, own) -> view_lib.Asked:
  """The candidates of all windows of a client."""
  config = simulation.compiled_config
  stride = windows.window_stride(config.client, config.model.max_seq_len)
  most = int(windows.num_windows(simulation.max_items, stride))
  index = jnp.arange(most)
  batch = windows.cut_windows(
    own,
    index,
    index < windows.num_windows(own.num_train, stride),
    stride,
    config.model.max_seq_len,
  )
  of_all = dataclasses.replace(
    config, client=dataclasses.replace(config.client, batch_size=most)
  )
  negative = scoring.draw_negatives(
    jax.random.fold_in(jax.random.key(int(Stream.AUDIT)), client), own, of_all
  )
  return view_lib.asked_in_training(batch, negative)


def _shown(simulation, state, memory, asked, history):
  """([R] entries, [R, J] bool which of them some expert shows)."""
  view = view_lib.view(
    simulation.model,
    memory,
    simulation.catalogue,
    state.server.prototypes,
    asked,
    history,
    simulation.compiled_config.memory,
  )
  entries = memory_lib.retrieve(memory, simulation.compiled_config.memory)
  shown = jnp.zeros((len(entries), len(asked.item)), bool)
  for one in view.values():
    shown |= one.mask[: len(entries)]
  return entries, shown


def exchanged(dataset: Dataset, seed: int) -> Dataset:
  """The same data with each held-out item exchanged for one that its client has
  not consumed."""
  rng = generator(seed, Stream.AUDIT)
  items = dataset.items.copy()
  for client in range(dataset.num_clients):
    start, end = dataset.offsets[client : client + 2]
    unseen = np.setdiff1d(
      np.arange(1, dataset.num_rows - dataset.num_cold),
      dataset.items[start:end],
    )
    first = start + dataset.num_train[client]
    count = min(end - first, len(unseen))
    items[first : first + count] = rng.choice(unseen, count, replace=False)
  return dataclasses.replace(dataset, items=items)


def catalogue_filter(simulation: Simulation) -> Check:
  """Which items are excluded from the draws, and which from the catalogue."""
  dataset, data = simulation.dataset, simulation.data
  avoided = np.asarray(data.avoided)
  own = np.split(avoided, np.cumsum(np.asarray(data.avoided_length))[:-1])
  foreign = sum(
    len(
      np.setxor1d(
        own[k],
        np.union1d(
          dataset.sequence(k)[: simulation.num_train[k]], dataset.disliked_by(k)
        ),
      )
    )
    for k in range(dataset.num_clients)
  )
  counts = popularity.training_counts(dataset)[1:]
  k_core = simulation.config.data.k_core
  # The most active users may have been taken after the core was.
  rare = (
    (counts[: dataset.num_items - dataset.num_cold] < k_core).sum()
    if (k_core and not simulation.config.data.top_k_users)
    else 0
  )
  unknown = (counts == 0).sum() - dataset.num_cold
  return Check(
    'catalogue filter',
    bool(foreign == 0 and rare == 0),
    f"{foreign} items are kept from a client's negatives without being in "
    f'its training; {unknown} of {dataset.num_items:,} items are known from '
    'held-out interactions only, and drawn and ranked like any other'
    + (
      f'; {rare} have fewer than `k_core={k_core}` training interactions'
      if k_core
      else ''
    ),
  )


def given_split(simulation: Simulation) -> list[Check]:
  """Looks for targets in their clients' training; nothing without a given
  split, whose parts others have cut."""
  if not isinstance(simulation.config.data.split_by, Given):
    return []
  dataset = simulation.dataset
  own = [
    dataset.sequence(k)[:n] for k, n in enumerate(simulation.num_train.tolist())
  ]
  again = sum(len(items) - len(np.unique(items)) for items in own)
  total = sum(map(len, own))
  targets = [
    (k, row)
    for split in ranking.SPLITS
    for k, row in zip(*simulation.targets(split))
  ]
  trained = sum(row in own[k] for k, row in targets)
  return [
    Check(
      'given split',
      not trained or trained / len(targets) <= 2 * again / max(total, 1),
      f'{trained:,} of {len(targets):,} targets are training items of their '
      f'client; of {total:,} within training {again:,} come again',
    )
  ]


def evaluation_negatives(simulation: Simulation) -> Check:
  """Checks the fixed draws of both sampled protocols."""
  dataset = simulation.dataset
  seen = repeated = outside = 0
  for negatives in (
    simulation.data.sampled_negatives,
    simulation.data.popular_negatives,
  ):
    negatives = np.asarray(negatives)
    outside += (
      (negatives < 1) | (negatives >= dataset.num_rows - dataset.num_cold)
    ).sum()
    for client, of_splits in enumerate(negatives):
      last = (dataset.num_validation[client], dataset.num_held_out[client])
      for after, drawn in zip(last, of_splits):
        seen += np.isin(drawn, dataset.no_candidates(client, after - 1)).sum()
        repeated += len(drawn) - len(np.unique(drawn))
  number = negatives.shape[-1]
  return Check(
    'evaluation negatives',
    not (seen or repeated or outside),
    f'{number} uniform and {number} by popularity for each target of '
    f'{dataset.num_clients:,} clients: {seen} consumed by it before, '
    f'{repeated} drawn twice, {outside} no candidates',
  )


def validation_candidates(simulation: Simulation) -> Check:
  """Ranks each validation item when only the test item scores higher."""
  dataset, data = simulation.dataset, simulation.data
  clients = np.array(
    [
      k
      for k in range(dataset.num_clients)
      if dataset.num_train[k]
      and dataset.num_validation[k] == 1
      and dataset.num_held_out[k] == HELD_OUT
      and dataset.new_test_items(k).size
    ],
    int,
  )
  if not clients.size:
    return Check(
      'validation candidates',
      True,
      'nobody has one test item that is new to it, and one validation item',
    )

  @jax.jit
  def rank(client):
    view = client_view(data, client, simulation.max_items)
    target, later = (
      view.history[view.num_train + after_train]
      for after_train in ranking.SPLITS.values()
    )
    scores = jnp.zeros(simulation.model.num_rows)
    scores = scores.at[target].set(1).at[later].set(2)
    return ranking.rank_client(
      scores, view, view.num_train, view.num_train, ranking.SPLITS['val']
    )

  ranks = jax.tree.map(np.asarray, jax.lax.map(rank, clients))
  consumed = np.array([len(dataset.no_candidates(k, 0)) for k in clients])
  share = data.sampled_negatives.shape[-1] / (
    dataset.num_items - dataset.num_cold - consumed
  )
  expected, deviation = share.sum(), np.sqrt((share * (1 - share)).sum())
  missing = (ranks.full != 1).sum()
  return Check(
    'validation candidates',
    bool(
      missing == 0
      and abs(ranks.sampled.sum() - expected) <= DEVIATIONS * deviation
    ),
    f'of {len(clients):,} clients {missing} have a test item that is no '
    f'candidate at validation; {ranks.sampled.sum()} have it among the '
    f'uniform negatives, {expected:.0f} ± {deviation:.0f} expected if it is '
    f'drawn like any unseen item, {ranks.popular.sum()} among those by '
    'popularity',
  )


class Trained(NamedTuple):
  """Ranks of the test items: by popularity, and of the same training with clean
  and with leaky negatives; [n] whose each item is."""

  popularity: Ranks
  clean: Ranks
  leaky: Ranks
  clients: np.ndarray


def canary(simulation: Simulation) -> tuple[Check, Trained]:
  """Trains every client of `eval_clients` alone, from a random model.

  The check is about the simulation's own negatives.
  """
  config = RunConfig.from_flat_dict(
    simulation.config.as_flat_dict() | CANARY
  ).validate()
  found = {}
  for leaky in (False, True):
    alone = _with_leak(simulation, config, leaky)
    found[leaky] = alone.rank_local_only(alone.init_state())['test']
  clients = simulation.targets('test')[0]
  trained = Trained(
    simulation.rank_by_popularity('test'), *found.values(), clients=clients
  )
  # What a client has trained on it may know.
  new = np.array(
    [
      item not in simulation.dataset.sequence(k)[: simulation.num_train[k]]
      for k, item in zip(*simulation.targets('test'))
    ]
  )
  if not new.any():
    return Check(
      'canary',
      True,
      'cannot tell: every client has consumed its test item in training too',
    ), trained
  trained = Trained(
    *(
      jax.tree.map(lambda x: np.asarray(x)[new], ranks) for ranks in trained[:3]
    ),
    clients=trained.clients[new],
  )
  by_popularity, clean, leaky = (
    hit_rate(ranks, trained.clients) for ranks in trained[:3]
  )
  if by_popularity + MARGIN >= 1:
    return Check(
      'canary',
      True,
      'cannot tell: HR@10 (sampled) of popularity is '
      f'{by_popularity:.3f} already',
    ), trained
  own = (
    trained.leaky if simulation.config.client.negatives.leaky else trained.clean
  )
  lead = paired_bootstrap(
    *(
      metrics_lib.of_users(
        metrics_lib.ranking_of_each(ranks.sampled)[metrics_lib.HR],
        trained.clients,
      )
      for ranks in (own, trained.popularity)
    )
  )
  return Check(
    'canary',
    lead.low <= MARGIN,
    'HR@10 (sampled) of clients that train alone: '
    f'{hit_rate(own, trained.clients):.3f}, of '
    f'popularity {by_popularity:.3f} (difference {lead.low:+.3f} to '
    f'{lead.high:+.3f}); with leaky negatives {leaky:.3f}, without '
    f'{clean:.3f}',
  ), trained


def federated(simulation: Simulation, rounds: int) -> Trained:
  """The first rounds of the run itself, with clean and with leaky negatives."""
  found = {}
  for leaky in (False, True):
    one = _with_leak(simulation, simulation.config, leaky)
    found[leaky] = one.evaluate(_trained(one, rounds), 'test')[1]
  return Trained(
    simulation.rank_by_popularity('test'),
    *found.values(),
    clients=simulation.targets('test')[0],
  )


def hit_rate(ranks: Ranks, clients: np.ndarray | None = None) -> float:
  """HR@10 of the sampled protocol; `clients` as for `metrics.ranking`."""
  return metrics_lib.ranking(ranks.sampled, users=clients)[metrics_lib.HR]


def _trained(simulation: Simulation, rounds: int) -> FederationState:
  """The state after so many rounds from the start."""
  *_, last = simulation.rounds(count=rounds)
  return last.state


def _with_leak(
  simulation: Simulation, config: RunConfig, leaky: bool
) -> Simulation:
  negatives = dataclasses.replace(config.client.negatives, leaky=leaky)
  config = dataclasses.replace(
    config, client=dataclasses.replace(config.client, negatives=negatives)
  )
  return simulation_lib.build(config, simulation.dataset, simulation.cold)
