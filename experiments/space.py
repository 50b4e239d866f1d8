"""Search-space files: what `experiments.sweep` varies.

A line has a flag, and in its value one or more of

    uniform(0,0.5)           a number
    log(1e-4,1e-2)           a number, drawn on a logarithmic scale
    int(1,4)                 a whole number, both ends included
    choice(100,200,400)      one of these; with | between them, as in
                             choice(none | visual,semantic), they may contain
                             commas

The rest of the value stays as it is, so an option of a part can vary:
`--router=item,hidden_dim=choice(32,64)`. `#` starts a comment.
"""

import dataclasses
import math
import pathlib
import re
from typing import Any, Mapping

from fedmmr_jax.config import RunConfig
from fedmmr_jax.errors import UserError

_DISTRIBUTION = re.compile(r'(\w*)\(([^()]*)\)')
KINDS = ('uniform', 'log', 'int', 'choice')
# The settings of the data that leave the validation what it is.
_MAY_VARY = ('item_file', 'visual_features', 'text_features')


@dataclasses.dataclass(frozen=True)
class Varied:
  """What stands in a value instead of one number or word.

  Attributes:
    name: the flag, or flag.option.
    kind: one of KINDS.
    words: the choices, or the two ends.
  """

  name: str
  kind: str
  words: tuple[str, ...]

  @property
  def checked(self) -> tuple[str, ...]:
    """The choices; or the ends and, of numbers that are drawn, one between them
    that is not whole if it can be."""
    if self.kind not in ('uniform', 'log'):
      return self.words
    low, high = map(float, self.words)
    return (*self.words, f'{(low + min(high, low + 1)) / 2:.4g}')

  def suggest(self, trial: Any) -> str:
    """What an Optuna trial tries, as it is written in a flag: numbers have
    four digits, and so they are trained with."""
    if self.kind == 'choice':
      return trial.suggest_categorical(self.name, self.words)
    low, high = map(float, self.words)
    if self.kind == 'int':
      return str(trial.suggest_int(self.name, int(low), int(high)))
    number = trial.suggest_float(self.name, low, high, log=self.kind == 'log')
    return f'{number:.4g}'


@dataclasses.dataclass(frozen=True)
class Line:
  """One line of a space.

  Attributes:
    flag: its name.
    text: the line.
    pieces: of the value, those that are fixed and those that vary.
  """

  flag: str
  text: str
  pieces: tuple[str | Varied, ...]

  @property
  def varied(self) -> list[Varied]:
    return [piece for piece in self.pieces if isinstance(piece, Varied)]

  def value(self, words: Mapping[str, str]) -> str:
    """The flag's value, with the given word for each name that varies."""
    return ''.join(
      words[piece.name] if isinstance(piece, Varied) else piece
      for piece in self.pieces
    )


@dataclasses.dataclass(frozen=True)
class Space:
  """What a sweep varies.

  Attributes:
    lines: one per flag.
  """

  lines: tuple[Line, ...]

  @property
  def varied(self) -> list[Varied]:
    return [varied for line in self.lines for varied in line.varied]

  def suggest(self, trial: Any) -> dict[str, str]:
    """Flag -> value that an Optuna trial tries."""
    words = {varied.name: varied.suggest(trial) for varied in self.varied}
    return {line.flag: line.value(words) for line in self.lines}


def read(path: pathlib.Path, base: RunConfig) -> Space:
  """Parses a search-space file.

  Args:
    path: of the file.
    base: the settings of which the space varies some.

  Raises:
    UserError: it cannot be read, a line is malformed, there is no such flag, or
      an end or a choice is no value of it.
  """
  try:
    lines = path.read_text('utf-8').splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{path}: cannot be read ({error})') from None
  found: dict[str, Line] = {}
  for number, text in enumerate(lines, 1):
    text = text.split('#')[0].strip()
    if not text:
      continue
    place = f'{path}, line {number}'
    line = _parse(text, place)
    if line.flag in found:
      raise UserError(f'{place}: --{line.flag} comes twice')
    _check(line, place, base)
    found[line.flag] = line
  if not found:
    raise UserError(
      f'{path}: nothing varies; a line is --flag=distribution, as in '
      '--dropout=uniform(0,0.5)'
    )
  return Space(tuple(found.values()))


def _parse(text: str, place: str) -> Line:
  match = re.fullmatch(r'--(\w+)=(.*)', text)
  if not match:
    raise UserError(f'{place}: {text!r} is not --flag=distribution')
  flag, value = match.groups()
  pieces: list[str | Varied] = []
  end = 0
  for found in _DISTRIBUTION.finditer(value):
    before = value[end : found.start()]
    pieces += [before] if before else []
    option = re.search(r'(\w+)=$', before)
    name = f'{flag}.{option[1]}' if option else flag
    pieces.append(_varied(name, found[1], found[2], place))
    end = found.end()
  pieces += [value[end:]] if value[end:] else []
  line = Line(flag, text, tuple(pieces))
  names = [varied.name for varied in line.varied]
  if not names:
    raise UserError(
      f'{place}: nothing varies in {text!r}; one of {", ".join(KINDS)}, as in '
      'uniform(0,0.5), or give the flag on the command line'
    )
  if len(set(names)) < len(names):
    raise UserError(f'{place}: in {text!r} an option varies twice')
  return line


def _varied(name: str, kind: str, inside: str, place: str) -> Varied:
  told = f'{place}: {kind}({inside})'
  if kind not in KINDS:
    raise UserError(f'{told}: no such distribution; one of {", ".join(KINDS)}')
  words = tuple(
    word.strip() for word in inside.split('|' if '|' in inside else ',')
  )
  if kind == 'choice':
    if '' in words or len(set(words)) < max(2, len(words)):
      raise UserError(f'{told}: name two or more different choices')
    return Varied(name, kind, words)
  try:
    low, high = map(int if kind == 'int' else float, words)
  except ValueError:
    raise UserError(
      f'{told}: not two {"whole " if kind == "int" else ""}numbers with a '
      'comma between them'
    ) from None
  if not (math.isfinite(low) and math.isfinite(high) and low < high):
    raise UserError(f'{told}: the first number has to be below the second')
  if kind == 'log' and low <= 0:
    raise UserError(f'{told}: the numbers of log have to be above 0')
  return Varied(name, kind, words)


def _check(line: Line, place: str, base: RunConfig) -> None:
  """Raises UserError if the flag may not vary, or an end, a choice or a number
  between the ends is no value of it."""
  if line.flag == 'seed':
    raise UserError(f'{place}: --seed is no setting to choose; see --seeds')
  compared = {*vars(base.evaluation), *vars(base.data)} - set(_MAY_VARY)
  if line.flag in compared:
    raise UserError(
      f'{place}: --{line.flag} is about how trials are compared, and the same '
      'for all of them; give it on the command line'
    )
  first = {varied.name: varied.words[0] for varied in line.varied}
  for varied in line.varied:
    for word in varied.checked:
      value = line.value(first | {varied.name: word})
      try:
        base.changed({line.flag: value}).validate()
      except UserError as error:
        raise UserError(f'{place}: {error}') from None
