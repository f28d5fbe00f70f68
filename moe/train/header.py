"""What a person should know before a run starts: size, cost, data, memory, machine."""

from collections.abc import Sequence

import torch

from moe.decoder_config import DecoderConfig
from moe.ops.choose import describe
from moe.parameters import count_parameters, flops_per_token
from moe.train.device import device_name
from moe.train.metrics import count
from moe.train.settings import RunConfig
from moe.train.tokens import TokenisedCorpus

ADAM_BYTES = 16  # a parameter in float32: weight, gradient and two moments


def header(config: RunConfig, corpus: TokenisedCorpus, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The lines to show before the first step."""
    parameters = count_parameters(config.model)
    forward = flops_per_token(config.model, config.data.sequence_length)
    step_tokens = config.train.batch_size * config.data.sequence_length
    tokens = step_tokens * config.train.steps
    train, validation = corpus.manifest["train"], corpus.manifest["validation"]
    return [
        f"model: {count(parameters.total)} parameters in total, {count(parameters.active)} active a token; "
        f"without embeddings {count(parameters.non_embedding_total)} in total, "
        f"{count(parameters.non_embedding_active)} active",
        f"cost: {count(forward)}FLOP forward a token, {count(3 * forward)}FLOP with backward, "
        f"{count(3.0 * forward * tokens)}FLOP for the run",
        f"data: {train['files']} files, {train['bytes'] / 1e6:.1f} MB to train on; "
        f"{validation['files']} files, {validation['bytes'] / 1e6:.1f} MB held out; "
        f"sha256 {corpus.manifest['digest'][:12]}",
        f"run: {config.train.steps} steps of {count(step_tokens)} tokens = {count(tokens)} tokens, "
        f"{tokens / train['tokens']:.2f} epochs",
        f"memory: about {estimate_memory(config, parameters.total, dtype) / 1e9:.2f} GB",
        *machine_lines(device, dtype),
    ]


def machine_lines(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Device, precision, and the backend that "auto" takes for the experts, with the reason."""
    reasons = {(backend, reason) for _, backend, reason in describe(device)}
    backends = "; ".join(f"{backend} ({reason})" for backend, reason in sorted(reasons))
    return [f"device: {device_name(device)}, {str(dtype).removeprefix('torch.')}; backend auto = {backends}"]


def estimate_memory(config: RunConfig, parameters: int, dtype: torch.dtype) -> float:
    """Bytes of weights, gradients, Adam's moments and the activations kept for the backward pass.

    Activations are a rough count: about 12 d-wide tensors of attention and norms a layer, x and the
    pre-activations of the chosen experts (2 d + 4 k h bytes in bf16), and the logits, all in `dtype`.
    """
    model = config.model
    tokens = config.train.batch_size // config.train.accumulation * config.data.sequence_length
    widths = (
        12 * model.hidden_size * model.num_hidden_layers
        + sum(_feed_forward_width(model))
        + 2 * model.vocab_size
    )
    return ADAM_BYTES * parameters + dtype.itemsize * tokens * widths


def _feed_forward_width(model: DecoderConfig) -> Sequence[int]:
    routed = (
        model.hidden_size
        + 2 * model.num_experts_per_tok * model.moe_intermediate_size
        + 2 * model.shared_width
    )
    dense = model.hidden_size + 2 * (model.intermediate_size or 0)
    return [routed if model.is_moe_layer(i) else dense for i in range(model.num_hidden_layers)]
