"""Local update of ONE client (McMahan et al. 2017, "Communication-Efficient
Learning of Deep Networks from Decentralized Data", ClientUpdate).

Nothing here knows of other clients; `federation` vmaps it. Axes: `B` windows
of a step, `L` window, `Q` targets of a window (1, or L with all positions),
`T` = B·Q targets of a step, `N` negatives.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedmmr_jax import losses
from fedmmr_jax import memory as memory_lib
from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax import prototypes as prototypes_lib
from fedmmr_jax.config import ClientConfig, RunConfig
from fedmmr_jax.data.dataset import ClientData
from fedmmr_jax.memory import Memory
from fedmmr_jax.metrics import Mean
from fedmmr_jax.models.feddmmr import (
    Catalogue, FedDMMR, SEMANTIC, VISUAL, view_memory)
from fedmmr_jax.models.experts import MemoryView
from fedmmr_jax.prototypes import Prototypes
from fedmmr_jax.scoring import Params, draw_negatives, score_batch
from fedmmr_jax.windows import (
    Batch, cut_windows, num_windows, window_stride)


class Broadcast(NamedTuple):
  """What the server sends to each client of a cohort.

  Attributes:
    params: the server's parameters.
    prototypes: global prototypes over the text features.
    catalogue: item features (public, the same for everybody).
  """

  params: Params
  prototypes: Prototypes
  catalogue: Catalogue


class ClientUpdate(NamedTuple):
  """What a client returns; only `memory` stays with it.

  Attributes:
    delta: local minus server parameters.
    weight: [] float32, its number of positives.
    memory: its memory after training.
    prototypes: centres of its memory's texts and their sizes.
    metrics: means over its steps.
  """

  delta: Params
  weight: jax.Array
  memory: Memory
  prototypes: Prototypes
  metrics: dict[str, Mean]


def step_loss(params: Params, model: FedDMMR, batch: Batch,
              negative: jax.Array, catalogue: Catalogue, view: MemoryView,
              key: jax.Array, config: RunConfig):
  """Loss of one step.

  Returns:
    (total loss, (surprise [T] for the memory, metrics of the step)).
  """
  scores = score_batch(model, params, batch, negative, catalogue, view, key)
  valid = batch.valid.reshape(-1)
  both = jnp.all(scores.candidates.available, axis=-1)
  balance = losses.load_balance_loss(
      scores.candidates.weights, scores.counted & both)
  rec = losses.recommendation_loss(scores.positive, scores.negative)
  has_both = jnp.all(scores.target.available, axis=-1)
  terms = losses.combine(config.loss, rec, valid, scores.target.visual,
                         scores.target.semantic, has_both, balance)
  count = jnp.sum(valid)
  pairs = jnp.sum(valid & has_both)
  usable = scores.counted & jnp.any(scores.candidates.available, axis=-1)
  weights = scores.candidates.weights
  step_metrics = {
      'loss': metrics_lib.mean(terms.total, count),
      'rec_loss': metrics_lib.mean(terms.rec, count),
      'contrastive_loss': metrics_lib.mean(terms.contrastive, pairs),
      'load_balance_loss': metrics_lib.mean(balance, pairs),
      'w_visual': metrics_lib.over(weights[:, VISUAL], usable),
      'w_semantic': metrics_lib.over(weights[:, SEMANTIC], usable),
      'instance_weight': metrics_lib.mean(terms.instance_weight, pairs),
  }
  surprise = losses.pairwise_surprise(scores.positive, scores.negative)
  return terms.total, (surprise, step_metrics)


def make_client_optimizer(config: ClientConfig) -> optax.GradientTransformation:
  """Local optimizer; L2 is added to the gradient, as torch.optim.Adam does."""
  step = {'adam': optax.adam, 'sgd': optax.sgd}[config.client_optimizer]
  return optax.chain(optax.add_decayed_weights(config.weight_decay),
                     step(config.client_learning_rate))


class LocalState(NamedTuple):
  """What a client carries from step to step."""

  params: Params
  opt_state: optax.OptState
  memory: Memory
  metrics: dict[str, Mean]


def local_update(model: FedDMMR, config: RunConfig, broadcast: Broadcast,
                 client: ClientData, memory: Memory, key: jax.Array,
                 max_steps: jax.Array) -> ClientUpdate:
  """Trains on one client's positives for `local_epochs`.

  Args:
    model: the architecture.
    config: static settings.
    broadcast: what the server sent.
    client: its data.
    memory: its memory.
    key: its key of this round; consumed whole.
    max_steps: [] int32 steps of an epoch to run, at least its own number;
      steps past its own change nothing. Shared by clients vmapped together.

  Returns:
    What goes back to the server, and the memory.
  """
  optimizer = make_client_optimizer(config.client)
  stride = window_stride(config.client, config.model.max_seq_len)
  batch_size = config.client.batch_size
  own_windows = num_windows(client.num_train, stride)
  most_windows = num_windows(client.history.shape[0], stride)

  def epoch(number, state):
    epoch_key = jax.random.fold_in(key, number)
    order = _shuffled(
        jax.random.fold_in(epoch_key, 0), own_windows, most_windows)

    def step(i, state):
      rank = i * batch_size + jnp.arange(batch_size)
      index = order.at[rank].get(mode='fill', fill_value=0)
      batch = cut_windows(client, index, rank < own_windows, stride,
                          config.model.max_seq_len)
      step_key = jax.random.fold_in(epoch_key, i + 1)
      after = _train_step(model, config, optimizer, broadcast, client, batch,
                          state, step_key)
      active = i * batch_size < own_windows
      return jax.tree.map(lambda a, b: jnp.where(active, a, b), after, state)

    return jax.lax.fori_loop(0, max_steps, step, state)

  start = LocalState(broadcast.params, optimizer.init(broadcast.params),
                     memory, empty_metrics())
  end = jax.lax.fori_loop(0, config.client.local_epochs, epoch, start)
  positives = jnp.maximum(client.num_train - 1, 0).astype(jnp.float32)
  filled = metrics_lib.mean(memory_lib.fill(end.memory), client.num_train > 0)
  return ClientUpdate(
      delta=optax.tree.sub(end.params, broadcast.params),
      weight=positives,
      memory=end.memory,
      prototypes=summarise(end.memory, broadcast.catalogue, config),
      metrics=end.metrics | {'memory_fill': filled})


def _train_step(model, config, optimizer, broadcast, client, batch, state,
                key) -> LocalState:
  negative_key, dropout_key = jax.random.split(key)
  negative = draw_negatives(
      negative_key, batch, client, config.client, model.num_rows)
  view = memory_view(state.memory, broadcast, config)
  gradient, (surprise, step_metrics) = jax.grad(step_loss, has_aux=True)(
      state.params, model, batch, negative, broadcast.catalogue, view,
      dropout_key, config)
  if config.client.proximal_mu:  # FedProx (Li et al. 2020): μ (w − w_server)
    gradient = jax.tree.map(
        lambda g, w, w0: g + config.client.proximal_mu * (w - w0),
        gradient, state.params, broadcast.params)
  updates, opt_state = optimizer.update(
      gradient, state.opt_state, state.params)
  return LocalState(
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      memory=memory_lib.update_all(
          state.memory, batch.targets.reshape(-1), surprise,
          batch.valid.reshape(-1), config.memory),
      metrics=metrics_lib.merge(state.metrics, step_metrics))


def memory_view(memory: Memory, broadcast: Broadcast,
                config: RunConfig) -> MemoryView:
  """What one client's experts may attend to."""
  items = memory_lib.retrieve(memory, config.memory)
  if not config.model.global_memory:
    return view_memory(broadcast.catalogue, items)
  return view_memory(broadcast.catalogue, items, broadcast.prototypes.centre,
                     broadcast.prototypes.size > 0)


def summarise(memory: Memory, catalogue: Catalogue,
              config: RunConfig) -> Prototypes:
  """Prototypes of the texts of the stored items, for upload."""
  stored = (memory.item > 0) & catalogue.has_text[memory.item]
  return prototypes_lib.cluster(
      catalogue.text[memory.item], stored.astype(jnp.float32),
      config.memory.num_prototypes, config.memory.prototype_iterations)


def fill_memory(model: FedDMMR, config: RunConfig, broadcast: Broadcast,
                client: ClientData, memory: Memory, key: jax.Array,
                max_steps: jax.Array) -> Memory:
  """Fills an empty memory by a forward pass over the training history.

  Windows are taken in time order, so the memory ends with the latest items.

  Args:
    As `local_update`; nothing is trained and there is no dropout.

  Returns:
    The memory; unchanged if the client has been sampled before.
  """
  stride = window_stride(config.client, config.model.max_seq_len)
  batch_size = config.client.batch_size
  own_windows = num_windows(client.num_train, stride)

  def step(i, filled):
    rank = i * batch_size + jnp.arange(batch_size)
    batch = cut_windows(client, own_windows - 1 - rank, rank < own_windows,
                        stride, config.model.max_seq_len)
    negative = draw_negatives(jax.random.fold_in(key, i), batch, client,
                              config.client, model.num_rows)
    scores = score_batch(
        model, broadcast.params, batch, negative, broadcast.catalogue,
        memory_view(filled, broadcast, config), None)
    surprise = losses.pairwise_surprise(scores.positive, scores.negative)
    return memory_lib.update_all(
        filled, batch.targets.reshape(-1), surprise, batch.valid.reshape(-1),
        config.memory)

  filled = jax.lax.fori_loop(0, max_steps, step, memory)
  never_sampled = memory.clock == 0
  return jax.tree.map(
      lambda new, old: jnp.where(never_sampled, new, old), filled, memory)


def empty_metrics() -> dict[str, Mean]:
  """Neutral element of the step metrics."""
  return {name: metrics_lib.EMPTY for name in (
      'loss', 'rec_loss', 'contrastive_loss', 'load_balance_loss', 'w_visual',
      'w_semantic', 'instance_weight')}


def _shuffled(key, count, size: int) -> jax.Array:
  """[size] int32: 0 … count−1 in random order, then the rest."""
  draws = jax.random.uniform(key, (size,))
  return jnp.argsort(jnp.where(jnp.arange(size) < count, draws, jnp.inf))
