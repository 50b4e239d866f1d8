"""Rounds on disk: whole or not there, checked, as many as asked for."""

import os
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax.config import KeepAll, KeepSome
from fedmmr_jax.errors import UserError
from fedmmr_jax.runs import checksums
from fedmmr_jax.runs.checkpoint import Checkpoint, Progress, Rounds, Saver
from tests import small

VARIANTS = {
  # Moments of two types, a count among them, and nested by group.
  'muon': dict(server_optimizer='fedmuon', server_learning_rate=0.01),
  'scaffold': dict(drift_control='scaffold', client_optimizer='sgd'),
  # Its prototypes have width 0, which Orbax does not save.
  'no experts': dict(experts='none'),
}


def numbered(tree):
  """The tree with entries that all differ, so that a mix-up shows."""
  leaves, structure = jax.tree.flatten(tree)
  start = np.cumsum([0] + [x.size for x in leaves])
  return jax.tree.unflatten(
    structure,
    [
      (first + jnp.arange(x.size)).reshape(x.shape).astype(x.dtype)
      for first, x in zip(start, leaves)
    ],
  )


def checkpoint(**changes) -> Checkpoint:
  state = small.simulation(**changes).init_state()
  return Checkpoint(numbered(state), Progress.start().updated(3, 0.1))


def save(folder, *numbers, best_round=0, saved=None, keep=KeepSome()) -> Rounds:
  rounds = Rounds(folder, create=True)
  saved = saved or Checkpoint(
    checkpoint().state, Progress(jnp.int32(best_round), jnp.float32(0.5))
  )
  with Saver(rounds, keep) as saver:
    for number in numbers:
      saver.save(number, saved, {'round': number, 'loss': None}, 1.5)
  return rounds


@pytest.mark.slow
@pytest.mark.parametrize('changes', VARIANTS.values(), ids=VARIANTS)
def test_round_trip(tmp_path, changes):
  saved = checkpoint(**changes)
  rounds = save(tmp_path, 3, saved=saved)
  like = jax.eval_shape(lambda: saved)
  loaded = rounds.load(3, like)
  small.assert_trees_equal(loaded, saved)
  assert jax.tree.structure(loaded) == jax.tree.structure(saved)
  assert all(
    a.dtype == b.dtype
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(saved))
  )
  small.assert_trees_equal(
    rounds.load_as_saved(3)['state']['server']['params'],
    saved.state.server.params,
  )
  metadata = rounds.metadata(3)
  assert metadata['record'] == {'round': 3, 'loss': None}
  assert metadata['wall_seconds'] == 1.5 and metadata['best_round'] == 3
  assert rounds.best() == rounds.last() == 3
  # What was saved as 0.1 is not beaten by 0.1.
  assert int(loaded.progress.updated(4, 0.1).best_round) == 3
  with pytest.raises(UserError, match='no round 4; saved: 3'):
    rounds.load(4, like)


def test_what_is_saved_may_be_donated(tmp_path):
  saved = checkpoint()
  expected = small.copy(saved)
  rounds = Rounds(tmp_path, create=True)
  spend = jax.jit(
    lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0
  )
  with Saver(rounds, KeepSome()) as saver:
    saver.save(1, saved, {}, 0.0)
    jax.block_until_ready(spend(saved))
  small.assert_trees_equal(rounds.load(1, expected), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
  'keep, expected',
  [
    (KeepAll(), [1, 2, 3, 4, 5, 6, 7]),
    (KeepSome(2, 0), [1, 6, 7]),
    (KeepSome(1, 3), [1, 3, 6, 7]),
  ],
)
def test_the_last_every_mth_and_the_best_stay(tmp_path, keep, expected):
  rounds = save(tmp_path, *range(1, 8), best_round=1, keep=keep)
  assert rounds.numbers() == expected
  assert sorted(p.name for p in rounds.folder.iterdir()) == sorted(
    map(str, expected)
  )


@pytest.mark.slow
def test_the_best_of_a_round_to_go_on_from_stays_too(tmp_path):
  keep = KeepSome(2, 0)
  rounds = save(tmp_path, 1, 2, 3, 4, best_round=1, keep=keep)
  assert save(tmp_path, 5, best_round=5, keep=keep).numbers() == [1, 4, 5]
  shutil.rmtree(rounds.path(5))  # moved away, because it was damaged
  assert rounds.best() == 1 in rounds.numbers()
  save(tmp_path, 5, 6, best_round=5, keep=keep)
  assert rounds.numbers() == [5, 6]


@pytest.mark.slow
def test_another_optimizer_state_is_refused(tmp_path):
  rounds = save(
    tmp_path,
    1,
    saved=checkpoint(server_optimizer='fedadam', server_learning_rate=0.01),
  )
  with pytest.raises(UserError, match='server optimizer has another state'):
    rounds.load(
      1,
      checkpoint(server_optimizer='fedyogi', server_learning_rate=0.01)
      ._replace(progress=Progress.start())
      ._replace(state=checkpoint(server_optimizer='fedavgm').state),
    )


def test_damage_in_any_file_is_found_and_named(tmp_path):
  rounds = save(tmp_path, 1)
  like = checkpoint()
  path = rounds.path(1)
  files = [file for file in checksums.files(path) if file.stat().st_size]
  assert len(files) > 5
  for file in files:
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = bytearray(content)
    flipped[middle] ^= 4
    for damaged in (flipped, content[:middle], None):
      if damaged is None:
        file.unlink()
      else:
        file.write_bytes(damaged)
      for read in (
        lambda: rounds.load(1, like),
        lambda: rounds.load_as_saved(1),
        lambda: rounds.metadata(1),
      ):
        with pytest.raises(UserError) as error:
          read()
        named = file.name in str(error.value)
        # A flipped digit in the checksums themselves accuses another file.
        assert named or file.name == checksums.NAME, error.value
        assert 'go on from an earlier one' in str(error.value)
    file.write_bytes(content)
  rounds.load(1, like)


def test_another_structure_is_refused(tmp_path):
  rounds = save(tmp_path, 1)
  with pytest.raises(UserError, match='rounds/1: cannot be read as this run'):
    rounds.load(1, checkpoint(hidden_dim=8))


def test_half_written_steps_are_passed_over(tmp_path):
  rounds = save(tmp_path, 1)
  half = [
    rounds.folder / name
    for name in ('.saving-2', '.saving-2.orbax-checkpoint-tmp')
  ]
  for path in half:
    shutil.copytree(rounds.path(1), path)
  shutil.copytree(rounds.path(1), rounds.folder / '.deleting-0')
  assert rounds.numbers() == [1] and rounds.last() == 1
  assert rounds.clear_leftovers() == half
  assert [p.name for p in rounds.folder.iterdir()] == ['1']


def test_a_failed_save_is_told_and_loses_nothing(tmp_path):
  rounds = save(tmp_path, 1)
  saved = checkpoint()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with pytest.raises(
    UserError,
    match='rounds/2: cannot be saved .*; round 1 is whole, go on from it',
  ):
    with Saver(rounds, KeepSome()) as saver:
      resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
      try:
        saver.save(2, saved, {}, 0.0)
        saver.wait()
      finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert [p.name for p in rounds.folder.iterdir()] == ['1']
  rounds.load(1, saved)


@pytest.mark.slow
def test_saved_from_several_devices_opens_on_one(tmp_path):
  code = f"""
import jax
from jax.sharding import NamedSharding, PartitionSpec
from tests import test_checkpoint
mesh = jax.make_mesh((2,), ('data',))
saved = test_checkpoint.checkpoint()
def spread(x):
  split = x.ndim and x.shape[0] % 2 == 0
  return jax.device_put(x, NamedSharding(
      mesh, PartitionSpec('data' if split else None) if x.ndim else
      PartitionSpec()))
saved = jax.tree.map(spread, saved)
assert len(saved.state.server.params['backbone']['position_embedding']
           .addressable_shards) == 2
test_checkpoint.save({str(tmp_path)!r}, 1, saved=saved)
"""
  subprocess.run(
    [sys.executable, '-c', code],
    check=True,
    env=os.environ | {'JAX_NUM_CPU_DEVICES': '2'},
  )
  assert len(jax.devices()) == 1
  expected = checkpoint()
  rounds = Rounds(tmp_path)
  small.assert_trees_equal(rounds.load(1, expected), expected)
  small.assert_trees_equal(
    rounds.load_as_saved(1)['state']['memories'],
    expected.state.memories._asdict(),
  )
