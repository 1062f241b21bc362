"""Variants, seeds and their table; and what the paper's ablations ask for instead of the whole prompt."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import distill
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


def plan_of(name):
    return ablate.read_plan((ROOT / "assets" / name).read_text().splitlines())


def stages(plan, seed=0):
    chains = ablate.chains_of(plan_of(plan), [seed], "runs/no-such-folder")
    return {name: by_seed[seed] for name, by_seed in chains.items()}


@pytest.mark.parametrize(
    "plan", ["ablations.txt", "ablations-7b.txt", "reasons.txt", "criteria.txt"]
)
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
            scripts = {"sft.py": sft, "grpo.py": grpo, "eval.py": E, "data/distill.py": distill}
            scripts[script].arguments()
        seen.add(script)
    assert seen >= {"sft.py", "grpo.py", "eval.py"}


def test_the_plan_has_every_variant_of_the_objective():
    commands = " ".join(s.command for chain in stages("ablations.txt").values() for s in chain)
    flags = ("clip", "beta", "reward", "advantage", "loss-mean", "engine-cap")
    forks = ("gspo", "cispo", "dynamic_sampling", "both_orders", "overlong")
    wanted = [f" --{flag} " for flag in flags] + [f" forks/{fork}.py " for fork in forks]
    assert not [words for words in wanted if words not in commands]


@pytest.mark.parametrize(
    "name, seeds, limit", [("ablations.txt", [0], 100), ("reasons.txt", [2, 3, 4], 60)]
)
def test_a_plan_takes_no_longer_than_its_page_says(name, seeds, limit):
    plan = plan_of(name)
    chains = ablate.chains_of(plan, seeds, "runs/no-such-folder")
    unique = {s.folder for row in chains.values() for chain in row.values() for s in chain}
    kinds = [folder.rpartition("/")[2].split("-")[0] for folder in unique]
    minutes = sum(plan.seconds[kind] for kind in kinds) / 60 / plan.at_once
    assert kinds.count("sft") < len(kinds) / 4 and minutes < limit


def flags_of_command(command):
    """{flag: its values}"""
    words = re.split(r" (?=--[a-z])", command.partition(".py ")[2])
    return {flag: values for flag, _, values in (word.partition(" ") for word in words)}


def test_the_plan_of_reasons_trains_and_judges_as_the_demo_does():
    """Else a row of docs/reasons.md is not comparable with one of docs/results.md."""
    demo = {re.search(r"--out @/([\w-]+)", line)[1]: line for line in ablate.demo_commands(3)}
    mine = {re.search(r"--out @/([\w-]+)", line)[1]: line for line in plan_of("reasons.txt").base}
    for stage, differ in {
        "sft": set(),
        "grpo": {"--mini-batch", "--val-data", "--val-every"},
        "eval-grpo": set(),
    }.items():
        ours, theirs = (
            flags_of_command(x[stage].replace("{seed}", "3").replace("@/rl/", "@/data/"))
            for x in (mine, demo)
        )
        found = {flag for flag in {*ours, *theirs} if ours.get(flag) != theirs.get(flag)}
        assert found == differ, stage


def test_rows_that_differ_in_the_pairs_of_grpo_share_the_sft_judge():
    chains = stages("reasons.txt", 2)
    sft_of = {
        name: [s.folder for s in chain if "/sft-" in s.folder] for name, chain in chains.items()
    }
    shared = {tuple(sft_of[name]) for name in ("verdict", "sound", "parting 5 %", "tenth known")}
    assert len(shared) == 1 and sft_of["no slips, verdict"] != sft_of["verdict"]


def test_a_row_may_run_with_the_first_seeds_only():
    chains = ablate.chains_of(plan_of("reasons.txt"), [2, 3, 4], "runs/no-such-folder")
    for row in ("verdict", "sound", "SFT", "more SFT", "random", "well-formed", "pooled orders"):
        assert list(chains[row]) == [2, 3, 4], row
    assert list(chains["parting 2 %"]) == [2]


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


def rows_of_file(path):
    return {row["name"]: row for row in map(json.loads, path.read_text().splitlines())}


def rows_of(out):
    return rows_of_file(out / "rows.jsonl")


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
    greedy = rows["better"]["numbers"]["greedy accuracy"]
    each = [
        report.measure(report.read_run(s))["test"]["accuracy"]["greedy"]
        for s in (re.search(r"--out (\S+)$", c[-1])[1] for c in rows["better"]["commands"].values())
    ]
    assert greedy["value"] == pytest.approx(sum(each) / 2) and greedy["std"] > 0
    low, high = greedy["interval"]
    assert (
        0 < low < greedy["difference"] < high < 0.5
        and "difference" not in rows["base"]["numbers"]["greedy accuracy"]
    )
    assert rows["better"]["tokens learned"] == 8000 and rows["better"]["commits"]
    assert (out / "table.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{greedy['value']:.3f} ± " in (out / "table.md").read_text()
    call(ablate, *tiny)
    assert starts(out) == counts | {killed.name: 2}  # what is done stays done


LOGGED = """
import os, sys, time
flag = lambda name: sys.argv[sys.argv.index(name) + 1]
def log(event):
    with open(flag("--log"), "a") as f: f.write(f"{event} {flag('--out')} {os.environ.get('OMP_NUM_THREADS')}\\n")
log("begin")
until = time.time() + 60
while open(flag("--log")).read().count("begin") < int(flag("--peers")) and time.time() < until: time.sleep(0.02)
log("end")
sys.exit("--broken" in sys.argv)
"""


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_stages_side_by_side_wait_for_their_needs(at_once, tmp_path, monkeypatch):
    (tmp_path / "stage.py").write_text(LOGGED)
    log = tmp_path / "log"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")

    def stage(name, *needs, more=""):
        folders = [f"{tmp_path}/{need}" for need in needs]
        out = f"{tmp_path}/{name}"
        # A stage waits until as many have begun as run side by side.
        command = f"python {tmp_path}/stage.py --log {log} --peers {at_once} --out {out}{more}"
        return ablate.Stage(out, command, folders)

    # The list may name a stage before those that it needs.
    waiting = [stage("c", "a", "b"), stage("a"), stage("b"), stage("x", more=" --broken")]
    waiting += [stage("y", "x"), stage("z", "y"), stage("d", "c")]
    ended = []
    ablate.run_stages(waiting, lambda: ended.append(1), at_once)
    running, done, most = set(), [], 0
    needs = {s.folder: s.needs for s in waiting}
    for line in log.read_text().splitlines():
        event, folder, threads = line.split()
        if event == "begin":
            assert set(needs[folder]) <= set(done)
            assert threads == ("1" if at_once > 1 else "7")
            running.add(folder)
            most = max(most, len(running))
        else:
            running.remove(folder)
            done.append(folder)
    assert [Path(f).name for f in sorted(done)] == ["a", "b", "c", "d", "x"], "y and z need x"
    assert most == at_once and len(ended) == 5
    assert not waiting[3].done() and waiting[-1].done()
    commit, code, seconds = waiting[-1].mark()
    assert re.fullmatch("[0-9a-f]{8}", code) and seconds < 60


def test_the_digest_of_the_code_is_that_of_all_files_but_the_tests(tmp_path):
    def git(*words):
        person = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        subprocess.run(["git", *person, *words], cwd=tmp_path, check=True, capture_output=True)

    def code_digest():
        command = ["bash", "-c", f"echo {ablate.CODE_DIGEST}"]
        return subprocess.check_output(command, cwd=tmp_path, text=True).strip()

    def edit(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return code_digest()

    git("init")
    edit(".gitignore", "runs/\n")
    edit("grpo.py", "1")
    git("add", ".")
    git("commit", "-m", "x")
    first = code_digest()
    assert edit("tests/test_x.py", "1") == first
    assert edit("runs/x.py", "1") == first
    assert edit("a.md", "1") == first
    assert edit("grpo.py", "2") != first
    assert edit("grpo.py", "1") == first

    untracked = edit("forks/a.py", "1")
    assert untracked != first
    assert edit("forks/a.py", "2") != untracked
    assert edit("forks/a.py", "1") == untracked
    git("add", ".")
    git("commit", "-m", "y")
    assert code_digest() == untracked, "to commit a file does not change it"


def test_a_kill_stops_all_that_run_and_both_go_on(tiny, tmp_path):
    out = tmp_path / "out"
    tiny += ["--at-once", 2]
    tiny[1].write_text(tiny[1].read_text().replace("--pause 0.1", "--pause 0.7"))
    command = [sys.executable, "tools/ablate.py", *map(str, tiny)]
    first = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    until = time.time() + 60
    while len(list(out.glob("grpo-*/metrics.jsonl"))) < 2 and time.time() < until:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    assert first.wait(20) != 0
    folders = [path for path in out.glob("grpo-*") if path.is_dir()]
    killed = {path.name for path in folders if not Path(f"{path}.done").exists()}
    assert len(killed) == 2
    before = {name: (out / name / "metrics.jsonl").stat().st_size for name in killed}
    time.sleep(0.5)
    assert before == {name: (out / name / "metrics.jsonl").stat().st_size for name in killed}
    call(ablate, *tiny)
    assert len(list(out.glob("*.done"))) == len(list(out.glob("*/starts"))) == 10
    for name in killed:
        assert len((out / name / "metrics.jsonl").read_text().splitlines()) == 4


def test_rows_make_the_same_table_as_runs(tiny, tmp_path):
    """Over the columns that the plan names, of which one has a paired interval."""
    plan, kept = tiny[1], tmp_path / "kept.jsonl"
    plan.write_text(
        plan.read_text()
        + "show: T=1 accuracy; T=1 source/x; no_verdict\njudges: better\nfirst: seeds 1\n"
    )
    call(ablate, *tiny)
    out = tmp_path / "out"
    table = (out / "table.md").read_text()
    heads = table.splitlines()[0].split(" | ")
    assert heads[2:6] == ["T=1 accuracy", "difference, 95 %", "T=1 source/x", "no verdict"]
    kept.write_bytes((out / "rows.jsonl").read_bytes())
    shutil.rmtree(out)
    call(ablate, *tiny, "--rows", kept)
    assert (out / "table.md").read_text() == table
    assert {p.name for p in out.glob("*.png")} == {"table.png", "judges.png"}
    rows = rows_of_file(kept)
    assert rows["first"]["seeds"] == [0] and rows["better"]["seeds"] == [0, 1]
    assert all(re.fullmatch("[0-9a-f]{8}", code) for row in rows.values() for code in row["code"])
    call(ablate, *tiny, "--rows", kept, "--only", "better")
    assert "| first |" not in (out / "table.md").read_text()
    done = call(ablate, *tiny, "--rows", tmp_path / "none", ok=False)
    assert done.returncode == 2 and "--rows" in done.stderr


def test_the_numbers_of_soundness_have_names_of_their_own():
    part = {
        "right": 0.8,
        "right_and_sound": 0.6,
        "unsound_of_right": 0.25,
        "faults": {"quotes": 0.25},
    }
    sound = {"T=1": part | {"checks": ["type"], "by_source": {"part": part | {"right": None}}}}
    numbers = ablate.other_numbers({"no_verdict": 0.1, "left_out": {}, "sound": sound})
    assert numbers == {
        "no_verdict": 0.1,
        "T=1 right": 0.8,
        "T=1 right_and_sound": 0.6,
        "T=1 unsound_of_right": 0.25,
        "T=1 faults": {"quotes": 0.25},
        "T=1 right_and_sound/part": 0.6,
        "T=1 unsound_of_right/part": 0.25,
        "T=1 faults/part": {"quotes": 0.25},
    }
    shares = [{"quotes": 0.25, "type": 0.1}, {"type": 0.5}]
    assert list(ablate.mean_number(shares).items()) == [("type", 0.3), ("quotes", 0.125)]
    assert ablate.value_cell({"shares": ablate.mean_number(shares)}) == "type 0.300, quotes 0.125"


def test_a_share_of_the_right_verdicts_is_compared_over_seeds(monkeypatch):
    """Of each seed's right verdicts half or all are unsound, and of the other judge's a quarter: in every resample."""

    def judge(part, whole):
        metric = {"": (1, dict.fromkeys(range(20), (part, whole)))}
        return ablate.Result({"T=1 unsound_of_right": ablate.as_one({"f": metric})}, {})

    none_right = ablate.Result({}, {})
    results = {"a0": judge(1, 2), "a1": judge(2, 2), "a2": none_right, "b": judge(1, 4)}
    monkeypatch.setattr(ablate, "read_result", results.get)
    mine = ((0, "a0"), (1, "a1"), (2, "a2"))
    other = tuple((seed, "b") for seed in range(3))
    name = "T=1 unsound_of_right"
    found = ablate.compare_over_seeds(name, mine, other)
    assert found["value"] == 0.75 and found["difference"] == 0.5
    assert found["interval"] == pytest.approx((0.5, 0.5))
    equal = ablate.compare_over_seeds(name, mine, mine)
    assert equal["difference"] == 0 and equal["interval"] == (0, 0)
    assert ablate.compare_over_seeds(name, mine[2:], other) == {}


def test_a_name_without_a_temperature_is_a_column_for_each():
    names = ["T=0.7 source/part", "greedy source/part", "T=10 source/part", "T=1 x", "tokens"]
    rows = [{"numbers": dict.fromkeys(names, {"value": 1})}]
    assert ablate.columns(["tokens", "source/part", "greedy x"], rows) == [
        "tokens",
        "greedy source/part",
        "T=0.7 source/part",
        "T=10 source/part",
        "greedy x",
    ]


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
    assert rows["fork"]["numbers"]["greedy accuracy"]["difference"] > 0
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
        ("x: seeds some", "x: seeds some: expected a whole number"),
        ("at-once: 0", "at-once 0: expected a whole number"),
        ("judges: z", "z: no such variant"),
    ],
)
def test_a_bad_variant_gets_a_sentence(tiny, line, complaint):
    done = call(ablate, *tiny, "--variant", line, ok=False)
    assert done.returncode == 2 and complaint in done.stderr and len(done.stderr.splitlines()) == 1
