"""Local update of ONE client (McMahan et al. 2017, "Communication-Efficient
Learning of Deep Networks from Decentralized Data", ClientUpdate).

Nothing here knows of other clients; `federation` vmaps it. Axes: `B` windows
of a step, `L` window, `Q` targets of a window (1, or L with all positions),
`T` = B·Q targets of a step, `N` negatives, `U` rows of the client's item table.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedmmr_jax import losses
from fedmmr_jax import memory as memory_lib
from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax import prototypes as prototypes_lib
from fedmmr_jax import vocabulary as vocabulary_lib
from fedmmr_jax.config import ClientConfig, RunConfig
from fedmmr_jax.data.dataset import ClientData, HELD_OUT
from fedmmr_jax.memory import Memory
from fedmmr_jax.metrics import Mean
from fedmmr_jax.models.feddmmr import (
    Catalogue, FedDMMR, SEMANTIC, VISUAL, view_memory)
from fedmmr_jax.models.experts import MemoryView
from fedmmr_jax.prototypes import Prototypes
from fedmmr_jax.scoring import Params, draw_negatives, score_batch
from fedmmr_jax.vocabulary import Vocabulary
from fedmmr_jax.windows import (
    Batch, cut_windows, num_steps, num_windows, window_stride)


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
    delta: local minus server parameters; the item table has U rows.
    vocabulary: which items these are.
    weight: [] float32, its number of positives.
    memory: its memory after training.
    prototypes: centres of its memory's texts and their sizes.
    metrics: means over its steps.
  """

  delta: Params
  vocabulary: Vocabulary
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
  """What a client carries from step to step.

  Attributes:
    params: its parameters; the item table has U rows.
    opt_state: of the local optimizer, its moments likewise.
    memory: its memory.
    metrics: sums over the steps so far.
  """

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
  vocabulary = _round_vocabulary(model, config, client, key)
  sent = vocabulary_lib.take(broadcast.params, vocabulary.ids)

  def epoch(number, state):
    order = _shuffled(_order_key(key, number), own_windows, most_windows)

    def step(i, state):
      rank = i * batch_size + jnp.arange(batch_size)
      index = order.at[rank].get(mode='fill', fill_value=0)
      negative_key, dropout_key = _step_keys(key, number, i)
      data = StepData(
          batch=cut_windows(client, index, rank < own_windows, stride,
                            config.model.max_seq_len),
          negative=draw_negatives(
              negative_key, client, config, model.num_rows),
          catalogue=broadcast.catalogue,
          view=memory_view(state.memory, broadcast, config),
          sent=sent, key=dropout_key)
      return _train_step(model, config, optimizer, vocabulary, data, state)

    return jax.lax.fori_loop(0, max_steps, step, state)

  start = LocalState(sent, optimizer.init(sent), memory, empty_metrics())
  end = jax.lax.fori_loop(0, config.client.local_epochs, epoch, start)
  positives = jnp.maximum(client.num_train - 1, 0).astype(jnp.float32)
  filled = metrics_lib.mean(memory_lib.fill(end.memory), client.num_train > 0)
  return ClientUpdate(
      delta=optax.tree.sub(end.params, sent),
      vocabulary=vocabulary,
      weight=positives,
      memory=end.memory,
      prototypes=summarise(end.memory, broadcast.catalogue, config),
      metrics=end.metrics | {'memory_fill': filled})


def _round_vocabulary(model, config, client, key) -> Vocabulary:
  """The items that a round of this client may look up."""
  catalogue = vocabulary_lib.whole(model.num_rows)
  if config.client.vocabulary == 'dense':
    return catalogue
  epochs = jnp.arange(config.client.local_epochs)
  steps = jnp.arange(num_steps(client.history.shape[0] - HELD_OUT, config))

  def negative(epoch, i):  # the draw that the step will make again
    negative_key, _ = _step_keys(key, epoch, i)
    return draw_negatives(negative_key, client, config, model.num_rows)

  negatives = jax.vmap(jax.vmap(negative, (None, 0)), (0, None))(epochs, steps)
  return vocabulary_lib.touched([client.history, negatives], catalogue)


def _order_key(key, epoch) -> jax.Array:
  """Key of the order in which an epoch takes its windows."""
  return jax.random.fold_in(jax.random.fold_in(key, epoch), 0)


def _step_keys(key, epoch, step) -> tuple[jax.Array, jax.Array]:
  """Keys of a step's negatives and of its dropout."""
  step_key = jax.random.fold_in(jax.random.fold_in(key, epoch), step + 1)
  negative_key, dropout_key = jax.random.split(step_key)
  return negative_key, dropout_key


class StepData(NamedTuple):
  """What one step trains on; ids are rows of the state's item table.

  Attributes:
    batch: windows and targets.
    negative: [T, N] or [N] int32.
    catalogue: features of the rows.
    view: what the experts may attend to.
    sent: the server's parameters, of the same rows.
    key: for dropout.
  """

  batch: Batch
  negative: jax.Array
  catalogue: Catalogue
  view: MemoryView
  sent: Params
  key: jax.Array


def _train_step(model, config, optimizer, vocabulary, data: StepData,
                state: LocalState) -> LocalState:
  """One step, on the rows of the item table that it touches (`vocabulary`)."""
  if config.client.vocabulary == 'dense':
    after, surprise = _optimise(model, config, optimizer, data, state)
  else:
    touched = vocabulary_lib.touched(
        [data.batch.windows, data.batch.targets, data.negative], vocabulary)
    rows = vocabulary.rows(touched.ids)
    after, surprise = _optimise(
        model.clone(num_rows=len(rows)), config, optimizer,
        _renumbered(data, touched, rows), vocabulary_lib.take(state, rows))
    after = vocabulary_lib.put(state, rows, touched.is_first, after)
  return after._replace(memory=memory_lib.update_all(
      state.memory, data.batch.targets.reshape(-1), surprise,
      data.batch.valid.reshape(-1), config.memory))


def _renumbered(data: StepData, touched: Vocabulary,
                rows: jax.Array) -> StepData:
  """The step's data over its own rows instead of the catalogue."""
  return data._replace(
      batch=data.batch._replace(
          windows=touched.rows(data.batch.windows),
          targets=touched.rows(data.batch.targets)),
      negative=touched.rows(data.negative),
      catalogue=jax.tree.map(lambda x: x[touched.ids], data.catalogue),
      sent=vocabulary_lib.take(data.sent, rows))


def _optimise(model, config, optimizer, data: StepData,
              state: LocalState) -> tuple[LocalState, jax.Array]:
  """Parameters and optimizer after a step, and the targets' surprise [T].

  A step without any target (past the client's own) changes nothing.
  """
  gradient, (surprise, step_metrics) = jax.grad(step_loss, has_aux=True)(
      state.params, model, data.batch, data.negative, data.catalogue,
      data.view, data.key, config)
  if config.client.proximal_mu:  # FedProx (Li et al. 2020): μ (w − w_server)
    gradient = jax.tree.map(
        lambda g, w, w0: g + config.client.proximal_mu * (w - w0),
        gradient, state.params, data.sent)
  updates, opt_state = optimizer.update(
      gradient, state.opt_state, state.params)
  after = state._replace(
      params=optax.apply_updates(state.params, updates), opt_state=opt_state,
      metrics=metrics_lib.merge(state.metrics, step_metrics))
  active = jnp.any(data.batch.valid)
  return jax.tree.map(
      lambda new, old: jnp.where(active, new, old), after, state), surprise


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
    negative = draw_negatives(
        jax.random.fold_in(key, i), client, config, model.num_rows)
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
