"""Trainers take the judge's rewards as they are: TRL's GRPOTrainer `Judge.reward` and its async twin, verl's reward
loop `Judge.verl`, an environment of verifiers `Judge.areward`. Each is skipped where it is not installed; in an
environment of its own (see docs/judge.md): PYTHONPATH=. python -m pytest tests/test_trainers.py"""

import asyncio
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

import toy
from judge.backends import Answer
from rmr1 import Judge


class Longest:
    """A judge's model that prefers the longer response."""

    def __init__(self):
        self.count = 0

    def submit(self, requests):
        futures = [Future() for _ in requests]
        for future, (messages, *_) in zip(futures, requests):
            self.count += 1
            a, b = (
                x.split("\n[The End")[0]
                for x in messages[-1]["content"].split("Response]\n")[1:4:2]
            )
            future.set_result(
                Answer(
                    f"<type>Chat</type><rubric>x 100%</rubric><eval>x</eval>"
                    f"<answer>[[{'A' if len(a) > len(b) else 'B'}]]</answer>",
                    "stop",
                    1,
                    1,
                )
            )
        return futures


@pytest.mark.parametrize("way", ["reward", "areward"])
def test_two_steps_of_trl_with_a_judges_rewards(way, tmp_path):
    """Four prompts of four completions in a row, whole groups: finite rewards, and an update that moves weights."""
    trl = pytest.importorskip("trl")
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = toy.write_model(tmp_path, 1, 32)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(tmp_path), dtype=torch.float32
    )
    before = model.model.embed_tokens.weight.detach().clone()
    backend = Longest()
    config = trl.GRPOConfig(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_steps=2,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        learning_rate=1e-3,
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=8,
    )
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is {n} + 1 ?"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for n in range(8)
    ]
    trainer = trl.GRPOTrainer(
        model=model,
        args=config,
        processing_class=tokenizer,
        reward_funcs=getattr(Judge(backend, protocol="instruct"), way),
        train_dataset=Dataset.from_dict({"prompt": texts, "answer": ["x"] * 8}),
    )
    trainer.train()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    assert len(logs) == 2 and backend.count and all(0 < x["reward"] < 1 for x in logs)
    assert not torch.equal(model.model.embed_tokens.weight, before)


def test_verls_reward_loop_awaits_a_judge(tmp_path):
    """A worker of verl's reward loop finds the function in a file, as its configuration says, and scores a batch."""
    pytest.importorskip("verl")
    import numpy as np
    import torch
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

    tokenizer = toy.write_model(tmp_path, 1, 32)
    path = tmp_path / "score.py"
    path.write_text(
        "from rmr1 import Judge\nfrom test_trainers import Longest\n"
        "compute_score = Judge(Longest(), protocol='instruct').verl()\n"
    )
    config = OmegaConf.create(
        {
            "actor_rollout_ref": {"model": {"path": str(tmp_path), "tokenizer_path": None}},
            "reward": {
                "custom_reward_function": {"path": str(path), "name": "compute_score"},
                "reward_manager": {"source": "register", "name": "naive"},
                "reward_model": {"enable": False},
            },
        }
    )
    ids = [tokenizer.encode(text) for text in ("Here: 42", "Here: 42 42 42")]
    pad = lambda value: [[value(x)] * len(x) + [0] * (4 - len(x)) for x in ids]
    batch = DataProto.from_dict(
        {
            "responses": torch.tensor([x + [0] * (4 - len(x)) for x in ids]),
            "prompts": torch.ones(2, 1).long(),
            "attention_mask": torch.tensor([[1] + row for row in pad(lambda _: 1)]),
        },
        {
            name: np.array([value, value], dtype=object)
            for name, value in (
                ("data_source", "toy"),
                ("reward_model", {"ground_truth": "Here: 42 42"}),
                ("extra_info", {"question": "What is 6 * 7 ?"}),
            )
        },
    )

    async def score():
        return await RewardLoopWorker(config).compute_score_batch(batch)

    assert [x["reward_score"] for x in asyncio.run(score())] == [0.25, 0.75]


def test_an_environment_of_verifiers_compares_its_attempts(monkeypatch):
    """docs/judge.md's environment in verifiers 0.4, whose attempts at a task are written by a stand-in."""
    vf = pytest.importorskip("verifiers.v1")
    from verifiers.v1.envs.best_of_n.env import BestOfNEnv, BestOfNEnvConfig

    judge = Judge(Longest(), protocol="instruct")
    texts = iter(["is 42", "is 42 42 42", "", "is 45 45"])

    class Judged(BestOfNEnv):
        async def finalize(self, task, episode):
            replies = [trace.last_reply for trace in episode.traces]
            rewards = await judge.areward([task.data.prompt_text] * len(replies), replies)
            for trace, reward in zip(episode.traces, rewards):
                if reward is not None:
                    trace.record_reward("judge", reward)

    class Sums(vf.Taskset[vf.Task]):
        def load(self):
            yield vf.Task(vf.TaskData(prompt="What is 6 * 7 ?"), self.config.task)

    class Writes(vf.Harness[vf.HarnessConfig]):
        NEEDS_CONTAINER = EXECUTES_CODE = False

        async def launch(self, ctx, trace, *_):
            message = vf.AssistantMessage(content=next(texts))
            trace.nodes.append(vf.MessageNode(message=message, sampled=True))
            return vf.ProgramResult(exit_code=0, stdout="", stderr="")

    monkeypatch.setitem(
        sys.modules, "sums", SimpleNamespace(__all__=["Sums", "Writes"], Sums=Sums, Writes=Writes)
    )
    agent = {"harness": {"id": "sums"}, "runtime": {"type": "subprocess"}}
    env = Judged(BestOfNEnvConfig(taskset={"id": "sums"}, n=4, agent=agent))

    async def run_once():
        async with env.serving():
            return await env.run_episode(
                next(iter(env.taskset)), vf.ModelContext("m", vf.EvalClientConfig())
            )

    episode = asyncio.run(run_once())
    assert episode.ok, episode.errors
    short, long, empty, middle = episode.traces
    assert 0 < short.reward < middle.reward < long.reward < 1 and not empty.rewards
