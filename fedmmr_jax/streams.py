"""The NumPy generators of a run, one stream per purpose.

A generator's seed is (run seed, stream, number…), so that no two draws share
random numbers. JAX keys are derived in `federation.round`.
"""

import enum

import numpy as np


@enum.unique
class Stream(enum.IntEnum):
  """What is drawn. The numbers are part of the meaning of a seed: never reuse
  one."""

  COHORT = 1
  NEGATIVES = 2  # of the sampled protocol
  SYNTHETIC = 3
  EVALUATED_CLIENTS = 4
  COLD_ITEMS = 5
  BOOTSTRAP = 6
  SHUFFLED_FEATURES = 7
  FEATURE_QUALITY = 8
  POPULAR_NEGATIVES = 9
  AUDIT = 10
  COLLABORATIVE = 11
  NEW_CLIENTS = 12
  VALIDATION_CLIENTS = 13
  FAILURES = 14
  AVAILABILITY = 15
  ATTACKERS = 17
  CANARIES = 18  # of an audit of privacy


def generator(seed: int, stream: Stream, *numbers: int) -> np.random.Generator:
  """The generator of one stream; `numbers`, such as the round or the user,
  distinguish draws of the same kind."""
  return np.random.default_rng([seed, int(stream), *numbers])
