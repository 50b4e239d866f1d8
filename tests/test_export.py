"""The exported scorer: what the run itself would score, in a folder of its
own."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from fedmmr_jax.deploy import artefact, quality, standalone, vectors
from fedmmr_jax.deploy import scorer as scorer_lib
from fedmmr_jax.deploy.scorer import Scorer
from tests import small
from tests.test_cli import refused, run, TINY
from tests.test_recommendation import SETTINGS

K = 5


def moved(state):
  """A state in which no parameter has a special value, as if trained."""
  leaves, structure = jax.tree.flatten(state.server.params)
  rng = np.random.default_rng(0)
  leaves = [x + 0.1 * rng.normal(size=x.shape).astype(x.dtype) for x in leaves]
  params = jax.tree.unflatten(structure, leaves)
  return state._replace(server=state.server._replace(params=params))


@pytest.fixture(scope='module')
def exported():
  """(simulation, state, what its program gives after a trip to disk)."""
  simulation = small.simulation(**SETTINGS)
  state = moved(simulation.init_state())
  weights = scorer_lib.weights_of(simulation, state)
  program = artefact.program_of(
    Scorer.of(simulation, simulation.dataset.num_items), weights
  )
  call = jax.jit(jax.export.deserialize(program.serialize()).call)

  def score(histories):
    return jax.device_get(call(weights, histories))

  return simulation, state, score


def test_scores_are_those_of_the_simulation(exported):
  simulation, state, score = exported
  asked = artefact.people(simulation)
  live = artefact.live_scores(simulation, state, asked)
  found = score(asked.history)
  np.testing.assert_allclose(
    found['scores'][:, 1:], live[:, 1:], rtol=1e-5, atol=1e-5
  )
  assert np.isneginf(found['scores'][:, 0]).all()
  assert not asked.history[-1].any()  # the last has no history


def test_a_list_is_the_best_of_what_is_new(exported):
  simulation, _, score = exported
  history = artefact.people(simulation).history
  found = score(history)
  for consumed, scores, rows, best in zip(
    history, found['scores'], found['top_rows'], found['top_scores']
  ):
    new = np.setdiff1d(np.arange(1, len(scores)), consumed)
    expected = new[np.argsort(-scores[new], kind='stable')]
    np.testing.assert_array_equal(rows[: len(new)], expected)
    np.testing.assert_array_equal(best[: len(new)], scores[expected])
    # All of the catalogue was asked for: the list is shorter.
    assert not rows[len(new) :].any()
    assert np.isneginf(best[len(new) :]).all()


def test_the_others_change_nothing(exported):
  simulation, _, score = exported
  history = artefact.people(simulation).history
  np.testing.assert_allclose(
    score(history[::-1])['scores'][::-1, 1:],
    score(history)['scores'][:, 1:],
    rtol=1e-6,
  )


def test_int8_by_hand():
  table = np.array([[0, 0, 0], [2.54, -1.27, 0.004], [127, 1.4, 0.6]])
  weights = {
    'items': table.astype(np.float32),
    'params/norm/scale': np.float32([3]),
  }
  found = scorer_lib.quantised(weights)
  np.testing.assert_array_equal(
    found['items'], np.int8([[0, 0, 0], [127, -64, 0], [127, 1, 1]])
  )
  np.testing.assert_allclose(found['scales/items'], [0, 0.02, 1], rtol=1e-6)
  back = scorer_lib.dequantised(found)
  assert sorted(back) == sorted(weights)
  np.testing.assert_allclose(
    back['items'], [[0, 0, 0], [2.54, -1.28, 0], [127, 1, 1]], rtol=1e-6
  )
  np.testing.assert_array_equal(back['params/norm/scale'], [3])


@pytest.mark.slow
def test_vectors_are_the_whole_score_without_experts(tmp_path):
  settings = {'experts': 'none', 'max_seq_len': 12}
  simulation = small.simulation(**SETTINGS | settings)
  state = moved(simulation.init_state())
  weights = scorer_lib.weights_of(simulation, state)
  assert not [name for name in weights if name.startswith('features')]
  found = vectors.write(tmp_path, simulation, weights)
  assert found['metrics'] == ['inner_product', 'inner_product']
  assert found['recall'] == {'10 of 10': 1, '10 of 100': 1}
  assert not found['left_out']

  items = np.load(tmp_path / 'vectors/items.npy')
  users = np.load(tmp_path / 'vectors/users.npy').astype(np.float64)
  user_ids = json.loads((tmp_path / 'vectors/users.json').read_text())
  assert user_ids == simulation.dataset.user_ids.tolist()
  # Its profile is known if there is something before the window.
  long = simulation.dataset.lengths > simulation.config.model.max_seq_len
  assert 0 < long.sum() < len(long)
  np.testing.assert_array_equal(users[:, 1].any(axis=1), long)
  client = int(np.flatnonzero(long)[0])
  rows, scores = simulation.recommend(state, client, K)
  sequence, profile = users[client] @ items[rows].T
  np.testing.assert_allclose(scores, np.logaddexp(sequence, profile), rtol=1e-5)


def test_a_folder_is_whole_or_not_there(tmp_path):
  folder = tmp_path / 'new' / 'scorer'
  with artefact.writing(folder) as partial:
    (partial / 'a').write_text('whole')
    assert not folder.exists()
  assert (folder / 'a').read_text() == 'whole'
  assert small.error_of(enter, folder) == (
    f'{folder} is not empty; name another folder'
  )
  assert 'is a file' in small.error_of(enter, folder / 'a')
  assert f'{folder}/a/b: cannot be written' in (
    small.error_of(enter, folder / 'a' / 'b')
  )
  other = tmp_path / 'other'
  full = OSError(28, 'No space left on device')
  assert small.error_of(enter, other, full) == (
    f'{other}: cannot be written (No space left on device)'
  )
  with pytest.raises(FileNotFoundError):  # of the run's data
    enter(other, FileNotFoundError(2, 'No such file', '/data/x'))
  assert [path.name for path in tmp_path.iterdir()] == ['new']


def enter(folder, error=None):
  with artefact.writing(folder):
    if error:
      raise error


def test_bad_artefacts_are_one_line(exported, tmp_path):
  simulation, _, _ = exported

  def said():
    return small.error_of(artefact.read_manifest, tmp_path)

  assert 'name a folder that experiments.export has written' in said()
  ids = [None, *simulation.dataset.item_ids.tolist()[1:]]
  items, manifest = tmp_path / 'items.json', tmp_path / 'manifest.json'
  items.write_text(json.dumps({'ids': ids}))
  artefact.check_items(tmp_path, simulation)
  sealed = {'items.json': {'sha256': artefact._sha256(items)}}
  made_with = {'fedmmr_jax': '9.9'}
  content = {'format': 1, 'files': sealed, 'made_with': made_with}
  manifest.write_text(json.dumps(content))
  assert artefact.read_manifest(tmp_path)['format'] == 1

  items.write_text(json.dumps({'ids': [None, -1, *ids[2:]]}))
  assert 'damaged or edited' in said()
  said_ = small.error_of(artefact.check_items, tmp_path, simulation)
  assert f'{len(ids) - 1} and {len(ids) - 1}, {len(ids) - 2} of them' in said_
  items.unlink()
  assert f'{items}: no such file' in said()
  manifest.write_text(json.dumps(content | {'format': 2}))
  assert 'an artefact of format 2, this version reads format 1' in said()
  assert '9.9' in said()
  manifest.write_text('{')
  assert f'{manifest}: damaged' in said()


def test_the_program_that_is_shipped_needs_no_other():
  """As it is shown in the documentation, in some 50 lines."""
  text = open(standalone.__file__).read()
  assert 'fedmmr' not in text and len(text.splitlines()) < 70


@pytest.mark.slow
def test_ranks_are_those_of_the_evaluation():
  """Of clients that never trained: their memories are made from histories."""
  simulation = small.simulation(**SETTINGS)
  state = moved(simulation.init_state())
  weights = scorer_lib.weights_of(simulation, state)
  found = quality.rank(simulation, weights, simulation.ranked_targets('test'))
  _, ranks = simulation.evaluate(state, 'test')
  np.testing.assert_array_equal(found.full, ranks.full)
  np.testing.assert_array_equal(found.sampled, ranks.sampled)
  assert len(set(ranks.full.tolist())) > 3


@pytest.mark.slow
def test_a_run_from_the_shell(ml_1m, tmp_path):
  workdir, folder = f'--workdir={tmp_path / "run"}', tmp_path / 'scorer'
  run('train', *TINY, f'--data_dir={ml_1m}', workdir)
  out, _ = run(
    *('export', workdir, f'--output={folder}', '--round=2'),
    *('--int8', '--k=3', '--split=none'),
  )
  assert 'read back without this package' in out
  manifest = json.loads((folder / 'manifest.json').read_text())
  assert manifest['run']['round'] == 2 and manifest['sizes']['k'] == 3
  assert len(manifest['files']) == 4
  assert manifest['measured']['parity']['largest_difference'] < 1e-5

  # Without this package: it knows no other folder (-I).
  items = json.loads((folder / 'items.json').read_text())
  done = subprocess.run(
    [sys.executable, '-I', folder / 'run.py', str(items['ids'][1]), 'zz'],
    capture_output=True,
    text=True,
    check=True,
  )
  assert 'unknown and left out: zz' in done.stderr
  assert len(done.stdout.splitlines()) == 3 and 'Amélie' in done.stdout

  other = refused(workdir, f'--check={folder}', '--round=1', binary='export')
  assert "differ from the run's by up to" in other
