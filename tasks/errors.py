"""Errors a user can mend. The command line prints them as one line and exits with status 2."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the program is wrong; the message names it and what is allowed."""


class ConfigError(UserError):
    """A config file holds an unknown key, lacks one, or gives one the wrong type or value."""


class DataError(UserError):
    """Data is missing, corrupt, too short or of the wrong shape."""


class NotImplementedYet(UserError):
    """The experiment is listed, but the code that runs it has not been written."""
