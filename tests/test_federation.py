"""The round: vmapped = looped, other clients change nothing, one compile."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.client import update as client_lib
from fedmmr_jax.client import windows
from fedmmr_jax.client.drift import Cohort, DriftControl
from fedmmr_jax.data.dataset import client_view
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.federation import server as server_lib
from fedmmr_jax.federation.aggregators import FedAvg, WeightedSum
from fedmmr_jax.models import sasrec
from tests import parity, small

PRESETS = pathlib.Path(__file__).parents[1] / 'experiments' / 'presets'
COHORT = np.array([[8, 5], [2, 0]], np.int32)


@pytest.fixture(scope='module')
def simulation():
  # SGD: Adam's first steps are the gradient's sign, which is noise where the
  # gradient is 0 but for rounding (the bias of the attention keys).
  return small.simulation(
    experts='semantic',
    dropout=0.1,
    client_optimizer='sgd',
    client_learning_rate=0.1,
  )


@pytest.fixture(scope='module')
def update_alone(simulation):
  """Round 1 of one client, on its own."""
  start = simulation.init_state()
  key = round_lib.round_key(simulation.config.seed, 1)

  @jax.jit
  def update(index):
    view = client_view(simulation.data, index, simulation.max_items)
    return client_lib.local_update(
      simulation.program.client,
      start.server.broadcast(simulation.catalogue, simulation.config),
      view,
      jax.tree.map(lambda x: x[index], start.memories),
      None,
      jax.random.fold_in(key, index),
      windows.num_steps(view.num_train, simulation.config),
    )

  return update


def run(simulation, cohort, state=None, number=1):
  state = simulation.init_state() if state is None else small.copy(state)
  return simulation.run_round(state, number, np.asarray(cohort, np.int32))


def test_vmapped_round_equals_a_loop_over_clients(simulation, update_alone):
  got, means = run(simulation, COHORT)
  start = simulation.init_state()
  updates = [update_alone(index) for index in COHORT.ravel()]
  weights = [float(u.weight) for u in updates]
  mean = jax.tree.map(
    lambda *d: sum(w * x for w, x in zip(weights, d)) / sum(weights),
    *(u.delta for u in updates),
  )
  small.assert_trees_close(
    jax.tree.map(jnp.subtract, got.server.params, start.server.params),
    mean,
    rtol=1e-3,
    atol=2e-6,
  )
  for index, update in zip(COHORT.ravel(), updates):
    memory = jax.tree.map(lambda x: x[index], got.memories)
    np.testing.assert_array_equal(memory.item, update.memory.item)
    np.testing.assert_array_equal(memory.frequency, update.memory.frequency)
  total = sum(float(u.metrics['loss'].total) for u in updates)
  np.testing.assert_allclose(means['loss'], total / sum(weights), rtol=1e-4)


@pytest.mark.slow
def test_fednova_averages_mean_steps(simulation, update_alone):
  """Σ p_i Δ_i / τ_i times Σ p_i τ_i, clients of 1 to several steps."""
  updates = [update_alone(index) for index in COHORT.ravel()]
  steps = [
    int(windows.num_steps(simulation.num_train[index], simulation.config))
    for index in COHORT.ravel()
  ]
  assert len(set(steps)) > 1
  shares = np.array([float(u.weight) for u in updates])
  shares /= shares.sum()
  effective = shares @ steps
  mean = jax.tree.map(
    lambda *deltas: sum(
      p * effective / n * d for p, n, d in zip(shares, steps, deltas)
    ),
    *(u.delta for u in updates),
  )
  got, _ = run(
    simulation_lib.build(
      simulation.config.changed({'aggregator': 'fednova'}), simulation.dataset
    ),
    COHORT,
  )
  start = simulation.init_state()
  small.assert_trees_close(
    jax.tree.map(jnp.subtract, got.server.params, start.server.params),
    mean,
    rtol=1e-3,
    atol=2e-6,
  )


def test_order_of_the_cohort_changes_nothing(simulation):
  clients = COHORT.ravel()
  num_train = simulation.num_train
  first = round_lib.chunked(clients, num_train, 2)
  second = round_lib.chunked(clients[::-1], num_train, 2)
  np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_chunking_changes_only_rounding(simulation):
  small.assert_trees_close(
    run(simulation, COHORT)[0].server.params,
    run(simulation, COHORT.reshape(1, 4))[0].server.params,
    rtol=1e-3,
    atol=2e-6,
  )


def test_padding_clients_change_nothing(simulation):
  padded = np.array([[8, 5], [2, 0], [-1, -1]])
  small.assert_trees_equal(run(simulation, COHORT), run(simulation, padded))


def test_a_client_is_not_touched_by_its_neighbours(simulation):
  """Its memory after the round is the same whoever else is in the chunk."""
  with_8 = run(simulation, [[8, 5]])[0].memories
  with_2 = run(simulation, [[2, 5]])[0].memories
  for a, b in zip(with_8, with_2):
    np.testing.assert_allclose(a[5], b[5], rtol=1e-4)


def test_clients_outside_the_cohort_keep_their_memory(simulation):
  start = simulation.init_state()
  after, _ = run(simulation, COHORT)
  outside = [1, 3, 4, 6, 7]
  small.assert_trees_equal(
    jax.tree.map(lambda x: x[np.array(outside)], start.memories),
    jax.tree.map(lambda x: x[np.array(outside)], after.memories),
  )
  assert (np.asarray(after.memories.clock)[COHORT.ravel()] > 0).all()


@pytest.mark.slow
def test_a_lone_client_makes_fedavg_take_its_parameters(
  simulation, update_alone
):
  start = simulation.init_state()
  after, _ = run(simulation, [[3, -1]])
  small.assert_trees_close(
    after.server.params,
    jax.tree.map(jnp.add, start.server.params, update_alone(3).delta),
    atol=2e-6,
  )


def test_the_second_round_compiles_nothing(simulation):
  state, _ = run(simulation, COHORT)
  compiled = small.compiled_rounds()
  # Other clients, other lengths, other steps: the same program.
  run(simulation, [[7, 1], [6, 4]], state, 2)
  assert small.compiled_rounds() == compiled


def test_no_parameter_starts_weakly_typed(monkeypatch):
  """It would be another type after round 1, which the second compiles for."""

  def weak(key, shape):
    return jnp.broadcast_to(-0.5 * jnp.arange(shape[1]), shape)

  assert weak(None, (2, 6)).weak_type
  monkeypatch.setattr(
    sasrec, 'RANDOM', sasrec.RANDOM._replace(distance_embedding=weak)
  )
  state = small.simulation(**small.PLAIN, positions='relative').init_state()
  params = state.server.params
  np.testing.assert_array_equal(
    params['backbone']['block_0']['distance_embedding'],
    weak(None, (2, small.config().model.max_seq_len)),
  )
  assert not any(x.weak_type for x in jax.tree.leaves(state.server))


def test_the_same_seed_gives_the_same_bits(simulation):
  small.assert_trees_equal(run(simulation, COHORT), run(simulation, COHORT))


def test_cohort_sampling():
  config = small.config(client_fraction=0.5, clients_per_chunk=4)
  lengths = np.random.default_rng(0).integers(5, 50, 21)
  cohort = round_lib.sample_cohort(config, 1, lengths)
  chosen = cohort[cohort >= 0]
  # round(0.5 * 21) = 10 clients, in chunks of 2 instead of 4 so that all shards
  # but the last have some.
  assert cohort.shape == (5, 2) and len(set(chosen)) == len(chosen) == 10
  assert (np.diff(lengths[chosen]) <= 0).all()  # longest first
  np.testing.assert_array_equal(
    cohort, round_lib.sample_cohort(config, 1, lengths)
  )
  assert (cohort != round_lib.sample_cohort(config, 2, lengths)).any()


def test_masked_fraction_by_hand():
  # 10 and 6 training items -> 9 and 5 positives, batch 4:
  # 3 steps for both, 24 slots executed, 14 used.
  config = small.config(batch_size=4)
  got = round_lib.masked_fraction(np.array([[0, 1]]), np.array([10, 6]), config)
  assert got == pytest.approx(1 - 14 / 24)


def test_of_a_round_without_positives_nothing_is_masked():
  # A single training item has nothing before it: no client makes a step, and a
  # NaN would end the run where its record is written.
  got = round_lib.masked_fraction(
    np.array([[0, 1]]), np.array([1, 1]), small.config()
  )
  assert got == 0.0


@pytest.mark.parametrize('preset', ['recommended', 'paper'])
def test_little_is_masked_on_the_real_lengths(preset):
  """Below 15 % of the executed work, in each round (MovieLens-1M)."""
  ratings = parity.require(parity.SHARED / 'data' / 'ml-1m' / 'ratings.dat')
  flags = dict(
    line[2:].split('=', 1)
    for line in (PRESETS / f'{preset}.flags').read_text().splitlines()
    if line.startswith('--')
  )
  config = small.config(
    max_seq_len=50,
    objective=flags['objective'],
    batch_size=int(flags['batch_size']),
    client_fraction=0.1,
    clients_per_chunk=int(flags['clients_per_chunk']),
  )
  num_train = (
    np.sort(
      np.unique(
        [int(line.split(b'::')[0]) for line in ratings.open('rb')],
        return_counts=True,
      )[1]
    )[-1000:]
    - 2
  )
  assert (
    max(
      round_lib.masked_fraction(
        round_lib.sample_cohort(config, number, num_train), num_train, config
      )
      for number in range(1, 21)
    )
    < 0.15
  )


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['text', 'visual', 'both'])
def test_a_round_without_features(kind):
  dataset = small.dataset()
  kinds = ('text', 'visual') if kind == 'both' else (kind,)
  features = {k: x for k, x in dataset.features.items() if k not in kinds}
  dataset = dataclasses.replace(dataset, features=features)
  state, means = run(simulation_lib.build(small.config(), dataset), COHORT)
  assert np.isfinite(means['loss'])
  assert state.server.round == 1


@pytest.mark.parametrize(
  'name, expected',
  [
    # Adam's first step is lr · sign(g); yogi likewise. Delta is 0.5.
    ('fedavg', 0.1 * 0.5),
    ('fedavgm', 0.1 * 0.5),
    ('fedadam', 0.1),
    ('fedyogi', 0.1),
  ],
)
def test_server_optimizers_first_step(name, expected):
  config = small.config(server_optimizer=name, server_learning_rate=0.1)
  params = {'item_embedding': jnp.zeros(3), 'router': jnp.zeros(3)}
  state = server_lib.init(
    params, config, 4, FedAvg(), DriftControl(), (), jax.random.key(0)
  )
  delta_sum = jax.tree.map(lambda x: x + 2.0, params)  # Σ w·d with Σ w = 4
  after = aggregate(state, delta_sum, 4.0, config)
  np.testing.assert_allclose(after.params['router'], expected, rtol=5e-3)
  assert after.round == 1


@pytest.mark.parametrize('name', ['fedavg', 'fedavgm', 'fedadam', 'fedyogi'])
def test_what_got_no_update_does_not_move(name):
  config = small.config(server_optimizer=name, server_learning_rate=0.1)
  params = {'item_embedding': jnp.ones(3), 'router': jnp.ones(3)}
  state = server_lib.init(
    params, config, 4, FedAvg(), DriftControl(), (), jax.random.key(0)
  )
  for _ in range(3):
    state = aggregate(state, jax.tree.map(jnp.zeros_like, params), 4.0, config)
  small.assert_trees_equal(state.params, params)


def test_masked_fraction_under_a_step_limit():
  num_train = np.array([30, 11])  # 5 and 2 windows of 6
  config = small.config(
    objective='all_positions',
    negatives='shared',
    batch_size=1,
    max_local_steps=3,
  )
  # Chunks run 3 steps; 3 and 2 of them train something.
  assert round_lib.masked_fraction(
    np.array([[0, 1]]), num_train, config
  ) == pytest.approx(1 - 5 / 6)


def test_nobody_trained_leaves_the_parameters(simulation):
  start = simulation.init_state()
  after, means = run(simulation, [[-1, -1]])
  small.assert_trees_equal(after.server.params, start.server.params)
  # Means of nothing are None, counts of nobody 0.
  assert not any(means.values())


def test_partial_aggregation_holds_the_experts_back():
  config = small.config(partial_aggregation_warmup_rounds=1)
  params = {
    'item_embedding': jnp.zeros(3),
    'backbone': {'w': jnp.zeros(3)},
    'router': jnp.zeros(3),
  }
  state = server_lib.init(
    params, config, 4, FedAvg(), DriftControl(), (), jax.random.key(0)
  )
  delta = jax.tree.map(lambda x: x + 1.0, params)
  first = aggregate(state, delta, 1.0, config)
  assert first.params['item_embedding'].all()
  assert first.params['backbone']['w'].all()
  assert not first.params['router'].any()
  second = aggregate(first, delta, 1.0, config)
  assert second.params['router'].all()


def aggregate(state, delta_sum, weight, config):
  """A server step on Σ weight · delta, without prototypes."""
  weight = jnp.float32(weight)
  upload = server_lib.Upload(
    WeightedSum(delta_sum, weight, weight), None, weight, jnp.float32(1.0)
  )
  everybody = Cohort(weight, *[jnp.float32(100.0)] * 3)
  return server_lib.aggregate(
    state, upload, None, None, everybody, config, FedAvg(), DriftControl()
  )


@pytest.mark.slow
def test_prototypes_reach_the_server():
  simulation = small.simulation(
    **small.ONE_EXPERT, global_memory='prototypes,number=2,iterations=3'
  )
  after, _ = run(simulation, COHORT)
  stored = np.asarray(after.memories.item)[COHORT.ravel()]
  with_text = (stored > 0) & np.asarray(simulation.catalogue.has['text'])[
    stored
  ]
  assert after.server.prototypes.size.sum() == with_text.sum()


@pytest.mark.slow
def test_nothing_is_kept_that_nobody_reads(simulation):
  """Prototypes without --global_memory, memories without experts."""
  assert simulation.init_state().server.prototypes is None
  alone = small.simulation(experts='none')
  after, means = run(alone, COHORT)
  assert after.memories is None and after.server.prototypes is None
  assert means['memory_fill'] is None
  assert means['contrastive_loss'] is None
  one, many = (
    round_lib.train_shard.lower(
      s.program,
      np.array(COHORT, np.int32),
      s.init_state(),
      jax.random.key(0),
      s.catalogue,
      s.data,
    ).as_text()
    for s in (alone, small.simulation())
  )
  targets = simulation.config.client.batch_size
  # No two representations of the targets are held against each other.
  assert f'tensor<2x{targets}x{targets}xf32>' in many
  assert f'tensor<2x{targets}x{targets}xf32>' not in one


# Each combination is a compilation, so the variants share a few.
@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    dict(
      fusion='gated',
      contrastive='adaptive_temperature',
      drift_control='fedprox,mu=0.1',
      server_optimizer='fedyogi',
    ),
    dict(
      global_memory='prototypes,number=2,iterations=3',
      contrastive='unweighted',
      local_epochs=2,
      objective='all_positions',
      negatives='shared',
    ),
  ],
)
def test_every_variant_trains(changes):
  simulation = small.simulation(**changes)
  state, means = run(simulation, COHORT)
  assert all(np.isfinite(mean).all() for mean in means.values())
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.server.params))


@pytest.mark.slow
@pytest.mark.parametrize('objective', ['last', 'all_positions'])
@pytest.mark.parametrize('negatives', ['per_sample', 'shared'])
def test_a_model_without_experts_trains(objective, negatives):
  simulation = small.simulation(
    experts='none', objective=objective, negatives=negatives
  )
  assert next(simulation.rounds()).metrics['loss'] > 0
