"""Items that were trained little lean on those like them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import fedmmr_jax as fm
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.data import cold as cold_lib
from fedmmr_jax.models import shrinkage
from tests import small

# Rows 1 to 4; 3 points nearly where 1 does, 4 has no feature.
FEATURES = np.array([[0, 0], [1, 0], [0, 1], [0.8, 0.6], [0, 0]], np.float32)


def test_by_hand(monkeypatch):
  monkeypatch.setattr(shrinkage, 'NUM_NEIGHBOURS', 1)
  counts = np.array([0, 6, 2, 0, 9])
  found = shrinkage.neighbours([FEATURES], counts, 2.0)
  np.testing.assert_array_equal(found.index[1:4, 0], [2, 1, 1])
  np.testing.assert_allclose(found.own, [1, 6 / 8, 2 / 4, 0, 1])
  embedded = jnp.array([[0, 0], [3.0, 4], [2, 0], [9, 9], [7, 7]])
  content = jnp.array([[0, 0], [1.0, 1], [1, 1], [1, 1], [0, 0]])
  table = shrinkage.shrunk(embedded - content, embedded, found) + content
  np.testing.assert_allclose(
    table,
    [
      [0, 0],
      # A quarter of item 2, and half of item 1; item 3 stands where 1 does.
      [0.75 * 3 + 0.25 * 2, 3],
      [1 + 1.5, 2],
      [3, 4],
      [7, 7],
    ],
    rtol=1e-6,
  )


def test_a_prior_is_as_long_as_its_neighbours():
  counts = np.array([0, 5, 5, 0, 0])
  found = shrinkage.neighbours([FEATURES], counts, 1.0)
  assert found.index.shape == (5, 1)  # of two known items, one is the other
  counts[4] = 5
  features = FEATURES.copy()
  features[4] = [0.6, 0.8]
  found = shrinkage.neighbours([features], counts, 1.0)
  embedded = jnp.array([[0, 0], [3.0, 0], [0, 3], [0, 0], [-3, 0]])
  new = shrinkage.shrunk(embedded, embedded, found)[3]
  assert float(jnp.linalg.norm(new)) == pytest.approx(3.0, rel=1e-5)


def test_weights_lean_on_what_is_near_and_known():
  rng = np.random.default_rng(0)
  features = rng.normal(size=(50, 8)).astype(np.float32)
  features[0] = 0
  counts = rng.integers(0, 30, 50)
  found = shrinkage.neighbours([features, features[:, :3]], counts, 1.0)
  joined = shrinkage._joined([features, features[:, :3]])
  cosine = joined @ joined.T
  for item in (1, 17):
    cosine[item, item] = -2
    known = np.flatnonzero(counts > 0)
    known = known[known != 0]
    best = known[np.argsort(-cosine[item, known])][: shrinkage.NUM_NEIGHBOURS]
    np.testing.assert_array_equal(found.index[item], best)
    weight = np.exp(5 * cosine[item, best]) * np.log1p(counts[best])
    np.testing.assert_allclose(
      found.weight[item], weight / weight.sum(), rtol=1e-4
    )


def test_without_features_nothing_moves():
  found = shrinkage.neighbours([np.zeros((4, 2))], np.arange(4), 1.0)
  table = jnp.arange(8.0).reshape(4, 2)
  np.testing.assert_array_equal(shrinkage.shrunk(table, table, found), table)


CONTENT = 'content_plus_id,shrinkage=2'


@pytest.mark.slow
def test_ranking_uses_it_and_training_does_not():
  simulation = small.simulation(**small.PLAIN, item_embedding=CONTENT)
  (step,) = simulation.rounds(count=1)
  table = np.asarray(step.state.server.params['item_embedding'])
  ranked = simulation.as_ranked(step.state.server).params['item_embedding']
  assert np.any(np.asarray(ranked) != table, axis=1)[1:].mean() > 0.8
  plain = small.simulation(**small.PLAIN, item_embedding='content_plus_id')
  (other,) = plain.rounds(count=1)
  np.testing.assert_array_equal(
    other.state.server.params['item_embedding'], table
  )
  assert plain.as_ranked(other.state.server) is other.state.server
  # Lists and ranks are of the same embeddings.
  people = fm.People.of_clients(simulation, np.arange(2))
  lists = fm.recommend(simulation, step.state, people, 3)
  rows, scores = simulation.recommend(step.state, 0, 3)
  np.testing.assert_array_equal(lists.rows[0], rows)
  np.testing.assert_allclose(lists.scores[0], scores, rtol=1e-5)
  assert (simulation.sketch_traffic().bytes_up) == (
    8 * simulation.num_train.sum()
  )


def test_held_out_items_do_not_count():
  """Exchanging what is held out moves no neighbour and no weight."""
  dataset = small.dataset()
  items = dataset.items.copy()
  ends = dataset.offsets[1:]
  items[ends - 1], items[ends - 2] = items[ends - 2], items[ends - 1].copy()
  found = [
    simulation_lib.build(small.config(item_embedding=CONTENT), data)._neighbours
    for data in (dataset, dataclasses.replace(dataset, items=items))
  ]
  small.assert_trees_equal(*found)
  counts = np.bincount(
    dataset.items[dataset.is_train], minlength=dataset.num_rows
  )
  present = np.any(dataset.features['text'] != 0, axis=1) | np.any(
    dataset.features['visual'] != 0, axis=1
  )
  np.testing.assert_allclose(
    found[0].own[1:], np.where(present, counts / (counts + 2), 1)[1:], rtol=1e-6
  )


@pytest.mark.slow
def test_a_new_item_stands_where_its_neighbours_do():
  dataset, split, _ = cold_lib.hold_out(small.dataset(), 0.2, seed=0)
  config = small.config(**small.PLAIN, item_embedding=CONTENT, cold_items=0.2)
  simulation = simulation_lib.build(config, dataset, split)
  (step,) = simulation.rounds(count=1)
  table = simulation.as_ranked(step.state.server).params['item_embedding']
  content = (
    simulation.catalogue.content
    @ (step.state.server.params['content_projection'])
  )
  embedded = np.asarray(table + content)
  new = np.arange(dataset.num_rows - dataset.num_cold, dataset.num_rows)
  found = simulation._neighbours
  before = np.asarray(step.state.server.params['item_embedding'] + content)
  for item in new:
    if not found.own[item]:
      mean = found.weight[item] @ before[found.index[item]]
      cosine = mean @ embedded[item]
      cosine /= np.linalg.norm(mean) * np.linalg.norm(embedded[item])
      assert cosine == pytest.approx(1, abs=1e-4)
  assert simulation.evaluate(step.state, 'cold')[0]['full']['HR@10'] >= 0
