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
from fedmmr_jax.models.profile import mix, States
from fedmmr_jax.windows import Batch, targets_of_step

Params = Any  # tree of float32 arrays, `FedDMMR.init(...)['params']`


class StepScores(NamedTuple):
  """Scores of a step, targets flattened to T.

  Attributes:
    positive: [T].
    negative: [T, N].
    rest: [T] log Σ exp of a target's negatives.
    target: Candidates of the T positives.
    candidates: Candidates of everything scored, J rows.
    counted: [J] bool, False for candidates of padding targets.
    profile: [T] losses of the client's profile alone, 0 where it is unknown;
      None without `--profile=history`.
  """

  positive: jax.Array
  negative: jax.Array
  rest: jax.Array
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
  states = jax.vmap(encode)(batch.windows, batch.profile, keys)  # [B, Q, D]
  score = _score_shared if negative.ndim == 1 else _score_own
  return score(model, states, batch, negative, represent)


def _score_shared(model, states, batch, negative, represent) -> StepScores:
  """One draw of [N] negatives serves all targets: J = T + N."""
  targets, valid = batch.targets.reshape(-1), batch.valid.reshape(-1)
  candidates = represent(jnp.concatenate([targets, negative]))
  target = jax.tree.map(lambda x: x[:len(targets)], candidates)
  rest = jax.tree.map(lambda x: x[len(targets):], candidates)
  own = jax.tree.map(
      lambda x: x.reshape(*batch.targets.shape, 1, *x.shape[1:]), target)
  anyone = jnp.broadcast_to(jnp.any(valid), negative.shape)
  return StepScores(
      **_of_targets(model, states, own, rest, shared=True), target=target,
      candidates=candidates, counted=jnp.concatenate([valid, anyone]))


def _score_own(model, states, batch, negative, represent) -> StepScores:
  """Each target has its own [T, N] negatives: J = T · (1 + N)."""
  items = jnp.concatenate([batch.targets.reshape(-1, 1), negative], axis=1)
  candidates = represent(items.reshape(-1))
  grouped = jax.tree.map(
      lambda x: x.reshape(*batch.targets.shape, -1, *x.shape[1:]), candidates)
  own, rest = (jax.tree.map(lambda x: x[:, :, part], grouped)
               for part in (slice(1), slice(1, None)))
  return StepScores(
      **_of_targets(model, states, own, rest),
      target=jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), own),
      candidates=candidates,
      counted=jnp.broadcast_to(
          batch.valid.reshape(-1, 1), items.shape).reshape(-1))


def _of_targets(model, states, own, negatives, shared=False) -> dict:
  """The fields of `StepScores` that have one row a target.

  Args:
    model: the architecture.
    states: of B windows and their Q positions.
    own: Candidates [B, Q, 1], the targets.
    negatives: Candidates [B, Q, N], or [N] that are `shared` by all.
    shared: are they?
  """
  axis = None if shared else 0
  score = jax.vmap(jax.vmap(model.score))
  score_shared = jax.vmap(jax.vmap(model.score, (0, axis)), (0, axis))
  sequences = states.sequence if isinstance(states, States) else states
  positive = score(sequences, own)[..., 0]
  negative = score_shared(sequences, negatives)
  rest = jax.nn.logsumexp(negative, axis=-1)
  profile_loss = None
  if isinstance(states, States):
    # A window's positions share their profile. Its scores of shared negatives,
    # and their sum, are taken once a window; so is no exp of each sum of two.
    known = states.known[:, None]
    by_profile = jax.vmap(model.score_profile)(states, own)[..., 0]
    negative_by_profile = jax.vmap(model.score_profile, (0, axis))(
        states, negatives)
    if shared:
      negative_by_profile = negative_by_profile[:, None]
    rest_by_profile = jax.nn.logsumexp(negative_by_profile, axis=-1)
    profile_loss = jnp.where(
        known, losses.cross_entropy(by_profile, rest_by_profile), 0.0)
    positive = mix(positive, by_profile, known)
    negative = mix(negative, negative_by_profile, known[..., None])
    rest = mix(rest, rest_by_profile, known)
  per_target = dict(positive=positive, rest=rest, profile=profile_loss)
  return dict(
      {name: None if x is None else x.reshape(-1)
       for name, x in per_target.items()},
      negative=negative.reshape(-1, negative.shape[-1]))
