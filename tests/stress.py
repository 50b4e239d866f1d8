"""Many short rounds on a machine that gives them no peace: does a run end?

    python -m tests.stress --rounds=1000 --workers=2,4,8

Each run saves every round, beside processes that take the cores away for
moments of random length, and is confined to one core and let go again, which
only Linux can do. Prints how each ended. `tests/test_stress.py` is the short
form. What it has shown, of this code and of the one before it, is told in
WORKSPACE.md ("Shards split a cohort and never synchronise").
"""

import argparse
import contextlib
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import threading
import time
from typing import Iterator

ROOT = pathlib.Path(__file__).parents[1]
# Rounds of a few hundredths of a second, all devices busy in each.
SMALL = [
  '--dataset=synthetic',
  '--hidden_dim=16',
  '--num_blocks=1',
  '--num_heads=2',
  '--expert_form=attention,heads=2',
  '--max_seq_len=20',
  '--objective=all_positions',
  '--negatives=shared',
  '--num_negatives=50',
  '--batch_size=1',
  '--client_optimizer=sgd',
  '--client_learning_rate=1e-3',
  '--client_fraction=0.1',
  '--eval_clients=20',
  '--eval_every=50',
  '--patience=0',
  '--compilation_cache=/tmp/fedmmr-stress-cache',
]
_BURN = (
  'import random, time\n'
  'while True:\n'
  '  end = time.monotonic() + random.uniform(0, 3)\n'
  '  while time.monotonic() < end: pass\n'
  '  time.sleep(random.uniform(0, 1))\n'
)


def train(
  workdir: str, rounds: int, workers: int, flags: list[str] = ()
) -> subprocess.Popen:
  """Starts a run; its output goes to `log` in the folder above."""
  log = pathlib.Path(workdir).with_suffix('.log').open('w')
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      'experiments.train',
      *SMALL,
      f'--workdir={workdir}',
      f'--num_rounds={rounds}',
      f'--cpu_devices={workers}',
      *flags,
    ],
    stdout=log,
    stderr=subprocess.STDOUT,
    cwd=os.getcwd(),
  )


@contextlib.contextmanager
def busy_machine(processes: int) -> Iterator[None]:
  """Other processes that want the cores now and then."""
  others = [
    subprocess.Popen([sys.executable, '-c', _BURN]) for _ in range(processes)
  ]
  try:
    yield
  finally:
    for other in others:
      other.kill()
      other.wait()


@contextlib.contextmanager
def changing_cores(pid: int, seed: int = 0) -> Iterator[None]:
  """Confines all threads of a process to one core and lets them go again."""
  cores = sorted(os.sched_getaffinity(0))
  draw, ended = random.Random(seed), threading.Event()

  def change():
    while not ended.wait(draw.uniform(0.1, 3)):
      some = draw.choice([cores, cores[:1], cores[-1:]])
      with contextlib.suppress(OSError):  # it has ended, or a thread has
        for thread in os.listdir(f'/proc/{pid}/task'):
          os.sched_setaffinity(int(thread), some)

  thread = threading.Thread(target=change)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()


def stress(
  workdir: str, rounds: int, workers: int, seed: int, flags: list[str] = ()
) -> int:
  """The exit status of one run under stress; −6 = it aborted itself. It may
  compile in peace: what is stressed are its rounds."""
  run = train(workdir, rounds, workers, flags)
  begun = pathlib.Path(workdir, 'metrics.jsonl')
  while run.poll() is None and not (begun.exists() and begun.stat().st_size):
    time.sleep(0.02)
  with (
    busy_machine(2 * len(os.sched_getaffinity(0))),
    changing_cores(run.pid, seed),
  ):
    return run.wait()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=1000)
  parser.add_argument('--workers', default='2,4,8')
  parser.add_argument('--repeats', type=int, default=1)
  args = parser.parse_args()
  failed = 0
  for seed in range(args.repeats):
    for workers in map(int, args.workers.split(',')):
      with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        workdir = f'{folder}/run'
        status = stress(workdir, args.rounds, workers, seed)
        metrics = pathlib.Path(workdir, 'metrics.jsonl')
        done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        print(
          f'{workers} workers: exit status {status} after {done} rounds, '
          f'{time.monotonic() - start:.0f} s',
          flush=True,
        )
        if status:
          failed += 1
          print(pathlib.Path(workdir).with_suffix('.log').read_text()[-600:])
  print(f'{failed} run(s) did not come to their end')
  sys.exit(failed > 0)


if __name__ == '__main__':
  main()
