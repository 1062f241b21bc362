"""A run's folder is its own: not continued as another, not shared, not lost; and what a run says when it ends."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from conftest import ROOT, call, environment, metrics, run, save_qwen2
from lib import chat, checkpoint, files, model_files
from lib import dist as R
from lib import policy as P
from lib import run as lib_run
from lib.files import Failure

SFT = ("--dtype", "float32", "--no-recompute", "--batch", 16, "--max-len", 160, "--save-every", 2)


@pytest.fixture
def settings(tmp_path):
    """What open_run wants: a run's flags, its model's folder, its pairs and how they are asked."""
    save_qwen2(tmp_path / "m", True)
    args = SimpleNamespace(
        out=str(tmp_path / "out"),
        model=str(tmp_path / "m"),
        data="one.jsonl",
        lr=1e-3,
        seed=1,
        steps=4,
        micro_tokens=100,
        save_every=1,
        timeout=60,
    )
    return args, tmp_path / "m", ["a pair"], {"protocol": "instruct"}


def begun(args, *more):
    """A run that has made a checkpoint and a line of metrics."""
    config = lib_run.open_run(args, *more)
    out = R.Path(args.out)
    (out / "config.json").write_text(json.dumps(config))
    (out / "state/step_000002").mkdir(parents=True, exist_ok=True)
    (out / "metrics.jsonl").write_text('{"step": 0}\n')
    return out


def test_the_same_run_goes_on_with_more_ranks_tokens_and_steps(settings):
    args, *more = settings
    begun(args, *more)
    lib_run.open_run(
        SimpleNamespace(
            **vars(args)
            | {"steps": 9, "micro_tokens": 7, "save_every": 5, "timeout": 1, "data": "moved.jsonl"}
        ),
        *more,
    )


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda a: a[0].__setattr__("lr", 1e-2), "another lr (0.001, now 0.01)"),
        (lambda a: a[0].__setattr__("seed", 2), "another seed (1, now 2)"),
        (lambda a: a.__setitem__(2, ["other pair"]), "another pairs_digest"),
        (lambda a: a.__setitem__(3, {"protocol": "reasoning"}), "another judge"),
        (lambda a: save_qwen2(a[1], True, std=0.2), "another weights"),
    ],
    ids=["lr", "seed", "data", "prompts", "model"],
)
def test_another_run_in_its_place_is_refused(change, complaint, settings, capsys):
    settings = list(settings)
    out = begun(*settings)
    change(settings)
    with pytest.raises(Failure) as stop:
        lib_run.open_run(*settings)
    assert f"holds a run with {complaint}" in str(stop.value)
    assert (out / "metrics.jsonl").read_text() == '{"step": 0}\n'


@pytest.mark.parametrize(
    "key, value", [("format", 1), ("format", None), ("mini_batch", 8), ("gone", 3)]
)
def test_a_run_with_other_keys_is_refused(key, value, settings):
    """Of another version of this project, or with a setting that only one of the two has."""
    out = begun(*settings)
    config = json.loads((out / "config.json").read_text()) | {key: value}
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(Failure, match="another version" if key == "format" else f"another {key}"):
        lib_run.open_run(*settings)


@pytest.mark.parametrize(
    "edit, complaint", [(False, "another script "), (True, "another script_digest")]
)
def test_a_fork_goes_on_in_its_own_folder_only(edit, complaint, settings, tmp_path, monkeypatch):
    fork = tmp_path / "mine.py"
    fork.write_text("import grpo")
    monkeypatch.setattr(sys, "argv", [str(fork)])
    begun(*settings)
    lib_run.open_run(*settings)
    if edit:
        fork.write_text("import grpo  # edited")
    else:
        monkeypatch.setattr(sys, "argv", [str(ROOT / "grpo.py")])
    with pytest.raises(Failure, match=complaint):
        lib_run.open_run(*settings)


def test_a_models_folder_is_no_place_for_a_run(settings):
    """Its config.json stays."""
    args, folder, *more = settings
    before = (folder / "config.json").read_text()
    args.out = str(folder)
    with pytest.raises(Failure, match="its config.json is not of a run"):
        lib_run.open_run(args, folder, *more)
    assert (folder / "config.json").read_text() == before


def test_an_evaluation_is_no_place_for_a_run(settings):
    args, *more = settings
    out = R.Path(args.out)
    out.mkdir(parents=True)
    (out / "judgments.jsonl").write_text("{}\n")
    with pytest.raises(Failure, match="holds an evaluation"):
        lib_run.open_run(args, *more)


def test_a_model_is_neither_overwritten_nor_its_own_beginning(settings, capsys):
    args, folder, *more = settings
    out = R.Path(args.out)
    shutil.copytree(folder, out / "model")
    for start, complaint in (
        (folder, "holds a finished run, without a checkpoint to go on from"),
        (out / "model", "its model is the one that this run starts from"),
    ):
        with pytest.raises(Failure) as stop:
            lib_run.open_run(args, start, *more)
        assert complaint in str(stop.value)
    assert (out / "model/model.safetensors").exists()


def test_a_folder_has_one_run_and_a_killed_one_leaves_no_lock(tmp_path):
    """Also against a second process; an end by SIGKILL frees it."""
    hold = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from lib import files; files.lock_folder(sys.argv[2]); "
        "print('mine', flush=True); time.sleep(100)"
    )
    start = lambda: subprocess.Popen(
        [sys.executable, "-c", hold, str(ROOT), str(tmp_path / "out")],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    first = start()
    assert first.stdout.readline() == "mine\n"
    second = start()
    assert second.wait(20) and "another run is writing there" in second.stderr.read()
    first.kill()
    first.wait()
    third = start()
    assert third.stdout.readline() == "mine\n"
    third.kill()


@pytest.mark.parametrize("out", ["a file", "a file/below", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_gets_a_sentence(out, tmp_path, capsys):
    (tmp_path / "a file").write_text("x")
    with pytest.raises(Failure) as stop:
        files.lock_folder(tmp_path / out)
    assert "cannot be" in str(stop.value)


def test_training_refuses_another_run_before_it_loads(toy, tmp_path):
    """Through the script: another learning rate, fewer steps than there are, the same again, more epochs."""
    common = (
        "sft.py",
        *SFT,
        "--model",
        toy / "model/config.json",
        "--data",
        toy / "sft.jsonl",
        "--out",
        tmp_path / "out",
    )
    done = run(*common, "--epochs", 0.5, "--lr", 1e-3)
    assert "leaked" not in done.stderr, "an ending that looks like a failure"
    before = metrics(tmp_path / "out")
    assert len(before) == 8
    for more, complaint in (
        (("--lr", 1e-2), "another lr (0.001, now 0.01)"),
        (("--lr", 1e-3, "--epochs", 0.25), "has made 8 steps already, and this one is to have 4"),
    ):
        done = run(*common, *(("--epochs", 0.5) if "--epochs" not in more else ()), *more, ok=False)
        assert done.returncode == 2 and complaint in done.stderr and "Traceback" not in done.stderr
        assert metrics(tmp_path / "out") == before
    run(*common, "--epochs", 0.75, "--lr", 1e-3)
    assert [r["step"] for r in metrics(tmp_path / "out")] == list(range(12))


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "harm",
    [
        lambda s: (s / ".metadata").unlink(),
        lambda s: (s / ".metadata").write_bytes(b"cut"),
        lambda s: next(s.glob("*.distcp")).unlink(),
        lambda s: os.truncate(next(s.glob("*.distcp")), 100),
    ],
    ids=["no table", "table cut", "part gone", "part cut"],
)
def test_a_damaged_checkpoint_is_named(harm, ranks, tmp_path, capsys):
    """With the one to go on from; folders by other names are nobody's checkpoints."""
    save_qwen2(tmp_path / "m", True)
    policy = P.load_policy(tmp_path / "m", ranks[2], torch.float32)
    state = checkpoint.Checkpoints(
        policy, P.adamw(policy, 1e-2, (0.9, 0.95), 0.1), tmp_path / "state"
    )
    for step in (1, 2):
        state.save(step)
    assert state.settle()
    for name in ("step_backup", "step_000009_old", "step_000007.tmp"):
        (tmp_path / "state" / name).mkdir()
    harm(tmp_path / "state/step_000002")
    with pytest.raises(Failure) as stop:
        state.load()
    said = str(stop.value)
    assert f"{tmp_path}/state/step_000002: this checkpoint is damaged" in said
    assert f"remove it to go on from {tmp_path}/state/step_000001" in said
    shutil.rmtree(tmp_path / "state/step_000002")
    assert state.load() == 1


def test_a_checkpoint_of_another_model_says_what_differs(ranks, tmp_path):
    """A slip in our own code is not taken for a damaged checkpoint."""
    save_qwen2(tmp_path / "m", True)
    config = tmp_path / "m/config.json"

    def checkpoints():
        policy = P.load_policy(config, ranks[2], torch.float32)
        optim = P.adamw(policy, 1e-2, (0.9, 0.95), 0.1)
        return checkpoint.Checkpoints(policy, optim, tmp_path / "state")

    first = checkpoints()
    first.save(1)
    assert first.settle()
    spoil_config(intermediate_size=64)(tmp_path / "m")
    with pytest.raises(Failure) as stop:
        checkpoints().load()
    assert "or of another model (ValueError: Size mismatch" in str(stop.value)
    assert stop.value.__cause__ is not None

    first.parts = lambda: None.slip
    with pytest.raises(AttributeError):
        first.load()


# ---------------------------------------------------------------- patience and memory


def test_no_group_gives_up_before_the_watch_does(ranks):
    """Groups begin with the 30 minutes of their library, those of the checkpoints' writers too."""
    group = dist.new_group(backend="gloo")
    limit = lambda g: g._get_backend(torch.device("cpu")).options._timeout
    assert limit(group) < timedelta(hours=1)
    R.be_patient()
    assert limit(group) == limit(dist.group.WORLD) == timedelta(days=7)


def test_peak_gib_is_the_most_that_the_card_has_held_at_the_end_of_a_phase(
    ranks, tmp_path, monkeypatch
):
    """By whoever: 20, 70 (vLLM beside the trainer), 30 of 80 GiB in use."""
    held = iter([20, 70, 30, 30])
    monkeypatch.setattr(R, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: ((80 - next(held)) * 2**30, 80 * 2**30))
    log = lib_run.RunLog(tmp_path, 0, {})
    for name in ("learn", "sample", "score"):
        log.phase(name)
    log.write({"step": 0})
    assert metrics(tmp_path)[0]["peak_gib"] == 70


def test_an_old_torch_gets_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu128")
    with pytest.raises(Failure) as stop:
        R.start_ranks()
    assert "torch 2.11.0+cu128: 2.13 or newer is needed" in str(stop.value)


def test_more_ranks_than_cards_get_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(R, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(Failure) as stop:
        R.start_ranks()
    assert "8 ranks on a machine with 1 cards" in str(stop.value)


# ---------------------------------------------------------------- models on disk


def spoil_config(**more):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | more))

    return spoil


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (
            lambda m: (m / "config.json").write_text('{"model_type": "qwen2", '),
            "its config.json cannot be read",
        ),
        (spoil_config(model_type="nobody"), "its config.json cannot be read"),
        (
            spoil_config(quantization_config={"quant_method": "gptq", "bits": 4}),
            "its weights are quantized",
        ),
        (lambda m: os.truncate(m / "model.safetensors", 1000), "its weights cannot be read"),
        (
            spoil_config(intermediate_size=64),
            "has the shape (96, 128), its config.json says (64, 128)",
        ),
    ],
)
def test_a_model_that_cannot_be_loaded_gets_a_sentence(spoil, complaint, ranks, tmp_path, capsys):
    save_qwen2(tmp_path / "m", False)
    spoil(tmp_path / "m")
    with pytest.raises(Failure) as stop:
        P.load_policy(tmp_path / "m", ranks[2], torch.float32)
    said = str(stop.value)
    assert complaint in said


@pytest.mark.parametrize(
    "lost", ["model.layers.0.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.bias"]
)
def test_a_judge_whose_weights_lack_a_tensor_is_not_asked(lost, toy, tmp_path, capsys):
    """vLLM takes a merged matrix for loaded once a part of it is, and would judge with what is in memory."""
    from safetensors.torch import load_file, save_file

    from judge.backends import LocalBackend

    save_qwen2(tmp_path / "m", False)
    for file in {*(toy / "model").iterdir()} - {toy / "model/config.json"}:
        shutil.copy(file, tmp_path / "m")
    weights = load_file(tmp_path / "m/model.safetensors")
    model_files.check_weights("m", tmp_path / "m")
    del weights[lost]
    save_file(weights, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Failure) as stop:
        LocalBackend(str(tmp_path / "m"), 8)
    assert f"lack 1 tensors, the first is {lost}" in str(stop.value)
    save_file(
        weights | {"a_name_of_its_own": weights["lm_head.weight"].clone()},
        tmp_path / "m/model.safetensors",
        metadata={"format": "pt"},
    )
    model_files.check_weights("m", tmp_path / "m")


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda m: (m / "tokenizer.json").unlink(), "does not give a text back"),
        (lambda m: (m / "tokenizer.json").write_text("{"), "no usable tokenizer"),
        (lambda m: (m / "generation_config.json").write_text('{"eos'), "not a JSON object"),
    ],
)
def test_a_tokenizer_that_lost_its_words_is_refused(spoil, complaint, toy, tmp_path, capsys):
    shutil.copytree(toy / "model", tmp_path / "m")
    chat.load_tokenizer(tmp_path / "m")
    spoil(tmp_path / "m")
    with pytest.raises(Failure) as stop:
        chat.load_tokenizer(tmp_path / "m")
    assert complaint in str(stop.value)


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "kind, args, good, bad",
    [
        (int, (1,), ["1", "7"], ["0", "-1", "1.5", "nan", "", "x"]),
        (float, (0, 1), ["0", "1", ".5"], ["-0.1", "1.1", "nan", "inf", "x"]),
        (float, (0, float("inf"), True), ["1e-9", "3"], ["0", "-1", "nan", "inf", "1e999"]),
    ],
)
def test_numbers_have_ranges(kind, args, good, bad):
    read = files.number(kind, *args)
    assert [read(x) for x in good] == [kind(x) for x in good]
    for x in bad:
        with pytest.raises(files.argparse.ArgumentTypeError):
            read(x)


@pytest.mark.parametrize(
    "script, flag, value",
    [
        *(
            ("sft", f, v)
            for f, v in (
                ("--grad-clip", -1),
                ("--grad-clip", 0),
                ("--lr", "nan"),
                ("--lr", -1),
                ("--betas", "1 1"),
                ("--epochs", "inf"),
                ("--warmup", "nan"),
                ("--batch", 0),
                ("--weight-decay", -1),
                ("--seed", -1),
                ("--save-every", -1),
                ("--timeout", -1),
                ("--max-bad", 0),
                ("--max-len", 0),
                ("--micro-tokens", 0),
                ("--shard", 0),
            )
        ),
        *(
            ("grpo", f, v)
            for f, v in (
                ("--lr", "inf"),
                ("--beta", "nan"),
                ("--clip", "nan nan"),
                ("--steps", 0),
                ("--steps", -1),
                ("--engine-cap", -1),
                ("--tp", 0),
                ("--val-every", 0),
                ("--max-response", 0),
                ("--batch", 0),
                ("--mini-batch", 0),
                ("--group-size", 0),
                ("--engine-memory", 2),
                ("--max-mismatch", "nan"),
                ("--timeout", 0),
            )
        ),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_flag(script, flag, value):
    import importlib

    done = call(importlib.import_module(script), flag, *str(value).split(), ok=False)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {flag}: "), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_traces_longer_than_the_window_are_not_trained_on(toy, tmp_path):
    import sft

    done = call(
        sft,
        "--model",
        toy / "model/config.json",
        "--data",
        toy / "sft.jsonl",
        "--max-len",
        257,
        "--out",
        tmp_path / "out",
        ok=False,
    )
    assert (
        done.returncode == 2
        and "--max-len 257: more than the model's window of 256 tokens" in done.stderr
    )


# ---------------------------------------------------------------- Ctrl-C


def test_ctrl_c_saves_and_a_second_one_ends(monkeypatch, capsys):
    monkeypatch.setattr(R, "SIGNALS", [])
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        R.catch_signals()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert R.SIGNALS == ["SIGINT"] and "ends after this step" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_what_is_not_finite_is_null_in_a_log_that_goes_on(ranks, tmp_path):
    """In the lines of a run that diverges, and in those that an older version of it has left."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": NaN, "norms": [Infinity]}\n')
    log = lib_run.RunLog(tmp_path, 1, {})
    log.write({"step": 1, "loss": math.nan}, [math.inf])
    log.append("samples.jsonl", [{"step": 1, "reward": -math.inf}])
    lines = (tmp_path / "metrics.jsonl").read_text() + (tmp_path / "samples.jsonl").read_text()
    first, second, sample = (
        json.loads(line, parse_constant=pytest.fail) for line in lines.splitlines()
    )
    assert first == {"step": 0, "loss": None, "norms": [None]}
    assert second["loss"] is None and sample["reward"] is None
    assert log.bad_updates == 1 and log.diverged(1, last=False)
    assert log.headline("loss") == {"loss": "nan"}


def test_a_folder_with_nothing_but_a_lock_takes_the_next_run(settings):
    """As a run leaves it that ended before its first step."""
    args, *more = settings
    lib_run.open_run(args, *more)
    assert [path.name for path in R.Path(args.out).iterdir()] == [".lock"]
    files.LOCKED.clear()
    lib_run.open_run(args, *more)


@pytest.mark.parametrize("name", lib_run.TRACKERS)
def test_log_to_a_library_that_is_not_installed_gets_a_sentence(name, settings, monkeypatch):
    args, *more = settings
    args.log_to = name
    monkeypatch.setitem(sys.modules, name, None)  # as Python has it for what cannot be imported
    with pytest.raises(Failure, match=f"--log-to {name}: .*pip install {name}"):
        lib_run.open_run(args, *more)


def test_log_to_may_change_when_a_run_goes_on(settings):
    args, *more = settings
    config = lib_run.open_run(args, *more)
    out = R.Path(args.out)
    (out / "config.json").write_text(json.dumps(config | {"log_to": "wandb", "log_id": "x"}))
    (out / "metrics.jsonl").write_text('{"step": 0}\n')
    (out / "state/step_000002").mkdir(parents=True)
    lib_run.open_run(args, *more)
