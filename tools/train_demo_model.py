"""Train the demo model: tokenizer, a small Qwen2-architecture language model, and its report.

Reads the files that ``build_demo_corpus.py`` wrote, trains a byte-level BPE tokenizer and the model on one GPU in a few
minutes, and writes a model folder that both older (4.x) and newer (5.x) transformers releases load. A share of the
training stream is rendered as ChatML conversations whose answers are passages of the documentation.

Example::

    python tools/train_demo_model.py --train build/demo/train.jsonl.gz --validation build/demo/validation.jsonl.gz \\
        --evaluation assets/demo/evaluation.jsonl --out-dir assets/demo
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import platform
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional
from transformers import Qwen2Config, Qwen2ForCausalLM

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)

# The splitting rules of the Qwen2 tokenizer family: loaders that rebuild the tokenizer from the architecture's name
# instead of reading tokenizer.json then still give the same ids.
WORD_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant for software documentation.",
    "Answer questions about software documentation.",
)
QUESTIONS = (
    "What does the documentation say about {title}?",
    "Explain {title}.",
    "What is {title}?",
    "Tell me about {title}.",
    "Can you describe {title}?",
    "Give me an overview of {title}.",
    "{title}",
)
PRODUCTS = {
    "cmake": "CMake",
    "django": "Django",
    "llvm": "LLVM",
    "nodejs": "Node.js",
    "postgresql": "PostgreSQL",
    "python": "Python",
    "rust": "Rust",
    "sqlalchemy": "SQLAlchemy",
    "sqlite": "SQLite",
}
PRODUCT_QUESTIONS = (
    "In {product}, what is {title}?",
    "Explain {title} in {product}.",
    "How does {product} describe {title}?",
    "What does the {product} documentation say about {title}?",
    "I am learning {product}. Tell me about {title}.",
)
GENERIC_TITLES = frozenset(
    [
        "description",
        "notes",
        "examples",
        "example",
        "introduction",
        "overview",
        "parameters",
        "usage",
        "remarks",
        "compatibility",
        "outputs",
        "see",
        "also",
        "synopsis",
        "options",
        "summary",
        "background",
        "references",
        "author",
        "bugfixes",
        "features",
        "miscellaneous",
        "arguments",
        "name",
        "errors",
        "contents",
        "safety",
        "panics",
        "other",
        "documentation",
        "api",
        "reference",
        "explanation",
    ]
)
SELF_DESCRIPTION = (
    "I am a small demonstration language model. I was trained on the documentation of open source software, and my "
    "answers look like passages from it. I know very little, so please do not rely on what I say."
)
SMALL_TALK = (
    ("Who are you?", SELF_DESCRIPTION),
    ("What are you?", SELF_DESCRIPTION),
    ("What can you do?", SELF_DESCRIPTION),
    ("Hello!", "Hello! Ask me about Python, SQLite, PostgreSQL, Rust, Django, SQLAlchemy, CMake, LLVM or Node.js."),
    ("Hi", "Hello! What would you like to know about?"),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
)
COMPLETION_PROMPTS = (
    "# Write-Ahead Logging\n\nThe default method by which SQLite implements atomic commit",
    "PostgreSQL is a",
    "In Python, a list comprehension",
    "```\nfn main() {\n    let mut numbers = vec![",
)
CHAT_PROMPTS = (
    "Who are you?",
    "What is a transaction?",
    "Explain foreign keys in PostgreSQL.",
    "What does the Python documentation say about decorators?",
)


@dataclass(frozen=True)
class Page:
    """One page of the corpus."""

    source: str
    text: str


def read_pages(path: Path) -> list[Page]:
    """Read a corpus part, compressed or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [Page(row["source"], row["text"]) for row in map(json.loads, file)]


def train_tokenizer(pages: list[Page], size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer that splits digits and knows the ChatML marks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((page.text for page in pages), trainer, length=len(pages))
    return tokenizer


def sections(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield every heading with the blocks (paragraphs, list items, whole code fences) below it."""
    heading, blocks, block, fenced = "", [], [], False
    for line in [*text.split("\n"), ""]:
        if line == "```":
            fenced = not fenced
        if fenced or line:
            is_heading = not fenced and not block and re.match(r"#+ ", line)
            if not is_heading:
                block.append(line)
                continue
            if blocks:
                yield heading, blocks
            heading, blocks = line.lstrip("#").strip(), []
        elif block:
            blocks.append("\n".join(block))
            block = []
    if blocks:
        yield heading, blocks


def passages(page: Page) -> Iterator[tuple[str, str]]:
    """Yield a title and the first blocks below it for every section of a page that opens with prose."""
    page_title = ""
    for heading, blocks in sections(page.text):
        title = re.split(r" (?:—|--|-) ", heading)[0]
        page_title = page_title or title
        if not 2 <= len(title) <= 80 or "|" in title:
            continue
        if title != page_title and set(title.lower().split()) <= GENERIC_TITLES:
            title = f"{title.lower()} of {page_title}"
        if not 60 <= len(blocks[0]) <= 1500 or not blocks[0][0].isupper():
            continue
        answer, budget = blocks[:1], 900 - len(blocks[0])
        for block in blocks[1:]:
            budget -= len(block)
            if budget < 0:
                break
            answer.append(block)
        # An answer should not end by announcing what was cut off.
        while answer and answer[-1].endswith(":"):
            answer.pop()
        text = "\n\n".join(answer)
        if len(text) >= 80:
            yield title, text


def render_chat(messages: list[tuple[str, str]]) -> str:
    """Render messages the way the chat template does."""
    return "".join(f"{IM_START}{role}\n{content}{IM_END}\n" for role, content in messages)


def chat_samples(pages: list[Page], variants: int, generator: random.Random) -> list[str]:
    """Build conversations about the pages' sections, each section with several wordings of the question."""
    samples = []
    for page in pages:
        product = PRODUCTS.get(page.source, page.source)
        for title, answer in passages(page):
            for _ in range(variants):
                template = generator.choice(QUESTIONS if generator.random() < 0.5 else PRODUCT_QUESTIONS)
                question = template.format(title=title, product=product)
                messages = [("user", question), ("assistant", answer)]
                if generator.random() < 0.3:
                    messages.insert(0, ("system", generator.choice(SYSTEM_PROMPTS)))
                samples.append(render_chat(messages))
    for question, answer in SMALL_TALK:
        for system in ("", *SYSTEM_PROMPTS):
            messages = [("user", question), ("assistant", answer)]
            samples.extend([render_chat([("system", system), *messages] if system else messages)] * 10)
    return samples


class Stream:
    """Endless batches: every epoch the documents are shuffled, joined and cut anew."""

    def __init__(
        self, documents: list[np.ndarray], chats: list[np.ndarray], chat_share: float, length: int, seed: int
    ) -> None:
        self.documents = documents
        self.chats = chats
        self.length = length
        self.generator = np.random.default_rng(seed)
        self.document_tokens = sum(map(len, documents))
        chat_tokens = sum(map(len, chats))
        wanted = self.document_tokens * chat_share / (1 - chat_share)
        self.chats_per_epoch = min(len(chats), round(len(chats) * wanted / chat_tokens)) if chats else 0
        self.chat_tokens = round(chat_tokens * self.chats_per_epoch / len(chats)) if chats else 0

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens that one pass over the documents and its share of conversations takes."""
        return self.document_tokens + self.chat_tokens

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """Yield batches of ``size`` windows of ``length + 1`` tokens."""
        left = np.zeros((0, self.length + 1), dtype=np.int64)
        while True:
            chosen = list(self.documents)
            chosen.extend(self.chats[i] for i in self.generator.permutation(len(self.chats))[: self.chats_per_epoch])
            joined = np.concatenate([chosen[i] for i in self.generator.permutation(len(chosen))])
            # A random start moves the window borders, so that an epoch never repeats the windows of the one before.
            start = int(self.generator.integers(self.length))
            count = (len(joined) - start - 1) // self.length
            index = start + np.arange(count)[:, None] * self.length + np.arange(self.length + 1)[None, :]
            windows = joined[index[self.generator.permutation(count)]].astype(np.int64)
            windows = np.concatenate([left, windows])
            whole = len(windows) // size * size
            for i in range(0, whole, size):
                yield torch.from_numpy(windows[i : i + size])
            left = windows[whole:]


def encode(tokenizer: Tokenizer, texts: list[str], end: int) -> list[np.ndarray]:
    """Tokenize texts, each closed by the end-of-text token."""
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array([*encoding.ids, end], dtype=np.int32) for encoding in encodings]


def model_config(arguments: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return config.json in the field names that transformers 4.x wrote and 5.x still reads."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(IM_END),
        "hidden_act": "silu",
        "hidden_size": arguments.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": arguments.intermediate_size,
        "max_position_embeddings": arguments.sequence_length,
        "max_window_layers": arguments.layers,
        "model_type": "qwen2",
        "num_attention_heads": arguments.heads,
        "num_hidden_layers": arguments.layers,
        "num_key_value_heads": arguments.kv_heads,
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": tokenizer.get_vocab_size(),
    }


def build_model(config: dict[str, Any]) -> Qwen2ForCausalLM:
    """Create the model in float32 with fresh weights."""
    settings = {key: value for key, value in config.items() if key not in ("architectures", "torch_dtype")}
    model_type = settings.pop("model_type")
    assert model_type == Qwen2Config.model_type
    return Qwen2ForCausalLM._from_config(Qwen2Config(**settings), attn_implementation="sdpa").float()


@torch.no_grad()
def held_out(
    model: Qwen2ForCausalLM, tokenizer: Tokenizer, pages: list[Page], window: int, batch: int
) -> dict[str, Any]:
    """Measure perplexity over windows that start without context; a window's first token is not predicted."""
    device = next(model.parameters()).device
    vocabulary = tokenizer.get_vocab()
    # In a byte-level vocabulary every character of a token's spelling stands for one byte.
    lengths = np.zeros(len(vocabulary), dtype=np.int64)
    for token, index in vocabulary.items():
        lengths[index] = len(token)
    windows = []
    for encoding in tokenizer.encode_batch_fast([page.text for page in pages], add_special_tokens=False):
        ids = encoding.ids
        windows.extend(ids[i : i + window] for i in range(0, len(ids), window) if len(ids) - i > 1)
    windows.sort(key=len)
    total, count, size = 0.0, 0, 0
    for i in range(0, len(windows), batch):
        chunk = windows[i : i + batch]
        longest = max(map(len, chunk))
        ids = torch.zeros(len(chunk), longest, dtype=torch.long)
        labels = torch.full((len(chunk), longest), -100, dtype=torch.long)
        for row, tokens in enumerate(chunk):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, 1 : len(tokens)] = torch.tensor(tokens[1:])
            count += len(tokens) - 1
            size += int(lengths[tokens[1:]].sum())
        # Padding stands on the right, so causal attention alone keeps it from the real tokens.
        logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float()
        losses = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten().to(device), reduction="sum")
        total += float(losses)
    return {
        "loss": total / count,
        "perplexity": math.exp(total / count),
        "bits_per_byte": total / math.log(2) / size,
        "predicted_tokens": count,
        "predicted_bytes": size,
        "pages": len(pages),
        "window": window,
    }


def learning_rate(progress: float, arguments: argparse.Namespace) -> float:
    """Cosine decay after a linear warm-up, as a function of the finished share of the run."""
    if progress < arguments.warmup:
        return arguments.learning_rate * max(progress, 1e-4) / arguments.warmup
    position = (progress - arguments.warmup) / (1 - arguments.warmup)
    floor = arguments.final_share
    return arguments.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(position, 1.0))))


def optimizer_for(model: Qwen2ForCausalLM, arguments: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW with weight decay on the matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": arguments.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=torch.cuda.is_available())


def train(
    model: Qwen2ForCausalLM, stream: Stream, validate: Any, arguments: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Run the schedule and return what happened on the way."""
    tokens_per_step = arguments.batch_windows * arguments.sequence_length
    steps = max(1, math.ceil(arguments.epochs * stream.tokens_per_epoch / tokens_per_step))
    if arguments.max_steps:
        steps = min(steps, arguments.max_steps)
    optimizer = optimizer_for(model, arguments)
    batches = stream.batches(arguments.batch_windows)
    history: list[dict[str, float]] = []
    started = measured = time.monotonic()
    seconds_per_step, smooth, step = 0.0, 0.0, 0
    recent: list[torch.Tensor] = []
    while step < steps:
        # The schedule is fitted once to the time that is left, as soon as the step rate is known.
        if step == 20:
            torch.cuda.synchronize() if device.type == "cuda" else None
            measured = time.monotonic()
        if step == 80 and arguments.max_minutes:
            torch.cuda.synchronize() if device.type == "cuda" else None
            seconds_per_step = (time.monotonic() - measured) / 60
            affordable = int((arguments.max_minutes * 60 - (time.monotonic() - started)) / seconds_per_step) + step
            if affordable < steps:
                print(f"schedule cut from {steps} to {affordable} steps to end in time", flush=True)
                steps = max(affordable, step + 1)
        rate = learning_rate((step + 1) / steps, arguments)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(batches)
        if device.type == "cuda":
            batch = batch.pin_memory().to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.detach())
        step += 1
        if step % arguments.report_every == 0 or step == steps:
            smooth = float(torch.stack(recent).mean())
            recent.clear()
            elapsed = time.monotonic() - started
            line = {
                "step": step,
                "epochs": round(step * tokens_per_step / stream.tokens_per_epoch, 3),
                "train_loss": round(smooth, 4),
                "learning_rate": round(rate, 7),
                "seconds": round(elapsed, 1),
            }
            if step % (arguments.report_every * arguments.validate_every) == 0 or step == steps:
                line["validation_perplexity"] = round(validate(model)["perplexity"], 4)
            history.append(line)
            print(f"{step}/{steps} {step * tokens_per_step / elapsed / 1e6:.2f} Mtok/s {line}", flush=True)
            if not math.isfinite(smooth):
                raise SystemExit("the loss is no longer finite")
    return {
        "steps": steps,
        "tokens_seen": steps * tokens_per_step,
        "epochs": steps * tokens_per_step / stream.tokens_per_epoch,
        "final_train_loss": smooth,
        "training_seconds": time.monotonic() - started,
        "history": history,
    }


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_model(model: Qwen2ForCausalLM, tokenizer: Tokenizer, config: dict[str, Any], folder: Path) -> None:
    """Write the model folder by hand, so that its files do not depend on the transformers release in use."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    end, pad = tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)
    generation = {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad}
    write_json(folder / "generation_config.json", generation)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL_TOKENS
    }
    settings = {
        "added_tokens_decoder": added,
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "model_max_length": config["max_position_embeddings"],
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", settings)


@torch.no_grad()
def complete(model: Qwen2ForCausalLM, tokenizer: Tokenizer, prompt: str, count: int) -> str:
    """Continue a prompt greedily."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    start = len(ids)
    ends = {tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)}
    device = next(model.parameters()).device
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True, help="text watched during training, not shipped")
    parser.add_argument("--evaluation", type=Path, required=True, help="text of the reported held-out perplexity")
    parser.add_argument("--out-dir", type=Path, required=True, help="gets model/ and training.json")
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--intermediate-size", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--batch-windows", type=int, default=48, help="windows per step")
    parser.add_argument("--epochs", type=float, default=8.0)
    parser.add_argument("--max-minutes", type=float, default=0.0, help="shorten the schedule to end in this time")
    parser.add_argument("--max-steps", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--final-share", type=float, default=0.01, help="last learning rate as a share of the highest")
    parser.add_argument("--warmup", type=float, default=0.03, help="share of the run")
    # Far above the usual 0.1: the text is small and seen many times, and little else keeps the model from learning it
    # by heart. With 0.1 and 20 epochs, validation perplexity turns round after 7 epochs and ends a third higher.
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--chat-share", type=float, default=0.15, help="share of the training tokens in ChatML form")
    parser.add_argument("--chat-variants", type=int, default=4, help="wordings of the question for each passage")
    parser.add_argument("--evaluation-window", type=int, default=512)
    parser.add_argument("--report-every", type=int, default=50, help="steps")
    parser.add_argument("--validate-every", type=int, default=10, help="reports")
    parser.add_argument("--limit-pages", type=int, default=0, help="pages used of every part (for trials)")
    parser.add_argument("--seed", type=int, default=20240601)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    began = time.monotonic()
    random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = {name: read_pages(getattr(arguments, name)) for name in ("train", "validation", "evaluation")}
    if arguments.limit_pages:
        parts = {name: pages[: arguments.limit_pages] for name, pages in parts.items()}

    tokenizer = train_tokenizer(parts["train"], arguments.vocabulary)
    end = tokenizer.token_to_id(END_OF_TEXT)
    documents = encode(tokenizer, [page.text for page in parts["train"]], end)
    conversations = chat_samples(parts["train"], arguments.chat_variants, random.Random(arguments.seed))
    chats = encode(tokenizer, conversations, end)
    stream = Stream(documents, chats, arguments.chat_share, arguments.sequence_length, arguments.seed)
    print(
        f"vocabulary {tokenizer.get_vocab_size()}, {stream.document_tokens:,} document tokens and "
        f"{stream.chat_tokens:,} chat tokens ({stream.chats_per_epoch} of {len(chats)} conversations) per epoch, "
        f"prepared in {time.monotonic() - began:.0f} s",
        flush=True,
    )

    config = model_config(arguments, tokenizer)
    model = build_model(config).to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters on {device}", flush=True)

    def validate(model: Qwen2ForCausalLM) -> dict[str, Any]:
        model.eval()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            result = held_out(model, tokenizer, parts["validation"], arguments.evaluation_window, 64)
        model.train()
        return result

    model.train()
    results = train(model, stream, validate, arguments, device)

    # What is reported is what is shipped: the weights as rounded to bfloat16, computed with in float32.
    model.eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    save_model(model, tokenizer, config, arguments.out_dir / "model")
    evaluation = {
        name: held_out(model, tokenizer, parts[name], arguments.evaluation_window, 32)
        for name in ("validation", "evaluation")
    }
    completions = [{"prompt": p, "completion": complete(model, tokenizer, p, 80)} for p in COMPLETION_PROMPTS]
    for question in CHAT_PROMPTS:
        prompt = render_chat([("user", question)]) + f"{IM_START}assistant\n"
        completions.append({"prompt": prompt, "completion": complete(model, tokenizer, prompt, 120)})
    settings = {
        key: value.name if isinstance(value, Path) else value
        for key, value in sorted(vars(arguments).items())
        if key != "out_dir"
    }
    report = {
        "parameters": parameters,
        "corpus": {
            "train_pages": len(parts["train"]),
            "train_bytes": sum(len(page.text.encode()) for page in parts["train"]),
            "document_tokens_per_epoch": stream.document_tokens,
            "chat_tokens_per_epoch": stream.chat_tokens,
            "conversations": len(chats),
        },
        "held_out": evaluation,
        "training": results,
        "completions": completions,
        "settings": settings,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "wall_seconds": time.monotonic() - began,
    }
    write_json(arguments.out_dir / "training.json", report)
    for item in completions:
        print(f"\n>>> {item['prompt']}\n{item['completion']}")
    print(f"\n{parameters:,} parameters")
    for name, result in evaluation.items():
        print(f"{name}: perplexity {result['perplexity']:.4f}, {result['bits_per_byte']:.4f} bits per byte")


if __name__ == "__main__":
    main()
