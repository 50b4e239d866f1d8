"""The server of `explore`: it knows HTTP alone, answers this machine only
(127.0.0.1), reads, and writes nothing."""

import errno
import http.server
import json
import re
import secrets
import traceback
import urllib.parse
from typing import Any, Callable

from experiments import app
from experiments.explorer import Explorer, Unknown
from fedmmr_jax.errors import UserError

HOST = '127.0.0.1'
# A page elsewhere may have its own name lead here; its requests carry it.
_OWN_NAMES = re.compile(r'(127\.0\.0\.1|localhost)(:\d+)?', re.IGNORECASE)
_LARGEST = 1 << 20  # bytes of a question
_SECONDS = 30  # for who asks slowly
_IMAGE_TYPES = {
  '.jpg': 'image/jpeg',
  '.jpeg': 'image/jpeg',
  '.png': 'image/png',
  '.webp': 'image/webp',
}


class Server(http.server.ThreadingHTTPServer):
  """Attributes:
  explorer: who answers.
  page: makes the page, given a nonce for its script and style.
  """

  daemon_threads = True
  explorer: Explorer
  page: Callable[..., str]

  def handle_error(self, request, client_address) -> None:
    """Whoever asked went away."""


def listen(port: int) -> Server:
  """A server on the loopback interface; 0 = any free port.

  Raises:
    UserError: the port is taken, or not ours to take.
  """
  try:
    return Server((HOST, port), _Handler)
  except OSError as error:
    why = {
      errno.EADDRINUSE: 'another process listens there',
      errno.EACCES: 'this user may not listen there',
    }.get(error.errno or 0, error.strerror)
    raise UserError(
      f'--port={port}: {why}; name another one, or --port=0 for any free one'
    ) from None


class _Handler(http.server.BaseHTTPRequestHandler):
  server: Server
  timeout = _SECONDS
  server_version, sys_version = 'fedmmr-explore', ''

  def do_GET(self) -> None:
    self._answer(self._get)

  def do_POST(self) -> None:
    self._answer(self._post)

  def log_message(self, *args: Any) -> None:
    pass

  def _answer(self, how: Callable[[], None]) -> None:
    """No request ends the server, whatever it asks."""
    try:
      if not _OWN_NAMES.fullmatch(self.headers.get('Host', '')):
        self._refuse(403, 'ask this server by the name 127.0.0.1 or localhost')
      else:
        how()
    except Unknown as error:
      self._refuse(404, str(error))
    except UserError as error:
      self._refuse(400, app.as_flags(str(error)))
    except OSError:  # gone, or too slow
      self.close_connection = True
    except Exception:
      traceback.print_exc()
      self._refuse(500, 'this failed; the terminal has the reason')

  def _get(self) -> None:
    path, _, query = self.path.partition('?')
    text = urllib.parse.parse_qs(query, errors='replace').get('q', [''])[0]
    match path.split('/')[1:]:
      case ['']:
        nonce = secrets.token_urlsafe()
        self._send(
          200, 'text/html', self.server.page(nonce=nonce).encode(), nonce
        )
      case ['users']:
        self._send_json(self.server.explorer.users(text))
      case ['items']:
        self._send_json(self.server.explorer.items(text))
      case ['similar']:
        self._send_json(self.server.explorer.similar(text))
      case ['images', item]:
        path = self.server.explorer.image(urllib.parse.unquote(item))
        kind = _IMAGE_TYPES[path.suffix.lower()]
        self._send(200, kind, path.read_bytes())
      case ['favicon.ico']:
        self._send(204, 'image/png', b'')
      case _:
        raise Unknown(f'there is no {path[:80]}')

  def _post(self) -> None:
    if self.path != '/explain':
      raise Unknown(f'there is no {self.path[:80]}')
    # Which no page elsewhere can send without asking.
    if self.headers.get_content_type() != 'application/json':
      self._refuse(415, 'ask in application/json')
      return
    length = self.headers.get('Content-Length', '')
    if not (length.isascii() and length.isdigit()):
      self._refuse(411, 'say a Content-Length')
    elif len(length) > 9 or int(length) > _LARGEST:
      self._refuse(413, f'ask in {_LARGEST} bytes at most')
    else:
      try:
        asked = json.loads(self.rfile.read(int(length)))
      except (ValueError, RecursionError):
        raise UserError('this is not JSON') from None
      self._send_json(self.server.explorer.explain(asked))

  def _refuse(self, status: int, message: str) -> None:
    self._send_json({'error': message}, status)

  def _send_json(self, content: Any, status: int = 200) -> None:
    # ASCII: halves of UTF-16 pairs in a title have no other form.
    body = json.dumps(content, allow_nan=False).encode()
    self._send(status, 'application/json', body)

  def _send(self, status: int, kind: str, body: bytes, nonce: str = '') -> None:
    own = f"'nonce-{nonce}'" if nonce else "'none'"
    self.send_response(status)
    for name, value in {
      'Content-Type': kind + ('; charset=utf-8' if kind == 'text/html' else ''),
      'Content-Length': str(len(body)),
      'Content-Security-Policy': (
        f"default-src 'none'; script-src {own}; style-src {own}; "
        "img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
      ),
      'Cross-Origin-Resource-Policy': 'same-origin',
      'Referrer-Policy': 'no-referrer',
      'X-Content-Type-Options': 'nosniff',
      'Cache-Control': 'no-store',
    }.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(body)
