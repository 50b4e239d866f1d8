"""The content of an interaction file, whatever its format."""

from typing import Mapping, NamedTuple, Sequence

import numpy as np

from fedmmr_jax.data.roles import Roles
from fedmmr_jax.errors import UserError


class Texts(NamedTuple):
  """A column of texts, each distinct one once.

  Attributes:
    codes: [n] int32 indices into `values`.
    values: the texts.
  """

  codes: np.ndarray
  values: tuple[str, ...]

  def where(self, chosen: np.ndarray) -> 'Texts':
    return self._replace(codes=self.codes[chosen])


class Interactions(NamedTuple):
  """Who consumed what when, in the order of the file.

  Attributes:
    users: [n] int32 indices into `user_ids`.
    items: [n] int32 indices into `item_ids`.
    times: [n] float64 seconds since 1970, or None if the file has none; then
      the order of the file is the order in time.
    user_ids: the source's own ids, ascending: int64, or strings if not all are
      whole numbers.
    item_ids: likewise.
    unit: what the times were written in ('seconds', 'dates', …); '' = unknown.
    roles: which column was whose, where columns have names.
    notes: what the reader took for granted, for people to check.
    columns: what else was read of each line, by what it is (`lines.py`).
    weights: [n] float32, how much each counts in the loss; None = all alike.
    disliked: [n] bool, which are dislikes; None = none.
    parts: [n] int8 of a given split, see `split.PARTS`; None without one.
  """

  users: np.ndarray
  items: np.ndarray
  times: np.ndarray | None
  user_ids: np.ndarray
  item_ids: np.ndarray
  unit: str = ''
  roles: Roles | None = None
  notes: tuple[str, ...] = ()
  columns: Mapping[str, Texts] = {}
  weights: np.ndarray | None = None
  disliked: np.ndarray | None = None
  parts: np.ndarray | None = None

  @classmethod
  def of(
    cls, users: np.ndarray, items: np.ndarray, times: np.ndarray | None = None
  ) -> 'Interactions':
    """From arrays [n] of ids."""
    user_ids, users = np.unique(users, return_inverse=True)
    item_ids, items = np.unique(items, return_inverse=True)
    return cls(
      users.astype(np.int32), items.astype(np.int32), times, user_ids, item_ids
    )

  def where(self, chosen: np.ndarray) -> 'Interactions':
    """Some of them, by a mask or indices; the ids stay."""

    def of(column):
      return None if column is None else column[chosen]

    return self._replace(
      users=self.users[chosen],
      items=self.items[chosen],
      times=of(self.times),
      columns={what: x.where(chosen) for what, x in self.columns.items()},
      weights=of(self.weights),
      disliked=of(self.disliked),
      parts=of(self.parts),
    )


def joined(
  tables: Sequence[Interactions], names: Sequence[str]
) -> Interactions:
  """The lines of several files of one table, one file after the other.

  Args:
    tables: as they were read, without `weights` and `disliked`.
    names: of the files, for errors.

  Raises:
    UserError: some have times and others none, numbers as ids and others texts,
      or other columns.
  """
  first, *others = tables
  if not others:
    return first
  timed = [table.times is not None for table in tables]
  if any(timed) and not all(timed):
    raise UserError(
      f'{names[timed.index(False)]}: no times, but {names[timed.index(True)]} '
      'has some; name the column of both with `dataset=auto,time=…`'
    )
  for name, table in zip(names, tables):
    if table.roles != first.roles:
      raise UserError(
        f'{name}: columns {table.roles}, but in {names[0]} columns '
        f'{first.roles}; say which is which with `dataset=auto,user=…,item=…`'
      )
  for what in ('user', 'item'):
    kinds = [getattr(t, f'{what}_ids').dtype.kind for t in tables]
    if len(set(kinds)) > 1:
      # Whether a 1 there was written 1.0 is forgotten, and so whose it is.
      raise UserError(
        f'{names[kinds.index("i")]}: all {what} ids are whole numbers, in '
        f'{names[kinds.index("U")]} they are texts; put both into one file'
      )
  users, user_ids = _joined_ids([(t.users, t.user_ids) for t in tables])
  items, item_ids = _joined_ids([(t.items, t.item_ids) for t in tables])
  return Interactions(
    users,
    items,
    np.concatenate([t.times for t in tables if t.times is not None])
    if all(timed)
    else None,
    user_ids,
    item_ids,
    ' and '.join(dict.fromkeys(t.unit for t in tables)),
    first.roles,
    tuple(dict.fromkeys(note for t in tables for note in t.notes)),
    {
      what: _joined_texts([t.columns[what] for t in tables])
      for what in first.columns
    },
    parts=None
    if first.parts is None
    else np.concatenate([t.parts for t in tables if t.parts is not None]),
  )


def _joined_ids(columns) -> tuple[np.ndarray, np.ndarray]:
  """([n] int32 indices, [u] ids ascending)."""
  ids, places = np.unique(
    np.concatenate([ids for _, ids in columns]), return_inverse=True
  )
  starts = np.cumsum([0, *(len(own) for _, own in columns)])
  return (
    np.concatenate(
      [
        places[start + codes].astype(np.int32)
        for start, (codes, _) in zip(starts, columns)
      ]
    ),
    ids,
  )


def _joined_texts(columns: Sequence[Texts]) -> Texts:
  values = tuple(dict.fromkeys(v for column in columns for v in column.values))
  place = {value: number for number, value in enumerate(values)}
  return Texts(
    np.concatenate(
      [
        np.array([place[v] for v in column.values], np.int32)[column.codes]
        for column in columns
      ]
    ),
    values,
  )
