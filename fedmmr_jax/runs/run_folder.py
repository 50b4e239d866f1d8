"""The JSON files of a run: `config.json`, `ids.json`, `metrics.jsonl`,
`summary.json`.

JSON is strict: a value that is not a number is null, never NaN.
"""

import json
import os
import pathlib
import zipfile
import zlib
from typing import Any, Sequence

import numpy as np

from fedmmr_jax.config import RunConfig
from fedmmr_jax.data.dataset import Dataset
from fedmmr_jax.data.features import IntegrityReport
from fedmmr_jax.errors import UserError
from fedmmr_jax.files import Lock, replace
from fedmmr_jax.runs import provenance

CONFIG, IDS, METRICS = 'config.json', 'ids.json', 'metrics.jsonl'
SUMMARY, ROUNDS, REPORT = 'summary.json', 'rounds', 'report.html'
CONTENT = 'content.npz'  # it has a checksum of its own
LOCK = '.lock'
CHECKSUM = 'checksum'  # a key of config.json and ids.json
# Of the checkpoints; 1 had the server optimizers' state in another structure,
# 2 no checksums, 3 memories and prototypes that nobody read, 4 memories that
# candidates met their own entries in (today's sees=stored).
FORMAT = 7
# Settings that may change when a run is continued
# (that the data is the same is checked by its fingerprint).
MAY_CHANGE = (
  'num_rounds',
  'patience',
  'eval_every',
  'metrics',
  'clients_per_eval_chunk',
  'items_per_eval_block',
  'data_dir',
  'item_file',
  'visual_features',
  'text_features',
  'keep',
)


def hold(path: pathlib.Path) -> Lock:
  """Makes a folder and locks out other processes until the result is closed,
  or notes that its file system has no locks.

  Raises:
    UserError: another process holds it, or the folder cannot be written.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
    return Lock(path / LOCK)
  except BlockingIOError:
    raise UserError(
      f'{path}: another process is training in this folder; wait '
      'for it, or name another folder'
    ) from None
  except OSError as error:
    raise UserError(f'{path}: cannot be written ({error.strerror})') from None


class RunFolder:
  """One run's folder; creating the object touches nothing."""

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    self._lock: Lock | None = None  # while this process trains here

  def holds_run(self) -> bool:
    return any(
      (self.path / name).exists() for name in (CONFIG, METRICS, SUMMARY, ROUNDS)
    )

  def check_free(self, resume: bool) -> None:
    """Refuses a folder that holds a run, unless it is to be resumed.

    Raises:
      UserError: see above, or `path` is no folder.
    """
    if self.path.exists() and not self.path.is_dir():
      raise UserError(f'{self.path} is a file; name a folder')
    if self.holds_run() and not resume:
      raise UserError(
        f'{self.path} already holds a run; continue it, or name another folder'
      )

  def hold(self, config: RunConfig) -> None:
    """The part of `start` that needs no data; raises as it."""
    if self._lock is None:
      self._lock = hold(self.path)
    if (self.path / CONFIG).exists():
      self._check_same(config)

  def start(
    self,
    config: RunConfig,
    dataset: Dataset,
    integrity: Sequence[IntegrityReport] = (),
  ) -> None:
    """Writes `config.json` and `ids.json` (the ids of the checkpoints' rows),
    or checks that they match when a run is resumed. After that, no other
    process can start here while this object exists (but see `lock_note`).

    Args:
      config: the settings.
      dataset: the data.
      integrity: the results of its feature checks.

    Raises:
      UserError: the folder's run had other settings or other data, another
        process trains in it, or it cannot be written.
    """
    self.hold(config)
    versions, machine = provenance.versions(), provenance.machine()
    if (self.path / CONFIG).exists():
      self.check_data(dataset)
      versions = self._read(CONFIG, 'versions')
      machine = self._read(CONFIG).get('machine', {})  # older runs have none
    try:
      self._write(
        CONFIG,
        _with_checksum(
          {
            'format': FORMAT,
            'flags': config.as_flat_dict(),
            'versions': versions,
            'machine': machine,
            'data_fingerprint': dataset.fingerprint(),
            'integrity': [report._asdict() for report in integrity],
          }
        ),
      )
      self._write(
        IDS,
        _with_checksum(
          {
            'user_ids': dataset.user_ids.tolist(),
            'item_ids': dataset.item_ids.tolist(),
            'titles': dataset.titles,
          }
        ),
        indent=None,
      )
    except OSError as error:
      raise UserError(
        f'{self.path}: cannot be written ({error.strerror})'
      ) from None

  @property
  def is_started(self) -> bool:
    """Whether this object holds the folder."""
    return self._lock is not None

  @property
  def lock_note(self) -> str:
    """A line to show if the file system of a started run has no locks, so that
    nothing keeps other processes out; else ''."""
    return self._lock.note if self._lock else ''

  def moved(self) -> str | None:
    """A line about what affects rounding and has changed since the run began:
    the versions of JAX, the machine. None if nothing has."""
    began = self._read(CONFIG)
    changed = provenance.difference(
      began['versions'] | began.get('machine', {}),
      provenance.jax_versions() | provenance.machine(),
    )
    return (
      (
        f'continued under other conditions: {changed}; the results agree '
        'to rounding, not bit for bit'
      )
      if changed
      else None
    )

  def config(self) -> RunConfig:
    """The settings of the run in this folder.

    Raises:
      UserError: no run here, or its config.json is damaged.
    """
    flags = self.flags()  # names the file itself
    try:
      return RunConfig.from_flat_dict(flags).validate()
    except UserError as error:
      raise UserError(f'{self.path / CONFIG}: {error}') from None

  def integrity(self) -> list[IntegrityReport]:
    """The results of the feature checks when the run was started."""
    return [
      IntegrityReport(**report) for report in self._read(CONFIG, 'integrity')
    ]

  def told(self) -> dict[str, Any]:
    """What loggers get: 'flags' (the settings), 'versions', 'machine' and
    'data_fingerprint'; raises as `config`."""
    content = self._read(CONFIG)
    names = ('flags', 'versions', 'machine', 'data_fingerprint')
    return {name: content[name] for name in names if name in content}

  def flags(self) -> dict[str, Any]:
    """Flag name -> value of the run in this folder; raises as `config`."""
    return self._read(CONFIG, 'flags')

  def check_format(self) -> None:
    """Raises UserError if the run was made by a version whose checkpoints have
    another structure."""
    found = self._read(CONFIG).get('format', 1)
    if found != FORMAT:
      raise UserError(
        f'{self.path}: its checkpoints are of format {found}, this version '
        f'reads format {FORMAT}; use the version that began the run'
      )

  def check_data(self, dataset: Dataset) -> None:
    """Raises UserError if this is not the data the run was trained on, or if
    `check_format` does."""
    self.check_format()
    same = self.data_fingerprint() == dataset.fingerprint()
    if not same and not self.is_of_network(dataset):
      raise UserError(
        f'{self.path}: the run was trained on other data; the files of '
        '`data_dir` have changed since'
      )

  def is_of_network(self, dataset: Dataset) -> bool:
    """Whether a server trained it that knew the clients and items of a data
    set, and nobody's interactions."""
    known = dataset.without_interactions().fingerprint()
    return self.data_fingerprint() == known

  def data_fingerprint(self) -> str:
    """SHA-256 of the data it was trained on."""
    return self._read(CONFIG, 'data_fingerprint')

  def ids(self) -> dict[str, list]:
    """'user_ids' [K], 'item_ids' [V] and 'titles' [V] (or empty)."""
    return self._read(IDS)

  def keep_content(self, content: np.ndarray) -> None:
    """Keeps the items' content [V, D], of which `content_projection` is the
    projection: a run on other data has it along other axes."""
    if not (self.path / CONTENT).exists():
      temporary = self.path / f'.{CONTENT}'
      np.savez(temporary, content=content)
      os.replace(temporary, self.path / CONTENT)

  def content(self) -> np.ndarray | None:
    """What `keep_content` kept, or None.

    Raises:
      UserError: it is damaged.
    """
    path = self.path / CONTENT
    if not path.exists():
      return None
    try:
      with np.load(path, allow_pickle=False) as file:
        return file['content']
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
      raise UserError(f'{path}: damaged ({error}); put it back') from None

  def records(self) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, empty if there is no such file; a
    half-written last line, left by a killed process, is skipped.

    Raises:
      UserError: another line is damaged.
    """
    path = self.path / METRICS
    if not path.exists():
      return []
    lines = path.read_text('utf-8', errors='replace').splitlines()
    complete = []
    for number, line in enumerate(lines, 1):
      try:
        record = json.loads(line)
      except json.JSONDecodeError as error:
        if number < len(lines):
          raise UserError(
            f'{path}, line {number}: damaged, not JSON ({error})'
          ) from None
      else:
        if not isinstance(record, dict) or not isinstance(
          record.get('round'), int
        ):
          raise UserError(f'{path}, line {number}: damaged, it has no round')
        complete.append(record)
    return complete

  def append(self, record: dict[str, Any]) -> None:
    """Adds one round's line to `metrics.jsonl`."""
    with (self.path / METRICS).open('a') as file:
      file.write(_dumps(record) + '\n')

  def rewind(self, last: dict[str, Any] | None) -> None:
    """Makes `metrics.jsonl` end with the record of the last saved round, None
    if there is none.

    A killed process may have omitted that line, written half of it, or added
    the line of a round it had not saved; and the user may have moved later,
    damaged rounds away.
    """
    kept = [r for r in self.records() if last and r['round'] < last['round']]
    kept += [last] if last else []
    self._replace(METRICS, ''.join(_dumps(r) + '\n' for r in kept))

  def remove_results(self) -> None:
    """Removes the results of a finished run that is being resumed."""
    for name in (SUMMARY, REPORT):
      (self.path / name).unlink(missing_ok=True)

  def write_summary(self, summary: dict[str, Any]) -> None:
    self._write(SUMMARY, summary)

  def summary(self) -> dict[str, Any] | None:
    """`summary.json`, or None while the run has not finished."""
    return self._read(SUMMARY) if (self.path / SUMMARY).exists() else None

  def _check_same(self, config: RunConfig) -> None:
    # By way of a config, so that a setting added since has its default.
    before, now = self.config().as_flat_dict(), config.as_flat_dict()
    changed = [
      name
      for name in now
      if before[name] != now[name]
      and (
        name not in MAY_CHANGE or name == 'num_rounds' and config.length_counts
      )
    ]
    if changed:
      name = changed[0]
      raise UserError(
        f'{self.path} holds a run with `{name}={before[name]}`, not '
        f'{now[name]}; a run is continued with its '
        f'own settings (differing: {", ".join(changed)}'
        + (
          '; its learning rates or its noise are made for that length'
          if 'num_rounds' in changed
          else ''
        )
        + ')'
      )

  def _read(self, name: str, key: str | None = None) -> Any:
    path = self.path / name
    if not path.exists():
      raise UserError(f'{path}: no such file; is this a run folder?')
    try:
      content = json.loads(path.read_text('utf-8'))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
      raise UserError(f'{path}: damaged, not JSON ({error})') from None
    if not isinstance(content, dict):
      raise UserError(f'{path}: damaged, not a JSON object')
    # Files of which nothing is read back have none.
    if CHECKSUM in content and content[CHECKSUM] != _checksum(content):
      raise UserError(
        f'{path}: damaged or edited, its checksum differs; put the file back '
        'as it was'
      )
    if key is None:
      return content
    if key not in content:
      raise UserError(f'{path}: damaged, it has no {key!r}')
    return content[key]

  def _write(
    self, name: str, content: dict[str, Any], indent: int | None = 2
  ) -> None:
    self._replace(name, _dumps(content, indent) + '\n')

  def _replace(self, name: str, text: str) -> None:
    replace(self.path / name, text)


def _with_checksum(content: dict[str, Any]) -> dict[str, Any]:
  return content | {CHECKSUM: _checksum(content)}


def _checksum(content: dict[str, Any]) -> int:
  """CRC-32 of the other content of a file."""
  return zlib.crc32(
    _dumps({k: v for k, v in content.items() if k != CHECKSUM}).encode()
  )


def _dumps(value: Any, indent: int | None = None) -> str:
  return json.dumps(value, indent=indent, allow_nan=False)
