"""Who can be asked in a round: devices that are on, idle and on a network.

An availability says of each round which clients are there; the cohort is drawn
from them. Its draws are of (seed, round, client), on the host.
"""

import csv
import dataclasses
import functools

import numpy as np

from fedmmr_jax import parts
from fedmmr_jax.config import RunConfig
from fedmmr_jax.errors import UserError
from fedmmr_jax.streams import generator, Stream

COLUMNS = ('client', 'first', 'last')


@dataclasses.dataclass(frozen=True)
class Availability:
  """Everybody, always; the base class of what `availability` names."""

  def there(
    self, seed: int, round_number: int, ids: np.ndarray
  ) -> np.ndarray | None:
    """Which clients are there.

    Args:
      seed: of the run.
      round_number: 1-based.
      ids: [K] of the source.

    Returns:
      [K] bool; None = all.
    """
    return None

  def check(
    self, ids: np.ndarray, taking_part: np.ndarray, rounds: int
  ) -> None:
    """Raises UserError for what cannot be, before round 1.

    Args:
      ids: [K] of the source.
      taking_part: numbers of the clients that train at all.
      rounds: of the run.
    """


@dataclasses.dataclass(frozen=True)
class Day(Availability):
  """By time of day: client k is there in round r with probability
  share · (1 + swing · sin 2π(r / rounds + phase_k)), cut off at 0 and 1.

  Attributes:
    share: of the clients, in the mean.
    swing: how far it goes up and down, of `share`.
    rounds: of a day.
    zones: share of the day over which the clients' own phases lie; 0 = all
      live in one time zone.
  """

  share: float = dataclasses.field(
    default=0.5, metadata={'minimum': 1e-9, 'maximum': 1.0}
  )
  swing: float = dataclasses.field(
    default=1.0, metadata={'minimum': 0.0, 'maximum': 1.0}
  )
  rounds: int = dataclasses.field(default=24, metadata={'minimum': 2})
  zones: float = dataclasses.field(
    default=0.25, metadata={'minimum': 0.0, 'maximum': 1.0}
  )

  def there(self, seed, round_number, ids):
    phase = self.zones * generator(seed, Stream.AVAILABILITY, 0).random(
      len(ids)
    )
    wave = np.sin(2 * np.pi * (round_number / self.rounds + phase))
    drawn = generator(seed, Stream.AVAILABILITY, round_number).random(len(ids))
    return drawn < self.share * (1 + self.swing * wave)


@dataclasses.dataclass(frozen=True)
class Trace(Availability):
  """By a file: lines `client,first,last`, with this header, say that a client
  is there from round `first` to round `last`, both included. A client may have
  several lines; one without any is never there.

  Attributes:
    file: the CSV file.
    period: its rounds come again after so many; 0 = they do not.
  """

  file: str
  period: int = dataclasses.field(default=0, metadata={'minimum': 0})

  def there(self, seed, round_number, ids):
    if self.period:
      round_number = (round_number - 1) % self.period + 1
    number_of = _numbers(tuple(map(str, ids)))
    found = np.zeros(len(ids), bool)
    for client, first, last in _read(self.file):
      if first <= round_number <= last:
        found[number_of[client]] = True
    return found

  def check(self, ids, taking_part, rounds):
    number_of = _numbers(tuple(map(str, ids)))
    unknown = [c for c, _, _ in _read(self.file) if c not in number_of]
    if unknown:
      raise UserError(
        f'{self.file}: client {unknown[0]!r} is not in the data set, and '
        f'{len(set(unknown)) - 1} more; a trace names clients as the '
        'interactions do'
      )
    for number in range(1, min(rounds, self.period or rounds) + 1):
      if not self.there(0, number, ids)[taking_part].any():
        raise UserError(
          f'{self.file}: nobody who trains is there in round {number}; give '
          'the trace more rounds, `availability=trace,…,period=…`, or fewer '
          '`num_rounds`'
        )


@functools.lru_cache(maxsize=4)
def _read(file: str) -> list[tuple[str, int, int]]:
  """(client, first round, last round) of each line.

  Raises:
    UserError: there is no such file, or a line is none.
  """
  try:
    with open(file, newline='', encoding='utf-8-sig') as lines:
      rows = csv.reader(lines)
      header = next(rows, [])
      if tuple(word.strip() for word in header) != COLUMNS:
        raise UserError(
          f'{file}: the first line of a trace is {",".join(COLUMNS)}'
        )
      return [_parsed(file, n, row) for n, row in enumerate(rows, 2) if row]
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{file}: cannot read the trace ({error})') from None


def _parsed(file: str, number: int, row: list[str]) -> tuple[str, int, int]:
  try:
    client, first, last = (word.strip() for word in row)
    found = client, int(first), int(last)
  except ValueError:
    raise UserError(
      f'{file}, line {number}: not a client and two round numbers'
    ) from None
  if not 1 <= found[1] <= found[2]:
    raise UserError(
      f'{file}, line {number}: rounds go from 1 on, and from first to last'
    )
  return found


@functools.lru_cache(maxsize=4)
def _numbers(ids: tuple[str, ...]) -> dict[str, int]:
  return {client: number for number, client in enumerate(ids)}


AVAILABILITIES: dict[str, type[Availability]] = {
  'always': Availability,
  'day': Day,
  'trace': Trace,
}


def of(config: RunConfig) -> Availability:
  """The availability that a config names.

  Raises:
    UserError: there is none of that name, or it has no such option.
  """
  return parts.built(
    config.federation.availability, AVAILABILITIES, Availability, 'availability'
  )
