"""`behaviors.tsv` of MIND, the Microsoft News Dataset (Wu et al. 2020, "MIND: A
Large-scale Dataset for News Recommendation").

A line is an impression: number, user, time, the user's earlier clicks, and the
news that were shown, each with 1 if it was clicked. The earlier clicks have no
times and are alike on all lines of a user: they are taken once, before the
first impression. What was shown and not clicked is no interaction.
"""

import datetime
import pathlib
import re

from fedmmr_jax.config import Lines
from fedmmr_jax.data import delimited, text_files
from fedmmr_jax.data.delimited import Numbering
from fedmmr_jax.data.interactions import Interactions
from fedmmr_jax.errors import UserError

_FIELDS = 5
_TIME = '%m/%d/%Y %I:%M:%S %p'
_SHAPE = re.compile(
  r'[^\t]*\t[^\t]+\t\d+/\d+/\d{4} \d+:\d\d:\d\d [AP]M\t[^\t]*\t[^\t]*'
)


def is_behaviors(line: str) -> bool:
  """Whether a line is of such a file."""
  return bool(_SHAPE.fullmatch(line))


def read(path: pathlib.Path, lines: Lines) -> Interactions:
  """Histories and clicks, in the order of time.

  Raises:
    UserError: a malformed line (named), or no click in all of them.
  """
  del lines
  histories: dict[str, tuple[float, list[str]]] = {}
  clicks: list[tuple[float, str, str]] = []
  for number, line in text_files.lines(path):
    fields = text_files.decode(line, path, number).split('\t')

    def wrong(what):
      raise UserError(
        f'{path}, line {number}: {what}; expected <impression> <user> <time> '
        '<earlier clicks> <news shown>, between tabs'
      )

    if len(fields) != _FIELDS:
      wrong(f'{len(fields)} fields instead of {_FIELDS}')
    _, user, when, earlier, shown = fields
    if not user.strip():
      wrong('no user')
    try:
      time = datetime.datetime.strptime(when.strip(), _TIME)
    except ValueError:
      wrong(f'{when[:30]!r} is no time as in 11/15/2019 8:55:22 AM')
    seconds = time.replace(tzinfo=datetime.timezone.utc).timestamp()
    first, known = histories.get(user, (seconds, []))
    histories[user] = (min(first, seconds), known or earlier.split())
    for word in shown.split():
      news, dash, clicked = word.rpartition('-')
      if not dash or clicked not in ('0', '1'):
        wrong(f'{word[:30]!r} is no news with -0 or -1 behind')
      if clicked == '1':
        clicks.append((seconds, user, news))
  users, items = Numbering(), Numbering()
  rows = [
    (seconds, user, news)
    for user, (seconds, known) in histories.items()
    for news in known
  ] + sorted(clicks, key=lambda click: click[0])
  if not rows:
    raise UserError(f'{path}: nobody clicked on anything')
  found = delimited.from_numbered(
    [users.of(user) for _, user, _ in rows],
    users,
    [items.of(news) for _, _, news in rows],
    items,
    [seconds for seconds, _, _ in rows],
    whole=False,
    dates=True,
  )
  told = len(rows) - len(clicks)
  return found._replace(
    notes=(
      f'columns    {len(clicks)} clicks, and {told} earlier ones of the '
      "users' histories, whose times are not known: before all others",
    )
  )
