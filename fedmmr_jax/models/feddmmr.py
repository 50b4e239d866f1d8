"""FedDMMR: backbone, experts and router combined.

    s = SASRec(window)                                  [D]
    a = Σ_m w_m · LN(expert_m(c, memory))               [J, D]
    score(s, c) = √D · cos(LN(s) + a, e_c)              [J]

over the experts m: visual, semantic, and any others that have features.

With `similarity=dot` of `--fusion` the score is ⟨LN(s) + a, e_c⟩, so that the
length of `e_c` matters, as it does without experts, with the score ⟨s, e_c⟩.

Everything here is written for one client and one window; callers vmap.
`a` depends on the candidate and the memory, never on the window, so scoring T
windows against J candidates takes two [T, D] x [D, J] products (`score`).
"""

from typing import cast, Mapping, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fedmmr_jax.config import ContentPlusId, Gated, ModelConfig
from fedmmr_jax.models import content as content_lib
from fedmmr_jax.models import layers
from fedmmr_jax.models.experts import Entries, MemoryView, Modality, TEXT
from fedmmr_jax.models.profile import mix, ProfileExpert, States
from fedmmr_jax.models.router import ItemRouter
from fedmmr_jax.models.sasrec import SASRec

# Top-level parameter -> its group, of `config.GROUPS`.
_GROUPS = {
  'item_embedding': 'embeddings',
  'content_projection': 'embeddings',
  'backbone': 'backbone',
  'profile_expert': 'backbone',
  'router': 'router',
  'sequence_norm': 'fusion',
  'fusion_gate': 'fusion',
}


def group_of(parameter: str) -> str:
  """The group of a top-level parameter; `experts` if it is in no other."""
  return _GROUPS.get(parameter, 'experts')


class Catalogue(NamedTuple):
  """Item features, one row per item, row 0 = padding, zero row = missing.

  Attributes:
    features: name of a matrix -> [V, F] float32; those the experts read.
    has: name of a matrix -> [V] bool, which items have such a feature.
    content: [V, D] float32, see `content.components`; width 0 with
      `item_embedding=id`.
    embedding: [V, D] float32 what `FedDMMR.embed` would compute of all items,
      for who ranks many lists with the same parameters; None = compute it.
  """

  features: dict[str, jax.Array]
  has: dict[str, jax.Array]
  content: jax.Array
  embedding: jax.Array | None = None

  @classmethod
  def of(
    cls, features: Mapping[str, np.ndarray | jax.Array], content=None
  ) -> 'Catalogue':
    """Builds the masks: an all-zero row is a missing feature.

    Args:
      features: name of a matrix -> [V, F].
      content: [V, D] or [V, 0]; None = [V, 0], with V taken from the features.
    """
    if content is None:
      content = jnp.zeros((len(next(iter(features.values()))), 0))
    return cls(
      features={n: jnp.asarray(x, jnp.float32) for n, x in features.items()},
      has={n: jnp.any(jnp.asarray(x) != 0, -1) for n, x in features.items()},
      content=jnp.asarray(content, jnp.float32),
    )


class Candidates(NamedTuple):
  """Everything about J candidates that does not depend on a window.

  Attributes:
    embedding: [J, D] item embeddings `e`.
    auxiliary: [J, D] `a`, the residual enhancement; 0 without any expert.
    outputs: name of an expert -> [J, D] its output.
    weights: [J, E] router weights; 0 for an expert without input, the rest
      renormalised.
    available: [J, E] bool, which experts had input.
  """

  embedding: jax.Array
  auxiliary: jax.Array
  outputs: dict[str, jax.Array]
  weights: jax.Array
  available: jax.Array


class FedDMMR(nn.Module):
  """The model of one client.

  Attributes:
    config: widths, depths, dropout and variants.
    num_rows: V, rows of the item table including padding row 0.
    modalities: the experts, axis E of router weights; see `experts.of`.
  """

  config: ModelConfig
  num_rows: int
  modalities: tuple[Modality, ...] = ()

  @property
  def is_backbone_only(self) -> bool:
    return not self.modalities

  @property
  def has_pairs(self) -> bool:
    """Whether there are two views of an item to contrast."""
    return len(self.modalities) > 1

  def setup(self):
    c = self.config
    self.item_embedding = self.param(
      'item_embedding',
      _item_embedding_init(c.embedding_init_std),
      (self.num_rows, c.hidden_dim),
    )
    if isinstance(c.item_embedding, ContentPlusId):
      self.content_projection = self.param(
        'content_projection',
        layers.scaled_identity(
          content_lib.projection_scale(c.embedding_init_std, c.hidden_dim)
        ),
        (c.hidden_dim, c.hidden_dim),
      )
    self.backbone = SASRec(
      c.hidden_dim,
      c.num_heads,
      c.num_blocks,
      c.max_seq_len,
      c.dropout,
      c.embedding_init_std,
      c.positions,
    )
    if c.profile:
      self.profile_expert = ProfileExpert(c.hidden_dim, c.dropout)
    for modality in self.modalities:
      setattr(self, f'{modality.name}_expert', modality.expert(c))
      setattr(
        self,
        f'{modality.name}_norm',
        layers.layer_norm(scale=c.expert_form.scale),
      )
    if len(self.modalities) > 1:
      self.router = ItemRouter(
        c.router.hidden_dim, len(self.modalities), c.dropout
      )
    if not self.is_backbone_only:
      self.sequence_norm = layers.layer_norm()
      if isinstance(c.fusion, Gated):
        self.fusion_gate = self.param(
          'fusion_gate', nn.initializers.constant(c.fusion.init), ()
        )

  def embed(
    self, items: jax.Array, catalogue: Catalogue, train: bool = False
  ) -> jax.Array:
    """[..., D] embeddings of items: their rows, plus content if configured.

    Args:
      items: [...] int32 ids.
      catalogue: item features.
      train: whether `id_dropout` acts (consumes the `dropout` key).
    """
    if catalogue.embedding is not None:
      return catalogue.embedding[items]
    embedded = self.item_embedding[items]
    start = self.config.item_embedding
    if not isinstance(start, ContentPlusId):
      return embedded
    content = catalogue.content[items]
    if train and start.id_dropout:
      # Volkovs et al. 2017, "DropoutNet: Addressing cold start in recommender
      # systems", NIPS. Without content there would be nothing left.
      dropped = jnp.any(content != 0, axis=-1) & jax.random.bernoulli(
        self.make_rng('dropout'), start.id_dropout, items.shape
      )
      embedded = jnp.where(dropped[..., None], 0.0, embedded)
      # As of a new item: no histories to stand in.
      direction = jnp.arange(content.shape[-1])
      of_histories = direction >= content.shape[-1] - start.collaborative_dim
      content = jnp.where(dropped[..., None] & of_histories, 0.0, content)
    return embedded + content @ self.content_projection

  def encode(
    self,
    window: jax.Array,
    catalogue: Catalogue,
    train: bool = False,
    last_only: bool = False,
    profile: jax.Array | None = None,
  ) -> jax.Array | States:
    """Sequence representations of one left-padded window.

    Args:
      window: [L] int32 item ids, 0 = padding.
      catalogue: item features, [V, ...].
      train: whether dropout acts (consumes the `dropout` key).
      last_only: only the last position, computed more cheaply.
      profile: [D] the client's profile (`profile.py`), with
        `--profile=history`; None or zero = unknown.

    Returns:
      [L, D] (or [1, D]) float32, ready for `score`: LN(s), or plain s for a
      model without experts. With `--profile=history`, `States` whose sequence
      has that shape.
    """
    valid = window > 0
    embedded = self.embed(window, catalogue, train) * valid[:, None]
    states = self.backbone(embedded, valid, train, last_only)
    own = None
    if self.config.profile:
      if profile is None:
        profile = jnp.zeros(states.shape[-1])
      known = jnp.any(profile != 0)
      shift, own = self.profile_expert(profile, train)
      states += jnp.where(known, shift, 0.0)
    if not self.is_backbone_only:
      states = self.sequence_norm(states)
    if own is None:
      return states
    return States(states, own, known)

  def candidates(
    self,
    items: jax.Array,
    catalogue: Catalogue,
    memory: MemoryView | None,
    train: bool = False,
  ) -> Candidates:
    """Represents J candidates given one client's memory.

    Args:
      items: [J] int32 item ids.
      catalogue: item features, [V, ...].
      memory: the client's retrieved entries; None in a model without experts.
      train: whether dropout acts.

    Returns:
      `Candidates` with J rows.
    """
    embedding = self.embed(items, catalogue, train)
    auxiliary = jnp.zeros_like(embedding)
    if memory is None or self.is_backbone_only:
      weights = jnp.zeros((items.shape[0], 0), embedding.dtype)
      return Candidates(embedding, auxiliary, {}, weights, weights > 0)

    available = self._available(items, catalogue, memory)
    weights = self._weights(embedding, available, train)
    outputs = {}
    for number, (name, matrix, _) in enumerate(self.modalities):
      output = getattr(self, f'{name}_expert')(
        embedding,
        catalogue.features[matrix][items],
        self._with_content(memory[name]),
        train,
      )
      auxiliary += weights[:, number, None] * getattr(self, f'{name}_norm')(
        output
      )
      outputs[name] = output
    if isinstance(self.config.fusion, Gated):  # the original's form
      auxiliary *= self.fusion_gate
    return Candidates(embedding, auxiliary, outputs, weights, available)

  def _with_content(self, entries: Entries) -> Entries:
    """Entries whose content is in the space of item embeddings."""
    if not isinstance(self.config.item_embedding, ContentPlusId):
      return entries._replace(content=None)
    return entries._replace(content=entries.content @ self.content_projection)

  def route(self, items: jax.Array, catalogue: Catalogue) -> jax.Array:
    """Router weights of J items for a client whose memory has entries for every
    expert: [J, E] float32, 0 for an expert whose feature the item lacks."""
    full = {
      name: Entries(catalogue.features[matrix][:1], jnp.ones((1, 1), bool))
      for name, matrix, _ in self.modalities
    }
    return self._weights(
      self.embed(items, catalogue),
      self._available(items, catalogue, full),
      train=False,
    )

  def _weights(self, embedding, available, train) -> jax.Array:
    """[J, E] router weights; with one expert there is nothing to route."""
    if len(self.modalities) == 1:
      return available.astype(embedding.dtype)
    # Masking before the softmax renormalises over the experts that remain.
    return layers.masked_softmax(self.router(embedding, train), available)

  def _available(self, items, catalogue, memory) -> jax.Array:
    """[J, E] bool: has the expert input for this candidate?"""

    def has(name, matrix, expert):
      own = getattr(self, f'{name}_expert').sees_candidate  # suffices
      feature = catalogue.has[matrix][items]
      entries = jnp.any(memory[name].mask, axis=0)  # [J] or [1]
      if expert.needs_feature:
        return feature & (own | entries)
      return (own & feature) | entries

    return jnp.stack([has(*m) for m in self.modalities], axis=-1)

  def initialise(self, catalogue: Catalogue) -> None:
    """Uses every parameter; the method that `init` runs."""
    window = jnp.zeros((self.config.max_seq_len,), jnp.int32)
    self.encode(window, catalogue)
    self.candidates(
      window[:1], catalogue, self.view_memory(catalogue, window[:1])
    )

  @nn.nowrap  # needs no parameters: call it on the model itself
  def view_memory(
    self,
    catalogue: Catalogue,
    items: jax.Array,
    prototypes: jax.Array | None = None,
    prototype_mask: jax.Array | None = None,
    met: jax.Array | None = None,
  ) -> MemoryView:
    """Looks up the features of retrieved entries.

    Args:
      catalogue: item features.
      items: [R] int32 item ids, 0 = empty slot.
      prototypes: [P, F] global prototypes, which the semantic expert sees after
        the entries, or None.
      prototype_mask: [P] bool, which of them exist.
      met: [R, J] bool, which entries each candidate may meet; None = all.

    Returns:
      The entries as each expert reads them.
    """
    view = {}
    for name, matrix, _ in self.modalities:
      features = catalogue.features[matrix][items]
      mask = ((items > 0) & catalogue.has[matrix][items])[:, None]
      if met is not None:
        mask &= met
      if matrix == TEXT and prototypes is not None:
        features = jnp.concatenate([features, prototypes])
        # Given where prototypes are.
        exist = cast(jax.Array, prototype_mask)[:, None]
        mask = jnp.concatenate(
          [mask, jnp.broadcast_to(exist, (len(exist), mask.shape[1]))]
        )
      view[name] = Entries(features, mask, catalogue.content[items])
    return view

  @nn.nowrap  # needs no parameters: call it on the model itself
  def score_profile(self, state: States, candidates: Candidates) -> jax.Array:
    """[..., J] scores of candidates [..., J] by the client's profile alone."""
    return candidates.embedding @ state.profile

  @nn.nowrap
  def score(
    self, state: jax.Array | States, candidates: Candidates
  ) -> jax.Array:
    """Scores J candidates for one encoded position.

    `(s + a)·e = s·e + a·e` and `|s + a|² = |s|² + 2 s·a + |a|²`, so vmapping
    over T states against shared candidates never forms a [T, J, D] tensor.

    Args:
      state: [D] float32, or `States` of that shape, from `encode`.
      candidates: J candidates.

    Returns:
      [J] float32.
    """
    if isinstance(state, States):
      return mix(
        self.score(state.sequence, candidates),
        self.score_profile(state, candidates),
        state.known,
      )
    e, a = candidates.embedding, candidates.auxiliary
    if self.is_backbone_only:
      return e @ state
    if self.config.fusion.similarity == 'dot':
      return e @ state + jnp.sum(a * e, axis=-1)
    # Exact products: the expansion cancels, and a GPU would round to TF32.
    with jax.default_matmul_precision('highest'):
      dot = e @ state + jnp.sum(a * e, axis=-1)
      cross = a @ state
    squared_norm = jnp.sum(state * state) + 2 * cross + jnp.sum(a * a, axis=-1)
    squared_norm *= jnp.sum(e * e, axis=-1)
    return self.config.hidden_dim**0.5 * dot * layers.inverse_norm(squared_norm)


def _item_embedding_init(std: float):
  def init(key, shape, dtype=jnp.float32):
    return (std * jax.random.normal(key, shape, dtype)).at[0].set(0.0)

  return init
