"""The words of the stand-in: our own lists, by class, stress and theme, and the rules that inflect them.

A line of WORDS is `class.stress [@theme]` and words. In a stress pattern 1 is a strong syllable and 0 a weak one.
`say/said/said` gives an irregular past and participle (or, for nouns, a plural); `*` after a word doubles its last
letter before -ed and -ing.
"""

from functools import cache

WORDS = """
per.1 lord duke earl knight squire knave fool slave friend foe son heir priest monk clerk judge wretch youth
per.1 man/men child/children guest host twin bard dame thane
per.1@war guard scout spy page thief
per.1@love bride maid nurse groom swain nymph
per.1@sea mate cook
per.1@death ghost saint fiend nun
per.1@field smith boor churl
per.10 father mother brother sister husband widow orphan beggar servant master mistress lady baron uncle nephew
per.10 daughter cousin stranger villain tyrant traitor rebel coward poet scholar neighbour
per.10@war soldier captain archer horseman/horsemen watchman/watchmen herald drummer gunner victor
per.10@love lover suitor minstrel rival gossip wooer
per.10@court jester porter bishop lawyer doctor chaplain usher tutor courtier
per.10@sea sailor pirate merchant fisher boatman/boatmen helmsman/helmsmen trader
per.10@death pilgrim hermit prophet sexton hangman/hangmen mourner martyr
per.10@field shepherd farmer hunter herdsman/herdsmen miller weaver tinker cobbler reaper ploughman/ploughmen
per.100 counsellor gentleman/gentlemen murderer conqueror wanderer flatterer villager
per.100@war officer prisoner messenger
per.100@court emperor chancellor governor chamberlain
per.100@sea mariner foreigner
per.100@death sorcerer
per.100@field carpenter gardener cottager
per.010 usurper deceiver avenger companion protector pretender apprentice attendant
per.010@war commander defender
per.010@love betrayer adorer enchantress/enchantresses
per.010@death physician magician
thing.1 crown ring cup chain lamp bell book scroll key door purse coin cloak gown knife bed gift mask
thing.1@war sword shield spear axe lance helm drum flag tent
thing.1@love lute veil glove harp rose song
thing.1@court throne robe seal bribe feast cage
thing.1@sea sail ship oar net mast rope hook
thing.1@death tomb urn shroud grave torch skull
thing.1@field plough scythe wheel cart sheaf/sheaves hive spade flail
thing.10 letter mirror candle window mantle basket bottle treasure jewel garment
thing.10@war dagger banner trumpet armour saddle arrow standard bowstring cannon
thing.10@love garland ribbon pillow bracelet locket sonnet
thing.10@court sceptre chalice treaty charter parchment ledger office curtain
thing.10@sea anchor rudder compass vessel cargo lantern
thing.10@death coffin altar cradle dungeon gallows/gallows potion
thing.10@field hammer barrel kettle saddle ladder furrow harvest sickle
thing.01 device reward decree command bequest disguise
thing.100 instrument monument ornament talisman tapestry candlestick battlement
body.1 heart hand eye brow cheek lip tongue breast brain arm knee foot/feet head face throat voice soul ear mind
body.10 bosom finger shoulder spirit forehead eyelid visage conscience
nat.1 sun moon star wind cloud flame stone hill tree earth sky night day dew dawn dust frost snow rain
nat.1@war hawk wolf/wolves hound horse spark blast bear boar
nat.1@love rose dove swan spring brook bough lark
nat.1@court peak swan hind stag
nat.1@sea wave tide storm shore cliff reef gull gale rock sand
nat.1@death owl crow snake thorn toad worm mist moth bat
nat.1@field field wood oak leaf/leaves root lamb bee corn ox/oxen goose/geese vale
nat.10 heaven morning evening summer winter mountain river shadow planet garden valley
nat.10@war thunder falcon eagle lion tiger lightning wildfire
nat.10@love lily blossom petal sparrow swallow myrtle moonbeam
nat.10@court laurel cedar peacock fountain
nat.10@sea ocean island tempest dolphin billow current raindrop
nat.10@death raven serpent adder spider willow comet nightshade
nat.10@field meadow forest orchard barley pasture heifer bramble ivy
nat.01 eclipse
nat.100 nightingale violet wilderness firmament
nat.010 horizon
abs.1 love hate grief joy hope fear shame pride wrath scorn faith truth guile fraud sin guilt peace strife rest
abs.1 sleep death life fate fame praise blame wealth want need lust rage care toil pain woe mirth grace wit youth age
abs.10 honour virtue mercy pity justice treason envy malice anger sorrow sadness kindness weakness madness silence
abs.10 wisdom folly beauty duty danger fortune hunger plenty knowledge patience conscience courage valour glory
abs.10 freedom bondage slander rumour friendship nature reason passion pleasure slumber darkness laughter custom
abs.01 despair delight neglect contempt disdain deceit revenge remorse regret defeat decay repose renown esteem
abs.100 majesty memory harmony misery charity chastity clemency constancy cruelty flattery industry infamy
abs.100 innocence jealousy liberty loyalty modesty penitence poverty tyranny treachery vanity victory villainy destiny
abs.010 ambition devotion affection compassion suspicion remembrance allegiance defiance dishonour displeasure
abs.010 confusion rebellion repentance submission contentment enchantment
place.1 court camp town house hall church inn cell bridge street road port moor heath den cave
place.10 castle palace chamber prison temple cottage city village market tavern harbour desert churchyard kitchen
place.10 stable cloister tower kingdom cellar
place.010 encampment apartment
adj.1 cold dark bright sweet black white red old new young wild calm deep high swift slow strong weak soft hard sharp
adj.1 clear pale rich poor rude fair foul false true blind dumb dry broad strange grim stern plain rare vain sad grey
adj.10 bitter gentle golden silver broken hollow weary heavy silent secret sudden mighty humble lofty holy wicked
adj.10 ancient crooked crimson frozen burning bleeding gloomy stormy barren fruitful fatal mortal dreadful careless
adj.10 restless sleepless nameless endless lonely lovely lowly sullen tender quiet naked wintry rusty painted stolen
adj.01 unkind unknown unjust untrue divine sublime remote severe profane forlorn serene obscure accursed
adj.100 glorious furious treacherous merciful merciless innocent violent desolate delicate bountiful perilous
adj.010 unworthy forgotten forsaken enchanted immortal eternal rebellious untimely
padj.1 brave bold wise mad kind proud meek just mild sly glad lean stout grave fond
padj.10 valiant gallant honest wretched foolish drunken cunning jealous faithful patient loving angry merry wanton
padj.10 humble guilty guiltless worthy hapless happy weary noble thankful prudent nimble sober
padj.01 sincere discreet profane forlorn devout benign
padj.100 dutiful generous virtuous innocent treacherous sorrowful quarrelsome credulous
padj.010 unworthy unfaithful courageous ambitious forgetful contented
adv.1 now then here there still well oft once thus soon
adv.10 always often
adv.01 again
manner.10 slowly sadly gladly softly boldly bravely gently proudly swiftly surely truly vainly wildly dearly humbly
manner.10 darkly nobly wisely fairly kindly justly sharply rudely idly
manner.010 severely unjustly sincerely divinely
manner.100 patiently carelessly merrily bitterly thankfully honestly lovingly
vtp.1 love hate serve slay/slew/slain praise curse bless crown wed* kiss strike/struck/struck blame trust scorn spare
vtp.1 teach/taught/taught mock haunt bind/bound/bound bribe greet guard help kill lead/led/led leave/left/left mourn
vtp.1 plague rob* save see/saw/seen seek/sought/sought thank wound warn watch wrong court chase
vtp.10 follow honour banish punish pardon murder pity flatter comfort ransom slander cherish marry threaten summon
vtp.10 conquer challenge worship master
vtp.01 betray obey forgive/forgave/forgiven destroy deceive defy embrace adore accuse advise arrest assist avenge
vtp.01 beguile command condemn console corrupt defend depose despise detest disgrace disown forsake/forsook/forsaken
vtp.01 oppose offend persuade protect provoke pursue rebuke redeem reject release requite reward salute subdue suspect
vtp.010 abandon dishonour acknowledge deliver imprison remember
vtp.101 overthrow/overthrew/overthrown undermine recommend
vtt.1 bear/bore/borne bring/brought/brought break/broke/broken steal/stole/stolen hide/hid/hidden buy/bought/bought
vtt.1 sell/sold/sold lift hold/held/held wear/wore/worn seize snatch burn drop* raise lose/lost/lost find/found/found
vtt.1 keep/kept/kept forge bend/bent/bent grasp shake/shook/shaken draw/drew/drawn give/gave/given take/took/taken
vtt.1 build/built/built fling/flung/flung hurl mend pawn pledge count
vtt.10 carry bury gather borrow shatter scatter sharpen squander plunder measure fashion polish
vtt.01 bestow destroy display reclaim restore conceal consume exchange possess prepare receive refuse resign unlock
vtt.010 surrender inherit deliver
vta.1 feel/felt/felt fear prize scorn crave hide/hid/hidden learn prove preach seek/sought/sought win/won/won
vta.1 lose/lost/lost earn breathe feign dread doubt taste weigh waste shun*
vta.10 suffer honour cherish covet purchase practise pardon reckon publish
vta.01 deserve confess despise endure forget/forgot/forgotten* forswear/forswore/forsworn maintain pursue proclaim
vta.01 provoke renounce repent lament regret require deny adore excuse conceal
vta.010 remember
vi.1 weep/wept/wept kneel/knelt/knelt march sleep/slept/slept wake/woke/woken die live fight/fought/fought
vi.1 fall/fell/fallen rise/rose/risen stand/stood/stood stay wait watch swear/swore/sworn speak/spoke/spoken
vi.1 sing/sang/sung laugh sigh groan pray yield ride/rode/ridden sail starve stray toil dream plead
vi.10 wander tremble labour linger hasten murmur quarrel whisper perish suffer
vi.01 despair rejoice return depart lament repent complain prevail
xt.1 wound heal burn drown freeze/froze/frozen melt charm bind/bound/bound break/broke/broken crown crush feed/fed/fed
xt.1 fill guide haunt kill mock move pierce plague rule scorch shake/shook/shaken stain starve sting/stung/stung
xt.1 strike/struck/struck tame taint tempt wake/woke/woken warm waste blind lead/led/led
xt.10 conquer comfort poison nourish ruin darken gladden humble murder scatter shatter sicken smother soften strangle
xt.10 swallow trouble weary
xt.01 betray consume corrupt deceive destroy devour delight disturb enchant enslave exalt inflame oppress perplex
xt.01 possess pursue refresh restore subdue surround torment transform upbraid
xi.1 fade rise/rose/risen fall/fell/fallen burn sleep/slept/slept wake/woke/woken die live grow/grew/grown change pass
xi.1 shine/shone/shone cease melt roar rage blow/blew/blown creep/crept/crept freeze/froze/frozen rot* bloom turn
xi.10 wither perish vanish linger tremble languish flourish slumber whisper glitter
xi.01 decay descend arise/arose/arisen prevail expire return
man.10 Aldric Anselm Baldwyn Cedran Dorvin Edmar Faldor Garrick Jorund Kelwin Merrick Norrin Osmund Perrin Quillan
man.10 Rodric Selwyn Torvald Ulric Wystan Zoltan Xander Jasper Kenelm Lucan Magnus Orson Rowan Tristan Uther Vincent
man.10 Zeno Quentin Ivor Harold Gareth Fabian
man.1 Guy Hugh Kay Miles Giles Piers Bran
man.01 Yvain Duval Lamont
man.100 Hadrian Leofric Emeric Florian Gideon Isidor Xavier Amadis Ambrose
man.010 Leandro Rinaldo Octavian Mathias Tobias Fernando
woman.10 Agnes Brenna Clara Edith Freya Gerda Helga Ingrid Judith Mabel Nora Oriel Petra Quenna Rhoda Sybil Thora
woman.10 Vera Wenda Zara Xanthe Esther Xenia Hilda
woman.010 Elvira Belinda Clarissa Drusilla Griselda Isolda Matilda Priscilla Rowena Sabina Camilla
woman.100 Rosalys Emeline Gwendolen Evelyn Dorothy Marjorie Millicent Annabel Cicely Winifred
land.10 Arlen Belmark Corvane Dunmere Estrel Farholt Galdor Harrow Kestral Mordan Nareth Ostwick Pellam Quenby Ravell
land.10 Sarmoor Thessal Ulvane Velmar Wexmoor Yarrow Zennor Jarrick Inver Ostmark
land.1 Lorn Thrace Kent Fenn
land.010 Valdoria Carmona Aldera
folk.10 Soldier Watchman Sailor Shepherd Servant Huntsman Reaper Beggar Weaver
folk.1 Guard Monk Page
folk.100 Citizen Messenger Murderer Mariner Carpenter
odd.1 Clown Nurse Ghost Cook
odd.10 Porter Sexton Herald Captain Hermit Jailer Steward Doctor Tinker Friar
odd.100 Gardener Messenger
"""

# Words of rhymes, all nouns, for the couplets and songs.
RHYMES = [
    line.split()
    for line in """
night light fight sight knight
day way play clay ray
grave wave slave cave
breath death
throne stone bone moan
sea tree knee bee
heart dart part art
sky eye cry sigh
head bed dread thread
gold fold hold
tomb doom gloom room
thorn morn scorn horn
dust rust trust lust
chain pain rain plain grain
spring ring king wing
fame name flame shame game
tower power flower shower
song wrong throng
tear fear ear spear year
hand land sand band
door shore floor war
heat feet seat street
cold gold hold
soul goal toll
sleep deep sheep
tide pride bride side
rest breast guest crest
woe foe bow snow
crown town gown
""".strip().splitlines()
]

THEMES = ("war", "love", "court", "sea", "death", "field")

# Auxiliaries by form: b plain, s he, p we and you, i I, t thou, d past, n participle, g -ing.
AUXILIARIES = {
    "be": {"b": "be", "s": "is", "p": "are", "i": "am", "t": "art", "d": "was", "n": "been", "g": "being"},
    "have": {"b": "have", "s": "hath", "p": "have", "i": "have", "t": "hast", "d": "had"},
    "do": {"s": "doth", "p": "do", "i": "do", "t": "dost", "d": "did"},
    "will": {"s": "will", "p": "will", "i": "will", "t": "wilt", "d": "would"},
    "shall": {"s": "shall", "p": "shall", "i": "shall", "t": "shalt", "d": "should"},
    "can": {"s": "can", "p": "can", "i": "can", "t": "canst", "d": "could"},
    "may": {"s": "may", "p": "may", "i": "may", "t": "mayst", "d": "might"},
    "must": {"s": "must", "p": "must", "i": "must", "t": "must", "d": "must"},
}

Word = tuple[str, str]  # spelling, stress
VERBS = ("vtp", "vtt", "vta", "vi", "xt", "xi")
NOUNS = ("per", "thing", "body", "nat")
_HISSING = ("s", "sh", "ch", "x", "z", "ce", "ge", "se", "ze")


@cache
def lexicon() -> tuple[dict[str, list[Word]], dict[str, list[Word]]]:
    """All words by slot, and those of one theme by `slot@theme`. Verb slots end in their form, plurals in `s`."""
    slots: dict[str, list[Word]] = {}
    themed: dict[str, list[Word]] = {}
    for line in WORDS.strip().splitlines():
        head, *entries = line.split()
        tag, _, theme = head.partition("@")
        kind, stress = tag.split(".")
        for entry in entries:
            for slot, word in _forms(kind, entry, stress):
                slots.setdefault(slot, []).append(word)
                if theme:
                    themed.setdefault(f"{slot}@{theme}", []).append(word)
    for auxiliary, forms in AUXILIARIES.items():
        for form, spelling in forms.items():
            slots[f"{auxiliary}.{form}"] = [(spelling, "x" * (2 if spelling == "being" else 1))]
    return slots, themed


def _forms(kind: str, entry: str, stress: str) -> list[tuple[str, Word]]:
    double = entry.endswith("*")
    base, *irregular = entry.rstrip("*").split("/")
    word = (base.replace("_", " "), stress)
    if kind in NOUNS:
        plural = (irregular[0], stress) if irregular else _with_s(word)
        return [(kind, word), (f"{kind}s", plural)]
    if kind not in VERBS:
        return [(kind, word)]
    past = (irregular[0], _syllables_of(irregular[0], word)) if irregular else _with_ed(word, double)
    participle = (irregular[1], _syllables_of(irregular[1], word)) if irregular else past
    plain = [(f"{kind}.{form}", word) for form in "bpi"]
    return [
        *plain,
        (f"{kind}.s", _with_s(word)),
        (f"{kind}.t", _with_st(word)),
        (f"{kind}.d", past),
        (f"{kind}.n", participle),
        (f"{kind}.g", _with_ing(word, double)),
    ]


def _syllables_of(form: str, word: Word) -> str:
    """Irregular forms keep the stress of the plain one; those in -en or -den after a consonant gain a syllable."""
    base, stress = word
    longer = form.endswith("en") and not base.endswith("en") and form != base
    return stress + "0" if longer else stress


def _with_s(word: Word) -> Word:
    base, stress = word
    if base.endswith("y") and base[-2] not in "aeou":
        return base[:-1] + "ies", stress
    if base.endswith(_HISSING):
        return base + ("s" if base.endswith("e") else "es"), stress + "0"
    return base + "s", stress


def _with_ed(word: Word, double: bool) -> Word:
    base, stress = word
    longer = base.endswith(("t", "d", "te", "de"))
    if base.endswith("y") and base[-2] not in "aeou":
        base = base[:-1] + "i"
    elif base.endswith("e"):
        base = base[:-1]
    elif double:
        base += base[-1]
    return base + "ed", stress + ("0" if longer else "")


def _with_ing(word: Word, double: bool) -> Word:
    base, stress = word
    if base == "die":
        base = "dy"
    elif base.endswith("e") and not base.endswith("ee"):
        base = base[:-1]
    elif double:
        base += base[-1]
    return base + "ing", stress + "0"


def _with_st(word: Word) -> Word:
    base, stress = word
    if base.endswith(_HISSING) or base.endswith(("t", "d", "te", "de", "st")):
        return base + ("st" if base.endswith("e") else "est"), stress + "0"
    if base.endswith("y") and base[-2] not in "aeou":
        return base[:-1] + "iest", stress + "0"
    if base.endswith("e") and base[-2] not in "ei":
        base = base[:-1]
    return base + "'st", stress
