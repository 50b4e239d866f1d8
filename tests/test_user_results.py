"""What an evaluation tells of each user."""

import dataclasses

import numpy as np
import pytest
from pyarrow import parquet

from fedmmr_jax import metrics
from fedmmr_jax.data import dataset as dataset_lib
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import popularity, user_results
from fedmmr_jax.streams import generator, Stream
from tests import small


@pytest.fixture(scope='module')
def evaluated():
  simulation = small.simulation().with_popular_negatives()
  state = simulation.init_state()
  return simulation, user_results.evaluate(simulation, state, 'test'), state


def test_popular_negatives_are_unseen_distinct_and_trained(evaluated):
  simulation = evaluated[0]
  counts = popularity.training_counts(simulation.dataset)
  for client, of_splits in enumerate(
    np.asarray(simulation.data.popular_negatives)
  ):
    history = simulation.dataset.sequence(client)
    for drawn, seen in zip(of_splits, (history[:-1], history)):
      assert len(set(drawn.tolist())) == 10
      assert not set(drawn) & set(seen)
      assert (counts[drawn] > 0).all()


def draws(weights, count=1, seeds=2000, sequence=(1, 2, 3), split=1):
  """[seeds, count] draws of one client over items 1 … len(weights) − 1."""
  dataset = dataclasses.replace(
    small.dataset(),
    items=np.array(sequence, np.int32),
    offsets=np.array([0, len(sequence)]),
    user_ids=np.array([5]),
    item_ids=np.arange(len(weights)),
  )
  return np.concatenate(
    [
      dataset_lib.draw_popular(dataset, np.array(weights), count, seed)[
        :, split
      ]
      for seed in range(seeds)
    ]
  )


def test_popular_negatives_follow_the_popularity():
  # Items 4, 5, 6 of weight 1, 3, 6; 1 to 3 are consumed, 7 is nobody's.
  drawn = draws([9, 5, 5, 5, 1, 3, 6, 0])[:, 0]
  share = np.bincount(drawn, minlength=8) / len(drawn)
  np.testing.assert_allclose(share[[4, 5, 6]], [0.1, 0.3, 0.6], atol=0.04)
  assert share[[4, 5, 6]].sum() == 1
  # The second one is drawn from what is left: after 6, 4 and 5 as 1 to 3.
  pairs = draws([9, 5, 5, 5, 1, 3, 6, 0], 2)
  after = pairs[pairs[:, 0] == 6, 1]
  assert (after == 5).mean() == pytest.approx(0.75, abs=0.05)


def test_at_validation_the_test_item_is_drawn_by_its_popularity():
  # As above, and item 3, of weight 5, which is consumed later.
  drawn = draws([9, 5, 5, 5, 1, 3, 6, 0], split=0)[:, 0]
  share = np.bincount(drawn, minlength=8) / len(drawn)
  np.testing.assert_allclose(share[3:7], np.array([5, 1, 3, 6]) / 15, atol=0.04)
  assert share[3:7].sum() == 1
  # Where little is left, too.
  drawn = draws([0, 10**7, 10**7, 5, 1, 3, 6], split=0, seeds=500)[:, 0]
  share = np.bincount(drawn, minlength=7)[3:] / len(drawn)
  np.testing.assert_allclose(share, np.array([5, 1, 3, 6]) / 15, atol=0.08)


def test_popular_negatives_where_little_is_left():
  # What is unseen has a millionth of the weight.
  drawn = draws([0, 10**7, 10**7, 10**7, 1, 3, 6], 2, seeds=500)
  assert {len(set(pair)) for pair in drawn.tolist()} == {2}
  share = np.bincount(drawn[:, 0], minlength=7)[4:] / len(drawn)
  np.testing.assert_allclose(share, [0.1, 0.3, 0.6], atol=0.08)


def test_what_nobody_trains_on_comes_last():
  drawn = draws([9, 5, 5, 5, 1, 3, 6, 0, 0], 4, seeds=200)
  assert {tuple(sorted(row[:3])) for row in drawn.tolist()} == {(4, 5, 6)}
  assert set(drawn[:, 3].tolist()) == {7, 8}


def one_by_one(dataset, weights, count, seed):
  """What the first draws gave: a loop over the stream of each client."""
  cumulative = np.cumsum(weights)
  for client, user in enumerate(dataset.user_ids.tolist()):
    rng = generator(seed, Stream.POPULAR_NEGATIVES, user)
    seen = {*dataset.sequence(client).tolist()}
    drawn = []
    for x in rng.random(8 * count) * cumulative[-1]:
      item = int((cumulative <= x).sum())
      if item not in seen and len(drawn) < count:
        seen.add(item)
        drawn.append(item)
    yield drawn


def test_popular_negatives_are_those_of_the_loop():
  dataset = small.dataset()
  weights = popularity.training_counts(dataset).astype(float)
  drawn = dataset_lib.draw_popular(dataset, weights, 3, seed=4)
  assert drawn[:, 1].tolist() == [*one_by_one(dataset, weights, 3, seed=4)]


def test_ranks_are_those_of_the_scores(evaluated):
  simulation, results, state = evaluated
  assert results.users.tolist() == simulation.dataset.user_ids.tolist()
  _, ranks = simulation.evaluate(state, 'test')
  np.testing.assert_array_equal(results.full, ranks.full)
  np.testing.assert_array_equal(results.popular, ranks.popular)
  for client in range(3):
    own = simulation.dataset.sequence(client)
    assert results.targets[client] == simulation.dataset.item_ids[own[-1]]
    assert results.candidates[client] == (
      simulation.dataset.num_items - len(set(own))
    )
    assert results.num_train[client] == len(own) - 2
  # Nothing but the popular negatives differs from a plain evaluation.
  _, plain = small.simulation().evaluate(state, 'test')
  np.testing.assert_array_equal(plain.full, ranks.full)
  np.testing.assert_array_equal(plain.sampled, ranks.sampled)


def test_at_validation_the_test_item_is_one_candidate_more(evaluated):
  simulation, results, state = evaluated
  found = user_results.evaluate(simulation, state, 'val')
  np.testing.assert_array_equal(found.candidates, results.candidates + 1)


def test_without_popular_negatives_nothing_is_told(evaluated):
  # Every rank among none would be 0, a perfect hit.
  with pytest.raises(ValueError):
    user_results.evaluate(small.simulation(), evaluated[2], 'test')


def results_of(num_train, popular):
  n = len(num_train)
  ranks = np.arange(n)
  return user_results.UserResults(
    np.arange(n),
    np.arange(n),
    np.array(num_train),
    np.array(popular),
    np.arange(n) < 2,
    np.full(n, 500),
    100,
    ranks * 3,
    ranks,
    ranks,
  )


def test_slices_part_the_users():
  results = results_of([1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 1, 2, 2, 9, 9, 9])
  lengths, popular, target = user_results.slices(results).values()
  assert [v.users.tolist() for v in target.values()] == [[0, 1], [*range(2, 8)]]
  assert {k: len(v.users) for k, v in lengths.items()} == {
    '1 to 2': 2,
    '3 to 4': 2,
    '5 to 6': 2,
    '7 to 8': 2,
  }
  assert {k: v.users.tolist() for k, v in popular.items()} == {
    'tail: 1 to 2': [1, 2, 3, 4],
    'middle: 9': [5, 6, 7],
    'new: 0': [0],
  }


def test_users_can_be_sliced_by_what_they_are():
  results = results_of([1] * 30, [1] * 30)
  found = user_results.slices(
    results,
    {
      'gender': {str(u): 'MF'[u % 2] for u in range(29)},
      'age': {str(u): str(u) for u in range(30)},
      'zip': {str(u): f'{u}-{u}' for u in range(30)},
    },
  )
  sizes = {
    title: {k: len(v.users) for k, v in parts.items()}
    for title, parts in found.items()
  }
  assert sizes['gender'] == {'F': 14, 'M': 15, 'unknown': 1}
  of_users = {str(u): 'Mx'[u % 2] for u in range(28)} | {'28': 'unknown'}
  groups = user_results.by_attribute('gender', results.users, of_users)
  assert {k: v.sum() for k, v in groups.items()} == {
    'M': 14,
    'x': 14,
    'unknown': 2,  # 28 says so, and nobody tells of 29
  }
  assert sizes['age'] == {
    '0 to 7': 8,
    '8 to 14': 7,
    '15 to 21': 7,
    '22 to 29': 8,
  }
  assert not sizes['zip']  # nobody can read thirty slices
  sessions = results._replace(users=np.array([f'u#{n}' for n in range(30)]))
  assert user_results.slices(sessions, {'kind': {'u': 'x'}})['kind'].keys() == {
    'x'
  }
  message = small.error_of(user_results.slices, results, {'kind': {'u': 'x'}})
  assert 'kind: the file of users tells of none of 30 users (0, …)' in message


def test_of_a_user_with_several_targets_the_mean_counts():
  results = results_of([3] * 3, [1] * 3)._replace(
    users=np.array([7, 7, 9]), full=np.array([0, 99, 99])
  )
  # Of user 7's items one of two is first, of user 9's none.
  assert results.means()['full']['HR@10'] == 0.25
  assert results.num_users == 2
  better = results._replace(full=np.array([0, 0, 99]))
  found = user_results.difference(better, results)
  assert found['full']['HR@10'].mean == 0.25


def test_a_difference_is_paired():
  results = results_of([3] * 50, [1] * 50)
  worse = results._replace(full=results.full + 200)
  found = user_results.difference(results, worse)
  assert found['full']['MRR'].low > 0
  assert found['sampled']['MRR'] == (0, 0, 0)
  # One run was chosen by a cut-off that the other did not measure.
  chosen = results._replace(metrics=(metrics.AtCutoffs((50,)),))
  found = user_results.difference(chosen, worse)
  assert found['full']['HR@50'].mean == (results.full < 50).mean()
  with pytest.raises(UserError, match='same targets'):
    user_results.difference(
      results, results._replace(targets=results.targets + 1)
    )


def test_parquet_holds_what_was_found(evaluated, tmp_path):
  results = evaluated[1]
  user_results.write(results, tmp_path / 'users.parquet')
  table = parquet.read_table(tmp_path / 'users.parquet').to_pydict()
  assert table['user'] == results.users.tolist()
  assert table['rank_full'] == (1 + results.full).tolist()
  for protocol, by_metric in results.means().items():
    for metric, value in by_metric.items():
      assert np.mean(table[f'{protocol}/{metric}']) == pytest.approx(value)
