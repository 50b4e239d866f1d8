"""Locks, and what becomes of a run where the file system has none."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from fedmmr_jax import files
from fedmmr_jax.data import extraction
from fedmmr_jax.errors import UserError
from fedmmr_jax.runs import checkpoint, run_folder
from fedmmr_jax.runs.run_folder import RunFolder
from tests import small, test_checkpoint, test_extraction
from tests.test_cli import ROOT

SAID = 'its file system has no locks; make sure that no other process'
WITHOUT = pytest.mark.parametrize(
  'number',
  [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP],
  ids=errno.errorcode.get,
)


@pytest.fixture
def fail(monkeypatch):
  """Has flock fail with an error number."""

  def fail(number):
    def flock(file, operation):
      raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, 'flock', flock)

  return fail


def test_a_lock_keeps_out_another_process_and_goes_with_its_own(tmp_path):
  code = (
    'import pathlib, sys; from fedmmr_jax.files import Lock\n'
    'try: print(repr(Lock(pathlib.Path(sys.argv[1])).note))\n'
    'except BlockingIOError: print("held")'
  )

  def elsewhere():
    return subprocess.run(
      [sys.executable, '-c', code, tmp_path / 'lock'],
      check=True,
      capture_output=True,
      text=True,
    ).stdout.strip()

  with files.Lock(tmp_path / 'lock') as lock:
    assert lock.note == ''
    assert elsewhere() == 'held'
  assert elsewhere() == "''"
  assert files.has_locks(tmp_path)


@WITHOUT
def test_a_run_goes_on_without_locks_and_says_so(tmp_path, fail, number):
  fail(number)
  assert not files.has_locks(tmp_path)
  run = RunFolder(tmp_path / 'run')
  assert run.lock_note == ''
  run.start(small.config(), small.dataset())
  assert run.lock_note.startswith(f'{run.path}: {SAID}')
  assert '\n' not in run.lock_note
  assert run.is_started


@WITHOUT
def test_features_are_made_without_locks(tmp_path, fail, number):
  fail(number)
  inputs = test_extraction.text_inputs()
  settings = test_extraction.settings(inputs)
  with extraction.Partial(tmp_path, settings) as partial:
    assert partial.lock_note.startswith(f'{tmp_path}: {SAID}')
    assert partial.note == ''
  done, _ = test_extraction.extract(tmp_path, inputs)
  assert done.path.exists()


def test_what_else_flock_says_is_no_lack_of_locks(tmp_path, fail):
  fail(errno.EWOULDBLOCK)
  with pytest.raises(UserError, match='another process is training'):
    run_folder.hold(tmp_path)
  with pytest.raises(BlockingIOError):
    files.Lock(tmp_path / 'lock')
  fail(errno.EIO)
  with pytest.raises(UserError, match=r'cannot be written \(Input/output'):
    run_folder.hold(tmp_path)


@pytest.mark.slow
def test_rounds_are_saved_where_files_cannot_be_locked(
  tmp_path, fail, monkeypatch
):
  """Orbax's writing needs locks: it gets a folder that has them."""
  write, places = checkpoint.ocp.save, []

  def save(path, *arguments, **named):
    places.append(path)
    return write(path, *arguments, **named)

  monkeypatch.setattr(checkpoint.ocp, 'save', save)
  saved = test_checkpoint.checkpoint()
  locked = test_checkpoint.save(tmp_path / 'locked', 1, saved=saved)
  assert [path.parent for path in places] == [locked.folder]

  places.clear()
  fail(errno.ENOLCK)
  rounds = test_checkpoint.save(tmp_path / 'run', 1, 2, saved=saved)
  assert len(places) == 2
  assert all(tmp_path not in path.parents for path in places)
  assert not any(path.parent.exists() for path in places)
  assert sorted(p.name for p in rounds.folder.iterdir()) == ['1', '2']
  small.assert_trees_equal(rounds.load(2, saved), saved)  # checks its checksums


# A binary of a process of its own, because its flags are; training is left out.
TRAIN = """
import errno, fcntl, sys
from experiments import app, train
def flock(file, operation):
  raise OSError(errno.ENOLCK, 'No locks available')
def rounds(*arguments, **named):
  sys.exit()
if sys.argv.pop() == 'without':
  fcntl.flock = flock
train.Rounds = rounds
app.run(train.main)
"""


@pytest.mark.parametrize('locks', ['with', 'without'])
@pytest.mark.slow
def test_training_says_it_once(tmp_path, locks):
  workdir = tmp_path / 'run'
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      TRAIN,
      '--dataset=synthetic,users=60',
      f'--workdir={workdir}',
      locks,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.count('no locks') == (locks == 'without')
  if locks == 'without':
    assert f'run folder  {workdir}\n{workdir}: {SAID}' in done.stdout
