"""The embedded data set: users whose interests drift over clusters of items.

* Items fall into clusters; inside a cluster, popularity is Zipf-like.
* A user starts in one cluster and with probability DRIFT moves on to another
  one after an item; otherwise the next item comes from the current cluster.
  The successor cluster is usually the same for everybody (a cycle), so there
  is a sequence to learn, not only a taste.
* Visual and text features are the cluster's direction plus noise, each in its
  own space, of unit length: they really carry the cluster, and differ.
* MISSING of the items have no image, another MISSING no text.

Nobody consumes an item twice. Everything follows from the seed.
"""

import dataclasses

import numpy as np

from fedmmr_jax.data.dataset import Dataset, from_interactions

SYNTHETIC_STREAM = 3  # see federation.COHORT_STREAM
NUM_CLUSTERS = 12
VISUAL_DIM, TEXT_DIM = 64, 48
MIN_LENGTH, MAX_LENGTH = 15, 60
DRIFT = 0.25       # probability to leave the current cluster after an item
CYCLE = 0.8        # probability that it then is the cycle's next cluster
MISSING = 0.1      # share of items without image, and without text
NOISE = 1.0        # length of the noise relative to the cluster's direction


def generate(num_users: int, num_items: int, seed: int,
             top_k_users: int = 0
             ) -> tuple[Dataset, dict[str, np.ndarray]]:
  """Draws a data set.

  Args:
    num_users: K.
    num_items: items to choose from; one that nobody consumed is not in the
      catalogue.
    seed: of everything.
    top_k_users: keep the k most active users, 0 = all.

  Returns:
    The data set without features, and the feature matrices 'visual' and
    'text' by item id, [num_items + 1, F].
  """
  rng = np.random.default_rng([seed, SYNTHETIC_STREAM])
  cluster = rng.integers(NUM_CLUSTERS, size=num_items + 1)
  popularity = 1.0 / (1 + rng.permutation(num_items + 1)) ** 0.8
  members = [np.flatnonzero((cluster == c) & (np.arange(num_items + 1) > 0))
             for c in range(NUM_CLUSTERS)]

  users, items = [], []
  for user in range(1, num_users + 1):
    sequence = _walk(rng, members, popularity, num_items)
    users.append(np.full(len(sequence), user))
    items.append(sequence)
  users, items = np.concatenate(users), np.concatenate(items)
  dataset, _ = from_interactions(
      'synthetic', users, items, np.arange(len(users)), top_k_users)
  titles = ('', *(f'item {i} of cluster {cluster[i]}'
                  for i in dataset.item_ids[1:]))
  matrices = {'visual': _features(rng, cluster, VISUAL_DIM),
              'text': _features(rng, cluster, TEXT_DIM)}
  return dataclasses.replace(dataset, titles=titles), matrices


def _walk(rng, members, popularity, num_items) -> list[int]:
  """One user's items in time order."""
  length = rng.integers(MIN_LENGTH, min(MAX_LENGTH, num_items // 2) + 1)
  current = rng.integers(NUM_CLUSTERS)
  # Gumbel noise on log popularity, sorted, is a draw without replacement.
  appeal = np.log(popularity) + rng.gumbel(size=len(popularity))
  queues = [list(m[np.argsort(appeal[m])]) for m in members]
  sequence = []
  while len(sequence) < length:
    if queues[current]:
      sequence.append(queues[current].pop())
    if not queues[current] or rng.random() < DRIFT:
      if rng.random() < CYCLE:
        current = (current + 1) % NUM_CLUSTERS
      else:
        current = rng.integers(NUM_CLUSTERS)
  return sequence


def _features(rng, cluster, width) -> np.ndarray:
  """[items + 1, width] float32 unit rows; zero where missing, and row 0."""
  direction = rng.normal(size=(NUM_CLUSTERS, width))
  direction /= np.linalg.norm(direction, axis=1, keepdims=True)
  noise = rng.normal(size=(len(cluster), width)) * NOISE / width ** 0.5
  rows = direction[cluster] + noise
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  rows[rng.random(len(rows)) < MISSING] = 0
  rows[0] = 0
  return rows.astype(np.float32)
