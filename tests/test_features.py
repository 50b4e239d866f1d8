"""Feature integrity (repair 3): what is refused, and what is reported."""

import re

import numpy as np
import pytest

from fedmmr_jax.config import DataConfig
from fedmmr_jax.data import features, load, synthetic
from fedmmr_jax.errors import UserError
from tests.small import error_of

ITEM_IDS = np.array([0, 1, 3, 4])  # the catalogue; item 2 is nobody's
NUM_ROWS = 5


def matrix(dtype=np.float32):
  """Rows of items 0 … 4; item 3 has no feature."""
  return np.array([[0, 0], [1, -2], [3, 0], [0, 0], [4, 6]], dtype)


def check(array, **changes):
  arguments = dict(
    kind='visual', source='v.npy', num_rows=NUM_ROWS, item_ids=ITEM_IDS
  )
  return features.check(array, **{**arguments, **changes})


def saved(folder, array, name='v.npy'):
  np.save(folder / name, array)
  return folder / name


def load_visual(path):
  return features.load(path, 'visual', NUM_ROWS, ITEM_IDS)


def test_the_report_by_hand():
  report = check(matrix())
  # Values of the three rows that are not zero: 1 −2 3 0 4 6.
  # Mean 12/6 = 2, mean square (1 + 4 + 9 + 0 + 16 + 36) / 6 = 11.
  assert report == features.IntegrityReport(
    kind='visual',
    source='v.npy',
    shape=(5, 2),
    dtype='float32',
    minimum=-2.0,
    maximum=6.0,
    mean=2.0,
    std=pytest.approx(np.sqrt(11 - 4)),
    zero_rows=2,
    covered=2,
    catalogue=3,
  )


def test_the_report_says_all_of_it():
  text = str(check(matrix()))
  for part in (
    'visual',
    'v.npy',
    '5 x 2',
    'float32',
    'min -2',
    'max 6',
    'mean 2',
    'std 2.646',
    'zero rows 2',
    '2 of 3 items (66.7%)',
  ):
    assert part in text


def test_zero_rows_are_missing_features():
  array = matrix()
  array[1] = 0
  report = check(array)
  assert report.zero_rows == 3
  assert report.covered == 1  # of the items 1, 3 and 4 only 4 is left


def test_items_outside_the_catalogue_do_not_count_as_covered():
  assert check(matrix(), item_ids=np.array([0, 2])).covered == 1
  with pytest.raises(UserError, match='no item of the catalogue has features'):
    check(matrix(), item_ids=np.array([0, 3]))


@pytest.mark.parametrize(
  'dtype', [np.float16, np.float32, np.float64, np.int32, np.int8]
)
def test_every_kind_of_number_is_read_as_float32(dtype, tmp_path):
  rows, report = load_visual(saved(tmp_path, matrix(dtype)))
  assert rows.dtype == np.float32
  assert report.dtype == np.dtype(dtype).name
  assert (report.mean, report.minimum, report.maximum) == (2.0, -2.0, 6.0)


def test_rows_are_those_of_the_catalogue(tmp_path):
  rows, report = load_visual(saved(tmp_path, matrix()))
  assert rows.tolist() == [[0, 0], [1, -2], [0, 0], [4, 6]]
  assert report.source == str(tmp_path / 'v.npy')


def test_a_report_on_half_precision_is_computed_in_double():
  # 300 rows of 60000 sum to more than float16's 65504.
  array = np.full((301, 1), 60000, np.float16)
  array[0], array[1] = 0, 59904  # not constant
  report = check(array, num_rows=301, item_ids=np.arange(301))
  # (299·60000 + 59904) / 300, which float16 would round to 60000; the spread
  # is that of one value 96 below 299 others: 96·√299/300.
  assert report.mean == pytest.approx(59999.68, rel=1e-9)
  assert report.std == pytest.approx(96 * 299**0.5 / 300, rel=1e-9)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named(bad, tmp_path):
  array = matrix()
  array[3, 1] = array[4, 0] = bad
  path = saved(tmp_path, array)
  message = error_of(load_visual, path)
  assert message.startswith(f'{path}, row 3, column 1: {bad}')
  assert '2 such values' in message and 'must be finite' in message


def test_a_value_beyond_float32_is_not_finite_either(tmp_path):
  array = matrix(np.float64)
  array[4, 1] = 1e39
  message = error_of(load_visual, saved(tmp_path, array))
  assert 'row 4, column 1' in message


@pytest.mark.parametrize('rows', [4, 6])
def test_a_wrong_number_of_rows_is_refused(rows, tmp_path):
  path = saved(tmp_path, np.resize(matrix(), (rows, 2)))
  message = error_of(load_visual, path)
  assert message.startswith(f'{path}: {rows} rows, but the data set needs 5')
  assert 'from 0 (padding) to 4' in message


def test_an_all_zero_matrix_is_refused():
  assert 'v.npy: every value is 0, a constant matrix' in error_of(
    check, np.zeros((5, 2))
  )


@pytest.mark.parametrize('value', [0.5, -1.0])
def test_a_constant_matrix_is_refused(value):
  message = error_of(check, np.full((5, 2), value))
  assert f'every value is {value:g}, a constant matrix' in message
  assert '`visual_features=none`' in message


@pytest.mark.parametrize('missing', [[0], [0, 3]], ids=str)
def test_a_constant_matrix_is_refused_behind_its_zero_rows(missing):
  # Row 0 must be zero, so this is what a constant matrix looks like.
  array = np.full((5, 2), 0.5)
  array[missing] = 0
  assert 'constant' in error_of(check, array)


def test_the_mend_names_the_flag_of_the_kind():
  with pytest.raises(UserError, match='`text_features=none`'):
    check(np.zeros((5, 2)), kind='text')


def test_a_padding_row_that_is_not_zero_is_refused(tmp_path):
  array = matrix()
  array[0, 1] = 1
  path = saved(tmp_path, array)
  message = error_of(load_visual, path)
  assert message.startswith(f'{path}, row 0: not zero')
  assert 'shifted by one row' in message


@pytest.mark.parametrize(
  'array, found',
  [
    (np.zeros(5), 'float64 of shape (5,)'),
    (np.zeros((5, 2, 2)), 'float64 of shape (5, 2, 2)'),
    (np.float64(3.0), 'float64 of shape ()'),
    (np.zeros((5, 0)), 'float64 of shape (5, 0)'),
    (matrix().astype(bool), 'bool of shape (5, 2)'),
    (matrix().astype(complex), 'complex128 of shape (5, 2)'),
    (matrix().astype(str), '<U32 of shape (5, 2)'),
  ],
  ids=lambda x: x if isinstance(x, str) else '',
)
def test_what_is_not_a_matrix_of_numbers_is_refused(array, found, tmp_path):
  path = saved(tmp_path, array)
  message = error_of(load_visual, path)
  assert message.startswith(f'{path}: expected a matrix of numbers')
  assert message.endswith(f'found {found}')


def npy_bytes(folder):
  return saved(folder, matrix()).read_bytes()


@pytest.mark.parametrize(
  'spoil',
  [
    lambda content: b'',
    lambda content: b'these are no features',
    lambda content: content[:20],
    lambda content: content[:-3],
    lambda content: content.replace(b"{'descr'", b"x'descr'"),
    lambda content: b'PK\x03\x04' + content,
  ],
  ids=[
    'empty',
    'text',
    'half_a_header',
    'half_the_data',
    'broken_header',
    'broken_zip',
  ],
)
def test_a_file_that_is_no_npy_is_refused(spoil, tmp_path):
  path = tmp_path / 'broken.npy'
  path.write_bytes(spoil(npy_bytes(tmp_path)))
  assert error_of(load_visual, path).startswith(
    f'{path}: not a readable .npy matrix'
  )


def test_an_archive_of_several_arrays_is_refused(tmp_path):
  path = tmp_path / 'v.npz'
  np.savez(path, visual=matrix())
  assert error_of(load_visual, path).startswith(f'{path}: ')


def test_pickled_objects_are_refused(tmp_path):
  path = saved(tmp_path, np.array([[None]], object))
  assert error_of(load_visual, path).startswith(
    f'{path}: not a readable .npy matrix'
  )


def test_a_folder_is_refused(tmp_path):
  assert error_of(load_visual, tmp_path).startswith(
    f'{tmp_path}: not a readable .npy matrix'
  )


def test_a_matrix_is_not_changed_by_its_check():
  array = matrix()
  check(array)
  np.testing.assert_array_equal(array, matrix())


def test_auto_is_the_file_in_the_folder_if_there_is_one(tmp_path):
  assert features.resolve('auto', 'visual', tmp_path) is None
  path = saved(tmp_path, matrix(), 'visual_features.npy')
  assert features.resolve('auto', 'visual', tmp_path) == path
  assert features.resolve('auto', 'text', tmp_path) is None


def test_none_is_none_even_where_there_is_a_file(tmp_path):
  saved(tmp_path, matrix(), 'visual_features.npy')
  assert features.resolve('none', 'visual', tmp_path) is None


def test_a_path_is_that_path_whatever_the_folder_holds(tmp_path):
  saved(tmp_path, matrix(), 'visual_features.npy')
  path = saved(tmp_path, matrix(), 'mine.npy')
  assert features.resolve(str(path), 'visual', tmp_path) == path


@pytest.mark.parametrize('kind', ['visual', 'text'])
def test_a_path_that_does_not_exist_is_an_error(kind, tmp_path):
  path = tmp_path / 'absent.npy'
  with pytest.raises(
    UserError, match=re.escape(f'`{kind}_features={path}`: no such file')
  ) as caught:
    features.resolve(str(path), kind, tmp_path)
  assert f'`{kind}_features=none`' in str(caught.value)


@pytest.fixture
def movielens_folder(tmp_path):
  """Items 2, 4 and 5 rated by two users, the movies up to 6, text features."""
  (tmp_path / 'ratings.dat').write_text(
    ''.join(
      f'{user}::{item}::5::{time}\n'
      for user in (1, 2)
      for time, item in enumerate((4, 2, 5))
    )
  )
  (tmp_path / 'movies.dat').write_text('2::Two::Drama\n6::Six::Drama\n')
  np.save(tmp_path / 'text_features.npy', numbered(7, 3))
  return tmp_path


def numbered(rows, width):
  """Row i holds i, i + 1/2, …"""
  array = np.arange(rows)[:, None] + np.arange(width) / 2
  array[0] = 0
  return array.astype(np.float32)


def load_movielens(folder, **flags):
  return load.load(
    DataConfig(dataset='ml-1m', data_dir=str(folder), **flags), 0
  )


def test_a_data_set_takes_the_features_that_lie_in_its_folder(movielens_folder):
  loaded = load_movielens(movielens_folder)
  assert loaded.dataset.item_ids.tolist() == [0, 2, 4, 5]
  assert loaded.dataset.features['text'][:, 0].tolist() == [0, 2, 4, 5]
  assert 'visual' not in loaded.dataset.features
  assert [r.kind for r in loaded.integrity] == ['text']


def test_a_data_set_takes_the_features_that_are_named(movielens_folder):
  path = saved(movielens_folder, numbered(7, 4) * 10, 'mine.npy')
  loaded = load_movielens(
    movielens_folder, visual_features=str(path), text_features='none'
  )
  assert loaded.dataset.features['visual'][:, 0].tolist() == [0, 20, 40, 50]
  assert 'text' not in loaded.dataset.features
  (report,) = loaded.integrity
  assert (report.kind, report.source) == ('visual', str(path))
  assert (report.covered, report.catalogue) == (3, 3)


def test_rows_must_reach_the_largest_id_of_the_movies(movielens_folder):
  path = saved(movielens_folder, numbered(6, 4), 'short.npy')
  with pytest.raises(UserError, match='6 rows, but the data set needs 7'):
    load_movielens(movielens_folder, visual_features=str(path))


def test_a_missing_matrix_that_was_asked_for_stops_the_load(movielens_folder):
  with pytest.raises(UserError, match='`text_features=absent.npy`: no such'):
    load_movielens(movielens_folder, text_features='absent.npy')


SYNTHETIC = dict(dataset='synthetic,users=20,items=40')


def test_the_synthetic_set_brings_its_own_features():
  loaded = load.load(DataConfig(**SYNTHETIC), 0)
  assert [r.kind for r in loaded.integrity] == ['visual', 'text']
  for report, rows in zip(loaded.integrity, loaded.dataset.features.values()):
    assert report.source == 'generated from seed 0'
    assert report.covered == np.any(rows != 0, axis=1).sum()
    assert rows.shape[0] == loaded.dataset.num_rows


def test_generated_features_are_those_of_the_catalogue_s_rows():
  # A user consumes at most 30 items: many of 130 are not in the catalogue.
  dataset = load.load(
    DataConfig(dataset='synthetic,users=2,items=130'), 0
  ).dataset
  _, matrices = synthetic.generate(2, 130, seed=0)
  assert dataset.num_items <= 60
  for kind, rows in dataset.features.items():
    np.testing.assert_array_equal(rows, matrices[kind][dataset.item_ids])


def test_the_synthetic_set_takes_the_features_that_are_named(tmp_path):
  path = saved(tmp_path, numbered(41, 3))
  loaded = load.load(
    DataConfig(visual_features=str(path), text_features='none', **SYNTHETIC), 0
  )
  np.testing.assert_array_equal(
    loaded.dataset.features['visual'][:, 0], loaded.dataset.item_ids
  )
  assert 'text' not in loaded.dataset.features
  assert [r.source for r in loaded.integrity] == [str(path)]


def test_the_synthetic_set_refuses_features_of_another_set(tmp_path):
  path = saved(tmp_path, numbered(40, 3))
  with pytest.raises(UserError, match='40 rows, but the data set needs 41'):
    load.load(DataConfig(visual_features=str(path), **SYNTHETIC), 0)


def test_the_synthetic_set_refuses_a_missing_file():
  with pytest.raises(UserError, match='`visual_features=absent.npy`: no such'):
    load.load(DataConfig(visual_features='absent.npy', **SYNTHETIC), 0)


def test_rows_that_are_all_the_same_are_refused():
  same = np.tile(np.array([1.0, 2.0, 3.0], np.float32), (4, 1))
  same[0] = 0
  with pytest.raises(UserError, match='every row is the same'):
    features.check(same, 'visual', 'v.npy', 4, np.arange(4))
