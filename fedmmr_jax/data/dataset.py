"""Interactions of all clients as flat arrays, and their chronological split.

Sequences are concatenated in one array with offsets (CSR), so no client is
padded to the longest history. On the device, `client_view` cuts out one client
with a fixed shape.

The end of a sequence is held out: the validation target, then the test target.
The rest is for training (`selection.py`).
"""

import dataclasses
import hashlib
import zlib
from typing import Any, Mapping, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax.errors import UserError
from fedmmr_jax.streams import generator, Stream

HELD_OUT = 2  # validation and test item at the end of a sequence


@dataclasses.dataclass(frozen=True, eq=False)  # it holds arrays
class Dataset:
  """A data set on the host.

  Attributes:
    name: what to call it.
    items: [total] int32 catalogue rows (1 … V−1), client after client, in
      time order.
    offsets: [K + 1] int64; client k owns items[offsets[k]:offsets[k + 1]].
    user_ids: [K] ids in the source, int64 or strings.
    item_ids: [V] ids in the source, likewise; entry 0 is 0 or '' (padding).
    features: name of a matrix ('visual', 'text', others by their file) ->
      [V, F] float32, zero row = missing; only existing matrices.
    titles: [V] strings, or empty if the source has none.
    num_cold: items at the end of the catalogue that nobody consumed, so that
      training never draws them as negatives (see `cold.py`).
    held_out: number of items at the end of each client that are not trained on;
      [K] if it differs (in a timeline 1 for clients without a test item).
    validation: how many of these are for validation, the first ones; [K] if it
      differs. The others are for the test.
    weights: [total] float32, how much each item counts in the loss as a target;
      None = all alike.
    disliked: [n] int32 rows that clients disliked, client after client, each
      client's ascending and distinct; None if nothing says so.
    dislike_offsets: [K + 1] as `offsets`, of `disliked`.
    genres: [V] the kinds of each item, or empty if the source has none; no
      model sees them.
  """

  name: str
  items: np.ndarray
  offsets: np.ndarray
  user_ids: np.ndarray
  item_ids: np.ndarray
  features: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  titles: tuple[str, ...] = ()
  num_cold: int = 0
  held_out: np.ndarray | int = HELD_OUT
  validation: np.ndarray | int = 1
  weights: np.ndarray | None = None
  disliked: np.ndarray | None = None
  dislike_offsets: np.ndarray | None = None
  genres: tuple[tuple[str, ...], ...] = ()

  @classmethod
  def of(
    cls,
    users: Sequence,
    items: Sequence,
    times: Sequence | None = None,
    visual: Mapping | None = None,
    text: Mapping | None = None,
    titles: Mapping | None = None,
    name: str = 'data',
    genres: Mapping | None = None,
    **others: Mapping,
  ) -> 'Dataset':
    """A data set from arrays, without any file.

    Each user's last item is the test item, the one before it is the validation
    item, and the rest is for training. Users with fewer than three interactions
    are left out.

    Args:
      users: [n] ids, whole numbers or strings.
      items: [n] ids likewise, one per interaction.
      times: [n] seconds; None = the given order is the order in time.
      visual: item id -> [F] numbers; an item not in it has no image.
      text: item id -> [F] numbers likewise.
      titles: item id -> title.
      name: what to call it.
      genres: item id -> names of its genres or categories.
      **others: further feature matrices, as in `audio={...}`, likewise; an
        expert of that name reads it.

    Raises:
      UserError: arrays have different lengths, no user has three interactions,
        or features fail the integrity checks.

    >>> Dataset.of([1, 1, 1, 2, 2, 2], list('abcbcd'),
    ...            text={'a': [1, 0], 'b': [0, 1]}).features['text'].tolist()
    [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    """
    # It builds on this module.
    from fedmmr_jax.data.interactions import Interactions  # pylint: disable=g-import-not-at-top

    columns = [np.asarray(x) for x in (users, items, times) if x is not None]
    if len({x.shape for x in columns}) > 1 or columns[0].ndim != 1:
      raise UserError(
        f'{name}: users, items and times must be of one length, not '
        + ', '.join(str(x.shape) for x in columns)
      )
    interactions = Interactions.of(*columns)
    return cls._of(name, interactions, visual, text, titles, genres, others)

  @classmethod
  def of_frame(
    cls,
    frame: Any,
    options: str = '',
    visual: Mapping | None = None,
    text: Mapping | None = None,
    titles: Mapping | None = None,
    name: str = 'data',
    genres: Mapping | None = None,
    **others: Mapping,
  ) -> 'Dataset':
    """A data set from a table in memory, split as by `of`.

    Args:
      frame: of pandas or polars, an Arrow table, or anything else with Arrow's
        C interface; one row per interaction.
      options: which column is whose and which rows count, if not the usual
        ones, as `dataset` has them: 'user=who,item=what,min_rating=4'
        (data/lines.py).
      visual, text, titles, name, genres, **others: as for `of`.

    Raises:
      UserError: a column is missing or holds no ids or times, an option is
        unknown, no user has three interactions, or features fail the checks.

    >>> import pyarrow as pa
    >>> frame = pa.table({'who': [1, 1, 1], 'item_id': list('cab'),
    ...                   'day': ['2020-03-01', '2020-01-01', '2020-02-01']})
    >>> Dataset.of_frame(frame, 'user=who,time=day').item_ids.tolist()
    ['', 'a', 'b', 'c']
    """
    # These build on this module.
    from fedmmr_jax import parts  # pylint: disable=g-import-not-at-top
    from fedmmr_jax.config import Lines  # pylint: disable=g-import-not-at-top
    from fedmmr_jax.data import lines, tables  # pylint: disable=g-import-not-at-top

    _, given = parts.split(f'{name},{options}' if options else name)
    asked = parts.make(Lines, given, f'{name}: {options}')
    found = lines.apply(tables.of_frame(frame, asked, name), asked, name)
    return cls._of(name, found, visual, text, titles, genres, others)

  @classmethod
  def _of(
    cls,
    name: str,
    interactions: Any,
    visual: Mapping | None,
    text: Mapping | None,
    titles: Mapping | None,
    genres: Mapping | None,
    others: Mapping[str, Mapping],
  ) -> 'Dataset':
    # These build on this module.
    from fedmmr_jax.data import features  # pylint: disable=g-import-not-at-top
    from fedmmr_jax.data.selection import select  # pylint: disable=g-import-not-at-top

    dataset = select(name, interactions).dataset
    ids = dataset.item_ids[1:].tolist()
    made: dict[str, Any] = {
      'features': {
        kind: features.of_mapping(rows, kind, ids)
        for kind, rows in {'visual': visual, 'text': text, **others}.items()
        if rows
      }
    }
    if titles:
      made['titles'] = ('', *(str(titles.get(i, '')) for i in ids))
    if genres:
      named = (genres.get(i, ()) for i in ids)
      made['genres'] = (
        (),
        *((x,) if isinstance(x, str) else tuple(x) for x in named),
      )
    return dataclasses.replace(dataset, **made)

  @property
  def num_clients(self) -> int:
    return len(self.offsets) - 1

  @property
  def num_rows(self) -> int:
    """V, with the padding row."""
    return len(self.item_ids)

  @property
  def num_items(self) -> int:
    return self.num_rows - 1

  @property
  def lengths(self) -> np.ndarray:
    """[K] interactions of each client, held-out ones included."""
    return np.diff(self.offsets)

  @property
  def num_train(self) -> np.ndarray:
    """[K] training items of each client."""
    return self.lengths - self.held_out

  @property
  def is_train(self) -> np.ndarray:
    """[total] bool: which of `items` are trained on."""
    ends = np.repeat(self.offsets[:-1] + self.num_train, self.lengths)
    return np.arange(len(self.items)) < ends

  @property
  def num_held_out(self) -> np.ndarray:
    """[K] items of each client that are not trained on."""
    return np.broadcast_to(self.held_out, self.num_clients)

  @property
  def num_validation(self) -> np.ndarray:
    """[K] how many of these are for validation."""
    return np.broadcast_to(self.validation, self.num_clients)

  @property
  def tested(self) -> np.ndarray:
    """[n] clients with a test item, ascending."""
    return np.flatnonzero(self.num_held_out > self.num_validation)

  def targets(self, test: bool) -> tuple[np.ndarray, np.ndarray]:
    """([n] clients, ascending, [n] how many held-out items lie before each of
    their targets), of the test or of validation. An item that its client has
    nothing before is no target."""
    start = self.num_validation if test else np.zeros(self.num_clients, int)
    stop = self.num_held_out if test else self.num_validation
    start = np.maximum(start, self.num_train == 0)
    counts = np.maximum(stop - start, 0)
    client = np.repeat(np.arange(self.num_clients), counts)
    within = np.arange(len(client)) - (np.cumsum(counts) - counts)[client]
    return client, start[client] + within

  def disliked_by(self, client: int) -> np.ndarray:
    """[n] rows that a client disliked, ascending."""
    if self.disliked is None or self.dislike_offsets is None:
      return np.zeros(0, np.int32)
    return self.disliked[slice(*self.dislike_offsets[client : client + 2])]

  @property
  def num_disliked(self) -> np.ndarray:
    """[K] how many rows each client disliked."""
    if self.dislike_offsets is None:
      return np.zeros(self.num_clients, int)
    return np.diff(self.dislike_offsets)

  @property
  def max_items(self) -> int:
    """H: no client has more items, with what it disliked."""
    return int((self.lengths + self.num_disliked).max())

  def no_candidates(self, client: int, after_train: int) -> np.ndarray:
    """[n] rows that a client's target, or the place behind it, is not ranked
    against: consumed, or disliked; ascending, with the target."""
    return np.union1d(
      self.until_target(client, after_train), self.disliked_by(client)
    )

  def sequence(self, client: int) -> np.ndarray:
    """One client's items in time order."""
    return self.items[self.offsets[client] : self.offsets[client + 1]]

  def until_target(self, client: int, after_train: int) -> np.ndarray:
    """The same up to and including the target, which comes `after_train` items
    after the training items."""
    sequence = self.sequence(client)
    held_out = self.num_held_out[client]
    return sequence[: len(sequence) - held_out + after_train + 1]

  def new_test_items(self, client: int) -> np.ndarray:
    """[n] the client's test items that it had not consumed or disliked before.
    At validation they are unseen items like any other."""
    before = self.num_validation[client] - 1
    return np.setdiff1d(
      self.sequence(client), self.no_candidates(client, before)
    )

  def without_interactions(self) -> 'Dataset':
    """The same clients and items, without anything that a client consumed: what
    the server of a federation over a network knows."""
    nothing = np.zeros(self.num_clients, int)

    def as_listed(ids):  # without the width of longer ids that were left out
      return np.array(ids.tolist()) if ids.dtype.kind == 'U' else ids

    return dataclasses.replace(
      self,
      user_ids=as_listed(self.user_ids),
      item_ids=as_listed(self.item_ids),
      items=np.zeros(0, np.int32),
      offsets=np.zeros(self.num_clients + 1, np.int64),
      held_out=nothing,
      validation=nothing,
      weights=None,
      disliked=None,
      dislike_offsets=None,
    )

  def fingerprint(self) -> str:
    """SHA-256 of everything a model could learn from."""
    digest = hashlib.sha256()
    none = np.zeros((self.num_rows, 0), np.float32)
    others = sorted(set(self.features) - {'visual', 'text'})
    for array in (
      self.items,
      self.offsets,
      self.user_ids,
      self.item_ids,
      *(self.features.get(name, none) for name in ('visual', 'text')),
      *(self.features[name] for name in others),
    ):
      digest.update(f'{array.dtype}{array.shape}'.encode())
      digest.update(np.ascontiguousarray(array).tobytes())
    for number, usual in ((self.held_out, HELD_OUT), (self.validation, 1)):
      if not isinstance(number, int):
        digest.update(np.asarray(number, np.int64).tobytes())
      elif number != usual:
        digest.update(str(number).encode())
    if self.weights is not None:
      digest.update(self.weights.tobytes())
    if self.disliked is not None:
      digest.update(self.disliked.tobytes())
      digest.update(np.asarray(self.dislike_offsets, np.int64).tobytes())
    return digest.hexdigest()


class FederatedData(NamedTuple):
  """A data set on the device: the private data of all clients.

  Attributes:
    items: [total] int32, see `Dataset.items`.
    offset: [K] int32 start of each client.
    length: [K] int32 interactions, including held-out ones.
    num_train: [K] int32 how many of them are trained on.
    avoided: [total'] int32 what a client's training negatives must avoid,
      ascending and distinct within a client.
    avoided_offset: [K] int32.
    avoided_length: [K] int32.
    sampled_negatives: [K, 2, n] int32 items of the sampled protocol, n = 100 by
      default: those unseen before the validation target, and those unseen
      before the test target. The two differ at most by the test item.
    popular_negatives: [K, 2, n] int32 likewise, drawn by popularity; [K, 2, 0]
      until requested (`draw_popular`).
    num_drawable: [] int32 rows of the catalogue from which negatives are drawn
      and against which targets are ranked: V without the cold items.
    takes_part: [K] bool, False for clients held out of every cohort
      (`new_clients`), and for those with nothing to train on.
    weights: [total] float32, see `Dataset.weights`; [0] if all are alike.
    disliked: [total'] int32, see `Dataset.disliked`; [0] if nothing says so.
    disliked_offset, disliked_length: [K] int32.
  """

  items: jax.Array
  offset: jax.Array
  length: jax.Array
  num_train: jax.Array
  avoided: jax.Array
  avoided_offset: jax.Array
  avoided_length: jax.Array
  sampled_negatives: jax.Array
  popular_negatives: jax.Array
  num_drawable: jax.Array
  takes_part: jax.Array
  weights: jax.Array
  disliked: jax.Array
  disliked_offset: jax.Array
  disliked_length: jax.Array


class ClientData(NamedTuple):
  """The data of ONE client, in fixed shapes.

  Attributes:
    history: [H] int32 items in time order, including held-out ones, padded with
      0 at the end.
    num_items: [] int32 how many of them are real.
    num_train: [] int32 how many of these are trained on; 0 for a padding
      client.
    avoided: [A] int32 items that its training negatives avoid, ascending.
    num_avoided: [] int32.
    sampled_negatives: [2, n] int32, see `FederatedData`.
    num_drawable: [] int32, likewise.
    popular_negatives: [2, n] or [2, 0] int32.
    weights: [H] float32 of the history's items in the loss; [0] if all are
      alike.
    disliked: [H] int32 items that it disliked, ascending; [0] if nothing says
      so.
    num_disliked: [] int32.
  """

  history: jax.Array
  num_items: jax.Array
  num_train: jax.Array
  avoided: jax.Array
  num_avoided: jax.Array
  sampled_negatives: jax.Array
  num_drawable: jax.Array
  popular_negatives: jax.Array | np.ndarray = np.zeros((HELD_OUT, 0), np.int32)
  weights: jax.Array | np.ndarray = np.zeros(0, np.float32)
  disliked: jax.Array | np.ndarray = np.zeros(0, np.int32)
  num_disliked: jax.Array | int = 0


def to_device(
  dataset: Dataset,
  *,
  num_negatives: int,
  sampled_negatives: int,
  leaky_negatives: bool,
  seed: int,
  new_clients: float = 0.0,
) -> FederatedData:
  """Uploads a data set, with its evaluation negatives drawn from the seed.

  Args:
    dataset: the host's arrays.
    num_negatives: N, negatives of a training draw; every client must have at
      least that many unseen items.
    sampled_negatives: number of items of the sampled protocol.
    leaky_negatives: also avoid the held-out items when drawing training
      negatives (the original's leak).
    seed: of the evaluation negatives.
    new_clients: share of the clients held out of every cohort.

  Raises:
    UserError: a client has fewer unseen items than the requested negatives.
  """
  consumed, consumed_length = _distinct(dataset, dataset.lengths)
  avoided, avoided_length = (
    (consumed, consumed_length)
    if leaky_negatives
    else _distinct(dataset, dataset.num_train)
  )
  _check_unseen(dataset, consumed_length, num_negatives, sampled_negatives)
  own = np.split(consumed, np.cumsum(consumed_length)[:-1])
  sampled = np.stack(
    [
      _draw_uniform(
        generator(seed, Stream.NEGATIVES, _as_seed(user)),
        items,
        dataset.new_test_items(client),
        dataset.num_rows - dataset.num_cold,
        sampled_negatives,
      )
      for client, (user, items) in enumerate(
        zip(dataset.user_ids.tolist(), own)
      )
    ]
  )
  return FederatedData(
    items=jnp.asarray(dataset.items),
    offset=jnp.asarray(dataset.offsets[:-1], jnp.int32),
    length=jnp.asarray(dataset.lengths, jnp.int32),
    num_train=jnp.asarray(dataset.num_train, jnp.int32),
    avoided=jnp.asarray(avoided, jnp.int32),
    avoided_offset=jnp.asarray(
      np.cumsum(avoided_length) - avoided_length, jnp.int32
    ),
    avoided_length=jnp.asarray(avoided_length, jnp.int32),
    sampled_negatives=jnp.asarray(sampled, jnp.int32),
    popular_negatives=jnp.zeros((dataset.num_clients, HELD_OUT, 0), jnp.int32),
    num_drawable=jnp.int32(dataset.num_rows - dataset.num_cold),
    takes_part=jnp.zeros(dataset.num_clients, bool)
    .at[taking_part(dataset.num_train, new_clients)]
    .set(True),
    weights=jnp.asarray(
      np.zeros(0) if dataset.weights is None else dataset.weights, jnp.float32
    ),
    disliked=jnp.asarray(
      np.zeros(0) if dataset.disliked is None else dataset.disliked, jnp.int32
    ),
    disliked_offset=jnp.asarray(
      np.cumsum(dataset.num_disliked) - dataset.num_disliked, jnp.int32
    ),
    disliked_length=jnp.asarray(dataset.num_disliked, jnp.int32),
  )


def draw_new_clients(num_clients: int, share: float) -> np.ndarray:
  """[n] clients held out of every cohort, ascending.

  The draw does not depend on the run's seed, so that seeds running in parallel
  share one federation.

  Raises:
    UserError: nobody is left to train.
  """
  count = round(share * num_clients)
  if count >= num_clients:
    raise UserError(
      f'`new_clients={share}`: none of {num_clients} clients is left to train'
    )
  chosen = generator(0, Stream.NEW_CLIENTS).choice(
    num_clients, count, replace=False
  )
  return np.sort(chosen)


def old_clients(num_clients: int, new_clients: float) -> np.ndarray:
  """[n] the other clients, ascending.

  Raises:
    UserError: nobody is left to train.
  """
  return np.delete(
    np.arange(num_clients), draw_new_clients(num_clients, new_clients)
  )


def taking_part(num_train: np.ndarray, new_clients: float) -> np.ndarray:
  """[n] clients that cohorts are drawn of, ascending.

  Args:
    num_train: [K] training items of each client; those without any are left
      out.
    new_clients: share of the clients held out of every cohort.

  Raises:
    UserError: nobody is left to train.
  """
  found = old_clients(len(num_train), new_clients)
  return found[num_train[found] > 0]


def _distinct(dataset, count) -> tuple[np.ndarray, np.ndarray]:
  """Distinct items among the first count[k] of each client k, and those that it
  disliked, ascending.

  Returns:
    ([total] items client after client, [K] how many each has).
  """
  client = np.repeat(np.arange(dataset.num_clients), dataset.lengths)
  position = np.arange(len(client)) - dataset.offsets[client]
  inside = position < count[client]
  pairs = client[inside] * dataset.num_rows + dataset.items[inside]
  if dataset.disliked is not None:
    owner = np.repeat(np.arange(dataset.num_clients), dataset.num_disliked)
    pairs = np.append(pairs, owner * dataset.num_rows + dataset.disliked)
  pairs = np.unique(pairs)
  client, items = np.divmod(pairs, dataset.num_rows)
  return items, np.bincount(client, minlength=dataset.num_clients)


def client_view(
  data: FederatedData, client: jax.Array, max_items: int
) -> ClientData:
  """Cuts one client out of the flat arrays.

  Args:
    data: all clients.
    client: [] int32 index; −1 gives a padding client without any data.
    max_items: H, at least the longest client's length.
  """
  real = client >= 0
  client = jnp.maximum(client, 0)
  position = jnp.arange(max_items, dtype=jnp.int32)

  def cut(flat, offset, length):
    length = jnp.where(real, length[client], 0)
    if not len(flat):
      return flat, length
    rows = flat.at[offset[client] + position].get(mode='clip')
    return jnp.where(position < length, rows, 0), length

  history, num_items = cut(data.items, data.offset, data.length)
  avoided, num_avoided = cut(
    data.avoided, data.avoided_offset, data.avoided_length
  )
  weights, _ = cut(data.weights, data.offset, data.length)
  disliked, num_disliked = cut(
    data.disliked, data.disliked_offset, data.disliked_length
  )
  return ClientData(
    history,
    num_items,
    jnp.where(real, data.num_train[client], 0),
    avoided,
    num_avoided,
    jnp.where(real, data.sampled_negatives[client], 0),
    data.num_drawable,
    jnp.where(real, data.popular_negatives[client], 0),
    weights,
    disliked,
    num_disliked,
  )


def _check_unseen(dataset, num_consumed, num_negatives, sampled_negatives):
  client = np.argmax(num_consumed)
  unseen = dataset.num_items - dataset.num_cold - num_consumed[client]
  wanted = {
    'num_negatives': num_negatives,
    'sampled_negatives': sampled_negatives,
  }
  too_many = [
    f'`{setting}={number}`'
    for setting, number in wanted.items()
    if number > unseen
  ]
  if too_many:
    raise UserError(
      f'{dataset.name}: user {dataset.user_ids[client]} has only {unseen} '
      f'unseen items; lower {" and ".join(too_many)} to {unseen}'
    )


def draw_popular(
  dataset: Dataset, popularity: np.ndarray, count: int, seed: int
) -> np.ndarray:
  """Unseen items of each client, drawn by popularity and without replacement:
  each draw is proportional to the remaining weights.

  Args:
    dataset: the clients.
    popularity: [V] weight of each item; items of weight 0 come only when all
      others are used up.
    count: n, items for each client, which must have that many unseen ones.
    seed: of the draws.

  Returns:
    [K, 2, n] int32 distinct items, see `FederatedData.popular_negatives`.
  """
  popularity = popularity.astype(np.float64)
  popularity[0] = popularity[dataset.num_rows - dataset.num_cold :] = 0
  cumulative = np.cumsum(popularity)
  # One for all clients, for the catalogue may be large.
  is_left = np.ones(dataset.num_rows + 1, bool)
  is_left[0] = is_left[dataset.num_rows - dataset.num_cold :] = False
  drawn = np.empty((dataset.num_clients, HELD_OUT, count), np.int32)
  for client, user in enumerate(dataset.user_ids.tolist()):
    rng = generator(seed, Stream.POPULAR_NEGATIVES, _as_seed(user))
    stream = np.searchsorted(
      cumulative, rng.random(8 * count) * cumulative[-1], side='right'
    )
    consumed = np.append(dataset.sequence(client), dataset.disliked_by(client))
    is_left[consumed] = False
    drawn[client] = _draw_by_popularity(rng, stream, is_left, popularity, count)
    new = dataset.new_test_items(client)
    if new.size:  # the same stream: it is passed over no longer
      is_left[new] = True
      drawn[client, 0] = _draw_by_popularity(
        rng, stream, is_left, popularity, count
      )
    is_left[consumed] = True
  return drawn


def _draw_by_popularity(rng, stream, is_left, popularity, count):
  """[count] distinct items that are left: of a stream of items drawn by
  popularity, and if these are too few of all."""
  found = _first_distinct(stream[is_left[stream]], count)
  missing = count - len(found)
  if missing:  # the popular items are consumed: the rest of it exactly
    is_left[found] = False
    found = np.concatenate(
      [found, _draw_weighted(rng, np.flatnonzero(is_left), popularity, missing)]
    )
    is_left[found] = True
  return found


def _first_distinct(stream, count):
  """The first `count` distinct items of a stream, or as many as it has.
  Passing over what was drawn before is drawing from what is left."""
  _, first = np.unique(stream, return_index=True)
  return stream[np.sort(first)[:count]]


def _draw_weighted(rng, items, popularity, count):
  """[count] distinct ones of some items by popularity; those of weight 0 come
  when all others are used up."""
  drawn = []
  for left in (items[popularity[items] > 0], items[popularity[items] == 0]):
    more = min(count - sum(map(len, drawn)), len(left))
    if more:
      weight = popularity[left]
      drawn.append(
        rng.choice(
          left,
          more,
          replace=False,
          p=weight / weight.sum() if weight.any() else None,
        )
      )
  return np.concatenate(drawn)


def _as_seed(user: int | str) -> int:
  """A user's own number, so that its draws do not depend on the other users."""
  return zlib.crc32(user.encode()) if isinstance(user, str) else user % 2**64


def _draw_uniform(rng, consumed, new, num_rows, count):
  """[2, count] distinct items outside `consumed`; those of validation may have
  the `new` ones, [n] of `consumed`."""
  drawn = np.stack(2 * [_draw_unseen(rng, consumed, num_rows, count)])
  if new.size > 1:
    known = np.setdiff1d(consumed, new)
    drawn[0] = _draw_unseen(rng, known, num_rows, count)
  elif new.size:
    # Of one unseen item more, a draw has it with probability count / (unseen +
    # 1), beside any others: no need to draw those again.
    place = rng.integers(num_rows - len(consumed))
    drawn[0, place : place + 1] = new
  return drawn


def _draw_unseen(rng, consumed, num_rows, count):
  """[count] distinct items outside `consumed` (see negatives.py)."""
  ranks = rng.choice(num_rows - 1 - len(consumed), count, replace=False)
  below = consumed - 1 - np.arange(len(consumed))
  return ranks + 1 + np.searchsorted(below, ranks, side='right')
