"""Fetches a MovieLens data set from GroupLens.

    python -m experiments.download --dataset=ml-100k|ml-1m|ml-latest-small
        [--data_dir=FOLDER] [--url=MIRROR]

Archive and files are put into data/<name>, or --data_dir. A second call finds
them there; after an interruption it resumes NAME.zip.part. Without a network,
put the archive into the folder by hand and call again.
"""

import pathlib
import shlex
import sys

import pooch
from absl import flags

from experiments import app
from fedmmr_jax.data import download
from fedmmr_jax.data.download import Archive, Fetched
from fedmmr_jax.errors import UserError

_DATASET = flags.DEFINE_enum(
  'dataset', None, list(download.ARCHIVES), 'which set'
)
_DATA_DIR = flags.DEFINE_string(
  'data_dir', '', 'folder for the archive and its files; empty: data/<name>'
)
_URL = flags.DEFINE_string(
  'url', '', "full URL of a mirror's copy of the archive; empty: GroupLens"
)


def main() -> None:
  if not _DATASET.value:
    raise UserError(
      'name a data set with --dataset: ' + ', '.join(download.ARCHIVES)
    )
  archive = download.ARCHIVES[_DATASET.value]
  folder = pathlib.Path(_DATA_DIR.value or f'data/{archive.name}')
  try:
    fetched = download.fetch(archive, folder, _URL.value)
  except KeyboardInterrupt:
    print('stopped; call again to go on', file=sys.stderr)
    sys.exit(app.INTERRUPTED)
  print(summary(archive, folder, fetched))


def summary(archive: Archive, folder: pathlib.Path, fetched: Fetched) -> str:
  """What is there, what it may be used for, and what to call next."""
  sizes = {
    str(file.relative_to(folder)): f'{file.stat().st_size:,}'
    for file in fetched.files
  }
  widths = max(map(len, sizes)), max(map(len, sizes.values()))
  return '\n'.join(
    (
      *_origin(archive, folder, fetched),
      *(
        f'  {name:{widths[0]}}  {size:>{widths[1]}} bytes'
        for name, size in sizes.items()
      ),
      "licence    MovieLens is GroupLens' and licensed for research use; the "
      'terms are in',
      '           the README of the archive',
      'cite       Harper and Konstan (2015), The MovieLens Datasets: History '
      'and Context,',
      '           ACM Transactions on Interactive Intelligent Systems 5(4), '
      'article 19',
      f'next       python -m experiments.train --dataset={archive.format} '
      f'--data_dir={shlex.quote(str(folder))}',
    )
  )


def _origin(
  archive: Archive, folder: pathlib.Path, fetched: Fetched
) -> tuple[str, ...]:
  if fetched.archive is None:
    return (
      f'found      {folder}, nothing downloaded; there is no '
      f'{archive.file} to compare with',
    )
  how = (
    'fetched    {}'
    if fetched.downloaded
    else 'found      {}, nothing downloaded'
  ).format(fetched.archive)
  kind, _, known = (archive.known_hash or '').partition(':')
  if known:
    return how, f'{kind.upper():9}  {known}, as known'
  sha256 = pooch.file_hash(str(fetched.archive))
  return (
    how,
    f'SHA-256    {sha256}',
    ('           (the set changes over time: cite it with this)'),
  )


def cli() -> None:
  app.run(main)


if __name__ == '__main__':
  cli()
