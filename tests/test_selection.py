"""Interactions -> clients: order, numbering, filters, what is held out."""

import numpy as np
import pytest

from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.data import selection
from fedmmr_jax.data.interactions import Interactions
from fedmmr_jax.data.selection import Filters, select
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import popularity
from tests import small


def from_rows(rows, top_k_users=0, **filters):
  """`select` of [(user, item, time), ...] -> (dataset, dropped users)."""
  columns = np.array(rows, np.int64).reshape(-1, 3).T
  return select(
    'toy',
    Interactions.of(*columns),
    Filters(top_k_users=top_k_users, **filters),
  )[:2]


def histories(dataset):
  """User id -> item ids in the source's numbering."""
  return {
    int(user): dataset.item_ids[dataset.sequence(k)].tolist()
    for k, user in enumerate(dataset.user_ids)
  }


def test_interactions_are_ordered_by_user_then_time():
  dataset, _ = from_rows(
    [(2, 30, 9), (1, 10, 7), (2, 10, 3), (1, 20, 5), (1, 30, 6), (2, 20, 4)]
  )
  assert histories(dataset) == {1: [20, 30, 10], 2: [10, 20, 30]}


def test_equal_times_keep_the_order_of_the_source():
  items = [50, 10, 40, 20, 30, 15, 45, 25]
  dataset, _ = from_rows([(1, item, 0) for item in items])
  assert histories(dataset) == {1: items}


def test_users_and_items_are_renumbered_in_the_order_of_their_ids():
  dataset, _ = from_rows(
    [(90, 700, 0), (90, 5, 1), (90, 60, 2), (4, 60, 0), (4, 800, 1), (4, 5, 2)]
  )
  assert dataset.user_ids.tolist() == [4, 90]
  assert dataset.item_ids.tolist() == [0, 5, 60, 700, 800]
  assert dataset.items.tolist() == [2, 4, 1, 3, 1, 2]
  assert dataset.items.dtype == np.int32
  assert dataset.offsets.tolist() == [0, 3, 6]
  assert dataset.lengths.tolist() == [3, 3]
  assert (dataset.num_clients, dataset.num_items, dataset.num_rows) == (2, 4, 5)
  assert not dataset.features


def test_items_of_nobody_kept_are_not_in_the_catalogue():
  dataset, _ = from_rows(
    [(1, 10, 0), (1, 20, 1), (1, 30, 2), (2, 99, 0), (2, 10, 1)]
  )
  assert dataset.item_ids.tolist() == [0, 10, 20, 30]


def test_users_with_fewer_than_3_are_dropped_and_named():
  dataset, dropped = from_rows(
    [(1, 10, 0), (3, 10, 0), (3, 20, 1), (3, 30, 2), (8, 10, 0), (8, 20, 1)]
  )
  assert dataset.user_ids.tolist() == [3]
  assert dropped == [1, 8]


def of_lengths(**lengths):
  """Rows of users u1, u2, … with so many interactions each."""
  return [
    (int(user[1:]), item, item)
    for user, n in lengths.items()
    for item in range(1, n + 1)
  ]


def test_top_k_keeps_the_most_active():
  dataset, dropped = from_rows(of_lengths(u1=3, u2=6, u3=4, u4=5), 2)
  assert dataset.user_ids.tolist() == [2, 4]
  assert dataset.lengths.tolist() == [6, 5]
  assert dropped == []


def test_top_k_ties_go_to_the_lower_id():
  dataset, _ = from_rows(of_lengths(u9=4, u3=4, u5=4, u1=3), 2)
  assert dataset.user_ids.tolist() == [3, 5]


def test_top_k_is_taken_among_those_with_enough():
  dataset, dropped = from_rows(of_lengths(u1=1, u2=2, u3=4, u4=5, u6=6), 2)
  assert dataset.user_ids.tolist() == [4, 6]
  assert dropped == [1, 2]


def test_top_k_beyond_the_users_keeps_all():
  dataset, _ = from_rows(of_lengths(u1=3, u2=4), 50)
  assert dataset.user_ids.tolist() == [1, 2]


@pytest.mark.parametrize('rows', [[], of_lengths(u1=2, u2=1)])
def test_nobody_left_is_an_error(rows):
  with pytest.raises(UserError, match='toy: no user has the 3 interactions'):
    from_rows(rows)


def test_string_ids_are_kept_in_their_order():
  dataset = select(
    'toy',
    Interactions.of(
      np.array(['b', 'a', 'a', 'a', 'b', 'b']),
      np.array(['y', 'x', 'z', 'y', 'x', 'y']),
    ),
  ).dataset
  assert dataset.user_ids.tolist() == ['a', 'b']
  assert dataset.item_ids.tolist() == ['', 'x', 'y', 'z']
  assert dataset.items.tolist() == [1, 3, 2, 2, 1, 2]


def test_min_interactions():
  dataset, dropped = from_rows(of_lengths(u1=3, u2=6, u3=4), min_interactions=4)
  assert dataset.user_ids.tolist() == [2, 3] and dropped == [1]


def test_k_core_counts_what_is_left():
  # Items 1 and 2 train three users each. User 4 needs item 9 to reach three
  # interactions; item 9 trains nobody else, so user 4 falls, and with it
  # item 2's third training interaction stays with users 1 to 3.
  rows = [
    (u, i, t) for u in (1, 2, 3) for t, i in enumerate((1, 2, 1, 2, 1))
  ] + [(4, 9, 0), (4, 1, 1), (4, 2, 2)]
  selected = select(
    'toy', Interactions.of(*np.array(rows).T), Filters(k_core=3)
  )
  assert selected.dataset.user_ids.tolist() == [1, 2, 3]
  assert selected.dataset.item_ids.tolist() == [0, 1, 2]
  assert selected.notes[-1] == (
    '3-core     1 users, 1 items and 3 interactions left out'
  )


def test_k_core_does_not_count_held_out_interactions():
  # Item 8 is the last of all three users: it trains nobody.
  rows = [
    (u, i, t) for u in (1, 2, 3) for t, i in enumerate((1, 2, 1, 2, 1, 8))
  ]
  dataset, _ = from_rows(rows, k_core=3)
  assert dataset.item_ids.tolist() == [0, 1, 2]
  assert histories(dataset)[1] == [1, 2, 1, 2, 1]


# Users of the timeline: 1 has items after the date, 2 none, 3 only after it, 4
# too few before it. The date is 100.
TIMELINE = [
  *((1, i, 95 + i) for i in range(1, 9)),
  *((2, i, i) for i in range(1, 5)),
  *((3, i, 100 + i) for i in range(1, 6)),
  (4, 1, 99),
  (4, 2, 100),
  (4, 3, 101),
]


def test_timeline_holds_out_the_future():
  dataset, dropped = from_rows(TIMELINE, test_from=100.0)
  # Of user 1: 1 to 4 before the date, of these 4 validates; 5 is the test item.
  assert histories(dataset) == {1: [1, 2, 3, 4, 5], 2: [1, 2, 3, 4]}
  assert dataset.num_train.tolist() == [3, 3]
  assert dataset.tested.tolist() == [0]
  assert dropped == [3, 4]
  assert popularity.training_counts(dataset).tolist() == [0, 2, 2, 2, 0, 0]


def test_timeline_k_core_counts_the_past_alone():
  rows = [
    (u, i, t) for u in (1, 2, 3) for t, i in enumerate((1, 2, 1, 2, 1, 9, 2))
  ]
  dataset, _ = from_rows(rows, test_from=5.0, k_core=3)
  assert dataset.item_ids.tolist() == [0, 1, 2]
  assert histories(dataset)[1] == [1, 2, 1, 2, 1, 2]
  assert dataset.num_train.tolist() == [4] * 3


@pytest.mark.parametrize('date', [0, 1000])
def test_a_date_outside_the_data_is_refused(date):
  with pytest.raises(
    UserError, match='within 1970-01-01 to 1970-01-01|no user'
  ):
    from_rows(TIMELINE, test_from=float(date))


def test_timeline_needs_times():
  with pytest.raises(UserError, match='needs timestamps'):
    select(
      'toy',
      Interactions.of(np.array([1, 1, 1]), np.array([1, 2, 3])),
      Filters(test_from=3.0),
    )


def test_equal_times_are_said():
  selected = select(
    'toy',
    Interactions.of(np.array([1] * 4), np.arange(4), np.array([0, 0, 1, 2])),
  )
  assert '33.3% of the interactions bear the time' in selected.notes[0]


@pytest.mark.slow
def test_a_timeline_trains_and_ranks_what_it_should():
  rng = np.random.default_rng(0)
  rows = [
    (u, i, t)
    for u in range(1, 9)
    for t, i in enumerate(rng.permutation(np.arange(1, 61))[:12])
  ]
  rows += [(9, i, 0) for i in range(1, 31)]  # nothing after the date
  dataset, _ = from_rows(rows, test_from=8.0)
  assert dataset.num_train.tolist() == [7] * 8 + [29]
  simulation = simulation_lib.build(small.config(client_fraction=1.0), dataset)
  state, means = simulation.run_round(
    simulation.init_state(), 1, simulation.sample_cohort(1)
  )
  assert np.isfinite(means['loss'])
  assert len(simulation.evaluate(state, 'val')[1].full) == 9
  metrics, ranks = simulation.evaluate(state, 'test')
  assert len(ranks.full) == 8 and 0 <= metrics['full']['MRR'] <= 1
  assert {
    k: len(r.full) for k, r in simulation.rank_local_only(state).items()
  } == {'val': 9, 'test': 8}
  counts = popularity.training_counts(dataset)
  popular = simulation.rank_by_popularity('test')
  own = dataset.sequence(0)
  rest = np.setdiff1d(np.arange(1, dataset.num_rows), own)
  assert popular.full[0] == (counts[rest] >= counts[own[-1]]).sum()


@pytest.mark.parametrize('shift', [0, 0.5, -(2.0**62)])
def test_the_order_is_that_of_a_sort_by_all_columns(shift):
  rng = np.random.default_rng(0)
  users = rng.integers(-3, 5, 500).astype(np.int32)
  parts = rng.integers(0, 3, 500).astype(np.int8)
  times = rng.integers(0, 20, 500) + shift
  for third in (parts, None):
    keys = [x for x in (times, third, users) if x is not None]
    np.testing.assert_array_equal(
      selection._order([users, third, times]), np.lexsort(keys)
    )
