"""Checkpoints as the original code of Prefix-Tuning and Control Prefixes writes them."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from controlprefix import GeometryMismatchError, PrefixFormatError, Request
from controlprefix.prefixes import PrefixKey
from controlprefix.prefixes.original_files import read_original

from helpers import engine

TASK_SLOTS, LABEL_SLOTS = 4, 2
CATEGORIES = {"sources": 3, "cats": 2}


class Original(nn.Module):
    """The modules of the original code, with its names, and its keys and values."""

    def __init__(self, config: Any, with_encoder: bool = True, num_hidden: int = 1) -> None:
        super().__init__()
        self.size = getattr(config, "d_model", None) or config.hidden_size
        self.heads = getattr(config, "num_heads", None) or config.num_attention_heads
        self.num_layers = getattr(config, "decoder_layers", None) or config.num_hidden_layers
        kinds = ("", "2", "_enc") if with_encoder else ("",)
        for kind in kinds:
            self.add_module(f"wte{kind}", nn.Embedding(TASK_SLOTS, self.size))
            layers: list[nn.Module] = [nn.Linear(self.size, 16), nn.Tanh()]
            layers += [nn.Linear(16, 16), nn.Tanh()] * (num_hidden - 1)
            layers += [nn.Linear(16, self.num_layers * 2 * self.size)]
            self.add_module(f"control_trans{kind}", nn.Sequential(*layers))
        self.M_Prefixes = nn.ModuleDict()
        if with_encoder:
            for name, count in CATEGORIES.items():
                for kind in ("", "2_", "enc_"):
                    embedding = nn.Embedding(LABEL_SLOTS * count, self.size)
                    self.M_Prefixes[f"wte_{kind}{name}"] = embedding

    def keys_and_values(self, kind: str, embeddings: Tensor) -> tuple[Tensor, ...]:
        """Per layer, keys and values `(2, 1, heads, slots, head_dim)`, as that code reshapes."""
        values = getattr(self, f"control_trans{kind}")(embeddings)[None]
        shape = (1, values.shape[1], self.num_layers * 2, self.heads, self.size // self.heads)
        return tuple(values.view(*shape).permute([2, 0, 3, 1, 4]).split(2))


def write(original: Original, path: Path, **extra: Any) -> Path:
    state = {f"model.{name}": value for name, value in original.state_dict().items()}
    torch.save({"state_dict": state, **extra}, path)
    return path


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("num_hidden", [1, 2])
def test_keys_and_values_are_those_of_the_original(
    name: str, num_hidden: int, tmp_path: Path
) -> None:
    # That code has as many layers and heads in the encoder as in the decoder.
    equal: dict[str, Any] = {"encoder_layers": 4, "decoder_attention_heads": 4}
    cp = engine(name, **(equal if name == "bart" else {}))
    torch.manual_seed(0)
    original = Original(cp.model.config, num_hidden=num_hidden)
    path = write(original, tmp_path / "last.ckpt")
    labels = {"sources": ["a", "b", "c"], "cats": ["x", "y"]}
    prefixes = read_original(path, cp.geometry, task="webnlg", labels=labels)
    assert set(prefixes) == {
        PrefixKey("task", "webnlg"),
        *(PrefixKey.for_label("sources", label) for label in "abc"),
        *(PrefixKey.for_label("cats", label) for label in "xy"),
    }
    sites: dict[Any, tuple[str, str]] = {
        "decoder": ("", ""), "cross": ("2", "2_"), "encoder": ("_enc", "enc_"),
    }  # fmt: skip
    for site, (kind, label_kind) in sites.items():
        task = original.keys_and_values(kind, original.get_submodule(f"wte{kind}").weight)  # type: ignore[arg-type]
        rows = original.M_Prefixes[f"wte_{label_kind}sources"].weight[2:4]  # type: ignore[index]
        second = original.keys_and_values(kind, rows)
        for i in range(original.num_layers):
            for prefix, expected in (
                (prefixes[PrefixKey("task", "webnlg")], task[i]),
                (prefixes[PrefixKey.for_label("sources", "b")], second[i]),
            ):
                keys, values = prefix.layer(site, i)
                torch.testing.assert_close(keys, expected[0, 0])
                torch.testing.assert_close(values, expected[1, 0])
    assert all(prefix.is_exact for prefix in prefixes.values())


def test_a_t5_with_them_gives_the_originals_logits(tmp_path: Path) -> None:
    """Its attention has no bias at slots, and its mask shows them to every token."""
    cp = engine("t5")
    torch.manual_seed(1)
    original = Original(cp.model.config)
    saved = cp.import_original(
        write(original, tmp_path / "last.ckpt", hyper_parameters={"m_prefix_len": LABEL_SLOTS}),
        task="webnlg",
    )
    assert len(saved) == 6
    assert set(saved.values()) == {1}
    request = Request(prompt="x", task="webnlg", attributes={"sources": "1", "cats": "0"})
    ids, decoder_ids = torch.tensor([[5, 9, 17, 3]]), torch.tensor([[0, 4, 8]])
    with torch.no_grad():
        expected = reference_logits(cp.model, original, ids, decoder_ids)
        with cp.assembled(request):
            actual = cp.model(input_ids=ids, decoder_input_ids=decoder_ids).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def reference_logits(model: Any, original: Original, ids: Tensor, decoder_ids: Tensor) -> Tensor:
    """T5 written out as the original's modified model computes it."""

    def slots(kind: str, label_kind: str) -> tuple[Tensor, ...]:
        embeddings = [
            original.M_Prefixes[f"wte_{label_kind}cats"].weight[:LABEL_SLOTS],  # type: ignore[index]
            original.M_Prefixes[f"wte_{label_kind}sources"].weight[LABEL_SLOTS : 2 * LABEL_SLOTS],  # type: ignore[index]
            original.get_submodule(f"wte{kind}").weight,
        ]
        return original.keys_and_values(kind, torch.cat(embeddings))  # type: ignore[arg-type]

    def attend(
        module: Any, x: Tensor, memory: Tensor, prefix: Tensor, bias: Tensor, causal: bool
    ) -> Tensor:
        heads, size = module.n_heads, module.key_value_proj_dim

        def split(values: Tensor) -> Tensor:
            return values.view(1, -1, heads, size).transpose(1, 2)

        q, k, v = split(module.q(x)), split(module.k(memory)), split(module.v(memory))
        num_slots = prefix.shape[3]
        k, v = torch.cat([prefix[0], k], 2), torch.cat([prefix[1], v], 2)
        bias = torch.cat([bias.new_zeros(1, heads, x.shape[1], num_slots), bias], 3)
        scores = q @ k.transpose(2, 3) + bias
        if causal:
            later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
            scores[..., num_slots:] = scores[..., num_slots:].masked_fill(later, -1e30)
        result = scores.softmax(-1) @ v
        return module.o(result.transpose(1, 2).reshape(1, -1, heads * size))

    def bias_of(module: Any, length: int) -> Tensor:
        return module.compute_bias(length, length, device=torch.device("cpu"))

    encoder, decoder = model.encoder, model.decoder
    x = encoder.embed_tokens(ids)
    first = encoder.block[0].layer[0].SelfAttention
    bias = bias_of(first, ids.shape[1])
    for block, prefix in zip(encoder.block, slots("_enc", "enc_"), strict=True):
        layer = block.layer[0]
        normed = layer.layer_norm(x)
        x = x + attend(layer.SelfAttention, normed, normed, prefix, bias, causal=False)
        x = block.layer[1](x)
    memory = encoder.final_layer_norm(x)
    y = decoder.embed_tokens(decoder_ids)
    bias = bias_of(decoder.block[0].layer[0].SelfAttention, decoder_ids.shape[1])
    both = zip(decoder.block, slots("", ""), slots("2", "2_"), strict=True)
    for block, own, cross in both:
        layer = block.layer[0]
        normed = layer.layer_norm(y)
        y = y + attend(layer.SelfAttention, normed, normed, own, bias, causal=True)
        layer = block.layer[1]
        zero = y.new_zeros(1, layer.EncDecAttention.n_heads, y.shape[1], memory.shape[1])
        normed = layer.layer_norm(y)
        y = y + attend(layer.EncDecAttention, normed, memory, cross, zero, causal=False)
        y = block.layer[2](y)
    y = decoder.final_layer_norm(y)
    if model.config.tie_word_embeddings:
        y = y * model.config.d_model**-0.5
    return model.lm_head(y)


def test_a_gpt2_checkpoint_is_a_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cp = engine("gpt2")
    path = tmp_path / "pytorch_model.bin"
    torch.save(Original(cp.model.config, with_encoder=False).state_dict(), path)
    assert cp.import_original(path, task="e2e") == {"task 'e2e'": 1}
    assert "only a start for training" in caplog.text
    (prefix,) = read_original(path, cp.geometry, task="e2e").values()
    assert prefix.is_exact is False
    with pytest.raises(GeometryMismatchError, match="has prefixes for: decoder; model"):
        read_original(path, engine("t5").geometry, task="e2e")


def test_other_checkpoints_and_wrong_labels_are_refused(tmp_path: Path) -> None:
    cp = engine("t5")
    path = write(Original(cp.model.config), tmp_path / "last.ckpt")
    for labels, message in (
        ({}, "does not say how many labels"),
        ({"tone": ["a"]}, "labels names tone; the checkpoint has: sources, cats"),
        ({"sources": list("abcde"), "cats": list("xy")}, "5 labels of 'sources' do not divide"),
    ):
        with pytest.raises(PrefixFormatError, match=message):
            read_original(path, cp.geometry, task="t", labels=labels)
    torch.save({"state_dict": {"lm_head.weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(PrefixFormatError, match=r"no tensor control_trans.0.weight"):
        read_original(tmp_path / "other.ckpt", cp.geometry, task="t")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(PrefixFormatError, match="no file of torch.save"):
        read_original(tmp_path / "text.ckpt", cp.geometry, task="t")
    arguments = argparse.Namespace(m_prefix_len=LABEL_SLOTS)
    path = write(Original(cp.model.config), tmp_path / "n.ckpt", hyper_parameters=arguments)
    assert len(read_original(path, cp.geometry, task="t")) == 6
    with pytest.raises(GeometryMismatchError, match="load the model that it was trained for"):
        read_original(path, engine("t5", num_layers=1, num_decoder_layers=1).geometry, task="t")
