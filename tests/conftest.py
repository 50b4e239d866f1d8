"""Settings of the test process, made before JAX starts."""

import gc
import os

# The tests compile much and run little: skip LLVM's optimisation passes.
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0')

import jax
import pytest


@pytest.fixture(scope='module', autouse=True)
def forget_compiled_programs():
  """A compiled program keeps memory maps, of which Linux allows a process
  65,530: the whole suite without this ends in a segmentation fault."""
  yield
  jax.clear_caches()
  gc.collect()
