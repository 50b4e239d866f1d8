"""The long-term expert: what a profile is made of, and how it scores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.client import profile, scoring
from fedmmr_jax.client.windows import Batch
from fedmmr_jax.evaluation import ranking
from fedmmr_jax.models.profile import States
from tests import small

SETTINGS = dict(
  profile='history',
  positions='relative',
  experts='none',
  item_embedding='content_plus_id,collaborative_dim=4',
  max_seq_len=4,
  objective='all_positions',
  negatives='shared',
  batch_size=2,
  client_optimizer='sgd',
  client_learning_rate=0.1,
  embedding_init_std=0.3,
  dropout=0.0,
)


def test_outside_by_hand():
  sums = jnp.cumsum(jnp.array([[0.0], [1.0], [2.0], [4.0], [8.0]]), axis=0)
  got = profile.outside(
    sums, jnp.int32(4), jnp.array([1, 0, 0]), jnp.array([3, 4, 0])
  )
  # 1 and 8 are left; nothing; all.
  np.testing.assert_allclose(got[:, 0], [4.5, 0.0, 3.75])


def test_a_profile_is_the_mean_embedding_of_the_items():
  simulation = small.simulation(**SETTINGS)
  params = simulation.init_state().server.params
  embedded = simulation.model.apply(
    {'params': params},
    jnp.arange(simulation.model.num_rows),
    simulation.catalogue,
    method='embed',
  )
  got = profile.mean(
    simulation.model, params, jnp.array([3, 0, 5, 0]), simulation.catalogue
  )
  np.testing.assert_allclose(
    got, (embedded[3] + embedded[5]) / 2, rtol=1e-5, atol=1e-6
  )
  assert not profile.mean(
    simulation.model, params, jnp.zeros(4, int), simulation.catalogue
  ).any()


def test_the_score_is_a_mixture_of_two_softmaxes():
  simulation = small.simulation(**SETTINGS)
  state = simulation.init_state()
  items = jnp.arange(1, 9)
  candidates = simulation.model.apply(
    {'params': state.server.params},
    items,
    simulation.catalogue,
    simulation.model.view_memory(simulation.catalogue, items[:2]),
    method='candidates',
  )
  rng = np.random.default_rng(0)
  sequence, own = rng.normal(size=(2, 16)).astype(np.float32)
  e = np.asarray(candidates.embedding)
  mixed = simulation.model.score(
    States(sequence, own, jnp.array(True)), candidates
  )
  np.testing.assert_allclose(
    mixed, np.log(np.exp(e @ sequence) + np.exp(e @ own)), rtol=1e-5
  )
  alone = simulation.model.score(
    States(sequence, own, jnp.array(False)), candidates
  )
  np.testing.assert_allclose(alone, e @ sequence, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('experts', ['none', 'both'])
@pytest.mark.parametrize('shared', [True, False])
def test_scores_of_a_step_are_those_of_each_position(experts, shared):
  simulation = small.simulation(**(SETTINGS | dict(experts=experts)))
  model, catalogue = simulation.model, simulation.catalogue
  params = simulation.init_state().server.params
  rng = np.random.default_rng(0)
  windows = jnp.array([[0, 3, 5, 8], [2, 4, 6, 9], [1, 7, 11, 12]])
  targets = jnp.array([[3, 5, 8, 10], [4, 6, 9, 1], [7, 11, 12, 2]])
  # The last client has no profile.
  profiles = jnp.asarray(rng.normal(size=(3, 16)), jnp.float32).at[2].set(0)
  negative = rng.integers(13, 30, (5,) if shared else (12, 5))
  view = model.view_memory(catalogue, jnp.array([3, 9]))
  got = scoring.score_batch(
    model,
    params,
    Batch(
      windows,
      targets,
      targets > 0,
      position=jnp.zeros(targets.shape, int),
      lateness=jnp.ones(targets.shape),
      profile=profiles,
    ),
    jnp.asarray(negative),
    catalogue,
    view,
    None,
  )

  def candidates(items):
    return model.apply(
      {'params': params}, items, catalogue, view, method='candidates'
    )

  for i in range(12):
    b, q = divmod(i, 4)
    states = model.apply(
      {'params': params},
      windows[b],
      catalogue,
      profile=profiles[b],
      method='encode',
    )
    state = states._replace(sequence=states.sequence[q])
    items = jnp.append(targets[b, q], negative if shared else negative[i])
    expected = np.asarray(model.score(state, candidates(items)))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(got.positive[i], expected[0])
    close(got.negative[i], expected[1:])
    close(got.rest[i], np.log(np.exp(expected[1:]).sum()))
    alone = np.exp(candidates(items).embedding @ state.profile)
    close(got.profile[i], 0 if b == 2 else -np.log(alone[0] / alone.sum()))


def after_round(simulation):
  state = simulation.init_state()
  return simulation.run_round(state, 1, simulation.sample_cohort(1))


@functools.cache
def one_round():
  return after_round(small.simulation(**SETTINGS))


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes', [dict(clients_per_chunk=1), dict(vocabulary='local')]
)
def test_chunks_and_vocabulary_change_nothing(changes):
  whole, means = one_round()
  other, _ = after_round(small.simulation(**(SETTINGS | changes)))
  assert np.isfinite(means['loss'])
  small.assert_trees_close(
    other.server.params, whole.server.params, rtol=1e-4, atol=1e-5
  )


@pytest.mark.slow
def test_held_out_items_reach_no_profile():
  """Neither the sketch nor the profiles of training see them."""
  simulation = small.simulation(**SETTINGS, vocabulary='local')
  dataset = simulation.dataset
  items = dataset.items.copy()
  ends = dataset.offsets[1:]
  items[ends - 1], items[ends - 2] = 1, 2
  moved = simulation_lib.build(
    simulation.config, dataclasses.replace(dataset, items=items)
  )
  np.testing.assert_array_equal(
    moved.catalogue.content, simulation.catalogue.content
  )
  small.assert_trees_equal(
    after_round(moved)[0].server.params,
    after_round(simulation)[0].server.params,
  )


def test_evaluation_takes_what_lies_before_the_window():
  simulation = small.simulation(**SETTINGS)
  state = simulation.init_state()
  client = int(np.argmax(simulation.dataset.lengths))

  def full_rank(dataset):
    other = simulation_lib.build(simulation.config, dataset)
    other = dataclasses.replace(other, catalogue=simulation.catalogue)
    broadcast = state.server.broadcast(other.catalogue, other.compiled_config)
    history = jnp.asarray(dataset.sequence(client))
    n = len(history) - 2
    earlier = jnp.where(jnp.arange(len(history)) < n - 4, history, 0)
    return np.asarray(
      ranking.score_catalogue(
        other.model,
        other.compiled_config,
        broadcast,
        history[n - 4 : n],
        jax.tree.map(lambda x: x[0], state.memories),
        earlier,
      )
    )

  dataset = simulation.dataset
  before = full_rank(dataset)
  # The order of what left the window does not matter, what it is does.
  start = dataset.offsets[client]
  reversed_ = dataset.items.copy()
  reversed_[start : start + 10] = reversed_[start : start + 10][::-1]
  np.testing.assert_allclose(
    full_rank(dataclasses.replace(dataset, items=reversed_)),
    before,
    rtol=1e-4,
    atol=1e-5,
  )
  other = dataset.items.copy()
  other[start : start + 10] = other[start]
  assert (
    np.abs(full_rank(dataclasses.replace(dataset, items=other)) - before).max()
    > 1e-3
  )


def test_who_has_nothing_before_the_window_gets_recommendations():
  simulation = small.simulation(**(SETTINGS | dict(max_seq_len=40)))
  best, scores = simulation.recommend(simulation.init_state(), 0, 5)
  assert len(best) == 5 and np.isfinite(scores).all()


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    dict(experts='both', negatives='per_sample', num_negatives=3),
    dict(
      experts='semantic',
      drift_control='scaffold',
      client_optimizer='sgd',
      objective='last',
    ),
  ],
)
def test_it_goes_with_everything_else(changes):
  simulation = small.simulation(**(SETTINGS | changes))
  state, means = after_round(simulation)
  assert np.isfinite(means['loss']) and means['loss'] > means['rec_loss']
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.server))
  metrics, _ = simulation.evaluate(state, 'val')
  assert 0 <= metrics['full']['NDCG@10'] <= 1
  best, scores = simulation.recommend(state, 0, 5)
  assert len(best) == 5 and np.isfinite(scores).all()
