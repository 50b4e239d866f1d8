"""The main properties once more, as users run them: compiled with XLA's own
optimisations, which the other tests skip (conftest.py); in a process of its
own, for JAX reads its flags once."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from fedmmr_jax.federation import devices
from fedmmr_jax.runs.checkpoint import Checkpoint, Progress, Rounds
from tests import small, test_checkpoint

ROOT = pathlib.Path(__file__).parents[1]
# SGD: another order of a sum moves no sign.
SETTINGS = dict(
  small.ONE_EXPERT,
  client_optimizer='sgd',
  client_learning_rate=0.1,
  num_rounds=2,
)


def states(simulation):
  """After each round."""
  found = []
  for step in simulation.rounds():
    found.append(small.copy(step.state))
  return found


def check(folder: pathlib.Path):
  assert 'optimization_level' not in os.environ['XLA_FLAGS']
  simulation = small.simulation(**SETTINGS)
  first, last = states(simulation)

  test_checkpoint.save(folder, 1, saved=Checkpoint(first, Progress.start()))
  saved = Rounds(folder).load(1, Checkpoint(first, Progress.start())).state
  (step,) = simulation.rounds(saved, first=2)
  small.assert_trees_equal(step.state, last)  # resumed = straight

  devices.set_workers(2)
  small.assert_trees_equal(states(simulation)[-1], last)

  # One client after another, and on two devices.
  devices.count = devices.num_shards = jax.device_count
  assert devices.count() == 2
  looped = states(small.simulation(**SETTINGS, clients_per_chunk=1))[-1]
  small.assert_trees_close(looped, last, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_resume_workers_loops_and_devices_at_full_optimisation(tmp_path):
  subprocess.run(
    [sys.executable, '-m', 'tests.test_production', tmp_path],
    check=True,
    cwd=ROOT,
    # A mesh of CPU devices needs more threads than devices, see devices.py.
    env=os.environ
    | {'XLA_FLAGS': '', 'JAX_NUM_CPU_DEVICES': '2', 'NPROC': '16'},
  )


if __name__ == '__main__':
  check(pathlib.Path(sys.argv[1]))
