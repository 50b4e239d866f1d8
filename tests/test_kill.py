"""SIGKILL at any moment, then --resume: as if nothing had happened.

`FEDMMR_KILLS=12` for the long form; CI kills a few times.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

from fedmmr_jax.runs.checkpoint import Rounds
from tests import small

ROOT = pathlib.Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get('FEDMMR_KILLS', 3))
ROUNDS = 8 * KILLS
# Before the first round is saved, at any moment, while a round is written,
# while one is removed; the end, behind the last round, comes once.
KINDS = ('start', 'any', 'saving', 'deleting')
# Retention is on, so that a kill may also meet the removal of a round.
FLAGS = (
  '--dataset=synthetic,users=40,items=60',
  '--hidden_dim=16',
  '--num_blocks=1',
  '--num_heads=2',
  '--experts=semantic',  # less to compile than two, and it has a memory
  '--expert_form=attention,heads=2',
  '--max_seq_len=8',
  '--num_negatives=5',
  '--sampled_negatives=10',
  '--memory=surprise,capacity=8,retrieval_size=4',
  '--client_fraction=0.2',
  '--server_optimizer=fedadam',
  '--server_learning_rate=0.01',
  '--client_optimizer=sgd',
  '--eval_every=2',
  '--patience=0',
  '--keep=some,last=2,every=0',
  f'--num_rounds={ROUNDS}',
)


def command(workdir) -> list[str]:
  return [
    sys.executable,
    '-m',
    'experiments.train',
    '--resume',
    *FLAGS,
    f'--workdir={workdir}',
  ]


def numbers(rounds: pathlib.Path) -> list[int]:
  if not rounds.exists():
    return []
  return [int(p.name) for p in rounds.iterdir() if p.name.isdecimal()]


def wait_for(process, event) -> None:
  """Returns when `event` is true, at once if the process ends."""
  while process.poll() is None and not event():
    time.sleep(0.0005)


def run_until_killed(workdir, kind: str, rng: random.Random) -> str:
  """Starts or resumes the run, kills it, and returns what it had printed."""
  rounds = workdir / 'rounds'
  after = max(numbers(rounds), default=0) + rng.randrange(1, 5)

  def saved(number):
    return lambda: max(numbers(rounds), default=0) >= number

  with subprocess.Popen(
    command(workdir), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
  ) as process:
    if kind == 'start':
      wait_for(process, (workdir / 'config.json').exists)
      time.sleep(rng.uniform(0, 2))
    elif kind == 'end':
      wait_for(process, saved(ROUNDS))
      time.sleep(rng.uniform(0, 1))
    else:
      wait_for(process, saved(after))
      if kind == 'any':
        time.sleep(rng.uniform(0, 0.3))
      else:
        wait_for(process, lambda: list(rounds.glob(f'.{kind}-*')))
    process.kill()
    output = process.communicate()[0].decode()
  assert process.returncode == -9 or kind == 'end', output
  print(
    f'{kind}: round {max(numbers(rounds), default=0)} was saved, left',
    [path.name for path in rounds.glob('.*')],
  )
  return output


def finish(workdir) -> str:
  done = subprocess.run(
    command(workdir), cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def without_times(record):
  return {k: v for k, v in record.items() if not k.endswith('seconds')}


@pytest.mark.slow
def test_killed_anywhere_a_resumed_run_equals_the_straight_one(tmp_path):
  finish(tmp_path / 'straight')
  rng = random.Random(int(os.environ.get('FEDMMR_KILL_SEED', 0)))
  killed = tmp_path / 'killed'
  kinds = [KINDS[i % len(KINDS)] for i in range(KILLS - 1)]
  for kind in (*kinds, 'saving'):
    run_until_killed(killed, kind, rng)
  half_written = list((killed / 'rounds').glob('.saving-*'))
  output = run_until_killed(killed, 'end', rng)
  for path in half_written:
    assert f'passed over {path}' in output
  finish(killed)

  for folder in (killed, tmp_path / 'straight'):
    assert not list((folder / 'rounds').glob('.*'))
  first, second = (
    [
      json.loads(line)
      for line in (folder / 'metrics.jsonl').read_text().splitlines()
    ]
    for folder in (killed, tmp_path / 'straight')
  )
  assert [r['round'] for r in first] == list(range(1, ROUNDS + 1))
  assert list(map(without_times, first)) == list(map(without_times, second))
  a, b = Rounds(killed), Rounds(tmp_path / 'straight')
  assert a.numbers() == b.numbers() and a.best() == b.best()
  for number in a.numbers():
    small.assert_trees_equal(a.load_as_saved(number), b.load_as_saved(number))
  summaries = [
    json.loads((folder / 'summary.json').read_text())
    for folder in (killed, tmp_path / 'straight')
  ]
  assert summaries[0]['test'] == summaries[1]['test']
