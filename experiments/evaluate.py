"""Evaluates one checkpoint of a run: any round, split and protocol.

    python -m experiments.evaluate --workdir=RUN --round=best --split=test
    python -m experiments.evaluate --workdir=RUN --compare=OTHER --slices \\
        --per_user=users.parquet

The run's own settings are used. If the data has moved, `--data_dir`,
`--visual_features` and `--text_features` name its new place; `--eval_clients`
ranks more or fewer clients. Protocols: fedmmr_jax/evaluation/user_results.py.
"""

import json
import pathlib
import sys
from typing import Any

from absl import flags

from experiments import app, console
from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax.data import users
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import user_results
from fedmmr_jax.evaluation.ranking import SPLITS
from fedmmr_jax.evaluation.user_results import PROTOCOLS, UserResults
from fedmmr_jax.runs import warm_start
from fedmmr_jax.runs.checkpoint import Rounds
from fedmmr_jax.simulation import NEW_CLIENTS

_ROUND = flags.DEFINE_string('round', 'best', 'a number, best or last')
_SPLIT = flags.DEFINE_enum(
  'split',
  'test',
  [*SPLITS, 'cold', NEW_CLIENTS],
  'held-out item to rank; cold needs a run with --cold_items; new_clients, the '
  'test items of clients that no round saw, one with --new_clients',
)
_PROTOCOL = flags.DEFINE_enum(
  'protocol',
  'all',
  ['all', *PROTOCOLS],
  'candidates to rank against; full: '
  'all; sampled, popularity: 100 unseen ones drawn uniformly or by '
  'popularity; corrected: full as estimated from sampled',
)
_METRICS = flags.DEFINE_string(
  'metrics',
  None,
  'ranking metrics beside HR, NDCG and MRR, with commas between; recbole: hit, '
  'recall, precision, mrr, map and ndcg as RecBole has them; or your own as '
  'my_package.module:Thing; default: as the run',
)
_SLICES = flags.DEFINE_boolean(
  'slices',
  False,
  'also by history length, by popularity of the target, and by whether the '
  'user had consumed it before',
)
_USER_FILE = flags.DEFINE_string(
  'user_file',
  '',
  'a file with what users are (users.dat, u.user, *.user, CSV, Parquet): '
  'slices by each of its columns, numbers with many values in quarters',
)
_PER_USER = flags.DEFINE_string(
  'per_user', '', 'write a row for each target into this .parquet or .csv file'
)
_COMPARE = flags.DEFINE_string(
  'compare',
  '',
  'another run (its best round) or RUN/rounds/N: differences '
  'paired over users, with 95 % bootstrap intervals',
)
_DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'folder of the data set, if it has moved'
)
_VISUAL = flags.DEFINE_string(
  'visual_features', None, 'the visual feature matrix, if it has moved'
)
_TEXT = flags.DEFINE_string(
  'text_features', None, 'the text feature matrix, if it has moved'
)
_CLIENTS = flags.DEFINE_integer(
  'eval_clients', None, 'rank so many clients (0 = all)'
)
_FEATURES = flags.DEFINE_enum(
  'features',
  'trained',
  ['trained', 'zeroed', 'shuffled'],
  'what the experts '
  "see of the items; zeroed: nothing, shuffled: each item has another's. "
  'Does the model look at them? The run of --compare keeps its own',
)
_JSON = flags.DEFINE_boolean('json', False, 'print JSON instead of tables')

# What the tables of slices and differences show.
_HEADLINES = (metrics_lib.HR, metrics_lib.NDCG)


def main() -> None:
  # Before minutes of ranking.
  if _PER_USER.value:
    user_results.check_path(_PER_USER.value)
  attributes = (
    users.read(pathlib.Path(_USER_FILE.value)) if _USER_FILE.value else {}
  )
  run = app.open_run()
  rounds = Rounds(run.path)
  number = app.find_round(rounds, _ROUND.value)
  other = warm_start.find(_COMPARE.value, 'compare') if _COMPARE.value else None
  config, results = _results(run, rounds, number, _FEATURES.value)
  told = {'round': number, _SPLIT.value: _chosen(results.means())}
  if _SLICES.value or attributes:
    told['slices'] = {
      title: {
        label: {'users': part.num_users} | _chosen(part.means())
        for label, part in parts.items()
      }
      for title, parts in user_results.slices(results, attributes).items()
    }
  if other:
    told['difference'] = _difference(config, results, *other)
  if _PER_USER.value:
    user_results.write(results, pathlib.Path(_PER_USER.value))
  if _JSON.value:
    print(json.dumps(told, indent=2, allow_nan=False))
  else:
    print(
      f'{run.path}, round {number}, {_SPLIT.value} items of '
      f'{results.num_users} users, features as {_FEATURES.value}'
      + (
        ''
        if results.num_users == len(results.users)
        else f'; {len(results.users)} targets, of a user with several the mean'
      )
      + '\n'
    )
    print(_tables(told))
  if _PER_USER.value:
    print(f'\na row for each target in {_PER_USER.value}', file=sys.stderr)


def _results(
  run, rounds, number, features: str, seed: int | None = None, **same: Any
) -> tuple[Any, UserResults]:
  """The settings of a run and the ranks of one of its rounds.

  Args:
    features: what the experts see, see `--features`.
    seed: of the draws of negatives, if not the run's own.
    same: settings that stand for the run's own.
  """
  given = same | {
    flag.name: flag.value
    for flag in (_DATA_DIR, _VISUAL, _TEXT, _CLIENTS, _METRICS)
    if flag.value is not None
  }
  loaded, simulation, state = app.load_round(run, rounds, number, given)
  print(console.data_report(loaded) + '\n', file=sys.stderr)
  if _SPLIT.value not in simulation.splits:
    needed = {'cold': '--cold_items', NEW_CLIENTS: '--new_clients'}
    raise UserError(
      f'{run.path}: --split={_SPLIT.value} needs a run with '
      f'{needed[_SPLIT.value]}'
    )
  if seed is not None:
    simulation = simulation.with_seed(seed)
  simulation = simulation.with_popular_negatives()
  if features != 'trained':
    simulation = simulation.with_features(features)
  return simulation.config, user_results.evaluate(
    simulation, state, _SPLIT.value
  )


def _difference(config, results, run, number) -> dict[str, Any]:
  """This run minus the other, which is ranked against the same draws."""
  _, theirs = _results(
    run,
    Rounds(run.path),
    number,
    'trained',
    config.seed,
    sampled_negatives=config.data.sampled_negatives,
    eval_clients=config.evaluation.eval_clients,
    metrics=config.evaluation.metrics,
  )
  found = _chosen(user_results.difference(results, theirs))
  as_trained = '' if _FEATURES.value == 'trained' else ', features as trained'
  return {'to': f'{run.path}, round {number}{as_trained}'} | {
    protocol: {
      name: difference._asdict() for name, difference in by_metric.items()
    }
    for protocol, by_metric in found.items()
  }


def _chosen(by_protocol: dict[str, Any]) -> dict[str, Any]:
  """Of all protocols those that are asked for."""
  if _PROTOCOL.value == 'all':
    return by_protocol
  return {_PROTOCOL.value: by_protocol[_PROTOCOL.value]}


def _tables(told: dict[str, Any]) -> str:
  parts = [console.ranking_table({_SPLIT.value: told[_SPLIT.value]})]
  for title, by_label in told.get('slices', {}).items():
    columns = [
      (protocol, metric)
      for protocol, found in told[_SPLIT.value].items()
      for metric in found
      if _is_shown(metric)
      and (protocol != 'corrected' or _PROTOCOL.value != 'all')
    ]
    parts.append(
      console.table(
        [
          title,
          'users',
          *(f'{metric} {protocol}' for protocol, metric in columns),
        ],
        [
          [
            label,
            part['users'],
            *(f'{part[protocol][metric]:.4f}' for protocol, metric in columns),
          ]
          for label, part in by_label.items()
        ],
      )
    )
  if 'difference' in told:
    to, *by_protocol = told['difference'].items()
    parts.append(
      f'difference to {to[1]}, paired over users, 95 % intervals\n\n'
      + console.table(
        ['', 'difference', 'from', 'to'],
        [
          [
            f'{protocol}, {metric}',
            *(f'{found[metric][key]:+.4f}' for key in ('mean', 'low', 'high')),
          ]
          for protocol, found in by_protocol
          for metric in found
          if metric == metrics_lib.MRR or _is_shown(metric)
        ],
      )
    )
  return '\n\n'.join(parts)


def _is_shown(metric: str) -> bool:
  """In tables of slices and differences: further metrics at 10 only."""
  return metric in _HEADLINES or (
    metric not in metrics_lib.RANKING
    and ('@' not in metric or metric.endswith('@10'))
  )


def cli() -> None:
  app.run(main)


if __name__ == '__main__':
  cli()
