"""The one exception family of the kit."""


class GlmppError(Exception):
    """Something the reader can act on: the message says what is wrong, where (file, tensor, stage) and what to do."""
