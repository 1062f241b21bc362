"""Every script as a person runs it: the pipeline, real data, and what bad input gets."""

import importlib
import json
import os
import re
import shutil
import subprocess

import pytest
from transformers import AutoModelForCausalLM

from conftest import ROOT, SHARED, call, environment, metrics, run

SMALL = ("--dtype", "float32", "--save-every", 0, "--no-recompute")


@pytest.fixture(scope="session")
def trained(toy, tmp_path_factory):
    """SFT, GRPO and an evaluation of both in the toy world, a few steps each."""
    out = tmp_path_factory.mktemp("run")
    run(
        "sft.py",
        *SMALL,
        "--model",
        toy / "model/config.json",
        "--data",
        toy / "sft.jsonl",
        "--out",
        out / "sft",
        "--batch",
        16,
        "--lr",
        3e-3,
        "--max-len",
        160,
        ranks=2,
    )
    run(
        "grpo.py",
        *SMALL,
        "--model",
        out / "sft/model",
        "--data",
        toy / "rl.jsonl",
        "--val-data",
        toy / "val.jsonl",
        "--out",
        out / "grpo",
        "--batch",
        8,
        "--mini-batch",
        8,
        "--group-size",
        2,
        "--max-prompt",
        80,
        "--max-response",
        64,
        "--steps",
        2,
        "--lr",
        1e-4,
        "--max-mismatch",
        0.001,
    )
    run(
        "eval.py",
        "--model",
        out / "grpo/model",
        "--data",
        toy / "test.jsonl",
        "--out",
        out / "eval",
        "--dtype",
        "float32",
        "--max-tokens",
        64,
        "--both-orders",
        "--temperature",
        0,
        1,
        ranks=2,
    )
    return out


def test_the_pipeline_leaves_what_it_promises(trained):
    sft, grpo = metrics(trained / "sft"), metrics(trained / "grpo")
    assert [r["step"] for r in sft] == list(range(16)) and sft[-1]["loss"] < sft[0]["loss"]
    wanted = {
        "reward",
        "accuracy",
        "no_verdict",
        "truncated",
        "length_mean",
        "length_max",
        "kl",
        "clipped",
        "grad_norm",
        "mismatch_mean",
        "mismatch_max",
        "seconds_sample",
        "seconds_score",
        "seconds_learn",
        "seconds_sync",
        "tokens_per_second",
        "peak_gib",
    }
    assert (
        len(grpo) == 3
        and wanted <= set(grpo[0])
        and "val_accuracy" in grpo[0]
        and "val_accuracy" in grpo[2]
    )
    assert grpo[0]["clipped"] == 0 and grpo[0]["mismatch_max"] < 1e-3
    for stage in ("sft", "grpo"):
        AutoModelForCausalLM.from_pretrained(trained / stage / "model")


def test_an_evaluation_can_be_recomputed_from_its_files(trained):
    import eval as E

    ours = E.read_run(trained / "eval")
    rows = ours["judgments"]
    assert (
        len(rows) == 16 * 2 * 2
        and {r["temperature"] for r in rows} == {0, 1}
        and {r["order"] for r in rows} == {0, 1}
    )
    out = run(
        "eval.py", "report", trained / "eval", "--training", trained / "grpo", "--out", trained
    ).stdout
    assert f"{E.measure(ours)['test']['accuracy']['greedy']:.3f}" in out
    assert (trained / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert rows[0]["id"] in (trained / "report.html").read_text()


def test_a_trained_judge_keeps_its_prompt_style(trained):
    """No --system-prompt anywhere: it travels with the model, from the first folder to the last."""
    style = json.loads((trained / "grpo/model/judge.json").read_text())
    assert style == {"protocol": "instruct", "system": "Judge A and B."}
    assert json.loads((trained / "eval/config.json").read_text())["system"] == "Judge A and B."


def test_judge_prints_a_pair_for_a_person(trained, toy):
    out = run(
        "rmr1.py",
        "judge",
        "--model",
        trained / "sft/model",
        "--dtype",
        "float32",
        "--max-tokens",
        64,
        "--data",
        toy / "test.jsonl",
        "--line",
        2,
    ).stdout
    assert (
        "question" in out
        and "response B" in out
        and "verdict: " in out
        and "people preferred" in out
    )


@pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent")
def test_real_pairs_with_the_real_tokenizer(tmp_path):
    """UltraFeedback rows and the Qwen2.5 tokenizer go through SFT, GRPO and evaluation on a small random
    Qwen2; overlong prompts are counted, bad rows named."""
    from transformers import Qwen2Config

    model = tmp_path / "model"
    shutil.copytree(SHARED / "tokenizers/qwen2.5", model)
    (model / "config.json").chmod(0o644)
    Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=152064,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=128,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=151645,
    ).save_pretrained(model)
    lines = (SHARED / "data/ultrafeedback.jsonl").read_text().splitlines()
    rows = [json.loads(x) for x in lines[:8] + lines[306:307]]  # line 307 holds equal responses
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    trace = (
        "<type>Chat</type><rubric>Help (100%)<justify>x</justify></rubric><eval>A.</eval>"
        "<answer>[[A]]</answer>"
    )
    traces = tmp_path / "traces.jsonl"
    traces.write_text(
        "".join(
            json.dumps(
                {
                    "prompt": r["prompt"],
                    "a": r["chosen"],
                    "b": r["rejected"],
                    "label": "A",
                    "trace": trace,
                }
            )
            + "\n"
            for r in rows[:8]
        )
    )

    run(
        "sft.py",
        *SMALL,
        "--model",
        model / "config.json",
        "--data",
        traces,
        "--out",
        tmp_path / "sft",
        "--batch",
        4,
        "--lr",
        1e-3,
        "--max-len",
        2000,
    )
    done = run(
        "grpo.py",
        *SMALL,
        "--model",
        tmp_path / "sft/model",
        "--data",
        data,
        "--skip-bad",
        "--out",
        tmp_path / "grpo",
        "--batch",
        2,
        "--mini-batch",
        1,
        "--group-size",
        2,
        "--max-prompt",
        1100,
        "--max-response",
        16,
        "--steps",
        1,
        "--reward",
        "random",
    )
    assert (
        f"{data}:9: the two responses are equal" in done.stderr
        and "1 bad lines of 9" in done.stderr
    )
    usable = int(done.stdout.split("pairs.jsonl: ")[1].split()[0])
    assert (
        2 <= usable < 8 and f"{8 - usable} left out as longer than --max-prompt 1100" in done.stdout
    )
    (row,) = metrics(tmp_path / "grpo")
    assert row["mismatch_mean"] < 1e-3 and row["grad_norm"] > 0 and row["truncated"] == 1
    run(
        "eval.py",
        "--model",
        tmp_path / "grpo/model",
        "--data",
        traces,
        "--out",
        tmp_path / "eval",
        "--dtype",
        "float32",
        "--max-tokens",
        8,
    )
    judged = [json.loads(x) for x in open(tmp_path / "eval/judgments.jsonl")]
    assert len(judged) == 8 and all(j["reason"] in ("truncated", "no answer") for j in judged)


# ---------------------------------------------------------------- bad input


def bad(toy, tmp_path, script, *more, data=None):
    """Run a script that must refuse: exit code 2, one sentence on standard error, no traceback, nothing written.
    -> the sentence"""
    out = tmp_path / "out"
    lines = toy / ("sft.jsonl" if script == "sft.py" else "rl.jsonl")
    if data is not None:
        lines = tmp_path / "data.jsonl"
        lines.write_text(data)
    common = ["--model", toy / "model/config.json", "--out", out, "--data", lines]
    common += ["--dtype", "float32"]
    if script == "grpo.py":  # within the window of the toy's model, which has 256 tokens
        common += ["--max-prompt", 80, "--max-response", 24]
    done = call(importlib.import_module(script.removesuffix(".py")), *common, *more, ok=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert not out.exists(), "something was half-written"
    return errors[0]


GOOD = {"prompt": "q", "a": "x", "b": "y", "label": "A"}


@pytest.mark.parametrize(
    "script, more, complaint",
    [
        (
            "grpo.py",
            ("--group-size", 1),
            "--group-size 1: one judgment has nothing to be compared with",
        ),
        (
            "grpo.py",
            ("--batch", 10, "--mini-batch", 4),
            "--batch 10 does not divide into updates of --mini-batch 4",
        ),
        ("grpo.py", ("--batch", 1024), "--batch 1024: more than the 64 usable pairs"),
        (
            "grpo.py",
            ("--batch", 8, "--mini-batch", 8, "--max-prompt", 5),
            "--batch 8: more than the 0 usable pairs",
        ),
        (
            "grpo.py",
            ("--batch", 8, "--mini-batch", 8, "--max-prompt", 80, "--max-response", 500),
            "exceed the model's window of 256 tokens",
        ),
        (
            "grpo.py",
            ("--batch", 8, "--mini-batch", 8, "--max-prompt", 80, "--max-response", 24, "--tp", 2),
            "--tp 2 does not divide the 1 ranks",
        ),
        (
            "sft.py",
            ("--batch", 8, "--max-len", 160, "--shard", 3),
            "--shard 3 does not divide the 1 ranks",
        ),
        ("grpo.py", ("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        ("grpo.py", ("--model", "runs/nowhere/model"), "no such folder"),
        ("grpo.py", ("--system-prompt", "nowhere.txt"), "nowhere.txt: no such file"),
        ("sft.py", ("--batch", 4096, "--max-len", 160), "--batch 4096: more than the 256 rows"),
        ("eval.py", ("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        ("eval.py", ("--bench", "rewardbench3"), "--bench rewardbench3: no such benchmark"),
        (
            "eval.py",
            ("--bench", "rmb", "--data-dir", "nowhere"),
            "--data-dir nowhere: no such folder",
        ),
        (
            "eval.py",
            ("--bench", "rmb", "--data-dir", "tests"),
            "no file or folder in it has a name that begins with rmb",
        ),
        ("eval.py", ("--votes", 0), "--votes: 0 is not a whole number from 1"),
        ("eval.py", ("--limit", 0), "--limit: 0 is not a whole number from 1"),
        ("eval.py", ("--temperature", "nan"), "--temperature: nan is not a number from 0"),
        ("eval.py", ("--temperature", 1, -1), "--temperature: -1 is not a number from 0"),
        ("eval.py", ("--max-tokens", 0), "--max-tokens: 0 is not a whole number from 1"),
        ("eval.py", ("--max-len", 1), "--max-len: 1 is not a whole number from 2"),
        ("eval.py", ("--at-once", 0), "--at-once: 0 is not a whole number from 1"),
        ("eval.py", ("--tp", 0), "--tp: 0 is not a whole number from 1"),
        ("eval.py", ("--seed", -1), "--seed: -1 is not a whole number from 0"),
        ("eval.py", ("--engine-memory", 1.5), "--engine-memory: 1.5 is not a number above 0 to 1"),
        ("eval.py", ("--votes", 3), "--votes 3: votes at temperature 0 are all the same"),
        (
            "eval.py",
            ("--scalar", "--both-orders"),
            "--scalar: a reward model has no votes, no order",
        ),
    ],
)
def test_bad_flags_get_one_sentence(script, more, complaint, toy, tmp_path):
    assert complaint in bad(toy, tmp_path, script, *more)


@pytest.mark.parametrize(
    "script, command, complaint",
    [
        ("eval", ("report", "x", "--examples", -1), "--examples: -1 is not a whole number from 0"),
        ("rmr1", ("judge", "--model", "x", "--line", 0), "--line: 0 is not a whole number from 1"),
        (
            "rmr1",
            ("judge", "--model", "x", "--max-tokens", 0),
            "--max-tokens: 0 is not a whole number from 1",
        ),
    ],
)
def test_numbers_of_other_commands_have_ranges_too(script, command, complaint):
    done = call(importlib.import_module(script), *command, ok=False)
    assert done.returncode == 2 and f"error: {complaint}" in done.stderr


def make(*words, ok=True):
    """`make` with scripts that do nothing."""
    clean = {k: v for k, v in environment().items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make", *map(str, words), "PY=true", "READY="],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=clean,
    )
    assert not ok or done.returncode == 0, done.stderr
    return done


FAKE_PYTHON = """#!/bin/sh
case "$*" in
*version_info*) exit {old} ;;
*ensurepip*) exit {without_venv} ;;
"-m venv "*) mkdir -p "$3/bin" && printf '%s' '{pip}' > "$3/bin/pip" && chmod +x "$3/bin/pip" ;;
esac
"""
# Has the CPU build at no index, at PyTorch's own only, or at the index at hand.
PIPS = {
    "nowhere": '#!/bin/sh\ncase "$*" in *torch==*) exit 1 ;; esac\n',
    "its own": '#!/bin/sh\ncase "$*" in *--index-url*) exit 0 ;; *torch==*) exit 1 ;; esac\n',
    "at hand": "#!/bin/sh\nexit 0\n",
}


@pytest.mark.parametrize(
    "old, without_venv, index, complaint",
    [
        (0, 0, "at hand", ""),
        (0, 0, "its own", ""),
        (0, 0, "nowhere", "error: pip found the CPU build of torch"),
        (1, 0, "at hand", "error: python3 is older than 3.11"),
        (0, 1, "at hand", "apt-get install python3-venv"),
    ],
)
def test_an_environment_that_cannot_be_made_gets_a_sentence(
    old, without_venv, index, complaint, tmp_path
):
    """With a python3 that only makes a folder, and its pip, which finds torch in one place or in none."""
    python = tmp_path / "bin/python3"
    python.parent.mkdir()
    python.write_text(FAKE_PYTHON.format(old=old, without_venv=without_venv, pip=PIPS[index]))
    python.chmod(0o755)
    for name in ("Makefile", "requirements-cpu.txt"):
        shutil.copy(ROOT / name, tmp_path)
    path = f"{python.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["make", ".venv/ready"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment() | {"PATH": path},
    )
    assert (done.returncode == 0) == (complaint == "") == (tmp_path / ".venv/ready").exists()
    assert complaint in done.stderr and len(done.stderr.splitlines()) <= 2, done.stderr


def test_a_demo_removes_its_own_folder_only(tmp_path):
    """A folder that it did not make stays; its own is made anew; every seed and every oracle has one."""
    mine, demo = tmp_path / "mine", tmp_path / "demo"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    for target in ("demo", "controls"):
        done = make(target, f"DEMO={mine}", ok=False)
        assert done.returncode and "error: DEMO" in done.stderr and (mine / "thesis.tex").exists()
    make("demo", f"DEMO={demo}")
    (demo / "eval-sft").mkdir()
    (demo / "control-sft").mkdir()
    make("controls", f"DEMO={demo}")
    assert not (demo / "control-sft").exists()
    assert (demo / "eval-sft").exists()
    make("demo", f"DEMO={demo}")
    assert demo.exists() and not (demo / "eval-sft").exists()
    for words, folder, seed in (
        ((), "demo", 0),
        (("SEED=1",), "demo-seed1", 1),
        (("REPAIR=1",), "demo-repair1", 0),
        (("SEED=0", "REPAIR=.5"), "demo", 0),
        (("SEED=2", "REPAIR=1"), "demo-seed2-repair1", 2),
        (("SEED=1", "WORLD=leap"), "demo-seed1-leap", 1),
    ):
        for target in ("demo", "controls"):
            commands = make("-n", target, *words).stdout
            assert f"runs/{folder}/eval-sft" in commands
            assert set(re.findall(r"--seed (\d)", commands)) == {str(seed)}


@pytest.mark.parametrize(
    "row, complaint",
    [
        ('{"prompt": "q", "a": "x"', "not a JSON object"),
        (json.dumps({**GOOD, "b": ""}), "b is empty"),
        (json.dumps({**GOOD, "b": "x"}), "the two responses are equal"),
        (json.dumps({**GOOD, "label": "C"}), "unknown label 'C'"),
    ],
)
def test_bad_lines_get_one_sentence(row, complaint, toy, tmp_path):
    sentence = bad(toy, tmp_path, "grpo.py", data=json.dumps(GOOD) + "\n" + row + "\n")
    assert "data.jsonl:2: " in sentence and complaint in sentence


def test_pairs_without_traces_cannot_be_fitted(toy, tmp_path):
    rows = [GOOD, GOOD | {"trace": None}, GOOD | {"trace": ""}, GOOD | {"trace": " \n"}]
    data = "".join(json.dumps(row) + "\n" for row in rows)
    assert "4 pairs have no trace to learn from" in bad(
        toy, tmp_path, "sft.py", "--max-len", 160, data=data
    )


def test_a_model_folder_without_weights(toy, tmp_path):
    assert "no *.safetensors weights" in bad(toy, tmp_path, "grpo.py", "--model", toy / "model")


@pytest.mark.parametrize(
    "size, stage, nodes, wanted",
    [
        ("7b", "sft", 1, "sft.py --model Qwen/Qwen2.5-7B-Instruct --lr 5e-6"),
        ("14b", "sft", 2, "sft.py --model Qwen/Qwen2.5-14B-Instruct --lr 3e-6"),
        ("32b", "sft", 4, "sft.py --model Qwen/Qwen2.5-32B-Instruct --lr 2e-6"),
        ("7b", "grpo", 1, "grpo.py --model runs/sft-7b/model --lr 1e-6 --tp 1"),
        ("14b", "grpo", 2, "grpo.py --model runs/sft-14b/model --lr 7e-7 --tp 2"),
        ("32b", "grpo", 4, "grpo.py --model runs/sft-32b/model --lr 5e-7 --tp 4"),
        (
            "32b",
            "reasoning",
            4,
            "grpo.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-32B --protocol reasoning "
            "--data gaotang/RM-R1-Reasoning-RLVR --lr 8e-7 --tp 4",
        ),
    ],
)
def test_launch_scripts_have_the_papers_rates(size, stage, nodes, wanted):
    """Appendix G, where the released scripts differ; and every flag exists."""
    command = launched(size, stage)
    assert wanted in command and f"--nnodes {nodes} --node_rank 0 --nproc_per_node 8" in command
    text = call(importlib.import_module("sft" if stage == "sft" else "grpo"), "--help").stdout
    assert all(flag in text for flag in re.findall(r" (--[a-z]\S*)", wanted))


def launched(*words):
    """The command that launch/rm-r1.sh starts Python with."""
    return subprocess.run(
        ["launch/rm-r1.sh", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment() | {"PYTHON": "echo"},
    ).stdout


def test_a_dry_run_of_a_launch_is_of_the_same_script_ranks_and_flags():
    dry = launched("32b", "grpo", "--beta", "0", "--dry-run")
    assert dry.startswith("tools/dryrun.py grpo.py --ranks 32 ") and "--dry-run" not in dry
    flags = dry.split("--ranks 32 ")[1]
    assert launched("32b", "grpo", "--beta", "0").endswith(f" grpo.py {flags}")


def test_an_unknown_size_is_refused():
    done = subprocess.run(
        ["launch/rm-r1.sh", "70b", "sft"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "7b, 14b and 32b" in done.stderr
