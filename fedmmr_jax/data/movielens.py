"""Raw MovieLens files (Harper & Konstan 2015, ACM TiiS 5(4)) -> arrays.

| set | interactions | items |
|---|---|---|
| ml-1m | `ratings.dat`, `UserID::MovieID::Rating::Timestamp` | `movies.dat`, `MovieID::Title::Genres`, latin-1 |
| ml-100k | `u.data`, tab-separated user, item, rating, timestamp | `u.item`, `\\|`-separated, latin-1 |

Every rating is an interaction, whatever its value (implicit feedback).
"""

import pathlib
from typing import NamedTuple

import numpy as np

from fedmmr_jax.errors import UserError


class Layout(NamedTuple):
  """Names and separators of one MovieLens release."""

  ratings: str
  separator: bytes
  movies: str
  movies_separator: str


LAYOUTS = {
    'ml-1m': Layout('ratings.dat', b'::', 'movies.dat', '::'),
    'ml-100k': Layout('u.data', b'\t', 'u.item', '|'),
}
# Feature matrices have a row for each id up to the largest.
MAX_ID = 2 ** 31 - 1
_FIELDS = ('user id', 'item id', 'rating', 'timestamp')


class RawInteractions(NamedTuple):
  """Columns of the rating file, in its order.

  Attributes:
    users: [n] int64.
    items: [n] int64, all positive.
    times: [n] float64 seconds.
  """

  users: np.ndarray
  items: np.ndarray
  times: np.ndarray


def read_ratings(name: str, folder: pathlib.Path) -> RawInteractions:
  """Reads the interactions of `name` ('ml-1m' or 'ml-100k').

  Raises:
    UserError: no such file, no line in it, or a malformed line (named).
  """
  layout = LAYOUTS[name]
  path = folder / layout.ratings
  if not path.exists():
    raise UserError(
        f'{path}: no such file; --data_dir must be the folder that holds '
        f'{name}\'s {layout.ratings}')
  content = _read(path)
  if not content.strip():
    raise UserError(f'{path}: the file is empty')
  lines = content.replace(layout.separator, b'\t').splitlines()
  try:
    table = np.loadtxt(
        [line.decode('ascii') for line in lines if line.strip()],
        delimiter='\t', comments=None, ndmin=2)
    ids = table[:, :2]
    if not (table.shape[1] == len(_FIELDS) and np.isfinite(table).all()
            and (ids == np.floor(ids)).all() and (ids > 0).all()
            and (ids <= MAX_ID).all()):
      raise ValueError('not lines of _FIELDS')
  except ValueError:
    raise _first_bad_line(path, content, layout.separator) from None
  users, items, _, times = table.T
  return RawInteractions(users.astype(np.int64), items.astype(np.int64), times)


def read_titles(name: str, folder: pathlib.Path) -> dict[int, str]:
  """Item id -> title; empty if the set has no item file.

  Raises:
    UserError: a malformed line (named).
  """
  layout = LAYOUTS[name]
  path = folder / layout.movies
  titles = {}
  if not path.exists():
    return titles
  for number, line in enumerate(
      _read(path).decode('latin-1').split('\n'), 1):
    if not line.strip():
      continue
    fields = line.rstrip('\r').split(layout.movies_separator)
    if len(fields) < 3 or not fields[0].isdecimal():
      raise UserError(
          f'{path}, line {number}: expected '
          f'"MovieID{layout.movies_separator}Title'
          f'{layout.movies_separator}…", found {line[:60]!r}')
    titles[int(fields[0])] = fields[1]
  return titles


def _read(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror})') from None


def _first_bad_line(path, content: bytes, separator: bytes) -> UserError:
  """Finds and describes the line that the fast parser stumbled over."""
  shape = separator.decode().join(f'<{f}>' for f in _FIELDS)
  for number, line in enumerate(content.splitlines(), 1):
    if not line.strip():
      continue
    problem = _problem_of(line.split(separator))
    if problem:
      shown = line[:60].decode('latin-1')
      return UserError(
          f'{path}, line {number}: {problem} in {shown!r}; expected {shape}')
  return UserError(f'{path}: cannot be read as lines of {shape}')


def _problem_of(fields: list[bytes]) -> str:
  if len(fields) != len(_FIELDS):
    return f'{len(fields)} fields instead of {len(_FIELDS)}'
  for name, field in zip(_FIELDS, fields):
    if name.endswith('id'):
      if not field.strip().isdigit() or int(field) == 0:
        return f'{name} is not a positive whole number'
      if int(field) > MAX_ID:
        return f'{name} is larger than {MAX_ID}'
      continue
    try:
      # float() also takes '10_00', which the fast parser does not.
      if b'_' in field or not np.isfinite(float(field)):
        raise ValueError
    except ValueError:
      return f'{name} is not a number'
  return ''
