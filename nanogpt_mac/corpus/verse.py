"""Sentences in blank verse or prose from the grammar: metre, line ends, agreement with who speaks to whom."""

import re
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np

from nanogpt_mac.corpus.grammar import GRAMMAR, STRESS
from nanogpt_mac.corpus.lexicon import RHYMES, Word, lexicon

LINE = 10  # syllables: a pentameter; a weak eleventh may follow
PROSE_WIDTH = 58  # characters
DEEP = 6  # from this depth on the shortest alternatives are taken
FORMS = "bspitdng"
# Words that lean on the next one and so do not end a line.
NOT_LAST = frozenset(
    ["a", "an", "the", "my", "thy", "your", "his", "her", "our", "their", "this", "no", "every", "some"]
)
NOT_LAST |= {"of", "to", "in", "with", "by", "for", "from", "upon", "like", "at", "o'er", "whose", "and", "o"}
_BEFORE_VOWEL = {"a": "an", "A": "An", "thy": "thine", "Thy": "Thine"}
_VOWEL = re.compile("(?:hon|heir|hour|[aeio]|u(?!su))", re.IGNORECASE)
_SUBJECTS = {"I": "I", "I'll": "I", "I've": "I", "we": "we", "we'll": "we"}
_SUBJECTS |= dict.fromkeys(("thou", "thou'lt", "you", "you'll"), "thou")
# What an object pronoun becomes where the clause has this subject: "I praise me" is no English.
_REFLEXIVE = {
    ("me", "I"): "myself",
    ("me", "we"): "ourselves",
    ("us", "we"): "ourselves",
    ("us", "I"): "them",
    ("thee", "thou"): "thyself",
    ("you", "thou"): "yourself",
}
_PIECE = re.compile(r"\{([^}]*)\}|([A-Za-z$\d&'][\w'$&]*)|(--|[-,.;:!?/])")


class Dice:
    """Whole numbers from Philox 4x64 through `random_raw`, whose stream numpy guarantees."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=np.zeros(4, np.uint64))
        self._drawn: list[int] = []

    def below(self, n: int) -> int:
        if not self._drawn:
            self._drawn = self._bits.random_raw(1 << 14).tolist()
        return (self._drawn.pop() * n) >> 64

    def chance(self, percent: int) -> bool:
        return self.below(100) < percent


class Piece(NamedTuple):
    """One element of an alternative. kind: word, slot, again (words remembered before), mark or break."""

    kind: str
    text: str
    stress: str
    glued: bool
    remember: str


@dataclass
class Person:
    """A speaker: the heading, the given name if there is one, and how others address him or her."""

    heading: str
    name: Word | None
    vocatives: list[str]
    plain_vocative: str
    rank: int  # 2 royal, 1 noble, 0 common


@dataclass
class Context:
    """What a sentence may refer to."""

    speaker: Person
    addressee: Person
    names: list[Word]
    lands: list[Word]
    themes: tuple[str, ...]
    rhyme: list[str] = field(default_factory=list)


def _parse(template: str) -> list[Piece]:
    pieces = []
    for chunk in template.split():
        glued = False
        for slot, word, mark in _PIECE.findall(chunk):
            if slot:
                name, _, remember = slot.partition(":")
                pieces.append(Piece("slot" if name else "again", name, "", glued, remember))
            elif word:
                stress = "" if word == "'s" else STRESS.get(word, "x")
                pieces.append(Piece("word", word, stress, glued, ""))
            else:
                kind = "break" if mark == "/" else "mark"
                pieces.append(Piece(kind, mark, "", True, ""))
            glued = True
    return pieces


def _alternatives() -> dict[str, list[tuple[int, str]]]:
    """The rules of GRAMMAR as text: name to (weight, template). A `~` rule becomes `name~t` and `name~y`."""
    found: dict[str, list[tuple[int, str]]] = {}
    for rule in re.split(r"\n(?=\S)", GRAMMAR.strip()):
        name, kind, body = rule.split(maxsplit=2)
        options = [re.fullmatch(r"(?:(\d+) )?(.*)", " ".join(part.split())) for part in body.split("|")]
        weighted = [(int(option[1] or 1), option[2]) for option in options if option]
        if kind == "~":
            found[f"{name}~t"], found[f"{name}~y"] = weighted[:1], weighted[1:]
        else:
            found[name] = weighted
    return found


@cache
def rules() -> dict[str, list[tuple[int, list[Piece]]]]:
    """Every rule with its alternatives, each as often as its weight, with the least depth it needs."""
    parsed: dict[str, list[tuple[int, list[Piece]]]] = {}
    slots, _ = lexicon()
    for name, choices in _alternatives().items():
        for form in FORMS if name.endswith(".@") else "@":
            options = [(weight, _parse(text.replace(".@", f".{form}"))) for weight, text in choices]
            # An auxiliary lacks some forms ("to must" is no English): such alternatives are not made.
            whole = [(weight, pieces) for weight, pieces in options if not _lacks(pieces, slots)]
            parsed[name.replace(".@", f".{form}")] = whole
    depth = dict.fromkeys(parsed, 99)
    for _ in parsed:
        before = dict(depth)
        for name, options in parsed.items():
            depth[name] = 1 + min((_depth(pieces, depth) for _, pieces in options), default=99)
        if depth == before:
            break
    return {
        name: [(_depth(pieces, depth), pieces) for weight, pieces in options for _ in range(weight)]
        for name, options in parsed.items()
    }


def _lacks(pieces: list[Piece], slots: dict[str, list[Word]]) -> bool:
    auxiliaries = ("be.", "have.", "do.", "will.", "shall.", "can.", "may.", "must.")
    return any(p.kind == "slot" and p.text.startswith(auxiliaries) and p.text not in slots for p in pieces)


def _depth(pieces: list[Piece], depth: dict[str, int]) -> int:
    return max((depth.get(p.text, depth.get(f"{p.text}~t", 0)) for p in pieces if p.kind == "slot"), default=0)


@cache
def _pool(slot: str, themes: tuple[str, ...]) -> tuple[list[Word], list[Word], list[Word]]:
    """Words of a slot: those fit for a weak position in the line, for a strong one, and all.

    With themes: their words alone, or all where they have too few.
    """
    slots, themed = lexicon()
    words = [word for theme in themes for word in themed.get(f"{slot}@{theme}", [])]
    if len(words) < 4:
        words = slots[slot]
    weak = [word for word in words if _fits(word[1], 0)]
    strong = [word for word in words if _fits(word[1], 1)]
    return weak or words, strong or words, words


@cache
def _heard() -> dict[str, str]:
    """The stress of every listed word, names too, in lower case."""
    slots, _ = lexicon()
    return {word.lower(): stress for words in slots.values() for word, stress in words} | STRESS


def _fits(stress: str, position: int) -> bool:
    """Whether no stressed syllable lands on an even (weak) position of the line. One alone may: a spondee."""
    return stress == "1" or all((position + i) % 2 for i, syllable in enumerate(stress) if syllable == "1")


class Poet:
    """Writes one speech at a time, word after word, into lines."""

    def __init__(self, dice: Dice) -> None:
        self.dice = dice
        self._rules = rules()
        self._slots = lexicon()[0]
        self._recent: list[str] = []
        self._subject = ""

    def begin(self, context: Context, prose: bool = False) -> None:
        """Starts a speech."""
        self.context = context
        self.prose = prose
        # "Thou" to inferiors and, half of the time, to equals.
        gap = context.addressee.rank - context.speaker.rank
        self._thou = "~t" if gap < 0 or (gap == 0 and self.dice.chance(50)) else "~y"
        self.lines: list[str] = []
        self._line: list[tuple[str, int]] = []
        self._at = 0
        self._sentence = True
        self._glue = False
        self._said: list[Word] = []
        self._remembered: dict[str, list[Word]] = {}

    def say(self, symbol: str) -> None:
        """Adds what a rule makes: a sentence, an opening, or lines that the rule itself ends."""
        self._own_lines = symbol in ("couplet", "song")
        if self._own_lines and self._line:
            self.end_line()
        self._expand(symbol, 0)
        full = self._at >= LINE - 1 or (self._at == LINE - 2 and self.dice.chance(25))
        if self._line and (self._own_lines or (self._sentence and full and not self.prose)):
            self.end_line()

    def end(self) -> list[str]:
        """The finished lines."""
        if self._line:
            if len(self._line) == 1 and self.lines and not self.prose:
                # A single word left over makes the line before it a long one.
                self.lines[-1] += f" {self._line.pop()[0]}"
            else:
                self.end_line()
        return _wrap(" ".join(self.lines)) if self.prose else [_capital(line) for line in self.lines]

    def end_line(self, carry: bool = False) -> None:
        held: list[tuple[str, int]] = []
        while carry and len(self._line) > 1 and self._line[-1][0].lower() in NOT_LAST:
            held.insert(0, self._line.pop())
        self.lines.append(" ".join(text for text, _ in self._line))
        self._line = held
        self._at = sum(syllables for _, syllables in held)

    def _expand(self, symbol: str, depth: int) -> None:
        options = self._rules.get(symbol) or self._rules.get(symbol + self._thou)
        if options is None:
            self._word(symbol)
            return
        pieces = options[self.dice.below(len(options))]
        if depth >= DEEP:
            least = min(option[0] for option in options)
            short = [option for option in options if option[0] == least]
            pieces = short[self.dice.below(len(short))]
        if symbol == "imp":
            self._subject = "thou"
        for kind, text, stress, glued, remember in pieces[1]:
            if glued and kind not in ("mark", "break"):
                self._glue = True
            if kind == "word":
                self._emit(text, stress)
            elif kind == "mark":
                self._mark(text)
            elif kind == "slot":
                begin = len(self._said)
                self._expand(text, depth + 1)
                if remember:
                    self._remembered[remember] = self._said[begin:]
            elif kind == "again":
                for word in self._remembered[remember]:
                    self._emit(*word)
            else:
                self.end_line()

    def _word(self, slot: str) -> None:
        context = self.context
        if slot == "name":
            self._emit(*context.names[self.dice.below(len(context.names))])
        elif slot == "land":
            self._emit(*context.lands[self.dice.below(len(context.lands))])
        elif slot in ("me", "us", "you"):
            plain = "thee" if slot == "you" and self._thou == "~t" else slot
            pronoun = _REFLEXIVE.get((plain, self._subject), plain)
            self._emit(pronoun, "01" if pronoun.endswith(("self", "selves")) else "x")
        elif slot in ("r1", "r2"):
            self._emit(context.rhyme[int(slot[1]) - 1], "1")
        elif slot in ("voc", "voc1"):
            addressee = context.addressee
            choice = addressee.plain_vocative
            if slot == "voc":
                choice = addressee.vocatives[self.dice.below(len(addressee.vocatives))]
            for word in choice.split():
                self._emit(word, _heard().get(word.lower(), "x"))
        else:
            self._emit(*self._choose(slot))

    def _choose(self, slot: str) -> Word:
        """A word of the slot that suits the metre here and was not used just before."""
        if slot.partition(".")[0] in ("be", "have", "do", "will", "shall", "can", "may", "must"):
            return self._slots[slot][0]
        dice = self.dice
        pool = _pool(slot, self.context.themes if dice.chance(45) else ())
        position = 0 if self._at >= LINE else self._at % 2
        words = pool[2] if self.prose else pool[position]
        word = words[dice.below(len(words))]
        for _ in range(3):
            if word[0] not in self._recent:
                break
            word = words[dice.below(len(words))]
        self._recent.append(word[0])
        del self._recent[:-14]
        return word

    def _emit(self, text: str, stress: str) -> None:
        self._said.append((text, stress))
        self._subject = _SUBJECTS.get(text, self._subject)
        if self._glue:
            before, syllables = self._line[-1]
            if text == "'s" and before.endswith("s"):
                text = "'"
            self._line[-1] = (before + text, syllables + len(stress))
            self._at += len(stress)
            self._glue = False
            return
        overflows = self._at >= LINE or self._at + len(stress) > LINE + 1
        if overflows and self._line and not (self.prose or self._own_lines):
            self.end_line(carry=True)
        if self._line and self._line[-1][0] in _BEFORE_VOWEL and _VOWEL.match(text):
            self._line[-1] = (_BEFORE_VOWEL[self._line[-1][0]], 1)
        if self._sentence:
            text = _capital(text)
            self._sentence = False
        self._line.append((text, len(stress)))
        self._at += len(stress)

    def _mark(self, mark: str) -> None:
        text, syllables = self._line[-1]
        self._line[-1] = (text + mark, syllables)
        if mark != "-":
            self._subject = ""
        if mark in ".!?":
            self._sentence = True


def _capital(text: str) -> str:
    """Upper case for the first letter, also behind an apostrophe ('Tis)."""
    for i, char in enumerate(text):
        if char.isalpha():
            return text[:i] + char.upper() + text[i + 1 :]
    return text


def _wrap(text: str) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > PROSE_WIDTH:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def rhyme(dice: Dice) -> list[str]:
    """Two different rhyming nouns."""
    family = RHYMES[dice.below(len(RHYMES))]
    first = dice.below(len(family))
    second = (first + 1 + dice.below(len(family) - 1)) % len(family)
    return [family[first], family[second]]
