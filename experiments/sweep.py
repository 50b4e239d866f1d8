"""A search for settings: trials over a space -> a table and a flagfile.

    python -m experiments.sweep --space=space.txt --trials=20 --workdir=sweep \\
        --flagfile=experiments/presets/recommended.flags \\
        --data_dir=path/to/ml-1m
    python -m experiments.train --flagfile=sweep/best.flags

The other flags are the base, of which the space varies some
(`experiments/space.py`). Optuna suggests what to try; a trial that the
validation shows to be below the others ends early. Trials are judged by the
validation, never by the test. The folder keeps them: the same command goes on
where the last one stopped.
"""

import json
import pathlib
import sys
from typing import Any, Sequence

from absl import flags
from tqdm import tqdm

from experiments import app, console, variants
from experiments import space as space_lib
from experiments.space import Space
from fedmmr_jax import parts
from fedmmr_jax.config import RunConfig
from fedmmr_jax.data import load
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import sweep
from fedmmr_jax.evaluation.sweep import Objective, Pruner, PRUNERS
from fedmmr_jax.files import replace
from fedmmr_jax.runs import provenance, run_folder
from fedmmr_jax.runs.run_folder import MAY_CHANGE

_SPACE = flags.DEFINE_string(
  'space', '', 'file with what varies, a flag a line; see experiments/space.py'
)
_TRIALS = flags.DEFINE_integer(
  'trials',
  20,
  'how many trials there are in the end, those of earlier calls included',
  lower_bound=1,
)
_METRIC = flags.DEFINE_string(
  'metric',
  'full/NDCG@10',
  'what trials are judged by, the mean over the seeds: a metric of the '
  'validation, at the round that --select_by chooses',
)
_PRUNER = flags.DEFINE_string(
  'pruner',
  'median',
  'which trials end early: median,trials=4,rounds=0 (once so many trials are '
  'complete, and a trial has so many rounds, those below the median); '
  'hyperband,rounds=10,factor=3; none; or your own as my_package.module:Thing',
)
_SEEDS = flags.DEFINE_list(
  'seeds', ['0'], 'seeds that each trial is trained with'
)

app.define_config_flags()

REQUEST, STUDY = 'sweep.json', 'trials.db'
TABLE, BEST = 'trials.md', 'best.flags'


def main() -> None:
  if not app.WORKDIR.value:
    raise UserError('name a folder for the results with --workdir')
  if not _SPACE.value:
    raise UserError('name a file with what varies with --space')
  sweep.optuna()  # before the data is read
  base = app.config_from_flags()
  objective = Objective.of(_METRIC.value, base)
  pruner = parts.built(_PRUNER.value, PRUNERS, Pruner, 'pruner').build(base)
  space = space_lib.read(app.find_file(_SPACE.value), base)
  seeds = variants.seeds(_SEEDS.value)
  workdir = pathlib.Path(app.WORKDIR.value)
  loaded = load.load(base)
  print('\n'.join([console.data_report(loaded), *console.no_gpu(base)]))
  with run_folder.hold(workdir) as lock:
    if lock.note:
      print(lock.note)
    _check_request(workdir, base, space, seeds, loaded.dataset.fingerprint())
    study = sweep.open_study(workdir / STUDY, pruner)
    for number in sweep.take_back(study):
      print(f'trial {number} was cut off')
    told = f'{len(sweep.finished(study))} of {_TRIALS.value} trials are there'
    print(f'\n{told}, {workdir}\n', flush=True)
    trials = sweep.Trials(base, space, objective, seeds, loaded)
    try:
      _run(study, trials, base, space, seeds, workdir)
    except KeyboardInterrupt:
      print('stopped; the same command goes on', file=sys.stderr)
      sys.exit(app.INTERRUPTED)
    _write(study, base, space, seeds, workdir)
  if not sweep.complete(study):
    raise UserError(
      f'{workdir}: no trial finished'
      + ''.join(
        f'; the last was refused: {trial.user_attrs[sweep.REFUSED]}'
        for trial in sweep.finished(study)[-1:]
        if sweep.REFUSED in trial.user_attrs
      )
    )
  print((workdir / TABLE).read_text('utf-8'))
  print(f'{workdir / TABLE}   {workdir / BEST}')


def _run(
  study: Any,
  trials: sweep.Trials,
  base: RunConfig,
  space: Space,
  seeds: Sequence[int],
  workdir: pathlib.Path,
) -> None:
  """Runs the trials that are missing."""
  while len(sweep.finished(study)) < _TRIALS.value:
    trial, changes = trials.ask(study)
    name = f'trial {trial.number}'
    print(name, *(f'--{k}={v}' for k, v in changes.items()), flush=True)
    num_rounds = int(changes.get('num_rounds', base.server.num_rounds))
    with tqdm(
      total=num_rounds, unit='round', disable=None, file=sys.stdout, desc=name
    ) as bar:

      def on_round(number, values):
        if values:
          figures = ' '.join(f'{value:.4f}' for value in values)
          tqdm.write(
            f'{name}  round {number}/{num_rounds}  val {_METRIC.value} '
            + figures,
            file=sys.stdout,
          )
          sys.stdout.flush()
        bar.update()

      trials.run(study, trial, changes, on_round)
    found = sweep.finished(study)[-1]
    print(f'{name}: {_ended(found)}\n', flush=True)
    _write(study, base, space, seeds, workdir)


def _check_request(
  workdir: pathlib.Path,
  base: RunConfig,
  space: Space,
  seeds: Sequence[int],
  fingerprint: str,
) -> None:
  """Records what is asked for, or checks that it is what the folder's trials
  were made for.

  Raises:
    UserError: it is not, or the record is damaged.
  """
  asked = {
    'metric': _METRIC.value,
    'seeds': list(seeds),
    'space': {line.flag: line.text for line in space.lines},
    'flags': _compared(base),
    'data_fingerprint': fingerprint,
  }
  program = provenance.program()
  path = workdir / REQUEST
  if not path.exists():
    if any(workdir.glob('[!.]*')):
      raise UserError(f'{workdir} holds other files; name another folder')
    text = json.dumps(asked | {'program': program}, indent=2)
    replace(path, text + '\n')
    return
  try:
    before = json.loads(path.read_text('utf-8'))
    # By way of a config, so that a setting added since has its default.
    before['flags'] = _compared(RunConfig.from_flat_dict(before['flags']))
    changed = _changed(before, asked)
    moved = provenance.difference(before['program'], program)
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise UserError(f'{path}: damaged ({error!r})') from None
  if changed:
    raise UserError(
      f'{workdir} holds another sweep ({"; ".join(changed)}); name another '
      'folder'
    )
  if moved:
    print(f'earlier trials were made under other conditions: {moved}')


def _changed(before: dict[str, Any], asked: dict[str, Any]) -> list[str]:
  """In a few words each, what is asked for now and was not before."""
  flags_ = before['flags'], asked['flags']
  lines = before['space'], asked['space']
  found = [
    f'{name}={flags_[0][name]}, now {flags_[1][name]}'
    for name in flags_[1]
    if flags_[0][name] != flags_[1][name]
  ]
  found += [
    f'{lines[0].get(name, f"{name} fixed")}, now {lines[1].get(name, "fixed")}'
    for name in lines[0] | lines[1]
    if lines[0].get(name) != lines[1].get(name)
  ]
  found += [
    f'{key} {before[key]}, now {asked[key]}'
    for key in ('metric', 'seeds')
    if before[key] != asked[key]
  ]
  if before['data_fingerprint'] != asked['data_fingerprint']:
    found.append('other data')
  return found


def _compared(config: RunConfig) -> dict[str, Any]:
  """The settings that all trials of a folder share."""
  return {
    name: value
    for name, value in config.as_flat_dict().items()
    if name not in MAY_CHANGE or name in ('num_rounds', 'eval_every')
  }


def _write(
  study: Any,
  base: RunConfig,
  space: Space,
  seeds: Sequence[int],
  workdir: pathlib.Path,
) -> None:
  """The table, and the flagfile of the best trial if there is one."""
  replace(workdir / TABLE, markdown(study, space, seeds))
  best = sweep.complete(study)[:1]
  if best:
    count = len(sweep.finished(study))
    replace(workdir / BEST, flagfile(best[0], base, seeds, count))


def flagfile(
  trial: Any, base: RunConfig, seeds: Sequence[int], trials: int
) -> str:
  """The settings of a trial as `--flagfile` takes them: those of the base that
  are not defaults, then what the trial changed."""
  defaults = RunConfig().as_flat_dict()
  changes = trial.user_attrs[sweep.CHANGES]
  fixed = {
    name: value
    for name, value in base.as_flat_dict().items()
    if value != defaults[name] and name not in changes
  }
  return '\n'.join(
    [
      f'# Trial {trial.number}, the best of {trials}: validation '
      f'{_METRIC.value} {trial.value:.4f},',
      f'# mean of seed(s) {", ".join(map(str, seeds))}. It was chosen by this '
      'value, which is therefore',
      '# too high on average; a test of it is not.',
      *(f'--{name}={parts.written(value)}' for name, value in fixed.items()),
      '# Found:',
      *(f'--{name}={value}' for name, value in changes.items()),
      '',
    ]
  )


def markdown(study: Any, space: Space, seeds: Sequence[int]) -> str:
  """The trials, best first, and what mattered if that can be said."""
  best = sweep.complete(study)
  others = [
    t for t in sweep.finished(study) if t.value is None or t not in best
  ]
  names = [varied.name for varied in space.varied]
  lines = [
    [
      str(trial.number),
      *(_written(trial.params.get(name)) for name in names),
      _ended(trial),
      f'{trial.user_attrs.get(sweep.SECONDS, 0):.0f}',
    ]
    for trial in (*best, *others)
  ]
  header = ['trial', *names, f'validation {_METRIC.value}', 'seconds']
  text = [
    f'# {len(lines)} trials, seed(s) {", ".join(map(str, seeds))}',
    '',
    *('| ' + ' | '.join(x) + ' |' for x in (header, ['---'] * len(header))),
    *('| ' + ' | '.join(line) + ' |' for line in lines),
    '',
  ]
  shares = sweep.importance(study)
  if shares:
    text += [
      'What decides whether a trial is among the best (PED-ANOVA, a rough '
      'guide): '
      + ', '.join(f'{name} {share:.2f}' for name, share in shares.items()),
      '',
    ]
  return '\n'.join(text)


def _written(value: Any) -> str:
  return f'{value:.4g}' if isinstance(value, float) else str(value)


def _ended(trial: Any) -> str:
  """How a trial ended, in a few words."""
  attributes = trial.user_attrs
  if sweep.REFUSED in attributes:
    return f'refused: {app.as_flags(attributes[sweep.REFUSED])}'
  if trial.value is None or sweep.ROUND not in attributes:
    last = max(trial.intermediate_values, default=0)
    return f'pruned in round {last}'
  rounds = sorted(set(attributes[sweep.ROUND]))
  each = attributes[sweep.OF_SEEDS]
  told = f' ({", ".join(f"{x:.4f}" for x in each)})' if len(each) > 1 else ''
  return f'{trial.value:.4f}{told}, round {", ".join(map(str, rounds))}'


def cli() -> None:
  app.run(main)


if __name__ == '__main__':
  cli()
