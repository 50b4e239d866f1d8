"""Several variants × several seeds -> one comparison, paired over users.

A variant is trained by rounds, or is one of

    @popularity   items by their training interactions
    @local_only   every client trains alone for `local_epochs`
    @zeroed       the first variant's checkpoints, with all features removed
    @shuffled     the same, with features shuffled between items
    @fine_tuned   the same, trained once more by each client on its own items,
                  for `local_epochs` and with its other client settings

Differences are relative to the first variant. All rounds of a variant are run;
`patience` is ignored.
"""

import dataclasses
import math
import statistics
import time
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.config import RunConfig
from fedmmr_jax.data.load import Loaded
from fedmmr_jax.evaluation.bootstrap import Difference, paired_bootstrap
from fedmmr_jax.evaluation.ranking import Ranks
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.federation.round import FederationState
from fedmmr_jax.metrics import (
  EXPOSURE,
  FULL,
  HEADLINES,
  Mean,
  Metric,
  PROTOCOLS,
)
from fedmmr_jax.runs import training
from fedmmr_jax.simulation import Simulation

POPULARITY, LOCAL_ONLY = '@popularity', '@local_only'
ZEROED, SHUFFLED = '@zeroed', '@shuffled'
FINE_TUNED = '@fine_tuned'
# They need the first variant's states; the first two are that variant with
# other features.
FROM_FIRST = (ZEROED, SHUFFLED, FINE_TUNED)
OTHER_FEATURES = (ZEROED, SHUFFLED)
SPECIAL = (POPULARITY, LOCAL_ONLY, *FROM_FIRST)


class Variant(NamedTuple):
  """One variant of a comparison.

  Attributes:
    name: its row in the table.
    special: one of SPECIAL, or '' for a trained variant.
    flags: name -> text of the settings it changes.
  """

  name: str
  special: str
  flags: dict[str, str]


class Outcome(NamedTuple):
  """The results of a variant.

  Attributes:
    ranks: split -> Ranks with axes [seeds, users]; 'cold' has other users.
    best_rounds: of each seed; empty if no rounds were trained.
    training: training metrics of the last round, mean over the seeds; empty
      if no rounds were trained.
    first_training: the same for the first round.
    seconds: in total.
    metrics: further ranking metrics besides HR, NDCG and MRR.
    records: of each seed, a record for each round with what it cost and its
      validation, as in `metrics.jsonl`; empty if no rounds were trained.
    num_train: [users] training items of the test split's users.
    clients: split -> [targets] whose each is, ascending; a client of a given
      split may have several.
    at: further cut-offs of HR and NDCG by which variants are compared.
  """

  ranks: dict[str, Ranks]
  best_rounds: list[int]
  training: dict[str, float | None]
  first_training: dict[str, float | None]
  seconds: float
  metrics: tuple[Metric, ...] = ()
  records: Sequence[list[dict[str, Any]]] = ()
  num_train: Sequence[int] = ()
  clients: Mapping[str, Sequence[int]] = {}
  at: tuple[int, ...] = ()

  @property
  def cutoffs(self) -> tuple[int, ...]:
    """All cut-offs of HR and NDCG."""
    return tuple(sorted({10, *self.at}))

  @property
  def headlines(self) -> tuple[tuple[str, str], ...]:
    """(protocol, metric) pairs by which variants are compared."""
    own = [f'{kind}@{n}' for n in self.at if n != 10 for kind in ('HR', 'NDCG')]
    own += metrics_lib.own_names(self.metrics)
    exposed = np.any(np.asarray(self.ranks['test'].aimed) >= 0)
    return (
      HEADLINES
      + ((FULL, EXPOSURE),) * bool(exposed)
      + tuple((p, name) for name in own for p in PROTOCOLS)
    )

  def of_each_user(
    self, protocol: str, metric: str, split: str = 'test'
  ) -> np.ndarray:
    """[users] a metric, mean over the seeds; the exposure of an attack's target
    is NaN for users that consumed it before."""
    if metric == EXPOSURE:
      values = list(metrics_lib.exposure_of_each(self.ranks[split].aimed))
    else:
      values = [
        metrics_lib.ranking_of_each(r, self.metrics, self.cutoffs)[metric]
        for r in getattr(self.ranks[split], protocol)
      ]
    return metrics_lib.of_users(
      np.mean(values, axis=0), self._clients_of(split)
    )

  def _clients_of(self, split: str) -> np.ndarray | None:
    own = self.clients.get(split)
    return None if own is None else np.asarray(own)

  def of_each_seed(
    self, protocol: str, metric: str, split: str = 'test'
  ) -> list[float]:
    """A metric, mean over the users."""
    ranks = getattr(self.ranks[split], protocol)
    users = self._clients_of(split)
    if metric == EXPOSURE:
      return [
        metrics_lib.mean_of_users(metrics_lib.exposure_of_each(r), users)
        for r in self.ranks[split].aimed
      ]
    return [
      metrics_lib.ranking(r, self.metrics, users, self.cutoffs)[metric]
      for r in ranks
    ]

  def difference(
    self, baseline: 'Outcome', protocol: str, metric: str
  ) -> Difference:
    """To another variant, on the test split, paired over users."""
    mine = self.of_each_user(protocol, metric)
    others = baseline.of_each_user(protocol, metric)
    known = ~np.isnan(mine) & ~np.isnan(others)
    return paired_bootstrap(mine[known], others[known])


# Number of a round -> what the validation of each seed found.
OnRound = Callable[[int, Sequence[dict[str, dict[str, float]]]], None]
Record = dict[str, Any]  # name -> training metric

# Variant -> (protocol, metric) of headlines -> difference to the first variant.
Differences = dict[str, dict[tuple[str, str], Difference]]


def differences(outcomes: dict[str, Outcome]) -> Differences:
  """Differences of every variant to the first one, on the test split."""
  baseline = next(iter(outcomes.values()))
  return {
    name: {
      headline: outcome.difference(baseline, *headline)
      for headline in baseline.headlines
    }
    for name, outcome in outcomes.items()
  }


def run_trained(
  config: RunConfig, loaded: Loaded, seeds: Sequence[int], on_round: OnRound
) -> tuple[Outcome, list[Simulation], list[FederationState]]:
  """Trains a variant with every seed and tests each at its best round.

  Args:
    config: the variant's settings; its own seed is ignored.
    loaded: the data.
    seeds: of the runs.
    on_round: see `train_seeds`.

  Returns:
    The outcome, and each seed's simulation and best state.
  """
  started = time.perf_counter()
  base = simulation_lib.build(config, loaded.dataset, loaded.cold)
  simulations = [base.with_seed(seed) for seed in seeds]
  best, first, last, records = train_seeds(simulations, on_round)
  states = [b.state for b in best]
  outcome = Outcome(
    _rank(simulations, states),
    [b.round for b in best],
    _mean(last),
    _mean(first),
    time.perf_counter() - started,
    base.metrics,
    records,
    _num_train(base),
    _clients(base),
  )
  return outcome, simulations, states


def train_seeds(
  simulations: Sequence[Simulation], on_round: OnRound
) -> tuple[
  list['Best'], list[Record], list[Record], list[list[dict[str, Any]]]
]:
  """Trains simulations that differ only in their seed: in parallel, as one
  compiled program, or one after the other if their states together are too
  large.

  Args:
    simulations: one per seed.
    on_round: called with the number of each finished round, and with what the
      validation of each seed that takes part in it found (protocol -> metric ->
      value); with none if the round was not validated.

  Returns:
    Of each seed: the best round, the training metrics of the first and of the
    last round, and the records (`Outcome.records`).

  Raises:
    UserError: the training of a seed diverged.
  """
  base = simulations[0]
  size = round_lib.state_bytes(base.abstract_state)
  size += round_lib.collected_bytes(
    base.program, base.abstract_state, base.data, base.largest_cohort
  )
  size *= len(simulations)
  groups = (
    [simulations]
    if size <= round_lib.MOST_STATE_BYTES
    else [[s] for s in simulations]
  )
  best: list[Best] = []
  first, last, records = [], [], []
  for group in groups:
    best_of_group, first_means, last_means, lines = _train_group(
      group, on_round
    )
    best += best_of_group
    first += first_means
    last += last_means
    records += lines
  return best, first, last, records


class Best(NamedTuple):
  """The best round of one seed so far, by `select_by`."""

  value: float
  round: int
  state: FederationState


def run_round(
  simulations: Sequence[Simulation], states: FederationState, number: int
) -> tuple[FederationState, dict[str, Mean]]:
  """One round of several simulations that differ only in their seed.

  Args:
    simulations: one per seed, with the same data and settings.
    states: theirs, stacked [seeds, …]; donated.
    number: of the round, 1-based.

  Returns:
    As `round_lib.run_round`, with a leading axis over seeds.
  """
  base = simulations[0]
  answers = [s.answers(number, s.sample_cohort(number)) for s in simulations]
  cohorts = np.stack([a.cohort for a in answers])
  fates = jax.tree.map(lambda *x: np.stack(x), *[a.fates for a in answers])
  keys = jnp.stack(
    [round_lib.round_key(s.config.seed, number) for s in simulations]
  )
  return round_lib.run_round(
    dataclasses.replace(base.program, of_seeds=True),
    states,
    cohorts,
    keys,
    base.catalogue,
    base.data,
    fates,
  )


def _train_group(simulations, on_round):
  """As `train_seeds`, in parallel."""
  config = simulations[0].config
  states = jax.tree.map(
    lambda *x: jnp.stack(x), *[s.init_state() for s in simulations]
  )
  best = [Best(-math.inf, 0, None)] * len(simulations)
  records: list[list[dict[str, Any]]] = [[] for _ in simulations]
  first = None
  for number in range(1, config.server.num_rounds + 1):
    states, means = run_round(simulations, states, number)
    round_lib.check_finite_state(states, number)
    means = jax.device_get(means)
    last = [
      metrics_lib.finish(jax.tree.map(lambda x: x[i], means))
      | simulation.answers(number, simulation.sample_cohort(number)).counts
      for i, simulation in enumerate(simulations)
    ]
    for simulation, train in zip(simulations, last):
      round_lib.check_accepted(simulation.config, train, number)
    first = first or last
    for simulation, lines, train in zip(simulations, records, last):
      lines.append(
        {
          'round': number,
          'communication': training.traffic(
            simulation, number, simulation.sample_cohort(number), train
          )._asdict(),
        }
      )
    validations = []
    if training.due(number, config):
      # Control variates and the like are of no use in testing, and large.
      ranked = states._replace(controls=None, transforms=())
      for i, simulation in enumerate(simulations):
        state = jax.tree.map(lambda x: x[i], ranked)
        found = simulation.validate(state)
        records[i][-1]['val'] = found
        value = training.selection_value(found, number, config)
        if value > best[i].value:
          best[i] = Best(value, number, state)
        validations.append(found)
    on_round(number, validations)
  return best, first, last, records


def run_special(
  variant: Variant,
  config: RunConfig,
  loaded: Loaded,
  seeds: Sequence[int],
  simulations: Sequence[Simulation],
  states: Sequence[FederationState],
) -> Outcome:
  """The outcome of a variant that is not trained by rounds.

  Args:
    variant: which.
    config: its settings; with FINE_TUNED those of the first variant, but for
      what it changes of the client's.
    loaded: the data.
    seeds: of the runs.
    simulations: of the first variant, one per seed.
    states: its best states.
  """
  started = time.perf_counter()
  if variant.special in FROM_FIRST:
    if variant.special == FINE_TUNED:
      found = [
        simulation.rank_fine_tuned(state, config.client)
        for simulation, state in zip(simulations, states)
      ]
      ranks = {split: _stacked([f[split] for f in found]) for split in found[0]}
    else:
      ranks = _rank(
        [s.with_features(variant.special[1:]) for s in simulations], states
      )
    num_train, clients = _num_train(simulations[0]), _clients(simulations[0])
  else:
    base = simulation_lib.build(config, loaded.dataset, loaded.cold)
    found = []
    for seed in seeds:
      simulation = base.with_seed(seed)
      if variant.special == POPULARITY:
        found.append(
          {split: simulation.rank_by_popularity(split) for split in base.splits}
        )
      else:
        found.append(simulation.rank_local_only(simulation.init_state()))
    ranks = {split: _stacked([f[split] for f in found]) for split in found[0]}
    num_train, clients = _num_train(base), _clients(base)
  return Outcome(
    ranks,
    [],
    {},
    {},
    time.perf_counter() - started,
    metrics_lib.further_metrics(config.evaluation.metric_names),
    num_train=num_train,
    clients=clients,
  )


def _rank(
  simulations: Sequence[Simulation], states: Sequence[FederationState]
) -> dict[str, Ranks]:
  """Split -> ranks of the states, [seeds, users]."""
  return {
    split: _stacked(
      [
        simulation.evaluate(state, split)[1]
        for simulation, state in zip(simulations, states)
      ]
    )
    for split in simulations[0].splits
  }


def _num_train(simulation: Simulation) -> list[int]:
  """[users] training items of the test split's users."""
  return simulation.num_train[simulation.targeted('test')].tolist()


def _clients(simulation: Simulation) -> dict[str, list[int]]:
  """Split -> [targets] whose each is."""
  return {
    split: simulation.targets(split)[0].tolist() for split in simulation.splits
  }


def _stacked(ranks: Sequence[Ranks]) -> Ranks:
  return jax.tree.map(lambda *x: np.stack(x), *ranks)


def _mean(means: Sequence[dict[str, Any]]) -> dict[str, float | None]:
  """Mean over the seeds with a value, for the metrics the comparison shows."""
  result = {}
  for name in metrics_lib.ordered(means[0]):
    if name in _TOLD or name.startswith(_TOLD_FAMILIES):
      values = [m[name] for m in means if m[name] is not None]
      result[name] = statistics.mean(values) if values else None
  return result


_TOLD = (
  metrics_lib.REC_LOSS,
  metrics_lib.CONTRASTIVE_LOSS,
  metrics_lib.HARDEST_SHARE,
)
_TOLD_FAMILIES = (metrics_lib.ROUTER_WEIGHT, metrics_lib.GRADIENT)
