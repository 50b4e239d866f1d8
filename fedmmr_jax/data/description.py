"""What is in a set of interactions, before anything is trained on it."""

from typing import Any, NamedTuple

import numpy as np

from fedmmr_jax.data.dataset import Dataset
from fedmmr_jax.data.interactions import Interactions
from fedmmr_jax.data.selection import (
  Filters,
  in_order,
  needed,
  odd_times,
  select,
)

QUANTILES = (0, 10, 25, 50, 75, 90, 100)


class Times(NamedTuple):
  """When the interactions happened.

  Attributes:
    first, last: seconds since 1970.
    tied: share of the interactions that bear the time of their user's one
      before.
    in_order: share of the neighbouring lines whose times do not fall.
    odd: how many lie before FIRST_YEAR or in the future.
  """

  first: float
  last: float
  tied: float
  in_order: float
  odd: int


class Description(NamedTuple):
  """Of interactions as a file holds them, before any filter.

  Attributes:
    interactions, users, items: how many.
    times: None if the file has none.
    duplicates: interactions that are there once more, with the same time.
    repeats: share of the interactions with an item that the user had before.
    of_users, of_items: [7] interactions of a user and of an item at QUANTILES
      (per cent of the users and items).
    lengths: [users] interactions of each.
  """

  interactions: int
  users: int
  items: int
  times: Times | None
  duplicates: int
  repeats: float
  of_users: np.ndarray
  of_items: np.ndarray
  lengths: np.ndarray


class HeldOut(NamedTuple):
  """What a run would not train on.

  Attributes:
    validation, test: number of targets.
    repeated: share of the test items that their client had before.
    untrained: share of the test items that nobody trains on.
  """

  validation: int
  test: int
  repeated: float
  untrained: float


def describe(interactions: Interactions) -> Description:
  """Counts what there is; what people disliked is no interaction."""
  if interactions.disliked is not None:
    interactions = interactions.where(~interactions.disliked)
  table = in_order(interactions)
  num_users, num_items = map(len, interactions[3:5])
  lengths = np.bincount(table.users, minlength=num_users)
  popularity = np.bincount(table.items, minlength=num_items)
  lengths, popularity = lengths[lengths > 0], popularity[popularity > 0]
  return Description(
    len(table.users),
    len(lengths),
    len(popularity),
    _times(interactions, table.tied()) if table.times is not None else None,
    table.duplicates(),
    table.repeats() / max(len(table.users), 1),
    np.percentile(lengths, QUANTILES),
    np.percentile(popularity, QUANTILES),
    lengths,
  )


def _times(interactions: Interactions, tied: np.ndarray) -> Times:
  times = np.asarray(interactions.times)
  return Times(
    float(times.min()),
    float(times.max()),
    float(tied.mean()) if len(tied) else 0.0,
    float((np.diff(times) >= 0).mean()) if len(times) > 1 else 1.0,
    odd_times(times),
  )


def filtered(
  name: str, interactions: Interactions, filters: Filters
) -> list[tuple[str, int, int, int]]:
  """(Filter, users, items, interactions) after each filter, in their order.

  Raises:
    UserError: they leave nobody.
  """
  least = needed(interactions, filters._replace(k_core=0))
  steps = [(f'at least {least} interactions', {})]
  if filters.k_core:
    steps.append((f'{filters.k_core}-core', {'k_core': filters.k_core}))
  if filters.top_k_users:
    steps.append(
      (
        f'the {filters.top_k_users} most active users',
        {'top_k_users': filters.top_k_users},
      )
    )
  if filters.test_from is not None:
    steps = [
      (f'{what}, along the timeline', more | {'test_from': filters.test_from})
      for what, more in steps
    ]
  found, chosen = [], Filters(min_interactions=filters.min_interactions)
  for what, more in steps:
    chosen = chosen._replace(**more)
    left = select(name, interactions, chosen).dataset
    found.append((what, left.num_clients, left.num_items, len(left.items)))
  return found


def held_out(dataset: Dataset) -> HeldOut:
  """What the split of a data set keeps from training."""
  known = np.bincount(
    dataset.items[dataset.is_train], minlength=dataset.num_rows
  )
  client, after = dataset.targets(test=True)
  at = dataset.offsets[client] + dataset.num_train[client] + after
  rows = dataset.items[at]
  repeated = [
    row in dataset.until_target(k, n - 1)
    for k, n, row in zip(client, after, rows)
  ]
  return HeldOut(
    len(dataset.targets(test=False)[0]),
    len(rows),
    float(np.mean(repeated)) if len(rows) else 0.0,
    float(np.mean(known[rows] == 0)) if len(rows) else 0.0,
  )


def span_of_ids(ids: np.ndarray) -> str:
  """From which to which, and what they are."""
  kind = 'whole numbers' if ids.dtype.kind == 'i' else 'texts'
  return f'{len(ids):,} {kind}, {ids[0]} to {ids[-1]}'


def bars(lengths: np.ndarray, width: int = 40) -> list[tuple[str, int, int]]:
  """(Range, users, length of its bar) of history lengths, each range twice as
  long as the one before."""
  edges = 2 ** np.arange(int(lengths.max()).bit_length() + 1)
  counts = np.histogram(lengths, edges)[0]
  rows: list[tuple[str, int, int]] = []
  for low, high, count in zip(edges[:-1], edges[1:], counts):
    if count or rows:
      name = f'{low}' if high - low == 1 else f'{low} to {high - 1}'
      bar = -(-int(count) * width // int(counts.max()))
      rows.append((name, int(count), bar))
  return rows


def first_sequences(
  dataset: Dataset, count: int, shown: int
) -> list[dict[str, Any]]:
  """The first clients: their id, how many items they have, what ends their
  training sequence, and the held-out items."""
  found = []
  for client in range(min(count, dataset.num_clients)):
    rows = dataset.sequence(client).tolist()
    trained = int(dataset.num_train[client])
    found.append(
      {
        'user': dataset.user_ids[client],
        'length': len(rows),
        'training': [_named(dataset, row) for row in rows[:trained][-shown:]],
        'validation': [
          _named(dataset, row)
          for row in rows[trained : trained + dataset.num_validation[client]]
        ],
        'test': [
          _named(dataset, row)
          for row in rows[trained + dataset.num_validation[client] :]
        ],
      }
    )
  return found


def _named(dataset: Dataset, row: int) -> str:
  title = dataset.titles[row] if dataset.titles else ''
  return title or f'item {dataset.item_ids[row]}'
