"""What happens to a client's update between its data and the server's sum.

An update passes a row of transforms, each in a single class: an attack or a
failure (simulated), compression, and what the server does with each update
before it adds it up: rejection, clipping. A transform is a frozen dataclass of
pure functions for ONE client, vmapped with the local update. `uplink.of` puts
them in the order in which an update meets them.

A transform may change the client's data before it trains (`prepare`) and its
update afterwards (`apply`). It may keep something with each client
(`client_state`) and with the server (`server_state`), which each client is
told. What the server learns from a cohort is the transform's metrics, summed
like those of training (`no_metrics`, `server_step`).
"""

import dataclasses
import zlib
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax.client.update import ClientUpdate
from fedmmr_jax.data.dataset import ClientData, Dataset
from fedmmr_jax.metrics import Mean
from fedmmr_jax.models.feddmmr import Catalogue

Params = Any
Tree = Any  # of arrays; None = nothing
# The local update folds epochs into the same key; no epoch is so late.
_FIRST_STREAM = 1 << 30


class Sender(NamedTuple):
  """The client whose update a transform gets.

  Attributes:
    client: [] int32; PADDING_CLIENT for none.
    key: of this client, round and transform.
    params: what the server sent.
    told: what the transform's `broadcast` gave.
    catalogue: features of all items, which are public.
    fate: what is done to its update (`failures.Fate`); None if nobody fails.
  """

  client: jax.Array
  key: jax.Array
  params: Params
  told: Tree
  catalogue: Catalogue | None = None
  fate: Any = None


@dataclasses.dataclass(frozen=True)
class UpdateTransform:
  """Changes nothing; the base class of every transform.

  Attributes:
    hides_metrics: whether a round's metrics must not leave the server.
  """

  hides_metrics: ClassVar[bool] = False

  def fitted(self, dataset: Dataset) -> 'UpdateTransform':
    """The same for a data set, before round 1.

    Raises:
      UserError: it cannot be had with this data.
    """
    return self

  def client_state(
    self, params: Params, key: jax.Array, num_clients: int
  ) -> Tree:
    """What all clients keep before round 1, [K, …]; None for nothing."""
    return None

  def server_state(self, params: Params) -> Tree:
    """What the server keeps before round 1; None for nothing."""
    return None

  def broadcast(self, state: Tree, params: Params) -> Tree:
    """What each client of a round is told.

    Args:
      state: the server's.
      params: what the server sends.
    """
    return state

  def check(self, params: Params, num_clients: int) -> None:
    """Raises UserError if it does not fit.

    Args:
      params: of the server, or a tree with the same shapes.
      num_clients: K.
    """

  def send(self, params: Params) -> Params:
    """What the clients receive for the server's parameters."""
    return params

  def no_metrics(self) -> dict[str, Mean]:
    """The neutral elements of the metrics that `apply` adds."""
    return {}

  def prepare(self, data: ClientData, kept: Tree, sender: Sender) -> ClientData:
    """The data that the client trains on; it may not become longer."""
    return data

  def apply(
    self, update: ClientUpdate, kept: Tree, sender: Sender
  ) -> tuple[ClientUpdate, Tree]:
    """(the update as it goes on, what the client keeps).

    Args:
      update: of one client; of a padding client with weight 0. Its metrics get
        those of `no_metrics`. `ClientUpdate.without` takes it out of the round.
      kept: the client's state.
      sender: the client, its key, and what the server sent.
    """
    return update, kept

  def released(self, delta: Params, state: Tree) -> Params:
    """The cohort's delta as the server's step takes it.

    Args:
      delta: from the aggregator.
      state: the transform's, as the clients were told.
    """
    return delta

  def server_step(
    self, state: Tree, metrics: dict[str, Mean], key: jax.Array
  ) -> Tree:
    """The server's next state.

    Args:
      state: before the round.
      metrics: of the whole cohort.
      key: of this round and transform.
    """
    return state


Transforms = tuple[UpdateTransform, ...]


def init_clients(
  transforms: Transforms, params: Params, key: jax.Array, num_clients: int
) -> tuple[Tree, ...]:
  """What all clients keep before round 1, of each transform."""
  return tuple(
    t.client_state(params, _own_key(key, t), num_clients) for t in transforms
  )


def init_server(transforms: Transforms, params: Params) -> tuple[Tree, ...]:
  """What the server keeps before round 1, of each transform."""
  return tuple(t.server_state(params) for t in transforms)


def broadcast(
  transforms: Transforms, states: tuple[Tree, ...], params: Params
) -> tuple[Tree, ...]:
  """What each client of a round is told, of each transform."""
  return tuple(
    transform.broadcast(state, params)
    for transform, state in zip(transforms, states)
  )


def check(transforms: Transforms, params: Params, num_clients: int) -> None:
  """Raises UserError if one does not fit, see `UpdateTransform.check`."""
  for transform in transforms:
    transform.check(params, num_clients)


def send(transforms: Transforms, params: Params) -> Params:
  """What the clients receive for the server's parameters."""
  for transform in transforms:
    params = transform.send(params)
  return params


def no_metrics(transforms: Transforms) -> dict[str, Mean]:
  """Neutral elements of the metrics of all transforms."""
  found: dict[str, Mean] = {}
  for transform in transforms:
    found |= transform.no_metrics()
  return found


def prepare(
  transforms: Transforms,
  data: ClientData,
  kept: tuple[Tree, ...],
  sender: Sender,
) -> ClientData:
  """One client's data after all transforms.

  Args:
    transforms: in order.
    data: of the client.
    kept: its state, of each transform.
    sender: with the client's key of the round, and what the server told of
      each transform.
  """
  for number, transform in enumerate(transforms):
    data = transform.prepare(
      data, kept[number], _sender_of(sender, number, transform)
    )
  return data


def apply(
  transforms: Transforms,
  update: ClientUpdate,
  kept: tuple[Tree, ...],
  sender: Sender,
) -> tuple[ClientUpdate, tuple[Tree, ...]]:
  """One client's update after all transforms, and what the client keeps of
  each; arguments as for `prepare`."""
  after = []
  for number, transform in enumerate(transforms):
    update, own = transform.apply(
      update, kept[number], _sender_of(sender, number, transform)
    )
    after.append(own)
  return update, tuple(after)


def released(
  transforms: Transforms, states: tuple[Tree, ...], delta: Params
) -> Params:
  """A cohort's delta after all transforms, the last to touch an update
  first."""
  for transform, state in reversed(list(zip(transforms, states))):
    delta = transform.released(delta, state)
  return delta


def shown(transforms: Transforms, metrics: dict[str, Mean]) -> dict[str, Mean]:
  """A round's metrics; if a transform hides them nothing of any, and no counts
  of clients at all, since 0 would be a lie."""
  if not any(t.hides_metrics for t in transforms):
    return metrics
  return {
    name: jax.tree.map(jnp.zeros_like, mean)
    for name, mean in metrics.items()
    if not name.startswith(metrics_lib.CLIENTS)
  }


def server_step(
  transforms: Transforms,
  states: tuple[Tree, ...],
  metrics: dict[str, Mean],
  key: jax.Array,
) -> tuple[Tree, ...]:
  """The server's states after a round; `key` is the round's."""
  return tuple(
    transform.server_step(state, metrics, _own_key(key, transform))
    for transform, state in zip(transforms, states)
  )


def _sender_of(sender: Sender, number: int, transform) -> Sender:
  return sender._replace(
    key=_own_key(sender.key, transform), told=sender.told[number]
  )


def _own_key(key: jax.Array, transform: UpdateTransform) -> jax.Array:
  """A key for each class of transforms, so that adding one moves no other's
  draws."""
  name = type(transform).__name__.encode()
  return jax.random.fold_in(key, _FIRST_STREAM | zlib.crc32(name) >> 2)
