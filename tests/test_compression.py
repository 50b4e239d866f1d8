"""Compressed updates: by hand, without bias, in as many bytes as counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax.client.update import ClientUpdate
from fedmmr_jax.client.vocabulary import Vocabulary
from fedmmr_jax.evaluation import ablation
from fedmmr_jax.federation import compression
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.federation.compression import LowRank, Quantised, Rows, TopK
from fedmmr_jax.federation.transforms import Sender
from tests import small

KEY = jax.random.key(3)
NUM_ROWS, WIDTH = 400, 6
# Differences of one and of two bytes; two repeat.
IDS = [0, 0, 3, 7, 7, 7, 200, 399]
DISTINCT = [0, 3, 7, 200, 399]
METHODS = [
  Quantised(),
  Quantised(bits=2, block=13),
  TopK(share=0.2),
  TopK(share=1.0),
  LowRank(rank=2),
]


def params(seed=0):
  rng = np.random.default_rng(seed)
  return {
    'item_embedding': jnp.float32(rng.normal(size=(NUM_ROWS, WIDTH))),
    'net': {
      'bias': jnp.float32(rng.normal(size=5)),
      'kernel': jnp.float32(rng.normal(size=(9, 5))),
    },
  }


def rows_of(ids):
  return Rows.of(Vocabulary(jnp.array(ids, jnp.int32)), params())


def delta_of(ids, seed=1):
  """Zero where a row repeats another, as `apply` makes it."""
  delta = params(seed)
  first = rows_of(ids).vocabulary.is_first[:, None]
  table = delta['item_embedding'][np.array(ids)]
  return {**delta, 'item_embedding': jnp.where(first, table, 0)}


def through(method, delta, rows, key=KEY):
  code = method.compress(delta, rows, key)
  return code, method.decompress(code, rows, delta)


def update_of(delta, ids, weight=1.0):
  return ClientUpdate(
    delta=delta,
    control=None,
    vocabulary=Vocabulary(jnp.array(ids, jnp.int32)),
    weight=jnp.float32(weight),
    steps=jnp.float32(1),
    memory=None,
    kept=None,
    prototypes=None,
    metrics={},
  )


def sender(client=0, key=KEY):
  return Sender(jnp.int32(client), key, params(), None)


@pytest.mark.parametrize('ids', [IDS, list(range(NUM_ROWS))])
@pytest.mark.parametrize('method', METHODS, ids=str)
def test_a_message_has_the_bytes_that_are_counted(method, ids):
  rows = rows_of(ids)
  code, _ = through(method, delta_of(ids), rows)
  assert len(method.to_bytes(code, rows)) == method.num_bytes(code, rows)


@pytest.mark.parametrize('method', METHODS, ids=str)
def test_rows_that_repeat_neither_cost_nor_count(method):
  ids, more = DISTINCT, sorted([*DISTINCT, 3, 3, 200, 399])
  first = np.asarray(rows_of(more).vocabulary.is_first)
  found = []
  for own in (ids, more):
    rows = rows_of(own)
    code, sent = through(method, delta_of(own), rows)
    found.append((method.num_bytes(code, rows), sent))
  (size, sent), (size_more, sent_more) = found
  assert size == size_more
  table = np.asarray(sent_more['item_embedding'])
  assert not table[~first].any()
  if not isinstance(method, Quantised):  # it draws for each row
    small.assert_trees_close(
      {**sent_more, 'item_embedding': table[first]}, sent, 1e-4, 1e-5
    )


def test_ids_as_differences():
  # 0, 3, 7, 200 and 399 from −1: of 193 and 199 there are two bytes.
  written = rows_of(IDS).to_bytes()
  assert written == bytes(
    [5, 0, 0, 0, 1, 3, 4, 193 & 127 | 128, 1, 199 & 127 | 128, 1]
  )
  assert len(written) == rows_of(IDS).num_bytes() == 11
  assert rows_of(range(NUM_ROWS)).num_bytes() == 0


def decoded_levels(data, bits, count):
  """Two's complement of so many bits, low bits first."""
  digits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder='little')
  digits = digits[: count * bits].reshape(count, bits)
  value = digits @ (1 << np.arange(bits))
  return np.where(value >= 2 ** (bits - 1), value - 2**bits, value)


@pytest.mark.parametrize('bits', [8, 4, 2])
def test_the_server_decodes_a_quantised_message(bits):
  method, rows = Quantised(bits=bits, block=12), rows_of(IDS)
  code, sent = through(method, delta_of(IDS), rows)
  message = method.to_bytes(code, rows)[len(rows.to_bytes()) :]
  most = 2 ** (bits - 1) - 1
  for count, blocks, expected in (
    # Two rows of six share a scale; five rows have three.
    (30, 3, np.asarray(sent['item_embedding'])[rows.vocabulary.is_first]),
    (50, 5, np.concatenate([x.reshape(-1) for x in sent['net'].values()])),
  ):
    packed = -(-count * bits // 8)
    scales = np.frombuffer(message[: 4 * blocks], '<f4')
    message = message[4 * blocks :]
    levels = decoded_levels(message[:packed], bits, count)
    message = message[packed:]
    of_each = np.repeat(scales, 12)[:count]
    np.testing.assert_allclose(
      levels * of_each / most, expected.reshape(-1), rtol=1e-6
    )
  assert not message


def test_levels_are_sent_exactly():
  # Blocks of 12 with largest magnitude 3.5: steps of 4 bits are 0.5.
  values = jnp.float32([-3.5, 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, -0.5, -1, -3])
  delta = {'item_embedding': values.reshape(2, 6), 'net': values}
  rows = rows_of([0, 5])._replace(are_tables=(True, False))
  for key in jax.random.split(KEY, 5):
    _, sent = through(Quantised(bits=4, block=12), delta, rows, key)
    small.assert_trees_close(sent, delta, 1e-6, 0)


@pytest.mark.parametrize('bits', [8, 2])
def test_rounding_has_no_bias_and_a_bound(bits):
  method, rows = Quantised(bits=bits, block=12), rows_of(IDS)
  delta = delta_of(IDS)
  draws = 4000

  def sent(key):
    return through(method, delta, rows, key)[1]

  found = jax.jit(jax.vmap(sent))(jax.random.split(KEY, draws))
  step = 3.5 / (2 ** (bits - 1) - 1)  # no scale is larger
  assert max(jnp.max(jnp.abs(x)) for x in jax.tree.leaves(delta)) < 3.5
  for x, exact in zip(jax.tree.leaves(found), jax.tree.leaves(delta)):
    assert float(jnp.max(jnp.abs(x - exact))) < step
    # The deviation of one draw is at most half a step; 60 means.
    off = jnp.max(jnp.abs(jnp.mean(x, 0) - exact))
    assert float(off) < 4.5 * step / 2 / draws**0.5


def test_a_block_knows_no_other():
  delta = {'item_embedding': jnp.zeros((5, 6)), 'net': jnp.zeros(30)}
  large = {
    'item_embedding': delta['item_embedding'].at[4, 1].set(100.0),
    'net': delta['net'].at[29].set(50.0),
  }
  rows = rows_of([0, 1, 1, 2, 3])._replace(are_tables=(True, False))
  (_, scale), (_, other) = Quantised(block=12).compress(large, rows, KEY)
  # Rows 0 and 1 share one scale, 2 and 3 the next; the rest has three.
  assert np.asarray(scale).tolist() == [0, 0, 0, 100, 100]
  assert np.asarray(other).tolist() == [0, 0, 50]


def test_the_largest_values_and_their_places():
  delta = {
    'item_embedding': jnp.zeros((8, 6)).at[6, 2].set(-5.0).at[2, 0].set(1.0),
    'net': {
      'bias': jnp.float32([0, 2, 0, 0, 0]),
      'kernel': jnp.zeros((9, 5)).at[8, 4].set(3.0),
    },
  }
  rows = rows_of(IDS)
  method = TopK(share=3 / 80)  # of 5 rows of 6 and 50 others
  code, sent = through(method, delta, rows)
  expected = jax.tree.map(lambda x: jnp.where(jnp.abs(x) > 1, x, 0), delta)
  small.assert_trees_equal(sent, expected)
  # Row 6 is item 200; behind 400 rows of 6 the rest.
  places = [200 * 6 + 2, 2400 + 1, 2400 + 5 + 44]
  assert np.asarray(code.position)[np.asarray(code.is_sent)].tolist() == places
  # A count, differences of 2, 2 and 1 bytes, and three values.
  assert method.num_bytes(code, rows) == 4 + 2 + 2 + 1 + 12
  message = method.to_bytes(code, rows)
  assert np.frombuffer(message[-12:], '<f4').tolist() == [-5, 2, 3]
  # All four, and no zero, though a share of 1 asks for 80.
  code, sent = through(TopK(share=1.0), delta, rows)
  small.assert_trees_equal(sent, delta)
  assert int(code.is_sent.sum()) == 4


def test_equal_values_are_all_sent():
  delta = jax.tree.map(jnp.ones_like, delta_of(DISTINCT))
  code, sent = through(TopK(share=0.01), delta, rows_of(DISTINCT))
  small.assert_trees_equal(sent, delta)
  assert code.is_sent.all()


def test_a_matrix_of_low_rank_is_sent_exactly():
  delta = delta_of(IDS)
  a, b = jax.random.normal(KEY, (2, 9, 2))
  delta['net']['kernel'] = a @ b[:5].T
  _, sent = through(LowRank(rank=2), delta, rows_of(IDS))
  small.assert_trees_close(sent['net'], delta['net'], 1e-3, 1e-4)
  # Of the table it finds what is best (Eckart & Young 1936).
  _, sent = through(LowRank(rank=2, iterations=30), delta, rows_of(IDS))
  table = np.asarray(delta['item_embedding'])
  best = np.sqrt((np.linalg.svd(table)[1][2:] ** 2).sum())
  lost = np.linalg.norm(table - sent['item_embedding'])
  assert 0.999 * best < lost < 1.01 * best


@pytest.mark.parametrize('method', METHODS, ids=str)
def test_zero_stays_zero_and_nan_stays_one(method):
  rows = rows_of(IDS)
  nothing = jax.tree.map(jnp.zeros_like, delta_of(IDS))
  small.assert_trees_equal(through(method, nothing, rows)[1], nothing)
  for broken in (jnp.nan, jnp.inf):
    delta = delta_of(IDS)
    delta['net']['kernel'] = delta['net']['kernel'].at[1, 1].set(broken)
    _, sent = through(method, delta, rows)
    assert not jnp.isfinite(sent['net']['kernel']).all()


@pytest.mark.parametrize(
  'method', [TopK(True, share=0.2), LowRank(True, rank=1)], ids=str
)
def test_what_is_left_out_comes_later(method):
  kept = jax.tree.map(lambda x: x[0], method.client_state(params(), KEY, 1))
  total = {True: 0.0, False: 0.0}
  for number, ids in enumerate((IDS, [0, 3, 5, 200], IDS)):
    before = kept
    delta = delta_of(ids, number)
    update, kept = method.apply(
      update_of(delta, ids), kept, sender(key=jax.random.key(number))
    )
    place = np.asarray(ids)[np.asarray(update.vocabulary.is_first)]
    others = np.setdiff1d(np.arange(NUM_ROWS), place)
    small.assert_trees_equal(
      kept['item_embedding'][others,], before['item_embedding'][others,]
    )
    for of_sent, tree in ((True, update.delta), (False, delta)):
      whole = (
        jnp.zeros((NUM_ROWS, WIDTH))
        .at[np.array(ids),]
        .add(tree['item_embedding'])
      )
      total[of_sent] += np.concatenate(
        [whole.reshape(-1), *map(jnp.ravel, jax.tree.leaves(tree['net']))]
      )
  left = np.concatenate([x.reshape(-1) for x in jax.tree.leaves(kept)])
  assert np.abs(left).max() > 0.1
  np.testing.assert_allclose(total[True] + left, total[False], atol=1e-5)


@pytest.mark.parametrize('weight, broken', [(0.0, 1.0), (1.0, np.nan)])
def test_who_sends_nothing_of_use_keeps_what_it_had(weight, broken):
  method = TopK(True, share=0.2)
  kept = jax.tree.map(lambda x: 0.1 * x, params(5))
  delta = delta_of(IDS)
  delta['net']['bias'] = delta['net']['bias'].at[0].set(broken)
  _, after = method.apply(update_of(delta, IDS, weight), kept, sender())
  small.assert_trees_close(after, kept)


def test_who_is_not_there_or_does_not_answer_counts_nothing():
  update = update_of(delta_of(IDS), IDS)
  for method in METHODS:
    for own, client in ((update, -1), (update.without(jnp.bool_(True)), 0)):
      after, _ = method.apply(own, None, sender(client))
      assert after.metrics['uploaded_bytes'].weight == 0
      assert after.metrics['uploaded_bytes'].total == 0


def test_parameters_on_the_way_down():
  method = Quantised(down=8)
  sent = method.send(params())
  table, received = params()['item_embedding'], sent['item_embedding']
  step = jnp.max(jnp.abs(table), axis=1, keepdims=True) / 127
  assert (jnp.abs(table - received) <= 0.5001 * step).all()
  assert (received != table).any()
  small.assert_trees_equal(Quantised().send(params()), params())
  update, _ = method.apply(update_of(delta_of(IDS), IDS), None, sender())
  # The ids, five rows and their scales; 50 others with one.
  assert update.metrics['downloaded_bytes'].total == 11 + 5 * 10 + 50 + 4


class TestRefused:
  @pytest.mark.parametrize(
    'text, told',
    [
      ('zip', "there is no compression 'zip'; one of none, int8, quantised"),
      ('int8,bits=4', 'there is no option bits'),
      ('quantised,bits=3', 'choose from 8, 4, 2'),
      ('quantised,block=0', 'below its minimum'),
      ('top_k,share=0', 'share=0 sends nothing'),
      ('top_k,share=1.5', 'above its maximum'),
      ('top_k,share=nan', 'is not a finite number'),
      ('low_rank,rank=0', 'below its minimum'),
    ],
  )
  def test_options(self, text, told):
    config = small.config(compression=text)
    assert told in small.error_of(compression.of, config)

  def test_a_rank_that_makes_nothing_smaller(self):
    told = small.error_of(LowRank(rank=6).check, params(), 10)
    assert told == (
      '`compression=low_rank,rank=6` makes no matrix of this model smaller: '
      'the largest is 400 x 6, of rank 6 at most'
    )
    LowRank(rank=5).check(params(), 10)
    told = small.error_of(small.simulation, compression='low_rank,rank=16')
    assert '57 x 16' in told

  def test_more_left_out_than_a_machine_holds(self):
    each = round_lib.state_bytes(params())
    most = round_lib.MOST_STATE_BYTES // each
    TopK(True).check(params(), most)
    TopK().check(params(), most + 1)
    told = small.error_of(TopK(True).check, params(), most + 1)
    assert f'keeps {each:,} bytes for each of {most + 1:,} clients' in told


def simulated(text, **changes):
  """A federation without experts, which compiles quickest."""
  return small.simulation(
    compression=text,
    **small.PLAIN,
    negatives='shared',
    num_negatives=3,
    vocabulary='local',
    **changes,
  )


def trained(simulation, rounds=2):
  """(the state after some rounds, what the last one measured and cost, programs
  compiled after the first)."""
  state = simulation.init_state()
  compiled = 0
  for number in range(1, rounds + 1):
    cohort = simulation.sample_cohort(number)
    state, metrics = simulation.run_round(state, number, cohort)
    compiled = compiled or small.compiled_rounds()
  cost = simulation.traffic(cohort, metrics)
  return state, metrics, cost, small.compiled_rounds() - compiled


def test_a_round_of_compressed_updates():
  simulation = simulated('int8')
  state, metrics, cost, compiled = trained(simulation)
  assert compiled == 0
  plain = simulation.traffic(
    simulation.sample_cohort(2), {'item_rows': metrics['item_rows']}
  )
  assert cost.bytes_down == plain.bytes_down
  assert cost.bytes_up == cost.visits * metrics['uploaded_bytes']
  assert plain.bytes_up / cost.bytes_up > 3.9
  # Close to what the same clients send uncompressed.
  same, *_ = trained(simulated('none'))
  for x, y in zip(*map(jax.tree.leaves, (state.server, same.server))):
    np.testing.assert_allclose(x, y, atol=2e-3)
  assert any(
    (x != y).any()
    for x, y in zip(*map(jax.tree.leaves, (state.server, same.server)))
  )


@pytest.mark.slow
def test_kept_leftovers_are_of_their_clients():
  # SGD: Adam makes rounding visible.
  simulation = simulated(
    'top_k,share=0.05,error_feedback=true',
    client_optimizer='sgd',
    client_learning_rate=0.1,
  )
  state, _, cost, compiled = trained(simulation)
  assert compiled == 0
  asked = np.zeros(simulation.dataset.num_clients, bool)
  for number in (1, 2):
    cohort = simulation.sample_cohort(number)
    asked[cohort[cohort >= 0]] = True
  assert not asked.all()
  kept, _ = state.transforms
  for x in jax.tree.leaves(kept):
    assert not np.asarray(x)[~asked].any()
  assert np.asarray(kept['item_embedding'])[asked].any(axis=(1, 2)).all()
  # Side by side with another seed it is the same run.
  seeds = [simulation, simulation.with_seed(1)]
  states = jax.tree.map(
    lambda *x: jnp.stack(x), *[s.init_state() for s in seeds]
  )
  for number in (1, 2):
    states, metrics = ablation.run_round(seeds, states, number)
  mean = jax.tree.map(lambda x: x[0], metrics['uploaded_bytes'])
  assert mean.total / mean.weight == pytest.approx(cost.bytes_up / cost.visits)
  small.assert_trees_close(
    jax.tree.map(lambda x: x[0], states), state, 1e-3, 1e-5
  )


@pytest.mark.slow
def test_what_drift_control_sends_and_what_comes_down():
  changes = dict(drift_control='mime_lite', client_optimizer='sgd')
  simulation = simulated('quantised,down=8', **changes)
  _, metrics, cost, _ = trained(simulation, 1)
  plain = simulation.traffic(
    simulation.sample_cohort(1), {'item_rows': metrics['item_rows']}
  )
  assert plain.bytes_up / cost.bytes_up > 3.9
  assert cost.bytes_down == cost.visits * metrics['downloaded_bytes']
  assert 3.6 < plain.bytes_down / cost.bytes_down < 4
  # A control variate has to agree with the server's, and travels as it is.
  changes['drift_control'] = 'scaffold'
  simulation = simulated('int8', **changes)
  _, metrics, cost, _ = trained(simulation, 1)
  plain = simulation.traffic(
    simulation.sample_cohort(1), {'item_rows': metrics['item_rows']}
  )
  assert 1.5 < plain.bytes_up / cost.bytes_up < 1.7
