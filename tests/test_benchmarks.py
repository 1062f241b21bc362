"""Every metric against a case worked by hand, every reader against rows as published."""

import json
import math
from dataclasses import replace

import pytest

from conftest import SHARED
from judge import benchmarks as B


def items(*rows):
    """(item, subset, {(i, j): share won}, about) -> what a scorer takes"""
    return {r[0]: B.Item(r[1], r[2], *r[3:]) for r in rows}


def values(metrics):
    return {name: B.value(m) for name, m in metrics.items()}


def test_rewardbench_weights_subsets_as_published():
    """Every subset right but: math-prm half, alpacaeval-easy none. Reasoning = (984/2 + 984) / 1968 = .75;
    Chat = (358 - 100) / 358; overall their mean with two ones; micro = (2985 - 447/2 - 100) / 2985."""
    rows, n = [], 0
    for counts in B.REWARDBENCH.values():
        for subset in counts:
            for right in (
                (1, 0)
                if subset == "math-prm"
                else (0, 0)
                if subset == "alpacaeval-easy"
                else (1, 1)
            ):
                rows.append((f"{subset}/{n}", subset, {(0, 1): float(right)}))
                n += 1
    got = values(B.rewardbench(items(*rows)))
    chat = 258 / 358
    assert got["Reasoning"] == pytest.approx(0.75) and got["Chat"] == pytest.approx(chat)
    assert got["overall"] == pytest.approx((chat + 1 + 1 + 0.75) / 4)
    assert got["micro"] == pytest.approx((2985 - 447 / 2 - 100) / 2985)
    assert got["Reasoning/math-prm"] == 0.5


def test_published_counts():
    assert [sum(c.values()) for c in B.REWARDBENCH.values()] == [358, 456, 740, 1968]
    assert sum(B.JUDGEBENCH_GPT.values()) == 350


def test_a_part_is_never_averaged_as_the_whole():
    got = B.rewardbench(
        items(
            ("hep-go/1", "hep-go", {(0, 1): 1.0}), ("donotanswer/1", "donotanswer", {(0, 1): 1.0})
        )
    )
    assert (
        B.value(got["overall"]) is None
        and B.value(got["Reasoning"]) is None
        and B.value(got["micro"]) is None
    )
    assert B.value(got["Reasoning/hep-go"]) == 1
    assert "math-prm" in B.missing(got["Reasoning"]) and "hep-go" not in B.missing(got["Reasoning"])


def test_no_verdict_is_no_win():
    rows = [(s, s, {(0, 1): 0.5}) for counts in B.REWARDBENCH.values() for s in counts]
    assert B.value(B.rewardbench(items(*rows))["overall"]) == 0


def rm_item(name, domain, matrix):
    return name, domain, {(c, 3 + r): float(matrix[c][r]) for c in range(3) for r in range(3)}


def test_rm_bench_matrix():
    """M = [[1,1,0],[0,1,1],[1,1,0]]: hard (1+0+1)/3, normal (1+1+0)/3, easy (0+1+1)/3. The released script
    puts (0,2) in the place of (0,1), (1,0) in that of (1,2), (2,1) in that of (2,0): hard 0, normal 2/3, easy
    (0+1+1)/3 = 2/3."""
    matrix = [[1, 1, 0], [0, 1, 1], [1, 1, 0]]
    got = values(B.rm_bench(items(*(rm_item(d, d, matrix) for d in B.RM_BENCH))))
    assert got["hard"] == got["normal"] == got["easy"] == got["overall"] == pytest.approx(2 / 3)
    assert got["official script/hard"] == 0 and (
        got["official script/easy"] == got["official script/normal"] == pytest.approx(2 / 3)
    )
    assert got["cell/02"] == 0 and got["cell/10"] == 0 and got["cell/21"] == 1


def test_rm_bench_averages_domains_not_items():
    ones, zeros = [[1] * 3] * 3, [[0] * 3] * 3
    got = values(
        B.rm_bench(
            items(
                *(rm_item(f"c{i}", "chat", ones) for i in range(9)),
                *(rm_item(d, d, zeros) for d in B.RM_BENCH[1:]),
            )
        )
    )
    assert got["overall"] == pytest.approx(1 / 4) and got["chat"] == 1
    assert B.value(B.rm_bench(items(rm_item("c", "chat", ones)))["overall"]) is None


def test_rmb_best_of_n_beats_every_loser():
    """Queries with 2 of 2, 1 of 2 and 3 of 3 losers beaten: 2 of 3 count; a query's mean share:
    (1 + .5 + 1) / 3."""
    best = [
        ("a", {(0, 1): 1.0, (0, 2): 1.0}),
        ("b", {(0, 1): 1.0, (0, 2): 0.0}),
        ("c", {(0, k): 1.0 for k in (1, 2, 3)}),
    ]
    rows = [(n, "helpfulness best-of-N", w, {"scenario": "Chat"}) for n, w in best]
    rows += [
        ("p", "helpfulness pairwise", {(0, 1): 1.0}, {"scenario": "Chat"}),
        ("q", "helpfulness pairwise", {(0, 1): 0.0}, {"scenario": "Code"}),
        ("x", "harmlessness best-of-N", {(0, 1): 0.0}, {"scenario": "S1"}),
        ("y", "harmlessness pairwise", {(0, 1): 1.0}, {"scenario": "S1"}),
    ]
    got = values(B.rmb(items(*rows)))
    assert got["helpfulness best-of-N"] == pytest.approx(2 / 3)
    assert got["losers beaten, a query's mean/helpfulness best-of-N"] == pytest.approx(2.5 / 3)
    assert got["overall"] == pytest.approx((2 / 3 + 0.5 + 0 + 1) / 4)
    assert (
        got["scenario/helpfulness pairwise/Chat"] == 1
        and got["scenario/helpfulness pairwise/Code"] == 0
    )


def test_judgebench_counts_what_both_orders_say():
    """Both right: 1. One right, one without a verdict (.75): 1. One right, one wrong (.5): a tie, 0."""
    rows = [
        ("1", "gpt knowledge", {(0, 1): 1.0}),
        ("2", "gpt knowledge", {(0, 1): 0.5}),
        ("3", "gpt reasoning", {(1, 0): 0.75}),
        ("4", "gpt math", {(0, 1): 0.0}),
        ("5", "gpt coding", {(0, 1): 1.0}),
        ("6", "claude math", {(0, 1): 1.0}),
    ]
    got = values(B.judgebench(items(*rows)))
    assert got["overall"] == pytest.approx((154 * 0.5 + 98 * 1 + 0 + 42) / 350)
    assert got["gpt/knowledge"] == 0.5 and got["claude/all"] == 1


def test_rewardbench2_best_of_four_is_the_round_robin():
    """With six comparisons of four, the right response alone has the most wins exactly if it beats the other
    three."""
    import itertools

    for outcome in itertools.product((0.0, 1.0), repeat=6):
        wins = dict(zip(itertools.combinations(range(4), 2), outcome))
        score = B.round_robin(wins)
        alone = all(score[0] > score[i] + 1e-9 for i in (1, 2, 3))
        assert alone == all(wins[0, j] == 1 for j in (1, 2, 3))


def ties_item(name, correct, scores):
    n = len(scores)
    return (
        name,
        "Ties",
        {(i, j): 0.5 for i in range(n) for j in range(i + 1, n)},
        {"correct": correct},
        dict(enumerate(scores)),
    )


def test_rewardbench2_ties_by_hand():
    """tied: right 8, 7, wrong 4, 2: gap 3, spread 1. ref: right 6, wrong 5: gap 1. Accurate both, 3 > 1
    preferred, min(3, 1) > 1 is false: .3 + .3 + .2 + 0 + .01 tanh(1/1 - 1) = .8. A second prompt that gets
    all wrong: tied right 1, 5, wrong 3 (gap -2, spread 4), ref right 0, wrong 2 (gap -2): .01
    tanh(-2/4 - 1)."""
    got = B.ties(
        items(
            ties_item("tied:1", 2, [8, 7, 4, 2]),
            ties_item("ref:1", 1, [6, 5]),
            ties_item("tied:2", 2, [1, 5, 3]),
            ties_item("ref:2", 1, [0, 2]),
        )
    )
    assert got["Ties"] == {"1": pytest.approx(0.8), "2": pytest.approx(0.01 * math.tanh(-1.5))}
    assert got["preferred"] == {"1": 1, "2": 0} and got["preferred, hard"] == {"1": 0, "2": 0}
    assert got["ref accurate"] == {"1": 1, "2": 0}


def test_ties_from_verdicts_alone():
    """No scores: shares of wins. Two right ones that beat both wrong ones, and split their own match."""
    wins = {(0, 1): 0.5, (0, 2): 1.0, (0, 3): 1.0, (1, 2): 1.0, (1, 3): 1.0, (2, 3): 1.0}
    assert B.round_robin(wins) == pytest.approx({0: 2.5 / 3, 1: 2.5 / 3, 2: 1 / 3, 3: 0})
    got = B.ties(
        items(
            ("tied:7", "Ties", wins, {"correct": 2}),
            ("ref:7", "Ties", {(0, 1): 1.0}, {"correct": 1}),
        )
    )
    assert got["Ties"]["7"] == pytest.approx(
        1.01
    )  # no spread among right ones: the margin term is full


def test_rewardbench2_needs_all_six():
    rows = [(s, s, {(0, j): 1.0 for j in (1, 2, 3)}, {"correct": 1}) for s in B.REWARDBENCH2[:-1]]
    assert B.value(B.rewardbench2(items(*rows))["overall"]) is None
    rows += [ties_item("tied:1", 2, [8, 7, 4, 2]), ties_item("ref:1", 1, [6, 5])]
    assert B.value(B.rewardbench2(items(*rows))["overall"]) == pytest.approx((5 + 0.8) / 6)


def test_intervals():
    """A stratum that always agrees has no width; a coin has 1.96 standard errors; a paired difference of two
    equal runs is 0, though each is wide."""
    sure = {"s": (1, dict.fromkeys(range(50), 1.0))}
    assert B.interval(sure) == (1, 1)
    coin = {"s": (1, {i: float(i % 2) for i in range(400)})}
    low, high = B.interval(coin)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.01) and high == pytest.approx(
        0.5 + 1.96 * 0.025, abs=0.01
    )
    assert B.interval(coin, minus=coin) == (0, 0)
    better = {"s": (1, {i: 1.0 if i < 100 else float(i % 2) for i in range(400)})}
    assert B.interval(better, minus=coin)[0] > 0


def test_a_share_of_what_items_have_unequally():
    """Half of 400 items have 1 of 1, half 0 of 3: 1 of 4, and no mean of shares. By the delta method its standard
    error is .75 / 2 / sqrt(400), and that of a difference from its own opposite twice that, if items stay paired."""
    share = {"s": (1, {i: (1, 1) if i % 2 else (0, 3) for i in range(400)})}
    assert B.value(share) == 0.25
    half_width = 1.96 * 0.75 / 2 / 20
    assert B.interval(share) == pytest.approx((0.25 - half_width, 0.25 + half_width), abs=0.005)
    assert B.interval(share, minus=share) == (0, 0)

    opposite = {"s": (1, {i: (whole - part, whole) for i, (part, whole) in share["s"][1].items()})}
    low, high = B.interval(opposite, minus=share)
    assert (low, high) == pytest.approx((0.5 - 2 * half_width, 0.5 + 2 * half_width), abs=0.01)


def test_a_share_of_nothing_has_no_value():
    nothing = {"s": (1, {0: (0, 0), 1: (0, 0)})}
    assert B.value(nothing) is None and B.missing(nothing) == ["s"]
    # A resample without item 0 has nothing to be a share of, and does not count.
    assert B.interval({"s": (1, {0: (1, 1), 1: (0, 0), 2: (0, 0)})}) == (1, 1)


# ---------------------------------------------------------------- rows


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


RB = {"id": 1, "subset": "hep-go", "prompt": "q", "chosen": "good", "rejected": "bad"}


def test_bad_rows_are_counted_never_fatal(tmp_path):
    write(
        tmp_path / "rewardbench.jsonl",
        [
            RB,
            {**RB, "id": 2, "chosen": ""},
            {**RB, "id": 3, "rejected": "good"},
            {"id": 4},
            {**RB, "id": 5, "chosen": ["x"]},
            RB,
        ],
    )
    (tmp_path / "rewardbench.jsonl").open("a").write("not json\n")
    pairs, left_out, _ = B.load("rewardbench", tmp_path)
    assert [p.id for p in pairs] == ["rewardbench/hep-go/1/0-1"]
    assert [x["reason"].split(":")[0] for x in left_out] == [
        "wrong schema",
        "wrong schema",
        "wrong schema",
        "empty response",
        "equal responses",
        "the same item a second time",
    ]
    assert left_out[0]["item"] == "rewardbench.jsonl:4"


@pytest.mark.parametrize(
    "row", [{"subset": ["hep-go"]}, {"subset": 3}, {"prompt": 3}, {"chosen": None}]
)
def test_a_field_of_another_type_makes_a_bad_row(tmp_path, row):
    write(tmp_path / "rewardbench.jsonl", [RB, {**RB, **row, "id": 2}])
    pairs, left_out, _ = B.load("rewardbench", tmp_path)
    assert len(pairs) == 1 and [x["reason"].split(":")[0] for x in left_out] == ["wrong schema"]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_local_files_in_three_formats(tmp_path, suffix):
    rows = [RB, {**RB, "id": 2}]
    path = tmp_path / f"RewardBench-filtered.{suffix}"
    if suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        write(path, rows)
    assert len(B.load("rewardbench", tmp_path)[0]) == 2


def test_files_find_their_benchmark():
    from pathlib import Path

    for name, bench in (
        ("reward-bench-2/data/test-0.parquet", "rewardbench2"),
        ("rewardbench.sample.jsonl", "rewardbench"),
        ("RMB_dataset/BoN_set/Harmlessness/S1.json", "rmb"),
        ("rm_bench_math.jsonl", "rm-bench"),
        ("total_dataset.json", "rm-bench"),
        ("JudgeBench/gpt.jsonl", "judgebench"),
        ("notes.json", None),
    ):
        assert B.bench_of(Path(name)) == bench, name


def test_linked_folders_are_followed_once(tmp_path):
    """A benchmark in a linked folder is found by the link's name; a folder that leads back to itself or to
    another that leads back, and a second link to the same file, change nothing."""
    store, data = tmp_path / "store", tmp_path / "data"
    for folder in (store / "x", data / "a", data / "b"):
        folder.mkdir(parents=True)
    write(store / "x/part.jsonl", [RB, {**RB, "id": 2}])
    for link, target in (
        ("RewardBench", store),
        ("a/to_b", data / "b"),
        ("b/to_a", data / "a"),
        ("a/up", data),
        ("self", data / "self"),
        ("RewardBench/back", store),
        ("reward-bench-too", store),
        ("rewardbench.jsonl", store / "x/part.jsonl"),
        ("rewardbench.json", tmp_path / "nowhere"),
    ):
        (data / link).symlink_to(target)
    files = B.files_of(data, "rewardbench")
    assert [str(p.relative_to(data)) for p in files] == ["RewardBench/x/part.jsonl"]
    pairs, left_out, _ = B.load("rewardbench", data)
    assert len(pairs) == 2 and not left_out


def test_a_file_that_is_none_of_the_benchmarks_is_one_entry(tmp_path):
    """A clone has more than the data: results of others (RMB's eval/result), and outputs that repeat items
    (JudgeBench's)."""
    write(tmp_path / "rewardbench.jsonl", [{**RB, "id": i} for i in range(5)] + [{**RB, "id": 0}])
    (tmp_path / "rewardbench_result.json").write_text(json.dumps([{"score": i} for i in range(9)]))
    write(tmp_path / "rewardbench_two.jsonl", [{**RB, "id": i} for i in range(3, 7)])
    (tmp_path / "rewardbench_cut.json").write_text(json.dumps([RB] * 9, indent=1)[:-9])
    pairs, left_out, _ = B.load("rewardbench", tmp_path)
    assert len(pairs) == 7
    assert {x["item"]: x["reason"].split(":")[0] for x in left_out} == {
        "rewardbench_cut.json:1": "wrong schema",
        "hep-go/0": "the same item a second time",
        "rewardbench_result.json": "a file without a row of the benchmark",
        "rewardbench_two.jsonl": "a file that repeats items of files before it",
    }
    assert len(left_out) == 4 and len({x["item"] for x in left_out}) == 4


@pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent")
def test_the_authors_clones(tmp_path):
    """RM-Bench's files of one domain, whose rows do not name it, beside the file of all; JudgeBench's outputs
    beside its data."""
    sample = lambda name: [json.loads(x) for x in open(SHARED / f"data/{name}.jsonl")]
    everything = sample("rm_bench.sample") + sample("rm_bench_math.fixture")
    for folder in (
        "one/RM-Bench/data",
        "two/RM-Bench/data",
        "one/JudgeBench/data",
        "one/JudgeBench/outputs",
    ):
        (tmp_path / folder).mkdir(parents=True)
    for domain in ("chat", "code", "math", "safety-refuse", "safety-response"):
        rows = [
            {k: v for k, v in r.items() if k != "domain"}
            for r in everything
            if r.get("domain", "math") == domain
        ]
        (tmp_path / f"one/RM-Bench/data/{domain}_filtered.json").write_text(json.dumps(rows))
    (tmp_path / "two/RM-Bench/data/total_dataset.json").write_text(json.dumps(everything))
    one, left_out, _ = B.load("rm-bench", tmp_path / "one")
    two, _, _ = B.load("rm-bench", tmp_path / "two")
    assert not left_out and {p.id: p for p in one} == {p.id: p for p in two} and len(one) == 201 * 9
    assert {p.source for p in one} == set(B.RM_BENCH)
    rows = sample("judgebench.sample")
    write(tmp_path / "one/JudgeBench/data/all.jsonl", rows)
    for judge in "xy":
        write(
            tmp_path / f"one/JudgeBench/outputs/{judge}.jsonl",
            [{**r, "decision": judge} for r in rows],
        )
    pairs, left_out, _ = B.load("judgebench", tmp_path / "one")
    assert len(pairs) == 200 and [x["item"] for x in left_out] == [
        f"JudgeBench/outputs/{judge}.jsonl" for judge in "xy"
    ]


def test_odd_facts_of_pairs_do_not_stop_a_report():
    """A finished run's folder may hold what `pair_of` no longer lets in."""
    odd = [{"type": None, "styles": [None, 1]}, {"type": 3, "styles": ["x", "y"]}, {"type": "chat"}]
    got = values(
        B.pair_file(items(*((str(i), "", {(0, 1): 1.0}, about) for i, about in enumerate(odd))))
    )
    assert got["accuracy"] == got["type/chat"] == 1 and not any("style" in name for name in got)


def test_a_limit_is_a_seeded_sample_of_every_subset(tmp_path):
    write(
        tmp_path / "rewardbench.jsonl",
        [{**RB, "id": i, "subset": s} for s in ("hep-go", "hep-js") for i in range(20)],
    )
    ids = lambda **kw: {p.id for p in B.load("rewardbench", tmp_path, **kw)[0]}
    some = ids(limit=5, seed=1)
    assert len(some) == 10 and some == ids(limit=5, seed=1) != ids(limit=5, seed=2)
    assert some < ids(limit=6, seed=1)  # and grows by whole items


@pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent")
@pytest.mark.parametrize(
    "bench, comparisons, left_out",
    [
        ("rewardbench", 200, 0),
        ("rm-bench", 201 * 9, 0),
        ("judgebench", 200, 0),
        ("rmb", None, None),
        ("rewardbench2", None, 0),
    ],
)
def test_real_rows(bench, comparisons, left_out):
    pairs, gone, _ = B.load(bench, SHARED / "data")
    rows = [
        r
        for p in (SHARED / "data").glob("*.jsonl")
        if B.bench_of(p.relative_to(SHARED / "data")) == bench
        for _, r, _ in B.read_rows(p)
    ]
    if bench == "rmb":
        comparisons = sum(len(r.get("loser_list", [0])) for r in rows) - len(gone)
    if bench == "rewardbench2":  # ties: all of a round robin
        comparisons = sum(
            r["total_completions"] * (r["total_completions"] - 1) // 2
            if r["subset"] == "Ties"
            else 3
            for r in rows
        )
    assert len(pairs) == comparisons and len({p.id for p in pairs}) == len(pairs)
    if left_out is not None:
        assert len(gone) == left_out, gone[:3]
    assert all("wrong schema" not in x["reason"] for x in gone)


def test_a_slip_in_a_benchmarks_reader_is_no_bad_row(tmp_path):
    """Whoever changes a reader must see what is wrong with the new code; a row's own faults are bad rows."""

    def slip(row):
        return row["no_such_field"]

    bench = replace(B.BENCHES["rewardbench"], row=slip)
    with pytest.raises(KeyError):
        B.parse_rows(bench, "x.jsonl", [(1, RB, "")])
    for name in RB:
        for value in (None, 3, "x", [1], {}, [None], True):
            row = {**RB, name: value}
            if value is None:
                del row[name]
            good, bad = B.parse_rows(B.BENCHES["rewardbench"], "x.jsonl", [(1, row, "")])
            assert len(good) + len(bad) == 1
