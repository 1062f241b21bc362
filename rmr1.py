"""
The judge you use: compare two responses, rank several, score one, reward a group; and the command line.

    from rmr1 import Judge
    judge = Judge("runs/demo/grpo/model", dtype="float32")             # or a hub id, or a server's URL
    judge.compare("What is 6 * 7 ?", "Here: 42", "Here: 45").verdict   # "A"
    judge.compare(prompt, a, b, criteria="Is it kind?").verdict        # by your criteria, and no others
    judge.rank(prompt, responses, goal="best").order[0]                # index of the best one
    judge.score(prompt, response).score                                # 1 to 10, the mean of several judgments
    GRPOTrainer(..., reward_funcs=judge.reward)                        # TRL; judge.areward is its async twin

    python rmr1.py judge --model MODEL --question "What is 6 * 7 ?" --a "Here: 42" --b "Here: 45"
    python rmr1.py judge --model MODEL --data pairs.jsonl --json
    python rmr1.py judge --model MODEL --data pairs.jsonl --criteria FILE
    python rmr1.py rank --model MODEL --data responses.jsonl --journal journal.jsonl
    python rmr1.py score --model MODEL --data responses.jsonl --journal journal.jsonl
    python rmr1.py reward --model MODEL --data completions.jsonl --journal journal.jsonl
    python rmr1.py select --model MODEL --data pairs.jsonl --count 100 --journal journal.jsonl

The demo's judge knows the kinds of question that data/toy.py asks, in its few words, and no others.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import textwrap
import threading
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from tqdm import tqdm

from judge import ranking
from judge.backends import BACKEND_FLAGS, Answer, backend_flags, make_backend, read_answer
from judge.journal import Journal
from lib.files import (
    Failure,
    Flags,
    digest,
    json_text,
    number,
    output_in_file,
    parse_lines,
    progress_bar,
    read_text,
    run_main,
    seed_of,
)
from lib.pairs import (
    Pair,
    check_label,
    criteria_of_row,
    is_single,
    messages_of,
    other_label,
    print_notes,
    read_conversation,
    read_criteria,
    read_pairs,
    row_conversation,
)
from rubrics import Judgment, chat_messages, prompt_style, verbatim, written_criteria

# Where the rubric of a comparison in a group comes from; the first unless told otherwise.
RUBRICS_OF_A_GROUP = ("own", "shared")


@dataclass
class Vote:
    """One judgment of two responses, or of one.

    first     index of the response shown as A (0 or 1 for a pair)
    second    index of the one shown as B; None for a judgment of one response
    judgment  what the judge wrote, taken apart
    answer    the text and its tokens
    verdict   "A" or "B" of what was shown; None where there is none, and judgment.reason says why
    prefers   for a pair only: the verdict mapped back to the original order. It has no meaning in a ranking
    """

    first: int
    second: int | None
    judgment: Judgment
    answer: Answer

    @property
    def verdict(self):
        return self.judgment.verdict

    @property
    def prefers(self):
        return other_label(self.verdict) if self.first else self.verdict


@dataclass
class Comparison:
    """What the votes on two responses say; `ranking.verdict` has the definitions.

    verdict     "A", "B", "tie" where the votes are level, or None where no vote could be read
    reason      why there is no winner, else ""
    win         expected share of future votes for A
    low, high   its 90 % interval
    consistent  do both orders say the same?
    share       fraction of the votes that support the verdict
    vote        the first vote for the verdict; votes: all of them
    """

    verdict: str | None
    reason: str
    win: float
    low: float
    high: float
    consistent: bool | None
    share: float | None
    vote: Vote | None
    votes: list


@dataclass
class Ranking:
    """What the votes on n responses say; `ranking.rewards` has the definitions.

    order      indices of the responses, the best first
    reward     expected win rate of each; stderr, low, high: its standard error and 90 % interval
    best       probability of each to be the best
    votes      their first and second are indices of responses
    criteria   what all comparisons were judged by, as they were shown; None where each had its own
    rubric_vote  the judgment that wrote these criteria, where the judge did; else None

    A number is None where nothing about its response could be read.
    """

    order: list
    reward: list
    stderr: list
    low: list
    high: list
    best: list
    votes: list
    criteria: str | None = None
    rubric_vote: Vote | None = None

    @property
    def judgments(self):
        """All that was asked for: the votes, and what wrote the criteria."""
        return [*self.votes, self.rubric_vote] if self.rubric_vote else self.votes

    def numbers(self):
        return {name: getattr(self, name) for name in ("reward", "stderr", "low", "high", "best")}


@dataclass
class Score:
    """What several judgments of one response say.

    score   mean of the scores that could be read, 1 to 10; None without any
    stderr  standard error of that mean, of what the same judge would say after endless judgments; None where
            less than two could be read
    met     {criterion: share of the judgments that name it in which it is met}
    reason  why there is no score, else ""
    votes   all judgments
    """

    score: float | None
    stderr: float | None
    met: dict
    reason: str
    votes: list


class Judge:
    """A judge to compare, rank, score and reward with; acompare, arank, ascore and areward are the same to await.

    model          one of these:
                   a folder or a hub id: the model runs in this process, unless base_url is given
                   a server's URL: we use the first model that the server lists
                   the server's name for a model, with base_url: the server gets chats
                   a backend, see judge/backends.py
    protocol       the prompt style, where the model does not say so itself; system_prompt: a file
    base_url       an OpenAI-compatible server that has the model. It gets token ids if model is a folder
    journal        a file that keeps every judgment: what is in it is not asked for again
    temperature    of the second and further votes in an order; the first is greedy, unless greedy=False
    seed           results depend on the seed and the texts only, not on the order in which you list the
                   responses
    max_tokens     of a judgment
    rubric         of rank and reward: "own", each comparison writes its own; "shared", one is written from the
                   prompt alone, and all comparisons are judged by it
    style          a `PromptStyle` that is known already, instead of protocol and system_prompt
    more           settings of the backend, see `backends.make_backend`

    Calls from several tasks or threads share one batch.
    """

    def __init__(
        self,
        model,
        protocol=None,
        system_prompt=None,
        base_url=None,
        journal=None,
        temperature=1.0,
        seed=0,
        max_tokens=8192,
        greedy=True,
        rubric=RUBRICS_OF_A_GROUP[0],
        style=None,
        **more,
    ):
        check_rubric(rubric)
        settings = {"protocol": protocol, "temperature": temperature, "max-tokens": max_tokens}
        check_settings(settings | more)
        if "://" in str(model):
            model, base_url = None, model
        # Before the model, which takes a while to load, only for a journal that cannot be written.
        self.journal = Journal(Path(journal) if journal else None)
        folder = fingerprint = None
        if hasattr(model, "submit"):
            self.backend = model
        else:
            # If `model` is a local folder and a server is given, we tokenize here with that folder, and use
            # the first model that the server lists.
            has_local_folder = base_url and model and Path(model).is_dir()
            served_name = None if has_local_folder else model
            tokenizer_folder = model if has_local_folder else None
            self.backend = make_backend(served_name, base_url, max_tokens, tokenizer_folder, **more)
            model, folder = self.backend.model, self.backend.folder
            fingerprint = self.backend.about()
        self.style = style or prompt_style(folder, model, protocol, system_prompt)
        self.about = [fingerprint, max_tokens]
        self.temperature = temperature
        self.seed = seed
        self.greedy = greedy
        self.rubric = rubric

        self.under_way = {}  # {request's key: Future of its Answer}
        self.lock = threading.Lock()  # of under_way and used
        self.used = Counter()
        self.bar = tqdm(disable=True)

    # ------------------------------------------------------------ requests

    def request(self, pair, count):
        """The request for vote number `count`, from 0, on a pair in its order. -> its key, request

        The messages are digested once, for the seed and for the key of the journal. All scores of a response are
        sampled, for their mean is of the judge's distribution.
        """
        messages = chat_messages(pair, self.style)
        prompt = digest(messages)
        seed = seed_of(self.seed, prompt, count)
        is_score = is_single(pair) and pair.a is not None
        is_greedy = self.greedy and count == 0 and not is_score
        temperature = 0.0 if is_greedy else self.temperature
        key = digest([*self.about, prompt, seed, temperature])
        return key, (messages, seed, temperature)

    def submit(self, keyed_requests):
        """Hand in what is neither in the journal nor under way. -> [(Answer or Future of one, origin), ...]

        A caller that leaves cancels nothing: the answer comes all the same, and goes into the journal.
        """
        sources = []
        new = {}  # {key: request}
        with self.lock:
            for key, request in keyed_requests:
                cached = self.journal.find(key)
                if cached:
                    self.used["cached"] += 1
                    sources.append((cached, "cached"))
                elif key in self.under_way:
                    sources.append((self.under_way[key], "shared"))
                else:
                    new[key] = request
                    self.under_way[key] = Future()
                    sources.append((self.under_way[key], "new"))
        try:
            futures = self.backend.submit(list(new.values()))
        except BaseException as e:  # nobody may wait for ever
            futures = [Future() for _ in new]
            for future in futures:
                future.set_exception(e)
        for key, future in zip(new, futures, strict=True):
            future.add_done_callback(functools.partial(self.receive, key))
        return sources

    def receive(self, key, future):
        """An answer has come, in the backend's thread: into the journal, then to all who wait for it."""
        answer = error = None
        try:
            answer = future.result()
            if not answer.failed:
                self.journal.add(key, answer)
        except BaseException as e:  # is raised where the answer is awaited
            error = e
        with self.lock:
            waiting = self.under_way.pop(key)
            self.bar.update()
            if error is None:
                self.used["judgments"] += 1
                self.used["prompt_tokens"] += answer.prompt_tokens
                self.used["completion_tokens"] += answer.tokens
        if error is None:
            waiting.set_result(answer)
        else:
            waiting.set_exception(error)

    async def collect_votes(self, pair_in_order, schedule, on_vote=None):
        """Run a schedule of ranking.py, all requests of a round at once. -> its results, [Vote, ...]

        pair_in_order  (i, j) -> the `Pair` that shows response i as A and j as B
        on_vote        called with (number, Vote) as each vote is whole. Votes are numbered from 0 as they are
                       asked for; those of a round may come in any order
        """
        votes = []
        counts = Counter()  # {(i, j): votes so far}

        async def ask(round_of_pairs):
            keyed_requests = []
            for indices in round_of_pairs:
                keyed_requests.append(self.request(pair_in_order(*indices), counts[indices]))
                counts[indices] += 1
            sources = self.submit(keyed_requests)

            coroutines = []
            for n, (indices, source) in enumerate(zip(round_of_pairs, sources)):
                number_of_vote = len(votes) + n
                tell = functools.partial(on_vote, number_of_vote) if on_vote else None
                coroutines.append(vote_of(indices, *source, tell))
            new = await asyncio.gather(*coroutines)
            votes.extend(new)
            return [None if v.verdict is None else float(v.verdict == "A") for v in new]

        return await ranking.run_schedule(schedule, ask), votes

    async def vote_on_single(self, pair, count=0):
        """Judgment number `count` of one response, or of a question alone. -> `Vote`"""
        (source,) = self.submit([self.request(pair, count)])
        return await vote_of((0, None), *source)

    # ------------------------------------------------------------ what it is asked

    async def acompare(self, prompt, a=None, b=None, budget=8, on_vote=None, criteria=None):
        """Which of two responses is better? -> `Comparison`

        prompt   a text or messages, or None where a and b hold the whole conversations; or a `Pair`, which
                 is shown in its published prompt if it has one
        a, b     the responses, in any form that `lib.pairs.read_conversation` reads
        budget   votes at most, 1 or more
        on_vote  see `collect_votes`
        criteria  what to judge by, and by nothing else: a text or a list of texts, see `lib.pairs.read_criteria`;
                 None leaves it to the judge. Those of a `Pair` come first

        It asks once in each order, then continues until one side leads by two or the budget is spent. A
        published prompt from which the two responses cannot be extracted cannot be swapped, so it gets one
        vote.
        """
        check_budget(budget)
        pair = pair_to_compare(prompt, a, b, criteria)
        if not pair.a:
            budget = 1
        elif pair.a == pair.b:
            return Comparison("tie", "the responses are equal", 0.5, 0.5, 0.5, None, None, None, [])

        def pair_in_order(first, _):
            return pair.swapped() if first else pair

        schedule = ranking.pair_schedule(budget)
        results, votes = await self.collect_votes(pair_in_order, schedule, on_vote)
        outcome = ranking.verdict(results)
        verdict = outcome["verdict"]
        supporting = [vote for vote in votes if vote.verdict and vote.prefers == verdict]
        reason = ""
        if verdict == "tie":
            reason = "as many votes for each"
        elif verdict is None:
            reason = votes[0].judgment.reason
        vote = supporting[0] if supporting else None
        return Comparison(**outcome | {"reason": reason, "vote": vote, "votes": votes})

    async def arank(self, prompt, responses, goal="all", budget=None, criteria=None, rubric=None):
        """How good are several responses beside each other? -> `Ranking`

        prompt, responses   as for acompare
        goal    "all": a reward for each; "best": the best one
        budget  votes at most, beside the judgment that writes a shared rubric; four for each response unless given
        criteria  as for acompare
        rubric  "own" or "shared", see `Judge`, if not the judge's. Criteria come first

        Equal responses are judged once. Raises ValueError for less than two.
        """
        responses = as_list(responses, "responses")
        if budget is not None:
            check_budget(budget)
        n = len(responses)
        if n < 2:
            raise ValueError(f"{n} responses: a ranking needs two or more")
        rubric = rubric or self.rubric
        check_rubric(rubric)
        criteria = read_criteria(criteria)
        context, texts = conversation_of_call(prompt, responses)
        # In the order of their digests, so the order of the list changes nothing.
        different = sorted(set(texts), key=lambda text: digest([self.seed, text]))
        if len(different) == 1:
            return Ranking(
                order=list(range(n)),
                reward=[0.5] * n,
                stderr=[0.0] * n,
                low=[0.5] * n,
                high=[0.5] * n,
                best=[1.0] * n,
                votes=[],
            )

        rubric_vote = None
        if criteria is None and rubric == "shared":
            rubric_vote = await self.vote_on_single(Pair("", context, None, None, None))
            criteria = criteria_or_warn(rubric_vote)

        def pair_in_order(i, j):
            return Pair("", context, different[i], different[j], None, criteria=criteria)

        keys = [f"{self.seed}/{text}" for text in different]
        schedule = ranking.schedule(keys, budget, goal)
        results, votes = await self.collect_votes(pair_in_order, schedule)
        for vote in votes:  # from indices of the different texts to indices of the list
            vote.first = texts.index(different[vote.first])
            vote.second = texts.index(different[vote.second])

        # results: [(i, j, outcome), ...], the outcome None where no verdict could be read.
        with_a_vote = set()
        for i, j, outcome in results:
            if outcome is not None:
                with_a_vote.update((i, j))

        indices = [different.index(text) for text in texts]
        numbers = {}
        for name, values in ranking.rewards(keys, results).items():
            numbers[name] = [float(values[i]) if i in with_a_vote else None for i in indices]
        reward = numbers["reward"]
        # A reward is above 0, so a response without one comes last.
        order = sorted(range(n), key=lambda index: -(reward[index] or 0))
        more = {"votes": votes, "criteria": criteria, "rubric_vote": rubric_vote}
        return Ranking(order=order, **more, **numbers)

    async def ascore(self, prompt, response, criteria=None, samples=4):
        """How good is one response? -> `Score`

        prompt, response  as for acompare; or prompt None, and the whole conversation as response
        criteria  as for acompare; None: the judge writes them from the prompt
        samples   judgments, all sampled; at a judge's temperature of 0 they would be equal, so there is one

        The mean of the sampled scores estimates the expectation of the judge's own distribution (CE-RM, arXiv
        2601.20327; J1, 2505.10320).
        """
        check_budget(samples, "samples")
        samples = samples if self.temperature else 1
        context, (text,) = conversation_of_call(prompt, [response], names=("the response",))
        pair = Pair("", context, text, None, None, criteria=read_criteria(criteria))
        votes = await all_of(self.vote_on_single(pair, count) for count in range(samples))
        scores = [vote.judgment.score for vote in votes if vote.judgment.score is not None]
        return Score(
            score=fmean(scores) if scores else None,
            stderr=stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None,
            met=share_met(votes),
            reason="" if scores else votes[0].judgment.reason,
            votes=votes,
        )

    async def areward(self, prompts, completions, criteria=None, rubric=None, **_):
        """A reward for every completion: its expected win rate against the others to the same prompt.

        criteria  a text; or a list with one entry for each completion, each as for acompare, as TRL hands a
                 column of that name. An entry that says nothing is None
        rubric   "own" or "shared", if not the judge's. TRL's column of that name, a list, is not read

        Completions to one prompt stand in a row, as trainers have them. It goes into TRL's `reward_funcs`. A
        completion that is a text is taken word for word, since a policy may write anything. None where
        nothing could be read, or where a completion is empty, alone, or does not end with what the assistant
        says, e.g. with a tool's result: TRL then gives it no advantage.
        """
        groups = groups_of(prompts, completions, criteria)
        if any(len(group) == 1 for _, group, _ in groups):
            warnings.warn(
                "a completion is alone: nothing to compare it with. The completions to one prompt must stand "
                "in a row; for TRL, let per_device_train_batch_size x steps_per_generation be a multiple of "
                "num_generations",
                stacklevel=2,
            )
        rubric = rubric if isinstance(rubric, str) else None
        judged = await all_of(self.agroup(*group, rubric) for group in groups)
        return [reward for numbers, _ in judged for reward, _ in numbers]

    async def agroup(self, prompt, completions, criteria=None, rubric=None):
        """The completions to one prompt. -> [(reward, stderr), ...], [Vote, ...]"""
        numbers = [(None, None)] * len(completions)
        context = messages_of(prompt)
        replies = {}  # {index: completion as messages}
        for index, completion in enumerate(completions):
            try:
                replies[index] = as_written(completion)
                read_conversation(context, [replies[index]], names=["a completion"])
            except ValueError as unusable:
                del replies[index]
                warnings.warn(f"no reward: {unusable}", stacklevel=2)
        indices = list(replies)
        if len(indices) < 2:
            return numbers, []
        texts = list(replies.values())
        ranked = await self.arank(context, texts, criteria=criteria, rubric=rubric)
        for index, reward, stderr in zip(indices, ranked.reward, ranked.stderr):
            numbers[index] = (reward, stderr)
        return numbers, ranked.votes

    def verl(self):
        """A `compute_score` for verl, which shows a reward function one sample at a time.

        score  the sample's expected win rate against `ground_truth`, for the prompt in `extra_info["question"]`,
               by the criteria in `extra_info["criteria"]` if there are any; .5 if no vote could be read, 0 for an
               empty sample
        read   1 if a vote could be read, else 0
        """

        async def compute_score(data_source, solution_str, ground_truth, extra_info, **_):
            if not isinstance(extra_info, dict) or extra_info.get("question") is None:
                raise ValueError('verl: extra_info["question"] is missing, the prompt to judge by')
            if not isinstance(solution_str, str) or not solution_str.strip():
                return {"score": 0.0, "read": 0.0}
            question = extra_info["question"]
            criteria = extra_info.get("criteria") or None
            texts = (as_written(solution_str), ground_truth)
            found = await self.acompare(question, *texts, criteria=criteria)
            if found.verdict is None:
                return {"score": 0.5, "read": 0.0}
            return {"score": found.win, "read": 1.0}

        return compute_score

    def compare(self, prompt, a=None, b=None, budget=8, criteria=None):
        return run_sync(self.acompare(prompt, a, b, budget, criteria=criteria))

    def compare_all(self, pairs, budget=8, criteria=None):
        """`compare` for many (prompt, a, b), or `Pair`s, together. -> [Comparison, ...]"""
        arguments = []
        for place, pair in enumerate(as_list(pairs, "pairs"), 1):
            is_triple = isinstance(pair, list | tuple) and len(pair) == 3
            if not isinstance(pair, Pair) and not is_triple:
                raise ValueError(f"pair {place} is neither a Pair nor (prompt, a, b)")
            arguments.append(pair if is_triple else (pair,))
        compare = functools.partial(self.acompare, budget=budget, criteria=criteria)
        return run_sync(all_of(compare(*texts) for texts in arguments))

    def rank(self, prompt, responses, goal="all", budget=None, criteria=None, rubric=None):
        return run_sync(self.arank(prompt, responses, goal, budget, criteria, rubric))

    def score(self, prompt, response, criteria=None, samples=4):
        return run_sync(self.ascore(prompt, response, criteria, samples))

    def score_all(self, singles, criteria=None, samples=4):
        """`score` for many (prompt, response) together. -> [Score, ...]"""
        singles = as_list(singles, "singles")
        for place, single in enumerate(singles, 1):
            if not isinstance(single, list | tuple) or len(single) != 2:
                raise ValueError(f"single {place} is not (prompt, response)")
        score = functools.partial(self.ascore, criteria=criteria, samples=samples)
        return run_sync(all_of(score(*single) for single in singles))

    def reward(self, prompts, completions, **more):
        return run_sync(self.areward(prompts, completions, **more))


def check_rubric(rubric):
    """Raises ValueError unless it is one of RUBRICS_OF_A_GROUP."""
    if rubric not in RUBRICS_OF_A_GROUP:
        raise ValueError(f"rubric: {rubric!r} is not {' or '.join(RUBRICS_OF_A_GROUP)}")


async def vote_of(indices, source, origin, on_vote=None):
    """The `Vote` in an answer of `Judge.submit`, awaited if it is under way. on_vote: called with it"""
    answer = source
    if isinstance(source, Future):
        # Shielded: cancelling this caller must not cancel the future that others wait for.
        answer = await asyncio.shield(asyncio.wrap_future(source))
        answer = replace(answer, origin=origin)
    vote = Vote(*indices, read_answer(answer, single=indices[1] is None), answer)
    if on_vote:
        on_vote(vote)
    return vote


def criteria_or_warn(vote):
    """The criteria that a judge has written for a question, before it saw a response. None, with a warning, without
    any: then each comparison has its own."""
    criteria = written_criteria(vote.judgment)
    if criteria is None:
        why = "no criteria could be read in what the judge wrote for a question"
        if not vote.judgment.text:
            why = f"the judge wrote no criteria for a question ({vote.judgment.reason})"
        warnings.warn(f"{why}, so each comparison has its own", stacklevel=3)
    return criteria


def share_met(votes):
    """{criterion: share of the judgments that name it in which it is met}"""
    named, met = Counter(), Counter()
    for vote in votes:
        for name, is_met in dict(vote.judgment.met).items():
            named[name] += 1
            met[name] += is_met
    return {name: met[name] / named[name] for name in named}


def check_settings(settings):
    """Raises ValueError for a value that the flag of its name would refuse on the command line."""
    for name, value in settings.items():
        flag = BACKEND_FLAGS.get(name.replace("_", "-"), {})
        if value is None and flag.get("default") is None:
            continue
        if "choices" in flag and value not in flag["choices"]:
            known = " or ".join(flag["choices"])
            raise ValueError(f"{name}: {value!r} is not {known}")
        if "type" in flag:
            try:
                flag["type"](str(value))
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"{name}: {error}") from error


def pair_to_compare(prompt, a, b, criteria=None):
    """The `Pair` of a call of `acompare`."""
    criteria = read_criteria(criteria)
    if isinstance(prompt, Pair):
        if a is not None or b is not None:
            raise ValueError("a Pair has its own responses, so give no a and b beside it")
        if is_single(prompt):
            raise ValueError("a Pair without two responses cannot be compared")
        return replace(prompt, criteria=prompt.criteria or criteria)
    if a is None or b is None:
        raise ValueError("compare takes a prompt and two responses a and b, or a Pair")
    context, (a, b) = conversation_of_call(prompt, [a, b], names=("a", "b"))
    return Pair("", context, a, b, None, criteria=criteria)


def conversation_of_call(prompt, responses, names=None):
    """`read_conversation` for a call in Python, which warns where something was joined or renamed."""
    notes = set()
    context, texts = read_conversation(prompt, responses, names=names, notes=notes)
    for note in sorted(notes):  # Python shows the same warning once
        warnings.warn(f"a conversation was read with {note}", stacklevel=2)
    return context, texts


def as_written(completion):
    """A completion whose text is not searched for JSON or a transcript: a message of the assistant."""
    if isinstance(completion, str):
        return {"role": "assistant", "content": completion}
    return completion


def as_list(values, name):
    """The values as a list. Raises ValueError for a text or one message in the place of a list of them."""
    if isinstance(values, str | dict | Pair) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is not a list, but one {type(values).__name__}")
    return list(values)


def check_budget(budget, what="votes"):
    """Raises ValueError unless it is a whole number of votes."""
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f"a budget of {budget!r} {what}; give a whole number from 1")


def groups_of(prompts, completions, criteria=None):
    """Runs of equal prompts and criteria. -> [(prompt, [completion, ...], criteria), ...]

    criteria  for all completions; or a list of them, one for each
    """
    prompts = as_list(prompts, "prompts")
    completions = as_list(completions, "completions")
    if len(prompts) != len(completions):
        raise ValueError(
            f"{len(prompts)} prompts and {len(completions)} completions; give one prompt for each"
        )
    if isinstance(criteria, list | tuple):
        criteria = [entry or None for entry in criteria]  # a column's blank cell
    else:
        criteria = [criteria] * len(prompts)
    if len(criteria) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts and {len(criteria)} criteria; give a text, or one for each completion"
        )
    groups = []
    for prompt, completion, asked in zip(prompts, completions, criteria, strict=True):
        if groups and (groups[-1][0], groups[-1][2]) == (prompt, asked):
            groups[-1][1].append(completion)
        else:
            groups.append((prompt, [completion], asked))
    return groups


async def all_of(coroutines):
    """Results of coroutines that run together, in order.

    It yields to the event loop between task starts, for the loop may serve others: 512 groups that begin in
    one turn would hold it for seconds.
    """
    tasks = []
    try:
        for coroutine in coroutines:
            tasks.append(asyncio.ensure_future(coroutine))
            await asyncio.sleep(0)
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def run_sync(coroutine):
    """The result of a coroutine, from anywhere: also within a running loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


# ---------------------------------------------------------------- a comparison for people to read

BOLD, RED, GREEN, CYAN = 1, 31, 32, 36


def painted(text, colour):
    """A text in colour on a terminal, unless NO_COLOR is set."""
    if not text or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{colour}m{text}\033[0m"


def indented(text):
    """A text whose lines fit the terminal, behind two spaces each."""
    width = min(100, shutil.get_terminal_size().columns)
    lines = text.strip("\n").splitlines()
    fill = functools.partial(textwrap.fill, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(fill(line, width) for line in lines)


def rubric_lines(rubric):
    """Criteria with a bar for each weight."""
    lines = []
    for name, weight, text in rubric:
        percent = "" if weight is None else f"{weight:g} %"
        bar = "█" * round((weight or 0) / 5)
        description = f": {text}" if text else ""
        lines.append(f"  {percent:>6} {painted(f'{bar:<20}', CYAN)} {name}{description}")
    return "\n".join(lines)


def print_comparison(pair, found):
    """Print what was asked, the judgment, its quotes held against the responses, and the verdict."""
    vote = found.vote or found.votes[0]
    judgment = vote.judgment
    displayed = pair.swapped() if vote.first else pair

    question = "\n".join(f"{m['role']}: {m['content']}" for m in pair.context)
    structured = judgment.solution or judgment.rubric or judgment.eval
    parts = {
        "question": indented(question),
        "response A": indented(displayed.a),
        "response B": indented(displayed.b),
        "task": indented(judgment.type),
        "solution": indented(judgment.solution),
        "rubric": rubric_lines(judgment.rubric),
        "why these": indented(judgment.justify),
        "criteria given": indented(pair.criteria or ""),
        "comparison": indented(judgment.eval),
        "what it wrote": "" if structured else indented(judgment.text),
    }
    for title, text in parts.items():
        if text.strip():
            print(f"{painted(title, BOLD)}\n{text}\n")

    quotes = [(side, quote.strip()) for side in "AB" for quote in judgment.quotes[side]]
    for (side, quote), is_there in zip(quotes, verbatim(judgment, displayed)):
        if is_there:
            print(painted(f"  {side}: {quote}", GREEN))
        else:
            print(painted(f"  {side}: {quote}  (not in the response)", RED))
    print(verdict_line(found, pair, swapped=bool(vote.first)))


def verdict_line(found, pair, swapped):
    """The verdict, and how sure it is."""
    verdict = found.verdict or f"none ({found.reason})"
    parts = [
        f"verdict: {verdict}",
        f"expected win rate of A: {found.win:.2f} ({found.low:.2f} to {found.high:.2f})",
        f"judgments: {len(found.votes)}",
    ]
    if found.consistent is not None:
        parts.append("the orders agree" if found.consistent else "the orders do not agree")
    if swapped:
        parts.append("shown here with A and B the other way round")
    if pair.label:
        parts.append(f"people preferred {pair.label}")
    return ", ".join(parts)


# ---------------------------------------------------------------- a comparison for programs


def judgment_as_json(judgment, pair, first):
    """A judgment for a program. Quotes are of `pair`'s a or b, of which `first` (0 or 1) was shown as A."""
    displayed = pair.swapped() if first else pair
    is_there = verbatim(judgment, displayed)
    quotes = []
    for side in "AB":
        original = other_label(side) if first else side
        quotes += [(original.lower(), quote.strip()) for quote in judgment.quotes[side]]
    return {
        "type": judgment.type,
        "rubric": [dict(zip(("name", "weight", "text"), item)) for item in judgment.rubric],
        "justify": judgment.justify,
        "solution": judgment.solution,
        "eval": judgment.eval,
        "decided_by": judgment.decided_by,
        "quotes": [
            {"of": of, "text": quote, "found": found}
            for (of, quote), found in zip(quotes, is_there)
        ],
    }


def vote_as_json(vote, pair):
    """A `Vote`. Its verdict is about the order that was shown, prefers about that of `pair`."""
    return {
        "order": "BA" if vote.first else "AB",
        "verdict": vote.verdict,
        "prefers": vote.prefers and vote.prefers.lower(),
        "reason": vote.judgment.reason,
        "tokens": vote.answer.tokens,
        "text": vote.judgment.text,
        "judgment": judgment_as_json(vote.judgment, pair, vote.first),
    }


def as_json(found, pair):
    """A `Comparison` as a dict for JSON."""
    fields = {name: value for name, value in vars(found).items() if name != "vote"}
    return fields | {"votes": [vote_as_json(vote, pair) for vote in found.votes]}


# ---------------------------------------------------------------- the commands


def judge_of(args, task, least=None):
    """Build the judge from the flags, announce the work on stderr, and show a progress bar.

    task   the work in words
    least  the least number of judgments, for the bar; None if it is not known
    """
    cached = ""
    if args.journal and os.path.exists(args.journal):
        cached = f", less what is in {args.journal}"
    task = f"{task}, by {args.base_url or args.model}{cached}"
    output = contextlib.nullcontext()
    if not args.base_url and "://" not in args.model:
        task += "; vLLM takes half a minute to start"
        if not args.verbose:
            descriptor, log = tempfile.mkstemp(".log", "rmr1-")
            os.close(descriptor)
            task += f" (its messages: {log}, or here with --verbose)"
            output = output_in_file(log)
    print(task, file=sys.stderr, flush=True)
    with output:
        judge = Judge(
            args.model,
            args.protocol,
            args.system_prompt,
            args.base_url,
            args.journal,
            args.temperature,
            args.seed,
            args.max_tokens,
            greedy=args.greedy,
            rubric=args.rubric,
            max_len=args.max_len,
            dtype=args.dtype,
        )
    judge.bar = progress_bar(total=least, unit=" judgments", leave=False)
    return judge


def judge_flags(arg):
    form = "pairs (or --question, --a, --b)"
    arg("--data", help=f"a file of lines, or - for standard input: {form}")
    arg("--question", help="the client's question")
    arg("--a", help="response A")
    arg("--b", help="response B")
    arg("--line", type=number(int, 1), help="which of the file's pairs, from 1; default: all")
    arg("--json", action="store_true", help="a line of JSON for each, for programs")
    arg("--budget", type=number(int, 1), default=8, help="judgments of a pair at most")
    arg("--skip-bad", action="store_true", help="leave out lines that cannot be read, and say so")


def judge_command(args):
    """Judge a pair, or all of a file, in both orders: for a person to read, or a line of JSON each.

    A pair without an answer has its line too, with the reason, for the others are judged and paid.
    """
    pairs = [pair_to_compare(pair, None, None, args.criteria) for pair in pairs_to_judge(args)]
    judge = judge_of(args, f"{len(pairs)} pairs, up to {args.budget} judgments each", len(pairs))
    unanswered = []
    for pair, found in zip(pairs, judge.compare_all(pairs, args.budget)):
        if all(vote.answer.failed for vote in found.votes):
            unanswered.append(f"{pair.id}: {found.reason}")
        if args.json:
            print(json_text({"id": pair.id} | as_json(found, pair)))
        else:
            print_comparison(pair, found)
    check_answered(unanswered, len(pairs), "pairs")


def check_answered(unanswered, total, what):
    """Raises Failure where some of them have no answer. unanswered: ["id: reason", ...]"""
    if unanswered:
        raise Failure(f"{len(unanswered)} of {total} {what} have no answer, first {unanswered[0]}")


def pairs_to_judge(args):
    """The pairs of --data, one --line of them, or the pair on the command line."""
    given = [f"--{name}" for name in ("question", "a", "b") if getattr(args, name) is not None]
    if args.data:
        if given:
            raise Failure(f"{given[0]}: not read beside --data")
        pairs = read_pairs(args.data, args.skip_bad, ties=True)
        if args.line is None:
            return pairs
        if args.line > len(pairs):
            raise Failure(f"--line {args.line}: {args.data} has {len(pairs)} pairs")
        return [pairs[args.line - 1]]
    if args.line is not None:
        raise Failure(f"--line {args.line}: of which file? name it with --data")
    if not all((text or "").strip() for text in (args.question, args.a, args.b)):
        raise Failure("name a pair: --question, --a and --b, none of them blank, or --data")
    if args.a == args.b:
        raise Failure("--a and --b are equal")
    context = [{"role": "user", "content": args.question}]
    return [Pair("command line", context, args.a, args.b, None)]


def noted(row, columns, counts):
    """`row_conversation` and the row's criteria. -> context, [text of each response], criteria or None

    It counts what was joined or renamed in `counts`.
    """
    notes = set()
    context, texts = row_conversation(row, columns, notes)
    counts.update(notes)
    return context, texts, criteria_of_row(row)


def rubric_flag(arg):
    arg(
        "--rubric",
        choices=RUBRICS_OF_A_GROUP,
        default=RUBRICS_OF_A_GROUP[0],
        help="own: each comparison writes its own; shared: one is written from the prompt alone, for all of its "
        "comparisons",
    )


def rank_flags(arg):
    rubric_flag(arg)
    form = '{"prompt": ..., "responses": [...]}'
    arg("--data", required=True, help=f"a file of lines, or - for standard input: {form}")
    arg("--goal", choices=("all", "best"), default="all", help="a reward for each, or the best one")
    arg("--most", type=number(int, 2), default=32, help="responses of a line at most")
    arg(
        "--budget",
        type=number(int, 1),
        help="judgments of a line at most, beside the one that writes a shared rubric; default: four for each of its "
        "responses",
    )


def rank_command(args):
    """Rank the responses of every line beside each other: a line of numbers for each."""

    def judgments(responses):
        return args.budget or 4 * len(responses)

    def read(row):
        if row.get("responses") is None:
            raise ValueError(f"no responses among its fields ({', '.join(row) or 'none'})")
        responses = row["responses"]
        if not isinstance(responses, list):
            raise ValueError("responses is not a list")
        if not 2 <= len(responses) <= args.most:
            raise ValueError(
                f"{len(responses)} responses; 2 to {args.most} are ranked (--most), each line "
                f"asks for up to {judgments(responses)} judgments"
            )
        return row.get("id"), *noted(row, ("responses",), counts)

    counts = Counter()
    rows = list(parse_lines(args.data, read))
    print_notes(args.data, counts)
    if not rows:
        raise Failure(f"{args.data}: no lines in it")
    most = sum(judgments(responses) for _, (_, _, responses, _) in rows)
    most += len(rows) * (args.rubric == "shared")
    judge = judge_of(args, f"{len(rows)} lines of responses, up to {most:,} judgments")
    rankings = run_sync(
        all_of(
            judge.arank(prompt, responses, args.goal, args.budget, criteria or args.criteria)
            for _, (_, prompt, responses, criteria) in rows
        )
    )
    for (line, (id, _, _, _)), ranked in zip(rows, rankings):
        row = {"id": line if id is None else id, "order": ranked.order}
        row |= ranked.numbers() | {"judgments": len(ranked.judgments)}
        if ranked.criteria:
            row["criteria"] = ranked.criteria
        print(json_text(row))


def score_flags(arg):
    form = '{"prompt": ..., "response": ...}'
    arg("--data", help=f"a file of lines, or - for standard input: {form}")
    arg("--question", help="the client's question")
    arg("--response", help="the response to score")
    arg("--samples", type=number(int, 1), default=4, help="judgments of a response")


def score_command(args):
    """Score single responses from 1 to 10: a line of numbers for each."""
    counts = Counter()

    def read(row):
        return row.get("id"), *noted(row, ("response",), counts)

    if args.data:
        given = [name for name in ("question", "response") if getattr(args, name) is not None]
        if given:
            raise Failure(f"--{given[0]}: not read beside --data")
        rows = list(parse_lines(args.data, read))
        print_notes(args.data, counts)
        if not rows:
            raise Failure(f"{args.data}: no lines in it")
    else:
        if not all((text or "").strip() for text in (args.question, args.response)):
            raise Failure("name a response: --question and --response, neither blank, or --data")
        context = [{"role": "user", "content": args.question}]
        rows = [(1, ("command line", context, [args.response], None))]

    most = len(rows) * args.samples
    judge = judge_of(args, f"{len(rows)} responses, {most:,} judgments", most)
    scores = run_sync(
        all_of(
            judge.ascore(context, as_written(response), criteria or args.criteria, args.samples)
            for _, (_, context, (response,), criteria) in rows
        )
    )
    unanswered = []
    for (line, (id, _, _, _)), found in zip(rows, scores):
        row = {"id": line if id is None else id}
        if all(vote.answer.failed for vote in found.votes):
            unanswered.append(f"{row['id']}: {found.reason}")
        row |= {name: getattr(found, name) for name in ("score", "stderr", "met", "reason")}
        print(json_text(row | {"judgments": len(found.votes)}))
    check_answered(unanswered, len(rows), "responses")


def reward_flags(arg):
    rubric_flag(arg)
    form = '{"prompt": ..., "completion": ...}'
    arg("--data", required=True, help=f"a file of lines, or - for standard input: {form}")
    arg("--rejects", help="file for lines that cannot be read, and why; default: they end the run")
    arg("--at-once", type=number(int, 1), default=1024, help="completions judged together")


def reward_command(args):
    """Reward each completion by comparing it with the others of its prompt (consecutive lines):
    prints one line each."""
    rejects = open_rejects(args)
    judge = judge_of(args, "up to four judgments a completion")

    counts = Counter()

    def read(row):
        context, (completion,), criteria = noted(row, ("completion",), counts)
        return context, completion, criteria or args.criteria

    def print_rewards(batch):
        prompts, completions, criteria = map(list, zip(*(fields for _, fields in batch)))
        rewards = judge.reward(prompts, completions, criteria=criteria)
        for (line, _), reward in zip(batch, rewards):
            print(json_text({"line": line, "reward": reward}), flush=True)

    batch = []  # of (line, (prompt, completion, criteria))
    with rejects:
        for line, fields in parse_lines(args.data, read, rejects if args.rejects else None):
            prompt = fields[0]
            # Cut between two groups, after as many of them as keep an engine busy.
            if len(batch) >= args.at_once and batch[-1][1][0] != prompt:
                print_rewards(batch)
                batch = []
            batch.append((line, fields))
    if not batch:  # the last batch is never empty, if a line could be read
        raise Failure(f"{args.data}: no lines in it that can be read")
    print_rewards(batch)
    print_notes(args.data, counts)


def open_rejects(args):
    """The file of --rejects, opened before a model loads."""
    path = args.rejects or os.devnull
    if args.rejects and os.path.exists(path) and os.path.exists(args.data):
        if os.path.samefile(path, args.data):
            raise Failure(f"--rejects {path}: is the file of --data, which would be lost")
    try:
        return open(path, "w")
    except OSError as error:
        raise Failure(f"--rejects {path}: cannot be written ({error.strerror})")


def select_flags(arg):
    form = '{"prompt": ..., "a": ..., "b": ...}, "label" or not'
    arg("--data", required=True, help=f"a file of lines, or - for standard input: {form}")
    arg("--count", type=number(int, 1), default=100, help="how many pairs to select")
    arg("--target", type=number(float, 0.5, 1), default=0.9, help="agreement to be guaranteed")
    arg("--budget", type=number(int, 1), default=8, help="judgments of a pair at most")


def select_command(args):
    """Select the pairs whose labels are worth most: those that the judge disputes, and a tenth at random."""
    rows, pairs, keys = different_pairs(args.data)
    judge = judge_of(args, f"{len(pairs)} pairs, up to {args.budget} judgments each", len(pairs))
    found = judge.compare_all(pairs, args.budget, args.criteria)

    wins = [comparison.win for comparison in found]
    drawn, disputed = ranking.select_pairs(keys, wins, min(args.count, len(rows)))
    for why, indices in (("drawn", drawn), ("disputed", disputed)):
        for i in indices:
            # A parquet file may hold dates and numbers that JSON does not know: they become texts.
            row = rows[i] | {"why": why, "win": wins[i], "verdict": found[i].verdict}
            print(json_text(row, default=str))

    labelled = []  # of (share of votes for the verdict, do people agree?)
    for comparison, pair in zip(found, pairs):
        if pair.label in ("A", "B") and comparison.share is not None:
            labelled.append((comparison.share, comparison.verdict == pair.label))
    if labelled:
        print(guarantee_line(labelled, args.target), file=sys.stderr)


def different_pairs(data):
    """The pairs of a file, once each if they differ in case and punctuation only. -> rows, pairs, keys"""

    counts = Counter()

    def read(row):
        context, (a, b), criteria = noted(row, ("a", "b"), counts)
        label = row.get("label")
        if label == "tie":
            label = None  # to judge like any other pair, with no label to count
        elif label is not None:
            check_label(label)
        return row, Pair("", context, a, b, label, criteria=criteria)

    different = {}  # {key: (row, pair)}
    for _, (row, pair) in parse_lines(data, read):
        text = json.dumps([pair.context, pair.criteria, *sorted((pair.a, pair.b))])
        key = " ".join(re.findall(r"\w+", text.lower()))
        if pair.a != pair.b:
            different.setdefault(key, (row, pair))
    if len(different) < 2:
        raise Failure(f"{data}: {len(different)} different pairs in it; give two or more")
    print_notes(data, counts)
    rows, pairs = zip(*different.values())
    return rows, pairs, list(different)


def guarantee_line(labelled, target):
    """A sentence: the lowest share of votes at which people agree with the verdicts often enough."""
    labels = f"{len(labelled)} pairs have a label"
    agreement = f"people agree with at least {100 * target:g}% of verdicts"
    lowest = ranking.guarantee(labelled, target)
    if lowest is None:
        return (
            f"{labels}; at no share of the votes is it sure, with 90% confidence, that {agreement}"
        )
    covered = sum(share >= lowest for share, _ in labelled) / len(labelled)
    return (
        f"{labels}; with 90% confidence, {agreement} that got at least {lowest:.0%} of the votes; "
        f"{covered:.0%} of these pairs have such a verdict"
    )


# ---------------------------------------------------------------- the command line

WHO_JUDGES = (
    "model protocol system-prompt base-url journal temperature seed max-tokens max-len dtype"
)


def criteria_file(path):
    """The criteria in the file of --criteria."""
    try:
        return read_criteria(read_text(path, "--criteria"))
    except ValueError as error:
        raise Failure(f"--criteria {path}: {error}") from error


def add_command(commands, name, run, add_flags):
    """A sub-parser: its own flags, then those that say who judges."""
    parser = commands.add_parser(name, help=run.__doc__.split(":")[0], description=run.__doc__)
    add_flags(parser.add_argument)
    backend_flags(parser, WHO_JUDGES)
    parser.add_argument(
        "--no-greedy",
        dest="greedy",
        action="store_false",
        help="sample the first vote in an order too, for a judge whose greedy judgment is a habit",
    )
    parser.add_argument(
        "--criteria",
        metavar="FILE",
        type=criteria_file,
        help="a text of what to judge by, and by nothing else; or lines `weight name: description`. Rows that have "
        "criteria of their own keep them",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="show what libraries print while the model loads"
    )
    parser.set_defaults(run=run, rubric=RUBRICS_OF_A_GROUP[0])


def main():
    parser = Flags(__doc__)
    commands = parser.add_subparsers(
        required=True, metavar="judge | rank | score | reward | select"
    )
    add_command(commands, "judge", judge_command, judge_flags)
    add_command(commands, "rank", rank_command, rank_flags)
    add_command(commands, "score", score_command, score_flags)
    add_command(commands, "reward", reward_command, reward_flags)
    add_command(commands, "select", select_command, select_flags)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_main(main)
