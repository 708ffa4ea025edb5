"""The one exception family of the kit."""


class GlmppError(Exception):
    """Something the reader can act on: the message says what is wrong, where (file, tensor, stage) and what to do."""


class KitError(GlmppError):
    """A fault of glmpp's own code, and no verdict on anything: what it says, with its traceback, belongs in a report."""
