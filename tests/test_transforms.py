"""Transforms of updates: what every part of their kind relies on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax.federation.transforms import UpdateTransform
from tests import small


@dataclasses.dataclass(frozen=True)
class Counting(UpdateTransform):
  """Halves each delta, counts a client's visits and the server's rounds."""

  def client_state(self, params, key, num_clients):
    return jnp.zeros(num_clients, jnp.int32)

  def server_state(self, params):
    return jnp.float32(0)

  def no_metrics(self):
    return {'visited': metrics_lib.EMPTY}

  def apply(self, update, kept, sender):
    return update._replace(
      delta=jax.tree.map(lambda x: 0.5 * x, update.delta),
      metrics=update.metrics
      | {'visited': metrics_lib.mean(kept + 1.0, sender.client >= 0)},
    ), kept + 1

  def server_step(self, state, metrics, key):
    return state + metrics['visited'].weight


def test_transforms_change_updates_and_keep_their_states():
  # SGD: Adam makes rounding visible.
  plain = small.simulation(
    **small.PLAIN, client_optimizer='sgd', client_learning_rate=0.1
  )
  counted = dataclasses.replace(plain, transforms=(Counting(),))
  states = {}
  for name, simulation in (('plain', plain), ('counted', counted)):
    start = jax.device_get(simulation.init_state())
    state = simulation.init_state()
    cohort = simulation.sample_cohort(1)
    state, metrics = simulation.run_round(state, 1, cohort)
    states[name] = jax.tree.map(
      lambda new, old: np.asarray(new) - old,
      state.server.params,
      start.server.params,
    )
  jax.tree.map(
    lambda half, full: np.testing.assert_allclose(
      half, 0.5 * full, rtol=1e-4, atol=1e-7
    ),
    states['counted'],
    states['plain'],
  )
  visits = np.asarray(state.transforms[0])
  asked = cohort[cohort >= 0]
  assert visits[asked].tolist() == [1] * len(asked)
  assert visits.sum() == len(asked)
  assert state.server.transforms[0] == len(asked)
  assert metrics['visited'] == 1.0
