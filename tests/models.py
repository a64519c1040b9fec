"""Small random models, built from a config, and a tokenizer of bytes."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 300
DEVICE = "cpu"  # of the models that are built; `pytest --device` sets it

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

_TINY = {**_SMALL, "head_dim": 8}

# Models that look at the name of their attention, or at positions outside rotary attention.
PARTICULAR: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma4": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            **_TINY,
            "num_hidden_layers": 6,
            "sliding_window": 64,
            "global_head_dim": 16,
            "num_global_key_value_heads": 2,
            "num_kv_shared_layers": 3,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": VOCAB,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        },
    ),
    "deepseek_v32": (
        "DeepseekV32ForCausalLM",
        "DeepseekV32Config",
        {
            **_SMALL,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "index_topk": 3,  # sparse from the fourth token
            "index_head_dim": 16,
            "index_n_heads": 2,
        },
    ),
    "ministral3": ("Ministral3ForCausalLM", "Ministral3Config", _TINY),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_TINY, "sliding_window": 6}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_TINY, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6},
    ),
}

# Models with recurrent layers, or recurrent and attention in one layer.
RECURRENT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **_TINY,
            "num_hidden_layers": 4,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {
            **_SMALL,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
    ),
}

_SMALL_ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "decoder_start_token_id": 0,  # tied weights favour repeating it, and 1 is the end
}

# An encoder-decoder whose decoder counts its positions itself.
STATIC: dict[str, tuple[str, str, dict[str, Any]]] = {
    "m2m_100": (
        "M2M100ForConditionalGeneration",
        "M2M100Config",
        {**_SMALL_ENCODER_DECODER, "decoder_layers": 2, "decoder_attention_heads": 4},
    ),
}

# name -> (model class, config class, config values)
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _SMALL),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_SMALL, "head_dim": 16}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_SMALL, "sliding_window": 6}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **_SMALL,
            "head_dim": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 256,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        },
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 32,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        },
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **_SMALL_ENCODER_DECODER,
            "decoder_layers": 4,
            "decoder_attention_heads": 2,
            "forced_eos_token_id": None,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 3,
            "num_heads": 4,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "decoder_start_token_id": 2,
        },
    ),
}
ROTARY = ("llama", "qwen3", "mistral", "gemma3", "gpt_neox")
DECODER_ONLY = (*ROTARY, "gpt2", "opt")
ENCODER_DECODER = ("bart", "t5")
ALL = (*DECODER_ONLY, *ENCODER_DECODER)


def build(
    name: str,
    *,
    seed: int = 0,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> PreTrainedModel:
    """A random model whose attention matters: weights are larger than at initialization."""
    model_class, config_class, values = {**CONFIGS, **PARTICULAR, **RECURRENT, **STATIC}[name]
    config = getattr(transformers, config_class)(**copy.deepcopy({**values, **changes}))
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model: Any = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1 if name == "t5" else 4)  # T5 starts large, and is chaotic beyond
    frozen: PreTrainedModel = model.to(DEVICE, dtype).eval().requires_grad_(False)
    return frozen


def byte_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """Each byte a token (ids 3 to 258), after bos 0, eos 1 and pad 2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1, "<pad>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    inner = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<s>assistant: {% endif %}"
        )
    return tokenizer


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama 2's: `▁` for spaces, one in front of a text, and bytes for the rest."""
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁the", "▁a", "()", "\n"]
    names = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    inner = Tokenizer(
        tokenizer_models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """Like BERT's: words, `##` for what continues one, and spaces cleaned up in decoding."""
    words = [*"abcdefghijklmnopqrstuvwxyz.,!?'", "do", "n", "t", "we", "re", "n't", "hello"]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words, *(f"##{word}" for word in words)]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    inner = Tokenizer(tokenizer_models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="[CLS]",
        eos_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        clean_up_tokenization_spaces=True,
    )


def chat_tokenizer(change: Callable[[str], str] = str) -> PreTrainedTokenizerFast:
    """The byte tokenizer with a changed chat template."""
    tokenizer = byte_tokenizer(chat=True)
    template = tokenizer.chat_template
    assert isinstance(template, str)
    tokenizer.chat_template = change(template)
    return tokenizer
