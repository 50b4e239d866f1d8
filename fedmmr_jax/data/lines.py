"""What a line of an interaction file means: the options of `dataset`.

Without any, every line is an interaction, whatever its rating (implicit
feedback). Some lines can be dislikes, or nothing; some can count more than
others; and each session of a user can be a client.
"""

import numpy as np

from fedmmr_jax.config import EVENT, KEEP, Lines, PART, RATING
from fedmmr_jax.data import columns, split
from fedmmr_jax.data.interactions import Interactions
from fedmmr_jax.errors import UserError

_SHOWN = 12  # names of events in an error


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
    return columns.parse_number(text)
  except ValueError:
    return np.nan


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
