"""Warm start: what a run loads from a saved round of another run.

Parameters are loaded by name, see `models/groups.py`. A requested group is
loaded whole, or the run does not start: a table that silently stays random, or
whose rows mean other items, looks like training that does not work. Items and
users are matched by their ids in the source. Data may have grown since: new
items keep the rows with which this run starts them, new users have an empty
memory, and the report counts both. The server optimizer starts from its initial
state.
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
  ContentInit,
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

PROJECTION = 'content_projection'  # of content_plus_id
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
    new_items: [n] rows of the item table that are left as they were drawn.
    turns: whether these were drawn around the items' content, and have to be
      turned to the axes of what was loaded.
    memories: of all clients, with the global prototypes: the fields of
      `FederationState.memories` and, if the experts attend to them, of
      `ServerState.prototypes`; None unless requested.
    table: one row per part.
  """

  source: pathlib.Path
  params: dict[str, Any]
  new_items: np.ndarray
  turns: bool
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
    if len(self.new_items):
      table = _with_new(
        np.asarray(state.server.params[vocabulary.ITEM_TABLE]),
        np.asarray(self.params[vocabulary.ITEM_TABLE]),
        self.new_items,
        self.turns,
      )
      server.params[vocabulary.ITEM_TABLE] = jnp.asarray(table)
    if self.memories is None:
      return state._replace(server=server)
    memories, prototypes = jax.tree.map(jnp.asarray, self.memories)
    if prototypes is not None:
      server = server._replace(prototypes=type(server.prototypes)(**prototypes))
    return state._replace(
      memories=type(state.memories)(**memories), server=server
    )


class _Match(NamedTuple):
  """Where the items or users of this run are in the other run.

  Attributes:
    rows: [n] their places there; -1 for those that are new.
    left: how many others are only there.
  """

  rows: np.ndarray
  left: int

  @property
  def new(self) -> np.ndarray:
    """Places here of the new ones."""
    return np.flatnonzero(self.rows < 0)

  def taken(self, found: np.ndarray) -> np.ndarray:
    """What the other run has for those of this run; zeros for new ones."""
    taken = found[self.rows]
    taken[self.new] = 0
    return taken


def load(
  config: RunConfig,
  dataset: Dataset,
  fresh: FederationState,
  content: jax.Array,
) -> WarmStart:
  """Reads what `load` names from `pretrained_path`.

  Args:
    config: the run that starts.
    dataset: its data.
    fresh: its state before round 1, or the shapes of that state.
    content: [V, D] or [V, 0], see `Catalogue.content`.

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
  _check_shared(wanted, run.config().federation.personal_groups, fresh, refuse)
  moves_content = _moves_content(wanted, config, dataset, run)
  _check_meaning(wanted, config, dataset, run, moves_content, refuse)
  asker = _asker(vocabulary.ITEM_TABLE, _askers(wanted))
  items = asker and _match_items(dataset, run, partial(refuse, asker))
  from_content = isinstance(config.model.item_embedding, ContentInit)
  params, table = _take(
    wanted,
    fresh.server.params,
    saved['server']['params'],
    items,
    from_content,
    refuse,
  )
  if moves_content and items:
    before = items.taken(run.content())
    params |= _on_other_content(params, before, np.asarray(content), items.new)
  memories = None
  own = tuple(
    x and x._asdict() for x in (fresh.memories, fresh.server.prototypes)
  )
  if MEMORIES in wanted:
    if fresh.memories is None:
      refuse(MEMORIES, 'this run has no experts, which alone read a memory')
    if saved['memories'] is None:
      refuse(MEMORIES, 'it has no experts; memories would stay as drawn')
    users, kept = _match_users(dataset, run, partial(refuse, MEMORIES))
    memories = (
      _of_users(saved['memories'], users, kept),
      # Prototypes that this run would not read stay behind.
      own[1] and saved['server']['prototypes'],
    )
    _check_whole(own, memories, MEMORIES, MEMORIES, refuse)
    memories = _with_empty(own, memories)
    table += _told_of_memories(_count(own), users)
  else:
    table.append(
      Part(MEMORIES, MEMORIES, INITIAL, _count(own), 'not asked for')
    )
  new_items = items.new if items else np.zeros(0, int)
  turns = type(config.model.item_embedding) is ContentInit
  return WarmStart(source, params, new_items, turns, memories, table)


def _take(
  wanted: Sequence[str],
  own: dict[str, Any],
  theirs: dict[str, Any],
  items: _Match | None,
  from_content: bool,
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
          if items and name == vocabulary.ITEM_TABLE and found is not None:
            found = items.taken(found)
          part = _at(own, place)
          _check_whole(part, found, place, whole or askers[place], refuse)
          params |= {
            _joined(place, path): x for path, x in named_arrays(found).items()
          }
          if items and name == vocabulary.ITEM_TABLE:
            table += _told_of_items(group, _count(part), items, from_content)
          else:
            table.append(Part(place, group, LOADED, _count(part), ''))
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


def _check_shared(
  wanted, personal: Sequence[str], fresh: FederationState, refuse
) -> None:
  """Refuses what the clients of the other run kept: its server has it as it
  was before round 1."""
  params = fresh.server.params
  kept = jax.tree.leaves(groups.mask(params, personal))
  for name in wanted:
    if name != MEMORIES and any(
      ours and theirs
      for ours, theirs in zip(
        jax.tree.leaves(groups.mask(params, [name])), kept
      )
    ):
      refuse(
        name,
        f'its clients kept theirs (`personal={",".join(personal)}`), and its '
        'server never trained it',
      )


# What gives parameters of one shape their meaning.
_MEANING = {
  'embeddings': ('dataset', 'cold_items'),
  'backbone': ('num_heads',),
  'experts': ('expert_form', 'fusion'),
  # Its outputs are in the order of the experts.
  'router': ('experts',),
  'fusion': ('fusion',),
  MEMORIES: ('dataset', 'memory'),
}


def _check_meaning(
  wanted,
  config: RunConfig,
  dataset: Dataset,
  run: RunFolder,
  moves_content: bool,
  refuse,
) -> None:
  """Refuses parameters that would fit but mean something else."""
  # Whatever their files and flags are called.
  same_data = run.data_fingerprint() == dataset.fingerprint()
  same_data = same_data or run.is_of_network(dataset)
  for name in wanted:
    for group in _groups_of(name):
      _check_group(
        group,
        config,
        run.config(),
        same_data,
        moves_content,
        partial(refuse, name),
      )


def _moves_content(
  wanted, config: RunConfig, dataset: Dataset, run: RunFolder
) -> bool:
  """Whether embeddings of other data can be put on this run's content: its run
  kept its own, and all that embeddings are made of is asked for."""
  return (
    isinstance(config.model.item_embedding, ContentPlusId)
    and run.data_fingerprint() != dataset.fingerprint()
    and run.content() is not None
    and all(
      _asker(name, _askers(wanted))
      for name in (vocabulary.ITEM_TABLE, PROJECTION)
    )
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
  group: str,
  config: RunConfig,
  other: RunConfig,
  same_data: bool,
  moves_content: bool,
  refuse,
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
  is_generated = config.data.synthetic is not None
  on_features = {
    'embeddings': (
      isinstance(config.model.item_embedding, ContentPlusId)
      and not moves_content
      or is_generated
    ),
    'experts': True,
    # A memory is ids and counters, a prototype a mean of features.
    MEMORIES: bool(config.global_memory) or is_generated,
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


def _match_items(dataset: Dataset, run: RunFolder, refuse) -> _Match:
  """Matches the rows of the item tables, [V] with the padding row."""
  # Row 0 is padding on both sides; an item may bear its id, 0, too.
  return _match(
    dataset.item_ids[1:].tolist(), run.ids()['item_ids'], 1, 'items', refuse
  )


def _match_users(
  dataset: Dataset, run: RunFolder, refuse
) -> tuple[_Match, np.ndarray]:
  """Matches the clients; and [V there] the row here of each item there, 0 for
  those that this run does not have."""
  ids = run.ids()
  here = {
    item: row for row, item in enumerate(dataset.item_ids.tolist()) if row
  }
  kept = [0, *(here.get(item, 0) for item in ids['item_ids'][1:])]
  users = _match(dataset.user_ids.tolist(), ids['user_ids'], 0, 'users', refuse)
  return users, np.array(kept)


def _match(
  own: list[Any], there: list[Any], padding: int, kind: str, refuse
) -> _Match:
  """Matches ids; the first `padding` rows are nobody's on both sides."""
  theirs = {id_: row for row, id_ in enumerate(there) if row >= padding}
  rows = np.array([*range(padding), *(theirs.get(id_, -1) for id_ in own)])
  known = int((rows >= padding).sum())
  if not known:
    shown = ', '.join(map(str, own[:3]))
    refuse(
      f"none of this run's {len(own)} {kind} is in it, by id (here {shown}, …; "
      f'there {", ".join(map(str, there[padding:][:3]))}, …)'
    )
  return _Match(rows, len(theirs) - known)


def _with_new(
  fresh: np.ndarray, loaded: np.ndarray, new: np.ndarray, turns: bool
) -> np.ndarray:
  """[V, D] the loaded item table with the fresh rows of the new items.

  Directions of content are principal components, other axes in another
  catalogue: fresh rows are turned as those of the known items have to be to
  come closest to what was loaded (orthogonal Procrustes, Schönemann 1966).
  """
  rows = fresh[new]
  if turns:
    known = np.setdiff1d(np.arange(1, len(fresh)), new)
    rows = rows @ _turn(fresh[known], loaded[known])
  table = loaded.copy()
  table[new] = rows
  return table


def _turn(rows: np.ndarray, like: np.ndarray) -> np.ndarray:
  """[D, D] the orthogonal matrix that takes rows [n, D] closest to others."""
  left, _, right = np.linalg.svd(rows.T @ like)
  return left @ right


def _on_other_content(
  params: dict[str, np.ndarray],
  before: np.ndarray,
  content: np.ndarray,
  new: np.ndarray,
) -> dict[str, np.ndarray]:
  """Rows and projection that give the same embeddings, content @ projection +
  row, with this run's content; new items get them of the turned projection.

  Args:
    params: as loaded, zero rows for new items.
    before: [V, D] the content that they belong to, zeros for new items.
    content: [V, D] that of this run.
    new: [n] the new items.
  """
  known = np.setdiff1d(np.arange(1, len(content)), new)
  projection = np.asarray(params[PROJECTION])
  turned = _turn(content[known], before[known]) @ projection
  table = np.array(params[vocabulary.ITEM_TABLE])
  table[known] += before[known] @ projection - content[known] @ turned
  return {vocabulary.ITEM_TABLE: table, PROJECTION: turned}


def _of_users(
  saved: dict[str, np.ndarray], users: _Match, kept: np.ndarray
) -> dict[str, np.ndarray]:
  """The memories [K, …] of this run's users, over its own catalogue."""
  # Without slots there are only clocks.
  memories = {n: x if x is None else users.taken(x) for n, x in saved.items()}
  if memories['item'] is None:
    return memories
  items = kept[memories['item']].astype(memories['item'].dtype)
  for name, x in memories.items():
    if x.shape == items.shape:  # of each slot; those of other items are empty
      memories[name] = np.where(items > 0, x, np.zeros_like(x))
  return memories | {'item': items}


def _told_of_items(
  group: str, count: int, items: _Match, from_content: bool
) -> list[Part]:
  new = len(items.new)
  width = count // len(items.rows)
  known = len(items.rows) - 1 - new
  name = vocabulary.ITEM_TABLE
  return _told(
    name,
    group,
    (count - new * width, f'{known} items, matched by id', items.left),
    (
      new * width,
      f'{new} new items, '
      + ('from their content' if from_content else 'as drawn'),
    ),
  )


def _told_of_memories(count: int, users: _Match) -> list[Part]:
  new = len(users.new)
  width = count // len(users.rows)
  known = len(users.rows) - new
  return _told(
    MEMORIES,
    MEMORIES,
    (count - new * width, f'{known} users, matched by id', users.left),
    (new * width, f'{new} new users, empty'),
  )


def _told(
  name: str, group: str, known: tuple[int, str, int], new: tuple[int, str]
) -> list[Part]:
  """The row of what was matched, and that of what is new if there is any."""
  count, note, left = known
  note += f'; {left} others left there' if left else ''
  told = [Part(name, group, LOADED, count, note)]
  return told + ([Part(name, group, INITIAL, *new)] if new[0] else [])


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
