"""The benchmark of reading times files that say what they should."""

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
