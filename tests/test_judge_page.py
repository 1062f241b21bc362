"""The judge's page, in a browser driven over its DevTools port. The server plays what it is told."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from http.server import ThreadingHTTPServer

import pytest
from test_page import CHROMIUM

from conftest import ROOT, Replies

PAGE = (ROOT / "serve" / "judge.html").read_text()
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def policy(page):
    """The header that the server sends with the page: its own blocks by their hashes, and nothing else."""

    def digest(tag):
        block = re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        return base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()

    return (
        f"default-src 'none'; connect-src 'self'; script-src 'sha256-{digest('script')}'; "
        f"style-src 'sha256-{digest('style')}'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


# ---------------------------------------------------------------- the server


class Stub(Replies):
    """Serves the page, and plays server.script as the answer to each comparison: (event, data) is sent, a
    threading.Event waited for, an (int, bytes) is a status with a body instead of a stream."""

    def do_GET(self):
        self.server.paths.append(self.path)
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Security-Policy", policy(PAGE))
        self.end_headers()
        self.wfile.write(PAGE.encode())

    def do_POST(self):
        self.server.paths.append(self.path)
        self.server.requests.append(
            json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        )
        first = self.server.script[0]
        if isinstance(first, tuple) and isinstance(first[0], int):
            status, body = first
            self.send_response(status)
            self.end_headers()
            return self.wfile.write(body)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for step in self.server.script:
                if isinstance(step, threading.Event):
                    assert step.wait(60)
                else:
                    self.wfile.write(f"event: {step[0]}\ndata: {json.dumps(step[1])}\n\n".encode())
        except OSError:
            self.server.gone.set()


@pytest.fixture
def server():
    stub = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    stub.paths, stub.requests, stub.script, stub.gone = [], [], [], threading.Event()
    stub.url = f"http://127.0.0.1:{stub.server_port}/"
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    yield stub
    stub.shutdown()
    stub.server_close()


# ---------------------------------------------------------------- what it plays


def judgment(quotes=(), **parts):
    return {
        "type": "",
        "rubric": [],
        "justify": "",
        "solution": "",
        "eval": "",
        "quotes": [*quotes],
        **parts,
    }


def quote(of, text, found=True):
    return {"of": of, "text": text, "found": found}


def item(name, weight, text):
    return {"name": name, "weight": weight, "text": text}


def vote_of(number, prefers, written, content, reason="", tokens=40):
    """A vote as /compare lists it."""
    order = ("AB", "BA")[number % 2]
    verdict = prefers and ("A" if prefers == order[0].lower() else "B")
    return {
        "order": order,
        "verdict": verdict,
        "prefers": prefers,
        "reason": reason,
        "tokens": tokens,
        "text": written,
        "judgment": content,
    }


def event(number, vote):
    return "vote", {"number": number, **vote}


def done(votes, verdict="A", consistent=True, reason="", win=0.75, low=0.368, high=0.983):
    usage = {
        "judgments": len(votes),
        "cached": 0,
        "prompt_tokens": 100,
        "completion_tokens": sum(v["tokens"] for v in votes),
    }
    return {
        "verdict": verdict,
        "reason": reason,
        "win": win,
        "low": low,
        "high": high,
        "consistent": consistent,
        "share": 1.0,
        "votes": votes,
        "usage": usage,
    }


def script_of(votes, **more):
    """All that there is to say, at once."""
    return [*(event(n, vote) for n, vote in enumerate(votes)), ("done", done(votes, **more))]


# ---------------------------------------------------------------- the browser


class Browser:
    """A page of headless Chromium, over its DevTools protocol."""

    def __init__(self, socket):
        self.socket, self.count = socket, 0
        self.call("Page.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # else no clipboard
        # Hostile text would call ran(); what the policy stops would be told of, too.
        self.call(
            "Page.addScriptToEvaluateOnNewDocument",
            source="""
            window.bad = []; window.ran = () => bad.push("ran"); window.alert = window.ran;
            addEventListener("securitypolicyviolation", e => bad.push(e.violatedDirective))""",
        )

    def call(self, method, **params):
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv(timeout=60))
            if answer.get("id") == self.count:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def js(self, code):
        """The value of an expression in the page, once it is there if it is a promise."""
        answer = self.call(
            "Runtime.evaluate",
            expression=code,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        assert "exceptionDetails" not in answer, (code, answer["exceptionDetails"])
        return answer["result"].get("value")

    def until(self, code, seconds=20):
        there = self.js(f"""new Promise(end => {{
            const start = Date.now(), look = setInterval(() => {{
                const there = !!({code});
                if (!there && Date.now() - start < {1000 * seconds}) return;
                clearInterval(look);
                end(there);
            }}, 20) }})""")
        assert there, f"{code} within {seconds} s; the page says {self.text('say')!r}"

    def open(self, url):
        self.call("Page.navigate", url="about:blank")
        self.until("location.href === 'about:blank'")
        self.call("Page.navigate", url=url)
        self.until("location.href !== 'about:blank' && document.readyState === 'complete'")

    def key(self, name, ctrl=False, shift=False):
        code = {"Tab": 9, "Enter": 13}[name]
        text = {"text": "\r"} if name == "Enter" and not ctrl else {}
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=name,
                code=name,
                windowsVirtualKeyCode=code,
                modifiers=2 * ctrl + 8 * shift,
                **(text if kind == "keyDown" else {}),
            )

    def text(self, element):
        return self.js(f"document.getElementById('{element}').textContent")

    def all(self, selector, what="textContent"):
        return self.js(f"[...document.querySelectorAll({selector!r})].map(e => e.{what})")

    def fill(self, **fields):
        for name, value in fields.items():
            self.js(f"document.getElementById('{name}').value = {json.dumps(value)}")

    def written(self, vote):
        """A judgment as written."""
        return self.js(f"votes[{vote}].card.querySelector('.raw pre').textContent")

    def click(self, element):
        self.js(f"document.getElementById('{element}').click()")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    from websockets.sync.client import connect

    profile = tmp_path_factory.mktemp("profile")
    process = subprocess.Popen(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
            f"--user-data-dir={profile}",
            "--remote-debugging-port=0",
            "about:blank",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port, started = profile / "DevToolsActivePort", time.monotonic()
        while not (port.exists() and port.read_text().strip()):
            assert process.poll() is None and time.monotonic() < started + 120
            time.sleep(0.1)
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port.read_text().split()[0]}/json/list"
        ) as r:
            page = next(p for p in json.load(r) if p["type"] == "page")
        with connect(page["webSocketDebuggerUrl"], max_size=None) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait(30)


# ---------------------------------------------------------------- tests


def test_the_page_is_one_file_without_markup_from_strings():
    assert PAGE.count("<script") == PAGE.count("<style") == 1
    markup, script = PAGE.split("<script>")
    assert not re.search(r"\s(on\w+|style)=|https?:|src=", markup.split("</style>")[1])
    assert not re.search(
        r"innerHTML|outerHTML|insertAdj|document\.write|eval\(|Function\(|https?:", script
    )


FIRST = "<type>Chat</type>\n<rubric>Count 90%: 2 fruits\nTone 10%: kind\n"
REST = "<justify>The client asks for 2</justify></rubric>\n"
EVAL = "<quote_A> plum  pear</quote_A> 2 is A and <quote_B>fig fig fig</quote_B> 3 is B so 2 is A"
MIRROR = "<quote_A>lime melon fig</quote_A> 3 is A and <quote_B>plum</quote_B> 1 is B so 2 is B"
FULL = judgment(
    [quote("a", " plum  pear", False), quote("b", "fig fig fig", False)],
    type="Chat",
    rubric=[item("Count", 90.0, "2 fruits"), item("Tone", 10.0, "kind")],
    justify="The client asks for 2",
    eval=EVAL,
)
SWAPPED = judgment([quote("b", "lime melon fig"), quote("a", "plum")], type="Chat", eval=MIRROR)


@needs_chromium
def test_votes_appear_one_by_one(browser, server):
    gates = [threading.Event() for _ in range(3)]
    written = f"{FIRST}{REST}<eval>{EVAL}</eval>\n<answer>[[A]]</answer>"
    votes = [
        vote_of(0, "a", written, FULL),
        vote_of(1, "a", f"<eval>{MIRROR}</eval>\n<answer>[[B]]</answer>", SWAPPED),
        vote_of(2, None, "hm", judgment(), reason="no answer"),
    ]
    server.script = [
        gates[0],
        event(0, votes[0]),
        gates[1],
        event(1, votes[1]),
        gates[2],
        event(2, votes[2]),
        ("done", done(votes)),
    ]
    content = {"prompt": "Name 2 fruits .", "a": "Here: plum pear", "b": "Here: lime melon fig"}
    browser.open(server.url)
    browser.fill(**content)
    assert server.requests == []
    browser.click("judge")

    browser.until("document.getElementById('displayed-a').textContent")
    assert browser.text("say") == "Judging: a vote appears when it is whole."
    assert browser.text("displayed-a") == "Here: plum pear" and browser.all("mark") == []
    gates[0].set()
    browser.until("votes.length === 1")
    assert browser.text("say") == "Judging: 1 vote is in."
    assert browser.all(".bar i", "style.width") == ["90%", "10%"]
    assert browser.all("#displayed-a mark") == ["plum pear"]
    assert browser.all("#displayed-b mark") == []
    gates[1].set()
    browser.until("votes.length === 2")
    assert browser.text("say") == "Judging: 2 votes are in."
    gates[2].set()
    browser.until("result")

    assert browser.text("say") == (
        "A is better: 2 of 2 votes, both orders agree, 1 without a verdict; "
        "expected win rate of A: 0.75 (0.37 to 0.98)."
    )
    assert browser.text("badge") == "both orders agree"
    assert browser.all("#strip .tag") == ["A is better", "A is better", "no verdict: no answer"]

    # A's quote, of other whitespace, is marked, with the one inside of it; B's, which is not there, is
    # flagged. In the other order the judge's A is our B.
    assert browser.all("#displayed-a mark") == ["plum pear"]
    assert browser.all("#displayed-b mark") == ["lime melon fig"]
    assert (
        browser.text("absent-a") == ""
        and browser.text("absent-b") == "fig fig fig not in the response"
    )
    assert browser.all("#votes > :nth-child(1) mark") == [" plum  pear", "fig fig fig"]
    assert browser.all("#votes > :nth-child(1) mark.absent") == ["fig fig fig"]
    assert browser.all("#votes > :nth-child(2) mark:not(.absent)") == ["lime melon fig", "plum"]

    # The text is there on demand, word for word; the third vote can be opened from the strip.
    assert browser.js("votes.map(v => v.card.open)") == [True, True, False]
    assert browser.all(".raw", "open") == [False, False, True]
    assert browser.written(0) == written
    browser.js("document.querySelectorAll('#strip button')[2].click()")
    assert (
        browser.js("votes[2].card.open && votes[2].card.querySelector('.raw pre').innerText")
        == "hm"
    )
    assert server.requests == [{**content, "budget": 8, "stream": True}]
    assert browser.js("bad") == []


@needs_chromium
def test_votes_stand_in_their_order_however_they_come(browser, server):
    votes = [
        vote_of(n, "a", f"<solution>{n}</solution>", judgment(solution=str(n))) for n in range(4)
    ]
    server.script = [*(event(n, votes[n]) for n in (1, 0, 3, 2)), ("done", done(votes))]
    browser.open(server.url)
    browser.click("judge")
    browser.until("result")
    assert [x[:2] for x in browser.all("#strip button")] == ["1:", "2:", "3:", "4:"]
    assert [x[:11] for x in browser.all("#votes b")] == [f"Judgment {n}," for n in (1, 2, 3, 4)]
    assert [browser.written(n) for n in range(4)] == [vote["text"] for vote in votes]
    assert browser.text("say").startswith("A is better: 4 of 4 votes")


@needs_chromium
@pytest.mark.parametrize(
    "comparison, sentence",
    [
        (
            dict(verdict="B", win=0.25, low=0.017, high=0.632),
            "B is better: 0 of 1 votes, both orders agree; expected win rate of B: 0.75 (0.37 to 0.98).",
        ),
        (
            dict(
                verdict="tie",
                consistent=False,
                win=0.5,
                low=0.2,
                high=0.8,
                reason="as many votes for each",
            ),
            "Neither is better: as many votes for each, the orders disagree; "
            "expected win rate of A: 0.50 (0.20 to 0.80).",
        ),
        (dict(verdict=None, consistent=None, reason="truncated"), "No verdict: truncated."),
    ],
)
def test_the_verdict_in_words(browser, server, comparison, sentence):
    server.script = script_of([vote_of(0, "a", "text", judgment(solution="42"))], **comparison)
    browser.open(server.url)
    browser.click("judge")
    browser.until("result")
    assert browser.text("say") == sentence


HOSTILE = [
    "<script>ran()</script>",
    "</script><script>ran()</script>",
    "</textarea><img src=x onerror=ran()>",
    "<svg onload=ran()>",
    '"><a href="javascript:ran()">x</a>',
    "javascript:ran()",
    "${ran()}",
    "&lt;b&gt;",
    "' onfocus=ran() autofocus '",
    "<style>*{display:none}</style>",
    "\u202egnp.exe\u2066",
    "__proto__",
    "</pre></details>",
    "<iframe srcdoc='<script>parent.ran()</script>'>",
    "<quote_A><img src=x onerror=ran()></quote_A>",
]


@needs_chromium
def test_hostile_text_stays_text(browser, server):
    """In every field at once: what is asked, what is written, every part of a judgment, reasons, an error."""
    bad = "\n".join(HOSTILE)
    parts = judgment(
        [quote("a", HOSTILE[2]), quote("b", bad + "!", False)],
        type=bad,
        rubric=[item(bad, weight, bad) for weight in (1e9, -5, None)],
        justify=bad,
        solution=bad,
        eval=f"{bad}<quote_B>{bad}!</quote_B>",
        decided_by=bad,
    )
    votes = [vote_of(0, "a", bad, parts), vote_of(1, None, bad, parts, reason=bad)]
    server.script = [
        *script_of(votes)[:-1],
        ("__proto__", {}),
        ("constructor", {}),
        ("done", done(votes, verdict=None, reason=bad)),
    ]
    browser.open(server.url)
    browser.fill(prompt=bad, a=bad, b=bad + "x" * 100_000, criteria=bad)
    for button in ("link", "curl", "judge"):
        browser.click(button)
    browser.until("result")
    assert browser.text("say") == f"No verdict: {bad}."
    assert server.requests[0]["b"] == bad + "x" * 100_000 == browser.text("displayed-b")
    assert browser.all("#displayed-a mark") == [HOSTILE[2]]
    assert browser.text("absent-b") == bad + "! not in the response"
    assert browser.written(0) == bad
    assert browser.text("displayed-criteria") == server.requests[0]["criteria"] == bad
    assert browser.all(".by b") == [bad] * 2
    assert browser.all(".bar i", "style.width")[:2] == ["100%", "0%"]
    assert browser.js("votes[0].card.querySelectorAll('section')[1].textContent").startswith(
        "solution<script>ran()</script>\n"
    )
    server.script = [
        ("error", {"error": {"message": bad, "type": "x", "param": None, "code": 400}})
    ]
    browser.click("judge")
    browser.until("!control")
    assert browser.text("say") == bad
    kinds = "document.querySelectorAll('body script, img, svg, iframe, a, style').length"
    assert browser.js(kinds) == 2  # the page's own script and style
    assert browser.js("bad") == [] and browser.js("document.title") == "Which response is better?"


@needs_chromium
def test_criteria_are_sent_and_the_one_that_decided_is_shown(browser, server):
    """They are folded away; blank ones are none."""
    criteria = "3 Tone: is it kind?\n1 Facts: are they right?"
    votes = [vote_of(n, "b", "text", judgment(eval="x", decided_by="Tone")) for n in (0, 1)]
    server.script = script_of(votes, verdict="B", win=0.25)
    browser.open(server.url)
    for written, sent in (("", None), (" \n", None), (criteria, criteria)):
        browser.fill(criteria=written)
        assert browser.js("document.getElementById('by').open") is False
        browser.click("judge")
        browser.until("result && !control")
        assert server.requests[-1].get("criteria") == sent
        assert browser.js("document.getElementById('given').hidden") == (sent is None)
        assert browser.text("displayed-criteria") == (sent or "")
    assert browser.all("#votes .by") == ["decided by Tone"] * 2

    browser.click("link")
    browser.until("location.hash.length > 1")
    link = browser.js("location.href")
    browser.open(link)
    browser.until("content().criteria")
    assert browser.js("content().criteria") == criteria
    assert browser.js("document.getElementById('by').open") is True
    without = browser.js("(async () => '#' + await pack({prompt: 'p', a: 'x', b: 'y'}))()")
    browser.js(f"location.hash = {without!r}")
    browser.until("content().prompt === 'p'")
    assert browser.js("JSON.stringify(content())") == '{"prompt":"p","a":"x","b":"y"}'
    wrong = browser.js(
        "(async () => '#' + await pack({prompt: 'q', a: 'x', b: 'y', criteria: 7}))()"
    )
    browser.js(f"location.hash = {wrong!r}")
    browser.until("document.getElementById('note').textContent.startsWith('This link cannot be')")
    assert browser.js("content().prompt") == "p" and browser.js("bad") == []


@needs_chromium
def test_a_link_restores_the_texts_and_judges_nothing(browser, server):
    texts = {
        "criteria": "2 Länge: kurz?\n1 Ton: \u2066freundlich?",
        "prompt": "Was ist größer?\n\t\u202e",
        "a": "".join(map(chr, range(1, 0x3000))),
        "b": "é🙂" * 50_000,
    }
    read = "JSON.stringify(content())"
    browser.open(server.url)
    browser.fill(**texts)
    sent = json.loads(browser.js(read))  # a text field makes \n of \r
    browser.click("link")
    browser.until("location.hash.length > 1")
    link = browser.js("location.href")
    assert re.fullmatch(re.escape(server.url) + "#[A-Za-z0-9_-]+", link) and len(link) < 100_000
    browser.open(link)
    browser.until("content().prompt !== 'What is 6 * 7 ?'")
    assert json.loads(browser.js(read)) == sent and sent["b"] == texts["b"]
    assert browser.text("note") == "The texts are from the link. Nothing has been judged."

    pack = lambda code: browser.js(f"(async () => {server.url!r} + '#' + await pack({code}))()")
    bomb = "{prompt: ' '.repeat(9e6), a: '', b: ''}"
    for broken in (
        link[:-20],
        server.url + "#nothing",
        server.url + "#%00",
        pack("[1]"),
        pack("null"),
        pack("{prompt: 1}"),
        pack(bomb),
    ):
        browser.open(broken)
        browser.until("document.getElementById('note').textContent")
        assert browser.text("note").startswith("This link cannot be read"), broken[:80]
        assert json.loads(browser.js(read))["a"] == "Here: 42"
    time.sleep(0.3)
    assert server.requests == [] and set(server.paths) <= {"/"} and browser.js("bad") == []


@needs_chromium
def test_the_keyboard_is_enough(browser, server):
    gate = threading.Event()
    content = judgment(solution=" 6 * 7 = 42")
    script = script_of(
        [vote_of(n, "a", "<solution> 6 * 7 = 42</solution>", content) for n in (0, 1)]
    )
    server.script = [script[0], gate]
    focus = "(e => e.id || e.tagName + ' ' + e.textContent)(document.activeElement)"
    browser.open(server.url)

    def walk():
        """What Tab reaches, in order, from the question on."""
        browser.js("document.getElementById('prompt').focus()")
        found = [browser.js(focus)]
        for _ in range(40):
            browser.key("Tab")
            found.append(browser.js(focus))
            if found[-1].startswith("BODY") or found[-1] in found[:-1]:
                return found[:-1]

    fold = "SUMMARY Criteria (optional)"
    assert walk() == ["prompt", "a", "b", fold, "judge", "budget", "link", "curl"]
    browser.js("document.getElementById('prompt').focus()")
    browser.call("Input.insertText", text="And ")
    browser.key("Enter", ctrl=True)
    browser.until("votes[0]")
    assert "And " in server.requests[0]["prompt"] and "\n" not in server.requests[0]["prompt"]
    browser.key("Enter", ctrl=True)  # once more while it judges: nothing
    for _ in range(5):
        browser.key("Tab")
    assert browser.js(focus) == "stop"
    assert browser.js("getComputedStyle(document.activeElement).outlineWidth") == "3px"
    browser.key("Enter")
    browser.until("!control")
    assert (
        browser.text("say") == "Stopped."
        and browser.js(focus) == "judge"
        and len(server.requests) == 1
    )
    assert browser.all("#strip .tag") == ["A is better"]  # what has come stays
    gate.set()

    server.script = script
    browser.key("Enter")
    browser.until("result")
    reached = walk()
    assert reached[:9] == ["prompt", "a", "b", fold, "judge", "budget", "link", "curl", "json"]
    assert [x.split(":")[0] for x in reached[9:11]] == ["BUTTON 1", "BUTTON 2"]
    assert reached[11:13] == ["displayed-a", "displayed-b"]
    assert [x.split(",")[0] for x in reached[13:]] == [
        "SUMMARY Judgment 1",
        "SUMMARY as written",
        "SUMMARY Judgment 2",
    ]


@needs_chromium
def test_a_reader_without_eyes_is_told(browser, server):
    """Every control has a name, and what happens is announced."""
    server.script = script_of([vote_of(0, "a", "text", judgment(solution="42"))])
    browser.open(server.url)
    browser.click("judge")
    browser.until("result")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    for n in nodes:
        if not n["ignored"] and n["role"]["value"] in ("textbox", "button", "combobox", "region"):
            assert n["name"]["value"], n
    names = {n["name"]["value"] for n in nodes if "name" in n}
    assert {"Question", "Response A", "Response B", "Judge", "Response A, quotes marked"} <= names
    assert browser.all("[aria-live=polite][role=status]", "id") == ["note", "say"]
    assert browser.js("document.documentElement.lang") == "en"


@needs_chromium
def test_errors_are_shown_as_the_servers_sentence(browser, server):
    browser.open(server.url)
    sentence = "The prompt has 300 tokens and the judge takes 256: shorten it."
    error = {
        "error": {"message": sentence, "type": "invalid_request_error", "param": None, "code": 400}
    }
    vote = event(0, vote_of(0, "a", "text", judgment(solution="42")))
    for script, says in (
        ([(400, json.dumps(error).encode())], sentence),
        ([(502, b"<h1>Bad Gateway</h1>")], "The server answered 502 Bad Gateway."),
        ([vote, ("error", error)], sentence),
        ([vote], "The answer broke off before the verdict."),
    ):
        server.script = script
        browser.click("judge")
        browser.until("!control")
        assert browser.text("say") == says
        assert browser.js("votes.length") == (script[0] == vote)  # what has come stays
        assert browser.all("button:disabled", "id") == ["stop", "json"]
    server.shutdown()
    server.server_close()
    browser.click("judge")
    browser.until("!control")
    assert browser.text("say") == "The connection to the server failed or broke off."


@needs_chromium
def test_stop_hangs_up(browser, server):
    """The server sees it, so that the judge can be told."""
    gate = threading.Event()
    vote = vote_of(0, "a", "x" * 10_000, judgment())
    server.script = [event(0, vote), gate, *[event(1, vote)] * 200]
    browser.open(server.url)
    browser.click("judge")
    browser.until("votes.length")
    browser.click("stop")
    browser.until("!control")
    gate.set()
    assert server.gone.wait(20)


@needs_chromium
def test_copies(browser, server):
    """As JSON, as a link and as a command that a shell runs as it stands, whatever the texts."""
    votes = [vote_of(0, "a", "text", judgment(solution="42"))]
    server.script = script_of(votes)
    browser.call(
        "Browser.grantPermissions",
        permissions=["clipboardReadWrite", "clipboardSanitizedWrite"],
        origin=server.url,
    )
    browser.open(server.url)
    texts = {"prompt": "it's $(touch x) `y` \\' \n\u202e🙂", "a": "'; ran", "b": '"$HOME"'}
    browser.fill(**texts)
    browser.click("judge")
    browser.until("result")

    def copied(button, note):
        browser.js("document.getElementById('note').textContent = ''")
        browser.click(button)
        browser.until("document.getElementById('note').textContent")
        assert browser.text("note") == f"{note} is copied."
        return browser.js("navigator.clipboard.readText()")

    assert json.loads(copied("json", "The comparison")) == {**texts, "budget": 8, **done(votes)}
    assert copied("link", "The link") == browser.js("location.href")
    command = copied("curl", "The command")
    assert command.isascii() and command.isprintable()
    if shutil.which("curl"):
        server.script = [(200, b"{}")]
        subprocess.run(["sh", "-c", command], check=True, timeout=30, capture_output=True)
        assert server.requests[-1] == {**texts, "budget": 8}

    # Where a page may not write to the clipboard, the text is selected instead.
    browser.js("navigator.clipboard.writeText = async () => { throw new Error('no') }")
    browser.click("curl")
    browser.until("!document.getElementById('copy').hidden")
    assert (
        browser.js("getSelection().toString() || document.getElementById('copy').value") == command
    )
    assert browser.js("document.activeElement.id") == "copy"


@needs_chromium
def test_long_judgments_stay_light(browser, server):
    """Votes of 8,000 tokens: none takes long, and the page stays where its reader has scrolled."""
    words = " ".join(f"word{i % 97}" + ("\n" if i % 30 == 29 else "") for i in range(8000))
    gate = threading.Event()
    votes = [vote_of(n, "a", words, judgment(eval=words), tokens=8000) for n in range(8)]
    script = script_of(votes)
    server.script = [*script[:2], gate, *script[2:]]
    browser.open(server.url)
    browser.js("""window.slow = []; new PerformanceObserver(list => {
                  for (const e of list.getEntries()) slow.push(e.duration) }).observe({type: "longtask"})""")
    browser.click("judge")
    browser.until("votes.length === 2", 60)
    browser.js("scrollTo(0, 150)")
    gate.set()
    browser.until("result", 120)
    slow = browser.js("slow")
    print(f"tasks over 50 ms: {[round(s) for s in slow]}")
    assert browser.written(0) == words and browser.js("scrollY") == 150
    assert sorted(slow)[-1:] < [500]
