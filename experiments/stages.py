"""Staged training: consecutive runs, each starting from the best round of the
previous one.

A stages file has one line per stage, `name: --flag=value --flag=value`; these
flags override those of the command line. Stage i is the run in
`WORKDIR/<i>-<name>`; `WORKDIR/stages.json` records the request, so that
`--resume` needs no flags.
"""

import json
import pathlib
import re
from typing import Any, NamedTuple

from experiments import variants
from fedmmr_jax.config import RunConfig
from fedmmr_jax.errors import UserError
from fedmmr_jax.runs import run_folder
from fedmmr_jax.runs.run_folder import RunFolder

STAGES = 'stages.json'


class Stage(NamedTuple):
  """One run of a chain.

  Attributes:
    name: its line's.
    run: its folder.
    config: its settings.
  """

  name: str
  run: RunFolder
  config: RunConfig


def read(path: pathlib.Path) -> list[tuple[str, dict[str, str]]]:
  """(name, flags) of each line of a stages file.

  Raises:
    UserError: it cannot be read, or a line is malformed.
  """
  lines = variants.read(path)
  for line in lines:
    if line.special or not re.fullmatch(r'[\w-]+', line.name):
      raise UserError(
        f'{path}: {line.special or line.name!r}: a stage is a '
        'plain word and flags, name: --flag=value …'
      )
  return [(line.name, line.flags) for line in lines]


def chain(
  workdir: pathlib.Path,
  base: RunConfig,
  stages: list[tuple[str, dict[str, str]]],
) -> list[Stage]:
  """The runs; each starts from the previous one unless it says otherwise.

  Raises:
    UserError: a flag of a stage does not exist, or is out of bounds.
  """
  found: list[Stage] = []
  for number, (name, changes) in enumerate(stages, 1):
    if found:
      before = str(found[-1].run.path)
      changes = {'pretrained_path': before} | changes
    try:
      config = base.changed(changes).validate()
    except UserError as error:
      raise UserError(f'stage {name!r}: {error}') from None
    found.append(Stage(name, RunFolder(workdir / f'{number}-{name}'), config))
  return found


def save(
  workdir: pathlib.Path,
  base: RunConfig,
  stages: list[tuple[str, dict[str, str]]],
) -> None:
  """Records the request in the work folder."""
  workdir.mkdir(parents=True, exist_ok=True)
  run_folder.replace(
    workdir / STAGES,
    json.dumps({'flags': base.as_flat_dict(), 'stages': stages}, indent=2)
    + '\n',
  )


def saved(workdir: pathlib.Path) -> dict[str, Any] | None:
  """{'flags', 'stages'} as `save` left them; None if it did not.

  Raises:
    UserError: the file is damaged.
  """
  path = workdir / STAGES
  if not path.exists():
    return None
  try:
    content = json.loads(path.read_text('utf-8'))
    return {
      'flags': dict(content['flags']),
      'stages': [(name, dict(flags)) for name, flags in content['stages']],
    }
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path}: damaged ({error})') from None
