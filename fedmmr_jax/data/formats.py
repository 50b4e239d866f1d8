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
import pathlib
import re
from typing import Any, Callable, cast, Mapping, NamedTuple, Sequence

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
    'username',
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
NONE = 'none'
# Words of a column's name by which it may hold times.
_TIME_WORDS = set(
  'time date datetime timestamp stamp at dt dat ts when day created modified '
  'updated added published watched'.split()
)
# What Excel writes first: the separator of the lines below.
_EXCEL = re.compile(r'"?sep=(.)"?', re.IGNORECASE)
# Names of files that somebody has split.
_PART = re.compile(r'(^|[._-])(train|valid|validation|val|dev|test)([._-]|$)')
_DATE = re.compile(r'[0-9]{4}-[0-9]{2}-[0-9]{2}([T ].*)?')
_MOVIELENS = ('user id', 'item id', 'rating', 'timestamp')
_BLOCK = 1 << 26  # bytes; a review must fit into a block
# A column holds products if so many of its first values look like it.
_MOST = 0.9


@dataclasses.dataclass(frozen=True)
class ColumnNames:
  """Options of the formats whose columns have names: which column is whose.
  '' = one of ALIASES. In a file without a header they are positions, from 1.
  `time=none`: the order of the file counts."""

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
  if path.suffix.lower() == '.parquet':
    return 'parquet'
  lines = text_files.head(path)
  if _EXCEL.fullmatch(lines[0].strip()) and len(lines) > 1:
    return 'csv'
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
  if _by_position(names, fields):
    return 'csv'
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
    'it is with `dataset`, or its columns, as in '
    '`dataset=csv,user=who,item=what` (or user=1,item=2, without a header)'
  )


def _find_in(folder: pathlib.Path, dataset: str) -> pathlib.Path:
  wanted = FORMATS if dataset == AUTO else {dataset: format_of(dataset)}
  patterns = dict.fromkeys(p for f in wanted.values() for p in f.files)
  found: list[pathlib.Path] = []
  for pattern in patterns:
    matching = [
      path
      for path in text_files.matching(folder, pattern)
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
  parts_of_it = [path.name for path in found if _PART.search(path.name.lower())]
  if len(parts_of_it) > 1:
    raise UserError(
      f'{folder}: {", ".join(parts_of_it)} look like training, validation and '
      'test of one set; splits are made here (`split_by`), so put them into '
      'one file in the order of time, and name it with `data_dir`'
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
  start, *more = text_files.head(path)
  header, separator = start, _separator(start)
  told = _EXCEL.fullmatch(start.strip())
  if told and more:
    header, separator = more[0], told[1]
  fields = _split(header, separator)
  if typed:
    fields = [field.partition(':')[0] for field in fields]
  if _by_position(names, fields):
    return _read_headless(path, names, separator)
  if len(set(fields)) < len(fields):
    raise UserError(f'{path}, line 1: two columns of one name in {header!r}')
  rows = [_split(line, separator) for line in more]
  examples = dict(zip(fields, zip(*(r for r in rows if len(r) == len(fields)))))
  picked = _pick_all(fields, names, f'{path}, line 1', examples)
  found = delimited.read(
    path,
    Layout(
      separator,
      tuple(fields),
      *picked,
      whole_ids=whole,
      quoted=not typed,
      header_lines=1 + (start != header),
    ),
  )
  return found._replace(notes=_about_columns(picked))


def _by_position(names: ColumnNames, fields: Sequence[str]) -> bool:
  """Whether columns are named by their positions."""
  if '0' in fields:  # the header of a frame whose columns have no names
    return False
  return all(re.fullmatch('[1-9][0-9]*', x) for x in (names.user, names.item))


def _read_headless(
  path,
  names: ColumnNames,
  separator: str,
  numbers: Sequence[str] = (),
  may_have_header: bool = True,
) -> Interactions:
  """Lines whose columns are called by their positions. If the first one has no
  time where the others have theirs, it may be a header."""
  first = _split(text_files.head(path)[0], separator)
  known = tuple(map(str, range(1, len(first) + 1)))
  user, item, time = _pick_all(known, names, f'{path}, line 1')
  has_header = (
    may_have_header and bool(time) and not _is_time(first[int(time) - 1])
  )
  found = delimited.read(
    path,
    Layout(
      separator,
      known,
      user,
      item,
      time,
      numbers=tuple(numbers),
      quoted=True,
      header_lines=int(has_header),
    ),
  )
  told = f'{user} = users, {item} = items' + (time and f', {time} = times')
  start = 'a header' if has_header else 'an interaction'
  return found._replace(
    notes=(f'columns    {told}, by position; the first line is {start}',)
  )


def _read_amazon_ratings(path, names) -> Interactions:
  if names.user or names.item:
    return _read_headless(path, names, ',')
  # Releases differ in which id comes first.
  lines = [_split(line, ',') for line in text_files.head(path)]
  first, second = (
    np.mean([len(fields) > i and _is_product(fields[i]) for fields in lines])
    for i in (0, 1)
  )
  item_first = first >= _MOST > second
  certain = item_first or second >= _MOST > first
  user, item = ('2', '1') if item_first else ('1', '2')
  names = ColumnNames(user, item, '4')
  found = _read_headless(path, names, ',', ['3'], may_have_header=False)
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
  user, item, time = _pick_all(list(keys), names, f'{path}, line 1', keys)
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
    found = _from_table(table, (user, item, time))
  except (
    Doubt,
    pa.ArrowInvalid,
    pa.ArrowNotImplementedError,
    OSError,
    *text_files.DAMAGED,
  ):
    found = _reviews_carefully(path, user, item, time)
  return found._replace(notes=_about_columns((user, item, time)))


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


def _read_parquet(path, names) -> Interactions:
  try:
    with text_files.readable(path):
      file = arrow_parquet.ParquetFile(path)
      dates = {
        field.name: ['2000-01-01']
        for field in file.schema_arrow
        if pa.types.is_timestamp(field.type) or pa.types.is_date(field.type)
      }
      picked = _pick_all(file.schema_arrow.names, names, str(path), dates)
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
      or pa.types.is_floating(kind)
    ):
      raise UserError(
        f'{path}: {name} is of type {kind}; ids are whole numbers or strings'
      )
  try:
    found = _from_table(table, picked)
    return found._replace(notes=_about_columns(picked))
  except Doubt:
    raise UserError(f'{path}, {_fault_of(table, picked)}') from None


def _fault_of(table: pa.Table, picked: Sequence[str]) -> str:
  """Row, column and value that a table cannot be read for."""
  for name in picked[:2]:
    floats = pa.types.is_floating(table.schema.field(name).type)
    for row, value in enumerate(table[name].to_pylist()):
      problem = (
        'is not a whole number'
        if floats and not float(value).is_integer()
        else columns_lib.id_problem(str(value), whole=False)
      )
      if not isinstance(value, str) and abs(value) >= 2**63:
        problem = 'is beyond 63 bits'
      if problem:
        return f'row {row}: {name} {problem}: {value!r}'
  name = picked[2]
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
  fields: Sequence[str],
  names: ColumnNames,
  where: str,
  examples: Mapping[str, Sequence[Any]] = {},
) -> tuple[str, str, str]:
  """(user, item, time or '').

  Args:
    fields: names of all columns.
    names: those that are given.
    where: the file, for errors.
    examples: some values of each column.

  Raises:
    UserError: a column that is named, or one of ids, is missing, or none has
      a usual name of times while one looks as if it held them.
  """
  if names.time == NONE:
    names = dataclasses.replace(names, time='')
    wanted: tuple[str, ...] = ('user', 'item')
  else:
    wanted = ('user', 'item', 'time')
  for what in wanted:
    asked = getattr(names, what)
    if not _pick(fields, names, what) and (asked or what != 'time'):
      raise UserError(
        f'{where}: no column '
        + (asked or f'of the {what}s')
        + ' among '
        + ', '.join(fields)
        + f'; name it, as in `dataset=auto,{what}=…`'
      )
  picked = tuple(_pick(fields, names, what) for what in wanted) + ('',)
  if len(set(picked[:3])) < 3:
    raise UserError(
      f'{where}: users {picked[0]}, items {picked[1]} and times '
      f'{picked[2] or "-"} must be different columns'
    )
  alike = [
    field
    for field in fields
    if field not in picked and _may_be_time(field, examples.get(field, ()))
  ]
  if 'time' in wanted and not picked[2] and alike:
    raise UserError(
      f'{where}: no column has a usual name of times '
      f'({", ".join(ALIASES["time"])}), but {" and ".join(alike)} may hold '
      f'some; say `dataset=auto,time={alike[0]}`, or time=none if the order '
      'of the file is the order in time'
    )
  return cast(tuple[str, str, str], picked[:3])


def _about_columns(picked: Sequence[str]) -> tuple[str, ...]:
  user, item, time = picked
  when = f', {time} = times' if time else ''
  return (f'columns    {user} = users, {item} = items{when}',)


def _may_be_time(name: str, values: Sequence[Any]) -> bool:
  """Whether a column may hold times, by the words of its name or by dates."""
  words = re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', name.partition(':')[0])
  if _TIME_WORDS & set(re.split(r'[^a-z0-9]+', words.lower())):
    return True
  return bool(values) and all(_DATE.fullmatch(str(x).strip()) for x in values)


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
