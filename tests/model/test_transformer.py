import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cytosyn_aug.model.encoder import TileEncoder
from cytosyn_aug.model.transformer import SiT

SMALL = {
    "input_size": 8,
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 2,
    "conditioning_dim": 6,
    "encoder_depth": 2,
    "z_dims": (6,),
    "projector_dim": 16,
}


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_xl_parameter_counts_are_cytosyns():
    with torch.device("meta"):
        assert count(SiT()) == 682_906_128
        assert count(SiT(z_dims=())) == 674_774_800


def test_encoder_defaults_have_h0_minis_parameter_count_and_tokens():
    with torch.device("meta"):
        encoder = TileEncoder()
        features = encoder(torch.zeros(1, 3, 224, 224, dtype=torch.uint8, device="meta"))
    assert count(encoder) == 85_739_520
    assert features.cls.shape == (1, 768)
    assert features.patches.shape == (1, 256, 768)


def test_state_dict_names_and_shapes_are_repa_es():
    with torch.device("meta"):
        state = SiT().state_dict()
    block = {
        "attn.qkv.weight": (3456, 1152),
        "attn.qkv.bias": (3456,),
        "attn.proj.weight": (1152, 1152),
        "attn.proj.bias": (1152,),
        "mlp.fc1.weight": (4608, 1152),
        "mlp.fc1.bias": (4608,),
        "mlp.fc2.weight": (1152, 4608),
        "mlp.fc2.bias": (1152,),
        "adaLN_modulation.1.weight": (6912, 1152),
        "adaLN_modulation.1.bias": (6912,),
    }
    want = {
        "pos_embed": (1, 196, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "x_embedder.proj.bias": (1152,),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.0.bias": (1152,),
        "t_embedder.mlp.2.weight": (1152, 1152),
        "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.linear.weight": (1152, 768),
        "y_embedder.linear.bias": (1152,),
        "projectors.0.0.weight": (2048, 1152),
        "projectors.0.0.bias": (2048,),
        "projectors.0.2.weight": (2048, 2048),
        "projectors.0.2.bias": (2048,),
        "projectors.0.4.weight": (768, 2048),
        "projectors.0.4.bias": (768,),
        "final_layer.linear.weight": (16, 1152),
        "final_layer.linear.bias": (16,),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
        "final_layer.adaLN_modulation.1.bias": (2304,),
        "bn.running_mean": (4,),
        "bn.running_var": (4,),
        "bn.num_batches_tracked": (),
    } | {f"blocks.{n}.{k}": v for n in range(28) for k, v in block.items()}
    assert {k: tuple(v.shape) for k, v in state.items()} == want


def test_an_untrained_transformer_is_zero():
    out = SiT(**SMALL)(torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 6))
    assert out.shape == (2, 4, 8, 8)
    assert out.abs().max() == 0


@pytest.fixture
def random_sit():
    torch.manual_seed(0)
    network = SiT(**SMALL).eval()
    for parameter in network.parameters():  # zero-initialised layers would hide errors
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return network


@pytest.fixture
def student(random_sit):
    """The same weights, the first two of three blocks at t, with an untaught guidance scale."""
    settings = SMALL | {"decoupled_depth": 2, "taught_guidance": (3.0, 0.0, 0.75)}
    network = SiT(**settings).eval()
    found = network.load_state_dict(random_sit.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all(k.startswith("guidance_embedder.") for k in found.missing_keys)
    return network


def inputs(num=2):
    draw = torch.Generator().manual_seed(0)
    t, r = torch.rand(2, num, generator=draw).sort(0, descending=True).values
    x, condition = torch.randn(num, 4, 8, 8, generator=draw), torch.randn(num, 6, generator=draw)
    return x, t, condition, r


def test_a_split_adds_no_parameter():
    split = SiT(**SMALL | {"decoupled_depth": 2})
    assert list(split.state_dict()) == list(SiT(**SMALL).state_dict())


@pytest.mark.parametrize("scale", [None, 1.0, 2.5])
@pytest.mark.parametrize("with_r", [False, True])
def test_an_untaught_student_at_r_equal_t_is_its_teacher_bit_for_bit(
    random_sit, student, with_r, scale
):
    x, t, condition, _ = inputs()
    guidance = None if scale is None else torch.full_like(t, scale)
    got = student(x, t, condition, t.clone() if with_r else None, guidance)
    assert torch.equal(got, random_sit(x, t, condition))


def test_only_the_last_blocks_see_r(student):
    """The tokens after block 2 (`encoder_depth`, the split) depend on t alone."""
    x, t, condition, r = inputs()
    u, tokens = student.forward_tokens(x, t, condition, r)
    v, same = student.forward_tokens(x, t, condition, t)
    assert torch.equal(tokens, same)
    assert not torch.allclose(u, v)
    assert not torch.equal(student.forward_tokens(x, r, condition, r)[1], tokens)


def test_a_taught_guidance_scale_changes_the_jump_and_one_is_the_default(student):
    torch.nn.init.normal_(student.guidance_embedder.mlp[2].weight)
    x, t, condition, r = inputs()
    plain = student(x, t, condition, r)
    assert torch.equal(plain, student(x, t, condition, r, torch.ones_like(t)))
    assert not torch.allclose(plain, student(x, t, condition, r, torch.full_like(t, 2.0)))


def test_a_plain_trunk_refuses_jumps_and_guidance(random_sit):
    x, t, condition, r = inputs()
    with pytest.raises(ValueError, match="a plain trunk knows no jumps"):
        random_sit(x, t, condition, r)
    with pytest.raises(ValueError, match="takes no guidance scale"):
        random_sit(x, t, condition, guidance_B=torch.ones_like(t))


@pytest.mark.parametrize("depth", [0, 3])
def test_a_split_that_leaves_no_block_is_refused(depth):
    with pytest.raises(ValueError, match=f"decoupled_depth is {depth}, expected 1 to 2"):
        SiT(**SMALL | {"decoupled_depth": depth})


def test_forward_mode_derivatives_are_those_of_differences(student):
    """Along a direction in latents and time; float64, hence a small step."""
    network = torch.nn.Module.to(student, torch.float64)
    x, t, condition, r = (y.double() for y in inputs())
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with sdpa_kernel(SDPBackend.MATH):
        _, derivative = torch.func.jvp(
            lambda x, t: network(x, t, condition, r), (x, t), (v, torch.ones_like(t))
        )
    h = 1e-3  # the time embedding is float32, and limits how small it may be
    ahead, behind = (network(x + s * v, t + s, condition, r) for s in (h, -h))
    difference = (ahead - behind) / (2 * h)
    assert (derivative - difference).norm() < 1e-3 * derivative.norm()


def test_a_batch_is_its_rows(random_sit):
    x, t, c = torch.randn(3, 4, 8, 8), torch.rand(3), torch.randn(3, 6)
    rows = torch.cat([random_sit(x[i : i + 1], t[i : i + 1], c[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(random_sit(x, t, c), rows, rtol=1e-4, atol=1e-5)


def test_time_and_condition_change_the_velocity(random_sit):
    x, t, c = torch.randn(1, 4, 8, 8), torch.tensor([0.3]), torch.randn(1, 6)
    base = random_sit(x, t, c)
    assert not torch.allclose(base, random_sit(x, t + 0.4, c))
    assert not torch.allclose(base, random_sit(x, t, c + 1))


def test_positions_encode_columns_first():
    positions = SiT(**SMALL).pos_embed[0].unflatten(0, (4, 4))
    # The first half of the width is constant down a column, the second along a row.
    torch.testing.assert_close(positions[0, 2, :16], positions[3, 2, :16])
    torch.testing.assert_close(positions[2, 0, 16:], positions[2, 3, 16:])
    assert not torch.allclose(positions[0, 0, :16], positions[0, 1, :16])


def test_unpatchify_puts_every_token_in_its_place():
    network = SiT(**SMALL)
    tokens = torch.arange(16 * 16, dtype=torch.float32).view(1, 16, 16)
    image = network._unpatchify(tokens)
    # Token of row 1, column 2; patch row 1, column 0; channel 3: (p q c) order.
    assert image[0, 3, 2 * 1 + 1, 2 * 2 + 0] == tokens[0, 1 * 4 + 2, (1 * 2 + 0) * 4 + 3]


def test_whitening_inverts_and_uses_the_buffers(random_sit):
    random_sit.bn.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    random_sit.bn.running_var.copy_(torch.tensor([4.0, 1.0, 0.25, 9.0]))
    z = torch.randn(2, 4, 8, 8)
    white = random_sit.whiten(z)
    torch.testing.assert_close(white[:, 0], (z[:, 0] - 1) / 2)
    torch.testing.assert_close(random_sit.unwhiten(white), z)


def test_it_compiles_without_graph_breaks(random_sit):
    x, t, c = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 6)
    compiled = torch.compile(random_sit, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, t, c), random_sit(x, t, c))


def test_jumps_compile_without_graph_breaks(student):
    x, t, condition, r = inputs()
    compiled = torch.compile(student, fullgraph=True, backend="eager")
    scale = torch.full_like(t, 2.0)
    torch.testing.assert_close(
        compiled(x, t, condition, r, scale), student(x, t, condition, r, scale)
    )


def test_a_block_is_adaln_zero_as_it_is_written(random_sit):
    """Peebles and Xie (2023), figure 3: shift, scale and gate of attention, then of the MLP."""
    block, final = random_sit.blocks[0], random_sit.final_layer
    width = random_sit.config["hidden_size"]
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(2, random_sit.grid_size**2, width, generator=draw)
    c = torch.randn(2, width, generator=draw)

    def norm(x):
        return F.layer_norm(x, (width,), eps=1e-6)

    with torch.no_grad():
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            x[:, None] for x in block.adaLN_modulation(c).chunk(6, dim=1)
        )
        expected = h + gate1 * block.attn(norm(h) * (1 + scale1) + shift1)
        expected = expected + gate2 * block.mlp(norm(expected) * (1 + scale2) + shift2)
        torch.testing.assert_close(block(h, block.modulate(c)), expected)
        shift, scale = (x[:, None] for x in final.adaLN_modulation(c).chunk(2, dim=1))
        expected = final.linear(norm(h) * (1 + scale) + shift)
        torch.testing.assert_close(final(h, final.modulate(c)), expected)
