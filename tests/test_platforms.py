"""Where it runs: Linux and macOS; Windows is refused by name."""

import pathlib
import resource
import subprocess
import sys
import types

import jax
import pytest

from experiments import console
from fedmmr_jax import presets
from fedmmr_jax.runs import training
from tests import small
from tests.test_cli import ROOT

BINARIES = sorted(
  path.stem
  for path in pathlib.Path(ROOT, 'experiments').glob('*.py')
  if 'def cli()' in path.read_text()
)
LINE = 'fedmmr_jax runs on Linux and macOS; on Windows install it in WSL 2'


def on(platform, code):
  """Runs code in a process that takes itself to be on another platform."""
  return subprocess.run(
    [
      sys.executable,
      '-c',
      f'import runpy, sys\nsys.platform = {platform!r}\n{code}',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize('name', BINARIES)
def test_on_windows_a_binary_is_refused_in_one_line(name):
  module = f'experiments.{name}'
  done = on('win32', f'runpy.run_module({module!r}, run_name="__main__")')
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr == f'error: {LINE}\n'


def test_on_windows_a_console_script_is_refused_too():
  done = on('win32', 'from experiments.train import cli; cli()')
  assert (done.returncode, done.stderr) == (2, f'error: {LINE}\n')


@pytest.mark.parametrize('name', ['fedmmr_jax', 'fedmmr_jax.data.load'])
def test_on_windows_the_library_is_not_imported(name):
  done = on('win32', f'import {name}')
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1] == f'ImportError: {LINE}'


@pytest.mark.parametrize('platform, unit', [('linux', 1024), ('darwin', 1)])
def test_the_peak_is_in_bytes_on_macos_and_in_kib_on_linux(
  monkeypatch, platform, unit
):
  usage = types.SimpleNamespace(ru_maxrss=5_000_000 // unit)
  monkeypatch.setattr(resource, 'getrusage', lambda who: usage)
  monkeypatch.setattr(sys, 'platform', platform)
  assert training.peak_rss_mb() == pytest.approx(5, abs=0.001)


@pytest.mark.parametrize(
  'name, backend, changes, said',
  [
    ('gpu', 'cpu', {}, 1),
    ('gpu', 'gpu', {}, 0),
    ('gpu', 'cpu', {'num_rounds': 3}, 1),
    ('gpu', 'cpu', {'clients_per_chunk': 2}, 0),
    ('recommended', 'cpu', {'data_dir': 'ml-1m'}, 0),
  ],
)
def test_the_settings_of_a_gpu_without_one_are_told(
  monkeypatch, name, backend, changes, said
):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  lines = console.no_gpu(presets.preset(name, **changes))
  assert [line[:40] for line in lines] == [
    '  no GPU     JAX found none and runs on '
  ] * said


def test_the_banner_tells_of_a_missing_gpu():
  gpu = presets.preset('gpu').as_flat_dict()
  names = (
    'clients_per_chunk',
    'clients_per_eval_chunk',
    'items_per_eval_block',
  )
  simulation = small.simulation(**{name: gpu[name] for name in names})
  is_cpu = jax.default_backend() == 'cpu'
  assert ('  no GPU ' in console.banner(simulation)) == is_cpu
  assert '  no GPU ' not in console.banner(small.simulation())
