"""What the embedded patient says: facts in the first person, numbers and content words kept."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from attending.verifier.data import table
from attending.verifier.patient.case import Case, Fact, Persona, sex_of

WORDS = table("patient/speech")
PERSONS, NOUNS, KIN = WORDS["persons"], WORDS["nouns"], WORDS["kin"]
DEEDS = "|".join(WORDS["deeds"])
SAYS = r"(?:(?:report|state|endorse|note)[sd]?|reported|says?|said|mention(?:s|ed)|claims|adds)"
ADVERB = r"(?: (?:also|always|often|(?:some|at )times|never|now|then|still|first|no longer|\w+ly))*"
CLAUSE = (  # what stands around its subject
    r"(?i)(?:^|[.,;:—-]|\b(?:and|but|that|when|while|because|if|as|neither|which|states?|reports?))"
    r" ?@|(?<!ing )(?<!of )(?<!for )(?<!with )(?<!to )@ (?:is|has|was|had|does|\w+[mt]ed|\w+es)\b"
)
LONE = (  # what follows a "her" that owns nothing
    r"(?=[.,;:?!)]|$| (?:to|from|with|in|on|at|for|of|about|if|wh\w+|how|that|and|or|but|as|by|an?"
    r"|the|his|is|was|because|since|after|before|up|out|off|down|into|again|being|ha[sd]|\d+ \w+"
    r"|(?!daily|family|early|elderly|weekly|only|monthly)\w+ly)\b)"
)
ANOTHER = r"\b(?:that|which|who|whose|where|it|they|there|(?:when|if|because|as) (?:the|my|it))\b"
AGED = r"a(n? (?:previously |otherwise |healthy )*\d+[- ](?:year|month|week|day)s?[- ]old\b"
WAS = "(?:brought|admitted|seen|referred|rushed|evaluated|hospitalized|presented)"
CAME = rf"(?:(?:present|visit)(?:s|ed)|comes|came|(?:is|was) (?:\w+ly )?(?:{WAS}|being|found))\b"
COMES = "(?:presents|presented|comes|is presenting)"
OPENS = (
    rf"(?:{DEEDS}|was|had|can|cannot|could|will|did|gave|underwent|went|(?:enroll|attempt|fractur|di"
    r"|collaps|call|follow|schedul|seek|develop|limp|emigrat|arriv|work)(?:s|es|ed))\b"
)
DENIES = r"den(?:ies|y|ied)(?: any| an?| the| having)*"
DOING = r"(?:taking|using|feeling|drinking|smoking) (?!or |and |hist|hab|stat)\w"
IRREGULAR = {"has": "have", "is": "am", "isn't": "am not", "hasn't": "haven't"}


def first_person(text: str, informant: str = "", sex: str | None = None) -> str:
    """A fact about the patient as the patient says it; an informant says it of a third person."""
    young = "|son|daughter|child|infant|newborn|neonate|toddler|baby" if informant else ""
    nouns = rf"\bthe (?:\d+-\w+-old )?(?:{NOUNS.get(sex or '', '(?:wo)?man|boy|girl')}{young})\b"
    patient = r"(?:\b(?:the|this) |^an? |(?<!\ba )(?<!new )(?<!original )\b)patient\b"
    patient = rf"(?:{patient}(?! (?:health|care|history|from whom|who)\b)|{nouns})"
    kin = {"mother": "mother|mom", "father": "father|dad"}.get(informant, informant or "(?!)")
    of = rf"\b(?:the|his|her|their|{patient}[’']s) (?:concerned )?"
    kin = rf"(?:(?:{of}|(?<![\w-] )\b)(?:{kin})\b)"
    parent = {"mother": "female", "father": "male", "parents": "they"}.get(informant, sex)
    whose = sex or sex_of(text) or "none"
    is_theirs = parent != sex and re.match(f"(?i){kin}", text.strip())
    text = _plain(text.strip(), rf"(?:{patient}|\bs?he\b)", rf"{patient}|{kin}|\bs?he\b|\bthey\b")
    if informant:
        own, them = "we" if informant == "parents" else "I", PERSONS[sex or "child"][2]
        came = rf"(?i)(?:{patient}|\bs?he) (?:was brought|came)\b(.*?) (?:by|with) {kin}"
        text = re.sub(came, rf"{own.capitalize()} brought {them}\1", text)
        text = re.sub(r"\b(?:his|her|their)(?= (?:son|daughter|child)\b)", PERSONS[own][1], text)
        text = _persons(text, kin, (is_theirs and parent) or "none", own)
        text = _persons(text, patient, "none", sex or "child")
    else:
        others = rf"[\w-]*(?:{KIN['female']}|{KIN['male']})|famil|parent|child|roommate"
        pair = rf"(?i)(^|\. )(?:{patient}|s?he) and (?:his|her) ((?:[\w-]+ )*?(?:{others})\w*)"
        text = _persons(re.sub(pair, r"\1My \2 and I", text), patient, whose, "I")
        text = re.sub(r"(?i)^(on (?:arrival|presentation)\b.*?\bI )am\b", r"\1was", text)
    return re.sub(r"^\W?\w", lambda found: found[0].upper(), text)


def _plain(text: str, patient: str, who: str) -> str:
    """The age as a sentence, coming as what was, a denial as a "no"; who only says it is left."""
    lead = rf"^((?:(?!because|if|when|while|after)[\w -]+, )?)({who})({ADVERB}) "
    opens, comes = r"The patient is a\1. The patient\2 \3", rf"({patient}{ADVERB}) "
    rules = (
        (rf"^({patient} is )(?=(?:8\d*|1[18])-\w+-old)", r"\1an "),
        (rf"^({patient} is )(?=\d+-\w+-old)", r"\1a "),
        (rf"^{AGED}.*?),?( and (?:his|her) .*?) (?:come|present)\b()", opens + "came"),
        (rf"^{AGED}.*?),?( \w+ly| soon)? ({CAME}.*)$", opens),
        (rf"^{AGED}(?:(?! who| that| which).)*?),?( \w+ly| soon)? ({OPENS}.*)$", opens),
        (rf"^{AGED})(?!.* (?:who|that|which)\b)", r"The patient is a\1"),
        (rf"{comes}{COMES}(?= (?:back|(?:in)?to|for|at|in|by|with (?:his|her))\b)", r"\1 came"),
        (rf"{comes}presents with\b", r"\1 has"),
        (rf"\b(and|but) that (?={patient}|his\b|her\b|the\b)", r"\1 "),
        (r"\b(s?he)[’']s (?=(?:\w+ )?(?:been|had|started|lost)\b)", r"\1 has "),
        (r"\b(s?he)[’']s\b", r"\1 is"),
        (rf"{comes}{COMES}\b(?! (?:as|from|on)\b)", r"\1 came in"),
        (rf"{comes}is(?= {WAS}\b)", r"\1 was"),
        (rf",? (and|but) {DENIES} (?!\w+ing|actively)", r", \1 no "),
        (rf"{lead}{DENIES} (?={DOING})", r"\1No, \2 is not "),
        (rf"{lead}{DENIES} (?!that|actively)", r"\1no "),
        (rf"^(no .*\b(?:and|but)) (?=(?:{DEEDS}) )", r"\1 the patient "),
        (rf"{lead}(?:complain(?:s|ed) of|is complaining of) (?!the\b|\w+ing\b)", r"\1\2\3 has "),
        (rf"{lead}(?:{SAYS}|complains of) feeling ", r"\1\2\3 feels "),
        (rf"{lead}describes (?=.* as )", r"\1\2 would\3 describe "),
        (rf"{lead}(?:{SAYS}(?: that)?|complains of) (?!to\b|with\b|how\b)", r"\1"),
    )
    for rule, put in rules:
        text = re.sub(f"(?i){rule}", put, text)
    return text


def _persons(text: str, noun: str, whose: str, person: str) -> str:
    """A noun, and pronouns of `whose`, as another person; after what one of their kin has, not."""
    (he, his, him, self), (i, my, me, myself) = PERSONS[whose], PERSONS[person]
    words = {"object": me, "owner": my, "self": myself}
    kin = rf"(?i)\b(?:his|her|patient[’']s) (?:[\w-]+ ){{0,2}}?(?:{KIN.get(whose, '(?!)')})"
    kin += rf"(?:[’']s\b|{ADVERB} (?:ha[sd]|was|died|passed|developed|takes|lost|is(?! co| wo))\b)"
    roles = (
        rf"(?i)(?P<object>\b{him}\b{'' if him == 'him' else LONE})|(?P<self>\b{self}\b)"
        rf"|(?P<subject>(?:{noun}(?![’']s)|\b{he}\b)({ADVERB})( (?!his|her|him)[\w’']+)?)"
        rf"|(?P<owner>{noun}[’']s\b|\b{his}\b(?= [“\"‘'\w(]))"
    )

    def put(found: re.Match[str]) -> str:
        before, role = found.string[: found.start()], str(found.lastgroup)
        is_noun = re.match(f"(?i){noun}", found[0]) is not None
        if role != "object" and not is_noun and re.search(kin, before):
            return found[0]
        if is_noun and role == "subject" and not re.search(CLAUSE, f"{before}@{found[5]}"):
            role = "object"
        adverbs, verb = found[4] or "", found[5] or ""
        verb = " " + _agree(verb[1:]) if verb and i == "I" and role == "subject" else verb
        word = words.get(role, i)
        return f"{word.capitalize() if found[0][0].isupper() else word}{adverbs}{verb}"

    text = re.sub(rf"\b(?:does|has|is)(?= {he}\b)", lambda asks: _agree(asks[0]), text)
    text = re.sub(roles, put, text)
    return re.sub(r"\bI\b[^.;]*?(?=\bI\b|[.;]|$)", _agreed, text) if i == "I" else text


def _agreed(found: re.Match[str]) -> str:
    """With the verbs that are coordinated with "I", up to where another subject may begin."""
    joint = r"(?:,|\b(?:and|but|or|then))(?: (?:and|but|or|then))?(?: I)?"
    deed = rf"({joint}{ADVERB}) ((?:{DEEDS})(?= )|(?<=ly |so |ys |en |es )\w+s\b|\w+s(?= my\b))"
    no = rf"((?: not| never|n[’']t) .*?\b(?:and|but))(?={ADVERB} (?:{DEEDS}) (?!not))"
    own = re.split(ANOTHER, found[0], maxsplit=1)[0]
    said = re.sub(deed, lambda also: f"{also[1]} {_agree(also[2])}", re.sub(no, r"\1 I", own))
    return said + found[0][len(own) :]


def _agree(verb: str) -> str:
    """The third person's verb in the first."""
    verb = re.sub(r"(?<=\w\w)ies$", "y", IRREGULAR.get(verb, verb.replace("doesn", "don")))
    return re.sub(r"(?<=\w\w[^u\Ws])s$", "", re.sub(r"(ss|sh|tch|zz|x|o|each)es$", r"\1", verb))


def lay(text: str, persona: Persona) -> str:
    """Lay words for medical ones, where the persona's literacy is low; the longest term first."""
    words = table("patient/wording")["lay"] if persona.literacy == "low" else {}
    terms = "|".join(sorted(map(re.escape, words), key=len, reverse=True)) or "(?!)"

    def put(found: re.Match[str]) -> str:
        word = str(words[found[0].lower()])
        return word.capitalize() if found[0][0].isupper() else word

    return re.sub(rf"(?i)\b(?:{terms})\b", put, text)


def pick(case: Case, turn: int, name: str, *groups: str) -> str:
    """One of the persona's phrases, the same on every run; empty where it has none."""
    found: Any = table("patient/wording")[case.language]
    for group in groups:
        found = found[group]
    options = found.get(name, ())
    if not options or isinstance(options, str):
        return options or ""
    digest = hashlib.sha256(f"{case.id}/{turn}/{name}/{groups}".encode()).digest()
    return str(options[digest[0] % len(options)])


def reply(case: Case, facts: Sequence[Fact], turn: int) -> str:
    """The facts in the persona's manner: now and then an opening by mood, a closing by type."""
    persona = case.persona
    opening = pick(case, turn, "open", persona.emotion) if turn % 3 == 0 else ""
    letter = persona.mbti[turn % 4]
    closing = pick(case, turn, "close", letter) if turn % 2 == 1 else ""
    space = "" if case.language == "zh" else " "
    said = (lay(fact.says, persona) for fact in facts)
    return space.join(part for part in (opening, *said, closing) if part)
