"""Columns of a file -> ids and times, the same for every format.

Ids of all formats are read as text, each distinct one once. If all are whole
numbers they become int64, otherwise they stay strings. `12.0` is 12: a missing
value anywhere in a column makes spreadsheets and data frames write it so.
"""

import datetime
import re
from typing import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedmmr_jax.data.interactions import Interactions, Texts

# Of the formats whose ids are whole numbers by definition.
MAX_ID = 2**31 - 1
# Longer ones are no ids: a column was mistaken for another.
MAX_ID_LENGTH = 200
_WHOLE = re.compile(r'0(\.0+)?|-?[1-9][0-9]{0,17}|-?[1-9][0-9]{0,14}\.0+')
_LARGEST_EXACT = 2**53  # of floats
# Seconds reach year 5138 at 1e11; beyond, the unit is a thousandth, and so on.
_FIRST_OF_NEXT_UNIT = 1e11
_UNITS = ('seconds', 'milliseconds', 'microseconds', 'nanoseconds')
DATES = 'dates'
# What programs write where there is nothing: one user or item made of many.
_MISSING = ('nan', 'null', 'none', 'n/a', '<na>')


class Doubt(Exception):
  """The fast reader met something that the careful one must check."""


def interactions_of(
  table: pa.Table,
  user: str,
  item: str,
  time: str,
  further: Mapping[str, str] = {},
  whole: bool = False,
) -> Interactions:
  """A table's rows; the names are those of its columns.

  Args:
    table: of any types.
    user, item: of the ids.
    time: of the times, '' = none.
    further: what else is read (`Lines.further`) -> its column.
    whole: see `unique_ids`.

  Raises:
    Doubt: a value is no id or time.
  """
  users, user_ids = ids_of(table[user], whole)
  items, item_ids = ids_of(table[item], whole)
  times, unit = seconds_of(table[time]) if time else (None, '')
  return Interactions(
    users,
    items,
    times,
    user_ids,
    item_ids,
    unit=unit,
    columns={what: texts_of(table[name]) for what, name in further.items()},
  )


def unique_ids(texts: list[str], whole: bool) -> tuple[np.ndarray, np.ndarray]:
  """Distinct ids of a column.

  Args:
    texts: [u] as in the file; surrounding white space is ignored.
    whole: whether they must be whole numbers from 1 to MAX_ID.

  Returns:
    ([u'] ids ascending, [u] where each text's id is among them).

  Raises:
    Doubt: `id_problem` rejects one of them.
  """
  if any(id_problem(text, whole) for text in texts):
    raise Doubt
  texts = [text.strip() for text in texts]
  if whole or all(map(_WHOLE.fullmatch, texts)):
    numbers = [int(text.partition('.')[0]) for text in texts]
    return np.unique(np.array(numbers, np.int64), return_inverse=True)
  return np.unique(np.array(texts, str), return_inverse=True)


def id_problem(text: str, whole: bool) -> str:
  """What is wrong with an id; nothing if it may stand."""
  if whole:
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit()) or not digits.strip('0'):
      return 'is not a positive whole number'
    too_large = len(digits) > 18 or int(digits) > MAX_ID
    return f'is larger than {MAX_ID}' if too_large else ''
  if not text.strip():
    return 'is empty'
  if text.strip().lower() in _MISSING:
    return 'is missing'
  if len(text) > MAX_ID_LENGTH:
    return f'is longer than {MAX_ID_LENGTH} characters'
  if any(ord(character) < ord(' ') for character in text.strip()):
    return 'holds a control character'
  return ''


def odd_ids(ids: np.ndarray) -> list[str]:
  """Those that are no whole numbers among ids that mostly are: because of them
  all count as text."""
  if ids.dtype.kind == 'i':
    return []
  odd = [text for text in ids.tolist() if not _WHOLE.fullmatch(text)]
  return odd if len(odd) < len(ids) / 2 else []


def ids_of(
  column: pa.ChunkedArray, whole: bool
) -> tuple[np.ndarray, np.ndarray]:
  """An id column of any type -> ([n] int32 indices, [u] ids ascending).

  Raises:
    Doubt: see `unique_ids`, or an id is missing.
  """
  if column.null_count:
    raise Doubt
  if pa.types.is_dictionary(column.type) and not (
    pa.types.is_string(column.type.value_type)
  ):
    column = column.cast(column.type.value_type)
  if pa.types.is_integer(column.type):
    try:
      column = column.cast(pa.int64())
    except pa.ArrowInvalid:  # beyond 63 bits
      raise Doubt from None
    ids, indices = np.unique(column.to_numpy(), return_inverse=True)
    return indices.astype(np.int32), ids
  if pa.types.is_floating(column.type):  # whole numbers beside missing ones
    numbers = column.to_numpy()
    if not (
      np.isfinite(numbers).all()
      and (numbers == np.trunc(numbers)).all()
      and (np.abs(numbers) < _LARGEST_EXACT).all()
    ):
      raise Doubt
    ids, indices = np.unique(numbers.astype(np.int64), return_inverse=True)
    return indices.astype(np.int32), ids
  if not pa.types.is_dictionary(column.type):
    column = column.dictionary_encode()
  if not column.num_chunks:
    raise Doubt
  joined = column.unify_dictionaries().combine_chunks()
  if isinstance(joined, pa.ChunkedArray):
    joined = joined.chunk(0)
  ids, place = unique_ids(joined.dictionary.to_pylist(), whole)
  return place.astype(np.int32)[joined.indices.to_numpy()], ids


def texts_of(column: pa.ChunkedArray) -> Texts:
  """A column of any type as texts; '' where one is missing."""
  if pa.types.is_dictionary(column.type):
    column = column.cast(column.type.value_type)
  encoded = pc.fill_null(column.cast(pa.string()), '').dictionary_encode()
  joined = encoded.unify_dictionaries().combine_chunks()
  if isinstance(joined, pa.ChunkedArray):
    joined = joined.chunk(0)
  return Texts(
    joined.indices.to_numpy().astype(np.int32),
    tuple(joined.dictionary.to_pylist()),
  )


def seconds_of(column: pa.ChunkedArray) -> tuple[np.ndarray, str]:
  """([n] float64 seconds since 1970, what they were written in), from numbers,
  dates or ISO 8601 text.

  Raises:
    Doubt: one is missing or cannot be read.
  """
  if column.null_count or pa.types.is_boolean(column.type):
    raise Doubt
  try:
    if pa.types.is_dictionary(column.type):
      column = column.cast(column.type.value_type)
    if pa.types.is_large_string(column.type) or pa.types.is_string_view(
      column.type
    ):
      column = column.cast(pa.string())
    if pa.types.is_string(column.type):
      return _seconds_of_text(column)
    if pa.types.is_date(column.type):
      column = column.cast(pa.timestamp('us'))
    if pa.types.is_timestamp(column.type):
      return _seconds_of_timestamps(column)
    return in_seconds(column.cast(pa.float64()).to_numpy())
  except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
    raise Doubt from None


def _seconds_of_text(column: pa.ChunkedArray) -> tuple[np.ndarray, str]:
  """Of ISO dates, or numbers."""
  for kind in (pa.timestamp('us'), pa.timestamp('us', 'UTC'), pa.float64()):
    try:
      found = column.cast(kind)
    except pa.ArrowInvalid:
      continue
    if pa.types.is_floating(kind):
      return in_seconds(found.to_numpy())
    return _seconds_of_timestamps(found)
  try:  # several ways of writing, or one that Arrow does not know
    return seconds_of_texts(column.to_pylist())
  except ValueError:
    raise Doubt from None


def _seconds_of_timestamps(column: pa.ChunkedArray) -> tuple[np.ndarray, str]:
  # What lies below a microsecond orders nothing that people do.
  in_us = pc.cast(column, pa.timestamp('us', column.type.tz), safe=False)
  return pc.cast(in_us, pa.int64()).to_numpy() / 1e6, DATES


def seconds_of_texts(texts: list[str]) -> tuple[np.ndarray, str]:
  """As `seconds_of`, whatever each of them is.

  Raises:
    ValueError: one is neither a number nor a date.
    Doubt: see `in_seconds`.
  """
  numbers = np.array([parse_time(text) for text in texts], np.float64)
  seconds, unit = in_seconds(numbers)
  return seconds, unit if all(map(is_number, texts)) else DATES


def in_seconds(times: np.ndarray) -> tuple[np.ndarray, str]:
  """Times since 1970 in seconds, milli-, micro- or nanoseconds -> (seconds,
  which it was).

  Raises:
    Doubt: one is not finite, or in a larger unit than most.
  """
  if not np.isfinite(times).all():
    raise Doubt
  bound = _first_of_next_unit(times)
  if (np.abs(times) >= bound).any():
    raise Doubt
  factor = bound / _FIRST_OF_NEXT_UNIT
  thousands = round(np.log10(factor) / 3)
  return times / factor, _UNITS[min(thousands, len(_UNITS) - 1)]


def in_larger_unit(times: np.ndarray) -> int | None:
  """The place of the first time that would lie beyond year 5138 in the unit
  of most; None where there is none. (One in a smaller unit reads as 1970.)"""
  odd = np.abs(times) >= _first_of_next_unit(times)
  return int(odd.argmax()) if odd.any() else None


def _first_of_next_unit(times: np.ndarray) -> float:
  """Where the unit ends that most of them are in."""
  typical = np.median(np.abs(times)) if len(times) else 0
  bound = _FIRST_OF_NEXT_UNIT
  while typical >= bound:
    bound *= 1000
  return bound


def parse_time(text: str) -> float:
  """A number, or the seconds of an ISO 8601 date (UTC where it names no zone).

  Raises:
    ValueError: it is neither.
  """
  try:
    return parse_number(text)
  except ValueError:
    when = datetime.datetime.fromisoformat(text.strip())
    if when.tzinfo is None:
      when = when.replace(tzinfo=datetime.timezone.utc)
    return when.timestamp()


def is_number(text: str) -> bool:
  """Whether it is a finite one."""
  try:
    parse_number(text)
  except ValueError:
    return False
  return True


def parse_number(text: str) -> float:
  """A finite number.

  Raises:
    ValueError: it is none; '1_000' is one to Python, not in a file.
  """
  if '_' in text or not np.isfinite(float(text)):
    raise ValueError(text)
  return float(text)
