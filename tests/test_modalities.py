"""Experts as a tuple: a third modality by its name, from a file to a round."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedmmr_jax as fm
from examples import third_modality
from fedmmr_jax.client import losses
from fedmmr_jax.models import experts
from tests import small

THREE = 'visual,semantic,audio'
OWN = THREE + '=examples.third_modality:MeanExpert'
SOFT = np.log1p(np.exp(-1))  # InfoNCE of two aligned samples at temperature 1


def with_audio() -> fm.Dataset:
  dataset = small.dataset()
  rng = np.random.default_rng(3)
  audio = rng.normal(size=(dataset.num_rows, 7)).astype(np.float32)
  audio[[0, 9]] = 0
  return dataclasses.replace(
    dataset, features=dataset.features | {'audio': audio}
  )


def simulation(**changes) -> fm.Simulation:
  return fm.Simulation.of(small.config(**changes), with_audio())


def params_of(simulation):
  return simulation.init_state().server.params


@pytest.mark.parametrize(
  'text, names',
  [
    ('both', ['visual', 'semantic']),
    ('none', []),
    ('semantic', ['semantic']),
    (THREE, ['visual', 'semantic', 'audio']),
    (OWN, ['visual', 'semantic', 'audio']),
  ],
)
def test_experts_are_named_in_one_setting(text, names):
  found = experts.of(small.config(experts=text).model)
  assert [m.name for m in found] == names
  matrices = {'visual': 'visual', 'semantic': 'text', 'audio': 'audio'}
  assert [m.features for m in found] == [matrices[name] for name in names]
  if text == OWN:
    assert found[2].expert is third_modality.MeanExpert
  elif 'audio' in text:
    assert found[2].expert is experts.VisualExpert


@pytest.mark.parametrize(
  'text, message',
  [
    ('visual,visual', "'visual' is not one more name"),
    ('both,audio', "'both' is not one more name"),
    ('a b', "'a b' is not one more name"),
    ('audio=math:pi', 'no subclass of fedmmr_jax.Expert'),
    ('audio=nothing', "no expert 'nothing'"),
    ('visual,smell', 'no smell features; put smell_features.npy beside'),
  ],
)
def test_experts_that_are_none_are_refused(text, message):
  assert message in small.error_of(simulation, experts=text)


@pytest.mark.slow
@pytest.mark.parametrize('text', [THREE, OWN.replace('visual,', '')])
def test_a_further_expert_is_trained_routed_to_and_reported(text):
  sim = simulation(experts=text)
  names = [expert.name for expert in experts.of(sim.config.model)]
  assert params_of(sim)['router']['logits']['bias'].shape == (len(names),)
  before = jax.tree.map(np.asarray, params_of(sim))
  (step,) = sim.rounds(count=1)
  weights = [step.metrics[f'w_{name}'] for name in names]
  assert sum(weights) == pytest.approx(1, abs=1e-5) and min(weights) > 0.05
  assert step.metrics['gradient_audio'] > 0
  for part in ('audio_expert', 'audio_norm'):
    moved = jax.tree.map(
      lambda a, b: np.abs(a - b).max(),
      before[part],
      step.state.server.params[part],
    )
    assert max(jax.tree.leaves(moved)) > 0
  metrics, _ = sim.evaluate(step.state, 'val')
  assert 0 <= metrics['full']['HR@10'] <= 1


def test_an_item_without_audio_goes_without_its_expert():
  sim = simulation(experts=THREE)
  weights = sim.route(sim.init_state())
  assert weights[9, 2] == 0 and weights[9].sum() == pytest.approx(1)
  assert (weights[10] > 0).all()


def test_a_third_expert_leaves_the_parameters_of_the_others_as_they_start():
  two, three = (params_of(simulation(experts=e)) for e in ('both', THREE))
  for name in ('item_embedding', 'visual_expert', 'semantic_expert'):
    small.assert_trees_equal(two[name], three[name])


def test_contrast_is_the_mean_over_the_pairs_of_views_by_hand():
  # Aligned views cost SOFT a pair; sample 1 has no third view, which is
  # alone there: of pairs (0, 2) and (1, 2) sample 0 is its own only contrast.
  view = jnp.eye(2)
  everything = jnp.ones((2, 3), bool)
  loss, has_pair = losses.contrast([view] * 3, everything, 1.0)
  np.testing.assert_allclose(loss, [SOFT, SOFT], rtol=1e-6)
  assert has_pair.all()
  loss, has_pair = losses.contrast(
    [view] * 3, everything.at[1, 2].set(False), 1.0
  )
  np.testing.assert_allclose(loss, [SOFT / 3, SOFT], rtol=1e-6, atol=1e-7)
  assert has_pair.all()
  loss, has_pair = losses.contrast(
    [view] * 3, jnp.array([[True, True, True], [False, True, False]]), 1.0
  )
  assert has_pair.tolist() == [True, False] and loss[1] == 0


def test_a_third_matrix_is_read_from_its_file(ml_1m):
  matrix = np.random.default_rng(0).normal(size=(31, 5)).astype(np.float32)
  matrix[0] = 0
  np.save(ml_1m / 'audio_features.npy', matrix)
  settings = dict(dataset='ml-1m', data_dir=str(ml_1m))
  loaded = fm.load(small.config(experts=THREE, **settings))
  assert list(loaded.dataset.features) == ['visual', 'text', 'audio']
  np.testing.assert_array_equal(
    loaded.dataset.features['audio'], matrix[loaded.dataset.item_ids]
  )
  assert [report.kind for report in loaded.integrity][-1] == 'audio'
  # A file that no expert reads is no part of the data set.
  assert 'audio' not in fm.load(small.config(**settings)).dataset.features


def test_the_fingerprint_covers_a_third_matrix():
  dataset = with_audio()
  other = dict(dataset.features, audio=dataset.features['audio'] + 1)
  prints = {
    small.dataset().fingerprint(),
    dataset.fingerprint(),
    dataclasses.replace(dataset, features=other).fingerprint(),
  }
  assert len(prints) == 3
