"""The command line: ``fastlora doctor`` and ``fastlora tune``, also as ``python -m fastlora``."""

import argparse
from collections.abc import Sequence

from fastlora import __version__, doctor, tune


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: The arguments after the program's name; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="fastlora", description="Fused LoRA layers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fastlora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("doctor", help="what fastlora finds here, and if it works")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=lambda args: doctor.run(as_json=args.json))

    command = commands.add_parser(
        "tune", help="measures which backend is the fastest here, for what chooses it on its own"
    )
    tune.add_arguments(command)
    command.set_defaults(run=tune.run)

    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
