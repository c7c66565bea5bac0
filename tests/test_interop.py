"""Diffusers directories: read exactly, in every layout, or refused in one line by name."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nelbo.decoders import Following
from nelbo.distributions import DiscretizedNormal
from nelbo.errors import InputRefused
from nelbo.interop.betas import SCHEDULES, betas, zero_terminal
from nelbo.interop.configs import Fields, chain_of
from nelbo.interop.diffusers import is_directory, read
from nelbo.interop.foreign import Assumptions, Foreign
from nelbo.interop.scales import OnScale
from nelbo.schedules import Cosine

GOLDEN = Path(__file__).parent / "golden"
CONFIG, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "diffusers_tiny", tmp_path / "tiny"))


def edit(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; `...` removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def outputs(found: Foreign) -> torch.Tensor:
    """What the network says of the golden inputs, (10, 2, 1, 8, 8)."""
    x = torch.from_numpy(np.load(GOLDEN / "diffusers_tiny.npz")["x"])
    pairs = zip(x, found.times, strict=True)
    return torch.stack([found.model.network(rows, t) for rows, t in pairs])


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(np.load(GOLDEN / "diffusers_tiny.npz")[name])


def equals_golden(found: Foreign) -> bool:
    return torch.allclose(outputs(found), golden("output"), rtol=0, atol=2e-6)


def test_the_network_says_what_diffusers_says() -> None:
    found = read(GOLDEN / "diffusers_tiny")
    assert equals_golden(found)
    assert found.shape == (1, 8, 8) and found.levels == 256 and len(found.times) == 10
    assert not any(p.requires_grad for p in found.model.parameters())


def test_every_step_has_the_schedulers_mean_and_variance() -> None:
    """To the precision of diffusers' float32 tables, which lose 1e-5 of the first variance."""
    found = read(GOLDEN / "diffusers_tiny")
    x, times = golden("x"), found.times
    for i in range(1, len(times)):
        kernel = found.model.kernel(x[i], times[i], times[i - 1])
        torch.testing.assert_close(kernel.mean, golden("mean")[i], rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(
            kernel.variance[0, 0, 0, 0], golden("variance")[i], rtol=1e-4, atol=0
        )
    first = found.model.at(x[0], times[0])
    torch.testing.assert_close(first.x_0, golden("mean")[0], rtol=1e-5, atol=1e-5)
    # the decoder takes over the variance of the second step
    decoder = first.decoder()
    assert isinstance(decoder, DiscretizedNormal)
    assert float(decoder.logvar.exp()) == pytest.approx(float(golden("variance")[1]), rel=1e-4)


def test_what_was_assumed_is_said() -> None:
    assumed = read(GOLDEN / "diffusers_tiny").assumed
    assert set(assumed) == {"scaling", "levels", "edge", "clip", "weights"}
    assert assumed["scaling"] == "x = 2 level/255 - 1 (--scaling sets it)"
    assert "second step, copied" in assumed["edge"] and "x_0 to 1" in assumed["clip"]
    given = Assumptions(scaling="unit", levels=17, edge=1e-3, clip="none")
    said = read(GOLDEN / "diffusers_tiny", given)
    assert said.assumed["scaling"] == "x = level/16 (set by --scaling)"
    assert said.assumed["levels"] == "17 (set by --levels)"
    assert "0.001 (set by --edge)" in said.assumed["edge"] and "none" in said.assumed["clip"]
    assert said.description["clip"] == "none"


@pytest.mark.parametrize(("edge", "want"), [("lose", 1e-3), ("ratio", 1e-3 / 0.999), (0.02, 0.02)])
def test_the_decoders_variance_can_be_set(edge: Any, want: float) -> None:
    found = read(GOLDEN / "diffusers_tiny", Assumptions(edge=edge))
    decoder = found.model.decoder(golden("x")[0], found.times[0])
    assert float(decoder.logvar.exp()) == pytest.approx(want, rel=1e-5)


def test_data_on_zero_to_one_have_the_same_masses() -> None:
    """Level j of n at j/(n-1) with deviation s, or at 2j/(n-1) - 1 with deviation 2s."""
    mean, logvar = torch.rand(5, 3), torch.full((), math.log(0.01))
    unit = OnScale(mean, logvar, 17, (0.0, 1.0))
    plain = DiscretizedNormal(2 * mean - 1, logvar + math.log(4), 17)
    level = torch.randint(0, 17, (5, 3))
    torch.testing.assert_close(unit.log_prob(level / 16), plain.log_prob(level / 8 - 1))
    torch.testing.assert_close(unit.mean, mean)
    masses = torch.stack([unit.log_prob(torch.full((5, 3), j / 16)) for j in range(17)])
    torch.testing.assert_close(masses.exp().sum(0), torch.ones(5, 3))
    draws = unit.sample((50,)) * 16
    assert torch.equal(draws, draws.round()) and draws.min() >= 0 and draws.max() <= 16


# ---- layouts ------------------------------------------------------------------------------------


def test_flat_layout(folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("model_index.json", CONFIG, SCHEDULER, WEIGHTS):
        shutil.copy(folder / name, flat / Path(name).name)
    assert is_directory(flat) and equals_golden(read(flat))
    (flat / "model_index.json").unlink()
    assert is_directory(flat) and equals_golden(read(flat))


def shard(folder: Path, names: tuple[str, str] = ("a.safetensors", "b.safetensors")) -> Path:
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    table = {name: names[i % 2] for i, name in enumerate(state)}
    for file in set(names):
        part = {k: v for k, v in state.items() if table[k] == file}
        save_file(part, folder / "unet" / Path(file).name)
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return index


def test_shards(folder: Path) -> None:
    shard(folder)
    assert equals_golden(read(folder))


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/a.safetensors", "a.bin", "x\\a.safetensors"]
)
def test_shards_are_plain_files_of_the_folder(folder: Path, name: str) -> None:
    shard(folder, (name, "b.safetensors"))
    with pytest.raises(InputRefused, match="not a plain .safetensors file name"):
        read(folder)


def test_half_precision_is_read_as_float32(folder: Path) -> None:
    state = {k: v.half() for k, v in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    save_file(state, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    found = read(folder)
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}
    assert torch.allclose(outputs(found), golden("output"), rtol=0, atol=2e-2)


def test_legacy_attention_names(folder: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(folder / WEIGHTS)
    renamed = {}
    for name, tensor in state.items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        renamed[name] = tensor
    assert len(renamed.keys() - state.keys()) == 8 * 4  # one in the middle, three in blocks
    save_file(renamed, folder / WEIGHTS)
    assert equals_golden(read(folder))


def test_legacy_scheduler(folder: Path) -> None:
    """0.0.x: another class name, `timesteps`, `clip_predicted_image`; later predict_epsilon."""
    base = {"beta_start": 1e-3, "beta_end": 0.5, "beta_schedule": "linear"}
    old = {"_class_name": "GaussianDDPMScheduler", "timesteps": 10, "clip_predicted_image": False}
    (folder / SCHEDULER).write_text(json.dumps({**base, **old, "tensor_format": "pt"}))
    edit(folder / "model_index.json", scheduler=["diffusers", "GaussianDDPMScheduler"])
    found = read(folder)
    assert equals_golden(found) and found.description["clip"] == "none"
    edit(folder / SCHEDULER, predict_epsilon=False)
    assert read(folder).description["parameterization"] == "x0"
    edit(folder / SCHEDULER, prediction_type="epsilon")
    with pytest.raises(InputRefused, match="predict_epsilon.*contradicts prediction_type"):
        read(folder)


def test_an_empty_scheduler_has_diffusers_defaults(folder: Path) -> None:
    (folder / SCHEDULER).write_text("{}")
    found = read(folder)
    assert len(found.times) == 1000 and found.description["grid"] == "1000 latents, linear"
    assert found.description["variance"] == "posterior" and found.description["clip"] == "1"


def test_pickles_only_with_trust(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    file = folder / "unet/diffusion_pytorch_model.bin"
    torch.save(state, file)
    with pytest.raises(InputRefused, match="is a pickle.*--trust-pickle"):
        read(folder)
    assert equals_golden(read(folder, trust_pickle=True))


class Attack:
    """Writes a file when it is unpickled by anything that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_holds_more_than_tensors_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    mark = tmp_path / "mark"
    torch.save({"a": Attack(mark)}, folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(InputRefused, match="cannot be read as tensors alone"):
        read(folder, trust_pickle=True)
    assert not mark.exists()
    torch.save([torch.zeros(2)], folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(InputRefused, match="no table of tensors"):
        read(folder, trust_pickle=True)


# ---- tensors ------------------------------------------------------------------------------------


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def _several(state: dict[str, torch.Tensor]) -> None:
    for name in list(state)[:6]:
        del state[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("conv_in.bias"), "1 tensor missing: 'conv_in.bias'"),
        (lambda s: s.update(extra=torch.zeros(2)), "1 tensor unexpected: 'extra'"),
        (
            lambda s: s.update({"conv_in.bias": torch.zeros(5)}),
            "of another shape: 'conv_in.bias' is 5, expected 4",
        ),
        (_several, "6 tensors missing: .* and 2 more"),
        (
            lambda s: s.update({"conv_in.bias": torch.full((4,), math.nan)}),
            "'conv_in.bias' holds NaN",
        ),
        (
            lambda s: s.update({"conv_in.bias": torch.zeros(4, dtype=torch.int64)}),
            "type I64",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, change: Any, message: str) -> None:
    change_tensors(folder, change)
    with pytest.raises(InputRefused, match=message) as refused:
        read(folder)
    assert "diffusion_pytorch_model.safetensors" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("length", [0, 5, 100, 20_000])
def test_truncated_weights(folder: Path, length: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:length])
    with pytest.raises(InputRefused, match="truncated|damaged"):
        read(folder)


@pytest.mark.parametrize(
    "header", [b"[]", b'{"a": 1}', b"{", b"[" * 4000, b'{"a": {"shape": [-1]}}']
)
def test_damaged_headers(folder: Path, header: bytes) -> None:
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    with pytest.raises(InputRefused, match="damaged header"):
        read(folder)


def test_a_header_that_claims_too_much(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputRefused, match="truncated or no safetensors"):
        read(folder)


def test_an_enormous_network_is_refused_before_it_is_built(folder: Path) -> None:
    edit(folder / CONFIG, block_out_channels=[65536, 65536])
    with pytest.raises(InputRefused, match="tensors? of another shape"):
        read(folder)


@pytest.mark.parametrize("name", ["model_index.json", CONFIG, SCHEDULER, WEIGHTS])
def test_links_out_of_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(InputRefused, match="link that leads out of.*cp -rL"):
        read(folder)


def test_links_inside_the_folder_are_followed(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "w.safetensors")
    (folder / WEIGHTS).symlink_to(folder / "w.safetensors")
    assert equals_golden(read(folder))


@pytest.mark.parametrize("name", [CONFIG, SCHEDULER, WEIGHTS])
def test_missing_files(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputRefused, match=re.escape(str(folder))):
        read(folder)


# ---- JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model_index.json", CONFIG, SCHEDULER])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a valid JSON"),
        ("[1]", "no JSON object"),
        ('{"a": NaN}', "not finite"),
        ('{"a": 1e999}', "not finite"),
        ('{"a": 1, "a": 2}', "repeated"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "nested|not known|unknown|no "),
        ('{"a": ' + "[" * 10**5 + "]" * 10**5 + "}", "valid JSON"),
        ('{"_a": "' + "x" * (1 << 20) + '"}', "the limit is"),
    ],
)
def test_json_is_not_believed(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(InputRefused, match=message) as refused:
        read(folder)
    assert str(folder / name) in str(refused.value)


SCHEDULER_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"thresholding": True}, "thresholding"),
    ({"prediction_type": "flow_prediction"}, "prediction_type"),
    ({"variance_type": "learned"}, "variance_type"),
    ({"variance_type": "fixed_large_log"}, "variance_type"),
    ({"beta_schedule": "exp"}, "beta_schedule"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: .* the last KL is infinite"),
    ({"num_train_timesteps": 100_001}, "num_train_timesteps"),
    ({"num_train_timesteps": 0}, "num_train_timesteps"),
    ({"num_train_timesteps": 10.5}, "num_train_timesteps"),
    ({"num_train_timesteps": True}, "num_train_timesteps"),
    ({"num_train_timesteps": "10"}, "num_train_timesteps"),
    ({"beta_end": 1.5}, "beta_end"),
    ({"beta_start": -0.1}, "beta_start"),
    ({"beta_start": 0.0}, "beta_schedule: betas from 0"),
    ({"beta_end": 1.0}, "the last beta is 1"),
    ({"trained_betas": [0.1] * 9}, "trained_betas: 9 entries, expected 10"),
    ({"trained_betas": [0.1] * 9 + [2.0]}, "trained_betas: betas from 0.1 to 2"),
    ({"trained_betas": [0.1] * 9 + [None]}, "trained_betas"),
    ({"trained_betas": "x"}, "trained_betas: no list"),
    ({"clip_sample": 1}, "clip_sample"),
    ({"clip_sample_range": 0}, "clip_sample_range"),
    ({"lower_order_final": True}, "lower_order_final: is not known"),
    ({"timesteps": 10}, "timesteps: stands beside"),
    ({"timestep_values": [1, 2]}, "timestep_values"),
]


@pytest.mark.parametrize(("changes", "message"), SCHEDULER_REFUSED)
def test_scheduler_refusals(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder / SCHEDULER, **changes)
    with pytest.raises(InputRefused, match=message) as refused:
        read(folder)
    assert str(refused.value).startswith(str(folder / SCHEDULER)) and "\n" not in str(
        refused.value
    )


CONFIG_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"time_embedding_type": "fourier"}, "time_embedding_type"),
    ({"num_class_embeds": 10}, "num_class_embeds: the network wants a class"),
    ({"class_embed_type": "timestep"}, "class_embed_type: the network wants a class"),
    ({"class_embed_type": "identity"}, "class_embed_type"),
    ({"_class_name": "DiTTransformer2DModel"}, "DiTTransformer2DModel"),
    ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
    ({"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
    ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "SkipDownBlock2D"),
    ({"sample_size": None}, "sample_size"),
    ({"sample_size": [8]}, "sample_size"),
    ({"sample_size": 9}, "sample_size"),
    ({"sample_size": "8"}, "sample_size"),
    ({"out_channels": 2}, "out_channels: 2 with in_channels 1"),
    ({"in_channels": 10**9}, "in_channels"),
    ({"layers_per_block": 1000}, "layers_per_block"),
    ({"block_out_channels": [4] * 17}, "block_out_channels"),
    ({"block_out_channels": 4}, "block_out_channels"),
    ({"norm_eps": "0"}, "norm_eps"),
    ({"add_attention": 1}, "add_attention"),
    ({"cross_attention_dim": 8}, "cross_attention_dim"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIG_REFUSED)
def test_network_refusals(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder / CONFIG, **changes)
    with pytest.raises(InputRefused, match=message) as refused:
        read(folder)
    assert str(refused.value).startswith(str(folder / CONFIG)) and "\n" not in str(refused.value)


INDEX_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline: it works on latents"),
    ({"_class_name": "LDMPipeline"}, "LDMPipeline: it works on latents"),
    ({"_class_name": "DiTPipeline"}, "DiTPipeline"),
    ({"_class_name": "ScoreSdeVePipeline"}, "variance-exploding"),
    ({"_class_name": "KarrasVePipeline"}, "variance-exploding"),
    ({"_class_name": "PNDMPipeline"}, "PNDMPipeline"),
    ({"vqvae": ["diffusers", "VQModel"]}, "vqvae: latents"),
    ({"unet": ["diffusers", "UNet2DConditionModel"]}, "unet: UNet2DConditionModel"),
    ({"unet": ["diffusers", "DiTTransformer2DModel"]}, "unet: DiTTransformer2DModel"),
    ({"unet": "x"}, "unet: is not"),
]


@pytest.mark.parametrize(("changes", "message"), INDEX_REFUSED)
def test_pipeline_refusals(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder / "model_index.json", **changes)
    with pytest.raises(InputRefused, match=message) as refused:
        read(folder)
    assert str(refused.value).startswith(str(folder / "model_index.json"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["ScoreSdeVeScheduler", "EulerDiscreteScheduler", "EDMEulerScheduler", "PNDMScheduler"]
)
def test_other_schedulers_are_refused_by_name(folder: Path, name: str) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", name])
    with pytest.raises(InputRefused, match=f"_class_name: {name}: "):
        read(folder)
    edit(folder / "model_index.json", scheduler=["diffusers", "DDPMScheduler"])
    edit(folder / "scheduler" / "scheduler_config.json", _class_name=name)
    with pytest.raises(InputRefused, match=f"_class_name: {name}: "):
        read(folder)


JUNK: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        0.0,
        0.5,
        2,
        3,
        60_000,
        1e300,
        10**400,
        "",
        "x" * 500,
        "linear",
        [],
        [[]],
        {},
        {"a": 1},
    ),
    *([None], ["x"], [1, "x"], [8, 8, 8], [1e300, 2], [True, False], ["diffusers", 3]),
]


@pytest.mark.parametrize("name", ["model_index.json", CONFIG, SCHEDULER])
def test_no_value_of_any_field_is_a_crash(folder: Path, name: str) -> None:
    """It is read, or refused in one line."""
    content = json.loads((folder / name).read_text())
    (folder / WEIGHTS).write_bytes(b"")  # the last thing that is looked at
    for key in content:
        for value in JUNK:
            (folder / name).write_text(json.dumps(content | {key: value}))
            with pytest.raises(InputRefused) as refused:
                read(folder)
            assert "\n" not in str(refused.value) and len(str(refused.value)) < 700


def test_classes(folder: Path) -> None:
    """One class throughout: the class embedding is added to that of the time."""
    edit(folder / CONFIG, num_class_embeds=3)
    width = load_file(folder / WEIGHTS)["time_embedding.linear_2.bias"].shape[0]
    rows = torch.zeros(3, width)
    rows[1] = 1
    change_tensors(folder, lambda s: s.update({"class_embedding.weight": rows}))
    assert equals_golden(read(folder, Assumptions(label=0)))
    found = read(folder, Assumptions(label=1))
    assert not equals_golden(found) and found.description["class"] == "1"
    with pytest.raises(InputRefused, match="--label 3: classes go from 0 to 2"):
        read(folder, Assumptions(label=3))


def test_a_class_for_a_network_without_classes() -> None:
    with pytest.raises(InputRefused, match="there are no classes"):
        read(GOLDEN / "diffusers_tiny", Assumptions(label=0))


# ---- schedules ----------------------------------------------------------------------------------


def chain(tmp_path: Path, **values: Any) -> Any:
    return chain_of(Fields(tmp_path / "scheduler_config.json", values))


def test_schedules_are_computed_in_float64(tmp_path: Path) -> None:
    linear = chain(tmp_path).betas
    assert linear.dtype == torch.float64 and len(linear) == 1000
    assert float(linear[0]) == 1e-4 and float(linear[-1]) == pytest.approx(0.02, rel=1e-15)
    cosine = betas("squaredcos_cap_v2", 50, 0, 0)
    torch.testing.assert_close(cosine, Cosine(50).betas(), rtol=1e-12, atol=0)
    scaled = betas("scaled_linear", 5, 0.04, 0.16)
    torch.testing.assert_close(
        scaled[2], torch.tensor(0.09, dtype=torch.float64), rtol=1e-12, atol=0
    )
    sigmoid = betas("sigmoid", 3, 0.1, 0.3)
    assert float(sigmoid[1]) == pytest.approx(0.2, rel=1e-15)
    assert float(sigmoid.sum()) == pytest.approx(0.6, rel=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_a_chain(tmp_path: Path, name: str) -> None:
    for steps in (2, 10, 1000):
        found = chain(tmp_path, beta_schedule=name, num_train_timesteps=steps).betas
        assert bool(((found > 0) & (found < 1)).all())


def test_zero_terminal_snr(tmp_path: Path) -> None:
    values = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    found = chain(tmp_path, **values)
    kept, before = torch.cumprod(1 - found.betas, 0), torch.cumprod(1 - chain(tmp_path).betas, 0)
    assert float(found.betas[-1]) == 1 and float(kept[-1]) == 0
    assert float(kept[0]) == pytest.approx(float(before[0]), rel=1e-12)
    assert torch.equal(found.betas, zero_terminal(chain(tmp_path).betas))


def test_a_chain_that_erases_everything_is_measured_with_v(folder: Path) -> None:
    edit(folder / SCHEDULER, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    found = read(folder)
    kernel = found.model.kernel(golden("x")[9], found.times[9], found.times[8])
    assert bool(torch.isfinite(kernel.mean).all()) and bool(torch.isfinite(kernel.variance).all())


def test_ddim_takes_the_posteriors_variance(folder: Path) -> None:
    edit(folder / SCHEDULER, _class_name="DDIMScheduler", variance_type=..., set_alpha_to_one=True)
    edit(
        folder / "model_index.json",
        _class_name="DDIMPipeline",
        scheduler=["diffusers", "DDIMScheduler"],
    )
    found = read(folder)
    assert found.description["variance"] == "posterior" and equals_golden(found)
    assert isinstance(found.model.decoder_rule.density.edge, Following)  # type: ignore[attr-defined]
