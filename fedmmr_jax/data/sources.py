"""Where the interactions are: one file, the shards of one table, or the files
of a split that the data come with."""

import dataclasses
import pathlib
import re
from typing import NamedTuple, Sequence

import numpy as np

from fedmmr_jax import parts
from fedmmr_jax.config import Lines
from fedmmr_jax.data import formats, split, text_files
from fedmmr_jax.data import lines as lines_lib
from fedmmr_jax.data.formats import AUTO, format_of, FORMATS
from fedmmr_jax.data.interactions import Interactions, joined
from fedmmr_jax.errors import UserError

_NUMBER = re.compile(r'[0-9]+')
# What Spark puts into the names of its shards.
_UUID = re.compile(r'[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}')
_OF = re.compile(r'([0-9]+)-of-([0-9]+)')
_ITEMS = (
  'meta_',
  'items.',
  'item_',
  'movies.',
  'news.',
  'tags.',
  'links.',
  'genome',
  'readme',
  'user_list',
  'users.',
  'dataset_info.',
  'dataset_dict.',
  'state.',
  '.',
)
_YELP = re.compile(r'yelp_academic_dataset_(?!review\b).*')


class Source(NamedTuple):
  """Where the interactions are.

  Attributes:
    path: the file, or the folder of several or of folders.
    format: its name, see `formats.format_of`.
    detected: whether it was detected from the file, not given by a flag.
    lines: what the options of `dataset` say of its lines.
    files: those that are read, in this order.
    parts: of a given split, the part of each file; empty where no name tells.
    folder: where item file and features are looked for.
  """

  path: pathlib.Path
  format: str
  detected: bool
  lines: Lines = Lines()
  files: tuple[pathlib.Path, ...] = ()
  parts: tuple[int, ...] = ()
  folder: pathlib.Path = pathlib.Path()

  def __str__(self) -> str:
    how = 'detected' if self.detected else 'as named'
    return f'{self.path}: {format_of(self.format).description} ({how})'

  @property
  def notes(self) -> tuple[str, ...]:
    """Which files are taken for one table."""
    if len(self.files) < 2:
      return ()
    names = [_within(path, self.path) for path in self.files]
    if self.parts:
      return tuple(
        f'{split.PARTS[part]:10} '
        + _told([n for n, p in zip(names, self.parts) if p == part])
        for part in sorted(set(self.parts))
      )
    return (
      f'files      {_told(names)}: {len(names)} files read as one table, in '
      'this order; if they are not, name one with `data_dir`',
    )


def _told(names: Sequence[str]) -> str:
  if len(names) > 3:
    return f'{names[0]}, {names[1]} … {names[-1]}'
  return ', '.join(names)


def _within(path: pathlib.Path, folder: pathlib.Path) -> str:
  return path.relative_to(folder).as_posix() if folder != path else path.name


def find(
  dataset: str,
  data_dir: str,
  setting: str = 'data_dir',
  given: bool | None = False,
) -> Source:
  """The interaction files, and their format.

  Args:
    dataset: a key of FORMATS, 'auto', or a `Format` from outside as
      'my_package.module:Thing'; with `Lines` as options, as in
      'csv,user=who,item=what'.
    data_dir: the file, or the folder that holds it.
    setting: where `data_dir` comes from, for errors.
    given: whether the data come split into training, validation and test; None
      = it does not matter.

  Raises:
    UserError: no such file, several that are not one table, one of no known
      format, or an option that it does not have.
  """
  name, options = parts.split(dataset)
  # Refused before anything is looked for.
  lines = parts.make(Lines, options, f'`dataset={dataset}`')
  if name != AUTO:
    _check_named(name, lines, f'`dataset={dataset}`')
  path = pathlib.Path(data_dir)
  if not path.exists():
    raise UserError(
      f'`{setting}={data_dir}`: no such file or folder; name the folder of '
      'the data set, or its interaction file'
    )
  files, of_parts, folder = [path], (), path.parent
  if path.is_dir():
    folder = path
    files, of_parts = _choose(path, name, given)
    if len(files) == 1 and files[0].parent == path:
      path = files[0]
  if given and not of_parts:
    lines = dataclasses.replace(lines, part=lines.part or AUTO)
  elif lines.part:
    raise UserError(
      f'`dataset={dataset}`: part is read with `split_by=given`, from one file'
    )
  form = name if name != AUTO else formats.detect(files[0], lines)
  if form == 'mind' and len(files) > 1:
    raise UserError(
      f'{path}: {", ".join(_within(x, path) for x in files)} of MIND each hold '
      'the histories of their users; name one with `data_dir`, and split it '
      'with `split_by=timeline,test_from=…`'
    )
  _check_named(form, lines, str(path))
  return Source(
    path, form, name == AUTO, lines, tuple(files), tuple(of_parts), folder
  )


def _check_named(form: str, lines: Lines, place: str) -> None:
  """Refuses names of columns where a format has none."""
  if lines.names_columns and not format_of(form).named:
    raise UserError(
      f'{place}: {format_of(form).description}, has no named columns; '
      '`dataset` cannot name any'
    )


def read(source: Source) -> Interactions:
  """Reads the interactions, and what `dataset` says of their lines.

  Raises:
    UserError: what is malformed, with its line.
  """
  form = format_of(source.format)
  tables = []
  for number, path in enumerate(source.files or (source.path,)):
    table = form.read(path, source.lines)
    if source.parts:
      part = np.full(len(table.users), source.parts[number], np.int8)
      table = table._replace(parts=part)
    tables.append(table)
  found = joined(tables, [str(path) for path in source.files])
  found = found._replace(notes=(*source.notes, *found.notes))
  return lines_lib.apply(found, source.lines, str(source.path))


def _choose(
  folder: pathlib.Path, dataset: str, given: bool | None
) -> tuple[list[pathlib.Path], tuple[int, ...]]:
  """(Files of one table, the part of each in a given split or nothing)."""
  wanted = FORMATS if dataset == AUTO else {dataset: format_of(dataset)}
  patterns = dict.fromkeys(p for f in wanted.values() for p in f.files)
  found = _matching(folder, patterns)
  if not found:
    # As the `datasets` library and Spark lay them out.
    inner = sorted(
      path
      for path in folder.iterdir()
      if path.is_dir() and not path.name.startswith('.')
    )
    found = [path for one in inner for path in _matching(one, patterns)]
  if not found:
    raise UserError(
      f'{folder / next(iter(patterns))}: no such file; `data_dir` must be '
      'the folder that holds '
      + (f"{dataset}'s " if dataset != AUTO else 'one of ')
      + ', '.join(patterns)
      + ', or the file itself'
    )
  names = [_within(path, folder) for path in found]
  of_parts = [split.part_of_name(name) for name in names]
  told = ', '.join(names)
  known = {part for part in of_parts if part is not None}
  if (given and known) or (given is None and len(known) > 1):
    by_part = {
      part: [path for path, own in zip(found, of_parts) if own == part]
      for part in range(len(split.PARTS))
    }
    if not (by_part[split.TRAIN] and by_part[split.TEST]):
      raise UserError(
        f'{folder}: a given split needs files named train and test (and, if '
        f'there is one, validation), and there are {told}'
      )
    shards = {
      part: _one_table(folder, paths)
      for part, paths in by_part.items()
      if paths
    }
    return (
      [path for paths in shards.values() for path in paths],
      tuple(part for part, paths in shards.items() for _ in paths),
    )
  if len(known) > 1:
    raise UserError(
      f'{folder}: {told} look like training, validation and test of one set; '
      'say `split_by=given` to keep them so, or put them into one file in the '
      'order of time, and name it with `data_dir`'
    )
  return _one_table(folder, found), ()


def _matching(folder: pathlib.Path, patterns) -> list[pathlib.Path]:
  """Files of interactions by some patterns, sorted by name."""
  found: list[pathlib.Path] = []
  for pattern in patterns:
    matching = [
      path
      for path in text_files.matching(folder, pattern)
      if path.is_file() and not _is_about_items(path)
    ]
    if matching and '*' not in pattern:  # a name that says all
      return matching[:1]
    found += [path for path in sorted(matching) if path not in found]
  return found


def _one_table(
  folder: pathlib.Path, found: list[pathlib.Path]
) -> list[pathlib.Path]:
  """Files that differ in their numbers alone, in the order of these.

  Raises:
    UserError: they differ in more, or one is missing.
  """
  names = [_within(path, folder) for path in found]
  plain = [_UUID.sub('', name) for name in names]
  if len(set(map(_stem, plain))) > 1:
    raise UserError(
      f'{folder}: {", ".join(names)} could each be the interactions; name one: '
      f'`data_dir={found[0]}`'
    )
  totals = {int(match[2]) for match in map(_OF.search, plain) if match}
  if totals and totals != {len(found)}:
    wanted = ' or '.join(map(str, sorted(totals)))
    raise UserError(
      f'{folder}: {len(found)} of {wanted} files of one table '
      f'({_told(names)}); fetch what is missing, take away what is of another '
      'table, or name one file with `data_dir`'
    )
  order = sorted(
    range(len(found)),
    key=lambda i: [int(x) for x in _NUMBER.findall(plain[i])] + [i],
  )
  return [found[i] for i in order]


def _stem(name: str) -> str:
  """What shards of one table have in common: numbers may differ in their own
  names, and in folders as in day=3, not in those as in ml-1m and ml-10m."""
  *folders, own = name.split('/')
  return '/'.join(
    [_NUMBER.sub('#', x) if '=' in x else x for x in folders]
    + [_NUMBER.sub('#', own)]
  )


def _is_about_items(path: pathlib.Path) -> bool:
  """Files that lie beside the interactions and are something else."""
  name = path.name.lower()
  return (
    name.startswith(_ITEMS)
    or name.endswith('_features.json')
    or bool(_YELP.match(name))
  )
