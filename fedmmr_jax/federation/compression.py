"""Compression: what a client sends made smaller, and the bytes it then takes.

A method turns a delta into a code, and the code into what the server decodes:
two pure functions for ONE client (`compress`, `decompress`). The code's arrays
have static shapes; `num_bytes` counts what of them would travel, and `to_bytes`
writes it, in as many bytes. The repeated rows of a client's vocabulary do not
travel.

A message with some rows of the item table begins with their number (4 bytes)
and their ids, ascending, as differences in LEB128: 1 byte below 128, 2 below
16,384. Compressed is the delta, and by `quantised` also prototypes and what
drift control uploads, unless the client keeps a state that has to agree with
the server's sum (SCAFFOLD). Everything else travels as it is, and counts.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax import parts
from fedmmr_jax.client import vocabulary as vocabulary_lib
from fedmmr_jax.client.update import ClientUpdate
from fedmmr_jax.client.vocabulary import Vocabulary
from fedmmr_jax.config import RunConfig
from fedmmr_jax.errors import UserError
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.federation.transforms import Sender, UpdateTransform

Params = Any
Tree = Any  # of arrays; None = nothing
_NUMBER = 4  # bytes of a float32, of a scale, of a count


class Rows(NamedTuple):
  """The rows of the item table in a message.

  Attributes:
    vocabulary: the items of the U rows.
    num_rows: V, of the whole catalogue.
    are_tables: of each parameter, whether it is an item table.
  """

  vocabulary: Vocabulary
  num_rows: int
  are_tables: tuple[bool, ...]

  @classmethod
  def of(cls, vocabulary: Vocabulary, params: Params) -> 'Rows':
    """Those of a client, whose server has these parameters."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    are_tables = tuple(vocabulary_lib.is_table(path) for path, _ in leaves)
    return cls(vocabulary, _num_rows(params), are_tables)

  @property
  def is_whole(self) -> bool:
    """Whether they are the whole catalogue, and need no ids."""
    return len(self.vocabulary.ids) == self.num_rows

  @property
  def count(self) -> jax.Array:
    """[] int32 rows that travel."""
    return jnp.sum(self.vocabulary.is_first, dtype=jnp.int32)

  def num_bytes(self) -> jax.Array:
    """[] int32 bytes of the ids."""
    if self.is_whole:
      return jnp.int32(0)
    ids = self.vocabulary.ids
    before = jnp.concatenate([jnp.full(1, -1, ids.dtype), ids[:-1]])
    return _NUMBER + jnp.sum(
      jnp.where(self.vocabulary.is_first, _varint_size(ids - before), 0)
    )

  def to_bytes(self) -> bytes:
    """The ids as they travel, on the host."""
    if self.is_whole:
      return b''
    ids = np.unique(np.asarray(self.vocabulary.ids))
    return _count(len(ids)) + _varints(np.diff(ids, prepend=-1))


@dataclasses.dataclass(frozen=True)
class Compression(UpdateTransform):
  """Base class; a method defines `compress`, `decompress`, `num_bytes` and
  `to_bytes`."""

  def compress(self, delta: Params, rows: Rows, key: jax.Array) -> Tree:
    """What a client sends for its delta.

    Args:
      delta: of the client's rows, zero where a row repeats another.
      rows: of its item table.
      key: for what is drawn.
    """
    raise NotImplementedError

  def decompress(self, code: Tree, rows: Rows, like: Params) -> Params:
    """What the server makes of it; `like` has the shapes of the delta."""
    raise NotImplementedError

  def num_bytes(self, code: Tree, rows: Rows) -> jax.Array:
    """[] int32 bytes of the message that `to_bytes` writes."""
    raise NotImplementedError

  def to_bytes(self, code: Tree, rows: Rows) -> bytes:
    """The message, on the host."""
    raise NotImplementedError

  def beside(
    self, update: ClientUpdate, rows: Rows, key: jax.Array
  ) -> tuple[ClientUpdate, jax.Array]:
    """(the update with what is sent besides the delta as the server gets it,
    [] int32 bytes of that)."""
    del key
    return update, (
      _plain_bytes(update.control, rows) + _plain_bytes(update.prototypes, rows)
    )

  def no_metrics(self):
    return {metrics_lib.UPLOADED: metrics_lib.EMPTY}

  def apply(self, update, kept, sender):
    rows = Rows.of(update.vocabulary, sender.params)
    key, key_beside = jax.random.split(sender.key)
    code = self.compress(_travelling(update.delta, rows), rows, key)
    update, uploaded = self.beside(update, rows, key_beside)
    uploaded += self.num_bytes(code, rows)
    return update._replace(
      delta=self.decompress(code, rows, update.delta),
      metrics=update.metrics
      | {
        metrics_lib.UPLOADED: metrics_lib.mean(uploaded, _sends(update, sender))
      },
    ), kept


class _Rounding(NamedTuple):
  """How numbers are rounded to few bits.

  Attributes:
    bits: of a value.
    block: values that share a scale.
    table_block: the same of the item table, which is cut into whole rows.
  """

  bits: int
  block: int
  table_block: int

  def compress(self, tree: Tree, rows: Rows, key: jax.Array | None) -> Tree:
    """See `Quantised`; without a key it rounds to the nearest.

    Returns:
      [(levels [U, D] int8, scale [U] float32)] of each item table, where the
      first row of a block sends the scale, and last of all else ([n], [b]).
    """
    tables, rest = _parts(_travelling(tree, rows))
    keys: Any = [None] * (len(tables) + 1)
    if key is not None:
      keys = jax.random.split(key, len(tables) + 1)
    code = []
    for own_key, table in zip(keys, tables):
      number = jnp.cumsum(rows.vocabulary.is_first) - 1
      scale = jax.ops.segment_max(
        jnp.max(jnp.abs(table), axis=1),
        number // self._rows_of_block(table),
        len(table),
        indices_are_sorted=True,
      )[number // self._rows_of_block(table)]
      code.append((self._levels(table, scale[:, None], own_key), scale))
    blocks = jnp.pad(rest, (0, -len(rest) % self.block)).reshape(-1, self.block)
    scale = jnp.max(jnp.abs(blocks), axis=1)
    levels = self._levels(rest, self._of_each(scale, rest), keys[-1])
    return [*code, (levels, scale)]

  def decompress(self, code: Tree, rows: Rows, like: Tree) -> Tree:
    """The values of what `compress` gave."""
    *tables, (levels, scale) = code
    return _assembled(
      [self._values(x, s[:, None]) for x, s in tables],
      self._values(levels, self._of_each(scale, levels)),
      like,
    )

  def num_bytes(self, code: Tree, rows: Rows) -> jax.Array:
    """[] int32 bytes, without those of the rows' ids."""
    *tables, (levels, scale) = code
    total = _NUMBER * len(scale) + self._packed(len(levels))
    for table, _ in tables:
      total += self._packed(rows.count * table.shape[1])
      total += _NUMBER * _ceil(rows.count, self._rows_of_block(table))
    return jnp.asarray(total)

  def to_bytes(self, code: Tree, rows: Rows) -> bytes:
    """Of each part its scales, then its levels, low bits first."""
    *tables, (levels, scale) = code
    real = np.asarray(rows.vocabulary.is_first)
    pieces = [
      (np.asarray(x)[real], np.asarray(s)[real][:: self._rows_of_block(x)])
      for x, s in tables
    ]
    pieces.append((np.asarray(levels), np.asarray(scale)))
    return b''.join(
      _floats(s) + _packed_levels(x, self.bits) for x, s in pieces
    )

  @property
  def _most(self) -> int:
    return 2 ** (self.bits - 1) - 1

  def _rows_of_block(self, table) -> int:
    return max(1, self.table_block // table.shape[1])

  def _of_each(self, scale, values):
    return jnp.repeat(scale, self.block)[: len(values)]

  def _levels(self, x, scale, key):
    step = scale / self._most
    scaled = x / jnp.where(step == 0, 1.0, step)
    offset = 0.5 if key is None else jax.random.uniform(key, x.shape)
    levels = jnp.clip(jnp.floor(scaled + offset), -self._most, self._most)
    return levels.astype(jnp.int8)

  def _values(self, levels, scale):
    # A scale that is NaN or infinite makes them NaN.
    return levels * (scale / self._most)

  def _packed(self, count):
    return _ceil(count * self.bits, 8)


@dataclasses.dataclass(frozen=True)
class Quantised(Compression):
  """Stochastic rounding to few bits: Alistarh et al. 2017, "QSGD:
  Communication-efficient SGD via gradient quantization and encoding", NeurIPS,
  §3, with the largest magnitude of a block as its scale. With 2 bits it is
  TernGrad (Wen et al. 2017, NeurIPS).

  A value x of a block with scale s is sent as ⌊x L / s + u⌋, u uniform, one of
  the whole numbers −L … L, L = 2^(bits−1) − 1. The mean over u is x, and the
  error is at most s / L. Blocks do not mix the item table with the rest.

  Attributes:
    bits: of a value.
    block: values that share a scale, of 4 bytes; of the item table as many
      whole rows as fit, at least one.
    down: bits of the parameters on the way to the clients, rounded to the
      nearest, with a scale for each row of the item table; 0 = as they are. The
      server keeps its own as they are.
  """

  bits: int = dataclasses.field(default=8, metadata={'choices': (8, 4, 2)})
  block: int = dataclasses.field(
    default=256, metadata={'minimum': 1, 'maximum': 2**20}
  )
  down: int = dataclasses.field(default=0, metadata={'choices': (0, 8, 4, 2)})

  @property
  def _up(self) -> _Rounding:
    return _Rounding(self.bits, self.block, self.block)

  @property
  def _down(self) -> _Rounding:
    return _Rounding(self.down, self.block, 1)

  def compress(self, delta, rows, key):
    return self._up.compress(delta, rows, key)

  def decompress(self, code, rows, like):
    return self._up.decompress(code, rows, like)

  def num_bytes(self, code, rows):
    return rows.num_bytes() + self._up.num_bytes(code, rows)

  def to_bytes(self, code, rows):
    return rows.to_bytes() + self._up.to_bytes(code, rows)

  def send(self, params):
    if not self.down:
      return params
    rows = Rows.of(vocabulary_lib.whole(_num_rows(params)), params)
    code = self._down.compress(params, rows, None)
    return self._down.decompress(code, rows, params)

  def no_metrics(self):
    down = {metrics_lib.DOWNLOADED: metrics_lib.EMPTY} if self.down else {}
    return super().no_metrics() | down

  def apply(self, update, kept, sender):
    update, kept = super().apply(update, kept, sender)
    if not self.down:
      return update, kept
    rows = Rows.of(update.vocabulary, sender.params)
    sent = vocabulary_lib.take(sender.params, rows.vocabulary.ids)
    code = self._down.compress(sent, rows, None)  # for its shapes
    size = rows.num_bytes() + self._down.num_bytes(code, rows)
    received = metrics_lib.mean(size, _sends(update, sender))
    return update._replace(
      metrics=update.metrics | {metrics_lib.DOWNLOADED: received}
    ), kept

  def beside(self, update, rows, key):
    control, prototypes = update.control, update.prototypes
    control_key, prototypes_key = jax.random.split(key)
    if control is None or update.kept is not None:
      size = _plain_bytes(control, rows)
    else:
      control, size = self._through(control, rows, control_key)
    if prototypes is not None:
      centre, coded = self._through(prototypes.centre, rows, prototypes_key)
      prototypes = prototypes._replace(centre=centre)
      size += coded + _plain_bytes(prototypes.size, rows)
    return update._replace(control=control, prototypes=prototypes), size

  def _through(self, tree, rows, key):
    """(What the server gets of a tree, its bytes without ids of rows)."""
    code = self._up.compress(tree, rows, key)
    return self._up.decompress(code, rows, tree), self._up.num_bytes(code, rows)


@dataclasses.dataclass(frozen=True)
class WithFeedback(Compression):
  """A method that leaves something out. With error feedback the client keeps
  it and adds it to its next delta (Seide et al. 2014, "1-bit SGD", Interspeech;
  Karimireddy et al. 2019, "Error feedback fixes SignSGD", ICML); of the item
  table, when it works on the row again.

  Clients that take part rarely add what is old by then (Li & Li 2023, "Analysis
  of error feedback in federated non-convex optimization with biased
  compression", ICML), so the default is without.

  Attributes:
    error_feedback: whether clients keep it, as much as the parameters.
  """

  error_feedback: bool = False

  def check(self, params, num_clients):
    if not self.error_feedback:
      return
    each = round_lib.state_bytes(params)
    if each * num_clients > round_lib.MOST_STATE_BYTES:
      raise UserError(
        f'`compression`: error feedback keeps {each:,} bytes for each of '
        f'{num_clients:,} clients, {each * num_clients:,} in all, more than '
        f'the {round_lib.MOST_STATE_BYTES:,} allowed; leave out '
        '`error_feedback`, or take fewer clients (`top_k_users`), fewer items '
        '(`k_core`), a smaller `hidden_dim`'
      )

  def client_state(self, params, key, num_clients):
    if not self.error_feedback:
      return None
    return jax.tree.map(
      lambda x: jnp.zeros((num_clients, *x.shape), x.dtype), params
    )

  def apply(self, update, kept, sender):
    if not self.error_feedback:
      return super().apply(update, kept, sender)
    rows = Rows.of(update.vocabulary, sender.params)
    before = vocabulary_lib.take(kept, rows.vocabulary.ids)
    wanted = jax.tree.map(jnp.add, update.delta, before)
    sent, _ = super().apply(update._replace(delta=wanted), None, sender)
    # Who sends nothing, or nothing of use, keeps what it had.
    sends = update.counts & (update.weight > 0)
    for x in jax.tree.leaves(wanted):
      sends &= jnp.all(jnp.isfinite(x))
    left = jax.tree.map(
      lambda all_, part, old: jnp.where(sends, all_ - part, old),
      wanted,
      sent.delta,
      before,
    )
    kept = vocabulary_lib.put(
      kept, rows.vocabulary.ids, rows.vocabulary.is_first, left
    )
    return sent, kept


class Chosen(NamedTuple):
  """The code of `TopK`.

  Attributes:
    value: [n] float32 the delta as one vector.
    is_sent: [n] bool.
    position: [n] int32 of each value in a vector of all parameters, ascending
      where it travels.
  """

  value: jax.Array
  is_sent: jax.Array
  position: jax.Array


@dataclasses.dataclass(frozen=True)
class TopK(WithFeedback):
  """The largest magnitudes of a delta, the rest is left out: Aji & Heafield
  2017, "Sparse communication for distributed gradient descent", EMNLP; Stich et
  al. 2018, "Sparsified SGD with memory", NeurIPS.

  A value takes 4 bytes, and its place, as the difference to the one before
  among all parameters, 1 to 5. What is zero never travels.

  Attributes:
    share: of the values of the client's rows and of all other parameters; more
      if several are equal to the smallest sent.
  """

  share: float = dataclasses.field(
    default=0.01, metadata={'minimum': 0.0, 'maximum': 1.0}
  )

  def __post_init__(self):
    if self.share == 0:
      raise ValueError('share=0 sends nothing')

  def compress(self, delta, rows, key):
    del key
    tables, rest = _parts(delta)
    ids = rows.vocabulary.ids
    values, positions = [], []
    considered = len(rest)
    offset = 0
    for table in tables:
      width = table.shape[1]
      values.append(table.reshape(-1))
      positions.append(
        (offset + ids[:, None] * width + jnp.arange(width)).reshape(-1)
      )
      considered += rows.count * width
      offset += rows.num_rows * width
    value = jnp.concatenate([*values, rest])
    position = jnp.concatenate([*positions, offset + jnp.arange(len(rest))])
    # Floats that are not negative are ordered like their bits; NaN is last, so
    # that it travels, and the server sees it.
    size = jax.lax.bitcast_convert_type(jnp.abs(value), jnp.int32)
    least = jnp.maximum(
      _kth_largest(size, jnp.ceil(self.share * considered)), 1
    )
    return Chosen(value, size >= least, position)

  def decompress(self, code, rows, like):
    tables, rest = _parts(like)
    value = jnp.where(code.is_sent, code.value, 0.0)
    ends = np.cumsum([table.size for table in tables])
    *found, rest = jnp.split(value, ends)
    return _assembled(
      [x.reshape(table.shape) for x, table in zip(found, tables)], rest, like
    )

  def num_bytes(self, code, rows):
    # The last position that was sent before each.
    last = jax.lax.cummax(jnp.where(code.is_sent, code.position, -1))
    before = jnp.concatenate([jnp.full(1, -1, last.dtype), last[:-1]])
    size = _NUMBER + _varint_size(code.position - before)
    return _NUMBER + jnp.sum(jnp.where(code.is_sent, size, 0))

  def to_bytes(self, code, rows):
    sent = np.asarray(code.is_sent)
    positions = np.asarray(code.position)[sent]
    return (
      _count(len(positions))
      + _varints(np.diff(positions, prepend=-1))
      + _floats(np.asarray(code.value)[sent])
    )


@dataclasses.dataclass(frozen=True)
class LowRank(WithFeedback):
  """Each matrix of a delta as the product of two narrow ones: Vogels et al.
  2019, "PowerSGD: Practical low-rank gradient compression for distributed
  optimization", NeurIPS, Algorithm 1.

  There all workers meet between the two halves of a power iteration, and start
  it from the last round's. A client that takes part rarely has no last round,
  and meets the server once, so each goes on alone for some iterations from a
  random start. Vectors, and matrices that would not become smaller, travel as
  they are.

  Attributes:
    rank: of the product.
    iterations: of the subspace iteration.
  """

  rank: int = dataclasses.field(default=4, metadata={'minimum': 1})
  iterations: int = dataclasses.field(default=2, metadata={'minimum': 1})

  def check(self, params, num_clients):
    super().check(params, num_clients)
    shapes = [_shape_of_matrix(x) for x in jax.tree.leaves(params)]
    if not any(self._is_smaller(*shape) for shape in shapes):
      n, m = max(shapes, key=lambda shape: (min(shape), max(shape)))
      raise UserError(
        f'`compression=low_rank,rank={self.rank}` makes no matrix of this '
        f'model smaller: the largest is {n} x {m}, of rank {min(n, m)} at most'
      )

  def _is_smaller(self, n: int, m: int) -> bool:
    return self.rank * (n + m) < n * m

  def compress(self, delta, rows, key):
    """Of each parameter (P [n, rank], Q [m, rank]), whose product P Q' it is,
    or itself."""
    code = []
    for number, x in enumerate(jax.tree.leaves(delta)):
      matrix = x.reshape(_shape_of_matrix(x))
      if not self._is_smaller(*matrix.shape):
        code.append(x)
        continue
      own_key = jax.random.fold_in(key, number)
      right = jax.random.normal(own_key, (matrix.shape[1], self.rank))
      for _ in range(self.iterations):
        left = _orthonormal(_product(matrix, right))
        right = _product(matrix.T, left)
      code.append((left, right))
    return code

  def decompress(self, code, rows, like):
    values = [
      _product(x[0], x[1].T).reshape(old.shape) if isinstance(x, tuple) else x
      for x, old in zip(code, jax.tree.leaves(like))
    ]
    return jax.tree.unflatten(jax.tree.structure(like), values)

  def num_bytes(self, code, rows):
    total = rows.num_bytes()
    for x, is_table in zip(code, rows.are_tables):
      along_rows, other = x if isinstance(x, tuple) else (x, None)
      if other is not None:
        total += _NUMBER * other.size
      if is_table:
        width = along_rows.size // len(along_rows)
        total += _NUMBER * rows.count * width
      else:
        total += _NUMBER * along_rows.size
    return jnp.asarray(total)

  def to_bytes(self, code, rows):
    real = np.asarray(rows.vocabulary.is_first)
    pieces = [rows.to_bytes()]
    for x, is_table in zip(code, rows.are_tables):
      along_rows, *other = x if isinstance(x, tuple) else (x,)
      along_rows = np.asarray(along_rows)
      pieces.append(_floats(along_rows[real] if is_table else along_rows))
      pieces += map(_floats, other)
    return b''.join(pieces)


COMPRESSIONS: dict[str, Any] = {
  'none': UpdateTransform,
  'int8': Quantised(),
  'quantised': Quantised,
  'top_k': TopK,
  'low_rank': LowRank,
}


def of(config: RunConfig) -> UpdateTransform:
  """The method that a config names.

  Raises:
    UserError: there is no method of that name, or it has no such option.
  """
  return parts.built(
    config.federation.compression, COMPRESSIONS, UpdateTransform, 'compression'
  )


def _sends(update: ClientUpdate, sender: Sender) -> jax.Array:
  """[] bool, whether there is a client whose message reaches the server."""
  return (sender.client >= 0) & update.counts


def _parts(tree: Tree) -> tuple[list[jax.Array], jax.Array]:
  """(Item tables, everything else as one vector)."""
  tables, rest = [], []
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    if vocabulary_lib.is_table(path):
      tables.append(x)
    else:
      rest.append(x.reshape(-1))
  return tables, jnp.concatenate([*rest, jnp.zeros(0)])


def _assembled(tables: list[jax.Array], rest: jax.Array, like: Tree) -> Tree:
  """Inverse of `_parts`."""
  remaining, start = list(tables), 0
  leaves = []
  for path, x in jax.tree_util.tree_leaves_with_path(like):
    if vocabulary_lib.is_table(path):
      leaves.append(remaining.pop(0))
    else:
      leaves.append(rest[start : start + x.size].reshape(x.shape))
      start += x.size
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _num_rows(params: Params) -> int:
  """V, the rows of the item table."""
  tables, _ = _parts(params)
  return len(tables[0])


def _travelling(tree: Tree, rows: Rows) -> Tree:
  """A tree of the client's rows, with 0 where a row repeats another."""
  first = rows.vocabulary.is_first[:, None]
  return jax.tree_util.tree_map_with_path(
    lambda path, x: (
      jnp.where(first, x, 0.0) if vocabulary_lib.is_table(path) else x
    ),
    tree,
  )


def _plain_bytes(tree: Tree, rows: Rows) -> jax.Array:
  """[] int32 bytes of what travels as it is, as `communication` counts it."""
  total = jnp.int32(0)
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    if vocabulary_lib.is_table(path) and not rows.is_whole:
      total += _NUMBER * rows.count * (x.size // len(x) + 1)
    else:
      total += _NUMBER * x.size
  return total


def _shape_of_matrix(x: Any) -> tuple[int, int]:
  """(n, m) of an array as a matrix; a vector is a column."""
  n = x.shape[0] if x.shape else 1
  return n, x.size // n


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  # Client and server have to see the same product.
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _orthonormal(columns: jax.Array) -> jax.Array:
  """[n, r] orthonormal columns with the same span, by Gram and Schmidt, each
  twice; a column that adds nothing is zero."""

  def add(j, basis):
    column = columns[:, j]
    found = column
    for _ in range(2):
      found = found - _product(basis, _product(basis.T, found))
    norm = jnp.sqrt(jnp.sum(found**2))
    adds_nothing = norm <= 1e-5 * jnp.sqrt(jnp.sum(column**2))
    found = jnp.where(
      adds_nothing, 0.0, found / jnp.where(adds_nothing, 1.0, norm)
    )
    return basis.at[:, j].set(found)

  return jax.lax.fori_loop(0, columns.shape[1], add, jnp.zeros_like(columns))


def _kth_largest(values: jax.Array, k: jax.Array) -> jax.Array:
  """[] int32 the largest number that at least `k` of `values` reach.

  Args:
    values: [n] int32 >= 0.
    k: [] at most n.
  """

  def fix_bit(i, found):
    candidate = found | (1 << (30 - i))
    return jnp.where(jnp.sum(values >= candidate) >= k, candidate, found)

  return jax.lax.fori_loop(0, 31, fix_bit, jnp.int32(0))


def _varint_size(number: jax.Array) -> jax.Array:
  """[…] int32 bytes of numbers >= 0 in LEB128, 7 bits a byte."""
  return 1 + sum(
    (number >= 1 << bits).astype(jnp.int32) for bits in (7, 14, 21, 28)
  )


def _varints(numbers: np.ndarray) -> bytes:
  """Numbers >= 0 in LEB128, the low 7 bits first."""
  written = bytearray()
  for number in numbers.tolist():
    while number >= 1 << 7:
      written.append(number & 127 | 128)
      number >>= 7
    written.append(number)
  return bytes(written)


def _count(number: int) -> bytes:
  return np.array(number, '<u4').tobytes()


def _floats(x: Any) -> bytes:
  return np.asarray(x).astype('<f4').tobytes()


def _packed_levels(levels: np.ndarray, bits: int) -> bytes:
  """Levels as unsigned numbers of so many bits, low bits first."""
  shifted = (levels.reshape(-1).astype(np.int32) & (2**bits - 1))[:, None]
  digits = (shifted >> np.arange(bits)) & 1
  return np.packbits(digits.astype(np.uint8), bitorder='little').tobytes()


def _ceil(number, divisor: int):
  return -(-number // divisor)
