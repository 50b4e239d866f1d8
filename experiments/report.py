"""Draws runs as one self-contained page that opens offline.

    python -m experiments.report RUN                  # RUN/report.html
    python -m experiments.report --compare RUN RUN …  # comparison.html

`experiments.train` draws the first one at the end of a run; this command draws
it while the run is in progress. `--output` names another file for the
comparison.
"""

import pathlib

from absl import flags

from experiments import app
from fedmmr_jax.errors import UserError
from fedmmr_jax.runs import report
from fedmmr_jax.runs.run_folder import RunFolder

_COMPARE = flags.DEFINE_boolean(
  'compare', False, 'draw the named runs over one another'
)
_OUTPUT = flags.DEFINE_string(
  'output', 'comparison.html', 'the page of --compare'
)


def main(*folders: str) -> None:
  runs = [RunFolder(folder) for folder in folders]
  for run in runs:
    run.check_format()  # before anything is drawn
  if _COMPARE.value:
    if len(runs) < 2:
      raise UserError('--compare needs two run folders or more')
    path = pathlib.Path(_OUTPUT.value)
    report.write_comparison(runs, path)
  elif len(runs) == 1:
    path = report.write(runs[0])
  else:
    raise UserError('name one run folder, or several behind --compare')
  print(path)


def cli() -> None:
  app.run(main, commands=True)


if __name__ == '__main__':
  cli()
