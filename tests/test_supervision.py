"""A stuck run says so and ends; a dead one is told of by the next."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from fedmmr_jax.runs import supervision
from fedmmr_jax.runs.checkpoint import Rounds
from fedmmr_jax.runs.supervision import Supervisor
from tests import small, test_kill

# Runs training with a round 3 that takes so many seconds longer and may take 12
# of them: any other step compiles, for as long as the machine needs.
SLOW = """
import sys, time
from experiments import app, train
from fedmmr_jax.runs.supervision import Supervisor
from fedmmr_jax.simulation import Simulation
seconds = float(sys.argv.pop(1))
run_round, step = Simulation.run_round, Supervisor.step
def hang(self, state, number, cohort):
  if number == 3:
    time.sleep(seconds)
  return run_round(self, state, number, cohort)
def limit(self, name):
  self._seconds = 12 if name == 'training round 3' else 3600
  step(self, name)
Simulation.run_round, Supervisor.step = hang, limit
app.run(train.main)
"""


def start(workdir, slower: float = 0, **options):
  command = test_kill.command(workdir)
  if slower:
    command = [sys.executable, '-c', SLOW, str(slower), *command[3:]]
  # Without experts, which take long to compile.
  return subprocess.Popen(
    [*command, '--num_rounds=4', '--keep=all', '--experts=none'],
    cwd=test_kill.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **options,
  )


def finish(workdir, process=None) -> str:
  """What the run that goes on, or has been started, prints."""
  with process or start(workdir) as process:
    out, err = process.communicate()
  assert process.returncode == 0, err
  # Our lines only: no alarm of XLA's, no warning.
  assert err == ''
  assert not (workdir / supervision.PROCESS).exists()
  assert not (workdir / supervision.CRASH).exists()
  return out


def state(workdir):
  return Rounds(workdir).load_as_saved(4)['state']


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """The state at the end of a run that nothing happened to, but that another
  one ran at its side."""
  folder = tmp_path_factory.mktemp('straight')
  workdirs = [folder / 'one', folder / 'other']
  processes = [start(workdir) for workdir in workdirs]
  for workdir, process in zip(workdirs, processes):
    assert 'the last process' not in finish(workdir, process)
  one, other = map(state, workdirs)
  small.assert_trees_equal(one, other)
  return one


def wait_for_round_3(workdir) -> None:
  while not (workdir / 'rounds' / '2').exists():
    time.sleep(0.01)
  while 'training round 3' not in (workdir / supervision.PROCESS).read_text():
    time.sleep(0.01)


# What SIGKILL leaves behind: `test_how_a_process_ended`, tests/test_kill.py.
@pytest.mark.slow
def test_the_next_process_says_how_the_last_one_died(tmp_path, straight):
  with start(tmp_path / 'run', slower=1000) as process:
    wait_for_round_3(tmp_path / 'run')
    process.send_signal(signal.SIGABRT)
    process.communicate()
  assert process.returncode == -signal.SIGABRT
  out = finish(tmp_path / 'run')
  assert (
    'the last process ended by signal 6 (SIGABRT) while training round 3\n'
    in out
  )
  small.assert_trees_equal(state(tmp_path / 'run'), straight)


@pytest.mark.slow
def test_a_stuck_run_says_so_and_ends(tmp_path, straight):
  with start(tmp_path / 'run', slower=1000) as process:
    _, err = process.communicate()
  assert process.returncode == supervision.STUCK_STATUS
  assert err.strip().count('\n') == 0
  assert err.strip().startswith('error: stuck: training round 3 has not ended')
  assert 'round 2 is saved, continue with --resume' in err
  # Where it hung is written down.
  assert 'in hang' in (tmp_path / 'run' / supervision.STUCK).read_text()
  out = finish(tmp_path / 'run')
  assert 'the last process ended itself, stuck while training round 3\n' in out
  small.assert_trees_equal(state(tmp_path / 'run'), straight)


@pytest.mark.slow
def test_a_machine_that_sleeps_is_not_stuck(tmp_path, straight):
  """Stopped for longer than a step may take; and at low priority."""
  with start(
    tmp_path / 'run', slower=4, preexec_fn=lambda: os.nice(10)
  ) as process:
    wait_for_round_3(tmp_path / 'run')
    process.send_signal(signal.SIGSTOP)
    time.sleep(float(os.environ.get('FEDMMR_SLEEP', 14)))
    process.send_signal(signal.SIGCONT)
    process.communicate()
  assert process.returncode == 0
  small.assert_trees_equal(state(tmp_path / 'run'), straight)


def record_of(folder: pathlib.Path, **changes) -> None:
  """Leaves the record of a dead process behind."""
  supervisor = Supervisor(folder, 0)
  supervisor.step('validating round 7')
  content = json.loads((folder / supervision.PROCESS).read_text())
  (folder / supervision.PROCESS).write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
  'changes, told',
  [
    (
      dict(),
      'ended by signal 9 (SIGKILL, or another that leaves no trace) '
      'while validating round 7',
    ),
    (
      dict(note='asked to stop by SIGTERM'),
      'while validating round 7, asked to stop by SIGTERM',
    ),
    (dict(host='elsewhere'), 'on elsewhere, ended without a word while valid'),
    (
      dict(boot='another'),
      'the machine was restarted while validating round 7',
    ),
    (
      dict(oom_kills=supervision._oom_kills() - 2),
      'the machine ran out of memory 2 time(s) since it was started',
    ),
  ],
)
def test_how_a_process_ended(tmp_path, changes, told):
  record_of(tmp_path, **changes)
  assert told in supervision.last_end(tmp_path)


def test_where_boots_have_no_name_none_is_told(tmp_path, monkeypatch):
  monkeypatch.setattr(supervision, '_boot', lambda: '')
  record_of(tmp_path, boot='')
  assert supervision.last_end(tmp_path) == (
    'the last process ended without a word (killed, or the machine was '
    'restarted) while validating round 7'
  )


@pytest.mark.parametrize('text', ['', '{', '[]', '{"step": 1}'])
def test_a_damaged_record_tells_nothing(tmp_path, text):
  assert supervision.last_end(tmp_path) is None
  (tmp_path / supervision.PROCESS).write_text(text)
  assert supervision.last_end(tmp_path) is None


def test_a_process_in_good_order_leaves_nothing(tmp_path):
  threads = threading.active_count()
  with pytest.raises(ValueError):
    with Supervisor(tmp_path, 10) as supervisor:
      supervisor.step('training round 1')
      assert supervision.last_end(tmp_path)
      raise ValueError
  assert list(tmp_path.iterdir()) == []
  while threading.active_count() > threads:
    time.sleep(0.01)


def test_a_full_disk_does_not_end_a_run(tmp_path, monkeypatch):
  supervisor = Supervisor(tmp_path, 0)

  def no_space(*unused):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(pathlib.Path, 'write_text', no_space)
  supervisor.step('training round 1')
