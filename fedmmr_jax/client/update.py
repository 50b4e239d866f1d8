"""Local update of ONE client (McMahan et al. 2017, "Communication-Efficient
Learning of Deep Networks from Decentralized Data", ClientUpdate).

Nothing here depends on other clients; `federation` vmaps it. Axes: `B` windows
of a step, `L` window length, `Q` targets of a window (1, or L with all
positions), `T` = B·Q targets of a step, `N` negatives, `U` rows of the client's
item table.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax import optimizers
from fedmmr_jax.client import losses
from fedmmr_jax.client import memory as memory_lib
from fedmmr_jax.client import personal as personal_lib
from fedmmr_jax.client import profile as profile_lib
from fedmmr_jax.client import prototypes as prototypes_lib
from fedmmr_jax.client import view as view_lib
from fedmmr_jax.client import vocabulary as vocabulary_lib
from fedmmr_jax.client.drift import DriftControl, LocalResult, record_gradient
from fedmmr_jax.client.memory import Memory
from fedmmr_jax.client.prototypes import Prototypes
from fedmmr_jax.client.scoring import draw_negatives, Params, score_batch
from fedmmr_jax.client.vocabulary import Vocabulary
from fedmmr_jax.client.windows import (
  Batch,
  cut_windows,
  num_positives,
  num_steps,
  num_windows,
  window_stride,
)
from fedmmr_jax.config import RunConfig
from fedmmr_jax.data.dataset import ClientData
from fedmmr_jax.metrics import Mean
from fedmmr_jax.models.experts import MemoryView, TEXT
from fedmmr_jax.models.feddmmr import Catalogue, FedDMMR


class Broadcast(NamedTuple):
  """What the server sends to each client of a cohort.

  Attributes:
    params: the server's parameters.
    prototypes: global prototypes of the text features; None unless experts
      attend to them (`global_memory`).
    catalogue: item features (public, the same for all clients).
    learning_rate: [] float32 of the clients in this round.
    control: what drift control sends, see `DriftControl.broadcast`.
  """

  params: Params
  prototypes: Prototypes | None
  catalogue: Catalogue
  learning_rate: jax.Array
  control: Any


class ClientUpdate(NamedTuple):
  """What a client returns; `memory`, `kept` and `personal` stay with it.

  Attributes:
    delta: local minus server parameters; the item table has U rows. Zero for
      personal ones.
    control: the upload of drift control, for the client's rows or the whole
      catalogue; None without one.
    vocabulary: the items of the U rows.
    weight: [] float32, positives of an epoch; of a client that stopped before,
      those it has trained on, divided by the epochs.
    steps: [] float32, local steps taken; at least 1.
    memory: its memory after training; None in a model without experts.
    kept: drift-control state kept by the client; None without one.
    prototypes: centres of the texts in its memory and their sizes; None unless
      `global_memory`.
    metrics: means over its steps.
    counts: [] bool, False where the server took the update out of the sum
      (`without`); what the client keeps is then what it was.
    personal: its own parameters; None without `personal`.
  """

  delta: Params
  control: Any
  vocabulary: Vocabulary
  weight: jax.Array
  steps: jax.Array
  memory: Memory | None
  kept: Any
  prototypes: Prototypes | None
  metrics: dict[str, Mean]
  counts: jax.Array | bool = True
  personal: Any = None

  def sent(self) -> dict[str, Any]:
    """The numbers that leave the client, by the fields they are in; which rows
    of the item table its delta is of is left out."""
    fields = 'delta', 'control', 'weight', 'steps', 'prototypes', 'metrics'
    return {name: getattr(self, name) for name in fields}

  def without(self, out: jax.Array) -> 'ClientUpdate':
    """As if no client stood behind it, where `out`, [] bool: nothing that is
    summed or collected has a trace of it. Elsewhere bit for bit the same."""

    def cleared(tree):
      return jax.tree.map(lambda x: jnp.where(out, jnp.zeros_like(x), x), tree)

    return self._replace(
      delta=cleared(self.delta),
      control=cleared(self.control),
      weight=cleared(self.weight),
      steps=jnp.where(out, 1.0, self.steps),
      prototypes=cleared(self.prototypes),
      metrics=cleared(self.metrics),
      counts=self.counts & ~out,
    )


def step_loss(
  params: Params,
  model: FedDMMR,
  batch: Batch,
  negative: jax.Array,
  catalogue: Catalogue,
  view: MemoryView | None,
  key: jax.Array,
  config: RunConfig,
):
  """Loss of one step.

  Returns:
    (total loss, (surprise [T] for the memory, metrics of the step)).
  """
  # What is frozen gets no gradient, and none is computed for it.
  params = jax.tree.map(
    lambda x, frozen: jax.lax.stop_gradient(x) if frozen else x,
    params,
    optimizers.frozen(config.client, params),
  )
  scores = score_batch(model, params, batch, negative, catalogue, view, key)
  valid = batch.valid.reshape(-1)
  candidates, target = scores.candidates, scores.target
  balance, paired = jnp.zeros(()), jnp.zeros_like(valid)
  if model.has_pairs:
    has_choice = jnp.all(candidates.available, axis=-1)
    balance = losses.load_balance_loss(
      candidates.weights, scores.counted & has_choice
    )
    paired = valid & (jnp.sum(target.available, axis=-1) > 1)
  rec = losses.cross_entropy(scores.positive, scores.rest)
  terms = losses.combine(
    config.contrastive,
    config.model.router.load_balance,
    rec,
    valid,
    [target.outputs[m.name] for m in model.modalities],
    target.available,
    balance,
    _importance(batch, config),
    scores.profile,
    config.model.profile.weight if config.model.profile else 0.0,
  )
  count = jnp.sum(valid)
  pairs = jnp.sum(paired)
  contrasts = pairs * bool(config.contrastive)
  usable = scores.counted & jnp.any(candidates.available, axis=-1)
  step_metrics = {
    metrics_lib.LOSS: metrics_lib.mean(terms.total, count),
    metrics_lib.REC_LOSS: metrics_lib.mean(terms.rec, count),
    metrics_lib.CONTRASTIVE_LOSS: metrics_lib.mean(
      terms.contrastive, contrasts
    ),
    metrics_lib.BALANCE_LOSS: metrics_lib.mean(balance, pairs),
    metrics_lib.INSTANCE_WEIGHT: metrics_lib.mean(
      terms.instance_weight, contrasts
    ),
    metrics_lib.HARDEST_SHARE: metrics_lib.mean(terms.hardest_share, contrasts),
    metrics_lib.WEIGHT_SHARES: metrics_lib.mean(terms.weight_shares, contrasts),
  } | {
    metrics_lib.ROUTER_WEIGHT + m.name: metrics_lib.over(
      candidates.weights[:, number], usable
    )
    for number, m in enumerate(model.modalities)
  }
  surprise = losses.pairwise_surprise(scores.positive, scores.negative)
  return terms.total, (surprise, step_metrics)


def _importance(batch: Batch, config: RunConfig) -> jax.Array:
  """[T] factors of the targets' losses."""
  found = losses.importance_of(
    batch.lateness.reshape(-1), config.client.objective.late_emphasis
  )
  return found if batch.weight is None else found * batch.weight.reshape(-1)


@dataclasses.dataclass(frozen=True)
class ClientProgram:
  """The program of every client. Static: hashed and compared by value.

  Attributes:
    model: the architecture.
    config: settings.
    drift: the drift control.
  """

  model: FedDMMR
  config: RunConfig
  drift: DriftControl


class LocalState(NamedTuple):
  """A client's state between steps.

  Attributes:
    params: its parameters; the item table has U rows.
    opt_state: of the local optimizer, with moments likewise of U rows; if drift
      control needs the mean gradient, (`drift.MeanGradient`, optimizer state).
    memory: its memory; None in a model without experts.
    metrics: sums over the steps so far.
  """

  params: Params
  opt_state: optax.OptState
  memory: Memory | None
  metrics: dict[str, Mean]


def local_update(
  program: ClientProgram,
  broadcast: Broadcast,
  client: ClientData,
  memory: Memory | None,
  kept: Any,
  key: jax.Array,
  max_steps: jax.Array,
  work: jax.Array | None = None,
  personal: Any = None,
) -> ClientUpdate:
  """Trains on one client's positives for `local_epochs`.

  Args:
    program: the client program.
    broadcast: what the server sent.
    client: its data.
    memory: its memory; None in a model without experts.
    kept: its drift-control state from the last round.
    key: its key for this round; used up here.
    max_steps: [] int32 steps to run per epoch, at least the client's own
      number; steps beyond it change nothing. Shared by clients vmapped
      together.
    work: [] float32 share of its own steps after which the client stops, at
      least one; weight and steps are then of what it has done. None = all.
    personal: its own parameters, which it has instead of the server's; None
      without `personal`.

  Returns:
    What goes back to the server, and what stays.
  """
  model, config, drift = program.model, program.config, program.drift
  stride = window_stride(config.client, config.model.max_seq_len)
  batch_size = config.client.batch_size
  own_windows = num_windows(client.num_train, stride)
  most_windows = num_windows(client.history.shape[0], stride)
  vocabulary = round_vocabulary(model, config, client, key)
  sent = vocabulary_lib.take(
    personal_lib.put(broadcast.params, personal), vocabulary.ids
  )
  own_steps = num_steps(client.num_train, config)
  all_steps = own_steps * config.client.local_epochs
  stop = None
  if work is not None:
    stop = jnp.maximum(jnp.round(work * all_steps), 1).astype(jnp.int32)
  optimizer = _optimizer(program, broadcast, vocabulary, kept)

  cut = _cutter(model, config, client, sent, vocabulary, broadcast.catalogue)

  def epoch(number, state):
    order = _window_order(_order_key(key, number), own_windows, most_windows)

    def step(i, state):
      rank = i * batch_size + jnp.arange(batch_size)
      index = order.at[rank].get(mode='fill', fill_value=0)
      negative_key, dropout_key = _step_keys(key, number, i)
      present = rank < own_windows
      if stop is not None:
        present &= number * own_steps + i < stop
      batch = cut(index, present)
      negative = _negatives_of_step(negative_key, i, client, config)
      data = StepData(
        batch=batch,
        negative=negative,
        catalogue=broadcast.catalogue,
        view=view_lib.view(
          model,
          state.memory,
          broadcast.catalogue,
          broadcast.prototypes,
          view_lib.asked_in_training(batch, negative),
          client.history,
          config.memory,
        ),
        texts=broadcast.catalogue.features.get(TEXT),
        key=dropout_key,
      )
      return _train_step(model, config, optimizer, vocabulary, data, state)

    return jax.lax.fori_loop(0, max_steps, step, state)

  if memory is not None:
    memory = view_lib.up_to_date(
      memory,
      client.history,
      client.num_train,
      client.num_train,
      broadcast.catalogue,
      config.memory,
    )
  start = LocalState(sent, optimizer.init(sent), memory, empty_metrics(model))
  end = jax.lax.fori_loop(0, config.client.local_epochs, epoch, start)
  names = config.federation.personal_groups if personal is not None else ()
  delta = personal_lib.without(optax.tree.sub(end.params, sent), names)
  weight = num_positives(client.num_train, config).astype(jnp.float32)
  if stop is not None:
    counted = end.metrics[metrics_lib.LOSS].weight
    weight = jnp.where(
      stop < all_steps, counted / config.client.local_epochs, weight
    )
    all_steps = jnp.minimum(all_steps, stop)
  kept, uploaded = drift.finish(
    _local_result(
      drift,
      vocabulary,
      delta,
      kept,
      end.opt_state,
      weight > 0,
      broadcast,
      names,
    )
  )
  return ClientUpdate(
    delta=delta,
    control=uploaded,
    vocabulary=vocabulary,
    weight=weight,
    steps=jnp.maximum(all_steps, 1).astype(jnp.float32),
    memory=end.memory,
    kept=kept,
    prototypes=summarise(end.memory, broadcast.catalogue, config),
    metrics=end.metrics
    | client_metrics(end.memory, vocabulary, client.num_train > 0),
    counts=jnp.ones((), bool),
    personal=personal_lib.kept(personal, end.params, vocabulary, names),
  )


def client_metrics(
  memory: Memory | None, vocabulary: Vocabulary, trains: jax.Array
) -> dict[str, Mean]:
  """Rows of the item table that a training client works on, fill of its memory
  and age of the entries in processed samples; these two empty without one."""
  found = no_client_metrics() | {
    metrics_lib.ITEM_ROWS: metrics_lib.mean(
      jnp.sum(vocabulary.is_first).astype(jnp.float32), trains
    )
  }
  if memory is None:
    return found
  return found | {
    metrics_lib.MEMORY_FILL: metrics_lib.mean(memory_lib.fill(memory), trains),
    metrics_lib.MEMORY_AGE: metrics_lib.over(
      memory.clock - memory.last_update, memory.item > 0
    ),
  }


def no_client_metrics() -> dict[str, Mean]:
  """Neutral element of `client_metrics`."""
  return {
    name: metrics_lib.EMPTY
    for name in (
      metrics_lib.ITEM_ROWS,
      metrics_lib.MEMORY_FILL,
      metrics_lib.MEMORY_AGE,
    )
  }


def _optimizer(
  program, broadcast, vocabulary, kept
) -> optax.GradientTransformation:
  """The local optimizer, for the vocabulary's rows."""
  drift = program.drift
  sent_rows, kept_rows = (
    vocabulary_lib.take(tree, vocabulary.ids)
    for tree in (broadcast.control, kept)
  )
  optimizer = optimizers.client_optimizer(
    program.config,
    broadcast.learning_rate,
    drift.transform(sent_rows, kept_rows),
    drift.makes_step,
  )
  if drift.needs_gradient:
    return optax.chain(record_gradient(), optimizer)
  return optimizer


def _local_result(
  drift, vocabulary, delta, kept, opt_state, trained, broadcast, names
) -> LocalResult:
  recorded = opt_state[0] if drift.needs_gradient else None
  mean = personal_lib.without(recorded.mean(), names) if recorded else None
  return LocalResult(
    delta=delta,
    kept=kept,
    mean_gradient=mean,
    trained=trained,
    whole=lambda rows: vocabulary_lib.scatter(
      rows, vocabulary, broadcast.params
    ),
  )


def round_vocabulary(model, config, client, key) -> Vocabulary:
  """The items that a round of this client may look up."""
  catalogue = vocabulary_lib.whole(model.num_rows)
  if config.client.vocabulary == 'dense':
    return catalogue
  epochs = jnp.arange(config.client.local_epochs)
  # With a given split a client may hold nothing out.
  steps = jnp.arange(num_steps(client.history.shape[0], config))

  def negative(epoch, i):  # the draw that the step will make again
    negative_key, _ = _step_keys(key, epoch, i)
    return _negatives_of_step(negative_key, i, client, config)

  negatives = jax.vmap(jax.vmap(negative, (None, 0)), (0, None))(epochs, steps)
  # Held-out items train nothing; left out, they cannot even move a row to
  # another place of the table, and with it a sum's rounding.
  return vocabulary_lib.touched([_trained(client), negatives], catalogue)


def _negatives_of_step(key, step, client, config) -> jax.Array:
  """`draw_negatives`; none, 0, in a step beyond the client's own."""
  drawn = draw_negatives(key, client, config)
  return jnp.where(step < num_steps(client.num_train, config), drawn, 0)


def _trained(client: ClientData) -> jax.Array:
  """[H] int32 the client's training items, 0 behind."""
  position = jnp.arange(client.history.shape[0])
  return jnp.where(position < client.num_train, client.history, 0)


def _cutter(model, config, client, params, vocabulary, catalogue):
  """(numbers of windows [B], which are present [B]) -> their batch, with the
  profiles that `params`, of the vocabulary's rows, give."""
  length = config.model.max_seq_len
  stride = window_stride(config.client, length)

  def cut(index, present):
    return cut_windows(client, index, present, stride, length)

  if not config.model.profile:
    return cut
  if len(vocabulary.ids) != model.num_rows:
    catalogue = jax.tree.map(lambda x: x[vocabulary.ids], catalogue)
  sums = profile_lib.running_sums(
    model, params, vocabulary.rows(_trained(client)), catalogue
  )

  def cut_with_profiles(index, present):
    stop = jnp.maximum(client.num_train - index * stride, 0)
    start = jnp.maximum(stop - length - 1, 0)
    return cut(index, present)._replace(
      profile=profile_lib.outside(sums, client.num_train, start, stop)
    )

  return cut_with_profiles


def _order_key(key, epoch) -> jax.Array:
  """Key of the order in which an epoch takes its windows."""
  return jax.random.fold_in(jax.random.fold_in(key, epoch), 0)


def _step_keys(key, epoch, step) -> tuple[jax.Array, jax.Array]:
  """Keys of a step's negatives and of its dropout."""
  step_key = jax.random.fold_in(jax.random.fold_in(key, epoch), step + 1)
  negative_key, dropout_key = jax.random.split(step_key)
  return negative_key, dropout_key


class StepData(NamedTuple):
  """The input of one step; ids are rows of the state's item table.

  Attributes:
    batch: windows and targets.
    negative: [T, N] or [N] int32.
    catalogue: features of the rows.
    view: what the experts may attend to.
    texts: [V, F] text features of the whole catalogue, for the memory, or None.
    key: for dropout.
  """

  batch: Batch
  negative: jax.Array
  catalogue: Catalogue
  view: MemoryView | None
  texts: jax.Array | None
  key: jax.Array


def _train_step(
  model, config, optimizer, vocabulary, data: StepData, state: LocalState
) -> LocalState:
  """One step, on the rows of the item table that it touches (`vocabulary`)."""
  if config.client.vocabulary == 'dense':
    after, surprise = _optimise(model, config, optimizer, data, state)
  else:
    touched = vocabulary_lib.touched(
      [data.batch.windows, data.batch.targets, data.negative], vocabulary
    )
    rows = vocabulary.rows(touched.ids)
    after, surprise = _optimise(
      model.clone(num_rows=len(rows)),
      config,
      optimizer,
      _renumbered(data, touched),
      vocabulary_lib.take(state, rows),
    )
    after = vocabulary_lib.put(state, rows, touched.is_first, after)
  if state.memory is None:
    return after
  return after._replace(
    memory=memory_lib.update_all(
      state.memory,
      data.batch.targets.reshape(-1),
      surprise,
      data.batch.valid.reshape(-1),
      data.texts,
      config.memory,
    )
  )


def _renumbered(data: StepData, touched: Vocabulary) -> StepData:
  """The step's data over its own rows instead of the catalogue."""
  return data._replace(
    batch=data.batch._replace(
      windows=touched.rows(data.batch.windows),
      targets=touched.rows(data.batch.targets),
    ),
    negative=touched.rows(data.negative),
    catalogue=jax.tree.map(lambda x: x[touched.ids], data.catalogue),
  )


def _optimise(
  model, config, optimizer, data: StepData, state: LocalState
) -> tuple[LocalState, jax.Array]:
  """Parameters and optimizer after a step, and the targets' surprise [T].

  A step without any target (past the client's own) changes nothing.
  """
  gradient, (surprise, step_metrics) = jax.grad(step_loss, has_aux=True)(
    state.params,
    model,
    data.batch,
    data.negative,
    data.catalogue,
    data.view,
    data.key,
    config,
  )
  count = jnp.sum(data.batch.valid)
  step_metrics |= {
    name: metrics_lib.mean(optax.tree.norm(gradient[group]), count)
    for name, group in gradient_norms(model).items()
  }
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  after = state._replace(
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    metrics=metrics_lib.merge(state.metrics, step_metrics),
  )
  active = jnp.any(data.batch.valid)
  return jax.tree.map(
    lambda new, old: jnp.where(active, new, old), after, state
  ), surprise


def summarise(
  memory: Memory, catalogue: Catalogue, config: RunConfig
) -> Prototypes | None:
  """Prototypes of the texts of the stored items, for upload; None if no expert
  attends to them."""
  if not config.global_memory:
    return None
  stored = (memory.item > 0) & catalogue.has[TEXT][memory.item]
  return prototypes_lib.cluster(
    catalogue.features[TEXT][memory.item],
    stored.astype(jnp.float32),
    config.global_memory.number,
    config.global_memory.iterations,
  )


def gradient_norms(model: FedDMMR) -> dict[str, str]:
  """Maps each metric to the top-level parameter whose gradient norm it is."""
  return {metrics_lib.GRADIENT + metrics_lib.BACKBONE: 'backbone'} | {
    metrics_lib.GRADIENT + m.name: f'{m.name}_expert' for m in model.modalities
  }


def empty_metrics(model: FedDMMR) -> dict[str, Mean]:
  """Neutral element of the step metrics."""
  return {
    name: metrics_lib.EMPTY
    for name in (
      metrics_lib.LOSS,
      metrics_lib.REC_LOSS,
      metrics_lib.CONTRASTIVE_LOSS,
      metrics_lib.BALANCE_LOSS,
      metrics_lib.INSTANCE_WEIGHT,
      metrics_lib.HARDEST_SHARE,
      *(metrics_lib.ROUTER_WEIGHT + m.name for m in model.modalities),
      *gradient_norms(model),
    )
  } | {metrics_lib.WEIGHT_SHARES: metrics_lib.empty((losses.WEIGHT_BINS,))}


def _window_order(key, own_windows, most_windows: int) -> jax.Array:
  """[most_windows] int32 window numbers in training order; only the first
  `own_windows` count."""
  draws = jax.random.uniform(key, (most_windows,))
  number = jnp.arange(most_windows)
  return jnp.argsort(jnp.where(number < own_windows, draws, jnp.inf))
