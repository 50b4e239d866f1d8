"""A page on which a run is asked, user by user.

    python -m experiments.explore --workdir=RUN

Pick a user, or write the history of one whom the run never saw: what the user
consumed, what the memory holds, how the router weights the experts, what is
recommended and why. Remove items from the history or add some, and see the
recommendations change.

The server answers this machine only (127.0.0.1), reads, and writes nothing.
"""

import functools
import pathlib
from typing import Any, Mapping

from absl import flags

from experiments import app, explore_server, explorer
from experiments.explorer import Explorer
from fedmmr_jax.data import extraction, load
from fedmmr_jax.runs import report
from fedmmr_jax.runs.checkpoint import Rounds
from fedmmr_jax.runs.run_folder import RunFolder

_PORT = flags.DEFINE_integer(
  'port',
  8760,
  'port of the page on 127.0.0.1; 0 = any free one',
  lower_bound=0,
  upper_bound=65535,
)
_ROUND = flags.DEFINE_string('round', 'best', 'a number, best or last')
_IMAGES = flags.DEFINE_string(
  'images',
  '',
  'folder of <item id>'
  + ', '.join(extraction.IMAGE_ENDS)
  + ' to show; empty: images or posters in the data folder, if there',
)
_TEXTS = flags.DEFINE_string(
  'texts',
  '',
  'what to show of an item beside its title: a JSON file {"item id": "text"}; '
  "empty: genres and abstract from the data set's item file",
)
_DATA_DIR = flags.DEFINE_string(
  'data_dir', None, 'folder of the data set, if it has moved'
)


def main() -> None:
  run = app.open_run()
  rounds = Rounds(run.path)
  number = app.find_round(rounds, _ROUND.value)
  data_dir = run.config().data.data_dir
  if _DATA_DIR.value is not None:
    data_dir = _DATA_DIR.value
  folder, images = explorer.find_images(_IMAGES.value, data_dir)
  with explore_server.listen(
    _PORT.value
  ) as server:  # a port in use is told before the work
    try:
      asked, about = _load(run, rounds, number, images)
      if folder:
        about += f', {asked.num_images:,} pictures from {folder}'
      print(about)
      print('compiling', flush=True)
      asked.warm_up()
      server.explorer = asked
      server.page = functools.partial(
        report.render, 'explore', title=run.path.name, about=about
      )
      port = server.server_address[1]
      print(
        f'http://{explore_server.HOST}:{port}/ (Ctrl-C ends it)', flush=True
      )
      server.serve_forever()
    except KeyboardInterrupt:
      print()


def _load(
  run: RunFolder,
  rounds: Rounds,
  number: int,
  images: Mapping[str, pathlib.Path],
) -> tuple[Explorer, str]:
  """A round, and a line about it."""
  given: dict[str, Any] = {'eval_clients': 0}
  if _DATA_DIR.value is not None:
    given['data_dir'] = _DATA_DIR.value
  _, simulation, state = app.load_round(run, rounds, number, given)
  data, dataset = simulation.config.data, simulation.dataset
  texts = {}
  if _TEXTS.value:
    texts = extraction.read_texts(app.find_file(_TEXTS.value))
  elif not data.synthetic:
    table = load.read_items(data)
    texts = {
      str(item): text.removeprefix(table.titles.get(item, '')).lstrip('. ')
      for item, text in table.texts.items()
    }
  return Explorer(simulation, state, texts, images), (
    f'round {number}: {dataset.num_clients:,} users, '
    f'{dataset.num_items:,} items'
  )


def cli() -> None:
  app.run(main)


if __name__ == '__main__':
  cli()
