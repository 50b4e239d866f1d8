"""The scorer of a trained model as one pure function of arrays.

It takes a history and gives scores, so that whoever runs it needs no code of
this package: the window, the profile and the memory are cut from the history
inside, by the rule for people whom no round saw (`ranking.question_of`).

Whatever does not depend on a history is computed before: an item's row and the
projection of its content become one embedding. The arrays that remain are
arguments, not constants, so that one program serves the weights of every round.

Axes: `b` people, `h` length of their histories, `k` items of a list, `Q` query
vectors, `V` rows of the catalogue, `D` hidden size, `F` features.
"""

import dataclasses
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from fedmmr_jax.client import memory as memory_lib
from fedmmr_jax.client.prototypes import Prototypes
from fedmmr_jax.client.update import Broadcast
from fedmmr_jax.client.vocabulary import ITEM_TABLE
from fedmmr_jax.config import ContentPlusId, RunConfig
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import ranking
from fedmmr_jax.federation.round import FederationState
from fedmmr_jax.models.experts import Entries
from fedmmr_jax.models.feddmmr import Catalogue, FedDMMR
from fedmmr_jax.models.profile import States
from fedmmr_jax.simulation import Simulation

Weights = dict[str, Any]  # name -> array

# Names of arrays; those of parameters are their paths.
ITEMS, CONTENT, FEATURES, HAS = 'items', 'content', 'features/', 'has/'
PROTOTYPES, PARAMS, SCALES = 'prototypes/', 'params/', 'scales/'
_PROJECTION = 'content_projection'
_LEVELS = 127  # of int8 on either side of 0


class _Folded(FedDMMR):
  """A model whose item table holds whole embeddings, and whose catalogue holds
  content that is projected already."""

  def embed(
    self, items: jax.Array, catalogue: Catalogue, train: bool = False
  ) -> jax.Array:
    del catalogue, train
    return self.item_embedding[items]

  def _with_content(self, entries: Entries) -> Entries:
    has_content = isinstance(self.config.item_embedding, ContentPlusId)
    return entries if has_content else entries._replace(content=None)


@dataclasses.dataclass(frozen=True)
class Scorer:
  """The program; `weights_of` gives the arrays it works on.

  Attributes:
    model: the architecture, with folded embeddings.
    config: static settings.
    count: k, items of a list.
  """

  model: _Folded
  config: RunConfig
  count: int

  @classmethod
  def of(cls, simulation: Simulation, count: int) -> 'Scorer':
    """The scorer of a run's model, with lists of `count` items."""
    model = simulation.model
    return cls(
      _Folded(model.config, model.num_rows, model.modalities),
      simulation.compiled_config,
      count,
    )

  @property
  def num_queries(self) -> int:
    """Q: the sequence and, with profiles, the profile."""
    return 2 if self.config.model.profile else 1

  def __call__(
    self, weights: Weights, history: jax.Array
  ) -> dict[str, jax.Array]:
    """Scores the catalogue.

    Args:
      weights: from `weights_of`, maybe by way of `quantised`.
      history: [b, h] int32 rows of the catalogue, oldest first, 0 behind.

    Returns:
      'scores' [b, V] float32, -inf at row 0; of the items that are not in the
      history the best first, 'top_rows' [b, k] int32 and 'top_scores' [b, k]
      float32, 0 and -inf behind the end of a shorter list; 'queries' [b, Q, D]
      float32, a vector without any other entry than 0 where there is none.
    """
    broadcast = self._broadcast(weights)
    return jax.vmap(partial(self._one, broadcast))(history)

  def _one(
    self, broadcast: Broadcast, history: jax.Array
  ) -> dict[str, jax.Array]:
    """The same for one person's history [h]."""
    memory = None
    if not self.model.is_backbone_only:
      memory = memory_lib.init(self.config.memory)
    question = ranking.question_of(
      self.config,
      broadcast.catalogue,
      history,
      jnp.sum(history > 0),
      jnp.int32(0),  # unused: the memory is empty
      memory,
    )
    scores = ranking.score_catalogue(
      self.model, self.config, broadcast, *question
    )
    profile = ranking.profile_of(
      self.model, self.config, broadcast, question.earlier
    )
    state = ranking.encode_last(self.model, broadcast, question.window, profile)
    scores = jnp.where(jnp.arange(len(scores)) > 0, scores, -jnp.inf)
    best, rows = jax.lax.top_k(scores.at[history].set(-jnp.inf), self.count)
    return {
      'scores': scores,
      'top_rows': jnp.where(jnp.isneginf(best), 0, rows),
      'top_scores': best,
      'queries': _queries(state),
    }

  def _broadcast(self, weights: Weights) -> Broadcast:
    """What the functions of this package take, from the arrays."""
    weights = dequantised(weights)

    def under(prefix):
      return {
        name.removeprefix(prefix): array
        for name, array in weights.items()
        if name.startswith(prefix)
      }

    dim = self.config.model.hidden_dim
    params = traverse_util.unflatten_dict(under(PARAMS), sep='/')
    params[ITEM_TABLE] = weights[ITEMS]
    if isinstance(self.config.model.item_embedding, ContentPlusId):
      # It is folded into the items; the model still declares it.
      params[_PROJECTION] = jnp.zeros((dim, dim))
    centres = under(PROTOTYPES)
    return Broadcast(
      params,
      Prototypes(**centres) if centres else None,
      Catalogue(
        under(FEATURES),
        under(HAS),
        weights.get(CONTENT, jnp.zeros((self.model.num_rows, 0))),
      ),
      jnp.float32(0),
      None,
    )


def _queries(state: jax.Array | States) -> jax.Array:
  """[Q, D]."""
  if not isinstance(state, States):
    return state[None]
  return jnp.stack([state.sequence, jnp.where(state.known, state.profile, 0.0)])


def weights_of(simulation: Simulation, state: FederationState) -> Weights:
  """The arrays of a round, on the host.

  Returns:
    'items' [V, D] float32 embeddings as they are ranked; with experts for each
    feature matrix 'features/NAME' [V, F] float32 and 'has/NAME' [V] bool, and
    where they read content 'content' [V, D] float32; with prototypes
    'prototypes/centre' and 'prototypes/size'; 'params/PATH', the rest.

  Raises:
    UserError: clients have parameters of their own.
  """
  if state.personal is not None:
    raise UserError(
      f'`personal={simulation.config.federation.personal}`: each client has '
      'parameters of its own, which the one model of an export cannot hold; '
      'export a run without `personal`'
    )
  model, catalogue = simulation.model, simulation.catalogue
  server = simulation.as_ranked(state.server)
  params = dict(server.params)
  weights: Weights = {
    ITEMS: model.apply(
      {'params': params}, jnp.arange(model.num_rows), catalogue, method='embed'
    )
  }
  del params[ITEM_TABLE]
  projection = params.pop(_PROJECTION, None)
  if not model.is_backbone_only:
    if projection is not None:
      weights[CONTENT] = catalogue.content @ projection
    for name in catalogue.features:
      weights[FEATURES + name] = catalogue.features[name]
      weights[HAS + name] = catalogue.has[name]
    if server.prototypes is not None:
      for name, array in server.prototypes._asdict().items():
        weights[PROTOTYPES + name] = array
  flat = traverse_util.flatten_dict(params, sep='/')
  weights |= {PARAMS + name: array for name, array in flat.items()}
  return {name: np.asarray(array) for name, array in weights.items()}


def quantised(weights: Weights) -> Weights:
  """The same with every float table of items in int8: a row is its scale,
  'scales/NAME' [V] float32, times whole numbers from -127 to 127, rounded to
  the nearest."""
  found = {}
  for name, array in weights.items():
    if name not in (ITEMS, CONTENT) and not name.startswith(FEATURES):
      found[name] = array
      continue
    largest = np.abs(array).max(axis=1, initial=0.0)
    scale = (largest / _LEVELS).astype(np.float32)
    whole = np.round(array / np.where(scale > 0, scale, 1.0)[:, None])
    # A scale so small that it was rounded itself.
    found[name] = np.clip(whole, -_LEVELS, _LEVELS).astype(np.int8)
    found[SCALES + name] = scale
  return found


def dequantised(weights: Weights) -> Weights:
  """The inverse of `quantised`, up to what it rounded; of other weights they
  themselves."""
  found = {}
  for name, array in weights.items():
    if name.startswith(SCALES):
      continue
    scale = weights.get(SCALES + name)
    if scale is not None:
      array = array.astype(jnp.float32) * cast(Any, scale)[:, None]
    found[name] = array
  return found
