"""The report says what the files of a run say, and nothing that they hold can act on its page."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import shlex
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from nelbo import compared, figures, pictures, remake, report, wording
from nelbo.errors import InputRefused
from nelbo.runfiles import load

TERMS = ("prior", "diffusion", "reconstruction", "total")
HASH = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"


def entry(mean: float, se: float, se_mc: float, n: int, dims: int) -> dict[str, Any]:
    bits = mean * dims
    return {"mean": mean, "se": se, "se_mc": se_mc, "n": n, "unit": "bits/dim",
            "mean_bits_per_example": bits}  # fmt: skip


def terms(total: float, n: int, dims: int) -> dict[str, Any]:
    return {
        "prior": entry(0.000412, 3.1e-6, 0.0, n, dims),
        "diffusion": entry(0.87 * total, 0.0113, 0.00047, n, dims),
        "reconstruction": entry(0.13 * total - 0.000412, 0.0031, 0.00021, n, dims),
        "total": entry(total, 0.01184, 0.00052, n, dims),
    }


def evaluation(kind: str, shape: tuple[int, ...], levels: int | None) -> dict[str, Any]:
    dims, n = math.prod(shape), 297
    document: dict[str, Any] = {
        "schema": 1,
        "data": {"name": kind, "split": "test", "n": n, "dims": dims, "levels": levels},
        "model": {
            "parameterization": "Epsilon",
            "variance": "Posterior",
            "decoder": f"Discretized({levels})" if levels else "Density",
            "grid": "1000 times, log-SNR linear from 8 to -6",
            "weights": "ema",
            "clip": False,
            "step": 3000,
        },
        "calls_per_example": 1000.0,
        "terms": terms(1.76412 if levels else 0.31, n, dims),
        "baselines": {},
    }
    if levels:
        uniform = {"mean": math.log2(levels), "unit": "bits/dim"}
        document["baselines"] = {"uniform": uniform, "histogram": entry(2.419, 0.012, 0, n, dims)}
    else:
        exact = terms(0.24, n, dims)
        entropy = {"mean": 0.20117, "unit": "bits/dim"}
        document["truth"] = {"entropy": entropy, "exact_denoiser": exact}
    return document


def metrics(rng: np.random.Generator, final: float) -> str:
    lines = []
    for step in range(10, 3001, 10):
        loss = final + 3.2 * math.exp(-step / 80) + 12 / step**0.75 + 0.09 * rng.normal()
        lines.append({"step": step, "loss": loss, "grad_norm": 1.0, "lr": 0.001,
                      "examples_per_second": 900.0, "seconds": step / 30})  # fmt: skip
        if step % 500 == 0 or step == 50:
            mean = final + 3.2 * math.exp(-step / 80) + 12 / step**0.75 + 0.05
            seen = {"mean": mean, "se": 0.02, "se_mc": 0.002, "n": 150, "unit": "bits/dim"}
            lines.append({"step": step, "seconds": step / 30, "validation": seen})
    return "".join(json.dumps(line) + "\n" for line in lines)


def digits(rng: np.random.Generator, n: int, shape: tuple[int, ...], levels: int) -> np.ndarray:
    """Discs of random place and brightness, in place of handwriting."""
    axis = np.linspace(-1, 1, shape[1])
    centre, radius = rng.uniform(-0.4, 0.4, (n, shape[0], 2)), rng.uniform(0.2, 0.5, (n, shape[0]))
    rows = (axis[:, None] - centre[..., None, None, 0]) ** 2
    columns = (axis[None, :] - centre[..., None, None, 1]) ** 2
    bright = 1 / (1 + np.exp(14 * (np.sqrt(rows + columns) - radius[..., None, None])))
    return np.asarray(np.rint(bright * (levels - 1)), np.uint8)


def roll(rng: np.random.Generator, n: int) -> np.ndarray:
    angle = 1.5 * np.pi * (1 + 2 * rng.uniform(size=n))
    points = np.stack([angle * np.cos(angle), angle * np.sin(angle)], 1) / 10
    return points + 0.05 * rng.normal(size=(n, 2))


def walk(rng: np.random.Generator, clean: np.ndarray, logsnr: np.ndarray) -> np.ndarray:
    keep = (1 / (1 + np.exp(-logsnr))).reshape(-1, *[1] * clean.ndim)
    noise = rng.normal(size=clean.shape)
    return np.asarray(np.sqrt(keep) * clean + np.sqrt(1 - keep) * noise, np.float32)


def make_run(
    path: Path, kind: str = "digits", shape: tuple[int, ...] = (1, 8, 8), levels: int | None = 17
) -> Path:
    """A finished run directory, of images for `levels`, of a two-dimensional toy for None."""
    rng = np.random.default_rng(7)
    document = evaluation(kind, shape, levels)
    for folder in ("evaluation", "samples"):
        (path / folder).mkdir(parents=True)
    record = {
        "name": kind,
        "path": None,
        "sha256": HASH,
        "examples": 1797,
        "shape": list(shape),
        "levels": levels,
        "split": {"rule": "by content", "train": {"n": 1350}, "validation": {"n": 150},
                  "test": {"n": 297, "sha256": HASH[::-1]}},
        "licence": "CC BY 4.0",
        "warnings": [],
    }  # fmt: skip
    options = {"steps": 3000, "seed": 0, "batch_size": 128, "rate": 0.002, "ema": 0.999,
               "compile": False, "objective": "vlb", "hidden": [48, 48]}  # fmt: skip
    model = {"parameters": 212353, "description": "UNet, 48 channels, 4 blocks"}
    files = {
        "recipe.json": {"schema": 1, "recipe": kind, "options": options, "data": record,
                        "model": model},
        "status.json": {"schema": 1, "state": "finished", "step": 3000, "steps": 3000,
                        "exit_code": 0, "message": "", "seconds": 102.4},
        "environment.json": {"nelbo": "0.1.0", "python": "3.12.3", "torch": "2.13.0",
                             "platform": "Linux-6.1-x86_64", "threads": 2, "device": "cpu",
                             "commit": "4f2c9e1"},
        "evaluation/test.json": document,
    }  # fmt: skip
    for name, value in files.items():
        (path / name).write_text(json.dumps(value))
    (path / "metrics.jsonl").write_text(metrics(rng, document["terms"]["total"]["mean"]))
    make_arrays(path, rng, shape, levels, document)
    return path


def make_arrays(
    path: Path, rng: np.random.Generator, shape: tuple[int, ...], levels: int | None, document: Any
) -> None:
    logsnr = np.linspace(8, -6, 1000)
    scale = document["terms"]["diffusion"]["mean"] * document["data"]["dims"] * math.log(2)
    mean = scale * np.exp(-((logsnr - 1.5) ** 2) / 9) / math.sqrt(9 * math.pi)
    se = 0.03 * mean + 0.004 * scale / 14
    wobble = mean + 0.3 * se * rng.normal(size=1000)
    np.savez(path / "evaluation/test.npz", total=rng.normal(size=297), integrand_logsnr=logsnr,
             integrand_mean=wobble, integrand_se=se)  # fmt: skip
    ladder = np.linspace(8, -6, 12)
    if levels:
        real, fake = digits(rng, 64, shape, levels), digits(rng, 64, shape, levels)
        clean = real[0] / (levels - 1) * 2 - 1, fake[0] / (levels - 1) * 2 - 1
    else:
        real, fake = roll(rng, 2000), roll(rng, 2000) + 0.03 * rng.normal(size=(2000, 2))
        clean = real[:300], fake[:300]
    np.savez(path / "samples/samples.npz", samples=fake, real=real)
    np.savez(path / "samples/strip.npz", forward=walk(rng, clean[0], ladder),
             reverse=walk(rng, clean[1], ladder[::-1]), logsnr=ladder)  # fmt: skip


class Page(HTMLParser):
    """Tags in order with their attributes, text, balanced nesting."""

    VOID = frozenset({"meta", "link", "img", "source", "br"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def values(self) -> list[float]:
        return [float(attrs["value"] or "nan") for tag, attrs in self.tags if tag == "data"]


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    made = {
        "digits": make_run(root / "digits"),
        "rgb": make_run(root / "rgb", "cifar10", (3, 32, 32), 256),
        "roll": make_run(root / "roll", "swissroll", (2,), None),
    }
    (made["rgb"] / "metrics.jsonl").unlink()
    for path in made.values():
        assert report.write(path) == path / "report.html"
    return made


@pytest.mark.parametrize("name", ["digits", "rgb", "roll"])
def test_page_is_whole_and_asks_for_nothing(runs: dict[str, Path], name: str) -> None:
    page = Page(runs[name] / "report.html")
    assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        assert not any(key.startswith("on") or key == "style" for key in attrs)
        for key in ("src", "srcset", "href"):
            assert (attrs.get(key) or "data:").startswith("data:"), tag
        if tag == "img":
            assert attrs["alt"]
    assert "http://" not in page.source and "https://" not in page.source
    assert "url(" not in page.source and "@import" not in page.source


def test_policy_admits_this_style_and_no_other(runs: dict[str, Path]) -> None:
    source = (runs["digits"] / "report.html").read_text()
    style = re.findall("<style>(.*?)</style>", source, re.S)
    policy = re.findall('Security-Policy" content="([^"]*)"', source)
    digest = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    assert len(style) == len(policy) == 1
    assert policy[0].startswith("default-src 'none'; img-src data:; ")
    assert f"style-src 'sha256-{digest}';" in policy[0]
    assert "unsafe" not in policy[0]


@pytest.mark.parametrize("name", ["digits", "roll"])
def test_numbers_are_those_of_the_documents(runs: dict[str, Path], name: str) -> None:
    document = json.loads((runs[name] / "evaluation/test.json").read_text())
    nats = document["data"]["dims"] * math.log(2)
    means = [document["terms"][term]["mean"] for term in TERMS]
    expected = [means[-1], *(value for mean in means for value in (mean, mean * nats))]
    if name == "roll":
        truth = document["truth"]
        for term in TERMS:
            expected += [truth["exact_denoiser"][term]["mean"], document["terms"][term]["mean"]]
        expected.append(truth["entropy"]["mean"])
    page = Page(runs[name] / "report.html")
    assert page.values() == pytest.approx(expected, rel=1e-12)
    assert f"{means[-1]:.3f}" in page.text and "± 0.012" in page.text
    assert HASH in page.text and "CC BY 4.0" in page.text


def test_comparison_of_a_run_of_bits(tmp_path: Path) -> None:
    """Every figure of the block stands on the page, ranked; rows of bits are sequences."""
    path = make_run(tmp_path / "bits", "heartbeat", (1, 8, 8), 17)
    document = evaluation("heartbeat", (20,), 2)
    document["data"]["shape"] = [20]
    bits = {"se": 0.019, "se_mc": None, "n": 297, "unit": "bits/example"}
    document["comparison"] = {
        "K": {"mean": -2.39, **bits},
        "minus_bound": {"mean": -2.37, **bits, "se": 0.05},
        "null": {"mean": -14.4386, **bits, "se": 0.0},
        "K_minus_null": {"mean": 12.05, **bits},
        "one_day": {"mean": 7.25, **bits},
        "references": {"some paper, table 1": -2.414, "truth": -2.3219},
    }
    (path / "evaluation/test.json").write_text(json.dumps(document))
    lower = np.linspace(1, 9, 19)
    bounds = {"step_entropy_lower": lower, "step_entropy_upper": lower + 1}
    np.savez(path / "evaluation/test.npz", total=np.zeros(297), **bounds)
    rows = np.random.default_rng(0).integers(0, 2, (100, 20)).astype(np.uint8)
    np.savez(path / "samples/samples.npz", samples=rows, real=rows)
    page = Page(report.write(path))
    assert page.values()[-7:] == [-2.3219, -2.37, -2.39, -2.414, -14.4386, 12.05, 7.25]
    for text in ("−2.390 ± 0.019", "−2.414", "some paper, table 1", "one day", "bits/sequence"):
        assert text in page.text
    assert "a row each" in page.text and "an image" not in page.text
    for name in ("comparison", "steps"):
        assert png_size(path / f"report/{name}.png")[0] == round(figures.WIDE * figures.DPI)
    width, height = png_size(path / "report/samples.png")
    assert height * 20 == width * report.SEQUENCES
    assert [row.ours for row in compared.dots(document)] == [False, True, True, False]


def test_comparison_of_pictures_says_how_k_converts(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    document = json.loads((path / "evaluation/test.json").read_text())
    pixel = {"se": 0.02, "se_mc": None, "n": 297, "unit": "bits/pixel"}
    document["comparison"] = {
        "K": {"mean": 0.75, **pixel},
        "minus_bound": {"mean": -1.76, **pixel},
        "null": {"mean": -2.047, **pixel, "se": 0.0},
        "bound_nats": {"mean": 78.26, **pixel, "unit": "nats/image"},
        "gap_ratio": 1.125,
        "references": {"some paper": 1.5},
        "sigma_levels": 5.75,
        "dims_per_pixel": 1,
        "conversion": "bits/dim = log2(sigma_levels) - K/dims_per_pixel",
    }
    (path / "evaluation/test.json").write_text(json.dumps(document))
    page = Page(report.write(path))
    assert page.values()[-5:] == [1.5, 0.75, -2.047, 1.125, 78.26]
    assert "log₂ σ − K/1, with σ = 5.75 levels" in page.text
    assert "78.260 ± 0.020 nats/image" in page.text and "bits/pixel" in page.text
    assert (path / "report/comparison.png").is_file()
    document["comparison"]["references"] = {}
    (path / "evaluation/test.json").write_text(json.dumps(document))
    alone = Page(report.write(path))
    assert alone.values()[-4:] == [0.75, -2.047, 1.125, 78.26]
    assert not (path / "report/comparison.png").exists()


def test_an_importance_weighted_figure_stands_with_its_number_and_size(tmp_path: Path) -> None:
    path = make_run(tmp_path / "roll", "swissroll", (2,), None)
    document = json.loads((path / "evaluation/test.json").read_text())
    curve = [{"draws": m, **entry(0.31 - 0.01 * m, 0.02, 0.002, 297, 2)} for m in (1, 2, 4)]
    ess = {"median": 1.46, "least": 1.0}
    document["importance"] = {**curve[-1], "ess": ess, "curve": curve}
    (path / "evaluation/test.json").write_text(json.dumps(document))
    page = Page(report.write(path))
    text = " ".join(page.text.split())
    assert "M = 4 weighted trajectories" in text and "size is 1.5 of 4" in text
    assert "at most 0.270 ± 0.020 bits/dim" in text and "may lie far below" in text
    assert page.values()[-4:] == pytest.approx([0.27, 0.30, 0.29, 0.27])
    document["importance"]["ess"]["median"] = 3.0
    (path / "evaluation/test.json").write_text(json.dumps(document))
    assert "far below" not in Page(report.write(path)).text


def test_bounds_of_two_steps_make_a_figure() -> None:
    """The shortest chain with reverse steps, and one long enough to have no marks."""
    for count in (1, 400):
        values = np.linspace(-1.0, 2.0, count)
        picture = figures.entropies(values, values + 0.5, "bits/example", figures.NARROW)
        assert picture != figures.entropies(values, values + 1.5, "bits/example", figures.NARROW)


def test_figures_lie_beside_the_page(runs: dict[str, Path]) -> None:
    common = {"integrand.png", "real.png", "samples.png", "strip.png"}
    owns = {"digits": "baselines.png", "rgb": "baselines.png", "roll": "truth.png"}
    for name, own in owns.items():
        folder = runs[name] / "report"
        learning = set() if name == "rgb" else {"learning.png"}
        assert {path.name for path in folder.iterdir()} == common | learning | {own}
        for figure in {"integrand.png", "strip.png", own} | learning:
            assert png_size(folder / figure)[0] == round(figures.WIDE * figures.DPI)
    # 8 images of 8 pixels, each 15 pixels large, and 7 gaps of half a pixel
    assert png_size(runs["digits"] / "report/samples.png") == (8 * 8 * 15 + 7 * 7,) * 2
    assert png_size(runs["rgb"] / "report/real.png") == (8 * 32 * 3 + 7 * 6,) * 2


def test_same_files_give_the_same_page(runs: dict[str, Path]) -> None:
    before = (runs["roll"] / "report.html").read_bytes()
    assert report.write(runs["roll"]).read_bytes() == before
    assert not list(runs["roll"].rglob(".tmp-*"))


def test_hostile_names_are_text(runs: dict[str, Path], tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}&$\\frac{$"
    path = make_run(tmp_path / 'x"><img src=x onerror=alert(3)><b>\u202e\x07')
    edit(path / "recipe.json", recipe=evil)
    recipe = json.loads((path / "recipe.json").read_text())
    edit(path / "recipe.json", options={**recipe["options"], "seed": evil},
         data={**recipe["data"], "path": evil, "licence": evil})  # fmt: skip
    edit(path / "status.json", state=evil)
    (path / "metrics.jsonl").unlink()
    document = json.loads((path / "evaluation/test.json").read_text())
    document["baselines"][evil] = document["baselines"].pop("uniform")
    edit(path / "evaluation/test.json", baselines=document["baselines"],
         data={**document["data"], "name": evil})  # fmt: skip
    page, plain = Page(report.write(path)), Page(runs["rgb"] / "report.html")
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert page.text.count(evil) >= 6
    assert "\u202e" not in page.source and "\x07" not in page.source


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_parts_name_the_command_that_makes_them(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run 1")
    (path / "report").mkdir()
    (path / "report/strip.png").write_bytes(b"of an earlier report")
    for name in ("evaluation/test.json", "evaluation/test.npz", "samples/samples.npz",
                 "samples/strip.npz", "status.json", "environment.json"):  # fmt: skip
        (path / name).unlink()
    page = Page(report.write(path))
    here = f"'{path}'"
    assert f"nelbo evaluate {here}" in page.text and f"nelbo sample {here}" in page.text
    assert "status.json" in page.text and "validation part at step 3000" in page.text
    assert [file.name for file in (path / "report").iterdir()] == ["learning.png"]
    (path / "metrics.jsonl").unlink()
    page = Page(report.write(path))
    assert f"nelbo train digits --out {here}" in page.text
    assert not list((path / "report").iterdir())
    assert "bits/dim" not in page.text


def test_what_cannot_be_understood_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"recipe\.json"):
        report.write(tmp_path)
    path = make_run(tmp_path / "run")
    for name, content, told in (
        ("metrics.jsonl", b'{"step": 1, "loss": 2}\n{"step": 2,\n', "line 2"),
        ("metrics.jsonl", b'{"loss": 2}\n', "lacks step"),
        ("evaluation/test.json", b'{"terms": {}}', "lacks data, model"),
        ("recipe.json", b"[]", "JSON object"),
        ("samples/strip.npz", (path / "samples/strip.npz").read_bytes()[:900], "cannot be read"),
    ):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(content)
        with pytest.raises(InputRefused, match=told) as caught:
            report.write(path)
        assert str(path / name) in str(caught.value)
        (path / name).write_bytes(whole)
    for name in ("metrics.jsonl", "samples/samples.npz", "samples/strip.npz"):
        (path / name).unlink()
    document = json.loads((path / "evaluation/test.json").read_text())
    edit(path / "evaluation/test.json", terms={"total": document["terms"]["total"]})
    with pytest.raises(InputRefused, match="prior"):
        report.write(path)
    assert not (path / "report.html").exists()


def test_metrics_of_a_resumed_and_living_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"recipe": "digits"}')
    seen = '{"step": 20, "validation": {"mean": 2.5, "se": null}}'
    lines = ['{"step": 10, "loss": 3}', '{"step": 20, "loss": 9}', seen, '{"step": 20, "loss": 2}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 30, "lo')
    run = load(tmp_path)
    assert run.training.tolist() == [[10, 3], [20, 2]]
    assert run.validation[0, :2].tolist() == [20, 2.5] and np.isnan(run.validation[0, 2])
    assert "2.5" in Page(report.write(tmp_path)).text


def test_the_evaluation_that_counts(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    document = json.loads((path / "evaluation/test.json").read_text())
    (path / "evaluation/test.json").unlink()
    for name, step, calls in (
        ("test-step2-calls16-seed0", 2, 16),
        ("test-step2-full-seed0", 2, 99),
        ("test-step1-full-seed0", 1, 999),
        ("test100-step3", 3, 9999),
        ("validation-step4", 4, 9999),
    ):
        changed = {**document, "model": {"step": step}, "calls_per_example": calls}
        (path / f"evaluation/{name}.json").write_text(json.dumps(changed))
    run = load(path)
    assert (run.evaluation["model"]["step"], run.evaluation["calls_per_example"]) == (2, 99)
    (path / "evaluation/test-step2-full-seed0.json").unlink()
    assert f"nelbo evaluate {path} --calls 16" in remake.commands(load(path))


def test_commands_can_be_typed(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run $1")
    options = {"path": "my 'data'", "steps": 5, "fast": True, "clip": None}
    edit(path / "recipe.json", options={**options, "net": {"width_all": [1, 2]}})
    words = shlex.split(remake.training(load(path)))
    assert words == ["nelbo", "train", "digits", "my 'data'", "--out", str(path), "--steps", "5",
                     "--fast", "--clip", "None", "--net.width-all", "1", "2"]  # fmt: skip
    edit(path / "environment.json", command="nelbo train digits --out 'a b' --resume")
    assert remake.training(load(path)) == "nelbo train digits --out 'a b'"


@pytest.mark.parametrize(
    ("value", "text", "noise"),
    [
        ({"mean": 1.76412, "se": 0.01184, "se_mc": 0.00052}, "1.764 ± 0.012", "0.00052"),
        ({"mean": -0.5, "se": 0.0996, "se_mc": 0.0}, "−0.50 ± 0.10", "0"),
        ({"mean": 0.000412, "se": 3e-6, "se_mc": None}, "0.0004 ± <0.0001", "?"),
        ({"mean": 4.087463}, "4.087", "0"),
        ({"mean": 2.0, "se": None, "se_mc": 12.3}, "2 ± ?", "12"),
    ],
)
def test_digits_follow_the_error(value: dict[str, Any], text: str, noise: str) -> None:
    assert (wording.shown(value), wording.noise(value)) == (text, noise)


def test_durations() -> None:
    seconds = (0, 59.6, 102.4, 3600, 7384)
    texts = ["0 s", "1 min", "1 min 42 s", "1 h", "2 h 3 min"]
    assert [wording.duration(x) for x in seconds] == texts


def test_interval_holds_80_percent() -> None:
    x = np.linspace(-12, 12, 4001)
    low, middle, high = figures.interval(x[::-1], np.exp(-((x[::-1] - 1) ** 2) / 8)) or (0, 0, 0)
    reach = 2 * 1.2815516
    assert [low, middle, high] == pytest.approx([1 - reach, 1, 1 + reach], abs=1e-4)
    assert figures.interval(x, 0 * x) is None


def test_smoothing_keeps_straight_lines_and_removes_noise() -> None:
    line = 3 - 0.01 * np.arange(500)
    assert np.abs(figures.smoothed(line) - line).max() < 1e-9
    noise = np.random.default_rng(0).normal(size=3000)
    # Windows of 2·100 + 1 values and more, far from the ends: deviation at most 1/√201.
    assert np.abs(figures.smoothed(noise)[1000:2000]).max() < 7 / math.sqrt(201)


@pytest.mark.parametrize(("channels", "levels"), [(1, 17), (3, 256), (1, 2)])
def test_grid_shows_every_pixel(channels: int, levels: int) -> None:
    images = np.random.default_rng(0).integers(0, levels, (5, channels, 8, 8)).astype(np.uint8)
    grid = pictures.sample_grid(images, levels)
    factor, gap = 40, 20
    pitch = 8 * factor + gap
    assert grid.shape == (2 * pitch - gap, 3 * pitch - gap, 3)
    for index, image in enumerate(images):
        top, left = index // 3 * pitch, index % 3 * pitch
        tile = grid[top : top + 8 * factor, left : left + 8 * factor]
        block = tile.reshape(8, factor, 8, factor, 3).transpose(0, 2, 1, 3, 4)
        assert (block == block[:, :, :1, :1]).all()
        back = block[:, :, 0, 0].transpose(2, 0, 1) / 255 * (levels - 1)
        assert np.abs(back - image).max() <= (levels - 1) / 510
    assert (grid[pitch:, 2 * pitch - gap :] == 255).all()
    assert (grid[:, 8 * factor : pitch] == 255).all()


def test_pixels_of_floats_and_of_other_channels() -> None:
    x = np.array([-3.0, -1, 0, 1, 3]).reshape(1, 1, 1, 5)
    assert pictures.pixels(x, None)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    two = np.stack([np.zeros((2, 3)), np.ones((2, 3))])[None].astype(np.uint8)
    assert pictures.pixels(two, 2)[0, :, :, 1].tolist() == [[0, 0, 0, 255, 255, 255]] * 2


def test_save_grid_takes_images_and_vectors(tmp_path: Path) -> None:
    pictures.save_grid(tmp_path / "a.png", np.zeros((1, 1, 8, 8), np.uint8), 17)
    assert png_size(tmp_path / "a.png") == (960, 960)
    points = np.random.default_rng(0).normal(size=(9, 5))
    for dims in (1, 2, 5):
        pictures.save_grid(tmp_path / "b.png", points[:, :dims], None)
        assert png_size(tmp_path / "b.png") == (round(figures.NARROW * figures.DPI),) * 2


def test_frame_holds_all_points_in_a_square() -> None:
    clouds = [np.array([[0.0, 0, 9], [2, 1, 9]]), np.array([[[-4.0, 0.5, 9]]])]
    (left, right), (bottom, top) = pictures.frame(*clouds)
    assert left < -4 and right > 2 and right - left == pytest.approx(top - bottom)
    assert bottom < 0 and top > 1 and right - left < 1.1 * 6


def test_a_strip_tells_the_level_of_each_frame() -> None:
    frames = np.zeros((5, 1, 8, 8))
    # 5 inches: columns of 200 pixels, and the rows lie 200 + 2.5 · 48 pixels apart.
    picture = pictures.strip(frames, frames, np.array([8.0, 4, 0, -2, -6]), 5.0)
    image = matplotlib.image.imread(io.BytesIO(picture))
    bottom = image[-47:].reshape(47, 5, 200, 4)
    top = image[-47 - 320 : -320].reshape(47, 5, 200, 4)
    assert (top == bottom[:, ::-1]).all()
    assert all((top[:, i] != top[:, i + 1]).any() for i in range(4))


def test_a_rounded_level_has_no_negative_zero() -> None:
    frames = np.zeros((2, 1, 8, 8))
    pair = [pictures.strip(frames, frames, np.array([3.0, x]), 5.0) for x in (-0.02, 0.0)]
    assert pair[0] == pair[1]


def test_a_missing_level_of_the_strip_is_the_data() -> None:
    forward = np.random.default_rng(0).normal(size=(3, 1, 8, 8))
    levels = np.array([6.0, -6.0])
    short = pictures.strip(forward, forward[::-1], levels, figures.NARROW)
    full = pictures.strip(forward, forward[::-1], np.array([-6, 6.0, np.inf]), figures.NARROW)
    assert short == full
    assert full != pictures.strip(forward, forward[::-1], np.array([-6, 6.0, 8]), figures.NARROW)


def test_what_was_measured_beside_the_bound_has_its_section(tmp_path: Path) -> None:
    """Savings of a few-call evaluation, short chains, the probability flow; none without them."""
    run = make_run(tmp_path, "digits")
    page = report.write(run).read_text()
    for title in ("What the figure cost", "Short chains", "The probability flow"):
        assert title not in page
    path = next((run / "evaluation").glob("test*.json"))
    document = json.loads(path.read_text())
    savings = [{"name": "all of it", "se_mc": 0.00123, "calls_ratio": 1.0},
               {"name": "without magic", "se_mc": 0.00456, "calls_ratio": 13.7}]  # fmt: skip
    path.write_text(json.dumps({**document, "savings": savings}))
    head = {"schema": 1, "data": {**document["data"], "n": 48}, "model": document["model"]}
    one = entry(3.5, 0.02, 0.001, 48, 64)
    row = {"latents": 25, "grid": "optimal", "variance": "optimal", "predicted": one,
           "evaluated": entry(3.625, 0.02, 0.001, 48, 64)}  # fmt: skip
    chains = {**head, "fit": {"examples": 33}, "steps": [row], "full": [], "continuous": one}
    (run / "evaluation" / "steps-a.json").write_text(json.dumps(chains))
    ode = {"total": entry(3.25, 0.05, 0.01, 48, 64), "reading": "of <b>x_1</b>", "trace": "exact",
           "evaluations": {"mean": 77.2, "max": 131}}  # fmt: skip
    (run / "evaluation" / "ode-a.json").write_text(json.dumps({**head, "ode": ode}))
    page = report.write(run).read_text()
    for text in ("without magic", "0.00456", "13.7 ×", "33 training examples", "3.625 ± 0.020",
                 "of &lt;b&gt;x_1&lt;/b&gt;", "3.250 ± 0.050", "131"):  # fmt: skip
        assert text in page, text
