"""What lists are beside accurate, worked out by hand, and its properties."""

import dataclasses
import json
import math

import numpy as np
import pytest
from pyarrow import parquet

import fedmmr_jax as fm
from experiments import beyond as shown_lib
from fedmmr_jax import metrics
from fedmmr_jax.evaluation import beyond_accuracy as beyond
from fedmmr_jax.evaluation import bootstrap
from fedmmr_jax.evaluation.beyond_accuracy import Asked, Items, Offer
from tests import small
from tests.test_cli import refused, run, TINY
from tests.test_user_results import results_of

NAMES = (
  metrics.COVERAGE,
  metrics.GINI,
  metrics.NOVELTY,
  metrics.DIVERSITY + 'visual',
  metrics.DIVERSITY + 'text',
  metrics.POPULARITY,
  metrics.LIFT,
  metrics.MISCALIBRATION,
)
# Two users, lists of two among five items; row 0 is padding.
LISTS = np.array([[1, 2], [2, 3]])
ALL = np.ones((1, 2))
ITEMS = Items(
  counts=np.array([0, 4, 2, 1, 1, 0]),
  num_items=5,
  features={
    'text': np.array([[0, 0], [2, 0], [0, 3], [1, 1], [0, 0], [1, 0]], float)
  },
  genres=((), ('x',), ('x', 'y'), ('y',), (), ('y', 'z')),
)
HISTORIES = np.array([[1, 4, 0], [3, 3, 4]])


def shown(*counts):
  return np.array([counts], float)


def test_coverage_by_hand():
  assert beyond.coverage(shown(1, 2, 1), 5) == [3 / 5]
  found = Offer(LISTS, 5, {}, np.ones(2))
  assert found.figures(ALL)['coverage'] == [3 / 5]
  assert found.figures(np.array([[1, 0]]))['coverage'] == [2 / 5]


def test_gini_by_hand():
  # x = 0, 0, 1, 1, 2 of N = 5: Σ (2j − 6) x = 0 + 2 + 8, by 5 · 4.
  assert beyond.gini(shown(1, 2, 1), 5) == pytest.approx([10 / 20])
  assert beyond.gini(shown(3, 3, 3, 3), 4) == pytest.approx([0])
  assert beyond.gini(shown(0, 7, 0), 8) == pytest.approx([1 - 1 / 8])


def test_novelty_by_hand():
  # Shares 1/2, 1/4, 1/8, 1/8 of 8 interactions: 1, 2, 3, 3 bits; an item
  # nobody trained on counts as one interaction.
  found = beyond.offer(ITEMS, HISTORIES, np.array([[1, 2], [5, 0]]))
  assert found.values['novelty'].tolist() == [1.5, 3]


def test_diversity_by_hand():
  # The angles between items 1, 2 and 3 are 90°, 45° and 45°; 4 has no features.
  half = 1 - math.sqrt(0.5)
  lists = np.array([[1, 2, 0], [1, 3, 4], [1, 4, 0], [1, 2, 3], [1, 5, 0]])
  found = beyond.diversity(lists, ITEMS.features['text'])
  np.testing.assert_allclose(
    found, [1, half, np.nan, (1 + 2 * half) / 3, 0], atol=1e-12
  )


def test_popularity_and_its_lift_by_hand():
  found = beyond.offer(ITEMS, HISTORIES, LISTS)
  assert found.values['popularity'].tolist() == [3, 1.5]
  assert found.taste.tolist() == [2.5, 1]  # (4 + 1) / 2 and (1 + 1 + 1) / 3
  figures = found.figures(ALL)
  assert figures['popularity'] == [2.25]
  assert figures['popularity_lift'] == pytest.approx([2.25 / 1.75 - 1])


def test_a_user_without_a_history_counts_in_no_lift():
  found = beyond.offer(ITEMS, np.array([[1, 4], [0, 0]]), LISTS)
  figures = found.figures(ALL)
  assert figures['popularity'] == [2.25]
  assert figures['popularity_lift'] == pytest.approx([3 / 2.5 - 1])
  # Nor does one without a list.
  found = beyond.offer(ITEMS, HISTORIES, np.array([[1, 2], [0, 0]]))
  figures = found.figures(ALL)
  assert figures['popularity'] == [3]
  assert figures['popularity_lift'] == pytest.approx([3 / 2.5 - 1])


def test_miscalibration_by_hand():
  # The history: x, then x and y: p = 3/4, 1/4. The list: y alone, and an item
  # of no genre, which counts nowhere.
  found = beyond.miscalibration(
    np.array([[3, 4]]), np.array([[1, 2]]), ITEMS.genres
  )
  q = 0.01 * 0.75, 0.99 + 0.01 * 0.25
  expected = 0.75 * math.log(0.75 / q[0]) + 0.25 * math.log(0.25 / q[1])
  assert found == pytest.approx([expected])


def test_a_list_like_the_history_is_calibrated():
  lists = np.array([[1, 3], [2, 0], [4, 0]])
  histories = np.array([[2, 2, 4], [2, 2, 2], [1, 2, 3]])
  found = beyond.miscalibration(lists, histories, ITEMS.genres)
  np.testing.assert_allclose(found, [0, 0, np.nan], atol=1e-12)


def random_offer(num_users=40, seed=0, order=None, padding=0):
  rng = np.random.default_rng(seed)
  items = Items(
    rng.integers(0, 9, 31),
    30,
    {'text': rng.normal(size=(31, 4))},
    ((), *(tuple('xyz'[: 1 + i % 3]) for i in range(30))),
  )
  lists = rng.permuted(np.tile(np.arange(1, 31), (num_users, 1)), axis=1)[:, :5]
  histories = rng.integers(1, 31, (num_users, 7))
  if order is not None:
    lists, histories = lists[order], histories[order]
  pad = ((0, 0), (0, padding))
  return beyond.offer(items, np.pad(histories, pad), np.pad(lists, pad))


def test_padding_and_the_order_of_users_change_nothing():
  expected = random_offer().figures(np.ones((1, 40)))
  order = np.random.default_rng(1).permutation(40)
  other = random_offer(order=order, padding=3).figures(np.ones((1, 40)))
  assert list(expected) == list(other)
  for name, value in expected.items():
    np.testing.assert_allclose(other[name], value, err_msg=name)


def test_a_user_of_weight_two_is_two_users():
  twice = random_offer(order=[0, 0, *range(2, 40)])
  weights = np.ones((1, 40))
  weights[0, :2] = 2, 0
  found = random_offer().figures(weights)
  for name, value in twice.figures(np.ones((1, 40))).items():
    np.testing.assert_allclose(found[name], value, err_msg=name)


def test_bounds():
  for name, found in beyond.estimates(random_offer(), 50).items():
    assert found.low <= found.value <= found.high, name
  # Moved up by what resamples lack, it would end above 1.
  few = beyond.estimates(random_offer(11, seed=5), 50)['coverage']
  assert few.value < few.high == 1
  found = beyond.estimates(random_offer(), 50)
  assert 0 < found['coverage'].value <= 1 and 0 < found['gini'].value < 1
  assert found['miscalibration'].value > 0


def test_equal_lists_do_not_differ_and_pairs_are_resampled_together():
  found = random_offer()
  for difference in beyond.differences(found, random_offer(), 50).values():
    assert difference == (0, 0, 0)
  # Every list longer in popularity by 1: no spread at all.
  values = {**found.values, 'popularity': found.values['popularity'] + 1}
  more = beyond.differences(found._replace(values=values), found, 50)
  np.testing.assert_allclose(more['popularity'], [1, 1, 1])


def test_gaps_by_hand():
  values = {'HR@2': np.array([1.0, 0, 1, 1]), 'm': np.array([-1.0, -1, 2, 4])}
  rows = np.array([[1, 2], [1, 2], [3, 4], [5, 3]])
  found = beyond.fairness(
    Offer(rows, 5, values, np.ones(4)),
    {'a': np.arange(4) < 2, 'b': np.arange(4) >= 2},
    resamples=200,
  )
  assert found.users == {'a': 2, 'b': 2}
  assert [found.groups[x]['coverage'].value for x in 'ab'] == [2 / 5, 3 / 5]
  gap = found.gaps['HR@2']
  assert (gap.spread.value, gap.ratio.value, gap.deviation.value) == (
    0.5,
    0.5,
    0.25,
  )
  # Of six divisions of three hits in pairs, all are 2 to 1.
  assert gap.by_chance == 0.5
  assert found.gaps['m'].spread.value == 4
  assert math.isnan(found.gaps['m'].ratio.value)  # of a negative figure
  assert gap.spread.low >= 0 and gap.ratio.high <= 1


def test_by_chance_is_of_users_drawn_into_groups():
  # All of one group hit, none of the other: no random division is like that.
  first = np.arange(40) < 20
  offered = Offer(LISTS[[0] * 40], 5, {'HR@2': 1.0 * first}, np.ones(40))
  gap = beyond.fairness(offered, {'a': first, 'b': ~first}, 200).gaps['HR@2']
  assert gap.spread == (1, 1, 1)
  assert 0.1 < gap.by_chance < 0.6


def test_the_interval_of_coverage_holds_its_figure():
  """Every resample covers less; unmoved, no interval held the figure."""
  found = beyond.estimates(random_offer(30), 100)['coverage']
  assert found.low < found.value < found.high
  plain = bootstrap.generator(0, bootstrap.Stream.BOOTSTRAP).multinomial(
    30, np.full(30, 1 / 30), 100
  )
  resampled = random_offer(30).figures(plain.astype(float))['coverage']
  assert resampled.max() <= found.value
  assert found.high - found.low == pytest.approx(
    np.subtract(*np.percentile(resampled, [97.5, 2.5]))
  )


@pytest.mark.slow
def test_intervals_hold_what_they_should():
  """95 % of many samples of users, of what such samples have on average."""
  rng = np.random.default_rng(0)
  weights = np.log(1 / (1 + np.arange(200)) ** 0.8)

  def sample():
    noise = rng.gumbel(size=(300, 200))
    return Offer(
      1 + np.argsort(-noise - weights, axis=1)[:, :5], 200, {}, np.ones(300)
    )

  once = np.ones((1, 300))
  found = [sample().figures(once) for _ in range(300)]
  truth = {n: np.mean([f[n] for f in found]) for n in ('coverage', 'gini')}
  intervals = [beyond.estimates(sample(), 200) for _ in range(60)]
  for name, value in truth.items():
    held = [x[name].low <= value <= x[name].high for x in intervals]
    assert 0.85 <= np.mean(held) <= 1, name


@pytest.fixture(scope='module')
def ranked():
  simulation = small.simulation(experts='none').with_popular_negatives()
  state = simulation.init_state()
  return simulation, state, Asked.of(simulation, 'test')


@pytest.mark.parametrize('protocol', beyond.PROTOCOLS)
def test_hits_of_the_lists_are_those_of_the_ranks(ranked, protocol):
  simulation, state, asked = ranked
  rows = asked.lists(simulation, state, protocol, 5)
  _, ranks = simulation.evaluate(state, 'test')
  of_protocol = {
    'full': ranks.full,
    'sampled': ranks.sampled,
    'popularity': ranks.popular,
  }[protocol]
  hits = (rows == asked.targets[:, None]).any(axis=1)
  np.testing.assert_array_equal(hits, of_protocol < 5)
  assert (rows > 0).all()
  if protocol == 'sampled':
    drawn = np.asarray(simulation.data.sampled_negatives)[asked.clients, 1]
    for row, own, target in zip(rows, drawn, asked.targets):
      assert set(row.tolist()) <= {*own.tolist(), int(target)}


def test_new_items_are_in_no_list(ranked):
  simulation, state, asked = ranked
  few = asked._replace(items=asked.items._replace(num_items=45))
  rows = few.lists(simulation, state, 'full', 5)
  assert 0 < rows.min() and rows.max() <= 45
  assert asked.lists(simulation, state, 'full', 5).max() > 45
  assert few.most_popular(5).max() <= 45


def test_most_popular_lists_are_those_of_the_baseline(ranked):
  simulation, _, asked = ranked
  rows = asked.most_popular(5)
  counts = asked.items.counts
  for client, row in zip(asked.clients, rows):
    seen = set(simulation.dataset.sequence(client)[:-1].tolist())
    assert not seen & set(row.tolist())
    open_ = [c for i, c in enumerate(counts.tolist()) if i and i not in seen]
    assert counts[row].tolist() == sorted(open_, reverse=True)[:5]


def test_what_is_known_of_the_items(ranked):
  simulation, _, asked = ranked
  assert asked.items.num_items == simulation.dataset.num_items
  assert set(asked.items.features) == {'visual', 'text'}
  # Negatives [K, splits, n] are those of the split.
  numbers = np.arange(simulation.dataset.num_clients * 4).reshape(-1, 2, 2)
  data = simulation.data._replace(sampled_negatives=numbers)
  for number, split in enumerate(('val', 'test')):
    other = Asked.of(dataclasses.replace(simulation, data=data), split)
    np.testing.assert_array_equal(
      other.negatives['sampled'], numbers[:, number]
    )
  assert 'no lists' in small.error_of(Asked.of, simulation, 'cold')


def test_genres_come_from_arrays_too():
  users, items = [1, 1, 1], ['a', 'b', 'c']
  genres = {'a': ('x', 'y'), 'c': 'drama'}
  data = fm.Dataset.of(users, items, genres=genres)
  assert data.genres == ((), ('x', 'y'), (), ('drama',))
  assert fm.Dataset.of(users, items).genres == ()


@pytest.mark.slow
def test_from_the_shell(ml_1m, tmp_path):
  workdir = tmp_path / 'run'
  by = '--select_by=full/NDCG@3'
  run('train', *TINY, by, f'--data_dir={ml_1m}', f'--workdir={workdir}')
  people = tmp_path / 'users.csv'
  people.write_text('user_id,kind\n1,a\n2,a\n3,a\n4,b\n5,b\n6,b\n')
  table = tmp_path / 'users.parquet'
  out, _ = run(
    'evaluate',
    f'--workdir={workdir}',
    '--beyond',
    '--fairness',
    '--at=1,3',
    f'--user_file={people}',
    f'--compare={workdir}',
    f'--per_user={table}',
    '--json',
  )
  told = json.loads(out)
  assert set(told['test']['full']) == {
    'HR@1',
    'NDCG@1',
    'HR@3',
    'NDCG@3',
    'MRR',
  }
  assert list(told['beyond']) == [
    'full',
    'most popular',
    'sampled',
    'popularity',
  ]
  found = told['beyond']['full']
  assert set(found) == {f'{name}@{k}' for k in (1, 3) for name in NAMES}
  assert found['diversity_text@1']['value'] is None
  # Every item of this set is a drama.
  assert found['miscalibration@3']['value'] == pytest.approx(0)
  for by_metric in told['beyond_difference'].values():
    assert all(x['value'] in (0, None) for x in by_metric.values())
  groups = told['fairness']['kind']
  assert groups['users'] == {'a': 3, 'b': 3}
  mean = np.mean([g['HR@3']['value'] for g in groups['groups'].values()])
  assert mean == pytest.approx(told['test']['full']['HR@3'])
  assert told['left_out'] == []
  columns = parquet.read_table(table).to_pydict()
  assert np.mean(columns['full/novelty@3']) == pytest.approx(
    found['novelty@3']['value']
  )
  given = f'--workdir={workdir}', '--at=28'
  _, err = run('evaluate', *given, status=2)
  assert 'error: --at=28: the catalogue has 27 items' in err


@pytest.mark.slow
def test_what_has_no_lists_is_refused():
  for given, said in (
    (('--beyond', '--protocol=corrected'), '--beyond: --protocol=corrected'),
    (
      ('--fairness', '--split=cold'),
      '--fairness: --split=cold ranks new items',
    ),
    (('--at=',), '--at=: a cut-off is 1 or more'),
  ):
    assert said in refused('--workdir=x', *given, binary='evaluate'), given


def test_tables():
  found = beyond.estimates(random_offer(), 20)
  text = shown_lib.table({'full': found, 'most popular': found})
  value, low, high = found['coverage']
  assert f'{value:.4f} [{low:.4f}, {high:.4f}]' in text
  assert shown_lib.number(347.94) == '347.9'
  assert shown_lib.number(float('nan')) == '-'
  assert shown_lib.number(-0.00001) == '0.0000'
  gap = bootstrap.Estimate(103.5, 79.395, 126.1)
  assert '103.5 [79.4, 126.1]' in shown_lib.table({'full': {'popularity': gap}})
  parts = {'a': np.arange(40) < 9, 'b': np.arange(40) >= 9}
  gaps = beyond.fairness(random_offer(), parts, 20)
  text = shown_lib.fairness_table('kind', gaps)
  assert 'by chance' in text and '31' in text.splitlines()[2]
  # JSON knows no NaN.
  assert shown_lib.as_json({'x': (found['gini'], float('nan'))[0]})['x'].keys()
  assert shown_lib.as_json({'x': float('nan')}) == {'x': None}


def test_groups_of_nobody_are_none():
  results = results_of([1, 1, 5, 5], [1] * 4)
  offered = random_offer(num_users=4)
  kind = {str(user): 'ab'[user % 2] for user in range(4)}
  found = shown_lib.fairness(
    offered, 'full', 10, results, {'kind': kind}, results.num_train
  )
  assert found[shown_lib.HISTORY].users == {'1': 2, '5': 2}
  assert found['kind'].users == {'a': 2, 'b': 2}
  assert list(found['kind'].gaps)[:3] == ['HR@10', 'NDCG@10', 'MRR']
  assert 'coverage@10' in found['kind'].gaps
