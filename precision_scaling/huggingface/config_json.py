"""What a config.json says in our options, and what our decoders say in one.

Every key counts: it is read, or it is known to change nothing, or its value is the only one that our decoder computes,
or it is refused. Defaults and precedence are those of transformers 5.
"""

import math
from collections.abc import Mapping
from typing import Any

from precision_scaling.errors import ConfigError, UserError
from precision_scaling.huggingface import quantization_config
from precision_scaling.huggingface.architectures import ARCHITECTURES, Architecture, architecture_of
from precision_scaling.huggingface.reading import shown
from precision_scaling.model import rope
from precision_scaling.model.config import ModelConfig

_READ = (
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "layer_types"),
    *("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "eos_token_id"),
)
# What has no part in the logits of given tokens.
_NO_EFFECT = (
    # Names and versions.
    *("_name_or_path", "_model_name_or_path", "_commit_hash", "transformers_version", "transformers.js_config"),
    *("tokenizer_class", "unsloth_version", "unsloth_fixed"),
    # Training: dropout, initialization, what is recomputed.
    *("attention_dropout", "initializer_range", "neftune_noise_alpha", "gradient_checkpointing"),
    "use_reentrant_checkpointing",
    # Tokens with other parts to play.
    *("bos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id"),
    *("decoder_start_token_id", "prefix"),
    # How the same is computed: types, parts, what is kept and what is returned besides.
    *("torch_dtype", "dtype", "use_bfloat16", "torchscript", "pretraining_tp", "_attn_implementation_autoset"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    # Heads for other tasks.
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
    # Sampling.
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature", "top_k", "top_p"),
    *("typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id"),
    *("forced_eos_token_id", "remove_invalid_values", "suppress_tokens", "exponential_decay_length_penalty"),
    *("begin_suppress_tokens", "num_beam_groups", "diversity_penalty"),
)
# Keys that change what a model computes, or would, with the only value that our decoder computes; absent is that, too.
_ONLY = {
    "hidden_act": "silu",
    "activation": "swiglu",
    "attention_bias": False,
    "mlp_bias": False,
    "clip_qkv": None,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "use_mrope": False,
    "is_causal": True,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "is_llama_config": True,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
}
# Keys of attention windows by `Architecture.window`.
_WINDOW_KEYS = {
    "none": (),
    "all": ("sliding_window",),
    "used": ("sliding_window", "use_sliding_window", "max_window_layers"),
    "layers": ("sliding_window",),
}
_DEFAULT_WINDOW = 4096
_LAYER_KINDS = ("full_attention", "sliding_attention")


def architecture(config: Mapping[str, Any]) -> tuple[str, Architecture]:
    """Name and family of the model. UserError where it is none of ours."""
    names, allowed = config.get("architectures"), f"a list of one of {', '.join(ARCHITECTURES)}"
    if not isinstance(names, list) or len(names) != 1 or names[0] not in tuple(ARCHITECTURES):
        raise _refused("architectures", names, allowed)
    found = ARCHITECTURES[names[0]]
    if config.get("model_type", found.model_type) != found.model_type:
        raise _refused("model_type", config["model_type"], f"{found.model_type!r} for {names[0]}")
    return names[0], found


def model_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `config.model` (and fields of `ModelConfig` of the same names) that a config.json describes.

    Raises UserError for an architecture, a key or a value that our decoder lacks, naming key, value and allowed.
    """
    name, family = architecture(config)
    _check_keys(config, name, family)
    width, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    kv_heads = _count(config, "num_key_value_heads", family.kv_heads or heads, null=heads)
    quotient = width // heads
    head_dim = _count(config, "head_dim", family.head_dim or quotient, null=quotient or 1)
    if heads % kv_heads:
        raise _refused("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
    if head_dim % 2:
        raise _refused("head_dim", head_dim, "an even number")
    theta, scaling = _rope(config, family)
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise _refused("tie_word_embeddings", tied, "true or false")
    return {
        "vocab_size": _count(config, "vocab_size"),
        "width": width,
        "depth": _count(config, "num_hidden_layers"),
        "heads": heads,
        "mlp_width": _count(config, "intermediate_size"),
        "kv_heads": 0 if kv_heads == heads else kv_heads,
        "head_width": 0 if head_dim * heads == width else head_dim,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_epsilon": _number("rms_norm_eps", config.get("rms_norm_eps", family.epsilon)),
        "norm_placement": family.norm_placement,
        "norm_type": family.norm_type,
        "qk_norm": family.qk_norm,
        "qkv_bias": family.qkv_bias,
        "tie_embeddings": tied,
    }


def longest_sequence(config: Mapping[str, Any]) -> tuple[int, str] | None:
    """Positions up to which our decoder computes the model, and the key that says so; None where none does.

    Within its sliding window a layer sees everything, as ours do.
    """
    limits = [(_window(config), "sliding_window")]
    if "max_position_embeddings" in config:
        limits.append((_count(config, "max_position_embeddings"), "max_position_embeddings"))
    return min(((limit, key) for limit, key in limits if limit is not None), default=None)


def end_of_text(config: Mapping[str, Any]) -> list[int]:
    """The ids that end a text, by config.json's eos_token_id: a number, several or none."""
    given, vocab_size = config.get("eos_token_id"), _count(config, "vocab_size")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if any(type(i) is not int or not 0 <= i < vocab_size for i in ids):
        raise _refused("eos_token_id", given, f"a whole number from 0 to {vocab_size - 1}, a list of them, or null")
    return ids


def _check_keys(config: Mapping[str, Any], name: str, family: Architecture) -> None:
    known = {*_READ, *_NO_EFFECT, *_WINDOW_KEYS[family.window]}
    if family.norm_type == "layer":
        known.remove("rms_norm_eps")  # its epsilon is in the code
    for key, value in config.items():
        if key in _ONLY:
            if value != _ONLY[key]:
                raise _refused(key, value, f"{_ONLY[key]!r}, or the key left out")
        elif key == "quantization_config":
            if value is not None:
                quantization_config.check(value)
        elif key not in known:
            raise _refused(key, value, f"the key left out, if it changes nothing: {name} is not known to have it")
    sliding = _window(config) is not None and family.window != "all"
    kinds = _LAYER_KINDS if sliding else _LAYER_KINDS[:1]
    depth, layers = _count(config, "num_hidden_layers"), config.get("layer_types")
    if layers is not None and not (
        isinstance(layers, list) and len(layers) == depth and all(layer in kinds for layer in layers)
    ):
        raise _refused("layer_types", layers, f"a list of {depth} times {' or '.join(kinds)}, or the key left out")


def _window(config: Mapping[str, Any]) -> int | None:
    """Positions that a layer with a sliding window sees; None where no layer has one."""
    _, family = architecture(config)
    if family.window == "none":
        return None
    used = config.get("use_sliding_window", False) if family.window == "used" else True
    if not isinstance(used, bool):
        raise _refused("use_sliding_window", used, "true or false")
    if not used or (config.get("sliding_window", _DEFAULT_WINDOW) is None and family.window != "layers"):
        return None
    return _count(config, "sliding_window", _DEFAULT_WINDOW)


def _rope(config: Mapping[str, Any], family: Architecture) -> tuple[float, str]:
    """(base of the wavelengths, how they are stretched); older files have the base at the top."""
    given = {key: config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key)}
    for key, value in given.items():
        if not isinstance(value, dict):
            raise _refused(key, value, "an object or null")
    if len(given) == 2 and given["rope_scaling"] != given["rope_parameters"]:
        raise _refused("rope_scaling", given["rope_scaling"], "the same as rope_parameters, or one of them left out")
    none: tuple[str, dict[str, Any]] = ("rope_parameters", {})
    key, parameters = next(iter(given.items()), none)
    if family.window != "layers":
        return _one_rope(config, key, parameters, family)
    # One set for each kind of layer; ours are all alike.
    nested = [parameters[kind] for kind in _LAYER_KINDS if kind in parameters and key == "rope_parameters"]
    if not nested:
        # Of one set for all, transformers 5 takes parts for one kind of layer and its defaults for the other.
        if _one_rope(config, key, parameters, family) != (family.theta, ""):
            allowed = f"rope_theta {family.theta:g} and no more, or a set for each of {' and '.join(_LAYER_KINDS)}"
            raise _refused(key, {"rope_theta": config.get("rope_theta"), **parameters}, allowed)
        return family.theta, ""
    found = {_one_rope(config, key, one, family) for one in nested}
    if len(found) > 1 or set(parameters) != set(_LAYER_KINDS):
        raise _refused(key, parameters, f"the same for {' and '.join(_LAYER_KINDS)}, and nothing besides")
    return found.pop()


def _one_rope(config: Mapping[str, Any], key: str, parameters: Any, family: Architecture) -> tuple[float, str]:
    if not isinstance(parameters, dict):
        raise _refused(key, parameters, "an object or null")
    kinds = ("default", *rope.SCALINGS)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in kinds or parameters.get("type", kind) != kind:
        raise _refused(key, parameters, f"none, or rope_type {' or '.join(kinds)}")
    names = rope.SCALINGS.get(kind, ())
    more = set(parameters) - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *names}
    if more or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refused(key, parameters, f"{', '.join(('rope_theta', *names))} for rope_type {kind}")
    theta = parameters.get("rope_theta", config.get("rope_theta", family.theta))
    if config.get("rope_theta", theta) != theta:
        raise _refused("rope_theta", config["rope_theta"], f"what {key} has, {shown(theta)}, or the key left out")
    if kind == "default":
        return _number("rope_theta", theta), ""
    defaults = {"original_max_position_embeddings": config.get("max_position_embeddings")}
    if kind == "yarn":
        factor = _number(f"{key}.factor", parameters.get("factor"))
        defaults |= {"beta_fast": 32, "beta_slow": 1, "attention_factor": 1 + 0.1 * math.log(max(factor, 1))}
        if _number("rope_theta", theta) <= 1:
            raise _refused("rope_theta", theta, "a number above 1 for rope_type yarn")
    values = {name: _number(f"{key}.{name}", parameters.get(name, defaults.get(name))) for name in names}
    scaling = rope.describe(kind, values)
    try:
        rope.parse(scaling)
    except ConfigError as error:
        raise UserError(f"config.json: {key} = {shown(parameters)}: {error}") from None
    return _number("rope_theta", theta), scaling


def _count(config: Mapping[str, Any], key: str, default: int | None = None, null: int | None = None) -> int:
    """A whole number from 1. default: where the key is absent; null: where it is null, None for not allowed."""
    value = config.get(key, default)
    if value is None and null is not None:
        value = null
    if type(value) is not int or not 1 <= value < 2**31:
        raise _refused(key, value, "a whole number from 1, below 2^31")
    return value


def _number(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise _refused(key, value, "a number above 0")
    return float(value)


def _refused(key: str, value: Any, allowed: str) -> UserError:
    name = key if key.isprintable() and len(key) < 80 else shown(key)
    return UserError(f"config.json: {name} = {shown(value)}: allowed is {allowed}")


def described(model: ModelConfig, **more: Any) -> dict[str, Any]:
    """The config.json of a decoder whose depth-µP multipliers are 1; `more` adds keys."""
    name = architecture_of(model)
    kind, values = rope.parse(model.rope_scaling)
    plain = {key: int(value) if value.is_integer() else value for key, value in values.items()}  # lengths are int
    return {
        "architectures": [name],
        "model_type": ARCHITECTURES[name].model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_heads,
        **({"head_dim": model.head_dim} if model.head_width or ARCHITECTURES[name].head_dim else {}),
        "hidden_act": "silu",
        "max_position_embeddings": model.sequence_length,
        "rope_theta": model.rope_theta,
        **({"rope_scaling": {"rope_type": kind, **plain}} if kind else {}),
        **({"rms_norm_eps": model.norm_epsilon} if model.norm_type == "rms" else {}),
        **({} if model.qkv_bias else {"attention_bias": False}),
        "tie_word_embeddings": model.tie_embeddings,
        **more,
    }
