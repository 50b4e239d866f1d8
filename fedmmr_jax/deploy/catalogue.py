"""The items that a federation has agreed on, and their features: one file,
which the server reads and sends to the nodes."""

import os
import pathlib
import zipfile
from typing import Mapping, NamedTuple, Sequence

import numpy as np

from fedmmr_jax.data.dataset import Dataset
from fedmmr_jax.errors import UserError

FILE = 'catalogue.npz'
_FEATURES = 'features/'  # what their names in the file begin with


class SharedCatalogue(NamedTuple):
  """The items, by rows.

  Attributes:
    item_ids: [V] int64 or strings, ids in the nodes' files; entry 0 is 0 or ''
      (padding).
    titles: [V] strings, or empty.
    features: name of a matrix ('visual', 'text', …) -> [V, F] float32, zero row
      = missing.
  """

  item_ids: np.ndarray
  titles: tuple[str, ...] = ()
  features: Mapping[str, np.ndarray] = {}

  @classmethod
  def of(
    cls,
    item_ids: Sequence[int] | Sequence[str],
    titles: Sequence[str] = (),
    **features: np.ndarray,
  ) -> 'SharedCatalogue':
    """From lists without a padding row, n items.

    Args:
      item_ids: [n] distinct whole numbers, or strings.
      titles: [n], or none.
      **features: name -> [n, F], as in `text=matrix`.

    Raises:
      UserError: an id twice, something of another length, or features that are
        not finite.

    >>> SharedCatalogue.of(['a', 'b'], text=np.ones((2, 3))).item_ids.tolist()
    ['', 'a', 'b']
    """
    ids = np.asarray(item_ids)
    made = cls(
      np.concatenate([np.zeros(1, ids.dtype), ids]),
      ('', *titles) if len(titles) else (),
      {
        name: np.pad(np.asarray(x, np.float32), ((1, 0), (0, 0)))
        for name, x in features.items()
      },
    )
    made.check('catalogue')
    return made

  @classmethod
  def of_dataset(cls, dataset: Dataset) -> 'SharedCatalogue':
    """The items of a data set."""
    return cls(dataset.item_ids, dataset.titles, dict(dataset.features))

  def check(self, place: str) -> None:
    """Raises UserError, see `of`."""
    if len(self.item_ids) < 2:
      raise UserError(f'{place}: no items')
    ids, counts = np.unique(self.item_ids[1:], return_counts=True)
    if counts.max() > 1:
      raise UserError(
        f'{place}: item {ids[counts.argmax()]} is there {counts.max()} times'
      )
    parts = [('titles', self.titles)] if self.titles else []
    for name, rows in (*parts, *self.features.items()):
      if len(rows) != len(self.item_ids):
        raise UserError(
          f'{place}: {len(rows) - 1} rows of {name} for '
          f'{len(self.item_ids) - 1} items'
        )
    for name, rows in self.features.items():
      if not np.isfinite(rows).all():
        raise UserError(f'{place}: {name} features are NaN or infinite')

  def dataset(self, user_ids: Sequence[int] | Sequence[str]) -> Dataset:
    """The catalogue with clients of whom nothing is known but their ids."""
    return Dataset(
      name='network',
      items=np.zeros(0, np.int32),
      offsets=np.zeros(len(user_ids) + 1, np.int64),
      user_ids=np.asarray(user_ids),
      item_ids=self.item_ids,
      features=self.features,
      titles=self.titles,
    ).without_interactions()

  def save(self, path: pathlib.Path) -> None:
    """Writes it into one `.npz` file, atomically."""
    save_arrays(
      path,
      {'item_ids': self.item_ids, 'titles': np.asarray(self.titles, str)}
      | {_FEATURES + name: x for name, x in self.features.items()},
    )

  @classmethod
  def load(cls, path: pathlib.Path) -> 'SharedCatalogue':
    """Reads what `save` wrote.

    Raises:
      UserError: no such file, or not such a one.
    """
    arrays = load_arrays(path)
    if 'item_ids' not in arrays:
      raise UserError(f'{path}: no catalogue, it has no item_ids')
    found = cls(
      arrays['item_ids'],
      tuple(arrays.get('titles', np.zeros(0, str)).tolist()),
      {
        name.removeprefix(_FEATURES): x.astype(np.float32)
        for name, x in arrays.items()
        if name.startswith(_FEATURES)
      },
    )
    found.check(str(path))
    return found


def save_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays into an `.npz` file: the old file or the new one is there,
  never half of it."""
  temporary = path.with_name(f'.{path.name}.tmp')
  with temporary.open('wb') as file:
    np.savez(file, **arrays)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of an `.npz` file.

  Raises:
    UserError: no such file, or a damaged one.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      return dict(file)
  except FileNotFoundError:
    raise UserError(f'{path}: no such file') from None
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(f'{path}: damaged, or no .npz file ({error})') from None
