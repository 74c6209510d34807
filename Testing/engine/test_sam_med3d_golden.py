"""SAM-Med3D gives what the official code gives: the same weights and inputs, every output compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from golden_recipe import CONFIGS, Config, Golden, digest, load_config, synthetic_inputs, synthetic_weights
from torch import Tensor, nn
from torch.nn import functional as F

from SemiSAMO1Lib.engine.generalists.sam_med3d import image_encoder
from SemiSAMO1Lib.engine.generalists.sam_med3d.architecture import FULL, Architecture
from SemiSAMO1Lib.engine.generalists.sam_med3d.image_encoder import Attention
from SemiSAMO1Lib.engine.generalists.sam_med3d.layers import LayerNorm3d
from SemiSAMO1Lib.engine.generalists.sam_med3d.model import SamMed3D

TINY = [name for name in CONFIGS if name != "full"]
OUTPUTS = [(name, output) for name in CONFIGS for output in load_config(name).outputs]


# ------------------------------------------------------------------------------------------------- how outputs are got


def architecture(config: Config) -> Architecture:
    sizes = config.sizes
    return Architecture(
        size=sizes["img_size"],
        patch=sizes["patch_size"],
        embed_dim=sizes["embed_dim"],
        depth=sizes["depth"],
        heads=sizes["num_heads"],
        global_blocks=tuple(sizes["global_attn_indexes"]),
        window=sizes["window_size"],
        out_channels=sizes["out_chans"],
    )


def with_weights(config: Config, weights: Mapping[str, np.ndarray]) -> SamMed3D:
    """A model that holds these arrays themselves, not a copy."""
    with torch.device("meta"):
        model = SamMed3D(architecture(config))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, assign=True)
    return model.eval().requires_grad_(False)


def tiny_model(name: str = "window3") -> SamMed3D:
    config = load_config(name)
    return with_weights(config, synthetic_weights(config.shapes))


def tensors(model: SamMed3D) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in synthetic_inputs(model.shape.size).items()}


def encoder_answers(model: SamMed3D, volume: Tensor) -> dict[str, Tensor]:
    """Tokens before the first block and after every block, and the image embedding, from one run."""
    encoder, found = model.image_encoder, {}
    hooks = [encoder.blocks[0].register_forward_pre_hook(lambda _, given: found.update(patch_pos=given[0]))]
    for n, block in enumerate(encoder.blocks):
        hooks.append(block.register_forward_hook(lambda _, given, tokens, n=n: found.update({f"block{n}": tokens})))
    found["image_embedding"] = encoder(volume)
    for hook in hooks:
        hook.remove()
    return found


def prompt_answers(model: SamMed3D, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    encoder, points, labels = model.prompt_encoder, given["points"], given["labels"]
    return {
        "dense_pe": encoder.dense_position(),
        "sparse_points": encoder.sparse(points[:1], labels[:1]),
        "sparse_points_b2": encoder.sparse(points, labels),
        "dense_nomask": encoder.dense(None),
        "dense_zeromask": encoder.dense(torch.zeros_like(given["mask"])),
        "dense_mask": encoder.dense(given["mask"]),
    }


def decoder_answers(model: SamMed3D, features: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks and IoU of the six calls that are stored, and one mask on the input's voxels."""
    points, labels, mask = given["points"], given["labels"], given["mask"]
    calls = {
        "click1": model.masks(features, points[:1], labels[:1], torch.zeros_like(mask)),
        "multi": model.masks(features, points[:1], labels[:1], mask, several=True),
        "click2": model.masks(features, points[:1], labels[:1], mask),
        "nomask": model.masks(features, points[:1], labels[:1]),
        "nopoint": model.masks(features, points[:1, :0], labels[:1, :0], mask),
        "batch2": model.masks(features, points, labels),
    }
    found = {f"{name}_masks": masks for name, (masks, _) in calls.items()}
    found |= {f"{name}_iou": iou for name, (_, iou) in calls.items()}
    return {**found, "click1_mask_full": model.upscaled(found["click1_masks"])}


@torch.inference_mode()
def answers(model: SamMed3D) -> dict[str, Tensor]:
    """Everything that is stored of a configuration."""
    given = tensors(model)
    encoded = encoder_answers(model, given["volume"])
    return {**encoded, **prompt_answers(model, given), **decoder_answers(model, encoded["image_embedding"], given)}


@dataclass(frozen=True)
class Run:
    """What one configuration gave, beside what it should give."""

    weights_sha256: str
    found: dict[str, Tensor]
    golden: dict[str, Golden]


def run(name: str) -> Run:
    config = load_config(name)
    weights = synthetic_weights(config.shapes)
    return Run(digest(weights), answers(with_weights(config, weights)), config.golden())


@pytest.fixture(scope="module")
def runs() -> Callable[[str], Run]:
    """`run`, which each configuration needs only once."""
    return cache(run)


# -------------------------------------------------------------------------------------------------- recipe and weights


def shapes_of_ours(config: Config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(one.shape) for name, one in SamMed3D(architecture(config)).state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_recipe_gives_the_weights_that_the_official_code_was_given(runs, name):
    expected = load_config(name).weights_sha256
    assert runs(name).weights_sha256 == expected, "the synthetic weights differ: no output can be compared"


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_have_the_published_names_in_the_published_order(name):
    ours, published = list(shapes_of_ours(load_config(name))), list(load_config(name).shapes)
    differing = [pair for pair in zip(ours, published, strict=False) if pair[0] != pair[1]]
    assert ours == published, f"{len(ours)} names, {len(published)} published; first that differ: {differing[:3]}"


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_have_the_published_shapes(name):
    config = load_config(name)
    differing = {key: shape for key, shape in shapes_of_ours(config).items() if shape != config.shapes.get(key)}
    assert not differing, f"shapes that are not those of the published checkpoint: {differing}"


def test_the_default_architecture_is_the_published_one():
    assert architecture(load_config("full")) == FULL


# -------------------------------------------------------------------------------------------------------------- golden


@pytest.mark.parametrize(("name", "output"), OUTPUTS)
def test_output_is_that_of_the_official_code(runs, name, output):
    deviation = runs(name).golden[output].deviation(runs(name).found[output])
    assert deviation.accepted(), f"{output}: {deviation}; expected the official code's output"


# --------------------------------------------------------------------- does the comparison see what it is there to see


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda array: array * 1.001, id="scaled by one thousandth"),
        pytest.param(lambda array: np.flip(array, 4), id="an axis reversed"),
        pytest.param(lambda array: array.swapaxes(2, 3), id="two axes exchanged"),
        pytest.param(lambda array: array[0], id="no batch axis"),
        pytest.param(lambda array: np.where(array == array.max(), np.nan, array), id="one value not a number"),
    ],
)
def test_comparison_refuses_a_spoiled_output(runs, spoil):
    found = runs("window3").found["image_embedding"].numpy()
    deviation = runs("window3").golden["image_embedding"].deviation(spoil(found))
    assert not deviation.accepted(), f"the spoiled output was accepted: {deviation}"


def test_comparison_sees_a_value_of_which_no_sample_is_stored():
    stored = load_config("full").golden()["click1_mask_full"]
    plain = np.zeros(stored.shape)
    spoiled = plain.copy()
    spoiled[0, 0, 0, 0, 0] = 1e4
    assert stored.deviation(spoiled).largest > stored.deviation(plain).largest, "the moments must show it"


@pytest.mark.parametrize("table", ["rel_pos_d", "rel_pos_h", "rel_pos_w"])
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("name", TINY)
def test_a_missing_table_of_relative_positions_is_detected(name, block, table):
    model = tiny_model(name)
    getattr(model.image_encoder.blocks[block].attn, table).zero_()
    deviation = load_config(name).golden()["image_embedding"].deviation(answers(model)["image_embedding"])
    assert not deviation.accepted(), f"without {table} of block {block} the output is still accepted: {deviation}"


Bias = Callable[[Attention, Tensor], Tensor]


def trained_bias(attention: Attention, q: Tensor) -> Tensor:
    """Section 2.4: queries (B, heads, n, n, n, size) of a padded window -> (B, heads, n, n, n, n, n, n)."""
    d, h, w = tables(attention)
    along_d = torch.einsum("zmabcs,als->zmabcl", q, d)  # Q[a,b,c]·Td[a,l]
    along_h = torch.einsum("zmabis,bls->zmabil", q, h)  # Q[a,b,i]·Th[b,l]
    along_w = torch.einsum("zmabjs,jls->zmabjl", q, w)  # Q[a,b,j]·Tw[j,l]
    return (
        along_d[:, :, :, :, :, None, None, :]
        + along_h[:, :, :, :, None, :, None, :]
        + along_w[:, :, :, :, None, None, :, :]
    )


def textbook_bias(attention: Attention, q: Tensor) -> Tensor:
    """Every table along its own axis; the published weights were not trained with it."""
    d, h, w = tables(attention)
    along_d = torch.einsum("zmabcs,ais->zmabci", q, d)
    along_h = torch.einsum("zmabcs,bjs->zmabcj", q, h)
    along_w = torch.einsum("zmabcs,cls->zmabcl", q, w)
    return along_d[..., :, None, None] + along_h[..., None, :, None] + along_w[..., None, None, :]


def scaled_bias(attention: Attention, q: Tensor) -> Tensor:
    """With the queries that the logits are made of, which are scaled."""
    return trained_bias(attention, q * q.shape[-1] ** -0.5)


def tables(attention: Attention) -> list[Tensor]:
    """T[u, v] = rel_pos[u - v + n - 1] for the three axes, each (n, n, size)."""
    n = attention.window
    rows = torch.tensor([[u - v + n - 1 for v in range(n)] for u in range(n)])
    return [table[rows] for table in (attention.rel_pos_d, attention.rel_pos_h, attention.rel_pos_w)]


def literal_attention(attention: Attention, tokens: Tensor, bias: Bias = trained_bias) -> Tensor:
    """Sections 2.3 and 2.4 word by word: pad with zeros, attend to every token, cut the padding off."""
    n = attention.window
    batch, d, h, w, channels = tokens.shape
    padded = tokens.new_zeros(batch, n, n, n, channels)
    padded[:, :d, :h, :w] = tokens
    q, k, v = (
        part.reshape(batch, n, n, n, attention.heads, -1).movedim(4, 1) for part in attention.qkv(padded).chunk(3, -1)
    )
    logits = torch.einsum("zmabcs,zmijls->zmabcijl", q, k) * q.shape[-1] ** -0.5 + bias(attention, q)
    share = logits.flatten(5).softmax(-1).unflatten(-1, (n, n, n))
    attended = torch.einsum("zmabcijl,zmijls->zmabcs", share, v)
    return attention.proj(attended.movedim(1, 4).flatten(4))[:, :d, :h, :w]


def with_bias(bias: Bias):
    def change(_, monkeypatch):
        monkeypatch.setattr(Attention, "forward", lambda attention, tokens: literal_attention(attention, tokens, bias))

    return change


def without_padding(_, monkeypatch):
    original = image_encoder._padding_logit
    monkeypatch.setattr(image_encoder, "_padding_logit", lambda *given: original(*given) - torch.inf)


def tables_exchanged(model, _):
    for block in model.image_encoder.blocks:
        block.attn.rel_pos_d, block.attn.rel_pos_h = block.attn.rel_pos_h, block.attn.rel_pos_d


def tanh_gelu(part: str):
    def change(model, _):
        for module in model.get_submodule(part).modules():
            if isinstance(module, nn.GELU):
                module.approximate = "tanh"

    return change


def epsilon(part: str, value: float):
    def change(model, _):
        for module in model.get_submodule(part).modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = value

    return change


def epsilon_over_channels(_, monkeypatch):
    def forward(norm: LayerNorm3d, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), norm.weight.shape, norm.weight, norm.bias, 1e-5).movedim(-1, 1)

    monkeypatch.setattr(LayerNorm3d, "forward", forward)


def position_in_the_axes_order(model, monkeypatch):
    original = model.prompt_encoder.dense_position
    monkeypatch.setattr(model.prompt_encoder, "dense_position", lambda: original().transpose(2, 3))


def points_at_the_corners_of_voxels(model, monkeypatch):
    original = model.prompt_encoder.sparse
    monkeypatch.setattr(model.prompt_encoder, "sparse", lambda points, labels: original(points - 0.5, labels))


def first_block_like_the_others(model, _):
    model.mask_decoder.transformer.layers[0].first = False


@pytest.mark.parametrize(
    ("change", "output"),
    [
        pytest.param(without_padding, "block0", id="padding left out of the softmax"),
        pytest.param(with_bias(textbook_bias), "block0", id="textbook relative positions"),
        pytest.param(with_bias(scaled_bias), "block0", id="relative positions of scaled queries"),
        pytest.param(tables_exchanged, "block0", id="two tables exchanged"),
        pytest.param(tanh_gelu("image_encoder"), "image_embedding", id="tanh GELU in the image encoder"),
        pytest.param(tanh_gelu("prompt_encoder"), "dense_mask", id="tanh GELU in the prompt encoder"),
        pytest.param(tanh_gelu("mask_decoder"), "click1_masks", id="tanh GELU in the mask decoder"),
        pytest.param(epsilon("image_encoder", 1e-5), "image_embedding", id="epsilon 1e-5 in the image encoder"),
        pytest.param(epsilon("mask_decoder", 1e-6), "click1_masks", id="epsilon 1e-6 in the mask decoder"),
        pytest.param(epsilon_over_channels, "image_embedding", id="epsilon 1e-5 in norms over channels"),
        pytest.param(position_in_the_axes_order, "dense_pe", id="position encoding in the order of the axes"),
        pytest.param(points_at_the_corners_of_voxels, "sparse_points", id="points at the corners of voxels"),
        pytest.param(first_block_like_the_others, "click1_masks", id="decoder's first block like the others"),
    ],
)
def test_a_wrong_formula_is_detected(monkeypatch, change, output):
    model = tiny_model()
    change(model, monkeypatch)
    deviation = load_config("window3").golden()[output].deviation(answers(model)[output])
    assert not deviation.accepted(), f"{output} is still accepted: {deviation}"


# --------------------------------------------------------------------------------------------------------- virtual key


def test_the_literal_attention_is_that_of_the_official_code(monkeypatch):
    model = tiny_model()
    with_bias(trained_bias)(model, monkeypatch)
    deviation = load_config("window3").golden()["image_embedding"].deviation(answers(model)["image_embedding"])
    assert deviation.accepted(), f"what the virtual key is compared with is wrong itself: {deviation}"


@pytest.mark.parametrize(
    ("extent", "window", "batch"),
    [
        pytest.param((3, 1, 2), 4, 2, id="unequal extents"),
        pytest.param((1, 1, 1), 4, 2, id="one token"),
        pytest.param((3, 4, 4), 4, 2, id="padded along the first axis"),
        pytest.param((4, 2, 4), 4, 2, id="padded along the second axis"),
        pytest.param((4, 4, 1), 4, 2, id="padded along the third axis"),
        pytest.param((4, 4, 4), 4, 2, id="no padding"),
        pytest.param((8, 8, 8), 14, 1, id="the published window"),
    ],
)
@torch.inference_mode()
def test_the_virtual_key_stands_for_all_padded_tokens(extent, window, batch):
    attention = Attention(8, 2, window).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(batch, *extent, 8, dtype=torch.float64)
    apart = float((attention(tokens) - literal_attention(attention, tokens)).abs().max())
    assert apart < 1e-10, f"{extent} of {window}³ tokens: {apart:.1e} from attention with the padding, expected < 1e-10"


# ------------------------------------------------------------------------------------------------------------ behaviour


def test_a_gradient_flows_through_the_decoder_to_the_prompts_mask():
    model = tiny_model()
    given = tensors(model)
    mask = given["mask"].requires_grad_()
    features = model.image_encoder(given["volume"])
    logits, _ = model.masks(features, given["points"][:1], given["labels"][:1], mask)
    logits.square().mean().backward()
    reached = float((mask.grad != 0).float().mean())
    assert reached > 0.99, f"the loss depends on every voxel of the mask, the gradient reaches {reached:.0%} of them"


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten().float(), b.flatten().float(), dim=0))


@pytest.mark.parametrize("name", TINY)
@torch.inference_mode()
def test_encoder_with_bfloat16_weights_stays_near_float32(name):
    model = tiny_model(name)
    volume = tensors(model)["volume"]
    exact = model.image_encoder(volume)
    near = cosine(model.bfloat16().image_encoder(volume.bfloat16()), exact)
    assert near > 0.99, f"cosine {near:.4f} between the features in bfloat16 and float32, expected > 0.99"


@pytest.mark.parametrize("name", TINY)
@torch.inference_mode()
def test_encoder_under_autocast_stays_near_float32(name):
    model = tiny_model(name)
    volume = tensors(model)["volume"]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.image_encoder(volume)
    near = cosine(rounded, model.image_encoder(volume))
    assert near > 0.99, f"cosine {near:.4f} between the features under autocast and in float32, expected > 0.99"


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1, 48, 48, 48), id="too small"),
        pytest.param((1, 1, 80, 80, 80), id="too large"),
        pytest.param((1, 1, 64, 64, 48), id="no cube"),
        pytest.param((1, 1, 70, 70, 70), id="a remainder that makes no patch"),
        pytest.param((1, 1, 16, 16, 16), id="one patch, which would be broadcast"),
        pytest.param((1, 2, 64, 64, 64), id="two channels"),
    ],
)
def test_encoder_refuses_an_input_of_another_size(shape):
    with pytest.raises((ValueError, RuntimeError)):
        tiny_model().image_encoder(torch.zeros(shape))
