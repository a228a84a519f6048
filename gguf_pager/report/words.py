"""The words of the command line for what errors call by its name in Python."""

from __future__ import annotations

import re

OPTIONS = {"budget": "--budget", "policy": "--policy", "io": "--io", "n_readers": "--readers", "mirror": "--mirror",
           "n_ctx": "-c", "n_batch": "-b", "n_ubatch": "-ub", "n_threads": "-t"}
"""Arguments that have an option. Those that have none never come from the command line, nor do errors about them."""

_PLAIN_WORDS = {"budget", "policy", "io", "mirror"}
"""Of these, those that are also words of a sentence: they are arguments only where a value or a rule follows."""

_NAMES = "|".join(OPTIONS)
_SETTING = re.compile(rf"(?<![\w-])({_NAMES})=('[^']*'|[\w.%]+)")
_SUBJECT = re.compile(rf"(?<![\w-])({'|'.join(sorted(_PLAIN_WORDS))})(?= (?:'|must |b'))")
_NAME = re.compile(rf"(?<![\w-])({'|'.join(sorted(OPTIONS.keys() - _PLAIN_WORDS))})(?!\w)")


def as_options(message: str) -> str:
    """Return an error's message with options in place of arguments: "say budget='min'" becomes "say --budget min"."""
    message = _SETTING.sub(lambda match: f"{OPTIONS[match[1]]} {match[2].strip(chr(39))}", message)
    message = _SUBJECT.sub(lambda match: OPTIONS[match[1]], message)
    return _NAME.sub(lambda match: OPTIONS[match[1]], message)
