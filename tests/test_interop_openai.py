"""OpenAI's checkpoints: the network, chain and bound of their own code, and every refusal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from goldens import NETWORKS, assert_near, chain, check_terms, combinations, load
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import silent
from torch import Tensor, nn

from nelbo.bound import pair_term, prior_term
from nelbo.decoders import Discretized, Following
from nelbo.distributions import DiscretizedNormal
from nelbo.errors import InputRefused, UsageError
from nelbo.interop.foreign import Assumptions, Foreign, assemble
from nelbo.interop.openai import betas, chain_of, network_of, read, refuse_others, rescaled
from nelbo.interop.openai_flags import Flags
from nelbo.interop.openai_names import configuration, convert, shapes
from nelbo.interop.respacing import respacing
from nelbo.networks.unet import UNet

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import openai_make as make  # noqa: E402
from unet_make import weights  # noqa: E402

DEFINITIONS = json.loads((GOLDEN / "definitions.json").read_text())
CASES = tuple(make.CASES)
FIRST = "input_blocks.0.0.weight"


def stored(case: str, key: str) -> Any:
    return load("openai_unet")[f"{case}_{key}"]


def content(case: str) -> dict[str, Any]:
    flags: dict[str, Any] = json.loads(str(stored(case, "flags")))
    return flags


def tensors(case: str) -> dict[str, Tensor]:
    """The weights that the original had, float64, under its names."""
    listed = json.loads(str(stored(case, "tensors")))
    return weights({name: tuple(shape) for name, shape in listed.items()})


def own(case: str) -> UNet:
    """Our network with these weights, in float64."""
    flags = Flags.of(content(case))
    network = UNet(**configuration(flags, 3, 1000 if flags.class_cond else None).json())
    state = convert(network, tensors(case), flags.use_new_attention_order)
    network.double().load_state_dict(state)
    return network.eval()


def label(case: str) -> int | None:
    return make.LABEL if content(case).get("class_cond") else None


def files(folder: Path, case: str, **changes: Any) -> tuple[Path, Path]:
    """A checkpoint as their training script leaves it, and its flags as JSON."""
    paths = folder / "ema_0.9999_050000.pt", folder / "flags.json"
    torch.save({name: tensor.float() for name, tensor in tensors(case).items()}, paths[0])
    paths[1].write_text(json.dumps(content(case) | changes))
    return paths


# --- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_network_is_the_original(case: str) -> None:
    network = own(case)
    classes = None if label(case) is None else torch.tensor([label(case)] * 2)
    x, t = torch.from_numpy(make.inputs()), torch.from_numpy(make.TIMES)
    truth = torch.from_numpy(stored(case, "out"))
    with torch.no_grad():
        exact = network(x, t, classes)
        single = network.float()(x.float(), t, classes)
    # The embedding of t = 0 is exact; others hold a float32 sine that may differ by machine.
    assert (exact - truth)[0].abs().max() < 1e-12
    assert (exact - truth).abs().max() < 1e-4
    assert (single - truth).abs().max() < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_those_of_the_original(case: str) -> None:
    listed = json.loads(str(stored(case, "tensors")))
    assert shapes(own(case)) == {name: tuple(shape) for name, shape in listed.items()}


def test_heads_become_a_width_where_they_share_one() -> None:
    shared = configuration(Flags.of({"image_size": 32}), 3, None)
    assert shared.own == () and shared.attention_head_dim == 64
    apart = configuration(Flags.of({"image_size": 64}), 3, None)
    assert apart.own == ("num_heads",) and apart.num_heads == 4
    # 512x512 begins with half the channels that its time is embedded in
    large = configuration(Flags.of({"image_size": 512, "code": "guided"}), 3, None)
    assert large.own == ("time_features",)
    assert (large.block_out_channels[0], large.waves, large.time_width) == (64, 128, 512)


# --- chain and bound -----------------------------------------------------------------------------


def model_of(case: str) -> Foreign:
    flags = Flags.of(content(case))
    network = rescaled(own(case), flags)
    return assemble(network, chain_of(flags), (3, 16, 8), Assumptions(label=label(case)))


@pytest.mark.parametrize("case", CASES)
def test_the_bound_is_that_of_the_original(case: str) -> None:
    """Every pair and the prior of its evaluation loop, mean and variance of its decoder."""
    foreign = model_of(case)
    schedule = foreign.model.process.schedule
    x_0 = torch.from_numpy(make.images()).double() / 127.5 - 1
    bits = 1 / (x_0[0].numel() * np.log(2))
    times = foreign.times
    np.testing.assert_array_equal((times * schedule.steps).round() - 1, stored(case, "steps"))
    for k, t in enumerate(times):
        x_t = schedule.keep(t).sqrt() * x_0 + schedule.lose(t).sqrt() * torch.from_numpy(
            make.noise(k)
        )
        at = foreign.model.at(x_t, t)
        if k:
            pair = pair_term(at, x_0, times[k - 1]) * bits
            assert_near(pair, stored(case, "pairs")[:, k - 1], 1e-5, 1e-8, f"pair {k}")
        else:
            decoder = at.decoder()
            assert isinstance(decoder, DiscretizedNormal)
            assert_near(decoder.mean, stored(case, "decoder_mean"), 0, 1e-5, "mean")
            logvar = decoder.logvar.expand(x_0.shape)
            assert_near(logvar, stored(case, "decoder_logvar"), 1e-6, 0, "logvar")
    assert_near(prior_term(foreign.model, x_0, times) * bits, stored(case, "prior"), 1e-7, 0)


class Indexed(nn.Module):
    """A closed-form network of the golden values, called with the number of the step."""

    def __init__(self, kind: str, learned: bool) -> None:
        super().__init__()
        self.mean, self.extra = NETWORKS[kind]
        self.learned = learned

    def forward(self, x: Tensor, i: Tensor, cond: Any = None) -> Tensor:
        i = i.to(x.dtype).reshape(-1, 1, 1, 1)
        mean = self.mean(x, i)
        return torch.cat([mean, self.extra(x, i)], dim=1) if self.learned else mean


@pytest.mark.parametrize("spec", ["10", "ddim10", "25", "2,3,5"])
def test_strided_bounds_equal_golden_values(spec: str) -> None:
    golden = load("strided")
    for where, (name, kind, variance, clip) in combinations(golden):
        if kind == "v":
            continue
        flags = Flags.of(
            {
                "noise_schedule": name,
                "predict_xstart": kind == "x0",
                "learn_sigma": variance == "learned_range",
                "sigma_small": variance == "fixed_small",
                "timestep_respacing": spec,
            }
        )
        network = rescaled(Indexed(kind, flags.learn_sigma), flags)
        assumed = Assumptions() if clip else Assumptions(clip="none")
        foreign = assemble(network, chain_of(flags), (3, 4, 4), assumed)
        steps = golden[f"{spec}/steps"].tolist()
        c = chain(foreign.model.process.schedule, steps, torch.float64)
        assert torch.equal(foreign.times, c.times)
        check_terms(golden, f"{spec}/", where, foreign.model, c)


@pytest.mark.parametrize(
    "schedule, golden, steps",
    [
        ("linear", "linear", 1000),
        ("linear", "linear_scaled", 50),
        ("cosine", "cosine", 10),
        ("cosine", "cosine", 50),
        ("cosine", "cosine", 1000),
    ],
)
def test_schedules_equal_golden_values(schedule: str, golden: str, steps: int) -> None:
    flags = Flags.of({"noise_schedule": schedule, "diffusion_steps": steps})
    tables = load("schedules")
    key = f"{golden}_T{steps}"
    if f"{key}_betas" in tables:
        assert_near(betas(flags), tables[f"{key}_betas"], 1e-10, 1e-13, key)
    else:
        index = torch.from_numpy(tables[f"selected_{key}_index"])
        assert_near(betas(flags)[index], tables[f"selected_{key}_betas"], 1e-10, 1e-13, key)


@pytest.mark.parametrize("row", DEFINITIONS["respacing"], ids=lambda r: f"{r['T']}: {r['spec']}")
def test_respacing_equals_golden_values(row: dict[str, Any]) -> None:
    assert respacing(row["T"], row["spec"]) == row["steps"]


@pytest.mark.parametrize(
    "steps, spec",
    [(row["T"], row["spec"]) for row in DEFINITIONS["respacing_invalid"]]
    + [(1000, text) for text in ("ddim", "ddim0", "-3", "10,", "ten", "0,0", "٣", "1e2")],
)
def test_respacing_refuses(steps: int, spec: str) -> None:
    with pytest.raises(UsageError, match="respacing"):
        respacing(steps, spec)


@given(st.integers(1, 400), st.data())
def test_respacing_keeps_as_many_as_asked(steps: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, steps))
    kept = respacing(steps, str(count))
    assert len(kept) == len(set(kept)) == count and kept == sorted(kept) and kept[0] == 0
    assert count == 1 or kept[-1] == steps - 1
    assert respacing(steps, "") == list(range(steps))


def test_one_kept_step_takes_another_variance() -> None:
    """There is no second step to copy from."""
    flags = Flags.of({"timestep_respacing": "1"})
    foreign = assemble(Indexed("epsilon", False), chain_of(flags), (3, 4, 4), Assumptions())
    assert foreign.times.tolist() == [0.001] and "beta_1" in foreign.assumed["edge"]


# --- from files to a model -----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_files_give_the_model(case: str, tmp_path: Path) -> None:
    assumptions = Assumptions(label=label(case))
    foreign = read(*files(tmp_path, case), assumptions, trust_pickle=True)
    exact = model_of(case)
    assert torch.equal(foreign.times, exact.times) and foreign.levels == 256
    assert foreign.shape == (3, content(case)["image_size"], content(case)["image_size"])
    decoder = foreign.model.decoder_rule
    assert isinstance(decoder, Discretized) and isinstance(decoder.density.edge, Following)
    assert decoder.density.edge.t_2 == exact.times[1]
    x = torch.from_numpy(make.inputs())
    with torch.no_grad():
        for t in (exact.times[0], exact.times[-1]):
            ours = foreign.model.at(x.float(), t).x_0
            assert (ours - exact.model.at(x, t).x_0).abs().max() < 1e-3
    assert foreign.description["weights"] == (
        "average with rate 0.9999 after 50000 steps, by the file's name"
    )
    assert foreign.description["code"] == f"{case.split('_')[0]}-diffusion"
    assert "1" in foreign.description["clip"] and "clip" in foreign.assumed
    assert not any(p.requires_grad for p in foreign.model.parameters())


def test_what_was_guessed_is_said(tmp_path: Path) -> None:
    assumed = read(*files(tmp_path, "guided"), Assumptions(), trust_pickle=True).assumed
    assert assumed["code"] == "guided-diffusion (the key channel_mult)"
    assert "rescale_timesteps=False" in assumed["flags"]
    assert "sigma_small" not in assumed["flags"]
    flags = Flags.of({"diffusion_steps": 4000})
    assert flags.rescale_timesteps  # improved-diffusion's default
    assert "no key of guided-diffusion" in flags.guessed({})["code"]
    assert not Flags.of({"code": "guided"}).rescale_timesteps
    every = content("guided") | {"code": "guided", "use_fp16": True}
    half = read(*files(tmp_path, "guided", **every), Assumptions(), trust_pickle=True)
    assert "float32" in half.assumed["fp16"] and "code" not in half.assumed


def test_a_label_is_a_class_and_changes_the_model(tmp_path: Path) -> None:
    paths = files(tmp_path, "improved_plain")
    for wrong in (None, 1000, -1):
        with pytest.raises(UsageError, match=r"label"):
            read(*paths, Assumptions(label=wrong), trust_pickle=True)
    state = tensors("improved_plain")
    state["label_emb.weight"] *= 30
    torch.save(state, paths[0])
    x, t = torch.from_numpy(make.inputs()).float(), torch.tensor(0.5, dtype=torch.float64)
    with torch.no_grad():
        one, two = (
            read(*paths, Assumptions(label=k), trust_pickle=True).model.at(x, t).output
            for k in (7, 8)
        )
    assert (one - two).abs().max() > 1e-4
    with pytest.raises(UsageError, match="leave out --label"):
        read(*files(tmp_path, "guided"), Assumptions(label=1), trust_pickle=True)


def test_half_precision_and_safetensors_are_read(tmp_path: Path) -> None:
    _, flags = files(tmp_path, "guided")
    path = tmp_path / "model000100.safetensors"
    save_file({name: tensor.half() for name, tensor in tensors("guided").items()}, path)
    foreign = read(path, flags, Assumptions())
    assert {p.dtype for p in foreign.model.network.parameters()} == {torch.float32}
    assert foreign.description["weights"].startswith("not averaged, after 100 steps")


# --- refusals ------------------------------------------------------------------------------------


def test_pickles_need_trust(tmp_path: Path) -> None:
    paths = files(tmp_path, "guided")
    with pytest.raises(InputRefused, match="--trust-pickle"):
        read(*paths, Assumptions())
    torch.save({"state": {}, "param_groups": []}, paths[0])
    with pytest.raises(InputRefused, match="state_dict"):
        read(*paths, Assumptions(), trust_pickle=True)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("middle_block.1.qkv.bias"), "1 tensor missing: 'middle_block.1.qkv.b"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 tensor unexpected: 'extra'"),
        (lambda s: s.update({"out.0.bias": torch.zeros(5)}), "'out.0.bias' is 5, expected 32"),
        (lambda s: s["out.0.bias"].fill_(torch.nan), "'out.0.bias' holds NaN"),
        (lambda s: s.pop(FIRST), "is no UNetModel"),
        (lambda s: s.update({FIRST: torch.zeros(32)}), "is no UNetModel"),
        (lambda s: s.update({"first_stage_model.x": torch.zeros(1)}), "latent diffusion"),
        (lambda s: s.update({FIRST: torch.zeros(32, 6, 3, 3)}), "super-resolution"),
        (lambda s: s.update({FIRST: torch.zeros(32, 2, 3, 3)}), "learn_sigma=False"),
        (lambda s: s.update({"label_emb.weight": torch.zeros(9, 128)}), "class_cond is not set"),
        (lambda s: s.update({"label_emb.weight": torch.tensor(1.0)}), "no table of classes"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Any, words: str, tmp_path: Path) -> None:
    _, flags = files(tmp_path, "guided")
    state = tensors("guided")
    change(state)
    path = tmp_path / "model1.pt"
    torch.save(state, path)
    with pytest.raises(InputRefused, match=words) as refusal:
        read(path, flags, Assumptions(), trust_pickle=True)
    assert str(path) in str(refusal.value)


def test_a_classifier_is_refused_by_name() -> None:
    state = {name: t for name, t in tensors("guided").items() if not name.startswith("output")}
    with pytest.raises(InputRefused, match="is a classifier"):
        refuse_others(state, Path("classifier.pt"))


def test_classes_that_are_not_there_are_missed() -> None:
    flags = Flags.of(content("guided") | {"class_cond": True})
    with pytest.raises(InputRefused, match=r"label_emb.weight' is missing"):
        network_of(tensors("guided"), flags, "x.pt")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_chanels": 64}, "unknown keys num_chanels"),
        ({"classifier_width": 64}, "classifier_width: a classifier's"),
        ({"large_size": 256}, "super-resolution"),
        ({"clip_denoised": True}, "clip_denoised: an option of their scripts"),
        ({"code": "glide"}, "code='glide'"),
        ({"code": "improved"}, "improved-diffusion has no channel_mult"),
        ({"sigma_small": True}, "guided-diffusion has no sigma_small"),
        ({"num_channels": "32"}, "num_channels='32' is not a whole number"),
        ({"num_channels": 32.0}, "num_channels=32.0 is not a whole number"),
        ({"num_channels": True}, "num_channels=True is not a whole number"),
        ({"num_channels": 0}, r"num_channels=0 is outside 1\.\."),
        ({"num_channels": 40}, "norm_num_groups=32 does not divide"),
        ({"num_head_channels": 0}, "num_head_channels=0 is outside"),
        ({"num_head_channels": 24}, "num_head_channels=24 does not divide"),
        ({"num_head_channels": -1, "num_heads": 5}, "num_heads=5 does not divide"),
        ({"learn_sigma": 1}, "learn_sigma=1 is not true or false"),
        ({"timestep_respacing": 250}, "timestep_respacing=250 is not a string"),
        ({"timestep_respacing": "ddim999"}, "no integer stride"),
        ({"timestep_respacing": "x"}, "timestep_respacing: respacing 'x'"),
        ({"channel_mult": "1,0.5"}, "channel_mult='1,0.5'"),
        ({"channel_mult": ""}, "no network for image_size=16"),
        ({"channel_mult": "1,1,1,1,1,1"}, "cannot be halved 5 times"),
        ({"attention_resolutions": ""}, "attention_resolutions=''"),
        ({"attention_resolutions": "0"}, "attention_resolutions='0'"),
        ({"dropout": 2}, "dropout=2 is outside"),
        ({"noise_schedule": "sigmoid"}, "noise_schedule='sigmoid'"),
        ({"diffusion_steps": 10**6}, "diffusion_steps=1000000 is outside"),
        ({"diffusion_steps": 20}, "more than 20 steps"),
    ],
)
def test_flags_are_refused_by_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    weights_, flags = files(tmp_path, "guided", **changes)
    with pytest.raises(InputRefused, match=words) as refusal:
        read(weights_, flags, Assumptions(), trust_pickle=True)
    assert str(flags) in str(refusal.value)


@pytest.mark.parametrize("text", ["[1]", "{", "{" + " " * (1 << 20) + "}"])
def test_flags_must_be_a_small_object(text: str, tmp_path: Path) -> None:
    weights_, flags = files(tmp_path, "guided")
    flags.write_text(text)
    with pytest.raises(InputRefused, match=r"flags\.json"):
        read(weights_, flags, Assumptions(), trust_pickle=True)


def test_the_command_line_takes_a_file_with_its_flags(tmp_path: Path) -> None:
    case = next(case for case in CASES if label(case) is None)
    path, flags = files(tmp_path, case)
    model = read(path, flags, Assumptions(), trust_pickle=True)
    shape = (12, *model.shape)
    rows = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "data.npy", rows.to(torch.uint8).numpy())
    words = [
        "evaluate",
        str(path),
        "--data",
        str(tmp_path / "data.npy"),
        "--calls",
        "4",
        "--quiet",
    ]
    code, _, err = silent(words)
    assert code == 2 and "add --flags" in err
    code, _, err = silent([*words, "--flags", str(flags)])
    assert code == 3 and "--trust-pickle" in err
    code, out, err = silent([*words, "--flags", str(flags), "--trust-pickle", "--json"])
    assert code == 0, err
    assert json.loads(out)["data"]["n"] == 12 and json.loads(out)["assumed"]
