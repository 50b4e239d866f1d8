"""Cuts a data set into the folders of nodes, to try a federation over a network
with it (docs/deploy.md).

    python -m experiments.cut --flagfile=recommended.flags \\
        --data_dir=path/to/ml-1m --nodes=2 --output=federation

Writes `catalogue.npz`, for the server, and `nodes/<n>/interactions.csv`, each
for one node. Filters count: the catalogue holds what they leave.
"""

import pathlib

from absl import flags

from experiments import app
from fedmmr_jax.data import load
from fedmmr_jax.deploy import cut as cut_lib
from fedmmr_jax.deploy.catalogue import FILE
from fedmmr_jax.errors import UserError

_NODES = flags.DEFINE_integer('nodes', 2, 'how many nodes', lower_bound=1)
_OUTPUT = flags.DEFINE_string('output', '', 'folder to make')

app.define_config_flags()


def main() -> None:
  if not _OUTPUT.value:
    raise UserError('name the folder to make with --output')
  folder = pathlib.Path(_OUTPUT.value)
  dataset = load.load(app.config_from_flags()).dataset
  counts = cut_lib.cut(dataset, folder, _NODES.value)
  print(
    f'{folder / FILE}: {dataset.num_items} items, features: '
    + (', '.join(dataset.features) or 'none')
  )
  print(
    f'{folder / cut_lib.NODES}: {dataset.num_clients} clients on '
    f'{len(counts)} nodes, {min(counts)} to {max(counts)} each'
  )


def cli() -> None:
  app.run(main)


if __name__ == '__main__':
  cli()
