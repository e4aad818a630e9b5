#!/usr/bin/env python3
"""Train the small demo model that ships with moerunner.

The model has the DeepSeek-V3 architecture (multi-head latent attention, a dense first layer, then MoE layers
with one shared expert and grouped sigmoid routing whose correction bias balances the experts without an
auxiliary loss). It is trained from scratch on the source code of Python's own standard library.

    python scripts/train_demo.py --out build/demo                 # a GPU: some minutes; a CPU: a tiny run
    python scripts/train_demo.py --out build/demo --steps 50      # a fixed number of steps

Files are split once, by a hash of their path, into training (93 %), validation (2 %: picks the checkpoint) and
held-out (5 %: only ever evaluated, after training). Needs torch, transformers and tokenizers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import tokenizers
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from torch import Tensor, nn
    from torch.nn import functional as F
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GenerationConfig, PreTrainedTokenizerFast
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
except ImportError as error:  # the library itself does not need transformers, so say what this script needs
    sys.exit(f"train_demo.py needs torch, tokenizers and transformers >= 5.17: {error}")

GROUPED_MM: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
PROMPT = "def quicksort("

# Left out of the corpus: installed packages, this machine's build settings, tables of numbers and generated prose.
SKIP_DIRS = {"site-packages", "__pycache__", "lib-dynload", "encodings", "pydoc_data"}
SKIP_PATHS = ("config-", "_sysconfigdata", "lib2to3/tests/data", "html/entities.py")

BIAS_STEP = 1e-3  # how far one training step moves an expert's correction bias (u in the DeepSeek-V3 report)
BIAS_FROZEN_FROM = 0.9  # the bias rests for the last tenth of training, as in the DeepSeek-V3 report
PROBE_STEPS = 20  # steps timed to fit the schedule into --minutes
RESERVE_SECONDS = 15.0  # kept back from --minutes for the sample and saving; the evaluation is timed, and comes on top


# ---------------------------------------------------------------------------------------------------- corpus


@dataclass
class Corpus:
    """The standard library's sources by split; each split is a list of (relative path, text)."""

    train: list[tuple[str, str]] = field(default_factory=list)
    validation: list[tuple[str, str]] = field(default_factory=list)
    heldout: list[tuple[str, str]] = field(default_factory=list)

    def splits(self) -> dict[str, list[tuple[str, str]]]:
        return {"train": self.train, "validation": self.validation, "heldout": self.heldout}


def split_of(relative_path: str) -> str:
    """The split a file belongs to: a pure function of its path, so it never changes between runs."""
    bucket = int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:4], "big") % 100
    return "heldout" if bucket < 5 else "validation" if bucket < 7 else "train"


def collect_corpus(stdlib: Path) -> Corpus:
    """Reads every usable .py file below `stdlib`, drops exact duplicates, and splits by file."""
    corpus, seen = Corpus(), set[bytes]()
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        name = relative.as_posix()
        if SKIP_DIRS.intersection(relative.parts) or name.startswith(SKIP_PATHS):
            continue
        try:
            text = path.read_text(encoding="utf-8").replace("\r\n", "\n").strip()
        except UnicodeDecodeError:  # a few test files are in another encoding on purpose
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < 200 or digest in seen:
            continue
        seen.add(digest)
        corpus.splits()[split_of(name)].append((name, text + "\n"))
    for split, files in corpus.splits().items():
        if not files:
            sys.exit(f"error: no {split} files found below {stdlib}; is it a Python standard library (--stdlib)?")
    return corpus


# ------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: Iterator[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text round-trips, and no text is out of vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # One token separates documents, so it both begins and ends a text. None is added on encoding: the model
    # has seen windows that start anywhere in a file, and a file hardly ever begins with what one would prompt.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    return int(tokenizer.backend_tokenizer.token_to_id(token))


def encode(tokenizer: PreTrainedTokenizerFast, files: list[tuple[str, str]]) -> Tensor:
    """All files of a split as one row of token ids, with an end-of-text token before each and at the very end."""
    eos = token_id(tokenizer, END_OF_TEXT)
    ids = [eos]
    for encoding in tokenizer.backend_tokenizer.encode_batch([text for _, text in files]):
        ids += encoding.ids
        ids.append(eos)
    return torch.tensor(ids, dtype=torch.long)


# ----------------------------------------------------------------------------------------------------- model


def build_config(vocab_size: int, eos: int, pad: int, max_length: int) -> DeepseekV3Config:
    return DeepseekV3Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,  # the dense first layer
        moe_intermediate_size=64,
        num_hidden_layers=6,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=48,
        qk_rope_head_dim=16,
        v_head_dim=64,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        num_nextn_predict_layers=0,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


class Permute(torch.autograd.Function):
    """rows[order], whose gradient is a gather as well (autograd's own would be a slow accumulating scatter)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse], None, None


def sorted_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The routed experts as two grouped matrix products over the tokens sorted by expert; quick to train with."""
    tokens, top_k = top_k_index.shape
    expert_of_row, order = top_k_index.flatten().to(torch.int32).sort()
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    experts = torch.arange(module.num_experts, device=order.device, dtype=torch.int32)
    ends = torch.searchsorted(expert_of_row, experts, right=True, out_int32=True)
    rows = hidden_states.unsqueeze(1).expand(-1, top_k, -1).reshape(tokens * top_k, -1)
    rows = Permute.apply(rows, order, inverse)
    gate, up = GROUPED_MM(rows, module.gate_up_proj.transpose(-2, -1), offs=ends).chunk(2, dim=-1)
    rows = GROUPED_MM(module.act_fn(gate) * up, module.down_proj.transpose(-2, -1), offs=ends)
    rows = Permute.apply(rows, inverse, order).view(tokens, top_k, -1)
    return (rows * top_k_weights.to(rows.dtype).unsqueeze(-1)).sum(dim=1)


def choose_experts(model: DeepseekV3ForCausalLM, device: torch.device) -> None:
    if device.type == "cuda" and GROUPED_MM is not None:
        ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
        model.set_experts_implementation("sorted")
    else:
        model.set_experts_implementation("eager")


class LoadCounter:
    """Counts, by forward hooks on the routers, how many tokens each expert of each MoE layer was given."""

    def __init__(self, model: nn.Module) -> None:
        self.routers = [module for module in model.modules() if isinstance(module, DeepseekV3TopkRouter)]
        device = self.routers[0].weight.device
        self.counts = torch.zeros(len(self.routers), self.routers[0].num_experts, device=device)
        for index, router in enumerate(self.routers):
            router.register_forward_hook(self._hook(index))

    def _hook(self, index: int) -> Any:
        def count(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            chosen = output[2].flatten()
            self.counts[index].scatter_add_(0, chosen, torch.ones_like(chosen, dtype=self.counts.dtype))

        return count

    def reset(self) -> None:
        self.counts.zero_()

    def shares(self) -> Tensor:
        """Each expert's share of its layer's load, times the number of experts: 1.0 is perfectly balanced."""
        return self.counts / self.counts.mean(dim=1, keepdim=True)

    @torch.no_grad()
    def move_biases(self, step: float) -> None:
        """Moves every correction bias by `step` against the sign of its expert's load error."""
        for router, share in zip(self.routers, self.shares(), strict=True):
            router.e_score_correction_bias.sub_(step * torch.sign(share - 1.0))


def add_dropout(model: DeepseekV3ForCausalLM, probability: float) -> None:
    """Drops parts of each block's output while training; the architecture itself has no such dropout."""

    def drop(module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], probability, module.training), *output[1:])
        return F.dropout(output, probability, module.training)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)
    model.model.embed_tokens.register_forward_hook(drop)


class MasterWeights:
    """Float32 copies of the weights, which AdamW updates; the model computes with its own (bfloat16) ones.

    Training thus sees exactly the rounding of the file that is shipped, and the router, which asks for float32
    itself, gets it (autocast would take it away).
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, weight_decay: float) -> None:
        self.working = list(model.parameters())
        self.masters = [nn.Parameter(p.detach().clone().float()) for p in self.working]
        for parameter in self.working:
            parameter.data = parameter.data.to(dtype)
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        groups = [
            {"params": [m for m in self.masters if m.dim() >= 2], "weight_decay": weight_decay},
            {"params": [m for m in self.masters if m.dim() < 2], "weight_decay": 0.0},
        ]
        fused = self.masters[0].device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=fused)

    @torch.no_grad()
    def step(self, learning_rate: float, clip: float = 1.0) -> None:
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.working]
        torch._foreach_copy_([m.grad for m in self.masters], grads)
        nn.utils.clip_grad_norm_(self.masters, clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        torch._foreach_copy_(self.working, self.masters)
        for parameter in self.working:
            parameter.grad = None


# -------------------------------------------------------------------------------------------------- training


def batches(tokens: Tensor, batch: int, seq: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of windows of seq + 1 tokens; each epoch covers the text once, cut at another offset."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(seq + 1, device=tokens.device)
    while True:
        offset = int(torch.randint(seq, (1,), generator=generator))
        starts = torch.arange(offset, len(tokens) - seq - 1, seq)
        starts = starts[torch.randperm(len(starts), generator=generator)].to(tokens.device)
        for index in range(0, len(starts) - batch + 1, batch):
            yield tokens[starts[index : index + batch, None] + window]


def loss_of(model: nn.Module, windows: Tensor, reduction: str = "mean") -> Tensor:
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor, batch: int, seq: int) -> float:
    """Mean nats per token over every whole window of the tokens, each predicted once from within its window."""
    model.eval()
    starts = torch.arange(0, len(tokens) - seq, seq, device=tokens.device)
    window = torch.arange(seq + 1, device=tokens.device)
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for index in range(0, len(starts), batch):
        total += loss_of(model, tokens[starts[index : index + batch, None] + window], "sum")
    model.train()
    return float(total) / (len(starts) * seq)


def unigram_entropy(tokens: Tensor) -> float:
    """Nats per token of the best possible model that ignores all context."""
    counts = torch.bincount(tokens.cpu()).double()
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * frequencies.log()).sum())


def learning_rate_at(step: int, total: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    warmup = min(200, max(1, total // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress)))


def save_weights(model: DeepseekV3ForCausalLM, out: Path) -> None:
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"  # transformers 5 writes a class name that transformers 4 does not know
    config = {**json.loads(path.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def train(
    model: DeepseekV3ForCausalLM, loads: LoadCounter, data: dict[str, Tensor], out: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Trains, saving the model whenever the validation loss is the best so far; returns the log."""
    device = data["train"].device
    weights = MasterWeights(model, torch.bfloat16 if device.type == "cuda" else torch.float32, args.weight_decay)
    stream = batches(data["train"], args.batch, args.seq, args.seed)
    tokens_per_step, began = args.batch * args.seq, time.perf_counter()
    evals = [{"step": 0.0, "validation_loss": round(evaluate(model, data["validation"], args.batch, args.seq), 4)}]
    eval_ratio = 2 + len(data["heldout"]) / len(data["validation"])  # what is to be evaluated after the deadline
    reserve = RESERVE_SECONDS + eval_ratio * (time.perf_counter() - began)
    deadline = began + args.minutes * 60 - reserve if args.minutes else math.inf
    total = args.steps or 10**9  # with only --minutes the number of steps is known after PROBE_STEPS
    probe_began, window_loss, window_steps = 0.0, torch.zeros((), device=device), 0
    best, best_step, best_state = math.inf, 0, model.state_dict()
    step = 0
    model.train()
    while step < total:
        if step == 5:
            _synchronize(device)
            probe_began = time.perf_counter()
        if step == 5 + PROBE_STEPS:
            _synchronize(device)
            seconds = (time.perf_counter() - probe_began) / PROBE_STEPS
            print(f"{seconds * 1e3:.1f} ms a step, {tokens_per_step / seconds:,.0f} tokens/s", flush=True)
            if args.minutes:
                total = min(total, step + max(1, int(0.96 * (deadline - time.perf_counter()) / seconds)))
            epochs = total * tokens_per_step / len(data["train"])
            print(f"training for {total} steps, {epochs:.1f} passes over the corpus", flush=True)
        loads.reset()
        loss = loss_of(model, next(stream))
        loss.backward()
        weights.step(learning_rate_at(step, total, args.lr))
        if step < BIAS_FROZEN_FROM * total:
            loads.move_biases(BIAS_STEP)
        window_loss += loss.detach()
        window_steps += 1
        step += 1
        late = step % 10 == 0 and time.perf_counter() > deadline
        if step % args.eval_every == 0 or step == total or late:
            busiest = float(loads.shares().max())
            validation = evaluate(model, data["validation"], args.batch, args.seq)
            seconds = time.perf_counter() - began
            train_loss = float(window_loss) / window_steps
            entry = {"step": step, "train_loss": train_loss, "validation_loss": validation, "seconds": seconds}
            evals.append({key: round(value, 4) for key, value in entry.items()})
            line = f"step {step:6d}  train {train_loss:.4f}  validation {validation:.4f}"
            print(f"{line}  busiest expert {busiest:.2f}x  {seconds:.0f} s", flush=True)
            window_loss.zero_()
            window_steps = 0
            if not math.isfinite(train_loss):
                sys.exit("error: the training loss is no longer finite; try a lower --lr")
            if validation < best:
                best = validation
                best_step = step
                best_state = {name: value.detach().clone() for name, value in model.state_dict().items()}
                save_weights(model, out)
        if late:
            print("the time is up; stopping here", flush=True)
            break
    model.load_state_dict(best_state)
    return {
        "steps": step,
        "best_step": best_step,
        "tokens_per_step": tokens_per_step,
        "passes_over_corpus": round(step * tokens_per_step / len(data["train"]), 2),
        "validation_loss": best,
        "training_seconds": round(time.perf_counter() - began, 1),
        "evaluations": evals,
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------- output

NOTICE = """# The moerunner demo model

A language model of {parameters:,} parameters with the DeepSeek-V3 architecture. The moerunner project trained it
from scratch with `scripts/train_demo.py`; no weights of any other model went into it.

- **Training data:** the Python source files of the CPython {python} standard library ({files} files,
  {megabytes:.1f} MB), with its tests, and without its character-encoding tables and its bundled documentation
  text. Those sources are Copyright (c) Python Software Foundation and others, under the PSF License Agreement
  (https://docs.python.org/3/license.html), which also lists parts under other permissive licences. None of the
  sources is included here, but a model this small can repeat passages of what it was trained on; the PSF licence
  stands for such passages.
- **Licence of the weights, tokenizer and configuration:** Apache-2.0, as for the rest of moerunner.
- **Trained on:** {device}, in {minutes:.1f} minutes.
- **Quality:** held-out loss {loss:.3f} nats/token ({bits:.3f} bits/byte) on {heldout_files} files that were never
  trained on, against a unigram entropy of {unigram:.3f} nats/token.{note}

## Limits

It exists to exercise and show MoE layers with real, trained routing, on any machine, without a download. It writes
text that looks like Python; that text is seldom correct and must not be used as code. It knows nothing but the
standard library's style, leans to the unit tests that make up most of that library, repeats itself, above all
under greedy decoding, and has only seen windows of {seq} tokens. It was not tuned for instructions or for safety.
`training_log.json` has the details.
"""


def bias_report(loads: LoadCounter, first_layer: int) -> list[dict[str, Any]]:
    """Per MoE layer: each expert's load relative to the mean, and its correction bias."""
    report = []
    for layer, (router, share) in enumerate(zip(loads.routers, loads.shares().tolist(), strict=True), first_layer):
        bias = [round(value, 4) for value in router.e_score_correction_bias.tolist()]
        load = [round(value, 3) for value in share]
        entry = {"layer": layer, "max_load": max(load), "min_load": min(load), "load": load, "bias": bias}
        report.append(entry)
    return report


@torch.no_grad()
def complete(model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, tokens: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


# ------------------------------------------------------------------------------------------------------ main


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write the model to")
    parser.add_argument("--stdlib", type=Path, help="the standard library to train on (default: this Python's own)")
    parser.add_argument("--stdlib-version", help="the Python version of --stdlib, for the log")
    parser.add_argument("--steps", type=int, help="training steps (default: 4600 on a GPU, 200 on a CPU)")
    parser.add_argument("--minutes", type=float, help="time limit, to which the steps are fitted (default: 8 on a GPU)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--batch", type=int, help="windows a step (default: 64 on a GPU, 8 on a CPU)")
    parser.add_argument("--seq", type=int, help="tokens a window (default: 512 on a GPU, 128 on a CPU)")
    parser.add_argument("--vocab", type=int, default=4096, help="size of the vocabulary")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1, help="dropout on each block's output while training")
    parser.add_argument("--eval-every", type=int, default=400, help="steps between validations")
    parser.add_argument("--note", default="", help="a remark for the log and the notice")
    parser.add_argument("--max-files", type=int, help="use only so many files of each split (for a quick trial)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU; use --device cpu")
    on_gpu = args.device.startswith("cuda")
    if args.steps is None and args.minutes is None:
        args.steps, args.minutes = (4600, 8.0) if on_gpu else (200, None)
    args.batch = args.batch or (64 if on_gpu else 8)
    args.seq = args.seq or (512 if on_gpu else 128)
    if args.stdlib is None:
        args.stdlib, args.stdlib_version = Path(sysconfig.get_paths()["stdlib"]), platform.python_version()
    if args.stdlib_version is None:
        parser.error("--stdlib needs --stdlib-version, so that the log can name what the model was trained on")
    if not args.stdlib.is_dir():
        parser.error(f"--stdlib: there is no folder {args.stdlib}")
    if not 300 <= args.vocab <= 65536:
        parser.error("--vocab must lie between 300 (all bytes and a few merges) and 65536")
    if args.minutes is not None and args.minutes * 60 < 2 * RESERVE_SECONDS:
        parser.error(f"--minutes must be at least {2 * RESERVE_SECONDS / 60:.1f}")
    if min(args.batch, args.seq, args.eval_every) < 1 or (args.steps is not None and args.steps < 1):
        parser.error("--steps, --batch, --seq and --eval-every must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    began = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)

    corpus = collect_corpus(args.stdlib)
    if args.max_files:
        corpus = Corpus(*(files[: args.max_files] for files in corpus.splits().values()))
    tokenizer = train_tokenizer((text for _, text in corpus.train), args.vocab, args.seq)
    data = {name: encode(tokenizer, files).to(device) for name, files in corpus.splits().items()}
    size = {name: sum(len(text.encode()) for _, text in files) for name, files in corpus.splits().items()}
    for name, files in corpus.splits().items():
        if len(data[name]) < args.seq + 2 or (name == "train" and len(data[name]) < 2 * args.batch * args.seq):
            sys.exit(f"error: the {name} split has only {len(data[name])} tokens; lower --seq or --batch")
        print(f"{name}: {len(files)} files, {size[name] / 1e6:.2f} MB, {len(data[name]):,} tokens")
    print(f"prepared in {time.perf_counter() - began:.1f} s", flush=True)
    if args.minutes:  # the preparation counts, too
        args.minutes = max(2 * RESERVE_SECONDS / 60, args.minutes - (time.perf_counter() - began) / 60)

    eos, pad = token_id(tokenizer, END_OF_TEXT), token_id(tokenizer, PAD)
    model = DeepseekV3ForCausalLM(build_config(len(tokenizer), eos, pad, args.seq)).to(device)
    model.generation_config = GenerationConfig(do_sample=False, bos_token_id=eos, eos_token_id=eos, pad_token_id=pad)
    choose_experts(model, device)
    if args.dropout:
        add_dropout(model, args.dropout)
    loads = LoadCounter(model)
    parameters = sum(p.numel() for p in model.parameters())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    print(f"{parameters:,} parameters, on {where}", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, args.out)
    log = train(model, loads, data, args.out, args)

    # What is shipped is bfloat16, so evaluate that. The correction bias, a buffer, stays float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    save_weights(model, args.out)
    loads.reset()
    heldout = evaluate(model, data["heldout"], args.batch, args.seq)
    balance = bias_report(loads, model.config.first_k_dense_replace)
    tokens_per_byte = len(data["heldout"]) / size["heldout"]
    unigram = unigram_entropy(data["heldout"])
    model.eval()
    sample = complete(model, tokenizer, PROMPT, min(120, args.seq - 8))
    log = {
        "heldout_loss": round(heldout, 5),
        "heldout_bits_per_byte": round(heldout * tokens_per_byte / math.log(2), 5),
        "heldout_unigram_entropy": round(unigram, 5),
        "loss_unit": "nats per token",
        "parameters": parameters,
        "device": where,
        "seconds": round(time.perf_counter() - began, 1),
        "seed": args.seed,
        "note": args.note,
        "python_of_the_stdlib": args.stdlib_version,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "data": {
            name: {"files": len(files), "bytes": size[name], "tokens": len(data[name])}
            for name, files in corpus.splits().items()
        },
        "settings": {
            "batch": args.batch,
            "seq": args.seq,
            "vocab": args.vocab,
            "lr": args.lr,
            "weight_decay": args.weight_decay,
            "dropout": args.dropout,
            "bias_step": BIAS_STEP,
        },
        **log,
        "heldout_expert_balance": balance,
        "sample": sample,
        "heldout_files": [name for name, _ in corpus.heldout],
    }
    text = json.dumps(log, indent=1)
    (args.out / "training_log.json").write_text(text + "\n", encoding="utf-8")
    notice = NOTICE.format(
        parameters=parameters,
        python=args.stdlib_version,
        files=len(corpus.train),
        megabytes=size["train"] / 1e6,
        device=where,
        minutes=log["training_seconds"] / 60,
        loss=heldout,
        bits=log["heldout_bits_per_byte"],
        heldout_files=len(corpus.heldout),
        unigram=unigram,
        seq=args.seq,
        note=f" {args.note}" if args.note else "",
    )
    (args.out / "NOTICE.md").write_text(notice, encoding="utf-8")
    print(f"held-out loss {heldout:.4f} nats/token, {log['heldout_bits_per_byte']:.4f} bits/byte")
    print(f"unigram entropy {unigram:.4f} nats/token")
    for entry in balance:
        line = f"load {entry['min_load']:.2f}x to {entry['max_load']:.2f}x"
        print(f"layer {entry['layer']}: {line}, bias {min(entry['bias'])} to {max(entry['bias'])}")
    print(f"written to {args.out} in {log['seconds']:.0f} s\n\n{sample}")


if __name__ == "__main__":
    main()
