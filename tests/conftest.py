"""Settings of the test process, made before JAX starts."""

import gc
import os
import shutil
import tempfile

# The tests compile much and run little: skip LLVM's optimisation passes, and
# emit fusions the old way, which halves what XLA takes (a round in 7 s instead
# of 15). tests/test_production.py does neither.
os.environ['XLA_FLAGS'] = ' '.join(
  (
    os.environ.get('XLA_FLAGS', ''),
    '--xla_backend_optimization_level=0',
    '--xla_cpu_use_fusion_emitters=false',
  )
)
# Two workers on two cores: more devices would only be more to compile.
# tests/test_devices.py has some.
os.environ['JAX_NUM_CPU_DEVICES'] = '1'
# What one worker has compiled serves the others, later modules and the binaries
# that tests start. Single operations are most of it: with all of them kept, two
# modules took 37 s of CPU time instead of 45, and 16 instead of 35 when begun
# again.
# Who names it, as .ci/run does, has it outlive the run.
_IS_OURS = 'FEDMMR_TEST_RUN' not in os.environ
_CACHE = os.path.join(
  tempfile.gettempdir(),
  'fedmmr-tests-' + os.environ.setdefault('FEDMMR_TEST_RUN', str(os.getpid())),
)
os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax
import numpy as np
import pytest

# A third of what tracing takes was looking for garbage among all that JAX has
# traced. forget_compiled_programs collects after each module.
gc.set_threshold(50_000)
# Tests compare float32 numbers; recent GPUs multiply in TF32 unless told
# otherwise.
jax.config.update('jax_default_matmul_precision', 'highest')


# Their tests take longest: who began such a file last would end alone.
_LONGEST = (
  'test_flower.py',
  'test_personal.py',
  'test_warm_start.py',
  'test_cli.py',
  'test_federation.py',
  'test_supervision.py',
  'test_kill.py',
  'test_stress.py',
  'test_audit.py',
  'test_vocabulary.py',
  'test_profile.py',
  'test_devices.py',
  'test_view.py',
  'test_ablation.py',
  'test_training.py',
  'test_optimizers.py',
)


def pytest_collection_modifyitems(items):
  rank = {name: number for number, name in enumerate(_LONGEST)}
  items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_unconfigure(config):
  if _IS_OURS and not hasattr(config, 'workerinput'):  # no xdist worker
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope='module', autouse=True)
def forget_compiled_programs():
  """A compiled program keeps memory maps, of which Linux allows a process
  65,530: the whole suite without this ends in a segmentation fault."""
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture
def ml_1m(tmp_path):
  """A tiny set in MovieLens-1M's own format, with features."""
  folder = tmp_path / 'ml-1m'
  folder.mkdir()
  rng = np.random.default_rng(0)
  lines = [
    f'{user}::{item}::5::{1000 + t}'
    for user in range(1, 7)
    for t, item in enumerate(rng.permutation(np.arange(1, 31))[:9])
  ]
  (folder / 'ratings.dat').write_text('\n'.join(lines) + '\n')
  (folder / 'movies.dat').write_bytes(
    '\n'.join(f'{i}::Amélie {i} (2001)::Drama' for i in range(1, 31)).encode(
      'latin-1'
    )
  )
  for kind, width in (('visual', 8), ('text', 6)):
    matrix = rng.normal(size=(31, width)).astype(np.float32)
    matrix[0] = 0
    np.save(folder / f'{kind}_features.npy', matrix)
  return folder
