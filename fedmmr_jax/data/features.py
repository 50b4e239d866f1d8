"""Item features: loading and integrity (repair 3).

A feature matrix has one row for each item id of the source, row 0 = padding;
an all-zero row is a missing feature. Nothing is ever replaced: a matrix that
fails a check stops the run.
"""

import pathlib
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

from fedmmr_jax.data import columns, sidecar
from fedmmr_jax.data.items import ItemTable
from fedmmr_jax.errors import UserError

AUTO, NONE = 'auto', 'none'
# Matrices with a setting of their own, `<kind>_features`.
KINDS = ('visual', 'text')
# How MMRec calls them, beside interactions of its own.
_OF_MMREC = {'visual': 'image_feat.npy', 'text': 'text_feat.npy'}


class IntegrityReport(NamedTuple):
  """The results of checking one feature matrix.

  Attributes:
    kind: 'visual' or 'text'.
    source: file, or what generated the features.
    shape: rows and columns.
    dtype: as stored.
    minimum, maximum, mean, std: over all non-zero rows.
    zero_rows: rows without features, including the padding row.
    covered: catalogue items with features.
    catalogue: items of the catalogue.
  """

  kind: str
  source: str
  shape: tuple[int, int]
  dtype: str
  minimum: float
  maximum: float
  mean: float
  std: float
  zero_rows: int
  covered: int
  catalogue: int

  def __str__(self) -> str:
    return (
      f'{self.kind:6} features  ok  {self.source}\n'
      f'         shape {self.shape[0]} x {self.shape[1]}  {self.dtype}  '
      f'min {self.minimum:.4g}  max {self.maximum:.4g}  '
      f'mean {self.mean:.4g}  std {self.std:.4g}\n'
      f'         zero rows {self.zero_rows}  coverage {self.covered} of '
      f'{self.catalogue} items ({self.covered / self.catalogue:.1%})'
    )


def resolve(flag: str, kind: str, folder: pathlib.Path) -> pathlib.Path | None:
  """Which file `{kind}_features` means.

  Args:
    flag: 'auto' (the file in the data folder, if there is one), 'none' or a
      path that must exist.
    kind: 'visual' or 'text'.
    folder: the data folder.

  Raises:
    UserError: the named file does not exist.
  """
  if flag == NONE:
    return None
  if flag == AUTO:
    names = [f'{kind}_features.npy']
    if kind in _OF_MMREC and _is_of_mmrec(folder):
      names.append(_OF_MMREC[kind])
    found = (folder / name for name in names)
    return next((path for path in found if path.exists()), None)
  path = pathlib.Path(flag)
  if not path.exists():
    raise UserError(
      f'`{kind}_features={flag}`: no such file; name a .npy matrix, or '
      f'{_leave_out(kind)} to train without'
    )
  return path


def _is_of_mmrec(folder: pathlib.Path) -> bool:
  """Whether a folder is one of MMRec's: its interactions bear the part of a
  line, `x_label`, and count items from 0 as the rows of its matrices do."""
  for path in folder.glob('*.inter'):
    with path.open('rb') as file:
      if b'x_label' in file.readline(4096):
        return True
  return False


def load(
  path: pathlib.Path,
  kind: str,
  num_rows: int,
  item_ids: np.ndarray,
  items: ItemTable | None = None,
  found_by_itself: bool = False,
) -> tuple[np.ndarray, IntegrityReport]:
  """Reads and checks a matrix and picks the rows of the catalogue.

  Args:
    path: a .npy file.
    kind: 'visual' or 'text'.
    num_rows: rows it must have: the largest item id of the source + 1.
    item_ids: [V] source id of each catalogue row, entry 0 = padding.
    items: those of the data set; None = a sidecar may name any others.
    found_by_itself: nobody named the file: then it must be certain which row is
      whose.

  Returns:
    [V, F] float32 features by catalogue row, and the report.

  Raises:
    UserError: not a matrix of numbers, wrong number of rows, a NaN or
      infinity, a constant matrix, or a padding row that is not zero; or not
      what its sidecar describes (see sidecar.py).
  """
  try:
    with path.open('rb') as file:
      matrix = np.load(file, allow_pickle=False)
  except Exception as error:  # NumPy raises what the broken header leads to
    raise UserError(f'{path}: not a readable .npy matrix ({error})') from None
  if not isinstance(matrix, np.ndarray):
    raise UserError(f'{path}: an archive; save one matrix with numpy.save')
  described = sidecar.check(path, items)
  if items is not None and not described:
    if found_by_itself:
      _check_rows_are_known(path, kind, items)
    if len(matrix) == num_rows - 1 and items.starts_at_zero:
      # One row for each item from 0 on, as in the sets of MMRec.
      matrix = np.concatenate([np.zeros_like(matrix[:1]), matrix])
  report = check(matrix, kind, str(path), num_rows, item_ids)
  if described:
    model = pathlib.PurePath(described['model']).name
    report = report._replace(source=f'{path} ({model})')
  return matrix[item_ids].astype(np.float32), report


def _check_rows_are_known(
  path: pathlib.Path, kind: str, items: ItemTable
) -> None:
  """Refuses a matrix whose rows would be numbered by the order of texts, though
  its author surely had numbers in mind."""
  odd = columns.odd_ids(items.ids)
  if odd:
    raise UserError(
      f'{path}: which row is whose? Its rows would be the items in the order '
      f'of texts (10 before 9), because {len(odd)} of {len(items.ids)} ids are '
      f'not whole numbers ({odd[0]!r}); mend these in the interactions, or '
      f'name the matrix with `{kind}_features` if that is their order'
    )


def of_mapping(
  rows: Mapping[Any, Any], kind: str, item_ids: Sequence
) -> np.ndarray:
  """[V, F] float32 of vectors by item id, checked as a file's would be.

  Args:
    rows: item id -> [F] numbers.
    kind: 'visual' or 'text'.
    item_ids: of the catalogue, without the padding row.

  Raises:
    UserError: vectors of different widths, or what `check` refuses.
  """
  widths = {np.shape(row) for row in rows.values()}
  if len(widths) != 1 or len(next(iter(widths))) != 1:
    raise UserError(
      f'{kind} features: every item needs a vector of the same '
      f'width, found shapes {sorted(widths)}'
    )
  matrix = np.zeros((1 + len(item_ids), *next(iter(widths))), np.float32)
  for number, item in enumerate(item_ids, 1):
    if item in rows:
      matrix[number] = rows[item]
  check(matrix, kind, f'{kind} features', len(matrix), np.arange(len(matrix)))
  return matrix


def _leave_out(kind: str) -> str:
  """What to do to train without a matrix."""
  if kind in KINDS:
    return f'say `{kind}_features=none`'
  return f'leave {kind} out of `experts`'


def check(
  matrix: np.ndarray,
  kind: str,
  source: str,
  num_rows: int,
  item_ids: np.ndarray,
) -> IntegrityReport:
  """Refuses a broken matrix; see `load`."""
  if matrix.ndim != 2 or matrix.dtype.kind not in 'fiu' or not matrix.shape[1]:
    raise UserError(
      f'{source}: expected a matrix of numbers [items, features], found '
      f'{matrix.dtype} of shape {matrix.shape}'
    )
  if matrix.shape[0] != num_rows:
    raise UserError(
      f'{source}: {matrix.shape[0]} rows, but the data set needs {num_rows}: '
      f'one for each item id from 0 (padding) to {num_rows - 1}'
    )
  # Written so that NaN and what overflows in float32 fail too.
  bad = np.argwhere(~(np.abs(matrix) <= np.finfo(np.float32).max))
  if len(bad):
    row, column = bad[0]
    raise UserError(
      f'{source}, row {row}, column {column}: {matrix[row, column]} '
      f'({len(bad)} such values); every value must be finite, in float32 '
      'too, and a missing feature is an all-zero row'
    )
  present = np.any(matrix != 0, axis=1)
  values = matrix[present] if present.any() else matrix
  if (values == values[0, 0]).all():
    raise UserError(
      f'{source}: every value is {values[0, 0]:g}, a constant matrix tells '
      f'items apart in nothing; rebuild it or {_leave_out(kind)}'
    )
  if len(values) > 1 and (values == values[0]).all():
    raise UserError(
      f'{source}: every row is the same, which tells items apart in '
      f'nothing; rebuild it or {_leave_out(kind)}'
    )
  if np.any(matrix[0]):
    raise UserError(
      f'{source}, row 0: not zero, but row 0 is padding; is the matrix '
      'shifted by one row? Row i must belong to item id i'
    )
  covered = int(present[item_ids[1:]].sum())
  if not covered:
    raise UserError(
      f'{source}: no item of the catalogue has features; is it the matrix '
      f'of another data set? Or {_leave_out(kind)}'
    )
  return IntegrityReport(
    kind=kind,
    source=source,
    shape=matrix.shape,
    dtype=str(matrix.dtype),
    minimum=float(values.min()),
    maximum=float(values.max()),
    mean=float(values.mean(dtype=np.float64)),
    std=float(values.std(dtype=np.float64)),
    zero_rows=int((~present).sum()),
    covered=covered,
    catalogue=len(item_ids) - 1,
  )
