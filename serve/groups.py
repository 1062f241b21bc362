"""
Trainers that send one sample at a time: a sample waits for the others of its group, and all are judged together.
"""

import asyncio
from dataclasses import dataclass, field

from judge.backends import NO_ANSWER, Refused
from lib.files import Failure, digest

KEEP_SECONDS = 600  # for which a judged sample answers a retry that has its id
RETRY_SECONDS = 60  # the same without an id: only the text says then that it is a retry
TWIN_SECONDS = 1  # for which a text that is waited for already may turn out to be a retry


def check_votes(votes):
    """Return the votes of which at least one has a text; numbers without any text would say nothing.

    Raises Refused where the model's server gave no answer, and ValueError for every other reason: it is final, and
    a trainer that asked again would hear the same.
    """
    if not votes or any(vote.judgment.text for vote in votes):
        return votes
    reason = votes[0].judgment.reason
    if reason.startswith(NO_ANSWER):
        raise Refused(reason)
    raise ValueError(reason)


class Busy(Exception):
    """Too many samples wait, or the server is closing."""


@dataclass(eq=False)
class Member:
    """A sample of a group.

    sample_id     what its caller calls it, or None
    text          the response; "" once the group has been judged
    text_digest   of the response, to recognise a retry
    byte_count    of prompt and response, while they wait
    callers       requests that wait for its reward: none if its caller has left, two after a retry with an id
    has_answered  whether a caller has received the reward
    reward        future of (reward, standard error)
    """

    sample_id: str | None
    text: str
    text_digest: str
    byte_count: int
    callers: int = 0
    has_answered: bool = False
    reward: asyncio.Future = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


@dataclass(eq=False)
class PendingGroup:
    """Samples of one prompt that are judged together, by the same criteria. It takes members while it has a timer.

    judged_at  the event loop's time at which the rewards were there, or None
    """

    prompt: list
    size: int
    criteria: str | None = None
    members: list = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None
    judged_at: float | None = None


class PendingGroups:
    """Groups of samples of one prompt, for trainers that send each sample by itself.

    judge        gives the rewards of a whole group
    timeout      seconds after its last sample at which a group is judged that is not whole
    max_samples  that wait or are remembered, of all groups together
    max_bytes    of prompts and responses that wait

    A sample joins the open group of its prompt, size, group id and criteria. The group is judged when it is whole, or
    at its timeout with the samples that have come; a sample that is alone then gets None. The rewards do not
    depend on the order in which the samples came. All samples of a group must come to the same gateway.

    A caller that leaves costs the others nothing, because its sample stays a member. Its retry finds that
    place again. With an id, id and text name the place, for ten minutes after the judgment. Without an id
    the text alone names it, and only if no caller waits there and none has had the reward. Such a text may
    also be a new sample of a later training step, which must not get an old reward and be missing in its own
    group. So a group ends for retries without an id when the next group of its prompt begins after the
    judgment, and a minute after the judgment at the latest. A trainer that gives each step's groups their
    own group id has no such doubt.

    A group that failed is forgotten as soon as its callers know: the judge may be well again, and a retry
    must be judged anew.
    """

    def __init__(self, judge, timeout, max_samples=1 << 17, max_bytes=1 << 30):
        self.judge = judge
        self.timeout = timeout
        self.max_samples = max_samples
        self.max_bytes = max_bytes
        # key: the groups of this prompt, size, group id and criteria, the oldest first
        self.groups = {}
        self.tasks = set()  # judgments under way, since asyncio holds its tasks by weak references
        self.waiting = 0  # callers
        self.sample_count = 0
        self.byte_count = 0

    async def reward(self, prompt, text, size, sample_id=None, group_id="", criteria=None):
        """Return (reward, standard error) of a sample once its group has been judged.

        prompt    chat messages; size: samples in the whole group
        criteria  what the group is judged by, as `lib.pairs.read_criteria` writes it

        Raises Busy if no more samples can wait, and what ended the judgment of the group.
        """
        key = digest([prompt, size, group_id, criteria])
        text_digest = digest(text)
        if sample_id is None:
            await self.wait_for_leaving_caller(key, text_digest)
        member = self.find_retried(key, sample_id, text_digest)
        if member is None:
            group = PendingGroup(prompt, size, criteria)
            member = self.join(key, group, sample_id, text, text_digest)

        member.callers += 1
        self.waiting += 1
        try:
            reward = await asyncio.shield(member.reward)
            member.has_answered = True
            return reward
        finally:
            member.callers -= 1
            self.waiting -= 1

    async def wait_for_leaving_caller(self, key, text_digest):
        """Wait a second at most while every member with this text has a caller.

        Two samples of a group may be equal. But a retry may also arrive over its new connection before the
        end of the old one has been noticed, and would then be counted twice.
        """
        for _ in range(TWIN_SECONDS * 20):
            twins = self.unanswered(key, text_digest)
            if not twins or not all(twin.callers for twin in twins):
                return
            await asyncio.sleep(0.05)

    def unanswered(self, key, text_digest):
        """Members without an id that have this text and whose reward no caller has had."""
        return [
            member
            for group in self.groups.get(key, [])
            if self.takes_retries(key, group)
            for member in group.members
            if member.sample_id is None
            and member.text_digest == text_digest
            and not member.has_answered
        ]

    def takes_retries(self, key, group):
        """Whether a sample without an id may still be the retry of one in this group."""
        if group.judged_at is None:
            return True
        is_newest = group is self.groups[key][-1]
        age = asyncio.get_running_loop().time() - group.judged_at
        return is_newest and age < RETRY_SECONDS

    def find_retried(self, key, sample_id, text_digest):
        """The member whose caller asks again, or None for a new sample."""
        if sample_id is None:
            places = [m for m in self.unanswered(key, text_digest) if not m.callers]
        else:
            places = [
                member
                for group in self.groups.get(key, [])
                for member in group.members
                if (member.sample_id, member.text_digest) == (sample_id, text_digest)
            ]
        return places[0] if places else None

    def join(self, key, new_group, sample_id, text, text_digest):
        """Make a sample a member of the open group of its key, which starts if it is whole now.

        new_group  becomes that group where none is open
        """
        texts = [text, *(message["content"] for message in new_group.prompt)]
        texts.append(new_group.criteria or "")
        byte_count = sum(len(part.encode()) for part in texts)
        if self.sample_count >= self.max_samples:
            raise Busy(
                f"{self.sample_count:,} samples wait, or were judged in the last ten minutes: "
                "no more of them"
            )
        if self.byte_count + byte_count > self.max_bytes:
            raise Busy(f"the samples that wait have {self.byte_count:,} bytes: no more of them")

        groups = self.groups.setdefault(key, [])
        if not groups or groups[-1].timer is None:
            groups.append(new_group)
        group = groups[-1]
        member = Member(sample_id, text, text_digest, byte_count)
        group.members.append(member)
        self.sample_count += 1
        self.byte_count += byte_count

        if group.timer:
            group.timer.cancel()
        group.timer = asyncio.get_running_loop().call_later(self.timeout, self.start, key, group)
        if len(group.members) == group.size:
            self.start(key, group)
        return member

    def start(self, key, group):
        """Close a group to new members and judge it."""
        group.timer.cancel()
        group.timer = None
        task = asyncio.get_running_loop().create_task(self.judge_group(key, group))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def judge_group(self, key, group):
        texts = [member.text for member in group.members]
        try:
            rewards, votes = await self.judge.agroup(group.prompt, texts, group.criteria)
            check_votes(votes)
            results = list(zip(group.members, rewards, strict=True))
        except (Exception, Failure) as error:
            self.fail(key, group, error)
            return

        for member, reward in results:
            member.reward.set_result(reward)
        loop = asyncio.get_running_loop()
        group.judged_at = loop.time()
        self.release_texts(group)
        loop.call_later(KEEP_SECONDS, self.forget, key, group)

    def fail(self, key, group, error):
        """Tell every waiting caller why, and forget the group."""
        for member in group.members:
            member.reward.set_exception(error)
            member.reward.exception()  # else asyncio complains where no caller waits
        self.release_texts(group)
        self.forget(key, group)

    def release_texts(self, group):
        """Keep no texts of samples that wait no more."""
        for member in group.members:
            self.byte_count -= member.byte_count
            member.text = ""

    def forget(self, key, group):
        self.groups[key].remove(group)
        self.sample_count -= len(group.members)
        if not self.groups[key]:
            del self.groups[key]

    def close(self, message):
        """Give `Busy` to the callers of open groups, whose other samples cannot come any more."""
        for key, groups in list(self.groups.items()):
            for group in [group for group in groups if group.timer]:
                group.timer.cancel()
                group.timer = None
                self.fail(key, group, Busy(message))
