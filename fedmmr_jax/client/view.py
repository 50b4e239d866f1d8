"""What a client's experts may see of its memory (docs/model.md, "What an expert
may see").

With the memory's `sees=past`:

* a candidate never meets its own entry: "it is in my memory" tells a client's
  positives from its negatives, and says nothing of what comes next;
* in training a target meets only what its client consumed before it, and a
  negative what was consumed before one of the step's targets. So both meet
  equally much, and an expert still runs once per candidate, not once per
  target and candidate. (Entries are retrieved first: later items may have taken
  the slots of earlier ones, and leave a target fewer to meet, never others);
* a client is asked with a memory that holds what it consumed since its last
  training, or, if it never trained, its last items (`up_to_date`).

With `sees=stored` a candidate meets whatever is stored, as in the original.

Axes: `T` targets of a step, `N` negatives, `J` candidates, `R` retrieved
entries, `H` longest history.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedmmr_jax.client import memory as memory_lib
from fedmmr_jax.client.memory import Memory
from fedmmr_jax.client.prototypes import Prototypes
from fedmmr_jax.client.windows import Batch
from fedmmr_jax.config import MemoryRule
from fedmmr_jax.models.experts import MemoryView, TEXT
from fedmmr_jax.models.feddmmr import Catalogue, FedDMMR


class Asked(NamedTuple):
  """What the experts are asked about.

  Attributes:
    item: [J] int32 catalogue ids of the candidates.
    position: [J] int32 position in the client's history at which each is asked
      about; None = behind everything that the memory holds.
  """

  item: jax.Array
  position: jax.Array | None = None


def asked_in_training(batch: Batch, negative: jax.Array) -> Asked:
  """The candidates of a step, in the order in which they are scored.

  Args:
    batch: windows and targets, [B, Q] with T = B·Q.
    negative: [N] int32 shared by all targets, or [T, N].
  """
  target, position = batch.targets.reshape(-1), batch.position.reshape(-1)
  if negative.ndim == 2:  # each target and its own, J = T·(1 + N)
    item = jnp.concatenate([target[:, None], negative], axis=1)
    return Asked(item.reshape(-1), jnp.repeat(position, item.shape[1], axis=0))
  # J = T + N. The negatives are dealt evenly to the targets there are.
  valid = batch.valid.reshape(-1)
  present_first = jnp.argsort(~valid, stable=True)
  dealt = jnp.arange(len(negative)) * jnp.sum(valid) // len(negative)
  return Asked(
    jnp.concatenate([target, negative]),
    jnp.concatenate([position, position[present_first[dealt]]]),
  )


def meets(
  entries: jax.Array, asked: Asked, history: jax.Array, rule: MemoryRule
) -> jax.Array:
  """[R, J] bool, or [R, 1] if it is the same for all: which retrieved entries
  each candidate may meet; empty slots are left to the caller.

  Args:
    entries: [R] int32 items of the retrieved entries.
    asked: the candidates.
    history: [H] int32 the client's items in time order; read only if
      `asked.position` is given.
    rule: whose `sees` decides.
  """
  if rule.sees == 'stored':
    return jnp.ones((len(entries), 1), bool)
  met = entries[:, None] != asked.item
  if asked.position is None:
    return met
  # Consumed twice, it was known from the first time on.
  first = jnp.argmax(history == entries[:, None], axis=1)
  return met & (first[:, None] < asked.position)


def view(
  model: FedDMMR,
  memory: Memory | None,
  catalogue: Catalogue,
  prototypes: Prototypes | None,
  asked: Asked,
  history: jax.Array,
  rule: MemoryRule,
) -> MemoryView | None:
  """What one client's experts may attend to; None without experts.

  Args:
    model: the architecture.
    memory: the client's; None in a model without experts.
    catalogue: features of all items.
    prototypes: what all clients' memories have in common, which every candidate
      may meet, or None.
    asked: the candidates.
    history: see `meets`.
    rule: how memories work.
  """
  if memory is None:
    return None
  entries = memory_lib.retrieve(memory, rule)
  met = meets(entries, asked, history, rule)
  if prototypes is None:
    return model.view_memory(catalogue, entries, met=met)
  return model.view_memory(
    catalogue, entries, prototypes.centre, prototypes.size > 0, met
  )


def up_to_date(
  memory: Memory,
  history: jax.Array,
  num_train: jax.Array,
  now: jax.Array,
  catalogue: Catalogue,
  rule: MemoryRule,
) -> Memory:
  """A memory that holds everything its client consumed before a question.

  What came since the client trained is written to it, and to an empty one all
  of the history, as far as there are slots. No training step has measured the
  surprise of such items, so that they are stored whatever it may be.

  Args:
    memory: as training left it.
    history: [H] int32 the client's items in time order.
    num_train: [] int32 how many of them it trains on.
    now: [] int32 how many of them lie before the question.
    catalogue: features of all items.
    rule: how memories work; with `sees=stored` nothing is written.
  """
  if rule.sees == 'stored':
    return memory
  position = now - rule.num_slots + jnp.arange(rule.num_slots)
  since = jnp.where(memory.clock > 0, num_train, 0)
  return memory_lib.update_all(
    memory,
    history.at[position].get(mode='clip'),
    jnp.full(position.shape, rule.least_surprise, jnp.float32),
    position >= since,
    catalogue.features.get(TEXT),
    rule,
  )
