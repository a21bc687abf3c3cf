"""What the paper presets take on a GPU: seconds a step, and GPU memory at the peak, of `wlsup fit` itself.

Run:  python benchmarks/paper.py [--json] [--only NAME ...] [--precision 16-mixed] [--steps 40]

The published sizes with random weights, which cost what trained ones do, in their native formats: timm's ViT-B/16,
CLIP's text encoder (both written here, the tokenizer is the mini one), GPT-2 and, with --large, GPT-J-6B for magma.
Pictures are generated JPEGs of 480 x 360 through the suite's own loader; nothing is evaluated. Seconds a step are read
from TensorBoard's times of the second half; a step of the optimizer counts all batches that it accumulates.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from wlsup.models.caption_tokens import MINI_LANGUAGE  # noqa: E402
from wlsup.models.text import MINI_TEXT  # noqa: E402

NAMES = ("film", "token_replay", "full", "lst", "lora", "mae_lm", "magma", "magma_moe")
PICTURES = 2048


def make_weights(folder: Path, large: bool) -> dict[str, Path]:
    """Write random weights of the published shapes, as their own libraries do."""
    import timm
    import transformers

    torch.manual_seed(0)
    made = {"vision": folder / "vit_base.pt", "text": folder / "clip", "language": folder / "gpt2"}
    torch.save(timm.create_model("vit_base_patch16_224", num_classes=0).state_dict(), made["vision"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINI_TEXT)
    end = tokenizer.eos_token_id or tokenizer.sep_token_id
    # transformers' defaults are CLIP ViT-B's text encoder; its projection is 512 wide, as the model is
    transformers.CLIPTextModel(transformers.CLIPTextConfig(eos_token_id=end)).save_pretrained(made["text"])
    tokenizer.save_pretrained(made["text"])
    language = transformers.AutoTokenizer.from_pretrained(MINI_LANGUAGE)
    ids = {"bos_token_id": language.bos_token_id, "eos_token_id": language.eos_token_id}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**ids)).save_pretrained(made["language"])
    language.save_pretrained(made["language"])
    if large:
        made["large"] = folder / "gptj"
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**ids))
        torch.set_default_dtype(torch.float32)
        model.save_pretrained(made["large"])
        del model
        torch.cuda.empty_cache()
        language.save_pretrained(made["large"])
    return made


def make_pictures(folder: Path, count: int = PICTURES) -> Path:
    """Write JPEGs and captions.csv; return the table."""
    from PIL import Image

    from wlsup.batch import ImageSpec
    from wlsup.data.mini_evalsets import mini_eval_set

    shapes = mini_eval_set("mini_shapes", ImageSpec(size=64))
    (folder / "images").mkdir()

    def draw(number: int) -> None:
        picture = shapes.train.pictures[number % len(shapes.train)].permute(1, 2, 0).numpy()
        Image.fromarray(picture).resize((480, 360)).save(folder / "images" / f"{number}.jpg", quality=90)

    with ThreadPoolExecutor() as pool:
        list(pool.map(draw, range(count)))
    with (folder / "captions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "caption"))
        for number in range(count):
            rows.writerow((f"{number}.jpg", f"a {shapes.class_names[number % 10]} on a plain ground, number {number}"))
    return folder / "captions.csv"


def measure(name: str, folder: Path, made: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Fit for some steps; return what the run's files say."""
    approach = name.removesuffix(", GPT-J")
    overlay = next(
        path
        for path in (ROOT / f"experiments/overlays/paper_{approach}.yaml", ROOT / "experiments/overlays/paper.yaml")
        if path.is_file()
    )
    run = folder / f"run-{name}"
    command = [sys.executable, "-m", "wlsup", "fit"]
    for recipe in (ROOT / "experiments/base.yaml", ROOT / f"experiments/{approach}.yaml", overlay):
        command += ["-c", str(recipe)]
    command += ["--run_dir", str(run), "--model.encoder.weights", str(made["vision"])]
    command += ["--model.encoder.architecture", "vit_base_patch16_224"]
    if overlay.name == "paper.yaml":
        command += ["--model.text.weights", str(made["text"])]
    if approach in ("magma", "magma_moe"):
        language = made["language"] if approach == name else made["large"]
        command += ["--model.language.weights", str(language), "--model.optimizer.warmup_steps", "1"]
        if approach == "magma" and approach == name:
            command += ["--model.language.dtype", "float32"]
    command += ["--data.captions", str(folder / "captions.csv"), "--data.images", str(folder / "images")]
    command += ["--data.pairs", str(PICTURES - 64), "--data.validation_pairs", "64", "--data.eval_sets", "[]"]
    command += ["--trainer.max_epochs", "-1", "--trainer.max_steps", str(options.steps)]
    command += ["--trainer.log_every_n_steps", "1", "--reconstructions.pictures", "0", "--captioning.pictures", "0"]
    if options.precision:
        command += ["--trainer.precision", options.precision]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"name": name, "error": (done.stderr.strip().splitlines() or ["it ended without a message"])[-1]}
    cost = json.loads((run / "cost.json").read_text())
    results = json.loads((run / "results.json").read_text())
    return {
        "name": name,
        "parameters": results["parameters"],
        "peak_gpu_mib": cost["peak_memory_mib"]["gpu"],
        **step_time(run),
    }


def step_time(run: Path) -> dict[str, float]:
    """Return the median seconds between logged steps of the run's second half, and pictures a second."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    times = [event.wall_time for event in events.Scalars("train/loss")]
    times = times[len(times) // 2 :]
    seconds = statistics.median(after - before for before, after in zip(times, times[1:], strict=False))
    config = yaml.safe_load((run / "config.yaml").read_text())
    batch = config["data"]["batch_size"] * config["trainer"]["accumulate_grad_batches"]
    return {"seconds_a_step": seconds, "batch": batch, "pictures_per_second": batch / seconds}


def main() -> int:
    """Print the table, or with --json one JSON object; exits with 1 when a preset fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=NAMES, help="these approaches")
    parser.add_argument("--large", action="store_true", help="magma with GPT-J-6B too (24 GB of disk)")
    parser.add_argument("--precision", help="in the place of the presets'")
    parser.add_argument("--steps", type=int, default=40, help="of the optimizer (default: 40)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU here")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = make_weights(folder, options.large)
        make_pictures(folder)
        for one in [*options.only, *(["magma, GPT-J"] if options.large else [])]:
            rows.append(measure(one, folder, made, options))
            print(rows[-1], file=sys.stderr, flush=True)
    report = {"precision": options.precision or "the preset's", "steps": options.steps, "torch": torch.__version__,
              "device": torch.cuda.get_device_name(0), "rows": rows}  # fmt: skip
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"paper presets, precision {report['precision']}, torch {report['torch']}, {report['device']}\n")
        print(f"{'':16} {'batch':>6} {'s/step':>8} {'pictures/s':>11} {'GPU MiB':>8} {'trained':>12}")
        for row in rows:
            if "error" in row:
                print(f"{row['name']:16} {row['error']}")
                continue
            print(
                f"{row['name']:16} {row['batch']:6} {row['seconds_a_step']:8.3f} {row['pictures_per_second']:11.0f} "
                f"{row['peak_gpu_mib']:8.0f} {row['parameters']['trained']:12,}"
            )
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
