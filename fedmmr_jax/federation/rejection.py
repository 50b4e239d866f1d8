"""What the server takes out before the sum: updates that cannot be meant.

One client with a NaN would end the training of all others. So each update is
looked at before anything is added up, and one that is NaN, infinite or absurdly
long is left out with all that came with it: delta, weight, control variate,
prototypes and metrics. It is counted by reason.

Absurd is an update longer than all parameters of the server together, several
times over. What the server compares with are its own parameters, so one client
cannot move the bound by what it sends, and it says nothing about the other
clients (differential privacy needs that). A bound that follows the clients'
usual norms is the business of a robust aggregator or of clipping.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax import parts
from fedmmr_jax.client.update import ClientUpdate
from fedmmr_jax.config import RunConfig
from fedmmr_jax.federation.transforms import UpdateTransform


def faults(update: ClientUpdate, longest: jax.Array | None) -> dict[str, Any]:
  """Why the server does not want an update: name of the metric -> [] bool, one
  of them at most.

  Args:
    update: of one client.
    longest: [] float32 norm that its delta may have; None = any.
  """
  squares = optax.tree.norm(update.delta, squared=True)
  others = jax.tree.leaves(update.sent() | {'delta': None})
  # A sum of squares beyond float32 is no length either.
  finite = jnp.isfinite(squares) & jnp.all(
    jnp.stack([jnp.all(jnp.isfinite(x)) for x in others])
  )
  formed = (update.weight >= 0) & (update.steps >= 1)
  long = jnp.zeros((), bool) if longest is None else squares > longest**2
  return {
    metrics_lib.NOT_FINITE: ~finite,
    metrics_lib.MALFORMED: finite & ~formed,
    metrics_lib.TOO_LONG: finite & formed & long,
  }


@dataclasses.dataclass(frozen=True)
class Absurd(UpdateTransform):
  """Takes out updates that are NaN or infinite, have a negative weight, or are
  longer than `times` the norm of the server's parameters.

  Attributes:
    times: 0 = of any length.
  """

  times: float = dataclasses.field(default=10.0, metadata={'minimum': 0.0})

  def broadcast(self, state, params):
    """[] float32, the longest norm; None for any."""
    return self.times * optax.tree.norm(params) if self.times else None

  def no_metrics(self):
    return dict.fromkeys(metrics_lib.REJECTED, metrics_lib.EMPTY)

  def apply(self, update, kept, sender):
    there = (sender.client >= 0) & update.counts
    found = {
      name: there & fault for name, fault in faults(update, sender.told).items()
    }
    update = update.without(jnp.any(jnp.stack(list(found.values()))))
    counted = {name: metrics_lib.count(x) for name, x in found.items()}
    return update._replace(metrics=update.metrics | counted), kept


REJECTIONS: dict[str, type[UpdateTransform]] = {
  'absurd': Absurd,
  'none': UpdateTransform,
}


def of(config: RunConfig) -> UpdateTransform:
  """The rejection that a config names.

  Raises:
    UserError: there is none of that name, or it has no such option.
  """
  return parts.built(
    config.federation.rejection, REJECTIONS, UpdateTransform, 'rejection'
  )
