"""The heterogeneous experts: each represents a candidate by attending over the
client's own memory in one modality (FedDMMR, "Multimodal experts").

Two forms (`expert_form`):

* `similarity`: attention is by the similarity of features, and what is read are
  the embeddings of the entries' content. So from round 1 on ⟨expert, e⟩ says
  how like the candidate the entries nearest to it are, which a model of light
  users has no time to learn, and there are few parameters to train;
* `attention`, the original's: everything is learned from random projections.
  With `input=candidate` the projected feature of the candidate itself is added
  to the expert's reading of the memory; otherwise it only determines the
  attention weights.

No expert sees the sequence, so an expert runs once per candidate, not once per
(sequence, candidate) pair. Projections are applied to the R memory rows before
these meet the J candidates. This is exact, because a projection commutes with
the attention average.
"""

from typing import Any, cast, Mapping, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedmmr_jax import parts
from fedmmr_jax.config import AttentionForm, ModelConfig, SimilarityForm
from fedmmr_jax.errors import UserError
from fedmmr_jax.models import layers

TEXT = 'text'  # the feature matrix of novelty and of prototypes


class Entries(NamedTuple):
  """What one expert may attend to: features of retrieved memory entries.

  Attributes:
    features: [R, F] float32; of the semantic expert with global prototypes
      [R + P, F].
    mask: [R, 1] or [R, J] bool, which of them each candidate may meet; none at
      empty slots and items without such a feature.
    content: [R, D] float32, what their content adds to their items' embeddings
      (`content_plus_id`); None if it adds nothing.
  """

  features: jax.Array
  mask: jax.Array
  content: jax.Array | None = None


MemoryView = Mapping[str, Entries]  # by the name of the expert


class Expert(nn.Module):
  """Represents candidates in one modality. Subclasses define `__call__`.

  Attributes:
    config: widths, dropout, variants.
    features: class attribute, the name of its feature matrix; '' means the one
      of the expert's name.
    needs_feature: class attribute, whether the candidate's own feature is the
      query, so that the expert has no input if that is missing.
  """

  config: ModelConfig
  features = ''
  needs_feature = True

  @property
  def sees_candidate(self) -> bool:
    """Whether the candidate's own feature is part of the output."""
    return self.config.expert_form.sees_candidate

  def __call__(
    self,
    embedding: jax.Array,
    feature: jax.Array,
    entries: Entries,
    train: bool,
  ) -> jax.Array:
    """Args:
      embedding: [J, D] float32, of the candidates.
      feature: [J, F] float32, theirs in this modality; zero where missing.
      entries: the client's retrieved entries.
      train: whether dropout acts.

    Returns:
      [J, D] float32. Its value does not matter for candidates without entries
      to attend to or without a query feature: the router leaves them out.
    """
    raise NotImplementedError


class SimilarityExpert(Expert):
  """Reads the content of the entries most like the candidate in one modality.

  Where the item table holds no content, a trained projection of the entries'
  features takes its place.
  """

  @nn.compact
  def __call__(self, embedding, feature, entries, train):
    form = cast(SimilarityForm, self.config.expert_form)
    width = feature.shape[-1]
    metric = self.param(
      'metric', lambda key, shape: jnp.eye(*shape), (width,) * 2
    )
    sharpness = self.param(
      'sharpness', nn.initializers.constant(form.sharpness), ()
    )
    # R memory rows meet the metric, not J candidates.
    asked = layers.unit(entries.features) @ metric
    logits = sharpness * (asked @ layers.unit(feature).T)
    attention = layers.masked_softmax(logits, entries.mask, axis=0)
    if entries.content is None:
      read = layers.dense(self.config.hidden_dim, 'value')(entries.features)
    else:
      # As the item table has it: the contrastive loss shall not train that.
      read = jax.lax.stop_gradient(entries.content)
    return attention.T @ read


class VisualExpert(Expert):
  """Single-head attention of the candidate's feature over those in the memory.

  Values are the raw memory features; the output layer maps them to `D`. It
  suits any modality whose features can be compared with one another, and is the
  default for further modalities.
  """

  @nn.compact
  def __call__(self, embedding, feature, entries, train):
    width = feature.shape[-1]
    hidden_dim = self.config.hidden_dim
    form = cast(AttentionForm, self.config.expert_form)
    projection_dim = min(form.projection_dim, width)
    key = layers.dense(projection_dim, 'key')(entries.features)
    query = layers.Affine(width, projection_dim, name='query')()
    # (c W + b) kᵀ = c (W kᵀ) + b kᵀ: one [R, F] matrix for all candidates.
    logits = (key @ query.kernel.T) @ feature.T + (key @ query.bias)[:, None]
    attention = layers.masked_softmax(
      logits * projection_dim**-0.5, entries.mask, axis=0
    )
    # Project R memory rows instead of J averages of them.
    output = layers.Affine(width, hidden_dim, name='output')()
    x = attention.T @ (entries.features @ output.kernel) + output.bias
    if self.sees_candidate:
      x += layers.dense(hidden_dim, 'candidate')(feature)
    x = nn.relu(layers.layer_norm('norm')(x))
    return nn.Dropout(self.config.dropout)(x, deterministic=not train)


class SemanticExpert(Expert):
  """Multi-head cross-attention of a candidate's embedding over memory text."""

  needs_feature = False

  @nn.compact
  def __call__(self, embedding, feature, entries, train):
    form = cast(AttentionForm, self.config.expert_form)
    dim, num_heads = self.config.hidden_dim, form.heads
    head_dim = dim // num_heads
    key = layers.dense(dim, 'key')(entries.features)
    value = layers.dense(dim, 'value')(entries.features)
    key = layers.dense(dim, 'attention_key')(key)
    value = layers.dense(dim, 'attention_value')(value)
    key = layers.split_heads(key, num_heads)  # [H, R, D/H]
    value = layers.split_heads(value, num_heads)

    # Two query projections in a row and each head's keys fold into one
    # [H·R, D] matrix that all candidates share, each head's values and the
    # output projection into another.
    outer = layers.Affine(dim, dim, name='query')()
    inner = layers.Affine(dim, dim, name='attention_query')()
    kernel = (outer.kernel @ inner.kernel).reshape(dim, -1, head_dim)
    bias = (outer.bias @ inner.kernel + inner.bias).reshape(-1, head_dim)
    folded = jnp.einsum('dhe,hre->hrd', kernel, key)
    offset = jnp.einsum('he,hre->hr', bias, key)
    output = layers.Affine(dim, dim, name='attention_output')()
    value = jnp.einsum(
      'hre,hed->hrd', value, output.kernel.reshape(-1, head_dim, dim)
    )

    # Candidates last: R is short, J is long, and reductions over R vectorise.
    logits = jnp.einsum('hrd,jd->hrj', folded, embedding)
    attention = layers.masked_softmax(
      (logits + offset[..., None]) * head_dim**-0.5, entries.mask, axis=-2
    )
    dropout = self.config.dropout
    attention = nn.Dropout(dropout)(attention, deterministic=not train)
    x = jnp.einsum('hrj,hrd->jd', attention, value) + output.bias
    if self.sees_candidate:
      x += layers.dense(dim, 'candidate')(feature)
    x = layers.layer_norm('norm')(x)
    x = nn.relu(layers.dense(dim, 'output')(x))
    return nn.Dropout(dropout)(x, deterministic=not train)


# Expert -> its feature matrix, where that has another name.
_FEATURES = {'semantic': TEXT}


class Modality(NamedTuple):
  """An expert of a model.

  Attributes:
    name: its name; its parameters are `<name>_expert` and `<name>_norm`, its
      metrics `w_<name>` and `gradient_<name>`.
    features: the name of its feature matrix.
    expert: its form.
  """

  name: str
  features: str
  expert: type[Expert]


def of(config: ModelConfig) -> tuple[Modality, ...]:
  """The experts that a config names, in that order.

  An entry is a name, or `name=my_package.module:Thing` for your own form (a
  subclass of `Expert`).

  Raises:
    UserError: a form cannot be found or is not an `Expert`, or a name is given
      twice.

  >>> [m[:2] for m in of(ModelConfig(experts='visual,semantic,audio'))]
  [('visual', 'visual'), ('semantic', 'text'), ('audio', 'audio')]
  """
  found = []
  for name, own in config.expert_forms.items():
    expert: Any = SimilarityExpert
    if isinstance(config.expert_form, AttentionForm):
      expert = SemanticExpert if name == 'semantic' else VisualExpert
    if own:
      expert = parts.find(own, {}, 'expert')
      if not (isinstance(expert, type) and issubclass(expert, Expert)):
        raise UserError(f'{own} is no subclass of fedmmr_jax.Expert')
    matrix = expert.features or _FEATURES.get(name, name)
    found.append(Modality(name, matrix, expert))
  return tuple(found)
