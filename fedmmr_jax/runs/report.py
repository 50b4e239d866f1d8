"""`report.html`: one run, or several overlaid, as a self-contained page drawn
from the files of the run folders."""

import math
import pathlib
from typing import Any, Iterable, NamedTuple, Sequence

import jinja2

from fedmmr_jax import metrics
from fedmmr_jax.client.losses import WEIGHT_BINS
from fedmmr_jax.config import InstanceWeight
from fedmmr_jax.federation import communication
from fedmmr_jax.runs.run_folder import REPORT, RunFolder

WIDTH, HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 34
MAX_COLUMNS = 60  # of the histogram: more rounds share one

Record = dict[str, Any]  # one line of metrics.jsonl


class Series(NamedTuple):
  """One curve: its label and (round, value) points."""

  label: str
  points: list[tuple[int, float]]


class Panel(NamedTuple):
  """A figure of the report.

  Attributes:
    title: heading.
    unit: what the vertical axis shows.
    paths: label of each curve -> where its value is in a record.
  """

  title: str
  unit: str
  paths: dict[str, tuple[str, ...]]


class Chart(NamedTuple):
  """A figure as the template draws it.

  Attributes:
    title: heading.
    unit: what the vertical axis shows.
    curves: label, colour number, polyline and hover dots of each series.
    cells: x, y, width, height, opacity and tip of a histogram's cells.
    x_ticks: (position, label).
    y_ticks: (position, label).
  """

  title: str
  unit: str
  curves: list[dict[str, Any]]
  cells: list[dict[str, Any]]
  x_ticks: list[tuple[float, str]]
  y_ticks: list[tuple[float, str]]


TIME = Panel(
  'Time',
  'seconds a round, the first left out: it compiles',
  {
    'training': ('seconds',),
    'evaluation': ('evaluation_seconds',),
    'waiting for a save': ('saving_seconds',),
  },
)


def panels(records: Sequence[Record]) -> list[Panel]:
  """The figures of the recorded metrics: all ranking metrics and all training
  metrics, for any number of experts."""
  return [
    *(
      Panel(
        'Validation',
        metric,
        {protocol: ('val', protocol, metric) for protocol in metrics.PROTOCOLS},
      )
      for metric in (metrics.HR, metrics.NDCG, *_further(records))
    ),
    *_training_panels(records),
    TIME,
  ]


def _further(records: Sequence[Record]) -> list[str]:
  """Validation metrics that not every run has."""
  return list(
    dict.fromkeys(
      metric
      for record in records
      for values in record.get('val', {}).values()
      for metric in values
      if metric not in metrics.RANKING
    )
  )


def _training_panels(records: Sequence[Record]) -> list[Panel]:
  quiet = _uneventful(records)
  names = dict.fromkeys(
    name
    for record in records
    for name, value in record['train'].items()
    if isinstance(value, (int, float)) and name not in quiet
  )
  found: dict[str, Panel] = {}
  for name in metrics.ordered(names):
    title, heading, unit = metrics.figure(name)
    panel = found.setdefault(heading, Panel(heading, unit, {}))
    panel.paths[title] = ('train', name)
  return list(found.values())


def _uneventful(records: Sequence[Record]) -> set[str]:
  """Counts of clients that need no figure: those that are always 0, and all of
  them if everybody who was asked has answered."""
  counts: dict[str, float] = {}
  for record in records:
    for name, value in record['train'].items():
      if name.startswith(metrics.CLIENTS):
        counts[name] = counts.get(name, 0) + (value or 0)
  zero = {name for name, total in counts.items() if not total}
  everybody = counts.keys() - zero <= {metrics.ASKED, metrics.ANSWERED}
  return set(counts) if everybody else zero


def write(run: RunFolder) -> pathlib.Path:
  """Writes the page of a run, finished or not, next to its other files.

  Raises:
    UserError: a file that it is drawn from is missing or damaged.
  """
  records, summary = run.records(), run.summary()
  flags = run.config().as_flat_dict()
  charts = draw_run(records)
  contrastive = run.config().contrastive
  if isinstance(contrastive, InstanceWeight):
    charts += draw_weights(records, contrastive.surprise_scale)
  path = run.path / REPORT
  path.write_text(
    _render(
      title=_name(run),
      summary=summary,
      rounds=len(records),
      num_rounds=flags['num_rounds'],
      charts=charts,
      costs=communication.costs(records, *run.config().evaluation.shown),
      times=time_split(records, summary),
      integrity=run.integrity(),
      flags=flags,
    ),
    'utf-8',
  )
  return path


def write_comparison(runs: Sequence[RunFolder], path: pathlib.Path) -> None:
  """Writes a page with several runs overlaid.

  Raises:
    UserError: a file that it is drawn from is missing or damaged.
  """
  names = _distinct(runs)
  flags = {name: run.config().as_flat_dict() for name, run in zip(names, runs)}
  first = flags[names[0]]
  summaries = {name: run.summary() for name, run in zip(names, runs)}
  records = {name: run.records() for name, run in zip(names, runs)}
  path.write_text(
    _render(
      title=' · '.join(names),
      names=names,
      summaries=summaries,
      ranking=_common(summaries.values()),
      charts=draw_runs(records),
      costs=communication.compared_costs(
        records, *runs[0].config().evaluation.shown
      ),
      differing={
        flag: [flags[name][flag] for name in names]
        for flag in first
        if any(flags[name][flag] != first[flag] for name in names)
      },
    ),
    'utf-8',
  )


def _common(summaries: Iterable[dict[str, Any] | None]) -> list[str]:
  """Ranking metrics of the table: the usual ones, and further ones that all
  finished runs have."""
  tested = [s['test'][metrics.FULL] for s in summaries if s]
  return [metrics.HR, metrics.NDCG, metrics.MRR] + [
    name
    for name in (tested[0] if tested else ())
    if name not in metrics.RANKING and all(name in t for t in tested)
  ]


def render(page: str, **content: Any) -> str:
  """A page of `templates/`, with everything in it escaped."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('fedmmr_jax.runs'),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template(f'{page}.html.j2').render(**content)


def _render(**content: Any) -> str:
  return render(
    'comparison' if 'names' in content else 'report',
    width=WIDTH,
    height=HEIGHT,
    left=_LEFT,
    right=WIDTH - _RIGHT,
    top=_TOP,
    bottom=HEIGHT - _BOTTOM,
    protocols=metrics.PROTOCOLS,
    headlines=(metrics.HR, metrics.NDCG),
    split_titles=metrics.SPLIT_TITLES,
    **content,
  )


def draw_run(records: Sequence[Record]) -> list[Chart]:
  """The panels of a run; curves and panels without any value are left out."""
  return _draw_all(
    (
      panel.title,
      panel.unit,
      [
        Series(label, _points(records, path))
        for label, path in panel.paths.items()
      ],
    )
    for panel in panels(records)
  )


def draw_runs(records: dict[str, Sequence[Record]]) -> list[Chart]:
  """A figure for each curve of the panels, with a curve for each run."""
  return _draw_all(
    (
      f'{panel.title}, {label}' if len(panel.paths) > 1 else panel.title,
      panel.unit,
      [Series(name, _points(lines, path)) for name, lines in records.items()],
    )
    for panel in panels([r for lines in records.values() for r in lines])
    for label, path in panel.paths.items()
  )


def _draw_all(figures) -> list[Chart]:
  return [
    draw(title, unit, series)
    for title, unit, series in figures
    if any(s.points for s in series)
  ]


def draw(title: str, unit: str, series: Sequence[Series]) -> Chart:
  """Scales series into the drawing area; a series without points only keeps its
  colour."""
  axes = _Axes(
    [x for s in series for x, _ in s.points],
    [y for s in series for _, y in s.points],
  )
  curves = [
    {
      'label': s.label,
      'colour': number,
      'line': ' '.join(f'{axes.x(a)},{axes.y(b)}' for a, b in s.points),
      'dots': [
        (axes.x(a), axes.y(b), f'{s.label}, round {a}: {b:.4g}')
        for a, b in s.points
      ],
    }
    for number, s in enumerate(series)
    if s.points
  ]
  return Chart(title, unit, curves, [], axes.x_ticks(), axes.y_ticks())


def draw_weights(records: Sequence[Record], scale: float) -> list[Chart]:
  """The instance weights of each round as a histogram, darker = more."""
  columns = [
    (r['round'], r['train'].get(metrics.WEIGHT_SHARES)) for r in records
  ]
  columns = _merged([(n, shares) for n, shares in columns if shares])
  if not columns:
    return []
  # A column reaches from its first round to the next one's.
  edges = [first for first, _, _ in columns] + [columns[-1][1] + 1]
  lowest, step = 1.0 + scale / 2, scale / 2 / WEIGHT_BINS
  axes = _Axes(edges, [lowest, 1.0 + scale], margin=0.0)
  largest = max(max(shares) for _, _, shares in columns)
  cells = []
  for (first, last, shares), left, right in zip(columns, edges, edges[1:]):
    which = f'round {first}' if first == last else f'rounds {first} to {last}'
    for number, share in enumerate(shares):
      if share:
        low = lowest + number * step
        cells.append(
          {
            'x': axes.x(left),
            'y': axes.y(low + step),
            'width': round(axes.x(right) - axes.x(left), 1),
            'height': round(axes.y(low) - axes.y(low + step), 1),
            'opacity': round(0.08 + 0.92 * share / largest, 3),
            'tip': f'{which}, weight {low:.3f} to {low + step:.3f}: '
            f'{share:.1%}',
          }
        )
  return [
    Chart(
      'Instance weights',
      'weight; darker is more samples',
      [],
      cells,
      axes.x_ticks(),
      axes.y_ticks(),
    )
  ]


def _merged(columns) -> list[tuple[int, int, list[float]]]:
  """(first round, last round, mean shares) of at most MAX_COLUMNS."""
  per = -(-len(columns) // MAX_COLUMNS) if columns else 1
  groups = [columns[i : i + per] for i in range(0, len(columns), per)]
  return [
    (
      group[0][0],
      group[-1][0],
      [sum(values) / len(group) for values in zip(*(s for _, s in group))],
    )
    for group in groups
  ]


class _Axes:
  """From rounds and values to positions in the drawing."""

  def __init__(
    self, rounds: Sequence[int], values: Sequence[float], margin: float = 0.05
  ):
    self._first, self._last = min(rounds), max(rounds)
    low, high = min(values), max(values)
    margin *= high - low
    if low == high:
      margin = 0.05 * abs(high) or 1.0
    # No axis below zero for what cannot be negative.
    self._low, self._high = max(low - margin, min(low, 0.0)), high + margin

  def x(self, value: float) -> float:
    span = self._last - self._first
    share = (value - self._first) / span if span else 0.5
    return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

  def y(self, value: float) -> float:
    share = (value - self._low) / (self._high - self._low)
    return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)

  def x_ticks(self) -> list[tuple[float, str]]:
    marks = _round_numbers(self._first, self._last, whole=True)
    return [(self.x(m), f'{m:g}') for m in marks]

  def y_ticks(self) -> list[tuple[float, str]]:
    return [
      (self.y(v), f'{v:g}') for v in _round_numbers(self._low, self._high)
    ]


def _round_numbers(low: float, high: float, whole: bool = False) -> list[float]:
  """At most seven multiples of 1, 2 or 5 times a power of ten in a range."""
  if low == high:
    return [low]
  power = 10.0 ** math.floor(math.log10((high - low) / 6))
  step = next(
    m * power
    for m in (1, 2, 5, 10)
    if m * power * 6 >= high - low - 1e-9 * power
  )
  step = max(step, 1.0) if whole else step
  first = math.ceil(low / step - 1e-9)
  return [
    float(f'{i * step:.10g}')
    for i in range(first, math.floor(high / step + 1e-9) + 1)
  ]


def time_split(
  records: Sequence[Record], summary: dict[str, Any] | None
) -> list[tuple[str, float]]:
  """Seconds of a run by activity."""
  parts = [
    (name, sum(r.get(key, 0.0) for r in records))
    for name, key in (
      ('training', 'seconds'),
      ('validation', 'evaluation_seconds'),
      ('waiting for a save', 'saving_seconds'),
    )
  ]
  if summary:
    spent = sum(seconds for _, seconds in parts)
    parts.append(
      ('the rest: start, test', max(0.0, summary['wall_seconds'] - spent))
    )
  return parts


def _points(
  records: Sequence[Record], path: tuple[str, ...]
) -> list[tuple[int, float]]:
  """(round, value) of the records that have a value at `path`."""
  points = []
  for record in records[1:] if path[0].endswith('seconds') else records:
    value = record
    for name in path:
      value = value.get(name) if value else None
    if value is not None:
      points.append((record['round'], value))
  return points


def _name(run: RunFolder) -> str:
  return run.path.resolve().name


def _distinct(runs: Sequence[RunFolder]) -> list[str]:
  """Names of folders; full paths if names occur twice."""
  names = [_name(run) for run in runs]
  return [
    name if names.count(name) == 1 else str(run.path)
    for name, run in zip(names, runs)
  ]
