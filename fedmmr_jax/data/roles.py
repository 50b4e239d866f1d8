"""Which column of a file is which: by the names that are given, or by the usual
ones, never by a guess."""

import re
from typing import Any, Mapping, NamedTuple, Sequence

from fedmmr_jax.config import Lines
from fedmmr_jax.errors import UserError

NONE = 'none'
# Names that a column goes by, compared without case.
ALIASES = {
  'user': (
    'user_id',
    'userid',
    'user',
    'uid',
    'username',
    'reviewerid',
    'customer_id',
    'session_id',
  ),
  'item': (
    'item_id',
    'itemid',
    'item',
    'iid',
    'movieid',
    'movie_id',
    'parent_asin',
    'asin',
    'product_id',
    'article_id',
    'news_id',
    'business_id',
  ),
  'time': ('timestamp', 'time', 'unixreviewtime', 'datetime', 'date', 'ts'),
  'rating': ('rating', 'stars', 'overall', 'score'),
  'event': (
    'event',
    'event_type',
    'event_name',
    'behavior_type',
    'behavior',
    'behaviour',
    'action',
    'interaction_type',
  ),
  'part': ('x_label', 'split', 'part', 'set'),
}
# Words of a column's name by which it may hold times.
_TIME_WORDS = set(
  'time date datetime timestamp stamp at dt dat ts when day created modified '
  'updated added published watched'.split()
)
# Columns that hold the items before a line's own.
_HISTORY = re.compile(r'(history|.*_list)', re.IGNORECASE)
_DATE = re.compile(r'[0-9]{4}-[0-9]{2}-[0-9]{2}([T ].*)?')


class Roles(NamedTuple):
  """Names of the columns that are read.

  Attributes:
    user, item: those of the ids.
    time: that of the times; '' = none.
    further: what else is read (`Lines.further`) -> its column.
    unread: lists of earlier items, which nothing reads.
  """

  user: str
  item: str
  time: str
  further: Mapping[str, str] = {}
  unread: tuple[str, ...] = ()

  @property
  def columns(self) -> list[str]:
    """All of them, each once."""
    named = (self.user, self.item, self.time, *self.further.values())
    return list(dict.fromkeys(name for name in named if name))

  def __str__(self) -> str:
    told = [f'{self.user} = users', f'{self.item} = items']
    told += [f'{self.time} = times'] if self.time else []
    told += [f'{name} = {what}s' for what, name in self.further.items()]
    return ', '.join(told)

  @property
  def notes(self) -> tuple[str, ...]:
    """Which is whose, for people to check."""
    notes = [f'columns    {self}']
    if self.unread:
      notes.append(
        f'columns    {", ".join(self.unread)}: not read; a history is what the '
        "user's other lines hold"
      )
    return tuple(notes)


def pick(fields: Sequence[str], lines: Lines, what: str) -> str:
  """The column that holds `what`, a key of ALIASES; '' if none."""
  asked = getattr(lines, what)
  if asked and asked != _usual(what):
    return asked if asked in fields else ''
  by_name: dict[str, str] = {}
  for field in fields:  # of two that differ in case, the one before
    by_name.setdefault(field.partition(':')[0].lower().replace(' ', '_'), field)
  return next((by_name[a] for a in ALIASES[what] if a in by_name), '')


def _usual(what: str) -> str:
  """How one of the usual names is asked for where '' asks for none."""
  return 'auto' if what == 'part' else ''


def pick_all(
  fields: Sequence[str],
  lines: Lines,
  where: str,
  examples: Mapping[str, Sequence[Any]] = {},
) -> Roles:
  """All columns that are read.

  Args:
    fields: names of all columns.
    lines: those that are given, and what is read.
    where: the file, for errors.
    examples: some values of each column.

  Raises:
    UserError: a column that is named, or one of ids, is missing, or none has
      a usual name of times while one looks as if it held them.
  """
  picked = {}
  for what in ('user', 'item', 'time', *lines.further):
    asked = getattr(lines, what)
    if what == 'time' and asked == NONE:
      picked[what] = ''
      continue
    picked[what] = pick(fields, lines, what)
    if not picked[what] and (asked or what != 'time'):
      named = asked if asked != _usual(what) else ''
      raise UserError(
        f'{where}: no column '
        + (named or f'of the {what}s')
        + ' among '
        + ', '.join(fields)
        + f'; name it, as in `dataset=auto,{what}=…`'
      )
  user, item, time = (picked.pop(what) for what in ('user', 'item', 'time'))
  if len({user, item, time}) < 3:
    raise UserError(
      f'{where}: users {user}, items {item} and times {time or "-"} must be '
      'different columns'
    )
  alike = [
    field
    for field in fields
    if field not in (user, item, *picked.values())
    and _may_be_time(field, examples.get(field, ()))
  ]
  if lines.time != NONE and not time and alike:
    raise UserError(
      f'{where}: no column has a usual name of times '
      f'({", ".join(ALIASES["time"])}), but {" and ".join(alike)} may hold '
      f'some; say `dataset=auto,time={alike[0]}`, or time=none if the order '
      'of the file is the order in time'
    )
  unread = tuple(f for f in fields if _HISTORY.fullmatch(f))
  return Roles(user, item, time, picked, unread)


def _may_be_time(name: str, values: Sequence[Any]) -> bool:
  """Whether a column may hold times, by the words of its name or by dates."""
  words = re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', name.partition(':')[0])
  if _TIME_WORDS & set(re.split(r'[^a-z0-9]+', words.lower())):
    return True
  return bool(values) and all(_DATE.fullmatch(str(x).strip()) for x in values)
