"""Which transforms an update passes, in their order.

The client trains, attacks or fails, and compresses; the server rejects and
clips. So the bound that the server relies on is the last thing to happen before
the sum.
"""

from fedmmr_jax.config import RunConfig
from fedmmr_jax.federation import attacks, compression, failures, rejection
from fedmmr_jax.federation.privacy import Plan
from fedmmr_jax.federation.transforms import Transforms, UpdateTransform

NOTHING = UpdateTransform()


def of(config: RunConfig, private: Plan | None = None) -> Transforms:
  """The transforms that a config asks for, in the order in which an update
  meets them.

  Args:
    config: settings.
    private: its privacy.

  Raises:
    UserError: there is no part of that name, or it has no such option.
  """
  found = [
    attacks.of(config),
    failures.corruption(config),
    compression.of(config),
    rejection.of(config),
  ]
  if private:
    found.append(private.transform())
  return tuple(transform for transform in found if transform != NOTHING)
