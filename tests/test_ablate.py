"""Variants, seeds and their table; and what the paper's ablations ask for instead of the whole prompt."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval as E
import grpo
import rubrics
import sft
import toy as T
from conftest import ROOT, call, environment, run
from judge import report
from lib import pairs
from lib.pairs import Pair
from rubrics import PromptStyle, chat_messages, parse, prompt_style, style_to_save
from tools import ablate

PAIR = Pair("p", [{"role": "user", "content": "What?"}], "This.", "That.", "A")


# ---------------------------------------------------------------- what is asked for


def test_each_prompt_of_the_ablations_asks_for_its_parts_only():
    tags = {
        "instruct": "type rubric justify solution eval quote_A answer",
        "rubrics": "rubric justify eval quote_A answer",
        "plain": "eval answer",
        "verdict": "answer",
    }
    for protocol, parts in tags.items():
        system, user = chat_messages(PAIR, PromptStyle(protocol))
        assert user == chat_messages(PAIR)[1]
        asked = {t for t in tags["instruct"].split() if f"<{t}>" in system["content"]}
        assert asked == set(parts.split())
        assert system["content"].startswith(rubrics.OPENING) and system["content"].endswith(
            rubrics.ENDING
        )


@pytest.mark.parametrize("protocol", ["instruct", "rubrics", "plain", "verdict", "reasoning"])
def test_the_prompt_travels_in_judge_json(tmp_path, protocol):
    saved = style_to_save([PAIR], PromptStyle(protocol), pytest.fail)
    (tmp_path / "judge.json").write_text(json.dumps(saved))
    assert prompt_style(tmp_path, "m") == PromptStyle(protocol, saved["system"])
    assert chat_messages(PAIR, prompt_style(tmp_path, "m")) == chat_messages(
        PAIR, PromptStyle(protocol)
    )


def test_a_published_row_is_asked_for_less_only_where_that_is_wanted():
    published = Pair(
        "p",
        PAIR.context,
        "This.",
        "That.",
        "A",
        messages=[{"role": "system", "content": "Published."}, chat_messages(PAIR)[1]],
    )
    assert chat_messages(published) == published.messages
    assert chat_messages(published, PromptStyle("plain"))[0]["content"] == rubrics.SYSTEMS["plain"]
    said = []
    saved = style_to_save([PAIR, published, published], PromptStyle(), said.append)
    assert saved == {"protocol": "instruct", "system": "Published."}
    assert "2 pairs; 1 have another" in said[0]
    assert style_to_save([published], PromptStyle("rubrics"))["protocol"] == "rubrics"


def test_sft_on_verdicts_learns_the_label_whatever_the_oracle_wrote(toy):
    from lib import chat
    from lib.pairs import read_pairs

    pairs = read_pairs(toy / "sft.jsonl")
    tokenizer, _ = chat.load_tokenizer(toy / "model")
    args = SimpleNamespace(max_len=160, batch=1, data="x")
    rows = sft.tokenize(pairs, tokenizer, PromptStyle("verdict", "Judge A and B."), args)
    traces = [tokenizer.decode(row.trace) for row in rows]
    assert traces == [f"<answer>[[{p.label}]]</answer><|im_end|>" for p in pairs]
    assert any(parse(p.trace).verdict != p.label for p in pairs)


def test_a_toy_trace_that_is_asked_for_less_has_its_verdict_still():
    for i in range(50):
        pair = T.make_pair(0, "sft", i)
        for trace in (T.think(pair), T.look(pair, "A")):
            whole = parse(trace)
            some, less = (
                parse(T.for_protocol(trace, "rubrics")),
                parse(T.for_protocol(trace, "plain")),
            )
            assert some.rubric and not some.type and not some.solution
            assert not less.rubric and not less.solution and not less.type
            assert (
                some.verdict == less.verdict == whole.verdict
                and some.eval == less.eval == whole.eval
            )


def test_one_style_is_of_the_training_pairs_only(tmp_path):
    run(
        "data/toy.py",
        "--out",
        tmp_path,
        "--sft",
        64,
        "--rl",
        64,
        "--test",
        16,
        "--hidden",
        32,
        "--style",
        1,
    )
    styles = {
        split: {
            (p.meta["style_a"], p.meta["style_b"])
            for p in pairs.read_pairs(tmp_path / f"{split}.jsonl")
        }
        for split in ("sft", "rl", "test")
    }
    assert styles["sft"] == styles["rl"] == {(1, 1)} and len(styles["test"]) > 3


# ---------------------------------------------------------------- the plan


def stages(plan, seed=0):
    base, variants = ablate.read_plan((ROOT / "assets" / plan).read_text().splitlines())
    chains = ablate.chains_of(variants, base, [seed], "runs/no-such-folder")
    return {name: by_seed[seed] for name, by_seed in chains.items()}


@pytest.mark.parametrize("plan", ["ablations.txt", "ablations-7b.txt"])
def test_every_command_of_a_plan_is_one_that_its_script_takes(plan, monkeypatch):
    seen = set()
    for command in {stage.command for chain in stages(plan).values() for stage in chain}:
        words = shlex.split(command)
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script = words[place]
        monkeypatch.setattr(sys, "argv", words[place:])
        if script == "data/toy.py":
            # What comes after the flags
            monkeypatch.setattr(T, "lock_folder", lambda out: sys.exit(77))
            with pytest.raises(SystemExit, match="77"):
                T.main()
        elif script.startswith("forks/"):
            # A fork changes grpo.py inside its main, so it gets a process, and fails after its flags.
            done = run(*words[place:], ok=False)
            assert done.returncode == 2 and "no-such-folder" in done.stderr, done.stderr
        else:
            {"sft.py": sft, "grpo.py": grpo, "eval.py": E}[script].arguments()
        seen.add(script)
    assert seen >= {"sft.py", "grpo.py", "eval.py"}


def test_the_plan_has_every_variant_of_the_objective():
    commands = " ".join(s.command for chain in stages("ablations.txt").values() for s in chain)
    flags = ("clip", "beta", "reward", "advantage", "loss-mean", "engine-cap")
    forks = ("gspo", "cispo", "dynamic_sampling", "both_orders", "overlong")
    wanted = [f" --{flag} " for flag in flags] + [f" forks/{fork}.py " for fork in forks]
    assert not [words for words in wanted if words not in commands]


def test_a_plan_of_one_seed_takes_at_most_100_minutes():
    unique = {s.folder for chain in stages("ablations.txt").values() for s in chain}
    kinds = [folder.rpartition("/")[2].split("-")[0] for folder in unique]
    assert (
        kinds.count("sft") < len(kinds) / 4
        and sum(ablate.STAGE_SECONDS[k] for k in kinds) < 100 * 60
    )


def test_equal_commands_are_one_folder_and_others_are_not():
    chains = stages("ablations.txt")
    base, kl = chains["base"], chains["no KL"]
    assert base[:2] == kl[:2] and base[2].folder != kl[2].folder and base[3].folder != kl[3].folder
    assert kl[2].folder in kl[3].command and set(kl[3].needs) == {kl[2].folder, kl[0].folder}
    assert stages("ablations.txt", 1)["base"][0].folder != base[0].folder


def test_a_flag_takes_the_place_of_the_one_that_was_there():
    was = "python -m x --nproc 2 grpo.py --clip 0.2 0.2 --beta 1 --clip-more --lr 3"
    assert ablate.change_command(was, "--clip 0.1 0.3 --beta 0") == (
        "python -m x --nproc 2 grpo.py --clip-more --lr 3 --clip 0.1 0.3 --beta 0"
    )
    assert (
        ablate.change_command(was, "mine/fork.py --new")
        == was.replace("grpo.py", "mine/fork.py") + " --new"
    )


# ---------------------------------------------------------------- a tiny plan, with stand-ins

TRAIN = """
import json, sys, time
from pathlib import Path
flag = lambda name, default=None: sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default
out = Path(flag("--out")); out.mkdir(exist_ok=True)
with open(out / "starts", "a") as f: f.write("once\\n")
steps = len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").exists() else 0
if "--broken" in sys.argv: sys.exit("ValueError: it broke")
for step in range(steps, 4):
    with open(out / "metrics.jsonl", "a") as f: f.write(json.dumps({"step": step, "tokens": 1000}) + "\\n")
    time.sleep(float(flag("--pause", 0)))
(out / "model").write_text(flag("--skill", "0.5"))
"""

JUDGE = """
import json, random, sys
from pathlib import Path
flag = lambda name, default=None: sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default
out = Path(flag("--out")); out.mkdir(exist_ok=True)
skill, rng = float(Path(flag("--model")).read_text()), random.Random(flag("--seed"))
with open(out / "starts", "a") as f: f.write("once\\n")
lines, pairs = [], []
for i in range(200):
    draw = rng.random()
    pairs.append({"id": f"test/{i}", "bench": "test", "item": str(i), "subset": "", "type": "chat",
                  "source": "", "compare": [0, 1], "swap": False, "context": [], "a": "a", "b": "b",
                  "label": "A"})
    lines += [{"id": f"test/{i}", "order": 0, "swap": False, "temperature": t, "vote": 0, "label": "A",
               "verdict": "A" if draw + t / 10 < skill else "B", "reason": "", "official": "A", "tokens": 20,
               "rubric": [], "quotes": [0, 0], "text": ""} for t in (0.0, 1.0)]
for name, rows in (("pairs", pairs), ("judgments", lines)):
    (out / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\\n" for x in rows))
(out / "config.json").write_text('{"format": FORMAT}')
""".replace("FORMAT", str(report.EVALUATION_FORMAT))


@pytest.fixture
def tiny(tmp_path):
    """-> the arguments of a plan of two variants, whose scripts are stand-ins"""
    for name, text in (("train.py", TRAIN), ("fork.py", TRAIN), ("judge.py", JUDGE)):
        (tmp_path / name).write_text(text)
    py = f"{sys.executable} {tmp_path}"
    (tmp_path / "plan.txt").write_text(
        f"{py}/train.py --seed {{seed}} --out @/sft\n"
        f"{py}/train.py --model @/sft/model --skill 0.6 --pause 0.1 --out @/grpo\n"
        f"{py}/judge.py --seed {{seed}} --model @/grpo/model --out @/eval\n"
        "all: grpo --steps 9\nbase:\nbetter: grpo --skill 0.9\n"
    )
    return ["--plan", tmp_path / "plan.txt", "--out", tmp_path / "out", "--seeds", 0, 1]


def starts(out):
    return {p.parent.name: len(p.read_text().split()) for p in out.glob("*/starts")}


def rows_of(out):
    return {r["name"]: r for r in map(json.loads, (out / "rows.jsonl").read_text().splitlines())}


def test_a_killed_plan_goes_on_and_shares_what_is_common(tiny, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "tools/ablate.py", *map(str, tiny)]
    first = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    until = time.time() + 60
    while not list(out.glob("grpo-*/metrics.jsonl")) and time.time() < until:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    assert first.wait(20) != 0
    (killed,) = filter(Path.is_dir, out.glob("grpo-*"))
    assert (
        not list(out.glob("grpo-*.done"))
        and len((killed / "metrics.jsonl").read_text().split("\n")) < 5
    )
    call(ablate, *tiny)
    counts = starts(out)
    assert counts.pop(killed.name) == 2 and set(counts.values()) == {1}
    assert sorted(x.split("-")[0] for x in counts) == ["eval"] * 4 + ["grpo"] * 3 + ["sft"] * 2
    assert len((killed / "metrics.jsonl").read_text().splitlines()) == 4
    rows = rows_of(out)
    greedy = rows["better"]["accuracy"]["0.0"]
    each = [
        report.measure(report.read_run(s))["test"]["accuracy"]["greedy"]
        for s in (re.search(r"--out (\S+)$", c[-1])[1] for c in rows["better"]["commands"].values())
    ]
    assert greedy["value"] == pytest.approx(sum(each) / 2) and greedy["std"] > 0
    low, high = greedy["interval"]
    assert (
        0 < low < greedy["difference"] < high < 0.5
        and "difference" not in rows["base"]["accuracy"]["0.0"]
    )
    assert rows["better"]["tokens learned"] == 8000 and rows["better"]["commits"]
    assert (out / "table.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{greedy['value']:.3f} ± " in (out / "table.md").read_text()
    call(ablate, *tiny)
    assert starts(out) == counts | {killed.name: 2}  # what is done stays done


def test_a_launcher_gets_what_can_start_now(tiny, tmp_path):
    waves = []
    while lines := call(ablate, *tiny, "--print").stdout.splitlines():
        waves.append(len(lines))
        for line in lines:
            subprocess.run(["bash", "-c", line], check=True, cwd=ROOT)
    assert waves == [2, 4, 4] and set(starts(tmp_path / "out").values()) == {1}
    call(ablate, *tiny, "--table")
    assert rows_of(tmp_path / "out")["better"]["seeds"] == [0, 1]


def test_a_fork_is_its_script_and_a_failure_is_a_row(tiny, tmp_path):
    more = [
        "--variant",
        f"fork: grpo {tmp_path}/fork.py --skill 0.7",
        "--variant",
        "broken: grpo --broken",
        "--variant",
        "later: sft --seed 7",
    ]
    tiny[-2:] = [0]
    done = call(ablate, *tiny, *more, "--only", "fork", "broken", "base", ok=False)
    rows = rows_of(tmp_path / "out")
    assert done.returncode == 1 and rows["broken"]["status"] == "not ended: ValueError: it broke"
    assert "later" not in rows, "the table is of what was asked for"
    fork, base = (rows[name]["commands"]["0"][1] for name in ("fork", "base"))
    assert (
        "fork.py" in fork and "train.py" not in fork and "train.py" in base and "--steps 9" in fork
    )
    assert rows["fork"]["accuracy"]["0.0"]["difference"] > 0
    assert "not ended: ValueError" in (tmp_path / "out" / "table.md").read_text()
    (tmp_path / "fork.py").write_text(TRAIN + "# edited")
    assert "fork.py" in call(ablate, *tiny, *more, "--only", "fork", "base", "--print").stdout


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("no changes", "not NAME: changes"),
        ("base: grpo --x", "two variants"),
        ("x: foo --y", "no command of the base"),
        ("x: at eval-foo", "no command"),
        ("x: grpo nowhere.py --y", "x nowhere.py: no such file"),
        ("x: against y", "y: no such variant"),
    ],
)
def test_a_bad_variant_gets_a_sentence(tiny, line, complaint):
    done = call(ablate, *tiny, "--variant", line, ok=False)
    assert done.returncode == 2 and complaint in done.stderr and len(done.stderr.splitlines()) == 1
