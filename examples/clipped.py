r"""A custom aggregator: FedAvg of updates clipped to a norm.

python -m experiments.train --flagfile=… \
    --aggregator=examples.clipped:Clipped,max_norm=0.5
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

import fedmmr_jax as fm


@dataclasses.dataclass(frozen=True)
class Clipped(fm.FedAvg):
  """No client moves the server's parameters by more than `max_norm`."""

  max_norm: float = 1.0

  def add(self, total, updates):
    norm = jax.vmap(optax.tree.norm)(updates.delta)  # [C]
    factor = jnp.minimum(1.0, self.max_norm / jnp.maximum(norm, 1e-12))
    clipped = jax.vmap(optax.tree.scale)(factor, updates.delta)
    return super().add(total, updates._replace(delta=clipped))


def main():
  config = fm.preset('synthetic', num_rounds=2, dataset='synthetic,users=60')
  simulation = fm.Simulation.of(
    config, fm.load(config), aggregator=Clipped(max_norm=0.5)
  )
  for step in simulation.rounds():
    print(f'round {step.number}: loss {step.metrics["loss"]:.4f}')


if __name__ == '__main__':
  main()
