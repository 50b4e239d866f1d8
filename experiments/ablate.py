"""Several variants × several seeds -> one table and one figure.

    python -m experiments.ablate \\
        --flagfile=experiments/presets/recommended.flags \\
        --data_dir=path/to/ml-1m --seeds=0,1,2 --workdir=ablation \\
        --variants=experiments/ablations/baselines.txt

Every variant is trained with every seed, all seeds in parallel in one compiled
program, and tested at its best validation round. Differences to the first
variant are paired over users. The folder keeps each variant's ranks, so a
second call resumes where the first one stopped. Results of other code, another
JAX version or another kind of machine are not used, with a message.
"""

import dataclasses
import hashlib
import json
import pathlib
import sys
from typing import Any, Sequence

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import app, console, figures
from experiments import variants as variants_lib
from fedmmr_jax import metrics as metrics_lib
from fedmmr_jax.config import RENAMED, RunConfig
from fedmmr_jax.data import load
from fedmmr_jax.data.load import Loaded
from fedmmr_jax.errors import UserError
from fedmmr_jax.evaluation import ablation, user_results
from fedmmr_jax.evaluation.ablation import Differences, Outcome, Variant
from fedmmr_jax.evaluation.ranking import Ranks
from fedmmr_jax.federation import attacks, communication
from fedmmr_jax.metrics import (
  EXPOSURE,
  FULL,
  HEADLINES,
  HR,
  NDCG,
  PROTOCOLS,
  SAMPLED,
)
from fedmmr_jax.runs import provenance, run_folder, training
from fedmmr_jax.simulation import NEW_CLIENTS

_VARIANTS = flags.DEFINE_string(
  'variants',
  'experiments/ablations/baselines.txt',
  'file with a variant a '
  'line, name: --flag=value …; see experiments/variants.py',
)
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'seeds of each variant')
_AT = flags.DEFINE_list(
  'at',
  None,
  'compare also by HR and NDCG at these cut-offs; trains nothing again',
)

app.define_config_flags()

TABLE, FIGURE, DATA = 'ablation.md', 'ablation.png', 'ablation.json'
BYTES_FIGURE = 'bytes.png'


def main() -> None:
  if not app.WORKDIR.value:
    raise UserError('name a folder for the results with --workdir')
  pyplot = figures.pyplot()  # before hours of training
  workdir = pathlib.Path(app.WORKDIR.value)
  seeds = variants_lib.seeds(_SEEDS.value)
  at = metrics_lib.parse_cutoffs(_AT.value) if _AT.present else ()
  base = app.config_from_flags()
  if base.evaluation.eval_clients and len(seeds) > 1:
    raise UserError(
      '--eval_clients draws other clients for each seed; leave it '
      'out, or name one seed'
    )
  variants = variants_lib.read(app.find_file(_VARIANTS.value))
  configs = _configured_all(base, variants)
  check_attacks(_VARIANTS.value, variants, configs)
  loaded = load.load(base)
  if at:
    metrics_lib.check_cutoffs(at, loaded.dataset.num_items)
  print('\n'.join([console.data_report(loaded), *console.no_gpu(base)]))
  print(
    f'\n{len(variants)} variants x {len(seeds)} seeds, {workdir}\n', flush=True
  )
  folder = workdir / 'variants'
  with run_folder.hold(folder) as lock:
    if lock.note:
      print(lock.note, flush=True)
    outcomes = _outcomes(variants, configs, loaded, seeds, folder, at)
  differences = ablation.differences(outcomes)
  table = markdown(outcomes, differences, base, seeds)
  (workdir / TABLE).write_text(table, 'utf-8')
  (workdir / DATA).write_text(
    json.dumps(as_json(outcomes, differences), indent=2, allow_nan=False) + '\n'
  )
  draw(pyplot, outcomes, differences, workdir / FIGURE)
  draw_bytes(
    pyplot,
    outcomes,
    base.evaluation.shown,
    loaded.dataset.num_clients,
    workdir / BYTES_FIGURE,
  )
  written = (TABLE, FIGURE, BYTES_FIGURE, DATA)
  print(f'\n{table}\n' + '   '.join(str(workdir / name) for name in written))


def check_attacks(
  place: str, variants: Sequence[Variant], configs: Sequence[RunConfig]
) -> None:
  """Refuses variants that would not rank the same clients."""
  told = {}
  for variant, config in zip(variants, configs):
    attack = attacks.of(config)
    who = (
      (attack.share, attack.draw, attack.target)
      if isinstance(attack, attacks.Attack)
      else None
    )
    told.setdefault(who, variant.name)
  if len(told) > 1:
    first, other = list(told.values())[:2]
    raise UserError(
      f'{place}: {first!r} and {other!r} have other attackers or '
      'another target, and so rank other clients; give --attack the same '
      'share, draw and target in each, and to a variant without an attack '
      '--attack=sleeping,share=…'
    )


def _outcomes(
  variants: Sequence[Variant],
  configs: Sequence[RunConfig],
  loaded: Loaded,
  seeds: Sequence[int],
  folder: pathlib.Path,
  at: tuple[int, ...] = (),
) -> dict[str, Outcome]:
  """Each variant's outcome, to be compared at these cut-offs too: as an earlier
  call left it, or found now."""
  outcomes = {}
  program = provenance.program()
  further = metrics_lib.further_metrics(configs[0].evaluation.metric_names)
  metrics_lib.own_names(further)  # before hours of training
  trained = None  # simulations and states of the first variant
  for variant, config in zip(variants, configs):
    from_first = variant.special in ablation.FROM_FIRST
    # Those with other features have flags of their own.
    told = configs[0] if variant.special in ablation.OTHER_FEATURES else config
    key = _key(variant, told, seeds, loaded)
    path = folder / f'{key}-{_digest(program)}.npz'
    if not path.exists():
      _tell_of_others(variant.name, folder, key, program)
    if path.exists():
      outcome = _load(path)
      print(f'{variant.name}: found in {path}')
    else:
      if from_first and trained is None:  # an earlier call kept its ranks only
        trained = _train(variants[0], configs[0], loaded, seeds)[1:]
      if variant.special:
        outcome = ablation.run_special(
          variant, config, loaded, seeds, *(trained or ((), ()))
        )
      else:
        outcome, *states = _train(variant, config, loaded, seeds)
        trained = trained or states
      _save(path, outcome, program)
    # A variant may measure more, to select its round by.
    outcome = outcome._replace(metrics=further, at=at)
    outcomes[variant.name] = outcome
    print(_line(variant.name, outcome), flush=True)
  return outcomes


def _tell_of_others(
  name: str, folder: pathlib.Path, key: str, program: provenance.Facts
) -> None:
  """Says why an earlier result of a variant is not used, if there is one."""
  others = sorted(folder.glob(f'{key}*.npz'), key=lambda p: p.stat().st_mtime)
  if others:
    difference = provenance.difference(_program(others[-1]), program)
    print(
      f'{name}: {others[-1]} is not used: '
      + (difference or 'it does not say what made it')
    )


def _train(variant: Variant, config: RunConfig, loaded, seeds):
  try:
    return _trained(variant, config, loaded, seeds)
  except UserError as error:
    raise UserError(f'variant {variant.name!r}: {error}') from None


def _trained(variant: Variant, config: RunConfig, loaded, seeds):
  with tqdm(
    total=config.server.num_rounds,
    unit='round',
    disable=None,
    file=sys.stdout,
    desc=variant.name,
  ) as bar:

    def on_round(number, validations):
      if validations:
        values = ''.join(
          f' {training.selection_value(found, number, config):.4f}'
          for found in validations
        )
        tqdm.write(
          f'{variant.name}  round {number}/{config.server.num_rounds}'
          f'  val {config.evaluation.select_by}{values}',
          file=sys.stdout,
        )
        sys.stdout.flush()
      bar.update()

    return ablation.run_trained(config, loaded, seeds, on_round)


def markdown(
  outcomes: dict[str, Outcome],
  differences: Differences,
  base: RunConfig,
  seeds: Sequence[int],
) -> str:
  """Ranking on the test item, cold items if any, and what training showed."""
  names = list(outcomes)
  users = outcomes[names[0]].ranks['test'].full.shape[1]
  return '\n'.join(
    [
      f'# {base.data.dataset}: {len(outcomes)} variants, seeds '
      + ', '.join(map(str, seeds)),
      '',
      f"Test item of {users} users at each seed's best validation round; mean "
      f'of {len(seeds)} seed(s). Differences are to “{names[0]}”, in brackets '
      'the 95 % interval of a bootstrap over users, paired; n.s. marks one '
      'that includes 0.',
      '',
      *_ranking_lines(outcomes, differences),
      *_further_lines(outcomes, differences),
      *_cold_lines(outcomes),
      *_new_client_lines(outcomes),
      *_history_lines(outcomes),
      *_bytes_lines(outcomes),
      *_cost_lines(outcomes, base, seeds),
      '',
      'Training, first round → last round, mean over the seeds '
      '(gradients: mean norm of a local step; hardest tenth: its share of the '
      'contrastive loss).',
      '',
      *_training_lines(outcomes),
      '',
    ]
  )


def _ranking_lines(outcomes, differences) -> list[str]:
  return _pipes(
    [
      'variant',
      *(
        column
        for protocol, metric in HEADLINES
        for column in (f'{metric} {protocol}', 'difference')
      ),
      *(f'{metric} {protocol}' for protocol, metric in _BESIDE),
      'best rounds',
    ],
    [
      [
        name,
        *_compared(outcome, differences[name], HEADLINES, is_baseline=not i),
        *(_mean(outcome, *which) for which in _BESIDE),
        ', '.join(map(str, outcome.best_rounds)) or '–',
      ]
      for i, (name, outcome) in enumerate(outcomes.items())
    ],
  )


def _further_lines(outcomes, differences) -> list[str]:
  """The same of further metrics, if there are any."""
  baseline = next(iter(outcomes.values()))
  further = baseline.headlines[len(HEADLINES) :]
  if not further:
    return []
  return [
    '',
    *_pipes(
      [
        'variant',
        *(
          column
          for protocol, metric in further
          for column in (f'{metric} {protocol}', 'difference')
        ),
      ],
      [
        [
          name,
          *_compared(outcome, differences[name], further, is_baseline=not i),
        ]
        for i, (name, outcome) in enumerate(outcomes.items())
      ],
    ),
  ]


def _compared(outcome, differences, headlines, is_baseline) -> list[str]:
  """Cells of a row: each mean, and its difference to the baseline."""
  cells = []
  for headline in headlines:
    d = differences[headline]
    cells += [
      _mean(outcome, *headline),
      ''
      if is_baseline
      else f'{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]'
      + ('' if d.is_clear else ' n.s.'),
    ]
  return cells


def _cold_lines(outcomes) -> list[str]:
  return _split_lines(
    outcomes,
    'cold',
    'Items held out of training, ranked as new ones for the clients '
    'that consumed one:',
  )


def _new_client_lines(outcomes) -> list[str]:
  return _split_lines(
    outcomes,
    NEW_CLIENTS,
    'Test items of clients that no round saw, each ranked from its own history '
    'alone:',
  )


def _split_lines(outcomes, split: str, title: str) -> list[str]:
  rows = [
    [name, *(_mean(outcome, *which, split) for which in _COLD_METRICS)]
    for name, outcome in outcomes.items()
    if split in outcome.ranks
  ]
  if not rows:
    return []
  return [
    '',
    title,
    '',
    *_pipes(
      [
        'variant',
        *(f'{metric} {protocol}' for protocol, metric in _COLD_METRICS),
      ],
      rows,
    ),
  ]


def _history_lines(outcomes) -> list[str]:
  """Full NDCG@10 of the test item by history length."""
  num_train = next(iter(outcomes.values())).num_train
  parts = user_results.by_history(np.asarray(num_train))
  if not parts:
    return []
  return [
    '',
    f'{NDCG} {FULL} of the test item by the number of training items of the '
    'user:',
    '',
    *_pipes(
      ['variant', *(f'{b} ({chosen.sum()} users)' for b, chosen in parts)],
      [
        [
          name,
          *(
            f'{outcome.of_each_user(FULL, NDCG)[chosen].mean():.4f}'
            for _, chosen in parts
          ),
        ]
        for name, outcome in outcomes.items()
      ],
    ),
  ]


def _bytes_lines(outcomes) -> list[str]:
  """What a client receives and returns in a round of each trained variant."""
  rows = []
  for name, outcome in outcomes.items():
    # Without what was asked before round 1, if there are more.
    spent = [
      communication.Traffic(**record['communication'])
      for lines in outcome.records
      for record in lines[1:] or lines
    ]
    if spent:
      total = sum(spent, communication.NOTHING)
      rows.append((name, total.per_visit))
  if not rows:
    return []
  first = rows[0][1]
  return [
    '',
    'What a client receives and returns in a round, four bytes a number where '
    'nothing is compressed:',
    '',
    *_pipes(
      ['variant', 'kB down', 'kB up', 'of the first, down', 'up'],
      [
        [
          name,
          f'{cost.bytes_down / 1e3:,.1f}',
          f'{cost.bytes_up / 1e3:,.1f}',
          f'1/{first.bytes_down / cost.bytes_down:.2f}',
          f'1/{first.bytes_up / cost.bytes_up:.2f}',
        ]
        for name, cost in rows
      ],
    ),
  ]


def _cost_lines(outcomes, base, seeds) -> list[str]:
  """What each trained variant and seed cost until the quality that all
  reach."""
  costs = communication.compared_costs(
    {
      f'{name}, seed {seed}' if len(seeds) > 1 else name: lines
      for name, outcome in outcomes.items()
      for seed, lines in zip(seeds, outcome.records)
    },
    *base.evaluation.shown,
  )
  if not costs.rows:
    return []
  return [
    '',
    f"Until the validation's {costs.metric} reached {costs.rows[0][1]:.4f}, "
    'which all variants reach:',
    '',
    *_pipes(
      ['variant', 'round', 'client visits', 'MB down', 'MB up'],
      [
        [
          name,
          str(reached.round),
          f'{reached.traffic.visits:,}',
          f'{reached.traffic.bytes_down / 1e6:,.1f}',
          f'{reached.traffic.bytes_up / 1e6:,.1f}',
        ]
        for name, _, reached in costs.rows
      ],
    ),
  ]


def _training_lines(outcomes) -> list[str]:
  figures = metrics_lib.ordered(
    dict.fromkeys(name for o in outcomes.values() for name in o.training)
  )
  rows = [
    [
      name,
      *(_figure(o.first_training.get(f), o.training.get(f)) for f in figures),
      f'{o.seconds:.0f}',
    ]
    for name, o in outcomes.items()
  ]
  return _pipes(
    ['variant', *(metrics_lib.figure(f).title for f in figures), 'seconds'],
    rows,
  )


def _mean(
  outcome: Outcome, protocol: str, metric: str, split: str = 'test'
) -> str:
  return f'{np.mean(outcome.of_each_seed(protocol, metric, split)):.4f}'


_BESIDE = ((SAMPLED, NDCG), (FULL, HR))
_COLD_METRICS = ((SAMPLED, HR), (SAMPLED, NDCG), (FULL, HR), (FULL, NDCG))


def as_json(
  outcomes: dict[str, Outcome], differences: Differences
) -> dict[str, Any]:
  """Every seed's metrics and the differences, for programs."""
  return {
    name: {
      'seeds': {
        split: {
          f'{protocol} {metric}': o.of_each_seed(protocol, metric, split)
          for protocol in PROTOCOLS
          for metric in dict.fromkeys(metric for _, metric in o.headlines)
          if metric != EXPOSURE or protocol == FULL
        }
        for split in o.ranks
      },
      'difference': {
        ' '.join(headline): d._asdict()
        for headline, d in differences[name].items()
      },
      'best_rounds': o.best_rounds,
      'training': o.training,
      'first_training': o.first_training,
      'seconds': o.seconds,
    }
    for name, o in outcomes.items()
  }


def draw(
  pyplot,
  outcomes: dict[str, Outcome],
  differences: Differences,
  path: pathlib.Path,
) -> None:
  """Differences to the baseline with intervals, one panel per metric."""
  baseline, *others = outcomes
  figure, axes = pyplot.subplots(
    1,
    2,
    sharey=True,
    figsize=(10, 1.2 + 0.38 * len(others)),
    layout='constrained',
    squeeze=False,
  )
  for axis, (protocol, metric) in zip(axes[0], HEADLINES):
    for row, name in enumerate(others):
      d = differences[name][protocol, metric]
      colour = (
        '#59636e' if not d.is_clear else '#0969da' if d.mean > 0 else '#bc4c00'
      )
      axis.plot([d.low, d.high], [row, row], color=colour, linewidth=2)
      axis.plot(d.mean, row, 'o', color=colour)
    axis.axvline(0, color='#1b1f24', linewidth=0.8)
    value = _mean(outcomes[baseline], protocol, metric)
    axis.set_xlabel(f'{metric}, {protocol}: difference to {value}')
    axis.grid(axis='x', color='#d1d9e0', linewidth=0.6)
    axis.spines[['top', 'right', 'left']].set_visible(False)
    axis.tick_params(axis='y', length=0)
  axes[0][0].set_yticks(range(len(others)), others)
  axes[0][0].invert_yaxis()
  figure.suptitle(f'Differences to “{baseline}”, 95 % intervals')
  figure.savefig(path, dpi=150)


def draw_bytes(
  pyplot,
  outcomes: dict[str, Outcome],
  shown: tuple[str, str],
  num_clients: int,
  path: pathlib.Path,
) -> None:
  """A validation metric over the bytes that were moved until then, for each
  client in the mean: up, and both ways; one curve per variant, the mean of its
  seeds.

  Args:
    pyplot: of matplotlib.
    outcomes: of all variants; those without rounds are not drawn.
    shown: (protocol, metric) of the validations.
    num_clients: K.
    path: of the picture.
  """
  protocol, metric = shown
  figure, axes = pyplot.subplots(
    1, 2, sharey=True, figsize=(11, 5), layout='constrained'
  )
  colours = pyplot.get_cmap('tab10').colors
  for number, (name, outcome) in enumerate(outcomes.items()):
    found = [
      communication.curve(lines, protocol, metric) for lines in outcome.records
    ]
    if not found or not found[0]:
      continue
    values = np.mean([[value for _, value in curve] for curve in found], axis=0)
    for axis, parts in ((axes[0], ('bytes_up',)), (axes[1], _BOTH_WAYS)):
      spent = np.mean(
        [
          [sum(getattr(cost, part) for part in parts) for cost, _ in curve]
          for curve in found
        ],
        axis=0,
      )
      axis.plot(
        spent / num_clients / 1e6,
        values,
        marker='.',
        color=colours[number % len(colours)],
        linestyle=('-', '--', ':')[number // len(colours) % 3],
        label=name,
      )
  for axis, what in zip(axes, ('sent', 'sent and received')):
    axis.set_xscale('log')
    axis.xaxis.set_major_locator(pyplot.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter('{x:g}')
    axis.xaxis.set_minor_formatter('')
    axis.set_xlabel(f'MB {what} per client so far, mean of all clients')
    axis.grid(color='#d1d9e0', linewidth=0.6)
    axis.spines[['top', 'right']].set_visible(False)
  axes[0].set_ylabel(f'{metric}, {protocol}, validation')
  if axes[0].lines:
    figure.legend(
      *axes[0].get_legend_handles_labels(),
      loc='outside right center',
      frameon=False,
    )
  figure.savefig(path, dpi=150)


_BOTH_WAYS = ('bytes_up', 'bytes_down')


def _configured_all(
  base: RunConfig, variants: Sequence[Variant]
) -> list[RunConfig]:
  """The settings of each variant."""
  configs = []
  for variant in variants:
    tuned = variant.special == ablation.FINE_TUNED
    # What is fine-tuned is the first variant's model.
    flags = (variants[0].flags if tuned else {}) | variant.flags
    config = _configured(base, variant._replace(flags=flags))
    if tuned and config != dataclasses.replace(
      configs[0], client=config.client
    ):
      raise UserError(
        f'{_VARIANTS.value}: variant {variant.name!r}: {variant.special} '
        "trains the first variant's model, and takes flags of the client's "
        'training alone: '
        + ', '.join(f'--{name}' for name in _TUNED_BY)
        + ' and so on'
      )
    configs.append(config)
  return configs


_TUNED_BY = ('local_epochs', 'client_learning_rate', 'freeze')


def _configured(base: RunConfig, variant: Variant) -> RunConfig:
  place = f'{_VARIANTS.value}: variant {variant.name!r}'
  for flag in variant.flags:
    name = RENAMED[flag][0].partition('=')[0] if flag in RENAMED else flag
    # The data is loaded once, and differences are paired over users.
    if name in dataclasses.asdict(base.data) or name in (
      'seed',
      'eval_clients',
      'metrics',
    ):
      raise UserError(
        f'{place}: --{name} is the same for all variants; give '
        'it on the command line'
      )
  try:
    return base.changed(variant.flags).validate()
  except UserError as error:
    raise UserError(f'{place}: {error}') from None


def _key(variant: Variant, config: RunConfig, seeds, loaded) -> str:
  """Start of a file name that changes with whatever was asked for; what made
  the result (`provenance.program`) ends it."""
  slug = ''.join(c if c.isalnum() else '-' for c in variant.name.lower())
  return f'{slug}-' + _digest(
    [
      variant.special,
      # Of ranks that are kept, other metrics can be had too.
      config.as_flat_dict() | {'metrics': ''},
      list(seeds),
      loaded.dataset.fingerprint(),
    ]
  )


def _digest(told: Any) -> str:
  return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[
    :8
  ]


def _save(
  path: pathlib.Path, outcome: Outcome, program: provenance.Facts
) -> None:
  arrays = {
    f'{split}/{name}': value
    for split, ranks in outcome.ranks.items()
    for name, value in ranks._asdict().items()
  }
  told = json.dumps({**outcome._asdict(), 'ranks': None, 'metrics': ()})
  temporary = path.with_suffix('.tmp')
  with temporary.open('wb') as file:
    np.savez_compressed(
      file, outcome=told, program=json.dumps(program), **arrays
    )
  temporary.replace(path)


def _program(path: pathlib.Path) -> provenance.Facts:
  """What made a saved outcome; nothing if it does not say."""
  try:
    with np.load(path) as saved:
      return json.loads(str(saved['program']))
  except Exception:  # older, or damaged: it is not used either way
    return {}


def _load(path: pathlib.Path) -> Outcome:
  try:
    with np.load(path) as saved:
      told = json.loads(str(saved['outcome']))
      splits = {name.split('/')[0] for name in saved.files if '/' in name}
      ranks = {
        split: Ranks(
          **{
            name: saved[f'{split}/{name}']
            for name in Ranks._fields
            if f'{split}/{name}' in saved
          }
        )
        for split in splits
      }
      return Outcome(**{**told, 'ranks': ranks})
  except Exception as error:  # NumPy raises what the damage leads to
    raise UserError(
      f'{path}: damaged ({error}); delete it, and the variant is trained again'
    ) from None


def _line(name: str, outcome: Outcome) -> str:
  return (
    f'{name}: test '
    + ', '.join(
      f'{metric} {protocol} '
      + ' '.join(f'{v:.4f}' for v in outcome.of_each_seed(protocol, metric))
      for protocol, metric in HEADLINES
    )
    + f', {outcome.seconds:.0f} s'
  )


def _figure(first: float | None, last: float | None) -> str:
  if last is None:
    return '–'
  return f'{"–" if first is None else format(first, ".3g")} → {last:.3g}'


def _pipes(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  lines = [header, ['---'] * len(header), *rows]
  return ['| ' + ' | '.join(line) + ' |' for line in lines]


def cli() -> None:
  app.run(main)


if __name__ == '__main__':
  cli()
