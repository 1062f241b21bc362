"""Evaluation: what counts, what is written, what survives, who may judge."""
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import ThreadingHTTPServer

import pytest
from conftest import ROOT, SHARED, Replies, call, environment, run

import benchmarks as B
import eval as E

RB = [{"id": i, "subset": s, "prompt": f"q {s} {i}", "chosen": "the good one", "rejected": f"a bad one {i}"}
      for s in ("hep-go", "hep-js") for i in range(6)]


def line(id, order, swap, verdict, label, vote=0, t=0.0, **more):
    return {"id": id, "order": order, "swap": swap, "temperature": t, "vote": vote, "label": label,
            "verdict": verdict, "reason": "" if verdict else "no answer", "official": verdict or "error",
            "tokens": 10, "rubric": [], "quotes": [1, 2], **more}


def pair(id, styles=(0, 0), label="A"):
    return {"id": id, "bench": "f", "item": id, "subset": "", "compare": [0, 1], "type": "", "source": "",
            "styles": list(styles), "label": label}


def test_measures_by_hand():
    """Three pairs in both orders, greedy: one right in both, one that says A twice, one unread and then
    right. The preferred response is A in the first order of 1 and 2, B in that of 3."""
    lines = [line("1", 0, False, "A", "A"), line("1", 1, True, "B", "B"),
             line("2", 0, False, "A", "A"), line("2", 1, True, "A", "B"),
             line("3", 0, True, None, "B"), line("3", 1, False, "A", "A")]
    m = E.measure_one("f", {p["id"]: p for p in (pair("1", (0, 2)), pair("2", (1, 1)), pair("3", (1, 0)))},
                      lines, [])
    assert m["accuracy, greedy"] == pytest.approx(4 / 6) and m["right in both orders"] == 1 / 3
    assert m["same verdict in both orders"] == 1 / 3
    assert m["unread"] == 1 / 6 and m["unread/no answer"] == 1 / 6 and m["says A"] == 4 / 5
    assert m["quotes word for word"] == .5 and m["by looks/share, greedy"] == 0
    assert (m["style/hard"], m["style/normal"], m["style/easy"]) == (1.0, 0.5, 0.5)


def test_votes_are_a_majority_of_the_same_samples():
    """Verdicts of five votes, right being A: A B B A A. One vote: right; three: wrong; five: right. Two of
    each: none."""
    lines = [line("1", 0, False, v, "A", vote=k, t=1.0) for k, v in enumerate("ABBAA")]
    m = E.measure_one("f", {"1": pair("1")}, lines, [])
    assert [m[f"votes/accuracy, best of {k}, T=1"] for k in (1, 3, 5)] == [1, 0, 1]
    assert [m[f"votes/tokens, best of {k}, T=1"] for k in (1, 3, 5)] == [10, 30, 50]
    assert m["accuracy, T=1"] == 1
    assert E.majority(["A", "B", "A", "B"]) is None and E.majority([None, "B", None]) == "B"


def test_the_first_order_counts_as_published_and_the_mean_stands_beside_it():
    """RewardBench judged in both orders by a judge that always says A."""
    lines, pairs = [], {}
    for counts in B.REWARDBENCH.values():
        for n, s in enumerate(counts):
            pairs[s] = {"id": s, "bench": "rewardbench", "item": s, "subset": s, "compare": [0, 1],
                        "label": "A"}
            swap = n == 0                                  # the first subset of each section is shown swapped
            lines += [line(s, 0, swap, "A", "B" if swap else "A"),
                      line(s, 1, not swap, "A", "A" if swap else "B")]
    m = E.measure_one("rewardbench", pairs, lines, [])
    assert m["overall, mean of both orders"] == pytest.approx(.5) and m["right in both orders"] == 0
    assert m["Chat"] == pytest.approx(258 / 358) and m["overall, greedy"] > .6 and m["says A"] == 1


def test_a_partial_benchmark_says_what_is_missing():
    pairs = {"x": {"id": "x", "bench": "rewardbench", "item": "x", "subset": "hep-go", "compare": [0, 1],
                   "label": "A"}}
    m = E.measure_one("rewardbench", pairs, [line("x", 0, False, "A", "A")], [])
    assert m["overall, greedy"] == "partial" == m["Reasoning"] and m["Reasoning/hep-go"] == 1
    assert "math-prm" in m["partial, without"]


# ---------------------------------------------------------------- servers

class Judge(Replies):
    """An OpenAI-compatible server that has bad days: every third request meets a limit, an error or an empty
    answer before it is served; a prompt with `too long` in it is refused; one with `think` comes with
    reasoning beside."""
    calls, fail_with = 0, (429, 500, "empty")
    lock = threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with Judge.lock:
            Judge.calls += 1
            n = Judge.calls
        text = body["messages"][-1]["content"]
        if self.headers["Authorization"] == "Bearer wrong":
            return self.reply(401, {"error": {"message": "no such key"}})
        if "too long" in text:
            return self.reply(400, {"error": {"message": "context length exceeded"}})
        trouble = Judge.fail_with[n // 3 % len(Judge.fail_with)] if n % 3 == 0 and Judge.fail_with else None
        if isinstance(trouble, int):
            return self.reply(trouble, {"error": {"message": "later"}})
        first = text.index("the good one") < text.index("a bad one") if "the good one" in text else True
        message = {"role": "assistant", "content": None if trouble == "empty" else
                   f"<type>Chat</type><eval>.</eval><answer>[[{'A' if first else 'B'}]]</answer>"}
        if "hep-js" in text:
            message["reasoning_content"] = "is it <answer>[[B]]</answer> or <answer>[[A]]</answer>?"
        self.reply(200, {
            "id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [
            {"index": 0, "message": message, "finish_reason": "stop"}], "usage": {
                "prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}})


@pytest.fixture
def server():
    s = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    Judge.calls, Judge.fail_with = 0, (429, 500)
    yield f"http://127.0.0.1:{s.server_port}/v1"
    s.shutdown()


@pytest.fixture
def bench(tmp_path):
    (tmp_path / "files").mkdir()
    rows = [*RB, {**RB[0], "id": 90, "chosen": ""}, {**RB[0], "id": 91, "prompt": "too long"}]
    (tmp_path / "files/rewardbench.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path / "files"


def ask(server, bench, out, *more, **kw):
    return call(E, "--model", "any", "--base-url", server, "--protocol", "instruct",
               "--bench", "rewardbench", "--data-dir", bench, "--out", out, "--both-orders", *more, **kw)


def test_a_server_with_limits_and_errors(server, bench, tmp_path):
    out = ask(server, bench, tmp_path / "run").stdout
    got = E.read_run(tmp_path / "run")
    m = E.measure(got)[1]["rewardbench"]
    assert (len(got["judgments"]) == 26 and m["Reasoning/hep-js"] == 1
            and m["Reasoning/hep-go"] == pytest.approx(6 / 7))
    assert m["unread/refused by the server"] == 2 / 26
    assert any("context length exceeded" in x["reason"] for x in got["judgments"])
    assert m["left out/empty response"] == 1 and "partial, without" in out
    js = next(x for x in got["judgments"] if "hep-js" in x["id"])
    assert js["text"].startswith("<think>") and js["official"] == "error" and js["tokens"] == 7


def test_what_got_no_answer_is_asked_again(server, bench, tmp_path):
    Judge.fail_with = ("empty",)
    done = ask(server, bench, tmp_path / "run", ok=False)
    first = len(E.read_run(tmp_path / "run")["judgments"])
    said = f"error: {26 - first} of 26 judgments: no answer from the server: an empty message"
    assert (done.returncode == 2 and said in done.stderr
            and 0 < first < 26)
    Judge.fail_with, Judge.calls = (), 0
    ask(server, bench, tmp_path / "run")
    assert Judge.calls == 26 - first and len(E.read_run(tmp_path / "run")["judgments"]) == 26


def test_a_wrong_key_stops_at_once(server, bench, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    done = ask(server, bench, tmp_path / "run", ok=False)
    assert done.returncode == 2 and "no such key" in done.stderr and "OPENAI_API_KEY" in done.stderr


def test_keys_and_paths_in_data_stay_where_they_belong(server, bench, tmp_path, monkeypatch):
    """A key reaches neither the run folder nor the output; ids and sources that are paths write nowhere
    else."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    inside = tmp_path / "inside"
    inside.mkdir()
    paths = "../../escaped", str(tmp_path / "escaped"), "../pairs.jsonl"
    (inside / "pairs.jsonl").write_text("".join(json.dumps(
        {"prompt": f"q{n}", "a": "the good one", "b": "a bad one", "label": "A", "id": path,
         "source": path}) + "\n" for n, path in enumerate(paths)))
    before = {p for p in tmp_path.rglob("*")}
    done = ask(server, bench, inside / "run", "--data", inside / "pairs.jsonl")
    call(E, "report", inside / "run", "--out", inside / "report")
    new = {p for p in tmp_path.rglob("*")} - before
    ours = {inside / "run", inside / "report"}
    assert new and all(ours & {p, *p.parents} for p in new)
    assert len(E.read_run(inside / "run")["judgments"]) == 32
    assert not any("sk-secret" in text for text in (done.stdout, done.stderr, *(
        p.read_text() for p in new if p.is_file())))


def test_no_protocol_is_guessed_from_a_name(server, bench, tmp_path):
    done = call(E, "--model", "RM-R1-Qwen2.5-Instruct-7B", "--base-url", server,
               "--bench", "rewardbench", "--data-dir", bench, "--out", tmp_path / "run", ok=False)
    assert (done.returncode == 2 and "give --protocol instruct" in done.stderr
            and not (tmp_path / "run").exists())


def test_other_settings_need_another_folder(server, bench, tmp_path):
    ask(server, bench, tmp_path / "run")
    done = ask(server, bench, tmp_path / "run", "--seed", 5, ok=False)
    assert done.returncode == 2 and "holds judgments with another seed (0, now 5)" in done.stderr


def test_runs_compare_and_report(server, bench, tmp_path):
    for name in ("one", "two"):
        ask(server, bench, tmp_path / name)
    path = tmp_path / "two/judgments.jsonl"                  # the second judge gets hep-go wrong
    rows = E.read_lines(path)
    for x in rows:
        if "hep-go" in x["id"]:
            x["verdict"] = {"A": "B", "B": "A"}.get(x["verdict"])
    path.write_text("".join(json.dumps(x) + "\n" for x in rows))
    out = call(E, "compare", "--all", tmp_path / "one", tmp_path / "two").stdout
    go, js = ([x for x in out.splitlines() if f"Reasoning/{s}" in x][0] for s in ("hep-go", "hep-js"))
    assert go.endswith("  differ") and js.endswith("no difference shown")
    call(E, "report", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "page")
    page = (tmp_path / "page/report.html").read_text()
    assert "/*DATA*/null" not in page and "RM-R1-Qwen-Instruct-32B" in page and page.count("</script>") == 1


# ---------------------------------------------------------------- local models

LOCAL = ("--dtype", "float32", "--max-tokens", 32, "--max-len", 200)


def test_a_killed_evaluation_goes_on_and_ends_the_same(toy, tmp_path):
    """SIGKILL after the first judgments are on disk; the second run asks for the rest only, and the files are
    those of a run that nobody killed."""
    args = ("eval.py", *LOCAL, "--model", toy / "model/config.json", "--data", toy / "rl.jsonl",
            "--temperature", 1, "--votes", 3)
    run(*args, "--out", tmp_path / "whole")
    whole = (tmp_path / "whole/judgments.jsonl").read_text()
    process = subprocess.Popen([sys.executable, *map(str, args), "--out", tmp_path / "cut"], cwd=ROOT,
                               env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part, deadline = tmp_path / "cut/judgments.part0.jsonl", time.time() + 120
    while (process.poll() is None and time.time() < deadline
           and not (part.exists() and part.stat().st_size > 500)):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(part, "a") as f:
        f.write('{"id": "rl/rl-9", "order": 0, "te')          # cut in the middle of a line
    before = len(E.read_lines(part))
    out = run(*args, "--out", tmp_path / "cut")
    assert 0 < before < 64 * 3 and f"/{64 * 3 - before}" in out.stderr.replace(" ", "")
    assert (tmp_path / "cut/judgments.jsonl").read_text() == whole and not part.exists()


def test_two_ranks_judge_as_one_and_overlong_prompts_count(toy, tmp_path):
    args = ("eval.py", "--dtype", "float32", "--max-tokens", 8, "--max-len", 24,
            "--model", toy / "model/config.json", "--data", toy / "test.jsonl", "--temperature", 0, 1)
    run(*args, "--out", tmp_path / "one")
    run(*args, "--out", tmp_path / "two", ranks=2)
    whole, path = (tmp_path / "one/judgments.jsonl").read_text(), tmp_path / "two/judgments.jsonl"
    assert path.read_text() == whole
    path.write_text("".join(whole.splitlines(keepends=True)[1:]))      # one missing: a rank has nothing to do
    run(*args, "--out", tmp_path / "two", ranks=2)
    assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())
    m = E.measure(E.read_run(tmp_path / "one"))[1]["test"]
    assert 0 < m["unread/prompt longer than the window of 24 tokens"] < 1 and m["judgments"] == 32


def test_a_scalar_reward_model(toy, tmp_path):
    """A random classifier: verdicts are those of its scores, computed by transformers one by one."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification
    model = tmp_path / "scalar"
    shutil.copytree(toy / "model", model)
    config = Qwen2Config.from_pretrained(toy / "model")
    config.num_labels = 1
    torch.manual_seed(0)
    net = Qwen2ForSequenceClassification(config).eval()
    net.save_pretrained(model)
    call(E, "--scalar", "--model", model, "--dtype", "float32", "--data", toy / "test.jsonl", "--out",
        tmp_path / "run")
    got, tokenizer = E.read_run(tmp_path / "run"), AutoTokenizer.from_pretrained(model)
    assert len(got["judgments"]) == 16
    for x in got["judgments"]:
        p = got["pairs"][x["id"]]
        for score, response in zip(x["scores"], (p["a"], p["b"])):
            ids = tokenizer.apply_chat_template([*p["context"], {"role": "assistant", "content": response}],
                                                tokenize=True, return_dict=False)
            with torch.no_grad():
                assert score == pytest.approx(net(torch.tensor([ids])).logits.item(), abs=1e-4)
        assert x["verdict"] == ("A" if x["scores"][0] > x["scores"][1] else "B")


@pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent")
def test_every_benchmark_in_one_command(tmp_path):
    """Real rows of all five, the real tokenizer, a small random Qwen2: one engine, one file, every part
    counted."""
    from transformers import Qwen2Config
    model = tmp_path / "model"
    shutil.copytree(SHARED / "tokenizers/qwen2.5", model)
    (model / "config.json").chmod(0o644)
    Qwen2Config(architectures=["Qwen2ForCausalLM"], vocab_size=152064, hidden_size=64, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
                max_position_embeddings=8192, bos_token_id=None, eos_token_id=151645).save_pretrained(model)
    out = run("eval.py", "--bench", "all", "--data-dir", SHARED / "data", "--limit", 1, "--model",
              model / "config.json", "--protocol", "instruct", "--dtype", "float32", "--max-tokens", 4,
              "--out", tmp_path / "run", timeout=600).stdout
    got = E.read_run(tmp_path / "run")
    measured = E.measure(got)[1]
    assert list(measured) == list(B.BENCHES)
    assert measured["rewardbench"]["judgments"] == 23 and measured["rm-bench"]["judgments"] == 36
    assert measured["judgebench"]["says A"] is None and measured["judgebench"]["unread"] == 1
    for bench in ("rewardbench", "rm-bench", "rmb"):           # whole, though small: every subset is there
        assert measured[bench]["overall, greedy"] == 0, bench
    assert measured["rewardbench2"]["overall, greedy"] == "partial"
    assert measured["rewardbench2"]["partial, without"] == "Focus, Precise IF, Safety"
    assert measured["rewardbench2"]["Ties"] < 0.5 and "partial, without" in out
