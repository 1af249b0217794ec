"""The exported directory under plain diffusers: the same images as our own sampler, from the same noise."""

import json

import diffusers
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from huggingface_hub import ModelCard

from flashdmd_ray.diffusion.sampling import few_step_sample
from flashdmd_ray.diffusion.schedule import schedule_from_config
from flashdmd_ray.models.sd3 import SD3
from flashdmd_ray.models.sd15 import SD15
from flashdmd_ray.models.sdxl import SDXL
from flashdmd_ray.results.export import export_pipeline, export_single_file, few_step_scheduler
from flashdmd_ray.results.export_facts import SINGLE_FILE
from flashdmd_ray.results.model_card import CardFacts
from flashdmd_ray.roles.image_sampling import SampleNoise, seed_of
from flashdmd_ray.roles.networks import load_student, x0_predictor
from tests.tiny import save_sd3, save_sd15, save_sdxl

TEXTS = ["a red 4", "two 7s", ""]
ROW = {"nfe": 4, "samples": 500, "frechet": 41.25, "accuracy": 0.9, "rewards": {"pickscore": 6.5}, "diversity": 13.0}
FACTS = CardFacts(
    name="tiny-4-step",
    base="someone/sdxl",
    licence="openrail++",
    cost={"generator updates": 200, "batch": 32},
    optimised_rewards=["pickscore"],
    measured={
        "prompts": "held-out prompts",
        "space": "features of a judge",
        "rows": [
            {"name": "teacher, 25 steps", **ROW},
            {"name": "student, 4 steps", **ROW, "accuracy": 0.875},
            {"name": "student, 1 step", **ROW, "nfe": 1, "accuracy": 0.5},
        ],
    },
    examples=[("a red 4", 17)],
)


def trained(family: SDXL) -> dict[str, torch.Tensor]:
    """Weights as a generator's engine returns them, different from the teacher's."""
    student = family.denoiser()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.05).add_(0.01)
    return {name: value.detach() for name, value in student.state_dict().items()}


@pytest.fixture(scope="module")
def family(request, tmp_path_factory):
    prediction_type = getattr(request, "param", "epsilon")
    return SDXL.from_pretrained(str(save_sdxl(tmp_path_factory.mktemp("base"), prediction_type=prediction_type)))


@pytest.mark.parametrize(
    ("family", "timesteps"),
    [
        ("epsilon", (999, 749, 499, 249)),
        ("v_prediction", (999, 749, 499, 249)),
        ("epsilon", (999,)),
        ("epsilon", tuple(range(999, 0, -125))),
        ("epsilon", (999, 600, 100)),
    ],
    indirect=["family"],
)
def test_plain_diffusers_draws_the_images_of_our_sampler(family, timesteps, tmp_path):
    weights = trained(family)
    out = export_pipeline(family, weights, timesteps, tmp_path / "export", FACTS)
    pipeline = StableDiffusionXLPipeline.from_pretrained(out, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    facts = json.loads((out / "flashdmd.json").read_text())
    assert facts["timesteps"] == list(timesteps)
    assert ("timesteps" in facts["call"]) == (timesteps == (999, 600, 100))
    generators = [torch.Generator().manual_seed(seed_of(5, i)) for i in range(3)]
    theirs = pipeline(
        TEXTS,
        generator=generators,
        output_type="latent",
        **facts["call"],
    ).images

    student = load_student(family, weights)
    predict_x0 = x0_predictor(student, family.schedule, family.encode(TEXTS))
    noise_sampler = SampleNoise(range(3), family.latent_shape, 5, torch.device("cpu"))
    with torch.no_grad():
        ours = few_step_sample(predict_x0, family.schedule, timesteps, noise_sampler)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * ours.abs().max().item())

    before = x0_predictor(family.teacher, family.schedule, family.encode(TEXTS))
    with torch.no_grad():
        noise_sampler = SampleNoise(range(3), family.latent_shape, 5, torch.device("cpu"))
        untrained = few_step_sample(before, family.schedule, timesteps, noise_sampler)
    assert (ours - untrained).abs().max() > 1e-3 * ours.abs().max(), "the student's weights must be those exported"


def test_boundary_scaling_vanishes():
    """LCM's default mixes 4e-8 of the input into the output at t = 249; ours nothing at all in float32."""
    scheduler, _ = few_step_scheduler({"beta_schedule": "scaled_linear"}, (999, 749, 499, 249))
    for timestep in (249, 1):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(timestep))
        assert out == 1
        assert skip < 1e-12
    skip, _ = LCMScheduler().get_scalings_for_boundary_condition_discrete(torch.tensor(249))
    assert 1e-8 < skip < 1e-7


def test_fewer_steps_are_possible_with_the_same_export():
    scheduler, call = few_step_scheduler({"beta_schedule": "scaled_linear"}, (999, 749, 499, 249))
    assert call == {"num_inference_steps": 4}
    for steps, expected in {4: [999, 749, 499, 249], 2: [999, 499], 1: [999]}.items():
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == expected


def test_a_schedule_of_neither_kind_is_refused():
    with pytest.raises(ValueError, match="OddScheduler has neither a beta_schedule nor a flow shift"):
        few_step_scheduler({"_class_name": "OddScheduler", "sigma_max": 80.0}, (999, 499))


@pytest.mark.parametrize("timesteps", [(999, 749, 499, 249), (999,), (999, 600, 100)])
def test_a_flow_schedulers_noise_levels_are_those_of_training(timesteps):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    scheduler, call = few_step_scheduler(config, timesteps)
    scheduler.set_timesteps(**call)
    _, sigmas = schedule_from_config(config).coefficients(torch.tensor(timesteps))
    torch.testing.assert_close(scheduler.sigmas, torch.cat([sigmas, torch.zeros(1)]), rtol=1e-6, atol=0)


def sd15(path):
    return SD15.from_pretrained(str(save_sd15(path, prediction_type="v_prediction")))


def sd3(path):
    return SD3.from_pretrained(str(save_sd3(path)))


def sd3_with_t5(path):
    return SD3.from_pretrained(str(save_sd3(path, t5=True)), t5=True)


def sdxl_with_micro_conditioning(path):
    return SDXL.from_pretrained(str(save_sdxl(path)), resolution=[24, 16], original_size=[40, 30], crop=[8, 0])


@pytest.mark.parametrize("make", [sd15, sd3, sd3_with_t5, sdxl_with_micro_conditioning])
def test_every_familys_export_draws_the_trainers_images(make, tmp_path):
    """Decoded images, from nothing but what flashdmd.json says."""
    family = make(tmp_path / "base")
    weights, timesteps = trained(family), (999, 749, 499, 249)
    out = export_pipeline(family, weights, timesteps, tmp_path / "export", FACTS)
    facts = json.loads((out / "flashdmd.json").read_text())
    pipeline = getattr(diffusers, facts["pipeline"]).from_pretrained(out, use_safetensors=True, **facts["load"])
    pipeline.set_progress_bar_config(disable=True)
    call = {name: tuple(value) if isinstance(value, list) else value for name, value in facts["call"].items()}
    theirs = []
    for index, text in enumerate(TEXTS):
        torch.manual_seed(seed_of(5, index))
        generator = torch.Generator().manual_seed(seed_of(5, index)) if facts["seed"] == "generator" else None
        theirs.append(pipeline(text, generator=generator, output_type="pt", **call).images)

    predict_x0 = x0_predictor(load_student(family, weights), family.schedule, family.encode(TEXTS))
    with torch.no_grad():
        noise_sampler = SampleNoise(range(3), family.latent_shape, 5, torch.device("cpu"))
        ours = family.decode(few_step_sample(predict_x0, family.schedule, timesteps, noise_sampler))
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), torch.cat(theirs), rtol=0, atol=2e-5)
    example = ModelCard.load(out / "README.md").text.split("```python")[1].split("```")[0]
    compile(example, "example", "exec")
    for name, value in {**facts["load"], **facts["call"]}.items():
        assert f"{name}={value!r}" in example.replace("(", "[").replace(")", "]"), name


def test_card_and_files(family, tmp_path):
    out = export_pipeline(family, trained(family), (999, 749, 499, 249), tmp_path / "export", FACTS)
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "openrail++"
    assert card.data.base_model == "someone/sdxl"
    measured = {(result.dataset_config, result.metric_type): result.metric_value for result in card.data.eval_results}
    others = {"frechet": 41.25, "reward pickscore": 6.5, "diversity": 13.0}
    expected = {"student, 4 steps": {"accuracy": 0.875} | others, "student, 1 step": {"accuracy": 0.5} | others}
    assert measured == {(name, metric): value for name, row in expected.items() for metric, value in row.items()}
    indexed = [result["dataset"]["config"] for result in card.data.to_dict()["model-index"][0]["results"]]
    assert sorted(indexed) == sorted(expected), "results of several rows stay apart"
    for needed in (
        "num_inference_steps=4",
        "999, 749, 499, 249",
        "generator updates: 200",
        "optimised: pickscore",
        "| a red 4 | 17 |",
    ):
        assert needed in card.text, needed
    example = card.text.split("```python")[1].split("```")[0]
    compile(example, "example", "exec")
    for file in out.rglob("*"):
        assert file.suffix not in (".bin", ".pt", ".pkl"), "safetensors only"
        if file.suffix in (".json", ".md"):
            assert family.path not in file.read_text(), f"{file} names a path of this machine"
    assert json.loads((out / "flashdmd.json").read_text())["examples"] == [{"prompt": "a red 4", "seed": 17}]
    again = SDXL.from_pretrained(str(out))
    assert again.schedule.prediction_type == family.schedule.prediction_type


def test_an_export_is_replaced_whole_and_nothing_else_is_touched(family, tmp_path):
    out = tmp_path / "runs" / "export"
    out.mkdir(parents=True)  # an empty folder may be there already
    export_pipeline(family, trained(family), (999,), out, FACTS)
    with pytest.raises(ValueError, match="do not fit the denoiser"):
        export_pipeline(family, {"unet.conv_in.weight": torch.zeros(1)}, (999, 499), out, FACTS)
    assert json.loads((out / "flashdmd.json").read_text())["timesteps"] == [999]
    export_pipeline(family, trained(family), (999, 499), out, FACTS)
    assert json.loads((out / "flashdmd.json").read_text())["timesteps"] == [999, 499]
    assert [path.name for path in out.parent.iterdir()] == ["export"], "no unfinished directory is left"

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is no earlier export"):
        export_pipeline(family, trained(family), (999,), precious, FACTS)
    assert (precious / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("family", ["v_prediction"], indirect=True)
def test_plain_diffusers_draws_the_students_images_from_a_single_file(family, tmp_path):
    weights, timesteps = trained(family), (999, 749, 499, 249)
    out = export_single_file(family, weights, timesteps, tmp_path / "file", FACTS)
    assert {path.name for path in out.iterdir()} == {SINGLE_FILE, "scheduler", "flashdmd.json", "README.md"}
    again = SDXL.from_pretrained(str(out / SINGLE_FILE), teacher_config=family.path)
    assert again.schedule.prediction_type == "v_prediction", "the file says so itself"
    pipeline = StableDiffusionXLPipeline.from_single_file(out / SINGLE_FILE, config=family.path)
    pipeline.scheduler = LCMScheduler.from_pretrained(out, subfolder="scheduler")
    whole = export_pipeline(family, weights, timesteps, tmp_path / "pipeline", FACTS)
    images = []
    for each in (pipeline, StableDiffusionXLPipeline.from_pretrained(whole, use_safetensors=True)):
        each.set_progress_bar_config(disable=True)
        call = json.loads((out / "flashdmd.json").read_text())["call"]
        images.append(each(TEXTS, generator=torch.Generator().manual_seed(0), output_type="pt", **call).images)
    assert torch.equal(*images)
    example = ModelCard.load(out / "README.md").text.split("```python")[1].split("```")[0]
    compile(example, "example", "exec")
    assert f'/{SINGLE_FILE}", config="someone/sdxl"' in example
    assert "scheduler `sgm_uniform`, 4 steps, cfg 1" in ModelCard.load(out / "README.md").text


def test_half_precision_is_diffusers_variant_and_refuses_what_it_cannot_hold(tmp_path):
    family = SDXL.from_pretrained(str(save_sdxl(tmp_path / "base")))
    weights, dtype = trained(family), torch.float16
    out = export_pipeline(family, weights, (999,), tmp_path / "half", FACTS, dtype)
    assert {file.name.split(".")[1] for file in out.rglob("*.safetensors")} == {"fp16"}
    facts = json.loads((out / "flashdmd.json").read_text())
    pipeline = StableDiffusionXLPipeline.from_pretrained(out, torch_dtype=dtype, use_safetensors=True, **facts["load"])
    expected = {name.partition(".")[2]: tensor.to(dtype) for name, tensor in weights.items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipeline.unet.state_dict().items())
    assert pipeline.text_encoder_2.dtype == pipeline.vae.dtype == dtype
    assert "variant='fp16', use_safetensors=True, torch_dtype=torch.float16)" in (out / "README.md").read_text()
    assert SDXL.from_pretrained(str(out)).teacher.state_dict().keys() == weights.keys()

    name = next(iter(weights))
    large = {**weights, name: torch.full_like(weights[name], 7e4)}
    with pytest.raises(ValueError, match=r"--dtype float16: unet: .* too large for it; use bfloat16"):
        export_single_file(family, large, (999,), tmp_path / "file", FACTS, dtype)
    assert not (tmp_path / "file").exists()
    export_single_file(family, large, (999,), tmp_path / "file", FACTS, torch.bfloat16)
