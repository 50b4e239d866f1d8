"""Items held out of training, to test whether new items can be recommended.

Interactions with the held-out (cold) items are removed from all clients, and
the items are moved to the end of the catalogue, where no training negatives are
drawn. The latest cold item of each client is its target, as if it were new: it
is ranked at the end of the client's history, against all unconsumed items.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from fedmmr_jax.data.dataset import Dataset
from fedmmr_jax.data.selection import MIN_INTERACTIONS
from fedmmr_jax.errors import UserError
from fedmmr_jax.streams import generator, Stream


class ColdSplit(NamedTuple):
  """The data for evaluating cold items.

  Attributes:
    dataset: the clients and the catalogue of the training set, with the removed
      interactions: the other cold items first, where no window reaches them
      unless a history is short, and the target last.
    clients: [n] clients that have a target.
  """

  dataset: Dataset
  clients: np.ndarray


def hold_out(
  dataset: Dataset, share: float, seed: int
) -> tuple[Dataset, ColdSplit, list[int]]:
  """Splits off a share of the items.

  Args:
    dataset: with its features.
    share: of the items, in (0, 1).
    seed: of the choice.

  Returns:
    The training set, the split, and the source ids of users left out because
    fewer than MIN_INTERACTIONS of their interactions remain.

  Raises:
    UserError: no client or no cold item remains, or interactions have weights
      or dislikes.
  """
  if dataset.weights is not None or dataset.disliked is not None:
    raise UserError(
      f'`cold_items={share}` goes neither with weights of events nor with '
      'dislikes; leave these options of `dataset` out'
    )
  rng = generator(seed, Stream.COLD_ITEMS)
  num_cold = round(share * dataset.num_items)
  is_cold = np.zeros(dataset.num_rows, bool)
  is_cold[1 + rng.choice(dataset.num_items, num_cold, replace=False)] = True
  dataset = _cold_last(dataset, is_cold)
  first_cold = dataset.num_rows - num_cold

  warm, full, clients, dropped = [], [], [], []
  for client in range(dataset.num_clients):
    sequence = dataset.sequence(client)
    cold = sequence[sequence >= first_cold]
    rest = sequence[sequence < first_cold]
    if len(rest) < MIN_INTERACTIONS:
      dropped.append(dataset.user_ids[client].item())
      continue
    if len(cold):
      clients.append(len(warm))
    warm.append(rest)
    full.append(np.concatenate([cold[:-1], rest, cold[-1:]]))
  if not clients:
    raise UserError(
      f'`cold_items={share}`: nobody has consumed the {num_cold} items held '
      'out, or too little else; hold more out, or fewer'
    )
  kept = dataclasses.replace(
    dataset,
    num_cold=num_cold,
    user_ids=dataset.user_ids[~np.isin(dataset.user_ids, dropped)],
  )
  return (
    _with_sequences(kept, warm),
    ColdSplit(
      _with_sequences(dataclasses.replace(kept, num_cold=0), full),
      np.array(clients),
    ),
    dropped,
  )


def _cold_last(dataset: Dataset, is_cold: np.ndarray) -> Dataset:
  """The same data with its catalogue reordered: cold items at the end."""
  order = np.argsort(is_cold, kind='stable')  # old row of each new one
  new_row = np.argsort(order)
  return dataclasses.replace(
    dataset,
    items=new_row[dataset.items].astype(np.int32),
    item_ids=dataset.item_ids[order],
    features={name: x[order] for name, x in dataset.features.items()},
    titles=tuple(dataset.titles[i] for i in order) if dataset.titles else (),
    genres=tuple(dataset.genres[i] for i in order) if dataset.genres else (),
  )


def _with_sequences(dataset: Dataset, sequences: list[np.ndarray]) -> Dataset:
  return dataclasses.replace(
    dataset,
    items=np.concatenate(sequences),
    offsets=np.concatenate([[0], np.cumsum(list(map(len, sequences)))]),
  )
