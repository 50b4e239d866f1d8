"""Shared by all binaries: flags from `RunConfig`, and error handling.

A user error gives one line on stderr and exit status 2, without a traceback.
"""

import os
import pathlib
import re
import signal
import sys
import traceback
from typing import Any, Callable, Sequence

import jax
from absl import app, flags, logging

from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.config import (
  GONE,
  help_of,
  Part,
  RENAMED,
  renamed,
  RunConfig,
  walk_fields,
)
from fedmmr_jax.data import load
from fedmmr_jax.data.load import Loaded
from fedmmr_jax.errors import UserError
from fedmmr_jax.federation import devices
from fedmmr_jax.federation.round import FederationState
from fedmmr_jax.runs import training
from fedmmr_jax.runs.checkpoint import Rounds
from fedmmr_jax.runs.run_folder import RunFolder
from fedmmr_jax.simulation import Simulation

USER_ERROR, INTERRUPTED = 2, 130
BROKEN_PIPE = 128 + signal.SIGPIPE  # as a shell would have it
_OUT_OF_MEMORY = 'RESOURCE_EXHAUSTED'  # how XLA's message begins
HERE = pathlib.Path(__file__).parent
PRESETS = HERE / 'presets'

WORKDIR = flags.DEFINE_string('workdir', '', 'folder of the run')

_COMPILATION_CACHE = flags.DEFINE_string(
  'compilation_cache',
  '~/.cache/fedmmr_jax',
  'folder that keeps compiled programs, so that a second start is quick; '
  'empty = none. Left out, JAX_COMPILATION_CACHE_DIR comes before the '
  'default',
)

_DEBUG = flags.DEFINE_boolean(
  'debug',
  False,
  'show where an error comes from: its traceback, with its '
  'causes, before the line',
)

_WORKERS = flags.DEFINE_integer(
  'workers',
  0,
  'how many shares of the clients a CPU does side by side, 8 at '
  'most; 0 = its cores. Changes the speed and no result',
  lower_bound=0,
)
# What runs were started with when a share had a device of its own.
flags.DEFINE_alias('cpu_devices', 'workers')


def define_config_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """One flag for each field of `RunConfig`, with its help and default."""
  for _, field, default in walk_fields(RunConfig()):
    help_text = as_flags(help_of(field))
    if 'choices' in field.metadata:
      flags.DEFINE_enum(
        field.name, default, field.metadata['choices'], help_text, values
      )
    elif field.name == 'global_memory':  # once a boolean
      flags.DEFINE(
        _Renamed(field.name),
        field.name,
        str(default),
        help_text,
        values,
        boolean=True,
      )
    elif isinstance(default, Part):
      flags.DEFINE_string(
        field.name, str(default), help_text, flag_values=values
      )
    else:
      _DEFINE[type(default)](field.name, default, help_text, flag_values=values)
  for old in (*RENAMED, *GONE):  # known, and not in the help
    values[old] = flags.Flag(_Renamed(old), None, old, None, '')


class _Renamed(flags.ArgumentParser):
  """Refuses a flag that is gone or called otherwise now, and says so."""

  def __init__(self, name: str):
    super().__init__()
    self._name = name

  def parse(self, argument: str) -> str:
    if self._name in GONE:
      raise ValueError(f'this is gone: {GONE[self._name]}')
    now = renamed(self._name, argument)
    if now:
      raise ValueError('this is now ' + ' or '.join(f'--{x}' for x in now))
    return argument


_DEFINE = {
  bool: flags.DEFINE_boolean,
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  str: flags.DEFINE_string,
}


def config_from_flags(before: dict[str, Any] | None = None) -> RunConfig:
  """The validated settings of this command line.

  Args:
    before: settings of the run to be resumed; they apply to flags that the
      command line omits.

  Raises:
    UserError: a value out of bounds.
  """
  values = RunConfig.from_flat_dict(before or {}).as_flat_dict()
  for name in values:
    if name in flags.FLAGS and flags.FLAGS[name].present:
      values[name] = flags.FLAGS[name].value
  return RunConfig.from_flat_dict(values).validate()


def open_run() -> RunFolder:
  """The run folder that --workdir names, for the binaries that read one.

  Raises:
    UserError: --workdir is missing.
  """
  if not WORKDIR.value:
    raise UserError('name a run folder with --workdir')
  run = RunFolder(WORKDIR.value)
  if run.holds_run():
    run.check_format()
  return run


def find_round(rounds: Rounds, which: str) -> int:
  """The number of a round given as a number, 'best' or 'last'.

  Raises:
    UserError: none of these, or nothing is saved.
  """
  named = {'best': rounds.best, 'last': rounds.last}
  if which in named:
    return named[which]()
  if not which.isdecimal():
    raise UserError(f'{which!r} is no round; say a number, best or last')
  return int(which)


def load_round(
  run: RunFolder, rounds: Rounds, number: int, given: dict[str, Any]
) -> tuple[Loaded, Simulation, FederationState]:
  """A saved round ready for use: the run's data, its simulation, its state.

  Args:
    given: settings that replace the run's own.

  Raises:
    UserError: the round cannot be read, or the data is not the run's.
  """
  config = run.config().changed(given).validate()
  loaded = load.load(config)
  run.check_data(loaded.dataset)
  # Of a federation over a network, what the nodes have made together.
  of_network = run.is_of_network(loaded.dataset)
  content = run.content() if of_network else None
  simulation = simulation_lib.build(
    config, loaded.dataset, loaded.cold, content=content
  )
  like = training.structure(simulation, with_controls=not of_network)
  saved = rounds.load(number, like)
  return loaded, simulation, saved.state


def run(main: Callable[..., None], commands: bool = False) -> None:
  """Parses flags, runs `main`, and turns a user's errors into one line.

  Args:
    main: the binary; called with the command words, if it takes any.
    commands: whether it takes words besides flags.
  """

  def parse(argv):
    rest = _parse(argv, commands)
    if rest[1:] and not commands:
      _fail(f'unexpected argument {rest[1]!r}; flags start with --')
    return rest

  app.run(lambda argv: _guarded(lambda: main(*argv[1:])), flags_parser=parse)


def find_file(name: str) -> pathlib.Path:
  """A file that a flag names or, if it does not exist, the one of the same name
  that came with the package: an installed package has its presets elsewhere.

  Raises:
    UserError: neither exists.
  """
  path = pathlib.Path(name).expanduser()
  own = HERE / path.parent.name / path.name
  for found in (path, own, PRESETS / path.name):
    if found.is_file():
      return found
  raise UserError(f'{name}: no such file')


def _with_flagfiles(argv: Sequence[str]) -> list[str]:
  """The command line with its flagfiles where `find_file` has them; presets
  that build on others do so from wherever they are."""
  words = []
  for word in argv:
    flag, equals, name = word.partition('=')
    if flag.lstrip('-') == 'flagfile' and flag[:1] == '-' and equals:
      try:
        path = find_file(name)
      except UserError:
        pass  # absl says so
      else:
        lines = map(str.strip, path.read_text('utf-8').splitlines())
        words += _with_flagfiles([x for x in lines if x.startswith('-')])
        continue
    words.append(word)
  return words


def _parse(argv: Sequence[str], commands: bool) -> list[str]:
  argv = [argv[0], *_with_flagfiles(argv[1:])]
  try:
    try:
      rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
      # Ids may begin with a dash; behind a command's words one is no flag.
      last = argv[-1]
      if not (commands and last.lstrip('-') == error.flagname):
        raise
      rest = flags.FLAGS([*argv[:-1], '--', last])
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
    # Orbax narrates, and adds tracebacks to the errors that it raises too.
    logging.set_verbosity(logging.FATAL)
  devices.set_workers(_WORKERS.value)
  _set_compilation_cache()
  try:
    main()
    sys.stdout.flush()
  except UserError as error:
    _fail(str(error), error)
  except BrokenPipeError:  # whoever reads (head, less) has enough
    # Python would flush once more at its end, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(BROKEN_PIPE)
  except jax.errors.JaxRuntimeError as error:
    if _OUT_OF_MEMORY not in str(error):
      raise
    _fail(
      f'out of memory ({_start(error)}); lower `clients_per_chunk` where it '
      'trains, `clients_per_eval_chunk` where it ranks, or on a GPU give JAX a '
      'larger share with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 (of 1; the default '
      'is 0.75), if no other process is there',
      error,
    )
  except OSError as error:  # a full disk, a folder without permission
    _fail(
      f'{error.filename or "file system"}: {error.strerror or error}', error
    )


def _start(error: Exception) -> str:
  """The first line of a message that may be a page of buffers."""
  line = str(error).strip().partition('\n')[0]
  return line if len(line) <= 120 else line[:119] + '…'


def _set_compilation_cache() -> None:
  if (
    os.environ.get('JAX_COMPILATION_CACHE_DIR')
    and not flags.FLAGS['compilation_cache'].present
  ):
    return  # JAX has read it
  cache = _COMPILATION_CACHE.value
  jax.config.update(
    'jax_compilation_cache_dir',
    str(pathlib.Path(cache).expanduser()) if cache else None,
  )


def as_flags(line: str) -> str:
  """An error message with the settings it names in backticks written as flags.

  >>> as_flags('`hidden_dim=6` is not a multiple of `num_heads=4`')
  '--hidden_dim=6 is not a multiple of --num_heads=4'
  >>> as_flags('`hidden` is no setting')
  '`hidden` is no setting'
  """
  known = {field.name for _, field, _ in walk_fields(RunConfig())}

  def flag(match):
    is_known = match[1] in known or match[1] in flags.FLAGS
    return f'--{match[1]}{match[2] or ""}' if is_known else match[0]

  return re.sub(r'`(\w+)(=[^`]*)?`', flag, line)


def _fail(line: str, error: Exception | None = None) -> None:
  """Ends the process with one line; with --debug the error's traceback."""
  if error and _DEBUG.value:
    cause = error
    while cause:  # show those that `from None` hides
      cause.__suppress_context__ = False
      cause = cause.__context__
    traceback.print_exception(error)
  print(f'error: {as_flags(line)}', file=sys.stderr)
  sys.exit(USER_ERROR)
