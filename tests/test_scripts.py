"""Every script as a person runs it: the pipeline, real data, and what bad input gets."""
import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

from conftest import SHARED, metrics, run

SMALL = ("--dtype", "float32", "--save-every", 0, "--no-recompute")


@pytest.fixture(scope="session")
def trained(toy, tmp_path_factory):
    """SFT, GRPO and an evaluation of both in the toy world, a few steps each."""
    out = tmp_path_factory.mktemp("run")
    system = ("--system-prompt", toy / "system.txt")
    run("sft.py", *SMALL, *system, "--model", toy / "model/config.json", "--data", toy / "sft.jsonl",
        "--out", out / "sft", "--batch", 16, "--lr", 3e-3, "--max-len", 160, ranks=2)
    run("grpo.py", *SMALL, *system, "--model", out / "sft/model", "--data", toy / "rl.jsonl",
        "--val-data", toy / "val.jsonl", "--out", out / "grpo", "--pairs", 8, "--mini", 8, "--group", 2,
        "--max-prompt", 80, "--max-response", 64, "--steps", 2, "--lr", 1e-4, "--max-gap", 0.001)
    run("eval.py", "--model", out / "grpo/model", "--data", toy / "test.jsonl", *system,
        "--out", out / "eval", "--dtype", "float32", "--max-tokens", 64, "--both-orders",
        "--temperature", 0, 1, ranks=2)
    return out


def test_the_pipeline_leaves_what_it_promises(trained):
    sft, grpo = metrics(trained / "sft"), metrics(trained / "grpo")
    assert [r["step"] for r in sft] == list(range(16)) and sft[-1]["loss"] < sft[0]["loss"]
    wanted = {"reward", "accuracy", "unread", "cut_off", "length_mean", "length_max", "kl", "clipped",
              "grad_norm", "gap_mean", "gap_max", "seconds_sample", "seconds_score", "seconds_learn",
              "seconds_sync", "tokens_per_second", "peak_gb"}
    assert (len(grpo) == 3 and wanted <= set(grpo[0])
            and "val_accuracy" in grpo[0] and "val_accuracy" in grpo[2])
    assert grpo[0]["clipped"] == 0 and grpo[0]["gap_max"] < 1e-3
    for stage in ("sft", "grpo"):
        AutoModelForCausalLM.from_pretrained(trained / stage / "model")


def test_an_evaluation_can_be_recomputed_from_its_lines(trained):
    import eval as E
    rows = E.read_judgments(trained / "eval")
    assert (len(rows) == 16 * 2 * 2 and {r["temperature"] for r in rows} == {0, 1}
            and {r["order"] for r in rows} == {"ab", "ba"})
    out = run("eval.py", "report", trained / "eval", "--training", trained / "grpo", "--out", trained).stdout
    assert f"{E.measure(rows)['accuracy, greedy']:.3f}" in out
    assert (trained / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "Sampled judgments" in (trained / "judgments.html").read_text()


def test_judge_prints_a_pair_for_a_person(trained, toy):
    out = run("rmr1.py", "judge", "--model", trained / "sft/model", "--system-prompt", toy / "system.txt",
              "--dtype", "float32", "--max-tokens", 64, "--data", toy / "test.jsonl", "--line", 2).stdout
    assert "question" in out and "response B" in out and "verdict: " in out and "people preferred" in out


def test_measures_by_hand():
    """Two pairs in both orders, greedy: one right in both, one that says A twice, with styles."""
    import eval as E
    row = lambda id, order, label, verdict, a, b: {
        "id": id, "order": order, "temperature": 0, "label": label, "verdict": verdict,
        "reason": "" if verdict else "no answer", "official": verdict or "error", "source": "s",
        "type": "chat", "tokens": 10, "finished": True, "style_a": a, "style_b": b,
        "a": "one two", "b": "three",
        "text": "<eval><quote_A> two</quote_A><quote_B>four</quote_B></eval><answer>[[A]]</answer>"}
    m = E.measure([row("1", "ab", "A", "A", 0, 2), row("1", "ba", "B", "B", 2, 0),
                   row("2", "ab", "A", "A", 1, 1), row("2", "ba", "B", "A", 1, 1),
                   row("3", "ab", "B", None, 0, 1), row("3", "ba", "A", "A", 1, 0)])
    assert m["accuracy, greedy"] == 4 / 6 and m["right in both orders"] == 1 / 3 and m["unread"] == 1 / 6
    assert m["says A"] == 4 / 5 and m["quotes word for word"] == 0.5 and m["judges by looks"] == 0
    assert (m["style hard"], m["style normal"], m["style easy"]) == (1.0, 0.5, 0.5)


@pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent")
def test_real_pairs_with_the_real_tokenizer(tmp_path):
    """UltraFeedback rows and the Qwen2.5 tokenizer go through SFT, GRPO and evaluation on a small random
    Qwen2; overlong prompts are counted, bad rows named."""
    from transformers import Qwen2Config
    model = tmp_path / "model"
    shutil.copytree(SHARED / "tokenizers/qwen2.5", model)
    (model / "config.json").chmod(0o644)
    Qwen2Config(architectures=["Qwen2ForCausalLM"], vocab_size=152064, hidden_size=64, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, intermediate_size=128,
                max_position_embeddings=2048, bos_token_id=None,
                eos_token_id=151645).save_pretrained(model)
    lines = (SHARED / "data/ultrafeedback.jsonl").read_text().splitlines()
    rows = [json.loads(x) for x in lines[:8] + lines[306:307]]              # line 307 holds equal responses
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    trace = ("<type>Chat</type><rubric>Help (100%)<justify>x</justify></rubric><eval>A.</eval>"
             "<answer>[[A]]</answer>")
    traces = tmp_path / "traces.jsonl"
    traces.write_text("".join(
        json.dumps({"prompt": r["prompt"], "a": r["chosen"], "b": r["rejected"], "label": "A",
                    "trace": trace}) + "\n" for r in rows[:8]))

    run("sft.py", *SMALL, "--model", model / "config.json", "--data", traces, "--out", tmp_path / "sft",
        "--batch", 4, "--lr", 1e-3, "--max-len", 2000)
    done = run("grpo.py", *SMALL, "--model", tmp_path / "sft/model", "--data", data, "--skip-bad",
               "--out", tmp_path / "grpo", "--pairs", 2, "--mini", 1, "--group", 2, "--max-prompt", 1100,
               "--max-response", 16, "--steps", 1, "--reward", "random")
    assert f"{data}:9: the two responses are equal" in done.stderr and "1 bad lines of 9" in done.stderr
    kept = int(done.stdout.split("pairs.jsonl: ")[1].split()[0])
    assert 2 <= kept < 8 and f"{8 - kept} left out as longer than --max-prompt 1100" in done.stdout
    row, = metrics(tmp_path / "grpo")
    assert row["gap_mean"] < 1e-3 and row["grad_norm"] > 0 and row["cut_off"] == 1
    run("eval.py", "--model", tmp_path / "grpo/model", "--data", traces, "--out", tmp_path / "eval",
        "--dtype", "float32", "--max-tokens", 8)
    judged = [json.loads(x) for x in open(tmp_path / "eval/judgments.jsonl")]
    assert len(judged) == 8 and all(j["reason"] in ("cut off", "no answer") for j in judged)


# ---------------------------------------------------------------- bad input

def bad(toy, tmp_path, script, *more, data=None):
    """Run a script that must refuse: exit code 2, one sentence on standard error,
    no traceback, nothing written."""
    out = tmp_path / "out"
    lines = toy / ("sft.jsonl" if script == "sft.py" else "rl.jsonl")
    if data is not None:
        lines = tmp_path / "data.jsonl"
        lines.write_text(data)
    common = ["--model", toy / "model/config.json", "--system-prompt", toy / "system.txt", "--out", out,
              "--data", lines, "--dtype", "float32"]
    done = run(script, *common, *more, ok=False)
    said = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(said) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert not out.exists(), "something was half-written"
    return said[0]


GOOD = {"prompt": "q", "a": "x", "b": "y", "label": "A"}


@pytest.mark.parametrize("script, more, complaint", [
    ("grpo.py", ("--group", 1), "--group 1: a group of one"),
    ("grpo.py", ("--pairs", 10, "--mini", 4), "--pairs 10 does not divide into updates of --mini 4"),
    ("grpo.py", ("--pairs", 1024), "--pairs 1024: more than the 64 usable pairs"),
    ("grpo.py", ("--pairs", 8, "--mini", 8, "--max-prompt", 5), "--pairs 8: more than the 0 usable pairs"),
    ("grpo.py", ("--pairs", 8, "--mini", 8, "--max-prompt", 80, "--max-response", 500),
     "exceed the model's window of 256 tokens"),
    ("grpo.py", ("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
    ("grpo.py", ("--model", "runs/nowhere/model"), "no such folder"),
    ("grpo.py", ("--system-prompt", "nowhere.txt"), "nowhere.txt: no such file"),
    ("sft.py", ("--batch", 4096), "--batch 4096: more than the 256 rows"),
    ("eval.py", ("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
    ("eval.py", ("--max-len", 5), "no prompt leaves room in a window of 5 tokens"),
])
def test_bad_flags_get_one_sentence(script, more, complaint, toy, tmp_path):
    assert complaint in bad(toy, tmp_path, script, *more)


@pytest.mark.parametrize("row, complaint", [
    ('{"prompt": "q", "a": "x"', "not a JSON object"),
    (json.dumps({**GOOD, "b": ""}), "response B is empty"),
    (json.dumps({**GOOD, "b": "x"}), "the two responses are equal"),
    (json.dumps({**GOOD, "label": "C"}), "unknown label 'C'"),
])
def test_bad_lines_get_one_sentence(row, complaint, toy, tmp_path):
    said = bad(toy, tmp_path, "grpo.py", data=json.dumps(GOOD) + "\n" + row + "\n")
    assert "data.jsonl:2: " in said and complaint in said


def test_pairs_without_traces_cannot_be_fitted(toy, tmp_path):
    assert "1 pairs have no trace to learn from" in bad(toy, tmp_path, "sft.py", data=json.dumps(GOOD) + "\n")


def test_a_model_folder_without_weights(toy, tmp_path):
    assert "no *.safetensors weights" in bad(toy, tmp_path, "grpo.py", "--model", toy / "model")
