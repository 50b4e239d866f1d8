"""Content in the item table: what it starts from, and what it gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.errors import UserError
from fedmmr_jax.models import content
from tests import small


def features(rows=40, seed=0):
  """Two modalities that share 3 directions; some rows missing."""
  rng = np.random.default_rng(seed)
  shared = rng.normal(size=(rows, 3)) * [3, 2, 1]
  visual = shared @ rng.normal(size=(3, 9)) + 5.0
  text = shared @ rng.normal(size=(3, 7)) * 0.01
  visual[[0, 4]] = 0
  text[[0, 5]] = 0
  return visual.astype(np.float32), text.astype(np.float32)


def test_components_by_hand():
  # One direction, centred at 2: -1, 1 -> length 1 each; the sign is chosen so
  # that the largest entry is positive.
  visual = np.array([[0.0], [1.0], [3.0]], np.float32)
  got = content.components([visual, np.zeros((3, 0), np.float32)], 2)
  np.testing.assert_allclose(got[:, 1], 0)
  np.testing.assert_allclose(np.abs(got[:, 0]), [0, 1, 1])
  assert got[1, 0] == -got[2, 0]


def test_components_keep_the_geometry_of_the_features():
  visual, text = features()
  got = content.components([visual, text], 16)
  assert got.shape == (40, 16) and got.dtype == np.float32
  assert not got[0].any()
  np.testing.assert_allclose(np.mean((got[1:] ** 2).sum(1)), 1, rtol=1e-5)
  # All of the variance is in the shared directions and the two that tell
  # which modality is missing.
  assert not got[:, 9:].any() or np.abs(got[:, 9:]).max() < 1e-4
  # Scale and offset of a modality do not matter.
  moved = np.where(visual.any(1, keepdims=True), visual * 7 + 3, 0)
  np.testing.assert_allclose(
    np.abs(content.components([moved, text], 16)),
    np.abs(got),
    rtol=1e-3,
    atol=1e-4,
  )


@pytest.mark.parametrize('kind', ['visual', 'text'])
def test_one_modality_is_enough(kind):
  visual, text = features()
  empty = np.zeros((40, 0), np.float32)
  got = content.components(
    [visual if kind == 'visual' else empty, text if kind == 'text' else empty],
    4,
  )
  assert got[1:].any() and np.isfinite(got).all()


def embeddings(**changes):
  simulation = small.simulation(**changes)
  state = simulation.init_state()
  return (
    simulation,
    state,
    simulation.model.apply(
      {'params': state.server.params},
      jnp.arange(simulation.model.num_rows),
      simulation.catalogue,
      method='embed',
    ),
  )


@pytest.mark.slow
def test_both_forms_start_from_the_same_embeddings():
  _, _, init = embeddings(item_embedding='content_init')
  simulation, _, plus = embeddings(item_embedding='content_plus_id')
  np.testing.assert_allclose(init, plus, rtol=1e-4, atol=1e-6)
  assert not init[0].any()
  std = simulation.config.model.embedding_init_std
  np.testing.assert_allclose(jnp.std(init[1:]), std, rtol=0.1)
  cosine = jnp.sum(init * simulation.catalogue.content, -1) / (
    jnp.linalg.norm(init, axis=-1)
    * jnp.linalg.norm(simulation.catalogue.content, axis=-1)
  )
  assert jnp.nanmedian(cosine) > 0.9


def test_id_looks_at_no_content():
  simulation, _, _ = embeddings(item_embedding='id')
  assert simulation.catalogue.content.shape[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize('vocabulary', ['dense', 'local'])
def test_items_nobody_looked_at_move_with_their_content(vocabulary):
  changes = dict(
    item_embedding='content_plus_id',
    vocabulary=vocabulary,
    objective='all_positions',
    negatives='shared',
    num_negatives=2,
    batch_size=1,
    client_fraction=0.1,
    client_optimizer='sgd',
  )
  simulation, before, old = embeddings(**changes)
  start = np.asarray(before.server.params['item_embedding'])
  after, means = simulation.run_round(before, 1, simulation.sample_cohort(1))
  assert np.isfinite(means['loss'])
  new = simulation.model.apply(
    {'params': after.server.params},
    jnp.arange(simulation.model.num_rows),
    simulation.catalogue,
    method='embed',
  )
  same_row = np.all(
    np.asarray(after.server.params['item_embedding']) == start, axis=1
  )
  assert same_row[1:].any()
  cold = same_row & np.asarray(simulation.catalogue.content).any(1)
  assert np.any(np.asarray(new)[cold] != np.asarray(old)[cold], axis=1).all()
  assert not np.asarray(new)[0].any()


def test_content_needs_features():
  dataset = small.dataset()
  dataset = dataclasses.replace(dataset, features={})
  with pytest.raises(UserError, match='content_init` needs item features'):
    simulation_lib.build(small.config(item_embedding='content_init'), dataset)


def test_the_noise_of_the_table_is_nobody_elses():
  """Table and model start from one key: no draw may come twice."""
  key = jax.random.fold_in(jax.random.key(0), 0)
  simulation = small.simulation()
  table = simulation.init_state().server.params['item_embedding']
  std = simulation.config.model.embedding_init_std
  noise = np.asarray(
    content.initial_table(key, jnp.zeros(table.shape), std, plus_id=True)
  )
  assert noise[1:].std() == pytest.approx(std, rel=0.1)
  # 57 x 16 numbers: the correlation of independent ones is about 0.03.
  assert abs(np.corrcoef(noise[1:].ravel(), table[1:].ravel())[0, 1]) < 0.15


@pytest.mark.parametrize('row_noise', [0.0, 0.15])
def test_rows_start_as_small_as_asked(row_noise):
  key = jax.random.key(0)
  some = jnp.zeros((9, 4)).at[1:5].set(1.0)
  usual, found = (
    np.asarray(content.initial_table(key, some, 0.1, True, noise))
    for noise in (content.NOISE, row_noise)
  )
  np.testing.assert_allclose(found, usual * row_noise / 0.3, atol=1e-7)
  assert usual[1:].all() and not found[0].any()
  simulation = small.simulation(
    item_embedding=f'content_plus_id,row_noise={row_noise}', experts='none'
  )
  table = simulation.init_state().server.params['item_embedding']
  assert table[1:].any() == (row_noise > 0)


def test_id_dropout_leaves_an_item_its_content_alone():
  simulation = small.simulation(
    item_embedding='content_plus_id,collaborative_dim=4,id_dropout=0.95',
    experts='none',
  )
  params = simulation.init_state().server.params
  items = jnp.tile(jnp.arange(1, simulation.model.num_rows), 50)

  def embed(train, key):
    return np.asarray(
      simulation.model.apply(
        {'params': params},
        items,
        simulation.catalogue,
        train,
        rngs={'dropout': jax.random.key(key)},
        method='embed',
      )
    )

  whole, trained = embed(False, 0), embed(True, 0)
  content = np.asarray(simulation.catalogue.content)[items]
  # Without row, and without the directions that histories give.
  alone = np.where(np.arange(16) < 12, content, 0) @ np.asarray(
    params['content_projection']
  )
  has_content = content.any(axis=1)
  dropped = has_content & np.isclose(trained, alone, atol=1e-6).all(axis=1)
  np.testing.assert_allclose(trained[~dropped], whole[~dropped], rtol=1e-6)
  assert dropped.sum() / has_content.sum() == pytest.approx(0.95, abs=0.02)
  assert not np.array_equal(trained, embed(True, 1))
