"""A run's settings: bounds, choices, help and their flat form."""

import dataclasses
import math

import pytest

from fedmmr_jax.config import ModelConfig, RunConfig, walk_fields
from fedmmr_jax.errors import UserError

FIELDS = [field for _, field, _ in walk_fields(RunConfig())]


def having(key):
  return [pytest.param(f, id=f.name) for f in FIELDS if key in f.metadata]


def config(**values):
  return RunConfig.from_flat_dict(values)


def other_value(field):
  """Any value of the field's type but the default."""
  if isinstance(field.default, bool):
    return not field.default
  if isinstance(field.default, str):
    return field.default + 'x'
  return type(field.default)(field.default * 2 + 1)


def refused(name, value, message=''):
  return pytest.raises(UserError, match=f'^--{name}={value} {message}')


def test_defaults_are_valid():
  run = RunConfig()
  assert run.validate() is run


def test_field_names_are_unique_across_groups():
  names = [field.name for field in FIELDS]
  assert len(names) == len(set(names))


@pytest.mark.parametrize('field', FIELDS, ids=lambda f: f.name)
def test_every_field_has_help(field):
  assert len(field.metadata['help']) >= 5
  assert set(field.metadata) <= {
    'help',
    'choices',
    'names',
    'minimum',
    'maximum',
  }


@pytest.mark.parametrize('field', FIELDS, ids=lambda f: f.name)
def test_type_of_the_default_is_the_annotated_one(field):
  assert type(field.default) is field.type


def test_walk_names_the_group_of_each_field():
  groups = {
    f.name: (group, value)
    for group, f, value in walk_fields(config(num_rounds=7))
  }
  assert groups['seed'] == ('', 0)
  assert groups['num_rounds'] == ('server', 7)
  assert groups['dataset'] == ('data', 'synthetic')
  assert {g for g, _ in groups.values()} == {
    '',
    'data',
    'model',
    'loss',
    'memory',
    'client',
    'server',
    'evaluation',
    'start',
    'checkpoints',
  }


def test_flat_round_trip_of_the_defaults():
  assert config(**RunConfig().as_flat_dict()) == RunConfig()
  assert len(RunConfig().as_flat_dict()) == len(FIELDS)


def test_flat_round_trip_of_everything_changed():
  values = {field.name: other_value(field) for field in FIELDS}
  changed = config(**values)
  assert changed.as_flat_dict() == values
  for (_, field, value), (_, _, default) in zip(
    walk_fields(changed), walk_fields(RunConfig())
  ):
    assert value == values[field.name] != default
  assert config(**changed.as_flat_dict()) == changed


def test_absent_names_keep_their_defaults():
  changed = config(hidden_dim=64)
  assert changed == RunConfig(model=ModelConfig(hidden_dim=64))
  assert config() == RunConfig()


def test_unknown_setting():
  with pytest.raises(UserError, match="^unknown setting 'hiden_dim'"):
    config(hiden_dim=64)


@pytest.mark.parametrize('group', ['model', 'data', 'evaluation'])
def test_a_group_is_not_a_setting(group):
  with pytest.raises(UserError, match=f"^unknown setting '{group}'"):
    config(**{group: ModelConfig()})


@pytest.mark.parametrize('field', having('choices'))
def test_unknown_choice(field):
  with refused(field.name, 'nonsense', 'is unknown; choose from') as error:
    config(**{field.name: 'nonsense'}).validate()
  for choice in field.metadata['choices']:
    assert choice in str(error.value)


@pytest.mark.parametrize('field', having('choices'))
def test_every_choice_is_accepted(field):
  assert field.default in field.metadata['choices']
  for choice in field.metadata['choices']:
    # Of the client optimizers only sgd goes with all of drift control.
    # A date goes with one of the splits, and must.
    config(
      **{
        'data_dir': 'folder',
        'client_optimizer': 'sgd',
        'test_from': '2000-01-01' * (choice == 'timeline'),
        field.name: choice,
      }
    ).validate()


@pytest.mark.parametrize('field', having('minimum'))
def test_below_the_minimum(field):
  minimum = field.metadata['minimum']
  below = (
    minimum - 1
    if isinstance(minimum, int)
    else math.nextafter(minimum, -math.inf)
  )
  for value in (below, -math.inf):
    with refused(field.name, value, 'is below its minimum'):
      config(**{field.name: value}).validate()


@pytest.mark.parametrize('field', having('maximum'))
def test_above_the_maximum(field):
  maximum = field.metadata['maximum']
  for value in (math.nextafter(maximum, math.inf), math.inf):
    with refused(field.name, value, 'is above its maximum'):
      config(**{field.name: value}).validate()


@pytest.mark.parametrize(
  'name, value, side',
  [
    ('seed', -1, 'below'),
    ('synthetic_items', 39, 'below'),
    ('num_blocks', 0, 'below'),
    ('dropout', 0.96, 'above'),
    ('temperature', 0.0, 'below'),
    ('num_negatives', 0, 'below'),
    ('num_rounds', 0, 'below'),
    ('client_fraction', 0.0, 'below'),
    ('client_fraction', 1.01, 'above'),
    ('server_momentum', 1.0, 'above'),
    ('patience', -1, 'below'),
  ],
)
def test_bounds_by_hand(name, value, side):
  with refused(name, value, f'is {side} its m'):
    config(**{name: value}).validate()


def test_every_number_but_these_is_bounded():
  unbounded = {
    f.name
    for f in FIELDS
    if type(f.default) in (int, float) and 'minimum' not in f.metadata
  }
  assert unbounded == {
    'gating_init',
    'surprise_threshold',
    'recency_weight',
    'frequency_weight',
  }


@pytest.mark.parametrize('key', ['minimum', 'maximum'])
def test_the_bounds_themselves_are_accepted(key):
  # Settings that others must fit come along at values that fit.
  for field in FIELDS:
    if key in field.metadata:
      fitting = dict(num_heads=1, semantic_heads=1, retrieval_size=1)
      config(**{**fitting, field.name: field.metadata[key]}).validate()


@pytest.mark.parametrize(
  'field',
  [pytest.param(f, id=f.name) for f in FIELDS if isinstance(f.default, float)],
)
def test_nan_is_refused(field):
  with refused(field.name, 'nan'):
    config(**{field.name: math.nan}).validate()


@pytest.mark.parametrize('heads', ['num_heads', 'semantic_heads'])
def test_heads_must_divide_the_width(heads):
  with pytest.raises(
    UserError, match=f'^--hidden_dim=128 is not a multiple of --{heads}=3'
  ):
    config(**{heads: 3}).validate()
  config(**{heads: 3}, hidden_dim=24).validate()


def test_retrieval_must_fit_the_memory():
  config(retrieval_size=20, memory_capacity=20).validate()
  with pytest.raises(
    UserError, match='^--retrieval_size=20 exceeds --memory_capacity=19'
  ):
    config(retrieval_size=20, memory_capacity=19).validate()


@pytest.mark.parametrize('name', ['ml-1m', 'ml-100k'])
def test_a_data_set_on_disk_needs_its_folder(name):
  with pytest.raises(UserError, match=f'^--dataset={name} needs --data_dir'):
    config(dataset=name).validate()
  config(dataset=name, data_dir='folder').validate()


def test_the_first_of_several_faults_is_named():
  with refused('top_k_users', -1):
    config(num_rounds=0, top_k_users=-1, dropout=2.0).validate()


def test_settings_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    RunConfig().model.hidden_dim = 3
