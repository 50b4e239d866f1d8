"""What is in a data set, and what would a run make of it?

    python -m experiments.inspect_data FILE_OR_FOLDER [--top_k_users=1000 …]
        [--out=data.png] [--json]

Reads the data as training does, with the same flags, and trains nothing: the
format and why, which column is whose, ids, times, repeats, what each filter
leaves, how long histories are, first sequences, features, held-out items.
"""

import datetime
import json
import pathlib
from typing import Any, Sequence

import numpy as np
from absl import flags

from experiments import app, console, figures
from fedmmr_jax.config import SYNTHETIC
from fedmmr_jax.data import description, formats, load, sources
from fedmmr_jax.data.dataset import Dataset
from fedmmr_jax.data.description import Description, HeldOut
from fedmmr_jax.errors import UserError

_OUT = flags.DEFINE_string(
  'out', '', 'file for a figure, such as data.png; empty: none'
)
_JSON = flags.DEFINE_boolean('json', False, 'print JSON instead of text')
_CLIENTS = flags.DEFINE_integer(
  'clients', 3, 'how many of the first sequences to show', lower_bound=0
)

app.define_config_flags()

_SHOWN_ITEMS = 4  # of a sequence, its last ones
_BLUE, _GREY, _GRID = '#0969da', '#59636e', '#d1d9e0'


def main(*words: str) -> None:
  if _OUT.value:  # before any work
    figures.check_path(_OUT.value)
  if len(words) > 1:
    raise UserError(
      f'{" ".join(words)}: name one file, or the folder of the data set'
    )
  path = words[0] if words else ''
  named = {'data_dir': path, 'dataset': formats.AUTO} if path else {}
  run = app.config_from_flags(named)
  config = run.data
  if config.synthetic:
    raise UserError(
      f'`dataset={SYNTHETIC}` has no files; name a file or the folder of a '
      'data set'
    )
  source = load.source_of(config)
  interactions = sources.read(source)
  found = description.describe(interactions)
  steps = description.filtered(
    source.path.name, interactions, load.filters_of(config)
  )
  loaded = load.load(run, interactions=interactions)
  dataset = loaded.dataset
  held_out = description.held_out(dataset)
  first = description.first_sequences(dataset, _CLIENTS.value, _SHOWN_ITEMS)
  if _OUT.value:
    draw(figures.pyplot(), found, dataset, pathlib.Path(_OUT.value))
  if _JSON.value:
    content = as_json(found, steps, held_out, first, loaded)
    print(json.dumps(content, indent=2, allow_nan=False))
    return
  print(
    '\n'.join(
      [
        console.data_report(loaded),
        '',
        *_overview(found),
        '',
        _steps(found, steps),
        '',
        *_histories(found),
        '',
        *_held_out(config, held_out),
        *_sequences(first),
        *([f'\nfigure  {_OUT.value}'] if _OUT.value else []),
      ]
    )
  )


def _overview(found: Description) -> list[str]:
  lines = [
    'in the file',
    f'  users      {found.users:,}, {_spread(found.of_users)}',
    f'  items      {found.items:,}, {_spread(found.of_items)}',
  ]
  if found.times is None:
    lines.append('  times      none: the order of the file counts')
  else:
    t = found.times
    lines.append(
      f'  times      {_day(t.first)} to {_day(t.last)}; {t.in_order:.1%} of '
      f'the lines are in order, {t.tied:.1%} tie with the one before'
    )
  lines.append(
    f'  repeats    {found.repeats:.1%} of the interactions; duplicates '
    f'{found.duplicates:,}'
  )
  return lines


def _spread(quantiles: np.ndarray) -> str:
  least, _, low, median, high, _, most = quantiles
  return (
    f'{least:.0f} to {most:.0f} interactions each, half of them {low:.0f} to '
    f'{high:.0f}, median {median:.0f}'
  )


def _day(seconds: float) -> str:
  when = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
  return when.strftime('%Y-%m-%d %H:%M')


def _steps(found: Description, steps) -> str:
  rows = [('in the file', found.users, found.items, found.interactions), *steps]
  return console.table(
    ['what is left', 'users', 'items', 'interactions'],
    [[what, *(f'{number:,}' for number in numbers)] for what, *numbers in rows],
  )


def _histories(found: Description) -> list[str]:
  rows = description.bars(found.lengths)
  wide = max(len(name) for name, _, _ in rows)
  most = max(len(f'{count:,}') for _, count, _ in rows)
  return [
    'interactions of a user, in the file',
    *(
      f'  {name:>{wide}}  {count:>{most},}  {"█" * bar}'
      for name, count, bar in rows
    ),
  ]


def _held_out(config, held_out: HeldOut) -> list[str]:
  return [
    f'held out   {held_out.validation:,} validation and {held_out.test:,} test '
    f'items ({config.split_by})',
    f'           {held_out.repeated:.1%} of the test items their client had '
    f'before, {held_out.untrained:.1%} nobody trains on',
  ]


def _sequences(first: Sequence[dict[str, Any]]) -> list[str]:
  lines = []
  for one in first:
    more = '… ' if one['length'] > len(one['training']) + 2 else ''
    lines += [
      '',
      f'user {one["user"]}, {one["length"]} interactions',
      f'  trained on  {more}{" · ".join(map(console.short, one["training"]))}',
      f'  validation  {_some(one["validation"])}',
      f'  test        {_some(one["test"])}',
    ]
  return lines


def _some(items: Sequence[str]) -> str:
  more = ' …' if len(items) > _SHOWN_ITEMS else ''
  return ' · '.join(map(console.short, items[:_SHOWN_ITEMS])) + more or 'none'


def as_json(found, steps, held_out, first, loaded) -> dict[str, Any]:
  """Everything, for programs."""
  dataset = loaded.dataset
  return {
    'notes': list(loaded.notes),
    'interactions': found.interactions,
    'users': found.users,
    'items': found.items,
    'times': found.times and found.times._asdict(),
    'duplicates': found.duplicates,
    'repeats': found.repeats,
    'percentiles': list(description.QUANTILES),
    'interactions_of_a_user': found.of_users.tolist(),
    'interactions_of_an_item': found.of_items.tolist(),
    'filters': [
      dict(zip(('filter', 'users', 'items', 'interactions'), step))
      for step in steps
    ],
    'held_out': held_out._asdict(),
    'features': {
      report.kind: {'covered': report.covered, 'of': report.catalogue}
      for report in loaded.integrity
    },
    'clients': dataset.num_clients,
    'first': [one | {'user': str(one['user'])} for one in first],
  }


def draw(
  pyplot, found: Description, dataset: Dataset, path: pathlib.Path
) -> None:
  """How long histories are, and how popular items, in the file and in use."""
  figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout='constrained')
  most = max(found.lengths.max(), 2)
  edges = np.unique(
    np.geomspace(max(found.lengths.min(), 1), most + 1, 30).astype(int)
  )
  axes[0].hist(found.lengths, edges, color=_GRID, label='in the file')
  axes[0].hist(dataset.lengths, edges, color=_BLUE, alpha=0.8, label='in use')
  axes[0].set(xscale='log', xlabel='interactions of a user', ylabel='users')
  axes[0].legend(frameon=False)
  popularity = np.sort(np.bincount(dataset.items)[1:])[::-1]
  share = np.cumsum(popularity) / max(popularity.sum(), 1)
  axes[1].plot(np.arange(1, len(share) + 1) / len(share), share, color=_BLUE)
  axes[1].plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle=':')
  axes[1].set(
    xlabel='share of the items in use, most popular first',
    ylabel='share of the interactions',
    xlim=(0, 1),
    ylim=(0, 1),
  )
  for axis in axes:
    axis.spines[['top', 'right']].set_visible(False)
  figure.suptitle(f'{dataset.name}: {dataset.num_clients:,} clients')
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


def cli() -> None:
  app.run(main, commands=True)


if __name__ == '__main__':
  cli()
