"""Clients that no round ever saw."""

import dataclasses

import jax
import numpy as np
import pytest

from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.data import dataset as dataset_lib
from fedmmr_jax.federation import collaborative
from fedmmr_jax.simulation import NEW_CLIENTS
from tests import small

SETTINGS = dict(
  new_clients=0.3,
  item_embedding='content_plus_id,collaborative_dim=4,collaborative_rounds=9',
  experts='semantic',
)


@pytest.fixture(scope='module')
def simulation():
  return small.simulation(**SETTINGS)


def test_a_share_is_held_out_whatever_the_seed(simulation):
  new = simulation.new_clients
  assert len(new) == round(0.3 * 9) and (np.diff(new) > 0).all()
  assert simulation.with_seed(5).new_clients.tolist() == new.tolist()
  assert not dataset_lib.draw_new_clients(9, 0.0).size


def test_no_cohort_no_sketch_and_no_ranking_of_trained_ones_has_them(
  simulation,
):
  new = set(simulation.new_clients)
  drawn = {
    k for number in range(1, 30) for k in simulation.sample_cohort(number).flat
  } - {-1}
  assert drawn == set(range(9)) - new
  assert not new & set(
    collaborative.asked(simulation.config, simulation.num_train)
  )
  for split in ('val', 'test'):
    assert not new & set(simulation.targets(split)[0])
  clients, targets = simulation.targets(NEW_CLIENTS)
  assert set(clients) == new
  assert [simulation.dataset.sequence(k)[-1] for k in clients] == [*targets]
  # With a limit they are not drawn into its place.
  assert not new & set(simulation.with_clients(4).evaluated_clients)


def test_a_split_of_new_clients_needs_some():
  assert small.simulation().splits == ('val', 'test')
  assert small.simulation(**SETTINGS).splits == ('val', 'test', NEW_CLIENTS)
  message = small.error_of(
    lambda: (
      small.simulation(**(SETTINGS | {'new_clients': 0.9}))
      and small.simulation(new_clients=0.95)
    )
  )
  assert '`new_clients=0.95` is above its maximum 0.9' in message
  message = small.error_of(dataset_lib.draw_new_clients, 1, 0.9)
  assert 'none of 1 clients is left to train' in message


@pytest.mark.slow
def test_what_new_clients_consumed_changes_no_bit_of_a_federation(simulation):
  dataset = simulation.dataset
  items = dataset.items.copy()
  for client in simulation.new_clients:
    start, end = dataset.offsets[client : client + 2]
    items[start:end] = items[start:end][::-1] % (dataset.num_items - 5) + 1
  other = simulation_lib.build(
    simulation.config, dataclasses.replace(dataset, items=items)
  )
  states = []
  for one in (simulation, other):
    *_, last = one.rounds(count=2)
    states.append(jax.device_get((last.state.server, last.state.memories)))
  small.assert_trees_equal(*states)
  # They are ranked, each from its own history.
  found = [
    one.evaluate(last.state, NEW_CLIENTS)[1] for one in (simulation, other)
  ]
  assert len(found[0].full) == len(simulation.new_clients)
  assert not np.array_equal(found[0].full, found[1].full)


@pytest.mark.slow
def test_the_weights_of_drift_control_are_those_of_who_takes_part(simulation):
  """SCAFFOLD's server moves by the share of the clients that were asked."""
  seen = []

  class Recorder(type(simulation.drift)):
    def server_step(self, state, uploaded, cohort, delta, optimizer):
      jax.debug.callback(lambda *x: seen.append(x), *cohort)
      return super().server_step(state, uploaded, cohort, delta, optimizer)

  one = dataclasses.replace(simulation, drift=Recorder())
  list(one.rounds(count=1))
  jax.effects_barrier()
  (_, all_weight, _, all_size), *_ = seen
  takes_part = np.delete(np.arange(9), simulation.new_clients)
  assert all_size == len(takes_part)
  assert all_weight == (simulation.num_train[takes_part] - 1).sum()
