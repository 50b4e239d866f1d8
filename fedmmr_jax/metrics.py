"""Mergeable means (sum and weight) of training metrics, ranking metrics, and
the names of both and of what lists are beyond accurate.

HR, NDCG, MRR and user-defined metrics are computed from ranks on the host, in
float64. All code that shows a metric, or decides by one, takes its name from
here.
"""

import dataclasses
import functools
import inspect
import re
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax import parts
from fedmmr_jax.errors import UserError

# Metrics of training, the keys of a record's 'train'.
LOSS, REC_LOSS = 'loss', 'rec_loss'
CONTRASTIVE_LOSS, BALANCE_LOSS = 'contrastive_loss', 'load_balance_loss'
HARDEST_SHARE = 'hardest_share'
INSTANCE_WEIGHT = 'instance_weight'
WEIGHT_SHARES = 'instance_weight_shares'  # a histogram
MEMORY_FILL, MEMORY_AGE = 'memory_fill', 'memory_age'
ITEM_ROWS = 'item_rows'
# With `compression`, of a client of the cohort: all that it returns, and the
# parameters that it receives.
UPLOADED, DOWNLOADED = 'uploaded_bytes', 'downloaded_bytes'
ATTACKERS = 'attackers'
# Families of them: the mean weight that the router gives an expert, the norm of
# the gradient at an expert or the backbone. Its name follows.
ROUTER_WEIGHT, GRADIENT = 'w_', 'gradient_'
BACKBONE = 'backbone'
# And of clients of a round: these are counts, no means (`count`).
CLIENTS = 'clients_'
ASKED, ANSWERED = CLIENTS + 'asked', CLIENTS + 'answered'
DROPPED, LOST, LATE = CLIENTS + 'dropped', CLIENTS + 'lost', CLIENTS + 'late'
NOT_FINITE, TOO_LONG = CLIENTS + 'not_finite', CLIENTS + 'too_long'
MALFORMED = CLIENTS + 'malformed'
REJECTED = (NOT_FINITE, TOO_LONG, MALFORMED)

# Ranking metrics and protocols that tables show first.
CUTOFFS = (5, 10, 20)
HR, NDCG, MRR = 'HR@10', 'NDCG@10', 'MRR'
SAMPLED, FULL = 'sampled', 'full'
PROTOCOLS = (SAMPLED, FULL)
# Splits whose name alone would not say what is ranked.
SPLIT_TITLES = {
  'cold': 'cold items',
  'cold_popularity': 'cold items by popularity',
  'new_clients': 'new clients, test',
}
# Of an attack's target, beside the ranking metrics of the full protocol.
EXPOSURE = 'exposure@10'
HEADLINES = ((SAMPLED, HR), (FULL, NDCG))
# What a list is beside accurate (evaluation/beyond_accuracy.py); the name of a
# feature matrix stands behind DIVERSITY, a cut-off behind each, as in
# 'diversity_text@10'.
COVERAGE, GINI, NOVELTY, DIVERSITY = 'coverage', 'gini', 'novelty', 'diversity_'
POPULARITY, LIFT = 'popularity', 'popularity_lift'
MISCALIBRATION = 'miscalibration'

# From ranks [K] to name -> [K] values, one a user, each of its own rank alone.
Metric = Callable[[np.ndarray], Mapping[str, np.ndarray]]


class Figure(NamedTuple):
  """How a training metric is displayed.

  Attributes:
    title: of its curve or column.
    panel: heading of the report's figure that draws it.
    unit: label of that figure's vertical axis.
  """

  title: str
  panel: str
  unit: str


# In the order of the report; {} is the name in a family.
_FIGURES = {
  LOSS: Figure('loss', 'Recommendation loss', 'nats'),
  REC_LOSS: Figure('rec. loss', 'Recommendation loss', 'nats'),
  CONTRASTIVE_LOSS: Figure('contrastive', 'Contrastive loss', 'nats'),
  ROUTER_WEIGHT: Figure('router {}', 'Router', 'mean weight'),
  BALANCE_LOSS: Figure(
    'load balance', 'Load balance', 'squared distance of use from even'
  ),
  INSTANCE_WEIGHT: Figure('instance weight', 'Instance weight', 'mean'),
  HARDEST_SHARE: Figure(
    'hardest tenth', 'Hardest tenth', 'share of the contrastive loss'
  ),
  GRADIENT: Figure('gradient {}', 'Gradient', 'mean norm of a local step'),
  MEMORY_FILL: Figure(
    'memory fill', 'Client memory, fill', 'share of slots in use'
  ),
  MEMORY_AGE: Figure(
    'memory age', 'Client memory, age', 'samples since an entry was written'
  ),
  ITEM_ROWS: Figure(
    'item rows', 'Item table', 'rows that a client works on, mean'
  ),
  CLIENTS: Figure('{}', 'Clients', 'clients of a round'),
  UPLOADED: Figure('bytes up', 'Bytes of a client', 'mean'),
  DOWNLOADED: Figure('bytes down', 'Bytes of a client', 'mean'),
  ATTACKERS: Figure('attackers', 'Attackers', 'share of the cohort'),
}


def figure(name: str) -> Figure:
  """How a metric of training is shown; one that the table does not know, under
  its own name.

  >>> figure('w_audio').title
  'router audio'
  """
  known = _FIGURES.get(_family(name))
  if known is None:
    words = name.replace('_', ' ')
    return Figure(words, words.capitalize(), 'mean')
  member = name.removeprefix(_family(name)).replace('_', ' ')
  return known._replace(title=known.title.format(member))


def ordered(names: Iterable[str]) -> list[str]:
  """Training metrics in the order of the table, unknown ones last."""
  place = {name: i for i, name in enumerate(_FIGURES)}
  return sorted(names, key=lambda name: place.get(_family(name), len(place)))


def _family(name: str) -> str:
  """The key of the table that a metric of training falls under."""
  for prefix in (ROUTER_WEIGHT, GRADIENT, CLIENTS):
    if name.startswith(prefix):
      return prefix
  return name


def members(train: Mapping[str, Any], family: str) -> dict[str, Any]:
  """Name -> value of a family's metrics in a record of training, without those
  that have no value.

  >>> members({'w_a': 0.25, 'w_b': 0.75, 'w_c': None, 'loss': 1.0}, 'w_')
  {'a': 0.25, 'b': 0.75}
  """
  return {
    name.removeprefix(family): value
    for name, value in train.items()
    if name.startswith(family) and value is not None
  }


class Mean(NamedTuple):
  """A running weighted mean.

  Attributes:
    total: [] or [n] float32 Σ w·v.
    weight: [] float32 Σ w, exact up to 2^24 = 16.8 million; beyond that each
      merge is off by at most 6e-8 of the sum, as merges of `total` are anyway.
  """

  total: jax.Array
  weight: jax.Array


EMPTY = Mean(np.float32(0), np.float32(0))


def empty(shape: tuple[int, ...]) -> Mean:
  """The mean of no vectors."""
  return Mean(np.zeros(shape, np.float32), np.float32(0))


def mean(value: jax.Array, weight: jax.Array) -> Mean:
  """A value, [] or [n], that is already the mean of `weight` samples."""
  weight = jnp.asarray(weight, jnp.float32)
  return Mean(jnp.where(weight > 0, value, 0.0) * weight, weight)


def over(values: jax.Array, counted: jax.Array) -> Mean:
  """The mean of an array over the entries where `counted`."""
  return Mean(
    jnp.sum(jnp.where(counted, values, 0.0)),
    jnp.sum(counted, dtype=jnp.float32),
  )


def count(counted: jax.Array) -> Mean:
  """The value of a metric that counts: how often `counted` is True."""
  return Mean(jnp.sum(counted, dtype=jnp.float32), jnp.zeros(()))


def merge(first, second):
  """Adds two trees of `Mean`."""
  return jax.tree.map(jnp.add, first, second)


def finish(means: dict[str, Mean]) -> dict[str, float | list[float] | None]:
  """Host values; None where nothing was counted (JSON has no NaN), but whole
  numbers where the metric is one (`CLIENTS`)."""

  def value(name, m):
    if name.startswith(CLIENTS):
      return int(m.total)
    if m.weight > 0:
      return (np.float64(m.total) / np.float64(m.weight)).tolist()
    return None

  return {name: value(name, m) for name, m in means.items()}


def ranking(
  ranks: np.ndarray | jax.Array,
  further: Sequence[Metric] = (),
  users: np.ndarray | None = None,
  cutoffs: tuple[int, ...] = CUTOFFS,
) -> dict[str, float]:
  """HR, NDCG and MRR of targets ranked one by one, and further metrics.

  Args:
    ranks: [n] int 0-based: how many candidates score at least as high as the
      target. A tie counts against the target.
    further: additional metrics.
    users: [n] whose each target is, ascending: of a user with several, the mean
      counts, so that HR@k is the share of a user's items among its first k.
      None = each has one.
    cutoffs: of HR and NDCG.

  Returns:
    'HR@n', 'NDCG@n' for n in `cutoffs`, 'MRR', and the additional metrics.

  Raises:
    UserError: see `ranking_of_each`.
  """
  return {
    name: float(np.mean(of_users(values, users)))
    for name, values in ranking_of_each(ranks, further, cutoffs).items()
  }


def of_users(values: np.ndarray, users: np.ndarray | None) -> np.ndarray:
  """[m] mean of each user's values [n]; unchanged where each has one.

  >>> of_users(np.array([1.0, 0.0, 1.0]), np.array([4, 4, 7])).tolist()
  [0.5, 1.0]
  """
  if users is None or not len(users):
    return values
  new = first_of_users(users)
  if new.all():
    return values
  whose = np.cumsum(new) - 1
  return np.bincount(whose, values) / np.bincount(whose)


def exposure_of_each(aimed: np.ndarray, cutoff: int = 10) -> np.ndarray:
  """[n] float64 whether an attack's target stands among the first.

  Args:
    aimed: [n] as `Ranks.aimed`; NaN comes of −1.
    cutoff: how many are first.

  >>> exposure_of_each(np.array([9, 10, -1])).tolist()
  [1.0, 0.0, nan]
  """
  return np.where(aimed >= 0, aimed < cutoff, np.nan)


def mean_of_users(values: np.ndarray, users: np.ndarray | None) -> float:
  """Mean over users of the mean of each one's values [n], NaN = none."""
  known = ~np.isnan(values)
  own = None if users is None else np.asarray(users)[known]
  return float(np.mean(of_users(values[known], own)))


@dataclasses.dataclass(frozen=True)
class AtCutoffs:
  """HR and NDCG at some cut-offs, as a metric.

  >>> AtCutoffs((1,))(np.array([0, 1]))['HR@1'].tolist()
  [1.0, 0.0]
  """

  cutoffs: tuple[int, ...]

  def __call__(self, ranks: np.ndarray) -> dict[str, np.ndarray]:
    """Values of `ranking_of_each`."""
    result = {}
    for n in self.cutoffs:
      hit = ranks < n
      result[f'HR@{n}'] = hit.astype(np.float64)
      result[f'NDCG@{n}'] = hit / np.log2(ranks + 2.0)
    return result


def first_of_users(users: np.ndarray) -> np.ndarray:
  """[n] bool, which targets are the first of their user; of one user, they are
  side by side."""
  return np.append(True, users[1:] != users[:-1])[: len(users)]


def ranking_of_each(
  ranks: np.ndarray | jax.Array,
  further: Sequence[Metric] = (),
  cutoffs: tuple[int, ...] = CUTOFFS,
) -> dict[str, np.ndarray]:
  """As `ranking`, but [n] float64 values, one per target.

  Args:
    ranks: as `ranking`.
    further: additional metrics.
    cutoffs: of HR and NDCG.

  Raises:
    UserError: a further metric returns something else, or reuses a name.
  """
  ranks = np.asarray(ranks)
  result = AtCutoffs(cutoffs)(ranks)
  result[MRR] = 1 / (ranks + 1.0)
  for metric in further:
    result |= _values_of(metric, ranks, result)
  return result


def _values_of(
  metric: Metric, ranks: np.ndarray, taken: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """What a further metric gives, checked."""
  title = 'metric ' + getattr(metric, '__name__', type(metric).__name__)
  found = metric(ranks)
  if not isinstance(found, Mapping):
    raise UserError(
      f'{title} gives {type(found).__name__}, not a dict from a name to an '
      'array of a value for each rank'
    )
  result = {}
  for name, values in found.items():
    if not isinstance(name, str) or name in taken:
      raise UserError(f'{title}: {name!r} is no name, or that of another one')
    try:
      values = np.asarray(values, np.float64)
    except (TypeError, ValueError):
      raise UserError(f'{title}: {name!r} is no array of numbers') from None
    if values.shape != ranks.shape:
      raise UserError(
        f'{title}: {name!r} has shape {values.shape} for ranks of shape '
        f'{ranks.shape}; a metric gives a value for each rank'
      )
    if not np.isfinite(values).all():
      rank = ranks[~np.isfinite(values)][0]
      raise UserError(f'{title}: {name!r} is NaN or infinite at rank {rank}')
    result[name] = values
  return result


def own_names(further: Sequence[Metric]) -> list[str]:
  """Names of further metrics.

  Raises:
    UserError: see `ranking_of_each`.
  """
  ranks = np.arange(2 * max(CUTOFFS))
  return [n for n in ranking_of_each(ranks, further) if n not in RANKING]


def further_metrics(words: Sequence[str]) -> tuple[Metric, ...]:
  """Metrics by their names, those of `FURTHER` or 'my_package.module:Thing'.

  Args:
    words: names, each followed by its options, 'option=value'.

  Raises:
    UserError: there is none of a name, it is no function, or an option is none
      of its own.
  """
  texts: list[str] = []
  for word in words:
    if '=' in word and texts:
      texts[-1] += f',{word}'
    else:
      texts.append(word)
  return tuple(map(_further_metric, texts))


def _further_metric(text: str) -> Metric:
  name, given = parts.split(text)
  found = parts.find(name, FURTHER, 'metric')
  metric = parts.make(found, given, f'metric {text}')
  if not callable(metric):
    raise UserError(f'metric {name}: cannot be called with ranks')
  return metric


def parse_cutoffs(words: Sequence[str]) -> tuple[int, ...]:
  """Cut-offs from texts, ascending.

  Raises:
    UserError: one is no whole number, is below 1 or stands there twice.

  >>> parse_cutoffs(['10', '1'])
  (1, 10)
  """
  given = f'`at={",".join(words)}`'
  try:
    found = [int(word) for word in words]
  except ValueError:
    raise UserError(
      f'{given}: not whole numbers with commas between them'
    ) from None
  if not found or min(found) < 1:
    raise UserError(f'{given}: a cut-off is 1 or more')
  twice = [n for n in found if found.count(n) > 1]
  if twice:
    raise UserError(f'{given}: {twice[0]} is named twice')
  return tuple(sorted(found))


def check_cutoffs(cutoffs: tuple[int, ...], num_items: int) -> None:
  """Raises UserError if a cut-off lies behind the catalogue's last item."""
  if cutoffs[-1] > num_items:
    raise UserError(f'`at={cutoffs[-1]}`: the catalogue has {num_items} items')


def headline_cutoff(cutoffs: Sequence[int]) -> int:
  """The cut-off that tables show where they have room for one: 10, or else the
  largest."""
  return 10 if 10 in cutoffs else max(cutoffs)


def with_cutoffs(
  further: Sequence[Metric], cutoffs: tuple[int, ...]
) -> tuple[Metric, ...]:
  """Further metrics at other cut-offs than their own: those that take an
  argument `cutoffs`. HR and NDCG are not among them, see `ranking_of_each`."""
  return tuple(
    functools.partial(metric, cutoffs=cutoffs)
    if 'cutoffs' in inspect.signature(metric).parameters
    else metric
    for metric in further
    if not isinstance(metric, AtCutoffs)
  )


def with_named(further: Sequence[Metric], name: str) -> tuple[Metric, ...]:
  """Further metrics, with HR and NDCG at the cut-off of a name (`NDCG@50`) that
  none of them has.

  Raises:
    UserError: there is no metric of this name; all names.
  """
  known = (*RANKING, *own_names(further))
  if name in known:
    return tuple(further)
  own_cutoff = re.fullmatch(r'(?:HR|NDCG)@([1-9]\d*)', name)
  if not own_cutoff:
    raise UserError(
      f'there is no metric {name}; one of {", ".join(known)}, or HR@k and '
      'NDCG@k for any whole number k'
    )
  return (*further, AtCutoffs((int(own_cutoff[1]),)))


def recbole_of_each(
  ranks: np.ndarray, cutoffs: tuple[int, ...] = CUTOFFS
) -> dict[str, np.ndarray]:
  """[K] values under the names and definitions of RecBole (Zhao et al. 2021),
  with one relevant item per user: recall is hit, average precision the
  reciprocal rank, both cut off.

  RecBole leaves ties to its sort order; here they count against the target.

  Args:
    ranks: as `ranking`.
    cutoffs: of each of them.
  """
  ranks = np.asarray(ranks, np.float64)
  result = {}
  for n in cutoffs:
    hit = ranks < n
    result[f'hit@{n}'] = result[f'recall@{n}'] = hit.astype(np.float64)
    result[f'precision@{n}'] = hit / n
    result[f'mrr@{n}'] = result[f'map@{n}'] = hit / (ranks + 1)
    result[f'ndcg@{n}'] = hit / np.log2(ranks + 2)
  return result


# What a run always has, and what may be named beside it.
RANKING = tuple(ranking_of_each(np.arange(1)))
FURTHER: dict[str, Metric] = {'recbole': recbole_of_each}
