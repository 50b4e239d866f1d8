"""Which devices simulate, and which clients each of them does.

Every device keeps a copy of the data and of the state, and takes its share of
the chunks of a cohort; what the chunks upload is summed over the devices. With
one device nothing of this is in the program. The cores of a CPU count as
devices where `jax_num_cpu_devices` says so (the binaries: `--cpu_devices`): a
local step is many small operations, which two cores share badly
(experiments/SPEED.md).
"""

from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding)

AXIS = 'devices'
PADDING_CLIENT = -1


def count() -> int:
  """Number of devices."""
  return len(jax.devices())


def everywhere() -> Sharding:
  """How an array lies that every device has a copy of."""
  if count() == 1:
    return SingleDeviceSharding(jax.devices()[0])
  return NamedSharding(_mesh(), PartitionSpec())


def copied(tree: Any) -> Any:
  """A tree of arrays, with a copy on every device."""
  return jax.device_put(tree, everywhere())


def kept_everywhere(tree: Any) -> Any:
  """The same within a jitted function: its outputs lie as its inputs did, so
  that a second call compiles nothing."""
  return tree if count() == 1 else jax.lax.with_sharding_constraint(
      tree, everywhere())


def run_chunks(run: Callable[..., tuple[Any, Any]], chunks: jax.Array,
               *shared: Any) -> tuple[Any, Any]:
  """Calls `run` with each device's share of the chunks, on that device.

  Args:
    run: (chunks [g, C], *shared) -> (sums, a tree of arrays [g, …]).
    chunks: [G, C] int32 clients, PADDING_CLIENT where none. They are dealt
      like cards: neighbours, which are of similar length, run side by side.
    *shared: trees of arrays that all devices need; what `run` closes over
      instead would belong to the mesh as a whole, and be refused.

  Returns:
    (the sums, added over the devices; the arrays [G, …] of all chunks).
  """
  if count() == 1:
    return run(chunks, *shared)
  padding = -len(chunks) % count()
  dealt = jnp.pad(chunks, ((0, padding), (0, 0)),
                  constant_values=PADDING_CLIENT)
  dealt = dealt.reshape(-1, count(), chunks.shape[1])

  def on_one(dealt, *shared):
    sums, each = run(dealt[:, 0], *shared)
    return jax.lax.psum(sums, AXIS), jax.tree.map(lambda x: x[:, None], each)

  mine = PartitionSpec(None, AXIS)
  sums, each = jax.shard_map(
      on_one, mesh=_mesh(),
      in_specs=(mine, *[PartitionSpec()] * len(shared)),
      out_specs=(PartitionSpec(), mine), check_vma=False)(dealt, *shared)
  return sums, jax.tree.map(
      lambda x: x.reshape(dealt.shape[0] * count(), *x.shape[2:])[:len(chunks)],
      each)


def _mesh() -> Mesh:
  return Mesh(np.array(jax.devices()), (AXIS,))
