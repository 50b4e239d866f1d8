"""Archives from a server on this machine: whole, cut off, wrong, by hand."""

import hashlib
import http.server
import io
import os
import pathlib
import socket
import stat
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest

from fedmmr_jax.data import download
from fedmmr_jax.data.download import Archive
from fedmmr_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
RATINGS = b'1::2::5::1000\n' * 100
MOST_REQUESTS = 4  # what asks for more goes round in circles


def zipped(*members) -> bytes:
  """An archive of (name or ZipInfo, bytes); what is random stays as large."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
    for name, content in members:
      archive.writestr(name, content)
  return file.getvalue()


BODY = zipped(
  ('ml-tiny/', b''),
  ('ml-tiny/ratings.dat', RATINGS),
  ('ml-tiny/movies.dat', np.random.default_rng(0).bytes(100_000)),
  ('ml-tiny/README', b'terms'),
  ('__MACOSX/ml-tiny/._README', b''),
)
FILES = ['README', 'movies.dat', 'ratings.dat']


class Server(http.server.ThreadingHTTPServer):
  """Serves `body` at every path.

  Attributes:
    body: the file.
    cut: bytes after which the connection ends, though more were promised.
    status: sent instead of the file; None = the file.
    ranges: does it know Range?
    requests: (path, Range header or None) of each request.
  """

  def __init__(self):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.body, self.cut, self.status, self.ranges = BODY, None, None, True
    self.requests = []

  def url(self, name: str = 'ml-tiny.zip') -> str:
    return f'http://127.0.0.1:{self.server_port}/{name}'

  def archive(self, known_hash: str | None = '') -> Archive:
    """What it offers; None: without a hash, '': with the right one."""
    if known_hash == '':
      known_hash = 'md5:' + hashlib.md5(BODY).hexdigest()
    return Archive(
      'ml-tiny', self.url(), known_hash, 'ml-1m', 'ratings.dat', 'movies.dat'
    )


class _Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    server = self.server
    wanted = self.headers['Range']
    server.requests.append((self.path, wanted))
    start = int(wanted[len('bytes=') : -1]) if wanted and server.ranges else 0
    if len(server.requests) > MOST_REQUESTS:
      return self.send_error(500)
    if server.status:
      return self.send_error(server.status)
    if start and start >= len(server.body):
      return self.send_error(416)
    self.send_response(206 if start else 200)
    if start:
      end = len(server.body)
      self.send_header('Content-Range', f'bytes {start}-{end - 1}/{end}')
    self.send_header('Content-Length', str(len(server.body) - start))
    self.end_headers()
    self.wfile.write(server.body[start : server.cut])

  def log_message(self, *_):
    pass


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setenv('NO_PROXY', '127.0.0.1')
  with Server() as running:
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.shutdown()
    thread.join()


def refused(archive: Archive, folder, **url) -> str:
  """The line of the error."""
  with pytest.raises(UserError) as caught:
    download.fetch(archive, folder, **url)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def listing(folder) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


def test_good_archive_and_second_call(server, tmp_path, capfd):
  folder = tmp_path / 'data' / 'tiny'
  first = download.fetch(server.archive(), folder)
  assert first.downloaded and first.archive == folder / 'ml-tiny.zip'
  assert [path.name for path in first.files] == FILES
  assert (folder / 'ratings.dat').read_bytes() == RATINGS
  assert listing(folder) == ['README', 'ml-tiny.zip', *FILES[1:]]

  (folder / 'README').unlink()
  kept = (folder / 'ratings.dat').stat()
  second = download.fetch(server.archive(), folder)
  assert second == first._replace(downloaded=False)
  assert (folder / 'README').read_bytes() == b'terms'
  assert (folder / 'ratings.dat').stat().st_ino == kept.st_ino
  assert server.requests == [('/ml-tiny.zip', None)]
  # Neither pooch nor, without a terminal, the progress bar.
  assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('ranges', [True, False])
def test_a_broken_connection_is_resumed(server, tmp_path, ranges):
  server.cut, server.ranges = 60_000, ranges
  assert 'call again to go on' in refused(server.archive(), tmp_path)
  assert listing(tmp_path) == ['ml-tiny.zip.part']
  size = (tmp_path / 'ml-tiny.zip.part').stat().st_size
  assert 0 < size <= server.cut

  server.cut = None
  assert download.fetch(server.archive(), tmp_path).downloaded
  assert server.requests[1:] == [('/ml-tiny.zip', f'bytes={size}-')]
  assert (tmp_path / 'ml-tiny.zip').read_bytes() == BODY
  assert not (tmp_path / 'ml-tiny.zip.part').exists()


def test_a_part_beyond_the_end_starts_over(server, tmp_path):
  (tmp_path / 'ml-tiny.zip.part').write_bytes(b'x' * (len(BODY) + 1))
  download.fetch(server.archive(), tmp_path)
  assert [wanted for _, wanted in server.requests] == [
    f'bytes={len(BODY) + 1}-',
    None,
  ]


def test_an_unreachable_server_keeps_the_part(server, tmp_path):
  (tmp_path / 'ml-tiny.zip.part').write_bytes(BODY[:100])
  server.status = 503
  assert '(HTTP 503 ' in refused(server.archive(), tmp_path)
  assert (tmp_path / 'ml-tiny.zip.part').read_bytes() == BODY[:100]


def test_wrong_hash_is_removed(server, tmp_path):
  (tmp_path / 'ml-tiny.zip.part').write_bytes(b'of another file')
  line = refused(server.archive(), tmp_path)
  assert 'its MD5 is not' in line and 'call again' in line
  assert listing(tmp_path) == []
  download.fetch(server.archive(), tmp_path)  # starts over


def _link(name):
  info = zipfile.ZipInfo(name)
  info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
  return info


@pytest.mark.parametrize(
  'member',
  [
    '../evil',
    'ml-tiny/../../evil',
    '/evil',
    'C:/evil',
    'ml-tiny/C:evil',
    '..\\evil',
    '\\\\host\\share\\evil',
    _link('ml-tiny/evil'),
  ],
  ids=lambda m: getattr(m, 'filename', m),
)
def test_a_member_that_escapes(server, tmp_path, member):
  server.body = zipped(('ml-tiny/ratings.dat', RATINGS), (member, b'/etc'))
  folder = tmp_path / 'data'
  assert 'evil' in refused(server.archive(None), folder)
  assert listing(tmp_path) == ['data'] and listing(folder) == []


def _damaged():
  """The checksum of the last member is wrong."""
  content = bytearray(BODY)
  content[BODY.index(b'ml-tiny/movies.dat') + 50_000] ^= 1
  return bytes(content)


@pytest.mark.parametrize(
  'body, said',
  [
    (zipped(('ml-tiny/movies.dat', b'')), 'no ratings.dat'),
    (BODY[:-30], 'no whole zip archive'),
    (_damaged(), 'no whole zip archive'),
    (b'<html>', 'no whole zip archive'),
    (b'', 'no whole zip archive'),
  ],
  ids=['missing', 'cut', 'damaged', 'page', 'empty'],
)
def test_useless_archives(server, tmp_path, body, said):
  server.body = body
  # What was fetched is removed, so that the next call starts over; what the
  # user put there is not.
  assert said in refused(server.archive(None), tmp_path)
  assert listing(tmp_path) == []
  (tmp_path / 'ml-tiny.zip').write_bytes(body)
  line = refused(server.archive(None), tmp_path)
  assert said in line and line.endswith('remove it and call again')
  assert listing(tmp_path) == ['ml-tiny.zip']


def test_http_errors_say_what_to_do_by_hand(server, tmp_path):
  server.status = 404
  mirror = server.url('mirror/any.zip')
  assert refused(server.archive(), tmp_path, url=mirror) == (
    f'{mirror}: cannot be fetched (HTTP 404 Not Found); put ml-tiny.zip into '
    f'{tmp_path}, or its ratings.dat and movies.dat, and call again'
  )
  assert server.requests == [('/mirror/any.zip', None)]


def test_placed_by_hand(server, tmp_path):
  server.status = 404
  (tmp_path / 'ml-tiny.zip').write_bytes(BODY)
  wrong = server.archive('md5:' + '0' * 32)
  assert 'is not the original: its MD5 is' in refused(wrong, tmp_path)
  fetched = download.fetch(server.archive(), tmp_path)
  assert not fetched.downloaded and len(fetched.files) == len(FILES)

  # The files will do too, but not half of them.
  (tmp_path / 'ml-tiny.zip').unlink()
  fetched = download.fetch(server.archive(), tmp_path)
  assert fetched.archive is None
  assert [path.name for path in fetched.files] == FILES[1:]
  (tmp_path / 'movies.dat').unlink()
  server.requests.clear()
  assert 'HTTP 404' in refused(server.archive(), tmp_path)


def test_no_file_is_overwritten(server, tmp_path):
  (tmp_path / 'README').write_text('mine!')  # as long as the one in it
  assert 'README is not the one in ml-tiny.zip' in refused(
    server.archive(), tmp_path
  )
  assert listing(tmp_path) == ['README', 'ml-tiny.zip']
  assert (tmp_path / 'README').read_text() == 'mine!'
  assert 'is a file' in refused(server.archive(), tmp_path / 'README')


def test_interrupted_unpacking(server, tmp_path, monkeypatch):
  (tmp_path / 'ml-tiny.zip').write_bytes(BODY)
  replace, moved = os.replace, []

  def interrupted(source, target):
    if moved:
      raise KeyboardInterrupt
    moved.append(target)
    replace(source, target)

  with monkeypatch.context() as patch:
    patch.setattr(os, 'replace', interrupted)
    with pytest.raises(KeyboardInterrupt):
      download.fetch(server.archive(), tmp_path)
  assert len(moved) == 1 and not (tmp_path / 'ratings.dat').exists()
  assert len(download.fetch(server.archive(), tmp_path).files) == len(FILES)
  assert not server.requests


def _run(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.download', *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
def test_command_line(server, tmp_path):
  server.body = zipped(
    ('ml-latest-small/ratings.csv', b'a,b\n'),
    ('ml-latest-small/movies.csv', b''),
  )
  flags = '--dataset=ml-latest-small', f'--data_dir={tmp_path / "a b"}'
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    refusing = f'http://127.0.0.1:{free.getsockname()[1]}/any.zip'
  done = _run(*flags, f'--url={refusing}')
  assert done.returncode == 2 and not done.stdout
  assert done.stderr == (
    f'error: {refusing}: cannot be fetched (Connection refused); put '
    f'ml-latest-small.zip into {tmp_path / "a b"}, or its ratings.csv and '
    'movies.csv, and call again\n'
  )

  done = _run(*flags, f'--url={server.url()}')
  assert done.returncode == 0 and not done.stderr
  assert hashlib.sha256(server.body).hexdigest() in done.stdout
  assert done.stdout.endswith(
    'python -m experiments.train --dataset=ml-latest '
    f"--data_dir='{tmp_path / 'a b'}'\n"
  )
