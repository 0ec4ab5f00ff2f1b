"""The HTML page: it holds everything, shows hostile posts as text, asks no network; opened in a real browser
where there is one."""

import html
import json
import math
import shutil
import subprocess

import pytest

from data.toy import train_tokenizer
from evaluation.page import embed, page_data, pieces, render
from rlhf.model import EOS

HOSTILE = [
    "</script><script>document.title='OWNED'</script>",
    "<img src=x onerror=\"document.title='OWNED'\">",
    "\" onmouseover='x' & &lt; <!-- -->",
    "🦊👩‍👩‍👧 naïve \u2028 \u202e abc",
    "a" * 3000,
    "{{data}} {{title}} ${x} `y`",
    "\\u003c/script\\u003e",
    "",
]
RATIOS = [-3.5, 0.0, 1.5]


def hostile_rows(ratios: list[float] | None, length: int) -> list[dict]:
    """One row per hostile text, which is its post, id, summary, reference and answer. The judges disagree
    where gold has a verdict but no win."""
    return [
        {
            "id": text, "query": text, "reference": text, "summary": text,
            "ended": bool(i % 2), "tokens": [5, 6, EOS], "response_length": length * i, "reference_length": 5,
            "gold": 0.1, "gold_reference": 0.2, "scores": None, "scores_reference": None,
            "preference/gold": [0.0, 0.5, 1.0, math.nan][i % 4], "preference/llm": 1.0,
            "answers/llm": [text, text], "log_ratios": ratios,
        }
        for i, text in enumerate(HOSTILE)
    ]


def hostile_page() -> str:
    rows = {"<b>sft</b>": hostile_rows(None, 3), "rloo": hostile_rows(RATIOS, 6)}
    numbers = {
        "step": 1, "win_rate": 0.5, "win_rate_low": 0.4, "win_rate_high": 0.6, "lc_win_rate": None,
        "gold": 0.1, "scores": None, "kl": 1.0, "entropy": 2.0, "rougeL": None, "response_length": 3.0,
        "eos_share": 1.0,
    }
    results = [{"name": name, **numbers} for name in rows]
    data = page_data(rows, results, ["gold", "llm"], train_tokenizer(), 0)
    return render("<script>x</script>", data)


def test_page_holds_everything_and_escapes_it():
    page = hostile_page()
    assert page.count("<script") == 2
    assert page.count("</script") == 2
    assert "<img" not in page
    assert "<title>&lt;script&gt;" in page
    ours = page.split('id="data">')[0] + page.split("</script>")[1]
    forbidden = ("http:", "https:", "src=", "@import", "url(", "fetch(", "innerHTML")
    assert not [word for word in forbidden if word in ours]
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [post["query"] for post in data["posts"]] == HOSTILE
    assert data["posts"][3]["summaries"][1]["preferences"] == [None, 1.0]
    assert data["posts"][0]["summaries"][1]["ratios"] == RATIOS
    assert data["posts"][0]["summaries"][0]["ratios"] is None
    assert json.loads(embed(HOSTILE)) == HOSTILE
    assert not set("<>&") & set(embed(HOSTILE))
    with pytest.raises(ValueError):
        embed(math.nan)


def test_pieces_join_to_the_text():
    tokenizer = train_tokenizer()
    for text in (" sold old bikes.", "naïve 🦊 x", "\n\n é", ""):
        ids = tokenizer.encode(text).ids + [EOS]
        parts = pieces(tokenizer, ids)
        assert len(parts) == len(ids) and "".join(parts) == text + "<|endoftext|>"
    cut = pieces(tokenizer, tokenizer.encode("x🦊").ids[:3])  # ends within a character
    assert cut[0] == "x" and "\ufffd" in cut[-1]


def test_page_in_a_browser(tmp_path):
    """Headless Chromium opens the page from disk: hostile posts are text, filters and colours work."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium is installed: the page is not opened in a browser")
    (tmp_path / "page.html").write_text(hostile_page())

    def dom(fragment: str = "") -> str:
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
        ]
        command = [browser, *flags, f"file://{tmp_path}/page.html{fragment}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    page = dom()
    assert page.count("<article>") == len(HOSTILE)
    assert "<title>&lt;script&gt;" in page
    assert "8 of 8 posts" in page
    shown = page.split("<nav>")[1].split('<script type="application/json"')[0]
    for text in HOSTILE[:3]:
        assert html.escape(text, quote=False) in shown
    assert shown.count('title="log-ratio -3.5"') == len(HOSTILE)
    assert "rgba(226, 74, 51, 0.376" in shown  # 1.5 nats: half of the full colour
    assert shown.count('class="up"') == shown.count('class="down"') == len(HOSTILE) + 1  # and in the legend
    assert "<sub>" not in shown and dom("#ratios=1").count("<sub>-3.5</sub>") == len(HOSTILE)
    page = dom("#filter=disagree&checkpoint=rloo")
    assert "4 of 8 posts" in page  # gold says 0 or 0.5 where llm says 1; nan is no verdict
    assert page.count("<article>") == 4
    first = dom("#filter=change").split("<article>")[1]
    assert "8 · " in first  # the last post's summaries differ most in length
