"""A data set of another format, from the shell: train, look into the run."""

import json
import re

import numpy as np
import pytest

from tests.test_cli import refused, run, TINY


@pytest.mark.slow
def test_string_ids_along_a_timeline(tmp_path):
  rng = np.random.default_rng(0)
  (tmp_path / 'reviews.json').write_text(
    ''.join(
      json.dumps(
        {
          'reviewerID': f'A{user}',
          'asin': f'B{item:02}',
          'unixReviewTime': 1_000_000_000 + 86_400 * day,
        }
      )
      + '\n'
      for user in range(8)
      for day, item in enumerate(rng.permutation(30)[:9])
    )
  )
  (tmp_path / 'meta_x.json').write_text(
    '{"asin": "B07", "title": "Toy seven"}\n'
  )
  for kind, width in (('visual', 8), ('text', 6)):
    matrix = rng.normal(size=(28, width)).astype(np.float32)
    matrix[0] = 0
    np.save(tmp_path / f'{kind}_features.npy', matrix)
  workdir = tmp_path / 'run'
  flags = [
    *TINY[1:],
    '--dataset=auto',
    '--split_by=timeline,test_from=2001-09-15',
    '--client_fraction=1',
    '--memory=surprise,threshold=0',
  ]
  out, _ = run(
    'train', *flags, f'--data_dir={tmp_path}', f'--workdir={workdir}'
  )
  assert 'Amazon reviews, a JSON object a line (detected)' in out
  assert 'the first one of each of 8 clients is its test item' in out
  ids = json.loads((workdir / 'ids.json').read_text())
  assert ids['user_ids'] == [f'A{user}' for user in range(8)]
  out, _ = run(
    'inspect_checkpoint',
    f'--workdir={workdir}',
    '--json',
    'recommend',
    'best',
    'A3',
  )
  told = json.loads(out)
  assert told['user_id'] == 'A3'
  assert set(e['item_id'] for e in told['entries']) <= set(ids['item_ids'][1:])
  assert any(e['title'] == 'Toy seven' for e in told['entries']) or (
    'B07' not in {e['item_id'] for e in told['entries']}
  )
  out, _ = run(
    'inspect_checkpoint', f'--workdir={workdir}', 'memory', 'best', 'A3'
  )
  assert 'user A3: ' in out
  out, _ = run(
    'inspect_checkpoint', f'--workdir={workdir}', '--json', 'router', 'best'
  )
  assert {e['item_id'] for e in json.loads(out)['most_visual']} <= set(
    ids['item_ids'][1:]
  )
  out, _ = run(
    'inspect_checkpoint', f'--workdir={workdir}', '--k=1', 'router', 'best'
  )
  assert re.search(r'most visual\nitem .*\n-.*\nB\d\d ', out), out
  assert (
    '--split_by=timeline,test_from=noon: test_from is neither a date'
    in refused(
      *flags, f'--data_dir={tmp_path}', '--split_by=timeline,test_from=noon'
    )
  )
