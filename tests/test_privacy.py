"""Differential privacy of clients: clipping, noise, accounting, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax.client.update import ClientUpdate
from fedmmr_jax.client.vocabulary import Vocabulary
from fedmmr_jax.federation import accounting, cohorts, devices, privacy
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.federation import transforms as transforms_lib
from fedmmr_jax.federation.accounting import Schedule
from fedmmr_jax.federation.privacy import ClipUpdates, PrivateMean
from fedmmr_jax.federation.transforms import Sender
from tests import small

pytest.importorskip(
  'jax_privacy', reason="pip install 'fedmmr_jax[privacy]' runs these"
)

ALONE = {'select_by': 'last', 'patience': 0}
PARAMS = {'item_embedding': jnp.zeros((6, 2)), 'backbone': {'w': jnp.zeros(3)}}


def config(**changes):
  return small.config(**ALONE, **changes)


def updates_of(scales, weights=None) -> ClientUpdate:
  """Updates [C, …] with four rows of the item table, one of them twice."""
  rng = np.random.default_rng(1)
  count = len(scales)
  scale = jnp.asarray(scales, jnp.float32)
  table = jnp.asarray(rng.normal(size=(count, 4, 2)), jnp.float32)
  ids = jnp.tile(jnp.array([0, 2, 2, 5]), (count, 1))
  return ClientUpdate(
    delta={
      'item_embedding': table * scale[:, None, None],
      'backbone': {
        'w': jnp.asarray(rng.normal(size=(count, 3)), jnp.float32)
        * scale[:, None]
      },
    },
    control=None,
    vocabulary=Vocabulary(ids),
    weight=jnp.full(count, 7.0) if weights is None else jnp.asarray(weights),
    steps=jnp.ones(count),
    memory=None,
    kept=None,
    prototypes=None,
    metrics={},
    counts=jnp.ones(count, bool),
  )


def clipped(clip: ClipUpdates, updates: ClientUpdate) -> ClientUpdate:
  told = clip.server_state(PARAMS)

  def one(update, client):
    sender = Sender(client, jax.random.key(0), PARAMS, told)
    return clip.apply(update, None, sender)[0]

  count = updates.weight.shape[0]
  return jax.vmap(one)(updates, jnp.arange(count))


def released(clip: ClipUpdates, updates: ClientUpdate, cohort: float = 1.0):
  """The sum over a cohort without noise."""
  mean = PrivateMean(cohort, 0.0, (1.0,), 1)
  total = mean.add(mean.zero(PARAMS), clipped(clip, updates))
  delta, _ = mean.finish(total, None, None, PARAMS)
  return clip.released(delta, clip.server_state(PARAMS))


def norm(tree) -> float:
  return float(
    np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in jax.tree.leaves(tree)))
  )


@pytest.mark.parametrize(
  'norms, bound',
  [
    ((('', 0.5),), 0.5),
    ((('embeddings', 0.3), ('', 0.4)), 0.5),  # 0.3² + 0.4² = 0.5²
  ],
)
def test_a_client_moves_the_sum_by_its_clip_norm_at_most(norms, bound):
  clip = ClipUpdates(norms, 3.0)
  scales = np.array([0.01, 3.0, 1e6])
  everybody = released(clip, updates_of(scales))
  for absent in range(3):
    without = released(
      clip, updates_of(scales, np.where(np.arange(3) == absent, 0.0, 7.0))
    )
    moved = norm(jax.tree.map(jnp.subtract, everybody, without))
    # 1e-6: the rounding of a sum of three.
    assert moved <= bound * (1 + 1e-6)
    assert moved > 0.99 * bound or absent == 0
  one = clipped(clip, updates_of(scales)).delta
  for client in range(3):
    assert norm(jax.tree.map(lambda x: x[client], one)) <= 1.0  # no rounding


def test_repeated_rows_and_the_padding_item_count_nowhere():
  clip = ClipUpdates((('', 1e9),), 1.0)
  updates = updates_of([1.0])
  table = np.asarray(updates.delta['item_embedding'])[0]
  got = np.asarray(released(clip, updates)['item_embedding'])
  np.testing.assert_allclose(got[[2, 5]], table[[1, 3]], rtol=1e-5)
  assert not got[[0, 1, 3, 4]].any()
  tight = ClipUpdates((('', 1.0),), 1.0)
  assert norm(released(tight, updates)) == pytest.approx(1.0, rel=1e-5)


def test_clients_count_alike_and_padding_counts_nothing():
  clip = ClipUpdates((('', 0.5),), 4.0)
  few = released(clip, updates_of([1.0, 1.0], [1.0, 0.0]), cohort=4.0)
  many = released(clip, updates_of([1.0, 1.0], [90.0, 0.0]), cohort=4.0)
  small.assert_trees_equal(few, many)
  # One client of an expected four: a quarter of its update.
  assert norm(few) == pytest.approx(0.5 / 4, rel=1e-5)


def test_an_update_of_nan_counts_as_nothing():
  clip = ClipUpdates((('', 0.5),), 1.0)
  assert norm(released(clip, updates_of([np.nan]))) == 0.0


def test_noise_has_its_deviation_and_spares_what_is_frozen():
  params = {
    'item_embedding': jnp.zeros((400, 50)),
    'router': {'w': jnp.zeros(100)},
  }
  mean = PrivateMean(4.0, 2.0, (1.0,), 10, ('router',))
  state = mean.init(params, jax.random.key(3))
  first, state = mean.finish(mean.zero(params), None, state, params)
  second, _ = mean.finish(mean.zero(params), None, state, params)
  table = np.asarray(first['item_embedding'])
  assert not table[0].any()  # the padding item
  assert np.std(table[1:]) == pytest.approx(2.0 / 4.0, rel=0.03)
  assert not np.asarray(first['router']['w']).any()
  other = np.asarray(second['item_embedding'])
  assert abs(np.corrcoef(table[1:].ravel(), other[1:].ravel())[0, 1]) < 0.03


def test_banded_noise_is_taken_back():
  """Its sum over the rounds grows more slowly than that of independent noise,
  and it is that of the matrix: B = C⁻¹ has the covariance B Bᵀ."""
  params = {'backbone': {'w': jnp.zeros(20_000)}}
  coefficients = privacy.Banded(bands=3).coefficients(6, 3)
  mean = PrivateMean(1.0, 1.0, coefficients, 6)
  state = mean.init(params, jax.random.key(0))
  draws = []
  for _ in range(6):
    delta, state = mean.finish(mean.zero(params), None, state, params)
    draws.append(np.asarray(delta['backbone']['w']))
  matrix = np.zeros((6, 6))
  for row in range(6):
    for band in range(min(3, row + 1)):
      matrix[row, row - band] = coefficients[band]
  matrix /= np.linalg.norm(matrix, axis=0)
  inverse = np.linalg.inv(matrix)
  np.testing.assert_allclose(np.cov(draws), inverse @ inverse.T, atol=0.06)
  assert np.var(np.sum(draws, axis=0)) < 6


def test_the_clip_norm_goes_to_the_quantile():
  """Four of four unclipped, with a target of one half: the norm shrinks by
  exp(−0.2 · (1 − 0.5))."""
  clip = ClipUpdates((('', 1e9),), 4.0, 0.5, 0.2)
  updates = clipped(clip, updates_of([1.0] * 4))
  total = metrics_lib.Mean(
    jnp.sum(updates.metrics[privacy.UNCLIPPED].total, axis=0), jnp.ones(())
  )
  state = clip.server_step(
    clip.server_state(PARAMS), {privacy.UNCLIPPED: total}, jax.random.key(0)
  )
  np.testing.assert_allclose(state, 1e9 * np.exp(-0.1), rtol=1e-5)


# ε at δ = 6040^-1.1 of 6,040 clients, 604 a round (poisson: in the mean).
DELTA = 6040**-1.1


def test_epsilon_is_that_of_dp_accounting():
  dp = pytest.importorskip('dp_accounting')
  schedule = Schedule('poisson', 6040, 604, 1)
  accountant = dp.pld.PLDAccountant()
  accountant.compose(
    dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(1.0)), 100
  )
  expected = accountant.get_epsilon(DELTA)
  got = accounting.epsilon(schedule, 1.0, 100, DELTA)
  assert got == pytest.approx(expected, rel=1e-3)
  assert got == pytest.approx(6.1436, rel=1e-3)


# Printed by pfl 0.6.0 with dp-accounting 0.5, in an environment of its own:
# from pfl.privacy.privacy_accountant import PLDPrivacyAccountant
# for noise, share, rounds in ((1, 0.1, 100), (0.8, 0.05, 300), (3, 0.5, 40)):
#   print(PLDPrivacyAccountant(num_compositions=rounds,
#     sampling_probability=share, mechanism='gaussian', delta=6040**-1.1,
#     noise_parameter=noise).epsilon)
OF_PFL = [
  (1.0, 0.1, 100, 6.143565),
  (0.8, 0.05, 300, 8.153029),
  (3.0, 0.5, 40, 4.405354),
]


@pytest.mark.parametrize('noise, share, rounds, expected', OF_PFL)
def test_epsilon_is_that_of_pfl_research(noise, share, rounds, expected):
  schedule = Schedule('poisson', 6040, 6040 * share, 1)
  got = accounting.epsilon(schedule, noise, rounds, DELTA)
  assert got == pytest.approx(expected, rel=0.01)


def test_epsilon_without_luck():
  """Everybody in every round, or each in its turn: a Gaussian's ε, whose δ is
  Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) (Dong et al. 2022), μ = √turns / z."""
  from scipy.stats import norm as normal

  cases = [
    (Schedule('fixed', 1000, 1000, 1), 50**0.5),
    (Schedule('cyclic', 1000, 100, 10), 5**0.5),  # ⌈50/10⌉ turns
  ]
  for schedule, turns in cases:
    epsilon = accounting.epsilon(schedule, 4.0, 50, 1e-4)
    mu = turns / 4.0
    delta = normal.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * normal.cdf(
      -mu / 2 - epsilon / mu
    )
    assert delta == pytest.approx(1e-4, rel=0.02)


def test_fixed_cohorts_cost_more_than_poisson_ones():
  fixed = accounting.epsilon(Schedule('fixed', 6040, 604, 1), 3.0, 100, DELTA)
  poisson = accounting.epsilon(
    Schedule('poisson', 6040, 604, 1), 3.0, 100, DELTA
  )
  everybody = accounting.epsilon(
    Schedule('fixed', 6040, 6040, 1), 3.0, 100, DELTA
  )
  assert poisson < fixed < everybody


def test_calibrated_noise_is_that_of_pfl_research():
  """As above, with epsilon=8, noise_parameter=None, 0.2 and 40 rounds."""
  schedule = Schedule('poisson', 6040, 1208, 1)
  noise = accounting.noise_for(schedule, 8.0, 40, DELTA)
  assert noise == pytest.approx(0.996304, rel=0.01)


def test_calibrated_noise_keeps_to_epsilon():
  schedule = Schedule('poisson', 6040, 604, 1)
  noise = accounting.noise_for(schedule, 8.0, 100, DELTA)
  assert 7.98 < accounting.epsilon(schedule, noise, 100, DELTA) <= 8.0


@pytest.mark.parametrize(
  'sampling, apart', [('poisson', 1), ('fixed', 2), ('cyclic', 1)]
)
def test_the_sketch_has_its_part_of_epsilon(sampling, apart):
  import dp_accounting
  from dp_accounting import pld

  schedule = Schedule(sampling, 1000, 100, 10, asked_before=(2.0, 5.0))
  accountant = pld.PLDAccountant(
    dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    if sampling == 'poisson'
    else dp_accounting.NeighboringRelation.REPLACE_SPECIAL
  )
  for noise in (2.0, 5.0):
    accountant.compose(dp_accounting.GaussianDpEvent(noise / apart))
  before = accountant.get_epsilon(1e-4)
  np.testing.assert_allclose(
    accounting.epsilon(schedule, 1.0, 0, 1e-4), before, rtol=0.01
  )
  accountant.compose(accounting.event(schedule, 1.0, 5))
  np.testing.assert_allclose(
    accounting.epsilon(schedule, 1.0, 5, 1e-4),
    accountant.get_epsilon(1e-4),
    rtol=0.01,
  )
  noise = accounting.noise_for(schedule, 2 * before, 5, 1e-4)
  spent = accounting.epsilon(schedule, noise, 5, 1e-4)
  assert 1.9 * before < spent <= 2 * before
  alone = schedule._replace(asked_before=())
  assert noise > accounting.noise_for(alone, 2 * before, 5, 1e-4)


def test_a_noisy_sketch_is_content_and_part_of_the_plan():
  noisy, plain = (
    small.simulation(
      **ALONE,
      privacy=f'gaussian,noise_multiplier=1,sketch_noise={noise}'
      if noise
      else 'none',
      item_embedding='content_plus_id,collaborative_dim=4,'
      'collaborative_items=30,collaborative_columns=24',
    )
    for noise in (0.1, 0)
  )
  assert noisy.privacy.sketch_noise == 0.1
  assert noisy.privacy.schedule.asked_before == (
    0.1,
    0.1 * privacy.COUNTS_NOISE,
  )
  assert noisy.privacy.epsilon(0) > 1
  assert noisy.catalogue.content.shape == plain.catalogue.content.shape
  assert noisy.catalogue.content[1:, -4:].any()


@pytest.mark.parametrize(
  'population, rounds, noise',
  # 50 of 100 clients a cohort, 500 of the others.
  [(0, 1, 0.2), (0, 2, 0.2), (500, 2, 0.4), (500, 1, 0.2), (4000, 9, 0.05)],
)
def test_noise_on_the_sketch_is_scaled_by_who_is_asked(
  population, rounds, noise
):
  plan = privacy.of(
    config(
      privacy='gaussian,noise_multiplier=2,sketch_noise=2,cohort=500,'
      f'population={population}',
      item_embedding='content_plus_id,collaborative_dim=4,'
      f'collaborative_rounds={rounds}',
    ),
    100,
  )
  assert plan.sketch_noise == pytest.approx(noise)


def test_an_assumed_cohort_scales_the_noise():
  real = privacy.of(config(privacy='gaussian,noise_multiplier=2'), 100)
  large = privacy.of(
    config(privacy='gaussian,noise_multiplier=2,cohort=500'), 100
  )
  assert real.aggregator().stddev == 2.0
  assert large.aggregator().stddev == pytest.approx(0.2)  # 50 of 500
  assert large.aggregator().cohort == 50
  assert large.schedule.population == 1000 and large.is_assumed
  assert large.delta == pytest.approx(1000**-1.1)


def test_the_count_has_a_share_of_the_budget():
  """1/z² = 1/z_Δ² + 1/(2 σ_b)², Andrew et al. 2021, Theorem 1."""
  plan = privacy.of(
    config(privacy='gaussian,noise_multiplier=1,quantile=0.5'), 100
  )
  assert plan.count_noise == 2.5  # a twentieth of 50
  update = plan.aggregator().stddev
  assert update**-2 + (2 * 2.5) ** -2 == pytest.approx(1.0)


def test_cohorts_are_drawn_as_asked():
  num_train = np.arange(1, 41)
  drawn = {
    sampling: [
      round_lib.sample_cohort(
        config(sampling=sampling, client_fraction=0.25), number, num_train
      )
      for number in range(1, 9)
    ]
    for sampling in ('fixed', 'poisson', 'cyclic')
  }
  sizes = {
    sampling: [int((x >= 0).sum()) for x in found]
    for sampling, found in drawn.items()
  }
  assert sizes['fixed'] == [10] * 8 and sizes['cyclic'] == [10] * 8
  assert len(set(sizes['poisson'])) > 1
  for found in drawn.values():
    assert len({x.shape for x in found}) == 1  # nothing to compile again
  turns = [set(x[x >= 0].tolist()) for x in drawn['cyclic']]
  assert set.union(*turns[:4]) == set(range(40))
  assert turns[:4] == turns[4:]


def test_poisson_cohorts_have_the_mean_of_their_coins():
  settings = config(sampling='poisson', client_fraction=0.3)
  sizes = [
    len(cohorts.draw(settings, number, np.arange(50)))
    for number in range(1, 401)
  ]
  assert np.mean(sizes) == pytest.approx(15, abs=0.5)
  assert np.var(sizes) == pytest.approx(50 * 0.3 * 0.7, rel=0.2)


REFUSED = [
  (dict(privacy='laplace'), 'there is no privacy'),
  (dict(privacy='gaussian'), '`target_epsilon` above 0'),
  (
    dict(privacy='gaussian,noise_multiplier=1', target_epsilon=2),
    'both say how much noise',
  ),
  (dict(privacy='gaussian,noise_multiplier=1', delta='0.1'), '1/K = 0.01'),
  (dict(privacy='gaussian,noise_multiplier=1', delta='x'), 'neither a number'),
  (dict(target_epsilon=2), 'needs `privacy=gaussian`'),
  (dict(privacy='clip', target_epsilon=2), 'has none'),
  (
    dict(
      privacy='gaussian', target_epsilon=1e-3, delta='1e-9', num_rounds=10**6
    ),
    'cannot be reached in 1000000 rounds',
  ),
  (dict(privacy='banded,noise_multiplier=1'), 'needs `sampling=cyclic`'),
  (
    dict(
      privacy='banded,noise_multiplier=1,bands=3',
      sampling='cyclic',
      client_fraction=0.5,
    ),
    'bands=3 is more than the 2 rounds',
  ),
  (
    dict(privacy='gaussian,noise_multiplier=1', select_by='full/NDCG@10'),
    'say `select_by=last`',
  ),
  (dict(privacy='gaussian,noise_multiplier=1', patience=3), '`patience=0`'),
  (
    dict(privacy='gaussian,noise_multiplier=1', aggregator='fednova'),
    'say `aggregator=fedavg`',
  ),
  (
    dict(privacy='gaussian,noise_multiplier=1', global_memory='prototypes'),
    'say `global_memory=none`',
  ),
  (
    dict(
      privacy='gaussian,noise_multiplier=1',
      item_embedding='content_plus_id,shrinkage=0.1',
    ),
    'shrinkage counts who consumed what',
  ),
  (
    dict(
      privacy='gaussian,noise_multiplier=1',
      item_embedding='content_plus_id,collaborative_dim=8',
    ),
    'the sketch',
  ),
  (
    dict(privacy='gaussian,noise_multiplier=1', pretrained_path='runs/x'),
    'public_start=true',
  ),
  (
    dict(privacy='gaussian,noise_multiplier=1,groups=embeddings'),
    'is not group:norm',
  ),
  (
    dict(privacy='gaussian,noise_multiplier=30,quantile=0.5'),
    'too small for a quantile',
  ),
]


@pytest.mark.parametrize('changes, why', REFUSED)
def test_bad_input_is_refused(changes, why):
  asked = small.config(**{**ALONE, **changes})
  assert why in small.error_of(privacy.of, asked, 100)


def test_epsilon_below_0_is_refused():
  assert '`target_epsilon=-1.0`' in small.error_of(config, target_epsilon=-1.0)


def test_a_missing_extra_is_named(monkeypatch):
  monkeypatch.setattr('importlib.import_module', _fail)
  assert 'fedmmr_jax[privacy]' in small.error_of(
    privacy.of, config(privacy='gaussian,noise_multiplier=1'), 100
  )


def _fail(name):
  raise ImportError(name)


def test_uploads_besides_the_update_are_refused():
  settings = config(
    privacy='gaussian,noise_multiplier=1',
    drift_control='scaffold',
    client_optimizer='sgd',
  )
  from fedmmr_jax import simulation as simulation_lib

  assert 'drift_control=scaffold' in small.error_of(
    simulation_lib.build, settings, small.dataset()
  )


def test_private_rounds_resume_and_compile_once():
  """Noise is there though nobody trains it away: rounds 2 and 3 after round 1
  are those of a run that goes on, bit for bit; what a client sent is in no
  metric."""
  simulation = small.simulation(
    **ALONE,
    privacy='gaussian,clip_norm=0.5,noise_multiplier=0.3,quantile=0.5',
    sampling='poisson',
    client_fraction=0.7,
    freeze='backbone',
    num_rounds=3,
    **small.PLAIN,
  )
  start = jax.device_get(simulation.init_state())
  states, compiled = [], []
  for done in simulation.rounds(count=3):
    assert set(done.metrics.values()) == {None}
    states.append(jax.device_get(done.state))
    compiled.append(small.compiled_rounds())
  assert len(set(compiled)) == 1
  resumed = devices.copied(states[0])
  *_, last = simulation.rounds(resumed, first=2, count=2)
  small.assert_trees_equal(last.state, states[2])
  before, after = (s.server.params for s in (start, states[2]))
  small.assert_trees_equal(before['backbone'], after['backbone'])
  moved = np.asarray(after['item_embedding']) != before['item_embedding']
  assert moved[1:].all() and not moved[0].any()
  norms = [float(s.server.transforms[-1][0]) for s in states]
  assert len(set(norms)) == 3  # it adapts


def test_transforms_hide_what_they_must():
  one = metrics_lib.Mean(jnp.ones(()), jnp.ones(()))
  counted = {'loss': one, metrics_lib.ANSWERED: one}
  clip = ClipUpdates((('', 1.0),), 1.0)
  assert transforms_lib.shown((), counted) == counted
  assert metrics_lib.finish(transforms_lib.shown((clip,), counted)) == {
    'loss': None
  }


def test_a_real_client_moves_a_round_by_the_clip_norm_at_most():
  """The same noise with and without a client, and with another in its place; an
  empty cohort gets noise too, for that nobody came is a secret like any
  other."""
  simulation = small.simulation(
    **ALONE,
    **small.PLAIN,
    privacy='gaussian,clip_norm=0.01,noise_multiplier=1',
    client_fraction=0.7,
  )
  start = jax.device_get(simulation.init_state())
  cohort = simulation.sample_cohort(1)
  at = tuple(np.argwhere(cohort >= 0)[0])
  outside = np.setdiff1d(np.arange(9), cohort)[0]

  def after(members):
    state, _ = simulation.run_round(devices.copied(start), 1, members)
    return jax.device_get(state.server.params)

  def changed(client):
    members = cohort.copy()
    members[at] = client
    return after(members)

  def moved(one, other):
    return 6 * norm(jax.tree.map(np.subtract, one, other))  # 0.7 · 9 clients

  everybody = after(cohort)
  # The float32 of parameters of about 1 is seen at this scale.
  assert 0.0099 < moved(everybody, changed(-1)) <= 0.01001
  assert 0.0099 < moved(everybody, changed(outside)) <= 0.02002
  nobody = after(np.full_like(cohort, -1))
  table = nobody['item_embedding'] - start.server.params['item_embedding']
  assert np.std(table[1:]) == pytest.approx(0.01 / 6, rel=0.1)


def test_noise_of_several_seeds_is_that_of_each():
  params = {'backbone': {'w': jnp.zeros(50)}}
  mean = PrivateMean(4.0, 2.0, privacy.Banded(bands=2).coefficients(4, 2), 4)
  states = [mean.init(params, jax.random.key(seed)) for seed in (1, 2)]

  def finish(state):
    return mean.finish(mean.zero(params), None, state, params)

  together = jax.vmap(finish)(jax.tree.map(lambda *x: jnp.stack(x), *states))
  for number, state in enumerate(states):
    small.assert_trees_close(
      jax.tree.map(lambda x: x[number], together), finish(state)
    )


@pytest.mark.parametrize(
  'changes, counts',
  [
    ({}, False),
    (dict(privacy='gaussian,noise_multiplier=1'), False),
    (dict(privacy='gaussian', target_epsilon=8), True),
    (dict(privacy='banded,noise_multiplier=1'), True),
  ],
)
def test_a_run_whose_noise_depends_on_its_length_keeps_it(changes, counts):
  assert config(**changes).length_counts == counts


@pytest.mark.slow
def test_an_audit_hears_missing_noise():
  """48 canaries in the noise of ε < 1 are no surer than a guess; without the
  noise that the accountant believes in, they show more than it allows."""
  from fedmmr_jax import simulation as simulation_lib
  from fedmmr_jax.evaluation import privacy_audit

  simulation = privacy_audit.prepared(
    simulation_lib.build(
      config(
        privacy='gaussian',
        target_epsilon=0.5,
        sampling='poisson',
        client_fraction=0.5,
        num_rounds=6,
        delta='1e-5',
        experts='none',
        memory='none',
      ),
      small.dataset(96),
    )
  )
  heard = privacy_audit.attack(simulation, 48, 6)
  assert heard.upper <= 0.5 and privacy_audit.check(heard).passed
  silent = dataclasses.replace(
    simulation,
    aggregator=dataclasses.replace(simulation.aggregator, stddev=0.0),
  )
  heard = privacy_audit.attack(silent, 48, 6)
  assert heard.area > 0.8
  assert not privacy_audit.check(heard).passed
