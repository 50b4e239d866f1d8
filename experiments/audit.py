"""Checks a run for leaks: tests its own sampler, windows and rounds, and runs a
canary that reacts to a leak; attacks a run with `privacy`
(fedmmr_jax/evaluation/privacy_audit.py).

    python -m experiments.audit --workdir=RUN
    python -m experiments.audit --flagfile=experiments/presets/paper.flags \\
        --data_dir=path/to/ml-1m

Takes the flags of experiments.train, or a run's own settings.
fedmmr_jax/evaluation/audit.py describes each check. Exit status 1 if one fails.
"""

import json
import sys
from typing import Any

import numpy as np
from absl import flags

from experiments import app, console
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.data import load
from fedmmr_jax.evaluation import audit, privacy_audit, ranking
from fedmmr_jax.evaluation.audit import Trained
from fedmmr_jax.evaluation.ranking import Ranks
from fedmmr_jax.metrics import FULL, HR, NDCG, SAMPLED
from fedmmr_jax.runs.run_folder import RunFolder

_ROUNDS = flags.DEFINE_integer(
  'rounds',
  10,
  'rounds that the run is trained with and without the leak; 0 leaves that out',
  lower_bound=0,
)
_CANARIES = flags.DEFINE_integer(
  'canaries',
  200,
  'clients that train alone (0 = all); and, of a private run, whose place '
  'canaries take',
  lower_bound=0,
)
_JSON = flags.DEFINE_boolean('json', False, 'print JSON instead of tables')
app.define_config_flags()

FOUND_A_LEAK = 1


def main() -> None:
  before = None
  if app.WORKDIR.value:
    before = app.open_run().flags()
  config = app.config_from_flags(before)
  loaded = load.load(config)
  if app.WORKDIR.value:
    RunFolder(app.WORKDIR.value).check_data(loaded.dataset)
  print(console.data_report(loaded) + '\n', file=sys.stderr)
  simulation = simulation_lib.build(config, loaded.dataset, loaded.cold)
  checks = audit.all_checks(simulation.with_popular_negatives())
  song, alone = audit.canary(simulation.with_clients(_CANARIES.value))
  checks.append(song)
  attacked = None
  if (
    _ROUNDS.value
    and simulation.privacy
    and (simulation.privacy.noise_multiplier)
  ):
    attacked = privacy_audit.attack(
      privacy_audit.prepared(simulation), _CANARIES.value or 200, _ROUNDS.value
    )
    checks.append(privacy_audit.check(attacked))
  figures = {'alone': alone}
  if _ROUNDS.value:
    figures[f'{_ROUNDS.value} rounds'] = audit.federated(
      simulation, _ROUNDS.value
    )
  if _JSON.value:
    print(
      json.dumps(
        {
          'checks': [check._asdict() for check in checks],
          'privacy': attacked and attacked._asdict(),
          'test': {
            name: {
              kind: ranking.metrics_of(ranks, clients=trained.clients)
              for kind, ranks in _kinds(trained)
            }
            for name, trained in figures.items()
          },
        },
        indent=2,
        allow_nan=False,
      )
    )
  else:
    print('\n'.join(map(_line, checks)))
    print(
      '\n'
      + console.table(
        ['test item', 'users', 'negatives', *_COLUMNS], _rows(figures)
      )
    )
  if not all(check.passed for check in checks):
    sys.exit(FOUND_A_LEAK)


_COLUMNS = {
  f'{metric} {protocol}': (protocol, metric)
  for protocol, metric in ((SAMPLED, HR), (FULL, HR), (FULL, NDCG))
}


def _kinds(trained: Trained) -> list[tuple[str, Ranks]]:
  return list(zip(trained._fields[:3], trained[:3]))


def _line(check: audit.Check) -> str:
  return f'{"clean" if check.passed else "LEAK "}  {check.name}: {check.found}'


def _rows(figures: dict[str, Trained]) -> list[list[Any]]:
  rows = []
  for name, trained in figures.items():
    for kind, ranks in _kinds(trained):
      found = ranking.metrics_of(ranks, clients=trained.clients)
      rows.append(
        [
          'popularity' if kind == 'popularity' else name,
          len(np.unique(trained.clients)),
          '' if kind == 'popularity' else kind,
          *(
            f'{found[protocol][metric]:.4f}'
            for protocol, metric in _COLUMNS.values()
          ),
        ]
      )
  return rows


def cli() -> None:
  app.run(main)


if __name__ == '__main__':
  cli()
