"""Flower's ServerApp of a federation (`server.py`); nothing here but the
transport and the run's configuration.

    flags          as on the command line of experiments.train
    catalogue      file of the items, see `SharedCatalogue`
    workdir        folder of the run; one that is there is continued
    min-nodes      how many nodes to wait for
    round-timeout  seconds to wait for the answers of a round
    nodes          in the simulation: the folder of all nodes' folders
"""

import pathlib
import time
from typing import Any, Mapping

from flwr.serverapp import Grid, ServerApp

from fedmmr_jax import presets
from fedmmr_jax.deploy import flower_client
from fedmmr_jax.deploy.catalogue import SharedCatalogue
from fedmmr_jax.deploy.flower_client import Context, Message, received, to_send
from fedmmr_jax.deploy.parcel import Parcel
from fedmmr_jax.deploy.server import Server
from fedmmr_jax.errors import UserError
from fedmmr_jax.runs.run_folder import RunFolder

_POLL_SECONDS = 0.3

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
  """Trains to the end."""
  try:
    server_of(grid, context.run_config).train()
  except UserError as error:
    # Flower shows where an exception comes from, and marks the run as failed;
    # what ends the process it shows to nobody.
    print(f'error: {error}', flush=True)
    raise error.with_traceback(None) from None


def server_of(grid: Grid, run: Mapping[str, Any]) -> Server:
  """The server that a run's configuration describes.

  Raises:
    UserError: something is missing or wrong.
  """
  for name in ('catalogue', 'workdir'):
    if not run.get(name):
      raise UserError(f'name a {name} in the run-config')
  catalogue = pathlib.Path(str(run['catalogue']))
  return Server(
    # A server reads no interactions; who evaluates its run names them.
    presets.of_command_line(
      str(run.get('flags', '')), data_dir=str(catalogue.parent)
    ),
    SharedCatalogue.load(catalogue),
    GridLink(grid),
    RunFolder(str(run['workdir'])),
    int(run.get('min-nodes', 1)),
    float(run.get('round-timeout', 600.0)),
    say=lambda line: print(line, flush=True),
  )


class GridLink:
  """The nodes that Flower's Grid reaches.

  Args:
    grid: of the run.
  """

  def __init__(self, grid: Grid):
    self._grid = grid

  def nodes(self) -> list[int]:
    return sorted(self._grid.get_node_ids())

  def exchange(
    self, kind: str, parcels: dict[int, Parcel], timeout: float
  ) -> dict[int, Parcel]:
    # A node that is not there any more gets no message later, either.
    deadline = time.monotonic() + timeout
    messages = [
      Message(
        content=to_send(kind, parcel),
        dst_node_id=node,
        message_type=flower_client.TYPES[kind],
        ttl=timeout,
      )
      for node, parcel in parcels.items()
    ]
    waiting = set(self._grid.push_messages(messages)) - {'', None}
    answers: dict[int, Parcel] = {}
    while waiting:
      for reply in self._grid.pull_messages(waiting):
        waiting.discard(reply.metadata.reply_to_message_id)
        node = reply.metadata.src_node_id
        if reply.has_error():
          answers[node] = Parcel({'error': reply.error.reason})
        else:
          answers[node] = received(reply.content)[1]
      if time.monotonic() > deadline:
        break
      time.sleep(_POLL_SECONDS if waiting else 0)
    return answers
