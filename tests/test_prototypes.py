"""Prototypes: k-means at the client, re-clustering at the server."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmmr_jax.client import prototypes
from fedmmr_jax.client.prototypes import Prototypes

_cluster = jax.jit(prototypes.cluster, static_argnums=(2, 3))
_recluster = jax.jit(prototypes.recluster, static_argnums=2)


def on_a_line(*values):
  return jnp.asarray(values, jnp.float32)[:, None]


def cluster(points, weights=None, num=2, iterations=10):
  points = jnp.asarray(points, jnp.float32)
  weights = jnp.ones(len(points)) if weights is None else weights
  return _cluster(points, jnp.asarray(weights, jnp.float32), num, iterations)


def as_set(found):
  """(centre…, size) of each cluster that is one, in a canonical order."""
  rows = np.concatenate([found.centre, found.size[:, None]], axis=-1)
  rows = rows[np.asarray(found.size) > 0]
  return rows[np.lexsort(rows.T[::-1])]


def assert_same_clusters(actual, expected):
  np.testing.assert_allclose(
    as_set(actual), as_set(expected), rtol=1e-5, atol=1e-5
  )


def test_two_pairs_of_points():
  found = cluster([[0, 0], [10, 0], [0, 2], [10, 2]])
  # Means of the left and of the right pair, each of size 2.
  np.testing.assert_allclose(as_set(found), [[0, 1, 2], [10, 1, 2]])


def test_weights_move_the_centre():
  found = cluster([[0, 0], [10, 0], [0, 2], [10, 2]], [1, 1, 3, 1])
  # (1·0 + 3·2) / 4 = 1.5
  np.testing.assert_allclose(as_set(found), [[0, 1.5, 4], [10, 1, 2]])


@pytest.mark.parametrize(
  'iterations, expected',
  [
    # The heaviest point 0 and the farthest 20 start; 9 is nearer to 0.
    (1, [[3, 3], [43 / 3, 3]]),  # (2·0 + 9) / 3 and (11 + 12 + 20) / 3
    (2, [[0, 2], [13, 4]]),  # |9 − 3| > |9 − 14.3|: 9 goes to the right
    (10, [[0, 2], [13, 4]]),  # and stays: |9 − 0| > |9 − 13|
  ],
)
def test_lloyd_steps_by_hand(iterations, expected):
  found = cluster(
    on_a_line(9, 11, 0, 12, 20), [1, 1, 2, 1, 1], iterations=iterations
  )
  np.testing.assert_allclose(as_set(found), expected, rtol=1e-6)


def test_it_starts_with_the_heaviest_then_the_farthest_from_all():
  # 5 is heaviest, 11 farthest from it, then 0 farthest from both; the start
  # is already the fixed point of its own three clusters.
  found = cluster(on_a_line(0, 1, 5, 10, 11), [1, 1, 3, 1, 1], num=3)
  np.testing.assert_allclose(found.centre[:, 0], [5, 10.5, 0.5])
  np.testing.assert_allclose(found.size, [3, 2, 2])


def test_fewer_points_than_centres():
  found = cluster(on_a_line(1, 4), num=5)
  np.testing.assert_allclose(as_set(found), [[1, 1], [4, 1]])
  assert (np.asarray(found.size) > 0).sum() == 2
  # The surplus stays on a point, where it cannot take anyone's members.
  assert set(found.centre[:, 0].tolist()) == {1, 4}


def test_equal_points_make_one_cluster():
  found = cluster(on_a_line(2, 2, 2), num=2)
  np.testing.assert_allclose(as_set(found), [[2, 3]])


def test_points_of_weight_0_are_ignored():
  found = cluster(
    on_a_line(1e6, 0, 1, -1e6, 10, 11, 500), [0, 1, 1, 0, 1, 1, 0]
  )
  np.testing.assert_allclose(as_set(found), [[0.5, 2], [10.5, 2]])


def test_points_of_weight_0_do_not_fill_surplus_centres():
  found = cluster(on_a_line(1e6, 0, 50), [0, 1, 0], num=3)
  np.testing.assert_allclose(as_set(found), [[0, 1]])
  np.testing.assert_allclose(found.centre, 0)


def test_no_weight_at_all_makes_no_cluster():
  found = cluster(on_a_line(3, 4), [0, 0])
  assert found.size.tolist() == [0, 0]
  assert np.isfinite(found.centre).all()


def test_sizes_sum_to_the_weights():
  rng = np.random.default_rng(0)
  weights = rng.integers(0, 4, 30)
  found = cluster(rng.normal(size=(30, 8)), weights, num=5)
  assert float(found.size.sum()) == weights.sum()


def test_centres_are_the_means_of_their_members():
  rng = np.random.default_rng(1)
  points, weights = rng.normal(size=(40, 6)), rng.uniform(0.5, 2, 40)
  found = cluster(points, weights, num=4, iterations=30)
  distance = ((points[:, None] - found.centre) ** 2).sum(-1)
  nearest = distance.argmin(1)
  for p in range(4):
    members = nearest == p
    np.testing.assert_allclose(
      found.centre[p],
      np.average(points[members], 0, weights[members]),
      rtol=1e-4,
      atol=1e-4,
    )
    np.testing.assert_allclose(found.size[p], weights[members].sum(), rtol=1e-5)


def test_a_vmapped_client_is_the_client_alone():
  rng = np.random.default_rng(2)
  points = jnp.asarray(rng.normal(size=(3, 10, 4)), jnp.float32)
  weights = jnp.asarray(rng.integers(0, 2, (3, 10)), jnp.float32)
  together = jax.vmap(lambda p, w: prototypes.cluster(p, w, 3, 5))(
    points, weights
  )
  for client in range(3):
    alone = _cluster(points[client], weights[client], 3, 5)
    np.testing.assert_allclose(
      together.centre[client], alone.centre, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(together.size[client], alone.size)


def separated(seed=3):
  """Centres of 4 clients near 3 far corners, all of different sizes."""
  rng = np.random.default_rng(seed)
  corners = 100 * np.eye(3, 5)
  centre = np.stack([rng.permutation(corners) for _ in range(4)])
  return Prototypes(
    jnp.asarray(centre + rng.normal(size=centre.shape), jnp.float32),
    jnp.asarray(1 + rng.permutation(12).reshape(4, 3), jnp.float32),
  )


def overlapping():
  """Centres of 6 clients without any structure, all of equal size."""
  rng = np.random.default_rng(4)
  return Prototypes(
    jnp.asarray(rng.normal(size=(6, 3, 2)), jnp.float32), jnp.ones((6, 3))
  )


def permuted_clients(uploaded, order):
  return Prototypes(uploaded.centre[order], uploaded.size[order])


def permuted_centres(uploaded, client, order):
  return Prototypes(
    uploaded.centre.at[client].set(uploaded.centre[client][order]),
    uploaded.size.at[client].set(uploaded.size[client][order]),
  )


NOTHING = prototypes.init(3, 5)


def test_recluster_finds_what_the_clients_share():
  uploaded = separated()
  found = _recluster(uploaded, NOTHING, 10)
  owner = np.asarray(uploaded.centre)[..., :3].argmax(-1)
  expected = []
  for corner in range(3):
    member = owner == corner
    size = np.asarray(uploaded.size)[member]
    expected.append([*np.average(uploaded.centre[member], 0, size), size.sum()])
  expected = Prototypes(
    jnp.asarray(expected)[:, :-1], jnp.asarray(expected)[:, -1]
  )
  assert_same_clusters(found, expected)


@pytest.mark.parametrize('upload', [separated, overlapping])
def test_permuted_clients_give_the_same_set_of_centres(upload):
  uploaded = upload()
  previous = prototypes.init(3, uploaded.centre.shape[-1])
  expected = _recluster(uploaded, previous, 10)
  rng = np.random.default_rng(0)
  for _ in range(5):
    order = rng.permutation(len(uploaded.size))
    assert_same_clusters(
      _recluster(permuted_clients(uploaded, order), previous, 10), expected
    )


@pytest.mark.parametrize('upload', [separated, overlapping])
def test_permuted_centres_of_a_client_give_the_same_set(upload):
  uploaded = upload()
  previous = prototypes.init(3, uploaded.centre.shape[-1])
  expected = _recluster(uploaded, previous, 10)
  for client in range(len(uploaded.size)):
    permuted = permuted_centres(uploaded, client, np.array([2, 0, 1]))
    assert_same_clusters(_recluster(permuted, previous, 10), expected)


def test_recluster_is_not_an_average_by_position():
  # Both clients found 0 and 10, in opposite order; their mean would be 5.
  uploaded = Prototypes(
    jnp.array([[[0.0], [10.0]], [[10.0], [0.0]]]), jnp.ones((2, 2))
  )
  found = _recluster(uploaded, prototypes.init(2, 1), 10)
  np.testing.assert_allclose(as_set(found), [[0, 2], [10, 2]])


def test_a_client_without_prototypes_counts_for_nothing():
  uploaded = separated()
  joined = jax.tree.map(
    lambda x: jnp.concatenate([x, jnp.zeros_like(x[:2])]), uploaded
  )
  assert_same_clusters(
    _recluster(joined, NOTHING, 10), _recluster(uploaded, NOTHING, 10)
  )


def test_nobody_uploaded_keeps_the_previous():
  previous = Prototypes(jnp.arange(15.0).reshape(3, 5), jnp.arange(3.0))
  uploaded = jax.tree.map(jnp.zeros_like, separated())
  kept = _recluster(uploaded, previous, 10)
  jax.tree.map(np.testing.assert_array_equal, kept, previous)


def test_an_upload_replaces_the_previous_whole():
  previous = Prototypes(jnp.full((3, 5), 7.0), jnp.full((3,), 7.0))
  assert_same_clusters(
    _recluster(separated(), previous, 10), _recluster(separated(), NOTHING, 10)
  )


def test_a_start_has_no_prototypes():
  nothing = prototypes.init(3, 5)
  assert nothing.centre.shape == (3, 5)
  assert nothing.size.tolist() == [0, 0, 0]
