"""The popularity baseline: items ranked by how often they were consumed in
training, the same for all users."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax.data.dataset import client_view, Dataset, FederatedData
from fedmmr_jax.evaluation import ranking
from fedmmr_jax.evaluation.ranking import Ranks, Targets


def training_counts(
  dataset: Dataset, clients: np.ndarray | None = None
) -> np.ndarray:
  """[V] int: training interactions with each item, of all clients or some."""
  counted = dataset.is_train
  if clients is not None:
    theirs = np.isin(np.arange(dataset.num_clients), clients)
    counted &= np.repeat(theirs, dataset.lengths)
  return np.bincount(dataset.items[counted], minlength=dataset.num_rows)


def rank(
  counts: np.ndarray,
  data: FederatedData,
  targets: Targets,
  max_items: int,
  aim: np.ndarray | None = None,
) -> Ranks:
  """Ranks of some targets, [n] on the host.

  Args:
    counts: [V] scores of the items.
    data: all clients' data.
    targets: [n] what to rank.
    max_items: H, the longest client's number of interactions.
    aim: [] int32 the item that an attack promotes.
  """
  ranks = _rank(
    jnp.asarray(counts, jnp.float32),
    data,
    tuple(targets[:3]),
    ranking.SPLITS[targets.split],
    max_items,
    aim,
  )
  return jax.tree.map(np.asarray, ranks)


@partial(jax.jit, static_argnames='max_items')
def _rank(scores, data, targets, split, max_items, aim) -> Ranks:
  def rank_one(target):
    client, after_train, known = target
    view = client_view(data, client, max_items)
    return ranking.rank_client(
      scores,
      view,
      view.num_train + after_train,
      view.num_train + known,
      split,
      aim,
    )

  return jax.lax.map(rank_one, targets)
