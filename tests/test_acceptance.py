"""The acceptance list: each point measured, none assumed."""

import pytest

from fedmmr_jax.data.features import IntegrityReport
from fedmmr_jax.runs import acceptance
from tests import small

REPORT = IntegrityReport(
  'visual', 'file', (4, 2), 'float32', 0, 1, 0.5, 0.1, 1, 3, 4
)


def train(**changes):
  return (
    dict(
      w_visual=0.5,
      w_semantic=0.5,
      contrastive_loss=3.0,
      gradient_visual=0.2,
      gradient_semantic=0.1,
      gradient_backbone=1.0,
    )
    | changes
  )


def judge(first=None, last=None, hit_rate=0.6, reports=(REPORT,), **changes):
  records = [{'train': first or train()}, {'train': last or train()}]
  points = acceptance.judge(
    small.config(**changes), records, {'sampled': {'HR@10': hit_rate}}, reports
  )
  return {p['name']: p for p in points}


def passed(points):
  return [p['passed'] for p in points.values()]


def test_everything_in_range_passes():
  assert passed(judge()) == [True] * 5


@pytest.mark.parametrize(
  'name, points',
  [
    ('test HR@10, sampled', judge(hit_rate=0.55)),
    ('router weights', judge(last=train(w_visual=0.29, w_semantic=0.71))),
    ('contrastive loss', judge(last=train(contrastive_loss=4.1))),
    ('contrastive loss', judge(last=train(contrastive_loss=1.9))),
    ('gradient reaching the experts', judge(last=train(gradient_visual=0.0))),
    ('gradient reaching the experts', judge(fusion='gated')),
  ],
)
def test_each_point_can_fail_alone(name, points):
  assert [n for n, p in points.items() if not p['passed']] == [name]


def test_what_a_private_run_withholds_is_no_missing_expert():
  nothing = dict.fromkeys(train(), None) | {'loss': None}
  points = judge(nothing, nothing, privacy='clip', select_by='last', patience=0)
  assert passed(points) == [True, None, None, None, True]
  for name in ('router weights', 'gradient reaching the experts'):
    assert points[name]['measured'].startswith('withheld')


def test_a_last_round_without_a_positive_is_passed_over():
  nothing = dict.fromkeys(train(), None) | {'loss': None}
  records = [{'train': train(loss=1.0)}, {'train': nothing}]
  points = acceptance.judge(
    small.config(), records, {'sampled': {'HR@10': 0.6}}, (REPORT,)
  )
  assert [p['passed'] for p in points] == [True] * 5


def test_a_run_without_experts_has_nothing_to_say_about_them():
  points = judge(
    last=train(
      w_visual=None,
      w_semantic=None,
      contrastive_loss=None,
      gradient_visual=None,
      gradient_semantic=None,
    ),
    reports=(),
  )
  assert passed(points) == [True, None, None, None, None]
  assert points['contrastive loss']['measured'] == 'no two experts in this run'


def test_one_expert_alone_has_no_choice_but_a_gradient():
  points = judge(
    last=train(
      w_visual=1.0,
      w_semantic=0.0,
      contrastive_loss=None,
      gradient_semantic=None,
    )
  )
  assert passed(points) == [True, None, None, True, True]


def test_what_is_frozen_is_not_asked_for_a_gradient():
  assert (
    passed(judge(last=train(gradient_backbone=0.0), freeze='backbone'))
    == [True] * 5
  )
  assert passed(
    judge(
      last=train(gradient_visual=0.0, gradient_semantic=0.0), freeze='experts'
    )
  ) == [True, True, True, None, True]
  one = dict(freeze='visual_expert')
  assert passed(judge(last=train(gradient_visual=0.0), **one)) == [True] * 5
  dead = judge(last=train(gradient_semantic=0.0), **one)
  assert dead['gradient reaching the experts']['passed'] is False


def test_the_router_is_told_from_start_to_end():
  points = judge(first=train(w_visual=0.9, w_semantic=0.1))
  assert points['router weights']['measured'] == (
    'visual 0.90 -> 0.50, semantic 0.10 -> 0.50'
  )


def test_a_contrastive_loss_outside_is_explained():
  # 4 windows, one target each: guessing costs ln 4 = 1.39.
  high = judge(last=train(contrastive_loss=5.0))['contrastive loss']
  assert '4 positives of a step gives 1.39' in high['measured']
  low = judge(
    last=train(contrastive_loss=0.5), expert_form='attention,input=candidate'
  )
  assert 'both see the candidate' in low['contrastive loss']['measured']


def test_each_of_three_experts_is_asked_for_its_share():
  """Within 0.6 and 1.4 of an equal share."""

  def three(visual, semantic, audio):
    return judge(
      last=train(
        w_visual=visual, w_semantic=semantic, w_audio=audio, gradient_audio=0.1
      )
    )['router weights']

  good = three(0.46, 0.33, 0.21)
  assert good['passed'] and good['target'] == (
    'each expert in 0.2 to 0.47 at the end'
  )
  assert 'audio - -> 0.21' in good['measured']
  assert three(0.4, 0.41, 0.19)['passed'] is False
  assert three(0.48, 0.3, 0.22)['passed'] is False
  dead = judge(last=train(gradient_audio=0.0))
  assert dead['gradient reaching the experts']['passed'] is False
