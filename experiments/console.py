"""What the binaries print: banner, data report, round lines, tables."""

from typing import Any, Sequence

import jax
import numpy as np

from experiments import app
from fedmmr_jax import metrics, presets
from fedmmr_jax.client import windows
from fedmmr_jax.config import (
  Constant,
  ContentInit,
  Gated,
  ModelConfig,
  NoMemory,
  RunConfig,
  Schedule,
)
from fedmmr_jax.data import dataset as dataset_lib
from fedmmr_jax.data import features
from fedmmr_jax.data.load import Loaded
from fedmmr_jax.federation import cohorts, devices
from fedmmr_jax.federation.privacy import Plan
from fedmmr_jax.models import groups
from fedmmr_jax.runs import warm_start
from fedmmr_jax.runs.warm_start import WarmStart
from fedmmr_jax.simulation import NEW_CLIENTS, Simulation

MAX_METRICS = 9  # columns of a table


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """A plain table; numbers right-aligned, the first column and words left."""
  cells = [list(map(str, row)) for row in (header, *rows)]
  widths = [max(map(len, column)) for column in zip(*cells)]
  left = [
    i == 0 or not all(c[:1].isdigit() or c == '-' for c in column[1:])
    for i, column in enumerate(zip(*cells))
  ]
  lines = []
  for row in cells:
    lines.append(
      '  '.join(
        cell.ljust(width) if is_left else cell.rjust(width)
        for cell, width, is_left in zip(row, widths, left)
      ).rstrip()
    )
  lines.insert(1, '  '.join('-' * width for width in widths))
  return '\n'.join(lines)


def short(title: str) -> str:
  """A title for a table: 42 characters at most."""
  return title if len(title) <= 42 else title[:41].rstrip() + '…'


def data_report(loaded: Loaded) -> str:
  """Size of the data set, what was left out, integrity of the features."""
  dataset = loaded.dataset
  lengths = dataset.lengths
  lines = [
    *map(app.as_flags, loaded.notes),
    f'{dataset.name}: {dataset.num_clients} clients, {dataset.num_items} '
    f'items, {len(dataset.items)} interactions '
    f'({lengths.min()} to {lengths.max()} a client)',
  ]
  if loaded.dropped_users:
    shown = ', '.join(map(str, loaded.dropped_users[:5]))
    more = ', …' if len(loaded.dropped_users) > 5 else ''
    lines.append(
      f'left out {len(loaded.dropped_users)} user(s) with too few '
      'interactions (an item to train on or to start from, and one for each '
      'target): '
      f'{shown}{more}'
    )
  lines += map(str, loaded.integrity)
  if loaded.cold:
    lines.append(
      f'cold       {dataset.num_cold} items held out of training, the '
      f'targets of {len(loaded.cold.clients)} clients'
    )
  for kind in features.KINDS:
    if kind not in dataset.features:
      lines.append(f'{kind:6} features  none: this expert is left out')
  return '\n'.join(lines)


def banner(simulation: Simulation) -> str:
  """How the model works, in this configuration."""
  config = simulation.config
  c, s = config.client, config.server
  trained = len(
    dataset_lib.taking_part(simulation.num_train, config.data.new_clients)
  )
  size = cohorts.cohort_size(config, trained)
  steps = windows.num_steps(simulation.num_train, config).mean()
  contrastive = (
    config.contrastive.name
    if simulation.model.has_pairs
    else 'none, it needs two experts'
  )
  return '\n'.join(
    [
      f'FedDMMR on {jax.default_backend()} ({_hands()})',
      *no_gpu(config),
      f'  backbone   SASRec, {config.model.num_blocks} blocks, D='
      f'{config.model.hidden_dim}, window {config.model.max_seq_len}',
      *(f'  {line}' for line in _history_lines(config.model)),
      *(f'  {line}' for line in _fusion_lines(simulation)),
      f'  loss       cross-entropy against {c.num_negatives} negatives '
      f'({c.negatives}), {c.objective.name}{_emphasis(c.objective)}; '
      f'contrastive: {contrastive}',
      f'  client     {_stepping(c)}, '
      f'epochs {c.local_epochs}, batch {c.batch_size} '
      f'({steps:.0f} steps on average)'
      + (f', frozen: {", ".join(c.frozen_groups)}' if c.freeze else '')
      + _own_parts(config),
      f'  server     {_averaged(s)}{s.server_optimizer} '
      f'{s.server_learning_rate:g}'
      f'{_decay(s.server_schedule)}, '
      f'{size} of {trained} clients a round, '
      f'rounds {s.num_rounds}, seed {config.seed}',
      *_privacy_lines(simulation.privacy),
      *_out_of_cohorts(simulation),
    ]
  )


def _privacy_lines(plan: Plan | None) -> list[str]:
  """What bounds a client, and what the run will have spent."""
  if plan is None:
    return []
  told = plan.told(plan.rounds)
  lines = [
    f'  privacy    {told["mechanism"]}, clip norm {told["clip_norm"]:g}'
    + ('' if not plan.mechanism.quantile else ' at first')
    + (
      f', noise multiplier {told["noise_multiplier"]:.4g}'
      if plan.noise_multiplier
      else ', no noise: no privacy'
    )
  ]
  if plan.noise_multiplier:
    lines.append(
      f'             epsilon {told["epsilon"]:.4g} at delta '
      f'{told["delta"]:.3g} after {plan.rounds} rounds '
      f'({told["sampling"]} sampling, neighbours: {told["neighbours"]}, '
      f'{told["accountant"]})'
    )
  if plan.is_assumed:
    lines.append(
      f'             as if cohorts were {plan.schedule.cohort:g} of '
      f'{plan.schedule.population:g} clients: noise and epsilon are of that '
      'federation, not of this one'
    )
  return lines


def _own_parts(config: RunConfig) -> str:
  own = config.federation.personal_groups
  return f', its own: {", ".join(own)}' if own else ''


def no_gpu(config: RunConfig) -> list[str]:
  """A line if the settings are those of gpu.flags and there is no GPU."""
  usual = RunConfig().as_flat_dict()
  wide = {
    name: value
    for name, value in presets.preset('gpu').as_flat_dict().items()
    if value != usual[name]
  }
  if jax.default_backend() != 'cpu' or wide.items() - (
    config.as_flat_dict().items()
  ):
    return []
  return [
    '  no GPU     JAX found none and runs on the CPU, where gpu.flags makes it '
    'slower: leave it out, or see docs/quickstart.md, On a GPU'
  ]


def _out_of_cohorts(simulation: Simulation) -> list[str]:
  """Clients that no cohort is drawn of, and why."""
  drawn = dataset_lib.draw_new_clients(
    simulation.dataset.num_clients, simulation.config.data.new_clients
  )
  without = (np.delete(simulation.num_train, drawn) == 0).sum()
  lines = []
  if drawn.size:
    lines.append(
      f'  new        {drawn.size} further clients are in no cohort, and ranked '
      'at the end'
    )
  if without:
    lines.append(
      f'  untrained  {without} further clients have nothing to train on: they '
      'are in no cohort, and ranked like the others'
    )
  return lines


def _hands() -> str:
  """How many workers or devices share a cohort."""
  number, kind = (
    (devices.workers(), 'worker')
    if devices.count() == 1 and devices.num_shards() > 1
    else (devices.count(), 'device')
  )
  return f'{number} {kind}{"s"[: number > 1]}'


def warm_start_report(start: WarmStart, frozen: Sequence[str]) -> str:
  """What was loaded, what keeps its initial values, what did not fit."""
  places = groups.all_paths(frozen)
  rows = [
    [
      part.name,
      part.group,
      part.status,
      f'{part.count:,}',
      'frozen'
      if part.status != warm_start.UNFIT
      and any(groups.is_within(part.name, place) for place in places)
      else '',
      part.note.ljust(1),
    ]
    for part in start.table
  ]
  return (
    f'warm start from {start.source}; the server optimizer starts '
    'afresh\n' + table(['part', 'group', 'status', 'numbers', '', 'note'], rows)
  )


def _stepping(config) -> str:
  """How a client takes its steps."""
  optimizer = str(config.client_optimizer)
  if config.drift_control == 'mime_lite':
    optimizer = 'the server optimizer (MimeLite)'
  elif config.drift_control != 'none':
    optimizer += f' with {config.drift_control}'
  return (
    f'{optimizer} {config.client_learning_rate:g}'
    f'{_decay(config.client_schedule)}'
  )


def _emphasis(objective) -> str:
  """How much more late targets count, if they do."""
  e = objective.late_emphasis
  return f', weighed {1 - e:.3g} (first) to {1 + e:.3g} (last)' if e else ''


def _averaged(server) -> str:
  return '' if server.aggregator == 'fedavg' else f'{server.aggregator}, '


def _decay(schedule: Schedule) -> str:
  return '' if isinstance(schedule, Constant) else f' ({schedule.name} decay)'


def _history_lines(model: ModelConfig) -> list[str]:
  """How whole histories enter the model."""
  lines = []
  start = model.item_embedding
  if isinstance(start, ContentInit) and start.collaborative_dim:
    of = (
      f' of the {start.collaborative_items} items that most have'
      if start.collaborative_items
      else ''
    )
    lines.append(
      f'items      {start.collaborative_dim} of {model.hidden_dim} '
      f'directions of their content are co-occurrence{of}, sketched before '
      f'round 1 by {start.collaborative_rounds} cohorts'
    )
  if model.profile:
    lines.append(
      'profile    the mean of what left the window, added to the '
      'sequence and mixed with it'
    )
  return lines


def _fusion_lines(simulation: Simulation) -> list[str]:
  model, config = simulation.model, simulation.config
  if model.is_backbone_only:
    why = 'none asked for'
    if config.model.expert_forms:
      why = 'the data set has features for none of them'
    return [f'experts    none, {why}: the backbone alone, ⟨s, e⟩']
  experts = [m.name for m in model.modalities]
  parts = ' + '.join(f'w_{e[:3]}·LN({e})' for e in experts)
  memory = config.memory
  score = (
    ', scored by inner product'
    if config.model.fusion.similarity == 'dot'
    else ''
  )
  lines = [
    f'experts    {", ".join(experts)}, over '
    + (
      f'{memory.retrieval_size} of {memory.num_slots} entries of the '
      f"client's own memory ({memory.name})"
      if not isinstance(memory, NoMemory)
      else 'no memory'
    )
    + (
      " and the candidate's own features"
      if config.model.expert_form.sees_candidate
      else ''
    )
  ]
  if isinstance(config.model.fusion, Gated):
    return lines + [
      f'fusion     LN(s) + g·({parts}), GATED: g starts at '
      f"{config.model.fusion.init:g} and scales the experts' "
      f'gradient{score}'
    ]
  return lines + [
    f'fusion     LN(s) + {parts}; no gate stands before the experts, '
    f'their gradient is full{score}'
  ]


def round_line(record: dict[str, Any], num_rounds: int) -> str:
  """One line for one finished round."""
  train = record['train']
  shares = metrics.members(train, metrics.ROUTER_WEIGHT)
  parts = [
    f'round {record["round"]:>{len(str(num_rounds))}}/{num_rounds}',
    _privacy_told(record['privacy'])
    if record.get('privacy')
    else 'nothing trained, nobody in the cohort has a positive'
    if train[metrics.LOSS] is None
    else _told('loss', train[metrics.LOSS], '.4f'),
    'router ' * bool(shares)
    + ' '.join(f'{expert} {share:.2f}' for expert, share in shares.items()),
    _told('inst.weight', train[metrics.INSTANCE_WEIGHT], '.3f'),
    _told('memory', train[metrics.MEMORY_FILL], '.0%'),
    _answers(record),
  ]
  if 'val' in record:
    parts.append(
      f'val {metrics.HR} '
      + ' '.join(
        f'{record["val"][protocol][metrics.HR]:.4f} {protocol}'
        for protocol in metrics.PROTOCOLS
      )
    )
  parts.append(f'{record["seconds"]:.1f} s')
  return '  '.join(part for part in parts if part)


def _privacy_told(privacy: dict[str, Any]) -> str:
  spent = _told('epsilon', privacy['epsilon'], '.3f') or 'no noise'
  return spent + ' (assumed cohort)' * privacy['assumed']


def _answers(record: dict[str, Any]) -> str:
  """What became of those who were asked, if it was not an answer of each."""
  counts = metrics.members(record['train'], metrics.CLIENTS)
  asked, answered = counts.pop('asked', 0), counts.pop('answered', 0)
  missing = [
    f'{number} {name.replace("_", " ")}'
    for name, number in counts.items()
    if number
  ]
  told = ''
  if missing:
    told = f'{answered} of {asked} answers count ({", ".join(missing)})'
  if record.get('skipped'):
    told = (told or f'{answered} answers') + ': too few, nothing is changed'
  return told


def _told(title: str, value: float | None, form: str) -> str:
  return '' if value is None else f'{title} {value:{form}}'


def progress(record: dict[str, Any]) -> dict[str, float]:
  """What the progress bar shows: loss, and validation if there was one."""
  loss = record['train'][metrics.LOSS]
  figures = {} if loss is None else {'loss': loss}
  if 'val' in record:
    figures |= {
      f'{metrics.HR} {protocol}': values[metrics.HR]
      for protocol, values in record['val'].items()
    }
  return figures


def ranking_table(
  found: dict[str, dict[str, dict[str, float]]], cutoff: int = 10
) -> str:
  """Rows: split and protocol; columns: each metric at its cutoffs or, if those
  are too many for a line, only at one."""
  first = next(iter(next(iter(found.values())).values()))
  kinds = list(dict.fromkeys(name.partition('@')[0] for name in first))
  kinds.sort(key=lambda kind: kind in first)  # what has no cutoff last
  names = [
    name for kind in kinds for name in first if name.partition('@')[0] == kind
  ]
  if len(names) > MAX_METRICS:
    names = [n for n in names if '@' not in n or n.endswith(f'@{cutoff}')]
  return table(
    ['', *names],
    [
      [f'{split}, {protocol}', *(f'{values[name]:.4f}' for name in names)]
      for split, protocols in found.items()
      for protocol, values in protocols.items()
    ],
  )


def _acceptance_line(point: dict[str, Any]) -> str:
  mark = {True: 'yes', False: 'NO', None: '-'}[point['passed']]
  return f'  {mark:3}  {point["name"]} ({point["target"]}): {point["measured"]}'


def _privacy_spent(privacy: dict[str, Any] | None) -> list[str]:
  if not privacy:
    return []
  if privacy['epsilon'] is None:
    return ['updates clipped, no noise: no privacy\n']
  assumed = privacy['assumed_cohort']
  return [
    f'epsilon {privacy["epsilon"]:.4g} at delta {privacy["delta"]:.3g}'
    + (
      f', as if cohorts were {assumed:g} of {privacy["assumed_clients"]:g} '
      'clients'
      if assumed
      else ''
    )
    + " (the metrics below are the experiment's, and not covered)\n"
  ]


def final_table(summary: dict[str, Any]) -> str:
  """Both protocols of validation and test at the best round, and costs."""
  rows = {
    metrics.SPLIT_TITLES.get(split, split): summary[split]
    for split in ('val', 'test', 'cold', 'cold_popularity', NEW_CLIENTS)
    if split in summary
  }
  return '\n'.join(
    [
      f'\nbest round {summary["best_round"]} of {summary["rounds"]}\n',
      *_privacy_spent(summary.get('privacy')),
      ranking_table(rows),
      '\nacceptance',
      *map(_acceptance_line, summary['acceptance']),
      f'\n{summary["wall_seconds"]:.1f} s in all, '
      f'{summary["round_seconds_median"]:.2f} s training a round (median), '
      + (
        f'{summary["targets_per_second"]:,.0f} targets/s, '
        if summary['targets_per_second'] is not None
        else ''
      )
      + f'{summary["peak_rss_mb"]:,.0f} MB',
    ]
  )
