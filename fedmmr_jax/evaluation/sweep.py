"""A search for settings with Optuna: trials, pruned by their validation.

A trial is a configuration, trained with one or more seeds and judged by a
metric of its validation; the test items are never ranked. Trials are kept in a
database, so a search goes on where an earlier process stopped.
"""

import dataclasses
import gc
import pathlib
import statistics
import time
import warnings
from typing import Any, Callable, Mapping, Protocol, Sequence

import jax

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.config import ORIGINAL_EXPERTS, RunConfig
from fedmmr_jax.data import load
from fedmmr_jax.data.load import Loaded
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import ablation
from fedmmr_jax.runs import training
from fedmmr_jax.simulation import Simulation

# Attributes of a trial.
CHANGES, ROUND, OF_SEEDS = 'changes', 'round', 'of_seeds'
REFUSED, SECONDS, AGAIN = 'refused', 'seconds', 'again'
# A process may hold 65,530 memory maps (Linux); compiled programs use many.
_MOST_PROGRAMS = 8
# Fewer finished trials say nothing about what matters.
_FEWEST_FOR_IMPORTANCE = 10


class Space(Protocol):
  """What varies."""

  def suggest(self, trial: Any) -> dict[str, str]:
    """Name of a setting -> its value, as text, in an Optuna trial."""


@dataclasses.dataclass(frozen=True)
class Objective:
  """What a trial is judged by: a metric of the validation, the largest is best.

  Attributes:
    protocol: full or sampled.
    metric: as in NDCG@10.
  """

  protocol: str
  metric: str

  @classmethod
  def of(cls, text: str, config: RunConfig) -> 'Objective':
    """From protocol/metric.

    Raises:
      UserError: there is none of this name.
    """
    protocol, _, metric = text.partition('/')
    further = metrics_lib.further_metrics(config.evaluation.metric_names)
    known = (*metrics_lib.RANKING, *metrics_lib.own_names(further))
    if protocol not in ('full', 'sampled') or metric not in known:
      raise UserError(
        f'there is no validation metric {text!r}; full/ or sampled/ and one of '
        + ', '.join(known)
      )
    return cls(protocol, metric)

  def of_validation(self, found: Mapping[str, Mapping[str, float]]) -> float:
    return found[self.protocol][self.metric]

  def of_records(
    self, records: Sequence[Mapping[str, Any]], config: RunConfig
  ) -> tuple[float, int]:
    """(value, round) at the round that training would choose by `select_by`."""
    validated = [record for record in records if 'val' in record]
    chosen = max(
      validated,
      key=lambda r: training.selection_value(r['val'], r['round'], config),
    )
    return self.of_validation(chosen['val']), chosen['round']


class Pruner:
  """Which trials end before their last round. Fields are options."""

  def build(self, config: RunConfig) -> Any:
    """The pruner of Optuna.

    Raises:
      UserError: it would never end a trial.
    """
    raise NotImplementedError


def _option(default: int, help: str, minimum: int) -> Any:
  return dataclasses.field(
    default=default, metadata={'help': help, 'minimum': minimum}
  )


def _check_rounds(rounds: int, config: RunConfig) -> None:
  num_rounds = config.server.num_rounds
  if rounds >= num_rounds:
    raise UserError(
      f'with rounds={rounds} of the pruner and `num_rounds={num_rounds}` no '
      'trial would end early; lower it, or choose `pruner=none`'
    )


@dataclasses.dataclass(frozen=True)
class Median(Pruner):
  """Ends a trial whose best validation so far is below the median of the
  others at this round."""

  trials: int = _option(4, 'that finish before any is pruned', 1)
  rounds: int = _option(0, 'in which none is pruned', 0)

  def build(self, config: RunConfig) -> Any:
    _check_rounds(self.rounds, config)
    return optuna().pruners.MedianPruner(self.trials, self.rounds)


@dataclasses.dataclass(frozen=True)
class Hyperband(Pruner):
  """Li et al. 2018, "Hyperband", JMLR: of each group of trials the best
  1/factor go on, for factor times as many rounds."""

  rounds: int = _option(10, 'that each trial gets at least', 1)
  factor: int = _option(3, 'see above', 2)

  def build(self, config: RunConfig) -> Any:
    _check_rounds(self.rounds, config)
    return optuna().pruners.HyperbandPruner(
      min_resource=self.rounds,
      max_resource=config.server.num_rounds,
      reduction_factor=self.factor,
    )


@dataclasses.dataclass(frozen=True)
class Never(Pruner):
  """All trials run to their end."""

  def build(self, config: RunConfig) -> Any:
    return optuna().pruners.NopPruner()


PRUNERS: dict[str, type[Pruner]] = {
  'median': Median,
  'hyperband': Hyperband,
  'none': Never,
}


def optuna() -> Any:
  """The library.

  Raises:
    UserError: it is not installed.
  """
  try:
    import optuna as found
  except ImportError as error:
    raise UserError(
      f"a sweep needs Optuna ({error}): pip install 'fedmmr_jax[sweep]'"
    ) from None
  found.logging.set_verbosity(found.logging.WARNING)
  return found


def open_study(path: pathlib.Path, pruner: Any) -> Any:
  """The study that is kept in a file, made if there is none.

  Raises:
    UserError: it cannot be read.
  """
  lib = optuna()
  try:
    return lib.create_study(
      study_name='sweep',
      storage=f'sqlite:///{path}',
      direction='maximize',
      pruner=pruner,
      load_if_exists=True,
    )
  except Exception as error:  # of Optuna, SQLAlchemy, SQLite
    line = str(error).strip().splitlines()[0]
    raise UserError(f'{path}: cannot be opened ({line})') from None


def take_back(study: Any) -> list[int]:
  """Ends the trials that a process which is gone was in. Each is tried once
  more, from its beginning, unless it is such a second try.

  Args:
    study: that nobody else works on.

  Returns:
    Their numbers.
  """
  states = optuna().trial.TrialState
  found = study.get_trials(deepcopy=False, states=(states.RUNNING,))
  for trial in found:
    study.tell(trial.number, state=states.FAIL)
    if AGAIN not in trial.user_attrs:
      study.enqueue_trial(trial.params, user_attrs={AGAIN: trial.number})
  return [trial.number for trial in found]


def finished(study: Any) -> list[Any]:
  """The trials that are over: complete, pruned or refused."""
  states = optuna().trial.TrialState
  return study.get_trials(
    deepcopy=False, states=(states.COMPLETE, states.PRUNED)
  )


def _given_up(study: Any) -> list[Any]:
  """The second tries that were cut off as well; see `take_back`."""
  states = optuna().trial.TrialState
  found = study.get_trials(deepcopy=False, states=(states.FAIL,))
  return [trial for trial in found if AGAIN in trial.user_attrs]


def complete(study: Any) -> list[Any]:
  """The trials that have a value, best first."""
  states = optuna().trial.TrialState
  found = study.get_trials(deepcopy=False, states=(states.COMPLETE,))
  return sorted(found, key=lambda trial: (-trial.value, trial.number))


def importance(study: Any) -> dict[str, float]:
  """Name of what varies -> its share in which trials are among the best
  (PED-ANOVA, Watanabe et al. 2023), largest first; empty if there are too few
  trials, or if but one thing varies."""
  names = {name for trial in complete(study) for name in trial.params}
  if len(complete(study)) < _FEWEST_FOR_IMPORTANCE or len(names) < 2:
    return {}
  lib = optuna()
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # that it is experimental
    return lib.importance.get_param_importances(
      study, evaluator=lib.importance.PedAnovaImportanceEvaluator()
    )


class Trials:
  """Runs the trials of a study.

  Args:
    base: the settings of which the space varies some.
    space: what varies.
    objective: what trials are judged by.
    seeds: each trial is trained with all of them, side by side where their
      states fit, and judged by the mean.
    loaded: the data of `base`.
  """

  def __init__(
    self,
    base: RunConfig,
    space: Space,
    objective: Objective,
    seeds: Sequence[int],
    loaded: Loaded,
  ):
    self._base, self._space, self._objective = base, space, objective
    self._seeds, self._loaded = seeds, (_data_of(base), loaded)
    self._programs: set[Any] = set()

  def ask(self, study: Any) -> tuple[Any, dict[str, str]]:
    """The next trial and the settings that it changes."""
    # By the trials that are over, not by their numbers or the process: an
    # interrupted sweep suggests what an uninterrupted one would.
    over = len(finished(study)) + len(_given_up(study))
    study.sampler = optuna().samplers.TPESampler(
      seed=(self._base.seed + 7919 * over) % 2**32
    )
    trial = study.ask()
    changes = self._space.suggest(trial)
    trial.set_user_attr(CHANGES, changes)
    return trial, changes

  def run(
    self,
    study: Any,
    trial: Any,
    changes: Mapping[str, str],
    on_round: Callable[[int, Sequence[float]], None],
  ) -> None:
    """Trains a trial and tells the study.

    Args:
      study: whose trial it is.
      trial: from `ask`.
      changes: likewise.
      on_round: called with each finished round and its value for each seed, if
        it was validated.
    """
    lib = optuna()
    started = time.perf_counter()
    reported: set[int] = set()

    def after(number, validations):
      values = [self._objective.of_validation(found) for found in validations]
      on_round(number, values)
      # Seeds that run one after the other: the first decides about pruning.
      if values and number not in reported:
        reported.add(number)
        trial.report(statistics.mean(values), number)
        # A trial in its last round is trained: its value is worth having.
        if number < config.server.num_rounds and trial.should_prune():
          raise lib.TrialPruned

    value = None
    try:
      config = self._base.changed(changes).validate()
      simulations = self._simulations(config)
      *_, records = ablation.train_seeds(simulations, after)
      each = [self._objective.of_records(lines, config) for lines in records]
      value = statistics.mean(found for found, _ in each)
      trial.set_user_attr(ROUND, [number for _, number in each])
      trial.set_user_attr(OF_SEEDS, [found for found, _ in each])
    except lib.TrialPruned:
      pass
    except UserError as error:  # settings that do not fit, a diverged training
      trial.set_user_attr(REFUSED, str(error))
    trial.set_user_attr(SECONDS, time.perf_counter() - started)
    if value is None:
      study.tell(trial, state=lib.trial.TrialState.PRUNED)
    else:
      study.tell(trial, value)

  def _simulations(self, config: RunConfig) -> list[Simulation]:
    """One per seed."""
    if self._loaded[0] != _data_of(config):
      self._loaded = _data_of(config), load.load(config)
    loaded = self._loaded[1]
    built = simulation_lib.build(config, loaded.dataset, loaded.cold)
    if built.program not in self._programs:
      if len(self._programs) == _MOST_PROGRAMS:
        jax.clear_caches()
        gc.collect()
        self._programs.clear()
      self._programs.add(built.program)
    return [built.with_seed(seed) for seed in self._seeds]


def _data_of(config: RunConfig) -> Any:
  """What the data depends on."""
  further = set(config.model.expert_forms) - set(ORIGINAL_EXPERTS)
  return config.data, config.seed, further
