"""What the binaries share: how errors end, where compiled programs go."""

import os
import subprocess
import sys

import pytest
from absl import flags

from experiments import app
from fedmmr_jax.config import GONE, RunConfig
from fedmmr_jax.errors import UserError
from tests.test_cli import ROOT


def run(body, *flags, status=0, **environment):
  """Runs a binary of that body; returns (stdout, stderr)."""
  program = (
    'import jax\nfrom experiments import app\n'
    'from fedmmr_jax.errors import UserError\n'
    f'def main():\n  {body}\napp.run(main)\n'
  )
  environment = os.environ | environment
  done = subprocess.run(
    [sys.executable, '-c', program, *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    env={k: v for k, v in environment.items() if v is not None},
  )
  assert done.returncode == status, done.stdout + done.stderr
  return done.stdout, done.stderr


@pytest.mark.parametrize(
  'raised, line',
  [
    ('raise UserError("the mend")', 'error: the mend'),
    (
      'open("/no/such/file")',
      'error: /no/such/file: No such file or directory',
    ),
  ],
)
def test_an_error_is_one_line_and_with_debug_a_traceback(raised, line):
  assert run(raised, status=2) == ('', line + '\n')
  _, told = run(raised, '--debug', status=2)
  assert told.startswith('Traceback') and 'in main' in told
  assert told.splitlines()[-1] == line


def test_debug_shows_the_cause_that_the_line_leaves_out():
  body = (
    'try: 1 / 0\n  except ZeroDivisionError: raise UserError("wrong") from None'
  )
  assert 'Zero' not in run(body, status=2)[1]
  assert 'ZeroDivisionError' in run(body, '--debug', status=2)[1]


MEND = (
  'lower --clients_per_chunk where it trains, --clients_per_eval_chunk where '
  'it ranks, or on a GPU give JAX a larger share with '
  'XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 (of 1; the default is 0.75), if no other '
  'process is there'
)
OVER = 'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.'


@pytest.mark.parametrize(
  'raised, told',
  [
    # XLA goes on with a page of buffers.
    (f'raise jax.errors.JaxRuntimeError({OVER!r} + "\\n\\nBuffers:")', OVER),
    (
      f'raise jax.errors.JaxRuntimeError({OVER!r} + "x" * 999)',
      OVER + 'x' * (119 - len(OVER)) + '…',
    ),
    # And in earnest: 64 TiB.
    (
      'jax.numpy.ones(1 << 44).block_until_ready()',
      'RESOURCE_EXHAUSTED: Out of memory allocating 70368744177664 bytes.',
    ),
  ],
)
@pytest.mark.slow
def test_memory_that_does_not_suffice_is_one_line_with_a_mend(raised, told):
  # With what the binaries know of these settings.
  body = f'app.define_config_flags()\n  {raised}'
  assert run(body, status=2) == ('', f'error: out of memory ({told}); {MEND}\n')
  assert 'Traceback' in run(body, '--debug', status=2)[1]


def test_another_error_of_xla_is_a_traceback():
  body = 'raise jax.errors.JaxRuntimeError("INTERNAL: a bug")'
  assert 'Traceback' in run(body, status=1)[1]


def cache(*flags, variable):
  out, _ = run(
    'print(jax.config.jax_compilation_cache_dir)',
    *flags,
    JAX_COMPILATION_CACHE_DIR=variable,
  )
  return out.strip()


@pytest.mark.slow
def test_the_environment_names_the_cache_unless_the_flag_does():
  assert cache(variable=None).endswith('.cache/fedmmr_jax')
  assert cache(variable='/tmp/mine') == '/tmp/mine'
  assert cache('--compilation_cache=/tmp/other', variable='/tmp/mine') == (
    '/tmp/other'
  )
  assert cache('--compilation_cache=', variable='/tmp/mine') == 'None'


@pytest.mark.parametrize(
  'flag, now',
  [
    ('--memory_capacity=6', '--memory=surprise,capacity=6'),
    ('--contrastive_weight=0', '--contrastive=none'),
    ('--proximal_mu=0.1', '--drift_control=fedprox,mu=0.1'),
    ('--averaging=fednova', '--aggregator=fednova'),
    (
      '--server_momentum=0.5',
      '--server_optimizer=fedavgm,momentum=0.5 or '
      '--server_optimizer=fedadam,beta1=0.5',
    ),
    ('--global_memory', '--global_memory=prototypes'),
    ('--noglobal_memory', '--global_memory=none'),
    ('--global_memory=True', '--global_memory=prototypes'),
  ],
)
def test_a_flag_of_before_says_what_it_is_called_now(flag, now):
  values = flags.FlagValues()
  app.define_config_flags(values)
  with pytest.raises(flags.IllegalFlagValueError) as caught:
    values(['train', flag])
  assert str(caught.value).endswith(f': this is now {now}')


@pytest.mark.parametrize('name', GONE)
def test_what_is_gone_says_why(name):
  values = flags.FlagValues()
  app.define_config_flags(values)
  why = f'is gone: {GONE[name]}'
  with pytest.raises(flags.IllegalFlagValueError, match=f'this {why}'):
    values(['train', f'--{name}=1'])
  with pytest.raises(UserError, match=f'^`{name}` {why}'):
    RunConfig().changed({name: 1})


def test_a_later_flag_replaces_the_whole_part():
  values = flags.FlagValues()
  app.define_config_flags(values)
  given = ['--memory=two_tier,capacity=30', '--memory=two_tier']
  values(['train', *given, '--global_memory=prototypes,number=3'])
  assert values.memory == 'two_tier'
  assert values.global_memory == 'prototypes,number=3'
  assert 'capacity=50' in values['memory'].help
  # What is gone is known, and not in the help.
  assert 'memory_capacity' in values
  assert 'memory_capacity' not in values.get_help()


@pytest.mark.parametrize(
  'line, printed',
  [
    ('`memory=none` has no options', '--memory=none has no options'),
    ('`load=a b`, `freeze`', '--load=a b, --freeze'),
    ('name a folder with `workdir`', 'name a folder with --workdir'),
    ('`no_setting=3` and `x/y.npy`', '`no_setting=3` and `x/y.npy`'),
  ],
)
def test_settings_in_an_error_are_flags_on_the_command_line(line, printed):
  assert app.as_flags(line) == printed
  assert run(f'raise UserError({line!r})', status=2)[1] == (
    f'error: {printed}\n'
  )


def test_presets_are_found_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  # Presets build on others.
  words = app._with_flagfiles(['--seed=1', '--flagfile=staged.flags', '--x'])
  assert words[0] == '--seed=1' and words[-1] == '--x'
  assert '--top_k_users=1000' in words
  assert words[-2].startswith('--stages=')
  assert app.find_file('experiments/ablations/baselines.txt').is_file()
  # What lies here comes first; what is nowhere is left for the error.
  (tmp_path / 'staged.flags').write_text('# mine\n--seed=3\n')
  assert app._with_flagfiles(['--flagfile=staged.flags']) == ['--seed=3']
  assert app._with_flagfiles(['--flagfile=none.flags']) == [
    '--flagfile=none.flags'
  ]


@pytest.mark.slow
def test_an_id_may_begin_with_a_dash():
  program = (
    'from experiments import app\n'
    "def main(*words): print('|'.join(words))\n"
    'app.run(main, commands=True)\n'
  )

  def words(*given):
    done = subprocess.run(
      [sys.executable, '-c', program, *given],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    return done.stdout.strip() or done.stderr.strip()

  for user in ('-1KKYzibGPyUX', '--0kuuLmu', '-5'):
    assert words('recommend', 'best', user) == f'recommend|best|{user}'
    assert words('--workers=1', 'recommend', user) == f'recommend|{user}'
  assert 'Unknown command line flag' in words('--wrong=1', 'list')
  assert 'Unknown command line flag' in words('list', '--wrong=1')
