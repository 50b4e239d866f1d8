"""Federated multimodal sequential recommendation, simulated in compiled JAX.

>>> import fedmmr_jax as fm
>>> config = fm.preset('synthetic', num_rounds=2, dataset='synthetic,users=60')
>>> simulation = fm.Simulation.of(config, fm.load(config))
>>> for step in simulation.rounds():
...   print(step.number, step.metrics['loss'] > 0)
1 True
2 True
>>> metrics, ranks = simulation.evaluate(step.state, 'val')
>>> sorted(metrics)
['full', 'sampled']
>>> items, scores = simulation.recommend(step.state, client=0, count=5)
>>> len(items)
5

The names here are stable; the rest of the package may change. Names are
imported on first use, so that importing one part of the package (a model, say)
does not load the file readers.
"""

import importlib
import sys
from typing import Any, TYPE_CHECKING

if sys.platform == 'win32':  # no fcntl, no resource, other signals
  raise ImportError(
    'fedmmr_jax runs on Linux and macOS; on Windows install it in WSL 2'
  )

__version__ = '0.1.0'

# Public name -> where it lives.
_PLACES = {
  'add_weighted': 'federation.aggregators',
  'Aggregator': 'federation.aggregators',
  'Catalogue': 'models.feddmmr',
  'ClientUpdate': 'client.update',
  'Cohort': 'client.drift',
  'Dataset': 'data.dataset',
  'DriftControl': 'client.drift',
  'Entries': 'models.experts',
  'Expert': 'models.experts',
  'FedAvg': 'federation.aggregators',
  'FedDMMR': 'models.feddmmr',
  'FedNova': 'federation.aggregators',
  'FedProx': 'client.drift',
  'FederationState': 'federation.round',
  'Format': 'data.formats',
  'Interactions': 'data.interactions',
  'load': 'data.load',
  'Loaded': 'data.load',
  'LocalResult': 'client.drift',
  'Logger': 'runs.loggers',
  'metrics_of': 'evaluation.ranking',
  'MimeLite': 'client.drift',
  'MLflow': 'runs.loggers',
  'paired_bootstrap': 'evaluation.bootstrap',
  'People': 'evaluation.recommendation',
  'preset': 'presets',
  'Ranks': 'evaluation.ranking',
  'reasons': 'evaluation.recommendation',
  'recommend': 'evaluation.recommendation',
  'Round': 'simulation',
  'RunConfig': 'config',
  'RunFolder': 'runs.run_folder',
  'Scaffold': 'client.drift',
  'ServerOptimizer': 'client.drift',
  'set_workers': 'federation.devices',
  'similar_items': 'evaluation.recommendation',
  'Simulation': 'simulation',
  'TensorBoard': 'runs.loggers',
  'train': 'runs.training',
  'UserError': 'errors',
  'WandB': 'runs.loggers',
}

__all__ = ['__version__', *sorted(_PLACES)]

if TYPE_CHECKING:  # for type checkers and the pages of the reference
  from fedmmr_jax.client.drift import (
    Cohort,
    DriftControl,
    FedProx,
    LocalResult,
    MimeLite,
    Scaffold,
    ServerOptimizer,
  )
  from fedmmr_jax.client.update import ClientUpdate
  from fedmmr_jax.config import RunConfig
  from fedmmr_jax.data.dataset import Dataset
  from fedmmr_jax.data.formats import Format
  from fedmmr_jax.data.interactions import Interactions
  from fedmmr_jax.data.load import load, Loaded
  from fedmmr_jax.errors import UserError
  from fedmmr_jax.evaluation.bootstrap import paired_bootstrap
  from fedmmr_jax.evaluation.ranking import metrics_of, Ranks
  from fedmmr_jax.evaluation.recommendation import (
    People,
    reasons,
    recommend,
    similar_items,
  )
  from fedmmr_jax.federation.aggregators import (
    add_weighted,
    Aggregator,
    FedAvg,
    FedNova,
  )
  from fedmmr_jax.federation.devices import set_workers
  from fedmmr_jax.federation.round import FederationState
  from fedmmr_jax.models.experts import Entries, Expert
  from fedmmr_jax.models.feddmmr import Catalogue, FedDMMR
  from fedmmr_jax.presets import preset
  from fedmmr_jax.runs.loggers import Logger, MLflow, TensorBoard, WandB
  from fedmmr_jax.runs.run_folder import RunFolder
  from fedmmr_jax.runs.training import train
  from fedmmr_jax.simulation import Round, Simulation


def __getattr__(name: str) -> Any:
  if name not in _PLACES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(f'{__name__}.{_PLACES[name]}')
  value = getattr(module, name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *_PLACES})
