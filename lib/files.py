"""
Errors, flags, folders, files and rows, the same in every script.

Bad input gets one sentence that names the flag, the file or the line, and exit code 2. A file gets its name
only when it is whole, and a folder has one run at a time. This module imports nothing of the project.
"""

import argparse
import atexit
import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path

# ---------------------------------------------------------------- errors


class Failure(BaseException):
    """The end of a run, or of one request of a server, in one sentence that names the file, line or flag.

    Libraries raise it. `run_main` prints it for a script; a server answers the request with it. It derives
    from BaseException, so an `except Exception` on its way never takes it for an error of a reward, a chat
    template or a hub. `raise Failure(...) from error` says what that error means for the user.
    """


def run_main(main, explain=None):
    """Run a script's main() and end the process.

    main     the script's function without arguments
    explain  takes an exception that is no `Failure` and returns a sentence for it, or None for its traceback

    One of several ranks ends at once, without Python's own clean-up. After an error, libraries would wait
    there for the other ranks. After success, their threads would live on while the interpreter is taken
    apart around them, and a rank that was done has been seen to abort. A rank alone that is well ends as any
    script does, so that a profiler can write its files.
    """
    code = 0

    def leave():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    # What is registered first runs last: after the script's own functions, and instead of those that
    # libraries registered when they were imported, which would print a page on their leaks.
    atexit.register(leave)
    code = exit_code(main, explain)
    if rank_count() == 1 and code in (0, 2):
        sys.exit(code)
    leave()


def exit_code(main, explain=None):
    """Run main() and print what it raises.

    Returns 0 for success, 2 for a `Failure`, 130 for Ctrl-C, else 1 or the script's own code.
    """
    try:
        main()
        return 0
    except Failure as failure:
        if already_printed(str(failure)):
            return 2
        cause = failure.__cause__
        if cause is not None and passed_our_code(cause):
            traceback.print_exception(cause)
        print_error(str(failure))
        return 2
    except SystemExit as end:  # from argparse's --help, or from a script's own sys.exit
        if isinstance(end.code, int | None):
            return end.code or 0
        if not already_printed(str(end.code)):
            print_error(str(end.code))
        return 1
    except BrokenPipeError:  # the reader of our output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if this_rank() == 0:
            print("\ninterrupted; the same command goes on from what is on disk", file=sys.stderr)
        return 130
    except Exception as error:
        sentence = explain(error) if explain else None
        print_error(sentence or traceback.format_exc().rstrip())
        return 1


def this_rank():
    """This process's number among those that torchrun has started; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def rank_count():
    """How many processes torchrun has started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def print_error(message):
    """Print an error, with the number of the rank that met it where there are several."""
    if "tqdm" in sys.modules:  # an open progress bar would share the sentence's line
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    place = f" in rank {this_rank()}" if rank_count() > 1 else ""
    separator = "\n" if message.startswith("Traceback") else " "
    print(f"error{place}:{separator}{message}", file=sys.stderr, flush=True)


def already_printed(sentence):
    """True if another rank of this launch has printed the sentence on this machine.

    The ranks share no memory and may have no process group yet, so a file in the folder for temporary files
    marks a sentence as printed. The file's name depends on the launcher's process and its start time.
    """
    if rank_count() == 1:
        return False
    launcher = [os.getppid()]
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{os.getppid()}/stat").read_text()
        start_time = status.rpartition(")")[2].split()[19]
        launcher.append(start_time)
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    launch = [os.environ.get(name) for name in names]
    mark = digest([launcher, launch, sentence])
    path = Path(tempfile.gettempdir()) / f"rmr1-{os.getuid()}-printed-{mark}"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        return False
    except FileExistsError:
        return True
    except OSError:  # a full disk: printing twice is better than never
        return False


def passed_our_code(error):
    """True if an exception passed through this project's code, below the line that caught it.

    Then it may be a slip in an edited file, and the traceback tells where.
    """
    below = traceback.extract_tb(error.__traceback__)[1:]
    return any(is_our_file(frame.filename) for frame in below)


def is_our_file(name):
    """True for a file of this project, but not of the environment in it."""
    project = str(Path(__file__).resolve().parent.parent)
    return name.startswith(project) and ".venv" not in name


def first_line(error):
    """The first line of an exception's message, at most 150 characters of it; the lines behind it too where it only
    says that they tell the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    text = lines.pop(0)
    while lines and (text.endswith(":") or re.search(r"validation errors? for \w+$", text)):
        text = f"{text} {lines.pop(0)}"
    return text[:150]


# ---------------------------------------------------------------- flags


class Flags(argparse.ArgumentParser):
    """argparse with defaults in its help, and one sentence as its complaint.

    doc  a script's docstring; its first line is the help's description
    """

    def __init__(self, doc="", **options):
        summary = doc.strip().partition("\n")[0]
        options.setdefault("description", summary)
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(**options)

    def error(self, message):
        raise Failure(message.removeprefix("argument "))


def number(kind, low, high=math.inf, above=False):
    """The `type` of a flag whose value is a number in a range.

    kind   int or float
    low    the least value, allowed unless `above`
    high   the greatest value, allowed

    Text that is no number, or an infinite one, is refused: it would train nothing, or uphill.
    """
    noun = "a whole number" if kind is int else "a number"
    expected = f"{noun} above {low:g}" if above else f"{noun} from {low:g}"
    if high < math.inf:
        expected += f" to {high:g}"

    def read_number(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        finite = -math.inf < value < math.inf
        in_range = low < value <= high if above else low <= value <= high
        if finite and in_range:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not {expected}")

    return read_number


# ---------------------------------------------------------------- folders

LOCKED = {}  # folder: its open lock file, which stays locked as long as this process lives


def lock_folder(out):
    """Make a run's folder and keep other runs out of it for as long as this process lives.

    A killed run leaves no lock behind. With several ranks, rank 0 locks for all of them. Raises Failure
    where the folder cannot be written, or another run has it.
    """
    if this_rank() != 0:
        return
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        folder = Path(out).resolve()
        if folder in LOCKED:
            return
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise Failure(f"--out {out}: cannot be written ({error.strerror})")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Failure(
            f"--out {out}: another run is writing there; wait for its end, or give another folder"
        )
    except OSError:  # a file system without locks cannot keep anybody out
        pass
    LOCKED[folder] = lock


def lock_file(path):
    """Keep other processes out of a file for as long as this process lives. Raises Failure where one has it."""
    file = Path(path).resolve()
    if file in LOCKED:
        return
    lock = open(file, "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Failure(
            f"{path}: another process writes there; wait for its end, or give another file"
        )
    except OSError:  # a file system without locks
        pass
    LOCKED[file] = lock


def files_under(folder, above=()):
    """Yield every file under a folder, sorted by name.

    above  the real paths of the folders around it

    Links are followed, except those that lead back to a folder above.
    """
    here = os.path.realpath(folder)
    if here in above:
        return
    try:
        names = sorted(os.listdir(folder))
    except PermissionError:
        return
    for name in names:
        path = Path(folder, name)
        if path.is_dir():
            yield from files_under(path, (*above, here))
        elif path.is_file():
            yield path


# ---------------------------------------------------------------- what is printed


def progress_bar(rows=None, name="", **settings):
    """tqdm for a script: rank 0 draws it, on standard error.

    On a terminal it moves as rows are done. Into a file or a pipe it prints a line every ten seconds and one at
    the end. Give `set_postfix` refresh=False: otherwise it prints a line each time.

    settings  others of tqdm's
    """
    from tqdm import tqdm  # here, because data/toy.py --show runs without packages

    settings = {"disable": this_rank() != 0} | settings
    if not sys.stderr.isatty():
        # Any delay above 0 leaves out the line before the first row.
        settings |= {"file": Lines(), "mininterval": 10, "delay": 1e-9}
    return tqdm(rows, name, **settings)


class Lines:
    """Standard error for a progress bar: its states as lines below each other, instead of over each other."""

    def write(self, text):
        state = text.strip()
        if state:
            sys.stderr.write(state + "\n")

    def flush(self):
        sys.stderr.flush()


@contextlib.contextmanager
def output_in_file(path):
    """Within the block, what this process prints goes to a file: also what libraries print in C++."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(path, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((1, 2), saved):
            os.dup2(original, descriptor)
            os.close(original)


# ---------------------------------------------------------------- files


def json_text(value, indent=None, default=None):
    """A value as JSON. What JSON has no numbers for, NaN and the infinities, is written as null, and as text where
    it is a key. Numbers and arrays of numpy and torch are written as Python's.

    default  a function that makes JSON of other types, as `json.dumps` takes it
    """
    try:
        return json.dumps(value, allow_nan=False, indent=indent)
    except (ValueError, TypeError):
        value = plain_value(value)
        return json.dumps(value, allow_nan=False, indent=indent, default=default)


def plain_value(value):
    """A value for JSON of Python's own types, with None in place of every NaN and infinity in it."""
    if hasattr(value, "tolist"):  # of numpy and torch, numbers too
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {plain_key(key): plain_value(field) for key, field in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    return value


def plain_key(key):
    """A key for JSON, which has no NaN."""
    is_number = isinstance(key, float) or hasattr(key, "tolist")
    return str(key) if is_number else key


@contextlib.contextmanager
def atomic_write(*paths):
    """Open files for writing that get their names when all of them are whole.

    Gives {path: open file}; each is called PATH.tmp until then. So a reader sees the old file or the new
    one, and an error leaves nothing behind. Raises Failure where a file cannot be written.
    """
    files = {}
    try:
        for path in paths:
            files[path] = open(f"{path}.tmp", "w", encoding="utf-8")
        yield files
        for file in files.values():
            file.close()
        for path in paths:
            os.rename(f"{path}.tmp", path)
    except OSError as error:
        if error.errno is None:  # a network's errors are OSErrors too, and not about these files
            raise
        raise Failure(f"{paths[0]}: cannot be written ({error.strerror})")
    finally:
        for path, file in files.items():
            with contextlib.suppress(OSError):
                file.close()
            with contextlib.suppress(OSError):
                os.unlink(f"{path}.tmp")


def write_lines(path, lines):
    """Write texts as the lines of a file, atomically (see `atomic_write`)."""
    with atomic_write(path) as files:
        files[path].writelines(line + "\n" for line in lines)


def read_text(path, flag=""):
    """The text of a UTF-8 file. flag: the flag that named it, for the message of the Failure."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        reason = "no such file"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        reason = "not UTF-8 text"
    raise Failure(f"{flag} {path}: {reason}".strip())


def read_object(path):
    """The JSON object that fills a whole file. Raises Failure for anything else."""
    value = json_or_none(read_text(path))
    if not isinstance(value, dict):
        raise Failure(f"{path}: not a JSON object; the file is damaged")
    return value


def read_lines(path, fields=None):
    """The JSON objects of a file that one of our scripts wrote line by line; [] if there is no such file.

    fields  {name: type, or a tuple of types} that every line has

    A last line that a kill cut short is left out. Raises Failure for any other broken line.
    """
    if not path.is_file():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for line_number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:  # also of bytes that are not UTF-8
            if line_number < len(lines):
                raise Failure(f"{path}:{line_number}: not a JSON line; the file is damaged")
            continue
        if not isinstance(row, dict):
            raise Failure(f"{path}:{line_number}: not a JSON object; the file is damaged")
        for name, types in (fields or {}).items():
            if name not in row:
                raise Failure(
                    f"{path}:{line_number}: has no {name}; the file is damaged, or another's"
                )
            if not isinstance(row[name], types):
                raise Failure(f"{path}:{line_number}: {name} is {str(row[name])[:40]!r}")
        rows.append(row)
    return rows


# ---------------------------------------------------------------- rows of a data set


def read_rows(source, split="train", revision=None):
    """Yield (number, row, error) for every row of a source.

    source  a JSONL, JSON or parquet file, "-" for JSON lines on standard input, or a hub dataset owner/name
    number  the line's number, or the row's, from 1; blank lines have none
    row     a dict without fields that are null, because parquet and pandas write null for what is absent
    error   "" or what is wrong with the line, whose row is None then

    Rows come as they are read, so standard input may be endless. Raises Failure where there is no source.
    """
    source = str(source)
    path = Path(source)
    if source == "-":
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        yield from line_rows(sys.stdin)
    elif path.is_file() and path.suffix == ".parquet":
        yield from parquet_rows(path)
    elif path.is_file():
        yield from text_rows(path)
    elif path.is_dir():
        raise Failure(f"{source}: is a folder; name a file in it")
    elif path.exists():
        raise Failure(f"{source}: is no plain file")
    elif is_hub_name(source):
        yield from hub_rows(source, split, revision)
    else:
        raise Failure(f"{source}: no such file")


def is_hub_name(source):
    """True for owner/name, unless the name ends as a data file does: then a file was meant."""
    data_file = source.endswith((".jsonl", ".json", ".parquet"))
    return re.fullmatch(r"[\w-]+/[\w.-]+", source) is not None and not data_file


def hub_rows(name, split, revision):
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split, revision=revision)
    except Exception as error:  # the hub raises a dozen types; each means: cannot be had
        raise Failure(
            f"{name}: no such file, and the hub could not give it as a dataset "
            f"({type(error).__name__})"
        ) from error
    for row_number, row in enumerate(rows, 1):
        yield row_number, *row_or_error(json_object, row)


def parquet_rows(path):
    import pyarrow.parquet

    row_number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                row_number += 1
                yield row_number, *row_or_error(json_object, row)
    except (pyarrow.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise Failure(f"{path}: not a parquet file ({str(error)[:100]})")


def text_rows(path):
    """The rows of a JSON or JSONL file.

    A .json file holds one array or object, or is read line by line where its lines are JSON objects. Every
    other file is read line by line.
    """
    try:
        # A byte that is not UTF-8 becomes half a surrogate pair, so that one bad line does not end the file.
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            check_encoding(file, path)
            yield from open_text_rows(file, path)
    except OSError as error:
        raise Failure(f"{path}: cannot be read ({error.strerror})")


def check_encoding(file, path):
    """Raises Failure for UTF-16 and for compressed files, which begin with bytes of their own."""
    start = file.buffer.peek(4)[:4]
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Failure(f"{path}: UTF-16; UTF-8 text is read")
    if start.startswith((b"\x1f\x8b", b"PK\3\4")):
        raise Failure(f"{path}: compressed; UTF-8 text is read")


def open_text_rows(file, path):
    named_json = path.suffix == ".json"
    first = next(filter(str.strip, file), "")
    starts_as_lines = isinstance(json_or_none(first), dict)
    starts_broken = first != "" and json_or_none(first) is None
    file.seek(0)

    whole = None
    if named_json or not starts_as_lines:
        text = file.read()
        whole = json_or_none(text)
        file.seek(0)

    if isinstance(whole, (dict, list)) and not named_json:
        raise Failure(f"{path}: one JSON value, not one a line; name it .json")
    if isinstance(whole, (dict, list)):
        values = whole if isinstance(whole, list) else [whole]
        for row_number, value in enumerate(values, 1):
            yield row_number, *row_or_error(json_object, value)
    elif named_json and starts_broken:  # a damaged array: one error, not one for each of its lines
        yield 1, *row_or_error(parse_row, text)
    else:
        yield from line_rows(file)


def line_rows(lines):
    for line_number, line in enumerate(lines, 1):
        if line.strip():
            yield line_number, *row_or_error(parse_row, line)


def row_or_error(read, value):
    """(row, "") from a function that reads a row, or (None, error) where it raises ValueError."""
    try:
        return read(value), ""
    except ValueError as error:
        return None, str(error) or repr(error)


def parse_row(text):
    """The JSON object of a line. Raises ValueError with what else the line is."""
    if not is_utf8(text):
        raise ValueError("not UTF-8 text")
    return json_object(json_or_none(text))


def json_object(value):
    """A JSON object without its null fields. Raises ValueError for any other value."""
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return {name: field for name, field in value.items() if field is not None}


def json_or_none(text):
    """The value of a JSON text, None if it is not JSON, is nested too deeply, or was not UTF-8."""
    try:
        return json.loads(text) if is_utf8(text) else None
    except (ValueError, RecursionError):
        return None


def is_utf8(text):
    """False for a text that was read from bytes that are not UTF-8, with errors="surrogateescape"."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def parse_lines(source, read, rejects=None):
    """Yield (number, read(row)) for every row of a source, as they come.

    read     takes a row and returns anything; it raises ValueError for a row that it cannot use
    rejects  an open file that gets a line with the reason for each such row; None to end the command

    Any other exception of `read` is a slip in `read`, and is not caught. Raises Failure.
    """
    for line, row, error in read_rows(source):
        if not error:
            value, error = row_or_error(read, row)
        if not error:
            yield line, value
        elif rejects is None:
            raise Failure(f"{source}:{line}: {error}")
        else:
            rejects.write(json_text({"line": line, "reason": error}) + "\n")


# ---------------------------------------------------------------- digests and seeds


def digest(value):
    """A short fingerprint of anything that JSON can write."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def seed_of(*key):
    """The seed of one sample: a function of what names it, e.g. (run seed, step, pair, sample)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7])
