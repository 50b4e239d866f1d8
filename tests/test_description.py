"""What `inspect_data` says of a data set, on sets with traps."""

import json

import numpy as np
import pytest

from fedmmr_jax.data import description, sources
from fedmmr_jax.data.dataset import Dataset
from fedmmr_jax.data.interactions import Interactions
from fedmmr_jax.data.selection import Filters
from tests.test_cli import refused, run

NOW = 1_600_000_000


def of(rows):
  """Rows of (user, item, time)."""
  users, items, times = zip(*rows)
  return Interactions.of(
    np.array(users), np.array(items), np.array(times, np.float64)
  )


def test_counts_by_hand():
  found = description.describe(
    of(
      [
        (1, 10, NOW),
        (1, 10, NOW),  # a copy, which is a repeat and a tie too
        (1, 11, NOW + 5),
        (2, 10, NOW + 3),  # its time falls
        (2, 11, 7),  # 1970
        (3, 12, NOW),
      ]
    )
  )
  assert found[:3] == (6, 3, 3)
  assert found.lengths.tolist() == [3, 2, 1]
  assert (found.duplicates, found.repeats) == (1, 1 / 6)
  assert found.times.first == 7 and found.times.last == NOW + 5
  assert found.times.odd == 1
  assert found.times.in_order == 3 / 5  # lines 3 to 4 and 4 to 5 fall
  assert found.times.tied == 1 / 5
  assert found.of_users[[0, 3, 6]].tolist() == [1, 2, 3]
  assert found.of_items[[0, 3, 6]].tolist() == [1, 2, 3]


def test_what_each_filter_leaves():
  rows = [(1, i, i) for i in range(9)] + [(2, i, i) for i in range(4)]
  rows += [(3, i, i) for i in range(5)] + [(4, 0, 0), (4, 1, 1)]
  steps = description.filtered('toy', of(rows), Filters(top_k_users=1))
  assert [step[1] for step in steps] == [3, 1]
  assert steps[0][3] == 9 + 4 + 5
  assert 'most active' in steps[-1][0]


def test_held_out_items_that_repeat_or_are_unknown():
  # Client 1 had its test item before, client 2's nobody trains on.
  dataset = Dataset.of(
    [1] * 5 + [2] * 4 + [3] * 4,
    ['a', 'b', 'c', 'd', 'a', 'a', 'b', 'c', 'z', 'b', 'a', 'd', 'c'],
  )
  found = description.held_out(dataset)
  assert (found.validation, found.test) == (3, 3)
  assert found.repeated == pytest.approx(1 / 3)
  assert found.untrained == pytest.approx(1 / 3)


def test_bars_double():
  rows = description.bars(np.array([3, 4, 4, 5, 9, 40]), width=6)
  assert rows == [
    ('2 to 3', 1, 2),
    ('4 to 7', 3, 6),
    ('8 to 15', 1, 2),
    ('16 to 31', 0, 0),
    ('32 to 63', 1, 2),
  ]


@pytest.mark.slow
def test_the_binary(tmp_path):
  lines = [
    f'{user},{item}.0,{NOW + 60 * item}'
    for user in range(1, 7)
    for item in range(1, 6 + user)
  ]
  path = tmp_path / 'log.csv'
  path.write_text('\n'.join(['who,item_id,created_at', *lines]) + '\n')
  assert 'no column of the users' in refused(str(path), binary='inspect_data')
  dataset = '--dataset=csv,user=who'
  assert 'created_at may hold some' in refused(
    dataset, str(path), binary='inspect_data'
  )
  picture = tmp_path / 'data.png'
  dataset += ',time=created_at'
  out, _ = run('inspect_data', dataset, str(path), f'--out={picture}')
  assert 'who = users, item_id = items, created_at = times' in out
  assert '2020-09-13 12:27' in out and 'user 1, 6 interactions' in out
  assert picture.stat().st_size > 10_000
  out, _ = run('inspect_data', dataset, str(path), '--json')
  assert json.loads(out)['users'] == 6
  assert 'name one file' in refused('a', 'b', binary='inspect_data')
  assert 'has no files' in refused(binary='inspect_data')


def test_formats_are_read_as_they_are_described(tmp_path):
  (tmp_path / 'log.csv').write_text('user,item\n1,2\n')
  found = sources.read(sources.find('auto', str(tmp_path)))
  assert description.describe(found).times is None
