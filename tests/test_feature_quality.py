"""Whether features are any good: by hand, planted, and from the shell."""

import dataclasses
import json
import math

import numpy as np
import pytest

from fedmmr_jax.data.interactions import Interactions
from fedmmr_jax.data.selection import select
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import feature_quality
from tests import small, test_cli

CLUSTERS, PER_CLUSTER = 20, 12


def walks(aligned=True, seed=0):
  """400 clients, each of which stays in one cluster of items.

  Args:
    aligned: do the features tell the cluster?
    seed: of everything.
  """
  rng = np.random.default_rng(seed)
  users = np.repeat(np.arange(400), 10)
  items = np.concatenate(
    [
      1 + user % CLUSTERS * PER_CLUSTER + rng.permutation(PER_CLUSTER)[:10]
      for user in range(400)
    ]
  )
  found = select('walks', Interactions.of(users, items)).dataset
  features = rng.normal(size=(found.num_rows, 16))
  if aligned:
    cluster = (found.item_ids - 1) // PER_CLUSTER
    features = 0.1 * features + rng.normal(size=(CLUSTERS, 16))[cluster]
  features[0] = 0
  return dataclasses.replace(
    found, features=found.features | {'text': features.astype(np.float32)}
  )


def measure(dataset, kind='text', seed=0):
  return feature_quality.measure(dataset, kind, np.array([1, 2]), seed)


def pairs_of(items, offsets, features, seed=0):
  """Co-consumption of some clients; the last two items are held out."""
  ids = np.arange(len(features))
  dataset = dataclasses.replace(
    small.dataset(),
    items=np.array(items, np.int32),
    offsets=np.array(offsets),
    user_ids=np.arange(len(offsets) - 1),
    item_ids=ids,
    titles=(),
    features={'text': features},
  )
  return measure(dataset, seed=seed).co_consumption


def test_spectrum_by_hand():
  # Around (10, 0): ±2 along one axis and ±1 along the other.
  features = np.array(
    [[0, 0], [12, 0], [8, 0], [0, 0], [10, 1], [10, -1]], np.float32
  )
  present = features.any(axis=1)
  got = feature_quality.spectrum(
    features, feature_quality._centred(features, present), present
  )
  np.testing.assert_allclose(got.explained, [0.8, 0.2])
  assert [got.components(s) for s in (0.5, 0.8, 0.9)] == [1, 1, 2]
  assert got.effective_rank == pytest.approx(
    math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))
  )
  assert got.mean_share == pytest.approx(100 / 102.5)
  rows = features[present] / np.linalg.norm(
    features[present], axis=1, keepdims=True
  )
  cosines = rows @ rows.T
  assert got.mean_cosine == pytest.approx(
    cosines[~np.eye(4, dtype=bool)].mean()
  )


def test_equal_rows_have_no_spectrum_and_no_closeness():
  dataset = walks()
  text = np.full_like(dataset.features['text'], 1 / 3)
  text[0] = 0
  got = measure(dataclasses.replace(dataset, features={'text': text}))
  assert not got.spectrum.explained.any()
  assert got.spectrum.components(0.5) == got.spectrum.effective_rank == 0
  assert got.duplicates.items == dataset.num_items
  assert got.co_consumption.to_matched.auc == pytest.approx(0.5)
  assert 'learn nothing' in feature_quality.verdict(got)
  assert len(feature_quality.warnings(got)) == 2  # and the mean is everything


def test_duplicates_by_hand():
  features = np.array(
    [[0, 0], [1, 2], [3, 0], [0, 0], [1, 2], [3, -0.0], [5, 5], [1, 2], [0, 0]],
    np.float32,
  )
  got = feature_quality.duplicates(features, features.any(axis=1))
  assert (got.items, got.rows) == (5, 2)  # missing rows are none
  assert got.most.tolist() == [1, 4, 7]
  alone = feature_quality.duplicates(features[:3], features[:3].any(axis=1))
  assert (alone.items, alone.rows, len(alone.most)) == (0, 0, 0)


def test_coverage_weighs_items_by_their_interactions():
  counts = np.array([0, 1, 50, 10, 20, 19])  # 100 interactions
  present = np.array([False, True, False, True, True, True])
  got = feature_quality.coverage(present, counts)
  assert (got.items, got.interactions) == (0.8, 0.5)
  np.testing.assert_allclose(
    got.quintile_interactions, [0.5, 0.2, 0.19, 0.1, 0.01]
  )
  assert got.quintile_coverage.tolist() == [0, 1, 1, 1, 1]
  assert got.quintile_items.tolist() == [1] * 5
  assert (
    len(feature_quality.coverage(present[:3], counts[:3]).quintile_items) == 2
  )


def test_consecutive_cosines_by_hand():
  # Centred: 1 east, 2 north, 3 west, 4 south; 5 is missing.
  features = np.array(
    [[0, 0], [9, 7], [8, 8], [7, 7], [8, 6], [0, 0]], np.float32
  )
  # 1-3, 2-4 and 4-1 of the first client, 2-1 of the second one: none with the
  # missing one, none of an item with itself, none with the last two.
  items, offsets = [1, 3, 5, 2, 4, 4, 1, 2, 2] + [2, 1, 4, 4], [0, 9, 13]
  drawn = [pairs_of(items, offsets, features, seed) for seed in range(40)]
  # A pair whose partner is its own first item is left out.
  whole = [d for d in drawn if d and len(d.consecutive) == 4]
  assert whole and max(len(d.consecutive) for d in drawn if d) == 4
  for found in whole:
    np.testing.assert_allclose(found.consecutive, [-1, -1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found.weight, [1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert found.to_matched.mean == pytest.approx(-1 / 3)
    # The second client has 1 and 2 only, so 1 gets 2 as its partner.
    assert found.matched[0] == pytest.approx(0, abs=1e-6)
  # One client has nobody to be compared with.
  assert pairs_of([1, 3, 2, 4, 4], [0, 5], features) is None


def test_auc_and_effect_by_hand():
  got = feature_quality.compare(
    np.array([3.0, 1.0, 2.0]), np.array([0.0, 2.0, 1.0]), np.array([0, 0, 1])
  )
  # Weights ¼ ¼ ½. Below 3: all; below 1: ¼ and half of ½; below 2: ¾ and half
  # of ¼.
  assert got.auc == pytest.approx(0.25 * 1 + 0.25 * 0.5 + 0.5 * 0.875)
  assert (got.mean, got.other_mean, got.difference.mean) == (2, 1, 1)
  assert got.other_std == pytest.approx(math.sqrt(0.5))
  assert got.effect == pytest.approx(math.sqrt(2))


def test_planted_taste_is_found_and_noise_is_not():
  found = measure(walks())
  # A random pair is in one cluster, too, once in 20 times: then it is a draw.
  assert found.co_consumption.to_matched.auc == pytest.approx(
    1 - 0.5 / CLUSTERS, abs=0.01
  )
  assert found.co_consumption.to_matched.effect > 1
  assert 'carries something about taste' in feature_quality.verdict(found)
  noise = measure(walks(aligned=False))
  difference = noise.co_consumption.to_matched.difference
  assert difference.low < 0 < difference.high
  assert abs(noise.co_consumption.to_matched.auc - 0.5) < 0.03
  assert 'learn nothing' in feature_quality.verdict(noise)
  for near in found.neighbours:
    assert {(i - 1) // PER_CLUSTER for i in near.rows} == {0}
    assert near.item not in near.rows and (np.diff(near.cosines) <= 0).all()


def test_chance_is_what_mixed_up_rows_show():
  # With few pairs, effects that look large; the verdict knows.
  dataset = small.dataset()
  rows = np.flatnonzero(dataset.features['text'].any(axis=1))
  effects, verdicts = [], []
  for seed in range(60):
    text = dataset.features['text'].copy()
    text[rows] = text[np.random.default_rng(seed).permutation(rows)]
    found = measure(
      dataclasses.replace(dataset, features={'text': text}), seed=seed
    )
    effects.append(found.co_consumption.to_matched.effect)
    verdicts.append('too few' in feature_quality.verdict(found))
  assert np.std(effects) == pytest.approx(found.co_consumption.chance, rel=0.3)
  assert np.mean(verdicts) > 0.85


def test_random_partners_have_the_popularity_of_training_and_another_client():
  rng = np.random.default_rng(0)
  client = np.repeat([0, 2, 3], [4000, 3000, 3000])
  items = 10 * client + rng.integers(3, size=10_000)
  owner = np.repeat([0, 2, 3], 20_000)
  got = feature_quality._of_others(rng, items, client, owner)
  assert not (got // 10 == owner).any()
  of_first = np.bincount(got[owner == 0] // 10, minlength=4) / 20_000
  np.testing.assert_allclose(of_first, [0, 0, 0.5, 0.5], atol=0.02)
  of_last = np.bincount(got[owner == 3] // 10, minlength=4) / 20_000
  np.testing.assert_allclose(of_last, [4 / 7, 0, 3 / 7, 0], atol=0.02)


@pytest.mark.parametrize('kind', ['visual', 'text'])
def test_held_out_items_change_nothing(kind):
  dataset = small.dataset()
  items = dataset.items.copy()
  items[~dataset.is_train] = 9
  assert (items != dataset.items).any()
  changed = dataclasses.replace(dataset, items=items)
  small.assert_trees_equal(
    measure(dataset, kind)._replace(kind=0),
    measure(changed, kind)._replace(kind=0),
  )
  # Another seed draws other pairs; a training item counts.
  pairs = measure(dataset, kind).co_consumption
  assert not np.array_equal(
    pairs.uniform, measure(dataset, kind, seed=1).co_consumption.uniform
  )
  items[0] = 9
  assert not np.array_equal(
    pairs.consecutive, measure(changed, kind).co_consumption.consecutive
  )


def test_items_by_id_title_and_part():
  dataset = dataclasses.replace(
    small.dataset(),
    titles=(
      '',
      'Matrix, The (1999)',
      'Alien (1979)',
      'Aliens (1986)',
      *[''] * (small.dataset().num_rows - 4),
    ),
  )
  counts = dataset.items[dataset.is_train]
  more = max((2, 3), key=lambda row: (counts == row).sum())

  def find(text):
    return feature_quality.find_items(dataset, text).tolist()

  assert find('matrix, the') == [1]
  assert find('Matrix, The (1999); alien (1979)') == [1, 2]
  assert find('3, 2,3') == [3, 2]
  assert find('alien') == [more]
  with pytest.raises(UserError, match="'Shrek'"):
    find('Alien (1979); Shrek')


@pytest.mark.slow
def test_from_the_shell(ml_1m, tmp_path):
  data = ('--dataset=ml-1m', f'--data_dir={ml_1m}')
  out, _ = test_cli.run(
    'inspect_features',
    *data,
    '--items=Amélie 7 (2001); 3',
    f'--out={tmp_path / "q.png"}',
  )
  assert 'Amélie 7 (2001)\ncosine' in out and 'effective rank' in out
  assert 'text: covers 100.0% of the training interactions; ' in out
  assert (tmp_path / 'q.png').read_bytes().startswith(b'\x89PNG')
  out, _ = test_cli.run(
    'inspect_features', *data, '--json', '--visual_features=none'
  )
  found = json.loads(out)
  assert found['text']['coverage']['interactions'] == 1
  assert len(found['text']['neighbours'][0]['nearest']) == 5
  assert 'visual' not in found
  assert 'ml-1m: no features' in test_cli.refused(
    *data,
    '--visual_features=none',
    '--text_features=none',
    binary='inspect_features',
  )
