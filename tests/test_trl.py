"""TRL's GRPOTrainer takes `Judge.reward`, and its async twin, as they are. Skipped where TRL is not installed; in an
environment of its own (see bench/trl_peer.py): PYTHONPATH=. python -m pytest tests/test_trl.py"""
from concurrent.futures import Future

import pytest

pytest.importorskip("trl")
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import toy
from askers import Answer
from rmr1 import Judge


class Longest:
    """A judge's model that prefers the longer response."""

    def __init__(self):
        self.asked = 0

    def submit(self, requests):
        futures = [Future() for _ in requests]
        for future, (messages, *_) in zip(futures, requests):
            self.asked += 1
            a, b = (x.split("\n[The End")[0] for x in messages[-1]["content"].split("Response]\n")[1:4:2])
            future.set_result(Answer(f"<type>Chat</type><rubric>x 100%</rubric><eval>x</eval>"
                                     f"<answer>[[{'A' if len(a) > len(b) else 'B'}]]</answer>", "stop", 1, 1))
        return futures


@pytest.mark.parametrize("way", ["reward", "areward"])
def test_two_steps_of_grpo_with_a_judges_rewards(way, tmp_path):
    """Four prompts of four completions in a row, whole groups: finite rewards, and an update that moves weights."""
    from transformers import AutoConfig, AutoModelForCausalLM
    tokenizer = toy.write_model(tmp_path, 1, 32)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.float32)
    before = model.model.embed_tokens.weight.detach().clone()
    asker = Longest()
    config = GRPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", max_steps=2,
                        save_strategy="no", logging_steps=1, disable_tqdm=True, learning_rate=1e-3,
                        per_device_train_batch_size=16, num_generations=4, max_completion_length=8)
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": f"What is {n} + 1 ?"}], tokenize=False,
                                           add_generation_prompt=True) for n in range(8)]
    trainer = GRPOTrainer(model=model, args=config, processing_class=tokenizer,
                          reward_funcs=getattr(Judge(asker, protocol="instruct"), way),
                          train_dataset=Dataset.from_dict({"prompt": texts, "answer": ["x"] * 8}))
    trainer.train()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    assert len(logs) == 2 and asker.asked and all(0 < x["reward"] < 1 for x in logs)
    assert not torch.equal(model.model.embed_tokens.weight, before)
