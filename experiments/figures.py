"""What the figures share; matplotlib is an extra."""

import pathlib
from typing import Any

from fedmmr_jax.errors import UserError


def pyplot() -> Any:
  """matplotlib.pyplot, for files.

  Raises:
    UserError: it is not installed.
  """
  try:
    import matplotlib
  except ImportError:
    raise UserError(
      "the figure needs matplotlib: pip install 'fedmmr_jax[figures]'"
    ) from None
  matplotlib.use('Agg')
  from matplotlib import pyplot as found

  return found


def check_path(path: str) -> None:
  """Raises UserError if no picture can be written under that name."""
  figure = pyplot().figure()
  known = figure.canvas.get_supported_filetypes()
  pyplot().close(figure)
  if pathlib.Path(path).suffix[1:].lower() not in known:
    raise UserError(
      f'--out={path}: no such kind of picture; end it in .png, .pdf or .svg'
    )
  if not pathlib.Path(path).absolute().parent.is_dir():
    raise UserError(f'--out={path}: no such folder')
