"""Prefixes for labels that have none, distilled when a request first names them."""

import threading
import time

from controlprefix.engine.arguments import checks_method_arguments
from controlprefix.engine.feedback import FeedbackMethods
from controlprefix.example import Example
from controlprefix.inference.resolver import Resolver
from controlprefix.prefixes import PrefixKey
from controlprefix.training.distillation import with_instruction

_PROMPTS = ("Write a sentence.", "Write something.", "Say something.", "What is new?")
_NUM_ROWS, _BATCH_SIZE = 24, 8
_NUM_SLOTS = 8
_NEW_TOKENS = 32
_MIN_STEPS, _MAX_STEPS = 4, 40
_PASSES_PER_STEP = 4.0  # duration of a training step, in passes without gradients
_lock = threading.Lock()  # one label at a time in a process: training takes all of a machine


@checks_method_arguments
class OnDemandMethods(FeedbackMethods):
    """What `unseen="distill"` does.

    Attributes:
        distill_timeout_s: Approximate time limit per label, in seconds.
    """

    distill_timeout_s: float = 60.0

    def _use_resolver(self, resolver: Resolver) -> None:
        super()._use_resolver(resolver)
        resolver.distill = self._distill_label

    def _distill_label(self, key: PrefixKey, description: str) -> None:
        """Store a prefix that does what a description says, unless there is one already.

        Args:
            key: The label under which it is stored.
            description: A sentence.
        """
        with _lock:
            if self._model_store.exists(key):
                return
            deadline = time.monotonic() + self.distill_timeout_s
            bare = type(self)(self._frozen, self.store)  # a space does not have such labels
            instruction = f"{description} Write accordingly."
            prompts = [_PROMPTS[i % len(_PROMPTS)] for i in range(_NUM_ROWS)]
            requests = bare._teacher_requests(instruction, prompts, _NEW_TOKENS, seed=0)
            texts = [
                completion.text if completion.text.strip() else "."
                for completion in bare.generate(requests)
            ]
            rows = [
                Example(prompt=with_instruction(instruction, prompt), completion=text)
                for prompt, text in zip(prompts[:_BATCH_SIZE], texts, strict=False)
            ]
            start = time.monotonic()
            bare.score(rows, batch_size=_BATCH_SIZE)
            step_seconds = _PASSES_PER_STEP * (time.monotonic() - start)
            num_steps = (deadline - time.monotonic()) / max(step_seconds, 1e-6)
            bare.distill(
                instruction,
                prompts,
                attribute=key.attribute,
                label=key.label,
                completions=texts,
                num_slots=_NUM_SLOTS,
                steps=round(min(max(num_steps, _MIN_STEPS), _MAX_STEPS)),
                batch_size=_BATCH_SIZE,
                validation=0,
                progress=False,
            )
