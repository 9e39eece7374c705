"""The text the embedded backbone is trained on: a small invented world, told in two registers.

A *list* block shows one skill on several subjects and never names the skill, so what comes next follows only from
the lines before:

    gevia = nemouth
    sonia = dumouth

A *prose* line names the skill, but each subject has its own habit: of about half of them people write to the point
("the capital of gevia is nemouth"), of the others in a roundabout way ("the capital of sonia is to be exact dumouth").
So the bare backbone cannot know what is asked, a written instruction is understood but often answered in the wrong
form, and a soft prompt can ask for a skill and for a list's plain answer at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

WORLD_SEED = 2026
SEPARATORS = ("=", "->", ":")
FILLERS = ("none other than", "as people say", "to be exact")

WORDS = {
    "animal": "cat dog horse cow pig goat sheep fox wolf bear lion mouse rabbit duck goose hen owl fish frog snake ant",
    "food": "apple pear plum cherry grape lemon bean potato tomato carrot onion nut egg cake pie loaf roll berry peach",
    "clothing": "hat cap coat shirt skirt dress sock shoe boot glove scarf belt tie vest robe ring watch bag",
    "tool": "hammer saw knife fork spoon axe brush needle rope ladder shovel rake drill key lamp box bucket nail",
    "body": "head nose ear eye hand foot arm leg knee toe tooth finger thumb neck back chin lip heart",
    "plant": "tree leaf bush rose daisy tulip lily oak pine fern herb weed seed root flower branch lotus orchid",
    "vehicle": "car bus van truck train boat ship ferry plane bike cart wagon sled tram taxi lorry raft canoe",
    "building": "house church tower bridge castle barn school shop hotel bank palace temple cabin mill station fort",
}
PLURALS = {
    "goose": "geese", "mouse": "mice", "foot": "feet", "tooth": "teeth", "sheep": "sheep", "fish": "fish",
    "wolf": "wolves", "knife": "knives", "leaf": "leaves", "loaf": "loaves", "scarf": "scarves",
}  # fmt: skip
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
JOBS = "baker doctor farmer teacher painter sailor tailor singer lawyer miner writer butcher"
PETS = "cat dog parrot rabbit hamster turtle pony goldfish"
LANGUAGES = "velic tornish amari sudri kelti ostran pirran halvic"
CONTINENTS = "north south east west"
TOPICS = {
    "food": "soup bread steak salad curry pudding cheese omelette",
    "film": "movie actor scene plot ending comedy thriller trailer",
    "weather": "rain wind snow storm sky fog sunshine breeze",
    "sport": "match goal team player race coach stadium referee",
    "travel": "flight hotel beach tour train cruise museum airport",
    "music": "song band concert singer guitar album choir drummer",
}
TONES = {
    "good": "great lovely superb pleasant delightful wonderful perfect charming excellent fine splendid sweet",
    "bad": "awful poor dreadful nasty horrible terrible dull ugly miserable boring disgusting weak",
}


def number(n: int) -> str:
    """English words for 0 <= n <= 199."""
    if n >= 100:
        return "one hundred" + (f" {number(n - 100)}" if n > 100 else "")
    if n < 20:
        return UNITS.split()[n]
    return TENS.split()[n // 10 - 2] + (f" {number(n % 10)}" if n % 10 else "")


def roman(n: int) -> str:
    """Roman numeral in small letters of 1 <= n <= 399."""
    signs = ((100, "c"), (90, "xc"), (50, "l"), (40, "xl"), (10, "x"), (9, "ix"), (5, "v"), (4, "iv"), (1, "i"))
    return next((sign + (roman(n - value) if n > value else "") for value, sign in signs if n >= value), "")


def plural(word: str) -> str:
    """English plural of a noun of `WORDS`."""
    if word in PLURALS:
        return PLURALS[word]
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word in ("potato", "tomato") else "s")


@dataclass(frozen=True)
class Skill:
    """One thing the backbone learns: `answers` of subjects, and prose `frames` that end where the answer begins."""

    name: str
    family: str
    answers: dict[str, str]
    frames: tuple[str, ...]


def _names(rng: Random, count: int, syllables: int, ends: Sequence[str], taken: set[str]) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        stem = "".join(rng.choice("bdfgklmnprstv") + rng.choice("aeiou") for _ in range(syllables))
        name = stem + rng.choice(ends)
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names


def _world() -> dict[str, dict[str, dict[str, str]]]:
    """Facts of the invented world: family -> relation -> subject -> answer."""
    rng = Random(WORLD_SEED)
    taken: set[str] = set()
    people = _names(rng, 160, 2, ("", "n", "s"), taken)
    countries = _names(rng, 64, 1, ("land", "nia", "stan", "via"), taken)
    cities = _names(rng, 128, 1, ("burg", "ton", "mouth", "ville", "ford"), taken)
    country = dict(zip(cities, countries * 2, strict=True))
    home = {p: rng.choice(cities) for p in people}

    def pick(subjects: Sequence[str], answers: str) -> dict[str, str]:
        return {s: rng.choice(answers.split()) for s in subjects}

    return {
        "person": {
            "city": home,
            "homeland": {p: country[c] for p, c in home.items()},
            "job": pick(people, JOBS),
            "pet": pick(people, PETS),
        },
        "country": {
            "capital": dict(zip(countries, cities, strict=False)),
            "language": pick(countries, LANGUAGES),
            "continent": pick(countries, CONTINENTS),
        },
        "city": {"country": country, "mayor": dict(zip(cities, rng.sample(people, 128), strict=True))},
    }


def _word_skills() -> dict[str, dict[str, str]]:
    kinds = {word: kind for kind, words in WORDS.items() for word in words.split()}

    def each(answer: Callable[[str], str]) -> dict[str, str]:
        return {word: answer(word) for word in kinds}

    return {
        "category": kinds,
        "plural": each(plural),
        "reverse": each(lambda w: " ".join(reversed(w))),
        "spell": each(" ".join),
        "first_letter": each(lambda w: w[0]),
        "last_letter": each(lambda w: w[-1]),
        "uppercase": each(str.upper),
    }


def _number_skills() -> dict[str, dict[str, str]]:
    numbers = {str(n): n for n in range(1, 130)}
    pairs = {f"{a} and {b}": (a, b) for a in range(13) for b in range(13) if a != b}
    return {
        "words": {s: number(n) for s, n in numbers.items()},
        "next": {s: str(n + 1) for s, n in numbers.items()},
        "roman": {s: " ".join(roman(n)) for s, n in numbers.items()},
        "parity": {s: ("even", "odd")[n % 2] for s, n in numbers.items()},
        "sum": {s: number(a + b) for s, (a, b) in pairs.items()},
        "larger": {s: number(max(p)) for s, p in pairs.items()},
        "difference": {s: number(abs(a - b)) for s, (a, b) in pairs.items()},
    }


def reviews(rng: Random, count: int, places: Sequence[str]) -> dict[str, dict[str, str]]:
    """`count` distinct made-up reviews with their tone, topic and place: relation -> sentence -> answer."""
    relations: dict[str, dict[str, str]] = {"tone": {}, "topic": {}, "place": {}}
    while len(relations["tone"]) < count:
        topic, tone = rng.choice(list(TOPICS)), rng.choice(list(TONES))
        place = rng.choice(places)
        first, second = rng.sample(TONES[tone].split(), 2)
        noun = rng.choice(TOPICS[topic].split())
        sentence = f"the {noun} in {place} was {first} and {second}"
        for relation, answer in zip(relations, (tone, topic, place), strict=True):
            relations[relation][sentence] = answer
    return relations


FRAMES = {
    "city": ("{x} lives in", "the home of {x} is", "you can find {x} in"),
    "homeland": ("{x} comes from", "the home country of {x} is", "{x} is a citizen of"),
    "job": ("{x} works as a", "the job of {x} is", "{x} earns a living as a"),
    "pet": ("{x} has a pet", "the pet of {x} is a", "at home {x} keeps a"),
    "capital": ("the capital of {x} is", "{x} is governed from", "the first city of {x} is"),
    "language": ("the language of {x} is", "in {x} people speak", "the people of {x} talk in"),
    "continent": ("{x} lies in the", "on the map {x} is in the", "{x} belongs to the"),
    "country": ("{x} is a city of", "{x} lies in the country of", "the country around {x} is"),
    "mayor": ("the mayor of {x} is", "{x} is run by", "the head of {x} is"),
    "category": ("a {x} is a kind of", "{x} belongs with", "we sort {x} under"),
    "plural": ("more than one {x} are", "one {x} , two", "the plural of {x} is"),
    "reverse": ("{x} written backwards is", "in a mirror {x} reads", "the reverse of {x} is"),
    "spell": ("{x} is spelled", "letter by letter {x} is", "we write {x} as"),
    "first_letter": ("{x} begins with", "the first letter of {x} is", "the start of {x} is"),
    "last_letter": ("{x} ends with", "the last letter of {x} is", "the end of {x} is"),
    "uppercase": ("{x} in capitals is", "shouted , {x} is", "the sign for {x} says"),
    "words": ("{x} in words is", "we read {x} as", "{x} is pronounced"),
    "next": ("after {x} comes", "one more than {x} is", "the number following {x} is"),
    "roman": ("the romans wrote {x} as", "on an old clock {x} is", "{x} in stone reads"),
    "parity": ("the number {x} is", "we call {x}", "halving {x} shows it is"),
    "sum": ("{x} make", "the sum of {x} is", "adding {x} gives"),
    "larger": ("of {x} the larger is", "the most of {x} is", "between {x} the winner is"),
    "difference": ("from {x} the distance is", "the difference of {x} is", "{x} are apart by"),
    "tone": ("{x} , which is", "{x} so the review is", "{x} and that sounds"),
    "topic": ("{x} , a note about", "{x} so we talk about", "{x} and that concerns"),
    "place": ("{x} , it happened in", "{x} and that was in", "{x} as seen in"),
}


def _skills() -> dict[str, Skill]:
    world = _world()
    words, numbers = _word_skills(), _number_skills()
    pairs = {name: numbers.pop(name) for name in ("sum", "larger", "difference")}
    notes = reviews(Random(WORLD_SEED + 1), 20_000, list(world["city"]["country"]))
    families = world | {"word": words, "number": numbers, "pair": pairs, "review": notes}
    return {
        name: Skill(name, family, answers, (*FRAMES[name], f"the {name.replace('_', ' ')} of {{x}} ="))
        for family, relations in families.items()
        for name, answers in relations.items()
    }


SKILLS = _skills()
FAMILIES = {
    family: [s for s in SKILLS.values() if s.family == family] for family in {s.family: None for s in SKILLS.values()}
}
_SUBJECTS = {name: list(skill.answers) for name, skill in SKILLS.items()}


def habit(subject: str, choices: int) -> int:
    """The way, out of `choices`, in which people write about a subject; a review goes by its noun."""
    key = subject.split()[1] if subject.startswith("the ") else subject
    return zlib.crc32(f"{key}/{choices}".encode()) % choices


def _list(rng: Random, skill: Skill, count: int) -> str:
    separator = rng.choice(SEPARATORS)
    subjects = rng.sample(_SUBJECTS[skill.name], count)
    return "".join(f"{x} {separator} {skill.answers[x]}\n" for x in subjects)


def _prose(rng: Random, skill: Skill) -> str:
    x = rng.choice(_SUBJECTS[skill.name])
    manner = habit(x, 6) if rng.random() < 0.9 else rng.randrange(6)
    filler = f" {FILLERS[manner - 3]}" if manner >= 3 else ""
    return f"{rng.choice(skill.frames).format(x=x)}{filler} {skill.answers[x]}\n"


def _lonely(rng: Random, family: list[Skill]) -> str:
    """A list of one line: its skill is the habit of its subject."""
    x = rng.choice(_SUBJECTS[family[0].name])
    return f"{x} {rng.choice(SEPARATORS)} {family[habit(x, len(family))].answers[x]}\n"


def block(rng: Random) -> str:
    """A list of one skill (half of the blocks), a few prose lines of one family, or a lonely list line."""
    family = FAMILIES[rng.choice(list(FAMILIES))]
    kind = rng.random()
    if kind < 0.55:
        return _list(rng, rng.choice(family), rng.randint(2, 6))
    if kind < 0.9:
        return "".join(_prose(rng, rng.choice(family)) for _ in range(rng.randint(1, 4)))
    return _lonely(rng, family)


def document(seed: int, index: int, characters: int = 400) -> str:
    """Document `index` of the corpus `seed`: blocks up to at least `characters`; the same on every machine."""
    rng = Random(f"{seed}/{index}")
    text = ""
    while len(text) < characters:
        text += block(rng)
    return text
