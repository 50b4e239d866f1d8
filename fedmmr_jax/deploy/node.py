"""A node: the clients whose interactions lie on one machine, and what they do
when the server asks. A message in, an answer out; nothing else leaves it.

The messages, in the order in which a node meets them (docs/deploy.md):

* `enrol`: here are the items; who are your clients?
* `count`: how many of your clients have each item?
* `sketch`: which items stand in the same histories (`collaborative.py`)?
* `setup`: here are the features, and your clients' numbers in the federation;
  with `shrinkage`, how often did some of them train on each item?
* `train`: here are the parameters; train these clients for one round.
* `validate`: here are the parameters; how well do they rank?

A node keeps in `state/<federation>/` what it was told in `enrol` and `setup`,
and for each client what belongs to it alone: its memory and what drift control
keeps. Both are kept as they were before and after the client's last training.
The server says which trainings it has used, so an update that came too late, or
a server that goes on from an earlier round, does not leave a client ahead.
"""

import dataclasses
import json
import pathlib
import sys
from functools import partial
from typing import Any, Iterator, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax import files
from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.client import memory as memory_lib
from fedmmr_jax.client import update as client_lib
from fedmmr_jax.client import windows
from fedmmr_jax.client.memory import Memory
from fedmmr_jax.client.update import Broadcast, ClientProgram, ClientUpdate
from fedmmr_jax.config import RunConfig
from fedmmr_jax.data import dataset as dataset_lib
from fedmmr_jax.data import formats, selection, sources
from fedmmr_jax.data import load as load_lib
from fedmmr_jax.data.dataset import ClientData, Dataset, FederatedData
from fedmmr_jax.deploy import catalogue as catalogue_lib
from fedmmr_jax.deploy.parcel import (
  pack,
  pack_rows,
  Parcel,
  unpack,
  unpack_rows,
)
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import popularity, ranking
from fedmmr_jax.evaluation.ranking import Targets
from fedmmr_jax.federation import collaborative, devices
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.models.feddmmr import Catalogue
from fedmmr_jax.simulation import Simulation

STATE = 'state'
_PLAN, _IDS, _CATALOGUE = 'plan.json', 'item_ids.npz', 'catalogue.npz'
NOT_SET_UP = 'not_set_up'  # a fact of an answer: send `setup` first
_NEVER = 0  # the round of a client that has not trained yet


class Refusal(UserError):
  """An error that tells nothing of a node's files, so that it may leave it."""


class Client(NamedTuple):
  """What belongs to one client alone.

  Attributes:
    memory: its memory; None in a model without experts.
    kept: its drift-control state; None without one.
  """

  memory: Memory | None
  kept: Any


class Node:
  """The clients of one folder.

  Args:
    folder: the node's own; `state/` is written into it.
    data: the interaction file, or a folder that holds it; '' = `folder`.
    format: as the setting `dataset`, of that file.
  """

  def __init__(
    self, folder: str | pathlib.Path, data: str = '', format: str = formats.AUTO
  ):
    self.folder = pathlib.Path(folder)
    self._data = data or str(folder)
    self._format = format
    # Of a federation; a process that answers several messages reads once.
    self._datasets: dict[str, Dataset] = {}
    self._bound: dict[str, tuple[Simulation, dict[str, Any]]] = {}

  def answer(self, kind: str, asked: Parcel) -> Parcel:
    """The answer to a message; what cannot be answered is a fact 'error', and
    is told in full on this machine only: it may quote lines of its files."""
    answers = {
      'enrol': self._enrol,
      'count': self._count,
      'sketch': self._sketch,
      'setup': self._set_up,
      'train': self._train,
      'validate': self._validate,
    }
    try:
      if kind not in answers:
        raise Refusal(
          f'a message {kind!r} is not known here; server and nodes need the '
          'same version of fedmmr_jax'
        )
      federation = str(asked.facts['federation'])
      if not federation.isalnum():  # it becomes the name of a folder
        raise Refusal(f'{federation!r} is no name of a federation')
      place = self.folder / STATE / federation
      place.mkdir(parents=True, exist_ok=True)
      with files.Lock(place / '.lock'):
        return answers[kind](federation, place, asked)
    except BlockingIOError:
      return Parcel({'error': 'busy with the message before'})
    except Refusal as error:
      return Parcel({'error': str(error)})
    except (UserError, OSError) as error:
      _log(f'no answer to {kind}: {error}')
      return Parcel({'error': f"cannot answer {kind}; see the node's log"})

  def _enrol(self, federation, place, asked) -> Parcel:
    item_ids = asked.arrays['item_ids']
    config = RunConfig.from_flat_dict(asked.facts['config']).validate()
    catalogue_lib.save_arrays(place / _IDS, {'item_ids': item_ids})
    self._bound.pop(federation, None)
    dataset, notes = own_dataset(self._data, self._format, config, item_ids)
    self._datasets[federation] = dataset
    targets = Targets.of(dataset, 'val')
    _write_plan(
      place,
      {'config': asked.facts['config'], 'fingerprint': dataset.fingerprint()},
    )
    return Parcel(
      {
        'clients': [
          list(client)
          for client in zip(
            dataset.user_ids.tolist(),
            dataset.lengths.tolist(),
            dataset.num_train.tolist(),
            dataset.num_disliked.tolist(),
            np.isin(np.arange(dataset.num_clients), targets.client).tolist(),
          )
        ],
        'notes': notes,
      }
    )

  def _count(self, federation, place, asked) -> Parcel:
    _, dataset = self._data_of(federation, place)
    counts = collaborative.count(
      dataset, _places(dataset, asked.facts['clients'])
    )
    return Parcel({}, pack_rows('counts', counts))

  def _sketch(self, federation, place, asked) -> Parcel:
    config, dataset = self._data_of(federation, place)
    start = config.model.item_embedding
    _, probe = collaborative.draw(
      config, asked.facts['taking_part'], dataset.num_rows
    )
    if start.collaborative_items:
      counts = unpack_rows(asked.arrays, 'counts', np.zeros(dataset.num_rows))
      probe = collaborative.of_frequent(
        probe, counts, start.collaborative_items
      )
    clients = _places(dataset, asked.facts['clients'])
    total = collaborative.sketch(
      dataset, clients, probe, start.collaborative_window
    )
    return Parcel({}, pack_rows('sketched', total))

  def _set_up(self, federation, place, asked) -> Parcel:
    plan = _read_plan(place)
    catalogue_lib.save_arrays(place / _CATALOGUE, asked.arrays)
    told = 'max_items', 'numbers', 'text_ids', 'features'
    plan |= {name: asked.facts[name] for name in told}
    _write_plan(place, plan)
    self._bound.pop(federation, None)
    _, dataset = self._data_of(federation, place)
    clients = np.array(list(_places(dataset, asked.facts['counted'])), int)
    counts = popularity.training_counts(dataset, clients)
    return Parcel({}, pack_rows('counts', counts))

  def _train(self, federation, place, asked) -> Parcel:
    if 'max_items' not in _read_plan(place):
      return Parcel({NOT_SET_UP: True, 'error': 'not set up yet'})
    simulation, plan = self._bound_to(federation, place)
    program, config = simulation.program.client, simulation.config
    broadcast = unpack(
      asked.arrays, broadcast_like(simulation), 'parameters'
    )._replace(catalogue=simulation.catalogue)
    number = asked.facts['round']
    key = round_lib.round_key(config.seed, number)
    at = {n: place for place, n in enumerate(plan['numbers'])}
    updates, trained, notes = [], [], []
    for client, used in asked.facts['clients']:
      before = _read_client(place, client, used, simulation, notes)
      if before is None:
        continue
      trained.append(client)
      update = train_client(
        program,
        broadcast,
        view_of(simulation.data, at[client], plan['max_items']),
        before.memory,
        before.kept,
        jax.random.fold_in(key, client),
      )
      after = Client(update.memory, update.kept)
      _write_client(place, client, used, before, number, after)
      updates.append(pack(to_send(update)))
    return Parcel(
      {'clients': trained, 'notes': notes},
      {
        name: np.stack([x[name] for x in updates])
        for name in (updates[0] if updates else ())
      },
    )

  def _validate(self, federation, place, asked) -> Parcel:
    if 'max_items' not in _read_plan(place):
      return Parcel({NOT_SET_UP: True, 'error': 'not set up yet'})
    simulation, plan = self._bound_to(federation, place)
    broadcast = unpack(
      asked.arrays, ranked_like(simulation), 'parameters'
    )._replace(catalogue=simulation.catalogue)
    split = asked.facts['split']
    at = {n: place for place, n in enumerate(plan['numbers'])}
    notes: list[str] = []
    clients = {
      at[client]: _read_client(place, client, used, simulation, notes)
      for client, used in asked.facts['clients']
    }
    clients = {row: x for row, x in clients.items() if x is not None}
    targets = Targets.of(simulation.dataset, split).of_clients(
      np.array(list(clients), int)
    )
    if not len(targets.client):
      return Parcel({'notes': notes, 'sums': {}, 'count': 0})
    ranks = []
    for row, after_train, known in zip(*targets[:3]):
      ranks.append(
        rank_one(
          simulation.model,
          simulation.compiled_config,
          broadcast,
          view_of(simulation.data, row, plan['max_items']),
          clients[row].memory,
          jnp.int32(after_train),
          jnp.int32(known),
          jnp.int32(ranking.SPLITS[split]),
        )
      )
    found = jax.tree.map(lambda *x: np.array(x), *ranks)
    ranking.check_finite(found, split)
    values = {
      protocol: {
        name: float(metrics_lib.of_users(each, targets.client).sum())
        for name, each in metrics_lib.ranking_of_each(
          getattr(found, protocol), simulation.metrics
        ).items()
      }
      for protocol in metrics_lib.PROTOCOLS
    }
    count = len(np.unique(targets.client))
    return Parcel({'notes': notes, 'sums': values, 'count': count})

  def _data_of(self, federation, place) -> tuple[RunConfig, Dataset]:
    plan = _read_plan(place)
    config = RunConfig.from_flat_dict(plan['config']).validate()
    if federation not in self._datasets:
      item_ids = catalogue_lib.load_arrays(place / _IDS)['item_ids']
      dataset, _ = own_dataset(self._data, self._format, config, item_ids)
      # Numbers, memories and held-out items belong to what has enrolled.
      if dataset.fingerprint() != plan['fingerprint']:
        raise Refusal(
          'its interactions have changed since it enrolled; put the file back, '
          'or start the server anew'
        )
      self._datasets[federation] = dataset
    return config, self._datasets[federation]

  def _bound_to(self, federation, place) -> tuple[Simulation, dict[str, Any]]:
    """The node's clients with the federation's items, and its plan."""
    if federation not in self._bound:
      config, dataset = self._data_of(federation, place)
      plan = _read_plan(place)
      if plan['text_ids']:  # draws are by the federation's spelling
        texts = dataset.user_ids.astype(str)
        dataset = dataclasses.replace(dataset, user_ids=texts)
      # Who takes part has been decided among all clients.
      config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, new_clients=0.0)
      )
      arrays = catalogue_lib.load_arrays(place / _CATALOGUE)
      features = {name: arrays[name] for name in plan['features']}
      self._bound[federation] = (
        simulation_lib.assemble(
          config,
          dataclasses.replace(dataset, features=features),
          devices.copied(Catalogue.of(features, arrays['content'])),
          simulation_lib.to_device(config, dataset),
        ),
        plan,
      )
    return self._bound[federation]


def own_dataset(
  data: str, format: str, config: RunConfig, item_ids: np.ndarray
) -> tuple[Dataset, list[str]]:
  """The clients of one node, over the items that the federation has agreed on.

  Args:
    data: file or folder.
    format: as the setting `dataset`.
    config: its split and `min_interactions`.
    item_ids: [V] ids of the catalogue.

  Returns:
    The clients, and lines about what was left out.

  Raises:
    UserError: as `sources.read`; or the catalogue has none of the items, or no
      client has enough of them.
  """
  found = sources.read(sources.find(format, data, 'data'))
  rows_of = {str(item): row for row, item in enumerate(item_ids[1:].tolist())}
  rows = np.array([rows_of.get(str(i), -1) for i in found.item_ids.tolist()])
  known = rows[found.items] >= 0
  if not known.any():
    raise UserError(
      f"{data}: the federation's catalogue has none of its items; are the ids "
      'the same?'
    )
  notes = []
  if not known.all():
    notes.append(
      f'{(rows < 0).sum()} of {len(rows)} items are not in the catalogue; '
      f'their {(~known).sum()} interactions are left out'
    )
  own = found.where(known)
  own = own._replace(items=rows[own.items].astype(np.int32))
  selected = selection.select(
    'data',
    own._replace(item_ids=item_ids[1:]),
    load_lib.filters_of(config.data)._replace(k_core=0, top_k_users=0),
    whole_catalogue=True,
    tested=False,  # another node's clients may be
  )
  if selected.dropped_users:
    notes.append(
      f'{len(selected.dropped_users)} users have too few interactions and are '
      'left out'
    )
  return selected.dataset, notes


@partial(devices.jit, static_argnames='program')
def train_client(
  program: ClientProgram,
  broadcast: Broadcast,
  client: ClientData,
  memory: Memory | None,
  kept: Any,
  key: jax.Array,
) -> ClientUpdate:
  """`local_update` of one client, for as many steps as it needs."""
  steps = windows.num_steps(client.num_train, program.config)
  return client_lib.local_update(
    program, broadcast, client, memory, kept, key, jnp.asarray(steps, jnp.int32)
  )


rank_one = partial(devices.jit, static_argnames=('model', 'config'))(
  ranking.rank_target
)


def to_send(update: ClientUpdate) -> ClientUpdate:
  """An update without what stays with its client, and without what the server
  makes of it."""
  return update._replace(memory=None, kept=None, counts=None)


def view_of(data: FederatedData, client: int, max_items: int) -> ClientData:
  """`client_view`; its shapes depend on the federation's H alone, not on the
  node, so one compiled program serves all nodes."""
  return dataset_lib.client_view(data, jnp.int32(client), max_items)


def broadcast_like(simulation: Simulation) -> Broadcast:
  """Shapes and types of what a node is sent to train with; the catalogue, which
  it has, left out."""
  return _like(simulation, with_control=True)


def ranked_like(simulation: Simulation) -> Broadcast:
  """The same of what it is sent to rank with."""
  return _like(simulation, with_control=False)


def _like(simulation: Simulation, with_control: bool) -> Broadcast:
  server = simulation.abstract_state.server
  drift = [simulation.drift] if with_control else []

  def broadcast(server):
    return server.broadcast(None, simulation.config, *drift)

  return jax.eval_shape(broadcast, server)


def update_like(simulation: Simulation, max_items: int) -> ClientUpdate:
  """Shapes and types of what one client sends, see `to_send`."""
  size = simulation.config.data.sampled_negatives

  def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)

  view = ClientData(
    history=ids(max_items),
    num_items=ids(),
    num_train=ids(),
    avoided=ids(max_items),
    num_avoided=ids(),
    sampled_negatives=ids(dataset_lib.HELD_OUT, size),
    num_drawable=ids(),
  )
  client = jax.eval_shape(partial(_fresh_client, simulation))
  return to_send(
    jax.eval_shape(
      # Traced within this, it may not name options of the compiler.
      partial(train_client.__wrapped__, simulation.program.client),
      broadcast_like(simulation)._replace(catalogue=simulation.catalogue),
      view,
      client.memory,
      client.kept,
      jax.eval_shape(lambda: jax.random.key(0)),
    )
  )


def _fresh_client(simulation: Simulation) -> Client:
  """A client before its first round."""
  params = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    simulation.abstract_state.server.params,
  )
  return Client(
    None
    if simulation.model.is_backbone_only
    else memory_lib.init(simulation.config.memory),
    simulation.drift.client_state(params),
  )


def _read_client(
  place: pathlib.Path,
  number: int,
  used: int,
  simulation: Simulation,
  notes: list[str],
) -> Client | None:
  """What a client kept from the training that the server used last; None if it
  is of other rounds, or damaged.

  Args:
    place: the federation's folder.
    number: the client's.
    used: round of that training; 0 = none.
    simulation: for its shapes.
    notes: gets a line if it is lost or cannot be used.
  """
  fresh = _fresh_client(simulation)
  if used == _NEVER or not jax.tree.leaves(fresh):
    return fresh
  path = _client_path(place, number)
  if not path.exists():
    notes.append(
      f'client {number}: what it kept since round {used} is lost; it starts '
      'afresh'
    )
    return fresh
  try:
    arrays = catalogue_lib.load_arrays(path)
    for when in ('after', 'before'):
      if int(arrays[f'{when}_round']) == used:
        own = {
          name.removeprefix(when): x
          for name, x in arrays.items()
          if name.startswith(when)
        }
        return jax.tree.map(jnp.asarray, unpack(own, fresh, str(path)))
    raise UserError(
      f'{path}: it holds the client after rounds '
      f'{int(arrays["before_round"])} and {int(arrays["after_round"])}, but '
      f'the server used its training of round {used}'
    )
  except (UserError, KeyError) as error:
    _log(f'{error}; remove the file, and the client starts afresh')
    notes.append(
      f'client {number}: what it kept cannot be used, and it is left out; see '
      "the node's log"
    )
    return None


def _write_client(
  place: pathlib.Path,
  number: int,
  used: int,
  before: Client,
  trained: int,
  after: Client,
) -> None:
  """Keeps a client as it was before and after a training."""
  if not jax.tree.leaves(after):
    return
  path = _client_path(place, number)
  path.parent.mkdir(exist_ok=True)
  arrays = {}
  for when, round_number, client in (
    ('before', used, before),
    ('after', trained, after),
  ):
    arrays[f'{when}_round'] = np.int32(round_number)
    arrays |= {when + name: x for name, x in pack(client).items()}
  catalogue_lib.save_arrays(path, arrays)


def _client_path(place: pathlib.Path, number: int) -> pathlib.Path:
  return place / 'clients' / f'{number}.npz'


def _places(dataset: Dataset, ids: list) -> Iterator[int]:
  """Where the clients of some ids are."""
  of = {
    str(user): place for place, user in enumerate(dataset.user_ids.tolist())
  }
  return (of[str(user)] for user in ids)


def _read_plan(place: pathlib.Path) -> dict[str, Any]:
  path = place / _PLAN
  if not path.exists():
    return {}
  return json.loads(path.read_text('utf-8'))


def _write_plan(place: pathlib.Path, plan: dict[str, Any]) -> None:
  files.replace(place / _PLAN, json.dumps(plan))


def _log(line: str) -> None:
  print(line, file=sys.stderr, flush=True)
