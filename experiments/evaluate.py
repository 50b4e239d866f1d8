"""Evaluates one checkpoint of a run: any round, split and protocol.

    python -m experiments.evaluate --workdir=RUN --round=best --split=test
    python -m experiments.evaluate --workdir=RUN --compare=OTHER --slices \\
        --per_user=users.parquet
    python -m experiments.evaluate --workdir=RUN --beyond --fairness --at=10,50

The run's own settings are used. If the data has moved, `--data_dir`,
`--visual_features` and `--text_features` name its new place; `--eval_clients`
ranks more or fewer clients. Protocols: fedmmr_jax/evaluation/user_results.py.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any, NamedTuple, Sequence

from absl import flags

from experiments import app, beyond, console
from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax.data import users
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import beyond_accuracy, user_results
from fedmmr_jax.evaluation.ranking import SPLITS
from fedmmr_jax.evaluation.user_results import PROTOCOLS, UserResults
from fedmmr_jax.federation.round import FederationState
from fedmmr_jax.runs import warm_start
from fedmmr_jax.runs.checkpoint import Rounds
from fedmmr_jax.simulation import NEW_CLIENTS, Simulation

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
_AT = flags.DEFINE_list(
  'at',
  None,
  'cut-offs of HR and NDCG, of the metrics of RecBole, and of the lists of '
  '--beyond, as 1,5,10,50; default: 5, 10 and 20, and lists of 10',
)
_BEYOND = flags.DEFINE_boolean(
  'beyond',
  False,
  'also what the lists are beside accurate: coverage, Gini index, novelty, '
  'diversity, popularity bias, calibration of genres, with intervals',
)
_FAIRNESS = flags.DEFINE_boolean(
  'fairness',
  False,
  'all metrics of groups of users by history length and by the columns of '
  '--user_file, and how far the groups are apart; ranked in full unless '
  '--protocol names another',
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
_FINE_TUNE = flags.DEFINE_integer(
  'fine_tune',
  0,
  'also the ranks after each client has trained the model on its own training '
  'items for so many epochs, with the difference to it without',
  lower_bound=0,
)
_FINE_TUNE_RATE = flags.DEFINE_float(
  'fine_tune_rate',
  None,
  "learning rate of --fine_tune; default: the run's --client_learning_rate",
  lower_bound=0,
)
_JSON = flags.DEFINE_boolean('json', False, 'print JSON instead of tables')


def main() -> None:
  # Before minutes of ranking.
  if _PER_USER.value:
    user_results.check_path(_PER_USER.value)
  _check_flags()
  at = None if _AT.value is None else metrics_lib.parse_cutoffs(_AT.value)
  attributes = (
    users.read(pathlib.Path(_USER_FILE.value)) if _USER_FILE.value else {}
  )
  run = app.open_run()
  rounds = Rounds(run.path)
  number = app.find_round(rounds, _ROUND.value)
  other = warm_start.find(_COMPARE.value, 'compare') if _COMPARE.value else None
  ranked = _ranked(run, rounds, number, _FEATURES.value, at)
  results = ranked.results
  told = {'round': number, _SPLIT.value: _chosen(results.means())}
  if _SLICES.value or attributes:
    told['slices'] = {
      title: {
        label: {'users': part.num_users} | _chosen(part.means())
        for label, part in parts.items()
      }
      for title, parts in user_results.slices(results, attributes).items()
    }
  theirs = _other(ranked, *other, at) if other else None
  if theirs:
    told['difference'] = _difference(results, theirs.results, *other)
  if _FINE_TUNE.value:
    _tell_of_fine_tuning(told, ranked)
  lists = _tell_of_lists(told, ranked, theirs, at, attributes)
  if _PER_USER.value:
    user_results.write(results, pathlib.Path(_PER_USER.value), lists)
  if _JSON.value:
    print(json.dumps(beyond.as_json(told), indent=2, allow_nan=False))
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
    print(_tables(told, results.cutoffs))
  if _PER_USER.value:
    print(f'\na row for each target in {_PER_USER.value}', file=sys.stderr)


class _Ranked(NamedTuple):
  """A round of a run, and its ranks."""

  simulation: Simulation
  state: FederationState
  results: UserResults

  def offers(
    self, protocols: Sequence[str], cutoffs: tuple[int, ...]
  ) -> beyond.Offers:
    """Its lists."""
    return beyond.offers(
      self.simulation, self.state, _SPLIT.value, protocols, cutoffs
    )


def _check_flags() -> None:
  """Refuses flags that contradict one another, before anything is read."""
  if _FINE_TUNE.value and _SPLIT.value == 'cold':
    raise UserError(
      '--fine_tune: --split=cold ranks items that are in no training data; say '
      'test, val or new_clients'
    )
  if _FINE_TUNE_RATE.value is not None and not _FINE_TUNE.value:
    raise UserError('--fine_tune_rate needs --fine_tune, the number of epochs')
  if not (_BEYOND.value or _FAIRNESS.value):
    return
  asked = '--beyond' if _BEYOND.value else '--fairness'
  if _PROTOCOL.value not in ('all', *beyond_accuracy.PROTOCOLS):
    raise UserError(
      f'{asked}: --protocol={_PROTOCOL.value} estimates a metric and has no '
      'lists; one of ' + ', '.join(beyond_accuracy.PROTOCOLS)
    )
  if _SPLIT.value == 'cold':
    raise UserError(
      f'{asked}: --split=cold ranks new items one at a time, among the others, '
      'so that there are no lists of them'
    )


def _ranked(
  run,
  rounds,
  number,
  features: str,
  at: tuple[int, ...] | None,
  seed: int | None = None,
  **same: Any,
) -> _Ranked:
  """One of a run's rounds with the ranks of the split.

  Args:
    features: what the experts see, see `--features`.
    at: cut-offs; None = the usual ones.
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
  if at:
    metrics_lib.check_cutoffs(at, loaded.dataset.num_items)
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
  results = user_results.evaluate(simulation, state, _SPLIT.value)
  return _Ranked(simulation, state, results.at(at) if at else results)


def _other(mine: _Ranked, run, number, at) -> _Ranked:
  """The run of --compare, ranked against the same draws."""
  config = mine.simulation.config
  return _ranked(
    run,
    Rounds(run.path),
    number,
    'trained',
    at,
    config.seed,
    sampled_negatives=config.data.sampled_negatives,
    eval_clients=config.evaluation.eval_clients,
    metrics=config.evaluation.metrics,
  )


def _difference(results, theirs, run, number) -> dict[str, Any]:
  """This run minus the other."""
  found = _chosen(user_results.difference(results, theirs))
  as_trained = '' if _FEATURES.value == 'trained' else ', features as trained'
  return {'to': f'{run.path}, round {number}{as_trained}'} | {
    protocol: {
      name: difference._asdict() for name, difference in by_metric.items()
    }
    for protocol, by_metric in found.items()
  }


def _tell_of_fine_tuning(told: dict[str, Any], mine: _Ranked) -> None:
  """Adds what --fine_tune asks for."""
  client = mine.simulation.config.client
  rate = _FINE_TUNE_RATE.value
  how = dataclasses.replace(
    client,
    local_epochs=_FINE_TUNE.value,
    client_learning_rate=client.client_learning_rate if rate is None else rate,
  )
  split = _SPLIT.value
  ranks = mine.simulation.rank_fine_tuned(mine.state, how, [split])[split]
  tuned = user_results.of_ranks(mine.simulation, ranks, split)._replace(
    metrics=mine.results.metrics, cutoffs=mine.results.cutoffs
  )
  told['fine_tuned'] = {
    'epochs': how.local_epochs,
    'learning_rate': how.client_learning_rate,
    split: _chosen(tuned.means()),
    'difference': {
      protocol: {name: d._asdict() for name, d in by_metric.items()}
      for protocol, by_metric in _chosen(
        user_results.difference(tuned, mine.results)
      ).items()
    },
  }


def _tell_of_lists(
  told: dict[str, Any], mine: _Ranked, theirs: _Ranked | None, at, attributes
) -> dict[str, Any]:
  """Adds what --beyond and --fairness ask for.

  Returns:
    What is of each user, for --per_user.
  """
  if not (_BEYOND.value or _FAIRNESS.value):
    return {}
  k = metrics_lib.headline_cutoff(mine.results.cutoffs)
  lengths = at or (k,)
  protocols = beyond_accuracy.PROTOCOLS
  protocol = 'full'  # of --fairness
  if _PROTOCOL.value != 'all':
    protocols = (protocol,) = (_PROTOCOL.value,)
  elif not _BEYOND.value:
    protocols = (protocol,)
  found = mine.offers(protocols, lengths)
  if _BEYOND.value:
    told['beyond'] = beyond.figures(found)
    if theirs:
      told['beyond_difference'] = beyond.differences(
        found, theirs.offers(protocols, lengths)
      )
  if _FAIRNESS.value:
    told['fairness'] = {'protocol': protocol} | beyond.fairness(
      found.of_each[protocol][k],
      protocol,
      k,
      mine.results,
      attributes,
      mine.simulation.num_train[found.asked.clients],
    )
  told['left_out'] = beyond.left_out(found.asked)
  return beyond.of_each_user(found)


def _chosen(by_protocol: dict[str, Any]) -> dict[str, Any]:
  """Of all protocols those that are asked for."""
  if _PROTOCOL.value == 'all':
    return by_protocol
  return {_PROTOCOL.value: by_protocol[_PROTOCOL.value]}


def _tables(told: dict[str, Any], cutoffs: tuple[int, ...]) -> str:
  k = metrics_lib.headline_cutoff(cutoffs)
  parts = [console.ranking_table({_SPLIT.value: told[_SPLIT.value]}, k)]
  for title, by_label in told.get('slices', {}).items():
    columns = [
      (protocol, metric)
      for protocol, found in told[_SPLIT.value].items()
      for metric in found
      if _is_shown(metric, k)
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
  if 'fine_tuned' in told:
    tuned = told['fine_tuned']
    split = _SPLIT.value
    parts += [
      f'fine-tuned by each client for {tuned["epochs"]} '
      f'epoch{"s"[: tuned["epochs"] > 1]} at {tuned["learning_rate"]:g}\n\n'
      + console.ranking_table({split: tuned[split]}, k),
      _difference_table('the model without', tuned['difference'].items(), k),
    ]
  if 'difference' in told:
    to, *by_protocol = told['difference'].items()
    parts.append(_difference_table(to[1], by_protocol, k))
  if 'beyond' in told:
    parts.append(
      'the lists, with 95 % intervals\n\n' + beyond.table(told['beyond'])
    )
  if 'beyond_difference' in told:
    parts.append(
      f'their difference to {told["difference"]["to"]}, paired over users\n\n'
      + beyond.table(told['beyond_difference'])
    )
  if 'fairness' in told:
    protocol, *by_title = told['fairness'].items()
    parts += [
      f'groups of users, {protocol[1]}, with 95 % intervals\n\n'
      + beyond.fairness_table(title, found)
      for title, found in by_title
    ]
  return '\n\n'.join([*parts, '\n'.join(told.get('left_out', []))]).rstrip()


def _difference_table(to: str, by_protocol, k: int) -> str:
  """Differences, (protocol, metric -> mean, low, high) each."""
  return f'difference to {to}, paired over users, 95 % intervals\n\n' + (
    console.table(
      ['', 'difference', 'from', 'to'],
      [
        [
          f'{protocol}, {metric}',
          *(f'{found[metric][key]:+.4f}' for key in ('mean', 'low', 'high')),
        ]
        for protocol, found in by_protocol
        for metric in found
        if metric == metrics_lib.MRR or _is_shown(metric, k)
      ],
    )
  )


def _is_shown(metric: str, k: int) -> bool:
  """In tables of slices and differences: everything at one cut-off only."""
  return metric != metrics_lib.MRR and (
    '@' not in metric or metric.endswith(f'@{k}')
  )


def cli() -> None:
  app.run(main)


if __name__ == '__main__':
  cli()
