"""The released checkpoints in one line: their style from a table, their system prompt from a row on the hub.

Nothing here has seen the hub: a folder laid out as its cache stands in for it.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import datasets
import pytest
from datasets.arrow_writer import ArrowWriter

import eval as evaluation
import rmr1
import serve.__main__ as serving
from conftest import ROOT, environment
from lib import model_files
from lib.files import Failure
from rubrics import RELEASED, PromptStyle, prompt_style

INSTRUCT = "gaotang/RM-R1-Qwen2.5-Instruct-7B"
REASONING = "gaotang/RM-R1-DeepSeek-Distilled-Qwen-7B"
ROW = {
    "context_messages": [
        {"role": "system", "content": "Judge as published."},
        {"role": "user", "content": "q"},
    ],
    "winner": "a trace",
    "ground_truth": "model_a",
}
PUBLISHED = PromptStyle("instruct", "Judge as published.")


@pytest.fixture
def rows_at_hand(monkeypatch):
    """The dataset can be had. -> what was asked of `datasets`"""
    asked = []

    def load_dataset(name, split, revision):
        asked.append((name, split, revision))
        return datasets.Dataset.from_list([ROW])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def fill_cache(home):
    """A folder as the hub's cache is after both were downloaded: a model's settings, and the rows."""
    snapshot = home / "hub/models--gaotang--RM-R1-Qwen2.5-Instruct-7B/snapshots/0a1b"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0a1b")

    builder = home / "datasets/gaotang___rm-r1-distill-sft/default/0.0.0/0a1b"
    builder.mkdir(parents=True)
    features = datasets.Dataset.from_list([ROW]).features
    writer = ArrowWriter(features=features, path=str(builder / "rm-r1-distill-sft-train.arrow"))
    writer.write(ROW)
    count, size = writer.finalize()
    train = {"name": "train", "num_bytes": size, "num_examples": count}
    info = {
        "builder_name": "parquet",
        "dataset_name": "rm-r1-distill-sft",
        "config_name": "default",
        "version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0},
        "splits": {"train": train | {"dataset_name": "rm-r1-distill-sft"}},
        "features": features.to_dict(),
    }
    (builder / "dataset_info.json").write_text(json.dumps(info))


ASK = """
from lib.model_files import find_model
from rubrics import prompt_style
folder = find_model({name!r}, weights=False)
print(prompt_style(folder, {name!r}))
"""


def test_from_the_hubs_cache_without_a_network(tmp_path):
    fill_cache(tmp_path)
    offline = environment() | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ASK.format(name=INSTRUCT)]
    said = subprocess.check_output(command, cwd=ROOT, env=offline, text=True)
    assert said.strip() == repr(PUBLISHED)


def test_without_the_rows_the_sentence_says_how_to_bring_one(tmp_path, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(Failure) as stop:
        prompt_style(None, INSTRUCT)
    said = str(stop.value)
    assert "gaotang/RM-R1-Distill-SFT@main" in said and "--system-prompt FILE.jsonl" in said
    assert "\n" not in said

    brought = tmp_path / "row.jsonl"
    brought.write_text(json.dumps(ROW) + "\n")
    assert prompt_style(None, INSTRUCT, system_file=str(brought)) == PUBLISHED


def test_rows_without_a_system_message_are_refused(monkeypatch):
    rows = datasets.Dataset.from_list([{"context_messages": ROW["context_messages"][1:]}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    with pytest.raises(Failure, match="no context_messages with a system message in it"):
        prompt_style(None, INSTRUCT)


def test_every_released_id_has_its_style_and_the_rows_their_revision(rows_at_hand):
    styles = [prompt_style(None, name) for name in RELEASED]
    assert styles == [PUBLISHED] * 3 + [PromptStyle("reasoning")] * 3
    assert rows_at_hand == [("gaotang/RM-R1-Distill-SFT", "train", "main")] * 3


@pytest.mark.parametrize("name", [INSTRUCT + "-GGUF", INSTRUCT.lower(), INSTRUCT.split("/")[1]])
def test_nothing_is_guessed_from_a_name(name):
    with pytest.raises(Failure, match="no judge.json"):
        prompt_style(None, name)


def test_a_folder_with_the_name_of_a_released_model_is_not_that_model(tmp_path, monkeypatch):
    (tmp_path / INSTRUCT).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Failure, match="no judge.json"):
        prompt_style(INSTRUCT, INSTRUCT)


def test_flags_and_judge_json_come_before_the_table(tmp_path, rows_at_hand):
    system = tmp_path / "system.txt"
    system.write_text("Mine.")
    assert prompt_style(None, INSTRUCT, system_file=str(system)) == PromptStyle("instruct", "Mine.")
    assert prompt_style(None, INSTRUCT, "reasoning") == PromptStyle("reasoning")
    assert prompt_style(None, REASONING, "instruct") == PromptStyle("instruct")
    (tmp_path / "judge.json").write_text('{"protocol": "instruct", "system": "Its own."}')
    assert prompt_style(tmp_path, INSTRUCT) == PromptStyle("instruct", "Its own.")
    assert not rows_at_hand
    assert prompt_style(None, INSTRUCT, "instruct") == PUBLISHED


def test_judge_eval_and_serve_ask_alike(tmp_path, rows_at_hand, monkeypatch):
    """A released model whose folder in the cache has no judge.json."""
    monkeypatch.setattr(model_files, "find_model", lambda *_, **__: tmp_path)
    monkeypatch.setattr(evaluation, "find_model", lambda *_, **__: tmp_path)
    monkeypatch.setattr(evaluation, "fingerprint", lambda *_: "")
    monkeypatch.setattr(evaluation, "prompt_fingerprint", lambda _: "")
    monkeypatch.setattr(evaluation, "config_of", lambda _: None)
    args = evaluation.arguments(["--model", INSTRUCT, "--bench", "rmb", "--out", str(tmp_path)])
    settings = evaluation.settings(args, 1)
    assert (settings["protocol"], settings["system"]) == ("instruct", PUBLISHED.system)

    backend = SimpleNamespace(model=INSTRUCT, folder=tmp_path, about=lambda: "")
    monkeypatch.setattr(rmr1, "make_backend", lambda *_, **__: backend)
    assert rmr1.Judge(INSTRUCT).style == PUBLISHED

    # The gateway's own vLLM calls the model "judge", so the style is found before.
    monkeypatch.setattr(model_files, "config_of", lambda _: None)
    monkeypatch.setattr(model_files, "window_of", lambda _: 4096)
    monkeypatch.setattr(model_files, "check_weights", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["serve", "--model", INSTRUCT])
    serve_args, _ = serving.arguments()
    serving.find_judge(serve_args)
    backend.model = "judge"
    judge = rmr1.Judge(str(tmp_path), base_url="http://x/v1", style=serve_args.style)
    assert judge.style == PUBLISHED
