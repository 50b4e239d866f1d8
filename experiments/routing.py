"""How much the router weights each expert, in numbers and in words."""

from typing import Any, Sequence

import numpy as np

from experiments import console
from fedmmr_jax import metrics

_ENDS = ('most', 'least')  # of a weight
_BINS = 10  # of a histogram


def summary(
  weights: np.ndarray,
  experts: Sequence[str],
  ids: Sequence[Any],
  titles: Sequence[str],
  count: int,
) -> dict[str, Any]:
  """Statistics of the router weights over the items where it has a choice.

  Args:
    weights: [V, E] of the items, 0 where an expert has no input.
    experts: E names.
    ids: [V] of the items in the source.
    titles: [V], or none.
    count: how many items to list at each end.
  """
  has_choice = (weights > 0).sum(axis=1) > 1
  content: dict[str, Any] = {
    'items': len(weights),
    'with_choice': int(has_choice.sum()),
    'experts': list(experts),
  }
  for expert, column in zip(experts, weights.T):
    rows = np.flatnonzero(has_choice & (column > 0))
    counts, edges = np.histogram(column[rows], bins=_BINS, range=(0.0, 1.0))
    order = rows[np.argsort(-column[rows], kind='stable')]
    name = metrics.ROUTER_WEIGHT + expert
    content |= {
      f'mean_{expert}': float(column[rows].mean()) if len(rows) else None,
      f'histogram_{expert}': [
        {'from': float(a), 'to': float(b), 'items': int(n)}
        for a, b, n in zip(edges, edges[1:], counts)
      ],
      name: {str(ids[row]): float(column[row]) for row in rows},
    }
    for end, some in zip(_ENDS, (order, order[::-1])):
      content[f'{end}_{expert}'] = [
        {
          'item_id': ids[row],
          name: float(column[row]),
          'title': titles[row] if titles else '',
        }
        for row in some[:count]
      ]
  return content


def text(content: dict[str, Any]) -> str:
  """A summary for people."""
  experts = content['experts']
  means = ', '.join(f'{e} {_number(content[f"mean_{e}"])}' for e in experts)
  lines = [
    f'for {content["with_choice"]} of '
    f'{content["items"]} items several experts have an input; mean weight '
    f'there: {means}'
  ]
  # What one of two experts has not, the other has.
  shown, ends = (
    (experts[:1], ['most']) if len(experts) == 2 else (experts, _ENDS)
  )
  for expert in shown:
    bins = content[f'histogram_{expert}']
    most = max([b['items'] for b in bins] + [1])
    bars = [
      [
        f'{b["from"]:.1f} to {b["to"]:.1f}',
        b['items'],
        ('█' * round(40 * b['items'] / most)).ljust(1),
      ]
      for b in bins
    ]
    lines += ['', console.table([f'{expert} weight', 'items', ''], bars)]
  for expert in experts:
    for end in ends:
      rows = [
        [
          e['item_id'],
          f'{e[metrics.ROUTER_WEIGHT + expert]:.4f}',
          e['title'].ljust(1),
        ]
        for e in content[f'{end}_{expert}']
      ]
      lines += [
        '',
        f'{end} {expert}',
        console.table(['item', f'{expert} weight', 'title'], rows),
      ]
  return '\n'.join(lines)


def _number(value: float | None) -> str:
  return '-' if value is None else f'{value:.4f}'
