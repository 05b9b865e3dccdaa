"""Errors that the user can correct: commands print them as one line and exit with code 2."""

import difflib
from collections.abc import Collection

LONGEST_WORD, LONGEST_LINE = 300, 1200  # characters of a message


class UserError(Exception):
    """An error that the user can correct; the message is one line with the value, the rule and the remedy."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(UserError):
    """A setting has a value that breaks its rule."""


class UnknownNameError(ConfigError):
    """A setting has a name that no registry has; an experiment file may register it."""


def printable(text: str) -> str:
    """Returns `text` as one line for a terminal, with control characters escaped. Long words and lines are cut in the
    middle, because a message ends with the rule and the remedy."""
    words = escaped(" ".join(text.split())).split(" ")
    return _cut(" ".join(_cut(word, LONGEST_WORD) for word in words), LONGEST_LINE)


def escaped(text: str, keep: str = "") -> str:
    """Returns `text` for a terminal or a file: control characters, but those in `keep`, and what is no UTF-8 become
    Python's escapes."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def one_line(error: BaseException) -> str:
    """Returns the kind of an error and the beginning of its message, on one line."""
    text = printable(str(error))
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def first_few(parts: Collection[str]) -> str:
    """Returns the first parts of a list in words, and how many more there are."""
    first, more = [*parts][:3], len(parts) - 3
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Returns "; did you mean 'x'?" with the most similar known name, by its initials (lr), by the whole, first in
    another case, or by the part after its last dot; or "" if none is similar."""
    ends = {word.rpartition(".")[2]: word for word in known}
    initials = {"".join(part[:1] for part in end.split("_")): word for end, word in ends.items() if "_" in end}
    near = [initials[end] for end in [name.rpartition(".")[2]] if end in initials]
    near += [word for word in known if word.lower() == name.lower()]
    near += difflib.get_close_matches(name, known, n=1)
    near += [ends[end] for end in difflib.get_close_matches(name.rpartition(".")[2], ends, n=1, cutoff=0.7)]
    return f"; did you mean {near[0]!r}?" if near else ""


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest // 2]}...{text[-(longest // 2) :]}"
