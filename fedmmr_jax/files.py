"""Atomic file writes."""

import os
import pathlib


def replace(path: pathlib.Path, text: str) -> None:
  """Writes a file atomically: readers, even after a kill, see the old file or
  the new one, never half of it."""
  temporary = path.with_name(f'.{path.name}.tmp')
  temporary.write_text(text, 'utf-8')
  os.replace(temporary, path)
