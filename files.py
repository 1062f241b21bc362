"""
Flags, files and errors, as every script has them. Text only; imports nothing of the project.

Bad input gets one sentence that names the flag, the file or the line, and exit code 2. A file has its name
only when it is whole, and a folder has one run at a time.
"""
import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import sys
from pathlib import Path


def fail(sentence):
    """Bad input: one clear sentence (from rank 0 where there are many), exit code 2."""
    if "tqdm" in sys.modules:               # a bar that stands would share the sentence's line
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# ---------------------------------------------------------------- flags

class Flags(argparse.ArgumentParser):
    """argparse whose help shows defaults, and whose complaint is one sentence. doc: the script's, of which
    the first line says what it is for."""

    def __init__(self, doc="\n", **kw):
        super().__init__(**{"description": doc.split("\n")[1],
                            "formatter_class": argparse.ArgumentDefaultsHelpFormatter} | kw)

    def error(self, message):
        fail(message.removeprefix("argument "))


def number(kind, low, high=math.inf, above=False):
    """The type of a flag that takes an int or a float (`kind`) from `low` to `high`, or, with `above`, from
    above `low`. What is no number, infinite or outside is refused: it would train nothing, or uphill."""
    what = f"{'a whole number' if kind is int else 'a number'} {'above' if above else 'from'} {low:g}"
    what += "" if high == math.inf else f" to {high:g}"

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (-math.inf < value < math.inf and low <= value <= high and not (above and value == low)):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value
    return read


# ---------------------------------------------------------------- folders

CLAIMED = {}                                # folder: its open lock file; a lock lives as long as its process


def claim(out):
    """Make a run's folder and keep other runs out of it for as long as this process lives: a killed run
    leaves no lock behind. Of several ranks, rank 0 does it for all."""
    if int(os.environ.get("RANK", 0)) != 0:
        return
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        if (folder := Path(out).resolve()) in CLAIMED:
            return
        lock = open(folder / ".lock", "w")
    except OSError as e:
        fail(f"--out {out}: cannot be written ({e.strerror})")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--out {out}: another run is writing there; wait for its end, or give another folder")
    except OSError:                         # a file system without locks: as before there were any
        pass
    CLAIMED[folder] = lock


# ---------------------------------------------------------------- files

@contextlib.contextmanager
def beside(*paths):
    """Files open for writing, {path: file}, each beside its path until all are whole; then they get their
    names. So a reader sees the old file or the new one, and a refusal leaves nothing behind."""
    files = {}
    try:
        for path in paths:
            files[path] = open(f"{path}.tmp", "w", encoding="utf-8")
        yield files
        for f in files.values():
            f.close()
        for path in paths:
            os.rename(f"{path}.tmp", path)
    except OSError as e:
        if e.errno is None:                 # the network's errors are such, too
            raise
        fail(f"{paths[0]}: cannot be written ({e.strerror})")
    finally:
        for path, f in files.items():
            with contextlib.suppress(OSError):
                f.close()
            with contextlib.suppress(OSError):
                os.unlink(f"{path}.tmp")


def write_lines(path, lines):
    """Texts as the lines of a file, see `beside`."""
    with beside(path) as files:
        files[path].writelines(line + "\n" for line in lines)


def read_text(path, flag=""):
    """The text of a file that should be UTF-8; flag: what named it."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        why = "no such file"
    except OSError as e:
        why = f"cannot be read ({e.strerror})"
    except UnicodeDecodeError:
        why = "not UTF-8 text"
    fail(f"{flag} {path}: {why}".strip())


def read_object(path):
    """The JSON object that is a whole file."""
    value = value_of(read_text(path))
    if not isinstance(value, dict):
        fail(f"{path}: not a JSON object; the file is damaged")
    return value


def read_lines(path):
    """The rows of a file that was written line by line as JSON, [] if there is none. A last line that a kill
    cut short is left out."""
    if not path.is_file():
        return []
    lines, rows = path.read_text(encoding="utf-8").split("\n"), []
    for number, line in enumerate(lines, 1):
        if line:
            try:
                rows.append(json.loads(line))
            except ValueError:
                if number < len(lines):
                    fail(f"{path}:{number}: not a JSON line; the file is damaged")
    return rows


def files_under(folder, above=()):
    """Every file under a folder, links followed; one that leads back to a folder above is not."""
    here = os.path.realpath(folder)
    try:
        names = [] if here in above else sorted(os.listdir(folder))
    except PermissionError:
        names = []
    for path in (Path(folder, name) for name in names):
        if path.is_dir():
            yield from files_under(path, (*above, here))
        elif path.is_file():
            yield path


def rows_of(source, split="train", revision=None):
    """(number, row) of a JSONL, JSON or parquet file, of "-" (JSON lines on standard input, as they come), or
    of a split of a hub dataset. What is not JSON is handed on as its text, what is not UTF-8 as its bytes
    (see `json_object`)."""
    source, path = str(source), Path(source)
    if source == "-":
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        yield from ((line, value_of(text)) for line, text in enumerate(sys.stdin, 1) if text.strip())
    elif path.is_file() and path.suffix == ".parquet":
        import pyarrow.parquet
        try:
            file = pyarrow.parquet.ParquetFile(path)
            yield from enumerate((row for batch in file.iter_batches() for row in batch.to_pylist()), 1)
        except (pyarrow.ArrowInvalid, OSError, UnicodeDecodeError) as e:
            fail(f"{source}: not a parquet file ({str(e)[:100]})")
    elif path.is_file():
        try:
            with open(path, encoding="utf-8-sig", errors="surrogateescape") as f:
                yield from rows_of_text(f, source)
        except OSError as e:
            fail(f"{source}: cannot be read ({e.strerror})")
    elif path.exists():
        fail(f"{source}: {'is a folder; name a file in it' if path.is_dir() else 'is no plain file'}")
    elif re.fullmatch(r"[\w-]+/[\w.-]+", source) and path.suffix not in (".jsonl", ".json", ".parquet"):
        from datasets import load_dataset
        try:
            rows = load_dataset(source, split=split, revision=revision)
        except Exception as e:              # the hub raises a dozen types; each means: cannot be had
            fail(f"{source}: no such file, and the hub could not give it as a dataset ({type(e).__name__})")
        yield from enumerate(rows, 1)
    else:
        fail(f"{source}: no such file")


def digest(value):
    """A short fingerprint of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(model, folder):
    """A short digest of a model's weights in its folder, from samples all over its files; of random weights
    (model names a config.json) from that file; None without a folder."""
    if folder is None:
        return None
    files = [folder / "config.json"] if str(model).endswith("config.json") else folder.glob("*.safetensors")
    mark = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        mark.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as f:
            for at in range(0, size, max(1, size // 64)):
                f.seek(at)
                mark.update(f.read(4096))
    return mark.hexdigest()[:16]


def rows_of_text(f, source):
    """(number, row) of an open text file: a row a line or, in a .json file, one array or object; JSON lines
    by that name are read as lines."""
    start = f.buffer.peek(4)[:4]
    if start[:2] in (b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b") or start == b"PK\3\4":
        fail(f"{source}: {'UTF-16' if start[0] > 0x80 else 'compressed'}; UTF-8 text is read")
    first, named = value_of(next(filter(str.strip, f), "")), source.endswith(".json")
    f.seek(0)
    whole = value_of(f.read()) if named or not isinstance(first, dict) else None
    f.seek(0)
    if named and (isinstance(whole, (dict, list)) or first and isinstance(first, (str, bytes))):
        yield from enumerate(whole if isinstance(whole, list) else [whole], 1)
    elif isinstance(whole, (dict, list)):
        fail(f"{source}: one JSON value, not one a line; name it .json")
    else:
        yield from ((number, value_of(line)) for number, line in enumerate(f, 1) if line.strip())


def value_of(text):
    """The value of a JSON text; the text itself if it is not JSON, its bytes if they were not UTF-8."""
    try:
        text.encode()
        return json.loads(text)
    except UnicodeEncodeError:
        return text.encode(errors="surrogateescape")
    except (ValueError, RecursionError):
        return text


def json_object(row):
    """A row of `rows_of` that is a JSON object, without its fields that are null: parquet and pandas write
    null for what is absent. ValueError says what else it is."""
    if isinstance(row, bytes):
        raise ValueError("not UTF-8 text")
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return {key: value for key, value in row.items() if value is not None}


def lines_of(source, read, rejects=None):
    """read(row) of every line, as they come. A line that cannot be read ends the command, or goes to the
    file `rejects` with its reason."""
    for line, row in rows_of(source):
        try:
            yield line, read(json_object(row))
        except (ValueError, TypeError) as e:
            if rejects is None:
                fail(f"{source}:{line}: {e}")
            rejects.write(json.dumps({"line": line, "reason": str(e)}) + "\n")
