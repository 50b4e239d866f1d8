"""What travels between a server and its nodes: facts and arrays, by name.

No transport is known here. `flower_server` and `flower_client` carry parcels
with Flower; the tests carry them by function calls.
"""

import json
from typing import Any, NamedTuple

import jax
import numpy as np

from fedmmr_jax.errors import UserError


class Parcel(NamedTuple):
  """One message, or the answer to one.

  Attributes:
    facts: anything JSON holds; 'error' in an answer is why there is none.
    arrays: name -> array.
  """

  facts: dict[str, Any]
  arrays: dict[str, np.ndarray] = {}

  @property
  def num_bytes(self) -> int:
    """Bytes of its content, without what a transport adds."""
    return len(json.dumps(self.facts)) + sum(
      x.nbytes for x in self.arrays.values()
    )


def pack(tree: Any) -> dict[str, np.ndarray]:
  """The arrays of a tree on the host, by their paths."""
  return {
    jax.tree_util.keystr(path): np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def unpack(arrays: dict[str, np.ndarray], like: Any, what: str) -> Any:
  """The tree that was packed.

  Args:
    arrays: of `pack`.
    like: a tree of arrays, or of their shapes and types.
    what: for errors.

  Raises:
    UserError: the arrays are not those of such a tree.
  """

  def take(path, leaf):
    name = jax.tree_util.keystr(path)
    found = arrays.get(name)
    if found is None:
      raise UserError(f'{what}: {name} is missing')
    if found.shape != leaf.shape or found.dtype != leaf.dtype:
      raise UserError(
        f'{what}: {name} is {found.dtype}{list(found.shape)}, not '
        f'{leaf.dtype}{list(leaf.shape)}'
      )
    return found

  return jax.tree_util.tree_map_with_path(take, like)


def pack_rows(name: str, whole: np.ndarray) -> dict[str, np.ndarray]:
  """The rows of an array, [V] or [V, n], that are not 0, and their numbers."""
  rows = np.flatnonzero(whole.reshape(len(whole), -1).any(axis=1))
  return {'rows': rows.astype(np.int32), name: whole[rows]}


def unpack_rows(
  arrays: dict[str, np.ndarray], name: str, like: np.ndarray
) -> np.ndarray:
  """An array as `like` whose rows were packed; the others are 0.

  Raises:
    ValueError: a number is NaN or infinite, or the rows are of another array.
  """
  found = np.zeros_like(like)
  np.add.at(found, arrays['rows'], arrays[name])
  if not np.isfinite(found).all():
    raise ValueError(f'{name} is NaN or infinite')
  return found
