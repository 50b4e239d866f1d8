"""Clients without a positive: a federation of them is refused, a cohort of them
changes nothing; a cohort of one, heavy or light."""

import json
import time

import jax
import numpy as np
import pytest

from experiments import console
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.data.dataset import Dataset
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.runs import report, training
from fedmmr_jax.runs.run_folder import RunFolder
from tests import small


def dataset(*lengths):
  """A user of each length, over 60 items."""
  rng = np.random.default_rng(0)
  rows = [
    (user, item)
    for user, length in enumerate(lengths, 1)
    for item in rng.permutation(60)[:length]
  ]
  return Dataset.of(*zip(*rows), name='toy')


def cohort(simulation, *clients):
  return round_lib.chunked(
    np.array(clients),
    simulation.num_train,
    simulation.config.server.clients_per_chunk,
  )


@pytest.mark.parametrize(
  'changes, told',
  [
    ({}, 'none of 50 clients has two; give longer histories'),
    (dict(item_embedding='content_init,collaborative_dim=4'), 'of 50 clients'),
    (dict(new_clients=0.5, k_core=1), 'or change `k_core=1` or `new_clients='),
  ],
)
def test_a_federation_without_a_positive_is_refused(changes, told):
  message = small.error_of(
    simulation_lib.build, small.config(**changes), dataset(*50 * [3])
  )
  assert message.startswith('toy: nothing to train on: ') and told in message


def test_who_takes_part_in_no_cohort_is_nothing_to_train_on():
  config = small.config(new_clients=0.5)
  lengths = np.full(6, 3)
  new = simulation_lib.dataset_lib.draw_new_clients(6, 0.5)
  lengths[new] = 9
  message = small.error_of(simulation_lib.build, config, dataset(*lengths))
  assert 'none of 3 clients has two' in message
  lengths[np.delete(np.arange(6), new)[0]] = 4  # one positive is enough
  simulation_lib.build(config, dataset(*lengths))


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    dict(
      aggregator='fednova',
      server_optimizer='fedmuon',
      drift_control='scaffold',
      client_optimizer='sgd',
      **small.ONE_EXPERT,
    ),
    dict(
      server_optimizer='fedyogi',
      drift_control='mime_lite',
      client_optimizer='sgd',
      vocabulary='local',
      **small.PLAIN,
    ),
  ],
)
def test_a_cohort_without_a_positive_changes_nothing(changes):
  simulation = simulation_lib.build(
    small.config(server_learning_rate=0.01, **changes), dataset(12, 3, 3, 9)
  )
  # Trained before, so that there are moments to go on by themselves.
  state, means = simulation.run_round(
    simulation.init_state(), 1, cohort(simulation, 0, 3)
  )
  assert means['loss'] > 0
  before = small.copy(state)
  state, means = simulation.run_round(state, 2, cohort(simulation, 1, 2))
  assert means['loss'] is None
  assert int(state.server.round) == 2
  small.assert_trees_equal(
    state.server._replace(round=None), before.server._replace(round=None)
  )
  small.assert_trees_equal(state.controls, before.controls)
  # Among others, they change nothing either.
  last, _ = simulation.run_round(state, 3, cohort(simulation, 0, 1))
  assert any(
    np.any(np.asarray(a) != np.asarray(b))
    for a, b in zip(
      jax.tree.leaves(last.server.params), jax.tree.leaves(before.server.params)
    )
  )


@pytest.mark.slow
def test_a_run_with_rounds_of_nobody_says_so(tmp_path):
  simulation = simulation_lib.build(
    small.config(
      **small.ONE_EXPERT,
      client_fraction=1e-9,
      num_rounds=6,
      sampled_negatives=4,
    ),
    dataset(12, 3, 3),
  )
  trains = [bool((simulation.sample_cohort(n) == 0).any()) for n in range(1, 7)]
  assert True in trains and False in trains
  run = RunFolder(tmp_path / 'run')
  run.start(simulation.config, simulation.dataset)
  lines = []
  summary = training.train(
    simulation, run, lambda r: lines.append(console.round_line(r, 6))
  )
  nobody = 'nothing trained, nobody in the cohort has a positive'
  assert [nobody not in line for line in lines] == trains
  assert [record['targets'] > 0 for record in run.records()] == trains
  for record in run.records():
    assert ('loss' in console.progress(record)) == (record['targets'] > 0)
  text = '\n'.join([*lines, console.final_table(summary)])
  assert 'None' not in text and 'nan' not in text.lower()
  json.dumps(summary, allow_nan=False)
  assert 'Recommendation loss' in report.write(run).read_text('utf-8')


@pytest.mark.slow
@pytest.mark.parametrize('aggregator', ['fedavg', 'fednova'])
def test_a_light_client_alone_takes_no_time_of_the_heaviest(aggregator):
  rng = np.random.default_rng(0)
  rows = [(0, item) for item in rng.permutation(3000)[:2000]]
  rows += [(u, i) for u in range(1, 21) for i in rng.permutation(3000)[:4]]
  data = Dataset.of(*zip(*rows), name='unequal')
  limits = dict(aggregator=aggregator, client_fraction=1e-9)
  seconds = {}
  for steps in (0, 1):
    simulation = simulation_lib.build(
      small.config(max_local_steps=steps, **limits), data
    )
    assert simulation.sample_cohort(1).shape == (1, 1)
    state = simulation.init_state()
    for number, client in enumerate((5, 5, 0, 0), 1):  # each twice: compiling
      start = time.perf_counter()
      state, means = simulation.run_round(
        state, number, cohort(simulation, client)
      )
      round_lib.check_finite_state(state, number)
      seconds[steps, client] = time.perf_counter() - start
      assert np.isfinite(means['loss'])
  # 500 steps against one: masked steps would make them equally long.
  assert seconds[0, 5] < seconds[0, 0] / 3
