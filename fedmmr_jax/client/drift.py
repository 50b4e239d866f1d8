"""Drift control: methods against client drift during local steps.

A method is one frozen dataclass of pure functions. It defines what a client
keeps between rounds, what the server sends besides the parameters, how local
steps change, what a client uploads, and how the server uses the uploads. A
method of your own derives from `DriftControl` and overrides what it needs
(docs/extending.md, `examples/feddyn.py`).

All state has the structure of the parameters. A client with a local vocabulary
works on some rows of the item table: `transform` gets the sent and the kept
state cut to these rows; `finish` gets both whole, see `LocalResult`.
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
  """The result of a client's local steps.

  Attributes:
    delta: local minus server parameters, of the client's rows.
    kept: the client's state from its last round, for the whole catalogue.
    mean_gradient: over the local steps, for the client's rows; None unless the
      method `needs_gradient`.
    trained: [] bool, whether there was a step.
    whole: maps a tree of the client's rows to one of the whole catalogue, zero
      for items that the client did not touch.
  """

  delta: Params
  kept: Tree
  mean_gradient: Params | None
  trained: jax.Array
  whole: Callable[[Tree], Tree]


class Cohort(NamedTuple):
  """The clients behind a server step; all fields are [] float32.

  Attributes:
    weight: Σ positives of the cohort.
    all_weight: Σ positives of all clients, sampled or not.
    size: number of clients in the cohort.
    all_size: number of all clients.
  """

  weight: jax.Array
  all_weight: jax.Array
  size: jax.Array
  all_size: jax.Array


@dataclasses.dataclass(frozen=True)
class DriftControl:
  """No drift control; the base class of every method.

  Attributes:
    needs_gradient: whether the local steps record their mean gradient.
    makes_step: whether `transform` replaces the local optimizer's direction
      (Adam) instead of only changing the gradient that goes into it.
  """

  needs_gradient = False
  makes_step = False

  def client_state(self, params: Params) -> Tree:
    """A client's state before its first round; None for none."""
    return None

  def server_state(self, params: Params) -> Tree:
    """The server's state before round 1; None for none."""
    return None

  def broadcast(self, state: Tree, opt_state: optax.OptState) -> Tree:
    """What a client is sent besides the parameters.

    Args:
      state: the server's state.
      opt_state: state of the server optimizer.
    """
    return state

  def transform(
    self, sent: Tree, kept: Tree
  ) -> optax.GradientTransformation | None:
    """A link in the local optimizer's chain, after weight decay.

    Args:
      sent: `broadcast`, cut to the client's rows.
      kept: the client's state, cut to its rows.
    """
    return None

  def no_upload(self, params: Params) -> Tree:
    """The upload summed over no clients: zeros with the structure of `params`
    if `finish` uploads something, else None."""
    return None

  def finish(self, result: LocalResult) -> tuple[Tree, Tree]:
    """(the client's state for its next round, its upload); the upload covers
    the client's rows or the whole catalogue."""
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
      state: the server's state.
      uploaded: Σ weight · upload over the cohort; None without uploads.
      cohort: its weights and sizes.
      delta: the cohort's mean delta.
      optimizer: the server optimizer, at this round.

    Returns:
      (updates to add to the parameters, state of the optimizer, the server's
      next state).
    """
    return *optimizer.step(delta), state


class ServerOptimizer(NamedTuple):
  """The server optimizer at one round.

  Attributes:
    config: which optimizer, and its learning rates.
    params: the server's parameters.
    opt_state: its state.
    round: [] int32 finished rounds.
  """

  config: RunConfig
  params: Params
  opt_state: optax.OptState
  round: jax.Array

  def step(self, delta: Params) -> tuple[Params, optax.OptState]:
    """(updates to add to the parameters, next state) for a mean delta."""
    return optimizers.server_step(
      self.config, self.params, self.opt_state, delta, self.round
    )

  def learn(self, gradient: Params) -> optax.OptState:
    """The state after a gradient, without taking its step."""
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
  SGD steps; it is zero for items that the client did not touch. The server's c
  remains the weighted mean over all clients.
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
  federated learning", NeurIPS: the local steps use the server optimizer, with
  its moments frozen at the start of the round.

  The moments are updated with the clients' mean gradient along the local path
  (the authors use an extra pass at the server's parameters). The server adds
  the mean delta times its learning rate.

  Attributes:
    server: the server's configuration, whose optimizer is used.
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
  """Sum and number of the gradients that passed; see `mean`."""

  total: Params
  count: jax.Array  # type: ignore[assignment]  # a tuple has a method count

  def mean(self) -> Params:
    """Mean of the gradients; zeros if there was none."""
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
    UserError: there is no method of that name, or it has no such option.
  """
  method = parts.built(
    config.client.drift_control, DRIFT_CONTROLS, DriftControl, 'drift control'
  )
  if isinstance(method, MimeLite):
    return dataclasses.replace(method, server=config.server)
  return method
