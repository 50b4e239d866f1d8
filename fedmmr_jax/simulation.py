"""A config and a data set bound to the jitted functions that use them."""

import dataclasses

import jax
import numpy as np

from fedmmr_jax import content as content_lib
from fedmmr_jax import evaluation, federation, metrics
from fedmmr_jax.config import DataConfig, EvaluationConfig, RunConfig
from fedmmr_jax.data import dataset as dataset_lib
from fedmmr_jax.data.dataset import Dataset, FederatedData, HELD_OUT
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import Ranks
from fedmmr_jax.federation import FederationState
from fedmmr_jax.models.feddmmr import Catalogue, FedDMMR
from fedmmr_jax.windows import num_positives


@dataclasses.dataclass(frozen=True)
class Simulation:
  """Federated learning over one data set.

  Attributes:
    config: all settings.
    model: the architecture, fitted to the data set's widths.
    catalogue: item features on the device.
    data: the clients' data on the device.
    lengths: [K] interactions of each client, on the host.
  """

  config: RunConfig
  model: FedDMMR
  catalogue: Catalogue
  data: FederatedData
  lengths: np.ndarray

  @property
  def max_items(self) -> int:
    """H, the longest client's number of interactions."""
    return int(self.lengths.max())

  @property
  def compiled_config(self) -> RunConfig:
    """The config without what no compiled function reads, so that another
    seed, length of the run or place of the data compiles nothing anew."""
    server = dataclasses.replace(self.config.server, client_fraction=1.0)
    if not self.config.decays:
      server = dataclasses.replace(server, num_rounds=1)
    evaluation_ = EvaluationConfig(
        items_per_eval_block=self.config.evaluation.items_per_eval_block)
    return dataclasses.replace(
        self.config, seed=0, data=DataConfig(), evaluation=evaluation_,
        server=server)

  def init_state(self) -> FederationState:
    """State before round 1, drawn from the seed."""
    return federation.init(
        self.model, self.catalogue, self.config, len(self.lengths))

  def sample_cohort(self, round_number: int) -> np.ndarray:
    """[G, C/G] int32 clients of a round (1-based)."""
    return federation.sample_cohort(self.config, round_number, self.lengths)

  def count_targets(self, cohort: np.ndarray) -> int:
    """Positives that a round over this cohort trains on."""
    trained = self.lengths[cohort[cohort >= 0]] - HELD_OUT
    return int(self.config.client.local_epochs
               * num_positives(trained, self.config).sum())

  def run_round(self, state: FederationState, round_number: int,
                cohort: np.ndarray
                ) -> tuple[FederationState, dict[str, float | None]]:
    """Trains one round; `state` is donated."""
    state, means = federation.run_round(
        self.model, self.compiled_config, self.max_items, state, cohort,
        federation.round_key(self.config.seed, round_number), self.catalogue,
        self.data)
    return state, metrics.finish(jax.device_get(means))

  def evaluate(self, state: FederationState, split: str
               ) -> tuple[dict[str, dict[str, float]], Ranks]:
    """Ranks the targets of 'val' or 'test' for `--eval_clients`.

    Raises:
      UserError: a score is NaN or infinite.
    """
    memories, config = state.memories, self.compiled_config
    clients = evaluation.evaluated_clients(self.config, len(self.lengths))
    if self.config.memory.warm_memory:
      chunks = federation.chunked(
          clients, self.lengths, self.config.server.clients_per_chunk)
      memories = federation.warm_memories(
          self.model, config, self.max_items, state, chunks,
          federation.warm_key(self.config.seed), self.catalogue, self.data)
    return evaluation.evaluate(
        self.model, config, self.max_items, state.server, memories, split,
        clients, self.config.evaluation.clients_per_eval_chunk, self.catalogue,
        self.data)


def build(config: RunConfig, dataset: Dataset) -> Simulation:
  """Puts a data set on the device and fits the model to it.

  Raises:
    UserError: a client with too few unseen items for the negatives, or
      global prototypes without texts.
  """
  # The experts' features; the item table may start from the others too.
  experts = config.model.experts
  visual = dataset.visual[:, :None if experts in ('both', 'visual') else 0]
  text = dataset.text[:, :None if experts in ('both', 'semantic') else 0]
  if config.data.feature_scaling == 'centred':
    visual, text = content_lib.centred(visual), content_lib.centred(text)
  if config.model.global_memory and not text.shape[1]:
    raise UserError('--global_memory needs the semantic expert and text '
                    'features: the prototypes are clusters of texts')
  data = dataset_lib.to_device(
      dataset,
      num_negatives=config.client.num_negatives,
      sampled_negatives=config.data.sampled_negatives,
      leaky_negatives=config.client.leaky_negatives,
      seed=config.seed)
  content = None
  if config.model.item_embedding != 'id':
    if not (dataset.visual.any() or dataset.text.any()):
      raise UserError(
          f'--item_embedding={config.model.item_embedding} needs item '
          'features; give some, or say --item_embedding=id')
    content = content_lib.components(
        dataset.visual, dataset.text, config.model.hidden_dim)
  return Simulation(
      config=config,
      model=FedDMMR(config.model, dataset.num_rows, visual.shape[1],
                    text.shape[1]),
      catalogue=Catalogue.from_features(visual, text, content),
      data=data,
      lengths=dataset.lengths)
