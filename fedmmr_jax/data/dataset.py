"""Interactions of all clients as flat arrays, and their chronological split.

Sequences lie behind one another in one array with offsets (CSR), so a client
costs what its history costs and nobody is padded to the longest. On the
device, `client_view` cuts out one client with a fixed shape.

Leave-one-out in time: the last item is the test target, the one before it the
validation target, the rest is training.
"""

import dataclasses
import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax.errors import UserError

HELD_OUT = 2  # validation and test item at the end of each sequence
MIN_INTERACTIONS = HELD_OUT + 1
NEGATIVES_STREAM = 2  # see federation.COHORT_STREAM


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set on the host.

  Attributes:
    name: what to call it.
    items: [total] int32 catalogue rows (1 … V−1), client after client, in
      time order.
    offsets: [K + 1] int64; client k owns items[offsets[k]:offsets[k + 1]].
    user_ids: [K] int64 ids in the source.
    item_ids: [V] int64 ids in the source; entry 0 is 0 (padding).
    visual: [V, F] float32 features, zero row = missing; F = 0 without.
    text: [V, F] float32 features, likewise.
    titles: [V] strings, or empty if the source has none.
    num_cold: items at the end of the catalogue that nobody consumed, so that
      training never draws them as negatives (see `cold.py`).
  """

  name: str
  items: np.ndarray
  offsets: np.ndarray
  user_ids: np.ndarray
  item_ids: np.ndarray
  visual: np.ndarray
  text: np.ndarray
  titles: tuple[str, ...] = ()
  num_cold: int = 0

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

  def sequence(self, client: int) -> np.ndarray:
    """One client's items in time order."""
    return self.items[self.offsets[client]:self.offsets[client + 1]]

  def fingerprint(self) -> str:
    """SHA-256 of everything a model could learn from."""
    digest = hashlib.sha256()
    for array in (self.items, self.offsets, self.user_ids, self.item_ids,
                  self.visual, self.text):
      digest.update(f'{array.dtype}{array.shape}'.encode())
      digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class FederatedData(NamedTuple):
  """A data set on the device: the clients' private data, side by side.

  Attributes:
    items: [total] int32, see `Dataset.items`.
    offset: [K] int32 start of each client.
    length: [K] int32 interactions, held-out ones included.
    avoided: [total'] int32 what a client's training negatives must avoid,
      ascending and distinct within a client.
    avoided_offset: [K] int32.
    avoided_length: [K] int32.
    sampled_negatives: [K, n] int32 unseen items of the sampled protocol, n =
      100 by default.
    num_drawable: [] int32 rows of the catalogue that negatives are drawn from
      and targets ranked against: V without the cold ones.
  """

  items: jax.Array
  offset: jax.Array
  length: jax.Array
  avoided: jax.Array
  avoided_offset: jax.Array
  avoided_length: jax.Array
  sampled_negatives: jax.Array
  num_drawable: jax.Array


class ClientData(NamedTuple):
  """What ONE client holds, in fixed shapes.

  Attributes:
    history: [H] int32 items in time order, held-out ones included, 0 behind.
    num_items: [] int32 how many of them are real.
    avoided: [A] int32 what its training negatives avoid, ascending.
    num_avoided: [] int32.
    sampled_negatives: [n] int32.
    num_drawable: [] int32, see `FederatedData`.
  """

  history: jax.Array
  num_items: jax.Array
  avoided: jax.Array
  num_avoided: jax.Array
  sampled_negatives: jax.Array
  num_drawable: jax.Array

  @property
  def num_train(self) -> jax.Array:
    """[] int32 training items; 0 for a padding client."""
    return jnp.maximum(self.num_items - HELD_OUT, 0)


def from_interactions(
    name: str, users: np.ndarray, items: np.ndarray, times: np.ndarray,
    top_k_users: int) -> tuple[Dataset, list[int]]:
  """Groups interactions by user and renumbers users and items.

  Users keep the order of their ids, items too; only items that a kept user
  consumed are in the catalogue. Equal times keep the order of the source.

  Args:
    name: what to call the data set.
    users: [n] int64 ids.
    items: [n] int64 ids, positive.
    times: [n] timestamps.
    top_k_users: how many of the most active users to keep (ties: the lower
      id), 0 = all.

  Returns:
    The data set, without features, and the ids of users dropped because they
    have fewer than MIN_INTERACTIONS interactions.

  Raises:
    UserError: nobody is left.
  """
  order = np.lexsort((np.arange(len(users)), times, users))
  users, items = users[order], items[order]
  user_ids, counts = np.unique(users, return_counts=True)
  kept = counts >= MIN_INTERACTIONS
  dropped = user_ids[~kept].tolist()
  if top_k_users:
    by_activity = np.lexsort((user_ids, -counts))[:top_k_users]
    chosen = np.zeros(len(user_ids), bool)
    chosen[by_activity] = True
    dropped = user_ids[chosen & ~kept].tolist()
    kept &= chosen
  if not kept.any():
    raise UserError(
        f'{name}: no user has the {MIN_INTERACTIONS} interactions that '
        'training, validation and test need')
  inside = np.repeat(kept, counts)
  item_ids, rows = np.unique(items[inside], return_inverse=True)
  empty = np.zeros((len(item_ids) + 1, 0), np.float32)
  return Dataset(
      name=name,
      items=(rows + 1).astype(np.int32),
      offsets=np.concatenate([[0], np.cumsum(counts[kept])]),
      user_ids=user_ids[kept],
      item_ids=np.concatenate([[0], item_ids]).astype(np.int64),
      visual=empty, text=empty), dropped


def to_device(dataset: Dataset, *, num_negatives: int, sampled_negatives: int,
              leaky_negatives: bool, seed: int) -> FederatedData:
  """Uploads a data set, with its evaluation negatives drawn from the seed.

  Args:
    dataset: the host's arrays.
    num_negatives: N, negatives of a training draw; every client must have so
      many unseen items.
    sampled_negatives: items of the sampled protocol.
    leaky_negatives: also avoid the held-out items when drawing training
      negatives (the original's leak).
    seed: of the evaluation negatives.

  Raises:
    UserError: a client with fewer unseen items than negatives are asked for.
  """
  consumed, consumed_length = _distinct(dataset, dataset.lengths)
  avoided, avoided_length = (
      (consumed, consumed_length) if leaky_negatives
      else _distinct(dataset, dataset.lengths - HELD_OUT))
  _check_unseen(dataset, consumed_length, num_negatives, sampled_negatives)
  own = np.split(consumed, np.cumsum(consumed_length)[:-1])
  sampled = np.stack([
      _draw_unseen(np.random.default_rng([seed, NEGATIVES_STREAM, user]),
                   items, dataset.num_rows - dataset.num_cold,
                   sampled_negatives)
      for user, items in zip(dataset.user_ids.tolist(), own)])
  return FederatedData(
      items=jnp.asarray(dataset.items),
      offset=jnp.asarray(dataset.offsets[:-1], jnp.int32),
      length=jnp.asarray(dataset.lengths, jnp.int32),
      avoided=jnp.asarray(avoided, jnp.int32),
      avoided_offset=jnp.asarray(
          np.cumsum(avoided_length) - avoided_length, jnp.int32),
      avoided_length=jnp.asarray(avoided_length, jnp.int32),
      sampled_negatives=jnp.asarray(sampled, jnp.int32),
      num_drawable=jnp.int32(dataset.num_rows - dataset.num_cold))


def _distinct(dataset, count) -> tuple[np.ndarray, np.ndarray]:
  """Distinct items among the first count[k] of each client k, ascending.

  Returns:
    ([total] items client after client, [K] how many each has).
  """
  client = np.repeat(np.arange(dataset.num_clients), dataset.lengths)
  position = np.arange(len(client)) - dataset.offsets[client]
  inside = position < count[client]
  pairs = np.unique(
      client[inside] * dataset.num_rows + dataset.items[inside])
  client, items = np.divmod(pairs, dataset.num_rows)
  return items, np.bincount(client, minlength=dataset.num_clients)


def client_view(data: FederatedData, client: jax.Array,
                max_items: int) -> ClientData:
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
    rows = flat.at[offset[client] + position].get(mode='clip')
    return jnp.where(position < length, rows, 0), length

  history, num_items = cut(data.items, data.offset, data.length)
  avoided, num_avoided = cut(
      data.avoided, data.avoided_offset, data.avoided_length)
  return ClientData(
      history, num_items, avoided, num_avoided,
      jnp.where(real, data.sampled_negatives[client], 0), data.num_drawable)


def _check_unseen(dataset, num_consumed, num_negatives, sampled_negatives):
  client = np.argmax(num_consumed)
  unseen = dataset.num_items - dataset.num_cold - num_consumed[client]
  for flag, wanted in (('num_negatives', num_negatives),
                       ('sampled_negatives', sampled_negatives)):
    if wanted > unseen:
      raise UserError(
          f'{dataset.name}: user {dataset.user_ids[client]} has only {unseen} '
          f'unseen items; lower --{flag}={wanted}')


def _draw_unseen(rng, consumed, num_rows, count):
  """[count] distinct items outside `consumed` (see negatives.py)."""
  ranks = rng.choice(num_rows - 1 - len(consumed), count, replace=False)
  below = consumed - 1 - np.arange(len(consumed))
  return ranks + 1 + np.searchsorted(below, ranks, side='right')
