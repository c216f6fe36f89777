"""What is computed: by `idefics`, and by `transformers` in peer.py. Both sides get the same pixels and the same token ids.

Pictures have sizes that need no resizing, so that no side's interpolation counts. Prompts are raw, and peer.py takes the ids that
`idefics` reports: `transformers` 5 puts a token more behind each picture than the model was trained with.
"""
import dataclasses
import random
import string

import numpy as np


@dataclasses.dataclass(frozen=True)
class Picture:
    width: int
    height: int
    split: bool = False

    @property
    def name(self):
        return f"{self.width}x{self.height}{':split' if self.split else ''}"

    def pixels(self):
        """[height, width, 3] u8: waves with some noise."""
        rng = np.random.default_rng(list(self.name.encode()))
        y, x = np.mgrid[0 : self.height, 0 : self.width].astype(np.float32)
        waves = [127 + 90 * np.sin(x / rng.uniform(9, 70) + y / rng.uniform(9, 70) + c) for c in range(3)]
        return np.clip(np.stack(waves, axis=-1) + rng.normal(0, 12, (self.height, self.width, 3)), 0, 255).astype(np.uint8)

    def tiles(self):
        """The picture as the vision tower sees it: whole, or four crops and the whole."""
        whole = self.pixels()
        if not self.split:
            return [whole]
        h, w = self.height // 2, self.width // 2
        return [whole[:h, :w], whole[:h, w:], whole[h:, :w], whole[h:, w:], whole]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes on."""

    parity_checkpoint: tuple  # arguments of make_checkpoint.py
    speed_checkpoint: tuple
    parity_pictures: tuple
    parity_prompts: int  # of text; one more has a picture
    parity_prompt_letters: int
    demo_pictures: int
    speed_pictures: tuple
    prefill_tokens: tuple
    decode: tuple  # (sequences, tokens before)
    steps: int
    repeats: int
    max_num_batched_tokens: int
    max_num_seqs: int
    kv_cache_bytes: int  # of servers; the engines alone get what their cases need
    decode_compiled: tuple  # of these, what transformers decodes compiled too; the most important first, as far as the time goes
    roof_copy_bytes: int
    roof_matmul: int
    load: tuple  # further arguments of idefics-load


FULL = Plan(
    parity_checkpoint=("4", "6"),
    speed_checkpoint=("32", "27"),
    parity_pictures=(Picture(378, 378), Picture(980, 392), Picture(980, 980, split=True)),
    parity_prompts=3,
    parity_prompt_letters=96,
    demo_pictures=4,
    speed_pictures=(Picture(378, 378), Picture(980, 980), Picture(980, 980, split=True)),
    prefill_tokens=(320, 2048),
    decode=((1, 512), (8, 512), (32, 512), (64, 512), (1, 4096), (8, 4096), (32, 4096), (64, 4096)),
    steps=48,
    repeats=7,
    max_num_batched_tokens=2048,
    max_num_seqs=64,
    kv_cache_bytes=16 << 30,
    decode_compiled=((1, 512), (64, 512), (1, 4096), (64, 4096)),
    roof_copy_bytes=4 << 30,
    roof_matmul=8192,
    # A token a letter: prompts of some 60 tokens. The picture's sizes are those of photographs, resized to at most 980.
    load=("--concurrency", "1,2,4,8,16,32,64", "--requests", "128", "--text", "0.6", "--image", "0.25", "--split-image", "0.05",
          "--multi-turn", "0.1", "--prompt-words", "8..16", "--picture-edge", "378..1200"),
)

# The same steps in little time, to see that they work: on a CPU, or on the host emulation.
QUICK = Plan(
    parity_checkpoint=("3", "3", "narrow"),
    speed_checkpoint=("2", "2", "narrow"),
    parity_pictures=(Picture(56, 56), Picture(112, 56), Picture(112, 112, split=True)),
    parity_prompts=2,
    parity_prompt_letters=40,
    demo_pictures=1,
    speed_pictures=(Picture(56, 56), Picture(112, 112, split=True)),
    prefill_tokens=(32, 64),
    decode=((1, 32), (4, 32)),
    steps=4,
    repeats=1,
    max_num_batched_tokens=64,
    max_num_seqs=4,
    kv_cache_bytes=256 << 20,
    decode_compiled=((1, 32), (4, 32)),
    roof_copy_bytes=64 << 20,
    roof_matmul=512,
    load=("--concurrency", "1,4", "--requests", "4", "--warmup", "1", "--text", "0.5", "--image", "0.5", "--split-image", "0", "--multi-turn", "0",
          "--prompt-words", "2..4", "--output-tokens", "2..4", "--picture-edge", "56..64", "--shortest-edge", "56", "--longest-edge", "112"),
)


def prompt(plan, number):
    """Letters; under the tokenizer of make_checkpoint.py each is a token."""
    return "".join(random.Random(number).choices(string.ascii_letters, k=plan.parity_prompt_letters))
