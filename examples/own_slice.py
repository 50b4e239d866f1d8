"""A custom evaluation slice: HR@10 of users by when they began.

A slice is an array with one label per ranked client; ranks are one per client.
"""

import jax
import numpy as np

import fedmmr_jax as fm


def by_slice(ranks: fm.Ranks, labels: np.ndarray) -> dict:
  """Label -> metrics of its clients, both protocols."""
  return {
    str(label): fm.metrics_of(jax.tree.map(lambda x: x[labels == label], ranks))
    for label in np.unique(labels)
  }


def main():
  config = fm.preset('synthetic', num_rounds=2, dataset='synthetic,users=60')
  simulation = fm.Simulation.of(config, fm.load(config))
  *_, last = simulation.rounds()
  _, ranks = simulation.evaluate(last.state, 'val')
  first_items = simulation.dataset.items[simulation.dataset.offsets[:-1]]
  labels = np.where(
    first_items[simulation.targets('val')[0]] % 2, 'odd', 'even'
  )
  for label, metrics in by_slice(ranks, labels).items():
    print(label, round(metrics['full']['HR@10'], 3))


if __name__ == '__main__':
  main()
