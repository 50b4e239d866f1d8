"""Presets by name, for the library; the binaries take them as flagfiles."""

import importlib.resources
from typing import Any

from fedmmr_jax.config import RunConfig
from fedmmr_jax.errors import UserError


def preset(name: str, **changes: Any) -> RunConfig:
  """The settings of a preset, with some of them changed.

  Args:
    name: a file of `experiments/presets` without `.flags`: 'recommended',
      'paper', 'synthetic'.
    **changes: settings by flag name, as values or as text; a part replaces the
      preset's whole part.

  Raises:
    UserError: no such preset, no such setting, or a value out of bounds.

  >>> preset('paper', data_dir='ml-1m', num_rounds=5).server.num_rounds
  5
  >>> preset('synthetic', memory='recent,capacity=40').memory.capacity
  40
  """
  folder = importlib.resources.files('experiments') / 'presets'
  file = folder / f'{name}.flags'
  if not file.is_file():
    names = sorted(
      path.name.removesuffix('.flags')
      for path in folder.iterdir()
      if path.name.endswith('.flags')
    )
    raise UserError(f'there is no preset {name!r}; one of {", ".join(names)}')
  texts = dict(
    line.removeprefix('--').partition('=')[::2]
    for line in map(str.strip, file.read_text('utf-8').splitlines())
    if line.startswith('--')
  )
  return RunConfig.from_flat_dict(texts | changes).validate()
