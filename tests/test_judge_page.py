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
from conftest import ROOT, Replies
from test_page import CHROMIUM

PAGE = (ROOT / "assets" / "judge.html").read_text()
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def policy(page):
    """The header that the server sends with the page: its own blocks by their hashes, and nothing else."""
    def digest(tag):
        block = re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        return base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
    return (f"default-src 'none'; connect-src 'self'; script-src 'sha256-{digest('script')}'; "
            f"style-src 'sha256-{digest('style')}'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'")


# ---------------------------------------------------------------- the server

class Stub(Replies):
    """Serves the page, and plays server.script as the answer to each comparison: (event, data) is sent, a
    threading.Event waited for, an (int, bytes) is a status with a body instead of a stream."""

    def do_GET(self):
        self.server.seen.append(self.path)
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Security-Policy", policy(PAGE))
        self.end_headers()
        self.wfile.write(PAGE.encode())

    def do_POST(self):
        self.server.seen.append(self.path)
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if isinstance(self.server.script[0][0], int):
            status, body = self.server.script[0]
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
    stub.seen, stub.asked, stub.script, stub.gone = [], [], [], threading.Event()
    stub.url = f"http://127.0.0.1:{stub.server_port}/"
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    yield stub
    stub.shutdown()
    stub.server_close()


# ---------------------------------------------------------------- what it plays

def judgment(quotes=(), **parts):
    return {"type": "", "rubric": [], "justify": "", "solution": "", "eval": "", "quotes": [*quotes], **parts}


def quote(of, text, found=True):
    return {"of": of, "text": text, "found": found}


def item(name, weight, text):
    return {"name": name, "weight": weight, "text": text}


def start(vote):
    return "start", {"vote": vote, "order": ("AB", "BA")[vote % 2]}


def text(vote, part):
    return "text", {"vote": vote, "text": part}


def end(vote, prefers, written, found, reason="", tokens=40):
    order = ("AB", "BA")[vote % 2]
    verdict = prefers and ("A" if prefers == order[0].lower() else "B")
    return {"vote": vote, "order": order, "verdict": verdict, "prefers": prefers, "reason": reason,
            "tokens": tokens, "text": written, "judgment": found}


def done(ends, verdict="A", consistent=True, reason="", win=.75, low=.368, high=.983):
    usage = {"judgments": len(ends), "cached": 0, "prompt_tokens": 100,
             "completion_tokens": sum(e["tokens"] for e in ends)}
    return {"verdict": verdict, "reason": reason, "win": win, "low": low, "high": high,
            "consistent": consistent, "share": 1.0, "votes": ends, "usage": usage}


def whole(ends, **more):
    """A script that says all that there is to say at once."""
    script = []
    for e in ends:
        script += [start(e["vote"]), text(e["vote"], e["text"]), ("end", e)]
    return [*script, ("done", done(ends, **more))]


# ---------------------------------------------------------------- the browser

class Browser:
    """A page of headless Chromium, over its DevTools protocol."""

    def __init__(self, socket):
        self.socket, self.count = socket, 0
        self.call("Page.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)      # else no clipboard
        # Hostile text would call ran(); what the policy stops would be told of, too.
        self.call("Page.addScriptToEvaluateOnNewDocument", source="""
            window.bad = []; window.ran = () => bad.push("ran"); window.alert = window.ran;
            addEventListener("securitypolicyviolation", e => bad.push(e.violatedDirective))""")

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
        answer = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True,
                           userGesture=True)
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
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code,
                      modifiers=2 * ctrl + 8 * shift, **(text if kind == "keyDown" else {}))

    def text(self, element):
        return self.js(f"document.getElementById('{element}').textContent")

    def all(self, selector, what="textContent"):
        return self.js(f"[...document.querySelectorAll({selector!r})].map(e => e.{what})")

    def fill(self, **fields):
        for name, value in fields.items():
            self.js(f"document.getElementById('{name}').value = {json.dumps(value)}")

    def written(self, vote):
        """A judgment as written, its lines put together again."""
        return self.js(f"[...votes[{vote}].text.children].map(line => line.textContent).join('\\n')")

    def click(self, element):
        self.js(f"document.getElementById('{element}').click()")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    from websockets.sync.client import connect
    profile = tmp_path_factory.mktemp("profile")
    process = subprocess.Popen(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--no-first-run", f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port, started = profile / "DevToolsActivePort", time.monotonic()
        while not (port.exists() and port.read_text().strip()):
            assert process.poll() is None and time.monotonic() < started + 120
            time.sleep(.1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json/list") as r:
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
    assert not re.search(r"innerHTML|outerHTML|insertAdj|document\.write|eval\(|Function\(|https?:", script)


FIRST = "<type>Chat</type>\n<rubric>Count 90%: 2 fruits\nTone 10%: kind\n"
REST = "<justify>The client asks for 2</justify></rubric>\n"
EVAL = "<quote_A> plum  pear</quote_A> 2 is A and <quote_B>fig fig fig</quote_B> 3 is B so 2 is A"
MIRROR = "<quote_A>lime melon fig</quote_A> 3 is A and <quote_B>plum</quote_B> 1 is B so 2 is B"
HALF = judgment(type="Chat", rubric=[item("Count", 90.0, "2 fruits"), item("Tone", 10.0, "kind")],
                justify="The client asks for 2")
FULL = HALF | {"eval": EVAL, "quotes": [quote("a", " plum  pear", False), quote("b", "fig fig fig", False)]}
SWAPPED = judgment([quote("b", "lime melon fig"), quote("a", "plum")], type="Chat", eval=MIRROR)


@needs_chromium
def test_a_judgment_appears_while_it_is_written(browser, server):
    gates = [threading.Event() for _ in range(3)]
    written = f"{FIRST}{REST}<eval>{EVAL}</eval>\n<answer>[[A]]</answer>"
    ends = [end(0, "a", written, FULL),
            end(1, "a", f"<eval>{MIRROR}</eval>\n<answer>[[B]]</answer>", SWAPPED),
            end(2, None, "hm", judgment(), reason="no answer")]
    server.script = [
        start(0), start(1), text(0, FIRST[:30]), text(1, "<eval>"), gates[0],
        text(0, FIRST[30:] + REST), ("judgment", {"vote": 0, "judgment": HALF}), gates[1],
        text(0, written[len(FIRST + REST):]), ("judgment", {"vote": 0, "judgment": FULL}),
        ("end", ends[0]), ("end", ends[1]), start(2), gates[2], ("end", ends[2]), ("done", done(ends))]
    asked = {"prompt": "Name 2 fruits .", "a": "Here: plum pear", "b": "Here: lime melon fig"}
    browser.open(server.url)
    browser.fill(**asked)
    assert server.asked == []
    browser.click("judge")

    browser.until("votes.length === 2 && votes.every(v => v.text.textContent)")
    assert [browser.written(0), browser.written(1)] == [FIRST[:30], "<eval>"]
    assert browser.all(".bar") == []
    assert browser.text("say") == "Judging: 0 of 2 votes are in."
    gates[0].set()
    browser.until("document.querySelectorAll('.bar').length === 2")
    assert browser.all(".bar i", "style.width") == ["90%", "10%"]
    assert browser.text("shown-a") == "Here: plum pear" and browser.all("mark") == []
    gates[1].set()
    browser.until("votes.length === 3 && votes[1].ended")
    assert browser.text("say") == "Judging: 2 of 3 votes are in."
    gates[2].set()
    browser.until("result")

    assert browser.text("say") == ("A is better: 2 of 2 votes, both orders agree, 1 without a verdict; "
                                   "0.75 of votes to come (0.37 to 0.98).")
    assert browser.text("badge") == "both orders agree"
    assert browser.all("#strip .tag") == ["A is better", "A is better", "no verdict: no answer"]

    # A's quote, of other whitespace, is marked, with the one inside of it; B's, which is not there, is
    # flagged. In the other order the judge's A is our B.
    assert browser.all("#shown-a mark") == ["plum pear"]
    assert browser.all("#shown-b mark") == ["lime melon fig"]
    assert browser.text("absent-a") == "" and browser.text("absent-b") == "fig fig fig not in the response"
    assert browser.all("#votes > :nth-child(1) mark") == [" plum  pear", "fig fig fig"]
    assert browser.all("#votes > :nth-child(1) mark.absent") == ["fig fig fig"]
    assert browser.all("#votes > :nth-child(2) mark:not(.absent)") == ["lime melon fig", "plum"]

    # The text is there on demand, word for word; the third vote can be opened from the strip.
    assert browser.js("votes.map(v => v.card.open)") == [True, True, False]
    assert browser.js("votes.map(v => v.raw.open)") == [False, False, True]
    assert browser.written(0) == written
    browser.js("document.querySelectorAll('#strip button')[2].click()")
    assert browser.js("votes[2].card.open && votes[2].text.innerText") == "hm"
    assert server.asked == [{**asked, "budget": 8, "stream": True}]
    assert browser.js("bad") == []


@needs_chromium
def test_votes_come_as_they_come(browser, server):
    """Out of order, begun again after a lost connection, or from the journal, which streams nothing."""
    ends = [end(v, "a", f"<solution>{v}</solution>", judgment(solution=str(v))) for v in range(4)]
    server.script = [start(1), text(1, "lost"), start(1), text(1, "<solution>1"), start(0),
                     text(0, "<solution>0"), ("end", ends[1]), ("end", ends[0]), ("end", ends[3]), start(2), ("end", ends[2]),
                     ("done", done(ends))]
    browser.open(server.url)
    browser.click("judge")
    browser.until("result")
    assert [x[:2] for x in browser.all("#strip button")] == ["1:", "2:", "3:", "4:"]
    assert [x[:11] for x in browser.all("#votes b")] == [f"Judgment {n}," for n in (1, 2, 3, 4)]
    assert browser.written(0) == "<solution>0" and browser.written(1) == "<solution>1"
    assert browser.written(3) == "<solution>3</solution>"
    assert browser.text("say").startswith("A is better: 4 of 4 votes")


@needs_chromium
@pytest.mark.parametrize("found, sentence", [
    (dict(verdict="B", win=.25, low=.017, high=.632),
     "B is better: 0 of 1 votes, both orders agree; 0.75 of votes to come (0.37 to 0.98)."),
    (dict(verdict="tie", consistent=False, win=.5, low=.2, high=.8, reason="as many votes for each"),
     "Neither is better: as many votes for each, the orders disagree; "
     "0.50 of votes to come for A (0.20 to 0.80)."),
    (dict(verdict=None, consistent=None, reason="cut off"), "No verdict: cut off.")])
def test_the_verdict_in_words(browser, server, found, sentence):
    server.script = whole([end(0, "a", "text", judgment(solution="42"))], **found)
    browser.open(server.url)
    browser.click("judge")
    browser.until("result")
    assert browser.text("say") == sentence


HOSTILE = [
    "<script>ran()</script>", "</script><script>ran()</script>", "</textarea><img src=x onerror=ran()>",
    "<svg onload=ran()>", '"><a href="javascript:ran()">x</a>', "javascript:ran()", "${ran()}", "&lt;b&gt;",
    "' onfocus=ran() autofocus '", "<style>*{display:none}</style>", "\u202egnp.exe\u2066", "__proto__",
    "</pre></details>", "<iframe srcdoc='<script>parent.ran()</script>'>",
    "<quote_A><img src=x onerror=ran()></quote_A>"]


@needs_chromium
def test_hostile_text_stays_text(browser, server):
    """In every field at once: what is asked, what is written, every part of a judgment, reasons, an error."""
    bad = "\n".join(HOSTILE)
    parts = judgment([quote("a", HOSTILE[2]), quote("b", bad + "!", False)], type=bad,
                     rubric=[item(bad, weight, bad) for weight in (1e9, -5, None)], justify=bad, solution=bad,
                     eval=f"{bad}<quote_B>{bad}!</quote_B>")
    ends = [end(0, "a", bad, parts), end(1, None, bad, parts, reason=bad)]
    server.script = [*whole(ends)[:-1], ("__proto__", {}), ("constructor", {}),
                     ("done", done(ends, verdict=None, reason=bad))]
    browser.open(server.url)
    browser.fill(prompt=bad, a=bad, b=bad + "x" * 100_000)
    for button in ("link", "curl", "judge"):
        browser.click(button)
    browser.until("result")
    assert browser.text("say") == f"No verdict: {bad}."
    assert server.asked[0]["b"] == bad + "x" * 100_000 == browser.text("shown-b")
    assert browser.all("#shown-a mark") == [HOSTILE[2]]
    assert browser.text("absent-b") == bad + "! not in the response"
    assert browser.written(0) == bad
    assert browser.all(".bar i", "style.width")[:2] == ["100%", "0%"]
    assert browser.js("votes[0].sections[1].textContent").startswith("solution<script>ran()</script>\n")
    server.script = [("error", {"error": {"message": bad, "type": "x", "param": None, "code": 400}})]
    browser.click("judge")
    browser.until("!control")
    assert browser.text("say") == bad
    kinds = "document.querySelectorAll('body script, img, svg, iframe, a, style').length"
    assert browser.js(kinds) == 2                             # the page's own script and style
    assert browser.js("bad") == [] and browser.js("document.title") == "Which response is better?"


@needs_chromium
def test_a_link_restores_the_texts_and_judges_nothing(browser, server):
    texts = {"prompt": "Was ist größer?\n\t\u202e", "a": "".join(map(chr, range(1, 0x3000))),
             "b": "é🙂" * 50_000}
    read = "JSON.stringify(content())"
    browser.open(server.url)
    browser.fill(**texts)
    sent = json.loads(browser.js(read))                       # a text field makes \n of \r
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
    for broken in (link[:-20], server.url + "#nothing", server.url + "#%00", pack("[1]"), pack("null"),
                   pack("{prompt: 1}"), pack(bomb)):
        browser.open(broken)
        browser.until("document.getElementById('note').textContent")
        assert browser.text("note").startswith("This link cannot be read"), broken[:80]
        assert json.loads(browser.js(read))["a"] == "Here: 42"
    time.sleep(.3)
    assert server.asked == [] and set(server.seen) <= {"/"} and browser.js("bad") == []


@needs_chromium
def test_the_keyboard_is_enough(browser, server):
    gate = threading.Event()
    ends = [end(0, "a", "<solution> 6 * 7 = 42</solution>", judgment(solution=" 6 * 7 = 42")),
            end(1, "a", "<solution> 6 * 7 = 42</solution>", judgment(solution=" 6 * 7 = 42"))]
    script = whole(ends)
    server.script = [*script[:2], gate]
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

    assert walk() == ["prompt", "a", "b", "judge", "budget", "link", "curl"]
    browser.js("document.getElementById('prompt').focus()")
    browser.call("Input.insertText", text="And ")
    browser.key("Enter", ctrl=True)
    browser.until("votes[0]?.text.textContent")
    assert "And " in server.asked[0]["prompt"] and "\n" not in server.asked[0]["prompt"]
    browser.key("Enter", ctrl=True)                           # once more while it judges: nothing
    for _ in range(4):
        browser.key("Tab")
    assert browser.js(focus) == "stop"
    assert browser.js("getComputedStyle(document.activeElement).outlineWidth") == "3px"
    browser.key("Enter")
    browser.until("!control")
    assert browser.text("say") == "Stopped." and browser.js(focus) == "judge" and len(server.asked) == 1
    assert browser.js("votes[0].tag.textContent") == "broken off"
    gate.set()

    server.script = script
    browser.key("Enter")
    browser.until("result")
    reached = walk()
    assert reached[:8] == ["prompt", "a", "b", "judge", "budget", "link", "curl", "json"]
    assert [x.split(":")[0] for x in reached[8:10]] == ["BUTTON 1", "BUTTON 2"]
    assert reached[10:12] == ["shown-a", "shown-b"]
    assert [x.split(",")[0] for x in reached[12:]] == ["SUMMARY Judgment 1", "SUMMARY as written",
                                                       "SUMMARY Judgment 2"]


@needs_chromium
def test_a_reader_without_eyes_is_told(browser, server):
    """Every control has a name, and what happens is announced."""
    server.script = whole([end(0, "a", "text", judgment(solution="42"))])
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
    told = {"error": {"message": sentence, "type": "invalid_request_error", "param": None, "code": 400}}
    for script, says in (
            ([(400, json.dumps(told).encode())], sentence),
            ([(502, b"<h1>Bad Gateway</h1>")], "The server answered 502 Bad Gateway."),
            ([start(0), ("error", told)], sentence),
            ([start(0), text(0, "<ty")], "The answer broke off before the verdict.")):
        server.script = script
        browser.click("judge")
        browser.until("!control")
        assert browser.text("say") == says
        assert browser.js("votes.map(v => v.tag.textContent)") == ["broken off"] * (script[0] == start(0))
        assert browser.all("button:disabled", "id") == ["stop", "json"]
    assert browser.written(0) == "<ty"     # what had come stays
    server.shutdown()
    server.server_close()
    browser.click("judge")
    browser.until("!control")
    assert browser.text("say") == "The connection to the server failed or broke off."


@needs_chromium
def test_stop_hangs_up(browser, server):
    """The server sees it, so that the judge can be told."""
    gate = threading.Event()
    server.script = [start(0), gate, *[text(0, "x" * 10_000)] * 200]
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
    ends = [end(0, "a", "text", judgment(solution="42"))]
    server.script = whole(ends)
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"],
                 origin=server.url)
    browser.open(server.url)
    texts = {"prompt": "it's $(touch x) `y` \\' \n\u202e🙂", "a": "'; ran", "b": "\"$HOME\""}
    browser.fill(**texts)
    browser.click("judge")
    browser.until("result")

    def copied(button, note):
        browser.js("document.getElementById('note').textContent = ''")
        browser.click(button)
        browser.until("document.getElementById('note').textContent")
        assert browser.text("note") == f"{note} is copied."
        return browser.js("navigator.clipboard.readText()")

    assert json.loads(copied("json", "The comparison")) == {**texts, "budget": 8, **done(ends)}
    assert copied("link", "The link") == browser.js("location.href")
    command = copied("curl", "The command")
    assert command.isascii() and command.isprintable()
    if shutil.which("curl"):
        server.script = [(200, b"{}")]
        subprocess.run(["sh", "-c", command], check=True, timeout=30, capture_output=True)
        assert server.asked[-1] == {**texts, "budget": 8}

    # Where a page may not write to the clipboard, the text is selected instead.
    browser.js("navigator.clipboard.writeText = async () => { throw new Error('no') }")
    browser.click("curl")
    browser.until("!document.getElementById('copy').hidden")
    assert browser.js("getSelection().toString() || document.getElementById('copy').value") == command
    assert browser.js("document.activeElement.id") == "copy"


@needs_chromium
def test_long_judgments_stay_light(browser, server):
    """Two of 8,000 tokens side by side, an event a token: nothing takes long, and nothing scrolls away from a
    reader; who stays at the end is kept there."""
    words = " ".join(f"word{i % 97}" + ("\n" if i % 30 == 29 else "") for i in range(8000))
    tokens = re.findall(r"\s?\S+\n?", words)
    gates = [threading.Event(), threading.Event()]
    half = len(tokens) // 2
    texts = [text(v, t) for t in tokens for v in (0, 1)]
    ends = [end(v, "a", words, judgment(solution="42"), tokens=8000) for v in (0, 1)]
    server.script = [start(0), start(1), *texts[:half], gates[0], *texts[half:], gates[1],
                     *(("end", e) for e in ends), ("done", done(ends))]
    browser.open(server.url)
    browser.js("""window.slow = []; new PerformanceObserver(list => {
                  for (const e of list.getEntries()) slow.push(e.duration) }).observe({type: "longtask"})""")
    browser.click("judge")
    length = lambda v, n: f"votes[{v}]?.text.textContent.length >= {n}"
    browser.until(length(1, len("".join(tokens[:half // 2])) - 200), 60)
    assert browser.js("atEnd(votes[1].text) && votes[1].text.scrollTop > 500")
    browser.js("votes[0].text.scrollTop = 100; scrollTo(0, 150)")
    began = time.monotonic()
    gates[0].set()
    browser.until(length(1, len(words.replace("\n", "")) - 10), 120)
    took = time.monotonic() - began
    assert browser.js("[votes[0].text.scrollTop, scrollY]") == [100, 150]
    assert browser.js("atEnd(votes[1].text)")
    gates[1].set()
    browser.until("result")
    slow = browser.js("slow")
    print(f"12,000 events in {took:.1f} s; tasks over 50 ms: {[round(s) for s in slow]}")
    assert browser.written(0) == words
    assert browser.js("votes.map(v => v.raw.open)") == [True, False]      # the one being read stays open
    assert browser.js("[votes[0].text.scrollTop, scrollY]") == [100, 150]
    assert sorted(slow)[-1:] < [500]
    cost = browser.js("""[...Array(41).keys()].map(() => {
        const start = performance.now();
        for (const v of votes) { v.raw.open = true; v.pending = "word "; flush(v) }
        document.body.offsetHeight;
        return performance.now() - start }).sort((x, y) => x - y)[20]""")
    print(f"a token more in both columns: {cost:.2f} ms")
    assert cost < 25
