"""page.html: posts, references and the summaries of all checkpoints side by side, in one file.

It opens from disk, without a network. Texts reach the page as JSON in a <script type="application/json">,
with <, > and & as \\u escapes, and its script shows them with textContent only: nothing that a post contains
is ever read as HTML.
"""

import html
import json
import math
from pathlib import Path

from tokenizers import Tokenizer

TEMPLATE = Path(__file__).parent / "page.html"
NUMBERS = (
    "step", "win_rate", "win_rate_low", "win_rate_high", "lc_win_rate", "gold", "scores", "kl", "entropy",
    "rougeL", "response_length", "eos_share",
)


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of each token, such that they join to the text. A character that several tokens share goes to
    the last of them."""
    out, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False)
        if text.endswith("\ufffd") and end < len(ids) or not text.startswith(before):
            text = before
        out.append(text[len(before):])
        before = text
    return out


def embed(data: object) -> str:
    """JSON that may stand inside a <script>."""
    text = json.dumps(data, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def number(value: float | None, digits: int = 4) -> float | None:
    return None if value is None or math.isnan(value) else round(value, digits)


def summary_entry(row: dict, judges: list[str], tokenizer: Tokenizer) -> dict:
    """One summary on the page; with a reference model each token has its log-ratio."""
    entry = {
        "text": row["summary"], "length": row["response_length"], "ended": row["ended"],
        "gold": number(row.get("gold")), "score": number(row.get("scores")), "pieces": None, "ratios": None,
        "preferences": [number(row[f"preference/{judge}"]) for judge in judges],
        "answers": [row.get(f"answers/{judge}") or [] for judge in judges],
    }
    if ratios := row.get("log_ratios"):
        entry |= {"pieces": pieces(tokenizer, row["tokens"]), "ratios": [number(r, 3) for r in ratios]}
    return entry


def page_data(
    rows: dict[str, list[dict]], results: list[dict], judges: list[str], tokenizer: Tokenizer, limit: int,
) -> dict:
    """What the page shows, of the first `limit` posts (0 = all).

    {checkpoints: [numbers], judges, posts: [{query, reference, summaries: one per checkpoint}]}
    """
    posts = []
    for together in list(zip(*rows.values(), strict=True))[: limit or None]:
        first = together[0]
        posts.append({
            "id": first["id"], "query": first["query"], "reference": first["reference"],
            "length": first["reference_length"], "gold": number(first.get("gold_reference")),
            "score": number(first.get("scores_reference")),
            "summaries": [summary_entry(row, judges, tokenizer) for row in together],
        })
    checkpoints = [{"name": r["name"], **{key: r.get(key) for key in NUMBERS}} for r in results]
    return {"checkpoints": checkpoints, "judges": judges, "posts": posts}


def render(title: str, data: dict) -> str:
    before, after = TEMPLATE.read_text().split("{{data}}")
    return before.replace("{{title}}", html.escape(title)) + embed(data) + after
