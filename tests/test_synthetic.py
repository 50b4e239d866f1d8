"""The embedded data set: seeded, drifting, with features that tell."""

import re

import numpy as np
import pytest

from fedmmr_jax.data import synthetic
from fedmmr_jax.data.selection import Filters

USERS, ITEMS = 200, 150
KINDS = ['visual', 'text']


def generate(*arguments, **keywords):
  """(data set, feature matrices)."""
  selected, matrices = synthetic.generate(*arguments, **keywords)
  return selected.dataset, matrices


@pytest.fixture(scope='module')
def generated():
  return generate(USERS, ITEMS, seed=0)


def clusters(dataset):
  """[V − 1] cluster of each catalogue row, as its title says."""
  return np.array(
    [
      int(re.fullmatch(r'item \d+ of cluster (\d+)', title)[1])
      for title in dataset.titles[1:]
    ]
  )


def arrays(generated):
  dataset, matrices = generated
  return [dataset.items, dataset.offsets, dataset.item_ids, *matrices.values()]


def transitions(dataset):
  """(clusters of items, clusters of their successors), over all users."""
  cluster = clusters(dataset)
  pairs = [
    (cluster[s[:-1] - 1], cluster[s[1:] - 1])
    for s in map(dataset.sequence, range(dataset.num_clients))
  ]
  return tuple(np.concatenate(side) for side in zip(*pairs))


def test_the_same_seed_gives_the_same_data(generated):
  again = generate(USERS, ITEMS, seed=0)
  assert again[0].titles == generated[0].titles
  assert again[0].fingerprint() == generated[0].fingerprint()
  for first, second in zip(arrays(generated), arrays(again), strict=True):
    np.testing.assert_array_equal(first, second)


def test_another_seed_gives_other_data(generated):
  other, matrices = generate(USERS, ITEMS, seed=1)
  assert not np.array_equal(other.items, generated[0].items)
  for kind in KINDS:
    assert not np.array_equal(matrices[kind], generated[1][kind])


def test_every_user_is_there(generated):
  assert generated[0].user_ids.tolist() == list(range(1, USERS + 1))


def test_nobody_consumes_an_item_twice(generated):
  dataset, _ = generated
  for client in range(USERS):
    sequence = dataset.sequence(client)
    assert len(set(sequence.tolist())) == len(sequence)


def test_items_are_those_of_the_catalogue(generated):
  dataset, _ = generated
  assert dataset.item_ids[0] == 0
  assert set(dataset.items.tolist()) == set(range(1, dataset.num_rows))
  assert dataset.item_ids[1:].min() >= 1
  assert dataset.item_ids.max() <= ITEMS
  assert len(dataset.titles) == dataset.num_rows


@pytest.mark.parametrize('users', [1, USERS])
def test_titles_name_the_item_of_their_row(users):
  dataset, _ = generate(users, ITEMS, seed=0)
  assert dataset.titles[0] == ''
  for item, title in zip(dataset.item_ids[1:], dataset.titles[1:]):
    assert title.startswith(f'item {item} of cluster ')


def test_lengths_span_their_bounds(generated):
  lengths = generated[0].lengths
  # 200 draws of 46 lengths: both ends of the range are met nearly surely.
  assert lengths.min() >= synthetic.MIN_LENGTH
  assert lengths.max() <= synthetic.MAX_LENGTH
  assert lengths.min() <= synthetic.MIN_LENGTH + 2
  assert lengths.max() >= synthetic.MAX_LENGTH - 2


def test_a_small_catalogue_shortens_the_sequences():
  dataset, _ = generate(50, 40, seed=0)
  # Half of the 40 items stay unseen.
  assert dataset.lengths.min() >= synthetic.MIN_LENGTH
  assert dataset.lengths.max() <= 20


def test_the_most_active_users_can_be_kept(generated):
  dataset, matrices = generate(USERS, ITEMS, 0, Filters(top_k_users=10))
  longest = np.sort(generated[0].lengths)[-10:]
  assert sorted(dataset.lengths.tolist()) == longest.tolist()
  for kind in KINDS:
    np.testing.assert_array_equal(matrices[kind], generated[1][kind])


@pytest.mark.parametrize(
  'kind, width',
  [('visual', synthetic.VISUAL_DIM), ('text', synthetic.TEXT_DIM)],
)
def test_features_have_a_row_of_unit_length_for_each_item(
  generated, kind, width
):
  matrix = generated[1][kind]
  assert matrix.shape == (ITEMS + 1, width)
  assert matrix.dtype == np.float32
  assert not matrix[0].any()
  length = np.linalg.norm(matrix, axis=1)
  np.testing.assert_allclose(length[length > 0], 1, rtol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_features_carry_the_cluster(generated, kind):
  dataset, matrices = generated
  rows, cluster = matrices[kind][dataset.item_ids[1:]], clusters(dataset)
  cosine = rows @ rows.T
  present = np.any(rows != 0, axis=1)
  pairs = present[:, None] & present & ~np.eye(len(rows), dtype=bool)
  same = cluster[:, None] == cluster
  # Direction and noise are equally long: about 1/2 within a cluster, and
  # about 0 between clusters.
  assert cosine[pairs & same].mean() > 0.4
  assert abs(cosine[pairs & ~same].mean()) < 0.1


def test_images_and_texts_are_spaces_of_their_own(generated):
  width = synthetic.TEXT_DIM
  visual, text = (generated[1][kind][:, :width] for kind in KINDS)
  both = np.any(visual != 0, axis=1) & np.any(text != 0, axis=1)
  assert abs((visual * text).sum(1)[both].mean()) < 0.1


def test_some_items_miss_an_image_and_others_a_text(generated):
  no_image, no_text = (
    ~np.any(generated[1][kind][1:] != 0, axis=1) for kind in KINDS
  )
  # 150 · 0.1 = 15 of each expected, with standard deviation 3.7.
  assert 4 <= no_image.sum() <= 26
  assert 4 <= no_text.sum() <= 26
  assert (no_image != no_text).any()


def test_interests_stay_in_their_cluster_and_move_on_in_a_cycle(generated):
  here, there = transitions(generated[0])
  stayed = here == there
  # An item ends the stay with probability 0.25, or when its cluster is used
  # up; a fifth of the moves is a jump, of which one in 12 goes nowhere.
  assert 0.6 < stayed.mean() < 0.8
  moved = (there - here)[~stayed] % synthetic.NUM_CLUSTERS
  count = np.bincount(moved, minlength=synthetic.NUM_CLUSTERS)
  # Without the cycle each of the 11 other clusters had a share of 0.09.
  assert count.argmax() == 1
  assert count[1] / count.sum() > 0.6


def test_some_items_of_a_cluster_are_more_popular_than_others(generated):
  dataset, _ = generated
  count = np.bincount(dataset.items, minlength=dataset.num_rows)[1:]
  cluster = clusters(dataset)
  ratios = [
    count[cluster == c].max() / count[cluster == c].mean()
    for c in set(cluster.tolist())
  ]
  assert np.median(ratios) > 1.4
