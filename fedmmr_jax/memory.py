"""Surprise-gated local memory of ONE client (DESIGN.md, Client memory).

Fixed-size arrays of item ids and counters: features are looked up by id, so a
slot costs 20 bytes. The clock is the number of samples the client has
processed, never the wall clock. Axes: `M` slots, `R` retrieved, `T` positives.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedmmr_jax.config import MemoryConfig


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


def init(capacity: int) -> Memory:
  """An empty memory of `capacity` slots."""
  zeros = jnp.zeros((capacity,), jnp.int32)
  return Memory(item=zeros, last_update=zeros, frequency=zeros,
                surprise=jnp.zeros((capacity,), jnp.float32), inserted=zeros,
                clock=jnp.zeros((), jnp.int32))


def utility(memory: Memory, now: jax.Array,
            config: MemoryConfig) -> jax.Array:
  """0.6·exp(−age/τ) + 0.4·log1p(f)/log1p(f+10) of each slot.

  Args:
    memory: one client's memory.
    now: [] int32 clock.
    config: weights and time constant.

  Returns:
    [M] float32; −inf for empty slots.
  """
  age = (now - memory.last_update).astype(jnp.float32)
  f = memory.frequency.astype(jnp.float32)
  recency = jnp.exp(-age / config.recency_time_constant)
  frequency = jnp.log1p(f) / jnp.log1p(f + 10.0)
  value = (config.recency_weight * recency
           + config.frequency_weight * frequency)
  return jnp.where(memory.item > 0, value, -jnp.inf)


def update(memory: Memory, item: jax.Array, surprise: jax.Array,
           valid: jax.Array, config: MemoryConfig) -> Memory:
  """Processes one positive: skip, refresh its entry, or write a new one.

  Args:
    memory: one client's memory.
    item: [] int32 item id.
    surprise: [] float32 pairwise loss of the positive.
    valid: [] bool; False (padding) changes nothing, not even the clock.
    config: threshold and utility.

  Returns:
    The next memory.
  """
  now = memory.clock
  stored = memory.item == item
  is_stored = jnp.any(stored)
  # Empty slots have utility -inf, so they are taken before anyone is evicted;
  # among equals the earliest inserted goes.
  value = utility(memory, now, config)
  lowest = value == jnp.min(value)
  oldest = jnp.where(lowest, memory.inserted, jnp.iinfo(jnp.int32).max)
  slot = jnp.where(is_stored, jnp.argmax(stored), jnp.argmin(oldest))

  writes = valid & (surprise >= config.surprise_threshold)
  here = writes & (jnp.arange(memory.item.shape[0]) == slot)
  kept_frequency = jnp.where(is_stored, memory.frequency, 0)
  kept_surprise = jnp.where(is_stored, memory.surprise, -jnp.inf)
  kept_inserted = jnp.where(is_stored, memory.inserted, now)
  return Memory(
      item=jnp.where(here, item, memory.item),
      last_update=jnp.where(here, now, memory.last_update),
      frequency=jnp.where(here, kept_frequency + 1, memory.frequency),
      surprise=jnp.where(
          here, jnp.maximum(kept_surprise, surprise), memory.surprise),
      inserted=jnp.where(here, kept_inserted, memory.inserted),
      clock=now + valid.astype(jnp.int32))


def update_all(memory: Memory, items: jax.Array, surprises: jax.Array,
               valid: jax.Array, config: MemoryConfig) -> Memory:
  """`update` for each of [T] positives in their order."""
  def step(memory, positive):
    return update(memory, *positive, config), None
  return jax.lax.scan(step, memory, (items, surprises, valid))[0]


def retrieve(memory: Memory, config: MemoryConfig) -> jax.Array:
  """[R] int32 item ids of highest utility, best first; 0 where empty."""
  value = utility(memory, memory.clock, config)
  order = jnp.lexsort((memory.inserted, -value))
  return memory.item[order[:config.retrieval_size]]


def fill(memory: Memory) -> jax.Array:
  """[] float32 share of the slots in use."""
  return jnp.mean((memory.item > 0).astype(jnp.float32))


def fetch(memories: Memory, clients: jax.Array) -> Memory:
  """Takes [C] clients out of memories stacked over all clients, [K].

  A padding client (−1) gets an empty memory, never somebody else's.
  """
  return jax.tree.map(
      lambda x: x.at[jnp.where(clients >= 0, clients, x.shape[0])].get(
          mode='fill', fill_value=0), memories)


def store(memories: Memory, clients: jax.Array, updated: Memory) -> Memory:
  """Inverse of `fetch`; what padding clients hold is dropped."""
  return jax.tree.map(
      lambda all_, new: all_.at[jnp.where(
          clients >= 0, clients, all_.shape[0])].set(new, mode='drop'),
      memories, updated)
