"""A fresh process that reads an exported model with its own loader and says what it computes.

Run as a script: it knows nothing of autocompress (except for our own format), so that what it finds
is what others will find. It reads a job, JSON on standard input, and writes safetensors and JSON:

    reader      transformers, peft, gguf or native
    folder      of the export
    modules     [[name there, our name], ...] whose weights are asked for
    teacher     safetensors: windows (n, window); where known, index, logp, tail of the dense model
    out         stem of the two files written: logits of the first window; digests and losses

Dtype is float32: dequantized weights are then exact.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Job = dict[str, Any]


def read_transformers(job: Job) -> Any:
    """A folder, by transformers and whatever quantizer its config names."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if wrong:
        raise SystemExit(f"{len(wrong)} tensors are missing or unknown, such as {wrong[0]}")
    return model


def read_gguf(job: Job) -> Any:
    """A GGUF file, decoded by transformers."""
    from transformers import AutoModelForCausalLM

    path = Path(job["file"])
    model: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, **expert_settings(path)
    )
    wanted = any(".experts." in there for there, _ in job["modules"])
    if wanted and not any(".experts." in name for name, _ in model.named_parameters()):
        raise SystemExit(
            f"transformers reads its architecture as '{model.config.model_type}', without experts, "
            "so that only llama.cpp can check it. Add --no-check to write it unchecked"
        )
    return model


def expert_settings(path: Path) -> dict[str, Any]:
    """Settings to read a mixture of experts with: transformers 5.23 misses the experts' size."""
    from gguf import GGUFReader
    from transformers import AutoConfig

    fields = GGUFReader(path).fields
    arch = fields["general.architecture"].contents()
    size = fields.get(f"{arch}.expert_feed_forward_length")
    if size is None:
        return {}
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.moe_intermediate_size = int(size.contents())
    return {"config": config}


def read_peft(job: Job) -> Any:
    """A folder and the adapter in it, merged."""
    from peft import PeftModel

    model = read_transformers(job).eval()
    decompress(model)  # before the first forward quantized modules have no weight to adapt
    return PeftModel.from_pretrained(model, f"{job['folder']}/adapter").merge_and_unload()


def read_native(job: Job) -> Any:
    """Our own format, by its documented entry."""
    from autocompress.exporters.native import load

    return load(job["folder"], dtype=torch.float32, backend="dequantize")[0]


READERS = {
    "transformers": read_transformers,
    "gguf": read_gguf,
    "peft": read_peft,
    "native": read_native,
}


def decompress(model: Any) -> None:
    """Run one token: only then compressed-tensors makes dense weights."""
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)


def weight_of(model: Any, name: str) -> Any:
    """(out, in) float32 of a module, of an expert inside a fused parameter, or None."""
    from transformers.pytorch_utils import Conv1D

    try:
        module = model.get_submodule(name)
        weight = module.weight
    except AttributeError:
        return fused_expert(model, name)
    return weight.T if isinstance(module, Conv1D) else weight


def fused_expert(model: Any, name: str) -> Any:
    """The slice of a 3-D parameter that a checkpoint's `experts.3.up_proj` or `.w3` ends up in."""
    parent, number, kind = name.rsplit(".", 2)
    parent = parent.replace(".block_sparse_moe.", ".mlp.").removesuffix(".unfused")
    try:
        experts = model.get_submodule(parent)
    except AttributeError:
        return None
    if kind in ("down_proj", "w2"):
        return experts.down_proj[int(number)]
    gate, up = experts.gate_up_proj[int(number)].chunk(2)
    return up if kind in ("up_proj", "w3") else gate


def digest(weight: torch.Tensor) -> str:
    """Of the values in float32."""
    data = weight.detach().float().contiguous().cpu()
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def losses(logits: torch.Tensor, teacher: dict[str, torch.Tensor], number: int) -> float:
    """KL(dense || model) of a window's positions in nats, all but the dense model's top lumped."""
    logq = logits.float().log_softmax(-1).gather(1, teacher["index"][number].long())
    logp, tail = teacher["logp"][number], teacher["tail"][number]
    rest = (1 - logq.exp().sum(1)).clamp_min(1e-9)
    kl = (logp.exp() * (logp - logq)).sum(1) + torch.special.xlogy(tail, tail / rest)
    return float(kl.mean())


def main() -> None:
    """Read a job, write what was found."""
    job = json.load(sys.stdin)
    teacher = load_file(job["teacher"])
    model = READERS[job["reader"]](job).eval()
    for parameter in model.parameters():  # decoded experts come in the type of their scales
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    found: dict[str, Any] = {"kl": [], "weights": {}}
    with torch.inference_mode():
        for number, window in enumerate(teacher["windows"]):
            logits = model(input_ids=window[None], use_cache=False).logits[0].float()
            if number == 0:
                save_file({"logits": logits.clone()}, job["out"] + ".safetensors")
            if "index" in teacher:
                found["kl"].append(losses(logits, teacher, number))
    for there, ours in job["modules"]:
        weight = weight_of(model, there)
        found["weights"][ours] = None if weight is None else digest(weight)
    if job["reader"] != "native":
        assert "autocompress" not in sys.modules, "the reader must be independent of autocompress"
    Path(job["out"] + ".json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
