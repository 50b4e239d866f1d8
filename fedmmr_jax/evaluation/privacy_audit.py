"""What an attacker gets of a client in spite of the noise: a lower bound of ε.

Canary clients take the place of some clients (Andrew et al. 2024, "One-shot
empirical privacy estimation for federated learning", ICLR). Each sends a
direction of its own, drawn at random and as long as clipping lets pass, or, by
the toss of a coin, nothing. The attacker sees every round's released mean and
knows the directions; its score of a canary is how far the means go into that
one's. From the scores, jax-privacy bounds ε from below (Steinke et al. 2023,
"Privacy auditing with one (1) training run", NeurIPS), with 95 % confidence: a
bound above the accountant's ε says that noise is missing somewhere. One far
below says little: with m canaries no attack shows more than some log(m).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedmmr_jax import optimizers
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.client.vocabulary import ITEM_TABLE
from fedmmr_jax.config import RunConfig
from fedmmr_jax.data.dataset import taking_part
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation.audit import Check
from fedmmr_jax.federation import accounting
from fedmmr_jax.federation.transforms import UpdateTransform
from fedmmr_jax.simulation import Simulation
from fedmmr_jax.streams import generator, Stream

SIGNIFICANCE = 0.05
# The server adds what it released to its parameters and nothing else, and every
# client has all rows.
SEEN_BY_THE_ATTACKER = {
  'server_optimizer': 'fedavg',
  'server_learning_rate': 1.0,
  'server_schedule': 'constant',
  'partial_aggregation_warmup_rounds': 0,
  'vocabulary': 'dense',
}
_LOUD = 1e3  # before clipping


@dataclasses.dataclass(frozen=True)
class Canaries(UpdateTransform):
  """Puts canaries in the place of clients, before their updates are clipped.

  Attributes:
    senders: clients whose canary sends its direction.
    absent: those whose canary sends nothing.
    frozen: as in `direction`.
    seed: of the directions.
  """

  senders: tuple[int, ...]
  absent: tuple[int, ...]
  frozen: tuple[bool, ...]
  seed: int

  def apply(self, update, kept, sender):
    sends = jnp.any(sender.client == jnp.array(self.senders))
    absent = jnp.any(sender.client == jnp.array(self.absent))
    loud = direction(self.seed, sender.client, sender.params, self.frozen)
    delta = jax.tree.map(
      lambda x, own: jnp.where(absent, 0.0, jnp.where(sends, _LOUD * own, x)),
      update.delta,
      loud,
    )
    weight = jnp.where(absent, 0.0, jnp.where(sends, 1.0, update.weight))
    return update._replace(delta=delta, weight=weight), kept


def direction(
  seed: int, client: jax.Array, params: Any, frozen: tuple[bool, ...]
) -> Any:
  """A canary's update, of independent normal numbers.

  Args:
    seed: of all directions.
    client: [] int32.
    params: what it looks like.
    frozen: of each leaf, whether it is nobody's to train; there it is 0, as in
      the row of the padding item.
  """
  key = jax.random.fold_in(jax.random.key(seed), client)
  leaves, structure = jax.tree.flatten(
    optax.tree.random_like(key, params, jax.random.normal)
  )
  found = jax.tree.unflatten(
    structure, [x * (not no) for x, no in zip(leaves, frozen)]
  )
  return found | {ITEM_TABLE: found[ITEM_TABLE].at[0].set(0.0)}


class Attack(NamedTuple):
  """What canaries showed.

  Attributes:
    lower: ε is at least this, with 95 % confidence.
    gaussian: likewise, if the scores are normal (Nasr et al. 2023).
    upper: the accountant's ε.
    area: under the ROC curve of the attack; 0.5 is a guess.
    canaries: (that sent, that did not).
    rounds: that the attacker saw.
  """

  lower: float
  gaussian: float
  upper: float
  area: float
  canaries: tuple[int, int]
  rounds: int


def prepared(simulation: Simulation) -> Simulation:
  """The same federation and noise, as the attacker sees it."""
  config = RunConfig.from_flat_dict(
    simulation.config.as_flat_dict() | SEEN_BY_THE_ATTACKER
  ).validate()
  return simulation_lib.build(config, simulation.dataset, simulation.cold)


def attack(simulation: Simulation, canaries: int, rounds: int) -> Attack:
  """Lets canaries into the first rounds of a run.

  Args:
    simulation: from `prepared`, with noise.
    canaries: how many clients they replace, at most half of those there are.
    rounds: how many.

  Raises:
    UserError: fewer than 10 canaries.
  """
  plan, config = simulation.privacy, simulation.config
  auditing = accounting.library('jax_privacy.auditing')
  clients = taking_part(simulation.num_train, config.data.new_clients)
  rng = generator(config.seed, Stream.CANARIES)
  canaries = min(canaries, len(clients) // 2)
  if canaries < 10:
    raise UserError(
      f'an audit of privacy needs 10 canaries, and {len(clients)} clients have '
      f'room for {canaries}; take more clients, or more `canaries`'
    )
  chosen = rng.choice(clients, canaries, replace=False)
  sends = rng.random(canaries) < 0.5
  sends[:2] = True, False  # both there, whatever the coins say
  params = simulation.abstract_state.server.params
  birds = Canaries(
    tuple(map(int, chosen[sends])),
    tuple(map(int, chosen[~sends])),
    tuple(jax.tree.leaves(optimizers.frozen(config.client, params))),
    config.seed,
  )
  caged = dataclasses.replace(
    simulation,
    transforms=(*simulation.transforms[:-1], birds, simulation.transforms[-1]),
  )
  state = caged.init_state()
  scores = np.zeros(canaries)
  for number in range(1, rounds + 1):
    # The round donates its state.
    before = jax.tree.map(jnp.copy, state.server.params)
    norm = plan.clip_norm(state.server)
    state, _ = caged.run_round(state, number, caged.sample_cohort(number))
    went = jax.tree.map(jnp.subtract, state.server.params, before)
    scores += np.asarray(_along(birds, jnp.array(chosen), went)) / norm
  auditor = auditing.CanaryScoreAuditor(scores[sends], scores[~sends])
  return Attack(
    float(auditor.epsilon_one_run(SIGNIFICANCE, plan.delta)),
    float(auditor.epsilon_from_gdp(SIGNIFICANCE, plan.delta)),
    float(plan.epsilon(rounds)),
    float(auditor.attack_auroc()),
    (int(sends.sum()), int((~sends).sum())),
    rounds,
  )


def _along(birds: Canaries, clients: jax.Array, went: Any) -> jax.Array:
  """[n] how far a step goes into each canary's direction."""

  @jax.jit
  def score(client):
    own = direction(birds.seed, client, went, birds.frozen)
    return optax.tree.vdot(own, went) / optax.tree.norm(own)

  return jnp.stack([score(client) for client in clients])


def check(found: Attack) -> Check:
  """The finding, and whether it contradicts the accountant."""
  return Check(
    'privacy',
    found.lower <= found.upper,
    f'epsilon is at least {found.lower:.2f} by an attack on '
    f'{sum(found.canaries)} canaries in {found.rounds} rounds (if its scores '
    f'are normal, {found.gaussian:.2f}; area under the ROC curve '
    f'{found.area:.2f}), and at most {found.upper:.2f} by the accountant',
  )
