"""What lines mean: ratings, events, duplicates, repeats, sessions."""

import numpy as np
import pyarrow as pa
import pytest

from fedmmr_jax.config import DataConfig, RunConfig
from fedmmr_jax.data import load, sources
from fedmmr_jax.data.dataset import Dataset
from tests.small import error_of
from tests.test_cases import histories, log, written

HEADER = 'user_id,item_id,timestamp,rating,event'


def read(folder, options, *lines, header=HEADER):
  written(folder / 'log.csv', log(*lines, header=header))
  return sources.read(sources.find(f'auto,{options}', str(folder)))


def noted(found, about):
  return [note for note in found.notes if note.startswith(about)]


def test_low_ratings_are_no_interactions(tmp_path):
  lines = ['1,2,1,5,', '1,3,2,3.5,', '1,4,3,4,', '2,5,1,1,']
  found = read(tmp_path, 'min_rating=4', *lines)
  assert histories(found) == {'1': ['2', '4']}
  assert noted(found, 'ratings') == [
    'ratings    2 of 4 lines are interactions, 2 others are left out'
  ]
  # Without the option a rating is nothing.
  assert histories(read(tmp_path, 'rating=rating', *lines))['2'] == ['5']


def test_dislikes_are_told_apart(tmp_path):
  found = read(
    tmp_path,
    'min_rating=4,dislikes=2',
    *('1,2,1,5,', '1,3,2,3,', '1,4,3,2,', '1,5,4,1.5,'),
  )
  assert found.disliked.tolist() == [False, True, True]
  assert found.item_ids[found.items].tolist() == [2, 4, 5]
  # All that is no dislike is an interaction, where nothing else is said.
  found = read(tmp_path, 'dislikes=2', '1,2,1,5,', '1,3,2,3,', '1,4,3,2,')
  assert found.disliked.tolist() == [False, False, True]


@pytest.mark.parametrize('form', ['ml-1m', 'json', 'parquet', 'headless'])
def test_ratings_of_every_format(tmp_path, form):
  rows = [(1, 2, 5.0, 100), (1, 3, 1.0, 101), (1, 4, 4.0, 102)]
  options = 'min_rating=4'
  if form == 'ml-1m':
    text = ''.join(f'{u}::{i}::{r:.0f}::{t}\n' for u, i, r, t in rows)
    (tmp_path / 'ratings.dat').write_text(text)
  elif form == 'json':
    text = ''.join(
      f'{{"user": "{u}", "item": "{i}", "rating": {r}, "time": {t}}}\n'
      for u, i, r, t in rows
    )
    (tmp_path / 'log.jsonl').write_text(text)
  elif form == 'headless':
    text = ''.join(f'{u},{i},{r},{t}\n' for u, i, r, t in rows)
    (tmp_path / 'log.csv').write_text(text)
  else:
    table = pa.table(dict(zip(('user', 'item', 'rating', 'ts'), zip(*rows))))
    pa.parquet.write_table(table, tmp_path / 'log.parquet')
  found = sources.read(sources.find(f'auto,{options}', str(tmp_path)))
  assert histories(found) == {'1': ['2', '4']}


def test_a_rating_that_is_none_is_named(tmp_path):
  message = error_of(read, tmp_path, 'min_rating=4', '1,2,1,5,', '1,3,2,,')
  assert "the rating '' of interaction 2 is no number" in message
  (tmp_path / 'log.csv').unlink()
  (tmp_path / 'x.txt').write_text('1 2\n1 3\n')
  message = error_of(sources.read, sources.find('auto,min_rating=4', tmp_path))
  assert 'this format has no ratings' in message


@pytest.mark.parametrize(
  'options, fault',
  [
    ('min_rating=2,dislikes=2', 'dislikes is not below min_rating'),
    ('min_rating=good', 'min_rating=good is not a number'),
    ('events=view:0', 'is not a number'),
    ('session_gap=soon', 'session_gap is no duration'),
    ('repeats=twice', 'repeats=twice is unknown'),
    ('stars=3', 'there is no option stars'),
  ],
)
def test_options_are_refused_before_reading(tmp_path, options, fault):
  assert fault in error_of(sources.find, f'auto,{options}', str(tmp_path))


def test_events_that_count_and_how_much(tmp_path):
  lines = ['1,2,1,,view', '1,3,2,,cart', '1,4,3,,buy', '1,5,4,,view']
  found = read(tmp_path, 'events=view|buy', *lines)
  assert histories(found) == {'1': ['2', '4', '5']}
  assert found.weights is None
  found = read(tmp_path, 'events=view:0.2|buy:1', *lines)
  np.testing.assert_allclose(found.weights, [0.2, 1, 0.2])
  assert 'events     2 view × 0.2, 1 buy; 1 others are left out' in found.notes
  message = error_of(read, tmp_path, 'events=purchase', *lines)
  assert (
    "no line has the event 'purchase'; there are view, cart, buy" in message
  )


def test_only_events_that_count_need_a_rating(tmp_path):
  lines = ['1,2,1,,view', '1,3,2,5,rate', '1,4,3,1,rate']
  found = read(tmp_path, 'events=rate,min_rating=3', *lines)
  assert histories(found) == {'1': ['3']}


def test_what_is_trained_on_is_no_repeat_of_a_target(tmp_path):
  header = 'user,item,split'
  lines = ['1,5,2', '1,5,0', '1,6,0', '1,7,2']
  written(tmp_path / 'log.csv', log(*lines, header=header))
  found = sources.read(
    sources.find('auto,repeats=drop', str(tmp_path), given=True)
  )
  assert found.item_ids[found.items].tolist() == [5, 6, 7]
  assert found.parts.tolist() == [0, 0, 2]


def test_duplicates_and_repeats_can_be_dropped(tmp_path):
  lines = ['1,2,9,,', '1,2,3,,', '1,2,3,,', '1,4,5,,', '2,2,3,,']
  found = read(tmp_path, 'duplicates=drop', *lines)
  assert histories(found) == {'1': ['2', '4', '2'], '2': ['2']}
  assert noted(found, 'duplicates') == ['duplicates 1 lines are left out']
  # The first in time stays, not the first of the file.
  found = read(tmp_path, 'repeats=drop', *lines)
  assert histories(found) == {'1': ['2', '4'], '2': ['2']}
  message = error_of(
    read, tmp_path, 'duplicates=drop,time=none', '1,2', header='user,item'
  )
  assert 'no times' in message and 'repeats=drop' in message


def test_a_dislike_is_no_repeat(tmp_path):
  lines = ['1,2,1,1,', '1,2,2,5,', '1,2,3,5,']
  found = read(tmp_path, 'dislikes=2,repeats=drop', *lines)
  assert found.disliked.tolist() == [True, False]


def test_sessions_by_a_gap(tmp_path):
  lines = ['1,5,7210,,', '1,2,0,,', '1,3,1800,,', '1,4,3601,,', '2,2,9,,']
  found = read(tmp_path, 'session_gap=30m', *lines)
  assert histories(found) == {
    '1#1': ['2', '3'],
    '1#2': ['4'],
    '1#3': ['5'],
    '2#1': ['2'],
  }
  assert noted(found, 'sessions') == [
    'sessions   2 users have 4 sessions, which are the clients (1#1 …)'
  ]


def test_dislikes_lie_before_what_is_held_out(tmp_path):
  # User 1 trains on 2, 3, 4 and has 5 and 6 held out, at 40 and 50.
  lines = [f'1,{i},{10 * (i - 1)},5,' for i in range(2, 7)]
  lines += ['1,7,5,1,', '1,8,39,1,', '1,9,40,1,', '1,3,1,1,', '1,10,1,1,']
  # Of the catalogue are only items that somebody had.
  lines += [f'2,{i},{i},5,' for i in (2, 7, 8, 9)]
  written(tmp_path / 'log.csv', log(*lines, header=HEADER))
  dataset = load.load(
    DataConfig(dataset='auto,dislikes=2', data_dir=str(tmp_path)), 0
  ).dataset
  assert dataset.user_ids.tolist() == [1, 2]
  ids = dataset.item_ids[dataset.disliked_by(0)].tolist()
  # Item 9 came with the validation item, 3 was liked later, 10 is nobody's.
  assert ids == [7, 8]
  assert not dataset.disliked_by(1).size
  assert dataset.lengths.tolist() == [5, 4]


def test_with_given_parts_dislikes_are_of_the_training_part(tmp_path):
  lines = [f'1,{i},{i},5,,0' for i in (2, 3, 4)] + ['1,5,9,5,,2']
  lines += [
    '1,6,1,1,,0',
    '1,7,1,1,,2',
    '2,6,1,5,,0',
    '2,7,2,5,,0',
    '2,8,3,5,,2',
  ]
  written(tmp_path / 'log.csv', log(*lines, header=HEADER + ',x_label'))
  config = RunConfig.from_flat_dict(
    dict(dataset='auto,dislikes=2', data_dir=str(tmp_path), split_by='given')
  )
  dataset = load.load(config.data, 0).dataset
  assert dataset.item_ids[dataset.disliked_by(0)].tolist() == [6]


def test_weights_stay_with_their_items(tmp_path):
  lines = ['1,5,40,,b', '1,2,10,,a', '1,3,20,,b', '1,4,30,,a']
  written(tmp_path / 'log.csv', log(*lines, header=HEADER))
  dataset = load.load(
    DataConfig(dataset='auto,events=a:2|b:3', data_dir=str(tmp_path)), 0
  ).dataset
  assert dataset.item_ids[dataset.items].tolist() == [2, 3, 4, 5]
  assert dataset.weights.tolist() == [2, 3, 2, 3]


FRAME = {
  'who': ['a'] * 4,
  'item_id': [3, 1, 2, 9],
  'stars': [5, 4, 5, 1],
  'ts': [3, 1, 2, 4],
}


def test_an_arrow_table():
  dataset = Dataset.of_frame(
    pa.table(FRAME), 'user=who,min_rating=4', titles={1: 'One'}
  )
  assert dataset.item_ids[dataset.items].tolist() == [1, 2, 3]
  assert dataset.titles == ('', 'One', '', '')
  assert 'no table' in error_of(Dataset.of_frame, 7)
  message = error_of(Dataset.of_frame, pa.table(FRAME))
  assert 'data: no column of the users among who, item_id' in message
  message = error_of(Dataset.of_frame, pa.table(FRAME), 'when=ts')
  assert 'there is no option when' in message


@pytest.mark.parametrize('library', ['pandas', 'polars'])
def test_frames(library):
  frame = pytest.importorskip(library).DataFrame(FRAME)
  options = 'user=who,min_rating=4'
  found = Dataset.of_frame(frame, options)
  expected = Dataset.of_frame(pa.table(FRAME), options)
  assert found.fingerprint() == expected.fingerprint()


def test_frames_of_odd_types():
  pandas = pytest.importorskip('pandas')
  frame = pandas.DataFrame(FRAME)
  frame['item_id'] = frame['item_id'].astype('category')
  dataset = Dataset.of_frame(frame, 'user=who')
  assert dataset.item_ids[1:].tolist() == [1, 2, 3, 9]
  table = pa.table({**FRAME, 'item_id': [1.0, 2.0**60, 3.0, 4.0]})
  for options in ('user=who', 'user=who,time=none'):
    message = error_of(Dataset.of_frame, table, options)
    assert 'row 1: item_id is too large to be exact' in message
  table = pa.table({**FRAME, 'stars': [[1]] * 4})
  message = error_of(
    Dataset.of_frame, table, 'user=who,rating=stars,dislikes=2'
  )
  assert 'stars is of type list<' in message
  dates = pa.table(
    {'user': ['a'] * 3, 'item': [1, 2, 3], 'bought': ['2020-01-01'] * 3}
  )
  message = error_of(Dataset.of_frame, dates)
  assert 'bought may hold some' in message
