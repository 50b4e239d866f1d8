"""A logger of one's own: a table of the rounds.

python -m experiments.train --flagfile=… --logger=examples.own_logger:Table
"""

import pathlib
import tempfile
from dataclasses import dataclass

import fedmmr_jax as fm


@dataclass
class Table(fm.Logger):
  name: str = 'rounds.txt'

  def start(self, folder, told):
    self._file = (folder / self.name).open('w')  # a resumed run gives all again
    print('round loss HR@10', file=self._file)

  def log(self, record):
    hits = record['val']['full']['HR@10'] if 'val' in record else ''
    print(record['round'], record['train']['loss'], hits, file=self._file)

  def close(self):
    self._file.close()


def main():
  config = fm.preset('synthetic', num_rounds=2, dataset='synthetic,users=60')
  folder, logger = pathlib.Path(tempfile.mkdtemp()), Table()
  logger.start(folder, {'flags': config.as_flat_dict()})  # as `train` does
  for step in fm.Simulation.of(config, fm.load(config)).rounds():
    logger.log({'round': step.number, 'train': step.metrics})
  logger.close()
  print((folder / logger.name).read_text())


if __name__ == '__main__':
  main()
