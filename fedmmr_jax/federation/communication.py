"""What a federation pays with: visits of clients and the bytes they move.

Counted is what this simulation's clients receive and return, four bytes a
number, or what `compression` makes of it: the parameters, of the item table the
rows that a client works on, each with its id (with `vocabulary=dense` the whole
table), prototypes, and what drift control sends. Personal parts stay where they
are and cost nothing. Item features are public and do not count. The sketch of
`collaborative_dim` and the counts of `shrinkage` are part of round 1.
"""

from typing import Any, Iterable, Mapping, NamedTuple, Sequence

import jax
import numpy as np

from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax.client import personal as personal_lib
from fedmmr_jax.client import vocabulary
from fedmmr_jax.config import ContentInit, ContentPlusId, RunConfig
from fedmmr_jax.data.dataset import taking_part
from fedmmr_jax.federation import collaborative
from fedmmr_jax.federation.round import FederationState, RoundProgram

_BYTES = 4  # of a number or an id


class Traffic(NamedTuple):
  """Cost of a round, or of several.

  Attributes:
    visits: clients that were asked, counted each time.
    bytes_down: from the server to them.
    bytes_up: from them to the server.
    bytes_wasted: of both, those of clients whose answer did not count.
  """

  visits: int
  bytes_down: float
  bytes_up: float
  bytes_wasted: float = 0.0

  def __add__(self, other: Any) -> 'Traffic':
    return Traffic(*(a + b for a, b in zip(self, other)))

  @property
  def per_visit(self) -> 'Traffic':
    """Of one visit, in the mean; nothing without any."""
    visits = max(self.visits, 1)
    return Traffic(1, self.bytes_down / visits, self.bytes_up / visits)


NOTHING = Traffic(0, 0, 0)


def of_round(
  program: RoundProgram,
  state: FederationState,
  visits: int,
  metrics: Mapping[str, Any],
) -> Traffic:
  """Traffic of a round. Whoever is asked receives the model, also one that then
  goes away; an answer that is lost on its way is not counted as sent, one that
  is late or rejected is.

  Args:
    program: the static parts of the round.
    state: of the federation, or a tree with the same shapes.
    visits: clients of the cohort; `metrics` may know better.
    metrics: means over them: `item_rows` that one works on, None if nobody
      trained; with `compression` the bytes that it found; how many were asked,
      and what became of them.
  """
  item_rows = metrics[metrics_lib.ITEM_ROWS] or 0.0
  server = state.server
  sent = program.client.drift.broadcast(server.control, server.opt_state)
  uploaded = jax.eval_shape(program.client.drift.no_upload, server.params)
  names = program.config.federation.personal_groups
  sent, uploaded, params = (
    personal_lib.shared(tree, server.params, names)
    for tree in (sent, uploaded, server.params)
  )
  delta = _size(params, item_rows)
  prototypes = _size(server.prototypes, item_rows)
  # None, too, if nobody was asked.
  received = metrics.get(metrics_lib.DOWNLOADED)
  returned = metrics.get(metrics_lib.UPLOADED)
  if received is None:
    received = delta
  if returned is None:
    returned = delta + prototypes + _size(uploaded, item_rows)
  down = received + prototypes + _size(sent, item_rows)

  def clients(*names):
    return sum(metrics.get(name, 0) for name in names)

  asked = metrics.get(metrics_lib.ASKED, visits)
  silent = clients(metrics_lib.DROPPED, metrics_lib.LOST)
  in_vain = clients(metrics_lib.LATE, *metrics_lib.REJECTED)
  answered = metrics.get(metrics_lib.ANSWERED, asked)
  if answered < program.config.federation.min_answers:
    in_vain = asked - silent
  return Traffic(
    asked,
    asked * down,
    (asked - silent) * returned,
    (silent + in_vain) * down + in_vain * returned,
  )


def _size(tree: Any, item_rows: float) -> float:
  """Bytes of a tree of parameters, of its item tables only so many rows."""
  total = 0.0
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if vocabulary.is_table(path):
      whole = leaf.shape[0] <= item_rows
      total += item_rows * (leaf.size // leaf.shape[0] + (not whole))
    else:
      total += leaf.size
  return _BYTES * total


def of_sketch(config: RunConfig, num_train: np.ndarray) -> Traffic:
  """Traffic before round 1. For the sketch a client needs only the seed of the
  probe, and returns a row for each of its items, all of which count here. With
  `collaborative_items` it has sent their numbers before, and is told the
  frequent ones with their counts. For `shrinkage` every client sends each of
  its items' number and count.

  Args:
    config: settings.
    num_train: [K] training items of each client.
  """
  start = config.model.item_embedding
  found = NOTHING
  if isinstance(start, ContentInit) and start.collaborative_dim:
    clients = collaborative.asked(config, num_train)
    rows = int(num_train[clients].sum())
    found = Traffic(
      len(clients),
      _BYTES * len(clients),
      _BYTES * rows * (collaborative.columns(config) + 1),
    )
    if start.collaborative_items:
      found = Traffic(
        found.visits + len(clients),
        found.bytes_down
        + 2 * _BYTES * len(clients) * start.collaborative_items,
        found.bytes_up + _BYTES * rows,
      )
  if isinstance(start, ContentPlusId) and start.shrinkage:
    part = taking_part(num_train, config.data.new_clients)
    found = Traffic(
      found.visits + len(part),
      found.bytes_down,
      found.bytes_up + 2 * _BYTES * int(num_train[part].sum()),
    )
  return found


class Reached(NamedTuple):
  """When a quality was reached first.

  Attributes:
    round: of the validation, 1-based.
    traffic: up to it.
  """

  round: int
  traffic: Traffic


class Costs(NamedTuple):
  """What qualities cost.

  Attributes:
    metric: what was reached, as in 'full/NDCG@10'.
    rows: (name, value, when it was reached or None).
  """

  metric: str
  rows: list[tuple[str, float, Reached | None]]


def costs(
  records: Sequence[Mapping[str, Any]],
  protocol: str,
  metric: str,
  shares: Sequence[float] = (0.5, 0.8, 0.9, 1.0),
) -> Costs:
  """When shares of the best validation were reached; no rows without one."""
  value = best(records, protocol, metric)
  return Costs(
    f'{protocol}/{metric}',
    [
      (
        f'{share:.0%} of the best',
        share * value,
        until(records, protocol, metric, share * value),
      )
      for share in shares
    ]
    if value
    else [],
  )


def compared_costs(
  runs: Mapping[str, Sequence[Mapping[str, Any]]], protocol: str, metric: str
) -> Costs:
  """When each run reached the quality that all of them do, the best of the
  worst one; no rows if one was never validated."""
  values = [best(records, protocol, metric) for records in runs.values()]
  return Costs(
    f'{protocol}/{metric}',
    [
      (name, min(values), until(records, protocol, metric, min(values)))
      for name, records in runs.items()
    ]
    if all(values)
    else [],
  )


def best(
  records: Iterable[Mapping[str, Any]], protocol: str, metric: str
) -> float:
  """The largest value of a validation metric; 0 without any."""
  found = (r.get('val', {}).get(protocol, {}).get(metric, 0.0) for r in records)
  return max(found, default=0.0)


def curve(
  records: Iterable[Mapping[str, Any]], protocol: str, metric: str
) -> list[tuple[Traffic, float]]:
  """(What it had cost by then, the validation metric) of each validation.

  Args:
    records: lines of `metrics.jsonl`, from round 1 on, with what they cost.
    protocol, metric: which.
  """
  found, total = [], NOTHING
  for record in records:
    total += Traffic(**record['communication'])
    value = record.get('val', {}).get(protocol, {}).get(metric)
    if value is not None:
      found.append((total, value))
  return found


def until(
  records: Iterable[Mapping[str, Any]], protocol: str, metric: str, value: float
) -> Reached | None:
  """When a validation metric reached a value; None if it never did, or if what
  it cost was not recorded.

  Args:
    records: lines of `metrics.jsonl`, from round 1 on.
    protocol, metric: what counts.
    value: to reach.
  """
  total = NOTHING
  for record in records:
    if 'communication' not in record:
      return None
    total += Traffic(**record['communication'])
    if record.get('val', {}).get(protocol, {}).get(metric, -1.0) >= value:
      return Reached(record['round'], total)
  return None
