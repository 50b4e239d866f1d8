"""The items of a source: ids, titles, texts.

The item files recognised in a folder:

    `movies.dat`: MovieLens 1M (latin-1) and 10M (UTF-8),
      `MovieID::Title::Genre|Genre`
    `u.item`: MovieLens 100K, `|`-separated, latin-1, genres as 0 and 1
    `movies.csv`, `items.csv`, `items.tsv`: CSV with a header, UTF-8; newer
      MovieLens sets have `movies.csv`
    `*.item`: RecBole
    `meta_*.json`, `meta_*.jsonl`, `items.jsonl`: Amazon metadata, a JSON object
      a line
    `items.parquet`: Parquet
    `news.tsv`: MIND, no header: id, category, subcategory, title, abstract, …
    `yelp_academic_dataset_business.json`: Yelp

All but Parquet may be gzipped.
"""

import csv
import html
import pathlib
import re
from typing import Any, Iterator, Mapping, NamedTuple

import numpy as np
from pyarrow import parquet as arrow_parquet

from fedmmr_jax.data import text_files
from fedmmr_jax.data.interactions import Interactions
from fedmmr_jax.data.roles import ALIASES
from fedmmr_jax.data.sources import Source
from fedmmr_jax.errors import UserError

FILES = (
  'movies.dat',
  'u.item',
  'movies.csv',
  'items.csv',
  'items.tsv',
  '*.item',
  'items.parquet',
  'items.jsonl',
  'meta_*.jsonl',
  'meta_*.json',
  'news.tsv',
  'yelp_academic_dataset_business.json',
)
# Whole-number ids up to here are rows of a feature matrix as they stand.
LARGEST_ROW = 10_000_000
_TITLE = (
  'title',
  'movie_title',
  'name',
  'product_name',
  'item_name',
  'product_title',
  'headline',
)
_GENRES = ('genres', 'genre', 'class', 'category', 'categories', 'tags')
# What MovieLens calls no genre; to a text model it would be one.
_NO_GENRE = '(no genres listed)'
FRACTION = re.compile(r'\.0+$')
_TAG = re.compile(r'</?[a-zA-Z][^<>]*>|<!--.*?-->', re.DOTALL)
csv.field_size_limit(1 << 24)  # descriptions may be long
_ABSTRACT = ('abstract', 'description', 'overview', 'summary', 'text')
# u.item: what the 0 and 1 behind the fifth field stand for (u.genre).
_GENRES_100K = (
  'unknown',
  'Action',
  'Adventure',
  'Animation',
  "Children's",
  'Comedy',
  'Crime',
  'Documentary',
  'Drama',
  'Fantasy',
  'Film-Noir',
  'Horror',
  'Musical',
  'Mystery',
  'Romance',
  'Sci-Fi',
  'Thriller',
  'War',
  'Western',
)


class Item(NamedTuple):
  """One line of an item file.

  Attributes:
    title: '' if the file has none.
    genres: what kind of item it is.
    abstract: a longer text, or ''.
  """

  title: str
  genres: tuple[str, ...] = ()
  abstract: str = ''

  @property
  def text(self) -> str:
    """What a text model reads; '' if there is nothing."""
    title = self.title and self.title.rstrip('.') + '.'
    genres = f'Genres: {", ".join(self.genres)}.' if self.genres else ''
    return ' '.join(filter(None, (title, genres, self.abstract)))


class ItemTable(NamedTuple):
  """Items of a source, whether or not a filter keeps them.

  Attributes:
    ids: [n] the source's own ids, int64 or strings, ascending.
    rows: [n] int64, the row of a feature matrix that belongs to each; ≥ 1.
    num_rows: rows of a feature matrix, row 0 = padding.
    titles: id -> title, of those that have one.
    texts: id -> what the text model reads (title, genres, abstract).
    retold: how many items the file describes more than once and differently;
      the last line counts.
    genres: id -> what kinds of item it is, of those that have any.
  """

  ids: np.ndarray
  rows: np.ndarray
  num_rows: int
  titles: dict
  texts: dict
  retold: int = 0
  genres: Mapping = {}

  @property
  def numbering_is_plain(self) -> bool:
    """Is row i of a feature matrix item i?"""
    return np.array_equal(self.rows, self.ids)

  @property
  def starts_at_zero(self) -> bool:
    """Is row i + 1 item i?"""
    return self.ids.dtype.kind == 'i' and np.array_equal(
      self.rows, self.ids + 1
    )

  @property
  def numbering(self) -> str:
    """The row of each item in a feature matrix."""
    if self.numbering_is_plain:
      return 'row i of a feature matrix is item i'
    if self.starts_at_zero:
      return 'items start at 0: row i + 1 of a feature matrix is item i'
    return (
      f'items are numbered in the order of their ids, {self.ids[0]} = 1 '
      f'to {self.ids[-1]} = {len(self.ids)}: these are the rows of a '
      'feature matrix'
    )

  def rows_of(self, ids: np.ndarray) -> np.ndarray:
    """[m] rows of some of the items."""
    return self.rows[np.searchsorted(self.ids, ids)]


def find(source: Source, item_file: str) -> pathlib.Path | None:
  """The item file: the one that `item_file` names, or the one in the folder.

  Raises:
    UserError: there is no such file, or there are several.
  """
  if item_file:
    path = pathlib.Path(item_file)
    if not path.exists():
      raise UserError(f'`item_file={item_file}`: no such file')
    return path
  found = list(
    dict.fromkeys(
      path
      for pattern in FILES
      for path in text_files.matching(source.folder, pattern)
    )
  )
  if len(found) > 1:
    raise UserError(
      f'{source.folder}: {", ".join(p.name for p in found)} could each tell '
      f'of the items; name one: `item_file={found[0]}`'
    )
  return found[0] if found else None


def table(interactions: Interactions, path: pathlib.Path | None) -> ItemTable:
  """Combines the items of both files.

  Whole-number ids are kept as rows of the feature matrices; so are those of
  items that nobody consumed. Other ids are numbered, those in the interactions.

  Raises:
    UserError: a malformed line of the item file (named).
  """
  lines = read(path) if path else []
  items = described = dict(lines)
  retold = len({i for i, item in lines if item != described[i]})
  ids = interactions.item_ids
  if ids.dtype.kind == 'i':
    # As in the interactions, `12.0` is 12.
    whole = ((FRACTION.sub('', i), item) for i, item in items.items())
    items = {int(i): item for i, item in whole if _is_whole(i)}
    ids = np.union1d(
      ids, np.array([i for i in items if 0 <= i <= LARGEST_ROW], np.int64)
    )
    kept = ids[0] >= 0 and ids[-1] <= LARGEST_ROW
    rows = ids + (ids[0] == 0) if kept else 1 + np.arange(len(ids))
  else:
    rows = 1 + np.arange(len(ids))
  known = {i: items[i] for i in ids.tolist() if i in items}
  if described and not set(interactions.item_ids.tolist()) & set(known):
    raise UserError(
      f'{path}: tells of no item of the interactions, whose ids '
      f'are {interactions.item_ids[0]} to '
      f'{interactions.item_ids[-1]}; is it of another data set?'
    )
  return ItemTable(
    ids,
    rows,
    int(rows[-1]) + 1,
    {i: item.title for i, item in known.items() if item.title},
    {i: item.text for i, item in known.items() if item.text},
    retold,
    {i: item.genres for i, item in known.items() if item.genres},
  )


def read(path: pathlib.Path) -> list[tuple[str, Item]]:
  """(Id as text, item) of each line.

  Raises:
    UserError: a malformed line (named).
  """
  name = text_files.plain_name(path).lower()
  if name.endswith('.parquet'):
    return _read_parquet(path)
  if not any(True for _ in text_files.lines(path)):
    return []
  if name == 'news.tsv':
    return list(_read_mind(path))
  if name == 'u.item':
    return list(_read_movielens(path, '|'))
  first = text_files.head(path)[0]
  if '::' in first or name.endswith('.dat'):
    return list(_read_movielens(path, '::'))
  if first.lstrip().startswith('{'):
    return list(_read_json(path))
  return list(_read_headed(path))


def _read_movielens(path, separator: str) -> Iterator[tuple[str, Item]]:
  # 10M is UTF-8, the earlier ones are latin-1, whose letters are no UTF-8.
  encoding = 'utf-8' if text_files.is_utf8(path) else 'latin-1'
  for number, line in text_files.lines(path):
    fields = text_files.decode(line, path, number, encoding).split(separator)
    if len(fields) < 3 or not (fields[0].isascii() and fields[0].isdigit()):
      raise UserError(
        f'{path}, line {number}: expected '
        f'"MovieID{separator}Title{separator}…", found '
        f'{line[:60].decode(encoding)!r}'
      )
    if separator == '|':  # title, date, date, link, then a flag a genre
      genres = [
        name
        for name, flag in zip(_GENRES_100K, fields[5:])
        if flag.strip() == '1'
      ]
    else:
      genres = _as_list(fields[2])
    yield fields[0], Item(fields[1], tuple(genres))


def _read_mind(path) -> Iterator[tuple[str, Item]]:
  for number, fields in rows(path, '\t', quoted=False):
    if len(fields) < 5:
      raise UserError(
        f'{path}, line {number}: {len(fields)} fields; expected <news> '
        '<category> <subcategory> <title> <abstract> …, between tabs'
      )
    news, category, subcategory, title, abstract = fields[:5]
    genres = tuple(dict.fromkeys(filter(None, (category, subcategory))))
    yield news, Item(_plain(title), genres, _plain(abstract))


def _read_headed(path) -> Iterator[tuple[str, Item]]:
  header, found = headed(path)
  header = [field.lower() for field in header]
  picked = _pick(header, f'{path}, line 1')
  for _, fields in found:
    values = dict(zip(header, fields))
    yield values[picked['id']].strip(), _item(values, picked)


def headed(
  path: pathlib.Path,
) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
  """(Names of fields, `rows`) of a small CSV, or of a file of RecBole, where
  each name has its type behind it and a quote is part of a text.

  Raises:
    UserError: a line has more or fewer fields than the first one.
  """
  separator = max(',;\t', key=text_files.head(path)[0].count)
  of_recbole = text_files.plain_name(path).lower().endswith(('.item', '.user'))
  found = rows(path, separator, quoted=not of_recbole)
  _, first = next(found)

  def checked() -> Iterator[tuple[int, list[str]]]:
    for number, fields in found:
      if len(fields) != len(first):
        raise UserError(
          f'{path}, line {number}: {len(fields)} fields instead of '
          f'{len(first)} in {separator.join(fields)[:60]!r}'
        )
      yield number, fields

  return [field.partition(':')[0].strip() for field in first], checked()


def rows(
  path: pathlib.Path, separator: str, quoted: bool
) -> Iterator[tuple[int, list[str]]]:
  """Yields (number of its last line, fields) of a small file; quoted fields may
  hold ends of lines, as descriptions do.

  Between tabs, quotes that do not pair are part of the text: nothing there
  needs any (the titles of MIND: `"Best" of …`).
  """
  if quoted and separator == '\t' and not _is_csv(path, separator):
    quoted = False
  at = 0

  def texts():
    nonlocal at
    for at, line in text_files.lines(path):
      yield text_files.decode(line, path, at) + '\n'

  if quoted:
    try:
      for fields in csv.reader(texts(), delimiter=separator, strict=True):
        yield at, fields
    except csv.Error as error:
      raise UserError(
        f'{path}, line {at}: not CSV ({error}); is a quote not closed?'
      ) from None
  else:  # in RecBole's files a quote is part of a title
    for text in texts():
      yield at, text.rstrip('\n').split(separator)


def _is_csv(path, separator: str) -> bool:
  """Whether every quote is one of CSV, and every line has as many fields."""
  texts = (
    line.decode('utf-8', 'replace') + '\n' for _, line in text_files.lines(path)
  )
  try:
    rows = csv.reader(texts, delimiter=separator, strict=True)
    return len({len(row) for row in rows}) <= 1
  except csv.Error:
    return False


def _read_json(path) -> Iterator[tuple[str, Item]]:
  for number, line in text_files.lines(path):
    text = text_files.decode(line, path, number)
    try:
      values = {
        str(k).lower(): v for k, v in text_files.json_object(text).items()
      }
    except ValueError:
      raise UserError(
        f'{path}, line {number}: not a JSON object: {text[:60]!r}'
      ) from None
    picked = _pick(list(values), f'{path}, line {number}')
    yield str(values[picked['id']]), _item(values, picked)


def _read_parquet(path) -> list[tuple[str, Item]]:
  with text_files.readable(path, 'Parquet'):
    found = arrow_parquet.read_table(path)
  found = found.rename_columns([name.lower() for name in found.column_names])
  if len(set(found.column_names)) < len(found.column_names):
    raise UserError(f'{path}: two columns of one name')
  picked = _pick(found.column_names, str(path))
  wanted = found.select([name for name in picked.values() if name])
  return [
    (str(values[picked['id']]), _item(values, picked))
    for values in wanted.to_pylist()
  ]


def _pick(names: list[str], where: str) -> dict[str, str]:
  """What -> the column that holds it, '' where none does."""
  wanted = {
    'id': ALIASES['item'] + ('id',),
    'title': _TITLE,
    'genres': _GENRES,
    'abstract': _ABSTRACT,
  }
  picked = {
    what: next((a for a in aliases if a in names), '')
    for what, aliases in wanted.items()
  }
  if not picked['id']:
    raise UserError(
      f'{where}: no column of the item ids among '
      f'{", ".join(names)}; call it item_id'
    )
  return picked


def _item(values: dict[str, Any], picked: dict[str, str]) -> Item:
  def of(what):
    value = values.get(picked[what])
    return '' if value is None else value

  abstract = of('abstract')
  if isinstance(abstract, list):
    abstract = ' '.join(map(str, abstract))
  return Item(
    _plain(str(of('title'))),
    tuple(_as_list(of('genres'))),
    _plain(str(abstract)),
  )


def _plain(text: str) -> str:
  """A text without HTML, which shops' titles and descriptions hold."""
  if '&' in text or '<' in text:
    text = html.unescape(_TAG.sub(' ', text))
    text = ' '.join(text.split())
  return text.strip()


def _as_list(value: Any) -> list[str]:
  """Genres as a list, a list of lists (Amazon), or text with | or commas."""
  if isinstance(value, (list, tuple)):
    return list(dict.fromkeys(x for v in value for x in _as_list(v)))
  text = html.unescape(str(value))
  if text.strip().lower() == _NO_GENRE:
    return []
  separator = '|' if '|' in text else ','
  return [part.strip() for part in text.split(separator) if part.strip()]


def _is_whole(text: str) -> bool:
  return text.isascii() and text.isdigit() and len(text) <= 18
