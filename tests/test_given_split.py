"""A given split in the federation: several targets of a client, clients that
never train; dislikes and weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.client import scoring, windows
from fedmmr_jax.client import update as client_lib
from fedmmr_jax.data.dataset import client_view, taking_part
from fedmmr_jax.data.interactions import Interactions
from fedmmr_jax.data.selection import select
from fedmmr_jax.evaluation import (
  ablation,
  audit,
  ranking,
  recommendation,
  user_results,
)
from tests import small

# Of clients 0 to 8 (`small.dataset`) the training, validation and test items.
SIZES = [(4, 1, 0), (3, 2, 3), (6, 0, 1), (0, 2, 3), (0, 0, 3), (5, 1, 1)]


def dataset(seed=0):
  rng = np.random.default_rng(seed)
  users, items, parts = [], [], []
  for user, sizes in enumerate(SIZES, 1):
    users += [user] * sum(sizes)
    items += rng.permutation(np.arange(1, 61))[: sum(sizes)].tolist()
    parts += np.repeat([0, 1, 2], sizes).tolist()
  users += [7] * 30
  items += list(range(1, 31))
  parts += [0] * 28 + [1, 2]
  interactions = Interactions.of(np.array(users), np.array(items))._replace(
    parts=np.array(parts, np.int8)
  )
  found = select('given', interactions).dataset
  text = rng.normal(size=(found.num_rows, 10)).astype(np.float32)
  text[0] = 0
  return dataclasses.replace(found, features={'text': text, 'visual': -text})


def build(data=None, **changes):
  return simulation_lib.build(
    small.config(**{'split_by': 'given', **small.ONE_EXPERT, **changes}),
    data or dataset(),
  )


@pytest.fixture(scope='module')
def trained():
  simulation = build().with_popular_negatives()
  *_, last = simulation.rounds()
  return simulation, last.state


def test_targets_and_what_lies_before_them():
  data = dataset()
  client, after = data.targets(test=True)
  # Clients 0 and 2 … by their numbers; client 4's first item is no target.
  np.testing.assert_array_equal(client, [1, 1, 1, 2, 3, 3, 3, 4, 4, 5, 6])
  np.testing.assert_array_equal(after, [2, 3, 4, 0, 2, 3, 4, 1, 2, 1, 1])
  client, after = data.targets(test=False)
  np.testing.assert_array_equal(client, [0, 1, 1, 3, 5, 6])
  np.testing.assert_array_equal(after, [0, 0, 1, 1, 0, 0])
  of_training = ranking.Targets.of(data, 'test', 'train')
  # Client 4 has neither training nor validation items.
  np.testing.assert_array_equal(of_training.client, [1, 1, 1, 2, 3, 3, 3, 5, 6])
  np.testing.assert_array_equal(of_training.known, [2, 2, 2, 0, 2, 2, 2, 1, 1])


@pytest.mark.parametrize('history', ['all', 'train'])
@pytest.mark.slow
def test_each_target_is_ranked_as_if_it_were_the_only_one(trained, history):
  simulation, state = trained
  simulation = build(split_by=f'given,history={history}')
  data = simulation.dataset
  _, ranks = simulation.evaluate(state, 'test')
  targets = simulation.ranked_targets('test')
  own, rows = simulation.targets('test')
  for n, (client, row) in enumerate(zip(own, rows)):
    known = data.num_train[client] + targets.known[n]
    sequence = data.sequence(client)
    if history == 'all':
      assert known == data.num_train[client] + targets.after_train[n]
    scores = ranking.score_client(
      simulation.model,
      simulation.compiled_config,
      state.server,
      np.pad(sequence, (0, simulation.max_items - len(sequence))),
      np.int32(known),
      data.num_train[client].astype(np.int32),
      jax.tree.map(lambda x: x[client], state.memories),
      simulation.catalogue,
    )
    others = np.setdiff1d(
      np.arange(1, data.num_rows), np.append(sequence[:known], row)
    )
    assert ranks.full[n] == (scores[others] >= scores[row]).sum()


@pytest.mark.slow
def test_of_a_client_the_mean_over_its_targets_counts(trained):
  simulation, state = trained
  means, ranks = simulation.evaluate(state, 'test')
  clients, _ = simulation.targets('test')
  by_client = [
    np.mean(ranks.full[clients == k] < 10) for k in np.unique(clients)
  ]
  assert np.isclose(means['full']['HR@10'], np.mean(by_client))
  results = user_results.evaluate(simulation, state, 'test')
  assert results.num_users == 6 and len(results.users) == 11
  assert np.isclose(results.means()['full']['HR@10'], np.mean(by_client))
  assert not results.repeated.any()
  np.testing.assert_array_equal(
    results.candidates[:3],
    [simulation.dataset.num_items - n for n in (6, 7, 8)],
  )


@pytest.mark.slow
def test_who_trains_on_nothing_is_in_no_cohort():
  simulation = build(client_fraction=1.0)
  np.testing.assert_array_equal(
    taking_part(simulation.num_train, 0.0), [0, 1, 2, 5, 6]
  )
  cohort = simulation.sample_cohort(1)
  assert set(cohort[cohort >= 0]) == {0, 1, 2, 5, 6}
  assert float(np.asarray(simulation.data.takes_part).sum()) == 5
  # And what they consume changes nothing that is trained, bit for bit.
  other = simulation.dataset.items.copy()
  start, stop = simulation.dataset.offsets[[3, 5]]
  other[start:stop] = 1 + (other[start:stop] + 5) % 30
  changed = build(
    dataclasses.replace(simulation.dataset, items=other), client_fraction=1.0
  )
  states = [list(s.rounds(count=2))[-1].state for s in (simulation, changed)]
  small.assert_trees_equal(states[0].server, states[1].server)


@pytest.mark.slow
def test_a_client_that_is_all_training_trains_its_own_rows():
  """A table of a client's own rows changes rounding only, for a client that
  holds nothing out too."""
  users = np.repeat(np.arange(2), (22, 8))
  items = np.append(np.arange(1, 23), np.arange(21, 29))
  parts = np.append(np.zeros(22), [0, 0, 0, 0, 0, 1, 2, 2]).astype(np.int8)
  data = select(
    'all', Interactions.of(users, items)._replace(parts=parts)
  ).dataset
  found = []
  for vocabulary in ('local', 'dense'):
    simulation = simulation_lib.build(
      small.config(
        split_by='given',
        experts='none',
        vocabulary=vocabulary,
        batch_size=5,
        client_optimizer='sgd',
        num_negatives=4,
        sampled_negatives=3,
        client_fraction=1.0,
      ),
      data,
    )
    *_, last = simulation.rounds(count=1)
    found.append(jax.device_get(last.state.server.params))
  small.assert_trees_close(*found, rtol=1e-4, atol=1e-6)


def test_what_can_never_be_ranked_is_refused():
  # The only validation item has nothing before it.
  users = np.array([1] * 5 + [2] + [3] * 4)
  items = np.array([1, 2, 3, 4, 5, 6, 1, 2, 3, 7])
  parts = np.array([0, 0, 0, 0, 2, 1, 0, 0, 0, 2], np.int8)
  data = select(
    'few', Interactions.of(users, items)._replace(parts=parts)
  ).dataset
  message = small.error_of(
    simulation_lib.build,
    small.config(
      split_by='given', experts='none', num_negatives=1, sampled_negatives=1
    ),
    data,
  )
  assert 'few: no validation item has an item before it' in message


def test_ranked_clients_are_those_with_targets():
  simulation = build(eval_clients=3)
  for split in ('val', 'test'):
    assert len(simulation.ranked_targets(split).client)


def test_lists_for_who_never_trained_are_asked_after_something():
  simulation = build()
  people = recommendation.People.of_clients(simulation, [3, 4, 1], 'test')
  # Clients 3 and 4 train on nothing; 3 has two validation items.
  np.testing.assert_array_equal(people.length, [2, 1, 5])


def test_an_ablation_takes_the_mean_of_a_client():
  ranks = ranking.Ranks(
    full=np.array([[0, 99, 99]]),
    sampled=np.array([[0, 99, 99]]),
    bad_scores=np.zeros((1, 3)),
  )
  outcome = ablation.Outcome(
    {'test': ranks}, [1], {}, {}, 1.0, clients={'test': [4, 4, 7]}
  )
  np.testing.assert_array_equal(outcome.of_each_user('full', 'HR@10'), [0.5, 0])
  assert outcome.of_each_seed('full', 'HR@10') == [0.25]


def test_disliked_test_items_are_no_negatives_of_validation():
  data = small.dataset()
  later = [data.new_test_items(k) for k in range(data.num_clients)]
  data = dataclasses.replace(
    data,
    disliked=np.concatenate(later).astype(np.int32),
    dislike_offsets=np.concatenate([[0], np.cumsum([len(x) for x in later])]),
  )
  for seed in range(8):
    simulation = simulation_lib.build(small.config(seed=seed), data)
    drawn = np.asarray(simulation.data.sampled_negatives)
    assert not any(np.isin(drawn[k], x).any() for k, x in enumerate(later))


def test_negatives_of_validation_may_hold_any_test_item():
  data = dataset()
  drawn = {
    seed: np.asarray(build(data, seed=seed).data.sampled_negatives)
    for seed in range(12)
  }
  for client in range(data.num_clients):
    sequence, trains = data.sequence(client), data.num_train[client]
    known = trains + data.num_validation[client]
    at_validation = np.concatenate([x[client, 0] for x in drawn.values()])
    at_test = np.concatenate([x[client, 1] for x in drawn.values()])
    assert not np.isin(at_validation, sequence[:known]).any()
    assert not np.isin(at_test, sequence).any()
  # Client 1 has three test items and some 40 others: 12 draws of 10.
  later = data.sequence(1)[-3:]
  assert np.isin([x[1, 0] for x in drawn.values()], later).any()


@pytest.mark.slow
def test_the_audit_knows_a_given_split(trained):
  simulation, _ = trained
  checks = audit.all_checks(simulation, rounds=1)
  assert all(check.passed for check in checks), checks
  (check,) = [c for c in checks if c.name == 'given split']
  assert '0 of 17 targets are training items' in check.found
  # Client 0 trains on its validation item.
  items = simulation.dataset.items.copy()
  items[0] = items[simulation.num_train[0]]
  leaking = build(dataclasses.replace(simulation.dataset, items=items))
  (check,) = audit.given_split(leaking)
  assert not check.passed and '1 of 17 targets' in check.found


@pytest.mark.slow
def test_local_only_ranks_all_targets(trained):
  simulation, _ = trained
  ranks = simulation.rank_local_only(simulation.init_state())
  assert ranks['test'].full.shape == (11,) and ranks['val'].full.shape == (6,)
  # What ranks a client's targets does not depend on which others it has.
  data = simulation.dataset
  assert simulation.rank_by_popularity('test').full.shape == (11,)
  counts = np.bincount(data.items[data.is_train], minlength=data.num_rows)
  clients, rows = simulation.targets('test')
  last = data.sequence(clients[-1])
  others = np.setdiff1d(np.arange(1, data.num_rows), last)
  expected = (counts[others] >= counts[rows[-1]]).sum()
  assert simulation.rank_by_popularity('test').full[-1] == expected


def disliking(**changes):
  """Client 0 disliked 30 items, client 1 one, the others none."""
  data = small.dataset()
  own = np.setdiff1d(np.arange(1, data.num_rows), data.sequence(0))[:30]
  one = np.setdiff1d(np.arange(1, data.num_rows), data.sequence(1))[:1]
  offsets = np.full(data.num_clients + 1, 31)
  offsets[:2] = 0, 30
  data = dataclasses.replace(
    data,
    disliked=np.concatenate([own, one]).astype(np.int32),
    dislike_offsets=offsets,
  )
  changes = dict(sampled_negatives=3, num_negatives=4) | changes
  return simulation_lib.build(small.config(**changes), data), own, one


@pytest.mark.parametrize('negatives', ['shared', 'per_sample'])
def test_dislikes_are_negatives_and_never_neutral_ones(negatives):
  simulation, own, one = disliking(negatives=negatives, num_negatives=8)
  config = simulation.compiled_config
  for client, disliked, count in ((0, own, 2), (1, one, 1), (2, [], 0)):
    view = client_view(simulation.data, client, simulation.max_items)
    seen = []
    for seed in range(20):
      drawn = scoring.draw_negatives(jax.random.key(seed), view, config)
      rows = np.asarray(drawn).reshape(-1, 8)
      assert np.isin(rows[:, :count], disliked).all()
      assert not np.isin(rows[:, count:], disliked).any()
      assert all(len(set(row[:count])) == count for row in rows.tolist())
      seen += rows[:, :count].reshape(-1).tolist()
    assert len(set(seen)) > min(10, len(disliked) - 1)


def test_dislikes_are_no_candidates():
  simulation, own, _ = disliking()
  simulation = simulation.with_popular_negatives()
  for name in ('sampled_negatives', 'popular_negatives'):
    drawn = np.asarray(getattr(simulation.data, name))
    assert not np.isin(drawn[0], own).any()
  state = simulation.init_state()
  results = user_results.evaluate(simulation, state, 'test')
  consumed = len(np.unique(simulation.dataset.sequence(0)))
  assert results.candidates[0] == simulation.dataset.num_items - consumed - 30
  assert results.full[0] < results.candidates[0]
  rows, _ = simulation.recommend(state, 0, 100)
  assert not np.isin(rows, own).any()
  assert len(rows) == results.candidates[0]


def test_the_audit_knows_dislikes():
  simulation = disliking(num_negatives=8)[0].with_popular_negatives()
  for check in (
    audit.training_negatives(simulation),
    audit.catalogue_filter(simulation),
    audit.evaluation_negatives(simulation),
    audit.validation_candidates(simulation),
  ):
    assert check.passed, check


def test_weights_weigh_the_losses_of_their_targets():
  data = small.dataset()
  weights = np.random.default_rng(0).uniform(0.1, 2, len(data.items))
  weighted = dataclasses.replace(data, weights=weights.astype(np.float32))
  simulation = simulation_lib.build(small.config(), weighted)
  view = client_view(simulation.data, 2, simulation.max_items)
  start = data.offsets[2]
  batch = windows.cut_windows(view, jnp.arange(2), jnp.ones(2, bool), 6, 6)
  np.testing.assert_allclose(
    batch.weight[batch.valid],
    weights[start + np.asarray(batch.position)[np.asarray(batch.valid)]],
    rtol=1e-6,
  )
  importance = client_lib._importance(batch, simulation.compiled_config)
  plain = client_lib._importance(
    batch._replace(weight=None), simulation.compiled_config
  )
  np.testing.assert_allclose(
    importance, plain * np.asarray(batch.weight).reshape(-1), rtol=1e-6
  )


@pytest.mark.slow
def test_equal_weights_change_nothing():
  data = small.dataset()
  states = []
  for weights in (None, np.ones(len(data.items), np.float32)):
    simulation = simulation_lib.build(
      # SGD: Adam makes rounding visible.
      small.config(client_optimizer='sgd', client_learning_rate=0.1),
      dataclasses.replace(data, weights=weights),
    )
    *_, last = simulation.rounds(count=1)
    states.append(jax.device_get(last.state.server))
  small.assert_trees_close(*states)
