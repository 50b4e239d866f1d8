"""Search-space files, what trials are judged by, and the sweep as a user runs
it."""

import contextlib
import json
import sqlite3
from types import SimpleNamespace

import pytest

from experiments import space as space_lib
from experiments.space import Varied
from fedmmr_jax import parts
from fedmmr_jax.config import RunConfig
from fedmmr_jax.data.load import Loaded
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import ablation, sweep
from fedmmr_jax.evaluation.sweep import Objective
from tests import small
from tests.test_cli import refused, run, TINY

optuna = pytest.importorskip('optuna')

SPACE = """
  # a comment
  --client_learning_rate=log(1e-4,1e-2)
  --memory=surprise,capacity=int(9,50),retrieval_size=choice(5,8)  # two
  --experts=choice(none | visual,semantic)
"""


def read(tmp_path, text, **changes):
  path = tmp_path / 'space.txt'
  path.write_text(text)
  return space_lib.read(path, RunConfig.from_flat_dict(changes))


def test_a_space_file(tmp_path):
  space = read(tmp_path, SPACE)
  rate, memory, experts = space.lines
  assert rate.pieces == (
    Varied('client_learning_rate', 'log', ('1e-4', '1e-2')),
  )
  assert memory.pieces == (
    'surprise,capacity=',
    Varied('memory.capacity', 'int', ('9', '50')),
    ',retrieval_size=',
    Varied('memory.retrieval_size', 'choice', ('5', '8')),
  )
  assert experts.varied[0].words == ('none', 'visual,semantic')
  tried = {
    'client_learning_rate': 0.00123456,
    'memory.capacity': 20,
    'memory.retrieval_size': '8',
    'experts': 'visual,semantic',
  }
  changes = space.suggest(optuna.trial.FixedTrial(tried))
  assert changes == {
    'client_learning_rate': '0.001235',
    'memory': 'surprise,capacity=20,retrieval_size=8',
    'experts': 'visual,semantic',
  }
  config = RunConfig().changed(changes)
  assert config.client.client_learning_rate == 0.001235
  assert config.memory.capacity == 20 and config.memory.retrieval_size == 8


@pytest.mark.parametrize(
  'text, message',
  [
    ('', 'nothing varies; a line is --flag=distribution'),
    ('dropout=uniform(0,1)', 'line 1: .* is not --flag=distribution'),
    ('\n--dropout=0.1', 'line 2: nothing varies in'),
    ('--nothing=uniform(0,1)', "line 1: unknown setting 'nothing'"),
    ('--dropout=normal(0,1)', r'normal\(0,1\): no such distribution; one of'),
    ('--dropout=uniform(0.5)', 'not two numbers'),
    ('--dropout=uniform(0.5,0)', 'the first number has to be below'),
    ('--dropout=uniform(0,inf)', 'the first number has to be below'),
    ('--dropout=log(0,0.5)', 'log have to be above 0'),
    ('--num_blocks=int(1,2.5)', 'not two whole numbers'),
    ('--num_blocks=uniform(1,2.5)', r'num_blocks=2.5. is not a whole number'),
    ('--num_rounds=uniform(2,6)', r'num_rounds=2.5. is not a whole number'),
    ('--num_blocks=log(1,3)', r'num_blocks=1.5. is not a whole number'),
    ('--dropout=uniform(0,2)', 'dropout=2.* is above its maximum'),
    ('--dropout=choice(0.1)', 'two or more different choices'),
    ('--dropout=choice(0.1,)', 'two or more different choices'),
    ('--router=item,hidden_dim=choice(8,x)', 'hidden_dim=x is not a whole'),
    ('--seed=choice(1,2)', 'see --seeds'),
    ('--eval_every=int(1,2)', 'is about how trials are compared'),
    ('--k_core=int(0,2)', 'is about how trials are compared'),
    ('--new_clients=uniform(0,0.1)', 'is about how trials are compared'),
    ('--dropout=choice(0,0.1)\n--dropout=choice(0,0.2)', 'comes twice'),
  ],
)
def test_a_malformed_space_file(tmp_path, text, message):
  with pytest.raises(UserError, match=message) as caught:
    read(tmp_path, text)
  assert 'space.txt' in str(caught.value) and '\n' not in str(caught.value)


def test_features_and_whole_thousands_may_vary(tmp_path):
  space = read(
    tmp_path,
    '--text_features=choice(auto,none)\n--dropout=uniform(0,0.0001)\n'
    '--server_learning_rate=uniform(1,1000)',
  )
  assert len(space.varied) == 3


def record(number, *, hits=None, full=None):
  found = {'sampled': {'HR@10': hits}, 'full': {'NDCG@10': full}}
  return {'round': number} | ({'val': found} if full is not None else {})


def test_a_trial_is_judged_at_the_round_that_training_would_choose():
  records = [
    record(1),
    record(2, hits=0.5, full=0.1),
    record(4, hits=0.4, full=0.3),
    record(6, hits=0.3, full=0.2),
  ]
  objective = Objective.of('full/NDCG@10', RunConfig())

  def found(select_by):
    config = RunConfig().changed({'select_by': select_by})
    return objective.of_records(records, config)

  assert found('last') == (0.2, 6)
  assert found('full/NDCG@10') == (0.3, 4)
  assert found('sampled/HR@10') == (0.1, 2)


@pytest.mark.parametrize('text', ['full', 'test/HR@10', 'full/nothing', ''])
def test_a_metric_that_is_none_is_refused(text):
  message = small.error_of(Objective.of, text, RunConfig())
  assert 'there is no validation metric' in message and 'NDCG@10' in message


class Uniform:
  """A space of one setting."""

  def suggest(self, trial):
    return {'dropout': f'{trial.suggest_float("dropout", 0, 0.5):.4g}'}


@pytest.fixture
def fake_training(monkeypatch):
  """Trials train nothing: a queue of curves, one value per round and seed, or
  errors, stands for the training. Returns the queue."""
  curves = []

  def train_seeds(simulations, on_round):
    curve = curves.pop(0)
    if isinstance(curve, BaseException):
      raise curve
    lines = [[] for _ in curve[0]]
    for number, values in enumerate(curve, 1):
      records = [record(number, hits=v, full=v) for v in values]
      for line, one in zip(lines, records):
        line.append(one)
      on_round(number, [one['val'] for one in records])
    return [], [], [], lines

  class Built:
    program = None

    def with_seed(self, seed):
      return self

  monkeypatch.setattr(ablation, 'train_seeds', train_seeds)
  monkeypatch.setattr(sweep.simulation_lib, 'build', lambda *x: Built())
  return curves


def trials(seeds=(0,), **changes):
  base = RunConfig.from_flat_dict({'num_rounds': 2, 'select_by': 'last'})
  return sweep.Trials(
    base.changed(changes),
    Uniform(),
    Objective('full', 'NDCG@10'),
    seeds,
    Loaded(SimpleNamespace(), (), []),
  )


def run_next(study, of):
  trial, changes = of.ask(study)
  of.run(study, trial, changes, lambda number, values: None)
  return study.trials[trial.number]


def in_memory(pruner='none'):
  built = parts.built(pruner, sweep.PRUNERS, sweep.Pruner, 'pruner')
  return optuna.create_study(
    direction='maximize', pruner=built.build(RunConfig())
  )


def test_a_trial_below_the_median_ends_early(fake_training):
  study, of = in_memory('median,trials=2'), trials(seeds=(0, 1))
  fake_training += [
    [(0.1, 0.3), (0.2, 0.4)],
    [(0.3, 0.5), (0.1, 0.2)],
    [(0.2, 0.3), (0.9, 0.9)],  # mean 0.25 < median of 0.2 and 0.4
    [(0.3, 0.4), (0.4, 0.6)],
  ]
  found = [run_next(study, of) for _ in range(4)]
  assert [t.state.name for t in found] == [
    'COMPLETE',
    'COMPLETE',
    'PRUNED',
    'COMPLETE',
  ]
  assert [t.value for t in sweep.complete(study)] == pytest.approx(
    [0.5, 0.3, 0.15]
  )
  assert found[0].user_attrs[sweep.OF_SEEDS] == [0.2, 0.4]
  assert found[0].user_attrs[sweep.ROUND] == [2, 2]
  assert found[2].intermediate_values == {1: pytest.approx(0.25)}
  assert len(sweep.finished(study)) == 4


@pytest.mark.parametrize('pruner', ['hyperband,rounds=1', 'none'])
def test_other_pruners(fake_training, pruner):
  study, of = in_memory(pruner), trials()
  fake_training += [[(1 / n,), (1 / n,)] for n in range(1, 9)]
  states = [run_next(study, of).state.name for _ in range(8)]
  assert states[0] == 'COMPLETE' and ('PRUNED' in states) == (pruner != 'none')


def test_a_trial_in_its_last_round_is_not_pruned(fake_training):
  study, of = in_memory('median,trials=1'), trials()
  fake_training += [[(0.1,), (0.5,)], [(0.2,), (0.3,)]]
  run_next(study, of)
  assert run_next(study, of).state.name == 'COMPLETE'


@pytest.mark.parametrize('pruner', ['hyperband,rounds=20', 'median,rounds=20'])
def test_a_pruner_that_would_prune_nothing_is_refused(pruner):
  message = small.error_of(in_memory, pruner)
  assert 'rounds=20 of the pruner' in message and '`num_rounds=20`' in message


def test_a_trial_that_diverges_does_not_end_the_sweep(fake_training):
  study, of = in_memory(), trials()
  fake_training += [UserError('round 1: diverged'), [(0.1,), (0.2,)]]
  first, second = run_next(study, of), run_next(study, of)
  assert first.user_attrs[sweep.REFUSED] == 'round 1: diverged'
  assert sweep.complete(study) == [second]


def test_a_killed_sweep_goes_on(fake_training):
  """Killed in trial 1: it is tried again, once, and all are those of an
  uninterrupted sweep."""
  straight, of = in_memory(), trials()
  fake_training += [[(0.1,), (0.2,)]] * 3
  expected = [run_next(straight, of).params for _ in range(3)]

  fake_training += [[(0.1,), (0.2,)], KeyboardInterrupt()]
  study = in_memory()
  run_next(study, trials())
  with pytest.raises(KeyboardInterrupt):
    run_next(study, trials())
  assert sweep.take_back(study) == [1]
  fake_training += [[(0.1,), (0.2,)]] * 2
  assert [run_next(study, trials()).params for _ in range(2)] == expected[1:]

  fake_training += [[(0.1,), (0.2,)], KeyboardInterrupt()]
  study = in_memory()
  run_next(study, trials())
  with pytest.raises(KeyboardInterrupt):
    run_next(study, trials())
  assert sweep.take_back(study) == [1] and sweep.take_back(study) == []
  fake_training += [KeyboardInterrupt()]
  with pytest.raises(KeyboardInterrupt):
    run_next(study, trials())
  found = study.trials
  assert [t.params for t in found] == [*expected[:2], expected[1]]
  assert [t.state.name for t in found] == ['COMPLETE', 'FAIL', 'RUNNING']
  # Twice is enough: it may be what ends the process.
  assert sweep.take_back(study) == [2]
  fake_training += [[(0.1,), (0.2,)]]
  last = run_next(study, trials())
  assert last.state.name == 'COMPLETE' and last.params == expected[2]


def test_what_matters_is_told_of_enough_trials():
  study = optuna.create_study(direction='maximize')
  for number in range(40):
    trial = study.ask()
    x, _ = trial.suggest_float('x', 0, 1), trial.suggest_float('y', 0, 1)
    assert sweep.importance(study) == {} or number >= 10
    study.tell(trial, 1 - (x - 0.5) ** 2)
  found = sweep.importance(study)
  assert list(found) == ['x', 'y'] and found['x'] > 2 * found['y']


def test_a_damaged_study_is_refused(tmp_path):
  path = tmp_path / 'trials.db'
  path.write_text('nothing')
  assert 'trials.db: cannot be opened' in small.error_of(
    sweep.open_study, path, None
  )


@pytest.mark.slow
def test_a_sweep_of_two_trials(ml_1m, tmp_path):
  space, workdir = tmp_path / 'space.txt', tmp_path / 'sweep'
  space.write_text('--server_learning_rate=log(1e-3,1e-2)\n')
  given = [*TINY, f'--data_dir={ml_1m}', f'--workdir={workdir}']
  given += [f'--space={space}', '--experts=none', '--seeds=0,1']
  out, _ = run('sweep', *given, '--trials=2')
  assert '0 of 2 trials are there' in out and 'trial 1  round 2/2  val' in out

  table = (workdir / 'trials.md').read_text()
  assert out.strip().splitlines()[-1].endswith('best.flags') and table in out
  with contextlib.closing(sqlite3.connect(workdir / 'trials.db')) as database:
    rows = database.execute(
      'select trial_id, value from trial_values order by value desc'
    ).fetchall()
    (changes,) = database.execute(
      'select value_json from trial_user_attributes '
      f"where trial_id={rows[0][0]} and key='changes'"
    ).fetchone()
  assert len(rows) == 2 and f'{rows[0][1]:.4f}' in table.splitlines()[4]
  # The flagfile is the base with what the best trial changed.
  lines = (workdir / 'best.flags').read_text().splitlines()
  flags = dict(x[2:].split('=', 1) for x in lines if not x.startswith('#'))
  base = dict(
    x[2:].split('=', 1) for x in given if x[2:].split('=')[0] in flags
  )
  assert RunConfig.from_flat_dict(flags) == RunConfig.from_flat_dict(
    base | json.loads(changes)
  )
  # All are there: nothing is trained.
  again, _ = run('sweep', *given, '--trials=2')
  assert '2 of 2 trials are there' in again and 'round 2/2' not in again
  space.write_text('--server_learning_rate=log(1e-3,2e-2)\n')
  message = refused(*given, '--dropout=0.3', binary='sweep')
  assert 'another sweep (dropout=0.0, now 0.3; --server_learning' in message
  assert 'now --server_learning_rate=log(1e-3,2e-2)); name' in message
