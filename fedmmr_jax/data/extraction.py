"""Texts and images of items -> a feature matrix, in batches, resumable.

The model is a function from a list of inputs to vectors; this module knows
nothing else about it. A matrix grows in `.text_features.partial.npy` beside its
final place. `.text_features.partial.json` records how far it has come and what
it is made of, so that a killed call can be resumed. With the same batch size, a
resumed call cuts the same batches as an uninterrupted one; with another batch
size the numbers differ by float rounding, because a batch is padded to its
longest text.
"""

import datetime
import hashlib
import json
import os
import pathlib
import time
import warnings
from typing import Any, Callable, NamedTuple, Sequence

import numpy as np

from fedmmr_jax.data import features, sidecar
from fedmmr_jax.data.features import IntegrityReport
from fedmmr_jax.data.items import ItemTable
from fedmmr_jax.errors import UserError
from fedmmr_jax.files import Lock, replace

TEXT, VISUAL = 'text', 'visual'
# The first counts where an item has several.
IMAGE_ENDS = ('.jpg', '.jpeg', '.png', '.webp')
# What may be inside, whatever the name says: pictures of the web are misnamed
# often, and Pillow's other readers (PostScript!) are nothing for found files.
_IMAGE_FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')
# Shops answer with a single pixel where they have no picture.
_SMALLEST_SIDE = 8
# Image models look at a few hundred pixels a side; a batch of photographs in
# full would take gigabytes.
_LARGEST_SIDE = 1024
_SAVE_SECONDS = 2.0
_COUNTED_AT_A_TIME = 1000  # texts whose tokens are in memory

Encode = Callable[[list], np.ndarray]


class Inputs(NamedTuple):
  """The inputs of a model, in the order in which it reads them.

  Attributes:
    kind: 'text' or 'visual'.
    ids: [n] the items' ids as text, for messages.
    rows: [n] their rows in the matrix.
    sources: [n] texts, or image files.
    unknown: ids without an item in the data set.
    fingerprint: SHA-256 of all this.
  """

  kind: str
  ids: list[str]
  rows: np.ndarray
  sources: list
  unknown: list[str]
  fingerprint: str


class Extracted(NamedTuple):
  """A finished matrix.

  Attributes:
    path: the .npy file, its sidecar beside it.
    report: what the integrity check found.
    broken: images that could not be read, as in the sidecar.
  """

  path: pathlib.Path
  report: IntegrityReport
  broken: list[dict[str, str]]


class BrokenImage(Exception):
  """Its message is the reason."""


def matrix_path(folder: pathlib.Path, kind: str) -> pathlib.Path:
  """Where `{kind}_features=auto` looks."""
  return folder / f'{kind}_features.npy'


def read_texts(path: pathlib.Path) -> dict[str, str]:
  """A JSON file {item id: text}.

  Raises:
    UserError: it is anything else.
  """
  try:
    texts = json.loads(path.read_text('utf-8-sig'))
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from None
  except (ValueError, RecursionError) as error:
    reason = ' '.join(str(error).split())[:80]
    raise UserError(f'{path}: not JSON in UTF-8 ({reason})') from None
  if not isinstance(texts, dict):
    raise UserError(
      f'{path}: expected a JSON object {{"item id": '
      f'"text", …}}, found a {type(texts).__name__}'
    )
  for item, text in texts.items():
    if not isinstance(text, str):
      raise UserError(
        f'{path}: the text of item {item!r} is no string '
        f'but {json.dumps(text)[:40]}'
      )
  return texts


def text_inputs(items: ItemTable, texts: dict, source: str) -> Inputs:
  """The texts of a data set's items; blank ones count as missing.

  The longest come first: the texts of a batch then have similar lengths, and a
  batch that does not fit into memory fails at once.

  Args:
    items: the data set's.
    texts: item id, as the table has it or as text, -> text.
    source: where they are from, for errors.

  Raises:
    UserError: none of them belongs to an item.
  """
  rows = _rows_by_id(items)
  # JSON may hold halves of UTF-16 pairs, which no tokenizer takes.
  texts = {
    str(item): text.encode('utf-8', 'replace').decode('utf-8')
    for item, text in texts.items()
  }
  known = [
    (item, text)
    for item, text in texts.items()
    if item in rows and text.strip()
  ]
  unknown = [item for item in texts if item not in rows]
  if not known:
    raise UserError(_nothing_in_common(source, 'text', unknown, rows))
  known.sort(key=lambda entry: (-len(entry[1]), rows[entry[0]]))
  return _inputs(TEXT, known, rows, unknown, known)


def count_longer(
  texts: Sequence[str],
  limit: int,
  count: Callable[[list[str]], Sequence[int]],
  added: int,
) -> int:
  """How many texts a model reads only the beginning of.

  Args:
    texts: what it is given.
    limit: the tokens it reads.
    count: some texts -> the tokens of each, in full.
    added: the most tokens that `count` may add to those of a text.
  """
  # No token is shorter than a byte: short texts need no counting.
  long = [text for text in texts if len(text.encode()) + added > limit]
  return sum(
    tokens > limit
    for start in range(0, len(long), _COUNTED_AT_A_TIME)
    for tokens in count(long[start : start + _COUNTED_AT_A_TIME])
  )


def image_inputs(items: ItemTable, folder: pathlib.Path) -> Inputs:
  """The files `<item id>.jpg`, `.jpeg`, `.png`, `.webp` of a folder.

  Raises:
    UserError: no such folder, or no file of it belongs to an item.
  """
  by_item = find_images(folder)
  rows = _rows_by_id(items)
  unknown = [item for item in by_item if item not in rows]
  known = sorted(
    ((item, path) for item, path in by_item.items() if item in rows),
    key=lambda entry: rows[entry[0]],
  )
  if not known:
    raise UserError(_nothing_in_common(str(folder), 'image', unknown, rows))
  # Not their content: that would read every file twice.
  state = [
    (item, path.name, path.stat().st_size, path.stat().st_mtime_ns)
    for item, path in known
  ]
  return _inputs(VISUAL, known, rows, unknown, state)


def find_images(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Item id -> the file `<item id>.jpg`, `.jpeg`, `.png`, `.webp` of a folder.

  Raises:
    UserError: no such folder.
  """
  if not folder.is_dir():
    raise UserError(f'{folder}: no such folder')
  found = [
    path
    for path in folder.iterdir()
    if path.suffix.lower() in IMAGE_ENDS and path.is_file()
  ]
  found.sort(key=lambda p: (IMAGE_ENDS.index(p.suffix.lower()), p.name))
  by_item: dict[str, pathlib.Path] = {}
  for path in found:
    by_item.setdefault(path.stem, path)
  return by_item


def _rows_by_id(items: ItemTable) -> dict[str, int]:
  return dict(zip(map(str, items.ids.tolist()), items.rows.tolist()))


def _nothing_in_common(source, what, unknown, rows) -> str:
  if not unknown:
    return (
      f"{source}: no {what} in it; expected one named by its item's id, "
      f'{next(iter(rows))} say'
    )
  return (
    f'{source}: no {what} of an item of the data set; there are '
    f'{len(unknown)} for {shown(unknown)}, but the items are '
    f'{shown(list(rows))}'
  )


def shown(ids: Sequence[str]) -> str:
  """The first few; quoted, as they may be anything."""
  return ', '.join(map(repr, ids[:3])) + (', …' if len(ids) > 3 else '')


def _inputs(kind, known, rows, unknown, state) -> Inputs:
  ids = [item for item, _ in known]
  return Inputs(
    kind,
    ids,
    np.array([rows[item] for item in ids], np.int64),
    [source for _, source in known],
    unknown,
    hashlib.sha256(json.dumps(state).encode()).hexdigest(),
  )


def open_image(path: pathlib.Path) -> Any:
  """An image file as an upright RGB `PIL.Image`.

  Raises:
    BrokenImage: it cannot be decoded to its end, or is too small or too large.
  """
  from PIL import Image, ImageOps  # an extra

  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      warnings.simplefilter('error', Image.DecompressionBombWarning)
      with Image.open(path, formats=_IMAGE_FORMATS) as image:
        if min(image.size) < _SMALLEST_SIDE:
          raise BrokenImage(f'only {image.width} x {image.height} pixels')
        image = _rgb(ImageOps.exif_transpose(image))
    shrink = min(image.size) // _LARGEST_SIDE
    return image.reduce(shrink) if shrink > 1 else image
  except BrokenImage:
    raise
  except (Image.DecompressionBombWarning, Image.DecompressionBombError):
    raise BrokenImage(f'more than {Image.MAX_IMAGE_PIXELS} pixels') from None
  except Image.UnidentifiedImageError:
    raise BrokenImage(
      'empty' if not path.stat().st_size else 'not an image'
    ) from None
  except Exception as error:  # Pillow raises what the damage leads to
    reason = ' '.join(str(error).split())[:100]
    raise BrokenImage(reason or type(error).__name__) from None


def _rgb(image):
  """Of any mode; what is transparent becomes white."""
  from PIL import Image

  if image.mode.startswith('I'):  # 16 bits, which convert would cut off at 255
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if 'A' in image.getbands() or 'transparency' in image.info:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  return image.convert('RGB')


class Partial:
  """The finished part of a matrix, in memory and on disk. A context manager:
  however it ends, computed rows are kept for the next call.

  Args:
    folder: where the matrix will stand; it exists.
    kind: 'text' or 'visual'.
    settings: all that the numbers depend on, JSON; 'kind' and 'rows' among it.

  Attributes:
    done: inputs that have been read.
    broken: {'file', 'reason'} of those that are no image.
    note: what became of an unfinished call's rows, '' if there was none.
    lock_note: a line to show if the folder's file system has no locks, so that
      nothing keeps other processes out; else ''.

  Raises:
    UserError: another process is at it.
  """

  def __init__(self, folder: pathlib.Path, settings: dict[str, Any]):
    self._settings = settings
    self._kind, self._rows = settings['kind'], settings['rows']
    self._npy, self._json, self._lock_path = (
      folder / f'.{self._kind}_features.partial.{end}'
      for end in ('npy', 'json', 'lock')
    )
    self.done, self.broken, self._matrix, self.note = 0, [], None, ''
    self.lock_note = ''

  def __enter__(self) -> 'Partial':
    try:
      self._lock = Lock(self._lock_path)
    except BlockingIOError:
      raise UserError(
        f'{self._npy.parent}: another process is preparing its {self._kind} '
        'features; wait for it, or name another folder'
      ) from None
    self.lock_note = self._lock.note
    if self._json.exists():
      try:
        self._go_on(json.loads(self._json.read_text('utf-8')))
      except Exception:  # NumPy raises what a broken header leads to
        self.note = 'what an unfinished call left is damaged: starting over'
    return self

  def __exit__(self, *exception: Any) -> None:
    try:
      self.save()
    finally:
      self._lock_path.unlink(missing_ok=True)
      self._lock.close()

  def _go_on(self, state: dict[str, Any]) -> None:
    before = state['settings']
    changed = [
      name
      for name in self._settings
      if before.get(name) != self._settings[name]
    ]
    if changed:
      self.note = (
        f'an unfinished call differs in {", ".join(changed)}: starting over'
      )
      return
    # A file that is too short would be made longer, without a word.
    if self._npy.stat().st_size != state['bytes']:
      raise ValueError
    matrix = np.lib.format.open_memmap(self._npy, mode='r+')
    self.done, self.broken = state['done'], state['broken']
    self._matrix = matrix
    self.note = f'going on after {self.done}, where a call was cut off'

  def add(
    self,
    count: int,
    rows: np.ndarray,
    vectors: np.ndarray,
    broken: Sequence[dict[str, str]],
  ) -> None:
    """Takes the outcome of the next `count` inputs: rows and broken images."""
    if len(rows):
      if self._matrix is None:
        self._matrix = self._create(vectors.shape[1])
      self._matrix[rows] = vectors
    self.done += count
    self.broken += broken

  def _create(self, width: int) -> np.ndarray:
    self._json.unlink(missing_ok=True)  # it tells of another matrix
    matrix = np.lib.format.open_memmap(
      self._npy, mode='w+', dtype=np.float32, shape=(self._rows, width)
    )
    # On a full disk a hole in a mapped file would end the process without a
    # word; this raises.
    if hasattr(os, 'posix_fallocate'):
      with self._npy.open('r+b') as file:
        os.posix_fallocate(file.fileno(), 0, self._npy.stat().st_size)
    return matrix

  def save(self) -> None:
    """Brings it to the disk: first the rows, then that they are there."""
    if self._matrix is not None:
      self._matrix.flush()
      replace(
        self._json,
        json.dumps(
          {
            'settings': self._settings,
            'done': self.done,
            'broken': self.broken,
            'bytes': self._npy.stat().st_size,
          }
        ),
      )

  def finish(self, path: pathlib.Path, items: ItemTable) -> IntegrityReport:
    """Checks the matrix and puts it and its sidecar in their place.

    Args:
      path: the place; what is there is replaced.
      items: those of the data set.

    Raises:
      UserError: the matrix fails the check that loading makes.
    """
    report = features.check(
      self._matrix,
      self._kind,
      str(path),
      self._rows,
      np.concatenate([[0], items.rows]),
    )
    self.save()
    described = (
      {'format': sidecar.FORMAT}
      | self._settings
      | {
        'width': report.shape[1],
        'covered': report.covered,
        'items': report.catalogue,
        'broken': self.broken,
        **(
          {}
          if items.numbering_is_plain
          else {
            'item_rows': dict(
              zip(map(str, items.ids.tolist()), items.rows.tolist())
            )
          }
        ),
        'checksum': sidecar.checksum(self._npy),
        'created': datetime.datetime.now(datetime.timezone.utc).isoformat(
          timespec='seconds'
        ),
      }
    )
    # The matrix last: after a kill in between, the same call has all its rows.
    replace(sidecar.path_of(path), json.dumps(described, indent=2) + '\n')
    os.replace(self._npy, path)
    self.discard()
    return report

  def discard(self) -> None:
    """Forgets what is there."""
    self._matrix = None
    for path in (self._npy, self._json):
      path.unlink(missing_ok=True)


def extract(
  inputs: Inputs,
  encode: Encode,
  partial: Partial,
  path: pathlib.Path,
  items: ItemTable,
  batch_size: int,
  normalise: bool,
  advance: Callable[[int], Any] = lambda count: None,
) -> Extracted:
  """Computes the missing rows of a matrix and puts it in its place.

  Args:
    inputs: the inputs of the model.
    encode: list of texts or of images -> [n, F] vectors.
    partial: the progress of earlier calls, entered as a context.
    path: where to write the matrix; an existing one is replaced.
    items: those of the data set.
    batch_size: number of inputs per call of `encode`.
    normalise: whether to scale the vectors to unit length.
    advance: called with the number of inputs read since its last call.

  Raises:
    UserError: the model gives no finite vectors, no image can be read, or the
      matrix fails its integrity check.
  """
  saved = time.monotonic()
  while partial.done < len(inputs.rows):
    advance(_batch(inputs, encode, partial, batch_size, normalise))
    if time.monotonic() - saved >= _SAVE_SECONDS:
      partial.save()
      saved = time.monotonic()
  if len(partial.broken) == len(inputs.rows):
    first = partial.broken[0]
    partial.discard()
    raise UserError(
      f'{inputs.sources[0].parent}: none of the {len(inputs.rows)} images '
      f'can be read ({first["file"]}: {first["reason"]})'
    )
  return Extracted(path, partial.finish(path, items), partial.broken)


def _batch(
  inputs: Inputs,
  encode: Encode,
  partial: Partial,
  batch_size: int,
  normalise: bool,
) -> int:
  """One batch; returns how many inputs it took."""
  taken = range(partial.done, min(partial.done + batch_size, len(inputs.rows)))
  read, kept, broken = [], [], []
  for i in taken:
    try:
      source = inputs.sources[i]
      read.append(open_image(source) if inputs.kind == VISUAL else source)
      kept.append(i)
    except BrokenImage as error:
      broken.append({'file': source.name, 'reason': str(error)})
  vectors = np.zeros((0, 0), np.float32)
  if read:
    vectors = np.asarray(encode(read), np.float32)
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
      raise UserError(
        f'item {inputs.ids[kept[bad[0]]]}: the model gives values that are '
        'not finite; take another model'
      )
  if normalise and read:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / np.where(lengths > 0, lengths, 1)
  partial.add(len(taken), inputs.rows[kept], vectors, broken)
  return len(taken)
