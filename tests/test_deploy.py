"""A federation of nodes, carried by function calls."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax import presets
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.client.update import ClientUpdate
from fedmmr_jax.data.interactions import Interactions
from fedmmr_jax.data.selection import select
from fedmmr_jax.deploy import node as node_lib
from fedmmr_jax.deploy import server as server_lib
from fedmmr_jax.deploy.catalogue import FILE, load_arrays, SharedCatalogue
from fedmmr_jax.deploy.cut import cut, INTERACTIONS, NODES
from fedmmr_jax.deploy.node import Node
from fedmmr_jax.deploy.parcel import pack, Parcel, unpack
from fedmmr_jax.deploy.server import Roster, Server
from fedmmr_jax.federation.devices import PADDING_CLIENT
from fedmmr_jax.metrics import Mean
from fedmmr_jax.runs import training
from fedmmr_jax.runs.checkpoint import Rounds
from fedmmr_jax.runs.run_folder import RunFolder
from tests import small


class Calls:
  """A link by function calls, over what a network would carry: JSON, arrays.

  Args:
    folder: of a cut data set.
    lost: (kind, round) -> nodes whose answer does not arrive.
    changed: called with (kind, round, node, answer) -> the answer that does.
  """

  def __init__(self, folder, lost=(), changed=lambda *x: x[-1]):
    self.folders = dict(enumerate(sorted((folder / NODES).iterdir())))
    self._nodes = {node: Node(path) for node, path in self.folders.items()}
    self.lost, self.changed = dict(lost), changed
    self.answers = []

  def nodes(self):
    return list(self.folders)

  def exchange(self, kind, parcels, timeout):
    answers = {}
    for node, parcel in parcels.items():
      at = kind, parcel.facts.get('round')
      answer = sent(self._nodes[node].answer(kind, sent(parcel)))
      self.answers.append((kind, answer))
      if node not in self.lost.get(at, ()):
        answers[node] = self.changed(*at, node, answer)
    return answers


def sent(parcel):
  return Parcel(
    json.loads(json.dumps(parcel.facts, allow_nan=False)),
    {name: np.array(x) for name, x in parcel.arrays.items()},
  )


SETTINGS = dict(
  item_embedding='content_plus_id,collaborative_dim=4,'
  'collaborative_window=3,collaborative_items=20,collaborative_columns=24,'
  'shrinkage=1',
  expert_form='attention,heads=2,projection_dim=8',
  global_memory='prototypes,number=2',
  drift_control='scaffold',
  fusion='residual,similarity=dot',
  objective='all_positions',
  client_optimizer='sgd',
  client_learning_rate=0.03,
  # Adam's steps are rounding noise where a gradient is zero.
  server_optimizer='fedavgm',
  server_learning_rate=1.0,
  client_schedule='linear',
  aggregator='fednova',
  vocabulary='local',
  select_by='last',
  num_rounds=3,
  eval_every=3,
)


@pytest.fixture(scope='module')
def dataset():
  return small.dataset()


@pytest.fixture(scope='module')
def simulated(dataset):
  """A simulation, its last round, and the training metrics of each."""
  simulation = simulation_lib.build(small.config(**SETTINGS), dataset)
  metrics = []
  for done in simulation.rounds():
    metrics.append(done.metrics)
  return simulation, done, metrics


@pytest.fixture
def folder(dataset, tmp_path):
  """The clients, dealt to three nodes."""
  cut(dataset, tmp_path, 3)
  return tmp_path


def server_of(folder, config, link):
  """(a server, what it says)"""
  lines = []
  catalogue = SharedCatalogue.load(folder / FILE)
  run = RunFolder(folder / 'run')
  return Server(config, catalogue, link, run, say=lines.append), lines


def assert_same(params, expected):
  small.assert_trees_close(params, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_rounds_are_those_of_the_simulation(dataset, folder, simulated):
  simulation, done, metrics = simulated
  config = simulation.config
  link = Calls(folder)
  server, _ = server_of(folder, config, link)
  # Parameters, moments, prototypes, control variate.
  assert_same(server.train(), done.state.server)
  run = RunFolder(folder / 'run')
  records = run.records()
  for record, expected in zip(records, metrics, strict=True):
    assert record['asked'] == record['answered']
    for name, value in expected.items():
      np.testing.assert_allclose(
        np.array(record['train'][name], float),
        np.array(value, float),
        rtol=1e-4,
        atol=1e-6,
        err_msg=name,
      )
  validation = simulation.validate(done.state)
  for protocol, values in validation.items():
    assert records[-1]['val'][protocol] == pytest.approx(values)

  # What a client keeps is where it is, and nowhere else.
  for client in done.cohort[done.cohort >= 0]:
    (path,) = folder.glob(f'{NODES}/*/state/*/clients/{client}.npz')
    kept = load_arrays(path)
    np.testing.assert_array_equal(
      kept['after.memory.item'], done.state.memories.item[client]
    )
  for kind, answer in link.answers:
    assert not {n for n in answer.arrays if n.startswith(('.memory', '.kept'))}
    assert not set(answer.facts) - {'clients', 'notes', 'sums', 'count'}, kind

  # Who has everybody's data can open the run.
  opened = simulation_lib.build(config, dataset, content=run.content())
  run.check_data(dataset)
  like = training.structure(opened, with_controls=False)
  saved = Rounds(run.path).load(3, like)
  assert_same(saved.state.server.params, done.state.server.params)
  assert np.isfinite(opened.evaluate(saved.state, 'test')[0]['full']['MRR'])
  assert 'other data' in small.error_of(
    run.check_data, dataclasses.replace(dataset, user_ids=dataset.user_ids + 1)
  )


@pytest.mark.slow
def test_what_does_not_come_back_does_not_count(folder, simulated):
  """Against the simulation of cohorts without those clients."""
  simulation, *_ = simulated
  config = simulation.config
  cohorts = [simulation.sample_cohort(number) for number in (1, 2, 3)]
  quiet, poisoned = cohorts[1].flat[0] % 3, cohorts[2].flat[0]

  def changed(kind, number, node, answer):
    if (kind, number, node) == ('train', 3, poisoned % 3):
      row = answer.facts['clients'].index(poisoned)
      answer.arrays[".delta['content_projection']"][row] = np.nan
    return answer

  lost = {('train', 1): {0, 1, 2}, ('train', 2): {quiet}}
  server, lines = server_of(folder, config, Calls(folder, lost, changed))
  state = server.train()

  gone = [cohorts[0] >= 0, cohorts[1] % 3 == quiet, cohorts[2] == poisoned]
  expected = simulation.init_state()
  for number, (cohort, without) in enumerate(zip(cohorts, gone), 1):
    kept = np.where(without, PADDING_CLIENT, cohort)
    expected, _ = simulation.run_round(expected, number, kept)
    record = RunFolder(folder / 'run').records()[number - 1]
    assert record['answered'] == sorted(kept[kept >= 0].tolist())
  counts = metrics_lib.members(record['train'], metrics_lib.CLIENTS)
  assert counts['answered'] == counts['asked'] - 1 == (kept >= 0).sum()
  assert counts['not_finite'] == 1 and not counts['too_long']
  assert 0 < (kept >= 0).sum() < 4
  assert_same(state.params, expected.server.params)
  assert 'round 1/3: 0 of 4 clients answered; the round is passed over' in lines
  assert f'node {quiet}: no answer to train within 600 seconds' in lines
  assert (
    f'node {poisoned % 3}: client {poisoned} is left out: its update is NaN or '
    'infinite'
  ) in lines


@pytest.mark.slow
def test_a_killed_server_goes_on(folder, simulated):
  simulation, done, _ = simulated
  config = simulation.config

  def killed(kind, number, node, answer):
    if (kind, number) == ('train', 2) and node == 2:
      raise KeyboardInterrupt
    return answer

  with pytest.raises(KeyboardInterrupt):
    server_of(folder, config, Calls(folder, changed=killed))[0].train()
  # The nodes have trained in round 2 before, and their clients' memories have
  # moved on.
  link = Calls(folder)
  state = server_of(folder, config, link)[0].train()
  assert_same(state, done.state.server)
  assert 'sketch' not in {kind for kind, _ in link.answers}
  assert [r['round'] for r in RunFolder(folder / 'run').records()] == [1, 2, 3]


def test_a_cut_data_set_is_whole(dataset, folder):
  catalogue = SharedCatalogue.load(folder / FILE)
  assert catalogue.item_ids.tolist() == dataset.item_ids.tolist()
  np.testing.assert_array_equal(
    catalogue.features['text'], dataset.features['text']
  )
  found = {}
  for node in Calls(folder).folders.values():
    for line in (node / INTERACTIONS).read_text().split()[1:]:
      user, item = line.split(',')
      found.setdefault(int(user), []).append(int(item))
  assert found == {
    user: dataset.item_ids[dataset.sequence(client)].tolist()
    for client, user in enumerate(dataset.user_ids.tolist())
  }


def enrol(folder, node=0, **changes):
  """A node's answer to the first message."""
  catalogue = SharedCatalogue.load(folder / FILE)
  facts = {'federation': 'abc', 'config': small.config().as_flat_dict()}
  asked = Parcel(facts | changes, {'item_ids': catalogue.item_ids})
  return Node(Calls(folder).folders[node]).answer('enrol', asked)


def test_who_a_node_has(dataset, folder):
  at = range(1, dataset.num_clients, 3)
  assert enrol(folder, 1).facts['clients'] == [
    [dataset.user_ids[k], dataset.lengths[k], dataset.num_train[k], 0, True]
    for k in at
  ]


def test_items_outside_the_catalogue_are_left_out(folder, capsys):
  path = Calls(folder).folders[0] / INTERACTIONS
  before = enrol(folder).facts['clients']
  user = before[0][0]
  path.write_text(path.read_text() + f'{user},9999\n')
  answer = enrol(folder)
  assert answer.facts['clients'] == before
  assert answer.facts['notes'] == [
    '1 of 40 items are not in the catalogue; their 1 interactions are left out'
  ]
  path.write_text('user_id,item_id\n1,7001\n1,7002\n1,7003\n')
  assert 'error' in enrol(folder).facts
  assert 'has none of its items' in capsys.readouterr().err
  path.unlink()
  assert 'error' in enrol(folder).facts


def test_a_line_of_a_file_stays_on_its_node(folder, capsys):
  path = Calls(folder).folders[0] / INTERACTIONS
  path.write_text('user_id,item_id,timestamp\n7,3,2001-01-02\n7,4,yesterday\n')
  assert enrol(folder).facts == {
    'error': "cannot answer enrol; see the node's log"
  }
  assert 'yesterday' in capsys.readouterr().err


def set_up(folder, place=0, **facts):
  """A node that has enrolled and is set up, and its answer to that."""
  clients = enrol(folder, place, **facts).facts['clients']
  asked = Parcel(
    {
      'federation': 'abc',
      'max_items': 40,
      'numbers': list(range(len(clients))),
      'text_ids': False,
      'features': [],
      'counted': [],
    },
    {'content': np.zeros((len(small.dataset().item_ids), 0), np.float32)},
  )
  node = Node(Calls(folder).folders[place])
  return node, node.answer('setup', asked)


def test_a_file_that_has_changed_is_refused(folder):
  path = Calls(folder).folders[0] / INTERACTIONS
  lines = path.read_text().split()
  assert not set_up(folder)[1].facts
  # As many clients and as many of each: only the order is another.
  path.write_text('\n'.join([lines[0], lines[2], lines[1], *lines[3:]]))
  asked = Parcel({'federation': 'abc', 'round': 1, 'clients': [[0, 0]]})
  answer = Node(path.parent).answer('train', asked)
  assert 'have changed since it enrolled' in answer.facts['error']


def test_clients_of_a_node_that_enrols_again(folder):
  server, lines = server_of(folder, small.config(), Calls(folder))
  clients = [['a', 5, 3, 0, True], ['b', 5, 3, 1, True]]
  roster = Roster.of(clients)
  server._place(roster, {7: clients})
  assert server._homes == {0: 7, 1: 7}
  # Of one the dislikes have changed, the other has gone.
  server._place(roster, {7: [['b', 5, 3, 2, True]]})
  assert server._homes == {}
  assert 'client b has other interactions' in lines[0]


def test_what_a_node_does_not_decide_alone(folder):
  """Who takes part, and how ids are spelt."""
  config = small.config(new_clients=0.6).as_flat_dict()
  path = Calls(folder).folders[0] / INTERACTIONS
  own = path.read_text().split()
  user = own[1].split(',')[0]
  path.write_text(
    '\n'.join(x for x in own if x.split(',')[0] in ('user_id', user))
  )
  node, _ = set_up(folder, config=config)
  drawn = {}
  for text_ids in (False, True):
    place = path.parent / 'state' / 'abc'
    plan = json.loads((place / 'plan.json').read_text())
    (place / 'plan.json').write_text(json.dumps(plan | {'text_ids': text_ids}))
    node = Node(path.parent)
    simulation, _ = node._bound_to('abc', place)
    assert np.asarray(simulation.data.takes_part).tolist() == [True]
    drawn[text_ids] = np.asarray(simulation.data.sampled_negatives)
    ids = np.array([user]) if text_ids else np.array([int(user)])
    expected = simulation_lib.to_device(
      small.config(), dataclasses.replace(node._datasets['abc'], user_ids=ids)
    ).sampled_negatives
    np.testing.assert_array_equal(drawn[text_ids], expected)
  assert (drawn[False] != drawn[True]).any()


def test_a_client_whose_state_is_damaged_is_left_out(folder, capsys):
  node, _ = set_up(
    folder,
    config=small.config(
      drift_control='scaffold',
      client_optimizer='sgd',
      client_learning_rate=0.03,
    ).as_flat_dict(),
  )
  place = node.folder / 'state' / 'abc'
  simulation, _ = node._bound_to('abc', place)
  fresh = node_lib._fresh_client(simulation)
  for client, rounds in ((0, (1, 2)), (1, (1, 2)), (2, (3, 4))):
    node_lib._write_client(place, client, rounds[0], fresh, rounds[1], fresh)
  node_lib._client_path(place, 1).write_text('x')
  notes = []
  read = [
    node_lib._read_client(place, client, 2, simulation, notes)
    for client in (0, 1, 2)
  ]
  assert [client is None for client in read] == [False, True, True]
  assert [note.split(':')[0] for note in notes] == ['client 1', 'client 2']
  assert 'after rounds 3 and 4' in capsys.readouterr().err
  # A node whose clients are all left out has an answer.
  broadcast = node_lib.broadcast_like(simulation)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), broadcast)
  facts = {'federation': 'abc', 'round': 5, 'split': 'val', 'clients': [[1, 2]]}
  asked = Parcel(facts, pack(zeros))
  answer = node.answer('train', asked)
  assert (answer.facts['clients'], answer.arrays) == ([], {})
  broadcast = node_lib.ranked_like(simulation)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), broadcast)
  assert node.answer('validate', Parcel(facts, pack(zeros))).facts['count'] == 0


class Canned:
  """A link whose nodes answer what they are told to."""

  def __init__(self, **answers):
    self.answers = answers
    self.asked = []

  def nodes(self):
    return [0, 1]

  def exchange(self, kind, parcels, timeout):
    self.asked.append((kind, parcels))
    return {n: x for n, x in self.answers[kind].items() if n in parcels}


def test_an_answer_that_is_none_costs_its_node_alone(folder):
  good = Parcel({'clients': [['a', 5, 3, 0, True]]})
  for bad in ({}, {'clients': [['b']]}, {'clients': 3}):
    link = Canned(enrol={0: Parcel(bad), 1: good})
    server, lines = server_of(folder, small.config(), link)
    assert server._first_roster().ids == ['a']
    assert lines[0].startswith('node 0: its answer to enrol is none')


def test_an_update_is_checked():
  one = np.float32(1)
  good = ClientUpdate(
    {'a': np.ones(2)}, None, None, one, one, None, None, None, {'x': one}
  )
  assert server_lib._fault(good, 2.0) is None
  for bad, told in (
    ({'weight': np.float32(np.nan)}, 'NaN'),
    ({'steps': np.float32(np.inf)}, 'NaN'),
    ({'metrics': {'x': Mean(np.float32(np.nan), one)}}, 'NaN'),
    ({'delta': {'a': np.full(2, 2.0)}}, 'long'),
    ({'weight': np.float32(-1)}, 'below 0'),
    ({'steps': np.float32(0)}, 'fewer than 1 step'),
  ):
    fault = server_lib._fault(good._replace(**bad), 2.0)
    assert told in server_lib._FAULTS[fault]


def test_a_metric_to_select_by_is_measured_by_nodes_too(folder):
  node, _ = set_up(
    folder, config=small.config(select_by='full/HR@7').as_flat_dict()
  )
  simulation, _ = node._bound_to('abc', node.folder / 'state' / 'abc')
  assert metrics_lib.own_names(simulation.metrics) == ['HR@7', 'NDCG@7']


def test_a_second_server_tells_the_nodes_nothing(folder):
  config = small.config()
  first, second = Canned(), Canned()
  server, _ = server_of(folder, config, first)
  server._run.start(config, small.dataset())
  other, _ = server_of(folder, config, second)
  assert 'another process' in small.error_of(other.train)
  server._run._lock.close()
  other, _ = server_of(folder, small.config(batch_size=5), second)
  assert 'holds a run with `batch_size=4`' in small.error_of(other.train)
  assert not second.asked


def test_counts_that_come_later_are_added_once(folder, dataset):
  config = small.config(item_embedding='content_plus_id,shrinkage=1')

  def counts(*rows):
    return Parcel(
      {}, {'rows': np.array(rows, np.int32), 'counts': np.ones(len(rows), int)}
    )

  link = Canned(setup={0: counts(1, 2)})
  server, _ = server_of(folder, config, link)
  server._run.path.mkdir()
  server._simulation = simulation_lib.assemble(
    config, dataset, simulation_lib.catalogue_of(config, dataset), None
  )
  server._roster = Roster.of([['a', 5, 3, 0, True], ['b', 5, 3, 0, True]])
  server._enrolled = {0: [0], 1: [1]}
  server._set_up()
  link.answers = {'setup': {1: counts(2, 3)}}
  server._set_up()
  # Told again, of a client that has been counted.
  server._ready.clear()
  link.answers = {'setup': {0: counts()}}
  server._set_up()
  assert link.asked[-1][1][0].facts['counted'] == []
  roster = Roster.read(server._run.path)
  assert roster.counts[:5] == [0, 1, 2, 1, 0]
  assert roster.counted == [0, 1]


def test_a_node_that_is_not_set_up_says_so(folder):
  enrol(folder)
  node = Node(Calls(folder).folders[0])
  asked = Parcel({'federation': 'abc', 'round': 1, 'clients': []})
  assert node.answer('train', asked).facts['not_set_up']
  assert 'same version' in node.answer('dance', asked).facts['error']
  bad = Parcel({'federation': '../..'})
  assert 'no name' in node.answer('enrol', bad).facts['error']


def test_a_node_without_a_test_item_has_clients(folder):
  path = Calls(folder).folders[0] / INTERACTIONS
  path.write_text(
    'user_id,item_id,timestamp\n'
    + ''.join(f'7,{item},2001-0{item}-05\n' for item in range(1, 6))
  )
  config = small.config(split_by='timeline,test_from=2001-06-01')
  answer = enrol(folder, config=config.as_flat_dict())
  assert answer.facts['clients'] == [[7, 5, 4, 0, True]]


def test_a_network_run_is_known_by_its_ids_alone():
  """Where a longer id was left out, too."""
  users = np.array(['a'] * 5 + ['b'] * 5 + ['a_long_name'] * 2)
  items = np.array([*'xyzvw', *'zvwuy', *'xy'])
  longer = np.append(items[:-1], 'a_long_item')
  found = select('small', Interactions.of(users, longer)).dataset
  assert found.user_ids.tolist() == ['a', 'b']
  assert found.user_ids.dtype == 'U11'  # what the test is about
  known = SharedCatalogue.of(found.item_ids[1:].tolist()).dataset(['a', 'b'])
  assert known.fingerprint() == found.without_interactions().fingerprint()


def test_a_client_has_one_node(folder):
  one, other = list(Calls(folder).folders.values())[:2]
  shutil.copy(one / INTERACTIONS, other / INTERACTIONS)
  server, _ = server_of(folder, small.config(), Calls(folder))
  assert 'client 1 is on nodes 0 and 1' in small.error_of(server.train)


def test_the_roster_is_in_the_order_of_ids():
  clients = [[10, 5, 3, 0, True], [9, 7, 5, 2, True], [2, 5, 3, 0, False]]
  roster = Roster.of(clients)
  assert roster.ids == [2, 9, 10]
  assert roster.max_items == 9
  # Whole numbers and texts are texts, as where one file holds them.
  assert Roster.of([*clients, ['x', 4, 2, 0, True]]).ids == [
    '10',
    '2',
    '9',
    'x',
  ]
  # The most active; among equals the lower id.
  assert Roster.of(clients, top=2).ids == [2, 9]


@pytest.mark.parametrize(
  'changes, told',
  [
    ({'k_core': 5}, '`k_core=5`'),
    ({'cold_items': 0.1}, '`cold_items=0.1`'),
    ({'split_by': 'given'}, '`split_by=given`'),
    ({'text_features': 'x.npy'}, '`text_features=x.npy`'),
    ({'load': 'all,memories', 'pretrained_path': 'x'}, 'memories stay'),
  ],
)
def test_settings_that_need_everybodys_data(changes, told):
  assert told in small.error_of(server_lib.check, small.config(**changes))


def test_a_catalogue_is_checked(tmp_path):
  path = tmp_path / 'catalogue.npz'
  assert 'no such file' in small.error_of(SharedCatalogue.load, path)
  path.write_text('nothing')
  assert 'no .npz file' in small.error_of(SharedCatalogue.load, path)
  np.savez(path, a=np.zeros(1))
  assert 'no item_ids' in small.error_of(SharedCatalogue.load, path)
  assert 'item a is there 2 times' in small.error_of(
    SharedCatalogue.of, ['a', 'a']
  )
  assert '3 rows of text for 2 items' in small.error_of(
    SharedCatalogue.of, ['a', 'b'], text=np.ones((3, 2))
  )
  made = SharedCatalogue.of(['b', 'a'], ['B', 'A'], text=np.ones((2, 3)))
  made.save(path)
  again = SharedCatalogue.load(path)
  assert (again.item_ids.tolist(), again.titles) == (
    ['', 'b', 'a'],
    ('', 'B', 'A'),
  )
  assert again.features['text'].sum(axis=1).tolist() == [0, 3, 3]


def test_what_is_packed_is_unpacked():
  tree = {'a': np.arange(3), 'b': (np.float32(2), None)}
  arrays = pack(tree)
  small.assert_trees_equal(unpack(arrays, tree, 'it'), tree)
  del arrays["['a']"]
  assert small.error_of(unpack, arrays, tree, 'it') == "it: ['a'] is missing"
  arrays["['a']"] = np.arange(4)
  assert "it: ['a'] is int64[4], not int64[3]" == small.error_of(
    unpack, arrays, tree, 'it'
  )


def test_what_cannot_be_cut(dataset, folder, tmp_path):
  for number, told in ((0, '0 nodes for 9 clients'), (10, '10 nodes')):
    assert told in small.error_of(cut, dataset, tmp_path / 'x', number)
  assert 'already' in small.error_of(cut, dataset, folder, 2)
  weighted = dataclasses.replace(dataset, weights=np.ones(len(dataset.items)))
  assert 'weights' in small.error_of(cut, weighted, tmp_path / 'x', 2)


def test_a_command_line_without_a_binary(tmp_path):
  own = tmp_path / 'own.flags'
  own.write_text('# mine\n--flagfile=synthetic.flags\n--num_rounds=7\n')
  config = presets.of_command_line(f'--flagfile={own} --seed=3')
  assert (config.server.num_rounds, config.seed) == (7, 3)
  assert config.model.hidden_dim == presets.preset('synthetic').model.hidden_dim
  for text, told in (
    ('seed=3', "'seed=3' is no flag"),
    ('--flagfile=nowhere.flags', 'nowhere.flags: no such file'),
    ('--seeds=3', "unknown setting 'seeds'"),
  ):
    assert told in small.error_of(presets.of_command_line, text)
