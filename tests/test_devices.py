"""Workers change no bit; the devices of a mesh do what one device does. JAX
fixes their number when it starts, so a mesh is one of another process."""

import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax.evaluation import ablation
from fedmmr_jax.federation import devices
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.runs.checkpoint import Checkpoint, Progress, Rounds
from tests import small, test_checkpoint

ROOT = pathlib.Path(__file__).parents[1]


def outcomes(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """What all that runs over clients gives, as flat names."""
  # SGD without momentum: another order of a sum moves no sign.
  simulation = small.simulation(
    experts='semantic',
    client_optimizer='sgd',
    client_learning_rate=0.1,
    drift_control='scaffold',
    client_fraction=0.55,
  )  # 5 clients, 3 chunks
  state = simulation.init_state()
  before = small.compiled_rounds()
  for number in (1, 2):
    state, means = simulation.run_round(
      state, number, simulation.sample_cohort(number)
    )
  # A shard, merging two and the server's part, once.
  assert small.compiled_rounds() == before + 3
  found = {
    'state': state,
    'means': {k: v for k, v in means.items() if v is not None},
  }
  for split in ('val', 'test'):
    found[split] = simulation.evaluate(state, split)[1]
  test_checkpoint.save(folder, 1, saved=Checkpoint(state, Progress.start()))
  again = Rounds(folder).load(1, Checkpoint(state, Progress.start())).state
  small.assert_trees_equal(again, state)
  compiled = small.compiled_rounds()
  found['resumed'] = simulation.run_round(
    again, 3, simulation.sample_cohort(3)
  )[0]
  assert small.compiled_rounds() == compiled
  found['seeds'] = _seeds()
  return {
    jax.tree_util.keystr(path): np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(found)
  }


def _seeds() -> round_lib.FederationState:
  runs = [
    small.simulation(
      seed=seed,
      client_optimizer='sgd',
      experts='none',
      client_learning_rate=0.1,
    )
    for seed in (0, 1)
  ]
  states = jax.tree.map(
    lambda *x: jnp.stack(x), *[run.init_state() for run in runs]
  )
  return ablation.run_round(runs, states, 1)[0]


@pytest.fixture
def workers():
  yield devices.set_workers
  devices.set_workers(0)


@pytest.mark.slow
def test_another_number_of_workers_changes_no_bit(workers):
  ends = []
  for count in (1, 3):
    workers(count)
    simulation = small.simulation(client_fraction=0.55, experts='semantic')
    state = simulation.init_state()
    for number in (1, 2):
      state, means = simulation.run_round(
        state, number, simulation.sample_cohort(number)
      )
    ends.append(
      (
        state,
        means,
        simulation.evaluate(state, 'val')[1],
        simulation.rank_local_only(state),
        simulation.recommend(state, 0, 5),
      )
    )
  for end in ends[1:]:
    small.assert_trees_equal(end, ends[0])


def test_at_most_so_many_workers_as_were_asked_for(workers, monkeypatch):
  workers(3)
  running, most = set(), 0

  def program(shard):
    nonlocal most
    running.add(int(shard[0, 0]))
    most = max(most, len(running))
    return np.zeros(()), shard

  def finish(result):  # stands for waiting until the shard is done
    time.sleep(0.05)
    running.discard(int(result[1][0, 0]))
    return result

  monkeypatch.setattr(jax, 'block_until_ready', finish)
  shards = devices.deal(np.arange(32).reshape(16, 2))
  _, each = devices.run(program, (), shards)
  assert most == 3
  np.testing.assert_array_equal(
    devices.undealt(each, 16), np.arange(32).reshape(16, 2)
  )


def test_a_shard_that_fails_fails_the_round(workers):
  workers(2)

  def program(shard):
    raise ValueError('no')

  with pytest.raises(ValueError, match='no'):
    devices.run(program, (), devices.deal(np.zeros((16, 2), np.int32)))


def test_dealing_pads_and_keeps_neighbours_apart():
  dealt = devices.deal(np.arange(9 * 2).reshape(9, 2))
  assert dealt.shape == (devices.CPU_SHARDS, 2, 2)
  assert dealt[0].tolist() == [[0, 1], [16, 17]]
  assert dealt[1].tolist() == [[2, 3], [-1, -1]]
  of_seeds = devices.deal(np.stack([np.arange(18).reshape(9, 2)] * 3))
  assert of_seeds.shape == (devices.CPU_SHARDS, 3, 2, 2)
  np.testing.assert_array_equal(of_seeds[:, 1], dealt)


NO_COLLECTIVE = """
import jax, re
from fedmmr_jax.federation import round as round_lib
from tests import small
assert jax.device_count() == 2
simulation = small.simulation(experts='none')
state = simulation.init_state()
assert all(len(x.devices()) == 1 for x in jax.tree.leaves(state))
text = round_lib.train_shard.lower(
  simulation.program, simulation.sample_cohort(1), state, jax.random.key(0),
  simulation.catalogue, simulation.data).as_text()
assert not re.search('all_reduce|all_gather|collective', text)
"""


def test_no_collective_whatever_a_cpu_counts_as():
  """Where there is none, none can wait for another."""
  subprocess.run(
    [sys.executable, '-c', NO_COLLECTIVE],
    check=True,
    cwd=ROOT,
    env=os.environ | {'JAX_NUM_CPU_DEVICES': '2'},
  )


@pytest.mark.slow
def test_a_mesh_of_two_devices_changes_rounding_only(tmp_path):
  assert devices.count() == 1
  on_one = outcomes(tmp_path / 'one')
  # What is tested are a GPU's collectives. Those of a CPU need more threads
  # than there are devices and cores, or may wait for ever: see devices.py.
  subprocess.run(
    [sys.executable, '-m', 'tests.test_devices', tmp_path],
    check=True,
    cwd=ROOT,
    env=os.environ | {'JAX_NUM_CPU_DEVICES': '2', 'NPROC': '16'},
  )
  with np.load(tmp_path / 'outcomes.npz') as saved:
    assert int(saved['devices']) == 2
    assert set(saved) == {*on_one, 'devices'}
    for name, expected in on_one.items():
      np.testing.assert_allclose(
        saved[name], expected, rtol=1e-4, atol=1e-5, err_msg=name
      )


@pytest.mark.slow
@pytest.mark.parametrize(
  'flags, count',
  [
    (['--workers=3'], 3),
    (['--cpu_devices=1'], 1),
    (['--workers=50'], 8),
    ([], min(8, devices.cores())),
  ],
)
def test_a_binary_sets_the_workers(flags, count):
  code = (
    'from experiments import app; from fedmmr_jax.federation import devices; '
    'app.run(lambda: print(devices.workers()))'
  )
  out = subprocess.run(
    [sys.executable, '-c', code, *flags],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  assert int(out) == count


def test_a_cohort_feeds_all_shards(monkeypatch):
  monkeypatch.setattr(devices, 'num_shards', lambda: 4)
  chunks = round_lib.in_chunks(np.arange(10), per_chunk=100)
  assert chunks.shape == (4, 3)
  assert sorted(chunks.ravel()) == [-1, -1, *range(10)]


if __name__ == '__main__':
  devices.count = devices.num_shards = jax.device_count
  _folder = pathlib.Path(sys.argv[1])
  np.savez(
    _folder / 'outcomes.npz',
    **outcomes(_folder / 'rounds'),
    devices=devices.count(),
  )
