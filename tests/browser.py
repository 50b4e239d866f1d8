"""A page in headless Chromium, driven through its DevTools pipe."""

import base64
import json
import os
import shutil
import subprocess
import time
from typing import Any

import pytest

# Answers are waited for this long; a loaded machine is slow.
SECONDS = 60


class Page:
  """One tab. Use it in a `with`; without a Chromium the test is skipped.

  Attributes:
    complaints: what the page wrote to the console as an error or warning, and
      what it threw.
  """

  def __init__(self, profile: Any):
    chromium = shutil.which('chromium') or shutil.which('chromium-browser')
    if not chromium:
      pytest.skip('no chromium')
    self.complaints: list[str] = []
    self._number = 0
    theirs, self._to = os.pipe()
    self._from, back = os.pipe()
    # The browser reads its file 3 and writes its file 4.
    self._process = subprocess.Popen(
      [
        'bash',
        '-c',
        f'exec "$@" 3<&{theirs} 4>&{back}',
        'bash',
        chromium,
        '--headless',
        '--no-sandbox',
        '--disable-gpu',
        '--no-first-run',
        '--disable-background-networking',
        '--disable-component-update',
        '--disable-sync',
        f'--user-data-dir={profile}',
        '--remote-debugging-pipe',
        'about:blank',
      ],
      pass_fds=(theirs, back),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    os.close(back)
    self._rest = b''
    self._session = None
    targets = self._ask('Target.getTargets')['targetInfos']
    (tab,) = [t['targetId'] for t in targets if t['type'] == 'page']
    self._session = self._ask(
      'Target.attachToTarget', targetId=tab, flatten=True
    )['sessionId']
    for domain in ('Page', 'Runtime', 'Log'):
      self._ask(f'{domain}.enable')

  def __enter__(self) -> 'Page':
    return self

  def __exit__(self, *exception: Any) -> None:
    self._process.kill()
    self._process.wait()
    os.close(self._to)
    os.close(self._from)

  def look(self, width: int, height: int, scheme: str) -> None:
    """Sets the size of the screen and 'light' or 'dark'."""
    self._ask(
      'Emulation.setDeviceMetricsOverride',
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=False,
    )
    self._ask(
      'Emulation.setEmulatedMedia',
      features=[{'name': 'prefers-color-scheme', 'value': scheme}],
    )

  def open(self, address: str) -> None:
    self._ask('Page.navigate', url=address)
    self.wait('document.readyState === "complete"')

  def run(self, script: str) -> Any:
    """The value of a JavaScript expression; promises are awaited."""
    done = self._ask(
      'Runtime.evaluate',
      expression=script,
      awaitPromise=True,
      returnByValue=True,
    )
    assert 'exceptionDetails' not in done, done['exceptionDetails']
    return done['result'].get('value')

  def wait(self, condition: str) -> None:
    """Until an expression is true."""
    start = time.monotonic()
    while not self.run(f'Boolean({condition})'):
      assert time.monotonic() - start < SECONDS, condition
      time.sleep(0.02)

  def press(self, key: str) -> None:
    """A key, such as 'Tab' or 'Enter'."""
    code = {'Tab': 9, 'Enter': 13, ' ': 32}[key]
    text = {'Enter': '\r', ' ': ' '}.get(key, '')
    for kind in ('keyDown', 'keyUp'):
      self._ask(
        'Input.dispatchKeyEvent',
        type=kind,
        key=key,
        code=key,
        windowsVirtualKeyCode=code,
        **({'text': text} if text and kind == 'keyDown' else {}),
      )

  def write(self, text: str) -> None:
    """Types into whatever has the focus."""
    self._ask('Input.insertText', text=text)

  def picture(self, path: Any, whole: bool = False) -> None:
    """Writes a PNG of the screen, or of the whole page."""
    found = self._ask(
      'Page.captureScreenshot', format='png', captureBeyondViewport=whole
    )
    path.write_bytes(base64.b64decode(found['data']))

  def _ask(self, method: str, **params: Any) -> dict[str, Any]:
    self._number += 1
    asked = {'id': self._number, 'method': method, 'params': params}
    if self._session:
      asked['sessionId'] = self._session
    os.write(self._to, json.dumps(asked).encode() + b'\0')
    while True:
      told = self._next()
      if told.get('id') == self._number:
        assert 'error' not in told, told
        return told['result']
      self._complain(told)

  def _next(self) -> dict[str, Any]:
    while b'\0' not in self._rest:
      more = os.read(self._from, 1 << 16)
      assert more, 'the browser is gone'
      self._rest += more
    line, _, self._rest = self._rest.partition(b'\0')
    return json.loads(line)

  def _complain(self, told: dict[str, Any]) -> None:
    params = told.get('params', {})
    match told.get('method'):
      case 'Runtime.exceptionThrown':
        self.complaints.append(str(params['exceptionDetails']))
      case 'Runtime.consoleAPICalled' if params['type'] in ('error', 'warning'):
        self.complaints.append(str(params['args']))
      case 'Log.entryAdded' if params['entry']['level'] in ('error', 'warning'):
        self.complaints.append(params['entry']['text'])
