"""Binaries as a user runs them, but for what Python takes to import.

A process that has imported the libraries forks for each call, which saves half
of what a short one takes. The child's arguments, folder, environment, standard
streams and exit status are those of `python -m experiments.NAME`; none of our
own modules is there yet. JAX starts its threads when it is first used, which is
in the child.
"""

import atexit
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Read when JAX is imported: with others, a process of its own.
_READ_AT_IMPORT = ('JAX_', 'XLA_', 'PYTHON')


def run(name: str, flags: list[str]) -> 'subprocess.CompletedProcess[str]':
  """Runs `python -m experiments.NAME FLAGS` in the checkout."""
  started, environment = _process()
  if _import_settings(environment) != _import_settings(os.environ):
    return subprocess.run(
      [sys.executable, '-m', f'experiments.{name}', *flags],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
  with tempfile.TemporaryDirectory() as folder:
    out, err = (pathlib.Path(folder) / x for x in ('out', 'err'))
    asked = {
      'name': f'experiments.{name}',
      'flags': flags,
      'environment': dict(os.environ),
      'streams': [os.devnull, str(out), str(err)],
    }
    started.stdin.write(json.dumps(asked) + '\n')
    started.stdin.flush()
    status = int(started.stdout.readline())
    return subprocess.CompletedProcess(
      [name, *flags], status, out.read_text(), err.read_text()
    )


@functools.cache
def _process():
  """(the process that forks, its environment)."""
  environment = dict(os.environ)
  started = subprocess.Popen(
    [sys.executable, '-m', 'tests.binaries'],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env=environment,
  )
  atexit.register(started.stdin.close)  # it ends when there is nothing to read
  return started, environment


def _import_settings(environment):
  return {
    name: value
    for name, value in environment.items()
    if name.startswith(_READ_AT_IMPORT)
  }


def _serve():
  """Forks for each line that is read; returns, with the line, in a child."""
  for line in sys.stdin:
    child = os.fork()
    if not child:
      return json.loads(line)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
  sys.exit()


def _become(asked) -> None:
  """Runs the binary in this process."""
  import runpy

  os.environ.clear()
  os.environ.update(asked['environment'])
  for number, path in enumerate(asked['streams']):
    flags = os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY
    os.dup2(os.open(path, flags, 0o600), number)
  sys.argv = [asked['name'], *asked['flags']]
  # Nothing of what forked it is left.
  for name in [x for x in sys.modules if x.split('.')[0] == 'tests']:
    del sys.modules[name]
  runpy.run_module(asked['name'], run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  import warnings

  # Not ours: what all binaries import, and only some.
  import absl.flags  # noqa: F401
  import flax.linen  # noqa: F401
  import jax  # noqa: F401
  import numpy  # noqa: F401
  import optax  # noqa: F401
  import pyarrow  # noqa: F401
  from jax._src import xla_bridge
  from orbax.checkpoint import v1  # noqa: F401

  assert not xla_bridge.backends_are_initialized()
  # JAX warns of forks in processes that have threads; this one has none yet.
  warnings.filterwarnings('ignore', 'os.fork')
  _become(_serve())
