"""Interactions -> clients: order, numbering, negatives, one client's view."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax.data import dataset as dataset_lib
from fedmmr_jax.data.dataset import Dataset
from fedmmr_jax.errors import UserError


def from_rows(rows, top_k_users=0):
  """`from_interactions` of [(user, item, time), ...]."""
  columns = np.array(rows, np.int64).reshape(-1, 3).T
  return dataset_lib.from_interactions('toy', *columns, top_k_users)


def histories(dataset):
  """User id -> item ids in the source's numbering."""
  return {int(user): dataset.item_ids[dataset.sequence(k)].tolist()
          for k, user in enumerate(dataset.user_ids)}


def toy(sequences, num_items=20):
  """{user: catalogue rows} as a data set with small features."""
  lengths = [len(s) for s in sequences.values()]
  features = np.arange(2.0 * (num_items + 1), dtype=np.float32)
  return Dataset(
      name='toy', items=np.concatenate([*sequences.values()]).astype(np.int32),
      offsets=np.concatenate([[0], np.cumsum(lengths)]),
      user_ids=np.array([*sequences]), item_ids=np.arange(num_items + 1),
      visual=features.reshape(-1, 2), text=features.reshape(-1, 2) + 1)


SEQUENCES = {7: [5, 3, 9, 1], 8: [2, 20, 4], 12: [10, 9, 8, 7, 6, 5]}


def to_device(dataset, **changes):
  arguments = dict(num_negatives=5, sampled_negatives=6,
                   leaky_negatives=False, seed=0)
  return dataset_lib.to_device(dataset, **{**arguments, **changes})


def avoided(data):
  return [np.asarray(data.avoided[o:o + n]).tolist()
          for o, n in zip(data.avoided_offset, data.avoided_length)]


def test_interactions_are_ordered_by_user_then_time():
  dataset, _ = from_rows([
      (2, 30, 9), (1, 10, 7), (2, 10, 3), (1, 20, 5), (1, 30, 6), (2, 20, 4)])
  assert histories(dataset) == {1: [20, 30, 10], 2: [10, 20, 30]}


def test_equal_times_keep_the_order_of_the_source():
  items = [50, 10, 40, 20, 30, 15, 45, 25]
  dataset, _ = from_rows([(1, item, 0) for item in items])
  assert histories(dataset) == {1: items}


def test_users_and_items_are_renumbered_in_the_order_of_their_ids():
  dataset, _ = from_rows([
      (90, 700, 0), (90, 5, 1), (90, 60, 2), (4, 60, 0), (4, 800, 1),
      (4, 5, 2)])
  assert dataset.user_ids.tolist() == [4, 90]
  assert dataset.item_ids.tolist() == [0, 5, 60, 700, 800]
  assert dataset.items.tolist() == [2, 4, 1, 3, 1, 2]
  assert dataset.items.dtype == np.int32
  assert dataset.offsets.tolist() == [0, 3, 6]
  assert dataset.lengths.tolist() == [3, 3]
  assert (dataset.num_clients, dataset.num_items, dataset.num_rows) == (2, 4, 5)
  assert dataset.visual.shape == dataset.text.shape == (5, 0)


def test_items_of_nobody_kept_are_not_in_the_catalogue():
  dataset, _ = from_rows([
      (1, 10, 0), (1, 20, 1), (1, 30, 2), (2, 99, 0), (2, 10, 1)])
  assert dataset.item_ids.tolist() == [0, 10, 20, 30]


def test_users_with_fewer_than_3_are_dropped_and_named():
  dataset, dropped = from_rows([
      (1, 10, 0), (3, 10, 0), (3, 20, 1), (3, 30, 2), (8, 10, 0), (8, 20, 1)])
  assert dataset.user_ids.tolist() == [3]
  assert dropped == [1, 8]


def of_lengths(**lengths):
  """Rows of users u1, u2, … with so many interactions each."""
  return [(int(user[1:]), item, item) for user, n in lengths.items()
          for item in range(1, n + 1)]


def test_top_k_keeps_the_most_active():
  dataset, dropped = from_rows(of_lengths(u1=3, u2=6, u3=4, u4=5), 2)
  assert dataset.user_ids.tolist() == [2, 4]
  assert dataset.lengths.tolist() == [6, 5]
  assert dropped == []


def test_top_k_ties_go_to_the_lower_id():
  dataset, _ = from_rows(of_lengths(u9=4, u3=4, u5=4, u1=3), 2)
  assert dataset.user_ids.tolist() == [3, 5]


def test_top_k_names_only_chosen_users_as_dropped():
  # Of the three most active, user 2 is too short; user 1 was not chosen.
  dataset, dropped = from_rows(of_lengths(u1=1, u2=2, u3=4, u4=5), 3)
  assert dataset.user_ids.tolist() == [3, 4]
  assert dropped == [2]


def test_top_k_beyond_the_users_keeps_all():
  dataset, _ = from_rows(of_lengths(u1=3, u2=4), 50)
  assert dataset.user_ids.tolist() == [1, 2]


@pytest.mark.parametrize('rows', [[], of_lengths(u1=2, u2=1)])
def test_nobody_left_is_an_error(rows):
  with pytest.raises(UserError, match='toy: no user has the 3 interactions'):
    from_rows(rows)


def test_training_negatives_avoid_the_training_items_alone():
  # Without the last two of each sequence, ascending.
  assert avoided(to_device(toy(SEQUENCES))) == [[3, 5], [2], [7, 8, 9, 10]]


def test_leaky_negatives_avoid_the_held_out_items_too():
  assert avoided(to_device(toy(SEQUENCES), leaky_negatives=True)) == [
      [1, 3, 5, 9], [2, 4, 20], [5, 6, 7, 8, 9, 10]]


def test_a_repeated_item_is_avoided_once():
  data = to_device(toy({1: [4, 2, 4, 2, 9, 8]}))
  assert avoided(data) == [[2, 4]]


def test_evaluation_negatives_are_unseen_and_distinct():
  dataset = toy(SEQUENCES)
  data = to_device(dataset, sampled_negatives=10)
  assert data.sampled_negatives.shape == (3, 10)
  for client, negatives in enumerate(np.asarray(data.sampled_negatives)):
    assert len(set(negatives.tolist())) == 10
    assert not set(negatives) & set(dataset.sequence(client))
    assert negatives.min() >= 1 and negatives.max() <= 20


def test_all_unseen_items_can_be_asked_for():
  # User 12 consumed 6 of 20.
  data = to_device(toy({12: SEQUENCES[12]}), sampled_negatives=14,
                   num_negatives=14)
  assert sorted(data.sampled_negatives[0].tolist()) == [
      1, 2, 3, 4, *range(11, 21)]


def test_evaluation_negatives_are_drawn_uniformly():
  # 14 unseen items, 6 drawn for each of 350 seeds: 150 of each expected, each
  # with a variance below 150; five standard deviations are 61.
  dataset = toy({12: SEQUENCES[12]})
  count = np.zeros(21, int)
  for seed in range(350):
    count[np.asarray(to_device(dataset, seed=seed).sampled_negatives)] += 1
  unseen = [1, 2, 3, 4, *range(11, 21)]
  assert count.sum() == count[unseen].sum()
  assert np.abs(count[unseen] - 150).max() < 61


def test_evaluation_negatives_follow_the_seed():
  first, again, other = (
      np.asarray(to_device(toy(SEQUENCES), seed=seed).sampled_negatives)
      for seed in (3, 3, 4))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any(axis=1).all()


def test_evaluation_negatives_differ_between_users_of_one_history():
  data = to_device(toy({1: [1, 2, 3], 2: [1, 2, 3]}), sampled_negatives=10)
  assert (data.sampled_negatives[0] != data.sampled_negatives[1]).any()


def test_evaluation_negatives_do_not_depend_on_the_other_users():
  together = to_device(toy(SEQUENCES)).sampled_negatives
  for client, user in enumerate(SEQUENCES):
    alone = to_device(toy({user: SEQUENCES[user]})).sampled_negatives
    np.testing.assert_array_equal(alone[0], together[client])


def test_evaluation_negatives_do_not_depend_on_the_training_ones():
  expected = to_device(toy(SEQUENCES)).sampled_negatives
  for changes in (dict(leaky_negatives=True), dict(num_negatives=9)):
    np.testing.assert_array_equal(
        to_device(toy(SEQUENCES), **changes).sampled_negatives, expected)


@pytest.mark.parametrize('flag', ['num_negatives', 'sampled_negatives'])
def test_too_many_negatives_name_the_user_and_the_flag(flag):
  # User 12 has 20 − 6 = 14 unseen items, the others have more.
  to_device(toy(SEQUENCES), **{flag: 14})
  with pytest.raises(
      UserError, match=rf'^toy: user 12 has only 14 unseen items; '
      rf'lower --{flag}=15$'):
    to_device(toy(SEQUENCES), **{flag: 15})


cut = partial(jax.jit, static_argnums=2)(dataset_lib.client_view)


def test_a_view_cuts_exactly_one_client():
  dataset = toy(SEQUENCES)
  data = to_device(dataset)
  for client in range(3):
    view = cut(data, client, 6)
    n, a = int(view.num_items), int(view.num_avoided)
    assert view.history[:n].tolist() == dataset.sequence(client).tolist()
    assert view.history[n:].tolist() == [0] * (6 - n)
    assert view.avoided[:a].tolist() == avoided(data)[client]
    assert view.avoided[a:].tolist() == [0] * (6 - a)
    assert int(view.num_train) == n - 2
    np.testing.assert_array_equal(
        view.sampled_negatives, data.sampled_negatives[client])


def test_the_padding_client_is_empty():
  view = cut(to_device(toy(SEQUENCES)), -1, 6)
  assert view.history.tolist() == view.avoided.tolist() == [0] * 6
  assert view.sampled_negatives.tolist() == [0] * 6
  assert int(view.num_items) == int(view.num_avoided) == 0
  assert int(view.num_train) == 0


def test_a_larger_view_only_adds_padding():
  data = to_device(toy(SEQUENCES), leaky_negatives=True)
  for client in (-1, 0, 1, 2):
    small, large = cut(data, client, 6), cut(data, client, 40)
    for name in ('history', 'avoided'):
      array = getattr(large, name)
      np.testing.assert_array_equal(array[:6], getattr(small, name))
      assert (array[6:] == 0).all()
    assert int(large.num_items) == int(small.num_items)
    assert int(large.num_avoided) == int(small.num_avoided)


def test_a_view_does_not_see_the_other_clients():
  changed = {**SEQUENCES, 7: [15, 16, 17, 18], 12: [1, 2, 11, 12, 13, 14]}
  jax.tree.map(
      np.testing.assert_array_equal, cut(to_device(toy(SEQUENCES)), 1, 9),
      cut(to_device(toy(changed)), 1, 9))


def test_vmapped_views_are_the_views_one_by_one():
  data = to_device(toy(SEQUENCES))
  clients = jnp.array([2, -1, 0])
  together = jax.vmap(lambda c: dataset_lib.client_view(data, c, 6))(clients)
  for i, client in enumerate(clients):
    jax.tree.map(np.testing.assert_array_equal,
                 jax.tree.map(lambda x: x[i], together), cut(data, client, 6))


def test_the_fingerprint_is_the_same_for_the_same_data():
  assert toy(SEQUENCES).fingerprint() == toy(SEQUENCES).fingerprint()


@pytest.mark.parametrize('name', [
    'items', 'offsets', 'user_ids', 'item_ids', 'visual', 'text'])
def test_the_fingerprint_changes_with_any_array(name):
  dataset = toy(SEQUENCES)
  array = getattr(dataset, name).copy()
  array[-1] += 1
  changed = dataclasses.replace(dataset, **{name: array})
  assert changed.fingerprint() != dataset.fingerprint()


def test_the_fingerprint_knows_which_features_are_which():
  dataset = toy(SEQUENCES)
  swapped = dataclasses.replace(
      dataset, visual=dataset.text, text=dataset.visual)
  assert swapped.fingerprint() != dataset.fingerprint()


def test_the_fingerprint_knows_the_shape():
  dataset = toy(SEQUENCES)
  reshaped = dataclasses.replace(dataset, text=dataset.text.reshape(2, -1))
  assert reshaped.fingerprint() != dataset.fingerprint()
