"""An exported scorer: a folder that runs without this package.

    manifest.json     versions, inputs, outputs, provenance, what was measured
    scorer.stablehlo  the program, serialised by `jax.export`
    weights.npz       its arrays
    items.json        `ids` and `titles` of the rows of the catalogue
    run.py            loads them (`standalone.py`)

The weights are beside the program, not in it: a round later only they change,
they may be int8, and a program with tens of megabytes of constants compiles
slowly. NumPy alone reads them, which safetensors would add a package for.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any, Iterator, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax.client import memory as memory_lib
from fedmmr_jax.deploy import probe, standalone
from fedmmr_jax.deploy.scorer import Scorer, Weights
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import ranking
from fedmmr_jax.evaluation.recommendation import People
from fedmmr_jax.federation.round import FederationState
from fedmmr_jax.runs import provenance
from fedmmr_jax.simulation import Simulation

MANIFEST, PROGRAM, WEIGHTS = 'manifest.json', 'scorer.stablehlo', 'weights.npz'
ITEMS, RUN = 'items.json', 'run.py'
PLATFORMS = ('cpu', 'cuda')
# Between the artefact's scores and the live ones, relative to those above 1.
TOLERANCE = 1e-5
_CHECKED = 8  # people whose scores are compared

_INPUTS = {
  'history': {
    'shape': ['b', 'h'],
    'dtype': 'int32',
    'meaning': 'of b people, rows of items.json in time order, oldest first; '
    'items that are not in it are left out',
    'padding': '0 behind the last item; a history without any item is allowed',
  }
}
_OUTPUTS = {
  'scores': 'float32 [b, V]: of each row of items.json, -inf for row 0',
  'top_rows': 'int32 [b, k]: best items that are not in the history, best '
  'first; 0 behind the end of a shorter list',
  'top_scores': 'float32 [b, k]: their scores, -inf there',
  'queries': 'float32 [b, Q, D]: query vectors, zero where there is none',
}


class Checked(NamedTuple):
  """What a read artefact gave in a process without this package.

  Attributes:
    users: whose scores were compared.
    difference: the largest, relative to scores above 1.
    alone: milliseconds of one user, median.
    batched: of one user in batches of `probe.BATCH`, median.
  """

  users: int
  difference: float
  alone: float
  batched: float


@contextlib.contextmanager
def writing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder beside the one to be written, renamed to it at the end: what is
  under the final name is whole. It is removed if the block raises.

  Raises:
    UserError: the folder holds something, or cannot be written.
  """
  folder = folder.absolute()
  partial = folder.with_name(f'.{folder.name}.{os.getpid()}')
  try:
    if folder.exists() and not folder.is_dir():
      raise UserError(f'{folder} is a file; name a folder')
    if folder.is_dir() and any(folder.iterdir()):
      raise UserError(f'{folder} is not empty; name another folder')
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
  except OSError as error:
    raise _not_writable(folder, error) from None
  try:
    yield partial
    os.replace(partial, folder)
  except OSError as error:
    if error.filename and not _is_under(partial, error.filename):
      raise  # it is about a file of the run
    raise _not_writable(folder, error) from None
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _not_writable(folder: pathlib.Path, error: OSError) -> UserError:
  return UserError(f'{folder}: cannot be written ({error.strerror})')


def _is_under(folder: pathlib.Path, name: Any) -> bool:
  return pathlib.Path(os.fsdecode(name)).is_relative_to(folder)


def write(
  folder: pathlib.Path, simulation: Simulation, scorer: Scorer, weights: Weights
) -> None:
  """Writes everything but the manifest.

  Raises:
    UserError: the extra `export` is missing.
    OSError: the folder cannot be written.
  """
  (folder / PROGRAM).write_bytes(program_of(scorer, weights).serialize())
  np.savez(folder / WEIGHTS, **weights)
  dataset = simulation.dataset
  ids = dataset.item_ids.tolist()
  titles = dataset.titles or [''] * len(ids)
  write_json(
    folder / ITEMS, {'ids': [None, *ids[1:]], 'titles': ['', *titles[1:]]}
  )
  shutil.copyfile(standalone.__file__, folder / RUN)


def program_of(scorer: Scorer, weights: Weights) -> jax.export.Exported:
  """The program for any number of people and any length of history.

  Raises:
    UserError: the extra `export` is missing.
  """
  check_installed()
  from jax import export  # not loaded with jax

  shapes = {
    n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in weights.items()
  }
  history = jax.ShapeDtypeStruct(export.symbolic_shape('b, h'), jnp.int32)
  try:
    return export.export(jax.jit(scorer), platforms=PLATFORMS)(shapes, history)
  except (NotImplementedError, TypeError, ValueError) as error:
    line = str(error).strip().partition('\n')[0]
    raise UserError(
      'this model cannot be exported for any number of people '
      f'({type(error).__name__}: {line}); has it a form of your own that needs '
      'fixed shapes?'
    ) from error


def check_installed() -> None:
  """Raises UserError if the extra is missing."""
  try:
    import flatbuffers  # noqa: F401  # jax.export serialises with it
  except ImportError:
    raise UserError(
      "an export needs flatbuffers: pip install 'fedmmr_jax[export]'"
    ) from None


def write_manifest(
  folder: pathlib.Path,
  simulation: Simulation,
  scorer: Scorer,
  run: dict[str, Any],
  measured: dict[str, Any],
) -> None:
  """Writes `manifest.json`, which seals the other files by their SHA-256.

  Args:
    run: where the weights come from.
    measured: parity, latency, quality.
  """
  program = jax.export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
  rule = scorer.config.memory
  is_made = not (scorer.model.is_backbone_only or rule.sees == 'stored')
  write_json(
    folder / MANIFEST,
    {
      'format': standalone.FORMAT,
      'made_with': provenance.versions() | {'source': provenance.source_hash()},
      'run': run,
      'program': {
        'calling_convention_version': program.calling_convention_version,
        'platforms': list(program.platforms),
      },
      'inputs': {'weights': f'every array of {WEIGHTS}', **_INPUTS},
      'outputs': _OUTPUTS,
      'sizes': {
        'V': scorer.model.num_rows,
        'k': scorer.count,
        'Q': scorer.num_queries,
        'D': scorer.config.model.hidden_dim,
        'window': scorer.config.model.max_seq_len,
      },
      'memory': f'made of the last {rule.num_slots} items of the history'
      if is_made
      else 'none',
      'measured': measured,
      'files': {
        path.relative_to(folder).as_posix(): {
          'bytes': path.stat().st_size,
          'sha256': _sha256(path),
        }
        for path in sorted(folder.rglob('*'))
        if path.is_file() and path.name != MANIFEST
      },
    },
    indent=2,
  )


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """The manifest of an artefact whose files are as they were written.

  Raises:
    UserError: there is none, it is of another format, or a file is damaged.
  """
  path = folder / MANIFEST
  if not path.is_file():
    raise UserError(
      f'{path}: no such file; name a folder that experiments.export has written'
    )
  try:
    manifest = json.loads(path.read_text('utf-8'))
    found, sealed = manifest['format'], manifest['files']
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path}: damaged ({error}); export anew') from None
  if found != standalone.FORMAT:
    raise UserError(
      f'{folder}: an artefact of format {found}, this version reads format '
      f'{standalone.FORMAT}; use the version that wrote it '
      f'({manifest["made_with"]["fedmmr_jax"]}), or export anew'
    )
  for name, facts in sealed.items():
    if not (folder / name).is_file():
      raise UserError(f'{folder / name}: no such file; export anew')
    if _sha256(folder / name) != facts['sha256']:
      raise UserError(
        f'{folder / name}: damaged or edited, its checksum differs; export anew'
      )
  return manifest


def check_items(folder: pathlib.Path, simulation: Simulation) -> None:
  """Raises UserError if the artefact's rows are not the run's items."""
  ids = json.loads((folder / ITEMS).read_text('utf-8'))['ids'][1:]
  own = simulation.dataset.item_ids.tolist()[1:]
  if ids == own:
    return
  known = len({str(x) for x in ids} & {str(x) for x in own})
  raise UserError(
    f"{folder}: its items are not the run's: {len(ids)} and {len(own)}, "
    f'{known} of them the same; row numbers of one mean nothing to the other'
  )


def people(simulation: Simulation) -> People:
  """Some of the run's clients, from the shortest history to the longest, as
  people whom it never saw; the last has no history."""
  lengths = simulation.dataset.lengths
  order = np.argsort(lengths, kind='stable')
  chosen = order[np.linspace(0, len(order) - 1, _CHECKED).astype(int)]
  histories = [simulation.dataset.sequence(client) for client in chosen]
  return People.of_histories(simulation, [*histories, []])


def live_scores(
  simulation: Simulation, state: FederationState, asked: People
) -> np.ndarray:
  """[n, V] float32 scores of the simulation itself."""
  server = simulation.as_ranked(state.server)
  memory = None
  if not simulation.model.is_backbone_only:
    memory = memory_lib.init(simulation.config.memory)
  return np.stack(
    [
      ranking.score_client(
        simulation.model,
        simulation.compiled_config,
        server,
        history,
        length,
        length,
        memory,
        simulation.catalogue,
      )
      for history, length in zip(asked.history, asked.length)
    ]
  )


def read_back(
  folder: pathlib.Path, expected: np.ndarray, asked: People
) -> Checked:
  """Compares an artefact with the scores it ought to give.

  Args:
    folder: the artefact.
    expected: [n, V] float32.
    asked: n people.

  Raises:
    UserError: it does not run, or its scores differ or are not finite.
  """
  middle = asked.history[len(asked.history) // 2]
  with tempfile.TemporaryDirectory() as place:
    questions = pathlib.Path(place) / 'questions.npz'
    answers = pathlib.Path(place) / 'answers.npz'
    np.savez(questions, histories=asked.history, typical=middle[middle > 0])
    done = subprocess.run(
      [sys.executable, '-I', '-B', probe.__file__, folder, questions, answers],
      stderr=subprocess.PIPE,
      text=True,
      check=False,
    )
    if done.returncode:
      lines = done.stderr.strip().splitlines() or ['no message']
      raise UserError(
        'the artefact does not run without this package '
        f'(exit status {done.returncode}): {lines[-1]}'
      )
    with np.load(answers) as file:
      scores, alone, batched = (file[x] for x in ('scores', 'alone', 'batched'))
  live = expected[:, 1:]
  difference = np.abs(scores[:, 1:] - live) / np.maximum(1, np.abs(live))
  if not np.isfinite(difference).all():
    raise UserError('scores that are NaN or infinite; the training diverged')
  if difference.max() > TOLERANCE:
    raise UserError(
      "the artefact's scores differ from the run's by up to "
      f'{difference.max():.1e}, more than {TOLERANCE:.0e}; are its weights '
      'those of another round?'
    )
  return Checked(
    len(asked.history), float(difference.max()), float(alone), float(batched)
  )


def write_json(
  path: pathlib.Path, content: Any, indent: int | None = None
) -> None:
  path.write_text(
    json.dumps(content, indent=indent, allow_nan=False) + '\n', 'utf-8'
  )


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
