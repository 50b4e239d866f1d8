"""Warm starts load whole groups or refuse; frozen groups stay bit for bit."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import console
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.config import GROUPS
from fedmmr_jax.data import cold as cold_lib
from fedmmr_jax.data.interactions import Interactions
from fedmmr_jax.data.selection import select
from fedmmr_jax.errors import UserError
from fedmmr_jax.models import groups
from fedmmr_jax.runs import training, warm_start
from fedmmr_jax.runs.checkpoint import named_arrays, Rounds
from fedmmr_jax.runs.run_folder import RunFolder
from tests import small

# Not a generated set: of those, another one has other items under the same ids.
NAMED = dict(dataset='ml-1m', data_dir='unused')
# Groups of parameters of one's own.
LOWER = ('item_embedding', 'backbone/block_0')
NOWHERE = ('router', 'backbone/block_7')


def train(path, dataset=None, **changes):
  dataset = dataset or small.dataset()
  simulation = simulation_lib.build(small.config(**NAMED, **changes), dataset)
  run = RunFolder(path)
  run.start(simulation.config, dataset)
  training.train(simulation, run, lambda record: None)
  return path


def saved(path, number=None):
  """A round's state, of the best one by default."""
  simulation = simulation_lib.build(RunFolder(path).config(), small.dataset())
  rounds = Rounds(path)
  return rounds.load(
    number or rounds.best(), training.structure(simulation)
  ).state


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
  return train(tmp_path_factory.mktemp('runs') / 'full')


def start(path, dataset=None, dataset_flag=NAMED['dataset'], **changes):
  named = NAMED | {'dataset': dataset_flag}
  return simulation_lib.build(
    small.config(pretrained_path=str(path), **named, **changes),
    dataset or small.dataset(),
  )


def parts(simulation):
  return {(p.name, p.status): p for p in simulation.warm_start.table}


def test_every_parameter_has_one_group():
  changes = dict(fusion='gated', item_embedding='content_plus_id')
  changes |= dict(profile='history')
  params = small.simulation(**changes).abstract_state.server.params
  assert groups.by_group(params) == {
    'embeddings': ['content_projection', 'item_embedding'],
    'backbone': ['backbone', 'profile_expert'],
    'experts': [
      'semantic_expert',
      'semantic_norm',
      'visual_expert',
      'visual_norm',
    ],
    'router': ['router'],
    'fusion': ['fusion_gate', 'sequence_norm'],
  }


def test_all_loads_every_parameter_and_nothing_else(pretrained):
  simulation = start(pretrained)
  state, trained = simulation.init_state(), saved(pretrained)
  small.assert_trees_equal(state.server.params, trained.server.params)
  small.assert_trees_equal(state.memories, simulation._fresh_state().memories)
  assert {status for _, status in parts(simulation)} == {'loaded', 'initial'}
  assert ('memories', 'initial') in parts(simulation)


def test_memories_come_along_when_asked_for(pretrained):
  state = start(pretrained, load='all,memories').init_state()
  trained = saved(pretrained)
  small.assert_trees_equal(state.memories, trained.memories)
  assert int(state.server.round) == 0
  assert jax.tree.structure(state) == jax.tree.structure(trained)


def test_named_groups_only(pretrained):
  simulation = start(pretrained, load='backbone,router', seed=1)
  state = simulation.init_state().server.params
  trained = saved(pretrained).server.params
  drawn = simulation._fresh_state().server.params
  for name in state:
    loaded = name in ('backbone', 'router')
    small.assert_trees_equal(state[name], (trained if loaded else drawn)[name])
    assert (name, 'loaded' if loaded else 'initial') in parts(simulation)
  report = console.warm_start_report(simulation.warm_start, ['backbone'])
  assert 'not asked for' in report and 'frozen' in report


def test_a_round_can_be_named(pretrained):
  state = start(pretrained / 'rounds' / '1').init_state()
  small.assert_trees_equal(
    state.server.params, saved(pretrained, 1).server.params
  )
  with pytest.raises(UserError, match='no round 7; saved: 1, 2'):
    start(pretrained / 'rounds' / '7').init_state()


def subset(items: set[int], without=()):
  """The data set of those of its interactions, without some users; other rows,
  the same ids."""
  whole = small.dataset()
  users, found, times = [], [], []
  for k in range(whole.num_clients):
    for t, row in enumerate(whole.sequence(k)):
      item = whole.item_ids[row]
      if item in items and whole.user_ids[k] not in without:
        users.append(whole.user_ids[k])
        found.append(item)
        times.append(t)
  dataset = select(
    'small', Interactions.of(np.array(users), np.array(found), np.array(times))
  ).dataset
  rows = [whole.item_ids.tolist().index(i) for i in dataset.item_ids]
  return dataclasses.replace(
    dataset, features={n: x[rows] for n, x in whole.features.items()}
  )


def test_items_are_matched_by_id(pretrained):
  dataset = subset(set(range(5, 61)))
  simulation = start(pretrained, dataset, load='embeddings,backbone')
  table = simulation.init_state().server.params['item_embedding']
  trained = saved(pretrained).server.params['item_embedding']
  whole = small.dataset().item_ids.tolist()
  assert dataset.item_ids[1] == 5
  for row, item in enumerate(dataset.item_ids.tolist()):
    np.testing.assert_array_equal(table[row], trained[whole.index(item)])
  note = parts(simulation)['item_embedding', 'loaded'].note
  kept, everything = dataset.num_items, small.dataset().num_items
  assert kept < everything and note == (
    f'{kept} items, matched by id; {everything - kept} others left there'
  )


def as_text(dataset):
  """The same with ids that are no numbers."""
  return dataclasses.replace(
    dataset,
    item_ids=np.array(['', *(f'B{i:03}' for i in dataset.item_ids[1:])]),
    user_ids=np.array([f'A{u}' for u in dataset.user_ids]),
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  'ids, start_of_items',
  [
    (lambda dataset: dataset, 'content_init'),
    (as_text, 'content_plus_id,collaborative_dim=4'),
  ],
)
def test_data_that_has_grown_brings_new_items_and_users(
  tmp_path, ids, start_of_items
):
  earlier = ids(subset(set(range(5, 61)), without=(2, 5)))
  now = ids(small.dataset())
  changes = dict(
    item_embedding=start_of_items, client_fraction=1.0, experts='semantic'
  )
  path = train(tmp_path / 'earlier', earlier, num_rounds=1, **changes)
  simulation = start(
    path, now, load='embeddings,backbone,memories', num_rounds=1, **changes
  )
  fresh = simulation._fresh_state()
  state = simulation.init_state()
  saved_ = Rounds(path).load_as_saved(1)['state']
  small.assert_trees_equal(
    state.server.params['backbone'], saved_['server']['params']['backbone']
  )
  # Items.
  there = {i: row for row, i in enumerate(earlier.item_ids.tolist()) if row}
  new = [n for n, i in enumerate(now.item_ids.tolist()) if n and i not in there]
  table, old = state.server.params['item_embedding'], saved_['server']['params']
  assert 4 <= len(new) < now.num_items
  rows = np.array([n for n in range(1, now.num_rows) if n not in new])
  places = [there[item] for item in now.item_ids[rows].tolist()]
  if 'plus' in start_of_items:  # the embeddings are the same, not the rows

    def embedded(params, content):
      return params['item_embedding'] + content @ params['content_projection']

    np.testing.assert_allclose(
      embedded(state.server.params, simulation.catalogue.content)[rows],
      embedded(old, RunFolder(path).content())[np.array(places)],
      atol=1e-5,
    )
  else:
    np.testing.assert_array_equal(
      table[rows], old['item_embedding'][np.array(places)]
    )
  drawn = np.asarray(fresh.server.params['item_embedding'])[new]
  if start_of_items != 'content_init':
    np.testing.assert_array_equal(table[np.array(new)], drawn)
  else:  # turned, no longer and no shorter
    np.testing.assert_allclose(
      np.linalg.norm(table[np.array(new)], axis=1),
      np.linalg.norm(drawn, axis=1),
      rtol=1e-4,
    )
  # Users.
  places = {u: k for k, u in enumerate(earlier.user_ids.tolist())}
  assert len(places) == now.num_clients - 2
  some = False
  for k, user in enumerate(now.user_ids.tolist()):
    own = jax.tree.map(lambda x: np.asarray(x[k]), state.memories)
    if user not in places:
      assert own.clock == 0 and not own.item.any() and not own.surprise.any()
      continue
    before = {n: x[places[user]] for n, x in saved_['memories'].items()}
    assert own.clock == before['clock'] > 0
    assert now.item_ids[own.item].tolist() == (
      earlier.item_ids[before['item']].tolist()
    )
    np.testing.assert_array_equal(own.surprise, before['surprise'])
    some |= own.item.any()
  assert some
  # Both are counted, a line each.
  report = console.warm_start_report(simulation.warm_start, [])
  for line in (
    f'{earlier.num_items} items, matched by id',
    f'{len(new)} new items, from their content',
    f'{len(places)} users, matched by id',
    '2 new users, empty',
  ):
    assert sum(line in told for told in report.splitlines()) == 1, line
  counts = {
    name: sum(p.count for p in simulation.warm_start.table if p.name == name)
    for name in ('item_embedding', 'memories')
  }
  assert counts['item_embedding'] == table.size
  assert counts['memories'] == sum(
    x.size for x in jax.tree.leaves(state.memories)
  )
  state, means = simulation.run_round(state, 1, simulation.sample_cohort(1))
  assert np.isfinite(means['loss'])
  assert np.isfinite(simulation.evaluate(state, 'test')[0]['full']['MRR'])
  if 'plus' in start_of_items:  # and if it is not known what rows belong to
    kept = path / 'content.npz'
    kept.write_bytes(kept.read_bytes()[:-40])
    again = start(path, now, load='embeddings', num_rounds=1, **changes)
    assert 'content.npz: damaged' in small.error_of(again.init_state)
    kept.unlink()
    assert 'on other data' in small.error_of(again.init_state)


def test_new_items_are_turned_to_the_axes_of_the_known():
  rng = np.random.default_rng(0)
  fresh = rng.normal(size=(40, 6))
  turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
  new = np.array([3, 17])
  loaded = fresh @ turn
  loaded[new] = 0
  table = warm_start._with_new(fresh, loaded, new, turns=True)
  np.testing.assert_allclose(table, fresh @ turn)
  np.testing.assert_array_equal(
    warm_start._with_new(fresh, loaded, new, turns=False)[new], fresh[new]
  )


def test_embeddings_stay_the_same_on_content_along_other_axes():
  rng = np.random.default_rng(0)
  turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
  before, table = rng.normal(size=(2, 40, 6))
  projection = rng.normal(size=(6, 6))
  new = np.array([3, 17])
  table[0] = table[new] = before[0] = 0
  content = before @ turn
  before[new] = 0
  found = warm_start._on_other_content(
    {'item_embedding': table, 'content_projection': projection},
    before,
    content,
    new,
  )
  np.testing.assert_allclose(
    content @ found['content_projection'],
    content @ turn.T @ projection,
    atol=1e-9,
  )
  known = np.setdiff1d(np.arange(40), new)
  np.testing.assert_allclose(
    (content @ found['content_projection'] + found['item_embedding'])[known],
    (before @ projection + table)[known],
    atol=1e-9,
  )


def test_a_memory_of_items_that_are_gone_has_empty_slots():
  saved_ = dict(
    item=np.array([[1, 2], [3, 0]], np.int32),
    surprise=np.array([[0.5, 0.75], [1.0, 0.0]], np.float32),
    clock=np.array([4, 2], np.int32),
  )
  users = warm_start._Match(np.array([1, -1, 0]), 0)
  found = warm_start._of_users(saved_, users, np.array([0, 0, 7, 5]))
  assert found['item'].tolist() == [[5, 0], [0, 0], [0, 7]]
  assert found['surprise'].tolist() == [[1.0, 0.0], [0.0, 0.0], [0.0, 0.75]]
  assert found['clock'].tolist() == [2, 0, 4]


def test_data_without_a_known_item_or_user_is_refused(pretrained):
  other = as_text(small.dataset())
  for group, kind in (('embeddings', 'items'), ('memories', 'users')):
    message = small.error_of(start(pretrained, other, load=group).init_state)
    assert f'{kind} is in it, by id (here ' in message


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes, message',
  [
    (
      dict(hidden_dim=8),
      'embeddings cannot .* item_embedding has shape '
      r'\d+ x 16 there and \d+ x 8 here',
    ),
    (
      dict(num_blocks=2, load='backbone'),
      'it has no backbone/block_1/.*stay as drawn',
    ),
    (dict(num_heads=4, load='backbone'), '`num_heads=2`, not 4'),
    (
      dict(expert_form='attention,heads=4'),
      'experts cannot .*heads=2,projection_dim=8`, not attention,heads=4',
    ),
    (dict(item_embedding='content_plus_id'), '`item_embedding=id`, not'),
    (dict(experts='none', load='router'), 'has no router; it has embeddings'),
    (
      dict(fusion='gated', load='fusion'),
      '`fusion=residual,similarity=cosine`, not gated,similarity=cosine',
    ),
    (
      dict(experts='semantic,visual', load='router'),
      '`experts=visual,semantic`, not semantic,visual',
    ),
    (
      dict(fusion='residual,similarity=dot', load='experts'),
      '`fusion=residual,similarity=cosine`, not residual,similarity=dot',
    ),
    (dict(experts='none', load='all,router'), 'has no router; it has'),
    (
      dict(memory='recent,capacity=8,retrieval_size=4', load='memories'),
      '`memory=surprise,capacity=8`, not recent',
    ),
  ],
)
def test_a_load_that_would_leave_or_twist_something_is_refused(
  pretrained, changes, message
):
  with pytest.raises(UserError, match=message):
    start(pretrained, **changes).init_state()


def test_the_same_data_under_another_name_is_loaded(pretrained):
  # A folder read as --dataset=ml-1m then, and as --dataset=auto now.
  def state(dataset=None):
    return start(
      pretrained, dataset, dataset_flag='auto', load='embeddings'
    ).init_state()

  small.assert_trees_equal(
    state().server.params['item_embedding'],
    saved(pretrained).server.params['item_embedding'],
  )
  # Of other data the name is all there is to go by.
  with pytest.raises(UserError, match='`dataset=ml-1m`, not auto'):
    state(subset(set(range(5, 61))))


def test_what_belongs_to_other_data_is_refused(pretrained):
  other = subset(set(range(5, 61)))
  start(pretrained, other, load='embeddings,router,memories').init_state()
  with pytest.raises(UserError, match='experts cannot .*other data'):
    start(pretrained, other, load='experts').init_state()
  # What a prototype means, features say.
  with pytest.raises(UserError, match='memories cannot .*other data'):
    start(
      pretrained,
      other,
      load='memories',
      global_memory='prototypes,number=2,iterations=3',
    ).init_state()


@pytest.mark.slow
def test_items_that_were_never_trained_are_refused(tmp_path):
  dataset, _, _ = cold_lib.hold_out(small.dataset(), 0.2, seed=0)
  cold = train(
    tmp_path / 'cold', dataset, **small.PLAIN, cold_items=0.2, num_rounds=1
  )
  with pytest.raises(UserError, match='`cold_items=0.2`, not 0.0'):
    start(cold, **small.PLAIN).init_state()
  with pytest.raises(UserError, match='`seed=0`, and with it other cold'):
    start(cold, dataset, **small.PLAIN, cold_items=0.2, seed=1).init_state()


@pytest.mark.slow
def test_memories_of_a_run_without_texts_come_along(tmp_path):
  path = train(tmp_path / 'run', experts='visual', num_rounds=1)
  state = start(path, experts='visual', load='all,memories').init_state()
  assert np.any(state.memories.clock > 0)


@pytest.mark.slow
def test_prototypes_come_along_where_somebody_attends_to_them(tmp_path):
  changes = dict(
    small.ONE_EXPERT, global_memory='prototypes,number=2,iterations=3'
  )
  path = train(tmp_path / 'run', **changes, num_rounds=1)
  state = start(path, **changes, load='all,memories').init_state()
  trained = saved(path)
  assert trained.server.prototypes.size.sum() > 0
  small.assert_trees_equal(state.server.prototypes, trained.server.prototypes)
  # They are of no use to who does not.
  state = start(path, **small.ONE_EXPERT, load='all,memories').init_state()
  assert state.server.prototypes is None


@pytest.mark.slow
def test_memories_where_there_are_none_are_refused(tmp_path, pretrained):
  with pytest.raises(UserError, match='this run has no experts'):
    start(pretrained, experts='none', load='backbone,memories').init_state()
  without = train(tmp_path / 'run', experts='none', num_rounds=1)
  with pytest.raises(UserError, match='would stay as drawn'):
    start(without, load='backbone,memories').init_state()


def test_another_generated_set_is_refused(tmp_path):
  run = RunFolder(tmp_path / 'run')
  simulation = small.simulation(**small.PLAIN, num_rounds=1)
  run.start(simulation.config, simulation.dataset)
  training.train(simulation, run, lambda record: None)
  other = simulation_lib.build(
    small.config(**small.PLAIN, pretrained_path=str(run.path)),
    small.dataset(seed=1),
  )
  with pytest.raises(UserError, match='embeddings cannot .*other data'):
    other.init_state()


def test_what_has_no_place_is_told(pretrained):
  simulation = start(pretrained, experts='none')
  simulation.init_state()
  assert parts(simulation)['visual_expert', 'does not fit'].note == (
    'not in this model'
  )
  two = parts(start(pretrained, experts='visual', load='experts'))
  assert ('semantic_expert', 'does not fit') in two


def test_flags_are_checked():
  for changes, message in (
    (dict(load='backbone'), 'needs `pretrained_path`'),
    (dict(freeze=','.join(GROUPS)), 'leaves nothing to train'),
  ):
    with pytest.raises(UserError, match=message):
      small.config(**changes)
  for changes, message in (
    (
      dict(experts='none', freeze='embeddings,backbone'),
      'nothing of this model to train',
    ),
    (
      dict(experts='none', freeze='item_embedding,backbone'),
      'nothing of this model to train',
    ),
    (dict(freeze='memories'), "`freeze`: this model has no .* 'memories'"),
    (
      dict(freeze='backbone/block0'),
      r"no parameters 'backbone/block0'; nearest are backbone/block_0, ",
    ),
    (
      dict(load='spine', pretrained_path='x'),
      "`load`: this model has no parameters 'spine'; nearest are ",
    ),
    (dict(freeze='math:pi'), 'math:pi is no tuple of paths'),
    (dict(freeze=f'{__name__}:NAMED'), 'NAMED is no tuple of paths'),
    (dict(freeze=f'{__name__}:NOWHERE'), "no parameters 'backbone/block_7'"),
    (dict(freeze='math:no'), 'math has no no'),
  ):
    with pytest.raises(UserError, match=message):
      small.simulation(**changes)


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    dict(
      experts='both',
      vocabulary='local',
      negatives='shared',
      server_optimizer='fedmuon',
      server_learning_rate=0.01,
      client_optimizer='adam,weight_decay=0.1',
    ),
    dict(
      server_optimizer='fedyogi',
      server_learning_rate=0.01,
      client_optimizer='sgd,weight_decay=0.1',
      drift_control='fedprox,mu=0.1',
    ),
    dict(drift_control='scaffold', client_optimizer='sgd,weight_decay=0.1'),
  ],
)
def test_frozen_groups_stay_bit_for_bit(changes):
  # A large decay would move what gets no gradient.
  changes = small.ONE_EXPERT | changes
  simulation = small.simulation(freeze='embeddings,backbone', **changes)
  state = simulation.init_state()
  before = small.copy(state.server.params)
  for number in (1, 2):
    state, means = simulation.run_round(
      state, number, simulation.sample_cohort(number)
    )
  after = state.server.params
  for name in ('item_embedding', 'backbone'):
    small.assert_trees_equal(after[name], before[name])
  trained = {'semantic_expert'}
  if changes['experts'] == 'both':
    trained |= {'visual_expert', 'router'}
    assert means['gradient_visual'] > 0
  for name in trained:
    assert any(
      np.any(a != b)
      for a, b in zip(
        jax.tree.leaves(after[name]), jax.tree.leaves(before[name])
      )
    )
  assert means['gradient_backbone'] == 0 < means['gradient_semantic']


@pytest.mark.slow
@pytest.mark.parametrize(
  'freeze, frozen',
  [
    (f'{__name__}:LOWER', ['item_embedding', 'backbone/block_0/']),
    (
      'router, backbone/block_0, backbone/block_1/feed_forward_norm/bias',
      [
        'router/',
        'backbone/block_0/',
        'backbone/block_1/feed_forward_norm/bias',
      ],
    ),
  ],
)
def test_what_a_path_freezes_stays_bit_for_bit_and_the_rest_moves(
  freeze, frozen
):
  simulation = small.simulation(
    experts='both' if 'router' in freeze else 'none',
    num_blocks=2,
    freeze=freeze,
    server_optimizer='fedyogi',
    server_learning_rate=0.01,
    client_optimizer='sgd,weight_decay=0.1',
    drift_control='scaffold',
  )
  state = simulation.init_state()
  before = named_arrays(small.copy(state.server.params))
  state, _ = simulation.run_round(state, 1, simulation.sample_cohort(1))
  stayed = {
    name
    for name, x in named_arrays(state.server.params).items()
    if np.array_equal(x, before[name])
  }
  meant = {n for n in before if any(n.startswith(place) for place in frozen)}
  assert meant and stayed == meant


def test_one_path_alone_is_loaded(pretrained):
  simulation = start(
    pretrained, load='backbone/block_0, router', freeze='backbone/block_0'
  )
  state = named_arrays(simulation.init_state().server.params)
  trained = named_arrays(saved(pretrained).server.params)
  drawn = named_arrays(simulation._fresh_state().server.params)
  assert set(state) == set(trained)
  for name, x in state.items():
    is_loaded = name.startswith(('backbone/block_0/', 'router/'))
    np.testing.assert_array_equal(x, (trained if is_loaded else drawn)[name])
  table = parts(simulation)
  whole, block = (
    sum(x.size for name, x in state.items() if name.startswith(place))
    for place in ('backbone/', 'backbone/block_0/')
  )
  assert table['backbone/block_0', 'loaded'].count == block
  assert table['backbone', 'initial'].count == whole - block > 0
  report = console.warm_start_report(
    simulation.warm_start, ['backbone/block_0']
  )
  assert [
    line.split()[0] for line in report.splitlines() if 'frozen' in line
  ] == ['backbone/block_0']


def test_a_group_of_ones_own_is_loaded(pretrained):
  state = start(pretrained, load=f'{__name__}:LOWER').init_state()
  trained = saved(pretrained).server.params
  small.assert_trees_equal(
    state.server.params['item_embedding'], trained['item_embedding']
  )
  # What a group's parameters mean, those of a path mean too.
  for changes, message in (
    (dict(num_heads=4, load='backbone/block_0'), '`num_heads=2`, not 4'),
    (
      dict(num_blocks=2, load='backbone/block_1'),
      'backbone/block_1 cannot be .* it has no backbone/block_1/.*leave '
      'backbone/block_1 out of `load`',
    ),
  ):
    with pytest.raises(UserError, match=message):
      start(pretrained, **changes).init_state()


def test_a_killed_warm_start_resumes_without_its_source(tmp_path):
  source = tmp_path / 'source'
  changes = NAMED | small.PLAIN
  train(source, **small.PLAIN, num_rounds=1)
  config = small.config(pretrained_path=str(source), num_rounds=2, **changes)
  simulation = simulation_lib.build(config, small.dataset())
  run = RunFolder(tmp_path / 'run')
  run.start(config, small.dataset())

  class Killed(Exception):
    pass

  def kill(record):
    raise Killed

  with pytest.raises(Killed):
    training.train(simulation, run, kill)
  source.rename(tmp_path / 'gone')
  again = simulation_lib.build(config, small.dataset())
  training.train(again, run, lambda record: None)
  assert len(run.records()) == 2


@pytest.mark.slow
def test_embeddings_come_along_whatever_the_shrinkage(tmp_path):
  # It acts where items are ranked, not on what was trained.
  changes = dict(small.PLAIN, item_embedding='content_plus_id')
  path = train(tmp_path / 'run', **changes, num_rounds=1)
  changes |= dict(
    load='embeddings', item_embedding='content_plus_id,shrinkage=1'
  )
  start(path, **changes).init_state()
  changes['item_embedding'] = 'content_plus_id,collaborative_dim=2'
  with pytest.raises(UserError, match='item_embedding=content_plus_id'):
    start(path, **changes).init_state()
