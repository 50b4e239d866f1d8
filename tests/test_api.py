"""What people build on: the public names, the examples, the layers."""

import ast
import doctest
import importlib
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedmmr_jax as fm
from examples import (
  clipped,
  feddyn,
  median,
  own_data,
  own_logger,
  own_metric,
  own_slice,
  third_modality,
)
from fedmmr_jax import parts
from fedmmr_jax.evaluation import user_results
from fedmmr_jax.runs import report
from tests import small

ROOT = pathlib.Path(__file__).parents[1]
# From below: a package may import what stands in an earlier line, or its own.
LAYERS = [
  ['errors', 'files', 'streams'],
  ['parts', 'config', 'metrics'],
  ['presets'],
  ['data'],
  ['models'],
  ['optimizers'],
  ['client'],
  ['federation'],
  [
    'evaluation.ranking',
    'evaluation.popularity',
    'evaluation.local_only',
    'evaluation.corrected',
    'evaluation.bootstrap',
  ],
  [
    'runs.checksums',
    'runs.provenance',
    'runs.run_folder',
    'runs.checkpoint',
    'runs.warm_start',
    'runs.loggers',
  ],
  ['simulation'],
  ['evaluation', 'runs'],
  ['deploy'],
]


def layer_of(module: str) -> int:
  """The layer of 'client.update', by its longest prefix in LAYERS."""
  names = {name: i for i, layer in enumerate(LAYERS) for name in layer}
  found = [name for name in names if f'{module}.'.startswith(f'{name}.')]
  return names[max(found, key=len)]


def imports_of(path: pathlib.Path) -> set[str]:
  """Modules of this package that a module imports when it is loaded."""
  found = set()
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        full = f'{node.module}.{alias.name}'
        file = ROOT / (full.replace('.', '/') + '.py')
        is_module = file.exists() or file.with_suffix('').is_dir()
        found.add(full if is_module else node.module)
  return {
    name.removeprefix('fedmmr_jax.')
    for name in found
    if name.startswith('fedmmr_jax.')
  }


def test_layers_hold():
  climbs = []
  for path in (ROOT / 'fedmmr_jax').rglob('*.py'):
    module = '.'.join(
      path.relative_to(ROOT / 'fedmmr_jax').with_suffix('').parts
    )
    if path.name == '__init__.py':
      continue
    climbs += [
      f'{module} imports {other}'
      for other in imports_of(path)
      if layer_of(other) > layer_of(module)
    ]
  assert not climbs


def test_nothing_reads_the_binaries():
  for path in (ROOT / 'fedmmr_jax').rglob('*.py'):
    assert 'import experiments' not in path.read_text(), path
    assert 'from experiments' not in path.read_text(), path


def texts_of(path: pathlib.Path) -> list[tuple[int, str]]:
  """(line, text) of what a module says: its strings without docstrings."""
  tree = ast.parse(path.read_text())
  documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
  docstrings = {
    id(node.body[0].value)
    for node in ast.walk(tree)
    if isinstance(node, documented)
    and node.body
    and isinstance(node.body[0], ast.Expr)
  }
  return [
    (node.lineno, node.value)
    for node in ast.walk(tree)
    if isinstance(node, ast.Constant)
    and isinstance(node.value, str)
    and id(node) not in docstrings
  ]


def test_no_flag_is_named_to_who_calls_from_python():
  """A setting is written `name`; only the binaries know flags."""
  named = [
    f'{path.relative_to(ROOT)}:{line}: {text}'
    for path in (ROOT / 'fedmmr_jax').rglob('*.py')
    if path.name != 'presets.py'  # it reads what is written for the binaries
    for line, text in texts_of(path)
    # In f'--{name}' the text ends with the dashes.
    if re.search(r'(?<![-\w])--(\w|$)', text)
  ]
  assert not named


def test_a_model_loads_no_reader():
  subprocess.run(
    [
      sys.executable,
      '-c',
      (
        'import sys; '
        'import fedmmr_jax.models.feddmmr, fedmmr_jax.client.update; '
        'assert "pyarrow" not in sys.modules'
      ),
    ],
    check=True,
    cwd=ROOT,
  )


def test_every_public_name_is_there_and_documented():
  for name in fm.__all__:
    value = getattr(fm, name)
    assert name == '__version__' or value.__doc__, name
  assert set(fm.__all__) <= set(dir(fm))
  with pytest.raises(AttributeError, match='no attribute'):
    _ = fm.nothing


@pytest.mark.parametrize(
  'module',
  [
    pytest.param('fedmmr_jax', marks=pytest.mark.slow),
    'fedmmr_jax.metrics',
    'fedmmr_jax.models.experts',
    'fedmmr_jax.models.groups',
    'fedmmr_jax.parts',
    'fedmmr_jax.presets',
    'fedmmr_jax.data.dataset',
  ],
)
def test_docstrings_run(module):
  result = doctest.testmod(importlib.import_module(module))
  assert result.attempted and not result.failed


@pytest.mark.slow
@pytest.mark.parametrize(
  'example',
  [own_slice, own_data, own_logger, own_metric, clipped, third_modality],
  ids=lambda e: e.__name__,
)
def test_an_example_runs(example, capsys):
  example.main()
  assert capsys.readouterr().out


@pytest.mark.parametrize(
  'path', sorted((ROOT / 'examples').glob('*.py')), ids=lambda p: p.name
)
def test_an_example_is_short_and_imports_nothing_private(path):
  text = path.read_text()
  assert len(text.splitlines()) <= 40
  assert 'from fedmmr_jax' not in text and 'import fedmmr_jax.' not in text


def one_round(aggregator=None, drift=None, **changes):
  simulation = small.simulation(
    client_optimizer='sgd',
    client_learning_rate=0.1,
    client_fraction=1.0,
    experts='none',
    dropout=0.0,
    **changes,
  )
  simulation = fm.Simulation.of(
    simulation.config, simulation.dataset, aggregator, drift
  )
  start = small.copy(simulation.init_state())
  step = next(simulation.rounds())
  return simulation, start, step


def moved(start, step):
  return jax.tree.map(
    jnp.subtract, step.state.server.params, start.server.params
  )


@pytest.mark.slow
def test_clipping_bounds_what_a_round_does():
  _, start, step = one_round(clipped.Clipped(max_norm=1e-3))
  delta = np.sqrt(
    sum(np.sum(np.square(x)) for x in jax.tree.leaves(moved(start, step)))
  )
  assert 0 < delta <= 1e-3 + 1e-6
  loose = one_round(clipped.Clipped(max_norm=1e3))
  plain = one_round()
  small.assert_trees_close(
    loose[2].state.server.params, plain[2].state.server.params
  )


@pytest.mark.slow
def test_a_median_sees_every_client():
  """Eight of nine clients are the same: so is the median."""

  class Attacked(median.Median):
    def collect(self, updates):
      delta, weight = super().collect(updates)
      one = jnp.full(weight.shape, 0.25)
      huge = jax.tree.map(
        lambda x: jnp.where(
          (updates.weight > 20).reshape(-1, *[1] * (x.ndim - 1)),
          1e9,
          one[0] + 0 * x,
        ),
        delta,
      )
      return huge, weight

  simulation, start, step = one_round(Attacked())
  assert (simulation.num_train > 21).sum() == 1
  for x in jax.tree.leaves(moved(start, step)):
    np.testing.assert_allclose(x, 0.25, rtol=1e-5)


@pytest.mark.slow
def test_feddyn_keeps_its_gradients():
  simulation, start, step = one_round(drift=feddyn.FedDyn(alpha=0.5))
  kept = step.state.controls
  # h is the mean of what the clients keep, when all of them take part and count
  # alike; here it is weighted by their positives.
  weight = np.maximum(simulation.num_train - 1, 0)
  weight = weight / weight.sum()
  expected = jax.tree.map(
    lambda g: np.tensordot(weight, np.asarray(g), 1), kept
  )
  small.assert_trees_close(step.state.server.control, expected, atol=1e-5)
  # The server goes twice as far: by the mean delta and by −h/α, which is it.
  small.assert_trees_close(
    moved(start, step),
    jax.tree.map(lambda h: -2 * h / 0.5, expected),
    rtol=1e-4,
    atol=1e-5,
  )


def test_parts_from_outside_by_name(tmp_path):
  config = small.config(
    aggregator='examples.clipped:Clipped,max_norm=2',
    num_rounds=1,
    drift_control='examples.feddyn:FedDyn,alpha=0.5',
  )
  simulation = fm.Simulation.of(config, small.dataset())
  assert simulation.aggregator == clipped.Clipped(max_norm=2.0)
  assert simulation.drift == feddyn.FedDyn(alpha=0.5)
  (tmp_path / 'x.log').write_text(
    '\n'.join(
      f'u{user}>i{(7 * user + t) % 30}' for user in range(9) for t in range(6)
    )
  )
  loaded = fm.load(
    fm.RunConfig.from_flat_dict(
      dict(dataset='examples.own_data:LOG', data_dir=str(tmp_path))
    )
  )
  assert loaded.dataset.num_clients == 9
  assert loaded.dataset.item_ids[1] == 'i0'


@pytest.mark.slow
def test_a_metric_of_ones_own_is_in_whatever_a_run_leaves(tmp_path):
  config = small.config(metrics='examples.own_metric:Biased', eval_every=2)
  simulation = fm.Simulation.of(config, small.dataset())
  run = fm.RunFolder(tmp_path)
  run.start(config, simulation.dataset)
  summary = fm.train(simulation, run, lambda record: None)
  first, second = run.records()
  assert 'val' not in first
  for found in (second['val'], summary['test']):
    for values in found.values():
      assert 0 < values['RBP 0.8'] < 0.2
  _, ranks = simulation.evaluate(simulation.init_state(), 'test')
  assert fm.metrics_of(ranks, [own_metric.Biased()])['full'].keys() == (
    summary['test']['full'].keys()
  )
  page = report.write(run).read_text()
  assert 'RBP 0.8' in page and page.count('RBP 0.8') > 2
  # By users too, by all protocols, and in each part of them.
  simulation = simulation.with_popular_negatives()
  results = user_results.evaluate(simulation, simulation.init_state(), 'test')
  assert {len(by_metric) for by_metric in results.of_each().values()} == {8}
  for parts_ in user_results.slices(results).values():
    for part in parts_.values():
      assert 'RBP 0.8' in part.means()['corrected']
  user_results.write(results, tmp_path / 'users.csv')
  assert 'popularity/RBP 0.8' in (tmp_path / 'users.csv').read_text()


@pytest.mark.parametrize(
  'name, message',
  [
    ('nothing', "no aggregator 'nothing'; one of fedavg, fednova, norm_bound"),
    ('no_such_package:X', 'cannot import no_such_package'),
    ('math:nothing', 'math has no nothing'),
    ('math:pi', 'is no fedmmr_jax'),
    (
      'examples.clipped:Clipped,norm=2',
      'there is no option norm; its options: max_norm',
    ),
    (
      'examples.clipped:Clipped,max_norm=two',
      'max_norm=two is not a number; its options: max_norm',
    ),
    ('fednova,mu=1', 'there is no option mu; it has no options'),
  ],
)
def test_a_part_that_is_none_is_refused(name, message):
  assert message in small.error_of(
    fm.Simulation.of, small.config(aggregator=name), small.dataset()
  )


@pytest.mark.parametrize(
  'name, message',
  [
    ('fedprox', 'the option mu is missing; its options: mu'),
    ('fedprox,mu=-1', 'mu=-1.0 is below its minimum 0.0'),
    ('mime_lite,server=fedadam', 'there is no option server'),
  ],
)
def test_an_option_of_a_drift_control_that_is_wrong_is_refused(name, message):
  config = small.config(drift_control=name, client_optimizer='sgd')
  assert message in small.error_of(fm.Simulation.of, config, small.dataset())


def test_a_part_is_found_by_name():
  assert parts.find('a', {'a': 1}, 'thing') == 1


def test_a_data_set_from_arrays():
  dataset = fm.Dataset.of(
    ['b', 'a', 'a', 'b', 'a', 'b'],
    [3, 1, 2, 1, 3, 2],
    times=[1, 5, 4, 3, 6, 2],
    text={1: [1, 2], 3: [3, 4]},
    titles={2: 'Two'},
  )
  assert dataset.user_ids.tolist() == ['a', 'b']
  assert [dataset.sequence(k).tolist() for k in (0, 1)] == [
    [2, 1, 3],
    [3, 2, 1],
  ]
  assert dataset.features['text'].tolist() == [[0, 0], [1, 2], [0, 0], [3, 4]]
  assert dataset.titles == ('', '', 'Two', '')
  assert 'of one length' in small.error_of(fm.Dataset.of, [1, 2], [1])
  with pytest.raises(fm.UserError, match='same width'):
    fm.Dataset.of([1] * 3, [1, 2, 3], text={1: [1.0], 2: [1.0, 2.0]})


def test_a_preset_with_changes():
  config = fm.preset('recommended', data_dir='x', hidden_dim=64)
  assert config.model.hidden_dim == 64
  assert config.server.aggregator == 'fednova'
  assert config.model.item_embedding.collaborative_dim == 64
  changed = fm.preset(
    'recommended', data_dir='x', item_embedding='content_init'
  )
  assert changed.model.item_embedding.collaborative_dim == 0
  assert 'no preset' in small.error_of(fm.preset, 'nothing')
  with pytest.raises(fm.UserError, match='unknown setting'):
    fm.preset('paper', nothing=1)


def test_a_preset_that_builds_on_another_stands_alone(tmp_path, monkeypatch):
  # Not on a file of the same name where the program happens to be started.
  other = tmp_path / 'experiments' / 'presets' / 'recommended.flags'
  other.parent.mkdir(parents=True)
  other.write_text('--aggregator=fedavg\n')
  monkeypatch.chdir(tmp_path)
  light = fm.preset('light', data_dir='x')
  assert light.server.aggregator == 'fednova'
  assert light.client.num_negatives == 800
  assert fm.preset('private', data_dir='x').server.aggregator == 'fedavg'


def test_a_recommendation_compiles_once():
  simulation = small.simulation()
  state = simulation.init_state()
  from fedmmr_jax.evaluation import ranking  # pylint: disable=g-import-not-at-top

  first = simulation.recommend(state, 0, 5)
  compiled = ranking.score_client._cache_size()
  others = [simulation.recommend(state, client, 5) for client in range(1, 9)]
  assert ranking.score_client._cache_size() == compiled
  assert len(first[0]) == 5 and any(
    (other[0] != first[0]).any() for other in others
  )
