"""Supervision of a training process: detects when it is stuck and, afterwards,
how it died.

While a run trains, `.process.json` in its folder says what it is doing. A
process that ends normally removes the file. If the file is left behind, it
tells the next process how the last one ended, together with the traces that
Python's faulthandler leaves at a fatal signal (`.crash.txt`).
"""

import faulthandler
import itertools
import json
import os
import pathlib
import platform
import signal
import sys
import threading
from typing import Any

from fedmmr_jax.runs.checkpoint import saved_rounds

PROCESS, CRASH, STUCK = '.process.json', '.crash.txt', 'stuck.txt'
STUCK_STATUS = 3  # of a process that ended itself

# How faulthandler's first line names a signal.
_FATAL = {
  'Aborted': signal.SIGABRT,
  'Segmentation fault': signal.SIGSEGV,
  'Bus error': signal.SIGBUS,
  'Illegal instruction': signal.SIGILL,
  'Floating-point exception': signal.SIGFPE,
  'Floating point exception': signal.SIGFPE,
}
_SECONDS_A_TICK = 1.0


class Supervisor:
  """Watches over one training process, from `__enter__` to `__exit__`.

  Args:
    folder: the run folder, which this process has locked.
    stuck_minutes: how long a step may take before the process ends itself with
      STUCK_STATUS; 0 = no limit. Time in which the whole process is stopped
      (a sleeping machine, SIGSTOP) does not count.
    hint: how to resume and how to allow more time; the message of a stuck
      process ends with it.
  """

  def __init__(
    self, folder: pathlib.Path, stuck_minutes: float, hint: str = ''
  ):
    self._folder = folder
    self._hint = hint
    self._seconds = 60 * stuck_minutes
    self._record: dict[str, Any] = {
      'pid': os.getpid(),
      'host': platform.node(),
      'boot': _boot(),
      'oom_kills': _oom_kills(),
      'step': 'starting',
      'note': '',
    }
    self._numbers = itertools.count()
    self._waited = 0.0
    self._ended = threading.Event()

  def __enter__(self) -> 'Supervisor':
    self._crash = (self._folder / CRASH).open('w')
    faulthandler.enable(self._crash)
    self._write()
    if self._seconds:
      threading.Thread(target=self._watch, name='watch', daemon=True).start()
    return self

  def __exit__(self, *exception: Any) -> None:
    self._ended.set()
    faulthandler.disable()
    self._crash.close()
    for name in (PROCESS, CRASH):
      (self._folder / name).unlink(missing_ok=True)

  def step(self, step: str) -> None:
    """Records what the process does from now on, as in 'training round 3'."""
    self._waited = 0.0
    self._record['step'] = step
    self._write()

  def note(self, note: str) -> None:
    """Records what the next process should know if this one ends now."""
    self._record['note'] = note
    self._write()

  def _write(self) -> None:
    # A name of its own: a signal's handler may write while a step is written.
    temporary = self._folder / f'{PROCESS}.{next(self._numbers)}'
    try:
      temporary.write_text(json.dumps(self._record))
      temporary.replace(self._folder / PROCESS)
    except OSError:  # no reason to end a run; who saves rounds will say more
      temporary.unlink(missing_ok=True)

  def _watch(self) -> None:
    tick = min(_SECONDS_A_TICK, self._seconds / 10)
    # Ticks are counted, not hours: no clock tells for how long the process
    # was stopped.
    while not self._ended.wait(tick):
      self._waited += tick
      if self._waited > self._seconds:
        self._give_up()

  def _give_up(self) -> None:
    """Ends the process, whatever its other threads are waiting for."""
    step = self._record['step']
    with (self._folder / STUCK).open('w') as file:
      faulthandler.dump_traceback(file)
    self.note('stuck')
    saved = saved_rounds(self._folder)
    print(
      f'\nerror: stuck: {step} has not ended in {self._seconds / 60:g} '
      f'minutes ({self._folder / STUCK} has what each thread waits for); '
      + (
        f'round {saved[-1]} is saved, continue'
        if saved
        else 'no round is saved yet, start again'
      )
      + self._hint,
      file=sys.stderr,
      flush=True,
    )
    os._exit(STUCK_STATUS)


def last_end(folder: pathlib.Path) -> str | None:
  """How the last process in a run folder ended, in one line; None if normally.
  Only for the process that has locked the folder, so that no other runs there.
  """
  try:
    record = json.loads((folder / PROCESS).read_text())
    step, note = record['step'], record['note']
  except (OSError, ValueError, KeyError, TypeError):
    return None  # there was none, or its file tells nothing
  when = f'while {step}'
  if note == 'stuck':
    return f'the last process ended itself, stuck {when}'
  asked = f', {note}' if note else ''
  number = _fatal_signal(folder / CRASH)
  if number:
    return (
      f'the last process ended by signal {number:d} '
      f'({signal.Signals(number).name}) {when}{asked}'
    )
  if record.get('host') != platform.node():
    return (
      f'the last process, on {record.get("host")}, ended without a word '
      f'{when}{asked}'
    )
  if not _boot():
    return (
      'the last process ended without a word (killed, or the machine was '
      f'restarted) {when}{asked}'
    )
  if record.get('boot') != _boot():
    return f'the machine was restarted {when}{asked}'
  line = (
    'the last process ended by signal 9 (SIGKILL, or another that leaves '
    f'no trace) {when}{asked}'
  )
  killed = _oom_kills() - record.get('oom_kills', 0)
  if killed > 0:
    line += (
      f'; the machine ran out of memory {killed} time(s) since it was started'
    )
  return line


def _fatal_signal(path: pathlib.Path) -> signal.Signals | None:
  """The signal that faulthandler wrote down, if any."""
  try:
    with path.open(errors='replace') as file:
      first = file.readline()
  except OSError:
    return None
  return next(
    (number for name, number in _FATAL.items() if name in first), None
  )


def _boot() -> str:
  """Identifies the current boot of the machine; '' if that is unknown, as on
  macOS."""
  try:
    return pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  except OSError:
    return ''


def _oom_kills() -> int:
  """How many processes this machine's kernel has killed for lack of memory."""
  try:
    lines = pathlib.Path('/proc/vmstat').read_text().splitlines()
  except OSError:
    return 0
  return next(
    (int(line.split()[1]) for line in lines if line.startswith('oom_kill ')), 0
  )
