"""Tables with typed columns -> interactions: Parquet, Arrow files (as the
`datasets` library saves them), frames in memory."""

import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet as arrow_parquet

from fedmmr_jax.config import Lines
from fedmmr_jax.data import columns as columns_lib
from fedmmr_jax.data import roles, text_files
from fedmmr_jax.data.columns import Doubt
from fedmmr_jax.data.interactions import Interactions
from fedmmr_jax.data.roles import Roles
from fedmmr_jax.errors import UserError

_HEAD = 16  # rows that may tell what a column holds


def read_parquet(path: pathlib.Path, lines: Lines) -> Interactions:
  """Of the columns that are read, and no others."""
  with text_files.readable(path, 'Parquet'):
    file = arrow_parquet.ParquetFile(path)
    head = next(file.iter_batches(_HEAD), None)
    picked = _roles(file.schema_arrow, lines, str(path), head)
    table = file.read(columns=picked.columns)
  return from_table(table, picked, str(path))


def read_arrow(path: pathlib.Path, lines: Lines) -> Interactions:
  """Arrow's streams and files (Feather too), mapped into memory."""
  with text_files.readable(path, 'Arrow'), pa.memory_map(str(path)) as source:
    begins_as_file = source.read(6) == b'ARROW1'
    source.seek(0)
    opened = (
      pa.ipc.open_file(source) if begins_as_file else pa.ipc.open_stream(source)
    )
    table = opened.read_all()
    picked = _roles(table.schema, lines, str(path), table.slice(0, _HEAD))
    return from_table(table.select(picked.columns), picked, str(path))


def of_frame(frame: Any, lines: Lines, place: str) -> Interactions:
  """Of a frame of pandas or polars, an Arrow table, or anything else that
  speaks Arrow's C interface.

  Raises:
    UserError: it is none of these, or its columns are not what they should be.
  """
  try:
    table = pa.table(frame)
  except (TypeError, ValueError, pa.ArrowInvalid) as error:
    raise UserError(
      f'{place}: {type(frame).__name__} is no table ({error}); give a frame of '
      'pandas or polars, or an Arrow table'
    ) from None
  picked = _roles(table.schema, lines, place, table.slice(0, _HEAD))
  return from_table(table.select(picked.columns), picked, place)


def _roles(
  schema: pa.Schema,
  lines: Lines,
  place: str,
  head: pa.Table | pa.RecordBatch | None,
) -> Roles:
  if len(set(schema.names)) < len(schema.names):
    raise UserError(f'{place}: two columns of one name')
  examples: dict[str, list] = {}
  for field in schema:
    if pa.types.is_timestamp(field.type) or pa.types.is_date(field.type):
      examples[field.name] = ['2000-01-01']
    elif head is not None and (
      pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    ):
      values = head.column(field.name).to_pylist()
      examples[field.name] = [x for x in values if x is not None]
  return roles.pick_all(schema.names, lines, place, examples)


def from_table(table: pa.Table, picked: Roles, place: str) -> Interactions:
  """Interactions of a table's rows.

  Raises:
    UserError: a value is missing, or is no id or time (named).
  """
  if not table.num_rows:
    raise UserError(f'{place}: no interaction in it')
  ids = (picked.user, picked.item)
  for name in filter(None, (*ids, picked.time)):
    if table[name].null_count:
      row = table[name].is_null().to_numpy().argmax()
      raise UserError(
        f'{place}, row {row}: {name} is missing; leave such rows out'
      )
  for name in ids:
    kind = table.schema.field(name).type
    if pa.types.is_dictionary(kind):
      kind = kind.value_type
    if pa.types.is_string_view(kind):
      at = table.schema.get_field_index(name)
      table = table.set_column(at, name, table[name].cast(pa.string()))
    elif not (
      pa.types.is_integer(kind)
      or pa.types.is_string(kind)
      or pa.types.is_large_string(kind)
      or pa.types.is_floating(kind)
    ):
      raise UserError(
        f'{place}: {name} is of type {kind}; ids are whole numbers or strings'
      )
  for name in picked.further.values():
    try:
      columns_lib.texts_of(table[name].slice(0, 1))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
      raise UserError(
        f'{place}: {name} is of type {table.schema.field(name).type}, which is '
        'no text or number'
      ) from None
  try:
    found = columns_lib.interactions_of(table, *picked[:4])
    return found._replace(roles=picked, notes=picked.notes)
  except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
    raise UserError(f'{place}: {error}') from None
  except Doubt:
    raise UserError(f'{place}, {_fault_of(table, picked)}') from None


def _fault_of(table: pa.Table, picked: Roles) -> str:
  """Row, column and value that a table cannot be read for."""
  for name in (picked.user, picked.item):
    floats = pa.types.is_floating(table.schema.field(name).type)
    for row, value in enumerate(table[name].to_pylist()):
      problem = (
        'is not a whole number'
        if floats and not float(value).is_integer()
        else columns_lib.id_problem(str(value), whole=False)
      )
      if not isinstance(value, str) and abs(value) >= 2**63:
        problem = 'is beyond 63 bits'
      if isinstance(value, float) and abs(value) >= 2**53:
        problem = 'is too large to be exact as a floating-point number'
      if problem:
        return f'row {row}: {name} {problem}: {value!r}'
  name = picked.time
  times = []
  for row, value in enumerate(table[name].to_pylist()):
    try:
      times.append(columns_lib.parse_time(str(value)))
    except ValueError:
      return f'row {row}: {name} is neither a number nor a date: {value!r}'
  odd = columns_lib.in_larger_unit(np.array(times, np.float64))
  if odd is None:
    return (
      f'{name} is of type {table.schema.field(name).type}, which is no time'
    )
  return (
    f'row {odd}: {name} {times[odd]:.0f} is not in the unit of most others; '
    'write all in seconds since 1970'
  )
