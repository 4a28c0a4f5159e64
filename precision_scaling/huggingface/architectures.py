"""Which Hugging Face decoders are ours: what their config.json says in our options, and their tensors as views of ours.

Pure functions between the files (`directory`) and the decoder (`model`); each serves reading and writing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from precision_scaling.errors import UserError
from precision_scaling.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A family of decoders, by what it has in common.

    norms: names of a layer's norms of attention and of the MLP. epsilon: of the norms where config.json has none.
    head_dim: whether config.json can give a head dimension other than hidden_size / num_attention_heads, and its
    default (0: that quotient); None where it cannot.
    """

    model_type: str
    norm_placement: str
    norm_type: str
    qk_norm: str
    norms: tuple[str, str]
    epsilon: float
    head_dim: int | None


_PRE = ("input_layernorm", "post_attention_layernorm")
_POST = ("post_attention_layernorm", "post_feedforward_layernorm")
# By the name in config.json's `architectures`.
ARCHITECTURES = {
    "OlmoForCausalLM": Architecture("olmo", "pre", "layer", "none", _PRE, 1e-5, None),
    "Olmo2ForCausalLM": Architecture("olmo2", "post", "rms", "projection", _POST, 1e-5, None),
    "LlamaForCausalLM": Architecture("llama", "pre", "rms", "none", _PRE, 1e-6, 0),
    "Qwen3ForCausalLM": Architecture("qwen3", "pre", "rms", "head", _PRE, 1e-6, 128),
}
# Keys that change what a model computes, with the only value that our decoder computes; absent is that value, too.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "clip_qkv": None,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def model_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `config.model` (and fields of `ModelConfig` of the same names) that a config.json describes.

    Raises UserError for an architecture or an option that our decoder does not have, naming key, value and allowed.
    """
    name = (config.get("architectures") or [None])[0]
    if name not in ARCHITECTURES:
        raise _refused("architectures", name, f"one of {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    for key, only in _ONLY.items():
        if config.get(key, only) != only:
            raise _refused(key, config[key], f"{only!r}, or the key left out")
    layer_types = set(config.get("layer_types") or ())
    if layer_types - {"full_attention"}:
        raise _refused("layer_types", sorted(layer_types), "full_attention for every layer")

    def count(key: str, default: int | None = None) -> int:
        value = config.get(key) or default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _refused(key, config.get(key), "a whole number from 1")
        return value

    width, heads = count("hidden_size"), count("num_attention_heads")
    kv_heads, head_dim = count("num_key_value_heads", heads), count("head_dim", architecture.head_dim or width // heads)
    if heads % kv_heads:
        raise _refused("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
    if head_dim % 2:
        raise _refused("head_dim", head_dim, "an even number")
    epsilon = architecture.epsilon
    if architecture.norm_type == "rms":
        epsilon = config.get("rms_norm_eps", epsilon)
    return {
        "vocab_size": count("vocab_size"),
        "width": width,
        "depth": count("num_hidden_layers"),
        "heads": heads,
        "hidden": count("intermediate_size"),
        "kv_heads": 0 if kv_heads == heads else kv_heads,
        "head_width": 0 if head_dim * heads == width else head_dim,
        "rope_theta": _rope_theta(config),
        "norm_epsilon": float(epsilon),
        "norm_placement": architecture.norm_placement,
        "norm_type": architecture.norm_type,
        "qk_norm": architecture.qk_norm,
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def longest_sequence(config: Mapping[str, Any]) -> int | None:
    """Positions that a config.json allows; None where it does not say."""
    return config.get("max_position_embeddings")


def _rope_theta(config: Mapping[str, Any]) -> float:
    """Base of the wavelengths; older config.json have it at the top, newer ones in rope_parameters."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise _refused(key, dict(rope), "none, or rope_type 'default'")
    return float((config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta", 10_000.0)))


def _refused(key: str, value: object, allowed: str) -> UserError:
    return UserError(f"config.json: {key} = {value!r}: allowed is {allowed}")


def architecture_of(model: ModelConfig) -> str:
    """The name of the architecture that computes what our decoder does. UserError where there is none."""
    wanted = (model.norm_placement, model.norm_type, model.qk_norm)
    known = {(a.norm_placement, a.norm_type, a.qk_norm): name for name, a in ARCHITECTURES.items()}
    if wanted not in known:
        allowed = "; ".join(f"{', '.join(key)} ({name})" for key, name in known.items())
        raise UserError(
            f"model.norm_placement, norm_type, qk_norm = {', '.join(wanted)}: no Hugging Face architecture has that; "
            f"allowed is {allowed}"
        )
    name = known[wanted]
    if model.head_width and ARCHITECTURES[name].head_dim is None:
        raise UserError(f"model.head_width = {model.head_width}: allowed is width / heads for {name}")
    if model.norm_type == "layer" and model.norm_epsilon != ARCHITECTURES[name].epsilon:
        raise UserError(
            f"model.norm_epsilon = {model.norm_epsilon}: allowed is {ARCHITECTURES[name].epsilon} for {name}"
        )
    return name


def config_json(model: ModelConfig, **more: Any) -> dict[str, Any]:
    """The config.json of a decoder whose depth-µP multipliers are 1; `more` adds keys."""
    name = architecture_of(model)
    own = {} if ARCHITECTURES[name].head_dim is None else {"head_dim": model.head_dim}
    return {
        "architectures": [name],
        "model_type": ARCHITECTURES[name].model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.hidden,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_heads,
        **own,
        "hidden_act": "silu",
        "max_position_embeddings": model.sequence_length,
        "rope_theta": model.rope_theta,
        **({"rms_norm_eps": model.norm_epsilon} if model.norm_type == "rms" else {}),
        "attention_bias": False,
        "tie_word_embeddings": model.tie_embeddings,
        **more,
    }


def views(model: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint by its name, as a view of our parameters: what is written to it is written to them.

    params: those of `model`, NumPy arrays. A projection is (out, in) there and (in, out) here; rotary embeddings turn
    the same halves of each head.
    """
    layers, found = params["layers"]["block"], {"model.embed_tokens.weight": params["embedding"]["embedding"]}
    norms = ARCHITECTURES[architecture_of(model)].norms
    q, kv = model.heads * model.head_dim, model.key_heads * model.head_dim
    for i in range(model.depth):
        qkv = layers["attention"]["qkv"]["kernel"][i].reshape(model.width, -1)
        gate_up = layers["mlp"]["gate_up"]["kernel"][i].reshape(model.width, -1)
        layer = {
            "self_attn.q_proj": qkv[:, :q].T,
            "self_attn.k_proj": qkv[:, q : q + kv].T,
            "self_attn.v_proj": qkv[:, q + kv :].T,
            "self_attn.o_proj": layers["attention"]["out"]["kernel"][i].T,
            "mlp.gate_proj": gate_up[:, : model.hidden].T,
            "mlp.up_proj": gate_up[:, model.hidden :].T,
            "mlp.down_proj": layers["mlp"]["down"]["kernel"][i].T,
        }
        if model.norm_type == "rms":
            layer |= {
                name: layers[own]["scale"][i] for name, own in zip(norms, ("attention_norm", "mlp_norm"), strict=True)
            }
        if model.qk_norm != "none":
            layer |= {f"self_attn.{name}": layers["attention"][name]["scale"][i] for name in ("q_norm", "k_norm")}
        found |= {f"model.layers.{i}.{name}.weight": view for name, view in layer.items()}
    if model.norm_type == "rms":
        found["model.norm.weight"] = params["final_norm"]["scale"]
    if not model.tie_embeddings:
        found["lm_head.weight"] = params["head"]["kernel"].T
    return found


def standardized(model: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """The same function without depth-µP's multipliers, which other code does not have: they go into the weights.

    params: NumPy arrays; returns new ones where something changes. A tied head with a multiplier is untied.
    """
    plain = dataclasses.replace(model, base_width=model.width, base_depth=model.depth)
    block, scale = params["layers"]["block"], np.float32(model.residual_scale)
    if scale != 1:
        if model.norm_placement == "pre":
            attention, mlp = block["attention"], block["mlp"]
            attention = {**attention, "out": {"kernel": attention["out"]["kernel"] * scale}}
            block = {**block, "attention": attention, "mlp": {**mlp, "down": {"kernel": mlp["down"]["kernel"] * scale}}}
        elif model.norm_type == "rms":
            gains = {name: {"scale": block[name]["scale"] * scale} for name in ("attention_norm", "mlp_norm")}
            block = {**block, **gains}
        params = {**params, "layers": {"block": block}}
    if model.logit_scale != 1:
        kernel = params["embedding"]["embedding"].T if model.tie_embeddings else params["head"]["kernel"]
        params = {**params, "head": {"kernel": np.ascontiguousarray(kernel * np.float32(model.logit_scale))}}
        plain = dataclasses.replace(plain, tie_embeddings=False)
    return plain, params
