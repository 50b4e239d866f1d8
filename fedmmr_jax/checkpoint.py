"""Orbax checkpoints, one atomic step a round; nothing else touches Orbax.

`rounds/<n>/` holds the `FederationState` after round n, `Progress`, and as
custom metadata the round's line of `metrics.jsonl`. Orbax renames a step into
place when it is complete, so a half-written one never has a round's name.
"""

import contextlib
import pathlib
from typing import Any, Iterator, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from fedmmr_jax.errors import UserError
from fedmmr_jax.federation import FederationState


class Progress(NamedTuple):
  """Where a run stands, beside its state.

  Attributes:
    best_round: [] int32 round with the best validation so far, 0 = none.
    best_value: [] float32 its HR@10, sampled protocol; −1 before.
  """

  best_round: jax.Array
  best_value: jax.Array

  @classmethod
  def start(cls) -> 'Progress':
    return cls(jnp.int32(0), jnp.float32(-1.0))

  def updated(self, round_number: int, value: float) -> 'Progress':
    """Progress after a validation; the first of equals stays the best."""
    value = jnp.float32(value)  # as saved: a resumed run decides alike
    if value <= self.best_value:
      return self
    return Progress(jnp.int32(round_number), value)


class Checkpoint(NamedTuple):
  """One saved round."""

  state: FederationState
  progress: Progress


class Rounds:
  """The saved rounds of one run folder.

  Args:
    workdir: the run folder.
    create: whether to make `rounds/` if it is absent.

  Raises:
    UserError: there is no `rounds/` and `create` is False.
  """

  def __init__(self, workdir: str | pathlib.Path, create: bool = False):
    self.folder = pathlib.Path(workdir) / 'rounds'
    if not create and not self.folder.exists():
      raise UserError(
          f'{self.folder}: no such folder; name a run folder that '
          'experiments.train has written')
    # Leftovers of a process that was killed while saving are cleared only by
    # the one who writes.
    self._checkpointer = ocp.training.Checkpointer(
        self.folder.absolute(), cleanup_tmp_directories=create)

  def numbers(self) -> list[int]:
    """Saved rounds, ascending."""
    return sorted(c.step for c in self._checkpointer.checkpoints)

  def best(self) -> int:
    """The round with the best validation; the last one if none had any.

    Raises:
      UserError: nothing is saved.
    """
    last = self.last()
    return self.metadata(last)['best_round'] or last

  def last(self) -> int:
    """The last saved round.

    Raises:
      UserError: nothing is saved.
    """
    saved = self.numbers()
    if not saved:
      raise UserError(f'{self.folder}: no round is saved yet')
    return saved[-1]

  def save(self, round_number: int, checkpoint: Checkpoint,
           record: dict[str, Any], wall_seconds: float) -> None:
    """Writes one round; returns when it is complete."""
    self._checkpointer.save(
        round_number, _without_empty(checkpoint), custom_metadata={
            'record': record, 'wall_seconds': wall_seconds,
            'best_round': int(checkpoint.progress.best_round)})

  def load(self, round_number: int, like: Checkpoint) -> Checkpoint:
    """Reads one round into the structure of `like`.

    Raises:
      UserError: no such round, or one that cannot be read.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _without_empty(like))
    with self._reading(round_number):
      saved = self._checkpointer.load(round_number, abstract)
    return jax.tree.map(
        lambda x, found: found if x.size else jnp.zeros(x.shape, x.dtype),
        like, saved)

  def load_as_saved(self, round_number: int) -> dict[str, Any]:
    """Reads one round without knowing its structure: nested dicts and lists
    of NumPy arrays.

    Raises:
      UserError: no such round, or one that cannot be read.
    """
    with self._reading(round_number):
      return jax.tree.map(np.asarray, self._checkpointer.load(round_number))

  def metadata(self, round_number: int) -> dict[str, Any]:
    """{'record': the round's line of metrics.jsonl, 'wall_seconds': spent so
    far, 'best_round': by then, 0 = none validated}.

    Raises:
      UserError: no such round, or one that cannot be read.
    """
    with self._reading(round_number):
      return self._checkpointer.metadata(round_number).custom_metadata

  def size(self, round_number: int) -> int:
    """Bytes a saved round takes on disk."""
    return sum(path.stat().st_size
               for path in (self.folder / str(round_number)).rglob('*')
               if path.is_file())

  def close(self) -> None:
    self._checkpointer.close()

  @contextlib.contextmanager
  def _reading(self, round_number: int) -> Iterator[None]:
    saved = self.numbers()
    if round_number not in saved:
      listed = ', '.join(map(str, saved)) or 'none'
      raise UserError(
          f'{self.folder}: there is no round {round_number}; saved: {listed}')
    try:
      with warnings.catch_warnings():
        # Loading without a sharding is meant: the arrays may have been saved
        # on devices that this machine does not have.
        warnings.filterwarnings('ignore', message='Sharding info not provided')
        yield
    except (ValueError, KeyError, OSError, TypeError) as error:
      reason = ' '.join(str(error).split())[:160]
      raise UserError(
          f'{self.folder / str(round_number)}: cannot be read '
          f'({type(error).__name__}: {reason}); move it away and go on from '
          'an earlier round') from error


def _without_empty(tree: Any) -> Any:
  """None for arrays without an entry (prototypes of a run without texts),
  which Orbax does not save."""
  return jax.tree.map(lambda x: x if x.size else None, tree)
