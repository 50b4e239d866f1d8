"""Parts by name: what a flag or a config calls by a word, and what others add.

A part of this package has a short name, a key of its kind's table (`FORMATS`,
`AGGREGATORS`, …). One from outside is named by where Python finds it, as in
`my_package.robust:Median`.
"""

import importlib
from typing import Any, Mapping, TypeVar

from fedmmr_jax.errors import UserError

Part = TypeVar('Part')


def find(name: str, named: Mapping[str, Part], what: str) -> Part:
  """A part by its name.

  Args:
    name: a key of `named`, or 'module:Thing' of something importable.
    named: this package's own parts of that kind.
    what: the kind, for the error, as in 'aggregator'.

  Raises:
    UserError: there is none of that name.

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


def built(found: Any, kind: type[Part], name: str) -> Part:
  """A part as it is used: an object of its kind, made if it is a class.

  Raises:
    UserError: it is of another kind.
  """
  part = found() if isinstance(found, type) else found
  if not isinstance(part, kind):
    raise UserError(f'{name} is no {kind.__module__}.{kind.__name__}')
  return part
