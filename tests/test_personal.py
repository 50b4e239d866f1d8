"""Personal parts stay with their client: they are trained there, used to rank,
and nobody else sees or moves them."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.client import personal as personal_lib
from fedmmr_jax.client import update as client_lib
from fedmmr_jax.data.dataset import client_view
from fedmmr_jax.data.load import Loaded
from fedmmr_jax.deploy import scorer as scorer_lib
from fedmmr_jax.deploy import server as server_lib
from fedmmr_jax.evaluation import (
  ablation,
  audit,
  explanation,
  ranking,
  recommendation,
)
from fedmmr_jax.evaluation.ablation import Variant
from fedmmr_jax.evaluation.recommendation import People
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.federation.transforms import UpdateTransform
from fedmmr_jax.models import groups
from fedmmr_jax.runs.run_folder import RunFolder
from tests import small
from tests.test_cli import refused, run, TINY
from tests.test_warm_start import NAMED, saved, train

# Where all that matters is that something is personal.
OWN_BACKBONE = dict(small.PLAIN, personal='backbone')


@pytest.fixture(scope='module')
def routed():
  return small.simulation(personal='router')


def personal_leaves(tree, names):
  return [
    np.asarray(x)
    for x, own in zip(
      jax.tree.leaves(tree), jax.tree.leaves(groups.mask(tree, names))
    )
    if own
  ]


def shaken(simulation, state, clients, by=0.5):
  """The state with noise on the personal parameters of some clients."""
  keys = iter(jax.random.split(jax.random.key(7), 99))
  chosen = np.isin(np.arange(simulation.dataset.num_clients), clients)
  return state._replace(
    personal=jax.tree.map(
      lambda x: (
        x
        + by
        * jax.random.normal(next(keys), x.shape)
        * chosen.reshape(-1, *[1] * (x.ndim - 1))
      ),
      state.personal,
    )
  )


def test_cut_put_and_without():
  params = {
    'router': {'input': {'kernel': jnp.ones(2)}, 'norm': jnp.ones(3)},
    'backbone': jnp.ones(4),
  }
  names = ('router/input',)
  own = personal_lib.cut(params, names)
  assert jax.tree.map(jnp.shape, own) == {'router': {'input': {'kernel': (2,)}}}
  put = personal_lib.put(params, jax.tree.map(lambda x: 3 * x, own))
  assert put['router']['input']['kernel'].tolist() == [3, 3]
  assert put['router']['norm'].tolist() == [1, 1, 1]
  assert put['backbone'] is params['backbone']
  broken = jax.tree.map(lambda x: x * jnp.nan, params)
  zero = personal_lib.without(broken, names)
  assert zero['router']['input']['kernel'].tolist() == [0, 0]
  assert np.isnan(zero['backbone']).all()
  assert personal_lib.cut(params, ()) is None
  assert personal_lib.without(params, ()) is params


@pytest.mark.parametrize('server_optimizer', ['fedadam', 'fedmuon'])
def test_the_server_keeps_what_all_start_from(server_optimizer):
  simulation = small.simulation(
    **OWN_BACKBONE, server_optimizer=server_optimizer
  )
  start = jax.device_get(simulation.init_state())
  state = jax.device_get(small.after_rounds(simulation))
  names = simulation.config.federation.personal_groups
  for new, old in zip(
    personal_leaves(state.server.params, names),
    personal_leaves(start.server.params, names),
  ):
    np.testing.assert_array_equal(new, old)
  table = 'item_embedding'
  assert (state.server.params[table] != start.server.params[table]).any()


@pytest.mark.slow
def test_only_who_trains_moves_its_own(routed):
  start = jax.device_get(routed.init_state())
  cohort = routed.sample_cohort(1)
  state, _ = routed.run_round(routed.init_state(), 1, cohort)
  trained = np.isin(
    np.arange(routed.dataset.num_clients),
    [k for k in cohort.reshape(-1) if k >= 0 and routed.num_train[k] > 1],
  )
  assert 0 < trained.sum() < len(trained)
  for name in ('input', 'logits'):
    moved = np.abs(
      np.asarray(state.personal['router'][name]['kernel'])
      - start.personal['router'][name]['kernel']
    ).max(axis=(1, 2))
    assert ((moved > 0) == trained).all()


@pytest.mark.slow
def test_a_round_is_its_clients_one_by_one(routed):
  state = shaken(routed, routed.init_state(), [0, 2, 5])
  cohort = np.array([[0, 2], [5, -1]], np.int32)
  key = round_lib.round_key(0, 1)
  broadcast = state.server.broadcast(routed.catalogue, routed.compiled_config)
  local = jax.jit(partial(client_lib.local_update, routed.program.client))
  expected = {}
  for client in (0, 2, 5):
    view = client_view(routed.data, client, routed.max_items)
    expected[client] = local(
      broadcast,
      view,
      *(jax.tree.map(lambda x: x[client], state.memories), None),
      jax.random.fold_in(key, client),
      jnp.int32(20),
      personal=jax.tree.map(lambda x: x[client], state.personal),
    )
  state, _ = routed.run_round(small.copy(state), 1, cohort)
  for client, update in expected.items():
    small.assert_trees_close(
      jax.tree.map(lambda x: x[client], state.personal), update.personal
    )
    # Nothing of a personal part is in what goes to the server.
    for delta in personal_leaves(update.delta, ('router',)):
      assert not delta.any()
    assert np.any(update.delta['sequence_norm']['scale'])


@pytest.mark.slow
def test_other_clients_and_padding_change_nothing_of_ones_own(routed):
  state = routed.init_state()
  results = []
  for change, cohort in (
    (state, [[0, 2]]),
    (shaken(routed, state, [1, 2, 3]), [[0, 2]]),
    (state, [[0, -1]]),
    (state, [[0, 4]]),
  ):
    after, _ = routed.run_round(
      small.copy(change), 1, np.array(cohort, np.int32)
    )
    results.append(jax.tree.map(lambda x: np.asarray(x[0]), after.personal))
  for other in results[1:]:
    small.assert_trees_close(other, results[0], rtol=1e-6, atol=1e-8)


def test_whatever_an_update_says_of_a_personal_part_is_dropped():
  simulation = small.simulation(**OWN_BACKBONE)

  @dataclasses.dataclass(frozen=True)
  class Noise(UpdateTransform):
    def apply(self, update, kept, sender):
      return update._replace(
        delta=jax.tree.map(lambda x: x + 1.0, update.delta)
      ), kept

  noisy = dataclasses.replace(simulation, transforms=(Noise(),))
  start = jax.device_get(simulation.init_state().server.params)
  after = jax.device_get(small.after_rounds(noisy, 1).server.params)
  small.assert_trees_equal(after['backbone'], start['backbone'])
  assert (after['item_embedding'] != start['item_embedding'])[1:].all()


@pytest.mark.slow
def test_a_client_that_diverges_keeps_what_it_had():
  simulation = small.simulation(
    **OWN_BACKBONE, client_learning_rate=1e30, client_optimizer='sgd'
  )
  start = jax.device_get(simulation.init_state().personal)
  state, metrics = simulation.run_round(
    simulation.init_state(), 1, simulation.sample_cohort(1)
  )
  assert not metrics[metrics_lib.ANSWERED]
  small.assert_trees_equal(state.personal, start)


@pytest.mark.slow
def test_the_second_round_compiles_nothing(routed):
  small.after_rounds(routed, 1)
  compiled = small.compiled_rounds()
  small.after_rounds(routed, 3)
  assert small.compiled_rounds() == compiled


@pytest.mark.slow
def test_scaffold_keeps_and_sends_nothing_of_personal_parts():
  changes = dict(drift_control='scaffold', client_optimizer='sgd')
  simulation = small.simulation(**OWN_BACKBONE, **changes)
  state = jax.device_get(small.after_rounds(simulation))
  for tree in (state.server.control, state.controls):
    for x in personal_leaves(tree, ('backbone',)):
      assert not x.any()
    assert tree['item_embedding'].any()
  with_backbone = small.simulation(**small.PLAIN, **changes)
  cohort = simulation.sample_cohort(1)
  more, less = (
    s.traffic(cohort, {'item_rows': 30.0}) for s in (with_backbone, simulation)
  )
  backbone = 4 * sum(
    x.size for x in personal_leaves(state.server.params, ('backbone',))
  )
  visits = int((cohort >= 0).sum())
  # Parameters and control variates, both ways.
  assert more.bytes_down - less.bytes_down == 2 * visits * backbone > 0
  assert more.bytes_up - less.bytes_up == 2 * visits * backbone


def test_personal_parts_cost_no_bytes(routed):
  cohort = routed.sample_cohort(1)
  visits = int((cohort >= 0).sum())
  whole = small.simulation().traffic(cohort, {'item_rows': 30.0})
  found = routed.traffic(cohort, {'item_rows': 30.0})
  # 16 x 8 + 8, norm 8 + 8, 8 x 4 + 4, 4 x 2 + 2 numbers of four bytes.
  router = 4 * (136 + 16 + 36 + 10)
  assert whole.bytes_down - found.bytes_down == visits * router
  assert whole.bytes_up - found.bytes_up == visits * router
  assert found.visits == whole.visits


@pytest.mark.slow
@pytest.mark.parametrize('vocabulary', ['dense', 'local'])
def test_a_personal_item_table_moves_where_its_client_was(vocabulary):
  simulation = small.simulation(
    **small.PLAIN,
    personal='item_embedding',
    vocabulary=vocabulary,
    client_optimizer='sgd',
  )
  start = jax.device_get(simulation.init_state())
  cohort = np.array([[0, 2]], np.int32)
  state, _ = simulation.run_round(simulation.init_state(), 1, cohort)
  table = np.asarray(state.personal['item_embedding'])
  np.testing.assert_array_equal(
    state.server.params['item_embedding'], start.server.params['item_embedding']
  )
  for client in (0, 2):
    moved = np.flatnonzero(
      (table[client] != start.personal['item_embedding'][client]).any(axis=1)
    )
    history = simulation.dataset.sequence(client)
    assert np.isin(history[: simulation.num_train[client]], moved).all()
  np.testing.assert_array_equal(table[1], start.personal['item_embedding'][1])
  # Each is ranked with its own table.
  other = shaken(simulation, state, [0])
  one, two = (simulation.evaluate(s, 'test')[1].full for s in (state, other))
  assert one[0] != two[0] and (one[1:] == two[1:]).all()


@pytest.mark.slow
def test_seeds_side_by_side_are_seeds_one_by_one():
  # SGD: Adam makes rounding visible.
  simulation = small.simulation(
    **OWN_BACKBONE, client_optimizer='sgd', client_learning_rate=0.1
  )
  simulations = [simulation.with_seed(seed) for seed in (0, 1)]
  states = jax.tree.map(
    lambda *x: jnp.stack(x), *[s.init_state() for s in simulations]
  )
  states, _ = ablation.run_round(simulations, states, 1)
  for number, simulation in enumerate(simulations):
    alone = small.after_rounds(simulation, 1)
    small.assert_trees_close(
      jax.tree.map(lambda x: x[number], states.personal), alone.personal
    )


# Evaluation


@pytest.fixture(scope='module')
def two_routers(routed):
  """A state whose clients 0 and 1 have routers of their own, and the same
  state of a run where all have the one or the other."""
  state = shaken(routed, small.after_rounds(routed), [0, 1], by=2.0)
  plain = small.simulation()
  shared = [
    state._replace(
      server=state.server._replace(
        params=personal_lib.put(
          state.server.params, jax.tree.map(lambda x: x[client], state.personal)
        )
      ),
      personal=None,
    )
    for client in (0, 1)
  ]
  return state, plain, shared


@pytest.mark.slow
def test_clients_are_ranked_with_their_own(routed, two_routers):
  state, plain, shared = two_routers
  ranks = routed.evaluate(state, 'test')[1].full
  for client in (0, 1):
    expected = plain.evaluate(shared[client], 'test')[1].full
    assert ranks[client] == expected[client]
  scores = [
    np.asarray(
      ranking.score_client(
        plain.model,
        plain.compiled_config,
        s.server,
        np.pad(
          plain.dataset.sequence(0),
          (0, plain.max_items - len(plain.dataset.sequence(0))),
        ).astype(np.int32),
        np.int32(len(plain.dataset.sequence(0))),
        plain.num_train[0].astype(np.int32),
        jax.tree.map(lambda x: x[0], s.memories),
        plain.catalogue,
      )
    )
    for s in shared
  ]
  # The two routers do not score alike, or nothing is shown.
  assert np.abs(scores[0] - scores[1])[1:].max() > 1e-3


@pytest.mark.slow
def test_lists_are_of_their_own(routed, two_routers):
  state, plain, shared = two_routers
  people = People.of_clients(routed, [0, 1])
  lists = recommendation.recommend(routed, state, people, 8)
  for client in (0, 1):
    expected = recommendation.recommend(plain, shared[client], people, 8)
    np.testing.assert_array_equal(lists.rows[client], expected.rows[client])
    np.testing.assert_allclose(
      lists.scores[client], expected.scores[client], rtol=1e-5
    )
    rows, scores = routed.recommend(state, client, 8)
    np.testing.assert_array_equal(rows, lists.rows[client])
    np.testing.assert_allclose(scores, lists.scores[client], rtol=1e-5)
    told = explanation.explain(
      routed, state, People.of_clients(routed, [client]), 8
    )
    theirs = explanation.explain(
      plain, shared[client], People.of_clients(plain, [client]), 8
    )
    small.assert_trees_close(told.recall.weights, theirs.recall.weights)
    small.assert_trees_close(told.reasons.effects, theirs.reasons.effects)
    np.testing.assert_allclose(
      routed.route(state, client), plain.route(shared[client]), rtol=1e-6
    )


@pytest.mark.slow
def test_strangers_have_the_servers(routed, two_routers):
  state, plain, _ = two_routers
  histories = [routed.dataset.sequence(0).tolist()]
  people = People.of_histories(routed, histories)
  found = recommendation.recommend(routed, state, people, 8)
  expected = recommendation.recommend(
    plain, state._replace(personal=None), people, 8
  )
  np.testing.assert_array_equal(found.rows, expected.rows)
  np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


# Fine-tuning


def how_to_tune(**changes):
  return small.config(client_optimizer='sgd', **changes).client


@pytest.mark.slow
def test_fine_tuning_without_a_step_ranks_as_before():
  # A rate that moves no float: so it starts from the state's parameters and
  # everybody's own, and what differs is none of its doing. There are no
  # memories, which would go on.
  simulation = small.simulation(**OWN_BACKBONE)
  start = simulation.init_state()
  state = shaken(simulation, start, [0, 1], by=2.0)
  of_all = simulation.evaluate(start, 'test')[1].full
  tuned = simulation.rank_fine_tuned(
    state, how_to_tune(client_learning_rate=1e-30)
  )
  assert sorted(tuned) == ['test', 'val']
  for split, ranks in tuned.items():
    expected = simulation.evaluate(state, split)[1]
    np.testing.assert_array_equal(ranks.full, expected.full)
    np.testing.assert_array_equal(ranks.sampled, expected.sampled)
  assert (tuned['test'].full[:2] != of_all[:2]).all()


@pytest.mark.slow
def test_fine_tuning_is_a_local_update_and_leaves_the_state(routed):
  state = small.after_rounds(routed)
  before = jax.device_get(state)
  how = how_to_tune(client_learning_rate=0.3, local_epochs=2)
  found = routed.rank_fine_tuned(state, how, ['test'])['test']
  small.assert_trees_equal(jax.device_get(state), before)
  assert (found.full != routed.evaluate(state, 'test')[1].full).any()
  # One client, by hand: its update is all that changes for it.
  client = 3
  config = dataclasses.replace(routed.compiled_config, client=how)

  def own(tree):
    return jax.tree.map(lambda x: x[client], tree)

  params = personal_lib.put(state.server.params, own(state.personal))
  server = state.server._replace(params=params)
  view = client_view(routed.data, client, routed.max_items)
  update = jax.jit(
    partial(
      client_lib.local_update,
      dataclasses.replace(routed.program.client, config=config),
    )
  )(
    server.broadcast(routed.catalogue, config),
    view,
    own(state.memories),
    None,
    jax.random.fold_in(round_lib.round_key(0, 3), client),
    jnp.int32(20),
  )
  tuned = state._replace(
    server=server._replace(params=jax.tree.map(jnp.add, params, update.delta)),
    personal=None,
    memories=jax.tree.map(
      lambda all_, new: all_.at[client].set(new), state.memories, update.memory
    ),
  )
  targets = routed.ranked_targets('test').client.tolist()
  expected = small.simulation().evaluate(tuned, 'test')[1]
  at = targets.index(client)
  assert found.full[at] == expected.full[at]


# Runs


@pytest.mark.slow
def test_a_resumed_run_equals_the_straight_one(tmp_path):
  changes = dict(OWN_BACKBONE, drift_control='scaffold', client_optimizer='sgd')
  for folder, rounds in (('straight', [3]), ('resumed', [2, 3])):
    for number in rounds:
      train(tmp_path / folder, num_rounds=number, **changes)
  straight, resumed = (
    saved(tmp_path / name, 3) for name in ('straight', 'resumed')
  )
  small.assert_trees_equal(resumed, straight)
  start = small.simulation(**NAMED, **changes).init_state()
  for moved, drawn in zip(
    jax.tree.leaves(straight.personal), jax.tree.leaves(start.personal)
  ):
    assert (np.asarray(moved) != drawn).any()


@pytest.mark.slow
def test_what_was_trained_together_is_where_all_start(tmp_path):
  together = train(tmp_path / 'together', num_rounds=1)
  start = small.config(
    **NAMED, personal='router', pretrained_path=str(together), load='router'
  )
  state = simulation_lib.build(start, small.dataset()).init_state()
  loaded = saved(together, 1).server.params['router']
  small.assert_trees_equal(state.server.params['router'], loaded)
  for client in (0, 4):
    small.assert_trees_equal(
      jax.tree.map(lambda x: x[client], state.personal['router']), loaded
    )
  # Of a run that kept it with the clients, the server has nothing to give.
  apart = train(tmp_path / 'apart', num_rounds=1, personal='router')
  for load in ('all', 'router', 'router/logits'):
    source = simulation_lib.build(
      small.config(**NAMED, pretrained_path=str(apart), load=load),
      small.dataset(),
    )
    assert 'its clients kept theirs' in small.error_of(source.init_state)
  kept = simulation_lib.build(
    small.config(**NAMED, pretrained_path=str(apart), load='backbone'),
    small.dataset(),
  )
  small.assert_trees_equal(
    kept.init_state().server.params['backbone'],
    saved(apart, 1).server.params['backbone'],
  )
  out, _ = run('inspect_checkpoint', f'--workdir={apart}', '--json', 'show', 1)
  logits = next(
    p
    for p in json.loads(out)['personal']
    if p['name'] == 'router/logits/kernel'
  )
  assert logits['clients'] == 9 and 0 < logits['moved'] <= 5
  assert logits['mean_distance'] > 0
  assert 'a router of its own' in refused(
    f'--workdir={apart}', 'router', '1', binary='inspect_checkpoint'
  )
  error = small.error_of(
    scorer_lib.weights_of,
    simulation_lib.build(RunFolder(apart).config(), small.dataset()),
    saved(apart, 1),
  )
  assert 'export a run without `personal`' in error


@pytest.mark.slow
def test_held_out_items_reach_no_personal_part():
  simulation = small.simulation(
    **small.ONE_EXPERT, personal='experts,item_embedding', client_fraction=1.0
  ).with_popular_negatives()
  checks = {c.name: c for c in audit.trained_rounds(simulation, 2)}
  assert checks['2 rounds'].passed
  assert 'personal ones included' in checks['2 rounds'].found


@pytest.mark.slow
def test_fine_tuning_as_a_variant_and_of_new_clients():
  changes = dict(small.ONE_EXPERT, new_clients=0.3)
  config = small.config(**changes)
  loaded = Loaded(small.dataset(), (), [])
  first, simulations, states = ablation.run_trained(
    config, loaded, [0], lambda *_: None
  )
  ranks = {}
  for epochs in (1, 3):
    how = small.config(
      **changes, local_epochs=epochs, client_learning_rate=0.05
    )
    outcome = ablation.run_special(
      Variant('tuned', '@fine_tuned', {}), how, loaded, [0], simulations, states
    )
    ranks[epochs] = outcome.ranks
    assert set(outcome.ranks) == {'val', 'test', 'new_clients'}
    assert outcome.difference(first, 'full', 'NDCG@10').low <= 1
  for split, found in ranks[1].items():
    assert found.full.shape == first.ranks[split].full.shape
  assert (ranks[1]['test'].full != ranks[3]['test'].full).any()
  assert (ranks[3]['new_clients'].full != first.ranks['new_clients'].full).any()


# Bad input


def test_bad_input():
  def said(**changes):
    return small.error_of(small.simulation, **changes)

  assert 'nearest are' in said(personal='rooter')
  assert 'has no experts' in said(personal='experts', experts='none')
  assert 'has no router' in said(personal='router', experts='visual')
  everything = 'embeddings,backbone,experts,router,fusion'
  assert 'leaves the server nothing' in said(personal=everything)
  assert 'leaves the server nothing' in said(
    personal='backbone,experts,router', freeze='embeddings,fusion'
  )
  assert 'name the same parameters' in said(
    personal='router', freeze='router/norm'
  )
  assert '`drift_control=mime_lite`' in said(
    personal='router', drift_control='mime_lite', client_optimizer='sgd'
  )
  assert '`compression=int8`' in said(personal='router', compression='int8')
  assert 'shrinkage' in said(
    personal='embeddings', item_embedding='content_plus_id,shrinkage=0.1'
  )


def test_too_much_is_refused_early(monkeypatch):
  monkeypatch.setattr(round_lib, 'MOST_STATE_BYTES', 10_000)
  # 9 clients, each 61 rows of 16 numbers.
  error = small.error_of(small.simulation, personal='embeddings')
  rows = small.dataset().num_rows
  assert f'{4 * 16 * rows:,} bytes for each of 9 clients' in error
  assert '`personal=router`' in error
  small.simulation(personal='router/logits')


def test_a_network_refuses_it():
  config = small.config(personal='router')
  error = small.error_of(server_lib.check, config)
  assert '`personal=router`' in error and 'a node keeps' in error


@pytest.mark.slow
def test_fine_tuning_in_the_binaries(ml_1m, tmp_path):
  # Without experts, which take long to compile.
  tiny = (*TINY, f'--data_dir={ml_1m}', '--experts=none')
  run('train', *tiny, '--personal=backbone', f'--workdir={tmp_path / "run"}')
  out, _ = run(
    'evaluate', f'--workdir={tmp_path / "run"}', '--fine_tune=2', '--json'
  )
  told = json.loads(out)
  assert told['fine_tuned']['epochs'] == 2
  difference = told['fine_tuned']['difference']['full']['MRR']
  assert difference['mean'] == pytest.approx(
    told['fine_tuned']['test']['full']['MRR'] - told['test']['full']['MRR']
  )
  out, _ = run(
    *('evaluate', f'--workdir={tmp_path / "run"}', '--fine_tune=1'),
    *('--fine_tune_rate=0.5', '--protocol=full'),
  )
  assert 'fine-tuned by each client for 1 epoch at 0.5' in out
  assert 'difference to the model without' in out
  assert '--fine_tune' in refused(
    *(f'--workdir={tmp_path / "run"}', '--fine_tune_rate=1'), binary='evaluate'
  )
  variants = tmp_path / 'v.txt'
  for flags, error in (
    ('--local_epochs=2', None),
    ('--hidden_dim=8', "trains the first variant's model"),
  ):
    variants.write_text(
      f'own: --personal=backbone\ntuned: @fine_tuned {flags}\n'
    )
    told = (
      *tiny,
      f'--variants={variants}',
      '--seeds=0',
      f'--workdir={tmp_path / "out"}',
    )
    if error:
      assert error in refused(*told, binary='ablate')
    else:
      assert '| tuned |' in run('ablate', *told)[0]
