"""The acceptance list of the original system's report, each point measured.

A point is {'name', 'target', 'measured', 'passed'}; `passed` is None if the run
has nothing to measure, for instance without experts, or tells nothing of it.
"""

import math
from typing import Any, Sequence

from fedmmr_jax import metrics
from fedmmr_jax.client import windows
from fedmmr_jax.config import RunConfig
from fedmmr_jax.data.features import IntegrityReport
from fedmmr_jax.federation.privacy import OFF
from fedmmr_jax.models import groups

HR_TARGET = 0.55
ROUTER_RANGE = (0.6, 1.4)  # of an equal share: 0.3 to 0.7 for two experts
CONTRASTIVE_RANGE = (2.0, 4.0)

Point = dict[str, Any]


def judge(
  config: RunConfig,
  records: Sequence[dict[str, Any]],
  test: dict[str, dict[str, float]],
  integrity: Sequence[IntegrityReport],
) -> list[Point]:
  """The list for one finished run.

  Args:
    config: its settings.
    records: the lines of its `metrics.jsonl`.
    test: its test metrics, {'sampled': …, 'full': …}.
    integrity: reports of the feature matrices that were checked at start.
  """
  # A round whose cohort had no positive says nothing.
  rounds = [record['train'] for record in records]
  trained = [t for t in rounds if t.get(metrics.LOSS) is not None] or rounds
  first, last = trained[0], trained[-1]
  hit_rate = test[metrics.SAMPLED][metrics.HR]
  training = [
    _router(first, last),
    _contrastive(last, config),
    _gradient_flow(last, config),
  ]
  if config.federation.privacy != OFF:
    told = 'withheld: `privacy` releases no training metrics'
    training = [_point(x['name'], x['target'], told, None) for x in training]
  return [
    _point(
      f'test {metrics.HR}, {metrics.SAMPLED}',
      f'> {HR_TARGET}',
      f'{hit_rate:.4f}',
      hit_rate > HR_TARGET,
    ),
    *training,
    _integrity(integrity),
  ]


def _point(name, target, measured, passed) -> Point:
  return {
    'name': name,
    'target': target,
    'measured': measured,
    'passed': passed,
  }


def _router(first, last) -> Point:
  name = 'router weights'
  at_start, at_end = (
    metrics.members(train, metrics.ROUTER_WEIGHT) for train in (first, last)
  )
  # A weight of 0 beside an expert that does not exist is no weight.
  there = _gradients(last)
  at_end = {e: share for e, share in at_end.items() if e in there}
  low, high = (x / max(2, len(at_end)) for x in ROUTER_RANGE)
  target = f'each expert in {low:.2g} to {high:.2g} at the end'
  if len(at_end) < 2:
    return _point(name, target, 'no choice between experts in this run', None)
  return _point(
    name,
    target,
    ', '.join(
      f'{expert} {_text(at_start.get(expert))} -> {share:.2f}'
      for expert, share in at_end.items()
    ),
    all(low <= share <= high for share in at_end.values()),
  )


def _contrastive(last, config: RunConfig) -> Point:
  low, high = CONTRASTIVE_RANGE
  name, target = 'contrastive loss', f'{low:g} to {high:g}'
  value = last[metrics.CONTRASTIVE_LOSS]
  if value is None:
    if not config.contrastive:
      why = 'no such loss in this run'
    elif len(_gradients(last)) < 2:
      why = 'no two experts in this run'
    else:
      why = 'no positive had both experts'
    return _point(name, target, why, None)
  chance = math.log(windows.targets_of_step(config))
  why = ''
  if value > high:
    why = (
      f'; guessing among the {windows.targets_of_step(config)} positives '
      f"of a step gives {chance:.2f}: the experts' outputs are "
      + ('unrelated' if value > chance else 'barely related')
    )
  elif value < low:
    why = '; the experts tell which output belongs to the same item' + (
      ': both see the candidate itself'
      if config.model.expert_form.sees_candidate
      else ''
    )
  return _point(name, target, f'{value:.2f}{why}', low <= value <= high)


def _gradients(last) -> dict[str, float]:
  """Expert -> norm of its gradient, of the experts that there are."""
  norms = metrics.members(last, metrics.GRADIENT)
  return {e: norm for e, norm in norms.items() if e != metrics.BACKBONE}


def _gradient_flow(last, config: RunConfig) -> Point:
  name = 'gradient reaching the experts'
  target = 'no gate, and a gradient at each'
  norms = metrics.members(last, metrics.GRADIENT)
  experts = _gradients(last)
  if not experts:
    return _point(name, target, 'no experts in this run', None)
  fusion = config.model.fusion.name
  measured = f'{fusion}; mean norm of a step: ' + ', '.join(
    f'{part} {_text(norm, 4)}' for part, norm in norms.items()
  )
  frozen = groups.all_paths(config.client.frozen_groups)
  trained = [
    norm
    for expert, norm in experts.items()
    if not any(groups.is_within(f'{expert}_expert', p) for p in frozen)
  ]
  if not trained:
    return _point(name, target, 'the experts are frozen', None)
  return _point(
    name,
    target,
    measured,
    fusion == 'residual' and all(norm > 0 for norm in trained),
  )


def _integrity(reports: Sequence[IntegrityReport]) -> Point:
  name, target = 'feature integrity', 'every matrix passed its checks'
  if not reports:
    return _point(name, target, 'no features in this run', None)
  return _point(
    name,
    target,
    ', '.join(f'{r.kind}: {r.covered} of {r.catalogue} items' for r in reports),
    True,
  )


def _text(value: float | None, digits: int = 2) -> str:
  return '-' if value is None else f'{value:.{digits}f}'
