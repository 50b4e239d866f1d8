"""A third modality: sounds beside images and texts, with a custom expert.

From files: audio_features.npy, --experts=visual,semantic,audio[=module:Thing].
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import fedmmr_jax as fm


class MeanExpert(fm.Expert):
  """How the candidate differs from the average sound of the memory."""

  @nn.compact
  def __call__(self, embedding, feature, entries, train):
    seen = entries.mask / jnp.maximum(jnp.sum(entries.mask, axis=0), 1)
    mean = seen.T @ entries.features  # [1, F], the same for all candidates
    return nn.relu(nn.Dense(self.config.hidden_dim)(feature - mean))


def main(experts='visual,semantic,audio=examples.third_modality:MeanExpert'):
  rng = np.random.default_rng(0)
  users = np.repeat(np.arange(40), 12)
  items = np.concatenate([rng.permutation(80)[:12] for _ in range(40)])
  kinds = {
    kind: dict(enumerate(rng.normal(size=(80, 16))))
    for kind in ('visual', 'text', 'audio')
  }
  dataset = fm.Dataset.of(users, items, **kinds)
  few = dict(num_negatives=20, sampled_negatives=20, num_rounds=2)
  config = fm.preset('synthetic', experts=experts, **few)
  for step in fm.Simulation.of(config, dataset).rounds():
    print({k: v for k, v in step.metrics.items() if k.startswith('w_')})


if __name__ == '__main__':
  main()
