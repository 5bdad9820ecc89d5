"""Remedies shared by failed computations and failed imports."""

from __future__ import annotations

METADATA = "Repair the environment, or make a new one: `pip check` says what is broken."
TORCH = "Install a build of torch that fits this machine: https://pytorch.org/get-started/locally/"
NO_BF16 = "Train without it: Trainer(precision='32-true')."
COMPILER = "Only torch.compile needs it: install g++ or clang++, or set CXX to one."
FOLDER = "Give --folder, and the Trainer's default_root_dir, another place."
OWN_OPTIMIZER = (
    "Keep the optimizer that configure_optimizers returns: QLoRAStrategy(optimizer=None)."
)
_WITHOUT = {
    4: "Until then, train without quantization: LoRAStrategy.",
    8: "It is needed for load_in_8bit=True alone; NF4 is the default.",
}


def quantized(bits: int) -> str:
    """Returns the remedy where bitsandbytes' layers of that many bits do not work."""
    return (
        "Install bitsandbytes in a release for this torch and CUDA "
        "(`pip install --upgrade --force-reinstall --no-deps bitsandbytes`); "
        f"`python -m bitsandbytes` says what it finds. {_WITHOUT[bits]}"
    )
