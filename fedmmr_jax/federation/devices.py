"""How a cohort is split into shards that never wait for each other.

A cohort's chunks are dealt into shards, and one jitted program runs a shard:

* On a CPU the shards are separate calls on the one device, and `workers()` of
  them run in parallel, each in a thread. They read the same data and state, and
  their sums are added afterwards, in the order of the shards. There is no
  collective between them: several CPU devices in one process, each waiting in
  an all-reduce for one that finds no free thread, can deadlock
  (openxla/xla #32115). The number of shards does not depend on the machine, and
  a program keeps its arithmetic in one thread, so a different number of workers
  or cores changes no bit of a result.
* On a GPU all clients are one shard. Several GPUs take one shard each, as a
  mesh, in one program. Each has a copy of the data and of the state.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Callable, Iterable

import jax
import numpy as np
from jax.sharding import (
  Mesh,
  NamedSharding,
  PartitionSpec,
  Sharding,
  SingleDeviceSharding,
)

AXIS = 'devices'
PADDING_CLIENT = -1
# More would leave each too few chunks, and each has a sum of all parameters.
CPU_SHARDS = 8

# Most operations of a local step are too small to share among threads: one
# program a core is faster than one program on all cores, and a product that is
# cut in pieces is rounded as the number of pieces has it.
jit = partial(jax.jit, compiler_options={'xla_cpu_multi_thread_eigen': False})

_most_workers = 0


def cores() -> int:
  """How many cores this process may use."""
  return (
    len(os.sched_getaffinity(0))
    if hasattr(os, 'sched_getaffinity')
    else os.cpu_count() or 1
  )  # macOS has no affinity


def workers() -> int:
  """How many shards run in parallel on a CPU."""
  return min(_most_workers or cores(), CPU_SHARDS)


def set_workers(count: int) -> None:
  """Sets how many shards run in parallel on a CPU; 0 = the cores that this
  process may use. This changes speed, never results."""
  global _most_workers
  _most_workers = count


def count() -> int:
  """Number of devices that share a cohort; a CPU is one."""
  return 1 if jax.default_backend() == 'cpu' else len(jax.devices())


def num_shards() -> int:
  """The number of shards that a cohort is dealt into."""
  return CPU_SHARDS if jax.default_backend() == 'cpu' else count()


def everywhere() -> Sharding:
  """The sharding of an array that every device has a copy of."""
  if count() == 1:
    return SingleDeviceSharding(jax.devices()[0])
  return NamedSharding(_mesh(), PartitionSpec())


def copied(tree: Any) -> Any:
  """A tree of arrays, with a copy on every device."""
  return jax.device_put(tree, everywhere())


def kept_everywhere(tree: Any) -> Any:
  """The same within a jitted function: its outputs are sharded like its inputs,
  so that a second call compiles nothing."""
  return (
    tree
    if count() == 1
    else jax.lax.with_sharding_constraint(tree, everywhere())
  )


def deal(chunks: np.ndarray) -> np.ndarray:
  """Deals chunks out like cards, so that shards take equally long: neighbouring
  chunks have similar lengths.

  Args:
    chunks: [..., G, C] int32 clients, PADDING_CLIENT where none.

  Returns:
    [num_shards, ..., g, C]: each shard's chunks, including padding chunks.
  """
  n = num_shards()
  missing = -chunks.shape[-2] % n
  padded = np.pad(
    chunks,
    [(0, 0)] * (chunks.ndim - 2) + [(0, missing), (0, 0)],
    constant_values=PADDING_CLIENT,
  )
  dealt = padded.reshape(*chunks.shape[:-2], -1, n, chunks.shape[-1])
  return np.moveaxis(dealt, -2, 0)


def undealt(shards: list[Any], num_chunks: int) -> Any:
  """Results of the shards' chunks, restored to the order before `deal`.

  Args:
    shards: trees of arrays [g, …], as `run` returns them.
    num_chunks: G, without padding.

  Returns:
    A tree of NumPy arrays [G, …].
  """

  def join(*parts):
    whole = np.concatenate([np.asarray(part) for part in parts])
    dealt = whole.reshape(len(parts), -1, *whole.shape[1:])
    return np.moveaxis(dealt, 0, 1).reshape(whole.shape)[:num_chunks]

  return jax.tree.map(join, *shards)


def run(
  program: Callable[..., tuple[Any, Any]],
  static: tuple[Any, ...],
  shards: np.ndarray,
  *shared: Any,
  merge: Callable[..., Any] | None = None,
) -> tuple[Any, list[Any]]:
  """Calls `program(*static, shard, *shared)` for each shard.

  Args:
    program: jitted; (static…, chunks [..., g, C], *shared) -> (sums, a tree of
      arrays [..., g, …]).
    static: its hashable arguments.
    shards: [n, ..., g, C] from `deal`.
    *shared: trees of arrays that every shard reads.
    merge: jitted; (static…, sums, sums) -> sums; it may donate the first. None
      if there are no sums.

  Returns:
    (the sums, merged in the order of the shards whichever finishes first, so
    that the bits are the same; the arrays of each shard).
  """
  if count() > 1:
    return _merged(
      _run_on_mesh(program, static, shards, *shared), static, merge
    )
  compiling = threading.Lock()

  def run_one(shard):
    with compiling:  # the others find the program that the first one compiled
      result = program(*static, shard, *shared)
    return jax.block_until_ready(result)

  if len(shards) == 1:
    return _merged([run_one(shards[0])], static, merge)
  # A thread for each: what one thread has dispatched runs one after the other.
  with ThreadPoolExecutor(workers(), 'shard') as pool:
    return _merged(pool.map(run_one, shards), static, merge)


def _merged(
  results: Iterable[tuple[Any, Any]],
  static: tuple[Any, ...],
  merge: Callable[..., Any] | None,
) -> tuple[Any, list[Any]]:
  """Merges the shards' sums as they arrive, so that few are held at a time."""
  total, each = None, []
  for number, (sums, own) in enumerate(results):
    total = merge(*static, total, sums) if number and merge else sums
    each.append(own)
  return total, each


@partial(jit, static_argnums=(0, 1))
def _run_on_mesh(program, static, shards, *shared):
  def run_one(shard, *shared):
    # A jitted function with compiler options may not be called within another.
    result = program.__wrapped__(*static, shard[0], *shared)
    return jax.tree.map(lambda x: x[None], result)

  results = jax.shard_map(
    run_one,
    mesh=_mesh(),
    in_specs=(PartitionSpec(AXIS), *[PartitionSpec()] * len(shared)),
    out_specs=PartitionSpec(AXIS),
    check_vma=False,
  )(shards, *shared)
  return [jax.tree.map(lambda x: x[i], results) for i in range(len(shards))]


def _mesh() -> Mesh:
  return Mesh(np.array(jax.devices()), (AXIS,))
