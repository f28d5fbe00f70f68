"""Named starting points. A preset is a function, so that a reader sees every number that it sets."""

from collections.abc import Callable
from dataclasses import replace

from moe.decoder_config import DecoderConfig
from moe.modality_config import ModalityConfig
from moe.probes.language.config import LanguageConfig
from moe.probes.needle.config import NeedleConfig
from moe.probes.senses.config import SensesConfig
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
        optim=OptimConfig(optimizer="muon", lr=3e-3, warmup_steps=50, selection_bias_rate=1e-2),
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


def needle() -> RunConfig:
    """Under five minutes on two CPU cores: 8 experts, 2 for each byte, that find needles in a million bytes.

    Two sliding layers and, last, a full one without positions, with logits that grow with the squared
    logarithm of the number of keys; it begins as an induction head. docs/long-context.md says what each of
    these is worth.
    """
    return RunConfig(
        model=DecoderConfig(
            vocab_size=256,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
            use_qk_norm=True,
            attention_multiplier=0.2,
            layer_types="LLG",
            sliding_window=32,
            no_rope_layers=(1, 1, 0),
            rope_theta=1000.0,
            max_position_embeddings=4096,
            use_ssmax=True,
            ssmax_power=2.0,
            attention_init="induction",
            canon_set=("AC", "AC", "AB"),
            moe_intermediate_size=32,
            num_experts=8,
            num_experts_per_tok=2,
            n_shared_experts=1,
            scoring_func="sigmoid",
            use_selection_bias=True,
            tie_word_embeddings=False,
            initializer_range=0.07,
            embedding_initializer_range=0.5,
        ),
        data=DataConfig(sequence_length=3072, include_tests=False),
        optim=OptimConfig(
            lr=3e-3,
            beta2=0.98,
            weight_decay=0.05,
            schedule="wsd",
            decay_fraction=0.7,
            final_fraction=0.05,
            selection_bias_rate=3e-3,
        ),
        train=TrainConfig(
            steps=1800,
            batch_size=1,
            log_every=50,
            eval_every=0,
            eval_tokens=32_768,
            final_eval_tokens=131_072,
            checkpoint_every=400,
        ),
        needle=NeedleConfig(text_sequences=0.2),
    )


def senses() -> RunConfig:
    """Under eight minutes on two CPU cores: needles of text, images, video and sound in one sequence.

    The decoder of the preset `needle` with embedders for every sense and wider experts. docs/multimodal.md
    says what it finds.
    """
    base = needle()
    return replace(
        base,
        model=replace(base.model, ssmax_power=1.0, modalities=ModalityConfig(), moe_intermediate_size=64),
        data=replace(base.data, sequence_length=3072),
        train=replace(base.train, steps=2400),
        needle=None,
        senses=SensesConfig(),
    )


def language() -> RunConfig:
    """Under eight minutes on two CPU cores: 8 experts, 2 a byte, that translate by a book in the context.

    Two full layers without positions, each after a sliding one; they begin as induction heads, the sliding
    ones as copies of what they see. docs/in-context.md says what each of these is worth.
    """
    base = needle()
    model = replace(
        base.model,
        num_hidden_layers=4,
        num_key_value_heads=2,
        layer_types="LGLG",
        sliding_window=96,
        no_rope_layers=(1, 0, 1, 0),
        ssmax_power=1.0,
        attention_init="copying",
        canon_set=("AC", "AB", "AC", "AB"),
        moe_intermediate_size=64,
    )
    return replace(
        base,
        model=model,
        data=replace(base.data, sequence_length=2560),
        optim=replace(base.optim, optimizer="muon", weight_decay=0.02),
        train=replace(base.train, steps=2500, final_eval_tokens=4096),  # of text, which it does not learn
        needle=None,
        language=LanguageConfig(),
    )


def omni() -> RunConfig:
    """Under twenty minutes on two CPU cores: one decoder for the needles of every sense and for languages.

    The decoder of the preset `language` with one key head and embedders for every sense; steps alternate
    between the two tasks. docs/multimodal.md and docs/in-context.md say what it finds.
    """
    base = language()
    return replace(
        base,
        model=replace(base.model, num_key_value_heads=1, modalities=ModalityConfig()),
        data=replace(base.data, sequence_length=3072),
        train=replace(base.train, steps=4200, final_eval_tokens=131_072),
        senses=SensesConfig(),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "demo": demo,
    "gpu-small": gpu_small,
    "needle": needle,
    "senses": senses,
    "language": language,
    "omni": omni,
}
