"""A run's settings: bounds, choices, help and their flat form."""

import dataclasses
import math

import pytest

from fedmmr_jax import parts
from fedmmr_jax.config import (
  help_of,
  ModelConfig,
  Off,
  Part,
  RecentMemory,
  RENAMED,
  renamed,
  RunConfig,
  SharedNegatives,
  TwoTierMemory,
  walk_fields,
)
from fedmmr_jax.errors import UserError
from tests import small

FIELDS = [field for _, field, _ in walk_fields(RunConfig())]
# Every part of every setting: (setting, name, class).
PARTS = [
  (field.name, name, kind)
  for field in FIELDS
  for name, kind in field.metadata.get('parts', {}).items()
]
# Settings that decide where things are, which data is read and what is looked
# at, not what is learnt or what it costs.
PLUMBING = {
  'seed',
  'dataset',
  'data_dir',
  'item_file',
  'k_core',
  'min_interactions',
  'top_k_users',
  'split_by',
  'visual_features',
  'text_features',
  'sampled_negatives',
  'eval_every',
  'eval_clients',
  'validation_clients',
  'metrics',
  'clients_per_eval_chunk',
  'items_per_eval_block',
  'pretrained_path',
  'load',
  'keep',
}


def having(key):
  return [pytest.param(f, id=f.name) for f in FIELDS if key in f.metadata]


def config(**values):
  return RunConfig.from_flat_dict(values)


def other_value(field):
  """Any value of the field's type but the default, parts as text."""
  if isinstance(field.default, Part):
    return example(*list(field.metadata['parts'].items())[-1])
  if isinstance(field.default, bool):
    return not field.default
  if isinstance(field.default, str):
    return field.default + 'x'
  return type(field.default)(field.default * 2 + 1)


def example(name, kind):
  """A part as text, each of its options with another value than by default."""
  words = [name]
  for option, field in parts.options(kind).items():
    is_date = field.default is dataclasses.MISSING
    kind = str if is_date else type(field.default)
    most = field.metadata.get('maximum', 1)
    if 'choices' in field.metadata:
      value = field.metadata['choices'][-1]
    else:
      value = '2000-01-01' if is_date else field.default / 2 or most
    words.append(f'{option}={parts.written(kind(value))}')
  return ','.join(words)


def refused(name, value, message=''):
  return pytest.raises(UserError, match=f'^`{name}={value}` {message}')


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
    'evidence',
    'choices',
    'parts',
    'options',
    'minimum',
    'maximum',
  }


def test_there_are_at_most_60_settings_besides_those_of_a_real_federation():
  groups = [group for group, _, _ in walk_fields(config())]
  assert len(groups) - groups.count('federation') == 60


def test_every_setting_that_matters_says_what_is_known_of_it():
  names = {field.name for field in FIELDS}
  assert names >= PLUMBING
  silent = {f.name for f in FIELDS if not f.metadata.get('evidence')}
  assert silent <= PLUMBING
  for field in having('evidence'):
    evidence = field.values[0].metadata['evidence']
    assert 'not measured' in evidence or 'docs/' in evidence
    assert help_of(field.values[0]).endswith(f' [{evidence}]')


@pytest.mark.parametrize('field', FIELDS, ids=lambda f: f.name)
def test_type_of_the_default_is_the_annotated_one(field):
  if isinstance(field.default, Part):
    assert isinstance(field.default, field.type)
  else:
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
    'client',
    'server',
    'federation',
    'evaluation',
    'start',
  }


def test_flat_round_trip_of_the_defaults():
  assert config(**RunConfig().as_flat_dict()) == RunConfig()
  assert len(RunConfig().as_flat_dict()) == len(FIELDS)


def test_flat_round_trip_of_everything_changed():
  values = {field.name: other_value(field) for field in FIELDS}
  changed = config(**values)
  assert changed.as_flat_dict() == values
  for (_, _, value), (_, _, default) in zip(
    walk_fields(changed), walk_fields(RunConfig())
  ):
    assert value != default
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
    config(
      **{'data_dir': 'folder', 'client_optimizer': 'sgd', field.name: choice}
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
    ('num_blocks', 0, 'below'),
    ('dropout', 0.96, 'above'),
    ('num_negatives', 0, 'below'),
    ('num_rounds', 0, 'below'),
    ('client_fraction', 0.0, 'below'),
    ('client_fraction', 1.01, 'above'),
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
  assert not unbounded


@pytest.mark.parametrize('key', ['minimum', 'maximum'])
def test_the_bounds_themselves_are_accepted(key):
  # Settings that others must fit come along at values that fit.
  for field in FIELDS:
    if key in field.metadata:
      fitting = dict(num_heads=1, expert_form='attention,heads=1')
      config(**{**fitting, field.name: field.metadata[key]}).validate()


@pytest.mark.parametrize(
  'field',
  [pytest.param(f, id=f.name) for f in FIELDS if isinstance(f.default, float)],
)
def test_nan_is_refused(field):
  with refused(field.name, 'nan'):
    config(**{field.name: math.nan}).validate()


@pytest.mark.parametrize(
  'setting, heads, named',
  [
    ('num_heads', 3, '`num_heads=3`'),
    ('expert_form', 'attention,heads=3', 'the heads of `expert_form='),
  ],
)
def test_heads_must_divide_the_width(setting, heads, named):
  with pytest.raises(
    UserError, match=f'^`hidden_dim=128` is not a multiple of {named}'
  ):
    config(**{setting: heads}).validate()
  config(**{setting: heads}, hidden_dim=24).validate()


def test_prototypes_need_experts_that_can_read_them():
  with refused('global_memory', 'prototypes', 'needs .expert_form=attention'):
    config(global_memory='prototypes', expert_form='similarity').validate()


def test_retrieval_must_fit_the_memory():
  config(memory='surprise,retrieval_size=20,capacity=20').validate()
  with pytest.raises(UserError, match='retrieval_size=20 exceeds capacity=19'):
    config(memory='surprise,retrieval_size=20,capacity=19').validate()
  with pytest.raises(
    UserError, match='half of retrieval_size=20 exceeds long_term_capacity=9'
  ):
    config(memory='two_tier,long_term_capacity=9').validate()


@pytest.mark.parametrize('name', ['ml-1m', 'ml-100k'])
def test_a_data_set_on_disk_needs_its_folder(name):
  with pytest.raises(UserError, match=f'^`dataset={name}` needs `data_dir`'):
    config(dataset=name).validate()
  config(dataset=name, data_dir='folder').validate()


def test_the_first_of_several_faults_is_named():
  with refused('top_k_users', -1):
    config(num_rounds=0, top_k_users=-1, dropout=2.0).validate()


def test_settings_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    RunConfig().model.hidden_dim = 3


@pytest.mark.parametrize('setting, name, kind', PARTS)
def test_parts_come_back_from_their_text(setting, name, kind):
  text = example(name, kind)
  run = config(**{setting: text})
  assert run.as_flat_dict()[setting] == text
  part = next(v for _, f, v in walk_fields(run) if f.name == setting)
  assert type(part) is kind and config(**{setting: part}) == run
  if not any(f.default is dataclasses.MISSING for f in options_of(kind)):
    assert str(kind()) == name  # defaults are left out


def options_of(kind):
  return parts.options(kind).values()


@pytest.mark.parametrize('setting, name, kind', PARTS)
def test_options_are_bounded_and_explained(setting, name, kind):
  for option, field in parts.options(kind).items():
    assert len(field.metadata['help']) >= 5
    for side, beyond in (('minimum', -1), ('maximum', 1)):
      if side in field.metadata:
        text = f'{name},{option}={field.metadata[side] + beyond}'
        message = small.error_of(lambda: config(**{setting: text}).validate())
        assert f'its {side}' in message
        assert all(known in message for known in parts.options(kind))
  unbounded = {o for o, f in parts.options(kind).items() if not bounds_of(f)}
  assert unbounded <= {
    'init',
    'threshold',
    'recency_weight',
    'frequency_weight',
    'test_from',
    'leaky',
  }


def bounds_of(field):
  return {'minimum', 'maximum', 'choices'} & set(field.metadata)


@pytest.mark.parametrize(
  'text, message',
  [
    (
      'recent,size=3',
      '`memory=recent,size=3`: there is no option size; its options: '
      'capacity, retrieval_size, sees',
    ),
    (
      'recent,capacity=many',
      '`memory=recent,capacity=many`: capacity=many is not a whole number; '
      'its options: capacity, retrieval_size, sees',
    ),
    (
      'recent,capacity=0',
      '`memory=recent,capacity=0`: capacity=0 is below its minimum 1; its '
      'options: capacity, retrieval_size, sees',
    ),
    (
      'none,capacity=3',
      '`memory=none,capacity=3`: there is no option capacity; it has no '
      'options',
    ),
    ('recent,capacity', "recent,capacity: 'capacity' is not option=value"),
    (
      'lru,capacity=3',
      '`memory=lru,capacity=3` is unknown; choose from surprise, recent, '
      'two_tier, none',
    ),
  ],
)
def test_a_wrong_option_is_told_in_one_line(text, message):
  assert small.error_of(lambda: config(memory=text).validate()) == message


def test_an_option_that_must_be_given():
  assert 'the option test_from is missing' in small.error_of(
    lambda: config(split_by='timeline')
  )


def test_a_part_with_an_option_out_of_bounds_is_refused_as_an_object_too():
  run = config(memory=RecentMemory(capacity=0))
  assert 'below its minimum' in small.error_of(run.validate)


def test_a_later_part_replaces_the_whole_part():
  run = config(memory='two_tier,capacity=30')
  assert run.memory == TwoTierMemory(capacity=30)
  assert run.changed({'memory': 'two_tier'}).memory == TwoTierMemory()
  assert run.changed({'memory': 'none'}).memory.name == 'none'


def test_text_is_taken_for_any_setting():
  run = config(num_rounds='7', dropout='1e-1', negatives='shared,leaky=true')
  assert (run.server.num_rounds, run.model.dropout) == (7, 0.1)
  assert run.client.negatives == SharedNegatives(leaky=True)
  assert small.error_of(config, num_rounds='few') == (
    '`num_rounds=few` is not a whole number'
  )


# The settings of a run made before parts had options, where they differed from
# the defaults, and what they are now.
OLD = [
  (
    {'synthetic_users': 30, 'synthetic_items': 50},
    {'dataset': 'synthetic,users=30,items=50'},
  ),
  (
    {
      'dataset': 'csv',
      'synthetic_users': 400,
      'user_column': 'who',
      'item_column': '',
    },
    {'dataset': 'csv,user=who'},
  ),
  (
    {
      'expert_form': 'similarity',
      'feature_scaling': 'components',
      'similarity': 'dot',
      'router_hidden_dim': 32,
      'load_balance_weight': 0.0,
    },
    {
      'expert_form': 'similarity,features=components',
      'fusion': 'residual,similarity=dot',
      'router': 'item,hidden_dim=32,load_balance=0.0',
    },
  ),
  (
    {
      'objective': 'all_positions',
      'late_emphasis': 0.8,
      'negatives': 'shared',
      'leaky_negatives': True,
      'client_optimizer': 'sgd',
      'weight_decay': 0.1,
    },
    {
      'objective': 'all_positions,late_emphasis=0.8',
      'negatives': 'shared,leaky=true',
      'client_optimizer': 'sgd,weight_decay=0.1',
    },
  ),
  ({'keep_last': 0, 'keep_every': 10}, {'keep': 'all'}),
  ({'keep_last': 2, 'keep_every': 0}, {'keep': 'some,last=2,every=0'}),
  ({'window_order': 'shuffled'}, {}),
  ({'averaging': 'fednova'}, {'aggregator': 'fednova'}),
  (
    {'memory': 'two_tier', 'memory_capacity': 30, 'retrieval_size': 10},
    {'memory': 'two_tier,capacity=30,retrieval_size=10'},
  ),
  ({'memory': 'none', 'memory_capacity': 30}, {'memory': 'none'}),
  ({'surprise_threshold': 0.0}, {'memory': 'surprise,threshold=0.0'}),
  (
    {'global_memory': True, 'num_prototypes': 3},
    {'global_memory': 'prototypes,number=3'},
  ),
  ({'global_memory': False, 'num_prototypes': 3}, {}),
  (
    {'drift': 'none', 'temperature': 0.1, 'surprise_scale': 2.0},
    {'contrastive': 'unweighted,temperature=0.1'},
  ),
  (
    {'drift': 'adaptive_temperature', 'contrastive_weight': 0.2},
    {'contrastive': 'adaptive_temperature,weight=0.2'},
  ),
  (
    {'drift': 'instance_weight', 'contrastive_weight': 0.0},
    {'contrastive': 'none'},
  ),
  (
    {'proximal_mu': 0.01, 'drift_control': 'none'},
    {'drift_control': 'fedprox,mu=0.01'},
  ),
  (
    {'proximal_mu': 0.0, 'drift_control': 'scaffold'},
    {'drift_control': 'scaffold'},
  ),
  (
    {'server_optimizer': 'fedavgm', 'server_momentum': 0.5},
    {'server_optimizer': 'fedavgm,momentum=0.5'},
  ),
  (
    {
      'server_optimizer': 'fedmuon',
      'server_momentum': 0.5,
      'server_beta2': 0.9,
      'server_epsilon': 1e-6,
    },
    {'server_optimizer': 'fedmuon,beta1=0.5,beta2=0.9,epsilon=1e-06'},
  ),
  ({'client_warmup_rounds': 3}, {'client_schedule': 'constant,warmup=3'}),
  (
    {'server_schedule': 'cosine', 'server_warmup_rounds': 3},
    {'server_schedule': 'cosine,warmup=3'},
  ),
  (
    {'item_embedding': 'content_init', 'collaborative_dim': 32},
    {'item_embedding': 'content_init,collaborative_dim=32'},
  ),
  ({'item_embedding': 'id', 'collaborative_dim': 32}, {}),
  (
    {'split_by': 'timeline', 'test_from': '2000-12-31'},
    {'split_by': 'timeline,test_from=2000-12-31'},
  ),
  ({'split_by': 'leave_one_out', 'test_from': ''}, {}),
  ({'fusion': 'gated', 'gating_init': 0.3}, {'fusion': 'gated,init=0.3'}),
  (
    {'profile': 'history', 'profile_weight': 0.5},
    {'profile': 'history,weight=0.5'},
  ),
  ({'profile': 'none', 'profile_weight': 0.5}, {}),
]


@pytest.mark.parametrize('before, now', OLD)
def test_settings_of_an_older_run_are_read(before, now):
  defaults = RunConfig().as_flat_dict()
  assert config(**before).as_flat_dict() == defaults | now
  texts = {name: parts.written(value) for name, value in before.items()}
  assert config(**texts).as_flat_dict() == defaults | now


def test_what_is_renamed_is_gone_and_its_new_name_is_right():
  names = {field.name for field in FIELDS}
  assert not names & set(RENAMED)
  for old in RENAMED:
    for line in renamed(old, '0.5'):
      setting, _, text = line.partition('=')
      name, given = parts.split(text)
      field = next(f for f in FIELDS if f.name == setting)
      if 'parts' in field.metadata and given:
        assert set(given) <= set(parts.options(field.metadata['parts'][name]))


def test_what_is_left_out_is_false():
  assert not config(profile='none').model.profile
  assert config(profile='history').model.profile
  assert config(contrastive='none').contrastive == Off()
