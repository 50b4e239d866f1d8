"""A small data set and model that most tests share."""

import dataclasses

import jax
import numpy as np
import pytest

from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.config import RunConfig
from fedmmr_jax.data.dataset import Dataset
from fedmmr_jax.data.interactions import Interactions
from fedmmr_jax.data.selection import select
from fedmmr_jax.errors import UserError
from fedmmr_jax.federation import devices
from fedmmr_jax.federation import round as round_lib

NUM_ITEMS = 60
# For tests of what surrounds a client's training. A round takes 3 CPU seconds
# to compile, with one expert 7, with both 10, and more with dropout.
PLAIN = dict(experts='none')
# With a memory.
ONE_EXPERT = dict(experts='semantic')


def config(**changes) -> RunConfig:
  """Flag values over a configuration small enough to compile quickly."""
  small = dict(
    hidden_dim=16,
    num_blocks=1,
    num_heads=2,
    expert_form='attention,heads=2,projection_dim=8',
    router='item,hidden_dim=8',
    max_seq_len=6,
    dropout=0.0,  # a quarter less to compile
    memory='surprise,capacity=8,retrieval_size=4',
    batch_size=4,
    num_negatives=5,
    sampled_negatives=10,
    clients_per_chunk=2,
    clients_per_eval_chunk=4,
    client_fraction=0.5,
    num_rounds=2,
  )
  return RunConfig.from_flat_dict({**small, **changes}).validate()


def dataset(num_users: int = 8, seed: int = 0) -> Dataset:
  """Clients of 5 to 20 interactions over items with random features."""
  rng = np.random.default_rng(seed)
  users, items = [], []
  for user in range(1, num_users + 1):
    length = rng.integers(5, 21)
    users += [user] * length
    items += rng.permutation(np.arange(1, NUM_ITEMS + 1))[:length].tolist()
  # One more client consumes everything the others might not, so that the
  # catalogue does not depend on the draw.
  users += [num_users + 1] * 30
  items += list(range(1, 31))
  users, items = np.array(users), np.array(items)
  found = select('small', Interactions.of(users, items)).dataset
  visual = rng.normal(size=(found.num_rows, 12)).astype(np.float32)
  text = rng.normal(size=(found.num_rows, 10)).astype(np.float32)
  visual[[0, 3, 7]] = 0
  text[[0, 5]] = 0
  return dataclasses.replace(found, features={'visual': visual, 'text': text})


def simulation(**changes) -> simulation_lib.Simulation:
  return simulation_lib.build(config(**changes), dataset())


def after_rounds(simulation: simulation_lib.Simulation, count: int = 2):
  """The state after the first rounds."""
  state = simulation.init_state()
  for number in range(1, count + 1):
    state, _ = simulation.run_round(
      state, number, simulation.sample_cohort(number)
    )
  return state


def assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a), np.asarray(b), rtol=rtol, atol=atol
    ),
    actual,
    expected,
  )


def assert_trees_equal(actual, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
    actual,
    expected,
  )


def compiled_rounds() -> int:
  """How many programs of a round have been compiled so far."""
  return (
    round_lib.train_shard._cache_size()
    + devices._run_on_mesh._cache_size()
    + round_lib.merge_shards._cache_size()
    + round_lib.finish_round._cache_size()
  )


def copy(tree):
  """Arrays that survive the donation of the original."""
  return jax.tree.map(lambda x: x.copy(), tree)


def error_of(function, *arguments, **named) -> str:
  """The one line with which a call is refused."""
  with pytest.raises(UserError) as caught:
    function(*arguments, **named)
  message = str(caught.value)
  assert '\n' not in message
  return message
