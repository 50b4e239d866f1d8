"""Recommends items to all users of a run, to some, or to people it never saw.

    python -m experiments.recommend --workdir=RUN --output=lists.parquet
    python -m experiments.recommend --workdir=RUN --user=17 --why
    python -m experiments.recommend --workdir=RUN --histories=new_users.csv
    python -m experiments.recommend --workdir=RUN --similar_to=1270

Columns: `user_id`, `item_id`, `rank`, `score`, `title`, with `--why` also
`why`. An id list is a text file with one id a line. A history file is in any
format of `--dataset`; its users get a memory made from their history, whatever
the run knows of users of the same ids.
"""

import json
import pathlib
import sys
from typing import Any, Sequence

import numpy as np
import pyarrow as pa
from absl import flags

from experiments import app, console
from fedmmr_jax.data import formats, selection, sources, text_files
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import recommendation, user_results
from fedmmr_jax.evaluation.ranking import SPLITS
from fedmmr_jax.evaluation.recommendation import People, Reasons, WINDOW
from fedmmr_jax.federation.round import FederationState
from fedmmr_jax.runs.checkpoint import Rounds
from fedmmr_jax.simulation import Simulation

_ROUND = flags.DEFINE_string('round', 'best', 'a number, best or last')
_K = flags.DEFINE_integer('k', 10, 'items of a list', lower_bound=1)
_OUTPUT = flags.DEFINE_string(
  'output',
  '',
  'write the lists into this .parquet or .csv file; empty: print them',
)
_USER = flags.DEFINE_multi_string(
  'user', [], "a user's id in the data set; may be given more than once"
)
_USERS = flags.DEFINE_string('users', '', 'file with the ids of the users')
_HISTORIES = flags.DEFINE_string(
  'histories', '', 'file with histories of people that the run never saw'
)
_FORMAT = flags.DEFINE_string(
  'histories_format',
  formats.AUTO,
  'format of --histories, as --dataset in training: csv,user=who,item=what',
)
_CANDIDATES = flags.DEFINE_string(
  'candidates', '', 'file with the ids of the only items to recommend'
)
_BLOCK = flags.DEFINE_string(
  'block', '', 'file with the ids of items never to recommend'
)
_REPEATS = flags.DEFINE_boolean(
  'repeats', False, 'whether to recommend what a user has consumed already'
)
_SPLIT = flags.DEFINE_enum(
  'split',
  'none',
  ['none', *SPLITS],
  'val, test: what follows the items before that held-out item, to compare the '
  'lists with it; none: what follows everything',
)
_SIMILAR_TO = flags.DEFINE_string(
  'similar_to', '', 'instead: the items most like the one of this id'
)
_WHY = flags.DEFINE_boolean(
  'why',
  False,
  'name the items of the window, and of the memory for each expert, without '
  'which the score would fall most, and by how much',
)
_DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'folder of the data set, if it has moved'
)
_JSON = flags.DEFINE_boolean('json', False, 'print JSON instead of tables')

_PRINTED = 50  # users whose lists are printed without --output
_REASONS = 2  # that --why names of each kind


def main() -> None:
  if _OUTPUT.value:
    user_results.check_path(_OUTPUT.value)
  _check_flags()
  run = app.open_run()
  rounds = Rounds(run.path)
  number = app.find_round(rounds, _ROUND.value)
  # Lists are for all clients, whomever the run itself ranked.
  given: dict[str, Any] = {'eval_clients': 0}
  if _DATA_DIR.value is not None:
    given['data_dir'] = _DATA_DIR.value
  _, simulation, state = app.load_round(run, rounds, number, given)
  catalogue = _Catalogue(simulation)
  allowed = catalogue.allowed()
  if _SIMILAR_TO.value:
    columns = _similar(simulation, state, catalogue, allowed)
  else:
    columns = _lists(simulation, state, catalogue, allowed)
  _show(columns, f'round {number}')


def _check_flags() -> None:
  """Refuses flags that contradict one another, before anything is read."""
  given = [
    flag.name for flag in (_USER, _USERS, _HISTORIES, _SIMILAR_TO) if flag.value
  ]
  if len(given) > 1:
    raise UserError('give one of ' + ' and '.join(f'--{n}' for n in given))
  if _HISTORIES.value and _SPLIT.value != 'none':
    raise UserError('--split is of users of the run; leave out --histories')


class _Catalogue:
  """The run's items by their ids in the data set."""

  def __init__(self, simulation: Simulation):
    self.ids = simulation.dataset.item_ids
    self.titles = simulation.dataset.titles
    self._rows = {
      str(item): row for row, item in enumerate(self.ids.tolist()) if row
    }

  def row(self, item: str) -> int | None:
    """The row of an item, None if the run does not know it."""
    return self._rows.get(item)

  def allowed(self) -> np.ndarray:
    """[V] bool, which items --candidates and --block leave."""
    allowed = np.ones(len(self.ids), bool)
    if _CANDIDATES.value:
      allowed[:] = False
      allowed[self._listed('candidates', _CANDIDATES.value)] = True
    if _BLOCK.value:
      allowed[self._listed('block', _BLOCK.value)] = False
    if not allowed[1:].any():
      raise UserError('--candidates and --block leave no item to recommend')
    return allowed

  def _listed(self, flag: str, path: str) -> list[int]:
    wanted = _read_ids(flag, path)
    known = [row for row in map(self.row, wanted) if row]
    unknown = [item for item in wanted if not self.row(item)]
    if not known:
      raise UserError(
        f'--{flag}={path}: the run knows none of its {len(wanted)} items '
        f'({_some(unknown)})'
      )
    if unknown:
      _note(
        f'--{flag}: {len(unknown)} of {len(wanted)} items are not in the '
        f"run's catalogue and are left out ({_some(unknown)})"
      )
    return known


def _lists(
  simulation: Simulation,
  state: FederationState,
  catalogue: _Catalogue,
  allowed: np.ndarray,
) -> dict[str, Sequence[Any]]:
  """The columns of the answer, a row for each user and item."""
  if _HISTORIES.value:
    users, people = _new_people(simulation, catalogue)
  else:
    users, people = _clients(simulation)
  if len(users) > _PRINTED and not _OUTPUT.value:
    raise UserError(
      f'{len(users)} users are too many to print; name a file with --output, '
      'or some users with --user or --users'
    )
  lists = recommendation.recommend(
    simulation, state, people, _K.value, allowed, _REPEATS.value
  )
  filled = lists.rows > 0
  if not filled.all():
    short = (~filled).any(axis=1)
    _note(
      f'{short.sum()} of {len(users)} users have fewer than {_K.value} items '
      f'left to recommend, {(~filled).all(axis=1).sum()} of them none'
    )
  rows = lists.rows[filled]
  at, rank = np.nonzero(filled)
  columns: dict[str, Sequence[Any]] = {
    'user_id': users[at],
    'item_id': catalogue.ids[rows],
    'rank': 1 + rank,
    'score': lists.scores[filled],
    'title': _titles(catalogue, rows),
  }
  if _WHY.value:
    found = recommendation.reasons(simulation, state, people, lists)
    columns['why'] = [
      _told(found, user, place, catalogue) for user, place in zip(at, rank)
    ]
  return columns


def _similar(
  simulation: Simulation,
  state: FederationState,
  catalogue: _Catalogue,
  allowed: np.ndarray,
) -> dict[str, Sequence[Any]]:
  row = catalogue.row(_SIMILAR_TO.value)
  if row is None:
    raise UserError(
      f'--similar_to={_SIMILAR_TO.value}: the run has no such item'
    )
  rows, cosines = recommendation.similar_items(
    simulation, state, row, _K.value, allowed
  )
  return {
    'item_id': catalogue.ids[rows],
    'rank': 1 + np.arange(len(rows)),
    'score': cosines,
    'title': _titles(catalogue, rows),
  }


def _clients(simulation: Simulation) -> tuple[np.ndarray, People]:
  """The users that --user or --users names, else all of the run; with --split
  those that have such an item."""
  dataset = simulation.dataset
  split = None if _SPLIT.value == 'none' else _SPLIT.value
  clients = np.arange(dataset.num_clients)
  if split:
    clients = simulation.targeted(split)
  wanted = _USER.value
  if _USERS.value:
    wanted = _read_ids('users', _USERS.value)
  if wanted:
    numbers = {str(u): k for k, u in enumerate(dataset.user_ids.tolist())}
    unknown = [user for user in wanted if user not in numbers]
    if unknown:
      raise UserError(
        f'{len(unknown)} of {len(wanted)} users are not in the run '
        f'({_some(unknown)}); give people it never saw with --histories'
      )
    asked = np.array([numbers[user] for user in wanted])
    without = asked[~np.isin(asked, clients)]
    if len(without):
      raise UserError(
        f'--split={split}: {len(without)} of {len(asked)} users have no such '
        f'item ({_some(dataset.user_ids[without].tolist())})'
      )
    clients = asked
  users = dataset.user_ids[clients]
  return users, People.of_clients(simulation, clients, split)


def _new_people(
  simulation: Simulation, catalogue: _Catalogue
) -> tuple[np.ndarray, People]:
  """The users of --histories, with the items that the run knows."""
  source = sources.find(_FORMAT.value, _HISTORIES.value, 'histories')
  interactions = sources.read(source)
  _note(f'read       {source}')
  rows = np.array(
    [catalogue.row(str(item)) or 0 for item in interactions.item_ids.tolist()]
  )
  if not rows.all():
    unknown = interactions.item_ids[rows == 0].tolist()
    lost = int((rows[interactions.items] == 0).sum())
    _note(
      f"           {len(unknown)} of {len(rows)} items are not in the run's "
      f'catalogue; their {lost} interactions are left out ({_some(unknown)})'
    )
  known: dict[Any, np.ndarray] = {}
  lost_users = []
  for user, history in selection.sequences(interactions, rows):
    if len(history):
      known[user] = history
    else:
      lost_users.append(user)
  if not known:
    raise UserError(
      f"{source.path}: the run's catalogue has none of its items; are the ids "
      'those of the data set that the run was trained on?'
    )
  if lost_users:
    _note(
      f'           {len(lost_users)} users have no item that the run knows '
      f'and get no list ({_some(lost_users)})'
    )
  histories = list(known.values())
  return np.array(list(known)), People.of_histories(simulation, histories)


def _told(found: Reasons, user: int, place: int, catalogue: _Catalogue) -> str:
  """What an item's score leans on, as in 'window Heat +0.41; visual …'."""
  told = []
  for name in (WINDOW, *(n for n in found.items if n != WINDOW)):
    effects = found.effects[name][user, :, place]
    best = np.argsort(-effects, kind='stable')[:_REASONS]
    named = [
      f'{_name(catalogue, row)} {effects[at]:+.2f}'
      for at in best
      if (row := found.items[name][user, at]) and effects[at] >= 0.005
    ]
    if named:
      told.append(f'{name}: ' + ', '.join(named))
  return '; '.join(told)


def _name(catalogue: _Catalogue, row: int) -> str:
  return (catalogue.titles and catalogue.titles[row]) or str(catalogue.ids[row])


def _titles(catalogue: _Catalogue, rows: np.ndarray) -> list[str]:
  return [catalogue.titles[row] if catalogue.titles else '' for row in rows]


def _show(columns: dict[str, Sequence[Any]], heading: str) -> None:
  if _OUTPUT.value:
    path = pathlib.Path(_OUTPUT.value)
    user_results.write_table(pa.table(columns), path)
    _note(f'{heading}: {len(columns["rank"])} rows in {path}')
    return
  rows = [
    dict(zip(columns, row)) for row in zip(*map(_plain, columns.values()))
  ]
  if _JSON.value:
    print(json.dumps({'rows': rows}, indent=2, allow_nan=False))
    return
  print(f'{heading}\n')
  print(
    console.table(
      [name.removesuffix('_id') for name in columns],
      [
        [f'{x:.4f}' if isinstance(x, float) else str(x) for x in row.values()]
        for row in rows
      ],
    )
  )


def _plain(column: Sequence[Any]) -> list:
  return np.asarray(column).tolist()


def _read_ids(flag: str, path: str) -> list[str]:
  """The ids of a text file, one a line, in its order, without repetition."""
  file = pathlib.Path(path)
  if not file.is_file():
    raise UserError(f'--{flag}={path}: no such file')
  found = [
    text_files.decode(line, file, number).strip()
    for number, line in text_files.lines(file)
  ]
  if not found:
    raise UserError(f'--{flag}={path}: the file is empty; write an id a line')
  return list(dict.fromkeys(found))


def _some(ids: Sequence[Any]) -> str:
  return 'ids ' + ', '.join(map(str, ids[:5])) + (', …' if ids[5:] else '')


def _note(text: str) -> None:
  print(text, file=sys.stderr)


def cli() -> None:
  app.run(main)


if __name__ == '__main__':
  cli()
