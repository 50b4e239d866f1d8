"""Ranking metrics by hand, and means that merge."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import fedmmr_jax as fm
from fedmmr_jax import metrics
from fedmmr_jax.client import update as client_lib
from tests import small


def test_rank_0_is_perfect():
  assert set(metrics.ranking(np.array([0])).values()) == {1.0}


def test_names():
  assert list(metrics.ranking(np.array([0]))) == [
    'HR@5',
    'NDCG@5',
    'HR@10',
    'NDCG@10',
    'HR@20',
    'NDCG@20',
    'MRR',
  ]


def test_rank_9_is_the_last_hit_at_10():
  got = metrics.ranking(np.array([9]))
  assert got == pytest.approx(
    {
      'HR@5': 0,
      'NDCG@5': 0,
      'HR@10': 1,
      'NDCG@10': 1 / np.log2(11),  # 0.289065
      'HR@20': 1,
      'NDCG@20': 1 / np.log2(11),
      'MRR': 0.1,
    }
  )


@pytest.mark.parametrize('n', [5, 10, 20])
def test_cutoffs_are_exclusive(n):
  assert metrics.ranking(np.array([n - 1]))[f'HR@{n}'] == 1
  assert metrics.ranking(np.array([n]))[f'HR@{n}'] == 0
  assert metrics.ranking(np.array([n]))[f'NDCG@{n}'] == 0


def test_users_are_averaged():
  # Ranks 0, 2, 6, 30: 1/log2(2) = 1, 1/log2(4) = 1/2, 1/log2(8) = 1/3.
  got = metrics.ranking(np.array([0, 2, 6, 30]))
  assert got == pytest.approx(
    {
      'HR@5': 2 / 4,
      'NDCG@5': (1 + 1 / 2) / 4,
      'HR@10': 3 / 4,
      'NDCG@10': (1 + 1 / 2 + 1 / 3) / 4,
      'HR@20': 3 / 4,
      'NDCG@20': (1 + 1 / 2 + 1 / 3) / 4,
      'MRR': (1 + 1 / 3 + 1 / 7 + 1 / 31) / 4,
    }
  )


def test_the_order_of_users_does_not_matter():
  ranks = np.array([3, 0, 11, 7, 100])
  assert metrics.ranking(ranks[::-1]) == pytest.approx(metrics.ranking(ranks))


def test_a_better_rank_never_lowers_a_metric():
  values = [list(metrics.ranking(np.array([r])).values()) for r in range(30)]
  assert (np.diff(values, axis=0) <= 0).all()


def test_results_are_plain_floats():
  assert {type(v) for v in metrics.ranking(np.array([1])).values()} == {float}


def test_over_counts_only_what_is_counted():
  got = metrics.over(
    jnp.array([1.0, jnp.nan, 4.0]), jnp.array([True, False, True])
  )
  assert (float(got.total), float(got.weight)) == (5.0, 2.0)


def test_merged_means_are_the_mean_of_all():
  # Mean 2 of 3 samples with the mean 5 of 1 sample: (2·3 + 5·1) / 4 = 2.75.
  merged = metrics.merge(
    {'x': metrics.mean(2.0, 3)}, {'x': metrics.mean(5.0, 1)}
  )
  assert metrics.finish(merged) == {'x': 2.75}


def test_merging_with_empty_changes_nothing():
  one = metrics.mean(2.0, 3)
  assert metrics.finish({'x': metrics.merge(metrics.EMPTY, one)}) == {'x': 2.0}


def test_weight_0_gives_none():
  assert metrics.finish({'x': metrics.EMPTY}) == {'x': None}


def test_a_nan_of_weight_0_does_not_spread():
  nothing = metrics.mean(jnp.nan, 0)
  assert metrics.finish({'x': nothing}) == {'x': None}
  merged = metrics.merge(nothing, metrics.mean(2.0, 3))
  assert metrics.finish({'x': merged}) == {'x': 2.0}


def test_finished_means_are_plain_floats():
  finished = metrics.finish({'x': metrics.mean(jnp.float32(2.0), jnp.int32(3))})
  assert type(finished['x']) is float


def test_vectors_have_means_too():
  first = metrics.mean(jnp.array([1.0, 0.0]), 3)
  merged = metrics.merge(
    metrics.empty((2,)),
    metrics.merge(first, metrics.mean(jnp.array([0.0, 1.0]), 1)),
  )
  assert metrics.finish({'a': merged, 'b': metrics.empty((2,))}) == {
    'a': [0.75, 0.25],
    'b': None,
  }


def test_recbole_names_and_definitions():
  # Ranks 1, 3 and 11, by hand.
  found = metrics.recbole_of_each(np.array([0, 2, 10]))
  assert found['hit@10'].tolist() == found['recall@10'].tolist() == [1, 1, 0]
  assert found['precision@5'].tolist() == [0.2, 0.2, 0]
  np.testing.assert_allclose(found['mrr@10'], [1, 1 / 3, 0])
  np.testing.assert_allclose(found['map@20'], [1, 1 / 3, 1 / 11])
  np.testing.assert_allclose(found['ndcg@20'], [1, 0.5, np.log(2) / np.log(12)])
  assert set(found) == {
    f'{kind}@{n}'
    for n in (5, 10, 20)
    for kind in ('hit', 'recall', 'precision', 'mrr', 'map', 'ndcg')
  }


def test_counts_beyond_what_float32_counts_exactly():
  # 2,000 chunks of 50,001 make six times 2^24. Each addition may be off by half
  # a unit in the last place, 2^-24 of the sum; a mean of ones stays one.
  total = metrics.EMPTY
  for _ in range(2000):
    total = metrics.merge(total, metrics.mean(1.0, np.float32(50_001)))
  assert float(total.weight) == pytest.approx(2000 * 50_001, rel=2000 * 2**-24)
  assert metrics.finish({'x': total})['x'] == 1


def test_a_metric_of_training_has_one_title_everywhere():
  assert metrics.figure('w_audio') == ('router audio', 'Router', 'mean weight')
  assert metrics.figure('gradient_audio').title == 'gradient audio'
  # One that nobody has told of is shown all the same.
  assert metrics.figure('my_figure') == ('my figure', 'My figure', 'mean')
  names = ['my_figure', 'gradient_b', 'gradient_a', 'w_a', 'loss']
  assert metrics.ordered(names) == [
    'loss',
    'w_a',
    'gradient_b',
    'gradient_a',
    'my_figure',
  ]


def test_every_metric_of_a_round_is_in_the_table():
  model = small.simulation().model
  known = [*client_lib.empty_metrics(model), *client_lib.no_client_metrics()]
  known.remove(metrics.WEIGHT_SHARES)  # a figure of its own
  assert metrics.ordered(['nobody', *known])[-1] == 'nobody'


def depth(ranks):
  return {'depth': np.log2(ranks + 1)}


def test_a_further_metric_stands_beside_the_usual_ones():
  ranks = np.array([0, 1, 3])
  found = metrics.ranking_of_each(ranks, [depth])
  assert list(found) == [*metrics.RANKING, 'depth']
  assert found['depth'].tolist() == [0, 1, 2]
  assert metrics.ranking(ranks, [depth])['depth'] == 1
  assert metrics.own_names([depth]) == ['depth']


@dataclasses.dataclass(frozen=True)
class Within:
  n: int = 3

  def __call__(self, ranks):
    return {f'within {self.n}': ranks < self.n}


def test_a_further_metric_by_name():
  named = metrics.further_metrics(
    ['recbole', f'{__name__}:Within', 'n=4', f'{__name__}:depth']
  )
  assert named == (metrics.recbole_of_each, Within(4), depth)
  assert metrics.ranking(np.array([2, 4]), named)['within 4'] == 0.5
  for name, message in (
    ('precision', "no metric 'precision'; one of recbole, or your own as"),
    ('math:pi', 'metric math:pi: cannot be called'),
    ('recbole,k=1', 'metric recbole,k=1: there is no option k; it has no'),
  ):
    assert message in small.error_of(metrics.further_metrics, [name])


@pytest.mark.parametrize(
  'given, message',
  [
    (lambda ranks: ranks, 'gives ndarray, not a dict'),
    (lambda ranks: {'x': 0.5}, "'x' has shape () for ranks of shape (40,)"),
    (lambda ranks: {'x': ranks[1:]}, "'x' has shape (39,) for ranks of"),
    (lambda ranks: {'x': ['a'] * 40}, "'x' is no array of numbers"),
    (
      lambda ranks: {'x': np.where(ranks > 2, np.nan, 0)},
      "'x' is NaN or infinite at rank 3",
    ),
    (lambda ranks: {'MRR': ranks}, "'MRR' is no name, or that of another"),
    (lambda ranks: {1: ranks}, '1 is no name'),
  ],
)
def test_a_metric_that_gives_something_else_is_refused(given, message):
  error = small.error_of(metrics.own_names, [given])
  assert error.startswith('metric <lambda>') and message in error
  # Before anything is trained.
  assert message in small.error_of(
    fm.Simulation.of, small.config(), small.dataset(), metrics=[given]
  )


def test_two_metrics_of_one_name_are_refused():
  assert 'that of another' in small.error_of(metrics.own_names, [depth, depth])


def test_cutoffs_of_ones_own():
  found = metrics.ranking_of_each(np.array([0, 6]), cutoffs=(1, 7))
  assert list(found) == ['HR@1', 'NDCG@1', 'HR@7', 'NDCG@7', 'MRR']
  assert found['HR@1'].tolist() == [1, 0]
  assert found['NDCG@7'].tolist() == pytest.approx([1, 1 / 3])  # 1/log2(8)
  (recbole,) = metrics.with_cutoffs([metrics.recbole_of_each], (2,))
  assert list(recbole(np.array([1]))) == [
    f'{name}@2' for name in ('hit', 'recall', 'precision', 'mrr', 'map', 'ndcg')
  ]
  assert metrics.with_cutoffs([depth], (2,)) == (depth,)
  assert metrics.parse_cutoffs(['50', '1']) == (1, 50)
  assert [metrics.headline_cutoff(x) for x in ((1, 10, 50), (1, 5))] == [10, 5]


def test_a_cutoff_behind_the_catalogue_is_refused():
  metrics.check_cutoffs((1, 60), 60)
  error = small.error_of(metrics.check_cutoffs, (1, 61), 60)
  assert error == '`at=61`: the catalogue has 60 items'


@pytest.mark.parametrize(
  'words, said',
  [
    (['0', '5'], '`at=0,5`: a cut-off is 1 or more'),
    (['5', '5'], '`at=5,5`: 5 is named twice'),
    (['five'], '`at=five`: not whole numbers with commas between them'),
    ([], '`at=`: a cut-off is 1 or more'),
  ],
)
def test_cutoffs_that_are_none(words, said):
  assert small.error_of(metrics.parse_cutoffs, words) == said
