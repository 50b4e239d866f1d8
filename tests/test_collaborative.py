"""The sketch of the co-occurrence, and what it gives to the item table."""

import dataclasses

import numpy as np

from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.federation import collaborative
from tests import small


def gram(dataset, clients):
  """Σ x xᵀ over sets of training items, the plain way."""
  total = np.zeros((dataset.num_rows, dataset.num_rows))
  for client in clients:
    x = np.zeros(dataset.num_rows)
    x[dataset.sequence(client)[:-2]] = 1
    total += np.outer(x, x)
  return total


def test_a_sketch_is_the_gram_matrix_times_the_probe():
  dataset = small.dataset()
  probe = np.random.default_rng(0).normal(size=(dataset.num_rows, 7))
  clients = np.array([1, 4, 6])
  np.testing.assert_allclose(
    collaborative.sketch(dataset, clients, probe),
    gram(dataset, clients) @ probe,
    atol=1e-9,
  )


def test_with_a_window_only_near_places_count():
  dataset = small.dataset()
  # One item twice.
  start = dataset.offsets[4]
  items = dataset.items.copy()
  items[start + 3] = items[start]
  dataset = dataclasses.replace(dataset, items=items)
  probe = np.random.default_rng(0).normal(size=(dataset.num_rows, 7))
  clients = np.array([1, 4, 6])
  pairs = np.zeros((dataset.num_rows, dataset.num_rows))
  lengths = []
  for client in clients:
    history = dataset.sequence(client)[:-2]
    own = np.zeros_like(pairs)
    for place, item in enumerate(history):
      for other in history[max(0, place - 2) : place + 3]:
        own[item, other] += 1
    lengths.append(np.linalg.norm(own @ probe))
    pairs += own
  np.testing.assert_allclose(
    collaborative.sketch(dataset, clients, probe, window=2),
    pairs @ probe,
    atol=1e-9,
  )
  one = collaborative.sketch(dataset, clients[1:2], probe, window=2)
  unit = collaborative.sketch(dataset, clients[1:2], probe, window=2, unit=True)
  np.testing.assert_allclose(unit, one / lengths[1], atol=1e-9)


def test_only_frequent_items_are_in_it():
  dataset = small.dataset()
  clients = np.array([1, 4, 6])
  histories = [dataset.sequence(client)[:-2] for client in clients]
  counts = collaborative.count(dataset, clients)
  by_hand = np.zeros(dataset.num_rows)
  lengths = np.zeros(dataset.num_rows)
  for history in histories:
    by_hand[list(set(history))] += 1
    lengths[list(set(history))] += len(set(history)) ** -0.5
  np.testing.assert_array_equal(counts, by_hand)
  np.testing.assert_allclose(
    collaborative.count(dataset, clients, unit=True), lengths
  )
  probe = np.random.default_rng(0).normal(size=(dataset.num_rows, 7))
  weighed = collaborative.of_frequent(probe, counts, 6)
  kept = sorted(range(1, len(counts)), key=lambda i: (-counts[i], i))[:6]
  assert set(np.flatnonzero(weighed.any(axis=1))) == set(kept)
  np.testing.assert_allclose(
    weighed[kept], probe[kept] / np.sqrt(counts[kept])[:, None]
  )
  # The others are as if nobody had them: no row, and no place in a window.
  pairs = np.zeros((dataset.num_rows, dataset.num_rows))
  for history in histories:
    left = [item for item in history if item in kept]
    for place, item in enumerate(left):
      for other in left[max(0, place - 1) : place + 2]:
        pairs[item, other] += 1
  np.testing.assert_allclose(
    collaborative.sketch(dataset, clients, weighed, window=1),
    pairs @ weighed,
    atol=1e-9,
  )


def test_items_that_nobody_has_are_not_frequent():
  counts = np.array([9.0, 0.0, 2.0, 0.3, -1.0])
  kept = collaborative.of_frequent(np.ones((5, 1)), counts, 4)[:, 0]
  np.testing.assert_allclose(kept, [0, 0, 0.5**0.5, 1, 0])


def test_factors_are_the_leading_eigenvectors():
  dataset = small.dataset()
  clients = np.arange(dataset.num_clients)
  probe = np.random.default_rng(0).normal(size=(dataset.num_rows, 20))
  got = collaborative.factors(
    collaborative.sketch(dataset, clients, probe), probe, 3
  )
  values, vectors = np.linalg.eigh(gram(dataset, clients))
  assert values[-4] < values[-3]  # the first three are a subspace of their own
  cosine = (got / np.linalg.norm(got, axis=0)).T @ vectors[:, ::-1][:, :3]
  np.testing.assert_allclose(np.abs(cosine), np.eye(3), atol=1e-4)
  used = np.unique(np.concatenate([dataset.sequence(c)[:-2] for c in clients]))
  assert not np.delete(got, used, axis=0).any()
  np.testing.assert_allclose((got[used] ** 2).sum(1).mean(), 1, rtol=1e-4)


def test_more_directions_than_there_are_clients_are_zero():
  dataset = small.dataset(num_users=2)
  clients = np.arange(dataset.num_clients)  # 3: G has rank 3
  probe = np.random.default_rng(0).normal(size=(dataset.num_rows, 12))
  got = collaborative.factors(
    collaborative.sketch(dataset, clients, probe), probe, 6
  )
  assert got[:, :3].any(axis=0).all() and not got[:, 3:].any()


def test_it_takes_the_last_directions_of_the_content():
  without = small.simulation(item_embedding='content_plus_id').catalogue.content
  content = small.simulation(
    item_embedding='content_plus_id,collaborative_dim=4'
  ).catalogue.content
  assert content.shape == without.shape and content.shape[1] == 16
  np.testing.assert_array_equal(content[:, :12], without[:, :12])
  assert content[1:, 12:].any() and not content[0].any()


def test_seeds_share_it_and_it_needs_no_features():
  dataset = small.dataset()
  dataset = dataclasses.replace(dataset, features={})
  contents = [
    simulation_lib.build(
      small.config(
        item_embedding='content_plus_id,collaborative_dim=4', seed=seed
      ),
      dataset,
    ).catalogue.content
    for seed in (0, 1)
  ]
  np.testing.assert_array_equal(*contents)
  assert contents[0].any()


def test_more_directions_than_an_embedding_has_are_refused():
  assert 'collaborative_dim exceeds `hidden_dim=16`' in small.error_of(
    lambda: small.config(item_embedding='content_init,collaborative_dim=32')
  )


def test_fewer_columns_than_directions_are_refused():
  assert 'collaborative_columns are fewer' in small.error_of(
    lambda: small.config(
      item_embedding='content_init,collaborative_dim=8,collaborative_columns=4'
    )
  )


def test_under_privacy_a_client_adds_length_1_to_the_sketch():
  dataset = small.dataset()
  probe = np.random.default_rng(0).normal(size=(dataset.num_rows, 7))

  def sketch(*clients):
    return collaborative.sketch(dataset, np.array(clients), probe, unit=True)

  alone = sketch(4)
  np.testing.assert_allclose(np.linalg.norm(alone), 1, rtol=1e-12)
  plain = collaborative.sketch(dataset, np.array([4]), probe)
  np.testing.assert_allclose(alone, plain / np.linalg.norm(plain), atol=1e-12)
  np.testing.assert_allclose(sketch(1, 4) - sketch(1), alone, atol=1e-12)


def test_what_stands_out_of_the_noise_is_found():
  rng = np.random.default_rng(0)
  left, _ = np.linalg.qr(rng.normal(size=(400, 3)))
  right, _ = np.linalg.qr(rng.normal(size=(16, 3)))
  # Noise alone reaches 0.1 (√400 + √16) = 2.4: the third is below it.
  clean = (left * [300.0, 200.0, 0.1]) @ right.T
  noisy = np.pad(clean + 0.1 * rng.normal(size=clean.shape), ((1, 0), (0, 0)))
  found = collaborative.denoised(noisy, 0.1, 8)
  assert found.shape == (401, 8) and not found[0].any()
  assert found[:, :2].any(axis=0).all() and not found[:, 2:].any()
  kept = found[1:, :2] / np.linalg.norm(found[1:, :2], axis=0)
  np.testing.assert_allclose(np.abs(kept.T @ left[:, :2]), np.eye(2), atol=0.02)
  message = small.error_of(collaborative.denoised, noisy, 20.0, 8)
  assert 'stands out of the noise' in message
