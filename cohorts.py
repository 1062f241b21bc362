"""
Trainers that send one sample at a time: samples wait for the others of their group, and are judged with them.
"""
import asyncio
from dataclasses import dataclass, field

from askers import Refused
from files import digest


def checked(votes):
    """Votes. Where none has a text, whoever asked is told why instead of numbers that say nothing: ValueError
    for a prompt without room, else Refused."""
    if votes and not any(v.judgment.text for v in votes):
        why = votes[0].judgment.reason
        raise ValueError(why) if why.startswith("prompt") else Refused(why)
    return votes


class Busy(Exception):
    """Too many samples wait, or none is taken any more."""


@dataclass(eq=False)
class Rollout:
    """A sample that waits for the others. text: "" once it has been judged, mark: its digest; callers:
    requests that wait for its reward; told: one got it."""
    id: str | None
    text: str
    mark: str
    callers: int = 0
    told: bool = False
    reward: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(eq=False)
class Cohort:
    prompt: object
    size: int
    rollouts: list = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None


class Cohorts:
    """Groups of samples to one prompt, for trainers that send each by itself.

    A sample joins the open cohort of its prompt, size and name, and is judged with it once `size` are there,
    or `timeout` seconds after the last one came: who is there then gets judged, and one alone gets None. Who
    leaves is still a member, so the others lose nothing. A retry finds its place: with an id by id and text,
    without one by its text, if nobody waits there and nobody was told; for ten minutes after the judgment,
    too. A text that is waited for already is looked at for a second: a retry, or a twin? Rewards do not
    depend on the order in which samples came. All of a cohort must come to one gateway."""

    def __init__(self, judge, timeout, most=1 << 17):
        self.judge, self.timeout, self.most = judge, timeout, most
        self.cohorts, self.tasks, self.waiting, self.kept = {}, set(), 0, 0

    async def reward(self, prompt, text, size, id=None, name=""):
        """-> reward, stderr of a sample, once its cohort has been judged"""
        key, mark = digest([prompt, size, name]), digest(text)
        for _ in range(20):             # its twin, or itself again, whose first caller is about to leave
            same = [r for r in self.members(key) if (r.id, r.mark) == (None, mark) and not r.told]
            if id is not None or not same or not all(r.callers for r in same):
                break
            await asyncio.sleep(0.05)
        rollout = self.place(key, prompt, size, id, text, mark)
        rollout.callers += 1
        self.waiting += 1
        try:
            reward = await asyncio.shield(rollout.reward)
            rollout.told = True
            return reward
        finally:
            rollout.callers -= 1
            self.waiting -= 1

    def members(self, key):
        return [rollout for cohort in self.cohorts.get(key, ()) for rollout in cohort.rollouts]

    def place(self, key, prompt, size, id, text, mark):
        """-> the `Rollout` of a sample: a retry's own, or a new one in the open cohort"""
        for rollout in self.members(key):
            if (rollout.id, rollout.mark) == (id, mark) and (id or not (rollout.callers or rollout.told)):
                return rollout
        if self.kept >= self.most:
            raise Busy(f"{self.kept:,} samples wait, or were judged in the last ten minutes: no more of them")
        cohorts = self.cohorts.setdefault(key, [])
        if not cohorts or cohorts[-1].timer is None:
            cohorts.append(Cohort(prompt, size))
        cohort, rollout = cohorts[-1], Rollout(id, text, mark)
        cohort.rollouts.append(rollout)
        self.kept += 1
        if cohort.timer:
            cohort.timer.cancel()
        cohort.timer = asyncio.get_running_loop().call_later(self.timeout, self.start, key, cohort)
        if len(cohort.rollouts) == size:
            self.start(key, cohort)
        return rollout

    def start(self, key, cohort):
        cohort.timer.cancel()
        cohort.timer = None                                 # nobody joins any more
        task = asyncio.get_running_loop().create_task(self.judge_together(key, cohort))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def judge_together(self, key, cohort):
        try:
            rewards, votes = await self.judge.agroup(cohort.prompt, [r.text for r in cohort.rollouts])
            checked(votes)
            for rollout, reward in zip(cohort.rollouts, rewards, strict=True):
                rollout.reward.set_result(reward)
        except (Exception, SystemExit) as e:
            self.fail(cohort, e)
        for rollout in cohort.rollouts:
            rollout.text = ""
        asyncio.get_running_loop().call_later(600, self.forget, key, cohort)

    def fail(self, cohort, why):
        for rollout in cohort.rollouts:
            rollout.reward.set_exception(why)
            rollout.reward.exception()                      # asked for, whether or not anybody waits

    def forget(self, key, cohort):
        self.cohorts[key].remove(cohort)
        self.kept -= len(cohort.rollouts)
        if not self.cohorts[key]:
            del self.cohorts[key]

    def close(self, why):
        """Nobody waits for samples that cannot come any more: who does gets `Busy`."""
        for cohort in [c for some in self.cohorts.values() for c in some if c.timer]:
            cohort.timer.cancel()
            cohort.timer = None
            self.fail(cohort, Busy(why))
