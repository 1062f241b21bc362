"""
The journal: answers on disk, each under the digest of its request.
"""

import json
import os
import threading

from judge.backends import NO_ANSWER, Answer, is_of_window
from lib.files import Failure, json_text, lock_file, read_lines

ANSWER_FIELDS = ("text", "finish", "tokens", "prompt_tokens")


class Journal:
    """Cache of answers, one line of JSON each. It also serves to resume a killed run and to count tokens.

    path     the file; without one the journal lasts as long as the process
    answers  {request: its line}, where a request's key is the digest of all that could change its answer
    failed   why the last request without an answer got none, for whoever asks to note here

    Raises Failure where the file was written by another version of this project, is damaged, or cannot be
    written.
    """

    def __init__(self, path=None):
        self.path = path
        self.answers = {}
        self.failed = ""
        self.file = None
        self.lock = threading.Lock()
        if path:
            self.file = open_alone(path)
            self.answers = read_journal(path)
            mend_end(path)

    def find(self, request):
        """-> the `Answer` to a request, None where there is none"""
        row = self.answers.get(request)
        if row is None:
            return None
        return Answer(**{name: row[name] for name in ANSWER_FIELDS}, origin="cached")

    def add(self, request, answer, **about):
        """Add a line, flushed at once. about: what else it says, for people to read."""
        row = about | {"request": request}
        row |= {name: getattr(answer, name) for name in ANSWER_FIELDS}
        self.answers[request] = row
        if self.file is None:
            return
        try:
            with self.lock:  # several threads may use one judge
                self.file.write(json_text(row) + "\n")
                self.file.flush()
        except OSError as e:
            raise Failure(
                f"{self.path}: cannot be written ({e.strerror}); the answers in it are kept"
            )


def open_alone(path):
    """Open a journal to add lines, and keep other processes out of it, whose lines would be lost.

    The file is never replaced, only added to: it may be a link. Raises Failure for what is no plain file.
    """
    if path.exists() and not path.is_file():
        raise Failure(f"--journal {path}: is no plain file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", encoding="utf-8")
    except OSError as e:
        raise Failure(f"--journal {path}: cannot be written ({e.strerror})")
    lock_file(path)
    return file


def mend_end(path):
    """Cut off a last line that a kill has cut short, behind which no line could be added."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    last = content[end:]
    if not last:
        return
    try:
        json.loads(last)
        with open(path, "ab") as file:
            file.write(b"\n")
    except ValueError:
        os.truncate(path, end)


def read_journal(path):
    """The lines of a journal. -> {request: line}

    An earlier version named the key otherwise, and digested other things. Its answers could not be found, and
    a run that asks for all of them again would not say so: such a file is refused. What says that there was no
    answer is none: it is asked for again. So is what a window had no room for: the next run may have a longer one
    (--max-len, a server that was started anew), and a refusal costs nothing.
    """
    rows = read_lines(path)
    if not rows and path.read_bytes()[:1] not in (b"", b"{"):
        raise Failure(f"{path}: is no journal; give another file")
    if not all({"request", *ANSWER_FIELDS} <= set(row) for row in rows):
        raise Failure(f"{path}: a journal of another version of this project; give another file")
    return {row["request"]: row for row in rows if is_of_any_run(str(row["finish"]))}


def is_of_any_run(finish):
    """Whether an answer that ended so would be the same in another run."""
    return not (finish.startswith(NO_ANSWER) or is_of_window(finish))
