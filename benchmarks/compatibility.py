"""Which model families of transformers work, tried on small random models of each.

Every family that transformers maps to a causal or a sequence-to-sequence model is built from a
small config. `refused` is a clear error when the model is loaded; `not built` are families whose
config needs more than sizes.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from rich.progress import track
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from controlprefix import ControlPrefix, Example, Prefix, Request, UnsupportedModelError

from lib.models import load
from lib.results import arguments, save
from lib.tables import header, line

CHECKS = ("generate", "mixed batch", "running batch", "stream", "score", "train", "text prefix")
# By name of a config's setting; those that a config does not have are left out.
SIZES: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "n_inner": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "attn_layer_indices": [1, 3],
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "rotary_dim": 8,
    "mamba_d_ssm": 64,
    "vocab_size_per_layer_input": 49152,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "input_embedding_size": 32,
    "output_embedding_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "is_decoder": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "decoder_start_token_id": 2,
}
# Sizes of encoders of images and sounds, in configs that have them.
ENCODER_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": 32,
    "embed_dim": 32,
    "projection_dim": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "d_model": 32,
}
# Some configs compute these, or want them to fit other settings: the first choice that builds.
_LEFT_OUT: tuple[tuple[str, ...], ...] = (
    (),
    ("head_dim", "v_head_dim"),
    ("num_hidden_layers", "num_layers", "n_layer"),
    ("head_dim", "v_head_dim", "num_attention_heads", "num_key_value_heads"),
    ("head_dim", "v_head_dim", "num_hidden_layers"),
)
_MAX_PARAMETERS = 20_000_000
SETTINGS: dict[str, Any] = {"num_slots": 2, "steps": 2, "batch_size": 2, "validation": 0.0}


def sizes_of(config_class: Any, left_out: Sequence[str] = ()) -> dict[str, Any]:
    """Small sizes for the settings that a config and those inside it have."""
    defaults = config_class()
    sizes = {n: v for n, v in SIZES.items() if n not in left_out and hasattr(defaults, n)}
    for name, inner_class in config_class.sub_configs.items():
        inner = getattr(defaults, name, None)
        inner = inner_class() if inner is None and inner_class is not AutoConfig else inner
        if inner is None:
            continue
        if any(word in name for word in ("text", "decoder", "llm")):
            own = sizes_of(type(inner), left_out)
        else:
            own = {n: value for n, value in ENCODER_SIZES.items() if hasattr(inner, n)}
        sizes[name] = {"model_type": inner.model_type, **own}
    if "kv_lora_rank" in sizes:  # latent attention, whose head sizes are its own
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = SIZES["num_attention_heads"]
    return sizes


def small_config(config_class: Any, auto: Any) -> PreTrainedConfig:
    """A config of a family whose model is small.

    Raises:
        Exception: If none can be built of sizes alone.
    """
    reason: Exception = ValueError("there is nothing to try")
    for left_out in _LEFT_OUT:
        try:
            config: PreTrainedConfig = config_class(**sizes_of(config_class, left_out))
            with torch.device("meta"):
                parameters = auto.from_config(config).parameters()
                num_parameters = sum(p.numel() for p in parameters)
        except Exception as error:
            reason = error
            continue
        if num_parameters <= _MAX_PARAMETERS:
            return config
        reason = ValueError(f"{num_parameters:,} parameters at these sizes")
    raise reason


def build(config_class: Any, auto: Any) -> PreTrainedModel:
    """A small random model of a family."""
    config: Any = small_config(config_class, auto)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = SIZES["decoder_start_token_id"]
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not config.is_encoder_decoder:
                parameter.mul_(3)  # so that attention matters
    return model.eval()


def check(model: PreTrainedModel, tokenizer: Any) -> dict[str, str]:
    """The outcome of each check, or of loading."""
    cp = ControlPrefix.from_pretrained(model, tokenizer=tokenizer, store="sqlite://")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    cp.put("user", "ana", Prefix.random(cp.geometry, num_slots=3, scale=1.0, seed=0))
    plain = Request(prompt="Hello there my friend", raw=True, max_new_tokens=4)
    steered = Request(prompt="Hi", raw=True, max_new_tokens=4, user="ana")
    examples = [
        Example(prompt=text, raw=True, completion="fine", user="ana") for text in ("a", "b c d")
    ]
    alone = [result.text for result in (cp.generate(plain), cp.generate(steered))]

    def running_batch() -> bool:
        batcher = cp.batcher()
        try:
            tickets = [batcher.submit(cp.resolve(request)) for request in (plain, steered)]
            return [ticket.result().text for ticket in tickets] == alone
        finally:
            batcher.close()

    def score() -> bool:
        together = cp.score(examples)
        each = [cp.score([example])[0] for example in examples]
        pairs = zip(together, each, strict=True)
        return all(abs(a.log_likelihood - b.log_likelihood) < 1e-3 for a, b in pairs)

    def train() -> bool:
        before = cp.get("user", "ana").digest
        cp.train(examples, learn="user", progress=False, **SETTINGS)
        same = all(torch.equal(value, weights[k]) for k, value in model.state_dict().items())
        return same and cp.get("user", "ana").digest != before

    tests: dict[str, Callable[[], Any]] = {
        "generate": lambda: True,
        "mixed batch": lambda: [r.text for r in cp.generate([plain, steered])] == alone,
        "running batch": running_batch,
        "stream": lambda: ["".join(cp.stream(r)) for r in (plain, steered)] == alone,
        "score": score,
        "train": train,
        "text prefix": lambda: "exact" if cp.prefix_from_text("Be kind").is_exact else "start",
    }
    outcomes = {}
    for name, test in tests.items():
        try:
            outcome = test()
            outcomes[name] = outcome if isinstance(outcome, str) else "ok" if outcome else "differs"
        except Exception as error:
            outcomes[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return outcomes


def try_family(config_class: type, auto: Any, tokenizer: Any) -> dict[str, str]:
    """The outcomes of a family: of the checks, or why there are none."""
    try:
        model = build(config_class, auto)
    except Exception as error:
        return {"not built": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
    try:
        return check(model, tokenizer)
    except UnsupportedModelError as error:
        return {"refused": str(error).splitlines()[0]}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:120]}


def page(results: dict[str, Any]) -> str:
    """The outcomes as a table."""
    machine, families = results["machine"], results["families"]
    works, refused, unbuilt = [], [], []
    for name, outcomes in families.items():
        if "refused" in outcomes:
            refused.append(line(name, outcomes["refused"]))
        elif "not built" in outcomes:
            unbuilt.append(name)
        else:
            failure = outcomes.get("failed", "")
            works.append(line(name, *(outcomes.get(key, failure) for key in CHECKS)))
    return "\n\n".join(
        [
            "# Model families",
            f"Small random models of every family, with transformers {machine['transformers']} and "
            f"torch {machine['torch']}; `{results['command']}` at commit {results['commit']}, "
            f"{results['date']}.",
            "`mixed batch`, `running batch` and `stream` are ok if each row has the text that it "
            "has alone; `score` if each row has the score that it has alone; `train` if the prefix "
            "changed and no weight did. A `text prefix` is exact where attending to it equals "
            "prompting with the text; elsewhere it is a start for training.",
            "\n".join([header("family", *CHECKS), *works]),
            "## Refused when loaded, with the reason",
            "\n".join([header("family", "reason"), *refused]),
            "## Not tried",
            "These need more than sizes to be built small: " + ", ".join(unbuilt) + ".",
        ]
    )


@contextlib.contextmanager
def _quiet_and_single_threaded() -> Iterator[None]:
    """Hide what models print, warn and log, with one thread for tiny tensors.

    All of it is undone: tests run this in their own process.
    """
    verbosity, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(action="ignore"),
    ):
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
            torch.set_num_threads(threads)
            transformers.logging.set_verbosity(verbosity)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--families", nargs="*", help="only these")
    options = parser.parse_args(argv)
    tokenizer = load("tiny").tokenizer
    tokenizer.chat_template = None
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    mappings = [
        (AutoModelForCausalLM, causal),
        (AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ]
    families: dict[str, dict[str, str]] = {}
    for auto, names in mappings:
        for name in track([n for n in names if options.families is None or n in options.families]):
            config_class = transformers.CONFIG_MAPPING[name]
            title = name if auto is AutoModelForCausalLM else f"{name} (encoder-decoder)"
            with _quiet_and_single_threaded():
                families[title] = try_family(config_class, auto, tokenizer)
    save(options.results, "compatibility", {"families": dict(sorted(families.items()))}, page)


if __name__ == "__main__":
    main()
