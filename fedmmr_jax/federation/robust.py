"""Robust aggregators: a few clients of a cohort may send anything.

| aggregator | what the server uses | memory | operations |
|---|---|---|---|
| `norm_bound` | the mean of updates cut to a norm | none | CUD |
| `median_norm` | the same, to a multiple of the median norm | CUD | CUD |
| `median` | each coordinate's median | CUD | 32 CVD |
| `trimmed_mean` | each coordinate's mean without extremes | CUD | 64 CVD |
| `krum` | the update with the nearest neighbours | CUD + C² | C²VD |
| `multi_krum` | the mean of several such updates | CUD + C² | C²VD |
| `geometric_median` | the point nearest to all updates | CUD + C² | C²VD |

The memory is what clients sent: C · U · D numbers and not C · V · D, where C is
the cohort and U the rows of a client's item table. It is there twice while the
chunks of a cohort are put together. Tables of the whole catalogue exist for a
block of rows at a time. `round.check_collected` refuses more than it allows
before round 1.

A client counts once, whatever it says about its number of positives, unless
`weighted=true`. Clients without positives, those that were rejected (weight 0)
and updates that are not finite count nowhere. Item rows that a client does not
have did not change: they are zero in norms and distances.

What drift control uploads and prototypes are means, which nothing here makes
robust; `check` refuses drift controls that upload.
"""

import dataclasses
import math
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from fedmmr_jax.client import vocabulary
from fedmmr_jax.client.drift import DriftControl
from fedmmr_jax.client.update import ClientUpdate
from fedmmr_jax.client.vocabulary import Vocabulary
from fedmmr_jax.errors import UserError
from fedmmr_jax.federation.aggregators import add_weighted, Aggregator, FedAvg

Params = Any
# Numbers of a block of item rows [C, R, D].
_BLOCK = 1 << 21
_EXACT = jax.lax.Precision.HIGHEST  # distances are differences
ROWS = ('touched', 'all')


class Sent(NamedTuple):
  """What the clients of a cohort sent, those that count nowhere as zeros.

  Attributes:
    delta: their deltas, [C, …]; the item table [C, U, D].
    ids: [C, U] int32 items of the rows, ascending.
    weight: [C] float32 positives; 0 for clients that count nowhere.
  """

  delta: Params
  ids: jax.Array
  weight: jax.Array

  @property
  def present(self) -> jax.Array:
    """[C] bool, who counts."""
    return self.weight > 0


def counted(updates: ClientUpdate) -> Sent:
  """What counts of a chunk's updates [C, …]: a repeated id once, and of clients
  without weight or with a number that is not finite nothing."""
  finite = jnp.stack(
    [_for_each(jnp.isfinite(x)).all(1) for x in jax.tree.leaves(updates.delta)]
  ).all(0)
  present = (updates.weight > 0) & finite
  ids = updates.vocabulary.ids
  first = jax.vmap(lambda own: Vocabulary(own).is_first)(ids)

  def chosen(x, some):
    return jnp.where(
      some.reshape(*some.shape, *[1] * (x.ndim - some.ndim)), x, 0
    )

  return Sent(
    vocabulary.map_tables(
      lambda x: chosen(x, present[:, None] & first),
      lambda x: chosen(x, present),
      updates.delta,
    ),
    ids,
    jnp.where(present, updates.weight, 0.0),
  )


def check(
  aggregator: Aggregator, drift: DriftControl, params: Params, cohort: int
) -> None:
  """Refuses a robust aggregator that could not hold what it promises.

  Args:
    aggregator: of the run.
    drift: its drift control.
    params: of the server, or their shapes.
    cohort: clients of a round.

  Raises:
    UserError: the cohort breaks its assumption, or drift control uploads means
      that any client can spoil.
  """
  if not isinstance(aggregator, (Robust, NormBound)):
    return
  fault = aggregator.fault(cohort)
  if fault:
    raise UserError(
      f'`aggregator`: {fault}; {cohort} clients are in a cohort, see '
      '`client_fraction`'
    )
  uploaded = jax.eval_shape(lambda: drift.no_upload(params))
  if jax.tree.leaves(uploaded):
    raise UserError(
      f'`aggregator`: {type(aggregator).__name__} cannot protect the means '
      'that `drift_control` uploads; say `drift_control=none` or '
      '`drift_control=fedprox`'
    )


@dataclasses.dataclass(frozen=True)
class NormBound(FedAvg):
  """Sun et al. 2019, "Can you really backdoor federated learning?":
  the mean of the deltas, each divided by max(1, |delta| / norm).

  Attributes:
    norm: the longest that a delta may be.
    weighted: whether clients count by their positives, as in the paper.
  """

  norm: float = dataclasses.field(metadata={'minimum': 1e-12})
  weighted: bool = False

  def add(self, total, updates):
    sent = counted(updates)
    share = jnp.minimum(1.0, self.norm / jnp.maximum(_norms(sent), self.norm))
    weight = _weights(sent, self.weighted)
    updates = updates._replace(delta=sent.delta, weight=weight)
    return total._replace(
      delta=add_weighted(total.delta, weight * share, updates),
      weight=total.weight + jnp.sum(weight),
    )

  def fault(self, cohort: int) -> str:
    """What is wrong with it for such a cohort; '' = nothing."""
    return ''


@dataclasses.dataclass(frozen=True)
class Robust(Aggregator):
  """Base class of those that collect a cohort's updates; subclasses define
  `combined`."""

  def zero(self, params):
    return None

  def add(self, total, updates):
    return None

  def collect(self, updates):
    return counted(updates)

  def finish(self, total, collected, state, params):
    return self.combined(collected, params), state

  def combined(self, sent: Sent, params: Params) -> Params:
    """The delta of a cohort; zero where nobody counts.

    Args:
      sent: of the whole cohort, padding clients included.
      params: the server's.
    """
    raise NotImplementedError

  def fault(self, cohort: int) -> str:
    """What is wrong with it for a cohort of so many clients; '' = nothing."""
    return ''


@dataclasses.dataclass(frozen=True)
class MedianNorm(Robust):
  """`norm_bound` with a norm that follows the updates: a multiple of the
  cohort's median norm, which attackers in the minority cannot raise beyond an
  honest client's.

  Attributes:
    times: the longest that a delta may be, in median norms.
    weighted: whether clients count by their positives.
  """

  times: float = dataclasses.field(default=1.0, metadata={'minimum': 1e-6})
  weighted: bool = False

  def combined(self, sent, params):
    norms = _norms(sent)
    bound = self.times * _median(norms[:, None], sent.present[:, None])
    share = jnp.where(norms > bound, bound / jnp.where(norms > 0, norms, 1), 1)
    weight = _weights(sent, self.weighted)
    return _weighted_sum(sent, _over(weight, jnp.sum(weight)) * share, params)


@dataclasses.dataclass(frozen=True)
class CoordinateWise(Robust):
  """A statistic of each coordinate; subclasses define `statistic`.

  A row of the item table has a statistic of its own: with `rows=touched` over
  the clients whose update changes it, times their share of the cohort, so that
  it moves as far as in a mean over all; with `rows=all` over the whole cohort,
  which leaves every row where it is that less than half of the clients touched.

  Attributes:
    rows: touched or all.
    quorum: rows that fewer clients touched stay where they are. A row needs
      2f + 1 clients against f attackers.
  """

  rows: str = dataclasses.field(default='touched', metadata={'choices': ROWS})
  quorum: int = dataclasses.field(default=1, metadata={'minimum': 1})

  def statistic(self, values: jax.Array, counts: jax.Array) -> jax.Array:
    """[…] of values [C, …], of those that count, bool [C, …] or [C, …, 1];
    0 where none does."""
    raise NotImplementedError

  def combined(self, sent, params):
    number = jnp.maximum(jnp.sum(sent.present), 1)

    def of_rows(values):  # [C, R, D]
      touched = jnp.any(values != 0, axis=-1)
      voters = jnp.sum(touched, axis=0)
      if self.rows == 'all':
        counts = jnp.broadcast_to(sent.present[:, None], touched.shape)
        share = jnp.ones(voters.shape)
      else:
        counts, share = touched, voters / number
      share = jnp.where(voters >= self.quorum, share, 0.0)
      return share[:, None] * self.statistic(values, counts[..., None])

    def table(x, like):
      return _over_blocks(sent.ids, x, like.shape[0], of_rows)

    def elsewhere(x, like):
      counts = sent.present.reshape(-1, *[1] * (x.ndim - 1))
      return self.statistic(x, jnp.broadcast_to(counts, x.shape))

    return vocabulary.map_tables(table, elsewhere, sent.delta, params)


@dataclasses.dataclass(frozen=True)
class Median(CoordinateWise):
  """Yin et al. 2018, "Byzantine-robust distributed learning: towards optimal
  statistical rates", ICML, algorithm 1, option I."""

  def statistic(self, values, counts):
    return _median(values, counts)


@dataclasses.dataclass(frozen=True)
class TrimmedMean(CoordinateWise):
  """Yin et al. 2018, algorithm 1, option II: the mean without the `share`
  largest and the `share` smallest values. Their number is rounded up, so that a
  row that three clients touched has its median; at least one value is left.

  Attributes:
    share: cut off at each end.
  """

  share: float = dataclasses.field(
    default=0.1, metadata={'minimum': 0.0, 'maximum': 0.5}
  )

  def statistic(self, values, counts):
    number = jnp.sum(counts, axis=0)
    cut = jnp.ceil(self.share * number - 1e-4).astype(jnp.int32)
    cut = jnp.clip(cut, 0, jnp.maximum(number - 1, 0) // 2)
    keys = _keys(values, counts)
    low = _value(_kth(keys, cut))
    high = _value(_kth(keys, jnp.maximum(number - 1, 0) - cut))
    inside = counts & (values > low) & (values < high)
    # Of values equal to a bound, those that are not cut off.
    at_low = jnp.sum(counts & (values <= low), axis=0) - cut
    at_high = jnp.sum(counts & (values >= high), axis=0) - cut
    left = jnp.maximum(number - 2 * cut, 1)
    total = jnp.sum(jnp.where(inside, values, 0.0), axis=0)
    total += at_low * low + at_high * high
    found = jnp.where(low < high, total / left, low)
    return jnp.where(number > 0, found, 0.0)

  def fault(self, cohort):
    cut = math.ceil(self.share * cohort - 1e-4)
    if 2 * cut < cohort:
      return ''
    return (
      f'trimmed_mean,share={self.share} cuts off all clients, {cut} at each end'
    )


@dataclasses.dataclass(frozen=True)
class MultiKrum(Robust):
  """Blanchard et al. 2017, "Machine learning with adversaries: Byzantine
  tolerant gradient descent", NeurIPS: the mean of the
  `chosen` updates with the smallest sums of squared distances to their
  n − f − 2 nearest.

  In a round with so few answers that 2f + 2 ≥ n the server stays where it is.

  Attributes:
    attackers: f, how many of a cohort may attack.
    chosen: how many updates are used.
    weighted: whether these count by their positives.
  """

  attackers: int = dataclasses.field(metadata={'minimum': 0})
  chosen: int = dataclasses.field(metadata={'minimum': 1})
  weighted: bool = False

  def combined(self, sent, params):
    number = jnp.sum(sent.present)
    scores = self.scores(sent, params)
    place = jnp.argsort(jnp.argsort(scores))
    taken = (place < self.chosen) & jnp.isfinite(scores)
    taken &= number > 2 * self.attackers + 2
    weight = jnp.where(taken, _weights(sent, self.weighted), 0.0)
    return _weighted_sum(sent, _over(weight, jnp.sum(weight)), params)

  def scores(self, sent: Sent, params: Params) -> jax.Array:
    """[C] float32 sums of squared distances; infinite for who counts
    nowhere."""
    products = _products(sent, params)
    own = jnp.diagonal(products)
    distance = jnp.maximum(own[:, None] + own[None] - 2 * products, 0.0)
    pairs = sent.present[:, None] & sent.present[None]
    pairs &= ~jnp.eye(len(own), dtype=bool)
    # An update so long that its square is infinite is far from all others.
    distance = jnp.where(pairs & jnp.isfinite(distance), distance, jnp.inf)
    near = jnp.arange(len(own)) < (jnp.sum(sent.present) - self.attackers - 2)
    scores = jnp.sum(jnp.where(near, jnp.sort(distance, axis=1), 0.0), axis=1)
    return jnp.where(sent.present, scores, jnp.inf)

  def fault(self, cohort):
    if 2 * self.attackers + 2 >= cohort:
      return (
        f'Krum with attackers={self.attackers} needs more than '
        f'2 · {self.attackers} + 2 clients'
      )
    if self.chosen > cohort - self.attackers:
      return (
        f'multi_krum,chosen={self.chosen} uses updates of the '
        f'{self.attackers} attackers'
      )
    return ''


@dataclasses.dataclass(frozen=True)
class Krum(MultiKrum):
  """`multi_krum` with the best update alone.

  Attributes:
    attackers: f, how many of a cohort may attack.
  """

  chosen: int = dataclasses.field(default=1, init=False)
  weighted: bool = dataclasses.field(default=False, init=False)


@dataclasses.dataclass(frozen=True)
class GeometricMedian(Robust):
  """Pillutla et al. 2022, "Robust aggregation for federated learning", IEEE
  Transactions on Signal Processing, RFA: the smoothed Weiszfeld
  algorithm, from a delta of zero, so that the length of an update gains it
  nothing.

  Attributes:
    iterations: of Weiszfeld.
    smoothing: ν, no distance counts as less.
    weighted: whether clients count by their positives, as in the paper.
  """

  iterations: int = dataclasses.field(default=8, metadata={'minimum': 1})
  smoothing: float = dataclasses.field(
    default=1e-6, metadata={'minimum': 1e-12}
  )
  weighted: bool = False

  def combined(self, sent, params):
    products = _products(sent, params)
    usable = sent.present & jnp.isfinite(jnp.diagonal(products))
    both = usable[:, None] & usable[None]
    products = jnp.where(both, products, 0.0)
    own = jnp.diagonal(products)
    alpha = jnp.where(usable, _weights(sent, self.weighted), 0.0)

    def weiszfeld(_, share):
      towards = jnp.matmul(products, share, precision=_EXACT)
      squared = jnp.dot(share, towards, precision=_EXACT) - 2 * towards + own
      distance = jnp.sqrt(jnp.maximum(squared, self.smoothing**2))
      beta = alpha / distance
      return _over(beta, jnp.sum(beta))

    share = jax.lax.fori_loop(
      0, self.iterations, weiszfeld, jnp.zeros_like(own)
    )
    return _weighted_sum(sent, share, params)


ROBUST: dict[str, type[Aggregator]] = {
  'norm_bound': NormBound,
  'median_norm': MedianNorm,
  'median': Median,
  'trimmed_mean': TrimmedMean,
  'krum': Krum,
  'multi_krum': MultiKrum,
  'geometric_median': GeometricMedian,
}


def _for_each(x: jax.Array) -> jax.Array:
  """[C, …] as [C, numbers of a client]."""
  return x.reshape(len(x), -1)


def _over(x: jax.Array, total: jax.Array) -> jax.Array:
  """`x` / `total`; 0 where nothing counts."""
  return jnp.where(total > 0, x / jnp.where(total > 0, total, 1.0), 0.0)


def _weights(sent: Sent, weighted: bool) -> jax.Array:
  """[C] float32 how much each client counts."""
  return sent.weight if weighted else sent.present.astype(jnp.float32)


def _norms(sent: Sent) -> jax.Array:
  """[C] float32 lengths of the deltas; infinite where a square is."""
  return jnp.sqrt(
    sum(
      jnp.sum(jnp.square(_for_each(x)), axis=1)
      for x in jax.tree.leaves(sent.delta)
    )
  )


def _weighted_sum(sent: Sent, share: jax.Array, params: Params) -> Params:
  """Σ_c share_c · delta_c, for the whole catalogue; with shares of 0 even of
  numbers whose product with 0 is none."""
  return vocabulary.add_weighted(
    jax.tree.map(jnp.zeros_like, params), share, sent.ids, sent.delta
  )


def _products(sent: Sent, params: Params) -> jax.Array:
  """[C, C] inner products of the deltas, item rows by their items."""

  def dense(x):
    x = _for_each(x)
    return jnp.matmul(x, x.T, precision=_EXACT)

  def table(x, like):
    blocks = _Blocks.of(sent.ids, x, like.shape[0])
    return jax.lax.fori_loop(
      0,
      blocks.number,
      lambda i, total: total + dense(blocks.rows(i)),
      jnp.zeros((len(x), len(x))),
    )

  found = vocabulary.map_tables(
    table, lambda x, like: dense(x), sent.delta, params
  )
  return sum(jax.tree.leaves(found), jnp.zeros(()))


class _Blocks(NamedTuple):
  """Item tables of clients as blocks of rows of the whole catalogue.

  Attributes:
    ids: [C, U] int32.
    tables: [C, U, D].
    size: R, rows of a block.
    number: of blocks.
  """

  ids: jax.Array
  tables: jax.Array
  size: int
  number: int

  @classmethod
  def of(cls, ids: jax.Array, tables: jax.Array, num_rows: int) -> '_Blocks':
    """Blocks of about `_BLOCK` numbers."""
    clients, _, width = tables.shape
    size = min(num_rows, max(1, _BLOCK // (clients * width)))
    return cls(ids, tables, size, -(-num_rows // size))

  def rows(self, number: jax.Array) -> jax.Array:
    """[C, R, D] one of the blocks; 0 where a client lacks the row."""
    items = number * self.size + jnp.arange(self.size)

    def of_client(ids, table):
      at = jnp.searchsorted(ids, items, method='scan_unrolled')
      there = ids.at[at].get(mode='fill', fill_value=-1) == items
      return jnp.where(there[:, None], table.at[at].get(mode='clip'), 0.0)

    return jax.vmap(of_client)(self.ids, self.tables)


def _over_blocks(
  ids: jax.Array,
  tables: jax.Array,
  num_rows: int,
  function: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """[V, D] what a function [C, R, D] -> [R, D] makes of all rows."""
  blocks = _Blocks.of(ids, tables, num_rows)
  found = jax.lax.map(
    lambda number: function(blocks.rows(number)), jnp.arange(blocks.number)
  )
  return found.reshape(-1, found.shape[-1])[:num_rows]


def _median(values: jax.Array, counts: jax.Array) -> jax.Array:
  """[…] medians of values [C, …] of those that count, [C, …] or broadcast
  against it; 0 where none does. Of an even number, the mean of the middle
  two."""
  number = jnp.sum(counts, axis=0)
  keys = _keys(values, counts)
  lower = _kth(keys, jnp.maximum(number - 1, 0) // 2)
  # The next one, unless the lower one comes often enough.
  up_to = jnp.sum(keys <= lower, axis=0)
  above = jnp.min(jnp.where(keys > lower, keys, _LAST), axis=0)
  upper = jnp.where(up_to > number // 2, lower, above)
  # Halves first, for numbers near the largest.
  return jnp.where(number > 0, 0.5 * _value(lower) + 0.5 * _value(upper), 0.0)


_SIGN = jnp.uint32(1 << 31)
_LAST = jnp.uint32((1 << 32) - 1)


def _keys(values: jax.Array, counts: jax.Array) -> jax.Array:
  """uint32 numbers in the order of the values, the last for those that do not
  count."""
  bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
  ordered = jnp.where(bits & _SIGN, ~bits, bits | _SIGN)
  return jnp.where(counts, ordered, _LAST)


def _value(keys: jax.Array) -> jax.Array:
  """float32 values of `_keys`."""
  bits = jnp.where(keys & _SIGN, keys ^ _SIGN, ~keys)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _kth(keys: jax.Array, k: jax.Array) -> jax.Array:
  """[…] the k-th smallest (from 0) of keys [C, …], bit by bit from the first:
  on a CPU six times as fast as sorting 100 clients.

  Args:
    keys: uint32.
    k: int32, broadcast against the result.
  """

  def bit(number, found):
    higher = found | (_SIGN >> number.astype(jnp.uint32))
    fewer = jnp.sum(keys < higher, axis=0, dtype=jnp.int32)
    return jnp.where(fewer <= k, higher, found)

  return jax.lax.fori_loop(0, 32, bit, jnp.zeros(keys.shape[1:], jnp.uint32))
