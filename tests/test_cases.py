"""What people's files do: cases met in the trackers of other projects, and
random logs in random dialects, which are read right or refused."""

import bz2
import csv
import dataclasses
import datetime
import gzip
import io
import lzma
import re
import zipfile

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st
from pyarrow import parquet

from fedmmr_jax.config import DataConfig
from fedmmr_jax.data import items, load, sources, text_files
from fedmmr_jax.errors import UserError
from tests.small import error_of


def read(folder, dataset='auto'):
  return sources.read(sources.find(dataset, str(folder)))


def histories(found):
  """User id -> item ids in time order, all as text."""
  times = np.zeros(len(found.users)) if found.times is None else found.times
  order = np.lexsort((np.arange(len(times)), times))
  own: dict[str, list[str]] = {}
  for n in order:
    user = str(found.user_ids[found.users[n]])
    own.setdefault(user, []).append(str(found.item_ids[found.items[n]]))
  return own


def written(path, text, encoding='utf-8'):
  path.write_bytes(text.encode(encoding))
  return path


def log(*lines, header='user_id,item_id,timestamp'):
  return '\n'.join((header, *lines)) + '\n'


# Ids.


def test_whole_floats_are_whole_numbers(tmp_path):
  lines = (f'{u}.0,{i}.0,{i}' for u in range(1, 4) for i in (2, 10, 12))
  found = read(written(tmp_path / 'log.csv', log(*lines)))
  assert found.user_ids.tolist() == [1, 2, 3]
  assert found.item_ids.tolist() == [2, 10, 12]
  table = pa.table({'user_id': [1.0, 2.0], 'item_id': [12.0, 2.0]})
  parquet.write_table(table, tmp_path / 'log.parquet')
  assert read(tmp_path / 'log.parquet').item_ids.tolist() == [2, 12]


def some_text_ids(folder, end=''):
  """12 items of whole numbers but one, and a matrix whose row i says i."""
  names = [*(f'{i}{end}' for i in range(1, 12)), '012']
  lines = (f'{u},{i},{n}' for u in range(1, 6) for n, i in enumerate(names))
  written(folder / 'log.csv', log(*lines))
  return DataConfig(dataset='auto', data_dir=str(folder))


@pytest.mark.parametrize('end', ['', '.0'])
def test_one_id_that_makes_text_of_all_is_named(tmp_path, end):
  loaded = load.load(some_text_ids(tmp_path, end), 0)
  assert (
    "items      1 of 12 ids are not whole numbers ('012'): all are read as "
    'texts' in loaded.notes
  )


def test_rows_in_the_order_of_texts_are_refused(tmp_path):
  config = some_text_ids(tmp_path)
  matrix = np.arange(26, dtype=np.float32).reshape(13, 2) * (
    np.arange(13)[:, None] > 0
  )
  np.save(tmp_path / 'text_features.npy', matrix)
  with pytest.raises(UserError, match="which row is whose.*'012'"):
    load.load(config, 0)
  # In the order of texts, 1 comes after 012, and 10 before 2.
  path = str(tmp_path / 'text_features.npy')
  named = dataclasses.replace(config, text_features=path)
  dataset = load.load(named, 0).dataset
  assert dataset.item_ids.tolist()[1:4] == ['012', '1', '10']
  assert dataset.features['text'][1:4, 0].tolist() == [2, 4, 6]


def test_titles_of_items_written_as_floats(tmp_path):
  lines = (f'{u}.0,{i}.0,{i}' for u in range(1, 4) for i in range(1, 6))
  written(tmp_path / 'log.csv', log(*lines))
  written(tmp_path / 'items.csv', 'item_id,title\n2.0,Two\n3,Three\n')
  config = DataConfig(dataset='auto', data_dir=str(tmp_path))
  assert load.load(config, 0).dataset.titles[2:4] == ('Two', 'Three')


# Times.


@pytest.mark.parametrize(
  'name', ['created_at', 't_dat', 'event_time', 'date_added', 'reviewTime']
)
def test_a_time_of_another_name_is_not_passed_over(tmp_path, name):
  lines = [f'1,{i},2020-01-{9 - i:02}' for i in range(1, 5)]
  path = written(
    tmp_path / 'log.csv', log(*lines, header=f'user_id,item_id,{name}')
  )
  message = error_of(read, path)
  assert f'but {name} may hold some; say `dataset=auto,time={name}`' in message
  assert histories(read(path, f'auto,time={name}')) == {
    '1': ['4', '3', '2', '1']
  }
  assert read(path, 'auto,time=none').times is None


def test_dates_in_any_column_may_be_times(tmp_path):
  path = written(
    tmp_path / 'log.csv', log('1,2,2020-01-01', header='user,item,x')
  )
  assert 'but x may hold some' in error_of(read, path)
  path = written(
    tmp_path / 'log.csv', log('1,2,3', header='user,item,candidate')
  )
  assert read(path).times is None


@pytest.mark.parametrize(
  'times',
  [
    pa.array(['2020-01-03', '2020-01-02', '2020-01-01'], pa.large_string()),
    pa.array([f'2020-01-0{d}T00:00:00Z' for d in (3, 2, 1)]),
    pa.array(['2020-01-03', '2020-01-02', '2020-01-01']).dictionary_encode(),
    pa.array(
      [1577836800_123456789 + d * 86400_000000000 for d in (2, 1, 0)],
      pa.timestamp('ns'),
    ),
  ],
  ids=['large strings', 'with zone', 'categories', 'nanoseconds'],
)
def test_times_of_parquet_are_read_as_in_csv(tmp_path, times):
  table = pa.table({'user_id': ['a'] * 3, 'item_id': [1, 2, 3], 'time': times})
  parquet.write_table(table, tmp_path / 'x.parquet')
  found = read(tmp_path / 'x.parquet')
  assert histories(found) == {'a': ['3', '2', '1']}
  assert found.times[2] == pytest.approx(1577836800, abs=1)


def test_what_parquet_cannot_be_read_for_is_named(tmp_path):
  path = tmp_path / 'x.parquet'
  for columns, message in (
    ({'time': ['2020-01-01', 'soon']}, "row 1: time is neither .*: 'soon'"),
    ({'item_id': ['a', ' ']}, "row 1: item_id is empty: ' '"),
  ):
    table = {'user_id': [1, 2], 'item_id': ['a', 'b'], 'time': [1, 2]} | columns
    parquet.write_table(pa.table(table), path)
    with pytest.raises(UserError, match=message):
      read(path)


@pytest.mark.parametrize(
  'times, told',
  [
    ('1600000000 1600086400', 'numbers of seconds'),
    ('1600000000000 1600086400000', 'numbers of milliseconds'),
    ('1600000000000000000 1600086400000000000', 'numbers of nanoseconds'),
    ('2020-09-13 2020-09-14T12:26:40Z', 'dates'),
  ],
)
@pytest.mark.parametrize('end', ['csv', 'parquet'])
def test_span_and_unit_of_times_are_said(tmp_path, times, told, end):
  first, last = times.split()
  lines = [f'1,{i},{t}' for i, t in enumerate((first, last, last, first))]
  path = written(tmp_path / 'log.csv', log(*lines))
  if end == 'parquet':
    users, items_, column = zip(*(line.split(',') for line in lines))
    table = pa.table({'user': users, 'item': items_, 'time': column})
    parquet.write_table(table, tmp_path / 'log.parquet')
    path.unlink()
  config = DataConfig(dataset='auto', data_dir=str(tmp_path))
  assert f'time       2020-09-13 to 2020-09-14, from {told}' in (
    load.load(config, 0).notes
  )


def test_a_few_times_in_another_unit_are_counted(tmp_path):
  lines = [f'1,{i},{10**9 + i}' for i in range(5)]
  written(tmp_path / 'log.csv', log(*lines, '2,1,7', '2,2,8', '2,3,9'))
  config = DataConfig(dataset='auto', data_dir=str(tmp_path))
  notes = load.load(config, 0).notes
  assert any(note.startswith('time       3 interactions lie') for note in notes)
  written(tmp_path / 'log.csv', log(*(f'1,{i},{i}' for i in range(5))))
  notes = load.load(config, 0).notes
  assert not any('interactions lie' in note for note in notes)


# Columns without names.


def test_users_of_ten_digits_are_no_products(tmp_path):
  path = written(
    tmp_path / 'calls.csv',
    '5551234567,17,1,1600000000\n5551234568,18,1,1600000001\n'
    '5551234567,19,1,1600000002\n',
  )
  found = read(path)
  assert histories(found)['5551234567'] == ['17', '19']
  assert 'dataset=amazon-ratings,user=2,item=1,time=4`' in found.notes[0]
  found = read(path, 'amazon-ratings,user=2,item=1,time=4')
  assert found.user_ids.tolist() == [17, 18, 19]


def test_products_are_told_by_their_form(tmp_path):
  path = tmp_path / 'ratings.csv'
  for first, item in (('B000000001', 0), ('0306406152', 0), ('0306406153', 1)):
    written(path, f'{first},A1,5.0,100\n{first},A2,4.0,101\n')
    found = read(path)
    ids = (found.item_ids, found.user_ids)[item]
    assert [str(i).zfill(10) for i in ids.tolist()] == [first]


def test_a_broken_first_line_is_no_header(tmp_path):
  path = written(tmp_path / 'x.csv', 'B000000001,A1,5,3x\nB000000001,A2,5,4\n')
  assert ', line 1: 4 is neither a number' in error_of(
    read, path, 'amazon-ratings'
  )


def test_columns_by_position(tmp_path):
  path = written(tmp_path / 'log.csv', '3;9;a\n1;8;a\n')
  found = read(path, 'csv,user=3,item=2,time=1')
  assert histories(found) == {'a': ['8', '9']}
  assert 'first line is an interaction' in found.notes[0]
  written(path, 'when;what;who\n3;9;a\n1;8;a\n')
  found = read(path, 'csv,user=3,item=2,time=1')
  assert histories(found) == {'a': ['8', '9']}
  assert 'first line is a header' in found.notes[0]
  assert 'no column 7' in error_of(read, path, 'csv,user=3,item=7')


def test_dates_without_a_header_may_be_times(tmp_path):
  lines = ['1,2,2020-01-01', '1,3,2020-01-02', '1,4,2020-01-03']
  written(tmp_path / 'log.csv', '\n'.join(lines) + '\n')
  message = error_of(read, tmp_path, 'csv,user=1,item=2')
  assert '3 may hold some; say `dataset=auto,time=3`' in message
  assert histories(read(tmp_path, 'csv,user=1,item=2,time=3')) == {
    '1': ['2', '3', '4']
  }


def test_which_column_is_whose_is_said(tmp_path):
  path = written(tmp_path / 'log.csv', log('1,2,3'))
  assert read(path).notes == (
    'columns    user_id = users, item_id = items, timestamp = times',
  )


# Texts.


def test_movies_in_utf_8_and_in_latin_1(tmp_path):
  path = tmp_path / 'movies.dat'
  for encoding in ('utf-8', 'latin-1'):
    written(path, '2::Café (2000)::Drama\n', encoding)
    assert dict(items.read(path))['2'].title == 'Café (2000)'


def test_no_genre_is_none_and_markup_is_no_text(tmp_path):
  path = written(
    tmp_path / 'movies.csv',
    'movieId,title,genres\n2,A,(no genres listed)\n'
    '3,<b>Salt</b> &amp; Pepper <3,Fun &amp; Games|Art\n',
  )
  found = dict(items.read(path))
  assert found['2'].text == 'A.'
  assert found['3'].title == 'Salt & Pepper <3'
  assert found['3'].genres == ('Fun & Games', 'Art')


def test_a_quoted_text_may_go_over_lines(tmp_path):
  path = written(
    tmp_path / 'log.csv',
    'user_id,item_id,timestamp,review\n1,2,100,"nice\n\ntwo, lines"\n'
    '1,3,90,"a ""quote"""\n',
  )
  assert histories(read(path)) == {'1': ['3', '2']}
  written(path, 'user_id,item_id,timestamp,review\n1,2,100,"a\nb"\n1,,3,c\n')
  assert ', line 4: item_id is empty' in error_of(read, path)


def test_quotes_between_tabs_that_do_not_pair_are_text(tmp_path):
  path = written(
    tmp_path / 'items.tsv', 'item_id\ttitle\n3\t"Best" of\n4\t"All"\n'
  )
  assert [i.title for _, i in items.read(path)] == ['"Best" of', '"All"']
  written(path, 'item_id\ttitle\n3\t"Best\tof"\n')
  assert [i.title for _, i in items.read(path)] == ['Best\tof']


def test_python_literals_are_read_as_json_is(tmp_path):
  path = written(
    tmp_path / 'steam_reviews.json',
    "{u'username': u'Chaos', u'product_id': u'725280', u'date': u'2017-12-17'}"
    "\n{u'username': u'Chaos', u'product_id': u'5', u'date': u'2017-12-16'}\n",
  )
  assert histories(read(path)) == {'Chaos': ['5', '725280']}
  written(path, "{'user': '" + 'x' * text_files.MAX_LITERAL + "', 'item': 1}\n")
  assert 'not a JSON object' in error_of(read, path)


# Separators, encodings, archives.


@pytest.mark.parametrize('separator', [',', '\t', '   '])
def test_recbole_with_any_separator(tmp_path, separator):
  lines = (
    ('user_id:token', 'item_id:token', 'timestamp:float'),
    ('1', '2', '9'),
    ('1', '3', '8'),
  )
  text = '\n'.join(map(separator.join, lines)) + '\n'
  path = written(tmp_path / 'x.inter', text)
  assert histories(read(path)) == {'1': ['3', '2']}


def test_the_line_of_excel(tmp_path):
  path = written(tmp_path / 'log.csv', 'sep=;\nuser;item;time\n1;2;9\n1;3;8\n')
  assert histories(read(path)) == {'1': ['3', '2']}


def test_utf_16_is_named(tmp_path):
  path = written(tmp_path / 'log.csv', log('1,2,3'), 'utf-16')
  assert 'in UTF-16' in error_of(read, path)
  path.write_bytes(b'1\0,\0')
  assert 'not a text file' in error_of(read, path)


def zipped(*contents):
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as archive:
    for number, content in enumerate(contents):
      archive.writestr(f'{number}.csv', content)
  return file.getvalue()


COMPRESSIONS = {
  '.gz': gzip.compress,
  '.bz2': bz2.compress,
  '.xz': lzma.compress,
  '.zst': lambda text: pa.compress(text, 'zstd', asbytes=True),
  '.zip': zipped,
}


@pytest.mark.parametrize('end', COMPRESSIONS)
def test_compressed_whatever_the_name(tmp_path, end):
  content = COMPRESSIONS[end](log('1,2,9', '1,3,8').encode())
  for name in (f'LOG.CSV{end}', 'log.csv'):
    (tmp_path / name).write_bytes(content)
    assert histories(read(tmp_path / name)) == {'1': ['3', '2']}
  (tmp_path / 'log.csv').unlink()
  assert histories(read(tmp_path)) == {'1': ['3', '2']}


def test_an_archive_of_several_files_is_named(tmp_path):
  (tmp_path / 'a.csv').write_bytes(zipped(b'x', b'y'))
  assert 'a zip archive of 2 files; unpack it' in error_of(
    read, tmp_path / 'a.csv'
  )


@pytest.mark.parametrize('end', ['.gz', '.bz2', '.xz', '.zst'])
def test_what_unpacks_to_far_more_is_refused(tmp_path, monkeypatch, end):
  monkeypatch.setattr(text_files, '_ALWAYS_ALLOWED', 10_000)
  content = COMPRESSIONS[end](b'user,item\n' + b'1,2\n' * 1_000_000)
  path = tmp_path / f'log.csv{end}'
  path.write_bytes(content)
  monkeypatch.setattr(
    text_files, '_MAX_EXPANSION', 2_000_000 // len(content) or 1
  )
  assert 'times its size' in error_of(read, path)


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(text_files, 'MAX_LINE', 100)
  path = written(tmp_path / 'log.csv', log('1,2,x' + 'x' * 200))
  assert ', line 2: longer than' in error_of(read, path)


def test_names_in_capitals(tmp_path):
  written(tmp_path / 'RATINGS.DAT', '1::2::5::3\n1::3::5::2\n')
  assert histories(read(tmp_path)) == {'1': ['3', '2']}


@pytest.mark.parametrize(
  'names',
  [
    ('x.train.inter', 'x.valid.inter', 'x.test.inter'),
    ('train.txt', 'test.txt'),
  ],
)
def test_own_splits_are_told_from_whole_sets(tmp_path, names):
  for name in names:
    written(tmp_path / name, 'user_id:token\titem_id:token\n1\t2\n')
  assert 'look like training, validation and test' in error_of(read, tmp_path)


# Features.


def mmrec(folder, name, label=False):
  lines = (
    f'{u}\t{i}\t5\t{i}' + '\t0' * label for u in range(3) for i in range(12 - u)
  )
  header = 'userID\titemID\trating\ttimestamp' + '\tx_label' * label
  written(folder / 'baby.inter', log(*lines, header=header))
  np.save(folder / name, np.arange(1, 25, dtype=np.float32).reshape(12, 2))
  return load.load(DataConfig(dataset='auto', data_dir=str(folder)), 0)


def test_matrices_that_are_not_used_are_named(tmp_path):
  loaded = mmrec(tmp_path, 'text_feat.npy')
  assert 'text_feat.npy beside it: not used' in '\n'.join(loaded.notes)
  assert not loaded.dataset.features


def test_matrices_of_mmrec_are_found(tmp_path):
  dataset = mmrec(tmp_path, 'text_feat.npy', label=True).dataset
  ids = dataset.item_ids[1:]
  assert dataset.features['text'][1:, 0].tolist() == (1 + 2 * ids).tolist()


def test_a_matrix_of_items_from_0_needs_no_padding_row(tmp_path):
  dataset = mmrec(tmp_path, 'text_features.npy').dataset
  ids = dataset.item_ids[1:]
  assert dataset.features['text'][1:, 0].tolist() == (1 + 2 * ids).tolist()
  assert not dataset.features['text'][0].any()


# Users.


def test_who_has_consumed_everything_is_left_out(tmp_path):
  lines = [f'1,{i},{i}' for i in range(1, 13)]
  lines += [f'2,{i},{i}' for i in range(1, 9)]
  written(tmp_path / 'log.csv', log(*lines))
  loaded = load.load(DataConfig(dataset='auto', data_dir=str(tmp_path)), 0)
  # User 2 then has consumed all that is left of the catalogue.
  assert loaded.dataset.user_ids.tolist() == [1, 2]
  written(tmp_path / 'log.csv', log(*lines, '3,7,1', '3,13,2', '3,14,3'))
  loaded = load.load(DataConfig(dataset='auto', data_dir=str(tmp_path)), 0)
  assert loaded.dataset.user_ids.tolist() == [1, 2, 3]
  more = (f'4,{i},{i}' for i in range(1, 15))
  written(tmp_path / 'log.csv', log(*lines, *more, '3,7,1', '3,13,2', '3,14,3'))
  loaded = load.load(DataConfig(dataset='auto', data_dir=str(tmp_path)), 0)
  assert loaded.dataset.user_ids.tolist() == [1, 2, 3]
  assert 'users      1 have consumed every item (4)' in '\n'.join(loaded.notes)


def test_duplicates_and_repeats_are_counted(tmp_path):
  lines = ['1,2,3'] * 3 + ['1,4,5', '1,2,9', '2,4,1', '2,5,1', '2,6,1']
  written(tmp_path / 'log.csv', log(*lines))
  notes = load.load(DataConfig(dataset='auto', data_dir=str(tmp_path)), 0).notes
  assert any(note.startswith('duplicates 2 interactions') for note in notes)
  assert any(note.startswith('repeats    37.5%') for note in notes)


# Random logs in random dialects.

_PLAIN = st.text('abcdeXYZ0123456789', min_size=1, max_size=6)
_ID_STYLES = {
  'whole': st.integers(0, 10**6).map(str),
  'signed': st.integers(-50, 50).map(str),
  'floats': st.integers(0, 500).map(lambda i: f'{i}.0'),
  'padded': st.integers(0, 500).map(lambda i: f'{i:04}'),
  'words': _PLAIN,
  'any': st.text(
    st.characters(codec='utf-8', exclude_categories=('C', 'Z')),
    min_size=1,
    max_size=5,
  ),
  'spaced': st.tuples(_PLAIN, _PLAIN).map(' '.join),
}
_UTC = datetime.timezone.utc


def _iso(time, end=''):
  return (
    datetime.datetime.fromtimestamp(time, _UTC).strftime('%Y-%m-%dT%H:%M:%S')
    + end
  )


_TIME_STYLES = {
  'seconds': str,
  'milliseconds': lambda t: str(t * 1000),
  'nanoseconds': lambda t: str(t * 10**9),
  'float': lambda t: f'{t}.5',
  'iso': _iso,
  'iso with zone': lambda t: _iso(t, 'Z'),
  'iso with offset': lambda t: _iso(t + 7200, '+02:00'),
  'blank': lambda t: _iso(t).replace('T', ' '),
}
_HEADERS = [
  ('user_id', 'item_id', 'timestamp'),
  ('User', 'Item', 'Time'),
  ('userId', 'movieId', 'timestamp'),
  ('uid', 'iid', 'created_at'),
  ('reviewerID', 'asin', 'unixReviewTime'),
]


def _is_latin_1_alone(text):
  """Whether its bytes are no UTF-8 too, which nobody could tell apart."""
  try:
    text.encode('latin-1').decode('utf-8')
    return text.isascii()
  except UnicodeEncodeError:
    return False
  except UnicodeDecodeError:
    return True


@st.composite
def dialects(draw):
  """(Bytes of each file of a table, its `dataset`, the histories it holds)."""
  ids = [
    draw(st.lists(draw(st.sampled_from(list(_ID_STYLES.values()))), **size))
    for size in (
      dict(min_size=1, max_size=4, unique=True),
      dict(min_size=1, max_size=9, unique=True),
    )
  ]
  rows = draw(
    st.lists(
      st.tuples(
        st.sampled_from(ids[0]),
        st.sampled_from(ids[1]),
        st.integers(10**9, 10**9 + 20),
      ),
      min_size=1,
      max_size=20,
    )
  )
  header = draw(st.sampled_from(_HEADERS))
  style = draw(st.sampled_from(['none', *_TIME_STYLES]))
  separator = draw(st.sampled_from(',;\t|'))
  place = draw(st.permutations(range(4)))
  quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
  remark = draw(st.sampled_from(['x', '4.5', 'a "quote"', 'two\nlines', 'a;b']))
  end_of_line = draw(st.sampled_from(['\n', '\r\n']))
  timed = style != 'none'

  def text_of(rows):
    text = io.StringIO()
    out = csv.writer(
      text, delimiter=separator, quoting=quoting, lineterminator=end_of_line
    )

    def write(user, item, time, other):
      fields = [(user, item, time, other)[i] for i in place]
      out.writerow([f for f in fields if f is not None])

    write(header[0], header[1], header[2] if timed else None, 'remark')
    for user, item, time in rows:
      write(user, item, _TIME_STYLES[style](time) if timed else None, remark)
    return text.getvalue()

  shards = draw(st.integers(1, min(3, len(rows))))
  cut = [len(rows) * n // shards for n in range(shards + 1)]
  texts = [text_of(rows[a:b]) for a, b in zip(cut[:-1], cut[1:])]
  encoding = draw(st.sampled_from(['utf-8', 'utf-8-sig', 'utf-16', 'latin-1']))
  if encoding == 'latin-1' and not all(map(_is_latin_1_alone, texts)):
    encoding = 'utf-8'
  compress = draw(st.sampled_from([lambda text: text, *COMPRESSIONS.values()]))
  content = [compress(text.encode(encoding)) for text in texts]
  ordered = sorted(rows, key=lambda row: row[2]) if timed else rows
  own: dict[str, list[str]] = {}
  for user, item, _ in ordered:
    own.setdefault(user, []).append(item)
  dataset = draw(st.sampled_from(['auto', 'csv']))
  if timed and header[2] == 'created_at' and draw(st.booleans()):
    dataset += ',time=created_at'
  return content, dataset, own


def as_read(own):
  """Ids as they may be read: `12.0` as 12 where all are whole numbers."""

  def plain(ids):
    if all(re.fullmatch(r'(0|-?[1-9][0-9]*)(\.0)?', i) for i in ids):
      return {i: i.removesuffix('.0') for i in ids}
    return {i: i for i in ids}

  users = plain(own)
  all_items = plain({i for history in own.values() for i in history})
  found: dict[str, list[str]] = {}
  for user, history in own.items():
    found.setdefault(users[user], []).extend(all_items[i] for i in history)
  return found


def check_dialect(folder, content, dataset, own):
  for old in folder.iterdir():
    old.unlink()
  for number, one in enumerate(content):
    (folder / f'log-{number:05}-of-{len(content):05}.csv').write_bytes(one)
  try:
    found = histories(read(folder, dataset))
  except UserError:
    return False
  assert found == as_read(own), ([one[:300] for one in content], dataset)
  return True


def test_dialects_are_read_right_or_refused(tmp_path):
  outcomes = []

  @hypothesis.settings(
    max_examples=150, deadline=None, database=None, derandomize=True
  )
  @hypothesis.given(dialects())
  def check(dialect):
    outcomes.append(check_dialect(tmp_path, *dialect))

  check()
  assert np.mean(outcomes) > 0.5  # a reader that refuses all would pass


@pytest.mark.slow
def test_2000_dialects_are_read_right_or_refused(tmp_path):
  @hypothesis.settings(max_examples=2000, deadline=None, database=None)
  @hypothesis.given(dialects())
  def check(dialect):
    check_dialect(tmp_path, *dialect)

  check()
