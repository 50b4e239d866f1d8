"""Vectors of items and users for an index of approximate nearest neighbours.

A model without experts scores by inner products of an item with the sequence
and, where the model has profiles, with the profile; what experts add depends on
user and item both, and no vector holds it. How much of a list the vectors find
is measured by an exact search.
"""

import pathlib
from functools import partial
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax.deploy.artefact import write_json
from fedmmr_jax.deploy.scorer import ITEMS, Scorer, Weights
from fedmmr_jax.evaluation.recommendation import People
from fedmmr_jax.models.feddmmr import Candidates
from fedmmr_jax.models.profile import States
from fedmmr_jax.simulation import Simulation

FOLDER = 'vectors'
LISTED = 10  # items of the lists that are to be found
FETCHED = (10, 100)  # best by vectors, among which they are sought
_MOST_COMPARED = 1000  # users
_BATCH = 64


def write(
  folder: pathlib.Path, simulation: Simulation, weights: Weights
) -> dict[str, Any]:
  """Writes `vectors/` of an artefact.

  `items.npy` [V, D] float32; `users.npy` [K, Q, D] float32, which ask what
  follows everything that each client consumed; their ids, `users.json` [K].

  Args:
    folder: the artefact.
    simulation: the run.
    weights: in float32.

  Returns:
    For the manifest: the metric of each of the Q vectors, what they leave out,
    and the share of the lists of LISTED items that is among the FETCHED best by
    vectors, what a user has consumed aside.
  """
  dataset, model = simulation.dataset, simulation.model
  scorer = Scorer.of(simulation, min(LISTED, dataset.num_items))
  people = People.of_clients(simulation, np.arange(dataset.num_clients))
  users = _in_batches(partial(_queries, scorer, weights), people.history)
  place = folder / FOLDER
  place.mkdir()
  np.save(place / 'items.npy', weights[ITEMS])
  np.save(place / 'users.npy', users)
  write_json(place / 'users.json', dataset.user_ids.tolist())
  compared = np.linspace(
    0, len(users) - 1, min(len(users), _MOST_COMPARED)
  ).astype(int)
  found = _in_batches(
    partial(_found, scorer, weights), people.history[compared], users[compared]
  )
  cosine = not model.is_backbone_only and _is_cosine(scorer)
  return {
    'metrics': ['cosine' if cosine else 'inner_product', 'inner_product'][
      : scorer.num_queries
    ],
    'left_out': ''
    if model.is_backbone_only
    else 'what the experts add, which depends on user and item both',
    'users_compared': len(compared),
    'recall': {
      f'{LISTED} of {fetched}': float(share)
      for fetched, share in zip(FETCHED, found.mean(axis=0))
    },
  }


def _is_cosine(scorer: Scorer) -> bool:
  return scorer.config.model.fusion.similarity != 'dot'


def _in_batches(
  program: Callable[..., jax.Array], *arrays: np.ndarray
) -> np.ndarray:
  """The program's results for all rows, on the host."""
  count = len(arrays[0])
  found = []
  for start in range(0, count, _BATCH):
    batch = [x[start : start + _BATCH] for x in arrays]
    missing = min(count, _BATCH) - len(batch[0])
    batch = [
      np.pad(x, [(0, max(missing, 0))] + [(0, 0)] * (x.ndim - 1)) for x in batch
    ]
    found.append(np.asarray(program(*batch)))
  return np.concatenate(found)[:count]


@partial(jax.jit, static_argnames='scorer')
def _queries(scorer: Scorer, weights: Weights, history: jax.Array) -> jax.Array:
  """[b, Q, D]; the compiler drops the scoring."""
  return scorer(weights, history)['queries']


@partial(jax.jit, static_argnames='scorer')
def _found(
  scorer: Scorer, weights: Weights, history: jax.Array, queries: jax.Array
) -> jax.Array:
  """[b, len(FETCHED)] share of a list that is among the best by vectors."""
  listed = scorer(weights, history)['top_rows']

  def one(history, queries, listed):
    scores = by_vectors(scorer, weights[ITEMS], queries)
    scores = scores.at[history].set(-jnp.inf).at[0].set(-jnp.inf)
    # Rank by the number of better ones: 0 is the best.
    ranks = jnp.sum(scores > scores[listed][:, None], axis=1)
    is_item = listed > 0
    return jnp.stack(
      [
        jnp.sum((ranks < fetched) & is_item) / jnp.maximum(jnp.sum(is_item), 1)
        for fetched in FETCHED
      ]
    )

  return jax.vmap(one)(history, queries, listed)


def by_vectors(
  scorer: Scorer, items: jax.Array, queries: jax.Array
) -> jax.Array:
  """[V] scores of items [V, D] by one person's queries [Q, D]: those of the
  model without what its experts add."""
  nothing = jnp.zeros((len(items), 0))
  candidates = Candidates(
    items, jnp.zeros_like(items), {}, nothing, nothing > 0
  )
  state: Any = queries[0]
  if scorer.num_queries > 1:
    state = States(queries[0], queries[1], jnp.any(queries[1] != 0))
  return scorer.model.score(state, candidates)
