"""A data set cut into the folders of nodes, to try a federation with it."""

import csv
import pathlib

import numpy as np

from fedmmr_jax.data.dataset import Dataset
from fedmmr_jax.deploy.catalogue import FILE, SharedCatalogue
from fedmmr_jax.errors import UserError

NODES = 'nodes'
INTERACTIONS = 'interactions.csv'


def cut(dataset: Dataset, folder: pathlib.Path, num_nodes: int) -> list[int]:
  """Writes `catalogue.npz` and `nodes/<n>/interactions.csv`, one client's lines
  together and in the order of time. Clients are dealt to nodes like cards.

  Args:
    dataset: split by leave-one-out.
    folder: made if it is not there.
    num_nodes: at most one for each client.

  Returns:
    How many clients each node has.

  Raises:
    UserError: more nodes than clients, a data set with more than sequences, or
      a folder that holds a federation already.
  """
  if not 1 <= num_nodes <= dataset.num_clients:
    raise UserError(
      f'{num_nodes} nodes for {dataset.num_clients} clients; a node has at '
      'least one'
    )
  if np.ndim(dataset.held_out) or np.ndim(dataset.validation):
    raise UserError(
      f'{dataset.name}: only what is split by leave_one_out can be cut; other '
      'splits need times or parts, which a cut does not write'
    )
  if dataset.weights is not None or dataset.disliked is not None:
    raise UserError(
      f'{dataset.name}: weights and dislikes cannot be cut; read the data '
      'without them'
    )
  if (folder / FILE).exists() or (folder / NODES).exists():
    raise UserError(f'{folder}: holds a cut data set already; name another')
  try:
    (folder / NODES).mkdir(parents=True)
  except OSError as error:
    raise UserError(f'{folder}: cannot be written ({error.strerror})') from None
  SharedCatalogue.of_dataset(dataset).save(folder / FILE)
  width = len(str(num_nodes - 1))
  counts = []
  for node in range(num_nodes):
    clients = range(node, dataset.num_clients, num_nodes)
    own = folder / NODES / f'{node:0{width}d}'
    own.mkdir()
    with (own / INTERACTIONS).open('w', newline='', encoding='utf-8') as file:
      writer = csv.writer(file)
      writer.writerow(['user_id', 'item_id'])
      for client in clients:
        user = dataset.user_ids[client]
        writer.writerows(
          (user, item) for item in dataset.item_ids[dataset.sequence(client)]
        )
    counts.append(len(clients))
  return counts
