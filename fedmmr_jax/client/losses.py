"""Loss terms of a local step (docs/model.md, Losses). Reductions take explicit
weights, so padded samples do not count, and 0/0 is 0.

Axes: `T` targets of a step, `N` negatives, `J` candidates, `E` experts.
"""

import itertools
from typing import NamedTuple, Sequence

import jax
import jax.numpy as jnp

from fedmmr_jax.config import (
  AdaptiveTemperature,
  Contrastive,
  InstanceWeight,
  Off,
)
from fedmmr_jax.models import layers

WEIGHT_BINS = 20  # of the histogram of instance weights


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
  """Σ w·v / Σ w over all axes; 0 if all weights are 0."""
  weights = jnp.broadcast_to(weights, values.shape).astype(values.dtype)
  total = jnp.sum(weights)
  # A value of weight 0 may be anything, NaN included.
  kept = jnp.where(weights > 0, values, 0.0)
  return jnp.sum(kept * weights) / jnp.where(total > 0, total, 1.0)


def cross_entropy(positive: jax.Array, rest: jax.Array) -> jax.Array:
  """−log of the softmax share of each positive among itself and its negatives.

  Args:
    positive: [T] scores.
    rest: [T] log Σ exp over the scores of each positive's negatives.

  Returns:
    [T] losses.
  """
  return jnp.logaddexp(positive, rest) - positive


def pairwise_surprise(positive: jax.Array, negatives: jax.Array) -> jax.Array:
  """BPR loss mean_j −log σ(s_pos − s_neg_j), the memory's surprise.

  Args:
    positive: [T] scores.
    negatives: [T, N] scores.

  Returns:
    [T], without gradient.
  """
  return jax.lax.stop_gradient(
    jnp.mean(jax.nn.softplus(negatives - positive[:, None]), axis=-1)
  )


def surprise_of(recommendation: jax.Array) -> jax.Array:
  """sigmoid(recommendation loss) per sample, [T], without gradient."""
  return jax.lax.stop_gradient(jax.nn.sigmoid(recommendation))


def instance_weights(surprise: jax.Array, scale: float) -> jax.Array:
  """1 + scale · surprise (repair 2): 0.3 -> 1.15 and 0.8 -> 1.40 at 0.5."""
  return 1.0 + scale * surprise


def importance_of(lateness: jax.Array, emphasis: float) -> jax.Array:
  """1 + e · (2 · lateness − 1): late targets count more, because tastes and the
  remaining items drift, and a recommender predicts what comes after the last
  item.

  Args:
    lateness: from 0, the start of a history, to 1, its end.
    emphasis: e.
  """
  return 1.0 + emphasis * (2.0 * lateness - 1.0)


def symmetric_infonce(
  first: jax.Array,
  second: jax.Array,
  valid: jax.Array,
  temperature: jax.Array | float,
) -> jax.Array:
  """Per-sample symmetric InfoNCE (van den Oord et al. 2018) of two views.

  Args:
    first: [T, D] one expert's representations of the positives.
    second: [T, D] another's.
    valid: [T] bool; invalid samples are neither positives nor negatives.
    temperature: scalar, or [T] one for each sample's row and column.

  Returns:
    [T] losses; meaningless (but finite) where `valid` is False.
  """
  similarity = layers.unit(first) @ layers.unit(second).T  # [T, T]
  temperature = jnp.broadcast_to(temperature, valid.shape)[:, None]
  matching = jnp.diagonal(similarity) / temperature[:, 0]

  def against_the_rest(rows):
    logits = jnp.where(valid, rows / temperature, -jnp.inf)
    # A row without any valid entry would be -inf everywhere: NaN gradients.
    logits = jnp.where(jnp.any(valid), logits, 0.0)
    return jax.nn.logsumexp(logits, axis=-1) - matching

  return 0.5 * (against_the_rest(similarity) + against_the_rest(similarity.T))


def load_balance_loss(
  router_weights: jax.Array, counted: jax.Array
) -> jax.Array:
  """Σ_e (mean usage_e − 1/E)² over the candidates that have a choice.

  Args:
    router_weights: [J, E].
    counted: [J] float or bool, candidates to average over.

  Returns:
    Scalar; 0 if nothing is counted.
  """
  counted = counted.astype(router_weights.dtype)
  total = jnp.sum(counted)
  usage = counted @ router_weights / jnp.where(total > 0, total, 1.0)
  return jnp.where(total > 0, jnp.sum((usage - 1 / usage.size) ** 2), 0.0)


def contrast(
  views: Sequence[jax.Array],
  available: jax.Array,
  temperature: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
  """InfoNCE of each sample, averaged over its pairs of views.

  Args:
    views: E times [T, D].
    available: [T, E] bool, which views exist.
    temperature: see `symmetric_infonce`.

  Returns:
    ([T] losses, 0 without a pair; [T] bool, whether the sample has a pair).
  """
  total, count = 0.0, 0
  for i, j in itertools.combinations(range(len(views)), 2):
    pair = available[:, i] & available[:, j]
    loss = symmetric_infonce(views[i], views[j], pair, temperature)
    total += jnp.where(pair, loss, 0.0)
    count += pair.astype(jnp.int32)
  return total / jnp.maximum(count, 1), count > 0


class LossTerms(NamedTuple):
  """Scalars of one step; `total` is what is minimised.

  Attributes:
    total: rec + λ · contrastive + μ · load_balance (0.1 and 0.01).
    rec: mean of importance · cross-entropy of the positives.
    contrastive: mean of weight · InfoNCE over positives with a pair of views;
      the mean over their pairs.
    load_balance: router's imbalance.
    instance_weight: mean instance weight of positives with a pair of views.
    hardest_share: share of the contrastive loss that comes from the tenth of
      the positives with the highest surprise; 0.1 if all count equally.
    weight_shares: [WEIGHT_BINS] histogram of the instance weights of positives
      with a pair of views.
  """

  total: jax.Array
  rec: jax.Array
  contrastive: jax.Array
  load_balance: jax.Array
  instance_weight: jax.Array
  hardest_share: jax.Array
  weight_shares: jax.Array


def combine(
  how: Contrastive | Off,
  balance_weight: float,
  rec_per_sample: jax.Array,
  valid: jax.Array,
  views: Sequence[jax.Array],
  available: jax.Array,
  load_balance: jax.Array,
  importance: jax.Array | float = 1.0,
  profile: jax.Array | None = None,
  profile_weight: float = 0.0,
) -> LossTerms:
  """Total loss of a step from its parts.

  Args:
    how: the contrastive loss, if there is one.
    balance_weight: μ, of the load-balance loss.
    rec_per_sample: [T] from `cross_entropy`.
    valid: [T] bool, False at padding.
    views: E times [T, D], each expert's representations of the positives; fewer
      than two give no pairs to contrast.
    available: [T, E] bool, which experts had input.
    load_balance: scalar.
    importance: [T] factors of the recommendation losses, or 1.
    profile: [T] losses of the client's profile alone; None without profiles.
    profile_weight: weight of these losses.

  Returns:
    The terms.
  """
  rec = weighted_mean(importance * rec_per_sample, valid)
  total = rec
  if profile is not None:
    total += profile_weight * weighted_mean(importance * profile, valid)
  nothing = jnp.zeros(())
  without = LossTerms(
    total, rec, nothing, nothing, nothing, nothing, jnp.zeros((WEIGHT_BINS,))
  )
  if len(views) < 2:
    return without
  balance = balance_weight * load_balance
  if not how:
    return without._replace(total=total + balance, load_balance=load_balance)

  surprise = surprise_of(rec_per_sample)
  weights = jnp.ones_like(surprise)
  temperature: jax.Array | float = how.temperature
  scale = 0.0
  if isinstance(how, InstanceWeight):
    scale = how.surprise_scale
    weights = instance_weights(surprise, scale)
  elif isinstance(how, AdaptiveTemperature):
    # The broken variant: a hard sample's logits are flattened, so it counts
    # less. Kept to show that it does.
    scale = how.surprise_scale
    temperature = temperature * (1.0 + scale * surprise)

  per_sample, pairs = contrast(views, valid[:, None] & available, temperature)
  contrastive = weighted_mean(weights * per_sample, pairs)
  return LossTerms(
    total + (how.weight * contrastive + balance),
    rec,
    contrastive,
    load_balance,
    weighted_mean(weights, pairs),
    hardest_share(weights * per_sample, surprise, pairs),
    weight_shares(weights, pairs, scale),
  )


def weight_shares(
  weights: jax.Array, valid: jax.Array, scale: float
) -> jax.Array:
  """Histogram of instance weights.

  Args:
    weights: [T] from `instance_weights`.
    valid: [T] bool.
    scale: of the weights.

  Returns:
    [WEIGHT_BINS] shares of the valid weights, in bins of equal width between
    1 + scale/2 and 1 + scale (the recommendation loss is positive, so surprise
    is at least 1/2); zeros if there are none.
  """
  width = (scale or 1.0) / 2 / WEIGHT_BINS
  bins = jnp.clip(
    (weights - 1.0 - scale / 2) / width, 0, WEIGHT_BINS - 1
  ).astype(jnp.int32)
  inside = (bins[:, None] == jnp.arange(WEIGHT_BINS)) & valid[:, None]
  count = jnp.sum(valid)
  return jnp.sum(inside, axis=0) / jnp.where(count > 0, count, 1)


def hardest_share(
  contributions: jax.Array, surprise: jax.Array, valid: jax.Array
) -> jax.Array:
  """Share of the sum that the hardest tenth contributes.

  Args:
    contributions: [T] loss of each sample.
    surprise: [T] how hard it is.
    valid: [T] bool.

  Returns:
    Scalar. The hardest are a tenth of the valid samples, at least one, plus any
    samples tied with the last of them. 0 if nothing contributes.
  """
  contributions = jnp.where(valid, contributions, 0.0)
  hardness = jnp.where(valid, surprise, -jnp.inf)
  count = jnp.maximum(jnp.sum(valid) // 10, 1)
  bound = -jnp.sort(-hardness)[count - 1]
  total = jnp.sum(contributions)
  hardest = jnp.sum(jnp.where(hardness >= bound, contributions, 0.0))
  return jax.lax.stop_gradient(
    jnp.where(total > 0, hardest / jnp.where(total > 0, total, 1.0), 0.0)
  )
