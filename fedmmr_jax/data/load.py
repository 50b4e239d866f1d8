"""`DataConfig` -> `Dataset`, with notes about it."""

import dataclasses
import pathlib
from typing import cast, Mapping, NamedTuple, Sequence

import numpy as np

from fedmmr_jax.config import (
  DataConfig,
  Given,
  ORIGINAL_EXPERTS,
  RunConfig,
  SyntheticData,
  Timeline,
)
from fedmmr_jax.data import cold as cold_lib
from fedmmr_jax.data import columns, features, items, sources, synthetic
from fedmmr_jax.data.cold import ColdSplit
from fedmmr_jax.data.dataset import Dataset
from fedmmr_jax.data.features import IntegrityReport
from fedmmr_jax.data.interactions import Interactions
from fedmmr_jax.data.items import ItemTable
from fedmmr_jax.data.selection import Filters, select, Selected
from fedmmr_jax.data.sources import Source
from fedmmr_jax.errors import UserError


class Loaded(NamedTuple):
  """A data set ready for training.

  Attributes:
    dataset: interactions and features.
    integrity: one report for each feature matrix in use.
    dropped_users: source ids of users with too few interactions.
    notes: lines about the file, its format, what was left out.
    cold: items held out of training, with `cold_items`.
  """

  dataset: Dataset
  integrity: tuple[IntegrityReport, ...]
  dropped_users: list
  notes: tuple[str, ...] = ()
  cold: ColdSplit | None = None


def load(
  config: RunConfig | DataConfig,
  seed: int = 0,
  interactions: Interactions | None = None,
) -> Loaded:
  """Reads or generates the data set that a config names.

  Args:
    config: of a run, or its part that is about data; the features of a third
      expert are read where the run's config names it.
    seed: of what is generated or held out; a run has its own.
    interactions: those of the config's file, where they are read already.

  Raises:
    UserError: anything missing, malformed or too small, with its place.
  """
  others: list[str] = []
  if isinstance(config, RunConfig):
    seed = config.seed
    others = [n for n in config.model.expert_forms if n not in ORIGINAL_EXPERTS]
    config = config.data
  loaded = (
    _load_synthetic(config, seed)
    if config.synthetic
    else _load_files(config, others, interactions)
  )
  if not config.cold_items:
    return loaded
  dataset, cold, dropped = cold_lib.hold_out(
    loaded.dataset, config.cold_items, seed
  )
  return loaded._replace(
    dataset=dataset, cold=cold, dropped_users=loaded.dropped_users + dropped
  )


def read_items(config: DataConfig) -> ItemTable:
  """All items of the files, whether or not a filter keeps them, with notes
  about the files.

  Raises:
    UserError: as `load`; the synthetic set has no files.
  """
  if config.synthetic:
    raise UserError('`dataset=synthetic` has no item files; name a data set')
  # All items of a given split, whatever their part.
  source = sources.find(config.dataset, config.data_dir, given=None)
  return items.table(sources.read(source), items.find(source, config.item_file))


def _load_synthetic(config: DataConfig, seed: int) -> Loaded:
  asked = cast(SyntheticData, config.synthetic)
  selected, generated = synthetic.generate(
    asked.users, asked.items, seed, filters_of(config)
  )
  dataset, num_rows = selected.dataset, asked.items + 1
  matrices = {}
  reports = []
  for kind, matrix in generated.items():
    flag = getattr(config, f'{kind}_features')
    if flag == features.AUTO:
      reports.append(
        features.check(
          matrix,
          kind,
          f'generated from seed {seed}',
          num_rows,
          dataset.item_ids,
        )
      )
      matrices[kind] = matrix[dataset.item_ids]
    elif flag != features.NONE:
      matrices[kind], report = features.load(
        cast(pathlib.Path, features.resolve(flag, kind, pathlib.Path())),
        kind,
        num_rows,
        dataset.item_ids,
      )
      reports.append(report)
  return _loaded(selected, matrices, reports)


def _load_files(
  config: DataConfig, others: Sequence[str], interactions: Interactions | None
) -> Loaded:
  source = source_of(config)
  # Resolved first: a wrong path should not cost reading the interactions.
  paths = {
    kind: features.resolve(
      getattr(config, f'{kind}_features'), kind, source.folder
    )
    for kind in features.KINDS
  } | {
    kind: features.resolve(features.AUTO, kind, source.folder)
    for kind in others
  }
  item_file = items.find(source, config.item_file)
  if interactions is None:
    interactions = sources.read(source)
  table = items.table(interactions, item_file)
  selected = select(_name(source), interactions, filters_of(config))
  dataset = selected.dataset
  rows = np.append(0, table.rows_of(dataset.item_ids[1:]))
  matrices = {}
  reports = []
  for kind, path in paths.items():
    if path is not None:
      matrices[kind], report = features.load(
        path,
        kind,
        table.num_rows,
        rows,
        table,
        found_by_itself=getattr(config, f'{kind}_features', features.AUTO)
        == features.AUTO,
      )
      reports.append(report)
  if table.titles:
    titles = (table.titles.get(i, '') for i in dataset.item_ids[1:].tolist())
    selected = selected._replace(
      dataset=dataclasses.replace(dataset, titles=('', *titles))
    )
  if table.genres:
    genres = (table.genres.get(i, ()) for i in dataset.item_ids[1:].tolist())
    selected = selected._replace(
      dataset=dataclasses.replace(selected.dataset, genres=((), *genres))
    )
  return _loaded(
    selected,
    matrices,
    reports,
    (
      f'read       {source}',
      f'           {_count(interactions)} of '
      f'{len(interactions.user_ids)} users and {len(interactions.item_ids)} '
      'items' + (f', items described in {item_file}' if item_file else ''),
      *interactions.notes,
      *_about_ids(interactions),
      *([] if table.numbering_is_plain else [f'items      {table.numbering}']),
      *(
        [
          f'items      {table.retold} described more than once, and not '
          'alike: the last line counts'
        ]
        if table.retold
        else []
      ),
      *_about_matrices(config, source.folder, paths),
    ),
  )


def _count(interactions: Interactions) -> str:
  total, disliked = len(interactions.users), interactions.disliked
  if disliked is None:
    return f'{total} interactions'
  return f'{(~disliked).sum()} interactions and {disliked.sum()} dislikes'


def _about_ids(interactions: Interactions) -> list[str]:
  """Ids that make text of all others, though those are whole numbers."""
  notes = []
  for what, ids in (
    ('users', interactions.user_ids),
    ('items', interactions.item_ids),
  ):
    odd = columns.odd_ids(ids)
    if odd:
      notes.append(
        f'{what}      {len(odd)} of {len(ids)} ids are not whole numbers '
        f'({", ".join(map(repr, odd[:3]))}): all are read as texts'
      )
  return notes


def _about_matrices(
  config: DataConfig,
  folder: pathlib.Path,
  paths: Mapping[str, pathlib.Path | None],
) -> list[str]:
  """Matrices beside the interactions that nobody asked for."""
  if features.NONE in (config.visual_features, config.text_features):
    return []
  used = {path.resolve() for path in paths.values() if path}
  unused = [
    path.name
    for path in sorted(folder.glob('*.npy'))
    if path.resolve() not in used
  ]
  if not unused:
    return []
  return [
    f'features   {", ".join(unused)} beside it: not used; name what is of the '
    'items with `visual_features` or `text_features`'
  ]


def _loaded(selected: Selected, matrices, reports, notes=()) -> Loaded:
  return Loaded(
    dataclasses.replace(selected.dataset, features=matrices),
    tuple(reports),
    selected.dropped_users,
    (*notes, *selected.notes),
  )


def source_of(config: DataConfig) -> Source:
  """The interaction file of a config, and its format; see `sources.find`."""
  return sources.find(
    config.dataset, config.data_dir, given=isinstance(config.split_by, Given)
  )


def filters_of(config: DataConfig) -> Filters:
  """Which users and items a config keeps.

  Raises:
    UserError: the date of a timeline is none.
  """
  try:
    test_from = (
      columns.parse_time(config.split_by.test_from)
      if isinstance(config.split_by, Timeline)
      else None
    )
  except ValueError:
    raise UserError(
      f'`split_by={config.split_by}`: test_from is neither a date (2000-12-31) '
      'nor seconds since 1970'
    ) from None
  return Filters(
    config.k_core, config.min_interactions, config.top_k_users, test_from
  )


def _name(source: Source) -> str:
  """MovieLens sets are known by their format, others by their file."""
  if source.format.startswith('ml-'):
    return source.format
  return source.path.absolute().name.partition('.')[0]
