"""Train the demo model: a 3.8M-parameter Llama for Python code, from text every machine with Python has.

    python examples/train_demo_model.py --out examples/demo_model --minutes 95 --threads 1

The text is the standard library of the running Python plus permissively licensed packages beside it.
HELD_OUT names the modules that are never trained on; they are saved next to the model.
"""

import argparse
import copy
import json
import math
import os
import random
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HELD_OUT = (
    *("bisect", "calendar", "cmd", "csv", "fnmatch", "getopt", "glob", "graphlib", "heapq"),
    *("queue", "sched", "shlex", "string", "textwrap", "timeit"),
)
# BSD, MIT, Apache or PSF; a package that is not installed is passed over.
PACKAGES = (
    *("torch", "torchgen", "transformers", "sympy", "numpy", "networkx", "pandas", "scipy", "sklearn", "attr"),
    *("mypy", "pygments", "setuptools", "pip", "rich", "click", "jinja2", "_pytest", "joblib", "aiohttp"),
    *("mpmath", "accelerate", "huggingface_hub", "more_itertools", "pydantic", "packaging", "markdown_it"),
)
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "_vendor", "pydoc_data", "encodings", "data", "locale"}
BROAD_BYTES = 40_000_000  # as much as one core can read in the time; more would only be encoded
CONTEXT = 512
TOKENS_A_STEP = 6144
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
PAD, BOS, EOS = range(3)
README = """# Demo model

A Llama of 3.8M parameters (4 layers, hidden 256, 8 heads of 32, float32) for Python code, with its own byte-level
BPE tokenizer of 3072 tokens. `examples/train_demo_model.py` made it; Apache-2.0, as slim itself.

Measured: **{heldout_bpb:.3f} bits per byte** on `heldout.txt` (windows of 512 tokens that do not overlap, each after
`<s>`; {heldout}) after {tokens:,} tokens in {seconds:,} seconds. `train_log.jsonl` has its course.

Text: the standard library of Python {python} (PSF License) and installed packages under BSD, MIT, Apache-2.0
or PSF licences, without duplicates: {packages}.
Never trained on, copies included: the standard modules in `heldout.txt` (PSF License): {modules}.
"""


def looks_written(text: str) -> bool:
    """Whether people wrote this text as code: no tables, no generated one-liners, hardly any other alphabet."""
    letters, digits = (sum(map(kind, text[:20000])) for kind in (str.isalpha, str.isdigit))
    plain = digits < 0.12 * letters and len(text.encode()) < 1.02 * len(text)
    return plain and 300 < len(text) < 400_000 and max(map(len, text.splitlines())) < 300


def without_licence(text: str) -> str:
    """The text without a leading comment block that speaks of copyright: the same few would repeat for ever."""
    header = re.match(r"(?:[ \t]*(?:#.*)?\n)*", text)[0]
    return text[len(header) :] if re.search("copyright|license", header, re.I) else text


def telling_lines(text: str) -> set[int]:
    """Hashes of the lines long enough to betray a copy."""
    return {hash(line) for line in map(str.strip, text.splitlines()) if len(line) >= 40}


def collect() -> tuple[str, list[str], list[str]]:
    """The held-out text, the library's own modules, and the broad rest (its tests, the packages)."""
    library, site = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    modules = [(library / f"{name}.py").read_text(encoding="utf-8") for name in HELD_OUT]
    held_out = "".join(f"# ===== {n}.py =====\n\n{t}\n" for n, t in zip(HELD_OUT, modules, strict=True))
    held_out_lines, seen = telling_lines(held_out), set[int]()
    core: list[str] = []
    broad: list[str] = []
    for folder in (library, *(site / name for name in PACKAGES)):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).parts
            if path.stem in HELD_OUT or SKIPPED_FOLDERS.intersection(parts):
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # the tests have a few in other encodings
            lines = telling_lines(text)
            # Half of the lines known means a copy under another name; held-out lines are judged harder.
            copied = len(lines & seen) > 0.5 * len(lines) or len(lines & held_out_lines) > 0.1 * len(lines)
            if copied or not looks_written(text):
                continue
            seen |= lines
            is_core = folder == library and not any("test" in part for part in parts)
            (core if is_core else broad).append(without_licence(text))
    random.Random(0).shuffle(broad)
    sizes = np.cumsum([len(text) for text in broad])
    return held_out, core, broad[: int(np.searchsorted(sizes, BROAD_BYTES))]


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE in which a line break and the indent after it are one piece, as is a run of spaces."""
    pieces = r"\n[\n ]*| ?__\w+?__|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[ \t]+(?=\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(SPECIAL.values())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one stream of tokens, each closed by the end token: two bytes a token, so memory holds it."""
    encodings = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
    return np.concatenate([np.array([*encoding.ids, EOS], np.uint16) for encoding in encodings])


def rows(stream: np.ndarray, length: int, seed: int) -> Iterator[np.ndarray]:
    """Windows that open with BOS as in evaluation; every epoch cuts the stream elsewhere, in a new order."""
    generator = np.random.default_rng(seed)
    while True:
        offset = int(generator.integers(length))
        for index in generator.permutation((len(stream) - offset) // length):
            start = offset + int(index) * length
            yield np.concatenate([[BOS], stream[start : start + length]]).astype(np.int64)


def batches(core: np.ndarray, broad: np.ndarray) -> Iterator[Tensor]:
    """Send in how much of the time is gone (0 to 1), get rows of BOS and tokens."""
    sources = {n: (rows(broad, n, 2), rows(core, n, 1)) for n in (CONTEXT // 2, CONTEXT)}
    choose, progress = random.Random(0), 0.0
    while True:
        # Short rows read faster, and what they teach first needs no long context. The held-out text is library
        # code, so the library's own modules, which are few, come mostly at the end.
        length = CONTEXT // 2 if progress < 0.5 else CONTEXT
        from_core = [choose.random() < 0.3 + 0.5 * progress for _ in range(TOKENS_A_STEP // length)]
        progress = yield torch.from_numpy(np.stack([next(sources[length][is_core]) for is_core in from_core]))


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokens: np.ndarray, size: int, every: int) -> float:
    """Bits a byte over each `every`-th of the windows that do not overlap: BOS + 511 tokens read, 512 predicted."""
    bits, predicted = 0.0, 0
    for start in range(0, len(tokens), CONTEXT * every):
        window = torch.tensor([[BOS, *tokens[start : start + CONTEXT].tolist()]], device=model.device)
        count = window.shape[1] - 1
        bits += objective(model, window).item() * count / math.log(2)
        predicted += count
    return bits / (size * predicted / len(tokens))


def objective(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for hidden matrices. torch.optim.Muon computes in bfloat16, slow on most CPUs."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.02) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, decay=decay))

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        for shape in {p.shape for p in group["params"]}:  # matrices of one shape share the products
            params = [p for p in group["params"] if p.shape == shape]
            for p in params:
                self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
            updates = torch.stack([p.grad.lerp(self.state[p]["mean"], group["momentum"]) for p in params])
            scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
            for p, update in zip(params, orthogonal(updates), strict=True):
                p.mul_(1 - group["lr"] * group["decay"]).sub_(update, alpha=scale)


def orthogonal(stack: Tensor) -> Tensor:
    """Each matrix with its singular values brought near one by five Newton-Schulz steps."""
    tall = stack.shape[1] > stack.shape[2]
    wide = stack.mT if tall else stack
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), wide, beta=3.4445)
    return wide.mT if tall else wide


def build_model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **dict(vocab_size=vocabulary, hidden_size=256, intermediate_size=640, num_hidden_layers=4),
        **dict(num_attention_heads=8, num_key_value_heads=8, head_dim=32, max_position_embeddings=CONTEXT),
        **dict(tie_word_embeddings=True, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS),
        **dict(attn_implementation="sdpa", dtype="float32"),
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # each block begins as the identity, so that a high rate is safe at once
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def rate(progress: float) -> float:
    """Warm up, hold, then fall to zero in a line over the last 60 % of the time."""
    return min(1.0, (progress + 0.001) / 0.015, max(0.0, 1 - progress) / 0.6)


def write_folder(out: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, held_out: str, log: list[dict]) -> None:
    """Write everything beside `out` and swap, so that `out` is whole at any moment but one rename."""
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **SPECIAL).save_pretrained(fresh)
    (fresh / "heldout.txt").write_text(held_out, encoding="utf-8")
    (fresh / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    names = dict(python=sys.version.split()[0], packages=", ".join(PACKAGES), modules=", ".join(HELD_OUT))
    (fresh / "README.md").write_text(README.format(**log[-1], **names))
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def train(args: argparse.Namespace, held_out: str, tokenizer: Tokenizer, data: Iterator[Tensor]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, size = np.array(tokenizer.encode(held_out, add_special_tokens=False).ids), len(held_out.encode())
    model = build_model(tokenizer.get_vocab_size()).to(device)
    average = copy.deepcopy(model)  # moving average of the weights: what is measured and saved
    loss_of = torch.compile(objective) if args.compile else objective
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = (Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0))
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    log: list[dict] = []
    begin = saved = time.monotonic()
    step, read, loss_mean, progress = 0, 0, 0.0, 0.0
    while progress < 1:
        ids = (data.send(progress) if step else next(data)).to(device)
        loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)  # Muon's matrices need none: their updates have one size
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate(progress)
            optimizer.step()
            optimizer.zero_grad()
        for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
            slow.data.lerp_(fast.data, 1 - min(0.99, step / (step + 10)))
        step, read = step + 1, read + ids[:, 1:].numel()
        loss_mean += (loss.item() - loss_mean) * max(0.02, 1 / step)
        now = time.monotonic()
        progress = (now - begin) / (60 * args.minutes)
        if step % 100 == 0 or progress >= 1:
            every = 1 if progress >= 1 else 4
            bpb = bits_per_byte(average, tokens, size, every)
            log.append(dict(step=step, tokens=read, loss=round(loss_mean, 4), heldout_bpb=round(bpb, 4)))
            log[-1] |= dict(seconds=round(now - begin), heldout="whole" if every == 1 else "every fourth window")
            print(json.dumps(log[-1]), flush=True)
            if now - saved > 600 or progress >= 1:
                write_folder(args.out, average, tokenizer, held_out, log)
                saved = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("examples/demo_model"))
    parser.add_argument("--minutes", type=float, default=95)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="torch.compile: a sixth faster, wants a C++ compiler")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)  # the tokenizer's threads
    held_out, core, broad = collect()
    tokenizer = train_tokenizer(core + broad[: len(broad) // 6], vocabulary=3072)
    streams = [encode(tokenizer, texts) for texts in (core, broad)]
    print(f"text: {len(held_out):,} characters held out; tokens: core, broad = {[len(s) for s in streams]}", flush=True)
    train(args, held_out, tokenizer, batches(*streams))


if __name__ == "__main__":
    main()
