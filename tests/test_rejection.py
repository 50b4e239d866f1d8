"""What the server takes out before the sum."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax.client.update import ClientUpdate
from fedmmr_jax.federation import rejection
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.federation.transforms import UpdateTransform
from fedmmr_jax.metrics import Mean
from tests import small


def test_why_an_update_is_rejected():
  one = jnp.float32(1)
  good = ClientUpdate(
    {'a': jnp.array([3.0, 4.0])},
    None, None, one, one, None, None, None, {'x': Mean(one, one)},
  )  # fmt: skip

  def faults(longest=5.0, **changes):
    found = rejection.faults(good._replace(**changes), longest)
    return [name for name, fault in found.items() if fault]

  assert faults() == []
  assert faults(None, delta={'a': jnp.array([1e18])}) == []
  assert faults(4.99) == [metrics_lib.TOO_LONG]
  for bad in (np.nan, np.inf, -np.inf, 1e30):  # 1e30 squared is infinite
    told = [metrics_lib.NOT_FINITE]
    assert faults(delta={'a': jnp.array([bad, 0.0])}) == told
    if bad != 1e30:
      assert faults(control={'a': jnp.array([0.0, bad])}) == told
      assert faults(weight=jnp.float32(bad)) == told
      assert faults(metrics={'x': Mean(jnp.float32(bad), one)}) == told
  assert faults(weight=jnp.float32(-1)) == [metrics_lib.MALFORMED]
  assert faults(steps=jnp.float32(0)) == [metrics_lib.MALFORMED]
  # One reason at most.
  assert faults(1.0, weight=jnp.float32(-1)) == [metrics_lib.MALFORMED]


@dataclasses.dataclass(frozen=True)
class Breaking(UpdateTransform):
  """Multiplies all that a client sends by what it keeps."""

  def client_state(self, params, key, num_clients):
    return jnp.ones(num_clients)

  def apply(self, update, kept, sender):
    factor = jnp.where(sender.client >= 0, kept, 1.0)
    broken = jax.tree.map(lambda x: x * factor, update.sent())
    # What it keeps goes on from here, if the update counts.
    return update._replace(**broken | {'steps': update.steps}), kept + 1


@pytest.fixture(scope='module')
def breaking():
  """SCAFFOLD, prototypes, memories: all that a client sends or keeps."""
  simulation = small.simulation(
    **small.ONE_EXPERT,
    drift_control='scaffold',
    client_optimizer='sgd',
    client_learning_rate=0.1,
    server_optimizer='fedadam',
    global_memory='prototypes,number=3',
  )
  return dataclasses.replace(
    simulation, transforms=(Breaking(), *simulation.transforms)
  )


COHORT = np.array([[0, 1], [2, 3], [4, 5]], np.int32)


def round_of(simulation, cohort=COHORT, factors=None):
  state = simulation.init_state()
  kept = np.ones(simulation.dataset.num_clients, np.float32)
  for client, factor in (factors or {}).items():
    kept[client] = factor
  state = state._replace(transforms=(jnp.asarray(kept), *state.transforms[1:]))
  before = jax.device_get(state)
  after, train = simulation.run_round(state, 1, cohort)
  return before, jax.device_get(after), train


def test_the_round_is_as_if_rejected_clients_were_not_in_it(breaking):
  bad = {1: np.nan, 2: np.inf, 5: 1e15}
  before, after, train = round_of(breaking, factors=bad)
  kept = np.where(np.isin(COHORT, list(bad)), -1, COHORT)
  _, expected, without = round_of(breaking, kept)
  small.assert_trees_equal(after.server, expected.server)
  assert train[metrics_lib.NOT_FINITE] == 2
  assert train[metrics_lib.TOO_LONG] == 1
  assert train[metrics_lib.ANSWERED] == without[metrics_lib.ANSWERED] == 3
  for name, value in without.items():
    if name not in (*metrics_lib.REJECTED, metrics_lib.ASKED):
      assert train[name] == value, name
  # What they keep is as before, of the others as after it.
  for client in range(6):
    own = (before if client in bad else expected)._replace(server=None)
    small.assert_trees_equal(
      jax.tree.map(lambda x: x[client], after._replace(server=None)),
      jax.tree.map(lambda x: x[client], own)._replace(
        transforms=(
          np.float32(bad[client] if client in bad else 2.0),
          *own.transforms[1:],
        )
      ),
    )


def test_scaffold_stays_consistent(breaking):
  _, after, _ = round_of(breaking, factors={1: np.nan})
  weights = np.asarray(
    round_lib.windows.num_positives(breaking.num_train, breaking.config),
    np.float64,
  )
  # The server's control variate is the weighted mean of the clients'.
  jax.tree.map(
    lambda c, own: np.testing.assert_allclose(
      c, np.tensordot(weights, own, 1) / weights.sum(), rtol=1e-3, atol=1e-6
    ),
    after.server.control,
    after.controls,
  )


def test_a_later_round_compiles_nothing(breaking):
  round_of(breaking)
  compiled = small.compiled_rounds()
  round_of(breaking, factors={0: np.nan, 3: 1e15})
  assert small.compiled_rounds() == compiled


def test_all_rejected_is_a_training_that_diverged(breaking):
  config = breaking.config
  _, after, train = round_of(breaking, factors=dict.fromkeys(range(6), np.nan))
  assert train['loss'] is None and train[metrics_lib.NOT_FINITE] == 6
  round_lib.check_finite_state(jax.tree.map(jnp.asarray, after), 1)
  told = small.error_of(round_lib.check_accepted, config, train, 3)
  assert told.startswith('round 3: 6 of 6 updates are NaN')
  assert 'the training diverged; start anew with a lower' in told
  # Who simulates clients that fail expects it; a few are no sign of it.
  federation = dataclasses.replace(config.federation, failures='random')
  simulated = dataclasses.replace(config, federation=federation)
  round_lib.check_accepted(simulated, train, 3)
  _, _, train = round_of(breaking, factors={0: np.nan})
  round_lib.check_accepted(config, train, 3)


@pytest.mark.slow
def test_accepted_updates_pass_unchanged():
  states = []
  for rule in ('none', 'absurd'):
    simulation = small.simulation(
      **small.ONE_EXPERT,
      rejection=rule,
      vocabulary='local',
      drift_control='scaffold',
      client_optimizer='sgd',
    )
    state = simulation.init_state()
    for number in (1, 2):
      state, train = simulation.run_round(
        state, number, simulation.sample_cohort(number)
      )
    states.append(jax.device_get(state)._replace(transforms=()))
    states[-1] = states[-1]._replace(
      server=states[-1].server._replace(transforms=())
    )
  small.assert_trees_equal(*states)
  assert train[metrics_lib.NOT_FINITE] == train[metrics_lib.TOO_LONG] == 0


def test_what_is_no_rejection():
  assert 'minimum' in small.error_of(
    small.simulation, rejection='absurd,times=-1'
  )
  assert 'no rejection' in small.error_of(small.simulation, rejection='all')
