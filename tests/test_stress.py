"""The short form of `tests/stress.py`."""

import os

import pytest

from tests import stress

ROUNDS = int(os.environ.get('FEDMMR_STRESS_ROUNDS', 60))


@pytest.mark.slow
@pytest.mark.parametrize('workers', [2, 8])
def test_a_run_ends_on_a_machine_without_peace(tmp_path, workers):
  assert stress.stress(str(tmp_path / 'run'), ROUNDS, workers, seed=0) == 0
