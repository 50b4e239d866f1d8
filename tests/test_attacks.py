"""Attacks: what attackers send, and what honest clients see of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax import parts
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.client.update import ClientUpdate
from fedmmr_jax.client.vocabulary import ITEM_TABLE, Vocabulary
from fedmmr_jax.data.dataset import client_view
from fedmmr_jax.evaluation import ranking
from fedmmr_jax.federation import attacks
from fedmmr_jax.federation.attacks import Aim, Attack
from fedmmr_jax.federation.transforms import Sender
from fedmmr_jax.models.feddmmr import Catalogue
from tests import small

AIM = Aim(row=4, popular=(1, 2))


def attack(text: str) -> Attack:
  found = parts.built(text, attacks.ATTACKS, Attack, 'attack')
  return dataclasses.replace(found, aim=AIM)


def update() -> ClientUpdate:
  return ClientUpdate(
    delta={
      'w': jnp.array([3.0, 0.0]),
      ITEM_TABLE: jnp.array([[0.0], [0.0], [4.0], [0.0]]),
    },
    control=None,
    vocabulary=Vocabulary(jnp.array([0, 0, 2, 4], jnp.int32)),
    weight=jnp.float32(5),
    steps=jnp.float32(1),
    memory=None,
    kept=None,
    prototypes=None,
    metrics={'loss': metrics_lib.mean(2.0, 3.0)},
  )


def sender(client=0) -> Sender:
  params = {
    'w': jnp.zeros(2),
    ITEM_TABLE: jnp.array([0.0, 1.0, 3.0, 7.0, 5.0])[:, None],
    'content_projection': jnp.array([[10.0]]),
  }
  content = jnp.array([0.0, 0.1, 0.2, 0.3, 0.4])[:, None]
  return Sender(
    jnp.int32(client),
    jax.random.key(0),
    params,
    None,
    Catalogue.of({}, content),
  )


def sent(text: str, attacks_=True) -> ClientUpdate:
  found, kept = attack(text).apply(update(), jnp.array(attacks_), sender())
  assert kept == attacks_
  return found


def test_what_attackers_send():
  flipped = sent('sign_flip,share=0.1,scale=2')
  assert flipped.delta['w'].tolist() == [-6, 0]
  assert flipped.delta[ITEM_TABLE][:, 0].tolist() == [0, 0, -8, 0]
  boosted = sent('replacement,share=0.1')
  assert boosted.delta['w'].tolist() == [60, 0]
  noise = sent('random,share=0.1,scale=3')
  length = sum(jnp.sum(x**2) for x in jax.tree.leaves(noise.delta)) ** 0.5
  np.testing.assert_allclose(length, 3 * 5, rtol=1e-5)
  # Rows of repeated ids stay as they are.
  assert noise.delta[ITEM_TABLE][jnp.array([0, 1, 3]), 0].tolist() == [0] * 3
  assert noise.delta['w'][0] != 3
  # Embeddings of items 1, 2 and 4: 1 + 1, 3 + 2 and 5 + 4.
  popular = sent('popular,share=0.1,length=4,boost=2')
  np.testing.assert_allclose(
    popular.delta[ITEM_TABLE][:, 0], [0, 0, 8, 2 * (4 * 3.5 - 9)], rtol=1e-5
  )
  for text in attacks.ATTACKS:
    honest = sent(f'{text},share=0.1', attacks_=False)
    small.assert_trees_equal(honest.delta, update().delta)
    assert honest.metrics['loss'].weight == 3
    assert honest.metrics[metrics_lib.ATTACKERS].total == 0
    lying = sent(f'{text},share=0.1')
    assert lying.metrics['loss'].weight == 0
    assert lying.metrics[metrics_lib.ATTACKERS] == (1, 1)


def test_a_popular_target_that_the_client_lacks_is_left_out():
  without = update()._replace(
    vocabulary=Vocabulary(jnp.array([0, 0, 2, 3], jnp.int32))
  )
  found = attack('popular,share=0.1').attacked(without, sender())
  small.assert_trees_equal(found.delta, without.delta)


def test_what_attackers_train_on():
  simulation = small.simulation()
  longest = int(np.argmax(simulation.num_train))
  view = client_view(simulation.data, jnp.int32(longest), simulation.max_items)
  n, rows = int(view.num_train), simulation.model.num_rows
  before = np.asarray(view.history)
  for text, expected in (
    ('promotion', np.full(len(before), AIM.row)),
    ('label_flip', rows - before),
  ):
    of = attack(f'{text},share=0.1')
    after = of.prepare(view, jnp.array(True), sender())
    history = np.asarray(after.history)
    changed = np.arange(n - 1, -1, -2)
    assert history[changed].tolist() == expected[changed].tolist()
    others = np.setdiff1d(np.arange(len(before)), changed)
    assert history[others].tolist() == before[others].tolist()
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, view)
    small.assert_trees_equal(of.prepare(view, jnp.array(False), sender()), view)


def test_negatives_avoid_the_target():
  ids = jnp.array([3, 7, 9, 0, 0], jnp.int32)
  assert attacks._with(ids, jnp.int32(3), 8).tolist() == [7, 8, 9, 0, 0]
  assert attacks._with(ids, jnp.int32(3), 7).tolist() == ids.tolist()
  nothing = jnp.zeros(5, jnp.int32)
  assert attacks._with(nothing, jnp.int32(0), 7).tolist() == [0] * 5


def test_who_attacks_does_not_depend_on_the_seed():
  one = small.simulation(attack='sign_flip,share=0.3')
  assert len(one.attackers) == 3 == round(0.3 * 9)
  other = small.simulation(attack='promotion,share=0.3', seed=5)
  assert one.attackers.tolist() == other.attackers.tolist()
  assert one.attack.aim.row == other.attack.aim.row > 0
  drawn = small.simulation(attack='promotion,share=0.3,draw=1')
  assert drawn.attackers.tolist() != one.attackers.tolist()
  state = one.init_state().transforms[0]
  assert np.flatnonzero(state).tolist() == one.attackers.tolist()
  honest = np.setdiff1d(np.arange(9), one.attackers).tolist()
  assert one.evaluated_clients.tolist() == honest
  for split in ('val', 'test'):
    assert one.targeted(split).tolist() == honest


def test_the_target_is_an_unpopular_item_or_the_one_asked_for():
  dataset = small.dataset()
  counts = np.bincount(dataset.items[dataset.is_train])
  counts = np.sort(counts[1:][counts[1:] > 0])
  for draw in range(5):
    found = attack(f'popular,share=0.2,popular=3,draw={draw}').fitted(dataset)
    row, popular = found.aim
    trained = dataset.items[dataset.is_train]
    assert 0 < np.sum(trained == row) <= counts[len(counts) // 5]
    assert len(popular) == 3 and row not in popular
    assert np.sum(trained == popular[0]) == counts[-1]
  found = attack('promotion,share=0.2,target=7').fitted(dataset)
  assert dataset.item_ids[found.aim.row] == 7


def test_exposure_is_of_those_who_may_be_shown_the_target():
  simulation = small.simulation()
  view = client_view(simulation.data, jnp.int32(0), simulation.max_items)
  now = int(view.num_train)
  scores = jnp.arange(simulation.model.num_rows, 0, -1.0)  # row 1 is best
  history = set(np.asarray(view.history[:now]).tolist())
  free = [i for i in range(1, len(scores)) if i not in history]

  def aimed(row):
    ranks = ranking.rank_client(
      scores, view, jnp.int32(now), jnp.int32(now), 0, jnp.int32(row)
    )
    return int(ranks.aimed)

  assert [aimed(row) for row in free[:4]] == [0, 1, 2, 3]
  assert aimed(int(view.history[now])) == free.index(int(view.history[now]))
  assert aimed(int(view.history[0])) == -1
  ranks = ranking.Ranks(*[np.zeros(4, int)] * 4, aimed=np.array([-1, 9, 10, 0]))
  assert ranking.metrics_of(ranks)['full'][metrics_lib.EXPOSURE] == 2 / 3
  plain = ranks._replace(aimed=np.full(4, -1))
  assert metrics_lib.EXPOSURE not in ranking.metrics_of(plain)['full']


def test_a_boosted_attack_reaches_the_server_and_a_defence_stops_it():
  """Undefended the target goes up; the other clients' own training, with none
  of their data changed, does not do that."""
  changes = dict(
    client_fraction=1.0,
    client_optimizer='sgd',
    vocabulary='local',
    client_learning_rate=0.1,
    **small.PLAIN,
    rejection='none',  # it would find so long an update absurd
  )
  moved, compiled = {}, []
  for name, text, aggregator in (
    ('clean', 'sleeping', 'fedavg'),
    ('attacked', 'popular', 'fedavg'),
    ('defended', 'popular', 'median_norm'),
  ):
    simulation = small.simulation(
      attack=f'{text},share=0.2' + ',boost=50' * (text == 'popular'),
      aggregator=aggregator,
      **changes,
    )
    state = simulation.init_state()
    start = small.copy(state.server.params)
    for number in (1, 2):
      state, metrics = simulation.run_round(
        state, number, simulation.sample_cohort(number)
      )
      compiled.append(small.compiled_rounds())
    assert compiled[-1] == compiled[-2]
    assert metrics[metrics_lib.ATTACKERS] == 2 / 9
    row = simulation.attack.aim.row
    moved[name] = float(
      jnp.linalg.norm(
        (state.server.params[ITEM_TABLE] - start[ITEM_TABLE])[row]
      )
    )
  assert moved['attacked'] > 10 * max(moved['clean'], moved['defended'])


@pytest.mark.parametrize(
  'text, message',
  [
    ('nothing', "no attack 'nothing'; one of sleeping, random"),
    ('promotion', 'the option share is missing'),
    ('promotion,share=1.5', 'above its maximum 1.0'),
    ('promotion,share=0.01', 'share=0.01 of 9 clients is nobody'),
    ('promotion,share=1', 'share=1.0 of 9 clients is everybody'),
    ('promotion,share=0.2,target=x', 'target=x is no item of small'),
    ('sign_flip,share=0.2,scale=-1', 'below its minimum 0.0'),
  ],
)
def test_an_attack_that_is_none_is_refused(text, message):
  assert message in small.error_of(
    simulation_lib.build, small.config(attack=text), small.dataset()
  )
