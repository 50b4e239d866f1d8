"""`--tensorboard`: the numbers of `metrics.jsonl` as TensorBoard events.

`tensorboard --logdir=RUN/tensorboard` shows them (TensorBoard itself is not
needed to write them).
"""

import pathlib
from typing import Any, Iterator

from fedmmr_jax.errors import UserError

FOLDER = 'tensorboard'


class TensorBoard:
  """Writes one run's records.

  Args:
    workdir: the run folder.
    first_round: the next round to come; events of later rounds, which a killed
      process left, are hidden.

  Raises:
    UserError: the extra is not installed.
  """

  def __init__(self, workdir: pathlib.Path, first_round: int):
    self._writer = _writer_class()(
      str(workdir / FOLDER), purge_step=first_round, flush_secs=1
    )

  def __enter__(self) -> 'TensorBoard':
    return self

  def __exit__(self, *exception: Any) -> None:
    self._writer.close()

  def log(self, record: dict[str, Any]) -> None:
    """Adds one round's record; it is on disk a second later."""
    for name, value in scalars(record):
      # As the writer would, but it warns: HR@10 is HR_10 there.
      self._writer.add_scalar(name.replace('@', '_'), value, record['round'])


def check_installed() -> None:
  """Raises UserError if the extra is missing."""
  _writer_class()


def scalars(
  record: dict[str, Any], prefix: str = ''
) -> Iterator[tuple[str, float]]:
  """('train/loss', value) of every single number in a record."""
  for name, value in record.items():
    if isinstance(value, dict):
      yield from scalars(value, f'{prefix}{name}/')
    elif isinstance(value, (int, float)) and name != 'round':
      yield f'{prefix}{name}', value


def _writer_class():
  try:
    from tensorboardX import SummaryWriter
  except ImportError:
    raise UserError(
      "--tensorboard needs tensorboardX: pip install 'fedmmr_jax[tensorboard]'"
    ) from None
  return SummaryWriter
