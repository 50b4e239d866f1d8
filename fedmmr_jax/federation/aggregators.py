"""Aggregators: what becomes of the updates of a cohort.

An aggregator is a frozen dataclass with pure functions. A chunk's updates are
added to a running total, on several cores or devices at once (`zero`, `add`);
the totals are merged, and `finish` makes of them the delta that the server
optimizer gets. What has to be seen client by client (a median) is collected
instead: `collect`. One of your own derives from `Aggregator` or from one that
is here (docs/extending.md, `examples/clipped.py`).
"""

import dataclasses
from typing import Any, NamedTuple

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
  """What every aggregator has; `zero`, `add` and `finish` must be given."""

  def init(self, params: Params) -> Tree:
    """What the aggregator keeps between rounds, before round 1; None =
    nothing."""
    return None

  def zero(self, params: Params) -> Tree:
    """The total of nobody."""
    raise NotImplementedError

  def add(self, total: Tree, updates: ClientUpdate) -> Tree:
    """`total` and the updates of a chunk's clients, [C, …].

    Padding clients are among them, with weight 0.
    """
    raise NotImplementedError

  def merge(self, one: Tree, other: Tree) -> Tree:
    """The total of two totals."""
    return jax.tree.map(jnp.add, one, other)

  def collect(self, updates: ClientUpdate) -> Tree:
    """What of a chunk's clients, [C, …], is kept one by one for `finish`; takes
    memory for the whole cohort. None = nothing."""
    return None

  def finish(
    self, total: Tree, collected: Tree, state: Tree, params: Params
  ) -> tuple[Params, Tree]:
    """(delta for the server optimizer, what is kept for the next round).

    Args:
      total: of the cohort; of nobody, it has to give a delta of zero.
      collected: what `collect` gave, [cohort, …], padding clients included.
      state: what the aggregator keeps.
      params: the server's parameters.
    """
    raise NotImplementedError


def add_weighted(
  total: Params,
  weights: jax.Array,
  updates: ClientUpdate,
  tree: Params | None = None,
) -> Params:
  """`total` + Σ_c weight_c · delta_c, each item row where it belongs.

  Args:
    total: of the whole catalogue.
    weights: [C] float32.
    updates: of a chunk, [C, …].
    tree: another tree of the clients' rows than their deltas.
  """
  return vocabulary.add_weighted(
    total,
    weights,
    updates.vocabulary.ids,
    updates.delta if tree is None else tree,
  )


class WeightedSum(NamedTuple):
  """Running total of FedAvg and its like.

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
    """[C] float32 by which the deltas of a chunk's clients are summed."""
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
  local steps, and their mean goes as far as the cohort's mean local update,
  τ_eff steps."""

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
    UserError: there is none of that name, or an option is none of its own.
  """
  return parts.built(
    config.server.aggregator, AGGREGATORS, Aggregator, 'aggregator'
  )
