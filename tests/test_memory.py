"""A client's memory: what enters, what leaves, what is retrieved."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax.client import memory as memory_lib
from fedmmr_jax.config import (
  NoMemory,
  RecentMemory,
  SurpriseMemory,
  TwoTierMemory,
)
from tests import parity

SMALL = SurpriseMemory(capacity=3, retrieval_size=3)
# Without recency, utility depends on frequency alone: ties can be arranged.
TIES = SurpriseMemory(capacity=2, retrieval_size=2, recency_weight=0.0)

# Items 1 to 4 lie along the axes, 5 almost along the first, 6 between the
# first two; 7 and later ones have no features.
FEATURES = np.zeros((20, 4), np.float32)
FEATURES[1:5] = np.eye(4)
FEATURES[5] = [1, 0.1, 0, 0]
FEATURES[6] = [1, 1, 0, 0]

_update = jax.jit(memory_lib.update, static_argnames='rule')
_update_all = jax.jit(memory_lib.update_all, static_argnames='rule')
_retrieve = jax.jit(memory_lib.retrieve, static_argnames='rule')


def after(events, rule=SMALL):
  """Memory after [(item, surprise), ...], from empty."""
  memory = memory_lib.init(rule)
  for item, surprise in events:
    memory = _update(memory, item, surprise, True, FEATURES, rule=rule)
  return memory


def remembering(*items, rule=SMALL):
  """Memory after items that are all surprising enough, from empty."""
  return after([(item, 1.0) for item in items], rule)


def assert_same(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def utility_of(item, memory, now, rule=SMALL):
  value = memory_lib.utility(memory, jnp.int32(now), rule)
  return float(value[memory.item.tolist().index(item)])


def streams(seed, shape):
  """Items 1 … 7, surprises on both sides of the threshold, some padding."""
  rng = np.random.default_rng(seed)
  return (
    rng.integers(1, 8, shape).astype(np.int32),
    rng.uniform(0, 1, shape).astype(np.float32),
    rng.random(shape) < 0.8,
  )


def test_starts_empty_with_the_clock_at_zero():
  memory = memory_lib.init(SMALL)
  assert memory.item.tolist() == [0, 0, 0]
  assert int(memory.clock) == 0
  assert float(memory_lib.fill(memory)) == 0.0


def test_a_new_item_is_written_with_all_its_fields():
  memory = after([(7, 0.5)])
  assert memory.item.tolist() == [7, 0, 0]
  assert memory.frequency.tolist() == [1, 0, 0]
  assert memory.last_update.tolist() == [0, 0, 0]
  assert memory.surprise.tolist() == [0.5, 0, 0]
  assert int(memory.clock) == 1
  assert float(memory_lib.fill(memory)) == pytest.approx(1 / 3)


def test_below_the_threshold_only_the_clock_moves():
  before = remembering(7)
  memory = _update(before, 8, 0.29, True, FEATURES, rule=SMALL)
  assert_same(memory, before._replace(clock=2))


def test_below_the_threshold_a_stored_item_is_not_refreshed():
  before = remembering(7)
  memory = _update(before, 7, 0.29, True, FEATURES, rule=SMALL)
  assert_same(memory, before._replace(clock=2))


def test_at_the_threshold_is_remembered():
  rule = SurpriseMemory(capacity=3, threshold=0.5)
  assert after([(7, 0.5)], rule).item.tolist() == [7, 0, 0]


def test_a_nan_surprise_is_not_remembered():
  memory = after([(7, np.nan)])
  assert memory.item.tolist() == [0, 0, 0]
  assert int(memory.clock) == 1


def test_padding_changes_nothing_not_even_the_clock():
  for before in (remembering(7), remembering(7, 8, 9, 10)):
    for item in (7, 11):
      assert_same(
        _update(before, item, 9.0, False, FEATURES, rule=SMALL), before
      )


@pytest.mark.parametrize('again, largest', [(0.4, 0.5), (0.75, 0.75)])
def test_refresh_of_a_stored_item(again, largest):
  memory = after([(6, 1.0), (7, 0.5), (8, 1.0), (7, again)])
  assert memory.item.tolist() == [6, 7, 8]
  assert memory.frequency.tolist() == [1, 2, 1]
  assert memory.last_update.tolist() == [0, 3, 2]
  assert memory.surprise.tolist() == [1.0, largest, 1.0]
  assert memory.inserted.tolist() == [0, 1, 2]
  assert int(memory.clock) == 4


def test_a_free_slot_is_taken_before_anyone_is_evicted():
  assert sorted(remembering(7, 8, 9).item.tolist()) == [7, 8, 9]


def test_a_full_memory_refreshes_without_evicting():
  assert sorted(remembering(7, 8, 9, 8).item.tolist()) == [7, 8, 9]


def test_the_lowest_utility_is_evicted():
  # At clock 5, with τ = 60:      recency part            frequency part
  #   7: f = 3, age 3   0.6 e^(−3/60) = 0.571   0.4 ln 4/ln 14 = 0.210  0.781
  #   8: f = 1, age 2   0.6 e^(−2/60) = 0.580   0.4 ln 2/ln 12 = 0.112  0.692
  #   9: f = 1, age 1   0.6 e^(−1/60) = 0.590                    0.112  0.702
  memory = remembering(7, 7, 7, 8, 9, 10)
  assert memory.item.tolist() == [7, 10, 9]


def test_what_takes_an_evicted_slot_inherits_nothing():
  memory = after([(6, 9.0), (7, 1.0), (8, 1.0), (9, 0.5)])
  assert memory.item.tolist() == [9, 7, 8]
  assert memory.frequency.tolist() == [1, 1, 1]
  assert memory.surprise.tolist() == [0.5, 1.0, 1.0]
  assert memory.last_update.tolist() == [3, 1, 2]
  assert memory.inserted.tolist() == [3, 1, 2]


def test_a_shorter_time_constant_lets_a_frequent_item_go():
  # Item 7 has f = 3 and age 3, item 8 f = 1 and age 2, item 9 f = 1, age 1.
  #   τ = 1:  7: 0.6·0.050 + 0.210 = 0.240   8: 0.6·0.135 + 0.112 = 0.193
  #   and with the frequency's weight halved
  #           7: 0.6·0.050 + 0.105 = 0.135   8: 0.6·0.135 + 0.056 = 0.137
  events = (7, 7, 7, 8, 9, 10)
  quick = SurpriseMemory(capacity=3, recency_time_constant=1.0)
  assert 8 not in remembering(*events, rule=quick).item
  light = SurpriseMemory(
    capacity=3, recency_time_constant=1.0, frequency_weight=0.2
  )
  assert 7 not in remembering(*events, rule=light).item


def test_among_equals_the_earliest_inserted_is_evicted():
  assert remembering(5, 6, 7, rule=TIES).item.tolist() == [7, 6]


def test_ties_follow_insertion_and_not_the_slot_after_its_reuse():
  # 7 reused the first slot; the second slot's 6 has been there for longer.
  assert remembering(5, 6, 7, 8, rule=TIES).item.tolist() == [7, 8]
  assert remembering(5, 6, 7, 8, 9, rule=TIES).item.tolist() == [9, 8]


def test_ties_follow_insertion_and_not_the_last_refresh():
  # Both have f = 2; 5 came first although it was refreshed last.
  assert remembering(5, 6, 6, 5, 7, rule=TIES).item.tolist() == [7, 6]


@pytest.mark.parametrize(
  'frequency, age, expected',
  [
    (1, 0, 0.7115771782604519),  # 0.6 + 0.4·ln 2/ln 12
    (1, 60, 0.33230484296),  # 0.6/e + 0.4·ln 2/ln 12 = 0.220728 + 0.111577
    (2, 0, 0.77132693641),  # 0.6 + 0.4·ln 3/ln 13
    (9, 30, 0.67136729),  # 0.6·e^(−1/2) + 0.4·ln 10/ln 20
  ],
)
def test_utility_by_hand(frequency, age, expected):
  memory = remembering(*[7] * frequency)
  now = int(memory.last_update[0]) + age
  assert utility_of(7, memory, now) == pytest.approx(expected, rel=1e-6)


def test_empty_slots_have_no_utility():
  value = memory_lib.utility(remembering(7), jnp.int32(1), SMALL)
  assert value.tolist()[1:] == [-np.inf, -np.inf]


def test_retrieval_is_by_utility_and_zero_where_empty():
  # At clock 4:
  #   5: f = 2, age 2   0.6 e^(−2/60) + 0.4 ln 3/ln 13 = 0.580 + 0.171 = 0.752
  #   6: f = 1, age 3   0.6 e^(−3/60) + 0.4 ln 2/ln 12 = 0.571 + 0.112 = 0.682
  #   7: f = 1, age 1   0.6 e^(−1/60) + 0.4 ln 2/ln 12 = 0.590 + 0.112 = 0.702
  rule = SurpriseMemory(capacity=4, retrieval_size=4)
  memory = remembering(5, 6, 5, 7, rule=rule)
  assert _retrieve(memory, rule=rule).tolist() == [5, 7, 6, 0]


def test_retrieval_takes_the_best_r():
  rule = SurpriseMemory(capacity=4, retrieval_size=2)
  memory = remembering(5, 6, 5, 7, rule=rule)
  assert _retrieve(memory, rule=rule).tolist() == [5, 7]


def test_retrieval_of_an_empty_memory_is_all_zero():
  assert _retrieve(memory_lib.init(SMALL), rule=SMALL).tolist() == [0, 0, 0]


def test_retrieval_ties_go_to_the_earliest_inserted():
  # The slots hold 7, 6; 6 came first.
  memory = remembering(5, 6, 7, rule=TIES)
  assert _retrieve(memory, rule=TIES).tolist() == [6, 7]


def test_no_item_is_stored_twice():
  items, surprises, valid = streams(seed=0, shape=(60,))
  memory = _update_all(
    memory_lib.init(SMALL), items, surprises, valid, FEATURES, rule=SMALL
  )
  assert len(set(memory.item.tolist())) == 3
  assert int(memory.clock) == valid.sum()


def test_update_all_is_a_loop_of_update():
  items, surprises, valid = streams(seed=1, shape=(24,))
  looped = memory_lib.init(SMALL)
  for positive in zip(items, surprises, valid):
    looped = _update(looped, *positive, FEATURES, rule=SMALL)
  scanned = _update_all(
    memory_lib.init(SMALL), items, surprises, valid, FEATURES, rule=SMALL
  )
  assert_same(scanned, looped)


def test_update_all_goes_on_where_it_stopped():
  items, surprises, valid = streams(seed=2, shape=(24,))
  whole = _update_all(
    memory_lib.init(SMALL), items, surprises, valid, FEATURES, rule=SMALL
  )
  half = _update_all(
    memory_lib.init(SMALL),
    items[:12],
    surprises[:12],
    valid[:12],
    FEATURES,
    rule=SMALL,
  )
  half = _update_all(
    half, items[12:], surprises[12:], valid[12:], FEATURES, rule=SMALL
  )
  assert_same(half, whole)


def test_vmapped_clients_are_looped_clients():
  many = streams(seed=3, shape=(4, 24))
  many[2][3] = False  # one client has nothing but padding
  empty = memory_lib.init(SMALL)
  together = jax.jit(
    jax.vmap(
      lambda *positives: memory_lib.update_all(
        empty, *positives, FEATURES, SMALL
      )
    )
  )(*many)
  for client in range(4):
    alone = _update_all(empty, *(a[client] for a in many), FEATURES, rule=SMALL)
    assert_same(jax.tree.map(lambda x: x[client], together), alone)
  assert_same(jax.tree.map(lambda x: x[3], together), empty)


def stacked(*memories):
  return jax.tree.map(lambda *x: jnp.stack(x), *memories)


def test_fetch_takes_the_clients_and_an_empty_memory_for_padding():
  clients = remembering(5, 6), remembering(7), remembering(8, 9, 8)
  cohort = memory_lib.fetch(stacked(*clients), jnp.array([2, -1, 0]))
  assert_same(cohort, stacked(clients[2], memory_lib.init(SMALL), clients[0]))


def test_store_writes_the_clients_back_and_drops_padding():
  before = stacked(remembering(5, 6), remembering(7), remembering(8, 9, 8))
  cohort = stacked(remembering(1), remembering(2), remembering(3))
  after_round = memory_lib.store(before, jnp.array([2, 1, -1]), cohort)
  assert_same(
    after_round, stacked(remembering(5, 6), remembering(2), remembering(1))
  )


def test_recent_keeps_the_last_ones_whatever_their_surprise():
  rule = RecentMemory(capacity=3, retrieval_size=2)
  memory = after([(7, 9.0), (8, 0.0), (7, 0.0), (9, 0.1), (10, 0.0)], rule)
  # 8 is the oldest when 10 comes: 7 was seen again.
  assert memory.item.tolist() == [7, 10, 9]
  assert _retrieve(memory, rule=rule).tolist() == [10, 9]


def test_no_memory_remembers_nothing_but_counts():
  rule = NoMemory()
  items, surprises, valid = streams(seed=5, shape=(24,))
  memory = _update_all(
    memory_lib.init(rule), items, surprises, valid, FEATURES, rule=rule
  )
  assert memory.clock == valid.sum()
  assert not memory.item.any()
  assert not _retrieve(memory, rule=rule).any()


TIERS = TwoTierMemory(
  capacity=2,
  long_term_capacity=2,
  retrieval_size=3,
  novelty_threshold=0.4,
  merge_similarity=0.95,
)


def test_two_tiers_short_term_is_first_in_first_out():
  memory = remembering(1, 2, 3, rule=TIERS)
  assert memory.item.tolist()[:2] == [3, 2]


def test_two_tiers_long_term_takes_what_is_unlike_the_short_term():
  # 1: nothing there, novelty 1. 6: cosine to 1 is 0.707, novelty 0.293. 2: 0
  # to 1, 0.707 to 6. 3: 0 to 6 and 2.
  memory = remembering(1, 6, 2, 3, rule=TIERS)
  assert memory.item.tolist()[2:] == [1, 3]


def test_two_tiers_long_term_merges_what_is_nearly_equal():
  # 5 comes when 1 has left the short term: novel, but like 1 of the long term
  # (cosine 1/√1.01 = 0.995), which it refreshes.
  roomy = dataclasses.replace(TIERS, long_term_capacity=3)
  memory = remembering(1, 2, 3, 5, rule=roomy)
  assert memory.item.tolist() == [3, 5, 1, 2, 3]
  assert memory.frequency.tolist() == [1, 1, 2, 1, 1]
  assert memory.last_update.tolist() == [2, 3, 3, 1, 2]


def test_two_tiers_prefer_the_item_itself_to_one_like_it():
  # 5 is like 1 (0.995), but both are stored for long: 5 refreshes 5.
  rule = dataclasses.replace(
    TIERS, long_term_capacity=4, merge_similarity=0.999
  )
  memory = remembering(1, 2, 3, 5, 2, 3, rule=rule)
  lenient = dataclasses.replace(rule, merge_similarity=0.95)
  memory = _update(memory, 5, 1.0, True, FEATURES, rule=lenient)
  frequency = dict(zip(memory.item.tolist()[2:], memory.frequency.tolist()[2:]))
  assert frequency[5] == 2 and frequency[1] == 1


def test_two_tiers_empty_slots_are_like_nothing():
  everything = dataclasses.replace(TIERS, merge_similarity=0.0)
  assert remembering(7, rule=everything).item.tolist() == [7, 0, 7, 0]


def test_two_tiers_retrieve_the_latest_and_then_the_lasting():
  memory = remembering(1, 2, 7, 8, rule=TIERS)
  # 7 and 8 have no features: like nothing, so they are novel too.
  assert _retrieve(memory, rule=TIERS).tolist()[:2] == [8, 7]
  assert _retrieve(memory, rule=TIERS).tolist()[2] in memory.item[2:]


def contents(memory, rule):
  """Item -> its entry, in the form of the reference."""
  value = memory_lib.utility(memory, memory.clock - 1, rule)
  columns = (
    memory.item,
    memory.frequency,
    memory.surprise,
    memory.last_update,
    value,
  )
  return {
    str(item): dict(
      frequency=frequency,
      surprise=pytest.approx(surprise),
      last_update=last_update,
      utility=pytest.approx(value, rel=1e-6),
    )
    for item, frequency, surprise, last_update, value in zip(
      *(np.asarray(c).tolist() for c in columns)
    )
    if item
  }


def test_parity_with_the_original_after_every_event():
  reference = json.loads(
    parity.require(parity.PARITY / 'memory_parity.json').read_text()
  )
  rule = SurpriseMemory(
    capacity=reference['capacity'],
    retrieval_size=3,
    threshold=reference['surprise_threshold'],
    recency_weight=reference['recency_weight'],
    frequency_weight=reference['frequency_weight'],
    recency_time_constant=reference['recency_time_constant_steps'],
  )
  memory = memory_lib.init(rule)
  assert len(reference['events']) == 60
  for (step, item, surprise), expected in zip(
    reference['events'], reference['after_each_step'], strict=True
  ):
    assert int(memory.clock) == step == expected['step']
    memory = _update(memory, item, surprise, True, FEATURES, rule=rule)
    assert contents(memory, rule) == expected['items'], f'event {step}'
    best = [i for i in _retrieve(memory, rule=rule).tolist() if i]
    assert best == expected['top3_by_utility'], f'event {step}'
