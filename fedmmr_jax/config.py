"""The settings of a run: frozen dataclasses, validated on the host.

Every field is also a command-line flag of the same name (`experiments/app.py`)
and a line of `config.json`. Its help text is defined here, with what is known
about its effect. `RunConfig.validate` enforces `choices`, `minimum` and
`maximum` of a field.

A setting that selects a part holds an object whose options exist only with that
part. As text it is `name,option=value,…`; Python accepts either:
`memory=RecentMemory(capacity=20)` is `memory='recent,capacity=20'`. Parts that
compute something themselves (aggregators, drift controls) stay text here and
are built in their own modules.
"""

import dataclasses
import math
import re
from typing import Any, ClassVar, Iterator, Literal, Mapping

from fedmmr_jax import parts
from fedmmr_jax.errors import UserError

SYNTHETIC = 'synthetic'
# What else than users, items and times is read of a line, if asked for.
RATING, EVENT, PART = 'rating', 'event', 'part'
KEEP, DROP = 'keep', 'drop'
_SECONDS = {'': 1, 's': 1, 'm': 60, 'h': 3600, 'd': 86_400}
_GAP = re.compile(r'([0-9]+(?:\.[0-9]+)?)([smhd]?)')
# Options of the formats whose columns have names.
COLUMNS = ('user', 'item', 'time')
# Names of `load` and `freeze`; which parameters they mean:
# models/feddmmr.py.
GROUPS = ('embeddings', 'backbone', 'experts', 'router', 'fusion')
ALL_GROUPS, MEMORIES = 'all', 'memories'
# Those of the original, `experts=both`; a set without their features does
# without them.
ORIGINAL_EXPERTS = ('visual', 'semantic')
NOT_MEASURED = 'not measured'
LAST_ROUND = 'last'  # of `select_by`
# How cohorts are drawn (federation/cohorts.py).
FIXED, POISSON, CYCLIC = 'fixed', 'poisson', 'cyclic'
AUTO = 'auto'
# Of `privacy`, those whose rounds know nothing of the run's length.
_ANY_LENGTH = ('none', 'clip', 'gaussian')


def _field(default: Any, help: str, **bounds: Any) -> Any:
  return dataclasses.field(default=default, metadata={'help': help, **bounds})


def _choice(kinds: tuple[type['Part'], ...], help: str, **more: Any) -> Any:
  """A setting that is one of several parts, by default the first."""
  named = {kind.name: kind for kind in kinds}
  return _field(kinds[0](), help, parts=named, **more)


@dataclasses.dataclass(frozen=True)
class Part:
  """One of the parts that a setting chooses between; fields are its options.

  Attributes:
    name: how it is called.
  """

  name: ClassVar[str]

  def __str__(self) -> str:
    return parts.text(self.name, self)


@dataclasses.dataclass(frozen=True)
class Off(Part):
  """The part is left out. False where a truth value is wanted."""

  name = 'none'

  def __bool__(self) -> Literal[False]:
    return False


@dataclasses.dataclass(frozen=True)
class Lines:
  """Options of a format: which column is whose, and which lines count.

  The name of a column is '' for one of the usual ones (`roles.ALIASES`). In a
  file without a header, names are positions, from 1.
  """

  user: str = _field('', 'column of the users')
  item: str = _field('', 'column of the items')
  time: str = _field('', 'column of the times; none: the order of lines counts')
  rating: str = _field('', 'column of the ratings, for the next two')
  min_rating: str = _field('', 'what is rated lower is no interaction')
  dislikes: str = _field(
    '',
    'what is rated so or lower is a dislike: a negative of its client alone, '
    'and no candidate for it',
  )
  event: str = _field('', 'column of what happened, for the next one')
  events: str = _field(
    '',
    'which of these count, as in cart|purchase, or with their weights in the '
    'loss, as in view:0.2|purchase:1',
  )
  part: str = _field('', 'column of the part of a line, with `split_by=given`')
  duplicates: str = _field(
    KEEP, 'lines of the same user, item and time', choices=(KEEP, DROP)
  )
  repeats: str = _field(
    KEEP,
    'further interactions of a user with the same item',
    choices=(KEEP, DROP),
  )
  session_gap: str = _field(
    '',
    'a longer pause begins a new session, and each session is a client; in '
    'seconds, or as in 30m, 2h, 1d',
  )

  def __post_init__(self):
    if (
      self.least_rating is not None
      and self.greatest_dislike is not None
      and self.greatest_dislike >= self.least_rating
    ):
      raise ValueError('dislikes is not below min_rating')
    _ = self.weights, self.gap  # refused here, not after minutes of reading

  @property
  def least_rating(self) -> float | None:
    """Of an interaction; None = any."""
    return _number('min_rating', self.min_rating)

  @property
  def greatest_dislike(self) -> float | None:
    """Rating of a dislike; None = there are none."""
    return _number('dislikes', self.dislikes)

  @property
  def weights(self) -> dict[str, float]:
    """Event that counts -> its weight."""
    found = {}
    for word in filter(None, self.events.split('|')):
      name, colon, weight = word.rpartition(':')
      value = _number('events', weight) if colon else 1.0
      name = (name if colon else weight).strip()
      if not name or value is None:
        raise ValueError('events is not a list as in view:0.2|purchase:1')
      found[name] = value
    return found

  @property
  def gap(self) -> float | None:
    """Seconds of a pause between sessions; None = no sessions."""
    if not self.session_gap:
      return None
    match = _GAP.fullmatch(self.session_gap)
    if not match or not float(match[1]):
      raise ValueError('session_gap is no duration as in 30m')
    return float(match[1]) * _SECONDS[match[2]]

  @property
  def further(self) -> tuple[str, ...]:
    """What is read of each line beside user, item and time."""
    wanted = []
    if self.min_rating or self.dislikes:
      wanted.append(RATING)
    if self.events:
      wanted.append(EVENT)
    if self.part:
      wanted.append(PART)
    return tuple(wanted)

  @property
  def names_columns(self) -> bool:
    """Whether a column is called by its name."""
    return any((self.user, self.item, self.time, self.rating, self.event))


def _number(option: str, text: str) -> float | None:
  if not text:
    return None
  value = float(text) if re.fullmatch(r'[-+.\deE]+', text) else math.nan
  if not math.isfinite(value) or (option == 'events' and value <= 0):
    raise ValueError(f'{option}={text} is not a number')
  return value


@dataclasses.dataclass(frozen=True)
class SyntheticData(Part):
  """The embedded set (data/synthetic.py)."""

  name = SYNTHETIC
  users: int = _field(400, 'users', minimum=2)
  items: int = _field(300, 'items', minimum=40)


@dataclasses.dataclass(frozen=True)
class LeaveOneOut(Part):
  """Each client's last item is the test item, the one before for validation."""

  name = 'leave_one_out'


@dataclasses.dataclass(frozen=True)
class Timeline(Part):
  """Everything from a date on is held out, and the last item before it is for
  validation."""

  name = 'timeline'
  test_from: str = dataclasses.field(
    metadata={'help': 'the date (2000-12-31, UTC), or seconds since 1970'}
  )


@dataclasses.dataclass(frozen=True)
class Given(Part):
  """The split that the data come with: files named train, validation (valid,
  val, dev) and test, or a column that says it of each line."""

  name = 'given'
  history: str = _field(
    'all',
    "what a target is ranked after; all: everything before it, its client's "
    'earlier targets too; train: the training items, at the test those for '
    'validation too, so that HR@k is the recall of sets without an order',
    choices=('all', 'train'),
  )


@dataclasses.dataclass(frozen=True)
class IdEmbedding(Part):
  """A random row for each item."""

  name = 'id'


@dataclasses.dataclass(frozen=True)
class ContentInit(Part):
  """The row starts as the item's features."""

  name = 'content_init'
  collaborative_dim: int = _field(
    0,
    'so many of the D directions of the content are which items stand in the '
    'same histories, sketched before round 1 (federation/collaborative.py)',
    minimum=0,
  )
  collaborative_rounds: int = _field(
    5, 'cohorts that the sketch asks, each client once', minimum=1
  )
  collaborative_window: int = _field(
    0,
    'items stand together if at most so many places apart; 0: anywhere in one '
    'history',
    minimum=0,
  )
  collaborative_items: int = _field(
    0,
    'only so many items are in the sketch, those that most clients have; they '
    'are counted first. 0: all items',
    minimum=0,
  )
  collaborative_columns: int = _field(
    0,
    'numbers that a client adds for each of its items; the more, the nearer '
    'the directions are to the true ones. 0: D',
    minimum=0,
  )


@dataclasses.dataclass(frozen=True)
class ContentPlusId(ContentInit):
  """A trained projection of the item's features plus a row."""

  name = 'content_plus_id'
  id_dropout: float = _field(
    0.0,
    'in training the row of so large a share of the items with features is '
    'left out, drawn anew each time, so that content learns to stand alone '
    '(Volkovs et al. 2017)',
    minimum=0.0,
    maximum=0.95,
  )
  row_noise: float = _field(
    0.3,
    'how large random rows are at the start, over the content; those of items '
    'without content in proportion, as large as content by default. 0: all '
    'rows start at 0',
    minimum=0.0,
  )
  shrinkage: float = _field(
    0.0,
    'm: where it is ranked, an item with n training interactions counts '
    'n / (n + m) as itself and m / (n + m) as the items most like it in '
    'features, so that a new one stands where they do (models/shrinkage.py)',
    minimum=0.0,
  )


@dataclasses.dataclass(frozen=True)
class ExpertForm(Part):
  """What an expert computes from the memory."""

  features: str = _field(
    'none',
    'how the features that experts see are scaled; centred: minus their mean '
    'over the catalogue, then of mean square length 1 (missing ones stay '
    'zero); components: of these the first D principal components',
    choices=('none', 'centred', 'components'),
  )
  scale: float = _field(
    1.0,
    'initial scale of the LayerNorm behind each expert: how much of the fused '
    'vector is theirs at the start',
    minimum=0.0,
  )


@dataclasses.dataclass(frozen=True)
class AttentionForm(ExpertForm):
  """The original's experts: all they do is learned."""

  name = 'attention'
  input: str = _field(
    'memory',
    "what an expert's output is made of; memory: what it read there (the "
    "original); candidate: that and the candidate's own feature",
    choices=('memory', 'candidate'),
  )
  heads: int = _field(8, 'attention heads of the semantic expert', minimum=1)
  projection_dim: int = _field(
    128, 'width of queries and keys of the visual expert', minimum=1
  )

  @property
  def sees_candidate(self) -> bool:
    """Whether the candidate's own feature is part of an expert's output."""
    return self.input == 'candidate'


@dataclasses.dataclass(frozen=True)
class SimilarityForm(ExpertForm):
  """Experts that start as the similarity to the nearest entries."""

  name = 'similarity'
  sees_candidate: ClassVar[bool] = False  # it only decides what is read
  sharpness: float = _field(
    8.0,
    'initial factor of the cosines in the softmax: how much more the nearest '
    'entry counts than the others',
    minimum=0.0,
  )
  scale: float = dataclasses.field(
    default=0.3, metadata=ExpertForm.__dataclass_fields__['scale'].metadata
  )


@dataclasses.dataclass(frozen=True)
class AbsolutePositions(Part):
  """An embedding of each position."""

  name = 'absolute'


@dataclasses.dataclass(frozen=True)
class RelativePositions(Part):
  """A bias for each head and distance."""

  name = 'relative'
  start: str = _field(
    'random',
    'what the backbone is before training; random: Xavier matrices; recency: '
    "the mean of the window's items, the last ones first (models/sasrec.py)",
    choices=('random', 'recency'),
  )


@dataclasses.dataclass(frozen=True)
class HistoryProfile(Part):
  """A long-term profile of the items outside the window."""

  name = 'history'
  weight: float = _field(
    0.3, 'weight of the loss of the long-term expert alone', minimum=0.0
  )


@dataclasses.dataclass(frozen=True)
class ItemRouter(Part):
  """Weights the experts of an item by its embedding."""

  name = 'item'
  hidden_dim: int = _field(
    128, 'first hidden width; the second is half', minimum=2
  )
  load_balance: float = _field(
    0.01, 'weight of the load balance loss', minimum=0.0
  )


@dataclasses.dataclass(frozen=True)
class Fusion(Part):
  """How the experts' outputs join the backbone's."""

  similarity: str = _field(
    'cosine',
    "how the fused vector meets an item's embedding; cosine: √D times their "
    'cosine (the original); dot: their inner product, as it is without experts',
    choices=('cosine', 'dot'),
  )


@dataclasses.dataclass(frozen=True)
class Residual(Fusion):
  """Adds the experts with their full gradient."""

  name = 'residual'


@dataclasses.dataclass(frozen=True)
class Gated(Fusion):
  """Multiplies the experts by a learned scalar (the original, for ablation)."""

  name = 'gated'
  init: float = _field(0.1, 'initial value of that scalar')


@dataclasses.dataclass(frozen=True)
class Contrastive(Part):
  """InfoNCE between the two experts' outputs for the same item."""

  weight: float = _field(0.1, 'weight of the contrastive loss', minimum=0.0)
  temperature: float = _field(
    0.07, 'temperature of the contrastive loss', minimum=1e-4
  )


@dataclasses.dataclass(frozen=True)
class Unweighted(Contrastive):
  """Every positive counts equally."""

  name = 'unweighted'


@dataclasses.dataclass(frozen=True)
class InstanceWeight(Contrastive):
  """A positive counts 1 + scale * surprise."""

  name = 'instance_weight'
  surprise_scale: float = _field(
    0.5, 'the scale of surprise in the weight', minimum=0.0
  )


@dataclasses.dataclass(frozen=True)
class AdaptiveTemperature(Contrastive):
  """The temperature of a positive is multiplied by 1 + scale * surprise; that
  makes hard ones count less (the original, for ablation)."""

  name = 'adaptive_temperature'
  surprise_scale: float = _field(
    0.5, 'the scale of surprise in the factor', minimum=0.0
  )


@dataclasses.dataclass(frozen=True)
class MemoryRule(Part):
  """Which of its positives a client remembers."""

  capacity: int = _field(50, 'M, slots of a memory', minimum=1)
  retrieval_size: int = _field(
    20, 'R, entries that the experts attend to', minimum=1
  )
  sees: str = _field(
    'past',
    'which entries a candidate meets (client/view.py); past: those of what its '
    'client consumed before, never its own; stored: all (the original)',
    choices=('past', 'stored'),
  )

  @property
  def least_surprise(self) -> float:
    """From which on a positive is remembered."""
    return 0.0

  @property
  def num_slots(self) -> int:
    """All slots, short-term ones first."""
    return self.capacity

  def fault(self) -> str:
    """What does not fit together; empty if all does."""
    if self.retrieval_size > self.capacity:
      return (
        f'retrieval_size={self.retrieval_size} exceeds capacity={self.capacity}'
      )
    return ''


@dataclasses.dataclass(frozen=True)
class RecentMemory(MemoryRule):
  """The last ones."""

  name = 'recent'


@dataclasses.dataclass(frozen=True)
class NoMemory(MemoryRule):
  """Nothing; there are slots, as in a memory of the usual size, all empty."""

  name = 'none'
  capacity: int = dataclasses.field(default=50, init=False)
  retrieval_size: int = dataclasses.field(default=20, init=False)
  sees: str = dataclasses.field(default='past', init=False)


@dataclasses.dataclass(frozen=True)
class UtilityMemory(MemoryRule):
  """A rule that keeps the entries of highest utility."""

  recency_weight: float = _field(0.6, 'weight of recency in utility')
  frequency_weight: float = _field(0.4, 'weight of frequency in utility')
  recency_time_constant: float = _field(
    60.0, 'processed samples after which recency falls to 1/e', minimum=1e-6
  )


@dataclasses.dataclass(frozen=True)
class SurpriseMemory(UtilityMemory):
  """The hard ones (the original)."""

  name = 'surprise'
  threshold: float = _field(
    0.3, 'a positive whose pairwise loss is below is not remembered'
  )

  @property
  def least_surprise(self) -> float:
    return self.threshold


@dataclasses.dataclass(frozen=True)
class TwoTierMemory(UtilityMemory):
  """The last ones, in the short-term slots, and for long those unlike them."""

  name = 'two_tier'
  long_term_capacity: int = _field(50, 'further, long-term slots', minimum=1)
  novelty_threshold: float = _field(
    0.4,
    'stored for long is what has a novelty, 1 - the largest cosine to the '
    'short term, of at least this',
    minimum=0.0,
    maximum=2.0,
  )
  merge_similarity: float = _field(
    0.95,
    'cosine from which long-term entries are merged',
    minimum=0.0,
    maximum=1.0,
  )

  @property
  def num_slots(self) -> int:
    return self.capacity + self.long_term_capacity

  def fault(self) -> str:
    if self.retrieval_size // 2 > self.long_term_capacity:
      return (
        f'half of retrieval_size={self.retrieval_size} exceeds '
        f'long_term_capacity={self.long_term_capacity}'
      )
    return super().fault()


@dataclasses.dataclass(frozen=True)
class GlobalPrototypes(Part):
  """The semantic expert attends to clusters of all clients' memories too."""

  name = 'prototypes'
  number: int = _field(
    5, 'P, prototypes of a client and of the server', minimum=1
  )
  iterations: int = _field(10, 'k-means iterations', minimum=1)


@dataclasses.dataclass(frozen=True)
class Objective(Part):
  """Which items a window predicts."""

  late_emphasis: float = _field(
    0.0,
    'e: the recommendation loss of a target counts 1 - e at the start of its '
    "client's history, 1 + e at its end, in between in proportion",
    minimum=0.0,
    maximum=1.0,
  )


@dataclasses.dataclass(frozen=True)
class LastItem(Objective):
  """The item after the window."""

  name = 'last'


@dataclasses.dataclass(frozen=True)
class AllPositions(Objective):
  """Every position predicts its next item."""

  name = 'all_positions'


@dataclasses.dataclass(frozen=True)
class Negatives(Part):
  """Which items a target is told from in training."""

  leaky: bool = _field(
    False,
    'never the held-out items either, as the original does; measures what that '
    'leak is worth',
  )


@dataclasses.dataclass(frozen=True)
class OwnNegatives(Negatives):
  """Each target draws its own."""

  name = 'per_sample'


@dataclasses.dataclass(frozen=True)
class SharedNegatives(Negatives):
  """One draw serves all targets of a step."""

  name = 'shared'


@dataclasses.dataclass(frozen=True)
class ClientStep(Part):
  """The local optimizer, fresh every round."""

  weight_decay: float = _field(
    0.0, 'L2 term added to the gradient', minimum=0.0
  )


@dataclasses.dataclass(frozen=True)
class ClientAdam(ClientStep):
  """Adam (the original)."""

  name = 'adam'
  weight_decay: float = dataclasses.field(
    default=1e-5,
    metadata=ClientStep.__dataclass_fields__['weight_decay'].metadata,
  )


@dataclasses.dataclass(frozen=True)
class ClientSGD(ClientStep):
  """Plain gradient steps."""

  name = 'sgd'


@dataclasses.dataclass(frozen=True)
class Schedule(Part):
  """How a learning rate changes over the rounds."""

  warmup: int = _field(
    0, 'rounds over which the rate rises to its value', minimum=0
  )


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
  """The learning rate stays the same."""

  name = 'constant'


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
  """The learning rate falls to 0 along half a cosine period."""

  name = 'cosine'


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
  """The learning rate falls to 0 linearly."""

  name = 'linear'


@dataclasses.dataclass(frozen=True)
class KeepSome(Part):
  """The last rounds, every so many-th and the best stay on disk."""

  name = 'some'
  last: int = _field(5, 'how many of the last', minimum=1)
  every: int = _field(10, 'and every m-th (0 = none)', minimum=0)


@dataclasses.dataclass(frozen=True)
class KeepAll(Part):
  """All rounds stay on disk."""

  name = 'all'


@dataclasses.dataclass(frozen=True)
class ServerStep(Part):
  """The optimizer that is applied to the mean client delta."""


@dataclasses.dataclass(frozen=True)
class ServerSGD(ServerStep):
  """Adds the mean delta times the learning rate."""

  name = 'fedavg'


@dataclasses.dataclass(frozen=True)
class ServerMomentum(ServerStep):
  """The same with momentum."""

  name = 'fedavgm'
  momentum: float = _field(0.9, 'momentum', minimum=0.0, maximum=0.9999)


@dataclasses.dataclass(frozen=True)
class AdaptiveStep(ServerStep):
  """An optimizer with second moments."""

  beta1: float = _field(
    0.9, 'decay of the first moment', minimum=0.0, maximum=0.9999
  )
  beta2: float = _field(
    0.99, 'decay of the second moment', minimum=0.0, maximum=0.99999
  )
  epsilon: float = _field(
    1e-8,
    'added to the root of the second moment; compared with deltas divided by '
    'the client learning rate, that is, with sums of gradients',
    minimum=1e-30,
  )


@dataclasses.dataclass(frozen=True)
class ServerAdam(AdaptiveStep):
  """Adam (Reddi et al. 2021)."""

  name = 'fedadam'


@dataclasses.dataclass(frozen=True)
class ServerYogi(AdaptiveStep):
  """Yogi (Reddi et al. 2021)."""

  name = 'fedyogi'


@dataclasses.dataclass(frozen=True)
class ServerMuon(AdaptiveStep):
  """Muon for the weight matrices, with momentum beta1, Adam for the rest."""

  name = 'fedmuon'


def _part(field: dataclasses.Field, value: Any) -> Part:
  """The part that a setting holds, from its text or as it is.

  Raises:
    UserError: it is none of the setting's parts.
  """
  named = field.metadata['parts']
  if type(value) in named.values():
    return value
  name, given = parts.split(str(value))
  if not isinstance(value, str) or name not in named:
    raise UserError(
      f'`{field.name}={value}` is unknown; choose from ' + ', '.join(named)
    )
  return parts.make(named[name], given, f'`{field.name}={value}`')


class _Settings:
  """A group of settings; parts may be given to it as text."""

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if 'parts' in field.metadata:
        part = _part(field, getattr(self, field.name))
        object.__setattr__(self, field.name, part)


@dataclasses.dataclass(frozen=True)
class DataConfig(_Settings):
  """Which interactions and features a run reads."""

  dataset: str = _field(
    SYNTHETIC,
    'the embedded set (synthetic,users=400,items=300), or the format of the '
    'files in `data_dir` (data/formats.py), or a format of your own as '
    'my_package.module:Thing; auto: tell it by the file. Options say which '
    'column is whose, as in csv,user=who,item=what,time=when, and which lines '
    'count, as in auto,min_rating=4,repeats=drop',
    options={'auto': Lines},
  )
  data_dir: str = _field(
    '', 'folder of the data set, or its interaction file (unused by synthetic)'
  )
  item_file: str = _field(
    '',
    "file with the items' titles and texts; empty: the one in `data_dir`, "
    'if there is one',
  )
  k_core: int = _field(
    0,
    'keep users with at least so many interactions and items with at least so '
    'many in training, counted among what is left (0 = all)',
    minimum=0,
  )
  min_interactions: int = _field(
    3,
    'keep users with at least so many interactions, held-out ones included',
    minimum=3,
  )
  top_k_users: int = _field(
    0,
    'of these keep the k most active, of equals the lower id (0 = all)',
    minimum=0,
  )
  split_by: Part = _choice(
    (LeaveOneOut, Timeline, Given),
    "what is held out of training; leave_one_out: each client's last two "
    'items; timeline: everything from a date on, and the last item before it '
    'for validation; given: what files named so, or a column, say',
  )
  visual_features: str = _field(
    'auto',
    'matrix of visual features: a .npy path that must exist, auto (the '
    'file in `data_dir` if there is one) or none',
  )
  text_features: str = _field(
    'auto', 'matrix of text features: like `visual_features`'
  )
  cold_items: float = _field(
    0.0,
    'share of the items held out of training and ranked at the end of '
    'the run, as new items',
    minimum=0.0,
    maximum=0.9,
    evidence='at 0.05 the HR@10 of the new items, sampled and among all, is '
    '0.48 and 0.06 with shrinkage of item_embedding, 0.00 and 0.00 without; '
    'docs/results.md',
  )
  new_clients: float = _field(
    0.0,
    'share of the clients held out of every cohort and ranked at the end of '
    'the run, each from its own history alone; drawn once, whatever the seed',
    minimum=0.0,
    maximum=0.9,
    evidence=NOT_MEASURED,
  )
  sampled_negatives: int = _field(
    100,
    'unseen items that each target is ranked against in the sampled protocol',
    minimum=1,
  )

  @property
  def synthetic(self) -> SyntheticData | None:
    """The embedded set, if it is that.

    Raises:
      UserError: an option of it is wrong.
    """
    name, given = parts.split(self.dataset)
    if name != SYNTHETIC:
      return None
    return parts.make(SyntheticData, given, f'`dataset={self.dataset}`')


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Settings):
  """Shape and variants of the model (docs/model.md)."""

  hidden_dim: int = _field(
    128,
    'D, width of all states',
    minimum=1,
    evidence='192: full NDCG@10 0.161 against 0.150 with all 6,040 users; 256: '
    'nothing with 1,000; docs/notebook.md',
  )
  num_blocks: int = _field(
    2,
    'transformer blocks of the backbone',
    minimum=1,
    evidence='3: full NDCG@10 0.138 against 0.150 after 20 rounds; '
    'docs/notebook.md',
  )
  num_heads: int = _field(
    4, 'attention heads of the backbone', minimum=1, evidence=NOT_MEASURED
  )
  max_seq_len: int = _field(
    50,
    'L, window of the backbone',
    minimum=1,
    evidence='200, one window a step instead of four: full NDCG@10 0.096 '
    'against 0.115 after 80 rounds; docs/notebook.md',
  )
  dropout: float = _field(
    0.2,
    'dropout rate everywhere',
    minimum=0.0,
    maximum=0.95,
    evidence='0.2 against 0: full NDCG@10 0.110 and 0.102 after 100 rounds; '
    'docs/notebook.md',
  )
  embedding_init_std: float = _field(
    0.1,
    'standard deviation of the initial item and position embeddings',
    minimum=0.0,
    evidence=NOT_MEASURED,
  )
  item_embedding: Part = _choice(
    (IdEmbedding, ContentInit, ContentPlusId),
    "what an item's embedding starts as; id: a random row; "
    'content_init: its features; content_plus_id: a trained projection of '
    'its features plus a row (models/content.py)',
    evidence='content_plus_id against id: full NDCG@10 +0.0021 [-0.0032, '
    '+0.0076]; collaborative_dim=32: +0.0032 [-0.0018, +0.0082]; '
    'id_dropout=0.2: -0.0026 [-0.0101, +0.0048], for new items (cold_items); '
    'shrinkage=1 against 0.1: -0.0006 [-0.0015, +0.0001], on Amazon Beauty, '
    'validation, against 0: +0.0016 [+0.0005, +0.0026]; docs/results.md. '
    'collaborative_window, collaborative_items, collaborative_columns and '
    'row_noise: for privacy, elsewhere within the noise; docs/notebook.md',
  )
  positions: AbsolutePositions | RelativePositions = _choice(
    (AbsolutePositions, RelativePositions),
    'how attention knows of order; absolute: an embedding of each '
    'position (the original); relative: a trained bias for each head and '
    'distance, which at the start prefers what is recent',
    evidence='relative: full NDCG@10 +0.0037 [-0.0008, +0.0081]; '
    'docs/results.md. start=recency with collaborative_dim=64 against a random '
    'start with 32: full NDCG@10 0.1224 and 0.1182 (three seeds), all users, '
    'validation, after 20 rounds 0.140 and 0.131; docs/results.md',
  )
  profile: Off | HistoryProfile = _choice(
    (Off, HistoryProfile),
    'what a client is beyond its window; history: a long-term expert for what '
    'lies outside of it (models/profile.py)',
    evidence='history: full NDCG@10 +0.0077 [+0.0011, +0.0144]; '
    'docs/results.md. Its weight: not measured',
  )
  experts: str = _field(
    'both',
    'which experts enhance the backbone, with commas between; visual and '
    'semantic (both) as far as there are features for them; any other name, as '
    'in visual,semantic,audio, reads audio_features.npy of the data folder '
    '(docs/extending.md); none: the plain backbone',
    evidence='both against none after 95 rounds: MovieLens-1M, 1,000 users, '
    'three seeds, full NDCG@10 +0.0027 [-0.0013, +0.0067], sampled HR@10 '
    '+0.0097 [+0.0013, +0.0183]; Amazon Beauty, three seeds, full NDCG@10 '
    '+0.0034 [+0.0018, +0.0050]; MicroLens-50k, one, +0.0022 [-0.0003, '
    '+0.0048]; '
    'docs/results.md',
  )
  expert_form: AttentionForm | SimilarityForm = _choice(
    (AttentionForm, SimilarityForm),
    'what an expert computes from the memory (models/experts.py); attention: '
    'all of it is learned (the original); similarity: it starts as the '
    'similarity of the candidate to the entries nearest to it',
    evidence='similarity against experts=none on Amazon Beauty after 30 '
    'rounds, full NDCG@10: 0.0392 against 0.0330; docs/results.md. '
    'features=components against centred: 0.104 and 0.101, within noise; '
    'docs/notebook.md',
  )
  router: ItemRouter = _choice(
    (ItemRouter,),
    'what weighs the experts where there are several (models/router.py)',
    evidence=NOT_MEASURED,
  )
  fusion: Residual | Gated = _choice(
    (Residual, Gated),
    'residual: adds the experts with full gradient; gated: '
    'multiplies them by a learned scalar (the original, for ablation)',
    evidence='gated: full NDCG@10 +0.0029 [+0.0002, +0.0058]; similarity=dot '
    '+0.0013 [-0.0061, +0.0089], on the validation item +0.0114 [+0.0033, '
    '+0.0195]; docs/results.md',
  )

  @property
  def expert_forms(self) -> dict[str, str]:
    """Name of each expert -> its form as module:Thing; '' = that of its name.

    Raises:
      UserError: a name twice, or one that is no plain word.
    """
    text = {'both': ','.join(ORIGINAL_EXPERTS), 'none': ''}.get(
      self.experts, self.experts
    )
    forms: dict[str, str] = {}
    for entry in _names(text):
      name, _, form = entry.partition('=')
      if not name.isidentifier() or name in ('both', 'none') or name in forms:
        raise UserError(
          f'`experts={self.experts}`: {name!r} is not one more name of an '
          'expert; write names with commas between, as in visual,semantic,audio'
        )
      forms[name] = form
    return forms


@dataclasses.dataclass(frozen=True)
class ClientConfig(_Settings):
  """Local training of one client."""

  local_epochs: int = _field(
    1,
    "passes over a client's positives in a round",
    minimum=1,
    evidence='2: full NDCG@10 0.110 against 0.107 after 40 rounds, for twice '
    'the time; docs/notebook.md',
  )
  batch_size: int = _field(
    32,
    'B, windows of a local step',
    minimum=1,
    evidence='4 against 1: full NDCG@10 0.117 and 0.111, within noise; '
    'docs/notebook.md',
  )
  objective: Objective = _choice(
    (LastItem, AllPositions),
    'last: a window predicts the item after it; all_positions: '
    'every position of a window predicts its next item',
    evidence='late_emphasis=0.8: full NDCG@10 0.137 against 0.134, within '
    'noise; docs/results.md. last against all_positions: not measured',
  )
  negatives: Negatives = _choice(
    (OwnNegatives, SharedNegatives),
    'per_sample: each target draws its own negatives; shared: '
    'one draw serves all targets of a step',
    evidence='leaky: a federated run gains 0.002 of full NDCG@10, a client '
    'that trains alone goes from 0.115 to 0.995 of sampled HR@10; '
    'docs/results.md. shared against per_sample: not measured',
  )
  vocabulary: str = _field(
    'dense',
    'rows of the item table that a client works on; dense: all, as the '
    'original; local: those it touches, so that the catalogue costs nothing '
    '(client/vocabulary.py says what else that changes)',
    choices=('dense', 'local'),
    evidence='local: a round takes 1.80 s instead of 1.96 s with 3,416 items, '
    '2.1 s instead of 3.5 s with 20,000; docs/performance.md',
  )
  num_negatives: int = _field(
    100,
    'N, negatives of a draw',
    minimum=1,
    evidence='MovieLens-1M: 400 against 100: full NDCG@10 0.075 and 0.068 '
    'after 40 rounds; 800 against 400: nothing; docs/notebook.md. Amazon '
    'Beauty: 800 against 200: 0.0519 and 0.0449; docs/results.md',
  )
  client_optimizer: ClientStep = _choice(
    (ClientAdam, ClientSGD),
    'local optimizer, fresh every round',
    evidence='FedAvg over a local epoch of Adam stays at a sampled HR@10 of '
    '0.33 to 0.38, small SGD steps with Muon at the server reach 0.66; '
    'docs/results.md, docs/notebook.md',
  )
  client_learning_rate: float = _field(
    1e-3,
    'learning rate of the local optimizer',
    minimum=0.0,
    evidence='SGD at 0.001, 0.03 and 0.3: full NDCG@10 0.068, 0.065 and 0.037 '
    'after 40 rounds; docs/notebook.md',
  )
  max_local_steps: int = _field(
    0,
    'local steps of an epoch at most, on windows drawn anew each round '
    '(0 = as many as a pass takes); a client weighs at most what so many hold',
    minimum=0,
    evidence=NOT_MEASURED,
  )
  client_schedule: Schedule = _choice(
    (Constant, Cosine, Linear),
    'how the client learning rate goes over the rounds (optimizers.py)',
    evidence='0.03 falling linearly, with the server rate falling too, against '
    'constant rates: full NDCG@10 0.111 and 0.110, within noise; '
    'docs/notebook.md',
  )
  drift_control: str = _field(
    'none',
    'what keeps local steps from drifting apart; fedprox,mu=0.01: mu / 2 * '
    '|params - server params|^2 in the local loss; scaffold: control '
    'variates, as much state as parameters for every client; mime_lite: local '
    "steps are the server optimizer's, with its moments held, and a server "
    'learning rate of 1 is the mean of the clients; or your own as '
    'my_package.module:Thing (client/drift.py)',
    evidence='mime_lite: full NDCG@10 0.032 against 0.075 without, one rate '
    'tried; docs/results.md. fedprox, scaffold: not measured',
  )
  freeze: str = _field(
    '',
    'what is not trained, with commas between: '
    + ', '.join(GROUPS)
    + '; paths of parameters (backbone/block_0), or your own as '
    'my_package.module:GROUP, a tuple of such paths',
    evidence='experts trained on a frozen backbone, then everything: full '
    'NDCG@10 0.0788 against 0.0810 of one run, not significant; '
    'docs/notebook.md',
  )

  @property
  def frozen_groups(self) -> tuple[str, ...]:
    return _names(self.freeze)


@dataclasses.dataclass(frozen=True)
class ServerConfig(_Settings):
  """Rounds, cohorts and aggregation."""

  num_rounds: int = _field(
    20,
    'federated rounds',
    minimum=1,
    evidence='20 and 100 rounds of recommended.flags: full NDCG@10 0.066 and '
    '0.097; docs/notebook.md',
  )
  client_fraction: float = _field(
    0.1,
    'share of the clients sampled in a round',
    minimum=1e-9,
    maximum=1.0,
    evidence='10, 100 and 1,000 clients a round take 0.22, 1.76 and 19.2 s; '
    'docs/performance.md. Quality: not measured',
  )
  aggregator: str = _field(
    'fedavg',
    "fedavg: a delta counts by its client's positives; fednova "
    '(Wang et al. 2020): divided by its local steps, so that a client with '
    'twice the positives counts twice, not four times; against attackers '
    'norm_bound, median_norm, median, trimmed_mean, krum, multi_krum or '
    'geometric_median (docs/robustness.md), with options as in '
    'krum,attackers=5; or your own as my_package.module:Thing,option=value',
    evidence='fednova: full NDCG@10 0.150 against 0.140 with all 6,040 users; '
    'docs/results.md',
  )
  server_optimizer: ServerStep = _choice(
    (ServerSGD, ServerMomentum, ServerAdam, ServerYogi, ServerMuon),
    'optimizer applied to the mean client delta (Reddi et al. '
    '2021); fedmuon: Muon for the weight matrices, Adam for the rest',
    evidence='fedmuon against fedadam: full NDCG@10 0.095 and 0.075 after 40 '
    'rounds; docs/results.md',
  )
  server_learning_rate: float = _field(
    1.0,
    'learning rate of the server optimizer',
    minimum=0.0,
    evidence='fedadam at 0.005 and 0.01: full NDCG@10 0.068 and 0.049 after 40 '
    'rounds; docs/notebook.md',
  )
  server_schedule: Schedule = _choice(
    (Constant, Cosine, Linear),
    'how the server learning rate goes over the rounds',
    evidence='0.01 falling as a cosine against 0.005 constant: full NDCG@10 '
    '0.106 and 0.102, within noise; docs/notebook.md',
  )
  partial_aggregation_warmup_rounds: int = _field(
    0,
    'for so many rounds only backbone and embeddings are aggregated',
    minimum=0,
    evidence=NOT_MEASURED,
  )
  clients_per_chunk: int = _field(
    10,
    'clients trained side by side in one vmap; bounds the memory of a '
    'round. Few fit the caches of a CPU, a GPU wants many',
    minimum=1,
    evidence='1, 2, 4, 10 and 20 on a CPU: 2.8, 1.8, 2.1, 2.3 and 2.4 s a '
    'round; docs/performance.md',
  )


@dataclasses.dataclass(frozen=True)
class FederationConfig(_Settings):
  """What happens to updates on the way to the server (`federation.uplink`)."""

  attack: str = _field(
    'none',
    'what a share of the clients does to mislead the server: random, '
    'sign_flip, label_flip, promotion, replacement or popular '
    '(docs/robustness.md), as in promotion,share=0.05; sleeping: nothing, to '
    'compare with; or your own as my_package.module:Thing,option=value',
    evidence=NOT_MEASURED,
  )
  failures: str = _field(
    'none',
    'how clients fail to answer, or answer badly. random: shares of them, '
    'drawn in each round (fixed=true: once), as drop=0.3 (before training), '
    'lose (their answer), late, straggle (they take `work` of their steps, 0.5 '
    'if not said), corrupt (corruption=nan, infinite, long or any); or your '
    'own as my_package.module:Thing; docs/failures.md',
    evidence='drop=0.3,corrupt=0.1: full NDCG@10 -0.0054 [-0.0099, -0.0009] of '
    '0.1002; docs/failures.md',
  )
  availability: str = _field(
    'always',
    'which clients can be asked in a round. day: by time of day, options '
    'share, swing, rounds and zones; trace: by a file, trace,file=…,period=0; '
    'or your own as my_package.module:Thing; docs/failures.md',
    evidence=NOT_MEASURED,
  )
  over_selection: float = _field(
    0.0,
    'so much more of a cohort is asked, and the round closes when '
    '`client_fraction` of the clients have answered (0.3: 130 are asked where '
    '100 are wanted)',
    minimum=0.0,
    evidence=NOT_MEASURED,
  )
  min_answers: int = _field(
    0,
    'a round in which fewer answers count changes nothing',
    minimum=0,
    evidence=NOT_MEASURED,
  )
  compression: str = _field(
    'none',
    'how what a client sends is made smaller; int8: stochastic rounding to 8 '
    'bits; quantised,bits=8,block=256,down=0: to 8, 4 or 2 bits, with a scale '
    'for each block of values; down=8: the parameters that clients receive, '
    'too; top_k,share=0.01: the largest values; low_rank,rank=4,iterations=2: '
    'matrices as products of narrow ones; error_feedback=true with these two: '
    'a client keeps what was left out for its next update; or your own as '
    'my_package.module:Thing (federation/compression.py)',
    evidence='int8: full NDCG@10 +0.0007 [-0.0014, +0.0029], 1/3.94 of the '
    'bytes up; docs/communication.md. The others: not measured',
  )
  sampling: str = _field(
    FIXED,
    'how a cohort is drawn; fixed: so many clients, without replacement; '
    'poisson: each client with the probability client_fraction (for privacy by '
    'far the cheapest); cyclic: shuffled groups take turns, so that nobody '
    'comes again before all others did',
    choices=(FIXED, POISSON, CYCLIC),
    evidence=NOT_MEASURED,
  )
  privacy: str = _field(
    'none',
    'differential privacy of each client (docs/privacy.md); clip: every '
    'update is bounded, nothing more; gaussian: and each round gets noise of '
    'its own; banded: noise that later rounds take back in part, for '
    '`sampling=cyclic`; options of them all: clip_norm=1, '
    'groups=embeddings:0.5+experts:1, quantile=0.5 (adaptive clipping), '
    'quantile_rate=0.2; of the noise: noise_multiplier, or `target_epsilon`, '
    'cohort and population that are assumed, sketch_noise for the sketch of '
    '`item_embedding`; of banded: bands',
    evidence=NOT_MEASURED,
  )
  target_epsilon: float = _field(
    0.0,
    'epsilon of the whole run, for which the noise of `privacy` is '
    'calibrated before round 1; 0 = its noise_multiplier says how much noise',
    minimum=0.0,
    evidence=NOT_MEASURED,
  )
  delta: str = _field(
    AUTO,
    'delta of (epsilon, delta) differential privacy, below 1/K of K clients; '
    'auto = 1/K^1.1',
    evidence=NOT_MEASURED,
  )
  rejection: str = _field(
    'absurd',
    'which updates the server leaves out of the sum and counts. absurd: those '
    'that are NaN or infinite, weigh less than nothing, or are longer than '
    '`times` the norm of all its parameters (times=0: of any length; 10 if '
    'nothing is said); none: it adds up whatever comes',
    evidence=NOT_MEASURED,
  )
  personal: str = _field(
    '',
    'parts of the model that stay with each client, which trains and uses its '
    'own, as named for `freeze` (FedPer)',
    evidence='router, 300 users of MovieLens-1M, 15 rounds, one seed: full '
    'NDCG@10 -0.0015 [-0.0083, +0.0044]; docs/personal.md',
  )

  @property
  def personal_groups(self) -> tuple[str, ...]:
    return _names(self.personal)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(_Settings):
  """When and how a run is evaluated and when it stops."""

  eval_every: int = _field(
    1,
    'rounds between validations (the last round is always validated)',
    minimum=1,
  )
  patience: int = _field(
    10,
    'stop at a validation that lies so many rounds after the best one '
    '(`select_by`); 0 = never',
    minimum=0,
    evidence='the best of ten validations instead of the last round: full '
    'NDCG@10 0.0918 against 0.0932; docs/notebook.md',
  )
  select_by: str = _field(
    'full/NDCG@10',
    'the validation metric whose best round is tested, as protocol/metric '
    '(full or sampled; HR and NDCG at any cut-off, or one of `metrics`); last: '
    'the last round is',
    evidence='sampled HR@10 chose a round with a full NDCG@10 of 0.034 on '
    'Amazon Beauty, where the last one has 0.039; docs/notebook.md',
  )
  eval_clients: int = _field(
    0, 'rank so many clients, drawn once from the seed (0 = all)', minimum=0
  )
  validation_clients: int = _field(
    0,
    'of these rank so many at the validations between, always the same; the '
    'figures at the end are of all (0 = all)',
    minimum=0,
  )
  metrics: str = _field(
    '',
    'ranking metrics beside HR, NDCG and MRR, with commas between; recbole: '
    'hit, recall, precision, mrr, map and ndcg as RecBole has them; or your '
    'own as my_package.module:Thing',
  )
  clients_per_eval_chunk: int = _field(
    16, 'clients ranked side by side', minimum=1
  )
  items_per_eval_block: int = _field(
    256,
    'items scored at a time for each of them; a block of clients and '
    'items should fit the caches of a CPU, a GPU wants larger ones',
    minimum=1,
  )

  @property
  def metric_names(self) -> tuple[str, ...]:
    return _names(self.metrics)

  @property
  def shown(self) -> tuple[str, str]:
    """(protocol, metric) that curves and costs are told of."""
    return self.selection or ('full', 'NDCG@10')

  @property
  def selection(self) -> tuple[str, str] | None:
    """(protocol, metric) by which the best round is chosen; None = the last.

    Raises:
      UserError: it is neither.
    """
    protocol, slash, metric = self.select_by.partition('/')
    if self.select_by == LAST_ROUND:
      return None
    if protocol not in ('full', 'sampled') or not (slash and metric):
      raise UserError(
        f'`select_by={self.select_by}` is neither {LAST_ROUND} nor '
        'protocol/metric, as in full/NDCG@10 or sampled/HR@10'
      )
    return protocol, metric


@dataclasses.dataclass(frozen=True)
class StartConfig(_Settings):
  """What a run starts from (see fedmmr_jax/runs/warm_start.py)."""

  pretrained_path: str = _field(
    '', 'another run to start from: its folder (its best round) or RUN/rounds/N'
  )
  load: str = _field(
    ALL_GROUPS,
    'what to take over from it, with commas between: '
    + ', '.join(GROUPS)
    + ' (all = each that this model has), '
    + f'{MEMORIES} (of all clients), and paths or your own as for freeze',
  )

  @property
  def load_groups(self) -> tuple[str, ...]:
    return _names(self.load)


@dataclasses.dataclass(frozen=True)
class RunConfig(_Settings):
  """Everything that determines a run's numbers."""

  seed: int = _field(
    0, 'seed of every random draw of the run', minimum=0, maximum=2**32 - 1
  )
  data: DataConfig = DataConfig()
  model: ModelConfig = ModelConfig()
  memory: MemoryRule = _choice(
    (SurpriseMemory, RecentMemory, TwoTierMemory, NoMemory),
    'what a client remembers of its positives; surprise: the '
    'hard ones (the original); recent: the last ones; two_tier: the last '
    'ones, and for long those unlike them (client/memory.py)',
    evidence='full NDCG@10 against surprise: recent -0.0001 [-0.0019, '
    '+0.0016], two_tier +0.0005 [-0.0019, +0.0028], none -0.0004 [-0.0028, '
    '+0.0018]; docs/results.md. Of sees=stored see there, Amazon Beauty; other '
    'options: not measured',
  )
  global_memory: Off | GlobalPrototypes = _choice(
    (Off, GlobalPrototypes),
    'what the semantic expert attends to beside the own memory; prototypes: '
    "clusters of all clients' memories (client/prototypes.py)",
    evidence=NOT_MEASURED,
  )
  contrastive: Contrastive | Off = _choice(
    (InstanceWeight, AdaptiveTemperature, Unweighted, Off),
    'the contrastive loss between the two experts, and how surprise enters it; '
    'none: there is no such loss',
    evidence='full NDCG@10 0.063 with it, 0.064 without; adaptive_temperature '
    'against instance_weight -0.0015 [-0.0036, +0.0005], unweighted -0.0004 '
    '[-0.0022, +0.0014]; docs/results.md',
  )
  client: ClientConfig = ClientConfig()
  server: ServerConfig = ServerConfig()
  federation: FederationConfig = FederationConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  start: StartConfig = StartConfig()
  keep: KeepSome | KeepAll = _choice(
    (KeepSome, KeepAll),
    'which saved rounds stay on disk; some: the last and every so many-th, and '
    'always the best',
  )

  def validate(self) -> 'RunConfig':
    """Returns self; raises UserError naming the first field out of bounds."""
    for _, field, value in walk_fields(self):
      _validate_field(field, value)
    m = self.model
    _ = m.expert_forms, self.evaluation.selection
    if m.hidden_dim % m.num_heads:
      raise UserError(
        f'`hidden_dim={m.hidden_dim}` is not a multiple of '
        f'`num_heads={m.num_heads}`'
      )
    form = m.expert_form
    if isinstance(form, AttentionForm) and m.hidden_dim % form.heads:
      raise UserError(
        f'`hidden_dim={m.hidden_dim}` is not a multiple of the heads of '
        f'`expert_form={form}`'
      )
    if self.global_memory and not isinstance(form, AttentionForm):
      raise UserError(
        f'`global_memory={self.global_memory}` needs `expert_form=attention`: '
        f'prototypes are no items, whose content `{form.name}` reads'
      )
    if (
      isinstance(m.item_embedding, ContentInit)
      and m.item_embedding.collaborative_dim > m.hidden_dim
    ):
      raise UserError(
        f'`item_embedding={m.item_embedding}`: collaborative_dim exceeds '
        f'`hidden_dim={m.hidden_dim}`'
      )
    if (
      isinstance(m.item_embedding, ContentInit)
      and 0
      < m.item_embedding.collaborative_columns
      < m.item_embedding.collaborative_dim
    ):
      raise UserError(
        f'`item_embedding={m.item_embedding}`: collaborative_columns are fewer '
        'than the directions of collaborative_dim'
      )
    if self.memory.fault():
      raise UserError(f'`memory={self.memory}`: {self.memory.fault()}')
    why_sgd = {
      'mime_lite': 'makes the local steps with the server optimizer',
      'scaffold': 'takes its control variates from plain local steps',
    }.get(parts.split(self.client.drift_control)[0])
    if why_sgd and not isinstance(self.client.client_optimizer, ClientSGD):
      raise UserError(
        f'`drift_control={self.client.drift_control}` {why_sgd}; '
        'say `client_optimizer=sgd`'
      )
    if self.start.load != ALL_GROUPS and not self.start.pretrained_path:
      raise UserError(
        f'`load={self.start.load}` needs `pretrained_path`, the '
        'run to load from'
      )
    if self.start.pretrained_path and not self.start.load_groups:
      raise UserError(
        '`load=` is empty; say what to take over from `pretrained_path`'
      )
    if set(self.client.frozen_groups) == set(GROUPS):
      raise UserError(f'`freeze={self.client.freeze}` leaves nothing to train')
    if set(self.federation.personal_groups) == set(GROUPS):
      raise UserError(
        f'`personal={self.federation.personal}` leaves the server nothing to '
        'train; keep less with the clients'
      )
    if not isinstance(self.data.split_by, LeaveOneOut) and self.data.cold_items:
      raise UserError('`cold_items` needs `split_by=leave_one_out`')
    if not (self.data.synthetic or self.data.data_dir):
      raise UserError(
        f'`dataset={self.data.dataset}` needs `data_dir`, the folder that '
        'holds its files, or its interaction file'
      )
    return self

  @property
  def decays(self) -> bool:
    """Whether a learning rate depends on the length of the run."""
    return not (
      isinstance(self.server.server_schedule, Constant)
      and isinstance(self.client.client_schedule, Constant)
    )

  @property
  def length_counts(self) -> bool:
    """Whether a round would be another one in a longer run."""
    return (
      self.decays
      or self.federation.target_epsilon > 0
      or parts.split(self.federation.privacy)[0] not in _ANY_LENGTH
    )

  def as_flat_dict(self) -> dict[str, Any]:
    """Name -> value of every setting, parts as text, for `config.json`."""
    return {
      field.name: str(value) if isinstance(value, Part) else value
      for _, field, value in walk_fields(self)
    }

  def changed(self, values: Mapping[str, Any]) -> 'RunConfig':
    """The settings with some of them changed, as `from_flat_dict` takes them; a
    part replaces the whole part that was there, options included."""
    return self.from_flat_dict(self.as_flat_dict() | dict(values))

  @classmethod
  def from_flat_dict(cls, values: Mapping[str, Any]) -> 'RunConfig':
    """Inverse of `as_flat_dict`; absent names keep their defaults.

    Any value may be given as text, as on a command line, and any setting by a
    former name (`RENAMED`).

    Raises:
      UserError: no field has a given name, or a text is not a valid value.
    """
    known = {field.name: (group, field) for group, field, _ in _FIELDS}
    groups: dict[str, dict[str, Any]] = {}
    for name, value in _translated(values).items():
      if name in GONE:
        raise UserError(f'`{name}` is gone: {GONE[name]}')
      if name not in known:
        raise UserError(f'unknown setting {name!r}')
      group, field = known[name]
      groups.setdefault(group, {})[name] = _parsed(field, value)
    top = groups.pop('', {})
    nested = {
      group: dataclasses.replace(getattr(cls(), group), **fields)
      for group, fields in groups.items()
    }
    return cls(**top, **nested)


def walk_fields(
  config: RunConfig,
) -> Iterator[tuple[str, dataclasses.Field, Any]]:
  """Yields (group attribute or '', field, value) of every setting."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if isinstance(value, _Settings):
      for inner in dataclasses.fields(value):  # type: ignore[arg-type]
        yield field.name, inner, getattr(value, inner.name)
    else:
      yield '', field, value


_FIELDS = tuple(walk_fields(RunConfig()))


def help_of(field: dataclasses.Field) -> str:
  """A setting's help: what it does, the options of its parts, and in brackets
  what is known of its effect."""
  meta = field.metadata
  told = meta['help']
  ways = [
    parts.usage(name, kind)
    for name, kind in (meta.get('parts') or meta.get('options', {})).items()
    if parts.options(kind)
  ]
  if ways:
    told += '. Options and their defaults: ' + '; '.join(ways)
  return told + (f' [{meta["evidence"]}]' if 'evidence' in meta else '')


# What a setting that is gone is called now, of a value {}; where parts name an
# option differently, each.
RENAMED: dict[str, tuple[str, ...]] = {
  'averaging': ('aggregator={}',),
  'synthetic_users': ('dataset=synthetic,users={}',),
  'synthetic_items': ('dataset=synthetic,items={}',),
  'user_column': ('dataset=csv,user={}',),
  'item_column': ('dataset=csv,item={}',),
  'time_column': ('dataset=csv,time={}',),
  'test_from': ('split_by=timeline,test_from={}',),
  'collaborative_dim': ('item_embedding=content_plus_id,collaborative_dim={}',),
  'collaborative_rounds': (
    'item_embedding=content_plus_id,collaborative_rounds={}',
  ),
  'profile_weight': ('profile=history,weight={}',),
  'semantic_heads': ('expert_form=attention,heads={}',),
  'visual_projection_dim': ('expert_form=attention,projection_dim={}',),
  'expert_input': ('expert_form=attention,input={}',),
  'expert_init_scale': (
    'expert_form=attention,scale={}',
    'expert_form=similarity,scale={}',
  ),
  'feature_scaling': (
    'expert_form=attention,features={}',
    'expert_form=similarity,features={}',
  ),
  'router_hidden_dim': ('router=item,hidden_dim={}',),
  'load_balance_weight': ('router=item,load_balance={}',),
  'similarity': ('fusion=residual,similarity={}', 'fusion=gated,similarity={}'),
  'late_emphasis': (
    'objective=last,late_emphasis={}',
    'objective=all_positions,late_emphasis={}',
  ),
  'leaky_negatives': (
    'negatives=per_sample,leaky={}',
    'negatives=shared,leaky={}',
  ),
  'weight_decay': (
    'client_optimizer=adam,weight_decay={}',
    'client_optimizer=sgd,weight_decay={}',
  ),
  'keep_last': ('keep=some,last={}',),
  'keep_every': ('keep=some,every={}',),
  'gating_init': ('fusion=gated,init={}',),
  'drift': ('contrastive={}',),
  'contrastive_weight': ('contrastive=instance_weight,weight={}',),
  'temperature': ('contrastive=instance_weight,temperature={}',),
  'surprise_scale': ('contrastive=instance_weight,surprise_scale={}',),
  'memory_capacity': ('memory=surprise,capacity={}',),
  'long_term_capacity': ('memory=two_tier,long_term_capacity={}',),
  'novelty_threshold': ('memory=two_tier,novelty_threshold={}',),
  'merge_similarity': ('memory=two_tier,merge_similarity={}',),
  'retrieval_size': ('memory=surprise,retrieval_size={}',),
  'surprise_threshold': ('memory=surprise,threshold={}',),
  'recency_weight': ('memory=surprise,recency_weight={}',),
  'frequency_weight': ('memory=surprise,frequency_weight={}',),
  'recency_time_constant': ('memory=surprise,recency_time_constant={}',),
  'num_prototypes': ('global_memory=prototypes,number={}',),
  'prototype_iterations': ('global_memory=prototypes,iterations={}',),
  'client_warmup_rounds': ('client_schedule=constant,warmup={}',),
  'server_warmup_rounds': ('server_schedule=constant,warmup={}',),
  'proximal_mu': ('drift_control=fedprox,mu={}',),
  'server_momentum': (
    'server_optimizer=fedavgm,momentum={}',
    'server_optimizer=fedadam,beta1={}',
  ),
  'server_beta2': ('server_optimizer=fedadam,beta2={}',),
  'server_epsilon': ('server_optimizer=fedadam,epsilon={}',),
}
# What is gone, and why nothing takes its place.
GONE = {
  'router_input': "the router reads the item's embedding, which holds content",
  'warm_memory': 'a memory that is asked always holds the latest items',
  'window_order': 'windows are shuffled; `memory=…,sees=past` hides what came '
  'later, whatever their order',
}
# What is gone, with the value that is what happens today.
_AS_TODAY = {('window_order', 'shuffled')}
# Values that are called otherwise.
_RENAMED_VALUES = {
  ('drift', 'none'): 'contrastive=unweighted',
  ('contrastive_weight', '0'): 'contrastive=none',
  ('proximal_mu', '0'): 'drift_control=none',
  ('keep_last', '0'): 'keep=all',
  ('global_memory', 'true'): 'global_memory=prototypes',
  ('global_memory', 'false'): 'global_memory=none',
}


def renamed(name: str, value: Any) -> tuple[str, ...]:
  """How an old setting is written now: 'setting=part,option=value'.

  More than one if parts name the option differently; none if name and value are
  current.
  """
  text = parts.written(value)
  try:
    zero = '0' if float(text) == 0 else text
  except ValueError:
    zero = text.lower()
  if (name, zero) in _RENAMED_VALUES:
    return (_RENAMED_VALUES[name, zero],)
  return tuple(line.format(text) for line in RENAMED.get(name, ()))


def _translated(values: Mapping[str, Any]) -> dict[str, Any]:
  """Settings by the names they had before, by today's.

  What is the option of a part that is not chosen is left out: it did nothing.
  """
  found = {
    name: x
    for name, x in values.items()
    if name not in RENAMED and (name, x) not in _AS_TODAY
  }
  options: dict[str, dict[str, str]] = {}
  for name in (*RENAMED, 'global_memory'):
    for line in renamed(name, values[name]) if name in values else ():
      setting, _, text = line.partition('=')
      part, given = parts.split(text)
      if setting == 'drift_control':
        if given and found.get(setting, 'none') == 'none':
          found[setting] = text
      elif given:
        options.setdefault(setting, {}).update(given)
      else:
        found[setting] = part
  for _, field, default in _FIELDS:
    if field.name in options:
      part, given = parts.split(str(found.get(field.name, default)))
      if field.name == 'dataset':  # named parts of other modules
        known = {'users', 'items'} if part == SYNTHETIC else set(COLUMNS)
        options['dataset'] = {k: x for k, x in options['dataset'].items() if x}
      else:
        known = set(parts.options(field.metadata['parts'].get(part)))
      given |= {k: x for k, x in options[field.name].items() if k in known}
      found[field.name] = ','.join(
        [part, *(f'{option}={x}' for option, x in given.items())]
      )
  return found


def _parsed(field: dataclasses.Field, value: Any) -> Any:
  """A setting, of the type of its default if it is given as text.

  Raises:
    UserError: it is none of that type.
  """
  if not isinstance(value, str) or 'parts' in field.metadata:
    return value
  try:
    return parts.parse(value, type(field.default))
  except ValueError as error:
    raise UserError(f'`{field.name}={value}` is not {error}') from None


def _names(text: str) -> tuple[str, ...]:
  return tuple(name.strip() for name in text.split(',') if name.strip())


def _validate_field(field: dataclasses.Field, value: Any) -> None:
  meta, place = field.metadata, f'`{field.name}={value}`'
  if isinstance(value, Part):
    parts.check(value, place)
  wrong = parts.fault(meta, value)
  if wrong:
    raise UserError(f'{place} {wrong}')
