"""The leak audit finds no leak in a clean run, and finds the ones put in."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.client import profile, windows
from fedmmr_jax.client import update as client_lib
from fedmmr_jax.data import dataset as dataset_lib
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import audit, ranking
from fedmmr_jax.federation import collaborative
from tests import small
from tests.test_cli import run, TINY

OF_EXPERTS = {
  "memory: a target's own entry",
  'memory: what came later',
  'memory: what came before',
}
CLEAN = {
  'training negatives',
  'windows',
  '2 rounds',
  'memory',
  'catalogue filter',
  'evaluation negatives',
  'validation candidates',
}
# What a client's whole history enters, beside its windows.
SKETCH_AND_PROFILE = dict(
  item_embedding='content_plus_id,collaborative_dim=4', profile='history'
)


def simulation(**changes):
  # Without experts, which take long to compile.
  return small.simulation(
    **{
      'client_fraction': 1.0,
      'memory': 'surprise,capacity=8,retrieval_size=4,threshold=0',
      'experts': 'none',
      **changes,
    }
  ).with_popular_negatives()


def failed(checks):
  return {check.name for check in checks if not check.passed}


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    {'experts': 'both'},
    {
      'vocabulary': 'local',
      'objective': 'all_positions',
      'negatives': 'shared',
    },
    SKETCH_AND_PROFILE,
  ],
  ids=['dense', 'local', 'sketch and profile'],
)
def test_a_clean_run_is_found_clean(changes):
  checks = audit.all_checks(simulation(**changes))
  expected = CLEAN | (OF_EXPERTS if 'experts' in changes else set())
  assert {check.name for check in checks} == expected
  assert not failed(checks)


@pytest.mark.slow
def test_experts_that_see_the_answer_are_found():
  checks = audit.all_checks(
    simulation(
      experts='semantic',
      memory='surprise,capacity=8,retrieval_size=4,threshold=0,sees=stored',
    )
  )
  assert failed(checks) == OF_EXPERTS


@pytest.mark.slow
def test_the_leak_of_the_original_is_found():
  checks = audit.all_checks(simulation(negatives='per_sample,leaky=true'))
  assert failed(checks) == {
    'training negatives',
    '2 rounds',
    'catalogue filter',
  }
  assert ' 0 are items held out' in checks[0].found


def test_a_window_with_a_held_out_item_is_found(monkeypatch):
  cut = windows.cut_windows

  def one_too_far(client, *rest):
    return cut(client._replace(num_train=client.num_train + 1), *rest)

  monkeypatch.setattr(windows, 'cut_windows', one_too_far)
  assert not audit.training_windows(simulation()).passed


@pytest.mark.slow
def test_a_sketch_of_held_out_items_is_found(monkeypatch):
  sketch = collaborative.sketch
  monkeypatch.setattr(
    collaborative,
    'sketch',
    lambda dataset, *rest, **named: sketch(
      dataclasses.replace(dataset, held_out=0), *rest, **named
    ),
  )
  checks = audit.all_checks(simulation(**SKETCH_AND_PROFILE))
  assert failed(checks) == {'2 rounds'}


@pytest.mark.slow
def test_a_profile_of_held_out_items_is_found(monkeypatch):
  outside = profile.outside
  monkeypatch.setattr(client_lib, '_trained', lambda view: view.history)
  monkeypatch.setattr(
    profile, 'outside', lambda sums, num, *rest: outside(sums, num + 1, *rest)
  )
  # Other settings, so that it is compiled anew.
  checks = audit.all_checks(
    simulation(**SKETCH_AND_PROFILE | {'profile': 'history,weight=0.5'})
  )
  assert failed(checks) == {'2 rounds'}


@pytest.mark.slow
def test_training_on_a_held_out_item_is_found(monkeypatch):
  view = dataset_lib.client_view

  def one_too_many(*arguments):
    found = view(*arguments)
    return found._replace(num_train=found.num_train + (found.num_train > 0))

  monkeypatch.setattr('fedmmr_jax.federation.round.client_view', one_too_many)
  # Other settings, so that it is compiled anew.
  other = simulation(
    memory='surprise,capacity=8,retrieval_size=4,threshold=-1',
    experts='semantic',
  )
  assert failed(audit.trained_rounds(other, 2)) == {'2 rounds', 'memory'}


@pytest.mark.parametrize('kind', ['sampled_negatives', 'popular_negatives'])
def test_a_seen_evaluation_negative_is_found(kind):
  some = simulation()
  negatives = np.array(getattr(some.data, kind))
  negatives[2, 0, 3] = some.dataset.sequence(2)[0]
  broken = dataclasses.replace(
    some, data=some.data._replace(**{kind: jnp.asarray(negatives)})
  )
  check = audit.evaluation_negatives(broken)
  assert not check.passed and '1 consumed by it' in check.found


def test_a_test_item_that_validation_leaves_out_is_found(monkeypatch):
  some = simulation_lib.build(  # enough clients to tell chance from rule
    small.config(sampled_negatives=25, experts='none'),
    small.dataset(num_users=40),
  ).with_popular_negatives()
  assert audit.validation_candidates(some).passed
  # As it was once: what the test excludes, validation excluded too.
  negatives = some.data.sampled_negatives
  check = audit.validation_candidates(
    dataclasses.replace(
      some,
      data=some.data._replace(
        sampled_negatives=negatives.at[:, 0].set(negatives[:, 1])
      ),
    )
  )
  assert not check.passed and ' 0 have it among the uniform' in check.found
  rank_client = ranking.rank_client

  def whole_history(scores, client, target_at, now, split):
    last = client.num_items - 1
    return rank_client(scores, client, last, last, split)._replace(
      sampled=rank_client(scores, client, target_at, now, split).sampled
    )

  monkeypatch.setattr(ranking, 'rank_client', whole_history)
  check = audit.validation_candidates(some)
  assert not check.passed and ' 41 have a test item that is no' in check.found


def test_exchanging_changes_held_out_items_alone():
  dataset = small.dataset()
  other = audit.exchanged(dataset, seed=0)
  same = dataset.items == other.items
  np.testing.assert_array_equal(same, dataset.is_train)
  for client in range(dataset.num_clients):
    new = other.sequence(client)[dataset.num_train[client] :]
    assert not set(new) & set(dataset.sequence(client))


@pytest.mark.slow
def test_the_canary_sings_with_the_leak_alone():
  clean, figures = audit.canary(simulation(sampled_negatives=25))
  assert clean.passed
  assert audit.hit_rate(figures.leaky) > audit.hit_rate(figures.clean) + 0.2
  leaky, _ = audit.canary(
    simulation(sampled_negatives=25, negatives='per_sample,leaky=true')
  )
  assert not leaky.passed


@pytest.mark.slow
def test_the_first_rounds_with_and_without_the_leak():
  figures = audit.federated(simulation(), 1)
  assert len(figures.clean.full) == len(figures.popularity.full) == 9
  assert (figures.clean.full != figures.leaky.full).any()


@pytest.mark.slow
def test_a_diverged_run_is_an_error_and_not_clean():
  # Of NaN in both, every bit could be the same.
  with pytest.raises(UserError, match='round 1: .*diverged; start anew'):
    audit.trained_rounds(
      simulation(client_optimizer='sgd', client_learning_rate=1e30), 2
    )


@pytest.mark.slow
def test_from_the_shell(ml_1m):
  out, _ = run(
    'audit',
    *TINY,
    f'--data_dir={ml_1m}',
    '--rounds=1',
    '--experts=none',
    '--negatives=per_sample,leaky=true',
    '--json',
    status=1,
  )
  told = json.loads(out)
  assert {c['name'] for c in told['checks'] if not c['passed']} >= {
    'training negatives',
    'catalogue filter',
  }
  assert set(told['test']['1 rounds']) == {'popularity', 'clean', 'leaky'}
