"""The one exception that a user's input can cause."""


class UserError(Exception):
  """One line that says what is wrong, where, and the mend.

  The binaries print it without a traceback and exit with status 2.
  """
