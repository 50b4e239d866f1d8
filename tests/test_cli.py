"""The binaries as a user runs them: output, exit status, bad input."""

import json
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from pyarrow import csv

from tests import binaries

ROOT = pathlib.Path(__file__).resolve().parents[1]
PRESETS = ROOT / 'experiments' / 'presets'
TINY = (
  '--dataset=ml-1m',
  '--num_rounds=2',
  '--hidden_dim=16',
  '--num_blocks=1',
  '--num_heads=2',
  '--dropout=0',
  '--expert_form=attention,heads=2',
  '--max_seq_len=5',
  '--batch_size=4',
  '--num_negatives=3',
  '--sampled_negatives=5',
  '--client_fraction=0.5',
  '--memory=surprise,capacity=6,retrieval_size=3',
)


def run(binary, *flags, status=0):
  """Runs a binary; returns (stdout, stderr)."""
  done = binaries.run(binary, [str(flag) for flag in flags])
  assert done.returncode == status, done.stdout + done.stderr
  return done.stdout, done.stderr


def refused(*flags, binary='train') -> str:
  """The one line of an error; checks status 2 and that it is one line."""
  _, stderr = run(binary, *flags, status=2)
  lines = stderr.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: '), stderr
  return lines[0]


@pytest.mark.slow
def test_train_evaluate_inspect(ml_1m, tmp_path):
  workdir = tmp_path / 'run'
  out, _ = run('train', *TINY, f'--data_dir={ml_1m}', f'--workdir={workdir}')
  assert 'coverage 27 of 27' in out
  assert 'no gate stands before the experts' in out
  assert 'round 2/2' in out and 'test, full' in out
  for name in (
    'config.json',
    'metrics.jsonl',
    'summary.json',
    'report.html',
    'rounds/1',
    'rounds/2',
  ):
    assert (workdir / name).exists(), name

  # Without --resume the folder is refused, with it nothing is left to do.
  before = {p.name: p.read_bytes() for p in workdir.glob('*.json*')}
  assert 'already holds a run' in refused(
    *TINY, f'--data_dir={ml_1m}', f'--workdir={workdir}'
  )
  assert before == {p.name: p.read_bytes() for p in workdir.glob('*.json*')}
  assert '--num_negatives=3, not 4' in refused(
    f'--workdir={workdir}', '--resume', '--num_negatives=4'
  )
  # A run is continued with its own settings: none need be repeated, and one
  # that the version which began it did not know has its default.
  started = json.loads((workdir / 'config.json').read_text())
  del started['flags']['vocabulary'], started['checksum']
  (workdir / 'config.json').write_text(json.dumps(started))
  out, _ = run('train', f'--workdir={workdir}', '--resume', '--num_rounds=3')
  assert 'round 3/3' in out and 'round 2/3' not in out

  # evaluate repeats the summary's numbers.
  summary = json.loads((workdir / 'summary.json').read_text())
  table = tmp_path / 'users.csv'
  out, _ = run(
    'evaluate',
    f'--workdir={workdir}',
    '--json',
    '--slices',
    f'--per_user={table}',
    f'--compare={workdir}/rounds/1',
  )
  told = json.loads(out)
  assert {p: told['test'][p] for p in ('sampled', 'full')} == summary['test']
  rows = csv.read_csv(table)
  assert rows.num_rows == 6
  assert np.mean(rows['full/MRR'].to_numpy()) == pytest.approx(
    summary['test']['full']['MRR']
  )
  for parts in told['slices'].values():
    assert sum(part['users'] for part in parts.values()) == 6
  difference = told['difference']['full']['MRR']
  assert difference['low'] <= difference['mean'] <= difference['high']
  assert 'x.txt: end it in' in refused(
    f'--workdir={workdir}', '--per_user=x.txt', binary='evaluate'
  )
  blind, _ = run(
    'evaluate',
    f'--workdir={workdir}',
    '--json',
    '--features=zeroed',
    f'--compare={workdir}',
    '--metrics=recbole',
  )
  blind = json.loads(blind)
  ndcg = summary['test']['full']['NDCG@10']
  assert blind['test']['full']['ndcg@10'] != ndcg
  # Compared with the run as it was trained, by the metrics asked for.
  assert blind['difference']['full']['ndcg@10']['mean'] == pytest.approx(
    blind['test']['full']['ndcg@10'] - ndcg
  )
  assert blind['difference']['to'].endswith(', features as trained')
  out, _ = run(
    'evaluate',
    f'--workdir={workdir}',
    '--metrics=recbole',
    '--protocol=full',
    '--eval_clients=1',
  )
  assert 'precision@10' in out and 'sampled' not in out

  out, _ = run('inspect_checkpoint', f'--workdir={workdir}', 'list')
  assert '<- best' in out
  out, _ = run('inspect_checkpoint', f'--workdir={workdir}', 'show', 'last')
  assert 'visual_expert/query/kernel' in out and '8 x 8' in out
  # Into a pipe that nobody reads any more, as of head or less.
  piped = subprocess.run(
    f'{sys.executable} -m experiments.inspect_checkpoint '
    f'--workdir={workdir} show last | true',
    cwd=ROOT,
    shell=True,
    capture_output=True,
    text=True,
    check=True,
  )
  assert not piped.stderr
  out, _ = run(
    'inspect_checkpoint',
    f'--workdir={workdir}',
    '--json',
    '--k=4',
    'recommend',
    'best',
    '3',
  )
  consumed = {
    line.split('::')[1]
    for line in (ml_1m / 'ratings.dat').read_text().splitlines()
    if line.startswith('3::')
  }
  entries = json.loads(out)['entries']
  assert len(entries) == 4
  assert not consumed & {str(e['item_id']) for e in entries}
  assert all(e['title'].startswith('Amélie') for e in entries)
  assert entries == sorted(entries, key=lambda e: -e['score'])
  exported = tmp_path / 'params.npz'
  run('inspect_checkpoint', f'--workdir={workdir}', 'export', 'last', exported)
  with np.load(exported) as arrays:
    assert arrays['visual_expert/query/kernel'].shape == (8, 8)
  assert 'exists' in refused(
    f'--workdir={workdir}',
    'export',
    'last',
    exported,
    binary='inspect_checkpoint',
  )
  out, _ = run(
    'inspect_checkpoint', f'--workdir={workdir}', '--json', 'diff', '1', '1'
  )
  assert all(
    g['distance'] == 0 and abs(g['cosine'] - 1) < 1e-9
    for g in json.loads(out)['groups'].values()
  )
  out, _ = run(
    'inspect_checkpoint', f'--workdir={workdir}', '--k=3', 'router', 'last'
  )
  assert (
    'visual weight' in out and out.count('Amélie') == 6 and 'least' not in out
  )
  routed = json.loads(
    run(
      'inspect_checkpoint', f'--workdir={workdir}', '--json', 'router', 'last'
    )[0]
  )
  assert (
    sum(b['items'] for b in routed['histogram_visual'])
    == 27
    == len(routed['w_visual'])
  )
  ordered = [e['w_visual'] for e in routed['most_visual']]
  assert ordered == sorted(ordered, reverse=True)
  out, _ = run(
    'inspect_checkpoint', f'--workdir={workdir}', '--json', 'show', '1'
  )
  shown = json.loads(out)
  assert shown['flags']['num_negatives'] == 3
  assert sum(g['count'] for g in shown['groups'].values()) == sum(
    p['count'] for p in shown['parameters']
  )
  user = next(
    u
    for u in range(1, 7)
    if json.loads(
      run(
        'inspect_checkpoint',
        f'--workdir={workdir}',
        '--json',
        'memory',
        'last',
        u,
      )[0]
    )['entries']
  )
  out, _ = run(
    'inspect_checkpoint', f'--workdir={workdir}', 'memory', 'last', user
  )
  assert 'Amélie' in out
  for words, expected in (
    (('show', 9), 'no round 9; saved: 1, 2, 3'),
    (('memory', 1, 99), "no user '99'"),
    (('bogus',), 'unknown command'),
  ):
    assert expected in refused(
      f'--workdir={workdir}', *words, binary='inspect_checkpoint'
    )

  # The page again, and over another one.
  (workdir / 'report.html').unlink()
  run('report', workdir)
  assert (workdir / 'report.html').exists()
  run(
    'report',
    '--compare',
    workdir,
    workdir,
    f'--output={tmp_path / "both.html"}',
  )
  assert (tmp_path / 'both.html').exists()
  assert 'name one run folder' in refused(binary='report')
  assert 'no such file' in refused(tmp_path, binary='report')

  # A damaged round is told by name; the others can still be seen.
  metadata = workdir / 'rounds' / '2' / '_CHECKPOINT_METADATA'
  metadata.write_bytes(metadata.read_bytes()[:-9])
  out, _ = run('inspect_checkpoint', f'--workdir={workdir}', 'list')
  assert 'DAMAGED' in out and f'{metadata}: damaged' in out
  assert f'{metadata}: damaged' in refused(
    f'--workdir={workdir}', 'show', '2', binary='inspect_checkpoint'
  )
  (workdir / 'ids.json').write_text(
    (workdir / 'ids.json').read_text().replace('Am', 'An', 1)
  )
  assert 'ids.json: damaged or edited' in refused(
    f'--workdir={workdir}', 'memory', 'last', user, binary='inspect_checkpoint'
  )
  config = workdir / 'config.json'
  config.write_text(
    config.read_text().replace('"num_negatives": 3', '"num_negatives": 5')
  )
  assert 'config.json: damaged or edited' in refused(
    f'--workdir={workdir}', '--resume'
  )


@pytest.mark.slow
def test_stages_follow_one_another(ml_1m, tmp_path):
  stages, workdir = tmp_path / 'stages.txt', tmp_path / 'staged'
  stages.write_text(
    'backbone: --experts=none  # alone\n'
    'alignment: --experts=semantic --load=embeddings,backbone '
    '--freeze=embeddings,backbone\n'
  )
  flags = (
    *TINY,
    f'--data_dir={ml_1m}',
    f'--workdir={workdir}',
    f'--stages={stages}',
  )
  out, _ = run('train', *flags)
  assert 'stage 2 of 2: alignment' in out
  assert f'warm start from {workdir}/1-backbone/rounds/' in out
  assert 'items, matched by id' in out and 'not asked for' in out
  for name in ('1-backbone', '2-alignment'):
    assert (workdir / name / 'report.html').exists()
  assert 'already holds staged runs' in refused(*flags)
  # Nothing but the folder is needed to go on.
  (workdir / '2-alignment' / 'summary.json').unlink()
  out, _ = run('train', '--resume', f'--workdir={workdir}')
  assert f'finished, in {workdir}/1-backbone' in out
  assert 'round 2/2' not in out and 'test, full' in out
  for line, message in (
    ('a b: --experts=none', 'a plain word'),
    ('a: --expert=none', "unknown setting 'expert'"),
  ):
    stages.write_text(line)
    assert message in refused(
      *TINY,
      f'--data_dir={ml_1m}',
      f'--stages={stages}',
      f'--workdir={tmp_path / "other"}',
    )
  assert not (tmp_path / 'other').exists()


@pytest.mark.slow
def test_a_full_disk_is_one_line(ml_1m, tmp_path, monkeypatch):
  command = [
    sys.executable,
    '-m',
    'experiments.train',
    *TINY,
    '--experts=none',  # less to compile
    '--hidden_dim=32',
    '--num_rounds=3',
    f'--data_dir={ml_1m}',
    '--compilation_cache=',
    f'--workdir={tmp_path / "run"}',
  ]
  # No file may pass 24 kB: config.json can be written, a round cannot.
  monkeypatch.setenv('JAX_ENABLE_COMPILATION_CACHE', 'false')
  done = subprocess.run(
    ['bash', '-c', 'ulimit -f 24; exec "$@"', 'bash', *command],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2, done.stdout + done.stderr
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1 and 'rounds/1: cannot be saved (' in lines[0]
  assert lines[0].endswith('no round is saved')


@pytest.mark.slow
def test_a_signal_stops_after_the_round_and_the_run_goes_on(ml_1m, tmp_path):
  number = signal.SIGTERM  # SIGINT and SIGHUP are handled alike
  workdir = tmp_path / 'run'
  command = [
    sys.executable,
    '-m',
    'experiments.train',
    *TINY,
    '--experts=none',
    '--num_rounds=100000',
    '--patience=0',
    '--eval_every=100000',
    f'--data_dir={ml_1m}',
    f'--workdir={workdir}',
  ]
  with subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    for line in process.stdout:
      if line.startswith('round '):
        process.send_signal(number)
        break
    out, err = process.communicate()
  assert process.returncode == 130, out + err
  assert 'Traceback' not in err
  assert f'--resume --workdir={workdir}' in err
  saved = len((workdir / 'metrics.jsonl').read_text().splitlines())
  assert not (workdir / 'summary.json').exists()
  out, _ = run(
    'train', '--resume', f'--workdir={workdir}', f'--num_rounds={saved + 1}'
  )
  assert f'round {saved + 1}/{saved + 1}' in out


@pytest.mark.slow
def test_bad_data_is_refused_and_nothing_is_written(ml_1m, tmp_path):
  workdir = tmp_path / 'run'
  flags = (*TINY, f'--data_dir={ml_1m}', f'--workdir={workdir}')
  ratings = (ml_1m / 'ratings.dat').read_text()
  lines = ratings.splitlines()
  lines[16] = '3::twelve::5::1000'
  (ml_1m / 'ratings.dat').write_text('\n'.join(lines))
  message = refused(*flags)
  assert 'ratings.dat, line 17' in message and 'item id' in message
  (ml_1m / 'ratings.dat').write_text(ratings)

  good = np.load(ml_1m / 'text_features.npy')
  np.save(ml_1m / 'text_features.npy', good[:-1])
  assert 'text_features.npy: 30 rows, but the data set needs 31' in refused(
    *flags
  )
  bad = good.copy()
  bad[12, 3] = np.nan
  np.save(ml_1m / 'text_features.npy', bad)
  assert 'text_features.npy, row 12, column 3: nan' in refused(*flags)
  np.save(ml_1m / 'text_features.npy', good)

  assert '--visual_features=nowhere.npy: no such file' in refused(
    *flags, '--visual_features=nowhere.npy'
  )
  # 27 items were consumed by somebody, 9 of them by each user.
  assert 'only 18 unseen items; lower --num_negatives=19 to 18' in refused(
    *flags, '--num_negatives=19'
  )
  assert not workdir.exists()


@pytest.mark.slow
def test_bad_flags_are_refused(tmp_path):
  assert 'no such file' in refused('--dataset=ml-1m', f'--data_dir={tmp_path}')
  assert 'needs --data_dir' in refused('--dataset=ml-1m')
  message = refused('--flagfile=experiments/presets/papper.flags')
  assert 'papper.flags' in message and 'paper.flags' in message
  assert 'fusion' in refused('--fusion=concat')
  assert 'dropout=1.5 is above' in refused('--dropout=1.5')
  assert 'numrounds' in refused('--numrounds=3')
  assert 'unexpected argument' in refused('num_rounds=3')
  assert '--resume needs --workdir' in refused('--resume')
  assert 'no such folder' in refused(
    f'--workdir={tmp_path}', 'list', binary='inspect_checkpoint'
  )


@pytest.mark.parametrize(
  'preset', sorted(p.name for p in PRESETS.glob('*.flags'))
)
def test_presets_are_valid(preset):
  """Every flag of a preset exists and is within its bounds."""
  code = (
    'from experiments import app, train; from absl import flags; '
    'import sys; flags.FLAGS(sys.argv); app.config_from_flags()'
  )
  subprocess.run(
    [
      sys.executable,
      '-c',
      code,
      f'--flagfile={PRESETS / preset}',
      '--data_dir=somewhere',
    ],
    cwd=ROOT,
    check=True,
  )


@pytest.mark.slow
def test_benchmark(ml_1m):
  flags = (
    *TINY,
    f'--data_dir={ml_1m}',
    '--experts=none',  # less to compile
    '--repeats=1',
    '--catalogues=40',
    '--cohorts=2,1000',
  )
  result = json.loads(run('benchmark', *flags, '--json')[0])
  assert result['gemm_gflops'] > 0 and result['peak_rss_mb'] > 0
  assert set(result['round']['seconds']) == {
    'sampling',
    'local_training',
    'aggregation',
    'evaluation',
  }
  assert 0 <= result['round']['masked_fraction'] < 1
  assert result['loop']['ratio'] > 0
  assert (
    result['saving']['bytes'] > 1000 and result['saving']['waited_seconds'] > 0
  )
  assert [r['cohort'] for r in result['cohort']] == [2]
  assert [r['items'] for r in result['catalogue']] == [40]
  # The same as tables, and of one part alone: not measured again.
  show = 'import json, sys; from experiments import benchmark as b;'
  show += 'told = json.load(sys.stdin); print(b._tables(told));'
  show += 'print("ALONE"); [told.pop(p, 0) for p in b._PARTS.default[1:]];'
  show += 'print(b._tables(told))'
  shown = subprocess.run(
    [sys.executable, '-c', show],
    input=json.dumps(result),
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=True,
  ).stdout
  everything, alone = shown.split('ALONE')
  assert 'seconds a round' in everything
  assert 'local training' in alone and 'items' in alone
  assert 'seconds a round' not in alone
  assert "--cohorts: 'ten' is not a positive number" in refused(
    *flags, '--cohorts=10,ten', binary='benchmark'
  )
  assert '--parts=speed: no such part' in refused(
    *flags, '--parts=speed', binary='benchmark'
  )


def test_a_run_from_the_shell(ml_1m, tmp_path):
  flags = (*TINY, f'--data_dir={ml_1m}', f'--workdir={tmp_path / "run"}')
  matrix = np.random.default_rng(0).normal(size=(31, 4))
  matrix[0] = 0
  np.save(ml_1m / 'audio_features.npy', matrix)
  out, _ = run('train', *flags, '--experts=audio', '--num_rounds=1')
  assert 'round 1/1' in out and 'test, full' in out
  assert 'audio  features  ok' in out
  line = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[0]
  weights = json.loads(line)['train']
  assert weights['w_visual'] is None and 'w_audio' in weights
  out, _ = run('inspect_checkpoint', f'--workdir={tmp_path / "run"}', 'list')
  assert '<- best' in out
