"""The benchmark of reading times files that say what they should."""

import pathlib
import resource
import types

import pytest

from experiments import benchmark_reading
from fedmmr_jax.data import sources

FORMATS = [
  'ml-1m',
  'ml-latest',
  'ml-100k',
  'recbole',
  'amazon-ratings',
  'amazon-reviews',
  'sasrec',
  'sequences',
  'parquet',
]


@pytest.mark.parametrize(
  'name, expected', list(zip(benchmark_reading._WRITERS, FORMATS, strict=True))
)
def test_every_file_is_of_its_format_and_whole(name, expected, tmp_path):
  table = benchmark_reading._interactions(2000)
  benchmark_reading._WRITERS[name](tmp_path / name, table)
  source = sources.find('auto', str(tmp_path / name))
  assert source.format == expected
  found = sources.read(source)
  assert len(found.users) == 2000
  assert len(found.user_ids) == len(table['userId'].unique())
  assert len(found.item_ids) == len(table['movieId'].unique())


def test_the_peak_is_told_with_and_without_proc(monkeypatch):
  assert 20 < benchmark_reading.peak_mb() < 20_000
  monkeypatch.setattr(benchmark_reading, '_STATUS', pathlib.Path('/no/such'))
  monkeypatch.setattr(
    resource,
    'getrusage',
    lambda who: types.SimpleNamespace(ru_maxrss=300 * 2**20),
  )
  assert benchmark_reading.peak_mb() == 300
