"""The server of a federation whose clients lie on nodes (`node.py`): it samples
the cohorts of the simulation, sends the parameters, and combines what comes
back with the same aggregator and server step.

How messages travel is a `Link`'s business; `flower_server` has Flower's. What
does not come back by the deadline is not waited for.
"""

import dataclasses
import json
import pathlib
import secrets
import time
from functools import partial
from typing import Any, Callable, NamedTuple, Protocol, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax import files
from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.client import memory as memory_lib
from fedmmr_jax.client import update as client_lib
from fedmmr_jax.client.drift import Cohort
from fedmmr_jax.client.update import ClientUpdate
from fedmmr_jax.client.vocabulary import ITEM_TABLE
from fedmmr_jax.client.windows import num_positives
from fedmmr_jax.config import (
  ContentInit,
  ContentPlusId,
  Given,
  MEMORIES,
  RunConfig,
)
from fedmmr_jax.data import features as features_lib
from fedmmr_jax.data.dataset import taking_part
from fedmmr_jax.deploy import node as node_lib
from fedmmr_jax.deploy.catalogue import SharedCatalogue
from fedmmr_jax.deploy.parcel import (
  pack,
  pack_rows,
  Parcel,
  unpack,
  unpack_rows,
)
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import ranking
from fedmmr_jax.federation import collaborative, devices, rejection
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.federation import server as server_lib
from fedmmr_jax.federation.communication import NOTHING, Traffic
from fedmmr_jax.federation.devices import PADDING_CLIENT
from fedmmr_jax.federation.round import FederationState, RoundProgram
from fedmmr_jax.federation.server import ServerState
from fedmmr_jax.models import shrinkage
from fedmmr_jax.runs import training
from fedmmr_jax.runs.checkpoint import Checkpoint, Progress, Rounds, Saver
from fedmmr_jax.runs.run_folder import RunFolder
from fedmmr_jax.streams import generator, Stream

ROSTER = 'federation.json'


# Settings that hold over a network too; the others are of a simulation.
_RULES_OF_A_SERVER = ('rejection', 'min_answers')


class Link(Protocol):
  """How a server reaches its nodes."""

  def nodes(self) -> list[int]:
    """Names of the nodes that are connected now."""

  def exchange(
    self, kind: str, parcels: dict[int, Parcel], timeout: float
  ) -> dict[int, Parcel]:
    """Sends each node a message and returns the answers that came within
    `timeout` seconds; a node that failed has an answer with a fact 'error', or
    none."""


class Roster(NamedTuple):
  """The clients of a federation, in the order of their ids. A client's place is
  its number, in the simulation as here, and with it its random draws.

  Attributes:
    federation: a name of its own.
    ids: [K].
    num_items, num_train, num_disliked: [K] each.
    validated: [K] whether a client has a validation target.
    counts: [V] training interactions with each item; None without `shrinkage`.
    counted: numbers of the clients whose interactions they count.
  """

  federation: str
  ids: list[Any]
  num_items: list[int]
  num_train: list[int]
  num_disliked: list[int]
  validated: list[bool]
  counts: list[int] | None = None
  counted: Sequence[int] = ()

  @classmethod
  def of(cls, clients: Sequence[list], top: int = 0) -> 'Roster':
    """The clients that nodes have enrolled.

    Args:
      clients: of each its id and the other fields.
      top: how many of them, those with the most items (ties: the lower id); 0 =
        all.
    """
    if any(isinstance(client[0], str) for client in clients):
      clients = [[str(client[0]), *client[1:]] for client in clients]
    chosen = sorted(clients)
    if top:
      active = sorted(chosen, key=lambda client: -client[1])[:top]
      chosen = sorted(active)
    return cls(secrets.token_hex(6), *map(list, zip(*chosen)))

  @property
  def max_items(self) -> int:
    """H, as `Dataset.max_items`."""
    return max(map(sum, zip(self.num_items, self.num_disliked)))

  @property
  def number_of(self) -> dict[str, int]:
    """Id as text -> number."""
    return {str(user): number for number, user in enumerate(self.ids)}

  def write(self, folder: pathlib.Path) -> None:
    files.replace(folder / ROSTER, json.dumps(self._asdict()) + '\n')

  @classmethod
  def read(cls, folder: pathlib.Path) -> 'Roster | None':
    """The roster of a run folder, or None.

    Raises:
      UserError: it is damaged.
    """
    path = folder / ROSTER
    if not path.exists():
      return None
    try:
      return cls(**json.loads(path.read_text('utf-8')))
    except (ValueError, TypeError) as error:
      raise UserError(f'{path}: damaged ({error})') from None


def check(config: RunConfig) -> None:
  """Raises UserError for a setting that a federation over a network cannot
  keep."""
  data = config.data
  if data.k_core:
    raise UserError(
      f'`k_core={data.k_core}` counts the interactions of all clients, which '
      'no server sees; filter when the catalogue is made, and say `k_core=0`'
    )
  if data.cold_items:
    raise UserError(
      f'`cold_items={data.cold_items}` hides items from everybody, for an '
      'experiment; say `cold_items=0`'
    )
  if isinstance(data.split_by, Given):
    raise UserError(
      f'`split_by={data.split_by}` depends on the parts that all interactions '
      'have, which no server sees; say leave_one_out or timeline'
    )
  if config.federation.personal:
    raise UserError(
      f'`personal={config.federation.personal}`: a node keeps its memory and '
      'drift control between rounds, and no parameters; say `personal=`'
    )
  for field in dataclasses.fields(config.federation):
    value = getattr(config.federation, field.name)
    if value != field.default and field.name not in _RULES_OF_A_SERVER:
      raise UserError(
        f'`{field.name}={value}` is simulated; a federation over a network has '
        f'it from the world or not at all; say `{field.name}={field.default}`'
      )
  for kind in features_lib.KINDS:
    named = getattr(data, f'{kind}_features')
    if named not in (features_lib.AUTO, features_lib.NONE):
      raise UserError(
        f'`{kind}_features={named}`: over a network features come from the '
        'catalogue; say auto or none'
      )
  if MEMORIES in config.start.load_groups:
    raise UserError(
      f'`load={config.start.load}`: memories stay with their nodes, a server '
      f'has none to load; leave out {MEMORIES}'
    )


class Server:
  """Trains a federation over a network into a run folder.

  Args:
    config: settings, as for a simulation.
    catalogue: the items.
    link: to the nodes.
    run: the folder; a run in it is continued.
    min_nodes: how many nodes to wait for before anything else.
    round_timeout: seconds to wait for the answers to a message.
    say: called with each line for people.

  Raises:
    UserError: see `check`.
  """

  def __init__(
    self,
    config: RunConfig,
    catalogue: SharedCatalogue,
    link: Link,
    run: RunFolder,
    min_nodes: int = 1,
    round_timeout: float = 600.0,
    say: Callable[[str], None] = print,
  ):
    check(config)
    self._config = config
    self._catalogue = _with_features(catalogue, config)
    self._link = link
    self._run = run
    self._min_nodes = min_nodes
    self._timeout = round_timeout
    self._say = say
    self._homes: dict[int, int] = {}  # client -> node
    self._enrolled: dict[int, list[int]] = {}  # node -> numbers, −1 = none
    self._ready: set[int] = set()  # nodes that are set up
    self._silent: set[int] = set()  # nodes without an answer in this round
    self._traffic = NOTHING

  def train(self) -> ServerState:
    """Trains to the end, from the last saved round if there is one; returns the
    server's last state.

    Raises:
      UserError: too few nodes, a client on two nodes, nothing to train on, the
        run folder holds another run, or the training diverged.
    """
    self._run.check_free(resume=True)
    self._run.hold(self._config)  # before nodes are told anything
    self._wait_for_nodes()
    roster = Roster.read(self._run.path)
    if roster is None:
      roster = self._first_roster()
    self._roster = roster
    self._settle()
    content = self._run.content()
    if content is None:
      content = self._content()
    dataset = self._catalogue.dataset(roster.ids)
    self._simulation = simulation_lib.assemble(
      self._config,
      dataset,
      simulation_lib.catalogue_of(self._config, dataset, content),
      None,
    )
    self._program = RoundProgram(
      self._simulation.program.client,
      self._simulation.aggregator,
      roster.max_items,
      self._simulation.transforms,
    )
    self._like = node_lib.update_like(self._simulation, roster.max_items)
    self._run.start(self._config, dataset)
    self._run.keep_content(np.asarray(self._simulation.catalogue.content))
    self._roster.write(self._run.path)
    self._set_up()
    self._say(
      f'{len(roster.ids)} clients on {len(self._enrolled)} nodes, '
      f'{self._simulation.model.num_rows - 1} items; run folder '
      f'{self._run.path}'
    )
    return self._rounds()

  def _rounds(self) -> ServerState:
    rounds = Rounds(self._run.path, create=True)
    rounds.clear_leftovers()
    checkpoint, last, wall_before = self._restore(rounds)
    used = {}  # client -> the round of its last training that counted
    for record in self._run.records():
      used |= dict.fromkeys(record['answered'], record['round'])
    started = time.perf_counter()
    with Saver(rounds, self._config.keep) as saver:
      for number in range(last + 1, self._config.server.num_rounds + 1):
        if training.out_of_patience(
          number - 1, checkpoint.progress, self._config
        ):
          break
        state, record = self._round(checkpoint.state, number, used)
        round_lib.check_finite_state(state, number)
        used |= dict.fromkeys(record['answered'], number)
        progress = checkpoint.progress
        if training.due(number, self._config):
          progress = self._validated(state.server, record, used, progress)
        self._traffic = NOTHING  # of validating, too
        self._silent.clear()
        checkpoint = Checkpoint(state, progress)
        saver.save(
          number,
          checkpoint,
          record,
          wall_before + time.perf_counter() - started,
        )
        saver.wait()  # what is saved and what nodes keep go together
        self._run.append(record)
        self._say(_told(record, self._config.server.num_rounds))
    return checkpoint.state.server

  def _wait_for_nodes(self) -> None:
    self._say(f'waiting for {self._min_nodes} nodes')
    deadline = time.monotonic() + self._timeout
    while len(found := self._link.nodes()) < self._min_nodes:
      if time.monotonic() > deadline:
        raise UserError(
          f'{len(found)} of {self._min_nodes} nodes have connected within '
          f'{self._timeout:g} seconds'
        )
      time.sleep(0.5)

  def _first_roster(self) -> Roster:
    name = secrets.token_hex(6)
    answers = self._enrol(name, self._link.nodes())
    seen: dict[str, int] = {}
    for node, clients in answers.items():
      for client in clients:
        if str(client[0]) in seen:
          raise UserError(
            f'client {client[0]} is on nodes {seen[str(client[0])]} and '
            f'{node}; a client has one node'
          )
        seen[str(client[0])] = node
    clients = [client for found in answers.values() for client in found]
    if not clients:
      raise UserError('no node has a client; see what the nodes answered')
    roster = Roster.of(clients, self._config.data.top_k_users)
    if not taking_part(
      np.array(roster.num_train), self._config.data.new_clients
    ).size:
      raise UserError('nothing to train on: no client has a training item')
    self._place(roster, answers)
    return roster._replace(federation=name)

  def _settle(self) -> None:
    """Enrols nodes that are not known yet."""
    new = [n for n in self._link.nodes() if n not in self._enrolled]
    if new:
      self._place(self._roster, self._enrol(self._roster.federation, new))

  def _enrol(self, federation: str, nodes: list[int]) -> dict[int, list[list]]:
    """Node -> its clients, of the nodes that answer."""
    asked = Parcel(
      {'federation': federation, 'config': self._config.as_flat_dict()},
      {'item_ids': self._catalogue.item_ids},
    )

    def clients(answer):
      return [
        [user, int(items), int(train), int(disliked), bool(validated)]
        for user, items, train, disliked, validated in answer.facts['clients']
      ]

    return self._exchange('enrol', dict.fromkeys(nodes, asked), clients)

  def _place(self, roster: Roster, answers: dict[int, list[list]]) -> None:
    """Notes which node has which clients."""
    number_of = roster.number_of
    counts = list(zip(roster.num_items, roster.num_train, roster.num_disliked))
    for node, clients in answers.items():
      numbers = [number_of.get(str(client[0]), -1) for client in clients]
      for place, (client, number) in enumerate(zip(clients, numbers)):
        if number >= 0 and tuple(client[1:4]) != counts[number]:
          self._say(
            f'node {node}: client {client[0]} has other interactions than when '
            'the run began; it is left out'
          )
          numbers[place] = -1
      unknown = numbers.count(-1)
      if unknown:
        self._say(
          f'node {node}: {unknown} of {len(clients)} clients are not in this '
          'federation'
        )
      self._enrolled[node] = numbers
      homes = {n: at for n, at in self._homes.items() if at != node}
      self._homes = homes | {n: node for n in numbers if n >= 0}

  def _content(self) -> np.ndarray:
    """[V, D] what items' embeddings start from; the sketch of who stands with
    whom is collected from the nodes."""
    config, roster = self._config, self._roster
    dataset = self._catalogue.dataset(roster.ids)
    content = simulation_lib.feature_content(config, dataset)
    start = config.model.item_embedding
    if not isinstance(start, ContentInit) or not start.collaborative_dim:
      return content
    num_train = np.array(roster.num_train)
    part = taking_part(num_train, config.data.new_clients)
    places, probe = collaborative.draw(config, len(part), dataset.num_rows)
    asked = self._by_node(part[places].tolist())

    def collected(kind, name, like, arrays):
      parcels = {
        node: Parcel(
          {
            'federation': roster.federation,
            'taking_part': len(part),
            'clients': [roster.ids[client] for client in clients],
          },
          arrays,
        )
        for node, clients in asked.items()
      }
      answers = self._exchange(
        kind, parcels, lambda x: unpack_rows(x.arrays, name, like)
      )
      return answers, sum(
        (answers[n] for n in sorted(answers)), np.zeros_like(like)
      )

    told = {}
    if start.collaborative_items:
      _, counts = collected('count', 'counts', np.zeros(len(probe)), {})
      probe = collaborative.of_frequent(
        probe, counts, start.collaborative_items
      )
      told = pack_rows('counts', counts * probe.any(axis=1))
    answers, total = collected('sketch', 'sketched', probe, told)
    self._say(
      f'sketch of {sum(len(asked[node]) for node in answers)} of '
      f'{len(places)} clients'
    )
    found = collaborative.factors(total, probe, start.collaborative_dim)
    return collaborative.joined(content, found, config.model.hidden_dim)

  def _set_up(self) -> None:
    """Sends the features and the clients' numbers to the nodes that lack them,
    and adds how often their clients train on each item, if that is needed and
    they have not told it before."""
    catalogue, config = self._simulation.catalogue, self._config
    connected = set(self._link.nodes())
    start = config.model.item_embedding
    wanted = isinstance(start, ContentPlusId) and bool(start.shrinkage)
    part = set(
      taking_part(
        np.array(self._roster.num_train), config.data.new_clients
      ).tolist()
      if wanted
      else ()
    ) - set(self._roster.counted)
    parcels = {
      node: Parcel(
        {
          'federation': self._roster.federation,
          'max_items': self._roster.max_items,
          'numbers': numbers,
          'text_ids': isinstance(self._roster.ids[0], str),
          'features': list(catalogue.features),
          'counted': [self._roster.ids[n] for n in numbers if n in part],
        },
        {name: np.asarray(x) for name, x in catalogue.features.items()}
        | {'content': np.asarray(catalogue.content)},
      )
      for node, numbers in self._enrolled.items()
      if node in connected - self._ready
    }
    none = np.zeros(self._simulation.model.num_rows, int)
    answers = self._exchange(
      'setup', parcels, lambda x: unpack_rows(x.arrays, 'counts', none)
    )
    self._ready |= set(answers)
    if wanted and answers:
      before = none if self._roster.counts is None else self._roster.counts
      counted = {n for node in answers for n in self._enrolled[node]} & part
      self._roster = self._roster._replace(
        counts=sum(answers.values(), np.array(before)).tolist(),
        counted=sorted({*self._roster.counted, *counted}),
      )
      self._roster.write(self._run.path)

  def _restore(self, rounds: Rounds) -> tuple[Checkpoint, int, float]:
    """(state, its round, seconds spent so far)."""
    structure = Checkpoint(
      jax.eval_shape(self._fresh_state), jax.eval_shape(Progress.start)
    )
    if not rounds.numbers():
      if len(self._run.records()) > 1:
        raise UserError(
          f'{self._run.path}: there are metrics but no saved round to continue '
          'from; train in another folder'
        )
      self._run.rewind(None)
      state = self._fresh_state()
      if self._simulation.warm_start:
        state = self._simulation.warm_start.put_into(state)
      return Checkpoint(devices.copied(state), Progress.start()), 0, 0.0
    last = rounds.last()
    metadata = rounds.metadata(last)
    self._run.rewind(metadata['record'])
    return rounds.load(last, structure), last, metadata['wall_seconds']

  def _fresh_state(self) -> FederationState:
    """As a simulation's, with the memories of nobody: who opens the run later
    has those that a history makes. What drift control keeps is the nodes'."""
    simulation = self._simulation
    fresh = round_lib.init(
      self._program, simulation.catalogue, self._config.seed, 0
    )
    empty = (
      None
      if simulation.model.is_backbone_only
      else memory_lib.init(self._config.memory)
    )
    clients = len(self._roster.ids)
    return fresh._replace(
      memories=jax.tree.map(
        lambda x: jnp.zeros((clients, *x.shape), x.dtype), empty
      ),
      controls=None,
    )

  def _round(
    self, state: FederationState, number: int, used: dict[int, int]
  ) -> tuple[FederationState, dict[str, Any]]:
    """One round; `state.server` is donated."""
    start = time.perf_counter()
    self._settle()
    self._set_up()
    num_train = np.array(self._roster.num_train)
    cohort = round_lib.sample_cohort(self._config, number, num_train)
    asked = cohort[cohort >= 0].tolist()
    updates, counts = self._collect(state.server, number, asked, used)
    server, means = self._combine(state.server, len(asked), updates)
    answered = sorted(updates)
    trained = np.array(answered, int).reshape(-1, 1)
    record: dict[str, Any] = {
      'round': number,
      'train': training.ABSENT | means | counts,
      'targets': int(
        self._config.client.local_epochs
        * num_positives(num_train[trained], self._config).sum()
      ),
      'communication': self._traffic._asdict(),
      'masked_fraction': round_lib.masked_fraction(
        trained, num_train, self._config
      ),
      'seconds': time.perf_counter() - start,
      'asked': sorted(asked),
      'answered': answered,
    }
    return state._replace(server=server), record

  def _collect(
    self,
    server: ServerState,
    number: int,
    asked: list[int],
    used: dict[int, int],
  ) -> tuple[dict[int, ClientUpdate], dict[str, float]]:
    """(client -> its update, of the clients whose nodes answer in time; how
    many were asked, answered and were rejected, by the metrics' names)."""
    simulation = self._simulation
    arrays = pack(
      server.broadcast(None, simulation.config, simulation.drift)  # type: ignore
    )
    parcels = {
      node: Parcel(
        {
          'federation': self._roster.federation,
          'round': number,
          'clients': [[client, used.get(client, 0)] for client in clients],
        },
        arrays,
      )
      for node, clients in self._by_node(asked).items()
      if node in self._ready
    }
    updates: dict[int, ClientUpdate] = {}
    counts = dict.fromkeys(metrics_lib.REJECTED, 0.0)
    longest = rejection.of(simulation.config).broadcast(None, server.params)

    def trained(answer):
      return list(answer.facts['clients']), answer.arrays

    answers = self._exchange('train', parcels, trained)
    for node, (clients, found) in answers.items():
      self._traffic += Traffic(len(clients), 0, 0)
      mine = [client for client, _ in parcels[node].facts['clients']]
      for row, client in enumerate(clients):
        try:
          if client not in mine:
            raise UserError('it was not asked')
          update = unpack(
            {name: x[row] for name, x in found.items()},
            self._like,
            'its update',
          )
          if fault := _fault(update, longest):
            counts[fault] += 1
            raise UserError(_FAULTS[fault])
        except (UserError, IndexError) as error:
          self._say(f'node {node}: client {client} is left out: {error}')
        else:
          updates[client] = update._replace(counts=np.ones((), bool))
    least = simulation.config.federation.min_answers
    if len(updates) < least:
      self._say(f'{len(updates)} answers, fewer than `min_answers={least}`')
      updates = {}  # so that the clients go on from where they were
    counts[metrics_lib.ASKED] = float(len(asked))
    counts[metrics_lib.ANSWERED] = float(len(updates))
    return updates, counts

  def _combine(
    self, server: ServerState, num_asked: int, updates: dict[int, ClientUpdate]
  ) -> tuple[ServerState, dict[str, Any]]:
    """The server's step. The chunks of a whole cohort are added, with padding
    clients in place of those that did not answer: one program serves all
    rounds."""
    per_chunk = self._config.server.clients_per_chunk
    clients = np.full(-(-num_asked // per_chunk) * per_chunk, PADDING_CLIENT)
    clients[: len(updates)] = sorted(updates)
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._like)
    nothing = nothing._replace(
      steps=np.ones((), np.float32), counts=np.zeros((), bool)
    )
    sums = _no_sums(self._program, server.params)
    each = []
    for chunk in clients.reshape(-1, per_chunk).astype(np.int32):
      stacked = jax.tree.map(
        lambda *x: np.stack(x), *[updates.get(c, nothing) for c in chunk]
      )
      sums, own = _add(self._program, sums, stacked, chunk)
      each.append(own)
    num_train = np.array(self._roster.num_train)
    part = taking_part(num_train, self._config.data.new_clients)
    server, means = _finish(
      self._program,
      server,
      sums,
      each,
      np.float32(num_positives(num_train[part], self._config).sum()),
      np.float32(len(part)),
    )
    return server, metrics_lib.finish(jax.device_get(means))

  def _validated(
    self,
    server: ServerState,
    record: dict[str, Any],
    used: dict[int, int],
    progress: Progress,
  ) -> Progress:
    """Has the validation targets ranked where they are."""
    start = time.perf_counter()
    clients = self._validation_clients()
    simulation = self._simulation
    arrays = pack(
      self._as_ranked(server).broadcast(None, simulation.config)  # type: ignore
    )
    parcels = {
      node: Parcel(
        {
          'federation': self._roster.federation,
          'split': 'val',
          'clients': [[client, used.get(client, 0)] for client in own],
        },
        arrays,
      )
      for node, own in self._by_node(clients).items()
      if node in self._ready
    }
    names = metrics_lib.ranking_of_each(np.arange(9), simulation.metrics)

    def sums(answer):
      told, count = answer.facts['sums'], int(answer.facts['count'])
      found = {
        protocol: {
          name: float(told[protocol][name]) if count else 0.0 for name in names
        }
        for protocol in metrics_lib.PROTOCOLS
      }
      if not all(np.isfinite(x) for y in found.values() for x in y.values()):
        raise ValueError('a metric is NaN or infinite')
      return found, count

    answers = self._exchange('validate', parcels, sums).values()
    count = sum(own for _, own in answers)
    if count < 1:
      self._say(f'round {record["round"]}: nobody validated')
      return progress
    record['val'] = {
      protocol: {
        name: sum(found[protocol][name] for found, _ in answers) / count
        for name in names
      }
      for protocol in metrics_lib.PROTOCOLS
    }
    record['validated'] = count
    record['evaluation_seconds'] = time.perf_counter() - start
    return progress.updated(
      record['round'],
      training.selection_value(record['val'], record['round'], self._config),
    )

  def _validation_clients(self) -> list[int]:
    """As `Simulation.validation_clients`."""
    config, having = self._config, np.flatnonzero(self._roster.validated)
    clients = ranking.evaluated_clients(config, len(self._roster.ids), having)
    wanted = config.evaluation.validation_clients
    if wanted and wanted < len(clients):
      rng = generator(config.seed, Stream.VALIDATION_CLIENTS)
      clients = np.sort(rng.choice(clients, wanted, replace=False))
    return clients.tolist()

  def _as_ranked(self, server: ServerState) -> ServerState:
    """As `Simulation.as_ranked`, with the counts that the nodes sent."""
    start = self._config.model.item_embedding
    features = list(self._catalogue.features.values())
    if self._roster.counts is None or not features:
      return server
    found = shrinkage.neighbours(
      features, np.array(self._roster.counts), start.shrinkage
    )
    table = simulation_lib.shrunk_table(
      self._simulation.model, server.params, self._simulation.catalogue, found
    )
    return server._replace(params={**server.params, ITEM_TABLE: table})

  def _by_node(self, clients: list[int]) -> dict[int, list[int]]:
    """Node -> those of some clients that it has; of clients whose node is not
    connected, or has not answered in this round, none."""
    connected = set(self._link.nodes()) - self._silent
    found: dict[int, list[int]] = {}
    for client in sorted(clients):
      node = self._homes.get(client)
      if node in connected:
        found.setdefault(node, []).append(client)
    return found

  def _exchange(
    self, kind: str, parcels: dict[int, Parcel], read: Callable[[Parcel], Any]
  ) -> dict[int, Any]:
    """What `read` makes of the answers without errors; says who has none, and
    the notes of the others."""
    if not parcels:
      return {}
    answers = self._link.exchange(kind, parcels, self._timeout)
    good = {}
    for node in parcels:
      answer = answers.get(node)
      if answer is None:
        self._silent.add(node)
        self._say(
          f'node {node}: no answer to {kind} within {self._timeout:g} seconds'
        )
      elif 'error' in answer.facts:
        self._say(f'node {node}: {answer.facts["error"]}')
        if node_lib.NOT_SET_UP in answer.facts:
          self._ready.discard(node)
          self._enrolled.pop(node, None)
      else:
        try:
          good[node] = read(answer)
          for line in answer.facts.get('notes', ()):
            self._say(f'node {node}: {line}')
        except (KeyError, TypeError, IndexError, ValueError) as error:
          good.pop(node, None)
          self._say(f'node {node}: its answer to {kind} is none: {error!r}')
    self._traffic += Traffic(
      0,
      sum(parcel.num_bytes for parcel in parcels.values()),
      sum(answer.num_bytes for answer in answers.values()),
    )
    return good


def _with_features(
  catalogue: SharedCatalogue, config: RunConfig
) -> SharedCatalogue:
  """The catalogue without the features that the config leaves out."""
  return catalogue._replace(
    features={
      name: x
      for name, x in catalogue.features.items()
      if getattr(config.data, f'{name}_features', '') != features_lib.NONE
    }
  )


_FAULTS = {
  metrics_lib.NOT_FINITE: 'its update is NaN or infinite',
  metrics_lib.TOO_LONG: 'its update is absurdly long',
  metrics_lib.MALFORMED: 'it has a weight below 0, or fewer than 1 step',
}


def _fault(update: ClientUpdate, longest: jax.Array | None) -> str | None:
  """Why a simulation would reject an update, a name of a metric; None if it
  would not."""
  found = jax.device_get(_faults(update, longest))
  return next((name for name, fault in found.items() if fault), None)


_faults = jax.jit(rejection.faults)


def _no_sums(program: RoundProgram, params) -> Any:
  metrics = (
    client_lib.empty_metrics(program.client.model)
    | client_lib.no_client_metrics()
  )
  return round_lib.no_upload(program, params), jax.tree.map(
    jnp.asarray, metrics
  )


@partial(devices.jit, static_argnames='program', donate_argnames='sums')
def _add(program: RoundProgram, sums, updates: ClientUpdate, clients):
  """(the sums with a chunk's updates, what is of each of its clients)."""
  upload, metrics = sums
  chunk_metrics = jax.tree.map(lambda x: jnp.sum(x, 0), updates.metrics)
  return (
    round_lib.add_updates(program.aggregator, upload, updates, clients),
    metrics_lib.merge(metrics, chunk_metrics),
  ), (updates.prototypes, program.aggregator.collect(updates))


@partial(devices.jit, static_argnames='program', donate_argnames='server')
def _finish(
  program: RoundProgram,
  server: ServerState,
  sums,
  each: list,
  all_weight: jax.Array,
  all_size: jax.Array,
):
  """(the server after its step, the metrics)."""
  upload, metrics = sums
  prototypes, collected = jax.tree.map(lambda *x: jnp.concatenate(x), *each)
  return server_lib.aggregate(
    server,
    upload,
    collected,
    prototypes,
    Cohort(upload.weight, all_weight, upload.size, all_size),
    program.config,
    program.aggregator,
    program.client.drift,
  ), metrics


def _told(record: dict[str, Any], num_rounds: int) -> str:
  """A round's line."""
  loss = record['train'][metrics_lib.LOSS]
  line = (
    f'round {record["round"]}/{num_rounds}: '
    f'{len(record["answered"])} of {len(record["asked"])} clients'
  )
  if not record['answered']:
    return line + ' answered; the round is passed over'
  line += f', loss {loss:.4f}' if loss is not None else ''
  if 'val' in record:
    line += f', validation HR@10 {record["val"]["full"]["HR@10"]:.4f}'
  return line + f', {record["seconds"]:.1f} s'
