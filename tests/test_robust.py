"""Robust aggregators: numbers worked out by hand, and what they promise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax import parts
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.client.update import ClientUpdate
from fedmmr_jax.client.vocabulary import ITEM_TABLE, Vocabulary
from fedmmr_jax.evaluation import ablation
from fedmmr_jax.federation import robust
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.federation.aggregators import Aggregator, FedAvg
from tests import small

ROWS = 6


def updates(dense, rows=None, weight=None) -> ClientUpdate:
  """Updates of C clients: `dense` [C, n] outside the item table, `rows` a dict
  of item -> value (of one dimension) for each client."""
  dense = np.asarray(dense, np.float32)
  rows = rows or [{}] * len(dense)
  most = 2 + max(map(len, rows))  # one id twice
  ids = np.array([sorted([0] * (most - len(r)) + list(r)) for r in rows])
  table = np.array(
    [[r.get(int(i), 0) for i in own] for r, own in zip(rows, ids)], np.float32
  )
  weight = np.ones(len(dense)) if weight is None else np.asarray(weight)
  return ClientUpdate(
    delta={'w': jnp.asarray(dense), ITEM_TABLE: jnp.asarray(table[..., None])},
    control=None,
    vocabulary=Vocabulary(jnp.asarray(ids, jnp.int32)),
    weight=jnp.asarray(weight, jnp.float32),
    steps=jnp.ones(len(dense)),
    memory=None,
    kept=None,
    prototypes=None,
    metrics={},
    counts=jnp.ones(len(dense), bool),
  )


def delta_of(text: str, sent: ClientUpdate) -> dict[str, np.ndarray]:
  """What the server makes of updates: {'w': [n], ITEM_TABLE: [V]}."""
  aggregator = parts.built(text, robust.ROBUST, Aggregator, 'aggregator')
  params = {
    'w': jnp.zeros(sent.delta['w'].shape[1:]),
    ITEM_TABLE: jnp.zeros((ROWS, 1)),
  }

  def combine(sent, params):
    total = aggregator.add(aggregator.zero(params), sent)
    return aggregator.finish(total, aggregator.collect(sent), None, params)[0]

  found = jax.jit(combine)(sent, params)
  return {name: np.asarray(x).reshape(-1) for name, x in found.items()}


ONE_OFF = [[0, 0], [1, 2], [2, 4], [3, 6], [100, -100]]


@pytest.mark.parametrize(
  'text, expected',
  [
    ('median', [2, 2]),
    ('trimmed_mean,share=0.2', [2, 2]),
    ('trimmed_mean,share=0', [106 / 5, -88 / 5]),
    # Four neighbours; of five clients Krum adds 5 - 1 - 2 = 2 distances:
    # 5 + 20, 5 + 5, 5 + 5, 5 + 20 of the first four.
    ('krum,attackers=1', [1, 2]),
    ('multi_krum,attackers=1,chosen=2', [1.5, 3]),
    # Norms 0, √5, 2√5, 3√5 and 100√2: the median is 2√5.
    (
      'median_norm',
      [(1 + 2 + 2 + 20**0.5 / 2**0.5) / 5, (2 + 4 + 4 - 10**0.5) / 5],
    ),
    ('norm_bound,norm=1e3', [106 / 5, -88 / 5]),
    (
      'norm_bound,norm=1e-3',
      [(3 / 5**0.5 + 0.5**0.5) / 5 * 1e-3, (6 / 5**0.5 - 0.5**0.5) / 5 * 1e-3],
    ),
  ],
)
def test_a_statistic_of_five_clients(text, expected):
  np.testing.assert_allclose(
    delta_of(text, updates(ONE_OFF))['w'], expected, rtol=2e-5
  )


def test_the_geometric_median_of_three_points():
  """Of the corners of a triangle without an angle of 120° it sees each pair of
  corners under 120° (Fermat's point); here (0, 1 / √3)."""
  corners = [[-1, 0], [1, 0], [0, 10]]
  found = delta_of('geometric_median,iterations=100', updates(corners))
  np.testing.assert_allclose(found['w'], [0, 3**-0.5], atol=1e-4)
  # The first corner counts as two, and more than half is the median.
  found = delta_of(
    'geometric_median,iterations=200,weighted=true',
    updates(corners, weight=[5, 1, 1]),
  )
  np.testing.assert_allclose(found['w'], [-1, 0], atol=1e-3)


def test_an_item_row_has_a_statistic_of_its_own():
  rows = [{1: 1.0, 2: 4.0}, {1: 2.0}, {1: 9.0, 5: 3.0}, {2: 6.0}]
  sent = updates(np.zeros((4, 1)), rows)
  # Times the share of the cohort that touched a row.
  expected = [0, 2 * 3 / 4, 5 * 2 / 4, 0, 0, 3 / 4]
  np.testing.assert_allclose(delta_of('median', sent)[ITEM_TABLE], expected)
  # Over all four: of 0, 1, 2, 9 and of 0, 0, 4, 6.
  np.testing.assert_allclose(
    delta_of('median,rows=all', sent)[ITEM_TABLE], [0, 1.5, 2, 0, 0, 0]
  )
  np.testing.assert_allclose(
    delta_of('median,quorum=3', sent)[ITEM_TABLE], [0, 1.5, 0, 0, 0, 0]
  )
  # A share of three is rounded up to one of them, of two to none.
  np.testing.assert_allclose(
    delta_of('trimmed_mean,share=0.1', sent)[ITEM_TABLE], expected
  )
  # Squared distances of the first: 17, 89 and 5, the smallest sum of two.
  chosen = delta_of('krum,attackers=0', sent)[ITEM_TABLE]
  np.testing.assert_allclose(chosen, [0, 1, 4, 0, 0, 0])


EVERY = [
  'norm_bound,norm=3',
  'norm_bound,norm=3,weighted=true',
  'median_norm',
  'median',
  'median,rows=all',
  'trimmed_mean,share=0.2',
  'krum,attackers=1',
  'multi_krum,attackers=1,chosen=3,weighted=true',
  'geometric_median,weighted=true',
]


def random_updates(rng, clients=7) -> ClientUpdate:
  rows = [
    {int(i): rng.normal() for i in rng.choice(5, 3, replace=False) + 1}
    for _ in range(clients)
  ]
  return updates(
    rng.normal(size=(clients, 4)), rows, rng.integers(1, 9, clients)
  )


@pytest.mark.parametrize('text', EVERY)
def test_who_counts_nowhere_changes_nothing(text):
  """Padding clients, clients without positives, rejected and broken updates;
  nor does the order of the clients."""
  rng = np.random.default_rng(0)
  sent = random_updates(rng)
  strange = random_updates(rng, 4)
  bad = np.asarray(strange.delta['w']).copy()
  bad[2, 1], bad[3, 0] = np.nan, np.inf
  strange = strange._replace(
    delta=strange.delta | {'w': jnp.asarray(bad)},
    weight=jnp.asarray([0.0, 0.0, 3.0, 3.0]),
  )
  both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), sent, strange)
  order = rng.permutation(11)
  both = jax.tree.map(lambda x: x[order], both)
  small.assert_trees_close(delta_of(text, both), delta_of(text, sent))
  nobody = sent._replace(weight=jnp.zeros(7))
  small.assert_trees_equal(
    delta_of(text, nobody), {'w': np.zeros(4), ITEM_TABLE: np.zeros(ROWS)}
  )


@pytest.mark.parametrize('text', EVERY)
def test_what_one_client_can_do_is_bounded(text):
  """However long its update is, even where its square is infinite."""
  sent = random_updates(np.random.default_rng(1))

  def with_last(scale):
    return delta_of(
      text,
      sent._replace(
        delta=jax.tree.map(lambda x: x.at[-1].multiply(scale), sent.delta)
      ),
    )

  for scale in (1e3, 1e30):
    assert np.abs(np.concatenate(list(with_last(scale).values()))).max() < 4


@pytest.mark.parametrize('text', EVERY)
def test_equal_clients_are_left_alone(text):
  one = random_updates(np.random.default_rng(2), 1)
  sent = jax.tree.map(lambda x: jnp.concatenate([x] * 6), one)
  found = delta_of(text, sent)
  expected = delta_of('norm_bound,norm=1e9', one)
  if text.startswith('norm_bound'):
    expected = delta_of(text, one)
  small.assert_trees_close(found, expected)


def test_krum_rests_where_too_few_answer():
  sent = random_updates(np.random.default_rng(3))
  few = sent._replace(weight=sent.weight.at[4:].set(0))  # 4 of 7
  found = delta_of('krum,attackers=1', few)
  small.assert_trees_equal(
    found, {'w': np.zeros(4), ITEM_TABLE: np.zeros(ROWS)}
  )


def run(rounds=2, **changes):
  simulation = small.simulation(
    **small.PLAIN,
    client_fraction=1.0,
    client_optimizer='sgd',
    vocabulary='local',
    **changes,
  )
  state, compiled = simulation.init_state(), []
  for number in range(1, rounds + 1):
    cohort = simulation.sample_cohort(number)
    state, _ = simulation.run_round(state, number, cohort)
    compiled.append(small.compiled_rounds())
  return state.server.params, compiled


@pytest.mark.parametrize(
  'text',
  [
    'trimmed_mean,share=0.2',
    pytest.param('median_norm', marks=pytest.mark.slow),
    pytest.param('multi_krum,attackers=2,chosen=4', marks=pytest.mark.slow),
    pytest.param('norm_bound,norm=0.01', marks=pytest.mark.slow),
  ],
)
def test_shards_change_rounding_only(text, monkeypatch):
  params, compiled = run(aggregator=text)
  assert compiled[0] == compiled[1]
  monkeypatch.setattr('fedmmr_jax.federation.devices.CPU_SHARDS', 2)
  small.assert_trees_close(run(aggregator=text)[0], params, atol=1e-5)


@pytest.mark.slow
def test_seeds_side_by_side_are_those_one_by_one():
  simulation = small.simulation(
    **small.PLAIN, aggregator='geometric_median', client_optimizer='sgd'
  )
  both = [simulation, simulation.with_seed(1)]
  states = jax.tree.map(
    lambda *x: jnp.stack(x), *[s.init_state() for s in both]
  )
  states, _ = ablation.run_round(both, states, 1)
  for i, one in enumerate(both):
    alone, _ = one.run_round(one.init_state(), 1, one.sample_cohort(1))
    small.assert_trees_close(
      jax.tree.map(lambda x: x[i], states.server.params),
      alone.server.params,
      atol=1e-5,
    )


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      dict(aggregator='krum,attackers=1'),
      'Krum with attackers=1 needs more than 2 · 1 + 2 clients; 4 clients',
    ),
    (
      dict(aggregator='multi_krum,attackers=0,chosen=5'),
      'multi_krum,chosen=5 uses updates',
    ),
    (
      dict(aggregator='trimmed_mean,share=0.5'),
      'trimmed_mean,share=0.5 cuts off all clients, 2 at each end',
    ),
    (dict(aggregator='trimmed_mean,share=0.6'), 'above its maximum 0.5'),
    (dict(aggregator='norm_bound,norm=0'), 'norm=0.0 is below its minimum'),
    (dict(aggregator='norm_bound'), 'the option norm is missing'),
    (dict(aggregator='krum'), 'the option attackers is missing'),
    (dict(aggregator='median,rows=some'), 'choose from touched, all'),
    (
      dict(
        aggregator='median', drift_control='scaffold', client_optimizer='sgd'
      ),
      'Median cannot protect the means that `drift_control` uploads',
    ),
  ],
)
def test_a_broken_assumption_is_refused(changes, message):
  config = small.config(**changes)
  assert message in small.error_of(
    simulation_lib.build, config, small.dataset()
  )


def test_what_is_collected_is_bounded(monkeypatch):
  simulation = small.simulation(
    aggregator='median', vocabulary='local', num_negatives=1, num_rounds=1
  )
  state, data = simulation.abstract_state, simulation.data
  found = round_lib.collected_bytes(simulation.program, state, data, 4)
  dense = sum(
    x.size
    for name, part in state.server.params.items()
    for x in jax.tree.leaves(part)
    if name != ITEM_TABLE
  )
  # One of history's 30 items, padding, and a negative of each of 4 targets of
  # each of 8 steps, D numbers and an id; and the weight.
  rows = 1 + 30 + 32
  rows = min(rows, simulation.model.num_rows)
  assert found == 4 * 4 * (dense + rows * 17 + 1)
  plain = dataclasses.replace(simulation, aggregator=FedAvg())
  assert round_lib.collected_bytes(plain.program, state, data, 4) == 0
  monkeypatch.setattr(round_lib, 'MOST_STATE_BYTES', found - 1)
  message = small.error_of(
    round_lib.check_collected, simulation.program, state, data, 4
  )
  assert f'{found:,} in all' in message and '`aggregator=norm_bound`' in message
