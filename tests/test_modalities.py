"""Sequences of several senses through a decoder: what they mean, and that all ways of reading them agree."""

import json
from dataclasses import replace

import pytest
import torch
from decoder_variants import BASE, EXPERTS, LONG, VARIANTS, drawn, layers_by_loops
from safetensors import safe_open
from torch import Tensor

from moe import Decoder, DecoderConfig, count_parameters
from moe.cross_entropy import IGNORED
from moe.kv_cache import KVCache
from moe.modalities import (
    Interleaved,
    Modality,
    ModalityBatch,
    ModalityConfig,
    ModalityEmbedder,
    Text,
    collate,
    interleave,
)
from moe.prefill import prefill

SIZES = ModalityConfig(patch_size=2, num_channels=3, n_fft=32, hop_length=16, num_mel_bins=5)
WIDTHS = {Modality.TEXT: 0, Modality.IMAGE: 12, Modality.VIDEO: 12, Modality.AUDIO: 5}
KINDS = {
    "dense": {},
    "multipliers": VARIANTS["multipliers"],
    "long context": LONG,
    "long context of experts": LONG | EXPERTS,
}


def senses(kind: str = "long context of experts", **changes) -> Decoder:
    """A decoder in float64 that has modalities."""
    torch.manual_seed(0)
    decoder = Decoder(replace(BASE, modalities=SIZES, **KINDS[kind], **changes)).double().eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) / 3)
    return decoder


def embedder_of(decoder: Decoder) -> ModalityEmbedder:
    assert decoder.model.embed_modalities is not None
    return decoder.model.embed_modalities


def gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def drawn_sequence(length: int, seed: int = 0, sizes: ModalityConfig = SIZES) -> Interleaved:
    """Tokens of all modalities in random order, half of them text."""
    random = torch.Generator().manual_seed(seed)
    modality = torch.randint(1, 4, (length,), generator=random, dtype=torch.uint8)
    modality[torch.rand(length, generator=random) < 0.5] = Modality.TEXT
    ids = torch.randint(0, 23, (length,), generator=random, dtype=torch.uint8)
    rows = [Modality(m) for m in modality.tolist() if m]
    features = torch.randn(len(rows), sizes.feature_size, generator=random)
    for row, kind in zip(features, rows, strict=True):
        row[sizes.width(kind) :] = 0
    return Interleaved(ids.where(modality == Modality.TEXT, 0), modality, features)


def batched(sequence: Interleaved) -> tuple[Tensor, ...]:
    return tuple(x[None] for x in sequence.dense())


def embedded_by_loops(decoder: Decoder, sequence: Interleaved) -> list[Tensor]:
    """The embedding (d) of each token, by the definition."""
    weights = dict(decoder.named_parameters())
    of = {name.removeprefix("model.embed_modalities."): weight for name, weight in weights.items()}
    row, embeddings = 0, []
    for identity, number in zip(sequence.ids.tolist(), sequence.modality.tolist(), strict=True):
        if number == Modality.TEXT:
            x = weights["model.embed_tokens.weight"][identity]
        else:
            matrix = of["audio_proj.weight" if number == Modality.AUDIO else "image_proj.weight"]
            numbers = sequence.features[row].double().tolist()
            x = sum(numbers[i] * matrix[:, i] for i in range(WIDTHS[Modality(number)]))
            row += 1
        embeddings.append((x + of["vectors"][number]) * decoder.config.embedding_multiplier)
    return embeddings


def assert_close(ours: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


# What a token means


@pytest.mark.parametrize("kind", KINDS)
def test_the_embedding_of_a_mixed_sequence_is_its_definition(kind):
    decoder, sequence = senses(kind), drawn_sequence(40)
    assert set(sequence.modality.tolist()) == {0, 1, 2, 3}
    assert_close(decoder.embed(*batched(sequence))[0], torch.stack(embedded_by_loops(decoder, sequence)))


@pytest.mark.parametrize("kind", ["dense", "long context of experts"])
def test_the_logits_of_a_mixed_sequence_are_those_of_a_decoder_in_loops(kind):
    decoder, sequence = senses(kind), drawn_sequence(19)
    truth = layers_by_loops(decoder, embedded_by_loops(decoder, sequence))
    assert_close(decoder(inputs_embeds=decoder.embed(*batched(sequence))).logits[0], truth)


def test_ids_alone_are_text_everywhere():
    decoder, ids = senses(), torch.randint(0, 23, (2, 9))
    all_text = decoder.embed(ids, torch.zeros_like(ids), torch.zeros(2, 9, SIZES.feature_size))
    assert torch.equal(decoder.embed(ids), all_text)
    assert_close(decoder(ids).logits, decoder(inputs_embeds=all_text).logits)
    vector = embedder_of(decoder).vectors[Modality.TEXT]
    assert_close(decoder.embed(ids), decoder.model.embed_tokens.weight[ids] + vector)


def test_an_embedder_alone_is_that_of_the_decoder():
    decoder, sequence = senses(), drawn_sequence(20)
    alone = ModalityEmbedder(SIZES, BASE.hidden_size).double()
    alone.load_state_dict(embedder_of(decoder).state_dict())
    ids, modality, features = batched(sequence)
    text = decoder.model.embed_tokens(ids)
    assert torch.equal(alone(text, modality, features), decoder.embed(ids, modality, features))


def test_features_of_other_modalities_and_ids_outside_text_change_nothing():
    decoder, sequence = senses(), drawn_sequence(60)
    ids, modality, features = batched(sequence)
    before = decoder.embed(ids, modality, features)
    for kind in Modality:
        others = torch.nonzero(modality[0] != kind)[:, 0]
        shuffled = features.clone()
        shuffled[0, others] = features[0, others.flip(0)]
        after = decoder.embed(torch.where(modality == Modality.TEXT, ids, 7), modality, shuffled)
        chosen = modality == kind
        assert torch.equal(after[chosen], before[chosen])
    beyond = features.clone()
    beyond[modality == Modality.AUDIO, WIDTHS[Modality.AUDIO] :] = 5.0  # past the width of a modality
    beyond[modality == Modality.TEXT] = 5.0
    assert torch.equal(decoder.embed(ids, modality, beyond), before)


@pytest.mark.parametrize("kind", Modality)
def test_gradients_reach_what_a_modality_uses_and_nothing_else(kind):
    decoder = senses(tie_word_embeddings=False)
    ids = torch.tensor([[3, 3, 5]])
    modality = torch.full_like(ids, kind)
    features = torch.randn(1, 3, SIZES.feature_size)
    decoder.embed(ids, modality, features).square().sum().backward()
    embedder = embedder_of(decoder)
    rows, vectors = (
        torch.nonzero(gradient(weight).abs().sum(1))[:, 0].tolist()
        for weight in (decoder.model.embed_tokens.weight, embedder.vectors)
    )
    reached = {
        "table": rows,
        "image": bool(gradient(embedder.image_proj.weight).any()),
        "audio": bool(gradient(embedder.audio_proj.weight).any()),
        "vectors": vectors,
    }
    assert reached == {
        "table": [3, 5] if kind == Modality.TEXT else [],
        "image": kind in (Modality.IMAGE, Modality.VIDEO),
        "audio": kind == Modality.AUDIO,
        "vectors": [kind],
    }


def test_gradients_of_the_embedders_are_right():
    embedder = ModalityEmbedder(SIZES, 4, std=0.5).double()
    modality = torch.tensor([[0, 1, 2, 3, 3, 1]])
    features = torch.randn(1, 6, SIZES.feature_size, dtype=torch.float64, requires_grad=True)
    text = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *xs: embedder(xs[0], modality, xs[1]), (text, features))


def test_embeddings_of_every_modality_begin_with_the_spread_of_text():
    sizes = ModalityConfig()
    decoder = Decoder(replace(BASE, hidden_size=256, modalities=sizes, embedding_initializer_range=0.5))
    embedder, std = embedder_of(decoder), 0.5
    patches = torch.rand(2000, sizes.image_width)  # pixels uniform in 0..1
    frames = torch.randn(2000, sizes.audio_width)
    assert decoder.model.embed_tokens.weight.std().item() == pytest.approx(std, rel=0.05)
    assert embedder.vectors.std().item() == pytest.approx(0.1 * std, rel=0.15)
    for rows in (embedder.image_proj(patches), embedder.audio_proj(frames)):
        assert rows.square().mean().sqrt().item() == pytest.approx(std, rel=0.15)


# Ways of reading


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_through_a_cache_are_one_whole_pass(kind):
    decoder, sequence = senses(kind), drawn_sequence(23)
    with torch.no_grad():
        whole = decoder(inputs_embeds=decoder.embed(*batched(sequence))).logits
        for size in (1, 5, 23):
            cache = KVCache()
            pieces = [decoder.embed(*batched(piece)) for piece in sequence.pieces(size)]
            assert_close(
                torch.cat([decoder(inputs_embeds=x, cache=cache).logits for x in pieces], dim=1), whole
            )


@pytest.mark.parametrize("every_place", [False, True], ids=["early exit", "every place"])
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_of_a_sequence_is_one_whole_pass_and_text_continues_it(kind, every_place):
    decoder, sequence = senses(kind), drawn_sequence(23)
    more = torch.randint(0, 23, (1, 4))
    with torch.no_grad():
        x = torch.cat([decoder.embed(*batched(sequence)), decoder.embed(more)], dim=1)
        whole = decoder(inputs_embeds=x)
        for chunk in (1, 6, 23, 100):
            read = prefill(decoder, sequence, chunk=chunk, every_place=every_place)
            assert read.cache.length == 23
            assert_close(read.state, whole.hidden[:, 22])
            assert_close(decoder(more, cache=read.cache).logits, whole.logits[:, 23:])


def greedy_by_whole_passes(decoder: Decoder, sequence: Interleaved, steps: int) -> list[int]:
    """Each token from a pass over all before it, without a cache; drawn ones are text."""
    drawn: list[int] = []
    with torch.no_grad():
        for _ in range(steps):
            new = [decoder.embed(torch.tensor([drawn]))] if drawn else []
            x = torch.cat([decoder.embed(*batched(sequence)), *new], dim=1)
            drawn.append(int(decoder(inputs_embeds=x).logits[0, -1].argmax()))
    return drawn


@pytest.mark.parametrize("kind", KINDS)
def test_generate_continues_a_sequence_with_text_as_whole_passes_do(kind):
    decoder, sequence = senses(kind), drawn_sequence(11)
    made = decoder.generate(sequence, max_new_tokens=6, temperature=0)
    assert torch.equal(made[0, :11], sequence.dense()[0])
    assert made[0, 11:].tolist() == greedy_by_whole_passes(decoder, sequence, 6)


@pytest.mark.parametrize("kind", ["dense", "long context of experts"])
def test_generate_from_ids_gives_drawn_tokens_the_vector_of_text(kind):
    decoder, ids = senses(kind), torch.randint(0, 23, (1, 5))
    prompt = Interleaved(ids[0], torch.zeros(5, dtype=torch.uint8), torch.zeros(0, SIZES.feature_size))
    made = decoder.generate(ids, max_new_tokens=6, temperature=0)
    assert made[0, 5:].tolist() == greedy_by_whole_passes(decoder, prompt, 6)


@pytest.mark.parametrize("kind", ["dense", "long context of experts"])
def test_a_batch_of_prompts_continues_as_each_alone(kind):
    decoder = senses(kind)
    sequences = [drawn_sequence(length, seed=length) for length in (4, 9, 7)]
    made = decoder.generate(collate(sequences, padding_side="left"), max_new_tokens=5, temperature=0)
    for row, sequence in zip(made, sequences, strict=True):
        assert row[9:].tolist() == greedy_by_whole_passes(decoder, sequence, 5)


def test_generate_continues_a_cache_of_several_senses():
    decoder, sequence = senses(), drawn_sequence(20)
    cache = prefill(decoder, sequence[:13], chunk=4).cache
    made = decoder.generate(sequence[13:], max_new_tokens=5, temperature=0, cache=cache)
    assert made[0, 7:].tolist() == greedy_by_whole_passes(decoder, sequence, 5)


# Batches and losses


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_is_its_sequences_one_by_one(kind, side):
    decoder = senses(kind)
    sequences = [drawn_sequence(length, seed=length) for length in (5, 12, 1, 8)]
    batch = collate(sequences, padding_side=side)
    assert batch.mask.sum(1).tolist() == [5, 12, 1, 8]
    with torch.no_grad():
        logits = decoder(inputs_embeds=decoder.embed(*batch.inputs), mask=batch.mask).logits
        for row, sequence in enumerate(sequences):
            real = batch.mask[row]
            alone = decoder(inputs_embeds=decoder.embed(*batched(sequence))).logits[0]
            assert_close(logits[row, real], alone)
            assert torch.equal(batch.targets[row, real], sequence.targets)
            assert (batch.targets[row, ~real] == IGNORED).all()


def test_targets_are_the_next_text_and_nothing_else():
    modality = torch.tensor([0, 1, 0, 0, 3, 2, 0], dtype=torch.uint8)
    ids = torch.tensor([9, 0, 7, 5, 0, 0, 0], dtype=torch.uint8)
    sequence = Interleaved(ids, modality, torch.zeros(3, 12))
    assert sequence.loss_mask.tolist() == [False, True, True, False, False, True, False]
    assert sequence.targets.tolist() == [IGNORED, 7, 5, IGNORED, IGNORED, 0, IGNORED]


def test_a_batch_of_one_length_needs_no_mask():
    sequences = [drawn_sequence(5, seed=1), drawn_sequence(5, seed=2)]
    assert collate(sequences).padding is None
    batch = collate([*sequences, drawn_sequence(4)])
    assert batch.padding is batch.mask


@pytest.mark.parametrize("side", ["right", "left"])
def test_nothing_follows_the_last_token(side):
    sequences = [interleave([Text([3, 1, 4][:length])], SIZES) for length in (3, 1)]
    assert collate(sequences, padding_side=side).targets.tolist() == [[1, 4, IGNORED], [IGNORED] * 3]


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_loss_of_a_batch_is_the_mean_over_its_text(side):
    decoder = senses(router_aux_loss_coef=0.1)
    sequences = [drawn_sequence(length, seed=length) for length in (5, 12, 8)]
    batch = collate(sequences, padding_side=side)
    nats = []
    for sequence in sequences:
        logits = layers_by_loops(decoder, embedded_by_loops(decoder, sequence)).log_softmax(-1)
        after = zip(sequence.ids.tolist()[1:], sequence.modality.tolist()[1:], strict=True)
        nats += [-logits[i, token] for i, (token, kind) in enumerate(after) if kind == Modality.TEXT]
    loss = decoder.loss(None, batch.targets, inputs_embeds=decoder.embed(*batch.inputs), mask=batch.mask)
    assert_close(loss.cross_entropy, torch.stack(nats).mean())
    assert_close(loss.total, loss.cross_entropy + 0.1 * loss.balance)
    assert loss.balance > 0


def test_the_loss_of_embeddings_is_that_of_ids():
    decoder, ids = senses(router_aux_loss_coef=0.1), torch.randint(0, 23, (2, 7))
    by_ids = decoder.loss(ids, ids)
    by_embeddings = decoder.loss(None, ids, inputs_embeds=decoder.embed(ids))
    assert_close(by_embeddings.total, by_ids.total)


def test_checkpointed_blocks_give_the_same_gradients():
    batch = collate([drawn_sequence(9, seed=1), drawn_sequence(6, seed=2)])
    gradients = []
    for recompute in (False, True):
        decoder = senses().train()
        decoder.checkpoint_blocks = recompute
        x = decoder.embed(*batch.inputs)
        decoder.loss(None, batch.targets, inputs_embeds=x, mask=batch.mask).total.backward()
        gradients.append({name: p.grad for name, p in decoder.named_parameters() if p.grad is not None})
    assert any("image_proj" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient)


def test_the_loss_of_a_batch_compiles_as_one_graph():
    torch._dynamo.reset()
    decoder = senses("dense")
    batch = collate([drawn_sequence(9, seed=1), drawn_sequence(6, seed=2)])

    def loss(ids: Tensor, modality: Tensor, features: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        x = decoder.embed(ids, modality, features)
        return decoder.loss(None, targets, inputs_embeds=x, mask=mask, chunk_tokens=5).total

    arguments = (*batch.inputs, batch.targets, batch.mask)
    assert_close(torch.compile(loss, fullgraph=True, backend="eager")(*arguments), loss(*arguments))


# Models on disk


def test_a_decoder_with_modalities_comes_back_bit_for_bit(tmp_path):
    decoder, sequence = senses().float(), drawn_sequence(15)
    decoder.save_pretrained(tmp_path / "m")
    saved = json.loads((tmp_path / "m" / "config.json").read_text())
    assert saved["modalities"] == {
        "patch_size": 2, "num_channels": 3, "fps": None, "sampling_rate": 8000,
        "n_fft": 32, "hop_length": 16, "num_mel_bins": 5,
    }  # fmt: skip
    back = Decoder.from_pretrained(tmp_path / "m")
    assert back.config == decoder.config
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    x = batched(sequence)
    assert torch.equal(
        back(inputs_embeds=back.embed(*x)).logits, decoder(inputs_embeds=decoder.embed(*x)).logits
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_sizes": 2}, "no key 'patch_sizes'. Did you mean 'patch_size'"),
        ({"patch_size": 0}, "patch_size=0 must be at least 1"),
        ({"patch_size": 2.0}, "patch_size=2.0 must be a whole number"),
        ({"fps": 0.0}, "fps=0.0 must be"),
        ({"hop_length": 33}, "hop_length=33 is over n_fft=32"),
        ({"num_mel_bins": 30}, "num_mel_bins=30 leaves band"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_a_wrong_key_of_modalities_in_a_config_is_named(tmp_path, change, words):
    senses().save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    data = json.loads(path.read_text())
    data["modalities"] |= change
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=words):
        Decoder.from_pretrained(tmp_path / "m")


def test_without_modalities_models_and_their_files_are_as_ever(tmp_path):
    decoder = drawn("long context of experts")
    decoder.save_pretrained(tmp_path / "m")
    assert "modalities" not in (tmp_path / "m" / "config.json").read_text()
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as stored:
        assert not [name for name in stored.keys() if "modalit" in name]  # noqa: SIM118
    assert Decoder.from_pretrained(tmp_path / "m").config == decoder.config


def test_weights_of_another_embedder_are_refused_by_name(tmp_path):
    senses().save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    data = json.loads(path.read_text())
    data["modalities"]["patch_size"] = 4
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"image_proj\.weight is \(24 12\), the model has \(24 48\)"):
        Decoder.from_pretrained(tmp_path / "m")
    del data["modalities"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"unexpected: model\.embed_modalities\.vectors \(4 24\)"):
        Decoder.from_pretrained(tmp_path / "m")


def test_no_architecture_of_others_has_our_modalities(tmp_path):
    pytest.importorskip("transformers")
    plain = DecoderConfig(
        vocab_size=23, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    Decoder(plain).save_pretrained(tmp_path / "plain", layout="hub")
    with pytest.raises(ValueError, match="modalities would be None instead of ModalityConfig"):
        Decoder(replace(plain, modalities=SIZES)).save_pretrained(tmp_path / "m", layout="hub")


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_of_the_embedders_is_counted(tied):
    decoder = senses(tie_word_embeddings=tied)
    total = sum(parameter.numel() for parameter in decoder.parameters())
    assert count_parameters(decoder.config).total == total


# Refusals


def test_embed_refuses_what_does_not_fit():
    decoder = senses()
    ids, modality, features = batched(drawn_sequence(6))
    nan = features.clone()
    nan[0, 0, 0] = torch.nan
    for arguments, words in (
        ((ids + 23, modality, features), "outside the vocabulary"),
        ((ids, modality, None), "come together"),
        ((ids, None, features), "come together"),
        ((ids, modality[:, 1:], features), r"modality must be int64 of shape \(1, 6\)"),
        ((ids, modality.to(torch.uint8), features), "modality must be int64"),
        ((ids, modality + 4, features), "must be from 0 to 3: 0 text, 1 image, 2 video, 3 audio"),
        ((ids, modality - 4, features), "modality -4 must be"),
        ((ids, modality, features[..., 1:]), "feature_size=12"),
        ((ids, modality, features.long()), "features must be floating-point"),
        ((ids, modality, nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            decoder.embed(*arguments)
    with pytest.raises(ValueError, match=r"reads text alone. Make it with DecoderConfig\(modalities="):
        drawn("long context").embed(ids, modality, features)


def test_a_decoder_takes_ids_or_embeddings():
    decoder, ids = senses(), torch.randint(0, 23, (1, 4))
    x = decoder.embed(ids)

    def loss(given: Tensor | None = None, **options) -> object:
        return decoder.loss(given, ids, **options)

    for call in (decoder.forward, decoder.hidden, loss):
        with pytest.raises(ValueError, match="got neither"):
            call()
        with pytest.raises(ValueError, match="got both"):
            call(ids, inputs_embeds=x)
        for wrong in (x[0], x[..., 1:], ids):
            with pytest.raises(ValueError, match=r"inputs_embeds must be floating-point \(b s d\) with d=24"):
                call(inputs_embeds=wrong)
        with pytest.raises(ValueError, match="mask must be bool"):
            call(inputs_embeds=x, mask=torch.ones(1, 3, dtype=torch.bool))


def test_prefill_refuses_before_it_reads():
    decoder, sequence = senses(), drawn_sequence(6)
    seen: list[int] = []
    decoder.model.register_forward_hook(lambda *_: seen.append(1))
    wrong_ids = Interleaved(sequence.ids + 23, sequence.modality, sequence.features)
    infinite = sequence.features.clone()
    infinite[-1, 0] = torch.inf
    for prompt, words in (
        (sequence[:0], "at least one token"),
        (wrong_ids, "outside the vocabulary"),
        (drawn_sequence(6, sizes=ModalityConfig()), "64 features a token, the decoder 12"),
        (Interleaved(sequence.ids, sequence.modality, infinite), "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=words):
            prefill(decoder, prompt, chunk=2)
    assert not seen
    with pytest.raises(ValueError, match="the decoder has none"):
        prefill(drawn("long context"), sequence)


def test_generate_refuses_prompts_that_cannot_be_continued():
    decoder = senses()
    right = collate([drawn_sequence(6), drawn_sequence(4)])
    with pytest.raises(ValueError, match="pad on the left"):
        decoder.generate(right, max_new_tokens=1)
    with pytest.raises(ValueError, match="Interleaved takes no mask"):
        decoder.generate(drawn_sequence(6), max_new_tokens=1, mask=torch.ones(1, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one token"):
        decoder.generate(drawn_sequence(6)[:0], max_new_tokens=1)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_reads_what_a_cpu_reads(kind):
    on_cpu, sequence = senses(kind).float(), drawn_sequence(23)
    on_gpu = senses(kind).float().cuda()
    sequences = [drawn_sequence(9, seed=1), drawn_sequence(6, seed=2)]
    batch: ModalityBatch = collate(sequences).to("cuda")
    ours = on_gpu(inputs_embeds=on_gpu.embed(*batch.inputs), mask=batch.mask).logits.cpu()
    truth = on_cpu(inputs_embeds=on_cpu.embed(*collate(sequences).inputs), mask=batch.mask.cpu()).logits
    real = batch.mask.cpu()
    torch.testing.assert_close(ours[real], truth[real], rtol=1e-3, atol=1e-3)
    read = prefill(on_gpu, sequence, chunk=6).state.cpu()
    torch.testing.assert_close(read, prefill(on_cpu, sequence, chunk=6).state, rtol=1e-3, atol=1e-3)
    assert on_gpu.generate(sequence, max_new_tokens=3, temperature=0).shape == (1, 26)
