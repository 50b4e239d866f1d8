"""What TensorBoard, Weights & Biases, MLflow and one's own logger are given."""

import pathlib
import struct
import subprocess
import sys

import pytest

import fedmmr_jax as fm
from examples import own_logger
from fedmmr_jax.runs import loggers
from tests import small

RECORD = {
  'round': 3,
  'seconds': 1.5,
  'train': {'loss': 2.0, 'w_visual': None, 'shares': [0.5, 0.5]},
  'val': {'full': {'HR@10': 0.25}},
}
NUMBERS = {'seconds': 1.5, 'train/loss': 2.0, 'val/full/HR_10': 0.25}
SUMMARY = {
  'best_round': 3,
  'test': {'full': {'HR@10': 0.5}},
  'test_by_history': {'2 – 4': {'users': 7}},
  'acceptance': [{'name': 'no number'}],
}
FINAL = {
  'summary/best_round': 3,
  'summary/test/full/HR_10': 0.5,
  'summary/test_by_history/2___4/users': 7,
}
TOLD = {
  'flags': {'hidden_dim': 16, 'data_dir': ''},
  'versions': {'jax': '0.11'},
  'machine': {'cores': 2},
  'data_fingerprint': 'abc',
}
ORIGIN = {
  'versions.jax': '0.11',
  'machine.cores': '2',
  'data_fingerprint': 'abc',
}


class Recorder(fm.Logger):
  """Keeps what it is given; fails in one call if told to."""

  def __init__(self, fails=None):
    self.calls, self._fails = [], fails

  def __eq__(self, other):  # as dataclasses with the same options are
    return isinstance(other, Recorder)

  def _call(self, name, value=None):
    if self._fails == (name, value):
      raise OSError('disk full\nand more')
    self.calls.append((name, value))

  def start(self, folder, told):
    self.folder, self.told = folder, told
    self._call('start')

  def log(self, record):
    self._call('log', record['round'])

  def finish(self, summary):
    self.summary = summary
    self._call('finish')

  def close(self):
    self._call('close')


def started(logger, folder):
  return loggers.Started([logger], folder, TOLD)


def test_numbers_have_names_that_each_tool_takes():
  assert dict(loggers.scalars(RECORD)) == NUMBERS
  assert dict(loggers.scalars(SUMMARY, 'summary/')) == FINAL


def test_one_that_fails_is_left_out_and_the_others_go_on(tmp_path):
  good, bad = Recorder(), Recorder(fails=('log', 2))
  with pytest.warns(UserWarning) as caught:
    with loggers.Started([good, bad], tmp_path, TOLD) as log:
      for number in (1, 2, 3):
        log.log({'round': number})
      log.finish(SUMMARY)
  assert [str(w.message) for w in caught] == [
    'logger Recorder failed at round 2, and is left out from here on: disk full'
  ]
  assert bad.calls == [('start', None), ('log', 1), ('close', None)]
  assert good.calls == [
    ('start', None),
    ('log', 1),
    ('log', 2),
    ('log', 3),
    ('finish', None),
    ('close', None),
  ]


def test_one_that_cannot_start_stops_the_run_before_it_trains(tmp_path):
  first, bad = Recorder(), Recorder(fails=('start', None))
  assert 'logger Recorder cannot start: disk full' == small.error_of(
    loggers.Started, [first, bad], tmp_path, TOLD
  )
  assert first.calls == [('start', None), ('close', None)]
  assert bad.calls == [('close', None)]  # of what it had begun


def test_closing_is_tried_once(tmp_path):
  class Bad(Recorder):
    def close(self):
      super().close()
      raise OSError('disk full')

  late, early = Bad(), Bad(fails=('log', 1))
  with pytest.warns(UserWarning) as caught:
    with loggers.Started([late, early], tmp_path, TOLD) as log:
      log.log({'round': 1})
  assert [str(w.message).split(',')[0] for w in caught] == [
    'logger Bad failed at round 1',
    'logger Bad failed at the end',
  ]
  assert late.calls == [('start', None), ('log', 1), ('close', None)]
  assert early.calls == [('start', None), ('close', None)]


@pytest.mark.parametrize(
  'text, message',
  [
    ('nothing', "no logger 'nothing'; one of tensorboard, wandb, mlflow"),
    ('math:pi', 'math:pi is no fedmmr_jax.runs.loggers.Logger'),
    ('examples.own_logger:Table,file=x', 'no option file; its options: name'),
    ('tensorboard,x=1', 'there is no option x; it has no options'),
  ],
)
def test_a_logger_that_is_none_is_refused(text, message):
  assert message in small.error_of(loggers.of, [text])


def test_loggers_by_name(tmp_path):
  [table] = loggers.of(['examples.own_logger:Table,name=x.txt'])
  assert table == own_logger.Table('x.txt')
  with started(table, tmp_path) as log:
    log.log(RECORD)
  assert (tmp_path / 'x.txt').read_text().splitlines() == [
    'round loss HR@10',
    '3 2.0 0.25',
  ]


@pytest.mark.parametrize(
  'name, module',
  [('tensorboard', 'tensorboardX'), ('wandb', 'wandb'), ('mlflow', 'mlflow')],
)
def test_a_missing_extra_is_told(monkeypatch, name, module):
  monkeypatch.setitem(sys.modules, module, None)
  message = small.error_of(loggers.of, [name])
  assert f"pip install 'fedmmr_jax[{name}]'" in message


def events(folder):
  from tensorboardX.proto import event_pb2

  for path in sorted(folder.iterdir()):
    content, at = path.read_bytes(), 0
    while at < len(content):
      (length,) = struct.unpack_from('<Q', content, at)
      event = event_pb2.Event()
      event.ParseFromString(content[at + 12 : at + 12 + length])
      at += 16 + length
      yield event


def test_tensorboard(tmp_path):
  pytest.importorskip('tensorboardX')
  with started(fm.TensorBoard(), tmp_path) as log:
    log.log(RECORD)
    log.finish(SUMMARY)
  found, texts = {}, ''
  for event in events(tmp_path / 'tensorboard'):
    for value in event.summary.value:
      if value.HasField('tensor'):
        texts += str(value.tensor.string_val)
      else:
        found[value.tag, event.step] = value.simple_value
  assert found == {(name, 3): x for name, x in (NUMBERS | FINAL).items()}
  assert 'hidden_dim = 16' in texts and 'versions.jax = 0.11' in texts
  # A run that goes on writes all rounds again and hides those before.
  (start,) = (
    event
    for event in events(tmp_path / 'tensorboard')
    if event.HasField('session_log')
  )
  assert start.session_log.status == 1 and start.step == 0


FULL_DISK = """
import pathlib, resource, sys
from fedmmr_jax.runs import loggers
logger = loggers.TensorBoard()
with loggers.Started([logger], pathlib.Path(sys.argv[1]), {'flags': {}}) as log:
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
  for number in range(1, 21):
    log.log({'round': number} | {f'x{i}': 1.0 for i in range(2000)})
print('done')
"""


def test_tensorboard_on_a_full_disk_does_not_hold_up_the_run(tmp_path):
  pytest.importorskip('tensorboardX')
  pytest.importorskip('resource')
  found = subprocess.run(
    [sys.executable, '-c', FULL_DISK, str(tmp_path)],
    capture_output=True,
    text=True,
    timeout=60,  # or it would hang
  )
  assert (found.returncode, found.stdout) == (0, 'done\n')
  (line,) = (x for x in found.stderr.splitlines() if 'is left out' in x)
  assert 'TensorBoard failed at round' in line and 'too large' in line


def offline_rounds(folder: pathlib.Path) -> dict[int, dict[str, str]]:
  """Step -> name -> JSON value of the file of an offline run of wandb."""
  from wandb.proto import wandb_internal_pb2

  (path,) = folder.glob('*.wandb')
  content, at, part, found = path.read_bytes(), 7, b'', {}
  while at + 7 <= len(content):  # LevelDB's log format
    if 32768 - at % 32768 < 7:
      at += 32768 - at % 32768
      continue
    _, length, kind = struct.unpack_from('<IHB', content, at)
    part += content[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):  # whole, or its last piece
      record = wandb_internal_pb2.Record()
      record.ParseFromString(part)
      part = b''
      if record.HasField('history'):
        found[record.history.step.num] = {
          ''.join(item.nested_key) or item.key: item.value_json
          for item in record.history.item
        }
  return found


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
  wandb = pytest.importorskip('wandb')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  assert 'mode=no is unknown; choose from' in small.error_of(
    loggers.of, ['wandb,mode=no']
  )
  [logger] = loggers.of(['wandb,project=x,mode=offline'])
  with started(logger, tmp_path) as log:
    log.log(RECORD)
    run = logger._run
    log.finish(SUMMARY)
    assert dict(run.config) == {**TOLD['flags'], 'origin': ORIGIN}
    assert run.summary['summary/test/full/HR_10'] == 0.5
  wandb.teardown()  # its process has written all
  (first,) = (tmp_path / 'wandb').glob('offline-run-*')
  told = offline_rounds(first)[3]
  assert {name: float(told[name]) for name in NUMBERS} == NUMBERS
  # Resumed: the same run, whose newest file holds all rounds.
  with started(fm.WandB(project='x', mode='offline'), tmp_path) as log:
    log.log(RECORD)
    log.log(RECORD | {'round': 4})
  wandb.teardown()
  (second,) = set((tmp_path / 'wandb').glob('offline-run-*')) - {first}
  assert set(offline_rounds(second)) == {3, 4}
  run_id = (tmp_path / 'wandb.id').read_text().strip()
  assert run.id == run_id
  assert first.name.endswith(run_id) and second.name.endswith(run_id)


@pytest.mark.slow
def test_mlflow_in_a_file(tmp_path):
  mlflow = pytest.importorskip('mlflow')
  uri = f'sqlite:///{tmp_path}/runs.db'
  [logger] = loggers.of([f'mlflow,uri={uri},experiment=x'])
  with started(logger, tmp_path / 'run') as log:
    log.log(RECORD)
  client = mlflow.MlflowClient(uri)
  run_id = (tmp_path / 'run' / 'mlflow.id').read_text().strip()
  assert client.get_run(run_id).info.status == 'KILLED'  # no summary
  # Resumed: what is there already is not there twice.
  with started(fm.MLflow(uri, 'x'), tmp_path / 'run') as log:
    log.log(RECORD)
    log.log(RECORD | {'round': 4, 'seconds': 2.5})
    log.finish(SUMMARY)
  assert (tmp_path / 'run' / 'mlflow.id').read_text().strip() == run_id
  run = client.get_run(run_id)
  assert run.info.status == 'FINISHED' and run.info.run_name == 'run'
  assert run.data.params == {'hidden_dim': '16', 'data_dir': ''}
  assert ORIGIN.items() <= run.data.tags.items()
  assert run.data.metrics == NUMBERS | FINAL | {'seconds': 2.5, 'round': 4}
  points = client.get_metric_history(run_id, 'seconds')
  assert sorted((p.step, p.value) for p in points) == [(3, 1.5), (4, 2.5)]
  assert 'logger MLflow cannot start' in small.error_of(
    started, fm.MLflow('nothing://x'), tmp_path / 'other'
  )
