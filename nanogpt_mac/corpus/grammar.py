"""The grammar of the stand-in: a context-free grammar as text, read by `verse.py`.

A rule is `name = alternative | alternative`, indented lines go on with it; a number before an alternative is its
weight. `name ~ a | b` says a where the speaker says "thou", b where "you". `{x}` is a rule or a word class of the
lexicon; everything else is literal. A rule whose name ends in `.@` is made once for each verb form (b plain, s he,
p we and you, i I, t thou, d past, n participle, g -ing), with `@` replaced. `{x:a}` remembers its words as a, `{:a}`
says them again. `/` ends a verse line.
"""

# Literal words of more than one syllable, by stress (0 weak, 1 strong); any other literal is one of either kind.
STRESS = {
    word: stress
    for stress, words in {
        "01": (
            "upon against before beneath above beyond without because between alas away again farewell "
            "alone today Because beside"
        ),
        "10": (
            "therefore never neither every better father's nothing madam gracious lady welcome water "
            "noble honest fellow quarter master silver dumplings mustard barley salted herring item "
            "supper pudding turnip cabbage oatmeal pigeons dollars pickled onions reckoned derry hearted "
            "handed merry shadow morrow shoulders fingers eyelids morning evening midnight sunset even "
            "gladly"
        ),
        "010": "whoever tomorrow another",
        "100": "yesterday",
    }.items()
    for word in words.split()
}

GRAMMAR = """
thy ~ thy | your
thou ~ thou | you
thave ~ thou hast | you have
twill ~ thou wilt | you will
tll ~ thou'lt | you'll
tfin ~ thou {fin.t} | you {fin.p}
dost ~ dost thou | do you
didst ~ didst thou | did you
wilt ~ wilt thou | will you
hast ~ hast thou | have you
art ~ art thou | are you
canst ~ canst thou | can you
my = 6 my | 3 our | 3 his | 2 her | 2 their | 4 {thy} | {name}'s | the {per}'s
pnp = 4 the {padj} {per} | 4 the {per} | 3 {my} {per} | 5 {name} | 2 a {padj} {per} | the {per} of {land}
    | 2 {my} {padj} {per} | 2 this {padj} {per} | no {per} | every {per} | some {padj} {per}
    | the {per} that {fin.s} | the {per} whom {pnp} {vtp.d} | that {adj} {per} of {land}
psub = 9 {pnp} | he that {fin.s} | she that {fin.s} | whoever {fin.s}
pnps = 4 the {pers} | 4 the {padj} {pers} | 2 {my} {pers} | 2 the {pers} of {land} | all the {pers}
    | these {padj} {pers} | {pers} and {pers} | such {pers} as {fin.p}
pobj = 8 {pnp} | 4 {pnps} | 4 him | 3 her | 3 them | 3 {me} | 2 {us} | 3 {you} | him that {fin.s}
tnp = 4 the {thing} | 4 the {adj} {thing} | 3 {my} {thing} | 3 {my} {adj} {thing} | 2 a {thing} | 3 a {adj} {thing}
    | 2 this {adj} {thing} | the {thing} of {abs} | the {thing} that {pnp} {vtt.d} | {my} father's {thing}
    | {thing} and {thing} | the {compound} {thing} | 2 {abs}'s {adj} {thing} | the {nat}'s {adj} {thing}
    | {pnp}'s {thing}
tobj = 6 {tnp} | 2 the {things} of {land} | 2 {my} {adj} {things} | {my} {things} | all {my} {things}
anp = 6 {abs} | 4 {my} {abs} | 2 the {abs} of {pnps} | such {abs} | 3 {adj} {abs} | that {abs} which {xfin.s}
    | the {abs} of {pnp}
nnp = 5 the {nat} | 5 the {adj} {nat} | a {adj} {nat} | 2 {my} {nat} | the {nat} of {land} | the {compound} {nat}
nnps = 4 the {nats} | 4 the {adj} {nats} | the {nats} of {land} | {nats} and {nats}
bnp = 6 {my} {body} | 4 {my} {adj} {body} | the {body} of {pnp} | this {adj} {body}
bobj = 5 {bnp} | 2 {my} {pair} | 2 {my} {adj} {pair} | {group} {bodys} | {group} {adj} {bodys}
    | {abs}'s {adj} {body} | the {nat}'s {adj} {body}
xobj = 5 {bobj} | 3 {pobj} | {tnp} | {nnp}
pair = 3 eyes | 3 hands | 2 arms | 2 lips | 2 knees | 2 cheeks | 2 ears | 2 feet | shoulders | fingers | eyelids
group = 3 our | 3 their | 2 the {pers}'s | all men's
compound = 2 {nat}-{xt.n} | {abs}-{xt.n} | {adj}-{bodied}
bodied = hearted | handed | eyed | browed | tongued | faced | limbed | voiced
loc = 2 the {place} | 2 the {adj} {place} | 2 {my} {place} | the {place} of {land} | {my} {adj} {place}
    | the {place} where {psub} {fin.s}
hour = 2 noon | 2 dawn | 2 night | morning | evening | midnight | sunset
pp = 4 in {loc} | 2 in {land} | 2 by {nnp} | 3 with {anp} | 2 like {nnp} | 2 like a {padj} {per} | 2 upon {nnp}
    | 2 before {bnp} | 2 beneath {nnp} | 2 for {anp} | 2 without {anp} | from {land} to {land} | at {hour}
    | 'gainst {nnp} | o'er {nnps} | 'twixt {land} and {land} | in spite of {anp} | through {nnps} | till {hour}
    | 2 for {pnp} | with {my} {body} upon {tnp}
npp = 3 upon {nnp} | 2 above {nnp} | 2 o'er {loc} | 'gainst {bnp} | 'twixt {nnp} and {nnp} | o'er {nnps}
    | 2 like {tnp} | like {anp} | 2 in {my} {body} | at {hour} | before {nnp} | 2 against {bnp} | beyond {loc}
vp.@ = 5 {vtp.@} {pobj} | 4 {vtt.@} {tobj} | 4 {vta.@} {anp} | 3 {vi.@} {pp} | {vi.@} and {vi.@}
    | {vtt.@} {tobj} for {anp} | {vtp.@} {pobj} {pp} | {adv} {vtp.@} {pobj} | {manner} {vtt.@} {tobj}
    | {vi.@} {manner} | {vtt.@} {tobj} and {vtp.@} {pobj}
fin.@ = 9 {vp.@} | 2 {will.@} {vp.b} | {will.@} not {vp.b} | {shall.@} {vp.b} | {must.@} {vp.b} | {can.@} {vp.b}
    | {may.@} {vp.b} | 2 {have.@} {vp.n} | {have.@} not {vp.n} | {do.@} {vp.b} | {do.@} not {vp.b} | 2 {be.@} {padj}
    | {be.@} {padj} and {padj} | {be.@} not {padj} | {be.@} {vtp.n} by {pnp} | {be.@} the {thing} of {anp}
    | never {vp.@} | ne'er {vp.@}
xp.@ = 8 {xt.@} {xobj} | 3 {xi.@} {npp} | {xi.@} | {xt.@} {xobj} and {xt.@} {xobj}
xfin.@ = 7 {xp.@} | {will.@} {xp.b} | {shall.@} {xp.b} | {have.@} {xp.n} | {do.@} {xp.b} | {can.@} {xp.b}
    | {be.@} {adj} | {may.@} {xp.b}
cl = 6 {psub} {fin.s} | 3 {pnps} {fin.p} | 5 I {fin.i} | 2 we {fin.p} | 4 {tfin} | they {fin.p}
    | they that {vp.p} {fin.p} | 2 {pnp} {fin.d} | I {fin.d} | 5 {anp} {xfin.s} | 4 {nnp} {xfin.s}
    | 2 {nnps} {xfin.p} | 3 I'll {vp.b} | 2 we'll {vp.b} | 2 {tll} {vp.b} | he'll {vp.b} | she'll {vp.b}
    | they'll {vp.b} | 2 {abs}'s {adj} {thing} {xfin.s} | 'twas {pnp} that {vp.d} | 2 I have {vp.n} | I've {vp.n}
    | there's {abs} {npp} | there's no {per} {pp} | {bnp} {xfin.s} | {nnp} {xfin.d} | {tnp} {be.s} {vtt.n} by {pnp}
    | {anp} {be.s} but {anp} | {anp} {be.s} a {thing} that {xfin.s} | there is no {abs} in {loc}
    | it is {pnp} that {vtp.s} {you} | here {vi.s} {pnp}
sub = 4 when {cl} | 3 since {cl} | 2 though {cl} | 2 till {pnp} {vp.s} | 4 if {cl} | 2 ere {pnp} {vp.s}
    | 2 while {cl} | because {cl} | where {cl}
state = 4 {cl}. | 5 {cl}, {sub}. | 5 {sub}, {cl}. | 4 {cl}; {cl}. | 4 {cl}, and {cl}. | 3 {cl}, but {cl}.
    | 3 {cl}: {cl}. | 4 {cl}, {voc}, {sub}. | 4 {sub}, and {sub}, {cl}. | 4 {cl}, {pp}, and {cl}.
    | 3 {cl}; {cl}, {sub}; and {cl}. | 3 {cl}, {sub}, and {cl}; yet {cl}. | 3 {cl}; for {cl}, {pp}, {sub}.
    | 2 {psub}, {pp}, {fin.s}, and {vp.s}. | 2 {psub}, {padj} and {padj}, {fin.s}: {cl}.
    | 2 {psub}--for {cl}--{vp.s}, {sub}. | 2 {anp}, {anp}, and {adj} {abs} {xt.p} {xobj}.
    | 2 the {thing}, the {thing}, the {adj} {thing}, {pp}, {be.p} {vtt.n} by {pnp}.
    | 2 {nnp}, {nnp}, {adj} {nats}, all {xi.p}, {sub}. | 2 I think {cl}. | 2 I know {cl}, {sub}. | 2 they say {cl}.
    | 'tis said that {cl}. | 'tis {adj} that {cl}. | 'tis not {anp} but {anp} that {xt.s} {xobj}.
    | 2 I swear by {tnp}, {cl}. | 2 I tell {you}, {cl}. | 2 not {anp}, nor {anp}, nor {adj} {abs}, shall {vp.b}.
    | 2 {abs} {vtp.d} {pobj}, {abs} {vtp.d} {pobj}, and {abs} {vtp.d} {pobj}.
    | 2 as {nnp} {xt.s} {nnp}, so {anp} {xt.s} {xobj}. | 2 as {nnps} {xi.p} {npp}, so {pnps} {vi.p} {pp}.
    | 2 such {abs:a} as {vi.s} {pp} is no {:a}, but {abs}. | I {vtp.d} {pnp}, and {pnp} {vtp.d} me.
    | the more {tfin}, the more {anp} {xt.s} {xobj}. | 2 neither {anp} nor {anp} {xt.s} {xobj}, {sub}.
    | he {vtt.s} {tnp:t}, but {:t} {will.s} not {xt.b} him.
    | 2 {nnp} {xi.s}, {nnp} {xi.s}, and still {nnp} {xi.s} {npp}.
    | one {vtp.s} {pobj}; another {vtp.s} {pobj}; and none {vta.s} {anp}.
    | 2 {name} is {padj}; yet {name} is {padj}, and {fin.s}. | 2 what {pnp:p} {vtt.d}, {pnp} {vtt.d} from {loc}.
    | my {body} is {adj}, my {body} is {adj}, and {anp} {xt.s} my {body}.
    | 2 I would {vtp.b} {pobj}, could I but {vtt.b} {tobj}. | {vp.g}, I {fin.i}; {vp.g}, I {fin.i}.
    | if {anp} be {abs}, then {anp} is {abs}. | had I {vp.n}, then had {pnp} {vp.n}.
    | {psub} {fin.s}, they say, {sub}. | the {pers} {vp.p}, the {pers} {vp.p}, and I must {vp.b}. | {pp}, {cl}.
ask = 4 what {thing} is this that {xt.s} {xobj}? | 3 who {vtt.d} {tobj}? | 4 why {dost} {vp.b}?
    | 2 why {dost} {vp.b}, {sub}? | 3 where is {pnp}? | 3 where is {pnp}, and where is {pnp}?
    | 3 shall {pnp} {vp.b}, and I {vp.b}? | 3 shall {anp} {xp.b}? | 3 is {pnp} so {padj}?
    | 2 how shall I {vp.b}, {sub}? | 2 how {canst} {vp.b}, {sub}? | 2 did not {pnp} {vp.b}?
    | 3 what is {abs} but {anp}? | 2 what hath {pnp} {vtt.n}, that {pnps} {vi.p}? | 2 hath {pnp} {vp.n}?
    | 2 can {anp} {xp.b}? | 2 {wilt} {vp.b}? | 2 {didst} {vp.b}, {sub}? | 2 {hast} {vp.n}?
    | 2 {art} {padj}, or {art} {padj}? | 2 what {per} {vtp.s} {pobj}? | whose {thing} is this, and who {vtt.d} it?
    | 2 must I {vp.b}, because {cl}? | when will {pnp} {vp.b}? | what says {pnp} to {anp}?
    | how long shall {pnps} {vp.b}? | who {vi.s} {pp}? | were it not better to {vp.b} than {vp.b}?
    | is this the {per} whom {pnps} {vtp.d}?
imp = 4 {vtp.b} {pobj} | 4 {vtt.b} {tobj} | 2 {vta.b} {anp} | 2 {vi.b} {pp}
order = 4 go, {imp}. | 4 let {pnp} {vp.b}. | 3 let {anp} {xp.b}. | 3 come, {voc}, {imp}. | 3 {imp}, and {imp}.
    | 3 {imp}; {imp}; and {vp.b}. | 2 let {nnp} {xp.b}; let {nnp} {xp.b}; but let not {anp} {xp.b}.
    | 2 {imp}, {sub}. | 2 {imp}, {voc}. | 2 good {voc1}, {imp}. | 2 bid {pnp} {vp.b}. | 2 tell {pobj} that {cl}.
    | 2 do not {vp.b}, {sub}. | never {vp.b}; never {vp.b}. | 2 {sub}, {imp}. | look how {nnp} {xfin.s}.
    | see where {pnp} {vi.s} {pp}. | mark well {pnp}, who {fin.s}. | away to {land}; {imp}. | I pray {you}, {imp}.
cry = 4 O {adj} {nat}! | 4 O {abs}, {abs}! | 3 O {adj} {abs}, {twill} {vp.b}! | 2 alas, {bnp} {xfin.s}!
    | 3 by {oath}, {cl}! | 2 what a {adj} {thing} is {anp}! | 2 now {anp} {xt.b} {xobj}!
    | 2 may {nnp} {xt.b} {xobj}, and {nnps} {xt.b} {xobj}! | 2 would that {pnp} {fin.d}! | 2 how {adj} is {anp}!
    | 2 how {manner} {pnp} {vi.s}! | fie upon {anp}! | 2 {adj} {nat}, {adj} {nat}, {imp}! | 2 O {padj} {per}!
    | 2 {land} and {name}! | O that {bnp} were {tnp}! | to horse, to horse, and {imp}! | out, {adj} {thing}!
    | {abs}, {abs}, {abs}! | never, never, while {cl}! | O, had I {vtt.n} {tobj}!
oath = 2 {my} {body} | {nnp} | the {adj} {nat} | {my} father's {thing} | all the {nats} of {land}
brief = {psub} {vp.s}-- | but {psub}-- | {voc}, {pnp}-- | 4 {cl}. | 3 {psub} {vp.s}. | 3 I {vp.i}. | 2 {imp}.
    | 2 who {vtp.s} {pobj}? | 2 who {vtt.d} {tobj}? | 2 where is {name}? | 2 what {abs}, {voc}? | and {pnp}?
    | 2 {name} {vp.d}. | 2 {name} {vi.s} {pp}. | {abs}, {voc}. | 2 O {adj} {nat}! | 2 O {padj} {per}!
    | {padj}, {voc}? | 2 let {pnp} {vi.b}. | 2 is it {name}, or {pnp}? | to {land}, {voc}? | 2 {adj} {abs}!
    | 2 not {manner}, {voc}. | 2 which {per}, {voc}? | a {per}, {voc}! | {land} and {abs}! | 2 {voc}, {imp}.
    | 2 {voc}, {pnp} {vi.s}. | he'll not {vp.b}. | {pnp}'s {thing}, {voc}. | the {thing}, {voc}, the {thing}!
    | 2 more {abs}, more {abs}! | 'twas {name}, {voc}, or {name}. | what, {padj} and {padj}? | so {vi.s} {pnp}.
    | in {land}, {voc}, {pp}.
yes = 3 ay, {voc}, {cl}. | 2 he {have.s}, {voc}, and {fin.s}. | 2 yes, {voc}, {sub}. | 2 most {manner}, {voc}.
    | 2 even so: {cl}. | ay, and {pnp} {fin.s}. | so {pnps} say, {voc}, but {cl}.
no = 3 no, {voc}, {cl}. | 2 nay, {cl}. | 2 not I, {voc}, for {cl}. | 2 I know not, {voc}, {sub}.
    | 2 never, {voc}, {sub}. | no {per} of {land} {fin.s}. | ask {pnp}, {voc}; I {fin.i}.
obey = 3 I will, {voc}, {sub}. | 2 {voc}, it shall be {vtt.n}. | 2 I go ere {hour}, {voc}; {imp}.
    | 2 with all my heart, {voc}. | 2 and gladly, {voc}, {sub}.
refuse = 3 I dare not, {voc}, while {cl}. | 2 I will not {vp.b}, {sub}. | 2 bid {pnp} {vp.b}, {voc}; I {fin.i}.
    | 2 {wilt} have me {vp.b}? {cl}. | let him that {fin.s} {vp.b}, {voc}.
open = 4 {voc}, | 2 good {voc1}, | 2 nay, {voc}, | 2 O {voc}, | alas, {voc}, | why, {voc}, | 2 hear me, {voc}:
    | well, {voc}, | peace, {voc}; | then, {voc},
enter = 3 who comes? 'tis {pnp}. {cl}. | 2 good-morrow, {voc}, {sub}. | 2 welcome, {voc}, to {loc}.
    | 2 {voc}, {pnp} {vi.s} {pp}. | 2 what news from {land}, {voc}? | 2 is all well in {loc}, {voc}?
    | 2 now, {voc}, what says {name}? | this is {loc} of {land}; {cl}.
news = 3 {voc}, {pnp} hath {vp.n}, and {pnps} {fin.p}. | 3 {name} is {vtp.n}, {voc}; {pnps} {fin.p}.
    | 2 from {land} I come: {cl}. | 2 the {pers} of {land} {fin.p}, and {name} {fin.s}.
    | 2 {name} hath {vtt.n} {tobj}, {voc}, and {fin.s}.
leave = 3 farewell, {voc}, {sub}. | 2 I go to {loc}: {cl}. | 2 till {hour}, {voc}, farewell.
    | 2 come, let us {vp.b}. | away, away! {cl}.
prose = 4 why, {voc}, {cl}, and {cl}, for {cl}; and there's an end of {abs}.
    | 4 I had {a_per} once that {fin.d}, and he {fin.d}, and when he was {vtp.n} by {pnp} he {vta.d} no {abs} at
      all.
    | 3 {abs:a} is a {thing}, {voc}, and a {thing} is no {:a}; therefore he that {vtt.s} a {thing} {vtt.s} nothing.
    | 3 if a man {vp.p}, he shall {vp.b}; but if he do not {vp.b}, let him {vp.b}, and be {padj}.
    | 3 here's {a_per} that {fin.s}, and yet he would {vp.b}!
    | 3 {dost} ask me why {pnp} {fin.s}? Because, {voc}, {pnp} {fin.s}, and the {food} had gone cold.
    | 3 I have {vtt.n} {tobj} from {land} to {land}, and never yet {vtp.d} {pnp} but he {vtt.d} a {thing} for it.
    | 3 give me {food} and {food}, and let the {pers} {vp.b} till {hour}.
    | 2 what's {a_per}? One that {fin.s}. What's {a_per}? One that {fin.s}. Then I'll {vp.b}, and be a {per}.
    | 2 he that {fin.s} hath {abs:a}; he that hath {:a} hath {abs:b}; and he that hath {:b} had better {vi.b}.
    | 2 my mother was {a_per}, and my father {vtt.d} {things}, and between them they {vta.d} more {abs} than {food}.
    | 2 there be three {pers} in {land}: one {fin.s}, one {fin.s}, and the third is {padj}.
    | 2 I'll not {vp.b}, not for {abs}, nor {abs}, nor a {thing} full of {food}.
    | 2 {hast} {vp.n}? Then {thave} {vtt.n} more than {pnp}, for he {vtt.d} nothing but {things}.
    | 2 by {my} {thing}, {voc}, I {fin.d} yesterday, and today I {fin.i}; what I shall do tomorrow, ask {pnp}.
    | 2 is not {abs} a {nat}? And doth not a {nat} {xi.b}? Then {abs} must {xi.b}, {voc}, ere {hour}.
    | {imp}, {voc}, and I'll {vp.b}; {imp}, and I'll {vp.b}; but if {thou} {vi.p}, I'll none of it.
a_per = 3 a {padj} {per} | 2 a {per} | a {per} of {land}
food = dumplings | mustard | barley water | salted herring | oatmeal | cold pudding | turnip | pickled onions
    | cabbage | pigeons | supper
item = 3 item, 3 {things} of {adj} {abs} & one {thing}; | 2 item, 33 {things}, which the {per} {vtt.d};
    | 2 item, one {adj} {thing}, reckoned at 3 silver dollars; | 2 item, for {food} & {food}, $3;
    | item, for the {per}'s {thing}, $33, and not yet paid; | 2 item, 3 quarter of {food} & a {thing} for the {per};
    | item, to the {per} of {land}, for {vtt.g} the {thing}, 3 dollars;
bill = {item} {item} {item} {item} and so, {voc}, {cl}.
    | {item} {item} {item} which, {voc}, is more than {pnp} {fin.s}.
couplet = 3 let {abs} keep the door against the {r1}, / and {abs} be my {thing} and my {r2}.
    | 3 now falls the {nat}, and now comes on the {r1}; / we {vtp.p} no more the {per} of the {r2}.
    | 3 for {abs} is but the shadow of a {r1}, / and {abs} the {adj} master of the {r2}.
    | 2 so {pnps} {vi.p}, and so is lost the {r1}, / till {abs} {vtt.s} again the {adj} {r2}.
    | 2 he that hath {vtt.n} the {thing} shall have the {r1}, / and he that {vtp.s} the {per} shall have the {r2}.
    | 2 go tell the {per} that I have {vtt.n} the {r1}, / and {vta.b} no {abs} in the {adj} {r2}.
    | 2 what though {anp} {xt.b} the {adj} {r1}? / The {nat} shall find {abs} beneath the {r2}.
    | 2 {voc}, farewell: I hear the {adj} {r1}, / and {land} must {vtp.b} me for the {r2}.
    | 2 then {vtt.b} the {thing}, and {vtt.b} the {adj} {r1}, / for {name} {vi.s} now without the {r2}.
    | thus {abs} {xi.s}, and thus the {adj} {r1}, / and none shall {vtp.b} the {per} of the {r2}.
song =
    3 the {nat} is on the {adj} {r1}, / heigh-ho, the {nat} and {nat}; / the {per} {vi.s} beside the {r2}, / and
      {abs} is {adj} again.
    | 2 come {vtt.b} the {thing} and {vtt.b} the {r1}, / with hey, the {adj} {nat}; / my love hath {vtt.n} the
      {adj} {r2}, / and will not {vi.b} at {hour}.
    | 2 O where is the {per} that {vtt.d} the {r1}? / O down by the {nat}, sing derry; / he {vi.s} alone by the
      {adj} {r2}, / and the {nats} and the {nats} are merry.
    | 2 {abs} is a {nat}, {abs} is a {r1}, / {vi.b}, {padj} {per}, {vi.b}; / {abs} is a {thing}, {abs} is a {r2}, /
      and the {nat} is dark and deep.
"""
