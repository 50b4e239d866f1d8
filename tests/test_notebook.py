"""The notebook of `examples/`: it runs, and what it shows came of its code."""

import json
import pathlib

import pytest

NOTEBOOK = pathlib.Path(__file__).parents[1] / 'examples' / 'quickstart.ipynb'


def test_the_stored_outputs_are_of_one_run_from_the_top():
  assert NOTEBOOK.stat().st_size < 100_000
  cells = json.loads(NOTEBOOK.read_text('utf-8'))['cells']
  cells = [cell for cell in cells if cell['cell_type'] == 'code']
  counts = [cell['execution_count'] for cell in cells]
  assert counts == list(range(1, len(cells) + 1))
  kinds = [out['output_type'] for cell in cells for out in cell['outputs']]
  assert 'error' not in kinds and 'display_data' in kinds
  assert all(cell['outputs'] for cell in cells)
  assert '/home/' not in NOTEBOOK.read_text('utf-8')


@pytest.mark.slow
def test_it_runs():
  nbformat = pytest.importorskip('nbformat')
  nbclient = pytest.importorskip('nbclient')
  pytest.importorskip('ipykernel')
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  # It would say so with a traceback.
  nbclient.NotebookClient(
    notebook,
    timeout=600,
    kernel_name='python3',
    resources={'metadata': {'path': str(NOTEBOOK.parent)}},
  ).execute()
