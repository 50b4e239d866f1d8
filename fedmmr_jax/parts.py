"""Parts by name: the built-in ones and those of other packages.

A part of this package has a short name, a key in the table of its kind
(`FORMATS`, `AGGREGATORS`, …). A part from outside is named by its import path,
as in `my_package.robust:Median`. Options follow the name; they are the fields
of the part's dataclass: `fedprox,mu=0.01`.
"""

import dataclasses
import importlib
import math
import typing
from typing import Any, Mapping, TypeVar

from fedmmr_jax.errors import UserError

Part = TypeVar('Part')
# What can be written as an option, and how an error calls it.
_TYPES = {
  bool: 'true or false',
  int: 'a whole number',
  float: 'a number',
  str: 'a text',
}
_BOOLEANS = {'true': True, 'false': False, '1': True, '0': False}


def split(text: str) -> tuple[str, dict[str, str]]:
  """Name and options of a part from its text.

  Raises:
    UserError: an option without a value.

  >>> split('two_tier,capacity=20,retrieval_size=5')
  ('two_tier', {'capacity': '20', 'retrieval_size': '5'})
  """
  name, *rest = [word.strip() for word in text.split(',')]
  options = {}
  for word in rest:
    option, equals, value = word.partition('=')
    if not equals:
      raise UserError(f'{text}: {word!r} is not option=value')
    options[option.strip()] = value.strip()
  return name, options


def find(name: str, named: Mapping[str, Part], what: str) -> Part:
  """A part by its name.

  Args:
    name: a key of `named`, or 'module:Thing' of something importable.
    named: this package's own parts of that kind.
    what: the kind, for the error, as in 'aggregator'.

  Raises:
    UserError: there is no part of that name.

  >>> find('mean', {'mean': sum}, 'aggregator')
  <built-in function sum>
  >>> find('math:fsum', {'mean': sum}, 'aggregator')
  <built-in function fsum>
  """
  if name in named:
    return named[name]
  module, colon, thing = name.partition(':')
  if not (colon and module and thing):
    raise UserError(
      f'there is no {what} {name!r}; one of {", ".join(named)}, or your own as '
      'my_package.module:Thing'
    )
  try:
    found: Any = importlib.import_module(module)
  except ImportError as error:
    raise UserError(
      f'{what} {name}: cannot import {module} ({error}); Python '
      'looks where PYTHONPATH says'
    ) from None
  try:
    return getattr(found, thing)
  except AttributeError:
    raise UserError(f'{what} {name}: {module} has no {thing}') from None


def built(
  text: str, named: Mapping[str, Any], kind: type[Part], what: str
) -> Part:
  """A part as it is used: an object of its kind.

  Args:
    text: its name and options, see `split`.
    named: this package's own parts of that kind, see `find`.
    kind: what it has to be an instance of.
    what: the kind, for the error.

  Raises:
    UserError: there is no part of that name, it is of another kind, or it has
      no such option.
  """
  name, given = split(text)
  part = make(find(name, named, what), given, f'{what} {text}')
  if not isinstance(part, kind):
    raise UserError(f'{name} is no {kind.__module__}.{kind.__name__}')
  return part


def make(found: Any, given: Mapping[str, Any], place: str) -> Any:
  """The object of a part that was found; an object is returned unchanged.

  Args:
    found: a class, or an object, which has no options.
    given: options as text, or as values.
    place: what was asked for; error messages start with it.

  Raises:
    UserError: an option is unknown, missing, of another type or out of bounds.
  """
  known = options(found)
  for option in given:
    if option not in known:
      raise UserError(f'{place}: there is no option {option}; {_told(known)}')
  for option, field in known.items():
    if option not in given and _is_required(field):
      raise UserError(
        f'{place}: the option {option} is missing; {_told(known)}'
      )
  if not isinstance(found, type):
    return found
  values = {}
  for option, value in given.items():
    try:
      values[option] = parse(value, type_of(found, option))
    except ValueError as error:
      raise UserError(
        f'{place}: {option}={value} is not {error}; {_told(known)}'
      ) from None
  try:
    part = found(**values)
  except (TypeError, ValueError) as error:  # a check of its own
    raise UserError(f'{place}: {error}; {_told(known)}') from None
  check(part, place)
  return part


def check(part: Any, place: str) -> None:
  """Raises UserError if an option of a part is out of bounds."""
  known = options(type(part))
  for option, field in known.items():
    wrong = fault(field.metadata, getattr(part, option))
    if wrong:
      raise UserError(
        f'{place}: {option}={getattr(part, option)} {wrong}; {_told(known)}'
      )


def options(found: Any) -> dict[str, dataclasses.Field]:
  """Options of a part: fields of a dataclass that can be written as text."""
  if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
    return {}
  return {
    field.name: field
    for field in dataclasses.fields(found)
    if field.init and type_of(found, field.name) in _TYPES
  }


def type_of(found: type, option: str) -> Any:
  """The annotated type of an option."""
  return typing.get_type_hints(found)[option]


def parse(value: Any, kind: type) -> Any:
  """Parses a value of a type; a value that is not text is returned unchanged.

  Raises:
    ValueError: it is of another type; the message names the expected one.

  >>> parse('1e-3', float), parse('true', bool), parse(3, int)
  (0.001, True, 3)
  """
  try:
    if isinstance(value, str):
      return _BOOLEANS[value.lower()] if kind is bool else kind(value)
    if kind is float and type(value) is int:
      return float(value)
  except (ValueError, KeyError):
    raise ValueError(_TYPES[kind]) from None
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise ValueError(_TYPES[kind])
  return value


def text(name: str, part: Any) -> str:
  """The text of a part, inverse of `split` and `make`.

  Args:
    name: its name.
    part: the object; options equal to their defaults are omitted.
  """
  words = [name]
  for option, field in options(type(part)).items():
    value = getattr(part, option)
    if value != field.default:
      words.append(f'{option}={written(value)}')
  return ','.join(words)


def usage(name: str, found: Any) -> str:
  """The text of a part with all its options and their defaults."""
  return ','.join(
    [
      name,
      *(
        f'{option}={"…" if _is_required(field) else written(field.default)}'
        for option, field in options(found).items()
      ),
    ]
  )


def written(value: Any) -> str:
  """A value as it is written."""
  return str(value).lower() if isinstance(value, bool) else str(value)


def fault(bounds: Mapping[str, Any], value: Any) -> str:
  """What is wrong with a value; empty if nothing is.

  Args:
    bounds: any of 'choices', 'minimum' and 'maximum'.
    value: a setting or an option.
  """
  if 'choices' in bounds and value not in bounds['choices']:
    return f'is unknown; choose from {", ".join(map(str, bounds["choices"]))}'
  if 'minimum' in bounds and value < bounds['minimum']:
    return f'is below its minimum {bounds["minimum"]}'
  if 'maximum' in bounds and value > bounds['maximum']:
    return f'is above its maximum {bounds["maximum"]}'
  if isinstance(value, float) and not math.isfinite(value):
    return 'is not a finite number'
  return ''


def _is_required(field: dataclasses.Field) -> bool:
  return (
    field.default is dataclasses.MISSING
    and field.default_factory is dataclasses.MISSING
  )


def _told(known: Mapping[str, Any]) -> str:
  return f'its options: {", ".join(known)}' if known else 'it has no options'
