"""Evaluates one checkpoint of a run: any round, split and protocol.

    python -m experiments.evaluate --workdir=RUN --round=best --split=test

The run's own settings are used; `--data_dir` may name the place where the
data lies now, and `--warm_memory` fills the memories of clients that were
never sampled.
"""

import dataclasses
import json

from absl import flags

from experiments import app
from experiments import console
from experiments.inspect_checkpoint import find_round
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.checkpoint import Checkpoint, Progress, Rounds
from fedmmr_jax.data import load
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import SPLITS
from fedmmr_jax.run_folder import RunFolder

_ROUND = flags.DEFINE_string('round', 'best', 'a number, best or last')
_SPLIT = flags.DEFINE_enum('split', 'test', [*SPLITS], 'held-out item to rank')
_PROTOCOL = flags.DEFINE_enum(
    'protocol', 'both', ['both', 'sampled', 'full'], 'candidates to rank '
    'against')
_DATA_DIR = flags.DEFINE_string(
    'data_dir', None, 'folder of the data set, if it has moved')
_WARM_MEMORY = flags.DEFINE_boolean(
    'warm_memory', None, 'fill the memories of clients that were never '
    'sampled; default: as the run')


def main() -> None:
  workdir = flags.FLAGS.workdir
  if not workdir:
    raise UserError('name a run folder with --workdir')
  run = RunFolder(workdir)
  rounds = Rounds(run.path)
  number = find_round(run, rounds, _ROUND.value)
  config = run.config()
  if _DATA_DIR.value is not None:
    config = dataclasses.replace(config, data=dataclasses.replace(
        config.data, data_dir=_DATA_DIR.value))
  if _WARM_MEMORY.value is not None:
    config = dataclasses.replace(config, memory=dataclasses.replace(
        config.memory, warm_memory=_WARM_MEMORY.value))
  dataset = load.load(config.data, config.seed).dataset
  run.check_data(dataset)
  simulation = simulation_lib.build(config, dataset)
  like = Checkpoint(simulation.init_state(), Progress.start())
  state = rounds.load(number, like).state
  metrics, _ = simulation.evaluate(state, _SPLIT.value)
  if _PROTOCOL.value != 'both':
    metrics = {_PROTOCOL.value: metrics[_PROTOCOL.value]}
  if flags.FLAGS.json:
    print(json.dumps({'round': number, _SPLIT.value: metrics}, indent=2,
                     allow_nan=False))
  else:
    print(f'{run.path}, round {number}\n')
    print(console.ranking_table({_SPLIT.value: metrics}))


if __name__ == '__main__':
  app.run(main)
