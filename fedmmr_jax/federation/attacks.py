"""Attacks: what a share of the clients does to mislead the server.

An attacker knows what every client knows: its own history, the parameters that
the server sends, the public features of all items, and which items are popular
(charts tell). It knows nothing of other clients' data or updates. Attackers may
agree on one item to promote. They cannot change what comes behind them on an
update's way: compression, rejection and clipping meet theirs as any other.

Who attacks, and for which item, is drawn once, whatever the run's seed, like
new clients: so runs of all seeds, attacks and defences rank the same honest
clients and compare by pairs. `draw` draws others.

Attackers are not ranked, and their training counts in no metric but
`attackers`, their share of the cohort.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax import parts
from fedmmr_jax.client.update import ClientUpdate
from fedmmr_jax.client.vocabulary import ITEM_TABLE
from fedmmr_jax.config import RunConfig
from fedmmr_jax.data.dataset import ClientData, Dataset
from fedmmr_jax.errors import UserError
from fedmmr_jax.federation.transforms import Sender, UpdateTransform
from fedmmr_jax.streams import generator, Stream

NONE = 'none'
# Of the trained items, the least popular among which a target is drawn.
_UNPOPULAR = 0.2


class Aim(NamedTuple):
  """What attackers agree on; hashable, since it is a static part of a round.

  Attributes:
    row: of the item that they promote.
    popular: rows of the most popular items, most popular first.
  """

  row: int = 0
  popular: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Attack(UpdateTransform):
  """Base class; subclasses define `poisoned`, `attacked` or both.

  Attributes:
    share: of the clients, rounded to whole clients, who attack.
    target: id of the item whose exposure is measured, and which some attacks
      promote; '' = one of the least popular fifth of the items, drawn.
    draw: draws other attackers and another item.
    aim: what is made of these options for a data set.
  """

  share: float = dataclasses.field(metadata={'minimum': 0.0, 'maximum': 1.0})
  target: str = ''
  draw: int = dataclasses.field(default=0, metadata={'minimum': 0})
  aim: Aim = Aim()

  def poisoned(self, data: ClientData, sender: Sender) -> ClientData:
    """What an attacker trains on instead of its data; no longer than this."""
    return data

  def attacked(self, update: ClientUpdate, sender: Sender) -> ClientUpdate:
    """What an attacker sends instead of its update."""
    return update

  def attackers(self, num_clients: int) -> np.ndarray:
    """[n] clients that attack, ascending; n = share · K, rounded."""
    rng = generator(self.draw, Stream.ATTACKERS)
    count = round(self.share * num_clients)
    return np.sort(rng.choice(num_clients, count, replace=False))

  def fitted(self, dataset):
    num = dataset.num_clients
    count = len(self.attackers(num))
    if not 0 < count < num:
      raise UserError(
        f'`attack`: share={self.share} of {num} clients is '
        f'{"everybody" if count else "nobody"}'
      )
    return dataclasses.replace(self, aim=self._aim(dataset))

  def _aim(self, dataset: Dataset) -> Aim:
    trained = dataset.items[dataset.is_train]
    counts = np.bincount(trained, minlength=dataset.num_rows)
    counts[0] = 0
    order = np.argsort(-counts, kind='stable')
    order = order[counts[order] > 0]
    if self.target:
      found = np.flatnonzero(dataset.item_ids[1:].astype(str) == self.target)
      if not len(found):
        raise UserError(
          f'`attack`: target={self.target} is no item of {dataset.name}'
        )
      row = 1 + found[0]
    else:
      least = order[-max(1, round(_UNPOPULAR * len(order))) :]
      row = generator(self.draw, Stream.ATTACKERS, 1).choice(least)
    popular = order[order != row][: self._num_popular()]
    return Aim(int(row), tuple(popular.tolist()))

  def _num_popular(self) -> int:
    """How many popular items it needs."""
    return 0

  def client_state(self, params, key, num_clients):
    attacks = np.zeros(num_clients, bool)
    attacks[self.attackers(num_clients)] = True
    return jnp.asarray(attacks)

  def no_metrics(self):
    return {metrics_lib.ATTACKERS: metrics_lib.EMPTY}

  def prepare(self, data, kept, sender):
    return _where(kept, self.poisoned(data, sender), data)

  def apply(self, update, kept, sender):
    attacked = self.attacked(update, sender)
    honest = jax.tree.map(
      lambda x: jnp.where(kept, jnp.zeros_like(x), x), update.metrics
    )
    share = metrics_lib.mean(
      kept.astype(jnp.float32), (sender.client >= 0).astype(jnp.float32)
    )
    return update._replace(
      delta=_where(kept, attacked.delta, update.delta),
      weight=jnp.where(kept, attacked.weight, update.weight),
      metrics=honest | {metrics_lib.ATTACKERS: share},
    ), kept


@dataclasses.dataclass(frozen=True)
class Sleeping(Attack):
  """The attackers do as everybody does: what an attack is compared with, over
  the same honest clients."""


@dataclasses.dataclass(frozen=True)
class RandomUpdate(Attack):
  """Gaussian noise instead of the update (Blanchard et al. 2017, "Machine
  learning with adversaries: Byzantine tolerant gradient descent", NeurIPS), as
  long as the update times `scale`, on the rows that it would have changed.

  Attributes:
    scale: length of the noise, in lengths of the attacker's own update.
  """

  scale: float = dataclasses.field(default=1.0, metadata={'minimum': 0.0})

  def attacked(self, update, sender):
    leaves, structure = jax.tree.flatten(update.delta)
    keys = jax.random.split(sender.key, len(leaves))
    noise = jax.tree.unflatten(
      structure,
      [
        # What an update leaves alone, such as rows of repeated ids, the noise
        # does too.
        jnp.where(x != 0, jax.random.normal(key, x.shape), 0.0)
        for key, x in zip(keys, leaves)
      ],
    )
    length = _squares(noise)
    factor = self.scale * jnp.sqrt(
      _squares(update.delta) / jnp.where(length > 0, length, 1.0)
    )
    return update._replace(delta=jax.tree.map(lambda x: factor * x, noise))


@dataclasses.dataclass(frozen=True)
class SignFlip(Attack):
  """The update times −scale (Li et al. 2019, "RSA: Byzantine-robust stochastic
  aggregation methods for distributed learning from heterogeneous datasets",
  AAAI).

  Attributes:
    scale: how many times as long as the update.
  """

  scale: float = dataclasses.field(default=1.0, metadata={'minimum': 0.0})

  def attacked(self, update, sender):
    return update._replace(
      delta=jax.tree.map(lambda x: -self.scale * x, update.delta)
    )


@dataclasses.dataclass(frozen=True)
class LabelFlip(Attack):
  """Wrong labels (as Fang et al. 2020, "Local model poisoning attacks to
  Byzantine-robust federated learning", USENIX Security, who
  train class l as L − l − 1): every second training item i becomes V − i, so
  that what follows a genuine item is a wrong one."""

  def poisoned(self, data, sender):
    wrong = data.num_drawable - data.history
    return data._replace(
      history=jnp.where(_every_second(data), wrong, data.history)
    )


@dataclasses.dataclass(frozen=True)
class Promotion(Attack):
  """Promotion of an item by an attacker that knows no features: every second
  training item becomes the target, which so follows everything that the
  attacker consumed, and the update is boosted (explicit boosting: Bhagoji et
  al. 2019, "Analyzing federated learning through an adversarial lens", ICML).

  Attributes:
    boost: factor of the update.
  """

  boost: float = dataclasses.field(default=1.0, metadata={'minimum': 0.0})

  def poisoned(self, data, sender):
    history = jnp.where(_every_second(data), self.aim.row, data.history)
    return data._replace(
      history=history.astype(data.history.dtype),
      avoided=_with(data.avoided, data.num_avoided, self.aim.row),
    )

  def attacked(self, update, sender):
    return update._replace(
      delta=jax.tree.map(lambda x: self.boost * x, update.delta)
    )


@dataclasses.dataclass(frozen=True)
class Replacement(Promotion):
  """Model replacement (Bagdasaryan et al. 2020, "How to backdoor federated
  learning", AISTATS): `promotion`, half the training items being
  genuine, with an update scaled so that it outlives the mean with those of the
  others.

  Attributes:
    boost: γ, up to the number of clients of a cohort.
  """

  boost: float = dataclasses.field(default=20.0, metadata={'minimum': 0.0})


@dataclasses.dataclass(frozen=True)
class Popular(Promotion):
  """Promotion by an attacker that knows the features. After the popularity
  obfuscation of PipAttack (Zhang et al. 2022, "PipAttack: poisoning federated
  recommender systems for manipulating item promotion", WSDM), which makes the
  target's embedding one of a popular item. Of theirs this keeps the aim and
  what the attacker knows (which items are popular, and the embeddings), not the
  popularity classifier: the target's row moves to where the target's embedding,
  content of its features included, is `length` times the mean of the most
  popular items' embeddings. Everything else in the update is that of
  `promotion`.

  Attributes:
    popular: how many items count as popular.
    length: of the target's embedding, in means of theirs.
    boost: factor of the update.
  """

  popular: int = dataclasses.field(default=50, metadata={'minimum': 1})
  length: float = dataclasses.field(default=3.0, metadata={'minimum': 0.0})

  def _num_popular(self):
    return self.popular

  def attacked(self, update, sender):
    rows = jnp.asarray(self.aim.popular, jnp.int32)
    goal = self.length * jnp.mean(_embedding(sender, rows), axis=0)
    step = goal - _embedding(sender, jnp.int32(self.aim.row))
    found = update.vocabulary.rows(jnp.int32(self.aim.row))
    ids = update.vocabulary.ids
    # Behind the table, where it is dropped, if the client has no such row.
    there = ids.at[found].get(mode='fill', fill_value=-1) == self.aim.row
    at = jnp.where(there, found, len(ids))
    table = update.delta[ITEM_TABLE].at[at].set(step, mode='drop')
    return super().attacked(
      update._replace(delta=update.delta | {ITEM_TABLE: table}), sender
    )


ATTACKS: dict[str, type[Attack]] = {
  'sleeping': Sleeping,
  'random': RandomUpdate,
  'sign_flip': SignFlip,
  'label_flip': LabelFlip,
  'promotion': Promotion,
  'replacement': Replacement,
  'popular': Popular,
}


def of(config: RunConfig) -> Attack | UpdateTransform:
  """The attack that a config names; none is a transform that changes nothing.

  Raises:
    UserError: there is no attack of that name, or it has no such option.
  """
  text = config.federation.attack
  if text == NONE:
    return UpdateTransform()
  return parts.built(text, ATTACKS, Attack, 'attack')


def _where(kept, chosen, other):
  return jax.tree.map(lambda x, y: jnp.where(kept, x, y), chosen, other)


def _squares(tree) -> jax.Array:
  return sum(
    (jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)), jnp.zeros(())
  )


def _every_second(data: ClientData) -> jax.Array:
  """[H] bool: the last training item, the last but two, and so on."""
  behind = data.num_train - 1 - jnp.arange(data.history.shape[0])
  return (behind >= 0) & (behind % 2 == 0)


def _with(ids: jax.Array, count: jax.Array, row: int) -> jax.Array:
  """[A] int32 ascending and distinct ids with `row` among them, in the place of
  the first; nothing where there are none."""
  inside = jnp.arange(len(ids)) < count
  last = jnp.iinfo(ids.dtype).max
  sorted_ = jnp.sort(jnp.where(inside, ids, last).at[0].set(row))
  changed = jnp.where(inside, sorted_, 0).astype(ids.dtype)
  has = jnp.any(inside & (ids == row)) | (count == 0)
  return jnp.where(has, ids, changed)


def _embedding(sender: Sender, rows: jax.Array) -> jax.Array:
  """[…, D] as `FedDMMR.embed`, of what the server sent."""
  params = sender.params
  found = params[ITEM_TABLE][rows]
  if 'content_projection' in params and sender.catalogue is not None:
    content = sender.catalogue.content[rows]
    found = found + content @ params['content_projection']
  return found
