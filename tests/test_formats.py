"""Interaction and item files: what is read, how a format is told, how a bad
line is named."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from fedmmr_jax.config import DataConfig
from fedmmr_jax.data import columns, formats, interactions, items, load, sources
from tests import parity
from tests.small import error_of

NAMES = ['ml-1m', 'ml-100k']
FILE = {'ml-1m': 'ratings.dat', 'ml-100k': 'u.data'}
MOVIES = {'ml-1m': 'movies.dat', 'ml-100k': 'u.item'}


class Raw:
  """Ids and times, interaction after interaction."""

  def __init__(self, found):
    self.users = found.user_ids[found.users]
    self.items = found.item_ids[found.items]
    self.times = found.times


def read_ratings(name, folder):
  return Raw(sources.read(sources.find(name, str(folder))))


def read_titles(name, folder):
  return {int(i): item.title for i, item in items.read(folder / MOVIES[name])}


def fields(*values, name, movies=False):
  """One line of `name`, without its end."""
  separator = {'ml-1m': '::', 'ml-100k': '|' if movies else '\t'}[name]
  return separator.join(str(v) for v in values)


def rating_lines(name, count=20):
  return [
    fields(1 + i % 3, 10 + i, 1 + i % 5, 1000 + i, name=name)
    for i in range(count)
  ]


def write(folder, file, lines, end='\n'):
  text = ''.join(line + end for line in lines)
  (folder / file).write_bytes(text.encode('latin-1'))


def assert_twenty_ratings(raw):
  assert raw.users.tolist() == [1 + i % 3 for i in range(20)]
  assert raw.items.tolist() == list(range(10, 30))
  assert raw.times.tolist() == list(range(1000, 1020))


@pytest.mark.parametrize('end', ['\n', '\r\n'], ids=['lf', 'crlf'])
@pytest.mark.parametrize('name', NAMES)
def test_ratings_are_read_in_the_order_of_the_file(name, end, tmp_path):
  write(tmp_path, FILE[name], rating_lines(name), end)
  raw = read_ratings(name, tmp_path)
  assert_twenty_ratings(raw)
  assert raw.users.dtype == raw.items.dtype == np.int64


@pytest.mark.parametrize('name', NAMES)
def test_a_missing_last_line_end_loses_nothing(name, tmp_path):
  (tmp_path / FILE[name]).write_text('\n'.join(rating_lines(name)))
  assert_twenty_ratings(read_ratings(name, tmp_path))


@pytest.mark.parametrize('blank', ['', '  '], ids=['empty', 'spaces'])
@pytest.mark.parametrize('name', NAMES)
def test_blank_lines_are_skipped(name, blank, tmp_path):
  lines = rating_lines(name)
  write(tmp_path, FILE[name], [*lines[:5], blank, *lines[5:], blank])
  assert_twenty_ratings(read_ratings(name, tmp_path))


@pytest.mark.parametrize('name', NAMES)
def test_a_single_line_is_a_file(name, tmp_path):
  write(tmp_path, FILE[name], rating_lines(name, 1))
  raw = read_ratings(name, tmp_path)
  assert (raw.users.tolist(), raw.items.tolist()) == ([1], [10])


def test_the_largest_id_is_read(tmp_path):
  write(tmp_path, 'ratings.dat', [f'{2**31 - 1}::2::5::1000'])
  assert read_ratings('ml-1m', tmp_path).users.tolist() == [2**31 - 1]


def test_the_largest_id_is_not_taken_for_the_bad_line(tmp_path):
  write(tmp_path, 'ratings.dat', [f'{2**31 - 1}::2::5::1000', 'x'])
  assert ', line 2: ' in error_of(read_ratings, 'ml-1m', tmp_path)


def test_half_stars_and_fractions_of_a_second_are_read(tmp_path):
  write(tmp_path, 'ratings.dat', ['1::2::3.5::1000.5'])
  assert read_ratings('ml-1m', tmp_path).times.tolist() == [1000.5]


MALFORMED = [
  ((1, 2, 5), '3 fields instead of 4'),
  ((1, 2, 5, 1000, 7), '5 fields instead of 4'),
  (('abc',), '1 fields instead of 4'),
  (('u7', 2, 5, 1000), 'user id is not a positive whole number'),
  ((1, 'x', 5, 1000), 'item id is not a positive whole number'),
  ((1, '', 5, 1000), 'item id is not a positive whole number'),
  ((0, 2, 5, 1000), 'user id is not a positive whole number'),
  ((1, 0, 5, 1000), 'item id is not a positive whole number'),
  ((-1, 2, 5, 1000), 'user id is not a positive whole number'),
  ((1, 2.5, 5, 1000), 'item id is not a positive whole number'),
  (('nan', 2, 5, 1000), 'user id is not a positive whole number'),
  ((1, 'inf', 5, 1000), 'item id is not a positive whole number'),
  ((1, 'é', 5, 1000), 'item id is not a positive whole number'),
  ((1, 2**31, 5, 1000), 'item id is larger than 2147483647'),
  ((1, 2, 'five', 1000), 'rating is not a number'),
  ((1, 2, 'nan', 1000), 'rating is not a number'),
  ((1, 2, 5, 'inf'), 'timestamp is not a number'),
  ((1, 2, 5, 'nan'), 'timestamp is not a number'),
  ((1, 2, 5, 'noon'), 'timestamp is not a number'),
  ((1, 2, 5, ''), 'timestamp is not a number'),
]


@pytest.mark.parametrize('end', ['\n', '\r\n'], ids=['lf', 'crlf'])
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('bad, problem', MALFORMED, ids=str)
def test_a_malformed_line_is_named(name, bad, problem, end, tmp_path):
  lines = rating_lines(name)
  lines[16] = fields(*bad, name=name)
  write(tmp_path, FILE[name], lines, end)
  message = error_of(read_ratings, name, tmp_path)
  assert message.startswith(f'{tmp_path / FILE[name]}, line 17: {problem} in ')
  assert '<user id>' in message  # the mend: what a line should look like


@pytest.mark.parametrize(
  'bad',
  [
    ('9' * 20, 2, 5, 1000),  # beyond 64 bits
    (1, 2, 5, '10_00'),  # a number in Python, not in a file
  ],
  ids=str,
)
def test_a_line_that_only_the_fast_parser_refuses_is_named(bad, tmp_path):
  lines = rating_lines('ml-1m')
  lines[16] = fields(*bad, name='ml-1m')
  write(tmp_path, 'ratings.dat', lines)
  assert ', line 17: ' in error_of(read_ratings, 'ml-1m', tmp_path)


@pytest.mark.parametrize('name', NAMES)
def test_blank_lines_count_in_the_line_number(name, tmp_path):
  lines = rating_lines(name)
  lines[3], lines[16] = '', fields(1, 'x', 5, 1000, name=name)
  write(tmp_path, FILE[name], lines)
  assert ', line 17: ' in error_of(read_ratings, name, tmp_path)


@pytest.mark.parametrize('name', NAMES)
def test_the_first_of_several_bad_lines_is_named(name, tmp_path):
  lines = rating_lines(name)
  lines[16] = lines[18] = 'x'
  lines[6] = fields(0, 1, 5, 1000, name=name)
  write(tmp_path, FILE[name], lines)
  assert ', line 7: user id' in error_of(read_ratings, name, tmp_path)


def test_the_layout_of_the_other_set_is_refused(tmp_path):
  write(tmp_path, FILE['ml-100k'], rating_lines('ml-1m'))
  assert ', line 1: 1 fields instead of 4' in error_of(
    read_ratings, 'ml-100k', tmp_path
  )


@pytest.mark.parametrize('name', NAMES)
def test_every_line_short_is_refused(name, tmp_path):
  write(
    tmp_path, FILE[name], [fields(1, 10 + i, 5, name=name) for i in range(20)]
  )
  assert ', line 1: 3 fields instead of 4' in error_of(
    read_ratings, name, tmp_path
  )


def test_a_long_bad_line_is_shown_in_part(tmp_path):
  write(tmp_path, 'ratings.dat', ['x' * 10_000])
  assert len(error_of(read_ratings, 'ml-1m', tmp_path)) < 400


@pytest.mark.parametrize('content', [b'', b'\n', b' \r\n\r\n'])
@pytest.mark.parametrize('name', NAMES)
def test_an_empty_file_is_an_error(name, content, tmp_path):
  (tmp_path / FILE[name]).write_bytes(content)
  message = error_of(read_ratings, name, tmp_path)
  assert message == f'{tmp_path / FILE[name]}: the file is empty'


@pytest.mark.parametrize('name', NAMES)
def test_a_missing_file_is_an_error_that_names_the_flag(name, tmp_path):
  message = error_of(read_ratings, name, tmp_path)
  assert message.startswith(f'{tmp_path / FILE[name]}: no such file')
  assert '`data_dir' in message


@pytest.mark.parametrize('end', ['\n', '\r\n'], ids=['lf', 'crlf'])
@pytest.mark.parametrize('name', NAMES)
def test_titles_are_latin_1(name, end, tmp_path):
  write(
    tmp_path,
    MOVIES[name],
    [
      fields(1, 'Toy Story (1995)', 'Animation', name=name, movies=True),
      fields(73, 'Misérables, Les (1995)', 'Drama', name=name, movies=True),
      '',
      fields(9, 'Ça: 100% (2000)', 'Comedy|Drama', name=name, movies=True),
    ],
    end,
  )
  assert read_titles(name, tmp_path) == {
    1: 'Toy Story (1995)',
    73: 'Misérables, Les (1995)',
    9: 'Ça: 100% (2000)',
  }


@pytest.mark.parametrize('end', ['\n', '\r\n'], ids=['lf', 'crlf'])
@pytest.mark.parametrize(
  'bad',
  [
    ('M7', 'Title', 'Drama'),
    (-7, 'Title', 'Drama'),
    ('', 'Title', 'Drama'),
    ('²', 'Title', 'Drama'),
    (7, 'Title'),
    (7,),
  ],
  ids=str,
)
@pytest.mark.parametrize('name', NAMES)
def test_a_malformed_movie_is_named(name, bad, end, tmp_path):
  lines = [
    fields(i, 'Title', 'Drama', name=name, movies=True) for i in range(1, 21)
  ]
  lines[3] = ''
  lines[16] = fields(*bad, name=name, movies=True)
  write(tmp_path, MOVIES[name], lines, end)
  message = error_of(read_titles, name, tmp_path)
  assert message.startswith(f'{tmp_path / MOVIES[name]}, line 17: expected ')


@pytest.mark.parametrize('name', NAMES)
def test_a_loaded_set_has_titles_by_catalogue_row(name, tmp_path):
  # User 1 consumed 10, 13, …, user 2 11, 14, …; two movies have a title.
  write(tmp_path, FILE[name], rating_lines(name))
  write(
    tmp_path,
    MOVIES[name],
    [
      fields(i, f'Film {i}', 'Drama', name=name, movies=True)
      for i in (10, 29, 400)
    ],
  )
  loaded = load.load(DataConfig(dataset=name, data_dir=str(tmp_path)), 0)
  assert loaded.integrity == () and loaded.dropped_users == []
  dataset = loaded.dataset
  assert dataset.user_ids.tolist() == [1, 2, 3]
  assert dataset.item_ids.tolist() == [0, *range(10, 30)]
  assert dataset.titles == ('', 'Film 10', *[''] * 18, 'Film 29')
  assert dataset.item_ids[dataset.sequence(0)].tolist() == [
    10,
    13,
    16,
    19,
    22,
    25,
    28,
  ]


def test_the_1000_most_active_users_of_the_real_set():
  folder = parity.require(parity.SHARED / 'data' / 'ml-1m')
  dataset = load.load(
    DataConfig(
      dataset='ml-1m',
      data_dir=str(folder),
      top_k_users=1000,
      visual_features='none',
      text_features='none',
    ),
    0,
  ).dataset
  assert dataset.num_clients == 1000
  assert len(dataset.items) == 514_961
  assert dataset.num_items == 3415
  assert dataset.lengths.min() == 293
  assert dataset.lengths.max() == 2277
  assert len(dataset.titles) == dataset.num_rows
  assert all(dataset.titles[1:])


# The other formats: the same nine interactions in each.

USERS, ITEMS = ['u1', 'u1', 'u2'] * 3, [f'i{i}' for i in (5, 3, 3) * 3]
TIMES = [1_000_000_000 + i for i in range(9)]
ROWS = list(zip(USERS, ITEMS, TIMES))
ASINS = [f'B00000000{i[1]}' for i in ITEMS]


def reviews(user, item, time, scale=1):
  return ''.join(
    json.dumps(
      {
        'overall': 4.0,
        'reviewText': 'good, "very" {good}',
        'vote': [1],
        user: u,
        item: i,
        time: t * scale,
      }
    )
    + '\n'
    for u, i, t in ROWS
  )


def csv_text(header, separator=',', time=str):
  return ''.join(
    separator.join(row) + '\n'
    for row in (
      header.split(','),
      *((u, '4.5', i, time(t)) for u, i, t in ROWS),
    )
  )


# name of the file, its text, the format that is told
EXAMPLES = {
  'movielens csv': (
    'ratings.csv',
    'userId,movieId,rating,timestamp\n'
    + ''.join(f'{u[1]},{i[1]},4.5,{t}\n' for u, i, t in ROWS),
    'ml-latest',
  ),
  'recbole': (
    'toys.inter',
    csv_text('user_id:token,rating:float,item_id:token,timestamp:float', '\t'),
    'recbole',
  ),
  'reviews of 2014': (
    'reviews_Toys_5.json',
    reviews('reviewerID', 'asin', 'unixReviewTime'),
    'amazon-reviews',
  ),
  'reviews of 2023': (
    'Toys.jsonl',
    reviews('user_id', 'parent_asin', 'timestamp', 1000),
    'amazon-reviews',
  ),
  'ratings, user first': (
    'ratings_Toys.csv',
    ''.join(f'{u},{i},5.0,{t}\n' for u, i, t in zip(USERS, ASINS, TIMES)),
    'amazon-ratings',
  ),
  'ratings, item first': (
    'Toys.csv',
    ''.join(f'{i},{u},5.0,{t}\n' for u, i, t in zip(USERS, ASINS, TIMES)),
    'amazon-ratings',
  ),
  'csv': ('log.csv', csv_text('USER,stars,Item_ID,Time'), 'csv'),
  'semicolons': ('log.csv', csv_text('user,stars,item,ts', ';'), 'csv'),
  'tabs': ('log.tsv', csv_text('user,stars,item,ts', '\t'), 'csv'),
  'milliseconds': (
    'log.csv',
    csv_text('user,stars,item,ts', time=lambda t: str(t * 1000)),
    'csv',
  ),
  'dates': (
    'log.csv',
    csv_text('user,stars,item,ts', time=lambda t: str(np.datetime64(t, 's'))),
    'csv',
  ),
}


@pytest.mark.parametrize('compressed', [False, True], ids=['plain', 'gz'])
@pytest.mark.parametrize('careful', [False, True], ids=['fast', 'careful'])
@pytest.mark.parametrize('example', EXAMPLES)
def test_every_format_is_told_and_read(
  example, careful, compressed, tmp_path, monkeypatch
):
  name, text, expected = EXAMPLES[example]

  def doubt(*_):
    raise columns.Doubt

  # The slow reader reads what the fast one does, and neither needs the other.
  if careful:
    monkeypatch.setattr(formats.delimited, '_read_fast', doubt)
    monkeypatch.setattr(columns, 'interactions_of', doubt)
  else:
    monkeypatch.setattr(formats.delimited, '_read_carefully', doubt)
    monkeypatch.setattr(formats, '_reviews_carefully', doubt)
  data = text.encode()
  (tmp_path / (name + '.gz' * compressed)).write_bytes(
    gzip.compress(data) if compressed else data
  )
  source = sources.find('auto', str(tmp_path))
  assert source.format == expected
  raw = Raw(sources.read(source))
  users, found = raw.users.tolist(), raw.items.tolist()
  if expected == 'ml-latest':
    assert users == [int(u[1]) for u in USERS]
    assert found == [int(i[1]) for i in ITEMS]
  else:
    assert users == USERS
    assert found == (ASINS if expected == 'amazon-ratings' else ITEMS)
  assert raw.times.tolist() == TIMES


@pytest.mark.parametrize(
  'text, expected, users, found',
  [
    ('1 5\n1 3\n2 3\n', 'sasrec', [1, 1, 2], [5, 3, 3]),
    ('1\t5\n1\t3\n2\t3\n', 'sasrec', [1, 1, 2], [5, 3, 3]),
    ('1 5 3\n2 3\n', 'sequences', [1, 1, 2], [5, 3, 3]),
    (
      'u1 i5 i3\nu2 i3 i5 i5\n',
      'sequences',
      ['u1'] * 2 + ['u2'] * 3,
      ['i5', 'i3', 'i3', 'i5', 'i5'],
    ),
  ],
)
def test_files_without_times(text, expected, users, found, tmp_path):
  (tmp_path / 'Toys.txt').write_text(text)
  source = sources.find('auto', str(tmp_path / 'Toys.txt'))
  assert source.format == expected
  raw = Raw(sources.read(source))
  assert (raw.users.tolist(), raw.items.tolist()) == (users, found)
  assert raw.times is None


@pytest.mark.parametrize(
  'time',
  [
    pa.array(TIMES),
    pa.array(TIMES, pa.float64()),
    pa.array([t * 1000 for t in TIMES]),
    pa.array(TIMES, pa.timestamp('s')),
    pa.array(TIMES, pa.timestamp('s', 'UTC')),
  ],
  ids=lambda a: str(a.type),
)
def test_parquet(time, tmp_path):
  path = tmp_path / 'x.parquet'
  parquet.write_table(
    pa.table(
      {
        'session_id': pa.array(USERS).dictionary_encode(),
        'stars': [4.5] * 9,
        'article_id': ITEMS,
        'ts': time,
      }
    ),
    path,
  )
  raw = read_ratings('auto', path)
  assert raw.users.tolist() == USERS and raw.items.tolist() == ITEMS
  assert raw.times.tolist() == TIMES


def test_columns_can_be_named(tmp_path):
  (tmp_path / 'log.csv').write_text('who,user_id,what,when\na,x,5,3\nb,x,6,2\n')
  raw = read_ratings('auto,user=who,item=what,time=when', tmp_path)
  assert raw.users.tolist() == ['a', 'b'] and raw.items.tolist() == [5, 6]
  assert raw.times.tolist() == [3, 2]


def test_a_time_that_the_first_line_lacks_counts(tmp_path):
  (tmp_path / 'x.jsonl').write_text(
    '{"user": "a", "item": "b"}\n{"user": "a", "item": "c", "time": 5}\n'
  )
  assert ', line 1: time is neither' in error_of(read_ratings, 'auto', tmp_path)


def test_columns_of_a_format_without_names_are_refused(tmp_path):
  write(tmp_path, 'ratings.dat', rating_lines('ml-1m'))
  assert 'has no named columns' in error_of(
    read_ratings, 'auto,user=a', tmp_path
  )


def test_one_column_for_two_things_is_refused(tmp_path):
  (tmp_path / 'log.csv').write_text('a,b\n1,2\n')
  assert 'must be different columns' in error_of(
    read_ratings, 'csv,user=a,item=a', tmp_path
  )


def test_quoted_amazon_ratings_with_the_item_first(tmp_path):
  (tmp_path / 'x.csv').write_text('"B000000001","A1",5.0,100\n' * 3)
  raw = read_ratings('auto', tmp_path)
  assert raw.users.tolist() == ['A1'] * 3
  assert raw.items.tolist() == ['B000000001'] * 3


def test_a_byte_order_mark_is_no_part_of_an_id(tmp_path):
  (tmp_path / 'ratings.dat').write_bytes(
    b'\xef\xbb\xbf1::2::5::100\n\n1::3::5::x\n'
  )
  assert ', line 3: timestamp' in error_of(read_ratings, 'auto', tmp_path)


def test_an_item_file_of_another_set_is_refused(tmp_path):
  (tmp_path / 'log.csv').write_text('user,item\n1,a\n1,b\n1,c\n')
  (tmp_path / 'items.csv').write_text('item_id,title\nx,X\n')
  assert 'tells of no item of the interactions' in error_of(
    load.load, DataConfig(dataset='auto', data_dir=str(tmp_path)), 0
  )


def test_space_around_ids_and_in_names_does_not_count(tmp_path):
  (tmp_path / 'log.csv').write_text('User ID, Item ID\n1, 2\n1,2 \n 1,3\n')
  raw = read_ratings('auto', tmp_path)
  assert raw.users.tolist() == [1] * 3 and raw.items.tolist() == [2, 2, 3]


def test_ids_with_leading_zeros_or_quotes_stay_strings(tmp_path):
  (tmp_path / 'log.csv').write_text(
    'user,item\n1,0012\n1,12\n1,"a, b"\n1,"say ""x"""\n'
  )
  raw = read_ratings('auto', tmp_path)
  assert raw.users.tolist() == [1] * 4
  assert raw.items.tolist() == ['0012', '12', 'a, b', 'say "x"']


# file name, text, what the error has to say after the file's name
BROKEN = {
  'missing column': (
    'ratings.csv',
    'userId,rating,timestamp\n1,5,3\n',
    ', line 1: no column of the items among userId, rating, '
    'timestamp; name it, as in `dataset=auto,item=…`',
    'auto',
  ),
  'header only': ('log.csv', 'user,item\n', ': no interaction in it', 'auto'),
  'short line': (
    'log.csv',
    'user,item,time\n1,2,3\n1,2\n',
    ', line 3: 2 fields instead of 3',
    'auto',
  ),
  'empty id': (
    'log.csv',
    'user,item,time\n1,2,3\n1,,3\n',
    ', line 3: item is empty',
    'auto',
  ),
  'endless id': (
    'log.csv',
    'user,item,time\n1,2,3\n1,' + 'x' * 300 + ',3\n',
    ', line 3: item is longer than 200',
    'auto',
  ),
  'time': (
    'log.csv',
    'user,item,time\n1,2,3\n1,2,noon\n',
    ', line 3: time is neither a number nor a date',
    'auto',
  ),
  'missing id': (
    'log.csv',
    'user,item,time\n1,2,3\nNaN,4,3\n',
    ', line 3: user is missing',
    'auto',
  ),
  'unit': (
    'log.csv',
    'user,item,time\n1,2,1600000000\n1,3,1600000001\n1,4,1600000002000\n',
    ', line 4: time 1600000002000 is not in the unit of most others',
    'auto',
  ),
  'json unit': (
    'x.json',
    ''.join(
      '{"asin": "%s", "user": "b", "timestamp": %d}\n' % pair
      for pair in (
        ('a', 1600000000000),
        ('b', 1600000000001),
        ('c', 16 * 10**14),
      )
    ),
    ', line 3: timestamp 1600000000000000 is not in',
    'auto',
  ),
  'twice': (
    'log.csv',
    'user,item,item\n1,2,3\n',
    ', line 1: two columns',
    'csv',
  ),
  'range': (
    'ratings.csv',
    'userId,movieId,rating,timestamp\n1,2,5,3\n1,3000000000,5,3\n',
    ', line 3: movieId is larger than 2147483647',
    'auto',
  ),
  'recbole': (
    'x.inter',
    'user_id:token\tprice:float\n1\t2\n',
    ', line 1: no column of the items',
    'auto',
  ),
  'recbole line': (
    'x.inter',
    'user_id:token\titem_id:token\n1\t2\n1\n',
    ', line 3: 1 fields instead of 2',
    'auto',
  ),
  'sasrec': (
    'x.txt',
    '1 2\n1 3\n2 x\n',
    ', line 3: item id is not a positive whole number',
    'sasrec',
  ),
  'sasrec line': (
    'x.txt',
    '1 2\n1 3 4\n',
    ', line 2: 3 fields instead of 2',
    'sasrec',
  ),
  'sequences': (
    'x.txt',
    '1 2 3\n1 3\n',
    ', line 2: a second line of user 1',
    'sequences',
  ),
  'json': (
    'x.json',
    '{"asin": "a", "reviewerID": "b"}\n{"asin": \n',
    ', line 2: not a JSON object',
    'auto',
  ),
  'json key': (
    'x.json',
    '{"asin": "a", "reviewerID": "b"}\n{"asin": "a"}\n',
    ', line 2: no reviewerID',
    'auto',
  ),
  'json column': (
    'x.json',
    '{"asin": "a", "overall": 5}\n',
    ', line 1: no column of the users',
    'auto',
  ),
  'json time': (
    'x.json',
    '{"asin": "a", "user": "b", "timestamp": 1}\n'
    '{"asin": "a", "user": "b", "timestamp": "x"}\n',
    ', line 2: timestamp is neither',
    'auto',
  ),
  'amazon ratings': (
    'x.csv',
    'A1,B000000001,5.0,1\nA1,B000000002,5.0\n',
    ', line 2: 3 fields instead of 4',
    'auto',
  ),
  'control': (
    'log.csv',
    'user,item\n1,2\n1,\0\n',
    ', line 3: item holds a control character',
    'auto',
  ),
  'truth': (
    'log.csv',
    'user,item,time\n1,2,true\n',
    ', line 2: time is neither',
    'auto',
  ),
  'open quote': (
    'log.csv',
    'user,item,note\n1,2,"open\n1,3,x\n',
    ', line 2: a quote is not closed',
    'auto',
  ),
  'long id': (
    'ratings.dat',
    '1::2::5::3\n' + '9' * 5000 + '::2::5::3\n',
    ', line 2: user id is larger',
    'auto',
  ),
  'array': ('x.json', '[{"user": 1, "item": 2}]\n', ': a JSON array', 'auto'),
  'prose': (
    'x.txt',
    'Dear reader, this is no data.\n',
    ': cannot tell its format from',
    'auto',
  ),
  'parquet': (
    'x.parquet',
    'PAR1 not really',
    ': not a readable Parquet file',
    'auto',
  ),
}


@pytest.mark.parametrize(
  'name, text, message, dataset', BROKEN.values(), ids=BROKEN
)
def test_what_is_broken_is_named(name, text, message, dataset, tmp_path):
  path = tmp_path / name
  path.write_text(text)
  assert error_of(read_ratings, dataset, path).startswith(f'{path}{message}')


@pytest.mark.parametrize(
  'example',
  ['movielens csv', 'recbole', 'csv', 'reviews of 2014', 'ratings, user first'],
)
def test_a_truncated_gz_is_named(example, tmp_path):
  name, text, _ = EXAMPLES[example]
  path = tmp_path / f'{name}.gz'
  noise = np.random.default_rng(0).integers(0, 10, 200_000)
  longer = text + text.splitlines()[-1].join(map(str, noise)) + '\n'
  path.write_bytes(gzip.compress(longer.encode())[:-9_000])
  message = error_of(read_ratings, 'auto', path)
  assert message == (
    f'{path}: the compressed file is cut off or damaged; fetch it again'
  )


def test_a_missing_value_in_parquet_is_named(tmp_path):
  path = tmp_path / 'x.parquet'
  parquet.write_table(pa.table({'user': [1, 2], 'item': ['a', None]}), path)
  assert error_of(read_ratings, 'auto', path).startswith(
    f'{path}, row 1: item is missing'
  )
  parquet.write_table(pa.table({'user': [1, 2], 'item': [0.5, 1.5]}), path)
  assert 'row 0: item is not a whole number: 0.5' in error_of(
    read_ratings, 'auto', path
  )


def test_several_candidates_are_listed(tmp_path):
  for name in ('a.csv', 'b.csv', 'items.csv'):
    (tmp_path / name).write_text('user,item\n1,2\n')
  message = error_of(read_ratings, 'auto', tmp_path)
  assert 'a.csv, b.csv could each be the interactions' in message


def test_a_non_utf8_id_is_named(tmp_path):
  (tmp_path / 'log.csv').write_bytes('user,item\n1,a\n1,é\n'.encode('latin-1'))
  message = error_of(read_ratings, 'auto', tmp_path)
  assert ', line 3: not UTF-8 at ' in message and 'iconv' in message


# Item files.

ITEM_FILES = {
  'movies.dat': '1::Heat: 2 (1995)::Action|Crime\n',
  'u.item': '1|Heat: 2 (1995)|1-Jan|||0|1|0|0|0|0|1|0|0|0|0|0|0|0|0|0|0|0|0\n',
  'movies.csv': 'movieId,title,genres\n1,"Heat: 2 (1995)",Action|Crime\n',
  'x.item': 'item_id:token\tmovie_title:token_seq\tclass:token_seq\n'
  '1\tHeat: 2 (1995)\tAction, Crime\n',
  'meta_x.json': "{'asin': '1', 'title': 'Heat: 2 (1995)', "
  "'categories': [['Action', 'Crime']]}\n",
  'meta_y.jsonl': '{"parent_asin": "1", "title": "Heat: 2 (1995)", '
  '"categories": ["Action", "Crime"]}\n',
}


@pytest.mark.parametrize('name', ITEM_FILES)
def test_item_files(name, tmp_path):
  (tmp_path / name).write_text(ITEM_FILES[name])
  found = dict(items.read(tmp_path / name))
  assert found == {'1': items.Item('Heat: 2 (1995)', ('Action', 'Crime'))}
  assert found['1'].text == 'Heat: 2 (1995). Genres: Action, Crime.'


def test_a_quoted_description_may_have_several_lines(tmp_path):
  (tmp_path / 'items.csv').write_text(
    'item_id,title,description\n1,"A, ""b""","one\n\ntwo"\n2,c,d\n'
  )
  assert dict(items.read(tmp_path / 'items.csv')) == {
    '1': items.Item('A, "b"', (), 'one\ntwo'),
    '2': items.Item('c', (), 'd'),
  }


def test_a_description_is_part_of_the_text(tmp_path):
  parquet.write_table(
    pa.table(
      {'ITEM_ID': ['a'], 'Name': ['T'], 'description': [['Long', 'text.']]}
    ),
    tmp_path / 'items.parquet',
  )
  found = dict(items.read(tmp_path / 'items.parquet'))
  assert found['a'].text == 'T. Long text.'


@pytest.mark.parametrize(
  'name, data, message',
  [
    (
      'movies.csv',
      b'movieId,title\n1,a\n2,caf\xe9\n',
      ', line 3: not UTF-8 at ',
    ),
    ('movies.csv', b'movieId,title\n1,a\n2\n', ', line 3: 1 fields'),
    ('movies.csv', b'name,title\n1,a\n', ', line 1: no column of the item ids'),
    ('meta_x.json', b'{"asin": 1}\nx\n', ', line 2: not a JSON object'),
  ],
)
def test_a_malformed_item_file_is_named(name, data, message, tmp_path):
  (tmp_path / name).write_bytes(data)
  assert error_of(items.read, tmp_path / name).startswith(
    f'{tmp_path / name}{message}'
  )


@pytest.mark.parametrize(
  'ids, rows, num_rows, words',
  [
    ([3, 7], [3, 7], 8, 'row i of'),
    ([0, 2], [1, 3], 4, 'row i + 1'),
    ([5, 2**40], [1, 2], 3, '5 = 1 to 1099511627776 = 2'),
    (['b', 'c'], [1, 2], 3, 'b = 1 to c = 2'),
  ],
)
def test_which_row_of_a_matrix_is_whose(ids, rows, num_rows, words):
  table = items.table(
    interactions.Interactions.of(np.array([1, 1]), np.array(ids)), None
  )
  assert table.rows.tolist() == rows and table.num_rows == num_rows
  assert words in table.numbering


def test_items_that_are_described_twice_are_counted(tmp_path):
  (tmp_path / 'log.csv').write_text(
    'user,item\n' + ''.join(f'{u},{i}\n' for u in (1, 2, 3) for i in 'abcde')
  )
  (tmp_path / 'items.csv').write_text(
    'item_id,title\na,A\nb,B\nb,B\na,Other\nb,B\n'
  )
  loaded = load.load(DataConfig(dataset='auto', data_dir=str(tmp_path)), seed=0)
  # b says the same each time.
  assert (
    'items      1 described more than once, and not alike: the last line counts'
  ) in loaded.notes
  assert loaded.dataset.titles[1:3] == ('Other', 'B')


def test_features_of_string_ids_are_found_by_number(tmp_path):
  # Users 1 to 3 consume a to e; f is nobody's and has no row.
  (tmp_path / 'log.csv').write_text(
    'user,item\n' + ''.join(f'{u},{i}\n' for u in (1, 2, 3) for i in 'edcba')
  )
  (tmp_path / 'items.csv').write_text('item_id,title\nb,Bee\nf,Eff\n')
  matrix = np.arange(12, dtype=np.float32).reshape(6, 2)
  matrix[0] = 0
  np.save(tmp_path / 'text_features.npy', matrix)
  dataset = load.load(
    DataConfig(dataset='auto', data_dir=str(tmp_path)), 0
  ).dataset
  assert dataset.item_ids.tolist() == ['', 'a', 'b', 'c', 'd', 'e']
  assert dataset.titles == ('', '', 'Bee', '', '', '')
  np.testing.assert_array_equal(dataset.features['text'], matrix)
  assert dataset.item_ids[dataset.sequence(0)].tolist() == list('edcba')
