"""--log-to: the numbers of metrics.jsonl in another library too. Modules of the same names stand in for the three."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from conftest import metrics
from lib import run as lib_run
from lib.files import Failure, read_object

ROW = {"loss": 0.5, "digest": "abc", "skipped": [1], "bad": math.nan, "sure": True, "count": 3}


class Library:
    """Remembers what was asked of trackio or wandb."""

    def __init__(self):
        self.runs, self.rows, self.ended = [], [], 0

    def init(self, **given):
        self.runs.append(given)

    def log(self, numbers, step):
        self.rows.append((step, numbers))

    def finish(self):
        self.ended += 1


class Writer:
    """Remembers what was asked of tensorboard."""

    made = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, {}, False
        Writer.made.append(self)

    def add_scalar(self, column, value, step):
        self.scalars[column, step] = value

    def flush(self):
        pass

    def close(self):
        self.closed = True


@pytest.fixture(params=["trackio", "wandb"])
def library(request, monkeypatch):
    stand_in = Library()
    monkeypatch.setitem(sys.modules, request.param, stand_in)
    return request.param, stand_in


def log_of(out, first_step, name):
    return lib_run.RunLog(out, first_step, {"log_to": name, "lr": 1e-3})


def test_numbers_go_there_with_their_step(ranks, library, tmp_path):
    name, stand_in = library
    log = log_of(tmp_path, 0, name)
    log.write({"step": 0, **ROW})
    ((step, numbers),) = stand_in.rows
    assert step == 0 and numbers == {"loss": 0.5, "count": 3, "peak_gib": numbers["peak_gib"]}
    assert metrics(tmp_path)[0]["digest"] == "abc", "the file has all of it"
    log.close()
    assert stand_in.ended == 1


def test_a_run_that_goes_on_is_the_same_run(ranks, library, tmp_path):
    name, stand_in = library
    for first_step in (0, 4, 0):
        log_of(tmp_path, first_step, name)
    begun, gone_on, anew = (given["name"] for given in stand_in.runs)
    assert begun == gone_on != anew
    assert read_object(tmp_path / "config.json")["log_id"] == anew
    assert {given["resume"] for given in stand_in.runs} == {"allow"}
    assert all(given.get("id", given["name"]) == given["name"] for given in stand_in.runs)


def test_a_part_without_log_to_keeps_the_name(ranks, library, tmp_path):
    name, stand_in = library
    log_of(tmp_path, 0, name)
    log_of(tmp_path, 2, None)
    log_of(tmp_path, 4, name)
    begun, gone_on = (given["name"] for given in stand_in.runs)
    assert begun == gone_on
    log_of(tmp_path, 0, None)
    assert "log_id" not in read_object(tmp_path / "config.json"), "a new run"


@pytest.mark.parametrize("function, calls", [("log", 1), ("finish", 0)])
def test_a_library_that_fails_later_ends_no_run(ranks, library, tmp_path, capsys, function, calls):
    name, stand_in = library
    failed = []

    def fail(*_, **__):
        failed.append(1)
        raise OSError("no network\nand a trace")

    setattr(stand_in, function, fail)
    log = log_of(tmp_path, 0, name)
    for step in range(2):
        log.write({"step": step, **ROW})
    assert len(failed) == calls
    log.close()
    assert len(failed) == 1, "it is not called again"
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("--log-to: no network; the run goes on without it")


def test_tensorboard_hides_what_is_computed_again(ranks, tmp_path, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer)
    )
    log = log_of(tmp_path, 7, "tensorboard")
    log.write({"step": 7, **ROW})
    log.close()
    writer = Writer.made.pop()
    assert (writer.folder, writer.purge_step, writer.closed) == (tmp_path / "tensorboard", 7, True)
    assert writer.scalars["loss", 7] == 0.5 and ("digest", 7) not in writer.scalars


def test_rank_0_alone_writes(ranks, library, tmp_path, monkeypatch):
    name, stand_in = library
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    log = log_of(tmp_path, 0, name)
    log.write({"step": 0, **ROW})
    log.close()
    assert not stand_in.runs and not stand_in.rows and not stand_in.ended


def test_what_a_library_says_at_its_start_is_one_sentence(ranks, library, tmp_path):
    name, stand_in = library

    def init(**_):
        raise RuntimeError("no key\nand a page of advice")

    stand_in.init = init
    with pytest.raises(Failure, match=f"^--log-to {name}: no key$"):
        log_of(tmp_path, 0, name)
