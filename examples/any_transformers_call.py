"""Steer calls that are transformers' own: beam search, sampling, a plain forward pass.

Run it with `python examples/any_transformers_call.py`.
"""

import torch

from controlprefix import ControlPrefix, Request


def main(cp: ControlPrefix) -> None:
    """A text becomes a prefix exactly; inside `assembled` every call attends to it."""
    cp.put("attribute", "tone=pirate", cp.prefix_from_text("You are a pirate. Arr, matey!"))
    request = Request(prompt="-", attributes={"tone": "pirate"}, strengths={"tone": 1.5})
    inputs = cp.tokenizer(["The weather today", "My favourite food"], return_tensors="pt")
    with cp.assembled([request, Request(prompt="-")]):  # row 0 is steered, row 1 is not
        beams = cp.model.generate(  # type: ignore[operator]  # stubs: Tensor | Module
            **inputs, num_beams=3, max_new_tokens=12, pad_token_id=cp.tokenizer.eos_token_id
        )
        with torch.no_grad():
            logits = cp.model(**inputs).logits
    for text in cp.tokenizer.batch_decode(beams, skip_special_tokens=True):
        print(text)
    print("logits", tuple(logits.shape))


if __name__ == "__main__":
    main(ControlPrefix.from_pretrained("smollm2", tenant="examples"))
