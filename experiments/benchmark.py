"""Measures speed: seconds, and ratios that another machine can compare.

    python -m experiments.benchmark  # the embedded set
    python -m experiments.benchmark \\
        --flagfile=experiments/presets/recommended.flags \\
        --data_dir=path/to/ml-1m

Takes the flags of `experiments.train`. All times are medians of warm runs; the
achieved GFLOP/s are compared with those of a matrix product in the same
process. Nothing else should run on the machine at the same time.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from functools import partial
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import app, benchmark_reading, console
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.client import scoring, windows
from fedmmr_jax.client import update as client_lib
from fedmmr_jax.client import view as view_lib
from fedmmr_jax.client.drift import Cohort
from fedmmr_jax.config import RunConfig
from fedmmr_jax.data import load
from fedmmr_jax.data.dataset import client_view, Dataset
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import ranking
from fedmmr_jax.federation import cohorts as cohorts_lib
from fedmmr_jax.federation import round as round_lib
from fedmmr_jax.federation import server as server_lib
from fedmmr_jax.runs import training
from fedmmr_jax.runs.checkpoint import Checkpoint, Progress, Rounds, Saver
from fedmmr_jax.simulation import Simulation

_JSON = flags.DEFINE_boolean('json', False, 'print JSON instead of tables')
_REPEATS = flags.DEFINE_integer(
  'repeats', 5, 'warm runs of each measurement', lower_bound=1
)
_COHORTS = flags.DEFINE_list(
  'cohorts',
  ['10', '100', '1000', '6040'],
  'cohort sizes to time; those above the number of clients are left out',
)
_CATALOGUES = flags.DEFINE_list(
  'catalogues',
  ['4000', '20000', '100000'],
  'catalogue sizes to time, the data set filled up with unseen items; those '
  'below its own are left out',
)
_PARTS = flags.DEFINE_list(
  'parts',
  ['round', 'saving', 'loop', 'cohort', 'catalogue'],
  'what to measure: round, saving, loop, cohort, catalogue, reading',
)
_LINES = flags.DEFINE_integer(
  'lines', 10_000_000, 'lines of the files of --parts=reading', lower_bound=1000
)

app.define_config_flags()

GEMM_SIZE = 2048
_ROUNDS_OF_BLOCK = 6
Figures = dict[str, Any]


def main() -> None:
  parts = {
    'round': _round,
    'saving': _saving,
    'loop': _loop,
    'cohort': _cohorts,
    'catalogue': _catalogues,
    'reading': _reading,
  }
  for part in _PARTS.value:
    if part not in parts:
      raise UserError(
        f'--parts={part}: no such part; there are {", ".join(parts)}'
      )
  _sizes(_COHORTS), _sizes(_CATALOGUES)  # before anything takes time
  config = app.config_from_flags()
  if config.client.drift_control != 'none':
    raise UserError(
      'the benchmark has no parts for --drift_control; leave it out'
    )
  dataset = load.load(config).dataset
  # An own cache: a compilation is cold the first time, whatever ran before.
  with tempfile.TemporaryDirectory() as cache:
    jax.config.update('jax_compilation_cache_dir', cache)
    result = {
      'dataset': dataset.name,
      'clients': dataset.num_clients,
      'items': dataset.num_items,
      'backend': jax.default_backend(),
      'devices': [d.device_kind for d in jax.devices()],
      'gemm_gflops': _gemm_gflops(),
    }
    for part in _PARTS.value:
      result[part] = parts[part](config, dataset)
  if 'round' in result:
    for work in ('training', 'evaluation'):
      result['round'][f'{work}_share_of_gemm'] = (
        result['round'][f'{work}_gflops'] / result['gemm_gflops']
      )
  result['peak_rss_mb'] = training.peak_rss_mb()
  print(json.dumps(result, indent=2) if _JSON.value else _tables(result))


def _sizes(flag: flags.FlagHolder[list[str]]) -> list[int]:
  """A list flag's numbers, ascending.

  Raises:
    UserError: one that is no positive number.
  """
  for word in flag.value:
    if not word.isdecimal() or not int(word):
      raise UserError(f'--{flag.name}: {word!r} is not a positive number')
  return sorted(map(int, flag.value))


def _seconds(run: Callable[[], Any], repeats: int | None = None) -> float:
  """Median of warm runs; `run` is called once more before, to compile."""
  jax.block_until_ready(run())
  times = []
  for _ in range(repeats or _REPEATS.value):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def _gemm_gflops() -> float:
  """Achieved by one large float32 product: what the machine can do."""
  a = jax.random.normal(jax.random.key(0), (GEMM_SIZE, GEMM_SIZE))
  product = jax.jit(jnp.matmul)
  return 2 * GEMM_SIZE**3 / _seconds(lambda: product(a, a), 10) / 1e9


class _Training:
  """A simulation that continues from round to round, as in a run."""

  def __init__(self, config: RunConfig, dataset: Dataset):
    self.simulation = simulation_lib.build(config, dataset)
    self.state = self.simulation.init_state()
    self.round = 0

  def run_round(self, cohort: np.ndarray | None = None):
    self.round += 1
    if cohort is None:
      cohort = self.simulation.sample_cohort(self.round)
    self.state, _ = self.simulation.run_round(self.state, self.round, cohort)
    return self.state


def _round(config: RunConfig, dataset: Dataset) -> Figures:
  """A round and an evaluation, split into their parts."""
  compile_seconds = _compile_seconds(config, dataset)
  run = _Training(config, dataset)
  simulation = run.simulation
  cohorts = [simulation.sample_cohort(n) for n in range(1, _REPEATS.value + 2)]
  sampling = _seconds(lambda: simulation.sample_cohort(1))
  whole = _seconds(run.run_round)
  state = run.state
  uploaded = jax.tree.map(  # None where nobody attends to them
    lambda x: jnp.tile(x, (cohorts[0].size, *[1] * x.ndim)),
    state.server.prototypes,
  )
  # The state is not donated here: it is needed again.
  aggregate = jax.jit(
    partial(
      server_lib.aggregate,
      collected=None,
      config=simulation.compiled_config,
      aggregator=simulation.aggregator,
      drift=simulation.drift,
    )
  )
  upload = round_lib.no_upload(simulation.program, state.server.params)
  everybody = Cohort(*[jnp.float32(1.0)] * 4)
  aggregation = _seconds(
    lambda: aggregate(
      state.server, upload, prototypes=uploaded, everybody=everybody
    )
  )
  evaluation = _seconds(lambda: simulation.evaluate(state, 'val'))
  targets = statistics.mean(map(simulation.count_targets, cohorts[1:]))
  steps = config.client.local_epochs * statistics.mean(
    round_lib.executed_steps(c, simulation.num_train, config)
    for c in cohorts[1:]
  )
  step_flops = _step_flops(simulation)
  ranked = len(ranking.evaluated_clients(config, dataset.num_clients))
  rank_flops = _rank_flops(simulation)
  return {
    'cohort': cohorts_lib.cohort_size(config, dataset.num_clients),
    'seconds': {
      'sampling': sampling,
      'local_training': whole - aggregation,
      'aggregation': aggregation,
      'evaluation': evaluation,
    },
    'clients_per_second': cohorts[0].size / whole,
    'targets_per_second': targets / whole,
    'milliseconds_per_target': 1e3 * whole / targets,
    'masked_fraction': statistics.mean(
      round_lib.masked_fraction(c, simulation.num_train, config)
      for c in cohorts[1:]
    ),
    'step_mflop': step_flops / 1e6,
    'training_gflops': steps * step_flops / whole / 1e9,
    'clients_ranked': ranked,
    'evaluation_gflops': ranked * rank_flops / evaluation / 1e9,
    'compile_seconds': compile_seconds,
  }


def _saving(config: RunConfig, dataset: Dataset) -> Figures:
  """What saving every round adds to a round, the same cohort: blocks of rounds
  that are saved and of rounds that are not take turns."""
  run = _Training(config, dataset)
  cohort = run.simulation.sample_cohort(1)
  jax.block_until_ready(run.run_round(cohort))
  seconds = {True: [], False: []}
  waited = []
  with tempfile.TemporaryDirectory() as folder:
    rounds = Rounds(folder, create=True)
    with Saver(rounds, config.keep) as saver:
      for block in range(2 * _REPEATS.value):
        saved = bool(block % 2)
        for number in range(_ROUNDS_OF_BLOCK):
          start = time.perf_counter()
          jax.block_until_ready(run.run_round(cohort))
          if saved:
            handed = time.perf_counter()
            saver.save(
              run.round, Checkpoint(run.state, Progress.start()), {}, 0.0
            )
            waited.append(time.perf_counter() - handed)
          # The first round of a block runs beside the last one's save.
          if number:
            seconds[saved].append(time.perf_counter() - start)
        saver.wait()
    size = rounds.size(rounds.last())
  with_saves, without = (statistics.median(seconds[s]) for s in (True, False))
  return {
    'bytes': size,
    'seconds_with': with_saves,
    'seconds_without': without,
    'added': with_saves / without - 1,
    'waited_seconds': statistics.median(waited),
  }


def _compile_seconds(config: RunConfig, dataset: Dataset) -> Figures:
  """From the data on the host to the first round's end, and the evaluation
  after it, work included: without and with the cache of an earlier start."""
  seconds = {}
  for start in ('cold', 'second'):
    jax.clear_caches()
    begin = time.perf_counter()
    run = _Training(config, dataset)
    jax.block_until_ready(run.run_round())
    seconds[f'{start}_start_to_first_round'] = time.perf_counter() - begin
    begin = time.perf_counter()
    run.simulation.evaluate(run.state, 'val')
    seconds[f'{start}_start_evaluation'] = time.perf_counter() - begin
  return seconds


def _step_flops(simulation: Simulation) -> float:
  """Forward and backward of one local step, as XLA counts them."""
  config, model = simulation.compiled_config, simulation.model
  state = simulation.init_state()
  broadcast = state.server.broadcast(simulation.catalogue, config)

  def step(params, client):
    view = client_view(simulation.data, client, simulation.max_items)
    batch = windows.cut_windows(
      view,
      jnp.arange(config.client.batch_size),
      jnp.ones(config.client.batch_size, bool),
      windows.window_stride(config.client, config.model.max_seq_len),
      config.model.max_seq_len,
    )
    negative = scoring.draw_negatives(jax.random.key(0), view, config)
    memory = jax.tree.map(lambda x: x[client], state.memories)
    return jax.grad(client_lib.step_loss, has_aux=True)(
      params,
      model,
      batch,
      negative,
      broadcast.catalogue,
      view_lib.view(
        model,
        memory,
        broadcast.catalogue,
        broadcast.prototypes,
        view_lib.asked_in_training(batch, negative),
        view.history,
        config.memory,
      ),
      jax.random.key(1),
      config,
    )

  return _flops(step, state.server.params, 0)


def _rank_flops(simulation: Simulation) -> float:
  """Scores of the whole catalogue for one client."""
  evaluation_ = dataclasses.replace(
    simulation.compiled_config.evaluation,
    items_per_eval_block=simulation.model.num_rows,
  )
  config = dataclasses.replace(
    simulation.compiled_config, evaluation=evaluation_
  )
  state = simulation.init_state()

  def rank(window, memory):
    return ranking.score_catalogue(
      simulation.model,
      config,
      state.server.broadcast(simulation.catalogue, config),
      window,
      memory,
    )

  return _flops(
    rank,
    jnp.ones(config.model.max_seq_len, jnp.int32),
    jax.tree.map(lambda x: x[0], state.memories),
  )


def _flops(function, *args) -> float:
  return jax.jit(function).lower(*args).cost_analysis()['flops']


def _loop(config: RunConfig, dataset: Dataset) -> Figures:
  """The vmapped round against a Python loop over jitted single clients."""
  run = _Training(config, dataset)
  simulation = run.simulation
  cohort = simulation.sample_cohort(1)
  key = round_lib.round_key(config.seed, 1)
  # A loop has one device: on more, each of them would do all of it.
  data, catalogue, state = jax.device_put(
    (simulation.data, simulation.catalogue, simulation.init_state()),
    jax.devices()[0],
  )

  @jax.jit
  def update(total, broadcast, memories, client):
    view = client_view(data, client, simulation.max_items)
    done = client_lib.local_update(
      simulation.program.client,
      broadcast,
      view,
      jax.tree.map(lambda x: x[client], memories),
      None,
      jax.random.fold_in(key, client),
      windows.num_steps(view.num_train, config),
    )
    return round_lib.add_updates(
      simulation.aggregator,
      total,
      jax.tree.map(lambda x: x[None], done),
      client[None],
    )

  def loop():
    broadcast = state.server.broadcast(catalogue, simulation.compiled_config)
    total = round_lib.no_upload(simulation.program, state.server.params)
    for client in cohort[cohort >= 0]:
      total = update(total, broadcast, state.memories, client)
    return total

  vmapped = _seconds(lambda: run.run_round(cohort))
  looped = _seconds(loop)
  return {
    'vmapped_seconds': vmapped,
    'looped_seconds': looped,
    'ratio': looped / vmapped,
  }


def _cohorts(config: RunConfig, dataset: Dataset) -> list[Figures]:
  """Growth of a round with the cohort."""
  rows = []
  for size in _sizes(_COHORTS):
    if size > dataset.num_clients:
      continue
    server = dataclasses.replace(
      config.server, client_fraction=size / dataset.num_clients
    )
    run = _Training(dataclasses.replace(config, server=server), dataset)
    cohort = run.simulation.sample_cohort(1)
    repeats = min(_REPEATS.value, 2) if size >= 1000 else None
    seconds = _seconds(lambda: run.run_round(cohort), repeats)
    targets = run.simulation.count_targets(cohort)
    rows.append(
      {
        'cohort': size,
        'seconds': seconds,
        'microseconds_per_target': 1e6 * seconds / targets,
        'peak_rss_mb': training.peak_rss_mb(),
      }
    )
  return rows


def _reading(*_) -> list[Figures]:
  """Files of every format."""
  return benchmark_reading.measure(_LINES.value)


def _catalogues(config: RunConfig, dataset: Dataset) -> list[Figures]:
  """Growth of a round with the catalogue, the same cohort."""
  rows = []
  for items in _sizes(_CATALOGUES):
    if items < dataset.num_items:
      continue
    run = _Training(config, _filled_up(dataset, items))
    cohort = run.simulation.sample_cohort(1)
    seconds = _seconds(lambda: run.run_round(cohort))
    rows.append(
      {
        'items': items,
        'seconds': seconds,
        'ratio': seconds / (rows[0]['seconds'] if rows else seconds),
        'peak_rss_mb': training.peak_rss_mb(),
      }
    )
  return rows


def _filled_up(dataset: Dataset, num_items: int) -> Dataset:
  """The data set with more items, which nobody consumed."""
  extra = num_items - dataset.num_items
  source = np.random.default_rng(0).integers(1, dataset.num_rows, extra)

  def longer(x):
    return np.concatenate([x, x[source]])

  new_ids = dataset.item_ids.max() + 1 + np.arange(extra)
  return dataclasses.replace(
    dataset,
    item_ids=np.concatenate([dataset.item_ids, new_ids]),
    features={name: longer(x) for name, x in dataset.features.items()},
    titles=(),
  )


def _tables(result: Figures) -> str:
  lines = [
    f'{result["dataset"]}: {result["clients"]} clients, {result["items"]} '
    f'items; {len(result["devices"])} x {result["devices"][0]}',
    f'a {GEMM_SIZE}³ float32 product: {result["gemm_gflops"]:.0f} GFLOP/s',
  ]
  if 'round' in result:
    lines += ['', *_round_lines(result['round'])]
  if 'saving' in result:
    saving = result['saving']
    lines += [
      '',
      f'saving every round ({saving["bytes"] / 1e6:.1f} MB) in the '
      f'background: {saving["seconds_with"]:.3f} s a round instead of '
      f'{saving["seconds_without"]:.3f}, {saving["added"]:+.1%}; the '
      f'loop waits {1e3 * saving["waited_seconds"]:.1f} ms',
    ]
  if 'loop' in result:
    loop = result['loop']
    lines += [
      '',
      f'the same cohort: vmapped {loop["vmapped_seconds"]:.2f} s, '
      f'a Python loop over jitted clients {loop["looped_seconds"]:.2f} '
      f's: {loop["ratio"]:.2f} times as long',
    ]
  if 'cohort' in result:
    lines += [
      '',
      console.table(
        ['cohort', 'seconds a round', 'µs a target', 'peak MB'],
        [
          [
            r['cohort'],
            f'{r["seconds"]:.2f}',
            f'{r["microseconds_per_target"]:.1f}',
            f'{r["peak_rss_mb"]:.0f}',
          ]
          for r in result['cohort']
        ],
      ),
    ]
  if 'catalogue' in result:
    lines += [
      '',
      console.table(
        ['items', 'seconds a round', 'ratio', 'peak MB'],
        [
          [
            r['items'],
            f'{r["seconds"]:.2f}',
            f'{r["ratio"]:.2f}',
            f'{r["peak_rss_mb"]:.0f}',
          ]
          for r in result['catalogue']
        ],
      ),
    ]
  if 'reading' in result:
    lines += [
      '',
      console.table(
        ['file', 'interactions', 'MB', 'seconds', 'peak MB'],
        [
          [
            r['file'],
            f'{r["interactions"]:,}',
            f'{r["bytes"] / 1e6:.0f}',
            f'{r["seconds"]:.1f}',
            f'{r["peak_rss_mb"]:.0f}',
          ]
          for r in result['reading']
        ],
      ),
    ]
  return '\n'.join([*lines, '', f'peak {result["peak_rss_mb"]:.0f} MB'])


def _round_lines(r: Figures) -> list[str]:
  compiled = r['compile_seconds']
  return [
    console.table(
      [
        f'a round of {r["cohort"]} clients',
        'seconds',
        'GFLOP/s',
        'of the product',
      ],
      [
        ['sampling', f'{r["seconds"]["sampling"]:.5f}', '-', '-'],
        [
          'local training',
          f'{r["seconds"]["local_training"]:.3f}',
          f'{r["training_gflops"]:.0f}',
          f'{r["training_share_of_gemm"]:.0%}',
        ],
        ['aggregation', f'{r["seconds"]["aggregation"]:.3f}', '-', '-'],
        [
          f'evaluation of {r["clients_ranked"]} clients, one split',
          f'{r["seconds"]["evaluation"]:.3f}',
          f'{r["evaluation_gflops"]:.0f}',
          f'{r["evaluation_share_of_gemm"]:.0%}',
        ],
      ],
    ),
    f'{r["clients_per_second"]:.1f} clients/s, '
    f'{r["targets_per_second"]:,.0f} targets/s '
    f'({r["milliseconds_per_target"]:.3f} ms a target), '
    f'{r["step_mflop"]:.0f} MFLOP a step, '
    f'masked {r["masked_fraction"]:.1%} of the executed steps',
    f'to the end of the first round, compiling included: '
    f'{compiled["cold_start_to_first_round"]:.1f} s on a cold start, '
    f'{compiled["second_start_to_first_round"]:.1f} s on the second; the '
    f'first evaluation {compiled["cold_start_evaluation"]:.1f} s and '
    f'{compiled["second_start_evaluation"]:.1f} s',
  ]


def cli() -> None:
  app.run(main)


if __name__ == '__main__':
  cli()
