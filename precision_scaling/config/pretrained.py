"""A model from a Hugging Face directory on disk (OLMo, Llama, Mistral, Qwen): its loss, then its loss when quantized.

    python -m precision_scaling.huggingface import --model=OLMo-2-0425-1B --tokens=4e12 --workdir=runs/olmo2
    python -m precision_scaling.ptq --workdir=runs/olmo2 --method=gptq --bits=3,4,5,6

The first command takes this config by default. Of its model section only dtype and remat count.
Expected: δ falls with the bits by about e^(-P/0.6). Name a corpus like the model's training text: the embedded one is
Python sources; most papers measure on --config.data.name=c4 --config.data.validation_split=validation.
"""

import ml_collections

from precision_scaling.config import base


def get_config() -> ml_collections.ConfigDict:
    """Evaluation and calibration at the sizes that GPTQ's authors use, in batches that a large vocabulary allows."""
    c = base.get_config()
    # Logits of a batch take sequences × length × vocabulary × 4 bytes: 1.6 GB here at 1024 tokens and 100,000 words.
    c.evaluate.sequences = 128
    c.evaluate.batch_size = 4
    c.ptq.calibration_sequences = 128
    # What loses least on models that others serve (docs/ptq.md). Studies of the paper keep the plain grid and order.
    c.ptq.update({"act_order": True, "full_range": True, "clip": True})
    return c
