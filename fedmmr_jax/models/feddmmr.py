"""FedDMMR: backbone, experts and router put together.

    s = SASRec(window)                                           [D]
    a = w_vis · LN(visual(c, memory)) + w_sem · LN(semantic(c, memory))  [J, D]
    score(s, c) = √D · cos(LN(s) + a, e_c)                        [J]

With `--similarity=dot` the score is ⟨LN(s) + a, e_c⟩: a length of `e_c` counts,
as it does without experts, where the score is ⟨s, e_c⟩.

Everything here is written for one client and one window; callers vmap.
`a` depends on the candidate and the memory, never on the window, so scoring T
windows against J candidates takes two [T, D] x [D, J] products (`score`).
"""

from typing import cast, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedmmr_jax.config import ContentPlusId, Gated, ModelConfig
from fedmmr_jax.models import content as content_lib
from fedmmr_jax.models import layers
from fedmmr_jax.models.experts import MemoryView, SemanticExpert, VisualExpert
from fedmmr_jax.models.profile import mix, ProfileExpert, States
from fedmmr_jax.models.router import ItemRouter
from fedmmr_jax.models.sasrec import SASRec

VISUAL, SEMANTIC = 0, 1  # positions on the expert axis E
NUM_EXPERTS = 2
# Group (`config.GROUPS`) -> top-level names of its parameters, of which a
# configuration has some.
PARAMETER_GROUPS = {
  'embeddings': ('item_embedding', 'content_projection'),
  'backbone': ('backbone', 'profile_expert'),
  'experts': (
    'visual_expert',
    'visual_norm',
    'semantic_expert',
    'semantic_norm',
  ),
  'router': ('router',),
  'fusion': ('sequence_norm', 'fusion_gate'),
}


class Catalogue(NamedTuple):
  """Item features, one row an item, row 0 = padding, zero row = missing.

  Attributes:
    visual: [V, 512] float32 (width 0: the run has no images).
    text: [V, 384] float32 (width 0: the run has no texts).
    has_visual: [V] bool.
    has_text: [V] bool.
    content: [V, D] float32, see `content.components`; width 0 with
      `--item_embedding=id`.
  """

  visual: jax.Array
  text: jax.Array
  has_visual: jax.Array
  has_text: jax.Array
  content: jax.Array

  @classmethod
  def from_features(cls, visual, text, content=None) -> 'Catalogue':
    """Builds the masks: an all-zero row is a missing feature."""
    if content is None:
      content = jnp.zeros((len(text), 0))
    return cls(
      visual=jnp.asarray(visual, jnp.float32),
      text=jnp.asarray(text, jnp.float32),
      has_visual=jnp.any(jnp.asarray(visual) != 0, axis=-1),
      has_text=jnp.any(jnp.asarray(text) != 0, axis=-1),
      content=jnp.asarray(content, jnp.float32),
    )


class Candidates(NamedTuple):
  """Everything about J candidates that does not depend on a window.

  Attributes:
    embedding: [J, D] item embeddings `e`.
    auxiliary: [J, D] `a`, the residual enhancement; 0 without any expert.
    visual: [J, D] visual expert's output (zeros if not configured).
    semantic: [J, D] semantic expert's output (zeros if not configured).
    weights: [J, E] router weights; 0 for an expert without input, the rest
      renormalised.
    available: [J, E] bool, which experts had something to work on.
  """

  embedding: jax.Array
  auxiliary: jax.Array
  visual: jax.Array
  semantic: jax.Array
  weights: jax.Array
  available: jax.Array


def view_memory(
  catalogue: Catalogue,
  items: jax.Array,
  prototypes: jax.Array | None = None,
  prototype_mask: jax.Array | None = None,
) -> MemoryView:
  """Looks up the features of retrieved entries.

  Args:
    catalogue: item features.
    items: [R] int32 item ids, 0 = empty slot.
    prototypes: [P, 384] global prototypes appended to the texts, or None.
    prototype_mask: [P] bool, which of them exist.

  Returns:
    The entries as the experts read them.
  """
  filled = items > 0
  text, text_mask = catalogue.text[items], filled & catalogue.has_text[items]
  if prototypes is not None:
    text = jnp.concatenate([text, prototypes])
    # Given where prototypes are.
    text_mask = jnp.concatenate([text_mask, cast(jax.Array, prototype_mask)])
  return MemoryView(
    visual=catalogue.visual[items],
    visual_mask=filled & catalogue.has_visual[items],
    text=text,
    text_mask=text_mask,
  )


class FedDMMR(nn.Module):
  """The model of one client.

  Attributes:
    config: widths, depths, dropout and variants.
    num_rows: V, rows of the item table including padding row 0.
    visual_dim: width of the visual features; 0 leaves the visual expert out.
    text_dim: width of the text features; 0 leaves the semantic expert out.
  """

  config: ModelConfig
  num_rows: int
  visual_dim: int
  text_dim: int

  @property
  def is_backbone_only(self) -> bool:
    return not (self.visual_dim or self.text_dim)

  @property
  def has_both_experts(self) -> bool:
    return bool(self.visual_dim and self.text_dim)

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
        _scaled_identity(
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
      c.positions == 'relative',
    )
    if c.profile:
      self.profile_expert = ProfileExpert(c.hidden_dim, c.dropout)
    if self.visual_dim:
      self.visual_expert = VisualExpert(
        c.hidden_dim,
        c.visual_projection_dim,
        c.dropout,
        c.expert_input == 'candidate',
      )
      self.visual_norm = layers.layer_norm(scale=c.expert_init_scale)
    if self.text_dim:
      self.semantic_expert = SemanticExpert(
        c.hidden_dim, c.semantic_heads, c.dropout, c.expert_input == 'candidate'
      )
      self.semantic_norm = layers.layer_norm(scale=c.expert_init_scale)
    if not self.is_backbone_only:
      self.router = ItemRouter(c.router_hidden_dim, NUM_EXPERTS, c.dropout)
      self.sequence_norm = layers.layer_norm()
      if isinstance(c.fusion, Gated):
        self.fusion_gate = self.param(
          'fusion_gate', nn.initializers.constant(c.fusion.init), ()
        )

  def embed(self, items: jax.Array, catalogue: Catalogue) -> jax.Array:
    """[..., D] embeddings of items: their rows, and content if configured."""
    embedded = self.item_embedding[items]
    if isinstance(self.config.item_embedding, ContentPlusId):
      embedded += catalogue.content[items] @ self.content_projection
    return embedded

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
      profile: [D] the client's (`profile.py`), with `--profile=history`; None
        or zero = unknown.

    Returns:
      [L, D] (or [1, D]) float32, ready for `score`: LN(s), or plain s for a
      model without experts. With `--profile=history` `States`, whose sequence
      has that shape.
    """
    valid = window > 0
    embedded = self.embed(window, catalogue) * valid[:, None]
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
    """Represents J candidates through one client's memory.

    Args:
      items: [J] int32 item ids.
      catalogue: item features, [V, ...].
      memory: the client's retrieved entries; None in a model without experts.
      train: whether dropout acts.

    Returns:
      `Candidates` with J rows.
    """
    embedding = self.embed(items, catalogue)
    nothing = jnp.zeros_like(embedding)
    weights = jnp.zeros((items.shape[0], NUM_EXPERTS), embedding.dtype)
    available = weights > 0
    if self.is_backbone_only:
      return Candidates(
        embedding, nothing, nothing, nothing, weights, available
      )

    visual = semantic = auxiliary = nothing
    available = self._available(items, catalogue, memory)
    weights = self._weights(items, embedding, catalogue, available, train)
    if self.visual_dim:
      visual = self.visual_expert(catalogue.visual[items], memory, train)
      auxiliary += weights[:, VISUAL, None] * self.visual_norm(visual)
    if self.text_dim:
      semantic = self.semantic_expert(
        embedding, catalogue.text[items], memory, train
      )
      auxiliary += weights[:, SEMANTIC, None] * self.semantic_norm(semantic)
    if isinstance(
      self.config.fusion, Gated
    ):  # the original's form, for ablation
      auxiliary *= self.fusion_gate
    return Candidates(
      embedding, auxiliary, visual, semantic, weights, available
    )

  def route(self, items: jax.Array, catalogue: Catalogue) -> jax.Array:
    """Router weights of J items for a client whose memory holds images and
    texts: [J, E] float32, 0 for an expert without the item's feature."""
    full = MemoryView(
      catalogue.visual[:1],
      jnp.ones((1,), bool),
      catalogue.text[:1],
      jnp.ones((1,), bool),
    )
    return self._weights(
      items,
      self.embed(items, catalogue),
      catalogue,
      self._available(items, catalogue, full),
      train=False,
    )

  def _weights(
    self, items, embedding, catalogue, available, train
  ) -> jax.Array:
    """[J, E] router weights."""
    # Masking before the softmax renormalises over the experts that remain.
    return layers.masked_softmax(
      self.router(self._router_input(items, embedding, catalogue), train),
      available,
    )

  def _router_input(self, items, embedding, catalogue) -> jax.Array:
    """[J, D], or [J, D + 512 + 384] with `--router_input=features`."""
    if self.config.router_input == 'embedding':
      return embedding
    return jnp.concatenate(
      [embedding, catalogue.visual[items], catalogue.text[items]], axis=-1
    )

  def _available(self, items, catalogue, memory) -> jax.Array:
    """[J, E] bool: has the expert something to work on for this candidate?"""
    visual = semantic = jnp.zeros(items.shape, bool)
    own = self.config.expert_input == 'candidate'  # suffices
    if self.visual_dim:
      visual = catalogue.has_visual[items] & (own | jnp.any(memory.visual_mask))
    if self.text_dim:
      semantic = (own & catalogue.has_text[items]) | jnp.any(memory.text_mask)
    return jnp.stack([visual, semantic], axis=-1)

  def initialise(self, catalogue: Catalogue) -> None:
    """Touches every parameter; the method `init` runs."""
    window = jnp.zeros((self.config.max_seq_len,), jnp.int32)
    self.encode(window, catalogue)
    self.candidates(window[:1], catalogue, view_memory(catalogue, window[:1]))

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
      state: [D] float32, or such `States`, from `encode`.
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
    if self.config.similarity == 'dot':
      return e @ state + jnp.sum(a * e, axis=-1)
    # Exact products: the expansion cancels, and a GPU would round to TF32.
    with jax.default_matmul_precision('highest'):
      dot = e @ state + jnp.sum(a * e, axis=-1)
      cross = a @ state
    squared_norm = jnp.sum(state * state) + 2 * cross + jnp.sum(a * a, axis=-1)
    squared_norm *= jnp.sum(e * e, axis=-1)
    return self.config.hidden_dim**0.5 * dot * layers.inverse_norm(squared_norm)


def _scaled_identity(scale: float):
  def init(key, shape, dtype=jnp.float32):
    del key
    return scale * jnp.eye(*shape, dtype=dtype)

  return init


def _item_embedding_init(std: float):
  def init(key, shape, dtype=jnp.float32):
    return (std * jax.random.normal(key, shape, dtype)).at[0].set(0.0)

  return init
