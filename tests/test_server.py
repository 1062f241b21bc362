"""A judge behind a URL: what a server can say, what becomes of it, and whether it is asked again."""

import email.utils
import gzip
import json
import re
import threading
import time
from http.server import ThreadingHTTPServer

import numpy as np
import pytest
from test_eval import GOOD, Odd, odd, refusal, reply, write  # noqa: F401 (odd is a fixture)

import eval as E
import rmr1
from conftest import ROOT, SHARED, Replies, call
from judge import backends
from judge.backends import (
    Refused,
    ServerBackend,
    answer_from_chat,
    read_answer,
    read_url,
    seconds_of,
    without_user,
)
from judge.journal import Journal

VERDICT = "<type>Chat</type><eval>fine</eval><answer>[[A]]</answer>"
USAGE = {"prompt_tokens": 10, "completion_tokens": 20}


def chat(content, finish="stop", usage=USAGE, **message):
    """The body of a completion."""
    message = {"role": "assistant", "content": content} | message
    return {
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": usage,
    }


def bug(name):
    path = SHARED / "data/bugs" / name
    return json.loads(path.read_text()) if path.exists() else None


def error(message="no", **more):
    return {"error": {"message": message} | more}


THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
THOUGHT = f"<think>\nhm\n</think>\n{VERDICT}"
TEXT = {"type": "text", "text": VERDICT}
CALL = {"tool_calls": [{"type": "function", "function": {"name": "judge", "arguments": "{}"}}]}

# {row of the table in docs/remote.md: (what is said, ...)}; each is (status, body)
# and what becomes of it: (text, beginning of its finish), "again" or "end"
NO_TEXT = ""
TABLE = {
    "a text": (
        (VERDICT, "stop"),
        [
            (200, chat(VERDICT)),
            (201, chat(VERDICT)),
            (206, chat(VERDICT)),
            *((200, chat(VERDICT, end)) for end in ("", "STOP", "eos", "end_turn", "tool_calls")),
            (200, chat(VERDICT, "FinishReason.STOP")),
            (200, chat(VERDICT, {"type": "stop", "matched": 7})),
        ],
    ),
    "a text in parts": (
        (THOUGHT, "stop"),
        [
            (200, chat([THINKING, TEXT])),
            (200, chat([{"type": "thinking", "thinking": "hm"}, TEXT])),
            (200, chat([{"type": "reasoning", "summary": [{"text": "hm"}]}, TEXT])),
            (200, chat([THINKING, {"type": "output_text", "text": VERDICT}])),
            (200, chat([THINKING, VERDICT[:9], {"type": "image_url"}, VERDICT[9:]])),
            (200, chat([TEXT], reasoning="hm")),
        ],
    ),
    "a text with thoughts beside it": (
        (THOUGHT, "stop"),
        [
            (200, chat(VERDICT, reasoning="hm")),
            (200, chat(VERDICT, reasoning_content="hm")),
            (200, chat(VERDICT, reasoning_content="hm", reasoning="hm")),
            (200, chat(VERDICT, thinking="hm", reasoning=None)),
            (200, chat(VERDICT, reasoning_details=[{"type": "reasoning.text", "text": "hm"}])),
        ],
    ),
    "a text with thoughts inside": (
        (THOUGHT, "stop"),
        [(200, chat(THOUGHT)), (200, chat(THOUGHT, reasoning="hm"))],
    ),
    "thoughts alone": (
        (f"<think>\n</think>{VERDICT}", "thoughts alone"),
        [
            (200, chat(None, reasoning=f"</think>{VERDICT}")),
            (200, chat("\n", reasoning_content=f"</think>{VERDICT}")),
        ],
    ),
    "thoughts alone, cut off": (
        ("<think>\nhm", "truncated"),
        [
            (200, chat(None, "length", reasoning="hm")),
            (200, chat("", "length", reasoning_content="hm")),
            (200, chat([THINKING], "length")),
        ],
    ),
    "finish `length`": (
        (VERDICT, "truncated"),
        [
            (200, chat(VERDICT, end))
            for end in (
                *("length", "max_tokens", "MAX_TOKENS", "max_output_tokens", "incomplete"),
                *("FinishReason.LENGTH", "REASON_MAX_LEN", "token_limit", "repetition_truncation"),
            )
        ],
    ),
    "a finish that is not known": (
        (VERDICT, "the text ends in "),
        [(200, chat(VERDICT, end)) for end in ("OTHER", "pause_turn", 7)],
    ),
    "a refusal": (
        (NO_TEXT, "refused by the model: I will not"),
        [
            (200, chat(None, refusal="I will not")),
            (200, chat([{"type": "refusal", "refusal": "I will not"}], usage=None)),
        ],
    ),
    "finish `content_filter`": (
        (VERDICT, "stopped by a content filter"),
        [
            (200, chat(VERDICT, end))
            for end in (
                *("content_filter", "SAFETY", "content_filter: RECITATION", "refusal"),
                *("FinishReason.PROHIBITED_CONTENT", "guardrail_intervened", "ERROR_TOXIC"),
            )
        ],
    ),
    "a tool call instead of a text": (
        (NO_TEXT, "a tool call"),
        [
            (200, chat(None, "tool_calls", **CALL)),
            (200, chat("", "function_call", function_call={"name": "judge"}, usage=None)),
        ],
    ),
    "an empty text that cost tokens": (
        (NO_TEXT, "an empty text"),
        [(200, chat(None)), (200, chat("")), (200, chat([]))],
    ),
    "an empty text that cost none": (
        "again",
        [(200, chat(None, usage=None)), (200, chat("", usage={"completion_tokens": 0}))],
    ),
    "finish `error` or `abort`, or none": (
        "again",
        [
            (200, chat("half of", end))
            for end in (
                *("error", "abort", "insufficient_system_resource", "cancelled", "timeout", None),
                *("USER_CANCEL", "not_finished", "REASON_TIME_LIMIT"),
            )
        ],
    ),
    "no choice, no message": (
        "again",
        [(200, {"choices": []}), (200, {"choices": [{"message": None}]}), (200, [1]), (200, {})],
    ),
    "no JSON: a page, a stream, half a body": (
        "again",
        [
            (200, b"<html>Sign in</html>"),
            (200, b'data: {"choices": [{"delta": {"content": "x"}}]}\n\ndata: [DONE]\n\n'),
            (200, json.dumps(chat(VERDICT)).encode()[:-30]),
        ],
    ),
    "an error inside, or no choices": (
        "again",
        [
            (200, error(code=429)),
            (200, error(code="502")),
            (200, {"choices": [{"error": {"code": 502, "message": "x"}}]}),
            (200, {"error": "loading"}),
            (200, error("slow down", code="rate_limit_exceeded")),
            (200, {"choices": None, "base_resp": {"status_code": 1002, "status_msg": "limit"}}),
        ],
    ),
    "odd counts of tokens": (
        (VERDICT, "stop"),
        [
            (200, chat(VERDICT, usage=usage))
            for usage in (None, [], {"completion_tokens": "x"}, {"completion_tokens": 1e999})
        ],
    ),
    "4xx: the prompt is too long": (
        (NO_TEXT, "refused by the server: "),
        [
            (400, error("maximum context length is 9 tokens")),
            (413, error("Input is too long for the requested model.")),
            (422, error("inputs must have less tokens: the prompt is longer than 9")),
            (400, error("the request exceeds the available context size", type="exceed_context")),
            (200, error(code="context_length_exceeded")),
            (200, {"object": "error", "message": "maximum context length is 9", "code": 40303}),
            (500, error("context shift is disabled")),
            (500, error("unable to process request: the context window is full")),
            (200, error("the request exceeds the available context size", code=500)),
        ],
    ),
    "4xx: a content filter": (
        (NO_TEXT, "refused by the server: "),
        [
            (400, bug("reply-400-content-filter.json") or error(code="content_filter")),
            (400, error("The response was filtered due to Azure's content management policy.")),
            (403, error("requires moderation and your input was flagged")),
            (400, error("Input data may contain inappropriate content.")),
            (200, error(code="content_filter")),
            (200, error("your input was flagged", code=403)),
            (200, {"choices": None, "base_resp": {"status_code": 1026, "status_msg": "sensitive"}}),
            (200, {"choices": [], "prompt_filter_results": [{"content_filter_results": {}}]}),
            (200, {"promptFeedback": {"blockReason": "SAFETY"}}),
            (500, error("filtered due to the prompt triggering a content management policy")),
        ],
    ),
    "4xx: another reason, and a harmless prompt is refused too": (
        "end",
        [(400, error()), (422, error()), (405, b"Method Not Allowed"), (403, error())],
    ),
    "401, 402, 404: key, money, model": (
        "end",
        [
            *((n, error()) for n in (401, 402, 404)),
            (200, error("Incorrect API key provided", code="invalid_api_key")),
            (200, {"code": 20012, "message": "Model does not exist."}),
            (200, {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}),
        ],
    ),
    "429: the quota is spent": (
        "end",
        [(429, error(code="insufficient_quota")), (200, error(code="insufficient_quota"))],
    ),
    "3xx: another address": ("end", [(301, b""), (308, b"")]),
    "408, 409, 425, 429": (
        "again",
        [(n, error("You exceeded your current quota")) for n in (408, 409, 425, 429)],
    ),
    "5xx": (
        "again",
        [
            *((n, b"<html>") for n in (500, 502, 503, 504, 524, 529)),
            (502, b'<meta http-equiv="Content-Security-Policy">flagged'),
        ],
    ),
}
CASES = [(row, becomes, *case) for row, (becomes, cases) in TABLE.items() for case in cases]


def one_answer(url, prompt="q", patience=0.15, **more):
    """What a server's answer to one prompt becomes."""
    backend = ServerBackend(url, "m", 9, patience=patience, **more)
    request = ([{"role": "user", "content": prompt}], 5, 0.0)
    ((_, answer),) = backend.answers([request])
    return answer


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(backends, "FIRST_WAIT", 0.02)


@pytest.mark.parametrize(
    "row, becomes, status, body", CASES, ids=[f"{n}-{case[0]}" for n, case in enumerate(CASES)]
)
def test_what_a_server_says(row, becomes, status, body, odd):  # noqa: F811
    Odd.body = lambda *_: (status, body)
    Odd.headers_out = {"Location": "http://other/v1/chat/completions"} if status < 400 else {}
    if becomes == "end":
        with pytest.raises(Refused):
            one_answer(odd)
        assert len(Odd.asked) <= 2, "the prompt, and a harmless one at most"
        return
    answer = one_answer(odd)
    if becomes == "again":
        assert answer.failed and answer.text == "" and len(Odd.asked) > 1
        assert answer.finish.startswith("no answer from the server: ")
    else:
        text, finish = becomes
        assert not answer.failed and answer.finish.startswith(finish)
        assert answer.text == text or row == "thoughts alone" and VERDICT in answer.text
        assert len(Odd.asked) == (2 if "too long" in row else 1)
    verdict = read_answer(answer).verdict
    assert verdict == ("A" if answer.finish == "stop" else None)


def test_the_table_of_the_docs_is_the_one_that_is_tested():
    text = (ROOT / "docs/remote.md").read_text().split("## What becomes of what it says")[1]
    rows = re.findall(r"(?m)^\| ([^|]+?) \|[^|]*\| ([^|]*?) \|$", text)
    said = {name: then for name, then in rows if then not in ("and then", "")}
    for row, (becomes, _) in TABLE.items():
        then = {"again": "again", "end": "the end"}.get(becomes, "final")
        assert said.pop(row, then) == then, row
    assert set(said) == {  # tests of their own, below
        "4xx: a setting that the server lacks",
        "4xx: another reason, but a harmless prompt is answered",
        "a broken connection",
        "a broken or endless body",
    }


def test_a_harmless_prompt_tells_the_settings_from_the_prompt(odd):  # noqa: F811
    """Asked once for all prompts that are refused, and not at all where another has been answered."""
    Odd.body = lambda _, request: (
        refusal("no") if "bad" in request["messages"][0]["content"] else (200, chat(VERDICT))
    )
    backend = ServerBackend(odd, "m", 9, patience=0)
    requests = [([{"role": "user", "content": f"bad {n}"}], 0, 0.0) for n in range(8)]
    got = [answer for _, answer in backend.answers(requests)]
    assert not any(a.failed for a in got) and len({a.finish for a in got}) == 1
    assert len(Odd.asked) == 9


def test_a_prompt_of_token_ids_that_is_refused_costs_the_others_nothing(odd, monkeypatch):  # noqa: F811
    """It travels with them; each is then asked by itself."""

    def complete(_, request):
        if [13] in request["prompt"]:
            return refusal("token 13 is out of vocabulary")
        choices = [
            {"index": n, "token_ids": ids, "finish_reason": "stop"}
            for n, ids in enumerate(request["prompt"])
        ]
        return 200, {"choices": choices}

    def ids_of(_, messages):
        return np.array([0] if messages == backends.HARMLESS_PROMPT else messages)

    Odd.body = complete
    monkeypatch.setattr(backends, "encode", ids_of)
    monkeypatch.setattr(backends, "decode_sample", lambda _, ids, tokens: str(tokens))
    for numbers in ((1, 13, 2), (13,)):
        backend = ServerBackend(odd, "m", max_tokens=5, patience=0)
        backend.folder, backend.tokenizer, backend.stop = "folder", None, [7]
        backend.vocabulary = 99
        futures = backend.submit([([n], n, 0.0) for n in numbers])
        for n, answer in zip(numbers, [future.result(20) for future in futures]):
            assert not answer.failed and (answer.text == f"[{n}]") is (n != 13)

    Odd.body = lambda *_: (403, error("no such key"))
    with pytest.raises(Refused, match="no such key"):
        backend.answered.clear()
        backend.submit([([1], 1, 0.0)])[0].result(20)


@pytest.mark.parametrize(
    "tokens, end, finish",
    [
        ([5, 6], "stop", "stop"),
        ([5, 6], "length", "truncated"),
        ([5, 6], "content_filter", "stopped by a content filter"),
        ([5, 6], "repetition", "the text ends in "),
        *(([5, 6], end, "no answer") for end in ("abort", "error", "cancelled", None)),
        *((tokens, "stop", "no answer") for tokens in ([], None, [-1], [10], [1.5], ["a"], [True])),
    ],
)
def test_how_token_ids_have_ended(tokens, end, finish, monkeypatch):
    """Beside a good choice: of two prompts that travel together each has its own end."""
    monkeypatch.setattr(backends, "decode_sample", lambda _, ids, tokens: str(tokens))
    good = {"index": 1, "token_ids": [9], "finish_reason": "stop"}
    choice = {"index": 0, "token_ids": tokens, "finish_reason": end}
    answers = backends.answers_from_ids(None, 10, [[1], [2]], {"choices": [good, choice]})
    assert answers[0].finish.startswith(finish) and answers[0].failed is (finish == "no answer")
    assert len(answers) == 1 or answers[1].text == "[9]"
    assert (read_answer(answers[0]).reason == "no answer") is (finish == "stop")


def test_a_request_that_is_kept_alive_for_ever_has_an_end(odd, monkeypatch):  # noqa: F811
    monkeypatch.setattr(backends, "LONGEST_REQUEST", 0.3)

    def blanks(handler, _):
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        for _ in range(40):
            handler.wfile.write(b"\n")
            handler.wfile.flush()
            time.sleep(0.05)

    Odd.body = blanks
    begun = time.monotonic()
    assert one_answer(odd).failed and time.monotonic() - begun < 1.5


def half_a_body(handler, _):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def test_broken_connections_and_bodies_are_asked_again(odd, monkeypatch):  # noqa: F811
    def reset(handler, _):
        handler.close_connection = True

    for body, headers in (
        (reset, {}),
        (half_a_body, {}),
        (lambda *_: (200, b"no gzip"), {"Content-Encoding": "gzip"}),
        (lambda *_: (200, gzip.compress(b"x" * 999)[:-9]), {"Content-Encoding": "gzip"}),
    ):
        Odd.asked.clear()
        Odd.body, Odd.headers_out = body, headers
        answer = one_answer(odd)
        assert answer.failed and answer.text == "" and len(Odd.asked) > 1, answer

    monkeypatch.setattr(backends, "MOST_BYTES", 100)
    Odd.asked.clear()
    Odd.body, Odd.headers_out = lambda *_: (200, chat(VERDICT)), {}
    answer = one_answer(odd)
    assert answer.failed and "more than 100 bytes" in answer.finish and len(Odd.asked) > 1


def test_real_replies():
    cut, parts = bug("reply-cut-while-thinking.json"), bug("reply-content-in-parts.json")
    if not cut:
        pytest.skip("no ../shared/data/bugs")
    answer = answer_from_chat(cut)
    assert (answer.finish, answer.failed, answer.tokens) == ("truncated", False, 20)
    assert read_answer(answer).reason == "truncated" and "Let me compare both" in answer.text
    answer = answer_from_chat(parts)
    assert read_answer(answer).verdict == "A" and "<think>\nhm\n</think>" in answer.text


def test_counts_of_tokens_in_other_writings():
    usage = {"completion_tokens": "20", "prompt_tokens": 10.0}
    answer = answer_from_chat(chat(VERDICT, usage=usage))
    assert (answer.tokens, answer.prompt_tokens) == (20, 10)


def test_tags_within_thoughts_end_them_no_more_than_a_text_does():
    thoughts = f"I close with </think> or [/THINK]. Then {VERDICT.replace('A]', 'B]')}"
    answer = answer_from_chat(chat(VERDICT, reasoning=thoughts))
    assert read_answer(answer).verdict == "A" and answer.text.count("</think>") == 1


def test_half_a_surrogate_pair_can_be_printed():
    assert answer_from_chat(chat("a\ud800b")).text.encode() == b"a?b"


# ---------------------------------------------------------------- settings


def test_settings_that_change_a_text_are_always_sent(odd):  # noqa: F811
    Odd.body = lambda *_: (200, chat(VERDICT))
    one_answer(odd)
    (body,) = Odd.asked
    sent = {name: body[name] for name in ("temperature", "seed", *backends.FULL_SOFTMAX)}
    assert sent == {
        "temperature": 0.0,
        "seed": 0,
        "top_p": 1,
        "top_k": -1,
        "min_p": 0,
        "repetition_penalty": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
    }


@pytest.mark.parametrize(
    "status, sentence, lacking",
    [
        (
            400,
            "Unrecognized request arguments supplied: {}",
            ("top_k", "min_p", "repetition_penalty"),
        ),
        (400, "Unknown parameter: '{}'.", ("top_k", "min_p", "repetition_penalty")),
        (400, "Unsupported parameter: '{}' is not supported with this model.", ("top_p", "seed")),
        (422, '{{"type": "extra_forbidden", "loc": ["body", "{}"]}}', ("seed", "top_k")),
        (400, "Argument not supported on this model: {}", ("presencePenalty",)),
        (400, "property '{}' is unsupported", ("min_p",)),
    ],
)
def test_a_setting_that_a_server_lacks_is_left_out(status, sentence, lacking, odd, capfd):  # noqa: F811
    """Found out once for each server, and said once; the others are sent on."""

    def answer(_, request):
        given = {name.replace("_", "").lower(): name for name in request}
        for name in lacking:
            if name.replace("_", "").lower() in given:
                return status, error(sentence.format(name))
        return 200, chat(VERDICT)

    Odd.body = answer
    backend = ServerBackend(odd, "m", 9, patience=0, at_once=1)
    requests = [([{"role": "user", "content": f"q{n}"}], n, 0.5) for n in range(5)]
    assert all(a.text == VERDICT for _, a in backend.answers(requests))
    assert len(Odd.asked) == 5 + len(lacking)
    assert len(Odd.asked[-1]) == len(Odd.asked[0]) - len(lacking)
    said = capfd.readouterr().err
    assert said.count("does not take") == len(lacking)


def test_a_temperature_is_never_left_out(odd):  # noqa: F811
    Odd.body = lambda *_: refusal("Unsupported value: 'temperature' does not support 0")
    with pytest.raises(Refused, match="'temperature' does not support 0.*--temperature 1"):
        one_answer(odd)
    assert all(body["temperature"] == 0 for body in Odd.asked)


def test_a_prompt_that_speaks_of_a_setting_changes_no_other_request(odd):  # noqa: F811
    """A server repeats the prompt in its refusal. The setting is in the next request all the same."""
    Odd.body = lambda _, request: (
        refusal(text) if "seed" in (text := request["messages"][0]["content"]) else (200, chat("x"))
    )
    backend = ServerBackend(odd, "m", 9, patience=0, at_once=1)
    requests = [([{"role": "user", "content": text}], 0, 0.0) for text in ("a seed", "q")]
    (_, refused), (_, fine) = backend.answers(requests)
    assert not refused.failed and fine.text == "x" and "seed" in Odd.asked[-1]


# ---------------------------------------------------------------- Retry-After


def test_seconds_of_retry_after():
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    past = email.utils.formatdate(time.time() - 30, usegmt=True)
    assert 25 < seconds_of(soon) <= 30 and seconds_of(past) < 0
    assert [seconds_of(x) for x in ("0", "1.5", "86400")] == [0, 1.5, 86400]
    assert [seconds_of(x) for x in ("", "soon", "nan", "inf", "\u00b2", "1e999")] == [0] * 6


@pytest.mark.parametrize("said, least", [("0.3", 0.3), ("86400", 0)])
def test_the_servers_wait_is_kept_in_full(said, least, odd, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Odd, "retry_after", said)
    times = []
    Odd.body = lambda *_: times.append(time.monotonic()) or (429, error())
    assert one_answer(odd, patience=1).failed
    waits = [b - a for a, b in zip(times, times[1:])]
    assert all(wait >= least for wait in waits) and len(times) == (1 if least == 0 else 4)


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "given, url, query",
    [
        ("http://h/v1/", "http://h/v1", ""),
        (" http://h/v1\n", "http://h/v1", ""),
        ("'http://h/v1'", "http://h/v1", ""),
        ("http://h/v1/chat/completions", "http://h/v1", ""),
        ("http://h/v1/chat/completions/", "http://h/v1", ""),
        ("http://h/v1/models", "http://h/v1", ""),
        ("HTTPS://h/v1", "HTTPS://h/v1", ""),
        ("http://me:pw@h:80/v1?api-version=1&key=k#x", "http://h:80/v1", "?api-version=1&key=k"),
    ],
)
def test_addresses(given, url, query):
    assert read_url(given) == (url, query)


@pytest.mark.parametrize(
    "given", ["h:8000/v1", "me:p4ss@h/v1", "", "ftp://me:p4ss@h/v1", "http:/h"]
)
def test_what_is_no_address_is_a_sentence(given):
    with pytest.raises(Refused, match="begins with http") as found:
        read_url(given, "--upstream")
    assert str(found.value).startswith("--upstream ")
    assert "p4ss" not in str(found.value) and "p4ss" not in without_user(given)


class Lists(Replies):
    """A server that has its routes under /v1, wants a query, and repeats it."""

    def do_GET(self):
        if self.path.startswith("/v1/models?key=s3cr3t-key"):
            return self.reply(200, {"data": [{"id": "m", "max_model_len": "9"}, None]})
        self.reply(404, error(f"no {self.path}"))

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        good = self.path == "/v1/chat/completions?key=s3cr3t-key"
        self.reply(200 if good else 404, chat(VERDICT) if good else error(f"no {self.path}"))


@pytest.fixture
def lists():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Lists)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_query_and_a_host_alone(lists):
    for path in ("/v1", "/v1/", "/v1/chat/completions"):
        assert one_answer(lists + path + "?key=s3cr3t-key").text == VERDICT
    backend = ServerBackend(lists + "/v1?key=s3cr3t-key", None, 9)
    assert (backend.model, backend.window) == ("m", None)
    for model in ("m", None):  # with a name the first request finds out, without one the start
        with pytest.raises(Refused, match="ends in /v1") as found:
            backend = ServerBackend(lists + "?key=s3cr3t-key", model, 9)
            next(backend.answers([([{"role": "user", "content": "q"}], 0, 0.0)]))
        assert "s3cr3t" not in str(found.value)


def test_a_server_at_another_address_is_named(odd):  # noqa: F811
    Odd.body, Odd.headers_out = lambda *_: (308, b""), {"Location": "https://me:p4ss@new/v1/x"}
    with pytest.raises(Refused, match="leads to another address \\(https://new/v1/x\\)"):
        one_answer(odd)


# ---------------------------------------------------------------- evaluations and journals


def evaluation(odd, data, out, **more):  # noqa: F811
    common = ("--base-url", odd, "--model", "m", "--protocol", "instruct")
    return call(E, *common, "--data", data, "--out", out, **more)


def test_an_evaluation_ends_though_every_pair_has_its_trouble(odd, tmp_path):  # noqa: F811
    """What would be refused again is wrong, listed, and not asked for again."""
    said = {
        "0": (200, chat(VERDICT)),
        "1": (200, bug("reply-cut-while-thinking.json") or chat(None, "length", reasoning="hm")),
        "2": (400, bug("reply-400-content-filter.json") or error(code="content_filter")),
        "3": (200, chat(None, refusal="I will not")),
        "4": (200, chat(VERDICT, "content_filter")),
        "5": (400, error("messages: an odd one")),
    }
    Odd.body = lambda _, request: said.get(
        re.findall(r"question (\d)", str(request["messages"]))[0]
        if "question" in str(request["messages"])
        else "0"
    )
    rows = [(f"question {n}", *GOOD, "A") for n in said]
    data = write(tmp_path / "e.jsonl", *rows)
    out = tmp_path / "run"
    done = evaluation(odd, data, out)
    numbers = E.measure(E.read_run(out))["e"]
    assert numbers["accuracy"]["greedy"] <= 1 / 6 + 1e-9 and numbers["judgments"] == 6
    assert "4 pairs could not be judged, and count as wrong" in done.stdout
    assert "refused by the model: I will not" in done.stdout
    Odd.asked.clear()
    again = evaluation(odd, data, out)
    assert not Odd.asked and again.stdout == done.stdout


def test_a_folder_without_any_answer_is_free_for_other_settings(odd, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(backends, "FIRST_WAIT", 1e9)
    data = write(tmp_path / "e.jsonl", ("q", *GOOD, "A"))
    Odd.body = lambda *_: (500, error("later"))
    done = evaluation(odd, data, tmp_path / "run", ok=False)
    assert done.returncode == 2 and "1 of 1 judgments" in done.stderr and "later" in done.stdout
    Odd.body = lambda *_: (200, chat(VERDICT))
    common = ("--base-url", odd, "--model", "other", "--protocol", "instruct")
    call(E, *common, "--data", data, "--out", tmp_path / "run")
    (line,) = E.read_run(tmp_path / "run")["judgments"]
    assert line["verdict"] == "A" and "failed" not in line


def test_a_journal_keeps_what_is_final(odd, tmp_path):  # noqa: F811
    """A refusal is kept and not paid for twice; what may pass is not kept."""
    path = tmp_path / "j.jsonl"
    for said, kept in (
        ((500, error()), 0),
        ((200, chat(None, usage=None)), 0),
        ((400, error(code="content_filter")), 2),
    ):
        Odd.body = lambda *_, said=said: said
        judge = rmr1.Judge("m", "instruct", base_url=odd, journal=path, patience=0)
        found = judge.compare("q", "a", "b", budget=2)
        assert found.verdict is None and len(path.read_text().splitlines()) == kept
        judge.journal.file.close()
    Odd.asked.clear()
    judge = rmr1.Judge("m", "instruct", base_url=odd, journal=path, patience=0)
    assert "content_filter" in judge.compare("q", "a", "b", budget=2).votes[0].judgment.reason
    assert not Odd.asked


def test_a_failure_that_a_journal_holds_is_asked_for_again(tmp_path):
    line = {"text": "", "tokens": 0, "prompt_tokens": 0}
    lines = [
        line | {"request": "1", "finish": "no answer from the server: 500"},
        line | {"request": "2", "finish": "refused by the model: no"},
        line | {"request": "3", "finish": backends.no_room(12, 10).finish},
        line | {"request": "4", "finish": backends.no_room(10, 10).finish},
        line | {"request": "5", "finish": "refused by the server: 400: maximum context length"},
        line | {"request": "6", "finish": "refused by the server: 400: content_filter"},
    ]
    (tmp_path / "j.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    journal = Journal(tmp_path / "j.jsonl")
    assert not journal.find("2").failed and set(journal.answers) == {"2", "6"}


def test_answers_are_read_in_one_piece(odd):  # noqa: F811
    """Nothing is streamed from a server, so no request asks for it."""
    Odd.body = lambda *_: (200, reply("x"))
    one_answer(odd)
    assert "stream" not in Odd.asked[0]
