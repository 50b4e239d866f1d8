"""Evaluates one checkpoint of a run: any round, split and protocol.

    python -m experiments.evaluate --workdir=RUN --round=best --split=test

The run's own settings are used; `--data_dir`, `--visual_features` and
`--text_features` may name the places where the data lies now, `--eval_clients`
ranks more or fewer clients, and `--warm_memory` fills the memories of clients
that were never sampled.
"""

import json
import sys

from absl import flags

from experiments import app
from experiments import console
from fedmmr_jax.checkpoint import Rounds
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import SPLITS

_ROUND = flags.DEFINE_string('round', 'best', 'a number, best or last')
_SPLIT = flags.DEFINE_enum('split', 'test', [*SPLITS, 'cold'], 'held-out item to rank; cold '
    'needs a run with --cold_items')
_PROTOCOL = flags.DEFINE_enum(
    'protocol', 'both', ['both', 'sampled', 'full'], 'candidates to rank '
    'against')
_DATA_DIR = flags.DEFINE_string(
    'data_dir', None, 'folder of the data set, if it has moved')
_VISUAL = flags.DEFINE_string(
    'visual_features', None, 'the visual feature matrix, if it has moved')
_TEXT = flags.DEFINE_string(
    'text_features', None, 'the text feature matrix, if it has moved')
_CLIENTS = flags.DEFINE_integer(
    'eval_clients', None, 'rank so many clients (0 = all)')
_FEATURES = flags.DEFINE_enum(
    'features', 'trained', ['trained', 'zeroed', 'shuffled'], 'what the experts '
    'see of the items; zeroed: nothing, shuffled: each item has another\'s. '
    'Does the model look at them?')
_JSON = flags.DEFINE_boolean('json', False, 'print JSON instead of a table')
_WARM_MEMORY = flags.DEFINE_boolean(
    'warm_memory', None, 'fill the memories of clients that were never '
    'sampled; default: as the run')


def main() -> None:
  run = app.open_run()
  rounds = Rounds(run.path)
  number = app.find_round(rounds, _ROUND.value)
  given = {flag.name: flag.value
           for flag in (_DATA_DIR, _VISUAL, _TEXT, _WARM_MEMORY, _CLIENTS)
           if flag.value is not None}
  loaded, simulation, state = app.load_round(run, rounds, number, given)
  print(console.data_report(loaded) + '\n', file=sys.stderr)
  if _SPLIT.value not in simulation.splits:
    raise UserError(f'{run.path}: --split=cold needs a run with --cold_items')
  if _FEATURES.value != 'trained':
    simulation = simulation.with_features(_FEATURES.value)
  metrics, _ = simulation.evaluate(state, _SPLIT.value)
  if _PROTOCOL.value != 'both':
    metrics = {_PROTOCOL.value: metrics[_PROTOCOL.value]}
  if _JSON.value:
    print(json.dumps({'round': number, _SPLIT.value: metrics}, indent=2,
                     allow_nan=False))
  else:
    print(f'{run.path}, round {number}, features as {_FEATURES.value}\n')
    print(console.ranking_table({_SPLIT.value: metrics}))


if __name__ == '__main__':
  app.run(main)
