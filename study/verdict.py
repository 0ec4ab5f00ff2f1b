"""What a claim is, and how its rule becomes a verdict."""

from dataclasses import dataclass

COMPARABLE = 0.03  # win rates closer than this are called equal
HOLDS = "holds"
FAILS = "does not hold"
OPEN = "not decided here"


@dataclass(frozen=True)
class Claim:
    title: str  # what the paper says
    paper: str  # where, and on what evidence
    rule: str  # when it holds, when it does not
    verdict: str
    ours: str  # numbers
    figures: str = ""  # names of the pictures that show it, separated by spaces
    reason: str = ""  # if it does not hold: what may explain it


def decide(holds: bool, fails: bool) -> str:
    if holds:
        return HOLDS
    return FAILS if fails else OPEN
