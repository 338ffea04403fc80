"""The one exception that a user is meant to see, and how a library's own words are quoted in it."""

import re


class InputError(Exception):
    """Something the user gave cannot be used.

    Its text is one line that names the key (or file), the value and what to do; the commands print it
    without a traceback and exit with code 2.
    """


ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
ADVICE = re.compile(  # sentences for whoever calls the library: its arguments and switches are not this program's
    r"(please|try|use|using|set|setting|see|check|make sure|consider|call|run|pass|note|refer|visit|install|ensure|you"
    r"|to (do|fix|load|use|get|override|set|avoid|see|disable|enable|suppress)|if|for (more|details|a)|in order to"
    r"|this file can still|we recommend|alternatively|do those|\(\d\))\b|.*\b(try setting|two options)\b",
    re.IGNORECASE | re.DOTALL,
)


def cleaned(text: str, most: int = 300) -> str:
    """A library's words in one line, without escape codes and without advice, which is for its own callers."""
    words = " ".join(ESCAPES.sub("", text).split())
    sentences = [s for s in re.split(r"(?<=[.!?;])\s+(?=\S)", words) if s and not ADVICE.match(s.lstrip("-*> "))]
    kept = " ".join(sentences).rstrip(" .;")
    return kept if len(kept) <= most else kept[: most - 3] + "..."


def reason(error: BaseException) -> str:
    """Why a library says that it failed, for one of our lines: the first line of its message, or its name."""
    lines = [line.strip() for line in ESCAPES.sub("", str(error)).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if first.endswith(":") and len(lines) > 1:  # only announces the next
        first = f"{first} {lines[1]}"
    return cleaned(first) or type(error).__name__
