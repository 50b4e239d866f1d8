"""The binaries."""

import sys

try:
  import fedmmr_jax as fedmmr_jax
except ImportError as error:  # it refuses the platform
  print(f'error: {error}', file=sys.stderr)
  sys.exit(2)
