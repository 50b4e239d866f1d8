"""A config and a data set bound to the jitted functions that use them."""

import dataclasses
import functools
import time
from typing import Any, cast, Iterator, Mapping, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax import optimizers
from fedmmr_jax.client import drift as drift_lib
from fedmmr_jax.client import personal as personal_lib
from fedmmr_jax.client.drift import DriftControl
from fedmmr_jax.client.update import ClientProgram
from fedmmr_jax.client.vocabulary import ITEM_TABLE
from fedmmr_jax.client.windows import num_positives
from fedmmr_jax.config import (
  AUTO,
  ClientConfig,
  Constant,
  ContentInit,
  ContentPlusId,
  DataConfig,
  EvaluationConfig,
  FederationConfig,
  FIXED,
  Given,
  KeepSome,
  ORIGINAL_EXPERTS,
  RunConfig,
  StartConfig,
  Timeline,
  TwoTierMemory,
)
from fedmmr_jax.data import dataset as dataset_lib
from fedmmr_jax.data.cold import ColdSplit
from fedmmr_jax.data.dataset import Dataset, FederatedData, taking_part
from fedmmr_jax.data.load import Loaded
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import local_only, popularity, ranking
from fedmmr_jax.evaluation.ranking import Ranks, Targets
from fedmmr_jax.federation import (
  aggregators,
  cohorts,
  collaborative,
  communication,
  devices,
  robust,
  uplink,
)
from fedmmr_jax.federation import availability as availability_lib
from fedmmr_jax.federation import failures as failures_lib
from fedmmr_jax.federation import privacy as privacy_lib
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.federation import transforms as transforms_lib
from fedmmr_jax.federation.aggregators import Aggregator, FedAvg
from fedmmr_jax.federation.attacks import Attack
from fedmmr_jax.federation.availability import Availability
from fedmmr_jax.federation.communication import Traffic
from fedmmr_jax.federation.failures import Answers, Failures
from fedmmr_jax.federation.privacy import Plan
from fedmmr_jax.federation.round import FederationState, RoundProgram
from fedmmr_jax.federation.server import ServerState
from fedmmr_jax.federation.transforms import Transforms
from fedmmr_jax.metrics import Metric
from fedmmr_jax.models import content as content_lib
from fedmmr_jax.models import experts as experts_lib
from fedmmr_jax.models import groups, shrinkage
from fedmmr_jax.models.feddmmr import Catalogue, FedDMMR
from fedmmr_jax.models.shrinkage import Neighbours
from fedmmr_jax.runs import warm_start as warm_start_lib
from fedmmr_jax.runs.warm_start import WarmStart
from fedmmr_jax.streams import generator, Stream

NEW_CLIENTS = 'new_clients'  # a split


class _Ranked(NamedTuple):
  """What a split is ranked on."""

  dataset: Dataset
  data: FederatedData
  targets: Targets


class Round(NamedTuple):
  """A finished round of training.

  Attributes:
    number: 1-based.
    state: after it.
    metrics: name -> mean over the cohort's steps, for some a list of means;
      None if nothing was counted.
    cohort: [G, C/G] int32 clients that trained and answered; PADDING_CLIENT
      elsewhere.
    seconds: duration.
    work: [K] share of its steps that each of them took; None = all.
  """

  number: int
  state: FederationState
  metrics: dict[str, float | list[float] | None]
  cohort: np.ndarray
  seconds: float
  work: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)  # it holds arrays
class Simulation:
  """Federated learning over one data set.

  Attributes:
    config: all settings.
    model: the architecture, fitted to the data set's widths.
    catalogue: item features on the device.
    data: the clients' data on the device.
    dataset: the host's side of `data`.
    cold: items held out of training, with `cold_items`.
    aggregator: how a cohort's updates are combined.
    drift: the drift control.
    transforms: what an update passes on its way to the aggregator.
    privacy: what bounds and hides each client; None without.
    metrics: further ranking metrics besides HR, NDCG and MRR.
  """

  config: RunConfig
  model: FedDMMR
  catalogue: Catalogue
  data: FederatedData
  dataset: Dataset
  cold: ColdSplit | None = None
  aggregator: Aggregator = FedAvg()
  drift: DriftControl = DriftControl()
  transforms: Transforms = ()
  privacy: Plan | None = None
  metrics: tuple[Metric, ...] = ()
  # Of `ready_to_rank`.
  _ready: tuple[ServerState, ServerState, Catalogue] | None = dataclasses.field(
    default=None, init=False, repr=False
  )

  @classmethod
  def of(
    cls,
    config: RunConfig,
    data: Dataset | Loaded,
    aggregator: Aggregator | None = None,
    drift: DriftControl | None = None,
    metrics: Sequence[Metric] | None = None,
  ) -> 'Simulation':
    """A simulation of federated learning over a data set.

    Args:
      config: settings, as from `preset`.
      data: from `load` or `Dataset.of`.
      aggregator: one of your own, instead of the one that the config names.
      drift: a drift control of your own, likewise.
      metrics: further ranking metrics of your own, likewise.

    Raises:
      UserError: see `build`.
    """
    loaded = (
      (data, None) if isinstance(data, Dataset) else (data.dataset, data.cold)
    )
    return build(
      config, *loaded, aggregator=aggregator, drift=drift, metrics=metrics
    )

  @functools.cached_property
  def num_train(self) -> np.ndarray:
    """[K] training items of each client, on the host."""
    return self.dataset.num_train

  @functools.cached_property
  def num_taking_part(self) -> int:
    """Clients that cohorts are drawn of."""
    return len(taking_part(self.num_train, self.config.data.new_clients))

  @functools.cached_property
  def max_items(self) -> int:
    """H, the longest client's number of interactions."""
    return self.dataset.max_items

  @property
  def compiled_config(self) -> RunConfig:
    """The config without what no compiled function reads, so that a different
    seed, run length or data folder triggers no compilation."""
    server = dataclasses.replace(
      self.config.server, client_fraction=1.0, aggregator='fedavg'
    )
    # `transforms` and `aggregator` know of it, or the host does.
    unsimulated = FederationConfig()
    federation = dataclasses.replace(
      self.config.federation,
      attack='none',
      sampling=FIXED,
      failures=unsimulated.failures,
      availability=unsimulated.availability,
      over_selection=unsimulated.over_selection,
      rejection=unsimulated.rejection,
      privacy=privacy_lib.OFF,
      target_epsilon=0.0,
      delta=AUTO,
    )
    if not self.config.decays:
      server = dataclasses.replace(server, num_rounds=1)
    evaluation_ = EvaluationConfig(
      items_per_eval_block=self.config.evaluation.items_per_eval_block
    )
    # The leak is in the data: what negatives avoid.
    client = dataclasses.replace(
      self.config.client,
      negatives=dataclasses.replace(self.config.client.negatives, leaky=False),
    )
    return dataclasses.replace(
      self.config,
      seed=0,
      data=DataConfig(),
      evaluation=evaluation_,
      client=client,
      server=server,
      federation=federation,
      start=StartConfig(),
      keep=KeepSome(),
    )

  @functools.cached_property
  def program(self) -> RoundProgram:
    """The static parts of a round."""
    return RoundProgram(
      ClientProgram(self.model, self.compiled_config, self.drift),
      self.aggregator,
      self.max_items,
      self.transforms,
    )

  def init_state(self) -> FederationState:
    """State before round 1: drawn from the seed, then the warm start on top.

    Raises:
      UserError: see `warm_start`.
    """
    state = self._fresh_state()
    if self.warm_start:
      state = self.warm_start.put_into(state)
      # What is loaded is what all clients start from.
      state = state._replace(
        personal=personal_lib.of_each(
          state.server.params,
          self.config.federation.personal_groups,
          self.dataset.num_clients,
        )
      )
    return devices.copied(state)

  @functools.cached_property
  def abstract_state(self) -> FederationState:
    """Shapes and types of a state; nothing is drawn or read."""
    return jax.eval_shape(self._fresh_state)

  @functools.cached_property
  def warm_start(self) -> WarmStart | None:
    """The parameters from `pretrained_path`, read once; None without it.

    Raises:
      UserError: it cannot be loaded as asked.
    """
    if not self.config.start.pretrained_path:
      return None
    return warm_start_lib.load(
      self.config, self.dataset, self.abstract_state, self.catalogue.content
    )

  def _fresh_state(self) -> FederationState:
    return round_lib.init(
      self.program, self.catalogue, self.config.seed, self.dataset.num_clients
    )

  def sample_cohort(self, round_number: int) -> np.ndarray:
    """[G, C/G] int32 clients that a round (1-based) asks."""
    return round_lib.sample_cohort(
      self.config,
      round_number,
      self.num_train,
      self.availability.there(
        self.config.seed, round_number, self.dataset.user_ids
      ),
    )

  @functools.cached_property
  def failures(self) -> Failures:
    """How clients fail."""
    return failures_lib.of(self.config)

  @functools.cached_property
  def availability(self) -> Availability:
    """Who can be asked in a round."""
    return availability_lib.of(self.config)

  @property
  def cohort_size(self) -> int:
    """C, how many clients are wanted in a round."""
    return cohorts.cohort_size(self.config, self.num_taking_part)

  @property
  def largest_cohort(self) -> int:
    """The most clients that a round has room for."""
    return cohorts.most(self.config, self.num_taking_part)

  def answers(self, round_number: int, cohort: np.ndarray) -> Answers:
    """What comes back from the cohort [G, C/G] of a round (1-based)."""
    return failures_lib.answers(
      self.failures,
      self.config.seed,
      round_number,
      cohort,
      self.dataset.num_clients,
      self.cohort_size if self.config.federation.over_selection else None,
    )

  def count_targets(
    self, cohort: np.ndarray, work: np.ndarray | None = None
  ) -> int:
    """Number of positives that a round with this cohort trains on, each counted
    in every epoch.

    Args:
      cohort: [G, C/G], PADDING_CLIENT where none.
      work: [K] share of its steps that each client takes; None = all.
    """
    clients = cohort[cohort >= 0]
    each = num_positives(self.num_train[clients], self.config)
    share = 1 if work is None else work[clients].astype(np.float64)
    return int(self.config.client.local_epochs * (each * share).sum())

  def traffic(self, cohort: np.ndarray, metrics: Mapping[str, Any]) -> Traffic:
    """What a round of this cohort [G, C/G] cost.

    Args:
      cohort: PADDING_CLIENT where none.
      metrics: `Round.metrics`, which also say how many were asked and did not
        answer, or not well; without it, all of the cohort did.
    """
    visits = int((cohort >= 0).sum())
    if self.privacy:  # all rows, and who came is nobody's business
      visits = round(self.privacy.cohort)
      metrics = {metrics_lib.ITEM_ROWS: self.model.num_rows}
    return communication.of_round(
      self.program, self.abstract_state, visits, metrics
    )

  def sketch_traffic(self) -> Traffic:
    """What asking clients before round 1 cost."""
    return communication.of_sketch(self.config, self.num_train)

  def rounds(
    self,
    state: FederationState | None = None,
    first: int = 1,
    count: int | None = None,
  ) -> Iterator[Round]:
    """Trains round after round.

    Args:
      state: before the first of these rounds, donated; None = initial state.
      first: number of the first round, 1-based.
      count: how many rounds; None = all that the config asks for.

    Yields:
      Each finished round. Its state is donated to the next round, so use it, or
      leave the loop, before then.

    Raises:
      UserError: the training diverged.
    """
    state = self.init_state() if state is None else state
    last = self.config.server.num_rounds if count is None else first + count - 1
    for number in range(first, last + 1):
      start = time.perf_counter()
      cohort = self.sample_cohort(number)
      answers = self.answers(number, cohort)
      state, means = self.run_round(state, number, cohort)
      saved = f'round {number - 1} is the last good one' if number > 1 else ''
      round_lib.check_finite_state(state, number, saved)
      round_lib.check_accepted(self.config, means, number, saved)
      yield Round(
        number,
        state,
        means,
        answers.cohort,
        time.perf_counter() - start,
        np.asarray(answers.fates.work) if answers.fates else None,
      )

  def run_round(
    self, state: FederationState, round_number: int, cohort: np.ndarray
  ) -> tuple[FederationState, dict[str, float | list[float] | None]]:
    """Trains one round with what comes back from the cohort that is asked;
    `state` is donated."""
    answers = self.answers(round_number, cohort)
    state, means = round_lib.run_round(
      self.program,
      state,
      answers.cohort,
      round_lib.round_key(self.config.seed, round_number),
      self.catalogue,
      self.data,
      answers.fates,
    )
    return state, metrics_lib.finish(jax.device_get(means)) | (
      {} if self.privacy else answers.counts
    )

  def validate(self, state: FederationState) -> dict[str, dict[str, float]]:
    """Protocol -> metric -> value of the validation items of
    `validation_clients`, always the same.

    Raises:
      UserError: a score is NaN or infinite.
    """
    return self.evaluate(state, 'val', self.validation_clients)[0]

  def evaluate(
    self, state: FederationState, split: str, clients: np.ndarray | None = None
  ) -> tuple[dict[str, dict[str, float]], Ranks]:
    """Ranks the targets of 'val' or 'test' for `eval_clients`, of 'cold' for
    the clients that have one, or the test items of the 'new_clients'.

    Args:
      state: what is evaluated.
      split: one of `splits`.
      clients: [n] some of the split's clients; None = all of them.

    Returns:
      Protocol -> metric -> value, and the ranks, [n] on the host.

    Raises:
      UserError: a score is NaN or infinite.
    """
    on = self._ranked(split)
    targets = on.targets
    if clients is not None:
      targets = targets.of_clients(clients)
    ranks = ranking.evaluate(
      self.model,
      self.compiled_config,
      on.dataset.max_items,
      self.as_ranked(state.server),
      state.memories,
      state.personal,
      targets,
      self.config.evaluation.clients_per_eval_chunk,
      self.catalogue,
      on.data,
      self._aim,
    )
    return ranking.metrics_of(ranks, self.metrics, targets.client), ranks

  def as_ranked(self, server: ServerState) -> ServerState:
    """The server's state with which items are ranked and recommended: with
    `shrinkage`, items that were trained little lean on those like them."""
    if self._neighbours is None:
      return server
    table = shrunk_table(
      self.model, server.params, self.catalogue, self._neighbours
    )
    return server._replace(params={**server.params, ITEM_TABLE: table})

  def ready_to_rank(self, server: ServerState) -> tuple[ServerState, Catalogue]:
    """`as_ranked`, and a catalogue that holds the embeddings of all items, kept
    for the last state that was asked about: for one person they cost more than
    the ranking. Without them if clients have embeddings of their own."""
    ready = self._ready
    if ready is None or ready[0] is not server:
      ranked = self.as_ranked(server)
      catalogue = self.catalogue
      if not personal_lib.embeds(self.abstract_state.personal):
        catalogue = catalogue._replace(
          embedding=_embedded(self.model, ranked.params, catalogue)
        )
      ready = server, ranked, catalogue
      object.__setattr__(self, '_ready', ready)
    return ready[1:]

  def embedded(self, server: ServerState) -> jax.Array:
    """[V, D] float32 embeddings of all items, as the server has them."""
    ranked, catalogue = self.ready_to_rank(server)
    if catalogue.embedding is not None:
      return catalogue.embedding
    return _embedded(self.model, ranked.params, catalogue)

  @functools.cached_property
  def _neighbours(self) -> Neighbours | None:
    start = self.config.model.item_embedding
    if not (isinstance(start, ContentPlusId) and start.shrinkage):
      return None
    dataset = self.dataset
    if not dataset.features:
      return None
    clients = taking_part(self.num_train, self.config.data.new_clients)
    return shrinkage.neighbours(
      list(dataset.features.values()),
      popularity.training_counts(dataset, clients),
      start.shrinkage,
    )

  def recommend(
    self, state: FederationState, client: int, count: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Items a client has not consumed, best first, to follow its last item.

    Returns:
      ([count] int rows of the catalogue, [count] float32 scores); fewer if
      fewer such items are left.

    Raises:
      UserError: a score is NaN or infinite.
    """
    history = self.dataset.sequence(client)
    padded = np.zeros(self.max_items, np.int32)
    padded[: len(history)] = history
    server, catalogue = self.ready_to_rank(state.server)
    server = server._replace(
      params=personal_lib.put(
        server.params, jax.tree.map(lambda x: x[client], state.personal)
      )
    )
    scores = np.array(
      ranking.score_client(
        self.model,
        self.compiled_config,
        server,
        padded,
        np.int32(len(history)),
        self.num_train[client].astype(np.int32),
        jax.tree.map(lambda x: x[client], state.memories),
        catalogue,
      )
    )
    if not np.isfinite(scores[1:]).all():
      raise UserError(
        f'client {client} has scores that are NaN or infinite, '
        'the training diverged'
      )
    # Consumed items that were held out of training are consumed too.
    everything = self.cold.dataset if self.cold else self.dataset
    scores[0] = scores[everything.sequence(client)] = -np.inf
    scores[self.dataset.disliked_by(client)] = -np.inf
    best = np.argsort(-scores, kind='stable')[:count]
    best = best[np.isfinite(scores[best])]
    return best, scores[best]

  def route(
    self, state: FederationState, client: int | None = None
  ) -> np.ndarray:
    """[V, E] router weights over the catalogue, see `FedDMMR.route`; row 0 is
    meaningless.

    Args:
      state: after a round.
      client: with whose personal parameters; None = the server's.

    Raises:
      UserError: the model has no experts.
    """
    if self.model.is_backbone_only:
      raise UserError('this run has no experts, and so no router')
    own = None
    if client is not None:
      own = jax.tree.map(lambda x: x[client], state.personal)
    return np.asarray(
      jax.jit(functools.partial(self.model.apply, method='route'))(
        {'params': personal_lib.put(state.server.params, own)},
        jnp.arange(self.model.num_rows),
        self.catalogue,
      )
    )

  def rank_by_popularity(self, split: str) -> Ranks:
    """Ranks of the same targets by the popularity baseline."""
    on = self._ranked(split)
    return popularity.rank(
      popularity.training_counts(self.dataset),
      on.data,
      on.targets,
      on.dataset.max_items,
      self._aim,
    )

  def rank_local_only(self, state: FederationState) -> dict[str, Ranks]:
    """Split -> ranks of `eval_clients`. Each client trains the state's model
    alone, for `local_epochs` and without drift control.

    Raises:
      UserError: a score is NaN or infinite.
    """
    return self._rank_trained_alone(
      self.compiled_config,
      local_only.Start(state.server),
      round_lib.round_key(self.config.seed, 1),
      tuple(ranking.SPLITS),
    )

  def rank_fine_tuned(
    self,
    state: FederationState,
    how: ClientConfig,
    splits: Sequence[str] | None = None,
  ) -> dict[str, Ranks]:
    """Split -> ranks of its targets, each client's after it has trained the
    state's model, its memory and its personal parts on its own training items.

    Args:
      state: what is fine-tuned; it stays as it is.
      how: the training: `local_epochs`, the optimizer and its learning rate,
        which stays as it is given, what is frozen. Without drift control.
      splits: some of `splits`; None = all but 'cold', whose clients have other
        data.

    Raises:
      UserError: a score is NaN or infinite.
    """
    if splits is None:
      splits = tuple(split for split in self.splits if split != 'cold')
    compiled = self.compiled_config
    how = dataclasses.replace(
      how,
      client_schedule=Constant(),
      drift_control='none',
      negatives=dataclasses.replace(how.negatives, leaky=False),
    )
    server = self.as_ranked(state.server)
    return self._rank_trained_alone(
      dataclasses.replace(compiled, client=how),
      local_only.Start(server, state.memories, state.personal),
      round_lib.round_key(self.config.seed, int(state.server.round) + 1),
      tuple(splits),
    )

  def _rank_trained_alone(
    self,
    config: RunConfig,
    start: local_only.Start,
    key: jax.Array,
    splits: tuple[str, ...],
  ) -> dict[str, Ranks]:
    program = dataclasses.replace(
      self.program, client=ClientProgram(self.model, config, DriftControl())
    )
    by_split = {split: self._ranked(split).targets for split in splits}
    clients = np.unique(np.concatenate([t.client for t in by_split.values()]))
    chunks = round_lib.chunked(
      clients, self.num_train, self.config.server.clients_per_chunk
    )
    targets, places = _by_client(list(by_split.values()), len(self.num_train))
    ranks = local_only.rank_all(
      program, start, chunks, key, targets, self.catalogue, self.data, self._aim
    )
    at = np.empty(len(self.num_train), int)  # where a client's ranks are
    at[chunks[chunks >= 0]] = np.flatnonzero(chunks.reshape(-1) >= 0)
    found = {}
    for (split, own), place in zip(by_split.items(), places):
      row = at[own.client]
      found[split] = jax.tree.map(
        lambda x: x.reshape(-1, x.shape[-1])[row, place], ranks
      )
    for split, ranks in found.items():
      ranking.check_finite(ranks, split)
    return found

  def with_seed(self, seed: int) -> 'Simulation':
    """The same with another seed for cohorts, initial state and negatives."""
    config = dataclasses.replace(self.config, seed=seed)
    return dataclasses.replace(
      self, config=config, data=to_device(config, self.dataset)
    )

  def with_clients(self, count: int) -> 'Simulation':
    """The same, ranking the given number of clients (0 = all)."""
    return dataclasses.replace(
      self,
      config=dataclasses.replace(
        self.config,
        evaluation=dataclasses.replace(
          self.config.evaluation, eval_clients=count
        ),
      ),
    )

  def with_popular_negatives(self) -> 'Simulation':
    """The same, with negatives drawn by popularity for `Ranks.popular`."""
    negatives = dataset_lib.draw_popular(
      self.dataset,
      popularity.training_counts(self.dataset),
      self.config.data.sampled_negatives,
      self.config.seed,
    )
    return dataclasses.replace(
      self, data=self.data._replace(popular_negatives=jnp.asarray(negatives))
    )

  def with_features(self, change: str) -> 'Simulation':
    """The same with changed item features.

    Args:
      change: 'zeroed' (all features missing) or 'shuffled' (each item gets
        those of another, by the seed).
    """
    features = self.catalogue.features
    if change == 'zeroed':
      features = jax.tree.map(jnp.zeros_like, features)
    else:
      rng = generator(self.config.seed, Stream.SHUFFLED_FEATURES)
      order = np.concatenate(
        [[0], 1 + rng.permutation(self.model.num_rows - 1)]
      )
      features = {name: x[order] for name, x in features.items()}
    return dataclasses.replace(
      self, catalogue=Catalogue.of(features, self.catalogue.content)
    )

  @property
  def splits(self) -> tuple[str, ...]:
    """What can be evaluated: 'val', 'test' and, with the settings of these
    names, 'cold' and 'new_clients'."""
    return (
      *ranking.SPLITS,
      *(['cold'] if self.cold else []),
      *([NEW_CLIENTS] if len(self.new_clients) else []),
    )

  @functools.cached_property
  def new_clients(self) -> np.ndarray:
    """[n] clients with a test item that no cohort ever draws, ascending."""
    return np.intersect1d(
      dataset_lib.draw_new_clients(
        self.dataset.num_clients, self.config.data.new_clients
      ),
      self.dataset.tested,
    )

  def _ranked(self, split: str) -> _Ranked:
    """The data that contains a split's targets, and the clients with one."""
    if split == 'cold':
      return self._cold_ranked
    if split == NEW_CLIENTS:
      return self._of_own('test', self.new_clients)
    return self._of_own(split, self.evaluated_clients)

  def _of_own(self, split: str, clients: np.ndarray) -> _Ranked:
    """Targets of some clients in the data that is trained on."""
    by = self.config.data.split_by
    history = by.history if isinstance(by, Given) else ranking.ALL
    targets = Targets.of(self.dataset, split, history).of_clients(clients)
    return _Ranked(self.dataset, self.data, targets)

  @functools.cached_property
  def _cold_ranked(self) -> _Ranked:
    """The data with a cold item at the place of the test item."""
    cold = cast(ColdSplit, self.cold)
    return _Ranked(
      cold.dataset,
      to_device(self.config, cold.dataset, trains=False)._replace(
        popular_negatives=self.data.popular_negatives
      ),
      Targets.of(cold.dataset, 'test').of_clients(cold.clients),
    )

  @property
  def attack(self) -> Attack | None:
    """The attack on this federation."""
    found = [x for x in self.transforms if isinstance(x, Attack)]
    return found[0] if found else None

  @property
  def attackers(self) -> np.ndarray:
    """[n] clients that attack, ascending."""
    if self.attack is None:
      return np.zeros(0, int)
    return self.attack.attackers(self.dataset.num_clients)

  @property
  def _aim(self) -> np.ndarray | None:
    """[] int32 the item that the attack promotes; None without one."""
    return (
      None if self.attack is None else np.array(self.attack.aim.row, np.int32)
    )

  @property
  def evaluated_clients(self) -> np.ndarray:
    """[n] clients that are ranked, of those with a target: no attackers."""
    having = np.union1d(
      *(self.dataset.targets(test)[0] for test in (False, True))
    )
    having = np.setdiff1d(having, self.attackers)
    return ranking.evaluated_clients(
      self.config, self.dataset.num_clients, having
    )

  @functools.cached_property
  def validation_clients(self) -> np.ndarray:
    """[n] clients that are ranked at the validations between, ascending."""
    clients = self.targeted('val')
    wanted = self.config.evaluation.validation_clients
    if not wanted or wanted >= len(clients):
      return clients
    rng = generator(self.config.seed, Stream.VALIDATION_CLIENTS)
    return np.sort(rng.choice(clients, wanted, replace=False))

  def ranked_dataset(self, split: str) -> Dataset:
    """The sequences that hold the targets of one of `splits`."""
    return self._ranked(split).dataset

  def targets(self, split: str) -> tuple[np.ndarray, np.ndarray]:
    """([n] clients of the targets in one of `splits`, ascending, [n] their
    rows); a client of a given split may have several."""
    on = self._ranked(split)
    client = on.targets.client
    at = (on.dataset.offsets[:-1] + on.dataset.num_train)[client]
    return client, on.dataset.items[at + on.targets.after_train]

  def ranked_targets(self, split: str) -> Targets:
    """Where these targets are."""
    return self._ranked(split).targets

  def targeted(self, split: str) -> np.ndarray:
    """[n] the ranked clients that have a target in 'val' or 'test',
    ascending."""
    return np.unique(self._ranked(split).targets.client)


def _by_client(
  targets: Sequence[Targets], num_clients: int
) -> tuple[np.ndarray, list[np.ndarray]]:
  """([K, n, 3] each client's targets, see `local_only.rank_all`, for each split
  [m] at which place of its client a target is)."""
  client = np.concatenate([x.client for x in targets])
  each = np.stack(
    [
      np.concatenate([x.after_train for x in targets]),
      np.concatenate([x.known for x in targets]),
      np.concatenate(
        [np.full(len(x.client), ranking.SPLITS[x.split]) for x in targets]
      ),
    ],
    axis=1,
  )
  order = np.argsort(client, kind='stable')
  counts = np.bincount(client, minlength=num_clients)
  place = np.empty(len(client), int)
  place[order] = np.arange(len(client)) - np.repeat(
    np.cumsum(counts) - counts, counts
  )
  found = np.zeros((num_clients, counts.max(initial=0), 3), np.int32)
  found[client, place] = each
  ends = np.cumsum([len(x.client) for x in targets])[:-1]
  return found, np.split(place, ends)


@functools.partial(devices.jit, static_argnames='model')
def _embedded(model: FedDMMR, params: Any, catalogue: Catalogue) -> jax.Array:
  """[V, D] embeddings of all items."""
  rows = jnp.arange(model.num_rows)
  embedded = model.apply({'params': params}, rows, catalogue, method='embed')
  return cast(jax.Array, embedded)


@functools.partial(jax.jit, static_argnames='model')
def shrunk_table(
  model: FedDMMR, params: Any, catalogue: Catalogue, found: Neighbours
) -> jax.Array:
  """[V, D] the item table with which items are ranked, see `shrinkage`."""
  embedded = model.apply(
    {'params': params}, jnp.arange(model.num_rows), catalogue, method='embed'
  )
  return shrinkage.shrunk(params[ITEM_TABLE], cast(jax.Array, embedded), found)


def build(
  config: RunConfig,
  dataset: Dataset,
  cold: ColdSplit | None = None,
  aggregator: Aggregator | None = None,
  drift: DriftControl | None = None,
  metrics: Sequence[Metric] | None = None,
  content: np.ndarray | None = None,
) -> Simulation:
  """Puts a data set on the devices and fits the model to it.

  Args:
    config: settings.
    dataset: what to train on.
    cold: items held out of training.
    aggregator: replaces the one that the config names.
    drift: a drift control, likewise.
    metrics: further ranking metrics, likewise.
    content: of the items, as for `catalogue_of`.

  Raises:
    UserError: no client has anything to train on, a client with too few unseen
      items for the negatives, global prototypes without texts, too many control
      variates, an aggregator that collects too much or whose assumption the
      cohort breaks, or nothing left to train.
  """
  privacy_lib.part(config)
  _check_trainable(config, dataset)
  simulation = assemble(
    config,
    dataset,
    catalogue_of(config, dataset, content),
    to_device(config, dataset),
    cold,
    aggregator,
    drift,
    metrics,
  )
  # Before hours of training:
  _check_targets(simulation)
  cohorts.check(config, simulation.num_taking_part)
  _check_answers(simulation)
  state = simulation.abstract_state
  round_lib.check_size(state)
  transforms_lib.check(
    simulation.transforms, state.server.params, dataset.num_clients
  )
  robust.check(
    simulation.aggregator,
    simulation.drift,
    state.server.params,
    simulation.cohort_size,
  )
  round_lib.check_collected(
    simulation.program, state, simulation.data, simulation.largest_cohort
  )
  return simulation


def catalogue_of(
  config: RunConfig, dataset: Dataset, content: np.ndarray | None = None
) -> Catalogue:
  """The items' features and content on the devices.

  Args:
    config: settings.
    dataset: its features.
    content: [V, D] float32 or [V, 0] what their embeddings start from; None =
      made of the features and, if so configured, of the clients' histories.

  Raises:
    UserError: texts that the config needs, or anything to start from, are
      missing.
  """
  # The experts' features; the item table may start from the others too.
  features = {
    name: _scaled(dataset.features[name], config)
    for name in dict.fromkeys(m.features for m in _modalities(config, dataset))
  }
  if (
    isinstance(config.memory, TwoTierMemory)
    and experts_lib.TEXT not in features
  ):
    raise UserError(
      '`memory=two_tier` needs the semantic expert and text '
      'features: novelty is measured on texts'
    )
  if config.global_memory and experts_lib.TEXT not in features:
    raise UserError(
      f'`global_memory={config.global_memory}` needs the semantic expert and '
      'text features: the prototypes are clusters of texts'
    )
  if content is None:
    content = collaborative.put_into(
      feature_content(config, dataset), dataset, config
    )
  return devices.copied(Catalogue.of(features, content))


def assemble(
  config: RunConfig,
  dataset: Dataset,
  catalogue: Catalogue,
  data: FederatedData | None,
  cold: ColdSplit | None = None,
  aggregator: Aggregator | None = None,
  drift: DriftControl | None = None,
  metrics: Sequence[Metric] | None = None,
) -> Simulation:
  """A simulation of parts that are there already. `build` checks besides that
  there is something to train on and to rank.

  Args:
    config: settings.
    dataset: the clients; its features say by their names which experts there
      are.
    catalogue: of `dataset`, see `catalogue_of`.
    data: `dataset` on the devices; None where nobody's data is read.
    cold, aggregator, drift, metrics: as for `build`.

  Raises:
    UserError: an expert without features, a parameter group that is none, or
      nothing left to train.
  """
  private = privacy_lib.of(
    config, len(taking_part(dataset.num_train, config.data.new_clients))
  )
  simulation = Simulation(
    config=config,
    model=FedDMMR(config.model, dataset.num_rows, _modalities(config, dataset)),
    catalogue=catalogue,
    data=cast(FederatedData, data),
    dataset=dataset,
    cold=cold,
    aggregator=aggregator
    or (private.aggregator() if private else aggregators.of(config)),
    drift=drift or drift_lib.of(config),
    transforms=tuple(x.fitted(dataset) for x in uplink.of(config, private)),
    privacy=private,
    metrics=metrics_lib.further_metrics(config.evaluation.metric_names)
    if metrics is None
    else tuple(metrics),
  )
  params = simulation.abstract_state.server.params
  if private:
    privacy_lib.check_parts(config, aggregator, simulation.drift, params)
    names = [name for name, _ in private.mechanism.bounds]
    groups.check(params, names, 'privacy')
  groups.check(params, config.client.frozen_groups, 'freeze')
  if all(jax.tree.leaves(optimizers.frozen(config.client, params))):
    raise UserError(
      f'`freeze={config.client.freeze}` leaves nothing of this model to train'
    )
  personal_lib.check(config, params, simulation.drift)
  groups.check(params, warm_start_lib.named_parameters(config), 'load')
  metrics_lib.own_names(simulation.metrics)
  return _measuring(simulation)


def _measuring(simulation: Simulation) -> Simulation:
  """The same, with the metric that `select_by` names among its metrics.

  Raises:
    UserError: there is no such metric, or it is cut off behind the last
      candidate.
  """
  evaluation = simulation.config.evaluation
  if evaluation.selection is None:
    return simulation
  protocol, name = evaluation.selection
  try:
    measured = metrics_lib.with_named(simulation.metrics, name)
  except UserError as error:
    raise UserError(f'`select_by={evaluation.select_by}`: {error}') from None
  cutoff = name.rpartition('@')[2]
  candidates = (
    simulation.dataset.num_items - simulation.dataset.num_cold
    if protocol == metrics_lib.FULL
    else simulation.config.data.sampled_negatives + 1
  )
  if len(measured) > len(simulation.metrics) and int(cutoff) > candidates:
    raise UserError(
      f'`select_by={evaluation.select_by}`: {protocol} ranks {candidates} '
      'candidates at most'
    )
  return dataclasses.replace(simulation, metrics=measured)


def _check_targets(simulation: Simulation) -> None:
  """Raises UserError if nothing could be validated or tested."""
  for split, what in (('val', 'validation'), ('test', 'test')):
    if not len(simulation.ranked_targets(split).client):
      raise UserError(
        f'{simulation.dataset.name}: no {what} item has an item before it that '
        'its client may know of; see `split_by` and `eval_clients`'
      )


def _check_answers(simulation: Simulation) -> None:
  """Raises UserError if no round could have the answers that it needs."""
  config = simulation.config
  _ = simulation.failures
  least = config.federation.min_answers
  for name in ('failures', 'availability', 'over_selection', 'min_answers'):
    value = getattr(config.federation, name)
    if simulation.privacy and value != getattr(FederationConfig(), name):
      raise UserError(
        f'`{name}={value}` changes who is in a round, which the accountant of '
        f'`privacy={config.federation.privacy}` does not know; leave one out'
      )
  if least > simulation.cohort_size:
    raise UserError(
      f'`min_answers={least}` is more than a cohort has, '
      f'{simulation.cohort_size} clients '
      f'(`client_fraction={config.server.client_fraction:g}`)'
    )
  simulation.availability.check(
    simulation.dataset.user_ids,
    taking_part(simulation.num_train, config.data.new_clients),
    config.server.num_rounds,
  )


def _check_trainable(config: RunConfig, dataset: Dataset) -> None:
  """Raises UserError if no cohort could ever have a positive."""
  clients = dataset_lib.old_clients(
    dataset.num_clients, config.data.new_clients
  )
  if (num_positives(dataset.num_train[clients], config) > 0).any():
    return
  data = config.data
  shorten = [
    f'`{name}={value}`'
    for name, value in (
      ('k_core', data.k_core),
      ('cold_items', data.cold_items),
      ('new_clients', data.new_clients),
      ('split_by', isinstance(data.split_by, Timeline) and data.split_by),
    )
    if value
  ]
  raise UserError(
    f'{dataset.name}: nothing to train on: a positive is a training item that '
    f'comes after another one, and none of {len(clients)} clients has two; '
    'give longer histories, of 4 interactions or more where the last two are '
    'held out' + (f', or change {" or ".join(shorten)}' if shorten else '')
  )


def _modalities(
  config: RunConfig, dataset: Dataset
) -> tuple[experts_lib.Modality, ...]:
  """The experts that the config names and the data set has features for.

  Raises:
    UserError: an expert other than visual and semantic has no features.
  """
  found = []
  for modality in experts_lib.of(config.model):
    if modality.features in dataset.features:
      found.append(modality)
    elif modality.name not in ORIGINAL_EXPERTS:
      raise UserError(
        f'`experts` names {modality.name}, but the data set has no '
        f'{modality.features} features; put {modality.features}_features.npy '
        'beside the interactions, one row for each item id'
      )
  return tuple(found)


def _scaled(features: np.ndarray, config: RunConfig) -> np.ndarray:
  """[V, F'] float32, what an expert sees of a feature matrix [V, F]."""
  scaling = config.model.expert_form.features
  if scaling == 'centred':
    return content_lib.centred(features)
  if scaling == 'components':
    return content_lib.components([features], config.model.hidden_dim)
  return features


def feature_content(config: RunConfig, dataset: Dataset) -> np.ndarray:
  """[V, D] float32 the items' content, see `content.components`; [V, 0] where
  their embeddings do not start from it. What clients' histories say of items is
  not in it (`collaborative.put_into`).

  Raises:
    UserError: there is nothing to make it of.
  """
  nothing = np.zeros((dataset.num_rows, 0), np.float32)
  start = config.model.item_embedding
  if not isinstance(start, ContentInit):
    return nothing
  if not (dataset.features or start.collaborative_dim):
    raise UserError(
      f'`item_embedding={start}` needs item features; give some, or say '
      '`item_embedding=id`'
    )
  return content_lib.components(
    list(dataset.features.values()) or [nothing], config.model.hidden_dim
  )


def to_device(
  config: RunConfig, dataset: Dataset, trains: bool = True
) -> FederatedData:
  """A data set's clients on the devices, with what a config draws for them.

  Args:
    config: settings.
    dataset: the clients.
    trains: whether negatives are drawn for training.

  Raises:
    UserError: a client has too few unseen items.
  """
  return devices.copied(
    dataset_lib.to_device(
      dataset,
      num_negatives=config.client.num_negatives if trains else 0,
      sampled_negatives=config.data.sampled_negatives,
      leaky_negatives=config.client.negatives.leaky,
      seed=config.seed,
      new_clients=config.data.new_clients,
    )
  )
