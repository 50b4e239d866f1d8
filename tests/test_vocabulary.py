"""Client-local vocabulary: the same training on fewer rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.client import update as client_lib
from fedmmr_jax.client import vocabulary, windows
from fedmmr_jax.data.dataset import client_view
from fedmmr_jax.federation import round as round_lib
from tests import small

# Two negatives a step: fewer rows than the catalogue has, for the round and
# for the step.
FEW = dict(
  objective='all_positions',
  negatives='shared',
  num_negatives=2,
  batch_size=1,
  max_seq_len=4,
)


def rounds(num_rounds=2, dataset=None, **changes):
  """(simulation, state after some rounds)."""
  simulation = simulation_lib.build(
    small.config(**FEW | changes), dataset or small.dataset()
  )
  return simulation, small.after_rounds(simulation, num_rounds)


def test_rows_of_items_by_hand():
  # Ids 0, 3, 3, 7, 9: the first of equal ones counts.
  found = vocabulary.touched(
    [jnp.array([[7, 3]]), jnp.array([9, 3])], vocabulary.whole(20)
  )
  np.testing.assert_array_equal(found.ids, [0, 3, 3, 7, 9])
  np.testing.assert_array_equal(
    found.rows(jnp.array([[9, 0], [3, 7]])), [[4, 0], [1, 3]]
  )
  np.testing.assert_array_equal(found.is_first, [True, True, False, True, True])


def look_up_failures(monkeypatch, **changes):
  """What is said of a local update that looks up an item its vocabulary has
  not, None if all are there; of each of three clients."""
  rows = vocabulary.Vocabulary.rows

  def checked(self, items):
    found = rows(self, items)
    checkify.check(
      jnp.all(self.ids.at[found].get(mode='clip') == items), 'a stranger'
    )
    return found

  monkeypatch.setattr(vocabulary.Vocabulary, 'rows', checked)
  simulation, state = rounds(0, vocabulary='local', **changes)
  config = simulation.compiled_config
  broadcast = state.server.broadcast(simulation.catalogue, config)
  # Each beside the longest one: most run steps behind their own.
  most_steps = windows.num_steps(simulation.num_train, config).max()

  @jax.jit
  @checkify.checkify
  def update(client, memory):
    view = client_view(simulation.data, client, simulation.max_items)
    return client_lib.local_update(
      simulation.program.client,
      broadcast,
      view,
      memory,
      None,
      jax.random.fold_in(jax.random.key(3), client),
      most_steps,
    ).weight

  return [
    update(
      jnp.int32(client), jax.tree.map(lambda x: x[client], state.memories)
    )[0].get()
    for client in (0, 4, 8)
  ]


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    {'local_epochs': 2, 'negatives': 'per_sample'},
    {'objective': 'last', 'batch_size': 2, 'max_local_steps': 2}
    | small.ONE_EXPERT,
    {'profile': 'history'} | small.PLAIN,
  ],
  ids=str,
)
def test_a_round_looks_up_no_item_that_it_has_not_taken_along(
  monkeypatch, changes
):
  assert look_up_failures(monkeypatch, **changes) == [None] * 3


@pytest.mark.slow
def test_a_look_up_of_a_stranger_is_found(monkeypatch):
  touched = vocabulary.touched
  # Without the last of the arrays, the negatives.
  monkeypatch.setattr(
    vocabulary, 'touched', lambda items, within: touched(items[:-1], within)
  )
  assert all(
    'a stranger' in told
    for told in look_up_failures(monkeypatch, **small.PLAIN)
  )


@pytest.mark.parametrize('ids', [[0, 1, 2, 3, 4], [0, 2, 2, 5, 7]], ids=str)
def test_more_touched_items_than_rows_take_all_rows(ids):
  # The catalogue, or a client's vocabulary: never an item outside of it.
  within = vocabulary.Vocabulary(jnp.array(ids))
  found = vocabulary.touched([jnp.array([2, 2, 2, 2])], within)
  np.testing.assert_array_equal(found.ids, ids)


def tree(rows):
  return {
    'item_embedding': jnp.asarray(rows, jnp.float32)[:, None],
    'other': jnp.float32(len(rows)),
  }


def test_take_and_put_touch_the_item_table_only():
  whole = tree([0, 1, 2, 3])
  rows = jnp.array([0, 2, 2])
  taken = vocabulary.take(whole, rows)
  np.testing.assert_array_equal(taken['item_embedding'][:, 0], [0, 2, 2])
  assert taken['other'] == 4
  changed = {
    'item_embedding': jnp.array([[5.0], [6.0], [99.0]]),
    'other': jnp.float32(8),
  }
  put = vocabulary.put(whole, rows, jnp.array([True, True, False]), changed)
  np.testing.assert_array_equal(put['item_embedding'][:, 0], [5, 1, 6, 3])
  assert put['other'] == 8


def test_weighted_deltas_land_on_their_items():
  got = vocabulary.add_weighted(
    tree([0, 0, 0, 0]),
    jnp.array([2.0, 3.0]),
    jnp.array([[0, 1], [1, 3]]),
    {
      'item_embedding': jnp.array([[[1.0], [10.0]], [[100.0], [1000.0]]]),
      'other': jnp.array([1.0, 1.0]),
    },
  )
  np.testing.assert_array_equal(
    got['item_embedding'][:, 0], [2, 20 + 300, 0, 3000]
  )
  assert got['other'] == 4 + 2 + 3


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    {'local_epochs': 2, 'negatives': 'per_sample'},
    # A padded window has more entries than the client has rows.
    {'objective': 'last', 'batch_size': 2, 'max_seq_len': 30},
  ],
  ids=str,
)
def test_sgd_trains_the_same_on_touched_rows(changes):
  """Without weight decay, whatever bounds the rows."""
  changes |= dict(small.ONE_EXPERT, client_optimizer='sgd')
  changes['client_learning_rate'] = 0.1
  simulation, local = rounds(vocabulary='local', **changes)
  _, dense = rounds(vocabulary='dense', **changes)
  moved = np.abs(
    local.server.params['item_embedding']
    - simulation.init_state().server.params['item_embedding']
  )
  assert moved.max() > 1e-3
  small.assert_trees_close(local.server, dense.server, rtol=1e-3, atol=2e-6)
  np.testing.assert_array_equal(local.memories.item, dense.memories.item)


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    {'client_optimizer': 'adam'},
    {'client_optimizer': 'sgd,weight_decay=0.1'},
    {'drift_control': 'fedprox,mu=0.1'},
  ],
  ids=str,
)
def test_rows_that_no_step_touches_stay(changes):
  """Also where the optimizer would move all rows: decay, moments, FedProx."""
  simulation, state = rounds(
    1, **small.PLAIN, client_fraction=0.1, vocabulary='local', **changes
  )
  start = simulation.init_state().server.params['item_embedding']
  moved = np.any(state.server.params['item_embedding'] != start, axis=1)
  cohort = round_lib.sample_cohort(simulation.config, 1, simulation.num_train)
  client = int(cohort[cohort >= 0][0])
  history = np.asarray(simulation.data.items)[
    int(simulation.data.offset[client]) :
  ][: simulation.num_train[client]]
  assert moved[history].all()
  assert not moved.all()


@pytest.mark.slow
def test_local_rows_are_fewer_than_the_catalogue():
  """The round of this file's clients really works on a part of the table."""
  simulation, _ = rounds(0, vocabulary='local')
  lowered = round_lib.train_shard.lower(
    simulation.program,
    np.array([[0, 1]], np.int32),
    simulation.init_state(),
    jax.random.key(0),
    simulation.catalogue,
    simulation.data,
  ).as_text()
  # As many steps as a client that holds nothing out.
  rows = 1 + simulation.max_items + 2 * -(-(simulation.max_items - 1) // 4)
  assert rows < simulation.model.num_rows
  assert f'tensor<2x{rows}x16xf32>' in lowered
  assert f'tensor<2x{simulation.model.num_rows}x16xf32>' not in lowered


@pytest.mark.slow
def test_padding_clients_change_nothing():
  simulation, _ = rounds(0, vocabulary='local', **small.ONE_EXPERT)

  def run(cohort):
    return simulation.run_round(
      simulation.init_state(), 1, np.array(cohort, np.int32)
    )

  small.assert_trees_equal(run([[2, 0]]), run([[2, 0], [-1, -1]]))
