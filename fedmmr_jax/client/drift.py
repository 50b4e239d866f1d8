"""Drift control: what keeps the local steps of clients from drifting apart.

A method is a frozen dataclass with pure functions, whole in one class: what a
client keeps between rounds, what it is sent beside the parameters, how its
local steps change, what it uploads, and what the server makes of it. A method
of your own derives from `DriftControl` and overrides what it needs
(docs/extending.md, `examples/feddyn.py`).

All state has the parameters' structure. A client with a local vocabulary works
on some rows of the item table: `transform` gets what is sent and kept cut to
them; `finish` gets the whole of it, see `LocalResult`.
"""

import dataclasses
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedmmr_jax import optimizers, parts
from fedmmr_jax.config import RunConfig, ServerConfig

Params = Any
Tree = Any  # of arrays; None = nothing


class LocalResult(NamedTuple):
  """What a client has after its local steps.

  Attributes:
    delta: local minus server parameters, of the client's rows.
    kept: what the client kept from its last round, of the whole catalogue.
    mean_gradient: of the local steps, of the client's rows; None unless the
      method `needs_gradient`.
    trained: [] bool, was there a step?
    whole: (tree of the client's rows) -> the same of the whole catalogue, zero
      for items that the client did not touch.
  """

  delta: Params
  kept: Tree
  mean_gradient: Params | None
  trained: jax.Array
  whole: Callable[[Tree], Tree]


class Cohort(NamedTuple):
  """Whom a server step is of; [] float32 each.

  Attributes:
    weight: Σ positives of the cohort.
    all_weight: Σ positives of all clients, sampled or not.
    size: clients of the cohort.
    all_size: all clients.
  """

  weight: jax.Array
  all_weight: jax.Array
  size: jax.Array
  all_size: jax.Array


@dataclasses.dataclass(frozen=True)
class DriftControl:
  """No drift control, and what every method may override.

  Attributes:
    needs_gradient: should the local steps record their mean gradient?
    makes_step: does `transform` take the place of the local optimizer's
      direction (Adam), not only change the gradient that it gets?
  """

  needs_gradient = False
  makes_step = False

  def client_state(self, params: Params) -> Tree:
    """What a client keeps before its first round; None = nothing."""
    return None

  def server_state(self, params: Params) -> Tree:
    """What the server keeps before round 1; None = nothing."""
    return None

  def broadcast(self, state: Tree, opt_state: optax.OptState) -> Tree:
    """What a client is sent beside the parameters.

    Args:
      state: what the server keeps.
      opt_state: of the server optimizer.
    """
    return state

  def transform(
    self, sent: Tree, kept: Tree
  ) -> optax.GradientTransformation | None:
    """A link in the chain of the local optimizer, behind weight decay.

    Args:
      sent: `broadcast`, of the client's rows.
      kept: what the client keeps, of its rows.
    """
    return None

  def no_upload(self, params: Params) -> Tree:
    """The upload of nobody: zeros of the structure of `params` where `finish`
    uploads something, else None."""
    return None

  def finish(self, result: LocalResult) -> tuple[Tree, Tree]:
    """(what the client keeps for its next round, what it uploads): the latter
    of the client's rows or of the whole catalogue."""
    return result.kept, None

  def server_step(
    self,
    state: Tree,
    uploaded: Tree,
    cohort: Cohort,
    delta: Params,
    optimizer: 'ServerOptimizer',
  ) -> tuple[Params, optax.OptState, Tree]:
    """The server's step.

    Args:
      state: what the server keeps.
      uploaded: Σ weight · upload over the cohort; None where nothing is.
      cohort: whom it is of.
      delta: the cohort's mean delta.
      optimizer: the server optimizer, at this round.

    Returns:
      (updates to add to the parameters, state of the optimizer, what the
      server keeps).
    """
    return *optimizer.step(delta), state


class ServerOptimizer(NamedTuple):
  """The server optimizer at one round.

  Attributes:
    config: which, and its learning rates.
    params: the server's parameters.
    opt_state: its state.
    round: [] int32 finished rounds.
  """

  config: RunConfig
  params: Params
  opt_state: optax.OptState
  round: jax.Array

  def step(self, delta: Params) -> tuple[Params, optax.OptState]:
    """(updates to add to the parameters, next state) of a mean delta."""
    return optimizers.server_step(
      self.config, self.params, self.opt_state, delta, self.round
    )

  def learn(self, gradient: Params) -> optax.OptState:
    """The state after a gradient whose step is not made."""
    return optimizers.server_direction(self.config.server).update(
      gradient, self.opt_state, self.params
    )[1]

  def learning_rate(self) -> jax.Array:
    """[] float32 of this round."""
    return optimizers.server_learning_rate(self.config, self.round)


@dataclasses.dataclass(frozen=True)
class FedProx(DriftControl):
  """Li et al. 2020, "Federated optimization in heterogeneous networks", MLSys:
  μ (w − w_server) is added to the local gradient.

  Attributes:
    mu: μ.
  """

  mu: float = dataclasses.field(metadata={'minimum': 0.0})

  def transform(self, sent, kept):
    def update(gradient, anchor, params):
      pulled = jax.tree.map(
        lambda g, w, w0: g + self.mu * (w - w0), gradient, params, anchor
      )
      return pulled, anchor

    return optax.GradientTransformation(lambda params: params, update)


@dataclasses.dataclass(frozen=True)
class Scaffold(DriftControl):
  """Karimireddy et al. 2020, "SCAFFOLD: Stochastic controlled averaging for
  federated learning", ICML: c − c_i is added to the local gradient, the
  server's control variate minus the client's own.

  Option II: c_i⁺ = c_i − c + (x − y)/(S η) is the mean gradient of the S local
  SGD steps; of items that the client did not touch it is zero. The server's c
  stays the weighted mean of all clients'.
  """

  needs_gradient = True

  def client_state(self, params):
    return jax.tree.map(jnp.zeros_like, params)

  def server_state(self, params):
    return jax.tree.map(jnp.zeros_like, params)

  def no_upload(self, params):
    return jax.tree.map(jnp.zeros_like, params)

  def transform(self, sent, kept):
    correction = jax.tree.map(jnp.subtract, sent, kept)

    def update(gradient, correction, params=None):
      del params
      return jax.tree.map(jnp.add, gradient, correction), correction

    return optax.GradientTransformation(lambda params: correction, update)

  def finish(self, result):
    gradient = result.whole(result.mean_gradient)
    kept = jax.tree.map(
      lambda new, old: jnp.where(result.trained, new, old),
      gradient,
      result.kept,
    )
    return kept, optax.tree.sub(kept, result.kept)

  def server_step(self, state, uploaded, cohort, delta, optimizer):
    total = jnp.where(cohort.all_weight > 0, cohort.all_weight, 1.0)
    state = jax.tree.map(lambda c, change: c + change / total, state, uploaded)
    return *optimizer.step(delta), state


@dataclasses.dataclass(frozen=True)
class MimeLite(DriftControl):
  """Karimireddy et al. 2021, "Breaking the centralized barrier for cross-device
  federated learning", NeurIPS: the server optimizer, its moments held where
  they were at the start of the round, makes the local steps.

  The moments learn from the clients' mean gradient along the local path (the
  authors take another pass, at the server's parameters); the server adds the
  mean delta times its learning rate.

  Attributes:
    server: whose optimizer it is.
  """

  needs_gradient = True
  makes_step = True
  server: ServerConfig = ServerConfig()

  def broadcast(self, state, opt_state):
    return opt_state

  def no_upload(self, params):
    return jax.tree.map(jnp.zeros_like, params)

  def transform(self, sent, kept):
    direction = optimizers.server_direction(self.server)

    def update(gradient, moments, params=None):
      return direction.update(gradient, moments, params)[0], moments

    return optax.GradientTransformation(lambda params: sent, update)

  def finish(self, result):
    return None, result.mean_gradient

  def server_step(self, state, uploaded, cohort, delta, optimizer):
    weight = jnp.where(cohort.weight > 0, cohort.weight, 1.0)
    opt_state = optimizer.learn(jax.tree.map(lambda x: x / weight, uploaded))
    rate = optimizer.learning_rate()
    return jax.tree.map(lambda d: rate * d, delta), opt_state, state


class MeanGradient(NamedTuple):
  """Sum of the gradients that passed, and how many; see `mean`."""

  total: Params
  count: jax.Array  # type: ignore[assignment]  # a tuple has a method count

  def mean(self) -> Params:
    """Their mean; zeros if there was none."""
    return jax.tree.map(lambda g: g / jnp.maximum(self.count, 1), self.total)


def record_gradient() -> optax.GradientTransformation:
  """Passes gradients on and keeps their sum (`MeanGradient`)."""

  def init(params):
    return MeanGradient(jax.tree.map(jnp.zeros_like, params), jnp.float32(0))

  def update(gradient, state, params=None):
    del params
    total = jax.tree.map(jnp.add, state.total, gradient)
    return gradient, MeanGradient(total, state.count + 1)

  return optax.GradientTransformation(init, update)


DRIFT_CONTROLS: dict[str, type[DriftControl]] = {
  'none': DriftControl,
  'fedprox': FedProx,
  'scaffold': Scaffold,
  'mime_lite': MimeLite,
}


def of(config: RunConfig) -> DriftControl:
  """The method that a config names.

  Raises:
    UserError: there is none of that name, or an option is none of its own.
  """
  method = parts.built(
    config.client.drift_control, DRIFT_CONTROLS, DriftControl, 'drift control'
  )
  if isinstance(method, MimeLite):
    return dataclasses.replace(method, server=config.server)
  return method
