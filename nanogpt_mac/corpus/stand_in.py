"""The stand-in for tiny Shakespeare: speeches made from a small vocabulary, for machines without a network.

It has tiny Shakespeare's length and its 65 symbols, so a run does the same work. There is something to learn at every
scale: spelling, which kind of word follows which, the layout of a play, and that whoever is spoken to answers.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

LENGTH = 1_115_394  # characters, as tiny Shakespeare
SHA256 = "f8a2855f63ff2fc788d44958d38ec59f00cb42cd7dac78830b6fec4875fd45a7"
SEED = 1606

T = TypeVar("T")

NAMES = """Henry Rosalind Duke Queen York Beatrice Gloucester Portia Prince Valentine First_Soldier Cordelia Antonio
Juliet Zenobia Lucius Alexander Katharine Mercutio Old_Shepherd Viola Edgar Nurse Iago Oliver Ursula"""

# A line is one of PATTERNS; each word in it that is a key here is replaced by one of the words listed.
WORDS = {
    "the": "the my thy his our this that her your no their every some such yon each its",
    "good": """good sweet gentle noble fair great poor true old false brave cold proud royal dark honest bloody young
        wise idle bitter silent foul quiet holy bold mad gracious heavy lost weary golden worthy cruel strange secret
        patient jealous humble vex'd wretched tender subtle ancient well-loved crooked simple unkind o'erthrown""",
    "king": """king lord heart love man night day death world hand eye blood time father friend sword brother crown
        honour tongue soul son fortune grief daughter grave wit sorrow war youth heaven sea enemy joy mother traitor
        face prince peace letter fool storm oath beauty horse throne winter prison battle flower shadow duty fire ghost
        house marriage village widow kingdom danger ship mercy prize rose river witness jewel music axe candle quarrel
        bosom""",
    "love": """love see know hear bear leave keep speak_of take find fear kill curse serve forget follow hold seek break
        mock call trust pity banish hide weep_for bury welcome strike deny forgive betray fetch envy swear_by question
        amaze revenge excuse judge beguile""",
    "shall": "shall will must may would did can should cannot never_did dare_not might could hath_sworn_to would_not",
    "I": "I thou he she we they you who nobody 'twas_I all_men few",
    "of": "of in with for to from upon by against without before beneath like o'er between beyond",
    "now": """now then here to-day once_more too_late in_truth tonight again at_last I_pray_thee so_soon alone
        with_speed perchance if_heaven_please by_my_faith as_I_live""",
}
PATTERNS = """I shall love the good king
the king of the good king shall love the king
now I shall love the king of the king
the good king shall love the king now
I shall love the good king, and love the king
love the king; for the king shall love the good king
good king, I shall love the king now
what good king shall love the king of the king
O the king of the good king, the king
$3 & the good king for the king""".splitlines()


def generate() -> str:
    """The whole text, exactly LENGTH characters, the same everywhere. Takes about half a second."""
    speeches, size = [], 0
    for speech in _speeches(SEED):
        speeches.append(speech)
        size += len(speech)
        if size >= LENGTH:
            break
    text = "".join(speeches)[: LENGTH - 1] + "\n"
    if hashlib.sha256(text.encode()).hexdigest() != SHA256:
        raise RuntimeError("the stand-in text differs from the one that was pinned")
    return text


def _speeches(seed: int) -> Iterator[str]:
    """Speeches without end. Chance is whole numbers from Philox, whose stream numpy guarantees on every platform."""
    draws = _draws(seed)

    def pick(options: Sequence[T]) -> T:
        """One of the options: the first ones often, the last ones rarely, as words are in any language."""
        return options[min(next(draws) % len(options), next(draws) % len(options))]

    def line() -> str:
        return re.sub(r"\w+", lambda word: pick(words[word[0]]) if word[0] in words else word[0], pick(PATTERNS))

    def spaced(listed: str) -> list[str]:
        return [word.replace("_", " ") for word in listed.split()]

    words, names = {kind: spaced(listed) for kind, listed in WORDS.items()}, spaced(NAMES)
    speaker = names[0]
    while True:
        other = pick(names)
        lines = [line() + pick(",.;:-") for _ in range(next(draws) % 6)] + [line() + pick(".?!")]
        if next(draws) % 2:
            lines[0] = f"{other}, {lines[0]}"
        yield "\n".join([f"{speaker.upper()}:", *(text[0].upper() + text[1:] for text in lines), "\n"])
        speaker = other


def _draws(seed: int) -> Iterator[int]:
    bits = np.random.Philox(key=seed)
    while True:
        yield from bits.random_raw(1 << 16).tolist()
