"""Local memory of ONE client (docs/model.md, Client memory), in four forms:

* `surprise`, the paper's form: positives that the model finds hard are stored,
  and the entry with the lowest utility is evicted;
* `recent`: every positive is stored, and the oldest entry is evicted;
* `two_tier`: a first-in-first-out short-term memory, and a long-term memory for
  positives unlike any short-term entry; nearly equal entries are merged;
* `none`.

Fixed-size arrays of item ids and counters: features are looked up by id, so a
slot costs 20 bytes. The clock is the number of samples the client has
processed, never the wall clock. Axes: `M` slots, `R` retrieved, `T` positives.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedmmr_jax.config import (
  MemoryRule,
  NoMemory,
  RecentMemory,
  SurpriseMemory,
  TwoTierMemory,
  UtilityMemory,
)
from fedmmr_jax.models import layers


class Memory(NamedTuple):
  """Memory of one client; stacked over clients it gains a leading axis.

  Attributes:
    item: [M] int32 item id, 0 = empty slot.
    last_update: [M] int32 clock at which the entry was last written.
    frequency: [M] int32 how often the entry was written.
    surprise: [M] float32 largest pairwise loss the entry was written with.
    inserted: [M] int32 clock at which the entry took its slot; breaks ties.
    clock: [] int32 samples processed so far; 0 = never sampled.
  """

  item: jax.Array
  last_update: jax.Array
  frequency: jax.Array
  surprise: jax.Array
  inserted: jax.Array
  clock: jax.Array


def init(rule: MemoryRule) -> Memory:
  """An empty memory; the short-term slots come before the long-term ones."""
  zeros = jnp.zeros((rule.num_slots,), jnp.int32)
  return Memory(
    item=zeros,
    last_update=zeros,
    frequency=zeros,
    surprise=jnp.zeros(zeros.shape, jnp.float32),
    inserted=zeros,
    clock=jnp.zeros((), jnp.int32),
  )


def utility(memory: Memory, now: jax.Array, rule: UtilityMemory) -> jax.Array:
  """0.6·exp(−age/τ) + 0.4·log1p(f)/log1p(f+10) of each slot.

  Args:
    memory: one client's memory.
    now: [] int32 clock.
    rule: weights and time constant.

  Returns:
    [M] float32; −inf for empty slots.
  """
  age = (now - memory.last_update).astype(jnp.float32)
  f = memory.frequency.astype(jnp.float32)
  recency = jnp.exp(-age / rule.recency_time_constant)
  frequency = jnp.log1p(f) / jnp.log1p(f + 10.0)
  value = rule.recency_weight * recency + rule.frequency_weight * frequency
  return jnp.where(memory.item > 0, value, -jnp.inf)


def update(
  memory: Memory,
  item: jax.Array,
  surprise: jax.Array,
  valid: jax.Array,
  features: jax.Array | None,
  rule: MemoryRule,
) -> Memory:
  """Processes one positive: skips it, refreshes its entry, or writes a new one.

  Args:
    memory: one client's memory.
    item: [] int32 item id.
    surprise: [] float32 pairwise loss of the positive.
    valid: [] bool; False (padding) changes nothing, not even the clock.
    features: [V, F] float32 by which `two_tier` compares items; None for the
      other forms.
    rule: form, threshold and utility.

  Returns:
    The next memory.
  """
  now = memory.clock
  stored = memory.item == item
  if isinstance(rule, SurpriseMemory):
    slot = _slot(memory, stored, utility(memory, now, rule))
    memory = _write(
      memory, slot, item, surprise, now, valid & (surprise >= rule.threshold)
    )
  elif isinstance(rule, RecentMemory):
    slot = _slot(memory, stored, _recency(memory))
    memory = _write(memory, slot, item, surprise, now, valid)
  elif isinstance(rule, TwoTierMemory):
    value = utility(memory, now, rule)
    is_short = jnp.arange(len(stored)) < rule.capacity
    similarity = _cosine(features, item, memory)
    novelty = 1 - jnp.max(
      jnp.where(is_short & ~stored, similarity, 0.0), initial=0.0
    )
    slot = _slot(
      memory, stored & is_short, jnp.where(is_short, _recency(memory), jnp.inf)
    )
    memory = _write(memory, slot, item, surprise, now, valid)
    alike = (memory.item > 0) & (similarity >= rule.merge_similarity)
    own = ~is_short & stored
    merged = jnp.where(jnp.any(own), own, ~is_short & alike)
    slot = _slot(memory, merged, jnp.where(is_short, jnp.inf, value))
    # What is merged keeps the item it had.
    kept = jnp.where(jnp.any(merged), memory.item[slot], item)
    memory = _write(
      memory,
      slot,
      kept,
      surprise,
      now,
      valid & (novelty >= rule.novelty_threshold),
    )
  return memory._replace(clock=now + valid.astype(jnp.int32))


def _recency(memory: Memory) -> jax.Array:
  """[M] float32 clock of the last write; −inf for empty slots."""
  return jnp.where(
    memory.item > 0, memory.last_update.astype(jnp.float32), -jnp.inf
  )


def _slot(memory: Memory, matching: jax.Array, value: jax.Array) -> jax.Array:
  """[] int32: the first matching slot, else the one with the lowest value.

  Empty slots have value −inf, so they are used before any entry is evicted;
  among equals the one inserted first is evicted.
  """
  oldest = jnp.where(
    value == jnp.min(value), memory.inserted, jnp.iinfo(jnp.int32).max
  )
  return jnp.where(jnp.any(matching), jnp.argmax(matching), jnp.argmin(oldest))


def _write(memory: Memory, slot, item, surprise, now, writes) -> Memory:
  """Writes one slot if `writes`: refreshes the entry if it holds the same item,
  replaces it otherwise. The clock does not advance."""
  here = writes & (jnp.arange(memory.item.shape[0]) == slot)
  same = memory.item[slot] == item
  frequency = jnp.where(same, memory.frequency, 0) + 1
  largest = jnp.maximum(jnp.where(same, memory.surprise, -jnp.inf), surprise)
  inserted = jnp.where(same, memory.inserted, now)
  return memory._replace(
    item=jnp.where(here, item, memory.item),
    last_update=jnp.where(here, now, memory.last_update),
    frequency=jnp.where(here, frequency, memory.frequency),
    surprise=jnp.where(here, largest, memory.surprise),
    inserted=jnp.where(here, inserted, memory.inserted),
  )


def _cosine(features: jax.Array, item: jax.Array, memory: Memory) -> jax.Array:
  """[M] cosine between the features of an item and of the entries; 0 if either
  has none, or the slot is empty (row 0 is zero)."""
  own, entries = features[item], features[memory.item]
  squared = jnp.sum(own**2) * jnp.sum(entries**2, axis=-1)
  return entries @ own * layers.inverse_norm(squared)


def update_all(
  memory: Memory,
  items: jax.Array,
  surprises: jax.Array,
  valid: jax.Array,
  features: jax.Array | None,
  rule: MemoryRule,
) -> Memory:
  """`update` for each of [T] positives, in order."""
  if isinstance(rule, NoMemory):
    count = jnp.sum(valid, dtype=jnp.int32)
    return memory._replace(clock=memory.clock + count)

  def step(memory, positive):
    return update(memory, *positive, features, rule), None

  return jax.lax.scan(step, memory, (items, surprises, valid))[0]


def retrieve(memory: Memory, rule: MemoryRule) -> jax.Array:
  """[R] int32 item ids to attend to, 0 where empty.

  By default the entries with the highest utility, best first; with `recent` the
  latest; with `two_tier` the latest short-term entries and then, as the smaller
  half, the best long-term ones.
  """
  size = rule.retrieval_size
  if not isinstance(rule, UtilityMemory):
    return _best(memory, _recency(memory), size)
  value = utility(memory, memory.clock, rule)
  if isinstance(rule, TwoTierMemory):
    is_short = jnp.arange(len(value)) < rule.capacity
    latest = jnp.where(is_short, _recency(memory), -jnp.inf)
    lasting = jnp.where(is_short, -jnp.inf, value)
    return jnp.concatenate(
      [
        _best(memory, latest, size - size // 2),
        _best(memory, lasting, size // 2),
      ]
    )
  return _best(memory, value, size)


def _best(memory: Memory, value: jax.Array, count: int) -> jax.Array:
  """[count] items with the highest values, best first; 0 where it is −inf."""
  order = jnp.lexsort((memory.inserted, -value))[:count]
  return jnp.where(jnp.isneginf(value[order]), 0, memory.item[order])


def fill(memory: Memory) -> jax.Array:
  """[] float32 share of the slots in use."""
  return jnp.mean((memory.item > 0).astype(jnp.float32))


def fetch(memories: Memory | None, clients: jax.Array) -> Memory | None:
  """Takes [C] clients out of memories stacked over all clients, [K].

  A padding client (−1) gets an empty memory, never that of another client. None
  without memories.
  """
  return jax.tree.map(
    lambda x: x.at[jnp.where(clients >= 0, clients, x.shape[0])].get(
      mode='fill', fill_value=0
    ),
    memories,
  )


def store(
  memories: Memory | None, clients: jax.Array, updated: Memory | None
) -> Memory | None:
  """Inverse of `fetch`; the memories of padding clients are dropped."""
  return jax.tree.map(
    lambda all_, new: all_.at[
      jnp.where(clients >= 0, clients, all_.shape[0])
    ].set(new, mode='drop'),
    memories,
    updated,
  )
