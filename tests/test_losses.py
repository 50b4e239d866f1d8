"""Loss terms by hand, repair 2 and what padding must not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax.client import losses
from fedmmr_jax.config import InstanceWeight, RunConfig
from tests import small

LN2, LN3, LN4 = np.log([2, 3, 4])
# ln(1 + 1/e): an InfoNCE of 2 whose match has similarity 1, the other 0.
SOFT = np.log1p(np.exp(-1))  # 0.313262
BOTH = jnp.array([True, True])
# sigmoid(ln(3/7)) = 0.3 and sigmoid(ln 4) = 0.8
REC_OF_SURPRISE = {0.3: np.log(3 / 7), 0.8: np.log(4)}


def close(value, rel=1e-5):
  return pytest.approx(value, rel=rel, abs=1e-6)


def test_weighted_mean_by_hand():
  # (1·1 + 3·3) / (1 + 3) = 2.5
  values, weights = jnp.array([1.0, 3.0]), jnp.array([1.0, 3.0])
  assert float(losses.weighted_mean(values, weights)) == 2.5


def test_weighted_mean_of_nothing_is_0():
  assert float(losses.weighted_mean(jnp.ones(3), jnp.zeros(3))) == 0.0


def test_weighted_mean_of_tiny_weights_is_a_mean():
  values, weights = jnp.array([1.0, 3.0]), jnp.full(2, 1e-20)
  assert losses.weighted_mean(values, weights) == close(2.0)


def test_weighted_mean_ignores_anything_of_weight_0():
  values = jnp.array([2.0, jnp.nan, jnp.inf, 4.0])
  counted = jnp.array([True, False, False, True])
  assert float(losses.weighted_mean(values, counted)) == 3.0
  gradient = jax.grad(losses.weighted_mean)(values, counted)
  assert gradient.tolist() == [0.5, 0.0, 0.0, 0.5]


def test_weighted_mean_broadcasts_its_weights():
  # Rows of weight 1 and 0: (1 + 2) / 2.
  values = jnp.array([[1.0, 2.0], [5.0, 6.0]])
  assert float(losses.weighted_mean(values, jnp.array([[1.0], [0.0]]))) == 1.5


def recommendation_loss(positive, negatives):
  return losses.cross_entropy(positive, jax.nn.logsumexp(negatives, axis=-1))


def test_recommendation_loss_by_hand():
  positive = jnp.asarray([0.0, LN2])
  negatives = jnp.asarray([[0.0, 0.0, 0.0], [0.0, 0.0, LN4]])
  # ln(1 + 3) − 0 and ln(2 + 1 + 1 + 4) − ln 2 = ln 4
  assert recommendation_loss(positive, negatives) == close([LN4, LN4])


def test_recommendation_loss_of_large_scores_is_finite():
  loss = recommendation_loss(jnp.array([-1e3, 1e3]), jnp.array([[1e3], [-1e3]]))
  assert loss == close([2e3, 0])


def test_pairwise_surprise_by_hand():
  # −ln σ(0) = ln 2; −ln σ(ln 3) = ln(4/3); the mean over the negatives.
  surprise = losses.pairwise_surprise(
    jnp.asarray([0.0, LN3]), jnp.asarray([[0.0, 0.0], [0.0, LN3]])
  )
  assert surprise == close([LN2, (np.log(4 / 3) + LN2) / 2])


def test_surprise_is_the_sigmoid_of_the_loss():
  assert losses.surprise_of(jnp.asarray([0.0, LN4])) == close([0.5, 0.8])


def test_surprise_carries_no_gradient():
  rec = jnp.array([0.5, 2.0])
  gradient = jax.grad(lambda x: jnp.sum(losses.surprise_of(x)))(rec)
  assert gradient.tolist() == [0, 0]
  gradient = jax.grad(
    lambda p, n: jnp.sum(losses.pairwise_surprise(p, n)), (0, 1)
  )(rec, jnp.ones((2, 3)))
  assert all((g == 0).all() for g in gradient)


def test_instance_weights_by_hand():
  weights = losses.instance_weights(jnp.array([0.3, 0.8]), 0.5)
  assert weights == close([1.15, 1.40])


def test_infonce_of_two_aligned_samples():
  # Similarity = I at temperature 1: rows and columns ln(e + 1) − 1. The
  # lengths 3 and 2 of the vectors do not matter.
  loss = losses.symmetric_infonce(3 * jnp.eye(2), 2 * jnp.eye(2), BOTH, 1.0)
  assert loss == close([SOFT, SOFT])


def test_infonce_of_two_samples_is_symmetric_by_hand():
  # Similarity [[1, 1], [0, 0]]. Rows: ln 2e − 1 = ln 2 and ln 2. Columns:
  # ln(e + 1) − 1 and ln(e + 1) − 0 = 1 + SOFT.
  semantic = jnp.array([[1.0, 0.0], [1.0, 0.0]])
  expected = close([(LN2 + SOFT) / 2, (LN2 + 1 + SOFT) / 2])
  assert losses.symmetric_infonce(jnp.eye(2), semantic, BOTH, 1.0) == expected
  assert losses.symmetric_infonce(semantic, jnp.eye(2), BOTH, 1.0) == expected


def test_infonce_temperature_divides_the_similarity():
  # 1 / 0.5 = 2: ln(e² + 1) − 2
  loss = losses.symmetric_infonce(jnp.eye(2), jnp.eye(2), BOTH, 0.5)
  assert loss == close([np.log1p(np.exp(-2))] * 2)


def test_infonce_takes_a_temperature_for_each_sample():
  loss = losses.symmetric_infonce(
    jnp.eye(2), jnp.eye(2), BOTH, jnp.array([1.0, 0.5])
  )
  assert loss == close([SOFT, np.log1p(np.exp(-2))])


def test_infonce_of_one_sample_is_0():
  assert losses.symmetric_infonce(
    jnp.eye(2), jnp.eye(2), jnp.array([True, False]), 1.0
  )[0] == close(0)


def views(seed, size, width=8):
  visual, semantic = np.random.default_rng(seed).normal(size=(2, size, width))
  return jnp.asarray(visual, jnp.float32), jnp.asarray(semantic, jnp.float32)


@pytest.mark.parametrize('garbage', [0.0, 1.0, -1e6])
def test_infonce_of_invalid_samples_changes_nothing(garbage):
  visual, semantic = views(0, 4)
  valid = jnp.array([True, False, True, True])
  rest = np.array([0, 2, 3])
  expected = losses.symmetric_infonce(
    visual[rest], semantic[rest], valid[rest], 0.07
  )
  spoilt = (x.at[1].set(garbage) for x in (visual, semantic))
  loss = losses.symmetric_infonce(*spoilt, valid, 0.07)
  assert loss[rest] == close(np.asarray(expected))
  assert np.isfinite(loss).all()


def test_load_balance_by_hand():
  # Mean usage (0.7, 0.3): 0.2² + 0.2² = 0.08
  weights = jnp.array([[0.8, 0.2], [0.6, 0.4]])
  assert losses.load_balance_loss(weights, jnp.ones(2)) == close(0.08)


def test_load_balance_of_opposite_choices_is_0():
  assert losses.load_balance_loss(jnp.eye(2), jnp.ones(2)) == close(0)


def test_load_balance_counts_what_is_counted():
  weights = jnp.array([[1.0, 0.0], [0.8, 0.2], [0.6, 0.4]])
  counted = jnp.array([False, True, True])
  assert losses.load_balance_loss(weights, counted) == close(0.08)


def test_load_balance_of_nothing_is_0_with_a_zero_gradient():
  value, gradient = jax.value_and_grad(losses.load_balance_loss)(
    jnp.eye(2), jnp.zeros(2)
  )
  assert float(value) == 0.0
  assert (gradient == 0).all()


def test_late_targets_count_more():
  importance = losses.importance_of(jnp.array([0.0, 0.5, 1.0]), 0.8)
  np.testing.assert_allclose(importance, [0.2, 1.0, 1.8], rtol=1e-6)
  rec, profile = jnp.array([1.0, 2.0, 5.0]), jnp.array([1.0, 0.0, 3.0])
  nothing, nobody = jnp.zeros((3, 2)), jnp.zeros(3, bool)
  terms = losses.combine(
    InstanceWeight(),
    0.01,
    rec,
    jnp.array([True, False, True]),
    [nothing, nothing],
    jnp.stack([nobody, nobody], axis=-1),
    0.0,
    importance,
    profile,
    0.5,
  )
  # The mean is over the samples, not over their importance.
  assert float(terms.rec) == close((0.2 * 1 + 1.8 * 5) / 2)
  assert float(terms.total) == close(4.6 + 0.5 * (0.2 * 1 + 1.8 * 3) / 2)


def combined(
  rec,
  visual,
  semantic,
  valid=None,
  has_both=None,
  load_balance=0.0,
  contrastive='instance_weight',
):
  """`combine` of samples that count, unless said otherwise."""
  everyone = jnp.ones(len(rec), bool)
  return losses.combine(
    small.config(contrastive=contrastive).contrastive,
    0.01,
    jnp.asarray(rec, jnp.float32),
    everyone if valid is None else valid,
    [] if visual is None else [visual, semantic],
    jnp.stack([everyone if has_both is None else has_both] * 2, axis=-1),
    load_balance,
  )


@pytest.mark.parametrize(
  'drift, contrastive, instance_weight',
  [
    ('unweighted', SOFT, 1.0),
    ('instance_weight', (1.15 + 1.40) / 2 * SOFT, (1.15 + 1.40) / 2),
    (
      'adaptive_temperature',
      (np.log1p(np.exp(-1 / 1.15)) + np.log1p(np.exp(-1 / 1.40))) / 2,
      1.0,
    ),
  ],
)
def test_combine_by_hand(drift, contrastive, instance_weight):
  terms = combined(
    [REC_OF_SURPRISE[0.3], REC_OF_SURPRISE[0.8]],
    jnp.eye(2),
    jnp.eye(2),
    load_balance=0.08,
    contrastive=f'{drift},temperature=1',
  )
  rec = (np.log(3 / 7) + np.log(4)) / 2
  assert terms.rec == close(rec)
  assert terms.contrastive == close(contrastive)
  assert terms.instance_weight == close(instance_weight)
  assert terms.load_balance == close(0.08)
  assert terms.total == close(rec + 0.1 * contrastive + 0.01 * 0.08)


def gradient_shares(drift):
  """Share of the easy and of the hard sample in the pull of their pairs."""
  # Visual and semantic views are four orthogonal unit vectors, so every
  # similarity is 0 and every softmax 1/2, and ∂loss_i/∂similarity_ii is
  # −(1/2)·weight_i/temperature_i. View i of one kind points along axis i (or
  # 2 + i), so that derivative can be read off the gradient.
  visual, semantic = jnp.eye(2, 4), jnp.eye(2, 4, 2)
  rec = [REC_OF_SURPRISE[0.3], REC_OF_SURPRISE[0.8]]
  gradient = jax.grad(
    lambda v: combined(rec, v, semantic, contrastive=drift).contrastive
  )(visual)
  pull = -gradient[jnp.arange(2), 2 + jnp.arange(2)]
  return np.asarray(pull / pull.sum()).tolist()


@pytest.mark.parametrize(
  'drift, easy, hard',
  [
    ('unweighted', 0.5, 0.5),
    ('instance_weight', 1.15 / 2.55, 1.40 / 2.55),  # 0.451, 0.549
    ('adaptive_temperature', 1.40 / 2.55, 1.15 / 2.55),  # 1/1.15 : 1/1.40
  ],
)
def test_hard_samples_count_more_only_with_instance_weights(drift, easy, hard):
  assert gradient_shares(drift) == close([easy, hard])


@pytest.mark.parametrize(
  'drift', RunConfig.__dataclass_fields__['contrastive'].metadata['parts']
)
def test_surprise_sends_no_gradient_into_the_recommendation(drift):
  visual, semantic = views(1, 4)
  rec = jnp.array([0.1, 1.0, 2.0, 4.0])
  gradient = jax.grad(
    lambda r: combined(r, visual, semantic, contrastive=drift).total
  )(rec)
  # Only the mean of the cross-entropies is left: 1/4 each.
  assert gradient == close([0.25] * 4)


def test_without_contrastive_loss_nothing_of_it_is_there():
  visual, semantic = views(1, 4)
  terms = combined(
    [0.1, 1.0, 2.0, 4.0],
    visual,
    semantic,
    load_balance=0.08,
    contrastive='none',
  )
  assert terms.total == close(7.1 / 4 + 0.01 * 0.08)
  assert terms.load_balance == close(0.08)
  assert not terms.contrastive and not terms.instance_weight


@pytest.mark.parametrize('garbage', [0.0, 1.0, -1e6])
def test_combine_ignores_padded_samples(garbage):
  visual, semantic = views(2, 4)
  rec, valid = jnp.array([0.1, 5.0, 2.0, 4.0]), jnp.arange(4) != 1
  rest = np.array([0, 2, 3])

  def total(rec, visual, semantic, valid):
    return combined(rec, visual, semantic, valid).total

  grad = jax.value_and_grad(total, (0, 1, 2))
  expected, wanted = grad(rec[rest], visual[rest], semantic[rest], valid[rest])
  spoilt = (x.at[1].set(garbage) for x in (rec, visual, semantic))
  value, gradient = grad(*spoilt, valid)
  assert value == close(float(expected))
  for got, want in zip(gradient, wanted, strict=True):
    np.testing.assert_allclose(got[rest], want, rtol=1e-5, atol=1e-6)
    assert (got[1] == 0).all()


def test_a_sample_without_both_views_counts_for_rec_alone():
  visual, semantic = views(3, 3)
  rec = jnp.array([1.0, 2.0, 6.0])
  terms = combined(
    rec, visual, semantic, has_both=jnp.array([True, True, False])
  )
  pair = combined(rec[:2], visual[:2], semantic[:2])
  assert terms.rec == close(3.0)
  assert terms.contrastive == close(float(pair.contrastive))


@pytest.mark.parametrize(
  'valid, has_both',
  [
    (jnp.zeros(3, bool), jnp.ones(3, bool)),
    (jnp.ones(3, bool), jnp.zeros(3, bool)),
    (jnp.zeros(3, bool), jnp.zeros(3, bool)),
  ],
)
def test_nothing_valid_gives_0_and_a_finite_gradient(valid, has_both):
  visual, semantic = views(4, 3)
  rec = jnp.array([1.0, 2.0, 6.0])
  terms = combined(rec, visual, semantic, valid, has_both)
  assert terms.contrastive == close(0)
  assert terms.rec == close(3.0 if valid.all() else 0)
  assert all(np.isfinite(t).all() for t in terms)
  gradient = jax.grad(
    lambda *views: combined(rec, *views, valid, has_both).total, (0, 1)
  )(visual, semantic)
  assert all((g == 0).all() for g in gradient)


def test_zero_vectors_have_a_finite_gradient():
  visual, semantic = views(5, 3)
  visual, semantic = visual.at[0].set(0), semantic.at[0].set(0).at[2].set(0)
  value, gradient = jax.value_and_grad(
    lambda *views: combined([1.0, 2.0, 6.0], *views).total, (0, 1)
  )(visual, semantic)
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in gradient)


def test_a_nan_view_is_not_taken_for_a_zero_vector():
  visual, semantic = views(6, 3)
  broken = visual.at[0, 0].set(jnp.nan)
  assert np.isnan(combined([1.0, 2.0, 6.0], broken, semantic).total)


def test_padding_does_not_move_the_mean_instance_weight():
  terms = combined(
    [REC_OF_SURPRISE[0.3], REC_OF_SURPRISE[0.8], 50.0],
    jnp.eye(3),
    jnp.eye(3),
    jnp.array([True, True, False]),
  )
  assert terms.instance_weight == close(1.275)


def test_the_scale_of_surprise_comes_from_the_config():
  # Weights 1.3 and 1.8.
  terms = combined(
    [REC_OF_SURPRISE[0.3], REC_OF_SURPRISE[0.8]],
    jnp.eye(2),
    jnp.eye(2),
    contrastive='instance_weight,surprise_scale=1',
  )
  assert terms.instance_weight == close(1.55)


def test_infonce_is_finite_where_nothing_is_valid():
  loss = losses.symmetric_infonce(jnp.eye(2), jnp.eye(2), ~BOTH, 0.07)
  assert np.isfinite(loss).all()


def test_hardest_tenth_by_hand():
  # 20 samples: the 2 hardest are numbers 3 and 7, with losses 4 and 2 of 24.
  surprise = np.linspace(0.0, 0.5, 20)
  surprise[[3, 7]] = [0.9, 0.8]
  loss = np.ones(20)
  loss[[3, 7]] = [4.0, 2.0]
  everyone = np.ones(20, bool)
  share = losses.hardest_share(jnp.array(loss), jnp.array(surprise), everyone)
  assert float(share) == pytest.approx(6 / 24)
  # An invalid sample is neither hard nor counted.
  valid = everyone.copy()
  valid[3] = False
  share = losses.hardest_share(jnp.array(loss), jnp.array(surprise), valid)
  assert float(share) == pytest.approx(2 / 20)
  assert (
    losses.hardest_share(jnp.array(loss), jnp.array(surprise), ~everyone) == 0
  )


def test_hard_samples_count_more_with_weights_and_less_with_temperature():
  rng = np.random.default_rng(0)
  shared = rng.normal(size=(40, 8))
  visual = jnp.array(shared + 0.8 * rng.normal(size=(40, 8)))
  semantic = jnp.array(shared + 0.8 * rng.normal(size=(40, 8)))
  rec = jnp.array(rng.uniform(0, 6, 40))
  everyone = jnp.ones(40, bool)
  share = {
    drift: float(
      losses.combine(
        small.config(contrastive=drift).contrastive,
        0.01,
        rec,
        everyone,
        [visual, semantic],
        jnp.stack([everyone, everyone], axis=-1),
        0.0,
      ).hardest_share
    )
    for drift in (
      'instance_weight,surprise_scale=2',
      'unweighted',
      'adaptive_temperature,surprise_scale=2',
    )
  }
  hard, alike, flat = share.values()
  assert flat < alike < hard


def test_histogram_of_instance_weights_by_hand():
  # 20 bins of 0.0125 between 1.25 and 1.5; the invalid one is nowhere.
  weights = jnp.array([1.25, 1.2626, 1.2627, 1.5, 1.4])
  valid = jnp.array([True, True, True, True, False])
  shares = losses.weight_shares(weights, valid, 0.5)
  assert shares.shape == (losses.WEIGHT_BINS,)
  np.testing.assert_allclose(shares[jnp.array([0, 1, 19])], [0.25, 0.5, 0.25])
  assert float(jnp.sum(shares)) == 1
  assert not jnp.any(losses.weight_shares(weights, valid & False, 0.5))
  assert float(losses.weight_shares(jnp.ones(5), valid, 0.0)[0]) == 1
