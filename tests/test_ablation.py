"""Variants files, seeds, and the tables of `experiments.ablate`."""

import json

import numpy as np
import pytest

from experiments import ablate
from experiments import variants as variants_lib
from fedmmr_jax.data.load import Loaded
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import ablation
from fedmmr_jax.evaluation.ablation import Outcome, Variant
from fedmmr_jax.evaluation.ranking import Ranks
from fedmmr_jax.runs import provenance
from tests import small
from tests.test_cli import refused, ROOT, run, TINY


def variants(tmp_path, text):
  path = tmp_path / 'variants.txt'
  path.write_text(text)
  return variants_lib.read(path)


def test_a_variants_file(tmp_path):
  assert variants(
    tmp_path,
    """
      # a comment
      full:
      ids only: --item_embedding=id --experts=none  # and one more
      alone: @local_only --local_epochs=3
  """,
  ) == [
    Variant('full', '', {}),
    Variant('ids only', '', {'item_embedding': 'id', 'experts': 'none'}),
    Variant('alone', '@local_only', {'local_epochs': '3'}),
  ]


@pytest.mark.parametrize(
  'text, message',
  [
    ('', 'no variant'),
    ('full', "line 1: 'full' is not name"),
    (': --seed=1', 'is not name'),
    ('full:\nother: seed=1', "line 2: 'seed=1' is neither"),
    ('full:\nother: @nonsense', "'@nonsense' is neither"),
    ('full:\nfull: --seed=1', "'full' comes twice"),
    ('full:\nzero: @zeroed --dropout=0', 'takes no flags'),
    ('pop: @popularity', 'the first variant is the baseline'),
  ],
)
def test_a_malformed_variants_file(tmp_path, text, message):
  with pytest.raises(UserError, match=message):
    variants(tmp_path, text)


def test_the_files_that_come_along_are_well_formed():
  files = sorted((ROOT / 'experiments' / 'ablations').glob('*.txt'))
  assert files
  for path in files:
    assert len(variants_lib.read(path)) > 2


def outcome(sampled, full=None):
  full = sampled if full is None else full
  ranks = Ranks(np.array(full), np.array(sampled), np.zeros_like(full))
  return Outcome({'test': ranks}, [1], {}, {}, 1.0)


def test_users_are_averaged_over_seeds_before_they_are_compared():
  # Seeds × users; hit at 10 where the rank is below 10.
  ours, baseline = outcome([[0, 20, 3], [0, 5, 20]]), outcome([[0, 20, 20]] * 2)
  np.testing.assert_allclose(
    ours.of_each_user('sampled', 'HR@10'), [1.0, 0.5, 0.5]
  )
  assert ours.of_each_seed('sampled', 'HR@10') == [2 / 3, 2 / 3]
  difference = ours.difference(baseline, 'sampled', 'HR@10')
  assert difference.mean == pytest.approx(1 / 3)


def test_variants_compare_at_other_cutoffs_without_new_ranks():
  found = outcome([[0, 20, 3], [0, 5, 20]])._replace(at=(1, 10, 50))
  assert found.headlines[2:] == tuple(
    (protocol, metric)
    for metric in ('HR@1', 'NDCG@1', 'HR@50', 'NDCG@50')
    for protocol in ('sampled', 'full')
  )
  assert found.of_each_seed('full', 'HR@1') == [1 / 3, 1 / 3]
  assert found.of_each_seed('full', 'HR@50') == [1, 1]
  assert found.of_each_seed('full', 'HR@10') == [2 / 3, 2 / 3]


def test_exposure_is_compared_over_users_who_may_see_the_target():
  def exposed(aimed):
    found = outcome([[0, 20, 3, 4]] * 2)
    ranks = found.ranks['test']._replace(aimed=np.array(aimed))
    return found._replace(ranks={'test': ranks})

  attacked = exposed([[0, 9, -1, 30], [5, 10, -1, 30]])
  clean = exposed([[50, 70, -1, 0]] * 2)
  assert attacked.headlines[2] == ('full', 'exposure@10')
  np.testing.assert_allclose(
    attacked.of_each_user('full', 'exposure@10'), [1, 0.5, np.nan, 0]
  )
  assert attacked.of_each_seed('full', 'exposure@10') == [2 / 3, 1 / 3]
  difference = attacked.difference(clean, 'full', 'exposure@10')
  assert difference.mean == pytest.approx(0.5 - 1 / 3)
  assert len(outcome([[0]]).headlines) == 2
  outcomes = {'clean': clean, 'attacked': attacked}
  differences = ablation.differences(outcomes)
  told = ablate.as_json(outcomes, differences)['attacked']
  assert told['seeds']['test']['full exposure@10'] == [2 / 3, 1 / 3]
  assert 'sampled exposure@10' not in told['seeds']['test']
  assert told['difference']['full exposure@10']['mean'] == difference.mean


def test_variants_under_attack_rank_the_same_clients():
  configs = [
    small.config(attack=text)
    for text in (
      'sleeping,share=0.2',
      'sign_flip,share=0.2',
      'sign_flip,share=0.2,draw=1',
      'none',
    )
  ]
  names = [Variant(name, '', {}) for name in 'abcd']
  ablate.check_attacks('grid.txt', names[:2], configs[:2])
  ablate.check_attacks('grid.txt', names[3:], configs[3:])
  for number in (2, 3):
    message = small.error_of(
      ablate.check_attacks,
      'grid.txt',
      [names[0], names[number]],
      [configs[0], configs[number]],
    )
    assert f"grid.txt: 'a' and {names[number].name!r} have other" in message


def test_a_figure_that_only_some_seeds_or_rounds_have():
  means = [
    {'rec_loss': None, 'w_visual': v, 'memory_age': 1.0}
    for v in (None, 0.25, 0.75)
  ]
  assert ablation._mean(means) == {'rec_loss': None, 'w_visual': 0.5}
  assert ablate._figure(None, None) == '–'
  assert ablate._figure(None, 0.5) == '– → 0.5'


@pytest.mark.slow
def test_a_diverged_client_alone_is_an_error_and_no_hit():
  simulation = small.simulation(
    **small.PLAIN, client_optimizer='sgd', client_learning_rate=1e30
  )
  with pytest.raises(UserError, match='NaN or infinite'):
    simulation.rank_local_only(simulation.init_state())


@pytest.mark.slow
def test_a_diverged_variant_ends_at_once():
  told = []
  config = small.config(
    **small.PLAIN,
    client_optimizer='sgd',
    client_learning_rate=1e30,
    num_rounds=9,
    eval_every=9,
  )
  with pytest.raises(UserError, match='round 1: .*diverged; start anew'):
    ablation.run_trained(
      config,
      Loaded(small.dataset(), (), []),
      [0, 1],
      lambda number, text: told.append(number),
    )
  assert not told


@pytest.mark.slow
@pytest.mark.parametrize('drift_control', ['scaffold', 'mime_lite'])
def test_a_client_alone_needs_no_drift_control(drift_control):
  simulation = small.simulation(
    **small.PLAIN, client_optimizer='sgd', drift_control=drift_control
  )
  simulation.rank_local_only(simulation.init_state())


@pytest.fixture(scope='module')
def trained():
  config = small.config(**small.ONE_EXPERT, num_rounds=2, client_fraction=0.5)
  loaded = Loaded(small.dataset(), (), [])
  told = []
  found = ablation.run_trained(
    config, loaded, [0, 1], lambda number, text: told.append(number)
  )
  return config, loaded, told, found


@pytest.mark.slow
def test_every_seed_is_tested_at_its_own_best_round(trained):
  config, loaded, told, (found, simulations, states) = trained
  assert told == [1, 2]
  assert found.ranks['test'].full.shape == (2, loaded.dataset.num_clients)
  for i, (simulation, state) in enumerate(zip(simulations, states)):
    assert simulation.config.seed == i
    metrics, _ = simulation.evaluate(state, 'test')
    assert (
      found.of_each_seed('full', 'NDCG@10')[i] == metrics['full']['NDCG@10']
    )
    assert int(state.server.round) == found.best_rounds[i]


def test_a_metric_below_minus_one_has_a_best_round_too(monkeypatch):
  values = iter([-3.0, -2.0, -4.0])
  monkeypatch.setattr(
    ablation.Simulation,
    'validate',
    lambda self, state: {'full': {'NDCG@10': next(values)}},
  )
  monkeypatch.setattr(ablation, 'run_round', lambda _, states, n: (states, {}))
  monkeypatch.setattr(
    ablation.training, 'traffic', lambda *_: ablation.Best(0, 0, None)
  )
  simulation = small.simulation(num_rounds=3, select_by='full/NDCG@10')
  ((best,), *_) = ablation.train_seeds([simulation], lambda *_: None)
  assert (best.value, best.round) == (-2.0, 2) and best.state is not None


@pytest.mark.slow
def test_features_that_are_taken_away_change_the_ranks(trained):
  config, loaded, _, (found, simulations, states) = trained
  ranks = {
    change: ablation.run_special(
      Variant(change, change, {}), config, loaded, [0, 1], simulations, states
    )
    .ranks['test']
    .full
    for change in ('@zeroed', '@shuffled')
  }
  assert (ranks['@zeroed'] != found.ranks['test'].full).any()
  assert (ranks['@shuffled'] != ranks['@zeroed']).any()


@pytest.mark.slow
def test_baselines_rank_everybody(trained):
  config, loaded, *_ = trained
  for special in ('@popularity', '@local_only'):
    ranks = ablation.run_special(
      Variant(special, special, {}), config, loaded, [0, 1], [], []
    ).ranks
    assert ranks['test'].full.shape == (2, loaded.dataset.num_clients)
    assert ranks['val'].full.shape == (2, loaded.dataset.num_clients)


@pytest.mark.slow
def test_a_client_alone_learns_its_own_training_items():
  # Many local epochs: its ranks beat those of the model it started from.
  simulation = small.simulation(
    **small.PLAIN, local_epochs=40, client_learning_rate=0.01
  )
  state = simulation.init_state()
  before = simulation.evaluate(state, 'test')[1]
  after = simulation.rank_local_only(state)
  assert sorted(after) == ['test', 'val']
  assert (after['test'].full != before.full).any()
  assert not after['test'].bad_scores.any()


@pytest.mark.slow
def test_ablate_writes_a_table_a_figure_and_goes_on(ml_1m, tmp_path):
  (tmp_path / 'v.txt').write_text(
    'full:\nbackbone: --experts=none\npopular: @popularity\n'
  )
  arguments = [
    *TINY,
    '--experts=semantic',
    f'--data_dir={ml_1m}',
    f'--variants={tmp_path / "v.txt"}',
    '--seeds=0,1',
    f'--workdir={tmp_path / "out"}',
  ]
  out, _ = run('ablate', *arguments)
  assert '| backbone |' in out
  for name in ('ablation.md', 'ablation.png', 'bytes.png', 'ablation.json'):
    assert (tmp_path / 'out' / name).stat().st_size > 100
  told = json.loads((tmp_path / 'out' / 'ablation.json').read_text())
  assert list(told) == ['full', 'backbone', 'popular']
  assert len(told['full']['seeds']['test']['sampled HR@10']) == 2
  assert told['full']['difference']['full NDCG@10']['mean'] == 0
  table = (tmp_path / 'out' / 'ablation.md').read_text()
  again, _ = run('ablate', *arguments)
  assert again.count('found in') == 3
  assert (tmp_path / 'out' / 'ablation.md').read_text() == table


def test_an_outcome_of_another_program_is_not_used(
  tmp_path, monkeypatch, capsys
):
  config, loaded = small.config(), Loaded(small.dataset(), (), [])
  trained = []

  def train(variant, *_):
    trained.append(variant.name)
    return outcome([[0, 1]]), None

  monkeypatch.setattr(ablate, '_train', train)

  def outcomes(**program):
    monkeypatch.setattr(provenance, 'program', lambda: program)
    ablate._outcomes([Variant('full', '', {})], [config], loaded, [0], tmp_path)
    return capsys.readouterr().out

  first = dict(source='1a', jax='0.1', devices=1)
  outcomes(**first)
  assert 'found in' in outcomes(**first)
  assert trained == ['full']
  said = outcomes(source='2b', jax='0.1', devices=4).splitlines()[0]
  assert said.endswith('is not used: source 1a, now 2b; devices 1, now 4')
  assert trained == ['full'] * 2
  # It is not thrown away.
  assert 'found in' in outcomes(**first)
  # One of before a result told what had made it.
  for path in tmp_path.glob('*.npz'):
    path.unlink()
  key = ablate._key(Variant('full', '', {}), config, [0], loaded)
  (tmp_path / f'{key}.npz').write_bytes(b'old')
  assert 'it does not say what made it' in outcomes(**first)


def test_any_change_of_the_code_is_another_program(tmp_path):
  (tmp_path / 'part').mkdir()
  (tmp_path / 'part' / 'a.py').write_text('x = 1\n')
  before = provenance.source_hash(tmp_path)
  (tmp_path / 'part' / 'a.py').write_text('x = 2\n')
  changed = provenance.source_hash(tmp_path)
  (tmp_path / 'part' / 'a.py').rename(tmp_path / 'part' / 'b.py')
  (tmp_path / 'note.txt').write_text('no code')
  assert len({before, changed, provenance.source_hash(tmp_path)}) == 3
  assert {'fedmmr_jax', 'source', 'jax', 'jaxlib', 'backend', 'devices'} <= set(
    provenance.program()
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  'line, message',
  [
    ('--nonsense=1', "unknown setting 'nonsense'"),
    ('--num_rounds=few', '--num_rounds=few'),
    ('--num_rounds=0', 'below its minimum'),
    ('--eval_clients=2', 'the same for all variants'),
    ('--top_k_users=3', 'the same for all variants'),
  ],
)
def test_ablate_refuses_a_bad_variant(ml_1m, tmp_path, line, message):
  (tmp_path / 'v.txt').write_text(f'full:\nother: {line}\n')
  error = refused(
    *TINY,
    f'--data_dir={ml_1m}',
    f'--variants={tmp_path / "v.txt"}',
    f'--workdir={tmp_path / "out"}',
    binary='ablate',
  )
  assert "variant 'other'" in error and message in error


@pytest.mark.slow
@pytest.mark.parametrize('seeds', ['', '1,1', 'one', '-1', '4294967296'])
def test_ablate_refuses_bad_seeds(ml_1m, tmp_path, seeds):
  error = refused(
    *TINY,
    f'--data_dir={ml_1m}',
    f'--seeds={seeds}',
    f'--workdir={tmp_path / "out"}',
    binary='ablate',
  )
  assert '--seeds' in error


def test_a_third_expert_and_a_further_metric_are_in_the_tables():
  def depth(ranks):
    return {'depth': ranks / 2}

  shown = {'rec_loss': 2.0, 'w_visual': 0.5, 'w_audio': 0.25}
  both = {
    name: outcome(ranks)._replace(training=shown, metrics=(depth,))
    for name, ranks in (('base', [[0, 4]]), ('other', [[2, 6]]))
  } | {'none': outcome([[8, 8]])._replace(metrics=(depth,))}
  differences = ablation.differences(both)
  table = ablate.markdown(both, differences, small.config(), [0])
  assert '| variant | rec. loss | router visual | router audio | sec' in table
  assert '| other | – → 2 | – → 0.5 | – → 0.25 | 1 |' in table
  assert '| none | – | – | – | 1 |' in table
  assert '| variant | depth sampled | difference | depth full |' in table
  assert '| other | 2.0000 | +1.0000 [+1.0000, +1.0000] | 2.0000 |' in table
  told = ablate.as_json(both, differences)
  assert told['other']['seeds']['test']['full depth'] == [2]
  assert told['other']['difference']['sampled depth']['mean'] == 1
