"""MovieLens archives: fetched from GroupLens, unpacked for a run to read.

| data set | format | its hash |
|---|---|---|
| ml-100k | ml-100k | known |
| ml-1m | ml-1m | known |
| ml-latest-small | ml-latest | none: GroupLens changes the set over time |

Archive and files are in one folder. The archive is kept so that a second call
needs no network; `NAME.zip.part` is left by an interrupted download. A file
under its final name is complete, and existing files are never overwritten.
"""

import errno
import functools
import logging
import lzma
import os
import pathlib
import re
import shutil
import stat
import zipfile
import zlib
from typing import Mapping, NamedTuple

import pooch
import requests
from tqdm import tqdm

from fedmmr_jax.errors import UserError

_TIMEOUT = 30  # seconds without a byte
# Bytes at a time; what came of a chunk when the connection breaks is lost.
_CHUNK = 1 << 14
_RANGE, _BEHIND_THE_END = 206, 416  # HTTP
# What zipfile raises at damaged bytes; RuntimeError: those that look like
# encryption or an unknown method, ValueError: a name, OSError: an offset.
_DAMAGED = (
  zipfile.BadZipFile,
  zlib.error,
  lzma.LZMAError,
  EOFError,
  RuntimeError,
  ValueError,
  OSError,
)


class Archive(NamedTuple):
  """A data set as a zip archive.

  Attributes:
    name: of the set; the archive is `name`.zip.
    url: where it is.
    known_hash: 'md5:…', or None where it changes.
    format: what `dataset` calls the format of its files.
    interactions: the file without which the archive is of no use.
    items: the file with the titles.
  """

  name: str
  url: str
  known_hash: str | None
  format: str
  interactions: str
  items: str

  @property
  def file(self) -> str:
    return f'{self.name}.zip'


class Fetched(NamedTuple):
  """The result of `fetch`.

  Attributes:
    files: the data set's files, by name.
    archive: the archive they come from; None if they were put there without it.
    downloaded: whether it was fetched just now.
  """

  files: tuple[pathlib.Path, ...]
  archive: pathlib.Path | None
  downloaded: bool


class _Refused(Exception):
  """What is wrong with an archive; what to do depends on whose it is."""


def fetch(archive: Archive, folder: pathlib.Path, url: str = '') -> Fetched:
  """Puts a data set's files into a folder, from the network if necessary.

  Args:
    archive: which.
    folder: for archive and files; made if there is none.
    url: of a mirror's copy of the archive; '' = the original.

  Returns:
    What is there. Without an archive, its interactions and items, put there by
    hand, are taken as they are.

  Raises:
    UserError: it cannot be fetched, is not what it should be, or a file of
      another content is in its place.
  """
  if folder.exists() and not folder.is_dir():
    raise UserError(f'{folder} is a file; name a folder for the data set')
  folder.mkdir(parents=True, exist_ok=True)
  url = url or archive.url
  path = folder / archive.file
  downloaded = not path.exists()
  if downloaded:
    given = folder / archive.interactions, folder / archive.items
    if all(file.is_file() for file in given):
      return Fetched(tuple(sorted(given)), None, downloaded=False)
    _download(archive, path, url)
  try:
    if not downloaded:
      _check_hash(path, archive.known_hash)
    files = _unpack(archive, path)
  except _Refused as refused:
    if not downloaded:  # it is the user's: it is not for us to remove
      raise UserError(f'{path} {refused}; remove it and call again') from None
    path.unlink()
    raise UserError(
      f'{url} {refused}; what came is removed: call again, or name another '
      'source (`url`)'
    ) from None
  return Fetched(files, path, downloaded)


# The network.


def _download(archive: Archive, path: pathlib.Path, url: str) -> None:
  """Fetches the archive, going on with what an earlier call left.

  Raises:
    UserError: it cannot be reached, breaks off, or is another one.
  """
  pooch.get_logger().setLevel(logging.ERROR)  # it narrates
  part = path.with_name(path.name + '.part')
  try:
    pooch.retrieve(
      url,
      archive.known_hash,
      path.name,
      path.parent,
      downloader=functools.partial(_transfer, part),
    )
  except requests.RequestException as error:
    raise UserError(
      f'{url}: cannot be fetched ({_reason(error)}); put {archive.file} into '
      f'{path.parent}, or its {archive.interactions} and {archive.items}, '
      'and call again'
    ) from None
  except PermissionError:
    raise UserError(
      f'{path.parent}: no permission to write there; name another folder'
    ) from None
  except ValueError:  # pooch's word for another hash; it has removed the file
    kind, known = archive.known_hash.split(':')
    raise UserError(
      f'{url}: its {kind.upper()} is not {known}, that of the original '
      f'{archive.file}; what came is removed: call again, or name another '
      'source (`url`)'
    ) from None


def _transfer(part: pathlib.Path, url: str, output_file: str, _) -> None:
  """A downloader for pooch that collects the file in `part`.

  A `part` of which the server now has another version makes a file of two
  halves: the hash, or the checksums within the archive, tell.
  """
  os.remove(output_file)  # pooch's, still empty; a kill would leave it behind
  start = part.stat().st_size if part.exists() else 0
  response = _request(url, start)
  if start and not _continues(response, start):
    response.close()
    start, response = 0, _request(url, 0)
  with response:
    response.raise_for_status()
    if response.status_code != _RANGE:  # all of it, whatever was asked for
      start = 0
    total = _total(response, start)
    broken = False
    with (
      part.open('ab' if start else 'wb') as file,
      tqdm(
        total=total,
        initial=start,
        unit='B',
        unit_scale=True,
        disable=None,
        desc=part.stem,
        leave=False,
      ) as bar,
    ):
      try:
        for chunk in response.iter_content(_CHUNK):
          file.write(chunk)
          bar.update(len(chunk))
      except requests.RequestException:
        broken = True
  size = part.stat().st_size
  if broken or total not in (None, size):
    raise UserError(
      f'{url}: the connection broke after {size} bytes'
      + (f' of {total}' if total else '')
      + '; call again to go on'
    )
  os.replace(part, output_file)


def _request(url: str, start: int) -> requests.Response:
  # Compressed on the way, the bytes would not be those of the file.
  headers = {'Accept-Encoding': 'identity'}
  if start:
    headers['Range'] = f'bytes={start}-'
  return requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT)


def _continues(response: requests.Response, start: int) -> bool:
  """Can this answer be used; or has the server no more, or another piece?"""
  if response.status_code == _RANGE:
    given = response.headers.get('Content-Range', '')
    return bool(re.match(rf'bytes {start}-', given))
  return response.status_code != _BEHIND_THE_END


def _total(response: requests.Response, start: int) -> int | None:
  length = response.headers.get('Content-Length', '')
  return start + int(length) if length.isdecimal() else None


def _reason(error: Exception) -> str:
  """A few words: requests wraps what happened several times over."""
  if isinstance(error, requests.HTTPError):
    return f'HTTP {error.response.status_code} {error.response.reason}'.strip()
  inner = error
  while inner is not None:
    error = inner
    inner = next(
      (
        e
        for e in (
          getattr(error, 'reason', None),
          *error.args,
          error.__cause__,
          error.__context__,
        )
        if isinstance(e, Exception)
      ),
      None,
    )
  return (getattr(error, 'strerror', None) or str(error)).partition('\n')[0]


# The archive.


def _check_hash(path: pathlib.Path, known_hash: str | None) -> None:
  """Raises _Refused if the archive is another one."""
  if known_hash is None:
    return
  kind, known = known_hash.split(':')
  found = pooch.file_hash(str(path), alg=kind)
  if found != known:
    raise _Refused(
      f'is not the original: its {kind.upper()} is {found}, not {known}'
    )


def _unpack(archive: Archive, path: pathlib.Path) -> tuple[pathlib.Path, ...]:
  """Puts what is missing of an archive's files beside it.

  Raises:
    UserError: a file of another content is in the place of one.
    _Refused: the archive is damaged, dangerous or of another set.
  """
  folder = path.parent
  # A kill leaves it; the next call clears it away.
  scratch = folder / f'.{archive.name}.unpacking'
  shutil.rmtree(scratch, ignore_errors=True)
  try:
    with zipfile.ZipFile(path) as opened:
      members = _members(opened, archive)
      missing = {
        name: info
        for name, info in members.items()
        if not _is_there(folder / name, info, path)
      }
      for name, info in missing.items():
        _write(opened, info, scratch / name)
    # Nothing is damaged. The interactions come last: where they are, a run
    # finds the items too.
    for name in sorted(missing, key=lambda n: n == archive.interactions):
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      os.replace(scratch / name, folder / name)
  except _DAMAGED as error:
    # A full disk has a number; so has a seek to where a wrong offset leads.
    if getattr(error, 'errno', None) not in (None, errno.EINVAL):
      raise
    raise _Refused(
      f'is no whole zip archive ({str(error) or "cut off"})'
    ) from None
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  return tuple(folder / name for name in sorted(members))


def _members(
  opened: zipfile.ZipFile, archive: Archive
) -> dict[str, zipfile.ZipInfo]:
  """The files of the archive's top folder, by their names in it.

  Raises:
    _Refused: one that would leave the folder, or no interactions.
  """
  members = {}
  for info in opened.infolist():
    # Read as Windows does, \ and drives are seen too.
    path = pathlib.PureWindowsPath(info.filename)
    if (
      path.anchor
      or not path.parts
      or any(part == '..' or ':' in part for part in path.parts)
      or stat.S_ISLNK(info.external_attr >> 16)
    ):
      raise _Refused(
        f'is refused: its member {info.filename!r} is a link or '
        'leads out of the folder'
      )
    if not info.filename.endswith(('/', '\\')):
      members[pathlib.PurePosixPath(*path.parts)] = info
  tops = [path.parent for path in members if path.name == archive.interactions]
  if not tops:
    raise _Refused(
      f'holds no {archive.interactions}, the interactions of {archive.name}'
    )
  top = min(tops, key=lambda path: len(path.parts))
  return {
    str(path.relative_to(top)): info
    for path, info in members.items()
    if path.is_relative_to(top)
  }


def _is_there(
  file: pathlib.Path, info: zipfile.ZipInfo, archive: pathlib.Path
) -> bool:
  """Does the file need no unpacking?

  Raises:
    UserError: one of another content is there, which is not overwritten.
  """
  if not file.exists():
    return False
  if (
    file.is_file()
    and file.stat().st_size == info.file_size
    and (zlib.crc32(file.read_bytes()) == info.CRC)
  ):
    return True
  raise UserError(
    f'{file} is not the one in {archive.name}; move it away, or '
    'name another folder'
  )


def _write(
  opened: zipfile.ZipFile, info: zipfile.ZipInfo, file: pathlib.Path
) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  with opened.open(info) as source, file.open('wb') as target:
    shutil.copyfileobj(source, target)  # checks the CRC at its end


def _grouplens(name: str, known_hash: str | None, *files: str) -> Archive:
  return Archive(
    name,
    f'https://files.grouplens.org/datasets/movielens/{name}.zip',
    known_hash,
    *files,
  )


ARCHIVES: Mapping[str, Archive] = {
  archive.name: archive
  for archive in (
    _grouplens(
      'ml-100k',
      'md5:0e33842e24a9c977be4e0107933c0723',
      'ml-100k',
      'u.data',
      'u.item',
    ),
    _grouplens(
      'ml-1m',
      'md5:c4d9eecfca2ab87c1945afe126590906',
      'ml-1m',
      'ratings.dat',
      'movies.dat',
    ),
    _grouplens(
      'ml-latest-small', None, 'ml-latest', 'ratings.csv', 'movies.csv'
    ),
  )
}
