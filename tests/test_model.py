"""The composed model: causality, padding, masks, exactness of factoring."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax.config import ModelConfig, Residual
from fedmmr_jax.models import experts, feddmmr, layers
from tests import small

CONFIG = small.config(dropout=0.0).model
V = 20


def build(config: ModelConfig = CONFIG, visual_dim=12, text_dim=10):
  rng = np.random.default_rng(1)
  visual, text = (
    rng.normal(size=(V, visual_dim)),
    rng.normal(size=(V, text_dim)),
  )
  visual[[0, 3]] = 0
  text[[0, 5]] = 0
  features = {'visual': visual, 'text': text}
  catalogue = feddmmr.Catalogue.of(features)
  modalities = tuple(
    m for m in experts.of(config) if features[m.features].shape[1]
  )
  model = feddmmr.FedDMMR(config, V, modalities)
  params = model.init(jax.random.key(0), catalogue, method='initialise')[
    'params'
  ]
  return model, catalogue, partial(model.apply, {'params': params}), params


def test_masked_softmax_of_nothing_is_zero_with_finite_gradient():
  def total(x):
    return jnp.sum(layers.masked_softmax(x, jnp.zeros((2, 3), bool)) ** 2)

  x = jnp.ones((2, 3))
  assert total(x) == 0
  assert np.isfinite(jax.grad(total)(x)).all()


def test_masked_softmax_by_hand():
  x = jnp.log(jnp.array([1.0, 3.0, 5.0]))
  got = layers.masked_softmax(x, jnp.array([True, True, False]))
  np.testing.assert_allclose(got, [0.25, 0.75, 0.0], rtol=1e-6)


def test_backbone_is_causal():
  _, catalogue, apply, _ = build()
  window = jnp.array([1, 2, 3, 4, 5, 6])
  before = apply(window, catalogue, method='encode')
  after = apply(window.at[4].set(9), catalogue, method='encode')
  np.testing.assert_array_equal(before[:4], after[:4])
  assert np.abs(before[4:] - after[4:]).max(axis=1).min() > 1e-4


def test_padding_is_never_attended_to():
  model, catalogue, apply, params = build()
  window = jnp.array([0, 0, 0, 4, 5, 6])
  before = apply(window, catalogue, method='encode')[3:]
  # What lies in the padding's positions cannot matter.
  loud = jax.tree.map(lambda x: x, params)
  loud['backbone'] = dict(loud['backbone'])
  loud['backbone']['position_embedding'] = (
    params['backbone']['position_embedding'].at[:3].set(100.0)
  )
  after = model.apply({'params': loud}, window, catalogue, method='encode')[3:]
  np.testing.assert_array_equal(before, after)


def test_last_only_is_the_last_position():
  _, catalogue, apply, _ = build()
  window = jnp.array([0, 2, 3, 4, 5, 6])
  np.testing.assert_allclose(
    apply(window, catalogue, last_only=True, method='encode')[0],
    apply(window, catalogue, method='encode')[-1],
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.parametrize('similarity', ['cosine', 'dot'])
def test_factored_scores_and_gradients_equal_the_naive_form(similarity):
  """score() against forming the fused [T, J, D] tensor."""
  model, _, _, _ = build(
    dataclasses.replace(CONFIG, fusion=Residual(similarity=similarity))
  )
  rng = np.random.default_rng(2)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  states, e, a = draw(7, 16), draw(9, 16), draw(9, 16)

  def candidates(e, a):
    nothing = jnp.zeros((9, 2))
    return feddmmr.Candidates(e, a, {}, nothing, nothing > 0)

  def factored(states, e, a):
    return jax.vmap(model.score, (0, None))(states, candidates(e, a))

  def naive(states, e, a):
    fused = states[:, None] + a
    dot = jnp.sum(fused * e, -1)
    if similarity == 'dot':
      return dot
    norms = jnp.linalg.norm(fused, axis=-1) * jnp.linalg.norm(e, axis=-1)
    return 4.0 * dot / norms  # sqrt(16)

  np.testing.assert_allclose(
    factored(states, e, a), naive(states, e, a), rtol=1e-5, atol=1e-5
  )
  weight = draw(7, 9)
  for got, want in zip(
    *(
      jax.grad(lambda *x: jnp.sum(f(*x) * weight), (0, 1, 2))(states, e, a)
      for f in (factored, naive)
    )
  ):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_folded_experts_equal_the_plain_attention():
  """The experts project R memory rows and fold queries; written out plainly
  they give the same."""
  model, catalogue, apply, params = build()
  items, stored = jnp.arange(1, 9), jnp.array([2, 4, 6, 3])
  view = model.view_memory(catalogue, stored)
  got = apply(items, catalogue, view, method='candidates')

  def linear(p, x):
    return x @ p['kernel'] + p['bias']

  p = params['visual_expert']
  query = linear(p['query'], catalogue.features['visual'][items])
  key = linear(p['key'], catalogue.features['visual'][stored])
  attention = layers.masked_softmax(
    query @ key.T / np.sqrt(8), catalogue.has['visual'][stored]
  )
  x = linear(p['output'], attention @ catalogue.features['visual'][stored])
  x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(
    x.var(-1, keepdims=True) + 1e-5
  )
  np.testing.assert_allclose(
    got.outputs['visual'], jax.nn.relu(x), rtol=1e-4, atol=1e-5
  )


def test_experts_without_input_get_weight_zero_and_the_rest_is_renormalised():
  model, catalogue, apply, _ = build()
  items = jnp.array([1, 3, 5])  # 3 has no image, 5 no text
  both = model.view_memory(catalogue, jnp.array([2, 4, 0]))
  got = apply(items, catalogue, both, method='candidates')
  np.testing.assert_array_equal(
    got.available, [[True, True], [False, True], [True, True]]
  )
  np.testing.assert_allclose(got.weights.sum(-1), 1.0, rtol=1e-6)
  np.testing.assert_array_equal(got.weights[1], [0.0, 1.0])
  # A memory that holds only an item without image leaves the text expert.
  no_image = model.view_memory(catalogue, jnp.array([3, 0, 0]))
  got = apply(items, catalogue, no_image, method='candidates')
  np.testing.assert_array_equal(got.weights, [[0.0, 1.0]] * 3)


def test_an_empty_memory_scores_with_the_sequence_alone():
  model, catalogue, apply, params = build()
  items = jnp.array([1, 2, 3])
  empty = model.view_memory(catalogue, jnp.zeros(4, jnp.int32))
  got = apply(items, catalogue, empty, method='candidates')
  assert not got.weights.any() and not got.auxiliary.any()
  state = apply(
    jnp.array([0, 0, 0, 1, 2, 3]), catalogue, last_only=True, method='encode'
  )[0]
  e = params['item_embedding'][items]
  want = (
    4.0 * (e @ state) / (jnp.linalg.norm(e, axis=-1) * jnp.linalg.norm(state))
  )
  np.testing.assert_allclose(model.score(state, got), want, rtol=1e-5)


def test_empty_slots_and_missing_features_change_nothing():
  model, catalogue, apply, _ = build()
  items = jnp.arange(1, 9)
  few = model.view_memory(catalogue, jnp.array([2, 4]))
  padded = model.view_memory(catalogue, jnp.array([2, 0, 4, 0]))
  small.assert_trees_close(
    apply(items, catalogue, few, method='candidates'),
    apply(items, catalogue, padded, method='candidates'),
  )


def test_gate_scales_the_experts_and_residual_has_none():
  gated = small.config(dropout=0.0, fusion='gated,init=0.25').model
  model, catalogue, apply, params = build(gated)
  assert params['fusion_gate'] == 0.25
  _, _, residual, plain = build()
  assert 'fusion_gate' not in plain
  items, view = (
    jnp.arange(1, 5),
    model.view_memory(catalogue, jnp.array([2, 4])),
  )
  got = apply(items, catalogue, view, method='candidates').auxiliary
  shared = {k: v for k, v in params.items() if k != 'fusion_gate'}
  model, *_ = build()
  full = model.apply(
    {'params': shared}, items, catalogue, view, method='candidates'
  ).auxiliary
  np.testing.assert_allclose(got, 0.25 * full, rtol=1e-6)


def test_global_prototypes_are_further_text_entries():
  model, catalogue, apply, _ = build()
  items = jnp.arange(1, 5)
  as_memory = model.view_memory(catalogue, jnp.array([2, 4]))
  one_each = model.view_memory(
    catalogue,
    jnp.array([2]),
    catalogue.features['text'][jnp.array([4, 9])],
    jnp.array([True, False]),
  )
  np.testing.assert_allclose(
    apply(items, catalogue, as_memory, method='candidates').outputs['semantic'],
    apply(items, catalogue, one_each, method='candidates').outputs['semantic'],
    rtol=1e-5,
    atol=1e-6,
  )


def test_score_of_a_zero_vector_is_zero_with_finite_gradient():
  model, catalogue, apply, _ = build()
  empty = model.view_memory(catalogue, jnp.zeros(4, jnp.int32))
  padding = apply(jnp.array([0]), catalogue, empty, method='candidates')
  state = jnp.ones(16)
  assert model.score(state, padding)[0] == 0
  for value in jax.tree.leaves(
    jax.grad(
      lambda s, e: jnp.sum(model.score(s, padding._replace(embedding=e))),
      (0, 1),
    )(state, padding.embedding)
  ):
    assert np.isfinite(value).all()


@pytest.mark.parametrize('dims', [(0, 0), (12, 0), (0, 10)])
def test_models_without_a_modality_have_no_parameters_for_it(dims):
  _, catalogue, apply, params = build(visual_dim=dims[0], text_dim=dims[1])
  assert ('visual_expert' in params) == bool(dims[0])
  assert ('semantic_expert' in params) == bool(dims[1])
  assert 'router' not in params  # one expert leaves nothing to route


def test_plain_backbone_scores_by_inner_product():
  model, catalogue, apply, params = build(visual_dim=0, text_dim=0)
  view = model.view_memory(catalogue, jnp.array([2, 4]))
  items = jnp.array([1, 2])
  candidates = apply(items, catalogue, view, method='candidates')
  state = apply(jnp.arange(6), catalogue, last_only=True, method='encode')[0]
  np.testing.assert_allclose(
    model.score(state, candidates),
    params['item_embedding'][items] @ state,
    rtol=1e-6,
  )


def test_row_zero_starts_at_zero():
  *_, params = build()
  assert not params['item_embedding'][0].any()
  assert params['item_embedding'][1:].any(axis=1).all()


CANDIDATE = small.config(
  dropout=0.0, expert_form='attention,input=candidate,heads=2,projection_dim=8'
).model
VIEW = jnp.array([2, 4])


def seen(model, catalogue, apply, items, view=VIEW):
  return apply(
    items, catalogue, model.view_memory(catalogue, view), method='candidates'
  )


def changed(catalogue, kind, item):
  """The catalogue with another feature row of an item outside the memory."""
  matrix = catalogue.features[kind].at[item].add(1.0)
  return catalogue._replace(features=catalogue.features | {kind: matrix})


@pytest.mark.parametrize(
  'kind, own, other',
  [('visual', 'visual', 'semantic'), ('text', 'semantic', 'visual')],
)
def test_an_expert_sees_its_candidates_own_feature(kind, own, other):
  model, catalogue, apply, _ = build(CANDIDATE)
  items = jnp.array([6, 7])
  before = seen(model, catalogue, apply, items)
  after = seen(model, changed(catalogue, kind, 6), apply, items)
  assert (before.outputs[own][0] != after.outputs[own][0]).any()
  np.testing.assert_array_equal(before.outputs[other], after.outputs[other])
  small.assert_trees_equal(
    jax.tree.map(lambda x: x[1], before), jax.tree.map(lambda x: x[1], after)
  )


def test_the_originals_semantic_expert_sees_no_candidate_feature():
  model, catalogue, apply, params = build()
  items = jnp.array([6])
  small.assert_trees_equal(
    seen(model, catalogue, apply, items),
    seen(model, changed(catalogue, 'text', 6), apply, items),
  )
  assert 'candidate' not in params['visual_expert']


def test_a_candidate_with_features_needs_no_memory():
  model, catalogue, apply, _ = build(CANDIDATE)
  # 3 has no image, 5 no text.
  got = seen(
    model, catalogue, apply, jnp.array([1, 3, 5]), jnp.zeros(2, jnp.int32)
  )
  np.testing.assert_array_equal(
    got.available, [[True, True], [False, True], [True, False]]
  )
  assert np.isfinite(got.auxiliary).all()


def test_expert_outputs_start_as_small_as_asked():
  model, catalogue, apply, _ = build(CANDIDATE)
  tenth = dataclasses.replace(
    CANDIDATE, expert_form=dataclasses.replace(CANDIDATE.expert_form, scale=0.1)
  )
  _, _, apply_tenth, _ = build(tenth)
  items = jnp.arange(1, 9)
  np.testing.assert_allclose(
    seen(model, catalogue, apply_tenth, items).auxiliary,
    0.1 * seen(model, catalogue, apply, items).auxiliary,
    rtol=1e-5,
    atol=1e-7,
  )


@pytest.mark.parametrize(
  'experts, groups',
  [
    ('both', {'visual_expert', 'semantic_expert', 'router'}),
    ('visual', {'visual_expert'}),
    ('semantic', {'semantic_expert'}),
    ('none', set()),
  ],
)
def test_experts_that_are_left_out_have_no_parameters(experts, groups):
  params = small.simulation(experts=experts).init_state().server.params
  assert groups == {'visual_expert', 'semantic_expert', 'router'} & set(params)


@pytest.mark.parametrize(
  'scaling, width', [('none', 12), ('centred', 12), ('components', 16)]
)
def test_scaled_features_keep_missing_rows_and_mean_nothing(scaling, width):
  catalogue = small.simulation(
    expert_form=f'attention,heads=2,projection_dim=8,features={scaling}'
  ).catalogue
  assert catalogue.features['visual'].shape[1] == width
  present = np.asarray(catalogue.has['visual'])
  assert not present[[0, 3, 7]].any() and present.sum() == len(present) - 3
  if scaling != 'none':
    rows = np.asarray(catalogue.features['visual'])[present]
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-6)
    assert (rows**2).sum(axis=1).mean() == pytest.approx(1, rel=1e-5)


def relative():
  return build(small.config(dropout=0.0, positions='relative').model)


def test_relative_positions_have_biases_and_no_embeddings():
  _, catalogue, apply, params = relative()
  assert 'position_embedding' not in params['backbone']
  bias = params['backbone']['block_0']['distance_embedding']
  # Two heads: one that forgets by half an exponent a step, one that does not.
  np.testing.assert_allclose(bias, [[0, -0.5, -1, -1.5, -2, -2.5], [0] * 6])
  window = jnp.array([0, 2, 3, 4, 5, 6])
  states = apply(window, catalogue, method='encode')
  np.testing.assert_allclose(
    apply(window, catalogue, last_only=True, method='encode')[0],
    states[-1],
    rtol=1e-5,
    atol=1e-6,
  )
  after = apply(window.at[4].set(9), catalogue, method='encode')
  np.testing.assert_array_equal(states[:4], after[:4])
  # Order matters: the same items, two of them exchanged.
  swapped = apply(
    window[jnp.array([0, 1, 3, 2, 4, 5])], catalogue, method='encode'
  )
  assert np.abs(swapped[-1] - states[-1]).max() > 1e-3


def test_relative_positions_do_not_depend_on_padding():
  _, catalogue, apply, _ = relative()
  window = jnp.array([0, 0, 2, 3, 4, 5])
  moved = jnp.array([0, 2, 3, 4, 5, 7])
  np.testing.assert_allclose(
    apply(window, catalogue, method='encode')[2:],
    apply(moved, catalogue, method='encode')[1:5],
    rtol=1e-4,
    atol=1e-5,
  )


def test_a_recent_start_is_the_mean_of_the_last_items_by_hand():
  _, catalogue, apply, params = build(
    small.config(dropout=0.0, positions='relative,start=recency').model
  )
  window = jnp.array([0, 2, 3, 4, 5, 6])
  x = np.asarray(params['item_embedding'])[np.asarray(window)]
  x /= x.std()  # no epsilon of a LayerNorm counts
  weight = np.exp(-0.25 * np.arange(6)[::-1]) * (np.asarray(window) > 0)
  mean = (weight / weight.sum()) @ x
  expected = x[-1] + 4 * mean
  expected = (expected - expected.mean()) / expected.std()
  params = jax.tree.map(jnp.array, params)  # of one's own
  for name in ('query', 'key'):  # only distance tells entries apart
    params['backbone']['block_0'][name]['kernel'] *= 0
  params['item_embedding'] = params['item_embedding'].at[window].set(x)
  # A weakly typed parameter would have the second round compile once more.
  assert not any(x.aval.weak_type for x in jax.tree.leaves(params))
  states = apply.func({'params': params}, window, catalogue, method='encode')
  np.testing.assert_allclose(states[-1], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('positions', ['absolute', 'relative'])
def test_a_shorter_window_gives_what_the_padded_one_gives(positions):
  _, catalogue, apply, _ = build(
    small.config(dropout=0.0, positions=positions).model
  )
  length = CONFIG.max_seq_len
  items = jnp.array([7, 2, 5])
  padded = jnp.pad(items, (length - 3, 0))
  np.testing.assert_allclose(
    apply(items, catalogue, method='encode'),
    apply(padded, catalogue, method='encode')[-3:],
    rtol=1e-5,
    atol=1e-6,
  )


def similar(sharpness=float(np.log(3))):
  """A similarity expert over two entries that are as unlike as can be."""
  expert = experts.SimilarityExpert(
    small.config(expert_form=f'similarity,sharpness={sharpness}').model
  )
  entries = experts.Entries(
    jnp.array([[2.0, 0.0], [0.0, 0.5]]),
    jnp.ones((2, 1), bool),
    jnp.array([[4.0, 0.0, 8.0], [0.0, 4.0, 0.0]]),
  )
  params = expert.init(
    jax.random.key(0), jnp.zeros((1, 3)), jnp.ones((1, 2)), entries, False
  )

  def read(feature, entries=entries):
    embedding = jnp.zeros((len(feature), 3))
    return expert.apply(params, embedding, feature, entries, False)

  return read, entries, params['params']


def test_similarity_reads_what_is_most_like_the_candidate_by_hand():
  """Cosines of 1 and 0, times ln 3: three quarters and a quarter."""
  read, entries, _ = similar()
  expected = [[3.0, 1.0, 6.0], [1.0, 3.0, 2.0]]
  features = jnp.array([[7.0, 0.0], [0.0, 0.1]])  # lengths do not matter
  np.testing.assert_allclose(read(features), expected, rtol=1e-6)
  only_first = entries._replace(mask=jnp.array([[True], [False]]))
  np.testing.assert_allclose(
    read(features, only_first), [[4.0, 0.0, 8.0]] * 2, rtol=1e-6
  )


def test_similarity_does_not_train_the_item_table():
  read, entries, _ = similar()

  def total(content):
    return jnp.sum(read(jnp.ones((1, 2)), entries._replace(content=content)))

  assert not jax.grad(total)(entries.content).any()


def test_similarity_without_content_trains_a_projection():
  form = small.config(expert_form='similarity', dropout=0.0).model
  _, catalogue, apply, params = build(form)
  for expert in ('visual_expert', 'semantic_expert'):
    assert params[expert].keys() == {'metric', 'sharpness', 'value'}
  with_content = dataclasses.replace(form, item_embedding='content_plus_id')
  catalogue = catalogue._replace(content=jnp.ones((V, form.hidden_dim)))
  model = feddmmr.FedDMMR(with_content, V, tuple(experts.of(with_content)))
  params = model.init(jax.random.key(0), catalogue, method='initialise')
  assert 'value' not in params['params']['visual_expert']


def test_similarity_needs_the_candidates_feature():
  model, catalogue, apply, _ = build(
    small.config(expert_form='similarity', dropout=0.0).model
  )
  # 3 has no image, 5 no text.
  got = seen(model, catalogue, apply, jnp.array([1, 3, 5]))
  np.testing.assert_array_equal(
    got.available, [[True, True], [False, True], [True, False]]
  )
  assert np.isfinite(got.auxiliary).all()
