"""Features: fitted, trained, random and the user's own, each with a hash that means something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nelbo.data.embedded import digits
from nelbo.errors import InputRefused, NumericalFailure
from nelbo.extractors import Features, Inputs, digest_of, standardized, whitened
from nelbo.featurenets import Labelled, classifier, random_network
from nelbo.interop.modules import opened
from nelbo.randomness import generator, seeded

IMAGES = Inputs((1, 8, 8), 17)


def vectors(seed: int, n: int = 200, dims: int = 4) -> Tensor:
    mixing = torch.randn(dims, dims, dtype=torch.float64, generator=generator(0, "mixing"))
    draws = generator(seed, "test extractors")
    return torch.randn(n, dims, dtype=torch.float64, generator=draws) @ mixing + 3


def images(n: int, seed: int = 0) -> Tensor:
    draws = generator(seed, "test images")
    return torch.randint(0, 17, (n, 1, 8, 8), generator=draws).byte()


def test_standardised_vectors_have_unit_variance_and_images_share_one_scale() -> None:
    fit = vectors(0)
    found = standardized(fit).features(fit)
    assert found.dtype == torch.float64
    assert torch.allclose(found.mean(0), torch.zeros(4).double(), atol=1e-12)
    assert torch.allclose(found.var(0, correction=0), torch.ones(4).double())
    levels = images(50)
    levels[:, :, 0, 0] = 3
    levels[0, :, 0, 0] = 4
    x = standardized(levels, 17).features(levels)
    assert x.shape == (50, 64) and float(x.var(0, correction=0).mean()) == pytest.approx(1)
    step = float((x[0] - x[1])[0]) / float((levels[0] - levels[1])[0, 0, 0])
    assert torch.allclose(x[0] - x[1], step * (levels[0].double() - levels[1].double()).flatten())


def test_whitened_features_are_white_and_are_the_first_components() -> None:
    fit = vectors(1)
    found = whitened(fit, 3).features(fit)
    assert torch.allclose(torch.cov(found.T), torch.eye(3).double(), atol=1e-10)
    values, vectors_ = torch.linalg.eigh(torch.cov(fit.T))
    first = (fit - fit.mean(0)) @ vectors_[:, -1] / values[-1].sqrt()
    assert torch.allclose(found[:, 0].abs(), first.abs())
    assert whitened(fit, 3).hash == whitened(fit.clone(), 3).hash


@pytest.mark.parametrize("k", [0, 5])
def test_more_components_than_directions_are_refused(k: int) -> None:
    with pytest.raises(InputRefused, match="ask for 1 to 4"):
        whitened(vectors(0), k)
    with pytest.raises(InputRefused, match="directions"):
        whitened(vectors(0, n=4), 4)


def test_constant_rows_are_refused() -> None:
    fit = vectors(0)
    fit[:, 2] = 1
    with pytest.raises(InputRefused, match=r"\[2\]"):
        standardized(fit)
    with pytest.raises(InputRefused, match="0 directions"):
        whitened(torch.ones(9, 3), 1)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (images(3).float(), "type and range"),
        (images(3) * 2 + 1, "uint8 levels 0..16"),
        (images(3)[:, :, :7], "features are of"),
        (images(3)[:0], "features are of"),
    ],
)
def test_examples_of_another_kind_are_refused(rows: Tensor, words: str) -> None:
    with pytest.raises(InputRefused, match=words):
        random_network(IMAGES).features(rows)


def test_vectors_that_are_not_finite_or_levels_are_refused() -> None:
    extractor = standardized(vectors(0))
    with pytest.raises(InputRefused, match="NaN"):
        extractor.features(torch.full((2, 4), torch.nan))
    with pytest.raises(InputRefused, match="real vectors"):
        extractor.features(torch.zeros(2, 4, dtype=torch.uint8))
    with pytest.raises(InputRefused, match="reads images"):
        random_network(extractor.inputs)


def test_the_hash_is_that_of_everything_the_features_depend_on() -> None:
    one = random_network(IMAGES)
    assert one.hash == random_network(IMAGES).hash and len(one.hash) == 64
    others = [
        random_network(IMAGES, seed=1),
        random_network(Inputs((1, 8, 8), 256)),
        random_network(Inputs((1, 9, 8), 17)),
    ]
    assert len({one.hash, *(other.hash for other in others)}) == 4
    assert standardized(vectors(0)).hash != standardized(vectors(1)).hash
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    changed = [
        {"a": torch.zeros(2, 3), "b": torch.full((1,), 1e-30)},
        {"a": torch.zeros(3, 2), "b": torch.zeros(1)},
        {"a": torch.zeros(2, 3), "c": torch.zeros(1)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(1, dtype=torch.int32)},
    ]
    assert len({digest_of(state), *map(digest_of, changed)}) == 5
    assert digest_of(state) == digest_of(dict(reversed(state.items())))


def test_random_features_see_single_examples_and_leave_the_generators_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    extractor, rows = random_network(IMAGES), images(300)
    found = extractor.features(rows)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.shape == (300, extractor.dims) == (300, 192)
    assert torch.allclose(found[[7, 290]], extractor.features(rows[[7, 290]]), atol=1e-5)
    assert float(found.std(0).min()) > 0 and float(found.std(0).max()) < 5


@pytest.mark.parametrize(("size", "dims"), [(1, 16), (2, 16 * 5), (4, 16 * 9)])
def test_random_features_of_tiny_images(size: int, dims: int) -> None:
    assert random_network(Inputs((3, size, size), 256)).dims == dims


DIGITS = digits()


def labelled(start: int, stop: int) -> Labelled:
    assert DIGITS.labels is not None
    return Labelled(DIGITS.train[start:stop], DIGITS.labels["train"][start:stop])


def test_a_classifier_of_digits_states_its_held_out_accuracy() -> None:
    train, held = labelled(0, 400), labelled(400, 700)
    one = classifier(train, held, levels=17, dims=32, epochs=9)
    words = one.note.split()
    assert words[:1] == ["accuracy"] and "300 held-out examples" in one.note
    assert float(words[1]) > 80
    found = one.features(train.rows)
    assert found.shape == (400, 32) and float(found.mean(0).abs().max()) < 1e-4
    centres = torch.stack([found[train.classes == c].mean(0) for c in range(10)])
    nearest = torch.cdist(one.features(held.rows), centres).argmin(1)
    assert float((nearest == held.classes).double().mean()) > 0.8


def test_a_classifier_is_a_function_of_its_seed() -> None:
    train, held = labelled(0, 60), labelled(60, 80)
    made = [
        classifier(train, held, levels=17, dims=16, epochs=2, seed=seed).hash for seed in (0, 0, 1)
    ]
    assert made[0] == made[1] != made[2]


def test_a_classifier_of_vectors() -> None:
    x = vectors(0)
    classes = (x[:, 0] > x[:, 1]).long()
    train, held = Labelled(x[:150], classes[:150]), Labelled(x[150:], classes[150:])
    found = classifier(train, held, dims=16, epochs=20)
    assert float(found.note.split()[1]) > 85 and found.dims == 16
    scrambled = Labelled(x[150:], 1 - classes[150:])
    note = classifier(train, scrambled, dims=16, epochs=20).note
    assert float(note.split()[1]) < 15, "the accuracy is that of the held-out examples"


def test_labels_that_do_not_fit_are_refused() -> None:
    train = labelled(0, 40)
    for classes in (train.classes[:7], train.classes.float(), train.classes - 1):
        with pytest.raises(InputRefused, match="one integer"):
            classifier(Labelled(train.rows, classes), train, levels=17)
    with pytest.raises(InputRefused, match="one class"):
        classifier(Labelled(train.rows, train.classes * 0), train, levels=17)
    with pytest.raises(InputRefused, match="multiple of 16"):
        classifier(train, train, levels=17, dims=20)


class Normed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0


def test_modules_that_are_no_function_of_the_example_are_refused() -> None:
    inputs = Inputs((4,), None)
    with pytest.raises(InputRefused, match="rest of its batch"):
        Features("normed", inputs, Normed()).features(vectors(0))
    with pytest.raises(NumericalFailure, match="NaN or infinite"):
        Features("broken", inputs, Broken()).features(vectors(0))
    with pytest.raises(InputRefused, match="expected a tensor"):
        Features("images", Inputs((1, 4, 4), 256), nn.Identity())
    with pytest.raises(InputRefused, match=r"refuses \(2, 4\)"):
        Features("narrow", inputs, nn.Linear(3, 2))


CODE = """
import torch
def embed():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5), torch.nn.Dropout())
def number():
    return 3
def fails():
    raise RuntimeError("no such layer")
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


def weights(path: Path, seed: int = 0) -> Path:
    with seeded(seed, "weights"):
        save_file({"1.weight": torch.randn(5, 64), "1.bias": torch.randn(5)}, path)
    return path


def test_a_module_by_path_with_weights_by_path(code: Path, tmp_path: Path) -> None:
    file = weights(tmp_path / "w.safetensors")
    mine, rows = opened(f"{code}:embed", IMAGES, file), images(20)
    with seeded(0, "weights"):
        weight, bias = torch.randn(5, 64), torch.randn(5)
    expected = (rows.flatten(1).double() / 8 - 1).float() @ weight.T + bias
    assert torch.allclose(mine.features(rows).float(), expected, atol=1e-4)
    assert mine.name == "mine.py:embed" and "w.safetensors sha256" in mine.note
    assert mine.as_json()["dims"] == 5


def test_the_hash_of_a_module_is_that_of_both_files(code: Path, tmp_path: Path) -> None:
    file = weights(tmp_path / "w.safetensors")
    hashes = [opened(f"{code}:embed", IMAGES, file).hash, opened(f"{code}:embed", IMAGES).hash]
    assert opened(f"{code}:embed", IMAGES).hash == hashes[1], "weights at random, yet the same"
    weights(file, seed=1)
    hashes.append(opened(f"{code}:embed", IMAGES, file).hash)
    code.write_text(CODE + "# changed\n")
    hashes.append(opened(f"{code}:embed", IMAGES, file).hash)
    assert len(set(hashes)) == 4


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (":number", "returned int"),
        (":fails", "RuntimeError: no such layer"),
        (":absent", "no function 'absent'"),
        ("", "path/to/file.py:function"),
    ],
)
def test_what_is_no_module_is_refused(code: Path, function: str, words: str) -> None:
    with pytest.raises(InputRefused, match=words):
        opened(f"{code}{function}", IMAGES)


def test_files_that_are_missing_or_do_not_fit_are_refused(code: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="cannot be read"):
        opened(f"{tmp_path}/absent.py:embed", IMAGES)
    with pytest.raises(InputRefused, match="cannot be read"):
        opened(f"{code}:embed", IMAGES, tmp_path / "absent.safetensors")
    save_file({"1.weight": torch.zeros(5, 64)}, tmp_path / "half.safetensors")
    with pytest.raises(InputRefused, match="missing"):
        opened(f"{code}:embed", IMAGES, tmp_path / "half.safetensors")
    with pytest.raises(InputRefused, match="pickle"):
        (tmp_path / "w.pt").write_bytes(b"x")
        opened(f"{code}:embed", IMAGES, tmp_path / "w.pt")
    code.write_text("def embed(:")
    with pytest.raises(InputRefused, match="SyntaxError"):
        opened(f"{code}:embed", IMAGES)
