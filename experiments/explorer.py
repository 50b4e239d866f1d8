"""What the page of `explore.py` asks: JSON in, JSON out, and no HTTP.

Ids come and go as text, as they stand in the data set.
"""

import pathlib
import random
import threading
import time
from typing import Any, Mapping, Sequence

import numpy as np

from fedmmr_jax.data import extraction
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import explanation, recommendation
from fedmmr_jax.evaluation.explanation import Recall
from fedmmr_jax.evaluation.recommendation import People, Reasons
from fedmmr_jax.federation.round import FederationState
from fedmmr_jax.simulation import Simulation

MOST = 100  # items of a list
LONGEST = 20_000  # history
USUAL = 10  # items of a list, and what the first one compiles
FOUND = 20  # answers to a search
REASONS = 3  # of each kind
SIMILAR = 6
_LEAST_EFFECT = 0.005  # on a score: less is 0.00 on the page


class Unknown(UserError):
  """A user, an item or a page that does not exist."""


class Explorer:
  """A round of a run, ready to be asked.

  Args:
    simulation: the run.
    state: the round.
    texts: item id -> what is known about it besides its title.
    images: item id -> its picture.
  """

  def __init__(
    self,
    simulation: Simulation,
    state: FederationState,
    texts: Mapping[str, str] | None = None,
    images: Mapping[str, pathlib.Path] | None = None,
  ):
    self._simulation = simulation
    self._state = state
    dataset = simulation.dataset
    self._ids = [str(item) for item in dataset.item_ids.tolist()]
    self._titles = dataset.titles or ('',) * len(self._ids)
    self._texts = texts or {}
    self._rows = {item: row for row, item in enumerate(self._ids) if row}
    self._images = {
      item: path for item, path in (images or {}).items() if item in self._rows
    }
    self._folded = [title.casefold() for title in self._titles]
    # Of several items of one title, the first.
    self._by_title = {
      title: row
      for row, title in reversed(list(enumerate(self._folded)))
      if row and title
    }
    self._users = [str(user) for user in dataset.user_ids.tolist()]
    self._clients = {user: k for k, user in enumerate(self._users)}
    self._one_at_a_time = threading.Lock()

  @property
  def num_images(self) -> int:
    return len(self._images)

  def warm_up(self) -> None:
    """Compiles what the first answer needs, for a user and for a stranger."""
    self.explain({'user': self._users[0]})
    self.explain({'history': self._ids[1:2]})

  def users(self, text: str) -> list[str]:
    """Some users whose ids begin with a text; of '' one at random."""
    if not text:
      return [random.choice(self._users)]
    found = [user for user in self._users if user.startswith(text)]
    return sorted(found, key=len)[:FOUND]

  def items(self, text: str) -> list[dict[str, Any]]:
    """Some items whose title has a text within, or of that id."""
    wanted = text.strip().casefold()
    if not wanted:
      return []
    found = [row for row, title in enumerate(self._folded) if wanted in title]
    # What begins with it first, then what is short.
    found.sort(
      key=lambda row: (
        not self._folded[row].startswith(wanted),
        len(self._folded[row]),
      )
    )
    exact = self._rows.get(text.strip())
    rows = ([exact] if exact else []) + [row for row in found if row != exact]
    return [self._item(row) for row in rows[:FOUND]]

  def similar(self, item: str) -> list[dict[str, Any]]:
    """The items most like one.

    Raises:
      Unknown: no such item.
    """
    with self._one_at_a_time:
      rows, cosines = recommendation.similar_items(
        self._simulation, self._state, self._row(item), SIMILAR
      )
    return [
      {**self._item(row), 'cosine': float(cosine)}
      for row, cosine in zip(rows, cosines)
    ]

  def image(self, item: str) -> pathlib.Path:
    """The picture of an item.

    Raises:
      Unknown: it has none.
    """
    if item not in self._images:
      raise Unknown(f'there is no picture of an item {item!r}')
    return self._images[item]

  def explain(self, asked: Any) -> dict[str, Any]:
    """Recommendations with everything they come from.

    Args:
      asked: `user`, or `history` (ids or whole titles in time order), or both:
        what the user would get with another history; `k`; `repeats`.

    Raises:
      UserError: something else.
      Unknown: no such user, or none of the items.
    """
    started = time.perf_counter()
    if not isinstance(asked, dict):
      raise UserError('ask with a JSON object, as in {"user": "17"}')
    extra = set(asked) - {'user', 'history', 'k', 'repeats'}
    if extra:
      raise UserError(
        f'{", ".join(sorted(extra))[:80]}: say user, history, k, repeats'
      )
    client = None
    if asked.get('user') is not None:
      client = self._client(_id(asked['user'], 'user'))
    history, left_out = self._history(asked.get('history'), client)
    count = self._count(asked.get('k', USUAL))
    repeats = asked.get('repeats', False)
    if not isinstance(repeats, bool):
      raise UserError('repeats: say true or false')
    simulation = self._simulation
    own = client is not None and np.array_equal(
      history, simulation.dataset.sequence(client)
    )
    person = (
      People.of_clients(simulation, [client])
      if own
      else People.of_histories(simulation, [history])
    )
    with self._one_at_a_time:
      found = explanation.explain(
        simulation, self._state, person, self._compiled(count), repeats
      )
    return {
      'user': None if client is None else self._users[client],
      'own_history': own,
      'history': [self._item(row) for row in history],
      'left_out': left_out,
      'window': self._window(found.reasons),
      'memory': self._memory(found.recall),
      'experts': [m.name for m in simulation.model.modalities],
      'recommendations': [
        self._recommended(found, place, row, score)
        for place, (row, score) in enumerate(
          zip(found.lists.rows[0][:count], found.lists.scores[0])
        )
        if row
      ],
      'milliseconds': round(1e3 * (time.perf_counter() - started)),
    }

  def _recommended(
    self, found: explanation.Explanation, place: int, row: int, score: float
  ) -> dict[str, Any]:
    weights = {}
    if found.recall:
      names = [m.name for m in self._simulation.model.modalities]
      weights = dict(zip(names, found.recall.weights[place].tolist()))
    return {
      **self._item(row),
      'score': float(score),
      'weights': weights,
      'why': {
        name: self._why(found.reasons, name, place)
        for name in found.reasons.items
      },
    }

  def _why(self, found: Reasons, name: str, place: int) -> list[dict]:
    """What one kind of thing adds most to a score."""
    items, effects = found.items[name][0], found.effects[name][0, :, place]
    best = np.argsort(-effects, kind='stable')[:REASONS]
    return [
      {**self._named(items[at]), 'effect': float(effects[at])}
      for at in best
      if items[at] and effects[at] >= _LEAST_EFFECT
    ]

  def _window(self, found: Reasons) -> int:
    """How many items at the end of the history the backbone reads."""
    return int((found.items[recommendation.WINDOW][0] > 0).sum())

  def _memory(self, recall: Recall | None) -> dict[str, Any] | None:
    """A memory, what is read first, then by utility; None without experts."""
    if recall is None:
      return None
    memory, read = recall.memory, recall.retrieved.tolist()
    utility = recall.utility
    value = memory.last_update if utility is None else utility
    slots = [slot for slot in np.argsort(-value, kind='stable')]
    slots = [slot for slot in slots if memory.item[slot]]
    slots.sort(key=lambda slot: memory.item[slot] not in read)
    return {
      'slots': len(memory.item),
      'clock': int(memory.clock),
      'entries': [
        {
          **self._item(memory.item[slot]),
          'age': int(memory.clock - memory.last_update[slot]),
          'frequency': int(memory.frequency[slot]),
          'surprise': float(memory.surprise[slot]),
          'utility': None if utility is None else float(utility[slot]),
          'read': memory.item[slot] in read,
        }
        for slot in slots
      ],
    }

  def _named(self, row: int) -> dict[str, Any]:
    return {'id': self._ids[row], 'title': self._titles[row]}

  def _item(self, row: int) -> dict[str, Any]:
    item = self._ids[row]
    return {
      **self._named(row),
      'text': self._texts.get(item, ''),
      'image': item in self._images,
    }

  def _row(self, item: str) -> int:
    if item not in self._rows:
      raise Unknown(f'the run has no item {item[:80]!r}')
    return self._rows[item]

  def _client(self, user: str) -> int:
    if user not in self._clients:
      raise Unknown(
        f'the run has no user {user[:80]!r}; ids go from {self._users[0]} to '
        f'{self._users[-1]}'
      )
    return self._clients[user]

  def _history(
    self, given: Any, client: int | None
  ) -> tuple[np.ndarray, list[str]]:
    """(Rows of a history, what of it the run does not know)."""
    if given is None:
      if client is None:
        raise UserError('name a user, or give a history')
      return self._simulation.dataset.sequence(client), []
    if not isinstance(given, list):
      raise UserError('history: give a list of item ids')
    if not given:
      raise UserError('the history is empty; add an item')
    if len(given) > LONGEST:
      raise UserError(f'history: {len(given)} items; {LONGEST} at most')
    wanted = [_id(item, 'item').strip() for item in given]
    rows = [
      self._rows.get(item) or self._by_title.get(item.casefold())
      for item in wanted
    ]
    unknown = [item[:80] for item, row in zip(wanted, rows) if not row]
    known = [row for row in rows if row]
    if not known:
      raise Unknown(
        f'the run knows none of these {len(wanted)} items '
        f'({_some(unknown)}); write ids of its data set, or whole titles'
      )
    return np.array(known, np.int32), unknown

  def _count(self, asked: Any) -> int:
    items = len(self._ids) - 1
    if not isinstance(asked, int) or isinstance(asked, bool):
      raise UserError(f'k: say a whole number, 1 to {min(MOST, items)}')
    if not 1 <= asked <= min(MOST, items):
      raise UserError(
        f'k={str(asked)[:12]}: say 1 to {min(MOST, items)}; the catalogue has '
        f'{items} items'
      )
    return asked

  def _compiled(self, count: int) -> int:
    """The length that is computed: a program serves many."""
    length = USUAL
    while length < count:
      length *= 2
    return min(length, len(self._ids) - 1)


def _id(given: Any, what: str) -> str:
  """An id, which JSON may have as text or as a whole number."""
  if isinstance(given, bool) or not isinstance(given, (str, int)):
    raise UserError(f'{what}: an id is a text or a whole number')
  try:
    return str(given)
  except ValueError:  # a number of thousands of digits
    raise UserError(f'{what}: no id is that long') from None


def _some(texts: Sequence[str]) -> str:
  return ', '.join(texts[:5]) + (', …' if texts[5:] else '')


def find_images(
  folder: str, data_dir: str
) -> tuple[pathlib.Path | None, dict[str, pathlib.Path]]:
  """(The folder of pictures, item id -> its picture).

  Args:
    folder: its name; '' = `images` or `posters` in the data folder, if there.
    data_dir: the data folder.

  Raises:
    UserError: no such folder.
  """
  data = pathlib.Path(data_dir)
  places = [data / 'images', data / 'posters']
  path = pathlib.Path(folder) if folder else None
  if path is None:
    path = next((place for place in places if place.is_dir()), None)
  if path is None:
    return None, {}
  # A link out of the folder is none of its pictures.
  inside = path.resolve()
  return path, {
    item: image
    for item, image in extraction.find_images(path).items()
    if image.resolve().is_relative_to(inside)
  }
