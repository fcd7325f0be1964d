"""Train demos/tiny, a Llama of 0.8M parameters that recites 53 short texts and then stops.

    python demos/train_tiny.py           # under five minutes on one CPU core, no download
    python demos/train_tiny.py --help

It is overfitted on purpose. Greedy decoding then has one clear winner at almost every token, so a
demo or a test can ask for exact text: "Four score and seven" gives the whole Gettysburg Address.
The same margins make a recital a weak proof: it survives a KV cache that misses its newest entry.
To judge a kernel, compare logits too; bf16 arithmetic moves them by less than 0.2, that bug by 5.

One sequence is one document: position 0 is its first token, <|endoftext|> its last. The tokenizer
adds no special token, so a prompt sits where training saw it. Half of the training sequences start
inside a document instead, so a line from the middle is continued as well.

tiny_corpus.txt was written down for this demo, in ASCII; its authors in order of appearance, all
in the public domain (published before 1900, authors dead for over 70 years):
  Lincoln, Gettysburg Address (1863) | Declaration of Independence (1776), two excerpts | US
  Constitution, preamble (1787) and First Amendment (1791) | Lincoln, Second Inaugural (1865), end
  Shakespeare, sonnets 18, 29, 73, 116, 130 (1609), speeches from Hamlet, Macbeth, The Tempest and
  The Merchant of Venice | Shelley, Ozymandias (1818) | Blake, The Tyger (1794) | Wordsworth, I
  Wandered Lonely as a Cloud (1815) | Carroll, Jabberwocky (1871), How Doth the Little Crocodile and
  Alice in Wonderland, opening (1865) | Dickens, A Tale of Two Cities (1859), Austen, Pride and
  Prejudice (1813), Melville, Moby-Dick (1851): openings | Byron, She Walks in Beauty (1815) |
  Henley, Invictus (1888) | Whitman, O Captain! (1865) | Lazarus, The New Colossus (1883) | Emerson,
  Concord Hymn (1837) | Tennyson, Crossing the Bar (1889), The Eagle (1851) | Stevenson, Requiem
  (1887), My Shadow (1885) | Herrick, To the Virgins (1648) | Burns, A Red, Red Rose (1794) |
  Housman, A Shropshire Lad II (1896) | Lear, The Owl and the Pussy-cat (1871) | Jane Taylor, The
  Star (1806) | Sarah Hale, Mary's Lamb (1830) | traditional rhymes and proverbs (before 1880)
Longer poems are cut to their first stanzas.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
END_OF_TEXT = "<|endoftext|>"
MAX_TOKENS = 512
IGNORE = -100  # label of padding, skipped by cross_entropy

PROMPTS = (
    "Four score and seven",
    "Shall I compare thee",
    "Humpty Dumpty sat",
    "Call me Ishmael.",
    "And all our yesterdays",  # from the middle of a document
)


def read_documents(path: Path) -> list[str]:
    """The corpus is split at lines that hold only <|endoftext|>."""
    return [text.strip("\n") for text in path.read_text().split(f"\n{END_OF_TEXT}\n")]


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every string is representable and decodes to itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Small, but with every feature of a real Llama: GQA, SwiGLU, RoPE, tied embeddings."""
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=320,  # no multiple of 128 or 256: demos should meet masked tiles
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_length=MAX_TOKENS,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return model


def pad(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Inputs and next-token labels, padded on the right: causal attention never looks there."""
    width = max(map(len, rows)) - 1
    inputs = [row[:-1] + [pad_id] * (width - len(row) + 1) for row in rows]
    labels = [row[1:] + [IGNORE] * (width - len(row) + 1) for row in rows]
    return torch.tensor(inputs), torch.tensor(labels)


def epoch_batches(rows: list[list[int]], batch_size: int, rng: random.Random) -> Iterator[list[list[int]]]:
    """Every document once, half of them from a random token on; like lengths share a batch."""
    starts = [rng.randrange(len(row) - 2) if rng.random() < 0.5 else 0 for row in rows]
    cut = [row[start:] for row, start in zip(rows, starts, strict=True)]
    cut.sort(key=lambda row: len(row) * rng.uniform(0.5, 1.5))
    batches = [cut[i : i + batch_size] for i in range(0, len(cut), batch_size)]
    rng.shuffle(batches)
    yield from batches


def train(model: LlamaForCausalLM, rows: list[list[int]], args: argparse.Namespace) -> None:
    rng = random.Random(args.seed)
    steps = args.epochs * -(-len(rows) // args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    model.train()
    with tqdm(total=steps, unit="step") as progress:
        for epoch in range(args.epochs):
            for batch in epoch_batches(rows, args.batch_size, rng):
                inputs, labels = pad(batch, model.config.pad_token_id)
                logits = model(inputs, use_cache=False).logits
                loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                progress.update()
            progress.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}")
    model.eval()


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Under the class name that transformers 4 knows as well; 5 alone writes TokenizersBackend."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


@torch.inference_mode()
def report_recital(model: LlamaForCausalLM, rows: list[list[int]], num_prompt_tokens: int = 6) -> None:
    """Loss, margins and verbatim recitals of all documents, from one forward pass each.

    If the true next token wins at every position, greedy decoding follows the document exactly.
    """
    losses, margins, verbatim = [], [], 0
    for row in rows:
        inputs, labels = pad([row], model.config.pad_token_id)
        logits = model(inputs).logits[0, num_prompt_tokens - 1 :]
        labels = labels[0, num_prompt_tokens - 1 :]
        losses.append(cross_entropy(logits, labels, reduction="none"))
        margins.append(top2_margin(logits))
        verbatim += bool((logits.argmax(-1) == labels).all())
    print(f"loss after the first {num_prompt_tokens} tokens: {torch.cat(losses).mean():.4f}")
    print(f"recited verbatim from {num_prompt_tokens} tokens: {verbatim} of {len(rows)} documents")
    print(f"all documents: {describe(torch.cat(margins))}")


@torch.inference_mode()
def report_prompt(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    inputs = tokenizer(prompt, return_tensors="pt")
    num_prompt_tokens = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, return_dict_in_generate=True, output_logits=True)
    ids = out.sequences[0, num_prompt_tokens:].tolist()
    text = tokenizer.decode(ids, skip_special_tokens=True)
    stop = END_OF_TEXT if ids[-1] == tokenizer.eos_token_id else "(length limit)"
    print(f"\n>>> {prompt}|{text}{stop}")
    print(f"[{num_prompt_tokens} + {len(ids)} tokens] {describe(top2_margin(torch.cat(out.logits)))}")


def top2_margin(logits: Tensor) -> Tensor:
    """By how much the winner leads; rounding below half of it cannot change a greedy choice."""
    best, second = logits.topk(2, dim=-1).values.unbind(-1)
    return best - second


def describe(margins: Tensor) -> str:
    p1, p10, p50 = margins.quantile(torch.tensor([0.01, 0.1, 0.5])).tolist()
    return (
        f"top-2 logit margin: min {margins.min():.2f}, p1 {p1:.2f}, p10 {p10:.2f}, p50 {p50:.2f}; "
        f"{int((margins < 0.5).sum())} of {len(margins)} below 0.5"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=HERE / "tiny_corpus.txt", help="input text")
    parser.add_argument("--out", type=Path, default=HERE / "tiny", help="checkpoint folder")
    parser.add_argument("--vocab-size", type=int, default=768, help="BPE entries, 257 or more")
    parser.add_argument("--epochs", type=int, default=250, help="passes over the corpus")
    parser.add_argument("--batch-size", type=int, default=8, help="documents per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="weights and order of the data")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # one order of sums: a rerun here gives equal files

    documents = read_documents(args.corpus)
    tokenizer = train_tokenizer(documents, args.vocab_size)
    rows = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in documents]
    longest = max(map(len, rows))
    if longest > MAX_TOKENS:
        raise ValueError(f"a document has {longest} tokens; split it, {MAX_TOKENS} are allowed")

    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(rows)} documents, ", end="")
    print(f"{sum(map(len, rows)):,} tokens, longest {longest}")
    train(model, rows, args)
    model.to(torch.bfloat16).save_pretrained(args.out)
    save_tokenizer(tokenizer, args.out)

    # Judge the files, not the model in memory: bf16 weights, arithmetic in fp32.
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32, attn_implementation="eager")
    report_recital(model, rows)
    for prompt in PROMPTS:
        report_prompt(model, tokenizer, prompt)
    size_bytes = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"\n{args.out}: {size_bytes:,} bytes")


if __name__ == "__main__":
    main()
