"""The embedded data set: users whose interests drift over clusters of items.

* Items fall into clusters; inside a cluster, popularity is Zipf-like.
* A user starts in one cluster and, with probability DRIFT, moves to another
  cluster after an item; otherwise the next item comes from the current cluster.
  The next cluster is usually the same for all users (a cycle), so there is a
  sequence to learn, not only a taste.
* Visual and text features are the cluster's direction plus noise, each in its
  own space, of unit length: both carry the cluster, and they differ.
* A share MISSING of the items has no image, and another share MISSING no text.

No user consumes an item twice. Everything is determined by the seed.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from fedmmr_jax.data.interactions import Interactions
from fedmmr_jax.data.selection import Filters, select, Selected
from fedmmr_jax.streams import generator, Stream

NUM_CLUSTERS = 12
VISUAL_DIM, TEXT_DIM = 64, 48
FIRST_DAY, DAY = 946_684_800, 86_400  # 2000-01-01, in seconds since 1970
SPREAD = 30  # days over which users begin
MIN_LENGTH, MAX_LENGTH = 15, 60
DRIFT = 0.25  # probability to leave the current cluster after an item
CYCLE = 0.8  # probability that it then is the cycle's next cluster
MAX_TRIES = 20  # draws of seen items after which a user leaves a cluster
MISSING = 0.1  # share of items without image, and without text
NOISE = 1.0  # length of the noise relative to the cluster's direction


def generate(
  num_users: int, num_items: int, seed: int, filters: Filters = Filters()
) -> tuple[Selected, dict[str, np.ndarray]]:
  """Draws a data set.

  Args:
    num_users: K.
    num_items: items to choose from; one that nobody consumed is not in the
      catalogue.
    seed: of everything.
    filters: which users and items are kept.

  Returns:
    What is kept, without features, and the feature matrices 'visual' and
    'text' by item id, [num_items + 1, F].
  """
  rng = generator(seed, Stream.SYNTHETIC)
  cluster = rng.integers(NUM_CLUSTERS, size=num_items + 1)
  popularity = 1.0 / (1 + rng.permutation(num_items + 1)) ** 0.8
  users, items = _walks(
    rng, num_users, _Clusters.build(cluster[1:], popularity[1:])
  )
  selected = select(
    'synthetic', Interactions.of(users, items, _times(users)), filters
  )
  dataset = selected.dataset
  titles = (
    '',
    *(f'item {i} of cluster {cluster[i]}' for i in dataset.item_ids[1:]),
  )
  matrices = {
    'visual': _features(rng, cluster, VISUAL_DIM),
    'text': _features(rng, cluster, TEXT_DIM),
  }
  return selected._replace(
    dataset=dataclasses.replace(dataset, titles=titles)
  ), matrices


def _times(users: np.ndarray) -> np.ndarray:
  """[n] float64: each user begins on a day of its own and consumes an item a
  day."""
  _, start, position = np.unique(users, return_index=True, return_inverse=True)
  since_start = np.arange(len(users)) - start[position]
  return FIRST_DAY + DAY * (users % SPREAD + since_start).astype(np.float64)


class _Clusters(NamedTuple):
  """Items sorted by cluster, and how to draw one of a cluster.

  Attributes:
    items: [num_items] item ids, cluster after cluster.
    popularity: [num_items + 1] cumulative, in that order, from 0.
    bounds: [NUM_CLUSTERS + 1] where each cluster starts in `items`.
  """

  items: np.ndarray
  popularity: np.ndarray
  bounds: np.ndarray

  @classmethod
  def build(cls, cluster, popularity) -> '_Clusters':
    order = np.argsort(cluster, kind='stable')
    return cls(
      order + 1,
      np.concatenate([[0], np.cumsum(popularity[order])]),
      np.searchsorted(cluster[order], np.arange(NUM_CLUSTERS + 1)),
    )

  def draw(self, rng, cluster) -> np.ndarray:
    """An item of each given cluster by popularity; 0 if it is empty."""
    low, high = self.bounds[cluster], self.bounds[cluster + 1]
    start, end = self.popularity[low], self.popularity[high]
    at = (
      np.searchsorted(
        self.popularity,
        start + rng.random(len(cluster)) * (end - start),
        side='right',
      )
      - 1
    )
    # The minimum guards against a draw rounded up to the cluster's end.
    at = np.minimum(at, np.maximum(high - 1, low))
    return np.where(
      high > low, self.items[np.minimum(at, len(self.items) - 1)], 0
    )


def _walks(rng, num_users, clusters) -> tuple[np.ndarray, np.ndarray]:
  """(user, item) of all users' walks, each user's in time order.

  All users step together; who draws an item it had draws again.
  """
  longest = min(MAX_LENGTH, len(clusters.items) // 2)
  length = rng.integers(MIN_LENGTH, longest + 1, num_users)
  current = rng.integers(NUM_CLUSTERS, size=num_users)
  walked = np.zeros((num_users, longest), np.int64)
  for step in range(longest):
    waiting = np.flatnonzero(length > step)
    tries = 0
    while waiting.size:
      item = clusters.draw(rng, current[waiting])
      fresh = (item > 0) & ~np.any(
        walked[waiting, :step] == item[:, None], axis=1
      )
      walked[waiting[fresh], step] = item[fresh]
      waiting = waiting[~fresh]
      tries += 1
      if tries % MAX_TRIES == 0:  # has (nearly) all of its cluster: goes on
        current[waiting] = (current[waiting] + 1) % NUM_CLUSTERS
    leaves = rng.random(num_users) < DRIFT
    elsewhere = np.where(
      rng.random(num_users) < CYCLE,
      (current + 1) % NUM_CLUSTERS,
      rng.integers(NUM_CLUSTERS, size=num_users),
    )
    current = np.where(leaves, elsewhere, current)
  taken = np.arange(longest) < length[:, None]
  users = np.repeat(np.arange(1, num_users + 1), length)
  return users, walked[taken]


def _features(rng, cluster, width) -> np.ndarray:
  """[items + 1, width] float32 unit rows; zero where missing, and row 0."""
  direction = rng.normal(size=(NUM_CLUSTERS, width))
  direction /= np.linalg.norm(direction, axis=1, keepdims=True)
  noise = rng.normal(size=(len(cluster), width)) * NOISE / width**0.5
  rows = direction[cluster] + noise
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  rows[rng.random(len(rows)) < MISSING] = 0
  rows[0] = 0
  return rows.astype(np.float32)
