"""Are the features any good? Coverage, norms, spectrum, neighbours, and whether
consecutively consumed items are close together.

    python -m experiments.inspect_features --dataset=ml-1m \\
        --data_dir=path/to/ml-1m [--items='Toy Story; Alien'] \\
        [--out=features.png] [--json]

Reads the data as training does, with the same flags, and trains nothing. See
fedmmr_jax/evaluation/feature_quality.py.
"""

import json
import pathlib
from typing import Any, Sequence

import numpy as np
from absl import flags

from experiments import app, console, figures
from fedmmr_jax.data import load
from fedmmr_jax.data.dataset import Dataset
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import feature_quality
from fedmmr_jax.evaluation.feature_quality import Quality

_ITEMS = flags.DEFINE_string(
  'items',
  '',
  'items to show the neighbours of: ids, titles or parts of '
  'titles, with ; between them; empty: the most consumed ones',
)
_OUT = flags.DEFINE_string(
  'out', '', 'file for a figure, such as features.png; empty: none'
)
_JSON = flags.DEFINE_boolean('json', False, 'print JSON instead of tables')

app.define_config_flags()

_SHOWN_ITEMS = 5  # by default
_BLUE, _ORANGE, _GREY, _GRID = '#0969da', '#bc4c00', '#59636e', '#d1d9e0'


def main() -> None:
  if _OUT.value:  # before any work
    figures.check_path(_OUT.value)
  config = app.config_from_flags()
  loaded = load.load(config)
  dataset = loaded.dataset
  kinds = list(dataset.features)
  if not kinds:
    raise UserError(
      f'{dataset.name}: no features to look at; put visual_features.npy or '
      'text_features.npy into --data_dir, or name a file with '
      '--visual_features or --text_features'
    )
  items = (
    feature_quality.find_items(dataset, _ITEMS.value)
    if _ITEMS.value
    else feature_quality.most_consumed(dataset, _SHOWN_ITEMS)
  )
  found = [
    feature_quality.measure(dataset, kind, items, config.seed) for kind in kinds
  ]
  if _OUT.value:
    draw(figures.pyplot(), dataset, found, pathlib.Path(_OUT.value))
  if _JSON.value:
    print(json.dumps(as_json(dataset, found), indent=2, allow_nan=False))
  else:
    print(console.data_report(loaded) + '\n\n' + text(dataset, found))


def text(dataset: Dataset, found: Sequence[Quality]) -> str:
  """The tables, and the verdicts at the end."""
  verdicts = [
    line
    for quality in found
    for line in (
      feature_quality.verdict(quality),
      *feature_quality.warnings(quality),
    )
  ]
  return '\n'.join(
    [
      _overview(found),
      '',
      _quintiles(found),
      '',
      *_repeated(dataset, found),
      *_neighbours(dataset, found),
      *_pairs(found),
      *verdicts,
      *([f'\nfigure  {_OUT.value}'] if _OUT.value else []),
    ]
  )


def _overview(found) -> str:
  rows = {
    'columns': lambda q: q.width,
    'items covered': lambda q: f'{q.coverage.items:.1%}',
    'training interactions covered': lambda q: f'{q.coverage.interactions:.1%}',
    'norm, smallest': lambda q: f'{q.norms.min():.4g}',
    'norm, median': lambda q: f'{np.median(q.norms):.4g}',
    'norm, largest': lambda q: f'{q.norms.max():.4g}',
    'items that share their row': lambda q: q.duplicates.items,
    **{
      f'components of {share:.0%} of the variance': lambda q, share=share: (
        q.spectrum.components(share)
      )
      for share in feature_quality.SHARES
    },
    'effective rank': lambda q: f'{q.spectrum.effective_rank:.1f}',
    'share of the mean in the square length': lambda q: (
      f'{q.spectrum.mean_share:.1%}'
    ),
    'mean cosine of two items': lambda q: f'{q.spectrum.mean_cosine:.3f}',
  }
  return console.table(
    ['features', *(q.kind for q in found)],
    [[title, *map(figure, found)] for title, figure in rows.items()],
  )


def _quintiles(found) -> str:
  sizes = found[0].coverage
  last = len(sizes.quintile_items) - 1
  ends = {0: ', most consumed', last: ', least consumed'}
  return console.table(
    [
      'fifth of the items',
      'items',
      'interactions',
      *(f'{q.kind} covered' for q in found),
    ],
    [
      [
        f'{i + 1}{ends.get(i, "")}',
        sizes.quintile_items[i],
        f'{sizes.quintile_interactions[i]:.1%}',
        *(f'{q.coverage.quintile_coverage[i]:.1%}' for q in found),
      ]
      for i in range(last + 1)
    ],
  )


def _repeated(dataset, found) -> list[str]:
  """Which items share the most frequent row, for each kind that has one."""
  lines = []
  for quality in found:
    most = quality.duplicates.most
    if len(most):
      shown = '; '.join(
        feature_quality.title_of(dataset, row) for row in most[:5]
      )
      more = '; …' if len(most) > 5 else ''
      lines += [
        f'{quality.kind}: {quality.duplicates.items} items share '
        f'{quality.duplicates.rows} rows; the most frequent one, of '
        f'{len(most)}: {shown}{more}',
        '',
      ]
  return lines


def _neighbours(dataset, found) -> list[str]:
  lines = []
  for views in zip(*(quality.neighbours for quality in found)):
    columns = [_column(dataset, view) for view in views]
    rows = [
      [
        cell
        for column in columns
        for cell in (column[i] if i < len(column) else ('', ''))
      ]
      for i in range(max(map(len, columns)))
    ]
    header = [
      cell
      for quality in found
      for cell in ('cosine', f'nearest by {quality.kind}')
    ]
    lines += [
      feature_quality.title_of(dataset, views[0].item),
      console.table(header, rows),
      '',
    ]
  return lines


def _column(dataset, view) -> list[tuple[str, str]]:
  if not len(view.rows):
    return [('-', 'none: the item lacks the feature')]
  return [
    (f'{cosine:.2f}', console.short(feature_quality.title_of(dataset, row)))
    for row, cosine in zip(view.rows.tolist(), view.cosines)
  ]


def _pairs(found) -> list[str]:
  rows = []
  for quality in found:
    if quality.co_consumption is None:
      continue
    for what, c in (
      ('like popularity', quality.co_consumption.to_matched),
      ('any two items', quality.co_consumption.to_uniform),
    ):
      d = c.difference
      rows.append(
        [
          f'{quality.kind}, {what}',
          f'{c.mean:+.3f}',
          f'{c.other_mean:+.3f}',
          f'{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]',
          f'{c.effect:+.2f}',
          f'{c.auc:.3f}',
        ]
      )
  return (
    [
      console.table(
        [
          'mean cosine against',
          'consecutive',
          'random',
          'difference, 95% interval',
          'in sd',
          'AUC',
        ],
        rows,
      ),
      '',
    ]
    if rows
    else []
  )


def as_json(dataset: Dataset, found: Sequence[Quality]) -> dict[str, Any]:
  """All figures, for programs; items as {id, title}."""
  return {
    'dataset': dataset.name,
    'interactions': int(dataset.num_train.sum()),
    **{quality.kind: _as_json(dataset, quality) for quality in found},
  }


def _as_json(dataset, quality) -> dict[str, Any]:
  covered, spectrum, pairs = (
    quality.coverage,
    quality.spectrum,
    quality.co_consumption,
  )
  return {
    'columns': quality.width,
    'coverage': {
      'items': covered.items,
      'interactions': covered.interactions,
      'quintiles': [
        {
          'items': int(n),
          'interactions': float(share),
          'coverage': float(coverage),
        }
        for n, share, coverage in zip(
          covered.quintile_items,
          covered.quintile_interactions,
          covered.quintile_coverage,
        )
      ],
    },
    'norms': {
      'min': float(quality.norms.min()),
      'median': float(np.median(quality.norms)),
      'max': float(quality.norms.max()),
      'unit': quality.has_unit_rows,
    },
    'duplicates': {
      'items': quality.duplicates.items,
      'rows': quality.duplicates.rows,
      'most': [_item(dataset, row) for row in quality.duplicates.most],
    },
    'spectrum': {
      'components': {
        str(share): spectrum.components(share)
        for share in feature_quality.SHARES
      },
      'effective_rank': spectrum.effective_rank,
      'mean_share': spectrum.mean_share,
      'mean_cosine': spectrum.mean_cosine,
    },
    'co_consumption': pairs
    and {
      'pairs': len(pairs.weight),
      'chance': pairs.chance,
      **{
        name: {
          **comparison._asdict(),
          'difference': comparison.difference._asdict(),
        }
        for name, comparison in (
          ('like_popularity', pairs.to_matched),
          ('any_two_items', pairs.to_uniform),
        )
      },
    },
    'neighbours': [
      {
        **_item(dataset, view.item),
        'nearest': [
          {**_item(dataset, row), 'cosine': float(cosine)}
          for row, cosine in zip(view.rows, view.cosines)
        ],
      }
      for view in quality.neighbours
    ],
    'verdict': feature_quality.verdict(quality),
    'warnings': feature_quality.warnings(quality),
  }


def _item(dataset, row) -> dict[str, Any]:
  return {
    'id': dataset.item_ids[row].tolist(),
    'title': dataset.titles[row] if dataset.titles else '',
  }


def draw(
  pyplot, dataset: Dataset, found: Sequence[Quality], path: pathlib.Path
) -> None:
  """Four panels for each kind of features."""
  figure, axes = pyplot.subplots(
    len(found),
    4,
    figsize=(15, 0.6 + 3.2 * len(found)),
    layout='constrained',
    squeeze=False,
  )
  figure.get_layout_engine().set(wspace=0.05, hspace=0.06)
  for row, quality in zip(axes, found):
    for panel, axis in zip(
      (_draw_coverage, _draw_norms, _draw_spectrum, _draw_cosines), row
    ):
      panel(axis, quality)
      axis.spines[['top', 'right']].set_visible(False)
      axis.set_axisbelow(True)
      axis.tick_params(color=_GRID, labelcolor=_GREY, labelsize=9)
      for side in ('left', 'bottom'):
        axis.spines[side].set_color(_GRID)
  figure.suptitle(
    f'Features of {dataset.name}: {dataset.num_items:,} items, '
    f'{dataset.num_clients:,} clients',
    fontweight='bold',
  )
  figure.savefig(path, dpi=150)


def _draw_coverage(axis, quality) -> None:
  coverage = 100 * quality.coverage.quintile_coverage
  axis.bar(range(len(coverage)), coverage, width=0.7, color=_BLUE)
  for i, value in enumerate(coverage):
    axis.text(
      i, value + 2, f'{value:.0f}', ha='center', fontsize=9, color=_GREY
    )
  ends = {0: 'most\nconsumed', len(coverage) - 1: 'least\nconsumed'}
  axis.set_xticks(
    range(len(coverage)),
    [ends.get(i, str(i + 1)) for i in range(len(coverage))],
  )
  axis.set_ylim(0, 112)
  axis.set_yticks([0, 25, 50, 75, 100])
  _label(
    axis,
    f'{quality.kind}: coverage by popularity',
    'fifth of the items',
    '% of its items',
  )


def _draw_norms(axis, quality) -> None:
  largest = quality.norms.max()
  axis.hist(quality.norms, bins=40, range=(0, 1.2 * largest), color=_BLUE)
  unit = ', all of length 1' if quality.has_unit_rows else ''
  _label(axis, f'{quality.kind}: norms of the rows{unit}', 'norm', 'items')


def _draw_spectrum(axis, quality) -> None:
  spectrum = quality.spectrum
  cumulative = 100 * np.concatenate([[0], spectrum.explained.cumsum()])
  axis.plot(range(len(cumulative)), cumulative, color=_BLUE, linewidth=2)
  needed = {
    share: spectrum.components(share) for share in feature_quality.SHARES
  }
  for share, count in needed.items():
    axis.vlines(
      count, 0, 100 * share, color=_ORANGE, linewidth=0.8, linestyle='dotted'
    )
    axis.plot(count, 100 * share, 'o', color=_ORANGE, markersize=5)
  axis.text(
    0.97,
    0.06,
    '\n'.join(f'{share:.0%} in {count}' for share, count in needed.items()),
    transform=axis.transAxes,
    ha='right',
    fontsize=9,
    color=_ORANGE,
    bbox={'color': 'white', 'pad': 2},
  )
  axis.set_xlim(0, len(cumulative) - 1)
  axis.set_ylim(0, 105)
  _label(
    axis,
    f'{quality.kind}: variance, effective rank '
    f'{spectrum.effective_rank:.0f} of {quality.width}',
    'principal components',
    '% of the variance',
  )


def _draw_cosines(axis, quality) -> None:
  pairs = quality.co_consumption
  title = f'{quality.kind}: closeness of items'
  if pairs is None:
    axis.text(
      0.5,
      0.5,
      'no pairs to compare',
      ha='center',
      va='center',
      transform=axis.transAxes,
      color=_GREY,
    )
    _label(axis, title, '', '')
    return
  title += f', AUC {pairs.to_matched.auc:.2f}'
  every = np.concatenate([pairs.consecutive, pairs.matched])
  bins = np.linspace(*np.percentile(every, [0.1, 99.9]), 50)
  for values, colour, name in (
    (pairs.matched, _GREY, 'random'),
    (pairs.consecutive, _BLUE, 'consecutive'),
  ):
    axis.hist(
      values,
      bins=bins,
      weights=pairs.weight,
      density=True,
      histtype='stepfilled',
      color=colour,
      alpha=0.18,
    )
    axis.hist(
      values,
      bins=bins,
      weights=pairs.weight,
      density=True,
      histtype='step',
      color=colour,
      linewidth=1.8,
      label=name,
    )
  axis.set_yticks([])
  axis.legend(frameon=False, fontsize=9, handlelength=1.2)
  _label(axis, title, 'cosine, centred features', 'density of pairs')


def _label(axis, title: str, x: str, y: str) -> None:
  axis.set_title(title, fontsize=11, loc='left')
  axis.set_xlabel(x, fontsize=9, color=_GREY)
  axis.set_ylabel(y, fontsize=9, color=_GREY)
  axis.grid(axis='y', color=_GRID, linewidth=0.6)


def cli() -> None:
  app.run(main)


if __name__ == '__main__':
  cli()
