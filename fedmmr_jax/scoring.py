"""Scores of one local step: each target against its negatives.

Axes: `T` = B·Q targets of a step, `N` negatives, `J` candidates scored.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedmmr_jax import losses
from fedmmr_jax import negatives
from fedmmr_jax.config import RunConfig
from fedmmr_jax.data.dataset import ClientData
from fedmmr_jax.models.experts import MemoryView
from fedmmr_jax.models.feddmmr import Candidates, Catalogue, FedDMMR
from fedmmr_jax.models.profile import States
from fedmmr_jax.windows import Batch, targets_of_step

Params = Any  # tree of float32 arrays, `FedDMMR.init(...)['params']`


class StepScores(NamedTuple):
  """Scores of a step, targets flattened to T.

  Attributes:
    positive: [T].
    negative: [T, N].
    target: Candidates of the T positives.
    candidates: Candidates of everything scored, J rows.
    counted: [J] bool, False for candidates of padding targets.
    profile: [T] losses of the client's profile alone, 0 where it is unknown;
      None without `--profile=history`.
  """

  positive: jax.Array
  negative: jax.Array
  target: Candidates
  candidates: Candidates
  counted: jax.Array
  profile: jax.Array | None = None


def draw_negatives(key: jax.Array, client: ClientData,
                   config: RunConfig) -> jax.Array:
  """[T, N] own negatives of each target, or [N] shared by all of them."""
  shape = (config.client.num_negatives,)
  if config.client.negatives == 'per_sample':
    shape = (targets_of_step(config), *shape)
  return negatives.sample(
      key, shape, client.avoided, client.num_avoided,
      client.num_drawable)


def score_batch(model: FedDMMR, params: Params, batch: Batch,
                negative: jax.Array, catalogue: Catalogue, view: MemoryView,
                key: jax.Array | None) -> StepScores:
  """Scores each target and its negatives.

  Args:
    model: the architecture.
    params: its parameters.
    batch: windows and targets.
    negative: [T, N] or [N] int32 ids, see `draw_negatives`.
    catalogue: item features.
    view: what the experts may attend to.
    key: for dropout; None scores without dropout.
  """
  train = key is not None
  encode_key, candidate_key = (
      jax.random.split(key) if train else (None, None))

  def apply(*args, key, **kwargs):
    rngs = {'dropout': key} if train else {}
    return model.apply({'params': params}, *args, rngs=rngs, **kwargs)

  def encode(window, profile, key):
    return apply(window, catalogue, train, batch.targets.shape[1] == 1,
                 profile, key=key, method='encode')

  def represent(items):
    return apply(items, catalogue, view, train, key=candidate_key,
                 method='candidates')

  keys = jax.random.split(encode_key, len(batch.windows)) if train else None
  states = jax.vmap(encode)(batch.windows, batch.profile, keys)
  states = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), states)  # [T, D]
  score = _score_shared if negative.ndim == 1 else _score_own
  return score(model, states, batch.targets.reshape(-1),
               batch.valid.reshape(-1), negative, represent)


def _score_shared(model, states, targets, valid, negative,
                  represent) -> StepScores:
  """One draw of [N] negatives serves all targets: J = T + N."""
  candidates = represent(jnp.concatenate([targets, negative]))
  target = jax.tree.map(lambda x: x[:len(targets)], candidates)
  rest = jax.tree.map(lambda x: x[len(targets):], candidates)
  own = jax.tree.map(lambda x: x[:, None], target)
  anyone = jnp.broadcast_to(jnp.any(valid), negative.shape)
  return StepScores(
      positive=jax.vmap(model.score)(states, own)[:, 0],
      negative=jax.vmap(model.score, (0, None))(states, rest),
      target=target, candidates=candidates,
      counted=jnp.concatenate([valid, anyone]),
      profile=_profile_loss(model, states, own, rest, None))


def _score_own(model, states, targets, valid, negative,
               represent) -> StepScores:
  """Each target has its own [T, N] negatives: J = T · (1 + N)."""
  items = jnp.concatenate([targets[:, None], negative], axis=1)
  candidates = represent(items.reshape(-1))
  grouped = jax.tree.map(
      lambda x: x.reshape(*items.shape, *x.shape[1:]), candidates)
  scores = jax.vmap(model.score)(states, grouped)
  return StepScores(
      positive=scores[:, 0], negative=scores[:, 1:],
      target=jax.tree.map(lambda x: x[:, 0], grouped), candidates=candidates,
      counted=jnp.broadcast_to(valid[:, None], items.shape).reshape(-1),
      profile=_profile_loss(
          model, states, jax.tree.map(lambda x: x[:, :1], grouped),
          jax.tree.map(lambda x: x[:, 1:], grouped), 0))


def _profile_loss(model, states, own, negatives, negatives_axis):
  """[T] losses by the profile alone, or None without."""
  if not isinstance(states, States):
    return None
  positive = jax.vmap(model.score_profile)(states, own)[:, 0]
  negative = jax.vmap(model.score_profile, (0, negatives_axis))(
      states, negatives)
  loss = losses.recommendation_loss(positive, negative)
  return jnp.where(states.known, loss, 0.0)
