"""Differential privacy of each client (docs/privacy.md).

A client's update is clipped as a whole, weighs as much as any other, and is
added to the others'; the sum gets noise on every number that is trained and is
divided by the size that a cohort is expected to have (McMahan et al. 2018,
"Learning differentially private recurrent language models", ICLR, Algorithm 1).
Clipping, noise and correlated noise are those of jax-privacy.

In between, updates are in units of the clip norm: `ClipUpdates` divides by it,
`PrivateMean` adds the noise, and `ClipUpdates.released` multiplies again. So a
norm that adapts is known in one place, and the noise knows nothing of it.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax import parts
from fedmmr_jax.client.drift import DriftControl
from fedmmr_jax.client.vocabulary import ITEM_TABLE
from fedmmr_jax.config import (
  AUTO,
  ContentInit,
  ContentPlusId,
  CYCLIC,
  LAST_ROUND,
  RunConfig,
)
from fedmmr_jax.errors import UserError
from fedmmr_jax.federation import accounting, cohorts
from fedmmr_jax.federation.accounting import Schedule
from fedmmr_jax.federation.aggregators import add_weighted, Aggregator
from fedmmr_jax.federation.transforms import UpdateTransform
from fedmmr_jax.models import groups as groups_lib

OFF = 'none'
UNCLIPPED = 'unclipped'

# Noise on the counts of items over that on the sketch, which begins with them:
# a fiftieth of what the two cost. Only the order of the most consumed items is
# wanted, and hundreds of clients have each of them.
COUNTS_NOISE = 7.0
# The norm of a clipped update is rounded; it must not end above the bound.
_MARGIN = 1 - 1e-6
_NOISE_STREAM = 0x70726976  # of the run's key


def _option(default: Any, **bounds: Any) -> Any:
  return dataclasses.field(default=default, metadata=bounds)


@dataclasses.dataclass(frozen=True)
class Clipping:
  """Bounds every update, without noise: no privacy, but what it costs.

  Attributes:
    clip_norm: C, the largest L2 norm of an update, or of all of it that is in
      none of `groups`; with `quantile` the first.
    groups: parts of the parameters with a bound of their own, as in
      `embeddings:0.5+experts:1`; the names are those of `freeze`. The norm of
      the whole is at most the root of the sum of the squares.
    quantile: share of the clients that the norm should not clip; it adapts
      (Andrew et al. 2021, "Differentially private learning with adaptive
      clipping", NeurIPS). 0: it stays.
    quantile_rate: of the adaptation, η_C there.
  """

  clip_norm: float = _option(1.0, minimum=1e-9)
  groups: str = ''
  quantile: float = _option(0.0, minimum=0.0, maximum=1.0)
  quantile_rate: float = _option(0.2, minimum=0.0)

  is_private: ClassVar[bool] = False

  @property
  def bounds(self) -> tuple[tuple[str, float], ...]:
    """(group, clip norm) of those with one of their own.

    Raises:
      UserError: it is not written as above.
    """
    found = []
    for word in filter(None, self.groups.split('+')):
      name, _, norm = word.rpartition(':')
      try:
        bound = float(norm)
      except ValueError:
        bound = math.nan
      if not (name and 0 < bound < math.inf):
        raise UserError(
          f'`privacy`: groups={self.groups}: {word!r} is not group:norm with a '
          'norm above 0, as in embeddings:0.5+experts:1'
        )
      found.append((name, bound))
    return tuple(found)

  def coefficients(self, rounds: int, separation: int) -> tuple[float, ...]:
    """Of the banded matrix that correlates the noise; (1,) for none.

    Args:
      rounds: of the run.
      separation: see `Schedule`.
    """
    return (1.0,)


@dataclasses.dataclass(frozen=True)
class Gaussian(Clipping):
  """Independent noise in each round.

  Attributes:
    noise_multiplier: standard deviation of the noise on the sum over the clip
      norm; 0: `target_epsilon` says how much.
    cohort: noise as if each cohort were so many clients, and ε of a federation
      with such cohorts; 0: as it is.
    population: clients of that federation; 0: so many that a cohort is the
      same share of them.
    sketch_noise: standard deviation of the noise on the sketch of
      `collaborative_dim` over the bound on what a client adds to it, part of
      the same ε; 0: there may be no sketch. With `collaborative_items` there is
      `COUNTS_NOISE` times that noise on the counts that it begins with.
    public_start: says that `pretrained_path` was trained on nobody's data here.
  """

  noise_multiplier: float = _option(0.0, minimum=0.0)
  cohort: int = _option(0, minimum=0)
  population: int = _option(0, minimum=0)
  sketch_noise: float = _option(0.0, minimum=0.0)
  public_start: bool = False

  is_private: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Banded(Gaussian):
  """Noise that later rounds take back in part: DP-FTRL by a banded Toeplitz
  matrix (Choquette-Choo et al. 2023, arXiv:2306.08153; McKenna 2024,
  arXiv:2405.15913), for clients that come in turns.

  Attributes:
    bands: of the matrix, at most the rounds between two turns of a client; the
      server keeps as many sets of parameters less one. 0: that many, 8 at most.
  """

  bands: int = _option(0, minimum=0)

  def coefficients(self, rounds, separation):
    bands = self.bands or min(8, separation)
    return _toeplitz(rounds, min(bands, rounds))


@functools.lru_cache(maxsize=8)
def _toeplitz(rounds: int, bands: int) -> tuple[float, ...]:
  toeplitz = accounting.library('jax_privacy.matrix_factorization.toeplitz')
  if bands == 1:
    return (1.0,)
  found = np.asarray(toeplitz.optimize_banded_toeplitz(rounds, bands))
  return tuple(map(float, found))


MECHANISMS: dict[str, type[Clipping]] = {
  'clip': Clipping,
  'gaussian': Gaussian,
  'banded': Banded,
}


@dataclasses.dataclass(frozen=True)
class ClipUpdates(UpdateTransform):
  """The last that happens to an update: it is clipped, and counts as one.

  Attributes:
    norms: (group, clip norm), the rest last, under ''.
    cohort: clients of a cohort, expected.
    quantile: see `Clipping`.
    quantile_rate: likewise.
    count_noise: standard deviation of the noise on the number of unclipped
      clients.
  """

  norms: tuple[tuple[str, float], ...]
  cohort: float
  quantile: float = 0.0
  quantile_rate: float = 0.0
  count_noise: float = 0.0

  hides_metrics: ClassVar[bool] = True

  def server_state(self, params):
    """[groups] float32 clip norms."""
    return jnp.array([norm for _, norm in self.norms], jnp.float32)

  def no_metrics(self):
    return {UNCLIPPED: metrics_lib.empty((len(self.norms),))}

  def apply(self, update, kept, sender):
    clipping = accounting.library('jax_privacy.clipping')
    first = update.vocabulary.is_first
    delta = jax.tree.map(jnp.asarray, update.delta)
    if ITEM_TABLE in delta:
      # A repeated row is never read, and the padding item is none.
      counts = first & (update.vocabulary.ids > 0)
      delta = {
        **delta,
        ITEM_TABLE: jnp.where(counts[:, None], delta[ITEM_TABLE], 0.0),
      }
    counted = update.weight > 0
    leaves, structure = jax.tree.flatten(delta)
    places = self._places(sender.params)
    below = []
    for number in range(len(self.norms)):
      own = [i for i, place in enumerate(places) if place == number]
      bound = sender.told[number]
      clipped, norm = clipping.clip_pytree(
        [leaves[i] for i in own], bound * _MARGIN
      )
      below.append(norm <= bound)
      for i, leaf in zip(own, clipped):
        leaves[i] = leaf / _whole(sender.told)
    # Half a client's worth on either side of 0: Andrew et al., section 3.1.
    sides = jnp.where(counted, jnp.stack(below) - 0.5, 0.0)
    return update._replace(
      delta=jax.tree.unflatten(structure, leaves),
      weight=counted.astype(jnp.float32),
      metrics=update.metrics
      | {UNCLIPPED: metrics_lib.Mean(sides, jnp.ones(()))},
    ), kept

  def released(self, delta, state):
    return jax.tree.map(lambda x: _whole(state) * x, delta)

  def server_step(self, state, metrics, key):
    if not self.quantile:
      return state
    noise = self.count_noise * jax.random.normal(key, state.shape)
    share = (metrics[UNCLIPPED].total + noise) / self.cohort + 0.5
    return state * jnp.exp(-self.quantile_rate * (share - self.quantile))

  def _places(self, params) -> list[int]:
    """Of each leaf, the number of its bound: the first group that has it."""
    masks = [
      jax.tree.leaves(groups_lib.mask(params, [name])) if name else None
      for name, _ in self.norms
    ]
    return [
      next(n for n, mask in enumerate(masks) if mask is None or mask[i])
      for i in range(len(jax.tree.leaves(params)))
    ]


def _whole(norms: jax.Array) -> jax.Array:
  """[] bound on the norm of all groups together."""
  return jnp.sqrt(jnp.sum(norms**2))


class PrivateSum(NamedTuple):
  """Running total of `PrivateMean`: Σ delta, in units of the clip norm."""

  delta: Any


@dataclasses.dataclass(frozen=True)
class PrivateMean(Aggregator):
  """The sum of clipped updates plus noise, over the expected number of clients.

  Attributes:
    cohort: that number.
    stddev: of the noise on the sum, in units of the clip norm; 0: none.
    coefficients: of the banded matrix, see `Clipping.coefficients`.
    rounds: that it is made for.
    frozen: names of the groups that get no noise, as nobody trains them.
  """

  cohort: float
  stddev: float
  coefficients: tuple[float, ...]
  rounds: int
  frozen: tuple[str, ...] = ()

  always_steps: ClassVar[bool] = True

  def init(self, params, key):
    """(data of the noise's key, buffers of correlated noise)."""
    if not self.stddev:
      return None
    key = jax.random.fold_in(key, _NOISE_STREAM)
    _, buffers = self._privatizer(key).init(self._trained(params))
    return jax.random.key_data(key), buffers

  def zero(self, params):
    return PrivateSum(jax.tree.map(jnp.zeros_like, params))

  def add(self, total, updates):
    return PrivateSum(add_weighted(total.delta, updates.weight, updates))

  def finish(self, total, collected, state, params):
    found = total.delta
    if self.stddev:
      key, buffers = state
      noisy, (key, buffers) = self._privatizer(None).update(
        self._trained(found), (jax.random.wrap_key_data(key), buffers)
      )
      state = jax.random.key_data(key), buffers
      found = self._with(found, noisy)
    return jax.tree.map(lambda x: x / self.cohort, found), state

  def _privatizer(self, key):
    noise = accounting.library('jax_privacy.noise_addition')
    key = jax.random.key(0) if key is None else key  # the state holds it
    if len(self.coefficients) == 1:
      return noise.gaussian_privatizer(stddev=self.stddev, prng_key=key)
    toeplitz = accounting.library('jax_privacy.matrix_factorization.toeplitz')
    coefficients = jnp.array(self.coefficients, jnp.float32)
    return noise.matrix_factorization_privatizer(
      toeplitz.inverse_as_streaming_matrix(
        coefficients / jnp.linalg.norm(coefficients), self.rounds
      ),
      stddev=self.stddev,
      prng_key=key,
    )

  def _is_frozen(self, tree) -> list[bool]:
    return jax.tree.leaves(groups_lib.mask(tree, self.frozen))

  def _trained(self, tree) -> list[jax.Array]:
    """The leaves that get noise."""
    return [
      leaf
      for leaf, frozen in zip(jax.tree.leaves(tree), self._is_frozen(tree))
      if not frozen
    ]

  def _with(self, tree, noisy):
    """`tree` with those leaves replaced; the padding item stays as it is."""
    rest = iter(noisy)

    def put(path, leaf, frozen):
      if frozen:
        return leaf
      new = next(rest)
      is_table = getattr(path[-1], 'key', None) == ITEM_TABLE
      return new.at[0].set(leaf[0]) if is_table else new

    return jax.tree_util.tree_map_with_path(
      put, tree, groups_lib.mask(tree, self.frozen)
    )


@dataclasses.dataclass(frozen=True)
class Plan:
  """The privacy of a run, before its first round.

  Attributes:
    mechanism: what `privacy` names.
    schedule: how a client takes part, in the federation that ε is of.
    clients: K of the simulation.
    cohort: clients of its cohorts, expected.
    rounds: of the run.
    delta: δ.
    noise_multiplier: z, of update and count together; 0 without noise.
    count_noise: standard deviation of the noise on the number of unclipped
      clients of a cohort of `schedule`, each group's; 0 without adaptation.
    frozen: names of groups that nobody trains.
    sketch_rounds: how many cohorts are asked for the sketch.
  """

  mechanism: Clipping
  schedule: Schedule
  clients: int
  cohort: float
  rounds: int
  delta: float
  noise_multiplier: float
  count_noise: float
  frozen: tuple[str, ...]
  sketch_rounds: int = 1

  @property
  def is_assumed(self) -> bool:
    """Whether ε is of another federation than the simulated one."""
    return self._scale != 1

  @property
  def _scale(self) -> float:
    """Noise here over noise there: a mean over fewer clients has fewer to
    drown it."""
    return self.cohort / self.schedule.cohort

  @property
  def sketch_noise(self) -> float:
    """Standard deviation of the noise on the sketch, see the function. No
    client is asked twice, so that who asks more cohorts than there are asks
    everybody, here or there."""
    here = min(self.cohort * self.sketch_rounds, self.clients)
    there = min(
      self.schedule.cohort * self.sketch_rounds, self.schedule.population
    )
    return next(iter(self.schedule.asked_before), 0.0) * here / there

  def transform(self) -> ClipUpdates:
    """What clips."""
    own = self.mechanism
    return ClipUpdates(
      (*own.bounds, ('', own.clip_norm)),
      self.cohort,
      own.quantile,
      own.quantile_rate,
      self.count_noise * self._scale,
    )

  def aggregator(self) -> PrivateMean:
    """What adds up and adds noise."""
    return PrivateMean(
      self.cohort,
      self._update_noise * self._scale,
      self.mechanism.coefficients(self.rounds, self.schedule.separation),
      self.rounds,
      self.frozen,
    )

  @property
  def _update_noise(self) -> float:
    """z_Δ, what is left for the update when the count has its noise: Andrew et
    al., Theorem 1, for each of the groups' counts."""
    if not self.count_noise:
      return self.noise_multiplier
    counts = (len(self.mechanism.bounds) + 1) / (2 * self.count_noise) ** 2
    return (self.noise_multiplier**-2 - counts) ** -0.5

  def epsilon(self, rounds: int) -> float | None:
    """ε after so many rounds; None without noise."""
    if not self.noise_multiplier:
      return None
    return accounting.epsilon(
      self.schedule, self.noise_multiplier, rounds, self.delta
    )

  def clip_norm(self, server: Any) -> float:
    """The bound on a whole update in the round after a server's state."""
    norms = server.transforms[-1]  # clipping is the last of them
    return float(np.linalg.norm(np.asarray(norms, np.float64)))

  def told(self, rounds: int) -> dict[str, Any]:
    """What is known after so many rounds, with the first clip norm, for
    `summary.json`."""
    norms = [norm for _, norm in self.transform().norms]
    return {
      'epsilon': self.epsilon(rounds),
      'delta': self.delta if self.noise_multiplier else None,
      'noise_multiplier': self.noise_multiplier,
      'clip_norm': float(np.linalg.norm(norms)),
      'sampling': self.schedule.sampling,
      'neighbours': self.schedule.neighbours,
      'accountant': accounting.ACCOUNTANT if self.noise_multiplier else None,
      'mechanism': type(self.mechanism).__name__.lower(),
      'clients': self.clients,
      'cohort': self.cohort,
      'assumed_clients': self.schedule.population if self.is_assumed else None,
      'assumed_cohort': self.schedule.cohort if self.is_assumed else None,
    }


def of(config: RunConfig, clients: int) -> Plan | None:
  """The plan of a config; None without privacy.

  Args:
    config: settings.
    clients: K that cohorts are drawn of.

  Raises:
    UserError: a setting that does not fit, an ε that cannot be reached, or the
      extra is not installed.
  """
  mechanism = part(config)
  if mechanism is None:
    return None
  accounting.library('jax_privacy')
  schedule, cohort = _schedule(config, mechanism, clients)
  rounds = config.server.num_rounds
  bands = getattr(mechanism, 'bands', 1)
  if bands > schedule.separation:
    raise UserError(
      f'`privacy={config.federation.privacy}`: bands={bands} is more than the '
      f'{schedule.separation} rounds between two turns of a client; take fewer '
      'bands or a smaller `client_fraction`'
    )
  delta = _delta(config, schedule.population)
  noise = getattr(mechanism, 'noise_multiplier', 0.0)
  if mechanism.is_private and not noise:
    noise = accounting.noise_for(
      schedule, config.federation.target_epsilon, rounds, delta
    )
  plan = Plan(
    mechanism,
    schedule,
    clients,
    cohort,
    rounds,
    delta,
    noise,
    schedule.cohort / 20 if mechanism.quantile and noise else 0.0,
    # What stays with the clients gets no noise at the server either.
    config.client.frozen_groups + config.federation.personal_groups,
    getattr(config.model.item_embedding, 'collaborative_rounds', 1),
  )
  counts = len(mechanism.bounds) + 1
  if plan.count_noise and 2 * plan.count_noise <= noise * counts**0.5:
    raise UserError(
      f'`privacy={config.federation.privacy}`: a cohort of '
      f'{schedule.cohort:g} clients is too small for a quantile beside a noise '
      f'multiplier of {noise:.3g}: their count would take all of epsilon; say '
      'quantile=0, or take larger cohorts (`client_fraction`)'
    )
  return plan


def part(config: RunConfig) -> Clipping | None:
  """What `privacy` names, checked against the other settings.

  Raises:
    UserError: as `of`, where the number of clients does not matter.
  """
  asked = config.federation
  if asked.privacy == OFF:
    for name, value in (
      ('target_epsilon', asked.target_epsilon and f'{asked.target_epsilon:g}'),
      ('delta', asked.delta != AUTO and asked.delta),
    ):
      if value:
        raise UserError(
          f'`{name}={value}` needs `privacy=gaussian`, or another mechanism'
        )
    return None
  found = parts.built(asked.privacy, MECHANISMS, Clipping, 'privacy')
  names = [name for name, _ in found.bounds]
  if len(set(names)) < len(names):
    raise UserError(f'`privacy={asked.privacy}`: a group has two norms')
  _check_noise(config, found)
  _check_leaks(config, found)
  if isinstance(found, Banded) and config.federation.sampling != CYCLIC:
    raise UserError(
      f'`privacy={asked.privacy}` needs `sampling=cyclic`: with '
      f'`sampling={asked.sampling}` a client may come in any round, '
      'and noise that is taken back would bare it'
    )
  return found


def _check_noise(config: RunConfig, found: Clipping) -> None:
  """Raises UserError unless exactly one thing says how much noise."""
  asked = config.federation
  noise = getattr(found, 'noise_multiplier', 0.0)
  place = f'`privacy={asked.privacy}`'
  if not found.is_private:
    if asked.target_epsilon:
      raise UserError(
        f'`target_epsilon={asked.target_epsilon:g}` needs noise, and {place} '
        'has none; say `privacy=gaussian`'
      )
  elif noise and asked.target_epsilon:
    raise UserError(
      f'{place} and `target_epsilon={asked.target_epsilon:g}` both say how '
      'much noise; give one'
    )
  elif not (noise or asked.target_epsilon):
    raise UserError(
      f'{place} needs `target_epsilon` above 0, or an option noise_multiplier'
    )
  elif 0 < getattr(found, 'sketch_noise', 0) < accounting.LEAST_NOISE:
    raise UserError(
      f'{place}: sketch_noise is below {accounting.LEAST_NOISE:g}, which is '
      'next to none'
    )
  elif noise and not accounting.LEAST_NOISE <= noise <= accounting.MOST_NOISE:
    raise UserError(
      f'{place}: noise_multiplier={noise:g} is not from '
      f'{accounting.LEAST_NOISE:g} to {accounting.MOST_NOISE:g}'
    )


def _check_leaks(config: RunConfig, found: Clipping) -> None:
  """Raises UserError for a setting by which something leaves a client without
  noise (the table in docs/privacy.md)."""
  start = config.model.item_embedding
  leaks = [
    (
      config.server.aggregator != 'fedavg',
      f'`aggregator={config.server.aggregator}`',
      'the noise is made for the plain mean; say `aggregator=fedavg`',
    ),
    (
      bool(config.global_memory),
      f'`global_memory={config.global_memory}`',
      'prototypes leave the clients without noise; say `global_memory=none`',
    ),
    (
      _has_sketch(config)
      and found.is_private
      and not getattr(found, 'sketch_noise', 0.0),
      f'`item_embedding={start}`',
      'the sketch tells which items stand in the same histories; give it noise '
      'too (the option sketch_noise), or leave collaborative_dim out',
    ),
    (
      isinstance(start, ContentPlusId) and start.shrinkage > 0,
      f'`item_embedding={start}`',
      'shrinkage counts who consumed what; leave it out',
    ),
    (
      config.evaluation.select_by != LAST_ROUND,
      f'`select_by={config.evaluation.select_by}`',
      'to choose a round by validation is to publish more of the clients; say '
      '`select_by=last`',
    ),
    (
      config.evaluation.patience > 0,
      f'`patience={config.evaluation.patience}`',
      'to stop by validation is to publish more of the clients; say '
      '`patience=0`',
    ),
    (
      bool(config.start.pretrained_path)
      and not getattr(found, 'public_start', True),
      f'`pretrained_path={config.start.pretrained_path}`',
      'epsilon would not cover the run before; if nobody here had a part in '
      'it, say so: public_start=true',
    ),
  ]
  for is_so, what, why in leaks:
    if is_so:
      raise UserError(f'`privacy={config.federation.privacy}`: {what}: {why}')


def _has_sketch(config: RunConfig) -> bool:
  start = config.model.item_embedding
  return isinstance(start, ContentInit) and start.collaborative_dim > 0


def sketch_noise(config: RunConfig, clients: int) -> float:
  """Standard deviation of the noise on the sum of what clients add to the
  sketch, each bounded by 1; 0 where the sketch is as it is. The noise on the
  counts of items before it is `COUNTS_NOISE` times that.

  Args:
    config: settings.
    clients: K that cohorts are drawn of.

  Raises:
    UserError: see `of`.
  """
  plan = of(config, clients)
  return plan.sketch_noise if plan else 0.0


def check_parts(
  config: RunConfig, aggregator: Aggregator | None, drift: DriftControl, params
) -> None:
  """Raises UserError for objects by which something leaves a client without
  noise.

  Args:
    config: settings.
    aggregator: one of the caller's own, or None.
    drift: the drift control.
    params: of the model, or their shapes.
  """
  place = f'`privacy={config.federation.privacy}`'
  if aggregator is not None:
    raise UserError(
      f'{place}: the noise is made for the plain mean, not for '
      f'{type(aggregator).__name__}; leave the aggregator out'
    )
  if jax.eval_shape(drift.no_upload, params) is not None:
    raise UserError(
      f'{place}: `drift_control={config.client.drift_control}` sends more than '
      'the update, without noise; say `drift_control=none` or fedprox'
    )


def _schedule(
  config: RunConfig, mechanism: Clipping, clients: int
) -> tuple[Schedule, float]:
  """(of the federation that ε is of, clients of a cohort here)."""
  sampling = config.federation.sampling
  separation = cohorts.separation(config, clients)
  cohort = cohorts.expected(config, clients)
  assumed = float(getattr(mechanism, 'cohort', 0)) or cohort
  population = float(getattr(mechanism, 'population', 0)) or (
    clients * assumed / cohort
  )
  if population < assumed:
    raise UserError(
      f'`privacy={config.federation.privacy}`: a population of '
      f'{population:g} clients has no cohorts of {assumed:g}'
    )
  if population != clients * assumed / cohort and sampling == CYCLIC:
    separation = math.floor(population / assumed)
  before: tuple[float, ...] = ()
  noise = getattr(mechanism, 'sketch_noise', 0.0)
  if noise and _has_sketch(config):
    before = (noise,)
    if config.model.item_embedding.collaborative_items:
      before += (COUNTS_NOISE * noise,)
  return Schedule(sampling, population, assumed, separation, before), cohort


def _delta(config: RunConfig, population: float) -> float:
  """δ, checked against the number of clients."""
  text = config.federation.delta
  if text == AUTO:
    return population**-1.1
  try:
    found = float(text)
  except ValueError:
    raise UserError(f'`delta={text}` is neither a number nor auto') from None
  if not 0 < found < 1 / population:
    raise UserError(
      f'`delta={text}` is not between 0 and 1/K = {1 / population:.3g} of '
      f'{population:g} clients: a larger one allows to publish some of them; '
      f'auto is {population**-1.1:.3g}'
    )
  return found
