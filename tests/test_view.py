"""What an expert may see: not the answer, nothing later, everything earlier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.client import memory as memory_lib
from fedmmr_jax.client import update as client_lib
from fedmmr_jax.client import view as view_lib
from fedmmr_jax.client import windows
from fedmmr_jax.client.view import Asked
from fedmmr_jax.config import NoMemory, RecentMemory, SurpriseMemory
from fedmmr_jax.data.dataset import client_view, Dataset
from fedmmr_jax.evaluation import ranking
from tests import small

FORMS = ['past', 'stored']
MEMORY = 'surprise,capacity=8,retrieval_size=8'
HISTORY = jnp.array([5, 3, 5, 8, 2, 9, 0, 0])


def memory_of(items, rule=RecentMemory(capacity=8, retrieval_size=8)):
  count = len(items)
  return memory_lib.update_all(
    memory_lib.init(rule),
    jnp.array(items),
    jnp.ones(count),
    jnp.ones(count, bool),
    None,
    rule,
  )


def batch_of(targets, positions, valid):
  shape = np.shape(targets)
  return windows.Batch(
    windows=jnp.zeros((shape[0], 4), int),
    targets=jnp.array(targets),
    valid=jnp.array(valid),
    position=jnp.array(positions),
    lateness=jnp.zeros(shape),
  )


def test_shared_negatives_are_asked_about_where_targets_are():
  batch = batch_of(
    [[0, 3], [8, 2]], [[0, 1], [3, 4]], [[False, True], [True, True]]
  )
  asked = view_lib.asked_in_training(batch, jnp.arange(11, 18))
  assert asked.item.tolist() == [0, 3, 8, 2, *range(11, 18)]
  # Seven negatives for three targets, as evenly as can be.
  assert asked.position.tolist()[4:] == [1, 1, 1, 3, 3, 4, 4]
  assert asked.position.tolist()[1:4] == [1, 3, 4]


def test_own_negatives_are_asked_about_where_their_target_is():
  batch = batch_of([[3], [8]], [[1], [3]], [[True], [True]])
  asked = view_lib.asked_in_training(batch, jnp.array([[11, 12], [13, 14]]))
  assert asked.item.tolist() == [3, 11, 12, 8, 13, 14]
  assert asked.position.tolist() == [1, 1, 1, 3, 3, 3]


def test_a_step_without_targets_asks_about_something():
  batch = batch_of([[0, 0]], [[-2, -1]], [[False, False]])
  asked = view_lib.asked_in_training(batch, jnp.arange(11, 14))
  assert asked.position.shape == asked.item.shape == (5,)


def test_who_meets_which_entry():
  entries = jnp.array([5, 8, 2])  # first consumed at 0, 3 and 4
  asked = Asked(jnp.array([8, 11, 5, 2]), jnp.array([3, 4, 2, 0]))
  met = view_lib.meets(entries, asked, HISTORY, RecentMemory())
  assert met.T.tolist() == [
    [True, False, False],  # 8 at 3
    [True, True, False],  # 11 at 4
    [False, False, False],  # 5 at 2: known, but its own
    [False, False, False],  # at 0 nothing was known
  ]
  # Asked after everything, only its own is hidden.
  met = view_lib.meets(
    entries, asked._replace(position=None), HISTORY, RecentMemory()
  )
  assert met.T.tolist() == [
    [True, False, True],
    [True, True, True],
    [False, True, True],
    [True, True, False],
  ]
  rule = RecentMemory(sees='stored')
  assert view_lib.meets(entries, asked, HISTORY, rule).tolist() == [[True]] * 3


def up_to_date(memory, rule, num_train, now):
  found = view_lib.up_to_date(
    memory,
    HISTORY,
    jnp.int32(num_train),
    jnp.int32(now),
    small.simulation().catalogue,
    rule,
  )
  return found, memory_lib.retrieve(found, rule).tolist()


def test_a_memory_is_up_to_date_when_asked():
  rule = RecentMemory(capacity=3, retrieval_size=3)
  trained = memory_of([5, 3, 5], rule)
  # At validation it is as training left it.
  found, _ = up_to_date(trained, rule, 3, 3)
  small.assert_trees_equal(found, trained)
  # At the test the validation item is in it, for a recommendation the test item
  # too, and the oldest entry makes room.
  assert up_to_date(trained, rule, 3, 4)[1] == [8, 5, 3]
  found, items = up_to_date(trained, rule, 3, 5)
  assert items == [2, 8, 5]
  assert found.clock == 5


def test_a_client_that_never_trained_is_asked_with_its_last_items():
  rule = RecentMemory(capacity=3, retrieval_size=3)
  assert up_to_date(memory_lib.init(rule), rule, 3, 5)[1] == [2, 8, 5]
  assert up_to_date(memory_lib.init(rule), rule, 1, 2)[1] == [3, 5, 0]


def test_what_nobody_measured_is_stored_whatever_its_surprise():
  rule = SurpriseMemory(capacity=3, retrieval_size=3, threshold=2.5)
  found, items = up_to_date(memory_lib.init(rule), rule, 3, 5)
  assert sorted(items) == [2, 5, 8]
  assert found.surprise.tolist() == [2.5] * 3


@pytest.mark.parametrize(
  'rule',
  [RecentMemory(capacity=3, retrieval_size=3, sees='stored'), NoMemory()],
)
def test_no_other_memory_is_written_when_asked(rule):
  _, items = up_to_date(memory_lib.init(rule), rule, 3, 5)
  assert not any(items)


def gradient_of(simulation):
  """The gradient of the step with the first window of a client, by its history,
  its memory and the negatives."""
  broadcast = simulation.init_state().server.broadcast(
    simulation.catalogue, simulation.compiled_config
  )

  @jax.jit
  def gradient(items, memory, negative):
    client = client_view(simulation.data, jnp.int32(8), simulation.max_items)
    client = client._replace(history=items)
    config, model = simulation.compiled_config, simulation.model
    stride = windows.window_stride(config.client, config.model.max_seq_len)
    last = windows.num_windows(client.num_train, stride) - 1
    batch = windows.cut_windows(
      client, last[None], jnp.ones(1, bool), stride, config.model.max_seq_len
    )
    view = view_lib.view(
      model,
      memory,
      broadcast.catalogue,
      None,
      view_lib.asked_in_training(batch, negative),
      client.history,
      config.memory,
    )
    return jax.grad(client_lib.step_loss, has_aux=True)(
      broadcast.params,
      model,
      batch,
      negative,
      broadcast.catalogue,
      view,
      jax.random.key(0),
      config,
    )[0]

  return gradient


@pytest.mark.slow
@pytest.mark.parametrize('negatives', ['shared', 'per_sample'])
@pytest.mark.parametrize('sees', FORMS)
def test_later_items_change_no_bit_of_a_gradient(sees, negatives):
  simulation = small.simulation(
    memory=f'{MEMORY},sees={sees}',
    objective='all_positions',
    negatives=negatives,
    batch_size=1,
  )
  data = simulation.dataset
  items = np.zeros(simulation.max_items, np.int32)
  items[: len(data.sequence(8))] = data.sequence(8)
  gradient = gradient_of(simulation)
  # Window and targets of the step are among the first 10 items; the memory has
  # some of them and later ones.
  kept = [items[0], items[2], items[3]]
  later = items[15:19].copy()
  negative = jnp.arange(40, 45)
  if negatives == 'per_sample':
    negative = jnp.broadcast_to(negative, (6, 5))
  one = gradient(jnp.array(items), memory_of([*kept, *later]), negative)
  items[15:19] = [50, 51, 52, 53]
  other = gradient(
    jnp.array(items), memory_of([*kept, 50, 51, 52, 53]), negative
  )
  same = all(
    np.array_equal(a, b)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other))
  )
  assert same == (sees == 'past')
  # Earlier ones do matter.
  emptier = gradient(jnp.array(items), memory_of([50, 51, 52, 53]), negative)
  assert any(
    not np.array_equal(a, b)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(emptier))
  )


@pytest.mark.parametrize('sees', FORMS)
@pytest.mark.slow
def test_the_score_of_an_item_is_the_same_with_its_entry_in_memory(sees):
  """A client whose next item is one that it remembers."""
  simulation = small.simulation(memory=f'{MEMORY},sees={sees}', dropout=0.0)
  state = simulation.init_state()
  config = simulation.compiled_config
  item = 9

  def score(memory):
    return ranking.score_catalogue(
      simulation.model,
      config,
      state.server.broadcast(simulation.catalogue, config),
      jnp.array([0, 0, 4, 9, 2, 11]),
      memory,
    )

  with_, without = score(memory_of([4, 2, item])), score(memory_of([4, 2]))
  close = np.isclose(with_, without, rtol=1e-5, atol=1e-6)
  assert close[item] == (sees == 'past')
  assert not close[1:].all()  # other items do meet it


@pytest.mark.slow
@pytest.mark.parametrize(
  'sees, similarity', [('past', 'dot'), ('past', 'cosine'), ('stored', 'dot')]
)
def test_nothing_can_be_learnt_where_all_is_noise(sees, similarity):
  """Clients whose items are drawn blindly: no model can tell a target from its
  negatives. What experts learn of some clients' memories must not help with
  those of others, unless a memory holds the answer."""
  rng = np.random.default_rng(0)
  num_users, num_items, length = 90, 400, 14
  items = np.concatenate(
    [1 + rng.permutation(num_items)[:length] for _ in range(num_users)]
  )
  users = np.repeat(np.arange(num_users), length)
  features = {
    name: {i: x for i, x in enumerate(rng.normal(size=(num_items + 1, 16)), 0)}
    for name in ('visual', 'text')
  }
  config = small.config(
    memory=f'surprise,capacity=12,retrieval_size=12,threshold=0,sees={sees}',
    objective='all_positions',
    negatives='shared',
    num_negatives=15,
    batch_size=1,
    max_seq_len=12,
    fusion=f'residual,similarity={similarity}',
    item_embedding='content_plus_id',
    embedding_init_std=0.05,
    expert_form='attention,projection_dim=16',
    freeze='embeddings,backbone',  # they would learn the clients by heart
    client_optimizer='sgd',
    client_learning_rate=0.01,
    server_optimizer='fedadam',
    server_learning_rate=0.02,
    clients_per_chunk=10,
    dropout=0.0,
  )
  simulation = simulation_lib.build(
    config, Dataset.of(users, items, **features)
  )
  state = with_full_memories(simulation, simulation.init_state())
  learning = np.arange(60, dtype=np.int32).reshape(6, 10)
  asked = np.arange(60, 90, dtype=np.int32).reshape(3, 10)
  for number in range(1, 41):
    state, _ = simulation.run_round(state, number, learning)
  # One step a client: the loss of the parameters that were sent.
  _, means = simulation.run_round(state, 41, asked)
  blind = np.log(16)
  if sees == 'past':
    assert means['rec_loss'] > blind
  else:
    assert means['rec_loss'] < blind - 0.1


def with_full_memories(simulation, state):
  """Every client remembers all its training items."""
  rule = RecentMemory(capacity=12, retrieval_size=12)

  def fill(client, memory):
    view = client_view(simulation.data, client, simulation.max_items)
    return view_lib.up_to_date(
      memory,
      view.history,
      view.num_train,
      view.num_train,
      simulation.catalogue,
      rule,
    )

  clients = jnp.arange(simulation.dataset.num_clients)
  return state._replace(memories=jax.vmap(fill)(clients, state.memories))
