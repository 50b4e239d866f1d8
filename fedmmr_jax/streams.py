"""The NumPy generators that a run draws from, one stream each.

A generator's seed is (run seed, stream, number…), so that no two draws share
their random numbers. JAX's keys are derived in `federation.round`.
"""

import enum

import numpy as np


@enum.unique
class Stream(enum.IntEnum):
  """What is drawn. The numbers are part of what a seed means: reuse none."""

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


def generator(seed: int, stream: Stream, *numbers: int) -> np.random.Generator:
  """The generator of one stream; `numbers` tell apart draws of the same kind,
  such as the round or the user."""
  return np.random.default_rng([seed, int(stream), *numbers])
