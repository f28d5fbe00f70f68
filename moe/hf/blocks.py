"""Where each MoE block of Hugging Face transformers keeps its tensors, and what it returns, as data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from moe.layer import MoEOutput
from moe.routing import Routing


def y_alone(output: MoEOutput) -> Tensor:
    """What most blocks return."""
    return output.y


def y_and_weights(output: MoEOutput) -> tuple[Tensor, Tensor]:
    """gpt-oss: y (b s d) and the weights of the chosen experts (t k)."""
    return output.y, output.routing.weights


def flat_y_and_logits(output: MoEOutput) -> tuple[Tensor, Tensor]:
    """Llama 4: y (t d) and the logits (t e)."""
    return rearrange(output.y, "... d -> (...) d"), output.routing.logits


def raw_logits_first(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """What most routers return: logits in the dtype of their product, weights, experts."""
    return routing.logits, routing.weights, routing.experts


def float_logits_first(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """Routers that return the logits in float32."""
    return routing.logits.float(), routing.weights, routing.experts


def gates_and_logits(routing: Routing) -> tuple[Tensor, Tensor]:
    """Llama 4: the weights spread over all experts (t e), then the logits."""
    gates = torch.zeros_like(routing.logits, dtype=routing.weights.dtype)
    return gates.scatter(1, routing.experts, routing.weights), routing.logits


@dataclass(frozen=True)
class Block:
    """One row. The experts stand under `experts` everywhere, with our names.

    model_type      the family in `moe.hf.router_table`
    router          the router's place in the block
    weight          the weight's place in the router
    selection_bias  the selection bias's place in the block
    shared          the shared experts' place in the block
    listener        where transformers, asked for router logits, will find a router in our layer
    result          what the block returns
    announcement    what the router returns; hooks on it are how transformers records router logits
    """

    model_type: str
    router: str = "gate"
    weight: str = "weight"
    selection_bias: str = "gate.e_score_correction_bias"
    shared: str = "shared_experts"
    listener: str = "gate"
    result: Callable[[MoEOutput], Any] = y_alone
    announcement: Callable[[Routing], tuple[Tensor, ...]] = raw_logits_first

    def place_of(self, name: str) -> str:
        """Where the block keeps what `moe.MoE` keeps under a name."""
        named = {
            "router.weight": f"{self.router}.{self.weight}",
            "router.bias": f"{self.router}.bias",
            "router.e_score_correction_bias": self.selection_bias,
            "shared_expert.gate.weight": "shared_expert_gate.weight",
        }
        return named.get(name) or name.replace("shared_expert.", f"{self.shared}.")


# By the name of the block's class
BLOCKS: dict[str, Block] = {
    "MixtralSparseMoeBlock": Block("mixtral"),
    "MiniMaxSparseMoeBlock": Block("minimax"),
    "OlmoeSparseMoeBlock": Block("olmoe"),
    "FlexOlmoSparseMoeBlock": Block("flex_olmo"),
    "Qwen2MoeSparseMoeBlock": Block("qwen2_moe", shared="shared_expert"),
    "Qwen3MoeSparseMoeBlock": Block("qwen3_moe"),
    "Qwen3NextSparseMoeBlock": Block("qwen3_next", shared="shared_expert"),
    "Qwen3_5MoeSparseMoeBlock": Block("qwen3_5_moe_text", shared="shared_expert"),
    "Qwen3VLMoeTextSparseMoeBlock": Block("qwen3_vl_moe_text"),
    "Qwen3OmniMoeThinkerTextSparseMoeBlock": Block("qwen3_omni_moe_text"),
    "MellumSparseMoeBlock": Block("mellum"),
    "JambaSparseMoeBlock": Block("jamba", router="router", listener="router.gate"),
    "HunYuanMoEV1Moe": Block("hunyuan_v1_moe", weight="wg.weight", shared="shared_mlp"),
    "Ernie4_5_MoeSparseMoeBlock": Block(
        "ernie4_5_moe", selection_bias="gate.moe_statics.e_score_correction_bias"
    ),
    "DeepseekV2Moe": Block("deepseek_v2"),
    "DeepseekOcr2TextMoe": Block("deepseek_ocr2_text"),
    "UnlimitedOcrTextMoe": Block("unlimited_ocr_text"),
    "Mistral4MoE": Block("mistral4"),
    "GraniteMoeMoE": Block("granitemoe", router="router", announcement=float_logits_first),
    "GraniteMoeSharedMoE": Block("granitemoeshared", router="router", announcement=float_logits_first),
    "GraniteMoeHybridMoE": Block("granitemoehybrid", router="router", announcement=float_logits_first),
    "GraniteMoeSWAMoE": Block("granitemoe_swa", router="router", announcement=float_logits_first),
    "GptOssMLP": Block("gpt_oss", router="router", result=y_and_weights),
    "Cohere2MoeSparseMoeBlock": Block("cohere2_moe"),
    "Llama4TextMoe": Block(
        "llama4_text",
        router="router",
        shared="shared_expert",
        result=flat_y_and_logits,
        announcement=gates_and_logits,
    ),
    "DeepseekV3MoE": Block("deepseek_v3"),
    "Glm4MoeMoE": Block("glm4_moe"),
    "Glm4MoeLiteMoE": Block("glm4_moe_lite"),
    "Dots1MoE": Block("dots1"),
    "SolarOpenMoE": Block("solar_open"),
    "ExaoneMoeSparseMoEBlock": Block("exaone_moe"),
    "DeepseekV32MoE": Block("deepseek_v32"),
    "GlmMoeDsaMoE": Block("glm_moe_dsa"),
    "Glm4vMoeTextMoE": Block("glm4v_moe_text"),
    "BailingHybridMoE": Block("bailing_hybrid"),
    "KimiLinearMoE": Block("kimi_linear"),
    "NemotronHMoE": Block("nemotron_h"),
    "MiniMaxM2SparseMoeBlock": Block("minimax_m2", selection_bias="e_score_correction_bias"),
    "HYV3MoE": Block("hy_v3", selection_bias="e_score_correction_bias"),
    "AfmoeSparseMoeBlock": Block(
        "afmoe",
        router="router",
        weight="gate.weight",
        selection_bias="expert_bias",
        announcement=float_logits_first,
    ),
    "LagunaSparseMoeBlock": Block("laguna", announcement=float_logits_first),
    "Lfm2MoeSparseMoeBlock": Block("lfm2_moe", selection_bias="expert_bias"),
}
