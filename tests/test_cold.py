"""Items held out of training."""

import dataclasses

import numpy as np
import pytest

from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.data import cold as cold_lib
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import popularity
from tests import small


@pytest.fixture(scope='module')
def split():
  dataset = small.dataset()
  dataset = dataclasses.replace(
    dataset,
    titles=tuple(f'item {i}' for i in dataset.item_ids),
    genres=tuple((f'of {i}',) for i in dataset.item_ids),
  )
  return dataset, *cold_lib.hold_out(dataset, 0.2, seed=3)


def sequences(dataset):
  """User id -> source ids of its items."""
  return {
    int(user): dataset.item_ids[dataset.sequence(k)].tolist()
    for k, user in enumerate(dataset.user_ids)
  }


def test_training_has_no_cold_item_and_all_others(split):
  before, warm, cold, _ = split
  assert warm.num_cold == round(0.2 * before.num_items)
  cold_ids = set(warm.item_ids[-warm.num_cold :].tolist())
  assert not cold_ids & set(warm.item_ids[warm.items].tolist())
  for user, items in sequences(warm).items():
    kept = [i for i in sequences(before)[user] if i not in cold_ids]
    assert items == kept


def test_the_target_is_the_latest_cold_item_and_stands_last(split):
  before, warm, cold, _ = split
  cold_ids = set(warm.item_ids[-warm.num_cold :].tolist())
  evaluated = sequences(cold.dataset)
  for client in cold.clients:
    user = int(cold.dataset.user_ids[client])
    own = [i for i in sequences(before)[user] if i in cold_ids]
    assert evaluated[user][-1] == own[-1]
    assert sorted(evaluated[user]) == sorted(sequences(before)[user])


def test_rows_keep_their_features_and_titles(split):
  before, warm, _, _ = split
  row_before = {i: r for r, i in enumerate(before.item_ids.tolist())}
  for row, item in enumerate(warm.item_ids.tolist()):
    np.testing.assert_array_equal(
      warm.features['visual'][row], before.features['visual'][row_before[item]]
    )
    assert warm.titles[row] == f'item {item}'
    assert warm.genres[row] == (f'of {item}',)


def test_users_left_with_too_little_are_left_out_and_named():
  dataset = small.dataset()
  _, cold, dropped = cold_lib.hold_out(dataset, 0.85, seed=0)
  assert dropped
  assert not set(dropped) & set(cold.dataset.user_ids.tolist())
  assert len(dropped) + cold.dataset.num_clients == dataset.num_clients


def test_nothing_held_out_is_refused():
  with pytest.raises(UserError, match='`cold_items=0.001`'):
    cold_lib.hold_out(small.dataset(), 0.001, seed=0)


@pytest.mark.slow
def test_cold_rows_are_never_trained_and_can_be_ranked(split):
  _, warm, cold, _ = split
  config = small.config(
    **small.PLAIN,
    num_negatives=10,
    client_fraction=1.0,
    client_optimizer='adam,weight_decay=0',
  )
  simulation = simulation_lib.build(config, warm, cold)
  start = simulation.init_state()
  before = np.asarray(start.server.params['item_embedding']).copy()
  state, _ = simulation.run_round(start, 1, simulation.sample_cohort(1))
  after = np.asarray(state.server.params['item_embedding'])
  moved = np.abs(after - before).max(axis=1) > 0
  assert moved[1 : -warm.num_cold].mean() > 0.9
  assert not moved[-warm.num_cold :].any()
  metrics, ranks = simulation.evaluate(state, 'cold')
  assert len(ranks.full) == len(cold.clients)
  assert 0 <= metrics['sampled']['HR@10'] <= 1
  # Neither is a candidate for the other items' rankings.
  simulation_test = simulation.evaluate(state, 'test')[1]
  assert simulation_test.full.max() <= warm.num_items - warm.num_cold
  assert np.asarray(simulation.data.sampled_negatives).max() < (
    warm.num_rows - warm.num_cold
  )
  # A client gets new items recommended, but not those that it consumed.
  for client in cold.clients[:3]:
    items, _ = simulation.recommend(state, client, warm.num_rows)
    consumed = cold.dataset.sequence(client)
    assert not np.isin(items, consumed).any()
    assert len(items) == warm.num_items - len(consumed)
  # Nobody consumed them in training: popularity ranks them last.
  popular = simulation.rank_by_popularity('cold')
  assert (popular.sampled == config.data.sampled_negatives).all()


def test_popularity_counts_training_interactions_only():
  dataset = small.dataset()
  counts = popularity.training_counts(dataset)
  expected = np.zeros(dataset.num_rows, int)
  for client in range(dataset.num_clients):
    np.add.at(expected, dataset.sequence(client)[:-2], 1)
  np.testing.assert_array_equal(counts, expected)


def test_popularity_ranks_by_count():
  simulation = small.simulation()
  counts = popularity.training_counts(simulation.dataset)
  ranks = simulation.rank_by_popularity('test')
  for client in range(3):
    own = simulation.dataset.sequence(client)
    rest = np.setdiff1d(np.arange(1, simulation.dataset.num_rows), own)
    assert ranks.full[client] == (counts[rest] >= counts[own[-1]]).sum()
