"""Recommends with the exported scorer in this folder.

    python run.py ID ID ID ...      # a history, oldest first

Needs jax, numpy and flatbuffers, and no other package.
"""

import json
import pathlib
import sys

import jax
import jax.export
import numpy as np

FORMAT = 1


def load(folder):
  """(manifest, items, score): score(histories [b, h]) gives what the manifest
  lists as outputs."""
  folder = pathlib.Path(folder)
  manifest = json.loads((folder / 'manifest.json').read_text('utf-8'))
  if manifest['format'] != FORMAT:
    sys.exit(f'{folder}: format {manifest["format"]}, not {FORMAT}')
  items = json.loads((folder / 'items.json').read_text('utf-8'))
  program = (folder / 'scorer.stablehlo').read_bytes()
  call = jax.jit(jax.export.deserialize(bytearray(program)).call)
  with np.load(folder / 'weights.npz') as file:
    weights = jax.device_put(dict(file))
  return manifest, items, lambda histories: call(weights, histories)


def padded(histories):
  """[b, h] int32, 0 behind; h is a power of two: each h compiles once."""
  longest = max(64, *map(len, histories))
  rows = np.zeros((len(histories), 1 << (longest - 1).bit_length()), np.int32)
  for row, history in zip(rows, histories):
    row[: len(history)] = history
  return rows


def main():
  _, items, score = load(pathlib.Path(__file__).parent)
  rows = {str(item): row for row, item in enumerate(items['ids']) if row}
  unknown = [item for item in sys.argv[1:] if item not in rows]
  if unknown:
    print('unknown and left out:', *unknown, file=sys.stderr)
  found = score(padded([[rows[x] for x in sys.argv[1:] if x in rows]]))
  for row, value in zip(found['top_rows'][0], found['top_scores'][0]):
    if row:
      print(f'{value:8.4f}  {items["ids"][row]}  {items["titles"][row]}')


if __name__ == '__main__':
  main()
