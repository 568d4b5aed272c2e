import pytest
import torch
from torch import nn

from torch_emc2.evaluation import extract_features, raw_pixels


class Images:
    def __init__(self, count=10):
        self.pixels = torch.randint(
            0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )

    def __len__(self):
        return len(self.pixels)

    def image(self, index):
        return self.pixels[index]


def halve(image):
    return image[:, ::2, ::2].float() / 255


@pytest.mark.parametrize("batch_size", [1, 3, 10, 256])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_follow_the_data_set(batch_size, num_workers):
    images = Images()
    features = extract_features(nn.Flatten(), images, halve, batch_size=batch_size, num_workers=num_workers)
    torch.testing.assert_close(features, images.pixels[:, :, ::2, ::2].reshape(10, 12) / 255, rtol=0, atol=0)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.Dropout().eval()

    def features(self, images):
        assert not torch.is_grad_enabled()
        return self.frozen(self.norm(images)).flatten(1).double()

    forward = features


@pytest.mark.parametrize("pick", [lambda model: model, lambda model: model.features], ids=["module", "method"])
def test_module_is_in_evaluation_mode_for_the_while_only(pick):
    model = Model()
    features = extract_features(pick(model), Images(), halve)
    expected = Images().pixels[:, :, ::2, ::2].reshape(10, 12) / 255 / (1 + model.norm.eps) ** 0.5
    torch.testing.assert_close(features, expected)
    assert features.dtype == torch.float32
    assert (model.training, model.norm.training, model.frozen.training) == (True, True, False)
    assert model.norm.num_batches_tracked == 0


def test_modes_come_back_after_an_error():
    model = Model()
    with pytest.raises(RuntimeError):
        extract_features(model, Images(), lambda image: image[:2].float())
    assert model.norm.training


def test_raw_pixels_are_the_images_or_means_of_their_squares():
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(raw_pixels(images), images.reshape(4, 3072))
    large = images.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    torch.testing.assert_close(raw_pixels(large), images.reshape(4, 3072))
