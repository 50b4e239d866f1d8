"""The parts of a split that the data come with.

Files are named after them (`x.train.inter`, `test.txt`), their folders, or a
column says it of each line (MMRec's `x_label`).
"""

import re

TRAIN, VALIDATION, TEST = range(3)
PARTS = ('train', 'validation', 'test')
_WORDS = {
  'train': TRAIN,
  'training': TRAIN,
  'valid': VALIDATION,
  'validation': VALIDATION,
  'val': VALIDATION,
  'dev': VALIDATION,
  'test': TEST,
  'testing': TEST,
}
_IN_NAME = re.compile(
  r'(?:^|[./_-])(' + '|'.join(_WORDS) + r')(?=$|[./_-])', re.IGNORECASE
)


def part_of(text: str) -> int | None:
  """The part that a word stands for, or a number from 0, as in MMRec."""
  text = text.strip().lower()
  if re.fullmatch(r'[012](\.0+)?', text):
    return int(text[0])
  return _WORDS.get(text)


def part_of_name(name: str) -> int | None:
  """The part that a file's name, or its folder's, tells."""
  found = {_WORDS[word.lower()] for word in _IN_NAME.findall(name)}
  return found.pop() if len(found) == 1 else None
