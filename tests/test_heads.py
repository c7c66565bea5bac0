"""The level head, channel dropout, marks, and augmentation that does not leak."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nelbo.data.augmentation import Affine
from nelbo.losses import Augmented
from nelbo.networks.heads import Ensemble, LevelHead, channel_dropout, level_basis
from nelbo.networks.layers import Dropout, Marked
from nelbo.networks.unet import UNet
from nelbo.objectives import Simple
from nelbo.recipes.build import build
from nelbo.recipes.options import Digits


class Constant(nn.Module):
    """Gives the same (B, channels, H, W) whatever it reads."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.value.expand(len(x_t), -1, -1, -1)


def test_a_silent_network_leaves_the_frequencies() -> None:
    frequencies = torch.rand(2, 5, 3, 4).softmax(1)
    silent = Constant(torch.zeros(1, LevelHead.channels(2, 3), 3, 4))
    head = LevelHead(silent, (2, 3, 4), levels=5, waves=3)
    head.start_at(frequencies)
    logits = head(torch.zeros(6, 2, 3, 4), torch.zeros(()))
    assert logits.shape == (6, 10, 3, 4)
    masses = logits.unflatten(1, (2, 5)).softmax(2)
    torch.testing.assert_close(masses, frequencies.expand(6, -1, -1, -1, -1))


def test_each_output_moves_its_own_function_of_the_level() -> None:
    basis = level_basis(17, 8)
    assert basis.shape == (10, 17)
    assert torch.linalg.matrix_rank(basis.double()) == 10
    assert basis[8].nonzero().tolist() == [[0]] and basis[9].nonzero().tolist() == [[16]]
    values = torch.zeros(1, 20, 1, 1)
    values[0, 13] = 2.0  # second data channel, fourth function
    logits = LevelHead(Constant(values), (2, 1, 1), 17)(torch.zeros(1, 2, 1, 1), torch.zeros(()))
    torch.testing.assert_close(logits[0, 17:, 0, 0], 2 * basis[3])
    assert not logits[0, :17].any()


def test_channel_dropout_keeps_tensors_and_drops_channels() -> None:
    settings = {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "dropout": 0.5,
        "sample_size": 8,
    }
    plain, dropping = UNet(**settings), channel_dropout(UNet(**settings))
    assert list(plain.state_dict()) == list(dropping.state_dict())
    layers = [m for m in dropping.modules() if isinstance(m, Dropout) and m.channels]
    assert layers and all(m.p == 0.5 for m in layers)
    assert not any(isinstance(m, Dropout) and not m.channels for m in dropping.modules())
    seen = layers[0].train()(torch.ones(4, 64, 5, 5))
    whole = (seen == 0).flatten(2).all(2) | (seen == 2).flatten(2).all(2)
    assert whole.all()


def test_augmentation_marks_what_it_changes_and_stays_on_the_levels() -> None:
    torch.manual_seed(0)
    dataset = build(Digits()).dataset
    x_0 = dataset.encode(dataset.train[:512])
    moved, marks = Affine(17, share=0.4)(x_0)
    changed = (moved != x_0).flatten(1).any(1)
    assert torch.equal(changed & (marks == 0), torch.zeros(512, dtype=torch.bool))
    assert changed[marks == 1].float().mean() > 0.9
    # binomial(512, .4): 6 standard deviations, false alarm below 1e-8
    assert abs(int(marks.sum()) - 205) < 6 * 11.1
    level = (moved + 1) * 8
    torch.testing.assert_close(level, level.round(), atol=1e-5, rtol=0)
    assert level.min() >= 0 and level.max() <= 16
    # small moves: the images stay close to themselves, far closer than to each other
    apart = (x_0[:256] - x_0[256:]).square().mean()
    assert (moved - x_0).square().mean() < 0.4 * apart


def test_share_zero_changes_nothing() -> None:
    x_0 = torch.randint(0, 17, (8, 1, 8, 8)) / 8 - 1
    moved, marks = Affine(17, share=0.0)(x_0)
    assert torch.equal(moved, x_0) and not marks.any()


def test_the_measured_model_is_the_one_under_mark_zero() -> None:
    class Echo(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            assert cond is not None
            return cond.float()[:, None, None, None].expand_as(x_t)

    x = torch.zeros(3, 1, 2, 2)
    network = Marked(Echo())
    assert not network(x, torch.zeros(())).any()
    marks = torch.tensor([0, 1, 1])
    assert network(x, torch.zeros(()), marks).flatten(1).mean(1).tolist() == [0, 1, 1]


def test_the_objective_passes_the_marks_on() -> None:
    small = {"channels": 8, "head_dim": 8, "multipliers": (1,), "attention": (), "latents": 10}
    recipe = build(Digits(augment=1.0, **small))
    assert isinstance(recipe.objective, Augmented)
    seen: list[Tensor] = []
    recipe.model.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    x_0 = recipe.dataset.encode(recipe.dataset.train[:4])
    values = recipe.objective(recipe.model, x_0)
    assert values.shape == (4,) and seen[0].tolist() == [1, 1, 1, 1]
    fixed = Augmented(Simple(recipe.times), lambda x: (x, torch.zeros(len(x)).long()))
    fixed(recipe.model, x_0)
    assert seen[1].tolist() == [0, 0, 0, 0]


def test_an_ensemble_splits_batches_in_training_and_averages_afterwards() -> None:
    ones, threes = (Constant(torch.full((1, 1, 1, 1), v)) for v in (1.0, 3.0))
    both = Ensemble([ones, threes])
    x = torch.zeros(5, 1, 1, 1)
    assert both.train()(x, torch.rand(5)).flatten().tolist() == [1, 3, 1, 3, 1]
    assert both.eval()(x, torch.rand(5)).flatten().tolist() == [2] * 5


def test_members_learn_apart_from_their_own_rows() -> None:
    torch.manual_seed(0)
    members = [nn.Conv2d(1, 1, 1) for _ in range(2)]

    class Called(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            assert t.shape == (len(x_t),)
            return self.layer(x_t)

    both = Ensemble([Called(m) for m in members]).train()
    x = torch.randn(6, 1, 2, 2)
    both(x, torch.zeros(6))[1::2].sum().backward()
    assert members[1].weight.grad is not None and members[1].weight.grad.abs() > 0
    assert members[0].weight.grad is None or not members[0].weight.grad.any()
    for k, member in enumerate(members):
        torch.testing.assert_close(both(x, torch.zeros(6))[k::2], member(x[k::2]))
