"""The formats of interaction files: detecting and reading them.

Each is listed with its file in a folder and the content of a line:

    ml-1m: `ratings.dat`; `user::item::rating::timestamp` (MovieLens 1M, 10M)
    ml-100k: `u.data`; user, item, rating, timestamp between tabs
    ml-latest: `ratings.csv`; CSV `userId,movieId,rating,timestamp` (newer
      MovieLens sets)
    mind: `behaviors.tsv`; a user's history and clicks (Wu et al. 2020)
    sasrec: `*.txt`; `user item`, in time order (Kang & McAuley 2018)
    sequences: `*.txt`; a user, then all its items in time order
    recbole: `*.inter`; tabs, header `user_id:token` … (Zhao et al. 2021)
    amazon-reviews: `*.json`, `*.jsonl`; a JSON object (Ni et al. 2019, Hou et
      al. 2024, Yelp, Steam)
    amazon-ratings: `*.csv`; CSV without header: user, item, rating, timestamp,
      or item first
    csv: `*.csv`, `*.tsv`; header; commas, semicolons or tabs
    parquet: `*.parquet`
    arrow: `*.arrow`, `*.feather`; what the `datasets` library saves

All but the last two may be compressed. What a line means: `lines.py`; which
files are one table: `sources.py`.
"""

import csv as csv_lib
import dataclasses
import pathlib
import re
from typing import Callable, Mapping, NamedTuple, Sequence

import numpy as np
import pyarrow as pa
from pyarrow import json as arrow_json

from fedmmr_jax import parts
from fedmmr_jax.config import Lines, RATING
from fedmmr_jax.data import columns as columns_lib
from fedmmr_jax.data import delimited, mind, roles, tables, text_files
from fedmmr_jax.data.columns import Doubt
from fedmmr_jax.data.delimited import Column, Layout, Numbering
from fedmmr_jax.data.interactions import Interactions
from fedmmr_jax.data.roles import Roles
from fedmmr_jax.errors import UserError

AUTO = 'auto'
# What Excel writes first: the separator of the lines below.
_EXCEL = re.compile(r'"?sep=(.)"?', re.IGNORECASE)
_MOVIELENS = ('user id', 'item id', 'rating', 'timestamp')
_BLOCK = 1 << 26  # bytes; a review must fit into a block
# A column holds products if so many of its first values look like it.
_MOST = 0.9


class Format(NamedTuple):
  """A format of interaction files.

  Attributes:
    description: what it is called in print.
    files: how its file is named in a folder, without `.gz`.
    read: (file, which columns to read) -> interactions.
    named: whether its columns have names.
  """

  description: str
  files: tuple[str, ...]
  read: Callable[[pathlib.Path, Lines], Interactions]
  named: bool = False


def format_of(name: str) -> Format:
  """A format by its name, see `parts.built`.

  Raises:
    UserError: there is none of that name.
  """
  return parts.built(name, FORMATS, Format, 'data format')


def detect(path: pathlib.Path, lines: Lines = Lines()) -> str:
  """The format detected from a file's name and first lines.

  Raises:
    UserError: none.
  """
  if path.suffix.lower() == '.parquet':
    return 'parquet'
  if path.suffix.lower() in ('.arrow', '.feather'):
    return 'arrow'
  head = text_files.head(path)
  if _EXCEL.fullmatch(head[0].strip()) and len(head) > 1:
    return 'csv'
  first = head[0]
  if first.lstrip().startswith('{'):
    return 'amazon-reviews'
  if first.lstrip().startswith('['):
    raise UserError(f'{path}: a JSON array; write one JSON object a line')
  if '::' in first:
    return 'ml-1m'
  if mind.is_behaviors(first):
    return 'mind'
  separator = _separator(first)
  fields = _split(first, separator)
  if any(':' in f for f in fields) and roles.pick(fields, Lines(), 'user'):
    return 'recbole'
  if _by_position(lines, fields):
    return 'csv'
  # One will do: the reader says which other is missing.
  if roles.pick(fields, lines, 'user') or roles.pick(fields, lines, 'item'):
    return (
      'ml-latest'
      if fields == ['userId', 'movieId', 'rating', 'timestamp']
      else 'csv'
    )
  if len(fields) == 4 and columns_lib.is_number(fields[3]):
    if separator == ',':
      return 'amazon-ratings'
    if separator == '\t':
      return 'ml-100k'
  if separator not in (',', ';') and all(map(str.split, head)):
    lengths = {len(line.split()) for line in head}
    if lengths == {2}:
      return 'sasrec'
    # Ids only: a line of words would have letters with spaces between.
    if all(re.fullmatch(r'[\w.:-]+', x) for x in first.split()) and any(
      character.isdigit() for character in first
    ):
      return 'sequences'
  raise UserError(
    f'{path}: cannot tell its format from {first[:60]!r}; say which '
    'it is with `dataset`, or its columns, as in '
    '`dataset=csv,user=who,item=what` (or user=1,item=2, without a header)'
  )


# Delimited text.


def _movielens(separator: str) -> Callable[..., Interactions]:
  layout = Layout(
    separator,
    _MOVIELENS,
    'user id',
    'item id',
    'timestamp',
    numbers=('rating', 'timestamp'),
    whole_ids=True,
  )

  def read(path, lines):
    text_files.head(path)  # empty: told from one without interactions
    ratings = {x: 'rating' for x in lines.further if x == RATING}
    return delimited.read(path, layout._replace(further=ratings))

  return read


def _read_sasrec(path, lines) -> Interactions:
  del lines
  separator = '\t' if '\t' in text_files.head(path)[0] else ' '
  return delimited.read(
    path,
    Layout(
      separator,
      ('user id', 'item id'),
      'user id',
      'item id',
      '',
      whole_ids=True,
    ),
  )


def _read_headed(
  path, lines: Lines, whole: bool = False, typed: bool = False
) -> Interactions:
  """CSV with a header; in RecBole's, each name has its type (`typed`)."""
  start, *more = text_files.head(path)
  header, separator = start, _separator(start)
  told = _EXCEL.fullmatch(start.strip())
  if told and more:
    header, separator = more[0], told[1]
  fields = _split(header, separator)
  if typed:
    fields = [field.partition(':')[0] for field in fields]
  if _by_position(lines, fields):
    return _read_headless(path, lines, separator)
  if len(set(fields)) < len(fields):
    raise UserError(f'{path}, line 1: two columns of one name in {header!r}')
  rows = [_split(line, separator) for line in more]
  examples = dict(zip(fields, zip(*(r for r in rows if len(r) == len(fields)))))
  picked = roles.pick_all(fields, lines, f'{path}, line 1', examples)
  found = delimited.read(
    path,
    Layout(
      separator,
      tuple(fields),
      *picked[:4],
      whole_ids=whole,
      quoted=not typed,
      header_lines=1 + (start != header),
    ),
  )
  return found._replace(roles=picked, notes=picked.notes)


def _by_position(lines: Lines, fields: Sequence[str]) -> bool:
  """Whether columns are named by their positions."""
  if '0' in fields:  # the header of a frame whose columns have no names
    return False
  return all(re.fullmatch('[1-9][0-9]*', x) for x in (lines.user, lines.item))


def _read_headless(
  path,
  lines: Lines,
  separator: str,
  numbers: Sequence[str] = (),
  may_have_header: bool = True,
) -> Interactions:
  """Lines whose columns are called by their positions. If the first one has no
  time where the others have theirs, it may be a header."""
  first = _split(text_files.head(path)[0], separator)
  known = tuple(map(str, range(1, len(first) + 1)))
  rows = [_split(line, separator) for line in text_files.head(path)[1:]]
  examples = dict(zip(known, zip(*(r for r in rows if len(r) == len(known)))))
  picked = roles.pick_all(known, lines, f'{path}, line 1', examples)
  time = picked.time
  has_header = (
    may_have_header and bool(time) and not _is_time(first[int(time) - 1])
  )
  found = delimited.read(
    path,
    Layout(
      separator,
      known,
      *picked[:4],
      numbers=tuple(numbers),
      quoted=True,
      header_lines=int(has_header),
    ),
  )
  start = 'a header' if has_header else 'an interaction'
  return found._replace(
    roles=picked,
    notes=(f'{picked.notes[0]}, by position; the first line is {start}',),
  )


def _read_amazon_ratings(path, lines) -> Interactions:
  if lines.user or lines.item:
    return _read_headless(path, lines, ',')
  # Releases differ in which id comes first.
  head = [_split(line, ',') for line in text_files.head(path)]
  first, second = (
    np.mean([len(fields) > i and _is_product(fields[i]) for fields in head])
    for i in (0, 1)
  )
  item_first = first >= _MOST > second
  certain = item_first or second >= _MOST > first
  user, item = ('2', '1') if item_first else ('1', '2')
  lines = dataclasses.replace(
    lines, user=user, item=item, time='4', rating=lines.rating or '3'
  )
  found = _read_headless(path, lines, ',', ['3'], may_have_header=False)
  why = (
    f'{max(first, second):.0%} of the first items are numbers of products'
    if certain
    else 'no numbers of products tell them apart; if it is the other way '
    f'round say `dataset=amazon-ratings,user={item},item={user},time=4`'
  )
  return found._replace(
    notes=(f'columns    {user} = users, {item} = items, 4 = times: {why}',)
  )


def _is_product(text: str) -> bool:
  """Whether an id has the form of an ASIN: B and nine more, or an ISBN-10."""
  if re.fullmatch(r'B[0-9A-Z]{9}', text):
    return True
  if not re.fullmatch(r'[0-9]{9}[0-9X]', text):
    return False
  digits = [10 if digit == 'X' else int(digit) for digit in text]
  return sum(n * digit for n, digit in zip(range(10, 0, -1), digits)) % 11 == 0


def _read_sequences(path, lines) -> Interactions:
  del lines
  users, items = Numbering(), Numbering()
  user_column, item_column = [], []
  for number, line in text_files.lines(path):
    user, *own = text_files.decode(line, path, number).split()
    if user in users:
      raise UserError(
        f'{path}, line {number}: a second line of user {user}; '
        'expected one line a user: <user id> <item id> <item id> '
        '…; lines of <user id> <item id> are `dataset=sasrec`'
      )
    user_column.append(np.full(len(own), users.of(user)))
    item_column.append(np.fromiter(map(items.of, own), np.int64, len(own)))
  if not items:
    raise UserError(
      f'{path}: no interaction in it; expected lines of '
      '<user id> <item id> <item id> …'
    )
  try:
    return delimited.from_numbered(
      np.concatenate(user_column),
      users,
      np.concatenate(item_column),
      items,
      None,
      whole=False,
    )
  except Doubt:
    raise UserError(
      f'{path}: an id longer than {columns_lib.MAX_ID_LENGTH} '
      'characters, with a control character or missing (nan, '
      'null); is it a text?'
    ) from None


# JSON lines.


def _read_reviews(path, lines) -> Interactions:
  first, *more = text_files.head(path)
  keys: dict[str, list] = {}
  try:
    for line in (first, *more):  # one may lack what others have
      for key, value in text_files.json_object(line).items():
        keys.setdefault(key, []).append(value)
  except ValueError:
    pass  # the reader names it
  if not keys:
    raise UserError(
      f'{path}, line 1: not a JSON object: {first[:60]!r}'
    ) from None
  picked = roles.pick_all(list(keys), lines, f'{path}, line 1', keys)
  try:
    kinds = dict.fromkeys(picked.columns, pa.string())
    if picked.time:
      kinds[picked.time] = pa.int64()
    if RATING in picked.further:
      kinds[picked.further[RATING]] = pa.float64()
    schema = pa.schema(list(kinds.items()))
    with text_files.open_arrow(path) as stream:
      table = arrow_json.read_json(
        stream,
        arrow_json.ReadOptions(block_size=_BLOCK),
        arrow_json.ParseOptions(
          explicit_schema=schema, unexpected_field_behavior='ignore'
        ),
      )
    found = columns_lib.interactions_of(table, *picked[:4])
  except (
    Doubt,
    pa.ArrowInvalid,
    pa.ArrowNotImplementedError,
    OSError,
    *text_files.DAMAGED,
  ):
    found = _reviews_carefully(path, picked)
  return found._replace(roles=picked, notes=picked.notes)


def _reviews_carefully(path, picked: Roles) -> Interactions:
  user, item, time = picked[:3]
  further = {what: Column() for what in picked.further}
  users, items, dates = Numbering(), Numbering(), False
  user_column, item_column, times, numbers = [], [], [], []
  for number, line in text_files.lines(path):

    def wrong(what):
      raise UserError(
        f'{path}, line {number}: {what} in {text[:60]!r}; expected '
        f'a JSON object with ' + ', '.join(filter(None, (user, item, time)))
      )

    text = text_files.decode(line, path, number)
    try:
      review = text_files.json_object(text)
    except ValueError:
      wrong('not a JSON object')
    for name in (user, item):
      if not isinstance(review.get(name), (str, int)):
        wrong(f'no {name}')
      problem = columns_lib.id_problem(str(review[name]), whole=False)
      if problem:
        wrong(f'{name} {problem}')
    user_column.append(users.of(str(review[user])))
    item_column.append(items.of(str(review[item])))
    for what, column in further.items():
      value = review.get(picked.further[what])
      column.append('' if value is None else str(value))
    if time:
      try:
        times.append(columns_lib.parse_time(str(review.get(time))))
        dates |= not columns_lib.is_number(str(review[time]))
      except ValueError:
        wrong(f'{time} is neither a number nor a date')
      numbers.append(number)
  delimited.check_unit(path, time, times, numbers)
  return delimited.from_numbered(
    user_column,
    users,
    item_column,
    items,
    times if time else None,
    whole=False,
    further=further,
    dates=dates,
  )


def _is_time(text: str) -> bool:
  try:
    columns_lib.parse_time(text)
  except ValueError:
    return False
  return True


def _separator(line: str) -> str:
  """The one that occurs; a comma before a tab in doubt."""
  return (
    max(',;\t|', key=line.count) if any(s in line for s in ',;\t|') else ' '
  )


def _split(line: str, separator: str) -> list[str]:
  if separator == ' ':
    return line.split()
  return [
    field.strip() for field in next(csv_lib.reader([line], delimiter=separator))
  ]


FORMATS: Mapping[str, Format] = {
  'ml-1m': Format(
    'MovieLens 1M, user::item::rating::timestamp',
    ('ratings.dat',),
    _movielens('::'),
  ),
  'ml-100k': Format(
    'MovieLens 100K, user, item, rating, timestamp and tabs',
    ('u.data',),
    _movielens('\t'),
  ),
  'ml-latest': Format(
    'MovieLens CSV',
    ('ratings.csv',),
    lambda path, lines: _read_headed(path, lines, whole=True),
    named=True,
  ),
  'recbole': Format(
    'RecBole atomic file',
    ('*.inter',),
    lambda path, lines: _read_headed(path, lines, typed=True),
    named=True,
  ),
  'mind': Format(
    'MIND, histories and clicks of users', ('behaviors.tsv',), mind.read
  ),
  'parquet': Format('Parquet', ('*.parquet',), tables.read_parquet, named=True),
  'arrow': Format(
    'Arrow', ('*.arrow', '*.feather'), tables.read_arrow, named=True
  ),
  'amazon-reviews': Format(
    'Amazon reviews, a JSON object a line',
    ('*.json', '*.jsonl'),
    _read_reviews,
    named=True,
  ),
  'amazon-ratings': Format(
    'Amazon ratings, CSV without a header',
    ('*.csv',),
    _read_amazon_ratings,
    named=True,
  ),
  'csv': Format(
    'CSV with a header', ('*.csv', '*.tsv'), _read_headed, named=True
  ),
  'sasrec': Format(
    'SASRec, "user item" lines in time order', ('*.txt',), _read_sasrec
  ),
  'sequences': Format(
    'one user a line, items in time order', ('*.txt',), _read_sequences
  ),
}
