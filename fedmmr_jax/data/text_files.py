"""Text files, plain or gzipped: their first lines, all lines, decoding."""

import codecs
import gzip
import pathlib
import zlib
from typing import BinaryIO, Iterator

import pyarrow as pa

from fedmmr_jax.errors import UserError

_GZIP = b'\x1f\x8b'
_HEAD = 1 << 16  # bytes looked at to tell a format


def is_gzip(path: pathlib.Path) -> bool:
  """Whatever its name says."""
  with path.open('rb') as file:
    return file.read(2) == _GZIP


def open_binary(path: pathlib.Path) -> BinaryIO:
  """The uncompressed bytes."""
  return gzip.open(path) if is_gzip(path) else path.open('rb')


def open_arrow(path: pathlib.Path) -> pa.NativeFile:
  """The uncompressed bytes, for Arrow's readers."""
  return pa.input_stream(
    str(path), compression='gzip' if is_gzip(path) else None
  )


def lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  """Yields (number from 1, line without its end) for lines that are not blank.

  Raises:
    UserError: the file cannot be read, or is cut off.
  """
  with readable(path), open_binary(path) as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        yield number, line.rstrip(b'\r\n')


def count_ends(path: pathlib.Path) -> int:
  """Ends of lines, fast."""
  with readable(path), open_binary(path) as file:
    return sum(
      chunk.count(b'\n') for chunk in iter(lambda: file.read(1 << 22), b'')
    )


def head(path: pathlib.Path) -> list[str]:
  """The first lines that are not blank; the last one may be half.

  Raises:
    UserError: as `lines`, or there is none.
  """
  with readable(path), open_binary(path) as file:
    start = file.read(_HEAD)
  found = [
    line.decode('utf-8-sig', 'replace')
    for line in start.splitlines()
    if line.strip()
  ]
  if not found:
    raise UserError(f'{path}: the file is empty')
  # Cut within a line: what is left of it tells nothing.
  return found[:-1] if len(start) == _HEAD and len(found) > 1 else found


def decode(
  line: bytes, path: pathlib.Path, number: int, encoding: str = 'utf-8'
) -> str:
  """A line's text.

  Raises:
    UserError: it is in another encoding.
  """
  if number == 1:
    line = line.removeprefix(codecs.BOM_UTF8)
  try:
    return line.decode(encoding)
  except UnicodeDecodeError as error:
    shown = line[max(error.start - 20, 0) : error.end + 20]
    raise UserError(
      f'{path}, line {number}: not UTF-8 at '
      f'{shown.decode("latin-1")!r}; re-encode the file, from latin-1 say '
      'with iconv -f latin1 -t utf8'
    ) from None


class readable:
  """Turns errors while reading a file into a UserError."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    del kind, trace
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
      raise UserError(
        f'{self._path}: the compressed file is cut off or damaged; fetch it '
        'again'
      ) from None
    if isinstance(error, OSError):
      raise UserError(
        f'{self._path}: cannot be read ({error.strerror or error})'
      ) from None
