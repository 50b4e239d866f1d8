"""The model against numbers computed by the PyTorch original."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedmmr_jax.client import losses
from fedmmr_jax.config import InstanceWeight
from fedmmr_jax.models import feddmmr
from tests import parity


@pytest.fixture(scope='module')
def reference():
  return np.load(parity.require(parity.PARITY / 'model_parity.npz'))


@pytest.fixture(scope='module')
def catalogue(reference):
  return feddmmr.Catalogue.of(
    {'visual': reference['in/visual_table'], 'text': reference['in/text_table']}
  )


def forward(model, params, reference, catalogue):
  """Scores of each sequence against its own candidates, and their parts."""
  apply = partial(model.apply, {'params': params})
  memory = model.view_memory(catalogue, reference['in/memory_items'])
  sequences = jnp.asarray(reference['in/seq'])
  items = jnp.asarray(reference['in/candidates'])
  states = jax.vmap(
    lambda w: apply(w, catalogue, last_only=True, method='encode')
  )(sequences)[:, 0]
  candidates = jax.vmap(
    lambda c: apply(c, catalogue, memory, method='candidates')
  )(items)
  scores = jax.vmap(model.score)(states, candidates)
  return states, candidates, scores


def loss(params, model, reference, catalogue):
  _, candidates, scores = forward(model, params, reference, catalogue)
  rec = losses.cross_entropy(
    scores[:, 0], jax.nn.logsumexp(scores[:, 1:], axis=-1)
  )
  everyone = jnp.ones(rec.shape, bool)
  terms = losses.combine(
    InstanceWeight(),
    0.01,
    rec,
    everyone,
    [output[:, 0] for output in candidates.outputs.values()],
    jnp.ones((len(rec), 2), bool),
    losses.load_balance_loss(
      candidates.weights.reshape(-1, 2), jnp.ones(scores.size)
    ),
  )
  return terms.total, (terms, rec)


def assert_close(actual, expected, relative):
  """Error relative to the largest magnitude of the reference array."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape
  error = np.max(np.abs(actual - expected)) / np.max(np.abs(expected))
  assert error <= relative, f'relative error {error:.2e}'


def test_every_parameter_of_the_original_has_its_place(reference):
  model = parity.model()
  catalogue = feddmmr.Catalogue.of(
    {'visual': reference['in/visual_table'], 'text': reference['in/text_table']}
  )
  ours = model.init(jax.random.key(0), catalogue, method='initialise')['params']
  theirs = parity.tree(reference, 'param/')
  assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs)


def test_forward(reference, catalogue):
  model, params = parity.model(), parity.tree(reference, 'param/')
  _, candidates, scores = forward(model, params, reference, catalogue)
  assert_close(
    candidates.outputs['visual'], reference['out/visual_expert'], 1e-5
  )
  assert_close(
    candidates.outputs['semantic'], reference['out/semantic_expert'], 1e-5
  )
  assert_close(candidates.weights, reference['out/router_weights'], 1e-5)
  assert_close(scores, reference['out/scores'], 1e-5)


def test_fused_vector(reference, catalogue):
  model, params = parity.model(), parity.tree(reference, 'param/')
  states, candidates, _ = forward(model, params, reference, catalogue)
  fused = states[:, None] + candidates.auxiliary
  assert_close(fused, reference['out/fused'], 1e-5)


def test_backbone_states(reference, catalogue):
  params = parity.tree(reference, 'param/')
  plain = parity.model(modalities=())
  states = jax.vmap(
    lambda w: plain.apply({'params': params}, w, catalogue, method='encode')
  )(jnp.asarray(reference['in/seq']))
  assert_close(states, reference['out/sasrec'], 1e-5)


@pytest.mark.parametrize(
  'name, changes, images',
  [
    ('out/scores_backbone_only', dict(modalities=()), True),
    # Its router has two outputs, of which one is masked.
    ('out/scores_semantic_only', {}, False),
  ],
)
def test_models_with_fewer_experts(reference, catalogue, name, changes, images):
  params = parity.tree(reference, 'param/')
  has = catalogue.has | {'visual': catalogue.has['visual'] & images}
  catalogue = catalogue._replace(has=has)
  _, _, scores = forward(parity.model(**changes), params, reference, catalogue)
  assert_close(scores, reference[name], 1e-5)


def test_every_loss_term(reference, catalogue):
  model, params = parity.model(), parity.tree(reference, 'param/')
  total, (terms, rec) = loss(params, model, reference, catalogue)
  assert_close(rec, reference['loss/rec_per_sample'], 1e-5)
  assert_close(terms.rec, reference['loss/rec'], 1e-5)
  surprise = losses.surprise_of(rec)
  assert_close(surprise, reference['loss/surprise'], 1e-5)
  assert_close(
    losses.instance_weights(surprise, 0.5),
    reference['loss/instance_weights'],
    1e-5,
  )
  assert_close(terms.contrastive, reference['loss/contrastive_weighted'], 1e-5)
  assert_close(terms.load_balance, reference['out/lb_loss'], 1e-5)
  assert_close(total, reference['loss/total'], 1e-5)


def test_contrastive_per_sample(reference, catalogue):
  model, params = parity.model(), parity.tree(reference, 'param/')
  _, candidates, _ = forward(model, params, reference, catalogue)
  per_sample = losses.symmetric_infonce(
    *(x[:, 0] for x in candidates.outputs.values()), jnp.ones(6, bool), 0.07
  )
  assert_close(per_sample, reference['loss/contrastive_per_sample'], 1e-5)


@pytest.mark.slow
def test_every_gradient(reference, catalogue):
  model, params = parity.model(), parity.tree(reference, 'param/')
  gradient = jax.grad(loss, has_aux=True)(params, model, reference, catalogue)[
    0
  ]
  expected = parity.tree(reference, 'grad/')
  # A key's bias shifts every logit of a query alike: its gradient is 0 but
  # for rounding, so errors are taken relative to the whole gradient's scale.
  floor = 1e-3 * max(float(np.abs(g).max()) for g in jax.tree.leaves(expected))
  for path, want in jax.tree_util.tree_leaves_with_path(expected):
    got = gradient
    for key in path:
      got = got[key.key]
    error = np.max(np.abs(got - want)) / max(float(np.abs(want).max()), floor)
    assert error <= 1e-4, f'{jax.tree_util.keystr(path)}: {error:.2e}'


@pytest.mark.slow
def test_one_adam_step(reference, catalogue):
  model, params = parity.model(), parity.tree(reference, 'param/')
  gradient = jax.grad(loss, has_aux=True)(params, model, reference, catalogue)[
    0
  ]
  optimizer = optax.chain(
    optax.add_decayed_weights(1e-5), optax.adam(1e-3, eps=1e-8)
  )
  updates, _ = optimizer.update(gradient, optimizer.init(params), params)
  moved = optax.apply_updates(params, updates)
  expected = parity.tree(reference, 'adam1/')
  true_gradient = parity.tree(reference, 'grad/')

  def check(path, got, want, before, grad):
    # Adam's first step is lr · g / (|g| + 1e-8): where g is rounding noise
    # its sign is noise too, so compare only where g is not.
    decided = np.abs(grad + 1e-5 * before) > 1e-6
    error = np.abs(got - want)[decided]
    assert error.max(initial=0.0) <= 1e-5, jax.tree_util.keystr(path)

  jax.tree_util.tree_map_with_path(
    check, moved, expected, params, true_gradient
  )
