"""A custom ranking metric, for users who rarely read far down the list.

python -m experiments.train --flagfile=… --metrics=examples.own_metric:Biased

A metric gets ranks [K], 0 = first, and returns a value for each of them. Its
means appear beside HR, NDCG and MRR in every evaluation, comparison and report.
"""

import dataclasses

import numpy as np

import fedmmr_jax as fm


@dataclasses.dataclass(frozen=True)
class Biased:
  """Rank-biased precision (Moffat & Zobel 2008) of one relevant item: the
  reader continues to the next rank with probability `patience`."""

  patience: float = 0.8

  def __call__(self, ranks: np.ndarray) -> dict[str, np.ndarray]:
    value = (1 - self.patience) * self.patience**ranks
    return {f'RBP {self.patience}': value}


def main():
  config = fm.preset('synthetic', num_rounds=2, dataset='synthetic,users=60')
  simulation = fm.Simulation.of(
    config, fm.load(config), metrics=[Biased(), Biased(0.5)]
  )
  for step in simulation.rounds():
    metrics, _ = simulation.evaluate(step.state, 'val')
    print(step.number, metrics['sampled']['RBP 0.8'])


if __name__ == '__main__':
  main()
