"""A custom data set from arrays, and a custom format from a file.

python -m experiments.train --dataset=examples.own_data:LOG --data_dir=x.log
"""

import numpy as np

import fedmmr_jax as fm


def read(path, names):
  """Lines of 'user>item', in time order."""
  users, items = zip(
    *(line.split('>') for line in path.read_text().splitlines())
  )
  return fm.Interactions.of(np.array(users), np.array(items))


LOG = fm.Format('user>item lines in time order', ('*.log',), read)


def main():
  rng = np.random.default_rng(0)
  users = np.repeat(np.arange(40), 12)
  items = np.concatenate([rng.permutation(80)[:12] for _ in range(40)])
  texts = {item: rng.normal(size=16) for item in range(80)}
  dataset = fm.Dataset.of(users, items, text=texts)
  config = fm.preset(
    'synthetic', num_rounds=2, num_negatives=20, sampled_negatives=20
  )
  simulation = fm.Simulation.of(config, dataset)
  *_, last = simulation.rounds()
  rows, scores = simulation.recommend(last.state, client=3, count=5)
  print(dataset.item_ids[rows], scores)


if __name__ == '__main__':
  main()
