"""The short form of `tests/stress.py`."""

import os
import sys

import pytest

from tests import stress

ROUNDS = int(os.environ.get('FEDMMR_STRESS_ROUNDS', 40))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='it binds threads to cores')
def test_a_run_ends_on_a_machine_without_peace(tmp_path):
  assert stress.stress(str(tmp_path / 'run'), ROUNDS, workers=4, seed=0) == 0
