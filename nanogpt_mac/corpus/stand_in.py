"""The stand-in for tiny Shakespeare: verse in the shape of a play, written by our own grammar from a fixed seed.

It has tiny Shakespeare's length and its 65 symbols, so that a run without a network does the same work. The text is
the same on every platform and Python: all chance comes from `verse.Dice`, all choice from ordered lists.
"""

import hashlib
from dataclasses import dataclass

from nanogpt_mac.corpus.lexicon import THEMES, Word, lexicon
from nanogpt_mac.corpus.verse import Context, Dice, Person, Poet, rhyme

LENGTH = 1_115_394  # characters, as tiny Shakespeare
SHA256 = "31545b4e1fc31f377d751bbb2ddca3c3dc2f72f4e5a951342c9465a361e510f4"
SEED = 1606

TALK = (("state", 50), ("ask", 16), ("order", 20), ("cry", 14))
# Lines a speech runs to before it may end: mostly one to four, at times a long one, as in tiny Shakespeare.
RUNS = (0,) * 14 + (1,) * 8 + (2, 2, 2, 2, 3, 3, 3, 4, 4, 5, 6, 8, 12, 20, 34)


@dataclass
class Cast:
    """The people and places of one play."""

    persons: list[Person]
    lands: list[Word]

    @property
    def names(self) -> list[Word]:
        return [person.name for person in self.persons if person.name is not None]


def generate() -> str:
    """The whole text, exactly LENGTH characters, ending with a sentence and a line end. Takes about 1 s."""
    text = compose(SEED)
    if hashlib.sha256(text.encode()).hexdigest() != SHA256:
        raise RuntimeError("the stand-in text differs from the one that was pinned")
    return text


def compose(seed: int) -> str:
    """A text of LENGTH characters from any seed."""
    dice = Dice(seed)
    poet = Poet(dice)
    speeches: list[str] = []
    left = LENGTH
    while True:
        cast = _cast(dice)
        for _ in range(4 + dice.below(6)):
            for speech in _scene(dice, poet, cast):
                if left - len(speech) - 2 < 600:
                    return "\n\n".join([*speeches, _last_speech(dice, poet, cast, left)])
                speeches.append(speech)
                left -= len(speech) + 2


def _take(dice: Dice, words: list[Word], count: int) -> list[Word]:
    """Different members, in random order."""
    rest = list(words)
    return [rest.pop(dice.below(len(rest))) for _ in range(count)]


def _cast(dice: Dice) -> Cast:
    slots, _ = lexicon()
    men, women = _take(dice, slots["man"], 8), _take(dice, slots["woman"], 5)
    lands = _take(dice, slots["land"], 5)
    king, prince, duke, *others = men
    queen, princess, *ladies = women
    persons = [
        _noble(f"KING {king[0].upper()}", king, ["my liege", "gracious king", "my gracious lord", "dread lord"], 2),
        _noble(f"QUEEN {queen[0].upper()}", queen, ["madam", "gracious queen", "my gracious lady"], 2),
        _noble(f"PRINCE {prince[0].upper()}", prince, ["my prince", "sweet prince", "my lord"], 1),
        _noble(f"DUKE OF {lands[0][0].upper()}", duke, ["my lord duke", "good duke", "my lord"], 1),
        _noble(f"LADY {princess[0].upper()}", princess, ["my lady", "sweet lady", "madam"], 1),
    ]
    for name in others:
        persons.append(_noble(name[0].upper(), name, ["my lord", "sir", f"good {name[0]}", f"noble {name[0]}"], 1))
    for name in ladies:
        persons.append(_noble(name[0].upper(), name, ["lady", f"sweet {name[0]}", f"fair {name[0]}", "madam"], 1))
    folk, _ = slots["folk"][dice.below(len(slots["folk"]))]
    for order in ("First", "Second", "Third"):
        persons.append(Person(f"{order} {folk}", None, ["good fellow", "friend", f"good {folk.lower()}"], "friend", 0))
    for odd, _ in _take(dice, slots["odd"], 2):
        persons.append(Person(odd, None, [f"good {odd.lower()}", "fellow", f"honest {odd.lower()}"], "fellow", 0))
    return Cast(persons, lands)


def _noble(heading: str, name: Word, vocatives: list[str], rank: int) -> Person:
    return Person(heading, name, [*vocatives, name[0]], name[0], rank)


def _scene(dice: Dice, poet: Poet, cast: Cast) -> list[str]:
    """Speeches of two to four people; each answers the one before."""
    pool = list(cast.persons)
    present = [pool.pop(dice.below(len(pool))) for _ in range(2 + dice.below(3))]
    themes = tuple(THEMES[dice.below(len(THEMES))] for _ in range(2))
    speaker, addressee = present[0], present[1]
    ending = "enter"
    speeches = []
    count = 8 + dice.below(28)
    for number in range(count):
        names = [name for name in cast.names if name not in (speaker.name, addressee.name)]
        context = Context(speaker, addressee, names, cast.lands, themes, rhyme(dice))
        last = number == count - 1
        lines, ending = _speech(dice, poet, context, "leave" if last else ending)
        speeches.append("\n".join([f"{speaker.heading}:", *lines]))
        # Most often the one spoken to replies; else someone else present takes the word.
        others = [person for person in present if person is not speaker]
        following = addressee if dice.chance(70) else others[dice.below(len(others))]
        if following is speaker or dice.chance(60):
            speaker, addressee = following, speaker
        else:
            rest = [person for person in present if person is not following]
            speaker, addressee = following, rest[dice.below(len(rest))]
    return speeches


def _speech(dice: Dice, poet: Poet, context: Context, before: str) -> tuple[list[str], str]:
    """The lines of one speech and the kind of its last sentence, which the next speech answers."""
    common = context.speaker.rank == 0
    poet.begin(context, prose=common and dice.chance(70))
    if poet.prose:
        return _prose(dice, poet, before)
    run = RUNS[dice.below(len(RUNS))]
    if before in ("enter", "leave"):
        poet.say("news" if before == "enter" and common else before)
    elif before == "ask" and dice.chance(70):
        poet.say("yes" if dice.chance(50) else "no")
    elif before == "order" and dice.chance(60):
        poet.say("obey" if dice.chance(60) else "refuse")
    elif run == 0:
        poet.say("brief")
        return poet.end(), "ask" if dice.chance(30) else "brief"
    ending = _kind(dice)
    if ending in ("state", "ask") and not poet.lines and dice.chance(30):
        poet.say("open")
    poet.say(ending)
    while len(poet.lines) < run:
        ending = _kind(dice)
        poet.say(ending)
    if before == "leave" and dice.chance(60):
        poet.say("couplet")
    elif dice.chance(1):
        poet.say("song")
    return poet.end(), ending


def _prose(dice: Dice, poet: Poet, before: str) -> tuple[list[str], str]:
    if before == "ask" and dice.chance(50):
        poet.say("no")
    elif before == "order" and dice.chance(50):
        poet.say("obey")
    if dice.chance(2):
        poet.say("bill")
    ending = "prose"
    for _ in range((1, 1, 2, 3)[dice.below(4)]):
        ending = "prose" if dice.chance(65) else _kind(dice)
        poet.say(ending)
    return poet.end(), ending


def _kind(dice: Dice) -> str:
    roll = dice.below(100)
    for kind, percent in TALK:
        roll -= percent
        if roll < 0:
            return kind
    raise AssertionError("the percentages of TALK add up to 100")


def _last_speech(dice: Dice, poet: Poet, cast: Cast, length: int) -> str:
    """A speech of exactly `length` characters: sentences of one line each, the last two chosen to fit."""
    king, queen = cast.persons[:2]
    names = [name for name in cast.names if name not in (king.name, queen.name)]
    context = Context(king, queen, names, cast.lands, ("court", "death"))
    lines = [f"{king.heading}:"]
    left = length - len(lines[0]) - 1
    spare: dict[int, str] = {}
    while left:
        poet.begin(context)
        poet.say("state")
        written = poet.end()
        line = written[0]
        if len(written) > 1 or line in lines:
            continue
        size = len(line) + 1
        spare[size] = line
        other = spare.get(left - size)
        if left - size >= 60:
            lines.append(line)
            left -= size
        elif other is not None and other not in (line, *lines):
            lines += [line, other]
            left = 0
    return "\n".join(lines) + "\n"
