"""Aggregators: how the updates of a cohort are combined.

An aggregator is a frozen dataclass of pure functions. The updates of each chunk
are added to a running total, on several cores or devices at once (`zero`,
`add`). The totals are merged, and `finish` turns them into the delta for the
server optimizer. An aggregator that needs the individual updates (a median)
collects them instead (`collect`). Your own aggregator derives from `Aggregator`
or from one defined here (docs/extending.md, `examples/clipped.py`).
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from fedmmr_jax import parts
from fedmmr_jax.client import vocabulary
from fedmmr_jax.client.update import ClientUpdate
from fedmmr_jax.config import RunConfig

Params = Any
Tree = Any  # of arrays; None = nothing


@dataclasses.dataclass(frozen=True)
class Aggregator:
  """Base class; subclasses must define `zero`, `add` and `finish`.

  Attributes:
    always_steps: whether the server takes a step even if nobody trained, as it
      must where noise hides who did.
  """

  always_steps: ClassVar[bool] = False

  def init(self, params: Params, key: jax.Array) -> Tree:
    """The aggregator's state before round 1; None for none. One that draws
    random numbers keeps a key made of `key`, which others use too."""
    return None

  def zero(self, params: Params) -> Tree:
    """The total over no clients."""
    raise NotImplementedError

  def add(self, total: Tree, updates: ClientUpdate) -> Tree:
    """`total` plus the updates of a chunk's clients, [C, …].

    They include padding clients, with weight 0.
    """
    raise NotImplementedError

  def merge(self, one: Tree, other: Tree) -> Tree:
    """The sum of two totals."""
    return jax.tree.map(jnp.add, one, other)

  def collect(self, updates: ClientUpdate) -> Tree:
    """What `finish` needs from each client of a chunk, [C, …]; takes memory for
    the whole cohort. None for nothing."""
    return None

  def finish(
    self, total: Tree, collected: Tree, state: Tree, params: Params
  ) -> tuple[Params, Tree]:
    """(delta for the server optimizer, state for the next round).

    Args:
      total: of the cohort; the total over no clients must give a delta of zero.
      collected: what `collect` gave, [cohort, …], including padding clients.
      state: the aggregator's state.
      params: the server's parameters.
    """
    raise NotImplementedError


def add_weighted(
  total: Params,
  weights: jax.Array,
  updates: ClientUpdate,
  tree: Params | None = None,
) -> Params:
  """`total` + Σ_c weight_c · delta_c, with each item row at its place.

  Args:
    total: for the whole catalogue.
    weights: [C] float32.
    updates: of a chunk, [C, …].
    tree: a tree of the clients' rows to add instead of their deltas.
  """
  return vocabulary.add_weighted(
    total,
    weights,
    updates.vocabulary.ids,
    updates.delta if tree is None else tree,
  )


class WeightedSum(NamedTuple):
  """Running total of FedAvg and its variants.

  Attributes:
    delta: Σ weight · delta; with FedNova Σ weight · delta / steps.
    weight: [] float32 Σ weight.
    steps: [] float32 Σ weight · steps.
  """

  delta: Params
  weight: jax.Array
  steps: jax.Array


@dataclasses.dataclass(frozen=True)
class FedAvg(Aggregator):
  """McMahan et al. 2017, "Communication-efficient learning of deep networks
  from decentralized data", AISTATS: the mean of the deltas, weighted by the
  clients' positives."""

  def zero(self, params):
    return WeightedSum(
      jax.tree.map(jnp.zeros_like, params), jnp.zeros(()), jnp.zeros(())
    )

  def delta_weight(self, updates: ClientUpdate) -> jax.Array:
    """[C] float32 weights of the deltas of a chunk's clients in the sum."""
    return updates.weight

  def add(self, total, updates):
    weight = updates.weight
    return WeightedSum(
      add_weighted(total.delta, self.delta_weight(updates), updates),
      total.weight + jnp.sum(weight),
      total.steps + jnp.sum(weight * updates.steps),
    )

  def finish(self, total, collected, state, params):
    divisor = jnp.where(total.weight > 0, total.weight, 1.0)
    return jax.tree.map(lambda x: x / divisor, total.delta), state


@dataclasses.dataclass(frozen=True)
class FedNova(FedAvg):
  """Wang et al. 2020, "Tackling the objective inconsistency problem in
  heterogeneous federated optimization", NeurIPS: each delta is divided by its
  number of local steps, and their mean is scaled to the cohort's mean number of
  local steps, τ_eff."""

  def delta_weight(self, updates):
    return updates.weight / updates.steps

  def finish(self, total, collected, state, params):
    delta, state = super().finish(total, collected, state, params)
    divisor = jnp.where(total.weight > 0, total.weight, 1.0)
    return jax.tree.map(lambda x: x * (total.steps / divisor), delta), state


AGGREGATORS: dict[str, type[Aggregator]] = {
  'fedavg': FedAvg,
  'fednova': FedNova,
}


def of(config: RunConfig) -> Aggregator:
  """The aggregator that a config names.

  Raises:
    UserError: there is no aggregator of that name, or it has no such option.
  """
  from fedmmr_jax.federation import robust  # pylint: disable=g-import-not-at-top

  return parts.built(
    config.server.aggregator,
    AGGREGATORS | robust.ROBUST,  # it builds on this module
    Aggregator,
    'aggregator',
  )
