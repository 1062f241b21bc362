"""The gateway, in front of a simulated model: formats, cohorts, who may ask, and how it ends. One test starts it as a
user would, in front of vLLM."""
import asyncio
import base64
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import ThreadingHTTPServer

import httpx
import psutil
import pytest
import torch
import uvicorn

import gateway as G
from askers import Answer
from conftest import ROOT, Replies, environment
from rmr1 import Judge
from test_judge import Model, Slow, noisy, until


@contextlib.contextmanager
def gateway(model=None, **more):
    """A gateway in a thread. -> its URL; .gate is what its routes share"""
    gate = G.Gate(Judge(model or Model(), protocol="instruct"), **more)
    server = uvicorn.Server(uvicorn.Config(G.app_of(gate), port=0, log_level="error", lifespan="off",
                                           timeout_graceful_shutdown=1))
    threading.Thread(target=server.run, daemon=True).start()
    until(lambda: server.started)
    url = Url(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    url.gate, url.loop = gate, server.servers[0].get_loop()
    try:
        yield url
    finally:
        server.should_exit = True
        until(lambda: not server.started or not server.servers[0].is_serving())


class Url(str):
    pass


def post(url, path, body, **more):
    return httpx.post(url + path, json=body, timeout=30, **more)


def sample(n, group=3, **more):
    return {"prompt": "q", "completion": f"is {n}", "group": group} | more


# ---------------------------------------------------------------- formats

def test_compare_rank_and_reward():
    with gateway() as url:
        found = post(url, "/compare", {"prompt": "q", "a": "is 5", "b": "is 3"}).json()
        assert (found["verdict"], found["consistent"], found["usage"]["judgments"]) == ("A", True, 2)
        assert [(v["order"], v["verdict"], v["prefers"]) for v in found["votes"]] == [("AB", "A", "a"), ("BA", "B", "a")]
        assert found["votes"][0]["judgment"]["rubric"] == [{"name": "Size", "weight": 100.0, "text": ""}]
        ranked = post(url, "/rank", {"prompt": [{"role": "user", "content": "q"}],
                                     "responses": ["is 1", "is 3", "is 2"]}).json()
        assert ranked["ranking"] == [1, 2, 0] and ranked["usage"]["judgments"] == len(ranked["comparisons"])
        rewards = post(url, "/reward", {"prompts": ["q"] * 3 + ["p"] * 2 + ["alone"],
                                        "completions": ["is 1", "is 3", "is 2", "is 9", "", "is 4"]}).json()["rewards"]
        assert rewards[:3] == ranked["reward"] and rewards[3:] == [None] * 3
        assert post(url, "/reward", {"prompt": "q", "completion": "is 3", "reference": "is 2"}).json()["reward"] == .75


def test_rerank_as_clients_read_it():
    with gateway() as url:
        body = {"model": "m", "query": "q", "documents": ["is 1", {"text": "is 3"}, "is 2", " "], "top_n": 3}
        for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
            got = post(url, path, body).json()
            assert [r["index"] for r in got["results"]] == [1, 2, 0] and got["model"] == "m"
            scores = [r["relevance_score"] for r in got["results"]]
            assert scores == sorted(scores, reverse=True) and 0 <= scores[-1] <= scores[0] <= 1
            assert got["results"][0]["document"] == {"text": "is 3"} and "1 documents" in got["meta"]["warnings"][0]
        assert "document" not in post(url, "/rerank", body | {"return_documents": False}).json()["results"][0]
        assert post(url, "/rerank", {"query": "q", "documents": ["x"]}).json()["results"][0]["relevance_score"] == .5


def test_openrlhf_as_its_code_asks():
    """One sample a call, in a chat template, with the token that ends it."""
    prompt = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    ask = lambda url, n, **more: post(url, "/get_reward?group=3", {
        "query": [f"{prompt}is {n}<|im_end|>"], "prompts": [prompt], "labels": ["x"]}).json()
    with gateway() as url, ThreadPoolExecutor(3) as pool:
        got = [*pool.map(lambda n: ask(url, n), (1, 2, 3))]
        assert all(set(x) == {"rewards", "scores", "extra_logs"} and x["rewards"] == x["scores"] for x in got)
        rewards = [x["rewards"][0] for x in got]
        assert rewards == sorted(rewards) and got[0]["extra_logs"]["stderr"][0] > 0
        whole = post(url, "/reward", {"prompts": [[{"role": "system", "content": "be brief"},
                                                   {"role": "user", "content": "q"}]] * 3,
                                      "completions": ["is 1", "is 2", "is 3"]}).json()["rewards"]
        assert whole == rewards
        several = post(url, "/get_reward", {"query": ["q is 1", "q is 2"], "prompts": ["q", "q"]}).json()
        assert several["rewards"][0] < several["rewards"][1]
        assert post(url, "/get_reward?group=3", {"query": [], "prompts": [], "labels": []}).json()["rewards"] == []
    with gateway(Model(lambda *_: "?")) as url:
        assert post(url, "/get_reward", {"query": ["q is 1", "q is 2"], "prompts": ["q", "q"]}).json()["rewards"] is None


def test_templates_are_taken_apart_in_linear_time():
    start, end = "<|im_start|>", "<|im_end|>"
    assert G.context_of(f"{start}user\nq{end}\n{start}assistant\nx{end}\n{start}user\nmore{end}\n{start}assistant\n") == [
        {"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "x"), ("user", "more"))]
    assert G.context_of("plain")[0]["content"] == "plain"
    for text, left in ((f"x{end}\n", "x"), (f"x{end} y{end}</s> ", f"x{end} y"), ("x \n", "x \n"), (end, "")):
        assert G.without_end(text) == left
    begin = time.process_time()
    for hostile in ("\n" * 10**6, f"{start}user\n" * 10**5, end * 10**5, f"{end}\n" * 10**5 + "x"):
        G.without_end(f"x{hostile}x")
        with contextlib.suppress(ValueError):
            G.context_of(hostile + "x")
    assert time.process_time() - begin < 10                    # quadratic: hours


def events(url, body):
    with httpx.stream("POST", url + "/compare", json=body | {"stream": True}, timeout=30) as r:
        name = None
        for line in r.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                yield name, json.loads(line[6:])


class Writing(Model):
    """Says what it writes, word by word; the first time it breaks off, and begins again."""
    def submit(self, requests, heard=None):
        futures = [Future() for _ in requests]
        for n, (future, request) in enumerate(zip(futures, requests)):
            answer = self.answer(*request)
            for text in ("<type>Ch", "", *(answer.text[:k] for k in range(0, len(answer.text) + 1, 7)), answer.text):
                if heard:
                    heard(n, text)
            future.set_result(answer)
        return futures


def test_a_comparison_while_it_is_written():
    with gateway(Writing()) as url:
        got = [*events(url, {"prompt": "q", "a": "is 5", "b": "is 3"})]
        texts = {0: "", 1: ""}
        for name, data in got:
            if name == "start":
                texts[data["vote"]] = ""
            elif name == "text":
                texts[data["vote"]] += data["text"]
        ends = {d["vote"]: d for n, d in got if n == "end"}
        assert texts == {k: ends[k]["text"] for k in (0, 1)} and got[-1][0] == "done"
        assert got[-1][1] == post(url, "/compare", {"prompt": "q", "a": "is 5", "b": "is 3"}).json() | {
            "usage": got[-1][1]["usage"]}
        judged = [d["judgment"]["rubric"] for n, d in got if n == "judgment" and d["vote"] == 0]
        assert judged[0] == [] and judged[-1][0]["name"] == "Size"
        assert [n for n, d in got if n == "start" and d["vote"] == 0] == ["start"] * 2
        name, data = [*events(url, {"prompt": "q", "a": "is five", "b": "is 3"})][-1]
        assert name == "error" and "five" in data["error"]["message"]


# ---------------------------------------------------------------- cohorts

async def wait_for(url, *bodies, order=None):
    async with httpx.AsyncClient(timeout=30) as client:
        done = await asyncio.gather(*[client.post(url + "/reward", json=b) for b in bodies])
        return [r.json().get("reward", r.json()) for r in done]


def test_the_same_rewards_in_any_order_of_arrival():
    numbers, seen = [4, 1, 3, 0, 2, 3, 7, 5], set()
    for n in range(4):
        with gateway(Model(noisy)) as url:
            order = random.Random(n).sample(range(8), 8)
            got = asyncio.run(wait_for(url, *(sample(numbers[i], 8) for i in order)))
            seen.add(tuple(r for _, r in sorted(zip(order, got))))
    assert len(seen) == 1
    rewards, = seen
    assert rewards[2] == rewards[5] and rewards[6] > rewards[3]


def test_a_sample_that_never_comes_and_one_alone():
    with gateway(group_timeout=0.3) as url:
        start = time.time()
        got = asyncio.run(wait_for(url, sample(1), sample(2), sample(9, cohort="other")))
        assert got[0] < got[1] and got[2] is None and 0.2 < time.time() - start < 10
        assert "rmr1_waiting_samples 0.0" in httpx.get(url + "/metrics").text


def test_who_leaves_stays_a_member_and_finds_its_reward_again():
    """Three samples, two of whose callers leave before the third comes. By id, and without one by the text."""
    with gateway() as url:
        for more in ({"rollout": "a"}, {}):
            first, second = sample(1, cohort=str(more), **more), sample(2, cohort=str(more))
            for body in (first, second):
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(url + "/reward", json=body, timeout=0.3)
            until(lambda: url.gate.cohorts.waiting == 0)
            with ThreadPoolExecutor(2) as pool:
                again = pool.submit(post, url, "/reward", first)
                until(lambda: url.gate.cohorts.waiting == 1)
                last = post(url, "/reward", sample(3, cohort=str(more))).json()["reward"]
                assert again.result().json()["reward"] < post(url, "/reward", second).json()["reward"] < last


def test_a_retry_that_overtakes_its_callers_leaving():
    """It comes at once, over another connection, without an id: still one sample, so that the group gets whole."""
    async def go(url):
        async with httpx.AsyncClient(timeout=30) as client:
            async def sends(body):
                with contextlib.suppress(httpx.ReadTimeout):
                    await client.post(url + "/reward", json=body, timeout=0.2)
                return await client.post(url + "/reward", json=body)
            async def late(body):
                await asyncio.sleep(0.5)
                return await client.post(url + "/reward", json=body)
            return await asyncio.gather(*[sends(sample(n, 12)) for n in range(10)], *[
                late(sample(n, 12)) for n in (10, 11)])
    with gateway(Model(), group_timeout=20) as url:
        rewards = [r.json()["reward"] for r in asyncio.run(go(url))]
        assert url.gate.cohorts.kept == 12 and rewards == post(url, "/reward", {
            "prompts": ["q"] * 12, "completions": [f"is {n}" for n in range(12)]}).json()["rewards"]


def test_an_id_makes_a_retry_harmless():
    """Two requests with one id are one sample, before and after the judgment; equal texts without one are twins."""
    with gateway() as url:
        same = sample(1, rollout="a")
        got = asyncio.run(wait_for(url, same, same, sample(2, rollout="b"), sample(3, rollout="c")))
        assert got[0] == got[1] < got[2] < got[3] and post(url, "/reward", same).json()["reward"] == got[0]
        twins = asyncio.run(wait_for(url, *[sample(1, cohort="x")] * 2, sample(2, cohort="x")))
        assert twins[0] == twins[1] < twins[2]


def test_the_same_prompt_in_two_groups_at_once():
    with gateway() as url:
        got = asyncio.run(wait_for(url, *[sample(n, cohort=c) for n in (1, 2, 3) for c in "xy"]))
        assert got[0] == got[1] < got[2] == got[3] < got[4] == got[5]


def test_a_failure_reaches_every_sample():
    class Broken(Model):
        def answer(self, *_):
            raise ValueError("no such thing")
    with gateway(Broken()) as url:
        got = asyncio.run(wait_for(url, *(sample(n) for n in (1, 2, 3))))
        assert [x["error"]["message"] for x in got] == ["no such thing"] * 3


class Away(Model):
    """A server that could not be reached, or a prompt without room: no text."""
    why = "no answer from the server: gone"

    def answer(self, *_):
        return Answer("", self.why, failed=True)


@pytest.mark.parametrize("why, status", [(Away.why, 502), ("prompt longer than the window of 9 tokens", 400)])
def test_what_has_no_text_is_an_error_and_not_a_number(why, status, monkeypatch):
    monkeypatch.setattr(Away, "why", why)
    pair, some = {"prompt": "q", "a": "is 1", "b": "is 2"}, ["is 1", "is 2"]
    with gateway(Away()) as url, ThreadPoolExecutor(2) as pool:
        for path, body in (("/compare", pair), ("/rank", {"prompt": "q", "responses": some}),
                           ("/reward", {"prompts": ["q"] * 2, "completions": some}),
                           ("/rerank", {"query": "q", "documents": some})):
            r = post(url, path, body)
            assert r.status_code == status and r.json()["error"]["message"] == why
        assert [r.status_code for r in pool.map(
            lambda n: post(url, "/reward", sample(n, 2)), (1, 2))] == [status] * 2
        assert [*events(url, pair)][-1][1]["error"]["message"] == why


def test_when_it_closes_nobody_is_left_hanging():
    """A group that is not whole is refused at once; what is judged already has its time, and then is refused."""
    with gateway(model := Slow()) as url, ThreadPoolExecutor(3) as pool:
        waits = pool.submit(post, url, "/reward", sample(1))
        judged, late = (pool.submit(post, url, "/compare", {"prompt": p, "a": "is 5", "b": "is 3"}) for p in "qp")
        until(lambda: len(model.waiting) == 4 and url.gate.cohorts and url.gate.cohorts.waiting == 1)
        url.loop.call_soon_threadsafe(url.gate.close, 2)
        assert waits.result().status_code == 503 and "shutting down" in waits.result().text
        assert post(url, "/rank", {"prompt": "q", "responses": ["is 1", "is 2"]}).status_code == 503
        assert httpx.get(url + "/health").status_code == 503
        for future, request in model.waiting[:2]:
            future.set_result(model.answer(*request))
        answers = sorted((judged.result(), late.result()), key=lambda r: r.status_code)
        assert [r.status_code for r in answers] == [200, 503]


# ---------------------------------------------------------------- who may ask, and what

PATHS = ("/", "/metrics", "/openapi.json", "/compare", "/rank", "/reward", "/get_reward", "/rerank", "/v1/rerank",
         "/v2/rerank", "/nowhere")


def test_a_key_guards_everything_but_health():
    basic = lambda key: {"Authorization": "Basic " + base64.b64encode(f"me:{key}".encode()).decode()}
    with gateway(key="secret") as url:
        for path in PATHS:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic !"}, basic("wrong")):
                for method in ("GET", "POST"):
                    r = httpx.request(method, url + path, headers=headers, content=b"{}")
                    assert r.status_code == 401 and r.json()["error"]["code"] == 401, path
        assert httpx.get(url + "/health").status_code == 200
        for headers in ({"Authorization": "Bearer secret"}, basic("secret")):
            assert httpx.get(url, headers=headers).status_code == 200
            assert post(url, "/compare", {"prompt": "q", "a": "is 5", "b": "is 3"}, headers=headers).status_code == 200


def test_a_page_of_another_origin_can_neither_read_nor_post():
    body = {"prompt": "q", "a": "is 5", "b": "is 3"}
    with gateway() as url:
        for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}):
            r = httpx.post(url + "/compare", json=body, headers=headers)
            assert r.status_code == 403 and "access-control-allow-origin" not in r.headers
            assert httpx.get(url + "/metrics", headers=headers).status_code == 403
        simple = httpx.post(url + "/compare", content=json.dumps(body), headers={"Content-Type": "text/plain"})
        assert simple.status_code == 415
        assert httpx.options(url + "/compare", headers={"Origin": "http://evil.example",
                                                        "Access-Control-Request-Method": "POST"}).status_code == 403
        assert httpx.post(url + "/compare", json=body, headers={"Origin": url}).status_code == 200


@pytest.mark.parametrize("path, body, status, complaint", [
    ("/compare", b"", 400, "body: Field required"), ("/compare", b"{", 400, "JSON"), ("/compare", b"[" * 50_000, 400, ""),
    ("/compare", b"\xff", 400, ""), ("/compare", {"prompt": "q", "a": "x"}, 400, "b: Field required"),
    ("/compare", {"prompt": "q", "a": "", "b": "y"}, 400, "a response is empty"),
    ("/compare", {"prompt": [], "a": "x", "b": "y"}, 400, "the context is missing"),
    ("/compare", {"prompt": "q", "a": "is 1", "b": "is 2", "budget": 10**30}, 400, "budget"),
    ("/compare", b'{"prompt": "q", "a": "\\ud800", "b": "is 2"}', 400, ""),
    ("/rank", {"prompt": "q", "responses": ["x"]}, 400, "responses"),
    ("/rank", {"prompt": "q", "responses": ["is 1"] * 100}, 413, "100 responses: 32 of one prompt are compared at most; "
                                                              "these would ask for up to 400 judgments"),
    ("/rerank", {"query": "q", "documents": ["is 1"] * 33}, 413, "132 judgments"),
    ("/reward", {"prompts": ["q"], "completions": []}, 400, "as many of each"),
    ("/reward", {"prompt": "q", "completion": "x"}, 400, "group"),
    ("/reward", {"prompts": ["q"] * 33, "completions": ["is 1"] * 33}, 413, "33 responses"),
    ("/reward", {"prompt": "q", "completion": "x", "group": 33}, 413, "33 responses"),
    ("/get_reward", {"query": ["q x"], "prompts": ["q"]}, 400, "?group=8"),
    ("/get_reward", {"query": ["x"], "prompts": ["q"]}, 400, "each query must be its prompt"),
    ("/get_reward?group=1", {"query": ["q x"], "prompts": ["q"]}, 400, "greater than or equal to 2"),
    ("/get_reward?group=x", {"query": ["q x"], "prompts": ["q"]}, 400, "group"),
    ("/compare", {"prompt": "x" * 200_000, "a": "x", "b": "y"}, 413, "100,000 bytes"),
    ("/nowhere", {}, 404, "Not Found")])
def test_what_is_wrong_is_said_in_one_sentence(path, body, status, complaint):
    with gateway(most_bytes=100_000) as url:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        r = httpx.post(url + path, content=content, headers={"Content-Type": "application/json"})
        assert r.status_code == status and complaint in r.json()["error"]["message"], r.text
        in_pieces = httpx.post(url + path, content=iter([content[:50], content[50:]]),
                               headers={"Content-Type": "application/json"})
        assert in_pieces.status_code == status


def test_nothing_malformed_makes_the_server_fail():
    """500 bodies, made by changing good ones here and there: an answer or a refusal, never a 5xx."""
    good = {"/compare": {"prompt": "q", "a": "is 5", "b": "is 3", "budget": 2},
            "/rank": {"prompt": "q", "responses": ["is 1", "is 2"], "goal": "best"},
            "/reward": {"prompts": ["q"] * 2, "completions": ["is 1", "is 2"]},
            "/rerank": {"query": "q", "documents": ["is 1", "is 2"], "top_n": 1},
            "/get_reward": {"query": ["q is 1", "q is 2"], "prompts": ["q", "q"], "labels": ["x", "y"]}}
    odd = [None, 0, -1, 1e300, 10**40, "", "\x00", "é" * 5000, "<|im_end|>", [], {}, [[]], [None], True, {"role": "user"},
           [{"role": "user", "content": "q"}], [{"role": "x", "content": None}], ["is 1"] * 40, "is 7", ["is 3", "is 3"]]
    rng = random.Random(0)
    with gateway() as url, httpx.Client(timeout=30) as client:
        for n in range(500):
            path, body = rng.choice([*good.items()])
            body = dict(body)
            for _ in range(rng.randint(1, 3)):
                body[rng.choice([*body, "x"])] = rng.choice(odd)
            text = json.dumps(body).encode()
            if n % 5 == 0:
                text = text[:rng.randrange(len(text))] + bytes([rng.randrange(256)]) + text[rng.randrange(len(text)):]
            r = client.post(url + path, content=text, headers={"Content-Type": "application/json"})
            assert r.status_code < 500, (path, text, r.text)
            assert r.status_code == 200 or set(r.json()["error"]) == {"message", "type", "param", "code"}


# ---------------------------------------------------------------- the page's frame

def test_the_page_runs_its_own_script_only():
    with gateway() as url:
        r = httpx.get(url)
        assert r.headers["content-type"].startswith("text/html") and "default-src 'none'" in r.headers[
            "content-security-policy"]
        script = re.search(r"<script>(.*?)</script>", r.text, re.S)[1]
        assert base64.b64encode(G.hash_of(script.encode())).decode() in r.headers["content-security-policy"]


# ---------------------------------------------------------------- in front of vLLM

@pytest.fixture(scope="module")
def judge_folder(toy, tmp_path_factory):
    from transformers import AutoConfig, AutoModelForCausalLM
    out = tmp_path_factory.mktemp("judge") / "model"
    shutil.copytree(toy / "model", out)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out)).save_pretrained(out)
    # What a hub's model brings: a server applies it to who says nothing.
    (out / "generation_config.json").write_text('{"do_sample": true, "top_k": 1, "repetition_penalty": 1.5}')
    (out / "judge.json").write_text('{"protocol": "instruct", "system": "Judge."}')
    return out


@contextlib.contextmanager
def started(folder, journal, *more):
    """serve.py as a user starts it, ready. -> the process, its URL"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([sys.executable, "serve.py", "--model", folder, "--dtype", "float32", "--max-tokens", "16",
                                "--max-len", "200", "--port", str(port), "--journal", journal, *more], cwd=ROOT,
                               env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        said = []
        while "ready" not in (line := process.stderr.readline()):
            said.append(line)
            assert line, said
        threading.Thread(target=process.stderr.read, daemon=True).start()
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(url + "/health").status_code == 200
        yield process, url
    finally:
        process.kill()


def in_group(group):
    """The processes of a group that are no zombies."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_a_server_that_is_killed_costs_nobody_an_answer(judge_folder, tmp_path):
    """vLLM is killed while it answers and comes again: no request fails, and the answers are those of the model in
    this process. SIGTERM refuses who waits for a group, and leaves nothing running; started again, in front of a
    server that answers nothing, the journal has it all."""
    asked = [{"prompt": f"q{n}", "a": f"{n}", "b": f"{n + 1}"} for n in range(24)]
    with started(judge_folder, tmp_path / "journal.jsonl") as (process, url), ThreadPoolExecutor(25) as pool:
        vllm, = psutil.Process(process.pid).children()
        answers = [httpx.post(url + "/compare", json=asked[0], timeout=300)]
        vllm.suspend()
        rest = pool.map(lambda body: httpx.post(url + "/compare", json=body, timeout=300), asked[1:])
        time.sleep(1)
        vllm.kill()
        answers += rest
        assert [r.status_code for r in answers] == [200] * 24
        assert not in_group(vllm.pid), "what a killed server leaves would keep its card"
        again, = psutil.Process(process.pid).children()
        waits = pool.submit(post, url, "/reward", sample(1))
        until(lambda: "rmr1_waiting_samples 1.0" in httpx.get(url + "/metrics").text)
        process.terminate()
        assert waits.result().status_code == 503 and process.wait(30) in (0, -signal.SIGTERM)
        assert not in_group(again.pid)
    here = Judge(str(judge_folder), dtype="float32", max_tokens=16, max_len=200)
    for body, r in zip(asked[:4], answers):
        texts = [v["text"] for v in r.json()["votes"]]
        assert [v.judgment.text for v in here.compare(**body).votes] == texts and len(set(texts)) > 2

    class Lists(Replies):
        def do_GET(self):
            self.reply(200, {"data": [{"id": "judge", "max_model_len": 200}]})
    other = ThreadingHTTPServer(("127.0.0.1", 0), Lists)
    threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
    with started(judge_folder, tmp_path / "journal.jsonl", "--upstream",
                 f"http://127.0.0.1:{other.server_port}/v1") as (process, url):
        for body, r in zip(asked, answers):
            got = post(url, "/compare", body).json()
            assert got | {"usage": 0} == r.json() | {"usage": 0} and got["usage"]["cached"] == got["usage"]["judgments"]
