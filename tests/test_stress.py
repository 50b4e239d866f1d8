"""The short form of `tests/stress.py`."""

import os
import sys

import pytest

from tests import stress

ROUNDS = int(os.environ.get('FEDMMR_STRESS_ROUNDS', 40))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='it binds threads to cores')
def test_a_run_ends_on_a_machine_without_peace(tmp_path):
  cache = f'--compilation_cache={os.environ["JAX_COMPILATION_CACHE_DIR"]}'
  run = str(tmp_path / 'run')
  assert stress.stress(run, ROUNDS, 4, seed=0, flags=[cache]) == 0
