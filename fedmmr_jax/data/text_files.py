"""Text files, plain or compressed: their first lines, all lines, decoding."""

import ast
import bz2
import codecs
import fnmatch
import functools
import gzip
import io
import json
import lzma
import pathlib
import zipfile
import zlib
from typing import Any, BinaryIO, IO, Iterator

import pyarrow as pa

from fedmmr_jax.errors import UserError

# How a compressed file begins, and the ends of names that promise one.
_MAGIC = {
  b'\x1f\x8b': 'gzip',
  b'BZh': 'bz2',
  b'\xfd7zXZ': 'xz',
  b'\x28\xb5\x2f\xfd': 'zstd',
  b'PK\x03\x04': 'zip',
}
ENDS = ('', '.gz', '.bz2', '.xz', '.zst', '.zip')
# What reading a compressed file raises if it is cut off or damaged.
DAMAGED = (
  EOFError,
  zlib.error,
  gzip.BadGzipFile,
  lzma.LZMAError,
  zipfile.BadZipFile,
)
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Of what strangers send: a line, a Python literal; what a small file may unpack
# to, logs shrink some tenfold.
MAX_LINE = 1 << 26  # bytes
MAX_LITERAL = 1 << 20  # characters
_MAX_EXPANSION, _ALWAYS_ALLOWED = 500, 1 << 30
_HEAD = 1 << 16  # bytes looked at to tell a format


def plain_name(path: pathlib.Path) -> str:
  """A file's name without the end that says it is compressed."""
  end = path.suffix.lower()
  return path.name[: -len(end)] if end and end in ENDS else path.name


def matching(folder: pathlib.Path, pattern: str) -> list[pathlib.Path]:
  """Files of a folder by a pattern, whatever the case, compressed ones too;
  sorted by name, plain ones first."""
  found = [
    path
    for path in sorted(folder.iterdir())
    if any(
      fnmatch.fnmatchcase(path.name.lower(), pattern.lower() + end)
      for end in ENDS
    )
  ]
  return sorted(found, key=lambda path: plain_name(path) != path.name)


def open_binary(path: pathlib.Path) -> BinaryIO:
  """The uncompressed bytes.

  Raises:
    UserError: they are no text in UTF-8 or latin-1, or the file is an archive
      of several.
  """
  file = io.BufferedReader(_uncompressed(path), 1 << 18)
  start = file.peek(4)[:4]
  if start.startswith(_UTF_16):
    raise UserError(
      f'{path}: in UTF-16, as some programs of Windows write; re-encode it '
      'with iconv -f utf-16 -t utf8'
    )
  if b'\0' in start:
    raise UserError(f'{path}: not a text file')
  return file


def _uncompressed(path: pathlib.Path) -> io.RawIOBase:
  with path.open('rb') as raw:
    start = raw.read(8)
  kind = next((k for m, k in _MAGIC.items() if start.startswith(m)), '')
  if not kind:
    return path.open('rb', buffering=0)
  opened: Any
  if kind == 'zip':
    opened = _member(path)
  elif kind == 'zstd':
    opened = pa.input_stream(str(path), compression='zstd')
  else:
    opened = {'gzip': gzip, 'bz2': bz2, 'xz': lzma}[kind].open(path)
  return _Bounded(opened, path)


def _member(path: pathlib.Path) -> IO[bytes]:
  """The only file in an archive."""
  archive = zipfile.ZipFile(path)
  names = [
    name
    for name in archive.namelist()
    if not name.endswith('/') and not name.startswith('__MACOSX/')
  ]
  if len(names) != 1:
    raise UserError(
      f'{path}: a zip archive of {len(names)} files; unpack it, and name the '
      'folder or the file'
    )
  if archive.getinfo(names[0]).flag_bits & 1:
    raise UserError(f'{path}: an archive with a password; unpack it')
  return archive.open(names[0])


class _Bounded(io.RawIOBase):
  """What a compressed file unpacks to, up to a bound."""

  def __init__(self, file: Any, path: pathlib.Path):
    self._file, self._path, self._count = file, path, 0
    self._most = max(_ALWAYS_ALLOWED, _MAX_EXPANSION * path.stat().st_size)

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    found = self._file.read(len(buffer))
    buffer[: len(found)] = found
    self._count += len(found)
    if self._count > self._most:
      raise UserError(
        f'{self._path}: unpacks to more than {_MAX_EXPANSION} times its size; '
        'if that is right, unpack it yourself'
      )
    return len(found)

  def close(self) -> None:
    if not self.closed:
      self._file.close()
    super().close()


def open_arrow(path: pathlib.Path) -> pa.NativeFile:
  """The uncompressed bytes, for Arrow's readers."""
  file = open_binary(path)
  if isinstance(file.raw, io.FileIO):  # type: ignore[attr-defined]
    file.close()
    return pa.OSFile(str(path))
  return pa.PythonFile(file, mode='r')


def lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  """Yields (number from 1, line without its end) for lines that are not blank.

  Raises:
    UserError: the file cannot be read, or is cut off, or a line is longer than
      MAX_LINE.
  """
  with readable(path), open_binary(path) as file:
    for number, line in enumerate(
      iter(functools.partial(file.readline, MAX_LINE), b''), 1
    ):
      if len(line) == MAX_LINE:
        raise UserError(
          f'{path}, line {number}: longer than {MAX_LINE >> 20} MiB; is it a '
          'text file?'
        )
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


def is_utf8(path: pathlib.Path) -> bool:
  """Whether all of a file is."""
  decoder = codecs.getincrementaldecoder('utf-8')()
  with readable(path), open_binary(path) as file:
    try:
      for chunk in iter(lambda: file.read(1 << 22), b''):
        decoder.decode(chunk)
      decoder.decode(b'', final=True)
    except UnicodeDecodeError:
      return False
  return True


def json_object(text: str) -> dict:
  """A line's JSON object, or the Python literal that older sets have instead
  (the Amazon metadata of 2014, the Steam reviews).

  Raises:
    ValueError: it is neither, or a literal of more than MAX_LITERAL characters,
      which would take much memory to read.
  """
  try:
    try:
      found = json.loads(text)
    except ValueError:
      if len(text) > MAX_LITERAL:
        raise
      found = ast.literal_eval(text)
  except (SyntaxError, TypeError, MemoryError, RecursionError):
    raise ValueError(text) from None
  if not isinstance(found, dict):
    raise ValueError(text)
  return found


class readable:
  """Turns errors while reading a file into a UserError.

  Args:
    path: the file.
    kind: what Arrow reads it as, if it does: 'Parquet' or 'Arrow'.
  """

  def __init__(self, path: pathlib.Path, kind: str = ''):
    self._path, self._kind = path, kind

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    del kind, trace
    if self._kind and isinstance(error, pa.ArrowInvalid):
      raise UserError(
        f'{self._path}: not a readable {self._kind} file ({error})'
      ) from None
    if isinstance(error, DAMAGED):
      raise UserError(
        f'{self._path}: the compressed file is cut off or damaged; fetch it '
        'again'
      ) from None
    if isinstance(error, OSError):
      raise UserError(
        f'{self._path}: cannot be read ({error.strerror or error})'
      ) from None
