"""The sidecar of a feature matrix: how it was made, and for which items.

If `experiments/prepare_features.py` wrote `text_features.npy`, there is a
`text_features.json` beside it. A matrix without a sidecar is loaded as it is; a
matrix with one must match it.
"""

import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from fedmmr_jax.data.items import ItemTable
from fedmmr_jax.errors import UserError

# Any other JSON file that bears a matrix's name is somebody's own.
FORMAT = 'fedmmr_jax features 1'


def path_of(matrix: pathlib.Path) -> pathlib.Path:
  """Where the sidecar of a matrix lies."""
  return matrix.with_suffix('.json')


def data_fingerprint(items: ItemTable) -> str:
  """SHA-256 of which item each row of a feature matrix belongs to."""
  ids = json.dumps(list(map(str, items.ids.tolist())))
  rows = np.append(items.rows, items.num_rows).astype('<i8')
  return hashlib.sha256(ids.encode() + rows.tobytes()).hexdigest()


def checksum(matrix: pathlib.Path) -> str:
  """SHA-256 of a file."""
  with matrix.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def check(
  matrix: pathlib.Path, items: ItemTable | None
) -> dict[str, Any] | None:
  """Checks that a matrix belongs to its sidecar and to the data set.

  Args:
    matrix: a .npy file.
    items: those of the data set; None skips that check.

  Returns:
    The sidecar, None if there is none.

  Raises:
    UserError: it cannot be read, or it describes another matrix or data set.
  """
  path = path_of(matrix)
  found = _read(path)
  if found is None:
    return None
  if found['checksum'] != checksum(matrix):
    raise UserError(
      f'{matrix}: not the matrix that {path.name} describes, one of the two '
      'was exchanged; prepare the features again, or remove the .json'
    )
  if items and found['data_fingerprint'] != data_fingerprint(items):
    raise UserError(
      f'{matrix}: prepared for another data set, {path.name} names other '
      'items or other rows for them; prepare the features again (if row by '
      'row the items are the same, remove the .json)'
    )
  return found


def _read(path: pathlib.Path) -> dict[str, Any] | None:
  try:
    found = json.loads(path.read_text('utf-8'))
  except FileNotFoundError:
    return None
  except (OSError, ValueError, RecursionError) as error:
    reason = ' '.join(str(error).split())[:80]
    raise UserError(
      f'{path}: the description of the matrix beside it is not readable JSON '
      f'({reason}); prepare the features again, or remove the file'
    ) from None
  if not isinstance(found, dict) or found.get('format') != FORMAT:
    return None
  for key in ('checksum', 'data_fingerprint', 'model'):
    if not isinstance(found.get(key), str):
      raise UserError(
        f'{path}: damaged, it has no {key!r}; prepare the '
        'features again, or remove the file'
      )
  return found
