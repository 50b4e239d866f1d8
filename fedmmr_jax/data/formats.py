"""The formats of interaction files: detecting and reading them.

Each is listed with its file in a folder and the content of a line:

    ml-1m: `ratings.dat`; `user::item::rating::timestamp` (MovieLens 1M, 10M)
    ml-100k: `u.data`; user, item, rating, timestamp between tabs
    ml-latest: `ratings.csv`; CSV `userId,movieId,rating,timestamp` (newer
      MovieLens sets)
    sasrec: `*.txt`; `user item`, in time order (Kang & McAuley 2018)
    sequences: `*.txt`; a user, then all its items in time order
    recbole: `*.inter`; tabs, header `user_id:token` … (Zhao et al. 2021)
    amazon-reviews: `*.json`, `*.jsonl`; a JSON object (Ni et al. 2019, Hou et
      al. 2024)
    amazon-ratings: `*.csv`; CSV without header: user, item, rating, timestamp,
      or item first
    csv: `*.csv`, `*.tsv`; header; commas, semicolons or tabs
    parquet: `*.parquet`

All but Parquet may be gzipped. Every line is an interaction, whatever its
rating (implicit feedback).
"""

import csv as csv_lib
import dataclasses
import json
import pathlib
import re
from typing import Callable, cast, Mapping, NamedTuple, Sequence

import numpy as np
import pyarrow as pa
from pyarrow import json as arrow_json
from pyarrow import parquet as arrow_parquet

from fedmmr_jax import parts
from fedmmr_jax.data import columns as columns_lib
from fedmmr_jax.data import delimited, text_files
from fedmmr_jax.data.columns import Doubt
from fedmmr_jax.data.delimited import Layout, Numbering
from fedmmr_jax.data.interactions import Interactions
from fedmmr_jax.errors import UserError

AUTO = 'auto'
# Names that a column goes by, compared without case.
ALIASES = {
  'user': (
    'user_id',
    'userid',
    'user',
    'uid',
    'reviewerid',
    'customer_id',
    'session_id',
  ),
  'item': (
    'item_id',
    'itemid',
    'item',
    'iid',
    'movieid',
    'movie_id',
    'parent_asin',
    'asin',
    'product_id',
    'article_id',
    'news_id',
  ),
  'time': ('timestamp', 'time', 'unixreviewtime', 'datetime', 'date', 'ts'),
}
_MOVIELENS = ('user id', 'item id', 'rating', 'timestamp')
_BLOCK = 1 << 26  # bytes; a review must fit into a block
_ASIN_LENGTH = 10


@dataclasses.dataclass(frozen=True)
class ColumnNames:
  """Options of the formats whose columns have names: which column is whose.
  '' = one of ALIASES."""

  user: str = ''
  item: str = ''
  time: str = ''


class Format(NamedTuple):
  """A format of interaction files.

  Attributes:
    description: what it is called in print.
    files: how its file is named in a folder, without `.gz`.
    read: (file, names of columns) -> interactions.
    named: whether its columns have names.
  """

  description: str
  files: tuple[str, ...]
  read: Callable[[pathlib.Path, ColumnNames], Interactions]
  named: bool = False


class Source(NamedTuple):
  """Where the interactions are.

  Attributes:
    path: the file.
    format: its name, see `format_of`.
    detected: whether it was detected from the file, not given by a flag.
    names: of its columns, where they are given.
  """

  path: pathlib.Path
  format: str
  detected: bool
  names: ColumnNames = ColumnNames()

  @property
  def folder(self) -> pathlib.Path:
    """Where item file and features are looked for."""
    return self.path.parent

  def __str__(self) -> str:
    how = 'detected' if self.detected else 'as named'
    return f'{self.path}: {format_of(self.format).description} ({how})'


def format_of(name: str) -> Format:
  """A format by its name, see `parts.built`.

  Raises:
    UserError: there is none of that name.
  """
  return parts.built(name, FORMATS, Format, 'data format')


def find(dataset: str, data_dir: str, setting: str = 'data_dir') -> Source:
  """The interaction file, and its format.

  Args:
    dataset: a key of FORMATS, 'auto', or a `Format` from outside as
      'my_package.module:Thing'; with names of columns as options, as in
      'csv,user=who,item=what'.
    data_dir: the file, or the folder that holds it.
    setting: where `data_dir` comes from, for errors.

  Raises:
    UserError: no such file, several, or one of no known format, or an option
      that it does not have.
  """
  text = dataset
  dataset, given = parts.split(text)
  # Refused before anything is looked for.
  named = dataset == AUTO or format_of(dataset).named
  names = ColumnNames()
  if given:
    names = parts.make(
      ColumnNames if named else None, given, f'`dataset={text}`'
    )
  path = pathlib.Path(data_dir)
  if path.is_dir():
    path = _find_in(path, dataset)
  elif not path.exists():
    raise UserError(
      f'`{setting}={data_dir}`: no such file or folder; name the folder of '
      'the data set, or its interaction file'
    )
  if dataset != AUTO:
    return Source(path, dataset, False, names)
  return Source(path, detect(path, names), True, names)


def read(source: Source) -> Interactions:
  """Reads the interactions.

  Raises:
    UserError: what is malformed, with its line.
  """
  form = format_of(source.format)
  if source.names != ColumnNames() and not form.named:
    raise UserError(
      f'{source.path}: {form.description}, has no named columns; '
      '`dataset` cannot name any'
    )
  return form.read(source.path, source.names)


def detect(path: pathlib.Path, names: ColumnNames = ColumnNames()) -> str:
  """The format detected from a file's name and first lines.

  Raises:
    UserError: none.
  """
  if path.suffix == '.parquet':
    return 'parquet'
  lines = text_files.head(path)
  first = lines[0]
  if first.lstrip().startswith('{'):
    return 'amazon-reviews'
  if first.lstrip().startswith('['):
    raise UserError(f'{path}: a JSON array; write one JSON object a line')
  if '::' in first:
    return 'ml-1m'
  separator = _separator(first)
  fields = _split(first, separator)
  if any(':' in f for f in fields) and _pick(fields, ColumnNames(), 'user'):
    return 'recbole'
  # One will do: the reader says which other is missing.
  if _pick(fields, names, 'user') or _pick(fields, names, 'item'):
    return (
      'ml-latest'
      if fields == ['userId', 'movieId', 'rating', 'timestamp']
      else 'csv'
    )
  if len(fields) == 4 and _is_number(fields[3]):
    if separator == ',':
      return 'amazon-ratings'
    if separator == '\t':
      return 'ml-100k'
  if separator not in (',', ';') and all(map(str.split, lines)):
    lengths = {len(line.split()) for line in lines}
    if lengths == {2}:
      return 'sasrec'
    # Ids only: a line of words would have letters with spaces between.
    if all(re.fullmatch(r'[\w.:-]+', x) for x in first.split()) and any(
      character.isdigit() for character in first
    ):
      return 'sequences'
  raise UserError(
    f'{path}: cannot tell its format from {first[:60]!r}; say which '
    'it is with `dataset`, or name its columns, as in '
    '`dataset=csv,user=who,item=what`'
  )


def _find_in(folder: pathlib.Path, dataset: str) -> pathlib.Path:
  wanted = FORMATS if dataset == AUTO else {dataset: format_of(dataset)}
  patterns = dict.fromkeys(p for f in wanted.values() for p in f.files)
  found: list[pathlib.Path] = []
  for pattern in patterns:
    matching = [
      path
      for end in ('', '.gz')
      for path in folder.glob(pattern + end)
      if not _is_about_items(path)
    ]
    if matching and '*' not in pattern:  # a name that says all
      return matching[0]
    found += [path for path in sorted(matching) if path not in found]
  if not found:
    raise UserError(
      f'{folder / next(iter(patterns))}: no such file; `data_dir` must be '
      'the folder that holds '
      + (f"{dataset}'s " if dataset != AUTO else 'one of ')
      + ', '.join(patterns)
      + ', or the file itself'
    )
  if len(found) > 1:
    raise UserError(
      f'{folder}: {", ".join(p.name for p in found)} could each be the '
      f'interactions; name one: `data_dir={found[0]}`'
    )
  return found[0]


def _is_about_items(path: pathlib.Path) -> bool:
  """Files that lie beside the interactions and are something else."""
  name = path.name.lower()
  return name.startswith(
    (
      'meta_',
      'items.',
      'item_',
      'movies.',
      'tags.',
      'links.',
      'genome',
      'readme',
      '.',
    )
  ) or name.endswith('_features.json')


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
  return lambda path, names: _read_lines(path, layout)


def _read_lines(path, layout) -> Interactions:
  text_files.head(path)  # an empty file is told from one without interactions
  return delimited.read(path, layout)


def _read_sasrec(path, names) -> Interactions:
  del names
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
  path, names: ColumnNames, whole: bool = False, typed: bool = False
) -> Interactions:
  """CSV with a header; in RecBole's, each name has its type (`typed`)."""
  header = text_files.head(path)[0]
  separator = '\t' if typed else _separator(header)
  fields = _split(header, separator)
  if typed:
    fields = [field.partition(':')[0] for field in fields]
  if len(set(fields)) < len(fields):
    raise UserError(f'{path}, line 1: two columns of one name in {header!r}')
  picked = _pick_all(fields, names, f'{path}, line 1')
  return delimited.read(
    path,
    Layout(
      separator,
      tuple(fields),
      *picked,
      whole_ids=whole,
      quoted=not typed,
      has_header=True,
    ),
  )


def _read_amazon_ratings(path, names) -> Interactions:
  del names
  lines = [_split(line, ',') for line in text_files.head(path)]
  # Releases differ in which id comes first; a product's has 10 characters.
  first, second = (
    sum(len(fields) > i and len(fields[i]) == _ASIN_LENGTH for fields in lines)
    for i in (0, 1)
  )
  item_first = first > second
  ids = ('item', 'user') if item_first else ('user', 'item')
  return delimited.read(
    path,
    Layout(
      ',',
      (*ids, 'rating', 'timestamp'),
      'user',
      'item',
      'timestamp',
      numbers=('rating', 'timestamp'),
      quoted=True,
    ),
  )


def _read_sequences(path, names) -> Interactions:
  del names
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


# JSON lines and Parquet.


def _read_reviews(path, names) -> Interactions:
  first, *more = text_files.head(path)
  keys: dict[str, None] = {}
  try:
    for line in (first, *more):  # one may lack what others have
      keys |= dict.fromkeys(_json_object(line))
  except ValueError:
    pass  # the reader names it
  if not keys:
    raise UserError(
      f'{path}, line 1: not a JSON object: {first[:60]!r}'
    ) from None
  user, item, time = _pick_all(list(keys), names, f'{path}, line 1')
  try:
    schema = pa.schema(
      [
        (user, pa.string()),
        (item, pa.string()),
        *([(time, pa.int64())] if time else []),
      ]
    )
    with text_files.open_arrow(path) as stream:
      table = arrow_json.read_json(
        stream,
        arrow_json.ReadOptions(block_size=_BLOCK),
        arrow_json.ParseOptions(
          explicit_schema=schema, unexpected_field_behavior='ignore'
        ),
      )
    return _from_table(table, (user, item, time))
  except (Doubt, pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError):
    return _reviews_carefully(path, user, item, time)


def _reviews_carefully(path, user, item, time) -> Interactions:
  users, items = Numbering(), Numbering()
  user_column, item_column, times, numbers = [], [], [], []
  for number, line in text_files.lines(path):

    def wrong(what):
      raise UserError(
        f'{path}, line {number}: {what} in {text[:60]!r}; expected '
        f'a JSON object with ' + ', '.join(filter(None, (user, item, time)))
      )

    text = text_files.decode(line, path, number)
    try:
      review = _json_object(text)
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
    if time:
      try:
        times.append(columns_lib.parse_time(str(review.get(time))))
      except ValueError:
        wrong(f'{time} is neither a number nor a date')
      numbers.append(number)
  delimited.check_unit(path, time, times, numbers)
  return delimited.from_numbered(
    user_column, users, item_column, items, times if time else None, whole=False
  )


def _json_object(text: str) -> dict:
  try:
    found = json.loads(text)
  except RecursionError:
    raise ValueError(text) from None
  if not isinstance(found, dict):
    raise ValueError(text)
  return found


def _read_parquet(path, names) -> Interactions:
  try:
    with text_files.readable(path):
      file = arrow_parquet.ParquetFile(path)
      picked = _pick_all(file.schema_arrow.names, names, str(path))
      if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
        raise UserError(f'{path}: two columns of one name')
      table = file.read(columns=[name for name in picked if name])
  except pa.ArrowInvalid as error:
    raise UserError(f'{path}: not a readable Parquet file ({error})') from None
  if not table.num_rows:
    raise UserError(f'{path}: no interaction in it')
  for name in table.column_names:
    if table[name].null_count:
      row = table[name].is_null().to_numpy().argmax()
      raise UserError(
        f'{path}, row {row}: {name} is missing; leave such rows out'
      )
  for name in picked[:2]:
    kind = table.schema.field(name).type
    if pa.types.is_dictionary(kind):
      kind = kind.value_type
    if not (
      pa.types.is_integer(kind)
      or pa.types.is_string(kind)
      or pa.types.is_large_string(kind)
    ):
      raise UserError(
        f'{path}: {name} is of type {kind}; ids are whole numbers or strings'
      )
  try:
    return _from_table(table, picked)
  except Doubt:
    raise UserError(
      f'{path}: an id in {picked[0]} or {picked[1]} is empty or missing, '
      f'longer than {columns_lib.MAX_ID_LENGTH} characters, beyond 63 bits or '
      'holds a control character'
      + (
        f', or {picked[2]} is neither a finite number nor a date, or not in '
        'the unit of most others'
        if picked[2]
        else ''
      )
    ) from None


def _from_table(table: pa.Table, picked: Sequence[str]) -> Interactions:
  user, item, time = picked
  users, user_ids = columns_lib.ids_of(table[user], whole=False)
  items, item_ids = columns_lib.ids_of(table[item], whole=False)
  times = columns_lib.seconds_of(table[time]) if time else None
  return Interactions(users, items, times, user_ids, item_ids)


# Which column is which.


def _pick(fields: Sequence[str], names: ColumnNames, what: str) -> str:
  """The column that holds `what` ('user', 'item' or 'time'); '' if none."""
  asked = getattr(names, what)
  if asked:
    return asked if asked in fields else ''
  by_name = {
    field.partition(':')[0].lower().replace(' ', '_'): field for field in fields
  }
  return next((by_name[a] for a in ALIASES[what] if a in by_name), '')


def _pick_all(
  fields: Sequence[str], names: ColumnNames, where: str
) -> tuple[str, str, str]:
  """(user, item, time or '').

  Raises:
    UserError: a column that a flag names, or one of ids, is missing.
  """
  for what in ('user', 'item', 'time'):
    asked = getattr(names, what)
    if not _pick(fields, names, what) and (asked or what != 'time'):
      raise UserError(
        f'{where}: no column '
        + (asked or f'of the {what}s')
        + ' among '
        + ', '.join(fields)
        + f'; name it, as in `dataset=auto,{what}=…`'
      )
  picked = tuple(
    _pick(fields, names, what) for what in ('user', 'item', 'time')
  )
  if len(set(picked)) < len(picked):
    raise UserError(
      f'{where}: users {picked[0]}, items {picked[1]} and times '
      f'{picked[2] or "-"} must be different columns'
    )
  return cast(tuple[str, str, str], picked)


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


def _is_number(text: str) -> bool:
  try:
    columns_lib.parse_number(text)
  except ValueError:
    return False
  return True


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
    lambda path, names: _read_headed(path, names, whole=True),
    named=True,
  ),
  'recbole': Format(
    'RecBole atomic file',
    ('*.inter',),
    lambda path, names: _read_headed(path, names, typed=True),
    named=True,
  ),
  'parquet': Format('Parquet', ('*.parquet',), _read_parquet, named=True),
  'amazon-reviews': Format(
    'Amazon reviews, a JSON object a line',
    ('*.json', '*.jsonl'),
    _read_reviews,
    named=True,
  ),
  'amazon-ratings': Format(
    'Amazon ratings, CSV without a header', ('*.csv',), _read_amazon_ratings
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
