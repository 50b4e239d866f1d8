"""The Flower app over a real network: TLS on loopback, a process each."""

import datetime
import ipaddress
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

pytest.importorskip('flwr')

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.deploy.catalogue import FILE
from fedmmr_jax.deploy.cut import cut, NODES
from fedmmr_jax.runs.checkpoint import Rounds
from fedmmr_jax.runs.run_folder import RunFolder
from tests import small
from tests.test_deploy import SETTINGS

APP = pathlib.Path(__file__).parents[1] / 'examples' / 'flower'
BIN = pathlib.Path(sys.executable).parent
CONFIG = small.config(**SETTINGS, keep='all')


def certificates(folder):
  """Files of an authority and of 127.0.0.1, which it has signed."""
  names = [
    x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    for name in ('test authority', '127.0.0.1')
  ]
  keys = [ec.generate_private_key(ec.SECP256R1()) for _ in names]
  now = datetime.datetime.now(datetime.timezone.utc)

  def signed(number, extension):
    return (
      x509.CertificateBuilder()
      .subject_name(names[number])
      .issuer_name(names[0])
      .public_key(keys[number].public_key())
      .serial_number(x509.random_serial_number())
      .not_valid_before(now - datetime.timedelta(hours=1))
      .not_valid_after(now + datetime.timedelta(days=1))
      .add_extension(extension, critical=True)
      .sign(keys[0], hashes.SHA256())
      .public_bytes(serialization.Encoding.PEM)
    )

  alternative = x509.SubjectAlternativeName(
    [x509.IPAddress(ipaddress.ip_address('127.0.0.1'))]
  )
  authority, server, key = (
    folder / f'{x}.pem' for x in ('ca', 'server', 'key')
  )
  authority.write_bytes(signed(0, x509.BasicConstraints(True, None)))
  server.write_bytes(signed(1, alternative))
  key.write_bytes(
    keys[1].private_bytes(
      serialization.Encoding.PEM,
      serialization.PrivateFormat.PKCS8,
      serialization.NoEncryption(),
    )
  )
  return authority, server, key


def free_port():
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


def flags_of(config):
  """The command line of a config, by what differs from the default."""
  usual = type(config)().as_flat_dict()
  return ' '.join(
    f'--{name}={value}'
    for name, value in config.as_flat_dict().items()
    if value != usual[name]
  )


class Network:
  """Processes of one federation; all are ended when it is left."""

  def __init__(self, folder):
    self.folder = folder
    self.processes = []
    self.env = os.environ | {
      'FLWR_HOME': str(folder / 'flwr'),
      'FLWR_TELEMETRY_ENABLED': '0',
      'FLWR_DISABLE_UPDATE_CHECK': '1',
      'PATH': f'{BIN}{os.pathsep}{os.environ["PATH"]}',
    }

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    for process in self.processes:
      self.kill(process)

  def start(self, name, *arguments, cwd=None):
    """A process in a group of its own, which its children share."""
    with (self.folder / f'{name}.log').open('w') as log:
      self.processes.append(
        subprocess.Popen(
          arguments,
          stdout=log,
          stderr=subprocess.STDOUT,
          env=self.env,
          cwd=cwd,
          start_new_session=True,
        )
      )
    return self.processes[-1]

  def kill(self, process):
    try:
      os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass
    process.wait()

  def log(self, name):
    return (self.folder / f'{name}.log').read_text(errors='replace')

  def connect(self, port, how):
    """Tells `flwr run` where the server is."""
    home = self.folder / 'flwr'
    home.mkdir()
    (home / 'config.toml').write_text(
      f'[superlink.test]\naddress = "127.0.0.1:{port}"\n{how}\n'
    )

  def run(self, settings, *options):
    command = ('flwr', 'run', str(APP), 'test', '--stream', '-c', settings)
    self.start('run', *command, *options, cwd=self.folder)

  def wait_for_server(self):
    self.wait_until(
      lambda: 'running on http' in self.log('superlink').lower(), 90
    )

  def wait_until(self, done, seconds):
    end = time.monotonic() + seconds
    while not done():
      logs = [path.read_text() for path in self.folder.glob('*.log')]
      assert time.monotonic() < end, '\n'.join(logs)
      time.sleep(0.05)


@pytest.fixture(scope='module')
def expected():
  """The parameters after two simulated rounds, and how long they took."""
  start = time.monotonic()
  simulation = simulation_lib.build(CONFIG, small.dataset())
  params = [
    jax.tree.map(np.array, done.state.server.params)
    for done in simulation.rounds(count=2)
  ]
  return params, time.monotonic() - start


def app_settings(folder, timeout):
  """The run-config, as `flwr run` takes it."""
  return (
    f"flags='{flags_of(CONFIG)}' catalogue='{folder / FILE}' "
    f"workdir='{folder / 'run'}' nodes='{folder / NODES}' "
    f'round-timeout={timeout}'
  )


def assert_rounds(run, expected):
  for record in run.records()[: len(expected)]:
    assert record['answered'] == record['asked'], 'too slow a machine?'
  for number, params in enumerate(expected, 1):
    saved = Rounds(run.path).load_as_saved(number)
    small.assert_trees_close(
      saved['state']['server']['params'], params, rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_two_rounds_over_tls_and_one_without_a_killed_node(tmp_path, expected):
  params, seconds = expected
  cut(small.dataset(), tmp_path, 2)
  # The nodes may still have to compile what the simulation found in the cache;
  # the killed node is waited for as long.
  patience = 60 + 2 * seconds
  authority, certificate, key = certificates(tmp_path)
  port, run = free_port(), RunFolder(tmp_path / 'run')
  with Network(tmp_path) as network:
    network.connect(port, f'root-certificates = "{authority}"')
    network.start(
      'superlink',
      'flower-superlink',
      *('--host', '127.0.0.1', '--port', str(port)),
      *('--ssl-ca-certfile', authority, '--ssl-certfile', certificate),
      *('--ssl-keyfile', key, '--disable-runtime-dependency-installation'),
    )
    network.wait_for_server()
    nodes = [
      network.start(
        f'supernode{number}',
        'flower-supernode',
        *('--superlink', f'127.0.0.1:{port}', '--root-certificates', authority),
        *('--host', '127.0.0.1', '--port', str(free_port())),
        *('--node-config', f'folder="{folder}"'),
      )
      for number, folder in enumerate(sorted((tmp_path / NODES).iterdir()))
    ]
    network.run(app_settings(tmp_path, patience))
    network.wait_until(lambda: len(run.records()) >= 2, 6 * patience)
    network.kill(nodes[1])
    network.wait_until(lambda: len(run.records()) >= 3, 4 * patience)
  assert_rounds(run, params)
  # Clients are dealt to nodes like cards: node 0 has the even ones.
  last = run.records()[2]
  assert {x % 2 for x in last['asked']} == {0, 1}
  assert last['answered'] == [x for x in last['asked'] if x % 2 == 0]


@pytest.mark.slow
def test_two_rounds_in_flowers_simulation(tmp_path, expected):
  pytest.importorskip('ray')
  params, seconds = expected
  cut(small.dataset(), tmp_path, 2)
  patience = max(60.0, 4 * seconds)
  port, run = free_port(), RunFolder(tmp_path / 'run')
  with Network(tmp_path) as network:
    network.connect(port, 'insecure = true')
    network.start(
      'superlink',
      *('flower-superlink', '--insecure', '--simulation'),
      *('--host', '127.0.0.1', '--port', str(port)),
      '--disable-runtime-dependency-installation',
    )
    network.wait_for_server()
    network.run(
      app_settings(tmp_path, patience),
      *('--federation-config', 'num-supernodes=2'),
    )
    network.wait_until(lambda: len(run.records()) >= 2, 6 * patience)
  assert_rounds(run, params)
