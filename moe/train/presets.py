"""Named starting points. A preset is a function, so that a reader sees every number that it sets."""

from collections.abc import Callable

from moe.decoder_config import DecoderConfig
from moe.train.settings import DataConfig, OptimConfig, RunConfig, TrainConfig


def tiny() -> RunConfig:
    """Seconds on any machine: for tests and for trying the commands."""
    return RunConfig(
        model=DecoderConfig(
            vocab_size=256,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            moe_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
            scoring_func="sigmoid",
            use_selection_bias=True,
            routed_scaling_factor=2.0,
        ),
        data=DataConfig(sequence_length=32, include_tests=False),
        optim=OptimConfig(lr=1e-2, warmup_steps=4, selection_bias_rate=1e-2),
        train=TrainConfig(
            steps=40,
            batch_size=8,
            log_every=5,
            eval_every=20,
            eval_tokens=1024,
            final_eval_tokens=4096,
            checkpoint_every=10,
            tensorboard=False,
        ),
    )


def demo() -> RunConfig:
    """Under four minutes on two CPU cores: bytes of the standard library, 16 experts, 2 for each token.

    Sigmoid scores balanced by the selection bias alone; the chosen weights sum to k, so that k narrow
    experts give the variance of one wide feed-forward. The bias moves ten times as fast as in the paper:
    at 1e-3 a run this short ends with one expert at 7.5 times its fair load, at 1e-2 with 1.1 times.
    """
    return RunConfig(
        model=DecoderConfig(
            vocab_size=256,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            moe_intermediate_size=128,
            num_experts=16,
            num_experts_per_tok=2,
            scoring_func="sigmoid",
            use_selection_bias=True,
            routed_scaling_factor=2.0,
            use_qk_norm=True,
            max_position_embeddings=512,
        ),
        # Tests repeat themselves so much that gzip gains 0.3 bits a byte from them; the rest is 12 MB
        data=DataConfig(sequence_length=128, include_tests=False),
        optim=OptimConfig(lr=3e-3, warmup_steps=50, selection_bias_rate=1e-2),
        train=TrainConfig(steps=600, batch_size=16, final_eval_tokens=262_144),
    )


def gpu_small() -> RunConfig:
    """One GPU, bfloat16: 274M parameters of which 62M are active. Give it more text than the default."""
    return RunConfig(
        model=DecoderConfig(
            vocab_size=256,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            moe_intermediate_size=768,
            num_experts=12,
            num_experts_per_tok=2,
            scoring_func="sigmoid",
            use_selection_bias=True,
            routed_scaling_factor=2.0,
            use_qk_norm=True,
            max_position_embeddings=2048,
        ),
        data=DataConfig(sequence_length=1024),
        optim=OptimConfig(lr=6e-4, warmup_steps=200, schedule="wsd", final_fraction=0.0),
        train=TrainConfig(
            steps=2000,
            batch_size=64,
            accumulation=2,
            precision="bfloat16",
            checkpoint_every=500,
            eval_every=250,
        ),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {"tiny": tiny, "demo": demo, "gpu-small": gpu_small}
