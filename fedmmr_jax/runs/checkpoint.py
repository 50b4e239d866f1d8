"""Orbax checkpoints, one atomic step per round; no other module uses Orbax.

`rounds/<n>/` holds the `FederationState` after round n, `Progress`, the round's
line of `metrics.jsonl` as custom metadata, and `checksums.json` over all of its
files. A step is written under another name and renamed into place when it is
complete; a superseded one is renamed before it is removed. A folder named after
a round is therefore complete, wherever the process was killed; the checksums
tell whether it has been damaged since.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import zlib
from typing import Any, Iterator, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from fedmmr_jax import files
from fedmmr_jax.config import KeepAll, KeepSome
from fedmmr_jax.errors import UserError
from fedmmr_jax.federation import devices
from fedmmr_jax.federation.round import FederationState
from fedmmr_jax.models import groups
from fedmmr_jax.runs import checksums
from fedmmr_jax.runs.run_folder import ROUNDS

_SAVING, _DELETING = '.saving-', '.deleting-'


class Progress(NamedTuple):
  """Progress of a run, saved with its state.

  Attributes:
    best_round: [] int32 round with the best validation so far, 0 = none.
    best_value: [] float32 what it was chosen by (`select_by`), the number of
      the round if that is the last one; −inf if there is none (−1 in older
      runs).
  """

  best_round: jax.Array
  best_value: jax.Array

  @classmethod
  def start(cls) -> 'Progress':
    return cls(jnp.int32(0), jnp.float32(-jnp.inf))

  def updated(self, round_number: int, value: float) -> 'Progress':
    """Progress after a validation; in a tie the earlier round stays best."""
    value = jnp.float32(value)  # as saved: a resumed run decides alike
    if self.best_round and value <= self.best_value:
      return self
    return Progress(jnp.int32(round_number), value)


class Checkpoint(NamedTuple):
  """One saved round."""

  state: FederationState
  progress: Progress


def saved_rounds(workdir: str | pathlib.Path) -> list[int]:
  """Rounds that a run folder holds, ascending; none without a folder."""
  return sorted(
    int(path.name)
    for path in (pathlib.Path(workdir) / ROUNDS).glob('*')
    if path.name.isdecimal()
  )


def named_arrays(tree: Any) -> dict[str, Any]:
  """'group/layer/weight' -> array of a tree of parameters."""
  return {
    groups.path_text(path): x
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


class Rounds:
  """The saved rounds of one run folder.

  Args:
    workdir: the run folder.
    create: whether to make `rounds/` if it is absent.

  Raises:
    UserError: there is no `rounds/` and `create` is False.
  """

  def __init__(self, workdir: str | pathlib.Path, create: bool = False):
    self.folder = pathlib.Path(workdir) / ROUNDS
    if create:
      self.folder.mkdir(parents=True, exist_ok=True)
    elif not self.folder.exists():
      raise UserError(
        f'{self.folder}: no such folder; name a run folder that '
        'experiments.train has written'
      )

  def path(self, round_number: int) -> pathlib.Path:
    """The folder of a round, saved or not."""
    return self.folder / str(round_number)

  def numbers(self) -> list[int]:
    """Saved rounds, ascending."""
    return saved_rounds(self.folder.parent)

  def best(self) -> int:
    """The round with the best validation; the last one if none was validated.

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

  def load(self, round_number: int, like: Checkpoint) -> Checkpoint:
    """Reads one round into the structure of `like`, arrays or their shapes.

    Raises:
      UserError: there is no such round, or it is damaged or has another
        structure.
    """
    with self._reading(round_number):
      if self._metadata(round_number)['moments'] != _layout(like):
        raise ValueError('its server optimizer has another state')
      saved = ocp.load(
        self.path(round_number).absolute(),
        _here(jax.eval_shape(_to_disk, like)),
      )
    return _from_disk(saved, like)

  def load_as_saved(self, round_number: int) -> dict[str, Any]:
    """Reads one round without knowing its structure: nested dicts and lists
    of NumPy arrays.

    Raises:
      UserError: no such round, or one that is damaged.
    """
    path = self.path(round_number).absolute()  # Orbax takes no other
    with self._reading(round_number):
      return jax.tree.map(
        np.asarray, ocp.load(path, _here(ocp.metadata(path).metadata))
      )

  def metadata(self, round_number: int) -> dict[str, Any]:
    """{'record': the round's line of metrics.jsonl, 'wall_seconds': time spent
    so far, 'best_round': the best by then, 0 = none validated, 'moments':
    CRC-32 of the layout of the server optimizer's state}.

    Raises:
      UserError: no such round, or one that is damaged.
    """
    with self._reading(round_number):
      return self._metadata(round_number)

  def _metadata(self, round_number: int) -> dict[str, Any]:
    return ocp.metadata(self.path(round_number).absolute()).custom_metadata

  def size(self, round_number: int) -> int:
    """Bytes a saved round takes on disk."""
    return sum(
      path.stat().st_size for path in checksums.files(self.path(round_number))
    )

  def clear_leftovers(self) -> list[pathlib.Path]:
    """Removes and returns what a killed process left: half-written or
    half-removed steps. Only for the process that writes here."""
    leftovers = sorted(
      path
      for path in self.folder.iterdir()
      if path.name.startswith((_SAVING, _DELETING))
    )
    for path in leftovers:
      shutil.rmtree(path)
    return [path for path in leftovers if path.name.startswith(_SAVING)]

  @contextlib.contextmanager
  def _reading(self, round_number: int) -> Iterator[None]:
    """Checks a round before it is read, and names what cannot be read."""
    path = self.path(round_number)
    saved = self.numbers()
    if round_number not in saved:
      listed = ', '.join(map(str, saved)) or 'none'
      raise UserError(
        f'{self.folder}: there is no round {round_number}; saved: {listed}'
      )
    try:
      checksums.check(path, 'move the round away and go on from an earlier one')
      yield
    except (ValueError, KeyError, OSError, TypeError, UserError) as error:
      if not path.exists():
        raise UserError(
          f'{path}: was removed meanwhile, by the run that goes on there'
        ) from None
      if isinstance(error, UserError):
        raise
      # Its files are what was written: the run has another structure.
      raise UserError(
        f"{path}: cannot be read as this run's ({type(error).__name__}: "
        f'{_one_line(error)})'
      ) from error


class Saver:
  """Writes the rounds of one run, in the background, one at a time.

  Args:
    rounds: where to write.
    keep: which rounds stay on disk.
  """

  def __init__(self, rounds: Rounds, keep: KeepSome | KeepAll):
    self._rounds = rounds
    self._keep = keep
    self._thread = concurrent.futures.ThreadPoolExecutor(
      1, 'save', initializer=_give_way
    )
    self._pending: concurrent.futures.Future[None] | None = None
    # Saved round -> the best by then, of those that stay as the last ones.
    self._best_of: dict[int, int] = {}
    last = rounds.numbers()[-keep.last :] if isinstance(keep, KeepSome) else []
    for number in last:
      with contextlib.suppress(UserError):  # told when it is asked for
        self._best_of[number] = rounds.metadata(number)['best_round']

  def __enter__(self) -> 'Saver':
    return self

  def __exit__(self, *exception: Any) -> None:
    try:
      self.wait()
    finally:
      self._thread.shutdown()

  def save(
    self,
    round_number: int,
    checkpoint: Checkpoint,
    record: dict[str, Any],
    wall_seconds: float,
  ) -> None:
    """Starts writing a round; `checkpoint` may be donated as soon as this
    returns.

    Raises:
      UserError: the previous round could not be written.
    """
    self.wait()
    metadata = {
      'record': record,
      'wall_seconds': wall_seconds,
      'best_round': int(checkpoint.progress.best_round),
      'moments': _layout(checkpoint),
    }
    self._pending = self._thread.submit(
      self._write, round_number, _to_disk(checkpoint), metadata
    )

  def wait(self) -> None:
    """Returns when the last round is on disk.

    Raises:
      UserError: it could not be written.
    """
    pending, self._pending = self._pending, None
    if pending:
      pending.result()

  def _write(
    self, number: int, checkpoint: Checkpoint, metadata: dict[str, Any]
  ) -> None:
    temporary = self._rounds.folder / f'{_SAVING}{number}'
    try:
      with _context(), _writable(temporary.absolute()) as path:
        ocp.save(path, checkpoint, custom_metadata=metadata)
      checksums.write(temporary)
      temporary.rename(self._rounds.path(number))
    except (OSError, ValueError, RuntimeError) as error:  # whatever Orbax has
      for path in self._rounds.folder.glob(f'{temporary.name}*'):
        shutil.rmtree(path, ignore_errors=True)
      saved = self._rounds.numbers()
      raise UserError(
        f'{self._rounds.path(number)}: cannot be saved ({_reason(error)}); '
        + (
          f'round {saved[-1]} is whole, go on from it'
          if saved
          else 'no round is saved'
        )
      ) from error
    self._best_of[number] = metadata['best_round']
    try:
      self._remove_superseded()
    except OSError as error:
      raise UserError(
        f'{self._rounds.folder}: an older round cannot be removed '
        f'({_one_line(error)}); say `keep=all`'
      ) from error

  def _remove_superseded(self) -> None:
    """Keeps the last rounds, the best round recorded in each of them (needed if
    a run resumes from there) and every m-th round."""
    keep = self._keep
    if not isinstance(keep, KeepSome):
      return
    saved = self._rounds.numbers()
    best = {self._best_of.get(number) for number in saved[-keep.last :]}
    for number in saved[: -keep.last]:
      if number not in best and not (keep.every and number % keep.every == 0):
        path = self._rounds.path(number)
        hidden = path.with_name(f'{_DELETING}{number}')
        path.rename(hidden)  # at once; removing takes a while
        shutil.rmtree(hidden)


def _give_way() -> None:
  """Gives training priority over saving on a shared core, which halves the cost
  of saving per round (docs/performance.md)."""
  if sys.platform == 'linux':  # elsewhere it would be the whole process
    thread = threading.get_native_id()
    os.setpriority(
      os.PRIO_PROCESS, thread, max(10, os.getpriority(os.PRIO_PROCESS, thread))
    )


@contextlib.contextmanager
def _writable(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Where Orbax can write what shall stand at `path`: TensorStore, which writes
  for it, locks files. (It reads without locks.)"""
  if files.has_locks(path.parent):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix='fedmmr-saving-') as elsewhere:
    yield pathlib.Path(elsewhere, path.name)
    shutil.copytree(pathlib.Path(elsewhere, path.name), path)


def _context() -> ocp.Context:
  """How Orbax saves: without a file of devices, because a loading process has
  other devices, and without a file of shapes, which the arrays contain. Random
  floats compress by a tenth, which is not worth the time."""
  context = ocp.Context()
  context.array.saving.enable_write_sharding_file = False
  context.array.saving.array_metadata_store = None
  context.array.saving.use_compression = False
  context.array.saving.use_zarr3 = False
  return context


def _here(tree: Any) -> Any:
  """Shapes and types of a tree, to be loaded onto this machine's devices,
  whatever devices it was saved from."""
  sharding = devices.everywhere()
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


@jax.jit
def _to_disk(checkpoint: Checkpoint) -> Checkpoint:
  """A copy of what is saved, because the original's buffers are donated.

  Orbax takes 0.7 ms per array, so the moments of the server optimizer, which
  nobody inspects, are saved as one vector per type. Empty arrays (prototypes of
  a run without texts), which Orbax does not save, are left out.
  """
  moments = {}
  for x in jax.tree.leaves(checkpoint.state.server.opt_state):
    moments.setdefault(x.dtype.name, []).append(jnp.ravel(x))
  moments = {name: jnp.concatenate(parts) for name, parts in moments.items()}
  return jax.tree.map(
    lambda x: jnp.copy(x) if x.size else None,
    _with_moments(checkpoint, moments or None),
  )


def _from_disk(saved: Checkpoint, like: Checkpoint) -> Checkpoint:
  """Inverse of `_to_disk`, given the structure."""
  moments = saved.state.server.opt_state or {}
  taken = dict.fromkeys(moments, 0)

  def cut(x):
    start = taken[x.dtype.name]
    taken[x.dtype.name] += x.size
    return moments[x.dtype.name][start : start + x.size].reshape(x.shape)

  saved = _with_moments(saved, jax.tree.map(cut, like.state.server.opt_state))
  return jax.tree.map(
    lambda x, found: found if x.size else jnp.zeros(x.shape, x.dtype),
    like,
    saved,
  )


def _layout(checkpoint: Checkpoint) -> int:
  """CRC-32 of the paths and shapes of the server optimizer's state; if it is
  equal, the vectors of moments mean the same."""
  return zlib.crc32(
    '; '.join(
      f'{jax.tree_util.keystr(path)} {x.dtype} {x.shape}'
      for path, x in jax.tree_util.tree_leaves_with_path(
        checkpoint.state.server.opt_state
      )
    ).encode()
  )


def _with_moments(checkpoint: Checkpoint, opt_state: Any) -> Checkpoint:
  state = checkpoint.state
  return checkpoint._replace(
    state=state._replace(server=state.server._replace(opt_state=opt_state))
  )


def _reason(error: Exception) -> str:
  """Why a save failed, in a few words."""
  return (
    'no space left on device'
    if 'No space left' in str(error)
    else _one_line(error)
  )


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())[:160]
