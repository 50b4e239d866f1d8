"""Computes feature matrices of a data set's items from their texts and images.

    python -m experiments.prepare_features --data_dir=path/to/ml-1m \\
        --texts=path/to/item_texts.json --images=path/to/posters

writes `text_features.npy` and `visual_features.npy` into the data folder, where
training finds them, each with a `.json` beside it that records how it was made.
An interrupted call resumes where it stopped when it is repeated.
"""

import hashlib
import importlib.metadata
import importlib.util
import logging
import pathlib
import signal
import sys
import time
import warnings
from typing import Any, NamedTuple, Sequence

from absl import flags
from tqdm import tqdm

from experiments import app
from fedmmr_jax.config import RunConfig, walk_fields
from fedmmr_jax.data import extraction, load, sidecar
from fedmmr_jax.data.extraction import Encode, Inputs, TEXT, VISUAL
from fedmmr_jax.data.features import AUTO, NONE
from fedmmr_jax.data.items import ItemTable
from fedmmr_jax.errors import UserError

# Of the data set, what says how its files are read.
_READING = ('dataset', 'data_dir', 'item_file')
_LOCAL = 'name a local folder that holds a sentence-transformers model'
# Special tokens around a text: more than any model has.
_ADDED_TOKENS = 8
# They decide on the numbers too.
_PACKAGES = {TEXT: ('sentence-transformers', 'transformers', 'torch')}
_PACKAGES[VISUAL] = (*_PACKAGES[TEXT], 'pillow')

_TEXTS = flags.DEFINE_string(
  'texts',
  AUTO,
  'what the text model reads: a JSON file {"item id": '
  '"text"}; auto: title, genres and abstract from the data set\'s item file; '
  'none: make no text features',
)
_IMAGES = flags.DEFINE_string(
  'images',
  '',
  'folder of <item id>'
  + ', '.join(extraction.IMAGE_ENDS)
  + ' (the first of these counts); empty: make no visual features',
)
_OUT = flags.DEFINE_string(
  'out', '', 'folder for the matrices; empty: the data folder'
)
_MODELS = {
  TEXT: flags.DEFINE_string(
    'text_model',
    'sentence-transformers/all-MiniLM-L6-v2',
    'sentence-transformers model for texts: a local folder, or a name on '
    'the Hugging Face hub',
  ),
  VISUAL: flags.DEFINE_string(
    'image_model', 'sentence-transformers/clip-ViT-B-32', 'likewise for images'
  ),
}
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 32, 'texts or images the model reads at a time', lower_bound=1
)
_NORMALISE = flags.DEFINE_boolean(
  'normalise', True, 'scale each row to unit length'
)
_OVERWRITE = flags.DEFINE_boolean(
  'overwrite', False, 'replace matrices that are there'
)

for _, _field, _default in walk_fields(RunConfig()):
  if _field.name == 'dataset':
    flags.DEFINE_string(
      'dataset',
      AUTO,
      'format of the files in --data_dir, as in training; auto: tell it by the '
      'file',
    )
  elif _field.name in _READING:
    flags.DEFINE_string(
      _field.name, _default, app.as_flags(_field.metadata['help'])
    )


def main() -> None:
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    prepare()
  except KeyboardInterrupt:
    print('\nstopped; the same command goes on from here', file=sys.stderr)
    sys.exit(app.INTERRUPTED)


def prepare() -> None:
  """Reads and checks everything, then computes."""
  config = RunConfig.from_flat_dict(
    {name: flags.FLAGS[name].value for name in _READING}
  ).validate()
  items = load.read_items(config.data)
  print(f'items      {len(items.ids)}, {items.numbering}')
  wanted = _wanted(items, config.data.data_dir)
  data = pathlib.Path(config.data.data_dir)
  out = pathlib.Path(_OUT.value or (data if data.is_dir() else data.parent))
  for kind in wanted:
    _check_free(out, kind)
  _check_installed(VISUAL in wanted)
  out.mkdir(parents=True, exist_ok=True)
  _silence_libraries()
  # Before the first one computes, which may take hours.
  models = {
    kind: find_model(_MODELS[kind].value, _MODELS[kind].name) for kind in wanted
  }
  for kind, inputs in wanted.items():
    _prepare_one(items, inputs, models[kind], out)


def _wanted(items: ItemTable, data_dir: str) -> dict[str, Inputs]:
  """What is to be encoded, by kind.

  Raises:
    UserError: nothing.
  """
  wanted = {}
  if _TEXTS.value not in (AUTO, NONE):
    wanted[TEXT] = extraction.text_inputs(
      items,
      extraction.read_texts(pathlib.Path(_TEXTS.value)),
      f'--texts={_TEXTS.value}',
    )
  elif _TEXTS.value == AUTO and items.texts:
    wanted[TEXT] = extraction.text_inputs(items, items.texts, data_dir)
  if _IMAGES.value:
    wanted[VISUAL] = extraction.image_inputs(items, pathlib.Path(_IMAGES.value))
  if not wanted:
    raise UserError(
      (
        '--texts=none and no --images: nothing to do'
        if _TEXTS.value == NONE
        else f'{data_dir}: its files tell no titles, genres or abstracts'
      )
      + '; give --texts=FILE, JSON {"item id": "text"}, or --images=FOLDER '
      'of <item id>.jpg'
    )
  if TEXT not in wanted and _TEXTS.value == AUTO:
    print(
      'text       none: the files of the data set tell no titles, genres '
      'or abstracts'
    )
  return wanted


def _check_free(out: pathlib.Path, kind: str) -> None:
  path = extraction.matrix_path(out, kind)
  if path.exists() and not _OVERWRITE.value:
    leave = '--texts=none' if kind == TEXT else 'no --images'
    raise UserError(
      f'{path} is there already; say --overwrite to replace it, '
      f'--out=FOLDER to write elsewhere, or {leave} to leave it'
    )


def _prepare_one(
  items: ItemTable, inputs: Inputs, model: 'Model', out: pathlib.Path
) -> None:
  """Computes and writes one matrix, and says what came of it."""
  start = time.monotonic()
  kind, path = inputs.kind, extraction.matrix_path(out, inputs.kind)
  what = 'texts' if kind == TEXT else 'images'
  print(f'{kind:6}     {len(inputs.ids)} {what} for {len(items.ids)} items')
  if inputs.unknown:
    print(
      f'           {len(inputs.unknown)} more, of no item of the data set: '
      f'{extraction.shown(inputs.unknown)}'
    )
  print(f'           model {model.name}, loading', flush=True)
  loaded = load_model(model)
  if kind == TEXT:
    note = cut_note(loaded, inputs.sources)
    if note:
      print(f'           {note}', flush=True)
  settings = {
    'kind': kind,
    **model.description(kind),
    'normalised': _NORMALISE.value,
    'rows': items.num_rows,
    'data_fingerprint': sidecar.data_fingerprint(items),
    'inputs_fingerprint': inputs.fingerprint,
  }
  with extraction.Partial(out, settings) as partial:
    for note in filter(None, (partial.lock_note, partial.note)):
      print(f'           {note}', flush=True)
    with tqdm(
      total=len(inputs.ids),
      initial=partial.done,
      unit=f' {what}',
      disable=None,
      file=sys.stdout,
    ) as bar:
      done = extraction.extract(
        inputs,
        encoder(loaded, model, kind),
        partial,
        path,
        items,
        _BATCH_SIZE.value,
        _NORMALISE.value,
        bar.update,
      )
  print(done.report)
  for broken in done.broken[:10]:
    print(f'         not read  {broken["file"]}: {broken["reason"]}')
  if done.broken:
    print(
      f'         {len(done.broken)} of {len(inputs.ids)} images not read: '
      'their rows are zero, which is missing'
    )
  print(
    f'         wrote {path} and {sidecar.path_of(path).name} in '
    f'{time.monotonic() - start:.1f} s'
  )


class Model(NamedTuple):
  """Where a model is.

  Attributes:
    name: as the flag has it.
    flag: name of the flag, for errors.
    path: what the library gets: a folder, or the name on the hub.
    revision: commit on the hub, None for a folder.
    is_local: whether nothing needs to be fetched.
  """

  name: str
  flag: str
  path: str
  revision: str | None
  is_local: bool

  def description(self, kind: str) -> dict[str, Any]:
    """What the sidecar tells of it, for 'text' or 'visual'."""
    return {
      'model': self.name,
      'model_revision': self.revision,
      'model_fingerprint': (
        None if self.revision else _fingerprint(pathlib.Path(self.path))
      ),
      'versions': {
        name: importlib.metadata.version(name) for name in _PACKAGES[kind]
      },
    }


def find_model(name: str, flag: str) -> Model:
  """A local folder, or what the hub or its local cache has under a name.

  Raises:
    UserError: none of them has it.
  """
  folder = pathlib.Path(name).expanduser()
  if folder.is_dir():
    return Model(name, flag, str(folder), None, True)
  if folder.is_absolute() or name.startswith('.') or name.count('/') > 1:
    raise UserError(f'--{flag}={name}: no such folder; {_LOCAL}')
  import huggingface_hub  # an extra
  from huggingface_hub import errors

  on_hub = name if '/' in name else f'sentence-transformers/{name}'
  try:
    info = huggingface_hub.HfApi().model_info(on_hub, timeout=10)
    return Model(name, flag, on_hub, info.sha, False)
  except (errors.RepositoryNotFoundError, errors.HFValidationError):
    raise UserError(
      f'--{flag}={name}: neither a folder here nor a model on '
      f'the Hugging Face hub; {_LOCAL}'
    ) from None
  except Exception:  # of the HTTP library, which changed with the versions
    cached = huggingface_hub.try_to_load_from_cache(on_hub, 'config.json')
    cached = cached or huggingface_hub.try_to_load_from_cache(
      on_hub, 'modules.json'
    )
  if not isinstance(cached, str):
    raise UserError(
      f'--{flag}={name}: no such folder, not in the cache of the Hugging '
      f'Face hub, and the hub cannot be reached; {_LOCAL}'
    )
  # …/snapshots/<commit>/config.json
  return Model(name, flag, on_hub, pathlib.Path(cached).parent.name, True)


def load_model(model: Model) -> Any:
  """A `SentenceTransformer`.

  Raises:
    UserError: it cannot be loaded.
  """
  from sentence_transformers import SentenceTransformer  # an extra

  try:
    return SentenceTransformer(
      model.path, revision=model.revision, local_files_only=model.is_local
    )
  except Exception as error:  # whatever the files, or the network, lead to
    raise UserError(
      f'--{model.flag}={model.name}: cannot be loaded '
      f'({_reason(error)}); {_LOCAL}'
    ) from None


def cut_note(loaded: Any, texts: Sequence[str]) -> str:
  """How many texts are longer than the model reads, which it does not say
  itself; '' if none is, or if the model does not tell.

  Args:
    loaded: a `SentenceTransformer`.
    texts: what it will read.
  """
  limit = getattr(loaded, 'max_seq_length', None)
  tokenizer = getattr(loaded, 'tokenizer', None)
  if not isinstance(limit, int) or not callable(tokenizer):
    return ''
  prompt = (loaded.prompts or {}).get(loaded.default_prompt_name) or ''

  def count(some: list[str]) -> list[int]:
    whole = tokenizer(
      [prompt + text for text in some], truncation=False, padding=False
    )
    return list(map(len, whole['input_ids']))

  longer = extraction.count_longer(
    texts, limit, count, len(prompt.encode()) + _ADDED_TOKENS
  )
  if not longer:
    return ''
  return (
    f"{longer} of {len(texts)} texts are longer than the model's {limit} "
    'tokens: what is behind is not read'
  )


def encoder(loaded: Any, model: Model, kind: str) -> Encode:
  """The function that the model is.

  Args:
    loaded: what `load_model` gives.
    model: for errors.
    kind: 'text' or 'visual'; a UserError tells that it takes no such input.
  """

  def encode(inputs: list):
    try:
      return loaded.encode(
        inputs, batch_size=len(inputs), show_progress_bar=False
      )
    except Exception as error:
      mend = (
        'say a smaller --batch_size'
        if 'memory' in str(error)
        else f'name a model for {"texts" if kind == TEXT else "images"}'
      )
      raise UserError(
        f'--{model.flag}={model.name}: fails on its inputs '
        f'({_reason(error)}); {mend}'
      ) from None

  return encode


def _fingerprint(folder: pathlib.Path) -> str:
  """SHA-256 of a model's files: settings, vocabulary, weights."""
  digest = hashlib.sha256()
  for path in sorted(folder.rglob('*')):
    if path.is_file() and path.suffix in (
      '.json',
      '.txt',
      '.model',
      '.safetensors',
      '.bin',
    ):
      digest.update(f'{path.relative_to(folder)}\n'.encode())
      digest.update(sidecar.checksum(path).encode())
  return digest.hexdigest()


def _reason(error: Exception) -> str:
  """The start of a message that may be a page."""
  return f'{type(error).__name__}: {" ".join(str(error).split())[:120]}'


def _check_installed(images: bool) -> None:
  needed = {'sentence_transformers': 'sentence-transformers'}
  if images:
    needed['PIL'] = 'pillow'
  missing = [
    name
    for module, name in needed.items()
    if importlib.util.find_spec(module) is None
  ]
  if missing:
    raise UserError(
      f"this needs {' and '.join(missing)}: pip install -e '.[features]'"
    )


def _silence_libraries() -> None:
  """They warn, count retries and draw bars for each file."""
  warnings.simplefilter('ignore')
  import huggingface_hub
  import transformers

  transformers.utils.logging.disable_progress_bar()
  huggingface_hub.utils.disable_progress_bars()
  for name in ('transformers', 'huggingface_hub', 'sentence_transformers'):
    logging.getLogger(name).setLevel(logging.CRITICAL)


def cli() -> None:
  app.run(main)


if __name__ == '__main__':
  cli()
