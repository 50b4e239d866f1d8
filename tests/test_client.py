"""One client's local update: windows, masks, counts, FedProx."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax.client import losses, scoring, windows
from fedmmr_jax.client import update as client_lib
from fedmmr_jax.data.dataset import client_view, ClientData
from tests import small


def history(n: int, padding: int = 0) -> ClientData:
  """A client that consumed 11, 12, … (n training items and two held out)."""
  items = jnp.concatenate([jnp.arange(11, 13 + n), jnp.zeros(padding, int)])
  return ClientData(
    items,
    jnp.int32(n + 2),
    jnp.int32(n),
    jnp.arange(11, 11 + n),
    jnp.int32(n),
    jnp.zeros(3, int),
    jnp.int32(61),
  )


def test_last_objective_has_a_window_for_each_positive():
  # 4 training items 11..14: positives 12, 13, 14, each with what came before.
  batch = windows.cut_windows(
    history(4), jnp.arange(4), jnp.arange(4) < 3, 1, 3
  )
  np.testing.assert_array_equal(
    batch.windows, [[11, 12, 13], [0, 11, 12], [0, 0, 11], [0, 0, 0]]
  )
  np.testing.assert_array_equal(batch.targets[:, 0], [14, 13, 12, 0])
  np.testing.assert_array_equal(batch.valid[:, 0], [True, True, True, False])


def test_all_positions_covers_each_target_once():
  # 6 training items: targets 12..16 in windows of 3, the last one full.
  batch = windows.cut_windows(
    history(6), jnp.arange(2), jnp.array([True, True]), 3, 3
  )
  np.testing.assert_array_equal(batch.windows, [[13, 14, 15], [0, 11, 12]])
  np.testing.assert_array_equal(batch.targets, [[14, 15, 16], [11, 12, 13]])
  np.testing.assert_array_equal(
    batch.valid, [[True, True, True], [False, True, True]]
  )
  # Targets 14, 15, 16 are the fourth to sixth of six items, and so on.
  np.testing.assert_allclose(
    batch.lateness[batch.valid], np.array([3.5, 4.5, 5.5, 1.5, 2.5]) / 6
  )


def test_windows_never_reach_the_held_out_items():
  for stride in (1, 3):
    count = windows.num_windows(6, stride)
    batch = windows.cut_windows(
      history(6), jnp.arange(count), jnp.ones(count, bool), stride, 3
    )
    assert max(batch.windows.max(), batch.targets.max()) <= 16


@pytest.mark.slow
def test_a_step_weighs_its_targets_by_their_lateness():
  simulation = small.simulation(
    objective='all_positions,late_emphasis=0.8',
    negatives='shared',
    experts='none',
    batch_size=2,
  )
  params = simulation.init_state().server.params
  batch = windows.cut_windows(
    history(9), jnp.arange(2), jnp.array([True, True]), 6, 6
  )
  negative = jnp.arange(31, 36)
  view = simulation.model.view_memory(simulation.catalogue, jnp.zeros(4, int))
  scores = scoring.score_batch(
    simulation.model, params, batch, negative, simulation.catalogue, view, None
  )
  rec = losses.cross_entropy(scores.positive, scores.rest).reshape(2, 6)
  weighted = [
    (0.2 + 1.6 * float(late)) * float(loss)
    for late, loss, valid in zip(
      batch.lateness.ravel(), rec.ravel(), batch.valid.ravel()
    )
    if valid
  ]
  assert len(weighted) == 8
  total, _ = client_lib.step_loss(
    params,
    simulation.model,
    batch,
    negative,
    simulation.catalogue,
    view,
    None,
    simulation.config,
  )
  np.testing.assert_allclose(total, np.mean(weighted), rtol=1e-5)


def test_windows_come_shuffled():
  order = client_lib._window_order(jax.random.key(3), jnp.int32(6), 9).tolist()
  assert sorted(order[:6]) == list(range(6)) != order[:6]


@pytest.mark.slow
def test_a_step_limit_limits_steps_weights_and_clock():
  simulation = small.simulation(
    **small.PLAIN,
    objective='all_positions',
    negatives='shared',
    batch_size=1,
    max_local_steps=2,
  )
  update = updater(simulation)(index=8)  # 28 training items, 5 windows of 6
  assert windows.num_steps(28, simulation.config) == 2
  assert update.weight == 12
  assert update.metrics['rec_loss'].weight <= 12


@pytest.mark.parametrize(
  'n, stride, expected',
  [(0, 1, 0), (1, 1, 0), (2, 1, 1), (7, 1, 6), (7, 3, 2), (8, 3, 3)],
)
def test_num_windows(n, stride, expected):
  assert windows.num_windows(n, stride) == expected
  assert windows.num_windows(jnp.int32(n), stride) == expected


@pytest.fixture(
  scope='module',
  params=[
    dict(objective='last', negatives='per_sample'),
    dict(small.ONE_EXPERT, objective='all_positions', negatives='shared'),
  ],
  ids=['last', 'all_positions'],
)
def local(request):
  """A simulation and a function that updates client 2."""
  simulation = small.simulation(**request.param, batch_size=2)
  return simulation, updater(simulation)


def updater(simulation):
  state = simulation.init_state()
  broadcast = state.server.broadcast(simulation.catalogue, simulation.config)

  @jax.jit
  def update(client, memory, max_steps):
    return client_lib.local_update(
      simulation.program.client,
      broadcast,
      client,
      memory,
      None,
      jax.random.key(7),
      max_steps,
    )

  def run(max_items=simulation.max_items, extra_steps=0, index=2):
    client = client_view(simulation.data, jnp.int32(index), max_items)
    memory = jax.tree.map(lambda x: x[index], state.memories)
    steps = windows.num_steps(client.num_train, simulation.config)
    return update(client, memory, steps + extra_steps)

  return run


@pytest.mark.slow
def test_steps_past_a_clients_own_change_nothing(local):
  _, run = local
  small.assert_trees_equal(run(), run(extra_steps=3))


def test_padding_client_returns_nothing(local):
  simulation, run = local
  state = simulation.init_state()
  update = run(index=-1, extra_steps=2)
  assert update.weight == 0
  assert not any(np.any(d) for d in jax.tree.leaves(update.delta))
  small.assert_trees_equal(
    update.memory, jax.tree.map(lambda x: x[0], state.memories)
  )
  assert all(m.weight == 0 for m in update.metrics.values())


def test_weight_counts_positives_and_clock_counts_samples(local):
  simulation, run = local
  update = run()
  positives = simulation.num_train[2] - 1
  assert update.weight == positives
  # It had never trained: all that it consumed was written before.
  assert update.memory.clock == simulation.num_train[2] + positives
  assert update.metrics['rec_loss'].weight == positives


def test_memory_holds_only_own_training_items(local):
  simulation, run = local
  client = client_view(simulation.data, jnp.int32(2), simulation.max_items)
  own = set(np.asarray(client.history[: int(client.num_train)]).tolist())
  stored = set(np.asarray(run().memory.item).tolist()) - {0}
  assert stored and stored <= own


def test_everything_that_can_learn_moves_and_padding_row_does_not(local):
  _, run = local
  delta = run().delta
  for group, part in delta.items():
    moved = max(float(np.abs(x).max()) for x in jax.tree.leaves(part))
    assert moved > 0, group
  assert not delta['item_embedding'][0].any()


@pytest.mark.slow
def test_proximal_term_pulls_towards_the_server():
  def distance(mu):
    run = updater(
      small.simulation(
        **small.PLAIN,
        drift_control=f'fedprox,mu={mu}',
        local_epochs=2,
        client_optimizer='sgd',
        client_learning_rate=0.05,
      )
    )
    return float(sum(jnp.sum(d**2) for d in jax.tree.leaves(run().delta)))

  free, held = distance(0.0), distance(10.0)
  assert held < 0.7 * free


def test_negatives_are_never_consumed_in_training_but_may_be_held_out():
  simulation = small.simulation(num_negatives=4)
  client = client_view(simulation.data, jnp.int32(0), simulation.max_items)
  draws = np.concatenate(
    [
      np.asarray(
        scoring.draw_negatives(jax.random.key(i), client, simulation.config)
      ).ravel()
      for i in range(60)
    ]
  )
  train = np.asarray(client.history[: int(client.num_train)])
  held_out = np.asarray(client.history[int(client.num_train) :][:2])
  assert not np.isin(draws, train).any()
  assert np.isin(held_out, draws).all()
