"""Maps the PyTorch original's parameter names to this project's tree."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax.config import ModelConfig
from fedmmr_jax.models import experts
from fedmmr_jax.models.feddmmr import FedDMMR

SHARED = pathlib.Path(
  os.environ.get(
    'FEDMMR_SHARED', pathlib.Path(__file__).resolve().parents[2] / 'shared'
  )
)
PARITY = SHARED / 'data' / 'parity'

CONFIG = ModelConfig(
  hidden_dim=32,
  num_blocks=2,
  num_heads=4,
  max_seq_len=10,
  router='item,hidden_dim=16',
  dropout=0.0,
)


def require(path: pathlib.Path) -> pathlib.Path:
  """Skips the test where the shared reference numbers are absent."""
  if not path.exists():
    pytest.skip(f'no reference data at {path}')
  return path


def model(**changes) -> FedDMMR:
  arguments = dict(config=CONFIG, num_rows=62, modalities=experts.of(CONFIG))
  return FedDMMR(**{**arguments, **changes})


def _linear(name):
  return {'kernel': (name + '.weight', 'linear'), 'bias': (name + '.bias', '')}


def _norm(name):
  return {'scale': (name + '.weight', ''), 'bias': (name + '.bias', '')}


def _stacked(name, part):
  """Part q, k or v (0, 1, 2) of a stacked attention input projection."""
  return {
    'kernel': (name + '.in_proj_weight', f'linear{part}'),
    'bias': (name + '.in_proj_bias', f'bias{part}'),
  }


def _block(i):
  block = f'sasrec.blocks.{i}.'
  attention = block + 'attention'
  return {
    'query': _stacked(attention, 0),
    'key': _stacked(attention, 1),
    'value': _stacked(attention, 2),
    'output': _linear(attention + '.out_proj'),
    'attention_norm': _norm(block + 'norm1'),
    'feed_forward_in': _linear(block + 'feed_forward.conv1'),
    'feed_forward_out': _linear(block + 'feed_forward.conv2'),
    'feed_forward_norm': _norm(block + 'norm2'),
  }


_CROSS = 'semantic_expert.cross_attention'
NAMES = {
  'item_embedding': ('sasrec.item_embedding.weight', ''),
  'backbone': {
    'position_embedding': ('sasrec.positional_embedding.weight', ''),
    'block_0': _block(0),
    'block_1': _block(1),
    'final_norm': _norm('sasrec.layer_norm'),
  },
  'visual_expert': {
    'query': _linear('visual_expert.attention.query_proj'),
    'key': _linear('visual_expert.attention.key_proj'),
    'output': _linear('visual_expert.output_proj.0'),
    'norm': _norm('visual_expert.output_proj.1'),
  },
  'semantic_expert': {
    'query': _linear('semantic_expert.query_proj'),
    'key': _linear('semantic_expert.key_proj'),
    'value': _linear('semantic_expert.value_proj'),
    'attention_query': _stacked(_CROSS, 0),
    'attention_key': _stacked(_CROSS, 1),
    'attention_value': _stacked(_CROSS, 2),
    'attention_output': _linear(_CROSS + '.out_proj'),
    'norm': _norm('semantic_expert.output_layer.0'),
    'output': _linear('semantic_expert.output_layer.1'),
  },
  'router': {
    'input': _linear('router.router.0'),
    'norm': _norm('router.router.1'),
    'hidden': _linear('router.router.4'),
    'logits': _linear('router.router.7'),
  },
  'sequence_norm': _norm('seq_layernorm'),
  'visual_norm': _norm('vis_layernorm'),
  'semantic_norm': _norm('sem_layernorm'),
}


def _convert(array: np.ndarray, how: str) -> np.ndarray:
  if how.startswith('linear'):
    array = array.reshape(array.shape[:2])  # conv1d of kernel 1
    if how != 'linear':
      array = np.split(array, 3)[int(how[-1])]
    return array.T
  if how.startswith('bias'):
    return np.split(array, 3)[int(how[-1])]
  return array


def tree(archive, prefix: str) -> dict:
  """`param/*`, `grad/*` or `adam1/*` of the archive as a parameter tree."""
  return jax.tree.map(
    lambda spec: jnp.asarray(_convert(archive[prefix + spec[0]], spec[1])),
    NAMES,
    is_leaf=lambda x: isinstance(x, tuple),
  )
