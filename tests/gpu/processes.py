"""Programs that are started, logged, and ended with all that they started."""
import glob
import json
import os
import queue
import signal
import subprocess
import threading
import time

# That have come and ask for the end.
signals = []


class Failed(Exception):
    """A program ended with an error, or took too long."""


def on_signal(number, _):
    """Only takes note: an error raised from here could come between the start of a process and the `try` that ends it."""
    signals.append(number)


def wait_for(done, seconds):
    """Whether `done()` is true in time. Whoever waits when a signal comes fails."""
    until = time.monotonic() + seconds
    while not done():
        if signals:
            raise Failed("interrupted")
        if time.monotonic() >= until:
            return False
        time.sleep(0.05)
    return True


def start(command, **options):
    # A group of its own, so that what it started ends with it.
    return subprocess.Popen([str(part) for part in command], start_new_session=True, stdin=subprocess.DEVNULL, **options)


def end(process):
    """Asks politely, then does not ask. Returns when the process is gone, and what it had started too: the card's memory is free."""
    for sign, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            pass
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            pass
    until = time.monotonic() + 10
    while runs(process.pid) and time.monotonic() < until:
        time.sleep(0.1)


def runs(session):
    """Whether a process of the session is left, other than as a zombie that nobody waits for."""
    for file in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(file) as stat:
                # proc_pid_stat(5): behind the name in parentheses.
                state, _, _, its_session, *_ = stat.read().rpartition(")")[2].split()
        except OSError:
            continue
        if int(its_session) == session and state not in "ZX":
            return True
    return False


def run_logged(command, log, timeout, on_line=None, out=None):
    """Runs to the end, everything said going to `log`; standard output to the file `out` instead, or each of its lines to `on_line`
    too, as soon as it is there."""
    log.write(f"$ {' '.join(map(str, command))}\n")
    log.flush()
    name = " ".join(os.path.basename(str(part)) for part in command[:2])
    process = start(command, stdout=subprocess.PIPE if on_line else out or log, stderr=log, errors="replace")
    reader, problems, unread = None, [], []
    try:
        if on_line:
            def read():
                for line in process.stdout:
                    # Whatever fails, the pipe must not fill up.
                    try:
                        log.write(line)
                        log.flush()
                        on_line(line)
                    except Exception as error:
                        unread.append(f"{type(error).__name__} at {line.strip()[:200]!r} of {name}: {error}")

            reader = threading.Thread(target=read, daemon=True)
            reader.start()
        if not wait_for(lambda: process.poll() is not None, max(timeout, 1)):
            problems.append(f"{name} was ended after {timeout:.0f} s")
        elif process.returncode != 0:
            problems.append(f"{name} ended with {process.returncode}")
    finally:
        end(process)
        if reader:
            reader.join(10)
    problems += unread[:1]
    if problems:
        log.write("".join(f"{problem}\n" for problem in problems))
        raise Failed("; ".join(problems))


def json_lines(into):
    """An `on_line` that appends each line that is a JSON object to the list `into`."""

    def take(line):
        try:
            value = json.loads(line)
        except ValueError:
            return
        if isinstance(value, dict):
            into.append(value)

    return take


class Server:
    """`idefics serve`, ready. `settings` as in {"decoder.kv_cache_bytes": 1 << 30}."""

    def __init__(self, binary, checkpoint, device, log, seconds, settings={}):
        command = [binary, "serve", "--grpc-addr", "127.0.0.1:0", "--log-format", "json", "--device", device]
        command += ["--model", checkpoint] if checkpoint else []
        log.write(f"$ {' '.join(map(str, command))}\n")
        log.flush()
        environment = os.environ | {f"IDEFICS_{key.upper().replace('.', '__')}": str(value) for key, value in settings.items()}
        self.process, lines = start(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, errors="replace", env=environment), queue.Queue()

        def read():
            for line in self.process.stderr:
                log.write(line)
                log.flush()
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            self.endpoint = f"http://{self.address(lines, seconds)}"
        except BaseException:
            end(self.process)
            raise

    def address(self, lines, seconds):
        until = time.monotonic() + seconds
        while True:
            if not wait_for(lambda: not lines.empty(), until - time.monotonic()):
                raise Failed(f"idefics serve was not ready after {seconds:.0f} s")
            line = lines.get()
            if line is None:
                raise Failed("idefics serve ended before it was ready")
            try:
                fields = json.loads(line)["fields"]
            except (ValueError, KeyError):
                continue
            if fields.get("message") == "ready":
                return fields["grpc_addr"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        end(self.process)
