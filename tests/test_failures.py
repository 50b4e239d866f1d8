"""Clients that fail or are not there, over-selection, skipped rounds."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import console
from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.client import update as client_lib
from fedmmr_jax.client import windows
from fedmmr_jax.data.dataset import client_view
from fedmmr_jax.evaluation import ablation
from fedmmr_jax.federation import availability, cohorts, failures
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.federation.availability import Day, Trace
from fedmmr_jax.federation.failures import Failures, Fate, Fates, Random
from fedmmr_jax.runs import report
from tests import small

COHORT = np.array([[0, 1], [2, 3], [4, -1]], np.int32)


@dataclasses.dataclass(frozen=True)
class Given(Failures):
  """Fates by hand."""

  found: tuple = ()

  def fates(self, seed, round_number, num_clients):
    return self.found[0]


def given(outcome, delay=None, work=None, factor=None):
  n = len(outcome)
  ones = np.ones(n, np.float32)
  return Given(
    (
      Fates(
        np.array(outcome),
        np.arange(n, dtype=float) if delay is None else np.array(delay),
        Fate(
          ones if work is None else np.array(work, np.float32),
          ones if factor is None else np.array(factor, np.float32),
        ),
      ),
    )
  )


def test_shares_of_the_clients_fail_each_in_one_way():
  part = Random(0.3, 0.1, 0.05, 0.2, 0.1, work=0.25, corruption='any')
  found = part.fates(3, 7, 40_000)
  work, factor = found.fate
  broken = factor != 1
  for clients, share in (
    (found.outcome == failures.DROPS, 0.3),
    (found.outcome == failures.LOSES, 0.1),
    (found.outcome == failures.LATE, 0.05),
    (work == np.float32(0.25), 0.2),
    (broken, 0.1),
    (np.isnan(factor), 0.1 / 3),
    (np.isinf(factor), 0.1 / 3),
    (factor == 1e6, 0.1 / 3),
  ):
    assert abs(clients.mean() - share) < 0.01
  assert (found.outcome[broken | (work < 1)] == failures.ANSWERS).all()
  # Stragglers come last.
  assert found.delay[work < 1].min() > found.delay[work == 1].max()


def test_fates_are_of_the_round_and_the_client_alone():
  part = Random(drop=0.5)
  first = part.fates(0, 1, 50).outcome
  np.testing.assert_array_equal(first, part.fates(0, 1, 50).outcome)
  assert (first != part.fates(0, 2, 50).outcome).any()
  assert (first != part.fates(1, 1, 50).outcome).any()
  fixed = Random(drop=0.5, fixed=True)
  np.testing.assert_array_equal(
    fixed.fates(0, 1, 50).outcome, fixed.fates(0, 9, 50).outcome
  )


def test_who_does_not_answer_is_a_padding_client():
  found = failures.answers(given([0, 1, 2, 3, 0, 1]), 0, 1, COHORT, 6)
  assert found.cohort.tolist() == [[0, -1], [-1, -1], [4, -1]]
  assert found.counts == {
    'clients_asked': 5,
    'clients_dropped': 1,
    'clients_lost': 1,
    'clients_late': 1,
  }
  nobody_fails = failures.answers(Failures(), 0, 1, COHORT, 6)
  assert nobody_fails.cohort is COHORT and nobody_fails.fates is None


def test_the_round_closes_with_the_wanted_answers():
  # In the order 4, 2, 0, 3; client 1 drops out.
  part = given([0, 1, 0, 0, 0], delay=[0.3, 0.0, 0.2, 0.9, 0.1])
  found = failures.answers(part, 0, 1, COHORT, 5, wanted=2)
  assert found.cohort.tolist() == [[-1, -1], [2, -1], [4, -1]]
  assert found.counts['clients_late'] == 2
  # Another order of the cohort changes nobody's fate.
  turned = failures.answers(part, 0, 1, COHORT[::-1, ::-1], 5, wanted=2)
  assert turned.cohort.tolist() == found.cohort[::-1, ::-1].tolist()
  # Too few: the round takes what there is.
  found = failures.answers(part, 0, 1, COHORT, 5, wanted=5)
  assert found.cohort.tolist() == [[0, -1], [2, 3], [4, -1]]


def test_more_are_asked_with_over_selection():
  config = small.config(client_fraction=0.1, over_selection=0.3)
  assert cohorts.most(config, 1000) == 130
  assert cohorts.most(config, 11) == 2
  assert cohorts.most(small.config(over_selection=3), 11) == 11
  num_train = np.arange(1000)
  cohort = round_lib.sample_cohort(config, 1, num_train)
  assert (cohort >= 0).sum() == cohorts.most(config, 999)


def test_who_is_not_there_is_not_asked_and_chunks_keep_their_shape():
  config = small.config(client_fraction=0.5)
  num_train = np.arange(1, 101)
  whole = round_lib.sample_cohort(config, 1, num_train)
  there = np.zeros(100, bool)
  there[[3, 50, 99]] = True
  few = round_lib.sample_cohort(config, 1, num_train, there)
  assert few.shape == whole.shape
  assert few[few >= 0].tolist() == [99, 50, 3]
  nobody = round_lib.sample_cohort(config, 1, num_train, np.zeros(100, bool))
  assert nobody.shape == whole.shape and (nobody == -1).all()
  everybody = round_lib.sample_cohort(config, 1, num_train, np.ones(100, bool))
  np.testing.assert_array_equal(everybody, whole)


def test_the_time_of_day():
  ids = np.arange(20_000)
  day = Day(share=0.4, swing=0.5, rounds=4, zones=0.0)
  shares = [day.there(0, number, ids).mean() for number in (1, 2, 3, 4)]
  # sin of a quarter, a half, three quarters of a day, a day.
  np.testing.assert_allclose(shares, [0.6, 0.4, 0.2, 0.4], atol=0.015)
  np.testing.assert_array_equal(day.there(0, 3, ids), day.there(0, 3, ids))
  around = dataclasses.replace(day, zones=1.0)
  assert abs(around.there(0, 1, ids).mean() - 0.4) < 0.015
  # A client has its own hours, the same every day.
  often = np.mean([around.there(0, 4 * n + 1, ids[:500]) for n in range(99)], 0)
  phase = availability.generator(0, availability.Stream.AVAILABILITY, 0)
  expected = 0.4 * (1 + 0.5 * np.cos(2 * np.pi * phase.random(500)))
  assert np.abs(often - expected).mean() < 0.06


def test_a_trace_says_who_is_there(tmp_path):
  path = tmp_path / 'trace.csv'
  path.write_text('client,first,last\na,1,2\nb,2,2\n a,4,5\n')
  trace, ids = Trace(str(path)), np.array(['a', 'b', 'c'])
  found = [trace.there(0, n, ids).tolist() for n in range(1, 5)]
  a, b = [True, False, False], [True, True, False]
  assert found == [a, b, [False] * 3, a]
  again = Trace(str(path), period=2)
  assert [again.there(0, n, ids).tolist() for n in (3, 4)] == [a, b]
  trace.check(ids, np.array([0, 1]), 2)
  again.check(ids, np.array([0, 1]), 99)
  told = small.error_of(trace.check, ids, np.array([0, 1]), 5)
  assert 'nobody who trains is there in round 3' in told
  assert 'round 1' in small.error_of(trace.check, ids, np.array([1]), 5)
  told = small.error_of(trace.check, np.array(['b']), np.array([0]), 1)
  assert "client 'a' is not in the data set" in told


@pytest.mark.parametrize(
  'text, told',
  [
    ('user,from,to\n1,1,2\n', 'first line'),
    ('client,first,last\n1,1\n', 'line 2'),
    ('client,first,last\n1,1,2\n1,3,x\n', 'line 3'),
    ('client,first,last\n1,3,2\n', 'from first to last'),
    ('client,first,last\n1,0,2\n', 'from 1 on'),
  ],
)
def test_what_is_no_trace(tmp_path, text, told):
  path = tmp_path / 'trace.csv'
  path.write_text(text)
  assert told in small.error_of(Trace(str(path)).there, 0, 1, np.array([1]))
  missing = Trace(str(tmp_path / 'none.csv'))
  assert 'cannot read' in small.error_of(missing.there, 0, 1, np.array([1]))


@pytest.mark.parametrize(
  'changes, told',
  [
    (dict(failures='random,drop=0.8,corrupt=0.3'), 'add up to 1.1'),
    (dict(failures='random,drop=-0.5'), 'minimum'),
    (dict(failures='random,corruption=huge'), 'choose from nan'),
    (dict(failures='sometimes'), 'no failures'),
    (dict(availability='never'), 'no availability'),
    (dict(availability='trace'), 'file is missing'),
    (dict(min_answers=7), '`min_answers=7` is more than a cohort has'),
    (dict(over_selection=-0.1), 'minimum'),
    (dict(over_selection=0.1, sampling='poisson'), '`sampling=poisson` says'),
  ],
)
def test_bad_settings_are_one_line(changes, told):
  def build():
    return small.simulation(**changes)

  assert told in small.error_of(build)


@pytest.mark.parametrize(
  'setting', ['failures=random,drop=0.1', 'min_answers=1']
)
def test_a_private_cohort_is_a_whole_one(setting):
  pytest.importorskip('jax_privacy')
  name, _, value = setting.partition('=')
  told = small.error_of(
    small.simulation,
    **{name: value},
    privacy='gaussian,noise_multiplier=1',
    select_by='last',
    patience=0,
  )
  assert f'`{setting}` changes who is in a round' in told


@pytest.fixture(scope='module')
def simulation():
  return small.simulation(
    **small.ONE_EXPERT,
    failures='random,corrupt=0.1',
    min_answers=2,
    drift_control='scaffold',
    client_optimizer='sgd',
    client_learning_rate=0.1,
    # Where a gradient is rounding noise, no step is to be made of it.
    server_optimizer='fedadam,epsilon=0.01',
    local_epochs=2,
  )


def with_failures(simulation, part):
  changed = dataclasses.replace(simulation)
  changed.__dict__['failures'] = part
  return changed


def round_of(simulation, part=Failures(), cohort=COHORT):
  """(state before, after, metrics); with fates, also if nobody fails."""
  if part == Failures():
    part = given([0] * simulation.dataset.num_clients)
  changed = with_failures(simulation, part)
  state = changed.init_state()
  before = jax.device_get(state)
  after, train = changed.run_round(state, 1, cohort)
  return before, jax.device_get(after), train


def test_failing_clients_leave_no_trace(simulation):
  n = simulation.dataset.num_clients
  outcome, factor = np.zeros(n, int), np.ones(n)
  outcome[0], outcome[3], factor[4] = failures.DROPS, failures.LATE, np.nan
  before, after, train = round_of(simulation, given(outcome, factor=factor))
  left = np.array([[-1, 1], [2, -1], [-1, -1]], np.int32)
  _, expected, without = round_of(simulation, cohort=left)
  small.assert_trees_equal(after, expected)
  for client in (0, 3, 4):
    for name in ('memories', 'controls'):
      small.assert_trees_equal(
        *(
          jax.tree.map(lambda x: x[client], getattr(s, name))
          for s in (after, before)
        )
      )
  assert train['loss'] == without['loss']
  assert metrics_lib.members(train, metrics_lib.CLIENTS) == {
    'asked': 5,
    'answered': 2,
    'dropped': 1,
    'lost': 0,
    'late': 1,
    'not_finite': 1,
    'too_long': 0,
    'malformed': 0,
  }


def test_too_few_answers_change_nothing(simulation):
  n = simulation.dataset.num_clients
  outcome = np.zeros(n, int)
  outcome[[0, 1, 2]] = failures.LOSES
  factor = np.ones(n)
  factor[3] = 1e6  # rejected, so that one of the two that came counts
  before, after, train = round_of(simulation, given(outcome, factor=factor))
  assert train[metrics_lib.ANSWERED] == train[metrics_lib.TOO_LONG] == 1
  assert after.server.round == 1
  small.assert_trees_equal(
    after._replace(server=after.server._replace(round=None)),
    before._replace(server=before.server._replace(round=None)),
  )


def test_other_fates_compile_nothing(simulation):
  round_of(simulation)
  compiled = small.compiled_rounds()
  other = simulation_lib.build(
    simulation.config.changed(
      {
        'failures': 'random,drop=0.3,lose=0.1,straggle=0.3,corrupt=0.1',
        'over_selection': 0.4,
        'seed': 5,
      }
    ),
    simulation.dataset,
  )
  state = other.init_state()
  for number in (1, 2):
    state, train = other.run_round(state, number, COHORT)
  # More are asked only where the cohort is sampled.
  assert small.compiled_rounds() == compiled


def test_a_straggler_does_what_a_client_with_a_limit_does(simulation):
  """`work` of its steps, and weight and steps are of them."""

  def update(limit, work):
    config = small.config(
      **small.ONE_EXPERT,
      max_local_steps=limit,
      client_optimizer='sgd',
      client_learning_rate=0.1,
    )
    program = dataclasses.replace(
      simulation.program.client, config=config, drift=client_lib.DriftControl()
    )
    state = simulation.init_state()
    view = client_view(simulation.data, jnp.int32(8), simulation.max_items)
    steps = windows.num_steps(view.num_train, config)
    found = jax.jit(
      lambda work: client_lib.local_update(
        program,
        state.server.broadcast(simulation.catalogue, config),
        view,
        jax.tree.map(lambda x: x[8], state.memories),
        None,
        jax.random.key(3),
        steps,
        work,
      )
    )(work)
    return int(steps), found

  _, limited = update(2, None)
  steps, straggler = update(0, 0.29)
  assert steps == 7 and straggler.steps == limited.steps == 2
  small.assert_trees_close(straggler.delta, limited.delta)
  small.assert_trees_close(straggler.memory, limited.memory)
  assert straggler.weight == limited.weight > 0
  assert update(0, 0.0)[1].steps == 1


@pytest.mark.slow
def test_resumed_is_straight_and_seeds_side_by_side_are_alone(simulation):
  config = simulation.config.changed(
    {
      'failures': 'random,drop=0.2,straggle=0.3,corrupt=0.2,corruption=any',
      'availability': 'day,share=0.8',
      'over_selection': 0.4,
    }
  )

  def built(seed):
    return simulation_lib.build(
      config.changed({'seed': seed}), simulation.dataset
    )

  straight = built(1)
  for done in straight.rounds(count=3):
    state = small.copy(done.state)
    if done.number == 2:
      second = state
  again = built(1)
  resumed = next(again.rounds(second, 3, 1)).state
  small.assert_trees_equal(resumed, state)
  alone = [built(seed) for seed in (1, 2)]
  states = jax.tree.map(
    lambda *x: jnp.stack(x), *[s.init_state() for s in alone]
  )
  together, means = ablation.run_round(alone, states, 1)
  for i, one in enumerate(alone):
    after, train = one.run_round(one.init_state(), 1, one.sample_cohort(1))
    small.assert_trees_close(
      jax.tree.map(lambda x: x[i], together).server, after.server, 1e-4, 1e-5
    )
    assert means[metrics_lib.NOT_FINITE].total[i] == train['clients_not_finite']


def test_what_a_round_with_failures_moves(simulation):
  train = {
    'item_rows': 5.0,
    'clients_asked': 10,
    'clients_answered': 3,
    'clients_dropped': 2,
    'clients_lost': 1,
    'clients_late': 3,
    'clients_not_finite': 1,
  }
  one = small.simulation().traffic(np.array([[0]]), {'item_rows': 5.0})
  assert one.bytes_wasted == 0
  one = simulation.traffic(np.array([[0]]), {'item_rows': 5.0})
  found = simulation.traffic(COHORT, train)
  assert found.visits == 10
  assert found.bytes_down == 10 * one.bytes_down
  assert found.bytes_up == 7 * one.bytes_up
  assert found.bytes_wasted == 7 * one.bytes_down + 4 * one.bytes_up
  skipped = simulation.traffic(COHORT, train | {'clients_answered': 1})
  assert skipped.bytes_wasted == 10 * one.bytes_down + 7 * one.bytes_up


def test_stragglers_train_on_fewer_targets(simulation):
  whole = simulation.count_targets(COHORT)
  work = np.ones(simulation.dataset.num_clients)
  assert simulation.count_targets(COHORT, work) == whole
  assert simulation.count_targets(COHORT, work / 2) == whole // 2


def test_a_line_and_a_figure_only_where_something_happened():
  train = dict.fromkeys(('loss', 'instance_weight', 'memory_fill'), 0.5) | {
    'clients_asked': 10,
    'clients_answered': 10,
    'clients_dropped': 0,
  }
  record = {'round': 1, 'train': train, 'seconds': 1.0}
  assert 'answer' not in console.round_line(record, 2)
  titles = [panel.title for panel in report.panels([record])]
  assert 'Clients' not in titles
  train |= {
    'clients_answered': 6,
    'clients_dropped': 3,
    'clients_not_finite': 1,
  }
  assert (
    '6 of 10 answers count (3 dropped, 1 not finite)'
    in console.round_line(record, 2)
  )
  panel = next(p for p in report.panels([record]) if p.title == 'Clients')
  assert set(panel.paths) == {'asked', 'answered', 'dropped', 'not finite'}
  assert 'too few, nothing is changed' in console.round_line(
    record | {'skipped': True}, 2
  )
  json.dumps(record, allow_nan=False)
