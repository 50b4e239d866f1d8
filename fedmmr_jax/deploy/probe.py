"""Runs an artefact as whoever has only its folder does: executed as a file by
`artefact.read_back`, in a process that cannot import this package, by what
`run.py` of the folder is a copy of.

    python -I -B probe.py FOLDER QUESTIONS.npz ANSWERS.npz

QUESTIONS holds `histories` [n, h] and `typical`, one history; ANSWERS gets
`scores` [n, V] and, in milliseconds a user, `alone` and `batched`.
"""

import importlib.util
import pathlib
import statistics
import sys
import time

BATCH = 32


def main(folder: str, questions: str, answers: str) -> None:
  for name in ('fedmmr_jax', 'flax', 'optax', 'orbax', 'absl'):
    sys.modules[name] = None  # type: ignore[assignment]
  import numpy as np

  path = pathlib.Path(__file__).with_name('standalone.py')
  spec = importlib.util.spec_from_file_location('run', path)
  assert spec and spec.loader
  run = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(run)
  _, _, score = run.load(folder)
  with np.load(questions) as file:
    histories, typical = file['histories'], file['typical']

  def milliseconds(histories, times):
    np.asarray(score(histories)['scores'])  # compiled
    taken = []
    for _ in range(times):
      start = time.perf_counter()
      np.asarray(score(histories)['top_rows'])
      taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken) / len(histories)

  np.savez(
    answers,
    scores=score(histories)['scores'],
    alone=milliseconds(run.padded([typical]), 20),
    batched=milliseconds(run.padded([typical] * BATCH), 5),
  )


if __name__ == '__main__':
  main(*sys.argv[1:])
