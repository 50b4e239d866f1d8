"""Size and CRC-32 of every file of a folder, stored in the folder, to detect
later damage."""

import json
import os
import pathlib
import zlib

from fedmmr_jax.errors import UserError

NAME = 'checksums.json'


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  """All files below a folder, in order."""
  return sorted(path for path in folder.rglob('*') if path.is_file())


def write(folder: pathlib.Path) -> None:
  """Writes `checksums.json` for all files that are there now."""
  sums = {str(path.relative_to(folder)): _sum(path) for path in files(folder)}
  with (folder / NAME).open('w') as file:
    json.dump(sums, file, indent=1)
    file.flush()
    os.fsync(file.fileno())


def check(folder: pathlib.Path, mend: str) -> None:
  """Compares the files with what `write` found.

  Args:
    folder: where they are.
    mend: what the user can do; error messages end with it.

  Raises:
    UserError: a file is missing or not as it was written; names the first one.
  """
  try:
    sums = json.loads((folder / NAME).read_text('utf-8'))
    expected = {
      name: tuple(size_and_sum) for name, size_and_sum in sums.items()
    }
  except (OSError, ValueError, AttributeError, TypeError) as error:
    reason = ' '.join(str(error).split())[:160]
    raise UserError(
      f'{folder / NAME}: damaged or missing ({reason}); {mend}'
    ) from None
  for name, size_and_sum in expected.items():
    try:
      found = _sum(folder / name)
    except OSError as error:
      raise UserError(f'{folder / name}: {error.strerror}; {mend}') from None
    if found != size_and_sum:
      raise UserError(
        f'{folder / name}: damaged, not what was written (its checksum '
        f'differs); {mend}'
      )


def _sum(path: pathlib.Path) -> tuple[int, int]:
  """(bytes, CRC-32)."""
  size = checksum = 0
  with path.open('rb') as file:
    while block := file.read(1 << 20):
      size += len(block)
      checksum = zlib.crc32(block, checksum)
  return size, checksum
