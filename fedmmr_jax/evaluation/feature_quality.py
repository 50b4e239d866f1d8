"""Are the item features any good? Answered before a long training run.

Which items do they cover, are rows repeated, over how many directions do they
spread, and what are the nearest neighbours of an item? Most important: are
items that a client consumes consecutively closer than random pairs of similar
popularity? Only training items are used; held-out items have no influence.

A cosine weighs all directions equally. What a learned projection could find in
a few directions may be lost among the others, so a bad verdict is a reason to
look closer, not a proof.
"""

from typing import NamedTuple

import numpy as np

from fedmmr_jax.data.dataset import Dataset
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import bootstrap, popularity
from fedmmr_jax.evaluation.bootstrap import Difference
from fedmmr_jax.models import content
from fedmmr_jax.streams import generator, Stream

QUINTILES = 5
SHARES = (0.5, 0.9, 0.99)  # of the variance
NUM_NEIGHBOURS = 5
RESAMPLES = 1_000  # of the clients, for the intervals
UNIT_TOLERANCE = 1e-3  # what float16 files round
BLOCK = 1 << 10  # pairs at a time: their features stay in the caches

# Thresholds of verdict() and warnings().
SOME_EFFECT = 0.1  # standard deviations
BEYOND_CHANCE = 2.0  # times `CoConsumption.chance`
LOW_COVERAGE = 0.8  # of the interactions
MANY_SHARED = 0.05  # of the covered items
LARGE_MEAN = 0.5  # of the mean square length


class Coverage(NamedTuple):
  """Which items have the feature, and their share of the training data.

  Attributes:
    items: share of the items.
    interactions: share of the training interactions.
    quintile_items: [q] items of each fifth of the catalogue, the most consumed
      first; q = 5, or fewer with fewer items.
    quintile_interactions: [q] share of the training interactions on it.
    quintile_coverage: [q] share of its items that have the feature.
  """

  items: float
  interactions: float
  quintile_items: np.ndarray
  quintile_interactions: np.ndarray
  quintile_coverage: np.ndarray


class Duplicates(NamedTuple):
  """Rows that several items share: placeholders, empty texts.

  Attributes:
    items: how many share their row with another item.
    rows: how many different rows these are.
    most: [m] catalogue rows of the items that share the most frequent one.
  """

  items: int
  rows: int
  most: np.ndarray


class Spectrum(NamedTuple):
  """How the features spread over directions.

  Attributes:
    explained: [F] share of the variance along each principal component,
      descending; all 0 where every row is the same.
    effective_rank: exp of the entropy of these shares (Roy and Vetterli 2007).
    mean_share: square length of the mean row relative to the mean square
      length; near 1, all rows point the same way.
    mean_cosine: of all pairs of different items, not centred.
  """

  explained: np.ndarray
  effective_rank: float
  mean_share: float
  mean_cosine: float

  def components(self, share: float) -> int:
    """How many principal components explain the given share of the variance."""
    # A sum that rounding leaves below the share counts as the share.
    reached = self.explained.cumsum() >= share - 1e-9
    return int(reached.argmax()) + 1 if reached.any() else 0


class Comparison(NamedTuple):
  """Cosines of consecutive items against those of other pairs.

  Attributes:
    mean: of consecutive items.
    other_mean, other_std: of the other pairs.
    difference: of the means, with its interval over clients.
    effect: the difference in standard deviations of the other pairs.
    auc: P(a consecutive pair is closer than one of the other pairs).
  """

  mean: float
  other_mean: float
  other_std: float
  difference: Difference
  effect: float
  auc: float


class CoConsumption(NamedTuple):
  """Cosines of centred features for n pairs of items of each kind.

  Attributes:
    consecutive: [n] an item and the next item of the same client.
    matched: [n] the same first item, and the item of a random training
      interaction of another client: pairs of similar popularity.
    uniform: [n] two different items, drawn uniformly.
    weight: [n] of each pair, sum 1; every client counts the same.
    chance: standard deviation that the effect against matched pairs would have
      if the rows belonged to random items; large if few pairs are compared.
    to_matched, to_uniform: comparison of consecutive pairs with these pairs.
  """

  consecutive: np.ndarray
  matched: np.ndarray
  uniform: np.ndarray
  weight: np.ndarray
  chance: float
  to_matched: Comparison
  to_uniform: Comparison


class Neighbours(NamedTuple):
  """The nearest neighbours of an item.

  Attributes:
    item: catalogue row.
    rows: [n] the nearest first; empty for an item without the feature.
    cosines: [n] of centred features.
  """

  item: int
  rows: np.ndarray
  cosines: np.ndarray


class Quality(NamedTuple):
  """Everything found about the features of one kind.

  Attributes:
    kind: 'visual' or 'text'.
    width: F.
    coverage: see `Coverage`; the others likewise.
    norms: [n] lengths of the rows that are not missing.
    co_consumption: None if there are no such pairs, or only one client.
  """

  kind: str
  width: int
  coverage: Coverage
  norms: np.ndarray
  duplicates: Duplicates
  spectrum: Spectrum
  neighbours: tuple[Neighbours, ...]
  co_consumption: CoConsumption | None

  @property
  def has_unit_rows(self) -> bool:
    return bool((abs(self.norms - 1) < UNIT_TOLERANCE).all())


def measure(
  dataset: Dataset, kind: str, items: np.ndarray, seed: int
) -> Quality:
  """Measures everything about the features of one kind.

  Args:
    dataset: with features of that kind for at least one item.
    kind: 'visual' or 'text'.
    items: [q] catalogue rows whose neighbours to find.
    seed: of the random pairs.
  """
  features = dataset.features[kind]
  present = np.any(features != 0, axis=1)
  centred = _centred(features, present)
  unit = _unit(centred)
  return Quality(
    kind,
    features.shape[1],
    coverage(present, popularity.training_counts(dataset)),
    np.sqrt(np.square(features[present], dtype=np.float64).sum(axis=1)),
    duplicates(features, present),
    spectrum(features, centred, present),
    neighbours(unit, present, items),
    co_consumption(dataset, unit, present, seed),
  )


def coverage(present: np.ndarray, counts: np.ndarray) -> Coverage:
  """Which items have the feature, and how much they are consumed.

  Args:
    present: [V] bool: which items have the feature.
    counts: [V] training interactions with each item.
  """
  by_count = np.argsort(-counts[1:], kind='stable') + 1
  fifths = [f for f in np.array_split(by_count, QUINTILES) if len(f)]
  total = max(counts.sum(), 1)
  return Coverage(
    float(present[1:].mean()),
    float(counts[present].sum() / total),
    np.array([len(f) for f in fifths]),
    np.array([counts[f].sum() / total for f in fifths]),
    np.array([present[f].mean() for f in fifths]),
  )


def duplicates(features: np.ndarray, present: np.ndarray) -> Duplicates:
  """Rows that are the same to the last bit.

  Args:
    features: [V, F] float32.
    present: [V] bool: who has the feature.
  """
  items = np.flatnonzero(present)
  # As plain bytes, rows sort fast; adding 0 makes a 0 of −0, which differs.
  rows = np.ascontiguousarray(features[items] + 0)
  _, which, count = np.unique(
    rows.view(f'V{rows.itemsize * rows.shape[1]}')[:, 0],
    return_inverse=True,
    return_counts=True,
  )
  shared = count > 1
  most = items[which == count.argmax()] if shared.any() else items[:0]
  return Duplicates(int(count[shared].sum()), int(shared.sum()), most)


def spectrum(
  features: np.ndarray, centred: np.ndarray, present: np.ndarray
) -> Spectrum:
  """Variance along the principal components, and the share of the mean.

  Args:
    features: [V, F] float32.
    centred: [V, F] float64 of them, see `content.centred`.
    present: [V] bool: who has the feature.
  """
  variance = np.linalg.eigvalsh(centred.T @ centred)[::-1].clip(0)
  explained = variance / (variance.sum() or 1.0)
  some = explained[explained > 0]
  rows = features[present].astype(np.float64)
  square = np.square(rows).sum(axis=1)
  n = len(rows)
  # Σ over all pairs of ⟨u, v⟩ is the square of Σ u, less each with itself.
  total = (rows / np.sqrt(square)[:, None]).sum(axis=0)
  rank = np.exp(-(some * np.log(some)).sum()) if len(some) else 0.0
  return Spectrum(
    explained,
    float(rank),
    float(np.square(rows.mean(axis=0)).sum() / square.mean()),
    float((total @ total - n) / (n * (n - 1))) if n > 1 else 0.0,
  )


def neighbours(
  unit: np.ndarray, present: np.ndarray, items: np.ndarray
) -> tuple[Neighbours, ...]:
  """The nearest neighbours of each of some items, by cosine.

  Args:
    unit: [V, F] float32 centred features of unit length, zero where missing.
    present: [V] bool: who has the feature.
    items: [q] catalogue rows.
  """
  found = []
  for item in items.tolist():
    cosines = np.where(present, unit @ unit[item], -np.inf)
    cosines[item] = -np.inf
    rows = np.argsort(-cosines, kind='stable')[:NUM_NEIGHBOURS]
    rows = rows[cosines[rows] > -np.inf] if present[item] else rows[:0]
    found.append(Neighbours(item, rows, cosines[rows]))
  return tuple(found)


def co_consumption(
  dataset: Dataset, unit: np.ndarray, present: np.ndarray, seed: int
) -> CoConsumption | None:
  """Are consecutive items closer than random pairs?

  An item followed by itself is not a pair, and neither are two items with a
  missing one in between.

  Args:
    dataset: the clients; their held-out items are not used.
    unit: [V, F] float32 centred features of unit length, zero where missing.
    present: [V] bool: who has the feature.
    seed: of the random pairs.

  Returns:
    None if no client has such a pair, or there is no other client.
  """
  rng = generator(seed, Stream.FEATURE_QUALITY)
  items = dataset.items[dataset.is_train]
  client = np.repeat(np.arange(dataset.num_clients), dataset.num_train)
  first, second, owner = _consecutive(items, client, present)
  has = present[items]
  matched = _of_others(rng, items[has], client[has], owner)
  if matched is None or not (differs := matched != first).any():
    return None
  first, second, owner, matched = (
    a[differs] for a in (first, second, owner, matched)
  )
  catalogue = np.flatnonzero(present)
  one = rng.integers(len(catalogue), size=len(first))
  other = one + rng.integers(1, len(catalogue), size=len(first))
  _, owner = np.unique(owner, return_inverse=True)
  weight = _weight(owner)
  chance = _chance(first, second, matched, weight)
  consecutive = _cosines(unit, first, second)
  matched = _cosines(unit, first, matched)
  uniform = _cosines(unit, catalogue[one], catalogue[other % len(catalogue)])
  return CoConsumption(
    consecutive,
    matched,
    uniform,
    weight,
    chance,
    compare(consecutive, matched, owner),
    compare(consecutive, uniform, owner),
  )


def compare(
  cosines: np.ndarray, others: np.ndarray, owner: np.ndarray
) -> Comparison:
  """Compares pairs, with equal weight for every client.

  Args:
    cosines: [n] of consecutive items.
    others: [n] of other pairs.
    owner: [n] the client that owns each pair, numbered from 0 without gaps.
  """
  count, weight = np.bincount(owner), _weight(owner)
  of_client, others_of_client = (
    np.bincount(owner, weights=values) / count for values in (cosines, others)
  )
  difference = bootstrap.paired_bootstrap(
    of_client, others_of_client, RESAMPLES
  )
  mean = float(others_of_client.mean())
  std = float(np.sqrt(weight @ np.square(others - mean)))
  return Comparison(
    float(of_client.mean()),
    mean,
    std,
    difference,
    difference.mean / std if std else 0.0,
    _auc(cosines, others, weight),
  )


def verdict(quality: Quality) -> str:
  """A one-line verdict, derived from the figures alone.

  A difference to pairs of similar popularity counts if its interval excludes 0
  and its effect is at least SOME_EFFECT and BEYOND_CHANCE. The interval alone
  is not enough: it is over clients, but the same pairs of items recur in many
  of them. (With MovieLens-1M's rows shuffled 24 times, 8 intervals excluded 0;
  no effect reached 0.01.)
  """
  start = (
    f'{quality.kind}: covers {quality.coverage.interactions:.1%} of the '
    'training interactions; consecutive items are '
  )
  pairs = quality.co_consumption
  if pairs is None:
    return start + 'too few to judge it by'
  found = pairs.to_matched
  size = f'({abs(found.effect):.2f} sd, AUC {found.auc:.2f})'
  beyond_chance = abs(found.effect) >= BEYOND_CHANCE * pairs.chance
  if (
    found.difference.is_clear
    and beyond_chance
    and (abs(found.effect) >= SOME_EFFECT)
  ):
    distance = f'{abs(found.difference.mean):.3f} {size}'
    return start + (
      f'closer than random pairs by {distance}: it carries something about '
      'taste'
      if found.difference.mean > 0
      else f'farther apart than random pairs by {distance}: clients move on to '
      'unlike items, or its rows belong to others'
    )
  if BEYOND_CHANCE * pairs.chance > SOME_EFFECT:
    return f'{start}too few to tell them from random pairs {size}'
  return (
    f'{start}no closer than random pairs {size}: expect training to '
    'learn nothing from it'
  )


def warnings(quality: Quality) -> list[str]:
  """Other suspicious findings, one line each; usually none."""
  lines, covered = [], len(quality.norms)
  if quality.coverage.interactions < LOW_COVERAGE:
    lines.append(
      f'{quality.kind}: '
      f'{1 - quality.coverage.interactions:.0%} of the training '
      'interactions are with items that lack it'
    )
  if quality.duplicates.items > MANY_SHARED * covered:
    lines.append(
      f'{quality.kind}: {quality.duplicates.items} of {covered} '
      'items share their row with another; placeholders?'
    )
  if quality.spectrum.mean_share > LARGE_MEAN:
    lines.append(
      f'{quality.kind}: {quality.spectrum.mean_share:.0%} of the '
      'square length is the same for all items; '
      '`expert_form=…,features=centred` takes it away'
    )
  return lines


def find_items(dataset: Dataset, text: str) -> np.ndarray:
  """Catalogue rows of items given by id, title or part of a title.

  If several items match, the most consumed one is taken.

  Args:
    dataset: with or without titles.
    text: names separated by semicolons; commas separate too, unless the whole
      text is one name, because titles contain commas.

  Raises:
    UserError: there is no such item.
  """
  if ';' not in text and _find(dataset, text.strip()):
    names = [text]
  else:
    names = text.split(';' if ';' in text else ',')
  rows = []
  for name in filter(None, map(str.strip, names)):
    row = _find(dataset, name)
    if not row:
      what = 'id or title' if any(dataset.titles) else 'id (it has no titles)'
      raise UserError(
        f'{dataset.name} has no item with the {what} '
        f'{name!r}, or a filter leaves it out; put ; between '
        'names'
      )
    rows.append(row)
  return np.array(list(dict.fromkeys(rows)), np.int64)


def most_consumed(dataset: Dataset, count: int) -> np.ndarray:
  """[count] catalogue rows of the items with most training interactions."""
  counts = popularity.training_counts(dataset)[1:]
  return np.argsort(-counts, kind='stable')[:count] + 1


def title_of(dataset: Dataset, row: int) -> str:
  """An item's title, or its id if it has none."""
  return (dataset.titles[row] if dataset.titles else '') or str(
    dataset.item_ids[row]
  )


def _find(dataset, name) -> int:
  """The row of one item; 0 if there is none."""
  if not name:
    return 0
  by_id = np.flatnonzero(dataset.item_ids[1:].astype(str) == name)
  if len(by_id):
    return int(by_id[0]) + 1
  name = name.casefold()
  titles = [title.casefold() for title in dataset.titles]
  rows = [row for row, title in enumerate(titles) if title == name] or [
    row for row, title in enumerate(titles) if name in title
  ]
  counts = popularity.training_counts(dataset)
  return max(rows, key=lambda row: counts[row], default=0)


def _centred(features, present) -> np.ndarray:
  """[V, F] float64, see `content.centred`; 0 where every row is the same."""
  rows = features[present]
  if (rows == rows[0]).all():
    # Or what rounding leaves of them would be scaled up to length 1.
    return np.zeros(features.shape)
  return content.centred(features)


def _unit(rows) -> np.ndarray:
  """[V, F] float32 of length 1; a zero row stays one."""
  length = np.linalg.norm(rows, axis=1, keepdims=True)
  return (rows / np.where(length > 0, length, 1)).astype(np.float32)


def _consecutive(items, client, present):
  """(first, second, owner) [n]: pairs of different items with the feature that
  are consecutive at the same client."""
  first, second = items[:-1], items[1:]
  pair = (
    (client[:-1] == client[1:])
    & (first != second)
    & present[first]
    & present[second]
  )
  return first[pair], second[pair], client[:-1][pair]


def _of_others(rng, items, client, owner) -> np.ndarray | None:
  """An item of a random interaction of a client other than each owner.

  Args:
    items: [m] of all interactions, client after client.
    client: [m] client of each, ascending.
    owner: [n] clients.

  Returns:
    [n] items; None if there are no owners, or no other clients.
  """
  count = np.bincount(client, minlength=1)
  if not len(owner) or count.max() == len(items):
    return None
  # Numbers the others' interactions from 0, and skips the owner's.
  drawn = rng.integers(len(items) - count[owner])
  begin = (count.cumsum() - count)[owner]
  return items[drawn + np.where(drawn >= begin, count[owner], 0)]


def _weight(owner) -> np.ndarray:
  """[n] of each pair, so that every client weighs the same; sum 1."""
  count = np.bincount(owner)
  return 1 / (len(count) * count[owner])


def _chance(first, second, matched, weight) -> float:
  """The standard deviation of the effect if rows belonged to random items.

  The difference is Σ n·cos over pairs of items, n being what a pair weighs
  among the consecutive ones less what it weighs among the matched ones. With
  random rows the cosines of different pairs hardly correlate.
  """
  pairs = np.stack([np.tile(first, 2), np.concatenate([second, matched])])
  _, which = np.unique(
    pairs.min(axis=0) * (int(pairs.max()) + 1) + pairs.max(axis=0),
    return_inverse=True,
  )
  net = np.bincount(which, weights=np.concatenate([weight, -weight]))
  return float(np.linalg.norm(net))


def _cosines(unit, first, second) -> np.ndarray:
  """[n] float32 inner products of rows, a block at a time."""
  found = np.empty(len(first), np.float32)
  for start in range(0, len(first), BLOCK):
    part = slice(start, start + BLOCK)
    found[part] = np.einsum('nf,nf->n', unit[first[part]], unit[second[part]])
  return found


def _auc(values, others, weight) -> float:
  """P(value > other) + ½ P(value = other), pairs weighted alike in both."""
  order = np.argsort(others)
  below = np.concatenate([[0], weight[order].cumsum()])
  less, at_most = (
    below[np.searchsorted(others[order], values, side)]
    for side in ('left', 'right')
  )
  return float(weight @ (less + at_most) / 2)
