"""Windows over ONE client's training sequence.

Both objectives cut windows the same way, from the end of the sequence. With
`last`, windows are one item apart and predict the next item; with
`all_positions`, they are L items apart and predict at each position. Either way
each positive is a target once per epoch. Axes: `B` windows, `L` window length,
`Q` targets of a window (1 or L).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedmmr_jax.config import AllPositions, ClientConfig, RunConfig
from fedmmr_jax.data.dataset import ClientData


class Batch(NamedTuple):
  """Windows of one local step.

  Attributes:
    windows: [B, L] int32, left-padded with 0.
    targets: [B, Q] int32 next items of the last Q positions.
    valid: [B, Q] bool, False at padding.
    position: [B, Q] int32 position of a target in the client's history.
    lateness: [B, Q] float32 position of a target in the training sequence, from
      0 at its start to 1 at its end; meaningless at padding.
    weight: [B, Q] float32 of each target in the loss; None if all are alike.
    profile: [B, D] profile of the items outside each window (`profile.py`);
      None without `--profile=history`.
  """

  windows: jax.Array
  targets: jax.Array
  valid: jax.Array
  position: jax.Array
  lateness: jax.Array
  weight: jax.Array | None = None
  profile: jax.Array | None = None


def window_stride(config: ClientConfig, max_seq_len: int) -> int:
  """Distance between window ends: each target belongs to one window."""
  return max_seq_len if isinstance(config.objective, AllPositions) else 1


def num_windows(num_train, stride: int):
  """Windows of an epoch; works on ints, NumPy and traced arrays.

  The first item has no history, so n items give n − 1 positives.
  """
  positives = num_train - 1
  return (positives + stride - 1) // stride * (positives > 0)


def targets_of_step(config: RunConfig) -> int:
  """T, target positions of one step."""
  return config.client.batch_size * window_stride(
    config.client, config.model.max_seq_len
  )


def num_steps(num_train, config: RunConfig):
  """Local steps of one epoch; works on ints, NumPy and traced arrays."""
  stride = window_stride(config.client, config.model.max_seq_len)
  batch_size = config.client.batch_size
  steps = (num_windows(num_train, stride) + batch_size - 1) // batch_size
  limit = config.client.max_local_steps
  return _at_most(steps, limit) if limit else steps


def num_positives(num_train, config: RunConfig):
  """Positives of one epoch: all items but the first, or (an upper bound on)
  those within `--max_local_steps`; works on NumPy and traced arrays."""
  positives = (num_train - 1) * (num_train > 0)
  limit = config.client.max_local_steps * targets_of_step(config)
  return _at_most(positives, limit) if limit else positives


def _at_most(value, limit: int):
  return value + (limit - value) * (value > limit)


def cut_windows(
  client: ClientData,
  index: jax.Array,
  present: jax.Array,
  stride: int,
  max_seq_len: int,
) -> Batch:
  """The windows with given numbers; window 0 ends at the latest positive.

  They are counted from the end, so that only the earliest window is short and
  the position embeddings are used as they will be at evaluation.

  Args:
    client: its data.
    index: [B] int32 window numbers.
    present: [B] bool, False for padding windows.
    stride: see `window_stride`.
    max_seq_len: L.
  """
  end = client.num_train - 1 - index * stride  # position of the last target
  offset = jnp.arange(-max_seq_len, 1)
  position = end[:, None] + offset  # [B, L + 1]: the window and one more
  inside = (position >= 0) & present[:, None]
  items = jnp.where(inside, client.history[position], 0)
  # As many targets as the window moves on: Q = stride.
  return Batch(
    windows=items[:, :-1],
    targets=items[:, -stride:],
    # A target needs an item before it.
    valid=inside[:, -stride - 1 : -1],
    position=position[:, -stride:],
    lateness=((position[:, -stride:] + 0.5) / jnp.maximum(client.num_train, 1)),
    weight=client.weights[position[:, -stride:]]
    if len(client.weights)
    else None,
  )
