"""Evaluation results of each user: metrics of all protocols, slices of users, a
table to save, and the difference to another run.

| protocol | the target is ranked against |
|---|---|
| full | every item that the user had not consumed before it |
| sampled | unseen items drawn uniformly (`sampled_negatives`, 100) |
| popularity | as many, drawn by how often an item was consumed in training |
| corrected | as full, estimated from `sampled` (`corrected.py`) |

All share one scoring pass; candidates are drawn once, from the run's seed.
"""

import pathlib
from typing import Mapping, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv
from pyarrow import parquet as arrow_parquet

from fedmmr_jax import metrics
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import bootstrap, corrected, popularity
from fedmmr_jax.evaluation.bootstrap import Difference
from fedmmr_jax.evaluation.ranking import Ranks
from fedmmr_jax.federation.round import FederationState
from fedmmr_jax.metrics import CUTOFFS, Metric
from fedmmr_jax.simulation import Simulation

PROTOCOLS = ('full', 'sampled', 'popularity', 'corrected')
FORMATS = ('.csv', '.parquet')
MOST_VALUES = 12  # of a user attribute that are a slice each
UNKNOWN = 'unknown'  # whose attribute nobody knows

# Protocol -> metric -> values or their mean.
Metrics = dict[str, dict[str, np.ndarray]]
Means = dict[str, dict[str, float]]


class UserResults(NamedTuple):
  """Targets of users, and their ranks: one of each user, or with a given split
  several.

  Attributes:
    users: [n] source ids, those of one user together.
    targets: [n] source ids of the target items.
    num_train: [n] int, items that the user trains on.
    target_popularity: [n] int, training interactions with the target.
    repeated: [n] bool, whether the user had consumed the target before.
    candidates: [n] int, items that `full` ranks against.
    num_sampled: int, negatives of the sampled protocols.
    full, sampled, popular: [n] int, how many of each protocol's candidates
      score at least as high as the target.
    metrics: further metrics besides HR, NDCG and MRR.
    cutoffs: of HR and NDCG.
    aimed: [n] int, see `Ranks.aimed`.
  """

  users: np.ndarray
  targets: np.ndarray
  num_train: np.ndarray
  target_popularity: np.ndarray
  repeated: np.ndarray
  candidates: np.ndarray
  num_sampled: int
  full: np.ndarray
  sampled: np.ndarray
  popular: np.ndarray
  metrics: tuple[Metric, ...] = ()
  cutoffs: tuple[int, ...] = CUTOFFS
  aimed: np.ndarray | int = -1

  def at(self, cutoffs: tuple[int, ...]) -> 'UserResults':
    """The same at other cut-offs."""
    return self._replace(
      metrics=metrics.with_cutoffs(self.metrics, cutoffs), cutoffs=cutoffs
    )

  def where(self, chosen: np.ndarray) -> 'UserResults':
    """The results of some of the users."""
    return UserResults(
      *(x if isinstance(x, (int, tuple)) else x[chosen] for x in self)
    )

  def of_each(self) -> Metrics:
    """Protocol -> metric -> [n] values; under an attack the exposure of its
    target too, NaN where the user had consumed it before."""
    found = {
      protocol: metrics.ranking_of_each(ranks, self.metrics, self.cutoffs)
      for protocol, ranks in zip(
        PROTOCOLS, (self.full, self.sampled, self.popular)
      )
    }
    found['corrected'] = corrected.estimate_of_each(
      self.sampled,
      self.candidates,
      self.num_sampled,
      further=self.metrics,
      cutoffs=self.cutoffs,
    )
    aimed = np.asarray(self.aimed)
    if np.any(aimed >= 0):
      found['full'][metrics.EXPOSURE] = metrics.exposure_of_each(aimed)
    return found

  def means(self) -> Means:
    """Protocol -> metric -> mean over the users."""
    return {
      protocol: {
        name: metrics.mean_of_users(values, self.users)
        for name, values in by_metric.items()
      }
      for protocol, by_metric in self.of_each().items()
    }

  @property
  def num_users(self) -> int:
    """How many users they are of."""
    return len(np.unique(self.users))


def evaluate(
  simulation: Simulation, state: FederationState, split: str
) -> UserResults:
  """Ranks the targets of a split under all protocols, in one pass.

  Args:
    simulation: one with popular negatives.
    state: what is evaluated.
    split: one of `Simulation.splits`.

  Raises:
    UserError: a score is NaN or infinite.
  """
  _, ranks = simulation.evaluate(state, split)
  return of_ranks(simulation, ranks, split)


def of_ranks(simulation: Simulation, ranks: Ranks, split: str) -> UserResults:
  """Combines ranks [n] of a split's targets with what is known of each."""
  if not simulation.data.popular_negatives.shape[-1]:  # ranks would all be 0
    raise ValueError('the simulation has no popular negatives')
  clients, targets = simulation.targets(split)
  dataset = simulation.ranked_dataset(split)
  where = simulation.ranked_targets(split)
  asked = list(zip(clients, where.known - 1, targets))
  closed = [
    len(np.union1d(dataset.no_candidates(k, n), [t])) for k, n, t in asked
  ]
  counts = popularity.training_counts(simulation.dataset)
  return UserResults(
    dataset.user_ids[clients],
    dataset.item_ids[targets],
    simulation.num_train[clients],
    counts[targets],
    np.array([t in dataset.until_target(k, n) for k, n, t in asked], bool),
    dataset.num_items - dataset.num_cold - np.array(closed, int),
    simulation.data.sampled_negatives.shape[-1],
    ranks.full,
    ranks.sampled,
    ranks.popular,
    simulation.metrics,
    aimed=np.asarray(ranks.aimed),
  )


def slices(
  results: UserResults, attributes: Mapping[str, Mapping[str, str]] = {}
) -> Mapping[str, Mapping[str, UserResults]]:
  """Users by history length, in quarters, and by the popularity of the target;
  where some targets were consumed before, by that; by what users are.

  Targets: head, middle and tail each hold a third of the users whose target
  occurs in training; 'new' holds the targets that do not.

  Args:
    results: of all.
    attributes: name -> user id as text -> its value (`users.read`).
  """
  lengths = by_history(results.num_train)
  trained = results.target_popularity > 0
  popular = {
    f'{name}: {label}': trained & chosen
    for name, (label, chosen) in zip(
      ('tail', 'middle', 'head'),
      _parts(results.target_popularity, 3, among=trained),
    )
  }
  popular['new: 0'] = ~trained
  found = {
    'training items of the user': dict(lengths),
    'training interactions with the target': popular,
  }
  if results.repeated.any():
    found['the target'] = {
      'consumed before (repeat)': results.repeated,
      'new to the user (explore)': ~results.repeated,
    }
  for name, of_user in attributes.items():
    found[name] = by_attribute(name, results.users, of_user)
  return {
    title: {
      label: results.where(chosen)
      for label, chosen in parts.items()
      if chosen.any()
    }
    for title, parts in found.items()
  }


def by_attribute(
  name: str, users: np.ndarray, of_user: Mapping[str, str]
) -> dict[str, np.ndarray]:
  """Value -> [n] bool; a session is of its user (`lines.py`). Of many values
  quarters if they are numbers, else nothing: zip codes make no slices.

  Raises:
    UserError: nobody has a value.
  """
  texts = [str(user) for user in users.tolist()]
  values = np.array(
    [of_user.get(x, of_user.get(x.rpartition('#')[0], '')) for x in texts]
  )
  if not (values != '').any():
    raise UserError(
      f'{name}: the file of users tells of none of {len(texts)} users '
      f'({texts[0]}, …); are its ids those of the interactions?'
    )
  distinct = np.unique(values[values != ''])
  if len(distinct) > MOST_VALUES:
    known = values != ''
    numbers = np.zeros(len(values))
    try:
      numbers[known] = values[known].astype(float)
    except ValueError:
      return {}
    found = dict(_parts(numbers, 4, among=known))
  else:
    found = {value: values == value for value in distinct.tolist()}
  # A file may call somebody so itself.
  unknown = (values == '') | (values == UNKNOWN)
  return {k: v for k, v in found.items() if k != UNKNOWN} | {UNKNOWN: unknown}


def by_history(num_train: np.ndarray) -> list[tuple[str, np.ndarray]]:
  """(bounds, [n] bool) of quarters of the users by their training items, as far
  as ties allow; shortest histories first."""
  return _parts(num_train, 4)


def _parts(
  values: np.ndarray, count: int, among: np.ndarray | None = None
) -> list[tuple[str, np.ndarray]]:
  """(bounds, [n] bool) of parts of equal size, as far as ties allow."""
  among = np.ones(len(values), bool) if among is None else among
  if not among.any():
    return []
  edges = np.unique(
    np.quantile(values[among], np.arange(1, count) / count, method='lower')
  )
  part = np.searchsorted(edges, values, side='left')
  found = []
  for number in range(len(edges) + 1):
    chosen = among & (part == number)
    if chosen.any():
      low, high = (
        int(x) if float(x).is_integer() else x
        for x in (values[chosen].min(), values[chosen].max())
      )
      found.append((f'{low} to {high}' if low < high else f'{low}', chosen))
  return found


def difference(
  results: UserResults, other: UserResults
) -> dict[str, dict[str, Difference]]:
  """Protocol -> metric -> this minus the other, paired over users.

  Raises:
    UserError: the two do not rank the same targets of the same users.
  """
  if not (
    np.array_equal(results.users, other.users)
    and np.array_equal(results.targets, other.targets)
  ):
    raise UserError(
      'the two runs do not rank the same targets of the same users, so that '
      'they cannot be paired; compare runs on the same data, with the same '
      '`top_k_users`, filters and split'
    )
  # Metrics are of ranks: the other run's have this run's too.
  other = other._replace(metrics=results.metrics, cutoffs=results.cutoffs)
  mine, theirs = results.of_each(), other.of_each()

  def paired(values, others):
    known = ~np.isnan(values) & ~np.isnan(others)
    users = results.users[known]
    return bootstrap.paired_bootstrap(
      metrics.of_users(values[known], users),
      metrics.of_users(others[known], users),
    )

  return {
    protocol: {
      metric: paired(values, theirs[protocol][metric])
      for metric, values in by_metric.items()
      if metric in theirs[protocol]
    }
    for protocol, by_metric in mine.items()
  }


def check_path(path: str) -> None:
  """Raises UserError unless `write` knows the file's ending."""
  if pathlib.Path(path).suffix not in FORMATS:
    raise UserError(f'{path}: end it in {" or ".join(FORMATS)}')
  if not pathlib.Path(path).absolute().parent.is_dir():
    raise UserError(f'{path}: its folder does not exist')


def write(
  results: UserResults,
  path: pathlib.Path,
  further: Mapping[str, np.ndarray] = {},
) -> None:
  """Writes one row per target, as Parquet or CSV by the file's ending: ids,
  sizes, ranks from 1, and each metric of each protocol.

  Args:
    results: of all.
    path: the file.
    further: name of a column -> a value of each user; NaN = none.

  Raises:
    UserError: the file has another ending.
  """
  check_path(str(path))
  whose = np.cumsum(metrics.first_of_users(results.users)) - 1
  table = pa.table(
    {
      'user': results.users,
      'target': results.targets,
      'num_train': results.num_train,
      'target_popularity': results.target_popularity,
      'repeated': results.repeated,
      'candidates': results.candidates,
      **{
        f'rank_{name}': 1 + ranks
        for name, ranks in zip(
          PROTOCOLS, (results.full, results.sampled, results.popular)
        )
      },
      **{
        f'{protocol}/{metric}': values
        for protocol, by_metric in results.of_each().items()
        for metric, values in by_metric.items()
      },
      **{
        name: pa.array(values[whose], from_pandas=True)
        for name, values in further.items()
      },
    }
  )
  write_table(table, path)


def write_table(table: pa.Table, path: pathlib.Path) -> None:
  """Writes a table as Parquet or CSV by the ending, see `check_path`."""
  if path.suffix == '.csv':
    arrow_csv.write_csv(table, path)
  else:
    arrow_parquet.write_table(table, path)
