"""Lists for many people at once, and what they lean on."""

import dataclasses
import json

import numpy as np
import pytest

import fedmmr_jax as fm
from fedmmr_jax.evaluation import recommendation
from fedmmr_jax.evaluation.recommendation import WINDOW
from fedmmr_jax.federation import devices
from tests import small
from tests.test_cli import refused, run, TINY

K = 5
SETTINGS = dict(
  item_embedding='content_plus_id',
  profile='history',
  positions='relative',
  expert_form='similarity,features=components',
)


@pytest.fixture(scope='module')
def trained():
  simulation = small.simulation(**SETTINGS)
  (step,) = simulation.rounds(count=1)
  return simulation, step.state


def everybody(simulation, **more):
  clients = np.arange(simulation.dataset.num_clients)
  return fm.People.of_clients(simulation, clients, **more)


def test_a_list_is_what_one_client_gets_alone(trained):
  simulation, state = trained
  lists = fm.recommend(simulation, state, everybody(simulation), K)
  for client in range(simulation.dataset.num_clients):
    rows, scores = simulation.recommend(state, client, K)
    np.testing.assert_array_equal(lists.rows[client], rows)
    np.testing.assert_allclose(lists.scores[client], scores, rtol=1e-5)


def test_hits_of_the_lists_are_those_of_the_evaluation(trained):
  simulation, state = trained
  for split in ('val', 'test'):
    people = everybody(simulation, split=split)
    lists = fm.recommend(simulation, state, people, K)
    _, targets = simulation.targets(split)
    _, ranks = simulation.evaluate(state, split)
    hits = (lists.rows == targets[:, None]).any(axis=1)
    np.testing.assert_array_equal(hits, ranks.full < K)
    assert 0 < hits.sum() < len(hits)


def test_the_others_change_nothing(trained):
  simulation, state = trained
  whole = fm.recommend(simulation, state, everybody(simulation), K)
  few = fm.People.of_clients(simulation, [6, 2])
  part = fm.recommend(simulation, state, few, K)
  np.testing.assert_array_equal(part.rows, whole.rows[[6, 2]])
  # A chunk of another width rounds otherwise.
  np.testing.assert_allclose(part.scores, whole.scores[[6, 2]], rtol=1e-5)


def test_only_what_is_allowed_and_new(trained):
  simulation, state = trained
  people = everybody(simulation)
  allowed = np.zeros(simulation.model.num_rows, bool)
  allowed[[3, 4, 9]] = True
  lists = fm.recommend(simulation, state, people, K, allowed)
  again = fm.recommend(simulation, state, people, K, allowed, repeats=True)
  for client, (fresh, any_) in enumerate(zip(lists.rows, again.rows)):
    consumed = set(simulation.dataset.sequence(client).tolist())
    assert set(fresh[fresh > 0].tolist()) == {3, 4, 9} - consumed
    assert set(any_[any_ > 0].tolist()) == {3, 4, 9}
  assert np.isneginf(lists.scores[lists.rows == 0]).all()


def test_people_whom_no_round_saw(trained):
  """Whose memory is made from their history: as a client's that is empty."""
  simulation, state = trained
  history = simulation.dataset.sequence(3)
  people = fm.People.of_histories(simulation, [history, history[:2]])
  lists = fm.recommend(simulation, state, people, K)
  untrained = state._replace(memories=simulation.init_state().memories)
  clients = fm.People.of_clients(simulation, [3])
  same = fm.recommend(simulation, untrained, clients, K)
  np.testing.assert_array_equal(lists.rows[:1], same.rows)
  assert (lists.rows[1] > 0).all()


def test_a_history_longer_than_any_of_the_run(trained):
  simulation, state = trained
  longest = simulation.max_items
  rng = np.random.default_rng(0)
  history = rng.integers(1, 20, size=3 * longest)
  people = fm.People.of_histories(simulation, [history])
  rows = fm.recommend(simulation, state, people, K).rows
  assert not set(rows[0].tolist()) & set(history.tolist())


def test_more_items_than_there_are_is_refused(trained):
  simulation, state = trained
  items = simulation.dataset.num_items
  said = small.error_of(
    fm.recommend, simulation, state, everybody(simulation), items + 1
  )
  assert said == f'`k={items + 1}`: the catalogue has {items} items'


@pytest.mark.slow
def test_reasons_are_what_a_score_loses(trained):
  simulation, state = trained
  people = fm.People.of_clients(simulation, [1, 4])
  lists = fm.recommend(simulation, state, people, K)
  found = fm.reasons(simulation, state, people, lists)
  assert set(found.items) == {WINDOW, 'visual', 'semantic'}
  for number, client in enumerate((1, 4)):
    window = found.items[WINDOW][number]
    sequence = simulation.dataset.sequence(client)
    np.testing.assert_array_equal(window, sequence[-len(window) :])
  # A slot without an entry cannot matter, one with an entry does.
  for name in ('visual', 'semantic'):
    empty = found.items[name] == 0
    assert not found.effects[name][empty].any()
    assert found.effects[name][~empty].any()
  assert np.isfinite(found.effects[WINDOW]).all()


def test_a_reason_by_hand():
  """An item of the window is left out by padding in its place."""
  simulation = small.simulation(**SETTINGS | {'experts': 'none'})
  state = simulation.init_state()
  people = fm.People.of_clients(simulation, [1])
  lists = fm.recommend(simulation, state, people, 1)
  found = fm.reasons(simulation, state, people, lists)
  assert set(found.items) == {WINDOW}
  history = people.history.copy()
  history[0, people.length[0] - 2] = 0
  other = fm.recommend(
    simulation,
    state,
    people._replace(history=history),
    simulation.model.num_rows - 1,
    repeats=True,
  )
  place = other.rows[0].tolist().index(lists.rows[0, 0])
  lost = lists.scores[0, 0] - other.scores[0, place]
  assert abs(lost) > 1e-4
  assert found.effects[WINDOW][0, -2, 0] == pytest.approx(lost, abs=1e-5)


def test_similar_items_by_hand(trained):
  simulation, state = trained
  rows, cosines = fm.similar_items(simulation, state, 7, K)
  embedded = np.asarray(
    simulation.model.apply(
      {'params': state.server.params},
      np.arange(simulation.model.num_rows),
      simulation.catalogue,
      method='embed',
    ),
    np.float64,
  )
  length = np.linalg.norm(embedded, axis=1)
  length[0] = 1
  expected = embedded @ embedded[7] / length / length[7]
  expected[[0, 7]] = -np.inf
  np.testing.assert_array_equal(rows, np.argsort(-expected)[:K])
  np.testing.assert_allclose(cosines, expected[rows], rtol=1e-5)


def test_a_diverged_run_is_refused(trained):
  simulation, state = trained
  params = dict(state.server.params)
  params['item_embedding'] = params['item_embedding'].at[5].set(np.nan)
  broken = state._replace(server=state.server._replace(params=params))
  assert 'the training diverged' in small.error_of(
    fm.recommend, simulation, broken, everybody(simulation), K
  )


def test_nothing_is_compiled_twice(trained):
  simulation, state = trained
  shard = recommendation._recommend_shard
  fm.recommend(simulation, state, everybody(simulation), K)
  before = shard._cache_size()
  fm.recommend(simulation, state, everybody(simulation), K)
  assert shard._cache_size() == before


def test_embeddings_are_kept_for_one_state_only(trained):
  """Whichever state was asked about before."""
  simulation, state = trained
  people = everybody(simulation)
  fm.recommend(simulation, state, people, K)
  params = dict(state.server.params)
  params['item_embedding'] = params['item_embedding'][::-1]
  other = state._replace(server=state.server._replace(params=params))
  fresh = dataclasses.replace(simulation)
  lists = fm.recommend(simulation, other, people, K)
  expected = fm.recommend(fresh, other, people, K)
  np.testing.assert_array_equal(lists.rows, expected.rows)
  assert (lists.rows != fm.recommend(fresh, state, people, K).rows).any()
  similar = fm.similar_items(simulation, state, 7, K)[0]
  assert (similar != fm.similar_items(simulation, other, 7, K)[0]).any()


def test_one_person_is_one_shard(trained, monkeypatch):
  """And not seven more of padding."""
  simulation, state = trained
  ran = []

  def run(program, static, shards, *shared):
    ran.append(shards)
    return devices_run(program, static, shards, *shared)

  devices_run = devices.run
  monkeypatch.setattr(devices, 'run', run)
  alone = fm.People.of_clients(simulation, [2])
  lists = fm.recommend(simulation, state, alone, K)
  assert ran[0].tolist() == [[[0]]]
  rows, _ = simulation.recommend(state, 2, K)
  np.testing.assert_array_equal(lists.rows[0], rows)


@pytest.mark.slow
def test_lists_from_the_shell(ml_1m, tmp_path):
  workdir = tmp_path / 'run'
  few = '--eval_clients=2'
  run('train', *TINY, f'--data_dir={ml_1m}', f'--workdir={workdir}', few)
  to = f'--workdir={workdir}'
  output = tmp_path / 'lists.csv'
  # For everybody, whomever the run ranked.
  _, err = run('recommend', to, '--split=test', '--k=1', f'--output={output}')
  assert f'6 rows in {output}' in err
  _, err = run('recommend', to, '--k=3', f'--output={output}', '--why')
  lines = output.read_text().splitlines()
  assert lines[0] == '"user_id","item_id","rank","score","title","why"'
  assert f'{len(lines) - 1} rows in {output}' in err
  assert 'window: ' in lines[1]

  known, user = lines[1].split(',')[1], lines[1].split(',')[0]
  histories = tmp_path / 'new.csv'
  histories.write_text(f'user,item\nA,{known}\nA,zz\nB,zz\n')
  out, err = run('recommend', to, '--k=2', '--json', f'--histories={histories}')
  assert {row['user_id'] for row in json.loads(out)['rows']} == {'A'}
  assert "1 of 2 items are not in the run's catalogue" in err
  assert '1 users have no item that the run knows and get no list (ids B)' in (
    err
  )
  out, _ = run('recommend', to, f'--similar_to={known}', '--k=2')
  assert 'score' in out and 'user' not in out

  ids = tmp_path / 'ids.txt'
  ids.write_text('nobody\n')
  for given, said in (
    (('--user=nobody',), '1 of 1 users are not in the run (ids nobody)'),
    ((f'--candidates={ids}',), 'the run knows none of its 1 items'),
    ((f'--block={tmp_path}/no.txt',), 'no such file'),
    (('--k=100000',), '--k=100000: the catalogue has'),
    (('--similar_to=x',), 'the run has no such item'),
    ((f'--user={user}', f'--users={ids}'), 'give one of --user and --users'),
    ((f'--histories={tmp_path}/no.csv',), f'--histories={tmp_path}/no.csv: no'),
    (('--output=lists.txt',), 'end it in'),
  ):
    assert said in refused(to, *given, binary='recommend'), given
