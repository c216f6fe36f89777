"""The same requests on the same checkpoint, to `idefics` and to `transformers`, and the ratios. README.md says how to run it."""
import argparse
import datetime
import json
import os
import pathlib
import platform
import random
import statistics
import string
import subprocess
import sys
import tempfile

from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
sys.path.insert(0, str(HERE.parent / "golden"))
import synthetic  # noqa: E402

PROMPT_TOKENS = 320


class Ours:
    """A running `idefics serve`, asked through `idefics ask --endpoint`; times are those that the server reports."""

    name = "idefics"

    def __init__(self, binary, folder, threads):
        self.binary = binary
        environment = os.environ | {"IDEFICS_CPU__THREADS": str(threads)}
        command = [binary, "serve", "--model", folder, "--grpc-addr", "127.0.0.1:0", "--log-format", "json"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        for line in self.process.stderr:
            fields = json.loads(line).get("fields", {}) if line.startswith("{") else {}
            if fields.get("message") == "ready" and fields.get("grpc_addr"):
                self.endpoint = f"http://{fields['grpc_addr']}"
                break
        else:
            sys.exit(f"{binary} serve ended with {self.process.wait()}")
        # What it says from now on is of no interest, but the pipe must not fill up.
        subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL)

    def ask(self, *arguments):
        command = [self.binary, "ask", "--endpoint", self.endpoint, "--json", *map(str, arguments)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def encode(self, picture):
        t = self.ask("--image", picture, "--no-split", "--max-new-tokens", 1, "--raw", "<image>")["timings_ms"]
        return {"preprocess_ms": t["preprocess"], "encode_ms": t["encode"]}

    def generate(self, prompt, new_tokens):
        answer = self.ask("--max-new-tokens", new_tokens, "--raw", prompt)
        t = answer["timings_ms"]
        assert len(answer["token_ids"]) == new_tokens, answer["finish_reason"]
        return {"prefill_ms": t["prefill"], "decode_ms": t["decode"], "token_ids": answer["token_ids"], "prompt": answer["prompt_token_ids"]}


class Theirs:
    """`transformers` in a process of its own."""

    name = "transformers"

    def __init__(self, python, folder, threads, tokenizer):
        # A passive wait: its threads would otherwise spin beside ours.
        environment = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads)}
        command = [python, str(HERE / "transformers_worker.py"), folder, str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.tokenize = tokenizer
        if "ready" not in self.process.stdout.readline():
            sys.exit("transformers did not load the checkpoint")

    def request(self, **what):
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def encode(self, picture):
        return self.request(image=str(picture))

    def generate(self, prompt, new_tokens):
        return self.request(ids=self.tokenize(prompt), new_tokens=new_tokens)


def character_tokenizer(folder):
    """Ids of a plain ASCII prompt under make_checkpoint.py's tokenizer: BOS, ▁, a token per character."""
    vocab = json.loads((pathlib.Path(folder) / "tokenizer.json").read_text())["model"]["vocab"]
    return lambda prompt: [1] + [vocab[c] for c in ("▁" + prompt.replace(" ", "▁"))]


def abba(rounds, ours, theirs, request):
    """Per round: ours, theirs, theirs, ours, each with a request of its own kind but never the same, so that no cache answers."""
    out = []
    for number in range(rounds):
        round_ = {"idefics": [], "transformers": []}
        for position, side in enumerate((ours, theirs, theirs, ours)):
            round_[side.name].append(request(side, f"{number} {position}"))
        out.append(round_)
        print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    return out


def summary(rounds, value):
    """Medians of a value on both sides, and the median of the rounds' ratios: above 1, ours is faster."""
    sides = {name: [statistics.mean(map(value, r[name])) for r in rounds] for name in ("idefics", "transformers")}
    ratios = [b / a for a, b in zip(sides["idefics"], sides["transformers"])]
    return {"idefics": statistics.median(sides["idefics"]), "transformers": statistics.median(sides["transformers"]), "ratio": statistics.median(ratios),
            "lowest_ratio": min(ratios), "highest_ratio": max(ratios), "rounds": len(rounds)}


def memory(process):
    fields = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon", "RssFile")}


def measure(options, ours, theirs, folder):
    results, answers = {}, {}
    for size in options.sizes:
        def encode(side, label, size=size):
            file = folder / "picture.png"
            Image.fromarray(synthetic.picture(f"{size} {label}", size, size)).save(file)
            return side.encode(file)

        rounds = abba(options.rounds if size < 700 else options.large_rounds, ours, theirs, encode)
        results[f"vision encode {size}x{size}, ms"] = summary(rounds, lambda x: x["encode_ms"])
        results[f"preprocess {size}x{size}, ms"] = summary(rounds, lambda x: x["preprocess_ms"])

    def generate(side, label):
        # A round's first two requests have the same prompt, and its last two, so that each side gets each prompt once.
        number, position = map(int, label.split())
        prompt = number, position // 2
        text = "".join(random.Random(str(prompt)).choices(string.ascii_letters, k=PROMPT_TOKENS - 2))
        answer = side.generate(text, options.new_tokens)
        assert answer.get("prompt", theirs.tokenize(text)) == theirs.tokenize(text), "the sides have different prompts"
        answers.setdefault(prompt, []).append(answer["token_ids"])
        return answer

    rounds = abba(options.rounds, ours, theirs, generate)
    results[f"prefill {PROMPT_TOKENS} tokens, ms"] = summary(rounds, lambda x: x["prefill_ms"])
    results["decode, ms/token"] = summary(rounds, lambda x: x["decode_ms"] / (options.new_tokens - 1))
    return results, {"prompts": len(answers), "identical": sum(a == b for a, b in answers.values())}


def table(results):
    print(f"{'':28} {'idefics':>10} {'transformers':>13} {'ratio':>7}   of the rounds")
    for name, r in results.items():
        print(f"{name:28} {r['idefics']:10.1f} {r['transformers']:13.1f} {r['ratio']:6.2f}x   {r['lowest_ratio']:.2f} to {r['highest_ratio']:.2f} of {r['rounds']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="a folder of make_checkpoint.py")
    parser.add_argument("--binary", default=str(REPOSITORY / "target/release/idefics"))
    parser.add_argument("--python", default=sys.executable, help="one with transformers")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--large-rounds", type=int, default=2, help="rounds for pictures of 700 pixels and more")
    parser.add_argument("--sizes", type=int, nargs="*", default=[378, 980])
    parser.add_argument("--new-tokens", type=int, default=17)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    options = parser.parse_args()

    # Both sides on the same cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    ours = Ours(options.binary, options.checkpoint, options.threads)
    theirs = Theirs(options.python, options.checkpoint, options.threads, character_tokenizer(options.checkpoint))
    try:
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            warm = folder / "warm.png"
            Image.fromarray(synthetic.picture("warm", 378, 378)).save(warm)
            for side in (ours, theirs):
                side.encode(warm)
                side.generate("warm", 4)
            results, tokens = measure(options, ours, theirs, folder)
        memories = {"idefics": memory(ours.process), "transformers": memory(theirs.process)}
    finally:
        ours.process.terminate()
        theirs.process.terminate()
    weights = sum(f.stat().st_size for f in pathlib.Path(options.checkpoint).glob("*.safetensors"))
    table(results)
    print(f"greedy tokens identical for {tokens['identical']} of {tokens['prompts']} prompts")
    print(f"weights {weights / 1e9:.2f} GB; peak memory idefics {memories['idefics']['VmHWM'] / 1e9:.2f} GB ({memories['idefics']['VmHWM'] / weights:.2f} of the weights; "
          f"{memories['idefics']['RssAnon'] / 1e9:.2f} GB its own, the rest the mapped file), transformers {memories['transformers']['VmHWM'] / 1e9:.2f} GB")

    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    config = json.loads((pathlib.Path(options.checkpoint) / "config.json").read_text())
    record = {"date": datetime.date.today().isoformat(), "cpu": cpu, "threads": options.threads, "weights_bytes": weights, "text_layers": config["text_config"].get("num_hidden_layers"),
              "vision_layers": config["vision_config"].get("num_hidden_layers"), "results": results, "tokens": tokens, "memory_bytes": memories}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"side_by_side_{record['text_layers']}_{record['vision_layers']}_{record['date']}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
