"""Client-local vocabulary: the rows of the item table that a client works on.

With `--vocabulary=dense` a client trains a copy of the whole table, [V, D].
Each step writes a gradient of that size and the optimizer passes over it,
although the step uses only a few hundred rows. With `--vocabulary=local` a
client copies the U rows that its round can touch; a step takes out the n rows
that it does touch, trains them and puts them back. The cost of a client then
does not grow with the catalogue.

Plain SGD without weight decay gives the same parameters either way. Otherwise
the two differ, because rows outside a step do not change:
* weight decay and FedProx's proximal term act only on the rows of a step;
* SCAFFOLD's correction and MimeLite's momentum move a row only in the steps
  that touch it, instead of in every step;
* Adam's moments of a row decay only in the steps that touch it ("lazy Adam"),
  and a row without gradient does not keep moving on its momentum.

Negatives are drawn before training to determine U. Windows and memory add no
items beyond the client's own history (the experts read the features of memory
entries, not their rows of the table).
"""

from typing import Any, NamedTuple, Sequence

import jax
import jax.numpy as jnp

ITEM_TABLE = 'item_embedding'  # the parameter whose rows are items


class Vocabulary(NamedTuple):
  """A set of items and their rows in a smaller table.

  Attributes:
    ids: [U] int32 item ids, ascending. An id may repeat; only its first row is
      ever read. Row 0 is the padding item.
  """

  ids: jax.Array

  def rows(self, items: jax.Array) -> jax.Array:
    """[...] int32 rows of items that are in the vocabulary. For any other item
    this gives a neighbour's row; the tests check every look-up of a round."""
    return jnp.searchsorted(self.ids, items, method='scan_unrolled').astype(
      jnp.int32
    )

  @property
  def is_first(self) -> jax.Array:
    """[U] bool, True at the rows that count."""
    return self.ids != jnp.concatenate([jnp.full(1, -1), self.ids[:-1]])


def whole(num_rows: int) -> Vocabulary:
  """The whole catalogue: row i is item i."""
  return Vocabulary(jnp.arange(num_rows, dtype=jnp.int32))


def touched(items: list[jax.Array], within: Vocabulary) -> Vocabulary:
  """The vocabulary of the items in some arrays, and padding.

  Args:
    items: int32 arrays of any shape.
    within: a vocabulary that contains them all; returned if it is smaller.
  """
  if 1 + sum(x.size for x in items) >= len(within.ids):
    return within
  ids = jnp.concatenate([jnp.zeros(1, jnp.int32), *map(jnp.ravel, items)])
  return Vocabulary(jnp.sort(ids))


def take(tree: Any, rows: jax.Array) -> Any:
  """The given rows of each item table in a tree (parameters or moments)."""
  return map_tables(lambda table: table[rows], lambda x: x, tree)


def put(tree: Any, rows: jax.Array, kept: jax.Array, small: Any) -> Any:
  """`tree` with given item-table rows, and everything else, from `small`.

  Args:
    tree: what `take` was applied to.
    rows: [n] int32, as given to `take`.
    kept: [n] bool, False for rows of `small` to pass over.
    small: the changed result of `take`.
  """

  def write(table, new):
    return table.at[jnp.where(kept, rows, table.shape[0])].set(new, mode='drop')

  return map_tables(write, lambda old, new: new, tree, small)


def scatter(small: Any, vocabulary: Vocabulary, like: Any) -> Any:
  """`small` with item tables as large as in `like`: the rows of the vocabulary
  are those of `small`, the others zero."""
  return put(
    jax.tree.map(jnp.zeros_like, like),
    vocabulary.ids,
    vocabulary.is_first,
    small,
  )


def add_weighted(
  total: Any, weights: jax.Array, ids: jax.Array, deltas: Any
) -> Any:
  """`total` + Σ_c weight_c · delta_c, with each item row at its place.

  Args:
    total: parameters of the whole catalogue.
    weights: [C] float32.
    ids: [C, U] int32 items of the rows of each client's item table.
    deltas: parameters with a leading axis [C], item tables [C, U, D].
  """

  # Weights are counts and deltas may cancel: the products are exact.
  def dense(old, new):
    return old + jnp.tensordot(
      weights, new, 1, precision=jax.lax.Precision.HIGHEST
    )

  def sparse(table, new):
    if new.shape[1:] == table.shape:  # the whole catalogue, in order
      return dense(table, new)
    new = weights[:, None, None] * new
    return table.at[ids.reshape(-1)].add(new.reshape(-1, new.shape[-1]))

  return map_tables(sparse, dense, total, deltas)


def is_table(path: Sequence[Any]) -> bool:
  """Whether a `jax.tree_util` path leads to an item table."""
  return any(getattr(key, 'key', None) == ITEM_TABLE for key in path)


def map_tables(on_tables, elsewhere, *trees: Any) -> Any:
  """tree.map with one function for item tables and one for the rest."""

  def apply(path, *leaves):
    return (on_tables if is_table(path) else elsewhere)(*leaves)

  return jax.tree_util.tree_map_with_path(apply, *trees)
