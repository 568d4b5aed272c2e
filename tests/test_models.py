import pytest
import timm
import torch
from torch import nn

from torch_emc2.models import adapt_backbone, build_encoder, load_backbone, load_encoder, save_backbone, save_encoder
from torch_emc2.settings.model import ModelConfig


def images(channels=3, size=32, count=4):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def modules(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def trained(encoder):
    """Give every weight and running statistic a value of its own, as training would."""
    generator = torch.Generator().manual_seed(2)
    for tensor in encoder.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return encoder


def test_forward_is_head_of_backbone():
    config = ModelConfig("test_resnet", hidden_dim=24, out_dim=7, hidden_layers=2)
    encoder = build_encoder(config, 1, 28).eval()
    x = images(1, 28)
    hidden = encoder.backbone(x)
    assert hidden.shape == (4, encoder.feature_dim)
    for layer in (0, 2):
        hidden = torch.relu(hidden @ encoder.head[layer].weight.T + encoder.head[layer].bias)
    expected = hidden @ encoder.head[4].weight.T + encoder.head[4].bias
    torch.testing.assert_close(encoder(x), expected)
    assert expected.shape == (4, 7)
    torch.testing.assert_close(encoder.features(x), encoder.backbone(x))


def test_hidden_feature_is_the_first_hidden_layer_after_relu():
    encoder = build_encoder(ModelConfig("test_resnet", hidden_dim=24, feature="hidden"), 3, 32).eval()
    expected = torch.relu(encoder.head[0](encoder.backbone(images())))
    torch.testing.assert_close(encoder.features(images()), expected)
    assert encoder.feature_dim == 24


def test_head_without_hidden_layers_is_linear_and_has_no_hidden_feature():
    assert len(build_encoder(ModelConfig("test_resnet", hidden_layers=0), 3, 32).head) == 1
    with pytest.raises(ValueError, match="hidden_layers to 1 or more"):
        build_encoder(ModelConfig("test_resnet", hidden_layers=0, feature="hidden"), 3, 32)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "mobilenetv3_small_050", "test_vit"])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_any_backbone_with_any_norm(name, norm):
    encoder = build_encoder(ModelConfig(name, norm), 1, 32)
    reference = timm.create_model(name, num_classes=0)
    assert len(modules(encoder, nn.LayerNorm)) == len(modules(reference, nn.LayerNorm))
    assert len(modules(encoder, nn.BatchNorm2d)) == (len(modules(reference, nn.BatchNorm2d)) if norm == "batch" else 0)
    if norm == "group":
        assert len(modules(encoder, nn.GroupNorm)) == len(modules(reference, nn.BatchNorm2d))
    assert encoder.training
    feature = encoder.features(images(1))
    assert feature.shape == (4, encoder.feature_dim)
    feature.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.backbone.parameters())


@pytest.mark.parametrize("norm", ["group", "none"])
def test_fused_norms_keep_their_activation(norm):
    """Without the activation a batch-norm-free EfficientNet stem would let negative values through."""
    backbone = timm.create_model("test_efficientnet", num_classes=0)
    activation, x = backbone.bn1.act, images(backbone.bn1.num_features)
    adapt_backbone(backbone, norm, small_stem=False)
    expected = x if norm == "none" else nn.functional.group_norm(x, backbone.bn1.num_groups)
    torch.testing.assert_close(backbone.bn1(x.clone()), activation(expected.clone()))


def test_without_norms_images_do_not_see_each_other():
    encoder = build_encoder(ModelConfig("test_resnet", "none"), 3, 32)
    x = images()
    torch.testing.assert_close(encoder(x)[:1], encoder(x[:1]), rtol=1e-4, atol=1e-6)


def test_group_norm_keeps_the_scale_that_starts_a_block_as_the_identity():
    encoder = build_encoder(ModelConfig("resnet18", "group"), 3, 32)
    block = encoder.backbone.layer1[0]
    assert block.bn2.weight.abs().max() == 0
    assert block.bn1.weight.min() == 1
    assert (block.bn2.num_groups, block.bn2.num_channels) == (32, 64)


@pytest.mark.parametrize(("channels", "groups"), [(512, 32), (64, 32), (24, 12), (16, 8), (17, 1), (48, 24), (1, 1)])
def test_groups_divide_the_channels_and_hold_at_least_two(channels, groups):
    model = adapt_backbone(nn.Sequential(nn.BatchNorm2d(channels)), "group", small_stem=False)
    assert model[0].num_groups == groups


@pytest.mark.parametrize("name", ["resnet18", "test_resnet"])  # a plain stem, and a deep one
def test_small_stem_keeps_the_resolution(name):
    small = build_encoder(ModelConfig(name), 1, 28).backbone
    standard = build_encoder(ModelConfig(name, stem="standard"), 1, 28).backbone
    x = images(1, 28)
    assert small.maxpool(small.conv1(x)).shape[-1] == 28
    assert standard.maxpool(standard.conv1(x)).shape[-1] == 7
    assert {module.kernel_size for module in modules(small.conv1, nn.Conv2d)} == {(3, 3)}


def test_auto_stem_is_small_up_to_64_pixels_where_there_is_one():
    assert isinstance(build_encoder(ModelConfig("test_resnet"), 3, 64).backbone.maxpool, nn.Identity)
    assert isinstance(build_encoder(ModelConfig("test_resnet"), 3, 65).backbone.maxpool, nn.MaxPool2d)
    assert build_encoder(ModelConfig("test_efficientnet"), 3, 32).backbone.conv_stem.stride == (2, 2)
    with pytest.raises(ValueError, match=r"'test_efficientnet' has no conv1 and maxpool.*stem='standard'"):
        build_encoder(ModelConfig("test_efficientnet", stem="small"), 3, 32)


def test_errors_name_the_backbone_and_the_fix():
    with pytest.raises(ValueError, match=r"no backbone 'resnet81'; close: .*resnet18"):
        build_encoder(ModelConfig("resnet81"), 3, 32)
    for name in ("test_convnext", "test_vit"):  # too small for the strides; not a multiple of the patch size
        with pytest.raises(ValueError, match=rf"'{name}' cannot take 20x20 images.*use another size"):
            build_encoder(ModelConfig(name), 3, 20)


def test_timm_loads_the_saved_backbone(tmp_path):
    encoder = trained(build_encoder(ModelConfig("test_resnet", stem="standard"), 1, 32)).eval()
    save_backbone(encoder, tmp_path / "encoder.safetensors")
    model = timm.create_model(
        "test_resnet", num_classes=0, in_chans=1, checkpoint_path=str(tmp_path / "encoder.safetensors")
    ).eval()
    torch.testing.assert_close(model(images(1)), encoder.features(images(1)), rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["group", "none"])
def test_timm_loads_an_adapted_backbone_after_the_same_change(norm, tmp_path):
    encoder = trained(build_encoder(ModelConfig("test_efficientnet", norm), 1, 32)).eval()
    save_backbone(encoder, tmp_path / "encoder.safetensors")
    model = adapt_backbone(timm.create_model("test_efficientnet", num_classes=0, in_chans=1), norm, small_stem=False)
    timm.models.load_checkpoint(model, str(tmp_path / "encoder.safetensors"))
    torch.testing.assert_close(model.eval()(images(1)), encoder.features(images(1)), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_files_rebuild_the_encoder_by_themselves(name, norm, tmp_path):
    encoder = trained(build_encoder(ModelConfig(name, norm, hidden_dim=24, feature="hidden"), 1, 32)).eval()
    save_encoder(encoder, tmp_path)
    loaded = load_encoder(tmp_path)
    assert loaded.config == encoder.config
    torch.testing.assert_close(loaded(images(1)), encoder(images(1)), rtol=0, atol=0)
    torch.testing.assert_close(loaded.features(images(1)), encoder.features(images(1)), rtol=0, atol=0)
    backbone = load_backbone(tmp_path / "encoder.safetensors")
    torch.testing.assert_close(backbone(images(1)), encoder.backbone(images(1)), rtol=0, atol=0)


def test_channels_last_weights_can_be_saved(tmp_path):
    encoder = build_encoder(ModelConfig("test_resnet"), 3, 32).to(memory_format=torch.channels_last).eval()
    save_backbone(encoder, tmp_path / "encoder.safetensors")
    loaded = load_backbone(tmp_path / "encoder.safetensors")
    torch.testing.assert_close(loaded(images()), encoder.backbone(images()))


def test_foreign_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors' cannot be loaded.* does not say how its model is built"):
        load_backbone(tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["encoder.safetensors", "head.safetensors"])
def test_a_damaged_file_is_named(name, tmp_path):
    save_encoder(build_encoder(ModelConfig("test_resnet"), 3, 32), tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:99])
    with pytest.raises(ValueError, match=rf"{name}' cannot be loaded, it is damaged"):
        load_encoder(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_encoder(tmp_path)


def test_a_frozen_backbone_stays_so_whatever_mode_others_put_it_in():
    encoder = build_encoder(ModelConfig("test_resnet"), 3, 32)
    encoder.freeze(True)
    encoder.train()  # as a probe does when it has looked
    encoder.freeze(True)
    assert not any(module.training for module in encoder.backbone.modules())
    encoder.freeze(False)
    assert all(module.training for module in encoder.backbone.modules())
