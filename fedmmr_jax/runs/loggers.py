"""Where a run's numbers go besides its folder: TensorBoard, Weights & Biases,
MLflow, or a logger of your own.

`train` starts each logger when it knows where the run stands, gives it one
record after the other, and the summary at the end. A logger has its files, or
the id of its run elsewhere, in the run folder, so a resumed run continues
there. A logger that cannot start stops the run before it trains; one that fails
later is left out with a warning.
"""

import contextlib
import dataclasses
import importlib
import pathlib
import re
import time
import uuid
import warnings
from typing import (
  Any,
  Callable,
  ClassVar,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)

from fedmmr_jax import parts
from fedmmr_jax.errors import UserError
from fedmmr_jax.files import replace

_PROJECT = 'fedmmr_jax'
_END = 'the end'


class Logger:
  """A place that a run's numbers go to. A subclass overrides what it needs; if
  it is a dataclass, its fields are its options.

  Attributes:
    extra: the extra of this package that it needs, or ''. An instance cannot be
      made without it.
  """

  extra: ClassVar[str] = ''

  def start(self, folder: pathlib.Path, told: Mapping[str, Any]) -> None:
    """Called once, before all else.

    Args:
      folder: of the run, the same each time that it is resumed.
      told: 'flags', the settings; and in a run folder 'versions', 'machine' and
        'data_fingerprint', see `RunFolder.told`.
    """

  def log(self, record: Mapping[str, Any]) -> None:
    """Takes a round, in their order. A run that is resumed gives those of
    earlier processes again, and only those that were saved.

    Args:
      record: 'round', 1-based, and numbers, or dicts of them, as in
        `metrics.jsonl`: 'train', 'val' where the round was validated, ….
    """

  def finish(self, summary: Mapping[str, Any]) -> None:
    """Takes what is in `summary.json`, with the ranking metrics of the test;
    not called if the run was stopped."""

  def close(self) -> None:
    """Called last, whatever happened in between; also if `start` failed."""


def scalars(
  record: Mapping[str, Any], prefix: str = ''
) -> Iterator[tuple[str, float]]:
  """('val/full/HR_10', value) of every single number in a record but 'round'.
  What not all of these tools take in a name is written as _."""
  for name, value in record.items():
    name = re.sub(r'[^-/\w.]', '_', name)
    if isinstance(value, dict):
      yield from scalars(value, f'{prefix}{name}/')
    elif isinstance(value, (int, float)) and name != 'round':
      yield f'{prefix}{name}', value


def _summary(summary: Mapping[str, Any]) -> dict[str, float]:
  # Not val/…, which are the curves.
  return dict(scalars(summary, 'summary/'))


def _origin(told: Mapping[str, Any]) -> dict[str, str]:
  """What made the run, besides its settings: 'versions.jax' -> '0.11.2', …."""
  found = {}
  for name, value in told.items():
    if isinstance(value, dict) and name != 'flags':
      found |= {f'{name}.{key}': str(v) for key, v in value.items()}
    elif isinstance(value, str):
      found[name] = value
  return found


@dataclasses.dataclass
class TensorBoard(Logger):
  """Events in `tensorboard/` of the run folder, which `tensorboard
  --logdir=RUN` shows; TensorBoard itself is not needed to write them."""

  extra = 'tensorboard'

  def __post_init__(self):
    _import(self, 'tensorboardX')

  def start(self, folder: pathlib.Path, told: Mapping[str, Any]) -> None:
    # All rounds come again when a run is resumed; older events are hidden.
    self._writer = _import(self, 'tensorboardX').SummaryWriter(
      str(folder / 'tensorboard'),
      purge_step=0,
      flush_secs=1,
      max_queue=0,  # no limit: a full one would hold up the run
    )
    events = self._writer.file_writer.event_writer
    self._thread = events._worker
    # `close` waits until all is written. If the thread died, nothing reads the
    # queue, and Python must not wait for that when it exits.
    events._event_queue.cancel_join_thread()
    settings = told['flags'] | _origin(told)
    self._writer.add_text(
      'config', '\n'.join(f'    {k} = {v}' for k, v in settings.items()), 0
    )

  def log(self, record: Mapping[str, Any]) -> None:
    """Adds one round; it is on disk a second later."""
    self._add(scalars(record), record['round'])

  def finish(self, summary: Mapping[str, Any]) -> None:
    self._add(_summary(summary).items(), summary['best_round'])

  def close(self) -> None:
    self._writer.close()

  def _add(self, values: Iterable[tuple[str, float]], step: int) -> None:
    if not self._thread.is_alive():
      self._writer.flush()  # mostly fails with what ended the thread
      raise OSError('events were lost')
    for name, value in values:
      self._writer.add_scalar(name, value, step)


@dataclasses.dataclass
class WandB(Logger):
  """A run of Weights & Biases. Its id is in `wandb.id` of the run folder, its
  files are in `wandb/`.

  Attributes:
    project: whose run it is.
    entity: a user or a team; '' = your own.
    name: of the run; '' = that of the run folder.
    group: of runs that belong together.
    mode: online, offline, disabled, or auto: what WANDB_MODE says, or online.
      `wandb sync RUN/wandb/latest-run` uploads what was logged offline.
  """

  project: str = _PROJECT
  entity: str = ''
  name: str = ''
  group: str = ''
  mode: str = dataclasses.field(
    default='auto',
    metadata={'choices': ('auto', 'online', 'offline', 'disabled')},
  )
  extra = 'wandb'

  def __post_init__(self):
    _import(self, 'wandb')

  def start(self, folder: pathlib.Path, told: Mapping[str, Any]) -> None:
    wandb = _import(self, 'wandb')
    self._is_finished = False
    folder.mkdir(parents=True, exist_ok=True)
    self._run = wandb.init(
      project=self.project,
      entity=self.entity or None,
      name=self.name or folder.resolve().name,
      group=self.group or None,
      mode=None if self.mode == 'auto' else self.mode,
      id=_kept_id(folder / 'wandb.id', lambda: uuid.uuid4().hex[:12]),
      resume='allow',
      dir=str(folder),
      config={**told['flags'], 'origin': _origin(told)},
      allow_val_change=True,
      settings=wandb.Settings(console='off'),  # stdout stays as it is
    )

  def log(self, record: Mapping[str, Any]) -> None:
    # wandb takes each step once. A new file, of a resumed offline run, has all.
    if record['round'] >= self._run.starting_step:
      self._run.log(dict(scalars(record)), step=record['round'])

  def finish(self, summary: Mapping[str, Any]) -> None:
    self._run.summary.update(_summary(summary))
    self._is_finished = True

  def close(self) -> None:
    self._run.finish(exit_code=0 if self._is_finished else 1)


@dataclasses.dataclass
class MLflow(Logger):
  """A run of MLflow: settings are its parameters, what made it its tags. Its id
  is in `mlflow.id` of the run folder.

  Attributes:
    uri: where it is kept, such as sqlite:///mlflow.db or http://host:5000;
      '' = what MLFLOW_TRACKING_URI says, or MLflow's own default.
    experiment: whose run it is; made if there is none of this name.
    name: of the run; '' = that of the run folder.
  """

  uri: str = ''
  experiment: str = _PROJECT
  name: str = ''
  extra = 'mlflow'

  def __post_init__(self):
    _import(self, 'mlflow')

  def start(self, folder: pathlib.Path, told: Mapping[str, Any]) -> None:
    mlflow = _import(self, 'mlflow')
    self._entities = _import(self, 'mlflow.entities')
    self._is_finished = False
    self._client = mlflow.MlflowClient(self.uri or None)
    folder.mkdir(parents=True, exist_ok=True)
    self._id = _kept_id(folder / 'mlflow.id', lambda: self._new(folder, told))
    self._client.update_run(self._id, status='RUNNING')
    # A point that is logged twice would be there twice.
    seen = self._client.get_metric_history(self._id, 'round')
    self._last_round = max((metric.step for metric in seen), default=0)

  def _new(self, folder: pathlib.Path, told: Mapping[str, Any]) -> str:
    found = self._client.get_experiment_by_name(self.experiment)
    experiment = (
      found.experiment_id
      if found
      else self._client.create_experiment(self.experiment)
    )
    run = self._client.create_run(
      experiment,
      run_name=self.name or folder.resolve().name,
      tags={'folder': str(folder.resolve())} | _origin(told),
    )
    settings = [
      self._entities.Param(name, str(value))
      for name, value in told['flags'].items()
    ]
    self._client.log_batch(run.info.run_id, params=settings)
    return run.info.run_id

  def log(self, record: Mapping[str, Any]) -> None:
    if record['round'] > self._last_round:
      self._batch(dict(scalars(record)), record['round'])
      # Apart: it says that the others are there.
      self._batch({'round': record['round']}, record['round'])

  def finish(self, summary: Mapping[str, Any]) -> None:
    self._batch(_summary(summary), summary['best_round'])
    self._is_finished = True

  def close(self) -> None:
    self._client.set_terminated(
      self._id, 'FINISHED' if self._is_finished else 'KILLED'
    )

  def _batch(self, values: Mapping[str, float], step: int) -> None:
    now = int(1000 * time.time())
    metric = self._entities.Metric
    self._client.log_batch(
      self._id,
      [metric(name, value, now, step) for name, value in values.items()],
    )


LOGGERS: dict[str, type[Logger]] = {
  'tensorboard': TensorBoard,
  'wandb': WandB,
  'mlflow': MLflow,
}


def of(texts: Sequence[str]) -> list[Logger]:
  """Loggers by their names, with options: 'wandb,project=x', or
  'my_package.module:Thing'.

  Raises:
    UserError: there is none of a name, it has no such option, or the extra that
      it needs is missing.
  """
  return [parts.built(text, LOGGERS, Logger, 'logger') for text in texts]


class Started:
  """Loggers of a run as one that cannot fail. A context manager: leaving it
  closes them.

  Args:
    loggers: what to start.
    folder: of the run.
    told: about it, see `Logger.start`.

  Raises:
    UserError: one of them cannot start.
  """

  def __init__(
    self,
    loggers: Sequence[Logger],
    folder: pathlib.Path,
    told: Mapping[str, Any],
  ):
    self._loggers: list[Logger] = []
    for logger in loggers:
      try:
        logger.start(folder, told)
      except Exception as error:
        _close_quietly(logger)
        self.close()
        raise UserError(
          f'logger {type(logger).__name__} cannot start: {_line(error)}'
        ) from error
      self._loggers.append(logger)

  def __enter__(self) -> 'Started':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def log(self, record: Mapping[str, Any]) -> None:
    self._each(lambda logger: logger.log(record), f'round {record["round"]}')

  def finish(self, summary: Mapping[str, Any]) -> None:
    self._each(lambda logger: logger.finish(summary), 'the summary')

  def close(self) -> None:
    self._each(lambda logger: logger.close(), _END)
    self._loggers = []

  def _each(self, call: Callable[[Logger], None], what: str) -> None:
    for logger in tuple(self._loggers):
      try:
        call(logger)
      except Exception as error:
        # By identity: dataclasses with the same options are equal.
        self._loggers = [x for x in self._loggers if x is not logger]
        if what != _END:
          _close_quietly(logger)
        warnings.warn(
          f'logger {type(logger).__name__} failed at {what}, and is left out '
          f'from here on: {_line(error)}',
          stacklevel=3,
        )


def _close_quietly(logger: Logger) -> None:
  """Closes one that failed; what it failed with is told already."""
  with contextlib.suppress(Exception):
    logger.close()


def _line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__


def _kept_id(path: pathlib.Path, new: Callable[[], str]) -> str:
  """The id in a file, which is written first if it does not exist."""
  if not path.exists():
    replace(path, new() + '\n')
  return path.read_text('utf-8').strip()


def _import(logger: Logger, module: str) -> Any:
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise UserError(
      f'logger {type(logger).__name__} needs {module} ({error}): '
      f"pip install 'fedmmr_jax[{logger.extra}]'"
    ) from None
