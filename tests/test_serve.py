"""The gateway, in front of a simulated model: formats, pending groups, who may ask, and how it ends. One test starts
it as a user would, in front of vLLM."""

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
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import psutil
import pytest
import torch
import uvicorn
from test_criteria import Model as CriteriaModel
from test_judge import Model, Slow, noisy, until

import serve.__main__
import serve.groups
from conftest import ROOT, SHARED, Replies, call, environment
from judge.backends import Answer
from rmr1 import Judge
from rubrics import WRITE_CRITERIA
from serve import gateway as G
from serve.groups import Busy, PendingGroups
from serve.rendered import rendered_context, without_end


@contextlib.contextmanager
def gateway(model=None, **more):
    """A gateway in a thread. -> its URL; .gate is what its routes share"""
    gate = G.Gate(Judge(model or Model(), protocol="instruct"), **more)
    server = uvicorn.Server(
        uvicorn.Config(
            G.make_app(gate), port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1
        )
    )
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
        assert (found["verdict"], found["consistent"], found["usage"]["judgments"]) == (
            "A",
            True,
            2,
        )
        assert [(v["order"], v["verdict"], v["prefers"]) for v in found["votes"]] == [
            ("AB", "A", "a"),
            ("BA", "B", "a"),
        ]
        assert found["votes"][0]["judgment"]["rubric"] == [
            {"name": "Size", "weight": 100.0, "text": ""}
        ]
        ranked = post(
            url,
            "/rank",
            {"prompt": [{"role": "user", "content": "q"}], "responses": ["is 1", "is 3", "is 2"]},
        ).json()
        assert ranked["ranking"] == [1, 2, 0] and ranked["usage"]["judgments"] == len(
            ranked["comparisons"]
        )
        rewards = post(
            url,
            "/reward",
            {
                "prompts": ["q"] * 3 + ["p"] * 2 + ["alone"],
                "completions": ["is 1", "is 3", "is 2", "is 9", "", "is 4"],
            },
        ).json()["rewards"]
        assert rewards[:3] == ranked["reward"] and rewards[3:] == [None] * 3
        assert (
            post(url, "/reward", {"prompt": "q", "completion": "is 3", "reference": "is 2"}).json()[
                "reward"
            ]
            == 0.75
        )


def user(content):
    return [{"role": "user", "content": content}]


def assistant(content):
    return {"role": "assistant", "content": content}


def parts(text):
    return [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}]


CALL = assistant(None) | {"tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}
TOOL_TURNS = [*user("q"), CALL, {"role": "tool", "content": "12"}]


@pytest.mark.parametrize(
    "body, notes",
    [
        ({"prompt": user(parts("a question"))}, ["text parts joined"]),
        ({"prompt": {"role": "user", "content": "a question"}}, None),
        ({"prompt": [{"from": "human", "value": "a question"}]}, None),
        ({"prompt": TOOL_TURNS}, ["tool calls written as text"]),
        (
            {"prompt": "q", "a": [assistant(parts("is 5"))], "b": assistant("is 3")},
            ["text parts joined"],
        ),
        ({"a": [*user("q"), assistant("is 5")], "b": [*user("q"), assistant("is 3")]}, None),
    ],
)
def test_prompts_and_responses_in_other_forms(body, notes):
    """What was joined or written otherwise is said in the answer."""
    body = {"a": "is 5", "b": "is 3"} | body
    with gateway() as url:
        answers = [
            post(url, "/compare", body).json(),
            post(
                url, "/rank", {"prompt": body.get("prompt"), "responses": [body["a"], body["b"]]}
            ).json(),
            [*events(url, body)][-1][1],
        ]
        assert answers[0]["verdict"] == "A" and answers[1]["ranking"] == [0, 1]
        assert [answer.get("notes") for answer in answers] == [notes] * 3
        if "prompt" in body:
            reward = {"prompts": [body["prompt"]] * 2, "completions": [body["a"], body["b"]]}
            assert post(url, "/reward", reward).json()["rewards"] == answers[1]["reward"]


@pytest.mark.skipif(not (SHARED / "data/bugs").exists(), reason="needs ../shared/data/bugs")
def test_a_body_of_text_parts_that_somebody_sent():
    body = json.loads((SHARED / "data/bugs/compare-content-parts.json").read_text())
    with gateway(model := Reads()) as url:
        model.prompt = "[Client Question]\nName a fruit.\n"
        assert post(url, "/compare", body | {"a": "is 1", "b": "is 2"}).json()["verdict"] == "B"


@pytest.mark.parametrize(
    "path, body, message",
    [
        ("/compare", {"prompt": [*user("q"), assistant(None)]}, "the prompt, message 2 has no content"),
        ("/compare", {"prompt": user(None)}, "the prompt, message 1 has no content"),
        (
            "/compare",
            {"prompt": user([{"type": "image_url", "image_url": {"url": "x"}}])},
            "the prompt, message 1 has a part of type 'image_url'; only text is read",
        ),
        ("/compare", {"prompt": 5}, "the prompt is not a text or messages, but a number"),
        ("/compare", {"prompt": "q", "a": None}, "a is not a text or messages, but null"),
        ("/compare", {"prompt": "q", "b": user("is 3")}, "b does not end with a message of the assistant"),
        ("/rank", {"prompt": "q", "responses": ["is 1", 7]}, "responses[1] is not a text or messages"),
        ("/reward", {"prompts": ["q", 5], "completions": ["is 1", "is 2"]}, "prompts[1]: "),
        ("/reward", {"prompts": ["q"] * 2, "completions": ["is 1", None]}, "completions[1] is not a text"),
        ("/reward", {"prompt": user(None), "completion": "is 1", "group": 2}, "the prompt, message 1 "),
        ("/reward", {"prompt": "q", "completion": "is 1", "reference": 3}, "reference is not a text"),
        ("/compare", {"prompt": "q" * 4_000_001}, "a text of 4,000,001 characters"),
        ("/compare", {"prompt": "q", "system": "French only."}, "system: "),
        ("/rank", {"prompt": "q", "responses": ["is 1", "is 2"], "context": "p"}, "context: "),
        (
            "/reward",
            {"prompts": ["q"], "completions": ["is 1"], "prompt": "q", "completion": "is 2"},
            "give prompts and completions, or prompt and completion",
        ),
    ],
)  # fmt: skip
def test_what_the_reader_refuses_is_said_with_its_place(path, body, message):
    if path == "/compare":
        body = {"a": "is 5", "b": "is 3"} | body
    with gateway() as url:
        error = post(url, path, body).json()["error"]
        assert error["code"] == 400 and error["message"].startswith(message)
        assert "\n" not in error["message"]


def test_a_response_that_is_a_text_is_read_word_for_word():
    """It is what a policy wrote: messages as JSON, or a transcript, are a text like any other."""
    odd = ['[{"role": "user", "content": "x"}]', "\n\nHuman: x\n\nAssistant: y"]

    class Sees(Model):
        def answer(self, messages, *more):
            shown = messages[-1]["content"]
            assert any(text in shown for text in odd)
            return Answer("<answer>[[A]]</answer>", "stop", 1, 1)

    with gateway(Sees()) as url:
        for text in odd:
            assert post(url, "/compare", {"prompt": "q", "a": text, "b": "is 3"}).is_success
            assert post(url, "/rank", {"prompt": "q", "responses": [text, "is 3"]}).is_success
            group = {"prompts": ["q"] * 2, "completions": [text, "is 3"]}
            assert post(url, "/reward", group).json()["rewards"] == pytest.approx([0.5, 0.5])


def test_openrlhf_as_its_code_asks():
    """One sample a call, in a chat template, with the token that ends it."""
    prompt = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    ask = lambda url, n, **more: post(
        url,
        "/get_reward?group=3",
        {"query": [f"{prompt}is {n}<|im_end|>"], "prompts": [prompt], "labels": ["x"]},
    ).json()
    with gateway() as url, ThreadPoolExecutor(3) as pool:
        got = [*pool.map(lambda n: ask(url, n), (1, 2, 3))]
        assert all(
            set(x) == {"rewards", "scores", "extra_logs"} and x["rewards"] == x["scores"]
            for x in got
        )
        rewards = [x["rewards"][0] for x in got]
        assert rewards == sorted(rewards) and got[0]["extra_logs"]["stderr"][0] > 0
        whole = post(
            url,
            "/reward",
            {
                "prompts": [
                    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}]
                ]
                * 3,
                "completions": ["is 1", "is 2", "is 3"],
            },
        ).json()["rewards"]
        assert whole == rewards
        several = post(
            url, "/get_reward", {"query": ["q is 1", "q is 2"], "prompts": ["q", "q"]}
        ).json()
        assert several["rewards"][0] < several["rewards"][1]
        assert (
            post(url, "/get_reward?group=3", {"query": [], "prompts": [], "labels": []}).json()[
                "rewards"
            ]
            == []
        )
    with gateway(Model(lambda *_: "?")) as url:
        assert (
            post(url, "/get_reward", {"query": ["q is 1", "q is 2"], "prompts": ["q", "q"]}).json()[
                "rewards"
            ]
            is None
        )


# ---------------------------------------------------------------- criteria, and scores

SMALL = "2 Size: small\n2 Tone: kind"
SMALL_AS_SHOWN = "Size 50%: small\nTone 50%: kind"


@pytest.mark.parametrize("criteria", [SMALL, SMALL.splitlines()])
def test_every_route_judges_by_the_criteria_that_were_given(criteria):
    """The larger number wins, but the smaller one where the criteria say so."""
    texts = ["is 4", "is 1", "is 3"]
    bodies = {
        "/compare": {"prompt": "q", "a": "is 4", "b": "is 1"},
        "/rank": {"prompt": "q", "responses": texts},
        "/reward": {"prompts": ["q"] * 3, "completions": texts},
    }
    pair = {"prompt": "q", "completion": "is 4", "reference": "is 1"}
    with gateway(model := CriteriaModel()) as url:
        plain = {path: post(url, path, body).json() for path, body in bodies.items()}
        lost = post(url, "/reward", pair).json()["reward"]
        assert {asked for _, asked, _ in model.asked} == {None}
        model.asked.clear()
        given = {
            path: post(url, path, body | {"criteria": criteria}).json()
            for path, body in bodies.items()
        }
        won = post(url, "/reward", pair | {"criteria": criteria}).json()["reward"]
        assert {asked for _, asked, _ in model.asked} == {SMALL_AS_SHOWN}
        assert [*events(url, bodies["/compare"] | {"criteria": criteria})][-1][1] | {
            "usage": 0
        } == (given["/compare"] | {"usage": 0})
    assert (plain["/compare"]["verdict"], given["/compare"]["verdict"]) == ("A", "B")
    decided = [
        [vote["judgment"]["decided_by"] for vote in x["/compare"]["votes"]] for x in (plain, given)
    ]
    assert decided == [[""] * 2, ["Size"] * 2]
    assert (plain["/rank"]["ranking"], given["/rank"]["ranking"]) == ([0, 2, 1], [1, 2, 0])
    assert (plain["/rank"]["criteria"], given["/rank"]["criteria"]) == (None, SMALL_AS_SHOWN)
    assert {comparison["decided_by"] for comparison in given["/rank"]["comparisons"]} == {"Size"}
    for answers in (plain, given):
        assert answers["/reward"]["rewards"] == answers["/rank"]["reward"]
    assert won < 0.5 < lost


def test_samples_with_other_criteria_are_of_another_group():
    small = [sample(n, criteria=SMALL, rollout=f"{n}") for n in (1, 2, 3)]
    again = [body | {"criteria": SMALL.splitlines()} for body in small]
    with gateway(CriteriaModel()) as url:
        rewards = asyncio.run(wait_for(url, *small, *map(sample, (1, 2, 3))))
        assert rewards[0] > rewards[1] > rewards[2]
        assert rewards[3] < rewards[4] < rewards[5]
        # A retry, whatever the form of its criteria.
        assert asyncio.run(wait_for(url, *again)) == rewards[:3]
        assert url.gate.pending_groups.sample_count == 6


def test_openrlhfs_url_may_have_criteria():
    """One at a time or many, by those of the URL."""
    ask = lambda path, *numbers: post(
        url,
        path,
        {"query": [f"q is {n}" for n in numbers], "prompts": ["q" for _ in numbers], "labels": []},
    ).json()
    with gateway(model := CriteriaModel()) as url, ThreadPoolExecutor(2) as pool:
        low, high = ask("/get_reward", 1, 3)["rewards"]
        assert low < high
        high, low = ask("/get_reward?criteria=small", 1, 3)["rewards"]
        assert low < high
        one_by_one = pool.map(lambda n: ask("/get_reward?group=2&criteria=small", n), (1, 3))
        assert [answer["rewards"][0] for answer in one_by_one] == [high, low]
        assert {asked for _, asked, _ in model.asked} == {None, "small"}


def test_a_shared_rubric_is_of_every_group():
    """Written from the prompt once. Criteria of a request come first, and a comparison has no use for it."""
    model = CriteriaModel("Size 100%: small")
    texts = ["is 4", "is 1", "is 3"]
    with gateway(model) as url:
        url.gate.judge.rubric = "shared"
        ranked = post(url, "/rank", {"prompt": "q", "responses": texts}).json()
        rewards = post(url, "/reward", {"prompts": ["q"] * 3, "completions": texts}).json()
        samples = asyncio.run(wait_for(url, *(sample(n, 3) for n in (4, 1, 3))))
        assert (ranked["ranking"], ranked["criteria"]) == ([1, 2, 0], "Size 100%: small")
        assert rewards["rewards"] == ranked["reward"] == samples
        assert [numbers for numbers, *_ in model.asked].count([]) == 1
        ranked = post(url, "/rank", {"prompt": "p", "responses": texts, "criteria": "large"}).json()
        assert (ranked["ranking"], ranked["criteria"]) == ([0, 2, 1], "large")
        pair = {"prompt": "p", "a": "is 4", "b": "is 1"}
        assert post(url, "/compare", pair).json()["verdict"] == "A"
        assert [numbers for numbers, *_ in model.asked].count([]) == 1


def test_the_flag_of_a_shared_rubric_reaches_the_judge(monkeypatch):
    made = []

    def make(*_, **settings):
        made.append(settings["rubric"])
        return Judge(CriteriaModel(), "instruct", rubric=settings["rubric"])

    monkeypatch.setattr(serve.__main__, "Judge", make)
    CriteriaModel.folder = None
    upstream = SimpleNamespace(is_ready=True, url="http://x/v1", key=None)
    for flags, rubric in (
        ((), Judge(CriteriaModel(), "instruct").rubric),
        (("--rubric", "shared"), "shared"),
    ):
        monkeypatch.setattr(sys, "argv", ["serve", "--model", "m", *flags])
        args, _ = serve.__main__.arguments()
        args.folder, args.style = "m", None
        asyncio.run(serve.__main__.load_judge(upstream, args))
        assert made.pop() == rubric
    done = call(serve.__main__, "--model", "m", "--rubric", "both", ok=False)
    assert done.returncode == 2 and done.stderr.startswith("error: --rubric: ")


def test_a_score_over_http():
    body = {"prompt": "q", "response": "is 7"}
    with gateway(model := CriteriaModel()) as url:
        found = post(url, "/score", body).json()
        assert found["score"] == 6.5 and found["stderr"] > 0
        assert found["met"] == {"Size": 1.0} and found["reason"] == ""
        assert found["usage"]["judgments"] == 4 and found["usage"]["completion_tokens"] == 4 * 9
        once = post(url, "/score", body | {"samples": 1, "criteria": SMALL}).json()
        assert once["stderr"] is None and model.asked[-1][1] == SMALL_AS_SHOWN
        talk = {"response": [*user(parts("a question")), assistant("is 77")], "samples": 2}
        unread = post(url, "/score", talk).json()
        assert (unread["score"], unread["notes"]) == (None, ["text parts joined"])
        assert unread["reason"] == "answer is no number from [[1]] to [[10]]"


@pytest.mark.parametrize(
    "path, body",
    [
        ("/compare", {"prompt": "q", "a": "is 1", "b": "is 2"}),
        ("/rank", {"prompt": "q", "responses": ["is 1", "is 2"]}),
        ("/score", {"prompt": "q", "response": "is 1"}),
        ("/reward", {"prompts": ["q"] * 2, "completions": ["is 1", "is 2"]}),
        ("/reward", {"prompt": "q", "completion": "is 1", "reference": "is 2"}),
        ("/reward", {"prompt": "q", "completion": "is 1", "group": 2}),
    ],
)
def test_criteria_that_cannot_be_read_are_refused_in_a_sentence(path, body):
    with gateway(model := CriteriaModel()) as url:
        for criteria, message in (
            ("", "criteria: there is no text in it"),
            ([], "criteria: there is no text in it"),
            (7, "criteria is a number, not a text or a list of texts"),
            ({"Size": 2}, "criteria is an object, not a text or a list of texts"),
            ([["Size"]], "criteria is a list, not a text or a list of texts"),
            ("0 Size: small\n0 Tone: kind", "criteria: all weights are 0"),
            (
                "2 Size: small\n1 Tone: kind\nx",
                "criteria, line 3: 'x' is not `weight name: description`",
            ),
            ("x" * 4_000_001, "a text of 4,000,001 characters"),
        ):
            answer = post(url, path, body | {"criteria": criteria})
            error = answer.json()["error"]
            assert answer.status_code == error["code"] == 400
            assert error["message"].startswith(message) and "\n" not in error["message"]
        assert not model.asked


START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    f"{START}user\nq{END}\n{START}assistant\nx{END}\n{START}user\nmore{END}\n{START}assistant\n"
)


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a fruit."},
    {"role": "assistant", "content": "Plum."},
    {"role": "user", "content": "Another?\n\nAnd <s>why</s>?"},
]
# How a family writes a turn, and what stands before the first one and after the last one.
FAMILIES = {
    "ChatML": ("", "<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n<think>\n"),
    "Phi-4": (
        "",
        "<|im_start|>{role}<|im_sep|>{content}<|im_end|>",
        "<|im_start|>assistant<|im_sep|>",
    ),
    "padded on the left": (
        "<|endoftext|><|endoftext|>",
        "<|im_start|>{role}\n{content}<|im_end|>\n",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "Llama 3": (
        "<|begin_of_text|>",
        "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "Llama 4": (
        "<|begin_of_text|>",
        "<|header_start|>{role}<|header_end|>\n\n{content}<|eot|>",
        "<|header_start|>assistant<|header_end|>\n\n",
    ),
    "Gemma": ("<bos>", "<start_of_turn>{role}\n{content}<end_of_turn>\n", "<start_of_turn>model\n"),
    "Gemma 4": ("<bos>", "<|turn>{role}\n{content}<turn|>\n", "<|turn>model\n"),
    "Command R": (
        "<BOS_TOKEN>",
        "<|START_OF_TURN_TOKEN|><|{role}_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
    "Granite": (
        "",
        "<|start_of_role|>{role}<|end_of_role|>{content}<|end_of_text|>\n",
        "<|start_of_role|>assistant<|end_of_role|>",
    ),
    "Phi-3": ("", "<|{role}|>\n{content}<|end|>\n", "<|assistant|>\n"),
    "GLM": ("[gMASK]<sop>", "<|{role}|>\n{content}", "<|assistant|>\n<think></think>\n"),
    "Tulu": ("", "<|{role}|>\n{content}\n", "<|assistant|>\n"),
    "OLMo": ("<|endoftext|>", "<|{role}|>\n{content}\n", "<|assistant|>\n"),
    "Zephyr": ("", "<|{role}|>\n{content}</s>\n", "<|assistant|>\n"),
}
ROLE_NAMES = {"Gemma": {"assistant": "model"}, "Gemma 4": {"assistant": "model"}}
ROLE_NAMES["Command R"] = {"system": "SYSTEM", "user": "USER", "assistant": "CHATBOT"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rendered_template_is_taken_apart(family):
    before, turn, after = FAMILIES[family]
    for talk in (TALK, TALK[1:], TALK[1:2]):
        roles = [ROLE_NAMES.get(family, {}).get(m["role"], m["role"]) for m in talk]
        turns = [turn.format(role=role, content=m["content"]) for role, m in zip(roles, talk)]
        assert rendered_context(before + "".join(turns) + after) == talk


@pytest.mark.parametrize(
    "prompt",
    [
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Name a fruit.<｜Assistant｜>Plum.<｜end▁of▁sentence｜>"
        "<｜User｜>Another?\n\nAnd <s>why</s>?<｜Assistant｜><think>\n",
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Name a fruit.[/INST]Plum.</s>"
        "[INST]Another?\n\nAnd <s>why</s>?[/INST]",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nName a fruit. [/INST] Plum. </s>"
        "<s>[INST] Another?\n\nAnd <s>why</s>? [/INST]",
    ],
    ids=["DeepSeek", "Mistral", "Llama 2"],
)
def test_a_template_without_a_system_turn_of_the_common_form_is_taken_apart(prompt):
    assert rendered_context(prompt) == TALK


@pytest.mark.skipif(not (SHARED / "tokenizers").exists(), reason="needs ../shared/tokenizers")
def test_published_templates_are_taken_apart():
    from transformers.utils.chat_template_utils import render_jinja_template

    folder = SHARED / "tokenizers"
    qwen = json.loads((folder / "qwen2.5/tokenizer_config.json").read_text())["chat_template"]
    deepseek = (folder / "deepseek_r1_distill_qwen/chat_template.jinja").read_text()
    for template in (qwen, deepseek):
        (prompt,), _ = render_jinja_template(
            [TALK],
            chat_template=template,
            add_generation_prompt=True,
            bos_token="<｜begin▁of▁sentence｜>",
        )
        assert rendered_context(prompt) == TALK


@pytest.mark.parametrize(
    "text, without",
    [
        (f"x{END}\n", "x"),
        (f"x{END} y{END}</s> ", f"x{END} y"),
        ("x \n", "x \n"),
        (END, ""),
        ("Plum.<end_of_turn>\n<eos><pad><pad>", "Plum."),
        ("Plum.<|end|><|endoftext|>", "Plum."),
        ("Plum.<|user|>", "Plum."),  # with which GLM ends its turn
        ("<think>\nhm\n</think>\n\nPlum.<｜end▁of▁sentence｜>", "<think>\nhm\n</think>\n\nPlum."),
    ],
)
def test_a_response_loses_the_tokens_that_end_it(text, without):
    assert without_end(text) == without


QUOTES = (
    f"Explain this: {START}user\nhi{END} what is it?",
    "Where does <s>this</s> end: </s>, <end_of_turn> or [/INST] here?",
    "plain",
)
CUT = (
    f"{START}user\nhi{END} what is it?",
    f"{START}user\nhi",
    f"{CHATML} what is it?{END} And {START}user\nthat?",
    CHATML[20:],  # as a trainer cuts a long prompt from the left
    f"{START}user\nwhat is {START}user\nhi{END} ?{END}\n{START}assistant\n",
    f"{CHATML}Sure, here is",  # begins the response
    "<|user|>\nwhat is <|user|> ?<|assistant|>\n",
    "<|start|>user<|message|>Name a fruit.<|end|><|start|>assistant",  # a family that is not known
    "<|im_start|>User: Name a fruit.<end_of_utterance>\nAssistant:",
    "]~!b[]~b]user\nName a fruit.[e~[\n]~b]ai\n",
    "<SPECIAL_11>User\nName a fruit.\n<SPECIAL_11>Assistant\n",
    "<reserved_106>Name a fruit.<reserved_107>",
)


def routes(prompt):
    """(path, body) of every route, which compares two responses to a prompt."""
    texts = ["is 1", "is 2"]
    return (
        ("/compare", {"prompt": prompt, "a": "is 1", "b": "is 2"}),
        ("/rank", {"prompt": prompt, "responses": texts}),
        ("/reward", {"prompts": [prompt] * 2, "completions": texts}),
        ("/get_reward", {"query": [prompt + t for t in texts], "prompts": [prompt] * 2}),
    )


class Reads(Model):
    """Is asked about the whole of a prompt, or fails."""

    prompt = ""

    def answer(self, messages, *more):
        assert self.prompt in messages[-1]["content"]
        return super().answer(messages, *more)


def test_a_prompt_that_quotes_a_template_is_judged_as_it_is():
    """On every route: the judge reads the whole question."""
    with gateway(model := Reads()) as url:
        for model.prompt in QUOTES:
            for path, body in routes(model.prompt):
                assert post(url, path, body).status_code == 200, (path, body)


def test_a_rendered_prompt_that_cannot_be_taken_apart_is_refused():
    """By OpenRLHF's route. The others read every text word for word."""
    with gateway(model := Reads()) as url:
        for model.prompt in CUT:
            *others, (path, body) = routes(model.prompt)
            error = post(url, path, body).json()["error"]
            assert error["code"] == 400 and error["message"].startswith("prompts[0]: "), body
            assert "Gemma, " in error["message"]
            for path, body in others:
                assert post(url, path, body).status_code == 200, (path, body)


def test_only_openrlhfs_route_takes_a_template_apart():
    with gateway(model := Reads()) as url:
        model.prompt = CHATML
        assert post(url, "/compare", {"prompt": CHATML, "a": "is 1", "b": "is 2"}).is_success


def test_texts_are_taken_apart_in_linear_time():
    begin = time.process_time()
    for hostile in (
        "\n" * 10**6,
        f"{START}user\n" * 10**5,
        END * 10**5,
        f"{END}\n" * 10**5 + "x",
        "<pad> " * 10**5,
        "<|user|><|assistant|>" * 10**5,
        "[INST]" * 10**5 + "[/INST]" * 10**5,
        "<a>" * 10**5,
    ):
        without_end(f"x{hostile}x")
        with contextlib.suppress(ValueError):
            rendered_context(hostile + "x")
        with contextlib.suppress(ValueError):
            rendered_context(f"{START}user\n{hostile}{END}\n" * 3)
    assert time.process_time() - begin < 10  # quadratic: hours


def events(url, body):
    with httpx.stream("POST", url + "/compare", json=body | {"stream": True}, timeout=30) as r:
        name = None
        for line in r.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                yield name, json.loads(line[6:])


def test_votes_appear_one_by_one():
    """The second vote is whole before the first is: it is sent at once, with its number."""
    body = {"prompt": "q", "a": "is 5", "b": "is 3"}
    with gateway(model := Slow()) as url:
        stream = events(url, body)
        with ThreadPoolExecutor(1) as pool:
            next_event = pool.submit(next, stream)
            until(lambda: len(model.waiting) == 2)
            (first, first_request), (second, second_request) = model.waiting
            second.set_result(model.answer(*second_request))
            name, vote = next_event.result(20)
            assert (name, vote["number"], vote["order"], vote["prefers"]) == ("vote", 1, "BA", "a")
            assert vote["judgment"]["rubric"] == [{"name": "Size", "weight": 100.0, "text": ""}]
            first.set_result(model.answer(*first_request))
            events_after = pool.submit(list, stream).result(20)
        assert [name for name, _ in events_after] == ["vote", "done"]
        votes = [events_after[0][1], vote]
        comparison = events_after[-1][1]
        assert [{"number": n} | v for n, v in enumerate(comparison["votes"])] == votes
        again = post(url, "/compare", body).json()
        assert again | {"usage": 0} == comparison | {"usage": 0}
        assert (comparison["usage"]["judgments"], comparison["usage"]["cached"]) == (2, 0)


def test_a_comparison_in_events_that_fails():
    with gateway() as url:
        name, data = [*events(url, {"prompt": "q", "a": "is five", "b": "is 3"})][-1]
        assert name == "error" and "five" in data["error"]["message"]


# ---------------------------------------------------------------- pending groups


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
    (rewards,) = seen
    assert rewards[2] == rewards[5] and rewards[6] > rewards[3]


def test_a_sample_that_never_comes_and_one_alone():
    with gateway(group_timeout=0.3) as url:
        start = time.time()
        got = asyncio.run(wait_for(url, sample(1), sample(2), sample(9, group_id="other")))
        assert got[0] < got[1] and got[2] is None and 0.2 < time.time() - start < 10
        assert url.gate.pending_groups.waiting == 0


def test_who_leaves_stays_a_member_and_finds_its_reward_again():
    """Three samples, two of whose callers leave before the third comes. By id, and without one by the text."""
    with gateway() as url:
        for more in ({"rollout": "a"}, {}):
            first, second = sample(1, group_id=str(more), **more), sample(2, group_id=str(more))
            for body in (first, second):
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(url + "/reward", json=body, timeout=0.3)
            until(lambda: url.gate.pending_groups.waiting == 0)
            with ThreadPoolExecutor(2) as pool:
                again = pool.submit(post, url, "/reward", first)
                until(lambda: url.gate.pending_groups.waiting == 1)
                last = post(url, "/reward", sample(3, group_id=str(more))).json()["reward"]
                assert (
                    again.result().json()["reward"]
                    < post(url, "/reward", second).json()["reward"]
                    < last
                )


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

            return await asyncio.gather(
                *[sends(sample(n, 12)) for n in range(10)], *[late(sample(n, 12)) for n in (10, 11)]
            )

    with gateway(Model(), group_timeout=20) as url:
        rewards = [r.json()["reward"] for r in asyncio.run(go(url))]
        assert (
            url.gate.pending_groups.sample_count == 12
            and rewards
            == post(
                url,
                "/reward",
                {"prompts": ["q"] * 12, "completions": [f"is {n}" for n in range(12)]},
            ).json()["rewards"]
        )


def test_an_id_makes_a_retry_harmless():
    """Two requests with one id are one sample, before and after the judgment; equal texts without one are twins."""
    with gateway() as url:
        same = sample(1, rollout="a")
        got = asyncio.run(wait_for(url, same, same, sample(2, rollout="b"), sample(3, rollout="c")))
        assert (
            got[0] == got[1] < got[2] < got[3]
            and post(url, "/reward", same).json()["reward"] == got[0]
        )
        twins = asyncio.run(wait_for(url, *[sample(1, group_id="x")] * 2, sample(2, group_id="x")))
        assert twins[0] == twins[1] < twins[2]


def test_the_same_prompt_in_two_groups_at_once():
    with gateway() as url:
        got = asyncio.run(wait_for(url, *[sample(n, group_id=c) for n in (1, 2, 3) for c in "xy"]))
        assert got[0] == got[1] < got[2] == got[3] < got[4] == got[5]


def test_a_failure_reaches_every_sample():
    class Broken(Model):
        def answer(self, *_):
            raise ValueError("no such thing")

    with gateway(Broken()) as url:
        got = asyncio.run(wait_for(url, *(sample(n) for n in (1, 2, 3))))
        assert [x["error"]["message"] for x in got] == ["no such thing"] * 3


@pytest.mark.parametrize("ids", [{}, {"rollout": "a"}])
def test_a_group_that_failed_is_judged_anew(ids):
    """The judge fails once. Retries find no trace of that, with an id or without."""

    class FailsOnce(Model):
        has_failed = False

        def answer(self, *request):
            if not self.has_failed:
                self.has_failed = True
                raise ValueError("not now")
            return super().answer(*request)

    bodies = [sample(n, 2, **ids) for n in (1, 2)]
    with gateway(FailsOnce()) as url:
        errors = asyncio.run(wait_for(url, *bodies))
        assert [x["error"]["message"] for x in errors] == ["not now"] * 2
        groups = url.gate.pending_groups
        assert not groups.groups and groups.sample_count == groups.byte_count == 0
        rewards = asyncio.run(wait_for(url, *bodies))
        assert rewards[0] < rewards[1]


class GroupJudge:
    """Rewards a response by its length, and remembers the groups that it was given."""

    def __init__(self):
        self.groups = []

    async def agroup(self, prompt, responses, criteria):
        self.groups.append(responses)
        return [(float(len(response)), 0.0) for response in responses], []


PROMPT = [{"role": "user", "content": "q"}]


async def leave(groups, text, **more):
    """A caller that leaves before its group is whole."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(groups.reward(PROMPT, text, 3, **more), 0.01)


@pytest.mark.parametrize("passes", ["another group", "a minute"])
def test_a_sample_that_was_left_answers_no_later_step(passes, monkeypatch):
    """A caller leaves for good. A later step's sample with the same text belongs to its own group."""

    async def go():
        groups = PendingGroups(judge := GroupJudge(), timeout=20)
        ask = lambda *texts: asyncio.gather(*[groups.reward(PROMPT, t, 3) for t in texts])
        await leave(groups, "left")
        await ask("b", "cc")
        if passes == "a minute":
            monkeypatch.setattr(serve.groups, "RETRY_SECONDS", 0)
            later = ["left", "d", "ee"]
        else:
            later = ["d", "left", "ee"]
        assert await ask(*later) == [(float(len(t)), 0.0) for t in later]
        assert judge.groups == [["left", "b", "cc"], later]

    asyncio.run(go())


def test_a_retry_finds_a_judged_place_until_another_group_begins():
    async def go():
        groups = PendingGroups(judge := GroupJudge(), timeout=0.1)
        await leave(groups, "left")
        await leave(groups, "left with an id", sample_id="x")
        assert await groups.reward(PROMPT, "b", 3) == (1.0, 0.0)
        assert await groups.reward(PROMPT, "left", 3) == (4.0, 0.0)
        assert await groups.reward(PROMPT, "other", 3) == (5.0, 0.0)
        assert await groups.reward(PROMPT, "left with an id", 3, sample_id="x") == (15.0, 0.0)
        assert judge.groups == [["left", "left with an id", "b"], ["other"]]

    asyncio.run(go())


def test_samples_that_wait_are_bounded_by_number_and_by_bytes():
    async def go(**bounds):
        groups = PendingGroups(GroupJudge(), timeout=20, **bounds)
        waits = [asyncio.ensure_future(groups.reward(PROMPT, t, 3)) for t in ("é" * 10, "b")]
        await asyncio.sleep(0.01)
        assert groups.byte_count == 2 * 10 + 1 + 2  # the prompt's byte twice
        with pytest.raises(Busy, match="no more of them"):
            await groups.reward(PROMPT, "c", 3)
        groups.max_samples = groups.max_bytes = 100
        assert await groups.reward(PROMPT, "c", 3) == (1.0, 0.0)
        assert await asyncio.gather(*waits) == [(10.0, 0.0), (1.0, 0.0)]
        assert groups.byte_count == 0 and groups.sample_count == 3

    asyncio.run(go(max_samples=2))
    asyncio.run(go(max_bytes=24))


class Away(Model):
    """A server that could not be reached, or a prompt without room: no text."""

    why = "no answer from the server: gone"

    def answer(self, *_):
        return Answer("", self.why, failed=True)


@pytest.mark.parametrize(
    "why, status",
    [
        (Away.why, 502),
        ("prompt longer than the window of 9 tokens", 400),
        ("refused by the server: 400: flagged", 400),
    ],
)
def test_what_has_no_text_is_an_error_and_not_a_number(why, status, monkeypatch):
    monkeypatch.setattr(Away, "why", why)
    pair, some = {"prompt": "q", "a": "is 1", "b": "is 2"}, ["is 1", "is 2"]
    with gateway(Away()) as url, ThreadPoolExecutor(2) as pool:
        for path, body in (
            ("/compare", pair),
            ("/rank", {"prompt": "q", "responses": some}),
            ("/reward", {"prompts": ["q"] * 2, "completions": some}),
        ):
            r = post(url, path, body)
            assert r.status_code == status and r.json()["error"]["message"] == why
        assert [
            r.status_code for r in pool.map(lambda n: post(url, "/reward", sample(n, 2)), (1, 2))
        ] == [status] * 2
        assert [*events(url, pair)][-1][1]["error"]["message"] == why


class AwayAfterCriteria(Away):
    """The same, which went away when it had written a rubric."""

    def answer(self, messages, *more):
        if messages[0]["content"] == WRITE_CRITERIA:
            return Answer("<rubric>Size 100%: large</rubric>", "stop")
        return super().answer(messages, *more)


def test_a_shared_rubric_alone_is_no_answer():
    some = ["is 1", "is 2"]
    with gateway(AwayAfterCriteria()) as url, ThreadPoolExecutor(2) as pool:
        url.gate.judge.rubric = "shared"
        assert post(url, "/rank", {"prompt": "q", "responses": some}).status_code == 502
        body = {"prompts": ["q"] * 2, "completions": some}
        assert post(url, "/reward", body).status_code == 502
        waiting = pool.map(lambda n: post(url, "/reward", sample(n, 2)), (1, 2))
        assert [response.status_code for response in waiting] == [502] * 2


def test_when_it_closes_nobody_is_left_hanging():
    """A group that is not whole is refused at once; what is judged already has its time, and then is refused."""
    with gateway(model := Slow()) as url, ThreadPoolExecutor(3) as pool:
        waits = pool.submit(post, url, "/reward", sample(1))
        judged, late = (
            pool.submit(post, url, "/compare", {"prompt": p, "a": "is 5", "b": "is 3"})
            for p in "qp"
        )
        until(
            lambda: (
                len(model.waiting) == 4
                and url.gate.pending_groups
                and url.gate.pending_groups.waiting == 1
            )
        )
        url.loop.call_soon_threadsafe(url.gate.close, 2)
        assert waits.result().status_code == 503 and "shutting down" in waits.result().text
        assert post(url, "/rank", {"prompt": "q", "responses": ["is 1", "is 2"]}).status_code == 503
        assert httpx.get(url + "/health").status_code == 503
        for future, request in model.waiting[:2]:
            future.set_result(model.answer(*request))
        answers = sorted((judged.result(), late.result()), key=lambda r: r.status_code)
        assert [r.status_code for r in answers] == [200, 503]


# ---------------------------------------------------------------- who may ask, and what

PATHS = ("/", "/openapi.json", "/compare", "/rank", "/score", "/reward", "/get_reward", "/nowhere")


def test_a_key_guards_everything_but_health():
    basic = lambda key: {
        "Authorization": "Basic " + base64.b64encode(f"me:{key}".encode()).decode()
    }
    with gateway(key="secret") as url:
        for path in PATHS:
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "Basic !"},
                basic("wrong"),
            ):
                for method in ("GET", "POST"):
                    r = httpx.request(method, url + path, headers=headers, content=b"{}")
                    assert r.status_code == 401 and r.json()["error"]["code"] == 401, path
        assert httpx.get(url + "/health").status_code == 200
        for headers in ({"Authorization": "Bearer secret"}, basic("secret")):
            assert httpx.get(url, headers=headers).status_code == 200
            assert (
                post(
                    url, "/compare", {"prompt": "q", "a": "is 5", "b": "is 3"}, headers=headers
                ).status_code
                == 200
            )


def test_a_page_of_another_origin_can_neither_read_nor_post():
    body = {"prompt": "q", "a": "is 5", "b": "is 3"}
    with gateway() as url:
        for headers in (
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Host": "evil.example"},
        ):
            r = httpx.post(url + "/compare", json=body, headers=headers)
            assert r.status_code == 403 and "access-control-allow-origin" not in r.headers
            assert httpx.get(url, headers=headers).status_code == 403
        simple = httpx.post(
            url + "/compare", content=json.dumps(body), headers={"Content-Type": "text/plain"}
        )
        assert simple.status_code == 415
        assert (
            httpx.options(
                url + "/compare",
                headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"},
            ).status_code
            == 403
        )
        assert httpx.post(url + "/compare", json=body, headers={"Origin": url}).status_code == 200


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost:8080", 200),
        ("127.0.0.1", 200),
        ("[::1]:8080", 200),
        ("judge.internal", 200),
        ("192.168.1.7:8080", 403),
        ("0.0.0.0", 403),
        ("evil.example", 403),
        ("[", 403),
    ],
)
def test_without_a_key_this_machine_is_answered_only(host, status):
    with gateway(host="judge.internal") as url:
        assert httpx.get(url, headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.7", "", "localhost.example", "::ffff:127.0.0.1", "0"]
)
def test_an_address_for_everybody_needs_a_key(host, monkeypatch):
    monkeypatch.delenv("RMR1_API_KEY", raising=False)
    done = call(serve.__main__, "--model", "none", "--host", host, ok=False)
    assert done.returncode == 2 and done.stderr.startswith(f"error: --host {host}: ")
    assert "RMR1_API_KEY" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "path, body, status, complaint",
    [
        ("/compare", b"", 400, "body: Field required"),
        ("/compare", b"{", 400, "JSON"),
        ("/compare", b"[" * 50_000, 400, ""),
        ("/compare", b"\xff", 400, ""),
        ("/compare", {"prompt": "q", "a": "x"}, 400, "b: Field required"),
        ("/compare", {"prompt": "q", "a": "", "b": "y"}, 400, "a is empty"),
        ("/compare", {"prompt": [], "a": "x", "b": "y"}, 400, "the context is missing"),
        ("/compare", {"prompt": "q", "a": "is 1", "b": "is 2", "budget": 10**30}, 400, "budget"),
        ("/compare", b'{"prompt": "q", "a": "\\ud800", "b": "is 2"}', 400, ""),
        ("/rank", {"prompt": "q", "responses": ["x"]}, 400, "responses"),
        (
            "/rank",
            {"prompt": "q", "responses": ["is 1"] * 100},
            413,
            "100 responses: 32 of one prompt are compared at most; "
            "these would ask for up to 400 judgments",
        ),
        ("/reward", {"prompts": ["q"], "completions": []}, 400, "as many of each"),
        ("/reward", {"prompt": "q", "completion": "x"}, 400, "group"),
        ("/reward", {"prompts": ["q"] * 33, "completions": ["is 1"] * 33}, 413, "33 responses"),
        ("/reward", {"prompt": "q", "completion": "x", "group": 33}, 413, "33 responses"),
        ("/get_reward", {"query": ["q x"], "prompts": ["q"]}, 400, "?group=8"),
        ("/get_reward", {"query": ["x"], "prompts": ["q"]}, 400, "each query must be its prompt"),
        (
            "/get_reward?group=1",
            {"query": ["q x"], "prompts": ["q"]},
            400,
            "greater than or equal to 2",
        ),
        ("/get_reward?group=x", {"query": ["q x"], "prompts": ["q"]}, 400, "group"),
        ("/compare", {"prompt": "x" * 200_000, "a": "x", "b": "y"}, 413, "100,000 bytes"),
        ("/score", {"prompt": "q"}, 400, "response: Field required"),
        ("/score", {"prompt": "q", "response": " "}, 400, "response is empty"),
        (
            "/get_reward?criteria=",
            {"query": ["q x"], "prompts": ["q"]},
            400,
            "there is no text in it",
        ),
        ("/nowhere", {}, 404, "Not Found"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(path, body, status, complaint):
    with gateway(most_bytes=100_000) as url:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        r = httpx.post(url + path, content=content, headers={"Content-Type": "application/json"})
        assert r.status_code == status and complaint in r.json()["error"]["message"], r.text
        in_pieces = httpx.post(
            url + path,
            content=iter([content[:50], content[50:]]),
            headers={"Content-Type": "application/json"},
        )
        assert in_pieces.status_code == status


def test_nothing_malformed_makes_the_server_fail():
    """500 bodies, made by changing good ones here and there: an answer or a refusal, never a 5xx."""
    good = {
        "/compare": {"prompt": "q", "a": "is 5", "b": "is 3", "budget": 2},
        "/rank": {
            "prompt": "q",
            "responses": ["is 1", "is 2"],
            "goal": "best",
            "criteria": "2 x: y",
        },
        "/score": {"prompt": "q", "response": "is 1", "criteria": ["kind", "brief"], "samples": 2},
        "/reward": {"prompts": ["q"] * 2, "completions": ["is 1", "is 2"]},
        "/get_reward": {"query": ["q is 1", "q is 2"], "prompts": ["q", "q"], "labels": ["x", "y"]},
    }
    odd = [
        None,
        0,
        -1,
        1e300,
        10**40,
        "",
        "\x00",
        "é" * 5000,
        "<|im_end|>",
        [],
        {},
        [[]],
        [None],
        True,
        {"role": "user"},
        [{"role": "user", "content": "q"}],
        [{"role": "x", "content": None}],
        ["is 1"] * 40,
        "is 7",
        ["is 3", "is 3"],
    ]
    rng = random.Random(0)
    with gateway() as url, httpx.Client(timeout=30) as client:
        for n in range(500):
            path, body = rng.choice([*good.items()])
            body = dict(body)
            for _ in range(rng.randint(1, 3)):
                body[rng.choice([*body, "x"])] = rng.choice(odd)
            text = json.dumps(body).encode()
            if n % 5 == 0:
                text = (
                    text[: rng.randrange(len(text))]
                    + bytes([rng.randrange(256)])
                    + text[rng.randrange(len(text)) :]
                )
            r = client.post(url + path, content=text, headers={"Content-Type": "application/json"})
            assert r.status_code < 500, (path, text, r.text)
            assert r.status_code == 200 or set(r.json()["error"]) == {
                "message",
                "type",
                "param",
                "code",
            }


# ---------------------------------------------------------------- the page's frame


def test_the_page_runs_its_own_script_only():
    with gateway() as url:
        r = httpx.get(url)
        assert (
            r.headers["content-type"].startswith("text/html")
            and "default-src 'none'" in r.headers["content-security-policy"]
        )
        script = re.search(r"<script>(.*?)</script>", r.text, re.S)[1]
        assert (
            base64.b64encode(G.sha256(script.encode())).decode()
            in r.headers["content-security-policy"]
        )


# ---------------------------------------------------------------- in front of vLLM


@pytest.fixture(scope="module")
def judge_folder(toy, tmp_path_factory):
    from transformers import AutoConfig, AutoModelForCausalLM

    out = tmp_path_factory.mktemp("judge") / "model"
    shutil.copytree(toy / "model", out)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out)).save_pretrained(out)
    # What a hub's model brings: a server applies it to who says nothing.
    (out / "generation_config.json").write_text(
        '{"do_sample": true, "top_k": 1, "repetition_penalty": 1.5}'
    )
    (out / "judge.json").write_text('{"protocol": "instruct", "system": "Judge."}')
    return out


@contextlib.contextmanager
def started(folder, journal, *more):
    """The gateway as a user starts it, ready. -> the process, its URL"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "serve",
            "--model",
            folder,
            "--dtype",
            "float32",
            "--max-tokens",
            "16",
            "--max-len",
            "200",
            "--port",
            str(port),
            "--journal",
            journal,
            *more,
        ],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
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


def greedy_chats(vllm, bodies, folder):
    """What vLLM's server says to the same questions as chats. -> [Comparison, ...]"""
    words = vllm.cmdline()
    port = words[words.index("--port") + 1]
    (folder / "system.txt").write_text("Judge.")
    judge = Judge(
        f"http://127.0.0.1:{port}/v1/",
        "instruct",
        str(folder / "system.txt"),
        key=vllm.environ()["VLLM_API_KEY"],
        max_tokens=16,
    )
    return [judge.compare(**body, budget=2) for body in bodies]


def as_served(judge, text):
    """A text as a server gives it: without special tokens, and without a last character that is not whole."""
    for token in judge.backend.tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text.rstrip("\ufffd")


def test_a_server_that_is_killed_costs_nobody_an_answer(judge_folder, tmp_path):
    """vLLM is killed while it answers and comes again: no request fails, and the answers are those of the model in
    this process. SIGTERM refuses who waits for a group, and leaves nothing running; started again, in front of a
    server that answers nothing, the journal has it all."""
    asked = [{"prompt": f"q{n}", "a": f"{n}", "b": f"{n + 1}"} for n in range(24)]
    with (
        started(judge_folder, tmp_path / "journal.jsonl") as (process, url),
        ThreadPoolExecutor(25) as pool,
    ):
        (vllm,) = psutil.Process(process.pid).children()
        answers = [httpx.post(url + "/compare", json=asked[0], timeout=300)]
        chats = greedy_chats(vllm, asked[:4], tmp_path)
        vllm.suspend()
        rest = pool.map(
            lambda body: httpx.post(url + "/compare", json=body, timeout=300), asked[1:]
        )
        time.sleep(1)
        vllm.kill()
        answers += rest
        assert [r.status_code for r in answers] == [200] * 24
        assert not in_group(vllm.pid), "what a killed server leaves would keep its card"
        (again,) = psutil.Process(process.pid).children()
        waits = pool.submit(post, url, "/reward", sample(1))
        time.sleep(1)  # until it waits for its group
        process.terminate()
        assert waits.result().status_code == 503 and process.wait(30) in (0, -signal.SIGTERM)
        assert not in_group(again.pid)
    here = Judge(str(judge_folder), dtype="float32", max_tokens=16, max_len=200)
    for body, chat in zip(asked, chats):
        greedy = here.compare(**body, budget=2).votes
        texts = [as_served(here, vote.judgment.text) for vote in greedy]
        assert [as_served(here, vote.judgment.text) for vote in chat.votes] == texts
    for body, r in zip(asked[:4], answers):
        texts = [v["text"] for v in r.json()["votes"]]
        assert [v.judgment.text for v in here.compare(**body).votes] == texts and len(
            set(texts)
        ) > 2

    class Lists(Replies):
        def do_GET(self):
            self.reply(200, {"data": [{"id": "judge", "max_model_len": 200}]})

    other = ThreadingHTTPServer(("127.0.0.1", 0), Lists)
    threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
    with started(
        judge_folder,
        tmp_path / "journal.jsonl",
        "--upstream",
        f"http://127.0.0.1:{other.server_port}/v1",
    ) as (process, url):
        for body, r in zip(asked, answers):
            got = post(url, "/compare", body).json()
            assert (
                got | {"usage": 0} == r.json() | {"usage": 0}
                and got["usage"]["cached"] == got["usage"]["judgments"]
            )


def test_a_port_is_kept_for_vllm_while_it_is_away():
    """Nobody else gets it, and a server of vLLM's kind can take it again and again."""
    reserved = serve.__main__.reserve_port()
    address = reserved.getsockname()
    with socket.socket() as stranger, pytest.raises(OSError):
        stranger.bind(address)
    for _ in range(2):
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as vLLM does
            server.bind(address)
            server.listen()
            with socket.create_connection(address, 5), server.accept()[0] as accepted:
                accepted.sendall(b"x")


def test_vllm_ends_with_a_gateway_that_is_killed():
    """The program between them becomes vLLM: the same process, which gets SIGTERM when its parent dies."""
    child = [sys.executable, "-c", serve.__main__.END_WITH_PARENT, "/bin/sleep", "60"]
    parent = (
        "import subprocess, sys, time; child = subprocess.Popen(sys.argv[1:], start_new_session=True); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent, *child], stdout=subprocess.PIPE, text=True
    )
    sleeper = psutil.Process(int(process.stdout.readline()))
    until(lambda: sleeper.name() == "sleep")
    process.kill()
    process.wait()
    until(lambda: not sleeper.is_running() or sleeper.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("content", ["a folder", b"no journal", b'{"x": 1}\n', b'{"x"\n{"y": 1}\n'])
def test_a_journal_that_cannot_be_used_is_refused_before_vllm_is_started(
    content, toy, tmp_path, monkeypatch
):
    journal = tmp_path / "journal.jsonl"
    if content == "a folder":
        journal.mkdir()
    else:
        journal.write_bytes(content)
    monkeypatch.setattr(serve.__main__, "find_judge", lambda args: None)
    monkeypatch.setattr(serve.__main__, "serve", lambda *_: pytest.fail("it would be started"))
    done = call(serve.__main__, "--model", toy, "--journal", journal, "--port", 8129, ok=False)
    assert done.returncode == 2 and str(journal) in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "path, body, words",
    [
        ("/compare", b'{"prompt": "q", bad', "the body is not JSON: "),
        ("/compare", {"prompt": "q", "a": "is 1", "b": "is 2", "stream": "yes"}, "stream: "),
        ("/compare", {"prompt": "q", "a": "is 1", "b": "is 2", "budget": "8"}, "budget: "),
        ("/compare", {"prompt": "q", "a": "is 1", "b": "is 2", "budget": True}, "budget: "),
        ("/compare", {"prompt": "q", "a": "is 1", "b": "is 2", "budget": 2.5}, "budget: "),
        ("/rank", {"prompt": "q", "responses": "is 1, is 2"}, "responses: "),
        ("/score", {"prompt": "q", "response": "is 1", "samples": "4"}, "samples: "),
        ("/score", {"prompt": "q", "response": "is 1", "samples": 65}, "samples: "),
        ("/reward", {"prompt": "q", "completion": "is 1", "group": "2"}, "group: "),
    ],
)
def test_a_value_of_another_type_is_refused_and_not_guessed(path, body, words):
    with gateway() as url:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        r = httpx.post(url + path, content=content, headers={"Content-Type": "application/json"})
        error = r.json()["error"]
        assert (r.status_code, error["type"]) == (400, "BadRequestError")
        assert error["message"].startswith(words) and error["param"] in (words.strip(": "), None)


def test_every_error_has_a_type_of_its_own():
    with gateway() as url:
        for method, path, headers, kind in (
            ("GET", "/compare", {}, "MethodNotAllowedError"),
            ("POST", "/nowhere", {"Content-Type": "application/json"}, "NotFoundError"),
            ("POST", "/compare", {"Content-Type": "text/plain"}, "UnsupportedMediaTypeError"),
            ("GET", "/", {"Host": "evil.example"}, "PermissionDeniedError"),
        ):
            r = httpx.request(method, url + path, headers=headers)
            assert r.json()["error"]["type"] == kind, path
