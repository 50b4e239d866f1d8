"""Flower's ClientApp of a node (`node.py`); nothing here but the transport.

A SuperNode names the node's folder: `--node-config 'folder="path"'`, and with
`data` and `format` an interaction file elsewhere. In Flower's simulation, where
nodes have a number only, node n has the n-th folder of the run's `nodes`.
"""

import json
import os
import pathlib
from typing import Any, Mapping

import jax

from fedmmr_jax.data import formats
from fedmmr_jax.deploy.node import Node
from fedmmr_jax.deploy.parcel import Parcel
from fedmmr_jax.errors import UserError

try:
  from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    RecordDict,
  )
  from flwr.clientapp import ClientApp
except ImportError:
  raise UserError(
    "a Flower app needs flwr: pip install 'fedmmr_jax[flower]'"
  ) from None

# Message types that Flower has; ours are kinds of these.
TYPES = {
  'enrol': 'query',
  'count': 'query',
  'sketch': 'query',
  'setup': 'query',
  'train': 'train',
  'validate': 'evaluate',
}
# Flower starts a process for each message: what one has compiled serves the
# next. Who named a folder of compiled programs keeps it.
if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
  jax.config.update(
    'jax_compilation_cache_dir',
    str(pathlib.Path('~/.cache/fedmmr_jax').expanduser()),
  )
app = ClientApp()
# A process that answers several messages (in the simulation) reads data once.
_nodes: dict[tuple[str, str, str], Node] = {}


@app.query()
@app.train()
@app.evaluate()
def answer(message: Message, context: Context) -> Message:
  """Hands a message to the node, and its answer back."""
  kind, asked = received(message.content)
  try:
    found = node_of(context.node_config, context.run_config).answer(kind, asked)
  except UserError as error:
    found = Parcel({'error': str(error)})
  return Message(content=to_send(kind, found), reply_to=message)


def node_of(node: Mapping[str, Any], run: Mapping[str, Any]) -> Node:
  """The node of a SuperNode, or of a place in Flower's simulation.

  Args:
    node: its configuration.
    run: that of the run; read in the simulation only.

  Raises:
    UserError: none is named.
  """
  folder = node.get('folder')
  if folder is None and 'partition-id' in node and run.get('nodes'):
    folders = sorted(
      x for x in pathlib.Path(str(run['nodes'])).glob('*') if x.is_dir()
    )
    place = int(node['partition-id'])
    if place >= len(folders):
      raise UserError(
        f'{run["nodes"]}: {len(folders)} folders for more nodes; say '
        f'num-supernodes={len(folders)}'
      )
    folder = folders[place]
  if folder is None:
    raise UserError(
      'no folder: start the SuperNode with node-config folder="path", or name '
      'the folder of all nodes as `nodes` in the run-config of a simulation'
    )
  if not pathlib.Path(str(folder)).is_dir():
    raise UserError(f'{folder}: no such folder')
  names = (
    str(folder),
    str(node.get('data', '')),
    str(node.get('format', formats.AUTO)),
  )
  if names not in _nodes:
    _nodes[names] = Node(*names)
  return _nodes[names]


def to_send(kind: str, parcel: Parcel) -> RecordDict:
  """A parcel as Flower carries it."""
  return RecordDict(
    {
      'facts': ConfigRecord(
        {'kind': kind, 'json': json.dumps(parcel.facts, allow_nan=False)}
      ),
      'arrays': ArrayRecord(
        {name: Array(x) for name, x in parcel.arrays.items()}
      ),
    }
  )


def received(content: RecordDict) -> tuple[str, Parcel]:
  """Inverse of `to_send`."""
  facts = content['facts']
  return str(facts['kind']), Parcel(
    json.loads(str(facts['json'])),
    {name: array.numpy() for name, array in content['arrays'].items()},
  )
