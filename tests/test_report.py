"""The pages: drawn from a run's files, opened in a browser."""

import html
import json
import re
import shutil
import subprocess

import pytest

from experiments import console
from fedmmr_jax.client import losses
from fedmmr_jax.data.features import IntegrityReport
from fedmmr_jax.errors import UserError
from fedmmr_jax.runs import report
from fedmmr_jax.runs.run_folder import RunFolder
from tests import small

INTEGRITY = IntegrityReport(
  'visual', 'a <b> & c.npy', (61, 12), 'float32', -1, 1, 0.0, 0.5, 3, 57, 60
)


def record(number: int, val: bool = True) -> dict:
  shares = [0.0] * losses.WEIGHT_BINS
  shares[number], shares[-1] = 0.25, 0.75
  metrics = {name: 0.1 * number for name in ('HR@10', 'NDCG@10')}
  return {
    'round': number,
    'seconds': 2.0,
    'saving_seconds': 0.5,
    'communication': {'visits': 10, 'bytes_down': 3e6, 'bytes_up': 2e6},
    'train': {
      'loss': 3.0 / number,
      'rec_loss': 2.0 / number,
      'contrastive_loss': 4.0,
      'w_visual': 0.4,
      'w_semantic': 0.6,
      'instance_weight': 1.4,
      'instance_weight_shares': shares,
      'hardest_share': 0.1,
      'gradient_backbone': 1.0,
      'gradient_visual': None,
      'gradient_semantic': None,
      'memory_fill': 0.5,
      'memory_age': 30.0,
    },
    **(
      {'val': {'sampled': metrics, 'full': metrics}, 'evaluation_seconds': 1.0}
      if val
      else {}
    ),
  }


@pytest.fixture
def run(tmp_path):
  """A run's folder after three of its rounds."""
  run = RunFolder(tmp_path / 'run')
  run.start(small.config(num_rounds=5), small.dataset(), [INTEGRITY])
  for number in (1, 2, 3):
    run.append(record(number, val=number != 2))
  return run


def summary() -> dict:
  ranking = {name: 0.5 for name in ('HR@5', 'HR@10', 'NDCG@10', 'MRR')}
  both = {'sampled': ranking, 'full': ranking}
  return {
    'test': both,
    'test_by_history': {'3 to 7': {'users': 5, **both}},
    'val': both,
    'best_round': 3,
    'rounds': 3,
    'wall_seconds': 20.0,
    'round_seconds_median': 2.0,
    'targets_per_second': 1e3,
    'peak_rss_mb': 900.0,
    'num_clients': 9,
    'num_items': 60,
    'num_interactions': 99,
    'backend': 'cpu',
    'acceptance': [
      {'name': 'test', 'target': '> 1', 'measured': '2', 'passed': True}
    ],
  }


def test_draws_every_figure_and_escapes(run):
  run.write_summary(summary())
  page = report.write(run).read_text()
  for words in (
    'Validation',
    'Router',
    'Contrastive loss',
    'Instance weights',
    'Client memory, fill',
    'Client memory, age',
    'Time',
    'Where the time went',
    'Test item by length of the history',
    '3 to 7',
    'What it cost',
    '90% of the best',
    'Acceptance',
    'a &lt;b&gt; &amp; c.npy',
    'num_rounds',
  ):
    assert words in page, words
  assert 'gradient visual' not in page  # has no value
  assert 'nan' not in page.lower()
  assert '://' not in page  # opens offline


def test_a_run_that_goes_on_has_a_page_too(run):
  assert '3 of 5 rounds; the run has not finished' in (
    report.write(run).read_text()
  )


def test_before_the_first_round(tmp_path):
  run = RunFolder(tmp_path / 'run')
  run.start(small.config(), small.dataset())
  assert '0 of 2 rounds' in report.write(run).read_text()
  with pytest.raises(UserError, match='config.json: no such file'):
    report.write(RunFolder(tmp_path))


def test_scales_by_hand():
  chart = report.draw('t', 'u', [report.Series('a', [(1, 0.0), (3, 1.0)])])
  (x0, y0, _), (x1, y1, tip) = chart.curves[0]['dots']
  assert x0 == 52 and x1 == report.WIDTH - 12 and y0 > y1
  assert tip == 'a, round 3: 1'
  assert [label for _, label in chart.x_ticks] == ['1', '2', '3']
  # From 0 (nothing here is negative) to 1.05.
  assert [label for _, label in chart.y_ticks] == [
    '0',
    '0.2',
    '0.4',
    '0.6',
    '0.8',
    '1',
  ]


@pytest.mark.parametrize(
  'low, high, expected',
  [
    (0.363, 0.637, [0.4, 0.45, 0.5, 0.55, 0.6]),
    (1, 40, [10, 20, 30, 40]),
    (-3.0, 3.0, [-3, -2, -1, 0, 1, 2, 3]),
    (7, 7, [7]),
  ],
)
def test_ticks_are_round_numbers(low, high, expected):
  assert report._round_numbers(low, high) == expected


def test_histogram_by_hand():
  (chart,) = report.draw_weights([record(1), record(2)], 0.5)
  assert len(chart.cells) == 4
  low = chart.cells[0]  # the second bin, 1.2625 to 1.275, of round 1
  assert low['tip'] == 'round 1, weight 1.262 to 1.275: 25.0%'
  # 20 bins share 194 units of height, two rounds 496 of width.
  assert low['height'] == pytest.approx(9.7, abs=0.11)
  assert low['width'] == pytest.approx(248, abs=0.11)
  assert chart.cells[1]['opacity'] == 1 and chart.cells[1]['y'] == 12
  assert report.draw_weights([{'round': 1, 'train': {}}], 0.5) == []


def test_many_rounds_share_columns():
  columns = report._merged([(n, [n, 1.0]) for n in range(1, 131)])
  assert len(columns) <= report.MAX_COLUMNS
  assert columns[0] == (1, 3, [2.0, 1.0]) and columns[-1][:2] == (130, 130)


def test_time_split():
  parts = dict(report.time_split([record(1), record(2, val=False)], summary()))
  assert parts == {
    'training': 4.0,
    'validation': 1.0,
    'waiting for a save': 1.0,
    'the rest: start, test': 14.0,
  }


def test_comparison(run, tmp_path):
  other = RunFolder(tmp_path / 'other')
  other.start(small.config(seed=7), small.dataset())
  other.append(record(1))
  run.write_summary(summary())
  report.write_comparison([run, other], tmp_path / 'both.html')
  page = (tmp_path / 'both.html').read_text()
  for words in (
    'Validation, sampled',
    'run, round 3: 0.3',
    'other, round 1',
    'seed',
    'not finished',
    '3 of 3',
  ):
    assert words in page, words
  assert 'dropout' not in page and '://' not in page
  twins = [RunFolder(tmp_path / 'a' / 'run'), RunFolder(tmp_path / 'b' / 'run')]
  assert len(set(report._distinct(twins))) == 2


def in_browser(page: str, width: int, script: str, *flags: str) -> dict:
  """What a script returns that runs in a page of a width."""
  chromium = shutil.which('chromium') or shutil.which('chromium-browser')
  if not chromium:
    pytest.skip('no chromium')
  wrapper = f'''<body style="margin:0"><iframe style="border:0"
    width="{width}" height="800" srcdoc="{html.escape(page)}"></iframe>
    <pre id="result"></pre><script>
    const frame = document.querySelector('iframe');
    frame.onload = () => {{
      const page = frame.contentDocument, view = frame.contentWindow;
      document.getElementById('result').textContent = JSON.stringify(
        (() => {{ {script} }})());
    }};</script>'''
  done = subprocess.run(
    [
      chromium,
      '--headless',
      '--no-sandbox',
      '--disable-gpu',
      '--disable-quic',
      '--no-first-run',
      '--disable-background-networking',
      '--disable-component-update',
      '--disable-sync',
      *flags,
      '--virtual-time-budget=5000',
      '--dump-dom',
      'data:text/html;charset=utf-8,'
      + re.sub(r'[#%\n]', lambda m: f'%{ord(m[0]):02X}', wrapper),
    ],
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
  return json.loads(html.unescape(found[1]))


LOOK = """
  const dot = page.querySelector('circle.hit');
  dot.dispatchEvent(new view.PointerEvent('pointermove', {bubbles: true,
    clientX: 300, clientY: 200}));
  const tip = page.getElementById('tip'), box = tip.getBoundingClientRect();
  return {
    tip: tip.textContent, tipShown: !tip.hidden,
    tipInside: box.left >= 0 && box.right <= view.innerWidth,
    overflow: page.scrollingElement.scrollWidth - view.innerWidth,
    figures: [...page.querySelectorAll('svg')].filter(
      svg => svg.getBoundingClientRect().width > 200).length,
    cells: page.querySelectorAll('rect.cell').length,
    background: view.getComputedStyle(page.body).backgroundColor,
    ink: view.getComputedStyle(page.body).color};"""


def test_opens_in_a_browser_light_and_dark_on_desktop_and_phone(run):
  run.write_summary(summary())
  page = report.write(run).read_text()
  wide = in_browser(page, 1280, LOOK, '--blink-settings=preferredColorScheme=1')
  phone = in_browser(page, 390, LOOK, '--blink-settings=preferredColorScheme=0')
  assert wide['background'] == 'rgb(255, 255, 255)'
  assert phone['background'] == 'rgb(13, 17, 23)'
  assert wide['ink'] != phone['ink']
  for seen in (wide, phone):
    assert seen['tip'] == 'sampled, round 1: 0.1'
    assert seen['tipShown'] and seen['tipInside']
    assert seen['overflow'] <= 0  # nothing is wider than the screen
    assert seen['figures'] == page.count('<svg') >= 11
    assert seen['cells'] == 6


def test_a_third_expert_and_a_further_metric_have_their_curves(run, tmp_path):
  lines = [record(1), record(2)]
  for line in lines:
    line['train'] |= {'w_audio': 0.2, 'gradient_audio': 0.3, 'own_figure': 1.5}
    for values in line['val'].values():
      values['depth'] = 4.5
  charts = {(c.title, c.unit): c for c in report.draw_run(lines)}

  def labels(title, unit):
    return [curve['label'] for curve in charts[title, unit].curves]

  assert labels('Router', 'mean weight') == [
    'router visual',
    'router semantic',
    'router audio',
  ]
  assert 'gradient audio' in labels('Gradient', 'mean norm of a local step')
  assert labels('Validation', 'depth') == ['sampled', 'full']
  assert labels('Own figure', 'mean') == ['own figure']
  # Over one another too, and in the table of results.
  other = RunFolder(tmp_path / 'other')
  other.start(small.config(seed=7), small.dataset())
  done = summary()
  for values in done['test'].values():
    values['depth'] = 4.25
  for one in (run, other):
    one.append(lines[0] | {'round': 4})
    one.write_summary(done)
  report.write_comparison([run, other], tmp_path / 'both.html')
  page = (tmp_path / 'both.html').read_text()
  for words in ('Router, router audio', '<th>depth full</th>', '4.2500'):
    assert words in page, words
  # One of them has it not: no column.
  other.write_summary(summary())
  report.write_comparison([run, other], tmp_path / 'both.html')
  assert '<th>depth' not in (tmp_path / 'both.html').read_text()


def test_a_third_expert_is_told_of_in_the_line_of_a_round():
  line = record(1)
  line['train'] |= {'w_audio': 0.2, 'w_text': None}
  assert 'router visual 0.40 semantic 0.60 audio 0.20' in (
    console.round_line(line, 5)
  )
  for name in ('w_visual', 'w_semantic', 'w_audio'):
    del line['train'][name]
  assert 'router' not in console.round_line(line, 5)


def test_a_round_in_which_nobody_trained_says_so():
  line = record(1)
  assert 'loss 3.0' in console.round_line(line, 5)
  line['train'] = dict.fromkeys(line['train'])
  text = console.round_line(line, 5)
  assert 'nothing trained, nobody in the cohort has a positive' in text
  assert 'None' not in text and 'loss' not in console.progress(line)
