"""Warm start: what a run loads from a saved round of another run.

Parameters are loaded by name, see `models/groups.py`. A requested group is
loaded whole, or the run does not start: a table that silently stays random, or
whose rows mean other items, looks like training that does not work. Items and
users are matched by their ids in the source. The server optimizer starts from
its initial state.
"""

import dataclasses
import pathlib
from functools import partial
from typing import Any, Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax.client import vocabulary
from fedmmr_jax.config import (
  ALL_GROUPS,
  ContentPlusId,
  GROUPS,
  MEMORIES,
  RunConfig,
  SimilarityForm,
  TwoTierMemory,
)
from fedmmr_jax.data.dataset import Dataset
from fedmmr_jax.errors import UserError
from fedmmr_jax.federation.round import FederationState
from fedmmr_jax.models import groups
from fedmmr_jax.models.feddmmr import group_of
from fedmmr_jax.runs.checkpoint import named_arrays, Rounds
from fedmmr_jax.runs.run_folder import ROUNDS, RunFolder

LOADED, INITIAL, UNFIT = 'loaded', 'initial', 'does not fit'


class Part(NamedTuple):
  """The outcome for one part of the two models.

  Attributes:
    name: path of parameters, or 'memories'.
    group: the group of parameters it belongs to.
    status: LOADED, INITIAL (keeps this run's initial values) or UNFIT (only the
      other run has it).
    count: how many numbers it has.
    note: how rows were matched, or why it was not loaded.
  """

  name: str
  group: str
  status: str
  count: int
  note: str


class WarmStart(NamedTuple):
  """What is loaded, on the host.

  Attributes:
    source: folder of the round it comes from.
    params: path -> parameter.
    memories: of all clients, with the global prototypes: the fields of
      `FederationState.memories` and, if the experts attend to them, of
      `ServerState.prototypes`; None unless requested.
    table: one row per part.
  """

  source: pathlib.Path
  params: dict[str, Any]
  memories: tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None] | None
  table: list[Part]

  def put_into(self, state: FederationState) -> FederationState:
    """A fresh state with the loaded values put in."""
    server = state.server._replace(
      params=jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(self.params.get(groups.path_text(path), x)),
        state.server.params,
      )
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
  """Reads what `load` names from `pretrained_path`.

  Args:
    config: the run that starts.
    dataset: its data.
    fresh: its state before round 1, or the shapes of that state.

  Raises:
    UserError: the path holds no round, or part of a requested group would keep
      its initial values or change its meaning.
  """
  run, number = find(config.start.pretrained_path)
  rounds = Rounds(run.path)
  saved = rounds.load_as_saved(number)['state']
  source = rounds.path(number)
  wanted = _wanted(config, fresh.server.params)
  refuse = _refuser(source)
  _check_meaning(wanted, config, dataset, run, refuse)
  asker = _asker(vocabulary.ITEM_TABLE, _askers(wanted))
  rows = asker and _rows(dataset, run, partial(refuse, asker))
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
  wanted: Sequence[str],
  own: dict[str, Any],
  theirs: dict[str, Any],
  rows: np.ndarray | None,
  refuse,
) -> tuple[dict[str, Any], list[Part]]:
  """The parameters that are loaded, and the table row of each part."""
  params: dict[str, Any] = {}
  table = []
  askers = _askers(wanted)
  for group, names in groups.by_group([*own, *theirs]).items():
    for name in names:
      if name in own:
        whole = _asker(name, askers)
        places = [name] if whole else _below(name, askers)
        for place in places:
          found = _at(theirs, place)
          if name == vocabulary.ITEM_TABLE and found is not None:
            found = found[rows]
          part = _at(own, place)
          _check_whole(part, found, place, whole or askers[place], refuse)
          params |= {
            _joined(place, path): x for path, x in named_arrays(found).items()
          }
          note = _matched(rows, name, theirs)
          table.append(Part(place, group, LOADED, _count(part), note))
          extra = set(named_arrays(found)) - set(named_arrays(part))
          if extra:
            note = 'not in this model: ' + ', '.join(sorted(extra))
            table.append(Part(place, group, UNFIT, 0, note))
        left = _count(own[name]) - sum(_count(_at(own, p)) for p in places)
        if left:
          table.append(Part(name, group, INITIAL, left, 'not asked for'))
      elif name in theirs:
        table.append(
          Part(name, group, UNFIT, _count(theirs[name]), 'not in this model')
        )
  return params, table


def _askers(wanted: Sequence[str]) -> dict[str, str]:
  """Group or parameter path -> the name that asks for it."""
  return {path: name for name in wanted for path in groups.paths_of(name)}


def _asker(parameter: str, askers: dict[str, str]) -> str | None:
  """The name that asks for the whole of a top-level parameter."""
  return next(
    (n for p, n in askers.items() if groups.is_within(parameter, p)), None
  )


def _below(name: str, askers: dict[str, str]) -> list[str]:
  """The outermost of the paths below a name."""
  below = [p for p in askers if p.startswith(f'{name}/')]
  return [p for p in below if not any(p.startswith(f'{q}/') for q in below)]


def _at(tree: Any, path: str) -> Any:
  """The value at a path of a tree of dicts; None if there is none."""
  for step in path.split('/'):
    tree = tree.get(step) if isinstance(tree, dict) else None
  return tree


def _joined(place: str, path: str) -> str:
  return f'{place}/{path}' if path else place


def find(path: str, setting: str = 'pretrained_path') -> tuple[RunFolder, int]:
  """A run and one of its rounds: a run folder stands for its best round,
  `RUN/rounds/N` for that round.

  Raises:
    UserError: there is no run, or no round; it names the setting.
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
    raise UserError(f'`{setting}={path}`: {error}') from None


def named_parameters(config: RunConfig) -> list[str]:
  """The parameter names in `load`, without the word for all groups."""
  return [
    n for n in config.start.load_groups if n not in (ALL_GROUPS, MEMORIES)
  ]


def _wanted(config: RunConfig, params: dict[str, Any]) -> list[str]:
  """The names to load; groups that `load` names must be in this model."""
  present = list(groups.by_group(params))
  named = config.start.load_groups
  for group in named_parameters(config):
    if group in GROUPS and group not in present:
      raise UserError(
        f'`load={config.start.load}`: this model has no {group}; '
        f'it has {", ".join(present)}'
      )
  if ALL_GROUPS in named:
    return present + [g for g in named if g == MEMORIES]
  return list(named)


def _refuser(source: pathlib.Path) -> Callable[[str, str], None]:
  def refuse(name, reason):
    raise UserError(
      f'`pretrained_path`: {name} cannot be loaded from '
      f'{source}: {reason}; leave {name} out of `load`, or name '
      'another run'
    )

  return refuse


# What gives parameters of one shape their meaning.
_MEANING = {
  'embeddings': ('dataset', 'cold_items'),
  'backbone': ('num_heads',),
  'experts': ('expert_form', 'fusion'),
  # Its outputs are in the order of the experts.
  'router': ('experts',),
  'fusion': ('fusion',),
  MEMORIES: ('memory',),
}


def _check_meaning(
  wanted, config: RunConfig, dataset: Dataset, run: RunFolder, refuse
) -> None:
  """Refuses parameters that would fit but mean something else."""
  # Whatever their files and flags are called.
  same_data = run.data_fingerprint() == dataset.fingerprint()
  for name in wanted:
    for group in _groups_of(name):
      _check_group(
        group, config, run.config(), same_data, partial(refuse, name)
      )


def _groups_of(name: str) -> list[str]:
  """The parameter groups of which some name asks for a part."""
  if name == MEMORIES:
    return [MEMORIES]
  return [
    place if place in GROUPS else group_of(place.split('/')[0])
    for place in groups.paths_of(name)
  ]


def _check_group(
  group: str, config: RunConfig, other: RunConfig, same_data: bool, refuse
) -> None:
  """Refuses a group whose parameters mean something else in the two runs."""
  before, here = _meaning(other), _meaning(config)
  for name in _MEANING.get(group, ()):
    if before[name] != here[name] and not (name == 'dataset' and same_data):
      refuse(f'its run had `{name}={before[name]}`, not {here[name]}')
  if group == 'embeddings':
    # Which items are cold, and were never trained, the seed says.
    if config.data.cold_items and config.seed != other.seed:
      refuse(f'its run had `seed={other.seed}`, and with it other cold items')
    starts = [
      # It acts on what was trained, where that is ranked.
      dataclasses.replace(start, shrinkage=0.0)
      if isinstance(start, ContentPlusId)
      else start
      for start in (config.model.item_embedding, other.model.item_embedding)
    ]
    added = any(isinstance(start, ContentPlusId) for start in starts)
    if added and starts[0] != starts[1]:
      refuse(f'its run had `item_embedding={starts[1]}`, not {starts[0]}')
  # Features may be others, and principal components of another catalogue are
  # other axes; a generated set has other items under the same ids.
  on_features = {
    'embeddings': (
      isinstance(config.model.item_embedding, ContentPlusId)
      or config.data.synthetic is not None
    ),
    'experts': True,
    MEMORIES: True,
  }
  if not same_data and on_features.get(group):
    refuse(
      'it was trained on other data, and its numbers belong to '
      'those items and features'
    )


def _meaning(config: RunConfig) -> dict[str, Any]:
  """A config's settings; of its parts, only what gives arrays their meaning."""
  memory = f'{config.memory.name},capacity={config.memory.capacity}'
  if isinstance(config.memory, TwoTierMemory):
    memory += f',long_term_capacity={config.memory.long_term_capacity}'
  form, fusion = config.model.expert_form, config.model.fusion
  return config.as_flat_dict() | {
    'experts': ','.join(config.model.expert_forms),
    # What its parameters started from, training has changed.
    'expert_form': f'{form.name},features={form.features}'
    if isinstance(form, SimilarityForm)
    else str(dataclasses.replace(form, scale=1.0)),
    'fusion': f'{fusion.name},similarity={fusion.similarity}',
    'memory': memory,
  }


def _rows(dataset: Dataset, run: RunFolder, refuse) -> np.ndarray:
  """[V] row of each item in the other run's item table."""
  # Row 0 is padding on both sides; an item may bear its id, 0, too.
  theirs = {item: row for row, item in enumerate(run.ids()['item_ids']) if row}
  own = dataset.item_ids[1:].tolist()
  missing = [i for i in own if i not in theirs]
  if missing:
    shown = ', '.join(map(str, missing[:5])) + (', …' if missing[5:] else '')
    refuse(
      f"{len(missing)} of this run's {dataset.num_items} "
      f'items are not in it and would stay random (ids {shown})'
    )
  return np.array([0, *(theirs[i] for i in own)])


def _matched(rows, name: str, theirs) -> str:
  if name != vocabulary.ITEM_TABLE:
    return ''
  total = len(theirs[name]) - 1
  return f'{len(rows) - 1} items, matched by id' + (
    f'; {total - len(rows) + 1} others left there' if total >= len(rows) else ''
  )


def _check_whole(own: Any, found: Any, name: str, asker: str, refuse) -> None:
  """Checks that the other run has every array of this model, in its shape."""
  found = named_arrays(found)
  for path, x in named_arrays(own).items():
    if not x.size:  # prototypes of a run without texts, which are not saved
      continue
    full = _joined(name, path)
    if path not in found:
      refuse(asker, f'it has no {full}, which would stay as drawn')
    if found[path].shape != x.shape:
      refuse(
        asker,
        f'{full} has shape {_shape(found[path])} there and {_shape(x)} here',
      )


def _with_empty(own: Any, found: Any) -> Any:
  """What was found, plus the empty arrays, which are not saved."""
  return jax.tree.map(
    lambda x, y: y if x.size else np.zeros(x.shape, x.dtype), own, found
  )


def _count(tree: Any) -> int:
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def _shape(x: Any) -> str:
  return ' x '.join(map(str, x.shape)) or 'scalar'
