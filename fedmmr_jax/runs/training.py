"""The host loop: rounds, validation, checkpoints, early stopping, the test."""

import resource
import statistics
import sys
import time
from typing import Any, Callable, cast, Iterable, Sequence

import jax
import numpy as np

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax.config import ContentPlusId, ORIGINAL_EXPERTS, RunConfig
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import ranking, user_results
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.federation.communication import Traffic
from fedmmr_jax.federation.privacy import Plan
from fedmmr_jax.federation.round import FederationState
from fedmmr_jax.runs import acceptance
from fedmmr_jax.runs.checkpoint import Checkpoint, Progress, Rounds, Saver
from fedmmr_jax.runs.loggers import Logger, Started
from fedmmr_jax.runs.run_folder import RunFolder
from fedmmr_jax.simulation import Round, Simulation

Record = dict[str, Any]  # one line of metrics.jsonl


def train(
  simulation: Simulation,
  run: RunFolder,
  on_round: Callable[[Record], None],
  on_step: Callable[[str], None] = lambda step: None,
  loggers: Sequence[Logger] = (),
) -> dict[str, Any]:
  """Trains to the end, from the last saved round if there is one.

  Args:
    simulation: what to train.
    run: a run folder after `run.start`; its metrics, checkpoints and summary
      are written.
    on_round: called with each finished round's record.
    on_step: called with what comes next, as in 'training round 3'.
    loggers: where else each round and the summary go; one that fails in
      between is left out with a warning.

  Returns:
    The content of `summary.json`.

  Raises:
    UserError: training diverged, or a logger cannot start.
    ValueError: the run folder is not started.
  """
  if not run.is_started:
    raise ValueError(
      f'{run.path}: call run.start(config, dataset) first, it '
      'writes config.json and keeps other processes out'
    )
  started = time.perf_counter()
  rounds = Rounds(run.path, create=True)
  rounds.clear_leftovers()
  checkpoint, last_round, wall_before = restore(simulation, run, rounds)
  config = simulation.config
  if isinstance(config.model.item_embedding, ContentPlusId):
    run.keep_content(np.asarray(simulation.catalogue.content))

  def wall_seconds() -> float:
    return wall_before + time.perf_counter() - started

  saving_seconds = 0.0
  with Started(loggers, run.path, run.told()) as log:
    for record in run.records():  # of earlier processes
      log.log(record)
    # Leaving it, by an exception too, waits for the last round to be on disk.
    with Saver(rounds, config.keep) as saver:
      for done in _rounds_left(simulation, checkpoint, last_round, on_step):
        run.remove_results()  # of an earlier, shorter run
        checkpoint, record = validated(
          simulation, done, checkpoint.progress, on_step
        )
        record['saving_seconds'] = saving_seconds
        on_step(f'saving round {done.number}')
        start = time.perf_counter()
        saver.save(done.number, checkpoint, record, wall_seconds())
        saving_seconds = time.perf_counter() - start
        run.append(record)
        log.log(record)
        on_round(record)
        if out_of_patience(done.number, checkpoint.progress, config):
          break
        on_step(f'training round {done.number + 1}')

    best_round = rounds.best()
    on_step(f'testing round {best_round}')
    summary = test(simulation, rounds.load(best_round, checkpoint).state)
    records = run.records()
    if simulation.privacy:
      # All rounds count, whichever is tested.
      summary['privacy'] = simulation.privacy.told(len(records)) | {
        'clip_norm': records[-1]['privacy']['clip_norm']
      }
    summary |= describe(simulation, records, best_round, wall_seconds())
    summary['acceptance'] = acceptance.judge(
      config, records, summary['test'], run.integrity()
    )
    run.write_summary(summary)
    log.finish(summary)
  return summary


def restore(
  simulation: Simulation, run: RunFolder, rounds: Rounds
) -> tuple[Checkpoint, int, float]:
  """(state, its round, seconds spent so far): the last saved or the initial."""
  if not rounds.numbers():
    # The line of round 1 may be there before the round is.
    if len(run.records()) > 1:
      raise UserError(
        f'{run.path}: there are metrics but no saved round to continue from; '
        'train in another folder'
      )
    run.rewind(None)
    return Checkpoint(simulation.init_state(), Progress.start()), 0, 0.0
  last = rounds.last()
  metadata = rounds.metadata(last)
  checkpoint = rounds.load(last, structure(simulation))
  run.rewind(metadata['record'])
  return checkpoint, last, metadata['wall_seconds']


def structure(simulation: Simulation, with_controls: bool = True) -> Checkpoint:
  """Shapes and types of what is saved.

  Args:
    simulation: of the run.
    with_controls: whether clients' drift-control state is; over a network it
      stays with them.
  """
  state = simulation.abstract_state
  return Checkpoint(
    state if with_controls else state._replace(controls=None),
    jax.eval_shape(Progress.start),
  )


def _rounds_left(
  simulation: Simulation,
  checkpoint: Checkpoint,
  last_round: int,
  on_step: Callable[[str], None],
) -> Iterable[Round]:
  if out_of_patience(last_round, checkpoint.progress, simulation.config):
    return ()
  on_step(f'training round {last_round + 1}')
  return simulation.rounds(checkpoint.state, last_round + 1)


# The outside contract has these in each line, null in a run without the expert.
ABSENT = {
  family + name: None
  for family in (metrics_lib.ROUTER_WEIGHT, metrics_lib.GRADIENT)
  for name in ORIGINAL_EXPERTS
}


def validated(
  simulation: Simulation,
  done: Round,
  progress: Progress,
  on_step: Callable[[str], None],
) -> tuple[Checkpoint, Record]:
  """The part of a round that is saved, with its validation if that is due.

  Raises:
    UserError: a score is not finite.
  """
  record: Record = {'round': done.number, 'train': ABSENT | done.metrics}
  if due(done.number, simulation.config):
    on_step(f'validating round {done.number}')
    start = time.perf_counter()
    record['val'] = simulation.validate(done.state)
    record['evaluation_seconds'] = time.perf_counter() - start
    progress = progress.updated(
      done.number,
      selection_value(record['val'], done.number, simulation.config),
    )
  if simulation.privacy:
    # What a cohort trained on is nobody's business.
    record['privacy'] = spent(simulation, done)
  record['targets'] = (
    None
    if simulation.privacy
    else simulation.count_targets(done.cohort, done.work)
  )
  record['communication'] = traffic(
    simulation, done.number, done.cohort, done.metrics
  )._asdict()
  least = simulation.config.federation.min_answers
  answered: Any = done.metrics.get(metrics_lib.ANSWERED, least)
  if answered < least:
    record['skipped'] = True
  record['masked_fraction'] = (
    None
    if simulation.privacy
    else round_lib.masked_fraction(
      done.cohort, simulation.num_train, simulation.config
    )
  )
  record['seconds'] = done.seconds
  return Checkpoint(done.state, progress), record


def spent(simulation: Simulation, done: Round) -> dict[str, Any]:
  """A record's 'privacy': ε so far, None without noise; the bound on a whole
  update for the next round; whether both are of an assumed cohort."""
  plan = cast(Plan, simulation.privacy)
  return {
    'epsilon': plan.epsilon(done.number),
    'clip_norm': plan.clip_norm(done.state.server),
    'assumed': plan.is_assumed,
  }


def traffic(
  simulation: Simulation,
  round_number: int,
  cohort: np.ndarray,
  train: dict[str, Any],
) -> Traffic:
  """What a round cost, the first with the sketch before it.

  Args:
    simulation: what was trained.
    round_number: 1-based.
    cohort: of the round.
    train: its training metrics.
  """
  cost = simulation.traffic(cohort, train)
  return cost + simulation.sketch_traffic() if round_number == 1 else cost


def selection_value(
  found: dict[str, dict[str, float]], round_number: int, config: RunConfig
) -> float:
  """What a validated round is chosen by; the largest is the best.

  Args:
    found: protocol -> metric -> value.
    round_number: what counts if the last round is to be tested.
    config: its `select_by`.
  """
  selection = config.evaluation.selection
  if selection is None:
    return round_number
  protocol, metric = selection
  return found[protocol][metric]


def due(round_number: int, config: RunConfig) -> bool:
  """Whether this round is validated."""
  return (
    round_number % config.evaluation.eval_every == 0
    or round_number == config.server.num_rounds
  )


def test(simulation: Simulation, state: FederationState) -> dict[str, Any]:
  """The ranking metrics of the summary, for a given state."""
  metrics: dict[str, Any] = {}
  for split in simulation.splits:
    metrics[split], ranks = simulation.evaluate(state, split)
    if split == 'test':
      clients, _ = simulation.targets(split)
      metrics['test_by_history'] = {
        bounds: {'users': len(np.unique(clients[chosen]))}
        | ranking.metrics_of(
          jax.tree.map(lambda x: x[chosen], ranks),
          simulation.metrics,
          clients[chosen],
        )
        for bounds, chosen in user_results.by_history(
          simulation.num_train[clients]
        )
      }
  if simulation.cold:
    metrics['cold_popularity'] = ranking.metrics_of(
      simulation.rank_by_popularity('cold'), simulation.metrics
    )
  return metrics


def out_of_patience(
  last_round: int, progress: Progress, config: RunConfig
) -> bool:
  """Whether a validation was `patience` or more rounds after the best."""
  patience = config.evaluation.patience
  return bool(
    patience
    and progress.best_round
    and due(last_round, config)
    and last_round - progress.best_round >= patience
  )


def describe(
  simulation: Simulation,
  records: list[Record],
  best_round: int,
  wall_seconds: float,
) -> dict[str, Any]:
  """The rest of the summary, without ranking metrics."""
  seconds = [r['seconds'] for r in records]
  return {
    'best_round': best_round,
    'rounds': len(records),
    'wall_seconds': wall_seconds,
    'round_seconds_median': statistics.median(seconds),
    'targets_per_second': None
    if simulation.privacy
    else statistics.median(r['targets'] / r['seconds'] for r in records),
    'peak_rss_mb': peak_rss_mb(),
    'num_clients': simulation.dataset.num_clients,
    'num_items': simulation.model.num_rows - 1,
    'num_interactions': len(simulation.dataset.items),
    'backend': jax.default_backend(),
    'devices': sorted(map(str, simulation.data.items.devices())),
  }


def peak_rss_mb() -> float:
  """Largest resident set of this process so far, in MB (10⁶ bytes)."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak * (1 if sys.platform == 'darwin' else 1024) / 1e6
