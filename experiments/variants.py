"""Variants files: what `experiments.ablate` compares.

A variants file has one line per variant, `name: --flag=value --flag=value`;
these flags override those of the command line, and `#` starts a comment.
Differences are relative to the first variant, the baseline. Instead of flags,
or before them, a line may name something that needs no training rounds:

    @popularity   items by their training interactions
    @local_only   every client trains alone for --local_epochs
    @zeroed       the first variant's checkpoints, with all features removed
    @shuffled     the same, with features shuffled between items
    @fine_tuned   the same, trained once more by each client on its own items;
                  flags say how (--local_epochs=3), all others are those of the
                  first variant
"""

import pathlib
import re
from typing import Sequence

from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation.ablation import OTHER_FEATURES, SPECIAL, Variant


def read(path: pathlib.Path) -> list[Variant]:
  """Parses a variants file.

  Raises:
    UserError: it cannot be read, a line is malformed, or a name comes twice.
  """
  try:
    lines = path.read_text('utf-8').splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{path}: cannot be read ({error})') from None
  variants = []
  for number, line in enumerate(lines, 1):
    line = line.split('#')[0].strip()
    if line:
      variants.append(_parse(line, f'{path}, line {number}'))
  names = [v.name for v in variants]
  for name in names:
    if names.count(name) > 1:
      raise UserError(f'{path}: the name {name!r} comes twice')
  if not variants:
    raise UserError(f'{path}: no variant; a line is name: --flag=value …')
  if variants[0].special:
    raise UserError(
      f'{path}: the first variant is the baseline, and must be '
      f'trained by rounds, not {variants[0].special}'
    )
  return variants


def _parse(line: str, place: str) -> Variant:
  name, colon, rest = line.partition(':')
  if not colon or not name.strip():
    raise UserError(f'{place}: {line!r} is not name: --flag=value …')
  special, flags = '', {}
  for word in rest.split():
    match = re.fullmatch(r'--(\w+)=(.*)', word)
    if word in SPECIAL and not special and not flags:
      special = word
    elif match:
      flags[match[1]] = match[2]
    else:
      raise UserError(
        f'{place}: {word!r} is neither --flag=value nor, in front, one of '
        + ', '.join(SPECIAL)
      )
  if flags and special in OTHER_FEATURES:
    raise UserError(
      f'{place}: {special} takes no flags, it is the first '
      'variant with other features'
    )
  return Variant(name.strip(), special, flags)


def seeds(words: Sequence[str]) -> list[int]:
  """The seeds that --seeds names.

  Raises:
    UserError: they are no seeds, or one comes twice.
  """
  text = ','.join(words)
  try:
    found = [int(word) for word in words]
  except ValueError:
    raise UserError(
      f'--seeds={text}: not whole numbers with commas between them'
    ) from None
  if (
    not found
    or len(set(found)) < len(found)
    or min(found) < 0
    or max(found) >= 2**32
  ):
    raise UserError(f'--seeds={text}: name distinct seeds from 0 to 4294967295')
  return found
