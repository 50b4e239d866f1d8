"""What determines a run's numbers besides its settings and data: the code, the
packages and the machine."""

import hashlib
import importlib.metadata
import pathlib

import jax

from fedmmr_jax.federation import devices

Facts = dict[str, str | int]

_OWN = 'fedmmr_jax'
_PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'numpy',
  'absl-py',
)
_SOURCE = pathlib.Path(__file__).parents[1]


def versions() -> Facts:
  """Package -> its version."""
  try:
    own = importlib.metadata.version(_OWN)
  except importlib.metadata.PackageNotFoundError:  # run from a checkout
    own = 'not installed'
  return {_OWN: own} | {
    name: importlib.metadata.version(name) for name in _PACKAGES
  }


def jax_versions() -> Facts:
  """Versions of the packages that compile, which determine rounding."""
  return {
    name: version
    for name, version in versions().items()
    if name in ('jax', 'jaxlib')
  }


def machine() -> Facts:
  """The properties of the machine that determine rounding."""
  return {
    'backend': jax.default_backend(),
    'devices': devices.count(),
    'cores': devices.cores(),
    'matmul_precision': jax.config.jax_default_matmul_precision or 'default',
  }


def program() -> Facts:
  """What results must share to be compared in one table. The number of cores is
  not included, because it only changes rounding."""
  return {
    _OWN: versions()[_OWN],
    'source': source_hash(),
    **jax_versions(),
    **{name: fact for name, fact in machine().items() if name != 'cores'},
  }


def source_hash(folder: pathlib.Path = _SOURCE) -> str:
  """Eight digits that change if any Python file of the package changes."""
  digest = hashlib.sha256()
  for path in sorted(folder.rglob('*.py')):
    digest.update(path.relative_to(folder).as_posix().encode() + b'\0')
    digest.update(path.read_bytes() + b'\0')
  return digest.hexdigest()[:8]


def difference(before: Facts, now: Facts) -> str:
  """'jax 0.11.1, now 0.11.2; cores 8, now 2', or '' if nothing differs. Values
  that were not recorded before are skipped."""
  return '; '.join(
    f'{name} {before[name]}, now {now[name]}'
    for name in now
    if name in before and before[name] != now[name]
  )
