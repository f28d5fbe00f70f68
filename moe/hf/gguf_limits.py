"""What llama.cpp does not have: models that would be exported and then write other text are refused."""

from moe.config import did_you_mean
from moe.hf.gguf_families import ALIASES, FAMILIES, Config, Family, find

NEEDED = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
DEEPSEEK_LITE = (26, 27)  # layers


def find_family(config: Config) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: a model_type that no architecture of llama.cpp is known for here, weights that are
            quantised in another way than MXFP4, or mathematics that llama.cpp does not have.
    """
    name = str(config.get("model_type"))
    family = FAMILIES.get(ALIASES.get(name, name))
    if family is None:
        hint = did_you_mean(name, sorted(FAMILIES))
        raise ValueError(f"model_type {name!r} has no GGUF export here.{hint}")
    missing = [key for key in NEEDED if config.get(key) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}, which a GGUF file needs. Add it.")
    _refuse_quantised(config)
    _refuse_other_mathematics(config, family)
    _refuse_heads(config, family)
    _refuse_layer_pattern(config, family)
    return family


def _refuse_quantised(config: Config) -> None:
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "mxfp4"):
        raise ValueError(
            f"the weights are quantised with {method!r}, which is not decoded here. "
            f"Save the model in bfloat16 and export that."
        )


def _refuse_other_mathematics(config: Config, family: Family) -> None:
    for key, values in {"hidden_act": ("silu", None), **family.fixed}.items():
        if config.get(key) not in values:
            raise ValueError(
                f"{key}={config.get(key)!r}: llama.cpp's {family.arch} computes with {key}={values[0]!r} "
                f"whatever the file says, so it would write other text. This model cannot be exported."
            )


def _refuse_heads(config: Config, family: Family) -> None:
    heads, of_keys = config["num_attention_heads"], find(config, "num_key_value_heads | num_attention_heads")
    if not family.grouped and heads != of_keys:
        raise ValueError(
            f"num_key_value_heads={of_keys}: llama.cpp's {family.arch} has num_attention_heads={heads} of "
            f"them. This model cannot be exported to GGUF."
        )
    layers = config["num_hidden_layers"]
    if family.arch == "DEEPSEEK2" and not config.get("q_lora_rank") and layers not in DEEPSEEK_LITE:
        raise ValueError(
            f"num_hidden_layers={layers} without q_lora_rank: llama.cpp tells such a model by its "
            f"{' or '.join(map(str, DEEPSEEK_LITE))} layers. This one cannot be exported to GGUF."
        )


def _refuse_layer_pattern(config: Config, family: Family) -> None:
    """Refuse layers that are not where llama.cpp has them."""
    layers, kinds = config["num_hidden_layers"], config.get("layer_types")
    alternating = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    if family.arch == "GPT_OSS" and kinds not in (None, alternating):
        raise ValueError(
            f"layer_types={kinds}: llama.cpp's GPT_OSS has every second layer slide, from the first "
            f"on. This model cannot be exported to GGUF."
        )
    last = config.get("moe_layer_end_index")
    if last not in (None, -1, layers - 1):
        raise ValueError(
            f"moe_layer_end_index={last}: llama.cpp has experts up to the last layer, {layers - 1}. "
            f"This model cannot be exported to GGUF."
        )
