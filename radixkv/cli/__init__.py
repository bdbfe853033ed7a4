"""The command line: `radixkv COMMAND …`."""


def main() -> None:
    """Run the command line and exit: 0 when it worked, 2 after a one-line error, 130 after Ctrl-C."""
    from radixkv.cli.app import app

    app(prog_name="radixkv")
