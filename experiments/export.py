"""Exports the scorer of a run as a folder that runs without this package.

    python -m experiments.export --workdir=RUN --output=scorer
    python scorer/run.py 1270 2571 260
    python -m experiments.export --workdir=RUN --check=scorer

The folder holds a StableHLO program, its weights, the ids of the items, a
manifest, and `run.py`, which needs jax, numpy and flatbuffers alone
(docs/export.md). Before it gets its name it is read back in a process without
this package, and its scores are compared with the run's.
"""

import functools
import pathlib
from typing import Any

import jax
from absl import flags

from experiments import app, console
from fedmmr_jax.deploy import artefact, probe, quality, vectors
from fedmmr_jax.deploy import scorer as scorer_lib
from fedmmr_jax.deploy.artefact import Checked
from fedmmr_jax.deploy.scorer import Scorer, Weights
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation.ranking import SPLITS
from fedmmr_jax.evaluation.recommendation import People
from fedmmr_jax.federation.round import FederationState
from fedmmr_jax.runs.checkpoint import Rounds
from fedmmr_jax.runs.run_folder import RunFolder
from fedmmr_jax.simulation import Simulation

_ROUND = flags.DEFINE_string('round', 'best', 'a number, best or last')
_OUTPUT = flags.DEFINE_string('output', '', 'folder to write, new or empty')
_CHECK = flags.DEFINE_string(
  'check', '', 'instead: an exported folder, whose scores to compare'
)
_K = flags.DEFINE_integer('k', 10, 'items of a list', lower_bound=1)
_INT8 = flags.DEFINE_boolean(
  'int8', False, 'write the tables of items in int8, a quarter of their size'
)
_VECTORS = flags.DEFINE_boolean(
  'vectors',
  False,
  'write vectors of items and users too, for an index of nearest neighbours',
)
_SPLIT = flags.DEFINE_enum(
  'split',
  'val',
  [*SPLITS, 'none'],
  'held-out item on which to measure what the export loses; none: do not',
)
_CLIENTS = flags.DEFINE_integer(
  'clients', 1000, 'that are ranked for it; 0 = all', lower_bound=0
)
_DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'folder of the data set, if it has moved'
)

FLOAT32, INT8 = 'float32', 'int8'


def main() -> None:
  if bool(_OUTPUT.value) == bool(_CHECK.value):
    raise UserError('name a folder to write with --output, or one with --check')
  artefact.check_installed()
  if _CHECK.value:
    _check(pathlib.Path(_CHECK.value))
    return
  with artefact.writing(pathlib.Path(_OUTPUT.value)) as partial:
    _export(partial)
  print(f'written    {_OUTPUT.value}')


def _export(folder: pathlib.Path) -> None:
  run, number, simulation, state = _load(_ROUND.value)
  if _K.value > simulation.dataset.num_items:
    raise UserError(
      f'`k={_K.value}`: the catalogue has {simulation.dataset.num_items} items'
    )
  kind = INT8 if _INT8.value else FLOAT32
  exact = scorer_lib.weights_of(simulation, state)
  weights = scorer_lib.quantised(exact) if _INT8.value else exact
  scorer = Scorer.of(simulation, _K.value)
  artefact.write(folder, simulation, scorer, weights)
  seal = functools.partial(
    artefact.write_manifest,
    folder,
    simulation,
    scorer,
    _provenance(run, number, simulation),
  )
  seal({})
  print(f'round      {number} of {run.path}')
  print(f'program    {_size(folder / artefact.PROGRAM)}, {_platforms()}')
  print(
    f'weights    {_size(folder / artefact.WEIGHTS)}, {kind}'
    + (f' ({_megabytes(exact)} in float32)' if _INT8.value else '')
  )
  checked = _read_back(folder, simulation, state, scorer, weights, kind)
  measured: dict[str, Any] = {
    'weights': kind,
    'parity': {
      'people': checked.users,
      'largest_difference': checked.difference,
      'allowed': artefact.TOLERANCE,
    },
    'milliseconds_a_user': {
      'alone': checked.alone,
      f'batches of {probe.BATCH}': checked.batched,
    },
  }
  if _SPLIT.value != 'none':
    measured['quality'] = quality.measure(
      simulation, state, _SPLIT.value, {FLOAT32: exact, kind: weights}
    )
    _show_quality(measured['quality'])
  if _VECTORS.value:
    measured['vectors'] = vectors.write(folder, simulation, exact)
    _show_vectors(measured['vectors'])
  seal(measured)


def _check(folder: pathlib.Path) -> None:
  manifest = artefact.read_manifest(folder)
  which = str(manifest['run']['round'])
  _, _, simulation, state = _load(
    _ROUND.value if flags.FLAGS['round'].present else which
  )
  artefact.check_items(folder, simulation)
  weights = scorer_lib.weights_of(simulation, state)
  kind = manifest['measured']['weights']
  if kind == INT8:
    weights = scorer_lib.quantised(weights)
  scorer = Scorer.of(simulation, manifest['sizes']['k'])
  _read_back(folder, simulation, state, scorer, weights, kind)


def _load(which: str) -> tuple[RunFolder, int, Simulation, FederationState]:
  """The run, the number of a round, and what it needs."""
  run = app.open_run()
  rounds = Rounds(run.path)
  number = app.find_round(rounds, which)
  given: dict[str, Any] = {'eval_clients': _CLIENTS.value}
  if _DATA_DIR.value is not None:
    given['data_dir'] = _DATA_DIR.value
  _, simulation, state = app.load_round(run, rounds, number, given)
  return run, number, simulation, state


def _read_back(
  folder: pathlib.Path,
  simulation: Simulation,
  state: FederationState,
  scorer: Scorer,
  weights: Weights,
  kind: str,
) -> Checked:
  """Compares the folder with the run; with int8, with what the rounded tables
  give here."""
  people: People = artefact.people(simulation)
  if kind == INT8:
    rounded = scorer_lib.dequantised(weights)
    expected = jax.device_get(
      jax.jit(scorer)(rounded, people.history)['scores']
    )
  else:
    expected = artefact.live_scores(simulation, state, people)
  checked = artefact.read_back(folder, expected, people)
  print(
    f'parity     {checked.users} people, scores differ by '
    f'{checked.difference:.1e} at most ({artefact.TOLERANCE:.0e} allowed), '
    'read back without this package'
  )
  print(
    f'latency    {checked.alone:.1f} ms for one user, {checked.batched:.2f} ms '
    f'a user in batches of {probe.BATCH} (medians)'
  )
  return checked


def _provenance(
  run: RunFolder, number: int, simulation: Simulation
) -> dict[str, Any]:
  return {
    'round': number,
    'dataset': simulation.dataset.name,
    'data_fingerprint': run.data_fingerprint(),
    'seed': simulation.config.seed,
  }


def _show_quality(found: dict[str, Any]) -> None:
  names = {
    quality.OWN_MEMORIES: "the run's, with its clients' own memories",
    FLOAT32: 'exported in float32',
    INT8: 'exported in int8',
  }
  print(f'quality    {found["split"]}, {found["clients"]:,} clients\n')
  print(
    console.table(
      ['scorer', *quality.SHOWN],
      [
        [name, *(f'{found[key][metric]:.4f}' for metric in quality.SHOWN)]
        for key, name in names.items()
        if key in found
      ],
    )
    + '\n'
  )


def _show_vectors(found: dict[str, Any]) -> None:
  recall = ', '.join(f'{x} {v:.3f}' for x, v in found['recall'].items())
  print(
    f'vectors    recall of the lists: {recall} ({found["users_compared"]:,} '
    'users)'
  )
  if found['left_out']:
    print(f'           they leave out {found["left_out"]}')


def _platforms() -> str:
  return 'for ' + ' and '.join(artefact.PLATFORMS)


def _size(path: pathlib.Path) -> str:
  return f'{path.name}, {path.stat().st_size / 1e6:.2f} MB'


def _megabytes(weights: Weights) -> str:
  return f'{sum(x.nbytes for x in weights.values()) / 1e6:.2f} MB'


def cli() -> None:
  app.run(main)


if __name__ == '__main__':
  cli()
