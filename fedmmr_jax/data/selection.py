"""Interactions -> the clients and the catalogue of a run: filters, time order,
and held-out items.

The splits, and which items of a client are for training, validation and test:

    leave_one_out
      training: all but the last two items
      validation: the second-to-last item
      test: the last item
    timeline
      training: all items before the date except the last of them
      validation: the last item before the date
      test: the first item from the date on; a client may have none
    given
      as the data say; where nothing is for validation, a client's last training
      item is, if it has two. There may be several targets, or none, and clients
      that train on nothing

In a timeline split no client trains on data from the future (Ji et al. 2023,
ACM TOIS 41(3)). With leave-one-out this can happen: the training items of one
client may be later than the test item of another.
"""

import datetime
import time
from typing import NamedTuple

import numpy as np

from fedmmr_jax.data import split
from fedmmr_jax.data.dataset import Dataset, HELD_OUT
from fedmmr_jax.data.interactions import Interactions
from fedmmr_jax.errors import UserError

# One to train on, one to validate, one to test.
MIN_INTERACTIONS = HELD_OUT + 1
# What people log happened from then on, and not in the future.
FIRST_YEAR, _DAY = 1990, 86_400
_COUNTED = 1_000_000  # interactions


class Filters(NamedTuple):
  """Which users and items are kept.

  Attributes:
    k_core: the number of interactions that users need, and that items need in
      training, both counted among what is left (0 = no filter). Held-out
      interactions do not count for an item, so that its presence in the
      catalogue reveals nothing about the targets.
    min_interactions: the number that users need, including held-out ones.
    top_k_users: how many of these users to keep, the most active first; ties:
      the lower id (0 = all).
    test_from: date of a timeline split, in seconds since 1970; None =
      leave-one-out, or the parts that the interactions have.
    cut_validation: whether a given split has no part for validation, so that
      the last training items are; `select` sees to it.
  """

  k_core: int = 0
  min_interactions: int = MIN_INTERACTIONS
  top_k_users: int = 0
  test_from: float | None = None
  cut_validation: bool = False


class Selected(NamedTuple):
  """What the filters leave.

  Attributes:
    dataset: without features.
    dropped_users: source ids of users that have too few interactions.
    notes: lines about what was found and left out.
  """

  dataset: Dataset
  dropped_users: list
  notes: tuple[str, ...]


def select(
  name: str,
  interactions: Interactions,
  filters: Filters = Filters(),
  whole_catalogue: bool = False,
  tested: bool = True,
) -> Selected:
  """Groups interactions by user and renumbers users and items.

  Users keep the order of their ids, items too; only items that a kept user
  consumed are in the catalogue, with `whole_catalogue` all of `item_ids` (where
  a federation has agreed on them). Equal times keep the order of the source.

  Raises:
    UserError: no user is left, or with `tested` none has a test item.
  """
  if filters.test_from is not None and interactions.times is None:
    raise UserError(
      f'{name}: `split_by=timeline` needs timestamps, and these '
      'interactions have none; say `split_by=leave_one_out`'
    )
  everything = interactions
  if everything.disliked is not None:
    interactions = everything.where(~everything.disliked)
  table = in_order(interactions)
  if table.parts is not None:  # decided before a filter leaves some out
    filters = filters._replace(
      cut_validation=not (table.parts == split.VALIDATION).any()
    )
  notes = [
    *_about_times(table, interactions.unit),
    *_about_repeats(table),
    *_about_parts(table, interactions),
  ]
  size = len(interactions.user_ids)
  kept = _filtered(table, interactions, filters)
  sizes = kept.sizes(size, filters)
  if filters.k_core:
    notes.append(_about_core(filters, table, kept))
  dropped = interactions.user_ids[
    (np.bincount(table.users, minlength=size) > 0) & (sizes.used == 0)
  ]
  if not len(kept.users):
    least = needed(interactions, filters)
    raise UserError(
      f'{name}: no user has the {least} interactions that '
      + (
        'training, validation and test need'
        if least <= MIN_INTERACTIONS
        else '`min_interactions` and `k_core` ask for'
      )
    )
  if filters.top_k_users:
    kept = kept.where(_most_active(sizes.used, filters.top_k_users)[kept.users])
    sizes = kept.sizes(size, filters)
  if tested and not (sizes.held_out > sizes.validation)[kept.users].any():
    raise UserError(
      f'{name}: no test item has an item of its user before it'
      if interactions.parts is not None
      else f'{name}: no user has an interaction before the date of the split '
      'and one from it on; choose a date within ' + _span(table.times)
    )
  kept = kept.where(kept.positions(size) < sizes.used[kept.users])
  num_items = len(interactions.item_ids) if whole_catalogue else None
  kept, sated = _without_sated(kept, size, num_items)
  if sated.any():
    notes.append(
      f'users      {sated.sum()} have consumed every item '
      f'({interactions.user_ids[sated][0]}): nothing is left to rank for '
      'them, so they are left out'
    )
  sizes = sizes._replace(used=np.where(sated, 0, sizes.used))
  if filters.test_from is not None:
    notes.append(_about_split(table, filters, sizes))
  return Selected(
    _dataset(name, kept, interactions, sizes, everything, whole_catalogue),
    dropped.tolist(),
    tuple(notes),
  )


def sequences(
  interactions: Interactions, rows: np.ndarray
) -> list[tuple[int | str, np.ndarray]]:
  """(a user's id, rows of the user's items in time order) of all users; what
  they disliked is left out.

  Args:
    interactions: of the file.
    rows: [number of item ids] row of each item in a catalogue, 0 = none: its
      interactions are left out.
  """
  if interactions.disliked is not None:
    interactions = interactions.where(~interactions.disliked)
  table = in_order(interactions)
  sizes = np.bincount(table.users, minlength=len(interactions.user_ids))
  split = np.split(rows[table.items], np.cumsum(sizes)[:-1])
  return [
    (user, items[items > 0])
    for user, items in zip(interactions.user_ids.tolist(), split)
  ]


class _Sizes(NamedTuple):
  """[U] of each user: interactions in use, how many of them are held out, and
  how many of these for validation."""

  used: np.ndarray
  held_out: np.ndarray
  validation: np.ndarray


class Table(NamedTuple):
  """Interactions ordered by user, then part of a given split, then time; `rows`
  are their places in the source."""

  users: np.ndarray
  items: np.ndarray
  times: np.ndarray | None
  parts: np.ndarray | None
  rows: np.ndarray

  def where(self, keep: np.ndarray) -> 'Table':
    return Table(*(None if x is None else x[keep] for x in self))

  def tied(self) -> np.ndarray:
    """[n - 1] bool, who bears the time of the user's interaction before."""
    if self.times is None:
      return np.zeros(max(len(self.users) - 1, 0), bool)
    return (np.diff(self.users) == 0) & (np.diff(self.times) == 0)

  def duplicates(self) -> int:
    """How many are there once more: same user, item and time."""
    again = self.tied()
    if not again.any() or self.times is None:
      return 0
    tied = np.append(again, False) | np.insert(again, 0, False)
    users, items, times = (
      column[tied] for column in (self.users, self.items, self.times)
    )
    order = np.lexsort((items, times, users))
    same = [np.diff(column[order]) == 0 for column in (users, items, times)]
    return int(np.logical_and.reduce(same).sum())

  def repeats(self) -> int:
    """How many are with an item that their user had before."""
    if not len(self.users):
      return 0
    pairs = self.users.astype(np.int64) * (int(self.items.max()) + 1)
    pairs += self.items
    return len(pairs) - len(np.unique(pairs))

  def positions(self, num_users: int) -> np.ndarray:
    """[n] how many of its user's lie before each."""
    counts = np.bincount(self.users, minlength=num_users)
    starts = np.cumsum(counts) - counts
    return np.arange(len(self.users)) - starts[self.users]

  def sizes(self, num_users: int, filters: Filters) -> _Sizes:
    counts = np.bincount(self.users, minlength=num_users)
    one = np.ones(num_users, int)
    if self.parts is not None:
      return self._given_sizes(counts, filters.cut_validation)
    if filters.test_from is None:
      return _Sizes(counts, HELD_OUT * one, one)
    before = np.bincount(
      self.users[self.times < filters.test_from], minlength=num_users
    )
    has_test = counts > before
    return _Sizes(before + has_test, HELD_OUT - 1 + has_test, one)

  def _given_sizes(self, counts: np.ndarray, cut_validation: bool) -> _Sizes:
    train, validation = (
      np.bincount(self.users[self.parts == part], minlength=len(counts))
      for part in (split.TRAIN, split.VALIDATION)
    )
    if cut_validation:
      validation = (train > 1).astype(int)
      train = train - validation
    return _Sizes(counts, counts - train, validation)


def in_order(interactions: Interactions) -> Table:
  """By user, part and time; equal times keep the order of the source."""
  users, items, times = interactions[:3]
  order = _order([users, interactions.parts, times])
  return Table(
    users[order],
    items[order],
    None if times is None else times[order],
    None if interactions.parts is None else interactions.parts[order],
    order,
  )


def _order(columns: list[np.ndarray | None]) -> np.ndarray:
  """[n] the stable order by the first column, then the second, …; None = none.

  Whole numbers that fit into one are sorted as one, in half the time."""
  keys = [column for column in columns if column is not None]
  combined, span = np.zeros(len(keys[0]), np.int64), 1
  for key in keys:
    least, most = (key.min(), key.max()) if len(key) else (0, 0)
    width = int(most - least) + 1
    span *= width
    if span >= 2**62 or (key.dtype.kind == 'f' and (key % 1).any()):
      return np.lexsort(keys[::-1])
    combined = combined * width + (key - least).astype(np.int64)
  return np.argsort(combined, kind='stable')


def needed(interactions: Interactions, filters: Filters) -> int:
  """How many interactions a user needs."""
  least = filters.min_interactions
  if interactions.parts is not None and least == MIN_INTERACTIONS:
    least -= 1  # a target, and an item before it
  return max(least, filters.k_core)


def _filtered(
  table: Table, interactions: Interactions, filters: Filters
) -> Table:
  """Takes away what is too rare until nothing is."""
  num_users, num_items = map(len, interactions[3:5])
  least = needed(interactions, filters)
  while True:
    sizes = table.sizes(num_users, filters)
    keep = (sizes.used >= least)[table.users]
    if filters.k_core:
      trained = (
        table.positions(num_users) < (sizes.used - sizes.held_out)[table.users]
      )
      counts = np.bincount(table.items[trained], minlength=num_items)
      keep &= (counts >= filters.k_core)[table.items]
    if keep.all():
      return table
    table = table.where(keep)


def _without_sated(
  table: Table, num_users: int, num_all: int | None
) -> tuple[Table, np.ndarray]:
  """Takes away users who have consumed every item there is (`num_all`, or those
  that somebody has); [num_users] bool, who they are. Where all have, they stay:
  what needs unseen items says so."""
  sated, before = np.zeros(num_users, bool), table
  while True:
    if not len(table.users):
      return before, np.zeros(num_users, bool)
    num_items = num_all or np.count_nonzero(np.bincount(table.items))
    many = np.bincount(table.users, minlength=num_users) >= num_items
    now = np.zeros(num_users, bool)
    for user in np.flatnonzero(many):  # hardly any: a sort of all costs more
      own = np.searchsorted(table.users, [user, user + 1])
      now[user] = len(np.unique(table.items[slice(*own)])) == num_items
    if not now.any():
      return table, sated
    sated |= now
    table = table.where(~now[table.users])


def _most_active(used: np.ndarray, count: int) -> np.ndarray:
  """[U] bool."""
  chosen = np.zeros(len(used), bool)
  chosen[np.argsort(-used, kind='stable')[:count]] = True
  return chosen


def _dataset(
  name: str,
  kept: Table,
  interactions: Interactions,
  sizes: _Sizes,
  everything: Interactions,
  whole_catalogue: bool,
) -> Dataset:
  is_kept = np.bincount(kept.users, minlength=len(sizes.used)) > 0
  is_item = np.bincount(kept.items, minlength=len(interactions.item_ids)) > 0
  is_item |= whole_catalogue
  rows = np.cumsum(is_item, dtype=np.int32)
  item_ids = interactions.item_ids[is_item]
  held_out, validation = sizes.held_out[is_kept], sizes.validation[is_kept]
  disliked, dislikes = _dislikes(kept, sizes, everything, rows * is_item)
  offsets = np.concatenate([[0], np.cumsum(dislikes[is_kept])])
  weights = interactions.weights
  return Dataset(
    name=name,
    items=rows[kept.items],
    offsets=np.concatenate([[0], np.cumsum(sizes.used[is_kept])]),
    user_ids=interactions.user_ids[is_kept],
    item_ids=np.concatenate([np.zeros(1, item_ids.dtype), item_ids]),
    held_out=HELD_OUT if (held_out == HELD_OUT).all() else held_out,
    validation=1 if (validation == 1).all() else validation,
    weights=None if weights is None else weights[kept.rows],
    disliked=disliked if disliked.size else None,
    dislike_offsets=offsets if disliked.size else None,
  )


def _dislikes(
  kept: Table, sizes: _Sizes, everything: Interactions, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """([n] rows of the catalogue, user after user and ascending, [U] how many are
  whose): what users disliked before their first held-out item, in the training
  part if there are parts, and never had among their training items."""
  num_users = len(sizes.used)
  if everything.disliked is None:
    return np.zeros(0, np.int32), np.zeros(num_users, int)
  # Without times the order of lines is that of time.
  times = everything.times
  when = np.arange(len(everything.users)) if times is None else times
  liked = np.flatnonzero(~everything.disliked)
  position = kept.positions(num_users)
  trains = position < (sizes.used - sizes.held_out)[kept.users]
  first = np.full(num_users, np.inf)
  np.minimum.at(first, kept.users[~trains], when[liked[kept.rows[~trains]]])
  # Left out with their users:
  gone = np.bincount(kept.users, minlength=num_users) == 0
  first[gone] = -np.inf
  users, items = everything.users, rows[everything.items]
  early = everything.disliked & (items > 0) & (when < first[users])
  if everything.parts is not None:
    early &= everything.parts == split.TRAIN
  size = int(rows.max()) + 1
  pairs = np.unique(users[early].astype(np.int64) * size + items[early])
  trained = kept.users[trains].astype(np.int64) * size
  trained += rows[kept.items[trains]]
  users, items = np.divmod(np.setdiff1d(pairs, trained), size)
  return items.astype(np.int32), np.bincount(users, minlength=num_users)


def odd_times(times: np.ndarray) -> int:
  """How many of them, seconds since 1970, hardly are when somebody did
  something."""
  earliest = datetime.datetime(FIRST_YEAR, 1, 1, tzinfo=datetime.timezone.utc)
  early = times < earliest.timestamp()
  return int((early | (times > time.time() + _DAY)).sum())


def _span(times: np.ndarray) -> str:
  return ' to '.join(
    str(np.datetime64(int(t), 's'))[:10] for t in (times.min(), times.max())
  )


def _about_times(table: Table, unit: str) -> list[str]:
  if table.times is None:
    return ['time       none in the file: its order counts']
  tied, odd = table.tied(), odd_times(table.times)
  notes = []
  if unit:
    how = unit if unit == 'dates' else f'numbers of {unit}'
    notes.append(f'time       {_span(table.times)}, from {how}')
  # Where all are, they may be any numbers that rise.
  if 0 < odd < len(table.times) / 2:
    notes.append(
      f'time       {odd} interactions lie before {FIRST_YEAR} or in the '
      'future: are their times in the unit of the others?'
    )
  if tied.any():
    notes.append(
      f'time       {tied.mean():.1%} of the interactions bear the time of '
      "the user's one before; they keep the order of the file"
    )
  return notes


def _about_repeats(table: Table) -> list[str]:
  notes: list[str] = []
  copies = table.duplicates()
  if copies:
    notes.append(
      f'duplicates {copies} interactions are there more than once, with the '
      'same time; all are kept'
    )
  # Of many users some tell it as well, and sorting all would take a while.
  step = 1 + len(table.users) // _COUNTED
  some = table.where(table.users % step == 0) if step > 1 else table
  repeated = some.repeats()
  if repeated:
    notes.append(
      f'repeats    {repeated / len(some.users):.1%} of the interactions '
      + (f'of every {step}th user ' if step > 1 else '')
      + 'are with an item that the user had before'
    )
  return notes


def _about_parts(table: Table, interactions: Interactions) -> list[str]:
  if table.parts is None:
    return []
  counts = np.bincount(table.parts, minlength=len(split.PARTS))
  if not counts[split.TRAIN] or not counts[split.TEST]:
    return []  # refused below
  notes = [
    'split      given: '
    + ', '.join(f'{n} {part}' for n, part in zip(counts, split.PARTS))
    + (
      ''
      if counts[split.VALIDATION]
      else "; a client's last training item is its validation item"
    )
  ]
  num_users = len(interactions.user_ids)
  trains = np.zeros(num_users, bool)
  trains[table.users[table.parts == split.TRAIN]] = True
  new = np.unique(table.users[~trains[table.users]])
  if new.size:
    notes.append(
      f'           {new.size} users are in no training part '
      f'({interactions.user_ids[new[0]]}): they are ranked, and never train'
    )
  if table.times is None:
    notes.append(
      '           without times each target is ranked after those before it; '
      'where the order of lines is none, say `split_by=given,history=train`'
    )
  else:
    latest = np.full(num_users, -np.inf)
    is_train = table.parts == split.TRAIN
    np.maximum.at(latest, table.users[is_train], table.times[is_train])
    early = table.times[~is_train] < latest[table.users[~is_train]]
    if early.any():
      notes.append(
        f'           {early.mean():.1%} of the targets are earlier than a '
        "training item of their user: what is ranked knows the user's future"
      )
  return notes


def _about_core(filters: Filters, before: Table, kept: Table) -> str:
  def lost(name):
    return len(np.unique(getattr(before, name))) - len(
      np.unique(getattr(kept, name))
    )

  return (
    f'{filters.k_core}-core     {lost("users")} users, {lost("items")} '
    f'items and {len(before.users) - len(kept.users)} interactions left '
    'out'
  )


def _about_split(before: Table, filters: Filters, sizes: _Sizes) -> str:
  future = (before.times >= filters.test_from).sum()
  tested = ((sizes.held_out > sizes.validation) & (sizes.used > 0)).sum()
  return (
    f'split      along the timeline: {future} interactions lie after the '
    f'date, the first one of each of {tested} clients is its test item'
  )
