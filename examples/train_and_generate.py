"""Trains a small model on Python's standard library, quantizes it to 3 and 4 bits, and lets it write some Python.

python examples/train_and_generate.py [WORKDIR]     # half a minute on two CPU cores; again: only what is missing
"""

import sys

import precision_scaling as ps


def main(workdir: str = "runs/example") -> None:
    config = ps.load_config(
        options={
            "model.size": "25k",
            "train.tokens": 400_000,
            "precision.weights": "int8",  # of training; "" is none
            "evaluate.sequences": 128,
        }
    )
    row = ps.train_model(config, workdir)
    print(f"N = {row['N']}, D = {row['D']}: validation loss {row['loss']:.3f} nats per byte")

    table = ps.quantize_model(workdir, method="gptq", bits=(3, 4))
    for _, quantized in table.dropna(subset="P_post").iterrows():
        delta = quantized["loss"] - row["loss"]
        print(f"GPTQ at {quantized['P_post']:.0f} bits: loss {quantized['loss']:.3f}, {delta:+.3f}")

    print(f"measured again from its checkpoint: {ps.evaluate(workdir):.3f}")
    prompt = "def main("
    print(prompt + ps.generate(workdir, prompt, tokens=60, temperature=0.8, seed=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
