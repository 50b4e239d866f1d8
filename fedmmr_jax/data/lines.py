"""What a line of an interaction file means: the options of `dataset`.

Without any, every line is an interaction, whatever its rating (implicit
feedback). Some lines can be dislikes, or nothing; some can count more than
others; and each session of a user can be a client.
"""

import dataclasses
import re

import numpy as np

from fedmmr_jax.data import split
from fedmmr_jax.data.interactions import Interactions
from fedmmr_jax.errors import UserError

RATING, EVENT, PART = 'rating', 'event', 'part'
KEEP, DROP = 'keep', 'drop'
_SECONDS = {'': 1, 's': 1, 'm': 60, 'h': 3600, 'd': 86_400}
_GAP = re.compile(r'([0-9]+(?:\.[0-9]+)?)([smhd]?)')
_SHOWN = 12  # names of events in an error


def _option(default: str, help: str, *choices: str):
  bounds = {'choices': choices} if choices else {}
  return dataclasses.field(default=default, metadata={'help': help, **bounds})


@dataclasses.dataclass(frozen=True)
class Lines:
  """Options of a format: which column is whose, and which lines count.

  The name of a column is '' for one of the usual ones (`roles.ALIASES`). In a
  file without a header, names are positions, from 1.
  """

  user: str = _option('', 'column of the users')
  item: str = _option('', 'column of the items')
  time: str = _option(
    '', 'column of the times; none: the order of lines counts'
  )
  rating: str = _option('', 'column of the ratings, for the next two')
  min_rating: str = _option('', 'what is rated lower is no interaction')
  dislikes: str = _option(
    '',
    'what is rated so or lower is a dislike: a negative of its client alone, '
    'and no candidate for it',
  )
  event: str = _option('', 'column of what happened, for the next one')
  events: str = _option(
    '',
    'which of these count, as in cart|purchase, or with their weights in the '
    'loss, as in view:0.2|purchase:1',
  )
  part: str = _option('', 'column of the part of a line, with `split_by=given`')
  duplicates: str = _option(
    KEEP, 'lines of the same user, item and time', KEEP, DROP
  )
  repeats: str = _option(
    KEEP, 'further interactions of a user with the same item', KEEP, DROP
  )
  session_gap: str = _option(
    '',
    'a longer pause begins a new session, and each session is a client; in '
    'seconds, or as in 30m, 2h, 1d',
  )

  def __post_init__(self):
    if (
      self.least_rating is not None
      and self.greatest_dislike is not None
      and self.greatest_dislike >= self.least_rating
    ):
      raise ValueError('dislikes is not below min_rating')
    _ = self.weights, self.gap  # refused here, not after minutes of reading

  @property
  def least_rating(self) -> float | None:
    """Of an interaction; None = any."""
    return _number('min_rating', self.min_rating)

  @property
  def greatest_dislike(self) -> float | None:
    """Rating of a dislike; None = there are none."""
    return _number('dislikes', self.dislikes)

  @property
  def weights(self) -> dict[str, float]:
    """Event that counts -> its weight."""
    found = {}
    for word in filter(None, self.events.split('|')):
      name, colon, weight = word.rpartition(':')
      found[(name if colon else weight).strip()] = (
        _number('events', weight) if colon else 1.0
      )
    if any(not name or not weight for name, weight in found.items()):
      raise ValueError('events is not a list as in view:0.2|purchase:1')
    return found

  @property
  def gap(self) -> float | None:
    """Seconds of a pause between sessions; None = no sessions."""
    if not self.session_gap:
      return None
    match = _GAP.fullmatch(self.session_gap)
    if not match or not float(match[1]):
      raise ValueError('session_gap is no duration as in 30m')
    return float(match[1]) * _SECONDS[match[2]]

  @property
  def further(self) -> tuple[str, ...]:
    """What is read of each line beside user, item and time."""
    wanted = []
    if self.min_rating or self.dislikes:
      wanted.append(RATING)
    if self.events:
      wanted.append(EVENT)
    if self.part:
      wanted.append(PART)
    return tuple(wanted)

  @property
  def names_columns(self) -> bool:
    """Whether a column is called by its name."""
    return any((self.user, self.item, self.time, self.rating, self.event))


def _number(option: str, text: str) -> float | None:
  if not text:
    return None
  value = float(text) if re.fullmatch(r'[-+.\deE]+', text) else np.nan
  if not np.isfinite(value) or (option == 'events' and value <= 0):
    raise ValueError(f'{option}={text} is not a number')
  return value


def apply(found: Interactions, lines: Lines, place: str) -> Interactions:
  """Interactions by what their lines mean.

  Args:
    found: one of each line, with `columns`.
    lines: what the options say.
    place: the file, for errors.

  Raises:
    UserError: a rating that is no number, an event that no line has, options
      that need times where there are none, or no line is left.
  """
  for what in lines.further:
    if what == PART and what not in found.columns:
      raise UserError(
        f'{place}: `split_by=given` needs files named train and test, or a '
        'column that says the part of each line; this format has none'
      )
    if what not in found.columns:
      raise UserError(
        f'{place}: this format has no {what}s; leave the options of `dataset` '
        'that need them out'
      )
  for rule in (_by_event, _by_rating, _by_part, _once, _first, _sessions):
    found = rule(found, lines, place)
    if not len(found.users):
      raise UserError(
        f'{place}: no line is left by the options of `dataset`: '
        + '; '.join(note.split(None, 1)[1] for note in found.notes[-1:])
      )
  return found._replace(columns={})


def _note(found: Interactions, about: str, text: str) -> Interactions:
  return found._replace(notes=(*found.notes, f'{about:10} {text}'))


def _by_rating(found: Interactions, lines: Lines, place: str) -> Interactions:
  if RATING not in found.columns:
    return found
  codes, texts = found.columns[RATING]
  values = np.array([_rating(text) for text in texts])
  bad = np.flatnonzero(np.isnan(values)[codes])
  if bad.size:
    raise UserError(
      f'{place}: the rating {texts[codes[bad[0]]]!r} of interaction '
      f'{bad[0] + 1} is no number ({bad.size} such ones); leave these lines '
      'out, or name the column with `dataset=auto,rating=…`'
    )
  ratings = values[codes]
  least, dislike = lines.least_rating, lines.greatest_dislike
  disliked = (
    np.zeros(len(codes), bool) if dislike is None else ratings <= dislike
  )
  liked = ~disliked if least is None else ratings >= least
  told = [f'{liked.sum()} of {len(codes)} lines are interactions']
  if dislike is not None:
    told.append(f'{disliked.sum()} rated {dislike:g} or lower are dislikes')
  left_out = len(codes) - liked.sum() - disliked.sum()
  if left_out:
    told.append(f'{left_out} others are left out')
  kept = found._replace(disliked=disliked if disliked.any() else None)
  return _note(kept.where(liked | disliked), 'ratings', ', '.join(told))


def _rating(text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    return np.nan
  return value if np.isfinite(value) else np.nan


def _by_event(found: Interactions, lines: Lines, place: str) -> Interactions:
  if EVENT not in found.columns:
    return found
  codes, texts = found.columns[EVENT]
  weights = lines.weights
  there = [text.strip() for text in texts]
  missing = [name for name in weights if name not in there]
  if missing:
    shown = ', '.join(there[:_SHOWN]) + (', …' if len(there) > _SHOWN else '')
    raise UserError(
      f'{place}: no line has the event {missing[0]!r}; there are {shown}'
    )
  of_text = np.array([weights.get(text, 0.0) for text in there], np.float32)
  of_line = of_text[codes]
  kept = of_line > 0
  if set(weights.values()) != {1.0}:
    found = found._replace(weights=of_line)
  counts = np.bincount(codes[kept], minlength=len(there))
  told = ', '.join(
    f'{counts[number]} {text}'
    + (f' × {weights[text]:g}' if weights[text] != 1 else '')
    for number, text in enumerate(there)
    if text in weights
  )
  left_out = len(codes) - kept.sum()
  more = f'; {left_out} others are left out' if left_out else ''
  return _note(found.where(kept), 'events', told + more)


def _by_part(found: Interactions, lines: Lines, place: str) -> Interactions:
  if PART not in found.columns:
    return found
  codes, texts = found.columns[PART]
  of_text = [split.part_of(text) for text in texts]
  unknown = [text for text, part in zip(texts, of_text) if part is None]
  if unknown:
    raise UserError(
      f'{place}: {unknown[0]!r} in the column of the parts is none of '
      'train, validation and test (or 0, 1, 2)'
    )
  parts = np.array(of_text, np.int8)[codes]
  if split.TEST not in of_text:
    raise UserError(
      f'{place}: no line is of the test part (test, or 2); the column has '
      + ', '.join(texts[:_SHOWN])
    )
  return found._replace(parts=parts)


def _once(found: Interactions, lines: Lines, place: str) -> Interactions:
  if lines.duplicates == KEEP:
    return found
  if found.times is None:
    raise UserError(
      f'{place}: no times, so that nothing tells duplicates from repeats; say '
      'repeats=drop instead of duplicates=drop'
    )
  keys = [found.times, found.items, found.users]
  if found.parts is not None:  # what is trained on stays
    keys.insert(0, found.parts)
  order = np.lexsort(keys)
  same = np.ones(max(len(order) - 1, 0), bool)
  for column in (found.users, found.items, found.times):
    same &= np.diff(column[order]) == 0
  kept = np.ones(len(order), bool)
  kept[order[1:][same]] = False
  return _note(
    found.where(kept), 'duplicates', f'{same.sum()} lines are left out'
  )


def _first(found: Interactions, lines: Lines, place: str) -> Interactions:
  """The first interaction of each user with each item; dislikes stay."""
  if lines.repeats == KEEP:
    return found
  liked = np.arange(len(found.users))
  if found.disliked is not None:
    liked = liked[~found.disliked]
  keys = [x[liked] for x in (found.times, found.parts) if x is not None]
  if keys:  # what is trained on comes first
    liked = liked[np.lexsort(keys)]
  pairs = found.users[liked].astype(np.int64) * len(found.item_ids)
  pairs += found.items[liked]
  _, first = np.unique(pairs, return_index=True)
  kept = np.zeros(len(found.users), bool)
  kept[liked[first]] = True
  if found.disliked is not None:
    kept |= found.disliked
  return _note(
    found.where(kept), 'repeats', f'{(~kept).sum()} lines are left out'
  )


def _sessions(found: Interactions, lines: Lines, place: str) -> Interactions:
  if lines.gap is None:
    return found
  if found.times is None:
    raise UserError(f'{place}: no times, and session_gap needs some')
  order = np.lexsort((found.times, found.users))
  users, times = found.users[order], found.times[order]
  new_user = np.diff(users, prepend=-1) > 0
  begins = new_user | (np.diff(times, prepend=times[:1]) > lines.gap)
  session = np.cumsum(begins) - 1
  first = np.maximum.accumulate(np.where(new_user, session, 0))
  starts = np.flatnonzero(begins)
  names = np.array(
    [
      f'{found.user_ids[user]}#{number}'
      for user, number in zip(
        users[starts], 1 + session[starts] - first[starts]
      )
    ]
  )
  user_ids, place_of = np.unique(names, return_inverse=True)
  by_line = np.empty(len(order), np.int32)
  by_line[order] = place_of[session]
  return _note(
    found._replace(users=by_line, user_ids=user_ids),
    'sessions',
    f'{new_user.sum()} users have {len(names)} sessions, which are the clients '
    f'({names[0]} …)',
  )
