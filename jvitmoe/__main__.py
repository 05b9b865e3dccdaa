"""Lists the commands: `python -m jvitmoe`."""

import sys

COMMANDS = {
    "train": "--config configs/digits_random.py",
    "evaluate": "--workdir runs/digits_random",
    "report": "runs/digits_dense runs/digits_random",
    "predict": "--workdir runs/digits_random IMAGE…",
    "export": "--workdir runs/digits_random --to timm --out exports/digits",
    "benchmark": "--config configs/cifar10_random.py",
}

if __name__ == "__main__":
    print("A command is a module; --help after it lists its flags:")
    for name, arguments in COMMANDS.items():
        print(f"  python -m jvitmoe.{name} {arguments}")
    sys.exit(2 if sys.argv[1:] else 0)
