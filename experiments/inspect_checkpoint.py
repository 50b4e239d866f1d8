"""Inspects the checkpoints of a run without its flags or devices and, except
for `router` and `recommend`, without its data.

    python -m experiments.inspect_checkpoint --workdir=RUN list
    python -m experiments.inspect_checkpoint --workdir=RUN show ROUND
    python -m experiments.inspect_checkpoint --workdir=RUN diff ROUND ROUND
    python -m experiments.inspect_checkpoint --workdir=RUN memory ROUND USER
    python -m experiments.inspect_checkpoint --workdir=RUN router ROUND
    python -m experiments.inspect_checkpoint --workdir=RUN recommend ROUND USER
    python -m experiments.inspect_checkpoint --workdir=RUN export ROUND FILE.npz

ROUND is a number, `best` or `last`; USER is the id in the data set. `--json`
prints the same for programs. `router` and `recommend` take `--k`, and
`--data_dir` if the data has moved.
"""

import json
import pathlib
import textwrap
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import app, console, routing
from fedmmr_jax import metrics
from fedmmr_jax.client import memory as memory_lib
from fedmmr_jax.config import RunConfig
from fedmmr_jax.errors import UserError
from fedmmr_jax.runs.checkpoint import named_arrays, Rounds
from fedmmr_jax.runs.run_folder import RunFolder

_JSON = flags.DEFINE_boolean('json', False, 'print JSON instead of tables')
_K = flags.DEFINE_integer('k', 10, 'how many items to list', lower_bound=1)
_DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'folder of the data set, if it has moved'
)

USAGE = (
  'list | show ROUND | diff ROUND ROUND | memory ROUND USER | '
  'router ROUND | recommend ROUND USER | export ROUND FILE.npz'
)
_LISTED = [
  (p, m) for p in metrics.PROTOCOLS for m in (metrics.HR, metrics.NDCG)
]


def main(*words: str) -> None:
  run = app.open_run()
  rounds = Rounds(run.path)
  match words:
    case ['list']:
      content, text = list_rounds(rounds)
    case ['show', which]:
      content, text = show(run, rounds, app.find_round(rounds, which))
    case ['memory', which, user]:
      content, text = show_memory(
        run, rounds, app.find_round(rounds, which), user
      )
    case ['recommend', which, user]:
      content, text = recommend(
        run, rounds, app.find_round(rounds, which), user
      )
    case ['export', which, path]:
      content, text = export(rounds, app.find_round(rounds, which), path)
    case ['router', which]:
      content, text = router(run, rounds, app.find_round(rounds, which))
    case ['diff', first, second]:
      content, text = diff(
        rounds, app.find_round(rounds, first), app.find_round(rounds, second)
      )
    case _:
      raise UserError(
        f'unknown command {" ".join(words)!r}; say one of: {USAGE}'
      )
  print(json.dumps(content, indent=2, allow_nan=False) if _JSON.value else text)


def list_rounds(rounds: Rounds) -> tuple[Any, str]:
  """Saved rounds with size, loss and validation; damaged ones are told."""
  found, damage = {}, {}
  for number in rounds.numbers():
    try:
      found[number] = rounds.metadata(number)
    except UserError as error:
      damage[number] = str(error)
  best = found[max(found)]['best_round'] or max(found) if found else 0
  content, rows = [], []
  for number in rounds.numbers():
    record = found[number]['record'] if number in found else {}
    val = record.get('val', {})
    figures = {'loss': record.get('train', {}).get(metrics.LOSS)} | {
      f'val {protocol} {metric}': val.get(protocol, {}).get(metric)
      for protocol, metric in _LISTED
    }
    content.append(
      {
        'round': number,
        'best': number == best,
        'bytes': rounds.size(number),
        'damage': damage.get(number),
        **figures,
      }
    )
    rows.append(
      [
        number,
        f'{content[-1]["bytes"] / 1e6:.1f} MB',
        *map(_number, figures.values()),
        'DAMAGED' if number in damage else '<- best' if number == best else '',
      ]
    )
  header = [
    'round',
    'size',
    'loss',
    *(f'{metric} {protocol}' for protocol, metric in _LISTED),
    '',
  ]
  return content, '\n'.join([console.table(header, rows), *damage.values()])


def show(run: RunFolder, rounds: Rounds, number: int) -> tuple[Any, str]:
  """Parameters with shapes and norms, by group, the other state, and
  the run's settings."""
  saved = rounds.load_as_saved(number)
  server, memories = saved['state']['server'], saved['state']['memories']
  content = {'round': number, 'parameters': [], 'groups': {}}
  for name, value in named_arrays(server['params']).items():
    finite = bool(np.isfinite(value).all())
    entry = {
      'name': name,
      'shape': list(value.shape),
      'count': value.size,
      'norm': float(np.linalg.norm(value)) if finite else None,
      'finite': finite,
    }
    content['parameters'].append(entry)
    group = content['groups'].setdefault(
      name.split('/')[0], {'count': 0, 'squared': 0.0, 'finite': True}
    )
    group['count'] += value.size
    group['finite'] &= finite
    group['squared'] += float(np.sum(np.square(value, dtype=np.float64)))
  for group in content['groups'].values():
    squared = group.pop('squared')
    group['norm'] = squared**0.5 if group['finite'] else None
  content['memories'] = memories and _fill(memories)
  content['personal'] = _personal(
    named_arrays(saved['state'].get('personal') or {}),
    named_arrays(server['params']),
  )
  content['not_finite'] = [
    name
    for name, part in (
      ('parameters', server['params']),
      ('prototypes', server['prototypes']),
      ('server optimizer', server['opt_state']),
      ('memories', memories),
      ('control variates', (server['control'], saved['state']['controls'])),
      ('personal parameters', saved['state'].get('personal')),
    )
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(part))
  ]
  prototypes = server['prototypes']
  content['prototype_sizes'] = prototypes and prototypes['size'].tolist()
  content['record'] = rounds.metadata(number)['record']
  content['flags'] = run.flags()
  return content, _show_text(content)


def _fill(memories: dict[str, np.ndarray]) -> dict[str, Any]:
  """How many clients have a memory, and how full it is."""
  sampled = memories['clock'] > 0
  fill = (memories['item'] > 0).mean(axis=1)
  return {
    'clients': len(sampled),
    'sampled': int(sampled.sum()),
    'mean_fill_of_sampled': float(fill[sampled].mean())
    if sampled.any()
    else None,
  }


def _personal(
  own: dict[str, np.ndarray], server: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
  """Of each parameter that clients keep, [K, …], how many clients have moved
  it, and how far from where all of them started."""
  found = []
  for name, value in own.items():
    moved = np.linalg.norm(
      (value - server[name]).reshape(len(value), -1).astype(np.float64), axis=1
    )
    some = moved > 0
    found.append(
      {
        'name': name,
        'count': value[0].size,
        'clients': len(value),
        'moved': int(some.sum()),
        'mean_distance': _finite(moved[some].mean()) if some.any() else None,
      }
    )
  return found


def _show_text(content: dict[str, Any]) -> str:
  def row(name, shape, entry):
    return [
      name,
      shape,
      f'{entry["count"]:,}',
      _number(entry['norm']),
      '' if entry['finite'] else 'NOT FINITE',
    ]

  header = ['parameter', 'shape', 'count', 'norm', '']
  parameters = [
    row(p['name'], ' x '.join(map(str, p['shape'])) or 'scalar', p)
    for p in content['parameters']
  ]
  groups = [row(name, '', g) for name, g in content['groups'].items()]
  total = sum(g['count'] for g in content['groups'].values())
  state = [f'{total:,} parameters; ' + _memory_text(content['memories'])]
  if content['prototype_sizes']:
    state.append(
      'prototypes, stored items each: '
      + ', '.join(f'{size:.0f}' for size in content['prototype_sizes'])
    )
  if content['personal']:
    rows = [
      [
        p['name'],
        f'{p["count"]:,}',
        f'{p["moved"]} of {p["clients"]}',
        _number(p['mean_distance']),
      ]
      for p in content['personal']
    ]
    state.append(
      '\n'
      + console.table(
        ['of each client', 'count', 'clients that moved it', 'by, in the mean'],
        rows,
      )
    )
  defaults = RunConfig().as_flat_dict()
  changed = ' '.join(
    f'--{name}={value}'
    for name, value in content['flags'].items()
    if value != defaults.get(name)
  )
  return '\n'.join(
    [
      f'round {content["round"]}',
      '',
      console.table(header, parameters),
      '',
      console.table(['group', '', 'count', 'norm', ''], groups),
      '',
      *state,
      '',
      'NOT FINITE: ' + ', '.join(content['not_finite'])
      if content['not_finite']
      else 'no NaN and no infinity in its state',
      '',
      'settings that are not the defaults:',
      *textwrap.wrap(changed, 79, break_on_hyphens=False),
    ]
  )


def _memory_text(memories: dict[str, Any] | None) -> str:
  if memories is None:
    return 'no memories, for there are no experts'
  fill = memories['mean_fill_of_sampled']
  return (
    f'memories of {memories["sampled"]} of {memories["clients"]} clients '
    'in use' + (f', {fill:.0%} full on average' if fill is not None else '')
  )


def diff(rounds: Rounds, first: int, second: int) -> tuple[Any, str]:
  """How far each parameter group moved from one round to another."""
  before, after = (
    rounds.load_as_saved(number)['state']['server']['params']
    for number in (first, second)
  )
  content = {'rounds': [first, second], 'groups': {}}
  for group in before:
    a, b = (
      np.concatenate(
        [np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree[group])]
      )
      for tree in (before, after)
    )
    norms = np.linalg.norm(a), np.linalg.norm(b)
    content['groups'][group] = {
      'count': a.size,
      'distance': _finite(np.linalg.norm(b - a)),
      'relative_change': _finite(
        np.linalg.norm(b - a) / norms[0] if norms[0] else 0.0
      ),
      'cosine': _finite(
        a @ b / (norms[0] * norms[1]) if norms[0] and norms[1] else 0.0
      ),
    }
  rows = [
    [
      name,
      f'{g["count"]:,}',
      *(
        '-' if value is None else f'{value:.{digits}g}'
        for value, digits in (
          (g['distance'], 3),
          (g['relative_change'], 3),
          (g['cosine'], 7),
        )
      ),
    ]
    for name, g in content['groups'].items()
  ]
  return content, f'round {first} -> round {second}\n\n' + console.table(
    ['group', 'count', 'distance', 'relative change', 'cosine'], rows
  )


def router(run: RunFolder, rounds: Rounds, number: int) -> tuple[Any, str]:
  """Router weights of the items for which the router has a choice.

  Raises:
    UserError: the run has no experts, each client has a router of its own, or
      the data is not the run's.
  """
  personal = rounds.load_as_saved(number)['state'].get('personal')
  if personal and 'router' in personal:
    raise UserError(
      f'{run.path}: each client has a router of its own, and the server none '
      'that was trained; `show` says how far they moved'
    )
  loaded, simulation, state = _load(run, rounds, number)
  content = {'round': number} | routing.summary(
    simulation.route(state)[1:],
    [m.name for m in simulation.model.modalities],
    loaded.dataset.item_ids[1:].tolist(),
    loaded.dataset.titles[1:],
    _K.value,
  )
  return content, f'round {number}: {routing.text(content)}'


def _load(run: RunFolder, rounds: Rounds, number: int):
  given = {} if _DATA_DIR.value is None else {'data_dir': _DATA_DIR.value}
  return app.load_round(run, rounds, number, given)


def recommend(
  run: RunFolder, rounds: Rounds, number: int, user: str
) -> tuple[Any, str]:
  """Items a user has not consumed, best first, to follow the last item.

  Raises:
    UserError: no such user, or the data is not the run's.
  """
  client = _client(run, user)
  _, simulation, state = _load(run, rounds, number)
  items, scores = simulation.recommend(state, client, _K.value)
  ids = run.ids()
  entries = [
    {
      'item_id': ids['item_ids'][row],
      'score': float(score),
      'title': ids['titles'][row] if ids['titles'] else '',
    }
    for row, score in zip(items, scores)
  ]
  rows = [
    [e['item_id'], f'{e["score"]:.4f}', e['title'].ljust(1)] for e in entries
  ]
  return (
    {'round': number, 'user_id': ids['user_ids'][client], 'entries': entries},
    f'round {number}, user {user}\n\n'
    + console.table(['item', 'score', 'title'], rows),
  )


def export(rounds: Rounds, number: int, path: str) -> tuple[Any, str]:
  """Writes the parameters as NumPy arrays named `group/layer/weight`.

  Raises:
    UserError: the file exists, or is not an .npz file.
  """
  if not path.endswith('.npz'):
    raise UserError(f'{path}: name a file that ends in .npz')
  if pathlib.Path(path).exists():
    raise UserError(f'{path}: exists; name another file')
  params = rounds.load_as_saved(number)['state']['server']['params']
  arrays = named_arrays(params)
  np.savez(path, **arrays)
  return (
    {'round': number, 'file': path, 'arrays': sorted(arrays)},
    f'round {number}: {len(arrays)} arrays in {path}',
  )


def _client(run: RunFolder, user: str) -> int:
  """The number of the client that a user id of the data set names."""
  ids = run.ids()
  users = {str(u): k for k, u in enumerate(ids['user_ids'])}
  if user not in users:
    raise UserError(
      f'{run.path}: there is no user {user!r}; ids go from '
      f'{ids["user_ids"][0]} to {ids["user_ids"][-1]}'
    )
  return users[user]


def show_memory(
  run: RunFolder, rounds: Rounds, number: int, user: str
) -> tuple[Any, str]:
  """One client's memory, most useful entry first.

  Raises:
    UserError: there is no such user, or the run has no memories.
  """
  client, ids = _client(run, user), run.ids()
  memories = rounds.load_as_saved(number)['state']['memories']
  if memories is None:
    raise UserError(f'{run.path}: this run has no experts, and so no memories')
  memory = memory_lib.Memory(
    **{name: value[client] for name, value in memories.items()}
  )
  utility = np.asarray(
    memory_lib.utility(memory, memory.clock, run.config().memory)
  )
  entries = []
  for slot in np.lexsort((memory.inserted, -utility)):
    row = int(memory.item[slot])
    if row:
      entries.append(
        {
          'item_id': ids['item_ids'][row],
          'title': ids['titles'][row] if ids['titles'] else '',
          'last_update': int(memory.last_update[slot]),
          'frequency': int(memory.frequency[slot]),
          'surprise': _finite(memory.surprise[slot]),
          'utility': _finite(utility[slot]),
        }
      )
  content = {
    'round': number,
    'user_id': ids['user_ids'][client],
    'clock': int(memory.clock),
    'entries': entries,
  }
  rows = [
    [
      e['item_id'],
      e['last_update'],
      e['frequency'],
      _number(e['surprise'], 3),
      _number(e['utility']),
      e['title'].ljust(1),
    ]
    for e in entries
  ]
  head = (
    f'round {number}, user {user}: {len(entries)} of '
    f'{len(memory.item)} slots, clock {content["clock"]} samples'
  )
  if not entries:
    return content, head + ('' if content['clock'] else ', never sampled')
  return content, head + '\n\n' + console.table(
    ['item', 'last update', 'frequency', 'surprise', 'utility', 'title'], rows
  )


def _finite(value: float) -> float | None:
  return float(value) if np.isfinite(value) else None


def _number(value: float | None, digits: int = 4) -> str:
  return '-' if value is None else f'{value:.{digits}f}'


def cli() -> None:
  app.run(main, commands=True)


if __name__ == '__main__':
  cli()
