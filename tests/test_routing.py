"""What `experiments.inspect_checkpoint router` makes of weights."""

import json

import numpy as np
import pytest

from experiments import routing


def test_three_experts_each_have_a_histogram_and_two_ends():
  weights = np.array(
    [[0.5, 0.3, 0.2], [0.0, 0.9, 0.1], [1.0, 0.0, 0.0], [0.1, 0.1, 0.8]]
  )
  content = routing.summary(weights, ('a', 'b', 'c'), [7, 8, 9, 5], (), 10)
  assert content['with_choice'] == 3  # item 9 has one expert
  assert content['mean_a'] == pytest.approx(0.3)  # of items 7 and 5
  assert content['w_c'] == {'7': 0.2, '8': 0.1, '5': 0.8}
  assert [e['item_id'] for e in content['most_b']] == [8, 7, 5]
  assert [e['item_id'] for e in content['least_c']] == [8, 7, 5]
  assert sum(b['items'] for b in content['histogram_c']) == 3
  text = routing.text(content)
  for words in ('mean weight there: a 0.3000, b 0.4333', 'least a', 'c weight'):
    assert words in text, words


def test_of_two_experts_one_says_all():
  weights = np.array([[0.25, 0.75], [0.75, 0.25]])
  content = routing.summary(weights, ('a', 'b'), [1, 2], (), 10)
  text = routing.text(content)
  assert 'most a' in text and 'most b' in text and 'least' not in text
  assert text.count('█') == 80 and 'b weight  items' not in text


def test_nothing_to_choose_from():
  content = routing.summary(np.ones((2, 1)), ('a',), [1, 2], (), 10)
  assert content['with_choice'] == 0 and content['mean_a'] is None
  assert 'a -' in routing.text(content)


def test_ids_that_are_no_numbers_are_told_as_they_are():
  weights = np.array([[0.25, 0.75], [0.75, 0.25], [1.0, 0.0]])
  ids = ['B07', '-1KK', '007']  # of Amazon, of Yelp, with zeros in front
  content = routing.summary(weights, ('a', 'b'), ids, (), 10)
  assert json.loads(json.dumps(content))['w_a'] == {'B07': 0.25, '-1KK': 0.75}
  assert [e['item_id'] for e in content['most_b']] == ['B07', '-1KK']
  text = routing.text(content)
  assert 'B07' in text and '-1KK' in text and '007' not in text
