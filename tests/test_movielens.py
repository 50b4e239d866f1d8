"""MovieLens files: what is read, and how a bad line is named."""

import numpy as np
import pytest

from fedmmr_jax.config import DataConfig
from fedmmr_jax.data import load, movielens
from fedmmr_jax.errors import UserError
from tests import parity

NAMES = ['ml-1m', 'ml-100k']
FILE = {name: movielens.LAYOUTS[name].ratings for name in NAMES}
MOVIES = {name: movielens.LAYOUTS[name].movies for name in NAMES}


def fields(*values, name, movies=False):
  """One line of `name`, without its end."""
  separator = {'ml-1m': '::', 'ml-100k': '|' if movies else '\t'}[name]
  return separator.join(str(v) for v in values)


def rating_lines(name, count=20):
  return [fields(1 + i % 3, 10 + i, 1 + i % 5, 1000 + i, name=name)
          for i in range(count)]


def write(folder, file, lines, end='\n'):
  text = ''.join(line + end for line in lines)
  (folder / file).write_bytes(text.encode('latin-1'))


def assert_twenty_ratings(raw):
  assert raw.users.tolist() == [1 + i % 3 for i in range(20)]
  assert raw.items.tolist() == list(range(10, 30))
  assert raw.times.tolist() == list(range(1000, 1020))


def error_of(function, *arguments):
  with pytest.raises(UserError) as caught:
    function(*arguments)
  message = str(caught.value)
  assert '\n' not in message
  return message


def test_layouts_are_those_of_the_releases():
  assert FILE == {'ml-1m': 'ratings.dat', 'ml-100k': 'u.data'}
  assert MOVIES == {'ml-1m': 'movies.dat', 'ml-100k': 'u.item'}


@pytest.mark.parametrize('end', ['\n', '\r\n'], ids=['lf', 'crlf'])
@pytest.mark.parametrize('name', NAMES)
def test_ratings_are_read_in_the_order_of_the_file(name, end, tmp_path):
  write(tmp_path, FILE[name], rating_lines(name), end)
  raw = movielens.read_ratings(name, tmp_path)
  assert_twenty_ratings(raw)
  assert raw.users.dtype == raw.items.dtype == np.int64


@pytest.mark.parametrize('name', NAMES)
def test_a_missing_last_line_end_loses_nothing(name, tmp_path):
  (tmp_path / FILE[name]).write_text('\n'.join(rating_lines(name)))
  assert_twenty_ratings(movielens.read_ratings(name, tmp_path))


@pytest.mark.parametrize('blank', ['', '  '], ids=['empty', 'spaces'])
@pytest.mark.parametrize('name', NAMES)
def test_blank_lines_are_skipped(name, blank, tmp_path):
  lines = rating_lines(name)
  write(tmp_path, FILE[name], [*lines[:5], blank, *lines[5:], blank])
  assert_twenty_ratings(movielens.read_ratings(name, tmp_path))


@pytest.mark.parametrize('name', NAMES)
def test_a_single_line_is_a_file(name, tmp_path):
  write(tmp_path, FILE[name], rating_lines(name, 1))
  raw = movielens.read_ratings(name, tmp_path)
  assert (raw.users.tolist(), raw.items.tolist()) == ([1], [10])


def test_the_largest_id_is_read(tmp_path):
  write(tmp_path, 'ratings.dat', [f'{2 ** 31 - 1}::2::5::1000'])
  assert movielens.read_ratings('ml-1m', tmp_path).users.tolist() == [
      2 ** 31 - 1]


def test_the_largest_id_is_not_taken_for_the_bad_line(tmp_path):
  write(tmp_path, 'ratings.dat', [f'{2 ** 31 - 1}::2::5::1000', 'x'])
  assert ', line 2: ' in error_of(movielens.read_ratings, 'ml-1m', tmp_path)


def test_half_stars_and_fractions_of_a_second_are_read(tmp_path):
  write(tmp_path, 'ratings.dat', ['1::2::3.5::1000.5'])
  assert movielens.read_ratings('ml-1m', tmp_path).times.tolist() == [1000.5]


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
    ((1, 2 ** 31, 5, 1000), 'item id is larger than 2147483647'),
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
  message = error_of(movielens.read_ratings, name, tmp_path)
  assert message.startswith(
      f'{tmp_path / FILE[name]}, line 17: {problem} in ')
  assert '<user id>' in message  # the mend: what a line should look like


@pytest.mark.parametrize('bad', [
    ('9' * 20, 2, 5, 1000),  # beyond 64 bits
    (1, 2, 5, '10_00'),      # a number in Python, not in a file
], ids=str)
def test_a_line_that_only_the_fast_parser_refuses_is_named(bad, tmp_path):
  lines = rating_lines('ml-1m')
  lines[16] = fields(*bad, name='ml-1m')
  write(tmp_path, 'ratings.dat', lines)
  assert ', line 17: ' in error_of(
      movielens.read_ratings, 'ml-1m', tmp_path)


@pytest.mark.parametrize('name', NAMES)
def test_blank_lines_count_in_the_line_number(name, tmp_path):
  lines = rating_lines(name)
  lines[3], lines[16] = '', fields(1, 'x', 5, 1000, name=name)
  write(tmp_path, FILE[name], lines)
  assert ', line 17: ' in error_of(movielens.read_ratings, name, tmp_path)


@pytest.mark.parametrize('name', NAMES)
def test_the_first_of_several_bad_lines_is_named(name, tmp_path):
  lines = rating_lines(name)
  lines[16] = lines[18] = 'x'
  lines[6] = fields(0, 1, 5, 1000, name=name)
  write(tmp_path, FILE[name], lines)
  assert ', line 7: user id' in error_of(
      movielens.read_ratings, name, tmp_path)


def test_the_layout_of_the_other_set_is_refused(tmp_path):
  write(tmp_path, FILE['ml-100k'], rating_lines('ml-1m'))
  assert ', line 1: 1 fields instead of 4' in error_of(
      movielens.read_ratings, 'ml-100k', tmp_path)


@pytest.mark.parametrize('name', NAMES)
def test_every_line_short_is_refused(name, tmp_path):
  write(tmp_path, FILE[name],
        [fields(1, 10 + i, 5, name=name) for i in range(20)])
  assert ', line 1: 3 fields instead of 4' in error_of(
      movielens.read_ratings, name, tmp_path)


def test_a_long_bad_line_is_shown_in_part(tmp_path):
  write(tmp_path, 'ratings.dat', ['x' * 10_000])
  assert len(error_of(movielens.read_ratings, 'ml-1m', tmp_path)) < 400


@pytest.mark.parametrize('content', [b'', b'\n', b' \r\n\r\n'])
@pytest.mark.parametrize('name', NAMES)
def test_an_empty_file_is_an_error(name, content, tmp_path):
  (tmp_path / FILE[name]).write_bytes(content)
  message = error_of(movielens.read_ratings, name, tmp_path)
  assert message == f'{tmp_path / FILE[name]}: the file is empty'


@pytest.mark.parametrize('name', NAMES)
def test_a_missing_file_is_an_error_that_names_the_flag(name, tmp_path):
  message = error_of(movielens.read_ratings, name, tmp_path)
  assert message.startswith(f'{tmp_path / FILE[name]}: no such file')
  assert '--data_dir' in message


@pytest.mark.parametrize('end', ['\n', '\r\n'], ids=['lf', 'crlf'])
@pytest.mark.parametrize('name', NAMES)
def test_titles_are_latin_1(name, end, tmp_path):
  write(tmp_path, MOVIES[name], [
      fields(1, 'Toy Story (1995)', 'Animation', name=name, movies=True),
      fields(73, 'Misérables, Les (1995)', 'Drama', name=name, movies=True),
      '',
      fields(9, 'Ça: 100% (2000)', 'Comedy|Drama', name=name, movies=True),
  ], end)
  assert movielens.read_titles(name, tmp_path) == {
      1: 'Toy Story (1995)', 73: 'Misérables, Les (1995)',
      9: 'Ça: 100% (2000)'}


@pytest.mark.parametrize('name', NAMES)
def test_no_movies_file_gives_no_titles(name, tmp_path):
  assert movielens.read_titles(name, tmp_path) == {}


@pytest.mark.parametrize('end', ['\n', '\r\n'], ids=['lf', 'crlf'])
@pytest.mark.parametrize('bad', [
    ('M7', 'Title', 'Drama'), (-7, 'Title', 'Drama'), ('', 'Title', 'Drama'),
    ('²', 'Title', 'Drama'), (7, 'Title'), (7,)], ids=str)
@pytest.mark.parametrize('name', NAMES)
def test_a_malformed_movie_is_named(name, bad, end, tmp_path):
  lines = [fields(i, 'Title', 'Drama', name=name, movies=True)
           for i in range(1, 21)]
  lines[3] = ''
  lines[16] = fields(*bad, name=name, movies=True)
  write(tmp_path, MOVIES[name], lines, end)
  message = error_of(movielens.read_titles, name, tmp_path)
  assert message.startswith(f'{tmp_path / MOVIES[name]}, line 17: expected ')


@pytest.mark.parametrize('name', NAMES)
def test_a_loaded_set_has_titles_by_catalogue_row(name, tmp_path):
  # User 1 consumed 10, 13, …, user 2 11, 14, …; two movies have a title.
  write(tmp_path, FILE[name], rating_lines(name))
  write(tmp_path, MOVIES[name], [
      fields(i, f'Film {i}', 'Drama', name=name, movies=True)
      for i in (10, 29, 400)])
  loaded = load.load(DataConfig(dataset=name, data_dir=str(tmp_path)), 0)
  assert loaded.integrity == () and loaded.dropped_users == []
  dataset = loaded.dataset
  assert dataset.user_ids.tolist() == [1, 2, 3]
  assert dataset.item_ids.tolist() == [0, *range(10, 30)]
  assert dataset.titles == ('', 'Film 10', *[''] * 18, 'Film 29')
  assert dataset.item_ids[dataset.sequence(0)].tolist() == [
      10, 13, 16, 19, 22, 25, 28]


def test_the_1000_most_active_users_of_the_real_set():
  folder = parity.require(parity.SHARED / 'data' / 'ml-1m')
  dataset = load.load(
      DataConfig(dataset='ml-1m', data_dir=str(folder), top_k_users=1000,
                 visual_features='none', text_features='none'), 0).dataset
  assert dataset.num_clients == 1000
  assert len(dataset.items) == 513_961
  assert dataset.num_items == 3415
  assert dataset.lengths.min() == 292
  assert dataset.lengths.max() == 2276
  assert len(dataset.titles) == dataset.num_rows
  assert all(dataset.titles[1:])
