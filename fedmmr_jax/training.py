"""The host loop: rounds, validation, checkpoints, early stopping, the test."""

import resource
import statistics
import sys
import time
from typing import Any, Callable

import jax

from fedmmr_jax.checkpoint import Checkpoint, Progress, Rounds
from fedmmr_jax.errors import UserError
from fedmmr_jax.run_folder import RunFolder
from fedmmr_jax.simulation import Simulation

Record = dict[str, Any]  # one line of metrics.jsonl


def train(simulation: Simulation, run: RunFolder,
          on_round: Callable[[Record], None]) -> dict[str, Any]:
  """Trains to the end, from the last saved round if there is one.

  Args:
    simulation: what to train.
    run: an opened run folder; its metrics, checkpoints and summary are
      written.
    on_round: told each finished round's record.

  Returns:
    The content of `summary.json`.

  Raises:
    UserError: training diverged.
  """
  started = time.perf_counter()
  rounds = Rounds(run.path, create=True)
  checkpoint, last_round, wall_before = restore(simulation, run, rounds)
  config = simulation.config

  def wall_seconds() -> float:
    return wall_before + time.perf_counter() - started

  while (last_round < config.server.num_rounds
         and not out_of_patience(last_round, checkpoint.progress, config)):
    last_round += 1
    checkpoint, record = train_round(simulation, checkpoint, last_round)
    rounds.save(last_round, checkpoint, record, wall_seconds())
    run.append(record)
    on_round(record)

  # 0 if a continued run ends before its first validation.
  best_round = int(checkpoint.progress.best_round) or last_round
  best = rounds.load(best_round, checkpoint)
  summary = {
      split: simulation.evaluate(best.state, split)[0]
      for split in ('val', 'test')}
  rounds.close()
  summary |= describe(simulation, run.records(), best_round, wall_seconds())
  run.write_summary(summary)
  return summary


def restore(simulation: Simulation, run: RunFolder,
            rounds: Rounds) -> tuple[Checkpoint, int, float]:
  """(state, its round, seconds spent so far): the last saved, or the start."""
  start = Checkpoint(simulation.init_state(), Progress.start())
  saved = rounds.numbers()
  if not saved:
    run.rewind(None)
    return start, 0, 0.0
  metadata = rounds.metadata(saved[-1])
  checkpoint = rounds.load(saved[-1], start)
  run.rewind(metadata['record'])
  return checkpoint, saved[-1], metadata['wall_seconds']


def train_round(simulation: Simulation, checkpoint: Checkpoint,
                round_number: int) -> tuple[Checkpoint, Record]:
  """One round, with validation if it is due.

  Raises:
    UserError: the loss, or a score in validation, is not finite.
  """
  config = simulation.config
  start = time.perf_counter()
  cohort = simulation.sample_cohort(round_number)
  state, means = simulation.run_round(
      checkpoint.state, round_number, cohort)
  jax.block_until_ready(state)
  seconds = time.perf_counter() - start
  _check_finite(means, round_number)
  record = {'round': round_number, 'train': means}
  progress = checkpoint.progress
  if due(round_number, config):
    start = time.perf_counter()
    record['val'], _ = simulation.evaluate(state, 'val')
    record['evaluation_seconds'] = time.perf_counter() - start
    progress = progress.updated(
        round_number, record['val']['sampled']['HR@10'])
  record['targets'] = simulation.count_targets(cohort)
  record['seconds'] = seconds
  return Checkpoint(state, progress), record


def due(round_number: int, config) -> bool:
  """Is this round validated?"""
  return (round_number % config.evaluation.eval_every == 0
          or round_number == config.server.num_rounds)


def out_of_patience(last_round: int, progress: Progress, config) -> bool:
  """Has validation not improved for `patience` rounds?"""
  patience = config.evaluation.patience
  return bool(patience and progress.best_round
              and last_round - progress.best_round >= patience)


def describe(simulation: Simulation, records: list[Record], best_round: int,
             wall_seconds: float) -> dict[str, Any]:
  """The part of the summary that is not ranking metrics."""
  seconds = [r['seconds'] for r in records]
  return {
      'best_round': best_round,
      'rounds': len(records),
      'wall_seconds': wall_seconds,
      'round_seconds_median': statistics.median(seconds),
      'targets_per_second': statistics.median(
          r['targets'] / r['seconds'] for r in records),
      'peak_rss_mb': peak_rss_mb(),
      'num_clients': len(simulation.lengths),
      'num_items': simulation.model.num_rows - 1,
      'num_interactions': int(simulation.lengths.sum()),
      'backend': jax.default_backend(),
      'devices': [str(device) for device in jax.devices()],
  }


def peak_rss_mb() -> float:
  """Largest resident set of this process so far, in MB (10⁶ bytes)."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak * (1 if sys.platform == 'darwin' else 1024) / 1e6


def _check_finite(means: dict[str, float | None], round_number: int) -> None:
  for name, value in means.items():
    # NaN is the only value that differs from itself.
    if value is not None and (value != value or abs(value) == float('inf')):
      raise UserError(
          f'round {round_number}: {name} is {value}, the training diverged; '
          'lower --client_learning_rate or --server_learning_rate (the last '
          'good round is saved)')
