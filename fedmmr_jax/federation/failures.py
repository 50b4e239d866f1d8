"""Clients that fail: what becomes of each client that is asked in a round.

Who does not answer is decided on the host, before the round, and is a padding
client in it: nothing of it reaches the server, and it keeps what it had after
its last answer that counted, as a node does (`deploy/node.py`). What those that
do answer have done to them, fewer steps or a broken update, is told to the
compiled round, as numbers, so that other fates compile nothing anew.

Every draw is one of (seed, round, client) alone: who else is asked, how the
cohort is cut into chunks and how many workers there are change no client's
fate, and a run that is resumed meets the same.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax import parts
from fedmmr_jax.config import RunConfig
from fedmmr_jax.federation.devices import PADDING_CLIENT
from fedmmr_jax.federation.transforms import UpdateTransform
from fedmmr_jax.streams import generator, Stream

ANSWERS, DROPS, LOSES, LATE = range(4)
_FACTORS = {'nan': math.nan, 'infinite': math.inf, 'long': 1e6}
ANY = 'any'


class Fate(NamedTuple):
  """What is done to a client's update in a round; all clients' have an axis [K]
  in front.

  Attributes:
    work: [] float32 share of its local steps that it takes.
    factor: [] float32 its update is multiplied by; 1 = a sound one.
  """

  work: jax.Array
  factor: jax.Array


class Fates(NamedTuple):
  """What becomes of all clients in a round, if they are asked.

  Attributes:
    outcome: [K] int: ANSWERS, DROPS before it trains, LOSES its answer, or is
      LATE with it.
    delay: [K] float, by which the answers come in order.
    fate: of those that answer, [K] float32 each.
  """

  outcome: np.ndarray
  delay: np.ndarray
  fate: Fate


@dataclasses.dataclass(frozen=True)
class Failures:
  """Nobody fails; the base class of what `failures` names."""

  def fates(self, seed: int, round_number: int, num_clients: int) -> Fates:
    """What becomes of each client.

    Args:
      seed: of the run.
      round_number: 1-based.
      num_clients: K.
    """
    ones = np.ones(num_clients, np.float32)
    return Fates(
      np.full(num_clients, ANSWERS),
      _rng(seed, round_number, 'delay').random(num_clients),
      Fate(ones, ones),
    )


def _share(help: str):
  return dataclasses.field(
    default=0.0, metadata={'help': help, 'minimum': 0.0, 'maximum': 1.0}
  )


@dataclasses.dataclass(frozen=True)
class Random(Failures):
  """Shares of the clients fail, each in one way, drawn anew in each round.

  A straggler takes a part of its local steps (Li et al. 2020, "Federated
  optimization in heterogeneous networks", MLSys, section 5.2), and answers
  last.

  Attributes:
    drop: goes away before it has trained.
    lose: trains, and its answer is lost.
    late: trains, and its answer comes when the round is over.
    straggle: takes the share `work` of its steps, at least one.
    corrupt: sends an update that is broken as `corruption` says.
    work: of a straggler's steps.
    corruption: nan, infinite, long (a million times too long), or any of them.
    fixed: the same clients fail in all rounds.
  """

  drop: float = _share('goes away before it has trained')
  lose: float = _share('trains, and its answer is lost')
  late: float = _share('trains, and its answer comes too late')
  straggle: float = _share('takes a part of its steps')
  corrupt: float = _share('sends a broken update')
  work: float = dataclasses.field(
    default=0.5, metadata={'minimum': 0.0, 'maximum': 1.0}
  )
  corruption: str = dataclasses.field(
    default='nan', metadata={'choices': (*_FACTORS, ANY)}
  )
  fixed: bool = False

  def __post_init__(self):
    if sum(self._shares) > 1 + 1e-9:
      raise ValueError(
        f'the shares of clients that fail add up to {sum(self._shares):g}, '
        'more than all'
      )

  @property
  def _shares(self) -> tuple[float, ...]:
    return self.drop, self.lose, self.late, self.straggle, self.corrupt

  def fates(self, seed, round_number, num_clients):
    drawn = 0 if self.fixed else round_number
    bounds = np.cumsum(self._shares)
    place = np.searchsorted(
      bounds, _rng(seed, drawn, 'fate').random(num_clients), side='right'
    )
    straggles, corrupt = place == 3, place == 4
    factors = np.array(list(_FACTORS.values()), np.float32)
    kind = _rng(seed, drawn, 'kind').integers(len(factors), size=num_clients)
    if self.corruption != ANY:
      kind[:] = list(_FACTORS).index(self.corruption)
    return Fates(
      np.array([DROPS, LOSES, LATE, ANSWERS, ANSWERS, ANSWERS])[place],
      _rng(seed, round_number, 'delay').random(num_clients) + straggles,
      Fate(
        np.where(straggles, self.work, 1).astype(np.float32),
        np.where(corrupt, factors[kind], 1).astype(np.float32),
      ),
    )


def _rng(seed: int, round_number: int, what: str) -> np.random.Generator:
  number = ('fate', 'kind', 'delay').index(what)
  return generator(seed, Stream.FAILURES, round_number, number)


FAILURES: dict[str, type[Failures]] = {'none': Failures, 'random': Random}


def of(config: RunConfig) -> Failures:
  """The failures that a config names.

  Raises:
    UserError: there are none of that name, an option is unknown, or the shares
      add up to more than 1.
  """
  return parts.built(config.federation.failures, FAILURES, Failures, 'failures')


class Answers(NamedTuple):
  """Who of a cohort answers, before the server looks at what came.

  Attributes:
    cohort: [G, C/G] int32 as it was asked, PADDING_CLIENT in place of those
      whose answer does not count.
    fates: what is done to their updates, [K] each; None if nobody fails.
    counts: how many were asked, were dropped, lost, late; names of metrics.
  """

  cohort: np.ndarray
  fates: Fate | None
  counts: dict[str, int]


def answers(
  failures: Failures,
  seed: int,
  round_number: int,
  cohort: np.ndarray,
  num_clients: int,
  wanted: int | None = None,
) -> Answers:
  """What comes back from a cohort.

  Args:
    failures: how clients fail.
    seed: of the run.
    round_number: 1-based.
    cohort: [G, C/G] int32 that was asked, PADDING_CLIENT where none.
    num_clients: K.
    wanted: the round closes with so many answers, and the others are late
      (Bonawitz et al. 2019, "Towards federated learning at scale: system
      design", MLSys, section 2.2); None = it waits for all.
  """
  clients = cohort[cohort >= 0]
  counts = {metrics_lib.ASKED: len(clients)}
  if failures == Failures() and wanted is None:
    return Answers(cohort, None, counts)
  outcome, delay, fate = failures.fates(seed, round_number, num_clients)
  outcome = np.array(outcome)
  if wanted is not None:
    there = np.sort(clients[outcome[clients] == ANSWERS])
    order = there[np.argsort(delay[there], kind='stable')]
    outcome[order[wanted:]] = LATE
  found = outcome[clients]
  for name, missing in (
    (metrics_lib.DROPPED, DROPS),
    (metrics_lib.LOST, LOSES),
    (metrics_lib.LATE, LATE),
  ):
    counts[name] = int((found == missing).sum())
  there = (cohort >= 0) & (outcome[cohort] == ANSWERS)
  return Answers(
    np.where(there, cohort, PADDING_CLIENT).astype(np.int32),
    None if failures == Failures() else fate,
    counts,
  )


@dataclasses.dataclass(frozen=True)
class Corruption(UpdateTransform):
  """Multiplies what a client sends by the factor of its fate. An absurdly long
  one keeps its weight and metrics, which would tell on it."""

  def apply(self, update, kept, sender):
    factor = sender.fate.factor
    others = jnp.where(jnp.isfinite(factor), 1.0, factor)
    sent = update.sent()
    broken = {
      name: jax.tree.map(
        lambda x: x * (factor if name in ('delta', 'control') else others), tree
      )
      for name, tree in sent.items()
      if name != 'steps'
    }
    return update._replace(**broken), kept


def corruption(config: RunConfig) -> UpdateTransform:
  """What breaks updates on their way, if clients fail."""
  return UpdateTransform() if of(config) == Failures() else Corruption()
