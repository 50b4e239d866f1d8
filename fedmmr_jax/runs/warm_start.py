"""Warm start: what a run takes over from a saved round of another one.

Parameters are loaded by named groups. A group that was asked for is loaded
whole or the start is refused: a table that silently stays random, or whose rows
mean other items, looks like training that does not work. Items and users are
matched by their ids in the source. The server optimizer starts afresh.
"""

import pathlib
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax.client import vocabulary
from fedmmr_jax.config import (
  ALL_GROUPS,
  ContentPlusId,
  MEMORIES,
  RunConfig,
  TwoTierMemory,
)
from fedmmr_jax.data.dataset import Dataset
from fedmmr_jax.errors import UserError
from fedmmr_jax.federation.round import FederationState
from fedmmr_jax.models.feddmmr import PARAMETER_GROUPS
from fedmmr_jax.runs.checkpoint import named_arrays, Rounds
from fedmmr_jax.runs.run_folder import ROUNDS, RunFolder

LOADED, INITIAL, UNFIT = 'loaded', 'initial', 'does not fit'


class Part(NamedTuple):
  """What became of one part of the two models.

  Attributes:
    name: top-level name of parameters, or 'memories'.
    group: the `--load` group it belongs to.
    status: LOADED, INITIAL (left as this run draws it) or UNFIT (only the
      other run has it).
    count: numbers in it.
    note: how rows were matched, or why it was left.
  """

  name: str
  group: str
  status: str
  count: int
  note: str


class WarmStart(NamedTuple):
  """What is taken over, on the host.

  Attributes:
    source: folder of the round it comes from.
    params: top-level name -> parameters.
    memories: of all clients, with the global prototypes: the fields of
      `FederationState.memories` and, where the experts attend to them, of
      `ServerState.prototypes`; None unless asked for.
    table: a row for each part.
  """

  source: pathlib.Path
  params: dict[str, Any]
  memories: tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None] | None
  table: list[Part]

  def put_into(self, state: FederationState) -> FederationState:
    """A fresh state with what is taken over in its place."""
    server = state.server._replace(
      params=state.server.params | jax.tree.map(jnp.asarray, self.params)
    )
    if self.memories is None:
      return state._replace(server=server)
    memories, prototypes = jax.tree.map(jnp.asarray, self.memories)
    if prototypes is not None:
      server = server._replace(prototypes=type(server.prototypes)(**prototypes))
    return state._replace(
      memories=type(state.memories)(**memories), server=server
    )


def load(
  config: RunConfig, dataset: Dataset, fresh: FederationState
) -> WarmStart:
  """Reads what `--load` names from `--pretrained_path`.

  Args:
    config: the run that starts.
    dataset: its data.
    fresh: its state before round 1, or the shapes of it.

  Raises:
    UserError: the path holds no round, a part of a group that was asked for
      would be left as it is, or would come to mean something else.
  """
  run, number = find(config.start.pretrained_path)
  rounds = Rounds(run.path)
  saved = rounds.load_as_saved(number)['state']
  source = rounds.path(number)
  wanted = _wanted(config, fresh.server.params)
  refuse = _refuser(source)
  _check_meaning(wanted, config, dataset, run, refuse)
  rows = _rows(dataset, run, refuse) if 'embeddings' in wanted else None
  params, table = _take(
    wanted, fresh.server.params, saved['server']['params'], rows, refuse
  )
  memories = None
  own = tuple(
    x and x._asdict() for x in (fresh.memories, fresh.server.prototypes)
  )
  if MEMORIES in wanted:
    if fresh.memories is None:
      refuse(MEMORIES, 'this run has no experts, which alone read a memory')
    # Prototypes that this run would not read stay behind.
    memories = saved['memories'], own[1] and saved['server']['prototypes']
    _check_whole(own, memories, MEMORIES, MEMORIES, refuse)
    memories = _with_empty(own, memories)
  table.append(
    Part(
      MEMORIES,
      MEMORIES,
      LOADED if memories else INITIAL,
      _count(own),
      '' if memories else 'not asked for',
    )
  )
  return WarmStart(source, params, memories, table)


def _take(
  wanted: list[str],
  own: dict[str, Any],
  theirs: dict[str, Any],
  rows: np.ndarray | None,
  refuse,
) -> tuple[dict[str, Any], list[Part]]:
  """The parameters that are taken over, and what is to say of each."""
  params, table = {}, []
  for group, names in PARAMETER_GROUPS.items():
    for name in names:
      if name in own and group in wanted:
        found = theirs.get(name)
        if name == vocabulary.ITEM_TABLE and found is not None:
          found = found[rows]
        _check_whole(own[name], found, name, group, refuse)
        params[name] = found
        table.append(
          Part(name, group, LOADED, _count(found), _matched(rows, name, theirs))
        )
        extra = set(named_arrays(theirs[name])) - set(named_arrays(own[name]))
        if extra:
          table.append(
            Part(
              name,
              group,
              UNFIT,
              0,
              'not in this model: ' + ', '.join(sorted(extra)),
            )
          )
      elif name in own:
        table.append(
          Part(name, group, INITIAL, _count(own[name]), 'not asked for')
        )
      elif name in theirs:
        table.append(
          Part(name, group, UNFIT, _count(theirs[name]), 'not in this model')
        )
  return params, table


def find(path: str, flag: str = 'pretrained_path') -> tuple[RunFolder, int]:
  """A run and a round of it: a run's folder means its best round,
  `RUN/rounds/N` that one.

  Raises:
    UserError: there is no run, or no round; it names the flag.
  """
  folder = pathlib.Path(path)
  if folder.parent.name == ROUNDS and folder.name.isdecimal():
    folder, number = folder.parent.parent, int(folder.name)
  else:
    number = 0
  try:
    run = RunFolder(folder)
    run.check_format()
    return run, number or Rounds(folder).best()
  except UserError as error:
    raise UserError(f'`{flag}={path}`: {error}') from None


def _wanted(config: RunConfig, params: dict[str, Any]) -> list[str]:
  """The groups to load; those that `--load` names must be in this model."""
  present = [
    group
    for group, names in PARAMETER_GROUPS.items()
    if any(name in params for name in names)
  ]
  named = config.start.load_groups
  for group in named:
    if group not in (*present, MEMORIES, ALL_GROUPS):
      raise UserError(
        f'`load={config.start.load}`: this model has no {group}; '
        f'it has {", ".join(present)}'
      )
  if ALL_GROUPS in named:
    return present + [g for g in named if g == MEMORIES]
  return list(named)


def _refuser(source: pathlib.Path) -> Callable[[str, str], None]:
  def refuse(group, reason):
    raise UserError(
      f'`pretrained_path`: {group} cannot be loaded from '
      f'{source}: {reason}; leave {group} out of `load`, or name '
      'another run'
    )

  return refuse


# What gives parameters of one shape their meaning.
_MEANING = {
  'embeddings': ('dataset', 'cold_items'),
  'backbone': ('num_heads',),
  'experts': (
    'semantic_heads',
    'feature_scaling',
    'expert_input',
    'fusion',
    'similarity',
  ),
  'router': ('router_input', 'feature_scaling'),
  'fusion': ('fusion',),
  MEMORIES: ('memory',),
}


def _check_meaning(
  wanted, config: RunConfig, dataset: Dataset, run: RunFolder, refuse
) -> None:
  """Refuses what would fit, and come to mean something else."""
  other = run.config()
  theirs, before = _meaning(config), _meaning(other)
  # Whatever their files and flags are called.
  same_data = run.data_fingerprint() == dataset.fingerprint()
  for group in wanted:
    for name in _MEANING.get(group, ()):
      if before[name] != theirs[name] and not (name == 'dataset' and same_data):
        refuse(
          group, f'its run had `{name}={before[name]}`, not {theirs[name]}'
        )
  if 'embeddings' in wanted:
    # Which items are cold, and were never trained, the seed says.
    if config.data.cold_items and config.seed != other.seed:
      refuse(
        'embeddings',
        f'its run had `seed={other.seed}`, and with it other cold items',
      )
    starts = config.model.item_embedding, other.model.item_embedding
    added = any(isinstance(start, ContentPlusId) for start in starts)
    if added and starts[0] != starts[1]:
      refuse(
        'embeddings',
        f'its run had `item_embedding={starts[1]}`, not {starts[0]}',
      )
  if same_data:
    return
  # Features may be others, and principal components of another catalogue are
  # other axes; a generated set has other items under the same ids.
  on_features = {
    'embeddings': (
      isinstance(config.model.item_embedding, ContentPlusId)
      or config.data.dataset == 'synthetic'
    ),
    'experts': True,
    'router': config.model.router_input == 'features',
    MEMORIES: True,
  }
  for group in wanted:
    if on_features.get(group):
      refuse(
        group,
        'it was trained on other data, and its numbers belong to '
        'those items and features',
      )


def _meaning(config: RunConfig) -> dict[str, Any]:
  """Its settings, of parts only what gives arrays another meaning."""
  memory = f'{config.memory.name},capacity={config.memory.capacity}'
  if isinstance(config.memory, TwoTierMemory):
    memory += f',long_term_capacity={config.memory.long_term_capacity}'
  return config.as_flat_dict() | {
    'fusion': config.model.fusion.name,
    'memory': memory,
  }


def _rows(dataset: Dataset, run: RunFolder, refuse) -> np.ndarray:
  """[V] which row of the other item table each item has there."""
  # Row 0 is padding on both sides; an item may bear its id, 0, too.
  theirs = {item: row for row, item in enumerate(run.ids()['item_ids']) if row}
  own = dataset.item_ids[1:].tolist()
  missing = [i for i in own if i not in theirs]
  if missing:
    shown = ', '.join(map(str, missing[:5])) + (', …' if missing[5:] else '')
    refuse(
      'embeddings',
      f"{len(missing)} of this run's {dataset.num_items} "
      f'items are not in it and would stay random (ids {shown})',
    )
  return np.array([0, *(theirs[i] for i in own)])


def _matched(rows, name: str, theirs) -> str:
  if name != vocabulary.ITEM_TABLE:
    return ''
  total = len(theirs[name]) - 1
  return f'{len(rows) - 1} items, matched by id' + (
    f'; {total - len(rows) + 1} others left there' if total >= len(rows) else ''
  )


def _check_whole(own: Any, found: Any, name: str, group: str, refuse) -> None:
  """Every array of this model must have one of its shape there."""
  found = named_arrays(found)
  for path, x in named_arrays(own).items():
    if not x.size:  # prototypes of a run without texts, which are not saved
      continue
    full = f'{name}/{path}' if path else name
    if path not in found:
      refuse(group, f'it has no {full}, which would stay as drawn')
    if found[path].shape != x.shape:
      refuse(
        group,
        f'{full} has shape {_shape(found[path])} there and {_shape(x)} here',
      )


def _with_empty(own: Any, found: Any) -> Any:
  """What was found, and the arrays without an entry, which are not saved."""
  return jax.tree.map(
    lambda x, y: y if x.size else np.zeros(x.shape, x.dtype), own, found
  )


def _count(tree: Any) -> int:
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def _shape(x: Any) -> str:
  return ' x '.join(map(str, x.shape)) or 'scalar'
