"""Errors that the command line treats each in its own way, and the hint that comes with the user's mistakes."""

import difflib


class RecipeError(Exception):
    """The user's recipe or arguments are wrong. The message is one line: where, what, what to do."""


class PeerError(RuntimeError):
    """Another process failed; it says itself how."""


class ExploitedError(RuntimeError):
    """The run was ended because its reward is exploited, as the recipe's `guard` asks."""


def nearest(name: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(valid)}"
