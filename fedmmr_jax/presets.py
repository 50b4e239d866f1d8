"""Presets by name, for the library; the binaries take them as flagfiles."""

import importlib.resources
import pathlib
import shlex
from typing import Any, Callable, Sequence

from fedmmr_jax.config import RunConfig
from fedmmr_jax.errors import UserError

_FOLDER = pathlib.Path(
  str(importlib.resources.files('experiments') / 'presets')
)


def preset(name: str, **changes: Any) -> RunConfig:
  """The settings of a preset, with some of them changed.

  Args:
    name: a file of `experiments/presets` without `.flags`: 'recommended',
      'light', 'private', 'paper', 'synthetic'.
    **changes: settings by flag name, as values or as text; a part replaces the
      preset's whole part.

  Raises:
    UserError: no such preset, no such setting, or a value out of bounds.

  >>> preset('paper', data_dir='ml-1m', num_rounds=5).server.num_rounds
  5
  >>> preset('synthetic', memory='recent,capacity=40').memory.capacity
  40
  """
  if not (_FOLDER / f'{name}.flags').is_file():
    names = sorted(
      path.name.removesuffix('.flags')
      for path in _FOLDER.iterdir()
      if path.name.endswith('.flags')
    )
    raise UserError(f'there is no preset {name!r}; one of {", ".join(names)}')
  # One of the same name where the program was started is not this one.
  settings = _settings([f'--flagfile={name}.flags'], _own)
  return RunConfig.from_flat_dict(settings | changes).validate()


def of_command_line(text: str, **defaults: Any) -> RunConfig:
  """The settings of a command line of the binaries, as in
  '--flagfile=recommended.flags --num_rounds=5'; a flagfile is a path, or the
  name of a preset.

  Args:
    text: the flags.
    **defaults: settings that it may leave out.

  Raises:
    UserError: no such file, something that is no flag, or a value out of
      bounds.

  >>> of_command_line('--flagfile=paper.flags --seed=3 --nosuch').seed
  Traceback (most recent call last):
    ...
  fedmmr_jax.errors.UserError: unknown setting 'nosuch'
  """
  settings = defaults | _settings(shlex.split(text), _given_or_own)
  return RunConfig.from_flat_dict(settings).validate()


def _settings(
  words: Sequence[str], find: Callable[[str], pathlib.Path]
) -> dict[str, Any]:
  """Name -> text or, of a flag alone, True; `find` says which file a flagfile,
  also one within another, is."""
  found: dict[str, Any] = {}
  for word in words:
    if not word.startswith('--'):
      raise UserError(f'{word!r} is no flag; write --name=value')
    name, equals, value = word.removeprefix('--').partition('=')
    if name == 'flagfile':
      lines = map(str.strip, find(value).read_text('utf-8').splitlines())
      found |= _settings([x for x in lines if x.startswith('--')], find)
    else:
      found[name] = value if equals else True
  return found


def _own(name: str) -> pathlib.Path:
  return _FOLDER / pathlib.Path(name).name


def _given_or_own(name: str) -> pathlib.Path:
  for file in (pathlib.Path(name).expanduser(), _own(name)):
    if file.is_file():
      return file
  raise UserError(f'{name}: no such file')
