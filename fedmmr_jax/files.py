"""Writing files so that nobody ever sees half of one."""

import os
import pathlib


def replace(path: pathlib.Path, text: str) -> None:
  """Writes a file; a reader, or a kill, sees the old one or the new one, never
  half of it."""
  temporary = path.with_name(f'.{path.name}.tmp')
  temporary.write_text(text, 'utf-8')
  os.replace(temporary, path)
