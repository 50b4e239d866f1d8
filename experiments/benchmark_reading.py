"""The `reading` part of the benchmark: made-up interactions, written in every
format and loaded in one process per format, to measure its peak memory."""

import json
import pathlib
import resource
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv
from pyarrow import parquet as arrow_parquet

# Users and items of ten million lines; fewer lines have fewer of both.
LINES_A_USER, LINES_AN_ITEM = 50, 100
_LOAD = """
import json, sys, time
from experiments import benchmark_reading
from fedmmr_jax.config import DataConfig
from fedmmr_jax.data import load
start = time.perf_counter()
found = load.load(DataConfig(dataset='auto', data_dir=sys.argv[1]), 0)
seconds = time.perf_counter() - start
print(json.dumps({'interactions': len(found.dataset.items),
                  'seconds': seconds,
                  'peak_rss_mb': benchmark_reading.peak_mb()}))
"""
_STATUS = pathlib.Path('/proc/self/status')


def measure(lines: int) -> list[dict[str, Any]]:
  """A row for each format: seconds from the call to the `Dataset`, peak RSS."""
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    for name, write in _WRITERS.items():
      path = pathlib.Path(folder) / name
      write(path, _interactions(lines))
      done = subprocess.run(
        [sys.executable, '-c', _LOAD, path],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
      )
      rows.append(
        {'file': name, 'bytes': path.stat().st_size} | json.loads(done.stdout)
      )
      path.unlink()
  return rows


def peak_mb() -> float:
  """Largest resident set of this process so far, in MB (2²⁰ bytes)."""
  if not _STATUS.exists():  # macOS, where the figure is in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  # What getrusage tells of a new process includes its parent's on Linux.
  status = dict(line.split(':') for line in _STATUS.read_text().splitlines())
  return int(status['VmHWM'].split()[0]) / 1024


def _interactions(lines: int) -> pa.Table:
  """Few items consumed often, users as they come."""
  rng = np.random.default_rng(0)
  items = max(lines // LINES_AN_ITEM, 10)
  return pa.table(
    {
      'userId': rng.integers(1, max(lines // LINES_A_USER, 2), lines),
      'movieId': rng.zipf(1.3, lines) % items + 1,
      'rating': np.full(lines, 4.5),
      'timestamp': 1_000_000_000 + rng.integers(0, 300_000_000, lines),
    }
  )


def _as_amazon(table: pa.Table) -> pa.Table:
  def texts(letter, column, start):
    return pa.array(
      np.char.add(letter, (column.to_numpy() + start).astype(str))
    )

  return table.set_column(
    0, 'reviewerID', texts('A', table[0], 10**12)
  ).set_column(1, 'asin', texts('B', table[1], 10**8))


def _write_csv(path, table, header=True, separator=','):
  arrow_csv.write_csv(
    table,
    path,
    arrow_csv.WriteOptions(
      include_header=header, quoting_style='none', delimiter=separator
    ),
  )


def _write_double_colons(path, table):
  _write_csv(path, table, header=False)
  path.write_bytes(path.read_bytes().replace(b',', b'::'))


def _write_reviews(path, table):
  columns = [c.to_pylist() for c in _as_amazon(table).columns]
  with path.open('w') as file:
    for user, item, rating, time in zip(*columns):
      file.write(
        f'{{"overall": {rating}, "reviewText": "some words that are '
        f'passed over, as there are in reviews", "reviewerID": '
        f'"{user}", "asin": "{item}", "unixReviewTime": {time}}}\n'
      )


def _write_sequences(path, table):
  users, items = table[0].to_numpy(), table[1].to_numpy()
  order = np.argsort(users, kind='stable')
  ids, starts = np.unique(users[order], return_index=True)
  with path.open('w') as file:
    for user, own in zip(ids, np.split(items[order], starts[1:])):
      file.write(f'{user} {" ".join(map(str, own))}\n')


_WRITERS = {
  'ratings.dat': _write_double_colons,
  'ratings.csv': _write_csv,
  'u.data': lambda path, t: _write_csv(path, t, False, '\t'),
  'x.inter': lambda path, t: _write_csv(
    path,
    t.rename_columns(
      ['user_id:token', 'item_id:token', 'rating:float', 'timestamp:float']
    ),
    separator='\t',
  ),
  'amazon.csv': lambda path, t: _write_csv(path, _as_amazon(t), False),
  'reviews.json': _write_reviews,
  'sasrec.txt': lambda path, t: _write_csv(path, t.select([0, 1]), False, ' '),
  'sequences.txt': _write_sequences,
  'x.parquet': lambda path, t: arrow_parquet.write_table(t, path),
}
