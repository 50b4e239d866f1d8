"""A feature matrix and the file beside it that says how it was made."""

import hashlib
import json

import numpy as np
import pytest

from fedmmr_jax.config import DataConfig
from fedmmr_jax.data import features, sidecar
from fedmmr_jax.data import load as load_lib
from fedmmr_jax.data.items import ItemTable
from fedmmr_jax.errors import UserError


def table(ids=(1, 3, 4), rows=(1, 3, 4), num_rows=5) -> ItemTable:
  return ItemTable(np.array(ids), np.array(rows), num_rows, {}, {})


ITEMS = table()
ROWS = np.array([0, 1, 3, 4])


@pytest.fixture
def prepared(tmp_path):
  """A matrix for ITEMS with its sidecar."""
  path = tmp_path / 'text_features.npy'
  np.save(path, np.array([[0, 0], [1, -2], [0, 0], [3, 5], [4, 6]], np.float32))
  write(path)
  return path


def write(path, **changes):
  sidecar.path_of(path).write_text(
    json.dumps(
      {
        'format': sidecar.FORMAT,
        'model': 'someone/small-model',
        'data_fingerprint': sidecar.data_fingerprint(ITEMS),
        'checksum': sidecar.checksum(path),
      }
      | changes
    )
  )


def load(path, items=ITEMS):
  return features.load(path, 'text', 5, ROWS, items)


def refusal(path, items=ITEMS) -> str:
  with pytest.raises(UserError) as caught:
    load(path, items)
  message = str(caught.value)
  assert '\n' not in message
  return message


def test_it_lies_beside_the_matrix(tmp_path):
  assert sidecar.path_of(tmp_path / 'a.b.npy') == tmp_path / 'a.b.json'


def test_the_report_names_the_model(prepared):
  rows, report = load(prepared)
  assert report.source == f'{prepared} (small-model)'
  assert rows.tolist() == [[0, 0], [1, -2], [3, 5], [4, 6]]


def test_a_matrix_without_a_sidecar_is_loaded_as_it_is(prepared):
  sidecar.path_of(prepared).unlink()
  rows, report = load(prepared, table(ids=(7, 8, 9)))
  assert report.source == str(prepared)
  assert rows.shape == (4, 2)


def test_another_matrix_under_the_name_is_refused(prepared):
  matrix = np.load(prepared)
  matrix[1, 0] += 1e-6
  np.save(prepared, matrix)
  message = refusal(prepared)
  assert message.startswith(
    f'{prepared}: not the matrix that text_features.json describes'
  )
  assert 'prepare the features again, or remove the .json' in message


@pytest.mark.parametrize(
  'other',
  [
    table(ids=(1, 2, 4)),
    table(rows=(1, 2, 4)),
    table(num_rows=6),
    table(ids=('1', '3', 'x')),
  ],
  ids=['ids', 'rows', 'num_rows', 'strings'],
)
def test_a_matrix_of_another_data_set_is_refused(prepared, other):
  message = refusal(prepared, other)
  assert message.startswith(f'{prepared}: prepared for another data set')


def test_without_items_only_the_matrix_is_checked(prepared):
  write(prepared, data_fingerprint='of whatever')
  assert load(prepared, None)[1].covered == 3
  write(prepared, checksum='of whatever')
  assert 'not the matrix' in refusal(prepared, None)


@pytest.mark.parametrize(
  'content', [b'', b'{"format": "fedm', b'\xff\xfe{}', b'[' * 100_000]
)
def test_a_sidecar_that_is_not_json_is_refused(prepared, content):
  path = sidecar.path_of(prepared)
  path.write_bytes(content)
  message = refusal(prepared)
  assert message.startswith(f'{path}: ') and 'not readable JSON' in message


@pytest.mark.parametrize('key', ['checksum', 'data_fingerprint', 'model'])
def test_a_sidecar_without_what_is_compared_is_refused(prepared, key):
  write(prepared, **{key: None})
  assert f'damaged, it has no {key!r}' in refusal(prepared)


@pytest.mark.parametrize('content', ['{"1": "a text"}', '[1]', '{}'])
def test_somebody_s_own_json_of_that_name_is_no_sidecar(prepared, content):
  # item_texts.json beside item_texts.npy, say.
  sidecar.path_of(prepared).write_text(content)
  assert load(prepared)[1].source == str(prepared)


def test_a_data_set_refuses_features_of_another_one(ml_1m):
  config = DataConfig(dataset='ml-1m', data_dir=str(ml_1m))
  path = ml_1m / 'text_features.npy'
  write(
    path, data_fingerprint=sidecar.data_fingerprint(load_lib.read_items(config))
  )
  loaded = load_lib.load(config, 0)
  assert [report.source for report in loaded.integrity] == [
    str(ml_1m / 'visual_features.npy'),
    f'{path} (small-model)',
  ]
  write(path)  # of ITEMS
  with pytest.raises(UserError, match='prepared for another data set'):
    load_lib.load(config, 0)


def test_the_fingerprint_is_that_of_ids_rows_and_size():
  rows = np.array([1, 3, 4, 5], '<i8').tobytes()
  expected = hashlib.sha256(b'["1", "3", "4"]' + rows).hexdigest()
  assert sidecar.data_fingerprint(ITEMS) == expected
  # What is known of the items is not in it: titles do not move rows.
  assert (
    sidecar.data_fingerprint(
      ITEMS._replace(titles={1: 'One'}, texts={1: 'One.'})
    )
    == expected
  )


def test_ids_are_told_apart_wherever_they_end():
  assert sidecar.data_fingerprint(
    table(ids=('a", "b', 'c', 'd'))
  ) != sidecar.data_fingerprint(table(ids=('a', 'b", "c', 'd')))
