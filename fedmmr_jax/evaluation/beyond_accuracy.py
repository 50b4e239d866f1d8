"""What lists of recommendations are beside accurate: how much of the catalogue
they show, how evenly, how novel, diverse, popular and calibrated they are, and
how all of this differs between groups of users. docs/evaluation.md has the
formulas, and what each is good for.

The lists are those that are ranked: the best k of each protocol's candidates.

Axes: `n` users, `k` items of a list, `H` longest history, `V` rows of the
catalogue, `F` features, `G` genres, `m` resamples.
"""

from typing import Mapping, NamedTuple, Sequence

import numpy as np

from fedmmr_jax import metrics
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import bootstrap, popularity, recommendation
from fedmmr_jax.evaluation.bootstrap import Estimate
from fedmmr_jax.evaluation.ranking import SPLITS
from fedmmr_jax.evaluation.recommendation import People
from fedmmr_jax.federation.round import FederationState
from fedmmr_jax.simulation import Simulation
from fedmmr_jax.streams import generator, Stream

PROTOCOLS = ('full', 'sampled', 'popularity')  # that have lists
MOST_POPULAR = 'most popular'  # the baseline's lists, of the full protocol
SMOOTHING = 0.01  # Steck's alpha
_SHARES = (metrics.COVERAGE, metrics.GINI)
_USERS = 500  # at a time, so that their items' features fit in memory


class Items(NamedTuple):
  """What is known of the catalogue.

  Attributes:
    counts: [V] int, training interactions with each item; row 0 is padding.
    num_items: how many items can be recommended.
    features: name -> [V, F] float32, zero row = missing.
    genres: [V] names of each item's genres, or empty if nobody knows any.
  """

  counts: np.ndarray
  num_items: int
  features: Mapping[str, np.ndarray] = {}
  genres: Sequence[Sequence[str]] = ()

  @classmethod
  def of(cls, simulation: Simulation) -> 'Items':
    """Those of a run; the features as the data set has them."""
    dataset = simulation.dataset
    return cls(
      popularity.training_counts(dataset),
      dataset.num_items - dataset.num_cold,
      dataset.features,
      dataset.genres,
    )


class Asked(NamedTuple):
  """Who is offered lists: the clients with a target in a split, each asked what
  follows the items before its first one.

  Attributes:
    clients: [n] their numbers, ascending.
    people: what they are recommended from.
    histories: [n, H] int32 what each consumed before, 0 = none.
    targets: [n] int32 the target of each, one of the sampled candidates.
    negatives: sampled protocol -> [n, J] int32 the others.
    items: the catalogue.
  """

  clients: np.ndarray
  people: People
  histories: np.ndarray
  targets: np.ndarray
  negatives: Mapping[str, np.ndarray]
  items: Items

  @classmethod
  def of(cls, simulation: Simulation, split: str) -> 'Asked':
    """Those of a split of a run.

    Raises:
      UserError: the split is that of new items, which are ranked for single
        targets and are in no list together.
    """
    if split == 'cold':
      raise UserError(
        '`split=cold`: new items are ranked one at a time, among the others, '
        'so that there are no lists of them'
      )
    clients = simulation.targeted(split)
    people = People.of_clients(simulation, clients, split)
    before = np.arange(people.history.shape[1]) < people.length[:, None]
    whose, rows = simulation.targets(split)
    number = SPLITS[simulation.ranked_targets(split).split]
    drawn = {
      'sampled': simulation.data.sampled_negatives,
      'popularity': simulation.data.popular_negatives,
    }
    return cls(
      clients,
      people,
      np.where(before, people.history, 0),
      rows[np.searchsorted(whose, clients)],
      {name: np.asarray(x)[clients, number] for name, x in drawn.items()},
      Items.of(simulation),
    )

  def lists(
    self,
    simulation: Simulation,
    state: FederationState,
    protocol: str,
    count: int,
  ) -> np.ndarray:
    """[n, count] int32 rows of the best candidates, best first, 0 behind the
    end of a list of fewer.

    Args:
      simulation: the run.
      state: one of its rounds.
      protocol: one of PROTOCOLS; all but 'full' choose among the target and the
        drawn candidates.
      count: k.

    Raises:
      UserError: a score is NaN or infinite, or k exceeds the catalogue.
    """
    among = None
    if protocol != 'full':
      among = np.column_stack([self.targets, self.negatives[protocol]])
    return recommendation.recommend(
      simulation,
      state,
      self.people,
      count,
      # New items are no candidates of other targets.
      np.arange(len(self.items.counts)) <= self.items.num_items,
      repeats=among is not None,
      among=among,
    ).rows

  def most_popular(self, count: int) -> np.ndarray:
    """[n, count] int32 as `lists` for the full protocol, of the popularity
    baseline."""
    best = 1 + np.argsort(
      -self.items.counts[1 : self.items.num_items + 1], kind='stable'
    )
    found = np.zeros((len(self.clients), count), np.int32)
    closed = np.concatenate([self.histories, self.people.further], axis=1)
    for rows, own in zip(found, closed):
      some = best[: count + len(own)]
      open_ = some[~np.isin(some, own)][:count]
      rows[: len(open_)] = open_
    return found


class Offer(NamedTuple):
  """Lists for many users.

  Attributes:
    rows: [n, k] int, best first; 0 behind the end of a shorter list.
    num_items: how many items can be recommended.
    values: metric -> [n] float64, of each user's list or, where they are given,
      of each user otherwise (accuracy); NaN = undefined.
    taste: [n] float64 mean popularity of what each user consumed before.
  """

  rows: np.ndarray
  num_items: int
  values: Mapping[str, np.ndarray]
  taste: np.ndarray

  def where(self, chosen: np.ndarray) -> 'Offer':
    """Some of the users, by a mask [n]."""
    return self._replace(
      rows=self.rows[chosen],
      values={name: x[chosen] for name, x in self.values.items()},
      taste=self.taste[chosen],
    )

  def figures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Metric -> [m] figures of the users.

    Args:
      weights: [m, n] how often each user counts.
    """
    shown = _exposures(self.rows, weights)
    found = {metrics.COVERAGE: coverage(shown, self.num_items)}
    found[metrics.GINI] = gini(shown, self.num_items)
    for name, values in self.values.items():
      found[name] = _mean(values, weights)
      if name == metrics.POPULARITY:
        # Of the users for whom there is both.
        both = np.isfinite(values) & np.isfinite(self.taste)
        before = _mean(np.where(both, self.taste, np.nan), weights)
        now = _mean(np.where(both, values, np.nan), weights)
        with np.errstate(divide='ignore', invalid='ignore'):
          found[metrics.LIFT] = now / before - 1
    return found


def offer(
  items: Items, histories: np.ndarray, rows: np.ndarray, **further: np.ndarray
) -> Offer:
  """Lists, with everything that is of each user alone.

  Args:
    items: the catalogue.
    histories: [n, H] int rows that each user consumed before, 0 = none.
    rows: [n, k] int, the lists.
    further: metric -> [n] other values of each user.
  """
  shares = np.maximum(items.counts, 1) / max(items.counts.sum(), 1)
  values = dict(further)
  values[metrics.NOVELTY] = mean_over(rows, -np.log2(shares))
  for name, features in items.features.items():
    values[metrics.DIVERSITY + name] = diversity(rows, features)
  counts = items.counts.astype(np.float64)
  values[metrics.POPULARITY] = mean_over(rows, counts)
  if any(items.genres):
    values[metrics.MISCALIBRATION] = miscalibration(
      rows, histories, items.genres
    )
  return Offer(rows, items.num_items, values, mean_over(histories, counts))


def mean_over(rows: np.ndarray, of_item: np.ndarray) -> np.ndarray:
  """[n] mean of what items are worth [V] over each user's rows; NaN = none."""
  there = rows > 0
  with np.errstate(invalid='ignore'):
    return (of_item[rows] * there).sum(1) / there.sum(1)


def coverage(shown: np.ndarray, num_items: int) -> np.ndarray:
  """[m] share of the catalogue that stands in some list (Herlocker et al. 2004;
  Ge et al. 2010).

  Args:
    shown: [m, V'] how often each item is in a list; others are in none.
    num_items: size of the catalogue.
  """
  return (shown > 0).sum(1) / num_items


def gini(shown: np.ndarray, num_items: int) -> np.ndarray:
  """[m] Gini index of exposure (Fleder & Hosanagar 2009): 0 = all items are
  shown equally often, 1 − 1/num_items = one item alone is.

  Σ_j (2j − N − 1) x_j / (N Σ x), x ascending; arguments as `coverage`.
  """
  ascending = np.sort(shown, axis=1)
  # The items in no list come first and add nothing.
  place = np.arange(num_items - shown.shape[1], num_items) + 1
  with np.errstate(invalid='ignore'):
    return (ascending @ (2 * place - num_items - 1)) / (
      num_items * ascending.sum(1)
    )


def diversity(rows: np.ndarray, features: np.ndarray) -> np.ndarray:
  """[n] mean cosine distance between two items of a list (Ziegler et al. 2005;
  Vargas & Castells 2011), of the items with features; NaN = fewer than two.

  Args:
    rows: [n, k].
    features: [V, F], zero row = missing.
  """
  length = np.linalg.norm(features, axis=1)
  found = np.full(len(rows), np.nan)
  for start in range(0, len(rows), _USERS):
    part = rows[start : start + _USERS]
    has = (part > 0) & (length[part] > 0)
    # Items twice in a list would be no list; features twice may be.
    unit = np.where(has, 1 / np.where(has, length[part], 1), 0)
    summed = (features[part] * unit[..., None]).sum(1, dtype=np.float64)
    count = has.sum(1)
    # |Σ x|² is the sum over all pairs, those of an item with itself included.
    with np.errstate(invalid='ignore', divide='ignore'):
      cosine = ((summed**2).sum(1) - count) / (count * (count - 1))
    found[start : start + _USERS] = np.where(count > 1, 1 - cosine, np.nan)
  return found


def miscalibration(
  rows: np.ndarray,
  histories: np.ndarray,
  genres: Sequence[Sequence[str]],
  smoothing: float = SMOOTHING,
) -> np.ndarray:
  """[n] C_KL of Steck 2018, section 3: Σ_g p(g|u) ln(p(g|u) / q̃(g|u)), with p
  of the history, q of the list and q̃ = (1 − α) q + α p. Every item with genres
  counts alike, and its genres share it. NaN where no item has any.

  Args:
    rows: [n, k], the lists.
    histories: [n, H].
    genres: [V] of each item.
    smoothing: α.
  """
  offsets, flat, count = _numbered(genres)
  found = np.full(len(rows), np.nan)
  for start in range(0, len(rows), _USERS):
    some = slice(start, start + _USERS)
    p = _distribution(histories[some], offsets, flat, count)
    q = _distribution(rows[some], offsets, flat, count)
    q = (1 - smoothing) * q + smoothing * p
    with np.errstate(divide='ignore', invalid='ignore'):
      terms = np.where(p > 0, p * np.log(p / q), 0)
    known = np.isfinite(p).all(1) & np.isfinite(q).all(1)
    found[some] = np.where(known, terms.sum(1), np.nan)
  return found


def _numbered(
  genres: Sequence[Sequence[str]],
) -> tuple[np.ndarray, np.ndarray, int]:
  """([V + 1] where each item's genres begin, their numbers, how many there
  are)."""
  distinct = [tuple(dict.fromkeys(own)) for own in genres]
  number = {
    g: i for i, g in enumerate(sorted({g for x in distinct for g in x}))
  }
  flat = np.array([number[g] for own in distinct for g in own], np.int64)
  return np.cumsum([0, *map(len, distinct)]), flat, len(number)


def _distribution(
  rows: np.ndarray, offsets: np.ndarray, flat: np.ndarray, count: int
) -> np.ndarray:
  """[n, G] share of each genre in each user's rows [n, ·]; NaN = no item has
  one."""
  user, at = np.nonzero(rows)
  item = rows[user, at]
  own = offsets[item + 1] - offsets[item]
  # The genres of item after item: place i of those is offset + i.
  begins = np.cumsum(own) - own
  which = np.arange(own.sum()) + np.repeat(offsets[item] - begins, own)
  shares = np.repeat(1 / np.maximum(own, 1), own)
  keys = np.repeat(user, own) * count + flat[which]
  found = np.bincount(keys, shares, minlength=len(rows) * count)
  found = found.reshape(len(rows), count)
  with np.errstate(invalid='ignore'):
    return found / found.sum(1, keepdims=True)


def _exposures(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """[m, V'] how often each item is in a list, of the items in any."""
  user, at = np.nonzero(rows)
  items, number = np.unique(rows[user, at], return_inverse=True)
  found = np.empty((len(weights), len(items)))
  for i, weight in enumerate(weights):
    found[i] = np.bincount(number, weight[user], minlength=len(items))
  return found


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """[m] mean over the users with a value, by weights [m, n]; NaN = nobody."""
  known = np.isfinite(values)
  with np.errstate(invalid='ignore', divide='ignore'):
    return (weights @ np.where(known, values, 0)) / (weights @ known)


def estimates(
  offered: Offer, resamples: int = bootstrap.RECOUNTS
) -> dict[str, Estimate]:
  """Metric -> its figure over all users, and the interval."""
  found = bootstrap.estimates(offered.figures, len(offered.rows), resamples)
  return {name: _within(name, value) for name, value in found.items()}


def _within(name: str, found: Estimate) -> Estimate:
  """A figure's interval; what is moved (`bootstrap.estimates`) may leave the
  range of a share."""
  return found.within(0, 1) if name in _SHARES else found


def differences(
  offered: Offer, other: Offer, resamples: int = bootstrap.RECOUNTS
) -> dict[str, Estimate]:
  """Metric -> these lists minus the others, of the same users, resampled
  together; of the metrics that both have."""

  def statistic(weights):
    mine, theirs = offered.figures(weights), other.figures(weights)
    return {name: mine[name] - theirs[name] for name in mine if name in theirs}

  return bootstrap.estimates(statistic, len(offered.rows), resamples)


class Gap(NamedTuple):
  """How far groups are apart in one metric.

  Attributes:
    spread: largest minus smallest figure.
    by_chance: what 95 % of divisions of the same users into groups of the same
      sizes, drawn at random, stay below; a smaller spread tells nothing.
    ratio: smallest by largest; NaN where a figure is negative.
    deviation: standard deviation of the groups' figures, each group alike.
  """

  spread: Estimate
  by_chance: float
  ratio: Estimate
  deviation: Estimate


class Fairness(NamedTuple):
  """Metrics of groups of users.

  Attributes:
    users: group -> how many.
    groups: group -> metric -> figure.
    gaps: metric -> gap.
  """

  users: dict[str, int]
  groups: dict[str, dict[str, Estimate]]
  gaps: dict[str, Gap]


_SPREAD, _RATIO, _DEVIATION = 'spread', 'ratio', 'deviation'


def fairness(
  offered: Offer,
  parts: Mapping[str, np.ndarray],
  resamples: int = bootstrap.RECOUNTS,
) -> Fairness:
  """Metrics of groups of users, and how far they are apart.

  Args:
    offered: lists, and the accuracy among their values.
    parts: group -> [n] bool, who is in it.
    resamples: of users, and of divisions into groups.
  """
  own = {label: offered.where(chosen) for label, chosen in parts.items()}

  def statistic(weights):
    found = {
      label: own[label].figures(weights[:, chosen])
      for label, chosen in parts.items()
    }
    return {
      (label, name): values
      for label, by_metric in found.items()
      for name, values in by_metric.items()
    } | _gaps(list(found.values()))

  found = bootstrap.estimates(statistic, len(offered.rows), resamples)
  names = [name for label, name in found if label == next(iter(parts))]
  chance = _chance(offered, list(parts.values()), resamples)
  return Fairness(
    {label: int(chosen.sum()) for label, chosen in parts.items()},
    {
      label: {name: _within(name, found[label, name]) for name in names}
      for label in parts
    },
    {
      name: Gap(
        found[_SPREAD, name].within(0, np.inf),
        chance[name],
        found[_RATIO, name].within(0, 1),
        found[_DEVIATION, name].within(0, np.inf),
      )
      for name in names
    },
  )


def _gaps(
  figures: Sequence[Mapping[str, np.ndarray]],
) -> dict[tuple[str, str], np.ndarray]:
  """(Kind of gap, metric) -> [m] from each group's figures."""
  found = {}
  for name in figures[0]:
    values = np.stack([of_group[name] for of_group in figures])
    low, high = values.min(0), values.max(0)
    found[_SPREAD, name] = high - low
    comparable = (low >= 0) & (high > 0)
    found[_RATIO, name] = np.where(
      comparable, low / np.where(comparable, high, 1), np.nan
    )
    found[_DEVIATION, name] = values.std(0)
  return found


def _chance(
  offered: Offer, parts: Sequence[np.ndarray], resamples: int
) -> dict[str, float]:
  """Metric -> `Gap.by_chance`."""
  rng = generator(0, Stream.BOOTSTRAP, 1)
  spreads: dict[str, list[np.ndarray]] = {}
  for size in bootstrap.block_sizes(resamples, len(offered.rows)):
    order = rng.permuted(
      np.tile(np.arange(len(offered.rows)), (size, 1)), axis=1
    )
    found = _gaps(
      [offered.figures(chosen[order].astype(np.float64)) for chosen in parts]
    )
    for (kind, name), values in found.items():
      if kind == _SPREAD:
        spreads.setdefault(name, []).append(values)
  whole = {name: np.concatenate(blocks) for name, blocks in spreads.items()}
  return {
    name: float(np.percentile(x[np.isfinite(x)], 95))
    if np.isfinite(x).any()
    else np.nan
    for name, x in whole.items()
  }
