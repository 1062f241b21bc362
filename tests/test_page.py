"""The report page, as a browser sees it."""

import json
import shutil
import subprocess

import pytest

import eval as E
from conftest import call
from judge import benchmarks as B

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


CRITERIA = "Length 60%: short\nFacts 40%: </pre><b>right</b>?"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report over two made-up runs of RM-Bench with votes and both orders; one response tries to end the
    script."""
    root = tmp_path_factory.mktemp("page")
    for name in ("plain", "showy"):
        out = root / f"eval-{name}"
        out.mkdir()
        pairs, lines = [], []
        for d in B.RM_BENCH:
            for c in range(3):
                for r in range(3):
                    key = f"rm-bench/{d}/0/{c}-{3 + r}"
                    pairs.append(
                        {
                            "id": key,
                            "bench": "rm-bench",
                            "item": d,
                            "subset": d,
                            "compare": [c, 3 + r],
                            "context": [{"role": "user", "content": f"question {d}"}],
                            "swap": False,
                            "label": "A",
                            "a": f"right {c} of three </script><script>document.title='broken'</script>",
                            "b": f"wrong {r}",
                            **({"criteria": CRITERIA} if d == "math" else {}),
                        }
                    )
                    for order in (0, 1):
                        for vote in range(3):
                            # The showy judge goes by style; both fail to end one judgment.
                            right = name == "plain" or c >= r
                            verdict = (
                                None
                                if d == "code" and c == r == 0
                                else ("AB"[order] if right else "BA"[order])
                            )
                            quote = "stands nowhere here" if d == "math" else f"right {c} of three"
                            text = (
                                f"<type>Chat</type><rubric>Help 90%: helps\nTone 10%: kind"
                                f"<justify>because</justify></rubric>"
                                f"<eval><quote_A>{quote}</quote_A> is better"
                                + ("\nDecided by: Length & <tone>" if d == "math" else "")
                                + "</eval>"
                                + (f"<answer>[[{verdict}]]</answer>" if verdict else "")
                            )
                            lines.append(
                                {
                                    "id": key,
                                    "order": order,
                                    "swap": bool(order),
                                    "temperature": 1.0,
                                    "vote": vote,
                                    "label": "AB"[order],
                                    "verdict": verdict,
                                    "reason": "" if verdict else "no answer",
                                    "official": verdict or "error",
                                    "finish": "stop",
                                    "tokens": 40,
                                    "prompt_tokens": 90,
                                    "prompt": "0",
                                    "type": "Chat",
                                    "rubric": [["Help", 90], ["Tone", 10]],
                                    "quotes": [1, 1],
                                    "text": text,
                                }
                            )
        (out / "config.json").write_text(
            json.dumps(
                {
                    "format": 3,
                    "model": f"models/{name}",
                    "protocol": "instruct",
                    "scalar": False,
                }
            )
        )
        for file, rows in (("pairs", pairs), ("judgments", lines)):
            (out / f"{file}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    call(E, "report", root / "eval-plain", root / "eval-showy", "--out", root)
    return root / "report.html"


def dom(page, tmp_path, part=""):
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=3000",
            "--dump-dom",
            f"file://{page}{part}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout


def shown(html):
    """What the script has made, without the script."""
    start = html.index('id="page"')
    return html[start : html.index("<script>", start)]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_every_part(page, tmp_path):
    html = dom(page, tmp_path)
    assert "<title>Judges, measured</title>" in html  # no response has run as a script
    body = shown(html)
    for part in (
        "Scores",
        "RM-R1-Qwen-Instruct-32B",
        "79.1",
        'id="heat"',
        'id="votes"',
        "says A",
        "no answer",
        "<mark>right",
        '<span class="weight">90%</span>',
        "why these",
        'id="reasons"',
        "and sound",
        '<span class="fault">quotes fails</span>',
        "models/showy",
    ):
        assert part in body, part
    assert body.count("<article>") == 10 and "36 of 36" in body
    assert "&lt;/script&gt;" in body


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_pairs_criteria_stand_beside_what_decided(page, tmp_path):
    articles = shown(dom(page, tmp_path, "#subset=rm-bench / math")).split("<article>")[1:]
    assert len(articles) == 9
    for article in articles:
        criteria = "Length 60%: short\nFacts 40%: &lt;/pre&gt;&lt;b&gt;right&lt;/b&gt;?</pre>"
        assert article.count("criteria that were given") == article.count(criteria) == 1
        assert article.count("decided by Length &amp; &lt;tone&gt;") == 4  # two runs, two orders
    others = shown(dom(page, tmp_path, "#subset=rm-bench / chat")).split("<article>")[1:]
    assert len(others) == 9
    assert not any("criteria that" in text or "decided by" in text for text in others)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_browser_of_judgments_filters(page, tmp_path):
    """The showy judge: 12 of 36 wrong (three cells above the diagonal in four domains), one without a verdict; the plain
    one none."""
    for part, count in (
        ("#kind=wrong", 12),
        ("#kind=no_verdict", 1),
        ("#kind=right", 23),
        ("#kind=unsound", 6),  # of math, whose quotes stand nowhere
        ("#kind=wrong&run=0", 0),
        ("#kind=wrong&subset=rm-bench / math", 3),
        ("#search=question safety", 9),
    ):
        assert f'id="count">{count} of 36<' in dom(page, tmp_path, part), part


def test_the_page_needs_no_network(page):
    text = page.read_text()
    assert "http" not in text.split("const DATA")[0] and "<link" not in text and "src=" not in text
