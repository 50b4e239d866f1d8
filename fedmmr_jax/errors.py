"""The one exception that user input can cause."""


class UserError(Exception):
  """One line that says what is wrong, where, and how to fix it.

  The binaries print it without a traceback and exit with status 2.
  """
