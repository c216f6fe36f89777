"""Whether `idefics` computes what `transformers` computes, on a random checkpoint.

Both round to bf16 in many places, and not in the same ones. What tells a wrong formula from rounding is the error of
`transformers` itself: its bf16 beside its f32. Ours may be at most MAX_RATIO times as large. Errors of independent roundings add up
in squares: twice as many of them, or as many and each sqrt(2) as large, make an error 1.41 times as large, and over thousands
of values the sampling error of the ratio is a few percent. The absolute bounds hold even if the reference's own bf16 were broken.
"""
import json
import pathlib

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

import cases
from processes import Failed, Server, run_logged

MAX_RATIO = 1.5
# Relative L2 distance of image tokens, and root mean square of differences of log-probabilities in nats: twice the most that the
# bf16 of `transformers` was seen off on a CPU, 0.019 and 0.073 (both narrow; 0.013 for image tokens on real widths).
MAX_IMAGE_DISTANCE = 0.04
MAX_LOGPROB_RMS = 0.15
TOP = 20


# Seconds that a server may take to be ready, and a request to be answered.
PATIENCE = 40


def serve(bench, checkpoint, device, log, settings):
    return Server(bench.binary("idefics"), checkpoint, device, log, bench.within(PATIENCE), settings)


def ask(bench, log, *arguments):
    """What `idefics ask --json` says."""
    command = [bench.binary("idefics"), "ask", "--json", *arguments]
    file = bench.work / "answer.json"
    with open(file, "w") as out:
        run_logged(command, log, bench.within(PATIENCE), out=out)
    return json.loads(file.read_text())


def ours(bench, server, folder, log):
    """Image tokens and log-probabilities; the prompts, for the reference."""
    plan, tokens, prompts, answers = bench.plan, {}, [], []
    for picture in plan.parity_pictures:
        file, out = folder / "picture.png", folder / "tokens.safetensors"
        Image.fromarray(picture.pixels()).save(file)
        split = "--split" if picture.split else "--no-split"
        run_logged([bench.binary("idefics"), "encode", "--endpoint", server.endpoint, "--image", file, split, "--out", out], log, bench.within(PATIENCE))
        tokens[picture.name] = load_file(out)["image_tokens"]
    first = folder / "first.png"
    Image.fromarray(plan.parity_pictures[0].pixels()).save(first)
    for number in range(plan.parity_prompts + 1):
        picture = ["--image", first, "--no-split"] if number == plan.parity_prompts else []
        text = ("<image>" if picture else "") + cases.prompt(plan, number)
        common = ["--endpoint", server.endpoint, "--raw", "--max-new-tokens", "1", "--prompt-logprobs", str(TOP)]
        answer = ask(bench, log, *common, *picture, text)
        ids, places = answer["prompt_token_ids"], answer["prompt_logprobs"]
        if len(ids) != len(places) or len(ids) < plan.parity_prompt_letters:
            raise ValueError(f"prompt {number} has {len(ids)} tokens, and log-probabilities of {len(places)}")
        prompts.append({"ids": ids, "picture": bool(picture)})
        answers.append(places[1:])
    return tokens, prompts, answers


def distance(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def compare(tokens, prompts, answers, reference):
    """A row for each comparison: `ours` and `theirs` are errors against f32."""
    rows = []
    for name, values in tokens.items():
        f32, bf16 = (reference[f"{dtype} image {name}"] for dtype in ("f32", "bf16"))
        if values.shape != f32.shape:
            raise ValueError(f"image tokens of {name} are {values.shape}, expected {f32.shape}")
        rows.append({"what": f"image tokens {name}", "ours": distance(values, f32), "theirs": distance(bf16, f32), "bound": MAX_IMAGE_DISTANCE})
    for kind, has_picture in (("text", False), ("picture", True)):
        ours_off, theirs_off, same = [], [], []
        for number, (prompt, places) in enumerate(zip(prompts, answers)):
            if prompt["picture"] != has_picture:
                continue
            f32, bf16 = (reference[f"{dtype} logprobs {number}"] for dtype in ("f32", "bf16"))
            for position, place in enumerate(places):
                # The token that stands there, and the likeliest ones.
                ids = [place["token_id"], *(t["token_id"] for t in place["top"])]
                said = np.array([place["logprob"], *(t["logprob"] for t in place["top"])])
                if place["token_id"] != prompt["ids"][position + 1] or len(ids) != TOP + 1:
                    raise ValueError(f"prompt {number}, position {position}: {len(ids)} log-probabilities, of token {place['token_id']}")
                ours_off.append(said - f32[position, ids])
                theirs_off.append(bf16[position, ids] - f32[position, ids])
                same.append(place["top"][0]["token_id"] == int(f32[position].argmax()))
        rms = lambda off: float(np.sqrt(np.mean(np.square(np.concatenate(off)))))
        rows.append({"what": f"log-probabilities, {kind}", "ours": rms(ours_off), "theirs": rms(theirs_off), "bound": MAX_LOGPROB_RMS, "same_likeliest": float(np.mean(same))})
    for row in rows:
        # NaN passes no comparison.
        row["ok"] = bool(row["ours"] <= MAX_RATIO * row["theirs"] and row["ours"] <= row["bound"])
    return rows


def demo(bench, log):
    """The embedded checkpoint on the card and on the CPU: the same tokens. It is trained, so that no two tokens are close."""
    pictures = sorted((bench.repository / "tests/golden/demo/pictures").glob("*.png"))[: bench.plan.demo_pictures]

    def answers(device, settings):
        with serve(bench, None, device, log, settings) as server:
            return [ask(bench, log, "--endpoint", server.endpoint, "--image", picture, "Read the sign.")["token_ids"] for picture in pictures]

    rows = zip(pictures, answers(bench.device, bench.settings), answers("cpu", {}))
    return [{"what": f"demo {picture.name}", "ours": ours, "theirs": theirs, "ok": ours == theirs and len(ours) > 0} for picture, ours, theirs in rows]


def run(bench, log):
    """Every comparison as a row."""
    folder, rows = bench.work / "parity", []
    folder.mkdir(exist_ok=True)
    bench.partial["parity"] = rows
    try:
        rows += demo(bench, log)
    except (Failed, OSError) as error:
        # The random checkpoint may say more about the reason.
        rows.append({"what": "demo", "ours": str(error), "theirs": None, "ok": False})
    checkpoint = bench.checkpoint("parity")
    with serve(bench, checkpoint, bench.device, log, bench.settings | {"decoder.kv_cache_bytes": bench.plan.kv_cache_bytes}) as server:
        tokens, prompts, answers = ours(bench, server, folder, log)
    (folder / "prompts.json").write_text(json.dumps(prompts))
    out = folder / "reference.npz"
    bench.peer(["parity", checkpoint, "--prompts", folder / "prompts.json", "--out", out, "--wrong", bench.wrong], log)
    with np.load(out) as reference:
        rows += compare(tokens, prompts, answers, reference)
    out.unlink()
    return rows
