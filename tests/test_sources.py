"""Which files are read: shards of one table, given splits, folders of other
libraries."""

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from fedmmr_jax.config import DataConfig, RunConfig
from fedmmr_jax.data import items, load, sources, users
from tests.small import error_of
from tests.test_cases import histories, log, written


def read(folder, dataset='auto', given=False):
  return sources.read(sources.find(dataset, str(folder), given=given))


def parquet_of(path, rows):
  path.parent.mkdir(exist_ok=True)
  table = pa.table(dict(zip(('user_id', 'item_id', 'timestamp'), zip(*rows))))
  parquet.write_table(table, path)


LOG = [(user, item, 10 * user + item) for user in (1, 2) for item in (1, 2, 3)]
LOG += [(2, 4, 90)]

# Shards.


def test_shards_are_one_table_in_the_order_of_their_numbers(tmp_path):
  # By name 10 comes before 9.
  for number in range(11):
    text = log(f'1,{number}', header='user_id,item_id')
    written(tmp_path / f'part-{number}.csv', text)
  found = read(tmp_path)
  assert histories(found) == {'1': [str(number) for number in range(11)]}
  assert found.notes[0] == (
    'files      part-0.csv, part-1.csv … part-10.csv: 11 files read as one '
    'table, in this order; if they are not, name one with `data_dir`'
  )


@pytest.mark.parametrize(
  'names',
  [
    ('data/train-00000-of-00002.parquet', 'data/train-00001-of-00002.parquet'),
    (
      'part-00000-2b1c3d4e-1a2b-4c3d-8e9f-0123456789ab-c000.parquet',
      'part-00001-2b1c3d4e-1a2b-4c3d-8e9f-0123456789ab-c000.parquet',
    ),
    ('x-1-of-2.parquet', 'x-2-of-2.parquet'),
  ],
)
def test_shards_of_other_programs(tmp_path, names):
  for number, name in enumerate(names):
    parquet_of(tmp_path / name, [('a', number, 10), ('b', 5, 11)])
  found = read(tmp_path)
  assert histories(found) == {'a': ['0', '1'], 'b': ['5', '5']}


def test_a_missing_shard_is_named(tmp_path):
  for number in (0, 2):
    parquet_of(tmp_path / f'x-0000{number}-of-00003.parquet', [('a', 1, 1)])
  assert '2 of 3 files of one table (x-00000-of-00003' in error_of(
    read, tmp_path
  )
  # Two generations of one table.
  parquet_of(tmp_path / 'x-00001-of-00002.parquet', [('a', 1, 1)])
  assert '3 of 2 or 3 files of one table' in error_of(read, tmp_path)


def test_files_that_differ_in_more_than_numbers_are_no_shards(tmp_path):
  for name in ('clicks.csv', 'buys.csv'):
    written(tmp_path / name, log('1,2,3'))
  assert 'could each be the interactions' in error_of(read, tmp_path)


def test_folders_of_other_sets_are_no_shards(tmp_path):
  for name in ('ml-1m', 'ml-10m'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'ratings.dat').write_text('1::2::5::3\n')
  message = error_of(read, tmp_path)
  assert 'ml-10m/ratings.dat, ml-1m/ratings.dat could each be' in message
  # As Hive names them they are; what is hidden is nobody's.
  for day in (9, 10):
    parquet_of(tmp_path / 'log' / 'x.parquet', [('a', day, day)])
    (tmp_path / 'log').rename(tmp_path / f'day={day}')
  (tmp_path / '.cache').mkdir()
  written(tmp_path / '.cache' / 'y.csv', log('1,2,3'))
  for name in ('ml-1m', 'ml-10m'):
    (tmp_path / name / 'ratings.dat').unlink()
  assert histories(read(tmp_path)) == {'a': ['9', '10']}


def test_what_lies_beside_a_folder_of_one_file_is_found(tmp_path):
  parquet_of(tmp_path / 'data' / 'train-00000-of-00001.parquet', LOG)
  written(tmp_path / 'items.csv', 'item_id,title\n1,One\n2,Two\n')
  matrix = np.arange(10, dtype=np.float32).reshape(5, 2)
  matrix[0] = 0
  np.save(tmp_path / 'text_features.npy', matrix)
  found = load.load(DataConfig(dataset='auto', data_dir=str(tmp_path)), 0)
  assert found.dataset.name == tmp_path.name
  assert found.dataset.titles == ('', 'One', 'Two', '', '')
  assert found.dataset.features['text'][:, 0].tolist() == [0, 2, 4, 6, 8]


def test_shards_must_agree(tmp_path):
  written(tmp_path / 'x-1.csv', log('1,2,3'))
  written(tmp_path / 'x-2.csv', log('a,2,3'))
  assert 'all user ids are whole numbers, in' in error_of(read, tmp_path)
  written(tmp_path / 'x-2.csv', log('1,4', header='user_id,item_id'))
  message = error_of(read, tmp_path)
  assert 'x-2.csv: no times, but' in message and 'x-1.csv has some' in message
  written(tmp_path / 'x-2.csv', log('1,4,3', header='uid,item_id,timestamp'))
  assert 'x-2.csv: columns uid = users, item_id' in error_of(read, tmp_path)
  # Which column is whose is not decided for each file alone.
  for old in tmp_path.iterdir():
    old.unlink()
  written(tmp_path / 'r_0.csv', 'B000000001,u1,5.0,1\nB000000002,u1,5.0,2\n')
  written(tmp_path / 'r_1.csv', 'x1,u1,5.0,1\nx2,u1,5.0,2\n')
  assert 'r_1.csv: columns 1 = users, 2 = items' in error_of(read, tmp_path)


# Folders of other libraries.


def test_what_datasets_saves(tmp_path):
  table = pa.table({'user_id': ['u', 'u'], 'item_id': [1, 2], 'ts': [2, 1]})
  (tmp_path / 'train').mkdir()
  with pa.ipc.new_stream(
    tmp_path / 'train' / 'data-00000-of-00001.arrow', table.schema
  ) as out:
    out.write_table(table)
  (tmp_path / 'dataset_dict.json').write_text('{"splits": ["train"]}')
  (tmp_path / 'train' / 'state.json').write_text('{}')
  (tmp_path / 'train' / 'dataset_info.json').write_text('{}')
  found = read(tmp_path)
  assert histories(found) == {'u': ['2', '1']}
  # Arrow's files, as Feather calls them.
  with pa.ipc.new_file(tmp_path / 'x.feather', table.schema) as out:
    out.write_table(table)
  assert histories(read(tmp_path / 'x.feather')) == {'u': ['2', '1']}
  (tmp_path / 'x.feather').write_bytes(b'no such thing')
  assert 'not a readable Arrow file' in error_of(read, tmp_path / 'x.feather')


MIND = (
  '1\tU7\t11/15/2019 1:05:00 PM\tN3 N1\tN5-1 N6-0\n'
  '2\tU7\t11/15/2019 8:55:22 AM\tN3 N1\tN2-1\n'
  '3\tU8\t11/14/2019 12:00:00 PM\t\tN5-1 N3-0\n'
)


def test_mind(tmp_path):
  written(tmp_path / 'behaviors.tsv', MIND)
  written(
    tmp_path / 'news.tsv',
    'N3\tnews\tworld\tA "quoted title\tAn abstract.\thttp://x\t[]\t[]\n'
    'N5\tsports\tsports\tAnother\t\thttp://x\t[]\t[]\n',
  )
  found = read(tmp_path)
  # Earlier clicks once, then by time; what was only shown is no interaction.
  assert histories(found) == {'U7': ['N3', 'N1', 'N2', 'N5'], 'U8': ['N5']}
  assert 'columns    3 clicks, and 2 earlier ones' in found.notes[0]
  about = dict(items.read(tmp_path / 'news.tsv'))
  assert about['N3'].text == (
    'A "quoted title. Genres: news, world. An abstract.'
  )
  assert about['N5'].genres == ('sports',)
  for bad, told in (
    (MIND.replace('N5-1 N6-0', 'N5'), "line 1: 'N5' is no news with -0 or -1"),
    (MIND + '4\tU1\tnow\t\t\n', "line 4: 'now' is no time"),
    (MIND + '4\tU1\n', 'line 4: 2 fields instead of 5'),
  ):
    written(tmp_path / 'behaviors.tsv', bad)
    assert told in error_of(read, tmp_path)


def test_several_files_of_mind_are_refused(tmp_path):
  # The histories of one part would be targets of another.
  for part in ('train', 'dev', 'test'):
    (tmp_path / f'MIND_{part}').mkdir()
    written(tmp_path / f'MIND_{part}' / 'behaviors.tsv', MIND)
  assert 'of MIND each hold the histories' in error_of(
    sources.find, 'auto', str(tmp_path), given=True
  )


def test_yelp(tmp_path):
  written(
    tmp_path / 'yelp_academic_dataset_review.json',
    '{"review_id": "r", "user_id": "-u", "business_id": "b1", "stars": 4.0,'
    ' "date": "2018-07-07 22:09:11", "text": "x"}\n'
    '{"review_id": "s", "user_id": "-u", "business_id": "b0", "stars": 1.0,'
    ' "date": "2017-07-07 22:09:11", "text": "x"}\n',
  )
  for other in ('business', 'user', 'tip', 'checkin'):
    written(
      tmp_path / f'yelp_academic_dataset_{other}.json',
      '{"business_id": "b1", "user_id": "-u", "name": "Café", '
      '"categories": "Coffee, Tea", "date": "2018-01-01 00:00:00"}\n',
    )
  source = sources.find('auto', str(tmp_path))
  assert histories(sources.read(source)) == {'-u': ['b0', 'b1']}
  found = dict(items.read(items.find(source, '')))
  assert found['b1'].text == 'Café. Genres: Coffee, Tea.'


# Given splits.


def split_files(folder, names, contents):
  for name, lines in zip(names, contents):
    (folder / name).parent.mkdir(exist_ok=True)
    text = '\n'.join(('user_id:token\titem_id:token\ttimestamp:float', *lines))
    written(folder / name, text + '\n')


PARTS = (
  # User 3 is in no training part.
  ('1\t1\t1', '1\t2\t2', '1\t3\t3', '2\t1\t1', '2\t9\t2'),
  ('1\t4\t4', '3\t1\t1'),
  ('1\t5\t5', '1\t6\t6', '2\t6\t3', '3\t2\t2', '3\t5\t3'),
)
NAMES = ('x.train.inter', 'x.valid.inter', 'x.test.inter')


def loaded(folder, **more):
  given = dict(dataset='auto', data_dir=str(folder), split_by='given')
  return load.load(RunConfig.from_flat_dict(given | more).data, 0)


def targets(dataset, test):
  return [
    (
      int(dataset.user_ids[k]),
      int(dataset.item_ids[dataset.sequence(k)][n + a]),
    )
    for k, a in zip(*dataset.targets(test))
    for n in [dataset.num_train[k]]
  ]


@pytest.mark.parametrize('by', ['files', 'column', 'words'])
def test_a_given_split_is_kept(tmp_path, by):
  if by == 'files':
    split_files(tmp_path, NAMES, PARTS)
  else:
    words = '012' if by == 'column' else ('train', 'val', 'test')
    lines = [
      line + '\t' + word for part, word in zip(PARTS, words) for line in part
    ]
    # The order of the file tells nothing.
    text = '\n'.join(('userID\titemID\ttimestamp\tx_label', *lines[::-1]))
    written(tmp_path / 'x.inter', text)
  found = loaded(tmp_path)
  dataset = found.dataset
  assert dataset.user_ids.tolist() == [1, 2, 3]
  assert dataset.num_train.tolist() == [3, 2, 0]
  assert dataset.num_validation.tolist() == [1, 0, 1]
  # User 3's first item has nothing before it.
  assert targets(dataset, test=False) == [(1, 4)]
  assert targets(dataset, test=True) == [(1, 5), (1, 6), (2, 6), (3, 2), (3, 5)]
  assert any('1 users are in no training part (3)' in n for n in found.notes)
  assert any('5 train, 2 validation, 5 test' in n for n in found.notes)


def test_a_split_without_validation_takes_the_last_training_items(tmp_path):
  (tmp_path / 'train.txt').write_text('1 1 2 3\n2 1\n')
  (tmp_path / 'test.txt').write_text('1 5 6\n2 6\n3\n')
  (tmp_path / 'user_list.txt').write_text('org_id remap_id\nx 1\n')
  found = loaded(tmp_path)
  dataset = found.dataset
  assert dataset.num_train.tolist() == [2, 1]
  assert targets(dataset, test=False) == [(1, 3)]
  assert targets(dataset, test=True) == [(1, 5), (1, 6), (2, 6)]
  assert any('last training item is its validation' in n for n in found.notes)


def test_filters_leave_what_validation_is(tmp_path):
  lines = [f'1\t{i}\t{i}\t0' for i in range(1, 8)] + ['1\t8\t9\t2']
  lines += ['2\t1\t1\t0', '2\t9\t2\t1', '2\t2\t3\t2', '3\t10\t1\t0']
  text = '\n'.join(('user_id\titem_id\ttimestamp\tsplit', *lines))
  written(tmp_path / 'x.inter', text + '\n')
  assert loaded(tmp_path).dataset.num_train.tolist() == [7, 1]
  # Without user 2 nothing is for validation, and nothing is cut for it.
  one = loaded(tmp_path, top_k_users=1).dataset
  assert one.num_train.tolist() == [7]
  assert one.num_validation.tolist() == [0]


@pytest.mark.parametrize('k_core', [0, 3])
def test_a_core_counts_in_a_given_split_too(tmp_path, k_core):
  lines = [
    f'{user}\t{1 + (user + n) % 5}\t{n}\t{2 * (n == 4)}'
    for user in range(1, 6)
    for n in range(5)
  ]
  lines += ['6\t1\t1\t0', '6\t2\t2\t2']
  text = '\n'.join(('user_id\titem_id\ttimestamp\tsplit', *lines))
  written(tmp_path / 'x.inter', text + '\n7\t9\t1\t0\n')
  lengths = loaded(tmp_path, k_core=k_core).dataset.lengths
  assert lengths.min() == (5 if k_core else 2)


def test_a_column_of_parts_needs_a_test(tmp_path):
  lines = ['1\t1\t1\t0', '1\t2\t2\t0', '1\t3\t3\t1']
  text = '\n'.join(('user_id\titem_id\ttimestamp\tsplit', *lines))
  written(tmp_path / 'x.inter', text + '\n')
  assert 'no line is of the test part (test, or 2); the column has 0, 1' in (
    error_of(loaded, tmp_path)
  )


def test_items_of_a_given_split_are_those_of_all_parts(tmp_path):
  split_files(tmp_path, NAMES, PARTS)
  table = load.read_items(DataConfig(dataset='auto', data_dir=str(tmp_path)))
  assert table.ids.tolist() == [1, 2, 3, 4, 5, 6, 9]


def test_targets_from_the_past_are_told(tmp_path):
  early = (PARTS[0], PARTS[1], ('1\t5\t0', *PARTS[2][1:]))
  split_files(tmp_path, NAMES, early)
  assert any(
    '14.3% of the targets are earlier than a training item' in note
    for note in loaded(tmp_path).notes
  )


def test_what_a_given_split_needs(tmp_path):
  split_files(tmp_path, NAMES[:2], PARTS[:2])
  assert 'needs files named train and test' in error_of(loaded, tmp_path)
  (tmp_path / NAMES[0]).unlink()
  (tmp_path / NAMES[1]).rename(tmp_path / 'x.inter')
  message = error_of(loaded, tmp_path)
  assert 'no column of the parts among' in message
  assert '`dataset=auto,part=…`' in message
  message = error_of(loaded, tmp_path, dataset='auto,part=timestamp')
  assert "'4' in the column of the parts is none of" in message
  message = error_of(
    sources.find, 'auto,part=timestamp', str(tmp_path / 'x.inter')
  )
  assert 'part is read with `split_by=given`' in message


def test_a_format_without_parts_has_no_given_split(tmp_path):
  (tmp_path / 'ratings.dat').write_text('1::2::5::3\n')
  message = error_of(loaded, tmp_path)
  assert '`split_by=given` needs files named train and test, or a' in message


def test_shards_within_a_given_split(tmp_path):
  for part, rows in (
    ('train-00000-of-00002', [('a', 1, 1)]),
    ('train-00001-of-00002', [('a', 2, 2)]),
    ('test-00000-of-00001', [('a', 3, 3)]),
  ):
    parquet_of(tmp_path / 'data' / f'{part}.parquet', rows)
  found = loaded(tmp_path)
  assert found.dataset.num_train.tolist() == [1]
  assert found.dataset.name == tmp_path.name
  text = '\n'.join(found.notes)
  assert 'data/train-00000-of-00002.parquet' in text


# What users are.


@pytest.mark.parametrize(
  'name, text',
  [
    ('users.dat', '1::F::25::10::48067\n2::M::35::3::1\n'),
    ('u.user', '1|25|F|writer|48067\n2|35|M|artist|1\n'),
    ('x.user', 'user_id:token\tage:token\tgender:token\n1\t25\tF\n2\t35\tM\n'),
    ('people.csv', 'age,id,gender\n25,1,F\n35,2.0,M\n'),
  ],
)
def test_attributes_of_users(tmp_path, name, text):
  found = users.read(written(tmp_path / name, text))
  assert found['gender'] == {'1': 'F', '2': 'M'}
  assert found['age'] == {'1': '25', '2': '35'}


def test_attributes_need_a_column_of_users(tmp_path):
  path = written(tmp_path / 'people.csv', 'age,sex\n1,F\n')
  assert 'no column of the users among age, sex' in error_of(users.read, path)
  path = written(tmp_path / 'people.csv', 'user_id,sex\n1,F,3\n')
  assert 'line 2: 3 fields instead of 2' in error_of(users.read, path)
  assert 'no such file' in error_of(users.read, tmp_path / 'none.csv')
