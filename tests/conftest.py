"""Settings of the test process, made before JAX starts."""

import os

# The tests compile much and run little: skip LLVM's optimisation passes.
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0')
