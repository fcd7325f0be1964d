"""One kernel launch writes a text while you watch; then transformers has to agree with it.

    python demos/demo.py            # about a minute and a half on two CPU cores, seconds on a GPU
    python demos/demo.py --prompt "Shall I compare thee" --max-new-tokens 20

The model is demos/tiny, which recites texts it was trained on. Equal tokens alone would be a weak proof: its margins
are so wide that it recites even with a broken KV cache. So the logits are compared as well: those of the last step, to
which every earlier one contributes through the cache, come from the very launch that wrote the text; those of all steps
(on a CPU: of the first ones, to save time) come from a second launch.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging

import tri_mpk

CHECKPOINT = Path(__file__).resolve().parent / "tiny"
# What rounding may move a logit by. 16-bit weights and activations move them by less than 0.2, a bug by several units.
MAX_LOGIT_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.5}
CPU_STEPS_CHECKED = 12


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--prompt", default="Humpty Dumpty sat", help="how the text begins")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="most tokens to generate")
    parser.add_argument("--device", default=None, help="cuda or cpu (None: a GPU if there is one)")
    return parser.parse_args()


def describe(model: tri_mpk.CausalLM) -> None:
    """What is about to run, and where."""
    on = "Triton's interpreter, one process per worker" if model.device.type == "cpu" else torch.cuda.get_device_name()
    kernel = model.kernel
    print(f"tri_mpk {tri_mpk.__version__} on {model.device} ({on}), {model.dtype}, {kernel.num_workers} workers")
    print(kernel.program.report)
    print(f"kernel: {kernel.runtime.source_path}")


def compare_tokens(actual: list[int], expected: list[int]) -> bool:
    """Token by token; says where they part."""
    if actual == expected:
        print(f"tokens:  all {len(actual)} equal")
        return True
    same = 0
    while same < min(len(actual), len(expected)) and actual[same] == expected[same]:
        same += 1
    print(f"tokens:  DIFFER from token {same} on: {actual[same:][:8]}..., transformers has {expected[same:][:8]}...")
    return False


def compare_logits(label: str, actual: torch.Tensor, expected: torch.Tensor, allowed: float) -> bool:
    """Largest difference of each step; [steps, V] both."""
    worst = (actual - expected).abs().amax(-1)
    ok = bool((worst <= allowed).all())  # False for NaN as well
    print(
        f"logits:  {label}: differ by at most {worst.max():.1e}, median step {worst.median():.1e}"
        f" ({'within' if ok else 'MORE THAN'} the {allowed:g} allowed)"
    )
    return ok


@torch.inference_mode()
def main() -> int:
    args = parse_args()
    logging.disable_progress_bar()
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = tri_mpk.from_pretrained(CHECKPOINT, device=args.device, progress=False)
    model.compile()
    describe(model)
    print(f"ready after {time.perf_counter() - started:.1f} s\n")

    input_ids = tokenizer(args.prompt, return_tensors="pt").input_ids.to(model.device)
    started = time.perf_counter()
    tokens = model.generate(input_ids, max_new_tokens=args.max_new_tokens, streamer=TextStreamer(tokenizer))
    seconds = time.perf_counter() - started
    last_logits = model.kernel.runtime.default_logits.clone()
    num_launches = model.kernel.runtime.num_launches
    num_new = tokens.shape[1] - input_ids.shape[1]
    print(f"\n{input_ids.shape[1]} + {num_new} tokens, {num_launches} launch, {seconds:.2f} s")

    reference = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, attn_implementation="eager")
    reference = reference.to(model.device)
    expected = reference.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=None,
        max_length=None,
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
    )
    processed = tokens[:, :-1]  # the last token was chosen, not read
    expected_logits = reference(processed).logits[0].float()
    num_checked = processed.shape[1] if model.device.type == "cuda" else min(CPU_STEPS_CHECKED, processed.shape[1])
    logits = model(processed[:, :num_checked]).logits[0]
    allowed = MAX_LOGIT_DIFFERENCE[model.dtype]
    print("\nagainst transformers (fp32, eager):")
    passed = [
        compare_tokens(tokens[0].tolist(), expected[0].tolist()),
        compare_logits("last step of that launch", last_logits[None], expected_logits[-1:], allowed),
        compare_logits(f"first {num_checked} steps, one more launch", logits, expected_logits[:num_checked], allowed),
        num_launches == 1,
    ]
    print("PASSED" if all(passed) else "FAILED")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
