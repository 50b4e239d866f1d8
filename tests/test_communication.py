"""What a federation pays: counted by hand."""

import jax
import numpy as np
import pytest

from fedmmr_jax.federation import communication
from fedmmr_jax.federation.communication import Reached, Traffic
from tests import small


def numbers(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def of_cohort(simulation, item_rows):
  cohort = np.array([[3, 1], [0, -1]], np.int32)
  return simulation.traffic(cohort, {'item_rows': item_rows})


def test_a_visit_moves_the_parameters_and_the_rows_with_their_ids():
  simulation = small.simulation(vocabulary='local')
  params = simulation.abstract_state.server.params
  dense = numbers(params) - params['item_embedding'].size
  # 12.5 rows of 16 numbers and an id.
  moved = 3 * 4 * (dense + 12.5 * 17)
  assert of_cohort(simulation, 12.5) == Traffic(3, moved, moved)


def test_a_whole_table_needs_no_ids():
  simulation = small.simulation()
  moved = 3 * 4 * numbers(simulation.abstract_state.server.params)
  rows = simulation.model.num_rows
  assert of_cohort(simulation, rows) == Traffic(3, moved, moved)


def test_control_variates_and_prototypes_count_in_both_directions():
  simulation = small.simulation(
    drift_control='scaffold',
    client_optimizer='sgd',
    global_memory='prototypes,number=2',
  )
  server = simulation.abstract_state.server
  rows = simulation.model.num_rows
  moved = 3 * 4 * (2 * numbers(server.params) + numbers(server.prototypes))
  assert of_cohort(simulation, rows) == Traffic(3, moved, moved)


def test_the_sketch_costs_a_row_for_each_item():
  simulation = small.simulation(
    item_embedding='content_plus_id,collaborative_dim=4,collaborative_rounds=9'
  )
  # 9 cohorts of half of the clients: all 9 clients, once.
  assert simulation.sketch_traffic() == Traffic(
    9, 9 * 4, 4 * 17 * simulation.num_train.sum()
  )
  assert small.simulation().sketch_traffic() == Traffic(0, 0, 0)


def line(number, value=None):
  found = {'val': {'full': {'NDCG@10': value}}} if value is not None else {}
  cost = Traffic(10, 100.0, 50.0)._asdict()
  return {'round': number, 'communication': cost, **found}


LINES = [line(1), line(2, 0.1), line(3), line(4, 0.4), line(5, 0.2)]


def test_until_a_value_was_reached():
  def until(value):
    return communication.until(LINES, 'full', 'NDCG@10', value)

  assert until(0.1) == Reached(2, Traffic(20, 200, 100))
  assert until(0.11) == until(0.4) == Reached(4, Traffic(40, 400, 200))
  assert until(0.41) is None


def test_costs_of_shares_of_the_best():
  costs = communication.costs(LINES, 'full', 'NDCG@10', (0.25, 1.0))
  assert costs.metric == 'full/NDCG@10'
  assert [(v, r.round) for _, v, r in costs.rows] == [(0.1, 2), (0.4, 4)]
  assert communication.costs(LINES[:1], 'full', 'NDCG@10').rows == []


def test_runs_are_compared_where_all_have_been():
  runs = {'slow': LINES[:3], 'fast': LINES}
  rows = communication.compared_costs(runs, 'full', 'NDCG@10').rows
  assert [(n, v, r.round) for n, v, r in rows] == [
    ('slow', 0.1, 2),
    ('fast', 0.1, 2),
  ]
  runs['new'] = LINES[:1]
  assert not communication.compared_costs(runs, 'full', 'NDCG@10').rows


@pytest.mark.slow
@pytest.mark.parametrize('vocabulary', ['local', 'dense'])
def test_a_round_counts_the_rows_that_its_clients_work_on(vocabulary):
  simulation = small.simulation(
    vocabulary=vocabulary, experts='none', negatives='shared', num_negatives=3
  )
  (done,) = simulation.rounds(count=1)
  rows = done.metrics['item_rows']
  if vocabulary == 'dense':
    assert rows == simulation.model.num_rows
    return
  # Padding, its training items, and up to 3 negatives in each of its steps.
  trained = done.cohort[done.cohort >= 0]
  own = simulation.num_train[trained]
  least = np.mean(1 + own)
  most = np.mean(1 + own + 3 * np.ceil((own - 1) / 4))
  assert least < rows <= most
