"""The one exception class of the package."""


class EaptkError(Exception):
    """Something the user can put right. The message is one line that names the thing and the remedy."""
