"""Draws the tables of results from the JSON files beside this script.

    python experiments/results/draw.py          # rewrites the pages
    python experiments/results/draw.py --check  # exit status 1 if one is stale

A file is one data set: `data`, `detail`, `order`; `runs`, each with its flags,
seeds, commit and test metrics; `verdicts`, each an option compared `against`
another. An effect is a difference with the bounds of its 95 % interval, paired
over users, or the two values (for some old data only one) if no interval was
computed. `verdict` says what `recommended.flags` does with the option: on, off
(the setting exists), or removed from the code. A table goes between
`<!-- verdicts:NAME -->` (or `runs:`) and `<!-- end -->` of a page; NAME is a
file without its ending.
"""

import json
import pathlib
import re
import sys
from typing import Any

RESULTS = pathlib.Path(__file__).parent
ROOT = RESULTS.parent.parent
PAGES = (ROOT / 'README.md', ROOT / 'docs' / 'results.md')
_REGION = re.compile(
  r'(<!-- (runs|verdicts):([\w, -]+) -->\n).*?(<!-- end -->)', re.DOTALL
)


def fill(page: str) -> str:
  """The page with each of its tables redrawn."""
  return _REGION.sub(
    lambda found: (
      found[1]
      + '\n'
      + _DRAW[found[2]](
        [_read(name) for name in found[3].replace(' ', '').split(',')]
      )
      + '\n\n'
      + found[4]
    ),
    page,
  )


def runs(files: list[dict[str, Any]]) -> str:
  """One row per run, one column per metric."""
  metrics = list(
    dict.fromkeys(
      name for file in files for run in file['runs'] for name in run['test']
    )
  )
  rows = [
    (
      file['data'],
      run['name'],
      *(
        _number(run['test'][name]) if name in run['test'] else ''
        for name in metrics
      ),
      _seeds(run),
      f'`{run["commit"]}`',
    )
    for file in files
    for run in file['runs']
  ]
  return _table(('data', 'run', *metrics, 'seed', 'commit'), rows)


def verdicts(files: list[dict[str, Any]]) -> str:
  """One row per option."""
  return _table(
    ('option', 'effect', 'data, seeds, commit', 'verdict'),
    [
      (
        f'{v["option"]}<br>against {v["against"]}',
        '<br>'.join(_effect(effect) for effect in v['effects']),
        ', '.join(
          filter(
            None,
            (
              file['data'],
              v.get('setup', ''),
              f'seed{"s" * (len(v["seeds"]) > 1)} ' + _seeds(v),
              f'`{v["commit"]}`',
            ),
          )
        ),
        f'**{v["verdict"]}**. {v["note"]}',
      )
      for file in files
      for v in file['verdicts']
    ],
  )


_DRAW = {'runs': runs, 'verdicts': verdicts}


def _effect(effect: dict[str, Any]) -> str:
  """One line that does not wrap; bold where the interval excludes 0."""
  return _effect_text(effect).replace(' ', '\N{NO-BREAK SPACE}')


def _effect_text(effect: dict[str, Any]) -> str:
  metric = effect['metric'].removeprefix('test ')
  values = {name: value for name, value in effect.items() if name != 'metric'}
  digits = 3 if all(round(v, 3) == v for v in values.values()) else 4
  if 'difference' not in effect:
    return f'{metric} ' + ' against '.join(
      f'{value:.{digits}f}' for value in values.values()
    )
  mean, low, high = (
    _signed(values[name], digits) for name in ('difference', 'low', 'high')
  )
  line = f'{mean} [{low}, {high}]'
  clear = values['low'] > 0 or values['high'] < 0
  return f'{metric} ' + (f'**{line}**' if clear else line)


def _seeds(entry: dict[str, Any]) -> str:
  return ', '.join(map(str, entry['seeds']))


def _number(value: float) -> str:
  return f'{value:.3f}' if round(value, 3) == value else f'{value:.4f}'


def _signed(value: float, digits: int) -> str:
  sign = '' if not value else '−' if value < 0 else '+'
  return f'{sign}{abs(value):.{digits}f}'


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  lines = [head, tuple('---' for _ in head), *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def _read(name: str) -> dict[str, Any]:
  return json.loads((RESULTS / f'{name}.json').read_text(encoding='utf-8'))


def main(check: bool) -> int:
  """Writes the pages, or says which are stale; the exit status."""
  stale = []
  for path in PAGES:
    page = path.read_text(encoding='utf-8')
    drawn = fill(page)
    if drawn != page:
      stale.append(path)
      if not check:
        path.write_text(drawn, encoding='utf-8')
  for path in stale:
    print(f'{path.relative_to(ROOT)}: ' + ('stale' if check else 'drawn'))
  return int(check and bool(stale))


if __name__ == '__main__':
  sys.exit(main('--check' in sys.argv[1:]))
