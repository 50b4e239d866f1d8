"""The host loop: resume = straight run, files of the contract, stopping."""

import importlib.metadata
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import console
from fedmmr_jax import metrics
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.data import cold as cold_lib
from fedmmr_jax.errors import UserError
from fedmmr_jax.federation import devices
from fedmmr_jax.runs import run_folder, training
from fedmmr_jax.runs.checkpoint import Progress, Rounds
from fedmmr_jax.runs.run_folder import RunFolder
from tests import small
from tests.test_loggers import Recorder

ROUNDS = 4


def train(path, num_rounds=ROUNDS, loggers=(), **changes):
  simulation = simulation_lib.build(
    small.config(num_rounds=num_rounds, **changes), small.dataset()
  )
  run = RunFolder(path)
  run.start(simulation.config, small.dataset())
  return training.train(simulation, run, lambda record: None, loggers=loggers)


def final_state(path, number=ROUNDS):
  return Rounds(path).load_as_saved(number)['state']


def without_times(records):
  return [
    {k: v for k, v in r.items() if not k.endswith('seconds')} for r in records
  ]


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  path = tmp_path_factory.mktemp('runs') / 'straight'
  return path, train(path)


def test_writes_every_file_of_the_contract(straight):
  path, summary = straight
  assert json.loads((path / 'summary.json').read_text()) == summary
  lines = [
    json.loads(x) for x in (path / 'metrics.jsonl').read_text().splitlines()
  ]
  assert [line['round'] for line in lines] == [1, 2, 3, 4]
  for line in lines:
    assert set(line['train']) == {
      'clients_asked',
      'clients_answered',
      'clients_not_finite',
      'clients_malformed',
      'clients_too_long',
      'loss',
      'rec_loss',
      'contrastive_loss',
      'load_balance_loss',
      'w_visual',
      'w_semantic',
      'instance_weight',
      'hardest_share',
      'instance_weight_shares',
      'memory_age',
      'gradient_backbone',
      'gradient_visual',
      'gradient_semantic',
      'memory_fill',
      'item_rows',
    }
    assert 1.25 <= line['train']['instance_weight'] <= 1.5
    assert sum(line['train']['instance_weight_shares']) == pytest.approx(1)
    assert line['train']['memory_age'] > 0
    assert line['train']['w_visual'] + line['train']['w_semantic'] == (
      pytest.approx(1, abs=1e-5)
    )
    assert set(line['val']) == {'sampled', 'full'}
    assert line['seconds'] > 0
    assert line['communication']['visits'] == 4
    assert line['communication']['bytes_up'] > 0
  config = json.loads((path / 'config.json').read_text())
  assert config['flags']['num_rounds'] == 4
  assert config['data_fingerprint'] == small.dataset().fingerprint()
  assert config['versions']['jax'] == jax.__version__
  assert config['machine'] == {
    'backend': jax.default_backend(),
    'devices': devices.count(),
    'cores': devices.cores(),
    'matmul_precision': 'highest',
  }
  assert Rounds(path).numbers() == [1, 2, 3, 4]
  assert set(summary['test']['full']) == {
    'HR@5',
    'HR@10',
    'HR@20',
    'NDCG@5',
    'NDCG@10',
    'NDCG@20',
    'MRR',
  }
  assert summary['num_clients'] == 9 and summary['rounds'] == 4


def test_the_best_round_is_the_first_with_the_best_validation(straight):
  path, summary = straight
  values = [r['val']['full']['NDCG@10'] for r in RunFolder(path).records()]
  assert summary['best_round'] == 1 + values.index(max(values))
  assert summary['val']['full']['NDCG@10'] == max(values)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(straight, tmp_path):
  path, summary = straight
  train(tmp_path / 'again')
  assert without_times(RunFolder(tmp_path / 'again').records()) == (
    without_times(RunFolder(path).records())
  )


def test_resumed_run_equals_the_straight_one(straight, tmp_path):
  path, _ = straight
  broken, recorder = Recorder(fails=('log', 2)), Recorder()
  with pytest.warns(UserWarning, match='failed at round 2'):
    train(tmp_path / 'run', num_rounds=2, loggers=[broken])
  # What a killed process had not saved.
  RunFolder(tmp_path / 'run').append({'round': 3, 'train': {}})
  summary = train(tmp_path / 'run', loggers=[recorder])
  small.assert_trees_equal(final_state(tmp_path / 'run'), final_state(path))
  assert without_times(RunFolder(tmp_path / 'run').records()) == (
    without_times(RunFolder(path).records())
  )
  # A logger gets each round once, those of the first process too.
  assert recorder.calls == [
    ('start', None),
    *(('log', number) for number in (1, 2, 3, 4)),
    ('finish', None),
    ('close', None),
  ]
  assert recorder.summary == summary and recorder.folder == tmp_path / 'run'
  assert recorder.told['flags']['num_rounds'] == ROUNDS
  assert recorder.told['data_fingerprint'] == small.dataset().fingerprint()
  assert {'versions', 'machine'} < set(recorder.told)


@pytest.mark.slow
def test_resume_repairs_a_torn_metrics_file(straight, tmp_path):
  """Killed while writing: half a line, or a line whose round is not saved."""
  path, _ = straight
  run = RunFolder(tmp_path / 'run')
  train(run.path, num_rounds=2)
  metrics = run.path / 'metrics.jsonl'
  lines = metrics.read_text().splitlines()
  metrics.write_text(lines[0] + '\n' + lines[1][:40])
  train(run.path)
  assert without_times(run.records()) == (
    without_times(RunFolder(path).records())
  )


def test_a_finished_run_resumed_trains_nothing(straight, tmp_path):
  summary = train(tmp_path / 'run', num_rounds=2)
  again = train(tmp_path / 'run', num_rounds=2)
  assert again['test'] == summary['test'] and again['rounds'] == 2


def test_early_stopping():
  config = small.config(patience=3)
  progress = Progress.start().updated(2, 0.5).updated(4, 0.5)
  assert int(progress.best_round) == 2  # the first of equals
  assert not training.out_of_patience(4, progress, config)
  assert training.out_of_patience(5, progress, config)
  # Only a validation can say that nothing has improved.
  assert not training.out_of_patience(
    9, progress, small.config(patience=3, eval_every=5, num_rounds=20)
  )
  assert not training.out_of_patience(9, progress, small.config(patience=0))
  assert not training.out_of_patience(9, Progress.start(), config)


@pytest.mark.parametrize('start', [-np.inf, -1.0])  # −1 in older runs
def test_the_first_validation_is_the_best_so_far_whatever_it_is(start):
  assert start == -1 or Progress.start() == Progress(0, start)
  progress = Progress(jnp.int32(0), jnp.float32(start)).updated(2, -3.0)
  assert progress.updated(4, -4.0) == progress == Progress(2, -3.0)
  assert progress.updated(4, -2.0) == Progress(4, -2.0)


FOUND = {
  'sampled': {'HR@10': 0.5, 'NDCG@10': 0.3},
  'full': {'HR@10': 0.2, 'NDCG@10': 0.1},
}


@pytest.mark.parametrize(
  'select_by, value',
  [('full/NDCG@10', 0.1), ('sampled/HR@10', 0.5), ('last', 7)],
)
def test_what_the_best_round_is_chosen_by(select_by, value):
  config = small.config(select_by=select_by)
  assert training.selection_value(FOUND, 7, config) == value


def test_the_last_round_is_always_the_best_if_so_asked():
  config = small.config(select_by='last', patience=1)
  progress = Progress.start()
  for number in (1, 2, 3):
    value = training.selection_value(FOUND, number, config)
    progress = progress.updated(number, value)
    assert int(progress.best_round) == number
    assert not training.out_of_patience(number, progress, config)


@pytest.mark.parametrize(
  'select_by, told',
  [
    ('HR@10', 'is neither last nor protocol/metric, as in full/NDCG@10'),
    ('all/HR@10', 'is neither last nor protocol/metric'),
    ('full/', 'is neither last nor protocol/metric'),
    ('full/hit@11', 'there is no metric hit@11; one of HR@5,'),
    ('full/HR@0', 'or HR@k and NDCG@k for any whole number k'),
    ('full/HR@70', 'full ranks 56 candidates at most'),
    ('sampled/NDCG@12', 'sampled ranks 11 candidates at most'),
  ],
)
def test_a_selection_that_cannot_be_made_is_refused(select_by, told):
  message = small.error_of(lambda: small.simulation(select_by=select_by))
  assert message.startswith(f'`select_by={select_by}`') and told in message


def test_any_cutoff_and_any_metric_can_select():
  simulation = small.simulation(select_by='full/NDCG@11')
  found = metrics.ranking(np.array([10, 11]), simulation.metrics)
  assert found['NDCG@11'] == pytest.approx(1 / np.log2(12) / 2)
  # What a further metric has already is not measured twice.
  own = 'examples.own_metric:Biased'
  simulation = small.simulation(metrics=own, select_by='sampled/RBP 0.8')
  assert len(simulation.metrics) == 1


def test_validation_is_of_a_part_of_the_clients_always_the_same():
  simulation = small.simulation(validation_clients=3)
  chosen = simulation.validation_clients
  assert len(chosen) == 3 and (np.diff(chosen) > 0).all()
  again = small.simulation(validation_clients=3).validation_clients
  assert again.tolist() == chosen.tolist()
  state = simulation.init_state()
  _, ranks = simulation.evaluate(state, 'val')
  found, some = simulation.evaluate(state, 'val', chosen)
  assert some.full.tolist() == ranks.full[chosen].tolist()
  assert simulation.validate(state) == found
  for count in (0, 9, 20):
    everybody = small.simulation(validation_clients=count)
    assert everybody.validation_clients.tolist() == list(range(9))


def test_validation_is_due_every_nth_round_and_at_the_end():
  config = small.config(num_rounds=5, eval_every=2)
  assert [training.due(r, config) for r in range(1, 6)] == [
    False,
    True,
    False,
    True,
    True,
  ]


@pytest.mark.slow
def test_a_diverged_round_is_refused_and_not_saved(tmp_path):
  with pytest.raises(UserError, match='round 1: .*diverged; start anew'):
    train(
      tmp_path / 'run',
      **small.PLAIN,
      client_optimizer='sgd',
      eval_every=4,
      client_learning_rate=1e30,
    )
  assert not Rounds(tmp_path / 'run').numbers()


def test_metrics_without_their_rounds_are_not_thrown_away(tmp_path):
  train(tmp_path / 'run', num_rounds=2)
  shutil.rmtree(tmp_path / 'run' / 'rounds')
  before = (tmp_path / 'run' / 'metrics.jsonl').read_bytes()
  with pytest.raises(UserError, match='no saved round to continue from'):
    train(tmp_path / 'run')
  assert (tmp_path / 'run' / 'metrics.jsonl').read_bytes() == before


def test_damaged_files_are_named(straight, tmp_path):
  run = RunFolder(tmp_path)
  (tmp_path / 'metrics.jsonl').write_text('{"round": 1}\n{oops\n{"round": 3}\n')
  with pytest.raises(UserError, match='metrics.jsonl, line 2: damaged'):
    run.records()
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(UserError, match="config.json: damaged, it has no 'flags"):
    run.config()
  (tmp_path / 'config.json').write_text('{"flags": {"dropout": 7.0}}')
  with pytest.raises(UserError, match='config.json: `dropout=7.0` is above'):
    run.config()


def test_a_folder_that_was_not_started_is_refused_before_training(tmp_path):
  told = []
  with pytest.raises(ValueError, match='run.start'):
    training.train(small.simulation(), RunFolder(tmp_path / 'run'), told.append)
  assert not told and not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_longer_run_takes_down_the_results_of_the_shorter(tmp_path):
  train(tmp_path / 'run', num_rounds=2)
  simulation = simulation_lib.build(small.config(num_rounds=3), small.dataset())

  def interrupt(record):
    raise KeyboardInterrupt

  run = RunFolder(tmp_path / 'run')
  run.start(simulation.config, simulation.dataset)
  with pytest.raises(KeyboardInterrupt):
    training.train(simulation, run, interrupt)
  assert RunFolder(tmp_path / 'run').summary() is None
  assert Rounds(tmp_path / 'run').numbers() == [1, 2, 3]


def test_a_run_is_continued_with_its_own_settings_only(straight):
  path, _ = straight
  with pytest.raises(UserError, match='`num_negatives=5`, not 6'):
    RunFolder(path).start(small.config(num_negatives=6), small.dataset())
  with pytest.raises(UserError, match='other data'):
    RunFolder(path).start(small.config(), small.dataset(seed=1))


def test_a_run_of_another_format_is_refused(straight, tmp_path):
  shutil.copytree(straight[0], tmp_path / 'run')
  path = tmp_path / 'run' / 'config.json'
  told = json.loads(path.read_text())
  del told['format'], told['checksum']  # as the first version wrote it
  path.write_text(json.dumps(told))
  with pytest.raises(
    UserError, match=f'format 1, this version reads format {run_folder.FORMAT};'
  ):
    RunFolder(tmp_path / 'run').start(small.config(), small.dataset())


def test_a_checkout_that_is_not_installed_trains(tmp_path, monkeypatch):
  version = importlib.metadata.version

  def without_us(name):
    if name == 'fedmmr_jax':
      raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

  monkeypatch.setattr(importlib.metadata, 'version', without_us)
  RunFolder(tmp_path).start(small.config(), small.dataset())
  told = json.loads((tmp_path / 'config.json').read_text())['versions']
  assert told['fedmmr_jax'] == 'not installed'
  assert told['jax'] == jax.__version__


def begun_elsewhere(path, **changes):
  """A run folder whose config.json says that it began on another machine."""
  run = RunFolder(path)
  run.start(small.config(), small.dataset())
  told = json.loads((path / 'config.json').read_text())
  for key, part in changes.items():
    told[key] |= part
  (path / 'config.json').write_text(json.dumps(run_folder._with_checksum(told)))
  del run
  run = RunFolder(path)
  run.start(small.config(), small.dataset())
  return run


def test_a_run_continued_on_another_machine_says_so_once(tmp_path):
  assert begun_elsewhere(tmp_path / 'same').moved() is None
  run = begun_elsewhere(
    tmp_path / 'other',
    machine={'cores': 999},
    versions={'jax': '0.1', 'numpy': '0.1'},
  )
  assert run.moved() == (
    f'continued under other conditions: jax 0.1, now {jax.__version__}; '
    f'cores 999, now {devices.cores()}; the results agree to rounding, not '
    'bit for bit'
  )
  # What the run began with is kept.
  assert (
    json.loads((run.path / 'config.json').read_text())['machine']['cores']
    == 999
  )


def test_a_run_that_tells_of_no_machine_is_continued(tmp_path):
  path = tmp_path / 'run'
  run = begun_elsewhere(path)
  del run
  told = json.loads((path / 'config.json').read_text())
  del told['machine']
  (path / 'config.json').write_text(json.dumps(run_folder._with_checksum(told)))
  run = RunFolder(path)
  run.start(small.config(), small.dataset())
  assert run.moved() is None


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
  first, second = RunFolder(tmp_path / 'run'), RunFolder(tmp_path / 'run')
  first.start(small.config(), small.dataset())
  with pytest.raises(UserError, match='another process is training'):
    second.start(small.config(), small.dataset())
  del first  # as when its process ends
  RunFolder(tmp_path / 'run').start(small.config(), small.dataset())


@pytest.mark.slow
def test_a_decaying_rate_fixes_the_length_of_a_run(tmp_path):
  path = tmp_path / 'run'
  changes = dict(small.PLAIN, server_schedule='cosine')
  train(path, num_rounds=1, **changes)
  with pytest.raises(UserError, match='`num_rounds=1`, not 2.*learning rates'):
    RunFolder(path).start(
      small.config(num_rounds=2, **changes), small.dataset()
    )


@pytest.mark.slow
def test_control_variates_and_moments_resume_as_if_straight(tmp_path):
  changes = dict(
    small.PLAIN,  # its prototypes have width 0, which Orbax does not save
    item_embedding='content_plus_id',
    drift_control='scaffold',
    client_optimizer='sgd',
    client_learning_rate=0.05,
    server_optimizer='fedmuon',
    server_learning_rate=0.01,
  )
  train(tmp_path / 'straight', num_rounds=3, **changes)
  train(tmp_path / 'resumed', num_rounds=2, **changes)
  train(tmp_path / 'resumed', num_rounds=3, **changes)
  small.assert_trees_equal(
    final_state(tmp_path / 'straight', 3), final_state(tmp_path / 'resumed', 3)
  )


@pytest.mark.slow
def test_cold_items_and_acceptance_are_in_the_summary(tmp_path):
  dataset, cold, _ = cold_lib.hold_out(small.dataset(), 0.2, seed=0)
  simulation = simulation_lib.build(small.config(**small.PLAIN), dataset, cold)
  run = RunFolder(tmp_path / 'run')
  run.start(simulation.config, dataset)
  summary = training.train(simulation, run, lambda record: None)
  assert (
    set(summary['cold'])
    == set(summary['cold_popularity'])
    == {'sampled', 'full'}
  )
  assert len(summary['acceptance']) == 5
  assert 'cold items by popularity, full' in console.final_table(summary)


def test_a_folder_with_a_run_is_refused_without_resume(straight):
  path, _ = straight
  before = (path / 'config.json').read_bytes()
  with pytest.raises(UserError, match='already holds a run; continue it, or'):
    RunFolder(path).check_free(resume=False)
  RunFolder(path).check_free(resume=True)
  assert (path / 'config.json').read_bytes() == before
