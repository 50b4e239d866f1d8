"""Delimited lines -> interactions: first by Arrow and, in case of doubt, line
by line, which is slow but names the bad line."""

import csv
import pathlib
from typing import Iterator, Mapping, NamedTuple, Sequence

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from fedmmr_jax.data import columns as columns_lib
from fedmmr_jax.data import text_files
from fedmmr_jax.data.columns import Doubt
from fedmmr_jax.data.interactions import Interactions, Texts
from fedmmr_jax.errors import UserError

_BLOCK = 1 << 24  # bytes that Arrow parses at a time


class Layout(NamedTuple):
  """The layout of a file's lines.

  Attributes:
    separator: between fields; ' ' = any white space.
    columns: names of all fields, in order.
    user, item: which of them hold the ids.
    time: which holds the time; '' = none, the order of the lines counts.
    further: what else is read (`config.Lines.further`) -> its column.
    numbers: which others must be numbers; all else is passed over.
    whole_ids: ids must be whole numbers from 1 (else any text will do).
    quoted: fields may stand in double quotes.
    header_lines: how many lines stand before the first interaction.
  """

  separator: str
  columns: tuple[str, ...]
  user: str
  item: str
  time: str
  further: Mapping[str, str] = {}
  numbers: tuple[str, ...] = ()
  whole_ids: bool = False
  quoted: bool = False
  header_lines: int = 0

  @property
  def shape(self) -> str:
    """What a line looks like."""
    return self.separator.join(f'<{name}>' for name in self.columns)


def read(path: pathlib.Path, layout: Layout) -> Interactions:
  """Reads a file of such lines, plain or gzipped.

  Raises:
    UserError: no line in it, or a malformed one (named).
  """
  try:
    found = _read_fast(path, layout)
  except (
    Doubt,
    pa.ArrowInvalid,
    pa.ArrowNotImplementedError,
    OSError,
    *text_files.DAMAGED,
  ):
    found = _read_carefully(path, layout)
  if not len(found.users):
    raise UserError(
      f'{path}: no interaction in it; expected lines of {layout.shape}'
    )
  return found


def _read_fast(path, layout) -> Interactions:
  names, separator = list(layout.columns), layout.separator
  types = {
    layout.user: pa.dictionary(pa.int32(), pa.string()),
    layout.item: pa.dictionary(pa.int32(), pa.string()),
  }
  as_texts = [n for n in layout.further.values() if n not in types]
  types |= dict.fromkeys(as_texts, pa.dictionary(pa.int32(), pa.string()))
  types |= dict.fromkeys(layout.numbers, pa.float64())
  wanted = list(dict.fromkeys([*types, *filter(None, [layout.time])]))
  if len(separator) > 1:  # Arrow splits at one character: 'a::b' has 3 fields
    separator = separator[0]
    between = [f'\0{i}' for i in range(len(names) - 1)]
    names = [x for pair in zip(names, [*between, '']) for x in pair][:-1]
    types |= dict.fromkeys(between, pa.null())  # Arrow objects to what is there
    wanted += between
  with text_files.open_arrow(path) as stream:
    table = arrow_csv.read_csv(
      stream,
      read_options=arrow_csv.ReadOptions(
        column_names=names, skip_rows=layout.header_lines, block_size=_BLOCK
      ),
      parse_options=arrow_csv.ParseOptions(
        delimiter=separator, quote_char='"' if layout.quoted else False
      ),
      convert_options=arrow_csv.ConvertOptions(
        column_types=types, include_columns=wanted, strings_can_be_null=False
      ),
    )
  # Between two quotes that belong to different lines all would be one field.
  rows = table.num_rows + layout.header_lines
  if (
    layout.quoted
    and rows < text_files.count_ends(path)
    and (rows < sum(1 for _ in text_files.lines(path)))
  ):  # blank ones left out
    raise Doubt
  for name in layout.numbers:
    column = table[name]
    if column.null_count or not np.isfinite(column.to_numpy()).all():
      raise Doubt
  return columns_lib.interactions_of(
    table,
    layout.user,
    layout.item,
    layout.time,
    layout.further,
    layout.whole_ids,
  )


def _read_carefully(path, layout) -> Interactions:
  place = {name: i for i, name in enumerate(layout.columns)}
  users, items = Numbering(), Numbering()
  user_column, item_column, times, numbers = [], [], [], []
  further = {what: Column() for what in layout.further}
  dates = False
  for number, fields in _rows(path, layout):
    problem = _problem_of(fields, layout)
    if problem:
      shown = ' ' if layout.separator == ' ' else layout.separator
      raise UserError(
        f'{path}, line {number}: {problem} in {shown.join(fields)[:60]!r}; '
        f'expected {layout.shape}'
      )
    user_column.append(users.of(fields[place[layout.user]]))
    item_column.append(items.of(fields[place[layout.item]]))
    for what, column in further.items():
      column.append(fields[place[layout.further[what]]])
    if layout.time:
      text = fields[place[layout.time]]
      times.append(columns_lib.parse_time(text))
      dates |= not columns_lib.is_number(text)
      numbers.append(number)
  check_unit(path, layout.time, times, numbers)
  return from_numbered(
    user_column,
    users,
    item_column,
    items,
    times if layout.time else None,
    layout.whole_ids,
    further,
    dates,
  )


def check_unit(
  path: pathlib.Path, name: str, times: list[float], lines: list[int]
) -> None:
  """Raises UserError if a time is in a larger unit than most others."""
  odd = columns_lib.in_larger_unit(np.array(times, np.float64))
  if odd is not None:
    raise UserError(
      f'{path}, line {lines[odd]}: {name} {times[odd]:.0f} is not in the '
      'unit of most others; write all in seconds since 1970'
    )


class Numbering(dict):
  """Text -> its number, in order of appearance."""

  def of(self, text: str) -> int:
    return self.setdefault(text, len(self))


class Column:
  """A column of texts, filled line by line."""

  def __init__(self):
    self._codes: list[int] = []
    self._texts = Numbering()

  def append(self, text: str) -> None:
    self._codes.append(self._texts.of(text))

  @property
  def texts(self) -> Texts:
    return Texts(np.array(self._codes, np.int32), tuple(self._texts))


def from_numbered(
  users: Sequence[int] | np.ndarray,
  user_texts: Numbering,
  items: Sequence[int] | np.ndarray,
  item_texts: Numbering,
  times: Sequence[float] | None,
  whole: bool,
  further: Mapping[str, Column] = {},
  dates: bool = False,
) -> Interactions:
  """Interactions [n] whose ids are known by number; `dates` says that the times
  are of dates.

  Raises:
    Doubt: see `columns.unique_ids`.
  """
  user_ids, user_place = columns_lib.unique_ids(list(user_texts), whole)
  item_ids, item_place = columns_lib.unique_ids(list(item_texts), whole)
  seconds, unit = (
    (None, '')
    if times is None
    else columns_lib.in_seconds(np.array(times, np.float64))
  )
  return Interactions(
    user_place.astype(np.int32)[np.array(users, np.int64)],
    item_place.astype(np.int32)[np.array(items, np.int64)],
    seconds,
    user_ids,
    item_ids,
    unit=columns_lib.DATES if dates else unit,
    columns={what: column.texts for what, column in further.items()},
  )


def _rows(
  path: pathlib.Path, layout: Layout
) -> Iterator[tuple[int, list[str]]]:
  """Yields (number of its first line, fields); quoted fields may hold ends of
  lines (RFC 4180).

  Raises:
    UserError: a quote is not closed.
  """
  # Where ids are digits the encoding cannot matter: MovieLens' is latin-1.
  encoding = 'latin-1' if layout.whole_ids else 'utf-8'
  at = begun = 0

  def texts() -> Iterator[str]:
    nonlocal at, begun
    below = layout.header_lines
    for at, line in text_files.lines(path):
      if below:
        below -= 1
        text_files.decode(line, path, at, encoding)
        continue
      begun = begun or at
      yield text_files.decode(line, path, at, encoding) + '\n'

  if not layout.quoted or layout.separator == ' ':
    for text in texts():
      text = text.removesuffix('\n')
      yield (
        at,
        text.split()
        if layout.separator == ' '
        else text.split(layout.separator),
      )
    return
  rows = csv.reader(texts(), delimiter=layout.separator, strict=True)
  while True:
    begun = 0
    try:
      fields = next(rows)
    except StopIteration:
      return
    except csv.Error:
      raise UserError(
        f'{path}, line {begun}: a quote is not closed, or a text stands '
        f'behind one that is; expected {layout.shape}'
      ) from None
    yield begun, fields


def _problem_of(fields: list[str], layout: Layout) -> str:
  if len(fields) != len(layout.columns):
    return f'{len(fields)} fields instead of {len(layout.columns)}'
  for name, field in zip(layout.columns, fields):
    if name in (layout.user, layout.item):
      problem = columns_lib.id_problem(field, layout.whole_ids)
      if problem:
        return f'{name} {problem}'
    elif name == layout.time or name in layout.numbers:
      try:
        # Where all else is a number, so is the time.
        if name in layout.numbers:
          columns_lib.parse_number(field)
        else:
          columns_lib.parse_time(field)
      except ValueError:
        return (
          f'{name} is not a number'
          if name in layout.numbers
          else f'{name} is neither a number nor a date (ISO 8601)'
        )
  return ''
