"""Which Hugging Face decoders are ours, and their tensors as views of our parameters.

Pure functions between the files (`directory`) and the decoder (`model`); each serves reading and writing. What a
config.json says is read in `config_json`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from precision_scaling.errors import UserError
from precision_scaling.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A family of decoders: what its members have in common, and its defaults where they are not those of all.

    epsilon: of the norms where config.json has none. qkv_bias: q, k and v have biases. kv_heads: heads of keys where it
    has none; 0 is num_attention_heads. head_dim: head dimension where it has none; 0 is hidden_size /
    num_attention_heads. theta: base of the rotary embedding where it has none. window: "none", "all" (sliding_window
    counts for every layer), "used" (where use_sliding_window is true) or "layers" (where layer_types says so, by
    default three layers of four).
    """

    model_type: str
    norm_placement: str
    norm_type: str
    qk_norm: str
    epsilon: float
    qkv_bias: bool = False
    kv_heads: int = 0
    head_dim: int = 0
    theta: float = 10_000.0
    window: str = "none"


# Names of a layer's norms of attention and of the MLP, by their placement.
_NORMS = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
# By the name in config.json's `architectures`. Where two compute the same, a decoder is written as the first.
ARCHITECTURES = {
    "OlmoForCausalLM": Architecture("olmo", "pre", "layer", "none", 1e-5),
    "Olmo2ForCausalLM": Architecture("olmo2", "post", "rms", "projection", 1e-5),
    "Olmo3ForCausalLM": Architecture("olmo3", "post", "rms", "projection", 1e-5, theta=5e5, window="layers"),
    "LlamaForCausalLM": Architecture("llama", "pre", "rms", "none", 1e-6),
    "MistralForCausalLM": Architecture("mistral", "pre", "rms", "none", 1e-6, kv_heads=8, window="all"),
    "Qwen2ForCausalLM": Architecture("qwen2", "pre", "rms", "none", 1e-6, True, kv_heads=32, window="used"),
    "Qwen3ForCausalLM": Architecture("qwen3", "pre", "rms", "head", 1e-6, kv_heads=32, head_dim=128, window="used"),
}
# Their config.json has no key for a head dimension of its own; where one has it all the same, transformers reads it.
_QUOTIENT_ONLY = ("OlmoForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "Qwen2ForCausalLM")


def architecture_of(model: ModelConfig) -> str:
    """The name of the architecture that computes what our decoder does. UserError where there is none."""
    wanted = (model.norm_placement, model.norm_type, model.qk_norm, model.qkv_bias)
    known: dict[tuple[Any, ...], str] = {}
    for name, a in ARCHITECTURES.items():
        known.setdefault((a.norm_placement, a.norm_type, a.qk_norm, a.qkv_bias), name)
    if wanted not in known:
        allowed = "; ".join(f"{', '.join(map(str, key))} ({name})" for key, name in known.items())
        raise UserError(
            f"model.norm_placement, norm_type, qk_norm, qkv_bias = {', '.join(map(str, wanted))}: no Hugging Face "
            f"architecture has that; allowed is {allowed}"
        )
    name = known[wanted]
    if model.head_width and name in _QUOTIENT_ONLY:
        raise UserError(f"model.head_width = {model.head_width}: allowed is width / heads for {name}")
    if model.norm_type == "layer" and model.norm_epsilon != ARCHITECTURES[name].epsilon:
        raise UserError(
            f"model.norm_epsilon = {model.norm_epsilon}: allowed is {ARCHITECTURES[name].epsilon} for {name}"
        )
    return name


class Place(NamedTuple):
    """Where a tensor of a checkpoint is among our parameters.

    shape: in the checkpoint, where a projection is (out, in); it is (in, out) here. path: of our parameter. layer: its
    index there. columns: its outputs, where several projections stand side by side.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    layer: int | None = None
    columns: slice = slice(None)


def places(model: ModelConfig) -> Iterator[Place]:
    """Every tensor of a checkpoint, layer by layer. Nothing is computed ahead: the depth may be anything."""
    embedding, *others = top_places(model)
    yield embedding
    for layer in range(model.depth):
        yield from block_places(model, layer)
    yield from others


def top_places(model: ModelConfig) -> Iterator[Place]:
    """The tensors outside of the blocks, the embedding first."""
    yield Place("model.embed_tokens.weight", (model.vocab_size, model.width), ("embedding", "embedding"))
    if model.norm_type == "rms":
        yield Place("model.norm.weight", (model.width,), ("final_norm", "scale"))
    if not model.tie_embeddings:
        yield Place("lm_head.weight", (model.vocab_size, model.width), ("head", "kernel"))


def block_places(model: ModelConfig, layer: int) -> Iterator[Place]:
    """The tensors of one block."""
    q, kv, width, hidden = model.heads * model.head_dim, model.key_heads * model.head_dim, model.width, model.mlp_width

    def place(name: str, shape: tuple[int, ...], path: str, columns: slice = slice(None)) -> Place:
        return Place(f"model.layers.{layer}.{name}", shape, ("layers", "block", *path.split("/")), layer, columns)

    for name, start, stop in (("q", 0, q), ("k", q, q + kv), ("v", q + kv, q + 2 * kv)):
        columns = slice(start, stop)
        yield place(f"self_attn.{name}_proj.weight", (stop - start, width), "attention/qkv/kernel", columns)
        if model.qkv_bias:
            yield place(f"self_attn.{name}_proj.bias", (stop - start,), "attention/qkv_bias", columns)
    yield place("self_attn.o_proj.weight", (width, q), "attention/out/kernel")
    yield place("mlp.gate_proj.weight", (hidden, width), "mlp/gate_up/kernel", slice(0, hidden))
    yield place("mlp.up_proj.weight", (hidden, width), "mlp/gate_up/kernel", slice(hidden, 2 * hidden))
    yield place("mlp.down_proj.weight", (width, hidden), "mlp/down/kernel")
    if model.norm_type == "rms":
        for name, own in zip(_NORMS[model.norm_placement], ("attention_norm", "mlp_norm"), strict=True):
            yield place(f"{name}.weight", (width,), f"{own}/scale")
    if model.qk_norm != "none":
        for name, size in (("q_norm", q), ("k_norm", kv)):
            size = size if model.qk_norm == "projection" else model.head_dim
            yield place(f"self_attn.{name}.weight", (size,), f"attention/{name}/scale")


def view(params: Any, place: Place) -> np.ndarray:
    """A tensor of a checkpoint as a view of our parameters, NumPy arrays: what is written to it is written to them."""
    for key in place.path:
        params = params[key]
    found = params if place.layer is None else params[place.layer]
    if place.path[-1] == "kernel":
        return found.reshape(found.shape[0], -1)[:, place.columns].T
    return found.reshape(-1)[place.columns] if len(place.shape) == 1 else found


def views(model: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint by its name, as a view of our parameters."""
    return {place.name: view(params, place) for place in places(model)}


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
