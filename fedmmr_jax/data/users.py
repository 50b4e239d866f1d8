"""What users are: attributes by which results can be sliced. They are the
evaluator's; no client and no model sees them.

The files: MovieLens' `users.dat` and `u.user`, RecBole's `*.user`, CSV or TSV
with a header, Parquet.
"""

import pathlib

from pyarrow import parquet as arrow_parquet

from fedmmr_jax.data import items, text_files
from fedmmr_jax.data.roles import ALIASES
from fedmmr_jax.errors import UserError

# Files without a header: separator -> names of the fields.
_HEADLESS = {
  'users.dat': ('::', ('user', 'gender', 'age', 'occupation', 'zip')),
  'u.user': ('|', ('user', 'age', 'gender', 'occupation', 'zip')),
}

# Name of an attribute -> user id as text -> value; '' = unknown.
Attributes = dict[str, dict[str, str]]


def read(path: pathlib.Path) -> Attributes:
  """All attributes of a file.

  Raises:
    UserError: no such file, no column of users, or a malformed line (named).
  """
  if not path.is_file():
    raise UserError(f'{path}: no such file of users')
  name = text_files.plain_name(path).lower()
  if name.endswith('.parquet'):
    with text_files.readable(path, 'Parquet'):
      table = arrow_parquet.read_table(path)
    header = table.column_names
    rows = enumerate(zip(*(c.to_pylist() for c in table.columns)), 1)
  elif name in _HEADLESS:
    separator, names = _HEADLESS[name]
    header = list(names)
    rows = items.rows(path, separator, quoted=False)
  else:
    header, rows = items.headed(path)
  lowered = [field.lower() for field in header]
  whose = next(
    (lowered.index(a) for a in (*ALIASES['user'], 'id') if a in lowered), None
  )
  if whose is None:
    raise UserError(
      f'{path}: no column of the users among {", ".join(header)}; call it '
      'user_id'
    )
  found: Attributes = {name: {} for i, name in enumerate(header) if i != whose}
  for number, fields in rows:
    if len(fields) != len(header):
      raise UserError(
        f'{path}, line {number}: {len(fields)} fields instead of {len(header)}'
      )
    user = _plain(fields[whose])
    for name, value in zip(header, fields):
      if name in found:
        found[name][user] = _plain(value)
  return found


def _plain(value: object) -> str:
  """As ids are written: `12.0` is 12."""
  text = '' if value is None else str(value).strip()
  return items.FRACTION.sub('', text)
