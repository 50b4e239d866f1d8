"""What `evaluate` tells of lists beside their accuracy, and of groups of users:
--beyond and --fairness (fedmmr_jax/evaluation/beyond_accuracy.py)."""

import math
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

from experiments import console
from fedmmr_jax import metrics
from fedmmr_jax.data.users import Attributes
from fedmmr_jax.evaluation import beyond_accuracy, user_results
from fedmmr_jax.evaluation.beyond_accuracy import (
  Asked,
  Fairness,
  MOST_POPULAR,
  Offer,
)
from fedmmr_jax.evaluation.bootstrap import Estimate
from fedmmr_jax.evaluation.user_results import UserResults
from fedmmr_jax.federation.round import FederationState
from fedmmr_jax.simulation import Simulation

HISTORY = 'training items of the user'  # by which there are always groups


class Offers(NamedTuple):
  """The lists of one run.

  Attributes:
    asked: who is offered them.
    of_each: protocol, or MOST_POPULAR -> cut-off -> the lists of that length.
  """

  asked: Asked
  of_each: dict[str, dict[int, Offer]]


def offers(
  simulation: Simulation,
  state: FederationState,
  split: str,
  protocols: Sequence[str],
  cutoffs: tuple[int, ...],
) -> Offers:
  """Lists of a run.

  Args:
    protocols: some of PROTOCOLS.
    cutoffs: how long they are, ascending.

  Raises:
    UserError: the split has no lists, or a score is NaN or infinite.
  """
  asked = Asked.of(simulation, split)
  longest = {}
  for name in protocols:
    longest[name] = asked.lists(simulation, state, name, cutoffs[-1])
    if name == 'full':
      longest[MOST_POPULAR] = asked.most_popular(cutoffs[-1])
  return Offers(
    asked,
    {
      name: {
        k: beyond_accuracy.offer(asked.items, asked.histories, rows[:, :k])
        for k in cutoffs
      }
      for name, rows in longest.items()
    },
  )


def figures(found: Offers) -> dict[str, dict[str, Estimate]]:
  """Protocol -> metric with its cut-off -> figure."""
  return {
    name: {
      f'{metric}@{k}': estimate
      for k, offered in by_cutoff.items()
      for metric, estimate in beyond_accuracy.estimates(offered).items()
    }
    for name, by_cutoff in found.of_each.items()
  }


def differences(mine: Offers, theirs: Offers) -> dict[str, dict[str, Estimate]]:
  """The same of the difference between two runs, without the baseline."""
  return {
    name: {
      f'{metric}@{k}': estimate
      for k, offered in by_cutoff.items()
      for metric, estimate in beyond_accuracy.differences(
        offered, theirs.of_each[name][k]
      ).items()
    }
    for name, by_cutoff in mine.of_each.items()
    if name != MOST_POPULAR
  }


def of_each_user(found: Offers) -> dict[str, np.ndarray]:
  """'protocol/metric' -> [n] values, for a file of users."""
  return {
    f'{name}/{metric}@{k}': values
    for name, by_cutoff in found.of_each.items()
    if name != MOST_POPULAR
    for k, offered in by_cutoff.items()
    for metric, values in offered.values.items()
  }


def fairness(
  offered: Offer,
  protocol: str,
  k: int,
  results: UserResults,
  attributes: Attributes,
  num_train: np.ndarray,
) -> dict[str, Fairness]:
  """What groups are by -> their metrics and gaps.

  Args:
    offered: lists.
    protocol: whose they are.
    k: their length.
    results: ranks of the same users.
    attributes: of `users.read`.
    num_train: [n] training items of the users.
  """
  accuracy = {
    name: metrics.of_users(values, results.users)
    for name, values in results.of_each()[protocol].items()
    if '@' not in name or name.endswith(f'@{k}')
  }
  offered = offered._replace(values={**accuracy, **offered.values})
  users = results.users[metrics.first_of_users(results.users)]
  groups = {HISTORY: dict(user_results.by_history(num_train))}
  for name, of_user in attributes.items():
    groups[name] = user_results.by_attribute(name, users, of_user)
  groups = {
    title: {label: chosen for label, chosen in parts.items() if chosen.any()}
    for title, parts in groups.items()
  }
  return {
    title: _accuracy_first(
      beyond_accuracy.fairness(offered, parts), list(accuracy), k
    )
    for title, parts in groups.items()
    if len(parts) > 1
  }


def _accuracy_first(
  found: Fairness, accuracy: Sequence[str], k: int
) -> Fairness:
  """The same with the metrics' cut-offs behind their names."""
  told = {name: name for name in accuracy} | {
    name: f'{name}@{k}' for name in found.gaps if name not in accuracy
  }
  return Fairness(
    found.users,
    {
      label: {shown: of_group[name] for name, shown in told.items()}
      for label, of_group in found.groups.items()
    },
    {shown: found.gaps[name] for name, shown in told.items()},
  )


def left_out(asked: Asked) -> list[str]:
  """Why metrics are not there, a line each."""
  items = asked.items
  notes = [
    f'{metrics.DIVERSITY}{kind} is left out: the run has no {kind} features'
    for kind in ('visual', 'text')
    if kind not in items.features
  ]
  if not any(items.genres):
    notes.append(
      f'{metrics.MISCALIBRATION} is left out: the item file tells no genres'
    )
  return notes


def as_json(told: Any) -> Any:
  """Tuples with names as objects; None where a figure is undefined."""
  if isinstance(told, tuple):
    told = told._asdict()
  if isinstance(told, Mapping):
    return {name: as_json(value) for name, value in told.items()}
  return None if isinstance(told, float) and math.isnan(told) else told


def table(found: Mapping[str, Mapping[str, Estimate]]) -> str:
  """Metrics by protocol, each with its interval."""
  return console.table(
    ['', *found],
    [
      [metric, *(_with_interval(of_name[metric]) for of_name in found.values())]
      for metric in next(iter(found.values()))
    ],
  )


def fairness_table(title: str, found: Fairness) -> str:
  """A row for each metric: the groups, and how far they are apart."""
  return console.table(
    [title, *found.users, 'max - min', 'by chance', 'min / max', 'std'],
    [
      ['users', *found.users.values(), '', '', '', ''],
      *(
        [
          name,
          *(number(group[name].value) for group in found.groups.values()),
          _with_interval(gap.spread),
          number(gap.by_chance),
          _with_interval(gap.ratio),
          _with_interval(gap.deviation),
        ]
        for name, gap in found.gaps.items()
      ),
    ],
  )


def number(value: float, like: float | None = None) -> str:
  """Four digits behind the point of what is small, one of what is large, or as
  many as something like it has."""
  if math.isnan(value):
    return '-'
  digits = 4 if abs(value if like is None else like) < 100 else 1
  return f'{round(value, digits) + 0.0:.{digits}f}'  # no -0.0000


def _with_interval(found: Estimate) -> str:
  if math.isnan(found.value):
    return '-'
  value, low, high = (number(x, found.value) for x in found)
  return f'{value} [{low}, {high}]'
