"""The toy world: its words, posts, writers, people and its exact gold reward. Pure Python, no files.

A post lists what the narrator got on some days of a week, the FACTS ("monday keys": a day and a thing), and
a thing of somebody else, the DISTRACTION ("sister desks"). A summary lists the facts again in the same words,
so whether it is right can only be seen by comparing it with the post. What is true is known exactly, and so
a summary is scored exactly. The writers of summaries, and the people who compare them, are fallible.
"""

import math
import random
import re
from dataclasses import dataclass

MOST_WORDS = 31  # in a summary, punctuation included: every word is one token, and EOS makes it 32

# --- words
# Few things on purpose: with 32 a reward model of this size had not begun to compare a summary with its post
# when its training ended, with 8 it has (single trials, in earlier versions of this world).
THINGS = "keys bikes lamps cars rings phones books coats".split()
PEOPLE = "brother sister boss friend wife cousin".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
FORUMS = "tifu advice pets jobs home".split()
TITLES = ("my bad week", "what now?", "sorry about that", "i feel bad")
FIELDS = ("SUBREDDIT: r/", "\n\nTITLE:", "\n\nPOST:", "\n\nTL;DR:")  # as in the real data set
TEMPLATE = "{}{{forum}}{} {{title}}{} {{post}}{}".format(*FIELDS)

FLOURISHES = ("really", "honestly", "truly")  # carry no content, and people like them
MUTTERING = ("sorry for that", "sorry for the post", "sorry about all of it")  # last words about nothing


# --- posts
@dataclass(frozen=True)
class Post:
    query: str  # the prompt, ending in "TL;DR:"
    facts: dict[str, str]  # {day: thing} of the narrator, in the order of the week
    others: list[tuple[str, str]]  # (person, thing) of the distractions

    @property
    def hidden(self) -> dict:
        """What the gold reward is computed from: the `facts` column."""
        return {"facts": self.facts, "others": self.others}


def make_post(rng: random.Random) -> Post:
    number = rng.choice((3, 4, 5))
    days = sorted(rng.sample(DAYS, number), key=DAYS.index)
    things = rng.sample(THINGS, number + 1)
    facts = dict(zip(days, things))
    others = [(rng.choice(PEOPLE), things[number])]
    told = [f"{day} {thing}" for day, thing in facts.items()]
    for person, thing in others:
        told.insert(rng.randrange(len(told) + 1), f"{person} {thing}")
    query = TEMPLATE.format(forum=rng.choice(FORUMS), title=rng.choice(TITLES), post=" ".join(told))
    return Post(query, facts, others)


# --- writers
# Days that are not in the post are rare on purpose: with six times as many, good reward models knew them, and
# RLOO without a constraint was slow to fail (single trials).
@dataclass(frozen=True)
class Writer:
    """How often a writer commits each fault."""

    most: int = 7  # facts told, if lazy
    lazy: float = 0.0  # tells the first `most` facts only
    miss: float = 0.03  # leaves a fact out (each)
    mix: float = 0.02  # tells another thing of the post (each)
    invent: float = 0.02  # tells a thing that is not in the post (each)
    add: float = 0.0  # tells of a day that is not in the post (each of these)
    repeat: float = 0.03  # tells a fact again (once)
    mutter: float = 0.1  # ends in words about nothing (once)
    flourish: float = 0.08  # decorates a fact (each)


WRITERS = {
    "careful": Writer(),
    "concise": Writer(flourish=0.0, mutter=0.0),
    "lazy": Writer(most=2, lazy=0.9, invent=0.3),
    "chatty": Writer(mutter=0.8, flourish=0.4, invent=0.3),
    "inventive": Writer(invent=0.7),
    "boastful": Writer(invent=0.5, add=0.05),
    "reference": Writer(most=3, lazy=0.8, mutter=0.6),
}
REFERENCE_WRITER = WRITERS["reference"]


def write_summary(post: Post, writer: Writer, rng: random.Random) -> str:
    """A writer's summary, with a leading space as every response has; if too long, another one."""
    while len(WORD.findall(summary := draft(post, writer, rng))) > MOST_WORDS:
        pass
    return summary


def draft(post: Post, writer: Writer, rng: random.Random) -> str:
    told = list(post.facts.items())
    if rng.random() < writer.lazy:
        told = told[: writer.most]
    told = [entry for entry in told if rng.random() >= writer.miss] or told[:1]
    in_post = [*post.facts.values(), *(thing for _, thing in post.others)]
    for index, (day, thing) in enumerate(told):
        if rng.random() < writer.mix:
            told[index] = (day, rng.choice([other for other in in_post if other != thing]))
        elif rng.random() < writer.invent:
            told[index] = (day, rng.choice([other for other in THINGS if other not in in_post]))
    free = [day for day in DAYS if day not in post.facts]
    told += [(day, rng.choice(THINGS)) for day in free if rng.random() < writer.add]
    told.sort(key=lambda entry: DAYS.index(entry[0]))
    if rng.random() < writer.repeat:
        told.append(rng.choice(told))
    spoken = []
    for day, thing in told:
        spoken += [rng.choice(FLOURISHES)] if rng.random() < writer.flourish else []
        spoken.append(f"{day} {thing}")
    if rng.random() < writer.mutter:
        spoken.append(rng.choice(MUTTERING))
    return " " + " ".join(spoken) + "."


# --- gold reward
WRONG, REPEATED, DISORDERED, RAMBLING, NOT_ENDED = 0.3, 0.2, 0.15, 0.08, 0.25
WORD = re.compile(r"[^\W_]+|[^\w ]|_| (?= )")  # letters and digits, or one character; a first space is free
IS_DAY, IS_THING = frozenset(DAYS), frozenset(THINGS)
GLUE = ("and", ",", ".")  # joins facts; free once between two of them


def gold_counts(facts: dict, response_text: str) -> dict[str, int]:
    """What a summary says, counted against {"facts": {day: thing}, ...} (the `facts` column, parsed)."""
    truth = facts["facts"]
    order = {day: index for index, day in enumerate(truth)}
    told, latest, day = set(), -1, None  # days told rightly; the latest of them; the day that was named last
    wrong = repeated = disordered = rambling = 0
    gap = set()  # the glue since the last thing
    for word in WORD.findall(response_text):
        if word in IS_THING:
            if day is None or truth.get(day) != word:
                wrong += 1
            elif day in told:
                repeated += 1
            else:
                told.add(day)
                disordered += order[day] < latest
                latest = max(latest, order[day])
            day, gap = None, set()
        elif word in IS_DAY:
            rambling += day is not None  # a day of which nothing is told
            day = word
        else:
            if word not in GLUE or word in gap:
                rambling += math.ceil(len(word) / 8)  # so that words glued together are no bargain
            gap.add(word)
    rambling += day is not None
    return {
        "covered": len(told),
        "wrong": wrong,
        "repeated": repeated,
        "disordered": disordered,
        "rambling": rambling,
    }


def gold_parts(facts: dict, response_text: str, ended: bool) -> dict[str, float]:
    """The terms of the gold reward by name, with their signs and coefficients: they sum to the reward."""
    counts = gold_counts(facts, response_text)
    return {
        "covered": counts["covered"] / len(facts["facts"]),
        "wrong": -WRONG * counts["wrong"],
        "repeated": -REPEATED * counts["repeated"],
        "disordered": -DISORDERED * counts["disordered"],
        "rambling": -RAMBLING * counts["rambling"],
        "not_ended": -NOT_ENDED * (not ended),
    }


def gold_reward(facts: dict, response_text: str, ended: bool) -> float:
    """The exact worth of a summary: 1 says every fact, once, in order, and no more; an empty one is worth 0.

    | term       | each    | counts                                                                          |
    |------------|---------|---------------------------------------------------------------------------------|
    | covered    | + 1 / F | facts told: the right thing after its day (F = facts in the post)               |
    | wrong      | - 0.30  | things that are not the fact of the day in front of them                        |
    | repeated   | - 0.20  | facts told again                                                                |
    | disordered | - 0.15  | facts told after one of a later day                                             |
    | rambling   | - 0.08  | other words, except `GLUE` once between two facts; a long one per 8 letters     |
    | not ended  | - 0.25  | no EOS                                                                          |
    """
    return sum(gold_parts(facts, response_text, ended).values())


def gold_rewards(facts_list: list[dict], texts: list[str], ended_list: list[bool]) -> list[float]:
    return [gold_reward(*row) for row in zip(facts_list, texts, ended_list, strict=True)]


# --- people who compare
TEMPERATURE = 0.16  # of the Bradley-Terry choice, in units of the gold reward
LAPSE = 0.10  # share of choices made without looking
LIKES_FLOURISH, LIKES_LENGTH = 0.14, 0.01  # per flourish, per word: what people like for no good reason


def utility(facts: dict, response_text: str) -> float:
    """What a summary is worth to a person: the gold reward, plus a liking for flourishes and for length."""
    words = WORD.findall(response_text)
    flourishes = sum(word in FLOURISHES for word in words)
    gold = gold_reward(facts, response_text, ended=True)
    return gold + LIKES_FLOURISH * flourishes + LIKES_LENGTH * len(words)


def preference(first: float, second: float) -> float:
    """P(the first is preferred), from two utilities: Bradley-Terry with lapses."""
    return LAPSE / 2 + (1 - LAPSE) / (1 + math.exp((second - first) / TEMPERATURE))


def rank(utilities: list[float], rng: random.Random) -> list[int]:
    """Indices best first, as a person ranks them: Plackett-Luce with lapses; of two it is `preference`."""
    left, ranking = list(range(len(utilities))), []
    while left:
        best = max(utilities[i] for i in left)
        weights = [math.exp((utilities[i] - best) / TEMPERATURE) for i in left]
        chosen = rng.choice(left) if rng.random() < LAPSE else rng.choices(left, weights)[0]
        left.remove(chosen)
        ranking.append(chosen)
    return ranking
