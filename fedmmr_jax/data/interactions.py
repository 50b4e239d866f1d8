"""The content of an interaction file, whatever its format."""

from typing import NamedTuple

import numpy as np


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
    notes: what the reader took for granted, for people to check.
  """

  users: np.ndarray
  items: np.ndarray
  times: np.ndarray | None
  user_ids: np.ndarray
  item_ids: np.ndarray
  notes: tuple[str, ...] = ()

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
