"""`report.html`: one self-contained page about a run, drawn from its files."""

from typing import Any, NamedTuple, Sequence

import jinja2

from fedmmr_jax.data.features import IntegrityReport
from fedmmr_jax.run_folder import REPORT, RunFolder

WIDTH, HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 34


class Series(NamedTuple):
  """One curve: its label and (round, value) points."""

  label: str
  points: list[tuple[int, float]]


class Chart(NamedTuple):
  """A figure as the template draws it.

  Attributes:
    title: heading.
    unit: what the vertical axis shows.
    curves: label, colour number, polyline and hover dots of each series.
    x_ticks: (position, label).
    y_ticks: (position, label).
  """

  title: str
  unit: str
  curves: list[dict[str, Any]]
  x_ticks: list[tuple[float, str]]
  y_ticks: list[tuple[float, str]]


def write(run: RunFolder, integrity: Sequence[IntegrityReport]) -> None:
  """Writes the page next to the run's other files."""
  environment = jinja2.Environment(
      loader=jinja2.PackageLoader('fedmmr_jax'), autoescape=True,
      trim_blocks=True, lstrip_blocks=True)
  page = environment.get_template('report.html.j2').render(
      name=run.path.resolve().name, summary=run.summary(), charts=charts(run.records()),
      integrity=integrity, flags=run.config().as_flat_dict(),
      width=WIDTH, height=HEIGHT, left=_LEFT, right=WIDTH - _RIGHT,
      top=_TOP, bottom=HEIGHT - _BOTTOM)
  (run.path / REPORT).write_text(page, 'utf-8')


def charts(records: Sequence[dict[str, Any]]) -> list[Chart]:
  """The figures of a run; those without any value are left out."""
  def train(*names):
    return [Series(name, _points(records, ('train', name))) for name in names]

  def val(metric):
    return [Series(f'{metric} {protocol}',
                   _points(records, ('val', protocol, metric)))
            for protocol in ('sampled', 'full')]

  figures = [
      ('Validation', 'HR@10', val('HR@10')),
      ('Validation', 'NDCG@10', val('NDCG@10')),
      ('Recommendation loss', 'nats', train('loss', 'rec_loss')),
      ('Contrastive loss', 'nats', train('contrastive_loss')),
      ('Router', 'mean weight', train('w_visual', 'w_semantic')),
      ('Instance weight', 'mean', train('instance_weight')),
      ('Hardest tenth', 'share of the contrastive loss',
       train('hardest_share')),
      ('Gradient', 'mean norm of a local step',
       train('gradient_backbone', 'gradient_visual', 'gradient_semantic')),
      ('Client memory', 'share of slots in use', train('memory_fill')),
      ('Time', 'seconds a round',
       [Series('training', _points(records, ('seconds',))),
        Series('evaluation', _points(records, ('evaluation_seconds',)))]),
  ]
  return [draw(title, unit, filled) for title, unit, series in figures
          if (filled := [s for s in series if s.points])]


def draw(title: str, unit: str, series: Sequence[Series]) -> Chart:
  """Scales series into the drawing area."""
  rounds = [x for s in series for x, _ in s.points]
  values = [y for s in series for _, y in s.points]
  low, high = min(values), max(values)
  margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
  # No axis below zero for what cannot be negative.
  low, high = max(low - margin, min(low, 0.0)), high + margin
  first, last = min(rounds), max(rounds)

  def x(value):
    share = (value - first) / (last - first) if last > first else 0.5
    return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

  def y(value):
    share = (value - low) / (high - low)
    return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)

  curves = [
      {'label': s.label, 'colour': number,
       'line': ' '.join(f'{x(a)},{y(b)}' for a, b in s.points),
       'dots': [(x(a), y(b), f'{s.label}, round {a}: {b:.4g}')
                for a, b in s.points]}
      for number, s in enumerate(series)]
  marks = sorted({first + round(i * (last - first) / 5) for i in range(6)})
  return Chart(
      title=title, unit=unit, curves=curves,
      x_ticks=[(x(m), str(m)) for m in marks],
      y_ticks=[(y(v), f'{v:.3g}')
               for v in (low + i * (high - low) / 4 for i in range(5))])


def _points(records, path: tuple[str, ...]) -> list[tuple[int, float]]:
  """(round, value) of the records that have a value at `path`."""
  points = []
  for record in records:
    value = record
    for name in path:
      value = value.get(name) if value else None
    if value is not None:
      points.append((record['round'], value))
  return points
