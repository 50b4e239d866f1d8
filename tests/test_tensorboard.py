"""TensorBoard events hold what metrics.jsonl holds."""

import struct
import sys

import pytest

from experiments import tensorboard
from fedmmr_jax.errors import UserError

RECORD = {
  'round': 3,
  'seconds': 1.5,
  'train': {'loss': 2.0, 'w_visual': None, 'shares': [0.5, 0.5]},
  'val': {'full': {'HR@10': 0.25}},
}


def events(folder):
  from tensorboardX.proto import event_pb2

  for path in sorted(folder.iterdir()):
    content, at = path.read_bytes(), 0
    while at < len(content):
      (length,) = struct.unpack_from('<Q', content, at)
      event = event_pb2.Event()
      event.ParseFromString(content[at + 12 : at + 12 + length])
      at += 16 + length
      yield event


def test_scalars_are_written_under_their_names(tmp_path):
  pytest.importorskip('tensorboardX')
  with tensorboard.TensorBoard(tmp_path, 1) as board:
    board.log(RECORD)
  found = {
    (value.tag, event.step): value.simple_value
    for event in events(tmp_path / 'tensorboard')
    for value in event.summary.value
  }
  assert found == {
    ('seconds', 3): 1.5,
    ('train/loss', 3): 2.0,
    ('val/full/HR_10', 3): 0.25,
  }
  with tensorboard.TensorBoard(tmp_path, 3):
    pass  # hides what a killed process left behind round 2
  assert any(
    event.session_log.status == 1 and event.step == 3
    for event in events(tmp_path / 'tensorboard')
  )


def test_a_missing_extra_is_told(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  with pytest.raises(UserError, match=r'fedmmr_jax\[tensorboard\]'):
    tensorboard.check_installed()
