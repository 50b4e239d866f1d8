"""Optimizers of a round, learning rates, drift control: numbers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedmmr_jax import optimizers
from fedmmr_jax.client import drift
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import ablation
from fedmmr_jax.federation import round as round_lib
from tests import small


@pytest.mark.parametrize(
  'schedule, finished, expected',
  [
    ('constant', 0, 0.2),
    ('constant', 9, 0.2),
    ('linear', 0, 0.2),
    ('linear', 5, 0.1),
    ('linear', 9, 0.02),
    # 0.2 · (1 + cos(π / 2)) / 2 and the like.
    ('cosine', 0, 0.2),
    ('cosine', 5, 0.1),
    ('cosine', 9, 0.2 * 0.0244717),
  ],
)
def test_learning_rates_over_ten_rounds(schedule, finished, expected):
  config = small.config(
    num_rounds=10,
    client_learning_rate=0.2,
    client_schedule=schedule,
    server_learning_rate=0.2,
    server_schedule=schedule,
  )
  for rate in (
    optimizers.client_learning_rate,
    optimizers.server_learning_rate,
  ):
    np.testing.assert_allclose(
      rate(config, jnp.int32(finished)), expected, rtol=1e-5
    )


def test_warm_up_rises_and_then_the_rate_falls_over_what_is_left():
  config = small.config(
    num_rounds=7, server_learning_rate=1.0, server_schedule='linear,warmup=3'
  )
  rates = [
    float(optimizers.server_learning_rate(config, jnp.int32(n)))
    for n in range(7)
  ]
  np.testing.assert_allclose(
    rates, [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25], rtol=1e-6
  )


def test_fedprox_pulls_to_where_it_started():
  step = drift.FedProx(0.5).transform(None, None)
  state = step.init({'w': jnp.array([1.0, 2.0])})
  gradient, _ = step.update(
    {'w': jnp.array([0.0, 1.0])}, state, {'w': jnp.array([3.0, 2.0])}
  )
  np.testing.assert_allclose(gradient['w'], [1.0, 1.0])


def test_scaffold_adds_the_difference_of_the_control_variates():
  step = drift.Scaffold().transform(
    {'w': jnp.array([1.0, 0.0])}, {'w': jnp.array([0.75, 1.0])}
  )
  gradient, _ = step.update({'w': jnp.array([1.0, 1.0])}, step.init(None))
  np.testing.assert_allclose(gradient['w'], [1.25, 0.0])


def test_mime_lite_steps_by_the_servers_moments_and_keeps_them():
  server = small.config(server_optimizer='fedavgm,momentum=0.5').server
  sent = optax.TraceState({'w': jnp.array([2.0])})
  step = drift.MimeLite(server).transform(sent, None)
  state = step.init(None)
  for gradient in (1.0, 3.0):  # g + 0.5 · 2 both times
    out, state = step.update({'w': jnp.array([gradient])}, state)
    np.testing.assert_allclose(out['w'], [gradient + 1.0])


def test_recorded_gradient_is_the_mean():
  step = drift.record_gradient()
  state = step.init({'w': jnp.zeros(2)})
  small.assert_trees_equal(state.mean(), {'w': jnp.zeros(2)})
  for gradient in ([1.0, 2.0], [3.0, 2.0]):
    out, state = step.update({'w': jnp.array(gradient)}, state)
    np.testing.assert_array_equal(out['w'], gradient)
  np.testing.assert_allclose(state.mean()['w'], [2.0, 2.0])


def server_step(name, delta, client_rate, **changes):
  config = small.config(
    server_optimizer=name,
    server_learning_rate=0.1,
    client_learning_rate=client_rate,
    client_optimizer='sgd',
    **changes,
  )
  params = {
    'backbone': {'kernel': jnp.zeros((2, 2))},
    'item_embedding': jnp.zeros((3, 2)),
  }
  delta = jax.tree.map(lambda x: x + delta, params)
  state = optimizers.server_direction(config.server).init(params)
  updates, _ = optimizers.server_step(
    config, params, state, delta, jnp.int32(0)
  )
  return updates


@pytest.mark.parametrize('name', ['fedadam', 'fedyogi', 'fedmuon'])
def test_an_adaptive_step_does_not_depend_on_the_clients_step_size(name):
  # Deltas are proportional to the client's rate; ε is large enough to show.
  small.assert_trees_close(
    server_step(f'{name},epsilon=0.5', 1e-3, client_rate=1e-3),
    server_step(f'{name},epsilon=0.5', 1e-1, client_rate=1e-1),
  )


def test_fedavg_with_rate_one_is_the_mean_of_the_clients():
  updates = server_step('fedavg', 0.3, client_rate=1e-3)
  np.testing.assert_allclose(updates['item_embedding'], 0.1 * 0.3, rtol=1e-6)


def test_muon_makes_singular_values_equal_and_leaves_tables_to_adam():
  config = small.config(
    server_optimizer='fedmuon',
    server_learning_rate=1.0,
    client_learning_rate=1.0,
  )
  rng = np.random.default_rng(0)
  delta = {
    'kernel': jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
    'item_embedding': jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
    'bias': jnp.asarray(rng.normal(size=4), jnp.float32),
  }
  params = jax.tree.map(jnp.zeros_like, delta)
  direction = optimizers.server_direction(config.server)
  updates, _ = optimizers.server_step(
    config, params, direction.init(params), delta, jnp.int32(0)
  )
  values = jnp.linalg.svd(updates['kernel'], compute_uv=False)
  assert values.max() / values.min() < 1.8  # 5 Newton-Schulz steps: roughly
  assert jnp.linalg.norm(updates['kernel']) / 24**0.5 == pytest.approx(
    1.0, abs=0.3
  )
  # Adam's first step is the sign; with Nesterov's momentum, β₁ = 0.9, that
  # times 0.1 / (1 − 0.9) + 0.9 · 0.1 / (1 − 0.9²).
  for name in ('item_embedding', 'bias'):
    np.testing.assert_allclose(
      updates[name], jnp.sign(delta[name]) * (1 + 0.09 / 0.19), rtol=1e-3
    )


def test_muon_is_the_published_recursion():
  """optax keeps Muon in contrib, where a default may change unseen."""
  config = small.config(server_optimizer='fedmuon,beta1=0.9')
  direction = optimizers.server_direction(config.server)
  params = {'kernel': jnp.zeros((6, 4))}
  state = direction.init(params)
  rng = np.random.default_rng(0)
  momentum = np.zeros((6, 4))
  for t in (1, 2, 3):
    gradient = rng.normal(size=(6, 4))
    got, state = direction.update(
      {'kernel': jnp.asarray(gradient, jnp.float32)}, state, params
    )
    momentum = 0.9 * momentum + 0.1 * gradient
    # Nesterov's, each part without its bias towards 0; then five steps of
    # Newton and Schulz with Jordan's coefficients, of the wide matrix.
    x = (
      0.9 * momentum / (1 - 0.9 ** (t + 1)) + 0.1 * gradient / (1 - 0.9**t)
    ).T
    x = x / np.linalg.norm(x)
    for _ in range(5):
      a = x @ x.T
      x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    # Singular values of about 1: entries of root mean square 1 / sqrt(6).
    np.testing.assert_allclose(
      got['kernel'], 6**0.5 * x.T, rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_the_decaying_rate_reaches_the_clients():
  changes = dict(
    client_optimizer='sgd',
    client_learning_rate=0.1,
    server_optimizer='fedavg',
    num_rounds=4,
    **small.PLAIN,
  )

  def moved(**more):
    simulation = small.simulation(**changes, **more)
    state = simulation.init_state()
    state = state._replace(server=state.server._replace(round=jnp.int32(2)))
    before = small.copy(state.server.params)
    after, _ = simulation.run_round(state, 3, np.array([[0], [1]], np.int32))
    return optax.tree.norm(optax.tree.sub(after.server.params, before))

  ratio = moved(client_schedule='linear') / moved()
  assert 0.4 < ratio < 0.6


SCAFFOLD = dict(
  **small.PLAIN,
  drift_control='scaffold',
  client_optimizer='sgd',
  client_learning_rate=0.05,
)


@pytest.fixture(scope='module')
def scaffold():
  simulation = small.simulation(**SCAFFOLD)
  return simulation, small.after_rounds(simulation)


@pytest.mark.slow
def test_scaffolds_server_variate_is_the_weighted_mean_of_the_clients(scaffold):
  simulation, state = scaffold
  weights = np.maximum(simulation.num_train - 1, 0)
  small.assert_trees_close(
    state.server.control,
    jax.tree.map(
      lambda c: np.tensordot(weights, c, 1) / weights.sum(), state.controls
    ),
    rtol=1e-4,
    atol=1e-6,
  )


@pytest.mark.slow
def test_scaffold_keeps_variates_of_sampled_clients_only(scaffold):
  simulation, state = scaffold
  sampled = set(
    np.concatenate(
      [simulation.sample_cohort(n).ravel() for n in (1, 2)]
    ).tolist()
  )
  norms = np.asarray(jax.vmap(optax.tree.norm)(state.controls))
  assert set(np.flatnonzero(norms).tolist()) == sampled - {-1}


@pytest.mark.slow
def test_scaffolds_first_round_is_plain_and_its_second_is_not(scaffold):
  simulation, state = scaffold
  plain = small.simulation(**{**SCAFFOLD, 'drift_control': 'none'})
  small.assert_trees_close(
    small.after_rounds(plain, 1).server.params,
    small.after_rounds(simulation, 1).server.params,
  )
  distance = optax.tree.norm(
    optax.tree.sub(small.after_rounds(plain).server.params, state.server.params)
  )
  assert distance > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('name', ['scaffold', 'mime_lite'])
def test_drift_control_on_local_rows_trains_and_keeps_other_rows(name):
  changes = dict(
    SCAFFOLD,
    drift_control=name,
    vocabulary='local',
    objective='all_positions',
    negatives='shared',
    batch_size=1,
    server_optimizer='fedadam' if name == 'mime_lite' else 'fedavg',
    server_learning_rate=1.0,
    client_learning_rate=0.01,
  )
  simulation = small.simulation(**changes)
  start = simulation.init_state()
  state = small.after_rounds(simulation)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.server.params))
  assert not state.server.params['item_embedding'][0].any()
  assert (
    optax.tree.norm(optax.tree.sub(state.server.params, start.server.params))
    > 0
  )


@pytest.mark.slow
def test_mime_lite_takes_the_mean_of_the_clients_and_learns_moments():
  simulation = small.simulation(
    **small.PLAIN,
    drift_control='mime_lite',
    client_optimizer='sgd',
    server_optimizer='fedadam',
    server_learning_rate=1.0,
    client_learning_rate=0.01,
  )
  state = small.after_rounds(simulation, 1)
  assert optax.tree.norm(state.server.opt_state.mu) > 0
  assert state.server.opt_state.count == 1


@pytest.mark.parametrize('name', ['scaffold', 'mime_lite'])
def test_drift_control_that_needs_plain_steps_is_refused_without(name):
  with pytest.raises(UserError, match=f'={name}` .*`client_optimizer=sgd`'):
    small.config(drift_control=name, client_optimizer='adam')


def test_control_variates_that_no_machine_holds_are_refused(monkeypatch):
  simulation = small.simulation(**SCAFFOLD)
  numbers = sum(
    x.size for x in jax.tree.leaves(simulation.abstract_state.server.params)
  )
  # 9 clients with 4 bytes a parameter.
  monkeypatch.setattr(round_lib, 'MOST_STATE_BYTES', 36 * numbers)
  small.simulation(**SCAFFOLD)
  monkeypatch.setattr(round_lib, 'MOST_STATE_BYTES', 36 * numbers - 1)
  small.simulation(**small.PLAIN)  # without variates it is small
  assert small.error_of(small.simulation, **SCAFFOLD) == (
    f'drift control keeps {4 * numbers:,} bytes for each of 9 clients, '
    f'{36 * numbers:,} in all, more than the {36 * numbers - 1:,} allowed '
    f'(the model has {numbers:,} numbers); take `drift_control=mime_lite`, '
    'which keeps nothing, or fewer clients (`top_k_users`), fewer items '
    '(`k_core`), a smaller `hidden_dim`'
  )


@pytest.mark.slow
def test_seeds_side_by_side_are_seeds_alone():
  # The clients differ in length, and so do the cohorts of the seeds.
  alone = [small.simulation(**small.ONE_EXPERT, seed=seed) for seed in (0, 1)]
  states = [s.init_state() for s in alone]
  cohorts = np.stack([s.sample_cohort(1) for s in alone])
  assert not (cohorts[0] == cohorts[1]).all()
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
  together, _ = ablation.run_round(alone, stacked, 1)
  for i, simulation in enumerate(alone):
    after, _ = simulation.run_round(states[i], 1, cohorts[i])
    # SGD would be exact; Adam's sign makes rounding visible.
    np.testing.assert_allclose(
      together.server.params['item_embedding'][i],
      after.server.params['item_embedding'],
      atol=2e-4,
    )
    assert (
      np.asarray(together.memories.clock[i]) == np.asarray(after.memories.clock)
    ).all()
