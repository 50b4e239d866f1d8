"""What a run with noise gives away of a client: (ε, δ).

The mathematics are those of the libraries dp-accounting (Google) and
jax-privacy (Google DeepMind), the extra `privacy`; here is said which of their
events a round is. A privacy loss distribution (Koskela et al. 2020) is
composed over the rounds. `noise_multiplier` is always the standard deviation of
the noise on a sum of updates over the bound on the norm of one.

| sampling  | event of a round | neighbours |
|-----------|------------------|------------|
| `poisson` | Gaussian, sampled with probability q | a client added or removed |
| `fixed`   | Gaussian on a random subset of fixed size (Poisson sampling with \
probability 1, truncated to C; Ganesh 2025, arXiv:2508.15089, whose bound of \
the truncated part holds for a replaced client too) | a client's data replaced |
| `fixed`, all clients | Gaussian | a client's data left out |
| `cyclic`  | Gaussian in every turn of a client; correlated noise has the \
sensitivity of one turn times the root of their number (Choquette-Choo et al. \
2023, arXiv:2306.08153, Theorem 2) | a client's data left out |
"""

import functools
from typing import Any, NamedTuple

from fedmmr_jax.config import CYCLIC, FIXED, POISSON
from fedmmr_jax.errors import UserError

# Of the privacy losses. dp-accounting rounds them up; a tenth of this changes
# ε by less than 0.01 %, for ten times the work.
INTERVAL = 1e-3
# More noise than that is none that anybody wants.
MOST_NOISE = 1e4
# With less, ε is in the thousands, and computing it takes a minute.
LEAST_NOISE = 0.1
ACCOUNTANT = 'PLD, dp-accounting'
ADDED, REPLACED, LEFT_OUT = 'add_or_remove', 'replace', 'zero_out'


class Schedule(NamedTuple):
  """How often, and with what luck, a client takes part.

  Attributes:
    sampling: one of the config's `sampling`.
    population: clients that cohorts are drawn of.
    cohort: clients of a cohort, of `poisson` expected.
    separation: rounds from one turn of a client to the next at the least.
    asked_before: standard deviation of the noise on each sum to which every
      client adds once before round 1 (the sketch, then the counts that it
      begins with), over the bound on what it adds.
  """

  sampling: str
  population: float
  cohort: float
  separation: int
  asked_before: tuple[float, ...] = ()

  @property
  def neighbours(self) -> str:
    """What is protected: the difference of two federations that ε bounds."""
    if self.sampling == POISSON:
      return ADDED
    if self.sampling == FIXED and self.cohort < self.population:
      return REPLACED
    return LEFT_OUT


def library(name: str) -> Any:
  """A module of the extra `privacy`.

  Raises:
    UserError: the extra is not installed.
  """
  import importlib

  try:
    return importlib.import_module(name)
  except ImportError:
    raise UserError(
      '`privacy` needs the libraries jax-privacy and dp-accounting; install '
      "them: pip install 'fedmmr_jax[privacy]'"
    ) from None


@functools.lru_cache(maxsize=4096)
def epsilon(
  schedule: Schedule, noise_multiplier: float, rounds: int, delta: float
) -> float:
  """ε after so many rounds; infinite without noise.

  Args:
    schedule: how cohorts are drawn.
    noise_multiplier: of each round.
    rounds: finished rounds.
    delta: δ.

  Raises:
    UserError: the extra is not installed.
  """
  accountant = _accountant(schedule)
  if not (rounds or schedule.asked_before):
    return 0.0
  accountant.compose(event_before(schedule))
  if rounds:
    accountant.compose(event(schedule, noise_multiplier, rounds))
  return float(accountant.get_epsilon(delta))


def event_before(schedule: Schedule) -> Any:
  """The dp-accounting event of what is asked before round 1: who is asked is
  known, so that no chance hides anybody."""
  dp = library('dp_accounting')
  # What another client adds in the place of one may be its opposite.
  apart = 2 if schedule.neighbours == REPLACED else 1
  return dp.ComposedDpEvent(
    [dp.GaussianDpEvent(noise / apart) for noise in schedule.asked_before]
  )


def event(schedule: Schedule, noise_multiplier: float, rounds: int) -> Any:
  """The dp-accounting event of so many rounds."""
  dp = library('dp_accounting')
  noise = dp.GaussianDpEvent(noise_multiplier)
  if schedule.sampling == POISSON:
    share = schedule.cohort / schedule.population
    one, count = dp.PoissonSampledDpEvent(share, noise), rounds
  elif schedule.sampling == CYCLIC:
    sensitivity = library('jax_privacy.matrix_factorization.sensitivity')
    turns = sensitivity.minsep_true_max_participations(
      rounds, schedule.separation
    )
    one, count = noise, int(turns)
  elif schedule.cohort < schedule.population:
    one = dp.TruncatedSubsampledGaussianDpEvent(
      dataset_size=round(schedule.population),
      sampling_probability=1.0,
      truncated_batch_size=round(schedule.cohort),
      noise_multiplier=noise_multiplier,
    )
    count = rounds
  else:
    one, count = noise, rounds
  return dp.SelfComposedDpEvent(one, count)


def noise_for(
  schedule: Schedule, target: float, rounds: int, delta: float
) -> float:
  """The least noise multiplier with which so many rounds keep to ε = `target`.

  Raises:
    UserError: no noise does, or the extra is not installed.
  """
  return _noise_for(schedule, target, rounds, delta)


@functools.lru_cache(maxsize=64)
def _noise_for(schedule, target, rounds, delta) -> float:
  dp = library('dp_accounting')

  def spent(noise):
    return epsilon(schedule, noise, rounds, delta)

  if spent(MOST_NOISE) > target:
    raise UserError(
      f'`target_epsilon={target:g}` cannot be reached in {rounds} rounds at '
      f'delta={delta:.3g}, not even with noise of {MOST_NOISE:g} times the '
      'clip norm; take fewer rounds (`num_rounds`), a smaller '
      '`client_fraction`, or a larger epsilon'
    )
  # From above: the less noise, the longer the computation, and dp-accounting
  # by itself would begin with next to none, which takes a minute.
  low = MOST_NOISE / 2
  while spent(low) <= target:
    low /= 2
    if low < LEAST_NOISE:
      return LEAST_NOISE

  def whole(noise):
    return dp.ComposedDpEvent(
      [event_before(schedule), event(schedule, noise, rounds)]
    )

  found = dp.calibrate_dp_mechanism(
    lambda: _accountant(schedule),
    whole,
    target,
    delta,
    bracket_interval=dp.ExplicitBracketInterval(low, 2 * low),
    tol=1e-4 * low,
  )
  return float(found)


def _accountant(schedule: Schedule) -> Any:
  dp = library('dp_accounting')
  pld = library('dp_accounting.pld')
  relation = (
    dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    if schedule.sampling == POISSON
    else dp.NeighboringRelation.REPLACE_SPECIAL
  )
  return pld.PLDAccountant(relation, value_discretization_interval=INTERVAL)
