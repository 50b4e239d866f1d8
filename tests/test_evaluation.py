"""Ranks: ties against the target, NaN is an error, both protocols."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax.data.dataset import ClientData
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import ranking
from tests import small


def client(history, num_items, negatives) -> ClientData:
  return ClientData(
    jnp.array(history),
    jnp.int32(num_items),
    jnp.int32(num_items - 2),
    jnp.zeros(1, int),
    jnp.int32(0),
    jnp.array(negatives),
    jnp.int32(8),
  )


# Items 1..7; the client consumed 1, 2, 3 (2 is the validation target, 3 that of
# the test). Unconsumed at the test: 4, 5, 6, 7; at validation 3 as well.
CLIENT = client([1, 2, 3, 0], 3, [[3, 5], [4, 5]])


def rank(scores, split='test', own=CLIENT):
  at = own.num_train + ranking.SPLITS[split]
  return ranking.rank_client(
    jnp.array(scores, jnp.float32), own, at, at, ranking.SPLITS[split]
  )


def test_rank_by_hand():
  # Target scores 5; of 4..7 only item 6 scores more; items 1 and 2 are
  # consumed and row 0 is no item, however high their scores.
  got = rank([9, 9, 9, 5, 1, 2, 8, 0])
  assert (got.full, got.sampled, got.bad_scores) == (1, 0, 0)


def test_the_test_item_is_a_candidate_at_validation():
  # Target 2 scores 5; of 3..7 items 3 and 6 score more, of 3 and 5 item 3.
  got = rank([9, 9, 5, 7, 1, 2, 8, 0], 'val')
  assert (got.full, got.sampled, got.bad_scores) == (2, 1, 0)
  # At the test item 2 is consumed, and 3 the target.
  got = rank([9, 9, 8, 7, 1, 2, 8, 0])
  assert (got.full, got.sampled) == (1, 0)


def test_a_later_item_consumed_before_is_no_candidate():
  # The test item is one that the client had consumed in training.
  own = client([1, 4, 2, 4], 4, [[5, 6], [5, 6]])
  scores = [9, 9, 5, 0, 9, 0, 0, 0]
  assert rank(scores, 'val', own).full == 0
  # Nor is the target its own rival where it comes again.
  own = client([1, 4, 2, 2], 4, [[5, 6], [5, 6]])
  assert rank(scores, 'val', own).full == 0


def test_what_a_client_disliked_is_no_candidate():
  own = CLIENT._replace(disliked=jnp.array([4, 6, 0, 0]))
  # Of 4..7 only 6 scores more than the target, and 5 and 7 are left.
  assert rank([9, 9, 9, 5, 1, 2, 8, 0], own=own).full == 0
  assert rank([9, 9, 9, 5, 1, 7, 8, 0], own=own).full == 1


def test_a_target_ranked_after_the_training_items_alone():
  # Consumed: 1; the target is 3, the test item; 2 is a candidate still.
  got = ranking.rank_client(
    jnp.array([9, 9, 9, 5, 1, 2, 8, 0], jnp.float32),
    CLIENT,
    jnp.int32(2),
    jnp.int32(1),
    1,
  )
  assert got.full == 2  # items 2 and 6


def test_a_tie_counts_against_the_target():
  got = rank([0, 0, 0, 5, 5, 5, 1, 5])
  assert (got.full, got.sampled) == (3, 2)


def test_equal_scores_everywhere_rank_last():
  got = rank([1] * 8)
  assert (got.full, got.sampled) == (4, 2)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_bad_scores_are_counted(bad):
  assert rank([0, 0, 0, 5, bad, 5, 1, bad]).bad_scores == 2


@pytest.fixture(scope='module')
def simulation():
  return small.simulation()


def test_nan_parameters_are_an_error_not_a_hit(simulation):
  state = simulation.init_state()
  broken = jax.tree.map(lambda x: x * np.nan, state.server.params)
  with pytest.raises(UserError, match='val: 9 of 9 targets.*NaN'):
    simulation.evaluate(
      state._replace(server=state.server._replace(params=broken)), 'val'
    )


def test_chunks_change_nothing(simulation):
  state = simulation.init_state()
  _, ranks = simulation.evaluate(state, 'test')
  other = changed(simulation, clients_per_eval_chunk=9)
  small.assert_trees_equal(ranks, other.evaluate(state, 'test')[1])
  assert ranks.full.shape == (9,)


def changed(simulation, **changes):
  """The simulation with other evaluation settings."""
  settings = dataclasses.replace(simulation.config.evaluation, **changes)
  return dataclasses.replace(
    simulation,
    config=dataclasses.replace(simulation.config, evaluation=settings),
  )


@pytest.mark.slow
def test_blocks_of_the_catalogue_change_nothing(simulation):
  # 57 rows in 8 blocks of 8: the last one reaches past the end.
  state = simulation.init_state()
  args = (
    state.server.broadcast(simulation.catalogue, simulation.config),
    jnp.array([0, 0, 4, 9, 2, 7]),
    jax.tree.map(lambda x: x[0], state.memories),
  )
  scores = [
    ranking.score_catalogue(
      simulation.model,
      changed(simulation, items_per_eval_block=size).config,
      *args,
    )
    for size in (8, 57)
  ]
  assert scores[0].shape == (57,)
  np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-6)


def test_chosen_clients_have_the_ranks_they_have_among_all(simulation):
  state = simulation.init_state()
  some = changed(simulation, eval_clients=4)
  clients = ranking.evaluated_clients(some.config, 9)
  assert len(set(clients)) == 4
  np.testing.assert_array_equal(
    clients, ranking.evaluated_clients(some.config, 9)
  )
  _, ranks = some.evaluate(state, 'test')
  _, everyone = simulation.evaluate(state, 'test')
  np.testing.assert_array_equal(ranks.full, everyone.full[clients])
  np.testing.assert_array_equal(ranks.sampled, everyone.sampled[clients])


def test_scores_use_the_items_before_the_target(simulation):
  """The rank follows from the model applied by hand."""
  state = simulation.init_state()
  _, ranks = simulation.evaluate(state, 'val')
  broadcast = state.server.broadcast(simulation.catalogue, simulation.config)
  data = small.dataset()
  for index in (0, 8):
    history = data.sequence(index)
    scores = np.asarray(
      ranking.score_next(
        simulation.model,
        simulation.config,
        broadcast,
        jnp.asarray(history),
        len(history) - 2,
        len(history) - 2,
        jax.tree.map(lambda x: x[index], state.memories),
      )
    )
    unseen = np.setdiff1d(np.arange(1, data.num_rows), history[:-1])
    margin = scores[unseen] - scores[history[-2]]
    assert abs(int((margin >= 0).sum()) - int(ranks.full[index])) <= 1
