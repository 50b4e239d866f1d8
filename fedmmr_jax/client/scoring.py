"""Scores of one local step: each target against its negatives.

Axes: `T` = B·Q targets of a step, `N` negatives, `J` candidates scored.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedmmr_jax.client import losses, negatives
from fedmmr_jax.client.windows import Batch, targets_of_step
from fedmmr_jax.config import OwnNegatives, RunConfig
from fedmmr_jax.data.dataset import ClientData
from fedmmr_jax.models.experts import MemoryView
from fedmmr_jax.models.feddmmr import Candidates, Catalogue, FedDMMR
from fedmmr_jax.models.profile import mix, States

Params = Any  # tree of float32 arrays, `FedDMMR.init(...)['params']`


class StepScores(NamedTuple):
  """Scores of a step, targets flattened to T.

  Attributes:
    positive: [T].
    negative: [T, N].
    rest: [T] log Σ exp over the negatives of each target.
    target: `Candidates` for the T positives.
    candidates: `Candidates` for everything scored, J rows.
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


def draw_negatives(
  key: jax.Array, client: ClientData, config: RunConfig
) -> jax.Array:
  """[T, N] negatives for each target, or [N] shared by all targets: neutral
  items, and up to a quarter of N that the client disliked, each once."""
  shape = (config.client.num_negatives,)
  if isinstance(config.client.negatives, OwnNegatives):
    shape = (targets_of_step(config), *shape)
  drawn = negatives.sample(
    key, shape, client.avoided, client.num_avoided, client.num_drawable
  )
  if not len(client.disliked):
    return drawn
  place = jnp.arange(shape[-1])
  count = num_explicit(client, config)
  some = jnp.maximum(client.num_disliked, 1)
  start = jax.random.randint(
    jax.random.fold_in(key, 1), (*shape[:-1], 1), 0, some
  )
  return jnp.where(
    place < count, client.disliked[(start + place) % some], drawn
  )


def num_explicit(client: ClientData, config: RunConfig) -> jax.Array:
  """[] int32 how many of N negatives are items that the client disliked."""
  return jnp.minimum(client.num_disliked, config.client.num_negatives // 4)


def score_batch(
  model: FedDMMR,
  params: Params,
  batch: Batch,
  negative: jax.Array,
  catalogue: Catalogue,
  view: MemoryView | None,
  key: jax.Array | None,
) -> StepScores:
  """Scores each target and its negatives.

  Args:
    model: the architecture.
    params: its parameters.
    batch: windows and targets.
    negative: [T, N] or [N] int32 ids, see `draw_negatives`.
    catalogue: item features.
    view: what the experts may attend to, of these candidates in the order of
      `view.asked_in_training`.
    key: for dropout; None scores without dropout.
  """
  train = key is not None
  encode_key, candidate_key = jax.random.split(key) if train else (None, None)

  def apply(*args, key, **kwargs):
    rngs = {'dropout': key} if train else {}
    return model.apply({'params': params}, *args, rngs=rngs, **kwargs)

  def encode(window, profile, key):
    return apply(
      window,
      catalogue,
      train,
      batch.targets.shape[1] == 1,
      profile,
      key=key,
      method='encode',
    )

  def represent(items):
    return apply(
      items, catalogue, view, train, key=candidate_key, method='candidates'
    )

  keys = jax.random.split(encode_key, len(batch.windows)) if train else None
  states = jax.vmap(encode)(batch.windows, batch.profile, keys)  # [B, Q, D]
  score = _score_shared if negative.ndim == 1 else _score_own
  return score(model, states, batch, negative, represent)


def _score_shared(model, states, batch, negative, represent) -> StepScores:
  """One draw of [N] negatives serves all targets: J = T + N."""
  targets, valid = batch.targets.reshape(-1), batch.valid.reshape(-1)
  candidates = represent(jnp.concatenate([targets, negative]))
  target = jax.tree.map(lambda x: x[: len(targets)], candidates)
  rest = jax.tree.map(lambda x: x[len(targets) :], candidates)
  own = jax.tree.map(
    lambda x: x.reshape(*batch.targets.shape, 1, *x.shape[1:]), target
  )
  anyone = jnp.broadcast_to(jnp.any(valid), negative.shape)
  by_sequence = _Scores(
    jax.vmap(jax.vmap(model.score))(_sequences(states), own)[..., 0],
    jax.vmap(jax.vmap(model.score, (0, None)), (0, None))(
      _sequences(states), rest
    ),
  )
  by_profile = None
  if isinstance(states, States):
    # A window's positions share their profile, which scores the negatives once.
    by_profile = _Scores(
      jax.vmap(model.score_profile)(states, own)[..., 0],
      jax.vmap(model.score_profile, (0, None))(states, rest)[:, None],
    )
  return StepScores(
    **_of_targets(states, by_sequence, by_profile),
    target=target,
    candidates=candidates,
    counted=jnp.concatenate([valid, anyone]),
  )


def _score_own(model, states, batch, negative, represent) -> StepScores:
  """Each target has its own [T, N] negatives: J = T · (1 + N)."""
  items = jnp.concatenate([batch.targets.reshape(-1, 1), negative], axis=1)
  candidates = represent(items.reshape(-1))
  # Not −1: without experts the axis E has length 0.
  shape = (*batch.targets.shape, items.shape[1])
  grouped = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), candidates)
  scores = jax.vmap(jax.vmap(model.score))(_sequences(states), grouped)
  by_profile = None
  if isinstance(states, States):
    profile_scores = jax.vmap(model.score_profile)(states, grouped)
    by_profile = _Scores(profile_scores[..., 0], profile_scores[..., 1:])
  return StepScores(
    **_of_targets(states, _Scores(scores[..., 0], scores[..., 1:]), by_profile),
    target=jax.tree.map(
      lambda x: x[:, :, 0].reshape(len(items), *x.shape[3:]), grouped
    ),
    candidates=candidates,
    counted=jnp.broadcast_to(batch.valid.reshape(-1, 1), items.shape).reshape(
      -1
    ),
  )


class _Scores(NamedTuple):
  """Scores of a step's targets and their negatives from one state.

  Attributes:
    positive: [B, Q].
    negative: [B, Q, N], or [B, 1, N] that are the same at each position.
  """

  positive: jax.Array
  negative: jax.Array


def _sequences(states: jax.Array | States) -> jax.Array:
  return states.sequence if isinstance(states, States) else states


def _of_targets(
  states, by_sequence: _Scores, by_profile: _Scores | None
) -> dict[str, jax.Array | None]:
  """The fields of `StepScores` that have one row per target.

  For a mixture, log Σ exp is computed from its components. The mixed scores of
  all negatives, used only for the memory's surprise, then need no gradient.
  """
  positive, negative = by_sequence
  rest = jax.nn.logsumexp(negative, axis=-1)
  profile = None
  if by_profile:
    known = states.known[:, None]
    rest_by_profile = jax.nn.logsumexp(by_profile.negative, axis=-1)
    profile = jnp.where(
      known, losses.cross_entropy(by_profile.positive, rest_by_profile), 0.0
    ).reshape(-1)
    positive = mix(positive, by_profile.positive, known)
    negative = mix(negative, by_profile.negative, known[..., None])
    rest = mix(rest, rest_by_profile, known)
  return dict(
    positive=positive.reshape(-1),
    rest=rest.reshape(-1),
    profile=profile,
    negative=negative.reshape(-1, negative.shape[-1]),
  )
