"""What the binaries share: flags from `RunConfig`, and how errors end.

A user's error is one line on stderr and exit status 2, without a traceback.
"""

import pathlib
import sys
from typing import Callable, Sequence

from absl import app
from absl import flags
from absl import logging
import jax

from fedmmr_jax.config import RunConfig, walk_fields
from fedmmr_jax.errors import UserError

USER_ERROR, INTERRUPTED = 2, 130
PRESETS = pathlib.Path(__file__).parent / 'presets'

_COMPILATION_CACHE = flags.DEFINE_string(
    'compilation_cache', '~/.cache/fedmmr_jax',
    'folder that keeps compiled programs, so that a second start is quick; '
    'empty = none')


def define_config_flags() -> None:
  """One flag for each field of `RunConfig`, with its help and default."""
  for _, field, default in walk_fields(RunConfig()):
    help_text = field.metadata['help']
    if 'choices' in field.metadata:
      flags.DEFINE_enum(
          field.name, default, field.metadata['choices'], help_text)
    else:
      _DEFINE[type(default)](field.name, default, help_text)


_DEFINE = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer,
           float: flags.DEFINE_float, str: flags.DEFINE_string}


def config_from_flags() -> RunConfig:
  """The validated settings of this command line.

  Raises:
    UserError: a value out of bounds.
  """
  names = RunConfig().as_flat_dict()
  return RunConfig.from_flat_dict(
      {name: flags.FLAGS[name].value for name in names}).validate()


def run(main: Callable[..., None], commands: bool = False) -> None:
  """Parses flags, runs `main`, and turns a user's errors into one line.

  Args:
    main: the binary; called with the command words, if it takes any.
    commands: whether it takes words beside flags.
  """
  def parse(argv):
    rest = _parse(argv)
    if rest[1:] and not commands:
      _fail(f'unexpected argument {rest[1]!r}; flags start with --')
    return rest

  app.run(lambda argv: _guarded(lambda: main(*argv[1:])), flags_parser=parse)


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    # absl's message may go over several lines; the first says what is wrong.
    line = str(error).splitlines()[0].removeprefix('ERROR:: ')
    if isinstance(error, flags.CantOpenFlagFileError):
      presets = ', '.join(sorted(p.name for p in PRESETS.glob('*.flags')))
      line += f'; presets in {PRESETS}: {presets}'
    _fail(line)
  return rest


def _guarded(main: Callable[[], None]) -> None:
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # libraries narrate at INFO
  if _COMPILATION_CACHE.value:
    cache = pathlib.Path(_COMPILATION_CACHE.value).expanduser()
    jax.config.update('jax_compilation_cache_dir', str(cache))
  try:
    main()
  except UserError as error:
    _fail(str(error))


def _fail(line: str) -> None:
  print(f'error: {line}', file=sys.stderr)
  sys.exit(USER_ERROR)
