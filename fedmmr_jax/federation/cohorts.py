"""How the cohort of a round is drawn; the privacy accountant reads it too.

`fixed`: so many clients, uniformly without replacement. `poisson`: each client
by a coin of its own, so that the size varies. `cyclic`: the clients are
shuffled once and dealt into groups that take turns, so that nobody comes again
before everybody else did.
"""

import math

import numpy as np

from fedmmr_jax.config import CYCLIC, POISSON, RunConfig
from fedmmr_jax.errors import UserError
from fedmmr_jax.streams import generator, Stream


def cohort_size(config: RunConfig, num_clients: int) -> int:
  """C: client_fraction · K, at least one; of `cyclic` the size of the smallest
  group, of `poisson` the expected size, rounded."""
  if config.federation.sampling == CYCLIC:
    return num_clients // separation(config, num_clients)
  return max(1, round(config.server.client_fraction * num_clients))


def expected(config: RunConfig, num_clients: int) -> float:
  """Clients of a cohort, in the mean over rounds."""
  if config.federation.sampling == POISSON:
    return config.server.client_fraction * num_clients
  if config.federation.sampling == CYCLIC:
    return num_clients / separation(config, num_clients)
  return cohort_size(config, num_clients)


def separation(config: RunConfig, num_clients: int) -> int:
  """Rounds from one turn of a client to its next at the least: the groups of
  `cyclic`, else 1."""
  if config.federation.sampling != CYCLIC:
    return 1
  return min(num_clients, max(1, round(1 / config.server.client_fraction)))


def most(config: RunConfig, num_clients: int) -> int:
  """The largest cohort there is room for, the same for every seed: rounds have
  one shape. A Poisson cohort is larger less than once in 10⁸ rounds
  (Bernstein's inequality), and then refused."""
  size = cohort_size(config, num_clients)
  more = math.ceil(size * config.federation.over_selection - 1e-9)
  if config.federation.sampling == CYCLIC:
    return -(-num_clients // separation(config, num_clients))
  if config.federation.sampling == POISSON:
    share = config.server.client_fraction
    deviation = math.sqrt(share * (1 - share) * num_clients)
    size = math.ceil(share * num_clients + 6 * deviation + 16)
  return min(size + more, num_clients)


def draw(
  config: RunConfig,
  round_number: int,
  clients: np.ndarray,
  there: np.ndarray | None = None,
) -> np.ndarray:
  """[≤ most] distinct members of a round's cohort.

  Args:
    config: how they are drawn, and the seed.
    round_number: 1-based.
    clients: [K] whom they are drawn of.
    there: [K] bool, which of them can be asked in this round; None = all.

  Raises:
    UserError: a Poisson cohort is larger than there is room for.
  """
  if config.federation.sampling == CYCLIC:
    groups = np.array_split(
      generator(config.seed, Stream.COHORT, 0).permutation(clients),
      separation(config, len(clients)),
    )
    group = groups[(round_number - 1) % len(groups)]
    return group if there is None else group[np.isin(group, clients[there])]
  rng = generator(config.seed, Stream.COHORT, round_number)
  size = most(config, len(clients))  # with `over_selection`
  found = clients if there is None else clients[there]
  if config.federation.sampling == POISSON:
    size = _poisson_size(config, rng, len(found))
    if size > most(config, len(clients)):
      raise UserError(
        f'round {round_number} draws {size} clients by `sampling=poisson`, '
        f'more than the {most(config, len(clients))} there is room for; take '
        f'another `seed` than {config.seed}'
      )
  return found[rng.choice(len(found), min(size, len(found)), replace=False)]


def check(config: RunConfig, num_clients: int) -> None:
  """Raises UserError if a round of the run draws too large a cohort, or one is
  to be larger than how it is drawn allows."""
  more, sampling = config.federation.over_selection, config.federation.sampling
  if more and sampling in (CYCLIC, POISSON):
    raise UserError(
      f'`over_selection={more:g}` asks more than a cohort, and '
      f'`sampling={sampling}` says who is one; say `sampling=fixed`'
    )
  if config.federation.sampling == POISSON:
    for number in range(1, config.server.num_rounds + 1):
      draw(config, number, np.arange(num_clients))


def _poisson_size(config, rng, num_clients) -> int:
  """Coins of all clients come to a binomial number of clients, which are then
  any of them."""
  return int(rng.binomial(num_clients, config.server.client_fraction))
