"""Parts of the parameter tree, by the names that `freeze` and `load` take.

A name is a group of `config.GROUPS`, a path as used in checkpoints
(`backbone/block_0`), or `my_package.module:GROUP`, a tuple of such paths.
"""

import difflib
from typing import Any, Iterable, Sequence

import jax

from fedmmr_jax import parts
from fedmmr_jax.config import GROUPS
from fedmmr_jax.errors import UserError
from fedmmr_jax.models.feddmmr import group_of


def paths_of(name: str) -> tuple[str, ...]:
  """The groups or paths that a name stands for, whatever the model has.

  Raises:
    UserError: a user-defined group cannot be found, or is not a tuple of paths.

  >>> paths_of('router'), paths_of('backbone/block_0')
  (('router',), ('backbone/block_0',))
  """
  if ':' not in name:
    return (name,)
  found = parts.find(name, {}, 'group of parameters')
  if (
    not isinstance(found, (tuple, list))
    or not found
    or not all(isinstance(path, str) for path in found)
  ):
    raise UserError(f'{name} is no tuple of paths of parameters')
  return tuple(found)


def all_paths(names: Sequence[str]) -> tuple[str, ...]:
  """The paths that several names stand for."""
  return tuple(path for name in names for path in paths_of(name))


def is_within(path: str, place: str) -> bool:
  """Whether a parameter or subtree is in a group or below a path."""
  if place in GROUPS:
    return group_of(path.split('/')[0]) == place
  return f'{path}/'.startswith(f'{place}/')


def by_group(names: Iterable[str]) -> dict[str, list[str]]:
  """Group -> the given top-level parameters in it; empty groups are omitted."""
  grouped: dict[str, list[str]] = {group: [] for group in GROUPS}
  for name in dict.fromkeys(names):
    grouped[group_of(name)].append(name)
  return {group: found for group, found in grouped.items() if found}


def mask(params: Any, names: Sequence[str]) -> Any:
  """A tree like the parameters, of bools: do the names cover this parameter?"""
  places = all_paths(names)
  return jax.tree_util.tree_map_with_path(
    lambda path, _: any(is_within(path_text(path), p) for p in places), params
  )


def path_text(path: Sequence[Any]) -> str:
  """A `jax.tree_util` path as written in checkpoints, 'backbone/block_0'."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator='/')


def check(params: Any, names: Sequence[str], setting: str) -> None:
  """Raises UserError for a path that matches nothing in this model. A named
  group that is empty in this model is no error."""
  known: dict[str, None] = {}
  for path, _ in jax.tree_util.tree_leaves_with_path(params):
    for end in range(1, len(path) + 1):
      known[path_text(path[:end])] = None
  for name in names:
    if name not in GROUPS:
      for path in paths_of(name):
        if path not in known:
          near = difflib.get_close_matches(path, [*GROUPS, *known], cutoff=0.0)
          raise UserError(
            f'`{setting}`: this model has no parameters {path!r}; nearest are '
            + ', '.join(near)
          )
