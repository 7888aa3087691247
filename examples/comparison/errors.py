"""The one exception whose message is meant for the person who typed the command."""


class UserError(Exception):
    """Something in the command or its input is wrong; the message is one sentence that says what and what to do."""
