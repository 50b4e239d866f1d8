"""Recommendations: the best items for many people at once, and why.

People are clients of the run, each with its own memory and personal parameters,
or anybody whose history is known: a memory is then made from the history by the
same rule that brings a client's up to date (docs/model.md, "What an expert may
see"), and all parameters are the server's.

Axes: `n` people, `H` longest history, `k` items of a list, `L` window length,
`R` retrieved entries, `V` rows of the catalogue.
"""

from functools import partial
from typing import NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax.client import memory as memory_lib
from fedmmr_jax.config import RunConfig
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import ranking
from fedmmr_jax.federation import devices
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.federation.round import FederationState, PADDING_CLIENT
from fedmmr_jax.models.feddmmr import FedDMMR
from fedmmr_jax.models.layers import unit
from fedmmr_jax.simulation import Simulation

WINDOW = 'window'  # of `Reasons.effects`, beside the names of the experts


class People(NamedTuple):
  """Whom to recommend to.

  Attributes:
    history: [n, H] int32 rows of the catalogue in time order, 0 behind.
    length: [n] int32 how many of them lie before the question.
    num_train: [n] int32 how many of them the memory has been trained on.
    client: [n] int32 the client whose memory it is, PADDING_CLIENT for people
      who were no client of the run.
    further: [n, G] int32 items that stand in no history and are not recommended
      either: consumed ones that the run held out of training as new, and those
      that they disliked; 0 = none.
  """

  history: np.ndarray
  length: np.ndarray
  num_train: np.ndarray
  client: np.ndarray
  further: np.ndarray

  @classmethod
  def of_clients(
    cls,
    simulation: Simulation,
    clients: Sequence[int],
    split: str | None = None,
  ) -> 'People':
    """Clients of the run.

    Args:
      clients: their numbers.
      split: None = asked what follows everything they consumed; 'val' or 'test'
        = what follows the items before that split's target.
    """
    dataset = simulation.dataset
    numbers = np.asarray(clients, np.int32)
    num_train = simulation.num_train[numbers].astype(np.int32)
    length = dataset.lengths[numbers].astype(np.int32)
    if split is not None:
      # Asked about the first of its targets.
      targets = simulation.ranked_targets(split)
      first = np.searchsorted(targets.client, numbers)
      length = num_train + targets.known[first].astype(np.int32)
    histories = [dataset.sequence(client) for client in numbers]
    further = [dataset.disliked_by(client) for client in numbers]
    if simulation.cold and split is None:
      everything = simulation.cold.dataset
      further = [
        np.setdiff1d(everything.sequence(client), history)
        for client, history in zip(numbers, histories)
      ]
    return cls(
      _padded(histories, simulation.max_items),
      length,
      num_train,
      numbers,
      _padded(further, 0),
    )

  @classmethod
  def of_histories(
    cls, simulation: Simulation, histories: Sequence[Sequence[int]]
  ) -> 'People':
    """People who were no clients.

    Args:
      histories: of each, rows of the catalogue in time order.
    """
    length = np.array([len(history) for history in histories], np.int32)
    return cls(
      _padded(histories, simulation.max_items),
      length,
      length,
      np.full(len(histories), PADDING_CLIENT, np.int32),
      _padded([[]] * len(histories), 0),
    )


class Lists(NamedTuple):
  """Recommendations, best first.

  Attributes:
    rows: [n, k] int32 rows of the catalogue; 0 behind the end of a list that is
      shorter, because no more items are allowed.
    scores: [n, k] float32; -inf there.
  """

  rows: np.ndarray
  scores: np.ndarray


class Reasons(NamedTuple):
  """By how much a score falls if one thing had not been read.

  Attributes:
    items: WINDOW -> [n, L], name of an expert -> [n, R]: int32 rows of the
      catalogue, 0 = none. An expert reads its memory's entries.
    effects: the same names -> [n, L or R, k] float32.
  """

  items: dict[str, np.ndarray]
  effects: dict[str, np.ndarray]


def _padded(histories: Sequence[Sequence[int]], usual: int) -> np.ndarray:
  """[n, H] int32. H is what is usual wherever that is enough, so that one
  program serves all, and else a power of two."""
  longest = max(map(len, histories), default=0)
  longest = usual if longest <= usual else 1 << (longest - 1).bit_length()
  padded = np.zeros((len(histories), longest), np.int32)
  for number, history in enumerate(histories):
    padded[number, : len(history)] = history
  return padded


def recommend(
  simulation: Simulation,
  state: FederationState,
  people: People,
  count: int,
  allowed: np.ndarray | None = None,
  repeats: bool = False,
  among: np.ndarray | None = None,
) -> Lists:
  """The best items for each of many people.

  Args:
    simulation: the run.
    state: one of its rounds.
    people: see `People.of_clients` and `of_histories`.
    count: k.
    allowed: [V] bool, which items may be recommended; None = all.
    repeats: whether they may have consumed them.
    among: [n, J] int32 rows that are each person's only candidates; None = all.

  Raises:
    UserError: a score is NaN or infinite, or k exceeds the catalogue.
  """
  if not 1 <= count < simulation.model.num_rows:
    raise UserError(
      f'`k={count}`: the catalogue has {simulation.model.num_rows - 1} items'
    )
  if allowed is None:
    allowed = np.ones(simulation.model.num_rows, bool)
  rows, scores, bad = _each(
    _recommend_shard,
    (count, repeats),
    simulation,
    state,
    people,
    allowed,
    among,
  )
  if bad.any():
    raise UserError(
      f'{int(bad.sum())} of {len(bad)} people have scores that are NaN or '
      'infinite: the training diverged'
    )
  return Lists(np.where(np.isfinite(scores), rows, 0), scores)


def reasons(
  simulation: Simulation, state: FederationState, people: People, lists: Lists
) -> Reasons:
  """Why each item stands in a list: every item of the window and every entry of
  the memory, expert by expert, is left out once, and the score computed again.

  Effects need not add up: what two entries have in common is missed only when
  both are gone.
  """
  return Reasons(
    *_each(_reasons_shard, (), simulation, state, people, lists.rows)
  )


def similar_items(
  simulation: Simulation,
  state: FederationState,
  row: int,
  count: int,
  allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Items whose embeddings, as the server has them, point where an item's does.

  Returns:
    ([k] int rows of the catalogue, best first, without the item itself; [k]
    float32 cosines); fewer if fewer are allowed.
  """
  embedded = simulation.embedded(state.server)
  cosines = np.array(unit(embedded) @ unit(embedded[row]))
  cosines[[0, row]] = -np.inf
  if allowed is not None:
    cosines[~allowed] = -np.inf
  best = np.argsort(-cosines, kind='stable')[:count]
  best = best[np.isfinite(cosines[best])]
  return best, cosines[best]


def _each(program, static, simulation, state, people: People, *more):
  """Results of a program for all people, axis n first, on the host."""
  server, catalogue = simulation.ready_to_rank(state.server)
  chunks = round_lib.in_chunks(
    np.arange(len(people.client)),
    simulation.config.evaluation.clients_per_eval_chunk,
  )
  shards = devices.deal(chunks)
  if devices.count() == 1:  # a mesh needs those of padding alone, too
    shards = shards[: len(chunks)]
  _, found = devices.run(
    program,
    (simulation.model, simulation.compiled_config, *static),
    shards,
    server,
    (state.memories, state.personal),
    catalogue,
    people,
    *more,
  )
  return jax.tree.map(
    lambda x: x.reshape(-1, *x.shape[2:])[: len(people.client)],
    devices.undealt(found, len(chunks)),
  )


def _mapped(one, chunks, kept, broadcast, people: People):
  """(None, what `one(person, its broadcast, its memory, its number)` gives for
  the people of some chunks, [g, C, …]).

  Args:
    kept: of all clients, [K]: memories and personal parameters.
  """

  def of_client(person, kept, client, number):
    memory, own = kept
    return one(person, ranking.received(broadcast, own, client), memory, number)

  def chunk(numbers):
    # Padding takes the first person's history, and nobody's memory.
    person = jax.tree.map(lambda x: x[jnp.maximum(numbers, 0)], people)
    clients = jnp.where(numbers >= 0, person.client, PADDING_CLIENT)
    return jax.vmap(of_client)(
      person, memory_lib.fetch(kept, clients), clients, numbers
    )

  return None, jax.lax.map(chunk, chunks)


@partial(devices.jit, static_argnames=('model', 'config', 'count', 'repeats'))
def _recommend_shard(
  model: FedDMMR,
  config: RunConfig,
  count: int,
  repeats: bool,
  chunks,
  server,
  kept,
  catalogue,
  people,
  allowed,
  among,
):
  broadcast = server.broadcast(catalogue, config)

  def one(person, broadcast, memory, number):
    scores = ranking.score_next(
      model,
      config,
      broadcast,
      person.history,
      person.length,
      person.num_train,
      memory,
    )
    open_ = allowed.at[0].set(False)
    if among is not None:
      own = among[jnp.maximum(number, 0)]
      open_ &= jnp.zeros_like(open_).at[own].set(True)
    if not repeats:
      consumed = jnp.arange(len(person.history)) < person.length
      open_ = open_.at[jnp.where(consumed, person.history, 0)].set(False)
      open_ = open_.at[person.further].set(False)
    best, rows = jax.lax.top_k(jnp.where(open_, scores, -jnp.inf), count)
    return rows, best, jnp.any(~jnp.isfinite(scores[1:]))

  return _mapped(one, chunks, kept, broadcast, people)


@partial(devices.jit, static_argnames=('model', 'config'))
def _reasons_shard(
  model: FedDMMR,
  config: RunConfig,
  chunks,
  server,
  kept,
  catalogue,
  people,
  lists,
):
  broadcast = server.broadcast(catalogue, config)

  def one(person, broadcast, memory, number):
    params = {'params': broadcast.params}
    items = lists[jnp.maximum(number, 0)]
    window, memory, earlier = ranking.question_of(
      config, catalogue, person.history, person.length, person.num_train, memory
    )
    profile = ranking.profile_of(model, config, broadcast, earlier)
    view = ranking.view_of(model, config, broadcast, window, memory, items)

    def score(window, view):
      state = ranking.encode_last(model, broadcast, window, profile)
      candidates = model.apply(
        params, items, catalogue, view, method='candidates'
      )
      return model.score(state, candidates)

    whole = score(window, view)
    found = {WINDOW: window}
    effects = {
      WINDOW: jax.vmap(lambda at: whole - score(window.at[at].set(0), view))(
        jnp.arange(len(window))
      )
    }
    for modality in model.modalities:
      entries = view[modality.name]
      read = memory_lib.retrieve(memory, config.memory)

      def without(at, name=modality.name, entries=entries):
        kept = jnp.arange(len(entries.mask))[:, None] != at
        left_out = {name: entries._replace(mask=entries.mask & kept)}
        return whole - score(window, {**view, **left_out})

      found[modality.name] = read
      effects[modality.name] = jax.vmap(without)(jnp.arange(len(read)))
    return found, effects

  return _mapped(one, chunks, kept, broadcast, people)
