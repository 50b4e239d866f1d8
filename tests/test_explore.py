"""The page on which a run is asked: its answers, its server, in a browser."""

import dataclasses
import http.client
import json
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import fedmmr_jax as fm
from experiments import explore_server, explorer
from experiments.explorer import Explorer
from fedmmr_jax import simulation as simulation_lib
from fedmmr_jax.errors import UserError
from fedmmr_jax.runs import report
from tests import small
from tests.browser import Page
from tests.test_cli import refused, run, TINY
from tests.test_recommendation import SETTINGS

EVIL = '<img src=x onerror=alert(1)> & "co"'


@pytest.fixture(scope='module')
def simulation():
  plain = small.dataset()
  titles = [f'Film {item}' for item in plain.item_ids]
  titles[2] = EVIL
  dataset = dataclasses.replace(plain, titles=('', *titles[1:]))
  return simulation_lib.build(small.config(**SETTINGS), dataset)


@pytest.fixture(scope='module')
def state(simulation):
  """As before round 1, but client 3 has trained on two items."""
  state = simulation.init_state()
  first, second = simulation.dataset.sequence(3)[:2].tolist()
  memories = {
    'item': [first, second],
    'last_update': [1, 9],
    'frequency': [1, 3],
    'surprise': [0.5, 0.75],
    'inserted': [1, 2],
  }
  memories = {
    name: getattr(state.memories, name).at[3, :2].set(np.array(values))
    for name, values in memories.items()
  }
  clock = state.memories.clock.at[3].set(10)
  return state._replace(
    memories=state.memories._replace(**memories, clock=clock)
  )


@pytest.fixture(scope='module')
def asked(simulation, state, tmp_path_factory):
  folder = tmp_path_factory.mktemp('posters')
  (folder / '1.png').write_bytes(b'a picture')
  (folder.parent / 'secret.png').write_bytes(b'secret')
  (folder / '3.png').symlink_to(folder.parent / 'secret.png')
  _, images = explorer.find_images(str(folder), '')
  with pytest.MonkeyPatch.context() as patch:
    # One program serves lists of any length here.
    patch.setattr(explorer, 'USUAL', simulation.dataset.num_items)
    yield Explorer(simulation, state, {'1': 'Genres: <i>Drama</i>.'}, images)


@pytest.fixture(scope='module')
def server(asked):
  with explore_server.listen(0) as server:
    server.explorer = asked

    def page(nonce):
      return report.render('explore', title=EVIL, about='', nonce=nonce)

    server.page = page
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def ask(server, method, path, body=None, **headers):
  """(Status, what came back, its headers)."""
  connection = http.client.HTTPConnection(*server.server_address, timeout=60)
  names = {name.replace('_', '-'): value for name, value in headers.items()}
  connection.request(method, path, body, names)
  reply = connection.getresponse()
  content = reply.read()
  connection.close()
  if reply.headers.get_content_type() == 'application/json':
    content = json.loads(content)
  return reply.status, content, reply.headers


def explain(server, **asked):
  return ask(
    server,
    'POST',
    '/explain',
    json.dumps(asked),
    Content_Type='application/json',
  )


@pytest.mark.slow
def test_a_user_gets_the_lists_of_the_library(simulation, state, asked):
  user = str(simulation.dataset.user_ids[3])
  found = asked.explain({'user': user, 'k': 5})
  rows, scores = simulation.recommend(state, 3, 5)
  ids = [str(item) for item in simulation.dataset.item_ids[rows]]
  assert [one['id'] for one in found['recommendations']] == ids
  np.testing.assert_allclose(
    [one['score'] for one in found['recommendations']], scores, rtol=1e-5
  )
  sequence = simulation.dataset.sequence(3)
  assert found['own_history'] and found['left_out'] == []
  assert [one['id'] for one in found['history']] == [
    str(item) for item in simulation.dataset.item_ids[sequence]
  ]
  assert found['window'] == min(6, len(sequence))
  # What training left, aged by the two items that came since, and these two.
  assert found['memory']['clock'] == 12 and found['memory']['slots'] == 8
  entries = {one['id']: one for one in found['memory']['entries']}
  held_out = [str(item) for item in simulation.dataset.item_ids[sequence[-2:]]]
  first, second = (one['id'] for one in found['history'][:2])
  assert set(entries) == {first, second, *held_out}
  for item, age, frequency, surprise in (
    (first, 11, 1, 0.5),
    (second, 3, 3, 0.75),
    (held_out[0], 2, 1, entries[held_out[0]]['surprise']),
    (held_out[1], 1, 1, entries[held_out[1]]['surprise']),
  ):
    one = entries[item]
    assert (one['age'], one['frequency']) == (age, frequency)
    assert one['surprise'] == surprise and one['read']
    rare = np.log1p(frequency) / np.log1p(frequency + 10)
    by_hand = 0.6 * np.exp(-age / 60) + 0.4 * rare
    assert one['utility'] == pytest.approx(by_hand, rel=1e-5)
  # The router's choice, where both experts have something to read.
  routed = simulation.route(state)
  for row, one in zip(rows, found['recommendations']):
    np.testing.assert_allclose(
      list(one['weights'].values()), routed[row], rtol=1e-4
    )
  effects = [
    why['effect']
    for one in found['recommendations']
    for why in one['why']['window']
  ]
  assert effects and min(effects) >= 0.005


@pytest.mark.slow
def test_another_history_is_that_of_a_stranger(simulation, state, asked):
  found = asked.explain(
    {'user': 2, 'history': [1, ' film 4 ', 'nothing', EVIL], 'k': 4}
  )
  assert [one['id'] for one in found['history']] == ['1', '4', '2']
  assert found['left_out'] == ['nothing'] and not found['own_history']
  people = fm.People.of_histories(simulation, [[1, 4, 2]])
  lists = fm.recommend(simulation, state, people, explorer.USUAL)
  assert [one['id'] for one in found['recommendations']] == [
    str(simulation.dataset.item_ids[row]) for row in lists.rows[0, :4]
  ]
  assert {e['id'] for e in found['memory']['entries']} == {'1', '4', '2'}
  assert asked.explain({'history': ['1']})['user'] is None
  # A user's own history is the user, memory and all.
  own = [one['id'] for one in asked.explain({'user': '2'})['history']]
  again = asked.explain({'user': '2', 'history': own})
  assert again['own_history']
  many = asked.explain({'user': '2', 'k': 56})['recommendations']
  assert len(many) == 56 - len(set(own))


def test_searches(asked):
  assert asked.users('3') == ['3'] and len(asked.users('')) == 1
  assert asked.users('nobody') == []
  assert [one['id'] for one in asked.items('FILM 1')][:2] == ['1', '10']
  assert asked.items('7')[0]['id'] == '7'
  assert asked.items(' ') == asked.items('zzz') == []


@pytest.mark.slow
def test_similar_items(asked):
  alike = asked.similar('7')
  assert len(alike) == explorer.SIMILAR and alike[0]['id'] != '7'


@pytest.mark.parametrize(
  'wanted, status, said',
  [
    ({'user': 'nobody'}, 404, "no user 'nobody'; ids go from 1 to 9"),
    ({'user': True}, 400, 'an id is a text or a whole number'),
    ({'user': [1]}, 400, 'an id is a text or a whole number'),
    ({'user': '1', 'k': 57}, 400, 'k=57: say 1 to 56; the catalogue has 56'),
    ({'user': '1', 'k': 0}, 400, 'k=0: say 1 to 56'),
    ({'user': '1', 'k': 10**400}, 400, 'k=100000000000: say 1 to 56'),
    ({'user': '1', 'k': '10'}, 400, 'k: say a whole number'),
    ({'user': '1', 'repeats': 1}, 400, 'repeats: say true or false'),
    ({}, 400, 'name a user, or give a history'),
    ({'history': []}, 400, 'the history is empty'),
    ({'history': '1'}, 400, 'give a list of item ids'),
    ({'history': [1.5]}, 400, 'an id is a text or a whole number'),
    (
      {'history': ['a', 'b']},
      404,
      'the run knows none of these 2 items (a, b)',
    ),
    ({'history': ['1'] * 20_001}, 400, '20000 at most'),
    ({'who': '1'}, 400, 'who: say user, history, k, repeats'),
  ],
)
def test_a_question_that_cannot_be_answered_is_refused(
  server, wanted, status, said
):
  found = explain(server, **wanted)
  assert found[0] == status and said in found[1]['error'], found[1]


def test_requests_of_any_kind_leave_the_server_alive(server):
  is_json = {'Content_Type': 'application/json'}
  for expected, method, path, body, headers in (
    (404, 'GET', '/nothing', None, {}),
    (404, 'GET', '//[', None, {}),
    (404, 'POST', '/', '{}', is_json),
    (404, 'GET', '/similar?q=zz', None, {}),
    (404, 'GET', '/images/2', None, {}),
    # Nothing but the pictures of items, and none that lies elsewhere.
    (404, 'GET', '/images/../secret.png', None, {}),
    (404, 'GET', '/images/..%2Fsecret', None, {}),
    (404, 'GET', '/images/%2Fetc%2Fpasswd', None, {}),
    (404, 'GET', '/images/3', None, {}),
    (400, 'POST', '/explain', '{', is_json),
    (400, 'POST', '/explain', '[' * 100_000, is_json),
    (400, 'POST', '/explain', '[]', is_json),
    (400, 'POST', '/explain', b'\xff\xfe', is_json),
    (400, 'POST', '/explain', '{"user": ' + '9' * 9999 + '}', is_json),
    (415, 'POST', '/explain', '{"user": 1}', {'Content_Type': 'text/plain'}),
    (411, 'POST', '/explain', None, {**is_json, 'Content_Length': '-1'}),
    (413, 'POST', '/explain', None, {**is_json, 'Content_Length': '9' * 30}),
    # A page elsewhere whose name leads here.
    (403, 'GET', '/', None, {'Host': 'evil.example:80'}),
    (403, 'POST', '/explain', '{}', {**is_json, 'Host': '127.0.0.1.evil'}),
    (501, 'PUT', '/explain', '{}', is_json),
  ):
    status, _, _ = ask(server, method, path, body, **headers)
    assert status == expected, (method, path, headers)
  assert ask(server, 'GET', '/users?q=1')[:2] == (200, ['1'])


def test_a_fault_of_its_own_is_told_and_the_server_lives(
  server, asked, monkeypatch, capfd
):
  monkeypatch.setattr(asked, 'items', lambda text: 1 / 0)
  status, content, _ = ask(server, 'GET', '/items?q=a')
  assert status == 500 and 'the terminal has the reason' in content['error']
  assert 'ZeroDivisionError' in capfd.readouterr().err
  assert ask(server, 'GET', '/users?q=1')[0] == 200


def test_the_page_needs_nothing_from_elsewhere(server):
  status, page, headers = ask(server, 'GET', '/')
  text = page.decode()
  assert status == 200 and EVIL not in text and '&lt;img src=x' in text
  assert '://' not in text
  policy = headers['Content-Security-Policy']
  (nonce,) = set(re.findall(r'nonce-([^\']+)', policy))
  assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
  assert text.count(f'nonce="{nonce}"') == text.count('<script') + 1 == 2
  assert nonce not in ask(server, 'GET', '/')[1].decode()
  status, picture, headers = ask(server, 'GET', '/images/1')
  assert picture == b'a picture' and headers['Content-Type'] == 'image/png'


def test_a_port_in_use_is_one_line(server):
  port = server.server_address[1]
  said = small.error_of(explore_server.listen, port)
  assert said.startswith(f'--port={port}: another process listens there')
  assert '--port=0' in said


def test_pictures_of_a_folder(tmp_path):
  assert explorer.find_images('', str(tmp_path)) == (None, {})
  with pytest.raises(UserError, match='no such folder'):
    explorer.find_images(str(tmp_path / 'none'), '')
  (tmp_path / 'posters').mkdir()
  for name in ('5.jpg', '5.png', 'note.txt'):
    (tmp_path / 'posters' / name).write_bytes(b'')
  folder, found = explorer.find_images('', str(tmp_path))
  assert folder == tmp_path / 'posters'
  assert found == {'5': folder / '5.jpg'}


SHOWN = """[...document.querySelectorAll('#recommendations .title')].map(
  x => x.title)"""
STATUS = "document.getElementById('status').textContent"


@pytest.mark.slow
def test_in_a_browser(server, asked, tmp_path):
  address = 'http://127.0.0.1:{}/'.format(server.server_address[1])
  with Page(tmp_path / 'profile') as page:
    page.look(1280, 900, 'light')
    page.open(address)
    page.run('document.getElementById("user").focus()')
    page.write('4')
    page.press('Enter')
    page.wait(f'{STATUS}.startsWith("Answered")')
    own = asked.explain({'user': '4', 'k': 10})
    before = page.run(SHOWN)
    assert before == [one['title'] for one in own['recommendations']]
    assert page.run('location.hash') == '#user=4'
    entries = page.run('document.querySelectorAll("#memory tbody tr").length')
    assert entries == len(own['memory']['entries']) > 0
    background = 'getComputedStyle(document.body).backgroundColor'
    assert page.run(background) == 'rgb(255, 255, 255)'

    # Without the latest item, by the keyboard: another list, focus kept.
    page.run('document.querySelector("#history button").focus()')
    page.press('Enter')
    page.wait('!document.getElementById("changed").hidden')
    page.wait('document.activeElement.title === "Remove"')
    less = [one['id'] for one in own['history']][:-1]
    other = asked.explain({'user': '4', 'history': less, 'k': 10})
    titles = [one['title'] for one in other['recommendations']]
    assert page.run(SHOWN) == titles != before
    # And with another one, found by its title, which stays text.
    page.run('document.getElementById("add").focus()')
    page.write('onerror')
    page.wait('document.querySelector("#found button")')
    page.press('Enter')
    page.wait('document.querySelector("#history .title").title.includes("co")')
    more = asked.explain({'user': '4', 'history': [*less, '2'], 'k': 10})
    assert page.run(SHOWN) == [one['title'] for one in more['recommendations']]
    assert page.run('document.querySelectorAll("img[src=x]").length') == 0
    page.run('document.getElementById("undo").click()')
    page.wait('document.getElementById("changed").hidden')
    assert page.run(SHOWN) == before

    # Refused: said, and what is shown stays.
    page.run("""document.getElementById('user').value = 'nobody',
      document.getElementById('person').requestSubmit()""")
    page.wait('document.getElementById("error").textContent')
    assert page.run(SHOWN) == before
    # The browser itself tells of the 404, and nobody of anything else.
    assert [c for c in page.complaints if '404' not in c] == []

    page.look(390, 844, 'dark')
    page.open('about:blank')
    page.open(f'{address}#user=4')
    page.wait(f'{STATUS}.startsWith("Answered")')
    assert page.run('document.scrollingElement.scrollWidth <= innerWidth')
    assert page.run(background) == 'rgb(13, 17, 23)'
    unnamed = page.run("""[...document.querySelectorAll(
      'button, input, textarea')].filter(x => !x.labels?.length
      && !x.textContent.trim() && !x.getAttribute('aria-label')).length""")
    assert unnamed == 0


@pytest.mark.slow
def test_from_the_shell(ml_1m, tmp_path):
  workdir = tmp_path / 'run'
  run(
    'train',
    *TINY,
    '--experts=none',
    f'--data_dir={ml_1m}',
    f'--workdir={workdir}',
  )
  nowhere = f'--images={tmp_path}/no'
  said = refused(f'--workdir={workdir}', nowhere, binary='explore')
  assert f'{tmp_path}/no: no such folder' in said
  before = sorted(path for path in workdir.rglob('*'))
  process = subprocess.Popen(
    [
      sys.executable,
      '-m',
      'experiments.explore',
      f'--workdir={workdir}',
      '--port=0',
    ],
    stdout=subprocess.PIPE,
    text=True,
  )
  lines = []
  for line in process.stdout:
    lines.append(line)
    if 'http' in line:
      break
  assert 'round ' in lines[0] and '6 users, 27 items' in lines[0]
  port = int(re.search(r'http://127\.0\.0\.1:(\d+)/ \(Ctrl-C', lines[-1])[1])
  connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
  connection.request('GET', '/items?q=am%C3%A9lie%207')
  (found,) = json.loads(connection.getresponse().read())
  assert found['title'] == 'Amélie 7 (2001)'
  assert found['text'] == 'Genres: Drama.'
  connection.request(
    'POST', '/explain', '{"user": 2}', {'Content-Type': 'application/json'}
  )
  found = json.loads(connection.getresponse().read())
  assert found['memory'] is None and found['experts'] == []
  assert len(found['recommendations']) == 10
  process.send_signal(signal.SIGINT)
  assert process.wait(timeout=60) == 0
  assert before == sorted(path for path in workdir.rglob('*'))
