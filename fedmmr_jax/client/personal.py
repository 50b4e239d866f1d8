"""Personal parts of the model, which stay with the client (Arivazhagan et al.
2019, "Federated learning with personalization layers", FedPer).

A client starts its local update from the server's parameters with its own
personal ones put in, trains all of them, uploads the delta of the shared ones,
and keeps its own. What the server has of a personal part is what every client
starts from: drawn, or loaded from a run that trained the part together. It
never moves.

A tree of personal parameters, `own`, has the structure of the parameters with
only the personal ones in it; None in a run without personal parts.
"""

from typing import Any, Sequence

import jax
import jax.numpy as jnp

from fedmmr_jax.client import vocabulary
from fedmmr_jax.client.drift import DriftControl
from fedmmr_jax.config import RunConfig
from fedmmr_jax.errors import UserError
from fedmmr_jax.models import groups

Params = Any
Tree = Any  # of arrays; None = nothing

# What `FedDMMR.embed` makes an item's embedding of.
_OF_ITEMS = (vocabulary.ITEM_TABLE, 'content_projection')


def cut(params: Params, names: Sequence[str]) -> Tree:
  """The personal part of a tree of parameters; None if no names are given.

  Args:
    params: parameters, arrays of any kind.
    names: groups and paths, as `personal` names them.
  """
  return _pruned(params, groups.mask(params, names)) if names else None


def _pruned(tree, mask):
  """The leaves of nested dicts that a mask chooses, without empty dicts."""
  if not isinstance(tree, dict):
    return tree if mask else None
  found = {name: _pruned(part, mask[name]) for name, part in tree.items()}
  return {n: part for n, part in found.items() if part is not None} or None


def put(params: Params, own: Tree) -> Params:
  """The parameters with a client's own ones in their place."""
  if own is None:
    return params
  if not isinstance(own, dict):
    return own
  return {
    name: put(part, own[name]) if name in own else part
    for name, part in params.items()
  }


def put_of(params: Params, own: Tree, client: jax.Array) -> Params:
  """As `put`, for who may be nobody.

  Args:
    params: the server's.
    own: of the client; anything if there is none.
    client: [] int32; negative = a stranger, who has the server's.
  """
  if own is None:
    return params
  return put(
    params,
    jax.tree.map(
      lambda mine, server: jnp.where(client >= 0, mine, server),
      own,
      _like(params, own),
    ),
  )


def _like(params, own):
  """The part of the parameters that `own` covers."""
  if not isinstance(own, dict):
    return params
  return {name: _like(params[name], part) for name, part in own.items()}


def without(tree: Tree, names: Sequence[str]) -> Tree:
  """A tree like the parameters with zeros for the personal ones, whatever they
  were; None stays None."""
  if not names or tree is None:
    return tree
  return jax.tree.map(
    lambda x, personal: jnp.zeros_like(x) if personal else x,
    tree,
    groups.mask(tree, names),
  )


def shared(tree: Tree, params: Params, names: Sequence[str]) -> Tree:
  """What of a tree travels: if it is like the parameters, it is without the
  personal ones (None in their place)."""
  if not names or jax.tree.structure(tree) != jax.tree.structure(params):
    return tree
  return jax.tree.map(
    lambda x, personal: None if personal else x, tree, groups.mask(tree, names)
  )


def kept(
  own: Tree, end: Params, ids: vocabulary.Vocabulary, names: Sequence[str]
) -> Tree:
  """A client's own parameters after its local steps; those before, if one is
  NaN or infinite now.

  Args:
    own: before, of the whole catalogue.
    end: all parameters after the steps, of item tables the client's rows.
    ids: its rows.
    names: what is personal.
  """
  if own is None:
    return None
  after = vocabulary.put(own, ids.ids, ids.is_first, cut(end, names))
  # The server cannot reject what it never sees.
  finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(after)])
  return jax.tree.map(
    lambda new, old: jnp.where(jnp.all(finite), new, old), after, own
  )


def of_each(params: Params, names: Sequence[str], num_clients: int) -> Tree:
  """[K, …] what all clients start from: the server's."""
  return jax.tree.map(
    lambda x: jnp.broadcast_to(x, (num_clients, *x.shape)).copy(),
    cut(params, names),
  )


def embeds(own: Tree) -> bool:
  """Whether clients have item embeddings of their own."""
  return own is not None and any(name in own for name in _OF_ITEMS)


def check(config: RunConfig, params: Params, drift: DriftControl) -> None:
  """Refuses personal parts that cannot be.

  Args:
    config: settings.
    params: of the model, or their shapes.
    drift: the drift control.

  Raises:
    UserError: a group or path that the model does not have, one that is frozen,
      nothing left for the server, or a drift control that needs all parameters
      at the server.
  """
  names = config.federation.personal_groups
  if not names:
    return
  setting = f'`personal={config.federation.personal}`'
  groups.check(params, names, 'personal')
  for name in names:
    if not any(jax.tree.leaves(groups.mask(params, [name]))):
      raise UserError(
        f'{setting}: this model has no {name} to keep with the clients; leave '
        f'out {name}'
      )
  personal = jax.tree.leaves(groups.mask(params, names))
  frozen = jax.tree.leaves(groups.mask(params, config.client.frozen_groups))
  if any(p and f for p, f in zip(personal, frozen)):
    raise UserError(
      f'{setting} and `freeze={config.client.freeze}` name the same '
      'parameters, and what is frozen is the same for all; take them out of one'
    )
  if all(p or f for p, f in zip(personal, frozen)):
    raise UserError(
      f'{setting} leaves the server nothing to train; keep less with the '
      'clients, or compare with @local_only, where each trains alone'
    )
  if drift.makes_step:
    raise UserError(
      f'{setting}: `drift_control={config.client.drift_control}` steps with '
      "the server's moments, and of personal parts it has none; take another"
    )
  for what in jax.eval_shape(
    lambda p: (drift.client_state(p), drift.no_upload(p)), params
  ):
    if what is not None and (
      jax.tree.structure(what) != jax.tree.structure(params)
    ):
      raise UserError(
        f'{setting}: `drift_control={config.client.drift_control}` keeps or '
        'sends something that is not like the parameters, so that nobody can '
        'say what of it is personal; take another'
      )
  if config.federation.compression != 'none':
    raise UserError(
      f'{setting} and `compression={config.federation.compression}`: what is '
      'compressed and counted is an update of all parameters; take one of both'
    )
  start = config.model.item_embedding
  if embeds(cut(params, names)) and getattr(start, 'shrinkage', 0):
    raise UserError(
      f'{setting} and `item_embedding={start}`: `shrinkage` moves the rows of '
      'one item table, and here each client has its own; say shrinkage=0'
    )
