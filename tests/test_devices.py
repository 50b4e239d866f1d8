"""Several devices do what one does. JAX fixes their number when it starts, so
they are those of another process."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax import ablation
from fedmmr_jax import devices
from fedmmr_jax import federation
from fedmmr_jax.checkpoint import Checkpoint, Progress, Rounds
from tests import small
from tests import test_checkpoint

ROOT = pathlib.Path(__file__).parents[1]


def outcomes(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """What all that runs over clients gives, as flat names."""
  # SGD without momentum: another order of a sum moves no sign.
  simulation = small.simulation(
      experts='semantic', client_optimizer='sgd', client_learning_rate=0.1,
      warm_memory=True, drift_control='scaffold',
      client_fraction=0.55)  # 5 clients, 3 chunks
  state = simulation.init_state()
  for number in (1, 2):
    state, means = simulation.run_round(
        state, number, simulation.sample_cohort(number))
    compiled = federation.run_round._cache_size()
  assert compiled == 1
  found = {'state': state, 'means': {
      k: v for k, v in means.items() if v is not None}}
  for split in ('val', 'test'):
    found[split] = simulation.evaluate(state, split)[1]
  found['alone'] = simulation.rank_local_only(state)
  test_checkpoint.save(folder, 1, saved=Checkpoint(state, Progress.start()))
  again = Rounds(folder).load(1, Checkpoint(state, Progress.start())).state
  small.assert_trees_equal(again, state)
  found['resumed'] = simulation.run_round(
      again, 3, simulation.sample_cohort(3))[0]
  assert federation.run_round._cache_size() == compiled
  found['seeds'] = _seeds()
  return {jax.tree_util.keystr(path): np.asarray(x)
          for path, x in jax.tree_util.tree_leaves_with_path(found)}


def _seeds() -> federation.FederationState:
  runs = [small.simulation(seed=seed, client_optimizer='sgd', experts='none',
                           client_learning_rate=0.1) for seed in (0, 1)]
  states = jax.tree.map(
      lambda *x: jnp.stack(x), *[run.init_state() for run in runs])
  return ablation.run_round(runs, states, 1)[0]


def test_two_devices_change_nothing(tmp_path):
  assert devices.count() == 1
  on_one = outcomes(tmp_path / 'one')
  subprocess.run(
      [sys.executable, '-m', 'tests.test_devices', tmp_path], check=True,
      cwd=ROOT, env=os.environ | {'JAX_NUM_CPU_DEVICES': '2'})
  with np.load(tmp_path / 'outcomes.npz') as saved:
    assert int(saved['devices']) == 2
    assert set(saved) == {*on_one, 'devices'}
    for name, expected in on_one.items():
      np.testing.assert_allclose(
          saved[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize('flags, count', [
    (['--cpu_devices=3'], 3), (['--cpu_devices=1'], 1),
    ([], min(8, len(os.sched_getaffinity(0))))])
def test_a_binary_divides_the_cpu(flags, count):
  environment = {k: v for k, v in os.environ.items()
                 if k != 'JAX_NUM_CPU_DEVICES'}
  code = ('from experiments import app; import jax; '
          'app.run(lambda: print(jax.device_count()))')
  out = subprocess.run(
      [sys.executable, '-c', code, *flags], cwd=ROOT, check=True,
      capture_output=True, text=True, env=environment).stdout
  assert int(out) == count


def test_a_cohort_feeds_all_devices(monkeypatch):
  monkeypatch.setattr(devices, 'count', lambda: 4)
  chunks = federation.in_chunks(np.arange(10), per_chunk=100)
  assert chunks.shape == (4, 3)
  assert sorted(chunks.ravel()) == [-1, -1, *range(10)]


if __name__ == '__main__':
  _folder = pathlib.Path(sys.argv[1])
  np.savez(_folder / 'outcomes.npz', **outcomes(_folder / 'rounds'),
           devices=devices.count())
