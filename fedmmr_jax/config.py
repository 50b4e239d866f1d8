"""What a run is: frozen dataclasses, validated on the host.

Every field is also a command-line flag of the same name (`experiments/app.py`)
and a line of `config.json`; its help text lives here once. `choices`, `minimum`
and `maximum` of a field are enforced by `RunConfig.validate`.
"""

import dataclasses
import math
from typing import Any, Iterator

from fedmmr_jax.errors import UserError

SYNTHETIC = 'synthetic'
SCHEDULES = ('constant', 'cosine', 'linear')
# Names of `--load` and `--freeze`; which parameters they mean:
# models/feddmmr.py.
GROUPS = ('embeddings', 'backbone', 'experts', 'router', 'fusion')
ALL_GROUPS, MEMORIES = 'all', 'memories'


def _field(default: Any, help: str, **bounds: Any) -> Any:
  return dataclasses.field(default=default, metadata={'help': help, **bounds})


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which interactions and features a run reads."""

  dataset: str = _field(
    SYNTHETIC,
    'the embedded set, or the format of the files in --data_dir '
    '(see fedmmr_jax/data/formats.py), or a format of your own as '
    'my_package.module:Thing; auto: tell it by the file',
  )
  data_dir: str = _field(
    '', 'folder of the data set, or its interaction file (unused by synthetic)'
  )
  user_column: str = _field(
    '',
    'column of the user ids, of formats with named columns; empty: one of '
    'the usual names',
  )
  item_column: str = _field('', 'column of the item ids, likewise')
  time_column: str = _field('', 'column of the timestamps, likewise')
  item_file: str = _field(
    '',
    "file with the items' titles and texts; empty: the one in data_dir, "
    'if there is one',
  )
  k_core: int = _field(
    0,
    'keep users with so many interactions and items with so many in '
    'training, counted among what is left (0 = all)',
    minimum=0,
  )
  min_interactions: int = _field(
    3, 'keep users with so many interactions, held-out ones included', minimum=3
  )
  top_k_users: int = _field(
    0,
    'of these keep the k most active, ties: lower id first (0 = all)',
    minimum=0,
  )
  split_by: str = _field(
    'leave_one_out',
    'what is held out of training; leave_one_out: each '
    "client's last two items; timeline: everything from --test_from on, and "
    'the last item before it for validation',
    choices=('leave_one_out', 'timeline'),
  )
  test_from: str = _field(
    '', 'date of --split_by=timeline (2000-12-31, UTC) or seconds since 1970'
  )
  visual_features: str = _field(
    'auto',
    'visual feature matrix: a .npy path that must exist, auto (the '
    'file in data_dir if there is one) or none',
  )
  text_features: str = _field(
    'auto', 'text feature matrix: like --visual_features'
  )
  cold_items: float = _field(
    0.0,
    'share of the items held out of training and ranked at the end of '
    'the run, as new items',
    minimum=0.0,
    maximum=0.9,
  )
  feature_scaling: str = _field(
    'none',
    'what the experts see; centred: features minus their mean over '
    'the catalogue, then of mean square length 1 (missing ones stay zero); '
    'components: of these the first D principal components',
    choices=('none', 'centred', 'components'),
  )
  synthetic_users: int = _field(400, 'users of the synthetic set', minimum=2)
  synthetic_items: int = _field(300, 'items of the synthetic set', minimum=40)
  sampled_negatives: int = _field(
    100,
    'unseen items each target is ranked against in the sampled protocol',
    minimum=1,
  )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape and variants of the model (docs/model.md)."""

  hidden_dim: int = _field(128, 'D, width of all states', minimum=1)
  num_blocks: int = _field(2, 'transformer blocks of the backbone', minimum=1)
  num_heads: int = _field(4, 'attention heads of the backbone', minimum=1)
  max_seq_len: int = _field(50, 'L, window of the backbone', minimum=1)
  semantic_heads: int = _field(
    8, 'attention heads of the semantic expert', minimum=1
  )
  visual_projection_dim: int = _field(
    128, 'query and key width of the visual expert', minimum=1
  )
  router_hidden_dim: int = _field(
    128, 'first hidden width of the router; the second is half', minimum=2
  )
  dropout: float = _field(
    0.2, 'dropout rate everywhere', minimum=0.0, maximum=0.95
  )
  embedding_init_std: float = _field(
    0.1, 'std of the initial item and position embeddings', minimum=0.0
  )
  item_embedding: str = _field(
    'id',
    "what an item's embedding starts as; id: a random row; "
    'content_init: its features; content_plus_id: a trained projection of '
    'its features plus a row (see fedmmr_jax/models/content.py)',
    choices=('id', 'content_init', 'content_plus_id'),
  )
  collaborative_dim: int = _field(
    0,
    "so many of the D directions of the content are the items' "
    'co-occurrence in histories, sketched before round 1; none with '
    '--item_embedding=id (see fedmmr_jax/federation/collaborative.py)',
    minimum=0,
  )
  collaborative_rounds: int = _field(
    5, 'cohorts that the sketch asks, each client once', minimum=1
  )
  positions: str = _field(
    'absolute',
    'how attention knows of order; absolute: an embedding of each '
    'position (the original); relative: a trained bias of each head and '
    'distance, which starts as more or less recent',
    choices=('absolute', 'relative'),
  )
  profile: str = _field(
    'none',
    'history: a long-term expert for what lies outside of the window '
    '(see fedmmr_jax/models/profile.py)',
    choices=('none', 'history'),
  )
  experts: str = _field(
    'both',
    'which experts enhance the backbone, as far as there are '
    'features for them; none: the plain backbone',
    choices=('both', 'visual', 'semantic', 'none'),
  )
  expert_input: str = _field(
    'memory',
    "what an expert's output is made of; memory: what it read "
    "there (the original); candidate: that and the candidate's own feature",
    choices=('memory', 'candidate'),
  )
  router_input: str = _field(
    'embedding',
    "what the router looks at; embedding: the item's (the "
    'original); features: its image and text too',
    choices=('embedding', 'features'),
  )
  expert_init_scale: float = _field(
    1.0,
    'initial scale of the LayerNorm behind each expert: how much of the '
    'fused vector is theirs at the start',
    minimum=0.0,
  )
  similarity: str = _field(
    'cosine',
    "how the fused vector meets an item's embedding; cosine: √D "
    'times their cosine (the original); dot: their inner product, as it is '
    'without experts',
    choices=('cosine', 'dot'),
  )
  fusion: str = _field(
    'residual',
    'residual adds the experts with full gradient; gated '
    'multiplies them by a learned scalar (the original, for ablation)',
    choices=('residual', 'gated'),
  )
  gating_init: float = _field(
    0.1, 'initial value of the gate of --fusion=gated'
  )
  global_memory: bool = _field(
    False, 'let the semantic expert attend to the global prototypes'
  )


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The training objective (docs/model.md, Losses)."""

  drift: str = _field(
    'instance_weight',
    'how surprise enters the contrastive loss',
    choices=('instance_weight', 'adaptive_temperature', 'none'),
  )
  temperature: float = _field(
    0.07, 'temperature of the contrastive loss', minimum=1e-4
  )
  surprise_scale: float = _field(
    0.5, 'alpha of the instance weight 1 + alpha * surprise', minimum=0.0
  )
  contrastive_weight: float = _field(
    0.1, 'weight of the contrastive loss', minimum=0.0
  )
  load_balance_weight: float = _field(
    0.01, 'weight of the load balance loss', minimum=0.0
  )
  late_emphasis: float = _field(
    0.0,
    'e: the recommendation loss of a target counts 1 - e at the start of '
    "its client's history, 1 + e at its end, in between in proportion",
    minimum=0.0,
    maximum=1.0,
  )
  profile_weight: float = _field(
    0.3, 'weight of the loss of the long-term expert alone', minimum=0.0
  )


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """A client's memory and its prototypes (docs/model.md, Client memory)."""

  memory: str = _field(
    'surprise',
    'what a client remembers of its positives; surprise: the '
    'hard ones (the original); recent: the last ones; two_tier: the last '
    'ones, and for long those unlike them (see fedmmr_jax/client/memory.py)',
    choices=('surprise', 'recent', 'two_tier', 'none'),
  )
  memory_capacity: int = _field(
    50, 'M, slots of a memory; of two_tier the short-term ones', minimum=1
  )
  long_term_capacity: int = _field(
    50, 'further, long-term slots of two_tier', minimum=1
  )
  novelty_threshold: float = _field(
    0.4,
    'two_tier stores for long what has a novelty, 1 - the largest '
    'cosine to the short term, of at least this',
    minimum=0.0,
    maximum=2.0,
  )
  merge_similarity: float = _field(
    0.95,
    'cosine from which two_tier merges long-term entries',
    minimum=0.0,
    maximum=1.0,
  )
  retrieval_size: int = _field(
    20, 'R, entries the experts attend to', minimum=1
  )
  surprise_threshold: float = _field(
    0.3, 'a positive whose pairwise loss is below is not remembered'
  )
  recency_weight: float = _field(0.6, 'weight of recency in utility')
  frequency_weight: float = _field(0.4, 'weight of frequency in utility')
  recency_time_constant: float = _field(
    60.0, 'processed samples after which recency falls to 1/e', minimum=1e-6
  )
  num_prototypes: int = _field(
    5, 'P, prototypes of a client and of the server', minimum=1
  )
  prototype_iterations: int = _field(10, 'k-means iterations', minimum=1)
  warm_memory: bool = _field(
    False,
    'fill the memories of clients that were never sampled by a '
    'forward pass over their training history before evaluation',
  )

  @property
  def num_slots(self) -> int:
    """M; of two_tier the short-term and then the long-term slots."""
    return self.memory_capacity + (
      self.long_term_capacity if self.memory == 'two_tier' else 0
    )


@dataclasses.dataclass(frozen=True)
class ClientConfig:
  """Local training of one client."""

  local_epochs: int = _field(1, 'passes over the own positives', minimum=1)
  batch_size: int = _field(32, 'B, windows of a local step', minimum=1)
  window_order: str = _field(
    'shuffled',
    'in which order a pass takes its windows; chronological: '
    'the memory then holds what came before the window, as it does when '
    'the client is asked for a recommendation',
    choices=('shuffled', 'chronological'),
  )
  objective: str = _field(
    'last',
    'last: a window predicts the item after it; all_positions: '
    'every position of a window predicts its next item',
    choices=('last', 'all_positions'),
  )
  negatives: str = _field(
    'per_sample',
    'per_sample: each target draws its own negatives; shared: '
    'one draw a step serves all its targets',
    choices=('per_sample', 'shared'),
  )
  vocabulary: str = _field(
    'dense',
    'rows of the item table a client works on; dense: all, as the '
    'original; local: those it touches, so that the catalogue costs nothing '
    '(see fedmmr_jax/client/vocabulary.py for what that changes)',
    choices=('dense', 'local'),
  )
  num_negatives: int = _field(100, 'N, negatives of a draw', minimum=1)
  leaky_negatives: bool = _field(
    False,
    'never draw the held-out items as negatives either, as the '
    'original does; measures what that leak is worth',
  )
  client_optimizer: str = _field(
    'adam', 'local optimizer, fresh every round', choices=('adam', 'sgd')
  )
  client_learning_rate: float = _field(
    1e-3, 'learning rate of the local optimizer', minimum=0.0
  )
  weight_decay: float = _field(
    1e-5, 'L2 term added to the local gradient', minimum=0.0
  )
  max_local_steps: int = _field(
    0,
    'local steps of an epoch at most, on windows drawn anew each round '
    '(0 = as many as a pass takes); a client weighs what so many hold at '
    'most',
    minimum=0,
  )
  client_schedule: str = _field(
    'constant',
    'how the client learning rate falls over the rounds (see '
    'fedmmr_jax/optimizers.py)',
    choices=SCHEDULES,
  )
  client_warmup_rounds: int = _field(
    0,
    'rounds over which the client learning rate rises to its value',
    minimum=0,
  )
  proximal_mu: float = _field(
    0.0,
    'FedProx: mu / 2 * |params - server params|^2 in the local loss',
    minimum=0.0,
  )
  drift_control: str = _field(
    'none',
    'scaffold: control variates, as much state as parameters for '
    "every client; mime_lite: local steps are the server optimizer's, with "
    'its moments held, and --server_learning_rate=1 is the mean of the '
    'clients; or your own as my_package.module:Thing (see '
    'fedmmr_jax/client/drift.py)',
  )
  freeze: str = _field(
    '',
    'what is not trained, with commas between: '
    + ', '.join(GROUPS)
    + '; paths of parameters (backbone/block_0), or your own as '
    'my_package.module:GROUP, a tuple of such paths',
  )

  @property
  def frozen_groups(self) -> tuple[str, ...]:
    return _names(self.freeze)


@dataclasses.dataclass(frozen=True)
class ServerConfig:
  """Rounds, cohorts and aggregation."""

  num_rounds: int = _field(20, 'federated rounds', minimum=1)
  client_fraction: float = _field(
    0.1, 'share of the clients sampled in a round', minimum=1e-9, maximum=1.0
  )
  aggregator: str = _field(
    'fedavg',
    "fedavg: a delta counts by its client's positives; fednova "
    '(Wang et al. 2020): divided by its local steps, so that a client with '
    'twice the positives counts twice, not four times; or your own as '
    'my_package.module:Thing',
  )
  server_optimizer: str = _field(
    'fedavg',
    'optimizer applied to the mean client delta (Reddi et al. '
    '2021); fedmuon: Muon for the weight matrices, Adam for the rest',
    choices=('fedavg', 'fedavgm', 'fedadam', 'fedyogi', 'fedmuon'),
  )
  server_learning_rate: float = _field(
    1.0, 'learning rate of the server optimizer', minimum=0.0
  )
  server_schedule: str = _field(
    'constant',
    'how the server learning rate falls over the rounds',
    choices=SCHEDULES,
  )
  server_warmup_rounds: int = _field(
    0,
    'rounds over which the server learning rate rises to its value',
    minimum=0,
  )
  server_momentum: float = _field(
    0.9,
    'momentum of fedavgm, beta 1 of the others',
    minimum=0.0,
    maximum=0.9999,
  )
  server_beta2: float = _field(
    0.99, 'beta 2 of the adaptive ones', minimum=0.0, maximum=0.99999
  )
  server_epsilon: float = _field(
    1e-8,
    'epsilon of the adaptive ones; compared with deltas divided by '
    'the client learning rate, that is, with sums of gradients',
    minimum=1e-30,
  )
  partial_aggregation_warmup_rounds: int = _field(
    0,
    'for so many rounds only backbone and embeddings are aggregated',
    minimum=0,
  )
  clients_per_chunk: int = _field(
    10,
    'clients trained side by side in one vmap; bounds the memory of a '
    'round. Few fit the caches of a CPU, a GPU wants many',
    minimum=1,
  )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """When a run is evaluated and when it stops."""

  eval_every: int = _field(
    1,
    'rounds between validations (the last round is always validated)',
    minimum=1,
  )
  patience: int = _field(
    10,
    'stop at a validation that lies so many rounds after the one with '
    'the best HR@10 (sampled); 0 = never',
    minimum=0,
  )
  eval_clients: int = _field(
    0, 'rank so many clients, drawn once from the seed (0 = all)', minimum=0
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


@dataclasses.dataclass(frozen=True)
class StartConfig:
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
class CheckpointConfig:
  """Which rounds stay on disk; the best one always does."""

  keep_last: int = _field(5, 'keep the last n rounds (0 = all)', minimum=0)
  keep_every: int = _field(10, 'and every m-th (0 = none)', minimum=0)


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Everything that determines a run's numbers."""

  seed: int = _field(
    0, 'seed of every random draw of the run', minimum=0, maximum=2**32 - 1
  )
  data: DataConfig = DataConfig()
  model: ModelConfig = ModelConfig()
  loss: LossConfig = LossConfig()
  memory: MemoryConfig = MemoryConfig()
  client: ClientConfig = ClientConfig()
  server: ServerConfig = ServerConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  start: StartConfig = StartConfig()
  checkpoints: CheckpointConfig = CheckpointConfig()

  def validate(self) -> 'RunConfig':
    """Returns self; raises UserError naming the first field out of bounds."""
    for _, field, value in walk_fields(self):
      _validate_field(field, value)
    m = self.model
    for heads in ('num_heads', 'semantic_heads'):
      if m.hidden_dim % getattr(m, heads):
        raise UserError(
          f'--hidden_dim={m.hidden_dim} is not a multiple of '
          f'--{heads}={getattr(m, heads)}'
        )
    if m.collaborative_dim > m.hidden_dim:
      raise UserError(
        f'--collaborative_dim={m.collaborative_dim} exceeds '
        f'--hidden_dim={m.hidden_dim}'
      )
    if self.memory.memory == 'two_tier' and (
      self.memory.retrieval_size // 2 > self.memory.long_term_capacity
    ):
      raise UserError(
        f'half of --retrieval_size={self.memory.retrieval_size} exceeds '
        f'--long_term_capacity={self.memory.long_term_capacity}'
      )
    if self.memory.retrieval_size > self.memory.memory_capacity:
      raise UserError(
        f'--retrieval_size={self.memory.retrieval_size} exceeds '
        f'--memory_capacity={self.memory.memory_capacity}'
      )
    why_sgd = {
      'mime_lite': 'makes the local steps with the server optimizer',
      'scaffold': 'takes its control variates from plain local steps',
    }.get(self.client.drift_control)
    if why_sgd and self.client.client_optimizer != 'sgd':
      raise UserError(
        f'--drift_control={self.client.drift_control} {why_sgd}; '
        'say --client_optimizer=sgd'
      )
    if self.client.proximal_mu and self.client.drift_control != 'none':
      raise UserError(
        f'--proximal_mu={self.client.proximal_mu} is a drift control of its '
        f'own; leave out --drift_control={self.client.drift_control}'
      )
    if self.start.load != ALL_GROUPS and not self.start.pretrained_path:
      raise UserError(
        f'--load={self.start.load} needs --pretrained_path, the '
        'run to load from'
      )
    if self.start.pretrained_path and not self.start.load_groups:
      raise UserError(
        '--load= is empty; say what to take over from --pretrained_path'
      )
    if set(self.client.frozen_groups) == set(GROUPS):
      raise UserError(f'--freeze={self.client.freeze} leaves nothing to train')
    if (self.data.split_by == 'timeline') != bool(self.data.test_from):
      raise UserError(
        '--split_by=timeline and --test_from, its date, go together'
      )
    if self.data.split_by == 'timeline' and self.data.cold_items:
      raise UserError('--cold_items needs --split_by=leave_one_out')
    if self.data.dataset != SYNTHETIC and not self.data.data_dir:
      raise UserError(
        f'--dataset={self.data.dataset} needs --data_dir, the folder that '
        'holds its files, or its interaction file'
      )
    return self

  @property
  def decays(self) -> bool:
    """Does a learning rate depend on the length of the run?"""
    return (
      self.server.server_schedule != 'constant'
      or self.client.client_schedule != 'constant'
    )

  def as_flat_dict(self) -> dict[str, Any]:
    """Flag name -> value, for `config.json`."""
    return {field.name: value for _, field, value in walk_fields(self)}

  @classmethod
  def from_texts(cls, texts: dict[str, str], **values: Any) -> 'RunConfig':
    """From settings given as text, as on a command line, and others as values.

    Raises:
      UserError: a name that no field bears, or a text that is no value of it.
    """
    defaults = cls().as_flat_dict()
    parsed = {
      name: _parse(text, defaults[name], name) if name in defaults else text
      for name, text in texts.items()
    }
    return cls.from_flat_dict(parsed | values)

  @classmethod
  def from_flat_dict(cls, values: dict[str, Any]) -> 'RunConfig':
    """Inverse of `as_flat_dict`; absent names keep their defaults.

    Raises:
      UserError: a name that no field bears.
    """
    known = {field.name: group for group, field, _ in walk_fields(cls())}
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
      if name not in known:
        raise UserError(f'unknown setting {name!r}')
      groups.setdefault(known[name], {})[name] = value
    top = groups.pop('', {})
    nested = {
      group: dataclasses.replace(getattr(cls(), group), **fields)
      for group, fields in groups.items()
    }
    return cls(**top, **nested)


def _parse(text: str, like: Any, name: str) -> Any:
  """A setting given as text, of the type of its default.

  Raises:
    UserError: it is none of that type.
  """
  try:
    if isinstance(like, bool):
      return {'true': True, 'false': False}[text.lower()]
    return type(like)(text)
  except (ValueError, KeyError):
    raise UserError(f'--{name}={text}: not a {type(like).__name__}') from None


def walk_fields(
  config: RunConfig,
) -> Iterator[tuple[str, dataclasses.Field, Any]]:
  """Yields (group attribute or '', field, value) of every setting."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      for inner in dataclasses.fields(value):
        yield field.name, inner, getattr(value, inner.name)
    else:
      yield '', field, value


def _names(text: str) -> tuple[str, ...]:
  return tuple(name.strip() for name in text.split(',') if name.strip())


def _validate_field(field: dataclasses.Field, value: Any) -> None:
  meta = field.metadata
  if 'choices' in meta and value not in meta['choices']:
    raise UserError(
      f'--{field.name}={value} is unknown; choose from '
      + ', '.join(meta['choices'])
    )
  if 'minimum' in meta and value < meta['minimum']:
    raise UserError(
      f'--{field.name}={value} is below its minimum {meta["minimum"]}'
    )
  if 'maximum' in meta and value > meta['maximum']:
    raise UserError(
      f'--{field.name}={value} is above its maximum {meta["maximum"]}'
    )
  if isinstance(value, float) and not math.isfinite(value):
    raise UserError(f'--{field.name}={value} is not a finite number')
