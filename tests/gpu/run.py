"""The acceptance of the CUDA backend on a machine with a card; run.sh prepares it. README.md says what each part means.

Each part stands alone: one that fails or takes too long is reported, its log is kept, and the next one runs. On a signal the part
that runs fails, those to come have no time, and the table is printed.
"""
import argparse
import json
import math
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import cases
import ops
import parity
import report
from processes import Failed, end, json_lines, on_signal, run_logged, signals, start, wait_for

HERE = pathlib.Path(__file__).resolve().parent
# Of all parts.
SECONDS = 510
# Seconds of these that a part may take, and that are kept for it whatever the parts before it do. The last one may take all that is left.
PARTS = {"ops": (120, 60), "engine": (120, 70), "parity": (100, 60), "serving": (140, 90), "peer": (SECONDS, 90)}
# Settings that `idefics-engine-bench` has as flags.
FLAGS = {"backend.attention": "attention", "backend.early_launch": "early-launch"}
# As idefics-load says it level by level, long before its report; what is not there is a dash.
LEVEL = re.compile(r"^c=(\d+) x.*? \d+ +\d+ +\d+ +\d+ +(\S+) +\S+ +(\S+) \| +(\S+) +\S+ +(\S+) \| +(\S+) ")
# The first import takes long; by the time that a part needs them, they are in memory.
SOFTWARE = """import platform, torch, transformers
print(f"python {platform.python_version()}, glibc {platform.libc_ver()[1]}, torch {torch.__version__}, transformers {transformers.__version__}")"""
LOG_BYTES = 8 << 20
# Of a failed part's log; all of it is kept.
SHOWN_LINES = 20


class Bench:
    """What the parts share."""

    def __init__(self, options):
        self.device, self.peer_device, self.wrong = options.device, options.peer_device, options.wrong
        self.plan = cases.QUICK if options.quick else cases.FULL
        self.quick, self.scale = options.quick, options.seconds / SECONDS
        self.repository = HERE.parent.parent
        self.settings = dict(options.set)
        self.work, self.out = options.work, options.out
        self.deadline = time.monotonic() + options.seconds
        self.end_of_part = self.deadline
        self.makers, self.made, self.closed = [], {}, False
        self.lock = threading.Lock()

    def binary(self, name):
        return self.repository / "target/gpu" / name

    def left(self):
        """Seconds that the part may still take."""
        return 0 if signals else self.end_of_part - time.monotonic()

    def within(self, seconds):
        """So many of SECONDS, or fewer if the part has fewer."""
        return max(min(seconds * self.scale, self.left()), 1)

    def make_checkpoints(self, names):
        """Starts to write them, while parts run that need none. Threads of one process each: the second waits for the first."""
        events = {name: threading.Event() for name in names}
        self.made = {name: {"event": event} for name, event in events.items()}

        def make():
            for name, event in events.items():
                started_at = time.monotonic()
                arguments = self.plan.parity_checkpoint if name == "parity" else self.plan.speed_checkpoint
                with open(self.work / f"make_{name}.log", "w") as log:
                    with self.lock:
                        if self.closed:
                            return
                        maker = start([sys.executable, self.repository / "tests/bench/make_checkpoint.py", self.work / name, *arguments], stdout=log, stderr=log)
                        self.makers.append(maker)
                    self.made[name]["code"] = maker.wait()
                self.made[name]["seconds"] = time.monotonic() - started_at
                event.set()

        threading.Thread(target=make, daemon=True).start()

    def close(self):
        """Ends whoever still makes something, and lets nobody begin."""
        with self.lock:
            self.closed = True
        for maker in self.makers:
            end(maker)

    def checkpoint(self, name):
        """The folder, once it is written."""
        made = self.made[name]
        if not wait_for(made["event"].is_set, max(self.left(), 1)):
            raise Failed(f"the checkpoint for {name} was not written in time")
        if made["code"] != 0:
            raise Failed(f"make_checkpoint.py ended with {made['code']}: {(self.work / f'make_{name}.log').read_text()[-500:]}")
        return self.work / name

    def peer(self, arguments, log, on_line=None):
        quick = ["--quick"] if self.quick else []
        run_logged([sys.executable, HERE / "peer.py", *arguments, "--device", self.peer_device, *quick], log, self.left(), on_line)


def engine(bench, log):
    """Each engine in a process of its own, so that a fault takes no other's numbers; decoding once more without early launches,
    pictures and prompts with the attention of older cards."""
    plan, lines, failures = bench.plan, [], []
    pictures = ["--pictures", ",".join(picture.name for picture in plan.speed_pictures)]
    prefill = ["--prefill", ",".join(map(str, plan.prefill_tokens))]
    decode = lambda *cases: ["--decode", ",".join(f"{batch}x{context}" for batch, context in cases)]
    flags = lambda settings: [f"--{FLAGS[key]}={value}" for key, value in settings.items() if key in FLAGS]
    command = [
        bench.binary("idefics-engine-bench"), "--model", bench.checkpoint("speed"), "--device", bench.device, "--repeats", plan.repeats, "--steps", plan.steps,
        "--max-num-seqs", plan.max_num_seqs, "--max-num-batched-tokens", plan.max_num_batched_tokens,
    ]
    # What was measured counts, whatever comes after.
    bench.partial["engine"] = lines

    def measure(measured, seconds, changed={}):
        already = changed and changed.items() <= bench.settings.items()
        if already or bench.left() <= 0:
            return
        found = []
        try:
            run_logged([*command, *measured, *flags(bench.settings | changed)], log, bench.within(seconds), json_lines(found))
        except Failed as error:
            failures.append(f"{error}{f' with {changed}' if changed else ''}")
        lines.extend({**line, "changed": changed} for line in found)

    measure(pictures, 40)
    measure([*prefill, *decode(*plan.decode)], 80)
    if bench.device.startswith("cuda"):
        # What fails may work with a change, which says where to look.
        again = [*prefill, *decode(*plan.decode if failures else plan.decode[:1])]
        measure(again, 60, {"backend.early_launch": "false"})
        measure(pictures, 30, {"backend.attention": "mma"})
        measure(again, 60, {"backend.attention": "mma"})
    if failures:
        raise Failed("; ".join(failures))
    return lines


def serving(bench, log):
    """The three roles as processes, under load from one client to many."""
    plan, folder, levels, problems = bench.plan, bench.out, [], []
    settings = bench.settings | {"backend.device": bench.device, "decoder.max_num_seqs": plan.max_num_seqs, "decoder.max_num_batched_tokens": plan.max_num_batched_tokens, "decoder.kv_cache_bytes": plan.kv_cache_bytes}
    command = [bench.binary("idefics-load"), "sweep", "--bin", bench.binary("idefics"), "--model", bench.checkpoint("speed"), "--out", bench.work / "load", "--settle", "0.2", "--check"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    bench.partial["serving"] = levels

    def take(line):
        if level := LEVEL.match(line):
            concurrency, *numbers = level.groups()
            names = ("requests_per_s", "tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms")
            levels.append({"concurrency": int(concurrency), "added_ttft_ms": None} | {name: None if text == "-" else float(text) for name, text in zip(names, numbers)})
        elif line.startswith("PROBLEM"):
            problems.append(line.strip())

    try:
        run_logged([*command, *plan.load], log, bench.left(), take)
    except Failed as error:
        raise Failed("; ".join([str(error), *problems])) from None
    finally:
        for role in sorted((bench.work / "load").glob("*.log")):
            log.write(f"--- {role.stem}\n{role.read_text(errors='replace')[-LOG_BYTES // 8 :]}")
        file = bench.work / "load/sweep.json"
        if file.exists():
            (folder / "sweep.json").write_bytes(file.read_bytes())
            bench.partial["serving"] = [level_row(level) for level in json.loads(file.read_text())["sweep"]["levels"]]
    return bench.partial["serving"]


def level_row(level):
    total = level["run"]["total"]
    quantile = lambda name, q, summary=total: (summary.get(name) or {}).get(q)
    return {
        "concurrency": level["concurrency"], "requests_per_s": total["requests_per_s"], "tokens_per_s": total["output_tokens_per_s"],
        "ttft_p50_ms": quantile("ttft_ms", "p50"), "ttft_p99_ms": quantile("ttft_ms", "p99"), "itl_p50_ms": quantile("inter_token_ms", "p50"),
        # Of requests without a picture: vision's stages overlap with others.
        "added_ttft_ms": quantile("added_ttft_ms", "p50", level["run"]["by_kind"].get("text", {})),
    }


def peer(bench, log):
    lines = []
    try:
        bench.peer(["speed", bench.checkpoint("speed"), "--seconds", max(bench.left() - 30, 1)], log, json_lines(lines))
    except Failed as error:
        # Compiling comes last and takes as long as it likes. Whatever else is missing is a failure.
        batch, context = bench.plan.decode[-1]
        if not report.find(lines, kind="decode", batch=batch, context=context):
            raise
        lines.append({"kind": "decode_compiled", "why": str(error)})
    finally:
        bench.partial["peer"] = lines
    return lines


RUN = {"ops": ops.run, "engine": engine, "parity": parity.run, "serving": serving, "peer": peer}


def shorten(file):
    """Keeps the end of a log."""
    if file.stat().st_size > LOG_BYTES:
        file.write_bytes(file.read_bytes()[-LOG_BYTES:])


def write(results, file):
    file.write_text(json.dumps(plain(results), indent=1, allow_nan=False))


def plain(value):
    """As JSON can say it, which knows no NaN."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def run_parts(bench, parts, results):
    for index, part in enumerate(parts):
        started_at, most = time.monotonic(), PARTS[part][0]
        kept = sum(PARTS[later][1] for later in parts[index + 1 :])
        bench.end_of_part = min(started_at + most * bench.scale, bench.deadline - kept * bench.scale)
        bench.partial = {}
        file = bench.out / f"{part}.log"
        with open(file, "w") as log:
            try:
                if bench.left() <= 0:
                    raise Failed("no time was left")
                results[part] = RUN[part](bench, log)
                wrong = [row["what"] for row in results[part] if not row["ok"]] if part == "parity" else []
                if wrong:
                    results["errors"][part] = f"wrong: {', '.join(wrong)}"
            except Exception as error:
                results.update(bench.partial)
                results["errors"][part] = f"{type(error).__name__}: {error}"
        shorten(file)
        results["seconds"][part] = time.monotonic() - started_at
        print(f"{part}: {results['errors'].get(part, 'done')} ({results['seconds'][part]:.0f} s)", flush=True)
        if part in results["errors"]:
            print("\n".join(file.read_text(errors="replace").splitlines()[-SHOWN_LINES:]), flush=True)
        write(results, bench.out / "results.json")


def describe():
    """The card and its driver."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


def setting(text):
    key, equals, value = text.partition("=")
    if "." not in key or not equals:
        raise ValueError(text)
    return key, value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0", help="where idefics computes")
    parser.add_argument("--peer-device", default="cuda", help="where transformers computes")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that every step works")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them")
    parser.add_argument("--wrong", default="none", help="a formula to change in the reference: parity must fail (see peer.py)")
    parser.add_argument("--set", action="append", default=[], type=setting, metavar="KEY=VALUE", help="a setting of idefics, as backend.attention=mma; may be repeated; ops has its own")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="an empty folder for checkpoints: 22 GB")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for results and logs")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts is {options.parts}, expected some of {','.join(PARTS)}")
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    results = {"device": options.device, "card": describe(), "quick": options.quick, "settings": bench.settings, "seconds": {}, "errors": {}}
    needed = {"speed": {"engine", "serving", "peer"}, "parity": {"parity"}}
    bench.make_checkpoints([name for name, users in needed.items() if users & set(parts)])
    software = bench.work / "software.json"
    with open(software, "w") as out:
        bench.makers.append(start([sys.executable, "-c", SOFTWARE], stdout=out))
    try:
        run_parts(bench, parts, results)
    finally:
        bench.close()
    results["software"] = software.read_text().strip() or "versions not known"
    results["make_checkpoint_seconds"] = {name: made.get("seconds") for name, made in bench.made.items()}
    speed = bench.made.get("speed", {})
    work = report.Work(bench.work / "speed") if speed.get("code") == 0 else None
    text = report.table(bench.plan, work, results)
    results["targets"] = [dict(zip(("what", "value", "comparison", "limit"), row)) for row in report.targets(bench.plan, work, results)] if work else []
    write(results, bench.out / "results.json")
    (bench.out / "table.txt").write_text(text + "\n")
    print(f"\n{results['card'] or 'no nvidia-smi'}; {results['software']}; parts took {', '.join(f'{part} {s:.0f} s' for part, s in results['seconds'].items())}")
    print(text, flush=True)
    return 1 if results["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
