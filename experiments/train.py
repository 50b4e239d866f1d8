"""Trains FedDMMR by simulated federated learning.

    python -m experiments.train --flagfile=experiments/presets/synthetic.flags
    python -m experiments.train --flagfile=experiments/presets/paper.flags \\
        --data_dir=path/to/ml-1m

Flags after the preset override it; `--helpfull` lists all flags.
"""

import pathlib
import signal
import sys
import time
import warnings
from typing import Any, Callable

from absl import flags
from tqdm import tqdm

from experiments import app, console, stages
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.config import RunConfig
from fedmmr_jax.data import load
from fedmmr_jax.errors import UserError
from fedmmr_jax.runs import loggers, report, run_folder, supervision, training
from fedmmr_jax.runs.checkpoint import Rounds, saved_rounds
from fedmmr_jax.runs.run_folder import RunFolder

_RESUME = flags.DEFINE_boolean(
  'resume',
  False,
  'continue the run in --workdir with its settings; starts '
  'afresh where there is none',
)

_STAGES = flags.DEFINE_string(
  'stages',
  '',
  'file with a run a line, name: --flag=value …, each from '
  'the best round of the one before; see experiments/stages.py',
)

_LOGGERS = flags.DEFINE_multi_string(
  'logger',
  [],
  'log the run elsewhere too: tensorboard; wandb, as in wandb,project=x; '
  'mlflow, as in mlflow,uri=sqlite:///runs.db; or your own as '
  'my_package.module:Thing. May be given several times; see docs/tracking.md',
)

_STUCK_MINUTES = flags.DEFINE_float(
  'stuck_minutes',
  30.0,
  'end a run that has done nothing new for so long (a '
  'round, a validation, a test each count anew); 0 = wait for ever',
  lower_bound=0.0,
)

app.define_config_flags()


def main() -> None:
  loggers.of(_LOGGERS.value)  # refused before anything is read or written
  warnings.formatwarning = lambda message, *_: f'warning: {message}\n'
  workdir = pathlib.Path(_workdir())
  stop = StopSignal()
  try:
    chained = stages.saved(workdir)
    if _STAGES.value or chained:
      train_stages(workdir, chained, stop)
    else:
      run = RunFolder(workdir)
      _check_free(run)
      before = None
      if run.holds_run():
        run.check_format()  # its settings may be gone since
        before = run.flags()
      train_run(run, app.config_from_flags(before), stop)
  except Stopped:
    print(
      'stopped; continue with python -m experiments.train --resume '
      f'--workdir={workdir}',
      file=sys.stderr,
    )
    sys.exit(app.INTERRUPTED)


def train_run(run: RunFolder, config: RunConfig, stop: 'StopSignal') -> None:
  """Trains one run to its end and writes its report."""
  loaded = load.load(config)
  print(console.data_report(loaded))
  simulation = simulation_lib.build(config, loaded.dataset, loaded.cold)
  print(console.banner(simulation))
  # Only before the first round; refused before anything is written.
  if not saved_rounds(run.path) and simulation.warm_start:
    print(
      '\n'
      + console.warm_start_report(
        simulation.warm_start, config.client.frozen_groups
      )
    )
  stop.check()
  run.start(config, loaded.dataset, loaded.integrity)
  print(f'\nrun folder  {run.path}')
  notes = (run.lock_note, run.moved(), supervision.last_end(run.path))
  for note in filter(None, notes):
    print(note)
  rounds = Rounds(run.path, create=True)
  for path in rounds.clear_leftovers():
    print(f'passed over {path}: half written when the run was cut off')
  print('compiling, the first round takes longer\n', flush=True)

  done, figures = max(rounds.numbers(), default=0), {}
  with (
    supervision.Supervisor(
      run.path,
      _STUCK_MINUTES.value,
      f' with --resume --workdir={run.path}; a step that may take longer wants '
      'a larger --stuck_minutes',
    ) as supervisor,
    tqdm(
      total=config.server.num_rounds,
      initial=done,
      unit='round',
      disable=None,
      file=sys.stdout,
    ) as bar,
  ):

    def on_round(record):
      tqdm.write(
        console.round_line(record, config.server.num_rounds), file=sys.stdout
      )
      sys.stdout.flush()
      figures.update(console.progress(record))
      bar.set_postfix(figures)
      bar.update()
      stop.check()  # leaving waits for the round to be saved

    stop.note = supervisor.note
    summary = training.train(
      simulation, run, on_round, supervisor.step, loggers.of(_LOGGERS.value)
    )
  path = report.write(run)
  print(console.final_table(summary))
  print(f'\nrun folder  {run.path}   report  {path}')


def train_stages(
  workdir: pathlib.Path, saved: dict[str, Any] | None, stop: 'StopSignal'
) -> None:
  """Trains the runs of `--stages`, or resumes those in the folder."""
  if saved and not _RESUME.value:
    raise UserError(
      f'--workdir={workdir} already holds staged runs; continue them with '
      '--resume or name another folder'
    )
  base = app.config_from_flags(saved['flags'] if saved else None)
  lines = stages.read(app.find_file(_STAGES.value)) if _STAGES.value else None
  if saved and lines not in (None, saved['stages']):
    raise UserError(
      f'--workdir={workdir} holds other stages than --stages='
      f'{_STAGES.value}; leave the flag out to continue them'
    )
  lines = lines or saved['stages']
  chain = stages.chain(workdir, base, lines)
  if not saved:
    _check_free(RunFolder(workdir))
    stages.save(workdir, base, lines)
  for number, stage in enumerate(chain, 1):
    stop.check()
    print(f'\nstage {number} of {len(chain)}: {stage.name}\n')
    if stage.run.summary():
      report.write(stage.run)  # a kill may have come before it
      print(f'finished, in {stage.run.path}')
    else:
      train_run(stage.run, _continued(stage), stop)


def _check_free(run: RunFolder) -> None:
  if run.holds_run() and not _RESUME.value:
    raise UserError(
      f'--workdir={run.path} already holds a run; continue it with '
      '--resume or name another folder'
    )
  run.check_free(_RESUME.value)


def _continued(stage: stages.Stage) -> RunConfig:
  """A stage's settings; of a started one its own, but for the place of the
  data and the like, if the command line names them."""
  if not stage.run.holds_run():
    return stage.config
  given = {
    name: flags.FLAGS[name].value
    for name in run_folder.MAY_CHANGE
    if name != 'num_rounds' and flags.FLAGS[name].present
  }
  return RunConfig.from_flat_dict(stage.run.flags() | given).validate()


class Stopped(Exception):
  """A signal asked the run to stop, and the round it was in is saved."""


class StopSignal:
  """Turns Ctrl-C, SIGTERM and a lost terminal into a stop after the current
  round.

  A second signal ends the process at once; saved rounds stay intact.

  Attributes:
    note: called with a short description of the signal.
  """

  def __init__(self):
    self._asked = False
    self.note: Callable[[str], None] = lambda note: None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      # nohup has SIGHUP ignored, and so has a shell's & Ctrl-C.
      if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, self._ask)

  def check(self) -> None:
    """Raises Stopped if a signal has come."""
    if self._asked:
      raise Stopped

  def _ask(self, number, frame) -> None:
    del frame
    self._asked = True
    signal.signal(number, signal.SIG_DFL)
    self.note(f'asked to stop by {signal.Signals(number).name}')
    print(
      '\nstopping when the round is done; once more to stop at once',
      file=sys.stderr,
    )


def _workdir() -> str:
  if app.WORKDIR.value:
    return app.WORKDIR.value
  if _RESUME.value:
    raise UserError('--resume needs --workdir, the folder of the run')
  return time.strftime(f'checkpoints/{flags.FLAGS.dataset}-%Y%m%d-%H%M%S')


def cli() -> None:
  app.run(main)


if __name__ == '__main__':
  cli()
