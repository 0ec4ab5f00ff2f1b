"""Prompts and responses of TL;DR and CNN/DM as tokens, as summarize_from_feedback_details (github vwxyzjn)
makes them: a prompt that is too long loses its post from the end, at the last newline, and where there is
none one character at a time, until it fits. Responses are the tokens that follow the prompt in the
tokenised joined text.
"""

import json
import re
from dataclasses import dataclass
from functools import cache

from tokenizers import Tokenizer

from data.rows import EOS, encode
from rlhf.config import UserError

SLACK = 64  # tokens that one character more may take away from the prompt: far more than any was seen to


@dataclass(frozen=True)
class Template:
    text: str
    field: str  # the part that is cut
    limit: int  # tokens of the prompt
    pair_cap: int  # tokens of a response of a pair, with EOS


TLDR = Template("SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:", "post", 512, 169)
CNNDM = Template("Article:\n{article}\n\nTL;DR:\n", "article", 2047 - 128, 155)


@cache
def splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Is it a byte-level BPE as GPT-2's and GPT-NeoX's, for which the argument in `most_that_can_fit`
    holds?"""
    parts = json.loads(tokenizer.to_str())
    split = parts["pre_tokenizer"] or {}
    added = [token for token in parts["added_tokens"] if not token["special"]]
    return (
        (parts["normalizer"] or {"type": "NFC"})["type"] == "NFC"
        and split.get("type") == "ByteLevel"
        and split.get("use_regex", True)
        and not split["add_prefix_space"]
        and parts["model"]["type"] == "BPE"
        and not parts["model"]["dropout"]
        and all(not token["content"].strip(" \n") for token in added)
    )


def most_that_can_fit(tokenizer: Tokenizer, template: Template, fields: dict[str, str]) -> int:
    """A number of characters of the post of a prompt that is too long: no prompt that keeps more of it can
    fit.

    The number of tokens may fall when text is added (" summa" may take more than " summary"), so bisection
    can miss the cut that the recipe finds. What holds instead: let b be the place of a space or newline
    behind a visible ASCII character. A new piece begins at b whatever follows, and nothing before b looks
    further than b: NFC joins neither character to the one before it, added tokens are runs of blanks, and a
    regex match looks one character ahead. BPE works within a piece. So the tokens before b are the same in
    every prompt that keeps b, at least one follows, and then those of "TL;DR:", which the newline in front
    of it splits off in the same way.

    A post without blanks (8,000 letters in a row) has no such place, and one step per character would
    encode it 8,000 times. There the cut begins where SLACK tokens too many are left: what a letter changes
    are the tokens of the few letters around it.
    """
    before, after = template.text.split(f"{{{template.field}}}")
    text = template.text.format(**fields)
    start = len(before.format(**fields))
    most = len(fields[template.field])
    closing = encode(tokenizer, [after.lstrip("\n")])[0]
    room = template.limit - len(closing)  # for what is before b; with one token more the prompt is too long
    if room < 1 or not splits_at_spaces(tokenizer):
        return most
    ends = [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]
    if len(ends) > room + SLACK:
        most = min(most, max(0, ends[room + SLACK] - start))
    place = re.compile(r"[!-~][ \n]").search(text, ends[room - 1])  # `room` tokens end there
    if place:
        most = min(most, place.end() - 1 - start)
    return most


def cut(post: str, most: int) -> str:
    """The recipe's step, taken again while more than `most` characters are left: such a post cannot fit, and
    needs no encoding."""
    end = len(post)
    while (newline := post.rfind("\n", 0, end)) >= 0:
        end = newline
        if end <= most:
            return post[:end]
    return post[: max(0, min(end - 1, most))]


def make_prompts(tokenizer: Tokenizer, rows: list[dict]) -> tuple[list[str], list[list[int]], list[int]]:
    """Prompts as text, as tokens, and the characters that each lost. Prompts that are too long are cut side
    by side, one batch a step."""
    templates = [row["template"] for row in rows]
    fields = [dict(row["fields"]) for row in rows]

    def encoded(which: list[int]) -> list[list[int]]:
        return encode(tokenizer, [templates[i].text.format(**fields[i]) for i in which])

    ids = encoded(list(range(len(rows))))
    too_long = [i for i, template in enumerate(templates) if len(ids[i]) > template.limit]
    most = {i: most_that_can_fit(tokenizer, templates[i], fields[i]) for i in too_long}
    while too_long:
        for i in too_long:
            name = templates[i].field
            if not fields[i][name]:
                raise UserError(f"{rows[i]['where']}: column {name!r} is cut to nothing, and still the "
                                f"prompt has more than {templates[i].limit} tokens: raise "
                                "--max_prompt_tokens, or take the row out")
            fields[i][name] = cut(fields[i][name], most[i])
        for i, tokens in zip(too_long, encoded(too_long)):
            ids[i] = tokens
        too_long = [i for i in too_long if len(ids[i]) > templates[i].limit]
    texts = tokenizer.decode_batch(ids)
    queries = [text.strip() for text in texts]
    # CNN/DM: what the recipe joins to a response has no newline at its end
    changed = [i for i, query in enumerate(queries) if query != texts[i]]
    for i, tokens in zip(changed, encode(tokenizer, [queries[i] for i in changed])):
        ids[i] = tokens
    names = [template.field for template in templates]
    lost = [len(row["fields"][name]) - len(own[name]) for row, own, name in zip(rows, fields, names)]
    return queries, ids, lost


def make_responses(
    tokenizer: Tokenizer, queries: list[str], query_tokens: list[list[int]], texts: list[str]
) -> tuple[list[list[int]], int]:
    """Tokens behind those of the prompt in the joined text, and EOS. Where joining changes the prompt's own
    tokens (the number of such rows is returned) the response is tokenised alone."""
    joined = encode(tokenizer, [query + text for query, text in zip(queries, texts)])
    apart = {i for i, (q, j) in enumerate(zip(query_tokens, joined)) if j[: len(q)] != q}
    tokens = [tokens[len(query) :] for tokens, query in zip(joined, query_tokens)]
    for i in apart:
        tokens[i] = encode(tokenizer, [texts[i]])[0]
    return [response + [tokenizer.token_to_id(EOS)] for response in tokens], len(apart)
