"""`DataConfig` -> `Dataset` and what there is to say about it."""

import dataclasses
import pathlib
from typing import NamedTuple

from fedmmr_jax.config import DataConfig
from fedmmr_jax.data import cold as cold_lib
from fedmmr_jax.data import features, movielens, synthetic
from fedmmr_jax.data.cold import ColdSplit
from fedmmr_jax.data.dataset import Dataset, from_interactions
from fedmmr_jax.data.features import IntegrityReport


class Loaded(NamedTuple):
  """A data set ready for training.

  Attributes:
    dataset: interactions and features.
    integrity: one report for each feature matrix in use.
    dropped_users: source ids of users with too few interactions.
    cold: items held out of training, with `--cold_items`.
  """

  dataset: Dataset
  integrity: tuple[IntegrityReport, ...]
  dropped_users: list[int]
  cold: ColdSplit | None = None


def load(config: DataConfig, seed: int) -> Loaded:
  """Reads or generates the data set that the flags name.

  Raises:
    UserError: anything missing, malformed or too small, with its place.
  """
  loaded = (_load_synthetic(config, seed) if config.dataset == 'synthetic'
            else _load_movielens(config))
  if not config.cold_items:
    return loaded
  dataset, cold, dropped = cold_lib.hold_out(
      loaded.dataset, config.cold_items, seed)
  return loaded._replace(dataset=dataset, cold=cold,
                         dropped_users=loaded.dropped_users + dropped)


def _load_synthetic(config: DataConfig, seed: int) -> Loaded:
  dataset, generated = synthetic.generate(
      config.synthetic_users, config.synthetic_items, seed, config.top_k_users)
  num_rows = config.synthetic_items + 1
  matrices, reports = {}, []
  for kind, matrix in generated.items():
    flag = getattr(config, f'{kind}_features')
    if flag == features.AUTO:
      reports.append(features.check(
          matrix, kind, f'generated from seed {seed}', num_rows,
          dataset.item_ids))
      matrices[kind] = matrix[dataset.item_ids]
    elif flag != features.NONE:
      matrices[kind], report = features.load(
          features.resolve(flag, kind, pathlib.Path()), kind, num_rows,
          dataset.item_ids)
      reports.append(report)
  return Loaded(dataclasses.replace(dataset, **matrices), tuple(reports), [])


def _load_movielens(config: DataConfig) -> Loaded:
  folder = pathlib.Path(config.data_dir)
  # Resolved first: a wrong path should not cost the reading of the ratings.
  paths = {kind: features.resolve(
      getattr(config, f'{kind}_features'), kind, folder)
           for kind in ('visual', 'text')}
  raw = movielens.read_ratings(config.dataset, folder)
  titles = movielens.read_titles(config.dataset, folder)
  dataset, dropped = from_interactions(
      config.dataset, *raw, config.top_k_users)
  num_rows = max([int(raw.items.max()), *titles]) + 1
  matrices, reports = {}, []
  for kind, path in paths.items():
    if path is not None:
      matrices[kind], report = features.load(
          path, kind, num_rows, dataset.item_ids)
      reports.append(report)
  if titles:
    matrices['titles'] = tuple(
        titles.get(i, '') for i in dataset.item_ids.tolist())
  return Loaded(
      dataclasses.replace(dataset, **matrices), tuple(reports), dropped)
