"""Clients on the device: negatives, one client's view, the fingerprint."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax.data import dataset as dataset_lib
from fedmmr_jax.data.dataset import Dataset
from fedmmr_jax.errors import UserError
from tests import small


def toy(sequences, num_items=20):
  """{user: catalogue rows} as a data set with small features."""
  lengths = [len(s) for s in sequences.values()]
  features = np.arange(2.0 * (num_items + 1), dtype=np.float32)
  return Dataset(
    name='toy',
    items=np.concatenate([*sequences.values()]).astype(np.int32),
    offsets=np.concatenate([[0], np.cumsum(lengths)]),
    user_ids=np.array([*sequences]),
    item_ids=np.arange(num_items + 1),
    features={
      'visual': features.reshape(-1, 2),
      'text': features.reshape(-1, 2) + 1,
    },
  )


SEQUENCES = {7: [5, 3, 9, 1], 8: [2, 20, 4], 12: [10, 9, 8, 7, 6, 5]}


def to_device(dataset, **changes):
  arguments = dict(
    num_negatives=5, sampled_negatives=6, leaky_negatives=False, seed=0
  )
  return dataset_lib.to_device(dataset, **{**arguments, **changes})


def avoided(data):
  return [
    np.asarray(data.avoided[o : o + n]).tolist()
    for o, n in zip(data.avoided_offset, data.avoided_length)
  ]


def test_training_negatives_avoid_the_training_items_alone():
  # Without the last two of each sequence, ascending.
  assert avoided(to_device(toy(SEQUENCES))) == [[3, 5], [2], [7, 8, 9, 10]]


def test_leaky_negatives_avoid_the_held_out_items_too():
  assert avoided(to_device(toy(SEQUENCES), leaky_negatives=True)) == [
    [1, 3, 5, 9],
    [2, 4, 20],
    [5, 6, 7, 8, 9, 10],
  ]


def test_a_repeated_item_is_avoided_once():
  data = to_device(toy({1: [4, 2, 4, 2, 9, 8]}))
  assert avoided(data) == [[2, 4]]


def test_evaluation_negatives_are_unseen_and_distinct():
  dataset = toy(SEQUENCES)
  data = to_device(dataset, sampled_negatives=10)
  assert data.sampled_negatives.shape == (3, 2, 10)
  for client, of_splits in enumerate(np.asarray(data.sampled_negatives)):
    history = dataset.sequence(client)
    for negatives, seen in zip(of_splits, (history[:-1], history)):
      assert len(set(negatives.tolist())) == 10
      assert not set(negatives) & set(seen)
      assert negatives.min() >= 1 and negatives.max() <= 20


def test_all_unseen_items_can_be_asked_for():
  # User 12 consumed 6 of 20.
  data = to_device(
    toy({12: SEQUENCES[12]}), sampled_negatives=14, num_negatives=14
  )
  assert sorted(data.sampled_negatives[0, 1].tolist()) == [
    1,
    2,
    3,
    4,
    *range(11, 21),
  ]


def test_evaluation_negatives_are_drawn_uniformly():
  # 14 unseen items, 6 drawn for each of 350 seeds: 150 of each expected, each
  # with a variance below 150; five standard deviations are 61.
  dataset = toy({12: SEQUENCES[12]})
  count = np.zeros(21, int)
  for seed in range(350):
    drawn = to_device(dataset, seed=seed).sampled_negatives[:, 1]
    count[np.asarray(drawn)] += 1
  unseen = [1, 2, 3, 4, *range(11, 21)]
  assert count.sum() == count[unseen].sum()
  assert np.abs(count[unseen] - 150).max() < 61


def test_at_validation_the_test_item_is_drawn_like_any_other():
  # 15 items are unseen before the validation target, the test item, 5, among
  # them: 6 drawn for each of 350 seeds make 140 of each; see above.
  dataset = toy({12: SEQUENCES[12]})
  count = np.zeros(21, int)
  for seed in range(350):
    val, test = np.asarray(to_device(dataset, seed=seed).sampled_negatives[0])
    count[val] += 1
    # But for this item the draw is that of the test.
    assert set(val) - set(test) in (set(), {5})
    assert len(set(val)) == 6
  unseen = [1, 2, 3, 4, 5, *range(11, 21)]
  assert count.sum() == count[unseen].sum()
  assert np.abs(count[unseen] - 140).max() < 61


@pytest.mark.parametrize(
  'sequence',
  [[5, 3, 9, 5], [5, 3, 9, 9]],
  ids=['trained on', 'twice the target'],
)
def test_a_test_item_consumed_before_is_no_negative(sequence):
  for seed in range(20):
    data = to_device(toy({7: sequence}), seed=seed, sampled_negatives=15)
    np.testing.assert_array_equal(*data.sampled_negatives[0])


def test_evaluation_negatives_follow_the_seed():
  first, again, other = (
    np.asarray(to_device(toy(SEQUENCES), seed=seed).sampled_negatives)
    for seed in (3, 3, 4)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != other).any(axis=-1).all()


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
      to_device(toy(SEQUENCES), **changes).sampled_negatives, expected
    )


@pytest.mark.parametrize('flag', ['num_negatives', 'sampled_negatives'])
def test_too_many_negatives_name_the_user_and_the_flag(flag):
  # User 12 has 20 − 6 = 14 unseen items, the others have more.
  to_device(toy(SEQUENCES), **{flag: 14})
  with pytest.raises(
    UserError,
    match=rf'^toy: user 12 has only 14 unseen items; '
    rf'lower `{flag}=15` to 14$',
  ):
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
      view.sampled_negatives, data.sampled_negatives[client]
    )


def test_the_padding_client_is_empty():
  view = cut(to_device(toy(SEQUENCES)), -1, 6)
  assert view.history.tolist() == view.avoided.tolist() == [0] * 6
  assert view.sampled_negatives.tolist() == [[0] * 6] * 2
  assert int(view.num_items) == int(view.num_avoided) == 0
  assert int(view.num_train) == 0


def test_a_larger_view_only_adds_padding():
  data = to_device(toy(SEQUENCES), leaky_negatives=True)
  for client in (-1, 0, 1, 2):
    narrow, large = cut(data, client, 6), cut(data, client, 40)
    for name in ('history', 'avoided'):
      array = getattr(large, name)
      np.testing.assert_array_equal(array[:6], getattr(narrow, name))
      assert (array[6:] == 0).all()
    assert int(large.num_items) == int(narrow.num_items)
    assert int(large.num_avoided) == int(narrow.num_avoided)


def test_a_view_does_not_see_the_other_clients():
  changed = {**SEQUENCES, 7: [15, 16, 17, 18], 12: [1, 2, 11, 12, 13, 14]}
  jax.tree.map(
    np.testing.assert_array_equal,
    cut(to_device(toy(SEQUENCES)), 1, 9),
    cut(to_device(toy(changed)), 1, 9),
  )


def test_vmapped_views_are_the_views_one_by_one():
  data = to_device(toy(SEQUENCES))
  clients = jnp.array([2, -1, 0])
  together = jax.vmap(lambda c: dataset_lib.client_view(data, c, 6))(clients)
  for i, client in enumerate(clients):
    jax.tree.map(
      np.testing.assert_array_equal,
      jax.tree.map(lambda x: x[i], together),
      cut(data, client, 6),
    )


def test_data_sets_and_simulations_are_themselves_and_nothing_else():
  # By value, == and hash would raise: arrays have no truth value.
  for thing, twin in (
    (toy(SEQUENCES), toy(SEQUENCES)),
    (small.simulation(), small.simulation()),
  ):
    assert thing == thing and thing != twin
    assert len({thing, thing, twin}) == 2


def test_the_fingerprint_is_the_same_for_the_same_data():
  assert toy(SEQUENCES).fingerprint() == toy(SEQUENCES).fingerprint()


@pytest.mark.parametrize(
  'name', ['items', 'offsets', 'user_ids', 'item_ids', 'visual', 'text']
)
def test_the_fingerprint_changes_with_any_array(name):
  dataset = toy(SEQUENCES)
  features = dict(dataset.features)
  array = (features[name] if name in features else getattr(dataset, name)) + 0
  array[-1] += 1
  change = (
    dict(features=features | {name: array})
    if name in features
    else {name: array}
  )
  changed = dataclasses.replace(dataset, **change)
  assert changed.fingerprint() != dataset.fingerprint()


def test_the_fingerprint_knows_which_features_are_which():
  dataset = toy(SEQUENCES)
  swapped = dataclasses.replace(
    dataset,
    features={
      'visual': dataset.features['text'],
      'text': dataset.features['visual'],
    },
  )
  assert swapped.fingerprint() != dataset.fingerprint()


def test_the_fingerprint_knows_the_shape():
  dataset = toy(SEQUENCES)
  reshaped = dataclasses.replace(
    dataset,
    features=dataset.features
    | {'text': dataset.features['text'].reshape(2, -1)},
  )
  assert reshaped.fingerprint() != dataset.fingerprint()
