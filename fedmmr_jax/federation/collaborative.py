"""Co-occurrence in the item table: which items occur in the same histories.

The leading eigenvectors of G = Σ_k x_k x_kᵀ, x_k the set of client k's training
items, are PureSVD's item factors (Cremonesi et al. 2010, "Performance of
recommender algorithms on top-n recommendation tasks", RecSys). Federated
training takes tens of rounds to find them; a sketch finds them before round 1.
The server sends a random Ω, a client adds Σ_{i in x_k} Ω_i to the rows of its
items, and from the sum Y = GΩ the server computes the Nyström approximation
Y (ΩᵀY)⁻¹ Yᵀ (Halko et al. 2011, "Finding structure with randomness", SIAM
Review, algorithm 5.5). A client sends, and reveals, as much as with one delta
of the item table; it is asked once. With a window G counts only items that
stand near each other in a history, as item2vec does (Barkan and Koenigstein
2016, "Item2vec: neural item embedding for collaborative filtering", MLSP).

Most items of a large catalogue are in few histories, and the first directions
of G tell the popular items from the rest. `collaborative_items` therefore asks
first how many clients have each item: G is then of the most frequent ones, and
the probe's rows are divided by the roots of the counts, so that taste stands
before popularity (one side of the normalisation of Ng et al. 2001, "On spectral
clustering: analysis and an algorithm", NeurIPS).

Under differential privacy what a client adds has length 1, whatever its
history, and the sum gets noise; the counts likewise. The Nyström approximation
would invert small numbers that are noise now; so the leading left singular
vectors of the noisy sum serve, as many as stand out of the noise.
"""

import numpy as np

from fedmmr_jax.config import ContentInit, RunConfig
from fedmmr_jax.data.dataset import Dataset, taking_part
from fedmmr_jax.errors import UserError
from fedmmr_jax.federation import privacy
from fedmmr_jax.models import content as content_lib
from fedmmr_jax.streams import generator, Stream

_TINY = 1e-300
# Noise alone has singular values up to √V + √d times its deviation, give or
# take a little.
_ABOVE_EDGE = 1.05
_SMALLEST = 1e-6  # eigenvalue of ΩᵀY that counts, relative to the largest


def put_into(
  content: np.ndarray, dataset: Dataset, config: RunConfig
) -> np.ndarray:
  """[V, D] content whose last dimensions are co-occurrence, if so configured.

  The clients in the sketch do not depend on the run's seed, so that seeds
  running in parallel share one catalogue.
  """
  start = config.model.item_embedding
  if not isinstance(start, ContentInit) or not start.collaborative_dim:
    return content
  takes_part = taking_part(dataset.num_train, config.data.new_clients)
  places, probe = draw(config, len(takes_part), dataset.num_rows)
  asked = takes_part[places]
  noise = privacy.sketch_noise(config, len(takes_part))

  def noisy(total, stddev, number):
    # Unlike the probe it is nobody's to know (docs/privacy.md).
    rng = generator(config.seed, Stream.COLLABORATIVE, number)
    return total + stddev * rng.standard_normal(total.shape)

  if start.collaborative_items:
    counts = count(dataset, asked, unit=noise > 0)
    if noise:
      counts = noisy(counts, privacy.COUNTS_NOISE * noise, 2)
    probe = of_frequent(probe, counts, start.collaborative_items)
  sketched = sketch(
    dataset, asked, probe, start.collaborative_window, unit=noise > 0
  )
  if noise:
    sketched = noisy(sketched, noise, 1) * _has_row(probe)[:, None]
    found = denoised(sketched, noise, start.collaborative_dim)
  else:
    found = factors(sketched, probe, start.collaborative_dim)
  return joined(content, found, config.model.hidden_dim)


def joined(
  content: np.ndarray, found: np.ndarray, hidden_dim: int
) -> np.ndarray:
  """[V, D] content whose last dimensions are co-occurrence.

  Args:
    content: [V, ≤ D] of the features.
    found: [V, dim] from `factors` or `denoised`.
    hidden_dim: D.
  """
  kept = content[:, : hidden_dim - found.shape[1]]
  # Without any features there is no content to keep.
  free = hidden_dim - kept.shape[1] - found.shape[1]
  return np.concatenate([np.pad(kept, ((0, 0), (0, free))), found], axis=1)


def draw(
  config: RunConfig, taking_part: int, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
  """([n] places of the clients that are asked among those that take part, [V,
  d] float64 Ω). Who knows the two numbers draws the same: a probe need not be
  sent.

  Args:
    config: settings with a sketch.
    taking_part: number of clients that cohorts are drawn of.
    num_rows: V.
  """
  rng = generator(0, Stream.COLLABORATIVE, 0)
  places = _places(rng, config, taking_part)
  return places, rng.standard_normal((num_rows, columns(config)))


def columns(config: RunConfig) -> int:
  """d, how many numbers a client adds for each of its items."""
  start = config.model.item_embedding
  return start.collaborative_columns or config.model.hidden_dim


def asked(config: RunConfig, num_train: np.ndarray) -> np.ndarray:
  """[n] clients that a sketch asks; the config has one.

  Args:
    config: settings.
    num_train: [K] training items of each client.
  """
  takes_part = taking_part(num_train, config.data.new_clients)
  rng = generator(0, Stream.COLLABORATIVE, 0)
  return takes_part[_places(rng, config, len(takes_part))]


def _places(rng, config, count) -> np.ndarray:
  wanted = round(
    config.server.client_fraction
    * count
    * config.model.item_embedding.collaborative_rounds
  )
  return rng.choice(count, min(max(1, wanted), count), replace=False)


def count(
  dataset: Dataset, clients: np.ndarray, unit: bool = False
) -> np.ndarray:
  """[V] float64: how many of some clients have an item.

  Args:
    dataset: its training items count; held-out items do not.
    clients: [n] clients to ask.
    unit: whether what a client adds is divided by its length, the root of the
      number of its items.
  """
  total = np.zeros(dataset.num_rows)
  for client in clients:
    items = np.unique(_history(dataset, client))
    total[items] += len(items) ** -0.5 if unit else 1.0
  return total


def of_frequent(
  probe: np.ndarray, counts: np.ndarray, items: int
) -> np.ndarray:
  """[V, d] Ω of the items that most clients have; of two with one count, the
  first. The rows of the others are 0: `sketch` leaves them out.

  Args:
    probe: [V, d] from `draw`.
    counts: [V] from `count`; with noise, counts below 1 count as 1.
    items: how many items; fewer if fewer have a count above 0.
  """
  counts = np.where(np.arange(len(counts)) > 0, counts, 0)  # 0 is no item
  most = np.argsort(-counts, kind='stable')[:items]
  most = most[counts[most] > 0]
  weighed = np.zeros_like(probe)
  weighed[most] = probe[most] / np.sqrt(np.maximum(counts[most], 1))[:, None]
  return weighed


def _has_row(probe) -> np.ndarray:
  """[V] bool, which items are asked for; number 0 is none."""
  return probe.any(axis=1) & (np.arange(len(probe)) > 0)


def _history(dataset, client) -> np.ndarray:
  return dataset.sequence(client)[: dataset.num_train[client]]


def sketch(
  dataset: Dataset,
  clients: np.ndarray,
  probe: np.ndarray,
  window: int = 0,
  unit: bool = False,
) -> np.ndarray:
  """Σ_k G_k Ω over some clients.

  Args:
    dataset: its training items count; held-out items do not.
    clients: [n] clients to ask.
    probe: [V, d] Ω; items whose row is 0 are as if they were not there.
    window: 0, and G_k = x_k x_kᵀ; else G_k counts the pairs of places in the
      history that are so far apart at most.
    unit: whether what a client adds is divided by its length, the root of the
      sum of its squares.

  Returns:
    [V, d], the sum of what each client adds to its items' rows.
  """
  total = np.zeros_like(probe)
  has_row = _has_row(probe)
  for client in clients:
    items = _history(dataset, client)
    items = items[has_row[items]]
    if window:
      items, added = _near(items, probe, window)
    else:
      items = np.unique(items)
      added = np.tile(probe[items].sum(axis=0), (len(items), 1))
    if unit:
      added /= max(np.linalg.norm(added), _TINY)
    total[items] += added
  return total


def _near(items, probe, window) -> tuple[np.ndarray, np.ndarray]:
  """The distinct items of a history, and for each the sum of the probe's rows
  of all items at most `window` places from one of its own."""
  sums = np.cumsum(np.pad(probe[items], ((1, 0), (0, 0))), axis=0)
  place = np.arange(len(items))
  around = (
    sums[np.minimum(place + window + 1, len(items))]
    - sums[np.maximum(place - window, 0)]
  )
  distinct, row = np.unique(items, return_inverse=True)
  added = np.zeros((len(distinct), probe.shape[1]))
  np.add.at(added, row, around)
  return distinct, added


def denoised(sketched: np.ndarray, noise: float, dim: int) -> np.ndarray:
  """The directions of a noisy sketch that stand out of its noise.

  Args:
    sketched: [V, d] with independent noise on every number, but for rows that
      are 0.
    noise: its standard deviation.
    dim: how many at most; if fewer stand out, the rest is 0.

  Returns:
    As `factors`.

  Raises:
    UserError: none does.
  """
  rows = np.flatnonzero(sketched.any(axis=1))
  left, strength, _ = np.linalg.svd(sketched[rows], full_matrices=False)
  edge = _ABOVE_EDGE * noise * (len(rows) ** 0.5 + sketched.shape[1] ** 0.5)
  found = left[:, strength > edge][:, :dim]
  if not found.shape[1]:
    raise UserError(
      'nothing in the sketch of `collaborative_dim` stands out of the noise '
      'that `privacy` puts on it; take less of sketch_noise, or leave '
      'collaborative_dim out'
    )
  whole = np.zeros((len(sketched), dim))
  whole[rows, : found.shape[1]] = content_lib.with_fixed_signs(found)
  length = content_lib.root_mean_square_length(whole)
  return (whole / length).astype(np.float32)


def factors(sketched: np.ndarray, probe: np.ndarray, dim: int) -> np.ndarray:
  """Leading eigenvectors of G from its sketch GΩ.

  Args:
    sketched: [V, d] from `sketch`.
    probe: [V, d] Ω.
    dim: how many; if G's sketch has fewer, the rest is 0.

  Returns:
    [V, dim] float32, orthogonal columns of equal length; rows of length 1 on
    average (root mean square over the items that are not zero).
  """
  core = probe.T @ sketched
  values, vectors = np.linalg.eigh((core + core.T) / 2)
  counts = values > _SMALLEST * max(values.max(), 0)
  root = sketched @ (vectors[:, counts] / np.sqrt(values[counts]))
  left, strength, _ = np.linalg.svd(root, full_matrices=False)
  left = left[:, strength > _SMALLEST * strength.max(initial=0)][:, :dim]
  found = content_lib.with_fixed_signs(left)
  found = np.pad(found, ((0, 0), (0, dim - found.shape[1])))
  # Nobody's items have rows of rounding only.
  found[~sketched.any(axis=1)] = 0
  return (found / content_lib.root_mean_square_length(found)).astype(np.float32)
