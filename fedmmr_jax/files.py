"""Atomic file writes, and folders that one process at a time writes in."""

import errno
import fcntl
import os
import pathlib
import tempfile
from typing import IO

# What flock raises where a file system, or the way it is mounted, has no locks
# (NFS with nolock, Lustre, some of FUSE). The last two differ on macOS.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


def replace(path: pathlib.Path, text: str) -> None:
  """Writes a file atomically: readers, even after a kill, see the old file or
  the new one, never half of it."""
  temporary = path.with_name(f'.{path.name}.tmp')
  temporary.write_text(text, 'utf-8')
  os.replace(temporary, path)


class Lock:
  """Keeps other processes out until it is closed or the process ends. A
  context manager.

  Args:
    path: the file that is locked, made if it does not exist.

  Attributes:
    note: '' or, on a file system without locks, a line that says so: then
      nobody is kept out.

  Raises:
    BlockingIOError: another process has it.
    OSError: the file cannot be made.
  """

  def __init__(self, path: pathlib.Path):
    self._file = path.open('w')
    try:
      is_locked = _lock(self._file)
    except OSError:
      self._file.close()
      raise
    self.note = (
      ''
      if is_locked
      else f'{path.parent}: its file system has no locks; make sure that no '
      'other process writes here'
    )

  def close(self) -> None:
    self._file.close()

  def __enter__(self) -> 'Lock':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def has_locks(folder: pathlib.Path) -> bool:
  """Whether files of a folder can be locked."""
  with tempfile.TemporaryFile(dir=folder) as file:
    return _lock(file)


def _lock(file: IO) -> bool:
  """Locks an open file; False if its file system has no locks."""
  try:
    # The kernel lets go of it when the process ends, however it ends.
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in _NO_LOCKS:
      return False
    raise
  return True
