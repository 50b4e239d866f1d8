"""What MkDocs makes while it builds the site.

* The flag reference (`flags.md`) from `fedmmr_jax/config.py` and the flags that
  the binaries define.
* The tables of `results.md` from `experiments/results/*.json`.

Neither needs JAX: the config is imported without the package around it, the
binaries are read, not run.
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import pathlib
import re
import sys
import types
import typing
from typing import Any, Iterator

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS, BINARIES = '<!-- settings -->', '<!-- binaries -->'


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
  """Fills in what a page leaves to be generated."""
  if page.file.src_uri == 'flags.md':
    return markdown.replace(SETTINGS, settings()).replace(BINARIES, binaries())
  if page.file.src_uri == 'results.md':
    return _draw().fill(markdown)
  return markdown


def settings() -> str:
  """A section for each group of `RunConfig`, a row for each field."""
  config = _config()
  sections = []
  for title, intro, fields in _groups(config.RunConfig()):
    sections.append(
      f'## {title}\n\n{intro}\n\n'
      + _table(
        ('flag', 'default', 'values', 'what it does'),
        [
          (
            f'`--{field.name}`',
            _default(value),
            _values(field.metadata),
            _with_flags(field.metadata['help']) + _evidence(field.metadata),
          )
          for field, value in fields
        ],
      )
    )
    for field, _ in fields:
      sections += _options(field)
  return '\n\n'.join(sections)


def _options(field: Any) -> list[str]:
  """A table of the options of a setting's parts, if they have any."""
  rows = [
    (
      f'`{name}`',
      f'`{option.name}`',
      'must be given'
      if option.default is dataclasses.MISSING
      else _default(option.default),
      _values(option.metadata),
      option.metadata['help'],
    )
    for name, kind in (
      field.metadata.get('parts') or field.metadata.get('options', {})
    ).items()
    for option in dataclasses.fields(kind)
    if option.init
  ]
  if not rows:
    return []
  head = (f'`--{field.name}`', 'option', 'default', 'values', 'what it does')
  return [f'Options of `--{field.name}`:', _table(head, rows)]


def _evidence(metadata: Any) -> str:
  """What is known of a setting's effect, with links."""
  if 'evidence' not in metadata:
    return ''
  told = re.sub(r'docs/(\w+)\.md', r'[\1](\1.md)', metadata['evidence'])
  return f'. *Evidence: {told}.*'


def _groups(config: Any) -> Iterator[tuple[str, str, list]]:
  """(title, first line of the docstring, fields with their values)."""
  fields = _fields(config)
  own = [(field, value) for field, value in fields if not _is_group(value)]
  if own:
    yield 'Run', _summary(config), own
  for field, value in fields:
    if _is_group(value):
      yield field.name.capitalize(), _summary(value), list(_leaves(value))


def _leaves(group: Any) -> Iterator[tuple[Any, Any]]:
  for field, value in _fields(group):
    if _is_group(value):
      yield from _leaves(value)
    else:
      yield field, value


def _fields(group: Any) -> list[tuple[Any, Any]]:
  """Fields and defaults; a group that is None by default as if it were on."""
  hints = typing.get_type_hints(type(group))
  found = []
  for field in dataclasses.fields(group):
    value = getattr(group, field.name)
    if value is None:
      value = next(
        (
          kind()
          for kind in typing.get_args(hints[field.name])
          if dataclasses.is_dataclass(kind)
        ),
        None,
      )
    found.append((field, value))
  return [
    (field, value)
    for field, value in found
    if _is_group(value) or 'help' in field.metadata
  ]


def _is_group(value: Any) -> bool:
  """Is it a group of settings? A part has a name."""
  return (
    dataclasses.is_dataclass(value)
    and not isinstance(value, type)
    and not hasattr(value, 'name')
  )


def _summary(value: Any) -> str:
  return inspect.getdoc(type(value)).split('\n\n')[0]


def _default(value: Any) -> str:
  if isinstance(value, bool):
    return f'`{str(value).lower()}`'
  return 'empty' if value == '' else f'`{value}`'


def _values(bounds: Any) -> str:
  if 'parts' in bounds:
    return ', '.join(f'`{name}`' for name in bounds['parts'])
  if 'choices' in bounds:
    return ', '.join(f'`{choice}`' for choice in bounds['choices'])
  if 'names' in bounds:
    return 'any of ' + ', '.join(f'`{name}`' for name in bounds['names'])
  low, high = bounds.get('minimum'), bounds.get('maximum')
  if low is None and high is None:
    return ''
  if high is None:
    return f'from {low}'
  return f'to {high}' if low is None else f'{low} to {high}'


def binaries() -> str:
  """A table of the flags that the binaries define themselves."""
  rows = []
  for path in sorted((ROOT / 'experiments').glob('*.py')):
    for call in ast.walk(ast.parse(path.read_text())):
      if _defines_flag(call):
        name, default, text = _arguments(call)
        where = 'every binary' if path.stem == 'app' else f'`{path.stem}`'
        rows.append((where, f'`--{name}`', default, _with_flags(text)))
  rows.sort(key=lambda row: row[0] != 'every binary')
  return _table(('binary', 'flag', 'default', 'what it does'), rows)


def _defines_flag(node: ast.AST) -> bool:
  return (
    isinstance(node, ast.Call)
    and isinstance(node.func, ast.Attribute)
    and node.func.attr.startswith('DEFINE_')
    and node.func.attr != 'DEFINE_alias'
    and bool(node.args)
    and isinstance(node.args[0], ast.Constant)
  )


def _arguments(call: ast.Call) -> tuple[str, str, str]:
  """A flag's name, default and help, as far as they are written out."""
  keywords = {word.arg: word.value for word in call.keywords}
  default = keywords.get('default', call.args[1] if call.args[1:] else None)
  texts = [text for text in map(_text, call.args[2:]) if text]
  text = _text(keywords['help']) if 'help' in keywords else (texts or [''])[-1]
  return call.args[0].value, _flag_default(default), text


def _text(node: ast.AST) -> str:
  """A string as it is written, … for what is computed in it."""
  if isinstance(node, ast.Constant):
    return node.value if isinstance(node.value, str) else ''
  if isinstance(node, ast.JoinedStr):
    return ''.join(_text(part) or '…' for part in node.values)
  if isinstance(node, ast.BinOp):
    return (_text(node.left) or '…') + (_text(node.right) or '…')
  return ''


def _flag_default(node: ast.AST | None) -> str:
  try:
    value = ast.literal_eval(node)
  except (TypeError, ValueError):  # a name of a constant, such as AUTO
    return f'`{ast.unparse(node).lower()}`' if node is not None else ''
  if isinstance(value, list):
    return f'`{",".join(map(str, value))}`'
  return '' if value is None else _default(value)


def _with_flags(text: str) -> str:
  """A help text with the flags it names set as code."""
  return re.sub(
    r'(?<![\w`-])--[a-z_]+(?:=[\w.]+)?', r'`\g<0>`', text.replace('<', '&lt;')
  )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  lines = [head, tuple('---' for _ in head), *rows]
  return '\n'.join(
    '| '
    + ' | '.join(cell.replace('|', '\\|').replace('\n', ' ') for cell in line)
    + ' |'
    for line in lines
  )


def _config() -> Any:
  """`fedmmr_jax.config`, with a stand-in for the package around it."""
  before = {
    name: module
    for name, module in sys.modules.items()
    if name.partition('.')[0] == 'fedmmr_jax'
  }
  for name in before:
    del sys.modules[name]
  package = types.ModuleType('fedmmr_jax')
  package.__path__ = [str(ROOT / 'fedmmr_jax')]
  sys.modules['fedmmr_jax'] = package
  try:
    return importlib.import_module('fedmmr_jax.config')
  finally:
    for name in [
      name for name in sys.modules if name.partition('.')[0] == 'fedmmr_jax'
    ]:
      del sys.modules[name]
    sys.modules.update(before)


def _draw() -> Any:
  path = ROOT / 'experiments' / 'results' / 'draw.py'
  spec = importlib.util.spec_from_file_location('draw_results', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
